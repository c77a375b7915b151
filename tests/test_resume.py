"""Runs that are killed, interrupted, out of disk space, or of an older version."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from conftest import Killed, kill_after, same, weights
from lodisc import LoDisc, UserError

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--warmup-epochs", "1",
         "--batch-size", "12", "--device", "cpu"]


def rows(folder):
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        return [[row[name] for name in ("epoch", "step", "total", "lr")]
                for row in csv.DictReader(file)]


def begin(*arguments, **options):
    return subprocess.Popen(  # a shell's background jobs ignore SIGINT, and so do their children
        [sys.executable, ROOT / "train.py", *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(process, start, count):
    """Read the output until `count` more lines begin with `start`; False if it ends before."""
    for line in process.stdout:
        count -= line.startswith(start)
        if count == 0:
            return True
    return False


def options_of(flowers, epochs, workers=0):
    return ["--data", str(flowers / "train"), *SMALL, "--epochs", str(epochs), "--workers",
            str(workers), "--mask", "random", "--out"]


@pytest.mark.slow
@pytest.mark.parametrize("workers, kills", [(0, 9), (2, 3)])
def test_run_killed_at_random_times_resumes_bit_exactly(flowers, workers, kills):
    """Kill twice in the first epoch, then later."""
    rng, epochs = random.Random(workers), 3 * kills + 3
    options = options_of(flowers, epochs, workers)
    process = begin(*options, "killed")
    for kill in range(kills):
        assert wait_for(process, *(("precision", 1) if kill < 2 else ("epoch", rng.randint(1, 2))))
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        if not Path("killed/checkpoint.pt").exists():  # killed before step 0 was written
            shutil.rmtree("killed")
            process = begin(*options, "killed")
        else:
            process = begin("--resume", "killed")
    output, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    train.main([*options, "whole"])
    assert same(weights("killed"), weights("whole"))
    assert rows("killed") == rows("whole")
    assert sorted(p.name for p in Path("killed").iterdir()) == \
        ["checkpoint.pt", "config.json", "metrics.csv", "run.png"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_loses_the_current_epoch_only(flowers, number):
    """Send it to the whole process group, workers included, as Ctrl-C does."""
    options = options_of(flowers, 40, 2)
    process = begin(*options, "stopped", start_new_session=True)
    assert wait_for(process, "epoch", 2)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=100)
    if number == signal.SIGINT:
        assert process.returncode == 2 and error.count("\n") == 1
        assert "python train.py --resume stopped" in error
    step = torch.load("stopped/checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < 120 and step % 3 == 0
    train.main(["--resume", "stopped", "--workers", "1"])
    train.main([*options, "whole"])
    assert same(weights("stopped"), weights("whole")) and rows("stopped") == rows("whole")


@pytest.mark.parametrize("kill_at", [pytest.param(3, marks=pytest.mark.slow), 5])
def test_run_killed_within_an_epoch_resumes_from_its_start(flowers, monkeypatch, kill_at):
    options = options_of(flowers, 3)
    train.main([*options, "whole"])
    done = kill_after(monkeypatch, kill_at)
    with pytest.raises(Killed):
        train.main([*options, "part"])
    checkpoint = torch.load("part/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == (kill_at - 1) // 3 * 3  # step 0 is written before the first batch
    train.main(["--resume", "part"])
    assert len(done) == kill_at + 9 - (kill_at - 1) // 3 * 3
    assert same(weights("whole"), weights("part")) and rows("whole") == rows("part")


def test_only_movable_settings_change_with_resume(flowers, capsys):
    options = options_of(flowers, 2)
    train.main([*options, "run"])
    for option in (["--epochs", "3"], ["--seed", "1"], ["--method", "mocov3"],
                   ["--local-weight", "2"], ["--hidden-dim", "40"]):
        name = option[0][2:].replace("-", "_")
        with pytest.raises(UserError, match=f"other settings for {name}; leave"):
            train.main(["--resume", "run", *option])
    train.main(["--resume", "run", *options[:-1]])  # the same settings
    shutil.move(flowers, "moved")
    train.main(["--resume", "run", "--data", "moved/train", "--workers", "1", "--device", "cpu"])
    config = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    assert config["data"] == str(Path("moved/train").resolve()) and config["workers"] == 1
    next(Path("moved/train/class 0").iterdir()).unlink()
    with pytest.raises(UserError, match="expected 36 training images, got 35"):
        train.main(["--resume", "run"])


def test_copied_checkpoint_needs_no_other_file(flowers, capsys, quick_probe):
    options = ["--data", str(flowers), *SMALL, "--epochs", "1", "--workers", "0", "--out"]
    train.main([*options, "run"])
    Path("copy").mkdir()
    shutil.copy("run/checkpoint.pt", "copy/checkpoint.pt")
    shutil.rmtree("run")
    evaluation.main(["knn", "copy/checkpoint.pt", "--workers", "0"])
    evaluation.main(["masks", "copy", "--workers", "0"])
    train.main(["--resume", "copy/checkpoint.pt"])
    assert sorted(path.name for path in Path("copy").iterdir()) == [
        "checkpoint.pt", "config.json", "eval.json", "masks.png", "metrics.csv", "per_image.json",
        "run.png"]


def test_resume_of_invalid_run_raises(flowers, tmp_path):
    Path("empty").mkdir()
    with pytest.raises(UserError, match="no such file"):
        train.main(["--resume", "empty"])
    for contents, says in ((b"half a checkpoint", "cannot be read"), (None, "not a run's")):
        torch.save({"model": {}}, "empty/checkpoint.pt")
        if contents:
            Path("empty/checkpoint.pt").write_bytes(contents)
        with pytest.raises(UserError, match=says):
            train.main(["--resume", "empty"])


def test_metrics_csv_is_truncated_to_the_checkpoint(flowers):
    train.main([*options_of(flowers, 2), "run"])
    table = rows("run")
    with open("run/metrics.csv", "a") as file:
        file.write("3,9,half a li")
    train.main(["--resume", "run"])
    assert rows("run") == table


@pytest.mark.slow
def test_full_disk_raises_one_line_and_leaves_no_partial_file(flowers):
    resource = pytest.importorskip("resource", reason="Windows has no limits")

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *options_of(flowers, 1), "full"], capture_output=True,
        text=True, preexec_fn=small_files)
    assert done.returncode == 2 and re.fullmatch(r"train\.py: .*checkpoint\.pt.*\n", done.stderr)
    assert not Path("full").exists()  # nothing to resume from


def test_failed_resume_in_the_first_epoch_keeps_the_folder(flowers, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LoDisc, "forward", interrupt)
        with pytest.raises(UserError, match="interrupted; continue with: .*--resume run"):
            train.main([*options_of(flowers, 2), "run"])
    for path in (flowers / "train").rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="not a readable image"):
        train.main(["--resume", "run"])
    assert Path("run/checkpoint.pt").exists()


def test_full_disk_after_an_epoch_keeps_the_last_checkpoint(flowers, monkeypatch):
    real, steps = torch.save, []

    def save(contents, file):
        steps.append(contents["step"])
        if len(steps) == 3:
            file.write(b"partial")
            raise RuntimeError("file write failed")
        real(contents, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="disk full"):
        train.main([*options_of(flowers, 3), "full"])
    assert torch.load("full/checkpoint.pt", weights_only=True)["step"] == steps[1] > 0
    assert sorted(path.name for path in Path("full").iterdir()) == [
        "checkpoint.pt", "config.json", "metrics.csv"]


def test_uncreatable_folder_raises_one_line(flowers):
    Path("file").touch()  # not a read-only folder, where root can write
    with pytest.raises(UserError, match="file/run"):
        train.main([*options_of(flowers, 1), "file/run"])


def test_checkpoint_has_film_and_random_state(flowers, monkeypatch):
    """Check the masks of every epoch, and torch's random state, which a method may draw from."""
    options = options_of(flowers, 4)
    train.main([*options, "whole"])
    checkpoint = torch.load("whole/checkpoint.pt", weights_only=True)
    config, film = checkpoint["config"], checkpoint["film"]
    assert [epoch for epoch, _ in film] == [0, 1, 2, 3, 4]
    plain = train.augment.Plain(train.load_data(config["data"]).train,
                                train.preprocessing_of(config))
    images = torch.stack([plain[i * len(plain) // 8][0] for i in range(8)])
    model = train.build_model(config)
    for _, mask in film:
        assert mask.shape == (8, 4) and mask.dtype == torch.bool and (mask.sum(1) == 1).all()
    assert torch.equal(film[0][1], model.pivotal_patches(images))
    model.load_state_dict(weights("whole"))
    assert torch.equal(film[-1][1], model.pivotal_patches(images))

    drawn, real = [], LoDisc.update_momentum

    def draw(self, m):
        real(self, m)
        drawn.append(torch.rand(1).item())
        if len(drawn) == stop_at:
            raise Killed

    monkeypatch.setattr(LoDisc, "update_momentum", draw)
    stop_at = None
    train.main([*options, "again"])
    without, stop_at = list(drawn), 8
    drawn.clear()
    with pytest.raises(Killed):
        train.main([*options, "part"])
    kept = drawn[:6]  # two whole epochs
    drawn.clear()
    stop_at = None
    train.main(["--resume", "part"])
    assert kept + drawn == without and len(set(without)) == 12


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_never_reaches_a_checkpoint(flowers, monkeypatch, what):
    """Check a loss that is NaN, and a finite loss whose gradient is NaN."""
    done, real = [], LoDisc.forward

    def forward(self, *args):
        output = real(self, *args)
        done.append(output)
        if len(done) != 6:
            return output
        if what == "loss":
            return output._replace(total=output.total * float("nan"))
        return output._replace(total=output.total + (output.total * 0).sqrt())

    monkeypatch.setattr(LoDisc, "forward", forward)
    what = "loss" if what == "loss" else "model"
    with pytest.raises(UserError, match=f"the {what} is not finite after step 6, learning rate "
                       r"\d.*--lr.*the last good epoch is 1"):
        train.main([*options_of(flowers, 9), "bad"])
    checkpoint = torch.load("bad/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3 and len(rows("bad")) == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


# --- checkpoints of the version whose methods were lodisc, global and local -------------------


def test_older_run_with_mask_block_is_evaluated_and_not_resumed(flowers, quick_probe, capsys):
    """Its function has moved: the encoder can still be read."""
    train.main(["--data", str(flowers), *SMALL, "--epochs", "1", "--workers", "0", "--out", "run"])
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    checkpoint["config"]["mask"] = "block"
    torch.save(checkpoint, "run/checkpoint.pt")
    evaluation.main(["all", "run", "--workers", "0"])
    for command in (lambda: train.main(["--resume", "run"]),
                    lambda: evaluation.main(["masks", "run", "--workers", "0"])):
        with pytest.raises(UserError, match="--mask block, which has moved to tests/experiments/"):
            command()


LOSSES = ("total", "global_loss", "local_loss")


def make_older(folder, method):
    """Rewrite a run's files as the older version did: without weights, with both losses."""
    checkpoint = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    config = checkpoint["config"]
    config["method"] = method
    del config["global_weight"], config["local_weight"]
    unused = {"global": "local_loss", "local": "global_loss"}.get(method)
    history = []
    for row in checkpoint["history"]:
        losses = {name: 0.0 if name == unused else row[name] for name in LOSSES}
        first_columns = {"epoch": row["epoch"], "step": row["step"], **losses}
        history.append({**first_columns, **row, **losses})
    train.save_checkpoint(Path(folder), **(checkpoint | {"history": history}))


def columns(folder):
    """Return a run's metrics.csv as {name: values}, without those of time."""
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert all(len(line) == len(header) for line in lines)
    table = dict(zip(header, zip(*lines)))
    del table["seconds"], table["images_per_second"]
    return table


def results(folder):
    return json.loads((Path(folder) / "eval.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method, options, other", [
    ("global", ["--method", "mocov3"], ["--method", "lodisc"]),
    ("local", ["--method", "lodisc", "--global-weight", "0"], ["--global-weight", "1"]),
    ("lodisc", ["--method", "lodisc"], ["--method", "mocov3"])])
def test_run_of_an_older_version_resumes_bit_exactly(flowers, monkeypatch, quick_probe, method,
                                                     options, other):
    """Stop after the first of three epochs, rewrite the checkpoint, evaluate it, and continue."""
    real = train.save_checkpoint

    def save(folder, **contents):
        real(folder, **contents)
        if contents["step"] == 3:
            for copy in ("old", "new"):
                shutil.copytree(folder, copy)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save)
        train.main(["--data", str(flowers), *SMALL, "--epochs", "3", "--workers", "0", *options,
                    "--out", "whole"])
    make_older("old", method)
    assert list(columns("old")) == ["epoch", "step", *LOSSES, "lr", "momentum"]
    for folder in ("old", "new"):
        evaluation.main(["all", folder, "--workers", "0"])
        evaluation.main(["masks", folder, "--workers", "0"])
    assert results("old") == results("new")
    assert Path("old/masks.png").read_bytes() == Path("new/masks.png").read_bytes()
    with pytest.raises(UserError, match=f"other settings for {other[0][2:].replace('-', '_')}"):
        train.main(["--resume", "old", *other])
    train.main(["--resume", "old", *options])
    assert same(weights("old"), weights("whole")) and results("old") == results("whole")
    old, whole = (torch.load(f"{folder}/checkpoint.pt", weights_only=True)
                  for folder in ("old", "whole"))
    assert old["config"] == whole["config"]
    assert all(torch.equal(masks, again) for (_, masks), (_, again) in zip(
        old["film"], whole["film"], strict=True))
    table, expected = columns("old"), columns("whole")
    assert list(table) == list(expected)
    if method == "local":  # not measured in the older version
        assert table["global_loss"] == ("0.0", *expected["global_loss"][1:])
        del table["global_loss"], expected["global_loss"]
    assert table == expected
    assert ("local_loss" in table) == (method != "global")
