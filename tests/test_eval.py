"""Linear probe, k-NN and retrieval against simple references; masks.png."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import eval as evaluation
from data.birds import Birds
from data.datasets import Data
from lodisc import UserError, VisionTransformer, create_vit


def clusters(n, classes=4, dim=8, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, dim, generator=generator), labels


def test_logistic_regression_reaches_the_minimum():
    (features, labels), zeros = clusters(200, spread=2.0), torch.zeros(9, 4)
    for strength in (1.0, 1e-3):
        weights = evaluation.fit_logistic(features, labels, strength, zeros).double()
        weights.requires_grad_()
        scores = features.double() @ weights[:-1] + weights[-1]
        loss = F.cross_entropy(scores, labels) + strength / 2 * weights[:-1].square().sum()
        loss.backward()
        assert weights.grad.norm() < 1e-3  # convex: zero gradient at the minimum
    free = evaluation.fit_logistic(features, labels, 1e-3, zeros)[:-1].norm()
    assert evaluation.fit_logistic(features, labels, 1.0, zeros)[:-1].norm() < free


@pytest.mark.parametrize("classes, dim, spread", [(4, 8, 2.0), (5, 150, 1.0), (3, 40, 0.1)])
@pytest.mark.parametrize("strength", [1, 1e-3, 1e-6])
def test_fit_converges_at_every_strength(classes, dim, spread, strength):
    """Compare with Newton's method in float64; classes overlap, or can be separated."""
    features, labels = clusters(120, classes, dim, spread)
    features = features * torch.logspace(-1, 0.5, dim)  # ill-conditioned
    found = evaluation.fit_logistic(features, labels, strength, torch.zeros(dim + 1, classes))
    assert found.dtype == torch.float32
    inputs = torch.cat([features, torch.ones(120, 1)], 1).double()

    def objective(weights):
        return (F.cross_entropy(inputs @ weights, labels)
                + strength / 2 * weights[:-1].square().sum())

    best = found.double()
    for _ in range(3):
        gradient = torch.func.grad(objective)(best).flatten()
        hessian = torch.func.hessian(objective)(best).reshape(gradient.numel(), -1)
        step = torch.linalg.lstsq(hessian + 1e-12 * torch.eye(len(gradient)), gradient).solution
        better = best - step.reshape(best.shape)
        best = better if objective(better) < objective(best) else best
    assert objective(found.double()) <= objective(best) * (1 + 1e-4) + 1e-7


def test_fit_that_does_not_converge_warns(monkeypatch):
    features, labels = clusters(200, spread=2.0)
    monkeypatch.setattr(evaluation, "range", lambda n: [0], raising=False)
    with pytest.warns(UserWarning, match="strength 1e-06 has not converged"):
        evaluation.fit_logistic(features, labels, 1e-6, torch.zeros(9, 4))


@pytest.mark.parametrize("strength", evaluation.STRENGTHS)
def test_probe_matches_scikit_learn(strength):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="a comparison, not needed")
    (features, labels), (test, classes) = (clusters(400, 10, 32, 3.0, seed) for seed in (0, 1))
    theirs = linear_model.LogisticRegression(C=1 / (400 * strength), tol=1e-9, max_iter=20_000)
    theirs.fit(features.double().numpy(), labels.numpy())
    ours = evaluation.fit_logistic(features, labels, strength, torch.zeros(33, 10)).double()
    other = torch.cat([torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_)[None]])
    losses, hits = [], []
    for weights in (ours, other):
        scores = features.double() @ weights[:-1] + weights[-1]
        losses.append(F.cross_entropy(scores, labels) + strength / 2 * weights[:-1].square().sum())
        scores = test.double() @ weights[:-1] + weights[-1]
        hits.append((scores.argmax(1) == classes).sum().item())
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    assert abs(hits[0] - hits[1]) <= 1


