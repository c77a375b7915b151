"""LoDisc in one file: learning global-local discriminative features for self-supervised
fine-grained visual recognition (Shi, Wei, Nie, Huang, arXiv 2403.04066).

Read it from top to bottom; the order is that of the paper's overview figure:

    1. Vision transformer          the encoder f_q, with attention that can be stored
    2. Pivotal regions             which patches matter: the attention of all layers, multiplied
    3. Location-wise mask          keep the most important 30 % of the patches, zero the rest
    4. Momentum branches           heads, the momentum encoder f_k = f_l, its moving average
    5. Loss, and class LoDisc      global + local contrastive loss, the whole figure in one forward
    6. From checkpoint to encoder  load_encoder

The method is MoCo v3 on a ViT plus a local branch: the momentum encoder sees the picture once
more with only its pivotal patches, and the online encoder's view of the OTHER augmentation must
match it. Nothing here knows of devices, picture files or optimisers; of processes, `gather` does.

Letters in shape comments: B images, N patches of an image, D features, h heads, d = D / h,
k kept patches, C the contrastive space.

References
    ViT      Dosovitskiy et al. 2021, arXiv 2010.11929; parameter names and sizes as in timm
    MoCo v3  Chen, Xie, He 2021, arXiv 2104.02057: branches, loss, initialisation, schedule of m
    BYOL     Grill et al. 2020, arXiv 2006.07733: the predictor, the rising momentum
    rollout  Abnar, Zuidema 2020, arXiv 2005.00928
"""

import copy
import math
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
MASKS = ("location", "random", "block", "least")
LOCAL_INPUTS = ("pixels", "tokens")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def widen(x: Tensor) -> Tensor:
    """To float32 where x is half precision or integer; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- 1. Vision transformer -------------------------------------------------------------------


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), the weights that a fused attention kernel never shows.

    q (B, h, Q, d), k (B, h, 1+N, d) -> (B, h, Q, 1+N), float32 or wider whatever the autocast:
    the product over layers (section 2) would multiply twelve rounding errors of half precision.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = widen(q), widen(k)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention that can hand out its weights.

    The figure's importance needs only the class token's row of the weights: one query against
    all keys, O(N). So the features come from the fused kernel in every mode, and the row is
    computed beside it from the same q and k; the (1+N, 1+N) matrix exists only if asked for.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attention=None, class_only=False):
        """x (B, 1+N, D) -> (B, 1+N, D), or (B, 1, D) if only the class token asks; and the
        weights: None, (B, h, 1+N) or (B, h, 1+N, 1+N), whoever asks.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        weights = None
        if attention == "row":
            weights = attention_weights(q[:, :, :1], k).squeeze(2)  # (B, h, 1+N)
        elif attention == "full":
            weights = attention_weights(q, k)  # (B, h, 1+N, 1+N)
        if class_only:
            q = q[:, :, :1]
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, 1+N, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)")), weights


class Mlp(nn.Module):
    """The transformer's two-layer perceptron, four times as wide inside, with the exact GELU."""

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
        """x (B, 1+N, D) -> (B, 1+N, D), or of that the class token's (B, 1, D) alone, without
        the work for the others; and the attention weights asked for.
        """
        attended, weights = self.attn(self.norm1(x), attention, class_only)
        x = (x[:, :1] if class_only else x) + attended
        return x + self.mlp(self.norm2(x)), weights


class PatchEmbed(nn.Module):
    """Cut the picture into patches and project each: a convolution whose stride is its size."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """images (B, 3, H, W) -> (B, N, D), patches row by row."""
        return rearrange(self.proj(images), "b d rows columns -> b (rows columns) d")


def sincos_positions(side: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions -> (1, 1 + side * side, dim), zeros for the class token.

    A quarter of the channels each for sin and cos of the column, sin and cos of the row, at
    frequencies from 1 down to 1/10000 (MoCo v3, section 4.4; Vaswani et al. 2017 in 2-D).
    """
    require(dim % 4 == 0, f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, dim/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim/2)
    columns = repeat(line, "column c -> (row column) c", row=side)
    rows = repeat(line, "row c -> (row column) c", column=side)
    patches = torch.cat([columns, rows], dim=1)  # (N, dim)
    return torch.cat([torch.zeros(1, dim), patches])[None]  # (1, 1+N, dim)


