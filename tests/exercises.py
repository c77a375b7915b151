"""Graders of the assignment, in the order in which to solve it. A message hints at the cause."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lodisc

EXPECTED = torch.load(Path(__file__).with_name("expected.pt"), weights_only=True)


def close(result, expected, hint, tolerance=1e-5):
    assert torch.is_tensor(result), f"expected a tensor, got {type(result).__name__}"
    assert result.shape == expected.shape, \
        f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    assert bool(((result - expected).abs() <= tolerance * (1 + expected.abs())).all()), hint


# --- attention ----------------------------------------------------------------------------------


def of_q_and_k():
    known = EXPECTED["attention"]
    return lodisc.attention_weights(known["q"], known["k"]), known["of q and k"]


def attention_layer():
    known, layer = EXPECTED["attention"], lodisc.Attention(12, 3)
    layer.load_state_dict(known["weights"])
    return layer.eval(), known


def test_attention_of_a_query_sums_to_one():
    weights, expected = of_q_and_k()
    assert weights.shape == expected.shape
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 4)), \
        "each query shares out 1 among the keys: over which axis does the sum run?"


def test_attention_is_as_sharp_as_it_should_be():
    weights, expected = of_q_and_k()
    close(weights, expected, "right in sum, wrong in sharpness: how does a head's size d enter?")


def test_attention_is_precise_under_autocast():
    q, k = (EXPECTED["attention"][name].bfloat16() for name in "qk")  # as autocast makes them
    expected = lodisc.attention_weights(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        weights = lodisc.attention_weights(q, k)
    assert weights.dtype == torch.float32, "many layers will be multiplied: how wide must one be?"
    close(weights, expected, "float32 by its type, but computed in half precision on the way")


@torch.no_grad()
def test_attention_features():
    layer, known = attention_layer()
    for asked in (None, "row", "full"):
        close(layer(known["x"], asked)[0], known["features"],
              "the features must be the same whatever weights are asked for")
        close(layer(known["x"], asked, class_only=True)[0], known["features"][:, :1],
              "class_only: the class token's own feature, nobody else's")


@torch.no_grad()
def test_attention_that_is_handed_out():
    layer, known = attention_layer()
    assert layer(known["x"])[1] is None, "what nobody asked for is not stored"
    close(layer(known["x"], "full")[1], known["full"], "these are not the weights of the features")
    for class_only in (False, True):
        close(layer(known["x"], "row", class_only)[1], known["row"],
              "the row is that of the class token, the first: it asks, and all the others answer")
        close(layer(known["x"], "full", class_only)[1], known["full"],
              "class_only changes the features that are computed, not the weights handed out")


# --- positions ----------------------------------------------------------------------------------


def test_positions_leave_the_class_token_without():
    positions = lodisc.sincos_positions(3, 8)
    assert positions.shape == (1, 10, 8), f"expected (1, 10, 8), got {tuple(positions.shape)}"
    assert positions[0, 0].abs().sum() == 0, "the class token comes first and stands nowhere"


def test_positions_go_row_by_row():
    first, right, below = lodisc.sincos_positions(3, 8)[0, [1, 2, 4]]
    assert torch.equal(first[4:], right[4:]) and not torch.equal(first[:4], right[:4]), \
        "a step to the right changes the column's half of the channels, the first"
    assert torch.equal(first[:4], below[:4]) and not torch.equal(first[4:], below[4:]), \
        "a step down changes the row's half of the channels, the second"


def test_positions_have_the_right_frequencies():
    close(lodisc.sincos_positions(3, 8), EXPECTED["positions"],
          "look again at the frequencies, and at which quarter holds sines and which cosines")


def test_positions_need_four_parts():
    with pytest.raises(ValueError):
        lodisc.sincos_positions(3, 6)


# --- product ------------------------------------------------------------------------------------


def test_product_has_a_value_a_patch():
    assert lodisc.attention_product(EXPECTED["product"]["rows"]).shape == (2, 9), \
        "the class token attends to itself too, but it is no patch"


def test_product_of_rows_and_of_matrices():
    known = EXPECTED["product"]
    close(lodisc.attention_product(known["rows"]), known["of rows"],
          "heads are averaged within a layer, layers multiplied, and what comes out is a logarithm")
    close(lodisc.attention_product(known["matrices"]), known["of matrices"],
          "of a matrix it is the class token's row that counts: what it attends to")


def test_product_does_not_underflow():
    with pytest.raises(ValueError):
        lodisc.attention_product([])
    row = torch.tensor([[[0.5, 1e-6, 2e-6, 0.0]]])
    importance = lodisc.attention_product([row] * 24)
    assert bool(importance.isfinite().all()), \
        "24 small numbers: what does float32 make of their product?"
    assert importance[0, 1] > importance[0, 0] > importance[0, 2], "the order survives 24 layers"


# --- rollout ------------------------------------------------------------------------------------


def test_rollout_of_no_attention_is_no_importance():
    alone = torch.eye(5).expand(2, 3, 5, 5)
    assert lodisc.attention_rollout([alone] * 3).abs().sum() == 0, \
        "if every token attends to itself alone, nothing flows to the class token"


def test_rollout_of_one_layer():
    attention = torch.full((1, 1, 5, 5), 0.2)
    close(lodisc.attention_rollout([attention]), torch.full((1, 4), 0.1),
          "the residual connection carries half: what does a layer become with it?")


def test_rollout():
    known = EXPECTED["rollout"]
    with pytest.raises(ValueError):
        lodisc.attention_rollout(EXPECTED["product"]["rows"])
    close(lodisc.attention_rollout(known["matrices"]), known["result"],
          "matrices do not commute: the last layer asks the one before it. Whose row is it?")


# --- mask ---------------------------------------------------------------------------------------


def test_mask_keeps_as_many_as_it_should():
    for n, ratio, kept in ((10, 0.3, 3), (100, 0.29, 29), (196, 0.3, 58), (10, 0.05, 1),
                           (7, 1.0, 7), (9, 0.5, 4)):
        mask = lodisc.location_mask(torch.randn(3, n), ratio)
        assert mask.dtype == torch.bool and mask.shape == (3, n)
        assert mask.sum(1).tolist() == [kept] * 3, \
            f"keep ratio {ratio} of {n} patches keeps {kept}, rounded down, never none"


def test_mask_keeps_the_most_important():
    mask = lodisc.location_mask(torch.tensor([[0.1, 5.0, -2.0, 3.0], [9.0, 1.0, 8.0, 0.0]]), 0.5)
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False]], \
        "True is for the patches that stay, in every picture the most important ones"


def test_mask_with_ties():
    mask = lodisc.location_mask(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0] * 20]), 0.4)
    assert mask.sum() == 40, "equal importances must not make the mask larger or smaller"
    assert mask[0].nonzero().flatten().tolist() == [
        place for place in range(100) if place % 5 in (1, 2, 3)][:40], \
        "of equal importances the lower index wins, on every device: which sort promises that?"


def test_mask_of_nan():
    with pytest.raises(ValueError):
        lodisc.location_mask(torch.tensor([[1.0, float("nan")]]), 0.5)
    try:
        kept = lodisc.location_mask(torch.tensor([[1.0, float("nan")]]), 0.5, check=False).sum()
    except ValueError:
        pytest.fail("who says check=False has seen to it that there is no NaN")
    assert kept == 1, "without the look for NaN the mask is as large as ever"


# --- momentum update ----------------------------------------------------------------------------


def two_modules():
    online, momentum = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for module, value in ((online, 1.0), (momentum, 5.0)):
        for tensor in module.state_dict().values():
            tensor.fill_(value)
    return online, momentum


def test_update_moves_the_momentum_side_a_little():
    online, momentum = two_modules()
    place = momentum.weight.data_ptr()
    lodisc.momentum_update(online, momentum, 0.75)
    assert (online.weight == 1).all(), "the online side learns by gradients alone"
    assert momentum.weight.data_ptr() == place, "in place: others hold this very tensor"
    assert (momentum.weight != 5).any(), "nothing has moved"
    assert torch.allclose(momentum.weight, torch.tensor(4.0)), \
        "with a momentum near 1 the momentum side keeps most of what it has"


def test_update_leaves_batch_norms_figures():
    online, momentum = two_modules()
    lodisc.momentum_update(online, momentum, 0.75)
    assert (momentum.running_mean == 5).all(), "running figures are each side's own"


def test_update_keeps_what_is_equal():
    online, momentum = nn.Linear(30, 30), nn.Linear(30, 30)
    momentum.load_state_dict(online.state_dict())
    lodisc.momentum_update(online, momentum, 0.99)
    assert torch.equal(online.weight, momentum.weight), \
        "equal weights stay equal to the last bit: which order of the same sum promises that?"
    with pytest.raises(ValueError):
        lodisc.momentum_update(nn.Linear(3, 4), nn.Linear(4, 3), 0.99)


def test_update_at_the_ends():
    for m, value in ((1.0, 5.0), (0.0, 1.0)):
        online, momentum = two_modules()
        lodisc.momentum_update(online, momentum, m)
        assert (momentum.weight == value).all(), f"m = {m}: one end keeps all, the other nothing"
    for m in (-0.1, 1.1):
        with pytest.raises(ValueError):
            lodisc.momentum_update(*two_modules(), m)


# --- schedule -----------------------------------------------------------------------------------


def test_schedule_ends():
    assert lodisc.momentum_schedule(0, 8, 0.9) == pytest.approx(0.9), "it begins at the base"
    assert lodisc.momentum_schedule(8, 8, 0.9) == pytest.approx(1.0), "it ends at 1"
    for step, total, base in ((9, 8, 0.9), (-1, 8, 0.9), (0, 0, 0.9), (0, 8, 1.1)):
        with pytest.raises(ValueError):
            lodisc.momentum_schedule(step, total, base)


def test_schedule_between():
    values = [lodisc.momentum_schedule(step, 8, 0.9) for step in range(9)]
    assert values == sorted(values), "it never falls"
    assert values == pytest.approx(EXPECTED["schedule"], abs=1e-9), "half a cosine, not a line"


# --- loss ---------------------------------------------------------------------------------------


def test_loss_of_features_that_say_nothing():
    loss = lodisc.contrastive_loss(torch.ones(4, 8), torch.ones(6, 8), 0.5)
    assert loss.item() == pytest.approx(2 * 0.5 * torch.tensor(6.0).log().item(), abs=1e-5), \
        "equal features: the chance of each key is 1 in 6, and MoCo v3 scales by the temperature"


def test_loss_knows_no_lengths():
    queries, keys = EXPECTED["loss"]["queries"], EXPECTED["loss"]["keys"]
    one, other = (lodisc.contrastive_loss(scale * queries, keys / scale, 0.2).item()
                  for scale in (1, 7))
    assert one == pytest.approx(other, abs=1e-5), "cosines: what is done to features first?"


def test_loss_stops_the_gradient():
    queries = EXPECTED["loss"]["queries"].clone().requires_grad_()
    keys = EXPECTED["loss"]["keys"].clone().requires_grad_()
    lodisc.contrastive_loss(queries, keys, 0.2).backward()
    assert queries.grad is not None and queries.grad.abs().sum() > 0, "the queries must learn"
    assert keys.grad is None or keys.grad.abs().sum() == 0, "the keys are targets, not pupils"


def test_loss_is_precise_under_autocast():
    queries, keys = EXPECTED["loss"]["queries"], EXPECTED["loss"]["keys"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = lodisc.contrastive_loss(queries, keys, 0.2)
    assert loss.item() == pytest.approx(EXPECTED["loss"]["result"][0], rel=1e-5), \
        "computed in half precision on the way"


def test_loss_refuses_what_does_not_fit():
    for queries, keys, temperature, offset in (((4, 8), (4, 7), 0.2, 0), ((4, 8), (3, 8), 0.2, 0),
                                               ((4, 8), (6, 8), 0.2, 3), ((4, 8), (4, 8), 0, 0)):
        with pytest.raises(ValueError):
            lodisc.contrastive_loss(torch.ones(queries), torch.ones(keys), temperature, offset)


def test_loss_numbers():
    known = EXPECTED["loss"]
    for (temperature, offset), expected in zip(((0.2, 0), (0.5, 0), (0.2, 2)), known["result"],
                                               strict=True):
        loss = lodisc.contrastive_loss(known["queries"], known["keys"], temperature, offset)
        assert loss.item() == pytest.approx(expected, rel=1e-4), (
            "which key is a query's own when the keys of other processes come first?" if offset
            else f"at temperature {temperature}: it divides once, and scales the whole once; each "
            "query chooses among all keys")


# --- the figure ---------------------------------------------------------------------------------


def figure(method="lodisc"):
    known = EXPECTED["branches"]
    model = lodisc.LoDisc(lodisc.VisionTransformer(32, 8, 24, 2, 3), method, hidden_dim=32,
                          output_dim=16)
    model.load_state_dict(known["weights"])
    return model, known["views"], known["results"][method]


def test_branches_are_counted_once():
    for method in ("lodisc", "global", "local"):
        model, views, _ = figure(method)
        out = model(*views)
        assert out.total.item() == pytest.approx((out.global_loss + out.local_loss).item()), \
            "the total is the plain sum"
        assert (out.global_loss == 0) == (method == "local"), f"method {method}: the global loss"
        assert (out.local_loss == 0) == (method == "global"), f"method {method}: the local loss"
        assert (out.masks is None) == (method == "global")


def test_branches_meet_the_other_view():
    for method in ("global", "local", "lodisc"):
        model, views, expected = figure(method)
        for name, loss, known in zip(("total", "global", "local"), model(*views), expected):
            assert loss.item() == pytest.approx(known, rel=1e-4), (
                f"method {method}, {name} loss: which view's query meets which view's key, which "
                "branch does the key come from, and are both directions there?")


def test_branches_hand_out_their_masks():
    model, views, _ = figure()
    for mask, expected in zip(model(*views).masks, EXPECTED["branches"]["masks"], strict=True):
        assert torch.equal(mask, expected), "the mask of view 1, then that of view 2"
    model.mask = "random"
    draws = [model(*views, torch.Generator().manual_seed(3)).masks for _ in range(2)]
    assert all(map(torch.equal, *draws)), "who draws the random masks?"


def test_branches_without_gradient():
    model, views, _ = figure()
    recorded = []
    model.momentum_encoder.register_forward_hook(
        lambda *_: recorded.append(torch.is_grad_enabled()))
    model(*views).total.backward()
    assert len(recorded) == 4, "two views, each whole and by its pivotal patches"
    assert not any(recorded), "the momentum side is recorded for a backward pass that never comes"
    assert all(p.grad is not None for p in model.predictor.parameters()), "the online side learns"


def test_branches_leave_the_momentum_side_as_it_is():
    model, views, _ = figure()
    before = [p.clone() for p in model.momentum_encoder.parameters()]
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1e-3)
    model(*views)
    assert all(map(torch.equal, before, model.momentum_encoder.parameters())), \
        "the training loop moves the momentum side, once a step"


def test_branches_refuse_what_cannot_be_compared():
    model, (view1, view2), _ = figure()
    with pytest.raises(ValueError):
        model(view1[:1], view2[:1])
    with pytest.raises(ValueError):
        model(view1, view2[:3])
