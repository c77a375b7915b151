"""The vision transformer: against torchvision's, and its attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import ViT_B_16_Weights
from torchvision.models import VisionTransformer as TorchvisionViT

from lodisc import (IMAGENET_MEAN, IMAGENET_STD, Attention, Block, UserError, VisionTransformer,
                    attention_weights, create_vit, kept_indices, require, sincos_positions)


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
        expected, features = theirs(images), ours(images)
    assert (features - expected).abs().max() <= tolerance * expected.abs().max()


def sharpen(encoder, factor=30.0):
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight[: 2 * encoder.dim] *= factor**0.5


def record_attention(encoder):
    """Return a list that gets (qkv, input of proj) of each layer, in order of the calls."""
    seen = []
    for block in encoder.blocks:
        block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append([out]))
        block.attn.proj.register_forward_hook(lambda module, args, out: seen[-1].append(args[0]))
    return seen


@pytest.mark.parametrize("dtype, sharp, tolerance", [
    (torch.float32, False, 1e-6), (torch.float32, True, 1e-4), (torch.float64, True, 1e-12)])
def test_row_is_class_tokens_row_of_matrix(dtype, sharp, tolerance):
    encoder = create_vit("vit_tiny", 64, 8).to(dtype)
    if sharp:
        sharpen(encoder)
    seen, images = record_attention(encoder), torch.randn(3, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        plain = encoder(images)
        with_rows, rows = encoder.with_attention(images, "row")
        with_matrices, matrices = encoder.with_attention(images, "matrix")
    assert torch.equal(with_rows, plain) and torch.equal(with_matrices, plain)
    assert len(rows) == len(matrices) == 12
    for row, matrix in zip(rows, matrices):
        assert row.shape == (3, 64) and matrix.shape == (3, 65, 65)
        assert row.dtype == matrix.dtype == dtype
        assert (row - matrix[:, 0, 1:]).abs().max() <= tolerance
        for tensor, stored in ((row, 3 * 65), (matrix, 3 * 65 * 65)):  # no heads
            assert tensor.untyped_storage().nbytes() == stored * tensor.element_size()
        assert torch.allclose(matrix.sum(-1), torch.ones((), dtype=dtype), atol=1e-5)
    if sharp:  # some head attends to almost one patch alone
        heads = [qkv.unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4) for qkv, _ in seen]
        assert max(attention_weights(q[:, :, :1], k).max() for q, k, _ in heads) > 0.9


def test_attention_is_mean_over_heads_of_weights_that_give_the_features():
    encoder = create_vit("vit_nano", 32, 8).double()
    seen, images = record_attention(encoder), torch.randn(2, 3, 32, 32).double()
    _, rows = encoder.with_attention(images, "row")
    _, matrices = encoder.with_attention(images, "matrix")
    assert len(rows) == len(matrices) == 4 and len(seen) == 8
    for layer, (qkv, attended) in enumerate(seen):
        q, k, v = qkv.split(96, dim=2)
        heads = []
        for head in (slice(0, 32), slice(32, 64), slice(64, 96)):
            scores = q[:, :, head] @ k[:, :, head].mT / math.sqrt(32)
            heads.append(scores.exp() / scores.exp().sum(2, keepdim=True))  # (B, 1+N, 1+N)
            expected = (heads[-1] @ v[:, :, head])[:, : attended.shape[1]]
            assert torch.allclose(attended[:, :, head], expected, atol=1e-12)
        assert (heads[0] - heads[1]).abs().max() > 1e-3
        mean = (heads[0] + heads[1] + heads[2]) / 3
        if layer < 4:
            assert torch.allclose(rows[layer], mean[:, 0, 1:], atol=1e-12)
        else:
            assert torch.allclose(matrices[layer - 4], mean, atol=1e-12)


@pytest.mark.parametrize("kind", [None, "row", "matrix"])
def test_class_only_equals_class_token_of_all(kind):
    block, x = Block(48, 3).double(), torch.randn(2, 10, 48, dtype=torch.float64)
    (whole, weights), (alone, same_weights) = block(x, kind), block(x, kind, class_only=True)
    assert alone.shape == (2, 1, 48)
    assert whole.shape == Attention(48, 3)(x.float())[0].shape == x.shape
    assert torch.allclose(alone, whole[:, :1], atol=1e-12)
    if kind is None:
        assert weights is same_weights is None
    else:
        assert weights.shape == {"row": (2, 10), "matrix": (2, 10, 10)}[kind]
        assert torch.equal(weights, same_weights)


@pytest.mark.parametrize("call, computed", [
    (lambda encoder, images: encoder(images), 1),
    (lambda encoder, images: encoder.with_attention(images, "row"), 1),
    (lambda encoder, images: encoder.with_attention(images, "matrix"), 1),
    (lambda encoder, images: encoder.encode(images, class_only=True), 1),
    (lambda encoder, images: encoder.encode(images), 17),
    (lambda encoder, images: encoder.tokens(images), 17),
])
def test_last_layer_computes_patches_only_where_they_are_returned(call, computed):
    encoder, inside = create_vit("vit_nano", 32, 8), []
    for block in encoder.blocks:
        for module in (block.attn.proj, block.mlp):
            module.register_forward_hook(lambda module, args, out: inside.append(out.shape[1]))
    call(encoder, torch.randn(2, 3, 32, 32))
    assert inside == [17] * 6 + [computed] * 2


@pytest.mark.parametrize("kind", [None, "row", "matrix"])
@pytest.mark.parametrize("kept", [None, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_encode_equals_separate_calls(dtype, tolerance, kept, kind):
    """One pass returns the features of `forward`, the patches of `tokens`, and the attention of
    `with_attention`, which takes no keep."""
    encoder = create_vit("vit_nano", 32, 8).to(dtype)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    keep = None
    if kept is not None:
        keep = torch.rand(2, 16).argsort(1)[:, :kept]
    with torch.no_grad():
        features, (token, patches) = encoder(images, keep), encoder.tokens(images, keep)
        whole = encoder.encode(images, keep, kind)
        alone = encoder.encode(images, keep, kind, class_only=True)
        if kind is not None and keep is None:
            same_features, expected_attentions = encoder.with_attention(images, kind)
            assert torch.equal(same_features, features)
        else:
            expected_attentions = whole[2]
    tokens = 1 + (kept or 16)
    assert features.shape == token.shape == (2, 96) and patches.shape == (2, tokens - 1, 96)
    assert alone[1].shape == (2, 0, 96)
    assert torch.equal(whole[0], token) and torch.equal(whole[1], patches)
    assert torch.equal(alone[0], features)
    assert (token - features).abs().max() <= tolerance * features.abs().max()
    shape = {None: None, "row": (2, tokens - 1), "matrix": (2, tokens, tokens)}[kind]
    for _, _, attentions in (whole, alone):
        assert len(attentions) == len(expected_attentions) == (4 if kind else 0)
        for attention, expected in zip(attentions, expected_attentions):
            assert attention.shape == shape and torch.equal(attention, expected)


def test_tokens_are_normalised_outputs_of_last_block():
    encoder, outputs = create_vit("vit_nano", 32, 8), []
    torch.nn.init.normal_(encoder.norm.bias)  # to differ from the blocks' norms
    encoder.blocks[-1].register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    token, patches = encoder.tokens(torch.randn(2, 3, 32, 32))
    expected = encoder.norm(outputs[0])  # (B, 1+N, D), class token first
    assert torch.equal(token, expected[:, 0]) and torch.equal(patches, expected[:, 1:])


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
    for kind, square in ((None, False), ("row", False), ("matrix", True)):
        with Recorder() as recorder, torch.no_grad():
            encoder.encode(images, kind=kind)
        fused = [name for name in recorder.names if "scaled_dot_product" in name]
        assert len(fused) == 12
        assert not any("math" in name for name in fused)
        assert ((65, 65) in recorder.shapes) == square


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_float32_under_autocast(dtype):
    """Only q and k are rounded: the weights are those of float64 from the q and k that were seen,
    and the same outside of autocast."""
    encoder, images = create_vit("vit_nano", 32, 8), torch.randn(4, 3, 32, 32)
    seen = record_attention(encoder)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        _, rows = encoder.with_attention(images, "row")
        _, matrices = encoder.with_attention(images, "matrix")
    for layer in range(4):
        qkv = seen[layer][0]
        assert torch.equal(qkv, seen[4 + layer][0])
        assert qkv.dtype == dtype and rows[layer].dtype == matrices[layer].dtype == torch.float32
        q, k, _ = qkv.unflatten(-1, (3, 3, 32)).permute(2, 0, 3, 1, 4)
        expected = (q.double() @ k.double().mT / math.sqrt(32)).softmax(-1).mean(1)
        assert (rows[layer] - expected[:, 0, 1:]).abs().max() < 1e-6
        assert (matrices[layer] - expected).abs().max() < 1e-6
        outside = attention_weights(q[:, :, :1], k)
        with torch.autocast("cpu", dtype):
            assert torch.equal(attention_weights(q[:, :, :1], k), outside)
        assert torch.equal(rows[layer], outside.mean(1)[:, 0, 1:])


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
    mask = torch.rand(5, 36).argsort(1) < 11
    keep = mask.nonzero()[:, 1].reshape(5, 11)
    with torch.no_grad():
        features, _, rows = encoder.encode(images, keep, "row", class_only=True)
        of_mask = encoder(images, kept_indices(mask, 11))
        allowed = torch.cat([torch.ones(5, 1, dtype=torch.bool), mask], 1)[:, None, None]
        fused = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention",
                            lambda q, k, v: fused(q, k, v, attn_mask=allowed))
        expected = encoder(images)
    assert rows[0].shape == (5, 11)
    assert torch.allclose(features, expected, atol=1e-12)
    assert torch.equal(features, of_mask)
    assert not torch.allclose(features, expected[[1, 2, 3, 4, 0]], atol=1e-3)


def test_sincos_positions_are_row_then_column_as_in_moco_v3():
    side, dim = 3, 16
    table = sincos_positions(side, dim)
    assert table.shape == (1, 10, 16) and table.dtype == torch.float32
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
    encoder(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_require_raises_given_error():
    require(True, "unused")
    for options, error in (({}, ValueError), ({"error": UserError}, UserError)):
        with pytest.raises(error, match="^too small$"):
            require(False, "too small", **options)
    assert not issubclass(UserError, ValueError)  # the scripts keep the traceback of the latter


@pytest.mark.parametrize("call, says", [
    (lambda: create_vit("vit_nano", 50, 8), "50 px and patches of 8 px"),
    (lambda: create_vit("vit_nano", 32, 0), "multiple of the patch"),
    (lambda: create_vit("vit_nano", 0, 8), "got 0 px"),
    (lambda: VisionTransformer(32, 8, dim=50, depth=1, heads=3), "50 does not divide into 3 heads"),
    (lambda: VisionTransformer(32, 8, dim=6, depth=1, heads=3), "divisible by 4, got 6"),
])
def test_invalid_sizes_raise_value_error(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)


def test_names_and_options_of_encoders():
    with pytest.raises(KeyError, match="vit_huge"):
        create_vit("vit_huge", 32, 8)
    with pytest.raises(TypeError, match="positional"):  # by keyword alone
        VisionTransformer(32, 8, 96, 4, 3, True)


@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (2, 1, 32, 32)])
def test_images_that_do_not_fit_raise(shape):
    encoder = create_vit("vit_nano", 32, 8)
    for call in (encoder, encoder.tokens):
        with pytest.raises(RuntimeError):
            call(torch.zeros(shape))
