"""Published ViT weights, by one table of rules: whose file it is, and where the encoder stands."""

import argparse
import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.models import get_weight

from lodisc import ARCHITECTURES, first_line, require


class Format(NamedTuple):
    """Regular expressions over the dotted names of all tensors in a file."""

    name: str
    mark: str  # after the encoder's prefix: a file that has it is of this format
    encoder: str  # prefix of the (base, student) encoder's names
    momentum: str | None  # that of the momentum encoder's, or teacher's, where there is one
    left_out: str  # tensors that are no encoder: projectors, optimiser and the like
    renames: tuple[tuple[str, str], ...] = ()  # to timm's names, which are ours


WRAPPED = r"(?:(?:model|state_dict)\.)?(?:module\.)?"  # a training script, DistributedDataParallel
TRAINING = r"(?:optimizer|lr_scheduler|(?:amp_|fp16_)?scaler|model_ema|state_dict_ema)\.|best_acc"
FORMATS = (  # the first that fits
    Format("this project", "cls_token", r"model\.encoder\.", r"model\.momentum_encoder\.",
           r"model\.(?:projector|predictor|momentum_projector)\.|losses|film|"
           r"(?:cuda_)?random|" + TRAINING),
    Format("MoCo v3", "cls_token", r"state_dict\.module\.base_encoder\.",
           r"state_dict\.module\.momentum_encoder\.",
           r"state_dict\.module\.predictor\.|" + TRAINING),
    Format("DINO", "cls_token", r"student\.(?:module\.)?backbone\.",
           r"teacher\.(?:module\.)?backbone\.",
           r"(?:student|teacher)\.(?:module\.)?head\.|dino_loss\.|" + TRAINING),
    Format("torchvision", "class_token", WRAPPED, None, TRAINING, (
        (r"class_token", "cls_token"),
        (r"conv_proj\.", "patch_embed.proj."),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"(.*)\.ln_([12])\.", r"\1.norm\2."),
        (r"(.*)\.self_attention\.in_proj_", r"\1.attn.qkv."),
        (r"(.*)\.self_attention\.out_proj\.", r"\1.attn.proj."),
        (r"(.*)\.mlp\.(?:0|linear_1)\.", r"\1.mlp.fc1."),
        (r"(.*)\.mlp\.(?:3|linear_2)\.", r"\1.mlp.fc2."),
        (r"encoder\.ln\.", "norm."),
        (r"heads\.", "head."))),
    Format("timm's, DeiT's or DINO's backbone", "cls_token", WRAPPED, None, TRAINING),
)


def load_published(encoder, path, momentum=False):
    """Fill a VisionTransformer from a published file, in place -> a line that says from what.

    path: a checkpoint of this project, MoCo v3, DINO, DeiT, timm or torchvision, or "imagenet" for
    torchvision's own supervised weights. momentum: take the momentum (or teacher's) encoder, which
    the first three have. Positions of another image size are interpolated. Raises ValueError for
    another format, and names the tensors that are left over, missing or of another shape.
    """
    tensors, arch = (imagenet(encoder), None) if path == "imagenet" else read_tensors(path)
    form = next((form for form in FORMATS if any(re.fullmatch(form.encoder + form.mark, name)
                                                 for name in tensors)), None)
    where = f"--init {path}"
    require(form, f"{where}: no ViT of a known format among its {len(tensors)} tensors; known: "
            f"{', '.join(known.name for known in FORMATS)}")
    require(form.momentum or not momentum, f"{where} ({form.name}) holds one encoder; leave out "
            "--init-momentum")
    found, left_out, odd = sort_out(tensors, form, momentum)
    check_size(encoder, found, form, arch, where)
    if "pos_embed" in found:
        side = encoder.image_size // encoder.patch_size
        found["pos_embed"] = resize_positions(found["pos_embed"], side)
    wanted = encoder.state_dict()
    for problem, names in (
            ("left over", odd + [name for name in found if name not in wanted]),
            ("missing", [name for name in wanted if name not in found]),
            ("of another shape", [name for name in found if name in wanted
                                  and found[name].shape != wanted[name].shape])):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        require(not names, f"{where} ({form.name}): {problem}: {', '.join(names[:5])}{more}")
    encoder.load_state_dict(found)
    which = (", momentum encoder" if momentum else ", base encoder") if form.momentum else ""
    rest = f"; left out: {', '.join(left_out)}" if left_out else ""
    return f"weights of {path}: {form.name}{which}{rest}"


