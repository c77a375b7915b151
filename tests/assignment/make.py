"""Make an assignment: a copy of lodisc.py without the bodies of its central functions, and graders.

    python tests/assignment/make.py OUT
    python tests/assignment/make.py OUT --exercises attention,mask,loss,rollout
    cd OUT && python -m pytest        # prints the points of each exercise

OUT must not exist yet. The functions are found by name in lodisc.py, and the graders compare with
the outputs of its functions. kit/ has the pages for the student, ANSWERS.md the answers for the
teacher; grade.py grades what comes back."""

import argparse
import ast
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# exercise: functions of lodisc.py, in the suggested order; their points are in graders.py
EXERCISES = {
    "attention": ["attention_weights", "Attention.forward"],
    "positions": ["sincos_positions"],
    "product": ["attention_product"],
    "mask": ["location_mask"],
    "pixels": ["mask_pixels"],
    "update": ["momentum_update"],
    "schedule": ["momentum_schedule"],
    "loss": ["contrastive_loss"],
    "mocov3": ["MoCoV3.forward"],
    "keys": ["LoDisc.key_and_mask", "LoDisc.local_key"],
    "lodisc": ["LoDisc.forward"],
    "rollout": ["attention_rollout"],
}
OPTIONAL = ("rollout",)


def functions(source):
    """Return {qualified name: ast node} of a module's functions and methods."""
    nodes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            nodes[node.name] = node
        elif isinstance(node, ast.ClassDef):
            nodes.update({f"{node.name}.{inner.name}": inner for inner in node.body
                          if isinstance(inner, ast.FunctionDef)})
    return nodes


def without_bodies(source, exercises):
    """Return the source with a NotImplementedError in place of each exercise's body."""
    lines, nodes = source.splitlines(keepends=True), functions(source)
    removed = []
    for exercise in exercises:
        removed += [(nodes[name], exercise, name) for name in EXERCISES[exercise]]
    for node, exercise, name in sorted(removed, key=lambda item: -item[0].lineno):
        first = node.body[1].lineno - 1  # after the docstring
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        lines[first:node.end_lineno] = [
            " " * node.body[0].col_offset
            + f'raise NotImplementedError("exercise {exercise}: {name}")\n']
    return "".join(lines)


def load(path, name="lodisc"):
    """Import a module from a file, writing no bytecode."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    writing, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writing
    return module


@torch.no_grad()
def reference_values(lodisc):
    """Compute the graders' reference values: {exercise: arguments and results}."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    rows = [draw(2, 9).mul(2).softmax(-1) for _ in range(4)]
    matrices = [draw(2, 10, 10).mul(2).softmax(-1) for _ in range(4)]
    attention, x = lodisc.Attention(12, 3), draw(2, 5, 12)
    for parameter in attention.parameters():
        parameter.copy_(draw(*parameter.shape) / 2)
    layer_q, layer_k, _ = attention.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    layer = {"layer": attention.state_dict(), "x": x, "features": attention(x)[0],
             "layer q": layer_q.clone(),
             "layer weights": lodisc.attention_weights(layer_q, layer_k)}
    layer |= {kind: attention(x, kind)[1] for kind in ("row", "matrix")}
    q, k, queries, keys = draw(2, 3, 4, 8), draw(2, 3, 6, 8), draw(4, 8), draw(6, 8)
    view, kept = draw(3, 3, 8, 8), lodisc.location_mask(draw(3, 16), 0.3)
    with torch.enable_grad():
        tracked = queries.clone().requires_grad_()
        gradient, = torch.autograd.grad(lodisc.contrastive_loss(tracked, keys, 0.2), tracked)
    return {
        "attention": layer | {"q": q, "k": k, "of q and k": lodisc.attention_weights(q, k),
                              "of 100 q and k": lodisc.attention_weights(100 * q, k)},
        "positions": {dim: lodisc.sincos_positions(side, dim)[0]
                      for side, dim in ((3, 8), (2, 16))},
        "product": {"rows": rows, "result": lodisc.attention_product(rows)},
        "rollout": {"matrices": matrices, "result": lodisc.attention_rollout(matrices)},
        "schedule": [lodisc.momentum_schedule(step, 8, 0.9) for step in range(9)],
        "loss": {"queries": queries, "keys": keys, "gradient": gradient,
                 "result": [lodisc.contrastive_loss(queries, keys, temperature).item()
                            for temperature in (0.2, 0.7, 0.01)],
                 "with offset": lodisc.contrastive_loss(queries, keys, 0.2, 2).item()},
        "keys": {"view": view, "kept": kept, "pixels": lodisc.mask_pixels(view, kept, 2)},
    }


