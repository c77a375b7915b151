"""Named data sets, read from small copies of their official layouts; --held-out."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import eval as evaluation
import train
from data import datasets
from data.birds import BIRD, GROUND
from data.datasets import CUB, NAMED, NAMES, data_name, load_data
from lodisc import UserError


def save(path, colour, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def cub(tmp_path):
    """Write CUB-200-2011's archive with 2 species of 6 images; boxes at (10, 5), 20 x 30 px."""
    folder = tmp_path / "CUB_200_2011"
    lines = {name: [] for name in ("images", "image_class_labels", "train_test_split",
                                   "bounding_boxes")}
    for i in range(1, 13):
        species = ("001.Black_footed_Albatross", "002.Laysan_Albatross")[(i - 1) // 6]
        name = f"{species}/{species[4:]}_{i:04d}.jpg"
        save(folder / "images" / name, (30 * (i > 6), 200, 20 * i))
        lines["images"].append(f"{i} {name}")
        lines["image_class_labels"].append(f"{i} {(i - 1) // 6 + 1}")
        lines["train_test_split"].append(f"{i} {i % 3 % 2}")  # 1 = train: every third
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
    image, label = data.train[3]
    assert label == 1 and np.abs(np.array(image)[0, 0] - np.array([30, 200, 200.0])).max() < 4


def test_cub_regions_are_boxes_or_segmentations(cub):
    regions = np.array(CUB(cub, "test").regions(2))
    assert regions.shape == (40, 60)
    assert (regions[5:35, 10:30] == BIRD).all() and (regions == BIRD).sum() == 20 * 30
    assert (regions == GROUND).sum() == 40 * 60 - 20 * 30
    for path in CUB(cub, "test").paths:  # three of five annotators agree, or two
        drawn = Image.new("L", (60, 40), 0)
        ImageDraw.Draw(drawn).rectangle((40, 0, 49, 9), 153)
        ImageDraw.Draw(drawn).rectangle((0, 0, 9, 9), 102)
        out = cub / "segmentations" / path.parent.name / f"{path.stem}.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(out)
    for folder in (cub, cub / "CUB_200_2011"):  # beside it or inside it
        regions = np.array(CUB(cub, "test").regions(2))
        assert (regions[:10, 40:50] == BIRD).all() and (regions == BIRD).sum() == 100
        if folder == cub:
            (cub / "segmentations").rename(cub / "CUB_200_2011" / "segmentations")


def test_cub_run_from_training_to_the_place_of_its_masks(cub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", "cub", "--data-root", str(cub), "--image-size", "16", "--epochs", "1",
                "--batch-size", "4", "--workers", "0", "--device", "cpu"])
    monkeypatch.chdir("/")
    evaluation.main(["masks", str(tmp_path / "runs" / "cub-lodisc-1"), "--device", "cpu",
                     "--workers", "0"])
    printed = capsys.readouterr().out
    assert "trained" in printed and "object cover" in printed and "border fraction" in printed
    results = json.loads((tmp_path / "runs/cub-lodisc-1/eval.json").read_text(encoding="utf-8"))
    assert results["masks"].keys() == {"object_cover", "border_fraction"} and "knn" in results


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
    assert list(data.train.targets) == [0, 1, 2] * 2 and list(data.test.targets) == [0, 1, 2]
    assert data.train.classes == variants
    image, label = data.test[1]
    assert label == 1 and abs(image.getpixel((30, 20))[2] - 140) < 4


def test_caltech101_trains_on_thirty_per_class_drawn_by_seed(tmp_path):
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
            save(folder / f"cars_{split}" / f"{i:05d}.jpg", (40 * i, 0, 200 * (split == "test")))
    (folder / "devkit").mkdir()
    kinds = np.array([(f"{i:05d}.jpg", (i - 1) % 2 + 1) for i in range(1, 5)],
                     dtype=[("fname", object), ("class", int)])
    io.savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": kinds})
    io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": kinds})
    io.savemat(folder / "devkit" / "cars_meta.mat",
               {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)})
    data = load_data("cars", tmp_path)
    assert list(data.train.targets) == list(data.test.targets) == [0, 1, 0, 1]
    image, label = data.test[3]
    assert label == 1 and np.abs(np.array(image)[0, 0] - np.array([160, 0, 200.0])).max() < 4
    held = load_data("cars", tmp_path, held_out=True)
    assert sorted(held.test.targets) == [0, 1] == sorted(held.train.targets)


