"""PARTICLE as a method file, with LoDisc's encoder, training loop and metrics.

    python train.py --method tests/baselines/particle.py:PARTICLE --method-option clusters=5

Saha, Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained Recognition", arXiv
2309.13822; written from facts of the authors' code (cvl-umass/PARTICLE, commit 331c92f, MIT), of
which no line is used. Parts are discovered once, by the frozen initial encoder, then their features
are contrasted. Shapes as in lodisc.py; S = 1 + K ids: 0 is the background, 1 to K are parts.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lodisc import MoCoV3, UserError, at_least_float32, check_views, momentum_update, require
from part_discovery import discover_parts, majority_ids, require_number


def id_means(tokens: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Average patch tokens (B, N, D) over each id, int64 (B, N) -> (B, S, D), zero for an absent
    one, and whether it is present, bool (B, S). Float32 or wider under any autocast."""
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = at_least_float32(tokens)
        members = F.one_hot(ids, count).to(tokens.dtype)  # (B, N, S)
        counts = members.sum(1)  # (B, S)
        means = members.mT @ tokens / counts.clamp_min(1)[:, :, None]
        return means, counts > 0


def part_loss(queries, own, other, present, present_in_other, temperature) -> Tensor:
    """The loss of one view's parts, a scalar.

    queries (B, S, C), online, of this view; own, other (B, S, C), the momentum side's of this view
    and of the other; present, present_in_other bool (B, S). The query of id c in image i has the
    other view's (i, c) as its positive; the denominator has the rows of BOTH views of all images
    but its own (i, c) of this view. Cosine / temperature; mean over the ids present in this view,
    of which one that the other view lacks counts 0."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(at_least_float32(queries.flatten(0, 1)), dim=1)  # (B S, C)
        keys = torch.cat([other.flatten(0, 1), own.flatten(0, 1)])
        keys = F.normalize(at_least_float32(keys.detach()), dim=1)  # (2 B S, C)
        present, present_in_other = present.flatten(), present_in_other.flatten()
        logits = queries @ keys.T / temperature  # (B S, 2 B S)
        rows = torch.arange(len(queries), device=queries.device)
        counted = torch.cat([present_in_other, present]).repeat(len(rows), 1)
        counted[rows, len(rows) + rows] = False  # the query's own
        denominator = logits.masked_fill(~counted, -math.inf).logsumexp(1)
        losses = denominator - logits[rows, rows]
        return (losses * (present & present_in_other)).sum() / present.sum()


def part_head(in_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, 2048), nn.LayerNorm(2048), nn.ReLU(),
                         nn.Linear(2048, 256))


class PARTICLEOutput(NamedTuple):
    total: Tensor
    global_loss: Tensor
    part_loss: Tensor
    shared_parts: Tensor  # fraction of a view's ids that the other view has


class PARTICLE(MoCoV3):
    """Part discovery once, then contrastive learning of parts and of the class token:

        ids   = `discover_parts` by the initial encoder, carried through each view's crop and flip;
                a patch has the id of most of its pixels
        z     = mean of the final patch tokens over an id, the background's too
        L     = MoCo v3's loss of the class token
                + weight * (`part_loss` of view 1 + `part_loss` of view 2), queries h(g(z)), keys
                g'(z') of the momentum side

    clusters     parts of an image, K; weight: of the part loss
    temperature  of the part loss; MoCo v3's is 0.2. --hidden-dim and --output-dim are MoCo v3's too

    `--method mocov3` is its class-token loss alone. As released: the last layer's keys as
    descriptors, votes for the foreground, two-stage k-means, heads g and h, the loss, T = 0.1.
    Departures from the release:
    - the class token's loss is MoCo v3's, in DINO's place; so is the schedule of the EMA
    - discovery at twice the training's image size, in squares, in place of native size and stride 4
    - blocks in an order drawn by seed 0, not that of the folder; saliency of all heads, not of four
    - k-means by k-means++, best of three, on all descriptors, in place of faiss on every hundredth
    - no dense CRF on the maps; no rows of absent ids; recipe and evaluation are train.py's and
      eval.py's (the release evaluates the teacher); negatives are one rank's, as there"""

    OPTIONS = ("hidden_dim", "output_dim")

    def __init__(self, encoder, clusters=5, weight=1.0, temperature=0.1, **options):
        super().__init__(encoder, **options)
        require(type(clusters) is int and 1 <= clusters <= 255, "clusters must be a whole number "
                f"in [1, 255], got {clusters}", UserError)
        require_number("weight", weight)
        require_number("temperature", temperature)
        require(temperature > 0, "temperature must be above 0, got 0", UserError)
        self.clusters, self.weight, self.part_temperature = clusters, weight, temperature
        self.part_projector = part_head(encoder.dim)  # g
        self.part_predictor = part_head(256)  # h
        self.momentum_part_projector = copy.deepcopy(self.part_projector).requires_grad_(False)

    def annotate(self, dataset):
        """Return the part ids of each image, uint8 (H, W), in the size of the image."""
        return discover_parts(self.encoder, dataset, self.clusters)

    def forward(self, view1, view2, generator=None, progress=0.0, *, maps):
        """As `MoCoV3.forward`; maps: (map1, map2) of the views, uint8 (B, H, W) -> PARTICLEOutput.
        Encoder passes, over all tokens: two online, two momentum."""
        check_views(view1, view2)
        q1, parts1, ids1 = self.queries(view1, maps[0])
        q2, parts2, ids2 = self.queries(view2, maps[1])
        with torch.no_grad():
            k1, targets1, present1 = self.keys(view1, ids1)
            k2, targets2, present2 = self.keys(view2, ids2)
        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)
        loss = part_loss(parts1, targets1, targets2, present1, present2, self.part_temperature)
        loss = loss + part_loss(parts2, targets2, targets1, present2, present1,
                                self.part_temperature)
        shared = 2 * (present1 & present2).sum() / (present1.sum() + present2.sum())
        return PARTICLEOutput(global_loss + self.weight * loss, global_loss, loss, shared)

    def queries(self, view, view_map):
        """Online branch -> z_q (B, C), of parts (B, S, 256), the ids of the patches (B, N)."""
        ids = majority_ids(view_map, self.encoder.patch_size, 1 + self.clusters)
        features, tokens = self.encoder.tokens(view)
        means, _ = id_means(tokens, ids, 1 + self.clusters)  # (B, S, D)
        return (self.predictor(self.projector(features)),
                self.part_predictor(self.part_projector(means)), ids)

    def keys(self, view, ids):
        """Momentum branch -> z_k (B, C), of parts (B, S, 256), which are present, bool (B, S)."""
        features, tokens = self.momentum_encoder.tokens(view)
        means, present = id_means(tokens, ids, 1 + self.clusters)
        return self.momentum_projector(features), self.momentum_part_projector(means), present

    def update_momentum(self, m):
        super().update_momentum(m)
        momentum_update(self.part_projector, self.momentum_part_projector, m)

    def pivotal_patches(self, images):
        return None  # images have no map here

    def chance_levels(self, batch):
        """As `MoCoV3.chance_levels`; of the part loss, if all ids are in both views of all images
        of a rank: 2 log(2 B S - 1)."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rows = 2 * (batch // ranks) * (1 + self.clusters)
        return {**super().chance_levels(batch), "part_loss": 2 * math.log(rows - 1)}
