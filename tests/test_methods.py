"""A user's method file: a subclass with a third loss, an option and a schedule."""

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
OWN = """
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

    def masks(self, images):
        return super().masks(images) if self.shown else None


class Other(Third):
    pass
"""


@pytest.fixture
def own(flowers):
    Path("own.py").write_text(OWN)
    return ["--data", str(flowers / "train"), *SMALL, "--method", "own.py:Third",
            "--method-option", "weight=0.5"]


def rows(folder):
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_method_scalars_are_logged_and_drawn_by_name(own, monkeypatch, capsys):
    drawn, real = [], train.run_sheet
    monkeypatch.setattr(train, "run_sheet", lambda *a: drawn.append(a) or real(*a))
    train.main([*own, "--out", "run"])
    table = rows("run")
    assert list(table[0]) == ["epoch", "step", "total", "global_loss", "local_loss", "third_loss",
                              "lr", "momentum", "images_per_second", "seconds"]
    assert "third_loss" in capsys.readouterr().out
    assert all(float(row["third_loss"]) > 0 for row in table) and len(table) == 3
    history, levels, _, _, film = drawn[0]
    assert "third_loss" in history[0] and set(levels) == {"global_loss", "local_loss"}
    assert [epoch for epoch, _ in film] == [0, 1, 2, 3]
    config = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    assert config["method"] == f"{Path('own.py').resolve()}:Third"
    assert config["method_options"] == {"weight": 0.5}
    evaluation.main(["masks", "run", str(next(Path("flowers/test").rglob("*.jpg")))])


def test_method_receives_options_and_progress(own, monkeypatch):
    seen, real = [], LoDisc.forward
    monkeypatch.setattr(LoDisc, "forward", lambda self, *args: (
        seen.append((self.weight, args[3])), real(self, *args))[1])
    train.main([*own, "--out", "run"])
    assert seen == [(0.5, pytest.approx(step / 9)) for step in range(9)]


def test_method_resumes_bit_exactly_from_moved_file(own, monkeypatch):
    train.main([*own, "--out", "whole"])
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        train.main([*own, "--out", "part"])
    Path("elsewhere").mkdir()
    Path("own.py").rename("elsewhere/moved.py")
    with pytest.raises(UserError, match="own.py:Third: no such method"):
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
def test_method_resumes_bit_exactly_after_sigkill(own):
    own = [*own, "--epochs", "9"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *own, "--out", "part"],
                               text=True, stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    train.main(["--resume", "part"])
    train.main([*own, "--out", "whole"])
    assert same(weights("part"), weights("whole"))


