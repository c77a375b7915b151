"""Published weights, loaded and exported: stand-ins with all names of the released files. And
checkpoints of older versions."""

import argparse
import csv
import json
import pickle
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import ViT_B_16_Weights
from torchvision.models import VisionTransformer as TorchvisionViT

import eval as evaluation
import train
from conftest import Killed, kill_after, same, weights
from data.augment import Preprocessing
from data.datasets import load_data
from lodisc import (IMAGENET_MEAN, IMAGENET_STD, NORMALISATIONS, LoDisc, MoCoV3, UserError,
                    VisionTransformer, load_encoder, patch_importance, resize_positions)

PATCH, SIZE, WIDTH, DEPTH, HEADS = 16, 32, 192, 3, 3
SMALL = ["--image-size", "16", "--batch-size", "12", "--epochs", "1", "--workers", "0",
         "--device", "cpu"]
NARROW = ["--hidden-dim", "32", "--output-dim", "16"]
NANO = ["--arch", "vit_nano", "--patch-size", "8", "--warmup-epochs", "0", *SMALL]


def new_encoder(size=SIZE, patch=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS):
    """Return an encoder with random parameters everywhere, so that swapped tensors are noticed."""
    encoder = VisionTransformer(size, patch, width, depth, heads)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.05)
    return encoder.eval()


