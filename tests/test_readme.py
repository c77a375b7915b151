"""Names, options, commands, links and shapes in the documentation, against the code."""

import ast
import importlib
import inspect
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import benchmark
import discovery
import eval as evaluation
import make
import parts
import tables
import train
from data.datasets import NAMES
from lodisc import (ARCHITECTURES, IMPORTANCES, LOCAL_INPUTS, MASKS, METHODS, NORMALISATIONS,
                    LoDisc, LoDiscOutput, MoCoV3, create_vit, mask_pixels)

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (
    ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "tests" / "experiments" / "RESULTS.md")
    if path.exists()}
README = PAGES[ROOT / "README.md"]
MODULES = ("lodisc.py", "train.py", "eval.py", "data/augment.py", "data/birds.py",
           "data/datasets.py", "data/draw.py")
OTHERS = {"Caltech101": "torchvision.datasets", "FGVCAircraft": "torchvision.datasets",
          "ImageFolder": "torchvision.datasets", "StanfordCars": "torchvision.datasets",
          "nn.Module": "torch.nn", "torch.compile": "torch"}  # of libraries: where they are
PARSERS = {"train.py": train.parse_args, "eval.py": evaluation.parse_args,
           "tests/experiments/tables.py": tables.parse_args,
           "tests/experiments/benchmark.py": benchmark.parse_args,
           "tests/experiments/parts.py": parts.parse_args,
           "tests/experiments/discovery.py": discovery.parse_args,
           "tests/experiments/localisation.py": lambda words: Path(*words),
           "tests/assignment/make.py": lambda words: Path(*words),
           "tests/assignment/grade.py": lambda words: Path(*words),
           "tests/experiments/weights_from_onnx.py": list}
# metrics.csv's columns, the checkpoint's record, a method's attributes and arguments, option values
WORDS = {"epoch", "step", *LoDiscOutput._fields, "loss", "lr", "images_per_second", "seconds",
         "config", *LoDisc.OPTIONS, "encoder", "momentum_encoder",
         *inspect.signature(LoDisc.forward).parameters, "datasets",
         *ARCHITECTURES, *METHODS, *MASKS, *IMPORTANCES, *LOCAL_INPUTS, *NAMES, *train.WEIGHTS,
         *NORMALISATIONS,
         *train.parse_args([])[1], *tables.TABLES, "class", "mean", "masks", "neighbours",
         "embed", "export", "features", "paths", "labels", "classes"}  # the last: in features.npz
LEFT_BY_A_RUN = {"config.json", "metrics.csv", "checkpoint.pt", "eval.json", "per_image.json",
                 "run.png", "masks.png", "neighbours.png", "parts.png", "features.npz",
                 "encoder.pth", "maps.pt"}
FENCED = re.compile(r"^ *(```|~~~)(.*)\n((?:.*\n)*?) *\1", re.M)
NO_NAME = (r"(beetles|DIR|RUN|FILE|WEIGHTS|FOLDER|OUT|NAME|CLASS|VALUE|PATH|forward|timm)\b|.*/$|"
           r"[a-z.]+\.(edu|org|gz)\b")


def commands(text):
    """Return the commands of indented and fenced blocks of any language, continued lines joined."""
    fenced = [block for _, _, block in FENCED.findall(text)]
    indented = re.findall(r"^    .*\n", FENCED.sub("", text), re.M)
    lines = re.sub(r"\\\n", " ", "".join(fenced + indented)).splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(python|torchrun|pip|cd) ", line)]


def spans(text):
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]


def all_commands():
    lines = []
    for text in PAGES.values():
        lines += commands(text)
        lines += [span for span in spans(text) if re.match(r"(python|torchrun) ", span)]
    return sorted({line.split("#")[0].strip() for line in lines})


@pytest.mark.parametrize("begin, end", [("", ""), *((f"{fence}{language}\n", f"{fence}\n") for
                                                    fence in ("```", "~~~") for language in
                                                    ("", "sh", "python", "console x=1"))])
def test_commands_found_in_any_block(begin, end):
    indent = "" if begin else "    "
    lines = ["python train.py --epochs \\", "    3 --lr 1", "$ torchrun train.py  # 8", "x = 1"]
    text = f"Words\n\n{begin}" + "".join(indent + line + "\n" for line in lines) + end + "\nWords\n"
    lines = [re.sub(" +", " ", command) for command in commands(2 * text)]
    assert lines == 2 * ["python train.py --epochs 3 --lr 1", "torchrun train.py # 8"]
    assert spans(text + "`a  b`") == ["a b"]


