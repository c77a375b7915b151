"""Train LoDisc, MoCo v3 (--method global) or a method of your own, and evaluate the encoder.

    python train.py                              the drawn birds, a few minutes on a CPU
    python train.py --data DIR                   a folder of images, see data/README.md
    python train.py --data DIR --init WEIGHTS    adapt a published encoder to it
    torchrun --nproc_per_node=8 train.py ...     one process per GPU
"""

import argparse
import ast
import csv
import gc
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: idle threads do not spin

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import v2

import data.augment as augment
from data.datasets import (NAMES, data_name, default_workers, fitting_workers, load_data,
                           naming_dead_workers)
from data.draw import example_indices, run_sheet
from eval import (MAIN_METRICS, build_model, compared_encoders, evaluate, exit_with_line,
                  pick_device, recipe_image_size, save_picture, save_rows, table, write_text,
                  write_whole)
from lodisc import (ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, IMPORTANCES, LOCAL_INPUTS, MASKS,
                    METHODS, UserError, load_encoder, momentum_schedule, read_weights, require)

# Defaults; "images": to see in all, in so many epochs at least. Unlike MoCo v3's (lr 1.5e-4 per 256
# images, EMA from 0.99, 40 of 300 epochs of warm-up), they are for short runs of small batches. As
# in MoCo v3, unlike DINO, weight decay applies to biases and norms too.
NANO = dict(arch="vit_nano", image_size=48, patch_size=8, lr=4e-3, momentum=0.9, crop_min=0.08)
RECIPES = {
    "birds": dict(NANO, epochs=10, warmup_epochs=1, batch_size=128),
    "scratch, CPU": dict(NANO, images=(50_000, 1), warmup_epochs=2, batch_size=64),
    "scratch, GPU": dict(arch="vit_small", image_size=224, patch_size=16, lr=1e-3, momentum=0.99,
                         crop_min=0.08, epochs=100, warmup_epochs=10, batch_size=256),
    "init": dict(encoder_lr=2e-5, momentum=0.9, crop_min=0.08, images=(6_500, 3), batch_size=64,
                 lr=4e-3),  # warm-up: a sixth of all steps
}
META = "https://dl.fbaipublicfiles.com/"
WEIGHTS = {  # name for --init: the publisher's address
    "dino": META + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",  # ViT-S/16
    "dinov2": META + "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",  # ViT-S/14
    "imagenet": ViT_B_16_Weights.IMAGENET1K_V1.url,  # ViT-B/16, trained with labels
}
MOVABLE = ("data", "data_root", "device", "workers", "init")  # settings that --resume may change
BF16_WIDTH = 192  # on a CPU, bfloat16 pays from this encoder width on (tests/RESULTS.md)
NEW_RUN = "runs/<data>-<method>-<n>"


