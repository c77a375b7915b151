"""Linear probe, k-NN and retrieval against straightforward references; the masks' picture."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as judging
from data.birds import Birds
from lodisc import create_vit


def clusters(n, classes=4, dim=8, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, dim, generator=generator), labels


def test_logistic_regression_reaches_the_minimum():
    features, labels = clusters(200, spread=2.0)
    for strength in (1.0, 1e-3):
        weights = judging.fit_logistic(features, labels, 4, strength).double().requires_grad_()
        scores = features.double() @ weights[:-1] + weights[-1]
        loss = F.cross_entropy(scores, labels) + strength / 2 * weights[:-1].square().sum()
        loss.backward()
        assert weights.grad.norm() < 1e-3  # convex: no gradient, no better place
    free = judging.fit_logistic(features, labels, 4, 1e-3)[:-1].norm()
    assert judging.fit_logistic(features, labels, 4, 1.0)[:-1].norm() < free


def test_linear_probe_scores():
    result = judging.linear_probe(clusters(400, spread=0.2), clusters(100, spread=0.2, seed=1))
    assert result["top1"] == result["top5"] == 1.0
    assert result["strength"] in judging.STRENGTHS
    features, labels = clusters(400, classes=10, spread=3.0)
    test, test_labels = clusters(200, classes=10, spread=3.0, seed=1)
    result = judging.linear_probe((features, labels), (test, test_labels))
    assert 0.15 < result["top1"] < result["top5"] < 1
    scaled = judging.linear_probe((features * torch.logspace(-3, 3, 8) + 5, labels),
                                  (test * torch.logspace(-3, 3, 8) + 5, test_labels))
    assert scaled["top1"] == pytest.approx(result["top1"], abs=0.02)  # standardised
    again = judging.linear_probe((features, labels), (test, test_labels))
    assert again == result


def test_linear_probe_is_fitted_again_on_all_of_train(monkeypatch):
    """Strengths are tried on nine tenths, each held out class by class; the last fit has it all."""
    sizes, real = [], judging.fit_logistic
    monkeypatch.setattr(judging, "fit_logistic", lambda features, labels, *rest: (
        sizes.append((len(features), labels.bincount().tolist(), rest[1])),
        real(features, labels, *rest))[1])
    features, _ = clusters(80)
    labels = torch.arange(80) % 4
    result = judging.linear_probe((features, labels), (features, labels))
    assert sizes[-1] == (80, [20] * 4, result["strength"])
    assert sizes[:-1] == [(72, [18] * 4, strength) for strength in judging.STRENGTHS]


def test_strength_is_chosen_on_what_was_held_out():
    """Noise fits itself best without a penalty; what was held out wants the strongest one."""
    features, labels = torch.randn(120, 100), torch.arange(120) % 2
    features[:, 0] += 0.5 * labels
    test = torch.randn(400, 100)
    test[:, 0] += 0.5 * (torch.arange(400) % 2)
    result = judging.linear_probe((features, labels), (test, torch.arange(400) % 2))
    assert result["strength"] >= 0.1


def test_linear_probe_never_fits_the_test_set():
    """Labels that mean nothing: chance on the test set, whatever its labels are."""
    features, test = torch.randn(300, 40), torch.randn(300, 40)
    labels = torch.randint(5, (300,))
    seen = {round(judging.linear_probe((features, labels), (test, torch.full((300,), c)))["top1"], 6)
            for c in range(5)}
    assert abs(sum(seen) - 1) < 1e-4  # one prediction a picture, the same five times


def test_knn_against_a_loop():
    train, test = clusters(60, spread=2.0), clusters(50, spread=2.0, seed=1)
    right = 0
    for feature, label in zip(*test):
        sims = sorted(((F.cosine_similarity(feature, other, dim=0).item(), int(l))
                       for other, l in zip(*train)), reverse=True)[:20]
        votes = [0.0] * 4
        for sim, other in sims:
            votes[other] += math.exp(sim / 0.07)
        right += votes.index(max(votes)) == label
    assert judging.knn(train, test)["top1"] == right / 50
    assert judging.knn(train, test, block=7)["top1"] == right / 50


@pytest.mark.parametrize("block", [512, 13])
def test_retrieval_against_a_loop(block):
    features, labels = clusters(60, classes=5, spread=2.0)
    labels[17] = 77  # alone in its class
    rank1, rank5, precisions = [], [], []
    for i in range(60):
        others = sorted((j for j in range(60) if j != i), reverse=True,
                        key=lambda j: F.cosine_similarity(features[i], features[j], dim=0).item())
        hits = [labels[j] == labels[i] for j in others]
        if not any(hits):
            continue
        rank1.append(hits[0])
        rank5.append(any(hits[:5]))
        found = [sum(hits[: r + 1]) / (r + 1) for r in range(59) if hits[r]]
        precisions.append(sum(found) / len(found))
    result = judging.retrieval((features, labels), block)
    mean = lambda values: float(sum(values)) / len(values)
    assert result["rank1"] == pytest.approx(mean(rank1))
    assert result["rank5"] == pytest.approx(mean(rank5))
    assert result["mAP"] == pytest.approx(mean(precisions), abs=1e-6)
    assert (result["queries"], result["left_out"]) == (59, 1)


def test_equally_near_images_of_other_classes_come_first():
    """Features that tell nothing apart find nothing: the k right ones stand behind all others."""
    labels = torch.arange(40) % 10  # three others of its class, 36 of another
    result = judging.retrieval((torch.ones(40, 8), labels))
    assert result["rank1"] == result["rank5"] == 0
    assert result["mAP"] == pytest.approx((1 / 37 + 2 / 38 + 3 / 39) / 3)


def test_localisation_of_masks_that_are_known(monkeypatch):
    """Importance equal to the bird's share of a patch finds the bird; its opposite avoids it."""
    encoder, birds = create_vit("vit_nano", 48, 8), Birds("test", 60)
    crop = judging.v2.Compose(judging.plain_crop(48, judging.InterpolationMode.NEAREST))
    shares = []
    for i in range(60):
        bird = torch.from_numpy(judging.np.asarray(crop(birds.regions(i))) >= 1).float()
        shares.append(F.avg_pool2d(bird[None], 8).flatten())
    shares = torch.stack(shares)
    for sign in (1, -1):
        monkeypatch.setattr(judging, "importance_of", lambda e, batch, name: sign * shares)
        ratio = judging.localisation(encoder, birds, keep_ratio=0.3)
        kept = shares.sort(1, descending=sign > 0).values[:, :10]
        assert ratio["object"] == pytest.approx((kept.mean() / shares.mean()).item(), rel=1e-5)
        assert (ratio["object"] > 2) == (ratio["parts"] > 1.5) == (sign > 0)
        assert ratio["object_most"] == pytest.approx(
            (shares.sort(1).values[:, -10:].mean() / shares.mean()).item(), rel=1e-5)
        fixed = shares[:, shares.mean(0).argsort()[-10:]]
        assert ratio["object_fixed"] == pytest.approx((fixed.mean() / shares.mean()).item(), rel=1e-5)
        assert (ratio["pointing_game"] > 0.95) == (sign > 0)


