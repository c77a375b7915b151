"""Several ranks: the loss, gradients and metrics of one process, and one set of files."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
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
from data import augment
from data.augment import Batches, TwoViews, mix_seed
from lodisc import LoDisc, MoCoV3, UserError, contrastive_loss, create_vit, gather_keys

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
BASELINES = ROOT / "tests" / "baselines"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            ROOT / "train.py"]
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--warmup-epochs", "0",
         "--batch-size", "12", "--device", "cpu"]


VARIANTS = {"mocov3": (MoCoV3, {}), "lodisc": (LoDisc, {}),
            "weighted": (LoDisc, {"global_weight": 0.5, "local_weight": 2.0}),
            "local": (LoDisc, {"global_weight": 0.0})}


def model_and_views(variant):
    """Return a float64 model without BatchNorm, whose statistics are per rank on a CPU; views."""
    torch.manual_seed(0)
    method, options = VARIANTS[variant]
    encoder = create_vit("vit_nano", 32, 8)
    model = method(encoder, hidden_dim=64, output_dim=32, **options).double()
    for head in (model.projector, model.predictor, model.momentum_projector):
        for i, module in enumerate(head):
            if isinstance(module, nn.BatchNorm1d):
                head[i] = nn.Identity()
    return model, torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)


def losses_and_gradients(model, output):
    """Return the losses of an output, total first, and the gradients of the total."""
    output.total.backward()
    losses = [value for name, value in output._asdict().items() if name != "masks"]
    return (torch.stack(losses).detach(),
            [parameter.grad for parameter in model.parameters() if parameter.requires_grad])


def wait_for_rank_0(rank, folder):
    """Let rank 0 work for longer than the group's timeout, or raise; return what each got."""
    def work():
        if rank == 0:
            time.sleep(2)  # the group's timeout is 1 s
        return {"maps": [b"of rank", rank]}

    def fail():
        raise UserError("of rank 0")

    train.SILENCE = 0
    results = [train.by_rank_0(work, rank, 2)]
    try:
        train.by_rank_0(fail, rank, 2)
    except (UserError, SystemExit) as error:
        results.append(f"{type(error).__name__} {error}")
    return results


