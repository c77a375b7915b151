"""The tables' statistics and options, and that runs resume and are compared seed by seed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import kept
import parts
import tables
import train
from chart import COLOURS
from data import draw
from data.augment import Preprocessing
from data.birds import Birds
from data.datasets import Data, load_data
from lodisc import UserError, VisionTransformer, load_encoder, read_weights

pytestmark = pytest.mark.usefixtures("elsewhere")
SMALL = ["--image-size", "16", "--batch-size", "10", "--epochs", "1", "--warmup-epochs", "0.5",
         "--workers", "0"]


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_paired_difference():
    """By hand: differences 1, 2, 3; mean 2, standard error 1 / sqrt(3); t with 2 df is 4.303."""
    assert tables.difference([3.0, 4.0, 5.0], [2.0, 2.0, 2.0]) == "+2.000 [-0.484, +4.484]"
    assert tables.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert tables.spread([9.3, 10.9]) == "10"  # seconds


def test_bootstrap_draws_seeds_and_queries_within_classes():
    rng = np.random.default_rng(1)
    classes = np.repeat([0, 1], 200)
    by_query = rng.normal(0.1, 0.5, (1, 400)) + np.zeros((3, 1))  # seeds agree
    low, high = map(float, tables.bootstrap(by_query, classes)[1:-1].split(","))
    half = 1.96 * 0.5 / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert (high + low) / 2 == pytest.approx(by_query.mean(), abs=0.01)
    by_seed = np.array([[-0.1], [0.0], [0.4]]) + np.zeros((3, 400))  # queries agree
    assert tables.bootstrap(by_seed, classes) == "[-0.100, +0.400]"
    by_class = np.where(classes, 1.0, 0.0)[None] + np.zeros((3, 1))  # no variance within a class
    assert tables.bootstrap(by_class, classes) == "[+0.500, +0.500]"
    by_class[:, 7] = np.nan  # a query without another image of its class
    assert tables.bootstrap(by_class, classes) == "[+0.501, +0.501]"
    assert tables.bootstrap(by_query, classes) == tables.bootstrap(by_query, classes)


def test_markdown_rows():
    """Check that one seed has no differences, and initial weights have a row below raw pixels."""
    metrics = {"linear": {"top1": 0.5}}
    columns = {"linear top-1": ("linear", "top1")}
    rows = tables.markdown({"mocov3": {0: metrics}, "lodisc": {0: metrics}}, columns)
    assert rows[2:] == ["| mocov3 | 0 | 0.500 |", "| lodisc | 0 | 0.500 |"]
    rows = tables.markdown({"mocov3": {seed: metrics for seed in (0, 1, 2)},
                                 "lodisc": {seed: metrics for seed in (1, 2, 3)}}, columns)
    assert rows[3].startswith("| lodisc | 1 2 3 | 0.500 ± ")
    assert rows[4:] == ["| lodisc − mocov3 | 1 2 | +0.000 [+0.000, +0.000] |"]  # common seeds
    metrics = {**metrics, "pixels": {"linear": {"top1": 0.1}}, "initial": {"linear": {"top1": 0.2}}}
    rows = tables.markdown({"mocov3": {3: metrics}}, columns)
    assert rows[2:] == ["| raw pixels | 3 | 0.100 |", "| initial | 3 | 0.200 |",
                        "| mocov3 | 3 | 0.500 |"]


def line(path, seed, **changes):
    """Append to a store as if a run of "lodisc" on flowers had finished."""
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    values = {"top1": 0.001 * (1 + len(before)), "rank1": 0.0, "rank5": 0.0, "mAP": 0.0}
    record = {"name": f"flowers-seed-{seed}", "weights": "a" * 64, "images": "36 + 12 images, abc",
              "device": "cpu, float32", "evaluation": 1, "source": "a.pth", "where": "1 threads",
              "config": {"seed": seed}, "queries": {},
              "metrics": dict.fromkeys(("linear", "knn", "retrieval"), values), **changes}
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def split_tables(text):
    """Split a printed text -> {title: lines of the table}."""
    blocks = text.split("\n\n")
    titles = [block.strip() for block in blocks if block and not block.startswith("|")]
    return dict(zip(titles, map(lines_of, blocks[1::2])))


def test_tables_never_mix_identities(flowers, capsys):
    """Store a run of another device, evaluation, weights or images: each has its own table."""
    path = Path("results/flowers.jsonl")
    for seed, changes in ((0, {}), (1, {}), (0, {"device": "NVIDIA H200, bfloat16"}),
                          (2, {"evaluation": 2}), (3, {"weights": "b" * 64, "source": "b.pth"}),
                          (4, {"images": "36 + 12 images, abd"})):
        line(path, seed, **changes)
    tables.main(["methods", str(flowers), "--rows", "lodisc", "--seeds"])
    printed = split_tables(capsys.readouterr().out)
    rows = {title: lines[2].split(" | ")[1:3] for title, lines in printed.items()}
    expected = {"abc; cpu, float32, 1 threads; evaluation 1; initial weights: a.pth": [
                    "0 1", "0.002 ± 0.001"],
                "NVIDIA H200, bfloat16, 1 threads; evaluation 1": ["0", "0.003"],
                "evaluation 2; initial weights: a.pth": ["2", "0.004"],
                f"b.pth, SHA-256 of the tensors {'b' * 64}": ["3", "0.005"],
                "methods on flowers: 36 + 12 images, abd; cpu": ["4", "0.006"]}
    assert len(rows) == 5
    for words, cells in expected.items():
        assert [row for title, row in rows.items() if words in title] == [cells], words


def export_encoder(path, depth):
    """Write an encoder's weights as `eval.py export` does."""
    encoder = VisionTransformer(16, 8, 96, depth, 3)
    config = dict(image_size=16, patch_size=8, dim=96, depth=depth, heads=3, mean=[0.5] * 3,
                  std=[0.5] * 3)
    torch.save({"state_dict": encoder.state_dict(), "config": config}, path)
    return encoder


