"""Draw with Pillow: pure functions from arrays and images to an image."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

SHOWN = 8  # images
TILE = 128  # pixels per side of an image on a sheet
GAP, MARGIN = 4, 112
# Anchors of a dark-to-light map that colour-blind readers can follow (the shape of "viridis").
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
# and colours that they tell apart (Okabe and Ito 2008)
BLUE, ORANGE, GREY, GREEN, PINK = ((0, 114, 178), (230, 159, 0), (150, 150, 150), (0, 158, 115),
                                   (204, 121, 167))
SKY, YELLOW, RED = (86, 180, 233), (240, 228, 66), (213, 94, 0)
COLOURS = {"global loss": BLUE, "local loss": ORANGE, "raw pixels": GREY, "untrained": ORANGE,
           "initial": ORANGE, "trained": BLUE}
PART_COLOURS = GREY, BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, RED  # the first is the ground's
WIDTH, HEIGHT, FRAME = 1200, 340, 133  # of a run's picture, its upper half, a tile's step
LEAST = 100  # a tile's step if that gives room for more images side by side


def example_indices(targets):
    """Return the indices of the images that pictures show, spread over the classes."""
    by_class = sorted(range(len(targets)), key=targets.__getitem__)
    return [by_class[i * len(targets) // SHOWN] for i in range(SHOWN)]


def square(values):
    """Reshape values of all patches, row by row (N,), to (side, side)."""
    values = np.asarray(values)
    return values.reshape(math.isqrt(len(values)), -1)


def heat_map(values, image):
    """Colour values (N,), of any scale, over the greyed PIL image."""
    values = square(values)
    low, high = values.min(), values.max()
    level = (values - low) / max(high - low, 1e-12) * (len(HEAT) - 1)
    colours = np.stack([np.interp(level, range(len(HEAT)), channel) for channel in zip(*HEAT)], -1)
    heat = Image.fromarray(colours.round().astype(np.uint8)).resize(image.size, Image.NEAREST)
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), heat, 0.65)


def kept_patches(mask, image):
    """Paint every patch of the image that mask, bool (N,), does not keep black."""
    keep = Image.fromarray(np.uint8(square(mask)) * 255).resize(image.size, Image.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), keep)


def part_colours(parts, image):
    """Colour the part indices of all patches, int64 (N,), over the greyed PIL image."""
    colours = np.uint8(PART_COLOURS)[square(parts)]
    colours = Image.fromarray(colours).resize(image.size, Image.NEAREST)
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), colours, 0.65)


def colour_patches(values, image):
    """Draw the values of patches (N,) over the image: a bool mask, int64 parts, or importance."""
    if values.dtype == torch.bool:
        return kept_patches(values, image)
    if values.dtype == torch.int64:
        return part_colours(values, image)
    return heat_map(values, image)


def sheet(rows, names=(), tile=TILE, notes=()):
    """Return {name: (images, values)} as labelled rows. values (n, N): None, the importance of
    patches, bool masks, or int64 parts, whose names are in the legend. notes: a text for the margin
    and one for each column, drawn below the rows."""
    step, columns = tile + GAP, max(len(images) for images, _ in rows.values())
    height = step * len(rows) + GAP
    lines = max((note.count("\n") + 1 for note in notes), default=0)
    foot = max(24 if names else 0, 20 * lines + 4 if notes else 0)
    page = Image.new("RGB", (MARGIN + step * columns, height + foot), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    legend(pen, (MARGIN - 12, height + 28), dict(zip(names, PART_COLOURS)), font)
    for column, note in enumerate(notes):
        x = 8 if column == 0 else MARGIN + (column - 1) * step
        pen.multiline_text((x, height), note, "black", font, spacing=4)
    for y, (name, (images, values)) in enumerate(rows.items()):
        pen.multiline_text((8, GAP + y * step + tile // 2), name, "black", font, anchor="lm")
        for x, image in enumerate(images):
            image = image.resize((tile, tile), Image.BICUBIC)
            if values is not None:
                image = colour_patches(values[x], image)
            page.paste(image, (MARGIN + x * step, GAP + y * step))
    return page


def mask_sheet(images, importance, masks, notes=()):
    """Return rows of images, their importance (n, N) and, unless None, their masks (n, N); notes:
    as in `sheet`."""
    rows = {"image": (images, None), "importance,\nhigh: yellow": (images, importance)}
    if masks is not None:
        least, most = int(masks.sum(1).min()), int(masks.sum(1).max())
        kept = f"{least} to {most}" if least < most else f"{least}"
        rows[f"kept, {kept}\nof {masks.shape[1]}"] = images, masks
    return sheet(rows, notes=notes)


def neighbour_sheet(queries, blocks, tile=96):
    """Draw a row per query: its image, then in each block {title: (images, hits)} its neighbours.

    queries: PIL images; images: a list of them per query, nearest first; hits: as many bools, in
    the right class or not, drawn as the frame's colour and as a tick or a cross; or None."""
    gap = 8
    step, head = tile + gap, 32
    most = max(len(row) for images, _ in blocks.values() for row in images)
    width = step + len(blocks) * (step * most + 2 * gap)
    page = Image.new("RGB", (width, head + step * len(queries)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    pen.text((gap, head - 8), "query", "black", font, anchor="ls")

    def paste(image, x, y):
        page.paste(image.resize((tile, tile), Image.BICUBIC), (x, y))

    for row, query in enumerate(queries):
        paste(query, gap // 2, head + row * step)
    for block, (title, (images, hits)) in enumerate(blocks.items()):
        left = step + block * (step * most + 2 * gap) + 2 * gap
        pen.text((left, head - 8), title, "black", font, anchor="ls")
        for row, neighbours in enumerate(images):
            for column, image in enumerate(neighbours):
                x, y = left + column * step, head + row * step
                paste(image, x, y)
                if hits is not None:
                    frame(pen, (x, y, x + tile - 1, y + tile - 1), hits[row][column])
    return page


def frame(pen, box, hit):
    """Draw a frame inside box: blue with a tick for a hit, else orange with a cross."""
    left, top, right, bottom = box
    colour = BLUE if hit else RED
    pen.rectangle(box, outline=colour, width=4)
    x, y = right - 20, bottom - 20
    pen.rectangle((x, y, right, bottom), colour)
    if hit:
        pen.line([(x + 5, y + 10), (x + 9, y + 15), (x + 16, y + 5)], "white", 3)
    else:
        pen.line([(x + 5, y + 5), (x + 15, y + 15)], "white", 3)
        pen.line([(x + 5, y + 15), (x + 15, y + 5)], "white", 3)


def colours_of(names):
    """Return {name: colour}: names in COLOURS have theirs, the rest take what remains."""
    colours = {name: COLOURS[name] for name in names if name in COLOURS}
    taken = list(colours.values())
    spare = [colour for colour in (BLUE, ORANGE, GREEN, PINK, GREY) if colour not in taken]
    unnamed = [name for name in names if name not in COLOURS]
    for i, name in enumerate(unnamed):
        colours[name] = spare[i % len(spare)]
    return colours


def legend(pen, box, colours, font):
    """Draw the names in their colours, in a line above box."""
    x = box[0] + 12
    for name, colour in colours.items():
        pen.text((x, box[1] - 12), name, colour, font, anchor="ls")
        x += pen.textlength(name, font) + 24


def curves(pen, box, title, lines, levels, label, font):
    """Draw lines {name: [(epoch, value)]} in box, and levels {name: value} dashed."""
    left, top, right, bottom = box
    values = [value for line in lines.values() for _, value in line] + list(levels.values())
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    low, high, epochs = low - margin, high + margin, max(line[-1][0] for line in lines.values())

    def at(epoch, value):
        return (left + (right - left) * epoch / epochs,
                bottom - (bottom - top) * (value - low) / (high - low))

    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    digits = 2 if high - low > 0.5 else 3
    for value in np.linspace(low + margin, high - margin, 5):
        pen.text((left - 6, at(0, value)[1]), f"{value:.{digits}f}", "black", font, anchor="rm")
    for epoch in range(0, epochs + 1, math.ceil(epochs / 6)):
        pen.text((at(epoch, low)[0], bottom + 6), str(epoch), "black", font, anchor="mt")
    pen.text(((left + right) / 2, bottom + 26), "epoch", "black", font, anchor="mt")
    pen.text((left - 6, top - 12), title, "black", font, anchor="rs")
    for level in sorted(set(levels.values())):
        for x in range(left, right, 12):
            pen.line([(x, at(0, level)[1]), (x + 6, at(0, level)[1])], GREY, 2)
        pen.text((right, at(0, level)[1] - 4), label, GREY, font, anchor="rb")
    colours = colours_of(lines)
    legend(pen, box, {name: colours[name] for name in lines}, font)
    for name, line in lines.items():
        points = [at(*point) for point in line]
        pen.line(points, colours[name], 3)
        for x, y in points if len(points) < 40 else points[-1:]:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colours[name])


def bars(pen, box, rows, font):
    """Draw rows {name in COLOURS: {metric: value in [0, 1]}} as groups of bars in box."""
    left, top, right, bottom = box
    names = list(next(iter(rows.values())))
    group = (right - left) / len(names)
    width = int(0.8 * group / len(rows))
    legend(pen, box, {name: COLOURS[name] for name in rows}, font)
    for i, (name, values) in enumerate(rows.items()):
        for j, metric in enumerate(names):
            x = int(left + group * (j + 0.1)) + i * width
            y = bottom - (bottom - top) * values[metric]
            pen.rectangle((x, y, x + width - 3, bottom), COLOURS[name])
            pen.text((x + width / 2 - 1, y - 3), f"{values[metric]:.2f}", "black", font,
                     anchor="mb")
    for j, metric in enumerate(names):
        pen.text((left + group * (j + 0.5), bottom + 6), metric, "black", font, anchor="mt")
    for value in (0, 0.5, 1):
        pen.text((left - 6, bottom - (bottom - top) * value), f"{value:g}", "black", font,
                 anchor="rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], "black")


def run_sheet(history, levels, metrics, images, film):
    """Draw a run: losses, metrics before and after, masks over time; 1,200 px wide.

    history  a row per epoch, as in metrics.csv; its losses are drawn, or else the total, and
             retrieval among held-out images, if present
    levels   {loss: chance level}, dashed
    metrics  {"raw pixels", "untrained" or "initial", "trained": {metric: value}}, or none of them
    images   n PIL images of one size; film: [(epoch, masks (n, N))], up to eight of them drawn; if
             empty, no images are drawn
    """
    names = [name for name in history[0] if name.endswith("loss")] or ["total"]
    losses = {}
    for name in names:
        losses[name.replace("_", " ")] = [(row["epoch"], row[name]) for row in history]
    levels = {name: level for name, level in levels.items() if name in names}
    last = min(SHOWN, len(film)) - 1
    film = [film[round(i * (len(film) - 1) / max(1, last))] for i in range(last + 1)]
    font, large = ImageFont.load_default(14), ImageFont.load_default(16)
    columns = len(film) + 1
    groups = max(1, WIDTH // (LEAST * columns))  # of images, side by side, where there is room
    rows = math.ceil(len(images) / groups)
    height = HEIGHT
    if film:
        step = min(FRAME, WIDTH // (columns * math.ceil(len(images) / rows)))
        height += 40 + step * rows
    page = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(page)
    retrieval = {}
    for name, column in (("rank-1", "rank1"), ("mAP", "mAP")):
        line = [(row["epoch"], row[column]) for row in history if column in row]
        if line:
            retrieval[name] = line
    top, bottom, end_of_loss, start_of_bars = 40, HEIGHT - 60, WIDTH // 2 - 40, WIDTH // 2 + 30
    if retrieval:  # a part between the two
        end_of_loss, start_of_bars = 320, 690
        curves(pen, (400, top, 630, bottom), "held out", retrieval, {}, "", font)
    curves(pen, (70, top, end_of_loss, bottom), "loss", losses, levels, "chance level", font)
    box = (start_of_bars, top, WIDTH - 20, bottom)
    if metrics:
        bars(pen, box, metrics, font)
    else:
        pen.text((box[0], box[1]), "not evaluated", "black", large)
    if not film:
        return page.quantize(256)  # a third of the bytes
    pen.text((WIDTH, HEIGHT - 6), "patches kept (momentum encoder)", GREY, font, anchor="rb")
    heads = ["image", *(f"epoch {epoch}" for epoch, _ in film)]
    for i, image in enumerate(images):
        left, top = i // rows * columns * step, HEIGHT + 32 + i % rows * step
        tile = image.resize((step - GAP, step - GAP), Image.BICUBIC)
        row = [tile, *(kept_patches(masks[i], tile) for _, masks in film)]
        for x, picture in enumerate(row):
            page.paste(picture, (left + x * step + GAP, top))
            if i % rows == 0:
                pen.text((left + x * step + step / 2, HEIGHT + 16), heads[x], "black", large,
                         anchor="mm")
    return page.quantize(256)