def run_rank(rank, folder, data, port):
    options = {"rank": rank, "world_size": 2}
    Path(folder, f"imported {rank}").touch()
    while not all(Path(folder, f"imported {i}").exists() for i in (0, 1)):
        time.sleep(0.01)  # imports may take more than a second longer in one, of the next timeout
    dist.init_process_group("gloo", init_method=f"file://{folder}/first", **options,
                            timeout=timedelta(seconds=1))
    waited = wait_for_rank_0(rank, folder)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/second", **options)
    keys, offset = gather_keys(torch.full((2, 3), float(rank)))
    assert offset == 2 * rank and keys[:, 0].tolist() == [0, 0, 1, 1] and not keys.requires_grad
    results = {"waited": waited}
    for variant in VARIANTS:
        model, views = model_and_views(variant)
        view1, view2 = views[:, 4 * rank:4 * rank + 4]
        parallel = DistributedDataParallel(model)  # must live until the backward pass
        results[variant] = losses_and_gradients(model, parallel(view1, view2))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os.environ.update(TORCHELASTIC_RUN_ID="as by torchrun", RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    train.main(["--data", data, *SMALL, "--workers", "0", "--mask", "random", "--lr", "0",
                "--epochs", "2", "--out", f"{folder}/whole"])


def test_two_ranks_match_loss_and_gradients_of_one(tmp_path, flowers):
    """Check losses and gradients of all methods, that rank 0 may take its time before the others
    begin, and the losses that a run of both writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(run_rank, (str(tmp_path), str(flowers / "train"), port), nprocs=2)
    assert files(tmp_path / "whole") == ["checkpoint.pt", "config.json", "metrics.csv", "run.png"]
    check_losses(tmp_path / "whole", train.load_data(str(flowers)).train)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    result = {"maps": [b"of rank", 0]}
    assert [rank.pop("waited") for rank in ranks] == [[result, "UserError of rank 0"],
                                                      [result, "SystemExit 2"]]
    for variant in VARIANTS:
        model, (view1, view2) = model_and_views(variant)
        losses, gradients = losses_and_gradients(model, model(view1, view2))
        (losses_0, gradients_0), (losses_1, gradients_1) = (rank[variant] for rank in ranks)
        assert len(losses) == (2 if variant == "mocov3" else 3)
        assert ((losses_0 + losses_1) / 2 - losses).abs().max() < 1e-10
        assert (losses_0 - losses_1).abs().max() > 1e-6  # each rank has half of the batch
        assert max(gradient.abs().max() for gradient in gradients) > 1e-3
        for gradients_of_rank in (gradients_0, gradients_1):
            for theirs, ours in zip(gradients_of_rank, gradients, strict=True):
                assert (theirs - ours).abs().max() < 1e-10


def test_gather_keys_without_process_group_returns_the_keys():
    keys = torch.randn(4, 3)
    gathered, offset = gather_keys(keys)
    assert gathered is keys and offset == 0


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.slow
def test_torchrun_writes_once_and_matches_evaluation_of_one_process(flowers, capsys):
    options = ["--data", flowers, *SMALL, "--workers", "1", "--mask", "random"]
    done = subprocess.run([*TORCHRUN, *options, "--lr", "0", "--epochs", "2", "--out", "whole"],
                          text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cpu x 2") == 1  # only rank 0 prints
    assert files(".") == ["flowers", "whole"]
    assert files("whole") == ["checkpoint.pt", "config.json", "eval.json", "metrics.csv",
                              "per_image.json", "run.png"]
    # evaluated again in one process: the same metrics
    results = json.loads(Path("whole/eval.json").read_text(encoding="utf-8"))
    evaluation.main(["all", "whole", "--workers", "0"])
    again = json.loads(Path("whole/eval.json").read_text(encoding="utf-8"))
    for kind, names in {"linear": ["top1", "top5"], "knn": ["top1"],
                        "retrieval": ["rank1", "rank5", "mAP"]}.items():
        for name in names:
            assert results[kind][name] == pytest.approx(again[kind][name], abs=1e-6)
    check_losses("whole", train.load_data(str(flowers)).train)


@pytest.mark.slow
def test_torchrun_measures_held_out_retrieval_once(flowers):
    """At learning rate 0, so that each epoch's is that of the final evaluation."""
    done = subprocess.run([*TORCHRUN, "--data", flowers, *SMALL, "--workers", "0", "--held-out",
                           "--lr", "0", "--epochs", "2", "--out", "whole"],
                          text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out: rank-1") == 2
    results = json.loads(Path("whole/eval.json").read_text(encoding="utf-8"))["retrieval"]
    with open("whole/metrics.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert float(row["rank1"]) == pytest.approx(results["rank1"], abs=1e-6)
            assert float(row["mAP"]) == pytest.approx(results["mAP"], abs=1e-6)


def sum_of_contrasts(model, halves, keys, rank):
    """Contrast a rank's queries of each view with both ranks' keys of the other view."""
    loss = 0.0
    for view in (0, 1):
        query = model.query(halves[rank][view])
        loss += contrastive_loss(query, torch.cat(keys[1 - view]), 0.2, 6 * rank).item()
    return loss


@torch.no_grad()
def check_losses(folder, dataset):
    """Check that metrics.csv has the mean over both ranks, recomputed here at learning rate 0."""
    config = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["config"]
    model, per_rank, step = train.build_model(config).train(), [], 0
    views = TwoViews(dataset, train.preprocessing_of(config), 0, config["crop_min"])
    batches = Batches(len(dataset), 12, 0)
    for batches.epoch in range(2):
        for pairs in batches:
            view1, view2 = map(torch.stack, zip(*(views[pair] for pair in pairs)))
            halves = [(view1[:6], view2[:6]), (view1[6:], view2[6:])]  # BatchNorm sees one of them
            global_keys, local_keys = ([], []), ([], [])  # of each view, of both ranks
            for rank, half in enumerate(halves):
                # each rank draws its own masks
                mask_seed = mix_seed(augment.MASK_NOISE, 0, step, rank)
                generator = torch.Generator().manual_seed(mask_seed)
                for view in (0, 1):
                    key, mask = model.key_and_mask(half[view], generator)
                    global_keys[view].append(key)
                    local_keys[view].append(model.local_key(half[view], mask))
            for keys in (global_keys, local_keys):
                per_rank.append([sum_of_contrasts(model, halves, keys, rank) for rank in (0, 1)])
            step += 1
    with open(Path(folder, "metrics.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = torch.tensor(per_rank).unflatten(0, (2, 3, 2))  # (epochs, steps, losses, ranks)
    for i, name in enumerate(("global_loss", "local_loss")):
        logged = [float(row[name]) for row in rows]
        assert logged == pytest.approx(losses[:, :, i].mean((1, 2)).tolist(), rel=1e-4)
        assert logged != pytest.approx(losses[:, :, i, 0].mean(1).tolist(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", [
    [], ["--method", f"{BASELINES}/cvsa.py:CVSA"],
    ["--method", f"{BASELINES}/particle.py:PARTICLE", "--method-option", "clusters=2"],
    ["--method", f"{BASELINES}/released.py:Released"]],
    ids=["lodisc", "CVSA", "PARTICLE", "Released"])
def test_torchrun_resumes_bit_exactly_after_sigkill(method, flowers):
    options = ["--data", flowers / "train", *SMALL, "--workers", "1", "--epochs", "12", *method]
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


@pytest.fixture
def slow_words(tmp_path, monkeypatch):
    """Let rank 0 take 3 s to print an error, in which torchrun would end it if another rank's
    process had failed."""
    (tmp_path / "sitecustomize").mkdir()
    (tmp_path / "sitecustomize" / "sitecustomize.py").write_text("""
import os, sys, time
if os.environ.get("RANK") == "0":
    write = sys.stderr.write
    def slowly(text):
        if text.startswith("train.py:"):
            time.sleep(3)
        return write(text)
    sys.stderr.write = slowly
""", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "sitecustomize"), prepend=os.pathsep)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_words")
def test_divergence_is_reported_once(flowers):
    done = subprocess.run([*TORCHRUN, "--data", flowers, *SMALL, "--workers", "0", "--lr", "1e30",
                           "--out", "run"], text=True, capture_output=True, timeout=200)
    assert done.returncode != 0 and done.stderr.count("is not finite after step") == 1
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    assert not Path("run").exists()


def default_config(num_images, processes=1):
    given, defaults = train.parse_args([])
    return train.fill_defaults({**defaults, **given}, torch.device("cpu"), num_images, processes)


def test_more_ranks_than_images_is_an_error():
    with pytest.raises(UserError, match=r"--batch-size must be in \[16, 5\]"):
        train.check_settings(default_config(5, 8), 8)


def test_batch_size_not_divisible_by_ranks_raises():
    config = default_config(2000)
    with pytest.raises(UserError, match="a multiple of 2, got 5"):
        train.check_settings({**config, "batch_size": 5}, 2)
    with pytest.raises(UserError, match=r"\[8, 2000\]"):
        train.check_settings({**config, "batch_size": 4}, 4)


@pytest.mark.parametrize("processes, images, batch_size", [(1, 2000, 128), (3, 2000, 126),
                                                           (8, 100, 96), (3, 7, 6)])
def test_default_batch_size_is_a_multiple_of_the_ranks(processes, images, batch_size):
    config = default_config(images, processes)
    train.check_settings(config, processes)
    assert config["batch_size"] == batch_size


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [["--batch-size", "5"], ["--epochs", "many"],
                                     ["--resume", "missing"], ["--out", "flowers"]])
@pytest.mark.usefixtures("slow_words")
def test_mistake_is_printed_by_one_rank(flowers, mistake):
    options = ["--data", flowers, *SMALL]
    if mistake[0] == "--resume":
        options = []
    done = subprocess.run([*TORCHRUN, *options, *mistake], text=True, capture_output=True,
                          timeout=200)
    assert done.returncode != 0 and files(".") == ["flowers", "sitecustomize"]
    said = done.stderr.partition("torch/distributed/elastic")[0]  # torchrun's own report
    assert said.count("train.py: ") == 1 and "Traceback" not in said, said
    assert {"--resume": "missing: no such file"}.get(mistake[0], mistake[0]) in said


@pytest.mark.parametrize("options, code", [(["--epochs", "many"], 2), (["--help"], 0)])
def test_other_ranks_leave_the_words_and_the_time_to_rank_0(options, code, monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(train.time, "sleep", slept.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as by torchrun")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        train.main(options)
    assert end.value.code == code and slept == ([train.SILENCE] if code else [])
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_image_that_one_rank_cannot_read_is_named_once(flowers, rank):
    dataset = train.load_data(str(flowers)).train
    of_rank = {index for _, index in next(iter(Batches(36, 12, 0, rank, 2)))}
    index = min(of_rank - set(train.example_indices(dataset.targets)))  # those are of rank 0
    broken = Path(dataset.paths[index])
    broken.write_bytes(broken.read_bytes()[:-200])  # its header is whole
    done = subprocess.run([*TORCHRUN, "--data", flowers, *SMALL, "--workers", "1"], text=True,
                          capture_output=True, timeout=200)
    assert done.returncode != 0 and done.stderr.count(f"{broken} is not a readable image") == 1
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    if rank == 0:  # torchrun may end it before it can clean up after another
        assert not list(Path("runs").iterdir())