def test_strength_at_the_edge_is_reported(monkeypatch, capsys):
    assert evaluation.STRENGTHS == (1, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    data = Data(Birds("train", 40), Birds("test", 40))
    for strength in evaluation.STRENGTHS:
        monkeypatch.setattr(evaluation, "linear_probe", lambda *args: {
            "top1": 0.5, "strength": strength})
        evaluation.evaluate({"raw pixels": evaluation.RawPixels()}, data, (16, (0.5,) * 3,
                                                                           (0.5,) * 3), "linear")
        line = f"raw pixels: the probe's best strength, {strength:g}, is at the edge of its grid\n"
        assert capsys.readouterr().out == (line if strength in (1, 1e-6) else "")


def test_split_of_the_probe_is_the_same_for_every_run(monkeypatch):
    """No seed reaches it: not the caller's, nor torch's state."""
    (features, labels), seen, real = clusters(100), [], evaluation.fit_logistic
    monkeypatch.setattr(evaluation, "fit_logistic", lambda features, *rest: (
        seen.append(features), real(features, *rest))[1])
    for seed in range(3):
        torch.manual_seed(seed)
        evaluation.linear_probe((features, labels), (features, labels))
    parts = [part for part in seen if len(part) < 100]
    assert len(parts) == 3 * len(evaluation.STRENGTHS)
    assert all(torch.equal(part, parts[0]) for part in parts)
    assert not torch.equal(seen[0], features[:90])  # drawn, and class by class


def test_probe_without_a_class_of_two_takes_the_strongest():
    features, labels = torch.randn(12, 5), torch.arange(12)
    result = evaluation.linear_probe((features, labels), (features, labels))
    assert result["strength"] == evaluation.STRENGTHS[0] and 0 <= result["top1"] <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["linear", "linear, test", "knn", "knn, test", "retrieval"])
def test_features_that_are_not_finite_are_an_error(metric, value):
    (features, labels), (test, classes) = clusters(40), clusters(30, seed=1)
    broken = test if "test" in metric or metric == "retrieval" else features
    broken[3:5, 2] = value
    metrics = {"linear": evaluation.linear_probe, "knn": evaluation.knn}
    with pytest.raises(UserError, match=f"features of 2 of {len(broken)} images are not finite"):
        if metric == "retrieval":
            evaluation.retrieval((test, classes))
        else:
            metrics[metric.split(",")[0]]((features, labels), (test, classes))


def test_importance_that_is_not_finite_is_an_error():
    encoder = create_vit("vit_nano", 32, 8)
    with torch.no_grad():
        encoder.cls_token.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluation.localisation(encoder, Birds("test", 8))


def test_linear_probe_scores():
    result = evaluation.linear_probe(clusters(400, spread=0.2), clusters(100, spread=0.2, seed=1))
    assert result["top1"] == result["top5"] == 1.0
    assert result["strength"] in evaluation.STRENGTHS
    features, labels = clusters(400, classes=10, spread=3.0)
    test, test_labels = clusters(200, classes=10, spread=3.0, seed=1)
    result = evaluation.linear_probe((features, labels), (test, test_labels))
    assert 0.15 < result["top1"] < result["top5"] < 1
    scaled = evaluation.linear_probe((features * torch.logspace(-3, 3, 8) + 5, labels),
                                  (test * torch.logspace(-3, 3, 8) + 5, test_labels))
    assert scaled["top1"] == pytest.approx(result["top1"], abs=0.02)  # standardised
    again = evaluation.linear_probe((features, labels), (test, test_labels))
    assert again == result


def test_linear_probe_is_refitted_on_all_of_train(monkeypatch):
    """Check that strengths are tried on nine tenths of each class, and the last fit uses all."""
    sizes, real = [], evaluation.fit_logistic
    monkeypatch.setattr(evaluation, "fit_logistic", lambda features, labels, *rest: (
        sizes.append((len(features), labels.bincount().tolist(), rest[0])),
        real(features, labels, *rest))[1])
    features, _ = clusters(80)
    labels = torch.arange(80) % 4
    result = evaluation.linear_probe((features, labels), (features, labels))
    assert sizes[-1] == (80, [20] * 4, result["strength"])
    assert sizes[:-1] == [(72, [18] * 4, strength) for strength in evaluation.STRENGTHS]


