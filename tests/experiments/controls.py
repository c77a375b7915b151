"""Controls of what the local branch sees, as method files for train.py --method.

    python train.py --data cub --method tests/experiments/controls.py:Oracle --local-input crop

Each class is LoDisc with another choice of the patches, or with `--local-input crop` of the box.
Shapes as in lodisc.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.birds import BIRD
from lodisc import (LoDisc, UserError, at_least_float32, box_mask, check_views, enlarge_box,
                    location_mask, mask_pixels, patch_importance, require)

TIE = 1e-6  # weight of the distance in view widths: below one pixel's cover


def patch_centres(num_patches: int) -> Tensor:
    """Return (row, column) of each patch's centre, in halves of a patch: whole numbers, so that
    equal distances are equal, float32 (N, 2)."""
    line = 2.0 * torch.arange(math.isqrt(num_patches)) + 1
    return torch.cartesian_prod(line, line)


def nearness(num_patches: int, point=None) -> Tensor:
    """Return minus the squared distance of each patch to a point, (B, 1, 2), by default the view's
    centre, in halves of a patch: float32 (B, N), by default (N,)."""
    if point is None:
        point = math.isqrt(num_patches)
    return -(patch_centres(num_patches) - point).square().sum(-1)


def first_component(patches: Tensor) -> Tensor:
    """Return each patch token's coordinate on the first principal component of all of the batch's:
    (B, N, D) -> (B, N). Its sign is that by which the inner third of the grid exceeds the rest."""
    with torch.autocast(patches.device.type, enabled=False):
        centred = at_least_float32(patches).nan_to_num()  # train.py reports what is not finite
        centred = centred - centred.mean(dim=(0, 1))
        points = centred.flatten(0, 1)  # (B N, D)
        _, directions = torch.linalg.eigh(points.T @ points)  # ascending eigenvalues
        scores = centred @ directions[:, -1]  # (B, N)
    side = math.isqrt(patches.shape[1])
    inner = 3 * (patch_centres(patches.shape[1]) - side).abs().amax(dim=1) <= side
    inner = inner.to(scores.device)
    if scores[:, inner].mean() < scores[:, ~inner].mean():
        scores = -scores
    return scores


def object_importance(maps: Tensor, patch_size: int) -> Tensor:
    """Rank patches by the fraction that the object covers, ties by distance to its centroid:
    maps uint8 (B, H, W), object above 0 -> float64 (B, N). A view without it: by distance to its
    centre."""
    pixels = (maps > 0).double()  # (B, H, W)
    cover = F.avg_pool2d(pixels, patch_size).flatten(1)  # (B, N)
    places = patch_centres(pixels[0].numel()).to(pixels) / 2  # of the pixels, (H W, 2)
    size = pixels.sum((1, 2))[:, None]
    middle = maps.shape[1] / 2
    centroid = torch.where(size > 0, pixels.flatten(1) @ places / size.clamp_min(1), middle)
    centres = patch_centres(cover.shape[1]).to(pixels) * patch_size / 2
    distance = (centroid[:, None] - centres).norm(dim=2) / maps.shape[1]  # (B, N)
    return cover - TIE * distance


def block_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Keep one block: the k patches nearest to a random point by the larger of the vertical and the
    (stretched) horizontal distance: a rectangle of up to 3:1, longer at a border of the grid."""
    batch, num_patches = importance.shape
    side, patch = math.isqrt(num_patches), torch.arange(num_patches)
    row, column, stretch = torch.rand(3, batch, 1, generator=generator)  # (B, 1) each
    stretch = 3 ** (stretch - 0.5)
    vertical = (patch // side + 0.5 - side * row).abs() / stretch  # (B, N)
    horizontal = (patch % side + 0.5 - side * column).abs() * stretch
    distance = torch.maximum(vertical, horizontal)
    return location_mask(-distance, keep_ratio).to(importance.device, non_blocking=True)


class Box(LoDisc):
    """The box of `--local-input crop` where it is, with all else set to zero: the shape of that box
    without the enlargement."""

    OPTIONS = tuple(name for name in LoDisc.OPTIONS if name not in ("mask", "local_input"))
    pivotal_mask = staticmethod(box_mask)

    def key_and_mask(self, view, generator=None):
        features, importance = patch_importance(self.momentum_encoder, view, self.importance)
        return self.momentum_projector(features), box_mask(importance, self.keep_ratio)


class Control(LoDisc):
    """LoDisc with its own choice of patches, so without --mask and --importance."""

    OPTIONS = tuple(name for name in LoDisc.OPTIONS if name not in ("mask", "importance"))

    def pivotal_patches(self, images):
        return None  # no attention chooses them


class Block(Control):
    """The patches of a block at a random place."""

    OPTIONS = tuple(name for name in Control.OPTIONS if name != "local_input")

    def key_and_mask(self, view, generator=None):
        unused = view.new_empty(len(view), self.encoder.num_patches)
        return self.key(view), block_mask(unused, self.keep_ratio, generator)


class Centre(Control):
    """The patches nearest to the view's centre; ties of boxes: the upper, then the left."""

    def key_and_mask(self, view, generator=None):
        importance = nearness(self.encoder.num_patches).to(view.device)
        return self.key(view), self.pivotal_mask(importance.expand(len(view), -1), self.keep_ratio)


def box_side(num_patches: int, keep_ratio: float) -> int:
    """Return the side of `box_mask`'s box in patches."""
    return math.isqrt(int(box_mask(torch.zeros(1, num_patches), keep_ratio).sum()))


class Anywhere(Control):
    """The box at a place drawn uniformly from all in the grid; without
    `--local-input crop` the patches nearest to its centre."""

    def key_and_mask(self, view, generator=None):
        side = math.isqrt(self.encoder.num_patches)
        box = box_side(self.encoder.num_patches, self.keep_ratio)
        first = torch.randint(side - box + 1, (len(view), 1, 2), generator=generator)
        importance = nearness(self.encoder.num_patches, 2 * first + box).to(view.device)
        return self.key(view), self.pivotal_mask(importance, self.keep_ratio)


class FirstComponent(Control):
    """The patches with the greatest `first_component`; under torchrun that of each rank's batch."""

    def key_and_mask(self, view, generator=None):
        features, patches = self.momentum_encoder.tokens(view)
        mask = self.pivotal_mask(first_component(patches), self.keep_ratio)
        return self.momentum_projector(features), mask


class OracleOutput(NamedTuple):
    total: Tensor
    global_loss: Tensor
    local_loss: Tensor
    no_object: Tensor  # fraction of the views without it
    masks: tuple[Tensor, Tensor]


class Oracle(Control):
    """The patches that show most of the object: the best that a choice of patches could be, not a
    method. Of data with regions: the drawn birds, or CUB by its boxes, or segmentations if they are
    unpacked."""

    sign = 1

    def annotate(self, dataset):
        """Return the object of each image, uint8 (H, W), 1 or 0."""
        require(hasattr(dataset, "regions"), "the oracle needs data with regions: synthetic or cub",
                UserError)
        return [dataset.regions(i).point(lambda region: int(region >= BIRD))
                for i in range(len(dataset))]

    def forward(self, view1, view2, generator=None, progress=0.0, *, maps):
        """As `LoDisc.forward`, with the masks by the maps (map1, map2), uint8 (B, H, W)."""
        check_views(view1, view2)
        mask1, mask2 = self.mask_of(maps[0]), self.mask_of(maps[1])
        q1, q2 = self.query(view1), self.query(view2)
        with torch.no_grad():
            k1, k2 = self.key(view1), self.key(view2)
            l1, l2 = self.local_key(view1, mask1), self.local_key(view2, mask2)
        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)
        local_loss = self.contrast(q1, l2) + self.contrast(q2, l1)
        total = self.global_weight * global_loss + self.local_weight * local_loss
        no_object = 1 - (torch.cat(maps) > 0).flatten(1).any(1).float().mean()
        return OracleOutput(total, global_loss, local_loss, no_object, (mask1, mask2))

    def mask_of(self, view_map):
        importance = object_importance(view_map.cpu(), self.encoder.patch_size)  # MPS: no float64
        return self.pivotal_mask(self.sign * importance, self.keep_ratio).to(view_map.device)

    def drawn_views(self, images, maps):
        """Return what eval.py masks draws below the maps: {name: images (n, 3, H, W)}."""
        mask, size = self.mask_of(maps), self.encoder.patch_size
        if self.local_input == "crop":
            seen = enlarge_box(images, mask, size, math.isqrt(self.num_kept))
        else:
            seen = mask_pixels(images, mask, size)
        return {"seen by the\nlocal branch": seen}


class Antioracle(Oracle):
    """The patches that show least of the object."""

    sign = -1
