"""train.py and eval.py as a user runs them, on a small ImageFolder."""

import copy
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from conftest import Killed, kill_after, same, weights
from lodisc import (IMAGENET_MEAN, IMAGENET_STD, LoDisc, LoDiscOutput, UserError,
                    VisionTransformer, create_vit, load_encoder)

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--epochs", "2",
         "--warmup-epochs", "1", "--batch-size", "12", "--workers", "0", "--device", "cpu"]


def test_run_writes_checkpoint_metrics_and_results(flowers, capsys, quick_probe):
    train.main(["--data", str(flowers), *SMALL])
    folder = Path("runs/flowers-lodisc-1")
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("raw pixels", "untrained", "trained", "mAP"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config == torch.load(folder / "checkpoint.pt", weights_only=True)["config"]
    assert config["data"] == str(flowers) and config["epochs"] == 2 and config["seed"] == 0
    assert [config[name] for name in ("dim", "depth", "heads")] == [96, 4, 3]
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "step", "total", "global_loss", "local_loss", "lr",
                             "momentum", "images_per_second", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[1]["step"] == "6"
    for row in rows:
        assert float(row["total"]) == pytest.approx(float(row["global_loss"])
                                                    + float(row["local_loss"]), abs=1e-4)
    results = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    assert 0 <= results["linear"]["top1"] <= 1
    assert results["untrained"]["retrieval"]["queries"] == 12
    per_image = json.loads((folder / "per_image.json").read_text(encoding="utf-8"))
    for part in (per_image, per_image["pixels"], per_image["untrained"]):
        assert len(part["retrieval"]["per_image"]["average_precision"]) == 12
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt", "config.json", "eval.json", "metrics.csv", "per_image.json", "run.png"]

    encoder = load_encoder(folder)
    assert encoder.image_size == 16 and len(encoder.mean) == len(encoder.std) == 3
    assert not encoder.training
    online = weights(folder)
    momentum = load_encoder(folder / "checkpoint.pt", use_momentum=True)
    assert torch.equal(encoder.norm.weight, online["encoder.norm.weight"])
    assert torch.equal(momentum.norm.weight, online["momentum_encoder.norm.weight"])
    assert not torch.equal(encoder.norm.weight, momentum.norm.weight)

    train.main(["--data", str(flowers), *SMALL])  # the second run has its own folder
    assert same(online, weights("runs/flowers-lodisc-2"))

    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    (folder / "eval.json").unlink()
    evaluation.main(["all", str(folder), "--workers", "0"])
    again = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    assert again == {name: results[name] for name in ("linear", "knn", "retrieval")}
    shutil.copytree(flowers, "other")
    for what, options in (("linear", ["--momentum"]), ("knn", ["--momentum"]),
                          ("knn", ["--features", "mean"]), ("knn", ["--data", str(flowers)]),
                          ("knn", ["--data", "other"])):
        evaluation.main([what, str(folder), *options, "--workers", "0"])
    after = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    assert after.pop("momentum").keys() == {"linear", "knn"}
    assert after.pop("mean").keys() == {"knn"}
    assert after == {**again, str(Path("other").resolve()): {"knn": again["knn"]}}  # under its key
    with pytest.raises(UserError, match="--device quantum: "):
        evaluation.main(["masks", str(folder), "--device", "quantum"])
    with pytest.raises(UserError, match="--image-size is for published weights"):
        evaluation.main(["all", str(folder), "--image-size", "32"])
    evaluation.main(["masks", str(folder)])
    assert (folder / "masks.png").stat().st_size > 1000
    image = next((flowers / "test").rglob("*.jpg"))
    evaluation.main(["masks", str(folder), str(image), "--out", "one.png"])
    assert Path("one.png").is_file()
    with pytest.raises(UserError, match="one.png already exists"):
        evaluation.main(["masks", str(folder), str(image), "--out", "one.png"])
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == before


def test_learning_rate_rises_then_falls():
    assert train.learning_rate(0, 10, 50, 1.0) == 0 and train.learning_rate(5, 10, 50, 1.0) == 0.5
    assert train.learning_rate(10, 10, 50, 1.0) == 1 and train.learning_rate(0, 0, 50, 1.0) == 1
    assert train.learning_rate(30, 10, 50, 1.0) == pytest.approx(0.5)
    assert train.learning_rate(50, 10, 50, 1.0) == pytest.approx(0)


def test_every_trained_parameter_is_in_one_group():
    model = LoDisc(create_vit("vit_nano", 16, 8), hidden_dim=16, output_dim=8)
    optimizer = train.build_optimizer(model, {"lr": 1.0, "batch_size": 128, "encoder_lr": 0.25,
                                              "weight_decay": 0.1})
    heads, encoder = [set(map(id, group["params"])) for group in optimizer.param_groups]
    assert [group["peak"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert encoder == {id(p) for p in model.encoder.parameters() if p.requires_grad}
    assert heads == {id(p) for m in (model.projector, model.predictor) for p in m.parameters()}


def test_incomplete_last_batch_is_dropped(flowers):
    extra = flowers / "train" / "class 0" / "extra.jpg"
    extra.write_bytes((flowers / "train" / "class 0" / "0.jpg").read_bytes())
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])  # 37 = 3 * 12 + 1
    with open("run/metrics.csv", newline="", encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "6"]


@pytest.mark.parametrize("options", [  # others: test_loop.py
    ["--global-weight", "0"], ["--local-input", "crop"], ["--importance", "last"],
    ["--amp", "bf16"]])
def test_every_variant_trains(flowers, options):
    train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "1", "--out", "run"])
    train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "1", *options, "--out",
                "new"])
    with open("new/metrics.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert math.isfinite(float(row["total"])) and float(row["total"]) > 0
    if options[0] == "--global-weight":
        assert float(row["total"]) == float(row["local_loss"]) and float(row["global_loss"]) > 0
    assert not same(weights("run"), weights("new"))


@pytest.mark.parametrize("mask", ["location", pytest.param("random", marks=pytest.mark.slow)])
def test_weights_depend_on_the_seed_but_not_on_workers(flowers, mask):
    for name, options in (("0", []), ("1", ["--workers", "1"]), ("2", ["--workers", "2"]),
                          ("other", ["--seed", "1"])):
        train.main(["--data", str(flowers / "train"), *SMALL, "--mask", mask, *options, "--out",
                    name])
    assert same(weights("0"), weights("1")) and same(weights("0"), weights("2"))
    assert not same(weights("0"), weights("other"))


@pytest.mark.parametrize("options, weights_of_losses", [
    ([], 2), (["--method", "mocov3"], 1), (["--global-weight", "0.5", "--local-weight", "2"], 2.5)])
def test_chance_level_of_the_total_is_printed(flowers, capsys, options, weights_of_losses):
    run = train.Run(["--data", str(flowers), *SMALL, *options, "--out", "run"])
    run.prepare()
    assert "total" in run.announce()
    level = 4 * 0.2 * math.log(12)
    assert (f"chance level: total {weights_of_losses * level:.3f}, global_loss {level:.3f}"
            in capsys.readouterr().out)


def test_no_chance_level_of_the_total_of_ones_own_method(flowers):
    Path("own.py").write_text("from lodisc import LoDisc\n\n\nclass Own(LoDisc):\n    pass\n")
    run = train.Run(["--data", str(flowers), *SMALL, "--method", "own.py:Own", "--out", "run"])
    run.prepare()
    assert list(run.announce()) == ["global_loss", "local_loss"]


def chosen(*arguments, device="cpu", num_images=1088):
    """Return the settings of a run that begins with these arguments; nothing is trained."""
    run = train.Run([*arguments])
    run.device = torch.device(device)
    run.choose_settings(num_images)
    train.check_settings(run.config, 1)
    return run.config


@pytest.mark.parametrize("options, device, expected", [
    ([], "cpu", dict(arch="vit_nano", image_size=48, patch_size=8, epochs=10, warmup_epochs=1,
                     batch_size=128, lr=4e-3, encoder_lr=2e-3, momentum=0.9, crop_min=0.08,
                     hidden_dim=512, output_dim=128)),
    (["--data", "DIR"], "cpu", dict(arch="vit_nano", image_size=48, epochs=46, warmup_epochs=2,
                                    batch_size=64, lr=4e-3, encoder_lr=1e-3, momentum=0.9,
                                    hidden_dim=512, output_dim=128)),
    (["--data", "DIR"], "cuda", dict(arch="vit_small", image_size=224, patch_size=16, epochs=100,
                                     warmup_epochs=10, batch_size=256, lr=1e-3, encoder_lr=1e-3,
                                     momentum=0.99, crop_min=0.08, hidden_dim=4096,
                                     output_dim=256)),
])
def test_recipes_from_scratch(options, device, expected, capsys):
    config = chosen(*options, device=device)
    assert {name: config[name] for name in expected} == expected
    printed = capsys.readouterr().out
    if options:
        place = "CPU" if device == "cpu" else "GPU"
        assert printed.startswith(f"chosen (scratch, {place}): ")
        assert all(f"{name} {value}" in printed for name, value in expected.items())
    else:
        assert printed == ""


def test_width_of_the_heads_follows_the_encoder_unless_given(capsys):
    for arch, widths in (("vit_nano", (512, 128)), ("vit_tiny", (4096, 256))):
        config = chosen("--data", "DIR", "--arch", arch)
        assert (config["hidden_dim"], config["output_dim"]) == widths
    capsys.readouterr()
    config = chosen("--data", "DIR", "--hidden-dim", "40", "--output-dim", "24")
    assert (config["hidden_dim"], config["output_dim"]) == (40, 24)
    printed = capsys.readouterr().out  # what was given was not chosen
    assert "arch vit_nano" in printed and "hidden_dim" not in printed


@pytest.mark.parametrize("options", [["--data", "DIR", "--method-option", "a=1"],
                                     ["--data", "DIR", "--init", "FILE", "--epochs", "2"], []])
def test_filling_in_the_defaults_changes_and_prints_nothing(options, monkeypatch, capsys):
    given, defaults = train.parse_args(options)
    encoder = VisionTransformer(32, 8, 48, 1, 3)
    encoder.config = {}
    settings = {**defaults, **given}
    init = encoder if "init" in given else None
    before, recipes = copy.deepcopy(settings), copy.deepcopy(train.RECIPES)
    sizes = copy.deepcopy(train.ARCHITECTURES)
    for name in ("train.load_encoder", "train.read_weights", "builtins.open"):
        monkeypatch.setattr(name, None)  # nothing is read
    first = train.fill_defaults(settings, torch.device("cpu"), 1088, 1, init)
    again = train.fill_defaults(settings, torch.device("cpu"), 1088, 1, init)
    assert settings == before and first == again and first is not settings
    assert train.RECIPES == recipes and train.ARCHITECTURES == sizes
    assert capsys.readouterr() == ("", "")
    assert None not in first.values() and "method_option" not in first
    assert all(first[name] == value for name, value in given.items() if name != "method_option")
    first["mean"][0] = first["method_options"]["b"] = 9.0  # no part of it is shared
    assert train.fill_defaults(settings, torch.device("cpu"), 1088, 1, init) == again


@pytest.mark.parametrize("patch_size, image_size, on_gpu",
                         [(8, 96, 224), (14, 98, 224), (16, 96, 224)])
def test_recipes_with_init(patch_size, image_size, on_gpu, monkeypatch, capsys):
    encoder = VisionTransformer(8 * patch_size, patch_size, 384, 12, 6)
    encoder.source, encoder.config = "FILE: a format", {}
    encoder.mean, encoder.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    monkeypatch.setattr(train, "load_encoder", lambda *_: encoder)
    for data in ("DIR", "synthetic"):
        config = chosen("--data", data, "--init", "FILE")
        expected = dict(arch="vit_small", patch_size=patch_size, image_size=image_size, epochs=6,
                        warmup_epochs=1, batch_size=64, lr=4e-3, encoder_lr=2e-5, momentum=0.9,
                        crop_min=0.08, hidden_dim=4096, output_dim=256)
        assert {name: config[name] for name in expected} == expected
        assert config["lr"] * config["batch_size"] / 256 == 1e-3  # the heads' peak
        assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])  # the file's
    assert "FILE: a format" in capsys.readouterr().out
    assert chosen("--data", "DIR", "--init", "FILE", num_images=5000)["epochs"] == 3
    assert chosen("--data", "DIR", "--init", "FILE", num_images=5000)["warmup_epochs"] == 0.5
    assert chosen("--data", "DIR", "--init", "FILE", num_images=40)["batch_size"] == 40
    assert chosen("--init", "FILE", "--encoder-lr", "1e-4")["encoder_lr"] == 1e-4
    assert config | {"image_size": on_gpu} == chosen(
        "--data", "synthetic", "--init", "FILE", device="cuda")