def test_table_of_other_weights_has_no_stored_number(flowers, capsys):
    """Ask for a file other than the stored runs', for theirs under another name, and for none."""
    path = Path("results/flowers.jsonl")
    encoders = {name: export_encoder(f"{name}.pth", depth=2) for name in ("own", "other")}
    torch.save(encoders["own"].state_dict() | {"head.weight": torch.zeros(1)}, "renamed.pth")
    assert tables.init_hash("own.pth") == tables.weights_hash(encoders["own"])
    assert tables.init_hash("own.pth") != tables.init_hash("other.pth")
    line(path, 0, weights=tables.init_hash("own.pth"), source="own.pth")
    ask = ["methods", str(flowers), "--rows", "lodisc", "--seeds"]
    Path("copies").mkdir()
    Path("own.pth").rename("copies/moved.pth")
    tables.main([*ask, "--init", "copies/moved.pth"])
    assert "| lodisc | 0 | 0.001" in capsys.readouterr().out
    for arguments, says in ((["--init", "other.pth"], "no such run is stored"),
                            (["--init", "missing.pth"], "missing.pth: no such file"),
                            (["0", "--init", "missing.pth"], "missing.pth: no such file")):
        with pytest.raises(UserError, match=says):
            tables.main([*ask, *arguments])
    assert "0.001" not in capsys.readouterr().out
    for word, change in (("name", {"a.bias": torch.zeros(2)}),
                         ("value", {"a.weight": torch.ones(2)}),
                         ("shape", {"a.weight": torch.zeros(2, 1)})):
        module = torch.nn.Module()
        module.state_dict = lambda: {"a.weight": torch.zeros(2)}
        first = tables.weights_hash(module)
        module.state_dict = lambda change=change: change
        assert tables.weights_hash(module) != first, word


def test_images_are_known_by_names_and_sizes(flowers):
    first = tables.describe_images(load_data(str(flowers)))
    moved = flowers.rename(flowers.parent / "moved")
    assert tables.describe_images(load_data(str(moved))) == first
    assert tables.describe_images(load_data(str(moved), held_out=True)) != first
    path = moved / "test" / "class 1" / "0.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole + b"1")
    assert tables.describe_images(load_data(str(moved))) != first
    path.write_bytes(whole)
    assert tables.describe_images(load_data(str(moved))) == first
    path.rename(path.with_name("00.jpg"))
    assert tables.describe_images(load_data(str(moved))) != first
    birds = [tables.describe_images(Data(Birds("train", 9, seed), Birds("test", 4)))
             for seed in (0, 1)]
    assert birds[0] != birds[1] and birds[0].startswith("9 + 4 images, ")


