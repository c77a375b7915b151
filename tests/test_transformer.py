"""The vision transformer: against torchvision's, and its stored attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import ViT_B_16_Weights, vit_b_16

from lodisc import (IMAGENET_MEAN, IMAGENET_STD, Attention, Block, VisionTransformer,
                    attention_weights, create_vit, first_line, sincos_positions)


def torchvision_weights(model):
    """torchvision's vit_b_16 parameters under timm's names."""
    renames = (("encoder.layers.encoder_layer_", "blocks."), ("ln_1", "norm1"), ("ln_2", "norm2"),
               ("self_attention.in_proj_", "attn.qkv."), ("self_attention.out_proj", "attn.proj"),
               ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2"), ("conv_proj", "patch_embed.proj"),
               ("class_token", "cls_token"), ("encoder.pos_embedding", "pos_embed"),
               ("encoder.ln", "norm"))
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        weights[name] = tensor
    return weights


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_same_features_as_torchvision(dtype, tolerance):
    theirs = vit_b_16(weights=None)
    theirs.heads = torch.nn.Identity()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # biases, norms, class token too
            parameter.normal_(1.0 if "ln" in name and "weight" in name else 0.0, 0.05)
    theirs.to(dtype).eval()
    ours = create_vit("vit_base", 224, 16).to(dtype)
    ours.load_state_dict(torchvision_weights(theirs))
    images = torch.randn(2, 3, 224, 224, dtype=dtype)
    with torch.no_grad():
        expected, (features, attentions) = theirs(images), ours(images)
    assert attentions == []
    assert (features - expected).abs().max() <= tolerance * expected.abs().max()


def sharpen(encoder, factor=30.0):
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight[: 2 * encoder.dim] *= factor**0.5


@pytest.mark.parametrize("dtype, sharp, tolerance", [
    (torch.float32, False, 1e-6), (torch.float32, True, 1e-4), (torch.float64, True, 1e-12)])
def test_class_row_is_the_row_of_the_full_matrix(dtype, sharp, tolerance):
    encoder = create_vit("vit_tiny", 64, 8).to(dtype)
    if sharp:
        sharpen(encoder)
    images = torch.randn(3, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        plain = encoder(images)[0]
        features, rows = encoder(images, attention="row")
        _, matrices = encoder(images, attention="full")
    assert torch.equal(features, plain)
    assert len(rows) == len(matrices) == 12
    for row, matrix in zip(rows, matrices):
        assert row.shape == (3, 3, 65) and matrix.shape == (3, 3, 65, 65)
        assert (row - matrix[:, :, 0]).abs().max() <= tolerance
        assert torch.allclose(matrix.sum(-1), torch.ones((), dtype=dtype), atol=1e-5)
    if sharp:
        assert max(row.max() for row in rows) > 0.9


def test_full_matrices_are_those_of_the_features():
    """weights @ v is what the fused kernel returns."""
    encoder = create_vit("vit_nano", 32, 8).double()
    attn, seen = encoder.blocks[1].attn, {}
    attn.qkv.register_forward_hook(lambda module, args, out: seen.update(qkv=out))
    attn.proj.register_forward_hook(lambda module, args, out: seen.update(into=args[0]))
    _, matrices = encoder(torch.randn(2, 3, 32, 32).double(), attention="full")
    v = seen["qkv"].unflatten(-1, (3, 3, 32))[:, :, 2].transpose(1, 2)  # (B, h, 1+N, d)
    expected = (matrices[1] @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(seen["into"], expected, atol=1e-12)


@pytest.mark.parametrize("attention", [None, "row", "full"])
def test_class_only_is_the_class_tokens_place_of_the_whole(attention):
    block, x = Block(48, 3).double(), torch.randn(2, 10, 48, dtype=torch.float64)
    (whole, weights), (alone, same_weights) = block(x, attention), block(x, attention, True)
    assert alone.shape == (2, 1, 48) and whole.shape == Attention(48, 3)(x.float())[0].shape == x.shape
    assert torch.allclose(alone, whole[:, :1], atol=1e-12)
    assert (weights is same_weights is None) if attention is None else weights.equal(same_weights)


def test_the_last_layer_works_for_the_class_token_alone():
    encoder, inside = create_vit("vit_nano", 32, 8), []
    for block in encoder.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: inside.append(out.shape[1]))
    encoder(torch.randn(2, 3, 32, 32))
    assert inside == [17, 17, 17, 1]


class Recorder(TorchDispatchMode):
    """Every operation that runs, and the largest two last dimensions of what it makes."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape[-2:]))
        return out


