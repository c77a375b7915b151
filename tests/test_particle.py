"""PARTICLE: k-means, part discovery on planted parts, and its loss against loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

import part_discovery
from lodisc import MoCoV3, UserError, VisionTransformer, create_vit
from part_discovery import (Maps, at_twice_the_size, block_parts, cluster_block, describe_patches,
                            discover_parts, kmeans, majority_ids, salient_clusters)
from particle import PARTICLE, id_means, part_loss

SEEDS = st.integers(0, 2**32 - 1)


def drawing(seed):
    return torch.Generator().manual_seed(seed)


def small(**options):
    torch.manual_seed(0)
    model = PARTICLE(create_vit("vit_nano", 32, 8), hidden_dim=64, output_dim=32, **options)
    return model, torch.randn(2, 6, 3, 32, 32), random_maps(6, 32, 8, model.clusters)


def random_maps(batch, size, patch_size, clusters, seed=0):
    """Maps of both views that are constant on patches: uint8 (B, H, W) each."""
    grid = torch.randint(0, 1 + clusters, (2, batch, size // patch_size, size // patch_size),
                         generator=drawing(seed), dtype=torch.uint8)
    return tuple(grid.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3))


# --- k-means ----------------------------------------------------------------------------------


def clouds(clusters, members, dim=8, spread=0.05):
    centres = torch.linalg.qr(torch.randn(dim, dim))[0][:clusters]
    points = centres.repeat_interleave(members, 0) + spread * torch.randn(clusters * members, dim)
    return points, torch.arange(clusters).repeat_interleave(members), centres


def partition(assignment):
    """Return whether each pair of points is in one cluster, whatever its index."""
    return assignment[:, None] == assignment[None]


def test_kmeans_finds_separated_clouds_in_any_order():
    points, truth, centres = clouds(5, 20)
    order = torch.randperm(100)
    for shuffled, expected in ((points, truth), (points[order], truth[order])):
        found, assignment, error = kmeans(shuffled, 5, drawing(0))
        assert torch.equal(partition(assignment), partition(expected))
        assert error == pytest.approx((shuffled - found[assignment]).square().sum(1).mean().item(),
                                      rel=1e-3)
        assert torch.cdist(found, centres).min(1).values.max() < 0.1


@given(st.integers(1, 6), st.integers(1, 40), SEEDS)
def test_kmeans_assigns_the_nearest_centre_and_is_deterministic(clusters, count, seed):
    points = torch.randn(max(count, clusters), 4, generator=drawing(seed))
    centres, assignment, error = kmeans(points, clusters, drawing(seed))
    distances = torch.cdist(points, centres).square()
    assert (distances.gather(1, assignment[:, None])[:, 0] <= distances.min(1).values + 1e-4).all()
    assert error == pytest.approx(distances.min(1).values.mean().item(), abs=1e-4)
    again = kmeans(points, clusters, drawing(seed))
    assert torch.equal(centres, again[0]) and torch.equal(assignment, again[1])


def test_kmeans_takes_the_best_restart():
    points, generator = torch.randn(60, 2), drawing(0)
    errors = [kmeans(points, 12, generator, restarts=1)[2] for _ in range(5)]
    assert max(errors) > 1.02 * min(errors)
    assert kmeans(points, 12, drawing(0), restarts=5)[2] == min(errors)


def test_features_that_are_not_finite_are_a_mistake_of_the_user():
    model, _, _ = small()
    with torch.no_grad():
        model.encoder.blocks[0].mlp.fc2.weight.mul_(1e38)
    with pytest.raises(UserError, match="features are not finite"):
        model.annotate(Pictures(3))
    points = torch.full((5, 2), math.nan)
    assert math.isnan(kmeans(points, 2, drawing(0), restarts=1)[2])  # it ends


def test_discovery_leaves_the_random_stream_alone():
    model, _, _ = small()
    state = torch.get_rng_state()
    model.annotate(Pictures(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_kmeans_of_equal_points_has_empty_clusters():
    centres, assignment, error = kmeans(torch.ones(7, 3), 4, drawing(0))
    assert assignment.tolist() == [0] * 7 and error == pytest.approx(0, abs=1e-6)
    assert centres.isfinite().all()


def test_number_of_clusters_is_where_the_error_stops_falling():
    for clusters in (3, 7):
        points, truth, _ = clouds(clusters, 200, dim=16, spread=0.05)
        centres, assignment = cluster_block(points, drawing(0))
        assert len(centres) in (clusters + 1, clusters + 2)  # the first that helps little
        merged = partition(assignment) & ~partition(truth)
        assert not merged.any()
    points, _, _ = clouds(16, 10, dim=32, spread=0.01)
    assert len(cluster_block(points, drawing(0))[0]) == part_discovery.MOST
    assert len(cluster_block(points[:2], drawing(0))[0]) <= 2


# --- discovery --------------------------------------------------------------------------------


def test_votes_match_loops():
    saliency = torch.rand(8, 12) * 0.13
    assignment = torch.randint(0, 5, (8, 12))
    assignment[0][assignment[0] == 3] = 0  # absent there: no vote
    expected = []
    for cluster in range(5):
        votes = 0
        for values, of_image in zip(saliency, assignment):
            inside = values[of_image == cluster]
            votes += len(inside) > 0 and inside.mean().item() > 0.065
        expected.append(votes >= 0.75 * 8)
    assert salient_clusters(assignment, saliency, 5).tolist() == expected
    saliency[:] = 0.06
    saliency[:6, :] = 0.07  # 6 of 8 images
    assert salient_clusters(torch.zeros(8, 12, dtype=torch.long), saliency, 1).tolist() == [True]
    saliency[5, :] = 0.06
    assert salient_clusters(torch.zeros(8, 12, dtype=torch.long), saliency, 1).tolist() == [False]


def planted(images=6, patches=40, parts=3, dim=16):
    """Descriptors of a ground (two clouds) and of parts, and the truth: 0, or 1 to the parts."""
    centres = torch.linalg.qr(torch.randn(dim, dim))[0][:parts + 2]
    truth = torch.randint(0, parts + 2, (images, patches))  # the last two are ground
    descriptors = centres[truth] + 0.02 * torch.randn(images, patches, dim)
    is_part = truth < parts
    return descriptors, torch.where(is_part, 0.5, 0.01), torch.where(is_part, truth + 1, 0)


def test_planted_parts_are_found():
    descriptors, saliency, truth = planted()
    ids, has_foreground, has_background = block_parts(descriptors, saliency, 3, drawing(0))
    assert has_foreground and has_background and ids.dtype == torch.uint8
    assert torch.equal(ids == 0, truth == 0)
    assert torch.equal(partition(ids.flatten()), partition(truth.flatten()))
    assert ids.unique().tolist() == [0, 1, 2, 3]


def test_block_without_foreground_or_background():
    descriptors, saliency, _ = planted()
    ids, has_foreground, has_background = block_parts(descriptors, 0 * saliency, 3, drawing(0))
    assert not has_foreground and has_background and (ids == 0).all()
    ids, has_foreground, has_background = block_parts(descriptors, 0 * saliency + 1, 3, drawing(0))
    assert has_foreground and not has_background and ids.unique().tolist() == [1, 2, 3]


def test_fewer_foreground_patches_than_clusters():
    descriptors, saliency, truth = planted(images=1, patches=20)
    few = (truth > 0).flatten().nonzero()[:2].flatten()
    saliency = torch.zeros(1, 20)
    saliency[0, few] = 1
    descriptors[0, few] = -descriptors[0, few]  # a cluster of their own
    ids, has_foreground, _ = block_parts(descriptors, saliency, 5, drawing(0))
    assert has_foreground and 1 <= ids.max() <= 5 and ids.float().isfinite().all()


class Pictures(Dataset):
    """Left half of one colour, right half of another; sizes differ."""

    def __init__(self, count, targets=None):
        self.targets = list(range(count)) if targets is None else targets
        generator = np.random.default_rng(0)
        self.images = []
        for i in range(count):
            pixels = generator.integers(0, 90, (24 + i, 30, 3), dtype=np.uint8)
            pixels[:, :15, i % 3] += 150
            self.images.append(Image.fromarray(pixels))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


def test_maps_have_the_size_of_their_images_and_labels_change_nothing(capsys):
    model, _, _ = small()
    maps = model.annotate(Pictures(35))
    assert [tuple(image_map.shape) for image_map in maps] == [(24 + i, 30) for i in range(35)]
    assert all(image_map.dtype == torch.uint8 for image_map in maps)
    printed = capsys.readouterr().out
    assert "part discovery: 35 images in 2 blocks; without foreground" in printed
    shuffled = model.annotate(Pictures(35, [7] * 35))
    assert all(map(torch.equal, maps, shuffled))


def test_blocks_are_drawn_and_counted(monkeypatch, capsys):
    """Order by seed 0, 30 at a time; images of blocks without foreground or background counted."""
    seen, real = [], part_discovery.describe_patches

    def describe(encoder, images):
        seen.append(images)
        return real(encoder, images)

    results = iter([(0, False, True), (2, True, False)])

    def parts(descriptors, saliency, clusters, generator):
        value, *found = next(results)
        return torch.full(saliency.shape, value, dtype=torch.uint8), *found

    monkeypatch.setattr(part_discovery, "describe_patches", describe)
    monkeypatch.setattr(part_discovery, "block_parts", parts)
    model, _, _ = small()
    pictures = Pictures(40)
    maps = discover_parts(model.encoder, pictures)
    assert [tuple(images.shape) for images in seen] == [(30, 3, 64, 64), (10, 3, 64, 64)]
    assert capsys.readouterr().out == (
        "part discovery: 40 images in 2 blocks; without foreground 1 blocks, 30 images; without "
        "background 1 blocks, 10 images\n")
    order = torch.randperm(40, generator=drawing(0)).tolist()
    assert order[:30] != list(range(30))
    assert [int(maps[i].max()) for i in order] == [0] * 30 + [2] * 10


def test_descriptors_are_keys_of_the_last_layer():
    encoder = VisionTransformer(32, 8, 24, 2, 3, registers=2)
    images = torch.randn(4, 3, 32, 32)
    descriptors, saliency = describe_patches(encoder, images)
    inputs = []
    handle = encoder.blocks[-1].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    _, attentions = encoder.with_attention(images, "matrix")
    handle.remove()
    qkv = encoder.blocks[-1].attn.qkv(encoder.blocks[-1].norm1(inputs[0]))  # (4, 19, 72)
    keys = qkv[:, 3:, 24:48]
    assert torch.allclose(descriptors, keys / keys.norm(dim=2, keepdim=True), atol=1e-6)
    row = attentions[-1][:, 0, 3:]
    for values, expected in zip(saliency, row):
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert torch.allclose(values, expected, atol=1e-5)
    assert not encoder.blocks[-1].attn.qkv._forward_hooks


def test_encoder_of_twice_the_size_has_interpolated_positions():
    encoder = create_vit("vit_nano", 32, 8)
    large = at_twice_the_size(encoder)
    assert large.image_size == 64 and large.num_patches == 64
    assert torch.equal(large.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)
    grid = encoder.pos_embed[0, 1:].T.view(1, 96, 4, 4)
    fine = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True)
    assert torch.allclose(large.pos_embed[0, 1:].T.view(1, 96, 8, 8), fine)
    assert encoder.image_size == 32 and not any(p.requires_grad for p in large.parameters())


def test_maps_are_enlarged_row_by_row():
    maps = Maps(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), [(6, 4)])
    assert maps[0].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    assert len(list(maps)) == 1


# --- the loss ---------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(2, 6), SEEDS)
def test_majority_ids_match_loops(batch, ids, seed):
    maps = torch.randint(0, ids, (batch, 12, 12), generator=drawing(seed), dtype=torch.uint8)
    found = majority_ids(maps, 4, ids)
    for image_map, row in zip(maps, found.tolist()):
        for patch, value in enumerate(row):
            y, x = 4 * (patch // 3), 4 * (patch % 3)
            counts = image_map[y:y + 4, x:x + 4].flatten().bincount(minlength=ids).tolist()
            assert value == counts.index(max(counts))


def loss_by_loops(queries, own, other, present, in_other, temperature):
    """One view's loss: queries {(image, id): vector}, keys of this view and of the other."""
    losses = []
    for i, c in present:
        if (i, c) not in in_other:
            losses.append(torch.zeros(()))
            continue
        keys = [other[key] for key in sorted(in_other)]
        keys += [own[key] for key in sorted(present) if key != (i, c)]
        cosines = [F.cosine_similarity(queries[i, c], key, dim=0) / temperature for key in keys]
        positive = F.cosine_similarity(queries[i, c], other[i, c], dim=0) / temperature
        losses.append(torch.stack(cosines).exp().sum().log() - positive)
    return torch.stack(losses).mean()


