"""Data sets by name (the drawn birds, flowers17, those of the paper) and folders of images."""

import hashlib
import os
import re
import shutil
import time
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw
from torch.utils.data import Dataset, Subset, get_worker_info
from torchvision.datasets import Caltech101, FGVCAircraft, StanfordCars
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive

from data.birds import BIRD, GROUND, Birds
from lodisc import UserError, require

CALTECH_TRAIN = 30  # images per class, the usual protocol
CACHE = 512 * 2**20  # bytes of decoded images kept in memory, by all processes of a loader
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


class Data(NamedTuple):
    """Data sets of (RGB image, class). If test is None, `note` says why nothing is evaluated;
    `found`: what a folder holds, and what of it was left out."""

    train: Dataset
    test: Dataset | None
    note: str = ""
    found: str = ""

    def describe(self):
        """Return a line on the images and classes."""
        test = "no" if self.test is None else len(self.test)
        classes = len(set(self.train.targets))
        kinds = f"of {classes} classes" if classes > 1 else "without classes"
        return f"{len(self.train)} training images {kinds}, {test} test images{self.found}"


# --- image files and folders ------------------------------------------------------------------


TRANSPOSED = {  # EXIF orientation: what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BIT = {"greatest": 0, "said": False}  # value so far, of the data set loaded last


def open_image(path):
    """Return a file's RGB image, upright by its EXIF note, in 8 bits as by `eight_bits`. One line
    is printed if no 16-bit image so far has a value above 4,095.

    Raises UserError, one line with the path, for a file that is broken or no image."""
    image = decode(path)
    if get_worker_info() is None:
        warn_of_dark(path)
    return image


def warn_of_dark(path):
    """Print a line, once, if there were 16-bit images and none had a value above 4,095."""
    if 0 < SIXTEEN_BIT["greatest"] <= 4095 and not SIXTEEN_BIT["said"]:
        SIXTEEN_BIT["said"] = True
        print(f"{printable(path)}: no 16-bit image so far has a value above 4,095, and 65,535 is "
              "white; if these are 12-bit data, multiply them by 16, or they are nearly black")


def decode(path):
    """As `open_image`, without the line."""
    try:
        with opened(path) as image:
            image.load()
            image = eight_bits(upright(image), path)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise unreadable(path, error) from None


@contextmanager
def opened(path):
    """Open an image file without Pillow's warnings on odd notes and sizes, a line per image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            yield image


def unreadable(path, error):
    """Return the UserError on a file that Pillow cannot read."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{printable(path)} is not a readable image ({reason})")


def printable(path):
    """Return a path with line breaks and what cannot be printed escaped, so that it is one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def upright(image):
    """Turn an image by its EXIF note, which is only read: ImageOps.exif_transpose writes it anew,
    and raises for a tag that it cannot write."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return image.transpose(TRANSPOSED[orientation])
    except Exception:  # no note, none on the orientation, or a damaged one
        return image


def eight_bits(image, path):
    """Convert images of more bits: 16 are scaled from 65,535; float and 32-bit values must all lie
    in [0, 1] or [0, 255]. Raises UserError for others."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if not is_16_bit and image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if is_16_bit:
        SIXTEEN_BIT["greatest"] = max(SIXTEEN_BIT["greatest"], int(high))
        return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
    require(0 <= low <= high <= 255, f"{printable(path)} has values from {low:g} to {high:g}; "
            "float and 32-bit values must lie in [0, 1] or [0, 255]: convert it, by numpy: "
            "Image.fromarray(((a - a.min()) / np.ptp(a) * 255).astype('uint8'))", UserError)
    scale = 255 if high <= 1 else 1
    return Image.fromarray((values * scale).round().astype(np.uint8))


class Cache:
    """open_image, keeping decoded images: decoding costs about as much as the augmentation.

    Every process keeps images until they fill its share of CACHE, and opens the others anew. A
    DataLoader worker that was forked starts with what the main process had."""

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
        """Return this process's share: of all ranks here, each with its DataLoader workers."""
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
    """Return how many DataLoader workers a rank has: its part of the processors, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    return min(8, max(1, available_cpus() // ranks))


def fitting_workers(workers, batch_bytes, folder="/dev/shm"):
    """Return how many DataLoader workers, `workers` at most, have room for their batches in shared
    memory, with two batches in advance for each: Docker gives 64 MB."""
    if not workers or not Path(folder).is_dir():
        return workers
    batches = shutil.disk_usage(folder).free // batch_bytes
    fitting = max(0, min(workers, (batches - 1) // 2))
    if fitting < workers:
        print(f"{fitting} DataLoader workers in place of {workers}, as {folder} has room for only "
              f"{batches} batches (in Docker: --shm-size=1g)")
    return fitting


@contextmanager
def naming_dead_workers():
    """Turn the death of a DataLoader worker, whenever torch reports it, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid|shared memory\(shm\)", str(error)):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"a DataLoader worker died ({reason}); if /dev/shm is too small, as "
                        "Docker's 64 MB are, give --workers 0 or start the container with "
                        "--shm-size=1g") from None


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


SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "val", "valid": "val", "validation": "val"}  # a folder's name: the split
NOT_DATA = (".", "@", "#", "$", "__")  # .ipynb_checkpoints, @eaDir, #recycle, __MACOSX
PICTURES = ("run.png", "masks.png", "neighbours.png")  # of this program


def find_images(root):
    """Return the images below a folder, as paths relative to it, and a Counter of what was left
    out, by the rule in data/README.md. Raises UserError for what cannot be read."""
    images, left_out = [], Counter()

    def refuse(error):
        raise UserError(f"{printable(error.filename)} cannot be read ({error.strerror})")

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        above = {os.path.realpath(parent) for parent in Path(folder).parents}
        if os.path.realpath(folder) in above:  # it would have no end
            folders.clear()
            left_out["links to a folder above"] += 1
            continue
        for name in list(folders):
            is_run = os.path.exists(os.path.join(folder, name, "checkpoint.pt"))
            if is_run or name.startswith(NOT_DATA):
                folders.remove(name)
                left_out["folders of runs" if is_run else f"{name}/"] += 1
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith(NOT_DATA):
                left_out["hidden files"] += 1
            elif ending not in IMG_EXTENSIONS:
                left_out[f"{ending} files" if ending else "files without ending"] += 1
            elif name in PICTURES:
                left_out[name] += 1
            else:
                images.append(Path(folder, name).relative_to(root))
    return images, left_out


def require_file(path):
    """Raise UserError for a broken link, and for what would block, such as a pipe."""
    require(os.path.isfile(path), f"{printable(path)} is a broken link, or no file: remove it",
            UserError)


def by_first_folder(images):
    """Group relative paths: {first folder: the paths below it}, with the loose images under ""."""
    groups = {}
    for path in images:
        folder = path.parts[0] if len(path.parts) > 1 else ""
        groups.setdefault(folder, []).append(path.relative_to(folder))
    return groups


def find_splits(root, images, left_out):
    """Return (root, {split: (its folder's name, its images)}); images without a train/ are all
    "train". A single folder that holds everything is entered. Counts in left_out the images beside
    the splits."""
    groups = by_first_folder(images)
    while len(groups) == 1 and "" not in groups and "train" not in map(str.lower, groups):
        (folder, images), = groups.items()
        root, groups = root / folder, by_first_folder(images)
    splits = {}
    for folder in sorted(groups):
        split = SPLITS.get(folder.lower())
        if split:
            require(split not in splits, f"--data {printable(root)}: more than one folder for the "
                    f"split {split}, {folder} and another; rename or merge them", UserError)
            splits[split] = (folder, groups[folder])
    if "train" not in splits or (len(splits) == 1 and len(groups) > 1):
        return root, {"train": ("", images)}  # a class may be called train
    for folder in groups.keys() - {name for name, _ in splits.values()}:
        left_out[f"{folder}/" if folder else "images beside the splits"] += len(groups[folder])
    return root, splits


def find_classes(images, left_out):
    """Return {class: its images} by the first folder, or {"": all} if most of them lie loose."""
    classes = by_first_folder(images)
    loose = classes.pop("", [])
    if 2 * len(loose) > len(images):
        return {"": images}
    if loose:
        left_out["images beside the class folders"] += len(loose)
    return classes


def images_of(folder, classes):
    """Return the Images of a folder's classes, {name: relative paths}, in ImageFolder's order."""
    paths, targets = [], []
    for label, name in enumerate(sorted(classes)):
        for path in sorted(classes[name], key=lambda path: (str(path.parent), path.name)):
            require_file(folder / name / path)
            paths.append(str(folder / name / path))
            targets.append(label)
    return Images(paths, targets, sorted(classes))


def require_images(root):
    """Return what `find_images` does; raise UserError without a folder, or without images."""
    require(os.path.isdir(root), f"--data {printable(root) or '(empty)'}: no such folder; expected "
            f"{', '.join(NAMES)}, or a folder of images, see data/README.md", UserError)
    images, left_out = find_images(root)
    require(images, f"--data {printable(root)}: found no valid file; expected images that end in "
            f"{', '.join(IMG_EXTENSIONS)}, got {list_counts(left_out) or 'nothing'}", UserError)
    return images, left_out