def test_strength_is_chosen_on_held_out_images():
    """Fit noise: training accuracy favours no penalty, held-out accuracy a strong one."""
    features, labels = torch.randn(120, 100), torch.arange(120) % 2
    features[:, 0] += 0.5 * labels
    test = torch.randn(400, 100)
    test[:, 0] += 0.5 * (torch.arange(400) % 2)
    result = evaluation.linear_probe((features, labels), (test, torch.arange(400) % 2))
    assert result["strength"] >= 0.1


def test_linear_probe_never_fits_the_test_set():
    """Fit random labels: the predictions must not depend on the test labels."""
    features, test = torch.randn(300, 40), torch.randn(300, 40)
    labels = torch.randint(5, (300,))
    seen = {round(evaluation.linear_probe((features, labels),
                                          (test, torch.full((300,), c)))["top1"], 6)
            for c in range(5)}
    assert abs(sum(seen) - 1) < 1e-4  # one prediction per image, the same in all calls


def test_knn_matches_loop():
    train, test = clusters(60, spread=2.0), clusters(50, spread=2.0, seed=1)
    right = 0
    for feature, label in zip(*test):
        sims = sorted(((F.cosine_similarity(feature, other, dim=0).item(), int(l))
                       for other, l in zip(*train)), reverse=True)[:20]
        votes = [0.0] * 4
        for sim, other in sims:
            votes[other] += math.exp(sim / 0.07)
        right += votes.index(max(votes)) == label
    assert evaluation.knn(train, test)["top1"] == right / 50
    assert evaluation.knn(train, test)["top1"] == right / 50


@pytest.mark.parametrize("block", [512, 13])
def test_retrieval_matches_loop(block):
    features, labels = clusters(60, classes=12, spread=6.0)  # ranks of all sizes
    labels[17] = 77  # alone in its class
    rank1, rank5, precisions, found_ranks = [], [], [], []
    for i in range(60):
        others = sorted((j for j in range(60) if j != i), reverse=True,
                        key=lambda j: F.cosine_similarity(features[i], features[j], dim=0).item())
        hits = [labels[j] == labels[i] for j in others]
        if not any(hits):
            continue
        found_ranks.append(hits)
        rank1.append(hits[0])
        rank5.append(any(hits[:5]))
        found = [sum(hits[: r + 1]) / (r + 1) for r in range(59) if hits[r]]
        precisions.append(sum(found) / len(found))
    result = evaluation.retrieval((features, labels), block)
    mean = lambda values: float(sum(values)) / len(values)
    assert result["rank1"] == pytest.approx(mean(rank1))
    assert result["rank5"] == pytest.approx(mean(rank5))
    assert result["mAP"] == pytest.approx(mean(precisions), abs=1e-6)
    assert (result["queries"], result["left_out"]) == (59, 1)
    assert result["rank1"] < mean([any(row[:4]) for row in found_ranks]) < result["rank5"]


def test_retrieval_breaks_ties_against_the_class():
    """Rank equal features: the three images of the same class come after all others."""
    labels = torch.arange(40) % 10  # three others of its class, 36 of another
    result = evaluation.retrieval((torch.ones(40, 8), labels))
    assert result["rank1"] == result["rank5"] == 0
    assert result["mAP"] == pytest.approx((1 / 37 + 2 / 38 + 3 / 39) / 3)


