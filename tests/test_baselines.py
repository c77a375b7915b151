"""CVSA and PARTICLE against reference loops, and as methods of train.py and eval.py."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import baselines
import eval as evaluation
import train
from baselines import (CVSA, PARTICLE, alignment_loss, cluster, part_means, swap_background)
from lodisc import (IMPORTANCES, LoDisc, UserError, VisionTransformer, contrastive_loss, create_vit,
                    location_mask)

FILE = Path(__file__).with_name("baselines.py")
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
    row = torch.zeros(2, 3, 5)
    row[:, :, 0] = 0.5  # the class token's own weight does not count
    row[:, :, 1:] = 0.5 * masks[:, None] / masks.sum(1)[:, None, None]
    assert alignment_loss(row, masks).item() == pytest.approx(0, abs=1e-6)
    even = torch.full((2, 3, 5), 0.2)
    level = (torch.tensor(2.0).log() + torch.tensor(4.0).log()) / 2  # 2 and 1 of 4 patches
    assert alignment_loss(even, masks).item() == pytest.approx(level.item(), rel=1e-5)
    outside = row * 0
    outside[:, :, 1:] = ~masks[:, None]
    assert alignment_loss(outside, masks).item() == pytest.approx(-torch.tensor(1e-6).log().item())
    logits = torch.randn(2, 3, 5, requires_grad=True)
    alignment_loss(logits.softmax(-1), masks).backward()
    inside = masks[:, None].expand(2, 3, 4)
    assert (logits.grad[:, :, 1:][inside] < 0).all() and (logits.grad[:, :, 1:][~inside] > 0).all()


def test_cvsa_matches_its_equations(monkeypatch):
    model, (view1, view2) = small(CVSA, weight=0.5)
    output = model(view1, view2)
    masks, keys, queries, aligned = [], [], [], []
    with torch.no_grad():
        for view in (view1, view2):
            features, attentions = model.momentum_encoder(view, attention="row")
            keys.append(model.momentum_projector(features))
            masks.append(location_mask(IMPORTANCES["product"][0](attentions), 0.3))
    for view, mask in zip((view1, view2), masks):
        features, attentions = model.encoder(swap_background(view, mask, 8), attention="full")
        queries.append(model.predictor(model.projector(features)))
        patches = attentions[-1].mean(1)[:, 0, 1:]
        fraction = (patches / patches.sum(1, keepdim=True) * mask).sum(1)
        aligned.append(-fraction.log().mean())
    contrast = (contrastive_loss(queries[0], keys[1], 0.2)
                + contrastive_loss(queries[1], keys[0], 0.2))
    alignment = (aligned[0] + aligned[1]) / 2
    assert torch.allclose(output.contrast_loss, contrast, atol=1e-5)
    assert torch.allclose(output.alignment_loss, alignment, atol=1e-5)
    assert torch.allclose(output.total, contrast + 0.5 * alignment, atol=1e-5)
    assert all(map(torch.equal, output.masks, masks))


def test_cvsa_keys_are_of_unswapped_views(monkeypatch):
    model, views = small(CVSA)
    seen = {"encoder": [], "momentum_encoder": []}
    for name, calls in seen.items():
        getattr(model, name).register_forward_pre_hook(lambda _, args, calls=calls:
                                                       calls.append(args[0]))
    model(*views)
    assert [torch.equal(*pair) for pair in zip(seen["momentum_encoder"], views)] == [True, True]
    assert len(seen["encoder"]) == 2
    assert not any(torch.equal(*pair) for pair in zip(seen["encoder"], views))


def test_swapped_views_preserve_kept_patches_only(tmp_path, few_birds):
    """Save eight birds above their swapped views, for visual inspection."""
    data = train.load_data()
    views = train.augment.TwoViews(data.train, 48, (0.5,) * 3, (0.5,) * 3, 0)
    images = torch.stack([views[0, i][0] for i in range(8)])
    model = CVSA(create_vit("vit_nano", 48, 8), hidden_dim=8, output_dim=8)
    swapped = swap_background(images, model.masks(images), 8)
    rows = [torch.cat(list(batch), dim=2) for batch in (images, swapped)]
    pixels = ((torch.cat(rows, dim=1) * 0.5 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).resize((8 * 144, 2 * 144), 0).save(tmp_path / "swapped.png")
    kept = model.masks(images).float().mean().item()
    same_pixels = (images == swapped).all(1).float().mean().item()
    assert kept <= same_pixels < kept + 0.05


# --- PARTICLE ---------------------------------------------------------------------------------


def cluster_by_loops(points, first, parts, iterations=5):
    points = F.normalize(points, dim=1)
    centres = [points[first]]
    while len(centres) < parts:
        nearest = [max(float(point @ centre) for centre in centres) for point in points]
        centres.append(points[min(range(len(points)), key=nearest.__getitem__)])

    def assign():
        return [max(range(parts), key=lambda k, point=point: float(point @ centres[k]))
                for point in points]

    for _ in range(iterations):
        assignment = assign()
        for k in range(parts):
            members = [point for point, own in zip(points, assignment) if own == k]
            if members:
                centres[k] = F.normalize(torch.stack(members).sum(0), dim=0)
    return assign()


@pytest.mark.parametrize("seed", range(5))
def test_cluster_matches_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(4, 18, 6, generator=generator, dtype=torch.float64)
    first = torch.randint(18, (4,), generator=generator)
    found = cluster(points, first, 5)
    assert found.tolist() == [cluster_by_loops(one, int(start), 5)
                              for one, start in zip(points, first)]


def separated(parts=4, members=6, dim=8):
    centres = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0][:parts]
    points = centres.repeat_interleave(members, 0) + 0.1 * torch.randn(parts * members, dim,
                                                                       dtype=torch.float64)
    return points[None], torch.arange(parts).repeat_interleave(members)


def partition(assignment):
    """Return whether each pair of points is in one part, whatever the parts' indices."""
    return assignment[:, None] == assignment[None]


