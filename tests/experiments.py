"""The README's tables: runs of train.py over settings and seeds, printed as Markdown.

    python tests/experiments.py methods                     # on the drawn birds
    python tests/experiments.py masks PATH/TO/PHOTOGRAPHS   # on any folder that train.py takes
    python tests/experiments.py pictures                    # data/masks.png and data/looks.png

Runs go into runs/experiments, a folder each. What is there is not run again, and a run that was
killed goes on from its last checkpoint: call it until it prints. Every figure is of the last epoch;
± is the standard deviation over seeds. Tables in HELD_OUT never see the test pictures: they train
on four fifths of train/ and are judged on the rest.
"""

import argparse
import csv
import random
import shutil
import statistics
import sys
import zlib
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch: it says how idle threads wait

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import v2

import eval as judging
from data.augment import plain_crop, to_tensor
from data.birds import Birds
from data.draw import curves, sheet
from data.datasets import TRAIN_BIRDS
from data.run import FREE, MAIN_FIGURES, filmed, read_json
from lodisc import LoDisc, first_line, load_encoder, location_mask, require

RUNS = Path("runs/experiments")
# table: {row: options of train.py}; the first row is what the others are compared with
TABLES = {
    "methods": {"global": ["--method", "global"], "local": ["--method", "local"], "lodisc": []},
    "masks": {"random": ["--mask", "random"], "location": [], "block": ["--mask", "block"],
              "least": ["--mask", "least"]},
    "keep": {"0.3": [],
             **{ratio: ["--keep-ratio", ratio] for ratio in ("0.1", "0.5", "0.7", "0.9")}},
    "importance": {"product": [], "rollout": ["--importance", "rollout"],
                   "last layer": ["--importance", "last"],
                   "product, tokens": ["--local-input", "tokens"]},
    # held out: the recipe, tuned for MoCo v3 alone, then the variants of LoDisc
    "recipe": {row: ["--method", "global", *options] for row, options in {
        "as it is": [], "lr 2e-3": ["--lr", "2e-3"], "lr 8e-3": ["--lr", "8e-3"],
        "weight decay 0.02": ["--weight-decay", "0.02"],
        "temperature 0.1": ["--temperature", "0.1"], "temperature 0.4": ["--temperature", "0.4"],
        "crop from 0.2": ["--crop-min", "0.2"], "warm-up 6": ["--warmup-epochs", "6"]}.items()},
    "variants": {"lodisc": [], "global": ["--method", "global"],
                 "rollout": ["--importance", "rollout"], "keep 0.7": ["--keep-ratio", "0.7"],
                 "tokens": ["--local-input", "tokens"], "block": ["--mask", "block"],
                 "local loss rises": ["rising"], "mask follows late": ["late"]},
    # on test/, once, with seeds 5 to 9: the best of the variants by linear top-1
    "confirm": {"global": ["--method", "global"], "block": ["--mask", "block"]},
}
HELD_OUT = ("recipe", "variants")
WHERE = {"on the bird": ("localisation", "object"), "on its parts": ("localisation", "parts")}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
           10: 2.262}  # 97.5 % points of Student's t for so many values


# --- schedules, which train.py has no options for ---------------------------------------------


class Rising(LoDisc):
    """The local loss counts by the share of the run that is done, twice, up to its whole."""

    done = 0.0

    def forward(self, *views):
        out = super().forward(*views)
        return out._replace(total=out.global_loss + min(1, 2 * Rising.done) * out.local_loss)


class Late(LoDisc):
    """Random masks for the first half of the run; from then on they follow the attention."""

    done = 0.0

    def pivotal_mask(self, view, attentions, generator):
        self.mask = "random" if Late.done < 0.5 else "location"
        return super().pivotal_mask(view, attentions, generator)

    def global_key(self, view):
        self.mask = "location"  # whatever the step before left there: attention is stored
        return super().global_key(view)


SCHEDULES = {"rising": Rising, "late": Late}


@contextmanager
def schedule(options):
    """While it lasts, train.py trains the model of the schedule among the options, if any."""
    model, = [SCHEDULES[option] for option in options if option in SCHEDULES] or [None]
    if model is None:
        yield
        return

    def momentum_schedule(step, total, base):  # the loop asks it before each step
        model.done = step / total
        return real(step, total, base)

    real = train.momentum_schedule
    with patch.object(train, "LoDisc", model), \
            patch.object(train, "momentum_schedule", momentum_schedule):
        yield


# --- runs -------------------------------------------------------------------------------------


