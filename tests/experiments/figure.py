"""Draw the paper's overview figure with the tensors of one forward pass."""

import torch
from PIL import Image, ImageDraw, ImageFont

from data.augment import Preprocessing, TwoViews
from data.draw import BLUE, GREY, ORANGE, heat_map, kept_patches
from eval import build_model
from lodisc import attention_product, location_mask, mask_pixels, read_weights

WIDTH, HEIGHT = 1200, 690
FONT, BOLD = ImageFont.load_default(17), ImageFont.load_default(22)
QUERY, KEY, LOCAL = 95, 318, 572  # y of the three branches
VIEW, MAP = 124, 88  # sides of a view and of a map
Z = 1060  # x of the outputs


class Page:
    """A white page and the elements of the figure; (x, y) are centres."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, *lines, font=FONT, colour="black"):
        for i, line in enumerate(lines):
            self.pen.text((x, y + 20 * i), line, colour, font, anchor="mm")

    def symbol(self, x, y, letter, index):
        self.text(x, y, letter, font=BOLD)
        self.text(x + 11, y + 7, index)

    def box(self, x, y, index, colour):
        self.pen.rounded_rectangle((x - 45, y - 30, x + 45, y + 30), 10, "white", colour, 3)
        self.symbol(x - 4, y - 2, "f", index)

    def arrow(self, *points):
        """Draw a line through points (x, y), with a head at the last."""
        self.pen.line(points, "black", 2)
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        self.pen.polygon([(x, y), (x - 9 * dx - 5 * dy, y - 9 * dy - 5 * dx),
                          (x - 9 * dx + 5 * dy, y - 9 * dy + 5 * dx)], "black")

    def tile(self, x, y, image, size):
        self.image.paste(image.resize((size, size), Image.Resampling.BICUBIC),
                         (x - size // 2, y - size // 2))

    def vector(self, x, y, values, index, shape, colour):
        """Draw a bar for each of the values (C,), below the vector's name."""
        for i, value in enumerate((values / values.abs().max()).tolist()):
            self.pen.line((x - 64 + i, y, x - 64 + i, y - 34 * value), colour)
        self.symbol(x - 50, y - 48, "z", index)
        self.text(x + 16, y - 47, shape)


