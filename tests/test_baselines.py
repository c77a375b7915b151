"""CVSA and PARTICLE against reference loops, and as methods of train.py and eval.py."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
import particle
import train
from cvsa import CVSA, alignment_loss, swap_background
from data.augment import Preprocessing
from lodisc import (LoDisc, UserError, VisionTransformer, attention_product, contrastive_loss,
                    create_vit, location_mask)
from particle import PARTICLE, cluster, cluster_means

FOLDER = Path(__file__).parent / "baselines"
FILES = {CVSA: "cvsa.py", PARTICLE: "particle.py"}
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--batch-size", "12",
         "--device", "cpu"]
CLASSES = pytest.mark.parametrize("cls", [CVSA, PARTICLE])


def small(cls=LoDisc, **options):
    torch.manual_seed(0)
    model = cls(create_vit("vit_nano", 32, 8), hidden_dim=64, output_dim=32, **options)
    return model, torch.randn(2, 6, 3, 32, 32)


# --- CVSA -------------------------------------------------------------------------------------


def test_swap_background_matches_loop():
    views, masks = torch.randn(5, 3, 16, 24), torch.rand(5, 6) < 0.5
    swapped = swap_background(views, masks, 8)
    for i in range(5):
        for patch in range(6):
            row, column = 8 * (patch // 3), 8 * (patch % 3)
            source = views[i] if masks[i, patch] else views[(i + 1) % 5]
            assert torch.equal(swapped[i, :, row:row + 8, column:column + 8],
                               source[:, row:row + 8, column:column + 8])


def test_alignment_loss_attracts_attention_to_pasted_patches():
    masks = torch.tensor([[True, False, False, True], [False, True, False, False]])
    row = 0.5 * masks / masks.sum(1, keepdim=True)  # the rest is the class token's own
    assert alignment_loss(row, masks).item() == pytest.approx(0, abs=1e-6)
    even = torch.full((2, 4), 0.2)
    level = (torch.tensor(2.0).log() + torch.tensor(4.0).log()) / 2  # 2 and 1 of 4 patches
    assert alignment_loss(even, masks).item() == pytest.approx(level.item(), rel=1e-5)
    outside = (~masks).float()
    assert alignment_loss(outside, masks).item() == pytest.approx(-torch.tensor(1e-6).log().item())
    logits = torch.randn(2, 5, requires_grad=True)
    alignment_loss(logits.softmax(-1)[:, 1:], masks).backward()
    gradient = logits.grad[:, 1:]
    assert (gradient[masks] < 0).all() and (gradient[~masks] > 0).all()


def test_cvsa_matches_its_equations(monkeypatch):
    model, (view1, view2) = small(CVSA, weight=0.5)
    output = model(view1, view2)
    masks, keys, queries, aligned = [], [], [], []
    with torch.no_grad():
        for view in (view1, view2):
            features, attentions = model.momentum_encoder.with_attention(view, "row")
            keys.append(model.momentum_projector(features))
            masks.append(location_mask(attention_product(attentions), 0.3))
    for view, mask in zip((view1, view2), masks):
        swapped = swap_background(view, mask, 8)
        features, matrices = model.encoder.with_attention(swapped, "matrix")
        queries.append(model.predictor(model.projector(features)))
        patches = matrices[-1][:, 0, 1:]
        fraction = (patches / patches.sum(1, keepdim=True) * mask).sum(1)
        aligned.append(-fraction.log().mean())
    contrast = (contrastive_loss(queries[0], keys[1], 0.2)
                + contrastive_loss(queries[1], keys[0], 0.2))
    alignment = (aligned[0] + aligned[1]) / 2
    assert torch.allclose(output.contrast_loss, contrast, atol=1e-5)
    assert torch.allclose(output.alignment_loss, alignment, atol=1e-5)
    assert torch.allclose(output.total, contrast + 0.5 * alignment, atol=1e-5)
    assert all(map(torch.equal, output.masks, masks))


def record_passes(monkeypatch, model):
    """Return {encoder: images of its passes}, filled as the model runs."""
    seen, real = {"encoder": [], "momentum_encoder": []}, VisionTransformer.encode

    def encode(self, images, *args, **options):
        name = "encoder" if self is model.encoder else "momentum_encoder"
        seen[name].append(images)
        return real(self, images, *args, **options)

    monkeypatch.setattr(VisionTransformer, "encode", encode)
    return seen


def test_cvsa_keys_are_of_unswapped_views(monkeypatch):
    model, views = small(CVSA)
    seen = record_passes(monkeypatch, model)
    model(*views)
    assert [torch.equal(*pair) for pair in zip(seen["momentum_encoder"], views)] == [True, True]
    assert len(seen["encoder"]) == 2
    assert not any(torch.equal(*pair) for pair in zip(seen["encoder"], views))


def test_swapped_views_preserve_kept_patches_only(tmp_path, few_birds):
    """Save eight birds above their swapped views, for visual inspection."""
    data = train.load_data()
    preprocessing = Preprocessing(48, (0.5,) * 3, (0.5,) * 3)
    views = train.augment.TwoViews(data.train, preprocessing, seed=0)
    images = torch.stack([views[0, i][0] for i in range(8)])
    model = CVSA(create_vit("vit_nano", 48, 8), hidden_dim=8, output_dim=8)
    masks = model.pivotal_patches(images)
    swapped = swap_background(images, masks, 8)
    rows = [torch.cat(list(batch), dim=2) for batch in (images, swapped)]
    pixels = ((torch.cat(rows, dim=1) * 0.5 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).resize((8 * 144, 2 * 144), 0).save(tmp_path / "swapped.png")
    kept = masks.float().mean().item()
    same_pixels = (images == swapped).all(1).float().mean().item()
    assert kept <= same_pixels < kept + 0.05


# --- PARTICLE ---------------------------------------------------------------------------------


def cluster_by_loops(points, first, clusters, iterations=5):
    points = F.normalize(points, dim=1)
    centres = [points[first]]
    while len(centres) < clusters:
        nearest = [max(float(point @ centre) for centre in centres) for point in points]
        centres.append(points[min(range(len(points)), key=nearest.__getitem__)])

    def assign():
        return [max(range(clusters), key=lambda k, point=point: float(point @ centres[k]))
                for point in points]

    for _ in range(iterations):
        assignment = assign()
        for k in range(clusters):
            members = [point for point, index in zip(points, assignment) if index == k]
            if members:
                centres[k] = F.normalize(torch.stack(members).sum(0), dim=0)
    return assign()


@pytest.mark.parametrize("seed", range(5))
def test_cluster_matches_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(4, 18, 6, generator=generator, dtype=torch.float64)
    first = torch.randint(18, (4,), generator=generator)
    assert cluster(points, first, 5).tolist() == [cluster_by_loops(one, int(start), 5)
                              for one, start in zip(points, first)]


def separated(clusters=4, members=6, dim=8):
    centres = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0][:clusters]
    noise = torch.randn(clusters * members, dim, dtype=torch.float64)
    points = centres.repeat_interleave(members, 0) + 0.1 * noise
    return points[None], torch.arange(clusters).repeat_interleave(members)


def partition(assignment):
    """Return whether each pair of points is in one cluster, whatever its index."""
    return assignment[:, None] == assignment[None]


def test_cluster_is_invariant_to_order_and_rotation():
    points, truth = separated()
    assignment = cluster(points, torch.tensor([0]), 4)[0]
    assert torch.equal(partition(assignment), partition(truth))
    order = torch.randperm(24)
    start = (order == 0).nonzero()[0]
    assert torch.equal(cluster(points[:, order], start, 4)[0], assignment[order])
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert torch.equal(cluster(points @ rotation, torch.tensor([0]), 4)[0], assignment)


def test_empty_clusters_stay_empty():
    points = F.one_hot(torch.tensor([0, 0, 1, 1, 0]), 4).float()[None]  # two distinct points
    assignment = cluster(points, torch.tensor([0]), 5)
    assert assignment.unique().tolist() == [0, 1]
    means, present = cluster_means(points, assignment, 5)
    assert present.tolist() == [[True, True, False, False, False]] and means.isfinite().all()


def test_clusters_and_means_are_float32_under_autocast():
    points = torch.randn(8, 300, 16)
    first = torch.zeros(8, dtype=torch.long)
    expected = cluster(points, first, 5)
    means, _ = cluster_means(points, expected, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cluster(points, first, 5), expected)
        again, _ = cluster_means(points, expected, 5)
    assert again.dtype == torch.float32 and torch.equal(again, means)


def test_cluster_breaks_ties_by_lowest_index():
    points = torch.eye(4)[None]  # all cosines 0: each next centre is the lowest index left
    assert cluster(points, torch.tensor([2]), 3).tolist() == [[1, 2, 0, 0]]


def by_loops(model, view1, view2):
    """Compute PARTICLE's loss and fraction of shared clusters by loops over images and clusters."""
    with torch.no_grad():
        targets = [model.momentum_encoder.tokens(view)[1] for view in (view1, view2)]
        importance = attention_product(model.momentum_encoder.with_attention(view1, "row")[1])
    online = [model.encoder.tokens(view)[1] for view in (view1, view2)]
    rows, patches = [[], [], [], []], online[0].shape[1]
    for i in range(len(view1)):
        points = torch.cat([targets[0][i], targets[1][i]])
        first = int(importance[i].argmax())
        assignment = torch.tensor(cluster_by_loops(points, first, model.clusters))
        of_views = assignment[:patches], assignment[patches:]
        for k in range(model.clusters):
            if all((of_view == k).any() for of_view in of_views):
                for row, tokens, of_view in zip(rows, (*online, *targets), (*of_views, *of_views)):
                    row.append(tokens[i][of_view == k].mean(0))
    q1, q2, k1, k2 = map(torch.stack, rows)
    with torch.no_grad():
        k2, k1 = model.momentum_projector(k2), model.momentum_projector(k1)
    q1, q2 = (model.predictor(model.projector(q)) for q in (q1, q2))
    loss = contrastive_loss(q1, k2, 0.2) + contrastive_loss(q2, k1, 0.2)
    return loss, len(q1) / (len(view1) * model.clusters)