def held_out(source):
    """A folder of links: train/ without every class's fifth, drawn by seed 0, and that as test/.

    Its name holds a checksum of what is linked: other pictures, other runs.
    """
    places = {place: sorted(place.iterdir())
              for place in sorted(Path(source).resolve().glob("train/*/"))}
    require(places, f"{source} has no class folders in train/")
    checksum = zlib.crc32("\n".join(map(str, sum(places.values(), []))).encode())
    folder, rng = RUNS / f"{Path(source).name}-held-out-{checksum:08x}", random.Random(0)
    if folder.is_dir():
        return folder
    part = RUNS / f"{folder.name}.tmp"  # so that the folder is whole, if it is there
    shutil.rmtree(part, ignore_errors=True)  # links alone
    for place, files in places.items():
        rng.shuffle(files)
        for i, file in enumerate(files):
            link = part / ("train" if i % 5 else "test") / place.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    part.rename(folder)
    return folder


def look_and_save(save):
    """train.py's save_checkpoint; before it, for the drawn birds and at the end of an epoch, how
    much of the bird and of its parts the momentum encoder's pivotal patches hold, into looks.csv.
    """
    def shares(encoder):
        found = judging.localisation(encoder.eval(), BIRDS)
        return found["object"], found["parts"]

    def look(path, **contents):
        table, step = path.parent / "looks.csv", contents["step"]
        encoder = train.build_model(contents["config"]).momentum_encoder
        rows = [row for row in read_looks(table) if row[0] < step] if table.exists() else []
        if not rows:
            rows.append((0, *shares(encoder)))
        encoder.load_state_dict({name.removeprefix("momentum_encoder."): tensor for name, tensor
                                 in contents["model"].items() if "momentum_encoder." in name})
        rows.append((step, *shares(encoder)))
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows(rows)

    def look_and_save(path, **contents):
        history = contents["history"]
        if contents["config"]["data"] == "synthetic" and history \
                and history[-1]["step"] == contents["step"]:
            with torch.random.fork_rng():
                look(path, **contents)
        save(path, **contents)

    return look_and_save


def read_looks(table):
    """[(step, share of the bird, share of its parts)], both over chance."""
    with open(table) as file:
        return [(int(step), float(bird), float(parts)) for step, bird, parts in csv.reader(file)]


BIRDS = Birds("test", 300)


def settings_of(data, options, seed):
    """What train.py makes of these options here and now."""
    options = [option for option in options if option not in SCHEDULES]
    given, defaults = train.parse_args(["--data", str(data), *options, "--seed", str(seed)])
    settings = {**defaults, **given}
    with redirect_stdout(None):
        train.settle(settings, train.pick_device(settings["device"]),
                     len(train.load_data(settings["data"]).train), 1)
    return settings


def run(data, options, seed):
    """The run's folder, trained and judged, now or before."""
    name = "-".join([Path(data).name, *(o.lstrip("-") for o in options), "seed", str(seed)])
    folder = RUNS / name
    if folder.is_dir() and not (folder / "config.json").exists():
        shutil.rmtree(folder)  # killed before it began
    if folder.is_dir():
        known, wanted = read_json(folder / "config.json"), settings_of(data, options, seed)
        odd = [f"{name} {value}" for name, value in known.items()
               if name not in (*FREE, "data_root") and value != wanted[name]]
        require(not odd, f"{folder} is a run with {', '.join(odd)}; move it away")
    if not (folder / "eval.json").exists():
        own = [option for option in options if option not in SCHEDULES]
        with schedule(options):
            train.main(["--resume", str(folder)] if folder.is_dir() else
                       ["--data", str(data), *own, "--seed", str(seed), "--out", str(folder)])
    if data == "synthetic" and "localisation" not in read_json(folder / "eval.json"):
        judging.main(["masks", str(folder)])
    return folder


# --- tables -----------------------------------------------------------------------------------


def spread(values):
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def difference(values, others):
    """Mean of the paired differences and its 95 % interval, by Student's t."""
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    mean = statistics.mean(pairs)
    half = STUDENT[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def seconds(folder):
    with open(folder / "metrics.csv") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file))


