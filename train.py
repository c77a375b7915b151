"""Train LoDisc (or MoCo v3) and judge what was learnt.

    python train.py                            the embedded birds, a few minutes on a CPU
    python train.py --data DIR                 a folder of pictures, see data/README.md
    torchrun --nproc_per_node=8 train.py ...   a process for each of eight GPUs

A run writes config.json, metrics.csv, checkpoint.pt, eval.json and run.png into its folder.
"""

import argparse
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: idle threads do not spin

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from data.augment import Batches, Plain, TwoViews, mix_seed
from data.datasets import NAMES, data_name, load_data
from data.draw import draw_run
from data.run import (COLUMNS, FILM, NEW_RUN, Progress, Stop, filmed, merge_json, new_folder,
                      outlive_the_step, pick_device, read_run, save_checkpoint, unlearnt_loss,
                      write_json, write_metrics)
from data.weights import load_published
from eval import RawPixels, evaluate, importance_of, one_line, table
from lodisc import (ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, IMPORTANCES, LOCAL_INPUTS, MASKS,
                    METHODS, LoDisc, create_vit, first_line, load_encoder, location_mask,
                    momentum_schedule, require)

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
BF16_WIDTH = 192  # a CPU's bfloat16 pays from this width of the encoder on (README, Speed)
CHECK_EVERY = 50  # steps between looks whether the loss is finite, for which a GPU has to wait


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
    add("--init", "none", "published weights: a file, or imagenet for torchvision's, with labels; "
        "positions and patch projection then train", "imagenet", type=init_name)
    add("--init-momentum", False, "take the file's momentum (or teacher's) encoder",
        action="store_true")
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
    add("--amp", "auto", "mixed precision; auto: bf16 or else fp16 on CUDA, bf16 on CPUs "
        "that have it in hardware for all but vit_nano, else off",
        choices=["auto", "bf16", "fp16", "off"])
    add("--compile", False, "torch.compile for the encoders", action="store_true")
    add("--out", NEW_RUN, "the run's folder, a new one")
    add("--resume", "none", "go on with the run in this folder, by its settings")
    return vars(parser.parse_args(argv)), defaults


def init_name(text):
    return text if text in ("none", "imagenet") else whole_path(text)


def whole_path(text):
    return str(Path(text).resolve())


def pick_precision(amp, device, width):
    """The autocast dtype, or None for float32; width: the encoder's."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return (torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16)
    if device.type == "cpu" and width >= BF16_WIDTH:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else None
    return None


def settle(settings, device, num_images, processes):
    """Fill in what the command line left open, and say what was chosen for a folder; check."""
    require(num_images > 1, f"--data {settings['data']}: {num_images} training picture; two are "
            "the least that can be told apart")
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
    require(settings["batch_size"] % processes == 0 and settings["batch_size"] >= 2 * processes,
            f"--batch-size {settings['batch_size']} must divide among {processes} processes, two "
            "images or more for each")


# --- several processes ------------------------------------------------------------------------


def join_processes(device):
    """(rank, number) of this process among those that torchrun started; alone it is 0 of 1.

    Only rank 0 prints and writes.
    """
    if not dist.is_torchelastic_launched():
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo on CUDA too, beside NCCL: for what the processes agree on without waiting for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def rank_0_first(rank):
    """What may download or unpack is done by one process, before the others find it done."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and dist.is_initialized():
        dist.barrier()


def distribute(model, device):
    """The model whose backward averages the gradients over all processes."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # its BatchNorms, in place
    else:
        print("on a CPU, the heads' BatchNorm sees each process's share of the batch by itself")
    return nn.parallel.DistributedDataParallel(model)


# --- the run ----------------------------------------------------------------------------------


def build_model(settings):
    """The model before training; a function of the settings alone."""
    torch.manual_seed(settings["seed"])
    init = settings["init"] != "none"
    encoder = create_vit(settings["arch"], settings["image_size"], settings["patch_size"],
                         learned_positions=init, train_projection=init)
    if init:
        print(load_published(encoder, settings["init"], settings["init_momentum"]))
    nano = settings["arch"] == "vit_nano"
    return LoDisc(encoder, settings["method"], settings["mask"], settings["importance"],
                  settings["local_input"], settings["keep_ratio"], settings["temperature"],
                  hidden_dim=512 if nano else 4096, output_dim=128 if nano else 256)


def build_optimizer(model, settings):
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True,
                             lr=settings["lr"], weight_decay=settings["weight_decay"])


def compile_encoders(model, device):
    """torch.compile, in place, for the passes that cost; without a compiler for it, as they are."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # torch has no one class for what is missing
        return print(f"--compile: going on without it: {first_line(error)}")
    model.encoder.compile()
    model.momentum_encoder.compile()


