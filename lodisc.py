"""LoDisc in one file: learning global-local discriminative features for self-supervised
fine-grained visual recognition (Shi, Wei, Nie, Huang, arXiv 2403.04066), in its figure's order.

LoDisc is MoCo v3 on a ViT plus a local branch: the momentum encoder encodes each view once more
with only its pivotal patches (f_l is f_k again), and the query z_q of the OTHER view must match
that key, z_l, as well as z_k. Shapes: B images, N patches, R registers, T = 1 + R + N tokens, D
features, h heads, d = D / h, k kept patches, C projections, M keys. MoCo v3 is arXiv 2104.02057,
ViT 2010.11929, BYOL 2006.07733, registers 2309.16588; parameter names and sizes are timm's."""

import argparse
import copy
import json
import math
import os
import re
from collections import OrderedDict
from pathlib import Path, PurePath
from typing import Callable, NamedTuple

import numpy as np
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
LOCAL_INPUTS = ("pixels", "tokens", "crop")
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

# --- 1. Vision transformer: the encoder f_q, whose attention can be returned -----------------
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) over keys: the weights that a fused kernel never exposes.
    q (B, h, Q, d), k (B, h, T, d) -> (B, h, Q, T), float32 or wider under any autocast: the
    product over layers (section 2) would multiply the rounding errors of half precision."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = at_least_float32(q), at_least_float32(k)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

class Attention(nn.Module):
    """Multi-head self-attention; its weights, if requested, are computed separately."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, kind=None, class_only=False):
        """x (B, T, D), the class token first -> the pair (features, weights). Along the last axis
        qkv(x) is [q, k, v], each of them, like the input of proj, [head 1, ..., head h].
        features: (B, T, D); with class_only the class token's alone, (B, 1, D). weights, whatever
        class_only says: the mean over heads of `attention_weights`, for kind "row" of the class
        token's query, (B, T), for "matrix" of all queries, (B, T, T); None for None."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        weights = None
        if kind == "row":
            weights = attention_weights(q[:, :, :1], k).squeeze(2).mean(dim=1)  # (B, T)
        elif kind == "matrix":
            weights = attention_weights(q, k).mean(dim=1)  # (B, T, T)
        if class_only:
            q = q[:, :, :1]
        x = F.scaled_dot_product_attention(q, k, v)  # (B, h, T, d); class_only: (B, h, 1, d)
        return self.proj(rearrange(x, "b h t d -> b t (h d)")), weights

class Block(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, heads, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, kind=None, class_only=False):
        """As `Attention.forward`; class_only also skips the MLP of all other tokens."""
        attended, weights = self.attn(self.norm1(x), kind, class_only=class_only)
        if class_only:
            x = x[:, :1]
        x = x + attended
        return x + self.mlp(self.norm2(x)), weights