def to_image(view, config):
    """Undo the normalisation of a view (3, H, W) -> PIL image."""
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    pixels = (view * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def shape(tensor):
    return str(tuple(tensor.shape))


@torch.no_grad()
def overview(folder, dataset, shown=90):
    """Return the figure of a run's model on the first batch of a data set, augmented as in training
    but not shuffled, with the tensors of image `shown` of the batch."""
    weights = read_weights(folder)
    config = weights["config"]
    model = build_model(config, fresh=False)
    model.load_state_dict(weights["model"])
    model.train()
    preprocessing = Preprocessing(config["image_size"], config["mean"], config["std"])
    views = TwoViews(dataset, preprocessing, config["seed"], config["crop_min"])
    pairs = [views[0, i] for i in range(config["batch_size"])]
    view, other = map(torch.stack, zip(*pairs))
    i = shown % len(view)
    query = model.query(view)
    key, _ = model.key_and_mask(other)
    _, attentions = model.momentum_encoder.with_attention(other, "row")  # (B, N) of each layer
    importance = attention_product(attentions)
    mask = location_mask(importance, model.keep_ratio)
    masked = mask_pixels(other, mask, model.encoder.patch_size)
    local = model.local_key(other, mask)
    losses = [model.contrast(query, keys).item() for keys in (key, local)]

    page = Page()
    images = [to_image(batch[i], config) for batch in (view, other, masked)]
    for y, image, name in ((QUERY, images[0], "view x"), (KEY, images[1], "view x'")):
        page.tile(80, y, image, VIEW)
        page.text(80, y - VIEW // 2 - 12, name)
        page.arrow((146, y), (275, y))
    page.text(80, QUERY + VIEW // 2 + 14, shape(view))
    page.text(320, QUERY - 46, "VisionTransformer")
    page.text(425, QUERY - 14, f"({len(view)}, {model.encoder.dim})")

    # the global branch
    for y, index, values, lines, colour in (
            (QUERY, "q", query, ("projector, predictor", "LoDisc.query"), BLUE),
            (KEY, "k", key, ("projector (EMA)", "LoDisc.key_and_mask"), ORANGE)):
        page.box(320, y, index, colour)
        page.arrow((365, y), (Z - 74, y))
        page.text(670, y - 14, lines[0])
        page.text(670, y + 16, lines[1])
        page.vector(Z, y, values[i], index, shape(values), colour)
    for y in range(QUERY + 32, KEY - 44, 14):  # dashed: of weights, not of data
        page.pen.line(((320, y), (320, y + 7)), "black", 2)
    page.arrow((320, KEY - 42), (320, KEY - 31))
    page.text(425, (QUERY + KEY) // 2 - 20, "EMA of f_q's weights,", "after each step:",
              "momentum_update")
    page.text(Z, 190, f"global loss  {losses[0]:.2f}", "contrastive_loss")
    page.arrow((Z, QUERY + 40), (Z, 176))
    page.arrow((Z, KEY - 60), (Z, 224))

    page.text(600, 24, "with gradient", colour=BLUE)
    page.text(790, 24, "momentum side: stop-gradient", colour=ORANGE)

    # pivotal regions
    page.arrow((80, KEY + 66), (80, 420), (808, 420), (808, LOCAL - 48))
    page.pen.line(((320, 410), (320, 430)), "white", 14)  # the arrows cross
    page.arrow((320, KEY + 30), (320, LOCAL - 50))
    for layer, attention in enumerate(attentions):
        x = 58 + 106 * layer
        page.tile(x, LOCAL, heat_map(attention[i], images[1]), MAP)
        page.text(x, LOCAL - 56, f"layer {layer + 1}")
    for x in range(111, 400, 106):  # times
        page.pen.line(((x - 4, LOCAL - 4), (x + 4, LOCAL + 4)), "black", 2)
        page.pen.line(((x - 4, LOCAL + 4), (x + 4, LOCAL - 4)), "black", 2)
    page.text(178, 452, "attention_weights", f"{shape(attentions[0])} per layer")
    page.arrow((424, LOCAL), (464, LOCAL))
    maps = (("attention_product", importance, heat_map(importance[i], images[1])),
            ("location_mask", mask, kept_patches(mask[i], Image.new("RGB", (MAP, MAP), "white"))))
    for j, (name, values, picture) in enumerate(maps):
        x = 512 + 148 * j
        page.tile(x, LOCAL, picture, MAP)
        page.text(x, LOCAL - 58, name)
        page.text(x, LOCAL + 58, shape(values))
        if values is importance:
            page.text(x, LOCAL + 78, "logarithm")
        page.arrow((x + 48, LOCAL), (x + 100, LOCAL))
    # the local branch
    page.tile(808, LOCAL, images[2], MAP)
    page.text(800, LOCAL + 58, "mask_pixels", shape(masked))
    page.arrow((856, LOCAL), (884, LOCAL))
    page.box(929, LOCAL, "l", ORANGE)
    page.text(950, LOCAL + 48, "f_l is f_k again,", "projector (EMA)", "LoDisc.local_key")
    for x, y, title in ((670, 207, "global branch"), (586, 470, "pivotal regions"),
                        (929, 505, "local branch")):
        page.text(x, y, title, font=BOLD, colour=GREY)
    page.arrow((974, LOCAL), (Z - 68, LOCAL))
    page.vector(Z, LOCAL, local[i], "l", shape(local), ORANGE)
    page.text(Z, 440, f"local loss  {losses[1]:.2f}", "contrastive_loss")
    page.arrow((Z, LOCAL - 64), (Z, 474))
    page.arrow((Z + 70, QUERY), (Z + 120, QUERY), (Z + 120, 450), (Z + 72, 450))
    return page.image
