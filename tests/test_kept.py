"""Masked images are encoded and compared as tests/experiments/kept.py defines it."""

import pytest
import torch
import torch.nn.functional as F

import kept
from data.augment import Plain, Preprocessing
from data.datasets import load_data
from lodisc import MASKS, VisionTransformer, attention_product, location_mask, mask_pixels

INPUT = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def encoders():
    """Return two encoders whose features differ in length, as cosine and product differ then."""
    pair = {name: VisionTransformer(16, 4, 64, 2, 1) for name in ("first", "second")}
    for encoder in pair.values():
        torch.nn.init.normal_(encoder.norm.bias)
    return pair


def test_masked_images_keep_the_patches_of_the_encoders_own_masks(encoders, flowers):
    test, encoder = load_data(str(flowers)).test, encoders["first"]
    images = torch.stack([image for image, _ in Plain(test, INPUT)])
    features, masks = kept.encode(encoder, test, INPUT, 0.5)
    whole, rows = encoder.with_attention(images, "row")
    importance = attention_product(rows)
    draws = torch.Generator().manual_seed(0)
    expected = {"location": location_mask(importance, 0.5),
                "random": MASKS["random"].function(importance, 0.5, draws),
                "least": MASKS["least"].function(importance, 0.5)}
    assert torch.equal(masks, expected["location"]) and masks.sum(1).eq(8).all()
    assert list(features) == ["all", *expected]
    assert torch.equal(features["all"], encoder(images)) and torch.equal(whole, encoder(images))
    for name, mask in expected.items():
        assert torch.equal(features[name], encoder(mask_pixels(images, mask, 4))), name


def test_metrics_by_definition(encoders, flowers, monkeypatch):
    test = load_data(str(flowers)).test
    results = kept.measure(encoders, test, INPUT, 0.3)
    (_, before), (features, masks) = (kept.encode(encoder, test, INPUT, 0.3)
                                      for encoder in encoders.values())
    labels, own = torch.tensor(test.targets), results["second"]
    whole = F.normalize(features["all"], dim=1)
    for name in ("all", *kept.SHOWN):
        shown = F.normalize(features[name], dim=1)
        right = labels[(shown @ shown.T).fill_diagonal_(-9).argmax(1)] == labels
        assert own[name]["rank1"] == pytest.approx(right.double().mean().item())
    nearest = [int((query @ shown.T).argmax()) for query in whole]  # of the last mask
    assert own["least"]["own"] == pytest.approx(sum(i == j for i, j in enumerate(nearest)) / 12)
    assert 0 < own["least"]["own"] < 1 and "own" not in own["all"]
    common = (before & masks).sum().item() / 48
    assert own["location"]["in_common"] == pytest.approx(common) and common < 1
    assert results["first"]["location"]["in_common"] == 1
    whole = kept.measure(encoders, test, INPUT, 1.0)["second"]  # nothing is masked
    assert all(whole[name]["own"] == 1 and whole[name]["mAP"] == own["all"]["mAP"]
               for name in kept.SHOWN)
    monkeypatch.setattr(kept, "IMAGES", 5)  # of 12: every third
    fewer = torch.utils.data.Subset(test, [0, 3, 6, 9])
    fewer.targets = [test.targets[i] for i in fewer.indices]
    reduced = kept.measure(encoders, test, INPUT)
    monkeypatch.undo()
    assert reduced == kept.measure(encoders, fewer, INPUT)


def test_border_fractions(encoders, flowers, monkeypatch):
    test, encoder = load_data(str(flowers)).test, encoders["first"]
    importance = torch.zeros(12, 16)  # of 4 x 4 patches
    importance[:, [0, 3, 5, 10]] = 1  # two corners, two in the middle
    importance[6:, 10], importance[6:, 11] = 0, 2
    calls = []
    monkeypatch.setattr(kept, "importance_of", lambda *arguments: calls.append(
        arguments) or importance)
    fractions = kept.border_fractions(encoder, test, INPUT, 0.25)
    assert fractions == {name: pytest.approx(0.625) for name in ("product", "rollout", "last")}
    assert [name for _, _, name in calls] == list(fractions)
    assert all(used is encoder and len(images) == 12 for used, images, _ in calls)