class PatchEmbed(nn.Module):
    """Cut images (B, 3, H, W) into patches and project each: (B, N, D), row by row."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        return rearrange(self.proj(images), "b d rows columns -> b (rows columns) d")

def sincos_positions(side: int, dim: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions (1, 1 + side * side, dim), float32.
    Zeros for the class token, then patches, row by row. One quarter of the channels each:
    sin(row * w), cos(row * w), sin(column * w), cos(column * w); row and column count from 0;
    w_i = 10000 ** -(i / (dim / 4)), i = 0 to dim / 4 - 1. Source: MoCo v3, section 4.4."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, dim/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim/2)
    rows = repeat(line, "row c -> (row column) c", column=side)
    columns = repeat(line, "column c -> (row column) c", row=side)
    patches = torch.cat([rows, columns], dim=1)  # (N, dim)
    return torch.cat([torch.zeros(1, dim), patches])[None]  # (1, 1+N, dim)

class VisionTransformer(nn.Module):
    """ViT encoder; its feature is the class token after the last LayerNorm. Images have image_size
    pixels per side, normalised by `mean` and `std`. As in MoCo v3 (section 4, against instability),
    positions are fixed and the patch projection is not trained, unless learned_positions and
    train_projection. registers: extra tokens after the class token, without position."""

    def __init__(self, image_size, patch_size, dim, depth, heads, *, registers=0, eps=1e-6,
                 learned_positions=False, train_projection=False):
        super().__init__()
        require(min(image_size, patch_size) > 0 and image_size % patch_size == 0, "the image size "
                f"must be a multiple of the patch size, got {image_size} px and patches of "
                f"{patch_size} px")
        require(heads > 0 and dim % heads == 0, f"width {dim} does not divide into {heads} heads")
        require(dim % 4 == 0, f"sine-cosine positions need a width divisible by 4, got {dim}")
        self.sizes = dict(dim=dim, depth=depth, heads=heads, registers=registers, eps=eps)
        self.image_size, self.patch_size, self.dim = image_size, patch_size, dim
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD  # input normalisation
        side = image_size // patch_size
        self.num_patches = side * side
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(sincos_positions(side, dim), requires_grad=learned_positions)
        self.blocks = nn.ModuleList(Block(dim, heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps)
        self.init_weights()
        self.patch_embed.requires_grad_(train_projection)

    @torch.no_grad()
    def init_weights(self):
        """Draw MoCo v3's initial weights: Xavier-uniform matrices, the class token near zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                matrices = 3 if name.endswith("qkv") else 1  # q, k and v
                for matrix in module.weight.chunk(matrices):
                    nn.init.xavier_uniform_(matrix)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images, keep=None):
        """images (B, 3, H, W), normalised -> features (B, D). RuntimeError for another size.
        keep: indices of the patches to encode, int64 (B, k), by default all; then N = k."""
        return self.encode(images, keep, class_only=True)[0]

    def tokens(self, images, keep=None):
        """As `forward` -> class token (B, D), patch tokens (B, N, D), after the last LayerNorm."""
        return self.encode(images, keep)[:2]

    def with_attention(self, images, kind):
        """Return features (B, D) and each layer's attention, float32, the mean over heads: kind
        "row", of the class token to the patches, (B, N); "matrix", of all T = 1 + R + N tokens
        (class, registers, patches) to all, (B, T, T)."""
        require(kind in ("row", "matrix"), f"expected kind 'row' or 'matrix', got {kind!r}")
        features, _, attentions = self.encode(images, kind=kind, class_only=True)
        return features, attentions

    def encode(self, images, keep=None, kind=None, class_only=False):
        """One pass -> class token (B, D), patch tokens (B, N, D), attentions (none: kind is None).
        class_only: the last layer computes the class token alone, so no patches, (B, 0, D)."""
        require(images.shape[-2:] == (self.image_size, self.image_size), f"expected images of "
                f"{self.image_size} px, got shape {tuple(images.shape)}", RuntimeError)
        x = self.patch_embed(images) + self.pos_embed[:, 1:]  # (B, N, D)
        if keep is not None:
            x = x.gather(1, repeat(keep, "b k -> b k d", d=self.dim))  # (B, k, D)
        extra = self.cls_token + self.pos_embed[:, :1]
        if self.reg_token is not None:
            extra = torch.cat([extra, self.reg_token], dim=1)  # (1, 1+R, D)
        first = extra.shape[1]  # of the patches
        x = torch.cat([extra.expand(len(x), -1, -1), x], dim=1)  # (B, 1+R+N, D)
        attentions = []
        for block in self.blocks:
            x, weights = block(x, kind, class_only=class_only and block is self.blocks[-1])
            if kind is not None:  # of a row the patches alone, (B, N)
                attentions.append(weights[:, first:] if kind == "row" else weights)
        x = self.norm(x)
        return x[:, 0], x[:, first:], attentions

def create_vit(name: str, image_size: int, patch_size: int, **options) -> VisionTransformer:
    """Create an encoder of ARCHITECTURES, its weights drawn from torch's global generator."""
    return VisionTransformer(image_size, patch_size, **ARCHITECTURES[name], **options)

# --- 2. Pivotal regions: patch importance, attention multiplied over all layers --------------
def attention_product(attentions: list[Tensor], patches=None) -> Tensor:
    """The paper's importance: the class token's attention multiplied elementwise over all layers.
    attentions: rows (B, N) of each layer, the mean over heads -> (B, N), the LOG of the product,
    which does not underflow: 1e-4 in each of 12 layers is 1e-48. Weights below
    torch.finfo(torch.float32).tiny are clamped to it: no logarithm is infinite. patches: unused."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack([row.clamp_min(tiny).log() for row in attentions]).sum(dim=0)

# --- 3. Location-wise mask: keep the most important 30 % of the patches, zero the rest -------
def kept_count(num_patches: int, keep_ratio: float) -> int:
    """Return how many patches a keep ratio in (0, 1] keeps: floor(keep_ratio * N), 1 or more."""
    return max(1, math.floor(keep_ratio * num_patches + 1e-9))  # 0.29 * 100 = 28.99... keeps 29

def location_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Keep the most important patches of every image: (B, N) -> bool (B, N), True = kept, exactly
    `kept_count` per row; ties go to the lower index. generator: for other masks."""
    k = kept_count(importance.shape[1], keep_ratio)
    order = importance.argsort(dim=1, descending=True, stable=True)  # (B, N)
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, :k], True)

