"""Train LoDisc, MoCo v3 (--method mocov3) or a method of your own, and evaluate the encoder.

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
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: idle threads do not spin

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import data.augment as augment
from data.augment import Preprocessing
from data.datasets import (NAMES, check_headers, data_name, default_workers, fitting_workers,
                           load_data, naming_dead_workers)
from data.draw import example_indices, run_sheet
from eval import (MAIN_METRICS, PLAIN, WEIGHTS, build_model, compared_encoders, current_config,
                  evaluate, exit_with_line, extract, pick_device, read_maps, recipe_image_size,
                  retrieval, save_maps, save_picture, save_results, table, weights_file, write_text,
                  write_whole)
from lodisc import (ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, IMPORTANCES, LOCAL_INPUTS, MASKS,
                    METHODS, NORMALISATIONS, LoDisc, UserError, load_encoder, momentum_schedule,
                    read_weights, require)

# Defaults; images: (total to see, minimum of epochs). Unlike MoCo v3's (lr 1.5e-4 per 256
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
MOVABLE = ("data", "data_root", "device", "workers", "init")  # settings that --resume may change
BF16_WIDTH = 192  # smallest at which bfloat16 is faster on a CPU (tests/experiments/RESULTS.md)
SILENCE = 30  # s that rank 0 has to print an error before the other ranks fail
NEW_RUN = "runs/<data>-<method>-<n>"


# --- the loop ---------------------------------------------------------------------------------


def train(model, config, data, folder, device, checkpoint=None, rank=0, processes=1, maps=None):
    """Train the model on the device; return the history, a row per epoch, and the film of masks.

    maps: of the training images, as in `augment.TwoViews`, or None."""
    model.to(device)
    parallel = distribute(model, device, processes)
    optimizer = build_optimizer(model, config)
    precision = pick_precision(config["amp"], device, model.encoder.dim)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    print("precision:", str(precision or torch.float32).removeprefix("torch."))
    if config["compile"]:
        compile_encoders(model)
    loader, batches = build_loader(config, data.train, device, rank, processes, maps)
    generator = torch.Generator()  # of random masks, seeded at each step
    examples = example_images(config, data.train, device)

    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step, history, film = 0, [], []
    if checkpoint:
        step, history, film = restore(state, checkpoint)
    elif rank == 0:
        film = pivotal_patches(model, examples, epoch=0)

    def save():
        save_checkpoint(folder, config=config, step=step, history=history, film=film,
                        random=torch.get_rng_state(),
                        **{name: part.state_dict() for name, part in state.items()})

    epochs, steps = config["epochs"], len(batches)
    total, warmup = epochs * steps, round(steps * config["warmup_epochs"])
    if rank == 0:
        try:
            remove_parts(folder)
            save()
        except (UserError, OSError):
            if step < total:  # a finished run can be evaluated where it is read-only
                raise
    model.train()
    for epoch in range(step // steps, epochs):
        batches.epoch = epoch
        log = Log(epoch, epochs, steps, config["batch_size"])
        with naming_dead_workers():
            for batch in loader:
                m = momentum_schedule(step, total, config["momentum"])
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, warmup, total, group["peak"])
                mask_seed = augment.mix_seed(augment.MASK_NOISE, config["seed"], step, rank)
                generator.manual_seed(mask_seed)
                view1, view2, *maps_of_views = [part.to(device, non_blocking=True)
                                                for part in batch]
                output, skipped = train_step(model, parallel, optimizer, scaler, precision,
                                             (view1, view2), generator, step / total, m,
                                             maps_of_views)
                step += 1
                log.add(output, skipped, optimizer.param_groups[0]["lr"], m)
        history.append(log.end_epoch(model))
        if config["held_out"]:
            history[-1] |= by_rank_0(lambda: held_out_retrieval(model, config, data.test, device),
                                     rank, processes)
        if rank == 0:
            film += pivotal_patches(model, examples, epoch + 1)
            save()
    return history, film


def train_step(model, parallel, optimizer, scaler, precision, views, generator, progress, m,
               maps=()):
    """Run one training step -> (the method's output, whether the fp16 scaler skipped it).

    maps: of both views, for a method that has them.

    The momentum side moves after the optimiser's step, in MoCo v3's code before its forward."""
    with torch.autocast(views[0].device.type, precision, enabled=precision is not None):
        if maps:
            output = parallel(*views, generator, progress, maps=tuple(maps))
        else:
            output = parallel(*views, generator, progress)
    optimizer.zero_grad()
    scale = scaler.get_scale()
    scaler.scale(output.total).backward()
    scaler.step(optimizer)
    scaler.update()
    model.update_momentum(m)
    return output, scaler.get_scale() < scale


def learning_rate(step, warmup, total, peak):
    """Return the rate: linear warm-up, then half a cosine down to 0 (MoCo v3)."""
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


class Log:
    """Mean losses of an epoch, printed at its end and every half minute."""

    def __init__(self, epoch, epochs, steps, batch_size):
        self.epoch, self.epochs, self.steps, self.batch_size = epoch, epochs, steps, batch_size
        self.sums = self.done = self.skipped = 0
        self.begun = self.shown = time.monotonic()

    def add(self, output, skipped, lr, m):
        """Count a step's losses, unless the fp16 scaler skipped it."""
        self.names = [name for name in output._fields if name != "masks"]
        scalars = [torch.as_tensor(getattr(output, name)) for name in self.names]
        losses = torch.stack([scalar.detach().to(output.total) for scalar in scalars])
        if skipped:
            self.skipped += 1
            losses = torch.zeros_like(losses)
        self.sums = self.sums + losses
        self.done += 1
        self.lr, self.m = lr, m
        if self.done == self.steps or time.monotonic() - self.shown > 30:
            self.print_progress()  # waits for the device

    def print_progress(self):
        self.shown, row = time.monotonic(), self.row()
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
        row, weights = self.row(), model.state_dict().values()
        if self.skipped == self.steps:
            self.stop(f"float16 overflowed in every step of epoch {row['epoch']}, so no weight "
                      "was updated: give --amp bf16 or off")
        for what, tensors in (("loss", [self.sums]), ("model", weights)):
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                self.stop(f"the {what} is not finite after step {row['step']}, learning rate "
                          f"{self.lr:.1e}: lower --lr or --encoder-lr; the last good epoch is "
                          f"{self.epoch}")
        if self.skipped:
            print(f"the fp16 scaler skipped {self.skipped} of {self.steps} steps")
        return row

    @staticmethod
    def stop(reason):
        """End the run. All ranks have the same losses and weights; rank 0 prints the reason."""
        if dist.is_initialized() and dist.get_rank() > 0:
            end_silently()
        raise UserError(reason)


def distribute(model, device, processes):
    """Return the model, wrapped for several processes."""
    if processes == 1:
        return model
    if device.type == "cuda":  # on a CPU each rank has its own statistics
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its BatchNorms, in place
    return torch.nn.parallel.DistributedDataParallel(model)


def compile_encoders(model):
    """Compile the expensive passes, those of both encoders, at their first call."""
    for encoder in (model.encoder, model.momentum_encoder):
        encoder.encode = torch.compile(encoder.encode)


def build_optimizer(model, config):
    """AdamW with two groups, heads and encoder, each with its peak learning rate."""
    heads, encoder = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = encoder if name.startswith("encoder.") else heads
            group.append(parameter)
    groups = [{"params": heads, "peak": config["lr"] * config["batch_size"] / 256},
              {"params": encoder, "peak": config["encoder_lr"]}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=config["weight_decay"], fused=True)


def pick_precision(amp, device, width):
    """Return the autocast dtype, or None for float32; width: the encoder's."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if device.type == "cpu" and width >= BF16_WIDTH:
        has = torch.cpu.get_capabilities()
        if has.get("amx_bf16") or has.get("avx512_bf16"):
            return torch.bfloat16
    return None


def build_loader(config, dataset, device, rank, processes, maps=None):
    """Return the loader of (view 1, view 2), and its batches; set their `epoch` at each epoch.

    With maps, of (view 1, view 2, map 1, map 2)."""
    size, seed = config["image_size"], config["seed"]
    views = augment.TwoViews(dataset, preprocessing_of(config), seed, config["crop_min"], maps)
    # batches have the same images for any number of processes; each rank takes its part
    batches = augment.Batches(len(dataset), config["batch_size"], seed, rank, processes)
    batch_bytes = batches.per_rank * 2 * 3 * size**2 * 4
    if maps is not None:
        batch_bytes += batches.per_rank * 2 * size**2
    workers = fitting_workers(config["workers"], batch_bytes)
    loader = DataLoader(views, batch_sampler=batches, num_workers=workers,
                        generator=torch.Generator(),  # so that it does not draw from torch's
                        pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    return loader, batches


def preprocessing_of(config):
    return Preprocessing(config["image_size"], config["mean"], config["std"])


def example_images(config, dataset, device):
    """Return the images of the film, as for evaluation: (n, 3, H, W)."""
    plain = augment.Plain(dataset, preprocessing_of(config))
    images = [plain[i][0] for i in example_indices(dataset.targets)]
    return torch.stack(images).to(device)


def held_out_retrieval(model, config, dataset, device):
    """Print and return {"rank1": ..., "mAP": ...} among the held-out images by the online encoder,
    {} if no class has two of them."""
    if max(Counter(dataset.targets).values()) < 2:
        return {}
    with torch.compiler.set_stance("force_eager"):
        features = extract({"online": model.encoder}, dataset, preprocessing_of(config), device,
                           config["workers"])["online"]
    model.train()  # extract has put the encoder in eval mode
    results = retrieval(features)
    print(f"held out: rank-1 {results['rank1']:.3f}  mAP {results['mAP']:.3f}")
    return {name: results[name] for name in ("rank1", "mAP")}


@torch.no_grad()
def pivotal_patches(model, examples, epoch):
    """Return [(epoch, the method's pivotal patches of images, (n, N))], or [] if it has none."""
    with torch.compiler.set_stance("force_eager"):  # compiling again for these few does not pay
        masks = model.pivotal_patches(examples)
    return [] if masks is None else [(epoch, masks.cpu())]


def total_level(model, levels):
    """Return the chance level of `MoCoV3`'s or `LoDisc`'s total, the weighted sum of its losses."""
    total = 0.0
    for name, level in levels.items():
        weight = getattr(model, name.replace("loss", "weight"), 1.0)  # MoCoV3 has none
        total += weight * level
    return total


# --- settings ---------------------------------------------------------------------------------


def parse_args(argv=None):
    """Return (settings given on the command line, defaults of all settings)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Default None: chosen by the data, the device "
        "and --init, see README.md.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=data_name, default="synthetic", help=f"{', '.join(NAMES)}, or a folder")
    add("--data-root", type=absolute, default=absolute("datasets"),
        help="folder of the named data sets")
    add("--download", action="store_true", help="fetch a named data set that has a source")
    add("--held-out", action="store_true",
        help="evaluate on a fifth of the training images, held out from them, retrieval after each "
        "epoch")

    add("--method", type=absolute, default="lodisc", help="lodisc, mocov3 or FILE.py:CLASS")
    add("--method-option", action="append", default=[], help="NAME=VALUE for CLASS, repeatable")
    add("--mask", choices=MASKS, default="location", help="which patches the local branch sees")
    add("--importance", choices=IMPORTANCES, default="product",
        help="of a patch, from all layers' attention; authors: product")
    add("--local-input", choices=LOCAL_INPUTS, default="pixels",
        help="other patches set to zero, or dropped, or the best box enlarged; authors: pixels")
    add("--keep-ratio", type=float, default=0.3, help="fraction of patches kept; authors: 0.3")
    add("--global-weight", type=float, default=1.0, help="weight of the global loss; authors: 1")
    add("--local-weight", type=float, default=1.0, help="weight of the local loss; authors: 1")
    add("--temperature", type=float, default=0.2, help="softmax temperature; authors: 0.2")
    add("--hidden-dim", type=int, help="hidden width of the MLP heads; 4096, vit_nano: 512")
    add("--output-dim", type=int, help="output width of the MLP heads; 256, vit_nano: 128")

    add("--arch", choices=ARCHITECTURES, help="encoder; authors: vit_base")
    add("--image-size", type=int, help="pixels per side; authors: 224")
    add("--patch-size", type=int, help="pixels per side; authors: 16")
    add("--init", type=absolute, default="none",
        help=f"weights file, or {', '.join(WEIGHTS)} (untested); authors: imagenet")
    add("--init-momentum", action="store_true", help="the file's momentum (or teacher's) encoder")
    add("--heads", type=int, help="attention heads of --init, if not stated; default: by its width")
    add("--normalise", choices=NORMALISATIONS,
        help="mean and std of the images for --init, if it does not state them; default: imagenet")

    add("--epochs", type=int, help="passes over the images; authors: 100")
    add("--warmup-epochs", type=float, help="epochs of rising learning rate; authors: 0")
    add("--batch-size", type=int, help="images per step, over all processes; authors: 32")
    add("--lr", type=float,
        help="the heads' peak learning rate per 256 images; authors: 1e-3 in an older README")
    add("--encoder-lr", type=float,
        help="the encoder's peak learning rate at any batch size; from scratch the heads'")
    add("--weight-decay", type=float, default=0.1, help="AdamW's; MoCo v3: 0.1; authors: 0.5")
    add("--momentum", type=float,
        help="EMA momentum at the start, 1 at the end; authors: 0.99")
    add("--crop-min", type=float,
        help="smallest fraction of an image's area in a view; authors: 0.08")

    add("--seed", type=int, default=0, help="seed of weights, order, augmentation, random masks")
    add("--workers", type=int, default=default_workers(),
        help="DataLoader workers of each rank; 0: none")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the accelerator, if any")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="auto: bf16 (or fp16) on CUDA, and bf16 on CPUs that have it in hardware, except for "
        "vit_nano")
    add("--compile", action="store_true", help="torch.compile for the encoders")
    add("--out", default=NEW_RUN, help="the run's folder, a new one")
    add("--resume", default="none", help="continue the run in this folder, with its settings")

    defaults = vars(parser.parse_args([]))
    not_given = argparse.Namespace(**dict.fromkeys(defaults))  # argparse fills in what is missing
    values = vars(parser.parse_args(argv, not_given))
    return {name: value for name, value in values.items() if value is not None}, defaults


def absolute(text):
    """Make the path of a folder, FILE or FILE.py:CLASS absolute; leave names unchanged."""
    return text if text in ("none", *METHODS, *WEIGHTS) else str(Path(text).resolve())


def flag(name):
    return "--" + name.replace("_", "-")


def method_options(texts):
    """["name=value", ...] -> {name: value}, Python literals or else text."""
    options = dict(text.partition("=")[::2] for text in texts)
    for name, value in options.items():
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    return options


def load_init(settings):
    """Return the encoder of --init, or None; the other settings must not contradict it."""
    if settings["init"] == "none":
        for name, unset in (("heads", None), ("normalise", None), ("init_momentum", False)):
            require(settings[name] is unset, f"{flag(name)} is for --init", UserError)
        return None
    settings["init"] = weights_file(settings["init"])
    encoder = load_encoder(settings["init"], settings["init_momentum"], None, settings["heads"],
                           settings["normalise"])
    for name, value in (("arch", arch_of(encoder)), ("patch_size", encoder.patch_size)):
        require(settings[name] in (None, value), f"{flag(name)} {settings[name]} disagrees with "
                f"--init {settings['init']}, which has {value}", UserError)
    return encoder


def arch_of(encoder):
    """Return the name of an encoder's sizes in ARCHITECTURES, or "unnamed"."""
    for name, sizes in ARCHITECTURES.items():
        if encoder.sizes == {**PLAIN, **sizes}:
            return name
    return "unnamed"


def recipe_name(settings, device):
    if settings["init"] != "none":
        return "init"
    if settings["data"] == "synthetic":
        return "birds"
    return "scratch, GPU" if device.type == "cuda" else "scratch, CPU"


def fill_defaults(settings, device, num_images, processes=1, encoder=None):
    """Return a run's settings: what the command line left open (None) is chosen by its recipe.

    encoder: that of --init, or None. Nothing is read, printed or changed."""
    recipe = dict(RECIPES[recipe_name(settings, device)])
    if encoder is not None:
        recipe["arch"], recipe["patch_size"] = arch_of(encoder), encoder.patch_size
        recipe["image_size"] = recipe_image_size(encoder.patch_size, device)
        if encoder.config:  # of a run or its export: its own size
            recipe["image_size"] = encoder.image_size
    if "images" in recipe:
        images_seen, least_epochs = recipe.pop("images")
        epochs = min(200, round(images_seen / num_images))
        recipe["epochs"] = max(least_epochs, epochs)

    per_process = max(1, min(recipe["batch_size"], num_images) // processes)
    batch_size = settings["batch_size"] or per_process * processes
    recipe["lr"] *= min(1, recipe["batch_size"] / batch_size)  # no peak above the recipe's
    recipe["batch_size"] = batch_size
    sixth = round((settings["epochs"] or recipe["epochs"]) / 6, 2)  # at most, of a short run
    recipe["warmup_epochs"] = min(recipe.get("warmup_epochs", sixth), sixth)
    is_nano = (settings["arch"] or recipe["arch"]) == "vit_nano"
    recipe["hidden_dim"], recipe["output_dim"] = (512, 128) if is_nano else (4096, 256)

    config = dict(settings, num_images=num_images, mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
    config["method_options"] = method_options(config.pop("method_option"))
    del config["normalise"]  # which mean and std say
    for name, value in recipe.items():
        if config[name] is None:
            config[name] = value
    if config["encoder_lr"] is None:
        config["encoder_lr"] = config["lr"] * config["batch_size"] / 256
    config["warmup_epochs"] = min(config["warmup_epochs"], config["epochs"])
    if encoder is None:
        config.update(PLAIN, **ARCHITECTURES[config["arch"]])
    else:
        config.update(encoder.sizes, mean=list(encoder.mean), std=list(encoder.std))
    return config


def check_settings(config, processes):
    """Raise UserError for a setting outside its range."""
    ranges = dict.fromkeys(("lr", "encoder_lr", "warmup_epochs", "weight_decay", "workers",
                            "global_weight", "local_weight"), (0, math.inf))
    ranges |= dict.fromkeys(("epochs", "image_size", "patch_size", "hidden_dim", "output_dim"),
                            (1, math.inf))
    ranges |= {"momentum": (0, 1), "crop_min": (0, 1), "keep_ratio": (1e-6, 1),
               "temperature": (1e-6, math.inf), "seed": (0, 2**32 - 1),
               "batch_size": (2 * processes, config["num_images"])}
    for name, (low, high) in ranges.items():
        require(low <= config[name] <= high, f"{flag(name)} must be in [{low}, {high}], got "
                f"{config[name]}", UserError)
    for name, divisor in (("image_size", config["patch_size"]), ("batch_size", processes)):
        require(config[name] % divisor == 0, f"{flag(name)} must be a multiple of {divisor}, got "
                f"{config[name]}", UserError)
    require(config["local_input"] != "crop" or config["mask"] == "location", "--local-input crop "
            f"chooses a box itself: leave out --mask {config['mask']}", UserError)
    require(config["global_weight"] + config["local_weight"] > 0, "--global-weight and "
            "--local-weight are both 0: nothing would be trained", UserError)
    require(config["method"] not in METHODS or not config["method_options"],
            f"--method-option is for FILE.py:CLASS, not --method {config['method']}", UserError)


def check_method_options(given, config, options):
    """Raise UserError for an option on the command line that the method would not use."""
    has = ", ".join(map(flag, options)) or "none of its own"
    for name in given:
        require(name not in LoDisc.OPTIONS or name in options, f"{flag(name)} is no option of "
                f"--method {config['method']}, which has {has}", UserError)
    ranked = MASKS[config["mask"]].needs_importance
    require("importance" not in given or ranked, f"--importance is not used by --mask "
            f"{config['mask']}; leave it out", UserError)


# --- the run's folder -------------------------------------------------------------------------


def new_folder(out, config):
    """Make the run's folder, which must not exist; of two runs at once, each gets its own."""
    candidates = [Path(out)]
    if out == NEW_RUN:
        stem = f"{Path(config['data']).name}-{config['method'].split(':')[-1]}"
        candidates = (Path("runs", f"{stem}-{n}") for n in itertools.count(1))
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
    if history:
        rows = csv.DictWriter(text, list(history[-1]))  # an older run's lack held-out retrieval
        rows.writeheader()
        rows.writerows(history)
    write_text(folder / "metrics.csv", text.getvalue())
    write_text(folder / "config.json", json.dumps(contents["config"], indent=2) + "\n")
    write_whole(folder / "checkpoint.pt", lambda file: torch.save(contents, file))


def restore(state, checkpoint):
    """Load the parts of a run from its checkpoint -> (step, history, film)."""
    for name, part in state.items():
        if checkpoint[name]:  # the scaler's is empty if the run had none
            part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random"])  # of dropout, in a method of one's own
    return checkpoint["step"], checkpoint["history"], checkpoint["film"]


def remove_parts(folder):
    """Remove the temporary files of a killed run."""
    for name in ("checkpoint.pt", "metrics.csv", "config.json", "run.png"):
        for part in folder.glob(f".{name}.*"):
            part.unlink()


def read_run(folder, given):
    """Return a run's checkpoint; the given settings must equal its own or be in MOVABLE."""
    checkpoint, given = read_weights(folder), dict(given)
    stored = checkpoint.get("config", {})
    require("num_images" in stored, f"--resume {folder}: not a run's checkpoint", UserError)
    config = checkpoint["config"] = current_config(stored)
    if stored["method"] == "global":  # an older run of MoCo v3: the loss that it lacks, as 0
        for row in checkpoint["history"]:
            del row["local_loss"]
    if "method_option" in given:
        given["method_options"] = method_options(given.pop("method_option"))
    movable = MOVABLE
    if given.get("method", "").split(":")[-1] == config["method"].split(":")[-1]:
        movable += ("method",)  # a method file that has moved
    mismatches = [name for name in given if name not in (*movable, "resume", "download")
                  and config.get(name) != given[name]]
    require(not mismatches, f"--resume {folder}: the run has other settings for "
            f"{', '.join(mismatches)}; leave them out, or start a new run", UserError)
    if "init" in given:
        require("none" not in (given["init"], config["init"]) or given["init"] == config["init"],
                f"--resume {folder}: the run has --init {config['init']}", UserError)
        given["init"] = weights_file(given["init"])
    config.update({name: given[name] for name in movable if name in given})
    return checkpoint


def has_epoch(folder):
    """Whether a run's metrics.csv has a row, so that an epoch has been stored."""
    metrics = folder / "metrics.csv"
    return metrics.exists() and metrics.stat().st_size > 0


# --- after the training -----------------------------------------------------------------------


def evaluate_run(config, data, folder, device):
    """Evaluate raw pixels and the encoder before and after training alike, and print the table."""
    print("evaluating raw pixels and the encoder before and after training; to repeat it: "
          f"python train.py --resume {shlex.quote(str(folder))}")
    rows = evaluate(compared_encoders(config, load_encoder(folder)), data,
                    preprocessing_of(config), "all", device, config["workers"])
    print(table(rows))
    save_results(folder, rows)
    return rows


def draw_run(config, levels, history, film, rows, dataset, folder):
    """Write run.png; levels {loss: chance level}; rows: evaluate_run's, or {}."""
    metrics = {}
    for row, results in rows.items():
        metrics[row] = {name: results[part][key] for name, (part, key) in MAIN_METRICS.items()
                        if part in results}
    crop = v2.Compose(augment.plain_crop(config["image_size"]))
    images = [crop(dataset[i][0]) for i in example_indices(dataset.targets)]
    path = folder / "run.png"
    try:
        save_picture(run_sheet(history, levels, metrics, images, film), path)
        print(f"wrote {path}")
    except UserError as error:
        print(f"not stored: {error}")


# --- processes --------------------------------------------------------------------------------


def start_processes():
    """Join torchrun's process group, if any -> (rank, number of processes)."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def end_silently():
    """End with status 2, on a rank above 0, for a mistake that rank 0 prints. As torchrun stops all
    processes once one has failed, wait for it to stop this one, after rank 0 has printed."""
    time.sleep(SILENCE)
    raise SystemExit(2)


def parse_args_once(argv):
    """Parse the arguments; only rank 0 prints errors, and the help."""
    if not dist.is_torchelastic_launched() or os.environ["RANK"] == "0":
        return parse_args(argv)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return parse_args(argv)
    except SystemExit as end:
        if end.code:
            end_silently()
        raise


def by_rank_0(work, rank, processes):
    """Return rank 0's work() on all processes: the others wait for as long as it takes, as it may
    download or annotate. If it raises UserError, they end silently, with status 2."""
    if processes == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    mistake, message = None, {}
    if rank == 0:
        try:
            message = {"result": work()}
        except UserError as error:
            mistake = error
    shared = [message]
    dist.broadcast_object_list(shared, 0, group=group)
    dist.destroy_process_group(group)
    if mistake:
        raise mistake
    if not shared[0]:
        end_silently()
    return shared[0]["result"]


class Run:
    """Arguments and state of one call of this script."""

    def __init__(self, argv):
        self.given, defaults = parse_args_once(argv)
        self.config = {**defaults, **self.given}
        self.resume = self.config.pop("resume")
        self.out = self.config.pop("out")
        self.download = self.config.pop("download")
        self.rank, self.processes = 0, 1
        self.checkpoint = self.folder = None
        self.made = False  # whether this call has made the folder

    def prepare(self):
        """Read the checkpoint, or fill in the defaults; load the data and build the model."""
        if self.resume != "none":
            self.read_checkpoint()
        self.device = pick_device(self.config["device"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.data = load_data(self.config["data"], self.config["data_root"], self.download,
                              self.config["held_out"])
        if self.rank == 0:
            check_headers(self.data)
        print(f"data: {self.data.describe()}")
        num_images = len(self.data.train)
        if not self.checkpoint:
            self.choose_settings(num_images)
        config = self.config
        require(config["num_images"] == num_images > 1, f"--data {config['data']}: expected "
                f"{max(2, config['num_images'])} training images, got {num_images}", UserError)
        check_settings(config, self.processes)
        self.model = build_model(config, fresh=not self.checkpoint)
        if not self.checkpoint:
            check_method_options(self.given, config, self.model.OPTIONS)
            if self.rank == 0:
                self.folder, self.made = new_folder(self.out, config), True

    def read_checkpoint(self):
        folder = Path(self.resume)
        if folder.name == "checkpoint.pt":
            folder = folder.parent
        require(folder.suffix != ".pt", f"--resume {folder}: expected a run's folder", UserError)
        self.folder, self.checkpoint = folder, read_run(folder, self.given)
        self.config = self.checkpoint["config"]

    def choose_settings(self, num_images):
        """Read --init, fill in the defaults, and print what was chosen."""
        encoder = load_init(self.config)
        if encoder is not None:
            print(f"weights of {encoder.source}")
        settings = self.config
        self.config = fill_defaults(settings, self.device, num_images, self.processes, encoder)
        recipe = recipe_name(settings, self.device)
        chosen = [f"{name} {value}" for name, value in self.config.items()
                  if name in settings and settings[name] is None]
        if chosen and recipe != "birds":
            print(f"chosen ({recipe}): {', '.join(chosen)}")

    def make_maps(self):
        """Return the map of each training image, as in `augment.TwoViews`: the method's own by the
        initial weights, which a resumed run reads from maps.pt, as they have moved since."""
        if self.checkpoint:
            steps = len(self.data.train) // self.config["batch_size"]
            if self.checkpoint["step"] == self.config["epochs"] * steps:
                return None  # finished: to be evaluated
            return read_maps(self.folder, self.data.train)
        print(f"making the maps of {len(self.data.train)} images")
        begun = time.monotonic()
        model = self.model.to(self.device).eval()
        with torch.no_grad(), augment.seeded(self.config["seed"]):
            maps = [augment.encode_map(image_map) for image_map in model.annotate(self.data.train)]
        sizes = [augment.decode_map(png).size for png in maps]
        expected = [self.data.train[i][0].size for i in range(len(self.data.train))]
        require(sizes == expected, "annotate must make a map for each image, of its size; images: "
                f"{len(expected)}, {expected[:3]}..., maps: {len(sizes)}, {sizes[:3]}...")
        save_maps(self.folder, maps, self.data.train)
        print(f"maps of {len(maps)} images in {time.monotonic() - begun:.0f} s, in "
              f"{self.folder / 'maps.pt'}")
        return maps

    def announce(self):
        """Print what is about to be trained, and return the losses' chance levels."""
        print("{method} on {num_images} images of {data}, {arch} at {image_size} px,".format(
            **self.config), f"on {self.device} x {self.processes}, into {self.folder}")
        if self.data.test is None:
            print(f"evaluation skipped: {self.data.note}")
        levels = {}
        if hasattr(self.model, "chance_levels"):
            levels = self.model.chance_levels(self.config["batch_size"])
            if self.config["method"] in METHODS:  # a custom method may sum differently
                levels = {"total": total_level(self.model, levels), **levels}
            print("chance level: " + ", ".join(
                f"{name} {level:.3f}" for name, level in levels.items()))
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
        by_rank_0(run.prepare, run.rank, run.processes)
        if run.rank > 0:
            run.prepare()
        levels = run.announce()
        maps = None
        if hasattr(run.model, "annotate"):
            maps = by_rank_0(run.make_maps, run.rank, run.processes)
        history, film = train(run.model, run.config, run.data, run.folder, run.device,
                              run.checkpoint, run.rank, run.processes, maps)
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
    except Exception as error:
        run.clean_up()
        lost = re.search("by peer|Connection reset|Broken pipe", str(error))
        if run.processes > 1 and isinstance(error, RuntimeError) and lost:
            raise UserError(f"rank {run.rank} stops: another process died") from None
        raise


if __name__ == "__main__":
    gc.freeze()  # collections need not walk the imported modules, here and in DataLoader workers
    try:
        main()
    except UserError as error:
        exit_with_line("train.py", error)
    except KeyboardInterrupt:  # while the arguments are parsed, or a second one
        exit_with_line("train.py", "interrupted")
