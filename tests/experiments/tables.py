"""Print the tables of RESULTS.md: runs of train.py over settings and seeds, as Markdown.

    python tests/experiments/tables.py methods                  # the drawn birds, from scratch
    python tests/experiments/tables.py pretrained flowers17 --data-root DIR --init WEIGHTS
    python tests/experiments/tables.py recipe cars98 --init WEIGHTS   # any data that train.py takes
    python tests/experiments/tables.py pictures                 # tests/experiments/pictures
    python tests/experiments/tables.py chart                    # of all stored "benchmark" runs

Each run has a folder in runs/experiments; the same command resumes a killed one. A finished run is
a line of results/<data>.jsonl and is not run again. A table has all seeds stored there with
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
import shutil
import statistics
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch, as it sets OMP_WAIT_POLICY

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

import eval as evaluation
import localisation
import parts
from data.augment import plain_crop, to_tensor
from data.birds import Birds
from data.datasets import hash_images
from data.draw import example_indices, sheet
from chart import chart
from figure import overview
from kept import SHOWN, border_fractions, measure
from lodisc import (LoDisc, UserError, box_mask, load_encoder, location_mask, mask_pixels,
                    read_weights, require)

RUNS, STORE = Path("runs/experiments"), HERE / "results"
MOCOV3, LOCAL, TWICE = ["--method", "mocov3"], ["--global-weight", "0"], ["--epochs", "twice"]
CROP = ["--local-input", "crop"]
SHORT, LONG, LONGEST = (["--epochs", epochs] for epochs in ("3", "12", "50"))
BASELINES = ROOT / "tests" / "baselines"
CVSA = ["--method", f"{BASELINES}/cvsa.py:CVSA"]
RELEASED = ["--method", f"{BASELINES}/released.py:Released", *(
    "--epochs 20 --warmup-epochs 0 --batch-size 32 --lr 1e-3 --encoder-lr 1.25e-4 "
    "--weight-decay 0.5 --momentum 0.99 --crop-min 0.08").split()]
NEIGHBOURS = {"CVSA (after the abstract)": CVSA,
              "PARTICLE": ["--method", f"{BASELINES}/particle.py:PARTICLE"]}
BUILT_IN = "--encoder-lr 2e-5 --crop-min 0.08 --momentum 0.9".split()  # named as in "recipe"
RECIPE_TRIALS = (  # encoder learning rate, smallest crop, EMA: one factor at a time, then two
    "2e-5 0.2 0.99", "5e-6 0.2 0.99", "5e-5 0.2 0.99", "2e-5 0.08 0.99", "2e-5 0.35 0.99",
    "2e-5 0.2 0.9", "2e-5 0.08 0.9")
KEEP_01, KEEP_05, KEEP_07 = (["--keep-ratio", ratio] for ratio in ("0.1", "0.5", "0.7"))
TOKENS, LAST = ["--local-input", "tokens"], ["--importance", "last"]
BLUR = ["--method", f"{HERE}/tables.py:Blurred", "--method-option", "blur=True"]
CONTROLS = {name: ["--method", f"{HERE}/controls.py:{name}"]
            for name in ("Block", "Box", "Centre", "Anywhere", "FirstComponent", "Oracle",
                         "Antioracle")}
# table: {row: options of train.py}; the others are compared with the first row
TABLES = {
    "methods": {"mocov3": MOCOV3, "local alone": LOCAL, "lodisc": []},
    "neighbours": {"lodisc": [], "mocov3": MOCOV3, **NEIGHBOURS},
    "pretrained": {"mocov3": MOCOV3, "lodisc": [], "mocov3, epochs x 2": [*MOCOV3, *TWICE],
                   "lodisc, epochs x 2": TWICE, "local alone": LOCAL, **NEIGHBOURS},
    "masks": {"random": ["--mask", "random"], "location": [], "block": CONTROLS["Block"],
              "least": ["--mask", "least"], "mocov3": MOCOV3},
    "details": {"lodisc": [], "keep 0.1": KEEP_01, "keep 0.5": KEEP_05, "keep 0.7": KEEP_07,
                "rollout": ["--importance", "rollout"], "last layer": LAST, "tokens": TOKENS},
    "recipe": {},  # held out, tuned for MoCo v3 alone; filled below
    # held out: possible reasons why LoDisc is not above MoCo v3
    "variants": {"lodisc": [], "mocov3": [*MOCOV3, *BUILT_IN], "keep 0.1": KEEP_01,
                 "keep 0.7": KEEP_07, "tokens": TOKENS, "last layer": LAST,
                 "local weight 0.5": ["--local-weight", "0.5"],
                 "local weight 2": ["--local-weight", "2"], "blur True": BLUR,
                 "lodisc, 154 px": ["--image-size", "154"],
                 "mocov3, 154 px": [*MOCOV3, "--image-size", "154"]},
    # held out: the weight of CVSA's alignment loss
    "cvsa": {f"CVSA (after the abstract), weight {weight}": [
        *CVSA, "--method-option", f"weight={weight}"] for weight in ("0.03", "0.1", "0.3", "1")},
    # held out: what the local branch sees
    "regions": {"mocov3": MOCOV3, "lodisc": [], "local weight 0.5": ["--local-weight", "0.5"],
                "crop": CROP, "crop anywhere": [*CONTROLS["Anywhere"], *CROP],
                "crop at the centre": [*CONTROLS["Centre"], *CROP],
                "crop, first component": [*CONTROLS["FirstComponent"], *CROP]},
    # held out: the box's shape and its enlargement, one by one
    "box": {"mocov3": MOCOV3, "lodisc": [], "box, the rest zero": CONTROLS["Box"], "crop": CROP},
    # held out, of data with regions: if it were told where the object is
    "oracle": {"mocov3": MOCOV3, "lodisc": [], "oracle": CONTROLS["Oracle"],
               "antioracle": CONTROLS["Antioracle"], "crop": CROP,
               "oracle, crop": [*CONTROLS["Oracle"], *CROP],
               "antioracle, crop": [*CONTROLS["Antioracle"], *CROP]},
    # held out, the schedule stretched to each length
    "length": {"mocov3, 3 epochs": [*MOCOV3, *SHORT], "lodisc, 3 epochs": SHORT,
               "crop, 3 epochs": [*CROP, *SHORT], "mocov3, 12 epochs": [*MOCOV3, *LONG],
               "lodisc, 12 epochs": LONG, "crop, 12 epochs": [*CROP, *LONG],
               "mocov3, 50 epochs": [*MOCOV3, *LONGEST], "lodisc, 50 epochs": LONGEST,
               "crop, 50 epochs": [*CROP, *LONGEST]},
    # test images: the released code's method and recipe, 20 of its 100 epochs
    "released": {"released, local weight 0": [*RELEASED, "--local-weight", "0"],
                 "released": RELEASED},
    # test images, with fresh seeds
    "benchmark": {"mocov3": MOCOV3, "lodisc": [], "crop": CROP},
    # the two best variants on cars98, on its test images with fresh seeds
    "confirmed": {"mocov3": MOCOV3, "lodisc": [], "keep 0.7": KEEP_07,
                  "local weight 0.5": ["--local-weight", "0.5"]},
}
for trial in RECIPE_TRIALS:
    lr, crop, ema = trial.split()
    TABLES["recipe"][f"encoder-lr {lr}, crop-min {crop}, momentum {ema}"] = [
        *MOCOV3, "--encoder-lr", lr, "--crop-min", crop, "--momentum", ema]
HELD_OUT = ("recipe", "variants", "cvsa", "regions", "box", "oracle", "length")
WITH_BOOTSTRAP = ("regions", "box", "oracle", "length", "released", "benchmark")
SCRATCH = "from scratch"
COLUMNS = {name: place for name, place in evaluation.METRICS.items() if name != "top-5"}
WHERE = {"on the bird": ("localisation", "object"), "on its parts": ("localisation", "parts"),
         "part mIoU": ("parts", "mean_iou")}
PARTS = {"mean IoU": ("parts", "mean_iou"), **{part: ("parts", part) for part in Birds.parts}}
KEPT = {"rank-1, all": ("all", "rank1"), **{f"rank-1, {mask}": (mask, "rank1") for mask in SHOWN},
        "mAP, all": ("all", "mAP"), **{f"mAP, {mask}": (mask, "mAP") for mask in SHOWN[:2]},
        **{f"own image, {mask}": (mask, "own") for mask in SHOWN[:2]},
        "in common": ("location", "in_common")}
CHART = {"cub": "CUB-200-2011", "grocery": "Grocery Store", "flowers17": "Oxford flowers 17",
         "cars98": "cars98"}
BEFORE = {"raw pixels": "pixels", "untrained": "untrained", "initial": "initial"}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
           10: 2.262}  # number of values: 97.5 % point of Student's t


class Blurred(LoDisc):
    """LoDisc with the other patches blurred instead of zeroed."""

    def __init__(self, encoder, blur=True, **options):
        super().__init__(encoder, **options)
        self.blur = blur

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


def describe_images(data):
    return (f"{len(data.train)} + {len(data.test)} images, "
            f"{hash_images(data.train, data.test)}")


def describe_device(device, amp, width):
    """Return the kind of device and the precision in use, such as "NVIDIA H200, bfloat16"."""
    precision = train.pick_precision(amp, device, width) or torch.float32
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{kind}, {precision}".replace("torch.", "")


def settings_of(options):
    """Return a run's settings for these options of train.py on this machine, and its identity;
    raise UserError for unlabelled data."""
    given, defaults = train.parse_args(options)
    settings = {**defaults, **given}
    data = train.load_data(settings["data"], settings["data_root"], settings["download"],
                           settings["held_out"])
    require(data.test is not None, data.note, UserError)
    device = train.pick_device(settings["device"])
    encoder = train.load_init(settings)
    config = train.fill_defaults(settings, device, len(data.train), encoder=encoder)
    weights = SCRATCH if encoder is None else weights_hash(encoder)
    where = describe_device(device, config["amp"], config["dim"])
    return config, Identity(weights, describe_images(data), where, evaluation.VERSION)


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
    settings, identity = settings_of(all_options)
    folder = run_folder(data, options, seed, identity)
    if not (folder / "checkpoint.pt").exists():
        shutil.rmtree(folder, ignore_errors=True)  # killed before the first checkpoint
    else:
        check_settings(folder, settings)
    if not (folder / "eval.json").exists():
        before = stored_before(data, identity, settings["image_size"])
        words = [*all_options, "--resume" if folder.exists() else "--out", str(folder)]
        compared = trained_alone if before else train.compared_encoders
        with patch.object(train, "compared_encoders", compared):
            train.main(words)
        results = before | metrics_of(folder)
        evaluation.write_text(folder / "eval.json", json.dumps(results, indent=2) + "\n")
    if data == "synthetic" and "--held-out" not in options:
        if "localisation" not in metrics_of(folder):
            localisation.main([str(folder)])
        if "parts" not in metrics_of(folder):
            parts.main([str(folder)])
    if more and "kept" not in metrics_of(folder):
        evaluate_more(folder)
    return folder, identity


def stored_before(data, identity, image_size):
    """Return the metrics of raw pixels and of the initial weights from a stored run of this
    identity and size; {} without one, or from scratch, where the initial weights depend on the
    seed."""
    if identity.weights == SCRATCH:
        return {}
    for (_, other), record in stored(data).items():
        if other == identity and record["config"]["image_size"] == image_size:
            return {name: record["metrics"][name] for name in ("pixels", "initial")}
    return {}


def trained_alone(config, encoder):
    """In place of eval.compared_encoders, where the other rows are known."""
    return {"trained": encoder}


def check_settings(folder, settings):
    """Raise UserError if a folder's run has other settings."""
    for name, value in read_weights(folder)["config"].items():
        movable = name in (*train.MOVABLE, "method")
        require(movable or value == settings.get(name), f"{folder} is a run with {name} {value}; "
                "move it away", UserError)


