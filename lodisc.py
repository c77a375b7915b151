"""LoDisc in one file: learning global-local discriminative features for self-supervised
fine-grained visual recognition (Shi, Wei, Nie, Huang, arXiv 2403.04066).

Read it from top to bottom; the order is that of the paper's overview figure:

    1. Vision transformer          the encoder f_q, with attention that can be stored
    2. Pivotal regions             patch importance: attention multiplied over all layers
    3. Location-wise mask          keep the most important 30 % of the patches, zero the rest
    4. Momentum branches           heads, the momentum encoder f_k = f_l, its moving average
    5. Loss, and class LoDisc      global + local contrastive loss, the whole figure in one forward
    6. Published weights           load_encoder

The method is MoCo v3 on a ViT plus a local branch: the momentum encoder encodes each view once
more with only its pivotal patches, and the query of the OTHER view must match that key too.
Shapes: B images, N patches, D features, h heads, d = D / h, k kept patches, C projections.

MoCo v3 is arXiv 2104.02057 (branches, loss, initialisation), ViT 2010.11929, BYOL 2006.07733,
attention rollout 2005.00928; parameter names and sizes are timm's.
"""

import argparse
import copy
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

ARCHITECTURES = {
    "vit_nano": dict(dim=96, depth=4, heads=3),  # for CPU runs; not a published size
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_small_moco": dict(dim=384, depth=12, heads=12),  # MoCo v3's own ViT-S
    "vit_base": dict(dim=768, depth=12, heads=12),
}
METHODS = ("lodisc", "global", "local")
LOCAL_INPUTS = ("pixels", "tokens")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UserError(Exception):
    """A user's mistake: the scripts show its message in one line, without a traceback."""


def require(condition, message, error=ValueError):
    """Raise error(message) unless the condition is true."""
    if not condition:
        raise error(message)


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision and integers to float32; leave float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- 1. Vision transformer -------------------------------------------------------------------


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)), the weights that a fused attention kernel never exposes.

    q (B, h, Q, d), k (B, h, 1+N, d) -> (B, h, Q, 1+N), float32 or wider under any autocast:
    the product over layers (section 2) would multiply twelve rounding errors of half precision."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = at_least_float32(q), at_least_float32(k)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention that can return its weights.

    The figure's importance needs only the class token's row of the weights: one query against
    all keys, O(N). So the features always come from the fused kernel, and the row is computed
    beside it from the same q and k; the (1+N, 1+N) matrix exists only on request."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attention=None, class_only=False):
        """x (B, 1+N, D) -> features (B, 1+N, D), or with class_only the class token's (B, 1, D);
        weights: None, "row" (B, h, 1+N), "full" (B, h, 1+N, 1+N), "mean" (B, 1, 1+N, 1+N)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        weights = None
        if attention == "row":
            weights = attention_weights(q[:, :, :1], k).squeeze(2)  # (B, h, 1+N)
        elif attention is not None:
            weights = attention_weights(q, k)  # (B, h, 1+N, 1+N)
            if attention == "mean":
                weights = weights.mean(dim=1, keepdim=True)  # (B, 1, 1+N, 1+N)
        if class_only:
            q = q[:, :, :1]
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, 1+N, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)")), weights


class Mlp(nn.Module):
    """Two-layer perceptron of a transformer layer: hidden width 4 D, exact GELU."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x, attention=None, class_only=False):
        """As `Attention.forward`; class_only also skips the MLP of all other tokens."""
        attended, weights = self.attn(self.norm1(x), attention, class_only)
        x = (x[:, :1] if class_only else x) + attended
        return x + self.mlp(self.norm2(x)), weights


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each: a convolution whose stride is its size."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """images (B, 3, H, W) -> (B, N, D), patches row by row."""
        return rearrange(self.proj(images), "b d rows columns -> b (rows columns) d")


def sincos_positions(side: int, dim: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions (1, 1 + side * side, dim), zeros for the class token.

    A quarter of the channels each for sin and cos of the row, sin and cos of the column, at
    frequencies from 1 down to 1/10000 (MoCo v3, section 4.4)."""
    require(dim % 4 == 0, f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, dim/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim/2)
    rows = repeat(line, "row c -> (row column) c", column=side)
    columns = repeat(line, "column c -> (row column) c", row=side)
    patches = torch.cat([rows, columns], dim=1)  # (N, dim)
    return torch.cat([torch.zeros(1, dim), patches])[None]  # (1, 1+N, dim)


