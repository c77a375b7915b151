"""Train LoDisc (or MoCo v3) and judge what was learnt.

    python train.py                            the embedded birds, a few minutes on a CPU
    python train.py --data DIR                 a folder of pictures, see data/README.md

A run writes config.json, metrics.csv and checkpoint.pt into its folder; eval.py reads them.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: idle threads do not spin

import torch
from torch.utils.data import DataLoader

from data.augment import EpochOrder, TwoViews, mix_seed
from data.datasets import NAMES, load_data
from eval import RawPixels, evaluate, merge_json, one_line, table
from lodisc import (ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, IMPORTANCES, LOCAL_INPUTS, MASKS,
                    METHODS, LoDisc, create_vit, momentum_schedule, require)

# What stands where the command line leaves it open: for the birds, for a folder on a CPU (where
# the epochs are those that show the encoder CPU_IMAGES pictures), for a folder on a GPU.
RECIPES = {
    "synthetic": dict(arch="vit_nano", image_size=48, patch_size=8, epochs=10, warmup_epochs=1,
                      batch_size=128, lr=4e-3, momentum=0.9),
    "cpu": dict(arch="vit_nano", image_size=48, patch_size=8, epochs=None, warmup_epochs=2,
                batch_size=64, lr=4e-3, momentum=0.9),
    "gpu": dict(arch="vit_small", image_size=224, patch_size=16, epochs=100, warmup_epochs=10,
                batch_size=256, lr=1e-3, momentum=0.99),
}
CPU_IMAGES = 50_000
NEW_RUN = "runs/<data>-<method>-<n>"
COLUMNS = ("epoch", "step", "total", "global_loss", "local_loss", "lr", "momentum",
           "images_per_second", "seconds")


# --- settings ---------------------------------------------------------------------------------


def parse_args(argv=None):
    """(settings given on the command line, defaults of all settings)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog="Recipes for a laptop and for the paper: README.md")
    defaults = {}

    def add(flag, default, text, authors=None, **options):
        shown = "by data and device" if default is None else default
        authors = f"; authors: {authors}" if authors else ""
        parser.add_argument(flag, default=argparse.SUPPRESS,
                            help=f"{text} (default: {shown}{authors})", **options)
        defaults[flag[2:].replace("-", "_")] = default

    add("--data", "synthetic", f"{', '.join(NAMES)}, or a folder of pictures", type=data_name)
    add("--data-root", "datasets", "where the named data sets lie", type=whole_path)
    add("--download", False, "fetch a named data set whose source still answers",
        action="store_true")
    add("--method", "lodisc", "both losses, MoCo v3 alone or the local loss alone",
        choices=METHODS)
    add("--mask", "location", "which patches stay; all but the first are ablations",
        choices=MASKS)
    add("--importance", "product", "how the layers' attention becomes importance", "product",
        choices=list(IMPORTANCES))
    add("--local-input", "pixels", "other patches zeroed, or left out", "pixels",
        choices=LOCAL_INPUTS)
    add("--keep-ratio", 0.3, "share of patches that stay", "0.3", type=float)
    add("--arch", None, "encoder", "vit_base", choices=list(ARCHITECTURES))
    add("--image-size", None, "pixels a side", 224, type=int)
    add("--patch-size", None, "pixels a side", 16, type=int)
    add("--epochs", None, "passes over the pictures", 100, type=int)
    add("--warmup-epochs", None, "of linearly rising learning rate", 0, type=int)
    add("--batch-size", None, "images a step", 32, type=int)
    add("--lr", None, "learning rate per 256 images", "1e-3 in an older README", type=float)
    add("--weight-decay", 0.1, "AdamW's; MoCo v3: 0.1", 0.5, type=float)
    add("--temperature", 0.2, "of the contrastive softmax", 0.2, type=float)
    add("--momentum", None, "of the moving average at the start; 1 at the end", 0.99, type=float)
    add("--crop-min", 0.08, "smallest share of a picture's area in a view", 0.08, type=float)
    add("--seed", 0, "of weights, order, augmentation and random masks", type=int)
    add("--workers", 2, "processes that load pictures; 0: none", type=int)
    add("--device", "auto", "cuda, mps, cpu; auto: the first there is", "cuda")
    add("--amp", "auto", "mixed precision; auto: bf16 or else fp16 on CUDA, off elsewhere",
        choices=["auto", "bf16", "fp16", "off"])
    add("--out", NEW_RUN, "the run's folder, a new one")
    add("--resume", "none", "go on with the run in this folder, by its settings")
    return vars(parser.parse_args(argv)), defaults


def data_name(text):
    """A data set's name, or a folder's whole path, so that eval.py finds it from anywhere."""
    return text if text in NAMES else whole_path(text)