def evaluate_more(folder):
    """Evaluate a run's mean patch token, and masked images by its momentum encoder."""
    config, encoder = read_weights(folder)["config"], load_encoder(folder)
    data = train.load_data(config["data"], config["data_root"], held_out=config["held_out"])
    device, preprocessing = train.pick_device(config["device"]), train.preprocessing_of(config)
    encoders = evaluation.compared_encoders(config, encoder)
    rows = evaluation.evaluate(encoders, data, preprocessing, "all", device, kind="mean")
    evaluation.save_results(folder, rows, "mean")
    encoders["trained"] = load_encoder(folder, use_momentum=True)
    del encoders["raw pixels"]
    rows = measure(encoders, data.test, preprocessing, config["keep_ratio"], device)
    evaluation.save_results(folder, rows, "kept")


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
    tables = {}
    for (name, identity), record in stored(data).items():
        seed = record["config"]["seed"]
        for row, words in options.items():
            if name == run_name(data, words, seed):
                table = tables.setdefault(identity, {row: {} for row in options})
                table[row][seed] = record
    return tables


def pack(per_image):
    """Return what the bootstrap needs of retrieval's values per query, in few characters: hits as
    text of 1 and 0, average precision in units of 1e-4; a query that was left out is "-", null."""
    hits = {None: "-", 0.0: "0", 1.0: "1"}
    precisions = per_image["average_precision"]
    return {"rank1": "".join(hits[value] for value in per_image["rank1"]),
            "average_precision": [None if value is None else round(1e4 * value)
                                  for value in precisions]}