def test_default_peak_rate_does_not_grow_with_batch_size():
    for batch_size, peak in ((1024, 1e-3), (256, 1e-3), (64, 2.5e-4)):
        config = chosen("--data", "DIR", "--batch-size", str(batch_size), device="cuda")
        assert config["lr"] * batch_size / 256 == pytest.approx(peak) == config["encoder_lr"]
    config = chosen("--data", "DIR", "--batch-size", "1024", "--lr", "1e-3", device="cuda")
    assert config["encoder_lr"] == pytest.approx(4e-3)  # as requested


def test_step_skipped_by_the_scaler_is_not_counted(flowers, monkeypatch, capsys):
    """Use float16 with an infinite gradient in the second of six steps."""
    done, real = [], LoDisc.forward

    def forward(self, *args):
        output = real(self, *args)
        done.append(output.total.item())
        if len(done) == 2:
            output = output._replace(total=output.total * 1e38 * 10)
        return output

    monkeypatch.setattr(LoDisc, "forward", forward)
    train.main(["--data", str(flowers / "train"), *SMALL, "--amp", "fp16", "--out", "run"])
    assert capsys.readouterr().out.count("scaler skipped 1 of 3 steps") == 1
    with open("run/metrics.csv", newline="", encoding="utf-8") as file:
        rows = [float(row["total"]) for row in csv.DictReader(file)]
    assert rows[0] == pytest.approx((done[0] + done[2]) / 2, rel=1e-5)
    assert rows[1] == pytest.approx(sum(done[3:]) / 3, rel=1e-5)
    step = torch.load("run/checkpoint.pt", weights_only=True)["optimizer"]["state"][0]["step"]
    assert step == 5