def test_particle_matches_loops():
    model, views = small(PARTICLE)
    output = model(*views)
    loss, shared = by_loops(model, *views)
    assert 0 < shared < 1  # some cluster is in one view only
    assert torch.allclose(output.part_loss, loss, atol=1e-5) and output.total is output.part_loss
    assert output.shared_parts.item() == pytest.approx(shared)
    assert not output.shared_parts.requires_grad and output.masks is None


def gradients(model, output):
    model.zero_grad()
    output.total.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_clusters_in_one_view_only_are_ignored(monkeypatch):
    model, views = small(PARTICLE)
    clean = model(*views)
    expected = gradients(model, clean)

    def with_nan(tokens, assignment, clusters):
        means, present = cluster_means(tokens, assignment, clusters)
        return means.masked_fill(~present[:, :, None], torch.nan), present

    monkeypatch.setattr(particle, "cluster_means", with_nan)
    output = model(*views)
    assert torch.equal(output.total, clean.total) and output.shared_parts < 1
    assert all(map(torch.equal, gradients(model, output), expected))


def test_no_gradient_through_assignments_and_keys():
    model, views = small(PARTICLE)
    computed = gradients(model, model(*views))
    assert all(gradient.isfinite().all() for gradient in computed)
    assert all(p.grad is None for module in (model.momentum_encoder, model.momentum_projector)
               for p in module.parameters())
    # the loss with the same assignments and keys as constants has the same gradient
    loss, _ = by_loops(model, *views)
    model.zero_grad()
    loss.backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    assert max(g.abs().max() for g in expected) > 1e-3
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(computed, expected))


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_shared_clusters_give_zero_loss_with_graph(monkeypatch, rows):
    model, views = small(PARTICLE)

    def only(tokens, assignment, clusters):
        means, present = cluster_means(tokens, assignment, clusters)
        keep = torch.zeros_like(present)
        keep.view(-1)[:rows] = True
        return means, keep

    monkeypatch.setattr(particle, "cluster_means", only)
    output = model(*views)
    assert output.total.item() == 0
    # one for every parameter, as DDP needs
    assert all((gradient == 0).all() for gradient in gradients(model, output))