def mask_pixels(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """x ⊙ mask: set every patch that is not kept to zero, after normalisation the mean colour, as
    in the released code. images (B, 3, H, W), mask bool (B, N), row by row -> new images."""
    pixels = repeat(mask, "b (rows columns) -> b 1 (rows y) (columns x)",
                    rows=images.shape[2] // patch_size, y=patch_size, x=patch_size)  # (B, 1, H, W)
    return images.masked_fill(~pixels, 0)

def box_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Keep the square box, of about keep_ratio of the patches, with the greatest sum of importance;
    ties: the upper, then the left; else as `location_mask`. Ours, for "crop"."""
    grid = importance.unflatten(1, (math.isqrt(importance.shape[1]), -1))  # (B, rows, columns)
    box = max(1, round(math.sqrt(keep_ratio * importance.shape[1])))  # patches per side
    scores = F.avg_pool2d(grid, box, stride=1)  # of each place, (B, down, across)
    best = F.one_hot(scores.flatten(1).argmax(dim=1), scores[0].numel()).view(scores.shape)
    around = F.pad(best.float(), [box - 1] * 4)  # a patch is kept if the place is up to box - 1
    return F.max_pool2d(around, box, stride=1).flatten(1).bool()  # above it, and to its left

def enlarge_box(images: Tensor, mask: Tensor, patch_size: int, side: int) -> Tensor:
    """Cut out the box of side * side patches that the mask keeps and enlarge it, bilinearly, to the
    whole image: (B, 3, H, W), mask bool (B, N) -> (B, 3, H, W). Ours, in place of `mask_pixels`."""
    size, columns = side * patch_size, images.shape[3] // patch_size
    boxes = images.unfold(2, size, patch_size).unfold(3, size, patch_size)  # at each place
    first = mask.int().argmax(dim=1)  # the upper left patch, (B,)
    batch = torch.arange(len(images), device=images.device)
    boxes = boxes[batch, :, first // columns, first % columns]  # (B, 3, size, size)
    return F.interpolate(boxes, images.shape[2:], mode="bilinear")

def kept_indices(mask: Tensor, k: int) -> Tensor:
    """Return the indices of the k True entries of each row: (B, N) -> int64 (B, k), ascending."""
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :k]

# --- Ablations: other importances and masks, and the registries of both ----------------------
def attention_rollout(attentions: list[Tensor], patches=None) -> Tensor:
    """Return the class token's row of the product (A_L + I) / 2 ... (A_1 + I) / 2, of all layers'
    matrices A (B, T, T), first layer first -> (B, R + N). Abnar and Zuidema, arXiv 2005.00928."""
    row = torch.zeros_like(attentions[0][:, 0])  # (B, T)
    row[:, 0] = 1  # the class token
    with torch.autocast(row.device.type, enabled=False):
        for matrix in reversed(attentions):  # a row times a matrix: O(N^2), not O(N^3)
            row = (torch.einsum("bi,bij->bj", row, matrix) + row) / 2
    return row[:, 1:]

def last_attention(attentions: list[Tensor], patches=None) -> Tensor:
    """Return the class token's attention in the last layer alone, (B, N)."""
    return attentions[-1]

def least_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Keep the LEAST important patches. As location_mask otherwise."""
    return location_mask(-importance, keep_ratio)

def random_mask(importance: Tensor, keep_ratio: float, generator=None) -> Tensor:
    """Keep patches drawn from the (CPU) generator, independent of importance."""
    noise = torch.rand(importance.shape, generator=generator)
    return location_mask(noise, keep_ratio).to(importance.device, non_blocking=True)

class Importance(NamedTuple):
    function: Callable  # (attentions, patches) -> (B, N)
    attention_kind: str  # "row" or "matrix", of `VisionTransformer.with_attention`
    needs_patches: bool = False  # patch tokens (B, N, D); None is passed otherwise

class Mask(NamedTuple):
    function: Callable  # (importance (B, N), keep_ratio, generator) -> bool (B, N)
    needs_importance: bool = True  # else --importance is refused, as it has no effect

IMPORTANCES = {
    "product": Importance(attention_product, "row"),
    "rollout": Importance(attention_rollout, "matrix"),
    "last": Importance(last_attention, "row"),
}
MASKS = {
    "location": Mask(location_mask),
    "least": Mask(least_mask),
    "random": Mask(random_mask, needs_importance=False),
}

def patch_importance(encoder, images, name) -> tuple[Tensor, Tensor]:
    """One pass of an encoder -> features (B, D), importance (B, N); name: in IMPORTANCES."""
    function, kind, needs_patches = IMPORTANCES[name]
    features, patches, attentions = encoder.encode(images, kind=kind, class_only=not needs_patches)
    importance = function(attentions, patches if needs_patches else None)
    return features, importance[:, -encoder.num_patches:]  # never a register's

# --- 4. MoCo v3: heads, momentum encoder f_k, contrastive loss -------------------------------
def projector(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """MoCo v3's three-layer head: (B, in_dim) -> (B, out_dim), without biases and, as in SimCLR,
    without affine in the last BatchNorm. BatchNorm needs two or more images."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False))

def predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """MoCo v3's two-layer head of the online branch: (B, dim) -> (B, dim)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, dim, bias=False), nn.BatchNorm1d(dim, affine=False))

@torch.no_grad()
def momentum_update(online: nn.Module, momentum: nn.Module, m: float) -> None:
    """EMA, in place: momentum <- m * momentum + (1 - m) * online. Not of BatchNorm's buffers."""
    for old, new in zip(momentum.parameters(), online.parameters(), strict=True):
        old.lerp_(new, 1 - m)  # equal weights stay equal to the last bit

def momentum_schedule(step: int, total: int, base: float = 0.99) -> float:
    """Return the EMA momentum of a step: base at step 0, by half a cosine to 1 at total (BYOL)."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / total)) / 2

def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float, offset: int = 0) -> Tensor:
    """InfoNCE with in-batch negatives, times 2 * temperature (MoCo v3, Algorithm 1) -> scalar.
    queries (B, C), keys (M, C), of any norm; keys get no gradient. The cross-entropy of a softmax
    of cosine / temperature over all keys, mean over queries: query i's positive is key offset + i.
    Float32 or wider under any autocast. If all features are equal: 2 * temperature * log M."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(at_least_float32(queries), dim=1)
        keys = F.normalize(at_least_float32(keys.detach()), dim=1)
        logits = queries @ keys.T / temperature  # (B, M)
        positives = offset + torch.arange(len(queries), device=queries.device)
        return 2 * temperature * F.cross_entropy(logits, positives)

@torch.no_grad()
def gather_keys(keys: Tensor) -> tuple[Tensor, int]:
    """Concatenate the keys (B, C) of all ranks -> (ranks * B, C), and this rank's first row.
    Without a process group: the keys unchanged, and 0. All ranks must pass the same number."""
    if not (dist.is_available() and dist.is_initialized()):
        return keys, 0
    keys_of_ranks = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(keys_of_ranks, keys.contiguous())
    return torch.cat(keys_of_ranks), dist.get_rank() * len(keys)

class MoCoV3Output(NamedTuple):
    total: Tensor
    global_loss: Tensor

class MoCoV3(nn.Module):
    """MoCo v3: the query of each view must match the momentum encoder's key of the other view.
    encoder      the online encoder f_q; f_k starts as its copy, so load published weights first
    temperature  of the softmax over cosines; hidden_dim, output_dim: of projector and predictor"""

    OPTIONS = ("temperature", "hidden_dim", "output_dim")  # train.py passes these settings
    importance, keep_ratio = "product", 0.3  # of the patches to draw; MoCo v3 masks nothing
    pivotal_mask = staticmethod(location_mask)
    LOSSES = ("global_loss",)

    def __init__(self, encoder, temperature=0.2, hidden_dim=4096, output_dim=256):
        super().__init__()
        require(temperature > 0, f"the temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.encoder = encoder
        self.projector = projector(encoder.dim, hidden_dim, output_dim)
        self.predictor = predictor(output_dim, hidden_dim)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)  # EMA alone
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, view1, view2, generator=None, progress=0.0):
        """Two augmentations of the same images, (B, 3, H, W) -> MoCoV3Output: the `contrast` of
        each view's `query` with the OTHER view's `key`, which gets no gradient, summed. A pass has
        one view, as BatchNorm mixes a batch. ValueError: `check_views`. Rest: for subclasses."""
        check_views(view1, view2)
        q1, q2 = self.query(view1), self.query(view2)
        with torch.no_grad():  # stop-gradient
            k1, k2 = self.key(view1), self.key(view2)
        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)
        return MoCoV3Output(global_loss, global_loss)

    def query(self, view):
        """Online branch: encoder, projector, predictor. (B, 3, H, W) -> z_q (B, C)."""
        return self.predictor(self.projector(self.encoder(view)))

    def key(self, view):
        """Global momentum branch: encoder, projector. (B, 3, H, W) -> z_k (B, C)."""
        return self.momentum_projector(self.momentum_encoder(view))

    def contrast(self, query, key):
        keys, offset = gather_keys(key)  # the other ranks' images are negatives too
        return contrastive_loss(query, keys, self.temperature, offset)

    def update_momentum(self, m):
        """Move the momentum side towards the online one; called after the optimiser's step."""
        momentum_update(self.encoder, self.momentum_encoder, m)
        momentum_update(self.projector, self.momentum_projector, m)

    def train(self, mode=True):
        """Keep the momentum side in train mode: BatchNorm with batch statistics on both sides."""
        super().train(mode)
        self.momentum_encoder.train()
        self.momentum_projector.train()
        return self

    @torch.no_grad()
    def pivotal_patches(self, images):
        """Return the most important patches of images (B, 3, H, W), to draw: bool (B, N)."""
        _, importance = patch_importance(self.momentum_encoder, images, self.importance)
        return self.pivotal_mask(importance, self.keep_ratio)

    def chance_levels(self, batch):
        """Return {field: its value if all features are equal}, for a batch of all ranks."""
        level = 2 * 2 * self.temperature * math.log(batch)  # in both directions
        return dict.fromkeys(self.LOSSES, level)