def test_run_whose_every_step_is_skipped_is_an_error(flowers, monkeypatch):
    """Use float16 with infinite gradients throughout, and in the second epoch alone."""
    done, real = [], LoDisc.forward

    def forward(self, *args):
        output = real(self, *args)
        done.append(output)
        overflows = len(done) > first
        return output._replace(total=output.total * 1e38 * 10) if overflows else output

    monkeypatch.setattr(LoDisc, "forward", forward)
    options = ["--data", str(flowers), *SMALL, "--amp", "fp16", "--out", "run"]
    for first, epoch in ((0, 1), (3, 2)):
        done.clear()
        with pytest.raises(UserError, match=f"overflowed in every step of epoch {epoch}, .*--amp "
                           "bf16 or off"):
            train.main(options)
        assert len(done) == 3 * epoch and Path("run").exists() == (epoch == 2)
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3


def test_progress_has_the_remaining_time(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    log, output = train.Log(0, 6, 17, 64), train_output(2.0)
    for _ in range(6):
        now[0] += 10
        log.add(output, False, 1e-3, 0.99)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "step 4" in lines[0]  # after more than half a minute
    assert "total 2  global_loss 1  local_loss 1  lr 0.001  momentum 0.99" in lines[0]
    assert lines[0].endswith(f"{(6 * 17 - 4) * 10 / 60:.1f} min left")


def train_output(total):
    half = torch.tensor(total / 2)
    return LoDiscOutput(torch.tensor(total), half, half, None)


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert train.pick_precision("off", cuda, 768) is None
    assert train.pick_precision("bf16", cpu, 96) == torch.bfloat16
    assert train.pick_precision("fp16", cuda, 96) == torch.float16
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or supported)
        assert train.pick_precision("auto", cuda, 96) == dtype
    for has, dtype in (({"amx_bf16": True}, torch.bfloat16),
                       ({"avx512_bf16": True}, torch.bfloat16),
                       ({"avx512_bf16": False, "avx2": True}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        assert train.pick_precision("auto", cpu, 768) == dtype
        assert train.pick_precision("auto", cpu, 96) is None  # slower for vit_nano
        assert train.pick_precision("auto", torch.device("mps"), 768) is None


def test_short_runs_are_not_all_warm_up():
    for epochs, warmup in ((1, 0.17), (3, 0.5), (6, 1), (10, 1), (100, 1)):
        assert chosen("--epochs", str(epochs))["warmup_epochs"] == warmup
    for epochs, warmup in ((1, 0.17), (6, 1), (46, 2)):
        config = chosen("--data", "DIR", "--epochs", str(epochs))
        assert config["warmup_epochs"] == warmup
    assert chosen("--data", "DIR", "--epochs", "6", device="cuda")["warmup_epochs"] == 1
    assert chosen("--epochs", "1", "--warmup-epochs", "1")["warmup_epochs"] == 1  # as requested


@pytest.mark.parametrize("export", [pytest.param(False, marks=pytest.mark.slow), True])
def test_init_of_a_run_keeps_its_image_size(flowers, export, capsys):
    options = ["--data", str(flowers / "train"), *SMALL[:2], "--patch-size", "8", *SMALL[6:]]
    train.main([*options, "--image-size", "24", "--out", "run"])
    if export:
        evaluation.main(["export", "run", "--out", "encoder.pth"])
    source = "encoder.pth" if export else "run"
    train.main([*options, "--init", source, "--out", "longer"])
    assert "image_size 24" in capsys.readouterr().out
    first, second = load_encoder("run"), load_encoder("longer")
    assert (second.image_size, second.num_patches) == (24, 9)
    config = torch.load("longer/checkpoint.pt", weights_only=True)["config"]
    start = train.build_model(config).encoder.state_dict()
    assert same(start, first.state_dict())
    train.main([*options, "--init", source, "--image-size", "16", "--out", "smaller"])
    assert load_encoder("smaller").image_size == 16  # as requested


@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_both_encoders_are_compiled_on_request(flowers, monkeypatch, options):
    """Record what is compiled, and that every pass of the three steps calls the compiled one."""
    compiled, calls, models = [], [], []

    def record(encode):
        compiled.append(encode)

        def call(*args, **options):
            calls.append(encode.__self__)
            return encode(*args, **options)

        return call

    def build(*args, **options):
        models.append(evaluation.build_model(*args, **options))
        return models[-1]

    monkeypatch.setattr(torch, "compile", record)
    monkeypatch.setattr(train, "build_model", build)
    train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "1", *options, "--out", "a"])
    if not options:
        assert not compiled and not calls
        return
    model, = models
    encoders = [model.encoder, model.momentum_encoder]
    assert [encode.__self__ for encode in compiled] == encoders
    assert all(encode.__func__ is VisionTransformer.encode for encode in compiled)
    film = 2  # before and after the epoch
    assert [calls.count(encoder) for encoder in encoders] == [3 * 2, 3 * 4 + film]


