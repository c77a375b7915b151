"""Print the README's tables: runs of train.py over settings and seeds, as Markdown.

    python tests/experiments.py methods                     # on the drawn birds
    python tests/experiments.py masks flowers17 --data-root DIR
    python tests/experiments.py variants DIR                # any data that train.py takes
    python tests/experiments.py pictures                    # tests/pictures/masks.png

Runs go into runs/experiments, a folder each. A finished run is not repeated, one that was killed
resumes from its checkpoint: call again until it prints. Metrics are of the last epoch; ± is the
standard deviation over seeds. The tables in HELD_OUT train and evaluate with --held-out.
"""

import argparse
import csv
import json
import shutil
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch: it sets how idle threads wait

import torch
from PIL import Image
from torchvision.transforms import v2

import eval as evaluation
from data.augment import plain_crop, to_tensor
from data.birds import Birds
from data.draw import example_indices, sheet
from lodisc import LoDisc, UserError, load_encoder, location_mask, read_weights, require

RUNS = Path("runs/experiments")
# table: {row: options of train.py}; the first row is what the others are compared with
TABLES = {
    "methods": {"global": ["--method", "global"], "local": ["--method", "local"], "lodisc": []},
    "neighbours": {"lodisc": [], "global": ["--method", "global"],
                   **{name: ["--method", f"{ROOT}/tests/baselines.py:{name}"]
                      for name in ("CVSA", "PARTICLE")}},
    "masks": {"random": ["--mask", "random"], "location": [], "block": ["--mask", "block"],
              "least": ["--mask", "least"]},
    "keep": {"0.3": [],
             **{ratio: ["--keep-ratio", ratio] for ratio in ("0.1", "0.5", "0.7", "0.9")}},
    "importance": {"product": [], "rollout": ["--importance", "rollout"],
                   "last layer": ["--importance", "last"],
                   "product, tokens": ["--local-input", "tokens"]},
    # held out: the recipe, tuned with MoCo v3 alone, then the variants of LoDisc
    "recipe": {row: ["--method", "global", *options] for row, options in {
        "as it is": [], "lr 2e-3": ["--lr", "2e-3"], "lr 8e-3": ["--lr", "8e-3"],
        "weight decay 0.02": ["--weight-decay", "0.02"],
        "temperature 0.1": ["--temperature", "0.1"], "temperature 0.4": ["--temperature", "0.4"],
        "crop from 0.2": ["--crop-min", "0.2"], "warm-up 6": ["--warmup-epochs", "6"]}.items()},
    "variants": {"lodisc": [], "global": ["--method", "global"],
                 "rollout": ["--importance", "rollout"], "keep 0.7": ["--keep-ratio", "0.7"],
                 "tokens": ["--local-input", "tokens"], "block": ["--mask", "block"],
                 "local loss rises": ["--method", f"{Path(__file__).resolve()}:Rising"],
                 "mask follows late": ["--method", f"{Path(__file__).resolve()}:Late"]},
    # on test/, once, with seeds 5 to 9: the best of the variants by linear top-1
    "confirm": {"global": ["--method", "global"], "block": ["--mask", "block"]},
}
HELD_OUT = ("recipe", "variants")
WHERE = {"on the bird": ("localisation", "object"), "on its parts": ("localisation", "parts"),
         "part mIoU": ("parts", "mean_iou")}
PARTS = {"mean IoU": ("parts", "mean_iou"), **{part: ("parts", part) for part in Birds.parts}}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
           10: 2.262}  # number of values: 97.5 % point of Student's t


# --- schedules, as method files ---------------------------------------------------------------


class Rising(LoDisc):
    """The local loss's weight rises linearly from 0 to 1 over the first half of the run."""

    def forward(self, view1, view2, generator=None, progress=0.0):
        out = super().forward(view1, view2, generator, progress)
        return out._replace(total=out.global_loss + min(1, 2 * progress) * out.local_loss)


class Late(LoDisc):
    """Random masks in the first half of the run, the attention's afterwards."""

    def forward(self, view1, view2, generator=None, progress=0.0):
        self.mask = "random" if progress < 0.5 else "location"
        return super().forward(view1, view2, generator, progress)


# --- runs -------------------------------------------------------------------------------------


def settings_of(options):
    """Return what train.py makes of the options on this machine; they must lead to metrics."""
    given, defaults = train.parse_args(options)
    settings = {**defaults, **given}
    data = train.load_data(*(settings[name] for name in ("data", "data_root", "download",
                                                         "held_out")))
    require(data.test is not None, data.note, UserError)
    with redirect_stdout(None):
        train.fill_defaults(settings, train.pick_device(settings["device"]), len(data.train))
    return settings


