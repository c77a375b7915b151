"""run.png and the mask sheet, from arrays; the order of imports."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data.draw import (BLUE, FRAME, GAP, GREY, HEIGHT, ORANGE, PART_COLOURS, WIDTH, colours_of,
                       example_indices, mask_sheet, part_colours, run_sheet)
from data.draw import sheet as rows_sheet

ROOT = Path(__file__).parent.parent
ORDER = ["lodisc", "data", "eval", "train"]  # a module imports none to its right


def sheet(losses={"global_loss": [3.0, 2.0, 1.0]}, metrics=None, epochs=8, level=3.5):
    history = [{"epoch": epoch, "total": 9.0, **dict(zip(losses, row))}
               for epoch, row in enumerate(zip(*losses.values()), start=1)]
    masks = torch.zeros(8, 4, dtype=torch.bool)
    masks[:, 1] = True  # upper right
    film = [(epoch, masks if epoch < 3 else ~masks) for epoch in range(epochs)]
    film[-1] = epochs - 1, torch.ones_like(masks) if epochs > 8 else film[-1][1]
    images = [Image.new("RGB", (16, 16), (200, 20 * i, 90)) for i in range(8)]
    levels = dict.fromkeys(losses, level)
    return np.asarray(run_sheet(history, levels, metrics, images, film).convert("RGB")).astype(int)


def near(pixels, colour):
    return np.abs(pixels - colour).max(-1) < 12


def test_film_has_a_row_per_image_and_a_column_per_epoch():
    pixels = sheet()
    assert pixels.shape[1] == WIDTH and pixels.shape[0] >= HEIGHT + 8 * FRAME
    for row in range(8):
        for column in range(9):
            left, top = column * FRAME + GAP, HEIGHT + 32 + row * FRAME
            tile = near(pixels[top:top + FRAME - GAP, left:left + FRAME - GAP],
                        (200, 20 * row, 90))
            half = tile.shape[0] // 2
            upper_right, lower_left = tile[5:half - 5, half + 5:-5], tile[half + 5:-5, 5:half - 5]
            assert upper_right.mean() == (1 if column <= 3 else 0)  # column 0: the image itself
            assert lower_left.mean() == (1 if column == 0 or column > 3 else 0)


@pytest.mark.parametrize("epochs, step, rows", [
    (1, 133, 2), (2, 100, 2), (4, 120, 4), (7, 133, 8), (9, 133, 8)])
def test_film_of_few_epochs_has_images_side_by_side(epochs, step, rows):
    """epochs: with epoch 0; at most eight are drawn."""
    pixels = sheet(epochs=epochs)
    columns = min(8, epochs) + 1
    assert pixels.shape == (HEIGHT + 40 + rows * step, WIDTH, 3)
    for i in range(8):
        left, top = i // rows * columns * step + GAP, HEIGHT + 32 + i % rows * step
        tiles = pixels[top:top + step - GAP, left:left + columns * step - GAP]
        image = tiles[:, :step - GAP]
        assert near(image, (200, 20 * i, 90)).all()
        assert 0 < near(tiles[:, step:], (200, 20 * i, 90)).mean() < 0.9  # its own patches
    heads = pixels[HEIGHT + 8:HEIGHT + 26]
    for group in range(-(-8 // rows)):
        left = group * columns * step
        assert (heads[:, left:left + columns * step].min(-1) < 100).any()


def test_held_out_retrieval_has_its_own_part():
    """Of a history whose first row lacks it: two lines, rank-1 rising and mAP falling."""
    history = [{"epoch": epoch, "total_loss": 3.0 - 0.1 * epoch} for epoch in range(1, 6)]
    for row in history[1:]:
        row |= {"rank1": 0.1 * row["epoch"], "mAP": 0.6 - 0.1 * row["epoch"]}
    pixels = np.asarray(run_sheet(history, {}, {}, [], []).convert("RGB")).astype(int)
    start, end = 400, 630
    panel = pixels[40:HEIGHT - 60, start + 1:end + 4]
    for colour, falls in ((BLUE, False), (ORANGE, True)):
        rows, columns = near(panel, colour).nonzero()
        first = rows[columns < columns.min() + 5].mean()
        last = rows[columns > columns.max() - 5].mean()
        assert (last > first) == falls and abs(last - first) > 100
        assert columns.min() > 0.3 * (end - start)  # from the second of five epochs on
    losses = pixels[40:HEIGHT - 60, 75:320]
    assert near(losses, BLUE).any() and not near(losses, ORANGE).any()


def test_curves_follow_the_losses():
    pixels = sheet({"global_loss": [3.0, 2.0, 1.0], "local_loss": [3.2, 3.1, 3.0]})
    panel = pixels[40:HEIGHT - 55, 75:WIDTH // 2 - 40]
    heights = []
    for colour in (BLUE, ORANGE):
        rows, columns = near(panel, colour).nonzero()
        first, last = rows[columns < 200].mean(), rows[columns > columns.max() - 20].mean()
        heights.append((first, last))
    (blue_first, blue_last), (orange_first, orange_last) = heights
    assert blue_last - blue_first > 100  # pixels downwards
    assert 5 < orange_last - orange_first < blue_last - blue_first
    assert orange_last < blue_last


def test_bar_heights_are_proportional_to_metrics():
    metrics = {"raw pixels": {"linear top-1": 0.2}, "untrained": {"linear top-1": 0.4},
               "trained": {"linear top-1": 0.8}}
    panel = sheet(metrics=metrics)[41:HEIGHT - 60, WIDTH // 2 + 30:]
    heights = [near(panel, colour).sum(0).max() for colour in (ORANGE, BLUE)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=4)
    assert heights[1] == pytest.approx(0.8 * len(panel), abs=12)


@pytest.mark.usefixtures("elsewhere")
def test_run_without_test_images_is_drawn(flowers):
    train.main(["--data", str(flowers / "train"), "--arch", "vit_nano", "--image-size", "16",
                "--patch-size", "8", "--epochs", "1", "--batch-size", "12", "--workers", "0",
                "--device", "cpu", "--method", "mocov3", "--out", "run"])
    with Image.open("run/run.png") as image:
        assert image.size[0] == WIDTH


def test_film_has_at_most_eight_epochs_with_first_and_last():
    assert sheet(epochs=30).shape == sheet().shape
    for epochs, fractions in ((30, [0.25] + 6 * [0.75] + [1]), (8, 3 * [0.25] + 5 * [0.75])):
        pixels = sheet(epochs=epochs)[HEIGHT + 32 + GAP:HEIGHT + 20 + FRAME]
        kept = [near(pixels[:, x * FRAME + GAP + 2:(x + 1) * FRAME - 2], (200, 0, 90)).mean()
                for x in range(1, len(fractions) + 1)]
        assert kept == pytest.approx(fractions, abs=0.1)


def test_chance_level_is_dashed_at_its_height():
    rows = []
    for level in (1.0, 2.0, 3.0):
        panel = sheet({"global_loss": [3.0, 2.0, 1.0]}, level=level)[40:HEIGHT - 60,
                                                                     72:WIDTH // 2 - 40]
        grey = near(panel, GREY)
        rows.append(grey.sum(1).argmax())
        assert 0.3 < grey[rows[-1]].mean() < 0.7
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=2) and rows[0] > rows[2] + 100


def test_total_is_drawn_for_method_without_loss_fields():
    page = run_sheet([{"epoch": 1, "total": 3.0}, {"epoch": 2, "total": 1.0}], {}, None,
                     [Image.new("RGB", (16, 16))] * 8, [])
    assert page.size == (WIDTH, HEIGHT)  # a method without masks has no film
    panel = np.asarray(page.convert("RGB")).astype(int)[40:HEIGHT - 55, 75:WIDTH // 2 - 40]
    rows, columns = near(panel, colours_of(["total"])["total"]).nonzero()
    assert rows[columns > columns.max() - 20].mean() - rows[columns < 260].mean() > 100


@pytest.mark.parametrize("n", [1, 5, 8, 60])
def test_example_indices_spread_over_the_images(n):
    assert {i % 4 for i in example_indices([i % 4 for i in range(64)])} == {0, 1, 2, 3}
    indices = example_indices([0] * n)
    assert len(indices) == 8 and indices == sorted(indices) and set(indices) <= set(range(n))
    assert len(set(indices)) == min(n, 8) and indices[-1] >= n * 7 // 8


def test_parts_have_distinct_colours():
    image = Image.new("RGB", (90, 90))
    page = np.asarray(part_colours(torch.arange(9) % 8, image))
    seen = [tuple(page[30 * (i // 3) + 15, 30 * (i % 3) + 15]) for i in range(9)]
    assert len(set(seen)) == len(PART_COLOURS) == 8 and seen[8] == seen[0]


def test_unknown_losses_have_distinct_colours():
    colours = colours_of(["global loss", "third loss", "fourth loss"])
    assert len(set(colours.values())) == 3 and colours["global loss"] == BLUE
    names = ["global loss", "local loss", "a", "b", "c"]
    assert list(map(len, (colours_of(names), set(colours_of(names).values())))) == [5, 5]


def test_mask_sheet_rows_are_image_importance_and_kept_patches():
    images = [Image.new("RGB", (16, 16), (200, 9, 90))]
    importance, masks = torch.arange(4.0)[None], torch.tensor([[False, False, True, False]])
    two, three = mask_sheet(images, importance, None), mask_sheet(images, importance, masks)
    assert three.height - two.height == 132 and two.width == three.width
    pixels = np.asarray(three).astype(int)
    assert np.array_equal(pixels[:two.height], np.asarray(two))
    image, heat, kept = (pixels[y:y + 128, -132:-4] for y in (4, 136, 268))
    assert near(image, (200, 9, 90)).all()
    brightness = [heat[y, x].sum() for y in (32, 96) for x in (32, 96)]
    assert brightness == sorted(brightness) and len(set(brightness)) == 4
    assert near(kept[70:, :60], (200, 9, 90)).all() and near(kept[:60], 0).all()
    assert near(kept[:, 70:], 0).all()


def test_parts_have_the_colours_of_the_legend():
    images, parts = [Image.new("RGB", (16, 16), (90, 90, 90))] * 8, torch.tensor([[0, 3, 1, 2]] * 8)
    page = np.asarray(rows_sheet({"image": (images, None), "parts": (images, parts)},
                                 ("ground", "body", "head", "wing"))).astype(int)
    tile = page[136:264, -132:-4]
    corners = [tile[32, 32], tile[96, 32], tile[96, 96], tile[32, 96]]  # ground, body, head, wing
    for corner, colour in zip(corners, PART_COLOURS):
        assert np.abs(corner - (0.35 * 90 + 0.65 * np.array(colour))).max() <= 1
    plain = np.asarray(rows_sheet({"image": (images, None), "parts": (images, parts)}))
    assert len(page) - len(plain) == 24 and np.array_equal(page[:len(plain)], plain)
    legend = page[len(plain):]
    columns = [near(legend, colour).any(0).nonzero()[0] for colour in PART_COLOURS[:4]]
    assert all(name.size and name.max() < later.min()  # all in one line, in order
               for name, later in zip(columns, [*columns[1:], np.array([page.shape[1]])]))


# --- imports ----------------------------------------------------------------------------------


def imports_of(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_imports_run_one_way():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]
    tests = {"tests", *(path.stem for path in ROOT.glob("tests/**/*.py"))}
    assert {path.stem for path in paths if path.parent == ROOT} == {*ORDER} - {"data"}
    for path in paths:
        place = ORDER.index("data" if path.parent.name == "data" else path.stem)
        assert not imports_of(path) & {*ORDER[place + 1:], *tests}, path
    assert "train" not in set().union(*map(imports_of, paths))


def test_draw_imports_no_project_module():
    assert not imports_of(ROOT / "data" / "draw.py") & set(ORDER)
