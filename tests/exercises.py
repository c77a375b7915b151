"""Graders of the assignment, in the order of the exercises. Each message is a hint."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lodisc

EXPECTED = torch.load(Path(__file__).with_name("expected.pt"), weights_only=True)


def close(result, expected, hint, tolerance=1e-5):
    assert torch.is_tensor(result), f"expected a tensor, got {type(result).__name__}"
    assert result.shape == expected.shape, \
        f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}: {hint}"
    assert bool(((result - expected).abs() <= tolerance * (1 + expected.abs())).all()), hint


def raises(hint, function, *arguments):
    try:
        function(*arguments)
    except ValueError:
        return
    pytest.fail(f"ValueError expected: {hint}")


# --- attention ----------------------------------------------------------------------------------


def weights_and_expected():
    known = EXPECTED["attention"]
    return lodisc.attention_weights(known["q"], known["k"]), known["of q and k"]


def attention_layer():
    known, layer = EXPECTED["attention"], lodisc.Attention(12, 3)
    layer.load_state_dict(known["weights"])
    return layer.eval(), known


def test_attention_sums_to_one_over_keys():
    weights, expected = weights_and_expected()
    assert weights.shape == expected.shape, f"expected the shape {tuple(expected.shape)}"
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 4)), \
        "the weights of each query sum to 1 over the keys: along which axis is the softmax?"


def test_attention_is_scaled():
    weights, expected = weights_and_expected()
    close(weights, expected, "the weights sum to 1 but are wrong: which power of d scales q k^T?")


def test_attention_is_float32_under_autocast():
    q, k = (EXPECTED["attention"][name].bfloat16() for name in "qk")  # what autocast passes
    expected = lodisc.attention_weights(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        weights = lodisc.attention_weights(q, k)
    assert weights.dtype == torch.float32, "the product over layers needs float32 weights"
    close(weights, expected, "the result is float32, but a step before it is in half precision")


@torch.no_grad()
def test_attention_features():
    layer, known = attention_layer()
    for kind in (None, "row", "full", "mean"):
        close(layer(known["x"], kind)[0], known["features"],
              "the features must not depend on which weights are returned")
        close(layer(known["x"], kind, class_only=True)[0], known["features"][:, :1],
              "class_only: return the feature of the class token only")


@torch.no_grad()
def test_attention_returns_requested_weights():
    layer, known = attention_layer()
    assert layer(known["x"])[1] is None, "attention=None: no weights are computed or returned"
    close(layer(known["x"], "full")[1], known["full"], "not the weights used for the features")
    for class_only in (False, True):
        close(layer(known["x"], "row", class_only)[1], known["row"],
              "the row has the class token (the first token) as the query and all tokens as keys")
        close(layer(known["x"], "full", class_only)[1], known["full"],
              "class_only changes the features, not the returned weights")
        close(layer(known["x"], "mean", class_only)[1], known["full"].mean(1, keepdim=True),
              '"mean" is "full" averaged over the heads, whose axis is kept with size 1')


# --- positions ----------------------------------------------------------------------------------


def test_positions_of_the_class_token_are_zero():
    positions = lodisc.sincos_positions(3, 8)
    assert positions.shape == (1, 10, 8), f"expected (1, 10, 8), got {tuple(positions.shape)}"
    assert positions[0, 0].abs().sum() == 0, "the class token is the first token; its row is zero"


def test_positions_encode_row_then_column():
    first, right, below = lodisc.sincos_positions(3, 8)[0, [1, 2, 4]]
    assert torch.equal(first[:4], right[:4]) and not torch.equal(first[4:], right[4:]), \
        "the next patch to the right has the same row: only the second half of the channels differs"
    assert torch.equal(first[4:], below[4:]) and not torch.equal(first[:4], below[:4]), \
        "the patch below has the same column: only the first half of the channels differs"


def test_positions_have_the_right_frequencies():
    close(lodisc.sincos_positions(3, 8), EXPECTED["positions"],
          "check the frequencies, and which quarter of the channels is sine and which cosine")


def test_positions_need_a_width_divisible_by_four():
    raises("a width of 6 does not divide into four parts", lodisc.sincos_positions, 3, 6)


# --- product ------------------------------------------------------------------------------------


def test_product_has_one_value_per_patch():
    assert lodisc.attention_product(EXPECTED["product"]["rows"]).shape == (2, 9), \
        "the class token's attention to itself is left out"


def test_product_accepts_rows_and_matrices():
    known = EXPECTED["product"]
    close(lodisc.attention_product(known["rows"]), known["of rows"],
          "average over heads, multiply over layers, and return the logarithm")
    close(lodisc.attention_product(known["matrices"]), known["of matrices"],
          "a matrix has queries as rows: the class token's row is its attention to the patches")


def test_product_does_not_underflow():
    raises("an empty list has no layers", lodisc.attention_product, [])
    row = torch.tensor([[[0.5, 1e-6, 2e-6, 0.0]]])
    importance = lodisc.attention_product([row] * 24)
    assert bool(importance.isfinite().all()), \
        "the product of 24 small weights underflows in float32, and the logarithm of 0 is infinite"
    assert importance[0, 1] > importance[0, 0] > importance[0, 2], "24 layers: the order is lost"


# --- rollout ------------------------------------------------------------------------------------


def test_rollout_of_identity_is_zero():
    alone = torch.eye(5).expand(2, 3, 5, 5)
    assert lodisc.attention_rollout([alone] * 3).abs().sum() == 0, \
        "if every token attends to itself only, no patch reaches the class token"


def test_rollout_of_one_layer():
    attention = torch.full((1, 1, 5, 5), 0.2)
    close(lodisc.attention_rollout([attention]), torch.full((1, 4), 0.1),
          "half of each layer is the identity, for the residual connection")


def test_rollout_averages_heads_and_orders_layers():
    known = EXPECTED["rollout"]
    raises("rollout needs matrices", lodisc.attention_rollout, EXPECTED["product"]["rows"])
    close(lodisc.attention_rollout(known["matrices"]), known["result"],
          "average the heads; matrices do not commute: the last layer is the leftmost factor")


# --- mask ---------------------------------------------------------------------------------------


def test_mask_keeps_exactly_k():
    for n, ratio, kept in ((10, 0.3, 3), (100, 0.29, 29), (196, 0.3, 58), (10, 0.05, 1),
                           (7, 1.0, 7), (9, 0.5, 4)):
        mask = lodisc.location_mask(torch.randn(3, n), ratio)
        assert mask.dtype == torch.bool and mask.shape == (3, n)
        assert mask.sum(1).tolist() == [kept] * 3, \
            f"keep ratio {ratio} of {n} patches keeps {kept}: rounded down, at least one"


def test_mask_keeps_the_most_important():
    mask = lodisc.location_mask(torch.tensor([[0.1, 5.0, -2.0, 3.0], [9.0, 1.0, 8.0, 0.0]]), 0.5)
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False]], \
        "True marks the kept patches, the most important of each image"


def test_mask_breaks_ties_by_lower_index():
    mask = lodisc.location_mask(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0] * 20]), 0.4)
    assert mask.sum() == 40, "equal importances must not make the mask larger or smaller"
    assert mask[0].nonzero().flatten().tolist() == [
        place for place in range(100) if place % 5 in (1, 2, 3)][:40], \
        "ties go to the lower index on every device: which sort guarantees that?"


def test_mask_raises_for_nan():
    raises("NaN has no order", lodisc.location_mask, torch.tensor([[1.0, float("nan")]]), 0.5)


# --- momentum update ----------------------------------------------------------------------------


def two_modules():
    online, momentum = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for module, value in ((online, 1.0), (momentum, 5.0)):
        for tensor in module.state_dict().values():
            tensor.fill_(value)
    return online, momentum


def test_update_is_a_moving_average_in_place():
    online, momentum = two_modules()
    place = momentum.weight.data_ptr()
    lodisc.momentum_update(online, momentum, 0.75)
    assert (online.weight == 1).all(), "the online module must not change"
    assert momentum.weight.data_ptr() == place, "update in place, in the same tensors"
    assert (momentum.weight != 5).any(), "the momentum parameters did not change"
    assert torch.allclose(momentum.weight, torch.tensor(4.0)), \
        "m is the weight of the old momentum parameters, 1 - m that of the online ones"


def test_update_leaves_running_statistics():
    online, momentum = two_modules()
    lodisc.momentum_update(online, momentum, 0.75)
    assert (momentum.running_mean == 5).all(), "BatchNorm's running statistics are not averaged"


def test_update_keeps_equal_weights_equal():
    online, momentum = nn.Linear(30, 30), nn.Linear(30, 30)
    momentum.load_state_dict(online.state_dict())
    lodisc.momentum_update(online, momentum, 0.99)
    assert torch.equal(online.weight, momentum.weight), \
        "equal weights must stay equal to the last bit: which torch operation guarantees that?"
    raises("shapes differ", lodisc.momentum_update, nn.Linear(3, 4), nn.Linear(4, 3), 0.99)


def test_update_with_m_of_zero_and_one():
    for m, value in ((1.0, 5.0), (0.0, 1.0)):
        online, momentum = two_modules()
        lodisc.momentum_update(online, momentum, m)
        assert (momentum.weight == value).all(), f"m = {m} must give {value}"
    for m in (-0.1, 1.1):
        raises(f"m = {m} is outside [0, 1]", lodisc.momentum_update, *two_modules(), m)


# --- schedule -----------------------------------------------------------------------------------


def test_schedule_starts_at_base_and_ends_at_one():
    assert lodisc.momentum_schedule(0, 8, 0.9) == pytest.approx(0.9), "step 0 gives the base"
    assert lodisc.momentum_schedule(8, 8, 0.9) == pytest.approx(1.0), "the last step gives 1"
    for arguments in ((9, 8, 0.9), (-1, 8, 0.9), (0, 0, 0.9), (0, 8, 1.1)):
        raises(f"step, total, base = {arguments}", lodisc.momentum_schedule, *arguments)


def test_schedule_is_half_a_cosine_period():
    values = [lodisc.momentum_schedule(step, 8, 0.9) for step in range(9)]
    assert values == sorted(values), "the momentum never decreases"
    assert values == pytest.approx(EXPECTED["schedule"], abs=1e-9), "half a cosine period"


# --- loss ---------------------------------------------------------------------------------------


def test_loss_of_equal_features_is_chance_level():
    loss = lodisc.contrastive_loss(torch.ones(4, 8), torch.ones(6, 8), 0.5)
    assert loss.item() == pytest.approx(2 * 0.5 * torch.tensor(6.0).log().item(), abs=1e-5), \
        "equal features: each of 6 keys has probability 1 / 6; MoCo v3 scales by 2 * temperature"


def test_loss_is_scale_invariant():
    queries, keys = EXPECTED["loss"]["queries"], EXPECTED["loss"]["keys"]
    one, other = (lodisc.contrastive_loss(scale * queries, keys / scale, 0.2).item()
                  for scale in (1, 7))
    assert one == pytest.approx(other, abs=1e-5), "features are normalised first"


def test_loss_has_no_gradient_for_keys():
    queries = EXPECTED["loss"]["queries"].clone().requires_grad_()
    keys = EXPECTED["loss"]["keys"].clone().requires_grad_()
    lodisc.contrastive_loss(queries, keys, 0.2).backward()
    assert queries.grad is not None and queries.grad.abs().sum() > 0, "the queries need a gradient"
    assert keys.grad is None or keys.grad.abs().sum() == 0, "the keys must get no gradient"


def test_loss_is_float32_under_autocast():
    queries, keys = EXPECTED["loss"]["queries"], EXPECTED["loss"]["keys"]
    expected = lodisc.contrastive_loss(queries, keys, 0.2).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = lodisc.contrastive_loss(queries, keys, 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5), \
        "some step is computed in half precision"


def test_loss_raises_for_invalid_arguments():
    for queries, keys, temperature, offset in (((4, 8), (4, 7), 0.2, 0), ((4, 8), (3, 8), 0.2, 0),
                                               ((4, 8), (6, 8), 0.2, 3), ((4, 8), (4, 8), 0, 0)):
        raises("check the shapes, the offset and the temperature", lodisc.contrastive_loss,
               torch.ones(queries), torch.ones(keys), temperature, offset)


def test_loss_matches_reference():
    known = EXPECTED["loss"]
    for (temperature, offset), expected in zip(((0.2, 0), (0.5, 0), (0.2, 2)), known["result"],
                                               strict=True):
        loss = lodisc.contrastive_loss(known["queries"], known["keys"], temperature, offset)
        assert loss.item() == pytest.approx(expected, rel=1e-4), (
            "the positive key of query i is key offset + i" if offset
            else f"temperature {temperature}: it divides the similarities once and multiplies the "
            "loss once; the softmax of each query is over all keys")


# --- branches -----------------------------------------------------------------------------------


def model_and_expected(method="lodisc"):
    known = EXPECTED["branches"]
    model = lodisc.LoDisc(lodisc.VisionTransformer(32, 8, 24, 2, 3), method, hidden_dim=32,
                          output_dim=16)
    model.load_state_dict(known["weights"])
    return model, known["views"], known["results"][method]


def test_branches_sum_to_the_total():
    for method in ("lodisc", "global", "local"):
        model, views, _ = model_and_expected(method)
        out = model(*views)
        assert out.total.item() == pytest.approx((out.global_loss + out.local_loss).item()), \
            "the total is the sum of both losses"
        assert (out.global_loss == 0) == (method == "local"), f"method {method}: global loss"
        assert (out.local_loss == 0) == (method == "global"), f"method {method}: local loss"
        assert (out.masks is None) == (method == "global")


def test_branches_contrast_with_the_other_view():
    for method in ("lodisc", "global", "local"):
        model, views, expected = model_and_expected(method)
        for name, loss, known in zip(("total", "global", "local"), model(*views), expected):
            assert loss.item() == pytest.approx(known, rel=1e-4), (
                f"method {method}, {name} loss: check which view the key comes from, which branch "
                "it comes from, and that both directions are summed")


def test_branches_return_masks():
    model, views, _ = model_and_expected()
    for mask, expected in zip(model(*views).masks, EXPECTED["branches"]["masks"], strict=True):
        assert torch.equal(mask, expected), "masks: first view 1, then view 2"
    model.mask = "random"
    draws = [model(*views, torch.Generator().manual_seed(3)).masks for _ in range(2)]
    assert all(map(torch.equal, *draws)), "random masks must come from the generator argument"


def test_branches_record_no_momentum_gradient():
    model, views, _ = model_and_expected()
    recorded = []
    model.momentum_encoder.register_forward_hook(
        lambda *_: recorded.append(torch.is_grad_enabled()))
    model(*views).total.backward()
    assert len(recorded) == 4, "four passes: each view whole, and its pivotal patches alone"
    assert not any(recorded), "the momentum side needs no gradient"
    assert all(p.grad is not None for p in model.predictor.parameters()), \
        "the online side needs a gradient"


def test_branches_leave_the_momentum_side_unchanged():
    model, views, _ = model_and_expected()
    before = [p.clone() for p in model.momentum_encoder.parameters()]
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1e-3)
    model(*views)
    assert all(map(torch.equal, before, model.momentum_encoder.parameters())), \
        "the training loop calls update_momentum; forward must not"


def test_branches_raise_for_invalid_views():
    model, (view1, view2), _ = model_and_expected()
    raises("a batch of one image has no negatives", model, view1[:1], view2[:1])
    raises("the views differ in shape", model, view1, view2[:3])
