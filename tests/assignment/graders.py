"""Graders of the assignment, in the order of the exercises. Each message is a hint."""

import math
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
    except Exception as error:
        pytest.fail(f"ValueError expected, not {type(error).__name__}: {hint}")
    pytest.fail(f"ValueError expected: {hint}")


# --- attention ----------------------------------------------------------------------------------


def weights_and_expected():
    reference = EXPECTED["attention"]
    return lodisc.attention_weights(reference["q"], reference["k"]), reference["of q and k"]


def attention_layer():
    reference, layer = EXPECTED["attention"], lodisc.Attention(12, 3)
    layer.load_state_dict(reference["weights"])
    return layer.eval(), reference


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
    layer, reference = attention_layer()
    for kind in (None, "row", "matrix"):
        close(layer(reference["x"], kind)[0], reference["features"],
              "check how qkv(x) is cut and the heads are joined; the features must not depend on "
              "which weights are returned")
        close(layer(reference["x"], kind, class_only=True)[0], reference["features"][:, :1],
              "class_only: return the feature of the class token only")


@torch.no_grad()
def test_attention_returns_requested_weights():
    layer, reference = attention_layer()
    for class_only in (False, True):
        assert layer(reference["x"], None, class_only)[1] is None, \
            "kind=None: no weights are computed or returned"
        close(layer(reference["x"], "row", class_only)[1], reference["row"],
              "the row has the class token (the first token) as the query and all tokens as keys, "
              "averaged over the heads")
        close(layer(reference["x"], "matrix", class_only)[1], reference["matrix"],
              "the matrix is that of the features, averaged over the heads; class_only changes "
              "the features, not the returned weights")


# --- positions ----------------------------------------------------------------------------------


def test_positions_of_the_class_token_are_zero():
    positions = lodisc.sincos_positions(3, 8)
    assert positions.shape == (1, 10, 8), f"expected (1, 10, 8), got {tuple(positions.shape)}"
    assert positions.dtype == torch.float32, f"expected float32, got {positions.dtype}"
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


# --- product ------------------------------------------------------------------------------------


def test_product_multiplies_layers():
    reference = EXPECTED["product"]
    close(lodisc.attention_product(reference["rows"]), reference["result"],
          "multiply the layers elementwise, and return the logarithm")


def test_product_does_not_underflow():
    row = torch.tensor([[1e-6, 2e-6, 1e-30, 0.0]])
    importance = lodisc.attention_product([row] * 24)
    assert bool(importance.isfinite().all()), \
        "the product of 24 small weights underflows in float32, and the logarithm of 0 is infinite"
    assert importance.argsort(dim=1).tolist() == [[3, 2, 0, 1]], "24 layers: the order is lost"
    close(importance[:, 3], torch.tensor([24 * math.log(torch.finfo(torch.float32).tiny)]),
          "a weight of 0 counts as float32's smallest normal number, in each layer")
    close(importance[:, 2], torch.tensor([24 * math.log(1e-30)]),
          "a weight of 1e-30 is above float32's smallest normal number and stays as it is")


# --- rollout ------------------------------------------------------------------------------------


def test_rollout_of_identity_is_zero():
    alone = torch.eye(5).expand(2, 5, 5)
    importance = lodisc.attention_rollout([alone] * 3)
    assert importance.shape == (2, 4), "one value per patch: without the class token's own entry"
    assert importance.abs().sum() == 0, \
        "if every token attends to itself only, no patch reaches the class token"


def test_rollout_of_one_layer():
    attention = torch.full((1, 5, 5), 0.2)
    close(lodisc.attention_rollout([attention]), torch.full((1, 4), 0.1),
          "half of each layer is the identity, for the residual connection")


def test_rollout_orders_layers():
    reference = EXPECTED["rollout"]
    close(lodisc.attention_rollout(reference["matrices"]), reference["result"],
          "matrices do not commute: the last layer is the leftmost factor, and the class token's "
          "row of the product has the class token as the query")


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
    for parameter in momentum.parameters():
        assert (parameter != 5).any(), "some momentum parameters did not change"
        assert torch.allclose(parameter, torch.tensor(4.0)), \
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


def test_update_with_m_of_zero_and_one():
    for m, value in ((1.0, 5.0), (0.0, 1.0)):
        online, momentum = two_modules()
        lodisc.momentum_update(online, momentum, m)
        assert (momentum.weight == value).all(), f"m = {m} must give {value}"


# --- schedule -----------------------------------------------------------------------------------


def test_schedule_starts_at_base_and_ends_at_one():
    assert lodisc.momentum_schedule(0, 8, 0.9) == pytest.approx(0.9), "step 0 gives the base"
    assert lodisc.momentum_schedule(8, 8, 0.9) == pytest.approx(1.0), "the last step gives 1"


def test_schedule_is_half_a_cosine_period():
    values = [lodisc.momentum_schedule(step, 8, 0.9) for step in range(9)]
    assert values == sorted(values), "the momentum never decreases"
    assert values == pytest.approx(EXPECTED["schedule"], abs=1e-9), "half a cosine period"


