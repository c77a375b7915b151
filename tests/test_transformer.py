"""The vision transformer: against torchvision's, and its stored attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import ViT_B_16_Weights
from torchvision.models import VisionTransformer as TorchvisionViT

from lodisc import (IMAGENET_MEAN, IMAGENET_STD, Attention, Block, UserError, VisionTransformer,
                    attention_weights, create_vit, require, sincos_positions)


def torchvision_weights(model):
    """Return the parameters of torchvision's ViT under timm's names."""
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
def test_features_match_torchvision(dtype, tolerance):
    theirs = TorchvisionViT(96, 16, num_layers=3, num_heads=12, hidden_dim=768, mlp_dim=3072)
    theirs.heads = torch.nn.Identity()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # biases, norms, class token too
            parameter.normal_(1.0 if "ln" in name and "weight" in name else 0.0, 0.05)
    theirs.to(dtype).eval()
    ours = VisionTransformer(96, 16, dim=768, depth=3, heads=12).to(dtype)
    ours.load_state_dict(torchvision_weights(theirs))
    images = torch.randn(2, 3, 96, 96, dtype=dtype)
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
def test_stored_attention_kinds_agree(dtype, sharp, tolerance):
    encoder = create_vit("vit_tiny", 64, 8).to(dtype)
    if sharp:
        sharpen(encoder)
    images = torch.randn(3, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        plain = encoder(images)[0]
        features, rows = encoder(images, attention="row")
        with_matrices, matrices = encoder(images, attention="full")
        with_means, means = encoder(images, attention="mean")
    for same in (features, with_matrices, with_means):
        assert torch.equal(same, plain)
    assert len(rows) == len(matrices) == len(means) == 12
    for row, matrix, mean in zip(rows, matrices, means):
        assert row.shape == (3, 3, 65) and matrix.shape == (3, 3, 65, 65)
        assert mean.shape == (3, 1, 65, 65)
        assert (row - matrix[:, :, 0]).abs().max() <= tolerance
        assert torch.equal(mean, matrix.mean(1, keepdim=True))
        assert mean.untyped_storage().nbytes() == mean.numel() * mean.element_size()  # no heads
        assert torch.allclose(matrix.sum(-1), torch.ones((), dtype=dtype), atol=1e-5)
    if sharp:
        assert max(row.max() for row in rows) > 0.9


def test_full_attention_times_values_equals_fused_kernel():
    encoder = create_vit("vit_nano", 32, 8).double()
    attn, seen = encoder.blocks[1].attn, {}
    attn.qkv.register_forward_hook(lambda module, args, out: seen.update(qkv=out))
    attn.proj.register_forward_hook(lambda module, args, out: seen.update(into=args[0]))
    _, matrices = encoder(torch.randn(2, 3, 32, 32).double(), attention="full")
    v = seen["qkv"].unflatten(-1, (3, 3, 32))[:, :, 2].transpose(1, 2)  # (B, h, 1+N, d)
    expected = (matrices[1] @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(seen["into"], expected, atol=1e-12)


@pytest.mark.parametrize("attention", [None, "row", "full", "mean"])
def test_class_only_equals_class_token_of_all(attention):
    block, x = Block(48, 3).double(), torch.randn(2, 10, 48, dtype=torch.float64)
    (whole, weights), (alone, same_weights) = block(x, attention), block(x, attention, True)
    assert alone.shape == (2, 1, 48)
    assert whole.shape == Attention(48, 3)(x.float())[0].shape == x.shape
    assert torch.allclose(alone, whole[:, :1], atol=1e-12)
    assert (weights is same_weights is None) if attention is None else weights.equal(same_weights)


@pytest.mark.parametrize("method, computed", [("forward", 1), ("tokens", 17)])
def test_last_layer_computes_class_token_only_in_forward(method, computed):
    encoder, inside = create_vit("vit_nano", 32, 8), []
    for block in encoder.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: inside.append(out.shape[1]))
    getattr(encoder, method)(torch.randn(2, 3, 32, 32))
    assert inside == [17, 17, 17, computed]


@pytest.mark.parametrize("attention", [None, "row", "full", "mean"])
@pytest.mark.parametrize("kept", [None, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_class_token_of_tokens_equals_forward(dtype, tolerance, kept, attention):
    encoder = create_vit("vit_nano", 32, 8).to(dtype)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    keep = None if kept is None else torch.rand(2, 16).argsort(1) < kept
    with torch.no_grad():
        features, attentions = encoder(images, attention, keep)
        tokens, same_attentions = encoder.tokens(images, attention, keep)
        alone, _ = encoder.tokens(images, attention, keep, class_only=True)
    assert tokens.shape == (2, 1 + (kept or 16), 96) and alone.shape == (2, 1, 96)
    for class_token in (tokens[:, 0], alone[:, 0]):
        assert (class_token - features).abs().max() <= tolerance * features.abs().max()
    assert len(same_attentions) == len(attentions) == (4 if attention else 0)
    for same, expected in zip(same_attentions, attentions):
        assert torch.equal(same, expected)


def test_tokens_are_normalised_outputs_of_last_block():
    encoder, outputs = create_vit("vit_nano", 32, 8), []
    torch.nn.init.normal_(encoder.norm.bias)  # to differ from the blocks' norms
    encoder.blocks[-1].register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    tokens = encoder.tokens(torch.randn(2, 3, 32, 32))[0]
    assert torch.equal(tokens, encoder.norm(outputs[0]))


class Recorder(TorchDispatchMode):
    """Record every operation and the last two dimensions of its results."""

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


def test_features_come_from_fused_kernel():
    encoder = create_vit("vit_tiny", 64, 8)
    images = torch.randn(2, 3, 64, 64)
    for attention, square in ((None, False), ("row", False), ("full", True), ("mean", True)):
        with Recorder() as recorder, torch.no_grad():
            encoder(images, attention=attention)
        fused = [name for name in recorder.names if "scaled_dot_product" in name]
        assert len(fused) == 12
        assert not any("math" in name for name in fused)
        assert ((65, 65) in recorder.shapes) == square


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_float32_under_autocast(dtype):
    encoder, seen = create_vit("vit_nano", 32, 8), []
    encoder.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        images = torch.randn(4, 3, 32, 32)
        rows, means = (encoder(images, attention=kind)[1] for kind in ("row", "mean"))
    assert seen[0].dtype == dtype and rows[0].dtype == means[0].dtype == torch.float32
    q, k, _ = seen[0].double().unflatten(-1, (3, 3, 32)).permute(2, 0, 3, 1, 4)
    expected = (q[:, :, :1] @ k.mT / math.sqrt(32)).softmax(-1)[:, :, 0]
    assert (rows[0] - expected).abs().max() < 1e-6
    assert (means[0][:, 0, 0] - expected.mean(1)).abs().max() < 1e-6


def test_attention_weights_match_loops():
    q, k = torch.randn(2, 3, 4, 16).double(), torch.randn(2, 3, 5, 16).double()
    expected = torch.empty(2, 3, 4, 5).double()
    for b in range(2):
        for h in range(3):
            for i in range(4):
                scores = torch.stack([q[b, h, i] @ k[b, h, j] for j in range(5)]) / 4
                expected[b, h, i] = scores.exp() / scores.exp().sum()
    assert torch.allclose(attention_weights(q, k), expected, atol=1e-12)


def test_keep_equals_masking_out_other_keys(monkeypatch):
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


def test_sincos_positions_are_row_then_column_as_in_moco_v3():
    side, dim = 3, 16
    table = sincos_positions(side, dim)
    assert table.shape == (1, 10, 16)
    assert (table[0, 0] == 0).all()
    for row in range(side):
        for column in range(side):
            expected = []
            for value, wave in ((row, math.sin), (row, math.cos), (column, math.sin),
                                (column, math.cos)):
                expected += [wave(value / 10000 ** (i / 4)) for i in range(4)]
            assert torch.allclose(table[0, 1 + row * side + column], torch.tensor(expected))


def test_patches_are_in_row_major_order():
    encoder = create_vit("vit_nano", 32, 8)
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:16, 16:24] = 1  # second row, third column
    changed = (encoder.patch_embed(images) != encoder.patch_embed(images * 0)).any(-1)
    assert changed[0].nonzero().flatten().tolist() == [6]


def test_initialisation_matches_moco_v3():
    encoder = create_vit("vit_small", 64, 16)
    fixed = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert fixed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    block, dim = encoder.blocks[0], 384
    q, k, v = block.attn.qkv.weight.chunk(3)
    for weight, fan_in, fan_out in ((q, dim, dim), (k, dim, dim), (v, dim, dim),
                                    (block.attn.proj.weight, dim, dim),
                                    (block.mlp.fc1.weight, dim, 4 * dim),
                                    (block.mlp.fc2.weight, 4 * dim, dim),
                                    (encoder.patch_embed.proj.weight, 3 * 16 * 16, dim)):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.mean()) < 0.01 * bound
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
    assert 0 < encoder.cls_token.abs().max() < 1e-5
    assert encoder.norm.eps == encoder.blocks[0].norm1.eps == encoder.blocks[0].norm2.eps == 1e-6


def test_learned_positions_and_train_projection():
    encoder = create_vit("vit_nano", 32, 8, learned_positions=True, train_projection=True)
    assert all(p.requires_grad for p in encoder.parameters())
    assert not torch.equal(encoder.pos_embed, sincos_positions(4, encoder.dim))
    assert 0.01 < encoder.pos_embed.std() < 0.03


def test_published_sizes():
    for name, heads, millions in (("vit_tiny", 3, 5.5), ("vit_small", 6, 21.7),
                                  ("vit_small_moco", 12, 21.7), ("vit_base", 12, 85.8)):
        encoder = create_vit(name, 224, 16)
        assert len(encoder.blocks) == 12 and encoder.blocks[-1].attn.heads == heads
        parameters = sum(p.numel() for p in encoder.parameters())
        assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


def test_normalisation_matches_torchvision():
    published = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    assert [list(IMAGENET_MEAN), list(IMAGENET_STD)] == [published.mean, published.std]


def test_gradients_reach_all_trainable_parameters():
    encoder = create_vit("vit_nano", 32, 8)
    encoder(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_require_raises_given_error():
    require(True, "unused")
    for options, error in (({}, ValueError), ({"error": UserError}, UserError)):
        with pytest.raises(error, match="^too small$"):
            require(False, "too small", **options)
    assert not issubclass(UserError, ValueError)  # the scripts keep the traceback of the latter


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
    (lambda e: e(torch.zeros(2, 3, 32, 32), keep=torch.zeros(2, 16, dtype=torch.bool)), "0 to 0"),
    (lambda e: e.tokens(torch.zeros(2, 3, 40, 40)), "(2, 3, 40, 40)"),
    (lambda e: e.tokens(torch.zeros(2, 3, 32, 32), attention="all"), "'all'"),
])
def test_invalid_arguments_raise_value_error(call, says):
    with pytest.raises(ValueError) as error:
        call(create_vit("vit_nano", 32, 8))
    assert says in str(error.value)
