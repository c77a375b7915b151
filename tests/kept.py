"""Measure what the pivotal patches tell of the test images, and draw where they lie.

    python tests/kept.py flowers17 WEIGHTS RUN [RUN ...] --data-root DIR --out kept.png

Of a run, the momentum encoder; of published weights, their encoder. Every row is one of them:

    rank-1      retrieval among the test images, all with all patches, or all with a share of them
    own image   how many of the test images, all patches shown, are nearest to their own masked
                image, as the local loss wants it (of augmented views)
    in common   the share of the location mask's patches that the first row's keeps too

The picture has each patch in its mean colour, so that no photograph is copied into it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from data.augment import Plain, plain_crop
from data.datasets import data_name, load_data
from data.draw import example_indices, sheet
from eval import exit_with_line, extract, importance_of, pick_device, retrieval
from lodisc import (MASKS, UserError, load_encoder, location_mask, mask_pixels, read_weights,
                    require)

SHOWN = ("location", "random", "least")  # masks


class Masked(torch.nn.Module):
    """An encoder whose input keeps only the patches of a mask, by its own importance."""

    def __init__(self, encoder, mask, keep_ratio):
        super().__init__()
        self.encoder, self.mask, self.keep_ratio = encoder, MASKS[mask], keep_ratio
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images):
        function, needed = self.mask
        importance = (importance_of(self.encoder, images, "product") if needed else
                      torch.zeros(len(images), self.encoder.num_patches))
        mask = function(importance, self.keep_ratio, self.generator).to(images.device)
        return self.encoder(mask_pixels(images, mask, self.encoder.patch_size))


def measure(encoder, dataset, keep_ratio=0.3, device="cpu"):
    """Return {column: value} of an encoder: rank-1 with all patches and with each mask's, and the
    share of images that are nearest to their own masked image."""
    crop = encoder.image_size, encoder.mean, encoder.std
    found = extract({"all": encoder, **{mask: Masked(encoder, mask, keep_ratio) for mask in SHOWN}},
                    dataset, crop, device)
    values = {f"rank-1, {name}": retrieval(features)["rank1"] for name, features in found.items()}
    full, *masked = (F.normalize(features, dim=1) for features, _ in found.values())  # (n, D) each
    for name, features in zip(SHOWN, masked):
        nearest = (full @ features.T).argmax(1)  # (n,)
        values[f"own image, {name}"] = (nearest == torch.arange(len(full))).double().mean().item()
    return values


def mosaic(image, patch_size, tile=126):
    """Return the PIL image with every patch in its mean colour."""
    side = image.width // patch_size
    return image.resize((side, side), Image.BOX).resize((tile, tile), Image.NEAREST)


@torch.no_grad()
def kept_patches(encoder, dataset, keep_ratio=0.3):
    """Return the location masks of all images, (n, N), by the encoder's own importance."""
    loader = DataLoader(Plain(dataset, encoder.image_size, encoder.mean, encoder.std), 256)
    return torch.cat([location_mask(importance_of(encoder, images, "product"), keep_ratio)
                      for images, _ in loader])


def picture(masks, dataset, encoder):
    """Draw eight images and their kept patches by {name: (n, N)}, of the encoder's patch size."""
    chosen = example_indices(dataset.targets)
    crop = v2.Compose(plain_crop(encoder.image_size))
    shown = [mosaic(crop(dataset[i][0]), encoder.patch_size) for i in chosen]
    return sheet({"image, by\nmean colour": (shown, None), **{
        f"{name}:\n{mask[0].sum()} of {mask.shape[1]}": (shown, mask[chosen])
        for name, mask in masks.items()}})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", type=data_name, help="a data set by name, or a folder, with labelled test images")
    add("checkpoints", nargs="+", type=Path, help="runs, and files of published weights")
    add("--data-root", default="datasets", help="folder of the named data sets")
    add("--keep-ratio", type=float, default=0.3, help="share of kept patches")
    add("--image-size", type=int, default=98, help="for published weights")
    add("--out", type=Path, help="the picture, a new file")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    require(not (args.out and args.out.exists()), f"--out {args.out} exists", UserError)
    data = load_data(args.data, args.data_root)
    require(data.test is not None, data.note, UserError)
    encoders = {}
    for path in args.checkpoints:
        config = read_weights(path).get("config", {})
        run = "method" in config
        name = f"{config['method']},\nseed {config['seed']}" if run else path.stem
        encoders[name] = load_encoder(path, run, None if run else args.image_size)
    sizes = {(encoder.image_size, encoder.patch_size) for encoder in encoders.values()}
    require(len(sizes) == 1, f"images and patches of several sizes in px: {sizes}", UserError)
    masks, device = {}, pick_device("auto")
    for name, encoder in encoders.items():
        values = measure(encoder, data.test, args.keep_ratio, device)
        masks[name] = kept_patches(encoder, data.test, args.keep_ratio)
        first = next(iter(masks.values()))
        values["in common"] = ((first & masks[name]).sum() / first.sum()).item()
        if len(masks) == 1:
            print("| | " + " | ".join(values) + " |\n" + "|---" * (len(values) + 1) + "|")
        cells = " | ".join(f"{value:.3f}" for value in values.values())
        print(f"| {name.replace(chr(10), ' ')} | {cells} |", flush=True)
    if args.out:
        picture(masks, data.test, encoder).save(args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with_line("kept.py", error)
