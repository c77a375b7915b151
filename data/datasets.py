"""Data sets by name (the drawn birds, flowers17, those of the paper) and folders of images."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset, Subset, get_worker_info
from torchvision.datasets import Caltech101, FGVCAircraft, ImageFolder, StanfordCars
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive

from data.birds import BIRD, GROUND, Birds
from lodisc import UserError, require

CALTECH_TRAIN = 30  # images per class, the usual protocol
CACHE = 512 * 2**20  # bytes of decoded images kept in memory, in all processes together
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


class Data(NamedTuple):
    """Data sets of (RGB image, class). If test is None, `note` says why nothing is evaluated."""

    train: Dataset
    test: Dataset | None
    note: str = ""


# --- image files and folders ------------------------------------------------------------------


def open_image(path):
    """Return a file's RGB image: upright by its EXIF note, 16-bit grey scaled to 8 bits.

    Raises UserError, one line with the path, for a file that is broken or no image."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255
                levels = np.asarray(image).astype(np.uint32) >> 8
                image = Image.fromarray(levels.astype(np.uint8))
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a readable image ({reason})") from None


class Cache:
    """open_image, keeping decoded images: decoding costs about as much as the augmentation.

    Every process keeps images until they fill its share of CACHE, and opens the others anew. A
    loading process that was forked starts with what the main process had."""

    def __init__(self):
        self.images, self.size = {}, 0  # bytes

    def open(self, path):
        image = self.images.get(path)
        if image is None:
            image = open_image(path)
            size = 4 * image.width * image.height  # Pillow pads RGB to four bytes
            if self.size + size <= self.limit():
                self.images[path] = image
                self.size += size
        return image

    @staticmethod
    def limit():
        """Return this process's share: of all ranks here, each with its loading processes."""
        worker = get_worker_info()
        processes = 1 if worker is None else 1 + worker.num_workers
        return CACHE // (processes * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


CACHED = Cache()


def available_cpus():
    """Return how many processors this process may use: the machine's, fewer by its affinity
    (taskset, Slurm) or by a container's quota (cgroup, Docker's --cpus)."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        count = len(os.sched_getaffinity(0))
    quota = cgroup_quota(Path("/sys/fs/cgroup"))
    return count if quota is None else max(1, min(count, int(quota)))


def cgroup_quota(root):
    """Return the processors that the control group below root allows, or None for no limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # version 2, 1
        try:
            texts = [(root / name).read_text(encoding="utf-8") for name in names]
        except OSError:  # another version, or no Linux
            continue
        quota, period = " ".join(texts).split()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def default_workers():
    """Return how many loading processes a rank has: its part of the processors, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    return min(8, max(1, available_cpus() // ranks))


def fitting_workers(workers, batch_bytes, folder="/dev/shm"):
    """Return how many loading processes, `workers` at most, have room for their batches in shared
    memory, with two batches in advance for each: Docker gives 64 MB."""
    if not workers or not Path(folder).is_dir():
        return workers
    batches = shutil.disk_usage(folder).free // batch_bytes
    fitting = max(0, min(workers, (batches - 1) // 2))
    if fitting < workers:
        print(f"{fitting} loading processes in place of {workers}, as {folder} has room for only "
              f"{batches} batches (in Docker: --shm-size=1g)")
    return fitting


@contextmanager
def naming_dead_workers():
    """Turn the death of a loading process, whenever torch reports it, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid|shared memory\(shm\)", str(error)):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"a loading process died ({reason}); if /dev/shm is too small, as Docker's "
                        "64 MB are, give --workers 0 or start the container with --shm-size=1g"
                        ) from None


class Images(Dataset):
    """(RGB image, class) of a list of paths."""

    def __init__(self, paths, targets, classes):
        self.paths, self.targets, self.classes = paths, targets, classes
        for path in paths:
            Path(path).stat()  # a file that is missing is known before the training

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return CACHED.open(self.paths[index]), self.targets[index]


class FlatFolder(ImageFolder):
    """Every image below a folder as one class: for training without labels."""

    def find_classes(self, directory):
        return [""], {"": 0}


def has_class_folders(root):
    """Whether images are in class folders, with none of them loose beside these."""
    entries = list(root.iterdir())
    loose = any(entry.suffix.lower() in IMG_EXTENSIONS for entry in entries)
    return any(entry.is_dir() for entry in entries) and not loose


