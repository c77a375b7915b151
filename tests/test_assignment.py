"""The assignment kit: it contains no solution; graders pass the real bodies and fail wrong ones."""

import ast
import inspect
import shutil
import subprocess
import sys

import pytest

import make

SOURCE = (make.ROOT / "lodisc.py").read_text(encoding="utf-8")
FUNCTIONS = make.functions(SOURCE)
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
    ("attention", "q, k and v cut head by head", "Attention.forward",
     "b t (three h d) -> three b h t d", "b t (h three d) -> three b h t d"),
    ("attention", "channels of the heads interleaved", "Attention.forward",
     '"b h t d -> b t (h d)"', '"b h t d -> b t (d h)"'),
    ("attention", "features not projected", "Attention.forward",
     'self.proj(rearrange(x, "b h t d -> b t (h d)"))', 'rearrange(x, "b h t d -> b t (h d)")'),
    ("attention", "column instead of row", "Attention.forward",
     "attention_weights(q[:, :, :1], k).squeeze(2)", "attention_weights(q, k)[:, :, :, 0]"),
    ("attention", "row of the last token", "Attention.forward",
     "attention_weights(q[:, :, :1], k)", "attention_weights(q[:, :, -1:], k)"),
    ("attention", "row of the patches alone", "Attention.forward",
     "squeeze(2).mean(dim=1)", "squeeze(2).mean(dim=1)[:, 1:]"),
    ("attention", "heads of the row not averaged", "Attention.forward",
     "squeeze(2).mean(dim=1)", "squeeze(2)"),
    ("attention", "matrix averaged over the queries", "Attention.forward",
     "attention_weights(q, k).mean(dim=1)", "attention_weights(q, k).mean(dim=2)"),
    ("attention", "matrix of one head", "Attention.forward",
     "attention_weights(q, k).mean(dim=1)", "attention_weights(q, k)[:, 0]"),
    ("attention", "softmax of the mean over heads", "Attention.forward",
     "attention_weights(q, k).mean(dim=1)",
     "(q @ k.mT * q.shape[-1] ** -0.5).mean(dim=1).softmax(dim=-1)"),
    ("attention", "weights always returned", "Attention.forward",
     "weights = None", "weights = attention_weights(q, k)"),
    ("attention", "class_only cuts the weights too", "Attention.forward",
     "weights = None", "q, weights = q[:, :, :1] if class_only else q, None"),
    ("attention", "class_only ignored", "Attention.forward", "if class_only:", "if False:"),
    ("attention", "class_only gives the last token", "Attention.forward",
     "q = q[:, :, :1]", "q = q[:, :, -1:]"),
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
    ("positions", "no axis for the batch", "sincos_positions", "patches])[None]", "patches])"),
    ("positions", "double precision", "sincos_positions", "torch.arange(dim // 4) /",
     "torch.arange(dim // 4).double() /"),
    ("product", "mean instead of product", "attention_product",
     "row.clamp_min(tiny).log() for row in attentions]).sum(dim=0)",
     "row.clamp_min(tiny) for row in attentions]).mean(dim=0).log()"),
    ("product", "mean of the logarithms", "attention_product", ".sum(dim=0)", ".mean(dim=0)"),
    ("product", "product that underflows", "attention_product",
     "row.clamp_min(tiny).log() for row in attentions]).sum(dim=0)",
     "row for row in attentions]).prod(dim=0).clamp_min(tiny).log()"),
    ("product", "no logarithm", "attention_product", ".sum(dim=0)", ".sum(dim=0).exp()"),
    ("product", "logarithm of zero", "attention_product", ".clamp_min(tiny)", ""),
    ("product", "sum over the patches", "attention_product", ".sum(dim=0)", ".sum(dim=-1)"),
    ("product", "last layer left out", "attention_product", "for row in attentions",
     "for row in attentions[:-1]"),
    ("product", "larger smallest weight", "attention_product",
     "tiny = torch.finfo(torch.float32).tiny", "tiny = 1e-12"),
    ("rollout", "no residual connection", "attention_rollout", "+ row) / 2", "+ 0 * row)"),
    ("rollout", "not halved", "attention_rollout", "+ row) / 2", "+ row)"),
    ("rollout", "layers in reverse order", "attention_rollout", "reversed(attentions)",
     "attentions"),
    ("rollout", "transposed", "attention_rollout", '"bi,bij->bj"', '"bi,bji->bj"'),
    ("rollout", "row of the last token", "attention_rollout", "row[:, 0] = 1", "row[:, -1] = 1"),
    ("rollout", "class token's own entry kept", "attention_rollout", "row[:, 1:]", "row"),
    ("rollout", "one layer left out", "attention_rollout", "reversed(attentions)",
     "reversed(attentions[1:] or attentions)"),
    ("mask", "the least important", "location_mask", "descending=True", "descending=False"),
    ("mask", "keep ratio inverted", "location_mask",
     "kept_count(importance.shape[1], keep_ratio)",
     "kept_count(importance.shape[1], 1 - keep_ratio or 1)"),
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
    ("update", "online parameters updated", "momentum_update", "old.lerp_(new", "new.lerp_(old"),
    ("update", "not in place", "momentum_update", ".lerp_(", ".lerp("),
    ("update", "new tensors instead of in place", "momentum_update",
     "old.lerp_(new, 1 - m)", "old.data = old.lerp(new, 1 - m)"),
    ("update", "buffers too", "momentum_update", "old.lerp_(new, 1 - m)",
     "old.lerp_(new, 1 - m)\n    for old, new in zip(momentum.buffers(), online.buffers()):\n"
     "        old.copy_(m * old + (1 - m) * new)"),
    ("update", "sum that rounds", "momentum_update", "old.lerp_(new, 1 - m)",
     "old.copy_(m * old + (1 - m) * new)"),
    ("update", "first parameter alone", "momentum_update", "old.lerp_(new, 1 - m)",
     "old.lerp_(new, 1 - m)\n        break"),
    ("schedule", "linear", "momentum_schedule", "(1 + math.cos(math.pi * step / total)) / 2",
     "(1 - step / total)"),
    ("schedule", "falling", "momentum_schedule", "math.pi * step", "math.pi * (total - step)"),
    ("schedule", "whole cosine period", "momentum_schedule", "math.pi * step",
     "2 * math.pi * step"),
    ("schedule", "base of 0.99 always", "momentum_schedule", "1 - (1 - base) *", "1 - 0.01 *"),
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
    ("loss", "sum over the queries", "contrastive_loss", "F.cross_entropy(logits, positives)",
     'F.cross_entropy(logits, positives, reduction="sum")'),
    ("loss", "softmax over the queries", "contrastive_loss", "logits = queries @ keys.T /",
     "logits = (queries @ keys.T).log_softmax(dim=0) /"),
    ("loss", "offset subtracted", "contrastive_loss", "offset + torch.arange",
     "(offset > 0) * (len(keys) - len(queries) - offset) + torch.arange"),
    ("loss", "offset forgotten", "contrastive_loss", "positives = offset +", "positives ="),
    *[("branches", f"{what} ({name})", f"{name}.forward", right, wrong)
      for name in ("MoCoV3", "LoDisc") for what, right, wrong in (
          ("global loss of the same view", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "self.contrast(q1, k1) + self.contrast(q2, k2)"),
          ("one direction twice", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "2 * self.contrast(q1, k2)"),
          ("both views in one pass", "q1, q2 = self.query(view1), self.query(view2)",
           "q1, q2 = self.query(torch.cat([view1, view2])).chunk(2)"),
          ("gradient through the momentum side", "with torch.no_grad():",
           "with torch.enable_grad():"),
          ("momentum update in forward", "global_loss = self",
           "self.update_momentum(0.99)\n        global_loss = self"),
          ("views not checked", "check_views(view1, view2)", "pass"),
      )],
    ("branches", "shapes of the views not checked", "MoCoV3.forward", "check_views(view1, view2)",
     'require(len(view1) > 1, "one image")'),
    ("branches", "mean of the directions", "MoCoV3.forward",
     "self.contrast(q1, k2) + self.contrast(q2, k1)",
     "(self.contrast(q1, k2) + self.contrast(q2, k1)) / 2"),
    ("branches", "query without the predictor", "MoCoV3.forward", "self.query(view2)",
     "self.projector(self.encoder(view2))"),
    ("branches", "key of the online side", "MoCoV3.forward", "self.key(view1)",
     "self.projector(self.encoder(view1))"),
    ("branches", "key through the predictor", "MoCoV3.forward", "self.key(view2)",
     "self.predictor(self.key(view2))"),
    ("branches", "queries without a gradient", "MoCoV3.forward", "global_loss = self",
     "q1, q2 = q1.detach(), q2.detach()\n        global_loss = self"),
    ("branches", "total of one direction", "MoCoV3.forward", "MoCoV3Output(global_loss,",
     "MoCoV3Output(self.contrast(q1, k2),"),
    ("branches", "local loss of the same view", "LoDisc.forward",
     "self.contrast(q1, l2) + self.contrast(q2, l1)",
     "self.contrast(q1, l1) + self.contrast(q2, l2)"),
    ("branches", "global keys in the local loss", "LoDisc.forward",
     "self.contrast(q1, l2) + self.contrast(q2, l1)",
     "self.contrast(q1, k2) + self.contrast(q2, k1)"),
    ("branches", "local loss in one direction only", "LoDisc.forward",
     "self.contrast(q1, l2) + self.contrast(q2, l1)", "self.contrast(q1, l2)"),
    ("branches", "local keys with the mask of the other view", "LoDisc.forward",
     "self.local_key(view1, mask1)", "self.local_key(view1, mask2)"),
    ("branches", "global pass twice", "LoDisc.forward",
     "k1, mask1 = self.key_and_mask(view1, generator)",
     "k1, mask1 = self.key(view1), self.key_and_mask(view1, generator)[1]"),
    ("branches", "masks swapped", "LoDisc.forward", "(mask1, mask2)", "(mask2, mask1)"),
    ("branches", "generator not passed on for view 1", "LoDisc.forward",
     "self.key_and_mask(view1, generator)", "self.key_and_mask(view1)"),
    ("branches", "generator not passed on for view 2", "LoDisc.forward",
     "self.key_and_mask(view2, generator)", "self.key_and_mask(view2)"),
    ("branches", "weights swapped", "LoDisc.forward",
     "self.global_weight * global_loss + self.local_weight * local_loss",
     "self.local_weight * global_loss + self.global_weight * local_loss"),
    ("branches", "global weight forgotten", "LoDisc.forward", "self.global_weight * global_loss",
     "global_loss"),
    ("branches", "local weight forgotten", "LoDisc.forward", "self.local_weight * local_loss",
     "local_loss"),
    ("branches", "total divided by the weights", "LoDisc.forward",
     "LoDiscOutput(total,", "LoDiscOutput(total / (self.global_weight + self.local_weight),"),
    ("branches", "weighted global loss returned", "LoDisc.forward",
     "(total, global_loss,", "(total, self.global_weight * global_loss,"),
    ("branches", "weighted local loss returned", "LoDisc.forward",
     "global_loss, local_loss, (", "global_loss, self.local_weight * local_loss, ("),
    ("branches", "losses swapped", "LoDisc.forward", "(total, global_loss, local_loss,",
     "(total, local_loss, global_loss,"),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    out = tmp_path_factory.mktemp("kit") / "copy"
    make.main([str(out)])
    return out