def check_views(view1, view2):
    require(view1.shape == view2.shape,
            f"the views differ in shape: {tuple(view1.shape)} and {tuple(view2.shape)}")
    require(len(view1) > 1, "a batch of one image has no negatives; give two or more")

# --- 5. LoDisc: MoCo v3 plus the local branch, the whole figure ------------------------------
class LoDiscOutput(NamedTuple):
    total: Tensor
    global_loss: Tensor
    local_loss: Tensor
    masks: tuple[Tensor, Tensor]  # bool (B, N), of view 1 and of view 2

class LoDisc(MoCoV3):
    """The overview figure: MoCo v3 plus the local branch.
    mask         "location" (the paper), "least" or "random"
    importance   "product" (the paper), "rollout" or "last"
    local_input  "pixels" (the paper): other patches are zero; "tokens": only kept ones enter;
                 "crop" (ours): the most important box is cut out and enlarged
    keep_ratio   fraction of patches kept; global_weight, local_weight: of the losses"""

    OPTIONS = (*MoCoV3.OPTIONS, "mask", "importance", "local_input", "keep_ratio",
               "global_weight", "local_weight")
    LOSSES = ("global_loss", "local_loss")

    def __init__(self, encoder, mask="location", importance="product", local_input="pixels",
                 keep_ratio=0.3, global_weight=1.0, local_weight=1.0, **options):
        super().__init__(encoder, **options)
        for name, value, choices in (("mask", mask, MASKS), ("importance", importance, IMPORTANCES),
                                     ("local_input", local_input, LOCAL_INPUTS)):
            require(value in choices, f"unknown {name} {value!r}, have {', '.join(choices)}")
        require(0 < keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {keep_ratio}")
        self.mask, self.importance, self.local_input = mask, importance, local_input
        self.keep_ratio, self.num_kept = keep_ratio, kept_count(encoder.num_patches, keep_ratio)
        if local_input == "crop":
            require(mask == "location", f"local_input 'crop' chooses a box, not mask {mask!r}")
            self.pivotal_mask = box_mask
            self.num_kept = int(box_mask(torch.zeros(1, encoder.num_patches), keep_ratio).sum())
        self.global_weight, self.local_weight = global_weight, local_weight

    def forward(self, view1, view2, generator=None, progress=0.0):
        """As `MoCoV3.forward`, by one `key_and_mask` per view, view 1 first -> LoDiscOutput:
        global_loss; local_loss, the same with `local_key` of the OTHER view and that view's mask;
        total, weighted by global_weight and local_weight; masks. generator (CPU): for random."""
        check_views(view1, view2)
        q1, q2 = self.query(view1), self.query(view2)
        with torch.no_grad():  # stop-gradient
            k1, mask1 = self.key_and_mask(view1, generator)
            k2, mask2 = self.key_and_mask(view2, generator)
            l1, l2 = self.local_key(view1, mask1), self.local_key(view2, mask2)  # z_l
        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)
        local_loss = self.contrast(q1, l2) + self.contrast(q2, l1)
        total = self.global_weight * global_loss + self.local_weight * local_loss
        return LoDiscOutput(total, global_loss, local_loss, (mask1, mask2))

    def key_and_mask(self, view, generator=None):
        """Global momentum branch -> z_k (B, C), and of the same pass, by `patch_importance` and the
        function in MASKS, or `box_mask` for "crop", the mask, bool (B, N)."""
        features, importance = patch_importance(self.momentum_encoder, view, self.importance)
        choose = box_mask if self.local_input == "crop" else MASKS[self.mask].function
        mask = choose(importance, self.keep_ratio, generator)
        return self.momentum_projector(features), mask

    def local_key(self, view, mask):
        """Local momentum branch: f_k again, over the pivotal patches alone -> z_l (B, C): by
        `mask_pixels`; "tokens": `kept_indices` (num_kept) as keep; "crop": `enlarge_box`."""
        size, keep = self.encoder.patch_size, None
        if self.local_input == "pixels":
            view = mask_pixels(view, mask, size)
        elif self.local_input == "crop":
            view = enlarge_box(view, mask, size, math.isqrt(self.num_kept))
        else:
            keep = kept_indices(mask, self.num_kept)
        return self.momentum_projector(self.momentum_encoder(view, keep))