def test_cluster_is_invariant_to_order_and_rotation():
    points, truth = separated()
    found = cluster(points, torch.tensor([0]), 4)[0]
    assert torch.equal(partition(found), partition(truth))
    order = torch.randperm(24)
    start = (order == 0).nonzero()[0]
    assert torch.equal(cluster(points[:, order], start, 4)[0], found[order])
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert torch.equal(cluster(points @ rotation, torch.tensor([0]), 4)[0], found)


def test_empty_clusters_stay_empty():
    points = F.one_hot(torch.tensor([0, 0, 1, 1, 0]), 4).float()[None]  # two distinct points
    found = cluster(points, torch.tensor([0]), 5)
    assert found.unique().tolist() == [0, 1]
    means, present = part_means(points, found, 5)
    assert present.tolist() == [[True, True, False, False, False]] and means.isfinite().all()


def test_clusters_and_means_are_float32_under_autocast():
    points = torch.randn(8, 300, 16)
    first = torch.zeros(8, dtype=torch.long)
    expected = cluster(points, first, 5)
    means, _ = part_means(points, expected, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cluster(points, first, 5), expected)
        again, _ = part_means(points, expected, 5)
    assert again.dtype == torch.float32 and torch.equal(again, means)


def test_cluster_breaks_ties_by_lowest_index():
    points = torch.eye(4)[None]  # all cosines 0: each next centre is the lowest index left
    assert cluster(points, torch.tensor([2]), 3).tolist() == [[1, 2, 0, 0]]


def by_loops(model, view1, view2):
    """Compute PARTICLE's loss and fraction of shared parts by loops over images and parts."""
    with torch.no_grad():
        targets, importances = [], []
        for view in (view1, view2):
            tokens, attentions = model.momentum_encoder.tokens(view, attention="row")
            targets.append(tokens[:, 1:])
            importances.append(IMPORTANCES["product"][0](attentions))
    online = [model.encoder.tokens(view)[0][:, 1:] for view in (view1, view2)]
    rows, patches = [[], [], [], []], online[0].shape[1]
    for i in range(len(view1)):
        points = torch.cat([targets[0][i], targets[1][i]])
        assignment = torch.tensor(cluster_by_loops(points, int(importances[0][i].argmax()),
                                                   model.parts))
        own = assignment[:patches], assignment[patches:]
        for part in range(model.parts):
            if all((one == part).any() for one in own):
                for row, tokens, one in zip(rows, (*online, *targets), (*own, *own)):
                    row.append(tokens[i][one == part].mean(0))
    q1, q2, k1, k2 = map(torch.stack, rows)
    with torch.no_grad():
        k2, k1 = model.momentum_projector(k2), model.momentum_projector(k1)
    q1, q2 = (model.predictor(model.projector(q)) for q in (q1, q2))
    loss = contrastive_loss(q1, k2, 0.2) + contrastive_loss(q2, k1, 0.2)
    return loss, len(q1) / (len(view1) * model.parts)


def test_particle_matches_loops():
    model, views = small(PARTICLE)
    output = model(*views)
    loss, shared = by_loops(model, *views)
    assert 0 < shared < 1  # some part is in one view only
    assert torch.allclose(output.part_loss, loss, atol=1e-5) and output.total is output.part_loss
    assert output.shared_parts.item() == pytest.approx(shared)
    assert not output.shared_parts.requires_grad and output.masks is None


