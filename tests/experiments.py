"""Print the tables of tests/RESULTS.md: runs of train.py over settings and seeds, as Markdown.

    python tests/experiments.py methods                         # the drawn birds, from scratch
    python tests/experiments.py pretrained flowers17 --data-root DIR --init WEIGHTS --seeds 5 6 7
    python tests/experiments.py recipe cars98 --init WEIGHTS    # any data that train.py takes
    python tests/experiments.py pictures                        # tests/pictures

Each run has a folder in runs/experiments; the same command resumes a killed one. A finished run is
a line of tests/results/<data>.jsonl and is not run again. A table has all seeds stored there with
the same identity: the initial weights, the images, device and precision, and the version of the
evaluation. `--seeds` without a number trains nothing and prints a table for each stored identity.
On a CPU runs are in float32, so that CPUs with and without bfloat16 agree. Metrics are of the last
epoch; ± is the standard deviation over seeds, differences are paired by seed, with their 95 %
interval. The tables in HELD_OUT train and evaluate with --held-out. Other options, such as
--image-size 224, go to train.py in all rows. The mean patch token and masked images are evaluated
by "pretrained" alone, and not for a run that another table has stored before.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import sys
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch, as it sets OMP_WAIT_POLICY

import numpy as np
import torch
from torch.utils.data import Subset
from torchvision.transforms import v2

import eval as evaluation
from data.augment import plain_crop, to_tensor
from data.birds import Birds
from data.draw import example_indices, sheet
from figure import overview
from kept import SHOWN, border_shares, measure, mosaic
from lodisc import (LoDisc, UserError, load_encoder, location_mask, mask_pixels, read_weights,
                    require)

RUNS, STORE = Path("runs/experiments"), ROOT / "tests" / "results"
GLOBAL, LOCAL, TWICE = ["--method", "global"], ["--method", "local"], ["--epochs", "twice"]
NEIGHBOURS = {name: ["--method", f"{ROOT}/tests/baselines.py:{name}"]
              for name in ("CVSA", "PARTICLE")}
BUILT_IN = "--encoder-lr 2e-5 --crop-min 0.08 --momentum 0.9".split()  # named as in "recipe"
# table: {row: options of train.py}; the others are compared with the first row
TABLES = {
    "methods": {"global": GLOBAL, "local": LOCAL, "lodisc": []},
    "neighbours": {"lodisc": [], "global": GLOBAL, **NEIGHBOURS},
    "pretrained": {"global": GLOBAL, "lodisc": [], "global, epochs x 2": [*GLOBAL, *TWICE],
                   "lodisc, epochs x 2": TWICE, "local": LOCAL, **NEIGHBOURS},
    "masks": {"random": ["--mask", "random"], "location": [], "block": ["--mask", "block"],
              "least": ["--mask", "least"], "global": GLOBAL},
    "details": {"lodisc": [], **{f"keep {ratio}": ["--keep-ratio", ratio]
                                 for ratio in ("0.1", "0.5", "0.7")},
                "rollout": ["--importance", "rollout"], "last layer": ["--importance", "last"],
                "tokens": ["--local-input", "tokens"]},
    # held out, tuned for MoCo v3 alone: one factor at a time, then the two that helped together
    "recipe": {f"encoder-lr {lr}, crop-min {crop}, momentum {ema}": [
        *GLOBAL, "--encoder-lr", lr, "--crop-min", crop, "--momentum", ema] for lr, crop, ema in
        map(str.split, ("2e-5 0.2 0.99", "5e-6 0.2 0.99", "5e-5 0.2 0.99", "2e-5 0.08 0.99",
                        "2e-5 0.35 0.99", "2e-5 0.2 0.9", "2e-5 0.08 0.9"))},
    # held out: possible reasons why LoDisc is not above MoCo v3
    "variants": {"lodisc": [], "global": [*GLOBAL, *BUILT_IN], "keep 0.1": ["--keep-ratio", "0.1"],
                 "keep 0.7": ["--keep-ratio", "0.7"], "tokens": ["--local-input", "tokens"],
                 "last layer": ["--importance", "last"],
                 **{f"{name} {value}": ["--method", f"{ROOT}/tests/experiments.py:Variant",
                                        "--method-option", f"{name}={value}"]
                    for name, value in (("weight", "0.5"), ("weight", "2"), ("blur", "True"))},
                 "lodisc, 154 px": ["--image-size", "154"],
                 "global, 154 px": [*GLOBAL, "--image-size", "154"]},
}
# the two best variants on cars98, on its test images with fresh seeds
TABLES["confirmed"] = {"global": GLOBAL, **{row: TABLES["variants"][row]
                                            for row in ("lodisc", "keep 0.7", "weight 0.5")}}
HELD_OUT = ("recipe", "variants")
SCRATCH = "from scratch"
COLUMNS = {name: place for name, place in evaluation.METRICS.items() if name != "top-5"}
WHERE = {"on the bird": ("localisation", "object"), "on its parts": ("localisation", "parts"),
         "part mIoU": ("parts", "mean_iou")}
PARTS = {"mean IoU": ("parts", "mean_iou"), **{part: ("parts", part) for part in Birds.parts}}
KEPT = {"rank-1, all": ("all", "rank1"), **{f"rank-1, {mask}": (mask, "rank1") for mask in SHOWN},
        "mAP, all": ("all", "mAP"), **{f"mAP, {mask}": (mask, "mAP") for mask in SHOWN[:2]},
        **{f"own image, {mask}": (mask, "own") for mask in SHOWN[:2]},
        "in common": ("location", "in_common")}
BEFORE = {"raw pixels": "pixels", "untrained": "untrained", "initial": "initial"}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
           10: 2.262}  # number of values: 97.5 % point of Student's t


class Variant(LoDisc):
    """LoDisc with a weighted local loss, or with the other patches blurred instead of zeroed."""

    def __init__(self, encoder, weight=1.0, blur=False, **options):
        super().__init__(encoder, **options)
        self.weight, self.blur = weight, blur

    def forward(self, view1, view2, generator=None, progress=0.0):
        out = super().forward(view1, view2, generator, progress)
        return out._replace(total=out.global_loss + self.weight * out.local_loss)

    def local_key(self, view, mask):
        size = self.encoder.patch_size
        if self.blur:  # sigma: the patch size
            blurred = v2.functional.gaussian_blur(view, 4 * size + 1, float(size))
            view = mask_pixels(view, mask, size) + mask_pixels(blurred, ~mask, size)
            mask = torch.ones_like(mask)
        return super().local_key(view, mask)


# --- runs -------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """What two runs of a table must have in common beside their options."""

    weights: str  # SHA-256 of the initial encoder's tensors, or SCRATCH
    images: str  # how many, and a hash of their names and sizes
    device: str  # its kind, and the precision in use
    evaluation: int  # version of the metrics: eval.VERSION


def weights_hash(encoder):
    """SHA-256 over an encoder's tensors: names in order, shapes, float32 values. Not of the file,
    which holds its own name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def init_hash(init, momentum=False):
    """The hash of the weights that --init gives, at their own image size; --init must exist."""
    return weights_hash(load_encoder(train.weights_file(init), momentum))