def flowers17(root, missing=None):
    """Write 1,360 files, all hard links of one except for four of other colours."""
    folder = root / "flowers17" / "jpg"
    save(folder / "image_0001.jpg", (0, 0, 0), (8, 8))
    for n in range(2, 1361):
        if n in (5, 80, 81, 1360):
            save(folder / f"image_{n:04d}.jpg", (n % 251, 200, 0), (8, 8))
        elif n != missing:
            os.link(folder / "image_0001.jpg", folder / f"image_{n:04d}.jpg")


def test_flowers17_tests_on_every_fifth_image(tmp_path):
    flowers17(tmp_path)
    data = load_data("flowers17", tmp_path)
    assert data.train.targets == [label for label in range(17) for _ in range(64)]
    assert data.test.targets == [label for label in range(17) for _ in range(16)]
    assert len(data.train.classes) == 17
    numbers = [[int(Path(path).stem[-4:]) for path in part.paths] for part in data[:2]]
    assert numbers[1] == list(range(5, 1361, 5))
    assert sorted(sum(numbers, [])) == list(range(1, 1361))
    for part, index, number, label in ((0, 0, 1, 0), (1, 0, 5, 0), (1, 15, 80, 0), (0, 64, 81, 1),
                                       (1, 271, 1360, 16)):
        image, target = data[part][index]
        colour = [0, 0, 0] if number == 1 else [number % 251, 200, 0]
        assert target == label and np.abs(np.array(image)[0, 0] - np.array(colour)).max() < 6


@pytest.mark.parametrize("number", [7, 10])  # a training image, a test image
def test_flowers17_missing_image_raises_one_line(tmp_path, number):
    flowers17(tmp_path, missing=number)
    with pytest.raises(UserError, match=rf"--data flowers17: .*image_{number:04d}\.jpg") as error:
        load_data("flowers17", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMED)
def test_missing_data_set_raises_one_line_with_path(name, tmp_path):
    with pytest.raises(UserError, match=rf"--data {name}: .*--data-root .*{tmp_path.name}.*"
                       r"data/README\.md") as error:
        load_data(name, tmp_path)
    assert NAMED[name][1] in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_multiline_reader_error_becomes_one_line(tmp_path, monkeypatch):
    def read(root, download):
        raise RuntimeError("first\nsecond")

    monkeypatch.setitem(NAMED, "cub", (read, "here"))
    with pytest.raises(UserError, match=r"^--data cub: first; expected in .*: here \(.*\)$"):
        load_data("cub", tmp_path)


def test_cars_cannot_be_downloaded(tmp_path):
    with pytest.raises(UserError, match=r"source .* is gone.*cars_train_annos\.mat"):
        load_data("cars", tmp_path, download=True)


def test_cub_is_downloaded_once_with_checksum(cub, monkeypatch):
    calls = []
    monkeypatch.setattr("data.datasets.download_and_extract_archive",
                        lambda *args, **options: calls.append((args, options)))
    load_data("cub", cub, download=True)
    assert calls == []  # already there
    (cub / "CUB_200_2011").rename(cub / "elsewhere")
    with pytest.raises(UserError, match="--data cub"):
        load_data("cub", cub)
    assert calls == []  # only with download=True
    with pytest.raises(UserError, match="--data cub"):
        load_data("cub", cub, download=True)
    ((url, root), options), = calls
    assert url.startswith("https://data.caltech.edu/") and root == cub and len(options["md5"]) == 32


