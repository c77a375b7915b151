"""The location-wise mask and its ablations: invariants, and references in loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lodisc import (MASKS, Mask, block_mask, kept_count, kept_indices, least_mask, location_mask,
                    mask_pixels, random_mask)

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
                "random": Mask(random_mask, False), "block": Mask(block_mask, False)}
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


def full_except_last_row(box):
    """Return whether a box (rows, columns) is full except at the end of its first or last row."""
    last = box[-1] if box[0].all() else box[0]
    full = box[:-1] if box[0].all() else box[1:]
    return bool(full.all() and last[: last.sum()].all())


@given(st.integers(2, 15), ratios, st.integers(0, 1000))
def test_block_mask_is_a_rectangle_with_one_incomplete_side(side, ratio, seed):
    importance = torch.zeros(8, side * side)
    for mask in block_mask(importance, ratio, torch.Generator().manual_seed(seed)):
        grid = mask.view(side, side)
        rows, columns = grid.nonzero().T
        box = grid[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        assert full_except_last_row(box) or full_except_last_row(box.T)


def test_block_and_random_masks_vary_in_position_and_shape():
    importance, generator = torch.zeros(400, 64), torch.Generator().manual_seed(0)
    blocks = block_mask(importance, 0.3, generator).view(400, 8, 8)
    for sides in (blocks.any(2).sum(1), blocks.any(1).sum(1)):
        assert sides.unique().numel() >= 4
    frequency = random_mask(importance, 0.3, generator).float().mean(0)
    assert (frequency - 19 / 64).abs().max() < 0.12


def test_block_mask_aspect_ratio_is_up_to_three():
    blocks = block_mask(torch.zeros(4000, 1600), 0.05, torch.Generator().manual_seed(0))
    blocks = blocks.view(-1, 40, 40)  # 80 patches each
    heights, widths = blocks.any(2).sum(1), blocks.any(1).sum(1)
    border = torch.ones(40, 40, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    inside = ~(blocks & border).flatten(1).any(1)  # the grid's border cuts the other blocks
    assert inside.sum() > 1000
    for high, wide in ((heights, widths), (widths, heights)):
        aspect = (high / wide)[inside]
        assert 2.5 < aspect.quantile(0.99) < 3.3 and aspect.max() < 3.5
        assert 0.4 < (aspect > 1).float().mean() < 0.6


def test_block_mask_keeps_all_patches_about_equally_often():
    blocks = block_mask(torch.zeros(20_000, 400), 0.04, torch.Generator().manual_seed(0))
    frequency = blocks.float().mean(0).view(20, 20)
    assert 0.4 * 0.04 < frequency.min() and frequency.max() < 1.4 * 0.04
    for mirrored in (frequency.flip(0), frequency.flip(1), frequency.T):  # no preferred side
        assert (frequency - mirrored).abs().max() < 0.01


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
