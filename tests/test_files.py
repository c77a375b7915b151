"""What a run leaves on the disk: whole files or none, also if two write at once or nothing fits."""

import argparse
import ast
import gc
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import same, weights
from data import datasets
from lodisc import UserError, VisionTransformer, load_encoder

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parent.parent
SMALL = ["--arch", "vit_nano", "--image-size", "16", "--patch-size", "8", "--epochs", "1",
         "--batch-size", "12", "--workers", "0", "--device", "cpu"]


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("write failed"), KeyboardInterrupt()])
def test_file_is_whole_or_unchanged(error):
    def write(file):
        file.write(b"half of i")
        raise error

    evaluation.write_whole(Path("file"), lambda file: file.write(b"before"))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(expected) as caught:
        evaluation.write_whole(Path("file"), write)
    assert Path("file").read_bytes() == b"before" and names() == ["file"]
    if expected is UserError:
        assert str(caught.value).startswith("file could not be written (") and "\n" not in str(
            caught.value)
    evaluation.write_whole(Path("file"), lambda file: file.write(b"after"))
    assert Path("file").read_bytes() == b"after" and names() == ["file"]


def test_interruption_while_a_checkpoint_is_written_is_no_full_disk(flowers, monkeypatch):
    """torch.save raises RuntimeError in place of the KeyboardInterrupt of a write."""
    options, writes = ["--data", str(flowers / "train"), *SMALL], []

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            writes.append(data)
            if len(writes) == 9:
                raise KeyboardInterrupt
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    save = torch.save
    saved = []

    def save_then_stop(contents, file):
        saved.append(contents)
        save(contents, Interrupted(file) if len(saved) == 2 else file)

    monkeypatch.setattr(torch, "save", save_then_stop)
    with pytest.raises(UserError, match="^interrupted; continue with: .*--resume run"):
        train.main([*options, "--out", "run"])
    assert names("run") == ["checkpoint.pt", "config.json", "metrics.csv"]
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 0


def test_every_file_of_a_run_is_written_whole(flowers, monkeypatch, quick_probe):
    """Record what is opened for writing: each file is a temporary one that replaces its name."""
    opened, replaced, real_open, real_replace = [], [], open, os.replace

    def open_recorded(file, mode="r", *args, **options):
        if set(mode) & set("wax"):
            opened.append(str(file))
        return real_open(file, mode, *args, **options)

    def replace(part, path):
        replaced.append((str(part), Path(path).name))
        return real_replace(part, path)

    monkeypatch.setattr("builtins.open", open_recorded)
    monkeypatch.setattr(os, "replace", replace)
    train.main(["--data", str(flowers), *SMALL, "--out", "run"])
    evaluation.main(["export", "run"])
    evaluation.main(["masks", "run", "--workers", "0"])
    written = {name for part, name in replaced if part in opened}
    assert written == set(names("run")) == {
        "checkpoint.pt", "config.json", "encoder.pth", "eval.json", "masks.png", "metrics.csv",
        "per_image.json", "run.png"}
    assert {path for path in opened if "run/" in path} <= {part for part, _ in replaced}


@pytest.mark.slow
def test_two_processes_lose_no_result():
    """Merge from two processes at once, 40 results each."""
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "import eval as evaluation\nfrom pathlib import Path\n"
            "for i in range(40):\n"
            "    row = {f'{sys.argv[2]}{i}': {'a': i}}\n"
            "    evaluation.save_results(Path('.'), {'trained': row})\n")
    Path("merge.py").write_text(code, encoding="utf-8")
    both = [subprocess.Popen([sys.executable, "merge.py", ROOT, name], stdout=subprocess.DEVNULL)
            for name in "ab"]
    assert [process.wait(timeout=100) for process in both] == [0, 0]
    results = json.loads(Path("eval.json").read_text(encoding="utf-8"))
    assert results == {f"{name}{i}": {"a": i} for name in "ab" for i in range(40)}
    assert names() == ["eval.json", "merge.py", "per_image.json"]