def test_pivotal_patches_are_the_most_important_cluster():
    model, (images, _) = small(PARTICLE, clusters=3)
    model.eval()
    masks = model.pivotal_patches(images)
    _, tokens = model.momentum_encoder.tokens(images)
    importance = attention_product(model.momentum_encoder.with_attention(images, "row")[1])
    for i in range(6):
        first = int(importance[i].argmax())
        assignment = torch.tensor(cluster_by_loops(tokens[i].detach(), first, 3))
        means = {k: importance[i][assignment == k].mean().item() for k in assignment.tolist()}
        assert torch.equal(masks[i], assignment == max(means, key=means.get))


def test_absent_cluster_is_never_most_important(monkeypatch):
    """Use two tokens for three clusters; an absent one has mean 0, above log importance."""
    model, (images, _) = small(PARTICLE, clusters=3)
    tokens = F.one_hot(torch.tensor([0, 1] * 8), 4).float().expand(6, 16, 4)
    importance = torch.where(tokens[..., 1] > 0, -2.0, -3.0)
    monkeypatch.setattr(model, "momentum_tokens", lambda images: (tokens, importance))
    assert torch.equal(model.pivotal_patches(images), tokens[..., 1] > 0)


def test_invalid_number_of_clusters_raises():
    for clusters in (1, 17):
        with pytest.raises(UserError, match=r"in \[2, 16\]"):
            small(PARTICLE, clusters=clusters)


