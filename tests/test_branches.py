"""The loss, the moving average, and LoDisc against a reference built from its parts."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lodisc
from lodisc import (IMPORTANCES, MASKS, METHODS, LoDisc, attention_product,
                    contrastive_loss, create_vit, least_mask, location_mask, mask_pixels, mlp_head,
                    momentum_schedule, momentum_update, random_mask)

seeds = st.integers(0, 10_000)
sizes = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(2, 8))


def draw_features(seed, sizes):
    queries, more, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(queries, channels, generator=generator, dtype=torch.float64),
            torch.randn(queries + more, channels, generator=generator, dtype=torch.float64))


# --- contrastive_loss -------------------------------------------------------------------------


@given(seeds, sizes, st.floats(0.05, 1.0), st.integers(0, 5))
def test_loss_matches_loops(seed, sizes, temperature, offset):
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
def test_loss_is_scale_invariant(seed, sizes, scale):
    queries, keys = draw_features(seed, sizes)
    loss = contrastive_loss(queries, keys, 0.2)
    assert torch.allclose(contrastive_loss(queries * scale, keys, 0.2), loss, atol=1e-9)
    assert torch.allclose(contrastive_loss(queries, keys * scale, 0.2), loss, atol=1e-9)


@given(seeds, sizes)
def test_loss_is_permutation_invariant(seed, sizes):
    queries, keys = draw_features(seed, (sizes[0], 0, sizes[2]))
    order = torch.randperm(len(queries))
    expected = contrastive_loss(queries, keys, 0.2)
    assert torch.allclose(contrastive_loss(queries[order], keys[order], 0.2), expected, atol=1e-9)


@given(st.integers(1, 8), st.integers(0, 8), st.floats(0.05, 1.0))
def test_loss_of_equal_features_is_chance_level(batch, more, temperature):
    queries, keys = torch.ones(batch, 4).double(), torch.ones(batch + more, 4).double()
    expected = 2 * temperature * math.log(batch + more)
    assert contrastive_loss(queries, keys, temperature).item() == pytest.approx(expected, abs=1e-9)


@given(seeds, st.integers(2, 8))
def test_loss_is_lowest_for_matching_keys(seed, batch):
    features = draw_features(seed, (batch, 0, 5))[0]
    generator = torch.Generator().manual_seed(seed)
    right = contrastive_loss(features, features, 0.2)
    for _ in range(5):
        order = torch.randperm(batch, generator=generator)
        assert contrastive_loss(features, features[order], 0.2) >= right - 1e-12


def test_loss_has_no_gradient_for_keys_and_is_float32_under_autocast():
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
def test_update_is_convex_combination(seed, m):
    torch.manual_seed(seed)
    online, momentum = nn.Linear(3, 4), nn.Linear(3, 4)
    before = copy.deepcopy(momentum)
    momentum_update(online, momentum, m)
    for new, old, target in zip(momentum.parameters(), before.parameters(), online.parameters()):
        assert torch.allclose(new, m * old + (1 - m) * target, atol=1e-6)
        assert (new >= torch.minimum(old, target) - 1e-6).all()
        assert (new <= torch.maximum(old, target) + 1e-6).all()


@given(seeds, st.floats(0, 1))
def test_update_keeps_equal_weights_bit_equal(seed, m):
    torch.manual_seed(seed)
    online = nn.Linear(50, 40)
    momentum = copy.deepcopy(online)
    momentum_update(online, momentum, m)
    for new, old in zip(momentum.parameters(), online.parameters()):
        assert torch.equal(new, old)


def test_update_changes_parameters_only():
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
    """Compute L_g and L_l of the figure from the model's parts."""
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
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_masks_match_reference(method, tokens):
    model = tiny(method=method, local_input="tokens" if tokens else "pixels")
    with torch.no_grad():  # make the momentum encoder differ from the online one
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


