"""eval.py neighbours: the picture of the nearest images, and the rank-1 beside it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from data.draw import BLUE, RED, neighbour_sheet
from eval import nearest, read_results
from lodisc import UserError, create_vit

TILE, STEP, HEAD = 96, 104, 32


@pytest.fixture
def run(flowers, elsewhere, quick_probe):
    train.main(["--epochs", "1", "--image-size", "16", "--workers", "0", "--data", str(flowers)])
    return Path("runs/flowers-lodisc-1")


def neighbours(*words):
    evaluation.main(["neighbours", *map(str, words), "--workers", "0"])


def test_nearest_matches_a_loop():
    features = torch.randn(12, 5) * torch.rand(12, 1)  # lengths must not count
    found = nearest(features, [0, 4, 11], 3)
    for row, query in zip(found.tolist(), [0, 4, 11]):
        others = [i for i in range(12) if i != query]
        cosine = [torch.cosine_similarity(features[query], features[i], dim=0) for i in others]
        expected = sorted(others, key=lambda i: -cosine[others.index(i)])
        assert row == expected[:3]
    assert nearest(torch.randn(3, 4), [0], 5).shape == (1, 2)


def pixel(page, x, y):
    return page.getpixel((x, y))


def test_sheet_has_a_row_per_query_and_frames_by_hit():
    grey = [Image.new("RGB", (40, 40), (level,) * 3) for level in (10, 60, 110, 160, 210)]
    blocks = {"a": ([[grey[0], grey[1]], [grey[2], grey[3]]], [[True, False], [False, True]]),
              "b": ([[grey[4], grey[4]], [grey[4], grey[4]]], None)}
    page = neighbour_sheet([grey[0], grey[4]], blocks)
    second = STEP + 16 + 2 * STEP + 16
    assert page.size == (second - 16 + 2 * STEP + 16, HEAD + 2 * STEP)
    middle = TILE // 2
    for row, level in enumerate((10, 210)):
        assert pixel(page, 4 + middle, HEAD + row * STEP + middle) == (level,) * 3
    for row, (levels, colours) in enumerate([((10, 60), (BLUE, RED)), ((110, 160), (RED, BLUE))]):
        for column, (level, colour) in enumerate(zip(levels, colours)):
            x, y = STEP + 16 + column * STEP, HEAD + row * STEP
            assert pixel(page, x + middle, y + middle) == (level,) * 3
            for place in ((x, y + 40), (x + 3, y + 40), (x + TILE - 1, y + 40), (x + 40, y),
                          (x + 40, y + TILE - 1)):
                assert pixel(page, *place) == colour
    assert pixel(page, second, HEAD) == (210,) * 3  # no frame


def test_right_and_wrong_have_marks_of_two_shapes():
    image = Image.new("RGB", (40, 40), (9, 9, 9))
    page = np.asarray(neighbour_sheet([image], {"a": ([[image, image]], [[True, False]])}))
    marks = []
    for column in (0, 1):
        right, bottom = STEP + 16 + column * STEP + TILE, HEAD + TILE
        marks.append((page[bottom - 18:bottom, right - 18:right] == 255).all(-1))
    assert marks[0].sum() > 20 and marks[1].sum() > 20
    assert (marks[0] != marks[1]).sum() > 20


def test_rank_1_is_that_of_the_evaluation(run, capsys):
    neighbours(run)
    printed = capsys.readouterr().out
    stored = read_results(run / "eval.json")
    expected = {"untrained": stored["untrained"]["retrieval"]["rank1"],
                "trained": stored["retrieval"]["rank1"]}
    titles = re.findall(r"^(\w+): rank-1 (\S+)$", printed, re.MULTILINE)
    assert titles == [(name, f"{value:.3f}") for name, value in expected.items()]
    with Image.open(run / "neighbours.png") as page:
        assert page.size == (STEP + 2 * (5 * STEP + 16), HEAD + 8 * STEP)
    neighbours(run)  # replaces its own picture


def record_sheet(monkeypatch):
    """Return a list that gets the arguments of each sheet."""
    seen, real = [], evaluation.neighbour_sheet

    def record(queries, blocks):
        seen.append((queries, blocks))
        return real(queries, blocks)

    monkeypatch.setattr(evaluation, "neighbour_sheet", record)
    return seen


def test_queries_are_every_eighth_and_hits_are_of_their_class(run, flowers, monkeypatch):
    seen = record_sheet(monkeypatch)
    monkeypatch.setattr(evaluation, "nearest", lambda features, queries: torch.stack(
        [(query + torch.tensor([5, 1, 2, 3, 7])) % 12 for query in queries]))  # right and wrong
    neighbours(run)
    (queries, blocks), = seen
    assert [title.split(":")[0] for title in blocks] == ["untrained", "trained"]
    files = sorted((flowers / "test").rglob("*.jpg"))  # 12 images, 4 of each class
    expected = [files[i * 12 // 8] for i in range(8)]
    crop = evaluation.v2.Compose(evaluation.plain_crop(evaluation.TILE))
    pixels = {crop(evaluation.open_image(path)).tobytes(): path for path in files}
    assert [pixels[query.tobytes()] for query in queries] == expected
    for images, hits in blocks.values():
        assert [len(row) for row in images] == [5] * 8
        for query, row, row_hits in zip(expected, images, hits):
            paths = [pixels[image.tobytes()] for image in row]
            assert query not in paths and len(set(paths)) == 5
            assert row_hits == [path.parent == query.parent for path in paths]


@pytest.mark.parametrize("n", range(2, 8))
def test_each_of_few_images_is_a_query_once(run, flowers, monkeypatch, n):
    few = flowers.parent / "few"
    few.mkdir()
    for i, path in enumerate(sorted((flowers / "train").rglob("*.jpg"))[:5 * n:5]):
        path.rename(few / f"{i}.jpg")
    seen = record_sheet(monkeypatch)
    neighbours(run, "--data", few, "--out", "n.png")
    (queries, blocks), = seen
    assert len({query.tobytes() for query in queries}) == len(queries) == n
    for images, _ in blocks.values():
        assert [len(row) for row in images] == [min(5, n - 1)] * n


def test_stray_images_are_left_out_with_a_line(run, flowers, monkeypatch, capsys):
    """Of class folders without a split; and the line says why there is no test set."""
    seen = record_sheet(monkeypatch)
    next((flowers / "test" / "class 0").iterdir()).rename(flowers / "train" / "stray.jpg")
    neighbours(run, "--data", flowers / "train", "--out", "n.png")
    printed = capsys.readouterr().out
    assert "left out: 1 images without a class" in printed and "all 36 images" in printed
    assert "has no train/ and test/" in printed
    assert all(hits for _, hits in seen[0][1].values())


def test_held_out_run_says_that_other_data_are_not_held_out(flowers, elsewhere, quick_probe,
                                                            capsys):
    train.main(["--epochs", "1", "--image-size", "16", "--workers", "0", "--data", str(flowers),
                "--held-out", "--out", "run"])
    flowers.rename(flowers.parent / "moved")
    capsys.readouterr()
    neighbours("run", "--data", flowers.parent / "moved", "--out", "n.png")
    assert re.search("holds out images of .*; none of ", capsys.readouterr().out)


def test_unlabelled_images_of_all_folders_have_no_frames(run, flowers, monkeypatch, capsys):
    loose = flowers.parent / "loose"
    for split in ("train", "test"):
        (loose / split).mkdir(parents=True)
        for path in (flowers / split / "class 0").glob("*.jpg"):
            path.rename(loose / split / path.name)
    seen = record_sheet(monkeypatch)
    neighbours(run, "--data", loose, "--out", "n.png")
    assert "all 16 images" in capsys.readouterr().out
    (_, blocks), = seen
    assert list(blocks) == ["untrained", "trained"]
    assert all(hits is None for _, hits in blocks.values())


def test_classes_without_a_split_are_framed(run, flowers, monkeypatch):
    seen = record_sheet(monkeypatch)
    neighbours(run, "--data", flowers / "train", "--out", "n.png")
    (_, blocks), = seen
    assert all("rank-1" in title and hits for title, (_, hits) in blocks.items())


def test_initial_weights_that_are_gone_are_left_out_with_a_line(flowers, elsewhere, quick_probe,
                                                                capsys, monkeypatch):
    torch.save(create_vit("vit_nano", 16, 8).state_dict(), "weights.pth")
    train.main(["--epochs", "1", "--image-size", "16", "--workers", "0", "--data", str(flowers),
                "--init", "weights.pth", "--heads", "3"])
    seen = record_sheet(monkeypatch)
    neighbours("runs/flowers-lodisc-1")
    Path("weights.pth").unlink()
    capsys.readouterr()
    neighbours("runs/flowers-lodisc-1")
    assert "no row for the initial weights" in capsys.readouterr().out
    assert [title.split(":")[0] for title in seen[0][1]] == ["initial", "trained"]
    assert [title.split(":")[0] for title in seen[1][1]] == ["trained"]


def test_published_weights_and_momentum_encoder_have_their_names(run, flowers, monkeypatch):
    seen = record_sheet(monkeypatch)
    neighbours(run, "--momentum", "--out", "m.png")
    torch.save(create_vit("vit_nano", 16, 8).state_dict(), "weights.pth")
    neighbours("weights.pth", "--data", flowers, "--image-size", 16, "--heads", 3)
    assert Path("neighbours.png").exists()
    assert [[title.split(":")[0] for title in blocks] for _, blocks in seen] == [
        ["untrained", "momentum"], ["published"]]


def test_one_image_has_no_neighbour(run, flowers):
    alone = flowers.parent / "alone"
    alone.mkdir()
    (flowers / "train" / "class 0" / "0.jpg").rename(alone / "0.jpg")
    with pytest.raises(UserError, match="two images"):
        neighbours(run, "--data", alone, "--out", "n.png")
