"""Part discovery as in PARTICLE's released code: where the methods of this folder get their maps.

Saha, Maji, arXiv 2309.13822; written from facts of the authors' code (cvl-umass/PARTICLE, commit
331c92f, MIT), of which no line is used. Keys of a frozen encoder's last layer are clustered in
blocks of images; the clusters that most images find salient are foreground, and are divided into
parts. Shapes as in lodisc.py; n images of a block, M descriptors, K clusters; ids: 0 is the
background, 1 to K are parts.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from data.augment import to_tensor
from lodisc import UserError, require, resize_positions

BLOCK = 30  # images whose descriptors are clustered together
MOST = 14  # clusters of a block
ELBOW = 0.975  # the number of clusters grows until the error falls by less than this factor
SALIENT, VOTES = 0.065, 0.75  # mean saliency of a foreground cluster, in this fraction of images


def require_number(name, value):
    """Raise UserError unless a method's option is a finite number from 0."""
    require(isinstance(value, (int, float)) and 0 <= value < math.inf, f"{name} must be a number "
            f"from 0, got {value}", UserError)


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
        cumulated = nearest.cpu().double().cumsum(0)  # a sum on a GPU varies from run to run
        draw = cumulated[-1] * torch.rand(1, generator=generator, dtype=torch.float64)
        index = torch.searchsorted(cumulated, draw, right=True).clamp_max(len(points) - 1)
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
            if not error < (1 - tolerance) * before:
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
    large = copy.deepcopy(encoder).eval().requires_grad_(False)
    large.image_size, large.num_patches = 2 * encoder.image_size, 4 * encoder.num_patches
    positions = resize_positions(large.pos_embed, large.image_size // large.patch_size)
    large.pos_embed = nn.Parameter(positions, requires_grad=False)
    return large


def squaring(encoder):
    """Return the transform of a whole image into an encoder's input, (3, H, W)."""
    size = encoder.image_size
    return v2.Compose([v2.Resize((size, size)), *to_tensor(encoder.mean, encoder.std)])


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
    device, prepare = large.cls_token.device, squaring(large)
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
        require(descriptors.isfinite().all() and saliency.isfinite().all(), "part discovery: the "
                "encoder's features are not finite; its weights are damaged", UserError)
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


def majority_ids(maps: Tensor, patch_size: int, ids: int) -> Tensor:
    """Return the id of most of a patch's pixels, ties by the lower: uint8 (B, H, W) -> int64
    (B, N)."""
    cover = [F.avg_pool2d((maps == i).float(), patch_size) for i in range(ids)]
    return torch.stack(cover).argmax(0).flatten(1)
