"""PARTICLE as a method file, with LoDisc's encoder, heads, training loop and metrics.

    python train.py --method tests/baselines/particle.py:PARTICLE --method-option clusters=5

We had neither full text nor code of the paper and wrote the method from its abstract. The class
lists the known departures; there may be others. Shapes as in lodisc.py; K clusters, P rows.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lodisc import (IMPORTANCES, LoDisc, UserError, at_least_float32, contrastive_loss,
                    require)


def one_hot(assignment: Tensor, clusters: int, dtype) -> Tensor:
    """Encode cluster indices: int64 (B, N) -> (B, N, K)."""
    return F.one_hot(assignment, clusters).to(dtype)


def cluster(points: Tensor, first: Tensor, clusters: int, iterations: int = 5) -> Tensor:
    """Cluster the points of each image by k-means with cosine similarity, without random draws.

    points (B, M, D); first int64 (B,), the index of the first centre; each next centre is the point
    with the smallest maximum cosine to the centres so far. Ties go to the lowest index. An empty
    cluster keeps its centre. Float32 or wider under any autocast -> assignment (B, M)."""
    with torch.autocast(points.device.type, enabled=False):
        points = F.normalize(at_least_float32(points), dim=2)
        images = torch.arange(len(points), device=points.device)
        centres = points[images, first][:, None]  # (B, 1, D)
        nearest = (points @ centres.transpose(1, 2)).squeeze(2)  # (B, M), the maximum cosine so far
        for _ in range(clusters - 1):
            centre = points[images, nearest.argmin(1)][:, None]  # (B, 1, D)
            centres = torch.cat([centres, centre], dim=1)
            nearest = nearest.maximum((points @ centre.transpose(1, 2)).squeeze(2))
        for _ in range(iterations):
            members = one_hot((points @ centres.transpose(1, 2)).argmax(2), clusters, points.dtype)
            sums = members.transpose(1, 2) @ points  # (B, K, D)
            empty = members.sum(1)[:, :, None] == 0  # (B, K, 1)
            centres = torch.where(empty, centres, F.normalize(sums, dim=2))
        return (points @ centres.transpose(1, 2)).argmax(2)


def cluster_means(tokens: Tensor, assignment: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Average patch tokens (B, N, D) over each cluster -> (B, K, D), and whether it has members,
    bool (B, K). Float32 or wider under any autocast."""
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = at_least_float32(tokens)
        members = one_hot(assignment, clusters, tokens.dtype)  # (B, N, K)
        counts = members.sum(1)  # (B, K)
        means = members.transpose(1, 2) @ tokens / counts.clamp_min(1)[:, :, None]
        return means, counts > 0


class PARTICLEOutput(NamedTuple):
    total: Tensor
    part_loss: Tensor
    shared_parts: Tensor  # fraction of the K clusters that both views of an image have
    masks: None = None


class PARTICLE(LoDisc):
    """Part discovery and contrastive learning: Saha, Maji, "PARTICLE: Part Discovery and
    Contrastive Learning for Fine-grained Recognition", arXiv 2309.13822.

    Patch tokens are clustered, and the clusters of two views of an image contrasted:

        a  = k-means of the momentum encoder's patch tokens of BOTH views of an image, K clusters
        q  = predictor(projector(mean of the online encoder's patch tokens in a cluster))
        k  = projector(mean of the momentum encoder's patch tokens in it), no gradient
        L  = ctr(q1, k2) + ctr(q2, k1), a row for every cluster that both views have; all other
             rows, of the same image and of others, are negatives

    clusters  K; the other arguments as for LoDisc (a mask is not used)
    Encoder passes, over all tokens: two online, two momentum. Departures from the paper:
    - clustering is repeated at every step, with the current momentum encoder, not in rounds that
      alternate with training; both views are clustered jointly, so that they correspond
    - the first centre is the most important patch of view 1, so that no random draw is needed
    - a ViT's patch tokens replace a convolutional network's pixel representations
    - negatives are not gathered across ranks, as the numbers of rows differ"""

    def __init__(self, encoder, clusters=5, **options):
        super().__init__(encoder, **options)
        require(1 < clusters <= encoder.num_patches,
                f"clusters must be in [2, {encoder.num_patches}], got {clusters}", UserError)
        self.clusters = clusters

    def forward(self, view1, view2, generator=None, progress=0.0):
        """As `LoDisc.forward` -> PARTICLEOutput."""
        with torch.no_grad():
            targets1, importance = self.momentum_tokens(view1)  # (B, N, D), (B, N)
            targets2, _ = self.momentum_tokens(view2)
            both_views = torch.cat([targets1, targets2], dim=1)  # (B, 2 N, D)
            assignment = cluster(both_views, importance.argmax(1), self.clusters)
            assignment1, assignment2 = assignment.chunk(2, dim=1)  # (B, N)
        _, tokens1 = self.encoder.tokens(view1)
        _, tokens2 = self.encoder.tokens(view2)
        means1, present1 = cluster_means(tokens1, assignment1, self.clusters)  # (B, K, D), (B, K)
        means2, present2 = cluster_means(tokens2, assignment2, self.clusters)
        target_means1, _ = cluster_means(targets1, assignment1, self.clusters)
        target_means2, _ = cluster_means(targets2, assignment2, self.clusters)
        shared = present1 & present2  # (B, K)
        loss = self.part_loss(means1[shared], target_means2[shared])
        loss = loss + self.part_loss(means2[shared], target_means1[shared])
        return PARTICLEOutput(loss, loss, shared.float().mean())

    def momentum_tokens(self, view):
        """Return the momentum encoder's patch tokens (B, N, D) and their importance (B, N)."""
        importance = IMPORTANCES[self.importance]
        _, tokens, attentions = self.momentum_encoder.encode(view, kind=importance.attention_kind)
        importance = importance.function(attentions, tokens)
        return tokens, importance[:, -tokens.shape[1]:]  # never a register's

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
    def pivotal_patches(self, images):
        """Return the cluster with the greatest mean importance: bool (n, N), to draw."""
        tokens, importance = self.momentum_tokens(images)
        assignment = cluster(tokens, importance.argmax(1), self.clusters)  # (n, N)
        means, present = cluster_means(importance[:, :, None], assignment, self.clusters)
        most = means.squeeze(2).masked_fill(~present, -math.inf).argmax(1)  # (n,)
        return assignment == most[:, None]

    def chance_levels(self, batch):
        """Return the loss of equal features if all clusters occur in both views of all images."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rows = batch // ranks * self.clusters
        return {"part_loss": 2 * 2 * self.temperature * math.log(rows)}
