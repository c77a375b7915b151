"""Image files of many formats: correct pixels, or a one-line error with their path."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

import eval as evaluation
import train
from data.datasets import load_data, open_image
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


# --- levels of more than 8 bits ---------------------------------------------------------------


def test_sixteen_bits_are_scaled_from_their_greatest_value_in_every_file(tmp_path, capsys):
    """A guess per file would give two files of one camera different scales."""
    levels = np.array([[0, 255, 4095, 40_000, 65_535]], np.uint16)
    for name in ("a.png", "b.tif", "c.pgm"):
        Image.fromarray(levels).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 0, 15, 156, 255]
    big_endian = Image.frombytes("I;16B", (5, 1), levels.astype(">u2").tobytes())
    big_endian.save(tmp_path / "d.tif")
    assert np.asarray(open_image(tmp_path / "d.tif"))[0, :, 0].tolist() == [0, 0, 15, 156, 255]
    assert capsys.readouterr().out == ""


def save_levels(folder, values, split="train", dtype=np.uint16):
    for label in "ab":
        (folder / split / label).mkdir(parents=True)
        for i, value in enumerate(values):
            Image.fromarray(np.full((20, 20), value, dtype)).save(
                folder / split / label / f"{i}.tif")


DARK = "no 16-bit image so far has a value above 4,095"


@pytest.mark.parametrize("values, lines, workers", [
    ([100, 3000, 4095], 1, "1"), ([100, 3000, 4096], 0, "0")])
def test_twelve_bit_data_are_said_to_be_dark_once(tmp_path, monkeypatch, capfd, values, lines,
                                                  workers):
    monkeypatch.chdir(tmp_path)
    save_levels(tmp_path / "data", values)  # a dark image alone, the first, says nothing
    train.main(["--data", "data", *SMALL, "--batch-size", "2", "--out", "run", "--workers",
                workers])
    printed = capfd.readouterr().out
    assert printed.count(DARK) == lines
    if lines:
        assert printed.index(DARK) < printed.index("epoch 1")


def test_single_dark_image_is_told_for_every_data_set(tmp_path, capsys):
    save_levels(tmp_path / "data", [4095, 30, 40])
    for _ in range(2):
        for path in load_data(str(tmp_path / "data")).train.paths:
            open_image(path)
        assert capsys.readouterr().out.count(DARK) == 1


FLOATS = {  # values of a row: the levels that they become, or what the error says
    "unit": ([0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),
    "bytes": ([0.0, 1.5, 100.4, 255.0], [0, 2, 100, 255]),
    "negative": ([-0.5, 0.0, 0.5, 1.0], "values from -0.5 to 1"),
    "standardised": ([-2.0, 0.0, 1.0, 2.0], "values from -2 to 2"),
    "greater": ([0.0, 300.0, 20.0, 1.0], "values from 0 to 300"),
    "not a number": ([0.0, float("nan"), 0.5, 1.0], "values from nan to nan"),
    "infinite": ([0.0, float("inf"), 0.5, 1.0], "values from 0 to inf"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_float_images_have_levels_of_a_known_range(tmp_path, name):
    values, expected = FLOATS[name]
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "float.tif")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"float.tif has {expected}.*convert it") as error:
            open_image(tmp_path / "float.tif")
        assert "\n" not in str(error.value)
    else:
        assert np.asarray(open_image(tmp_path / "float.tif"))[0, :, 1].tolist() == expected


@pytest.mark.parametrize("values, expected", [
    ([0, 1, 1, 0], [0, 255, 255, 0]), ([0, 3, 200, 255], [0, 3, 200, 255]),
    ([0, 3, 70_000, 1], "values from 0 to 70000"), ([-1, 3, 200, 1], "values from -1 to 200")])
def test_32_bit_images_have_levels_of_a_known_range(tmp_path, values, expected):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "int.tif")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"int.tif has {expected}"):
            open_image(tmp_path / "int.tif")
    else:
        assert np.asarray(open_image(tmp_path / "int.tif"))[0, :, 2].tolist() == expected


@pytest.mark.usefixtures("elsewhere")
def test_images_that_cannot_be_scaled_are_refused_before_the_training(tmp_path, monkeypatch):
    save_levels(tmp_path / "data", [-1.0, 0.5], dtype=np.float32)
    monkeypatch.setattr(train, "train", None)  # is never called
    with pytest.raises(UserError, match="values from -1 to -1"):
        train.main(["--data", "data", *SMALL, "--batch-size", "2"])
    assert not Path("runs").exists()


GREY = round(0.299 * 200 + 0.587 * 30 + 0.114 * 40)  # of RED
RED_IMAGE = Image.new("RGB", (30, 20), RED)
GREY_16 = np.full((20, 30), 256 * GREY)
MODES = {  # mode that Pillow has for some file: (image, ending, colour)
    "1": (Image.new("1", (30, 20), 1), "png", (255,) * 3),
    "L": (RED_IMAGE.convert("L"), "png", (GREY,) * 3),
    "LA": (RED_IMAGE.convert("LA"), "png", (GREY,) * 3),
    "P": (RED_IMAGE.quantize(4), "png", RED),
    "PA": (RED_IMAGE.quantize(4).convert("PA"), "tif", RED),
    "RGB": (RED_IMAGE, "bmp", RED),
    "RGBA": (Image.new("RGBA", (30, 20), (*RED, 200)), "webp", RED),
    "RGBX": (RED_IMAGE.convert("RGBX"), "tif", RED),
    "CMYK": (RED_IMAGE.convert("CMYK"), "tif", RED),
    "YCbCr": (RED_IMAGE.convert("YCbCr"), "tif", RED),
    "I;16": (Image.frombytes("I;16", (30, 20), GREY_16.astype("<u2").tobytes()), "tif",
             (GREY,) * 3),
    "I;16B": (Image.frombytes("I;16B", (30, 20), GREY_16.astype(">u2").tobytes()), "tif",
              (GREY,) * 3),
    "I": (RED_IMAGE.convert("L").convert("I"), "tif", (GREY,) * 3),
    "F": (RED_IMAGE.convert("L").convert("F"), "tif", (GREY,) * 3),
    "LAB": (Image.new("LAB", (30, 20), (90, 150, 140)), "tif", (119, 69, 65)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_has_the_right_colour(tmp_path, mode):
    image, ending, colour = MODES[mode]
    path = tmp_path / f"image.{ending}"
    image.save(path)
    with Image.open(path) as written:
        assert written.mode == mode or mode in ("RGBX", "I;16B")  # which it opens as RGB, I;16
    try:
        result = open_image(path)
    except UserError as error:  # Pillow before version 13
        assert mode == "LAB" and "conversion from LAB to RGB not supported" in str(error)
        return
    assert result.mode == "RGB" and result.size == (30, 20)
    assert np.abs(np.asarray(result)[10, 15].astype(int) - colour).max() <= 3


# --- EXIF -------------------------------------------------------------------------------------


BYTES = {5: 8, 10: 8, 12: 8}  # of a value, by the type of a tag; those of others fit four bytes


def exif_bytes(order, tags):
    """Return an EXIF block of {tag: (type, value)}, each with one value."""
    body, values = struct.pack(order + "H", len(tags)), b""
    start = 8 + 2 + 12 * len(tags) + 4  # of the values that do not fit
    for tag, (kind, value) in sorted(tags.items()):
        if kind in BYTES:
            value, values = struct.pack(order + "I", start + len(values)), values + value
        body += struct.pack(order + "HHI", tag, kind, 1) + value
    mark = b"II" if order == "<" else b"MM"
    return b"Exif\0\0" + mark + struct.pack(order + "HI", 42, 8) + body + bytes(4) + values


@pytest.mark.parametrize("order", ["<", ">"])
def test_photo_with_any_other_tag_is_turned_upright(tmp_path, order):
    """Many pairs of a tag and a type, with one value: Pillow cannot write most of them anew."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste((0, 0, 255), (0, 0, 8, 8))
    orientation, rewritten = (3, struct.pack(order + "HH", 6, 0)), 0
    tags = [tag for tag in sorted(ExifTags.TAGS) if tag != 0x0112][::15]
    for tag in tags:
        for kind in range(1, 13):
            value = (kind, bytes([1, 2, 0, 0, 3, 0, 0, 0])[:BYTES.get(kind, 4)])
            image.save(tmp_path / "photo.jpg",
                       exif=exif_bytes(order, {0x0112: orientation, tag: value}))
            result = open_image(tmp_path / "photo.jpg")
            assert result.size == (16, 32) and result.getpixel((15, 0))[2] > 200, (tag, kind)
            with Image.open(tmp_path / "photo.jpg") as photo:
                try:
                    ImageOps.exif_transpose(photo)
                    rewritten += 1
                except Exception:  # what open_image did before
                    pass
    assert 0 < rewritten < 12 * len(tags)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_all_orientations_agree_with_pillow(tmp_path, orientation, ending):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    options = {"quality": 100} if ending == "jpg" else {}
    Image.fromarray(pixels).resize((36, 24)).save(path, exif=exif, **options)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(expected))
    assert expected.size == ((24, 36) if orientation in (5, 6, 7, 8) else (36, 24))