def whole_path(text):
    return str(Path(text).resolve())


def pick_device(name):
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def pick_precision(amp, device):
    """The autocast dtype, or None for float32."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return (torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16)
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def settle(settings, device, num_images):
    """Fill in what the command line left open, and say what was chosen for a folder; check."""
    settings["mean"], settings["std"] = list(IMAGENET_MEAN), list(IMAGENET_STD)
    on_birds = settings["data"] == "synthetic"
    recipe = dict(RECIPES["synthetic" if on_birds else "gpu" if device.type == "cuda" else "cpu"])
    if recipe["epochs"] is None:
        recipe["epochs"] = max(1, min(200, round(CPU_IMAGES / num_images)))
    recipe["batch_size"] = min(recipe["batch_size"], num_images)
    chosen = {name: value for name, value in recipe.items() if settings[name] is None}
    settings.update(chosen)
    settings["warmup_epochs"] = min(settings["warmup_epochs"], settings["epochs"])
    if chosen and not on_birds:
        print("chosen: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    for name, least in (("epochs", 1), ("warmup_epochs", 0), ("batch_size", 2), ("lr", 0),
                        ("weight_decay", 0), ("seed", 0), ("workers", 0)):
        require(settings[name] >= least, f"--{name.replace('_', '-')} must be {least} or more, "
                f"got {settings[name]}")
    for name in ("momentum", "crop_min"):
        require(0 <= settings[name] <= 1, f"--{name.replace('_', '-')} must be in [0, 1], "
                f"got {settings[name]}")
    require(settings["batch_size"] <= num_images, f"--batch-size {settings['batch_size']} is more "
            f"than the {num_images} training pictures; give a smaller one")


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


# --- what a run leaves behind -----------------------------------------------------------------


def save_checkpoint(path, **contents):
    """Write beside the old checkpoint and then swap, so that one whole file is always there."""
    part = path.with_suffix(".tmp")
    try:
        torch.save(contents, part)
        os.replace(part, path)
    except (RuntimeError, OSError) as error:  # torch's word for a full disk is a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, is the disk full? "
                      f"{str(error).splitlines()[0]}") from None


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

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def outlive_the_step(worker):
    """A terminal's Ctrl-C, or a queue's SIGTERM, goes to the loading processes too; were they gone
    at once, the parent would fail within the step that it wants to finish.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))  # seconds; then it ends


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
    stored = json.loads((folder / "config.json").read_text())
    free = ("resume", "download", "device", "workers")
    odd = [name for name in given if name not in free and stored.get(name) != given[name]]
    require(not odd, f"--resume {folder}: the run was begun with other settings for "
            f"{', '.join(odd)}; leave them out, or start a new run")
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return stored, None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        odd = [name for name in stored
               if name not in free and checkpoint["config"].get(name) != stored[name]]
    except Exception as error:  # torch.load raises many kinds for a file that is something else
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of this run: {reason}; without that file "
                         "--resume starts over") from None
    require(not odd, f"{path} belongs to another run than its config.json: they differ in "
            f"{', '.join(odd)}")
    return stored, checkpoint


# --- the run ----------------------------------------------------------------------------------


def build_model(settings):
    """The untrained model; a function of the settings alone."""
    torch.manual_seed(settings["seed"])
    encoder = create_vit(settings["arch"], settings["image_size"], settings["patch_size"])
    nano = settings["arch"] == "vit_nano"
    return LoDisc(encoder, settings["method"], settings["mask"], settings["importance"],
                  settings["local_input"], settings["keep_ratio"], settings["temperature"],
                  hidden_dim=512 if nano else 4096, output_dim=128 if nano else 256)