def load_folder(root):
    """Read a folder of images by the rule in data/README.md.

    With class folders in train/ and in test/ (or val/), the latter is for evaluation. Else all is
    for training, and the note says what evaluation lacks; --held-out needs class folders."""
    images, left_out = require_images(root)
    root, splits = find_splits(Path(root), images, left_out)
    classes = {}
    for split, (folder, paths) in splits.items():
        classes[split] = find_classes(paths, left_out)
    labelled = [split for split in ("train", "test", "val") if "" not in classes.get(split, [""])]
    used = ["train"]
    if len(labelled) > 1 and labelled[0] == "train":
        used.append(labelled[1])
    sets = [images_of(root / splits[split][0], classes[split]) for split in used]
    for split in splits.keys() - set(used):
        folder, paths = splits[split]
        left_out[f"{folder}/"] += len(paths)
    found = f", in {printable(root)}"
    if left_out:
        found += f"; left out: {list_counts(left_out)}"
    if len(used) == 1:
        note = (f"{printable(root)} has no train/ and test/ (or val/) with a folder for each class "
                "(layout: data/README.md; or, with class folders, --held-out)")
        return Data(*sets, None, note, found)
    unpaired = sorted(classes["train"].keys() ^ classes[used[1]].keys())
    require(not unpaired, f"--data {printable(root)}: train/ and {splits[used[1]][0]}/ must have "
            "the same classes; only one of them has "
            f"{', '.join(map(printable, unpaired[:5]))}", UserError)
    return Data(*sets, "", found)


class Gallery(Dataset):
    """All images of a data set, whatever their split: (RGB image, class, or -1 if unknown).

    images: paths, or (data set, index) of drawn ones; names: relative paths, in whose order the
    images are."""

    def __init__(self, images, names, targets, classes, left_out=""):
        order = sorted(range(len(names)), key=names.__getitem__)
        self.images, self.names = [images[i] for i in order], [names[i] for i in order]
        self.targets, self.classes = [targets[i] for i in order], classes
        self.left_out = left_out

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if isinstance(image, tuple):
            dataset, place = image
            return dataset[place][0], self.targets[index]
        require_file(image)
        return open_image(image), self.targets[index]  # not cached, as it is read once


def folder_gallery(root):
    """Return the Gallery of a folder: the images of all splits. Classes of the training split
    come first, then those of other splits; images outside class folders have label -1."""
    images, left_out = require_images(root)
    top, splits = find_splits(Path(root), images, Counter())
    class_of, names = {}, {}  # path: class; split: its classes
    for split, (folder, paths) in splits.items():
        names[split] = find_classes(paths, Counter())
        for name, below in names[split].items():
            if name:
                class_of |= {top / folder / name / path: name for path in below}
    trained = sorted(filter(None, names["train"]))
    classes = trained + sorted(set(class_of.values()) - set(trained))
    labels = {name: label for label, name in enumerate(classes)}
    paths = [Path(root, image) for image in images]
    targets = [labels[class_of[path]] if path in class_of else -1 for path in paths]
    return Gallery(list(map(str, paths)), [image.as_posix() for image in images], targets, classes,
                   list_counts(left_out))


def load_gallery(name, root="datasets"):
    """Return the Gallery of `synthetic`, a named data set below root, or a folder."""
    SIXTEEN_BIT.update(greatest=0, said=False)
    if name not in NAMES:
        return folder_gallery(name)
    images, names, targets = [], [], []
    data = load_data(name, root)
    for split, dataset in (("train", data.train), ("test", data.test)):
        paths = image_paths(dataset)
        if paths:
            images += map(str, paths)
            names += [Path(path).relative_to(root).as_posix() for path in paths]
        else:  # drawn
            images += [(dataset, i) for i in range(len(dataset))]
            names += [f"{split}/{i:05d}" for i in range(len(dataset))]
        targets += dataset.targets
    return Gallery(images, names, targets, data.train.classes)


def list_counts(left_out):
    """Return a Counter as text; what occurs once is named without a number."""
    items = []
    for name, count in sorted(left_out.items()):
        items.append(printable(name) if count == 1 else f"{printable(name)} ({count})")
    return ", ".join(items)


