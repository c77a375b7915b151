"""The assignment kit: it contains no solution; graders pass the real bodies and fail wrong ones."""

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import assignment

SOURCE = (assignment.ROOT / "lodisc.py").read_text(encoding="utf-8")
# (exercise, the student's mistake, function, correct code, its wrong replacement)
WRONG = [
    ("attention", "softmax over the wrong axis", "attention_weights",
     "softmax(dim=-1)", "softmax(dim=-2)"),
    ("attention", "computed in half precision", "attention_weights",
     "q, k = at_least_float32(q), at_least_float32(k)", "pass"),
    ("attention", "not scaled", "attention_weights", "q * q.shape[-1] ** -0.5 @", "q @"),
    ("attention", "scaled by 1 / d", "attention_weights", "** -0.5", "** -1"),
    ("attention", "autocast left on", "attention_weights",
     "with torch.autocast(q.device.type, enabled=False):", "if True:"),
    ("attention", "column instead of row", "Attention.forward",
     "q[:, :, :1], k).squeeze(2)", "q, k[:, :, :1]).squeeze(3)"),
    ("attention", "row of the last token", "Attention.forward",
     "weights = attention_weights(q[:, :, :1], k)", "weights = attention_weights(q[:, :, -1:], k)"),
    ("attention", "class_only cuts the weights too", "Attention.forward",
     "weights = None", "q, weights = q[:, :, :1] if class_only else q, None"),
    ("attention", "mean not averaged", "Attention.forward", 'if attention == "mean"', "if False"),
    ("attention", "mean over the queries", "Attention.forward", "weights.mean(dim=1, keepdim=True)",
     "weights.mean(dim=2, keepdim=True)"),
    ("attention", "mean without its axis", "Attention.forward", "weights.mean(dim=1, keepdim=True)",
     "weights.mean(dim=1)"),
    ("positions", "rows and columns swapped", "sincos_positions",
     "torch.cat([rows, columns], dim=1)", "torch.cat([columns, rows], dim=1)"),
    ("positions", "columns numbered first", "sincos_positions", '"row c -> (row column) c"',
     '"row c -> (column row) c"'),
    ("positions", "frequencies of a 1-D embedding", "sincos_positions",
     "torch.arange(dim // 4) / (dim // 4)", "torch.arange(dim // 4) / dim"),
    ("positions", "class token at the end", "sincos_positions",
     "torch.cat([torch.zeros(1, dim), patches])", "torch.cat([patches, torch.zeros(1, dim)])"),
    ("positions", "cosine before sine", "sincos_positions",
     "[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]"),
    ("product", "mean instead of product", "attention_product",
     "class_row(a).clamp_min(tiny).log() for a in attentions]).sum(0)",
     "class_row(a) for a in attentions]).mean(0).log()"),
    ("product", "product that underflows", "attention_product",
     "class_row(a).clamp_min(tiny).log() for a in attentions]).sum(0)",
     "class_row(a) for a in attentions]).prod(0).log()"),
    ("product", "no logarithm", "attention_product", ".sum(0).float()", ".sum(0).float().exp()"),
    ("product", "logarithm of zero", "attention_product", ".clamp_min(tiny)", ""),
    ("product", "heads multiplied", "attention_product", "class_row(a)",
     "(a if a.ndim == 3 else a[:, :, 0]).prod(1)[:, 1:]"),
    ("product", "column instead of row", "attention_product", "class_row(a)",
     "class_row(a if a.ndim == 3 else a.mT)"),
    ("rollout", "no residual connection", "attention_rollout", "+ row) / 2", "+ 0 * row)"),
    ("rollout", "not halved", "attention_rollout", "+ row) / 2", "+ row)"),
    ("rollout", "layers in reverse order", "attention_rollout", "reversed(attentions)",
     "attentions"),
    ("rollout", "maximum over heads", "attention_rollout", ".mean(dim=1)", ".amax(dim=1)"),
    ("rollout", "transposed", "attention_rollout", '"bi,bij->bj"', '"bi,bji->bj"'),
    ("mask", "the least important", "location_mask", "descending=True", "descending=False"),
    ("mask", "keep ratio inverted", "location_mask",
     "kept_count(importance.shape[1], keep_ratio)",
     "kept_count(importance.shape[1], 1 - keep_ratio or 1)"),
    ("mask", "NaN accepted", "location_mask", "importance.isnan()", "(importance > 1e9)"),
    ("mask", "topk does not order ties", "location_mask",
     "importance.argsort(dim=1, descending=True, stable=True)",
     "importance.topk(k, dim=1).indices"),
    ("mask", "order of ties reversed", "location_mask",
     "importance.argsort(dim=1, descending=True, stable=True)",
     "importance.argsort(dim=1, stable=True).flip(1)"),
    ("mask", "one mask for the batch", "location_mask", "importance.argsort",
     "importance.mean(0, True).expand_as(importance).argsort"),
    ("mask", "floating-point error rounds down", "location_mask",
     "k = kept_count(importance.shape[1], keep_ratio)",
     "k = max(1, math.floor(importance.shape[1] * keep_ratio))"),
    ("mask", "rounded up", "location_mask", "k = kept_count(importance.shape[1], keep_ratio)",
     "k = math.ceil(importance.shape[1] * keep_ratio)"),
    ("mask", "threshold by value", "location_mask", "return torch",
     "return importance >= importance.gather(1, order[:, k - 1:k])\n    return torch"),
    ("mask", "mask inverted", "location_mask", "order[:, :k], True",
     "order[:, :k], True).logical_not("),
    ("update", "direction swapped", "momentum_update", "1 - m)", "m)"),
    ("update", "online parameters updated", "momentum_update", "parameter.lerp_(new[name]",
     "new[name].lerp_(parameter"),
    ("update", "not in place", "momentum_update", ".lerp_(", ".lerp("),
    ("update", "new tensors instead of in place", "momentum_update",
     "parameter.lerp_(new[name], 1 - m)", "parameter.data = parameter.lerp(new[name], 1 - m)"),
    ("update", "buffers too", "momentum_update", "dict(momentum.named_parameters())",
     "dict(momentum.named_parameters())\n    for a, b in zip(online.buffers(), momentum.buffers"
     "()):\n        b.copy_(m * b + (1 - m) * a)"),
    ("update", "sum that rounds", "momentum_update", "parameter.lerp_(new[name], 1 - m)",
     "parameter.copy_(m * parameter + (1 - m) * new[name])"),
    ("schedule", "linear", "momentum_schedule", "(1 + math.cos(math.pi * step / total)) / 2",
     "(1 - step / total)"),
    ("schedule", "falling", "momentum_schedule", "math.pi * step", "math.pi * (total - step)"),
    ("schedule", "whole cosine period", "momentum_schedule", "math.pi * step",
     "2 * math.pi * step"),
    ("loss", "temperature applied twice", "contrastive_loss", "keys.T / temperature",
     "keys.T / temperature**2"),
    ("loss", "gradient for the keys", "contrastive_loss", "keys.detach()", "keys"),
    ("loss", "not normalised", "contrastive_loss", "F.normalize(at_least_float32(queries), dim=1)",
     "at_least_float32(queries)"),
    ("loss", "normalised along the batch axis", "contrastive_loss",
     "at_least_float32(keys.detach()), dim=1)", "at_least_float32(keys.detach()), dim=0)"),
    ("loss", "not scaled", "contrastive_loss", "return 2 * temperature *", "return"),
    ("loss", "autocast left on", "contrastive_loss",
     "with torch.autocast(queries.device.type, enabled=False):", "if True:"),
    ("loss", "offset forgotten", "contrastive_loss", "positives = offset +", "positives ="),
    ("branches", "global loss of the same view", "LoDisc.forward",
     "self.contrast(query1, key2) + self.contrast(query2, key1)",
     "self.contrast(query1, key1) + self.contrast(query2, key2)"),
    ("branches", "local loss of the same view", "LoDisc.forward",
     "self.contrast(query1, local2) + self.contrast(query2, local1)",
     "self.contrast(query1, local1) + self.contrast(query2, local2)"),
    ("branches", "global keys in the local loss", "LoDisc.forward",
     "self.contrast(query1, local2) + self.contrast(query2, local1)",
     "self.contrast(query1, key2) + self.contrast(query2, key1)"),
    ("branches", "one direction only", "LoDisc.forward",
     "self.contrast(query1, key2) + self.contrast(query2, key1)",
     "2 * self.contrast(query1, key2)"),
    ("branches", "gradient through the momentum side", "LoDisc.forward",
     "with torch.no_grad():", "with torch.enable_grad():"),
    ("branches", "momentum update in forward", "LoDisc.forward", "masks = None if",
     "self.update_momentum(0.99)\n        masks = None if"),
    ("branches", "masks swapped", "LoDisc.forward", "(mask1, mask2)", "(mask2, mask1)"),
    ("branches", "generator not passed on", "LoDisc.forward",
     "self.momentum_side(view1, generator)", "self.momentum_side(view1, None)"),
    ("branches", "mean of the losses", "LoDisc.forward", "LoDiscOutput(global_loss + local_loss,",
     "LoDiscOutput((global_loss + local_loss) / 2,"),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    out = tmp_path_factory.mktemp("kit") / "copy"
    assignment.main([str(out)])
    return out


def body(source, name):
    """Return the lines of a function after its docstring."""
    node = assignment.functions(source)[name]
    return "\n".join(source.splitlines()[node.body[0].end_lineno:node.end_lineno])


def grade(kit, module, exercise=""):
    """Grade a student's module -> {exercise: messages of the failed graders}."""
    failed = {}
    before = sys.modules.get("lodisc")
    sys.modules["lodisc"] = module
    try:
        graders = assignment.load(kit / "test_exercises.py", "graders")
        for name, grader in inspect.getmembers(graders, inspect.isfunction):
            if name.startswith(f"test_{exercise}"):
                try:
                    grader()
                except (AssertionError, pytest.fail.Exception) as error:
                    failed.setdefault(name.split("_")[1], []).append(str(error))
                except Exception:
                    pass  # only assertions have hints
    finally:
        sys.modules["lodisc"] = before
    return failed


@pytest.fixture(scope="module")
def graded(kit, tmp_path_factory):
    """Grade the blank kit, the real bodies and a syntax error -> {name: (status, text)}."""
    folders = {name: shutil.copytree(kit, tmp_path_factory.mktemp("students") / name)
               for name in ("blank", "solved", "broken")}
    solution = (kit / "lodisc.py").read_text(encoding="utf-8")
    for exercise, (_, names) in assignment.EXERCISES.items():
        for name in names:
            indent = "        " if "." in name else "    "
            hole = f'{indent}raise NotImplementedError("exercise {exercise}: {name}")'
            assert solution.count(hole) == 1
            solution = solution.replace(hole, body(SOURCE, name))
    (folders["solved"] / "lodisc.py").write_text(solution)
    (folders["broken"] / "lodisc.py").write_text("def broken(:\n")
    (folders["broken"] / "test_mine.py").write_text("def test_foo():\n    pass\n")
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    begun = {name: subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
             for name, folder in folders.items()}
    printed = {name: process.communicate(timeout=200)[0] for name, process in begun.items()}
    return {name: (begun[name].returncode, text) for name, text in printed.items()}


def test_kit_contains_no_solution(kit):
    assert sorted(path.name for path in kit.rglob("*")) == \
        ["README.md", "conftest.py", "expected.pt", "lodisc.py", "requirements.txt",
         "test_exercises.py"]
    blank = assignment.functions((kit / "lodisc.py").read_text(encoding="utf-8"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in kit.glob("*.py"))
    whole = assignment.functions(SOURCE)
    assert blank.keys() == whole.keys()
    for exercise, (_, names) in assignment.EXERCISES.items():
        for name in names:
            docstring, statement = blank[name].body
            assert ast.get_docstring(blank[name]) == ast.get_docstring(whole[name])
            assert ast.unparse(statement) == \
                f"raise NotImplementedError('exercise {exercise}: {name}')"
            for line in body(SOURCE, name).splitlines():
                unique = len(line.strip()) > 30 and SOURCE.count(line.strip()) == 1
                assert not unique or line.strip() not in text, line
    taken = {name for _, names in assignment.EXERCISES.values() for name in names}
    for name in whole.keys() - taken:
        assert ast.unparse(whole[name]) == ast.unparse(blank[name])


@pytest.mark.slow
def test_blank_kit_has_no_points_and_names_first_exercise(graded):
    status, text = graded["blank"]
    assert status == 1 and "total         0 of 100" in text
    for exercise, (points, _) in assignment.EXERCISES.items():
        assert f"{exercise:<12}  0 of {points}" in text
    assert "exercise attention: attention_weights" in text


@pytest.mark.slow
def test_original_bodies_get_full_points(graded):
    status, text = graded["solved"]
    assert status == 0 and "total       100 of 100" in text, text


@pytest.mark.slow
def test_kit_with_syntax_error_has_no_points(graded):
    _, text = graded["broken"]
    assert "INTERNALERROR" not in text and "total         0 of 100" in text


def test_exercises_have_enough_wrong_solutions():
    assert len(WRONG) >= 50 and len({wrong[:2] for wrong in WRONG}) == len(WRONG)
    assert len(assignment.EXERCISES) == 9
    assert sum(len(names) for _, names in assignment.EXERCISES.values()) == 10
    assert sum(points for points, _ in assignment.EXERCISES.values()) == 100
    for exercise in assignment.EXERCISES:
        assert sum(wrong[0] == exercise for wrong in WRONG) >= 3


@pytest.mark.parametrize("exercise, what, name, right, wrong", WRONG,
                         ids=[f"{wrong[0]}: {wrong[1]}" for wrong in WRONG])
def test_wrong_solutions_are_caught(kit, tmp_path, exercise, what, name, right, wrong):
    before = body(SOURCE, name)
    assert before.count(right) >= 1, f"{name} does not contain {right!r}"
    after = before.replace(right, wrong)
    (tmp_path / "wrong.py").write_text(SOURCE.replace(before, after))
    failed = grade(kit, assignment.load(tmp_path / "wrong.py", "lodisc_with_a_mistake"), exercise)
    assert exercise in failed
    for message in failed[exercise]:  # a hint, no bare assertion
        assert len(message.partition("\n")[0]) > 10 and not message.startswith("assert "), message
    assert not any(right in message for message in failed[exercise])