def markdown(rows, columns):
    """rows {name: [a run's figures]}, columns {name: (part, key)} -> lines of a table."""
    base, *others = rows
    if all("untrained" in figures for figures in rows[base]):
        rows = {"raw pixels": [figures["pixels"] for figures in rows[base]],
                "untrained": [figures["untrained"] for figures in rows[base]], **rows}
    values = {row: {name: [figures[part][key] for figures in runs]
                    for name, (part, key) in columns.items() if part in runs[0]}
              for row, runs in rows.items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def line(row, cells):
        lines.append(f"| {row} | " + " | ".join(cells.get(name, "") for name in columns) + " |")

    for row, cells in values.items():
        line(row, {name: spread(figures) for name, figures in cells.items()})
    for row in others if len(rows[base]) > 1 else []:
        line(f"{row} − {base}", {name: difference(figures, values[base][name])
                                 for name, figures in values[row].items()})
    return lines


# --- pictures ---------------------------------------------------------------------------------


def pictures(seeds):
    """data/masks.png of the first seed, data/looks.png of all seeds' mean; of the drawn birds."""
    folders = {method: [run("synthetic", TABLES["methods"][method], seed) for seed in seeds]
               for method in ("lodisc", "global")}
    masks_picture({method: runs[0] for method, runs in folders.items()})
    looks_picture(folders)


def masks_picture(folders):
    """folders {method: a run's}: where they look, and the encoder that they began with."""
    config, test = read_json(folders["lodisc"] / "config.json"), Birds("test", 20)
    crop = v2.Compose(plain_crop(config["image_size"]))
    birds = [crop(test[i][0]) for i in filmed(len(test))]
    encoders = {"untrained": train.build_model(config).momentum_encoder.eval(),
                **{method: load_encoder(folders[method], momentum=True)
                   for method in ("global", "lodisc")}}
    rows = {"picture": (birds, None)}
    for name, encoder in encoders.items():
        normalise = v2.Compose(to_tensor(encoder.mean, encoder.std))
        images = torch.stack([normalise(bird) for bird in birds])
        importance = judging.importance_of(encoder, images, "product")
        rows[f"{name},\nimportance"] = birds, importance
        rows[f"{name},\nkept 30 %"] = birds, location_mask(importance, 0.3)
    page = sheet(rows)
    page = page.resize((page.width * 2 // 3, page.height * 2 // 3), Image.Resampling.BOX)
    page.quantize(48).save(ROOT / "data" / "masks.png", optimize=True)


def looks_picture(folders):
    """folders {method: [a run's]}: by epoch, the mean over runs of the shares in looks.csv."""
    steps = TRAIN_BIRDS // train.RECIPES["synthetic"]["batch_size"]
    looks = {method: [read_looks(folder / "looks.csv") for folder in runs]
             for method, runs in folders.items()}
    page = Image.new("RGB", (1080, 320), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for left, title, which in ((60, "on the bird", 1), (590, "on its parts", 2)):
        lines = {method: [(rows[0][0] / steps, statistics.mean(row[which] for row in rows))
                          for rows in zip(*tables, strict=True)]
                 for method, tables in looks.items()}
        curves(pen, (left, 40, left + 470, 260), lines, 1.0, "chance", font)
        pen.text((left + 470, 22), title, "black", font, anchor="rm")
    page.quantize(64).save(ROOT / "data" / "looks.png", optimize=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=[*TABLES, "pictures"])
    parser.add_argument("data", nargs="?", default="synthetic")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    seeds = sorted(set(args.seeds))
    require(len(seeds) <= max(STUDENT), f"at most {max(STUDENT)} seeds, got {len(seeds)}")
    RUNS.mkdir(parents=True, exist_ok=True)
    train.save_checkpoint = look_and_save(train.save_checkpoint)
    if args.table == "pictures":
        return pictures(seeds)
    data = held_out(args.data) if args.table in HELD_OUT else args.data
    pictures_of = train.load_data(train.data_name(str(data)))
    require(pictures_of.test is not None, pictures_of.note)
    folders = {row: [] for row in TABLES[args.table]}
    for seed in seeds:  # seed by seed, so that what is there early can be compared
        for row, options in TABLES[args.table].items():
            folders[row].append(run(data, options, seed))
    columns = dict(MAIN_FIGURES)
    if data == "synthetic" and args.table != "keep":  # where another ratio has another most
        columns |= WHERE
    rows = {row: [read_json(folder / "eval.json") for folder in runs]
            for row, runs in folders.items()}
    every = [folder for runs in folders.values() for folder in runs]
    print(f"\n{args.table} on {Path(data).name}, seeds {', '.join(map(str, seeds))}, training "
          f"{statistics.mean(map(seconds, every)):.0f} s a run\n")
    print("\n".join(markdown(rows, columns)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.py: {first_line(error)}")
