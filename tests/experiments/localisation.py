"""Measure how well the patches that an encoder's importance keeps localise the object.

    python tests/experiments/localisation.py RUN
    python tests/experiments/localisation.py WEIGHTS --data cub --data-root DIR --out places.png

Of data with regions: the drawn birds, CUB (its boxes, or segmentations if they are unpacked). The
first form measures centre crops of the test images and merges the values into the run's eval.json.
With --data every importance and shape of mask is compared, on training views (every other image
the first view's augmentation, else the second's) and on centre crops of training images; nothing is
stored but --out, a picture of the table. Both measure a run's momentum encoder.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import eval as evaluation
from controls import box_side, first_component, nearness, object_importance
from data.augment import (AUGMENTATION, Preprocessing, TwoViews, mix_seed, plain_crop, seeded,
                          to_tensor)
from data.birds import BIRD, PART
from data.datasets import data_name, default_workers, load_data
from data.draw import BLUE, GREY, ORANGE
from eval import location_masks, object_cover, patch_cover
from lodisc import (UserError, attention_product, attention_rollout, box_mask, kept_count,
                    load_encoder, location_mask, require)

BATCH = 64  # images; the first principal component is the batch's
KEEP_RATIO = 0.3
MASKS = {"patches": location_mask, "box": box_mask}
VIEWS = ("training view", "centre crop")
METRICS = ("object", "parts", "border")
COLUMNS = [(view, metric) for metric in METRICS for view in VIEWS]
PRODUCT, CHANCE, CENTRE, BEST = ("product of all layers", "chance", "nearness to the centre",
                                 "best possible")


# --- a run --------------------------------------------------------------------------------------


def localisation(encoder, dataset, importance="product", keep_ratio=0.3, workers=0,
                 choose=location_mask):
    """Return how much of the object, and of the drawn birds' deciding parts, the kept patches show.

    Values are of `object_cover`: 1 is chance level; NAME_most is the most for as few patches,
    NAME_fixed the best of one mask for all images. dataset: with regions(index)."""
    kept = location_masks(encoder, dataset, importance, keep_ratio, workers, choose)  # (n, N)
    metrics, k = {}, int(kept[0].sum())
    for name, least in (("object", BIRD), ("parts", PART)):
        cover = patch_cover(dataset, encoder.image_size, encoder.patch_size, least)  # (n, N)
        if not cover.any():
            continue
        metrics[name] = object_cover(kept, cover)
        metrics[name + "_most"] = (cover.topk(k).values.mean() / cover.mean()).item()
        metrics[name + "_fixed"] = (cover.mean(0).topk(k).values.mean() / cover.mean()).item()
    return metrics


def measure(folder, workers=0):
    """Return the localisation of a run on its test images."""
    encoder = load_encoder(folder, use_momentum=True)
    config = evaluation.current_config(encoder.config)
    test = load_data(config["data"], config["data_root"], held_out=config["held_out"]).test
    require(hasattr(test, "regions"), f"{config['data']} has no regions; the drawn birds and CUB "
            "do", UserError)
    encoder = encoder.to(evaluation.pick_device(config["device"]))
    choose = box_mask if config["local_input"] == "crop" else location_mask
    return localisation(encoder, test, config["importance"], config["keep_ratio"], workers, choose)


# --- every importance and mask ------------------------------------------------------------------


class Places(Dataset):
    """(view, object, points) of images: the view normalised, (3, H, W); the object in it, uint8
    (H, W); where the parts are in it, (parts, 2): row and column in pixels, NaN outside. The
    transforms take turns."""

    def __init__(self, dataset, points, indices, transforms, seed):
        self.dataset, self.points, self.indices = dataset, points, indices
        self.transforms, self.seed = transforms, seed

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        index, transform = int(self.indices[place]), self.transforms[place % len(self.transforms)]
        image = self.dataset[index][0]
        region = torch.from_numpy(np.array(self.dataset.regions(index)) >= BIRD).float()
        # every pixel carries its place in the image through the crop
        rows, columns = torch.meshgrid(*map(torch.arange, region.shape), indexing="ij")
        layers = tv_tensors.Mask(torch.stack([region, rows, columns]))  # (3, H, W)
        with seeded(mix_seed(AUGMENTATION, self.seed, 0, index)):
            view, layers = transform(image, layers)
        region, rows, columns = layers.as_subclass(Tensor)
        points = torch.stack([find(rows[:, 0], self.points[index][:, 0]),
                              find(columns[0], self.points[index][:, 1])], dim=1)
        points[points.isnan().any(1)] = torch.nan
        return view, region.to(torch.uint8), points


def find(line: Tensor, values: Tensor) -> Tensor:
    """Return where values (n,) lie on a line (L,) of evenly spaced ones, ascending or descending,
    each of which stands for all up to the next, or for a pixel: float (n,), NaN outside."""
    step = (line[-1] - line[0]).abs() / (len(line) - 1)
    inside = (line.min() <= values) & (values < line.max() + step.clamp_min(1))
    place = (values[:, None] - line).abs().argmin(dim=1)
    return torch.where(inside, place.float(), torch.nan)


def part_points(dataset, name, root):
    """Return where the parts of each image are, [(parts, 2)]: row and column in pixels, NaN for one
    that is not visible. Of CUB the annotated locations, of the drawn birds the parts' centroids."""
    if name != "cub":
        return [centroids(dataset, i) for i in range(len(dataset))]
    path = Path(root) / "CUB_200_2011" / "parts" / "part_locs.txt"
    located = np.loadtxt(path)  # image, part, x, y, visible
    located[located[:, 4] == 0, 2:4] = np.nan
    count = int(located[:, 1].max())
    order = np.lexsort((located[:, 1], located[:, 0]))
    points = torch.from_numpy(located[order][:, [3, 2]]).float().view(-1, count, 2)
    return [points[int(image_id) - 1] for image_id in dataset.ids]