def test_gradients_reach_online_side_only():
    for method in METHODS:
        model = tiny(method=method)
        model(*two_views()).total.backward()
        for name, parameter in model.named_parameters():
            if name.startswith("momentum") or not parameter.requires_grad:
                assert parameter.grad is None, name
            else:
                assert parameter.grad.abs().sum() > 0, name
        assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
        assert not any(p.requires_grad for p in model.momentum_projector.parameters())


def test_only_update_momentum_changes_weights():
    model = tiny()
    with torch.no_grad():
        model.encoder.cls_token += 1
    before = copy.deepcopy(dict(model.named_parameters()))
    model(*two_views())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    model.update_momentum(0.75)
    for online in ("encoder", "projector"):
        for name, parameter in model.get_submodule(f"momentum_{online}").named_parameters():
            old, new = before[f"momentum_{online}.{name}"], before[f"{online}.{name}"]
            assert torch.allclose(parameter, 0.75 * old + 0.25 * new, atol=1e-12)
    assert torch.allclose(model.momentum_encoder.cls_token, before["encoder.cls_token"] - 0.75)


def test_momentum_side_starts_as_copy_and_stays_in_train_mode():
    model = tiny()
    for online, momentum in ((model.encoder, model.momentum_encoder),
                             (model.projector, model.momentum_projector)):
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr()
                   for a, b in zip(online.parameters(), momentum.parameters(), strict=True))
    views = two_views()
    expected = model(*views).total
    assert not model.eval().projector.training and model.train().projector.training
    model.eval()
    assert not model.projector.training
    for momentum in (model.momentum_encoder, model.momentum_projector):
        assert all(module.training for module in momentum.modules())
    model.projector.train(), model.predictor.train()  # running statistics are not used
    assert model(*views).total == expected


def test_batch_norm_separates_whole_and_masked_images():
    """If BatchNorm saw both together, the global loss would depend on keep_ratio."""
    views = two_views()
    losses = []
    for ratio in (0.1, 0.9):
        torch.manual_seed(3)
        losses.append(tiny(keep_ratio=ratio)(*views))
    assert losses[0].global_loss == losses[1].global_loss
    assert losses[0].local_loss != losses[1].local_loss


@pytest.mark.parametrize("mask", ["random", "block"])
def test_random_masks_follow_generator(mask):
    model, views = tiny(mask=mask), two_views()
    first = model(*views, torch.Generator().manual_seed(1))
    again = model(*views, torch.Generator().manual_seed(1))
    other = model(*views, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(first.masks, again.masks))
    assert not torch.equal(first.masks[0], other.masks[0])
    assert not torch.equal(first.masks[0], first.masks[1])
    assert all((m.sum(1) == 4).all() for m in first.masks)
    if mask == "random":
        expected = random_mask(torch.zeros(6, 16), 0.3, torch.Generator().manual_seed(1))
        assert torch.equal(first.masks[0], expected)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("mask, function", [("location", location_mask), ("least", least_mask)])
def test_masks_follow_mask_and_importance(mask, function, importance):
    views = two_views()
    model = tiny(mask=mask, importance=importance)
    with torch.no_grad():
        for parameter in model.momentum_encoder.parameters():  # so that the importances differ
            parameter += 0.05 * torch.randn_like(parameter)
    masks = model(*views).masks
    matrices = [model.momentum_encoder(view, "full")[1] for view in views]
    expected = {name: [function(rank(layers), 0.3) for layers in matrices]
                for name, (rank, _) in IMPORTANCES.items()}
    for view in range(2):
        assert torch.equal(masks[view], expected[importance][view])
    for other in expected.keys() - {importance}:
        assert not torch.equal(masks[0], expected[other][0])


def encoder_passes(model):
    """Record each pass: [(online or momentum, attention stored, tokens that entered)]."""
    passes = []
    for name in ("encoder", "momentum_encoder"):
        encoder = getattr(model, name)

        def tokens(images, attention=None, keep=None, name=name, own=encoder.tokens, **options):
            passes.append((name, attention, 16 if keep is None else keep.shape[1]))
            return own(images, attention, keep, **options)

        encoder.tokens = tokens
    return passes


