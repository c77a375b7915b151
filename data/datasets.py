"""The data sets by name: the embedded birds, those of the paper, or any folder of pictures."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from torchvision.datasets import Caltech101, FGVCAircraft, ImageFolder, StanfordCars
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.birds import Birds
from data.cub import CUB
from data.pictures import Pictures, open_picture
from lodisc import first_line

TRAIN_BIRDS, TEST_BIRDS = 2000, 1000
CALTECH_TRAIN = 30  # pictures of a class, the usual protocol
SMALL = 32 * 2**20  # bytes on disk: a training set up to this stays decoded in memory


class Data(NamedTuple):
    """Data sets of (RGB image, class). Where test is None, `note` says why nothing is evaluated."""

    train: Dataset
    test: Dataset | None
    note: str = ""


@lru_cache(maxsize=None)
def read_once(path):
    """open_picture with a memory: decoding costs about as much as the augmentation does."""
    return open_picture(path)


class FlatFolder(ImageFolder):
    """Every picture below a folder, however deep, as one class: for training without labels."""

    def find_classes(self, directory):
        return [""], {"": 0}


def folders_of_pictures(root):
    """Whether pictures stand in class folders, with none of them loose beside these."""
    entries = list(root.iterdir())
    loose = any(entry.suffix.lower() in IMG_EXTENSIONS for entry in entries)
    return any(entry.is_dir() for entry in entries) and not loose


def load_folder(root):
    """A folder in torchvision's ImageFolder layout, or with fewer folders than that.

    root/train/<class>/*.jpg with root/test/ or root/val/ alike: trained on and evaluated.
    Without labels or without a split: trained on, and the note says what evaluation lacks.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data {root}: no such folder; give 'synthetic' or a folder with train/ "
                         "and test/, see data/README.md")
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    try:
        labelled = all(split is not None and split != root and folders_of_pictures(split)
                       for split in (train, test))
        pictures = (ImageFolder if labelled else FlatFolder)(train, loader=open_picture)
        if sum(Path(path).stat().st_size for path, _ in pictures.samples) <= SMALL:
            pictures.loader = read_once
        if not labelled:
            return Data(pictures, None, f"{root} has no train/ and test/ (or val/) with a folder "
                        "for each class: training without evaluation (layout: data/README.md)")
        data = Data(pictures, ImageFolder(test, loader=open_picture))
    except FileNotFoundError as error:  # torchvision's word for a folder without pictures
        raise ValueError(f"--data {root}: {first_line(error)}") from None
    if data.train.classes != data.test.classes:
        odd = sorted(set(data.train.classes) ^ set(data.test.classes))
        raise ValueError(f"--data {root}: train/ and {test.name}/ must have the same classes, "
                         f"these stand in one of them only: {', '.join(odd[:5])}")
    return data


def load_aircraft(root, download):
    """100 variants, the official trainval and test; the banner below each picture stays."""
    return [FGVCAircraft(root, split, download=download, loader=open_picture)
            for split in ("trainval", "test")]


def load_cars(root, download):
    if download:
        raise ValueError("--download: the source of Stanford Cars is gone; get the files elsewhere")
    return [StanfordCars(root, split, loader=open_picture) for split in ("train", "test")]


def load_caltech101(root, download):
    """Caltech-101 has no official split: 30 pictures of each class to train on, drawn by seed 0.

    torchvision finds the pictures; opened here, as its own class needs scipy and leaves the grey
    ones grey.
    """
    if not download and not (Path(root) / "caltech101").is_dir():  # torchvision would make it
        raise RuntimeError("no such folder")
    found = Caltech101(root, download=download)
    labels = torch.tensor(found.y)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    splits = [], []
    for label in range(len(found.categories)):
        own = shuffled[labels[shuffled] == label].tolist()
        splits[0].extend(sorted(own[:CALTECH_TRAIN]))
        splits[1].extend(sorted(own[CALTECH_TRAIN:]))
    folder = Path(found.root) / "101_ObjectCategories"
    paths = [folder / found.categories[y] / f"image_{i:04d}.jpg"
             for y, i in zip(found.y, found.index)]
    return [Pictures([paths[i] for i in split], [found.y[i] for i in split], found.categories)
            for split in splits]


# name: (reader of [train, test], what it expects below --data-root)
NAMED = {
    "cub": (lambda root, download: [CUB(root, split, download) for split in ("train", "test")],
            "CUB_200_2011/images.txt and what else the archive holds"),
    "aircraft": (load_aircraft, "fgvc-aircraft-2013b/data/"),
    "cars": (load_cars, "stanford_cars/ with cars_train/, cars_test/, devkit/cars_meta.mat, "
             "devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat"),
    "caltech101": (load_caltech101, "caltech101/101_ObjectCategories/"),
}
NAMES = ("synthetic", *NAMED)


def data_name(text):
    """A data set's name, or a folder's whole path, so that it is found from anywhere."""
    return text if text in NAMES else str(Path(text).resolve())


def load_data(name, root="datasets", download=False):
    """`synthetic`, a data set of the paper below root, or a folder -> Data."""
    if name == "synthetic":
        return Data(Birds("train", TRAIN_BIRDS), Birds("test", TEST_BIRDS))
    if name not in NAMED:
        return load_folder(name)
    read, expected = NAMED[name]
    try:
        return Data(*read(root, download))
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"--data {name}: {first_line(error)}; expected in --data-root "
                         f"{root}: {expected} (see data/README.md)") from None
