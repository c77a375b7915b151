"""Pivotal regions: three ways from attention to importance, in one pass of the encoder."""

import math

import pytest
import torch
from torch import nn

import lodisc
from lodisc import (IMPORTANCES, Attention, Importance, attention_product, attention_rollout,
                    create_vit, last_attention, location_mask, patch_importance)


def random_attention(layers, batch, tokens, dtype=torch.float64):
    """Return matrices (B, T, T) whose rows sum to 1, one per layer."""
    return [(3 * torch.randn(batch, tokens, tokens, dtype=dtype)).softmax(-1)
            for _ in range(layers)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_product_matches_loops(dtype, tolerance):
    rows = [matrix[:, 0, 1:] for matrix in random_attention(5, 2, 10, dtype)]
    expected = torch.ones(2, 9, dtype=torch.float64)
    for row in rows:
        for b in range(2):
            for i in range(9):
                expected[b, i] *= row[b, i]
    result = attention_product(rows)
    assert result.dtype == dtype
    assert torch.allclose(result.double(), expected.log(), atol=tolerance)


def test_rollout_matches_matrix_product():
    matrices = random_attention(4, 2, 10)
    for b in range(2):
        product = torch.eye(10, dtype=torch.float64)
        for matrix in matrices:
            product = (0.5 * matrix[b] + 0.5 * torch.eye(10)) @ product
        assert torch.allclose(attention_rollout(matrices)[b], product[0, 1:], atol=1e-12)


def test_rollout_is_float32_under_autocast():
    matrices = random_attention(12, 2, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = attention_rollout(matrices)
    assert result.dtype == torch.float32
    assert torch.allclose(result, attention_rollout(matrices), rtol=1e-5)


def test_last_attention_uses_last_layer_only():
    rows = [matrix[:, 0, 1:] for matrix in random_attention(3, 2, 6)]
    assert torch.equal(last_attention(rows), rows[2])


def test_importances_of_registry_match_full_attention():
    kinds = {name: importance.attention_kind for name, importance in IMPORTANCES.items()}
    assert kinds == {"product": "row", "rollout": "matrix", "last": "row"}
    assert not any(importance.needs_patches for importance in IMPORTANCES.values())
    encoder = create_vit("vit_nano", 32, 8)
    images = torch.randn(2, 3, 32, 32)
    features, matrices = encoder.with_attention(images, "matrix")
    product, rolled_out = torch.ones(2, 17), torch.eye(17)
    for matrix in matrices:
        product = product * matrix[:, 0]
        rolled_out = (matrix + torch.eye(17)) / 2 @ rolled_out
    expected = {"product": product.log(), "rollout": rolled_out[:, 0], "last": matrices[-1][:, 0]}
    for name in IMPORTANCES:
        same_features, importance = patch_importance(encoder, images, name)
        assert torch.equal(same_features, features)
        assert importance.shape == (2, 16) and importance.dtype == torch.float32
        assert torch.allclose(importance, expected[name][:, 1:], atol=1e-5)


def record_passes(encoder):
    """Return a list that gets the number of tokens in each layer's MLP."""
    tokens = []
    for block in encoder.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: tokens.append(out.shape[1]))
    return tokens


@pytest.mark.parametrize("kind, shape", [("row", (2, 16)), ("matrix", (2, 17, 17))])
@pytest.mark.parametrize("needs_patches", [False, True])
def test_own_importance_gets_attention_and_patches_of_one_pass(monkeypatch, kind, shape,
                                                               needs_patches):
    calls = []

    def own_importance(attentions, patches=None):
        calls.append((attentions, patches))
        return torch.arange(32.0).view(2, 16)

    entry = Importance(own_importance, kind, needs_patches)
    monkeypatch.setitem(lodisc.IMPORTANCES, "own", entry)
    encoder, images = create_vit("vit_nano", 32, 8), torch.randn(2, 3, 32, 32)
    tokens = record_passes(encoder)
    features, importance = patch_importance(encoder, images, "own")
    assert tokens == [17, 17, 17, 17 if needs_patches else 1]  # one pass
    assert torch.equal(importance, torch.arange(32.0).view(2, 16))
    assert torch.allclose(features, encoder(images), atol=1e-5)
    (attentions, patches), = calls
    expected_attentions = encoder.with_attention(images, kind)[1]
    assert len(attentions) == 4 and attentions[0].shape == shape
    for attention, expected in zip(attentions, expected_attentions):
        assert torch.equal(attention, expected)
    if needs_patches:
        assert patches.shape == (2, 16, 96)
        assert torch.equal(patches, encoder.tokens(images)[1])
    else:
        assert patches is None
    assert not Importance(own_importance, kind).needs_patches  # unless it says so


def product_in_float64(layers):
    """Compute log importance from q and k (B, h, 1+N, d) in float64, as log-softmax throughout."""
    total = 0
    for q, k in layers:
        q, k = q.double(), k.double()
        logits = q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1])
        heads = logits.log_softmax(-1)[:, :, 0, 1:]
        total = total + heads.logsumexp(1) - math.log(heads.shape[1])
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1, 20, 80])
@pytest.mark.parametrize("layers", [12, 24])
def test_product_under_autocast_orders_patches_as_in_float64(layers, dtype, spread):
    """Use logits with a range of up to 80, and q and k in half precision, as under autocast."""
    attention, pairs, rows = Attention(128, heads=2), [], []
    attention.qkv = nn.Identity()
    for _ in range(layers):
        q = torch.randn(2, 2, 197, 64)
        k = torch.randn(2, 2, 197, 64)
        logits = q[:, :, :1] @ k.mT / 8
        scale = spread / (logits.amax(-1) - logits.amin(-1)).max()
        q, k = (q * scale.sqrt()).to(dtype), (k * scale.sqrt()).to(dtype)
        qkv = torch.stack([q, k, k]).permute(1, 3, 0, 2, 4).flatten(2)  # (B, 1+N, 3 h d)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            _, row = attention(qkv, "row", class_only=True)
        rows.append(row[:, 1:])
        pairs.append((q, k))
    with torch.autocast("cpu", dtype):
        importance = attention_product(rows)
    expected = product_in_float64(pairs)
    assert importance.dtype == torch.float32 and importance.isfinite().all()
    # every pair of patches whose float64 importances differ by more than 1e-3 is in that order
    apart = expected[:, :, None] - expected[:, None, :] > 1e-3
    assert apart.float().mean() > 0.45
    assert (importance[:, :, None] > importance[:, None, :])[apart].all()


def test_product_of_zero_weights_is_finite_and_ties_by_index():
    row = torch.zeros(1, 8)
    row[:, 3] = 1.0
    importance = attention_product([row] * 24)
    assert importance.isfinite().all()
    assert location_mask(importance, 0.4)[0].nonzero().flatten().tolist() == [0, 1, 3]


def test_product_counts_weights_below_the_smallest_normal_as_that():
    tiny = torch.finfo(torch.float32).tiny
    row = torch.tensor([[0.0, tiny / 8, tiny, 2 * tiny, 1.0]])
    expected = 2 * torch.tensor([[tiny, tiny, tiny, 2 * tiny, 1.0]], dtype=torch.float64).log()
    assert torch.allclose(attention_product([row, row]).double(), expected, atol=1e-4)


def test_product_of_a_single_patch():
    assert torch.equal(attention_product([torch.full((2, 1), 0.5)] * 2),
                       torch.full((2, 1), 0.25).log())
