"""Where the kept patches of a run lie: tests/experiments/localisation.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import eval as evaluation
import localisation
import train
from data.augment import plain_crop
from data.birds import Birds
from lodisc import UserError, create_vit, load_encoder

SMALL = ["--image-size", "16", "--patch-size", "8", "--epochs", "1", "--batch-size", "50",
         "--device", "cpu", "--workers", "0", "--out", "run"]


def test_localisation_of_known_importance(monkeypatch):
    """Set the importance of a patch to the bird's fraction of it, or to the negative fraction."""
    encoder, birds = create_vit("vit_nano", 48, 8), Birds("test", 60)
    crop = v2.Compose(plain_crop(48, v2.InterpolationMode.NEAREST))
    fractions = []
    for i in range(60):
        bird = torch.from_numpy(np.asarray(crop(birds.regions(i))) >= 1).float()
        fractions.append(F.avg_pool2d(bird[None], 8).flatten())
    fractions = torch.stack(fractions)
    for sign in (1, -1):
        monkeypatch.setattr(evaluation, "importance_of", lambda e, batch, name: sign * fractions)
        metrics = localisation.localisation(encoder, birds, keep_ratio=0.3)
        kept = fractions.sort(1, descending=sign > 0).values[:, :10]
        assert metrics["object"] == pytest.approx((kept.mean() / fractions.mean()).item(), rel=1e-5)
        assert metrics["object_most"] == pytest.approx(
            (fractions.sort(1).values[:, -10:].mean() / fractions.mean()).item(), rel=1e-5)
        fixed = fractions[:, fractions.mean(0).argsort()[-10:]]
        assert metrics["object_fixed"] == pytest.approx((fixed.mean() / fractions.mean()).item())
        assert (metrics["object"] > 2) == (metrics["parts"] > 1.5) == (sign > 0)


@pytest.mark.usefixtures("elsewhere")
def test_command_measures_the_momentum_encoder_of_a_run(few_birds, monkeypatch, capsys,
                                                        quick_probe):
    monkeypatch.setattr(localisation, "load_data", train.load_data)
    train.main([*SMALL, "--keep-ratio", "0.6", "--importance", "last"])
    before = evaluation.read_results(localisation.Path("run/eval.json"))
    capsys.readouterr()
    localisation.main(["run", "--workers", "0"])
    printed = capsys.readouterr().out
    after = evaluation.read_results(localisation.Path("run/eval.json"))
    stored = after.pop("localisation")
    assert after == before  # other results stay
    expected = localisation.localisation(load_encoder("run", use_momentum=True), Birds("test", 60),
                                         "last", 0.6)
    assert stored == expected and f"object{expected['object']:>14.2f}" in printed


@pytest.mark.usefixtures("elsewhere")
def test_data_without_regions_is_an_error(flowers, quick_probe):
    options = ["--data", str(flowers), "--arch", "vit_nano", *SMALL, "--batch-size", "12"]
    train.main(options)
    with pytest.raises(UserError, match="flowers has no regions"):
        localisation.main(["run"])
