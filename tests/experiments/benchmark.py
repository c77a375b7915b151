"""Time a training step of every method and its parts, and compare it with its limit.

    python tests/experiments/benchmark.py
    python tests/experiments/benchmark.py --arch vit_base --image-size 224 --patch-size 16
    python tests/experiments/benchmark.py --rounds 30 --device cuda --compile --local-input tokens

Options are those of train.py, and --rounds, the number of measurements. The measurements alternate,
so that timing drift affects all methods equally; all values are medians. No file is written.
"""

import argparse
import platform
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS.parent))

import train  # before torch, as it sets OMP_WAIT_POLICY

import torch
from einops import repeat
from torch.utils.data import DataLoader

from data.augment import Batches, TwoViews
from data.datasets import load_data
from eval import exit_with_line
from lodisc import (IMPORTANCES, METHODS, LoDisc, UserError, attention_product, kept_indices,
                    location_mask)

ROWS = {  # their settings
    **{name: {"method": name} for name in METHODS},
    "lodisc, crop": {"method": "lodisc", "local_input": "crop", "mask": "location"},
    "PARTICLE": {"method": f"{TESTS}/baselines/particle.py:PARTICLE"},
    "CVSA (after the abstract)": {"method": f"{TESTS}/baselines/cvsa.py:CVSA"},
    "Released": {"method": f"{TESTS}/baselines/released.py:Released"},
}
PARTS = {"query": "online forward", "key_and_mask": "momentum, mask", "local_key": "local",
         "contrast": "loss"}  # method of LoDisc: name in the report


# --- FLOPs: a multiplication and an addition are two ------------------------------------------


def encoder_flops(encoder, patches=None, kind=None):
    """Return the FLOPs of one image's forward pass: (patch projection, all else). patches: how many
    enter, default all; kind: of attention, as in `VisionTransformer.with_attention`."""
    dim, n = encoder.dim, 1 + (patches or encoder.num_patches)
    projection = 2 * encoder.num_patches * 3 * encoder.patch_size**2 * dim
    weights = {None: 0, "row": n, "matrix": n * n}[kind]
    rest = 0
    for block in encoder.blocks:
        used = 1 if block is encoder.blocks[-1] else n  # tokens whose output is used
        rest += 2 * dim * (3 * n * dim + 2 * used * n + 9 * used * dim + weights)
    return projection, rest


def head_flops(head):
    return sum(2 * m.in_features * m.out_features for m in head if hasattr(m, "in_features"))


