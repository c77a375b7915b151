"""PARTICLE as a method file, with LoDisc's encoder, training loop and metrics.

    python train.py --method tests/baselines/particle.py:PARTICLE --method-option clusters=5

Saha, Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained Recognition", arXiv
2309.13822; written from facts of the authors' code (cvl-umass/PARTICLE, commit 331c92f, MIT), of
which no line is used. Parts are discovered once, by the frozen initial encoder, then their features
are contrasted. Shapes as in lodisc.py; n images of a block, M descriptors, K clusters; S = 1 + K
ids: 0 is the background, 1 to K are parts.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from data.augment import to_tensor
from lodisc import (MoCoV3, UserError, VisionTransformer, at_least_float32, check_views,
                    momentum_update, require, resize_positions)

BLOCK = 30  # images whose descriptors are clustered together
MOST = 14  # clusters of a block
ELBOW = 0.975  # the number of clusters grows until the error falls by less than this factor
SALIENT, VOTES = 0.065, 0.75  # mean saliency of a foreground cluster, in this fraction of images


# --- k-means ----------------------------------------------------------------------------------


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """(M, D), (K, D) -> (M, K)."""
    squares = points.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * points @ centres.T).clamp_min(0)


def first_centres(points: Tensor, clusters: int, generator) -> Tensor:
    """Draw centres (K, D) by k-means++ (Arthur, Vassilvitskii 2007): each next one is a point drawn
    in proportion to its squared distance to the nearest centre so far."""
    chosen = torch.randint(len(points), (1,), generator=generator)
    nearest = squared_distances(points, points[chosen])[:, 0]  # (M,)
    for _ in range(clusters - 1):
        cumulated = nearest.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(points.device)
        index = torch.searchsorted(cumulated, draw * cumulated[-1], right=True)
        index = index.clamp_max(len(points) - 1).cpu()
        chosen = torch.cat([chosen, index])
        nearest = nearest.minimum(squared_distances(points, points[index])[:, 0])
    return points[chosen]


def kmeans(points: Tensor, clusters: int, generator, restarts=3, tolerance=1e-3):
    """Cluster points (M, D) by Lloyd's algorithm -> (centres (K, D), assignment int64 (M,), mean
    squared distance), the best of the restarts; each ends when the distance falls by less than the
    tolerance.

    Draws come from the (CPU) generator, sums are matrix products: the same result every time. A
    cluster that becomes empty keeps its centre; of equal distances the lower index counts."""
    best = None
    for _ in range(restarts):
        centres, before = first_centres(points, clusters, generator), math.inf
        while True:
            distances, assignment = squared_distances(points, centres).min(1)  # (M,)
            error = distances.mean().item()
            if error >= (1 - tolerance) * before:
                break
            before = error
            members = F.one_hot(assignment, clusters).to(points.dtype)  # (M, K)
            counts = members.sum(0)[:, None]
            centres = torch.where(counts > 0, members.T @ points / counts.clamp_min(1), centres)
        if best is None or error < best[2]:
            best = centres, assignment, error
    return best


# --- part discovery ---------------------------------------------------------------------------


def at_twice_the_size(encoder):
    """Return a copy of the encoder for images of twice its size, its positions interpolated."""
    sizes = encoder.sizes
    large = VisionTransformer(2 * encoder.image_size, encoder.patch_size, **sizes)
    state = dict(encoder.state_dict())
    side = 2 * encoder.image_size // encoder.patch_size
    state["pos_embed"] = resize_positions(state["pos_embed"], side)
    large.load_state_dict(state)
    return large.to(encoder.cls_token.device).eval().requires_grad_(False)


@torch.no_grad()
def describe_patches(encoder, images):
    """images (n, 3, H, W) -> (descriptors (n, N, D), saliency (n, N)), of the last layer: keys of
    all heads, L2-normalised; the class token's attention, mean over heads, min-max scaled."""
    keys = []

    def keep(module, inputs, qkv):
        keys.append(qkv.chunk(3, dim=-1)[1])

    handle = encoder.blocks[-1].attn.qkv.register_forward_hook(keep)
    try:
        _, attentions = encoder.with_attention(images, "row")
    finally:
        handle.remove()
    descriptors = F.normalize(keys[0][:, -encoder.num_patches:], dim=2)  # of the patches alone
    low, high = attentions[-1].aminmax(dim=1, keepdim=True)
    return descriptors, (attentions[-1] - low) / (high - low).clamp_min(1e-12)