def test_data_name_keeps_names_and_makes_folders_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [data_name(name) for name in NAMES] == list(NAMES)
    assert data_name("images") == str(tmp_path / "images")


# --- cache, processors, order -----------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of 130 kB, and ten images of 40 kB once decoded, a few hundred bytes as files."""
    monkeypatch.setattr(datasets, "CACHE", 130_000)
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        Image.new("RGB", (100, 100), (i, 0, 0)).save(path)
    assert sum(path.stat().st_size for path in paths) < 10_000
    return datasets.Cache(), paths


def opened(cache, paths, monkeypatch):
    """Return how many of the images are decoded anew."""
    with monkeypatch.context() as patch:
        calls = record_opening(patch)
        for i, path in enumerate(paths):
            assert cache.open(path).getpixel((5, 5)) == (i, 0, 0)
    return len(calls)


def record_opening(monkeypatch):
    """Return a list of the paths that are decoded from now on."""
    calls, real = [], datasets.open_image

    def open_image(path):
        calls.append(path)
        return real(path)

    monkeypatch.setattr(datasets, "open_image", open_image)
    return calls


@pytest.mark.parametrize("workers, ranks, kept", [(None, 1, 3), (1, 1, 1), (2, 1, 1), (3, 1, 0),
                                                  (None, 2, 1), (1, 3, 0)])
def test_cache_counts_decoded_bytes_of_all_processes(cache, monkeypatch, workers, ranks, kept):
    cache, paths = cache
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    worker = None if workers is None else SimpleNamespace(num_workers=workers)
    monkeypatch.setattr(datasets, "get_worker_info", lambda: worker)
    assert opened(cache, paths, monkeypatch) == 10
    assert opened(cache, paths, monkeypatch) == 10 - kept
    assert len(cache.images) == kept and cache.size == 40_000 * kept


def test_images_of_a_folder_are_decoded_once(flowers, monkeypatch):
    monkeypatch.setattr(datasets, "CACHED", datasets.Cache())
    train_set, calls = load_data(str(flowers)).train, record_opening(monkeypatch)
    for _ in range(2):
        assert len([train_set[i] for i in range(36)]) == len(calls) == 36