def image_files(dataset):
    """Return [(name, bytes)] of a data set's images; names are relative to their common folder."""
    if isinstance(dataset, Subset):
        files = image_files(dataset.dataset)
        return [files[i] for i in dataset.indices]
    if isinstance(dataset, Birds):  # drawn: for the sizes, a checksum of every hundredth image
        sums = [0 if i % 100 else zlib.crc32(dataset[i][0].tobytes()) for i in range(len(dataset))]
        return [(f"{dataset.split}, seed {dataset.seed}, {i}", sums[i]) for i in range(len(sums))]
    paths = [Path(path) for path in dataset.paths]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]


def describe_images(data):
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        for name, size in image_files(split):
            digest.update(f"{name} {size}\n".encode())
    return f"{len(data.train)} + {len(data.test)} images, {digest.hexdigest()[:16]}"


def describe_device(device, amp, width):
    """Return the kind of device and the precision in use, such as "NVIDIA H200, bfloat16"."""
    precision = train.pick_precision(amp, device, width) or torch.float32
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{kind}, {precision}".replace("torch.", "")


def settings_of(options):
    """Return train.py's settings for these options on this machine, and the identity of a run with
    them; raise for unlabelled data."""
    given, defaults = train.parse_args(options)
    settings = {**defaults, **given}
    data = train.load_data(*(settings[name] for name in ("data", "data_root", "download",
                                                         "held_out")))
    require(data.test is not None, data.note, UserError)
    device = train.pick_device(settings["device"])
    with redirect_stdout(None):
        train.fill_defaults(settings, device, len(data.train))
    weights = SCRATCH
    if settings["init"] != "none":
        weights = init_hash(settings["init"], settings["init_momentum"])
    return settings, Identity(weights, describe_images(data), describe_device(
        device, settings["amp"], settings["dim"]), evaluation.VERSION)


def run_name(data, options, seed):
    words = [Path(data).name, *options, "--seed", str(seed)]
    return "-".join(word.lstrip("-").split(":")[-1] for word in words)