def unpack(queries, key):
    """Return `pack`ed values of all queries, NaN for one that was left out: (n,)."""
    if key == "rank1":
        return np.array([{"-": np.nan, "0": 0.0, "1": 1.0}[hit] for hit in queries[key]])
    return np.array(queries[key], dtype=float) / 1e4


def store(data, name, identity, folder, init=None):
    """Append a finished run: its identity, metrics, values per query, losses and seconds."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    losses = {}
    for column in epochs[0]:
        if column.endswith("loss"):
            losses[column] = [float(epoch[column]) for epoch in epochs]
    seconds = sum(float(epoch["seconds"]) for epoch in epochs)
    per_image = evaluation.read_results(folder / "per_image.json")["retrieval"]["per_image"]
    config = read_weights(folder)["config"]
    test = train.load_data(config["data"], config["data_root"], held_out=config["held_out"]).test
    settings = {key: value for key, value in config.items()
                if key not in (*train.MOVABLE, "method")}
    curve = {}  # of a run with --held-out; the first epochs of an older one lack it
    for column in ("rank1", "mAP"):
        if column in epochs[0]:
            curve[column] = [float(epoch[column]) for epoch in epochs if epoch[column]]
    record = {"name": name, **identity._asdict(), "source": Path(init).name if init else "",
              "where": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
              "config": settings, "losses": losses, "curve": curve,
              "metrics": {**metrics_of(folder), "time": {"training": seconds}},
              "queries": pack(per_image)}
    STORE.mkdir(parents=True, exist_ok=True)
    path = STORE / f"{Path(data).name}.jsonl"
    with evaluation.locked(STORE):
        lines = path.read_bytes() if path.exists() else b""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        evaluation.write_whole(path, lambda file: file.write(lines + line))
        classes = evaluation.read_results(STORE / "classes.json") | {identity.images: test.targets}
        evaluation.write_text(STORE / "classes.json", format_classes(classes))


def format_classes(classes):
    """Return {images: class of each test image} as JSON, a line for each data set."""
    lines = [f"{json.dumps(images)}: {json.dumps(targets, separators=(',', ':'))}"
             for images, targets in classes.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


# --- tables -----------------------------------------------------------------------------------


def spread(values):
    if max(values) > 1:  # seconds
        return f"{statistics.mean(values):.0f}"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def mean_and_half(values):
    """Return the mean of values and half the width of its 95 % interval, by Student's t; 0 for one
    value."""
    if len(values) == 1:
        return values[0], 0.0
    standard_error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), STUDENT[len(values)] * standard_error


def difference(values, base_values):
    """Return the mean of the paired differences and its 95 % interval, by Student's t."""
    mean, half = mean_and_half([a - b for a, b in zip(values, base_values, strict=True)])
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
        of_class = differences[:, classes == label]  # (seeds, queries of the class)
        drawn = rng.integers(of_class.shape[1], size=(draws, of_class.shape[1]))
        for seed in range(seeds):
            sums += of_class[chosen[:, seed, None], drawn].sum(1)
    low, high = np.percentile(sums / (seeds * queries), [2.5, 97.5])
    return f"[{low:+.3f}, {high:+.3f}]"