def test_runs_on_a_cpu_are_in_float32(monkeypatch):
    options = tables.complete("synthetic", ["--epochs", "twice"], init=None)
    assert options[-2:] == ["--amp", "off"] and options[1] == "20"
    assert tables.complete("synthetic", ["--amp", "bf16"]).count("--amp") == 1
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    assert "--amp" not in tables.complete("synthetic", [])
    assert tables.describe_device(torch.device("cpu"), "bf16", 384) == "cpu, bfloat16"


def test_damaged_store_is_named():
    line(Path("results/flowers.jsonl"), 0)
    with open("results/flowers.jsonl", "a") as file:
        file.write('{"name": "half')
    with pytest.raises(UserError, match="flowers.jsonl, line 2 is damaged"):
        tables.main(["methods", "flowers", "--seeds"])


def test_blurred_keeps_the_pivotal_patches_and_blurs_the_others():
    encoder = VisionTransformer(16, 4, 8, 1, 2)
    blurred = tables.Blurred(encoder, hidden_dim=8, output_dim=4)
    seen, view = [], torch.randn(2, 3, 16, 16)
    mask = blurred.pivotal_patches(view)
    blurred.momentum_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    blurred.local_key(view, mask)
    pixels = tables.mask_pixels(torch.ones_like(view), mask, 4) > 0
    assert torch.equal(seen[0][pixels], view[pixels])
    outside = seen[0][~pixels]
    assert (outside != 0).all() and outside.var() < 0.3 * view[~pixels].var()


def test_method_file_import_has_no_side_effects(monkeypatch):
    """Load tables.py as a method file: train.py is unchanged, and no file is written."""
    monkeypatch.setitem(sys.modules, "tables", tables)  # restored afterwards
    before = {name: id(value) for name, value in vars(train).items()}
    options, path = tables.TABLES["variants"]["blur True"], list(sys.path)
    loaded = tables.evaluation.load_method(options[1])
    assert issubclass(loaded, train.load_encoder.__globals__["LoDisc"])
    assert {name: id(value) for name, value in vars(train).items()} == before
    assert not list(Path().iterdir()) and set(sys.path) == set(path)


@pytest.fixture(autouse=True)
def own_store(monkeypatch):
    monkeypatch.setattr(tables, "STORE", Path("results"))


def test_held_out_tables_open_no_test_image(flowers, monkeypatch, capsys):
    assert tables.HELD_OUT == ("recipe", "variants", "cvsa", "regions", "box", "oracle",
                               "length")
    for path in (flowers / "test").rglob("*.jpg"):
        path.write_text("no image")
    monkeypatch.setitem(tables.TABLES, "recipe", {"mocov3": ["--method", "mocov3"]})
    tables.main(["recipe", str(flowers), "--seeds", "0", *SMALL])
    assert lines_of(capsys.readouterr().out)[-1].startswith("| mocov3 | 0 | ")
    folder, = tables.RUNS.iterdir()
    assert folder.name.startswith("flowers-held-out-method-mocov3-")
    config = read_weights(folder)["config"]
    assert config["held_out"] and config["epochs"] == 1
    assert config["num_images"] == 30  # four fifths of 36, by class
    record, = tables.stored(str(flowers)).values()
    assert record["images"].startswith("30 + 6 images, ") and record["device"] == "cpu, float32"
    classes = evaluation.read_results(tables.STORE / "classes.json")
    assert classes == {record["images"]: [0, 0, 1, 1, 2, 2]}


def test_options_of_tables_are_valid():
    for rows in tables.TABLES.values():
        for options in rows.values():
            train.parse_args([{"twice": "2"}.get(word, word) for word in options])


def test_named_data_root_is_passed_on(tmp_path):
    with pytest.raises(UserError, match=f"flowers17.*{tmp_path}/nowhere"):
        tables.main(["masks", "flowers17", "--data-root", str(tmp_path / "nowhere")])