def test_masks_picture_shows_picture_heat_and_kept_patches(tmp_path):
    encoder = create_vit("vit_nano", 48, 8)
    pictures = [Birds("test", 20)[i][0] for i in range(5)]
    out = tmp_path / "masks.png"
    judging.write_masks(encoder, pictures, {"importance": "product", "keep_ratio": 0.3}, out)
    with Image.open(out) as sheet:
        pixels = torch.from_numpy(judging.np.array(sheet.convert("RGB")))
    tile, step, left = 128, 132, sheet.width - 5 * 132
    for column in range(5):
        x = left + column * step
        picture = pixels[4:4 + tile, x:x + tile]
        kept = pixels[4 + 2 * step:4 + 2 * step + tile, x:x + tile]
        black = (kept == 0).all(-1)
        assert black.float().mean() == pytest.approx(26 / 36, abs=0.03)  # 10 of 36 stay
        assert torch.equal(kept[~black], picture[~black])
        assert pixels[4 + step:4 + step + tile, x:x + tile].float().std() > 10


def test_merging_keeps_the_other_figures(tmp_path):
    path = tmp_path / "eval.json"
    judging.merge_json(path, {"linear": {"top1": 0.5}, "knn": {"top1": 0.2}})
    judging.merge_json(path, {"linear": {"top1": 0.6}})
    assert json.loads(path.read_text()) == {"linear": {"top1": 0.6}, "knn": {"top1": 0.2}}
