"""Linear probe, k-NN and retrieval against simple references; the masks command."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
import localisation
import train
from data.augment import Preprocessing
from data.birds import BIRD, PART, Birds
from data.datasets import Data, load_data
from lodisc import (UserError, VisionTransformer, box_mask, create_vit, load_encoder,
                    location_mask, patch_importance)


GREY_16 = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def record_fits(monkeypatch):
    """Return a list of the (features, labels, strength) of every fit from now on."""
    fits, real = [], evaluation.fit_logistic

    def fit(features, labels, strength, *rest):
        fits.append((features, labels, strength))
        return real(features, labels, strength, *rest)

    monkeypatch.setattr(evaluation, "fit_logistic", fit)
    return fits


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
    weights = evaluation.fit_logistic(features, labels, strength, torch.zeros(dim + 1, classes))
    assert weights.dtype == torch.float32
    inputs = torch.cat([features, torch.ones(120, 1)], 1).double()

    def objective(weights):
        return (F.cross_entropy(inputs @ weights, labels)
                + strength / 2 * weights[:-1].square().sum())

    best = weights.double()
    for _ in range(3):
        gradient = torch.func.grad(objective)(best).flatten()
        hessian = torch.func.hessian(objective)(best).reshape(gradient.numel(), -1)
        step = torch.linalg.lstsq(hessian + 1e-12 * torch.eye(len(gradient)), gradient).solution
        better = best - step.reshape(best.shape)
        best = better if objective(better) < objective(best) else best
    assert objective(weights.double()) <= objective(best) * (1 + 1e-4) + 1e-7


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
        evaluation.evaluate({"raw pixels": evaluation.RawPixels()}, data, GREY_16, "linear")
        line = f"raw pixels: the probe's best strength, {strength:g}, is at the edge of its grid\n"
        assert capsys.readouterr().out == (line if strength in (1, 1e-6) else "")


def test_split_of_the_probe_is_the_same_for_every_run(monkeypatch):
    """No seed reaches it: not the caller's, nor torch's state."""
    (features, labels), fits = clusters(100), record_fits(monkeypatch)
    for seed in range(3):
        torch.manual_seed(seed)
        evaluation.linear_probe((features, labels), (features, labels))
    parts = [part for part, _, _ in fits if len(part) < 100]
    assert len(parts) == 3 * len(evaluation.STRENGTHS)
    assert all(torch.equal(part, parts[0]) for part in parts)
    assert not torch.equal(parts[0], standardised(features)[:90])  # drawn, and class by class
    held_out = evaluation.split_by_class(labels)
    assert torch.equal(parts[0], standardised(features)[~held_out])


@pytest.mark.parametrize("counts", [[20, 20, 20], [1, 30, 2, 7], [5, 1, 1], [100], [1, 1]])
def test_every_tenth_image_is_held_out_class_by_class(counts):
    """Whatever the labels' order, each class has its tenth, and the choice is drawn."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    held_out = evaluation.split_by_class(labels)
    assert held_out.dtype == torch.bool and held_out.shape == labels.shape
    for label, count in enumerate(counts):
        part = int(held_out[labels == label].sum())
        assert count // 10 <= part <= math.ceil(count / 10) and part < count
    if counts == [100]:
        gaps = held_out.nonzero().flatten().diff()
        assert held_out.sum() == 10 and len(gaps.unique()) > 1
    torch.manual_seed(7)
    assert torch.equal(evaluation.split_by_class(labels), held_out)


def test_held_out_images_that_are_given_replace_the_split(monkeypatch):
    """They choose the strength, and the last fit has them too."""
    (features, labels), fits = clusters(60), record_fits(monkeypatch)
    held_out = torch.zeros(60, dtype=torch.bool)
    held_out[20:35] = True
    evaluation.linear_probe((features, labels), (features, labels), held_out=held_out)
    assert all(torch.equal(part, standardised(features)[~held_out]) for part, _, _ in fits[:-1])
    assert len(fits) == len(evaluation.STRENGTHS) + 1 and len(fits[-1][0]) == 60