def test_invalid_arguments_raise_before_training(flowers, monkeypatch):
    monkeypatch.delattr(train, "main")
    with pytest.raises(UserError, match="no train/ and test/"):
        tables.main(["methods", str(flowers / "train")])
    with pytest.raises(UserError, match="at most 10, got 11"):
        tables.main(["methods", "--seeds", *map(str, range(11))])
    with pytest.raises(UserError, match="give the seed"):
        tables.main(["pictures", "--seeds"])
    with pytest.raises(UserError, match="--rows: no other in mocov3, local alone, lodisc"):
        tables.main(["methods", "--rows", "lodisc", "other"])
    assert not tables.RUNS.exists()


@pytest.mark.slow
def test_table_of_seeds(monkeypatch, capsys):
    """Run two rows with two seeds; finished runs are not trained again, killed ones resume."""
    data = Data(Birds("train", 40), Birds("test", 40))
    for script in (train, tables.evaluation, tables.localisation):
        monkeypatch.setattr(script, "load_data", lambda *args, **options: data)
    monkeypatch.setattr(tables.evaluation, "STRENGTHS", (1.0,))
    monkeypatch.setattr(parts, "DRAWS", 2)
    small = {**train.RECIPES["birds"], "image_size": 16, "epochs": 2, "batch_size": 20}
    monkeypatch.setitem(train.RECIPES, "birds", small)
    options = ["--workers", "0"]
    other = [*tables.CVSA, *options]
    monkeypatch.setitem(tables.TABLES, "methods", {"lodisc": options, "double": other})
    monkeypatch.setitem(sys.modules, "tables", tables)  # restored afterwards
    real, begun = train.main, []
    monkeypatch.setattr(train, "main", lambda argv: begun.append(argv) or real(argv))
    tables.main(["methods", "--seeds", "1", "0", "0"])
    lines = lines_of(capsys.readouterr().out)
    assert lines[0] == ("| | seeds | linear top-1 | k-NN top-1 | rank-1 | rank-5 | mAP | "
                        "on the bird | on its parts | part mIoU | training, s |")
    assert [line.split(" |")[:2] for line in lines[2:]] == [[f"| {row}", " 0 1"] for row in (
        "raw pixels", "untrained", "lodisc", "double", "double − lodisc")]
    for line in lines[2:4]:  # before training nothing is localised
        cells = [cell.strip() > "" for cell in line.split("|")[3:-1]]
        assert cells == 5 * [True] + 2 * [False] + [True, False]
    folders = sorted(tables.RUNS.iterdir())
    assert len({folder.name[-9:] for folder in folders}) == 1  # of the identity
    assert [folder.name[:-9] for folder in folders] == [
        *(f"synthetic-method-CVSA-workers-0-seed-{i}" for i in (0, 1)),
        "synthetic-workers-0-seed-0", "synthetic-workers-0-seed-1"]
    results = [tables.metrics_of(folder) for folder in folders]
    top1 = [metrics["linear"]["top1"] for metrics in results]
    object_ = [metrics["localisation"]["object"] for metrics in results]
    assert tables.spread(top1[2:]) in lines[4]
    assert tables.difference(top1[:2], top1[2:]) in lines[6]
    assert tables.difference(object_[:2], object_[2:]) in lines[6]
    records = tables.stored("synthetic")
    names = [name for name, _ in records]
    identity, = {identity for _, identity in records}
    assert identity.evaluation == evaluation.VERSION
    assert identity[:3] == ("from scratch", tables.describe_images(data), "cpu, float32")
    assert sorted(names) == [folder.name[:-9] for folder in folders]
    record = records["synthetic-workers-0-seed-1", identity]
    for key, metric in (("rank1", "rank1"), ("average_precision", "mAP")):
        values = tables.unpack(record["queries"], key)
        assert values.mean() == pytest.approx(record["metrics"]["retrieval"][metric], abs=1e-4)
    classes = evaluation.read_results(tables.STORE / "classes.json")
    assert classes == {record["images"]: data.test.targets}
    assert record["config"]["seed"] == 1 and "data_root" not in record["config"]

    begun.clear()
    for seeds in ("0", "1"), ():  # from the store
        tables.main(["methods", "--seeds", *seeds])
        assert lines_of(capsys.readouterr().out) == lines and not begun
    tables.main(["methods", "--seeds", "--rows", "double", "lodisc"])
    swapped = lines_of(capsys.readouterr().out)
    assert swapped[4:6] == lines[5:3:-1] and swapped[6].startswith("| lodisc − double |")
    with pytest.raises(UserError, match="no such run is stored"):
        tables.main(["methods", "--seeds", "--epochs", "3"])
    (tables.STORE / "synthetic.jsonl").unlink()
    (folders[2] / "eval.json").unlink()  # killed before it was evaluated
    for path in folders[1].glob("*.*"):  # killed before its first checkpoint
        if path.name != "config.json":
            path.unlink()
    tables.main(["methods", "--seeds", "0", "1"])
    assert [argv[-2:] for argv in begun] == [["--resume", str(folders[2])],
                                             ["--out", str(folders[1])]]
    again = lines_of(capsys.readouterr().out)
    assert [line.rsplit("|", 2)[0] for line in again] == \
        [line.rsplit("|", 2)[0] for line in lines]  # equal except for the seconds

    begun.clear()  # a setting that may change with --resume does not make a run stale
    assert tables.run("synthetic", options, 0, "elsewhere") == (folders[2], identity)
    assert not begun
    small["epochs"] = 3  # the recipe has changed
    with pytest.raises(UserError, match="is a run with epochs 2; move it away"):
        tables.run("synthetic", options, 0)
    small["epochs"] = 2
    begun.clear()
    folder, _ = tables.run("synthetic", [*options, *tables.TWICE], 0)
    assert read_weights(folder)["config"]["epochs"] == 4
    begun.clear()

    monkeypatch.setattr(tables, "HERE", Path("drawn"))
    monkeypatch.setitem(tables.TABLES, "methods", {"lodisc": options, "mocov3": other})
    Path("drawn/pictures").mkdir(parents=True)
    tables.main(["pictures", "--seeds", "0"])
    pictures = {path.name: path for path in Path("drawn").rglob("*.*")}
    assert sorted(pictures) == ["masks.png", "method.png", "run.png"] and not begun
    assert all(path.stat().st_size < 200_000 for path in pictures.values())
    assert Image.open(pictures["method.png"]).width == 1200
    assert all(len(Image.open(path).getcolors()) > 20 for path in pictures.values())