def load_folder(root):
    """Read a folder in torchvision's ImageFolder layout, or with fewer folders than that.

    root/train/<class>/*.jpg with root/test/ or root/val/ alike: trained on and evaluated.
    Else trained on: the note says what evaluation lacks; class folders serve --held-out."""
    root = Path(root)
    require(root.is_dir(), f"--data {root}: no such folder; expected {', '.join(NAMES)}, or a "
            "folder with train/ and test/, see data/README.md", UserError)
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    labelled = False
    if train != root and test is not None:
        labelled = has_class_folders(train) and has_class_folders(test)
    try:
        if labelled:
            folders = [ImageFolder(train), ImageFolder(test)]
        elif has_class_folders(train):
            folders = [ImageFolder(train, allow_empty=True)]
        else:
            folders = [FlatFolder(train)]
    except FileNotFoundError as error:  # torchvision's error for a folder without images
        raise UserError(f"--data {root}: {str(error).splitlines()[0]}") from None
    sets = []
    for folder in folders:
        paths = [path for path, _ in folder.samples]
        sets.append(Images(paths, folder.targets, folder.classes))
    if not labelled:
        return Data(*sets, None, f"{root} has no train/ and test/ (or val/) with a folder for each "
                    "class (layout: data/README.md; or, with class folders, --held-out)")
    unpaired = sorted(set(sets[0].classes) ^ set(sets[1].classes))
    require(not unpaired, f"--data {root}: train/ and {test.name}/ must have the same classes; "
            f"only one of them has {', '.join(unpaired[:5])}", UserError)
    return Data(*sets)


# --- named data sets --------------------------------------------------------------------------


