"""The picture of a run: what it shows is what happened."""

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data.draw import BLUE, FRAME, GAP, HEIGHT, ORANGE, WIDTH, colours_of, mask_sheet, run_sheet


def sheet(losses={"global_loss": [3.0, 2.0, 1.0]}, metrics=None, moments=8):
    history = [{"epoch": epoch, "total": 9.0, **dict(zip(losses, row))}
               for epoch, row in enumerate(zip(*losses.values()), start=1)]
    masks = torch.zeros(8, 4, dtype=torch.bool)
    masks[:, 1] = True  # upper right
    film = [(epoch, masks if epoch < 3 else ~masks) for epoch in range(moments)]
    images = [Image.new("RGB", (16, 16), (200, 20 * i, 90)) for i in range(8)]
    levels = dict.fromkeys(losses, 3.5)
    return np.asarray(run_sheet(history, levels, metrics, images, film).convert("RGB")).astype(int)


def near(pixels, colour):
    return np.abs(pixels - colour).max(-1) < 12


def test_the_film_has_a_row_per_image_and_a_column_per_moment():
    pixels = sheet()
    assert pixels.shape[1] == WIDTH and pixels.shape[0] >= HEIGHT + 8 * FRAME
    for row in range(8):
        for column in range(9):
            left, top = column * FRAME + GAP, HEIGHT + 32 + row * FRAME
            tile = near(pixels[top:top + FRAME - GAP, left:left + FRAME - GAP],
                        (200, 20 * row, 90))
            half = tile.shape[0] // 2
            upper_right, lower_left = tile[5:half - 5, half + 5:-5], tile[half + 5:-5, 5:half - 5]
            assert upper_right.mean() == (1 if column <= 3 else 0)  # column 0: the picture itself
            assert lower_left.mean() == (1 if column == 0 or column > 3 else 0)


def test_curves_fall_as_the_losses_do():
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


def test_bars_are_as_high_as_the_metrics():
    metrics = {"raw pixels": {"linear top-1": 0.2}, "untrained": {"linear top-1": 0.4},
               "trained": {"linear top-1": 0.8}}
    panel = sheet(metrics=metrics)[41:HEIGHT - 60, WIDTH // 2 + 30:]
    heights = [near(panel, colour).sum(0).max() for colour in (ORANGE, BLUE)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=4)
    assert heights[1] == pytest.approx(0.8 * len(panel), abs=12)


@pytest.mark.usefixtures("elsewhere")
def test_a_run_without_test_images_is_drawn(flowers):
    train.main(["--data", str(flowers / "train"), "--arch", "vit_nano", "--image-size", "16",
                "--patch-size", "8", "--epochs", "1", "--batch-size", "12", "--workers", "0",
                "--device", "cpu", "--method", "global", "--out", "run"])
    with Image.open("run/run.png") as image:
        assert image.size[0] == WIDTH


def test_at_most_eight_moments_first_and_last_among_them_are_drawn():
    pixels, few = sheet(moments=30), sheet(moments=3)
    assert pixels.shape == sheet().shape == few.shape
    columns = [near(pixels[HEIGHT + 32 + GAP:HEIGHT + FRAME, x * FRAME + GAP:(x + 1) * FRAME],
                    (200, 0, 90)).mean() for x in range(9)]
    assert columns[0] > 0.9 and 0.2 < columns[1] < 0.4 and columns[2] > 0.5  # epochs 0 and 4


def test_names_that_are_not_known_have_colours_of_their_own():
    colours = colours_of(["global loss", "third loss", "fourth loss"])
    assert len(set(colours.values())) == 3 and colours["global loss"] == BLUE


def test_a_branch_that_is_never_used_is_not_drawn():
    with_zeros = sheet({"global_loss": [3.0, 2.0], "local_loss": [0.0, 0.0]})
    assert np.array_equal(with_zeros, sheet({"global_loss": [3.0, 2.0]}))


def test_mask_sheet_without_masks_has_two_rows():
    images = [Image.new("RGB", (16, 16), (200, 9, 90))]
    importance, masks = torch.arange(4.0)[None], torch.tensor([[True, False, False, False]])
    two, three = mask_sheet(images, importance, None), mask_sheet(images, importance, masks)
    assert three.height - two.height == 132 and two.width == three.width