def by_loops(model, views, maps):
    """PARTICLE's part loss, and the fraction of shared ids, by loops over images, views, ids."""
    sides = []
    for view, view_map in zip(views, maps):
        ids = majority_ids(view_map, 8, 1 + model.clusters)
        _, tokens = model.encoder.tokens(view)
        with torch.no_grad():
            _, targets = model.momentum_encoder.tokens(view)
        queries, keys = {}, {}
        for i in range(len(view)):
            for c in ids[i].unique().tolist():
                inside = ids[i] == c
                head = model.part_projector(tokens[i][inside].mean(0))
                queries[i, c] = model.part_predictor(head)
                with torch.no_grad():
                    keys[i, c] = model.momentum_part_projector(targets[i][inside].mean(0))
        sides.append((queries, keys))
    (q1, k1), (q2, k2) = sides
    loss = (loss_by_loops(q1, k1, k2, list(k1), list(k2), model.part_temperature)
            + loss_by_loops(q2, k2, k1, list(k2), list(k1), model.part_temperature))
    return loss, 2 * len(k1.keys() & k2.keys()) / (len(k1) + len(k2))


@pytest.mark.parametrize("options", [{}, {"clusters": 2, "weight": 0.5, "temperature": 0.3}])
def test_loss_and_gradient_match_loops(options):
    model, views, maps = small(**options)
    output = model(*views, maps=maps)
    loss, shared = by_loops(model, views, maps)
    assert 0 < shared and (options or shared < 1)
    assert output.part_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert output.shared_parts.item() == pytest.approx(shared)
    assert output.total.item() == pytest.approx(
        (output.global_loss + model.weight * output.part_loss).item())
    heads = [*model.part_projector.parameters(), *model.part_predictor.parameters(),
             *model.encoder.blocks.parameters()]
    for ours, other in zip(torch.autograd.grad(output.part_loss, heads),
                           torch.autograd.grad(loss, heads)):
        assert torch.allclose(ours, other, atol=1e-5)