# --- damaged files ----------------------------------------------------------------------------


def damaged(whole, generator):
    """Return the bytes of a file after one of five accidents."""
    data, kind = bytearray(whole), generator.integers(5)
    place = int(generator.integers(len(data)))
    if kind == 0:  # half a download
        return bytes(data[:place])
    if kind == 1:  # a few bits
        for i in generator.integers(len(data), size=generator.integers(1, 20)):
            data[i] ^= 1 << generator.integers(8)
    elif kind == 2:  # a block of zeros
        data[place:place + 64] = bytes(len(data[place:place + 64]))
    elif kind == 3:  # bytes of another file
        data[place:place] = generator.bytes(30)
    else:  # the header
        for i in generator.integers(min(64, len(data)), size=3):
            data[i] = generator.integers(256)
    return bytes(data)


def open_damaged(folder, count):
    """Open `count` damaged files of nine formats; return how many were read all the same."""
    generator, whole, read = np.random.default_rng(0), [], 0
    noise = Image.fromarray(generator.integers(0, 255, (24, 32, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("a.jpg", {"exif": exif}), ("b.jpeg", {"progressive": True}),
                          ("c.png", {"exif": exif}), ("d.ppm", {}), ("e.bmp", {}),
                          ("g.tif", {"compression": "tiff_lzw"}), ("h.tiff", {"exif": exif}),
                          ("i.webp", {"exif": exif})):
        noise.save(folder / name, **options)
        whole.append(name)
    noise.convert("L").save(folder / "f.pgm")
    whole = [(name, (folder / name).read_bytes()) for name in sorted([*whole, "f.pgm"])]
    for i in range(count):
        name, contents = whole[i % 9]
        path = folder / f"damaged {name}"
        path.write_bytes(damaged(contents, generator))
        try:
            image = open_image(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(error).startswith(str(path))
        else:
            assert image.mode == "RGB" and np.asarray(image).ndim == 3
            read += 1
    return read


@pytest.mark.filterwarnings("error")  # a warning is a line too
def test_500_damaged_files_are_an_image_or_one_line(tmp_path):
    assert 100 < open_damaged(tmp_path, 500) < 400  # both happen


@pytest.mark.slow
def test_10_000_damaged_files_are_an_image_or_one_line(tmp_path):
    assert 2_000 < open_damaged(tmp_path, 10_000) < 8_000


# --- folders ----------------------------------------------------------------------------------


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
    lambda data: shutil.rmtree(data / "test"): (0, "evaluation skipped: "),
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