def kept_indices(mask: Tensor, k: int) -> Tensor:
    """The k True places of each row: mask (B, N) -> (B, k) int64, ascending.

    k is a number that the caller knows, not mask.sum(): reading a sum back would make a GPU wait.
    """
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :k]


class VisionTransformer(nn.Module):
    """ViT encoder; its feature is the class token after the last LayerNorm.

    Parameters carry timm's names, so that published weights fit. A new one starts as in MoCo v3:
    Xavier-uniform weights with q, k and v each as a matrix of its own, zero biases, a class token
    near zero, fixed sine-cosine positions, and a patch projection that stays at its random
    values (the trick of MoCo v3, section 4, against training that comes apart), unless
    learned_positions and train_projection say otherwise.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, learned_positions=False,
                 train_projection=False):
        super().__init__()
        require(min(image_size, patch_size) > 0 and image_size % patch_size == 0,
                f"the image size must be a multiple of the patch size, got {image_size} px and "
                f"patches of {patch_size} px")
        require(dim % heads == 0, f"width {dim} does not divide into {heads} heads")
        self.image_size, self.patch_size, self.dim = image_size, patch_size, dim
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD  # what its pictures are normalised by
        side = image_size // patch_size
        self.num_patches = side * side

        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(side, dim), requires_grad=learned_positions)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.initialise(learned_positions)
        self.patch_embed.requires_grad_(train_projection)

    def initialise(self, learned_positions):
        """MoCo v3's initialisation (its section 4 and vits.py)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_out = self.dim if name.endswith("qkv") else module.out_features
                bound = math.sqrt(6 / (module.in_features + fan_out))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        bound = math.sqrt(6 / (3 * self.patch_size**2 + self.dim))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if learned_positions:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images, attention=None, keep=None):
        """images (B, 3, H, W), normalised -> features (B, D), attention of every layer.

        attention  None: nothing is stored, the list is empty;
                   "row": the class token's row, a list of (B, h, 1+N) float32;
                   "full": the matrices, a list of (B, h, 1+N, 1+N) float32.
        keep       None, or only these patches enter: bool (B, N) with as many True in each row,
                   or their indices (B, k). Positions are added before the others are dropped,
                   and the class token always stays (the list then holds 1+k instead of 1+N).
        Raises ValueError for another picture size, an unknown attention, or a ragged keep.
        """
        size = (3, self.image_size, self.image_size)
        require(images.ndim == 4 and images.shape[1:] == size,
                f"expected images (B, {size[0]}, {size[1]}, {size[2]}), got {tuple(images.shape)}")
        require(attention in (None, "row", "full"),
                f"attention must be None, 'row' or 'full', got {attention!r}")
        x = self.patch_embed(images) + self.pos_embed[:, 1:]  # (B, N, D)
        if keep is not None:
            x = x.gather(1, repeat(self.checked_keep(keep, x), "b k -> b k d", d=self.dim))
        token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+N, D)
        attentions = []
        for block in self.blocks:  # of the last layer's output the class token alone is used
            x, weights = block(x, attention, class_only=block is self.blocks[-1])
            if attention is not None:
                attentions.append(weights)
        return self.norm(x[:, 0]), attentions  # (B, D)

    def checked_keep(self, keep, x):
        """keep as indices (B, k); a bool mask must have the same count in every row."""
        if keep.dtype == torch.bool:
            require(keep.shape == x.shape[:2],
                    f"expected keep {tuple(x.shape[:2])}, got {tuple(keep.shape)}")
            counts = keep.sum(dim=1)
            k = int(counts[0])
            require(k > 0 and bool((counts == k).all()),
                    "every row of keep must have the same number of True, at least one, got "
                    f"{counts.min()} to {counts.max()}")
            return kept_indices(keep, k)
        require(keep.ndim == 2 and len(keep) == len(x) and keep.dtype == torch.int64,
                f"expected keep as bool (B, N) or int64 (B, k), got {keep.dtype} "
                f"{tuple(keep.shape)}")
        return keep