def gradients(model, output):
    model.zero_grad()
    output.total.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_parts_in_one_view_only_are_ignored(monkeypatch):
    model, views = small(PARTICLE)
    clean = model(*views)
    expected, real = gradients(model, clean), baselines.part_means

    def with_nan(tokens, assignment, parts):
        means, present = real(tokens, assignment, parts)
        return means.masked_fill(~present[:, :, None], torch.nan), present

    monkeypatch.setattr(baselines, "part_means", with_nan)
    output = model(*views)
    assert torch.equal(output.total, clean.total) and output.shared_parts < 1
    assert all(map(torch.equal, gradients(model, output), expected))


def test_no_gradient_through_assignments_and_keys():
    model, views = small(PARTICLE)
    found = gradients(model, model(*views))
    assert all(gradient.isfinite().all() for gradient in found)
    assert all(p.grad is None for module in (model.momentum_encoder, model.momentum_projector)
               for p in module.parameters())
    # the loss with the same assignments and keys as constants has the same gradient
    loss, _ = by_loops(model, *views)
    model.zero_grad()
    loss.backward()
    others = [p.grad for p in model.parameters() if p.requires_grad]
    assert max(g.abs().max() for g in others) > 1e-3
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, others))


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_shared_parts_give_zero_loss_with_graph(monkeypatch, rows):
    model, views = small(PARTICLE)

    def only(tokens, assignment, parts):
        means, present = part_means(tokens, assignment, parts)
        keep = torch.zeros_like(present)
        keep.view(-1)[:rows] = True
        return means, keep

    monkeypatch.setattr(baselines, "part_means", only)
    output = model(*views)
    assert output.total.item() == 0
    found = gradients(model, output)  # one for every parameter, as DDP needs
    assert all((gradient == 0).all() for gradient in found)


def test_masks_are_the_most_important_part():
    model, (images, _) = small(PARTICLE, parts=3)
    model.eval()
    masks = model.masks(images)
    tokens, attentions = model.momentum_encoder.tokens(images, attention="row")
    importance = IMPORTANCES["product"][0](attentions)
    for i in range(6):
        assignment = torch.tensor(cluster_by_loops(tokens[i, 1:].detach(),
                                                   int(importance[i].argmax()), 3))
        means = [importance[i][assignment == part].mean().item() if (assignment == part).any()
                 else -float("inf") for part in range(3)]
        assert torch.equal(masks[i], assignment == means.index(max(means)))


def test_absent_part_is_never_most_important(monkeypatch):
    """Use two distinct tokens for three parts; an absent part has mean 0, above log importance."""
    model, (images, _) = small(PARTICLE, parts=3)
    tokens = F.one_hot(torch.tensor([0, 1] * 8), 4).float().expand(6, 16, 4)
    importance = torch.where(tokens[..., 1] > 0, -2.0, -3.0)
    monkeypatch.setattr(model, "momentum_tokens", lambda images: (tokens, importance))
    assert torch.equal(model.masks(images), tokens[..., 1] > 0)


def test_invalid_number_of_parts_raises():
    for parts in (1, 17):
        with pytest.raises(UserError, match=r"in \[2, 16\]"):
            small(PARTICLE, parts=parts)


@pytest.mark.parametrize("cls, loss", [(CVSA, "contrast_loss"), (PARTICLE, "part_loss")])
def test_passes_and_chance_levels(cls, loss, monkeypatch):
    model, views = small(cls)
    passes, real = [], VisionTransformer.tokens
    monkeypatch.setattr(VisionTransformer, "tokens", lambda self, *args, **options: (
        passes.append(self is model.encoder), real(self, *args, **options))[1])
    model(*views)
    assert sorted(passes) == [False, False, True, True]
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
        alignment_loss(torch.full((2, 3, 17), 1 / 17), output.masks[0][:2]).item())


# --- as methods -------------------------------------------------------------------------------


@CLASSES
@pytest.mark.usefixtures("elsewhere")
def test_trains_logs_draws_and_evaluates(cls, flowers, capsys, quick_probe):
    options = ["--data", str(flowers), *SMALL, "--workers", "0", "--epochs", "2", "--method",
               f"{FILE}:{cls.__name__}", "--amp", "bf16"]
    own = {CVSA: ["contrast_loss", "alignment_loss"], PARTICLE: ["part_loss", "shared_parts"]}[cls]
    if cls is PARTICLE:  # 4 patches
        options += ["--method-option", "parts=3"]
    train.main([*options, "--out", "run"])
    assert all(name in capsys.readouterr().out.split("epoch 1/2")[1].split() for name in own[:1])
    with open("run/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[2:3 + len(own)] == ["total", *own]
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
