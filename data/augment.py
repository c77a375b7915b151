"""Two seeded augmentations of an image, and of its map if it has one, for training; one plain crop
of it for evaluation."""

import io
import random
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from data.datasets import opened
from lodisc import UserError, require

ORDER, AUGMENTATION, MASK_NOISE = range(3)  # what a seed is for: no two purposes share a stream


class Preprocessing(NamedTuple):
    """The input of an encoder."""

    crop: int  # pixels per side
    mean: tuple  # of normalisation, per channel
    std: tuple


def mix_seed(*numbers):
    """Mix whole numbers, the purpose first, into one seed, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed):
    """Seed torch, numpy and random inside the block, and restore their states after it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def to_tensor(mean, std):
    """PIL image -> float32 (3, H, W), normalised."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


class Blur(v2.Transform):
    """Gaussian blur by Pillow, faster than torchvision's; sigma drawn from a range, in px."""

    def __init__(self, low, high):
        super().__init__()
        self.sigma = low, high

    def make_params(self, flat_inputs):
        return {"sigma": torch.empty(1).uniform_(*self.sigma).item()}

    def transform(self, image, params):
        if isinstance(image, tv_tensors.Mask):
            return image
        return image.filter(ImageFilter.GaussianBlur(params["sigma"]))


def view_transform(image_size, mean, std, crop_min, blur, solarise):
    """One side of BYOL's asymmetric pair (Grill et al. 2020, appendix B; MoCo v3).

    crop_min: smallest fraction of the image's area in a crop. blur and solarise: probabilities,
    1.0 and 0.0 for the first view, 0.1 and 0.2 for the second. The blur's sigma is 0.1 to 2.0 px
    at 224 px and proportional to the size: at 48 px, 0.43 px at most, it hardly blurs."""
    ratio = image_size / 224
    return v2.Compose([
        v2.RandomResizedCrop(image_size, scale=(crop_min, 1.0)),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([Blur(0.1 * ratio, 2.0 * ratio)], p=blur),
        v2.RandomSolarize(128, p=solarise),
        v2.RandomHorizontalFlip(),
        *to_tensor(mean, std),
    ])


class Shorten(v2.Transform):
    """Cut the long side of a PIL image to eight times the short one, in the middle: all of it,
    resized, could fill the memory."""

    def transform(self, image, params):
        width, height = image.size
        limit = 8 * min(width, height)
        if max(width, height) <= limit:
            return image
        return v2.functional.center_crop(image, [min(height, limit), min(width, limit)])


def plain_crop(image_size, interpolation=InterpolationMode.BILINEAR):
    """The usual centre crop: the short side to 8/7 of the size, then the middle (256 and 224)."""
    return [Shorten(), v2.Resize(round(image_size * 8 / 7), interpolation),
            v2.CenterCrop(image_size)]


def cropped_maps(read, indices, image_size):
    """Return the maps read(i) of images, cropped as these for evaluation: uint8 (n, H, W)."""
    crop = v2.Compose(plain_crop(image_size, InterpolationMode.NEAREST))
    return torch.stack([torch.from_numpy(np.array(crop(read(i)))) for i in indices])


def encode_map(image_map):
    """Return a map, uint8 (H, W), a tensor, array or "L" image, as the bytes of a PNG file."""
    if isinstance(image_map, torch.Tensor):
        image_map = image_map.cpu()
    values = np.asarray(image_map)
    require(values.dtype == np.uint8 and values.ndim == 2, "expected a map of uint8 (H, W), got "
            f"{values.dtype} {values.shape}")
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def decode_map(png):
    """Return the map in the bytes of a PNG file, an "L" image."""
    with opened(io.BytesIO(png)) as image:
        image.load()
        return image


class TwoViews(Dataset):
    """(view 1, view 2) of a data set's images, indexed by (epoch, index), or (view 1, view 2,
    map 1, map 2) if there are maps: a PNG's bytes per image, cropped and flipped with it.

    A sample's augmentation depends on (seed, epoch, index), not on order or workers, also if the
    data set or a transform draws from numpy or random."""

    def __init__(self, dataset, preprocessing, seed, crop_min=0.08, maps=None):
        self.dataset, self.seed, self.maps = dataset, seed, maps
        self.view1 = view_transform(*preprocessing, crop_min, blur=1.0, solarise=0.0)
        self.view2 = view_transform(*preprocessing, crop_min, blur=0.1, solarise=0.2)

    def __getitem__(self, epoch_and_index):
        epoch, index = epoch_and_index
        with seeded(mix_seed(AUGMENTATION, self.seed, epoch, index)):  # transforms draw globally
            image = self.dataset[index][0]
            if self.maps is None:
                return self.view1(image), self.view2(image)
            image_map = tv_tensors.Mask(decode_map(self.maps[index]))  # (1, H, W)
            view1, map1 = self.view1(image, image_map)
            view2, map2 = self.view2(image, image_map)
            return view1, view2, plain_map(map1), plain_map(map2)


def plain_map(image_map):
    """tv_tensors.Mask (1, H, W) -> tensor (H, W)."""
    return image_map.as_subclass(torch.Tensor).squeeze(0)


class Batches(Sampler):
    """Batches of (epoch, index) pairs of the epoch that the attribute `epoch` says.

    The order is seeded by (seed, epoch); an incomplete last batch is left out. Each rank takes its
    part of a batch, rank 0 the first."""

    def __init__(self, length, batch_size, seed, rank=0, processes=1):
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, 0
        self.rank, self.per_rank = rank, batch_size // processes

    def __len__(self):
        return self.length // self.batch_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(mix_seed(ORDER, self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(len(self)):
            start = batch * self.batch_size + self.rank * self.per_rank
            yield [(self.epoch, index) for index in order[start:start + self.per_rank]]


class Plain(Dataset):
    """(centre crop, class) of a data set's images, for evaluation."""

    def __init__(self, dataset, preprocessing):
        crop, mean, std = preprocessing
        self.dataset = dataset
        self.transform = v2.Compose(plain_crop(crop) + to_tensor(mean, std))

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return self.transform(image), label


class Readable(Plain):
    """(centre crop, "") of a data set's images; of one that cannot be read (zeros, the reason)."""

    def __init__(self, dataset, preprocessing):
        super().__init__(dataset, preprocessing)
        self.blank = torch.zeros(3, preprocessing.crop, preprocessing.crop)

    def __getitem__(self, index):
        try:
            image, _ = super().__getitem__(index)
            return image, ""
        except UserError as error:
            return self.blank, str(error)