def test_processors_follow_affinity_and_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(datasets, "cgroup_quota", lambda root: quota)
    for affinity, quota, ranks, workers in (
            (range(64), None, 1, 8), (range(5), None, 1, 5), (range(64), 3.5, 1, 3),
            (range(2), 3.5, 1, 2), (range(1), None, 1, 1), (range(4), 0.5, 1, 1),
            (range(8), None, 4, 2), (range(2), None, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(affinity), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert datasets.default_workers() == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    assert datasets.available_cpus() == 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert train.parse_args([])[1]["workers"] == evaluation.parse_args(["all", "run"]).workers == 4


@pytest.mark.parametrize("files, quota", [
    ({}, None), ({"cpu.max": "max 100000"}, None), ({"cpu.max": "250000 100000"}, 2.5),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5)])
def test_quota_of_a_container(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert datasets.cgroup_quota(tmp_path) == quota


def test_shuffling_by_class_reads_every_label_once():
    class Labels(list):
        reads = 0

        def __getitem__(self, index):
            Labels.reads += 1
            return super().__getitem__(index)

    labels = Labels(i // 2 for i in range(2000))  # a thousand classes
    classes = datasets.shuffled_by_class(labels)
    assert Labels.reads <= 2 * 2000
    assert len(classes) == 1000 and sorted(sum(classes, [])) == list(range(2000))
    assert all(len({i // 2 for i in indices}) == 1 for indices in classes)


# --- --held-out -------------------------------------------------------------------------------


def pairs(part):
    """Return the sorted (image bytes, class) pairs of a data set."""
    return sorted((image.tobytes(), label) for image, label in part)


def check_held_out(whole, held):
    """Check that the parts are disjoint and complete, with a fifth of each class held out."""
    assert not set(held.train.indices) & set(held.test.indices)
    assert sorted(pairs(held.train) + pairs(held.test)) == pairs(whole.train)
    total = np.bincount(whole.train.targets)
    for part, counts in ((held.train, total - total // 5), (held.test, total // 5)):
        assert np.array_equal(np.bincount(part.targets), counts)
        assert [label for _, label in part] == part.targets


def test_held_out_is_a_fifth_of_each_class_of_a_folder(flowers):
    whole = load_data(str(flowers))
    for path in (flowers / "test").rglob("*.jpg"):
        path.write_bytes(b"broken")  # the real test images are not opened
    held = load_data(str(flowers), held_out=True)
    check_held_out(whole, held)
    again = load_data(str(flowers), held_out=True)
    assert again.test.indices == held.test.indices
    assert held.test.indices != [0, 1, 12, 13, 24, 25]  # drawn, not the first of each class
    assert held.describe() == ("30 training images of 3 classes, 6 test images, held out of the "
                               f"training images, in {flowers}")


@pytest.mark.parametrize("name", ["synthetic", "flowers"])
def test_download_is_for_named_data_sets(flowers, name):
    name = name if name == "synthetic" else str(flowers)
    with pytest.raises(UserError, match=f"--download is for --data flowers17, .*, not {name}: "):
        load_data(name, download=True)


def test_held_out_opens_no_test_image_of_a_named_data_set(cub):
    for path in CUB(cub, "train").paths[:1]:  # three images of class 0 to train on, two of class 1
        other = next((cub / "CUB_200_2011" / "images").rglob("*_0002.jpg"))
        other.write_bytes(path.read_bytes())
    split = cub / "CUB_200_2011" / "train_test_split.txt"
    split.write_text(split.read_text(encoding="utf-8").replace("2 0", "2 1", 1))
    whole = load_data("cub", cub)
    assert whole.train.targets == [0, 0, 0, 1, 1]
    for path in whole.test.paths:
        path.write_bytes(b"broken")
    held = load_data("cub", cub, held_out=True)
    assert held.train.targets == [0, 0, 1] and held.test.targets == [0, 1]
    assert sorted(pairs(held.train) + pairs(held.test)) == pairs(whole.train)


def test_held_out_birds_come_from_the_training_set():
    whole, held = load_data("synthetic"), load_data("synthetic", held_out=True)
    total = np.bincount(whole.train.targets)
    assert np.array_equal(np.bincount(held.test.targets), total // 5)
    assert sorted(held.train.indices + held.test.indices) == list(range(len(whole.train)))
    assert held.train.dataset.split == held.test.dataset.split == "train"


def test_held_out_of_flowers17(tmp_path):
    flowers17(tmp_path)
    held = load_data("flowers17", tmp_path, held_out=True)
    assert np.bincount(held.train.targets).tolist() == [52] * 17
    assert np.bincount(held.test.targets).tolist() == [12] * 17
    opened = [Path(part.dataset.paths[i]) for part in held[:2] for i in part.indices]
    assert all(int(path.stem[-4:]) % 5 for path in opened)


def test_held_out_keeps_a_training_image_per_class(flowers):
    for label, count in ((1, 1), (2, 2)):
        for path in sorted((flowers / "train" / f"class {label}").iterdir())[count:]:
            path.unlink()
    held = load_data(str(flowers), held_out=True)
    assert np.bincount(held.train.targets).tolist() == [10, 1, 1]
    assert np.bincount(held.test.targets).tolist() == [2, 0, 1]


def test_held_out_splits_class_folders_without_a_test_set(flowers):
    (flowers / "train" / "empty").mkdir()
    held = load_data(str(flowers / "train"), held_out=True)
    assert np.bincount(held.train.targets).tolist() == [10, 10, 10]
    assert np.bincount(held.test.targets).tolist() == [2, 2, 2]


def test_held_out_needs_classes(flowers):
    with pytest.raises(UserError, match="--held-out needs classes: .*no train/ and test/") as error:
        load_data(str(flowers / "train" / "class 0"), held_out=True)
    assert "\n" not in str(error.value)
