"""Pictures for people, drawn with Pillow: where an encoder looks, and how a run went."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms import v2

from .augment import plain_crop
from .run import MAIN_FIGURES, filmed, read_json, unlearnt_loss

TILE = 128  # pixels a side of a picture on a sheet
GAP, MARGIN = 4, 112
# Anchors of a dark-to-light map that colour-blind readers can follow (the shape of "viridis").
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
# and three that they tell apart (Okabe and Ito 2008)
BLUE, ORANGE, GREY = (0, 114, 178), (230, 159, 0), (150, 150, 150)
COLOURS = {"global loss": BLUE, "local loss": ORANGE, "raw pixels": GREY, "untrained": ORANGE,
           "initial": ORANGE, "trained": BLUE, "lodisc": BLUE, "global": ORANGE}
WIDTH, HEIGHT, FRAME = 1200, 340, 133  # of the picture of a run, its upper half, a tile's step


def square(values):
    """Of all patches, row by row (N,), to (side, side)."""
    values = np.asarray(values)
    return values.reshape(math.isqrt(len(values)), -1)


def heat_map(values, picture):
    """values (N,), any scale, as colours over the greyed picture (PIL image)."""
    values = square(values)
    low, high = values.min(), values.max()
    level = (values - low) / max(high - low, 1e-12) * (len(HEAT) - 1)
    colours = np.stack([np.interp(level, range(len(HEAT)), channel) for channel in zip(*HEAT)], -1)
    heat = Image.fromarray(colours.round().astype(np.uint8)).resize(picture.size, Image.NEAREST)
    return Image.blend(ImageOps.grayscale(picture).convert("RGB"), heat, 0.65)


def kept_patches(mask, picture):
    """The picture with every patch that mask, bool (N,), does not keep painted black."""
    keep = Image.fromarray(np.uint8(square(mask)) * 255).resize(picture.size, Image.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size), keep)


def mask_sheet(pictures, importance, masks):
    """Three rows, a column a picture: the pictures, their importance, their kept patches.

    pictures: n PIL images of one size; importance (n, N) and masks (n, N).
    """
    n = len(masks[0])
    return sheet({"picture": (pictures, None), "importance": (pictures, importance),
                  f"kept, {int(masks[0].sum())} of {n}": (pictures, masks)})


def sheet(rows):
    """{name: (pictures, values)}: a row each, after its name. values: None, importance or masks."""
    step, columns = TILE + GAP, max(len(pictures) for pictures, _ in rows.values())
    page = Image.new("RGB", (MARGIN + step * columns, step * len(rows) + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for y, (name, (pictures, values)) in enumerate(rows.items()):
        pen.multiline_text((8, GAP + y * step + TILE // 2), name, "black", font, anchor="lm")
        for x, picture in enumerate(pictures):
            tile = picture.resize((TILE, TILE), Image.BICUBIC)
            if values is not None:
                draw = kept_patches if values.dtype == torch.bool else heat_map
                tile = draw(values[x], tile)
            page.paste(tile, (MARGIN + x * step, GAP + y * step))
    return page


def legend(pen, box, names, font):
    """The names in their colours, in a line above box."""
    for i, name in enumerate(names):
        pen.text((box[0] + 12 + 130 * i, box[1] - 12), name, COLOURS[name], font, anchor="ls")


def curves(pen, box, lines, level, label, font):
    """lines {name in COLOURS: [(epoch, value)]} into box, and a labelled dashed line at level."""
    left, top, right, bottom = box
    values = [value for line in lines.values() for _, value in line] + [level]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    low, high, epochs = low - margin, high + margin, max(line[-1][0] for line in lines.values())

    def at(epoch, value):
        return (left + (right - left) * epoch / epochs,
                bottom - (bottom - top) * (value - low) / (high - low))

    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    for value in np.linspace(low + margin, high - margin, 5):
        pen.text((left - 6, at(0, value)[1]), f"{value:.2f}", "black", font, anchor="rm")
    for epoch in sorted({round(epochs * part / 5) for part in range(6)}):
        pen.text((at(epoch, low)[0], bottom + 6), str(epoch), "black", font, anchor="mt")
    pen.text(((left + right) / 2, bottom + 26), "epoch", "black", font, anchor="mt")
    for x in range(left, right, 12):
        pen.line([(x, at(0, level)[1]), (x + 6, at(0, level)[1])], GREY, 2)
    pen.text((right, at(0, level)[1] - 4), label, GREY, font, anchor="rb")
    legend(pen, box, lines, font)
    for name, line in lines.items():
        points = [at(*point) for point in line]
        pen.line(points, COLOURS[name], 3)
        for x, y in points if len(points) < 40 else points[-1:]:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), COLOURS[name])


def bars(pen, box, rows, font):
    """rows {name in COLOURS: {figure: value in [0, 1]}} as groups of bars into box."""
    left, top, right, bottom = box
    names = list(next(iter(rows.values())))
    group = (right - left) / len(names)
    width = int(0.8 * group / len(rows))
    legend(pen, box, rows, font)
    for i, (name, values) in enumerate(rows.items()):
        for j, figure in enumerate(names):
            x = int(left + group * (j + 0.1)) + i * width
            y = bottom - (bottom - top) * values[figure]
            pen.rectangle((x, y, x + width - 3, bottom), COLOURS[name])
            pen.text((x + width / 2 - 1, y - 3), f"{values[figure]:.2f}", "black", font,
                     anchor="mb")
    for j, figure in enumerate(names):
        pen.text((left + group * (j + 0.5), bottom + 6), figure, "black", font, anchor="mt")
    pen.line([(left, bottom), (right, bottom)], "black")


def run_sheet(losses, unlearnt, figures, pictures, film):
    """A run at a glance, 1,200 px wide: losses, figures before and after, where it looked.

    losses     {name: [(epoch, value)]}; unlearnt: the loss of a branch that has learnt nothing
    figures    {"raw pixels", "untrained" or "initial", "trained": {figure: value}}, or none of them
    pictures   n PIL images of one size; film: [(epoch, masks (n, N))], a column each
    """
    font, large = ImageFont.load_default(14), ImageFont.load_default(16)
    page = Image.new("RGB", (WIDTH, HEIGHT + 40 + FRAME * len(pictures)), "white")
    pen = ImageDraw.Draw(page)
    curves(pen, (70, 40, WIDTH // 2 - 40, HEIGHT - 60), losses, unlearnt, "has learnt nothing",
           font)
    box = (WIDTH // 2 + 30, 40, WIDTH - 20, HEIGHT - 60)
    if figures:
        bars(pen, box, figures, font)
    else:
        pen.text((box[0], box[1]), "not evaluated", "black", large)
    step = min(FRAME, WIDTH // (len(film) + 1))
    heads = ["picture", *(f"epoch {epoch}" for epoch, _ in film)]
    for x, head in enumerate(heads):
        pen.text((x * step + step / 2, HEIGHT + 16), head, "black", large, anchor="mm")
    for y, picture in enumerate(pictures):
        tile = picture.resize((step - GAP, step - GAP), Image.BICUBIC)
        row = [tile, *(kept_patches(masks[y], tile) for _, masks in film)]
        for x, image in enumerate(row):
            page.paste(image, (x * step + GAP, HEIGHT + 32 + y * step))
    return page.quantize(256)  # a third of the bytes


def draw_run(folder, dataset):
    """Write a finished run's folder/run.png; dataset: what it trained on, for the pictures."""
    run = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    config, history = run["config"], run["history"]
    losses = {name.replace("_", " "): [(row["epoch"], row[name]) for row in history]
              for name in ("global_loss", "local_loss") if any(row[name] for row in history)}
    judged = read_json(folder / "eval.json") if (folder / "eval.json").exists() else {}
    before = "untrained" if "untrained" in judged else "initial"
    rows = {"raw pixels": judged.get("pixels"), before: judged.get(before), "trained": judged}
    figures = {row: {name: results[part][key] for name, (part, key) in MAIN_FIGURES.items()
                     if part in results} for row, results in rows.items() if results}
    figures = {row: values for row, values in figures.items() if values}
    crop = v2.Compose(plain_crop(config["image_size"]))
    steps = len(dataset) // config["batch_size"]
    page = run_sheet(losses, unlearnt_loss(config), figures,
                     [crop(dataset[i][0]) for i in filmed(len(dataset))],
                     [(step // steps, masks) for step, masks in run["film"]])
    page.save(folder / "run.png")