@pytest.mark.slow
@pytest.mark.parametrize("local_input", ["pixels", "tokens"])
def test_compiled_passes_match_eager(local_input):
    def step(compiled):
        torch.manual_seed(0)
        encoder = VisionTransformer(32, 8, dim=48, depth=2, heads=3)
        model = LoDisc(encoder, local_input=local_input, hidden_dim=64, output_dim=32)
        if compiled:
            for side in (model.encoder, model.momentum_encoder):
                side.encode = torch.compile(side.encode)
        views = torch.randn(2, 8, 3, 32, 32)
        output = model(*views)
        output.total.backward()
        return [*output[:3], *output.masks,
                *(p.grad for p in model.parameters() if p.requires_grad)]

    for plain, compiled in zip(step(False), step(True), strict=True):
        error = (plain.float() - compiled.float()).abs().max()
        assert error < 1e-5 * plain.float().abs().max().clamp_min(1)  # LayerNorm is steep near 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_download_and_data_root_arrive(flowers, monkeypatch):
    seen, real = [], train.load_data

    def load(*args):
        seen.append(args)
        return real(str(flowers))

    monkeypatch.setattr(train, "load_data", load)
    for options in ([], ["--download", "--data-root", "there", "--held-out"]):
        train.main(["--data", "cub", *SMALL, "--epochs", "1", *options])
    there = str(Path("there").resolve())
    assert seen == [("cub", str(Path("datasets").resolve()), False, False),
                    ("cub", there, True, True)]


