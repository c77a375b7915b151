"""The drawn birds, folders of images, seeded augmentation, the order of batches."""

import hashlib
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data import augment, birds
from data.augment import (Batches, Blur, Plain, Preprocessing, TwoViews, cropped_maps, mix_seed,
                          plain_crop)
from data.birds import BIRD, CLASSES, FAMILIES, GROUND, MARK, PART, SPECIES, Birds, draw
from data.datasets import load_data
from lodisc import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def two_views(dataset, size, seed, *crop_min):
    return TwoViews(dataset, Preprocessing(size, MEAN, STD), seed, *crop_min)


def digest(image):
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def test_bird_depends_on_seed_split_and_index_only():
    image, parts = draw(0, "test", 7)
    draw.cache_clear()
    again, parts_again = draw(0, "test", 7)
    assert digest(image) == digest(again) and digest(parts) == digest(parts_again)
    keys = (0, "test", 7), (0, "test", 27), (1, "test", 7), (0, "train", 7)
    assert len({digest(draw(*key)[0]) for key in keys}) == 4


def test_birds_are_balanced_and_splits_disjoint():
    data = load_data("synthetic")
    assert len(data.test) >= 1000
    for split in (data.train, data.test):
        counts = np.bincount(split.targets)
        assert len(counts) == len(CLASSES) == len(split.classes) and counts.min() == counts.max()
        image, label = split[3]
        assert image.mode == "RGB" and label == split.targets[3] == 3
    train = {digest(data.train[i][0]) for i in range(200)}
    assert len(train) == 200 and not train & {digest(data.test[i][0]) for i in range(200)}


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_species_differ_only_in_the_parts(monkeypatch, family):
    """Draw all species of a family alike: pixels that differ are in the parts or next to them."""
    images = []
    for species in range(len(SPECIES)):
        label = family * len(SPECIES) + species
        monkeypatch.setattr(birds, "CLASSES", CLASSES[label:label + 1])
        images.append([np.asarray(x).astype(int) for x in draw.__wrapped__(0, "test", 5)])
    plain, parts = images[0]
    near = np.zeros(parts.shape, bool)
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            near |= np.roll(parts > MARK, (dy, dx), (0, 1))
    for image, its_parts in images[1:]:
        differs = (np.abs(image - plain) > 25).any(-1)
        assert 0.002 < differs.mean() < 0.2
        assert (differs & ~near).sum() <= 0.05 * differs.sum()
        assert np.array_equal(its_parts, parts)


def test_regions_cover_a_plausible_fraction():
    regions = [np.asarray(Birds("test", 100).regions(i)) for i in range(100)]
    fractions = np.array([[(one >= BIRD).mean(), (one == PART).mean()] for one in regions])
    assert (fractions[:, 0] > 0.04).all() and 0.1 < fractions[:, 0].mean() < 0.4
    assert 0 < fractions[:, 1].mean() < 0.5 * fractions[:, 0].mean()  # all three parts


def test_part_map_separates_ground_body_head_and_wing():
    """Check that the head is farther from the bird's centre than the wing, unless it is cropped."""
    birds, farther = Birds("test", 60), []
    for i in range(60):
        parts, regions = (np.asarray(read(i)) for read in (birds.part_map, birds.regions))
        assert np.array_equal(parts == 0, regions == GROUND)
        assert set(np.unique(parts)) <= {0, 1, 2, 3} and set(np.unique(regions)) <= {0, 1, 2}
        assert set(parts[regions == PART]) == {2, 3}  # crown and eye ring, wing bar
        middle, head, wing = (np.argwhere(where).mean(0)
                              for where in (parts > 0, parts == 2, parts == 3))
        farther.append(np.linalg.norm(head - middle) > np.linalg.norm(wing - middle))
    assert sum(farther) > 50
    covered = np.bincount(np.concatenate([np.asarray(birds.part_map(i)).ravel()
                                          for i in range(60)])) / (60 * 64 * 64)
    assert (covered[1:] > 0.01).all() and covered[1] > covered[3]


def test_views_depend_on_seed_epoch_and_index_only():
    images = Birds("train", 10)
    views = two_views(images, 32, 3)
    one = views[2, 5]
    torch.rand(7)
    state = torch.get_rng_state()
    again = views[2, 5]
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not used
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert one[0].shape == one[1].shape == (3, 32, 32) and not torch.equal(*one)
    for different in (views[3, 5], views[2, 6], two_views(images, 32, 4)[2, 5]):
        assert not torch.equal(one[0], different[0])


