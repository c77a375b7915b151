"""The benchmark's arithmetic against torch's own counter, and its report."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from lodisc import LoDisc, create_vit


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"local_input": "tokens"}, {"method": "global"}, {"method": "local"},
    {"importance": "rollout"}, {"mask": "random"}], ids=str)
def test_flops_are_those_that_torch_counts(options, init):
    encoder = create_vit("vit_nano", 32, 8, learned_positions=init, train_projection=init)
    model = LoDisc(encoder, hidden_dim=64, output_dim=32, **options)
    views = torch.randn(2, 6, 3, 32, 32)
    # fused attention's backward computes the weights again: counted with the plain one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*views).total.backward()
    counted = counter.get_total_flops()
    if options.get("importance") == "rollout":
        counted -= 2 * 4 * 2 * 6 * 17 * 17  # its row times the four layers' matrices
    assert benchmark.step_flops(model, 6) == counted


def test_published_size():
    """17.6 GFLOP multiply-adds for ViT-B/16 at 224 px (Touvron et al. 2021), here times two; the
    last layer's work for patches is not done."""
    projection, rest = benchmark.encoder_flops(create_vit("vit_base", 224, 16))
    saved = 2 * 196 * (2 * 197 * 768 + 9 * 768**2)
    assert projection + rest + saved == pytest.approx(2 * 17.58e9, rel=1e-2)


def test_report(capsys):
    benchmark.main(["--rounds", "1", "--device", "cpu", "--image-size", "16", "--patch-size", "8",
                    "--batch-size", "8", "--workers", "0"])
    report = capsys.readouterr().out
    parts = ("online forward", "momentum", "mask", "local", "loss", "backward", "optimiser", "EMA",
             "whole step")
    for part in parts:
        row = re.search(rf"^{part} +(\S+) +(\S+)$", report, re.M)
        lodisc, plain = map(float, row.groups())
        assert lodisc > 0 and (plain > 0) == (part not in ("mask", "local"))
    assert "bottleneck" in report and "GFLOP/s" in report