def initial_rows(runs):
    """Return the rows of raw pixels and of the initial weights, {name: {seed: metrics}}, if all
    runs {seed: metrics} have them."""
    rows = {}
    for name, key in BEFORE.items():
        if all(key in metrics for metrics in runs.values()):
            rows[name] = {seed: metrics[key] for seed, metrics in runs.items()}
    return rows


def values_of(runs, columns):
    """Return {column: {seed: value}} of runs {seed: metrics}, for the columns that they have."""
    values = {}
    for name, (part, key) in columns.items():
        if part in next(iter(runs.values())):
            values[name] = {seed: metrics[part][key] for seed, metrics in runs.items()}
    return values


def markdown(rows, columns):
    """Format rows {name: {seed: metrics}}, columns {name: (part, key)} as lines of a table."""
    base, *rivals = rows
    rows = initial_rows(rows[base]) | rows
    values = {row: values_of(runs, columns) for row, runs in rows.items()}
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]

    def add_line(row, seeds, cells):
        cells = " | ".join(cells.get(name, "") for name in columns)
        lines.append(f"| {row} | {' '.join(map(str, sorted(seeds)))} | {cells} |")

    for row, cells in values.items():
        texts = {}
        for name, by_seed in cells.items():
            numbers = list(by_seed.values())
            if row in ("raw pixels", "pixels"):  # only the probe depends on the seed
                numbers = [statistics.mean(numbers)]
            texts[name] = spread(numbers)
        add_line(row, rows[row], texts)
    for row in rivals:
        seeds = [seed for seed in rows[row] if seed in rows[base]]
        if len(seeds) < 2:
            continue
        texts = {}
        for name, by_seed in values[row].items():
            if name != "training, s":
                base_values = [values[base][name][seed] for seed in seeds]
                texts[name] = difference([by_seed[seed] for seed in seeds], base_values)
        add_line(f"{row} − {base}", seeds, texts)
    return lines