def load_flowers17(root, download):
    """Oxford 17 Category Flower (Nilsback, Zisserman 2006): jpg/image_0001.jpg to image_1360.jpg,
    80 per class in this order; every fifth image of a class is a test image, 16 of 80."""
    numbers, folder = range(1, 17 * 80 + 1), Path(root, "flowers17", "jpg")
    splits = [n for n in numbers if n % 5], [n for n in numbers if n % 5 == 0]
    classes, sets = [f"class {label}" for label in range(1, 18)], []
    for split in splits:
        paths = [folder / f"image_{n:04d}.jpg" for n in split]
        sets.append(Images(paths, [(n - 1) // 80 for n in split], classes))
    return sets


def load_aircraft(root, download):
    """100 variants, the official trainval and test; the banner below each image stays."""
    splits = [FGVCAircraft(root, split, download=download) for split in ("trainval", "test")]
    return [Images(split._image_files, split._labels, split.classes) for split in splits]


def load_cars(root, download):
    require(not download, "--download: the source of Stanford Cars is gone; copy the files")
    splits = [StanfordCars(root, split) for split in ("train", "test")]
    return [Images(*zip(*split._samples), split.classes) for split in splits]


def load_caltech101(root, download):
    """Caltech-101 has no official split: 30 images of each class to train on, drawn by seed 0.

    torchvision lists the images; to open them its own class needs scipy."""
    if not download and not (Path(root) / "caltech101").is_dir():  # torchvision would make it
        raise FileNotFoundError("no such folder")
    listed = Caltech101(root, download=download)
    folder, paths = Path(listed.root, "101_ObjectCategories"), []
    for label, number in zip(listed.y, listed.index):
        paths.append(folder / listed.categories[label] / f"image_{number:04d}.jpg")
    train, test = [], []
    for indices in shuffled_by_class(listed.y):
        train += indices[:CALTECH_TRAIN]
        test += indices[CALTECH_TRAIN:]
    sets = []
    for split in (sorted(train), sorted(test)):
        labels = [listed.y[i] for i in split]
        sets.append(Images([paths[i] for i in split], labels, listed.categories))
    return sets


class CUB(Images):
    """CUB-200-2011 (Wah, Branson, Welinder, Perona, Belongie 2011), from its official archive.

    The official split: 5,994 images to train on, 5,794 to test on, 200 species. regions(index)
    says where the bird is: by its segmentation if that archive was unpacked too (beside
    CUB_200_2011 or inside it), else by its bounding box."""

    def __init__(self, root, split):
        folder = Path(root) / "CUB_200_2011"

        def read(name):
            """Lines of "<id> <rest>" -> {id: rest}."""
            lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
            return dict(line.strip().split(maxsplit=1) for line in lines if line.strip())

        names, labels, in_train, boxes = map(read, ("images", "image_class_labels",
                                                    "train_test_split", "bounding_boxes"))
        ids = [i for i in names if (in_train[i] == "1") == (split == "train")]
        super().__init__([folder / "images" / names[i] for i in ids],
                         [int(labels[i]) - 1 for i in ids], list(read("classes").values()))
        self.boxes = [[float(number) for number in boxes[i].split()] for i in ids]
        self.segmentations = []
        for place in (Path(root) / "segmentations", folder / "segmentations"):
            if place.is_dir() and not self.segmentations:
                self.segmentations = [(place / names[i]).with_suffix(".png") for i in ids]

    def regions(self, index):
        """Region map as of the drawn birds, in the size of the image: BIRD or GROUND."""
        if self.segmentations:  # grey levels: the fraction of the five annotators who said bird
            votes = Image.open(self.segmentations[index]).convert("L")
            return votes.point(lambda level: BIRD if level > 127 else GROUND)
        regions = Image.new("L", self[index][0].size, GROUND)
        x, y, width, height = self.boxes[index]  # in pixels, from the upper left corner
        ImageDraw.Draw(regions).rectangle((x, y, x + width - 1, y + height - 1), BIRD)
        return regions


def load_cub(root, download):
    if download and not (Path(root) / "CUB_200_2011" / "images.txt").is_file():
        download_and_extract_archive(CUB_URL, root, md5=CUB_MD5)
    return [CUB(root, split) for split in ("train", "test")]


# name: (reader of [train, test], what it expects below --data-root)
NAMED = {
    "flowers17": (load_flowers17, "flowers17/jpg/image_0001.jpg to image_1360.jpg"),
    "cub": (load_cub, "CUB_200_2011/images.txt and the archive's other files"),
    "aircraft": (load_aircraft, "fgvc-aircraft-2013b/data/"),
    "cars": (load_cars, "stanford_cars/ with cars_train/, cars_test/, devkit/cars_meta.mat, "
             "devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat"),
    "caltech101": (load_caltech101, "caltech101/101_ObjectCategories/"),
}
NAMES = ("synthetic", *NAMED)


def data_name(text):
    """Return a data set's name, or a folder's absolute path, so that it is found from anywhere."""
    return text if text in NAMES else str(Path(text).resolve())


def load_data(name, root="datasets", download=False, held_out=False):
    """Load `synthetic`, a named data set below root, or a folder -> Data.

    held_out: train on four fifths of every class's training images and test on the others; the
    real test images are not opened. For choosing settings. Raises UserError."""
    if name == "synthetic":
        data = Data(Birds("train", 2000), Birds("test", 1000))
    elif name not in NAMED:
        data = load_folder(name)
    else:
        read, expected = NAMED[name]
        try:
            data = Data(*read(root, download))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--data {name}: {str(error).splitlines()[0]}; expected in --data-root "
                            f"{root}: {expected} (see data/README.md)") from None
    if not held_out:
        return data
    require(len(set(data.train.targets)) > 1, f"--held-out needs classes: {data.note}", UserError)
    return Data(*hold_out(data.train))


def shuffled_by_class(targets, seed=0):
    """Return for each class the indices of its images, images and classes in a drawn order."""
    by_class = {}
    for i in torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).tolist():
        by_class.setdefault(targets[i], []).append(i)
    return list(by_class.values())


def hold_out(dataset):
    """Return (training fold, held-out fold): a fifth of each class, at least one image if it has
    two or more."""
    kept, held_out = [], []
    for indices in shuffled_by_class(dataset.targets):
        count = len(indices) // 5
        if len(indices) > 1:
            count = max(1, count)
        kept += indices[count:]
        held_out += indices[:count]
    require(held_out, "--held-out needs a class with two training images", UserError)
    subsets = [Subset(dataset, sorted(fold)) for fold in (kept, held_out)]
    for subset in subsets:
        subset.targets = [dataset.targets[i] for i in subset.indices]
    return subsets
