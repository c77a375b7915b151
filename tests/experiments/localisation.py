"""Measure how well the patches that a run's momentum encoder keeps localise the object.

    python tests/experiments/localisation.py runs/synthetic-lodisc-1

On centre crops of the test images, for data with regions (the drawn birds, CUB). Prints the table
and merges it into the run's eval.json."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

import eval as evaluation
from data.birds import BIRD, PART
from data.datasets import default_workers, load_data
from eval import location_masks, object_cover, patch_cover
from lodisc import UserError, load_encoder, require


def localisation(encoder, dataset, importance="product", keep_ratio=0.3, workers=0):
    """Return how much of the object, and of the drawn birds' deciding parts, the kept patches show.

    Values are of `object_cover`: 1 is chance level; NAME_most is the most for as few patches,
    NAME_fixed the best of one mask for all images. dataset: with regions(index)."""
    kept = location_masks(encoder, dataset, importance, keep_ratio, workers)  # (n, N)
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
            "have", UserError)
    encoder = encoder.to(evaluation.pick_device(config["device"]))
    return localisation(encoder, test, config["importance"], config["keep_ratio"], workers)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--workers", type=int, default=default_workers())
    args = parser.parse_args(argv)
    with torch.no_grad():
        metrics = measure(args.run, args.workers)
    for name, value in metrics.items():
        print(f"{name:<16}{value:.2f}")
    evaluation.save_results(args.run, {"momentum encoder": {"localisation": metrics}})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        evaluation.exit_with_line("localisation.py", error)
