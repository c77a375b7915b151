"""What the local branch sees: tests/experiments/controls.py, each choice against loops."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import controls
import eval as evaluation
import train
from controls import block_mask, first_component, object_importance
from data.augment import decode_map
from lodisc import (LoDisc, UserError, box_mask, create_vit, enlarge_box, location_mask,
                    mask_pixels, random_mask)

CONTROLS = Path(controls.__file__)
SMALL = ["--image-size", "24", "--patch-size", "8", "--epochs", "1", "--batch-size", "50",
         "--device", "cpu", "--workers", "0", "--out", "run"]
ratios = st.floats(0.01, 1.0)


def tiny(name, **options):
    torch.manual_seed(0)
    return getattr(controls, name)(create_vit("vit_nano", 56, 8), hidden_dim=32, output_dim=16,
                                   **options)


def views(batch=4):
    return torch.randn(2, batch, 3, 56, 56)


# --- places that no network chooses -----------------------------------------------------------


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


def test_block_is_drawn_for_each_view():
    model, (view1, view2) = tiny("Block"), views()
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    output = model(view1, view2, draws[0])
    unused = torch.zeros(4, 49)
    for mask in output.masks:
        assert torch.equal(mask, block_mask(unused, 0.3, draws[1]))


def test_box_anywhere_is_at_every_place_as_often():
    model, generator = tiny("Anywhere", local_input="crop"), torch.Generator().manual_seed(0)
    _, mask = model.key_and_mask(torch.randn(1600, 3, 56, 56), generator)
    assert (mask.sum(1) == 16).all()
    counts = Counter(mask.int().argmax(1).tolist())
    assert sorted(counts) == [7 * row + column for row in range(4) for column in range(4)]
    assert 60 < min(counts.values()) and max(counts.values()) < 145  # 100 expected
    again = model.key_and_mask(torch.randn(1600, 3, 56, 56), torch.Generator().manual_seed(0))[1]
    assert torch.equal(mask, again)


@pytest.mark.parametrize("local_input, kept", [("crop", 16), ("pixels", 14)])
def test_centre_is_around_the_middle(local_input, kept):
    model = tiny("Centre", local_input=local_input)
    key, mask = model.key_and_mask(views()[0])
    assert key.shape == (4, 16) and (mask.sum(1) == kept).all()
    rows, columns = mask[0].view(7, 7).nonzero().T
    if local_input == "crop":  # of the four middle boxes
        assert rows.min() == columns.min() == 1
    for line in (rows, columns):
        assert abs(line.double().mean() - 3) <= 0.5
        assert line.min() >= 1 and line.max() <= 5


def test_box_is_that_of_crop_at_its_own_scale():
    model, crop, (view, _) = tiny("Box"), tiny("LoDisc", local_input="crop"), views()
    key, mask = model.key_and_mask(view)
    theirs, mask_of_crop = crop.key_and_mask(view)
    assert torch.equal(mask, mask_of_crop) and torch.equal(mask, model.pivotal_patches(view))
    assert torch.equal(key, theirs) and len(mask.unique(dim=0)) > 1
    seen = mask_pixels(view, mask, 8)
    assert torch.equal(model.local_key(view, mask), model.key(seen))
    assert not torch.equal(model.local_key(view, mask), crop.local_key(view, mask))


# --- the first principal component ------------------------------------------------------------


@pytest.mark.parametrize("side", [5, 6, 7, 8, 14, 15, 16])
def test_first_component_is_that_of_a_decomposition(side):
    torch.manual_seed(side)
    patches = torch.randn(5, side * side, 12, dtype=torch.float64)
    patches[:, :, 3] *= 4
    width = {5: 1, 6: 2, 7: 3, 8: 2, 14: 4, 15: 5, 16: 6}[side]  # patches of the inner third
    first = (side - width) // 2
    inner = torch.zeros(side, side, dtype=torch.bool)
    inner[first:first + width, first:first + width] = True
    inner = inner.flatten()
    for sign in (1, -1):
        patches[:, inner, 3] = sign * 9 + torch.randn(5, int(inner.sum()), dtype=torch.float64)
        points = patches.flatten(0, 1).numpy()
        points = points - points.mean(0)
        _, _, directions = np.linalg.svd(points)
        expected = torch.from_numpy(points @ directions[0]).view(5, -1)
        if expected[:, inner].mean() < expected[:, ~inner].mean():
            expected = -expected
        scores = first_component(patches)
        assert torch.allclose(scores, expected, atol=1e-8)
        assert scores[:, inner].mean() > scores[:, ~inner].mean()
    half = first_component(patches.half().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first_component(patches.half()), half)  # never in half precision


def test_sign_of_the_first_component_is_by_the_inner_third():
    """A ring between the inner third and the inner half is far on the other side."""
    torch.manual_seed(0)
    patches = torch.randn(3, 16, 16, 4)
    patches[:, 4:12, 4:12, 2] = -30
    patches[:, 5:11, 5:11, 2] = 9
    scores = first_component(patches.flatten(1, 2)).view(3, 16, 16)
    assert scores[:, 5:11, 5:11].mean() > scores[:, 4, 4:12].mean()


@torch.no_grad()
def test_first_component_chooses_from_the_momentum_encoders_tokens():
    model, (view, _) = tiny("FirstComponent", local_input="crop"), views()
    for parameter in model.momentum_encoder.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    key, mask = model.key_and_mask(view)
    features, patches = model.momentum_encoder.tokens(view)
    assert torch.equal(mask, box_mask(first_component(patches), 0.3))
    assert torch.allclose(key, model.momentum_projector(features), atol=1e-6)


# --- the object -------------------------------------------------------------------------------


def ranked_by_hand(view_map, size):
    """Return the order of an image's patches in loops: cover, then distance to the centroid."""
    side = len(view_map) // size
    rows, columns = np.nonzero(view_map)
    centre = (size * side - 1) / 2, (size * side - 1) / 2
    if len(rows):
        centre = rows.mean(), columns.mean()
    ranks = []
    for row in range(side):
        for column in range(side):
            patch = view_map[size * row:size * (row + 1), size * column:size * (column + 1)]
            middle = size * row + (size - 1) / 2, size * column + (size - 1) / 2
            distance = math.dist(middle, centre)
            ranks.append((-np.count_nonzero(patch), round(distance, 6)))
    return ranks


