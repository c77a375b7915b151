"""eval.py embed: the features of every image that can be read, whole or not at all."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from conftest import Killed
from data.augment import plain_crop, to_tensor
from data.birds import Birds
from data.datasets import load_data, load_gallery, open_image
from lodisc import UserError, create_vit
from torchvision.transforms import v2

ROOT = Path(__file__).parent.parent


@pytest.fixture
def weights_here(elsewhere):
    """Write weights.pth of a small encoder to the current folder."""
    torch.save(create_vit("vit_nano", 16, 8).state_dict(), "weights.pth")


def embed(*words):
    evaluation.main(["embed", "weights.pth", "--heads", "3", "--workers", "0", *map(str, words)])


def reference(paths, image_size=98):
    """Return features of image files, one at a time."""
    encoder = evaluation.load_encoder("weights.pth", image_size=image_size, heads=3)
    prepare = v2.Compose(plain_crop(image_size) + to_tensor(encoder.mean, encoder.std))
    with torch.no_grad():
        return torch.cat([encoder(prepare(open_image(path))[None]) for path in paths]).numpy()


def before_extraction(words):
    """Return extract_readable, or what fails in its place, unless the images are unreadable."""
    real = evaluation.extract_readable

    def fail(*args):
        pytest.fail("found out too late")

    return real if "other.csv" in words else fail


def size_of_recipe():
    return evaluation.recipe_image_size(8, torch.device("cpu"))


@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_of_a_folder_are_embedded_and_broken_ones_named(weights_here, flowers, capsys,
                                                                   monkeypatch, workers):
    monkeypatch.setattr(evaluation, "BATCH", 5)  # so that whole batches are broken, and parts
    good = sorted(path for path in flowers.rglob("*.jpg"))
    for name in ("a", "b", "c", "d", "e", "f"):  # before all others
        (flowers / f"{name}.jpg").write_bytes(b"no image")
    (flowers / "test" / "class 1" / "2b.png").touch()
    (flowers / "train" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(flowers / "train" / "pipe.jpg")  # opening it would block
    (flowers / "notes.txt").write_text("no image")
    embed("--data", flowers, "--workers", workers)
    printed = capsys.readouterr().out
    broken = [*"abcdef", "test/class 1/2b", "train/gone", "train/pipe"]
    for name in broken:
        assert printed.count(f"left out: {flowers}/{name}.") == 1
    assert "warning: 9 of 57 images" in printed and ".txt" in printed
    assert "48 images, 96 features" in printed
    with np.load("features.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    assert sorted(arrays) == ["classes", "features", "labels", "paths"]
    assert arrays["features"].dtype == np.float32 and arrays["labels"].dtype == np.int64
    names = [path.relative_to(flowers).as_posix() for path in good]
    assert arrays["paths"].tolist() == sorted(names) and len(names) == 48
    assert arrays["classes"].tolist() == ["class 0", "class 1", "class 2"]
    assert arrays["labels"].tolist() == [int(name.split("/")[1][-1]) for name in sorted(names)]
    expected = reference([flowers / name for name in sorted(names)], size_of_recipe())
    assert np.abs(arrays["features"] - expected).max() < 1e-5


def test_csv_has_the_same_numbers_to_the_last_bit(weights_here, flowers):
    odd = flowers / "train" / "class 1" / 'a "line"\nbreak, é.jpg'
    shutil.copy(flowers / "train" / "class 1" / "0.jpg", odd)
    shutil.copy(odd, os.fsencode(flowers) + b"/\xff.jpg")  # a name that is not UTF-8
    for name in ("f.npz", "f.csv"):
        embed("--data", flowers, "--out", name, "--image-size", 16)
    arrays = np.load("f.npz")
    with open("f.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "label", *(f"f{i}" for i in range(96))]
    assert [row[0] for row in rows] == arrays["paths"].tolist()
    assert odd.relative_to(flowers).as_posix() in arrays["paths"]
    assert [int(row[1]) for row in rows] == arrays["labels"].tolist()
    values = np.array([row[2:] for row in rows], dtype=np.float32)
    assert np.array_equal(values, arrays["features"])


def test_an_image_without_a_class_has_minus_one(weights_here, flowers):
    for place in ("beside.jpg", "train/loose.jpg", "other/x.jpg"):  # left out of the training
        (flowers / place).parent.mkdir(exist_ok=True)
        shutil.copy(flowers / "test" / "class 2" / "0.jpg", flowers / place)
    gallery = load_gallery(str(flowers))
    labels = dict(zip(gallery.names, gallery.targets))
    assert labels["beside.jpg"] == labels["train/loose.jpg"] == labels["other/x.jpg"] == -1
    assert labels["train/class 2/0.jpg"] == labels["test/class 2/3.jpg"] == 2
    assert len(gallery) == 51


def test_loose_images_have_no_class(flowers):
    gallery = load_gallery(str(flowers / "train" / "class 0"))
    assert gallery.targets == [-1] * 12 and gallery.classes == []
    inside = load_gallery(str(flowers / "train"))  # class folders without a split
    assert inside.targets == [0] * 12 + [1] * 12 + [2] * 12
    assert inside.names[:2] == ["class 0/0.jpg", "class 0/1.jpg"]


def test_classes_are_numbered_as_in_the_training(flowers):
    """Those of val/, which is left out there, come after."""
    for split in ("train", "test"):
        shutil.rmtree(flowers / split / "class 1")
    (flowers / "val" / "class 1").mkdir(parents=True)
    shutil.copytree(flowers / "test" / "class 2", flowers / "val" / "class 2")
    shutil.copy(flowers / "test" / "class 0" / "0.jpg", flowers / "val" / "class 1" / "0.jpg")
    gallery, data = load_gallery(str(flowers)), load_data(str(flowers))
    assert gallery.classes == ["class 0", "class 2", "class 1"]
    assert gallery.classes[:2] == data.train.classes
    labels = dict(zip(gallery.names, gallery.targets))
    assert labels["val/class 1/0.jpg"] == 2 and labels["val/class 2/3.jpg"] == 1


def test_data_root_may_begin_with_a_tilde(weights_here, flowers, monkeypatch):
    monkeypatch.setenv("HOME", str(flowers.parent))
    folder = flowers.parent / "here" / "flowers17" / "jpg"
    folder.mkdir(parents=True)
    for number in range(1, 1361):
        (folder / f"image_{number:04d}.jpg").touch()
    shutil.copy(flowers / "test" / "class 0" / "0.jpg", folder / "image_0002.jpg")
    embed("--data", "flowers17", "--data-root", "~/here", "--image-size", 16)
    assert np.load("features.npz")["paths"].tolist() == ["flowers17/jpg/image_0002.jpg"]


@pytest.mark.parametrize("workers", [0, 1])
def test_dark_images_of_16_bits_are_reported(weights_here, capsys, workers):
    """One with values that cannot be scaled is left out, as elsewhere."""
    Path("dark").mkdir()
    Image.fromarray(np.full((20, 30), 4000, np.uint16)).save("dark/a.png")
    Image.fromarray(np.full((20, 30), -3.0, np.float32)).save("dark/b.tiff")
    embed("--data", "dark", "--image-size", 16, "--workers", workers)
    printed = capsys.readouterr().out
    assert printed.count("no 16-bit image so far has a value above 4,095") == 1
    assert "left out: dark/b.tiff has values" in printed.replace(str(Path.cwd()) + "/", "")


def test_a_single_folder_is_entered_and_stays_in_the_paths(flowers):
    gallery = load_gallery(str(flowers.parent))
    assert gallery.names[0] == "flowers/test/class 0/0.jpg" and gallery.targets[0] == 0
    assert gallery.classes == ["class 0", "class 1", "class 2"] and len(gallery) == 48


def test_named_sets_give_both_splits(tmp_path):
    folder = tmp_path / "flowers17" / "jpg"
    folder.mkdir(parents=True)
    for number in range(1, 1361):
        (folder / f"image_{number:04d}.jpg").touch()
    gallery = load_gallery("flowers17", str(tmp_path))
    assert gallery.names == [f"flowers17/jpg/image_{number:04d}.jpg" for number in range(1, 1361)]
    assert gallery.targets == [(number - 1) // 80 for number in range(1, 1361)]
    birds = load_gallery("synthetic")
    assert len(birds) == 3000 and birds.names[0] == "test/00000"
    image, label = birds[1001]  # the second training image
    expected, target = Birds("train", 2000)[1]
    assert image.tobytes() == expected.tobytes() and label == target


def test_image_files_are_embedded_by_their_own_names(weights_here, flowers):
    files = [flowers / "test" / "class 1" / "3.jpg", flowers / "test" / "class 0" / "1.jpg"]
    embed(*files, "--image-size", 16, "--features", "mean")
    arrays = np.load("features.npz")
    assert arrays["paths"].tolist() == sorted(map(str, files))
    assert arrays["labels"].tolist() == [-1, -1] and len(arrays["classes"]) == 0
    encoder = evaluation.load_encoder("weights.pth", image_size=16, heads=3)
    prepare = v2.Compose(plain_crop(16) + to_tensor(encoder.mean, encoder.std))
    batch = torch.stack([prepare(open_image(path)) for path in sorted(files)])
    with torch.no_grad():
        _, patches = encoder.tokens(batch)
    assert np.abs(arrays["features"] - patches.mean(1).numpy()).max() < 1e-5


@pytest.mark.parametrize("words, message", [
    (["--data", "flowers", "--out", "f.txt"], "f.txt: expected the ending .npz or .csv"),
    (["--data", "flowers", "--out", "there.csv"], "there.csv already exists: move it"),
    (["--data", "flowers", "--out", "no/f.csv"], "there is no folder no"),
    (["--data", "flowers", "--out", "dangling.csv"], "dangling.csv already exists"),
    (["--data", "flowers", "--out", "/proc/f.csv"], "could not be written"),
    (["test.jpg", "nope.jpg"], "nope.jpg: no such file"),
    (["flowers"], "flowers is a folder: give it by --data"),
    (["a.jpg", "--data", "flowers"], "give image files or --data, not both"),
    (["there.csv", "other.csv"], "none of the 2 images can be read"),
    ([], "give the images by --data"),
])
def test_mistakes_are_one_line(weights_here, flowers, monkeypatch, words, message):
    """And known before the first image is embedded."""
    for name in ("there.csv", "other.csv", "test.jpg"):
        Path(name).write_text("mine")
    Path("dangling.csv").symlink_to("nowhere")
    monkeypatch.setattr(evaluation, "extract_readable", before_extraction(words))
    with pytest.raises(UserError, match=message):
        embed(*words)
    assert Path("there.csv").read_text(encoding="utf-8") == "mine" and not list(Path().glob("f*.*"))


def test_a_runs_features_go_to_its_folder_once(few_birds, elsewhere, quick_probe, flowers):
    import train
    train.main(["--epochs", "1", "--image-size", "16", "--workers", "0", "--data", str(flowers)])
    run = Path("runs/flowers-lodisc-1")
    words = ["embed", str(run), "--workers", "0"]
    evaluation.main(words)
    before = (run / "features.npz").read_bytes()
    assert len(np.load(run / "features.npz")["paths"]) == 48  # by default its own data
    with pytest.raises(UserError, match="features.npz already exists"):
        evaluation.main(words)
    assert (run / "features.npz").read_bytes() == before


def test_features_that_are_not_finite_are_an_error(elsewhere, flowers):
    state = create_vit("vit_nano", 16, 8).state_dict()
    state["norm.weight"].fill_(3e38)  # finite, but the features overflow
    torch.save(state, "weights.pth")
    with pytest.raises(UserError, match="not finite"):
        embed("--data", flowers)
    assert not Path("features.npz").exists()


@pytest.mark.parametrize("ending", [".npz", ".csv"])
def test_death_while_it_is_written_leaves_no_file_of_that_name(weights_here, flowers, monkeypatch,
                                                               ending):
    real = evaluation.FEATURE_FILES[ending]

    def die(file, **arrays):
        real(file, **arrays)
        raise Killed

    monkeypatch.setitem(evaluation.FEATURE_FILES, ending, die)
    with pytest.raises(Killed):
        embed("--data", flowers, "--image-size", 16, "--out", f"f{ending}")
    assert not Path(f"f{ending}").exists()


def test_sigkill_while_it_is_written_leaves_no_file_of_that_name(weights_here, flowers):
    code = """