def step_flops(model, batch):
    """Return the FLOPs of the passes of a training step of MoCo v3 or LoDisc, without optimiser and
    importance; a backward pass counts as two forward passes."""
    encoder, head = model.encoder, head_flops(model.projector)
    projection, rest = encoder_flops(encoder)
    passes = projection + 3 * (rest + head + head_flops(model.predictor))
    if encoder.patch_embed.proj.weight.requires_grad:  # its weights; images get no gradient
        passes += projection
    branches, kind = 1, None
    if isinstance(model, LoDisc):
        branches, kind = 2, IMPORTANCES[model.importance].attention_kind
        patches = model.num_kept if model.local_input == "tokens" else None
        passes += sum(encoder_flops(encoder, patches))
    passes += sum(encoder_flops(encoder, kind=kind))
    logits = 2 * 2 * batch * model.predictor[-1].num_features  # backward to the query only
    return 2 * batch * (passes + branches * (head + logits))


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
            train.compile_encoders(self.model)
        size = settings["image_size"]
        self.views = torch.randn(2, settings["batch_size"], 3, size, size, device=device).unbind()
        self.maps = ()
        if hasattr(self.model, "annotate"):  # ids of patches at random, to time the step alone
            patch_size = settings["patch_size"]
            side = size // patch_size
            ids = torch.randint(0, 6, (2, settings["batch_size"], side, side), dtype=torch.uint8)
            maps = repeat(ids, "v b rows columns -> v b (rows y) (columns x)", y=patch_size,
                          x=patch_size)
            self.maps = maps.to(device).unbind()

    def step(self):
        train.train_step(self.model, self.model, self.optimizer, self.scaler, self.precision,
                         self.views, torch.Generator().manual_seed(0), 0.5, 0.99, self.maps)

    def count_passes(self):
        """Return the number of encoder passes in a step, each over one view: (online, momentum)."""
        encoders = self.model.encoder, self.model.momentum_encoder
        with torch.compiler.set_stance("force_eager"), ExitStack() as stack:
            calls = [stack.enter_context(patch.object(encoder, "encode", wraps=encoder.encode))
                     for encoder in encoders]
            self.step()
        return [call.call_count for call in calls]

    def split(self):
        """Return {part: seconds} of a step, the device synchronised around each part."""
        seconds = defaultdict(float)
        parts = [(self.model, name, part) for name, part in PARTS.items()]
        parts += [(torch.Tensor, "backward", "backward"), (self.optimizer, "step", "optimiser"),
                  (self.model, "update_momentum", "EMA")]
        with ExitStack() as stack:
            for owner, name, part in parts:
                def call(*args, function=getattr(owner, name), part=part):
                    taken, result = timed(function, *args)
                    seconds[part] += taken
                    return result
                stack.enter_context(patch.object(owner, name, call))
            self.step()
        return seconds

    @torch.no_grad()
    def passes(self, local_pass):
        """Return {encoder pass over one view: seconds}, the passes that a step of LoDisc needs;
        local_pass: a function of the momentum encoder and the view."""
        view, encoder, seconds = self.views[0], self.model.momentum_encoder, defaultdict(float)
        kind = IMPORTANCES[self.model.importance].attention_kind
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            for name in ("forward", "storing", "storing", "forward"):  # drift affects both equally
                if name == "storing":
                    taken, _ = timed(encoder.with_attention, view, kind)
                else:
                    taken, _ = timed(encoder, view)
                seconds[name] += taken / 2
            seconds["local"], _ = timed(local_pass, encoder, view)
            with torch.enable_grad():
                seconds["online"], features = timed(self.model.encoder, view)
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
    views = TwoViews(dataset, train.preprocessing_of(settings), settings["seed"],
                     settings["crop_min"])
    first, count = 2 * settings["workers"] + 2, 4 * settings["workers"] + 8  # batches
    order, batches = Batches(len(dataset), settings["batch_size"], settings["seed"]), []
    while len(batches) < first + count:
        batches += order
        order.epoch += 1
    batches = batches[:first + count]
    if settings["data"] == "synthetic":  # fill the cache, as in later epochs
        for batch in batches:
            for _, index in batch:
                dataset[index]
    loader = iter(DataLoader(views, batch_sampler=batches, num_workers=settings["workers"]))
    for _ in range(first):  # skip the prefetched batches
        next(loader)
    seconds, _ = timed(lambda: [next(loader) for _ in range(count)])
    return count * settings["batch_size"] / seconds


# --- report -----------------------------------------------------------------------------------


def medians(rounds):
    return {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}