@pytest.mark.parametrize("method, mask, local_input, importance", [
    ("lodisc", "location", "pixels", "product"), ("lodisc", "location", "tokens", "rollout"),
    ("lodisc", "least", "pixels", "last"), ("lodisc", "random", "tokens", "product"),
    ("lodisc", "block", "pixels", "rollout"), ("local", "location", "tokens", "product"),
    ("local", "least", "pixels", "rollout"), ("local", "random", "pixels", "last"),
    ("global", "location", "pixels", "product"), ("global", "random", "tokens", "rollout")])
def test_forward_runs_only_needed_passes(method, mask, local_input, importance):
    model = tiny(method=method, mask=mask, local_input=local_input, importance=importance)
    ranked = method != "global" and mask in ("location", "least")
    stored = {"product": "row", "rollout": "mean", "last": "row"}[importance] if ranked else None
    passes = encoder_passes(model)
    model(*two_views(2))
    view_passes = []
    if method != "local" or ranked:
        view_passes.append(("momentum_encoder", stored, 16))
    if method != "global":
        view_passes.append(("momentum_encoder", None, 4 if local_input == "tokens" else 16))
    assert model.stored == stored
    assert passes == [("encoder", None, 16)] * 2 + view_passes * 2
    assert len(passes) == 2 + {"global": 2, "local": 4 if ranked else 2, "lodisc": 4}[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_most_important_patches_for_any_method(mask, method):
    for importance, (function, _) in IMPORTANCES.items():
        model, images = tiny(method=method, mask=mask, importance=importance), two_views(3)[0]
        with torch.no_grad():
            model.momentum_encoder.cls_token.normal_()  # so that the online ranking differs
            matrices = model.momentum_encoder(images, "full")[1]
        passes, masks = encoder_passes(model), model.masks(images)
        assert masks.dtype == torch.bool and masks.shape == (3, 16)
        assert torch.equal(masks, location_mask(function(matrices), 0.3))
        assert passes == [("momentum_encoder", IMPORTANCES[importance][1], 16)]


def test_masks_record_no_gradient():
    model, recorded = tiny(), []
    model.momentum_encoder.register_forward_hook(
        lambda *_: recorded.append(torch.is_grad_enabled()))
    model.masks(two_views(2)[0])
    assert recorded == [False]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_chance_levels_equal_loss_of_constant_features(method, temperature):
    model = tiny(method=method, temperature=temperature)
    constant = torch.ones(6, 16, dtype=torch.float64)
    model.predictor.register_forward_hook(lambda *_: constant)
    model.momentum_projector.register_forward_hook(lambda *_: constant)
    output, levels = model(*two_views(6)), model.chance_levels(6)
    assert levels.keys() == {"global_loss", "local_loss"}
    assert levels["global_loss"] == levels["local_loss"] == \
        pytest.approx(4 * temperature * math.log(6))
    for name, unused in (("global_loss", "local"), ("local_loss", "global")):
        expected = 0 if method == unused else levels[name]
        assert getattr(output, name).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("needs_importance", [True, False])
def test_own_mask_needs_one_function_and_one_entry(needs_importance, monkeypatch):
    calls = []

    def own_mask(importance, keep_ratio, generator=None):
        calls.append((importance, keep_ratio, generator))
        mask = torch.zeros_like(importance, dtype=torch.bool)
        mask[:, [0, 5, 6, 11]] = True
        return mask

    monkeypatch.setitem(lodisc.MASKS, "own", (own_mask, needs_importance))
    model, views, generator = tiny(mask="own"), two_views(), torch.Generator()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(model.encoder.blocks[0].mlp.fc1.weight)
    with torch.no_grad():
        expected = [attention_product(model.momentum_encoder(view, "row")[1]) for view in views]
    output = model(*views, generator)
    output.total.backward()
    optimiser.step()
    assert not torch.equal(before, model.encoder.blocks[0].mlp.fc1.weight)
    assert model.stored == ("row" if needs_importance else None)
    assert len(calls) == 2
    for call, importance, mask in zip(calls, expected, output.masks):
        assert mask.nonzero()[:, 1].tolist() == [0, 5, 6, 11] * 6
        assert call[1:] == (0.3, generator)
        assert torch.equal(call[0], importance if needs_importance else torch.zeros(6, 16).double())


def test_subclass_with_own_output_and_schedule():
    class Output(NamedTuple):
        total: torch.Tensor
        weight: float
        masks: tuple | None

    class Weighted(LoDisc):
        def __init__(self, encoder, scale, **options):
            super().__init__(encoder, **options)
            self.scale = scale

        def forward(self, view1, view2, generator=None, progress=0.0):
            losses = super().forward(view1, view2, generator, progress)
            weight = self.scale * progress
            return Output(losses.global_loss + weight * losses.local_loss, weight, losses.masks)

    model = Weighted(create_vit("vit_nano", 32, 8), scale=2, hidden_dim=32, output_dim=16).double()
    views = two_views()
    losses = LoDisc.forward(model, *views)
    for progress in (0.0, 0.25):
        output = model(*views, progress=progress)
        assert output._fields == ("total", "weight", "masks") and output.weight == 2 * progress
        expected = losses.global_loss + 2 * progress * losses.local_loss
        assert output.total.item() == pytest.approx(expected.item())
        assert all(map(torch.equal, output.masks, losses.masks))
    model(*views, progress=1.0).total.backward()
    assert model.encoder.cls_token.grad.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_losses_do_not_depend_on_progress(method):
    model, views = tiny(method=method), two_views()
    assert model(*views, progress=0.0)[:3] == model(*views, None, 1.0)[:3]


def test_heads_match_moco_v3():
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
    for head, affine in ((model.projector, [True, True, False]), (model.predictor, [True, False])):
        assert [m.affine for m in head if isinstance(m, nn.BatchNorm1d)] == affine


@pytest.mark.parametrize("mask", ["location", "least"])
def test_masks_of_diverged_encoder_keep_exactly_k(mask):
    """Check that no forward pass raises for NaN, which the training loop reports."""
    model, images = tiny(mask=mask), two_views(2)
    rows = [torch.full((2, 3, 17), math.nan)] * 4
    assert model.pivotal_mask(images[0], rows, None).sum(1).tolist() == [model.num_kept] * 2
    with torch.no_grad():
        model.momentum_encoder.cls_token.fill_(math.nan)
    output = model(*images)
    assert output.total.isnan() and (output.masks[0].sum(1) == model.num_kept).all()


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
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(3, 2, 2), 0.2), "(3, 2, 2)"),
    (lambda: contrastive_loss(torch.zeros(0, 2), torch.zeros(3, 2), 0.2), "0 queries"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(4, 2), 0.2, offset=2), "from key 2"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(4, 2), 0.2, offset=-1), "from key -1"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(3, 2), 0.0), "above 0"),
    (lambda: contrastive_loss(torch.zeros(3, 2), torch.zeros(3, 2), -0.2), "above 0"),
    (lambda: momentum_update(nn.Linear(2, 2), nn.Linear(2, 2), 1.5), "got 1.5"),
    (lambda: momentum_update(nn.Linear(2, 2), nn.Linear(2, 2), -0.5), "got -0.5"),
    (lambda: momentum_update(nn.Linear(2, 2), nn.Linear(2, 3), 0.5), "differ"),
    (lambda: momentum_schedule(5, 4), "got 5"),
    (lambda: momentum_schedule(-1, 4), "got -1"),
    (lambda: momentum_schedule(0, 0), "[0, 0]"),
    (lambda: momentum_schedule(0, 4, base=1.5), "got 1.5"),
])
def test_invalid_arguments_raise_value_error(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