def parse_args(argv=None):
    """Return (settings given on the command line, defaults of all settings)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="See README.md")
    defaults = {}

    def add(name, default, kind, text, authors=None):
        options = {"type": kind} if callable(kind) else {"choices": list(kind)}
        if kind in (bool, list):
            options = {"action": "store_true" if kind is bool else "append"}
        shown = "by data, device and --init" if default is None else default
        authors = f"; authors: {authors}" if authors else ""
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{text} (default: {shown}{authors})", **options)
        defaults[name] = default

    add("data", "synthetic", data_name, f"{', '.join(NAMES)}, or a folder of images")
    add("data_root", absolute("datasets"), absolute, "folder of the named data sets")
    add("download", False, bool, "fetch a named data set that has a source")
    add("held_out", False, bool, "evaluate on a fifth of the training images, held out from them")
    add("method", "lodisc", absolute, f"{', '.join(METHODS)} (MoCo v3: global), or FILE.py:CLASS")
    add("method_option", [], list, "NAME=VALUE for CLASS, repeatable")
    add("mask", "location", MASKS, "which patches the local branch sees")
    add("importance", "product", IMPORTANCES, "of a patch, from all layers' attention", "product")
    add("local_input", "pixels", LOCAL_INPUTS, "other patches set to zero, or dropped", "pixels")
    add("keep_ratio", 0.3, float, "fraction of patches kept", 0.3)
    add("arch", None, ARCHITECTURES, "encoder", "vit_base")
    add("image_size", None, int, "pixels per side", 224)
    add("patch_size", None, int, "pixels per side", 16)
    add("init", "none", absolute, f"weights file, or {', '.join(WEIGHTS)} (untested)", "imagenet")
    add("init_momentum", False, bool, "take the file's momentum (or teacher's) encoder")
    add("epochs", None, int, "passes over the images", 100)
    add("warmup_epochs", None, float, "of linearly rising learning rate", 0)
    add("batch_size", None, int, "images per step, over all processes", 32)
    add("lr", None, float, "peak learning rate per 256 images", "1e-3 in an older README")
    add("encoder_lr", None, float, "the encoder's peak at any batch size; from scratch the heads'")
    add("weight_decay", 0.1, float, "AdamW's; MoCo v3: 0.1", 0.5)
    add("temperature", 0.2, float, "of the contrastive softmax", 0.2)
    add("momentum", None, float, "of the moving average at the start; 1 at the end", 0.99)
    add("crop_min", None, float, "smallest fraction of an image's area in a view", 0.08)
    add("seed", 0, int, "of weights, order, augmentation and random masks")
    add("workers", default_workers(), int, "loading processes of each rank; 0: none")
    add("device", "auto", str, "cuda, mps or cpu; auto: the accelerator, if any", "cuda")
    add("amp", "auto", ("auto", "bf16", "fp16", "off"), "auto: bf16 (or fp16) on CUDA, and bf16 on "
        "CPUs that have it in hardware, except for vit_nano")
    add("compile", False, bool, "torch.compile for the encoders")
    add("out", NEW_RUN, str, "the run's folder, a new one")
    add("resume", "none", str, "continue the run in this folder, with its settings")
    return vars(parser.parse_args(argv)), defaults


def absolute(text):
    """Make the path of a folder, FILE or FILE.py:CLASS absolute; leave names unchanged."""
    return text if text in ("none", *METHODS, *WEIGHTS) else str(Path(text).resolve())


def method_options(texts):
    """["name=value", ...] -> {name: value}, Python literals or else text."""
    options = dict(text.partition("=")[::2] for text in texts)
    for name, value in options.items():
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    return options


def weights_file(name):
    """Return the path of --init; a name in WEIGHTS is fetched once."""
    if name not in WEIGHTS:
        return name
    path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS[name].split("/")[-1])
    try:  # the hash in a file's name, if any, is checked
        torch.hub.load_state_dict_from_url(WEIGHTS[name], map_location="cpu", weights_only=True,
                                           check_hash="-" in path.name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not fetch {WEIGHTS[name]} ({error}); download it and give the "
                        "file's path to --init") from None
    return str(path)


def fill_defaults(config, device, num_images, processes=1):
    """Fill in what the command line left open, in place, and print what was chosen."""
    config["method_options"] = method_options(config.pop("method_option"))
    config["num_images"] = num_images
    init, place = config["init"] != "none", "GPU" if device.type == "cuda" else "CPU"
    kind = ("init" if init else "birds" if config["data"] == "synthetic" else f"scratch, {place}")
    recipe = dict(RECIPES[kind])
    config["mean"], config["std"] = list(IMAGENET_MEAN), list(IMAGENET_STD)
    if init:
        config["init"] = weights_file(config["init"])
        encoder = load_encoder(config["init"], config["init_momentum"])
        print(f"weights of {encoder.source}")
        sizes = dict(dim=encoder.dim, depth=len(encoder.blocks), heads=encoder.blocks[0].attn.heads)
        arch = next((name for name, known in ARCHITECTURES.items() if known == sizes), "unnamed")
        for name, found in (("arch", arch), ("patch_size", encoder.patch_size)):
            require(config[name] in (None, found), f"--{name.replace('_', '-')} {config[name]} "
                    f"disagrees with --init {config['init']}, which has {found}", UserError)
            recipe[name] = found
        recipe["image_size"] = recipe_image_size(encoder.patch_size, device)
        if getattr(encoder, "config", None):  # of a run or its export: its own size
            recipe["image_size"] = encoder.image_size
        config.update(sizes, mean=list(encoder.mean), std=list(encoder.std))
    images, least = recipe.pop("images", (0, 1))
    recipe.setdefault("epochs", max(least, min(200, round(images / num_images))))
    per_process = max(1, min(recipe["batch_size"], num_images) // processes)
    batch_size = config["batch_size"] or per_process * processes
    recipe["lr"] *= min(1, recipe["batch_size"] / batch_size)  # no peak above the recipe's
    recipe["batch_size"] = batch_size
    sixth = round((config["epochs"] or recipe["epochs"]) / 6, 2)  # of a short run no more
    recipe["warmup_epochs"] = min(recipe.get("warmup_epochs", sixth), sixth)
    chosen = {name: value for name, value in recipe.items() if config[name] is None}
    config.update(chosen)
    if config["encoder_lr"] is None:
        config["encoder_lr"] = config["lr"] * batch_size / 256
    if not init:
        config.update(ARCHITECTURES[config["arch"]])  # dim, depth, heads
    config["warmup_epochs"] = min(config["warmup_epochs"], config["epochs"])
    config["hidden_dim"], config["output_dim"] = ((512, 128) if config["arch"] == "vit_nano" else
                                                  (4096, 256))
    if chosen and kind != "birds":
        print(f"chosen ({kind}): " + ", ".join(f"{name} {value}" for name, value in chosen.items()))


def check_settings(config, processes):
    """Raise UserError for a setting outside its range."""
    least = dict(epochs=1, image_size=1, patch_size=1, batch_size=2 * processes, lr=0, encoder_lr=0,
                 warmup_epochs=0, weight_decay=0, seed=0, workers=0, momentum=0, crop_min=0,
                 temperature=1e-6, keep_ratio=1e-6)
    most = dict(momentum=1, crop_min=1, keep_ratio=1, batch_size=config["num_images"],
                seed=2**32 - 1)
    steps = dict(image_size=config["patch_size"], batch_size=processes)
    for name, low in least.items():
        value, high, step = config[name], most.get(name, math.inf), steps.get(name)
        require(low <= value <= high and not (step and value % step),
                f"--{name.replace('_', '-')} must be in [{low}, {high}]"
                + f" and a multiple of {step}" * ((step or 1) > 1) + f", got {value}", UserError)
    require(config["method"] not in METHODS or not config["method_options"],
            f"--method-option is for FILE.py:CLASS, not --method {config['method']}", UserError)


def pick_precision(amp, device, width):
    """Return the autocast dtype, or None for float32; width: the encoder's."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" and width >= BF16_WIDTH else {}
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else None


