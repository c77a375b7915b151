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
import json
import platform
import random
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as judging
import train
from data.birds import Birds
from data.run import merge_json, read_json
from lodisc import MASKS, first_line, load_encoder

RUNS = Path("runs/experiments")
# table: {row: options of train.py}; the first row is what the others are compared with
TABLES = {
    "methods": {name: ["--method", name] for name in ("global", "local", "lodisc")},
    "masks": {name: ["--mask", name] for name in ("random", "location", "block", "least")},
    "keep": {ratio: ["--keep-ratio", ratio] for ratio in ("0.3", "0.1", "0.5", "0.7", "0.9")},
    "importance": {"product": [], "rollout": ["--importance", "rollout"],
                   "last layer": ["--importance", "last"],
                   "product, tokens": ["--local-input", "tokens"]},
    # held out: the recipe, tuned for MoCo v3 alone, then the variants of LoDisc
    "recipe": {"as it is": [], "lr 2e-3": ["--lr", "2e-3"], "lr 8e-3": ["--lr", "8e-3"],
               "weight decay 0.02": ["--weight-decay", "0.02"],
               "temperature 0.1": ["--temperature", "0.1"],
               "temperature 0.4": ["--temperature", "0.4"],
               "crop from 0.2": ["--crop-min", "0.2"], "warm-up 6": ["--warmup-epochs", "6"]},
    "variants": {"global": ["--method", "global"], "lodisc": [],
                 "keep 0.5": ["--keep-ratio", "0.5"], "keep 0.7": ["--keep-ratio", "0.7"],
                 "last layer": ["--importance", "last"], "random": ["--mask", "random"]},
}
for options in TABLES["recipe"].values():
    options += ["--method", "global"]
HELD_OUT = ("recipe", "variants")
FIGURES = {"linear top-1": ("linear", "top1"), "k-NN": ("knn", "top1"),
           "rank-1": ("retrieval", "rank1"), "mAP": ("retrieval", "mAP"),
           "on the bird": ("localisation", "object"), "on its parts": ("localisation", "parts")}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
           10: 2.262}  # 97.5 % points of Student's t for so many values


def held_out(source):
    """A folder of links: train/ without every class's fifth, drawn by seed 0, and that as test/."""
    folder, rng = RUNS / f"{Path(source).name}-held-out", random.Random(0)
    for place in sorted(Path(source).resolve().glob("train/*/")):
        files = sorted(place.iterdir())
        rng.shuffle(files)
        for i, file in enumerate(files):
            link = folder / ("train" if i % 5 else "test") / place.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file)
    return folder


def watch_where_it_looks(save):
    """train.py's save_checkpoint, and after it where the momentum encoder looks, into looks.csv."""
    def save_and_look(path, **contents):
        save(path, **contents)
        table = path.parent / "looks.csv"
        if contents["config"]["data"] != "synthetic":
            return
        birds = Birds("test", 300)
        if not table.exists():
            start = train.build_model(contents["config"]).momentum_encoder.eval()
            table.write_text("step,bird,parts\n" + line(0, judging.localisation(start, birds)))
        figures = judging.localisation(load_encoder(path, momentum=True), birds)
        known = [row for row in table.read_text().splitlines(True)[1:]
                 if int(row.split(",")[0]) < contents["step"]]  # a killed run comes here twice
        table.write_text("step,bird,parts\n" + "".join(known) + line(contents["step"], figures))

    def line(step, figures):
        return f"{step},{figures['object']},{figures['parts']}\n"

    return save_and_look


def run(data, options, seed):
    """The run's folder, trained and judged, now or before."""
    name = "-".join([Path(data).name, *(o.lstrip("-") for o in options), "seed", str(seed)])
    folder = RUNS / name
    if folder.is_dir() and not (folder / "config.json").exists():
        folder.rmdir()  # killed before it began
    if not (folder / "eval.json").exists():
        start = (["--resume", str(folder)] if folder.is_dir() else
                 ["--data", str(data), *options, "--seed", str(seed), "--out", str(folder)])
        train.main(start)
    if data == "synthetic" and "localisation" not in read_json(folder / "eval.json"):
        judging.main(["masks", str(folder)])
    return folder


def figure(folder, place):
    part, name = place
    return read_json(folder / "eval.json").get(part, {}).get(name)


def spread(values, signed=""):
    if len(values) == 1:
        return f"{values[0]:{signed}.3f}"
    return f"{statistics.mean(values):{signed}.3f} ± {statistics.stdev(values):.3f}"


def difference(values, others):
    """Mean of the paired differences and its 95 % interval, by Student's t."""
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return f"{mean:+.3f}"
    half = STUDENT[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def seconds(folder):
    with open(folder / "metrics.csv") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file))


def print_table(rows, seeds, command):
    """rows: {name: [folder a seed]}."""
    folders = [folder for row in rows.values() for folder in row]
    columns = {name: place for name, place in FIGURES.items()
               if all(figure(folder, place) is not None for folder in folders)}
    values = {row: {name: [figure(folder, place) for folder in folders]
                    for name, place in columns.items()} for row, folders in rows.items()}
    print(f"\n`{command}`: {len(seeds)} seeds ({', '.join(map(str, seeds))}), CPU "
          f"({platform.machine()}), training "
          f"{statistics.mean(map(seconds, folders)):.0f} s a run\n")
    print("| | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    before = next(iter(rows.values()))
    if "untrained" in read_json(before[0] / "eval.json"):
        cells = []
        for name, (part, key) in columns.items():
            known = [read_json(f / "eval.json")["untrained"].get(part, {}).get(key) for f in before]
            cells.append(spread(known) if None not in known else "")
        print("| untrained | " + " | ".join(cells) + " |")
    for row, figures in values.items():
        print(f"| {row} | " + " | ".join(spread(figures[name]) for name in columns) + " |")
    base, *others = values
    for row in others:
        print(f"| {row} − {base} | " + " | ".join(
            difference(values[row][name], values[base][name]) for name in columns) + " |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=[*TABLES, "pictures"])
    parser.add_argument("data", nargs="?", default="synthetic")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[],
                        help="more options of train.py, for all rows")
    args = parser.parse_args(argv)
    RUNS.mkdir(parents=True, exist_ok=True)
    train.save_checkpoint = watch_where_it_looks(train.save_checkpoint)
    data = args.data if args.data == "synthetic" else Path(args.data)
    if args.table in HELD_OUT:
        data = held_out(data)
    rows = {row: [] for row in TABLES[args.table]}
    for seed in args.seeds:  # seed by seed, so that what is there early compares alike
        for row, options in TABLES[args.table].items():
            rows[row].append(run(data, [*options, *args.options], seed))
    print_table(rows, args.seeds, "python tests/experiments.py " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.py: {first_line(error)}")