def body(name):
    """Return the lines of a function of lodisc.py after its docstring."""
    node = FUNCTIONS[name]
    return "\n".join(SOURCE.splitlines()[node.body[0].end_lineno:node.end_lineno])


@pytest.fixture(scope="module")
def graders(kit):
    return make.load(kit / "test_exercises.py", "graders")


def hints(graders, exercise):
    """Run the graders of an exercise -> the messages of those that fail."""
    messages = []
    for name, grader in inspect.getmembers(graders, inspect.isfunction):
        if name.startswith(f"test_{exercise}_"):
            try:
                grader()
            except (AssertionError, pytest.fail.Exception) as error:
                messages.append(str(error))
            except Exception:
                pass  # only assertions have hints
    return messages


@pytest.fixture(scope="module")
def graded(kit, tmp_path_factory):
    """Grade the blank kit, the real bodies and a syntax error -> {name: (status, text)}."""
    folders = {name: shutil.copytree(kit, tmp_path_factory.mktemp("students") / name)
               for name in ("blank", "solved", "broken")}
    solution = (kit / "lodisc.py").read_text(encoding="utf-8")
    for exercise, (_, names) in make.EXERCISES.items():
        for name in names:
            indent = "        " if "." in name else "    "
            hole = f'{indent}raise NotImplementedError("exercise {exercise}: {name}")'
            assert solution.count(hole) == 1
            solution = solution.replace(hole, body(name))
    (folders["solved"] / "lodisc.py").write_text(solution, encoding="utf-8")
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
    blank = make.functions((kit / "lodisc.py").read_text(encoding="utf-8"))
    removed = {name: exercise for exercise, (_, names) in make.EXERCISES.items() for name in names}
    assert blank.keys() == FUNCTIONS.keys()
    for name, exercise in removed.items():
        _, statement = blank[name].body
        assert ast.get_docstring(blank[name]) == ast.get_docstring(FUNCTIONS[name])
        assert ast.unparse(statement) == f"raise NotImplementedError('exercise {exercise}: {name}')"
    text = "\n".join(path.read_text(encoding="utf-8") for path in kit.glob("*.py"))
    bodies = "\n".join(body(name) for name in removed)
    for line in map(str.strip, bodies.splitlines()):
        elsewhere = SOURCE.count(line) - bodies.count(line)
        assert len(line) <= 30 or text.count(line) == elsewhere, line
    for name in FUNCTIONS.keys() - removed.keys():
        assert ast.unparse(FUNCTIONS[name]) == ast.unparse(blank[name])