def test_largest_seed_trains(flowers):
    train.main(["--data", str(flowers / "train"), *SMALL, "--epochs", "1", "--mask", "random",
                "--seed", "4294967295", "--out", "run"])
    assert Path("run/checkpoint.pt").exists()


def test_existing_folder_is_not_overwritten(flowers):
    Path("mine").mkdir()
    (Path("mine") / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="exists"):
        train.main(["--data", str(flowers), *SMALL, "--out", "mine"])
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("options, says", [
    (["--data", "missing"], "no such folder"),
    (["--batch-size", "50"], "--batch-size must be in [2, 36]"),
    (["--batch-size", "1"], "--batch-size"),
    (["--image-size", "20"], "a multiple of 8, got 20"),
    (["--keep-ratio", "0"], "--keep-ratio"),
    (["--temperature", "0"], "--temperature"),
    (["--global-weight", "0", "--local-weight", "0"], "both 0: nothing would be trained"),
    (["--global-weight", "-1"], "--global-weight must be in [0, inf], got -1"),
    (["--local-weight", "-1"], "--local-weight must be in [0, inf], got -1"),
    (["--hidden-dim", "0"], "--hidden-dim must be in [1, inf], got 0"),
    (["--output-dim", "0"], "--output-dim must be in [1, inf], got 0"),
    (["--lr", "-1"], "--lr"),
    (["--method", "moco"], "expected lodisc, mocov3, or FILE.py:CLASS"),
    (["--method-option", "a=1"], "--method-option"),
    (["--epochs", "0"], "--epochs"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "4294967296"], "--seed must be in [0, 4294967295]"),
    (["--warmup-epochs", "-5"], "--warmup-epochs"),
    (["--momentum", "3"], "--momentum"),
    (["--device", "quantum"], "quantum"),
    (["--resume", "missing"], "missing"),
])
def test_invalid_settings_raise_one_line(flowers, options, says):
    with pytest.raises(UserError) as error:
        train.main(["--data", str(flowers / "train"), *SMALL, *options])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize("option", [
    ["--mask", "random"], ["--importance", "product"], ["--local-input", "tokens"],
    ["--keep-ratio", "0.3"], ["--global-weight", "1"], ["--local-weight", "0.5"]])
