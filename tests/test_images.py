"""Image files of many formats: correct pixels, or a one-line error with their path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import train
from data.datasets import open_image
from lodisc import UserError

ROOT = Path(__file__).parent.parent
SMALL = ["--image-size", "16", "--epochs", "1", "--workers", "0", "--device", "cpu"]
RED = (200, 30, 40)


def grey16(path):
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(path)


def palette(path, **options):
    Image.new("RGB", (30, 20), RED).quantize(4).save(path, **options)


def rotated(path):
    """Save with an EXIF orientation of 90 degrees clockwise: upper left to upper right."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste((0, 0, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=100)


GOOD = {  # name: (function that writes it, size, colour of the lower right pixel)
    "plain.jpg": (lambda p: Image.new("RGB", (30, 20), RED).save(p, quality=100), (30, 20), RED),
    "grey.jpg": (lambda p: Image.new("L", (30, 20), 90).save(p), (30, 20), (90,) * 3),
    "grey16.png": (grey16, (30, 20), (40_000 >> 8,) * 3),
    "palette.png": (palette, (30, 20), RED),
    "transparent.png": (lambda p: palette(p, transparency=0), (30, 20), RED),
    "rgba.png": (lambda p: Image.new("RGBA", (30, 20), (*RED, 128)).save(p), (30, 20), RED),
    "cmyk.jpg": (lambda p: Image.new("RGB", (30, 20), RED).convert("CMYK").save(p, quality=100),
                 (30, 20), RED),
    "rotated.jpg": (rotated, (16, 32), RED),
    "one.png": (lambda p: Image.new("RGB", (1, 1), RED).save(p), (1, 1), RED),
    "wide.png": (lambda p: Image.new("RGB", (20_000, 10), RED).save(p), (20_000, 10), RED),
    "ein größeres Bild 花.jpg": (lambda p: Image.new("RGB", (30, 20), RED).save(p, quality=100),
                              (30, 20), RED),
}


@pytest.mark.parametrize("name", GOOD)
def test_readable_images_have_the_right_pixels(name, tmp_path):
    write, size, colour = GOOD[name]
    write(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == size
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[-1, -1] - colour).max() <= 3
    if name == "rotated.jpg":
        assert pixels[0, -1, 2] > 200 and pixels[0, 0, 2] < 100


def broken(path, kind):
    if kind == "truncated":
        whole = path.with_suffix(".whole.jpg")
        Image.effect_noise((80, 60), 90).save(whole)
        path.write_bytes(whole.read_bytes()[:1500])
        whole.unlink()
    else:
        path.write_bytes(b"" if kind == "empty" else b"not an image\n")


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_unreadable_images_raise_one_line_with_path(kind, flowers, elsewhere):
    bad = flowers / "train" / "class 1" / "bad one.jpg"
    broken(bad, kind)
    for read in (lambda: open_image(bad), lambda: train.main(["--data", str(flowers), *SMALL])):
        with pytest.raises(UserError, match="is not a readable image") as caught:
            read()
        assert str(caught.value).startswith(str(bad)) and "\n" not in str(caught.value)
    assert not list(Path().glob("runs/*"))  # so that the same command works after mending


@pytest.mark.slow
def test_unreadable_image_in_a_worker_ends_the_run_with_one_line(flowers):
    bad = flowers / "train" / "class 1" / "bad one.jpg"
    broken(bad, "truncated")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", flowers, "--image-size", "16", "--epochs",
         "1", "--batch-size", "12", "--workers", "2", "--device", "cpu"],
        capture_output=True, text=True, timeout=200, cwd=flowers.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and str(bad) in done.stderr
    assert done.stderr.startswith(f"train.py: {bad}")


def test_folder_of_all_image_formats_trains(tmp_path, elsewhere):
    for split in ("train", "test"):
        for label in ("a", "b c"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for name, (write, _, _) in GOOD.items():
                write(folder / name)
    train.main(["--data", "data", *SMALL, "--batch-size", "8"])
    assert (tmp_path / "runs" / "data-lodisc-1" / "eval.json").is_file()


def drop(folder, keep=0):
    for path in sorted(folder.iterdir())[keep:]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def empty_class(data):
    drop(data / "train" / "class 1")


def one_image(data):
    drop(data / "train", keep=1)
    drop(data / "train" / "class 0", keep=1)
    drop(data / "test")
    shutil.copytree(data / "train" / "class 0", data / "test" / "class 0")


def one_test_image_a_class(data):
    for label in (data / "test").iterdir():
        drop(label, keep=1)


def one_class(data):
    for split in ("train", "test"):
        drop(data / split, keep=1)


def unusual_names(data):
    for split in ("train", "test"):
        (data / split / "class 1").rename(data / split / "Vögel, große 花")


FOLDERS = {  # change of the folder: (exit status, message)
    empty_class: (2, "class 1"),
    one_image: (2, "expected 2 training images, got 1"),
    one_test_image_a_class: (0, "no retrieval"),
    one_class: (0, "linear top-1"),
    unusual_names: (0, "linear top-1"),
    lambda data: shutil.rmtree(data / "test"): (0, "will not be evaluated: "),
    lambda data: drop(data): (2, "valid file"),
    lambda data: shutil.rmtree(data / "test" / "class 1"): (2, "same classes"),
}


@pytest.mark.parametrize("spoil", FOLDERS)
def test_unusual_folders_train_or_raise_one_line(spoil, flowers, elsewhere, capsys, quick_probe):
    spoil(flowers)
    status, says = FOLDERS[spoil]
    options = ["--data", str(flowers), *SMALL, "--out", "run"]
    if status:
        with pytest.raises(UserError, match=says) as caught:
            train.main(options)
        assert "\n" not in str(caught.value)
    else:
        train.main(options)
        printed = capsys.readouterr().out
        assert says in printed and " nan" not in printed
    assert Path("run").exists() == (status == 0)


@pytest.mark.usefixtures("elsewhere")
def test_evaluation_names_unreadable_files(flowers, monkeypatch, capsys):
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])
    bad = flowers / "test" / "class 1" / "bad one.jpg"
    broken(bad, "text")
    options = ["--data", str(flowers), "--device", "cpu", "--workers", "1"]
    capsys.readouterr()
    with pytest.raises(UserError) as caught:  # from a worker, with its traceback
        evaluation.main(["all", "run", *options])
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    evaluation.exit_with_line("eval.py", caught.value)
    line = capsys.readouterr().err
    assert codes == [2] and line.startswith(f"eval.py: {bad} is not") and line.count("\n") == 1
    with pytest.raises(UserError, match="bad one.jpg") as caught:
        evaluation.main(["masks", "run", str(bad), "--device", "cpu"])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("elsewhere")
def test_damaged_results_are_not_overwritten():
    Path("eval.json").write_text("{half")
    with pytest.raises((UserError, ValueError)):
        evaluation.save_results(Path("."), {"trained": {"knn": {"top1": 0.5}}})
    assert Path("eval.json").read_text(encoding="utf-8") == "{half"
    assert not Path("per_image.json").exists()
