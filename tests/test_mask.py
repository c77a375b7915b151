"""The location-wise mask and its ablations: invariants, and references in loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lodisc import (MASKS, Mask, box_mask, enlarge_box, kept_count, kept_indices, least_mask,
                    location_mask, mask_pixels, random_mask)

ratios = st.floats(0.01, 1.0)


@st.composite
def importances(draw, distinct=False):
    """Draw (B, N) float32, multiples of 1/8, with ties likely unless distinct."""
    batch, patches = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    values = st.integers(-200, 200) if distinct else st.integers(-3, 3)
    rows = [draw(st.lists(values, min_size=patches, max_size=patches, unique=distinct))
            for _ in range(batch)]
    return torch.tensor(rows, dtype=torch.float32) / 8


@given(importances(), ratios)
def test_location_mask_matches_loop(importance, ratio):
    batch, patches = importance.shape
    k = max(1, math.floor(ratio * patches + 1e-9))
    mask = location_mask(importance, ratio)
    assert mask.dtype == torch.bool and mask.shape == importance.shape
    for b in range(batch):
        order = sorted(range(patches), key=lambda i: (-importance[b, i].item(), i))
        assert sorted(order[:k]) == mask[b].nonzero().flatten().tolist()


@given(importances(), ratios)
def test_location_mask_keeps_top_k(importance, ratio):
    mask = location_mask(importance, ratio)
    for values, kept in zip(importance, mask):
        if not kept.all():
            assert values[kept].min() >= values[~kept].max()


@given(importances(distinct=True), ratios, st.randoms(use_true_random=False))
def test_location_mask_is_permutation_equivariant(importance, ratio, random):
    order = list(range(importance.shape[1]))
    random.shuffle(order)
    assert torch.equal(location_mask(importance[:, order], ratio),
                       location_mask(importance, ratio)[:, order])


@given(importances(distinct=True), ratios)
def test_location_mask_depends_on_order_only(importance, ratio):
    mask = location_mask(importance, ratio)
    for transform in (lambda x: 3 * x - 7, lambda x: x.double().exp(), torch.atan,
                      lambda x: x.half()):
        assert torch.equal(location_mask(transform(importance), ratio), mask)


@given(importances(), ratios)
def test_location_mask_is_independent_across_images(importance, ratio):
    together = location_mask(importance, ratio)
    alone = torch.cat([location_mask(row[None], ratio) for row in importance])
    assert torch.equal(together, alone)


@given(importances(distinct=True), ratios)
def test_least_mask_keeps_bottom_k(importance, ratio):
    k = location_mask(importance, ratio)[0].sum()
    for values, kept in zip(importance, least_mask(importance, ratio)):
        assert kept.sum() == k
        assert kept.all() or values[kept].max() < values[~kept].min()


def test_location_mask_keeps_exactly_k():
    assert location_mask(torch.randn(2, 196), 0.3).sum(1).tolist() == [58, 58]
    assert location_mask(torch.randn(1, 10), 0.3).sum() == 3  # 0.3 * 10 rounds below 3
    assert location_mask(torch.randn(1, 100), 0.29).sum() == 29  # 28.999999999999996
    assert location_mask(torch.randn(1, 10), 1e-6).sum() == 1
    assert location_mask(torch.randn(1, 10), 1.0).all()
    assert [kept_count(196, 0.3), kept_count(100, 0.29), kept_count(10, 1e-6)] == [58, 29, 1]


@pytest.mark.parametrize("mask", [location_mask, least_mask])
def test_masks_of_nan_keep_exactly_k(mask):
    """A diverged encoder does not end a step: the training loop reports it."""
    importance = torch.randn(3, 50)
    importance[1, ::2], importance[2] = math.nan, math.nan
    assert mask(importance, 0.3).sum(1).tolist() == [15, 15, 15]
    assert torch.equal(mask(importance, 0.3)[0], mask(importance[:1], 0.3)[0])


def test_ties_keep_lower_indices():
    for mask in (location_mask, least_mask):
        kept = mask(torch.zeros(1, 300), 0.5)[0].nonzero().flatten()
        assert kept.tolist() == list(range(150))


def test_masks_of_registry():
    expected = {"location": Mask(location_mask, True), "least": Mask(least_mask, True),
                "random": Mask(random_mask, False)}
    assert MASKS.items() >= expected.items()
    assert Mask(location_mask).needs_importance


@given(st.integers(1, 20), st.integers(1, 15), ratios, st.integers(0, 1000))
def test_every_mask_keeps_exactly_k(batch, side, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    for entry in MASKS.values():
        mask = entry.function(torch.randn(batch, side * side), ratio, generator)
        assert mask.dtype == torch.bool and mask.shape == (batch, side * side)
        assert (mask.sum(1) == max(1, math.floor(ratio * side * side + 1e-9))).all()


@pytest.mark.parametrize("name", MASKS)
def test_masks_depend_on_importance_or_generator_only(name):
    function, needs_importance = MASKS[name]
    importance, state = torch.randn(8, 64), torch.get_rng_state()
    unused = torch.full((8, 64), math.nan, dtype=torch.float64)  # only its shape matters
    first = function(importance, 0.3, torch.Generator().manual_seed(1))
    again = function(importance if needs_importance else unused, 0.3,
                     torch.Generator().manual_seed(1))
    reseeded = function(importance, 0.3, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert torch.equal(first, reseeded) == needs_importance
    assert torch.equal(torch.get_rng_state(), state)  # torch's global generator is not used


@given(importances(), ratios)
def test_kept_indices_are_ascending(importance, ratio):
    mask = location_mask(importance, ratio)
    expected = torch.stack([row.nonzero().flatten() for row in mask])
    assert torch.equal(kept_indices(mask, expected.shape[1]), expected)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_mask_pixels_matches_loop(batch, rows, columns, patch):
    images = torch.randn(batch, 3, rows * patch, columns * patch)
    mask = torch.rand(batch, rows * columns) < 0.5
    before, result = images.clone(), mask_pixels(images, mask, patch)
    assert torch.equal(images, before)
    for b in range(batch):
        for y in range(rows * patch):
            for x in range(columns * patch):
                kept = mask[b, (y // patch) * columns + x // patch]
                assert torch.equal(result[b, :, y, x], images[b, :, y, x] * kept)


# --- the box of local_input "crop" ------------------------------------------------------------


def box_by_hand(importance, side, ratio):
    """Return (row, column, side) of the best box of one image, in loops: the first of the best."""
    box = max(1, round((ratio * side * side) ** 0.5))
    best = None
    for row in range(side - box + 1):
        for column in range(side - box + 1):
            total = sum(importance[side * y + x].item() for y in range(row, row + box)
                        for x in range(column, column + box))
            if best is None or total > best[0]:
                best = total, row, column
    return (*best[1:], box)


@given(st.integers(1, 9), ratios, st.integers(0, 1000))
def test_box_mask_matches_loop(side, ratio, seed):
    """Of small multiples of 1/8, so that sums are exact and ties are likely."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(-3, 4, (3, side * side), generator=generator) / 8
    mask = box_mask(importance, ratio)
    assert mask.dtype == torch.bool and mask.shape == importance.shape
    for values, kept in zip(importance, mask):
        row, column, box = box_by_hand(values, side, ratio)
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[row:row + box, column:column + box] = True
        assert torch.equal(kept.view(side, side), expected)


def test_box_has_about_the_keep_ratio():
    for side, ratio, box in ((7, 0.3, 4), (16, 0.3, 9), (6, 0.3, 3), (7, 1.0, 7), (7, 0.001, 1)):
        assert box_mask(torch.zeros(1, side * side), ratio).sum() == box * box


def test_enlarged_box_is_the_box_resized():
    images, importance = torch.rand(6, 3, 40, 40), torch.randn(6, 25)
    mask = box_mask(importance, 0.3)
    enlarged = enlarge_box(images, mask, 8, 3)
    assert enlarged.shape == images.shape
    for image, values, result in zip(images, importance, enlarged):
        row, column, box = box_by_hand(values, 5, 0.3)
        cut = image[:, 8 * row:8 * (row + box), 8 * column:8 * (column + box)]
        expected = torch.nn.functional.interpolate(cut[None], (40, 40), mode="bilinear",
                                                   antialias=True)[0]
        assert torch.allclose(result, expected, atol=1e-5)
    everything = torch.ones(6, 25, dtype=torch.bool)
    assert torch.allclose(enlarge_box(images, everything, 8, 5), images, atol=1e-6)
