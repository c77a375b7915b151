"""The paper's data sets, each in its official layout in small, read by the real classes."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

import eval as judging
import train
from data.birds import BIRD
from data.cub import CUB
from data.datasets import load_data


def save(path, colour, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def cub(tmp_path):
    """CUB-200-2011's archive with 2 species of 6 pictures; the bird is red, at (10, 5), 20 x 30."""
    folder = tmp_path / "CUB_200_2011"
    lines = {name: [] for name in ("images", "image_class_labels", "train_test_split",
                                   "bounding_boxes")}
    for i in range(1, 13):
        species = ("001.Black_footed_Albatross", "002.Laysan_Albatross")[(i - 1) // 6]
        name = f"{species}/{species[4:]}_{i:04d}.jpg"
        save(folder / "images" / name, (30 * (i > 6), 200, 20 * i))
        lines["images"].append(f"{i} {name}")
        lines["image_class_labels"].append(f"{i} {(i - 1) // 6 + 1}")
        lines["train_test_split"].append(f"{i} {i % 3 % 2}")  # 1 = train: a third of them
        lines["bounding_boxes"].append(f"{i} 10.0 5.0 20.0 30.0")
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    (folder / "classes.txt").write_text("1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    return tmp_path


def test_cub_has_the_official_split_and_labels(cub):
    data = load_data("cub", cub)
    assert data.train.targets == [0, 0, 1, 1] and data.test.targets == [0] * 4 + [1] * 4
    assert [path.name[-8:-4] for path in data.train.paths] == ["0001", "0004", "0007", "0010"]
    assert data.train.classes == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    picture, label = data.train[3]
    assert label == 1 and np.abs(np.array(picture)[0, 0] - np.array([30, 200, 200.0])).max() < 4


def test_cub_boxes_and_segmentations_say_where_the_bird_is(cub):
    regions = np.array(CUB(cub, "test").regions(2))
    assert regions.shape == (40, 60)
    assert (regions[5:35, 10:30] == BIRD).all() and (regions == BIRD).sum() == 20 * 30
    for path in CUB(cub, "test").paths:  # where drawn, the outline counts; three of five agree
        drawn = Image.new("L", (60, 40), 0)
        ImageDraw.Draw(drawn).rectangle((40, 0, 49, 9), 153)
        ImageDraw.Draw(drawn).rectangle((0, 0, 9, 9), 102)
        out = cub / "segmentations" / path.parent.name / f"{path.stem}.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(out)
    regions = np.array(CUB(cub, "test").regions(2))
    assert (regions[:10, 40:50] == BIRD).all() and (regions == BIRD).sum() == 100


def test_a_run_on_cub_from_training_to_localisation(cub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", "cub", "--data-root", str(cub), "--image-size", "16", "--epochs", "1",
                "--batch-size", "4", "--workers", "0", "--device", "cpu"])
    monkeypatch.chdir("/")
    judging.main(["masks", str(tmp_path / "runs" / "cub-lodisc-1")])
    printed = capsys.readouterr().out
    assert "trained" in printed and "object" in printed and "parts" not in printed
    assert "pointing game" in printed


def test_aircraft_trains_on_trainval_by_variant(tmp_path):
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "A300B4", "Cessna 172"]
    for i in range(9):
        save(folder / "images" / f"{i:07d}.jpg", (0, 0, 20 * i))
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    for split, numbers in (("train", [0, 1]), ("val", [2]), ("trainval", [0, 1, 2, 3, 4, 5]),
                           ("test", [6, 7, 8])):
        (folder / f"images_variant_{split}.txt").write_text(
            "".join(f"{i:07d} {variants[i % 3]}\n" for i in numbers))
    data = load_data("aircraft", tmp_path)
    assert (len(data.train), len(data.test)) == (6, 3) and data.train.classes == variants
    assert [data.test[i][1] for i in range(3)] == [0, 1, 2]


def test_caltech101_takes_thirty_a_class_and_turns_grey_to_rgb(tmp_path):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    for name, count in (("accordion", 40), ("BACKGROUND_Google", 3), ("yin_yang", 33)):
        for i in range(1, count + 1):
            save(folder / name / f"image_{i:04d}.jpg", (i, 0, 0), (20, 20))
    Image.new("L", (20, 20), 77).save(folder / "yin_yang" / "image_0033.jpg")
    data = load_data("caltech101", tmp_path)
    assert data.train.targets == [0] * 30 + [1] * 30 and data.test.targets == [0] * 10 + [1] * 3
    assert not set(data.train.paths) & set(data.test.paths)
    assert data.train.paths == load_data("caltech101", tmp_path).train.paths
    assert data.train.paths[:30] != sorted(folder.glob("accordion/*"))[:30]  # drawn, not the first
    grey = [part for part in data[:2] for i, path in enumerate(part.paths)
            if path.name == "image_0033.jpg" and part.targets[i] == 1 and part[i][0].mode == "RGB"]
    assert len(grey) == 1


def test_cars_in_torchvision_layout(tmp_path):
    io = pytest.importorskip("scipy.io", reason="torchvision reads Stanford Cars by scipy")
    folder = tmp_path / "stanford_cars"
    for split in ("train", "test"):
        for i in range(1, 5):
            save(folder / f"cars_{split}" / f"{i:05d}.jpg", (i, 0, 0))
    (folder / "devkit").mkdir()
    kinds = np.array([(f"{i:05d}.jpg", (i - 1) % 2 + 1) for i in range(1, 5)],
                     dtype=[("fname", object), ("class", int)])
    io.savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": kinds})
    io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": kinds})
    io.savemat(folder / "devkit" / "cars_meta.mat",
               {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)})
    data = load_data("cars", tmp_path)
    assert [data.train[i][1] for i in range(4)] == [0, 1, 0, 1] and len(data.test) == 4


@pytest.mark.parametrize("name", ["cub", "aircraft", "cars", "caltech101"])
def test_a_missing_data_set_is_one_line_that_says_where_it_belongs(name, tmp_path):
    with pytest.raises(ValueError, match=rf"--data {name}: .*--data-root .*{tmp_path.name}.*"
                       r"data/README\.md") as error:
        load_data(name, tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_cars_cannot_be_downloaded_and_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"source .* is gone.*cars_train_annos\.mat"):
        load_data("cars", tmp_path, download=True)