def test_option_that_the_method_lacks_raises_one_line(flowers, option):
    """Also if the value is the default: what is given must have an effect."""
    with pytest.raises(UserError) as error:
        train.main(["--data", str(flowers / "train"), *SMALL, "--method", "mocov3", *option])
    assert str(error.value) == (f"{option[0]} is no option of --method mocov3, which has "
                                "--temperature, --hidden-dim, --output-dim")
    assert not Path("runs").exists()


@pytest.mark.parametrize("option, says", [
    (["--importance", "product"], "--importance is not used by --mask random; leave it out"),
    (["--importance", "last"], "--importance is not used by --mask random; leave it out"),
    (["--local-input", "crop"],
     "--local-input crop chooses a box itself: leave out --mask random")])
def test_option_that_a_mask_would_not_use_raises_one_line(flowers, option, says):
    with pytest.raises(UserError) as error:
        train.main(["--data", str(flowers / "train"), *SMALL, "--mask", "random", *option])
    assert str(error.value) == says
    assert not Path("runs").exists()


def test_image_files_are_for_masks_only(flowers):
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])
    with pytest.raises(UserError, match="image files are only for masks"):
        evaluation.main(["linear", "run", "a.jpg"])


def test_scripts_from_the_shell(flowers):
    """Check that a user's mistake ends with one line and status 2, and that other errors keep
    their traceback; started at once."""
    Path("broken.py").write_text("raise ValueError('mine')")
    calls = [["eval.py", "all", "missing"],
             ["train.py", "--data", flowers / "train", *SMALL, "--method", "broken.py:Broken"]]
    begun = [subprocess.Popen([sys.executable, ROOT / name, *arguments], text=True,
                              stderr=subprocess.PIPE) for name, *arguments in calls]
    line, error = [process.communicate(timeout=200)[1] for process in begun]
    assert [process.returncode for process in begun] == [2, 1]
    assert line.startswith("eval.py: ") and "missing" in line and line.count("\n") == 1
    assert "Traceback" in error and "broken.py" in error


