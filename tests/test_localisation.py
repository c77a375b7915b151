"""Where the kept patches lie: tests/experiments/localisation.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import eval as evaluation
import localisation
import train
from data.augment import plain_crop
from data.birds import Birds
from controls import first_component
from data.datasets import Data
from lodisc import UserError, create_vit, load_encoder, patch_importance

SMALL = ["--image-size", "16", "--patch-size", "8", "--epochs", "1", "--batch-size", "50",
         "--device", "cpu", "--workers", "0", "--out", "run"]


def test_localisation_of_known_importance(monkeypatch):
    """Set the importance of a patch to the bird's fraction of it, or to the negative fraction."""
    encoder, birds = create_vit("vit_nano", 48, 8), Birds("test", 60)
    crop = v2.Compose(plain_crop(48, v2.InterpolationMode.NEAREST))
    fractions = []
    for i in range(60):
        bird = torch.from_numpy(np.asarray(crop(birds.regions(i))) >= 1).float()
        fractions.append(F.avg_pool2d(bird[None], 8).flatten())
    fractions = torch.stack(fractions)
    for sign in (1, -1):
        monkeypatch.setattr(evaluation, "importance_of", lambda e, batch, name: sign * fractions)
        metrics = localisation.localisation(encoder, birds, keep_ratio=0.3)
        kept = fractions.sort(1, descending=sign > 0).values[:, :10]
        assert metrics["object"] == pytest.approx((kept.mean() / fractions.mean()).item(), rel=1e-5)
        assert metrics["object_most"] == pytest.approx(
            (fractions.sort(1).values[:, -10:].mean() / fractions.mean()).item(), rel=1e-5)
        fixed = fractions[:, fractions.mean(0).argsort()[-10:]]
        assert metrics["object_fixed"] == pytest.approx((fixed.mean() / fractions.mean()).item())
        assert (metrics["object"] > 2) == (metrics["parts"] > 1.5) == (sign > 0)


@pytest.mark.usefixtures("elsewhere")
def test_command_measures_the_momentum_encoder_of_a_run(few_birds, monkeypatch, capsys,
                                                        quick_probe):
    monkeypatch.setattr(localisation, "load_data", train.load_data)
    train.main([*SMALL, "--keep-ratio", "0.6", "--importance", "last"])
    before = evaluation.read_results(localisation.Path("run/eval.json"))
    capsys.readouterr()
    localisation.main(["run", "--workers", "0"])
    printed = capsys.readouterr().out
    after = evaluation.read_results(localisation.Path("run/eval.json"))
    stored = after.pop("localisation")
    assert after == before  # other results stay
    expected = localisation.localisation(load_encoder("run", use_momentum=True), Birds("test", 60),
                                         "last", 0.6)
    assert stored == expected and f"object{expected['object']:>14.2f}" in printed
    assert printed.startswith("shown by the kept patches, over chance; most: by the best as many ")


@pytest.mark.usefixtures("elsewhere")
def test_data_without_regions_is_an_error(flowers, quick_probe):
    options = ["--data", str(flowers), "--arch", "vit_nano", *SMALL, "--batch-size", "12"]
    train.main(options)
    with pytest.raises(UserError, match="flowers has no regions"):
        localisation.main(["run"])


# --- every importance and mask ----------------------------------------------------------------


class Dots:
    """An image with a dot of its own colour at each point, 90 x 60 px; the lower half is object."""

    points = torch.tensor([[10.0, 12.0], [40.0, 70.0], [30.0, 45.0]])  # row, column
    colours = (255, 0, 0), (0, 255, 0), (0, 0, 255)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        image = Image.new("RGB", (90, 60))
        for (row, column), colour in zip(self.points.int().tolist(), self.colours):
            image.paste(colour, (column - 2, row - 2, column + 3, row + 3))
        return image, 0

    def regions(self, index):
        regions = np.zeros((60, 90), dtype=np.uint8)
        regions[30:] = 1
        return Image.fromarray(regions)