class Noisy(Birds):
    """A data set that draws from all three generators when it opens an image."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return image.rotate(90 * random.randrange(4)), label


drawn = []


def test_every_generator_is_seeded_for_each_image():
    views = two_views(Noisy("train", 10), 32, 3)
    drawn.clear()
    first = [views[0, i] for i in range(4)]
    values = list(drawn)
    drawn.clear()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again = [views[0, i] for i in reversed(range(4))][::-1]  # another order
    assert drawn[::-1] == values
    assert all(len(set(column)) == 4 for column in zip(*values))  # of each generator
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
    views[1, 0]
    assert drawn[-1] not in values  # another epoch
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert np.random.get_state()[1].tolist() == states[1]
    with pytest.raises(KeyError), augment.seeded(1):
        raise KeyError
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]


def test_augmentation_matches_byol():
    views = two_views(Birds("train", 1), 224, 0)
    for view, blur, solarise in ((views.view1, 1.0, 0.0), (views.view2, 0.1, 0.2)):
        crop, jitter, grey, blurred, solarised, flip = view.transforms[:6]
        assert tuple(crop.scale) == (0.08, 1.0) and tuple(crop.size) == (224, 224)
        assert jitter.p == 0.8 and isinstance(jitter.transforms[0], v2.ColorJitter)
        factors = jitter.transforms[0]
        assert factors.brightness == factors.contrast == (0.6, 1.4)
        assert factors.saturation == (0.8, 1.2) and factors.hue == (-0.1, 0.1)
        assert grey.p == 0.2 and blurred.p == blur and solarised.p == solarise and flip.p == 0.5
        assert tuple(blurred.transforms[0].sigma) == (0.1, 2.0)


def test_smallest_crop_reaches_both_views():
    views = two_views(Birds("train", 1), 32, 0, 0.3)
    for view in (views.view1, views.view2):
        assert tuple(view.transforms[0].scale) == (0.3, 1.0)


def test_blur_sigma_is_within_its_bounds():
    """Blur a white line on black: the profile's standard deviation is between the two bounds."""
    line = torch.zeros(41, 41, dtype=torch.uint8)
    line[:, 20] = 255
    offset, widths = torch.arange(41) - 20.0, []
    for _ in range(40):
        row = torch.from_numpy(np.array(Blur(2.0, 4.0)(Image.fromarray(line.numpy()))))[20].float()
        widths.append(((row * offset**2).sum() / row.sum()).sqrt().item())
    assert 1.8 < min(widths) < 2.5 and 3.5 < max(widths) < 4.2


def epochs_of(batches, epochs):
    """Return the batches of each of these epochs."""
    orders = []
    for epoch in epochs:
        batches.epoch = epoch
        orders.append(list(batches))
    return orders


def test_order_depends_on_seed_and_epoch():
    first, second = epochs_of(Batches(20, 4, seed=1), range(2))
    assert [first, second] == epochs_of(Batches(20, 4, seed=1), range(2))
    assert [second] == epochs_of(Batches(20, 4, seed=1), [1])  # as after a resume
    for epoch, batches in enumerate([first, second]):
        pairs = sum(batches, [])
        assert {e for e, _ in pairs} == {epoch} and sorted(i for _, i in pairs) == list(range(20))
    orders = [[i for _, i in sum(part, [])] for part in (first, second, list(Batches(20, 4, 2)))]
    assert len({tuple(order) for order in [*orders, range(20)]}) == 4


def test_seeds_of_different_purposes_differ():
    """SeedSequence pads with zeros, so that without a purpose (s, e) and (s, e, 0) coincide."""
    seeds, pairs = [], [(epoch, i) for epoch in range(9) for i in range(9)]
    for seed in range(4):
        seeds += [mix_seed(augment.ORDER, seed, epoch) for epoch in range(9)]
        for purpose in (augment.AUGMENTATION, augment.MASK_NOISE):
            seeds += [mix_seed(purpose, seed, *pair) for pair in pairs]
    assert len(set(seeds)) == len(seeds) == 4 * (9 + 81 + 81)
    generator = torch.Generator().manual_seed(mix_seed(augment.ORDER, 1, 0))
    assert [i for _, i in sum(Batches(20, 4, seed=1), [])] == \
        torch.randperm(20, generator=generator).tolist()
    views = two_views(Birds("train", 3), 16, 5)
    torch.manual_seed(mix_seed(augment.AUGMENTATION, 5, 2, 1))
    assert torch.equal(views.view1(views.dataset[1][0]), views[2, 1][0])


