"""Several ranks: the loss, gradients and metrics of one process, and one set of files."""

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

import eval as evaluation
import train
from conftest import same, weights
from data.augment import Batches, TwoViews
from lodisc import LoDisc, UserError, contrastive_loss, create_vit, gather

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
BASELINES = ROOT / "tests" / "baselines.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            ROOT / "train.py"]
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--warmup-epochs", "0",
         "--batch-size", "12", "--device", "cpu"]


def model_and_views(method):
    """Return a float64 model without BatchNorm, whose statistics are per rank on a CPU; views."""
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
def test_two_ranks_match_loss_and_gradients_of_one(tmp_path, method):
    spawn(run_rank, (method, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model, (view1, view2) = model_and_views(method)
    output = model(view1, view2)
    output.total.backward()
    mean = (ranks[0]["losses"] + ranks[1]["losses"]) / 2
    assert (mean - torch.stack(output[:3])).abs().max() < 1e-10
    assert (ranks[0]["losses"] - mean).abs().max() > 1e-6  # each rank has half of the batch
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3
    for rank in ranks:
        for theirs, ours in zip(rank["gradients"], gradients, strict=True):
            assert (theirs - ours).abs().max() < 1e-10


def test_gather_without_process_group_returns_the_keys():
    keys = torch.randn(4, 3)
    assert gather(keys)[0] is keys and gather(keys)[1] == 0


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_torchrun_writes_once_and_matches_evaluation_of_one_process(flowers, capsys):
    options = ["--data", flowers, *SMALL, "--workers", "1"]
    done = subprocess.run([*TORCHRUN, *options, "--lr", "0", "--epochs", "2", "--out", "whole"],
                          text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cpu x 2") == 1  # only rank 0 prints
    assert files(".") == ["flowers", "whole"]
    assert files("whole") == ["checkpoint.pt", "config.json", "eval.json", "metrics.csv",
                              "per_image.json", "run.png"]
    # evaluated again in one process: the same metrics
    results = json.loads(Path("whole/eval.json").read_text())
    evaluation.main(["all", "whole", "--workers", "0"])
    again = json.loads(Path("whole/eval.json").read_text())
    for kind, names in {"linear": ["top1", "top5"], "knn": ["top1"],
                        "retrieval": ["rank1", "rank5", "mAP"]}.items():
        for name in names:
            assert results[kind][name] == pytest.approx(again[kind][name], abs=1e-6)
    check_losses("whole", train.load_data(str(flowers)).train)


@torch.no_grad()
def check_losses(folder, dataset):
    """Check that metrics.csv has the mean over both ranks, recomputed here at learning rate 0."""
    settings = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["config"]
    model, per_rank = train.build_model(settings).train(), []
    views = TwoViews(dataset, 16, settings["mean"], settings["std"], 0, settings["crop_min"])
    batches = Batches(len(dataset), 12, 0)
    for pairs in [pairs for batches.epoch in range(2) for pairs in batches]:
        view1, view2 = map(torch.stack, zip(*(views[pair] for pair in pairs)))
        halves = [(view1[:6], view2[:6]), (view1[6:], view2[6:])]  # BatchNorm sees one of them
        keys = [[model.global_key(half[view])[0] for half in halves] for view in (0, 1)]
        per_rank.append([sum(contrastive_loss(model.query(half[view]),
                                              torch.cat(keys[1 - view]), 0.2, 6 * rank)
                             for view in (0, 1)).item()
                         for rank, half in enumerate(halves)])
    with open(Path(folder, "metrics.csv")) as file:
        found = [float(row["global_loss"]) for row in csv.DictReader(file)]
    losses = torch.tensor(per_rank).unflatten(0, (2, 3))  # (epochs, steps, ranks)
    assert found == pytest.approx(losses.mean((1, 2)).tolist(), rel=1e-4)
    assert found != pytest.approx(losses[..., 0].mean(1).tolist(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", [[], [f"{BASELINES}:CVSA"],
                                    [f"{BASELINES}:PARTICLE", "--method-option", "parts=2"]],
                         ids=["lodisc", "CVSA", "PARTICLE"])
def test_torchrun_resumes_bit_exactly_after_sigkill(method, flowers):
    options = ["--data", flowers / "train", *SMALL, "--workers", "1", "--epochs", "12",
               *["--method"] * bool(method), *method]
    process = subprocess.Popen([*TORCHRUN, *options, "--out", "killed"], text=True,
                               start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 3 <= torch.load("killed/checkpoint.pt", weights_only=True)["step"] < 36
    for more in (["--resume", "killed"], [*options, "--out", "whole"]):
        subprocess.run([*TORCHRUN, *more], check=True, capture_output=True, timeout=200)
    assert same(weights("killed"), weights("whole"))
    # one process gets other weights, as its BatchNorm sees whole batches
    train.main([*map(str, options), "--out", "one"])
    assert not same(weights("one"), weights("whole"))


def test_batch_size_not_divisible_by_ranks_raises():
    given, defaults = train.parse_args([])
    config = {**defaults, **given}
    train.fill_defaults(config, torch.device("cpu"), 2000)
    with pytest.raises(UserError, match="a multiple of 2, got 5"):
        train.check_settings({**config, "batch_size": 5}, 2)
    with pytest.raises(UserError, match=r"\[8, 2000\]"):
        train.check_settings({**config, "batch_size": 4}, 4)