def kept_indices(mask: Tensor, k: int) -> Tensor:
    """Return the indices of the k True entries of each row: (B, N) -> int64 (B, k), ascending.
    The caller passes k, as reading mask.sum() back would synchronise with a GPU."""
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :k]


class VisionTransformer(nn.Module):
    """ViT encoder; its feature is the class token after the last LayerNorm.

    Parameters have timm's names, so that published weights load. The initialisation is MoCo v3's:
    Xavier-uniform weights (q, k and v as three matrices), zero biases, a class token near zero,
    fixed sine-cosine positions, and a patch projection frozen at its random values
    (MoCo v3, section 4, against training instability), unless learned_positions and
    train_projection say otherwise."""

    def __init__(self, image_size, patch_size, dim, depth, heads, learned_positions=False,
                 train_projection=False):
        super().__init__()
        require(min(image_size, patch_size) > 0 and image_size % patch_size == 0,
                f"the image size must be a multiple of the patch size, got {image_size} px and "
                f"patches of {patch_size} px")
        require(dim % heads == 0, f"width {dim} does not divide into {heads} heads")
        self.image_size, self.patch_size, self.dim = image_size, patch_size, dim
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD  # input normalisation
        side = image_size // patch_size
        self.num_patches = side * side

        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(side, dim), requires_grad=learned_positions)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for part in module.weight.detach().chunk(3 if name.endswith("qkv") else 1):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if learned_positions:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed.requires_grad_(train_projection)

    def forward(self, images, attention=None, keep=None):
        """images (B, 3, H, W), normalised -> features (B, D), attention of every layer.

        attention  None: an empty list; or a list of float32: "row", the class token's row
                   (B, h, 1+N); "full", the matrices (B, h, 1+N, 1+N); "mean", the matrices
                   averaged over heads (B, 1, 1+N, 1+N)
        keep       None, or only these patches enter: bool (B, N) with the same number k of True
                   in every row, or indices int64 (B, k); attention then has 1+k tokens
        Raises ValueError for another image size, an unknown attention, or a ragged keep."""
        x, attentions = self.tokens(images, attention, keep, class_only=True)
        return x[:, 0], attentions  # (B, D)

    def tokens(self, images, attention=None, keep=None, class_only=False):
        """As `forward`, but all tokens after the last LayerNorm, class token first: (B, 1+N, D).
        class_only: the last layer computes the class token alone, (B, 1, D)."""
        side = self.image_size
        require(images.shape[1:] == (3, side, side),
                f"expected images (B, 3, {side}, {side}), got {tuple(images.shape)}")
        require(attention in (None, "row", "full", "mean"),
                f"attention must be None, 'row', 'full' or 'mean', got {attention!r}")
        x = self.patch_embed(images) + self.pos_embed[:, 1:]  # (B, N, D)
        if keep is not None:
            if keep.dtype == torch.bool:
                counts = keep.sum(dim=-1)
                require(keep.shape == x.shape[:2] and counts[0] > 0 and (counts == counts[0]).all(),
                        f"expected keep {tuple(x.shape[:2])} with the same number of True in every "
                        f"row, got {tuple(keep.shape)} with {counts.min()} to {counts.max()}")
                keep = kept_indices(keep, int(counts[0]))
            x = x.gather(1, repeat(keep, "b k -> b k d", d=self.dim))  # (B, k, D)
        token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+N, D)
        attentions = []
        for block in self.blocks:
            x, weights = block(x, attention, class_only and block is self.blocks[-1])
            if attention is not None:
                attentions.append(weights)
        return self.norm(x), attentions


def create_vit(name: str, image_size: int, patch_size: int, **options) -> VisionTransformer:
    """Create an encoder of ARCHITECTURES, its weights drawn from torch's global generator."""
    require(name in ARCHITECTURES, f"unknown encoder {name!r}, have {', '.join(ARCHITECTURES)}")
    return VisionTransformer(image_size, patch_size, **ARCHITECTURES[name], **options)


# --- 2. Local pivotal region collection ------------------------------------------------------