# --- loss ---------------------------------------------------------------------------------------


def test_loss_of_equal_features_is_chance_level():
    loss = lodisc.contrastive_loss(torch.ones(4, 8), torch.ones(6, 8), 0.25)
    assert loss.item() == pytest.approx(2 * 0.25 * torch.tensor(6.0).log().item(), abs=1e-5), \
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


def test_loss_matches_reference():
    reference = EXPECTED["loss"]
    for (temperature, offset), expected in zip(((0.2, 0), (0.5, 0), (0.2, 2)), reference["result"],
                                               strict=True):
        loss = lodisc.contrastive_loss(reference["queries"], reference["keys"], temperature, offset)
        assert loss.item() == pytest.approx(expected, rel=1e-4), (
            "the positive key of query i is key offset + i" if offset
            else f"temperature {temperature}: it divides the similarities once and multiplies the "
            "loss once; the softmax of each query is over all keys")


# --- branches -----------------------------------------------------------------------------------


METHODS = ("mocov3", "lodisc")


def model_and_views(method):
    model = lodisc.METHODS[method](lodisc.VisionTransformer(32, 8, 24, 1, 3), hidden_dim=32,
                                   output_dim=16)
    model.load_state_dict(EXPECTED["branches"]["weights"])
    return model, EXPECTED["branches"]["views"]


def test_branches_contrast_with_the_other_view():
    for method in METHODS:
        model, views = model_and_views(method)
        output = model(*views)
        for name in {"mocov3": ["global_loss"], "lodisc": ["global_loss", "local_loss"]}[method]:
            assert getattr(output, name).item() == pytest.approx(
                EXPECTED["branches"][name], rel=1e-4), (
                f"{method}, {name}: check which view and which branch the key comes from, that "
                "each pass takes one view, and that both directions are summed")


def test_branches_sum_to_the_total():
    model, views = model_and_views("mocov3")
    output = model(*views)
    assert output.total.item() == pytest.approx(output.global_loss.item()), \
        "MoCo v3 has one loss: it is the total"
    model, views = model_and_views("lodisc")
    equal = model(*views)  # both weights are 1
    model.global_weight, model.local_weight = 0.5, 3.0
    weighted = model(*views)
    for name in ("global_loss", "local_loss"):
        assert getattr(weighted, name).item() == pytest.approx(getattr(equal, name).item()), \
            f"{name} is returned without its weight"
    for output, weights in ((equal, (1.0, 1.0)), (weighted, (0.5, 3.0))):
        expected = weights[0] * output.global_loss + weights[1] * output.local_loss
        assert output.total.item() == pytest.approx(expected.item()), \
            f"global_weight, local_weight = {weights}: the total is the weighted sum of the losses"


def test_branches_return_masks():
    model, views = model_and_views("lodisc")
    for mask, expected in zip(model(*views).masks, EXPECTED["branches"]["masks"], strict=True):
        assert torch.equal(mask, expected), "masks: first view 1, then view 2"
    model.mask = "random"
    draws = [model(*views, torch.Generator().manual_seed(3)).masks for _ in range(2)]
    assert all(map(torch.equal, *draws)), "random masks must come from the generator argument"


def momentum_passes(method):
    """Return, for each pass of the momentum encoder in forward, whether it records gradients."""
    model, views = model_and_views(method)
    recorded = []
    model.momentum_encoder.norm.register_forward_hook(
        lambda *_: recorded.append(torch.is_grad_enabled()))
    total = model(*views).total
    assert total.requires_grad, f"{method}: the total has no gradient; the queries need one"
    total.backward()
    assert all(p.grad is not None for p in model.predictor.parameters()), \
        f"{method}: the online side needs a gradient"
    return recorded


def test_branches_record_no_momentum_gradient():
    recorded = {method: momentum_passes(method) for method in METHODS}
    assert not any(recorded["mocov3"] + recorded["lodisc"]), "the momentum side needs no gradient"
    assert len(recorded["mocov3"]) == 2, "mocov3: two passes of the momentum encoder, one per view"
    assert len(recorded["lodisc"]) == 4, \
        "lodisc: four passes of the momentum encoder, each view whole and its pivotal patches alone"


def test_branches_leave_the_momentum_side_unchanged():
    for method in METHODS:
        model, views = model_and_views(method)
        before = [p.clone() for p in model.momentum_encoder.parameters()]
        model(*views)
        assert all(map(torch.equal, before, model.momentum_encoder.parameters())), \
            f"{method}: the training loop calls update_momentum; forward must not"


def test_branches_raise_for_invalid_views():
    for method in METHODS:
        model, (view1, view2) = model_and_views(method)
        for size in (0, 1):
            raises(f"{method}: a batch of {size} has no negatives", model, view1[:size],
                   view2[:size])
        raises(f"{method}: the views differ in shape", model, view1, view2[:3])
        raises(f"{method}: the views differ in shape", model, view1[:3], view2)
