"""CVSA and PARTICLE as method files, with LoDisc's encoder, heads, training loop and metrics.

    python train.py --method tests/baselines.py:CVSA
    python train.py --method tests/baselines.py:PARTICLE --method-option parts=5

We had neither full text nor code of the two papers and wrote both methods from the abstracts. Each
class lists its known departures; there may be others. Shapes as in lodisc.py; K parts, P rows.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lodisc import (IMPORTANCES, LoDisc, UserError, at_least_float32, class_row, contrastive_loss,
                    mask_pixels, require)


# --- CVSA: cross-view saliency alignment ------------------------------------------------------


def swap_background(views: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Paste every image's kept patches over the next image of the batch, the last over the first.

    views (B, 3, H, W), masks bool (B, N) -> x_i * m_i + x_j * (1 - m_i), j = i + 1 modulo B."""
    salient = mask_pixels(views, masks, patch_size)
    return salient + mask_pixels(views.roll(-1, dims=0), ~masks, patch_size)  # (B, 3, H, W)


def alignment_loss(row: Tensor, masks: Tensor) -> Tensor:
    """Return -log of the fraction of attention on the pasted patches, mean over images: a scalar.

    row (B, h, 1+N), the class token's attention in one layer: heads averaged, patches
    renormalised, float32; masks bool (B, N), the pasted patches. The fraction is clamped to
    [1e-6, 1]; the loss is 0 if all attention is on them."""
    patches = class_row(row)  # (B, N)
    fraction = (patches * masks).sum(1) / patches.sum(1)  # (B,)
    return -fraction.clamp(1e-6, 1).log().mean()


class CVSAOutput(NamedTuple):
    total: Tensor
    contrast_loss: Tensor
    alignment_loss: Tensor
    masks: tuple[Tensor, Tensor]  # bool (B, N), the pasted patches of view 1 and of view 2


class CVSA(LoDisc):
    """Cross-view saliency alignment: Wu, Li, Zang, Li, "Exploring Localization for Self-supervised
    Fine-grained Contrastive Learning", arXiv 2106.15788.

    Views are made by swapping backgrounds, and a loss guides the attention to the foreground:

        m_i   = location_mask(importance of view x_i in its own momentum pass)
        x~_i  = x_i * m_i + x_j * (1 - m_i), another image x_j of the batch
        L     = ctr(q(x~1), k(x2)) + ctr(q(x~2), k(x1)) + weight * (align(x~1) + align(x~2)) / 2
        align = -log(class token's attention of the online encoder's last layer, within m_i)

    weight  of the alignment loss; the other arguments as for LoDisc
    Encoder passes: two online, two momentum. Departures from the paper:
    - saliency is the momentum encoder's attention, as we have no saliency detector
    - salient patches, not a salient region, are pasted in their own place, without resizing
    - the alignment loss's form and weight are ours; the abstract gives neither"""

    def __init__(self, encoder, weight=1.0, **options):
        super().__init__(encoder, **options)
        self.weight = weight

    def forward(self, view1, view2, generator=None, progress=0.0):
        """As `LoDisc.forward` -> CVSAOutput. Keys are of unswapped views, as in MoCo v3."""
        with torch.no_grad():
            key1, attentions1 = self.global_key(view1)
            key2, attentions2 = self.global_key(view2)
            masks = (self.pivotal_mask(view1, attentions1, generator),
                     self.pivotal_mask(view2, attentions2, generator))
        query1, alignment1 = self.aligned_query(view1, masks[0])
        query2, alignment2 = self.aligned_query(view2, masks[1])
        contrast = self.contrast(query1, key2) + self.contrast(query2, key1)
        alignment = (alignment1 + alignment2) / 2
        return CVSAOutput(contrast + self.weight * alignment, contrast, alignment, masks)

    def aligned_query(self, view, masks):
        """Online branch over the swapped view -> z_q (B, C), alignment loss."""
        swapped = swap_background(view, masks, self.encoder.patch_size)
        features, attentions = self.encoder(swapped, attention="row")
        return self.predictor(self.projector(features)), alignment_loss(attentions[-1], masks)

    def chance_levels(self, batch):
        """As `LoDisc.chance_levels`; for the alignment loss, of uniform attention over patches."""
        return {"contrast_loss": super().chance_levels(batch)["global_loss"],
                "alignment_loss": math.log(self.encoder.num_patches / self.num_kept)}


# --- PARTICLE: part discovery and contrastive learning ----------------------------------------


def one_hot(assignment: Tensor, parts: int, dtype) -> Tensor:
    """Encode part indices: int64 (B, N) -> (B, N, K)."""
    return F.one_hot(assignment, parts).to(dtype)


def cluster(points: Tensor, first: Tensor, parts: int, iterations: int = 5) -> Tensor:
    """Cluster the points of each image by k-means with cosine similarity, without random draws.

    points (B, M, D); first int64 (B,), the index of the first centre; each next centre is the point
    with the smallest maximum cosine to the centres so far. Ties go to the lowest index. An empty
    cluster keeps its centre. Float32 or wider under any autocast -> assignment (B, M)."""
    with torch.autocast(points.device.type, enabled=False):
        points = F.normalize(at_least_float32(points), dim=2)
        images = torch.arange(len(points), device=points.device)
        centres = points[images, first][:, None]  # (B, 1, D)
        nearest = (points @ centres.transpose(1, 2)).squeeze(2)  # (B, M), the maximum cosine so far
        for _ in range(parts - 1):
            centre = points[images, nearest.argmin(1)][:, None]  # (B, 1, D)
            centres = torch.cat([centres, centre], dim=1)
            nearest = nearest.maximum((points @ centre.transpose(1, 2)).squeeze(2))
        for _ in range(iterations):
            members = one_hot((points @ centres.transpose(1, 2)).argmax(2), parts, points.dtype)
            sums = members.transpose(1, 2) @ points  # (B, K, D)
            empty = members.sum(1)[:, :, None] == 0  # (B, K, 1)
            centres = torch.where(empty, centres, F.normalize(sums, dim=2))
        return (points @ centres.transpose(1, 2)).argmax(2)