def create_vit(name: str, image_size: int, patch_size: int, **options) -> VisionTransformer:
    """A new encoder by its name in ARCHITECTURES; sizes in pixels, options as in VisionTransformer.
    Weights are drawn from torch's global generator: call torch.manual_seed first."""
    require(name in ARCHITECTURES, f"unknown encoder {name!r}, have {', '.join(ARCHITECTURES)}")
    return VisionTransformer(image_size, patch_size, **ARCHITECTURES[name], **options)


# --- 2. Local pivotal region collection ------------------------------------------------------


def check_layers(attentions):
    """A list, one tensor a layer, all of one shape: rows or square matrices."""
    require(isinstance(attentions, (list, tuple)) and len(attentions) > 0, "expected a list with "
            "the attention of each layer, as the encoder returns with attention='row' or 'full'")
    for attention in attentions:
        shape = attention.shape
        require(shape == attentions[0].shape and len(shape) in (3, 4) and shape[-1] > 1
                and (len(shape) == 3 or shape[-1] == shape[-2]),
                "expected attention as rows (B, heads, 1+N) or matrices (B, heads, 1+N, 1+N), of "
                f"one shape in all layers, got {tuple(shape)}")


def class_row(attention: Tensor) -> Tensor:
    """Heads averaged, the class token's row, patches only: (B, h, 1+N[, 1+N]) -> (B, N)."""
    row = attention if attention.ndim == 3 else attention[:, :, 0]
    return widen(row).mean(dim=1)[:, 1:]


def attention_product(attentions: list[Tensor]) -> Tensor:
    """The paper's importance: attention weights multiplied elementwise over all layers.

    attentions: one a layer, rows (B, h, 1+N) or matrices (B, h, 1+N, 1+N); heads are averaged.
    Returns (B, N) float32, the LOG of the product: log A_i = sum over l of log a_l^i. A product
    of twelve weights of about 1/N underflows in half precision and soon in float32; the sum of
    logarithms has the same order and does not. A weight that is 0 counts as float32's smallest.
    Source: the paper's overview figure. Raises ValueError for what is no such list.
    """
    check_layers(attentions)
    total = carry = 0
    for attention in attentions:
        # Kahan's compensated sum: plain float32 would lose 1e-3 over 24 layers at -80 each, and
        # float64 is not to be had on every device.
        term = class_row(attention).clamp_min(torch.finfo(torch.float32).tiny).log() - carry
        new_total = total + term
        total, carry = new_total, (new_total - total) - term
    return total.float()


def attention_rollout(attentions: list[Tensor]) -> Tensor:
    """Attention rollout: the matrix product of (A_l + I) / 2 over layers, class token's row.

    attentions: full matrices (B, h, 1+N, 1+N), one a layer, first layer first -> (B, N); rows
    are a ValueError, as it matters what flows between patches. Abnar and Zuidema 2020, section 3.
    """
    check_layers(attentions)
    require(attentions[0].ndim == 4, "attention_rollout needs full matrices (B, heads, 1+N, 1+N), "
            f"got {tuple(attentions[0].shape)}; call the encoder with attention='full'")
    matrices = [widen(attention).mean(dim=1) for attention in attentions]  # (B, 1+N, 1+N) each
    row = torch.zeros_like(matrices[0][:, 0])  # (B, 1+N)
    row[:, 0] = 1  # the class token
    for matrix in reversed(matrices):  # a row times a matrix is O(N^2), the product would be O(N^3)
        row = (torch.einsum("bi,bij->bj", row, matrix) + row) / 2
    return row[:, 1:]


def last_attention(attentions: list[Tensor]) -> Tensor:
    """The class token's attention in the last layer alone, heads averaged -> (B, N)."""
    check_layers(attentions)
    return class_row(attentions[-1])


IMPORTANCES = {"product": attention_product, "rollout": attention_rollout, "last": last_attention}


# --- 3. Location-wise mask -------------------------------------------------------------------


