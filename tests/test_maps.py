"""Maps that travel with the image: through crops, held-out images, resumed runs and processes."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import Killed, kill_after, same, weights
from data.augment import Preprocessing, TwoViews, decode_map, encode_map
from data.birds import Birds
from data.datasets import Fold, hash_images, load_data
from lodisc import UserError, create_vit

ROOT = Path(__file__).parent.parent
BASELINES = ROOT / "tests" / "baselines"
TORCHRUN = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node=2", ROOT / "train.py"]
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--batch-size", "12",
         "--workers", "0", "--device", "cpu", "--epochs", "2"]
# a map of 1 for a red image, all 0 for others; the class of `flowers` that is red is a third
MAPPED = """
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lodisc import MoCoV3


class Output(NamedTuple):
    total: torch.Tensor
    marked: torch.Tensor


class Mapped(MoCoV3):
    def annotate(self, dataset):
        with open("annotated.txt", "a") as file:
            file.write(f"{sum(p.sum().item() for p in self.encoder.parameters())}\\n")
        torch.rand(3)  # draws that must not move any other
        for i in range(len(dataset)):
            pixels = np.asarray(dataset[i][0])
            yield np.uint8(pixels[..., 0] > 120)

    def forward(self, view1, view2, generator=None, progress=0.0, *, maps):
        assert all(m.shape == (len(view1), 16, 16) and m.dtype == torch.uint8 for m in maps)
        total = super().forward(view1, view2, generator, progress).total
        return Output(total, torch.stack(maps).float().mean())

    def pivotal_patches(self, images):
        return None
