"""Several processes: the same loss, gradients and pictures as one, and one set of files."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import eval as judge
import train
from conftest import same, weights
from data.augment import Batches, TwoViews
from data.run import Stop
from lodisc import LoDisc, contrastive_loss, create_vit, gather

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            ROOT / "train.py"]
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--warmup-epochs", "0",
         "--batch-size", "12", "--device", "cpu"]


def model_and_views(method):
    """In float64, heads without BatchNorm, whose statistics are each process's own on a CPU."""
    torch.manual_seed(0)
    model = LoDisc(create_vit("vit_nano", 32, 8), method, hidden_dim=64, output_dim=32).double()
    for head in (model.projector, model.predictor, model.momentum_projector):
        for i, module in enumerate(head):
            if isinstance(module, nn.BatchNorm1d):
                head[i] = nn.Identity()
    return model, torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)


def run_rank(rank, method, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, views = model_and_views(method)
    keys, offset = gather(torch.full((2, 3), float(rank)))
    assert offset == 2 * rank and keys[:, 0].tolist() == [0, 0, 1, 1] and not keys.requires_grad
    view1, view2 = views[:, 4 * rank:4 * rank + 4]
    parallel = DistributedDataParallel(model)
    output = parallel(view1, view2)
    output.total.backward()
    torch.save({"losses": torch.stack(output[:3]).detach(),
                "gradients": [p.grad for p in model.parameters() if p.requires_grad]},
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["lodisc", "global", "local"])
def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path, method):
    spawn(run_rank, (method, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model, (view1, view2) = model_and_views(method)
    output = model(view1, view2)
    output.total.backward()
    mean = (ranks[0]["losses"] + ranks[1]["losses"]) / 2
    assert (mean - torch.stack(output[:3])).abs().max() < 1e-10
    assert (ranks[0]["losses"] - mean).abs().max() > 1e-6  # each has its own share
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3
    for rank in ranks:
        for theirs, ours in zip(rank["gradients"], gradients, strict=True):
            assert (theirs - ours).abs().max() < 1e-10


def test_without_a_process_group_gather_does_nothing():
    keys = torch.randn(4, 3)
    assert gather(keys)[0] is keys and gather(keys)[1] == 0


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_torchrun_trains_writes_once_and_judges_alike(flowers, capsys):
    options = ["--data", flowers, *SMALL, "--workers", "1"]
    done = subprocess.run([*TORCHRUN, *options, "--lr", "0", "--epochs", "2", "--out", "whole"],
                          text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in 2 processes") == 1  # only rank 0 prints
    assert done.stdout.count("BatchNorm") == 1 and files(".") == ["flowers", "whole"]
    assert files("whole") == ["checkpoint.pt", "config.json", "eval.json", "metrics.csv",
                              "run.png"]
    # judged again in one process: the very same figures
    figures = json.loads(Path("whole/eval.json").read_text())
    judge.main(["all", "whole", "--workers", "0"])
    again = json.loads(Path("whole/eval.json").read_text())
    for kind, names in {"linear": ["top1", "top5"], "knn": ["top1"],
                        "retrieval": ["rank1", "rank5", "mAP"]}.items():
        for name in names:
            assert figures[kind][name] == pytest.approx(again[kind][name], abs=1e-6)
    check_losses("whole", train.load_data(str(flowers)).train)


@torch.no_grad()
def check_losses(folder, dataset):
    """metrics.csv holds the mean over both processes; at a learning rate of 0 it can be had here."""
    settings = json.loads(Path(folder, "config.json").read_text())
    model, per_process = train.build_model(settings).train(), []
    views = TwoViews(dataset, 16, settings["mean"], settings["std"], 0, settings["crop_min"])
    for pairs in Batches(len(dataset), 12, 0, last=6):
        view1, view2 = map(torch.stack, zip(*(views[pair] for pair in pairs)))
        shares = [(view1[:6], view2[:6]), (view1[6:], view2[6:])]  # BatchNorm sees one of them
        keys = [[model.global_key(share[view])[0] for share in shares] for view in (0, 1)]
        per_process.append([sum(contrastive_loss(model.query(share[view]), torch.cat(keys[1 - view]),
                                                 0.2, 6 * rank) for view in (0, 1)).item()
                            for rank, share in enumerate(shares)])
    with open(Path(folder, "metrics.csv")) as file:
        found = [float(row["global_loss"]) for row in csv.DictReader(file)]
    losses = torch.tensor(per_process).unflatten(0, (2, 3))  # (epochs, steps, processes)
    assert found == pytest.approx(losses.mean((1, 2)).tolist(), rel=1e-4)
    assert found != pytest.approx(losses[..., 0].mean(1).tolist(), rel=1e-3)


@pytest.mark.slow
def test_torchrun_stops_and_goes_on_to_the_weights_of_a_run_never_stopped(flowers):
    options = ["--data", flowers / "train", *SMALL, "--workers", "1", "--epochs", "30"]
    process = subprocess.Popen([*TORCHRUN, *options, "--out", "stopped"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0
    assert error.count("torchrun --nproc_per_node=2 train.py --resume stopped") == 1, error
    assert files("stopped") == ["checkpoint.pt", "config.json", "metrics.csv"]
    step = torch.load("stopped/checkpoint.pt", weights_only=True)["step"]
    assert 6 <= step < 90
    for more in (["--resume", "stopped"], [*options, "--out", "whole"]):
        subprocess.run([*TORCHRUN, *more], check=True, capture_output=True, timeout=200)
    assert same(weights("stopped"), weights("whole"))
    # one process has other weights: BatchNorm sees whole batches there
    train.main([*map(str, options), "--out", "one"])
    assert not same(weights("one"), weights("whole"))


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda asked: signal.raise_signal(signal.SIGTERM))
    with Stop() as stop:
        assert not stop.agree()  # all processes must hear the same answer
        monkeypatch.setattr(dist, "all_reduce", lambda asked: None)
        assert stop.agree()


def test_an_odd_share_is_refused():
    settings = {**train.parse_args([])[1], "batch_size": 5, "data": "synthetic"}
    with pytest.raises(ValueError, match="must divide among 2 processes"):
        train.settle(dict(settings), torch.device("cpu"), 2000, 2)
    with pytest.raises(ValueError, match="two images or more"):
        train.settle({**settings, "batch_size": 4}, torch.device("cpu"), 2000, 4)