def test_points_and_object_follow_a_hundred_crops():
    """Without changes of colour a point is where its dot's colour is, or NaN where it is not."""
    crop = v2.Compose([v2.RandomResizedCrop(48, (0.08, 1.0)), v2.RandomHorizontalFlip(),
                       v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dots, seen = Dots(), [0, 0]
    for seed in range(100):
        places = localisation.Places(dots, [dots.points], [0], [crop], seed)
        view, region, points = places[0]
        assert region.dtype == torch.uint8 and region.shape == (48, 48)
        for channel, (row, column) in enumerate(points.tolist()):
            spot = (view[channel] > 0.5).nonzero().double()
            seen[math.isnan(row)] += 1
            if math.isnan(row):
                assert len(spot) < 130  # at most a part of the dot, at the edge
                continue
            assert len(spot)
            middle = (spot.min(0).values + spot.max(0).values) / 2
            at_edge = spot.min() == 0 or spot.max() == 47
            if not at_edge:
                assert (middle - torch.tensor([row, column])).abs().max() < 2.5
            expected = dots.points[channel, 0] >= 30  # the object is below row 30
            if abs(dots.points[channel, 0] - 30) > 2:
                assert region[int(row), int(column)] == expected
    assert min(seen) > 20


def test_find_is_the_nearest_value_and_nan_outside():
    line = torch.tensor([20.0, 18, 16, 14])
    found = localisation.find(line, torch.tensor([14.0, 17.2, 21.9, 13.9, 22.0, math.nan]))
    assert found[:3].tolist() == [3, 1, 0] and found[3:].isnan().all()
    pixels = torch.arange(100, 110).repeat_interleave(5).float()  # enlarged five times
    found = localisation.find(pixels, torch.tensor([100.0, 109.9, 99.9, 110.0]))
    assert found[0] == 0 and found[1] == 45 and found[2:].isnan().all()


def test_place_metrics_match_loops():
    torch.manual_seed(0)
    masks, cover = torch.rand(6, 16).argsort(1) < 5, torch.rand(6, 16)
    points = torch.randint(0, 32, (6, 4, 2)).float()
    points[0, 1:] = points[1] = math.nan
    metrics = localisation.place_metrics(masks, cover, points, 8)
    for image, mask in enumerate(masks):
        kept = mask.nonzero().flatten().tolist()
        assert metrics["object"][image].item() == pytest.approx(
            sum(cover[image, i].item() for i in kept) / 5)
        border = [i // 4 in (0, 3) or i % 4 in (0, 3) for i in kept]
        assert metrics["border"][image].item() == pytest.approx(sum(border) / 5)
        visible = [point for point in points[image].tolist() if not math.isnan(point[0])]
        inside = [int(row // 8) * 4 + int(column // 8) in kept for row, column in visible]
        if visible:
            assert metrics["parts"][image].item() == pytest.approx(sum(inside) / len(visible))
        else:
            assert metrics["parts"][image].isnan()


@pytest.mark.parametrize("shape", localisation.MASKS)
def test_chance_is_the_mean_of_random_masks(shape):
    choose, frequency = localisation.MASKS[shape], torch.zeros(25)
    if shape == "patches":
        frequency = choose(torch.rand(4000, 25), 0.3).float().mean(0)
    else:
        places = [(row, column) for row in range(3) for column in range(3)]
        for row, column in places:
            grid = torch.zeros(5, 5)
            grid[row:row + 3, column:column + 3] = 1
            frequency += grid.flatten() / len(places)
        assert choose(torch.rand(1, 25), 0.3).sum() == 9
    assert torch.allclose(localisation.chance_shares(25, shape), frequency, atol=0.04)


def test_intervals_leave_out_nan():
    values = torch.tensor([1.0, 2.0, 3.0, math.nan])
    mean, half = localisation.interval(values)
    assert mean == 2 and half == pytest.approx(1.96 / 3**0.5)


@pytest.mark.usefixtures("elsewhere")
def test_command_compares_all_importances_of_published_weights(monkeypatch, capsys):
    """Of few birds, with weights whose attention is not uniform; the best mask is the best."""
    birds = Data(Birds("train", 70), None)
    monkeypatch.setattr(localisation, "load_data", lambda *args, **options: birds)
    torch.manual_seed(0)
    encoder = create_vit("vit_nano", 48, 8, learned_positions=True, train_projection=True)
    torch.save({"state_dict": encoder.state_dict(), "config": {
        **encoder.sizes, "image_size": 48, "patch_size": 8}}, "encoder.pth")
    localisation.main(["encoder.pth", "--data", "synthetic", "--image-size", "48", "--images", "66",
                       "--workers", "0", "--out", "places.png"])
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| 48")]
    assert len(rows) == 18 and printed.startswith("66 training images of synthetic; mean ± half")
    assert "48 px: 10 of 36 patches, or a box of 3 x 3" in printed
    for shape in localisation.MASKS:
        of_shape = {row[2]: float(row[3].split()[0]) for row in rows if row[1] == shape}
        assert max(of_shape, key=of_shape.get) == localisation.BEST
        assert of_shape[localisation.BEST] > of_shape[localisation.CHANCE] + 0.2
    assert Image.open("places.png").width == 1200


def test_part_locations_of_cub(tmp_path):
    """Read parts/part_locs.txt: x before y, an invisible part is NaN."""
    folder = tmp_path / "CUB_200_2011"
    (folder / "parts").mkdir(parents=True)
    lines = ["2 1 5.0 6.0 1", "1 1 0.0 0.0 0", "1 2 30.5 40.0 1", "2 2 0.0 0.0 0"]
    (folder / "parts" / "part_locs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    class Named:
        ids = ["2", "1"]

    second, first = localisation.part_points(Named(), "cub", tmp_path)
    assert second[0].tolist() == [6, 5] and second[1].isnan().all()
    assert first[0].isnan().all() and first[1].tolist() == [40, 30.5]


@torch.no_grad()
def test_importances_are_those_of_the_encoder_with_registers():
    """As lodisc.py computes them, and by hand from its outputs; class token and registers are no
    patches."""
    torch.manual_seed(0)
    encoder = create_vit("vit_tiny", 32, 8, registers=3).double()
    encoder.reg_token.normal_()
    encoder.cls_token.normal_()
    images = torch.randn(4, 3, 32, 32).double()
    ranked = localisation.importances(encoder, images)
    assert all(importance.shape == (4, 16) for importance in ranked.values())
    for name, ours in ((localisation.PRODUCT, "product"), ("rollout", "rollout"),
                       ("last layer", "last")):
        assert torch.allclose(ranked[name], patch_importance(encoder, images, ours)[1], atol=1e-6)
    _, rows = encoder.with_attention(images, "row")
    four = rows[-1].log() + rows[-2].log() + rows[-3].log() + rows[-4].log()
    assert torch.allclose(ranked["product of the last four"], four, atol=1e-6)
    token, patches = encoder.tokens(images)
    cosine = torch.einsum("bd,bnd->bn", token, patches)
    cosine = cosine / token.norm(dim=1, keepdim=True) / patches.norm(dim=2)
    assert torch.allclose(ranked["cosine with the class token"], cosine)
    assert torch.allclose(ranked["first principal component"], first_component(patches))
    assert ranked[localisation.CENTRE][0].topk(4).indices.sort().values.tolist() == [5, 6, 9, 10]


@torch.no_grad()
def test_table_is_of_both_augmentations_and_of_centre_crops(monkeypatch):
    """Take a view's mean colour as importance of one patch; compute a row by hand."""
    values = {(mask, name): {metric: torch.tensor([0.2, 0.4, 0.9]) * scale
                             for metric in localisation.METRICS}
              for mask in localisation.MASKS
              for name, scale in ((localisation.PRODUCT, 0.5), ("other", 1.0))}
    crops = {key: {metric: 1 - value for metric, value in row.items()}
             for key, row in values.items()}
    rows = localisation.rows_of(98, dict(zip(localisation.VIEWS, (values, crops))))
    row, = [row for row in rows if row.importance == "other" and row.mask == "box"]
    assert row.cells["training view", "parts"][0] == pytest.approx(0.5)
    assert row.cells["centre crop", "parts"][0] == pytest.approx(0.5)
    assert row.cells["centre crop", "object"][0] == pytest.approx(0.5)
    half = 1.96 * torch.tensor([0.1, 0.2, 0.45]).std().item() / 3**0.5
    assert row.difference == (pytest.approx(0.25), pytest.approx(half))
    assert localisation.markdown(rows)[-1].endswith(f"| +0.250 ± {half:.3f} |")


def test_transforms_take_turns():
    def name_of(name):
        return lambda image, layers: (name, layers)

    dots = Dots()
    places = localisation.Places(dots, [dots.points], [0, 0, 0], [name_of("a"), name_of("b")], 0)
    assert [places[i][0] for i in range(3)] == ["a", "b", "a"]
