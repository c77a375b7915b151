"""The benchmark's FLOPs against torch's counter, and its report."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import train
from lodisc import LoDisc, MoCoV3, UserError, VisionTransformer, create_vit


@pytest.mark.parametrize("options", [
    dict(local_input="tokens"), dict(mask="least", importance="rollout"), dict(importance="last"),
    dict(mask="random", local_input="tokens"), dict(global_weight=0.0), None])
@pytest.mark.parametrize("train_projection", [True, False])
def test_step_flops_match_torch(options, train_projection):
    encoder = VisionTransformer(32, 8, 32, 2, 2, train_projection=train_projection)
    if options is None:
        model = MoCoV3(encoder, hidden_dim=64, output_dim=32)
    else:
        model = LoDisc(encoder, hidden_dim=64, output_dim=32, **options)
    views = torch.randn(2, 6, 3, 32, 32)
    # the fused kernel's backward recomputes the weights, so count the unfused one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*views).total.backward()
    counted = counter.get_total_flops()
    if model.importance == "rollout":
        counted -= 2 * 2 * 2 * 6 * 17 * 17  # rollout: a row times the two layers' matrices
    assert benchmark.step_flops(model, 6) == counted


def test_full_attention_flops_match_torch():
    encoder = create_vit("vit_nano", 32, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder.with_attention(torch.randn(6, 3, 32, 32), "matrix")
    assert 6 * sum(benchmark.encoder_flops(encoder, kind="matrix")) == counter.get_total_flops()


def test_flops_match_published_vit_base():
    """Compare with 17.6 G multiply-adds of ViT-B/16 at 224 px (Touvron et al. 2021), two FLOPs
    each, less the last layer's patch tokens, which are not computed."""
    projection, rest = benchmark.encoder_flops(create_vit("vit_base", 224, 16))
    saved = 2 * 196 * (2 * 197 * 768 + 9 * 768**2)
    assert projection + rest + saved == pytest.approx(2 * 17.58e9, rel=1e-2)


SMALL = ["--device", "cpu", "--image-size", "24", "--patch-size", "8", "--batch-size", "8",
         "--workers", "0"]


def trainer(options=()):
    _, given, defaults = benchmark.parse_args([*SMALL, *options])
    settings, device = {**defaults, **given}, torch.device("cpu")
    settings = train.fill_defaults(settings, device, 8)
    return benchmark.Trainer(settings, device, train.pick_precision("off", device, 96))


def test_step_calls_train_step(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "train_step", lambda *args: calls.append(args))
    benched = trainer()
    benched.step()
    (model, parallel, optimizer, scaler, precision, views, _, progress, m, maps), = calls
    assert maps == ()
    assert model is parallel is benched.model and optimizer is benched.optimizer
    assert precision is None
    assert isinstance(scaler, torch.amp.GradScaler) and not scaler.is_enabled()
    assert [view.shape for view in views] == [(8, 3, 24, 24)] * 2
    assert 0 <= progress <= 1 and 0 <= m <= 1


@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_both_encoders_are_compiled_on_request(monkeypatch, options):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    model = trainer(options).model
    expected = [model.encoder, model.momentum_encoder] if options else []
    assert [function.__self__ for function in compiled] == expected


def test_split_times_every_part_of_a_step(monkeypatch):
    """Check that every part is timed once, or once per view, and that all wrappers are removed."""
    benched, real, calls = trainer(), benchmark.timed, []
    monkeypatch.setattr(benchmark, "timed", lambda *args: calls.append(1) or real(*args))
    before, backward = dict(vars(benched.model)), torch.Tensor.backward
    seconds = benched.split()
    expected = {"online forward", "momentum, mask", "local", "loss", "backward", "optimiser", "EMA"}
    assert set(seconds) == expected and min(seconds.values()) > 0
    assert len(calls) == 2 * 3 + 4 + 3
    assert vars(benched.model) == before and torch.Tensor.backward is backward


def test_input_rate_takes_epochs_in_order(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark.TwoViews, "__getitem__", lambda self, key: asked.append(key) or 0)
    settings = dict(image_size=16, mean=[0.5] * 3, std=[0.5] * 3, seed=0, crop_min=0.08, workers=0,
                    batch_size=8, data="elsewhere")
    assert benchmark.input_rate(settings, range(20)) > 0  # two batches an epoch
    assert [epoch for epoch, _ in asked] == [epoch for epoch in range(5) for _ in range(16)]
    assert len(set(asked)) == 80


def test_invalid_settings_raise():
    with pytest.raises(UserError, match="--batch-size must be in"):
        benchmark.main([*SMALL, "--batch-size", "1"])


def test_report(capsys):
    benchmark.main(["--rounds", "1", *SMALL])
    report = capsys.readouterr().out
    rows = {}
    for name in benchmark.ROWS:
        pattern = rf"^{re.escape(name)} +(\d) +(\d) +(\S+) +\S+ +(\S+)$"
        rows[name] = re.search(pattern, report, re.M).groups()
    assert {name: row[:2] for name, row in rows.items()} == {
        "lodisc": ("2", "4"), "mocov3": ("2", "2"), "lodisc, crop": ("2", "4"),
        "PARTICLE": ("2", "2"),
        "CVSA (after the abstract)": ("2", "2"), "Released": ("4", "8")}
    for name, (_, _, ms, ratio) in rows.items():
        assert float(ratio) == pytest.approx(float(ms) / float(rows["mocov3"][2]), rel=0.02)
    for part in ("online forward", "momentum, mask", "local", "loss", "backward", "optimiser",
                 "EMA"):
        assert float(re.search(rf"^{part} +(\S+)$", report, re.M)[1]) > 0
    assert all(text in report for text in ("bottleneck", "GFLOP/s", "storing the attention (row)"))
    assert float(re.search(r"^peak memory: (\S+) GiB$", report, re.M)[1]) > 0.1
