"""Folders of images as people have them: one rule, told in one line; broken files at the start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import eval as evaluation
import train
from data import datasets
from data.datasets import check_headers, load_data
from lodisc import UserError

ROOT = Path(__file__).parent.parent
SMALL = ["--image-size", "16", "--patch-size", "8", "--arch", "vit_nano", "--epochs", "1",
         "--batch-size", "4", "--workers", "0", "--device", "cpu"]


def make(root, *names):
    """Write a small image, or a text for other endings, under each name, three under "dir/*"."""
    for name in names:
        if name.endswith("*"):
            make(root, *(f"{name[:-1]}{i}.png" for i in range(3)))
            continue
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in datasets.IMG_EXTENSIONS:
            Image.new("RGB", (20, 16), (200, 40, 40)).save(path, "PNG")
        else:
            path.write_text("text", encoding="utf-8")


FOLDERS = {  # name: (files, classes of the training images, their number, test images, left out)
    "a class called train": (["bus/*", "car/*", "train/*"], ["bus", "car", "train"], 9, None, ""),
    "capitals": (["Train/a/*", "Train/b/*", "Test/a/*", "Test/b/*"], ["a", "b"], 6, 6, ""),
    "training and testing": (["training/a/*", "training/b/*", "testing/a/*", "testing/b/*"],
                             ["a", "b"], 6, 6, ""),
    "valid": (["train/a/*", "train/b/*", "valid/a/*", "valid/b/*"], ["a", "b"], 6, 6, ""),
    "validation": (["train/a/*", "train/b/*", "validation/a/*", "validation/b/*"], ["a", "b"], 6,
                   6, ""),
    "val and test": (["train/a/*", "train/b/*", "val/a/*", "val/b/*", "test/a/0.png",
                      "test/b/0.png"], ["a", "b"], 6, 2, "val/ (6)"),
    "val and a flat test": (["train/a/*", "train/b/*", "val/a/*", "val/b/*", "test/*"], ["a", "b"],
                            6, 6, "test/ (3)"),
    "a flat test alone": (["train/a/*", "train/b/*", "test/*"], ["a", "b"], 6, None, "test/ (3)"),
    "extra images": (["train/a/*", "train/b/*", "test/a/*", "test/b/*", "unlabelled/*", "x.png"],
                     ["a", "b"], 6, 6, "images beside the splits, unlabelled/ (3)"),
    "hidden folders": (["train/a/*", "train/b/*", "train/.ipynb_checkpoints/*", "train/@eaDir/*",
                        "__MACOSX/train/a/*", "test/a/*", "test/b/*", "test/a/._0.png"],
                       ["a", "b"], 6, 6, ".ipynb_checkpoints/, @eaDir/, __MACOSX/, hidden files"),
    "hidden folders of classes": (["a/*", "b/*", ".git/*", "a/@eaDir/*"], ["a", "b"], 6, None,
                                  ".git/, @eaDir/"),
    "runs and pictures": (["a/*", "b/*", "runs/r-1/checkpoint.pt", "runs/r-1/masks.png",
                           "runs/r-1/run.png", "run.png", "masks.png"], ["a", "b"], 6, None,
                          "folders of runs, masks.png, run.png"),
    "flat, with runs": (["*", "runs/r-1/checkpoint.pt", "runs/r-1/run.png", "masks.png"], [""], 3,
                        None, "folders of runs, masks.png"),
    "one stray image": (["a/*", "b/*", "stray.png"], ["a", "b"], 6, None,
                        "images beside the class folders"),
    "stray images in the splits": (["train/a/*", "train/b/*", "train/x.png", "test/a/*", "test/b/*",
                                    "test/y.png"], ["a", "b"], 6, 6,
                                   "images beside the class folders (2)"),
    "mostly flat": (["*", "more/0.png"], [""], 4, None, ""),
    "one folder in another": (["flowers/train/a/*", "flowers/train/b/*", "flowers/test/a/*",
                               "flowers/test/b/*", "README.txt"], ["a", "b"], 6, 6, ".txt files"),
    "one folder in two others": (["x/y/a/*", "x/y/b/*"], ["a", "b"], 6, None, ""),
    "one folder of images": (["images/*"], [""], 3, None, ""),
    "one class": (["train/a/*", "test/a/*"], ["a"], 3, 3, ""),
    "an empty class": (["train/a/*", "train/b/*", "train/c/notes.txt", "test/a/*", "test/b/*"],
                       ["a", "b"], 6, 6, ".txt files"),
    "deeper folders": (["a/x/*", "a/y/*", "b/*"], ["a", "b"], 9, None, ""),
    "other endings": (["a/*", "b/*", "a/x.gif", "a/y.GIF", "b/z.heic", "LICENSE"], ["a", "b"], 6,
                      None, ".gif files (2), .heic files, files without ending"),
    "endings in capitals": (["a/0.PNG", "a/1.JPG", "b/2.JPEG"], ["a", "b"], 3, None, ""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_read_by_the_rule(tmp_path, name):
    files, classes, count, test_count, left_out = FOLDERS[name]
    make(tmp_path, *files)
    data = load_data(str(tmp_path))
    assert data.train.classes == classes and len(data.train) == count
    names = {i: label for i, label in enumerate(classes)}
    for path, target in zip(data.train.paths, data.train.targets):
        assert f"/{names[target]}/".replace("//", "/") in Path(path).as_posix()
    assert (None if data.test is None else len(data.test)) == test_count
    if test_count is not None:
        assert data.test.classes == classes
    _, told, rest = data.describe().partition("; left out: ")
    assert rest == left_out and bool(told) == bool(left_out)
    kinds = f"of {len(classes)} classes" if len(classes) > 1 else "without classes"
    assert data.describe().startswith(f"{count} training images {kinds}, "
                                      f"{test_count or 'no'} test images, in ")


def test_order_of_the_images_is_that_of_torchvision(tmp_path):
    make(tmp_path, "a/*", "a b/*", "a-/x/*", "a-/x y/*", "a-/x-/*", "B/*", "a/b c/*", "a/B/1.png")
    theirs = ImageFolder(tmp_path)
    ours = load_data(str(tmp_path)).train
    assert list(zip(ours.paths, ours.targets)) == theirs.samples and ours.classes == theirs.classes


def test_two_folders_for_one_split_are_refused(tmp_path):
    make(tmp_path, "train/a/*", "Train/b/*", "test/a/*")
    with pytest.raises(UserError, match="more than one folder for the split train"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("script", [train, evaluation])
def test_empty_name_is_not_the_current_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a/*", "b/*")
    if script is train:
        arguments = ["--data", "", *SMALL]
    else:
        train.main(["--data", ".", *SMALL, "--out", "run"])
        arguments = ["knn", "run", "--data", "", "--device", "cpu"]
    with pytest.raises(UserError, match="no such folder|give the images"):
        script.main(arguments)


def test_what_was_found_is_printed_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "bus/*", "car/*", "train/*", "x.gif")
    train.main(["--data", ".", *SMALL, "--out", "runs/one"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("data: ")]
    assert line == (f"data: 9 training images of 3 classes, no test images, in {tmp_path}; left "
                    "out: .gif files")
    assert lines.index(line) < min(i for i, text in enumerate(lines) if text.startswith("epoch"))
    train.main(["--data", ".", *SMALL, "--out", "runs/two"])  # the first run is no data
    assert "data: 9 training images" in capsys.readouterr().out


def test_held_out_of_one_class_is_one_line(tmp_path):
    make(tmp_path, "train/a/*", "test/a/*")
    with pytest.raises(UserError, match="--held-out needs classes: there is only one"):
        load_data(str(tmp_path), held_out=True)


def test_no_image_is_one_line_with_what_is_there(tmp_path):
    make(tmp_path, "a/x.gif", "b.txt")
    with pytest.raises(UserError, match=r"no valid file.*\.jpg.*got \.gif files, \.txt files") as e:
        load_data(str(tmp_path))
    assert "\n" not in str(e.value)


# --- what cannot be read ----------------------------------------------------------------------


def damage(folder, kind):
    path = folder / "bad.png"
    if kind == "broken link":
        path.symlink_to("missing.png")
    elif kind == "a folder's link":
        (folder / "loop").symlink_to(folder.parent)
        return None
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "not an image":
        path.write_text("not an image", encoding="utf-8")
    elif kind == "newline":
        path = folder / "bad\nname\r.png"
        path.write_text("not an image", encoding="utf-8")
    elif kind == "no utf-8":
        path = Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.png"))
        path.write_text("not an image", encoding="utf-8")
    return path


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["broken link", "a pipe", "not an image", "newline", "no utf-8"])
def test_broken_file_is_one_line_before_the_first_step(flowers, tmp_path, monkeypatch, kind, split):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", None)  # is never called
    damage(flowers / split / "class 1", kind)
    with pytest.raises(UserError, match="bad") as error:
        train.main(["--data", str(flowers), *SMALL])
    text = str(error.value)
    assert len(text.splitlines()) == 1 and text.encode("utf-8")  # it can be printed
    assert split in text and not Path("runs").exists()


def test_broken_files_are_counted(flowers):
    for i in range(3):
        (flowers / "test" / "class 0" / f"x{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"x0\.jpg is not a readable .*; 2 more cannot be read"):
        check_headers(load_data(str(flowers)))


def test_headers_of_held_out_and_named_sets_are_checked(flowers):
    (flowers / "train" / "class 0" / "bad.jpg").write_bytes(b"")
    (flowers / "test" / "class 0" / "unopened.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad\.jpg is not a readable image .[^;]*$"):
        check_headers(load_data(str(flowers), held_out=True))
    check_headers(load_data("synthetic"))  # without files


def test_unreadable_folder_is_one_line(flowers, monkeypatch):
    """As root nothing is unreadable, so the error of a listing is raised here."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("class 1"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="class 1 cannot be read .Permission denied"):
        load_data(str(flowers))