# --- pictures ---------------------------------------------------------------------------------


def draw_kept(data, encoders, config, tile, boxes=()):
    """Return a sheet of four test images and the patches that each encoder keeps of them; of those
    named in boxes, the box."""
    normalise = v2.Compose(to_tensor(config["mean"], config["std"]))
    crop = v2.Compose(plain_crop(config["image_size"]))
    large = v2.Compose(plain_crop(max(tile, config["image_size"])))
    indices = example_indices(data.test.targets)[::2]
    shown = [large(data.test[i][0]) for i in indices]
    batch = torch.stack([normalise(crop(data.test[i][0])) for i in indices])
    rows = {"image": (shown, None)}
    for name, encoder in encoders.items():
        importance = evaluation.importance_of(encoder, batch, "product")
        choose = box_mask if name in boxes else location_mask
        mask = choose(importance, config["keep_ratio"])
        rows[f"{name}:\n{mask[0].sum()} of {mask.shape[1]}\npatches"] = shown, mask
    return sheet(rows, tile=tile)


def pictures(data, seed, root=None, init=None, more_options=()):
    """Draw pictures/: of the drawn birds LoDisc's run, its overview figure, and kept patches beside
    MoCo v3's; from published weights, photographs: kept patches and nearest neighbours, and print
    how many kept patches lie on the image's border."""
    folders, table = {}, TABLES["benchmark" if init else "methods"]
    for name, row in (("MoCo v3", "mocov3"), ("LoDisc", "lodisc"), ("LoDisc,\nbox", "crop")):
        if row in table:
            folders[name], _ = run(data, [*table[row], *more_options], seed, root, init)
    config = read_weights(folders["LoDisc"])["config"]
    images = train.load_data(config["data"], config["data_root"])
    encoders = {name: load_encoder(folder, use_momentum=True) for name, folder in folders.items()}
    drawn = HERE / "pictures"
    if not init:
        for name, page in (("masks", draw_kept(images, encoders, config, tile=180)),
                           ("method", overview(folders["LoDisc"], images.train))):
            page.quantize(128).save(drawn / f"{name}.png", optimize=True)
        shutil.copy(folders["LoDisc"] / "run.png", drawn)
        return
    initial = load_encoder(init, config["init_momentum"], config["image_size"])
    encoders = {"initial\nweights": initial, **encoders}
    for name, encoder in encoders.items():
        fractions = border_fractions(encoder, images.test, train.preprocessing_of(config),
                                     config["keep_ratio"])
        cells = [f"{importance} {value:.3f}" for importance, value in fractions.items()]
        print(name.replace("\n", " "), *cells)
    page = draw_kept(images, encoders, config, tile=256, boxes=["LoDisc,\nbox"])
    save_photographs(page, drawn / f"kept_{Path(data).name}.jpg")
    path = drawn / "neighbours.png"
    evaluation.main(["neighbours", str(folders["LoDisc,\nbox"]), "--out", str(path)])
    save_photographs(Image.open(path), drawn / f"neighbours_{Path(data).name}.jpg")
    path.unlink()


