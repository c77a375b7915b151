"""Features of load_encoder equal those of the original libraries' own classes, timm and
transformers, which need not be installed: then these tests are skipped. Each file is written by the
library itself, with random weights that make the attention matter."""

import functools
import json
import re

import pytest
import torch

import eval as evaluation
from lodisc import NORMALISATIONS, UserError, load_encoder

timm = pytest.importorskip("timm", reason="timm is not installed: its classes are not compared")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: its classes are not compared")
from timm.models._hub import save_for_hf  # noqa: E402


@torch.no_grad()
def randomise(model):
    """Draw weights for which a wrong number of heads changes the features by a half and more."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "weight" in name:
            parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
        elif "norm" in name and "weight" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def difference(encoder, features):
    """Return the relative difference between the features of random images: a function's."""
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    expected = features(images)
    return ((encoder(images) - expected).norm() / expected.norm()).item()


# --- timm -------------------------------------------------------------------------------------

READ = """deit3_base_patch16_224 deit3_huge_patch14_224 deit3_large_patch16_224
deit3_medium_patch16_224 deit3_small_patch16_224 deit_base_patch16_224 deit_small_patch16_224
deit_tiny_patch16_224 flexivit_base flexivit_large flexivit_small vit_base_patch14_dinov2
vit_base_patch14_reg4_dinov2 vit_base_patch16_224 vit_base_patch16_384 vit_base_patch16_plus_240
vit_base_patch32_224 vit_base_patch32_plus_256 vit_base_patch8_224 vit_huge_patch14_224
vit_large_patch14_224 vit_large_patch14_dinov2 vit_large_patch14_reg4_dinov2
vit_large_patch16_224 vit_large_patch32_224 vit_small_patch14_dinov2
vit_small_patch14_reg4_dinov2 vit_small_patch16_224 vit_small_patch16_36x1_224
vit_small_patch32_224 vit_small_patch8_224 vit_tiny_patch16_224 vit_tiny_patch16_384""".split()
REFUSED = {  # name: what the line says
    "vit_base_patch16_clip_224": "norm_pre", "vit_base_patch16_rope_ape_224": "rotary positions",
    "vit_base_patch16_clip_quickgelu_224": "QuickGELU",
    "deit_base_distilled_patch16_224": "dist_token", "vit_giant_patch14_dinov2": "give --heads",
    "vit_base_patch16_18x2_224": "blocks.0.norm1", "beit_base_patch16_224": "gamma|pos_embed",
    "vit_base_patch16_gap_224": "no ViT of a known format", "vit_relpos_base_patch16_cls_224": "",
    "vit_base_patch16_siglip_224": "no ViT of a known format", "vit_base_patch16_dinov3": "",
    "vit_base_r50_s16_224": "image size|patch_embed", "vit_intern300m_patch14_448": "norm.weight",
}


def create(name):
    """Return timm's model with two layers, for images of 4 x 4 patches."""
    patch_size = int((re.findall(r"patch(\d+)", name) or ["16"])[0])
    return timm.create_model(name, depth=2, num_classes=0, pretrained=False,
                             img_size=4 * patch_size)


@pytest.mark.parametrize("name", READ)
def test_timm_features(tmp_path, name):
    model = randomise(create(name))
    torch.save(model.state_dict(), tmp_path / "file.pth")
    heads = model.blocks[0].attn.num_heads
    is_usual = model.embed_dim in (192, 384, 768, 1024, 1280)
    encoder = load_encoder(tmp_path / "file.pth", heads=None if is_usual else heads)
    assert encoder.blocks[0].attn.heads == heads
    assert difference(encoder, lambda x: model.forward_features(x)[:, 0]) < 1e-4
    tokens = encoder.tokens(torch.randn(1, 3, encoder.image_size, encoder.image_size))
    assert tokens[1].shape[1] == (encoder.image_size // encoder.patch_size) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models(["vit_*", "deit*", "flexivit*", "beit*", "eva*"]))
def test_every_timm_vit_is_read_right_or_refused_in_one_line(tmp_path, name):
    """With the config that timm writes, at full resolution."""
    try:
        model = timm.create_model(name, depth=1, num_classes=0, pretrained=False)
    except (AssertionError, TypeError, ValueError) as error:
        pytest.skip(f"timm does not make it with one layer: {error}")
    randomise(model)
    save_for_hf(model, tmp_path)
    heads = None
    for _ in range(2):
        try:
            encoder = load_encoder(tmp_path, heads=heads)
            break
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            if "give --heads" not in str(error):
                return
            heads = model.blocks[0].attn.num_heads
    assert difference(encoder, lambda x: model.forward_features(x)[:, 0]) < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_other_timm_models_are_refused_in_one_line(tmp_path, name):
    save_for_hf(timm.create_model(name, depth=1, pretrained=False), tmp_path)
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        load_encoder(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name, normalisation", [
    ("vit_small_patch16_224", "half"), ("deit_small_patch16_224", "imagenet"),
    ("vit_small_patch14_reg4_dinov2", "imagenet")])
@pytest.mark.parametrize("safe", ["both", True, False])
def test_folder_of_timm_states_the_normalisation(tmp_path, name, normalisation, safe):
    model = randomise(timm.create_model(name, depth=1, pretrained=False))
    save_for_hf(model, tmp_path, safe_serialization=safe)
    encoder = load_encoder(tmp_path, image_size=8 * model.patch_embed.patch_size[0])
    assert (encoder.mean, encoder.std) == NORMALISATIONS[normalisation]
    assert encoder.source.count("(stated)") == 1  # of mean and std; timm does not state heads
    encoder = load_encoder(tmp_path)
    assert difference(encoder, lambda x: model.forward_features(x)[:, 0]) < 1e-4


