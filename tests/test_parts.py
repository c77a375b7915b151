"""Few-shot part segmentation: patch labels, sampling of shots, mean IoU, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import parts
import train
from data.augment import Preprocessing
from data.birds import Birds
from data.datasets import Data
from lodisc import UserError
from parts import PatchPixels, part_labels

COLOURS = np.array([(20, 20, 20), (220, 30, 30), (30, 220, 30), (30, 30, 220)], dtype=np.uint8)
SMALL = ["--image-size", "16", "--patch-size", "8", "--epochs", "1", "--batch-size", "50",
         "--device", "cpu", "--workers", "0", "--out"]


class Painted:
    """n images of 4 x 4 patches of 4 px, 16 px after the crop, each patch painted as its part."""

    parts = ("ground", "body", "head", "wing")

    def __init__(self, n, seed, parts=4):
        self.grids = np.random.default_rng(seed).integers(0, parts, (n, 4, 4)).astype(np.uint8)
        self.targets = [i % 3 for i in range(n)]

    def __len__(self):
        return len(self.targets)

    def part_map(self, i):
        return Image.fromarray(np.pad(np.kron(self.grids[i], np.ones((4, 4), np.uint8)), 1))

    def __getitem__(self, i):
        return Image.fromarray(COLOURS[np.asarray(self.part_map(i))]), self.targets[i]


def test_patch_label_is_majority_part_with_ties_to_the_lower():
    data = Painted(3, 0)
    assert np.array_equal(part_labels(data, range(3), 16, 4), data.grids.reshape(3, 16))
    labels = part_labels(data, [2], 16, 8)[0].reshape(2, 2)  # of four patches each
    for row in range(2):
        for column in range(2):
            four = data.grids[2, 2 * row:2 * row + 2, 2 * column:2 * column + 2].ravel()
            assert labels[row, column] == np.bincount(four).argmax()  # ties to the lower


def segment(encoders, train_set, test_set, shots):
    preprocessing = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
    return parts.segment_parts(encoders, Data(train_set, test_set), preprocessing, shots)


class Deaf(torch.nn.Module):
    """An encoder with constant tokens."""

    patch_size = 4

    def tokens(self, images):
        return torch.ones(len(images), 3), torch.ones(len(images), 16, 3)


def test_painted_parts_are_segmented_by_pixels_but_not_by_constant_tokens():
    encoders = {"raw pixels": PatchPixels(4), "deaf": Deaf()}
    rows = segment(encoders, Painted(30, 1), Painted(20, 2), 10)
    found, deaf = rows["raw pixels"]["parts"], rows["deaf"]["parts"]
    assert found["mean_iou"] > 0.99 and found["ground"] > 0.99 and len(found["draws"]) == 10
    assert deaf["mean_iou"] < 0.15  # one part everywhere
    assert found["shots"] == 10 and list(rows) == list(encoders)


def test_mean_iou_matches_loops(monkeypatch):
    """Score given predictions; intersection and union are summed over all images."""
    test, answers, seen = Painted(5, 3, parts=3), [], []  # no patch is wing
    generator = torch.Generator().manual_seed(0)

    def probe(train, test, seed=0, device="cpu", held_out=None):
        seen.append((train, held_out))
        answers.append(torch.randint(4, (len(test[1]),), generator=generator))
        return {"per_image": {"predicted": answers[-1].tolist()}}

    monkeypatch.setattr(evaluation, "linear_probe", probe)
    found = segment({"raw pixels": PatchPixels(4)}, Painted(30, 1), test, 20)
    found, true, expected = found["raw pixels"]["parts"], test.grids.ravel().tolist(), []
    for answer in answers:
        ious = []
        for part in range(3):
            both = sum(a == t == part for a, t in zip(answer.tolist(), true))
            either = sum(part in (a, t) for a, t in zip(answer.tolist(), true))
            ious.append(both / either)
        expected.append(ious)
    expected = torch.tensor(expected, dtype=torch.float64)
    means = expected[:, 1:].mean(1)  # body and head: no ground, and wing is absent
    assert found["draws"] == pytest.approx(means.tolist())
    assert found["mean_iou"] == pytest.approx(means.mean().item())
    assert found["std"] == pytest.approx(means.std().item(), rel=1e-5)
    assert [found[name] for name in ("ground", "body", "head")] == pytest.approx(
        expected.mean(0).tolist())
    assert "wing" not in found and found["per_image"]["last_draw"] == answers[-1].tolist()
    # held out by image: whole images of 16 patches, two of twenty
    (features, labels), held_out = seen[0]
    assert features.shape == (20 * 16, 48) and labels.shape == (320,)
    whole = held_out.view(20, 16)
    assert torch.equal(whole.all(1), whole.any(1)) and whole.all(1).sum() == 2


def test_shots_cover_the_classes_and_are_reproducible(monkeypatch):
    monkeypatch.setattr(evaluation, "STRENGTHS", (1.0,))
    data, seen, real = Birds("train", 200), [], evaluation.extract
    draws, real_probe = [], evaluation.linear_probe

    def extract(encoders, dataset, *rest):
        seen.append(dataset)
        return real(encoders, dataset, *rest)

    def probe(train, *rest, **options):
        draws.append(train[0])
        return real_probe(train, *rest, **options)

    monkeypatch.setattr(evaluation, "extract", extract)
    monkeypatch.setattr(evaluation, "linear_probe", probe)
    for _ in range(2):
        segment({"raw pixels": PatchPixels(8)}, data, Birds("test", 20), 10)
    assert all(map(torch.equal, draws[:10], draws[10:]))
    assert not torch.equal(draws[0], draws[1])
    used = seen[0].indices  # of all ten draws; a tensor as index would give another bird
    assert all(type(i) is int for i in used)
    classes = {data.targets[i] for i in used}
    assert len(used) > 50 and len(classes) == 20
    assert max(used) < 200 and seen[1].split == "test"


def test_shots_cycle_through_the_classes():
    targets, orders = [i % 4 for i in range(40)], set()
    for draw in range(9):
        shots = parts.draw_shots(targets, 40, draw)
        classes = [targets[i] for i in shots]
        assert sorted(shots) == list(range(40)) and sorted(classes[:4]) == [0, 1, 2, 3]
        assert classes == 10 * classes[:4]
        orders.add(tuple(classes[:4]))
    assert len(orders) > 3  # the first classes differ from draw to draw


@pytest.mark.usefixtures("elsewhere")
def test_parts_command_on_a_run(few_birds, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "STRENGTHS", (1.0,))
    monkeypatch.setattr(parts, "DRAWS", 3)
    train.main([*SMALL, "run"])
    before = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    for _ in range(2):  # the second call overwrites parts.png
        parts.main(["run", "--device", "cpu", "--workers", "0"])
    printed = capsys.readouterr().out
    for name in ("mean IoU", "± draws", "body", "head", "wing", "ground", "raw pixels", "untrained",
                 "trained"):
        assert name in printed
    results = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    for row in (results, results["untrained"], results["pixels"]):
        metrics = row["parts"]
        assert 0 < metrics["mean_iou"] < 1
        assert (metrics["shots"], len(metrics["draws"])) == (10, 3)
    assert results["linear"] == before["linear"]
    with Image.open("run/parts.png") as picture:
        assert picture.width > 8 * 128 and picture.height > 3 * 128
    parts.main(["run", "--shots", "4", "--device", "cpu", "--workers", "0", "--out", "four.png"])
    results = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    assert results["4 shots"]["parts"]["shots"] == 4 and results["parts"]["shots"] == 10
    for shots in ("1", "201"):
        with pytest.raises(UserError, match=rf"--shots must be in \[2, 200\], got {shots}"):
            parts.main(["run", "--shots", shots, "--device", "cpu"])
    evaluation.main(["export", "run", "--out", "weights.pth", "--device", "cpu"])
    parts.main(["weights.pth", "--data", "synthetic", "--device", "cpu", "--workers", "0"])
    assert "published" in capsys.readouterr().out and Path("parts.png").is_file()
    with pytest.raises(UserError, match="parts.png already exists"):
        parts.main(["weights.pth", "--data", "synthetic", "--device", "cpu"])


@pytest.mark.usefixtures("elsewhere")
def test_parts_need_part_maps(flowers):
    train.main(["--data", str(flowers), "--arch", "vit_nano", *SMALL, "run", "--batch-size", "12"])
    with pytest.raises(UserError, match="has no part maps; the drawn birds") as error:
        parts.main(["run", "--device", "cpu"])
    assert "\n" not in str(error.value)
