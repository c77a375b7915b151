"""Part discovery (tests/baselines/part_discovery.py) on CUB-200-2011: where it lies, and its cost.

    python tests/experiments/discovery.py --data-root DIR --init WEIGHTS --out parts.png

Takes 60 training images, drawn by seed 0, and prints the mean intersection over union of their
foreground and the birds' bounding boxes, that of the best centred box, how much of the foreground
is inside the boxes, and the time, with opening the images, over that of one pass of the encoder
over the same images at the same size. Draws eight of the images with their parts."""

import argparse
import statistics
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "baselines")]

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.transforms import v2

import eval as evaluation
from benchmark import timed
from data.augment import cropped_maps, plain_crop
from data.datasets import load_data
from data.draw import sheet
from lodisc import UserError, load_encoder, require
from part_discovery import BLOCK, at_twice_the_size, discover_parts, squaring


def box_mask(box, size):
    """Return the pixels in a box (x, y, width, height) of an image (width, height): bool (H, W)."""
    mask = np.zeros(size[::-1], dtype=bool)
    x, y, width, height = (round(number) for number in box)
    mask[max(0, y):y + height, max(0, x):x + width] = True
    return mask


def centred_box(fraction, size):
    """Return the box in the middle, of this fraction of the image's sides."""
    width, height = size
    return ((1 - fraction) / 2 * width, (1 - fraction) / 2 * height,
            fraction * width, fraction * height)


def overlap(a, b):
    """Return the intersection over union of bool arrays, 0 if both are empty."""
    return (a & b).sum() / max(1, (a | b).sum())


def squares(encoder, dataset):
    """Return a data set's images as discovery sees them: (n, 3, H, W)."""
    prepare = squaring(encoder)
    return torch.stack([prepare(dataset[i][0]) for i in range(len(dataset))])


@torch.no_grad()
def encode_all(encoder, images):
    """One pass of the encoder."""
    for batch in images.split(BLOCK):
        encoder(batch.to(encoder.cls_token.device))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-root", default="datasets", help="folder of CUB_200_2011")
    add("--init", required=True, help="weights, as for train.py")
    add("--images", type=int, default=60, help="how many (default: %(default)s)")
    add("--image-size", type=int, help="of training; discovery takes twice that")
    add("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if any)")
    add("--out", type=Path, default=Path("parts.png"), help="a new picture")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    require(args.images >= 8, f"--images must be 8 or more, got {args.images}", UserError)
    evaluation.picture_format(args.out)  # before it is drawn
    device = evaluation.pick_device(args.device)
    weights = evaluation.weights_file(args.init)
    size = args.image_size or evaluation.recipe_image_size(load_encoder(weights).patch_size, device)
    encoder = load_encoder(weights, image_size=size).to(device)
    birds = load_data("cub", args.data_root).train
    order = torch.randperm(len(birds), generator=torch.Generator().manual_seed(0))
    indices = order[:args.images].tolist()
    images = Subset(birds, indices)
    large = at_twice_the_size(encoder)
    ready, ratios = squares(large, images), []
    encode_all(large, ready)  # warm up
    for _ in range(3):  # alternating
        one_pass, _ = timed(encode_all, large, ready)
        discovery, maps = timed(discover_parts, encoder, images)
        ratios.append(discovery / one_pass)
    sizes = [images[i][0].size for i in range(len(images))]
    boxes = [box_mask(birds.boxes[index], size) for index, size in zip(indices, sizes)]
    foregrounds = [image_map.numpy() > 0 for image_map in maps]
    found = np.mean([overlap(*pair) for pair in zip(foregrounds, boxes)])
    inside = np.mean([box[foreground].mean() for foreground, box in zip(foregrounds, boxes)
                      if foreground.any()])
    area = np.mean([box.mean() for box in boxes])
    centred = {}
    for percent in range(5, 101, 5):
        masks = [box_mask(centred_box(percent / 100, size), size) for size in sizes]
        centred[percent] = np.mean([overlap(mask, box) for mask, box in zip(masks, boxes)])
    best = max(centred, key=centred.get)
    print(f"{len(images)} images at {large.image_size} px: intersection over union of foreground "
          f"and bounding box {found:.3f}; of the best centred box, {best} % of the sides, "
          f"{centred[best]:.3f}; inside the boxes lie {inside:.3f} of the foreground and "
          f"{area:.3f} of the image; discovery over one pass of the encoder, median of three: "
          f"{statistics.median(ratios):.2f}")
    crop = v2.Compose(plain_crop(448))
    shown = [crop(images[i][0]) for i in range(8)]
    parts = cropped_maps(lambda i: Image.fromarray(maps[i].numpy()), range(8), 448)
    page = sheet({"image": (shown, None), "parts": (shown, parts.flatten(1).long())})
    evaluation.save_picture(page, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        evaluation.exit_with_line("discovery.py", error)
