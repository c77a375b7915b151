"""CVSA after its abstract, as a method file with LoDisc's encoder, training loop and metrics.

    python train.py --method tests/baselines/cvsa.py:CVSA --method-option weight=0.1

Wu, Li, Zang, Li, "Exploring Localization for Self-supervised Fine-grained Contrastive Learning",
arXiv 2106.15788. Its code is not public and we had only the abstract: the class lists what is known
and what is ours. Shapes as in lodisc.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lodisc import MoCoV3, at_least_float32, check_views
from part_discovery import Maps, discover_parts, majority_ids, require_number

MOST_STRETCHED = 2  # a foreground is pasted if no side becomes longer or shorter by more than this


def foreground_boxes(maps: Tensor, patch_size: int) -> list:
    """Return the smallest rectangle of patches that holds each map's foreground, in pixels: maps
    uint8 (B, H, W), foreground above 0 -> B times (top, left, bottom, right), or None without it.
    A patch is foreground if most of its pixels are."""
    side = maps.shape[1] // patch_size
    patches = majority_ids((maps > 0).to(torch.uint8), patch_size, 2)  # (B, N)
    patches = rearrange(patches, "b (rows columns) -> b rows columns", rows=side)
    boxes = []
    for grid in patches.cpu():
        rows, columns = grid.any(1).nonzero().flatten(), grid.any(0).nonzero().flatten()
        box = None
        if len(rows):
            box = tuple(patch_size * int(edge)
                        for edge in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
        boxes.append(box)
    return boxes


def is_pasted(source, target) -> bool:
    """Whether the pixels in the box source are pasted into the box target."""
    if source is None or target is None:
        return False
    for axis in (0, 1):
        ratio = (source[axis + 2] - source[axis]) / (target[axis + 2] - target[axis])
        if not 1 / MOST_STRETCHED <= ratio <= MOST_STRETCHED:
            return False
    return True


def paste(image: Tensor, source, ground: Tensor, target) -> Tensor:
    """Return the ground (C, H, W) with the image's pixels in the box source, resized bilinearly, in
    the box target."""
    top, left, bottom, right = source
    pixels = image[:, top:bottom, left:right]
    top, left, bottom, right = target
    pixels = F.interpolate(pixels[None], (bottom - top, right - left), mode="bilinear")[0]
    pasted = ground.clone()
    pasted[:, top:bottom, left:right] = pixels
    return pasted


def swap_foregrounds(views: Tensor, maps: Tensor, patch_size: int):
    """Paste each view's foreground over that of the next view, the last view's over the first's.

    views (B, 3, H, W), maps uint8 (B, H, W) -> (swapped views (B, 3, H, W), the foreground of each
    as fraction per patch (B, N), whether it was pasted, bool (B,)). View i becomes view j = i + 1
    modulo B with the box of i's foreground in that of j's; it stays as it is if a foreground is
    missing or a side would be stretched by more than MOST_STRETCHED."""
    foregrounds = (maps > 0).to(views.dtype)[:, None]  # (B, 1, H, W)
    boxes = foreground_boxes(maps, patch_size)
    swapped, places, pasted = [], [], []
    for i, box in enumerate(boxes):
        j = (i + 1) % len(boxes)
        view, place = views[i], foregrounds[i]
        pasted.append(is_pasted(box, boxes[j]))
        if pasted[-1]:
            view = paste(view, box, views[j], boxes[j])
            place = paste(place, box, torch.zeros_like(place), boxes[j])
        swapped.append(view)
        places.append(place)
    fractions = F.avg_pool2d(torch.stack(places), patch_size).flatten(1)  # (B, N)
    return torch.stack(swapped), fractions, torch.tensor(pasted, device=views.device)


def alignment_loss(row: Tensor, fractions: Tensor) -> Tensor:
    """Return 1 - the cosine of the class token's attention to the patches, row (B, N), and the
    foreground as fraction per patch (B, N), mean over the images that have one: a scalar."""
    with torch.autocast(row.device.type, enabled=False):
        distances = 1 - F.cosine_similarity(at_least_float32(row), at_least_float32(fractions))
        has_foreground = fractions.sum(1) > 0
        return (distances * has_foreground).sum() / has_foreground.sum().clamp_min(1)


class CVSAOutput(NamedTuple):
    total: Tensor
    global_loss: Tensor
    alignment_loss: Tensor
    not_pasted: Tensor  # fraction of the views that stay as they are


class CVSA(MoCoV3):
    """Cross-view saliency alignment, after the abstract. MoCo v3 with the foregrounds of the query
    views swapped, plus a loss that guides the encoder's attention to them:

        L     = ctr(q(x~1), k(x2)) + ctr(q(x~2), k(x1)) + weight * (align(x~1) + align(x~2)) / 2
        x~    = `swap_foregrounds` of the views x
        align = `alignment_loss` of the last layer's class attention in the query's pass over x~

    weight  of the alignment loss; the other arguments as for MoCoV3. Two online and two momentum
            passes over a view each.

    - foreground swapped between images of the views: known. Which view, and that keys are of
      unswapped views: ours
    - saliency regions: known; what detects them is not. Ours is PARTICLE's `discover_parts` by the
      initial weights, fixed before the training: foreground or not
    - the region: ours, the smallest rectangle of patches, resized to the next image's, which it
      covers; views with too unlike rectangles stay as they are
    - a cross-view alignment loss that guides to the foreground: known. Its form is ours, after CAST
      (arXiv 2012.04630), and so is its weight, chosen on held-out images of flowers17
      (tests/experiments/RESULTS.md)
    - MoCo v3 on a ViT in place of BYOL on a ResNet-50, and the recipe: ours"""

    def __init__(self, encoder, weight=0.1, **options):
        super().__init__(encoder, **options)
        require_number("weight", weight)
        self.weight = weight

    def annotate(self, dataset):
        """Return the foreground of each image, uint8 (H, W), 1 or 0, in the size of the image."""
        maps = discover_parts(self.encoder, dataset)
        return Maps(maps.patches.clamp_max(1), maps.sizes)

    def forward(self, view1, view2, generator=None, progress=0.0, *, maps):
        """As `MoCoV3.forward`; maps: (map1, map2) of the views, uint8 (B, H, W) -> CVSAOutput."""
        check_views(view1, view2)
        q1, alignment1, pasted1 = self.aligned_query(view1, maps[0])
        q2, alignment2, pasted2 = self.aligned_query(view2, maps[1])
        with torch.no_grad():
            k1, k2 = self.key(view1), self.key(view2)
        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)
        alignment = (alignment1 + alignment2) / 2
        not_pasted = 1 - torch.cat([pasted1, pasted2]).float().mean()
        return CVSAOutput(global_loss + self.weight * alignment, global_loss, alignment, not_pasted)

    def aligned_query(self, view, view_map):
        """Online branch over the swapped view -> z_q (B, C), alignment loss, bool (B,)."""
        swapped, fractions, pasted = swap_foregrounds(view, view_map, self.encoder.patch_size)
        features, attentions = self.encoder.with_attention(swapped, "row")
        query = self.predictor(self.projector(features))
        return query, alignment_loss(attentions[-1], fractions), pasted

    def pivotal_patches(self, images):
        return None  # images have no map here

    def drawn_views(self, images, maps):
        """Return what eval.py masks draws below the maps: {name: images (n, 3, H, W)}, with a white
        frame around what was pasted; images in [0, 1]."""
        swapped, _, pasted = swap_foregrounds(images, maps, self.encoder.patch_size)
        boxes = foreground_boxes(maps, self.encoder.patch_size)
        for i in pasted.nonzero().flatten().tolist():
            top, left, bottom, right = boxes[(i + 1) % len(boxes)]
            swapped[i, :, [top, bottom - 1], left:right] = 1
            swapped[i, :, top:bottom, [left, right - 1]] = 1
        return {"pasted over\nthe next": swapped}
