"""Pivotal regions: three ways from stored attention to importance."""

import math

import pytest
import torch

from lodisc import (attention_product, attention_rollout, attention_weights, create_vit, kept_count,
                    last_attention, location_mask)


def random_attention(layers, batch, heads, tokens, dtype=torch.float64):
    return [(3 * torch.randn(batch, heads, tokens, tokens, dtype=dtype)).softmax(-1)
            for _ in range(layers)]


def test_product_against_loops():
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


def test_rollout_against_the_matrix_product():
    matrices = random_attention(4, 2, 3, 10)
    for b in range(2):
        product = torch.eye(10, dtype=torch.float64)
        for matrix in matrices:
            product = (0.5 * matrix[b].mean(0) + 0.5 * torch.eye(10)) @ product
        assert torch.allclose(attention_rollout(matrices)[b], product[0, 1:], atol=1e-12)


def test_last_layer_alone():
    matrices = random_attention(3, 2, 4, 6)
    expected = matrices[2][:, :, 0, 1:].mean(1)
    assert torch.allclose(last_attention(matrices), expected, atol=1e-12)
    assert torch.equal(last_attention([m[:, :, 0] for m in matrices]), last_attention(matrices))


def test_an_encoder_gives_what_each_importance_needs():
    encoder = create_vit("vit_nano", 32, 8)
    images = torch.randn(2, 3, 32, 32)
    rows, matrices = encoder(images, attention="row")[1], encoder(images, attention="full")[1]
    assert torch.allclose(attention_product(rows), attention_product(matrices), atol=1e-5)
    assert attention_rollout(matrices).shape == last_attention(rows).shape == (2, 16)


def product_in_float64(pairs):
    """Log importance from the same q and k, in float64 and as log-softmax throughout."""
    total = 0
    for q, k in pairs:
        q, k = q.double(), k.double()
        logits = q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1])
        heads = logits.log_softmax(-1)[:, :, 0, 1:]
        total = total + heads.logsumexp(1) - math.log(heads.shape[1])
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1, 20, 80])
def test_same_order_as_float64_under_autocast(dtype, spread):
    """24 layers whose logits spread up to 80, q and k in half precision as autocast makes them."""
    pairs = []
    for _ in range(24):
        q = torch.randn(2, 2, 1, 64)
        k = torch.randn(2, 2, 197, 64)
        logits = q @ k.mT / 8
        scale = spread / (logits.amax(-1) - logits.amin(-1)).max()
        pairs.append(((q * scale.sqrt()).to(dtype), (k * scale.sqrt()).to(dtype)))
    with torch.autocast("cpu", dtype):
        importance = attention_product([attention_weights(q, k)[:, :, 0] for q, k in pairs])
    expected = product_in_float64(pairs)
    assert importance.isfinite().all()
    # every pair that float64 tells apart by more than 1e-3 stands in the same order
    apart = expected[:, :, None] - expected[:, None, :] > 1e-3
    assert apart.float().mean() > 0.45
    assert (importance[:, :, None] > importance[:, None, :])[apart].all()


def test_product_does_not_lose_digits_over_many_layers():
    """Plain float32 sums of 96 terms near -80 err by more than 1e-3; the compensated one does not."""
    rows = torch.exp(-80 - torch.rand(96, 1, 1, 50)).float()
    expected = rows[:, :, :, 1:].double().log().sum(0)[:, 0]
    assert (attention_product(list(rows)) - expected).abs().max() < 1e-3
    plain = rows[0, :, 0].log()
    for row in rows[1:]:
        plain = plain + row[:, 0].log()
    assert (plain[:, 1:] - expected).abs().max() > 1e-3


def test_weights_that_underflow_stay_finite_and_tie_by_index():
    row = torch.zeros(1, 2, 9)
    row[:, :, 4] = 1.0
    importance = attention_product([row] * 24)
    assert importance.isfinite().all()
    assert location_mask(importance, 0.4)[0].nonzero().flatten().tolist() == [0, 1, 3]


def test_a_picture_of_one_patch_has_an_importance():
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
    (lambda: attention_rollout([torch.ones(2, 3, 5)]), "attention='full'"),
    (lambda: attention_rollout([torch.ones(2, 3, 5, 5), torch.ones(2, 3, 5)]), "(2, 3, 5)"),
    (lambda: kept_count(10, 0), "got 0"),
])
def test_what_cannot_be_right_is_rejected(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