def test_method_without_masks_has_no_film(own):
    train.main([*own, "--method-option", "shown=False", "--out", "run"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["film"] == []
    image = str(next(Path("flowers/test").rglob("*.jpg")))
    evaluation.main(["masks", "run", image])
    assert Path("run/masks.png").is_file() and Path("run/run.png").is_file()


@pytest.mark.parametrize("method, says", [
    ("missing.py:Third", "missing.py:Third: no such method"), ("own.py", "own.py: no such method"),
    ("own.py:Nothing", "no class Nothing")])
def test_missing_method_raises_one_line(own, method, says):
    with pytest.raises(UserError, match=says) as error:
        train.main([*own, "--method", method, "--out", "run"])
    assert "\n" not in str(error.value) and not Path("run").exists()


@pytest.mark.parametrize("option, says", [
    ("wieght=1", "unexpected keyword argument 'wieght'"), ("mask=least", "multiple values")])
def test_unknown_option_raises_one_line(own, option, says):
    with pytest.raises(UserError, match=f"--method-option {option[:4]}.*{says}") as error:
        train.main([*own, "--method-option", option, "--out", "run"])
    assert "\n" not in str(error.value) and not Path("run").exists()


def test_type_error_in_a_method_keeps_its_traceback(own):
    Path("own.py").write_text(OWN.replace("= weight, shown", "= len(weight), shown"))
    with pytest.raises(TypeError, match="has no len"):
        train.main([*own, "--out", "run"])


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


def test_method_file_imports_its_neighbours(own):
    """A package, a module, and none that hides an installed one."""
    Path("methods/parts").mkdir(parents=True)
    Path("methods/parts/__init__.py").write_text("WEIGHT = 0.25\n")
    Path("methods/losses.py").write_text("from parts import WEIGHT\n")
    Path("methods/einops.py").write_text("raise RuntimeError('hides the installed one')\n")
    for module in ("einops.layers", "losses", "parts"):
        sys.modules.pop(module, None)
    Path("methods/mine.py").write_text(
        "from lodisc import LoDisc\nimport einops.layers\nfrom losses import WEIGHT\n\n\n"
        "class Mine(LoDisc):\n    weight = WEIGHT\n")
    train.main([*own[:-4], "--epochs", "1", "--method", "methods/mine.py:Mine", "--out", "run"])
    assert evaluation.load_method("methods/mine.py:Mine").weight == 0.25
    image = str(next(Path("flowers/test").rglob("*.jpg")))
    evaluation.main(["masks", "run", image])


def test_masks_of_a_run_whose_method_file_has_moved(own, monkeypatch):
    train.main([*own, "--out", "run"])
    image = str(next(Path("flowers/test").rglob("*.jpg")))
    Path("elsewhere").mkdir()
    Path("own.py").rename("elsewhere/moved.py")
    with pytest.raises(UserError, match="own.py:Third: no such method"):
        evaluation.main(["masks", "run", image])
    seen, real = [], evaluation.build_model
    monkeypatch.setattr(evaluation, "build_model", lambda *args, **options: (
        seen.append(real(*args, **options)), seen[-1])[1])
    evaluation.main(["masks", "run", image, "--method", "elsewhere/moved.py:Third"])
    assert type(seen[0]).__name__ == "Third" and seen[0].weight == 0.5
    Path("narrow.py").write_text("from lodisc import LoDisc\n\n\nclass Third(LoDisc):\n"
                                 "    def __init__(self, encoder, weight, **options):\n"
                                 "        options['output_dim'] = 8\n"
                                 "        super().__init__(encoder, **options)\n")
    with pytest.raises(UserError, match="does not fit --method: .*size mismatch") as error:
        evaluation.main(["masks", "run", image, "--method", "narrow.py:Third"])
    assert "\n" not in str(error.value)
    for method in ("elsewhere/moved.py:Other", "global"):
        with pytest.raises(UserError, match=f"--method {method}: the run's is .*own.py:Third"):
            evaluation.main(["masks", "run", image, "--method", method])
    evaluation.main(["export", "run", "--out", "weights.pth"])
    with pytest.raises(UserError, match="--method is for a run"):
        evaluation.main(["masks", "weights.pth", image, "--method", "elsewhere/moved.py:Third"])


def test_floats_of_a_method_are_logged_as_tensors_are(own):
    """Return a Python float, an int, and a scalar of another dtype with a gradient."""
    Path("own.py").write_text(OWN.replace("class Output(NamedTuple):", "class Output(NamedTuple):\n"
                                          "    weight: float\n    count: int\n    half: object")
                              .replace("return Output(", "return Output(0.125, len(view1), "
                                       "out.total.double() / 2, "))
    train.main([*own, "--epochs", "1", "--out", "run"])
    row, = rows("run")
    assert (row["weight"], row["count"]) == ("0.125", "12.0")
    assert float(row["half"]) == pytest.approx(
        (float(row["total"]) - float(row["third_loss"])) / 2, rel=1e-5)


def test_method_file_replaces_no_module(flowers):
    import random
    Path("random.py").write_text("from lodisc import LoDisc\n")
    assert evaluation.load_method("random.py:LoDisc") is LoDisc
    assert sys.modules["random"] is random