def standardised(features):
    return (features - features.mean(0)) / features.std(0, correction=0)


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
        evaluation.location_masks(encoder, Birds("test", 8))
    with pytest.raises(UserError, match="not finite"):
        evaluation.importance_of(encoder, torch.randn(2, 3, 32, 32), "last")


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
    (features, _), fits = clusters(80), record_fits(monkeypatch)
    labels = torch.arange(80) % 4
    result = evaluation.linear_probe((features, labels), (features, labels))
    sizes = [(len(part), classes.bincount().tolist(), strength)
             for part, classes, strength in fits]
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
    train_set, test = clusters(60, spread=2.0), clusters(50, spread=2.0, seed=1)
    right = 0
    for feature, label in zip(*test):
        nearest = sorted(((F.cosine_similarity(feature, neighbour, dim=0).item(), int(its_class))
                          for neighbour, its_class in zip(*train_set)), reverse=True)[:20]
        votes = [0.0] * 4
        for similarity, its_class in nearest:
            votes[its_class] += math.exp(similarity / 0.07)
        right += votes.index(max(votes)) == label
    assert evaluation.knn(train_set, test)["top1"] == right / 50


@pytest.mark.parametrize("block", [512, 13])
def test_retrieval_matches_loop(block):
    features, labels = clusters(60, classes=12, spread=6.0)  # ranks of all sizes
    labels[17] = 77  # alone in its class
    rank1, rank4, rank5, averages = [], [], [], []
    for i in range(60):
        ranked = sorted((j for j in range(60) if j != i), reverse=True,
                        key=lambda j: F.cosine_similarity(features[i], features[j], dim=0).item())
        hits = [labels[j] == labels[i] for j in ranked]
        if not any(hits):
            continue
        rank1.append(hits[0])
        rank4.append(any(hits[:4]))
        rank5.append(any(hits[:5]))
        precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(59) if hits[r]]
        averages.append(sum(precisions) / len(precisions))
    result = evaluation.retrieval((features, labels), block)

    def mean(values):
        return float(sum(values)) / len(values)

    assert result["rank1"] == pytest.approx(mean(rank1))
    assert result["rank5"] == pytest.approx(mean(rank5))
    assert result["mAP"] == pytest.approx(mean(averages), abs=1e-6)
    assert (result["queries"], result["left_out"]) == (59, 1)
    assert result["rank1"] < mean(rank4) < result["rank5"]


def test_retrieval_breaks_ties_against_the_class():
    """Rank equal features: the three images of the same class come after all others."""
    labels = torch.arange(40) % 10  # three others of its class, 36 of another
    result = evaluation.retrieval((torch.ones(40, 8), labels))
    assert result["rank1"] == result["rank5"] == 0
    assert result["mAP"] == pytest.approx((1 / 37 + 2 / 38 + 3 / 39) / 3)


# --- pivotal patches --------------------------------------------------------------------------


def test_object_cover_is_the_kept_patches_mean_over_that_of_all():
    cover = torch.tensor([[0.0, 0.5, 1.0, 0.1], [0.2, 0.0, 0.0, 0.2]])  # mean 0.25
    masks = torch.tensor([[False, False, True, False], [True, True, False, False]])
    assert evaluation.object_cover(masks, cover) == pytest.approx((1.0 + 0.2) / 3 / 0.25)
    assert evaluation.object_cover(torch.ones(2, 4, dtype=torch.bool), cover) == 1
    assert evaluation.object_cover(masks, torch.ones(2, 4)) == 1  # an object everywhere
    assert evaluation.object_cover(cover == 0, cover) == 0
    assert isinstance(evaluation.object_cover(masks, cover), float)


