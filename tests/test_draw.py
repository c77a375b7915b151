"""The picture of a run: what it shows is what happened."""

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data.draw import BLUE, FRAME, GAP, HEIGHT, ORANGE, WIDTH, run_sheet


def sheet(losses={"global loss": [3.0, 2.0, 1.0]}, figures=None, moments=8):
    losses = {name: list(enumerate(values, start=1)) for name, values in losses.items()}
    masks = torch.zeros(8, 4, dtype=torch.bool)
    masks[:, 1] = True  # upper right
    film = [(epoch, masks if epoch < 3 else ~masks) for epoch in range(moments)]
    pictures = [Image.new("RGB", (16, 16), (200, 20 * i, 90)) for i in range(8)]
    return np.asarray(run_sheet(losses, 3.5, figures, pictures, film).convert("RGB")).astype(int)


def near(pixels, colour):
    return np.abs(pixels - colour).max(-1) < 12


def test_the_film_has_a_row_a_picture_and_a_column_a_moment():
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
    pixels = sheet({"global loss": [3.0, 2.0, 1.0], "local loss": [3.2, 3.1, 3.0]})
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


def test_bars_are_as_high_as_the_figures():
    figures = {"raw pixels": {"linear top-1": 0.2}, "untrained": {"linear top-1": 0.4},
               "trained": {"linear top-1": 0.8}}
    panel = sheet(figures=figures)[41:HEIGHT - 60, WIDTH // 2 + 30:]
    heights = [near(panel, colour).sum(0).max() for colour in (ORANGE, BLUE)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=4)
    assert heights[1] == pytest.approx(0.8 * len(panel), abs=12)


@pytest.mark.usefixtures("elsewhere")
def test_a_run_without_test_pictures_has_its_picture(flowers):
    train.main(["--data", str(flowers / "train"), "--arch", "vit_nano", "--image-size", "16",
                "--patch-size", "8", "--epochs", "1", "--batch-size", "12", "--workers", "0",
                "--device", "cpu", "--method", "global", "--out", "run"])
    with Image.open("run/run.png") as image:
        assert image.size[0] == WIDTH
