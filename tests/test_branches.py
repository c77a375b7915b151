"""The loss, the moving average, and MoCoV3 and LoDisc against references from their parts."""

import copy
import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lodisc
from lodisc import (IMPORTANCES, MASKS, METHODS, Importance, LoDisc, Mask, MoCoV3,
                    attention_product, box_mask, contrastive_loss, create_vit, least_mask,
                    location_mask, mask_pixels, momentum_schedule, momentum_update, predictor,
                    projector, random_mask)

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
    online, momentum = projector(4, 6, 3), projector(4, 6, 3)
    online(torch.randn(8, 4))
    buffers = {name: buffer.clone() for name, buffer in momentum.named_buffers()}
    assert buffers
    momentum_update(online, momentum, 0.0)
    for name, buffer in momentum.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for new, target in zip(momentum.parameters(), online.parameters()):
        assert torch.equal(new, target)


def test_update_of_modules_with_unlike_parameters_raises():
    for momentum in (nn.Linear(2, 2, bias=False), nn.Linear(2, 3)):
        with pytest.raises((ValueError, RuntimeError)):
            momentum_update(nn.Linear(2, 2), momentum, 0.5)


@given(st.integers(1, 300), st.floats(0, 1))
def test_schedule_rises_from_base_to_one(total, base):
    values = [momentum_schedule(step, total, base) for step in range(total + 1)]
    assert values[0] == pytest.approx(base) and values[-1] == pytest.approx(1)
    assert all(a <= b + 1e-15 for a, b in zip(values, values[1:]))
    for part, cosine in ((2, 0.0), (3, 0.5), (4, math.sqrt(0.5)), (6, math.sqrt(0.75))):
        expected = 1 - (1 - base) * (1 + cosine) / 2
        assert momentum_schedule(total, part * total, base) == pytest.approx(expected)
    assert momentum_schedule(0, total) == 0.99


# --- MoCoV3 and LoDisc ------------------------------------------------------------------------

VARIANTS = {"mocov3": (MoCoV3, {}), "lodisc": (LoDisc, {}),
            "local": (LoDisc, {"global_weight": 0.0})}


def tiny(method=LoDisc, **options):
    encoder = create_vit("vit_nano", 32, 8)
    return method(encoder, hidden_dim=32, output_dim=16, **options).double()


def tiny_variant(name):
    method, options = VARIANTS[name]
    return tiny(method, **options)


def two_views(batch=6):
    return torch.randn(2, batch, 3, 32, 32).double()


@torch.no_grad()
def move_momentum_side(model):
    """Make the momentum side differ from the online one, and its attention from uniform."""
    for module in (model.momentum_encoder, model.momentum_projector):
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def contrast_by_hand(query, key, temperature=0.2):
    logits = nn.functional.normalize(query, dim=1) @ nn.functional.normalize(key, dim=1).T
    loss = nn.functional.cross_entropy(logits / temperature, torch.arange(len(query)))
    return 2 * temperature * loss


def queries_by_hand(model, views):
    return [model.predictor(model.projector(model.encoder(view))) for view in views]


def global_by_hand(model, views, temperature=0.2):
    """Compute L_g of the figure from the model's parts."""
    query1, query2 = queries_by_hand(model, views)
    with torch.no_grad():
        key1, key2 = [model.momentum_projector(model.momentum_encoder(view)) for view in views]
    return (contrast_by_hand(query1, key2, temperature)
            + contrast_by_hand(query2, key1, temperature))


@torch.no_grad()
def masks_by_hand(model, views):
    """Return the 4 of 16 patches, 0.3, with the greatest product of attention."""
    masks = []
    for view in views:
        product = torch.ones(len(view), 16, dtype=view.dtype)
        for row in model.momentum_encoder.with_attention(view, "row")[1]:
            product = product * row
        masks.append(torch.zeros_like(product).scatter(1, product.topk(4).indices, 1).bool())
    return masks


