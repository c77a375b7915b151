"""Pivotal regions: three ways from stored attention to importance."""

import math

import pytest
import torch

from lodisc import (IMPORTANCES, attention_product, attention_rollout, attention_weights,
                    create_vit, kept_count, last_attention, location_mask)


def random_attention(layers, batch, heads, tokens, dtype=torch.float64):
    return [(3 * torch.randn(batch, heads, tokens, tokens, dtype=dtype)).softmax(-1)
            for _ in range(layers)]


def test_product_matches_loops():
    matrices = random_attention(5, 2, 3, 10)
    expected = torch.ones(2, 9, dtype=torch.float64)
    for matrix in matrices:
        for b in range(2):
            for i in range(9):
                expected[b, i] *= sum(matrix[b, h, 0, 1 + i] for h in range(3)) / 3
    result = attention_product(matrices)
    assert result.dtype == torch.float32
    assert torch.allclose(result, expected.log().float(), atol=1e-5)
    assert torch.equal(attention_product([m[:, :, 0] for m in matrices]), result)


def test_rollout_matches_matrix_product():
    matrices = random_attention(4, 2, 3, 10)
    for b in range(2):
        product = torch.eye(10, dtype=torch.float64)
        for matrix in matrices:
            product = (0.5 * matrix[b].mean(0) + 0.5 * torch.eye(10)) @ product
        assert torch.allclose(attention_rollout(matrices)[b], product[0, 1:], atol=1e-12)
    means = [matrix.mean(1, keepdim=True) for matrix in matrices]
    assert torch.allclose(attention_rollout(means), attention_rollout(matrices), atol=1e-12)


def test_rollout_is_float32_under_autocast():
    matrices = random_attention(12, 2, 3, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = attention_rollout(matrices)
    assert torch.allclose(result, attention_rollout(matrices), rtol=1e-5)


def test_last_attention_uses_last_layer_only():
    matrices = random_attention(3, 2, 4, 6)
    expected = matrices[2][:, :, 0, 1:].mean(1)
    assert torch.allclose(last_attention(matrices), expected, atol=1e-12)
    assert torch.equal(last_attention([m[:, :, 0] for m in matrices]), last_attention(matrices))


def test_importances_of_registry_match_full_attention():
    assert {name: kind for name, (_, kind) in IMPORTANCES.items()} == \
        {"product": "row", "rollout": "mean", "last": "row"}
    encoder = create_vit("vit_nano", 32, 8)
    images = torch.randn(2, 3, 32, 32)
    matrices = encoder(images, attention="full")[1]
    for function, kind in IMPORTANCES.values():
        importance = function(encoder(images, attention=kind)[1])
        assert importance.shape == (2, 16) and importance.dtype == torch.float32
        assert torch.allclose(importance, function(matrices), atol=1e-5)


def product_in_float64(pairs):
    """Compute log importance from q and k in float64, as log-softmax throughout."""
    total = 0
    for q, k in pairs:
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
    pairs = []
    for _ in range(layers):
        q = torch.randn(2, 2, 1, 64)
        k = torch.randn(2, 2, 197, 64)
        logits = q @ k.mT / 8
        scale = spread / (logits.amax(-1) - logits.amin(-1)).max()
        pairs.append(((q * scale.sqrt()).to(dtype), (k * scale.sqrt()).to(dtype)))
    with torch.autocast("cpu", dtype):
        importance = attention_product([attention_weights(q, k)[:, :, 0] for q, k in pairs])
    expected = product_in_float64(pairs)
    assert importance.isfinite().all()
    # every pair of patches whose float64 importances differ by more than 1e-3 is in that order
    apart = expected[:, :, None] - expected[:, None, :] > 1e-3
    assert apart.float().mean() > 0.45
    assert (importance[:, :, None] > importance[:, None, :])[apart].all()


def test_product_of_zero_weights_is_finite_and_ties_by_index():
    row = torch.zeros(1, 2, 9)
    row[:, :, 4] = 1.0
    importance = attention_product([row] * 24)
    assert importance.isfinite().all()
    assert location_mask(importance, 0.4)[0].nonzero().flatten().tolist() == [0, 1, 3]


def test_product_of_a_single_patch():
    assert torch.equal(attention_product([torch.full((2, 3, 2), 0.5)] * 2),
                       torch.full((2, 1), 0.25).log())


@pytest.mark.parametrize("call, says", [
    (lambda: attention_product([]), "attention='row'"),
    (lambda: attention_product([torch.ones(2, 5)]), "(2, 5)"),
    (lambda: last_attention([torch.ones(2, 2, 1)]), "(2, 2, 1)"),
    (lambda: last_attention([]), "list"),
    (lambda: attention_rollout([]), "list"),
    (lambda: attention_product(torch.ones(2, 2, 5, 5)), "list"),
    (lambda: attention_product([torch.ones(2, 2, 4, 5)]), "(2, 2, 4, 5)"),
    (lambda: attention_product([torch.ones(2, 2, 5), torch.ones(1, 2, 5)]), "(1, 2, 5)"),
    (lambda: attention_rollout([torch.ones(2, 3, 5)]), "'mean' or 'full'"),
    (lambda: attention_rollout([torch.ones(2, 3, 5, 5), torch.ones(2, 3, 5)]), "(2, 3, 5)"),
    (lambda: kept_count(10, 0), "got 0"),
    (lambda: kept_count(10, 1.01), "got 1.01"),
])
def test_invalid_arguments_raise_value_error(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