def test_maps_that_are_all_0_have_the_background_alone():
    model, views, _ = small()
    empty = torch.zeros(6, 32, 32, dtype=torch.uint8)
    output = model(*views, maps=(empty, empty))
    loss, _ = by_loops(model, views, (empty, empty))
    assert output.part_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert output.shared_parts.item() == 1


def test_ids_without_a_counterpart_count_0_and_stay_in_the_mean():
    queries, own, other = torch.randn(3, 2, 2, 8)
    present = torch.ones(2, 2, dtype=torch.bool)
    in_other = torch.tensor([[True, False], [True, True]])
    queries.requires_grad_()
    loss = part_loss(queries, own, other, present, in_other, 0.1)
    loss.backward()
    assert (queries.grad[0, 1] == 0).all() and (queries.grad[1] != 0).any()
    alone = part_loss(queries, own, other, in_other, in_other, 0.1)
    assert alone.isfinite()
    none = part_loss(queries, own, other, torch.tensor([[True, False]] * 2),
                     torch.tensor([[False, True]] * 2), 0.1)
    assert none.item() == 0 and torch.autograd.grad(none, queries)[0].abs().max() == 0


def test_equal_features_give_the_stated_chance_level():
    model, views, _ = small()
    maps = torch.arange(16, dtype=torch.uint8).remainder(6).view(4, 4)
    maps = maps.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(6, 32, 32)
    with torch.no_grad():
        for head in (model.part_predictor, model.momentum_part_projector):
            head[-1].weight.zero_()
        for head in (model.predictor, model.momentum_projector):
            head[-1] = torch.nn.Identity()
            head[-2].weight.zero_()
    output, levels = model(*views, maps=(maps, maps)), model.chance_levels(6)
    assert output.shared_parts.item() == 1
    assert levels["part_loss"] == pytest.approx(2 * math.log(2 * 6 * 6 - 1))
    for name, level in levels.items():
        assert getattr(output, name).item() == pytest.approx(level, rel=1e-4)