def centroids(dataset, index):
    parts = torch.from_numpy(np.array(dataset.part_map(index)))
    points = []
    for part in range(1, len(dataset.parts)):
        pixels = (parts == part).nonzero().float()
        points.append(pixels.mean(0) if len(pixels) else torch.full((2,), torch.nan))
    return torch.stack(points)


def importances(encoder, images) -> dict:
    """Return {name: importance (B, N)} of one pass over the images, and the centre's."""
    features, patches, matrices = encoder.encode(images, kind="matrix")  # (B, T, T) a layer
    count = encoder.num_patches
    rows = [matrix[:, 0, -count:] for matrix in matrices]  # (B, N) a layer
    return {
        PRODUCT: attention_product(rows),
        "rollout": attention_rollout(matrices)[:, -count:],
        "last layer": rows[-1],
        "product of the last four": attention_product(rows[-4:]),
        "cosine with the class token": F.cosine_similarity(patches, features[:, None], dim=2),
        "first principal component": first_component(patches),
        CENTRE: nearness(count).expand(len(images), -1),
    }


def chance_shares(num_patches, shape):
    """Return how often each patch is kept by a random mask of the shape: (N,)."""
    if shape == "patches":
        return torch.full((num_patches,), kept_count(num_patches, KEEP_RATIO) / num_patches)
    side, box = math.isqrt(num_patches), box_side(num_patches, KEEP_RATIO)
    places = side - box + 1  # of the box, along a side
    covered = [min(i + 1, side - i, box, places) / places for i in range(side)]
    return torch.outer(torch.tensor(covered), torch.tensor(covered)).flatten()