@pytest.mark.parametrize("side", [1, 2, 3, 6, 14])
def test_border_fraction_counts_the_outermost_ring(side):
    masks = torch.rand(5, side * side) < 0.4
    masks[0], masks[1] = True, False
    on_border = 0
    for i in range(5):
        for patch in masks[i].nonzero().flatten().tolist():
            row, column = divmod(patch, side)
            on_border += row in (0, side - 1) or column in (0, side - 1)
    expected = on_border / masks.sum().item()
    assert evaluation.border_fraction(masks) == pytest.approx(expected)
    ring = side * side - max(0, side - 2) ** 2
    everything = torch.ones(3, side * side, dtype=torch.bool)
    assert evaluation.border_fraction(everything) == pytest.approx(ring / side**2)


@pytest.mark.parametrize("least", [BIRD, PART])
def test_patch_cover_is_the_fraction_of_a_patchs_pixels(least):
    """Of the region map in the same crop as the image: the short side to 8/7, then the middle."""
    birds, fractions = Birds("test", 30), torch.zeros(30, 36)
    for i in range(30):
        regions = birds.regions(i).resize((55, 55), Image.Resampling.NEAREST)
        pixels = evaluation.np.asarray(regions.crop((4, 4, 52, 52)))  # Pillow rounds 3.5 to 4
        for patch in range(36):
            top, left = 8 * (patch // 6), 8 * (patch % 6)
            fractions[i, patch] = float((pixels[top:top + 8, left:left + 8] >= least).mean())
    args = () if least == BIRD else (PART,)  # the whole bird by default
    cover = evaluation.patch_cover(birds, 48, 8, *args)
    assert cover.dtype == torch.float32 and torch.allclose(cover, fractions)
    assert 0 < cover.mean() < 0.5 and cover.max() > 0.9


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_location_masks_are_the_location_masks_of_the_centre_crops(workers):
    encoder, birds = create_vit("vit_nano", 48, 8), Birds("test", 70)  # more than a batch
    encoder.mean, encoder.std = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    plain = evaluation.Plain(birds, Preprocessing(48, encoder.mean, encoder.std))
    batch = torch.stack([plain[i][0] for i in range(70)])
    differ = []
    for name, ratio in (("product", 0.3), ("last", 0.5), ("rollout", 0.1)):
        masks = evaluation.location_masks(encoder, birds, name, ratio, workers)
        assert masks.dtype == torch.bool and masks.shape == (70, 36)
        with torch.no_grad():
            _, importance = patch_importance(encoder, batch, name)
        assert torch.equal(masks, location_mask(importance, ratio))
        differ.append(masks)
    assert torch.equal(evaluation.location_masks(encoder, birds), differ[0])  # the defaults
    assert len({tuple(masks.flatten().tolist()) for masks in differ}) == 3


def test_object_cover_follows_the_importance(monkeypatch):
    """Set a patch's importance to the bird's fraction of it, or to the negative fraction."""
    encoder, birds = create_vit("vit_nano", 48, 8), Birds("test", 60)
    cover = evaluation.patch_cover(birds, 48, 8)
    for sign in (1, -1):
        monkeypatch.setattr(evaluation, "importance_of", lambda e, batch, name: sign * cover)
        masks = evaluation.location_masks(encoder, birds, keep_ratio=0.3)
        kept = cover.sort(1, descending=sign > 0).values[:, :10]
        ratio = evaluation.object_cover(masks, cover)
        assert ratio == pytest.approx((kept.mean() / cover.mean()).item(), rel=1e-5)
        assert (ratio > 2) == (sign > 0)


@pytest.fixture
def run_of_birds(elsewhere, few_birds, monkeypatch):
    """Train on few drawn birds, with a mask and an importance that are no defaults."""
    monkeypatch.setattr(train, "evaluate_run", lambda *args: {})
    train.main(["--image-size", "24", "--patch-size", "8", "--epochs", "1", "--batch-size", "50",
                "--importance", "last", "--keep-ratio", "0.5", "--mask", "least", "--lr", "0.5",
                "--momentum", "0.5", "--device", "cpu", "--workers", "0", "--out", "run"])
    return Path("run")


def test_masks_of_data_with_regions_are_measured_and_stored(run_of_birds, capsys):
    """Of the momentum encoder, by the run's importance and keep ratio."""
    (run_of_birds / "eval.json").write_text('{"knn": {"top1": 0.5}}')
    capsys.readouterr()
    evaluation.main(["masks", "run", "--device", "cpu", "--workers", "0"])
    encoder, test = load_encoder("run", use_momentum=True), Birds("test", 60)
    masks = evaluation.location_masks(encoder, test, "last", 0.5)
    place = {"object_cover": evaluation.object_cover(masks, evaluation.patch_cover(test, 24, 8)),
             "border_fraction": evaluation.border_fraction(masks)}
    assert masks.sum() == 60 * 4
    for name, ratio in (("product", 0.5), ("last", 0.3)):  # the others could be told apart
        changed = evaluation.location_masks(encoder, test, name, ratio)
        assert evaluation.object_cover(changed, evaluation.patch_cover(test, 24, 8)) != \
            pytest.approx(place["object_cover"], abs=1e-6)
    online = evaluation.location_masks(load_encoder("run"), test, "last", 0.5)
    assert not torch.equal(online, masks)
    printed = capsys.readouterr().out
    assert (f"object cover {place['object_cover']:.2f} (chance level 1), border fraction "
            f"{place['border_fraction']:.2f} (chance level 0.89)\n") in printed  # 8 of 9 patches
    stored = json.loads((run_of_birds / "eval.json").read_text(encoding="utf-8"))
    assert stored.pop("masks") == pytest.approx(place) and stored == {"knn": {"top1": 0.5}}
    assert (run_of_birds / "masks.png").is_file()


def test_box_of_a_crop_run_is_measured(few_birds, elsewhere, quick_probe, monkeypatch, capsys):
    monkeypatch.setattr(localisation, "load_data", train.load_data)
    train.main(["--image-size", "40", "--patch-size", "8", "--epochs", "1", "--batch-size", "50",
                "--local-input", "crop", "--device", "cpu", "--workers", "0", "--out", "run"])
    capsys.readouterr()
    evaluation.main(["masks", "run", "--device", "cpu", "--workers", "0"])
    encoder, test = load_encoder("run", use_momentum=True), Birds("test", 60)
    boxes = evaluation.location_masks(encoder, test, choose=box_mask)
    cover = evaluation.patch_cover(test, 40, 8)
    assert boxes.sum() == 60 * 9
    expected = evaluation.object_cover(boxes, cover)
    assert expected != pytest.approx(
        evaluation.object_cover(evaluation.location_masks(encoder, test), cover), abs=0.01)
    assert f"object cover {expected:.2f} (" in capsys.readouterr().out
    assert localisation.measure("run")["object"] == pytest.approx(expected)


def test_masks_of_given_images_or_without_regions_are_only_drawn(run_of_birds, flowers, capsys,
                                                                 monkeypatch):
    monkeypatch.setattr(evaluation, "load_data", load_data)
    capsys.readouterr()
    for arguments in ([str(next((flowers / "test").rglob("*.jpg")))], ["--data", str(flowers)]):
        evaluation.main(["masks", "run", *arguments, "--device", "cpu", "--workers", "0"])
        printed = capsys.readouterr().out
        assert "object cover" not in printed and printed.endswith("wrote run/masks.png\n")
        assert not (run_of_birds / "eval.json").exists()


def test_masks_of_published_weights_are_measured_but_not_stored(elsewhere, few_birds, capsys):
    encoder = VisionTransformer(32, 8, 192, 1, 3)
    torch.save(encoder.state_dict(), "weights.pth")
    evaluation.main(["masks", "weights.pth", "--data", "synthetic", "--image-size", "32",
                     "--device", "cpu", "--workers", "0"])
    masks = evaluation.location_masks(encoder, Birds("test", 60), "product", 0.3)
    cover = evaluation.patch_cover(Birds("test", 60), 32, 8)
    assert f"object cover {evaluation.object_cover(masks, cover):.2f} (" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["masks.png", "weights.pth"]


def test_masks_png_shows_image_heat_map_and_kept_patches(tmp_path, elsewhere):
    encoder = VisionTransformer(48, 8, 192, 1, 3)
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


def test_notes_say_where_each_images_patches_lie(capsys):
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, [5, 6]] = True  # inside
    masks[1, [0, 6, 15]] = True
    cover = torch.zeros(2, 16)
    cover[0, 5], cover[1, [0, 15]] = 0.5, 0.25
    assert evaluation.place_notes(masks) == [
        "on the border\n(chance)", "0.00 (0.75)", "0.67 (0.75)"]
    assert "border fraction of the drawn images 0.33 (chance level 0.75)" in capsys.readouterr().out
    assert evaluation.place_notes(masks, cover) == [
        "on the border,\non the object\n(chance)", "0.00 (0.75)\n0.25 (0.03)",
        "0.67 (0.75)\n0.17 (0.03)"]