def test_no_gradient_reaches_the_momentum_side():
    model, views, maps = small()
    model(*views, maps=maps).total.backward()
    for module in (model.momentum_encoder, model.momentum_projector,
                   model.momentum_part_projector):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_part_loss_it_is_mocov3():
    """The same initial weights, losses and gradients of everything that MoCo v3 has."""
    model, views, maps = small(weight=0.0)
    torch.manual_seed(0)
    mocov3 = MoCoV3(create_vit("vit_nano", 32, 8), hidden_dim=64, output_dim=32)
    output, expected = model(*views, maps=maps), mocov3(*views)
    assert output.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    output.total.backward()
    expected.total.backward()
    mine = dict(model.named_parameters())
    for name, weight in mocov3.named_parameters():
        assert torch.equal(weight, mine[name])
        if weight.grad is not None:
            difference = (weight.grad - mine[name].grad).abs().max()
            assert difference <= 1e-4 * weight.grad.abs().max() + 1e-5


def test_momentum_part_projector_moves():
    model, views, maps = small()
    with torch.no_grad():
        model.part_projector[0].weight.add_(1)
    before = model.momentum_part_projector[0].weight.clone()
    model.update_momentum(0.75)
    moved = before + 0.25 * (model.part_projector[0].weight - before)
    assert torch.allclose(model.momentum_part_projector[0].weight, moved)