def learning_rate(step, warmup, total, peak):
    """Linear rise over the warm-up steps, then half a cosine down to 0 (MoCo v3)."""
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def train(model, settings, data, folder, device, stop, checkpoint=None):
    """The training loop; changes model in place. Whether it came to its end, or was stopped."""
    model.to(device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad),
                                  lr=settings["lr"], weight_decay=settings["weight_decay"],
                                  fused=True)
    precision = pick_precision(settings["amp"], device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    order = EpochOrder(len(data.train), settings["seed"])
    crop = settings["image_size"], settings["mean"], settings["std"]
    views = TwoViews(data.train, *crop, settings["seed"], settings["crop_min"])
    loader = DataLoader(views, settings["batch_size"], sampler=order, drop_last=True,
                        num_workers=settings["workers"], pin_memory=device.type == "cuda",
                        persistent_workers=settings["workers"] > 0,
                        worker_init_fn=outlive_the_step)
    steps, epochs = len(loader), settings["epochs"]
    total, warmup = steps * epochs, steps * settings["warmup_epochs"]
    peak = settings["lr"] * settings["batch_size"] / 256
    generator = torch.Generator()  # of the random and block masks
    step, history, losses = 0, [], torch.zeros(3, device=device)  # losses: summed over an epoch
    if checkpoint:  # every random draw is seeded by its step or sample: no generator to restore
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step, history = checkpoint["step"], checkpoint["history"]
        losses += checkpoint["losses"].to(device)
        write_metrics(folder / "metrics.csv", history)  # cut back to the checkpoint

    progress = Progress(epochs, steps, settings["batch_size"], step)
    unlearnt = 4 * settings["temperature"] * math.log(settings["batch_size"])
    print(f"a branch that has learnt nothing loses {unlearnt:.3f}; from there the loss should fall")
    model.train()
    while step < total:
        epoch = step // steps
        order.epoch, order.first = epoch, step % steps * settings["batch_size"]
        begun, started = step, time.monotonic()
        for view1, view2 in loader:
            lr = learning_rate(step, warmup, total, peak)
            momentum = momentum_schedule(step, total, settings["momentum"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            generator.manual_seed(mix_seed(settings["seed"], step))

            view1 = view1.to(device, non_blocking=True)
            view2 = view2.to(device, non_blocking=True)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                output = model(view1, view2, generator)
            optimizer.zero_grad()
            scaler.scale(output.total).backward()
            scaler.step(optimizer)
            scaler.update()
            model.update_momentum(momentum)

            losses += torch.stack(output[:3]).detach()
            step += 1
            progress(epoch, step, lambda: (losses[1:] / (step - epoch * steps)).tolist(), lr,
                     momentum)
            if stop.asked:
                break

        require(bool(losses.isfinite().all()), f"the loss is not finite by step {step}, learning "
                f"rate {lr:.1e}: try a lower --lr or a longer --warmup-epochs; the checkpoint in "
                f"{folder}, if any, is from before")
        if step % steps == 0:
            seconds = time.monotonic() - started
            history.append(dict(zip(COLUMNS, (
                epoch + 1, step, *(losses / steps).tolist(), lr, momentum,
                (step - begun) * settings["batch_size"] / seconds, seconds))))
            write_metrics(folder / "metrics.csv", history)
            losses.zero_()
        save_checkpoint(folder / "checkpoint.pt", config=settings, model=model.state_dict(),
                        optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
                        history=history, losses=losses)
        if stop.asked:
            return False
    return True


def judge(settings, data, model, folder, device):
    """Raw pixels, the untrained and the trained encoder, evaluated the same way, side by side."""
    if data.test is None:
        return print(f"not evaluated: {data.note}")
    crop = settings["image_size"], settings["mean"], settings["std"]
    encoders = {"raw pixels": RawPixels(), "untrained": build_model(settings).encoder,
                "trained": model.encoder}
    rows = {name: evaluate(encoder, data, crop, "all", "cpu" if name == "raw pixels" else device,
                           settings["workers"], settings["seed"])
            for name, encoder in encoders.items()}
    merge_json(folder / "eval.json", {**rows["trained"], "untrained": rows["untrained"],
                                      "pixels": rows["raw pixels"]})
    print(table(rows))


def main(argv=None):
    given, defaults = parse_args(argv)
    settings = {**defaults, **given}
    resume, out = settings.pop("resume"), settings.pop("out")
    settings["data_root"], download = whole_path(settings["data_root"]), settings.pop("download")
    folder, checkpoint = None, None
    if resume != "none":
        folder = Path(resume)
        stored, checkpoint = read_run(folder, given)
        settings = {**settings, **stored,
                    **{name: given[name] for name in ("device", "workers") if name in given}}
    data = load_data(settings["data"], settings["data_root"], download)
    device = pick_device(settings["device"])
    settle(settings, device, len(data.train))
    model = build_model(settings)
    if folder is None:
        folder = new_folder(out, settings)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{settings['method']} on {len(data.train)} pictures of {settings['data']}, "
          f"{settings['arch']} at {settings['image_size']} px, on {device}, into {folder}")
    try:
        with Stop() as stop:
            finished = train(model, settings, data, folder, device, stop, checkpoint)
    except RuntimeError as error:  # torch has a class for a GPU's memory, none for a CPU's
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"out of memory at --batch-size {settings['batch_size']} and --image-size "
                         f"{settings['image_size']}: give a smaller one") from None
    if not finished:
        sys.exit(f"\nstopped and saved; go on with: python train.py --resume {folder}")
    judge(settings, data, model, folder, device)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:  # for people: one line, no traceback
        print(f"train.py: {one_line(error)}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(2)  # not sys.exit, which waits for the loading processes; they follow by themselves