@pytest.mark.parametrize("given", [False, True])
def test_notes_are_of_the_drawn_images(run_of_birds, flowers, monkeypatch, given):
    """With the object where the data set has regions, not of given files."""
    seen, real = [], evaluation.place_notes

    def record(masks, cover=None):
        seen.append((masks, cover))
        return real(masks, cover)

    monkeypatch.setattr(evaluation, "place_notes", record)
    files = [str(path) for path in sorted(flowers.rglob("*.jpg"))[:3]] if given else []
    evaluation.main(["masks", str(run_of_birds), *files, "--out", "drawn.png"])
    (masks, cover), = seen
    assert masks.shape == (3 if given else 8, 9)
    if given:
        assert cover is None
        return
    birds = Birds("test", 60)
    indices = evaluation.example_indices(birds.targets)
    expected = evaluation.patch_cover(birds, 24, 8)[indices]
    assert torch.equal(cover, expected)


def test_results_are_stored_beside_other_results_and_apart_from_values_per_image(tmp_path):
    first = {"raw pixels": {"knn": {"top1": 0.3}},
             "initial": {"linear": {"top1": 0.1, "per_image": {"top1": [0, 0]}}},
             "trained": {"linear": {"top1": 0.5, "per_image": {"top1": [1, 0]}},
                         "knn": {"top1": 0.2}}}
    evaluation.save_results(tmp_path, first)
    again = {"trained": {"linear": {"top1": 0.6, "per_image": {"top1": [1, 1]}}}}
    evaluation.save_results(tmp_path, again)
    evaluation.save_results(tmp_path, {"trained": {"knn": {"top1": 0.7}}}, "momentum", "cub")
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8")) == {
        "linear": {"top1": 0.6}, "knn": {"top1": 0.2}, "pixels": {"knn": {"top1": 0.3}},
        "initial": {"linear": {"top1": 0.1}}, "cub": {"momentum": {"knn": {"top1": 0.7}}}}
    per_image = json.loads((tmp_path / "per_image.json").read_text(encoding="utf-8"))
    assert per_image["linear"]["per_image"]["top1"] == [1, 1]
    assert per_image["initial"]["linear"]["per_image"]["top1"] == [0, 0]


