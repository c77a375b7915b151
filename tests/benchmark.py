"""Time a training step of every method and its parts, and compare it with its limit.

    python tests/benchmark.py
    python tests/benchmark.py --arch vit_base --image-size 224 --patch-size 16 --batch-size 8
    python tests/benchmark.py --rounds 30 --device cuda --compile --local-input tokens

Options are those of train.py, and --rounds, the number of measurements. The measurements alternate,
so that timing drift affects all methods equally; all values are medians. No file is written.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, as it sets OMP_WAIT_POLICY

import torch
from torch.utils.data import DataLoader

from data.augment import Batches, TwoViews
from data.datasets import load_data
from eval import exit_with_line
from lodisc import METHODS, UserError, attention_product, kept_indices, location_mask

BASELINES = f"{Path(__file__).resolve().parent}/baselines.py"
PARTS = {"query": "online forward", "global_key": "momentum", "pivotal_mask": "mask",
         "local_key": "local", "contrast": "loss"}  # method of LoDisc: name in the report


# --- FLOPs: a multiplication and an addition are two ------------------------------------------


def encoder_flops(encoder, tokens=None, attention=None):
    """Return the FLOPs of one image's forward pass: (patch projection, all else). tokens: number of
    patches that enter, default all; attention: as in the encoder's forward."""
    dim, n = encoder.dim, 1 + (tokens or encoder.num_patches)
    projection = 2 * encoder.num_patches * 3 * encoder.patch_size**2 * dim
    weights = {None: 0, "row": n, "full": n * n, "mean": n * n}[attention]
    rest = 0
    for block in encoder.blocks:
        used = 1 if block is encoder.blocks[-1] else n  # tokens whose output is used
        rest += 2 * dim * (3 * n * dim + 2 * used * n + 9 * used * dim + weights)
    return projection, rest


def head_flops(head):
    return sum(2 * m.in_features * m.out_features for m in head if hasattr(m, "in_features"))


def step_flops(model, batch):
    """Return the FLOPs of the passes that a training step needs, without optimiser and importance;
    a backward pass counts as two forward passes."""
    encoder, projector = model.encoder, head_flops(model.projector)
    projection, rest = encoder_flops(encoder)
    trains = encoder.patch_embed.proj.weight.requires_grad  # its weights; images get no gradient
    passes = (1 + trains) * projection + 3 * (rest + projector + head_flops(model.predictor))
    if model.method != "local" or model.stored:
        passes += sum(encoder_flops(encoder, attention=model.stored))
    if model.method != "global":
        passes += sum(encoder_flops(
            encoder, model.num_kept if model.local_input == "tokens" else None))
    branches = (model.method != "local") + (model.method != "global")
    logits = 2 * 2 * batch * model.predictor[-1].num_features  # backward to the query only
    return 2 * batch * (passes + branches * (projector + logits))


# --- timing -----------------------------------------------------------------------------------