def kept_count(num_patches: int, keep_ratio: float) -> int:
    """How many patches a keep ratio in (0, 1] keeps: max(1, floor(keep_ratio * N + 1e-9)).

    The 1e-9 makes 0.3 of 10 patches 3, though 0.3 * 10 may fall a rounding error below it.
    """
    require(0 < keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {keep_ratio}")
    return max(1, math.floor(keep_ratio * num_patches + 1e-9))


def location_mask(importance: Tensor, keep_ratio: float, check: bool = True) -> Tensor:
    """Keep the most important patches of every image: (B, N) -> bool (B, N), True = kept.

    Exactly kept_count a row; of equal importances the lower index wins, so the mask is the same
    on every device. Source: "location-wise mask strategy" in the figure (flatten, sort, threshold,
    back to the grid). Raises ValueError for NaN; check=False skips that look, a wait on a GPU.
    """
    require(importance.ndim == 2 and importance.shape[1] > 0,
            f"expected importance (B, N), got {tuple(importance.shape)}")
    k = kept_count(importance.shape[1], keep_ratio)
    if check:
        require(not bool(importance.isnan().any()), "importance holds NaN, which has no order; "
                "the encoder that made it has diverged")
    order = importance.argsort(dim=1, descending=True, stable=True)  # (B, N)
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, :k], True)


def least_mask(importance: Tensor, keep_ratio: float, check: bool = True) -> Tensor:
    """Ablation: keep the LEAST important patches. As location_mask otherwise."""
    return location_mask(-widen(importance), keep_ratio, check)


def random_mask(batch: int, num_patches: int, keep_ratio: float, generator=None) -> Tensor:
    """Ablation: keep patches drawn at random -> bool (batch, num_patches) on the CPU."""
    noise = torch.rand(batch, num_patches, generator=generator)
    return location_mask(noise, keep_ratio, check=False)


def block_mask(batch: int, num_patches: int, keep_ratio: float, generator=None) -> Tensor:
    """Ablation: keep one rectangle at a random place -> bool (batch, num_patches) on the CPU.

    The patches must form a square grid. A height is drawn between a third of and three times the
    square's, the width grows until k patches fit, and one end column is trimmed to exactly k.
    """
    side, k = math.isqrt(num_patches), kept_count(num_patches, keep_ratio)
    require(side * side == num_patches, f"expected a square grid of patches, got {num_patches}")
    stretch, top, left, turn = torch.rand(4, batch, 1, generator=generator)  # (B, 1) each
    height = (math.sqrt(k) * 3 ** (2 * stretch - 1)).round().long()
    height = height.clamp(math.ceil(k / side), min(side, k))  # so that the width fits the grid
    width = (k + height - 1) // height
    patch = torch.arange(num_patches)
    row = patch // side - (top * (side - height + 1)).long()  # (B, N), from the rectangle's corner
    column = patch % side - (left * (side - width + 1)).long()
    inside = (row >= 0) & (row < height) & (column >= 0)
    mask = inside & (column * height + row < k)  # column by column, the first k
    return torch.where(turn < 0.5, mask, mask.flip(1))  # else the last corner would go short