def learning_rate(step, warmup, total, peak):
    """Linear rise over the warm-up steps, then half a cosine down to 0 (MoCo v3)."""
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@torch.no_grad()
def pivotal_masks(model, pictures):
    """Where the momentum encoder looks now: pictures (n, 3, H, W) -> bool (n, N) on the CPU."""
    with torch.compiler.set_stance("force_eager"):  # compiling again for these few does not pay
        importance = importance_of(model.momentum_encoder, pictures, model.importance)
    return location_mask(importance, model.keep_ratio, check=False)


def train(model, settings, data, folder, device, stop, checkpoint=None, rank=0, processes=1):
    """The training loop; changes model in place. Whether it came to its end, or was stopped."""
    model.to(device)
    parallel = distribute(model, device)
    optimizer = build_optimizer(model, settings)
    precision = pick_precision(settings["amp"], device, model.encoder.dim)
    print(f"precision: {precision or torch.float32}".replace("torch.", ""))
    if settings["compile"]:
        compile_encoders(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    crop = settings["image_size"], settings["mean"], settings["std"]
    plain = Plain(data.train, *crop)
    pictures = torch.stack([plain[i][0] for i in filmed(len(plain))]).to(device)
    moments = {round(i * settings["epochs"] / (FILM - 1)) for i in range(FILM)}  # in epochs
    epochs, steps = settings["epochs"], len(data.train) // settings["batch_size"]  # of an epoch
    total, warmup = steps * epochs, steps * settings["warmup_epochs"]
    peak = settings["lr"] * settings["batch_size"] / 256
    step, history, losses = 0, [], torch.zeros(3, device=device)  # losses: summed over an epoch
    if checkpoint is None:
        film = [(0, pivotal_masks(model, pictures))]
    else:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty, where the run began without one
            scaler.load_state_dict(checkpoint["scaler"])
        step, history, film = (checkpoint[name] for name in ("step", "history", "film"))
        losses += checkpoint["losses"].to(device)
        # every draw here is seeded by its step or sample; this is for what a fork may add
        torch.set_rng_state(checkpoint["random"])
        if device.type == "cuda" and checkpoint["cuda_random"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_random"], device)
        if rank == 0:
            write_metrics(folder / "metrics.csv", history)  # cut back to the checkpoint

    # batches hold the same pictures for any number of processes, each of which takes its share
    batches = Batches(len(data.train), settings["batch_size"], settings["seed"], step, total, rank,
                      processes)
    views = TwoViews(data.train, *crop, settings["seed"], settings["crop_min"])
    generator = torch.Generator()  # of the random and block masks, seeded anew each step
    loader = DataLoader(views, batch_sampler=batches, num_workers=settings["workers"],
                        generator=generator,  # so that it leaves torch's own alone
                        pin_memory=device.type == "cuda", worker_init_fn=outlive_the_step)
    progress = Progress(epochs, steps, settings["batch_size"], step)
    print(f"a branch that has learnt nothing has a loss of {unlearnt_loss(settings):.3f}; from "
          "there it should fall")
    model.train()
    begun, started = step, time.monotonic()
    for view1, view2 in loader:
        epoch = step // steps
        lr = learning_rate(step, warmup, total, peak)
        momentum = momentum_schedule(step, total, settings["momentum"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        generator.manual_seed(mix_seed(settings["seed"], step, rank))

        view1 = view1.to(device, non_blocking=True)
        view2 = view2.to(device, non_blocking=True)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            output = parallel(view1, view2, generator)
        optimizer.zero_grad()
        scaler.scale(output.total).backward()
        scaler.step(optimizer)
        scaler.update()
        model.update_momentum(momentum)

        losses += torch.stack(output[:3]).detach()
        step += 1
        progress(epoch, step, lambda: (losses[1:] / (step - epoch * steps)).tolist(), lr, momentum)
        if step % CHECK_EVERY == 0:
            check_finite(losses, step, lr, folder)
        epoch_ends = step % steps == 0
        stopping = stop.agree()
        if not (stopping or epoch_ends):
            continue

        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= processes
        check_finite(losses, step, lr, folder)
        if epoch_ends:
            seconds = time.monotonic() - started
            history.append(dict(zip(COLUMNS, (
                epoch + 1, step, *(losses / steps).tolist(), lr, momentum,
                (step - begun) * settings["batch_size"] / seconds, seconds))))
            losses.zero_()
            if epoch + 1 in moments:
                film.append((step, pivotal_masks(model, pictures)))
        if rank == 0:
            write_metrics(folder / "metrics.csv", history)
            save_checkpoint(folder / "checkpoint.pt", config=settings, model=model.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                            step=step, history=history, film=film, losses=losses,
                            random=torch.get_rng_state(), cuda_random=torch.cuda.get_rng_state(
                                device) if device.type == "cuda" else None)
        if stopping:
            return False
        begun, started = step, time.monotonic()
    return True


def check_finite(losses, step, lr, folder):
    require(bool(losses.isfinite().all()), f"the loss is not finite by step {step}, learning rate "
            f"{lr:.1e}: try a lower --lr or a longer --warmup-epochs; the checkpoint"
            f"{f' in {folder}' if folder else ''}, if any, is from before")


def judge(settings, data, folder, device):
    """Raw pixels, the encoder before and after training, evaluated the same way, side by side."""
    if data.test is None:
        return print(f"not evaluated: {data.note}")
    print("judging raw pixels and the encoder before and after; the training is saved, --resume "
          f"{folder} does this part again")
    crop = settings["image_size"], settings["mean"], settings["std"]
    before = "untrained" if settings["init"] == "none" else "initial"
    encoders = {"raw pixels": RawPixels(), before: build_model(settings).encoder,
                "trained": load_encoder(folder)}
    rows = evaluate(encoders, data, crop, "all", device, settings["workers"], settings["seed"])
    merge_json(folder / "eval.json", {**rows["trained"], before: rows[before],
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
    device = pick_device(settings["device"])
    rank, processes = join_processes(device)
    with rank_0_first(rank):
        data = load_data(settings["data"], settings["data_root"], download)
        settle(settings, device, len(data.train), processes)
        model = build_model(settings)
    if folder is None and rank == 0:
        folder = new_folder(out, settings)
        write_json(folder / "config.json", settings)
    print(f"{settings['method']} on {len(data.train)} pictures of {settings['data']}, "
          f"{settings['arch']} at {settings['image_size']} px, on {device}"
          + (f" in {processes} processes" if processes > 1 else "") + f", into {folder}")
    if data.test is None:
        print(f"will not be evaluated: {data.note}")
    try:
        with Stop() as stop:
            finished = train(model, settings, data, folder, device, stop, checkpoint, rank,
                             processes)
    except RuntimeError as error:  # torch has a class for a GPU's memory, none for a CPU's
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"out of memory at --batch-size {settings['batch_size']} and --image-size "
                         f"{settings['image_size']}: give a smaller one") from None
    if dist.is_initialized():
        dist.destroy_process_group()
    if not finished:
        launcher = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
        sys.exit(1 if rank > 0 else
                 f"\nstopped and saved; go on with: {launcher} train.py --resume {folder}")
    if rank == 0:
        judge(settings, data, folder, device)
        draw_run(folder, data.train)
        print(f"drawn: {folder / 'run.png'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:  # for people: one line, no traceback
        print(f"train.py: {one_line(error)}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(2)  # not sys.exit, which waits for loading processes; they follow by themselves