@cache
def defined_names():
    """The names that this project's own modules define: functions, classes, constants, methods as
    Class.method, also of base classes here, and attributes of a class or set on self."""
    names, classes = set(), {}
    for module in MODULES:
        for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                members = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                members |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
                            and isinstance(part.ctx, ast.Store)}
                for part in node.body:
                    if isinstance(part, ast.Assign):
                        members |= {getattr(target, "id", "") for target in part.targets}
                for base in node.bases:
                    members |= classes.get(getattr(base, "id", ""), set())
                classes[node.name] = members
    return names | {f"{name}.{member}" for name in classes for member in classes[name]} | set(
        member for members in classes.values() for member in members)


def exists(name):
    name = name.removesuffix("()")
    if name in OTHERS:
        return hasattr(importlib.import_module(OTHERS[name]), name.split(".")[-1])
    return name in WORDS | LEFT_BY_A_RUN | defined_names() or any(
        (ROOT / folder / name).exists() for folder in ("", "data", "tests", "tests/experiments"))


@pytest.mark.parametrize("name", sorted({
    span for text in PAGES.values() for span in spans(text)
    if re.fullmatch(r"[A-Za-z_][\w./]*(\(\))?", span) and not re.match(NO_NAME, span)}))
def test_names_exist(name):
    assert exists(name), f"the documentation names {name}, which does not exist"


def test_names_of_libraries_do_not_count():
    assert exists("LoDisc.forward") and exists("location_mask()") and exists("Birds.regions")
    for name in ("stack", "optim.SGD", "save", "Tensor", "nn", "LoDisc.sort", "Module", "einops",
                 "rearrange"):
        assert not exists(name), name


def anchor_of(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_resolve():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), target
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
            page = path.parent / target if target else path
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
            assert anchor in map(anchor_of, headings), f"{target}#{anchor}"


def test_options_exist(capsys):
    existing = {"--nproc_per_node", "--nproc", "--rounds", "--help"}
    for parse in (train.parse_args, evaluation.parse_args, tables.parse_args):
        with pytest.raises(SystemExit):
            parse(["--help"])
        existing |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    texts = [span for text in PAGES.values() for span in spans(text) if span.startswith("--")]
    named = re.findall(r"(?<!\S)--[a-z][a-z_-]*", "\n".join(texts + all_commands()))
    assert named and set(named) <= existing


@pytest.mark.parametrize("line", all_commands())
def test_commands_parse(line):
    for command in line.split("&&"):
        words = shlex.split(command.replace("...", ""))
        while "=" in words[0]:  # environment
            words.pop(0)
        program, *words = words
        if program == "torchrun":
            assert words.pop(0).startswith("--nproc_per_node=")
        elif program != "python" or words[0] == "-m":
            assert (program, *words[:2]) in (("pip", "install", "-r"), ("python", "-m", "pytest"),
                                             ("python", "-m", "venv"))
            continue
        script, *arguments = words
        assert (ROOT / script).is_file()
        if "--help" in arguments:
            continue
        parsed = PARSERS[script](arguments)
        if script == "train.py":
            given = parsed[0]
            assert given.get("method", "lodisc") in METHODS or ".py:" in given["method"]


