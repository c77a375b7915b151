"""The two scripts as a user runs them, on a real ImageFolder in small."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as judging
import train
from conftest import same, weights
from lodisc import LoDisc, VisionTransformer, load_encoder

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--epochs", "2",
         "--warmup-epochs", "1", "--batch-size", "12", "--workers", "0", "--device", "cpu"]


def run(*arguments):
    return subprocess.run([sys.executable, ROOT / arguments[0], *map(str, arguments[1:])],
                          capture_output=True, text=True, timeout=200)


def test_a_run_leaves_config_metrics_checkpoint_and_figures(flowers, capsys):
    train.main(["--data", str(flowers), *SMALL])
    folder = Path("runs/flowers-lodisc-1")
    printed = capsys.readouterr().out
    assert f"has a loss of {4 * 0.2 * math.log(12):.3f}" in printed
    assert all(row in printed for row in ("raw pixels", "untrained", "trained", "mAP"))
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] == str(flowers) and config["epochs"] == 2 and config["seed"] == 0
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[1]["step"] == "6"
    for row in rows:
        assert float(row["total"]) == pytest.approx(float(row["global_loss"])
                                                    + float(row["local_loss"]), abs=1e-4)
    figures = json.loads((folder / "eval.json").read_text())
    assert 0 <= figures["linear"]["top1"] <= 1 and figures["untrained"]["retrieval"]["queries"] == 12
    assert sorted(path.name for path in folder.iterdir()) == \
        ["checkpoint.pt", "config.json", "eval.json", "metrics.csv", "run.png"]

    encoder = load_encoder(folder)
    assert encoder.image_size == 16 and len(encoder.mean) == len(encoder.std) == 3
    assert not encoder.training
    online, momentum = weights(folder), load_encoder(folder / "checkpoint.pt", momentum=True)
    assert torch.equal(encoder.norm.weight, online["encoder.norm.weight"])
    assert torch.equal(momentum.norm.weight, online["momentum_encoder.norm.weight"])
    assert not torch.equal(encoder.norm.weight, momentum.norm.weight)

    train.main(["--data", str(flowers), *SMALL])  # a second run stands beside the first
    assert same(online, weights("runs/flowers-lodisc-2"))

    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    (folder / "eval.json").unlink()
    judging.main(["all", str(folder), "--workers", "0"])
    again = json.loads((folder / "eval.json").read_text())
    assert again == {name: figures[name] for name in ("linear", "knn", "retrieval")}
    shutil.copytree(flowers, "other")
    for what, options in (("linear", ["--momentum"]), ("knn", ["--momentum"]),
                          ("knn", ["--data", str(flowers)]), ("knn", ["--data", "other"])):
        judging.main([what, str(folder), *options, "--workers", "0"])
    after = json.loads((folder / "eval.json").read_text())
    assert after.pop("momentum").keys() == {"linear", "knn"}
    assert after == {**again, str(Path("other").resolve()): {"knn": again["knn"]}}  # beside its own
    with pytest.raises(ValueError, match="--device quantum: "):
        judging.main(["masks", str(folder), "--device", "quantum"])
    judging.main(["masks", str(folder)])
    assert (folder / "masks.png").stat().st_size > 1000
    picture = next((flowers / "test").rglob("*.jpg"))
    judging.main(["masks", str(folder), str(picture), "--out", "one.png"])
    assert Path("one.png").is_file()
    with pytest.raises(ValueError, match="exists"):
        judging.main(["masks", str(folder), str(picture), "--out", "one.png"])
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before


def test_weights_move_as_the_recipe_says(flowers):
    """Warm-up from 0, the EMA, frozen parts, and a loss that comes from the data."""
    train.main(["--data", str(flowers), *SMALL, "--out", "a"])
    settings = json.loads(Path("a/config.json").read_text())
    start, end = train.build_model(settings).state_dict(), weights("a")
    for name in ("encoder.patch_embed.proj.weight", "encoder.pos_embed"):
        assert torch.equal(start[name], end[name])
    moved = (end["encoder.norm.weight"] - start["encoder.norm.weight"]).abs().max()
    lagged = (end["momentum_encoder.norm.weight"] - start["encoder.norm.weight"]).abs().max()
    assert 0 < lagged < moved
    assert train.learning_rate(0, 10, 50, 1.0) == 0 and train.learning_rate(5, 10, 50, 1.0) == 0.5
    assert train.learning_rate(10, 10, 50, 1.0) == 1 and train.learning_rate(0, 0, 50, 1.0) == 1
    assert train.learning_rate(30, 10, 50, 1.0) == pytest.approx(0.5)
    assert train.learning_rate(50, 10, 50, 1.0) == pytest.approx(0)


def test_the_optimiser_follows_the_schedule(flowers, monkeypatch):
    """Learning rate per 256 images, warm-up and cosine, as the optimiser sees them."""
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (
        seen.append([group["lr"] for group in self.param_groups]), step(self, *a, **k))[1])
    train.main(["--data", str(flowers / "train"), *SMALL, "--lr", "0.01", "--out", "run"])
    peak = 0.01 * 12 / 256
    assert seen == [[pytest.approx(train.learning_rate(i, 3, 6, peak))] for i in range(6)]


def test_a_last_batch_that_is_not_full_is_left_out(flowers):
    extra = flowers / "train" / "class 0" / "extra.jpg"
    extra.write_bytes((flowers / "train" / "class 0" / "0.jpg").read_bytes())
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])  # 37 = 3 * 12 + 1
    with open("run/metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6"]


@pytest.mark.parametrize("options", [
    ["--method", "global"], ["--method", "local"], ["--mask", "random"], ["--mask", "block"],
    ["--mask", "least"], ["--importance", "rollout"], ["--importance", "last"],
    ["--local-input", "tokens"], ["--amp", "bf16"], ["--keep-ratio", "0.5"]])
def test_every_variant_trains(flowers, options):
    train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "1", "--out", "run"])
    train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "1", *options, "--out", "new"])
    with open("new/metrics.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert math.isfinite(float(row["total"])) and float(row["total"]) > 0
    if options[0] == "--method":
        assert float(row["local_loss" if options[1] == "global" else "global_loss"]) == 0
    assert not same(weights("run"), weights("new"))


@pytest.mark.parametrize("mask", ["location", pytest.param("random", marks=pytest.mark.slow)])
def test_same_seed_same_weights_with_any_number_of_workers(flowers, mask):
    for name, options in (("0", []), ("1", ["--workers", "1"]), ("2", ["--workers", "2"]),
                          ("other", ["--seed", "1"])):
        train.main(["--data", str(flowers / "train"), *SMALL, "--mask", mask, *options, "--out", name])
    assert same(weights("0"), weights("1")) and same(weights("0"), weights("2"))
    assert not same(weights("0"), weights("other"))


@pytest.mark.parametrize("mask", ["location", "random"])
def test_resume_ends_where_an_uninterrupted_run_ends(flowers, monkeypatch, mask):
    options = ["--data", str(flowers / "train"), *SMALL, "--mask", mask, "--out"]
    train.main([*options, "whole"])

    class Killed(Exception):
        pass

    def save_then_die(path, **contents):
        real(path, **contents)
        raise Killed

    real = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        train.main([*options, "part"])
    monkeypatch.setattr(train, "save_checkpoint", real)
    with pytest.raises(ValueError, match="epochs"):
        train.main(["--resume", "part", "--epochs", "3"])
    train.main(["--resume", "part", "--workers", "1"])
    assert same(weights("whole"), weights("part"))
    assert len(Path("part/metrics.csv").read_text().splitlines()) == 3


def test_a_loss_that_is_not_finite_stops_the_run_with_a_reason(flowers):
    with pytest.raises(ValueError, match="--lr"):
        train.main(["--data", str(flowers / "train"), *SMALL, "--lr", "1e30", "--out", "bad",
                    "--warmup-epochs", "0"])


def test_what_a_folder_alone_chooses_is_printed(flowers, capsys):
    settings = {"data": str(flowers), "arch": None, "image_size": None, "patch_size": None,
                "epochs": None, "warmup_epochs": None, "lr": None, "crop_min": 0.08, "momentum": None,
                "batch_size": 12, "weight_decay": 0.1, "seed": 0, "workers": 0}
    train.settle(settings, torch.device("cpu"), 36, 1)
    printed = capsys.readouterr().out
    for word in ("arch vit_nano", "image_size 48", "epochs 200"):
        assert word in printed
    assert settings["arch"] == "vit_nano" and settings["epochs"] == 200


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert train.pick_precision("off", cuda, 768) is None
    assert train.pick_precision("bf16", cpu, 96) == torch.bfloat16
    assert train.pick_precision("fp16", cuda, 96) == torch.float16
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or supported)
        assert train.pick_precision("auto", cuda, 96) == dtype
    for has, dtype in (({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16),
                       ({"avx512_bf16": False, "avx2": True}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        assert train.pick_precision("auto", cpu, 768) == dtype
        assert train.pick_precision("auto", cpu, 96) is None  # slower for vit_nano
        assert train.pick_precision("auto", torch.device("mps"), 768) is None
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # what cannot be asked is not there
    assert train.pick_precision("auto", cpu, 768) is None


@pytest.mark.slow
@pytest.mark.parametrize("local_input", ["pixels", "tokens"])
def test_compiled_passes_give_the_same(local_input):
    def step(compiled):
        torch.manual_seed(0)
        encoder = VisionTransformer(32, 8, dim=48, depth=2, heads=3)
        model = LoDisc(encoder, local_input=local_input, hidden_dim=64, output_dim=32)
        if compiled:
            train.compile_encoders(model, torch.device("cpu"))
        views = torch.randn(2, 8, 3, 32, 32)
        output = model(*views)
        output.total.backward()
        return [*output[:3], *output.masks, *(p.grad for p in model.parameters() if p.requires_grad)]

    for plain, compiled in zip(step(False), step(True), strict=True):
        error = (plain.float() - compiled.float()).abs().max()
        assert error < 1e-5 * plain.float().abs().max().clamp_min(1)  # near 0, the token's is steep
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_without_a_compiler_training_goes_on(flowers):
    options = ["--data", flowers / "train", *SMALL, "--epochs", "1", "--compile", "--out", "run"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, options)], capture_output=True, text=True,
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(flowers)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--compile: going on without it") == 1


def test_nothing_that_exists_is_overwritten(flowers):
    Path("mine").mkdir()
    (Path("mine") / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="exists"):
        train.main(["--data", str(flowers), *SMALL, "--out", "mine"])
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("options, says", [
    (["--data", "missing"], "no such folder"),
    (["--batch-size", "50"], "36 training pictures"),
    (["--batch-size", "1"], "--batch-size"),
    (["--image-size", "20"], "20 px"),
    (["--keep-ratio", "0"], "keep_ratio"),
    (["--epochs", "0"], "--epochs"),
    (["--seed", "-1"], "--seed"),
    (["--warmup-epochs", "-5"], "--warmup-epochs"),
    (["--momentum", "3"], "--momentum"),
    (["--device", "quantum"], "quantum"),
    (["--resume", "missing"], "missing"),
])
def test_mistakes_are_one_line_that_says_what(flowers, options, says):
    with pytest.raises(ValueError) as error:
        train.main(["--data", str(flowers / "train"), *SMALL, *options])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_picture_files_are_for_masks_alone(flowers):
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])
    with pytest.raises(ValueError, match="linear takes no picture files, got a.jpg; masks does"):
        judging.main(["linear", "run", "a.jpg"])


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_encoder(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pt")  # would run code when unpickled
    for name in ("text.pt", "other.pt", "code.pt"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            load_encoder(tmp_path / name)


def test_scripts_from_the_shell(flowers):
    """A mistake ends with one line and status 2; --help names the authors' values."""
    failed = run("train.py", "--data", "missing")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "Traceback" not in failed.stderr and "missing" in failed.stderr
    failed = run("eval.py", "all", "missing")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr and "missing" in failed.stderr
    shown = run("train.py", "--help").stdout
    assert "default: 0.3; authors: 0.3" in " ".join(shown.split())
    for flag in train.parse_args([])[1]:
        assert f"--{flag.replace('_', '-')} " in shown


@pytest.mark.slow
def test_processes_that_are_spawned_rather_than_forked(flowers):
    """As on macOS and Windows: the data set travels to the workers pickled."""
    code = ("import sys, torch.multiprocessing as mp; sys.path.insert(0, sys.argv[1])\n"
            "import train\n"
            "if __name__ == '__main__':\n"
            "    mp.set_start_method('spawn')\n"
            "    train.main(sys.argv[2:])\n")
    Path("spawned.py").write_text(code)
    options = ["--data", flowers, *SMALL]
    done = subprocess.run([sys.executable, "spawned.py", ROOT, *map(str, options), "--workers", "2",
                           "--out", "spawned"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    train.main([*map(str, options), "--out", "here"])
    assert same(weights("spawned"), weights("here"))