def check_layers(attentions, dimensions=(3, 4)):
    """Require one tensor per layer, all of one shape: rows (B, h, 1+N) or square matrices."""
    shapes = [tuple(a.shape) for a in attentions] if isinstance(attentions, (list, tuple)) else []
    require(shapes and all(shape == shapes[0] and len(shape) in dimensions and shape[-1] > 1
                           and (len(shape) == 3 or shape[-1] == shape[-2]) for shape in shapes),
            "expected a list with the attention of each layer, from the encoder's attention='row', "
            f"'mean' or 'full', all of one shape with {dimensions} dimensions, got {shapes}")


def class_row(attention: Tensor) -> Tensor:
    """Average the heads of the class token's row, patches only: (B, h, 1+N[, 1+N]) -> (B, N)."""
    row = attention if attention.ndim == 3 else attention[:, :, 0]
    return at_least_float32(row).mean(dim=1)[:, 1:]


def attention_product(attentions: list[Tensor]) -> Tensor:
    """The paper's importance: attention weights multiplied elementwise over all layers.

    attentions: one per layer, rows (B, h, 1+N) or matrices (B, h, 1+N, 1+N); heads are averaged.
    Returns (B, N) float32, the LOG of the product: log A_i = sum over l of log a_l^i. The product
    of twelve weights of about 1/N underflows in half precision, of more layers in float32; its
    logarithm has the same order. Weights are clamped to float32's smallest normal number.
    Raises ValueError if `attentions` is malformed. Source: the paper's overview figure."""
    check_layers(attentions)
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack([class_row(a).clamp_min(tiny).log() for a in attentions]).sum(0).float()


def attention_rollout(attentions: list[Tensor]) -> Tensor:
    """Attention rollout: the matrix product of (A_l + I) / 2 over layers, class token's row.

    attentions: matrices (B, h, 1+N, 1+N), one per layer, first layer first -> (B, N); the
    encoder's attention="mean" takes the least memory. Rows raise ValueError: they lack the
    attention between patches. Abnar and Zuidema 2020, section 3."""
    check_layers(attentions, dimensions=(4,))
    row = torch.zeros_like(at_least_float32(attentions[0])[:, 0, 0])  # (B, 1+N)
    row[:, 0] = 1  # the class token
    with torch.autocast(row.device.type, enabled=False):
        for a in reversed(attentions):  # a row times a matrix: O(N^2), not O(N^3)
            row = (torch.einsum("bi,bij->bj", row, at_least_float32(a).mean(dim=1)) + row) / 2
    return row[:, 1:]


def last_attention(attentions: list[Tensor]) -> Tensor:
    """Return the class token's attention in the last layer alone, heads averaged: (B, N)."""
    check_layers(attentions)
    return class_row(attentions[-1])


# name: (function, the attention that the encoder must store for it)
IMPORTANCES = {"product": (attention_product, "row"), "rollout": (attention_rollout, "mean"),
               "last": (last_attention, "row")}


# --- 3. Location-wise mask -------------------------------------------------------------------