def vit_names(depth=DEPTH, scales=()):
    """Return timm's names without the head, also DeiT's and DINO's: 4 + 12 per layer + 2."""
    layer = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
             "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
             "mlp.fc2.weight", "mlp.fc2.bias", *scales]
    return (["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
            + [f"blocks.{i}.{name}" for i in range(depth) for name in layer]
            + ["norm.weight", "norm.bias"])


def mlp_names(linears, affine):
    """Return the names of MoCo v3's heads: linear, BatchNorm, ReLU, ...; affine: the last one's."""
    names = []
    for i in range(linears):
        norm = ["running_mean", "running_var", "num_batches_tracked"]
        norm = (["weight", "bias"] if i < linears - 1 or affine else []) + norm
        names += [f"{3 * i}.weight"] + [f"{3 * i + 1}.{name}" for name in norm]
    return names


def backbone(encoder, prefix=""):
    state = encoder.state_dict()
    assert sorted(state) == sorted(vit_names(len(encoder.blocks)))
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def zeros(names, prefix=""):
    return {prefix + name: torch.zeros(1) for name in names}


def optimizer(count=3):
    return {"state": {i: {"step": torch.zeros(1), "exp_avg": torch.zeros(2)} for i in range(count)},
            "param_groups": [{"lr": 1e-3, "params": list(range(count))}]}


def timm_file(encoder, momentum):
    return {**backbone(encoder), **zeros(["head.weight", "head.bias"])}


def deit_file(encoder, momentum):
    return {"model": timm_file(encoder, momentum)}


def deit_training(encoder, momentum):
    return {**deit_file(encoder, momentum), "optimizer": optimizer(), "epoch": 3,
            "lr_scheduler": {"t": 1}, "model_ema": timm_file(momentum, encoder),
            "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1e-3, data_set="IMNET")}


def moco_file(encoder, momentum):
    head = ["head." + name for name in mlp_names(3, affine=False)]
    state = {**backbone(encoder, "module.base_encoder."), **zeros(head, "module.base_encoder."),
             **backbone(momentum, "module.momentum_encoder."),
             **zeros(head, "module.momentum_encoder."),
             **zeros(mlp_names(2, affine=False), "module.predictor.")}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": optimizer(),
            "scaler": {"scale": 65536.0, "_growth_tracker": 0}}


def moco_linear(encoder, momentum):
    state = {**backbone(encoder, "module."), **zeros(["module.head.weight", "module.head.bias"])}
    return {"epoch": 90, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(76.7),
            "optimizer": optimizer()}


def dino_file(encoder, momentum):
    head = [f"mlp.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")]
    head += ["last_layer.weight_g", "last_layer.weight_v"]
    return {"student": {**backbone(encoder, "module.backbone."), **zeros(head, "module.head.")},
            "teacher": {**backbone(momentum, "backbone."), **zeros(head, "head.")},
            "optimizer": optimizer(), "epoch": 100, "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 5)}, "fp16_scaler": {"scale": 1.0}}


def sizes(encoder):
    return dict(image_size=encoder.image_size, patch_size=encoder.patch_size, dim=encoder.dim,
                depth=len(encoder.blocks), heads=encoder.blocks[0].attn.heads)


def run_file(encoder, momentum):
    heads = [f"{head}.0.weight" for head in ("projector", "predictor", "momentum_projector")]
    return {"model": {**backbone(encoder, "encoder."), **backbone(momentum, "momentum_encoder."),
                      **zeros(heads)},
            "optimizer": optimizer(), "random": torch.get_rng_state(), "step": 3, "scaler": {},
            "film": [(0, torch.zeros(8, 4, dtype=torch.bool))],
            "config": {**sizes(encoder), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
            "history": [{"epoch": 1, "total": 3.0}]}


FILES = {  # name: (contents, prefix of the online encoder, what is left out of it)
    "timm": (timm_file, "", "head"),
    "DeiT": (deit_file, "model.", "head"),
    "DeiT, training": (deit_training, "model.", "head"),
    "MoCo v3": (moco_file, "state_dict.module.base_encoder.", "head"),
    "MoCo v3, linear": (moco_linear, "state_dict.module.", "head"),
    "DINO": (dino_file, "student.module.backbone.", "nothing"),
    "DINO, backbone": (lambda encoder, momentum: backbone(encoder), "", "nothing"),
    "LoDisc": (run_file, "model.encoder.", "nothing"),
}


@pytest.mark.parametrize("name", FILES)
def test_load_encoder_reads_published_formats(tmp_path, name):
    contents, prefix, left_out = FILES[name]
    base, momentum = new_encoder(), new_encoder()
    path = tmp_path / "file.pth"
    torch.save(contents(base, momentum), path)
    images = torch.randn(2, 3, SIZE, SIZE)
    state = torch.get_rng_state()
    encoder = load_encoder(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert sizes(encoder) == sizes(base) and not encoder.training
    assert torch.equal(encoder(images), base(images))
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    of_a_run = name == "LoDisc"
    stated = "stated" if of_a_run else "assumed"
    assert encoder.source == (
        f"{path}: timm's names, {prefix}*, {DEPTH} layers of width 192, 3 heads ({stated}), 0 "
        f"registers, 2 x 2 positions, mean {encoder.mean}, std {encoder.std} ({stated}); left out: "
        f"{left_out}")
    assert tuple(encoder.mean) == ((0.1, 0.2, 0.3) if of_a_run else IMAGENET_MEAN)
    assert tuple(encoder.std) == ((0.4, 0.5, 0.6) if of_a_run else IMAGENET_STD)
    assert bool(encoder.config) == of_a_run
    if name in ("MoCo v3", "DINO", "LoDisc", "DeiT, training"):
        encoder = load_encoder(path, use_momentum=True)
        assert torch.equal(encoder(images), momentum(images))
        assert re.search(r": timm's names, \S*(momentum_encoder|teacher\.backbone|ema)\.\*, ",
                         encoder.source)
    else:
        with pytest.raises(UserError, match="has no momentum encoder"):
            load_encoder(path, use_momentum=True)


@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvision_features_are_equal(tmp_path, wrapped):
    theirs = TorchvisionViT(SIZE, PATCH, num_layers=11, num_heads=HEADS, hidden_dim=WIDTH,
                            mlp_dim=4 * WIDTH)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = theirs.state_dict()
    if wrapped:  # torchvision's own training script, older names of the MLP
        state = {"module." + name.replace("mlp.0.", "mlp.linear_1.").replace(
            "mlp.3.", "mlp.linear_2."): tensor for name, tensor in state.items()}
        state = {"model": state, "args": argparse.Namespace(lr=0.1), "optimizer": optimizer()}
    torch.save(state, tmp_path / "vit.pth")
    theirs.heads = nn.Identity()
    encoder = load_encoder(tmp_path / "vit.pth")
    images = torch.randn(2, 3, SIZE, SIZE)
    assert (encoder(images) - theirs.eval()(images)).abs().max() < 1e-5
    place = "model.module." if wrapped else ""
    assert f": torchvision's names, {place}*, 11 layers of width {WIDTH}, " in encoder.source
    assert encoder.source.endswith("; left out: heads")


# --- DINOv2 -----------------------------------------------------------------------------------


def dinov2_file(dtype, depth=2, width=384, side=37):
    """Return tensors with dinov2_vits14_pretrain.pth's names and sizes, except for the depth."""
    shapes = {**{name: tensor.shape for name, tensor in
                 new_encoder(14 * side, 14, width, depth, 6).state_dict().items()},
              **{f"blocks.{i}.ls{j}.gamma": (width,) for i in range(depth) for j in (1, 2)},
              "mask_token": (1, width)}
    assert sorted(shapes) == sorted(vit_names(depth, ("ls1.gamma", "ls2.gamma")) + ["mask_token"])
    state = {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    for name in state:
        if "norm" in name and "weight" in name or "gamma" in name:
            state[name] += 0.5
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def dinov2_features(state, images, heads=6, patch=14):
    """Compute DINOv2's features with explicit layer scale, as in the released code."""
    state = {name: tensor.float() for name, tensor in state.items()}
    positions, side = state["pos_embed"], images.shape[-1] // patch
    grid = positions[0, 1:].T.reshape(1, -1, 37, 37)
    if side != 37:
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"],
                 stride=patch)
    x = (x + grid).flatten(2).transpose(1, 2)
    x = torch.cat([(state["cls_token"] + positions[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)

    for i in range(len([name for name in state if name.endswith("ls1.gamma")])):
        block = f"blocks.{i}."
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        attended = linear(attended.transpose(1, 2).flatten(2), block + "attn.proj")
        x = x + state[block + "ls1.gamma"] * attended
        inner = F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"))
        x = x + state[block + "ls2.gamma"] * linear(inner, block + "mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("dtype, image_size", [(torch.float32, 98), (torch.float16, 518)])
@torch.no_grad()
def test_dinov2_features_equal_explicit_layer_scale(tmp_path, dtype, image_size):
    state = dinov2_file(dtype)
    torch.save(state, tmp_path / "vits14.pth")
    encoder = load_encoder(tmp_path / "vits14.pth", image_size=image_size)
    assert sizes(encoder) == dict(image_size=image_size, patch_size=14, dim=384, depth=2, heads=6)
    assert encoder.source.endswith("; left out: mask_token")
    images = torch.randn(2, 3, image_size, image_size)
    expected = dinov2_features(state, images)
    assert (encoder(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert load_encoder(tmp_path / "vits14.pth").image_size == 518


# --- registers, and other names ---------------------------------------------------------------


@torch.no_grad()
def registers_forward(state, images, patch, heads, registers):
    """Compute a ViT with registers by timm's tensors -> (class token, patch tokens, registers, and
    attention of all layers, (B, heads, T, T)): a forward of its own, by matrix products."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"],
                 stride=patch).flatten(2).transpose(1, 2)
    batch, n, dim = x.shape
    positions = state["pos_embed"][0]
    if len(positions) == n:  # none of the class token
        positions = torch.cat([torch.zeros(1, dim), positions])
    first = (state["cls_token"][0] + positions[:1]).expand(batch, 1, dim)
    x = torch.cat([first, state["reg_token"].expand(batch, registers, dim), x + positions[1:]], 1)
    attentions = []

    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * state[name + ".weight"] + state[name + ".bias"]

    for i in range(len([name for name in state if name.endswith("norm1.bias")])):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.view(batch, -1, heads, dim // heads).transpose(1, 2) for part in (q, k, v))
        attention = (q @ k.mT / (dim // heads) ** 0.5).softmax(-1)
        attentions.append(attention)
        x = x + linear((attention @ v).transpose(1, 2).reshape(x.shape), f"blocks.{i}.attn.proj")
        inner = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(inner, f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm")
    return x[:, 0], x[:, 1 + registers:], x[:, 1:1 + registers], attentions


@pytest.fixture(params=[(4, "reg_token", False), (1, "register_tokens", True)])
def with_registers(request, tmp_path):
    """Return (an encoder with registers from a file of timm's or DINOv2's names, its tensors)."""
    registers, name, has_class_position = request.param
    encoder = VisionTransformer(SIZE, 8, 192, 3, 3, registers=registers)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(encoder.reg_token, std=5.0)  # they draw attention
    state = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    if not has_class_position:
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    file = {(name if key == "reg_token" else key): tensor for key, tensor in state.items()}
    torch.save(file, tmp_path / "registers.pth")
    return load_encoder(tmp_path / "registers.pth"), state, registers


def test_registers_never_count(with_registers):
    """Features, attention, importance, mask, patch mean and part segmentation's patches equal those
    of a forward in this file."""
    encoder, state, registers = with_registers
    images = torch.randn(2, 3, SIZE, SIZE)
    feature, patches, register_tokens, attentions = registers_forward(state, images, 8, 3,
                                                                      registers)
    assert encoder.sizes["registers"] == registers and f", {registers} registers," in encoder.source
    with torch.no_grad():
        assert torch.allclose(encoder(images), feature, atol=1e-4)
        assert torch.allclose(encoder.tokens(images)[1], patches, atol=1e-4)
        for kind, expected in (("mean", patches.mean(1)), ("patches", patches)):
            assert torch.allclose(evaluation.encode(encoder, images, kind), expected, atol=1e-4)
        means = [attention.mean(1) for attention in attentions]  # (B, T, T)
        _, rows = encoder.with_attention(images, "row")
        _, matrices = encoder.with_attention(images, "matrix")
        for mean, row, matrix in zip(means, rows, matrices):
            assert torch.allclose(row, mean[:, 0, 1 + registers:], atol=1e-5)
            assert torch.allclose(matrix, mean, atol=1e-5) and row.shape == (2, 16)
        rollout = torch.eye(17 + registers)
        for mean in means:
            rollout = (mean + torch.eye(17 + registers)) / 2 @ rollout
        product = torch.stack([mean[:, 0].log() for mean in means]).sum(0)
        expected = {"product": product, "last": means[-1][:, 0], "rollout": rollout[:, 0]}
        for name, importance in expected.items():
            features, measured = patch_importance(encoder, images, name)
            assert measured.shape == (2, 16) and torch.allclose(features, feature, atol=1e-4)
            assert torch.allclose(measured, importance[:, 1 + registers:], atol=1e-4)
        model = LoDisc(encoder, hidden_dim=8, output_dim=8)
        _, mask = model.key_and_mask(images)
        kept = product[:, 1 + registers:].topk(4).indices
        assert mask.shape == (2, 16) and mask.sum() == 8 and mask.gather(1, kept).all()
        assert torch.equal(model.pivotal_patches(images), mask)
    assert not torch.allclose(register_tokens.mean(1), patches.mean(1), atol=0.1)  # they differ


def test_registers_stay_when_patches_are_dropped(with_registers):
    encoder, state, registers = with_registers
    images, keep = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[1, 5, 6], [0, 2, 15]])
    seen = []
    encoder.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert encoder.tokens(images, keep)[1].shape == (2, 3, 192)
    assert seen == [(2, 1 + registers + 3, 192)]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("with_registers", [(4, "reg_token", False)], indirect=True)
def test_registers_are_trained_stored_and_resumed(with_registers, flowers, tmp_path, capsys):
    encoder, _, registers = with_registers
    train.main(["--data", str(flowers / "train"), "--init", str(tmp_path / "registers.pth"),
                *SMALL, *NARROW, "--encoder-lr", "0.01", "--out", "run"])
    trained = load_encoder("run")
    assert trained.sizes == encoder.sizes and trained.sizes["registers"] == registers
    assert not torch.equal(trained.reg_token, encoder.reg_token)
    train.main(["--resume", "run"])
    model = evaluation.build_model(torch.load("run/checkpoint.pt", weights_only=True)["config"],
                                   fresh=False)
    assert model.encoder.reg_token.shape == (1, registers, 192)
    run_eval("export", "run")
    assert f"reg_tokens={registers}, no_embed_class=True" in capsys.readouterr().out
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_encoder("run/encoder.pth")(images), trained(images))


HUB = {  # timm's names: those in files of the Hub, those that version 5's state_dict() gives
    "cls_token": ("embeddings.cls_token",) * 2,
    "pos_embed": ("embeddings.position_embeddings",) * 2,
    "reg_token": ("embeddings.register_tokens",) * 2,
    "patch_embed.proj.": ("embeddings.patch_embeddings.projection.",) * 2,
    "blocks.(\\d+).norm1.": (r"encoder.layer.\1.layernorm_before.", r"layers.\1.layernorm_before."),
    "blocks.(\\d+).norm2.": (r"encoder.layer.\1.layernorm_after.", r"layers.\1.layernorm_after."),
    "blocks.(\\d+).attn.proj.": (r"encoder.layer.\1.attention.output.dense.",
                                r"layers.\1.attention.o_proj."),
    "blocks.(\\d+).mlp.fc1.": (r"encoder.layer.\1.intermediate.dense.", r"layers.\1.mlp.fc1."),
    "blocks.(\\d+).mlp.fc2.": (r"encoder.layer.\1.output.dense.", r"layers.\1.mlp.fc2."),
    "norm.": ("layernorm.",) * 2,
}
QKV = (tuple(rf"encoder.layer.\1.attention.attention.{x}." for x in ("query", "key", "value")),
       tuple(rf"layers.\1.attention.{part}_proj." for part in "qkv"))


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("prefix", ["", "vit.", "model.vit."])
def test_names_of_hugging_face(tmp_path, version, prefix):
    """Stand-ins by the names in their files; test_originals.py has the library's own."""
    base, file = new_encoder(depth=2), {f"{prefix}classifier.weight": torch.zeros(3)}
    for name, tensor in base.state_dict().items():
        match = re.fullmatch(r"blocks.(\d+).attn.qkv.(.*)", name)
        if match:
            for part, theirs in zip(tensor.chunk(3), QKV[version]):
                file[prefix + match.expand(theirs) + match[2]] = part.clone()
            continue
        for pattern, theirs in HUB.items():
            if re.match(pattern, name):
                file[prefix + re.sub("^" + pattern, theirs[version], name)] = tensor
                break
    assert len(file) == 1 + len(base.state_dict()) + 2 * 4
    torch.save(file, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6, "layer_norm_eps": 1e-12}')
    encoder, images = load_encoder(tmp_path), torch.randn(2, 3, SIZE, SIZE)
    for block in base.blocks:
        block.attn.heads = 6
    for module in base.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    assert torch.equal(encoder(images), base(images)) and encoder.norm.eps == 1e-12
    assert encoder.source.endswith("left out: classifier")


WRAPPERS = {  # name: function of a state dict -> file's contents
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 3},
    "net": lambda s: {"net": s}, "encoder alone": lambda s: {"encoder": s},
    "deeper": lambda s: {"a": {"b": {"c": s}}, "epoch": 3},
    "teacher alone": lambda s: {"teacher": {
        **{f"backbone.{name}": tensor for name, tensor in s.items()},
        "dino_head.mlp.0.weight": torch.zeros(3)}},
    "backbone": lambda s: {f"backbone.{name}": tensor for name, tensor in s.items()},
    "Lightning": lambda s: {"state_dict": {**{f"model.{name}": t for name, t in s.items()},
                                           "criterion.weight": torch.zeros(3)},
                            "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 0.1}},
    "compiled": lambda s: {f"_orig_mod.{name}": tensor for name, tensor in s.items()},
    "compiled blocks": lambda s: {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): tensor
                                  for name, tensor in s.items()},
    "FSDP": lambda s: {re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", name): tensor
                       for name, tensor in s.items()},
    "parallel": lambda s: {f"module.encoder.{name}": tensor for name, tensor in s.items()},
    "chunks": lambda s: {re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.",
                                name): tensor for name, tensor in s.items()},
    "MAE": lambda s: {"model": s | zeros(["mask_token", "decoder_pos_embed", "decoder_embed.weight",
                                          "decoder_blocks.0.norm1.weight", "decoder_norm.bias",
                                          "decoder_pred.weight"])},
    "iBOT": lambda s: {"state_dict": s | zeros(["masked_embed", "head.mlp.0.weight"])},
    "EMA first": lambda s: {"model_ema": {name: torch.ones_like(tensor) for name, tensor in
                                          s.items()}, "model": s},
    "DeiT III": lambda s: {"model": {
        **{name: tensor for name, tensor in s.items() if name != "pos_embed"},
        "cls_token": s["cls_token"] + s["pos_embed"][:, :1], "pos_embed": s["pos_embed"][:, 1:],
        **{f"blocks.{i}.gamma_{j}": torch.ones(WIDTH) for i in range(4) for j in (1, 2)}}},
    "parameters": lambda s: {name: nn.Parameter(tensor) for name, tensor in s.items()},
    "double precision": lambda s: {name: tensor.double() for name, tensor in s.items()},
    "numbers of numpy": lambda s: {"model": s, "loss": np.float64(0.3), "step": np.int64(3),
                                   "best": np.float32(1), "done": np.bool_(True)},
    "paths": lambda s: {"model": s, "out": Path("runs/x"), "pure": PurePosixPath("a"),
                        "windows": PureWindowsPath("a")},
    "defaultdict": lambda s: {"model": s, "meters": defaultdict(list, {"loss": [1.0]}),
                              "counts": defaultdict(int, {"a": 1}), "nested": defaultdict(dict)},
    "namespace": lambda s: {"model": s, "args": argparse.Namespace(out=Path("x"),
                                                                   lr=np.float64(1))},
    "MoCo v1's names": lambda s: {
        **{f"encoder_k.{n}": torch.ones_like(t) for n, t in s.items()},
        **{f"encoder_q.{n}": t for n, t in s.items()}},
    "EMA in capitals": lambda s: {"state_dict_EMA": {n: torch.ones_like(t) for n, t in s.items()},
                                  "state_dict": s},
    "a decoder with a class token": lambda s: {
        **{f"decoder.{n}": torch.ones_like(t) for n, t in s.items()},
        **{f"encoder.{n}": t for n, t in s.items()}},
    "options of an optimiser": lambda s: {"model": s, "config": {"eps": 1e-8, "dim": 256,
                                                                 "mean": 0.0, "std": 0.02}},
    "keys that are no text": lambda s: {"model": s, 3: {0: torch.zeros(2)}, None: 4},
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_wrapper_and_prefix_is_read(tmp_path, name):
    base = new_encoder(depth=4)
    torch.save(WRAPPERS[name](backbone(base)), tmp_path / "file.pth")
    encoder, images = load_encoder(tmp_path / "file.pth"), torch.randn(2, 3, SIZE, SIZE)
    assert (encoder(images) - base(images)).abs().max() < 1e-5
    left_out = {"MAE": "mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, "
                "decoder_norm, decoder_pred", "iBOT": "masked_embed, head"}.get(name, "nothing")
    assert encoder.source.endswith(f"left out: {left_out}")


def test_files_of_numpy_1_and_of_windows_are_read(tmp_path):
    """Names under which older and other systems store numbers and paths."""
    contents = {"model": backbone(new_encoder(depth=1)), "loss": np.float64(0.3), "out": Path("a")}
    torch.save(contents, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "file.pth").read_bytes()
    kind = type(Path()).__name__.encode()
    module = type(Path()).__module__.encode()
    for numpy_module, path_name in ((b"numpy.core.multiarray", b"pathlib\nWindowsPath"),
                                    (b"numpy._core.multiarray", b"pathlib._local\nPosixPath")):
        changed = data.replace(b"cnumpy._core.multiarray", b"c" + numpy_module)
        changed = changed.replace(b"c" + module + b"\n" + kind, b"c" + path_name)
        (tmp_path / "changed.pth").write_bytes(changed)
        assert load_encoder(tmp_path / "changed.pth").dim == WIDTH


# --- safetensors ------------------------------------------------------------------------------

KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64", torch.bool: "BOOL"}


def safetensors(tensors):
    """Return the bytes of a safetensors file, by the format's description."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = bytes(tensor.flatten().view(torch.uint8).tolist())
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_are_read(tmp_path, dtype):
    base = VisionTransformer(16, 8, 192, 1, 3)
    state = {name: tensor.to(dtype) for name, tensor in base.state_dict().items()}
    path = tmp_path / "model.safetensors"
    others = {"head.num_batches_tracked": torch.tensor(3), "head.weight": torch.zeros(0, 48),
              "head.mask": torch.tensor([True, False])}
    path.write_bytes(safetensors({**state, **others}))
    for place in (path, tmp_path):
        loaded = load_encoder(place)
        assert same(loaded.state_dict(), {name: t.float() for name, t in state.items()})
    assert loaded.source.endswith("left out: head")


def spoil_header(change):
    """Return a change of a safetensors file's header."""
    def spoil(data):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + length])
        change(header)
        header = json.dumps(header).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length:]
    return spoil


SPOILT = {
    "empty": lambda data: b"", "text": lambda data: b"not a file of safetensors",
    "half": lambda data: data[:len(data) // 2], "no tensors": lambda data: data[:200],
    "a huge header": lambda data: b"\xff" * 8 + data[8:],
    "a header of another length": lambda data: (5).to_bytes(8, "little") + data[8:],
    "a list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "deep JSON": lambda data: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "an offset after the end": spoil_header(
        lambda header: header["cls_token"].update(data_offsets=[0, 10**12])),
    "an offset before the body": spoil_header(
        lambda header: header["cls_token"].update(data_offsets=[-768, 0])),
    "another shape": spoil_header(lambda header: header["cls_token"].update(shape=[1, 1, 191])),
    "a negative shape": spoil_header(lambda header: header["cls_token"].update(shape=[-1, -192])),
    "no shape": spoil_header(lambda header: header["cls_token"].pop("shape")),
    "another type": spoil_header(lambda header: header["cls_token"].update(dtype="F8_E4M3")),
    "a number as an entry": spoil_header(lambda header: header.update(cls_token=3)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_damaged_safetensors_are_one_line(tmp_path, name):
    state = VisionTransformer(16, 8, 192, 1, 3).state_dict()
    path = tmp_path / "model.safetensors"
    path.write_bytes(SPOILT[name](safetensors(state)))
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read; expected") as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)


# --- tensors that do not fit, and invalid files -----------------------------------------------


MISFITS = {  # name: (change of a timm state dict, match)
    "second token": (lambda s: s | zeros(["dist_token", "head_dist.weight"]),
                     r'"dist_token"'),
    "a register's shape": (lambda s: s | {"register_tokens": torch.zeros(1, 4, 3)},
                           r"size.*reg_token"),
    "relative positions": (lambda s: s | zeros(["blocks.0.attn.relative_position_bias_table"]),
                           r'"blocks\.0\.attn\.relative_position_bias_table"'),
    "another norm": (lambda s: s | zeros(["fc_norm.weight"]), r'"fc_norm\.weight"'),
    "q norm": (lambda s: s | zeros(["blocks.3.attn.q_norm.weight"]),
               r'"blocks\.3\.attn\.q_norm\.weight"'),
    "a part": (lambda s: {n: t for n, t in s.items() if n != "blocks.3.attn.qkv.bias"},
               r'[Mm]issing.*"blocks\.3\.attn\.qkv\.bias"'),
    "no positions": (lambda s: {n: t for n, t in s.items() if n != "pos_embed"}, "pos_embed"),
    "no patches": (lambda s: {n: t for n, t in s.items() if n != "patch_embed.proj.weight"},
                   r"it lacks patch_embed\.proj\.weight"),
    "itself": (lambda s: (lambda d: d.update(again=d) or d)({"norm.weight": torch.ones(3)}),
               "no ViT of a known format"),
    "another shape": (lambda s: s | {"norm.weight": torch.zeros(3)}, r"size.*norm\.weight"),
    "no grid": (lambda s: s | {"pos_embed": torch.zeros(1, 6, WIDTH)}, "size.*pos_embed"),
    "another kind of patches": (lambda s: s | {"patch_embed.proj.weight": torch.zeros(3, 3)},
                                "does not fit the encoder"),
    "no ViT": (lambda s: zeros(["fc.weight", "fc.bias"]), "no ViT of a known format"),
    "no tensors": (lambda s: {"epoch": 3}, "no ViT of a known format"),
    "a number": (lambda s: {"model": 3}, "no ViT of a known format"),
    "a tensor": (lambda s: torch.zeros(3), "cannot be read; expected tensors"),
    "a gated MLP": (lambda s: {n: t for n, t in s.items() if ".fc2." not in n}
                    | {"blocks.0.ls2.gamma": torch.ones(WIDTH)}, r"blocks\.0\.mlp\.fc2\.weight"),
    "flat positions": (lambda s: s | {"pos_embed": torch.zeros(5)}, "does not fit the encoder"),
    "whole numbers": (lambda s: s | {"norm.weight": torch.ones(WIDTH, dtype=torch.int8)},
                      r"norm\.weight is of torch\.int8, not floating point"),
    "not a number": (lambda s: s | {"norm.bias": torch.full((WIDTH,), float("nan"))},
                     r"norm\.bias has values that are not finite"),
    "infinity": (lambda s: s | {"cls_token": torch.full((1, 1, WIDTH), float("inf"))},
                 "cls_token has values that are not finite"),
    "complex numbers": (lambda s: s | {"norm.bias": torch.zeros(WIDTH, dtype=torch.complex64)},
                        r"torch\.complex64, not floating point"),
    "a key that is no text": (lambda s: s | {7: torch.zeros(3)}, '[Uu]nexpected.*"7"'),
    "another project's heads": (lambda s: {"model": s, "config": {"heads": "auto"}},
                                "does not fit the encoder"),
    "another project's sizes": (lambda s: {"model": s, "config": {"num_heads": 3,
                                                                  "hidden_size": 768}},
                                "states width 768, expected 192"),
    "another project's mean": (lambda s: {"model": s, "config": {"heads": 3, "mean": "imagenet",
                                                                 "std": 1}},
                               "does not fit the encoder"),
    "a mean of one channel": (lambda s: {"model": s, "config": {"heads": 3, "mean": [0.5],
                                                                "std": [0.5]}},
                              "expected mean and std of 3 channels"),
    "a std of zero": (lambda s: {"model": s, "config": {"heads": 3, "mean": [0.5] * 3,
                                                               "std": [0.5, 0, 1]}},
                      "expected mean and std of 3"),
    "a mean that is no number": (lambda s: {"model": s, "config": {
        "heads": 3, "mean": [float("nan")] * 3, "std": [0.5] * 3}}, "expected mean and std of 3"),
    "heads as text": (lambda s: {"model": s, "config": {"heads": "3"}}, "unknown.*stated: '3'"),
    "eps as text": (lambda s: {"model": s, "config": {"heads": 3, "eps": "small"}}, "'small'"),
    "SwiGLU": (lambda s: s | zeros(["blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"]),
               r"mlp\.w12.*SwiGLU"),
    "one tensor twice": (lambda s: s | {"_orig_mod.norm.weight": s["norm.weight"] * 5},
                         "norm.weight is there twice"),
    "a bare model and a wrapped one": (lambda s: s | {"module." + n: t for n, t in s.items()},
                                       "is there twice"),
    "an eps of attacks": (lambda s: {"model": s, "config": {"heads": 3, "eps": 3.0}}, "small eps"),
    "a flag for heads": (lambda s: {"model": s, "config": {"heads": True}}, "stated: True"),
    "mean alone": (lambda s: {"model": s, "config": {"heads": 3, "mean": [0.5] * 3}},
                   "expected mean and std"),
    "levels of bytes": (lambda s: {"model": s, "config": {
        "heads": 3, "mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}}, r"in \[0, 1\]"),
    "a patch of nothing": (lambda s: s | {"patch_embed.proj.weight": torch.zeros(0, 3, 16, 16)},
                           "does not fit the encoder"),
    "rotary positions": (lambda s: s | zeros(["rope_embed.periods"]), "rope.*rotary positions"),
    "no class token": (lambda s: {"model": {"a": {"b.weight": s["norm.weight"]}}, "epoch": 3},
                       r"no tensor's name ends in cls_token; its keys: .'model', 'epoch'., its "
                       r"tensors: .'model\.a\.b\.weight'."),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_named_in_one_line(tmp_path, name):
    change, match = MISFITS[name]
    path = tmp_path / "file.pth"
    torch.save(change(backbone(new_encoder(depth=4))), path)
    with pytest.raises(UserError, match=match) as caught:
        load_encoder(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_invalid_files_raise(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_encoder(tmp_path / "none.pth")
    with pytest.raises(UserError, match="no such file"):  # a folder without checkpoint.pt
        load_encoder(tmp_path)
    (tmp_path / "text.pth").write_text("not a file of torch.save")
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(tmp_path / "text.pth")
    torch.save(backbone(new_encoder()), tmp_path / "half.pth")
    whole = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(tmp_path / "half.pth")


def test_number_of_heads(tmp_path):
    path = tmp_path / "file.pth"

    def heads(contents):
        torch.save(contents, path)
        return load_encoder(path).blocks[0].attn.heads

    small = new_encoder(width=384, depth=1, heads=12)
    assert heads(moco_file(small, small)) == 12  # MoCo v3's own ViT-S
    assert heads(deit_file(small, small)) == heads(dino_file(small, small)) == 6
    assert heads(run_file(small, small)) == 12
    assert heads({**run_file(small, small), "config": {"heads": 4}}) == 4
    with pytest.raises(UserError, match=r"states image size \[64\], expected \[32\]"):
        heads({**run_file(small, small), "config": {"heads": 4, "image_size": 64}})
    nano = new_encoder(width=96, depth=1, heads=3)
    assert heads(run_file(nano, nano)) == 3
    assert heads({"state_dict": backbone(nano), "config": sizes(nano)}) == 3
    with pytest.raises(UserError, match="number of heads of width 96 is unknown: give --heads"):
        heads(backbone(nano))
    encoder = load_encoder(path, heads=3)
    assert encoder.blocks[0].attn.heads == 3 and "3 heads (given)" in encoder.source


@pytest.mark.parametrize("width, heads", [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_of_published_widths(tmp_path, width, heads):
    """A ViT-H has heads of 80, so width / 64 is not their number."""
    encoder = VisionTransformer(16, 16, width, 1, heads)
    torch.save(backbone(encoder), tmp_path / "file.pth")
    loaded = load_encoder(tmp_path / "file.pth")
    assert loaded.blocks[0].attn.heads == heads and f", {heads} heads (assumed)" in loaded.source


@pytest.mark.parametrize("contents", [
    lambda small: {**moco_linear(small, small), "arch": "vit_small"},  # MoCo v3's linear probe
    lambda small: {"state_dict": backbone(small, "module.base_encoder.")}])
def test_moco_small_has_twelve_heads(tmp_path, contents):
    small = new_encoder(width=384, depth=1, heads=12)
    torch.save(contents(small), tmp_path / "file.pth")
    loaded, images = load_encoder(tmp_path / "file.pth"), torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(loaded(images), small(images)) and "12 heads (assumed)" in loaded.source
    assert load_encoder(tmp_path / "file.pth", heads=6).blocks[0].attn.heads == 6  # as given


def test_arch_of_another_publisher_is_not_mocos(tmp_path):
    small = new_encoder(width=384, depth=1, heads=6)
    torch.save({"arch": "vit_small_patch16_224", "state_dict": backbone(small)}, tmp_path / "f.pth")
    assert load_encoder(tmp_path / "f.pth").blocks[0].attn.heads == 6


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.usefixtures("elsewhere")
def test_no_code_in_a_file_is_executed():
    torch.save({"model": backbone(new_encoder()), "args": Bomb()}, "bomb.pth")
    with pytest.raises(UserError, match=r"contains \S+, which could run code") as caught:
        load_encoder("bomb.pth")
    assert "\n" not in str(caught.value)
    with open("bare.pth", "wb") as file:
        pickle.dump(Bomb(), file, protocol=2)
    with pytest.raises(UserError):
        load_encoder("bare.pth")
    assert not Path("ran").exists()


@pytest.mark.usefixtures("elsewhere")
def test_pickled_model_is_told_to_save_its_state_dict():
    torch.save(new_encoder(depth=1), "model.pth")
    torch.save({"model": nn.Linear(3, 3)}, "linear.pth")
    for name, found in (("model.pth", r"lodisc\.Vision"), ("linear.pth", r"torch\.nn\.")):
        with pytest.raises(UserError, match=rf"contains {found}.*torch\.save\(model\.state_dict"):
            load_encoder(name)


def test_config_that_contradicts_the_grid_is_an_error(tmp_path):
    """Positions of 16 x 9 patches look like those of 12 x 12."""
    state = backbone(new_encoder(12 * PATCH, depth=1))
    torch.save(state, tmp_path / "file.pth")
    assert "12 x 12 positions" in load_encoder(tmp_path / "file.pth").source
    (tmp_path / "config.json").write_text('{"image_size": [256, 144]}')
    with pytest.raises(UserError, match=r"states image size \[144, 256\], expected \[192\]"):
        load_encoder(tmp_path / "file.pth")
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"input_size": [3, 192, 192]}}')
    load_encoder(tmp_path / "file.pth")
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(UserError, match="does not fit the encoder") as error:
        load_encoder(tmp_path / "file.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("contents, says", [
    ('{"do_normalize": false}', "states do_normalize False, expected True"),
    ('{"do_rescale": false, "image_mean": [0, 0, 0]}', "states do_rescale False"),
    ('{"image_mean": "123", "image_std": "123"}', "expected mean and std"), ("[1]", "fit"),
    ('{"image_size": {"height": 32}}', "states image size"),
    ('{"layer_norm_eps": 1' + 400 * "0" + "}", "too large"), ('{"model_args": 3}', "mapping")])
def test_config_that_cannot_be_followed_is_one_line(tmp_path, contents, says):
    torch.save(backbone(new_encoder(depth=1)), tmp_path / "file.pth")
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(UserError, match=says) as error:
        load_encoder(tmp_path / "file.pth")
    assert "\n" not in str(error.value)


def test_paths_that_cannot_be_opened_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        load_encoder("a" * 5000)
    torch.save(backbone(new_encoder(depth=1)), tmp_path / "file.pth")
    (tmp_path / "config.json").write_text("{}")

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)  # as root nothing is refused
    with pytest.raises(UserError, match="Permission denied.*config.json"):
        load_encoder(tmp_path / "file.pth")


def test_normalisation_is_stated_given_or_assumed(tmp_path):
    path = tmp_path / "file.pth"
    torch.save(backbone(new_encoder(depth=1)), path)
    for normalise, origin in ((None, "assumed"), ("half", "given"), ("clip", "given")):
        encoder = load_encoder(path, normalise=normalise)
        assert (encoder.mean, encoder.std) == NORMALISATIONS[normalise or "imagenet"]
        assert f"mean {encoder.mean}, std {encoder.std} ({origin})" in encoder.source
    assert NORMALISATIONS["half"] == ((0.5, 0.5, 0.5),) * 2
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    encoder = load_encoder(path)
    assert encoder.mean == (0.5, 0.5, 0.5) and "(stated); left out" in encoder.source
    assert load_encoder(path, normalise="half").mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="states mean .*expected .0.485"):
        load_encoder(path, normalise="imagenet")


@pytest.mark.usefixtures("elsewhere")
def test_normalisation_is_kept_in_runs_and_exports(flowers, capsys):
    torch.save(backbone(new_encoder(depth=1)), "file.pth")
    train.main(["--data", str(flowers / "train"), "--init", "file.pth", "--normalise", "half",
                *SMALL, *NARROW, "--out", "run"])
    assert "std (0.5, 0.5, 0.5) (given)" in capsys.readouterr().out
    run_eval("export", "run")
    run_eval("export", "file.pth", "--normalise", "half", "--image-size", "32")
    for path in ("run", "run/encoder.pth", "encoder.pth"):
        assert load_encoder(path).mean == load_encoder(path).std == (0.5, 0.5, 0.5)
    run_eval("masks", "file.pth", next((flowers / "test").rglob("*.jpg")), "--normalise", "clip",
             "--image-size", "32", "--heads", "3")
    assert "mean (0.48145466," in capsys.readouterr().out


# --- positions --------------------------------------------------------------------------------


def test_resize_positions_keeps_the_geometry():
    row = torch.linspace(0, 1, 14)
    positions = torch.zeros(1, 1 + 14 * 14, 2)
    positions[0, 0] = 7
    positions[0, 1:, 0] = row.repeat(14)  # channel 0 grows along a row, channel 1 down a column
    positions[0, 1:, 1] = row.repeat_interleave(14)
    for side in (6, 28):
        resized = resize_positions(positions, side)
        assert resized.shape == (1, 1 + side * side, 2) and (resized[0, 0] == 7).all()
        grid = resized[0, 1:].reshape(side, side, 2)
        middle = (torch.arange(side) + 0.5) * 14 / side - 0.5  # new centres in old patches
        inner = slice(side // 6, side - side // 6)
        assert (grid[0, inner, 0] - middle[inner] / 13).abs().max() < 0.01
        assert (grid[inner, 0, 1] - middle[inner] / 13).abs().max() < 0.01
    assert resize_positions(positions, 14) is positions


def test_image_size_interpolates_positions(tmp_path):
    base = new_encoder(64)
    torch.save(backbone(base), tmp_path / "file.pth")
    encoder = load_encoder(tmp_path / "file.pth", image_size=SIZE)
    assert encoder.image_size == SIZE
    assert encoder(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, WIDTH)
    state = base.state_dict() | {"pos_embed": resize_positions(base.pos_embed.detach(), 2)}
    assert same(encoder.state_dict(), state)
    with pytest.raises(UserError, match="multiple of the patch size, got 40 px"):
        load_encoder(tmp_path / "file.pth", image_size=40)


# --- --init -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("elsewhere")
def test_init_trains_all_weights_of_the_file(flowers, capsys):
    file = new_encoder(24, 8, 96, 4, 3)
    torch.save({"state_dict": file.state_dict(), "config": sizes(file)}, "nano.pth")
    options = ["--data", str(flowers / "train"), *SMALL, "--init", "nano.pth"]
    for wrong in (["--patch-size", "16"], ["--arch", "vit_tiny"]):
        with pytest.raises(UserError, match=rf"{' '.join(wrong)} disagrees .*nano\.pth, which has"):
            train.main([*options, *wrong, "--out", "run"])
        assert not Path("run").exists()
    train.main([*options, "--encoder-lr", "0.01", "--out", "run"])
    assert "weights of " in capsys.readouterr().out
    config = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    assert (config["arch"], config["patch_size"]) == ("vit_nano", 8)
    model = train.build_model(config)
    start = model.encoder.state_dict()
    assert same(start, model.momentum_encoder.state_dict())  # copied after loading
    assert same(start, file.state_dict() | {
        "pos_embed": resize_positions(file.pos_embed.detach(), 2)})
    trained = weights("run")
    for name in ("pos_embed", "patch_embed.proj.weight", "cls_token"):
        assert not torch.equal(trained["encoder." + name], start[name])
        assert not torch.equal(trained["momentum_encoder." + name], start[name])
    for prefix, momentum in (("encoder.", False), ("momentum_encoder.", True)):
        state = load_encoder("run", momentum).state_dict()
        assert all(torch.equal(trained[prefix + name], tensor) for name, tensor in state.items())


@pytest.mark.usefixtures("elsewhere")
def test_run_resumes_without_its_init_file(flowers, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "STRENGTHS", (1.0,))
    file = new_encoder(24, 8, 96, 4, 3)
    torch.save({"state_dict": file.state_dict(), "config": sizes(file)}, "nano.pth")
    train.main(["--data", str(flowers), *SMALL, "--init", "nano.pth", "--out", "run"])
    assert '"initial"' in Path("run/eval.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="--resume run: the run has --init .*nano.pth"):
        train.main(["--resume", "run", "--init", "none"])
    Path("nano.pth").unlink()
    capsys.readouterr()
    train.main(["--resume", "run"])
    printed = capsys.readouterr().out
    assert "no row for the initial weights" in printed and "trained" in printed


@pytest.mark.usefixtures("elsewhere")
def test_killed_run_with_init_resumes_bit_exactly(flowers, monkeypatch):
    file = new_encoder(24, 8, 96, 4, 3)
    torch.save({"state_dict": file.state_dict(), "config": sizes(file)}, "nano.pth")
    options = ["--data", str(flowers / "train"), *SMALL, "--epochs", "2", "--init", "nano.pth",
               "--encoder-lr", "0.01"]
    train.main([*options, "--out", "whole"])
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        train.main([*options, "--out", "part"])
    train.main(["--resume", "part"])
    assert same(weights("part"), weights("whole"))


def chosen_config(*arguments):
    """Return the settings of a run of 36 images, before it begins."""
    run = train.Run(arguments)
    run.device = torch.device("cpu")
    run.choose_settings(36)
    return run.config


@pytest.mark.usefixtures("elsewhere")
def test_config_has_the_sizes_of_a_bare_file():
    torch.save(backbone(new_encoder(24, 8, 128, 1, 2)), "bare.pth")
    config = chosen_config("--init", "bare.pth", "--heads", "2")
    assert config["arch"] == "unnamed" and config["image_size"] == 96
    assert [config[name] for name in ("dim", "depth", "heads", "patch_size")] == [128, 1, 2, 8]
    assert (config["mean"], config["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert train.build_model(config).encoder.blocks[0].attn.heads == 2
    config = chosen_config("--init", "bare.pth", "--heads", "4", "--normalise", "half")
    assert config["heads"] == 4 and config["mean"] == config["std"] == [0.5, 0.5, 0.5]
    for options in (["--heads", "4"], ["--normalise", "clip"], ["--init-momentum"]):
        with pytest.raises(UserError, match=f"{options[0]} is for --init"):
            chosen_config(*options)


@pytest.mark.usefixtures("elsewhere")
def test_init_momentum_starts_from_the_momentum_encoder(capsys):
    base, momentum = (new_encoder(16, 8, 192, 1, 3) for _ in range(2))
    torch.save(dino_file(base, momentum), "dino.pth")
    for options, expected in (([], base), (["--init-momentum"], momentum)):
        config = chosen_config("--init", "dino.pth", "--image-size", "16", *options)
        assert ("teacher.backbone.*" in capsys.readouterr().out) == (expected is momentum)
        assert same(train.build_model(config).encoder.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", train.WEIGHTS)
def test_named_weights_are_fetched_from_the_publisher(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    base, calls = new_encoder(depth=1), []

    def fetch(url, **options):
        calls.append((url, options))
        path = tmp_path / "checkpoints" / url.split("/")[-1]
        path.parent.mkdir(exist_ok=True)
        torch.save(backbone(base), path)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    config = chosen_config("--init", name)  # the run's config has the file
    assert same(load_encoder(config["init"]).state_dict(), base.state_dict())
    (url, options), = calls
    assert url == train.WEIGHTS[name] and url.startswith("https://")
    assert (url == ViT_B_16_Weights.IMAGENET1K_V1.url) == (name == "imagenet")
    assert options["check_hash"] == (name == "imagenet") and options["weights_only"]

    def refuse(url, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=f"could not fetch {url} .Name or service.*--init") as error:
        train.weights_file(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("contents", [b"", b"half a file", b"PK\x03\x04 of a zip"])
@pytest.mark.parametrize("command", [["train.py", "--init"], ["eval.py", "all"]])
def test_broken_file_in_the_download_folder_is_to_be_deleted(tmp_path, monkeypatch, contents,
                                                             command):
    """By the real torch.hub, which would only fetch a file that is missing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth"
    path.parent.mkdir()
    path.write_bytes(contents)
    with pytest.raises(UserError, match=f"{path} is damaged .*: delete it") as error:
        if command[0] == "train.py":
            chosen_config(command[1], "dinov2")
        else:
            evaluation.main([command[1], "dinov2"])
    assert "\n" not in str(error.value) and path.read_bytes() == contents


# --- export, and evaluation of a weights file ---------------------------------------------------


@pytest.mark.usefixtures("elsewhere")
def test_export_is_read_back_bit_equal(flowers, capsys):
    train.main(["--data", str(flowers / "train"), *NANO, "--out", "run"])
    evaluation.main(["export", "run", "--device", "cpu"])
    assert "timm.models.VisionTransformer(img_size=16" in capsys.readouterr().out
    contents = torch.load("run/encoder.pth", weights_only=True)
    assert sorted(contents) == ["config", "state_dict"]
    assert sorted(contents["state_dict"]) == sorted(vit_names(4))  # and nothing else
    assert contents["config"] == dict(
        image_size=16, patch_size=8, dim=96, depth=4, heads=3, registers=0, eps=1e-6,
        mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
    with pytest.raises(UserError, match="encoder.pth already exists"):
        evaluation.main(["export", "run", "--device", "cpu"])
    evaluation.main(["export", "run", "--momentum", "--out", "momentum.pth", "--device", "cpu"])
    images = torch.randn(2, 3, 16, 16)
    for path, momentum in (("run/encoder.pth", False), ("momentum.pth", True)):
        back, trained = load_encoder(path), load_encoder("run", momentum)
        assert same(back.state_dict(), trained.state_dict()) and sizes(back) == sizes(trained)
        assert torch.equal(back(images), trained(images))
    assert not same(load_encoder("run").state_dict(), back.state_dict())
    assert load_encoder("run/encoder.pth", image_size=32).image_size == 32
    with pytest.raises(UserError, match="--image-size is for published weights"):
        evaluation.main(["all", "run", "--image-size", "32", "--device", "cpu"])


@pytest.mark.usefixtures("elsewhere")
def test_export_keeps_mean_std_and_another_image_size():
    base = new_encoder(depth=1)
    torch.save(run_file(base, base), "run.pt")
    encoder = load_encoder("run.pt", image_size=48)
    run_eval("export", "run.pt", "--image-size", "48")
    back = load_encoder("encoder.pth")
    assert (back.mean, back.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and back.image_size == 48
    assert same(back.state_dict(), encoder.state_dict())


@pytest.fixture
def weights_file(tmp_path, elsewhere):
    (tmp_path / "published").mkdir()
    path = tmp_path / "published" / "dino.pth"
    torch.save(dino_file(new_encoder(depth=2), new_encoder(depth=2)), path)
    return path


def run_eval(*arguments):
    evaluation.main([*map(str, arguments), "--device", "cpu", "--workers", "0"])


@pytest.mark.parametrize("options, size, momentum, kind", [
    ([], 96, False, "class"), (["--image-size", "32"], 32, False, "class"),
    (["--momentum"], 96, True, "class"), (["--features", "mean"], 96, False, "mean")])
def test_evaluation_of_a_weights_file(flowers, weights_file, monkeypatch, capsys, options, size,
                                      momentum, kind):
    calls, evaluate = [], evaluation.evaluate

    def record(*arguments):
        calls.append((arguments, evaluate(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(evaluation, "evaluate", record)
    run_eval("knn", weights_file, "--data", flowers, *options)
    printed = capsys.readouterr().out
    assert f"at {size} px" in printed and "timm's names, " in printed
    ((encoders, data, preprocessing, *_, features), results), = calls
    (name, encoder), = encoders.items()
    assert name == ("momentum" if momentum else "published") and features == kind
    assert same(encoder.state_dict(), load_encoder(weights_file, momentum, size).state_dict())
    assert preprocessing == Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    assert data.test.paths == load_data(str(flowers)).test.paths
    assert evaluation.table(results) in printed
    assert [path.name for path in weights_file.parent.iterdir()] == ["dino.pth"]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["flowers", "published"]


def test_all_metrics_of_a_weights_file(flowers, weights_file, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "STRENGTHS", (1.0,))
    run_eval("all", weights_file, "--data", flowers, "--image-size", "32")
    printed = capsys.readouterr().out
    assert all(metric in printed for metric in evaluation.METRICS)
    with pytest.raises(UserError, match="give the images by --data"):
        run_eval("all", weights_file)


def test_masks_of_a_weights_file(flowers, weights_file, capsys):
    image = next((flowers / "test").rglob("*.jpg"))
    run_eval("masks", weights_file, image, "--image-size", "64")
    assert "wrote masks.png" in capsys.readouterr().out
    with Image.open("masks.png") as sheet:
        assert sheet.size[1] > 3 * 128
    with pytest.raises(UserError, match="masks.png already exists"):
        run_eval("masks", weights_file, image)
    run_eval("masks", weights_file, image, image, "--out", "two.png")
    run_eval("masks", weights_file, "--data", flowers, "--out", "eight.png")
    widths = [Image.open(name).size[0] for name in ("masks.png", "two.png", "eight.png")]
    assert widths[1] - widths[0] == (widths[2] - widths[1]) / 6 > 0
    assert [path.name for path in weights_file.parent.iterdir()] == ["dino.pth"]


def test_export_of_a_weights_file(weights_file):
    run_eval("export", weights_file, "--momentum")
    assert [path.name for path in weights_file.parent.iterdir()] == ["dino.pth"]
    assert same(load_encoder("encoder.pth").state_dict(),
                load_encoder(weights_file, True, 96).state_dict())


def test_masks_of_a_weights_file_keep_its_pivotal_patches(flowers, weights_file, monkeypatch):
    shown = {}
    sheet = evaluation.mask_sheet

    def record(images, importance, masks, notes):
        shown.update(masks=masks, importance=importance)
        return sheet(images, importance, masks, notes)

    monkeypatch.setattr(evaluation, "mask_sheet", record)
    run_eval("masks", weights_file, next((flowers / "test").rglob("*.jpg")), "--image-size", "64")
    kept = shown["importance"].topk(4).indices  # 0.3 of 16 patches
    assert shown["masks"].sum() == 4 and shown["masks"].gather(1, kept).all()


@pytest.mark.usefixtures("elsewhere")
def test_loaded_encoder_trains_in_lodisc(tmp_path):
    torch.save(backbone(new_encoder(depth=1)), "file.pth")
    model = LoDisc(load_encoder("file.pth"), hidden_dim=8, output_dim=8)
    model(*torch.randn(2, 4, 3, SIZE, SIZE)).total.backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in model.momentum_encoder.parameters())


# --- checkpoints of older versions --------------------------------------------------------------


@pytest.mark.parametrize("method, expected", [
    ("global", dict(method="mocov3", global_weight=1.0, local_weight=1.0)),
    ("local", dict(method="lodisc", global_weight=0.0, local_weight=1.0)),
    ("lodisc", dict(method="lodisc", global_weight=1.0, local_weight=1.0)),
    ("/a/file.py:Method", dict(method="/a/file.py:Method", global_weight=1.0, local_weight=1.0))])
def test_older_settings_get_todays_names(method, expected):
    older = {"method": method, "temperature": 0.5}
    assert evaluation.current_config(older) == {**expected, "temperature": 0.5}
    assert older == {"method": method, "temperature": 0.5}  # unchanged


@pytest.mark.parametrize("method", ["mocov3", "lodisc", "/a/file.py:Method"])
def test_todays_settings_stay_as_they_are(method):
    config = {"method": method, "global_weight": 0.25, "local_weight": 2.0, "temperature": 0.5}
    assert evaluation.current_config(config) == config


OLDER = {  # older name of a method: (today's options, class, a loss that was logged as 0)
    "global": (["--method", "mocov3"], MoCoV3, "local_loss"),
    "local": (["--global-weight", "0", "--mask", "random"], LoDisc, "global_loss"),
}


def make_older(method, zero_loss):
    """Rewrite the checkpoint of `run` as an older version wrote it; return it."""
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    checkpoint["config"]["method"] = method
    for name in ("global_weight", "local_weight"):
        del checkpoint["config"][name]
    for row in checkpoint["history"]:
        row[zero_loss] = 0.0
    torch.save(checkpoint, "run/checkpoint.pt")
    return checkpoint


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("method", OLDER)
def test_older_checkpoint_builds_todays_method(flowers, method):
    options, expected_class, zero_loss = OLDER[method]
    train.main(["--data", str(flowers / "train"), *NANO, *options, "--out", "run"])
    checkpoint = make_older(method, zero_loss)
    config = evaluation.current_config(load_encoder("run").config)
    model = evaluation.build_model(config, fresh=False)
    evaluation.load_state(model, Path("run/checkpoint.pt"))
    assert type(model) is expected_class and same(model.state_dict(), checkpoint["model"])
    if method == "local":
        output = model(*torch.randn(2, 4, 3, 16, 16), torch.Generator())
        assert model.mask == "random" and torch.equal(output.total, output.local_loss)
    run_eval("masks", "run", next((flowers / "test").rglob("*.jpg")))
    assert Path("run/masks.png").is_file()
    train.main(["--resume", "run"])  # it is finished: written again, by today's names
    again = torch.load("run/checkpoint.pt", weights_only=True)
    assert again["config"] == config and same(again["model"], checkpoint["model"])
    with open("run/metrics.csv", encoding="utf-8") as file:
        row, = csv.DictReader(file)
    assert ("local_loss" in row) == (method == "local")
