"""What tests/kept.py prints and draws, against its definitions."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import kept
import train
from data import draw
from data.augment import Plain
from data.datasets import load_data
from eval import export
from lodisc import (MASKS, UserError, VisionTransformer, attention_product, load_encoder,
                    location_mask, mask_pixels)

pytestmark = pytest.mark.usefixtures("elsewhere")
MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture
def encoder():
    encoder = VisionTransformer(16, 4, 64, 2, 1).eval()
    encoder.mean, encoder.std = MEAN, STD
    return encoder


def test_masked_encoder_keeps_only_the_patches_of_its_own_mask(encoder):
    images = torch.randn(3, 3, 16, 16)
    mask = location_mask(attention_product(encoder(images, attention="row")[1]), 0.3)
    expected = encoder(mask_pixels(images, mask, 4))[0]
    assert torch.equal(kept.Masked(encoder, "location", 0.3)(images)[0], expected)
    draws = torch.Generator().manual_seed(0)
    masked = kept.Masked(encoder, "random", 0.3)
    for _ in range(2):  # a new mask for every batch, from the same seed
        mask = MASKS["random"][0](torch.zeros(3, 16), 0.3, draws)
        assert torch.equal(masked(images)[0], encoder(mask_pixels(images, mask, 4))[0])


def test_metrics_by_definition(encoder, flowers):
    test = load_data(str(flowers)).test
    values = kept.measure(encoder, test, 0.3)
    images = torch.stack([image for image, _ in Plain(test, 16, MEAN, STD)])
    with torch.no_grad():
        full = F.normalize(encoder(images)[0], dim=1)
        masked = F.normalize(kept.Masked(encoder, "least", 0.3)(images)[0], dim=1)
    labels = torch.tensor(test.targets)
    own = [int((query @ masked.T).argmax()) == i for i, query in enumerate(full)]
    assert values["own image, least"] == pytest.approx(sum(own) / 12) and 0 < sum(own) < 12
    for name, features in (("all", full), ("least", masked)):
        nearest = (features @ features.T).fill_diagonal_(-9).argmax(1)
        right = (labels[nearest] == labels).double().mean().item()
        assert values[f"rank-1, {name}"] == pytest.approx(right)
    everything = kept.measure(encoder, test, 1.0)
    assert {everything[f"own image, {mask}"] for mask in kept.SHOWN} == {1.0}
    assert {everything[f"rank-1, {mask}"] for mask in kept.SHOWN} == {values["rank-1, all"]}


def test_mosaic_has_the_mean_colour_of_every_patch():
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((200, 100, 40), (4, 0, 6, 4))  # half of the upper right patch
    small = kept.mosaic(image, 4, tile=2)
    assert [small.getpixel(place) for place in ((0, 0), (1, 0), (0, 1))] == [
        (0, 0, 0), (100, 50, 20), (0, 0, 0)]


def test_picture_shows_the_patches_that_each_image_keeps(encoder, flowers):
    test = load_data(str(flowers)).test
    page = kept.picture({"row": torch.eye(12, 16).bool()}, test, encoder)  # image i keeps patch i
    step = draw.TILE + draw.GAP
    for x, index in enumerate(draw.example_indices(test.targets)):
        left, top = draw.MARGIN + x * step, draw.GAP + step
        tile = page.crop((left, top, left + draw.TILE, top + draw.TILE)).resize((4, 4), Image.BOX)
        colours = [tile.getpixel((i % 4, i // 4)) for i in range(16)]
        assert [i for i, colour in enumerate(colours) if max(colour) > 20] == [index]


def test_rows_of_weights_and_runs_and_a_picture(encoder, flowers, capsys):
    export(encoder, "start.pth")
    train.main(["--data", str(flowers), "--init", "start.pth", "--image-size", "16", "--epochs",
                "4", "--batch-size", "12", "--workers", "0", "--seed", "3", "--out", "run",
                "--encoder-lr", "0.1", "--momentum", "0"])  # masks change
    capsys.readouterr()
    command = [str(flowers), "start.pth", "run", "--image-size", "16", "--out", "kept.png"]
    kept.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "|", "|---|---|---|---|---|---|---|---|---|", "| start", "| lodisc, seed 3"]
    momentum, test = load_encoder("run", momentum=True), load_data(str(flowers)).test
    masks = kept.kept_patches(momentum, test)  # (12, 16), 4 kept
    common = (masks & kept.kept_patches(load_encoder("start.pth"), test)).sum().item() / 48
    values = [*kept.measure(momentum, test).values(), common]
    assert lines[3].endswith(" | ".join(f"{value:.3f}" for value in values) + " |")
    assert lines[2].endswith(" | 1.000 |") and 0 < common < 1
    with Image.open("kept.png") as page:
        assert page.height > 3 * 126 and len(page.getcolors(1 << 20)) > 300
    with pytest.raises(UserError, match="kept.png exists"):
        kept.main(command)
    with pytest.raises(UserError, match="several sizes"):
        kept.main([str(flowers), "start.pth", "run", "--image-size", "20"])
    with pytest.raises(UserError, match="no train/ and test/"):
        kept.main([str(flowers / "train"), "start.pth"])