@given(st.integers(0, 1000), st.integers(2, 6))
def test_object_importance_ranks_by_cover_then_by_distance(seed, side):
    rng = np.random.default_rng(seed)
    view_map = np.zeros((4 * side, 4 * side), dtype=np.uint8)
    if seed % 5:
        top, left = rng.integers(0, 4 * side, 2)
        view_map[top:top + rng.integers(1, 12), left:left + rng.integers(1, 12)] = 1
    importance = object_importance(torch.from_numpy(view_map)[None], 4)[0]
    ranks = ranked_by_hand(view_map, 4)
    order = importance.argsort(descending=True).tolist()
    assert [ranks[i] for i in order] == sorted(ranks)


@pytest.mark.parametrize("local_input, choose", [("pixels", location_mask), ("crop", box_mask)])
@pytest.mark.parametrize("name, sign", [("Oracle", 1), ("Antioracle", -1)])
def test_oracle_sees_most_or_least_of_the_object(name, sign, local_input, choose):
    model, (view1, view2) = tiny(name, local_input=local_input, local_weight=0.5), views()
    maps = torch.zeros(2, 4, 56, 56, dtype=torch.uint8)
    maps[0, :3, 5:30, 20:50] = 1  # nothing in the last image
    maps[1, :2, 30:, :9] = 1
    output = model(view1, view2, maps=tuple(maps))
    for mask, view_map in zip(output.masks, maps):
        assert torch.equal(mask, choose(sign * object_importance(view_map, 8), 0.3))
    assert output.no_object == 3 / 8  # of eight views, three
    plain = LoDisc.forward(tiny_with_masks(model, output.masks), view1, view2)
    for field in ("total", "global_loss", "local_loss"):
        assert getattr(output, field).item() == pytest.approx(getattr(plain, field).item(),
                                                              rel=1e-5)
    assert model.pivotal_patches(view1) is None
    seen, = model.drawn_views(view1, maps[0]).values()
    expected = mask_pixels(view1, output.masks[0], 8)
    if local_input == "crop":
        expected = enlarge_box(view1, output.masks[0], 8, 4)
    assert torch.equal(seen, expected)


def tiny_with_masks(model, masks):
    """Return the model with these masks in place of those that key_and_mask chooses."""
    rest = iter(masks)
    model.key_and_mask = lambda view, generator=None: (model.key(view), next(rest))
    return model


@pytest.mark.usefixtures("elsewhere", "quick_probe")
@pytest.mark.parametrize("options", [[], ["--local-input", "crop"]])
def test_oracle_trains_on_data_with_regions(few_birds, options):
    train.main([*SMALL, "--method", f"{CONTROLS}:Oracle", *options])
    row = Path("run/metrics.csv").read_text(encoding="utf-8").splitlines()
    assert "no_object" in row[0]
    maps = evaluation.read_maps(Path("run"), train.load_data("synthetic").train)
    assert len(maps) == 200
    birds = train.load_data("synthetic").train
    for index in (0, 7):
        expected = np.asarray(birds.regions(index)) >= 1  # BIRD and PART
        assert np.array_equal(np.asarray(decode_map(maps[index])), expected)
    evaluation.main(["masks", "run", "--device", "cpu", "--workers", "0"])
    assert Path("run/masks.png").exists()


@pytest.mark.parametrize("name, option", [
    ("Oracle", ["--mask", "random"]), ("Centre", ["--importance", "last"]),
    ("Block", ["--local-input", "crop"]), ("FirstComponent", ["--mask", "least"])])
def test_option_that_a_control_would_ignore_is_an_error(flowers, elsewhere, name, option):
    with pytest.raises(UserError, match=f"{option[0]} is no option of --method .*:{name}"):
        train.main(["--data", str(flowers), *SMALL, "--arch", "vit_nano", "--batch-size", "12",
                    "--method", f"{CONTROLS}:{name}", *option])
    assert not Path("run").exists()


def test_first_component_of_diverged_tokens_is_finite():
    patches = torch.randn(2, 9, 5)
    patches[0, 3] = math.nan
    assert first_component(patches).isfinite().all()


def test_oracle_of_data_without_regions_is_one_line(flowers, elsewhere):
    with pytest.raises(UserError, match="the oracle needs data with regions: synthetic or cub"):
        train.main(["--data", str(flowers), *SMALL, "--arch", "vit_nano", "--batch-size", "12",
                    "--method", f"{CONTROLS}:Oracle"])
    assert not Path("run").exists()