def test_full_batches_are_split_across_ranks():
    whole = Batches(23, 6, seed=1)
    assert len(whole) == 3 and [len(batch) for batch in whole] == [6] * 3
    per_rank = [list(Batches(23, 6, 1, rank, 3)) for rank in range(3)]
    assert [sum(batches, []) for batches in zip(*per_rank)] == list(whole)


def test_plain_crop_is_centred():
    gradient = np.zeros((160, 240, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(240), np.arange(160)[:, None]
    crop = np.asarray(v2.Compose(plain_crop(70))(Image.fromarray(gradient))).astype(float)
    assert crop.shape == (70, 70, 3)
    assert abs(crop[..., 0].mean() - 119.5) < 1 and abs(crop[..., 1].mean() - 79.5) < 1
    assert crop[0, 0, 1] == pytest.approx(10, abs=1.5)  # 1/16 of 160 is cut off each side
    red = [(Image.new("RGB", (50, 50), (255, 0, 0)), 4)]
    tensor, label = Plain(red, Preprocessing(16, MEAN, STD))[0]
    assert label == 4 and tensor.shape == (3, 16, 16)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(tensor.mean((1, 2)), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (97, 60), (60, 97)])
def test_cropped_maps_lie_on_the_image_of_evaluation(size):
    """Draw a rectangle into image and map: it is at the same place in both crops, and the map
    keeps its values."""
    maps, images = [], []
    for i in range(3):
        pixels = np.zeros(size[::-1], np.uint8)
        pixels[10 + 4 * i:40, 20:45 - 4 * i] = 7
        maps.append(Image.fromarray(pixels))
        images.append((Image.fromarray(36 * pixels).convert("RGB"), 0))
    cropped = cropped_maps(maps.__getitem__, [2, 0], 48)
    assert cropped.shape == (2, 48, 48) and cropped.dtype == torch.uint8
    assert cropped.unique().tolist() == [0, 7]
    plain = Plain(images, Preprocessing(48, (0, 0, 0), (1, 1, 1)))
    for values, i in zip(cropped, [2, 0]):
        light = plain[i][0][0] * 255 / 36  # blurred at the edges alone
        assert ((values - light).abs() > 3.6).sum() <= 2
        assert ((values == 7) == (light > 3.5)).float().mean() > 0.97


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (90, 10), (80, 10), (30, 40)])
def test_crop_of_a_thin_image_is_its_middle_and_needs_little_memory(size):
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    pixels[size[1] // 2 - size[1] // 6:, size[0] // 2 - size[0] // 6:] = 200
    image, stages = Image.fromarray(pixels), []
    for stage in plain_crop(56):
        image = stage(image)
        stages.append(image.size)
    assert stages[-1] == (56, 56) and max(stages[1]) <= 8 * 64
    if max(size) <= 8 * min(size):  # then nothing is cut before
        assert stages[0] == size
    assert 150 < np.asarray(image)[28, 28].mean() <= 200 or min(size) == 1


def test_folder_with_train_and_test(flowers):
    data = load_data(str(flowers))
    assert len(data.train) == 36 and len(data.test) == 12
    assert data.train.classes == ["class 0", "class 1", "class 2"]
    assert data.test[5][1] == 1


def test_val_folder_is_used_as_test(flowers):
    (flowers / "test").rename(flowers / "val")
    assert len(load_data(str(flowers)).test) == 12


@pytest.mark.parametrize("layout", ["no test", "no split", "no labels", "nested"])
def test_folders_without_labels_or_splits_have_no_test_set(flowers, tmp_path, layout):
    root = flowers
    if layout == "no test":
        shutil.rmtree(flowers / "test")
    elif layout == "no split":
        root = flowers / "train"
    else:
        for i, path in enumerate(sorted((flowers / "train").rglob("*.jpg"))):
            target = flowers / "train" if layout == "no labels" else tmp_path / "deep" / "er"
            target.mkdir(parents=True, exist_ok=True)
            path.rename(target / f"{i}.jpg")
        root = flowers if layout == "no labels" else tmp_path / "deep"
        if layout == "no labels":
            for folder in (flowers / "train").iterdir():
                if folder.is_dir():
                    folder.rmdir()
    data = load_data(str(root))
    assert len(data.train) == 36 and data.test is None and "no train/ and test/" in data.note
    assert len(set(data.train.targets)) == (3 if layout in ("no test", "no split") else 1)
    assert data.train[0][0].mode == "RGB"


def test_invalid_folders_raise(flowers, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_data(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--data"):
        load_data(str(tmp_path / "empty"))
    (flowers / "test" / "class 2").rename(flowers / "test" / "class 9")
    with pytest.raises(UserError, match="class 2, class 9"):
        load_data(str(flowers))
