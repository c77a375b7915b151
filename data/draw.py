"""Pictures for people, drawn with Pillow: where an encoder looks."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = 128  # pixels a side of a picture on a sheet
GAP, MARGIN = 4, 112
# Anchors of a dark-to-light map that colour-blind readers can follow (the shape of "viridis").
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def heat_map(values, picture):
    """values (side, side), any scale, as colours over the greyed picture (PIL image)."""
    low, high = values.min(), values.max()
    level = (values - low) / max(high - low, 1e-12) * (len(HEAT) - 1)
    colours = np.stack([np.interp(level, range(len(HEAT)), channel) for channel in zip(*HEAT)], -1)
    heat = Image.fromarray(colours.round().astype(np.uint8)).resize(picture.size, Image.NEAREST)
    return Image.blend(ImageOps.grayscale(picture).convert("RGB"), heat, 0.65)


def kept_patches(mask, picture):
    """The picture with every patch that mask (side, side) does not keep painted black."""
    keep = Image.fromarray(np.uint8(mask) * 255).resize(picture.size, Image.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size), keep)


def mask_sheet(pictures, importance, masks):
    """Three rows, a column a picture: the pictures, their importance, their kept patches.

    pictures: n PIL images of one size; importance (n, N) and masks (n, N): arrays.
    """
    side = round(len(masks[0]) ** 0.5)
    large = [picture.resize((TILE, TILE), Image.BICUBIC) for picture in pictures]
    rows = (
        ("picture", large),
        ("importance", [heat_map(values.reshape(side, side), picture)
                        for values, picture in zip(np.asarray(importance), large)]),
        (f"kept, {int(masks[0].sum())} of {side * side}",
         [kept_patches(mask.reshape(side, side), picture)
          for mask, picture in zip(np.asarray(masks), large)]),
    )
    step = TILE + GAP
    sheet = Image.new("RGB", (MARGIN + step * len(large), step * len(rows) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for y, (name, tiles) in enumerate(rows):
        pen.text((8, GAP + y * step + TILE // 2), name, "black", font, anchor="lm")
        for x, tile in enumerate(tiles):
            sheet.paste(tile, (MARGIN + x * step, GAP + y * step))
    return sheet