def new_folder(out, config):
    """Make the run's folder, which must not exist; of two runs at once, each gets its own."""
    stem = f"{Path(config['data']).name}-{config['method'].split(':')[-1]}"
    candidates = [Path(out)] if out != NEW_RUN else (Path("runs", f"{stem}-{n}")
                                                     for n in itertools.count(1))
    for folder in candidates:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror}; give another") from None
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue  # another run's: the next number
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror}; give another") from None
    raise UserError(f"--out {folder}: File exists; give another, or --resume it")


def save_checkpoint(folder, **contents):
    """Write metrics.csv and config.json, which are for people, then replace the checkpoint
    atomically, so that a complete one always exists."""
    history, text = contents["history"], io.StringIO(newline="")
    csv.writer(text).writerows(history[:1] + [row.values() for row in history])
    write_text(folder / "metrics.csv", text.getvalue())
    write_text(folder / "config.json", json.dumps(contents["config"], indent=2) + "\n")
    write_whole(folder / "checkpoint.pt", lambda file: torch.save(contents, file))


def remove_parts(folder):
    """Remove what a run that was killed while writing has left beside its files."""
    for name in ("checkpoint.pt", "metrics.csv", "config.json", "run.png"):
        for part in folder.glob(f".{name}.*"):
            part.unlink()


def read_run(folder, given):
    """Return a run's checkpoint; the given settings must equal its own or be in MOVABLE."""
    checkpoint, given = read_weights(folder), dict(given)
    config = checkpoint.get("config", {})
    require("num_images" in config, f"--resume {folder}: not a run's checkpoint", UserError)
    if "method_option" in given:
        given["method_options"] = method_options(given.pop("method_option"))
    same_class = given.get("method", "").split(":")[-1] == config["method"].split(":")[-1]
    movable = (*MOVABLE, "method") if same_class else MOVABLE
    odd = [name for name in given if name not in (*movable, "resume", "download")
           and config.get(name) != given[name]]
    require(not odd, f"--resume {folder}: the run has other settings for {', '.join(odd)}; leave "
            "them out, or start a new run", UserError)
    if "init" in given:
        require("none" not in (given["init"], config["init"]) or given["init"] == config["init"],
                f"--resume {folder}: the run has --init {config['init']}", UserError)
        given["init"] = weights_file(given["init"])
    config.update({name: given[name] for name in movable if name in given})
    return checkpoint