def cluster_block(descriptors: Tensor, generator):
    """First stage: cluster (M, D) into k = 1, 2, ... until another cluster helps little -> (centres
    (k, D), assignment (M,))."""
    centres, assignment, error = kmeans(descriptors, 1, generator)
    for k in range(2, min(MOST, len(descriptors)) + 1):
        before = error
        centres, assignment, error = kmeans(descriptors, k, generator)
        if error > ELBOW * before:
            break
    return centres, assignment


def salient_clusters(assignment: Tensor, saliency: Tensor, clusters: int) -> Tensor:
    """assignment int64 (n, N), saliency (n, N) -> bool (k,): which clusters are foreground, by the
    votes of the images. An image without the cluster does not vote for it."""
    members = F.one_hot(assignment, clusters).to(saliency.dtype)  # (n, N, k)
    sums = torch.einsum("npk,np->nk", members, saliency)
    means = sums / members.sum(1).clamp_min(1)
    return (means > SALIENT).sum(0) >= VOTES * len(assignment)


def block_parts(descriptors: Tensor, saliency: Tensor, clusters: int, generator):
    """Two stages of k-means on a block: descriptors (n, N, D), saliency (n, N) -> (part ids, uint8
    (n, N), whether the block has foreground, whether it has background)."""
    points = descriptors.flatten(0, 1)  # (n N, D)
    centres, assignment = cluster_block(points, generator)
    salient = salient_clusters(assignment.view_as(saliency), saliency, len(centres))  # (k,)
    has_foreground, has_background = bool(salient.any()), not bool(salient.all())
    if not has_foreground:
        return torch.zeros_like(saliency, dtype=torch.uint8), False, True
    foreground = points[salient[assignment]]
    parts, _, _ = kmeans(foreground, min(clusters, len(foreground)), generator)
    background = centres[~salient]
    nearest = squared_distances(points, torch.cat([background, parts])).argmin(1)
    ids = (nearest - len(background) + 1).clamp_min(0)  # 0 for all background centres
    return ids.to(torch.uint8).view_as(saliency), True, has_background


class Maps(Dataset):
    """Maps of images, uint8 (H, W), enlarged to each image's size when they are read."""

    def __init__(self, patches: Tensor, sizes):
        self.patches, self.sizes = patches, sizes  # uint8 (n, N), [(width, height)]

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, index):
        side = math.isqrt(self.patches.shape[1])
        width, height = self.sizes[index]
        grid = self.patches[index].view(1, side, side)
        return v2.functional.resize(grid, [height, width], v2.InterpolationMode.NEAREST)[0]


@torch.no_grad()
def discover_parts(encoder, dataset, clusters=5) -> Maps:
    """Discover the parts of a data set's images, of which no label is read. Prints what was found.

    Blocks of BLOCK images in an order drawn by seed 0 are clustered, each on its own: an id means a
    part within a block. Images are resized to squares of twice the encoder's size."""
    large = at_twice_the_size(encoder)
    device, size = large.cls_token.device, large.image_size
    prepare = v2.Compose([v2.Resize((size, size)), *to_tensor(encoder.mean, encoder.std)])
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset), generator=generator)
    sizes, blocks = {}, order.split(BLOCK)
    patches = torch.zeros(len(dataset), large.num_patches, dtype=torch.uint8)
    without_foreground = without_background = 0
    for block in blocks:
        images = []
        for index in block.tolist():
            image = dataset[index][0]
            sizes[index] = image.size
            images.append(prepare(image))
        descriptors, saliency = describe_patches(large, torch.stack(images).to(device))
        ids, has_foreground, has_background = block_parts(descriptors, saliency, clusters,
                                                          generator)
        without_foreground += not has_foreground
        without_background += not has_background
        patches[block] = ids.cpu()
    empty, full = (patches == 0).all(1).sum(), (patches > 0).all(1).sum()
    print(f"part discovery: {len(dataset)} images in {len(blocks)} blocks; without foreground "
          f"{without_foreground} blocks, {empty} images; without background {without_background} "
          f"blocks, {full} images")
    return Maps(patches, [sizes[index] for index in range(len(dataset))])


# --- part loss --------------------------------------------------------------------------------


def majority_ids(maps: Tensor, patch_size: int, ids: int) -> Tensor:
    """Return the id of most of a patch's pixels, ties by the lower: uint8 (B, H, W) -> int64
    (B, N)."""
    cover = rearrange(F.one_hot(maps.long(), ids), "b y x s -> b s y x").float()  # (B, S, H, W)
    return F.avg_pool2d(cover, patch_size).argmax(1).flatten(1)


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
        require(isinstance(clusters, int) and 1 <= clusters <= 255, "clusters must be a whole "
                f"number in [1, 255], got {clusters}", UserError)
        require(temperature > 0, f"temperature must be above 0, got {temperature}", UserError)
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
