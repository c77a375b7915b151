"""Published weights, in and out: stand-ins with the released files' full lists of names."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

import eval as judge
import train
from conftest import weights
from data.weights import load_published, resize_positions
from lodisc import create_vit, load_encoder

PATCH, SIZE = 16, 32
SMALL = ["--image-size", "16", "--patch-size", "8", "--arch", "vit_nano", "--batch-size", "12",
         "--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--device", "cpu"]


def new_encoder(arch="vit_tiny", size=SIZE, patch=PATCH):
    """All parameters random, so that none can be mixed up unseen."""
    encoder = create_vit(arch, size, patch)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.05)
    return encoder.eval()


def vit_names(depth=12):
    """timm's VisionTransformer without its head, also DeiT's and DINO's: 4 + 12 per layer + 2."""
    layer = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
             "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
             "mlp.fc2.weight", "mlp.fc2.bias"]
    return (["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
            + [f"blocks.{i}.{name}" for i in range(depth) for name in layer]
            + ["norm.weight", "norm.bias"])


def mlp_names(linears, affine):
    """MoCo v3's heads: linear, BatchNorm, ReLU, ...; the last BatchNorm without affine."""
    names = []
    for i in range(linears):
        norm = ["running_mean", "running_var", "num_batches_tracked"]
        norm = (["weight", "bias"] if i < linears - 1 or affine else []) + norm
        names += [f"{3 * i}.weight"] + [f"{3 * i + 1}.{name}" for name in norm]
    return names


def backbone(encoder, prefix=""):
    state = encoder.state_dict()
    assert list(sorted(state)) == sorted(vit_names())
    return {prefix + name: state[name].clone() for name in vit_names()}


def zeros(names, prefix=""):
    return {prefix + name: torch.zeros(1) for name in names}


def optimizer(count=3):
    return {"state": {i: {"step": torch.zeros(1), "exp_avg": torch.zeros(2)} for i in range(count)},
            "param_groups": [{"lr": 1e-3, "params": list(range(count))}]}


def timm_file(encoder, other):
    return {**backbone(encoder), **zeros(["head.weight", "head.bias"])}


def deit_file(encoder, other):
    return {"model": timm_file(encoder, other)}


def deit_training(encoder, other):
    return {**deit_file(encoder, other), "optimizer": optimizer(), "epoch": 3,
            "lr_scheduler": {"t": 1}, "model_ema": timm_file(other, encoder),
            "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1e-3, data_set="IMNET")}


def moco_file(encoder, other):
    head = ["head." + name for name in mlp_names(3, affine=False)]
    state = {**backbone(encoder, "module.base_encoder."), **zeros(head, "module.base_encoder."),
             **backbone(other, "module.momentum_encoder."),
             **zeros(head, "module.momentum_encoder."),
             **zeros(mlp_names(2, affine=False), "module.predictor.")}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": optimizer(),
            "scaler": {"scale": 65536.0, "_growth_tracker": 0}}


def moco_linear(encoder, other):
    state = {**backbone(encoder, "module."), **zeros(["module.head.weight", "module.head.bias"])}
    return {"epoch": 90, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(76.7),
            "optimizer": optimizer()}


def dino_file(encoder, other):
    head = [f"mlp.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")]
    head += ["last_layer.weight_g", "last_layer.weight_v"]
    return {"student": {**backbone(encoder, "module.backbone."), **zeros(head, "module.head.")},
            "teacher": {**backbone(other, "backbone."), **zeros(head, "head.")},
            "optimizer": optimizer(), "epoch": 100, "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 5)}, "fp16_scaler": {"scale": 1.0}}


def own_file(encoder, other):
    heads = [f"{head}.0.weight" for head in ("projector", "predictor", "momentum_projector")]
    return {"model": {**backbone(encoder, "encoder."), **backbone(other, "momentum_encoder."),
                      **zeros(heads)},
            "optimizer": optimizer(), "losses": torch.zeros(3), "random": torch.get_rng_state(),
            "cuda_random": torch.get_rng_state(),
            "film": [(0, torch.zeros(8, 4, dtype=torch.bool))], "step": 3, "scaler": {},
            "config": {"arch": "vit_tiny"}, "history": [{"epoch": 1, "total": 3.0}]}


FILES = {"timm": timm_file, "DeiT": deit_file, "DeiT, training": deit_training,
         "MoCo v3": moco_file, "MoCo v3, linear": moco_linear, "DINO": dino_file,
         "DINO, backbone": lambda encoder, other: backbone(encoder), "ours": own_file}


@pytest.mark.parametrize("kind", FILES)
def test_a_published_file_fills_the_encoder(tmp_path, kind):
    base, other, ours = (new_encoder() for _ in range(3))
    torch.save(FILES[kind](base, other), tmp_path / "file.pth")
    images = torch.randn(2, 3, SIZE, SIZE)
    line = load_published(ours, tmp_path / "file.pth")
    assert torch.equal(ours(images)[0], base(images)[0]) and "\n" not in line
    if kind in ("MoCo v3", "DINO", "ours"):
        assert "base encoder" in line and "optimizer" in line
        line = load_published(ours, tmp_path / "file.pth", momentum=True)
        assert torch.equal(ours(images)[0], other(images)[0]) and "momentum encoder" in line
    else:
        with pytest.raises(ValueError, match="one encoder"):
            load_published(ours, tmp_path / "file.pth", momentum=True)
    if kind not in ("DINO, backbone", "ours"):
        assert "left out" in line and "head" in line


@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvision_gives_the_same_features(tmp_path, wrapped):
    theirs = TorchvisionViT(SIZE, PATCH, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = theirs.state_dict()
    if wrapped:  # torchvision's own training script, older names of the MLP
        state = {"module." + name.replace("mlp.0.", "mlp.linear_1.").replace(
            "mlp.3.", "mlp.linear_2."): tensor for name, tensor in state.items()}
        state = {"model": state, "args": argparse.Namespace(lr=0.1), "optimizer": optimizer()}
    torch.save(state, tmp_path / "vit.pth")
    theirs.heads = nn.Identity()
    ours = new_encoder()
    line = load_published(ours, tmp_path / "vit.pth")
    images = torch.randn(2, 3, SIZE, SIZE)
    assert (ours(images)[0] - theirs.eval()(images)).abs().max() < 1e-5
    assert "torchvision" in line and "left out: head" in line


def test_what_does_not_fit_is_named(tmp_path):
    base, path = new_encoder(), tmp_path / "file.pth"

    def load(contents, encoder=None):
        torch.save(contents, path)
        load_published(encoder or new_encoder(), path)

    state = backbone(base)
    with pytest.raises(ValueError, match=r"left over: dist_token, head_dist\.weight$"):
        load({**state, **zeros(["dist_token", "head_dist.weight"])})
    with pytest.raises(ValueError, match=r"missing: blocks\.3\.attn\.qkv\.bias$"):
        load({name: tensor for name, tensor in state.items() if name != "blocks.3.attn.qkv.bias"})
    with pytest.raises(ValueError, match=r"of another shape: norm\.weight$"):
        load({**state, "norm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"of another shape: pos_embed$"):
        load({**state, "pos_embed": torch.zeros(1, 6, 192)})  # DeiT's second token: no grid
    with pytest.raises(ValueError, match=r"left over: something\.weight$"):
        load({**moco_file(base, base), "something": {"weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match="--arch vit_tiny --patch-size 16$"):
        load(state, new_encoder("vit_nano", 48, 8))
    with pytest.raises(ValueError, match="--arch vit_tiny --patch-size 16$"):
        load(state, new_encoder("vit_tiny", 32, 8))
    with pytest.raises(ValueError, match="no ViT of a known format among its 2 tensors"):
        load(zeros(["fc.weight", "fc.bias"]))
    with pytest.raises(ValueError, match="no ViT of a known format among its 0 tensors"):
        load({"epoch": 3})
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_published(new_encoder(), tmp_path / "none.pth")
    path.write_text("not a file of torch.save")
    with pytest.raises(ValueError, match="not read as weights"):
        load_published(new_encoder(), path)


def test_a_smaller_moco_v3_has_heads_of_its_own(tmp_path):
    small = new_encoder("vit_small_moco")
    torch.save(moco_file(small, small), tmp_path / "vit-s.pth.tar")
    with pytest.raises(ValueError, match="--arch vit_small_moco"):
        load_published(new_encoder("vit_small"), tmp_path / "vit-s.pth.tar")
    load_published(new_encoder("vit_small_moco"), tmp_path / "vit-s.pth.tar")
    torch.save(backbone(new_encoder("vit_small")), tmp_path / "deit.pth")
    load_published(new_encoder("vit_small"), tmp_path / "deit.pth")
    with pytest.raises(ValueError, match="6 heads.*--arch vit_small --patch-size 16$"):
        load_published(new_encoder("vit_small_moco"), tmp_path / "deit.pth")
    torch.save({**own_file(small, small), "config": {"arch": "vit_small_moco"}}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match="12 heads.*--arch vit_small_moco"):
        load_published(new_encoder("vit_small"), tmp_path / "own.pt")
    load_published(new_encoder("vit_small_moco"), tmp_path / "own.pt")


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_file_from_the_internet_runs_no_code(elsewhere):
    torch.save({"model": backbone(new_encoder()), "args": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match="may run code") as caught:
        load_published(new_encoder(), "bomb.pth")
    assert "\n" not in str(caught.value)
    with open("bare.pth", "wb") as file:
        pickle.dump(Bomb(), file, protocol=2)
    with pytest.raises(ValueError):
        load_published(new_encoder(), "bare.pth")
    assert not Path("ran").exists()


def test_positions_are_interpolated():
    row = torch.linspace(0, 1, 14)
    positions = torch.zeros(1, 1 + 14 * 14, 2)
    positions[0, 0] = 7
    positions[0, 1:, 0] = row.repeat(14)  # channel 0 grows along a row, channel 1 down a column
    positions[0, 1:, 1] = row.repeat_interleave(14)
    for side in (6, 28):
        resized = resize_positions(positions, side)
        assert resized.shape == (1, 1 + side * side, 2) and (resized[0, 0] == 7).all()
        grid = resized[0, 1:].reshape(side, side, 2)
        middle = (torch.arange(side) + 0.5) * 14 / side - 0.5  # of the new patches, in old ones
        inner = slice(side // 6, side - side // 6)
        assert (grid[0, inner, 0] - middle[inner] / 13).abs().max() < 0.01
        assert (grid[inner, 0, 1] - middle[inner] / 13).abs().max() < 0.01
    assert resize_positions(positions, 14) is positions


def test_init_trains_positions_and_projection_from_those_of_the_file(flowers, elsewhere, capsys):
    encoder = new_encoder("vit_nano", 24, 8)
    torch.save(encoder.state_dict(), "nano.pth")
    train.main(["--data", str(flowers), *SMALL, "--init", "nano.pth", "--lr", "0.01",
                "--out", "run"])
    assert "weights of " in capsys.readouterr().out
    model = train.build_model(torch.load("run/checkpoint.pt", weights_only=True)["config"])
    for name, parameter in model.momentum_encoder.named_parameters():
        assert torch.equal(parameter, model.encoder.state_dict()[name])  # copied after loading
    start = model.encoder.state_dict()
    assert torch.equal(start["patch_embed.proj.weight"], encoder.patch_embed.proj.weight)
    assert torch.equal(start["pos_embed"], resize_positions(encoder.pos_embed.detach(), 2))
    trained = weights("run")
    for name in ("pos_embed", "patch_embed.proj.weight", "cls_token"):
        assert not torch.equal(trained["encoder." + name], start[name])
        assert not torch.equal(trained["momentum_encoder." + name], start[name])
    assert '"initial"' in Path("run/eval.json").read_text()
    load_encoder("run")
    with pytest.raises(ValueError, match="init"):
        train.main(["--resume", "run", "--init", "other.pth"])


def test_imagenet_comes_through_torchvision(monkeypatch):
    from torchvision.models import ViT_B_16_Weights
    with pytest.raises(ValueError, match="vit_base"):
        load_published(new_encoder(), "imagenet")
    theirs = TorchvisionViT(224, 16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072)
    monkeypatch.setattr(type(ViT_B_16_Weights.IMAGENET1K_V1), "get_state_dict",
                        lambda self, *_, **options: theirs.state_dict() if options["check_hash"]
                        and self is ViT_B_16_Weights.IMAGENET1K_V1 else None)
    encoder = create_vit("vit_base", 224, 16)
    load_published(encoder, "imagenet")
    assert torch.equal(encoder.norm.weight, theirs.encoder.ln.weight)
    assert torch.equal(encoder.pos_embed, theirs.encoder.pos_embedding)

    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(type(ViT_B_16_Weights.IMAGENET1K_V1), "get_state_dict", refuse)
    with pytest.raises(OSError, match="could not be fetched: Name or service"):
        load_published(encoder, "imagenet")


def test_export_and_the_way_back(flowers, elsewhere, capsys):
    train.main(["--data", str(flowers / "train"), *SMALL, "--out", "run"])
    judge.main(["export", "run"])
    assert "timm.models.VisionTransformer(img_size=16" in capsys.readouterr().out
    state = torch.load("run/encoder.pth", weights_only=True)
    assert sorted(state) == sorted(vit_names(4))  # and nothing else
    with pytest.raises(ValueError, match="exists"):
        judge.main(["export", "run"])
    judge.main(["export", "run", "--momentum", "--out", "momentum.pth"])
    images = torch.randn(2, 3, 16, 16)
    for path, momentum in (("run/encoder.pth", False), ("momentum.pth", True)):
        back = create_vit("vit_nano", 16, 8)
        load_published(back, path)
        assert torch.equal(back(images)[0], load_encoder("run", momentum)(images)[0])
