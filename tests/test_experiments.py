"""The tables' arithmetic, and that a held-out part is held out."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import experiments
import train
from lodisc import attention_product, load_encoder, location_mask

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_paired_difference():
    """By hand: differences 1, 2, 3, mean 2, standard error 1 / sqrt(3), t of two degrees 4.303."""
    assert experiments.difference([3.0, 4.0, 5.0], [2.0, 2.0, 2.0]) == "+2.000 [-0.484, +4.484]"
    assert experiments.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"


def test_one_seed_has_no_differences():
    figures = {"linear": {"top1": 0.5}}
    columns = {"linear top-1": ("linear", "top1")}
    rows = experiments.markdown({"global": [figures], "lodisc": [figures]}, columns)
    assert rows[2:] == ["| global | 0.500 |", "| lodisc | 0.500 |"]
    rows = experiments.markdown({"global": [figures] * 2, "lodisc": [figures] * 2}, columns)
    assert rows[4:] == ["| lodisc − global | +0.000 [+0.000, +0.000] |"]


def test_held_out_is_train_without_a_fifth_of_every_class(flowers, monkeypatch):
    folder = experiments.held_out(flowers)
    parts = {part: {path.relative_to(folder / part) for path in (folder / part).glob("*/*")}
             for part in ("train", "test")}
    whole = {path.relative_to(flowers / "train") for path in (flowers / "train").glob("*/*")}
    assert parts["train"] | parts["test"] == whole and not parts["train"] & parts["test"]
    for label in range(3):
        assert sum(path.parent.name == f"class {label}" for path in parts["test"]) == 3  # of 12
    marker = folder / "marker"
    marker.touch()
    assert experiments.held_out(flowers) == folder and marker.exists()  # a table may be reading it
    next(iter((flowers / "train").glob("*/*"))).unlink()  # other pictures, another folder
    real, calls = Path.symlink_to, []

    def killed(link, file):
        calls.append(link)
        if len(calls) > 5:
            raise KeyboardInterrupt
        real(link, file)

    monkeypatch.setattr(Path, "symlink_to", killed)
    with pytest.raises(KeyboardInterrupt):
        experiments.held_out(flowers)
    monkeypatch.setattr(Path, "symlink_to", real)
    other = experiments.held_out(flowers)  # nothing half done was left in its place
    assert other != folder and len(list(other.glob("*/*/*"))) == 35
    parts = [{path.name for path in (other / part / "class 0").iterdir()}
             for part in ("train", "test")]
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("name", ["rising", "late"])
def test_schedules_follow_the_run(few_birds, monkeypatch, name):
    """Four steps: the local loss counts 0, 0.5, 1, 1; masks are random in the first two alone."""
    counts, random = [], []
    model, real = experiments.SCHEDULES[name], experiments.LoDisc.pivotal_mask

    def forward(self, *views, whole=model.forward):
        out = whole(self, *views)
        counts.append(((out.total - out.global_loss) / out.local_loss).item())
        return out

    def pivotal_mask(self, view, attentions, generator):
        mask = real(self, view, attentions, generator)
        random.append(not torch.equal(mask, location_mask(attention_product(attentions), 0.3)))
        return mask

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(experiments.LoDisc, "pivotal_mask", pivotal_mask)
    small = {"image_size": 16, "epochs": 2, "batch_size": 100}
    monkeypatch.setitem(train.RECIPES, "synthetic", {**train.RECIPES["synthetic"], **small})
    experiments.RUNS.mkdir(parents=True)
    folder = experiments.run("synthetic", [name], 0)
    assert folder.name == f"synthetic-{name}-seed-0" and train.LoDisc is experiments.LoDisc
    assert counts == pytest.approx([0, 0.5, 1, 1] if name == "rising" else [1] * 4, abs=1e-4)
    assert random == [name == "late"] * 4 + [False] * 4  # of two views each


def test_pictures_that_cannot_be_judged_are_refused_at_once(flowers, monkeypatch):
    monkeypatch.setattr(train, "save_checkpoint", train.save_checkpoint)  # given back afterwards
    with pytest.raises(ValueError, match="training without evaluation"):
        experiments.main(["methods", str(flowers / "train")])


def test_a_table_from_the_shell(few_birds, monkeypatch, capsys):
    """Two rows, two seeds; what is there is not trained again; another data set is not taken."""
    monkeypatch.setattr(experiments, "TABLES", {"methods": {"global": ["--method", "global"],
                                                            "lodisc": []}})
    monkeypatch.setattr(experiments, "BIRDS", experiments.Birds("test", 8))
    small = {"image_size": 16, "epochs": 2, "batch_size": 50}
    monkeypatch.setitem(train.RECIPES, "synthetic", {**train.RECIPES["synthetic"], **small})
    real, begun = train.main, []
    monkeypatch.setattr(train, "main", lambda argv: begun.append(argv) or real(argv))
    monkeypatch.setattr(train, "save_checkpoint", train.save_checkpoint)  # given back afterwards
    experiments.main(["methods", "--seeds", "0", "1"])
    first = capsys.readouterr().out
    lines = [line for line in first.splitlines() if line.startswith("|")]
    assert [line.split(" |")[0] for line in lines] == \
        ["|", "|---|---|---|---|---|---|---|", "| raw pixels", "| untrained", "| global",
         "| lodisc", "| lodisc − global"]
    folders = sorted(path.name for path in experiments.RUNS.iterdir())
    assert folders == ["synthetic-method-global-seed-0", "synthetic-method-global-seed-1",
                       "synthetic-seed-0", "synthetic-seed-1"]
    figures = [json.loads((experiments.RUNS / name / "eval.json").read_text())["linear"]["top1"]
               for name in folders]
    assert experiments.spread(figures[2:]) in lines[5]
    assert experiments.difference(figures[2:], figures[:2]) in lines[6]
    looks = experiments.read_looks(experiments.RUNS / "synthetic-seed-0" / "looks.csv")
    assert [row[0] for row in looks] == [0, 4, 8]
    found = experiments.judging.localisation(
        load_encoder(experiments.RUNS / "synthetic-seed-0", momentum=True), experiments.BIRDS)
    assert looks[-1][1:] == pytest.approx((found["object"], found["parts"]), abs=1e-6)

    monkeypatch.setattr(experiments, "ROOT", Path("."))
    Path("data").mkdir()
    experiments.main(["pictures", "--seeds", "0", "1"])
    for name in ("masks.png", "looks.png"):
        assert Path("data", name).stat().st_size < 100_000
        assert len(Image.open(Path("data", name)).getcolors()) > 5  # something is drawn

    Path("runs/experiments/synthetic-seed-1/eval.json").unlink()  # killed before it was judged
    begun.clear()
    experiments.main(["methods", "--seeds", "0", "1"])
    again = capsys.readouterr().out
    assert begun == [["--resume", "runs/experiments/synthetic-seed-1"]]
    assert [line for line in again.splitlines() if line.startswith("|")] == lines
    with pytest.raises(ValueError, match="is a run with epochs 2; move it away"):
        monkeypatch.setitem(train.RECIPES["synthetic"], "epochs", 3)  # another recipe since then
        experiments.run("synthetic", [], 0)