def test_help_has_all_options_and_the_authors_values(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "fraction of patches kept; authors: 0.3 (default: 0.3)" in " ".join(shown.split())
    assert "Default None: chosen by" in " ".join(shown.split())
    for flag in train.parse_args([])[1]:
        assert f"--{flag.replace('_', '-')} " in shown


@pytest.mark.slow
def test_spawned_workers_match_forked(flowers):
    """Spawn workers as on macOS and Windows, where the data set is pickled for them."""
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


# --- retrieval among held-out images after each epoch -----------------------------------------


class Dropping(LoDisc):
    """Draws from torch's random stream at each step, as dropout does."""

    def forward(self, view1, view2, generator=None, progress=0.0):
        drawn = torch.nn.functional.dropout(view1, 0.1)
        return super().forward(drawn, view2, generator, progress)


def held_out_options(flowers, out):
    return ["--data", str(flowers), *SMALL, "--epochs", "3", "--held-out", "--method",
            f"{Path(__file__)}:Dropping", "--out", out]


def epochs_of(folder):
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_held_out_retrieval_is_of_each_epoch_and_changes_nothing(flowers, monkeypatch, quick_probe,
                                                                 capsys):
    seen, real_retrieval = [], train.retrieval

    def retrieval(features):
        seen.append(features)
        return real_retrieval(features)

    monkeypatch.setattr(train, "retrieval", retrieval)
    train.main(held_out_options(flowers, "run"))
    printed = [line for line in capsys.readouterr().out.splitlines() if "held out:" in line]
    rows, stored = epochs_of("run"), evaluation.read_results(Path("run/eval.json"))["retrieval"]
    assert [list(row)[-2:] for row in rows] == [["rank1", "mAP"]] * 3 and len(printed) == 3
    for name in ("rank1", "mAP"):
        assert float(rows[-1][name]) == pytest.approx(stored[name], abs=1e-6)
    (first, _), (second, _), (last, labels) = seen
    assert not torch.equal(first, second) and not torch.equal(second, last)
    data = train.load_data(str(flowers), held_out=True)
    preprocessing = evaluation.Preprocessing(16, IMAGENET_MEAN, IMAGENET_STD)
    expected = evaluation.extract({"": load_encoder("run")}, data.test, preprocessing)[""]
    assert torch.equal(labels, expected[1]) and torch.allclose(last, expected[0], atol=1e-6)
    assert printed[-1] == f"held out: rank-1 {stored['rank1']:.3f}  mAP {stored['mAP']:.3f}"
    modes, real = [], train.train_step

    def step(model, *args):
        modes.append(model.encoder.training)
        return real(model, *args)

    monkeypatch.setattr(train, "train_step", step)
    train.main(held_out_options(flowers, "again"))
    assert all(modes)
    monkeypatch.setattr(train, "held_out_retrieval", lambda *args: {})
    train.main(held_out_options(flowers, "without"))
    assert same(weights("run"), weights("without")) and same(weights("run"), weights("again"))
    run, without = (torch.load(f"{name}/checkpoint.pt") for name in ("run", "without"))
    assert torch.equal(run["random"], without["random"])
    assert "rank1" not in epochs_of("without")[0]


def test_older_held_out_run_without_retrieval_resumes(flowers, monkeypatch, quick_probe):
    """Its first epochs have no retrieval: empty cells."""
    with monkeypatch.context() as older:
        older.setattr(train, "held_out_retrieval", lambda *args: {})
        kill_after(older, 3)  # of two steps in an epoch
        with pytest.raises(Killed):
            train.main(held_out_options(flowers, "run"))
    train.main(["--resume", "run"])
    rows = epochs_of("run")
    assert rows[0]["mAP"] == "" and float(rows[1]["mAP"]) > 0 and Path("run/run.png").exists()
    train.main(held_out_options(flowers, "whole"))
    assert same(weights("run"), weights("whole"))


def test_held_out_classes_of_one_image_have_no_retrieval(flowers, quick_probe, capsys):
    for path in (flowers / "train").rglob("*.jpg"):
        if int(path.stem) > 5:  # of six images a fifth is one
            path.unlink()
    train.main(["--data", str(flowers), *SMALL, "--epochs", "1", "--held-out", "--out", "run"])
    assert "rank1" not in epochs_of("run")[0] and "held out:" not in capsys.readouterr().out
