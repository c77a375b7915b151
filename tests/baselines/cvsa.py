"""CVSA as a method file, with LoDisc's encoder, heads, training loop and metrics.

    python train.py --method tests/baselines/cvsa.py:CVSA

We had neither full text nor code of the paper and wrote the method from its abstract. The class
lists the known departures; there may be others. Shapes as in lodisc.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lodisc import LoDisc, mask_pixels


def swap_background(views: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Paste every image's kept patches over the next image of the batch, the last over the first.

    views (B, 3, H, W), masks bool (B, N) -> x_i * m_i + x_j * (1 - m_i), j = i + 1 modulo B."""
    salient = mask_pixels(views, masks, patch_size)
    return salient + mask_pixels(views.roll(-1, dims=0), ~masks, patch_size)  # (B, 3, H, W)


def alignment_loss(row: Tensor, masks: Tensor) -> Tensor:
    """Return -log of the fraction of attention on the pasted patches, mean over images: a scalar.

    row (B, N), the class token's attention to the patches in one layer; masks bool (B, N), the
    pasted patches. The fraction is clamped to [1e-6, 1]; the loss is 0 if all is on them."""
    fraction = (row * masks).sum(1) / row.sum(1)  # (B,)
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
            k1, mask1 = self.key_and_mask(view1, generator)
            k2, mask2 = self.key_and_mask(view2, generator)
        q1, alignment1 = self.aligned_query(view1, mask1)
        q2, alignment2 = self.aligned_query(view2, mask2)
        contrast = self.contrast(q1, k2) + self.contrast(q2, k1)
        alignment = (alignment1 + alignment2) / 2
        return CVSAOutput(contrast + self.weight * alignment, contrast, alignment, (mask1, mask2))

    def aligned_query(self, view, masks):
        """Online branch over the swapped view -> z_q (B, C), alignment loss."""
        swapped = swap_background(view, masks, self.encoder.patch_size)
        features, attentions = self.encoder.with_attention(swapped, "row")
        return self.predictor(self.projector(features)), alignment_loss(attentions[-1], masks)

    def chance_levels(self, batch):
        """As `LoDisc.chance_levels`; for the alignment loss, of uniform attention over patches."""
        return {"contrast_loss": super().chance_levels(batch)["global_loss"],
                "alignment_loss": math.log(self.encoder.num_patches / self.num_kept)}