def place_metrics(mask, cover, points, patch_size):
    """Of masks (B, N), bool or how often a patch is kept, return {metric: values (B,)}: "object":
    the fraction of the kept patches that the object covers, cover (B, N); "parts": the fraction of
    the visible parts in kept patches, NaN without any; "border": of kept patches on the border."""
    side = math.isqrt(mask.shape[1])
    border = torch.ones(side, side)
    border[1:-1, 1:-1] = 0
    weights = mask.float() / mask.sum(1, keepdim=True)  # (B, N)
    visible = ~points.isnan().any(2)  # (B, parts)
    row, column = (points.nan_to_num() // patch_size).long().unbind(2)  # (B, parts) each
    patch = side * row + column
    inside = mask.float().gather(1, patch) * visible
    return {"object": (weights * cover).sum(1), "border": weights @ border.flatten(),
            "parts": inside.sum(1) / visible.sum(1)}  # 0 / 0: NaN


@torch.no_grad()
def compare(encoder, places, workers=0, device="cpu"):
    """Return {(mask, importance): {metric: values of all images (n,)}}."""
    values = {}
    for images, regions, points in DataLoader(places, BATCH, num_workers=workers,
                                              generator=torch.Generator()):
        cover = F.avg_pool2d(regions.float(), encoder.patch_size).flatten(1)  # (B, N)
        ranked = importances(encoder, images.to(device))
        ranked[BEST] = object_importance(regions, encoder.patch_size)
        for shape, choose in MASKS.items():
            masks = {name: choose(importance.cpu(), KEEP_RATIO)
                     for name, importance in ranked.items()}
            masks = {CHANCE: chance_shares(encoder.num_patches, shape).expand_as(cover), **masks}
            for name, mask in masks.items():
                metrics = place_metrics(mask, cover, points, encoder.patch_size)
                row = values.setdefault((shape, name), {metric: [] for metric in METRICS})
                for metric in METRICS:
                    row[metric].append(metrics[metric])
    for row in values.values():
        for metric, batches in row.items():
            row[metric] = torch.cat(batches)
    return values


def interval(values):
    """Return the mean of values (n,) without NaN, and half the width of its 95 % interval."""
    values = values[~values.isnan()]
    return values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5


class Row(NamedTuple):
    """A line of the table: {(view, metric): (mean, half of the interval)}, and the object's cover
    less the product's, on the same training views."""

    size: int
    mask: str
    importance: str
    cells: dict
    difference: tuple


def rows_of(size, by_view):
    """by_view: {view: what `compare` returns} -> Rows."""
    rows = []
    views = by_view[VIEWS[0]]
    for mask, name in views:
        cells = {(view, metric): interval(by_view[view][mask, name][metric])
                 for view, metric in COLUMNS}
        difference = interval(views[mask, name]["object"] - views[mask, PRODUCT]["object"])
        rows.append(Row(size, mask, name, cells, difference))
    return rows


def markdown(rows):
    """Return the lines of the table."""
    heads = " | ".join(f"{metric}, {view}" for view, metric in COLUMNS)
    lines = [f"| px | mask | importance | {heads} | object − product's |",
             "|---" * (len(COLUMNS) + 4) + "|"]
    for row in rows:
        cells = ["{:.3f} ± {:.3f}".format(*row.cells[column]) for column in COLUMNS]
        difference = ""
        if row.importance not in (PRODUCT, CHANCE):
            difference = "{:+.3f} ± {:.3f}".format(*row.difference)
        lines.append(f"| {row.size} | {row.mask} | {row.importance} | {' | '.join(cells)} | "
                     f"{difference} |")
    return lines


def picture(rows):
    """Draw the object's cover of each row: a panel for each size and mask, training views and
    centre crops in two colours, with their intervals."""
    font, large = ImageFont.load_default(14), ImageFont.load_default(16)
    panels = list(dict.fromkeys((row.size, row.mask) for row in rows))
    names = list(dict.fromkeys(row.importance for row in rows))
    left, step, width, head = 210, 24, (1200 - 210) // len(panels), 70
    page = Image.new("RGB", (1200, head + step * len(names) + 40), "white")
    pen = ImageDraw.Draw(page)
    pen.text((left, 8), "fraction of the kept patches that the object covers", "black", large)
    for view, colour, x in zip(VIEWS, (BLUE, ORANGE), (650, 800)):
        pen.text((x, 8), view, colour, large)
    bottom = head + step * len(names)
    means = [row.cells[view, "object"][0] for row in rows for view in VIEWS]
    least = max(0.0, min(means) - 0.1)
    for y, name in enumerate(names):
        pen.text((left - 16, head + step * y + step // 2), name, "black", font, anchor="rm")
    for i, panel in enumerate(panels):
        start, end = left + i * width, left + (i + 1) * width - 30

        def at(value):
            return start + (end - start) * (value - least) / (1 - least)

        pen.text((start, head - 24), "{} px, {}".format(*panel), "black", font)
        for level in (0.2, 0.4, 0.6, 0.8, 1.0):
            if level < least:
                continue
            pen.line([(at(level), head), (at(level), bottom)], (225, 225, 225))
            pen.text((at(level), bottom + 6), f"{level:g}", GREY, font, anchor="mt")
        for row in rows:
            if (row.size, row.mask) != panel:
                continue
            y = head + step * names.index(row.importance) + step // 2
            for view, colour, shift in zip(VIEWS, (BLUE, ORANGE), (-4, 4)):
                mean, half = row.cells[view, "object"]
                low, x, high = at(mean - half), at(mean), at(mean + half)
                pen.line([(low, y + shift), (high, y + shift)], colour, 2)
                pen.ellipse((x - 3, y + shift - 3, x + 3, y + shift + 3), colour)
    return page


def compare_all(args):
    """Print the table of all importances, and draw it."""
    if args.out:
        evaluation.picture_format(args.out)  # before it is drawn
    data, name = load_data(args.data, args.data_root).train, args.data
    require(hasattr(data, "regions"), f"{name} has no regions; the drawn birds and CUB do",
            UserError)
    device = evaluation.pick_device("auto")
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:args.images]
    points, rows = part_points(data, name, args.data_root), []
    encoder = load_encoder(args.checkpoint)
    is_run, patch_size = "num_images" in encoder.config, encoder.patch_size
    for size in args.image_size or [patch_size * round(size / patch_size) for size in (98, 224)]:
        encoder = load_encoder(args.checkpoint, is_run, size).to(device)  # a run's momentum encoder
        preprocessing = Preprocessing(size, encoder.mean, encoder.std)
        views = TwoViews(data, preprocessing, 0, args.crop_min)
        crop = v2.Compose(plain_crop(size)[1:] + to_tensor(encoder.mean, encoder.std))
        transforms = {VIEWS[0]: [views.view1, views.view2], VIEWS[1]: [crop]}
        by_view = {}
        for view in VIEWS:
            places = Places(data, points, indices, transforms[view], seed=0)
            by_view[view] = compare(encoder, places, args.workers, device)
        rows += rows_of(size, by_view)
    print(f"{len(indices)} training images of {name}; mean ± half of the 95 % interval over "
          f"images; {encoder.source}")
    for size in dict.fromkeys(row.size for row in rows):
        count = (size // patch_size) ** 2
        box = box_side(count, KEEP_RATIO)
        print(f"{size} px: {kept_count(count, KEEP_RATIO)} of {count} patches, or a box of {box} x "
              f"{box}")
    print()
    print("\n".join(markdown(rows)))
    if args.out:
        evaluation.save_picture(picture(rows), args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run's folder, or with --data published weights too")
    add("--workers", type=int, default=default_workers())
    add("--data", type=data_name, help="compare every importance and mask on these images")
    add("--data-root", default="datasets", help="folder of the named data sets")
    add("--image-size", type=int, nargs="+",
        help="pixels per side, default: about 98, and 224")
    add("--images", type=int, default=2000, help="drawn from the training images with seed 0")
    add("--crop-min", type=float, default=0.08, help="smallest fraction of an image in a view")
    add("--out", type=Path, help="picture of the table")
    args = parser.parse_args(argv)
    if args.data:
        compare_all(args)
        return
    with torch.no_grad():
        metrics = measure(args.checkpoint, args.workers)
    print("shown by the kept patches, over chance; most: by the best as many patches, fixed: by "
          "the best of one mask for all images")
    for name, value in metrics.items():
        print(f"{name:<16}{value:.2f}")
    evaluation.save_results(args.checkpoint, {"momentum encoder": {"localisation": metrics}})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        evaluation.exit_with_line("localisation.py", error)