def complete(data, options, root=None, init=None):
    """Return all options of a run but its seed, with "twice" replaced by twice the epochs."""
    options = [*options, "--data", data]
    if root:
        options += ["--data-root", root]
    if init:
        options += ["--init", init]
    given, defaults = train.parse_args([{"twice": "2"}.get(word, word) for word in options])
    if train.pick_device({**defaults, **given}["device"]).type == "cpu" and "amp" not in given:
        options += ["--amp", "off"]
    if "twice" in options:
        place = options.index("twice")
        settings, _ = settings_of(options[:place - 1] + options[place + 1:])
        options[place] = str(2 * settings["epochs"])
    return options


def run_folder(data, options, seed, identity):
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    return RUNS / f"{run_name(data, options, seed)}-{key}"


def run(data, options, seed, root=None, init=None, more=False):
    """Train and evaluate a run, unless done -> its folder and identity; more: the mean patch token
    and, of the momentum encoder, masked images too."""
    all_options = [*complete(data, options, root, init), "--seed", str(seed)]
    wanted, identity = settings_of(all_options)
    folder = run_folder(data, options, seed, identity)
    if not (folder / "checkpoint.pt").exists():
        shutil.rmtree(folder, ignore_errors=True)  # killed before the first checkpoint
    else:
        known = read_weights(folder)["config"]
        odd = [f"{name} {value}" for name, value in known.items()
               if name not in (*train.MOVABLE, "method") and value != wanted.get(name)]
        require(not odd, f"{folder} is a run with {', '.join(odd)}; move it away", UserError)
    if not (folder / "eval.json").exists():
        train.main([*all_options, "--resume" if folder.exists() else "--out", str(folder)])
    held_out = "--held-out" in options
    for command, part in (("masks", "localisation"), ("parts", "parts")):
        if data == "synthetic" and not held_out and part not in metrics_of(folder):
            evaluation.main([command, str(folder)])
    if more and "kept" not in metrics_of(folder):
        config, encoder = read_weights(folder)["config"], load_encoder(folder)
        found = train.load_data(config["data"], config["data_root"], held_out=held_out)
        device, crop = train.pick_device(config["device"]), (
            encoder.image_size, encoder.mean, encoder.std)
        encoders = evaluation.compared_encoders(config, encoder)
        rows = evaluation.evaluate(encoders, found, crop, "all", device, kind="mean")
        evaluation.save_rows(folder, rows, "mean")
        encoders["trained"] = load_encoder(folder, momentum=True)
        del encoders["raw pixels"]
        rows = measure(encoders, found.test, crop, config["keep_ratio"], device)
        evaluation.save_rows(folder, rows, "kept")
    return folder, identity


def metrics_of(folder):
    return evaluation.read_results(folder / "eval.json")