@torch.no_grad()
def test_shapes_match_the_model():
    """Check the shapes that the table of boxes gives in letters, and the default run's numbers."""
    B, C, N, k, D, H, W = 6, 128, 36, 10, 96, 48, 48  # six images, for a B that is not C
    assert f"| {train.RECIPES['birds']['batch_size']}, {C} |" in README
    assert f"| {N} of 8 x 8 px, {k}, {D} |" in README
    letters = {"B": B, "C": C, "N": N, "D": D, "H": H, "W": W}
    model = LoDisc(create_vit("vit_nano", 48, 8), hidden_dim=512, output_dim=C)
    view = torch.randn(B, 3, H, W)
    key, mask = model.key_and_mask(view)
    features, rows = model.encoder.with_attention(view, "row")
    class_token, patches = model.encoder.tokens(view)
    assert len(rows) == 4 and mask.sum(1).eq(k).all()
    found = {"view x": [view], "encoder f_q": [torch.cat([class_token[:, None], patches], 1),
                                               features],
             "projector": [model.query(view)], "stop-gradient": [key], "attention of": [rows[0]],
             "pivotal": [IMPORTANCES["product"].function(rows, None)], "location-wise": [mask],
             "x' ⊙ mask": [mask_pixels(view, mask, 8)], "f_l": [model.local_key(view, mask)],
             "contrastive": [model.query(view) @ key.T]}
    for name, tensors in found.items():
        row = re.search(rf"^\| {re.escape(name)}[^|]*\|[^|]*\|([^|]*)\|", README, re.M)
        shapes = [eval(shape, letters) for shape in re.findall(r"\([^)]*\)", row.group(1))]
        assert shapes == [tuple(tensor.shape) for tensor in tensors], name


def test_python_blocks_run(few_birds, elsewhere, quick_probe):
    """Run the blocks that read features; train the methods for an epoch."""
    blocks = [block for _, language, block in FENCED.findall(README) if language == "python"]
    Path("photos").mkdir()
    Image.new("RGB", (60, 50), (90, 80, 200)).save("photos/bird.jpg")
    small = ["--image-size", "16", "--epochs", "1", "--batch-size", "100", "--device", "cpu",
             "--workers", "0"]
    train.main([*small, "--method", "mocov3", "--out", "run"])
    Path("runs/beetles-lodisc-1").mkdir(parents=True)
    evaluation.main(["embed", "run", "--data", "photos", "--out",
                     "runs/beetles-lodisc-1/features.npz"])
    features, methods = [], []
    for i, block in enumerate(blocks):
        names = {}
        exec(block, names)
        if "features" in names:
            features.append(names["features"])
        for name, value in names.items():
            if isinstance(value, type) and issubclass(value, MoCoV3) and value not in (MoCoV3,
                                                                                       LoDisc):
                Path(f"method_{i}.py").write_text(block)
                train.main([*small, "--method", f"method_{i}.py:{name}", "--out", f"runs/{name}"])
                methods.append(name)
    assert methods and [array.shape for array in features] == [(1, 96)]


def test_number_of_exercises():
    count = sum(len(names) for exercise, names in make.EXERCISES.items()
                if exercise not in make.OPTIONAL)
    assert f"bodies of {['twelve', 'thirteen', 'fourteen'][count - 12]} functions" in README


# --- short sentences --------------------------------------------------------------------------


def paragraphs(text):
    """Return the paragraphs and list items of a page outside headings, tables, code and folded
    parts, links as their text."""
    text = re.sub(r"<details>.*?</details>", "", FENCED.sub("\n", text), flags=re.S)
    text = re.sub(r"^(\||#).*$", "", text, flags=re.M)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    parts = re.split(r"\n\s*\n|\n(?=- |\* |\d+\. )", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def sentences(paragraph):
    return re.split(r"(?<=[.?!])\*{0,2} (?=[A-Z`*\d])", paragraph)


def test_paragraphs_and_sentences_are_found():
    page = ("# Title\nOne [link](a.md) here. Two\nlines, `a.b`!\n\n- **Three.** Four\n- five\n\n"
            "| a | b |\n|---|---|\n```sh\npython\n```\n![alt](x.png)\n*Six.* Seven?\n"
            "<details><summary>folded</summary>\n\nnever\n</details>\n")
    found = paragraphs(page)
    assert found == ["One link here. Two lines, `a.b`!", "- **Three.** Four", "- five",
                     "*Six.* Seven?"]
    assert [len(sentences(paragraph)) for paragraph in found] == [2, 2, 1, 2]


def test_readme_is_short():
    assert len(README.splitlines()) <= 230
    assert sum(len(paragraph.split()) for paragraph in paragraphs(README)) <= 2300
    for paragraph in paragraphs(README):
        assert len(paragraph.split()) <= 80, paragraph
        for sentence in sentences(paragraph):
            assert len(sentence.split()) <= 30, sentence


def test_line_counts_are_those_of_the_files():
    counts = re.findall(r"\[`([\w/]+\.py)`\]\([^)]*\), ([\d,]+) lines", README)
    assert counts
    for name, count in counts:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) == int(count.replace(",", "")), name