def test_bootstrap_is_of_each_row_less_the_first(monkeypatch, capsys):
    """Of two classes with two queries each; a row without a common seed has none."""
    def record(hits):
        return {"queries": {"rank1": hits, "average_precision": [5000] * 4}}

    monkeypatch.setattr(tables.evaluation, "read_results", lambda path: {"images": [0, 0, 1, 1]})
    identity = tables.Identity("", "images", "", 2)
    records = {"mocov3": {0: record("0000"), 1: record("1111")}, "crop": {1: record("0000")},
               "lodisc": {0: record("0000")}, "other": {7: record("1111")}}
    tables.print_bootstrap(records, identity)
    printed = capsys.readouterr().out
    assert "crop − mocov3, rank-1, bootstrap over seeds and queries: [-1.000, -1.000]" in printed
    assert "lodisc − mocov3, rank-1, bootstrap over seeds and queries: [+0.000, +0.000]" in printed
    assert printed.count("mAP") == 2 and "other" not in printed


def test_length_table_has_the_curves(flowers, monkeypatch, capsys):
    small = ["--image-size", "16", "--batch-size", "10", "--workers", "0"]
    rows = {f"{count} epochs": ["--method", "mocov3", "--epochs", str(count)] for count in (1, 2)}
    monkeypatch.setitem(tables.TABLES, "length", rows)
    tables.main(["length", str(flowers), "--seeds", "0", *small])
    printed = capsys.readouterr().out
    records = {record["config"]["epochs"]: record
               for record in tables.stored(str(flowers)).values()}
    for name, column in (("rank-1", "rank1"), ("mAP", "mAP")):
        part = printed[printed.index(f"{name} after each epoch"):]
        for row, count in zip(rows, (1, 2)):
            curve = records[count]["curve"][column]
            assert len(curve) == count
            assert f"| {row} | 0 | {' '.join(f'{value:.3f}' for value in curve)} |" in part