def exercise_names(text):
    """Parse --exercises; raise argparse.ArgumentTypeError for an unknown name."""
    names = text.split(",")
    for name in names:
        if name not in EXERCISES:
            raise argparse.ArgumentTypeError(f"no exercise {name!r}; have {', '.join(EXERCISES)}")
    if ("mocov3" in names) != ("lodisc" in names):
        raise argparse.ArgumentTypeError("mocov3 and lodisc go together: each shows the other")
    return [name for name in EXERCISES if name in names]


def add_exercises(parser):
    parser.add_argument("--exercises", type=exercise_names, metavar="NAME,NAME",
                        default=[name for name in EXERCISES if name not in OPTIONAL],
                        help=f"of {', '.join(EXERCISES)}; default: all but {', '.join(OPTIONAL)}")


def points_of(exercises):
    """Return {exercise: its points}, the sums of its graders'."""
    points = dict.fromkeys(exercises, 0)
    source = (HERE / "graders.py").read_text(encoding="utf-8")
    for value, exercise in re.findall(r"^@points\((\d+)\)\ndef test_([a-z0-9]+)_", source, re.M):
        if exercise in points:
            points[exercise] += int(value)
    return points


def how_it_works():
    """Return the README's section on the method, for a folder that has its figure."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## How it works\n(.*?)(?=^## )", readme, re.M | re.S)[1].strip()
    return f"# How it works\n\n![The forward pass](method.png)\n\n{section}\n"


def write_kit(out, exercises):
    """Write the assignment to a new folder; return {exercise: points}."""
    out.mkdir(parents=True)
    source, points = (ROOT / "lodisc.py").read_text(encoding="utf-8"), points_of(exercises)
    (out / "lodisc.py").write_text(without_bodies(source, exercises), encoding="utf-8")
    torch.save(reference_values(load(ROOT / "lodisc.py", "solved")), out / "expected.pt")
    shutil.copy(HERE / "graders.py", out / "test_exercises.py")
    shutil.copy(HERE / "kit" / "points.py", out / "conftest.py")
    figure = ROOT / "tests" / "experiments" / "pictures" / "method.png"
    for file in (ROOT / "requirements.txt", HERE / "kit" / "pytest.ini",
                 HERE / "kit" / "questions.md", figure):
        shutil.copy(file, out)
    (out / "points.json").write_text(json.dumps(points))
    (out / "METHOD.md").write_text(how_it_works(), encoding="utf-8")
    rows = []
    for exercise, value in points.items():
        names = ", ".join(f"`{name}`" for name in EXERCISES[exercise])
        rows.append(f"| {exercise} | {names} | {value} |")
    page = (HERE / "kit" / "README.md").read_text(encoding="utf-8")
    page = page.replace("ROWS", "\n".join(rows)).replace("FIRST", exercises[0])
    page = page.replace("TOTAL", str(sum(points.values())))
    (out / "README.md").write_text(page, encoding="utf-8")
    return points


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    add_exercises(parser)
    args = parser.parse_args(argv)
    if args.out.exists():
        sys.exit(f"make.py: {args.out} exists; give a new folder")
    points = write_kit(args.out, args.exercises)
    print(f"wrote {args.out}: {len(points)} exercises, {sum(points.values())} points; "
          f"cd {args.out} && python -m pytest")


if __name__ == "__main__":
    main()