def stored(data):
    """Return the finished runs on a data set: {(name, identity): record}."""
    path, records = STORE / f"{Path(data).name}.jsonl", {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            identity = Identity(*(record[field] for field in Identity._fields))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is damaged: {error}") from None
        records[record["name"], identity] = record
    return records


def records_of(data, options):
    """Return the finished runs of options {row: options of train.py}:
    {identity: {row: {seed: record}}}, the identities in the order of the file."""
    found = {}
    for (name, identity), record in stored(data).items():
        seed = record["config"]["seed"]
        for row, words in options.items():
            if name == run_name(data, words, seed):
                table = found.setdefault(identity, {row: {} for row in options})
                table[row][seed] = record
    return found


def store(data, name, identity, folder, init=None):
    """Append a finished run: its identity, metrics, values per query, losses and seconds."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    losses = {column: [float(epoch[column]) for epoch in epochs] for column in epochs[0]
              if column.endswith("loss")}
    seconds = sum(float(epoch["seconds"]) for epoch in epochs)
    queries = evaluation.read_results(folder / "per_image.json")["retrieval"]["per_image"]
    queries = {key: [value if value is None else round(value, 4) for value in values]
               for key, values in queries.items()}
    config = read_weights(folder)["config"]
    test = train.load_data(config["data"], config["data_root"], held_out=config["held_out"]).test
    settings = {key: value for key, value in config.items()
                if key not in (*train.MOVABLE, "method")}
    record = {"name": name, **identity._asdict(), "source": Path(init).name if init else "",
              "where": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
              "config": settings, "losses": losses,
              "metrics": {**metrics_of(folder), "time": {"training": seconds}},
              "queries": {**queries, "class": test.targets}}
    STORE.mkdir(parents=True, exist_ok=True)
    path = STORE / f"{Path(data).name}.jsonl"
    with evaluation.locked(STORE):
        known = path.read_bytes() if path.exists() else b""
        line = json.dumps(record).encode() + b"\n"
        evaluation.write_whole(path, lambda file: file.write(known + line))


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


def bootstrap(differences, classes, draws=10_000):
    """Return the 95 % bootstrap interval of the mean of differences (seeds, queries). Resamples
    both sources of variance, seeds and, within each class, queries, with generator seed 0. A query
    that was left out, as the only one of its class, is NaN."""
    counted = ~np.isnan(differences).any(0)
    differences, classes = differences[:, counted], np.asarray(classes)[counted]
    rng, (seeds, queries) = np.random.default_rng(0), differences.shape
    chosen = rng.integers(seeds, size=(draws, seeds))
    sums = np.zeros(draws)
    for label in np.unique(classes):
        own = differences[:, classes == label]  # (seeds, queries of the class)
        drawn = rng.integers(own.shape[1], size=(draws, own.shape[1]))
        for seed in range(seeds):
            sums += own[chosen[:, seed, None], drawn].sum(1)
    low, high = np.percentile(sums / (seeds * queries), [2.5, 97.5])
    return f"[{low:+.3f}, {high:+.3f}]"


def markdown(rows, columns):
    """Format rows {name: {seed: metrics}}, columns {name: (part, key)} as lines of a table."""
    base, *others = rows
    first = rows[base]
    before = {name: {seed: metrics[key] for seed, metrics in first.items()}
              for name, key in BEFORE.items() if all(key in m for m in first.values())}
    values = {row: {name: {seed: metrics[part][key] for seed, metrics in runs.items()}
                    for name, (part, key) in columns.items() if part in next(iter(runs.values()))}
              for row, runs in (before | rows).items()}
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]

    def line(row, seeds, cells):
        cells = " | ".join(cells.get(name, "") for name in columns)
        lines.append(f"| {row} | {' '.join(map(str, sorted(seeds)))} | {cells} |")

    for row, cells in values.items():
        cells = {name: list(found.values()) for name, found in cells.items()}
        if row in ("raw pixels", "pixels"):  # only the probe depends on the seed
            cells = {name: [statistics.mean(found)] for name, found in cells.items()}
        line(row, (before | rows)[row], {name: spread(found) for name, found in cells.items()})
    for row in others:
        both = [seed for seed in rows[row] if seed in first]
        if len(both) > 1:
            line(f"{row} − {base}", both, {
                name: difference([found[seed] for seed in both],
                                 [values[base][name][seed] for seed in both])
                for name, found in values[row].items() if name != "training, s"})
    return lines


# --- pictures ---------------------------------------------------------------------------------


def pictures(data, seed, root=None, init=None, others=()):
    """Draw tests/pictures: the overview figure of LoDisc's run on the drawn birds, kept patches
    beside MoCo v3's; of runs from published weights, kept patches in mean colours, and print how
    many kept patches lie on the image's border."""
    folders = {name: run(data, [*TABLES["methods"][method], *others], seed, root, init)[0]
               for name, method in (("MoCo v3", "global"), ("LoDisc", "lodisc"))}
    config = read_weights(folders["LoDisc"])["config"]
    found, size = train.load_data(config["data"], config["data_root"]), config["image_size"]
    encoders = {name: load_encoder(folder, True) for name, folder in folders.items()}
    if init:
        initial = load_encoder(init, config["init_momentum"], size)
        encoders = {"initial\nweights": initial, **encoders}
    normalise = v2.Compose(to_tensor(config["mean"], config["std"]))
    crop, chosen = v2.Compose(plain_crop(size)), example_indices(found.test.targets)
    images = [crop(found.test[i][0]) for i in (chosen if init else chosen[::2])]
    shown = [mosaic(image, config["patch_size"]) for image in images] if init else images
    rows, images = {"image": (shown, None)}, torch.stack([normalise(image) for image in images])
    for name, encoder in encoders.items():
        importance = evaluation.importance_of(encoder, images, "product")
        mask = location_mask(importance, config["keep_ratio"])
        rows[f"{name}:\n{mask[0].sum()} of {mask.shape[1]}\npatches"] = shown, mask
        if init:
            shares = border_shares(encoder, found.test, (size, config["mean"], config["std"]),
                                   config["keep_ratio"])
            print(name.replace("\n", " "), *(f"{key} {share:.3f}" for key, share in shares.items()))
    pages = {f"kept_{Path(data).name}": sheet(rows)} if init else {
        "masks": sheet(rows, tile=180), "method": overview(folders["LoDisc"], found.train)}
    for name, page in pages.items():
        page.quantize(128).save(ROOT / "tests" / "pictures" / f"{name}.png", optimize=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("table", choices=[*TABLES, "pictures"])
    add("data", nargs="?", default="synthetic")
    add("--data-root", help="as for train.py")
    add("--init", type=train.absolute, help="as for train.py, in all rows")
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: print what is stored")
    add("--rows", nargs="+", help="only these; the first is compared with (default: all)")
    return parser.parse_known_args(argv)


def main(argv=None):
    args, others = parse_args(argv)
    data = train.data_name(args.data)
    if args.table == "pictures":
        require(args.seeds, "pictures: give the seed of the runs by --seeds", UserError)
        return pictures(data, args.seeds[0], args.data_root, args.init, others)
    table = TABLES[args.table]
    odd = sorted(set(args.rows or ()) - set(table))
    require(not odd, f"--rows: no {', '.join(odd)} in {', '.join(table)}", UserError)
    first = ["--held-out"] if args.table in HELD_OUT else []
    options = {row: first + table[row] + others for row in args.rows or table}
    found = records_of(data, options)
    if args.seeds:
        identities = {row: settings_of(complete(data, words, args.data_root, args.init))[1]
                      for row, words in options.items()}
        for row, identity in identities.items():
            seeds = {*args.seeds, *found.get(identity, {}).get(row, {})}
            require(len(seeds) <= len(STUDENT) + 1, f"--seeds: at most {len(STUDENT) + 1}, got "
                    f"{len(seeds)} with the stored", UserError)
        more = args.table == "pretrained"
        for seed in sorted(set(args.seeds)):  # so that finished seeds can be compared early
            for row, words in options.items():
                key = run_name(data, words, seed), identities[row]
                if key not in stored(data):  # another process may have finished it by now
                    folder, _ = run(data, words, seed, args.data_root, args.init, more)
                    store(data, *key, folder, args.init)
        found = {identity: rows for identity, rows in records_of(data, options).items()
                 if identity in identities.values()}
    elif args.init:
        given, _ = train.parse_args(others)
        weights = init_hash(args.init, given.get("init_momentum", False))
        found = {identity: rows for identity, rows in found.items() if identity.weights == weights}
    require(found, "no such run is stored; give --seeds", UserError)
    for identity, records in found.items():
        print_table(args.table, data, identity, records)


def print_table(table, data, identity, records):
    """Print the table of {row: {seed: record}}."""
    rows = {row: {seed: record["metrics"] for seed, record in seeds.items()}
            for row, seeds in records.items() if seeds}
    columns = COLUMNS | (WHERE if data == "synthetic" and table not in HELD_OUT else {})
    stored_runs = [record for seeds in records.values() for record in seeds.values()]
    places = sorted({record["where"] for record in stored_runs})
    weights = identity.weights
    if weights != SCRATCH:
        weights = f"{stored_runs[0]['source']}, SHA-256 of the tensors {weights}"
    print(f"\n{table} on {Path(data).name}: {identity.images}; {identity.device}, "
          f"{' or '.join(places)}; evaluation {identity.evaluation}; initial weights: {weights}\n")
    print("\n".join(markdown(rows, columns | {"training, s": ("time", "training")})))
    if table == "neighbours" and data == "synthetic":
        first = next(iter(rows.values()))
        before = {name: {seed: metrics[name] for seed, metrics in first.items()}
                  for name in ("untrained", "pixels")}
        print("\npart segmentation of the same runs\n")
        print("\n".join(markdown(before | rows, PARTS)))
    if table == "pretrained":
        for title, part, columns in (("features: the mean of the patch tokens", "mean", COLUMNS), (
                "with only some patches shown, of the momentum encoder", "kept", KEPT)):
            found = {row: {seed: metrics[part] for seed, metrics in seeds.items()
                           if part in metrics} for row, seeds in rows.items()}
            if any(found.values()):
                print(f"\n{title}\n")
                print("\n".join(markdown({row: seeds for row, seeds in found.items() if seeds},
                                         columns)))
        lodisc, rival = records.get("lodisc", {}), records.get("global", {})
        pairs = [(lodisc[seed], rival[seed]) for seed in lodisc if seed in rival]
        for name, key in (("rank-1", "rank1"), ("mAP", "average_precision")) if pairs else ():
            values = np.array([[one["queries"][key] for one in pair] for pair in pairs], float)
            print(f"\nlodisc − global, {name}, bootstrap over seeds and queries: "
                  f"{bootstrap(values[:, 0] - values[:, 1], pairs[0][0]['queries']['class'])}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        evaluation.exit_with_line("experiments.py", error)
