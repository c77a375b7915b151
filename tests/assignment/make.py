"""Make a student's copy of lodisc.py, without the bodies of its central functions, and graders.

    python tests/assignment/make.py OUT
    cd OUT && python -m pytest        # prints which exercises pass, and the points

OUT must not exist yet. The functions are found by name in lodisc.py, and the graders compare with
the outputs of its functions.
"""

import argparse
import ast
import importlib.util
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# exercise: (points, functions of lodisc.py), in the suggested order
EXERCISES = {
    "attention": (15, ["attention_weights", "Attention.forward"]),
    "positions": (10, ["sincos_positions"]),
    "product": (10, ["attention_product"]),
    "rollout": (10, ["attention_rollout"]),
    "mask": (10, ["location_mask"]),
    "update": (10, ["momentum_update"]),
    "schedule": (5, ["momentum_schedule"]),
    "loss": (15, ["contrastive_loss"]),
    "branches": (15, ["MoCoV3.forward", "LoDisc.forward"]),
}
CONFTEST = '''\
"""Print the points of the exercises after pytest's summary."""

POINTS = {points}


def pytest_terminal_summary(terminalreporter):
    def exercises(kind):  # the names of tests have the form "...::test_<exercise>_..."
        return {{report.nodeid.partition("::test_")[2].split("_")[0]
                for report in terminalreporter.getreports(kind)}}

    passed = POINTS.keys() & exercises("passed") - exercises("failed") - exercises("error")
    for exercise, points in POINTS.items():
        earned = points if exercise in passed else 0
        terminalreporter.write_line(f"{{exercise:<12}}{{earned:>3}} of {{points}}")
    total = sum(POINTS[exercise] for exercise in passed)
    terminalreporter.write_line(f"{{'total':<12}}{{total:>3}} of {{sum(POINTS.values())}}")
'''
README = '''\
# LoDisc, to be completed

In `lodisc.py` the bodies of {count} functions are missing. Each docstring specifies the inputs and
outputs. Complete them in the order of the table. The paper is arXiv 2403.04066; MoCo v3
(arXiv 2104.02057) and attention rollout (arXiv 2005.00928) describe its parts.

    pip install -r requirements.txt
    python -m pytest                     # all exercises, with the points
    python -m pytest -k {first}        # one exercise

| exercise | functions | points |
|---|---|---|
{rows}
'''


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


def without_bodies(source):
    """Return the source with a NotImplementedError in place of each exercise's body."""
    lines, nodes = source.splitlines(keepends=True), functions(source)
    removed = []
    for exercise, (_, names) in EXERCISES.items():
        removed += [(nodes[name], exercise, name) for name in names]
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


def reference_values(lodisc):
    """Compute the graders' reference values: {exercise: arguments and results}."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    rows = [draw(2, 9).mul(2).softmax(-1) for _ in range(4)]
    matrices = [draw(2, 10, 10).mul(2).softmax(-1) for _ in range(4)]
    attention, x = lodisc.Attention(12, 3), draw(2, 5, 12)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(draw(*parameter.shape) / 2)
        layer = {"weights": attention.state_dict(), "x": x, "features": attention(x)[0]}
        layer |= {kind: attention(x, kind)[1] for kind in ("row", "matrix")}
    q, k, queries, keys = draw(2, 3, 4, 8), draw(2, 3, 6, 8), draw(4, 8), draw(6, 8)
    return {
        "attention": layer | {"q": q, "k": k, "of q and k": lodisc.attention_weights(q, k)},
        "positions": lodisc.sincos_positions(3, 8),
        "product": {"rows": rows, "result": lodisc.attention_product(rows)},
        "rollout": {"matrices": matrices, "result": lodisc.attention_rollout(matrices)},
        "schedule": [lodisc.momentum_schedule(step, 8, 0.9) for step in range(9)],
        "loss": {"queries": queries, "keys": keys, "result": [
            lodisc.contrastive_loss(queries, keys, temperature, offset).item()
            for temperature, offset in ((0.2, 0), (0.5, 0), (0.2, 2))]},
        "branches": branches(lodisc, draw),
    }


def branches(lodisc, draw):
    """Compute the reference values of the forward passes, for a small LoDisc."""
    torch.manual_seed(0)
    views = draw(2, 6, 3, 32, 32)
    model = lodisc.LoDisc(lodisc.VisionTransformer(32, 8, 24, 1, 3), hidden_dim=32, output_dim=16)
    with torch.no_grad():  # both sides start alike; make a key of the wrong side differ
        for parameter in (*model.encoder.parameters(), *model.projector.parameters()):
            parameter.add_(draw(*parameter.shape) / 10)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(*views)
    return {"views": views, "weights": weights, "masks": list(output.masks),
            "global_loss": output.global_loss.item(), "local_loss": output.local_loss.item()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    out = parser.parse_args(argv).out
    if out.exists():
        sys.exit(f"make.py: {out} exists; give a new folder")
    out.mkdir(parents=True)
    source = (ROOT / "lodisc.py").read_text(encoding="utf-8")
    (out / "lodisc.py").write_text(without_bodies(source), encoding="utf-8")
    torch.save(reference_values(load(ROOT / "lodisc.py", "solved")), out / "expected.pt")
    shutil.copy(Path(__file__).with_name("graders.py"), out / "test_exercises.py")
    shutil.copy(ROOT / "requirements.txt", out)
    points = {exercise: points for exercise, (points, _) in EXERCISES.items()}
    (out / "conftest.py").write_text(CONFTEST.format(points=points))
    rows, count = [], 0
    for exercise, (value, names) in EXERCISES.items():
        rows.append(f"| {exercise} | {', '.join(f'`{name}`' for name in names)} | {value} |")
        count += len(names)
    (out / "README.md").write_text(README.format(rows="\n".join(rows), first=next(iter(EXERCISES)),
                                                 count=count))
    print(f"wrote {out}: {len(EXERCISES)} exercises, {sum(points.values())} points; "
          f"cd {out} && python -m pytest")


if __name__ == "__main__":
    main()