def parse_args(argv=None):
    """Return (own options, train.py's settings on the command line, their defaults)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each part (10)")
    args, rest = parser.parse_known_args(argv)
    return args, *train.parse_args(rest)


def main(argv=None):
    args, given, defaults = parse_args(argv)
    settings = {**defaults, **given}
    device = train.pick_device(settings["device"])
    dataset = load_data(settings["data"], settings["data_root"], settings["download"],
                        settings["held_out"]).train
    settings = train.fill_defaults(settings, device, len(dataset),
                                   encoder=train.load_init(settings))
    train.check_settings(settings, 1)
    arch, size, batch = settings["arch"], settings["image_size"], settings["batch_size"]
    precision = train.pick_precision(settings["amp"], device, settings["dim"])
    if device.type == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = platform.processor() or platform.machine()
        processor += f", {torch.get_num_threads()} threads"
    shown = str(precision or torch.float32).removeprefix("torch.")
    print(f"{arch}, {size} px, batch {batch}, {settings['local_input']}, {shown}, torch "
          f"{torch.__version__}, on {device} ({processor}), {args.rounds} rounds")

    methods = {}
    for name, of_row in ROWS.items():
        trainer = methods[name] = Trainer({**settings, **of_row}, device, precision)
        for _ in range(2):  # warm up
            trainer.step()
        if name == "lodisc":  # before the other models
            memory, lodisc, model = peak_memory(device), trainer, trainer.model
    counts = {name: trainer.count_passes() for name, trainer in methods.items()}
    product, product_flops = matrix_product(device, precision or torch.float32)
    n, ratio = model.encoder.num_patches, settings["keep_ratio"]
    keep = None
    if model.local_input == "tokens":
        mask = location_mask(torch.rand(batch, n, device=device), ratio)
        keep = kept_indices(mask, model.num_kept)
    attentions = torch.rand(len(model.encoder.blocks), 256, n, device=device).unbind()

    def local_pass(encoder, view):
        return encoder(view, keep)

    rounds, splits, passes = [], [], []
    for i in range(1 + args.rounds):
        times = {name: timed(trainer.step)[0] for name, trainer in methods.items()}
        times["product"] = timed(product)[0]
        times["mask"] = timed(lambda: location_mask(attention_product(attentions), ratio))[0]
        split, of_passes = lodisc.split(), lodisc.passes(local_pass)
        if i > 0:  # the first warms up
            rounds.append(times)
            splits.append(split)
            passes.append(of_passes)
    whole, split, passed = medians(rounds), medians(splits), medians(passes)

    print(f"\n{'a step':<26}{'passes: online':>16}{'momentum':>10}{'ms':>10}{'images/s':>10}"
          f"{'of mocov3':>11}")
    for name, (online, momentum) in counts.items():
        print(f"{name:<26}{online:>16}{momentum:>10}{whole[name] * 1e3:>10.1f}"
              f"{batch / whole[name]:>10.1f}{whole[name] / whole['mocov3']:>11.3f}")
    print(f"\n{'lodisc':<16}{'ms':>10}")
    for part in (*PARTS.values(), "backward", "optimiser", "EMA"):
        print(f"{part:<16}{split[part] * 1e3:>10.1f}")

    flops = {name: step_flops(methods[name].model, batch) for name in METHODS}
    limit = 2 * sum(passed[part] for part in ("online", "forward", "local"))
    rate, speed = product_flops / whole["product"], flops["lodisc"] / whole["lodisc"]
    storing = passed["storing"] / passed["forward"] - 1
    print(f"\nlimit / step: {limit / whole['lodisc']:.3f}; the limit is the encoder's passes alone")
    print(f"{flops['lodisc'] / 1e9:.1f} GFLOP a step, "
          f"{flops['lodisc'] / flops['mocov3']:.3f} x MoCo v3's; {speed / 1e9:.1f} GFLOP/s, "
          f"{speed / rate:.3f} of a large matrix product's {rate / 1e9:.0f}")
    print(f"storing the attention ({IMPORTANCES[model.importance].attention_kind}): {storing:+.1%} "
          "of a momentum pass")
    print(f"importance and mask of 256 images x {n} patches: {whole['mask'] * 1e3:.1f} ms; of both "
          f"views, {2 * whole['mask'] / 256 / (whole['lodisc'] / batch):.2%} of their step")
    print(f"peak memory: {memory:.2f} GiB")
    rate, needed = input_rate(settings, dataset), batch / whole["lodisc"]
    bottleneck = "input" if rate < needed else "step"
    print(f"input alone, {settings['workers']} workers: {rate:.1f} images/s, the step needs "
          f"{needed:.1f}: the {bottleneck} is the bottleneck")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with_line("benchmark.py", error)