class Log:
    """Mean losses of an epoch, printed at its end and every half minute."""

    def __init__(self, epoch, epochs, steps, batch_size):
        self.epoch, self.epochs, self.steps, self.batch_size = epoch, epochs, steps, batch_size
        self.sums = self.done = self.skipped = 0
        self.begun = self.shown = time.monotonic()

    def add(self, output, skipped, lr, m):
        """Count a step's losses, unless the fp16 scaler skipped it."""
        self.names = [name for name in output._fields if name != "masks"]
        losses = torch.stack([torch.as_tensor(getattr(output, name)).detach().to(output.total)
                              for name in self.names])
        self.sums = self.sums + (torch.zeros_like(losses) if skipped else losses)
        self.done, self.skipped, self.lr, self.m = self.done + 1, self.skipped + skipped, lr, m
        if self.done == self.steps or time.monotonic() - self.shown > 30:
            self.shown, row = time.monotonic(), self.row()  # waits for the device
            left = row["seconds"] * (self.steps / self.done * (self.epochs - self.epoch) - 1)
            values = "  ".join(f"{name} {row[name]:.4g}" for name in list(row)[1:-1])
            print(f"epoch {self.epoch + 1}/{self.epochs}  {values}  {left / 60:.1f} min left",
                  flush=True)

    def row(self):
        """Return the row of metrics.csv, so far."""
        means = (self.sums / max(1, self.done - self.skipped)).tolist()
        seconds = time.monotonic() - self.begun
        return {"epoch": self.epoch + 1, "step": self.epoch * self.steps + self.done,
                **dict(zip(self.names, means)), "lr": self.lr, "momentum": self.m,
                "images_per_second": self.done * self.batch_size / seconds, "seconds": seconds}

    def end_epoch(self, model):
        """Return the epoch's row, over all processes; raise UserError if training diverged."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            self.sums /= dist.get_world_size()
        row = self.row()
        require(self.skipped < self.steps, f"float16 overflowed in every step of epoch "
                f"{row['epoch']}, so that none changed a weight: give --amp bf16 or off", UserError)
        for what, tensors in (("loss", [self.sums]), ("model", model.state_dict().values())):
            require(all(bool(tensor.isfinite().all()) for tensor in tensors), f"the {what} is not "
                    f"finite after step {row['step']}, learning rate {self.lr:.1e}: lower --lr or "
                    f"--encoder-lr; the last good epoch is {self.epoch}", UserError)
        if self.skipped:
            print(f"the fp16 scaler skipped {self.skipped} of {self.steps} steps")
        return row


def build_optimizer(model, config):
    """AdamW with two groups, heads and encoder, each with its peak learning rate."""
    peaks = config["lr"] * config["batch_size"] / 256, config["encoder_lr"]
    groups = [{"params": [parameter for name, parameter in model.named_parameters() if
                          parameter.requires_grad and name.startswith("encoder.") == inside],
               "peak": peak} for inside, peak in enumerate(peaks)]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=config["weight_decay"], fused=True)


def learning_rate(step, warmup, total, peak):
    """Linear rise over the warm-up steps, then half a cosine down to 0 (MoCo v3)."""
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def train_step(model, parallel, optimizer, scaler, precision, views, generator, progress, m):
    """One step of the algorithm -> (the method's output, whether the fp16 scaler skipped it).

    The momentum side moves after the optimiser's step, in MoCo v3's code before its forward."""
    with torch.autocast(views[0].device.type, precision, enabled=precision is not None):
        output = parallel(*views, generator, progress)
    optimizer.zero_grad()
    scale = scaler.get_scale()
    scaler.scale(output.total).backward()
    scaler.step(optimizer)
    scaler.update()
    model.update_momentum(m)
    return output, scaler.get_scale() < scale


@torch.no_grad()
def shown_masks(model, examples, epoch):
    """Return [(epoch, the method's masks of example images (n, N))], or [] if it has none."""
    with torch.compiler.set_stance("force_eager"):  # compiling again for these few does not pay
        masks = model.masks(examples)
    return [] if masks is None else [(epoch, masks.cpu())]


def train(model, config, data, folder, device, checkpoint=None, rank=0, processes=1):
    """Train the model on the device; return the history, a row per epoch, and the film of masks."""
    model.to(device)
    if processes > 1 and device.type == "cuda":  # on a CPU each rank has its own statistics
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its BatchNorms, in place
    parallel = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    optimizer = build_optimizer(model, config)
    precision = pick_precision(config["amp"], device, model.encoder.dim)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    print(f"precision: {precision or torch.float32}".replace("torch.", ""))
    if config["compile"]:  # the expensive passes
        model.encoder.compile(), model.momentum_encoder.compile()

    crop, seed = (config["image_size"], config["mean"], config["std"]), config["seed"]
    views = augment.TwoViews(data.train, *crop, seed, config["crop_min"])
    # batches have the same images for any number of processes; each rank takes its part
    batches = augment.Batches(len(data.train), config["batch_size"], seed, rank, processes)
    generator = torch.Generator()  # of the random and block masks, seeded at each step
    workers = fitting_workers(config["workers"], batches.per_rank * 2 * 3 * crop[0]**2 * 4)
    loader = DataLoader(views, batch_sampler=batches, num_workers=workers,
                        generator=torch.Generator(),  # so that it does not draw from torch's
                        pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    epochs, steps = config["epochs"], len(batches)
    total, warmup = epochs * steps, round(steps * config["warmup_epochs"])
    step, history, film = 0, [], []
    if rank == 0:
        plain = augment.Plain(data.train, *crop)
        examples = [plain[i][0] for i in example_indices(data.train.targets)]
        examples = torch.stack(examples).to(device)
        film = shown_masks(model, examples, 0)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if checkpoint:
        step, history, film = (checkpoint[name] for name in ("step", "history", "film"))
        for name in parts:
            if checkpoint[name]:  # the scaler's is empty if the run had none
                parts[name].load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"])  # unused here, for forks

    def save():
        states = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(folder, config=config, step=step, history=history, film=film,
                        random=torch.get_rng_state(), **states)

    if rank == 0:
        try:
            remove_parts(folder)
            save()
        except (UserError, OSError):
            if step < total:  # a finished run can be evaluated where it is read-only
                raise
    model.train()
    for epoch in range(step // steps, epochs):
        batches.epoch, log = epoch, Log(epoch, epochs, steps, config["batch_size"])
        with naming_dead_workers():
            for view1, view2 in loader:
                m = momentum_schedule(step, total, config["momentum"])
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, warmup, total, group["peak"])
                generator.manual_seed(augment.mix_seed(augment.MASKS, seed, step, rank))
                views = [view.to(device, non_blocking=True) for view in (view1, view2)]
                output, skipped = train_step(model, parallel, optimizer, scaler, precision, views,
                                             generator, step / total, m)
                step += 1
                log.add(output, skipped, optimizer.param_groups[0]["lr"], m)
        try:
            history.append(log.end_epoch(model))
        except UserError:
            if rank > 0:  # all ranks have the same losses and weights: rank 0 says it
                raise SystemExit(2) from None
            raise
        if rank == 0:
            film += shown_masks(model, examples, epoch + 1)
            save()
    return history, film


def evaluate_run(config, data, folder, device):
    """Evaluate raw pixels and the encoder before and after training alike, and print the table."""
    print("evaluating raw pixels and the encoder before and after training; to repeat it: "
          f"python train.py --resume {shlex.quote(str(folder))}")
    rows = evaluate(compared_encoders(config, load_encoder(folder)), data,
                    [config[name] for name in ("image_size", "mean", "std")], "all", device,
                    config["workers"])
    print(table(rows))
    save_rows(folder, rows)
    return rows


def draw_run(config, levels, history, film, rows, dataset, folder):
    """Write run.png; levels {loss: chance level}; rows: evaluate_run's, or {}."""
    metrics = {row: {name: results[part][key] for name, (part, key) in MAIN_METRICS.items()
                     if part in results} for row, results in rows.items()}
    crop = v2.Compose(augment.plain_crop(config["image_size"]))
    images = [crop(dataset[i][0]) for i in example_indices(dataset.targets)]
    path = folder / "run.png"
    try:
        save_picture(run_sheet(history, levels, metrics, images, film), path)
        print(f"wrote {path}")
    except UserError as error:
        print(f"not stored: {error}")


def start_processes():
    """Join torchrun's process group, if any -> (rank, number of processes)."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def parse_args_once(argv):
    """parse_args, whose complaints only rank 0 prints."""
    first = not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"
    with redirect_stderr(sys.stderr if first else io.StringIO()):
        return parse_args(argv)


def rank_0_first(work, rank, processes):
    """Return work() of every process, of rank 0 first: the others wait for as long as it takes, as
    it may download. If rank 0 raises UserError, the others end silently, with status 2."""
    if processes == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    failed, mistake, result = torch.zeros(1), None, None
    if rank == 0:
        try:
            result = work()
        except UserError as error:
            failed, mistake = torch.ones(1), error
    dist.broadcast(failed, 0, group=group)
    dist.destroy_process_group(group)
    if mistake:
        raise mistake
    if failed:
        raise SystemExit(2)
    return result if rank == 0 else work()


def has_epoch(folder):
    """Whether a run's metrics.csv has a row, so that an epoch has been stored."""
    metrics = folder / "metrics.csv"
    return metrics.exists() and metrics.stat().st_size > 0


class Run:
    """One call of this script: what its arguments mean, and the folder that it makes."""

    def __init__(self, argv):
        self.given, defaults = parse_args_once(argv)
        self.config = {**defaults, **self.given}
        self.resume, self.out, self.download = (
            self.config.pop(name) for name in ("resume", "out", "download"))
        self.rank, self.processes = 0, 1
        self.checkpoint = self.folder = None
        self.made = False  # whether this call has made the folder

    def prepare(self):
        """Read the checkpoint, or fill in the defaults; load the data and build the model."""
        if self.resume != "none":
            folder = Path(self.resume)
            folder = folder.parent if folder.name == "checkpoint.pt" else folder
            require(folder.suffix != ".pt", f"--resume {folder}: expected a run's folder",
                    UserError)
            self.folder, self.checkpoint = folder, read_run(folder, self.given)
            self.config = self.checkpoint["config"]
        config = self.config
        self.device = pick_device(config["device"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.data = load_data(config["data"], config["data_root"], self.download,
                              config["held_out"])
        num_images = len(self.data.train)
        if not self.checkpoint:
            fill_defaults(config, self.device, num_images, self.processes)
        require(config["num_images"] == num_images > 1, f"--data {config['data']}: expected "
                f"{max(2, config['num_images'])} training images, got {num_images}", UserError)
        check_settings(config, self.processes)
        self.model = build_model(config, fresh=not self.checkpoint)
        if self.rank == 0 and not self.checkpoint:
            self.folder, self.made = new_folder(self.out, config), True

    def announce(self):
        """Print what is about to be trained, and return the losses' chance levels."""
        print("{method} on {num_images} images of {data}, {arch} at {image_size} px,".format(
            **self.config), f"on {self.device} x {self.processes}, into {self.folder}")
        if self.data.test is None:
            print(f"will not be evaluated: {self.data.note}")
        levels = getattr(self.model, "chance_levels", lambda batch: {})(self.config["batch_size"])
        print("chance level: " + ", ".join(f"{name} {level:.3f}" for name, level in levels.items()))
        return levels

    def clean_up(self):
        """Remove the folder, if this call has made it and no epoch is stored there."""
        if self.made and not has_epoch(self.folder):
            shutil.rmtree(self.folder)

    def interrupted(self):
        """Return the error of a Ctrl-C; without a checkpoint nothing is left."""
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            if self.made:
                shutil.rmtree(self.folder)
            return UserError("interrupted before the first checkpoint: nothing is stored")
        return UserError("interrupted; continue with: python train.py --resume "
                         + shlex.quote(str(self.folder)))


def main(argv=None):
    run = Run(argv)
    try:
        run.rank, run.processes = start_processes()
        rank_0_first(run.prepare, run.rank, run.processes)
        levels = run.announce()
        history, film = train(run.model, run.config, run.data, run.folder, run.device,
                              run.checkpoint, run.rank, run.processes)
        if run.processes > 1:
            dist.destroy_process_group()
        if run.rank == 0:
            rows = {}
            if run.data.test:
                rows = evaluate_run(run.config, run.data, run.folder, run.device)
            draw_run(run.config, levels, history, film, rows, run.data.train, run.folder)
    except KeyboardInterrupt:
        if run.rank > 0:
            raise SystemExit(2) from None
        raise run.interrupted() from None
    except UserError:
        run.clean_up()
        raise
    except RuntimeError as error:
        lost = re.search("by peer|Connection reset|Broken pipe", str(error))
        if run.processes == 1 or not lost:
            raise
        run.clean_up()
        raise UserError(f"rank {run.rank} ends, as it lost another process") from None


if __name__ == "__main__":
    gc.freeze()  # collections need not walk the imported modules, here and in loading processes
    try:
        main()
    except UserError as error:
        exit_with_line("train.py", error)