def test_rows_leave_the_fused_kernel_on():
    encoder = create_vit("vit_tiny", 64, 8)
    images = torch.randn(2, 3, 64, 64)
    for attention, square in ((None, False), ("row", False), ("full", True)):
        with Recorder() as recorder, torch.no_grad():
            encoder(images, attention=attention)
        fused = [name for name in recorder.names if "scaled_dot_product" in name]
        assert len(fused) == 12
        assert not any("math" in name for name in fused)
        assert ((65, 65) in recorder.shapes) == square


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_float32_under_autocast(dtype):
    encoder, seen = create_vit("vit_nano", 32, 8), []
    encoder.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        _, rows = encoder(torch.randn(4, 3, 32, 32), attention="row")
    assert seen[0].dtype == dtype and rows[0].dtype == torch.float32
    q, k, _ = seen[0].double().unflatten(-1, (3, 3, 32)).permute(2, 0, 3, 1, 4)
    expected = (q[:, :, :1] @ k.mT / math.sqrt(32)).softmax(-1)[:, :, 0]
    assert (rows[0] - expected).abs().max() < 1e-6


def test_attention_weights_scale():
    q, k = torch.randn(2, 3, 4, 16).double(), torch.randn(2, 3, 5, 16).double()
    expected = torch.empty(2, 3, 4, 5).double()
    for b in range(2):
        for h in range(3):
            for i in range(4):
                scores = torch.stack([q[b, h, i] @ k[b, h, j] for j in range(5)]) / 4
                expected[b, h, i] = scores.exp() / scores.exp().sum()
    assert torch.allclose(attention_weights(q, k), expected, atol=1e-12)


def test_kept_tokens_equal_the_full_encoder_with_the_others_masked_out(monkeypatch):
    encoder = create_vit("vit_nano", 48, 8).double()
    images = torch.randn(5, 3, 48, 48).double()
    keep = torch.rand(5, 36).argsort(1) < 11
    with torch.no_grad():
        features, rows = encoder(images, attention="row", keep=keep)
        as_indices = encoder(images, keep=keep.nonzero()[:, 1].reshape(5, 11))[0]
        allowed = torch.cat([torch.ones(5, 1, dtype=torch.bool), keep], 1)[:, None, None]
        fused = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention",
                            lambda q, k, v: fused(q, k, v, attn_mask=allowed))
        expected = encoder(images)[0]
    assert rows[0].shape == (5, 3, 12)
    assert torch.allclose(features, expected, atol=1e-12)
    assert torch.equal(features, as_indices)
    assert not torch.allclose(features, encoder(images)[0][[1, 2, 3, 4, 0]], atol=1e-3)


def test_sincos_positions():
    side, dim = 3, 16
    table = sincos_positions(side, dim)
    assert table.shape == (1, 10, 16)
    assert (table[0, 0] == 0).all()
    for row in range(side):
        for column in range(side):
            expected = []
            for value, wave in ((column, math.sin), (column, math.cos), (row, math.sin),
                                (row, math.cos)):
                expected += [wave(value / 10000 ** (i / 4)) for i in range(4)]
            assert torch.allclose(table[0, 1 + row * side + column], torch.tensor(expected))


