"""The loss, the moving average, and the whole figure against a reference put together by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lodisc import (LoDisc, attention_product, contrastive_loss, create_vit, least_mask,
                    location_mask, mask_pixels, mlp_head, momentum_schedule, momentum_update,
                    random_mask)

seeds = st.integers(0, 10_000)
sizes = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(2, 8))


def draw_features(seed, sizes):
    queries, more, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(queries, channels, generator=generator, dtype=torch.float64),
            torch.randn(queries + more, channels, generator=generator, dtype=torch.float64))


# --- contrastive_loss -------------------------------------------------------------------------


@given(seeds, sizes, st.floats(0.05, 1.0), st.integers(0, 5))
def test_loss_against_loops(seed, sizes, temperature, offset):
    queries, keys = draw_features(seed, sizes)
    offset = min(offset, len(keys) - len(queries))
    total = 0.0
    for i, query in enumerate(queries):
        scores = [float(query @ key / (query.norm() * key.norm())) / temperature for key in keys]
        total -= math.log(math.exp(scores[offset + i]) / sum(math.exp(score) for score in scores))
    loss = contrastive_loss(queries, keys, temperature, offset)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(2 * temperature * total / len(queries), abs=1e-9)
    assert loss >= 0


@given(seeds, sizes, st.floats(0.01, 100.0))
def test_loss_ignores_the_length_of_features(seed, sizes, scale):
    queries, keys = draw_features(seed, sizes)
    loss = contrastive_loss(queries, keys, 0.2)
    assert torch.allclose(contrastive_loss(queries * scale, keys, 0.2), loss, atol=1e-9)
    assert torch.allclose(contrastive_loss(queries, keys * scale, 0.2), loss, atol=1e-9)


@given(seeds, sizes)
def test_loss_ignores_a_joint_permutation(seed, sizes):
    queries, keys = draw_features(seed, (sizes[0], 0, sizes[2]))
    order = torch.randperm(len(queries))
    expected = contrastive_loss(queries, keys, 0.2)
    assert torch.allclose(contrastive_loss(queries[order], keys[order], 0.2), expected, atol=1e-9)


@given(st.integers(1, 8), st.integers(0, 8), st.floats(0.05, 1.0))
def test_equal_features_lose_what_a_model_that_has_learnt_nothing_loses(batch, more, temperature):
    queries, keys = torch.ones(batch, 4).double(), torch.ones(batch + more, 4).double()
    expected = 2 * temperature * math.log(batch + more)
    assert contrastive_loss(queries, keys, temperature).item() == pytest.approx(expected, abs=1e-9)


@given(seeds, st.integers(2, 8))
def test_no_permutation_of_the_keys_beats_the_right_one(seed, batch):
    features = draw_features(seed, (batch, 0, 5))[0]
    generator = torch.Generator().manual_seed(seed)
    right = contrastive_loss(features, features, 0.2)
    for _ in range(5):
        order = torch.randperm(batch, generator=generator)
        assert contrastive_loss(features, features[order], 0.2) >= right - 1e-12


def test_loss_sends_no_gradient_to_keys_and_stays_float32_under_autocast():
    queries, keys = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    expected = contrastive_loss(queries, keys, 0.2)
    assert abs(expected - contrastive_loss(queries.double(), keys.double(), 0.2)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(queries, keys, 0.2)
        halves = contrastive_loss(queries.bfloat16(), keys.bfloat16(), 0.2)
    assert loss.dtype == halves.dtype == torch.float32 and torch.equal(loss, expected)
    loss.backward()
    assert queries.grad.abs().sum() > 0 and keys.grad is None


# --- the moving average -----------------------------------------------------------------------


@given(seeds, st.floats(0, 1))
def test_update_is_a_convex_combination(seed, m):
    torch.manual_seed(seed)
    online, momentum = nn.Linear(3, 4), nn.Linear(3, 4)
    before = copy.deepcopy(momentum)
    momentum_update(online, momentum, m)
    for new, old, target in zip(momentum.parameters(), before.parameters(), online.parameters()):
        assert torch.allclose(new, m * old + (1 - m) * target, atol=1e-6)
        assert (new >= torch.minimum(old, target) - 1e-6).all()
        assert (new <= torch.maximum(old, target) + 1e-6).all()


@given(seeds, st.floats(0, 1))
def test_update_leaves_equal_weights_equal_to_the_bit(seed, m):
    torch.manual_seed(seed)
    online = nn.Linear(50, 40)
    momentum = copy.deepcopy(online)
    momentum_update(online, momentum, m)
    for new, old in zip(momentum.parameters(), online.parameters()):
        assert torch.equal(new, old)


def test_update_touches_parameters_only():
    online, momentum = mlp_head(2, 4, 6, 3), mlp_head(2, 4, 6, 3)
    online(torch.randn(8, 4))
    buffers = {name: buffer.clone() for name, buffer in momentum.named_buffers()}
    assert buffers
    momentum_update(online, momentum, 0.0)
    for name, buffer in momentum.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for new, target in zip(momentum.parameters(), online.parameters()):
        assert torch.equal(new, target)


@given(st.integers(1, 300), st.floats(0, 1))
def test_schedule_rises_from_base_to_one(total, base):
    values = [momentum_schedule(step, total, base) for step in range(total + 1)]
    assert values[0] == pytest.approx(base) and values[-1] == pytest.approx(1)
    assert all(a <= b + 1e-15 for a, b in zip(values, values[1:]))
    assert momentum_schedule(total, 2 * total, base) == pytest.approx((1 + base) / 2)
    assert momentum_schedule(0, total) == 0.99


# --- LoDisc -----------------------------------------------------------------------------------


def tiny(**options):
    return LoDisc(create_vit("vit_nano", 32, 8), hidden_dim=32, output_dim=16, **options).double()


def two_views(batch=6):
    return torch.randn(2, batch, 3, 32, 32).double()


def by_hand(model, view1, view2, masks, tokens):
    """L_g and L_l as in the figure, from the parts, in the order in which the figure has them."""
    online = [model.predictor(model.projector(model.encoder(view)[0])) for view in (view1, view2)]
    keys, locals_ = [], []
    for view, mask in zip((view1, view2), masks):
        keys.append(model.momentum_projector(model.momentum_encoder(view)[0]))
        seen = (model.momentum_encoder(view, keep=mask) if tokens
                else model.momentum_encoder(mask_pixels(view, mask, 8)))
        locals_.append(model.momentum_projector(seen[0]))

    def contrast(query, key):
        logits = nn.functional.normalize(query, dim=1) @ nn.functional.normalize(key, dim=1).T
        return 2 * 0.2 * nn.functional.cross_entropy(logits / 0.2, torch.arange(len(query)))

    return (contrast(online[0], keys[1]) + contrast(online[1], keys[0]),
            contrast(online[0], locals_[1]) + contrast(online[1], locals_[0]))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("method", ["lodisc", "global", "local"])
def test_the_figure_against_a_reference(method, tokens):
    model = tiny(method=method, local_input="tokens" if tokens else "pixels")
    with torch.no_grad():  # a momentum side that differs from the online one
        for parameter in model.momentum_encoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    view1, view2 = two_views()
    with torch.no_grad():
        masks = [location_mask(attention_product(model.momentum_encoder(view, "row")[1]), 0.3)
                 for view in (view1, view2)]
    assert all((mask.sum(1) == 4).all() for mask in masks)
    expected_global, expected_local = by_hand(copy.deepcopy(model), view1, view2, masks, tokens)
    output = model(view1, view2)
    zero = torch.zeros((), dtype=torch.float64)
    for got, expected in ((output.global_loss, zero if method == "local" else expected_global),
                          (output.local_loss, zero if method == "global" else expected_local)):
        assert got.item() == pytest.approx(expected.item(), abs=1e-12)
    assert output.total.item() == pytest.approx((output.global_loss + output.local_loss).item())
    if method == "global":
        assert output.masks is None
    else:
        assert all(torch.equal(a, b) for a, b in zip(output.masks, masks))


def test_gradient_reaches_the_online_side_only():
    for method in ("lodisc", "global", "local"):
        model = tiny(method=method)
        model(*two_views()).total.backward()
        for name, parameter in model.named_parameters():
            if name.startswith("momentum") or not parameter.requires_grad:
                assert parameter.grad is None, name
            else:
                assert parameter.grad.abs().sum() > 0, name
        assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
        assert not any(p.requires_grad for p in model.momentum_projector.parameters())


def test_forward_never_updates_the_momentum_side():
    model = tiny()
    with torch.no_grad():
        model.encoder.cls_token += 1
    before = copy.deepcopy(dict(model.named_parameters()))
    model(*two_views())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    model.update_momentum(0.75)
    for side, online in ((model.momentum_encoder, "encoder"), (model.momentum_projector, "projector")):
        for name, parameter in side.named_parameters():
            expected = 0.75 * before[f"momentum_{online}.{name}"] + 0.25 * before[f"{online}.{name}"]
            assert torch.allclose(parameter, expected, atol=1e-12)
    assert torch.allclose(model.momentum_encoder.cls_token, before["encoder.cls_token"] - 0.75)


def test_momentum_side_starts_as_the_online_one_and_stays_in_train_mode():
    model = tiny()
    for online, momentum in ((model.encoder, model.momentum_encoder),
                             (model.projector, model.momentum_projector)):
        assert all(torch.equal(a, b) for a, b in zip(online.parameters(), momentum.parameters()))
    views = two_views()
    expected = model(*views).total
    model.eval()
    assert not model.projector.training
    assert all(module.training for module in model.momentum_projector.modules())
    model.projector.train(), model.predictor.train()  # running figures play no part
    assert model(*views).total == expected


def test_full_and_masked_pictures_are_separate_batches():
    """With the keys' BatchNorm over both together, the key's loss would depend on keep_ratio."""
    views = two_views()
    losses = []
    for ratio in (0.1, 0.9):
        torch.manual_seed(3)
        losses.append(tiny(keep_ratio=ratio)(*views))
    assert losses[0].global_loss == losses[1].global_loss
    assert losses[0].local_loss != losses[1].local_loss


@pytest.mark.parametrize("mask", ["random", "block"])
def test_random_masks_follow_the_generator(mask):
    model, views = tiny(mask=mask), two_views()
    first = model(*views, torch.Generator().manual_seed(1))
    again = model(*views, torch.Generator().manual_seed(1))
    other = model(*views, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(first.masks, again.masks))
    assert not torch.equal(first.masks[0], other.masks[0])
    assert not torch.equal(first.masks[0], first.masks[1])
    assert all((m.sum(1) == 4).all() for m in first.masks)
    if mask == "random":
        assert torch.equal(first.masks[0], random_mask(6, 16, 0.3, torch.Generator().manual_seed(1)))


def test_least_mask_and_other_importances_reach_the_output():
    views = two_views()
    model = tiny(mask="least")
    importance = attention_product(model.momentum_encoder(views[0], "row")[1])
    assert torch.equal(model(*views).masks[0], least_mask(importance, 0.3))
    masks = {}
    for name in ("product", "rollout", "last"):
        torch.manual_seed(0)
        masks[name] = tiny(importance=name)(*views).masks[0]
    assert not torch.equal(masks["product"], masks["last"])
    assert not torch.equal(masks["rollout"], masks["last"])


def test_heads_are_those_of_moco_v3():
    model = LoDisc(create_vit("vit_nano", 32, 8))
    kinds = [type(module).__name__ for module in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert [type(m).__name__ for m in model.predictor] == kinds[:4] + ["BatchNorm1d"]
    assert [m.weight.shape for m in model.projector if isinstance(m, nn.Linear)] == \
        [(4096, model.encoder.dim), (4096, 4096), (256, 4096)]
    assert [m.weight.shape for m in model.predictor if isinstance(m, nn.Linear)] == \
        [(4096, 256), (256, 4096)]
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Linear) and m in
               set(model.projector) | set(model.predictor))
    assert [m.affine for m in model.projector if isinstance(m, nn.BatchNorm1d)] == [True, True, False]


@pytest.mark.parametrize("mask", ["location", "least"])
def test_training_never_waits_for_a_look_at_nan(mask):
    """The loop's own look at the loss finds it; until then masks of NaN have their size."""
    model, rows = tiny(mask=mask), [torch.full((2, 3, 17), math.nan)] * 4
    assert model.pivotal_mask(two_views(2)[0], rows, None).sum(1).tolist() == [model.num_kept] * 2


