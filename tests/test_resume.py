"""Nothing lost: runs that are killed, stopped, or find their disk full."""

import csv
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import same, weights

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--warmup-epochs", "1",
         "--batch-size", "12", "--device", "cpu"]


def rows(folder):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [[row[name] for name in ("epoch", "step", "total", "lr")]
                for row in csv.DictReader(file)]


def begin(*arguments):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_epochs(process, count):
    """Read what the run prints until so many more epochs are done; False at its end."""
    for line in process.stdout:
        count -= line.startswith("epoch")
        if count == 0:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("workers, kills", [(0, 20), (1, 3), (2, 3)])
def test_a_run_killed_at_any_moment_ends_where_an_uninterrupted_one_ends(flowers, workers, kills):
    rng = random.Random(workers)
    options = ["--data", flowers / "train", *SMALL, "--epochs", 4 * kills + 4,
               "--workers", workers]
    process = begin(*options, "--out", "killed")
    for _ in range(kills):
        assert wait_for_epochs(process, rng.randint(1, 3))
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process = begin("--resume", "killed")
    output, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    train.main([*map(str, options), "--out", "whole"])
    assert same(weights("killed"), weights("whole"))
    assert rows("killed") == rows("whole")
    assert sorted(p.name for p in Path("killed").iterdir()) == \
        ["checkpoint.pt", "config.json", "metrics.csv", "run.png"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step(flowers, number):
    """To the whole group, as a terminal's Ctrl-C: the loading processes must outlive it."""
    options = ["--data", flowers / "train", *SMALL, "--epochs", 300, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, options), "--out", "stopped"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert wait_for_epochs(process, 2)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0 and "Traceback" not in error
    assert "python train.py --resume stopped" in error
    checkpoint = torch.load("stopped/checkpoint.pt", weights_only=True)
    assert 6 <= checkpoint["step"] < 900


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_run_stopped_within_an_epoch_goes_on_from_that_step(flowers, monkeypatch, stop_at):
    options = ["--data", str(flowers / "train"), *SMALL, "--epochs", "2", "--workers", "0",
               "--mask", "random", "--out"]
    train.main([*options, "whole"])
    done, real = [], train.LoDisc.update_momentum

    def step_then_signal(self, m):
        real(self, m)
        done.append(m)
        if len(done) == stop_at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.LoDisc, "update_momentum", step_then_signal)
    with pytest.raises(SystemExit, match="--resume part"):
        train.main([*options, "part"])
    assert len(done) == stop_at
    assert torch.load("part/checkpoint.pt", weights_only=True)["step"] == stop_at
    train.main(["--resume", "part"])
    assert len(done) == 6  # no step twice
    assert same(weights("whole"), weights("part")) and rows("whole") == rows("part")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_stands_in_a_run_is_cut_back_or_refused(flowers):
    options = ["--data", str(flowers / "train"), *SMALL, "--epochs", "2", "--workers", "0", "--out"]
    train.main([*options, "run"])
    whole, table = weights("run"), rows("run")
    with open("run/metrics.csv", "a") as file:
        file.write("3,9,half a li")
    train.main(["--resume", "run"])  # nothing left to do
    assert rows("run") == table
    (Path("run") / "checkpoint.pt").unlink()
    Path("run/metrics.csv").write_bytes(b"\xff\x00 damaged")
    train.main(["--resume", "run"])  # from the beginning
    assert same(whole, weights("run")) and rows("run") == table

    train.main([*options, "wide", "--arch", "vit_tiny"])
    (Path("run") / "checkpoint.pt").write_bytes((Path("wide") / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match="arch"):
        train.main(["--resume", "run"])
    (Path("run") / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.main(["--resume", "run"])


def test_a_full_disk_is_one_line_and_leaves_no_half_file(flowers):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", flowers / "train", *SMALL, "--epochs", "1",
         "--workers", "0", "--out", "full"], capture_output=True, text=True,
        preexec_fn=small_files)
    assert done.returncode == 2 and re.fullmatch(r"train\.py: .*checkpoint\.pt.*\n", done.stderr)
    assert sorted(p.name for p in Path("full").iterdir()) == ["config.json", "metrics.csv"]


def test_a_folder_that_cannot_be_made_is_one_line(flowers):
    Path("file").touch()  # not a read-only folder: root, as in a container, may write anywhere
    done = subprocess.run([sys.executable, ROOT / "train.py", "--data", flowers / "train", *SMALL,
                           "--out", "file/run"], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"train\.py: .*file/run.*\n", done.stderr)


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't "
                                     "allocate memory: you tried"])
def test_out_of_memory_names_batch_and_size(flowers, monkeypatch, message):
    def full(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(train.LoDisc, "query", full)
    with pytest.raises(ValueError, match="--batch-size 12 and --image-size 16"):
        train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "1", "--workers", "0"])


def test_a_checkpoint_holds_what_the_run_has_seen(flowers, monkeypatch):
    """The film of masks from the beginning on, and the random state, for what a fork may draw."""
    options = ["--data", str(flowers / "train"), *SMALL, "--epochs", "9", "--workers", "0", "--out"]
    train.main([*options, "whole"])
    film = torch.load("whole/checkpoint.pt", weights_only=True)["film"]
    assert [step for step, _ in film] == [3 * epoch for epoch in (0, 1, 3, 4, 5, 6, 8, 9)]
    settings = json.loads(Path("whole/config.json").read_text())
    first = train.build_model(settings)
    plain = train.Plain(train.load_data(settings["data"]).train, settings["image_size"],
                        settings["mean"], settings["std"])
    pictures = torch.stack([plain[i * len(plain) // 8][0] for i in range(8)])
    for step, mask in film:
        assert mask.shape == (8, 4) and mask.dtype == torch.bool and (mask.sum(1) == 1).all()
    assert torch.equal(film[0][1], train.pivotal_masks(first, pictures))
    last = weights("whole")
    first.load_state_dict(last)
    assert torch.equal(film[-1][1], train.pivotal_masks(first, pictures))

    drawn, real = [], train.LoDisc.update_momentum

    def draw_and_stop(self, m):
        real(self, m)
        drawn.append(torch.rand(1).item())
        if stop_at == len(drawn):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.LoDisc, "update_momentum", draw_and_stop)
    stop_at = None
    train.main([*options, "again"])
    without, stop_at = list(drawn), 13
    drawn.clear()
    with pytest.raises(SystemExit):
        train.main([*options, "part"])
    train.main(["--resume", "part"])
    assert drawn == without and len(set(drawn)) == 27
    parts = torch.load("part/checkpoint.pt", weights_only=True)["film"]
    assert all(a == b and torch.equal(c, d) for (a, c), (b, d) in zip(parts, film, strict=True))


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(flowers, monkeypatch):
    done, real = [], train.LoDisc.forward

    def forward(self, *views):
        output = real(self, *views)
        done.append(output)
        return output._replace(total=output.total * float("nan")) if len(done) == 5 else output

    monkeypatch.setattr(train.LoDisc, "forward", forward)
    with pytest.raises(ValueError, match="not finite by step 6, learning rate .*--lr.*bad"):
        train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "9", "--workers", "0",
                    "--out", "bad"])
    done.clear()
    monkeypatch.setattr(train, "CHECK_EVERY", 1)
    with pytest.raises(ValueError, match="not finite by step 5,"):  # within an epoch too
        train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "9", "--workers", "0",
                    "--out", "early"])
    checkpoint = torch.load("bad/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