def test_link_to_a_folder_above_it_has_an_end(flowers):
    damage(flowers / "train" / "class 1", "a folder's link")
    data = load_data(str(flowers))
    assert len(data.train) == 36 and data.found.endswith("left out: links to a folder above")


def test_links_to_one_folder_from_two_splits_are_followed(tmp_path):
    make(tmp_path, "train/b/*", "test/b/*", "extra/a/*")
    for split in ("train", "test"):
        (tmp_path / split / "a").symlink_to(tmp_path / "extra" / "a")
    data = load_data(str(tmp_path))
    assert data.train.classes == data.test.classes == ["a", "b"]
    assert len(data.train) == len(data.test) == 6
    assert data.found.endswith("left out: extra/ (3)")


def test_time_and_rate_of_a_slow_check_are_printed(flowers, monkeypatch, capsys):
    times = iter([100.0, 103.0, 200.0, 206.0])
    monkeypatch.setattr(datasets.time, "monotonic", lambda: next(times))
    data = load_data(str(flowers))
    check_headers(data)
    assert capsys.readouterr().out == ""
    check_headers(data)
    assert capsys.readouterr().out == "opened the headers of 48 images in 6 s, 8 per second\n"


def test_only_rank_0_opens_the_headers(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked = []
    monkeypatch.setattr(train, "check_headers", checked.append)
    for rank in (0, 1):
        run = train.Run(["--data", str(flowers), *SMALL, "--out", f"run {rank}"])
        run.rank = rank
        run.prepare()
    assert len(checked) == 1


@pytest.mark.slow
def test_two_processes_report_a_broken_test_file_once(flowers, tmp_path):
    (flowers / "test" / "class 0" / "bad.jpg").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "train.py",
         "--data", flowers, *SMALL], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode and done.stderr.count("bad.jpg is not a readable image") == 1
    assert not (tmp_path / "runs").exists()


def test_evaluation_names_a_broken_file_before_it_begins(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])
    shutil.copy(__file__, flowers / "test" / "class 2" / "bad.jpg")
    monkeypatch.setattr(evaluation, "evaluate", None)  # is never called
    with pytest.raises(UserError, match=r"bad\.jpg is not a readable image"):
        evaluation.main(["all", "run", "--data", str(flowers), "--device", "cpu"])