def part_means(tokens: Tensor, assignment: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Average patch tokens (B, N, D) over each part -> (B, K, D), and whether it has members,
    bool (B, K). Float32 or wider under any autocast."""
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = at_least_float32(tokens)
        members = one_hot(assignment, parts, tokens.dtype)  # (B, N, K)
        counts = members.sum(1)  # (B, K)
        means = members.transpose(1, 2) @ tokens / counts.clamp_min(1)[:, :, None]
        return means, counts > 0


class PARTICLEOutput(NamedTuple):
    total: Tensor
    part_loss: Tensor
    shared_parts: Tensor  # fraction of the K parts that both views of an image have
    masks: None = None


class PARTICLE(LoDisc):
    """Part discovery and contrastive learning: Saha, Maji, "PARTICLE: Part Discovery and
    Contrastive Learning for Fine-grained Recognition", arXiv 2309.13822.

    Patch tokens are clustered into parts, and the parts of two views of an image contrasted:

        a  = k-means of the momentum encoder's patch tokens of BOTH views of an image, K clusters
        q  = predictor(projector(mean of the online encoder's patch tokens over a part))
        k  = projector(mean of the momentum encoder's patch tokens over it), no gradient
        L  = ctr(q1, k2) + ctr(q2, k1), a row for every part that both views have; all other
             rows, of the same image and of others, are negatives

    parts  K; the other arguments as for LoDisc (a mask is not used, --compile has no effect)
    Encoder passes, over all tokens: two online, two momentum. Departures from the paper:
    - clustering is repeated at every step, with the current momentum encoder, not in rounds that
      alternate with training; both views are clustered jointly, so that their parts correspond
    - the first centre is the most important patch of view 1, so that no random draw is needed
    - a ViT's patch tokens replace a convolutional network's pixel representations
    - negatives are not gathered across ranks, as the numbers of rows differ"""

    def __init__(self, encoder, parts=5, **options):
        super().__init__(encoder, **options)
        require(1 < parts <= encoder.num_patches,
                f"parts must be in [2, {encoder.num_patches}], got {parts}", UserError)
        self.parts = parts

    def forward(self, view1, view2, generator=None, progress=0.0):
        """As `LoDisc.forward` -> PARTICLEOutput."""
        with torch.no_grad():
            targets1, importance = self.momentum_tokens(view1)  # (B, N, D), (B, N)
            targets2, _ = self.momentum_tokens(view2)
            assignment = cluster(torch.cat([targets1, targets2], dim=1), importance.argmax(1),
                                 self.parts).chunk(2, dim=1)  # (B, N) of each view
        tokens1, tokens2 = (self.encoder.tokens(view)[0][:, 1:] for view in (view1, view2))
        means, present = zip(*(part_means(tokens, assignment[view], self.parts) for tokens, view in
                               ((tokens1, 0), (tokens2, 1), (targets1, 0), (targets2, 1))))
        both = present[0] & present[1]  # (B, K)
        rows1, rows2, target_rows1, target_rows2 = (mean[both] for mean in means)  # (P, D)
        loss = self.part_loss(rows1, target_rows2) + self.part_loss(rows2, target_rows1)
        return PARTICLEOutput(loss, loss, both.float().mean())

    def momentum_tokens(self, view):
        """Return the momentum encoder's patch tokens (B, N, D) and their importance (B, N)."""
        function, stored = IMPORTANCES[self.importance]
        tokens, attentions = self.momentum_encoder.tokens(view, attention=stored)
        return tokens[:, 1:], function(attentions)

    def part_loss(self, rows, targets):
        """Contrast online rows with momentum rows, (P, D); 0, still in the graph, for P < 2."""
        counted = float(len(rows) > 1)
        if not counted:  # all ranks must run the same layers, for DDP and SyncBatchNorm
            rows, targets = (torch.cat([x, x.new_zeros(2, x.shape[1])]) for x in (rows, targets))
        with torch.no_grad():
            keys = self.momentum_projector(targets)
        queries = self.predictor(self.projector(rows))  # (P, C)
        return counted * contrastive_loss(queries, keys, self.temperature)

    @torch.no_grad()
    def masks(self, images):
        """Return the part with the greatest mean importance: bool (n, N), to draw."""
        tokens, importance = self.momentum_tokens(images)
        assignment = cluster(tokens, importance.argmax(1), self.parts)  # (n, N)
        means, present = part_means(importance[:, :, None], assignment, self.parts)  # (n, K, 1)
        most = means.squeeze(2).masked_fill(~present, -math.inf).argmax(1)  # (n,)
        return assignment == most[:, None]

    def chance_levels(self, batch):
        """Return the loss of equal features if all parts occur in both views of all images."""
        own = batch // (dist.get_world_size() if dist.is_initialized() else 1)
        return {"part_loss": 2 * 2 * self.temperature * math.log(own * self.parts)}