def imagenet(encoder):
    """torchvision's ViT-B, trained with ImageNet's labels; kept in torch's cache once fetched."""
    require(encoder.dim == 768 and encoder.patch_size in (16, 32), "--init imagenet: torchvision's "
            "weights fit --arch vit_base with --patch-size 16 or 32")
    weights = get_weight(f"ViT_B_{encoder.patch_size}_Weights.IMAGENET1K_V1")
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise OSError(f"--init imagenet: {weights.url} could not be fetched: {first_line(error)}; "
                      "fetch it elsewhere and give its path to --init") from None


def read_tensors(path):
    """(all tensors of a torch.save file by dotted names, the architecture that a checkpoint of this
    project names, or None); nothing in the file is executed.
    """
    try:
        # DINO and DeiT keep their settings in a Namespace: a plain record, it runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"--init {path}: no such file") from None
    except Exception as error:  # torch.load raises many kinds for a file that is something else
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        reason = (f"it holds {unknown[1]}, which may run code" if unknown else
                  "it is no file of tensors that torch.save wrote")
        raise ValueError(f"--init {path}: not read as weights: {reason}") from None
    config = contents.get("config") if isinstance(contents, dict) else None
    return dict(flatten(contents)), config.get("arch") if isinstance(config, dict) else None


def flatten(contents, name=""):
    """(dotted name, tensor) of every tensor in nested dictionaries and lists."""
    if isinstance(contents, Tensor):
        yield name, contents
    elif isinstance(contents, (dict, list, tuple)):
        items = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for key, value in items:
            yield from flatten(value, f"{name}.{key}" if name else str(key))


def sort_out(tensors, form, momentum):
    """The encoder's tensors by our names, what the format has beside it, and names it has not."""
    own, other = (form.momentum, form.encoder) if momentum else (form.encoder, form.momentum)
    left_out = re.compile(f"{form.left_out}|{other}" if other else form.left_out)
    found, beside, odd = {}, set(), []
    for name, tensor in tensors.items():
        if match := left_out.match(name):
            beside.add(match[0].rstrip("."))
            continue
        inner, count = re.subn("^" + own, "", name)
        for pattern, ours in form.renames:
            inner = re.sub("^" + pattern, ours, inner)
        if not count:
            odd.append(name)
        elif inner.startswith("head."):
            beside.add("head")
        else:
            found[inner] = tensor
    return found, sorted(beside), odd


def check_size(encoder, found, form, arch, where):
    """Raise ValueError, with the options that fit, where the file's ViT is of another size. The
    number of heads, which no tensor shows, is known from arch or from the format: MoCo v3's ViT-S
    has 12, everybody else's 6.
    """
    projection = found.get("patch_embed.proj.weight")
    if projection is None:
        return  # reported as missing
    depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    dim, patch_size = len(projection), projection.shape[-1]
    own_heads = encoder.blocks[0].attn.heads
    moco_small = arch == "vit_small_moco" or form.name == "MoCo v3" and dim == 384
    names = [name for name, sizes in ARCHITECTURES.items() if moco_small == name.endswith("moco")
             and (sizes["dim"], sizes["depth"]) == (dim, depth)]
    heads = 12 if moco_small else ARCHITECTURES[names[0]]["heads"] if names else own_heads
    fits = (dim, depth, heads, patch_size) == (encoder.dim, len(encoder.blocks), own_heads,
                                               encoder.patch_size)
    advice = f"; give --arch {names[0]} --patch-size {patch_size}" if names else ""
    require(fits, f"{where} ({form.name}): width {dim}, {depth} layers, {heads} heads, patches of "
            f"{patch_size} px do not fit the encoder{advice}")


def resize_positions(positions, side):
    """(1, 1 + n * n, D) -> (1, 1 + side * side, D): bicubic, as in DINO and timm."""
    token, patches = positions[:, :1], positions[:, 1:]
    n = math.isqrt(patches.shape[1])
    if n == side or n * n != patches.shape[1]:  # what is no grid is refused for its shape
        return positions
    grid = rearrange(patches.float(), "1 (rows columns) d -> 1 d rows columns", rows=n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([token, rearrange(grid, "1 d rows columns -> 1 (rows columns) d")], dim=1)
