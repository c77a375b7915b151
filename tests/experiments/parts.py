"""Few-shot part segmentation from frozen patch tokens, on data with part maps (the drawn birds).

    python tests/experiments/parts.py runs/synthetic-lodisc-1 [--shots 10]

Prints the mean intersection over union of every part, for raw pixels and the encoder before and
after training, merges it into the run's eval.json and draws eight images into parts.png."""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.transforms import v2

import eval as evaluation
from data.augment import cropped_maps, plain_crop
from data.datasets import default_workers, shuffled_by_class
from data.draw import example_indices, sheet
from lodisc import UserError, require

SHOTS, DRAWS = 10, 10  # labelled images, and draws of them


class PatchPixels(evaluation.RawPixels):
    """Raw pixels, whose patch tokens are the pixels of each patch."""

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size

    def tokens(self, images):
        return self(images), F.unfold(images, self.patch_size, stride=self.patch_size).mT


def part_labels(dataset, indices, image_size, patch_size):
    """Label patches by the part that covers most of their pixels, ties by the lower: (n, N)."""
    maps = cropped_maps(dataset.part_map, indices, image_size)
    cover = [F.avg_pool2d((maps == part).float(), patch_size) for part in range(len(dataset.parts))]
    return torch.stack(cover).argmax(0).flatten(1)


def draw_shots(targets, shots, draw):
    """Return the indices of labelled images, of all classes in turn, in a drawn order."""
    turns = zip_longest(*shuffled_by_class(targets, draw))
    order = [index for turn in turns for index in turn if index is not None]
    return order[:shots]


def segment_parts(encoders, data, preprocessing, shots=SHOTS, device="cpu", workers=0):
    """{name: encoder} -> {name: {"parts": {...}}}.

    `linear_probe` of patch tokens, on `shots` labelled training images of all classes in turn,
    every tenth held out; means over ten draws of each part's intersection over union, summed over
    all patches, and of mean_iou, without ground (part 0) and parts absent from the test patches.
    data: sets with part_map(index), see data/birds.py."""
    parts, crop = data.test.parts, preprocessing.crop
    patch_size = list(encoders.values())[-1].patch_size
    draws = [draw_shots(data.train.targets, shots, draw) for draw in range(DRAWS)]
    used, draws = torch.tensor(draws).unique(return_inverse=True)  # draws (DRAWS, shots)
    shown = Subset(data.train, used.tolist())
    train = evaluation.extract(encoders, shown, preprocessing, device, workers, "patches")
    test = evaluation.extract(encoders, data.test, preprocessing, device, workers, "patches")
    labels = part_labels(data.train, shown.indices, crop, patch_size)  # (images, N)
    true = part_labels(data.test, range(len(data.test)), crop, patch_size).flatten()  # (n N,)
    held_out = (torch.arange(shots) % 10 == 0).repeat_interleave(labels.shape[1])
    masks, results = F.one_hot(true, len(parts)).bool(), {}  # masks (n N, parts)
    present = masks.any(0)  # (parts,)
    require(bool(present[1:].any()), "no part covers most of a patch; use smaller ones", UserError)
    for name in encoders:
        features, test_features = train[name][0], test[name][0].flatten(0, 1)
        overlaps = []
        for images in draws:
            shots_set = features[images].flatten(0, 1), labels[images].flatten()
            probe = evaluation.linear_probe(shots_set, (test_features, true), device=device,
                                            held_out=held_out)
            predicted = torch.tensor(probe["per_image"]["predicted"])
            guess = F.one_hot(predicted, len(parts)).bool()
            overlaps.append((masks & guess).sum(0) / (masks | guess).sum(0))
        overlaps = torch.stack(overlaps)  # (DRAWS, parts)
        means = overlaps[:, 1:][:, present[1:]].mean(1)
        metrics = {"mean_iou": means.mean().item(), "std": means.std().item(), "shots": shots}
        for i, part in enumerate(parts):
            if present[i]:
                metrics[part] = overlaps[:, i].mean().item()
        metrics["draws"] = means.tolist()
        metrics["per_image"] = {"last_draw": predicted.tolist()}
        results[name] = {"parts": metrics}
    return results


def draw_parts(data, encoder, predicted):
    """Return a picture of test images, their parts and the predicted ones, (n, N)."""
    indices = example_indices(data.test.targets)
    crop = v2.Compose(plain_crop(encoder.image_size))
    images = [crop(data.test[i][0]) for i in indices]
    true = part_labels(data.test, indices, encoder.image_size, encoder.patch_size)
    return sheet({"image": (images, None), "true\nparts": (images, true),
                  "predicted\nparts": (images, predicted[indices])}, data.test.parts)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run's folder, its checkpoint.pt, or published weights")
    add("--shots", type=int, default=SHOTS, help="labelled images (default: %(default)s)")
    add("--data", help="a data set by name; default: the run's")
    add("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if any)")
    add("--workers", type=int, default=default_workers(), help="DataLoader workers; 0: none")
    add("--out", type=Path, help="a new file; default: parts.png in the run's folder")
    parser.set_defaults(what="parts", momentum=False, image_size=None, method=None, data_root=None,
                        features="class", heads=None, normalise=None)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = evaluation.pick_device(args.device)
    encoder, config = evaluation.load_subject(args, device)
    path = evaluation.output_path(args, config, "parts.png")
    evaluation.picture_format(path)  # before it is drawn
    data = evaluation.read_data(args, config)
    require(hasattr(data.train, "part_map"), f"--data {args.data} has no part maps; the drawn "
            "birds do (--data synthetic)", UserError)
    require(2 <= args.shots <= len(data.train), f"--shots must be in [2, {len(data.train)}], got "
            f"{args.shots}", UserError)
    encoders = evaluation.compared_encoders(config, encoder)
    encoders["raw pixels"] = PatchPixels(encoder.patch_size)
    preprocessing = evaluation.input_of(encoder)
    rows = segment_parts(encoders, data, preprocessing, args.shots, device, args.workers)
    parts, last = data.test.parts, list(rows.values())[-1]["parts"]
    columns = {"mean IoU": ("parts", "mean_iou"), "± draws": ("parts", "std")}
    for part in (*parts[1:], parts[0]):
        columns[part] = ("parts", part)
    print(evaluation.table(rows, columns))
    absent = [part for part in parts if part not in last]
    if absent:
        print(f"left out, as on no test patch: {', '.join(absent)}")
    if args.shots == SHOTS:
        evaluation.save_metrics(args, config, rows)
    elif config:
        evaluation.save_results(evaluation.run_folder(args), rows, f"{args.shots} shots")
    predicted = torch.tensor(last["per_image"]["last_draw"]).view(len(data.test), -1)
    evaluation.save_picture(draw_parts(data, encoder, predicted), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        evaluation.exit_with_line("parts.py", error)
