"""What the README names exists, what it tells to type is understood, and its shapes are right."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import assignment
import benchmark
import eval as judging
import experiments
import train
from data.datasets import NAMES
from lodisc import ARCHITECTURES, IMPORTANCES, LOCAL_INPUTS, MASKS, METHODS, LoDisc, create_vit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "data" / "README.md").read_text()
MODULES = [importlib.import_module(name) for name in
           ("lodisc", "train", "eval", "data.augment", "data.birds", "data.datasets", "data.draw",
            "data.flowers17", "data.run", "data.weights", "torch")]
PARSERS = {"train.py": train.parse_args, "eval.py": judging.parse_args,
           "data/flowers17.py": lambda words: [Path(word) for word in words],
           "tests/experiments.py": experiments.parse_args,
           "tests/benchmark.py": benchmark.parse_args,
           "tests/assignment.py": lambda words: Path(*words)}
WORDS = {*ARCHITECTURES, *METHODS, *MASKS, *IMPORTANCES, *LOCAL_INPUTS, *NAMES, *train.COLUMNS,
         *experiments.TABLES, "imagenet"}
LEFT_BY_A_RUN = {"config.json", "metrics.csv", "checkpoint.pt", "eval.json", "run.png", "masks.png",
                 "encoder.pth"}


def blocks(text):
    """The indented and fenced blocks' lines, continued lines joined."""
    text = re.sub(r"```\w*\n.*?```", "", text, flags=re.S)  # Python, which another test runs
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()
             if line.startswith("    ")]
    return [line for line in lines if re.match(r"(python|torchrun|pip|cd) ", line)]


def spans(text):
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]


def exists(name):
    for module in MODULES:
        place = module
        for part in name.removesuffix("()").split("."):
            place = getattr(place, part, None)
        if place is not None:
            return True
    return name in WORDS | LEFT_BY_A_RUN or any((ROOT / folder / name).exists()
                                                for folder in ("", "data", "tests"))


@pytest.mark.parametrize("name", sorted({
    span for span in spans(README) if re.fullmatch(r"[A-Za-z_][\w./]*(\(\))?", span)
    and not re.match(r"(DIR|RUN|FILE|FOLDER|OUT|forward|timm)\b|.*/$", span)}))
def test_names(name):
    assert exists(name), f"the README names {name}, which is not there"


def options():
    texts = [span for span in spans(PAGES) if span.startswith("--")] + blocks(PAGES)
    found = (re.findall(r"(?<!\S)--[a-z][a-z-]*", text) for text in texts)
    return sorted(set(sum(found, [])))


def test_options(capsys):
    known = {"--nproc_per_node"}
    for parse in (train.parse_args, judging.parse_args, experiments.parse_args):
        with pytest.raises(SystemExit):
            parse(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert options() and [option for option in options() if option not in known | {
        "--nproc", "--rounds", "--help"}] == []


@pytest.mark.parametrize("line", sorted(set(
    [span for span in spans(PAGES) if re.match(r"(python|torchrun) ", span)] + blocks(PAGES))))
def test_commands(line):
    for command in line.split("#")[0].split("&&"):
        program, *words = shlex.split(command.replace("...", ""))
        if program == "torchrun":
            assert words.pop(0).startswith("--nproc_per_node=")
            words = ["train.py", *words[1:]]
        elif program != "python" or words[0] == "-m":
            assert (program, *words[:2]) in (("pip", "install", "-r"), ("python", "-m", "pytest"))
            continue
        script, *arguments = words
        assert (ROOT / script).is_file()
        if "--help" not in arguments:
            PARSERS[script](arguments)


@torch.no_grad()
def test_shapes():
    """Of the default run's batch, as the walk-through gives them."""
    model, seen = LoDisc(create_vit("vit_nano", 48, 8), hidden_dim=512, output_dim=128), {}
    for name in ("query", "global_key", "pivotal_mask", "local_key"):
        def call(*args, method=getattr(model, name), name=name):
            seen[name] = args, method(*args)
            return seen[name][1]
        setattr(model, name, call)
    views = torch.randn(2, 128, 3, 48, 48)
    out = model(*views)
    key, attentions = seen["global_key"][1]
    tensors = {"views": views[0], "queries": seen["query"][1], "keys": key, "row": attentions[0],
               "mask": out.masks[0], "local": seen["local_key"][1],
               "features": model.encoder(views[0])[0]}
    assert len(attentions) == 4 and out.masks[0].sum(1).eq(10).all()
    for name, tensor in tensors.items():
        assert str(tuple(tensor.shape)) in README, name


def test_the_python_in_it_runs(few_birds, tmp_path, monkeypatch):
    block, = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    monkeypatch.chdir(tmp_path)
    from PIL import Image
    Image.new("RGB", (60, 50), (90, 80, 200)).save("bird.jpg")
    train.main(["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--epochs", "1",
                "--batch-size", "100", "--device", "cpu", "--method", "global"])
    Path("runs/synthetic-global-1").rename("runs/synthetic-lodisc-1")
    names = {}
    exec(block, names)
    assert names["features"].shape == (1, 96)


def test_the_kit_has_as_many_functions_as_said():
    count = sum(len(names) for _, names in assignment.EXERCISES.values())
    assert f"bodies of {['nine', 'ten', 'eleven', 'twelve'][count - 9]} functions" in README