def test_timm_reads_an_exported_encoder_with_registers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = randomise(create("vit_small_patch14_reg4_dinov2"))
    torch.save(theirs.state_dict(), "reg.pth")
    evaluation.main(["export", "reg.pth", "--image-size", "56", "--device", "cpu"])
    call = capsys.readouterr().out.partition("for ")[2].splitlines()[0]
    model = eval(call, {"timm": timm, "torch": torch, "functools": functools}).eval()
    contents = torch.load("encoder.pth", weights_only=True)
    model.load_state_dict(contents["state_dict"])
    for encoder in (load_encoder("encoder.pth"), load_encoder("reg.pth")):
        assert difference(encoder, lambda x: model.forward_features(x)[:, 0]) < 1e-4
        assert difference(encoder, lambda x: theirs.forward_features(x)[:, 0]) < 1e-4


# --- transformers -----------------------------------------------------------------------------

SMALL = dict(hidden_size=384, num_hidden_layers=2, num_attention_heads=12, image_size=56,
             patch_size=14)
HUGE = dict(SMALL, hidden_size=1280, num_attention_heads=16, num_hidden_layers=1)
HUGGING_FACE = {  # name: (class, its config, the encoder's attribute)
    "ViT": ("ViTModel", "ViTConfig", dict(SMALL, intermediate_size=1536), ""),
    "ViT-H": ("ViTModel", "ViTConfig", dict(HUGE, intermediate_size=5120), ""),
    "ViT, classifier": ("ViTForImageClassification", "ViTConfig",
                        dict(SMALL, intermediate_size=1536), "vit"),
    "MAE": ("ViTMAEModel", "ViTMAEConfig", dict(SMALL, intermediate_size=1536, mask_ratio=0.0), ""),
    "MAE, decoder": ("ViTMAEForPreTraining", "ViTMAEConfig",
                     dict(SMALL, intermediate_size=1536, mask_ratio=0.0), "vit"),
    "MSN": ("ViTMSNModel", "ViTMSNConfig", dict(SMALL, intermediate_size=1536), ""),
    "DINOv2": ("Dinov2Model", "Dinov2Config", SMALL, ""),
    "DINOv2, classifier": ("Dinov2ForImageClassification", "Dinov2Config", SMALL, "dinov2"),
    "DINOv2-reg": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SMALL, ""),
    "DINOv2-reg, H": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
                      dict(HUGE, num_register_tokens=5), ""),
}


def hugging_face(name, **changes):
    """Return (model, function from images to its class token after the last LayerNorm)."""
    model_class, config_class, config, body = HUGGING_FACE[name]
    config = getattr(transformers, config_class)(**{**config, **changes})
    model = randomise(getattr(transformers, model_class)(config))
    inner = getattr(model, body) if body else model

    def features(images):
        options = {}
        if name.startswith("MAE"):  # which draws an order of the 16 patches
            options["noise"] = torch.arange(16.0).repeat(len(images), 1)
        return inner(pixel_values=images, **options).last_hidden_state[:, 0]

    return model, features


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_features(tmp_path, name):
    """By the folder that transformers writes, with the Hub's names, and by its state_dict()."""
    model, features = hugging_face(name)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "other.bin")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "other.bin"):
        encoder = load_encoder(path)  # the config lies beside it
        assert difference(encoder, features) < 1e-4
        assert encoder.norm.eps == model.config.layer_norm_eps
        assert encoder.sizes["registers"] == getattr(model.config, "num_register_tokens", 0)


@pytest.mark.parametrize("name", ["ViT", "DINOv2-reg"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_safetensors(tmp_path, name, dtype):
    model, features = hugging_face(name)
    model.to(dtype).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    model.float()
    assert difference(encoder, features) < 1e-4
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())


@pytest.mark.parametrize("mean, std", [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
                                       ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
def test_preprocessor_states_the_normalisation(tmp_path, mean, std):
    hugging_face("DINOv2")[0].save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {"image_mean": mean, "image_std": std, "size": {"height": 9, "width": 9}}), "utf-8")
    encoder = load_encoder(tmp_path)
    assert (encoder.mean, encoder.std) == (mean, std) and "(stated); left" in encoder.source
    with pytest.raises(UserError, match="states mean"):
        load_encoder(tmp_path, normalise="imagenet")


@pytest.mark.parametrize("name, changes, says", [
    ("DINOv2", dict(use_swiglu_ffn=True), "states use_swiglu_ffn True"),
    ("ViT", dict(hidden_act="gelu_new"), "states activation gelu_new, expected gelu"),
    ("DINOv2-reg", dict(hidden_act="relu"), "states activation relu"),
    ("ViT", dict(image_size=[28, 56]), r"states image size \[28, 56\]")])
def test_what_the_encoder_lacks_is_named(tmp_path, name, changes, says):
    hugging_face(name, **changes)[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load_encoder(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_other_transformers_models_are_refused(tmp_path):
    config = transformers.DeiTConfig(**dict(SMALL, intermediate_size=1536))
    transformers.DeiTModel(config).save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="distillation_token"):
        load_encoder(tmp_path / "deit")
    config = transformers.CLIPVisionConfig(hidden_size=64, num_hidden_layers=1,
                                           num_attention_heads=4, image_size=28, patch_size=14)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="no ViT of a known format"):
        load_encoder(tmp_path / "clip")