def timed(function, *args):
    """Return (seconds, the function's result), the device synchronised before and after."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = function(*args)
    wait()
    return time.perf_counter() - start, result


def peak_memory(device):
    """Return the peak in GiB: of the GPU, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Trainer:
    """Run train.py's train_step with the same two views at every step."""

    def __init__(self, settings, device, precision):
        self.model = train.build_model(settings).to(device).train()
        self.optimizer = train.build_optimizer(self.model, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.precision, self.device = precision, device
        if settings["compile"]:
            self.model.encoder.compile(), self.model.momentum_encoder.compile()
        size = settings["image_size"]
        self.views = torch.randn(2, settings["batch_size"], 3, size, size, device=device).unbind()

    def step(self):
        train.train_step(self.model, self.model, self.optimizer, self.scaler, self.precision,
                         self.views, torch.Generator().manual_seed(0), 0.5, 0.99)

    def count_passes(self):
        """Return the number of encoder passes in a step, each over one view: (online, momentum)."""
        encoders = self.model.encoder, self.model.momentum_encoder
        with torch.compiler.set_stance("force_eager"), ExitStack() as stack:
            calls = [stack.enter_context(patch.object(encoder, "tokens", wraps=encoder.tokens))
                     for encoder in encoders]
            self.step()
        return [call.call_count for call in calls]

    def split(self):
        """Return {part: seconds} of a step, the device synchronised around each part."""
        seconds = defaultdict(float)

        with ExitStack() as stack:
            for owner, name, part in (*((self.model, name, PARTS[name]) for name in PARTS),
                                      (torch.Tensor, "backward", "backward"),
                                      (self.optimizer, "step", "optimiser"),
                                      (self.model, "update_momentum", "EMA")):
                def call(*args, function=getattr(owner, name), part=part):
                    taken, result = timed(function, *args)
                    seconds[part] += taken
                    return result
                stack.enter_context(patch.object(owner, name, call))
            self.step()
        return seconds

    @torch.no_grad()
    def passes(self, keep):
        """Return {encoder pass over one view: seconds}, the passes that a step needs."""
        view, encoder, seconds = self.views[0], self.model.momentum_encoder, defaultdict(float)
        stored = self.model.stored or "row"
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            for attention in (None, stored, stored, None):  # drift affects both equally
                name = "storing" if attention else "forward"
                seconds[name] += timed(encoder, view, attention)[0] / 2
            seconds["local"] = timed(encoder, view, None, keep)[0]
            with torch.enable_grad():
                seconds["online"], features = timed(lambda: self.model.encoder(view)[0])
        seconds["online"] += timed(features.backward, torch.ones_like(features))[0]
        self.optimizer.zero_grad()
        return seconds


def matrix_product(device, dtype):
    """Return a function that multiplies two large matrices, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: a @ b, 2 * n**3


def input_rate(settings, dataset):
    """Return the throughput of the input pipeline alone, in images/s."""
    crop = settings["image_size"], settings["mean"], settings["std"]
    views = TwoViews(dataset, *crop, settings["seed"], settings["crop_min"])
    first, count = 2 * settings["workers"] + 2, 4 * settings["workers"] + 8  # batches
    order, batches = Batches(len(dataset), settings["batch_size"], settings["seed"]), []
    while len(batches) < first + count:
        batches += order
        order.epoch += 1
    batches = batches[:first + count]
    if settings["data"] == "synthetic":
        [dataset[i] for batch in batches for _, i in batch]  # fills the cache, as in later epochs
    loader = iter(DataLoader(views, batch_sampler=batches, num_workers=settings["workers"]))
    [next(loader) for _ in range(first)]  # skip the prefetched batches
    seconds, _ = timed(lambda: [next(loader) for _ in range(count)])
    return count * settings["batch_size"] / seconds


# --- report -----------------------------------------------------------------------------------


def medians(rounds):
    return {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}


def parse_args(argv=None):
    """Return (own options, train.py's settings on the command line, their defaults)."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=int, default=10)
    args, rest = parser.parse_known_args(argv)
    return args, *train.parse_args(rest)


def main(argv=None):
    args, given, defaults = parse_args(argv)
    settings = {**defaults, **given}
    device = train.pick_device(settings["device"])
    dataset = load_data(*(settings[name] for name in ("data", "data_root", "download",
                                                      "held_out"))).train
    train.fill_defaults(settings, device, len(dataset))
    train.check_settings(settings, 1)
    arch, size, batch = settings["arch"], settings["image_size"], settings["batch_size"]
    precision = train.pick_precision(settings["amp"], device, settings["dim"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    shown = str(precision or torch.float32).removeprefix("torch.")
    print(f"{arch}, {size} px, batch {batch}, {settings['local_input']}, {shown}, torch "
          f"{torch.__version__}, on {device} ({name}), {args.rounds} rounds")

    methods = {}
    for name in (*METHODS, f"{BASELINES}:CVSA", f"{BASELINES}:PARTICLE"):
        trainer = Trainer({**settings, "method": name}, device, precision)
        trainer.step(), trainer.step()
        methods[name.split(":")[-1]] = trainer
        if name == "lodisc":  # before the other models
            memory, lodisc, model = peak_memory(device), trainer, trainer.model
    counts = {name: trainer.count_passes() for name, trainer in methods.items()}
    product, product_flops = matrix_product(device, precision or torch.float32)
    blocks, n, ratio = model.encoder.blocks, model.encoder.num_patches, settings["keep_ratio"]
    keep = location_mask(torch.rand(batch, n, device=device), ratio)
    keep = kept_indices(keep, model.num_kept) if model.local_input == "tokens" else None
    attention = torch.rand(len(blocks), 256, blocks[0].attn.heads, 1 + n, device=device).unbind()
    lodisc.split(), lodisc.passes(keep), product()  # warm up

    rounds, splits, passes = [], [], []
    for _ in range(args.rounds):
        rounds.append({name: timed(trainer.step)[0] for name, trainer in methods.items()} | {
            "product": timed(product)[0],
            "mask": timed(lambda: location_mask(attention_product(attention), ratio))[0]})
        splits.append(lodisc.split())
        passes.append(lodisc.passes(keep))
    whole, split, passed = medians(rounds), medians(splits), medians(passes)

    print(f"\n{'a step':<10}{'passes: online':>16}{'momentum':>10}{'ms':>10}{'images/s':>10}"
          f"{'of global':>11}")
    for name, (online, momentum) in counts.items():
        print(f"{name:<10}{online:>16}{momentum:>10}{whole[name] * 1e3:>10.1f}"
              f"{batch / whole[name]:>10.1f}{whole[name] / whole['global']:>11.3f}")
    print(f"\n{'lodisc':<16}{'ms':>10}")
    for part in (*PARTS.values(), "backward", "optimiser", "EMA"):
        print(f"{part:<16}{split[part] * 1e3:>10.1f}")

    flops = {name: step_flops(methods[name].model, batch) for name in ("lodisc", "global")}
    limit = 2 * sum(passed[part] for part in ("online", "forward", "local"))
    rate, speed = product_flops / whole["product"], flops["lodisc"] / whole["lodisc"]
    print(f"\nlimit / step: {limit / whole['lodisc']:.3f}; the limit is the encoder's passes alone")
    print(f"{flops['lodisc'] / 1e9:.1f} GFLOP a step, over global's "
          f"{flops['lodisc'] / flops['global']:.3f}; {speed / 1e9:.1f} GFLOP/s, {speed / rate:.3f} "
          f"of a large matrix product's {rate / 1e9:.0f}")
    print(f"storing the attention ({model.stored or 'row'}): "
          f"{passed['storing'] / passed['forward'] - 1:+.1%} of a momentum pass")
    print(f"importance and mask of 256 images x {n} patches: {whole['mask'] * 1e3:.1f} ms; of both "
          f"views, {2 * whole['mask'] / 256 / (whole['lodisc'] / batch):.2%} of their step")
    print(f"peak memory: {memory:.2f} GiB")
    rate, needed = input_rate(settings, dataset), batch / whole["lodisc"]
    print(f"input alone, {settings['workers']} workers: {rate:.1f} images/s, the step takes "
          f"{needed:.1f}: the {'input' if rate < needed else 'step'} is the bottleneck")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with_line("benchmark.py", error)