METHODS = {"lodisc": LoDisc, "mocov3": MoCoV3}

# --- 6. Published weights: load_encoder ------------------------------------------------------
FORMATS = {  # the class token's name, after any prefix: whose names; timm's are most others' too
    "embeddings.cls_token": "Hugging Face's names", "class_token": "torchvision's names",
    "cls_token": "timm's names"}
RENAMES = (  # (pattern, replacement), in turn, to timm's names
    (r"\b\w*module\.|\b_orig_mod\.", ""), (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # chunks
    (r"^embeddings\.", ""), (r"^class_token", "cls_token"), (r"^register_tokens", "reg_token"),
    (r"^conv_proj|^patch_embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.pos_embedding|^position_embeddings", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_|^(encoder\.)?layers?\.", "blocks."),
    (r"^encoder\.ln\.|^layernorm\.", "norm."), (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.(ln_1|layernorm_before)\.", ".norm1."), (r"\.(ln_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.(self_attention\.out_proj|attention\.(output\.dense|o_proj))\.", ".attn.proj."),
    (r"\.(mlp\.(0|linear_1)|intermediate\.dense)\.", ".mlp.fc1."),
    (r"\.(mlp\.(3|linear_2)|output\.dense)\.", ".mlp.fc2."),
    (r"\.(gamma_|layer_scale)([12])(\.lambda1)?$", r".ls\2.gamma"))
LEFT_OUT = r"(heads?|head_dist|decoder\w*|mask_token|masked_embed|pre_logits|pooler|classifier)\b"
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of published ViTs, by width
NORMALISATIONS = {  # mean and standard deviation of each channel
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}
CONFIG_NAMES = {  # ours: those in a config of Hugging Face, timm or this project
    "width": "hidden_size num_features dim", "image size": "image_size input_size img_size",
    "heads": "num_attention_heads num_heads heads", "mean": "image_mean mean",
    "std": "image_std std", "eps": "layer_norm_eps eps", "activation": "hidden_act act_layer",
    **{name: name for name in ("use_swiglu_ffn", "architecture", "do_normalize", "do_rescale")}}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "I32": torch.int32,
          "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}
HARMLESS = [  # non-tensor types in published files: loading them runs no code
    argparse.Namespace, (lambda *factory: {}, "collections.defaultdict"), int, float, list, dict,
    np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
    *((np.float64(0).__reduce__()[0], f"numpy.{m}.multiarray.scalar") for m in ("core", "_core")),
    *((PurePath, f"pathlib.{local}{kind}Path") for local in ("", "_local.")
      for kind in ("Posix", "Windows", "PurePosix", "PureWindows"))]

def read_weights(path) -> dict:
    """Read what torch.save or safetensors wrote, without running code from it. path: the file, or
    the folder of a run or of a model of the Hugging Face Hub. Raises UserError."""
    names = ("checkpoint.pt", "model.safetensors", "pytorch_model.bin")
    files = [file for file in (Path(path), *(Path(path, n) for n in names)) if os.path.isfile(file)]
    require(files, f"{path}: no such file; expected a checkpoint or weights, or a folder with one "
            f"of {', '.join(names)} (in the Hub's cache: below snapshots/)", UserError)
    try:
        if files[0].suffix == ".safetensors":
            return read_safetensors(files[0].read_bytes())
        with torch.serialization.safe_globals(HARMLESS):
            return {**torch.load(files[0], map_location="cpu", weights_only=True)}
    except Exception as error:  # torch.load raises many types
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"contains {unsafe[1]}, which could run code" if unsafe else "cannot be read"
        raise UserError(f"{files[0]} {reason}; expected tensors that torch.save or safetensors "
                        "wrote; for a model: torch.save(model.state_dict(), FILE)") from None

def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """Decode a safetensors file: the header's length in 8 bytes, the header, JSON, the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        require(start <= first <= last <= len(data), f"{name} is not within the file")
        if first < last:  # not an empty tensor
            values = torch.frombuffer(bytearray(data[first:last]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"])
    return tensors

def settle_facts(path, config, given, usual, expected):
    """Return {fact: value}, {fact: origin}: from the file's config or, if it lacks heads, configs
    beside it; else given, else usual. ValueError if a config contradicts given or expected."""
    folder = path if os.path.isdir(path) else path.parent
    if not config.keys() & CONFIG_NAMES["heads"].split():  # of something else
        config = {}
        for name in ("config.json", "preprocessor_config.json"):
            if os.path.isfile(folder / name):
                config |= json.loads((folder / name).read_text(encoding="utf-8"))
    config = {**config, **(config.get("model_args") or {}), **(config.get("pretrained_cfg") or {})}
    stated = {}
    for ours, theirs in CONFIG_NAMES.items():
        stated |= {ours: config[name] for name in theirs.split() if config.get(name) is not None}
    if "image size" in stated:  # pixels, (height, width) or (channels, height, width)
        stated["image size"] = np.unique(np.ravel(stated["image size"])[-2:]).tolist()
    for name, value in {**expected, **given}.items():
        require(np.array_equal(stated.get(name, value), value),
                f"it states {name} {stated.get(name)}, expected {value}")
    unlike = re.findall(r"rope|quickgelu|mlp\.w\w*", f"{stated} {expected['tensors']}")
    require(not unlike, f"{unlike[:1]}: rotary positions, QuickGELU, SwiGLU are unsupported")
    facts = {**usual, **given, **stated}
    require(type(facts["heads"]) is int, f"the number of heads of width {expected['width']} is "
            f"unknown: give --heads (stated: {stated.get('heads')!r})")
    mean, std = (tuple(map(float, facts[name])) for name in ("mean", "std"))
    facts |= {"mean": mean, "std": std, "eps": float(facts["eps"])}
    require(len(mean) == len(std) == 3 and all(0 <= x <= 1 for x in mean + std) and min(std) > 0
            and ("mean" in stated) == ("std" in stated) and 0 < facts["eps"] < 0.1, "expected mean "
            f"and std of 3 channels, in [0, 1], and a small eps, got {mean}, {std}, {facts['eps']}")
    origin = dict.fromkeys(usual, "assumed") | dict.fromkeys(given, "given")
    return facts, origin | dict.fromkeys(stated, "stated")

def named_tensors(contents, place=""):
    """Yield (dotted name, tensor) of all tensors in nested dicts."""
    for name, value in contents.items():
        if isinstance(value, dict) and place.count(".") < 50:  # it may contain itself
            yield from named_tensors(value, f"{place}{name}.")
        elif isinstance(value, Tensor):
            yield f"{place}{name}", value

def merge_tensors(state):
    """Merge q, k and v into one layer, and layer scale into the layer before it, in place."""
    for name in [name for name in state if ".attn.q." in name]:
        parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    for name in [name for name in state if re.search(r"\.ls[12]\.gamma$", name)]:
        scale = state.pop(name)
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[layer + ".weight"] = scale[:, None] * state[layer + ".weight"]
        state[layer + ".bias"] = scale * state[layer + ".bias"]

def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Interpolate (1, 1 + n * n, D) to (1, 1 + side * side, D): bicubic, antialiased. A missing
    class token's is set to zero: (1, n * n, D), DeiT III. Other shapes stay unchanged."""
    n = math.isqrt(positions.shape[1])
    if n * n == positions.shape[1]:
        positions = F.pad(positions, (0, 0, 1, 0))
    if n == side or n * n != positions.shape[1] - 1:
        return positions
    grid = rearrange(positions[:, 1:], "1 (rows columns) d -> 1 d rows columns", rows=n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    patches = rearrange(grid, "1 d rows columns -> 1 (rows columns) d")
    return torch.cat([positions[:, :1], patches], dim=1)

def load_encoder(path, use_momentum=False, image_size=None, heads=None, normalise=None):
    """Build the encoder of a checkpoint or of published weights by its tensors, in eval mode.
    path: as in `read_weights`; of two encoders, the online one, or with use_momentum the momentum
    (teacher's, EMA) one. image_size: in pixels, by default the file's. heads, normalise: where no
    config states them. The result has `config` (ours, else {}) and `source`. Raises UserError."""
    contents, path = read_weights(path), Path(path)
    tensors = dict(named_tensors(contents))
    tokens = [re.fullmatch(rf"(?!.*decoder)(|.*?\.)({'|'.join(FORMATS)})", x) for x in tensors]
    formats = {token[1]: FORMATS[token[2]] for token in tokens if token}  # by prefix
    averaged = r"(^|[._])(momentum|teacher|ema|target|swa|shadow|averaged)|_k\."
    averaged = [prefix for prefix in formats if re.search(averaged, prefix, re.IGNORECASE)]
    online = [prefix for prefix in formats if prefix not in averaged] or averaged
    require(online, f"{path}: no ViT of a known format in it: no tensor's name ends in cls_token; "
            f"its keys: {list(contents)[:9]}, its tensors: {list(tensors)[:5]}", UserError)
    require(averaged or not use_momentum, f"{path} has no momentum encoder", UserError)
    prefix = averaged[0] if use_momentum else online[0]
    config = contents.get("config") if isinstance(contents.get("config"), dict) else {}
    state, left_out = {}, {}  # a dict keeps the order
    try:
        for name in [name for name in tensors if name.startswith(prefix)]:
            ours, tensor = name.removeprefix(prefix), tensors[name]
            for pattern, replacement in RENAMES:
                ours = re.sub(pattern, replacement, ours)
            if re.match(LEFT_OUT, ours):
                left_out[ours.split(".")[0]] = True
                continue
            require(ours not in state, f"{name} is there twice, under another name too")
            require(tensor.is_floating_point(), f"{name} is of {tensor.dtype}, not floating point")
            state[ours] = tensor.float()
            require(state[ours].isfinite().all(), f"{name} has values that are not finite")
        missing = {"patch_embed.proj.weight", "pos_embed"} - state.keys()
        require(not missing, f"it lacks {', '.join(sorted(missing))}")
        dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        side = math.isqrt(state["pos_embed"].shape[1])
        given = {} if heads is None else {"heads": heads}
        given |= dict(zip(("mean", "std"), NORMALISATIONS[normalise])) if normalise else {}
        usual = {"heads": HEADS.get(dim), "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "eps": 1e-6}
        if dim == 384 and (contents.get("arch") == "vit_small" or "base_encoder." in online[0]):
            usual["heads"] = 12  # MoCo v3's own ViT-S
        facts, origin = settle_facts(path, config, given, usual, {
            "width": dim, "image size": [patch_size * side], "tensors": [*state],
            "activation": "gelu", "use_swiglu_ffn": False, "do_normalize": True,
            "do_rescale": True})
        merge_tensors(state)
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            encoder = VisionTransformer(
                patch_size * side if image_size is None else image_size, patch_size, dim, depth,
                facts["heads"], registers=registers, eps=facts["eps"], learned_positions=True,
                train_projection=True)
        state["pos_embed"] = resize_positions(state["pos_embed"], encoder.image_size // patch_size)
        encoder.load_state_dict(state)
    except (LookupError, ValueError, RuntimeError, TypeError, OSError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]  # names missing, unexpected, misshapen tensors
        raise UserError(f"{path} ({formats[prefix]}) does not fit the encoder: {reason}; what is "
                        "read: README.md, Published weights") from None
    encoder.config = config if {"dim", "depth", "heads"} <= config.keys() else {}
    mean, std = encoder.mean, encoder.std = facts["mean"], facts["std"]
    encoder.source = (
        f"{path}: {formats[prefix]}, {prefix}*, {depth} layers of width {dim}, {facts['heads']} "
        f"heads ({origin['heads']}), {registers} registers, {side} x {side} positions, mean "
        f"{mean}, std {std} ({origin['mean']}); left out: {', '.join(left_out or ['nothing'])}")
    return encoder.eval()