def run(data, options, seed, root=None):
    """Return the run's folder, trained and evaluated now or before."""
    options = [*options, "--seed", str(seed)]
    name = "-".join(option.lstrip("-").split(":")[-1] for option in [Path(data).name, *options])
    folder = RUNS / name
    options += ["--data", data] + ["--data-root", root] * bool(root)
    wanted = settings_of(options)
    if not (folder / "checkpoint.pt").exists():
        shutil.rmtree(folder, ignore_errors=True)  # killed before the first checkpoint
    else:
        known = read_weights(folder)["config"]
        odd = [f"{name} {value}" for name, value in known.items()
               if name not in (*train.MOVABLE, "method") and value != wanted.get(name)]
        require(not odd, f"{folder} is a run with {', '.join(odd)}; move it away", UserError)
    if not (folder / "eval.json").exists():
        train.main([*options, "--resume" if folder.exists() else "--out", str(folder)])
    has_regions = data == "synthetic" and "--held-out" not in options
    for command, part in (("masks", "localisation"), ("parts", "parts")) if has_regions else ():
        if part not in metrics_of(folder):
            evaluation.main([command, str(folder)])
    return folder


def metrics_of(folder):
    return json.loads((folder / "eval.json").read_text())


# --- tables -----------------------------------------------------------------------------------


def spread(values):
    if min(values) > 10:  # seconds
        return f"{statistics.mean(values):.0f}"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def difference(values, others):
    """Return the mean of the paired differences and its 95 % interval, by Student's t."""
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    mean = statistics.mean(pairs)
    half = STUDENT[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def seconds(folder):
    with open(folder / "metrics.csv") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file))


def markdown(rows, columns):
    """rows {name: [a run's metrics]}, columns {name: (part, key)} -> lines of a table."""
    base, *others = rows
    before = {name: [metrics[key] for metrics in rows[base]] for name, key in (
        ("raw pixels", "pixels"), ("untrained", "untrained"), ("initial", "initial"))
        if all(key in metrics for metrics in rows[base])}
    values = {row: {name: [metrics[part][key] for metrics in runs]
                    for name, (part, key) in columns.items() if part in runs[0]}
              for row, runs in (before | rows).items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def line(row, cells):
        lines.append(f"| {row} | " + " | ".join(cells.get(name, "") for name in columns) + " |")

    for row, cells in values.items():
        line(row, {name: spread(found) for name, found in cells.items()})
    for row in others if len(rows[base]) > 1 else []:
        line(f"{row} − {base}", {name: difference(found, values[base][name])
                                 for name, found in values[row].items() if name != "training, s"})
    return lines


# --- pictures ---------------------------------------------------------------------------------


def pictures(seed):
    """Draw tests/pictures/masks.png: the pivotal patches of the initial weights, of MoCo v3 alone
    and of LoDisc, on the drawn birds."""
    folders = {method: run("synthetic", TABLES["methods"][method], seed)
               for method in ("global", "lodisc")}
    config, test = read_weights(folders["lodisc"])["config"], Birds("test", 20)
    crop = v2.Compose(plain_crop(config["image_size"]))
    birds = [crop(test[i][0]) for i in example_indices(test.targets)]
    encoders = {"untrained": train.build_model(config).momentum_encoder.eval(),
                **{method: load_encoder(folder, momentum=True)
                   for method, folder in folders.items()}}
    rows = {"image": (birds, None)}
    for name, encoder in encoders.items():
        normalise = v2.Compose(to_tensor(encoder.mean, encoder.std))
        images = torch.stack([normalise(bird) for bird in birds])
        importance = evaluation.importance_of(encoder, images, "product")
        rows[f"{name},\nimportance"] = birds, importance
        rows[f"{name},\nkept 30 %"] = birds, location_mask(importance, 0.3)
    page = sheet(rows)
    page = page.resize((page.width * 2 // 3, page.height * 2 // 3), Image.Resampling.BOX)
    page.quantize(48).save(ROOT / "tests" / "pictures" / "masks.png", optimize=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=[*TABLES, "pictures"])
    parser.add_argument("data", nargs="?", default="synthetic")
    parser.add_argument("--data-root", help="as train.py's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    seeds = sorted(set(args.seeds))
    require(len(seeds) <= max(STUDENT), f"--seeds: at most {max(STUDENT)}, got {len(seeds)}",
            UserError)
    data = train.data_name(args.data)
    if args.table == "pictures":
        return pictures(seeds[0])
    folders = {row: [] for row in TABLES[args.table]}
    for seed in seeds:  # seed by seed, so that finished seeds can be compared early
        for row, options in TABLES[args.table].items():
            options = ["--held-out"] * (args.table in HELD_OUT) + options
            folders[row].append(run(data, options, seed, args.data_root))
    rows = {row: [{**metrics_of(folder), "time": {"training": seconds(folder)}} for folder in runs]
            for row, runs in folders.items()}
    columns = dict(evaluation.MAIN_METRICS)
    if data == "synthetic" and args.table not in ("keep", *HELD_OUT):  # ratios differ in the most
        columns |= WHERE
    print(f"\n{args.table} on {Path(data).name}, seeds {', '.join(map(str, seeds))}\n")
    print("\n".join(markdown(rows, columns | {"training, s": ("time", "training")})))
    if args.table == "neighbours" and data == "synthetic":
        runs = next(iter(rows.values()))
        before = {name: [metrics[name] for metrics in runs] for name in ("untrained", "pixels")}
        print("\npart segmentation of the same runs\n")
        print("\n".join(markdown(before | rows, PARTS)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        evaluation.exit_with_line("experiments.py", error)