def save_photographs(page, path):
    page.save(path, quality=50, optimize=True, progressive=True)  # 1,200 px in less than 200 KB


def draw_chart(more_options):
    """Draw pictures/results.png: rank-1 and mAP of the "benchmark" runs on the test images, of the
    data sets that have all rows."""
    results = {"rank-1": {}, "mAP": {}}
    for data, title in CHART.items():
        options = {row: words + more_options for row, words in TABLES["benchmark"].items()}
        whole = [rows for rows in records_of(data, options).values() if all(rows.values())]
        if not whole:
            print(f"left out: {title}, which lacks rows of benchmark")
            continue
        rows = whole[-1]
        runs = {"initial weights": [record["metrics"]["initial"] for record in
                                    rows["mocov3"].values()]}
        for row, name in (("mocov3", "MoCo v3"), ("lodisc", "LoDisc"), ("crop", "LoDisc, box")):
            runs[name] = [record["metrics"] for record in rows[row].values()]
        for metric in results:
            part, key = COLUMNS[metric]
            bars = results[metric][title] = {}
            for name, runs_of_name in runs.items():
                bars[name] = mean_and_half([run[part][key] for run in runs_of_name])
    require(results["mAP"], "no data set has all rows of benchmark", UserError)
    evaluation.save_picture(chart(results).quantize(64), HERE / "pictures" / "results.png")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("table", choices=[*TABLES, "pictures", "chart"])
    add("data", nargs="?", default="synthetic")
    add("--data-root", help="as for train.py")
    add("--init", type=train.absolute, help="as for train.py, in all rows")
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: print what is stored")
    add("--rows", nargs="+", help="only these; the first is compared with (default: all)")
    return parser.parse_known_args(argv)


def main(argv=None):
    args, more_options = parse_args(argv)
    data = train.data_name(args.data)
    if args.table == "pictures":
        require(args.seeds, "pictures: give the seed of the runs by --seeds", UserError)
        pictures(data, args.seeds[0], args.data_root, args.init, more_options)
        return
    if args.table == "chart":
        draw_chart(more_options)
        return
    table = TABLES[args.table]
    for row in args.rows or ():
        require(row in table, f"--rows: no {row} in {', '.join(table)}", UserError)
    first = ["--held-out"] if args.table in HELD_OUT else []
    options = {row: first + table[row] + more_options for row in args.rows or table}
    tables = records_of(data, options)
    if args.seeds:
        identities = run_all(args, data, options, tables)
        tables = {identity: rows for identity, rows in records_of(data, options).items()
                  if identity in identities}
    elif args.init:
        given, _ = train.parse_args(more_options)
        weights = init_hash(args.init, given.get("init_momentum", False))
        tables = {identity: rows for identity, rows in tables.items()
                  if identity.weights == weights}
    require(tables, "no such run is stored; give --seeds", UserError)
    for identity, records in tables.items():
        print_table(args.table, data, identity, records)