def test_initial_weights_are_evaluated_once(flowers, monkeypatch, capsys):
    """For all runs with the same initial weights, images and image size."""
    export_encoder("nano.pth", depth=4)
    monkeypatch.setattr(tables.evaluation, "STRENGTHS", (1.0,))
    monkeypatch.setitem(tables.TABLES, "masks", {"mocov3": ["--method", "mocov3"], "lodisc": []})
    rows, real_evaluate = [], train.evaluate

    def evaluate(encoders, *args, **options):
        rows.append(list(encoders))
        return real_evaluate(encoders, *args, **options)

    monkeypatch.setattr(train, "evaluate", evaluate)
    whole, alone = ["raw pixels", "initial", "trained"], ["trained"]
    for size, expected in (("16", [whole, alone]), ("24", [whole, alone])):
        rows.clear()
        tables.main(["masks", str(flowers), "--init", "nano.pth", "--seeds", "0", "--image-size",
                     size, "--batch-size", "12", "--epochs", "1", "--workers", "0"])
        assert rows == expected
        first, second = list(tables.stored(str(flowers)).values())[-2:]
        for name in ("pixels", "initial"):
            assert first["metrics"][name] == second["metrics"][name]
        assert first["metrics"]["retrieval"] and second["metrics"]["retrieval"]
    assert len(tables.stored(str(flowers))) == 4