def test_part_features_are_float32_under_autocast():
    tokens, ids = torch.randn(4, 30, 16), torch.randint(0, 3, (4, 30))
    expected, _ = id_means(tokens, ids, 3)
    with torch.autocast("cpu", torch.bfloat16):
        means, present = id_means(tokens, ids, 3)
    assert means.dtype == torch.float32 and torch.equal(means, expected) and present.all()


@pytest.mark.parametrize("option", [{"clusters": 0}, {"clusters": 2.5}, {"clusters": 256},
                                    {"clusters": True}, {"temperature": 0}, {"temperature": "low"},
                                    {"weight": "abc"}, {"weight": -1}, {"weight": math.nan}])
def test_invalid_options_raise(option):
    with pytest.raises(UserError, match=next(iter(option))):
        small(**option)


def test_every_image_has_its_own_map(monkeypatch):
    """Grey images, whose map is their grey."""
    pictures = Pictures(40)
    pictures.images = [Image.new("RGB", (8, 8), (5 * i,) * 3) for i in range(40)]

    def describe(encoder, images):
        return images, images.mean((1, 2, 3))[:, None].expand(-1, encoder.num_patches)

    monkeypatch.setattr(part_discovery, "describe_patches", describe)
    monkeypatch.setattr(part_discovery, "block_parts", lambda descriptors, greys, *args: (
        (255 * greys).round().to(torch.uint8), True, True))
    encoder = create_vit("vit_nano", 32, 8)
    encoder.mean, encoder.std = (0.0,) * 3, (1.0,) * 3
    maps = discover_parts(encoder, pictures)
    assert [image_map.unique().tolist() for image_map in maps] == [[5 * i] for i in range(40)]
