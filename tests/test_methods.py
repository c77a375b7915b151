"""A user's method file: subclasses of LoDisc, of MoCoV3 and of nn.Module alone."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from conftest import Killed, kill_after, same, weights
from lodisc import LoDisc, UserError

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--epochs", "3",
         "--batch-size", "12", "--workers", "0", "--device", "cpu"]
THIRD = """
from typing import NamedTuple

import torch

from lodisc import LoDisc


class Output(NamedTuple):
    total: torch.Tensor
    global_loss: torch.Tensor
    local_loss: torch.Tensor
    third_loss: torch.Tensor
    masks: tuple


class Third(LoDisc):
    def __init__(self, encoder, weight=1.0, shown=True, **options):
        super().__init__(encoder, **options)
        self.weight, self.shown = weight, shown

    def forward(self, view1, view2, generator=None, progress=0.0):
        out = super().forward(view1, view2, generator, progress)
        third = self.weight * progress * (1 + torch.rand(())) * self.query(view1).square().mean()
        return Output(out.total + third, out.global_loss, out.local_loss, third, out.masks)

    def pivotal_patches(self, images):
        return super().pivotal_patches(images) if self.shown else None


class Other(Third):
    pass
"""
ALONE = """
from typing import NamedTuple

import torch
from torch import nn


class Output(NamedTuple):
    total: torch.Tensor


class Alone(nn.Module):
    OPTIONS = ()

    def __init__(self, encoder, *args, **options):
        super().__init__()
        self.received = args, options
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, 2)

    def forward(self, view1, view2, generator=None, progress=0.0):
        distance = self.head(self.encoder(view1)) - self.head(self.encoder(view2))
        return Output(distance.square().mean())

    def update_momentum(self, m):
        pass

    def pivotal_patches(self, images):
        return None
"""
SPARSE = """
from lodisc import MoCoV3


class Sparse(MoCoV3):
    OPTIONS = (*MoCoV3.OPTIONS, "keep_ratio")

    def __init__(self, encoder, keep_ratio, decay=1.0, **options):
        super().__init__(encoder, **options)
        self.received = dict(options, keep_ratio=keep_ratio, decay=decay)
        self.keep_ratio = keep_ratio
