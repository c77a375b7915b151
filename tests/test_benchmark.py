"""The benchmark's FLOPs against torch's counter, and its report."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import train
from lodisc import METHODS, LoDisc, UserError, VisionTransformer, create_vit


@pytest.mark.parametrize("method, mask, importance, tokens", [
    ("lodisc", "location", "product", True), ("lodisc", "least", "rollout", False),
    ("lodisc", "random", "product", True), ("local", "location", "last", False),
    ("local", "block", "product", True), ("global", "location", "product", False)])
def test_step_flops_match_torch(method, mask, importance, tokens):
    encoder = VisionTransformer(32, 8, 32, 2, 2, train_projection=tokens)
    model = LoDisc(encoder, method, mask, importance, "tokens" if tokens else "pixels",
                   hidden_dim=64, output_dim=32)
    views = torch.randn(2, 6, 3, 32, 32)
    # the fused kernel's backward recomputes the weights, so count the unfused one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*views).total.backward()
    counted = counter.get_total_flops()
    if model.stored == "mean":
        counted -= 2 * 2 * 2 * 6 * 17 * 17  # rollout: a row times the two layers' matrices
    assert benchmark.step_flops(model, 6) == counted


def test_full_attention_flops_match_torch():
    encoder = create_vit("vit_nano", 32, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(torch.randn(6, 3, 32, 32), attention="full")
    assert 6 * sum(benchmark.encoder_flops(encoder, attention="full")) == counter.get_total_flops()


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
    train.fill_defaults(settings, device, 8)
    return benchmark.Trainer(settings, device, train.pick_precision("off", device, 96))


def test_step_calls_train_step(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "train_step", lambda *args: calls.append(args))
    own = trainer()
    own.step()
    (model, parallel, optimizer, scaler, precision, views, _, progress, m), = calls
    assert model is parallel is own.model and optimizer is own.optimizer and precision is None
    assert isinstance(scaler, torch.amp.GradScaler) and not scaler.is_enabled()
    assert [view.shape for view in views] == [(8, 3, 24, 24)] * 2
    assert 0 <= progress <= 1 and 0 <= m <= 1 and own.model.encoder._compiled_call_impl is None
    compiled = trainer(["--compile"]).model  # lazily, at the first call
    assert compiled.encoder._compiled_call_impl and compiled.momentum_encoder._compiled_call_impl


@pytest.mark.parametrize("method", METHODS)
def test_split_times_every_part_of_a_step(method, monkeypatch):
    """Check that every part is timed once, or once per view, and that all wrappers are removed."""
    own, real, calls = trainer(["--method", method]), benchmark.timed, []
    monkeypatch.setattr(benchmark, "timed", lambda *args: calls.append(1) or real(*args))
    before, backward = dict(vars(own.model)), torch.Tensor.backward
    seconds = own.split()
    branches = {"global": [], "local": ["mask", "local"], "lodisc": ["mask", "local"]}[method]
    assert set(seconds) == {"online forward", "momentum", "loss", "backward", "optimiser", "EMA",
                            *branches} and min(seconds.values()) > 0
    contrasts = 4 if method == "lodisc" else 2
    assert len(calls) == 2 * (2 + len(branches)) + contrasts + 3
    assert vars(own.model) == before and torch.Tensor.backward is backward


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
    rows = {name: re.search(rf"^{name} +(\d) +(\d) +(\S+) +\S+ +(\S+)$", report, re.M).groups()
            for name in (*METHODS, "CVSA", "PARTICLE")}
    assert {name: row[:2] for name, row in rows.items()} == {
        "lodisc": ("2", "4"), "global": ("2", "2"), "local": ("2", "4"), "CVSA": ("2", "2"),
        "PARTICLE": ("2", "2")}
    for name, (_, _, ms, ratio) in rows.items():
        assert float(ratio) == pytest.approx(float(ms) / float(rows["global"][2]), rel=0.02)
    for part in ("online forward", "momentum", "mask", "local", "loss", "backward", "optimiser",
                 "EMA"):
        assert float(re.search(rf"^{part} +(\S+)$", report, re.M)[1]) > 0
    assert all(text in report for text in ("bottleneck", "GFLOP/s", "storing the attention (row)"))
    assert float(re.search(r"^peak memory: (\S+) GiB$", report, re.M)[1]) > 0.1