@pytest.mark.parametrize("contents", [b"{half", b"[1]", b"\xff\xfe{"])
@pytest.mark.parametrize("name", ["eval.json", "per_image.json"])
def test_damaged_results_are_named_and_kept(name, contents):
    Path(name).write_bytes(contents)
    with pytest.raises(UserError, match=f"^{name} is damaged .*move it away") as error:
        evaluation.save_results(Path("."), {"trained": {"knn": {"top1": 0.5}}})
    assert "\n" not in str(error.value)
    assert Path(name).read_bytes() == contents and names() == [name]


def test_results_are_printed_where_they_cannot_be_stored(flowers, monkeypatch, capsys,
                                                         quick_probe):
    """Evaluate a finished run, and resume it, in a folder that takes no files."""
    train.main(["--data", str(flowers), *SMALL, "--out", "run"])
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    real = open

    def refuse(file, mode="r", *args, **options):
        if set(mode) & set("wax"):
            raise PermissionError(13, "Permission denied")
        return real(file, mode, *args, **options)

    capsys.readouterr()
    monkeypatch.setattr("builtins.open", refuse)  # a read-only folder does not stop root
    evaluation.main(["all", "run", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "trained" in printed and "mAP" in printed
    assert printed.count("\nnot stored: run/eval.json could not be written (Permission den") == 1
    train.main(["--resume", "run"])
    printed = capsys.readouterr().out
    assert "untrained" in printed and printed.count("not stored: ") == 2
    assert "not stored: run/run.png" in printed
    with pytest.raises(UserError, match="run/encoder.pth could not be written"):
        evaluation.main(["export", "run"])
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_disk_that_is_full_in_the_middle_of_a_run_is_an_error(flowers, monkeypatch):
    options = ["--data", str(flowers / "train"), *SMALL, "--epochs", "2"]
    train.main([*options, "--out", "run"])
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"step": 3, "history": checkpoint["history"][:1]}, "run/checkpoint.pt")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="metrics.csv could not be written"):
        train.main(["--resume", "run"])


@pytest.mark.slow
def test_export_on_a_full_disk_leaves_nothing():
    resource = pytest.importorskip("resource", reason="Windows has no limits")
    encoder = VisionTransformer(16, 8, 192, 4, 3)
    torch.save(encoder.state_dict(), "weights.pth")

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run([sys.executable, ROOT / "eval.py", "export", "weights.pth", "--device",
                           "cpu"], capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "encoder.pth could not be written" in done.stderr and names() == ["weights.pth"]


@pytest.mark.parametrize("text", [
    "no such file: a\nb", "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n"
    "  File ...\nlodisc.UserError: no such file: a b"])
def test_mistake_is_printed_in_one_line(monkeypatch, capsys, text):
    """Also of a path with a line break, and of a DataLoader worker."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    evaluation.exit_with_line("eval.py", UserError(text))
    assert capsys.readouterr().err == "eval.py: no such file: a b\n" and codes == [2]


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_interruption_that_nothing_handles_is_one_line(monkeypatch, capsys, script):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    codes = []
    monkeypatch.setattr(argparse, "ArgumentParser", interrupt)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    runpy.run_path(str(ROOT / script), run_name="__main__")
    assert capsys.readouterr().err == f"{script}: interrupted\n" and codes == [2]


def test_picture_has_the_format_of_its_ending(tmp_path):
    picture = Image.new("RGB", (20, 10), (200, 30, 40))
    for name, kind in (("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP")):
        evaluation.save_picture(picture, tmp_path / name)
        assert Image.open(tmp_path / name).format == kind
    for name in ("d.txt", "e.psd"):  # Pillow only reads the latter
        with pytest.raises(UserError, match=f"{name}: expected the ending of a picture"):
            evaluation.save_picture(picture, tmp_path / name)
    assert names(tmp_path) == ["a.png", "b.JPG", "c.webp"]


# --- folders and interruptions ----------------------------------------------------------------


def test_runs_started_at_once_have_their_own_numbers(monkeypatch):
    """Make the folders from eight threads; and lose the race for a number to another process."""
    config, made = {"data": "birds", "method": "lodisc"}, []
    start = threading.Barrier(8)

    def make():
        start.wait()
        made.append(train.new_folder(train.NEW_RUN, config).name)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [f"birds-lodisc-{i}" for i in range(1, 9)] == names("runs")
    real = Path.mkdir

    def late(self, *args, **options):
        if self.name == "birds-lodisc-9":
            real(self, exist_ok=True)  # the other process was faster
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    assert train.new_folder(train.NEW_RUN, config).name == "birds-lodisc-10"


@pytest.mark.parametrize("place", ["load_data", "build_model", "build_optimizer", "torch.save"])
def test_interruption_before_the_first_checkpoint_leaves_nothing(flowers, monkeypatch, place):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    owner, _, name = place.rpartition(".")
    monkeypatch.setattr({"torch": torch, "": train}[owner], name, interrupt)
    with pytest.raises(UserError, match="^interrupted before the first checkpoint: nothing is sto"):
        train.main(["--data", str(flowers), *SMALL])
    assert not Path("runs").exists() or names("runs") == []


@pytest.mark.slow
def test_sigint_at_any_moment_advises_what_works(flowers):
    """Interrupt real runs after growing delays, from the program's start on."""
    outcomes = set()
    for tenths in [*range(20, 60, 4), 80, 120, 180]:  # the last for a machine that is busy
        if tenths >= 60 and True in outcomes:
            break
        has_begun = False
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", "--data", flowers, *SMALL, "--epochs", "400",
             "--out", "run"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        try:
            process.wait(timeout=tenths / 10)
        except subprocess.TimeoutExpired:
            has_begun = Path("run").exists()
            process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=100 if has_begun else 30)
        except subprocess.TimeoutExpired:
            assert not has_begun  # C code that imports may lose a Ctrl-C: press again
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=100)
        if "Traceback" in error:  # while Python still imported
            assert "import" in error and not Path("run").exists()
            continue
        assert process.returncode == 2 and error.count("\n") == 1, error
        resumable = "--resume run" in error
        assert resumable == Path("run/checkpoint.pt").exists() == Path("run").exists()
        outcomes.add(resumable)
        if resumable:
            assert load_encoder("run").image_size == 16
            shutil.rmtree("run")
    assert True in outcomes