def test_localisation_of_known_importance(monkeypatch):
    """Set the importance of a patch to the bird's fraction of it, or to the negative fraction."""
    encoder, birds = create_vit("vit_nano", 48, 8), Birds("test", 60)
    crop = v2.Compose(evaluation.plain_crop(48, v2.InterpolationMode.NEAREST))
    fractions = []
    for i in range(60):
        bird = torch.from_numpy(evaluation.np.asarray(crop(birds.regions(i))) >= 1).float()
        fractions.append(F.avg_pool2d(bird[None], 8).flatten())
    fractions = torch.stack(fractions)
    for sign in (1, -1):
        monkeypatch.setattr(evaluation, "importance_of", lambda e, batch, name: sign * fractions)
        ratio = evaluation.localisation(encoder, birds, keep_ratio=0.3)
        kept = fractions.sort(1, descending=sign > 0).values[:, :10]
        assert ratio["object"] == pytest.approx((kept.mean() / fractions.mean()).item(), rel=1e-5)
        assert ratio["object_most"] == pytest.approx(
            (fractions.sort(1).values[:, -10:].mean() / fractions.mean()).item(), rel=1e-5)
        fixed = fractions[:, fractions.mean(0).argsort()[-10:]]
        assert ratio["object_fixed"] == pytest.approx((fixed.mean() / fractions.mean()).item())
        assert (ratio["object"] > 2) == (ratio["parts"] > 1.5) == (sign > 0)


def test_masks_png_shows_image_heat_map_and_kept_patches(tmp_path, elsewhere):
    encoder = VisionTransformer(48, 8, 64, 1, 1)
    torch.save(encoder.state_dict(), "weights.pth")
    for i in range(5):
        Birds("test", 20)[i][0].save(f"{i}.png")
    evaluation.main(["masks", "weights.pth", *(f"{i}.png" for i in range(5)), "--image-size", "48"])
    with Image.open("masks.png") as sheet:
        pixels = torch.from_numpy(evaluation.np.array(sheet.convert("RGB")))
    tile, step, left = 128, 132, sheet.width - 5 * 132
    for column in range(5):
        x = left + column * step
        image = pixels[4:4 + tile, x:x + tile]
        kept = pixels[4 + 2 * step:4 + 2 * step + tile, x:x + tile]
        black = (kept == 0).all(-1)
        assert black.float().mean() == pytest.approx(26 / 36, abs=0.03)  # 10 of 36 are kept
        assert torch.equal(kept[~black], image[~black])
        assert pixels[4 + step:4 + step + tile, x:x + tile].float().std() > 10


def test_save_rows_keeps_other_results_and_separates_values_per_image(tmp_path):
    first = {"raw pixels": {"knn": {"top1": 0.3}},
             "initial": {"linear": {"top1": 0.1, "per_image": {"top1": [0, 0]}}},
             "trained": {"linear": {"top1": 0.5, "per_image": {"top1": [1, 0]}},
                         "knn": {"top1": 0.2}}}
    evaluation.save_rows(tmp_path, first)
    again = {"trained": {"linear": {"top1": 0.6, "per_image": {"top1": [1, 1]}}}}
    evaluation.save_rows(tmp_path, again)
    evaluation.save_rows(tmp_path, {"trained": {"knn": {"top1": 0.7}}}, "momentum", "cub")
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8")) == {
        "linear": {"top1": 0.6}, "knn": {"top1": 0.2}, "pixels": {"knn": {"top1": 0.3}},
        "initial": {"linear": {"top1": 0.1}}, "cub": {"momentum": {"knn": {"top1": 0.7}}}}
    per_image = json.loads((tmp_path / "per_image.json").read_text(encoding="utf-8"))
    assert per_image["linear"]["per_image"]["top1"] == [1, 1]
    assert per_image["initial"]["linear"]["per_image"]["top1"] == [0, 0]


def test_values_per_image_average_to_the_metrics():
    train, test = clusters(80, spread=2.0), clusters(60, classes=4, spread=2.0, seed=1)
    test[1][7] = 3 + test[1].max()  # alone in its class
    for result in (evaluation.linear_probe(train, test), evaluation.knn(train, test)):
        hits = result["per_image"]["top1"]
        assert len(hits) == 60 and sum(hits) / 60 == pytest.approx(result["top1"])
    result = evaluation.retrieval(test)
    for name, column in (("rank1", "rank1"), ("rank5", "rank5"), ("mAP", "average_precision")):
        values = result["per_image"][column]
        assert len(values) == 60 and values[7] is None
        assert sum(v for v in values if v is not None) / 59 == pytest.approx(result[name])


