"""The data sets by name: the embedded birds, or any folder of pictures."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from data.birds import Birds

TRAIN_BIRDS, TEST_BIRDS = 2000, 1000
SMALL = 32 * 2**20  # bytes on disk: a training set up to this stays decoded in memory


class Data(NamedTuple):
    """Data sets of (RGB image, class). Where test is None, `note` says why nothing is evaluated."""

    train: Dataset
    test: Dataset | None
    note: str = ""


@lru_cache(maxsize=None)
def read_once(path):
    """default_loader with a memory: decoding costs about as much as the augmentation does."""
    return default_loader(path)


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
        pictures = ImageFolder(train) if labelled else FlatFolder(train)
        if sum(Path(path).stat().st_size for path, _ in pictures.samples) <= SMALL:
            pictures.loader = read_once
        if not labelled:
            return Data(pictures, None, f"{root} has no train/ and test/ (or val/) with a folder "
                        "for each class: training without evaluation (layout: data/README.md)")
        data = Data(pictures, ImageFolder(test))
    except FileNotFoundError as error:  # torchvision's word for a folder without pictures
        raise ValueError(f"--data {root}: {str(error).splitlines()[0]}") from None
    if data.train.classes != data.test.classes:
        odd = sorted(set(data.train.classes) ^ set(data.test.classes))
        raise ValueError(f"--data {root}: train/ and {test.name}/ must have the same classes, "
                         f"these stand in one of them only: {', '.join(odd[:5])}")
    return data


def load_data(name):
    """`synthetic` or a folder -> Data."""
    if name == "synthetic":
        return Data(Birds("train", TRAIN_BIRDS), Birds("test", TEST_BIRDS))
    return load_folder(name)