def test_values_per_image_average_to_the_metrics():
    train_set, test = clusters(80, spread=2.0), clusters(60, classes=4, spread=2.0, seed=1)
    test[1][7] = 3 + test[1].max()  # alone in its class
    for result in (evaluation.linear_probe(train_set, test), evaluation.knn(train_set, test)):
        hits = result["per_image"]["top1"]
        assert len(hits) == 60 and sum(hits) / 60 == pytest.approx(result["top1"])
    result = evaluation.retrieval(test)
    for name, column in (("rank1", "rank1"), ("rank5", "rank5"), ("mAP", "average_precision")):
        values = result["per_image"][column]
        assert len(values) == 60 and values[7] is None
        assert sum(v for v in values if v is not None) / 59 == pytest.approx(result[name])


def test_class_of_one_image_is_never_held_out(monkeypatch):
    labels = torch.cat([torch.zeros(8), torch.arange(1, 31)]).long()  # one image each but class 0
    features, fits = torch.randn(38, 5), record_fits(monkeypatch)
    evaluation.linear_probe((features, labels), (features, labels))
    assert all(classes.unique().tolist() == list(range(31)) for _, classes, _ in fits)
    assert len(fits) == len(evaluation.STRENGTHS) + 1


def test_raw_pixels_are_pooled_to_16_px():
    images = torch.randn(2, 3, 64, 64)
    features = evaluation.RawPixels()(images)
    assert torch.allclose(features, torch.nn.functional.avg_pool2d(images, 4).flatten(1), atol=1e-6)
    assert evaluation.RawPixels()(torch.randn(2, 3, 8, 8)).shape == (2, 3 * 8 * 8)


