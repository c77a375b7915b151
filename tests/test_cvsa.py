"""CVSA after the abstract: boxes, pasting and alignment against loops over images."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cvsa import CVSA, alignment_loss, foreground_boxes, is_pasted, swap_foregrounds
from lodisc import UserError, VisionTransformer, contrastive_loss, create_vit
from part_discovery import discover_parts
from test_particle import Pictures, drawing


def small(**options):
    torch.manual_seed(0)
    model = CVSA(create_vit("vit_nano", 48, 8), hidden_dim=64, output_dim=32, **options)
    maps = torch.zeros(2, 6, 48, 48, dtype=torch.uint8)
    for i in range(6):  # rectangles of patches; the last image of view 1 has none
        maps[0, i, 8 * (i % 3):8 * (i % 3) + 16, 8:32] = i < 5
        maps[1, i, 8:24 + 8 * (i % 2), 16:40] = 1
    return model, torch.randn(2, 6, 3, 48, 48), tuple(maps)


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.9))
def test_boxes_are_the_smallest_rectangles(seed, empty):
    generator = drawing(seed)
    maps = torch.randint(0, 4, (3, 40, 40), generator=generator, dtype=torch.uint8)
    maps[torch.rand(3, 40, 40, generator=generator) < empty] = 0
    for image_map, box in zip(maps, foreground_boxes(maps, 8)):
        patches = [(y, x) for y in range(5) for x in range(5)
                   if (image_map[8 * y:8 * y + 8, 8 * x:8 * x + 8] > 0).float().mean() > 0.5]
        if not patches:
            assert box is None
            continue
        rows, columns = zip(*patches)
        assert box == (8 * min(rows), 8 * min(columns), 8 * max(rows) + 8, 8 * max(columns) + 8)


def test_views_are_pasted_unless_a_foreground_is_missing_or_would_be_stretched():
    box = (8, 8, 24, 24)
    assert is_pasted(box, (0, 0, 8, 32)) and is_pasted((0, 0, 8, 32), box)  # twice, half
    assert not is_pasted(box, (0, 0, 16, 40)) and not is_pasted((0, 0, 40, 16), box)
    assert not is_pasted(None, box) and not is_pasted(box, None)


def swap_by_loops(views, maps, size):
    """Every view by itself: pixels, foreground per patch, whether it was pasted."""
    boxes, swapped, places, pasted = foreground_boxes(maps, size), [], [], []
    for i in range(len(views)):
        j = (i + 1) % len(views)
        view, place = views[i].clone(), (maps[i] > 0).float()
        if boxes[i] and boxes[j]:
            (t, l, b, r), (top, left, bottom, right) = boxes[i], boxes[j]
            ratios = (b - t) / (bottom - top), (r - l) / (right - left)
            if all(0.5 <= ratio <= 2 for ratio in ratios):
                shape = bottom - top, right - left
                view = views[j].clone()
                view[:, top:bottom, left:right] = F.interpolate(
                    views[i][None, :, t:b, l:r], shape, mode="bilinear", align_corners=False)[0]
                moved = F.interpolate(place[None, None, t:b, l:r], shape, mode="bilinear",
                                      align_corners=False)[0, 0]
                place = torch.zeros_like(place)
                place[top:bottom, left:right] = moved
                pasted.append(i)
        swapped.append(view)
        places.append([place[y:y + size, x:x + size].mean().item()
                       for y in range(0, len(place), size) for x in range(0, len(place), size)])
    return torch.stack(swapped), torch.tensor(places), pasted


@given(st.integers(0, 2**32 - 1))
def test_swapped_views_match_loops(seed):
    generator = drawing(seed)
    views = torch.randn(5, 3, 40, 40, generator=generator)
    maps = torch.zeros(5, 40, 40, dtype=torch.uint8)
    for image_map in maps:
        top, left, height, width = torch.randint(0, 30, (4,), generator=generator).tolist()
        image_map[top:top + height, left:left + width] = 3
    swapped, fractions, pasted = swap_foregrounds(views, maps, 8)
    expected, places, indices = swap_by_loops(views, maps, 8)
    assert torch.allclose(swapped, expected, atol=1e-6)
    assert torch.allclose(fractions, places, atol=1e-5)
    assert pasted.nonzero().flatten().tolist() == indices


def test_the_object_stands_on_the_ground_of_the_next_image():
    """A bright object on black grounds of different greys, each in its own corner."""
    views, maps = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8)
    views[0], views[1] = -1, 1
    views[0, :, :16, :8], maps[0, :16, :8] = 5, 1
    views[1, :, 16:, 16:], maps[1, 16:, 16:] = 7, 1
    swapped, fractions, pasted = swap_foregrounds(views, maps, 8)
    assert pasted.all()
    assert (swapped[0, :, 16:, 16:] == 5).all() and (swapped[0, :, :16] == 1).all()
    assert not (swapped[0] == 7).any()  # covered
    assert (swapped[1, :, :16, :8] == 7).all() and (swapped[1, :, 16:] == -1).all()
    assert fractions.view(2, 4, 4)[0].tolist() == [[0] * 4] * 2 + [[0, 0, 1, 1]] * 2


def test_alignment_loss_is_of_images_with_foreground():
    row = torch.rand(4, 9).softmax(1)
    fractions = torch.rand(4, 9)
    fractions[2] = 0
    expected = [1 - sum(row[i] * fractions[i]) / row[i].norm() / fractions[i].norm()
                for i in (0, 1, 3)]
    assert alignment_loss(row, fractions).item() == pytest.approx(sum(expected).item() / 3)
    assert alignment_loss(row, 0 * fractions).item() == 0
    assert alignment_loss(fractions[:2], fractions[:2]).item() == pytest.approx(0, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert alignment_loss(row, fractions).dtype == torch.float32


def test_alignment_loss_attracts_attention_to_the_foreground():
    fractions = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.0]])
    logits = torch.zeros(2, 4, requires_grad=True)
    alignment_loss(logits.softmax(1), fractions).backward()
    assert (logits.grad[fractions == 1] < 0).all() and (logits.grad[fractions == 0] > 0).all()


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_output_matches_its_equations(weight):
    model, views, maps = small(weight=weight)
    output = model(*views, maps=maps)
    queries, keys, aligned, stay = [], [], [], 0
    for view, view_map in zip(views, maps):
        swapped, places, pasted = swap_by_loops(view, view_map, 8)
        stay += 6 - len(pasted)
        features, matrices = model.encoder.with_attention(swapped, "matrix")
        queries.append(model.predictor(model.projector(features)))
        row = matrices[-1][:, 0, 1:]
        has = places.sum(1) > 0
        aligned.append((1 - F.cosine_similarity(row[has], places[has])).mean())
        with torch.no_grad():
            keys.append(model.momentum_projector(model.momentum_encoder(view)))  # not swapped
    contrast = (contrastive_loss(queries[0], keys[1], 0.2)
                + contrastive_loss(queries[1], keys[0], 0.2))
    assert output.global_loss.item() == pytest.approx(contrast.item(), rel=1e-4)
    assert output.alignment_loss.item() == pytest.approx(sum(aligned).item() / 2, rel=1e-4)
    assert output.total.item() == pytest.approx(
        (contrast + weight * sum(aligned) / 2).item(), rel=1e-4)
    assert 0 < stay < 12 and output.not_pasted.item() == pytest.approx(stay / 12)


def test_passes_and_gradients(monkeypatch):
    model, views, maps = small()
    seen, real = {model.encoder: [], model.momentum_encoder: []}, VisionTransformer.encode

    def encode(self, images, *args, **options):
        seen[self].append(images)
        return real(self, images, *args, **options)

    monkeypatch.setattr(VisionTransformer, "encode", encode)
    model(*views, maps=maps).total.backward()
    online, momentum = seen.values()
    assert len(online) == 2 and not any(torch.equal(*pair) for pair in zip(online, views))
    assert len(momentum) == 2 and all(torch.equal(*pair) for pair in zip(momentum, views))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.momentum_encoder.parameters())


def test_foreground_is_that_of_the_parts_and_no_label_is_read():
    model, _, _ = small()
    pictures = Pictures(32)
    maps = list(model.annotate(pictures))
    assert all(image_map.shape == (24 + i, 30) for i, image_map in enumerate(maps))
    assert {value for image_map in maps for value in image_map.unique().tolist()} <= {0, 1}
    parts = list(discover_parts(model.encoder, pictures))
    assert all(torch.equal(image_map > 0, part > 0) for image_map, part in zip(maps, parts))
    other = model.annotate(Pictures(32, list(range(32))[::-1]))
    assert all(map(torch.equal, maps, other))


def test_drawn_views_frame_the_pasted_box():
    model, views, maps = small()
    (name, drawn), = model.drawn_views(views[1], maps[1]).items()
    swapped, _, pasted = swap_foregrounds(views[1], maps[1], 8)
    assert pasted.any() and drawn.shape == swapped.shape
    for i in range(6):
        changed = (drawn[i] != swapped[i]).any(0)
        assert changed.any() == pasted[i]
        if pasted[i]:
            top, left, bottom, right = foreground_boxes(maps[1], 8)[(i + 1) % 6]
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (
                top, bottom, left, right)


@pytest.mark.parametrize("weight", ["abc", -0.1])
def test_invalid_weight_raises(weight):
    with pytest.raises(UserError, match="weight must be a number from 0"):
        small(weight=weight)