def kept_count(num_patches: int, keep_ratio: float) -> int:
    """Return how many patches a keep ratio in (0, 1] keeps: max(1, floor(keep_ratio * N))."""
    require(0 < keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {keep_ratio}")
    return max(1, math.floor(keep_ratio * num_patches + 1e-9))  # 0.29 * 100 is 28.999...


def location_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Keep the most important patches of every image: (B, N) -> bool (B, N), True = kept.

    Exactly kept_count per row; ties go to the lower index on every device. Source: the figure's
    "location-wise mask strategy" (flatten, sort, threshold, back to the grid).
    Raises ValueError for NaN, on a CPU only: the check would synchronise with a GPU."""
    require(importance.ndim == 2 and importance.shape[1] > 0,
            f"expected importance (B, N), got {tuple(importance.shape)}")
    k = kept_count(importance.shape[1], keep_ratio)
    require(importance.device.type != "cpu" or not bool(importance.isnan().any()),
            "importance contains NaN, which has no order; the encoder has diverged")
    order = importance.argsort(dim=1, descending=True, stable=True)  # (B, N)
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, :k], True)


def least_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Ablation: keep the LEAST important patches. As location_mask otherwise."""
    return location_mask(-at_least_float32(importance), keep_ratio)


def random_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Ablation: keep patches drawn from the (CPU) generator, independent of importance."""
    noise = torch.rand(importance.shape, generator=generator)
    return location_mask(noise, keep_ratio).to(importance.device, non_blocking=True)


def block_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Ablation: keep one block of patches at a random position; arguments as for random_mask.

    The k patches nearest to a random point in a stretched maximum norm: a rectangle of up to 3:1,
    more where the border cuts it, trimmed to exactly k. The grid must be square."""
    batch, num_patches = importance.shape
    side, patch = math.isqrt(num_patches), torch.arange(num_patches)
    require(side * side == num_patches, f"expected a square grid of patches, got {num_patches}")
    row, column, stretch = torch.rand(3, batch, 1, generator=generator)  # (B, 1) each
    stretch = 3 ** (stretch - 0.5)
    vertical = (patch // side + 0.5 - side * row).abs() / stretch  # (B, N)
    horizontal = (patch % side + 0.5 - side * column).abs() * stretch
    nearness = -torch.maximum(vertical, horizontal)
    return location_mask(nearness, keep_ratio).to(importance.device, non_blocking=True)


# name: (function, whether it needs the importance; if not, it gets zeros and no attention is
# stored). A mask of your own: a function of this signature, and one line here.
MASKS = {"location": (location_mask, True), "least": (least_mask, True),
         "random": (random_mask, False), "block": (block_mask, False)}


def mask_pixels(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """x ⊙ mask: set every patch of the normalised images that is not kept to zero.

    images (B, 3, H, W), mask bool (B, N) with N = (H / patch_size) * (W / patch_size), row by
    row -> (B, 3, H, W). Zero after normalisation is the mean colour, as in the released code.
    Raises ValueError if the shapes do not match."""
    require(images.ndim == 4 and patch_size > 0 and images.shape[2] % patch_size == 0
            and images.shape[3] % patch_size == 0, f"expected images (B, 3, H, W), H and W "
            f"multiples of the patch size {patch_size}, got {tuple(images.shape)}")
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    require(mask.dtype == torch.bool and mask.shape == (len(images), rows * columns), "expected a "
            f"bool mask ({len(images)}, {rows * columns}), got {mask.dtype} {tuple(mask.shape)}")
    pixels = repeat(mask, "b (rows columns) -> b 1 (rows p) (columns q)",
                    rows=rows, p=patch_size, q=patch_size)  # (B, 1, H, W)
    return images.masked_fill(~pixels, 0)


# --- 4. Momentum branches --------------------------------------------------------------------


def mlp_head(layers: int, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Projector (3 layers) or predictor (2): linear, BatchNorm, ReLU, ..., linear, BatchNorm.

    (B, in_dim) -> (B, out_dim). No biases, and no affine in the last BatchNorm (MoCo v3, after
    SimCLR). BatchNorm couples the images of a batch, so it needs two or more of them."""
    widths = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
    modules = []
    for layer, (width_in, width_out) in enumerate(zip(widths, widths[1:]), start=1):
        modules += [nn.Linear(width_in, width_out, bias=False),
                    nn.BatchNorm1d(width_out, affine=layer < layers), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules[:-1])  # no ReLU at the end


@torch.no_grad()
def momentum_update(online: nn.Module, momentum: nn.Module, m: float) -> None:
    """Exponential moving average, in place: momentum <- m * momentum + (1 - m) * online.

    Once per step, after the optimiser's. Parameters only: BatchNorm's running statistics are not
    averaged. Raises ValueError for m outside [0, 1] or modules that differ."""
    require(0 <= m <= 1, f"the momentum must be in [0, 1], got {m}")
    new, old = dict(online.named_parameters()), dict(momentum.named_parameters())
    require({n: p.shape for n, p in new.items()} == {n: p.shape for n, p in old.items()},
            "the online and the momentum module differ in their parameters' names or shapes")
    for name, parameter in old.items():
        parameter.lerp_(new[name], 1 - m)  # keeps equal weights equal to the last bit


def momentum_schedule(step: int, total: int, base: float = 0.99) -> float:
    """Return the EMA momentum: base at step 0, rising by half a cosine to 1 at total (BYOL).
    Raises ValueError for total < 1, a step outside [0, total], a base outside [0, 1]."""
    require(total > 0 and 0 <= step <= total, f"step must be in [0, {total}], got {step}")
    require(0 <= base <= 1, f"the base momentum must be in [0, 1], got {base}")
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / total)) / 2


# --- 5. Loss, and the whole figure -----------------------------------------------------------


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float, offset: int = 0) -> Tensor:
    """InfoNCE with in-batch negatives, times 2 * temperature (MoCo v3, Algorithm 1) -> scalar.

    queries (B, C), keys (M, C), of any length: both are normalised here. Query i's positive is
    key offset + i, all other keys are its negatives; keys get no gradient. Equal features give
    the chance level, 2 * temperature * log M. Float32 or wider under any autocast. Raises
    ValueError for shapes that do not match, or temperature <= 0."""
    require(queries.ndim == 2 and keys.ndim == 2 and queries.shape[1] == keys.shape[1],
            f"expected queries (B, C) and keys (M, C), got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}")
    require(0 < len(queries) and 0 <= offset <= len(keys) - len(queries),
            f"{len(queries)} queries from key {offset} on do not fit {len(keys)} keys")
    require(temperature > 0, f"the temperature must be above 0, got {temperature}")
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(at_least_float32(queries), dim=1)
        keys = F.normalize(at_least_float32(keys.detach()), dim=1)
        logits = queries @ keys.T / temperature  # (B, M)
        positives = offset + torch.arange(len(queries), device=queries.device)
        return 2 * temperature * F.cross_entropy(logits, positives)


@torch.no_grad()
def gather(keys: Tensor) -> tuple[Tensor, int]:
    """Concatenate the keys (B, C) of all ranks -> (ranks * B, C), and the own rank's first row.

    Without a process group: the keys unchanged, and 0. All ranks must pass the same number."""
    if not (dist.is_available() and dist.is_initialized()):
        return keys, 0
    everyone = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, keys.contiguous())
    return torch.cat(everyone), dist.get_rank() * len(keys)


class LoDiscOutput(NamedTuple):
    total: Tensor
    global_loss: Tensor  # 0 if the method has no such branch
    local_loss: Tensor
    masks: tuple[Tensor, Tensor] | None  # bool (B, N) of view 1 and of view 2; None for "global"


class LoDisc(nn.Module):
    """The overview figure: online branch, momentum branches, pivotal masks, both losses.

    encoder       the online encoder f_q; f_k starts as its copy, so load published weights first
    method        "lodisc"; "global", exactly MoCo v3; or "local", the local loss alone
    mask          "location" (the paper); for ablation "random", "block", "least"
    importance    "product" (the paper), "rollout" or "last"
    local_input   "pixels" (the paper): the image with all other patches set to zero;
                  "tokens": only the kept patches enter the encoder, at keep_ratio of the cost
    keep_ratio    fraction of patches kept; temperature: of the softmax over cosine similarities
    hidden_dim, output_dim   of projector and predictor"""

    def __init__(self, encoder, method="lodisc", mask="location", importance="product",
                 local_input="pixels", keep_ratio=0.3, temperature=0.2, hidden_dim=4096,
                 output_dim=256):
        super().__init__()
        for name, value, known in (("method", method, METHODS), ("mask", mask, MASKS),
                                   ("importance", importance, IMPORTANCES),
                                   ("local_input", local_input, LOCAL_INPUTS)):
            require(value in known, f"unknown {name} {value!r}, have {', '.join(known)}")
        require(temperature > 0, f"the temperature must be above 0, got {temperature}")
        self.method, self.mask, self.importance = method, mask, importance
        self.local_input, self.keep_ratio, self.temperature = local_input, keep_ratio, temperature
        self.num_kept = kept_count(encoder.num_patches, keep_ratio)
        needs_attention = method != "global" and MASKS[mask][1]
        self.stored = IMPORTANCES[importance][1] if needs_attention else None

        self.encoder = encoder
        self.projector = mlp_head(3, encoder.dim, hidden_dim, output_dim)
        self.predictor = mlp_head(2, output_dim, hidden_dim, output_dim)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)  # f_k = f_l
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def train(self, mode=True):
        """Keep the momentum side in train mode: BatchNorm with batch statistics on both sides."""
        super().train(mode)
        self.momentum_encoder.train()
        self.momentum_projector.train()
        return self

    def forward(self, view1, view2, generator=None, progress=0.0):
        """Two augmentations of the same images, each (B, 3, H, W) -> LoDiscOutput.

        Every pass takes one view, so that BatchNorm sees one view's statistics. generator (CPU):
        for the random and block masks. progress: the fraction of the run that is done, for the
        schedules of a subclass. Raises ValueError for views that differ in shape, or B < 2."""
        require(view1.shape == view2.shape,
                f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
        require(len(view1) > 1, "a batch of one image has no negatives and no batch statistics; "
                "give two or more")
        query1, query2 = self.query(view1), self.query(view2)  # z_q (B, C)
        with torch.no_grad():  # stop-gradient
            key1, local1, mask1 = self.momentum_side(view1, generator)
            key2, local2, mask2 = self.momentum_side(view2, generator)

        # each query against the momentum side of the OTHER view
        global_loss = local_loss = query1.new_zeros((), dtype=torch.float32)
        if self.method != "local":
            global_loss = self.contrast(query1, key2) + self.contrast(query2, key1)
        if self.method != "global":
            local_loss = self.contrast(query1, local2) + self.contrast(query2, local1)
        masks = None if self.method == "global" else (mask1, mask2)
        return LoDiscOutput(global_loss + local_loss, global_loss, local_loss, masks)

    def query(self, view):
        """Online branch: encoder, projector, predictor. (B, 3, H, W) -> z_q (B, C)."""
        return self.predictor(self.projector(self.encoder(view)[0]))

    def momentum_side(self, view, generator):
        """Both momentum branches of a view -> z_k (B, C), z_l (B, C), mask (B, N); unused: None."""
        key, attentions = self.global_key(view)
        if self.method == "global":
            return key, None, None
        mask = self.pivotal_mask(view, attentions, generator)
        return key, self.local_key(view, mask), mask

    def global_key(self, view):
        """Global momentum branch -> z_k (B, C), and the attention of the same pass, if needed."""
        if self.method == "local" and not self.stored:
            return None, None
        features, attentions = self.momentum_encoder(view, attention=self.stored)
        return None if self.method == "local" else self.momentum_projector(features), attentions

    def pivotal_mask(self, view, attentions, generator):
        """Local pivotal region selection -> bool (B, N), num_kept True in each row."""
        function, needs_importance = MASKS[self.mask]
        importance = view.new_zeros(len(view), self.encoder.num_patches)
        if needs_importance:  # the training loop reports NaN, with step and learning rate
            importance = IMPORTANCES[self.importance][0](attentions).nan_to_num()  # (B, N)
        return function(importance, self.keep_ratio, generator)

    def local_key(self, view, mask):
        """Local momentum branch, over the pivotal patches alone -> z_l (B, C)."""
        keep = None
        if self.local_input == "pixels":
            view = mask_pixels(view, mask, self.encoder.patch_size)
        else:
            keep = kept_indices(mask, self.num_kept)
        return self.momentum_projector(self.momentum_encoder(view, keep=keep)[0])

    def contrast(self, query, key):
        keys, offset = gather(key)  # the other ranks' images are negatives too
        return contrastive_loss(query, keys, self.temperature, offset)

    def update_momentum(self, m):
        """Move the momentum side towards the online one; the training loop calls it each step."""
        momentum_update(self.encoder, self.momentum_encoder, m)
        momentum_update(self.projector, self.momentum_projector, m)

    @torch.no_grad()
    def masks(self, images):
        """Return the most important patches of images (n, 3, H, W): bool (n, N), to draw."""
        function, stored = IMPORTANCES[self.importance]
        return location_mask(function(self.momentum_encoder(images, attention=stored)[1]),
                             self.keep_ratio)

    def chance_levels(self, batch):
        """Return {field: the loss of a branch whose features are all equal}, of `batch` images."""
        level = 2 * 2 * self.temperature * math.log(batch)  # two views
        return {"global_loss": level, "local_loss": level}


# --- 6. Published weights --------------------------------------------------------------------

FORMATS = (  # name; key in the file and prefix of the names, of the online and the momentum encoder
    ("LoDisc", ("model", "encoder."), ("model", "momentum_encoder.")),
    ("MoCo v3", ("state_dict", "base_encoder."), ("state_dict", "momentum_encoder.")),
    ("DINO, student and teacher", ("student", "backbone."), ("teacher", "backbone.")),
    *(("timm's or torchvision's names", (key, ""), None) for key in ("model", "state_dict", None)),
)
RENAMES = (  # torchvision's names to timm's
    (r"^class_token", "cls_token"), (r"^conv_proj", "patch_embed.proj"),
    (r"^encoder\.pos_embedding", "pos_embed"), (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj", ".attn.proj"),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)


def read_weights(path):
    """Read a torch.save file or a run's checkpoint.pt -> dict, without executing code."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    require(path.is_file(), f"{path}: no such file; expected a checkpoint or weights", UserError)
    try:  # DINO and DeiT store their options as a Namespace, which runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:  # torch.load raises many types
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"contains {unsafe[1]}, which could run code" if unsafe else "cannot be read"
        raise UserError(f"{path} {reason}; expected tensors that torch.save wrote") from None


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Interpolate (1, 1 + n * n, D) to (1, 1 + side * side, D): bicubic, antialiased."""
    n = math.isqrt(positions.shape[1] - 1)
    if n == side or n * n != positions.shape[1] - 1:  # no grid: load_encoder names the tensor
        return positions
    grid = rearrange(positions[:, 1:], "1 (rows columns) d -> 1 d rows columns", rows=n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    patches = rearrange(grid, "1 d rows columns -> 1 (rows columns) d")
    return torch.cat([positions[:, :1], patches], dim=1)


def load_encoder(path, momentum=False, image_size=None) -> VisionTransformer:
    """Build the encoder of a checkpoint or of published weights by its tensors, in eval mode.

    path        a run's folder or checkpoint.pt; a file of `eval.py export`, MoCo v3, DINO, DINOv2
                without registers, DeiT, timm or torchvision. Heads and projectors are left out
    momentum    take the momentum (or teacher's) encoder
    image_size  pixels per side, the file's by default; positions are interpolated
    The result has `mean` and `std` of its input, `config` (this project's, else {}) and `source`,
    a line on what was read. Raises UserError for another format or tensors that do not fit."""
    contents = read_weights(path)
    config = contents.get("config")
    config = config if isinstance(config, dict) and "heads" in config else {}
    for kind, online, other in FORMATS:
        key, prefix = other if momentum and other else online
        tensors = contents if key is None else contents.get(key)
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()
                   if isinstance(tensor, Tensor)} if isinstance(tensors, dict) else {}
        if any(prefix + token in tensors for token in ("cls_token", "class_token")):
            break
    else:
        raise UserError(f"{path}: no ViT of a known format in it")
    require(other or not momentum, f"{path} ({kind}) has no momentum encoder", UserError)
    state, left_out = {}, set()
    for name, tensor in tensors.items():
        ours = name.removeprefix(prefix)
        for pattern, replacement in RENAMES:
            ours = re.sub(pattern, replacement, ours)
        if not name.startswith(prefix) or re.match(r"heads?\.|mask_token$", ours):
            left_out.add(ours.split(".")[0])
        else:
            state[ours] = tensor.float()
    try:
        for name in [name for name in state if re.search(r"\.ls[12]\.gamma$", name)]:  # DINOv2
            scale = state.pop(name)
            layer = name[:-9] + ("attn.proj." if name.endswith("ls1.gamma") else "mlp.fc2.")
            state[layer + "weight"] = scale[:, None] * state[layer + "weight"]
            state[layer + "bias"] = scale * state[layer + "bias"]
        dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        heads = 12 if kind == "MoCo v3" and dim == 384 else dim // 64
        require(config or dim % 64 == 0, f"the number of heads of width {dim} is unknown; give a "
                "checkpoint.pt or a file of `eval.py export`")
        native_size = patch_size * math.isqrt(state["pos_embed"].shape[1] - 1)
        image_size = image_size or config.get("image_size", native_size)
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            encoder = VisionTransformer(image_size, patch_size, dim, depth,
                                        config.get("heads", heads), True, True)
        state["pos_embed"] = resize_positions(state["pos_embed"], image_size // patch_size)
        encoder.load_state_dict(state)
    except (LookupError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # names missing, unexpected and misshapen tensors
        raise UserError(f"{path} ({kind}) does not fit the encoder: {reason[:300]}") from None
    encoder.mean, encoder.std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    encoder.config, left_out = config, ", ".join(sorted(left_out)) or "nothing"
    kind += f"{', momentum encoder' * momentum}, {depth} layers of width {dim}"
    encoder.source = f"{path}: {kind}; left out: {left_out}"
    return encoder.eval()