@pytest.mark.parametrize("call, says", [
    (lambda: tiny(method="moco"), "'moco'"),
    (lambda: tiny(mask="best"), "'best'"),
    (lambda: tiny(importance="mean"), "'mean'"),
    (lambda: tiny(local_input="words"), "'words'"),
    (lambda: tiny(keep_ratio=2), "got 2"),
    (lambda: tiny(temperature=0), "above 0"),
    (lambda: tiny(temperature=-0.2), "above 0"),
    (lambda: tiny()(*two_views(1)), "batch of one"),
    (lambda: tiny()(two_views()[0], two_views(5)[0]), "(5, 3, 32, 32)"),
    (lambda: contrastive_loss(torch.zeros(3), torch.zeros(3), 0.2), "(3,)"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(3, 4), 0.2), "(3, 4)"),
    (lambda: contrastive_loss(torch.zeros(0, 2), torch.zeros(3, 2), 0.2), "0 queries"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(4, 2), 0.2, offset=2), "from key 2"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(4, 2), 0.2, offset=-1), "from key -1"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(3, 2), 0.0), "above 0"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(3, 2), -0.2), "above 0"),
    (lambda: momentum_update(nn.Linear(2, 2), nn.Linear(2, 2), 1.5), "got 1.5"),
    (lambda: momentum_update(nn.Linear(2, 2), nn.Linear(2, 3), 0.5), "differ"),
    (lambda: momentum_schedule(5, 4), "got 5"),
    (lambda: momentum_schedule(-1, 4), "got -1"),
    (lambda: momentum_schedule(0, 0), "[0, 0]"),
    (lambda: momentum_schedule(0, 4, base=1.5), "got 1.5"),
])
def test_what_cannot_be_right_is_rejected(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