def test_chart_is_of_the_benchmark_on_all_data_sets(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(tables, "HERE", Path("drawn"))
    monkeypatch.setattr(tables, "chart", lambda results: seen.update(results) or real(results))
    monkeypatch.setattr(tables, "records_of", lambda data, options: {"identity": {
        row: {seed: {"metrics": metrics(0.1 * place + 0.02 * seed)} for seed in (5, 7)}
        for place, row in enumerate(options, start=3)}})
    Path("drawn/pictures").mkdir(parents=True)
    tables.main(["chart", "--amp", "bf16"])
    assert list(seen) == ["rank-1", "mAP"]
    for groups in seen.values():
        assert list(groups) == list(tables.CHART.values())
    bars = seen["mAP"]["cars98"]
    assert list(bars) == ["initial weights", "MoCo v3", "LoDisc", "LoDisc, box"]
    assert bars["initial weights"] == (pytest.approx(0.1), 0)
    for place, name in enumerate(list(bars)[1:], start=3):
        mean, half = bars[name]  # of two values 0.02 apart: 12.706 times 0.01
        assert mean == pytest.approx((0.1 * place + 0.12) / 2)
        assert half == pytest.approx(0.127, 0.01)
    assert Image.open("drawn/pictures/results.png").width == 1200
    monkeypatch.setattr(tables, "records_of", lambda data, options: {"identity": {
        row: {5: {"metrics": metrics(0.3)}} for row in options} if data == "cub" else {
        row: {} for row in options}})
    tables.main(["chart"])
    assert list(seen["mAP"]) == ["CUB-200-2011"]
    assert capsys.readouterr().out.splitlines() == [
        f"left out: {title}, which lacks rows of benchmark"
        for title in list(tables.CHART.values())[1:]]


def test_bars_of_the_chart_have_their_height_and_interval():
    """Of one metric and one data set: the limit of the axis is 1.15 times the highest end."""
    bars = {"initial": (0.2, 0.0), "MoCo v3": (0.4, 0.1), "LoDisc": (0.3, 0.05)}
    pixels = np.asarray(real({"mAP": {"birds": bars}})).astype(int)
    bottom, per_unit = 56 + 340 - 46, (340 - 46 - 30) / (1.15 * 0.5)
    for colour, (mean, half) in zip(COLOURS, bars.values()):
        wide = (np.abs(pixels[60:bottom] - colour).max(-1) < 12).sum(1) > 100  # rows of the bar
        assert bottom - 60 - wide.nonzero()[0].min() == pytest.approx(per_unit * mean, abs=2)
        ends = []  # rows of black ink as wide as an interval's ends and not a number's
        for row in range(60, bottom):
            black = (pixels[row].max(-1) < 60) & (np.arange(1200) > 90)
            if 10 < black.sum() < 40:
                ends.append(bottom - row)
        for end in (mean - half, mean + half) if half else ():
            assert min(abs(per_unit * end - row) for row in ends) < 3


real = tables.chart


def metrics(value):
    return {"retrieval": {"rank1": value, "mAP": value / 2},
            "initial": {"retrieval": {"rank1": 0.2, "mAP": 0.1}}}


def test_pretrained_table_has_both_features_and_both_intervals(flowers, monkeypatch, capsys):
    export_encoder("nano.pth", depth=4)
    monkeypatch.setattr(tables.evaluation, "STRENGTHS", (1.0,))
    small = ["--image-size", "16", "--batch-size", "12", "--epochs", "1", "--workers", "0"]
    monkeypatch.setitem(tables.TABLES, "pretrained", {
        row: tables.TABLES["methods"][row] for row in ("mocov3", "lodisc")})
    kinds, real = [], tables.evaluation.evaluate

    def evaluate(*args, **options):
        kinds.append(options["kind"])
        return real(*args, **options)

    monkeypatch.setattr(tables.evaluation, "evaluate", evaluate)
    arguments = [str(flowers), "--init", "nano.pth", *small]
    tables.main(["pretrained", *arguments, "--seeds", "3", "4"])
    assert kinds == ["mean"] * 4
    printed = capsys.readouterr().out
    rows = [line.split(" |")[0] for line in lines_of(printed)]
    assert rows.count("| initial") == rows.count("| lodisc − mocov3") == 3
    assert printed.count("bootstrap over seeds and queries: [") == 2
    record, = [record for (name, _), record in tables.stored(str(flowers)).items() if name ==
               "flowers-image-size-16-batch-size-12-epochs-1-workers-0-seed-3"]
    mean = record["metrics"]["mean"]
    assert mean["linear"] and mean["initial"]["retrieval"] and mean["pixels"]
    folder, = tables.RUNS.glob(record["name"] + "-*")
    momentum = load_encoder(folder, use_momentum=True)
    encoders = {"initial": load_encoder("nano.pth"), "trained": momentum}
    preprocessing = Preprocessing(16, momentum.mean, momentum.std)
    expected = kept.measure(encoders, load_data(str(flowers)).test, preprocessing)
    assert record["metrics"]["kept"] == {**expected["trained"], "initial": expected["initial"]}
    assert ("| rank-1, all | rank-1, location | rank-1, random | rank-1, least | mAP, all |"
            in printed)

    path, = tables.STORE.glob("*.jsonl")  # as if another table had run some of them
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if "mocov3" not in line["name"] or line["name"].endswith("seed-4"):
            del line["metrics"]["mean"]
        del line["metrics"]["kept"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables.main(["pretrained", *arguments, "--seeds"])
    rows = [line.split(" | ") for line in lines_of(capsys.readouterr().out)]
    assert [row[1] for row in rows if row[0] == "| mocov3"] == ["3 4", "3"]
    assert [row[0] for row in rows].count("| lodisc") == 1

    tables.main(["benchmark", *arguments, "--rows", "crop", "--seeds", "4"])
    monkeypatch.setattr(tables, "HERE", Path("drawn"))
    monkeypatch.delattr(train, "main")  # the runs are finished
    Path("drawn/pictures").mkdir(parents=True)
    capsys.readouterr()
    for _ in range(2):
        tables.main(["pictures", *arguments, "--seeds", "4"])
    lines = capsys.readouterr().out.splitlines()
    printed = [line.split(" product ")[0] for line in lines if " product " in line]
    assert printed == 2 * ["initial weights", "MoCo v3", "LoDisc", "LoDisc, box"]
    crop, = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
             if "crop" in json.loads(line)["name"])
    for name, results in (("initial", crop["metrics"]["initial"]), ("trained", crop["metrics"])):
        assert lines.count(f"{name}: rank-1 {results['retrieval']['rank1']:.3f}") == 2
    assert {path.name for path in Path("drawn").rglob("*.*")} == {"kept_flowers.jpg",
                                                                  "neighbours_flowers.jpg"}
    page, step = np.asarray(Image.open("drawn/pictures/kept_flowers.jpg")), 256 + draw.GAP
    assert page.shape == (5 * step + draw.GAP, draw.MARGIN + 4 * step, 3)
    for y in range(5):
        for x in range(4):
            left, top = draw.MARGIN + x * step, draw.GAP + y * step
            black = (page[top:top + 256, left:left + 256].max(-1) < 20).mean()
            assert black == pytest.approx(0.75 if y else 0, abs=0.02)  # one of four patches is kept