@pytest.mark.parametrize("contents", [None, b"half a checkpoint"])
def test_failed_resume_keeps_the_folder(contents):
    """A user's own folder is never removed, whatever is wrong with it."""
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me", encoding="utf-8")
    if contents:
        Path("mine/checkpoint.pt").write_bytes(contents)
    with pytest.raises(UserError):
        train.main(["--resume", "mine"])
    assert Path("mine/notes.txt").read_text(encoding="utf-8") == "keep me"


# --- shared memory, Windows -------------------------------------------------------------------


class Dies(torch.utils.data.Dataset):
    """Ends its DataLoader worker as the kernel does when /dev/shm is full."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGBUS)


class Mistaken(Dies):
    def __getitem__(self, index):
        raise RuntimeError("my own mistake")


@pytest.mark.parametrize("busy", [False, True])
def test_death_of_a_loading_process_names_the_remedies(busy):
    """torch reports it where the main process is: waiting for a batch, or at work on another."""
    loader = torch.utils.data.DataLoader(Dies(), num_workers=1)
    with pytest.raises(UserError, match="DataLoader worker.*--workers 0.*--shm-size") as error:
        with train.naming_dead_workers():
            batches = iter(loader)
            for _ in range(50 if busy else 0):
                time.sleep(0.1)
            next(batches)
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="my own mistake"):  # keeps its traceback
        with train.naming_dead_workers():
            list(torch.utils.data.DataLoader(Mistaken(), num_workers=1))


@pytest.mark.parametrize("workers, megabytes, fitting", [
    (8, 1000, 8), (8, 64, 1), (2, 64, 1), (2, 80, 2), (1, 64, 1), (8, 20, 0), (0, 20, 0)])
def test_loading_processes_have_room_in_shared_memory(monkeypatch, capsys, tmp_path, workers,
                                                      megabytes, fitting):
    """A batch of the recipe's two views of 98 px has 15 MB; each process has two in advance."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(
        free=megabytes * 1_000_000))
    assert datasets.fitting_workers(workers, 64 * 2 * 3 * 98 * 98 * 4, tmp_path) == fitting
    assert ("--shm-size" in capsys.readouterr().out) == (fitting < workers)
    assert datasets.fitting_workers(workers, 10**9, tmp_path / "missing") == workers  # no Linux