def test_patches_are_numbered_row_by_row():
    encoder = create_vit("vit_nano", 32, 8)
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:16, 16:24] = 1  # second row, third column
    changed = (encoder.patch_embed(images) != encoder.patch_embed(images * 0)).any(-1)
    assert changed[0].nonzero().flatten().tolist() == [6]


def test_initialisation_is_that_of_moco_v3():
    encoder = create_vit("vit_small", 64, 16)
    fixed = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert fixed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    block, dim = encoder.blocks[0], 384
    for weight, fan_in, fan_out in ((block.attn.qkv.weight, dim, dim), (block.attn.proj.weight, dim, dim),
                                    (block.mlp.fc1.weight, dim, 4 * dim), (block.mlp.fc2.weight, 4 * dim, dim),
                                    (encoder.patch_embed.proj.weight, 3 * 16 * 16, dim)):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.mean()) < 0.01 * bound
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
    assert 0 < encoder.cls_token.abs().max() < 1e-5
    assert encoder.norm.eps == encoder.blocks[0].norm1.eps == encoder.blocks[0].norm2.eps == 1e-6


def test_learned_positions_and_trained_projection_are_options():
    encoder = create_vit("vit_nano", 32, 8, learned_positions=True, train_projection=True)
    assert all(p.requires_grad for p in encoder.parameters())
    assert not torch.equal(encoder.pos_embed, sincos_positions(4, encoder.dim))
    assert 0.01 < encoder.pos_embed.std() < 0.03


def test_published_sizes():
    for name, heads, millions in (("vit_tiny", 3, 5.5), ("vit_small", 6, 21.7),
                                  ("vit_small_moco", 12, 21.7), ("vit_base", 12, 85.8)):
        encoder = create_vit(name, 224, 16)
        assert len(encoder.blocks) == 12 and encoder.blocks[-1].attn.heads == heads
        assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_pictures_are_normalised_as_published():
    published = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    assert [list(IMAGENET_MEAN), list(IMAGENET_STD)] == [published.mean, published.std]


def test_gradients_reach_everything_that_trains():
    encoder = create_vit("vit_nano", 32, 8)
    encoder(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_an_error_in_one_line():
    assert first_line(ValueError(" what came\nwhere")) == "what came"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize("call, says", [
    (lambda e: create_vit("vit_huge", 32, 8), "vit_huge"),
    (lambda e: create_vit("vit_nano", 50, 8), "50 px"),
    (lambda e: create_vit("vit_nano", 32, 0), "multiple of the patch"),
    (lambda e: VisionTransformer(32, 8, dim=50, depth=1, heads=3), "50"),
    (lambda e: VisionTransformer(32, 8, dim=6, depth=1, heads=3), "multiple of 4"),
    (lambda e: e(torch.zeros(2, 3, 40, 40)), "(B, 3, 32, 32), got (2, 3, 40, 40)"),
    (lambda e: e(torch.zeros(3, 32, 32)), "(3, 32, 32)"),
    (lambda e: e(torch.zeros(2, 1, 32, 32)), "(2, 1, 32, 32)"),
    (lambda e: e(torch.zeros(2, 3, 32, 32), attention="all"), "'all'"),
    (lambda e: e(torch.zeros(2, 3, 32, 32), keep=torch.ones(2, 9, dtype=torch.bool)), "(2, 9)"),
    (lambda e: e(torch.zeros(2, 3, 32, 32), keep=torch.eye(16, dtype=torch.bool)[:2].cumsum(0) > 0),
     "1 to 2"),
    (lambda e: e(torch.zeros(2, 3, 32, 32), keep=torch.zeros(2, 16, dtype=torch.bool)), "at least one"),
    (lambda e: e(torch.zeros(2, 3, 32, 32), keep=torch.zeros(3, 4, dtype=torch.int64)), "(3, 4)"),
])
def test_what_cannot_be_right_is_rejected(call, says):
    with pytest.raises(ValueError) as error:
        call(create_vit("vit_nano", 32, 8))
    assert says in str(error.value)