"""
METHODS = {
    "particle.py:PARTICLE": ["--method-option", "clusters=3"], "cvsa.py:CVSA": [],
    "released.py:Released": []}


@pytest.fixture
def mapped(flowers, elsewhere):
    """Write the method file; return the options of a run with it."""
    Path("mapped.py").write_text(MAPPED, encoding="utf-8")
    return ["--data", str(flowers), *SMALL, "--method", "mapped.py:Mapped"]


def annotations():
    """Return how often the method has annotated."""
    return len(Path("annotated.txt").read_text(encoding="utf-8").splitlines())


def rows(folder):
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- views ------------------------------------------------------------------------------------


class Corners:
    """Grey images with one red corner, a quarter of each side."""

    targets = [0] * 4

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Image.fromarray(self.pixels(index)), 0

    @staticmethod
    def pixels(index):
        pixels = np.full((160, 200, 3), 90, np.uint8)
        rows = slice(0, 80) if index < 2 else slice(80, 160)
        columns = slice(0, 100) if index % 2 else slice(100, 200)
        pixels[rows, columns] = (255, 0, 0)
        return pixels

    def maps(self):
        return [encode_map(np.uint8(self.pixels(i)[..., 0] == 255)) for i in range(4)]


def test_map_of_a_corner_follows_it_through_a_hundred_crops(monkeypatch):
    monkeypatch.setattr(train.augment.v2, "ColorJitter", lambda *args: train.augment.v2.Identity())
    for name in ("RandomGrayscale", "RandomSolarize"):
        monkeypatch.setattr(train.augment.v2, name,
                            lambda *args, **options: train.augment.v2.Identity())
    images = Corners()
    views = TwoViews(images, Preprocessing(32, (0, 0, 0), (1, 1, 1)), 0, maps=images.maps())
    covers = []
    for epoch in range(25):
        for index in range(4):
            *pair, map1, map2 = views[epoch, index]
            for view, view_map in zip(pair, (map1, map2)):
                assert view_map.shape == (32, 32) and view_map.dtype == torch.uint8
                red = view[0] - view[1] > 0.33  # blur and interpolation soften the edge
                wrong = red != view_map.bool()
                inside = wrong[1:-1, 1:-1] & ~edges(view_map)[1:-1, 1:-1]
                assert not inside.any()
                covers.append(view_map.float().mean().item())
    assert min(covers) == 0 and max(covers) == 1 and len(set(covers)) > 50


def edges(view_map):
    """Pixels next to one of another id."""
    wide = torch.nn.functional.max_pool2d(view_map[None].float(), 5, 1, 2)
    narrow = -torch.nn.functional.max_pool2d(-view_map[None].float(), 5, 1, 2)
    return (wide != narrow)[0]


def test_maps_change_no_view_and_no_random_draw():
    images, preprocessing = Corners(), Preprocessing(32, (0.5,) * 3, (0.2,) * 3)
    plain = TwoViews(images, preprocessing, 0)
    with_maps = TwoViews(images, preprocessing, 0, maps=images.maps())
    for epoch in range(10):
        for index in range(4):
            assert len(plain[epoch, index]) == 2
            assert all(map(torch.equal, plain[epoch, index], with_maps[epoch, index][:2]))


def test_maps_are_stored_losslessly():
    values = np.random.default_rng(0).integers(0, 256, (7, 9), dtype=np.uint8)
    for stored in (values, torch.from_numpy(values), Image.fromarray(values)):
        png = encode_map(stored)
        assert Image.open(io.BytesIO(png)).format == "PNG"
        assert (np.asarray(decode_map(png)) == values).all()
    for wrong in (values.astype(int), values[None]):
        with pytest.raises(ValueError, match=r"expected a map of uint8 \(H, W\), got"):
            encode_map(wrong)


def test_map_of_another_size_raises():
    images = Corners()
    maps = [encode_map(np.zeros((16, 20), np.uint8))] * 4
    with pytest.raises(ValueError, match="multiple HxW dimensions"):
        TwoViews(images, Preprocessing(32, (0,) * 3, (1,) * 3), 0, maps=maps)[0, 0]


# --- data sets --------------------------------------------------------------------------------


def test_a_fold_passes_regions_and_parts_on():
    data = load_data("synthetic", held_out=True)
    birds = Birds("train", 2000)
    for fold in data[:2]:
        index = len(fold) // 2
        original = fold.indices[index]
        assert fold.regions(index).tobytes() == birds.regions(original).tobytes()
        assert fold.part_map(index).tobytes() == birds.part_map(original).tobytes()
        assert fold.parts == birds.parts and fold.classes == birds.classes
        assert fold[index][0].tobytes() == birds[original][0].tobytes()
        assert fold.targets[index] == birds.targets[original]
    assert not hasattr(Fold(Corners(), [0]), "regions")


def test_hash_is_of_names_and_sizes_in_their_order(flowers, tmp_path):
    first = hash_images(load_data(str(flowers)).train)
    shutil.copytree(flowers, tmp_path / "moved")
    assert hash_images(load_data(str(tmp_path / "moved")).train) == first
    fold = load_data(str(flowers), held_out=True)
    assert len({first, hash_images(fold.train), hash_images(fold.test)}) == 3
    image = next((tmp_path / "moved" / "train").rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"\0")
    assert hash_images(load_data(str(tmp_path / "moved")).train) != first
    odd = image.with_name(os.fsdecode(b"bad\xff.jpg"))
    try:
        image.rename(odd)
    except OSError:
        pytest.skip("the file system has no such names")
    hash_images(load_data(str(tmp_path / "moved")).train)


# --- runs -------------------------------------------------------------------------------------


def test_run_with_maps(mapped, quick_probe, capsys):
    """Annotated once, before the first checkpoint; every view has its map; images without a mark
    too; evaluated by the checkpoint alone."""
    train.main([*mapped, "--out", "run"])
    assert [float(row["marked"]) for row in rows("run")] == pytest.approx([1 / 3] * 2)
    assert "maps of 36 images" in capsys.readouterr().out
    stored = torch.load("run/maps.pt", weights_only=True)
    assert len(stored["maps"]) == 36
    dataset = load_data(str(Path("flowers").resolve())).train
    assert stored["images"] == hash_images(dataset)
    for i, png in enumerate(stored["maps"]):
        assert png.startswith(b"\x89PNG")
        image = dataset[i][0]
        assert (np.asarray(decode_map(png)) == (np.asarray(image)[..., 0] > 120)).all()
    assert annotations() == 1
    Path("alone").mkdir()
    shutil.copy("run/checkpoint.pt", "alone")
    evaluation.main(["retrieval", "alone", "--workers", "0"])
    evaluation.main(["masks", "alone", "--workers", "0"])
    assert "no maps.pt in alone" in capsys.readouterr().out


def test_annotation_draws_nothing_from_the_runs_stream(mapped):
    """The order, the views and the weights are those of the same method with other draws."""
    train.main([*mapped, "--out", "run"])
    state = torch.load("run/checkpoint.pt", weights_only=True)["random"]
    Path("mapped.py").write_text(MAPPED.replace("torch.rand(3)", "torch.rand(30)"))
    sys.modules.pop("method_mapped")
    train.main([*mapped, "--out", "other"])
    assert same(weights("run"), weights("other"))
    assert torch.equal(state, torch.load("other/checkpoint.pt", weights_only=True)["random"])


def test_initial_weights_annotate_in_float32_without_gradient(mapped, monkeypatch):
    seen = []
    real = train.augment.encode_map
    monkeypatch.setattr(train.augment, "encode_map", lambda image_map: seen.append(
        (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))) or real(image_map))
    train.main([*mapped, "--amp", "bf16", "--out", "run"])
    assert set(seen) == {(False, False)}
    config = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    encoder = evaluation.build_model(config).encoder
    total = sum(p.sum().item() for p in encoder.parameters())
    assert float(Path("annotated.txt").read_text(encoding="utf-8")) == pytest.approx(total)


@pytest.mark.parametrize("old, new", [
    ("range(len(dataset))", "range(5)"), ("np.uint8(pixels[..., 0]", "np.uint8(pixels[1:, :, 0]"),
    ("np.uint8(pixels[..., 0] > 120)", "np.uint8(pixels[..., 0].T > 120)")])
def test_maps_of_other_number_or_size_raise(mapped, old, new):
    Path("mapped.py").write_text(MAPPED.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match="a map for each image, of its size; images: 36, "):
        train.main([*mapped, "--out", "run"])
    assert not Path("run").exists()


def test_maps_see_the_images_as_training_does(mapped):
    """--normalise says how, for weights that do not."""
    torch.save(create_vit("vit_nano", 16, 8).state_dict(), "weights.pth")
    show = "print(list(self.encoder.mean), list(self.encoder.std))"
    Path("mapped.py").write_text(MAPPED.replace("torch.rand(3)", show), encoding="utf-8")
    options = [*mapped[:2], *mapped[6:], "--init", "weights.pth", "--heads", "3", "--image-size",
               "16"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        train.main([*options, "--normalise", "half", "--out", "run"])
    assert "[0.5, 0.5, 0.5] [0.5, 0.5, 0.5]" in printed.getvalue()


@pytest.mark.parametrize("held_out", [[], ["--held-out"]])
def test_resumed_run_reads_its_maps(mapped, held_out, monkeypatch, tmp_path):
    """Bit for bit, annotated once, also in a folder that has moved."""
    options = [*mapped, *held_out]
    train.main([*options, "--out", "whole"])
    Path("annotated.txt").unlink()
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            train.main([*options, "--out", "part"])
    Path("flowers").rename("moved")
    train.main(["--resume", "part", "--data", "moved"])
    assert same(weights("part"), weights("whole"))
    assert annotations() == 1
    assert len(torch.load("part/maps.pt", weights_only=True)["maps"]) == (30 if held_out else 36)


def test_resumed_run_without_its_maps_or_with_others_says_so(mapped, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            train.main([*mapped, "--out", "part"])
    image = next(Path("flowers/train").rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(UserError, match="maps.pt is of images with other names or sizes") as error:
        train.main(["--resume", "part"])
    assert "\n" not in str(error.value)
    Path("part/maps.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="maps.pt") as error:
        train.main(["--resume", "part"])
    assert "\n" not in str(error.value)
    Path("part/maps.pt").unlink()
    with pytest.raises(UserError, match="part/maps.pt is missing; .* start a new run$") as error:
        train.main(["--resume", "part"])
    assert "\n" not in str(error.value) and Path("part/checkpoint.pt").exists()


def test_finished_run_is_evaluated_again_without_its_maps(mapped, quick_probe):
    train.main([*mapped, "--out", "run"])
    Path("run/maps.pt").unlink()
    Path("run/eval.json").unlink()
    train.main(["--resume", "run"])
    assert Path("run/eval.json").exists() and not Path("run/maps.pt").exists()


def test_run_without_annotate_has_no_maps(flowers, elsewhere, monkeypatch):
    seen, real = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: seen.append(args[-1]) or real(*args))
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])
    assert seen == [[]] * 6 and not Path("run/maps.pt").exists()


def test_maps_reach_the_method_in_the_order_of_the_views(mapped, monkeypatch):
    real = TwoViews.__getitem__

    def view(self, key):
        view1, view2, map1, map2 = real(self, key)
        return view1, view2, map1 + 10, map2 + 20

    monkeypatch.setattr(TwoViews, "__getitem__", view)
    old = "        assert all("
    assert MAPPED.count(old) == 1
    Path("mapped.py").write_text(MAPPED.replace(old, "        assert maps[0].max() < 20 <= "
                                 "maps[1].min()\n" + old), encoding="utf-8")
    train.main([*mapped, "--out", "run"])


# --- pictures ---------------------------------------------------------------------------------


def test_masks_of_a_run_with_maps_are_of_training_images(mapped, monkeypatch, capsys):
    pages, real = [], evaluation.sheet
    monkeypatch.setattr(evaluation, "sheet", lambda rows: pages.append(rows) or real(rows))
    train.main([*mapped, "--out", "run"])
    evaluation.main(["masks", "run", "--workers", "0"])
    assert Path("run/masks.png").is_file()
    page, = pages
    (images, nothing), (_, maps) = page.values()
    assert maps.dtype == torch.int64
    dataset = load_data(str(Path("flowers").resolve())).train
    assert nothing is None and len(images) == 8 and maps.shape == (8, 256)
    shown = train.example_indices(dataset.targets)
    assert [bool(row.all()) for row in maps] == [dataset.targets[i] == 0 for i in shown]
    assert [bool(row.any()) for row in maps] == [dataset.targets[i] == 0 for i in shown]
    # other images have no map: their pivotal patches, as of any run
    image = str(next(Path("flowers/test").rglob("*.jpg")))
    evaluation.main(["masks", "run", image])
    assert len(pages) == 1


def test_masks_of_moved_and_of_other_data(mapped, monkeypatch, tmp_path):
    pages, real = [], evaluation.sheet
    monkeypatch.setattr(evaluation, "sheet", lambda rows: pages.append(rows) or real(rows))
    train.main([*mapped, "--out", "run"])
    shutil.copytree("flowers", "other")
    Path("flowers").rename("moved")
    evaluation.main(["masks", "run", "--data", "moved", "--workers", "0"])
    assert len(pages) == 1
    image = next(Path("other/train").rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"\0")
    evaluation.main(["masks", "run", "--data", "other", "--workers", "0"])
    assert len(pages) == 1
    torch.save({"x": 1}, "run/maps.pt")
    evaluation.main(["masks", "run", "--data", "other", "--workers", "0"])
    with pytest.raises(UserError, match="maps.pt is of images with other"):
        Path("moved").rename("flowers")
        evaluation.main(["masks", "run", "--workers", "0"])


def test_masks_of_saliency_are_a_heat_map(mapped, monkeypatch):
    pages, real = [], evaluation.sheet
    monkeypatch.setattr(evaluation, "sheet", lambda rows: pages.append(rows) or real(rows))
    Path("mapped.py").write_text(MAPPED.replace("pixels[..., 0] > 120", "pixels[..., 0]"),
                                 encoding="utf-8")
    train.main([*mapped, "--out", "run"])
    evaluation.main(["masks", "run", "--workers", "0"])
    (_, maps) = pages[0]["its map"]
    assert maps.dtype == torch.float32 and maps.max() > 200


def test_masks_of_an_unlabelled_run_with_maps(mapped):
    train.main(["--data", "flowers/train/class 0", *mapped[2:], "--out", "run"])
    evaluation.main(["masks", "run", "--workers", "0"])
    assert Path("run/masks.png").is_file()


def test_masks_of_a_held_out_run_on_data_of_one_class(mapped):
    train.main([*mapped, "--held-out", "--out", "run"])
    evaluation.main(["masks", "run", "--workers", "0"])  # of its own images, with their maps
    for split in ("train", "test"):
        shutil.copytree("flowers/test/class 0", f"one/{split}/class 0")
    evaluation.main(["masks", "run", "--data", "one", "--workers", "0"])


def test_place_of_the_masks_is_measured_with_maps_too(few_birds, elsewhere):
    Path("mapped.py").write_text(MAPPED, encoding="utf-8")
    train.main([*SMALL, "--method", "mapped.py:Mapped", "--epochs", "1", "--out", "run"])
    evaluation.main(["masks", "run", "--workers", "0"])
    results = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    assert set(results["masks"]) == {"object_cover", "border_fraction"}


# --- the method files -------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", METHODS.items())
def test_method_trains_resumes_draws_and_evaluates(method, options, flowers, elsewhere, capsys,
                                                   quick_probe, monkeypatch):
    options = ["--data", str(flowers), *SMALL, "--method", f"{BASELINES}/{method}", *options]
    train.main([*options, "--amp", "bf16", "--out", "run"])
    scalars = {"particle.py:PARTICLE": ["global_loss", "part_loss", "shared_parts"],
               "cvsa.py:CVSA": ["global_loss", "alignment_loss", "not_pasted"],
               "released.py:Released": ["global_loss", "local_loss", "accuracy"]}[method]
    assert list(rows("run")[0])[2:6] == ["total", *scalars]
    assert Path("run/run.png").is_file()
    evaluation.main(["masks", "run", "--workers", "0"])
    assert Path("run/masks.png").is_file()
    results = json.loads(Path("run/eval.json").read_text(encoding="utf-8"))
    evaluation.main(["knn", "run", "--workers", "0", "--features", "mean"])
    assert "top1" in results["linear"] and "untrained" in results
    train.main([*options, "--out", "whole"])
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            train.main([*options, "--out", "part"])
    train.main(["--resume", "part"])
    assert same(weights("part"), weights("whole"))
    film = torch.load("whole/checkpoint.pt", weights_only=True)["film"]
    assert len(film) == (3 if "Released" in method else 0)
    train.main([*options, "--init", "run", "--epochs", "1", "--out", "second"])
    assert "initial" in json.loads(Path("second/eval.json").read_text(encoding="utf-8"))


def test_options_of_the_release_reach_it(flowers, elsewhere, monkeypatch):
    built, real = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args, **options: built.append(
        real(*args, **options)) or built[-1])
    options = ["--data", str(flowers / "train"), *SMALL, "--method",
               f"{BASELINES}/released.py:Released"]
    train.main([*options, "--momentum", "0.95", "--keep-ratio", "0.5", "--out", "run"])
    model, = built
    assert (model.momentum, model.keep_ratio, model.num_kept) == (0.95, 0.5, 2)
    for option in (["--mask", "random"], ["--output-dim", "8"], ["--importance", "last"]):
        with pytest.raises(UserError, match=f"{option[0]} is no option of"):
            train.main([*options, *option, "--out", "none"])


@pytest.mark.slow
def test_maps_are_made_by_rank_0_alone(mapped):
    """Two processes have the maps of one, also where --resume reads them; so has a killed run."""
    run = [*TORCHRUN, *mapped, "--epochs", "12"]
    process = subprocess.Popen([*run, "--out", "part"], text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    Path("lost").mkdir()
    shutil.copy("part/checkpoint.pt", "lost")  # without its maps
    subprocess.run([*TORCHRUN, "--resume", "part"], check=True, capture_output=True, timeout=200)
    assert annotations() == 1
    subprocess.run([*run, "--out", "whole"], check=True, capture_output=True, timeout=200)
    assert same(weights("part"), weights("whole"))
    assert [float(row["marked"]) for row in rows("whole")] == pytest.approx([1 / 3] * 12)
    done = subprocess.run([*TORCHRUN, "--resume", "lost"], text=True, capture_output=True,
                          timeout=200)
    assert done.returncode != 0 and done.stderr.count("maps.pt is missing") == 1