import os, signal, sys
import eval as evaluation

def half(file, **arrays):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

evaluation.FEATURE_FILES[".npz"] = half
evaluation.main(sys.argv[1:])"""
    words = ["embed", "weights.pth", "--heads", "3", "--image-size", "16", "--data", flowers]
    done = subprocess.run([sys.executable, "-c", code, *words], env={**os.environ,
                                                                     "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL and not Path("features.npz").exists()


def test_progress_has_the_rate(weights_here, flowers, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 11))  # each look at the clock is 11 s later
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(evaluation, "BATCH", 16)
    gallery = load_gallery(str(flowers))
    encoder = evaluation.load_encoder("weights.pth", image_size=16, heads=3)
    evaluation.extract_readable(encoder, gallery, "cpu", 0, "class")
    lines = [line for line in capsys.readouterr().out.splitlines() if "a second" in line]
    assert lines == ["16 of 48 images, 1 a second", "32 of 48 images, 1 a second",
                     "48 of 48 images, 1 a second"]


def test_images_are_not_kept_in_memory(weights_here, flowers):
    from data.datasets import CACHED
    before = len(CACHED.images)
    embed("--data", flowers, "--image-size", 16)
    assert len(CACHED.images) == before


def test_one_image_of_any_shape(weights_here):
    Image.new("L", (300, 7), 90).save("strip.png")
    embed("strip.png", "--image-size", 16)
    assert np.load("features.npz")["features"].shape == (1, 96)