def test_features_are_class_token_or_mean_or_single_patch_tokens():
    encoder, birds = create_vit("vit_nano", 32, 8), Birds("test", 6)
    preprocessing = Preprocessing(32, encoder.mean, encoder.std)
    plain, features = evaluation.Plain(birds, preprocessing), {}
    encoders = {"e": encoder, "p": evaluation.RawPixels()}
    for kind in ("class", "mean", "patches"):
        if kind == "patches":
            del encoders["p"]  # raw pixels have none
        rows = evaluation.extract(encoders, birds, preprocessing, kind=kind)
        features[kind] = {name: values for name, (values, _) in rows.items()}
        assert all(labels.tolist() == birds.targets for _, labels in rows.values())
    images = torch.stack([plain[i][0] for i in range(6)])
    with torch.no_grad():
        token, patches = encoder.tokens(images)
    assert patches.shape == (6, 16, 96)
    assert torch.allclose(features["class"]["e"], token, atol=1e-5)
    assert torch.allclose(features["mean"]["e"], patches.mean(1), atol=1e-5)
    assert torch.allclose(features["patches"]["e"], patches, atol=1e-5)
    assert torch.equal(features["class"]["p"], features["mean"]["p"])
    assert torch.equal(features["class"]["p"], evaluation.RawPixels()(images))


@pytest.mark.parametrize("kind", ["class", "mean"])
def test_every_metric_has_the_requested_features(monkeypatch, kind):
    """Of both splits, compared with `extract`'s."""
    encoder, preprocessing = create_vit("vit_nano", 16, 8), GREY_16
    data, seen = Data(Birds("train", 20), Birds("test", 40)), {}

    def record(name, sets):
        seen[name] = [part[0] for part in sets if isinstance(part, tuple)]
        return {"strength": 0.1}

    for name in ("linear_probe", "knn", "retrieval"):
        monkeypatch.setattr(evaluation, name, lambda *sets, name=name: record(name, sets))
    evaluation.evaluate({"e": encoder}, data, preprocessing, kind=kind)
    train_part, test_part = [
        evaluation.extract({"e": encoder}, part, preprocessing, kind=kind)["e"][0]
        for part in data[:2]]
    for name, expected in (("linear_probe", [train_part, test_part]),
                           ("knn", [train_part, test_part]), ("retrieval", [test_part])):
        assert [len(part) for part in seen[name]] == [len(part) for part in expected]
        assert all(map(torch.equal, seen[name], expected))


def test_probe_standardises_by_the_training_set(monkeypatch):
    (features, labels), (test, classes) = clusters(80), clusters(60, spread=9.0, seed=1)
    fits = record_fits(monkeypatch)
    evaluation.linear_probe((3 * features + 5, labels), (7 * test - 2, classes))
    fitted, _, _ = fits[-1]
    assert fitted.mean(0).abs().max() < 1e-5
    assert torch.allclose(fitted.std(0, correction=0), torch.ones(8), atol=1e-5)


def test_retrieval_needs_a_class_of_two():
    with pytest.raises(UserError, match="two test images"):
        evaluation.retrieval((torch.randn(3, 4), torch.arange(3)))
