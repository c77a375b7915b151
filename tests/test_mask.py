"""The location-wise mask and its ablations: invariants, and references in loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lodisc import block_mask, kept_indices, least_mask, location_mask, mask_pixels, random_mask

ratios = st.floats(0.01, 1.0)


@st.composite
def importances(draw, distinct=False):
    """(B, N) float32, ties likely unless distinct; distinct ones are whole multiples of 1/8."""
    batch, patches = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    values = st.integers(-200, 200) if distinct else st.integers(-3, 3)
    rows = [draw(st.lists(values, min_size=patches, max_size=patches, unique=distinct))
            for _ in range(batch)]
    return torch.tensor(rows, dtype=torch.float32) / 8


@given(importances(), ratios)
def test_mask_against_a_loop(importance, ratio):
    batch, patches = importance.shape
    k = max(1, math.floor(ratio * patches + 1e-9))
    mask = location_mask(importance, ratio)
    assert mask.dtype == torch.bool and mask.shape == importance.shape
    for b in range(batch):
        order = sorted(range(patches), key=lambda i: (-importance[b, i].item(), i))
        assert sorted(order[:k]) == mask[b].nonzero().flatten().tolist()


@given(importances(), ratios)
def test_top_k_property(importance, ratio):
    mask = location_mask(importance, ratio)
    for values, kept in zip(importance, mask):
        if not kept.all():
            assert values[kept].min() >= values[~kept].max()


@given(importances(distinct=True), ratios, st.randoms(use_true_random=False))
def test_permutation_equivariance(importance, ratio, random):
    order = list(range(importance.shape[1]))
    random.shuffle(order)
    assert torch.equal(location_mask(importance[:, order], ratio),
                       location_mask(importance, ratio)[:, order])


@given(importances(distinct=True), ratios)
def test_increasing_transforms_change_nothing(importance, ratio):
    mask = location_mask(importance, ratio)
    for transform in (lambda x: 3 * x - 7, lambda x: x.double().exp(), torch.atan,
                      lambda x: x.half()):
        assert torch.equal(location_mask(transform(importance), ratio), mask)


@given(importances(), ratios)
def test_nothing_depends_on_the_other_images(importance, ratio):
    together = location_mask(importance, ratio)
    alone = torch.cat([location_mask(row[None], ratio) for row in importance])
    assert torch.equal(together, alone)


@given(importances(distinct=True), ratios)
def test_least_mask_keeps_the_other_end(importance, ratio):
    k = location_mask(importance, ratio)[0].sum()
    for values, kept in zip(importance, least_mask(importance, ratio)):
        assert kept.sum() == k
        assert kept.all() or values[kept].max() < values[~kept].min()


def test_keep_ratios_of_the_paper():
    assert location_mask(torch.randn(2, 196), 0.3).sum(1).tolist() == [58, 58]
    assert location_mask(torch.randn(1, 10), 0.3).sum() == 3  # 0.3 * 10 rounds below 3
    assert location_mask(torch.randn(1, 100), 0.29).sum() == 29  # 28.999999999999996
    assert location_mask(torch.randn(1, 10), 1e-6).sum() == 1
    assert location_mask(torch.randn(1, 10), 1.0).all()


def test_equal_importances_keep_the_lower_indices():
    assert location_mask(torch.zeros(1, 300), 0.5)[0].nonzero().flatten().tolist() == list(range(150))


@given(st.integers(1, 20), st.integers(1, 15), ratios, st.integers(0, 1000))
def test_random_and_block_masks_keep_exactly_k(batch, side, ratio, seed):
    k = max(1, math.floor(ratio * side * side + 1e-9))
    for draw in (random_mask, block_mask):
        mask, again = (draw(batch, side * side, ratio, torch.Generator().manual_seed(seed))
                       for _ in range(2))
        assert mask.dtype == torch.bool and mask.shape == (batch, side * side)
        assert (mask.sum(1) == k).all()
        assert torch.equal(mask, again)


@given(st.integers(2, 15), ratios, st.integers(0, 1000))
def test_block_mask_is_a_rectangle_but_for_its_trimmed_column(side, ratio, seed):
    for mask in block_mask(8, side * side, ratio, torch.Generator().manual_seed(seed)):
        grid = mask.view(side, side)
        rows, columns = grid.nonzero().T
        box = grid[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        height, width = box.shape
        assert 0 <= height * width - mask.sum() < height
        if not box[:, 0].all():  # the trimmed column stands at the other end
            box = box.flip(0, 1)
        assert box[:, : width - 1].all()
        assert box[: box[:, -1].sum(), -1].all()


def test_block_and_random_masks_vary_in_place_and_shape():
    generator = torch.Generator().manual_seed(0)
    blocks = block_mask(400, 64, 0.3, generator).view(400, 8, 8)
    heights = blocks.any(2).sum(1)
    assert heights.unique().numel() >= 4
    assert blocks.float().mean(0).min() > 0.03  # every patch gets its turn
    share = random_mask(400, 64, 0.3, generator).float().mean(0)
    assert (share - 19 / 64).abs().max() < 0.12


def test_block_masks_are_up_to_three_times_as_high_or_low_as_square_and_lie_anywhere():
    generator = torch.Generator().manual_seed(0)
    blocks = block_mask(20_000, 400, 0.04, generator).view(-1, 20, 20)  # 16 patches each
    heights = blocks.any(2).sum(1)
    assert (heights.min(), heights.max()) == (1, 12)
    corner = blocks[heights == 4].flatten(1).int().argmax(1)  # the upper left one of squares
    for place in (corner // 20, corner % 20):
        counts = place.bincount()
        assert len(counts) == 17 and counts.max() < 1.6 * len(corner) / 17
        assert counts.min() > 0.6 * len(corner) / 17


@given(importances(), ratios)
def test_kept_indices(importance, ratio):
    mask = location_mask(importance, ratio)
    expected = torch.stack([row.nonzero().flatten() for row in mask])
    assert torch.equal(kept_indices(mask, expected.shape[1]), expected)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_mask_pixels_against_a_loop(batch, rows, columns, patch):
    images = torch.randn(batch, 3, rows * patch, columns * patch)
    mask = torch.rand(batch, rows * columns) < 0.5
    before, result = images.clone(), mask_pixels(images, mask, patch)
    assert torch.equal(images, before)
    for b in range(batch):
        for y in range(rows * patch):
            for x in range(columns * patch):
                kept = mask[b, (y // patch) * columns + x // patch]
                assert torch.equal(result[b, :, y, x], images[b, :, y, x] * kept)


@pytest.mark.parametrize("call, says", [
    (lambda: location_mask(torch.zeros(5), 0.3), "(5,)"),
    (lambda: location_mask(torch.zeros(2, 0), 0.3), "(2, 0)"),
    (lambda: location_mask(torch.zeros(2, 5), 0.0), "got 0.0"),
    (lambda: location_mask(torch.zeros(2, 5), 1.1), "got 1.1"),
    (lambda: location_mask(torch.zeros(2, 5), float("nan")), "got nan"),
    (lambda: location_mask(torch.tensor([[0.0, float("nan")]]), 0.5), "NaN"),
    (lambda: least_mask(torch.tensor([[0.0, float("nan")]]), 0.5), "NaN"),
    (lambda: block_mask(2, 12, 0.3), "12"),
    (lambda: mask_pixels(torch.zeros(3, 8, 8), torch.ones(1, 4).bool(), 4), "(3, 8, 8)"),
    (lambda: mask_pixels(torch.zeros(1, 3, 8, 9), torch.ones(1, 4).bool(), 4), "8 x 9"),
    (lambda: mask_pixels(torch.zeros(1, 3, 9, 8), torch.ones(1, 4).bool(), 4), "9 x 8"),
    (lambda: mask_pixels(torch.zeros(1, 3, 8, 8), torch.ones(1, 4).bool(), 0), "patches of 0"),
    (lambda: mask_pixels(torch.zeros(2, 3, 8, 8), torch.ones(1, 4).bool(), 4), "(2, 4)"),
    (lambda: mask_pixels(torch.zeros(1, 3, 8, 8), torch.ones(1, 4), 4), "float32"),
])
def test_what_cannot_be_right_is_rejected(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)


def test_the_look_for_nan_can_be_skipped():
    mask = location_mask(torch.tensor([[0.0, float("nan"), 1.0]]), 0.34, check=False)
    assert mask.sum() == 1