def test_both_loaders_ask_for_their_batches_room(flowers, monkeypatch, quick_probe):
    asked = []

    def none_fits(*sizes):
        asked.append(sizes)
        return 0

    for script in (train, evaluation):
        monkeypatch.setattr(script, "fitting_workers", none_fits)
    train.main(["--data", str(flowers), *SMALL, "--workers", "2", "--out", "run"])
    image = 3 * 16 * 16 * 4  # bytes
    assert asked == [(2, 12 * 2 * image), *[(2, evaluation.BATCH * image)] * 2]


MODULES = [path for pattern in ("*.py", "data/*.py", "tests/*.py", "tests/*/*.py")
           for path in ROOT.glob(pattern)]


@pytest.mark.parametrize("path", sorted(path.relative_to(ROOT).as_posix() for path in MODULES))
def test_module_names_utf_8_and_imports_on_windows(path):
    """Text is opened as UTF-8, which is not Windows' default, and no module needs Unix to load."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        name = getattr(node, "func", None)
        name = getattr(name, "attr", getattr(name, "id", None))
        if name == "open" and isinstance(node.func, ast.Name):
            modes = [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
            reads = not any(set(mode) & set("bwax") for mode in modes)
        else:
            reads = name == "read_text"
        if reads:
            named = any(word.arg == "encoding" for word in node.keywords)
            assert named, f"{path}, line {node.lineno}: no encoding"
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not imported & {"resource", "fcntl", "pwd", "grp", "termios"}, path


def test_resumed_run_equals_an_undisturbed_one_in_every_file(flowers, monkeypatch):
    """Stop while the second epoch's checkpoint is written: the next start mends what is left."""
    options = ["--data", str(flowers / "train"), *SMALL, "--epochs", "3"]
    train.main([*options, "--out", "whole"])
    real, saved = torch.save, []

    def stop(contents, file):
        saved.append(1)
        if len(saved) == 3:
            raise MemoryError
        real(contents, file)

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(MemoryError):
        train.main([*options, "--out", "part"])
    monkeypatch.setattr(torch, "save", real)
    assert len(Path("part/metrics.csv").read_text(encoding="utf-8").splitlines()) == 3
    Path("part/.checkpoint.pt.0123abcd").write_bytes(b"of a SIGKILL")
    Path("part/.metrics.csv.0123abcd").write_bytes(b"of a SIGKILL")
    train.main(["--resume", "part"])
    assert same(weights("part"), weights("whole")) and names("part") == names("whole")
    first, second = ([row.split(",")[:5] for row in Path(folder, "metrics.csv").read_text(
        encoding="utf-8").splitlines()] for folder in ("part", "whole"))
    assert first == second and len(first) == 4


def test_stored_epoch_is_never_removed(flowers, monkeypatch):
    """The disk is full from some write on: a checkpoint with an epoch stays, all else goes."""
    options, real = ["--data", str(flowers / "train"), *SMALL, "--epochs", "2"], os.replace
    for allowed in range(8):
        written = []

        def replace(part, path):
            if len(written) == allowed:
                raise OSError(28, "No space left on device")
            written.append(real(part, path))

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(UserError, match="could not be written"):
            train.main([*options, "--out", f"run {allowed}"])
        path = Path(f"run {allowed}/checkpoint.pt")
        stored = path.exists() and torch.load(path, weights_only=True)["step"] > 0
        assert stored == (allowed >= 6) and path.parent.exists() == (allowed >= 4)


def test_folder_that_cannot_be_made_is_an_error():
    Path("runs").symlink_to("not mounted")
    with pytest.raises(UserError, match="--out .*birds-lodisc-1: "):
        train.new_folder(train.NEW_RUN, {"data": "birds", "method": "lodisc"})