def run_all(args, data, options, tables):
    """Run what is not stored yet of options {row: options of train.py}, and return the identities
    of all rows."""
    identities = {}
    for row, words in options.items():
        _, identities[row] = settings_of(complete(data, words, args.data_root, args.init))
    most = len(STUDENT) + 1
    for row, identity in identities.items():
        seeds = {*args.seeds, *tables.get(identity, {}).get(row, {})}
        require(len(seeds) <= most, f"--seeds: at most {most}, got {len(seeds)} with the stored",
                UserError)
    for seed in sorted(set(args.seeds)):  # so that finished seeds can be compared early
        for row, words in options.items():
            key = run_name(data, words, seed), identities[row]
            if key not in stored(data):  # another process may have finished it by now
                folder, _ = run(data, words, seed, args.data_root, args.init,
                                more=args.table == "pretrained")
                store(data, *key, folder, args.init)
    return list(identities.values())


def print_table(table, data, identity, records):
    """Print the table of {row: {seed: record}}."""
    rows = {}
    for row, seeds in records.items():
        if seeds:
            rows[row] = {seed: record["metrics"] for seed, record in seeds.items()}
    columns = COLUMNS
    if data == "synthetic" and table not in HELD_OUT:
        columns = columns | WHERE
    stored_runs = [record for seeds in records.values() for record in seeds.values()]
    places = sorted({record["where"] for record in stored_runs})
    weights = identity.weights
    if weights != SCRATCH:
        weights = f"{stored_runs[0]['source']}, SHA-256 of the tensors {weights}"
    print(f"\n{table} on {Path(data).name}: {identity.images}; {identity.device}, "
          f"{' or '.join(places)}; evaluation {identity.evaluation}; initial weights: {weights}\n")
    print("\n".join(markdown(rows, columns | {"training, s": ("time", "training")})))
    if table == "neighbours" and data == "synthetic":
        before = {}
        for name in ("untrained", "pixels"):
            runs = next(iter(rows.values()))
            before[name] = {seed: metrics[name] for seed, metrics in runs.items()}
        print("\npart segmentation of the same runs\n")
        print("\n".join(markdown(before | rows, PARTS)))
    if table == "pretrained":
        print_part("features: the mean of the patch tokens", rows, "mean", COLUMNS)
        print_part("with only some patches shown, of the momentum encoder", rows, "kept", KEPT)
        print_bootstrap({row: records[row] for row in ("mocov3", "lodisc") if row in records},
                        identity)
    if table in WITH_BOOTSTRAP:
        print_bootstrap(records, identity)
    if table == "length":
        print_curves(records)


def print_part(title, rows, part, columns):
    """Print a table of one part of the metrics {row: {seed: metrics}}, of the rows that have it."""
    selected = {}
    for row, runs in rows.items():
        runs = {seed: metrics[part] for seed, metrics in runs.items() if part in metrics}
        if runs:
            selected[row] = runs
    if selected:
        print(f"\n{title}\n")
        print("\n".join(markdown(selected, columns)))


def print_bootstrap(records, identity):
    """Print the bootstrap intervals of each row − the first, over the seeds that both have."""
    base, *rivals = records or [None]
    for row in rivals:
        seeds = [seed for seed in records[row] if seed in records[base]]
        if not seeds:
            continue
        classes = evaluation.read_results(STORE / "classes.json")[identity.images]
        for name, key in (("rank-1", "rank1"), ("mAP", "average_precision")):
            differences = [unpack(records[row][seed]["queries"], key)
                           - unpack(records[base][seed]["queries"], key) for seed in seeds]
            print(f"\n{row} − {base}, {name}, bootstrap over seeds and queries: "
                  f"{bootstrap(np.stack(differences), classes)}")


def print_curves(records):
    """Print retrieval among the held-out images after each epoch, of runs that have it."""
    for name, column in (("rank-1", "rank1"), ("mAP", "mAP")):
        print(f"\n{name} after each epoch\n")
        for row, seeds in records.items():
            for seed, record in sorted(seeds.items()):
                values = " ".join(f"{value:.3f}" for value in record["curve"].get(column, []))
                print(f"| {row} | {seed} | {values} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        evaluation.exit_with_line("tables.py", error)