@torch.no_grad()
def local_key_by_hand(model, view, mask, tokens):
    """Encode the kept patches of each image: the others black, or left out of the sequence."""
    encoder = model.momentum_encoder
    if not tokens:
        black = view.clone()
        for image, kept in zip(black, mask):
            for i in (~kept).nonzero().flatten().tolist():
                row, column = 8 * (i // 4), 8 * (i % 4)
                image[:, row:row + 8, column:column + 8] = 0
        return model.momentum_projector(encoder(black))
    sequences = []
    for image, kept in zip(view, mask):
        patches = encoder.patch_embed(image[None])[0] + encoder.pos_embed[0, 1:]
        sequences.append(torch.cat([encoder.cls_token[0] + encoder.pos_embed[0, :1],
                                    patches[kept]]))
    x = torch.stack(sequences)
    for block in encoder.blocks:
        x, _ = block(x)
    return model.momentum_projector(encoder.norm(x)[:, 0])


def local_by_hand(model, views, tokens=False):
    """Compute L_l of the figure from the model's parts."""
    query1, query2 = queries_by_hand(model, views)
    key1, key2 = [local_key_by_hand(model, view, mask, tokens)
                  for view, mask in zip(views, masks_by_hand(model, views))]
    return contrast_by_hand(query1, key2) + contrast_by_hand(query2, key1)


def test_registry_has_the_methods_by_name():
    assert METHODS == {"lodisc": LoDisc, "mocov3": MoCoV3}


@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_mocov3_output_is_total_and_global_loss_of_reference(temperature):
    model, views = tiny(MoCoV3, temperature=temperature), two_views()
    move_momentum_side(model)
    expected = global_by_hand(copy.deepcopy(model), views, temperature)
    output = model(*views)
    assert output._fields == ("total", "global_loss") and len(output) == 2
    assert output.global_loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.equal(output.total, output.global_loss)


@pytest.mark.parametrize("global_weight, local_weight, tokens", [
    (1.0, 1.0, False), (1.0, 1.0, True), (0.5, 2.0, False), (0.0, 1.0, True)])
def test_lodisc_output_matches_reference(global_weight, local_weight, tokens):
    model = tiny(local_input="tokens" if tokens else "pixels", global_weight=global_weight,
                 local_weight=local_weight)
    move_momentum_side(model)
    views = two_views()
    masks = masks_by_hand(model, views)
    reference = copy.deepcopy(model)
    expected_global = global_by_hand(reference, views).item()
    expected_local = local_by_hand(reference, views, tokens).item()
    output = model(*views)
    assert output._fields == ("total", "global_loss", "local_loss", "masks")
    assert abs(expected_global - expected_local) > 1e-3
    assert output.global_loss.item() == pytest.approx(expected_global, abs=1e-12)
    assert output.local_loss.item() == pytest.approx(expected_local, abs=1e-12)
    total = global_weight * expected_global + local_weight * expected_local
    assert output.total.item() == pytest.approx(total, abs=1e-12)
    assert all(torch.equal(mask, expected) for mask, expected in zip(output.masks, masks))


def gradients(loss, model):
    """Return the gradients of the trainable parameters, one after the other."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trainable)])


@pytest.mark.parametrize("global_weight, local_weight", [
    (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_gradient_of_total_is_weighted_sum_of_losses_gradients(global_weight, local_weight):
    """With global_weight 0, it is the gradient of the local loss alone."""
    model = tiny(global_weight=global_weight, local_weight=local_weight)
    move_momentum_side(model)
    views = two_views()
    of_global = gradients(global_by_hand(model, views), model)
    of_local = gradients(local_by_hand(model, views), model)
    total = gradients(model(*views).total, model)
    assert (of_global - of_local).abs().max() > 1e-3
    expected = global_weight * of_global + local_weight * of_local
    assert torch.allclose(total, expected, rtol=1e-9, atol=1e-12)


def test_weights_are_one_by_default():
    model = tiny()
    assert (model.global_weight, model.local_weight) == (1, 1)
    output = model(*two_views())
    assert torch.equal(output.total, output.global_loss + output.local_loss)


def test_options_are_all_arguments_but_the_encoder():
    """train.py passes each setting of this name, so that each must arrive."""
    assert MoCoV3.OPTIONS == ("temperature", "hidden_dim", "output_dim")
    assert sorted(LoDisc.OPTIONS) == sorted([
        "temperature", "hidden_dim", "output_dim", "mask", "importance", "local_input",
        "keep_ratio", "global_weight", "local_weight"])
    settings = dict(temperature=0.7, hidden_dim=12, output_dim=6, mask="least", importance="last",
                    local_input="tokens", keep_ratio=0.6, global_weight=0.3, local_weight=0.8)
    for method in (MoCoV3, LoDisc):
        options = {name: settings[name] for name in method.OPTIONS}
        model = method(create_vit("vit_nano", 32, 8), **options)
        for name in set(method.OPTIONS) - {"hidden_dim", "output_dim"}:
            assert getattr(model, name) == settings[name], name
        shapes = [module.weight.shape for head in (model.projector, model.predictor)
                  for module in head if isinstance(module, nn.Linear)]
        assert shapes == [(12, 96), (12, 12), (6, 12), (12, 6), (6, 12)]
    with pytest.raises(TypeError, match="'mask'"):
        tiny(MoCoV3, mask="location")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_online_side_only(variant):
    model = tiny_variant(variant)
    model(*two_views()).total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("momentum") or not parameter.requires_grad:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    assert not any(p.requires_grad for p in model.momentum_projector.parameters())


@pytest.mark.parametrize("method", [MoCoV3, LoDisc])
def test_only_update_momentum_changes_weights(method):
    model = tiny(method)
    with torch.no_grad():
        model.encoder.cls_token += 1
        for parameter in model.projector.parameters():
            parameter += 1
    before = copy.deepcopy(dict(model.named_parameters()))
    model(*two_views())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    model.update_momentum(0.75)
    for name, parameter in model.named_parameters():
        if name.startswith("momentum_"):
            old, new = before[name], before[name.removeprefix("momentum_")]
            assert torch.allclose(parameter, 0.75 * old + 0.25 * new, atol=1e-12), name
        else:
            assert torch.equal(parameter, before[name]), name
    assert torch.allclose(model.momentum_encoder.cls_token, before["encoder.cls_token"] - 0.75)


@pytest.mark.parametrize("method", [MoCoV3, LoDisc])
def test_momentum_side_starts_as_copy_and_stays_in_train_mode(method):
    model = tiny(method)
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
    model.projector.train()
    model.predictor.train()  # running statistics are not used
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


# --- the parts of a forward -------------------------------------------------------------------


@torch.no_grad()
def test_query_and_key_match_reference():
    model, (view, _) = tiny(MoCoV3), two_views()
    move_momentum_side(model)
    query, key = model.query(view), model.key(view)
    assert torch.equal(query, model.predictor(model.projector(model.encoder(view))))
    assert torch.equal(key, model.momentum_projector(model.momentum_encoder(view)))
    assert query.shape == key.shape == (6, 16)


@torch.no_grad()
def test_key_and_mask_match_reference():
    """Compute the product of attention in loops, and sort it."""
    model, (view, _) = tiny(), two_views()
    move_momentum_side(model)
    key, mask = model.key_and_mask(view)
    assert torch.equal(key, model.momentum_projector(model.momentum_encoder(view)))
    assert mask.dtype == torch.bool and mask.shape == (6, 16)
    rows = model.momentum_encoder.with_attention(view, "row")[1]
    for image in range(6):
        products = [math.prod(row[image, patch].item() for row in rows) for patch in range(16)]
        kept = sorted(range(16), key=lambda patch: -products[patch])[:4]  # 0.3 of 16
        assert mask[image].nonzero().flatten().tolist() == sorted(kept)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [False, True])
def test_local_key_matches_reference_for_any_mask(tokens):
    model, (view, _) = tiny(local_input="tokens" if tokens else "pixels"), two_views()
    move_momentum_side(model)
    mask = torch.rand(6, 16).argsort(1) < 4
    key = model.local_key(view, mask)
    assert key.shape == (6, 16)
    assert torch.allclose(key, local_key_by_hand(model, view, mask, tokens), atol=1e-9)
    assert not torch.allclose(key, local_key_by_hand(model, view, ~mask, tokens), atol=1e-2)
    assert not torch.allclose(key, local_key_by_hand(model, view, mask, not tokens), atol=1e-2)
    if not tokens:
        black = model.momentum_encoder(mask_pixels(view, mask, 8))
        assert torch.equal(key, model.momentum_projector(black))


@torch.no_grad()
def test_local_key_of_crop_is_of_the_enlarged_box():
    model, (view, _) = tiny(local_input="crop"), two_views()
    move_momentum_side(model)
    _, mask = model.key_and_mask(view)
    importance = importance_by_name(model.momentum_encoder, view)["product"]
    assert torch.equal(mask, box_mask(importance, 0.3)) and model.num_kept == 4
    assert torch.equal(model.pivotal_patches(view), mask)
    boxes = []
    for image, kept in zip(view, mask):
        rows, columns = kept.view(4, 4).nonzero().T
        top, left = 8 * rows.min(), 8 * columns.min()
        box = image[None, :, top:top + 16, left:left + 16]
        boxes.append(nn.functional.interpolate(box, (32, 32), mode="bilinear"))
    expected = model.momentum_projector(model.momentum_encoder(torch.cat(boxes)))
    assert torch.allclose(model.local_key(view, mask), expected, atol=1e-9)


def test_random_masks_follow_generator():
    model, views = tiny(mask="random"), two_views()
    first = model(*views, torch.Generator().manual_seed(1))
    again = model(*views, torch.Generator().manual_seed(1))
    reseeded = model(*views, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(first.masks, again.masks))
    assert not torch.equal(first.masks[0], reseeded.masks[0])
    assert not torch.equal(first.masks[0], first.masks[1])
    assert all((m.sum(1) == 4).all() for m in first.masks)
    generator = torch.Generator().manual_seed(1)  # of view 1, then of view 2
    alone = [model.key_and_mask(view, generator)[1] for view in views]
    assert all(torch.equal(a, b) for a, b in zip(first.masks, alone))
    expected = random_mask(torch.zeros(6, 16), 0.3, torch.Generator().manual_seed(1))
    assert torch.equal(first.masks[0], expected)


def importance_by_name(encoder, images):
    """Return {name: importance (B, N)} of images, from the attention of all to all."""
    matrices = encoder.with_attention(images, "matrix")[1]
    ranked = {}
    for name, importance in IMPORTANCES.items():
        layers = matrices
        if importance.attention_kind == "row":
            layers = [matrix[:, 0, 1:] for matrix in matrices]
        ranked[name] = importance.function(layers)
    return ranked


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("mask, function", [("location", location_mask), ("least", least_mask)])
def test_masks_follow_mask_and_importance(mask, function, importance):
    views = two_views()
    model = tiny(mask=mask, importance=importance)
    move_momentum_side(model)  # so that the importances differ
    masks = model(*views).masks
    ranked = [importance_by_name(model.momentum_encoder, view) for view in views]
    for view in range(2):
        assert torch.equal(masks[view], function(ranked[view][importance], 0.3))
    for name in IMPORTANCES.keys() - {importance}:
        assert not torch.equal(masks[0], function(ranked[0][name], 0.3))


class Pass(NamedTuple):
    encoder: str  # online or momentum
    kind: str | None  # of the attention that is returned
    entered: int  # patches
    class_only: bool


def record_passes(model):
    """Return a list that gets each pass of an encoder."""
    passes = []
    for name in ("encoder", "momentum_encoder"):
        encoder = getattr(model, name)

        def encode(images, keep=None, kind=None, class_only=False, name=name, real=encoder.encode):
            entered = 16 if keep is None else keep.shape[1]
            passes.append(Pass(name, kind, entered, class_only))
            return real(images, keep, kind, class_only)

        encoder.encode = encode
    return passes


@pytest.mark.parametrize("mask, local_input, importance", [
    ("location", "pixels", "product"), ("location", "tokens", "rollout"),
    ("least", "pixels", "last"), ("random", "tokens", "product"), ("location", "crop", "rollout")])
def test_lodisc_runs_two_online_and_four_momentum_passes(mask, local_input, importance):
    model = tiny(mask=mask, local_input=local_input, importance=importance)
    kind = {"product": "row", "rollout": "matrix", "last": "row"}[importance]
    passes = record_passes(model)
    model(*two_views(2))
    entered = 4 if local_input == "tokens" else 16
    assert Counter(passes) == {Pass("encoder", None, 16, True): 2,
                               Pass("momentum_encoder", kind, 16, True): 2,
                               Pass("momentum_encoder", None, entered, True): 2}


def test_mocov3_runs_one_pass_of_each_encoder_for_each_view():
    model = tiny(MoCoV3)
    passes = record_passes(model)
    model(*two_views(2))
    assert Counter(passes) == {Pass("encoder", None, 16, True): 2,
                               Pass("momentum_encoder", None, 16, True): 2}


@pytest.mark.parametrize("method, calls", [(MoCoV3, 4), (LoDisc, 8)])
def test_momentum_side_records_no_gradient(method, calls):
    model, recorded = tiny(method), []
    for module in (model.momentum_encoder.norm, model.momentum_projector):
        module.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    model(*two_views(2))
    assert recorded == [False] * calls
    model.pivotal_patches(two_views(2)[0])
    assert recorded == [False] * (calls + 1)


# --- pictures and levels ----------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_pivotal_patches_are_most_important_patches_for_any_mask(importance, mask):
    model, images = tiny(mask=mask, importance=importance, keep_ratio=0.5), two_views(3)[0]
    with torch.no_grad():
        model.momentum_encoder.cls_token.normal_()  # so that the online ranking differs
    ranked = importance_by_name(model.momentum_encoder, images)
    passes, masks = record_passes(model), model.pivotal_patches(images)
    assert masks.dtype == torch.bool and masks.shape == (3, 16)
    assert torch.equal(masks, location_mask(ranked[importance], 0.5))
    assert passes == [Pass("momentum_encoder", IMPORTANCES[importance].attention_kind, 16, True)]


def test_pivotal_patches_of_mocov3_are_by_product_and_0_3():
    model, images = tiny(MoCoV3), two_views(3)[0]
    move_momentum_side(model)
    ranked = importance_by_name(model.momentum_encoder, images)
    online = importance_by_name(model.encoder, images)
    passes, masks = record_passes(model), model.pivotal_patches(images)
    assert masks.sum(1).tolist() == [4, 4, 4]
    assert torch.equal(masks, location_mask(ranked["product"], 0.3))
    for another in (ranked["last"], ranked["rollout"], online["product"]):
        assert not torch.equal(masks, location_mask(another, 0.3))
    assert passes == [Pass("momentum_encoder", "row", 16, True)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_chance_levels_equal_loss_of_constant_features(variant, temperature):
    method, options = VARIANTS[variant]
    model = tiny(method, temperature=temperature, **options)
    constant = torch.ones(6, 16, dtype=torch.float64)
    model.predictor.register_forward_hook(lambda *_: constant)
    model.momentum_projector.register_forward_hook(lambda *_: constant)
    output, levels = model(*two_views(6)), model.chance_levels(6)
    names = ["global_loss"] if method is MoCoV3 else ["global_loss", "local_loss"]
    assert list(levels) == names
    for name in names:
        assert levels[name] == pytest.approx(4 * temperature * math.log(6))
        assert getattr(output, name).item() == pytest.approx(levels[name], abs=1e-6)


# --- masks, importances and methods of one's own ----------------------------------------------


@pytest.mark.parametrize("needs_importance", [True, False])
def test_own_mask_needs_one_function_and_one_entry(needs_importance, monkeypatch):
    calls = []

    def own_mask(importance, keep_ratio, generator=None):
        calls.append((importance, keep_ratio, generator))
        mask = torch.zeros_like(importance, dtype=torch.bool)
        mask[:, [0, 5, 6, 11]] = True
        return mask

    monkeypatch.setitem(lodisc.MASKS, "own", Mask(own_mask, needs_importance))
    model, views, generator = tiny(mask="own"), two_views(), torch.Generator()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(model.encoder.blocks[0].mlp.fc1.weight)
    with torch.no_grad():
        expected = [attention_product(model.momentum_encoder.with_attention(view, "row")[1])
                    for view in views]
    output = model(*views, generator)
    output.total.backward()
    optimiser.step()
    assert not torch.equal(before, model.encoder.blocks[0].mlp.fc1.weight)
    assert len(calls) == 2
    for call, importance, mask in zip(calls, expected, output.masks):
        assert mask.nonzero()[:, 1].tolist() == [0, 5, 6, 11] * 6
        assert call[1:] == (0.3, generator)
        assert torch.equal(call[0], importance)


def test_own_importance_that_needs_patches_ranks_in_the_pass_of_the_key(monkeypatch):
    def by_norm(attentions, patches):
        return patches.norm(dim=2)

    monkeypatch.setitem(lodisc.IMPORTANCES, "own", Importance(by_norm, "row", needs_patches=True))
    model, views = tiny(importance="own"), two_views()
    move_momentum_side(model)
    with torch.no_grad():
        expected = [location_mask(model.momentum_encoder.tokens(view)[1].norm(dim=2), 0.3)
                    for view in views]
        keys = [model.key(view) for view in views]
    passes, output = record_passes(model), model(*views)
    assert all(torch.equal(a, b) for a, b in zip(output.masks, expected))
    assert passes.count(Pass("momentum_encoder", "row", 16, False)) == 2 and len(passes) == 6
    with torch.no_grad():
        assert torch.allclose(model.key_and_mask(views[0])[0], keys[0], atol=1e-9)
    assert torch.equal(model.pivotal_patches(views[0]), expected[0])


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


@pytest.mark.parametrize("method", [MoCoV3, LoDisc])
def test_losses_do_not_depend_on_progress(method):
    model, views = tiny(method), two_views()
    assert model(*views, progress=0.0)[:3] == model(*views, None, 1.0)[:3]


def test_heads_match_moco_v3():
    model = LoDisc(create_vit("vit_nano", 32, 8))
    assert model.temperature == 0.2
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
    x = torch.randn(5, 96)
    assert projector(96, 7, 3)(x).shape == (5, 3) and predictor(96, 7)(x).shape == (5, 96)


@pytest.mark.parametrize("mask", ["location", "least"])
def test_masks_of_diverged_encoder_keep_exactly_k(mask):
    """Check that no forward pass raises for NaN, which the training loop reports."""
    model, images = tiny(mask=mask), two_views(2)
    with torch.no_grad():
        model.momentum_encoder.cls_token.fill_(math.nan)
    assert model.key_and_mask(images[0])[1].sum(1).tolist() == [model.num_kept] * 2
    output = model(*images)
    assert output.total.isnan() and (output.masks[0].sum(1) == model.num_kept).all()


@pytest.mark.parametrize("call, says", [
    (lambda: tiny(mask="best"), "unknown mask 'best', have location, least"),
    (lambda: tiny(importance="mean"), "unknown importance 'mean', have product"),
    (lambda: tiny(local_input="words"), "unknown local_input 'words', have pixels, tokens"),
    (lambda: tiny(local_input="crop", mask="random"), "chooses a box, not mask 'random'"),
    (lambda: tiny(keep_ratio=2), "(0, 1], got 2"),
    (lambda: tiny(keep_ratio=0), "(0, 1], got 0"),
    (lambda: tiny(keep_ratio=1.01), "got 1.01"),
    (lambda: tiny(keep_ratio=math.nan), "got nan"),
    (lambda: tiny(temperature=0), "above 0"),
    (lambda: tiny(MoCoV3, temperature=-0.2), "above 0, got -0.2"),
    (lambda: tiny()(*two_views(1)), "batch of one"),
    (lambda: tiny(MoCoV3)(*two_views(1)), "batch of one"),
    (lambda: tiny()(two_views()[0], two_views(5)[0]), "(6, 3, 32, 32) and (5, 3, 32, 32)"),
    (lambda: tiny(MoCoV3)(two_views()[0], two_views(5)[0]), "(5, 3, 32, 32)"),
])
def test_invalid_arguments_raise_value_error(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
