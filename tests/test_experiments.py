"""The tables' arithmetic, the schedules, and that runs resume and are compared like with like."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import experiments
import train
from data.birds import Birds
from data.datasets import Data
from lodisc import UserError, VisionTransformer, attention_product, location_mask, read_weights

pytestmark = pytest.mark.usefixtures("elsewhere")
SMALL = ["--image-size", "16", "--batch-size", "10", "--epochs", "1", "--warmup-epochs", "0.5",
         "--workers", "0"]


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_paired_difference():
    """By hand: differences 1, 2, 3, mean 2, standard error 1 / sqrt(3), t of two degrees 4.303."""
    assert experiments.difference([3.0, 4.0, 5.0], [2.0, 2.0, 2.0]) == "+2.000 [-0.484, +4.484]"
    assert experiments.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"


def test_markdown_rows():
    """One seed: no differences. Initial weights have a row of their own, below raw pixels."""
    metrics = {"linear": {"top1": 0.5}}
    columns = {"linear top-1": ("linear", "top1")}
    rows = experiments.markdown({"global": [metrics], "lodisc": [metrics]}, columns)
    assert rows[2:] == ["| global | 0.500 |", "| lodisc | 0.500 |"]
    rows = experiments.markdown({"global": [metrics] * 2, "lodisc": [metrics] * 2}, columns)
    assert rows[4:] == ["| lodisc − global | +0.000 [+0.000, +0.000] |"]
    metrics = {**metrics, "pixels": {"linear": {"top1": 0.1}}, "initial": {"linear": {"top1": 0.2}}}
    rows = experiments.markdown({"global": [metrics]}, columns)
    assert rows[2:] == ["| raw pixels | 0.100 |", "| initial | 0.200 |", "| global | 0.500 |"]


def test_rising_weight():
    model = experiments.Rising(VisionTransformer(16, 4, 8, 1, 2), hidden_dim=8, output_dim=4)
    weights = []
    for progress in (0, 0.25, 0.5, 0.75):
        out = model(*torch.randn(2, 4, 3, 16, 16), progress=progress)
        weights.append(((out.total - out.global_loss) / out.local_loss).item())
    assert weights == pytest.approx([0, 0.5, 1, 1], abs=1e-5)


def test_late_masks():
    model = experiments.Late(VisionTransformer(16, 4, 8, 1, 2), hidden_dim=8, output_dim=4)
    view1, view2 = torch.randn(2, 4, 3, 16, 16)
    stored = attention_product(model.momentum_encoder(view1, attention="row")[1])
    generator, found = torch.Generator().manual_seed(0), []
    for progress in (0, 0.49, 0.5, 0.9, 0.1):
        masks = model(view1, view2, generator, progress).masks
        found.append(torch.equal(masks[0], location_mask(stored, 0.3)))
    assert found == [False, False, True, True, False]


def test_method_file_import_is_harmless(monkeypatch):
    """Loading experiments.py as a method file patches nothing and writes nothing."""
    monkeypatch.setitem(sys.modules, "experiments", experiments)  # given back afterwards
    before = {name: id(value) for name, value in vars(train).items()}
    options, path = experiments.TABLES["variants"]["local loss rises"], list(sys.path)
    loaded = experiments.evaluation.load_method(options[1])
    assert issubclass(loaded, train.load_encoder.__globals__["LoDisc"])
    assert {name: id(value) for name, value in vars(train).items()} == before
    assert not list(Path().iterdir()) and set(sys.path) == set(path)


def test_held_out_tables_leave_test_images_closed(flowers, monkeypatch, capsys):
    assert experiments.HELD_OUT == ("recipe", "variants")
    for path in (flowers / "test").rglob("*.jpg"):
        path.write_text("no image")
    monkeypatch.setitem(experiments.TABLES, "recipe", {"global": ["--method", "global", *SMALL]})
    experiments.main(["recipe", str(flowers), "--seeds", "0"])
    assert lines_of(capsys.readouterr().out)[-1].startswith("| global | ")
    folder, = experiments.RUNS.iterdir()
    assert folder.name.startswith("flowers-held-out-method-global-")
    config = read_weights(folder)["config"]
    assert config["held_out"] and config["num_images"] == 30  # four fifths of 36, by class


def test_options_of_tables_are_valid():
    for rows in experiments.TABLES.values():
        for options in rows.values():
            train.parse_args(options)


def test_named_data_root_is_passed_on(tmp_path):
    with pytest.raises(UserError, match=f"flowers17.*{tmp_path}/nowhere"):
        experiments.main(["masks", "flowers17", "--data-root", str(tmp_path / "nowhere")])


def test_unlabelled_images_are_refused_at_once(flowers, monkeypatch):
    monkeypatch.delattr(train, "main")
    with pytest.raises(UserError, match="training without evaluation"):
        experiments.main(["methods", str(flowers / "train")])
    with pytest.raises(UserError, match="at most 10, got 11"):
        experiments.main(["methods", "--seeds", *map(str, range(11))])
    assert not experiments.RUNS.exists()


def test_table_of_seeds(monkeypatch, capsys):
    """Two rows, two seeds; finished runs are not trained again, killed ones resume."""
    data = Data(Birds("train", 60), Birds("test", 40))
    for script in (train, experiments.evaluation):
        monkeypatch.setattr(script, "load_data", lambda *args, **options: data)
    small = {**train.RECIPES["birds"], "image_size": 16, "epochs": 2, "batch_size": 20}
    monkeypatch.setitem(train.RECIPES, "birds", small)
    options = ["--workers", "0"]
    rising = [*experiments.TABLES["variants"]["local loss rises"], *options]
    monkeypatch.setitem(experiments.TABLES, "methods", {"lodisc": options, "rising": rising})
    monkeypatch.setitem(sys.modules, "experiments", experiments)  # given back afterwards
    real, begun = train.main, []
    monkeypatch.setattr(train, "main", lambda argv: begun.append(argv) or real(argv))
    experiments.main(["methods", "--seeds", "1", "0", "0"])
    lines = lines_of(capsys.readouterr().out)
    assert lines[0] == ("| | linear top-1 | k-NN top-1 | rank-1 | mAP | on the bird | "
                        "on its parts | part mIoU | training, s |")
    assert [line.split(" |")[0] for line in lines[2:]] == \
        ["| raw pixels", "| untrained", "| lodisc", "| rising", "| rising − lodisc"]
    folders = sorted(experiments.RUNS.iterdir())
    assert [folder.name for folder in folders] == [
        "synthetic-method-Rising-workers-0-seed-0", "synthetic-method-Rising-workers-0-seed-1",
        "synthetic-workers-0-seed-0", "synthetic-workers-0-seed-1"]
    top1, object_ = ([json.loads((folder / "eval.json").read_text())[part][key]
                      for folder in folders] for part, key in (
                          ("linear", "top1"), ("localisation", "object")))
    assert experiments.spread(top1[2:]) in lines[4]
    assert experiments.difference(top1[:2], top1[2:]) in lines[6]
    assert experiments.difference(object_[:2], object_[2:]) in lines[6]
    for line in lines[2:4]:  # before training nothing is localised
        cells = [cell.strip() > "" for cell in line.split("|")[2:-1]]
        assert cells == 4 * [True] + 2 * [False] + [True, False]
    history = read_weights(folders[1])["history"]  # weights 0, 1/3, 2/3 in the first epoch
    assert history[0]["total"] < history[0]["global_loss"] + history[0]["local_loss"] - 0.1

    (folders[2] / "eval.json").unlink()  # killed before it was evaluated
    for path in folders[1].glob("*.*"):  # killed before its first checkpoint
        if path.name != "config.json":
            path.unlink()
    begun.clear()
    experiments.main(["methods", "--seeds", "0", "1"])
    assert [argv[-2:] for argv in begun] == [["--resume", str(folders[2])],
                                             ["--out", str(folders[1])]]
    again = lines_of(capsys.readouterr().out)
    assert [line.rsplit("|", 2)[0] for line in again] == \
        [line.rsplit("|", 2)[0] for line in lines]  # bit for bit, but for the seconds

    begun.clear()  # a setting that may change with --resume does not make a run stale
    assert experiments.run("synthetic", options, 0, "elsewhere") == folders[2] and not begun
    small["epochs"] = 3  # another recipe since then
    with pytest.raises(UserError, match="is a run with epochs 2; move it away"):
        experiments.run("synthetic", options, 0)

    small["epochs"] = 2
    monkeypatch.setattr(experiments, "ROOT", Path())
    monkeypatch.setitem(experiments.TABLES, "methods", {"lodisc": options, "global": rising})
    Path("tests/pictures").mkdir(parents=True)
    experiments.main(["pictures", "--seeds", "0"])
    picture = Path("tests/pictures/masks.png")
    assert picture.stat().st_size < 100_000 and len(Image.open(picture).getcolors()) > 5
    assert not begun and len(list(Path("tests").rglob("*.*"))) == 1