def read_headers(paths):
    """Open image files' headers; return those with more than 8 bits, and a UserError for each file
    that cannot be opened."""
    deep, broken = [], []
    for path in paths:
        try:
            require_file(path)
            with opened(path) as image:
                if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                    deep.append(path)
        except UserError as error:
            broken.append(error)
        except Exception as error:
            broken.append(unreadable(path, error))
    return deep, broken


def say_if_dark(deep, refuse=True):
    """Decode at most 20 files with more than 8 bits, in this process: a line says if all are dark.
    Raises UserError if values cannot be scaled, unless refuse is False."""
    for path in deep[:20]:
        try:
            decode(path)
        except UserError:
            if refuse:
                raise
    if deep:
        warn_of_dark(deep[0])


def check_headers(data):
    """Open the header of every image file of a data set, so that a broken one is known before the
    training. Raises UserError for the first, with the number of all."""
    paths = [path for dataset in (data.train, data.test) for path in image_paths(dataset)]
    begun = time.monotonic()
    deep, broken = read_headers(paths)
    if broken:
        others = f"; {len(broken) - 1} more cannot be read" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{others}")
    say_if_dark(deep)
    seconds = time.monotonic() - begun
    if seconds > 5:
        print(f"opened the headers of {len(paths)} images in {seconds:.0f} s, "
              f"{len(paths) / seconds:.0f} per second")


def image_paths(dataset):
    """Return the files of a data set, [] for one that draws its images."""
    if isinstance(dataset, Subset):
        paths = image_paths(dataset.dataset)
        return [paths[i] for i in dataset.indices] if paths else []
    return getattr(dataset, "paths", [])


def named_sizes(dataset):
    """Return [(name, bytes)] of a data set's images; names are relative to their common folder."""
    if isinstance(dataset, Subset):
        images = named_sizes(dataset.dataset)
        return [images[i] for i in dataset.indices]
    if isinstance(dataset, Birds):  # drawn: for the sizes, a checksum of every hundredth image
        sums = [0 if i % 100 else zlib.crc32(dataset[i][0].tobytes()) for i in range(len(dataset))]
        return [(f"{dataset.split}, seed {dataset.seed}, {i}", sums[i]) for i in range(len(sums))]
    if not hasattr(dataset, "paths"):  # of one's own, without files
        return [(str(i), 0) for i in range(len(dataset))]
    paths = [Path(path) for path in dataset.paths]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]


def hash_images(*datasets):
    """Return a hash of the images' names and sizes in their order, the same in a moved folder."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for name, size in named_sizes(dataset):
            digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


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
        self.ids = ids = [i for i in names if (in_train[i] == "1") == (split == "train")]
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
    return text if text in NAMES or not text else str(Path(text).resolve())


def load_data(name, root="datasets", download=False, held_out=False):
    """Load `synthetic`, a named data set below root, or a folder -> Data.

    held_out: train on four fifths of every class's training images and test on the others; the
    real test images are not opened. For choosing settings. Raises UserError."""
    require(not download or name in NAMED, f"--download is for --data {', '.join(NAMED)}, not "
            f"{name}: leave it out", UserError)
    SIXTEEN_BIT.update(greatest=0, said=False)
    if name == "synthetic":
        data = Data(Birds("train", 2000), Birds("test", 1000))
    elif name not in NAMED:
        data = load_folder(name)
    else:
        read, expected = NAMED[name]
        try:
            data = Data(*read(root, download))
        except (RuntimeError, ValueError, LookupError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"--data {name}: {reason}; expected in --data-root "
                            f"{root}: {expected} (see data/README.md)") from None
    if not held_out:
        return data
    require(len(set(data.train.targets)) > 1,
            f"--held-out needs classes: {data.note or 'there is only one'}", UserError)
    found = f", held out of the training images{data.found}"
    return Data(*hold_out(data.train), "", found)


def shuffled_by_class(targets, seed=0):
    """Return for each class the indices of its images, images and classes in a drawn order."""
    by_class = {}
    for i in torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).tolist():
        by_class.setdefault(targets[i], []).append(i)
    return list(by_class.values())


class Fold(Subset):
    """Some of a data set's images, with their classes and what the set knows of each image."""

    def __init__(self, dataset, indices):
        super().__init__(dataset, indices)
        self.targets = [dataset.targets[i] for i in indices]
        for name in ("classes", "parts"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        for name in ("regions", "part_map"):
            if hasattr(dataset, name):
                setattr(self, name, partial(self.of_image, name))

    def of_image(self, name, index):
        return getattr(self.dataset, name)(self.indices[index])


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
    return [Fold(dataset, sorted(fold)) for fold in (kept, held_out)]