def mask_pixels(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """x ⊙ mask: the normalised pictures with every patch that is not kept set to zero.

    images (B, 3, H, W), mask bool (B, N) with N = (H / patch_size) * (W / patch_size), row by
    row -> (B, 3, H, W). Zero after normalisation is the mean colour, as in the released code.
    Raises ValueError where the shapes do not fit together.
    """
    require(images.ndim == 4, f"expected images (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    require(patch_size > 0 and height % patch_size == 0 and width % patch_size == 0,
            f"{height} x {width} px is not a multiple of patches of {patch_size} px")
    rows, columns = height // patch_size, width // patch_size
    require(mask.dtype == torch.bool and mask.shape == (len(images), rows * columns),
            f"expected a bool mask ({len(images)}, {rows * columns}), got {mask.dtype} "
            f"{tuple(mask.shape)}")
    pixels = repeat(mask, "b (rows columns) -> b 1 (rows p) (columns q)",
                    rows=rows, p=patch_size, q=patch_size)  # (B, 1, H, W)
    return images.masked_fill(~pixels, 0)


# --- 4. Momentum branches --------------------------------------------------------------------


def mlp_head(layers: int, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Projector (3 layers) or predictor (2): linear, BatchNorm, ReLU, ..., linear, BatchNorm.

    (B, in_dim) -> (B, out_dim). No biases, and no affine in the last BatchNorm (MoCo v3, after
    SimCLR). BatchNorm is what couples the images of a batch, so a batch of one cannot pass.
    """
    widths = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
    modules = []
    for layer, (width_in, width_out) in enumerate(zip(widths, widths[1:]), start=1):
        modules += [nn.Linear(width_in, width_out, bias=False),
                    nn.BatchNorm1d(width_out, affine=layer < layers), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules[:-1])  # no ReLU at the end


def momentum_copy(online: nn.Module) -> nn.Module:
    """The same module with the same weights, out of the optimiser's reach."""
    return copy.deepcopy(online).requires_grad_(False)


@torch.no_grad()
def momentum_update(online: nn.Module, momentum: nn.Module, m: float) -> None:
    """Exponential moving average, in place: momentum <- m * momentum + (1 - m) * online.

    Parameters only: BatchNorm's running figures are each side's own. lerp, rather than the sum
    as written, keeps equal weights equal to the last bit, so that what never trains never drifts.
    Once a step, never in forward. Raises ValueError for m outside [0, 1] or modules that differ.
    """
    require(0 <= m <= 1, f"the momentum must be in [0, 1], got {m}")
    new, old = dict(online.named_parameters()), dict(momentum.named_parameters())
    require({n: p.shape for n, p in new.items()} == {n: p.shape for n, p in old.items()},
            "the online and the momentum module differ in their parameters' names or shapes")
    new = [new[name] for name in old]  # in the same order
    torch._foreach_lerp_(list(old.values()), new, 1 - m)  # all parameters in one call


def momentum_schedule(step: int, total: int, base: float = 0.99) -> float:
    """The EMA momentum at a step: base at 0, rising by half a cosine to 1 at total (BYOL).
    Raises ValueError for total < 1, a step outside [0, total], a base outside [0, 1]."""
    require(total > 0 and 0 <= step <= total, f"step must be in [0, {total}], got {step}")
    require(0 <= base <= 1, f"the base momentum must be in [0, 1], got {base}")
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / total)) / 2


# --- 5. Loss, and the whole figure -----------------------------------------------------------


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float, offset: int = 0) -> Tensor:
    """InfoNCE with in-batch negatives, times 2 * temperature (MoCo v3, Algorithm 1) -> scalar.

    queries (B, C), keys (M, C), of any length: both are normalised here. Query i's positive is
    key offset + i, all other keys are its negatives; keys get no gradient. Equal features give
    2 * temperature * log M, the loss of a model that has learnt nothing. Float32 or wider,
    whatever the autocast. Raises ValueError for shapes that do not match, or temperature <= 0.
    """
    require(queries.ndim == 2 and keys.ndim == 2 and queries.shape[1] == keys.shape[1],
            f"expected queries (B, C) and keys (M, C), got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}")
    require(0 < len(queries) and 0 <= offset <= len(keys) - len(queries),
            f"{len(queries)} queries from key {offset} on do not fit {len(keys)} keys")
    require(temperature > 0, f"the temperature must be above 0, got {temperature}")
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(widen(queries), dim=1)
        keys = F.normalize(widen(keys.detach()), dim=1)
        logits = queries @ keys.T / temperature  # (B, M)
        positives = offset + torch.arange(len(queries), device=queries.device)
        return 2 * temperature * F.cross_entropy(logits, positives)