@pytest.mark.slow
def test_blank_kit_has_no_points_and_names_first_exercise(graded):
    status, text = graded["blank"]
    assert status == 1 and "total         0 of 100" in text
    for exercise, (points, _) in make.EXERCISES.items():
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
    assert len(make.EXERCISES) == 9
    assert sum(len(names) for _, names in make.EXERCISES.values()) == 11
    assert sum(points for points, _ in make.EXERCISES.values()) == 100
    for exercise in make.EXERCISES:
        assert sum(wrong[0] == exercise for wrong in WRONG) >= 3


@pytest.mark.parametrize("exercise, what, name, right, wrong", WRONG,
                         ids=[f"{wrong[0]}: {wrong[1]}" for wrong in WRONG])
def test_wrong_solutions_are_caught(graders, tmp_path, monkeypatch, exercise, what, name, right,
                                    wrong):
    before = body(name)
    assert before.count(right) >= 1, f"{name} does not contain {right!r}"
    after = before.replace(right, wrong)
    (tmp_path / "wrong.py").write_text(SOURCE.replace(before, after), encoding="utf-8")
    mistaken = make.load(tmp_path / "wrong.py", "lodisc_with_a_mistake")
    monkeypatch.setattr(graders, "lodisc", mistaken)
    messages = hints(graders, exercise)
    assert messages
    for message in messages:  # a hint, no bare assertion
        assert len(message.partition("\n")[0]) > 10 and not message.startswith("assert "), message
    assert not any(right in message for message in messages)