@pytest.mark.parametrize("cls, loss", [(CVSA, "contrast_loss"), (PARTICLE, "part_loss")])
def test_passes_and_chance_levels(cls, loss, monkeypatch):
    model, views = small(cls)
    passes = record_passes(monkeypatch, model)
    model(*views)
    assert [len(images) for images in passes.values()] == [2, 2]
    with torch.no_grad():  # the loss of equal features
        for head in (model.predictor, model.momentum_projector):
            head[-1] = torch.nn.Identity()
            head[-2].weight.zero_()
    output, levels = model(*views), model.chance_levels(6)
    rows = output.shared_parts * 6 * 5 if cls is PARTICLE else torch.tensor(6.0)
    assert output[1].item() == pytest.approx((2 * 2 * 0.2 * rows.log()).item(), rel=1e-4)
    assert levels[loss] == pytest.approx(2 * 2 * 0.2 * torch.tensor(
        30.0 if cls is PARTICLE else 6.0).log().item())
    assert cls is PARTICLE or levels["alignment_loss"] == pytest.approx(
        alignment_loss(torch.full((2, 16), 1 / 17), output.masks[0][:2]).item())


# --- as methods -------------------------------------------------------------------------------


@CLASSES
@pytest.mark.usefixtures("elsewhere")
def test_trains_logs_draws_and_evaluates(cls, flowers, capsys, quick_probe):
    options = ["--data", str(flowers), *SMALL, "--workers", "0", "--epochs", "2", "--method",
               f"{FOLDER / FILES[cls]}:{cls.__name__}", "--amp", "bf16"]
    scalars = {CVSA: ["contrast_loss", "alignment_loss"],
               PARTICLE: ["part_loss", "shared_parts"]}[cls]
    if cls is PARTICLE:  # 4 patches
        options += ["--method-option", "clusters=3"]
    train.main([*options, "--out", "run"])
    assert scalars[0] in capsys.readouterr().out.split("epoch 1/2")[1].split()
    with open("run/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[2:3 + len(scalars)] == ["total", *scalars]
    film = torch.load("run/checkpoint.pt", weights_only=True)["film"]
    assert [epoch for epoch, _ in film] == [0, 1, 2] and film[0][1].shape == (8, 4)
    assert Path("run/run.png").is_file()
    evaluation.main(["masks", "run", "--device", "cpu", "--workers", "0"])
    results = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    evaluation.main(["knn", "run", "--device", "cpu", "--workers", "0", "--features", "mean"])
    assert "top1" in json.loads(Path("run/eval.json").read_text(encoding="utf-8"))["mean"]["knn"]
    assert "top1" in results["linear"] and "untrained" in results
    train.main([*options, "--init", "run", "--epochs", "1", "--out", "second"])
    assert "initial" in json.loads(Path("second/eval.json").read_text(encoding="utf-8"))