@torch.no_grad()
def gather(keys: Tensor) -> tuple[Tensor, int]:
    """Keys (B, C) of all processes by rank, (processes * B, C), and at which row one's own begin.

    Without a process group: the keys as they are, and 0. Every process must have as many.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return keys, 0
    everyone = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, keys.contiguous())
    return torch.cat(everyone), dist.get_rank() * len(keys)


class LoDiscOutput(NamedTuple):
    total: Tensor
    global_loss: Tensor  # 0 where the method has no such branch
    local_loss: Tensor
    masks: tuple[Tensor, Tensor] | None  # bool (B, N) of view 1 and of view 2; None for "global"


class LoDisc(nn.Module):
    """The overview figure: online branch, momentum branches, pivotal masks, both losses.

    encoder       the online encoder f_q; f_k starts as its copy, so load published weights first
    method        "lodisc"; "global", exactly MoCo v3; or "local", the local loss alone
    mask          "location" (the paper); of the same size: "random", "block", "least"
    importance    "product" (the paper), "rollout" or "last"
    local_input   "pixels" (the paper): the picture with its other patches zeroed;
                  "tokens": only the kept patches enter the encoder, at keep_ratio of the cost
    keep_ratio    share of patches kept; temperature: of the softmax over cosine similarities
    hidden_dim, output_dim   of projector and predictor
    """

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

        self.encoder = encoder
        self.projector = mlp_head(3, encoder.dim, hidden_dim, output_dim)
        self.predictor = mlp_head(2, output_dim, hidden_dim, output_dim)
        self.momentum_encoder = momentum_copy(self.encoder)
        self.momentum_projector = momentum_copy(self.projector)

    def train(self, mode=True):
        """As for any module, but the momentum side stays in train mode: its BatchNorm must use
        the statistics of the batch at hand, as the online side does to which it is compared."""
        super().train(mode)
        self.momentum_encoder.train()
        self.momentum_projector.train()
        return self

    def forward(self, view1, view2, generator=None):
        """Two augmentations of the same images, each (B, 3, H, W) -> LoDiscOutput.

        Every pass is one view on its own, so that BatchNorm sees one view's statistics. generator
        (CPU) is drawn from by the random and block masks alone. Raises ValueError for unequal
        views or a batch of one.
        """
        require(view1.shape == view2.shape,
                f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
        require(len(view1) > 1, "a batch of one image has no negatives and no batch statistics; "
                "give two or more")
        query1, query2 = self.query(view1), self.query(view2)  # z_q (B, C)
        with torch.no_grad():
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
        """Both momentum branches of a view -> z_k (B, C), z_l (B, C), mask (B, N)."""
        key, attentions = self.global_key(view)
        if self.method == "global":
            return key, None, None
        mask = self.pivotal_mask(view, attentions, generator)
        return key, self.local_key(view, mask), mask

    def global_key(self, view):
        """Global momentum branch -> z_k (B, C), and the attention of the same pass, if needed."""
        use_attention = self.method != "global" and self.mask in ("location", "least")
        stored = ("full" if self.importance == "rollout" else "row") if use_attention else None
        features, attentions = self.momentum_encoder(view, attention=stored)
        return self.momentum_projector(features), attentions

    def pivotal_mask(self, view, attentions, generator):
        """Local pivotal region selection -> bool (B, N), num_kept True in each row."""
        if self.mask in ("random", "block"):
            draw = random_mask if self.mask == "random" else block_mask
            mask = draw(len(view), self.encoder.num_patches, self.keep_ratio, generator)
            return mask.to(view.device, non_blocking=True)
        importance = IMPORTANCES[self.importance](attentions)  # (B, N)
        choose = location_mask if self.mask == "location" else least_mask
        return choose(importance, self.keep_ratio, check=False)

    def local_key(self, view, mask):
        """Local momentum branch, over the pivotal patches alone -> z_l (B, C)."""
        keep = None
        if self.local_input == "pixels":
            view = mask_pixels(view, mask, self.encoder.patch_size)
        else:
            keep = kept_indices(mask, self.num_kept)
        return self.momentum_projector(self.momentum_encoder(view, keep=keep)[0])

    def contrast(self, query, key):
        keys, offset = gather(key)  # the other processes' images are negatives too
        return contrastive_loss(query, keys, self.temperature, offset)

    def update_momentum(self, m):
        """Move the momentum side towards the online one; the training loop calls it each step."""
        momentum_update(self.encoder, self.momentum_encoder, m)
        momentum_update(self.projector, self.momentum_projector, m)


# --- 6. From checkpoint to encoder -----------------------------------------------------------


def load_encoder(path, momentum: bool = False) -> VisionTransformer:
    """The online (or momentum) encoder of a checkpoint that train.py wrote, in eval mode.

    path: the checkpoint or the run's folder. The encoder's attributes mean, std and image_size
    say what pictures it wants. Nothing in the file is executed. Raises FileNotFoundError, or
    ValueError where the file is not such a checkpoint.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    prefix = "momentum_encoder." if momentum else "encoder."
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        encoder = create_vit(config["arch"], config["image_size"], config["patch_size"])
        encoder.load_state_dict({name.removeprefix(prefix): tensor for name, tensor
                                 in checkpoint["model"].items() if name.startswith(prefix)})
        encoder.mean, encoder.std = tuple(config["mean"]), tuple(config["std"])
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises many kinds for a file that is something else
        raise ValueError(f"{path} is not a checkpoint of train.py: {first_line(error)}") from None
    return encoder.eval()