"""


@pytest.fixture
def third(flowers):
    """Write the method file third.py; return the options of a run with it."""
    Path("third.py").write_text(THIRD)
    return ["--data", str(flowers / "train"), *SMALL, "--method", "third.py:Third",
            "--method-option", "weight=0.5"]


def rows(folder):
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record_models(monkeypatch, script):
    """Return a list that every model which the script builds is added to."""
    built, real = [], script.build_model

    def build(*args, **options):
        built.append(real(*args, **options))
        return built[-1]

    monkeypatch.setattr(script, "build_model", build)
    return built


def test_method_scalars_are_logged_and_drawn_by_name(third, monkeypatch, capsys):
    drawn, real = [], train.run_sheet

    def draw(*args):
        drawn.append(args)
        return real(*args)

    monkeypatch.setattr(train, "run_sheet", draw)
    train.main([*third, "--out", "run"])
    table = rows("run")
    assert list(table[0]) == ["epoch", "step", "total", "global_loss", "local_loss", "third_loss",
                              "lr", "momentum", "images_per_second", "seconds"]
    assert "third_loss" in capsys.readouterr().out
    assert all(float(row["third_loss"]) > 0 for row in table) and len(table) == 3
    history, levels, _, _, film = drawn[0]
    assert "third_loss" in history[0] and set(levels) == {"global_loss", "local_loss"}
    assert [epoch for epoch, _ in film] == [0, 1, 2, 3]
    config = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    assert config["method"] == f"{Path('third.py').resolve()}:Third"
    assert config["method_options"] == {"weight": 0.5}
    evaluation.main(["masks", "run", str(next(Path("flowers/test").rglob("*.jpg")))])


def test_method_receives_options_and_progress(third, monkeypatch):
    seen, real = [], LoDisc.forward

    def forward(self, *args):
        seen.append((self.weight, args[3]))
        return real(self, *args)

    monkeypatch.setattr(LoDisc, "forward", forward)
    train.main([*third, "--out", "run"])
    assert seen == [(0.5, pytest.approx(step / 9)) for step in range(9)]


def test_method_resumes_bit_exactly_from_moved_file(third, monkeypatch):
    train.main([*third, "--out", "whole"])
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        train.main([*third, "--out", "part"])
    Path("elsewhere").mkdir()
    Path("third.py").rename("elsewhere/moved.py")
    with pytest.raises(UserError, match="third.py:Third: no such method"):
        train.main(["--resume", "part"])
    with pytest.raises(UserError, match="other settings for method"):
        train.main(["--resume", "part", "--method", "elsewhere/moved.py:Other"])
    with pytest.raises(UserError, match="other settings for method_options"):
        train.main(["--resume", "part", "--method-option", "weight=0.6"])
    train.main(["--resume", "part", "--method", "elsewhere/moved.py:Third", "--method-option",
                "weight=0.5"])
    assert same(weights("whole"), weights("part"))
    config = torch.load("part/checkpoint.pt", weights_only=True)["config"]
    assert config["method"].endswith("elsewhere/moved.py:Third")


@pytest.mark.slow
def test_method_resumes_bit_exactly_after_sigkill(third):
    third = [*third, "--epochs", "9"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *third, "--out", "part"],
                               text=True, stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    train.main(["--resume", "part"])
    train.main([*third, "--out", "whole"])
    assert same(weights("part"), weights("whole"))


def test_method_of_a_module_alone_receives_its_own_options_only(flowers, monkeypatch, capsys,
                                                                quick_probe):
    """Train, resume and evaluate a class that has nothing of LoDisc."""
    Path("alone.py").write_text(ALONE)
    built = record_models(monkeypatch, train)
    options = ["--data", str(flowers), *SMALL, "--method", "alone.py:Alone"]
    train.main([*options, "--method-option", "a=1", "--method-option", "b=text", "--out", "run"])
    assert [model.received for model in built] == [((), {"a": 1, "b": "text"})]
    assert list(rows("run")[0]) == ["epoch", "step", "total", "lr", "momentum",
                                    "images_per_second", "seconds"]
    config = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    assert not same(weights("run"), evaluation.build_model(config).state_dict())
    printed = capsys.readouterr().out
    assert "trained" in printed and "mAP" in printed
    train.main(["--resume", "run"])
    evaluation.main(["knn", "run", "--workers", "0"])
    train.main([*options, "--epochs", "1", "--out", "without"])
    assert [model.received for model in built[1:]] == [((), {"a": 1, "b": "text"}), ((), {})]


@pytest.mark.parametrize("option", [["--temperature", "0.3"], ["--hidden-dim", "40"],
                                    ["--output-dim", "8"], ["--mask", "random"],
                                    ["--keep-ratio", "0.5"], ["--local-weight", "2"]])
def test_method_without_options_takes_none_of_the_settings(flowers, option):
    Path("alone.py").write_text(ALONE)
    with pytest.raises(UserError, match=f"^{option[0]} is no option of --method .*alone.py:Alone"
                       ) as error:
        train.main(["--data", str(flowers / "train"), *SMALL, "--method", "alone.py:Alone",
                    *option, "--out", "run"])
    assert "\n" not in str(error.value) and not Path("run").exists()


def test_method_receives_the_settings_that_it_lists(flowers, monkeypatch):
    built = record_models(monkeypatch, train)
    Path("sparse.py").write_text(SPARSE)
    options = ["--data", str(flowers / "train"), *SMALL, "--epochs", "1", "--method",
               "sparse.py:Sparse"]
    train.main([*options, "--keep-ratio", "0.5", "--temperature", "0.3", "--hidden-dim", "40",
                "--output-dim", "24", "--method-option", "decay=0.25", "--out", "run"])
    film = torch.load("run/checkpoint.pt", weights_only=True)["film"]
    assert all((masks.sum(1) == 2).all() for _, masks in film)  # half of four patches
    assert list(rows("run")[0])[2:5] == ["total", "global_loss", "lr"]
    train.main([*options, "--out", "default"])
    assert [model.received for model in built] == [
        {"temperature": 0.3, "hidden_dim": 40, "output_dim": 24, "keep_ratio": 0.5, "decay": 0.25},
        {"temperature": 0.2, "hidden_dim": 512, "output_dim": 128, "keep_ratio": 0.3, "decay": 1.0}]
    with pytest.raises(UserError, match="^--local-weight is no option of .*sparse.py:Sparse, which "
                       "has --temperature, --hidden-dim, --output-dim, --keep-ratio$"):
        train.main([*options, "--local-weight", "2", "--out", "none"])


def test_method_without_masks_has_no_film(third):
    train.main([*third, "--method-option", "shown=False", "--out", "run"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["film"] == []
    image = str(next(Path("flowers/test").rglob("*.jpg")))
    evaluation.main(["masks", "run", image])
    assert Path("run/masks.png").is_file() and Path("run/run.png").is_file()


@pytest.mark.parametrize("method, says", [
    ("missing.py:Third", "missing.py:Third: no such method"),
    ("third.py", "third.py: no such method"), ("third.py:Nothing", "no class Nothing")])
def test_missing_method_raises_one_line(third, method, says):
    with pytest.raises(UserError, match=says) as error:
        train.main([*third, "--method", method, "--out", "run"])
    assert "\n" not in str(error.value) and not Path("run").exists()


@pytest.mark.parametrize("option, says", [
    ("wieght=1", "unexpected keyword argument 'wieght'"), ("mask=least", "multiple values")])
def test_unknown_option_raises_one_line(third, option, says):
    with pytest.raises(UserError, match=f"--method-option {option[:4]}.*{says}") as error:
        train.main([*third, "--method-option", option, "--out", "run"])
    assert "\n" not in str(error.value) and not Path("run").exists()


def test_type_error_in_a_method_keeps_its_traceback(third):
    Path("third.py").write_text(THIRD.replace("= weight, shown", "= len(weight), shown"))
    with pytest.raises(TypeError, match="has no len"):
        train.main([*third, "--out", "run"])


def test_option_values_are_python_literals_or_text():
    assert train.method_options(["a=1", "b=1e-3", "c=True", "d=(1, 2)", "e=text", "f=a=b"]) == {
        "a": 1, "b": 1e-3, "c": True, "d": (1, 2), "e": "text", "f": "a=b"}


def test_held_out_runs_are_evaluated_on_the_held_out_images(flowers, capsys):
    for path in (flowers / "test").rglob("*.jpg"):
        path.write_bytes(b"never opened")
    train.main(["--data", str(flowers), *SMALL, "--held-out", "--out", "run"])
    results = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    assert results["retrieval"]["queries"] == 6  # a fifth of 12 each
    evaluation.main(["retrieval", "run", "--workers", "0"])
    again = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    assert again["retrieval"] == results["retrieval"]


def test_method_file_imports_its_neighbours(third):
    """A package, a module, and none that hides an installed one."""
    Path("methods/numbers_of_mine").mkdir(parents=True)
    Path("methods/numbers_of_mine/__init__.py").write_text("WEIGHT = 0.25\n")
    Path("methods/losses.py").write_text("from numbers_of_mine import WEIGHT\n")
    Path("methods/einops.py").write_text("raise RuntimeError('hides the installed one')\n")
    for module in ("einops.layers", "losses", "numbers_of_mine"):
        sys.modules.pop(module, None)
    Path("methods/mine.py").write_text(
        "from lodisc import LoDisc\nimport einops.layers\nfrom losses import WEIGHT\n\n\n"
        "class Mine(LoDisc):\n    weight = WEIGHT\n")
    train.main([*third[:-4], "--epochs", "1", "--method", "methods/mine.py:Mine", "--out", "run"])
    assert evaluation.load_method("methods/mine.py:Mine").weight == 0.25
    image = str(next(Path("flowers/test").rglob("*.jpg")))
    evaluation.main(["masks", "run", image])


def test_masks_of_a_run_whose_method_file_has_moved(third, monkeypatch):
    train.main([*third, "--out", "run"])
    image = str(next(Path("flowers/test").rglob("*.jpg")))
    Path("elsewhere").mkdir()
    Path("third.py").rename("elsewhere/moved.py")
    with pytest.raises(UserError, match="third.py:Third: no such method"):
        evaluation.main(["masks", "run", image])
    built = record_models(monkeypatch, evaluation)
    evaluation.main(["masks", "run", image, "--method", "elsewhere/moved.py:Third"])
    assert type(built[0]).__name__ == "Third" and built[0].weight == 0.5
    Path("narrow.py").write_text("from lodisc import LoDisc\n\n\nclass Third(LoDisc):\n"
                                 "    def __init__(self, encoder, weight, **options):\n"
                                 "        options['output_dim'] = 8\n"
                                 "        super().__init__(encoder, **options)\n")
    with pytest.raises(UserError, match="does not fit --method: .*size mismatch") as error:
        evaluation.main(["masks", "run", image, "--method", "narrow.py:Third"])
    assert "\n" not in str(error.value)
    for method in ("elsewhere/moved.py:Other", "lodisc"):
        with pytest.raises(UserError, match=f"--method {method}: the run's is .*third.py:Third"):
            evaluation.main(["masks", "run", image, "--method", method])
    evaluation.main(["export", "run", "--out", "weights.pth"])
    with pytest.raises(UserError, match="--method is for a run"):
        evaluation.main(["masks", "weights.pth", image, "--method", "elsewhere/moved.py:Third"])


def test_floats_of_a_method_are_logged_as_tensors_are(third):
    """Return a Python float, an int, and a scalar of another dtype with a gradient."""
    text = THIRD.replace("class Output(NamedTuple):", "class Output(NamedTuple):\n"
                         "    weight: float\n    count: int\n    half: object")
    text = text.replace("return Output(",
                        "return Output(0.125, len(view1), out.total.double() / 2, ")
    Path("third.py").write_text(text)
    train.main([*third, "--epochs", "1", "--out", "run"])
    row, = rows("run")
    assert (row["weight"], row["count"]) == ("0.125", "12.0")
    assert float(row["half"]) == pytest.approx(
        (float(row["total"]) - float(row["third_loss"])) / 2, rel=1e-5)


def test_method_file_replaces_no_module(flowers):
    import random
    Path("random.py").write_text("from lodisc import LoDisc\n")
    assert evaluation.load_method("random.py:LoDisc") is LoDisc
    assert sys.modules["random"] is random
