"""A run beside its loop: device, folder, checkpoint, metrics, progress line, how it is stopped."""

import csv
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from lodisc import first_line, require

NEW_RUN = "runs/<data>-<method>-<n>"
COLUMNS = ("epoch", "step", "total", "global_loss", "local_loss", "lr", "momentum",
           "images_per_second", "seconds")
# a figure's name in tables, and its place in eval.json
FIGURES = {"linear top-1": ("linear", "top1"), "top-5": ("linear", "top5"),
           "k-NN top-1": ("knn", "top1"), "rank-1": ("retrieval", "rank1"),
           "rank-5": ("retrieval", "rank5"), "mAP": ("retrieval", "mAP")}
MAIN_FIGURES = {name: place for name, place in FIGURES.items() if not name.endswith("-5")}
FILM = 8  # so many training pictures, whose masks are kept at so many moments of the run
FREE = ("resume", "download", "device", "workers")  # settings that --resume may change


def new_folder(out, settings):
    """Make the run's folder; what exists is never written to."""
    if out != NEW_RUN:
        require(not Path(out).exists(), f"--out {out} exists; give another name, or go on with it "
                f"by --resume {out}")
        Path(out).mkdir(parents=True)
        return Path(out)
    stem = f"{Path(settings['data']).resolve().name}-{settings['method']}"
    for n in range(1, sys.maxsize):
        folder = Path("runs") / f"{stem}-{n}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


@contextmanager
def whole_file(path):
    """A place beside path to write to, which takes path's once all is written, or is gone."""
    part = path.with_suffix(".tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path, **contents):
    """Write beside the old checkpoint and then swap, so that one whole file is always there."""
    try:
        with whole_file(path) as part:
            torch.save(contents, part)
    except (RuntimeError, OSError) as error:  # torch's word for a full disk is a RuntimeError
        raise OSError(f"{path} could not be written, is the disk full? "
                      f"{first_line(error)}") from None


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; mend it or move it away") from None


def write_json(path, contents):
    with whole_file(path) as part:
        part.write_text(json.dumps(contents, indent=2) + "\n")


def merge_json(path, results):
    """Add results to a JSON file; figures of other kinds that it holds already stay."""
    def merged(known, new):
        return {**known, **{name: merged(known[name], value) if isinstance(value, dict)
                            and isinstance(known.get(name), dict) else value
                            for name, value in new.items()}}

    write_json(path, merged(read_json(path) if path.exists() else {}, results))


def unlearnt_loss(settings):
    """What a branch that has learnt nothing loses, of two views."""
    return 4 * settings["temperature"] * math.log(settings["batch_size"])


def filmed(n):
    """Which of n training pictures have their masks kept."""
    return [i * n // FILM for i in range(FILM)]


def pick_device(name):
    """A device that works; "auto" is the first of cuda, mps and cpu that there is."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: a GPU for each process
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {first_line(error)}") from None


class Stop:
    """While it lasts, SIGINT and SIGTERM ask the loop to stop after its step.

    A second SIGINT stops at once.
    """

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self):
        """Whether any process was asked: all must stop after the same step."""
        if not dist.is_initialized():
            return self.asked
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked)  # what is asked while it waits counts at the next step
        return bool(asked)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def outlive_the_step(worker):
    """A terminal's Ctrl-C, or a queue's SIGTERM, goes to the loading processes too; were they gone
    at once, the parent would fail within the step that it wants to finish.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # seconds; then it ends


def write_metrics(path, history):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)


class Progress:
    """The line that shows a run is alive: rewritten in place on a terminal, else one an epoch."""

    def __init__(self, epochs, steps, batch_size, first_step):
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self.first_step = first_step
        self.start = self.shown = time.monotonic()

    def __call__(self, epoch, step, losses, lr, momentum):
        """step counts from the run's beginning; losses: a function, as reading them is a wait."""
        now, last = time.monotonic(), step % self.steps == 0
        if not last and not (sys.stdout.isatty() and now - self.shown > 1):
            return
        self.shown, done = now, step - self.first_step
        pace = (now - self.start) / done
        left = round(pace * (self.epochs * self.steps - step))
        global_loss, local_loss = losses()
        line = (f"epoch {epoch + 1}/{self.epochs}  step {step}  global {global_loss:.3f}  "
                f"local {local_loss:.3f}  lr {lr:.1e}  m {momentum:.4f}  "
                f"{self.batch_size / pace:.0f} images/s  {left // 60}:{left % 60:02d} left")
        if sys.stdout.isatty():  # one line of the terminal: what wraps cannot be written over
            columns = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:columns]:<{columns}}"
        print(line, end="\n" if last else "", flush=True)


def read_run(folder, given):
    """(config, checkpoint or None) of a run to go on with; given settings must agree with it."""
    require((folder / "config.json").is_file(), f"--resume {folder}: no config.json there; give "
            "the folder of a run")
    stored = read_json(folder / "config.json")
    odd = [name for name in given if name not in FREE and stored.get(name) != given[name]]
    require(not odd, f"--resume {folder}: the run was begun with other settings for "
            f"{', '.join(odd)}; leave them out, or start a new run")
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return stored, None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        odd = [name for name in stored
               if name not in FREE and checkpoint["config"].get(name) != stored[name]]
    except Exception as error:  # torch.load raises many kinds for a file that is something else
        raise ValueError(f"{path} is not a checkpoint of this run: {first_line(error)}; without "
                         "that file --resume starts over") from None
    require(not odd, f"{path} belongs to another run than its config.json: they differ in "
            f"{', '.join(odd)}")
    return stored, checkpoint