def test_class_of_one_image_is_never_held_out(monkeypatch):
    labels = torch.cat([torch.zeros(8), torch.arange(1, 31)]).long()  # one image each but class 0
    features, seen, real = torch.randn(38, 5), [], evaluation.fit_logistic
    monkeypatch.setattr(evaluation, "fit_logistic", lambda features, labels, *rest: (
        seen.append(labels.unique().tolist()), real(features, labels, *rest))[1])
    evaluation.linear_probe((features, labels), (features, labels))
    assert all(classes == list(range(31)) for classes in seen)
    assert len(seen) == len(evaluation.STRENGTHS) + 1


def test_raw_pixels_are_pooled_to_16_px():
    images = torch.randn(2, 3, 64, 64)
    features, _ = evaluation.RawPixels()(images)
    assert torch.allclose(features, torch.nn.functional.avg_pool2d(images, 4).flatten(1), atol=1e-6)
    assert evaluation.RawPixels()(torch.randn(2, 3, 8, 8))[0].shape == (2, 3 * 8 * 8)


def test_features_are_class_token_or_mean_patch_token():
    encoder, birds = create_vit("vit_nano", 32, 8), Birds("test", 6)
    crop = (32, encoder.mean, encoder.std)
    found = {kind: evaluation.extract({"e": encoder, "p": evaluation.RawPixels()}, birds, crop,
                                      kind=kind) for kind in ("class", "mean")}
    images = torch.stack([evaluation.Plain(birds, *crop)[i][0] for i in range(6)])
    with torch.no_grad():
        tokens = encoder.tokens(images)[0]
    assert torch.allclose(found["class"]["e"][0], tokens[:, 0], atol=1e-5)
    assert torch.allclose(found["mean"]["e"][0], tokens[:, 1:].mean(1), atol=1e-5)
    assert torch.equal(found["class"]["p"][0], found["mean"]["p"][0])


@pytest.mark.parametrize("kind", ["class", "mean"])
def test_every_metric_has_the_requested_features(monkeypatch, kind):
    """Of both splits, compared with `extract`'s."""
    encoder, crop = create_vit("vit_nano", 32, 8), (32, (0.5,) * 3, (0.5,) * 3)
    data, seen = Data(Birds("train", 20), Birds("test", 40)), {}
    for name in ("linear_probe", "knn", "retrieval"):
        monkeypatch.setattr(evaluation, name, lambda *sets, name=name: seen.update(
            {name: [part[0] for part in sets if isinstance(part, tuple)]}) or {})
    evaluation.evaluate({"e": encoder}, data, crop, kind=kind)
    train, test = [evaluation.extract({"e": encoder}, part, crop, kind=kind)["e"][0]
                   for part in data[:2]]
    for name, expected in (("linear_probe", [train, test]), ("knn", [train, test]),
                           ("retrieval", [test])):
        assert [len(part) for part in seen[name]] == [len(part) for part in expected]
        assert all(map(torch.equal, seen[name], expected))


def test_probe_standardises_by_the_training_set(monkeypatch):
    (features, labels), (test, classes) = clusters(80), clusters(60, spread=9.0, seed=1)
    seen, real = [], evaluation.fit_logistic
    monkeypatch.setattr(evaluation, "fit_logistic", lambda features, *rest: (
        seen.append(features), real(features, *rest))[1])
    evaluation.linear_probe((3 * features + 5, labels), (7 * test - 2, classes))
    assert seen[-1].mean(0).abs().max() < 1e-5
    assert torch.allclose(seen[-1].std(0, correction=0), torch.ones(8), atol=1e-5)


def test_retrieval_needs_a_class_of_two():
    with pytest.raises(UserError, match="two test images"):
        evaluation.retrieval((torch.randn(3, 4), torch.arange(3)))
