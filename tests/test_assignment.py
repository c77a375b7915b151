"""The assignment kit: it contains no solution; graders pass the real bodies and fail wrong ones."""

import ast
import csv
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grade
import make

SOURCE = (make.ROOT / "lodisc.py").read_text(encoding="utf-8")
FUNCTIONS = make.functions(SOURCE)
DEFAULT = [name for name in make.EXERCISES if name not in make.OPTIONAL]
# (exercise, the student's mistake, function, correct code, its wrong replacement)
WRONG = [
    ("attention", "softmax over the wrong axis", "attention_weights",
     "softmax(dim=-1)", "softmax(dim=-2)"),
    ("attention", "computed in half precision", "attention_weights",
     "q, k = at_least_float32(q), at_least_float32(k)", "pass"),
    ("attention", "not scaled", "attention_weights", "q * q.shape[-1] ** -0.5 @", "q @"),
    ("attention", "scaled by 1 / d", "attention_weights", "** -0.5", "** -1"),
    ("attention", "autocast left on", "attention_weights",
     "with torch.autocast(q.device.type, enabled=False):", "if True:"),
    ("attention", "exp that overflows", "attention_weights",
     "return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)",
     "s = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).exp()\n"
     "        return s / s.sum(dim=-1, keepdim=True)"),
    ("attention", "q, k and v cut head by head", "Attention.forward",
     "b t (three h d) -> three b h t d", "b t (h three d) -> three b h t d"),
    ("attention", "channels of the heads interleaved", "Attention.forward",
     '"b h t d -> b t (h d)"', '"b h t d -> b t (d h)"'),
    ("attention", "features not projected", "Attention.forward",
     'self.proj(rearrange(x, "b h t d -> b t (h d)"))', 'rearrange(x, "b h t d -> b t (h d)")'),
    ("attention", "column instead of row", "Attention.forward",
     "attention_weights(q[:, :, :1], k).squeeze(2)", "attention_weights(q, k)[:, :, :, 0]"),
    ("attention", "row of the last token", "Attention.forward",
     "attention_weights(q[:, :, :1], k)", "attention_weights(q[:, :, -1:], k)"),
    ("attention", "row of the patches alone", "Attention.forward",
     "squeeze(2).mean(dim=1)", "squeeze(2).mean(dim=1)[:, 1:]"),
    ("attention", "heads of the row not averaged", "Attention.forward",
     "squeeze(2).mean(dim=1)", "squeeze(2)"),
    ("attention", "matrix averaged over the queries", "Attention.forward",
     "attention_weights(q, k).mean(dim=1)", "attention_weights(q, k).mean(dim=2)"),
    ("attention", "matrix of one head", "Attention.forward",
     "attention_weights(q, k).mean(dim=1)", "attention_weights(q, k)[:, 0]"),
    ("attention", "softmax of the mean over heads", "Attention.forward",
     "attention_weights(q, k).mean(dim=1)",
     "(q @ k.mT * q.shape[-1] ** -0.5).mean(dim=1).softmax(dim=-1)"),
    ("attention", "weights always returned", "Attention.forward",
     "weights = None", "weights = attention_weights(q, k)"),
    ("attention", "class_only cuts the weights too", "Attention.forward",
     "weights = None", "q, weights = q[:, :, :1] if class_only else q, None"),
    ("attention", "class_only ignored", "Attention.forward", "if class_only:", "if False:"),
    ("attention", "class_only gives the last token", "Attention.forward",
     "q = q[:, :, :1]", "q = q[:, :, -1:]"),
    ("positions", "rows and columns swapped", "sincos_positions",
     "torch.cat([rows, columns], dim=1)", "torch.cat([columns, rows], dim=1)"),
    ("positions", "columns numbered first", "sincos_positions", '"row c -> (row column) c"',
     '"row c -> (column row) c"'),
    ("positions", "frequencies of a 1-D embedding", "sincos_positions",
     "torch.arange(dim // 4) / (dim // 4)", "torch.arange(dim // 4) / dim"),
    ("positions", "frequencies of a width of 8", "sincos_positions",
     "torch.arange(dim // 4) / (dim // 4)", "torch.arange(dim // 4) / 2"),
    ("positions", "class token at the end", "sincos_positions",
     "torch.cat([torch.zeros(1, dim), patches])", "torch.cat([patches, torch.zeros(1, dim)])"),
    ("positions", "cosine before sine", "sincos_positions",
     "[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]"),
    ("positions", "no axis for the batch", "sincos_positions", "patches])[None]", "patches])"),
    ("positions", "double precision", "sincos_positions", "torch.arange(dim // 4) /",
     "torch.arange(dim // 4).double() /"),
    ("product", "mean instead of product", "attention_product",
     "row.clamp_min(tiny).log() for row in attentions]).sum(dim=0)",
     "row.clamp_min(tiny) for row in attentions]).mean(dim=0).log()"),
    ("product", "mean of the logarithms", "attention_product", ".sum(dim=0)", ".mean(dim=0)"),
    ("product", "product that underflows", "attention_product",
     "row.clamp_min(tiny).log() for row in attentions]).sum(dim=0)",
     "row for row in attentions]).prod(dim=0).clamp_min(tiny).log()"),
    ("product", "no logarithm", "attention_product", ".sum(dim=0)", ".sum(dim=0).exp()"),
    ("product", "logarithm of zero", "attention_product", ".clamp_min(tiny)", ""),
    ("product", "sum over the patches", "attention_product", ".sum(dim=0)", ".sum(dim=-1)"),
    ("product", "last layer left out", "attention_product", "for row in attentions",
     "for row in attentions[:-1]"),
    ("product", "smallest value of the sum", "attention_product",
     "row.clamp_min(tiny).log() for row in attentions]).sum(dim=0)",
     "row.log() for row in attentions]).sum(dim=0).clamp_min(len(attentions) * math.log(tiny))"),
    ("product", "zeros alone replaced", "attention_product", "row.clamp_min(tiny).log()",
     "torch.where(row == 0, tiny, row).log()"),
    ("product", "larger smallest weight", "attention_product",
     "tiny = torch.finfo(torch.float32).tiny", "tiny = 1e-12"),
    ("rollout", "no residual connection", "attention_rollout", "+ row) / 2", "+ 0 * row)"),
    ("rollout", "not halved", "attention_rollout", "+ row) / 2", "+ row)"),
    ("rollout", "layers in reverse order", "attention_rollout", "reversed(attentions)",
     "attentions"),
    ("rollout", "transposed", "attention_rollout", '"bi,bij->bj"', '"bi,bji->bj"'),
    ("rollout", "row of the last token", "attention_rollout", "row[:, 0] = 1", "row[:, -1] = 1"),
    ("rollout", "class token's own entry kept", "attention_rollout", "row[:, 1:]", "row"),
    ("rollout", "one layer left out", "attention_rollout", "reversed(attentions)",
     "reversed(attentions[1:] or attentions)"),
    ("mask", "the least important", "location_mask", "descending=True", "descending=False"),
    ("mask", "keep ratio inverted", "location_mask",
     "kept_count(importance.shape[1], keep_ratio)",
     "kept_count(importance.shape[1], 1 - keep_ratio or 1)"),
    ("mask", "topk does not order ties", "location_mask",
     "importance.argsort(dim=1, descending=True, stable=True)",
     "importance.topk(k, dim=1).indices"),
    ("mask", "order of ties reversed", "location_mask",
     "importance.argsort(dim=1, descending=True, stable=True)",
     "importance.argsort(dim=1, stable=True).flip(1)"),
    ("mask", "one mask for the batch", "location_mask", "importance.argsort",
     "importance.mean(0, True).expand_as(importance).argsort"),
    ("mask", "floating-point error rounds down", "location_mask",
     "k = kept_count(importance.shape[1], keep_ratio)",
     "k = max(1, math.floor(importance.shape[1] * keep_ratio))"),
    ("mask", "rounded up", "location_mask", "k = kept_count(importance.shape[1], keep_ratio)",
     "k = math.ceil(importance.shape[1] * keep_ratio)"),
    ("mask", "threshold by value", "location_mask", "return torch",
     "return importance >= importance.gather(1, order[:, k - 1:k])\n    return torch"),
    ("mask", "ties broken by a slope", "location_mask", "order = importance.argsort",
     "order = (importance - 1e-4 * torch.arange(importance.shape[1])).argsort"),
    ("mask", "argument changed", "location_mask", "return torch",
     "importance.scatter_(1, order[:, :k], -math.inf)\n    return torch"),
    ("mask", "mask inverted", "location_mask", "order[:, :k], True",
     "order[:, :k], True).logical_not("),
    ("update", "direction swapped", "momentum_update", "1 - m)", "m)"),
    ("update", "online parameters updated", "momentum_update", "old.lerp_(new", "new.lerp_(old"),
    ("update", "not in place", "momentum_update", ".lerp_(", ".lerp("),
    ("update", "new tensors instead of in place", "momentum_update",
     "old.lerp_(new, 1 - m)", "old.data = old.lerp(new, 1 - m)"),
    ("update", "buffers too", "momentum_update", "old.lerp_(new, 1 - m)",
     "old.lerp_(new, 1 - m)\n    for old, new in zip(momentum.buffers(), online.buffers()):\n"
     "        old.copy_(m * old + (1 - m) * new)"),
    ("update", "only what has a gradient", "momentum_update", "old.lerp_(new, 1 - m)",
     "if old.requires_grad:\n            old.lerp_(new, 1 - m)"),
    ("update", "only its own parameters", "momentum_update",
     "zip(momentum.parameters(), online.parameters(), strict=True)",
     "zip(momentum[0].parameters(False), online[0].parameters(False))"),
    ("update", "first parameter alone", "momentum_update", "old.lerp_(new, 1 - m)",
     "old.lerp_(new, 1 - m)\n        break"),
    ("schedule", "linear", "momentum_schedule", "(1 + math.cos(math.pi * step / total)) / 2",
     "(1 - step / total)"),
    ("schedule", "falling", "momentum_schedule", "math.pi * step", "math.pi * (total - step)"),
    ("schedule", "whole cosine period", "momentum_schedule", "math.pi * step",
     "2 * math.pi * step"),
    ("schedule", "base of 0.99 always", "momentum_schedule", "1 - (1 - base) *", "1 - 0.01 *"),
    ("schedule", "base of 0.9 always", "momentum_schedule", "1 - (1 - base) *", "1 - 0.1 *"),
    ("schedule", "total of 8 always", "momentum_schedule", "step / total", "step / 8"),
    ("loss", "temperature applied twice", "contrastive_loss", "keys.T / temperature",
     "keys.T / temperature**2"),
    ("loss", "gradient for the keys", "contrastive_loss", "keys.detach()", "keys"),
    ("loss", "not normalised", "contrastive_loss", "F.normalize(at_least_float32(queries), dim=1)",
     "at_least_float32(queries)"),
    ("loss", "normalised along the batch axis", "contrastive_loss",
     "at_least_float32(keys.detach()), dim=1)", "at_least_float32(keys.detach()), dim=0)"),
    ("loss", "not scaled", "contrastive_loss", "return 2 * temperature *", "return"),
    ("loss", "autocast left on", "contrastive_loss",
     "with torch.autocast(queries.device.type, enabled=False):", "if True:"),
    ("loss", "sum over the queries", "contrastive_loss", "F.cross_entropy(logits, positives)",
     'F.cross_entropy(logits, positives, reduction="sum")'),
    ("loss", "softmax over the queries", "contrastive_loss", "logits = queries @ keys.T /",
     "logits = (queries @ keys.T).log_softmax(dim=0) /"),
    ("loss", "gradient of the positives alone", "contrastive_loss",
     "F.cross_entropy(logits, positives)",
     "(logits.logsumexp(1).detach() - logits[range(len(logits)), positives]).mean()"),
    ("loss", "exp that overflows", "contrastive_loss", "F.cross_entropy(logits, positives)",
     "F.nll_loss((logits.exp() / logits.exp().sum(1, keepdim=True)).log(), positives)"),
    ("loss", "keys normalised in place", "contrastive_loss",
     "F.normalize(at_least_float32(keys.detach()), dim=1)",
     "keys.detach().div_(keys.detach().norm(dim=1, keepdim=True))"),
    ("loss", "offset subtracted", "contrastive_loss", "offset + torch.arange",
     "(offset > 0) * (len(keys) - len(queries) - offset) + torch.arange"),
    ("loss", "offset forgotten", "contrastive_loss", "positives = offset +", "positives ="),
    ("pixels", "inverted", "mask_pixels", "masked_fill(~pixels", "masked_fill(pixels"),
    ("pixels", "one instead of zero", "mask_pixels", "~pixels, 0)", "~pixels, 1)"),
    ("pixels", "first channel alone", "mask_pixels", "return images.masked_fill(~pixels, 0)",
     "return torch.cat([images[:, :1].masked_fill(~pixels, 0), images[:, 1:]], dim=1)"),
    ("pixels", "columns first", "mask_pixels", '"b (rows columns) -> b 1 (rows y) (columns x)"',
     '"b (columns rows) -> b 1 (rows y) (columns x)"'),
    ("pixels", "pixels of the patches interleaved", "mask_pixels", "(rows y) (columns x)",
     "(y rows) (x columns)"),
    ("pixels", "in place", "mask_pixels", "images.masked_fill(", "images.masked_fill_("),
    ("pixels", "mask of the first image for all", "mask_pixels", "masked_fill(~pixels",
     "masked_fill(~pixels[:1]"),
    ("pixels", "cropped to the kept patch", "mask_pixels", "masked_fill(~pixels, 0)",
     "masked_fill(~pixels, 0)[:, :, :patch_size, :patch_size]"),
    *[(exercise, what, f"{name}.forward", right, wrong)
      for exercise, name in (("mocov3", "MoCoV3"), ("lodisc", "LoDisc")) for what, right, wrong in (
          ("global loss of the same view", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "self.contrast(q1, k1) + self.contrast(q2, k2)"),
          ("one direction twice", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "2 * self.contrast(q1, k2)"),
          ("one direction", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "self.contrast(q1, k2)"),
          ("mean of the directions", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "(self.contrast(q1, k2) + self.contrast(q2, k1)) / 2"),
          ("query and key exchanged", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "self.contrast(k2, q1) + self.contrast(k1, q2)"),
          ("query against query", "self.contrast(q1, k2) + self.contrast(q2, k1)",
           "self.contrast(q1, q2) + self.contrast(q2, q1)"),
          ("both views in one pass", "q1, q2 = self.query(view1), self.query(view2)",
           "q1, q2 = self.query(torch.cat([view1, view2])).chunk(2)"),
          ("gradient through the targets", "with torch.no_grad():", "with torch.enable_grad():"),
          ("momentum update in forward", "global_loss = self",
           "self.update_momentum(0.99)\n        global_loss = self"),
          ("queries without a gradient", "global_loss = self",
           "q1, q2 = q1.detach(), q2.detach()\n        global_loss = self"),
          ("views not checked", "check_views(view1, view2)", "pass"),
          ("shapes of the views not checked", "check_views(view1, view2)",
           'require(len(view1) > 1, "one image")'),
          ("height and width not checked", "check_views(view1, view2)",
           'require(len(view1) == len(view2) > 1, "views")'),
          ("number of images not checked", "check_views(view1, view2)",
           'require(view1.shape == view2.shape, "shapes")'),
      )],
    ("mocov3", "same query twice", "MoCoV3.forward", "self.query(view2)", "self.query(view1)"),
    ("mocov3", "keys of the online side", "MoCoV3.forward",
     "self.key(view1), self.key(view2)", "self.query(view1), self.query(view2)"),
    ("mocov3", "key computed twice", "MoCoV3.forward", "global_loss = self",
     "self.key(view1)\n        global_loss = self"),
    ("mocov3", "total of one direction", "MoCoV3.forward", "MoCoV3Output(global_loss,",
     "MoCoV3Output(self.contrast(q1, k2),"),
    ("mocov3", "loss alone returned", "MoCoV3.forward",
     "return MoCoV3Output(global_loss, global_loss)", "return global_loss"),
    ("keys", "through the online encoder", "LoDisc.key_and_mask",
     "patch_importance(self.momentum_encoder,", "patch_importance(self.encoder,"),
    ("keys", "through the online head", "LoDisc.key_and_mask", "self.momentum_projector",
     "self.projector"),
    ("keys", "through the predictor too", "LoDisc.key_and_mask",
     "self.momentum_projector(features)", "self.predictor(self.momentum_projector(features))"),
    ("keys", "importance of registers too", "LoDisc.key_and_mask",
     "features, importance = patch_importance(self.momentum_encoder, view, self.importance)",
     "features, rows = self.momentum_encoder.with_attention(view, 'row')\n"
     "        importance = IMPORTANCES[self.importance].function(rows, None)"),
    ("keys", "importance of the paper always", "LoDisc.key_and_mask", "self.importance)",
     '"product")'),
    ("keys", "half of num_kept for its root", "LoDisc.local_key", "math.isqrt(self.num_kept)",
     "self.num_kept // 4"),
    ("keys", "view masked in place", "LoDisc.local_key", "view = mask_pixels(view, mask, size)",
     "view.copy_(mask_pixels(view, mask, size))"),
    ("keys", "features without a head", "LoDisc.key_and_mask",
     "self.momentum_projector(features)", "features"),
    ("keys", "always the location mask", "LoDisc.key_and_mask", "MASKS[self.mask].function",
     'MASKS["location"].function'),
    ("keys", "keep ratio of the paper", "LoDisc.key_and_mask",
     "importance, self.keep_ratio, generator", "importance, 0.5, generator"),
    ("keys", "generator not passed", "LoDisc.key_and_mask", "self.keep_ratio, generator)",
     "self.keep_ratio)"),
    ("keys", "second pass for the features", "LoDisc.key_and_mask",
     "self.momentum_projector(features)",
     "self.momentum_projector(self.momentum_encoder(view))"),
    ("keys", "crop ignored", "LoDisc.key_and_mask",
     'box_mask if self.local_input == "crop" else MASKS[self.mask].function',
     "MASKS[self.mask].function"),
    ("keys", "pair exchanged", "LoDisc.key_and_mask", "self.momentum_projector(features), mask",
     "mask, self.momentum_projector(features)"),
    ("keys", "local branch sees the whole view", "LoDisc.local_key",
     "view = mask_pixels(view, mask, size)", "pass"),
    ("keys", "local branch sees the others", "LoDisc.local_key",
     "mask_pixels(view, mask, size)", "mask_pixels(view, ~mask, size)"),
    ("keys", "local branch through the online encoder", "LoDisc.local_key",
     "self.momentum_encoder(view, keep)", "self.encoder(view, keep)"),
    ("keys", "local branch through the online head", "LoDisc.local_key",
     "self.momentum_projector(", "self.projector("),
    ("keys", "tokens masked too", "LoDisc.local_key", "keep = kept_indices",
     "view, keep = mask_pixels(view, mask, size), kept_indices"),
    ("keys", "keep not passed", "LoDisc.local_key", "(view, keep)", "(view)"),
    ("keys", "box not enlarged", "LoDisc.local_key",
     "enlarge_box(view, mask, size, math.isqrt(self.num_kept))", "mask_pixels(view, mask, size)"),
    ("lodisc", "local loss of the same view", "LoDisc.forward",
     "self.contrast(q1, l2) + self.contrast(q2, l1)",
     "self.contrast(q1, l1) + self.contrast(q2, l2)"),
    ("lodisc", "global keys in the local loss", "LoDisc.forward",
     "self.contrast(q1, l2) + self.contrast(q2, l1)",
     "self.contrast(q1, k2) + self.contrast(q2, k1)"),
    ("lodisc", "local loss in one direction only", "LoDisc.forward",
     "self.contrast(q1, l2) + self.contrast(q2, l1)", "self.contrast(q1, l2)"),
    ("lodisc", "local keys with the mask of the other view", "LoDisc.forward",
     "self.local_key(view1, mask1)", "self.local_key(view1, mask2)"),
    ("lodisc", "global pass twice", "LoDisc.forward",
     "k1, mask1 = self.key_and_mask(view1, generator)",
     "k1, mask1 = self.key(view1), self.key_and_mask(view1, generator)[1]"),
    ("lodisc", "view 2 first", "LoDisc.forward",
     """k1, mask1 = self.key_and_mask(view1, generator)
            k2, mask2 = self.key_and_mask(view2, generator)""",
     """k2, mask2 = self.key_and_mask(view2, generator)
            k1, mask1 = self.key_and_mask(view1, generator)"""),
    ("lodisc", "masks exchanged", "LoDisc.forward", "(mask1, mask2)", "(mask2, mask1)"),
    ("lodisc", "generator not passed on for view 1", "LoDisc.forward",
     "self.key_and_mask(view1, generator)", "self.key_and_mask(view1)"),
    ("lodisc", "generator not passed on for view 2", "LoDisc.forward",
     "self.key_and_mask(view2, generator)", "self.key_and_mask(view2)"),
    ("lodisc", "weights exchanged", "LoDisc.forward",
     "self.global_weight * global_loss + self.local_weight * local_loss",
     "self.local_weight * global_loss + self.global_weight * local_loss"),
    ("lodisc", "global weight forgotten", "LoDisc.forward", "self.global_weight * global_loss",
     "global_loss"),
    ("lodisc", "local weight forgotten", "LoDisc.forward", "self.local_weight * local_loss",
     "local_loss"),
    ("lodisc", "total divided by the weights", "LoDisc.forward",
     "LoDiscOutput(total,", "LoDiscOutput(total / (self.global_weight + self.local_weight),"),
    ("lodisc", "weighted global loss returned", "LoDisc.forward",
     "(total, global_loss,", "(total, self.global_weight * global_loss,"),
    ("lodisc", "weighted local loss returned", "LoDisc.forward",
     "global_loss, local_loss, (", "global_loss, self.local_weight * local_loss, ("),
    ("lodisc", "losses exchanged", "LoDisc.forward", "(total, global_loss, local_loss,",
     "(total, local_loss, global_loss,"),
]
# (function, another body that does the same)
EQUIVALENT = [
    ("Attention.forward", """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        outputs, weights = [], []
        for q, k, v in zip(q.chunk(self.heads, -1), k.chunk(self.heads, -1),
                           v.chunk(self.heads, -1)):
            weights.append(attention_weights(q[:, None], k[:, None])[:, 0])  # head by head
            outputs.append((q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v)
        features, mean = self.proj(torch.cat(outputs, -1)), torch.stack(weights).mean(0)
        mean = {"row": mean[:, 0], "matrix": mean}.get(kind)
        return [features[:, :1] if class_only else features, mean]"""),
    ("LoDisc.forward", """
        check_views(view1, view2)
        (k1, m1), (k2, m2) = (self.key_and_mask(v, generator) for v in (view1, view2))
        q1, q2 = self.query(view1), self.query(view2)
        l1, l2 = self.local_key(view1, m1).detach(), self.local_key(view2, m2).detach()
        losses = torch.stack([self.contrast(q1, k2.detach()) + self.contrast(q2, k1.detach()),
                              self.contrast(q2, l1) + self.contrast(q1, l2)])
        total = losses @ torch.tensor([self.global_weight, self.local_weight])
        return LoDiscOutput(total, losses[0], losses[1], (m1, m2))"""),
    ("attention_weights", """
    q, k = q.double(), k.double()
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)).float()"""),
    ("Attention.forward", """
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        everything = (q @ k.transpose(-2, -1) / math.sqrt(D // self.heads)).softmax(-1)
        features = self.proj((everything @ v).transpose(1, 2).reshape(B, T, D))
        if class_only:
            features = features[:, [0]]
        mean = everything.mean(1)
        return features, {None: None, "row": mean[:, 0], "matrix": mean}[kind]"""),
    ("sincos_positions", """
    result = torch.zeros(1, 1 + side * side, dim)
    quarter = dim // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                w = 10000 ** (-4 * i / dim)
                values = (math.sin(row * w), math.cos(row * w), math.sin(column * w),
                          math.cos(column * w))
                for part, value in enumerate(values):
                    result[0, 1 + row * side + column, part * quarter + i] = value
    return result"""),
    ("attention_product", """
    result = 0
    for layer in attentions:
        result = result + torch.log(torch.maximum(
            layer, torch.tensor(torch.finfo(torch.float32).tiny)))
    return result"""),
    ("location_mask", """
    k = kept_count(importance.shape[1], keep_ratio)
    rank = torch.sort(-importance, dim=1, stable=True).indices.argsort(dim=1)
    return rank < k"""),
    ("location_mask", """
    mask = torch.zeros(importance.shape, dtype=torch.bool)
    for row, values in zip(mask, importance.tolist()):
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        row[order[:kept_count(len(values), keep_ratio)]] = True
    return mask"""),
    ("mask_pixels", """
    side = images.shape[-1] // patch_size
    grid = mask.view(-1, 1, side, side).float()
    return images * F.interpolate(grid, scale_factor=patch_size, mode="nearest")"""),
    ("mask_pixels", """
    result, columns = torch.zeros_like(images), images.shape[3] // patch_size
    for b, i in mask.nonzero().tolist():
        y, x = i // columns * patch_size, i % columns * patch_size
        box = (b, slice(None), slice(y, y + patch_size), slice(x, x + patch_size))
        result[box] = images[box]
    return result"""),
    ("momentum_update", """
    for old, new in zip(momentum.parameters(), online.parameters()):
        old.copy_(m * old + (1 - m) * new)"""),
    ("momentum_update", """
    for name, old in momentum.named_parameters():
        old.data.mul_(m).add_(dict(online.named_parameters())[name].data, alpha=1 - m)"""),
    ("momentum_schedule", """
    return base + (1 - base) * (1 - math.cos(step / total * math.pi)) / 2"""),
    ("contrastive_loss", """
    q = queries.float() / queries.float().norm(dim=1, keepdim=True)
    with torch.no_grad():
        k = keys.float() / keys.float().norm(dim=1, keepdim=True)
    with torch.autocast("cpu", enabled=False):
        logits = torch.mm(q, k.t()) / temperature
    rows = torch.arange(len(q))
    return 2 * temperature * (logits.logsumexp(1) - logits[rows, rows + offset]).mean()"""),
    ("MoCoV3.forward", """
        if view1.shape != view2.shape or len(view1) < 2:
            raise ValueError("views")
        loss = 0
        for one, other in ((view1, view2), (view2, view1)):
            loss = loss + self.contrast(self.query(one), self.key(other).detach())
        return MoCoV3Output(total=loss, global_loss=loss)"""),
    ("LoDisc.key_and_mask", """
        choose = MASKS[self.mask].function
        if self.local_input == "crop":
            choose = self.pivotal_mask
        features, importance = patch_importance(self.momentum_encoder, view, self.importance)
        mask = choose(importance, self.keep_ratio, generator)
        return self.momentum_projector(features), mask"""),
    ("momentum_schedule", """
    angle = torch.tensor(math.pi * step / total)
    return float(1 - (1 - base) * (angle.cos() + 1) / 2)"""),
    ("LoDisc.local_key", """
        encoder, keep = self.momentum_encoder, None
        if self.local_input == "tokens":
            keep = mask.nonzero()[:, 1].view(len(view), -1)
        elif self.local_input == "crop":
            view = enlarge_box(view, mask, encoder.patch_size, math.isqrt(self.num_kept))
        else:
            side = view.shape[-1] // encoder.patch_size
            view = view * mask.view(-1, 1, side, side).repeat_interleave(
                encoder.patch_size, 2).repeat_interleave(encoder.patch_size, 3)
        return self.momentum_projector(encoder(view, keep))"""),
    ("LoDisc.forward", """
        check_views(view1, view2)
        losses, masks, views = [0, 0], [], (view1, view2)
        keys = []
        for view in views:
            key, mask = self.key_and_mask(view, generator)
            masks.append(mask)
            keys.append((key.detach(), self.local_key(view, mask).detach()))
        for i in (0, 1):
            query = self.query(views[i])
            for kind in (0, 1):
                losses[kind] = losses[kind] + self.contrast(query, keys[1 - i][kind])
        total = losses[0] * self.global_weight + losses[1] * self.local_weight
        return LoDiscOutput(total, losses[0], losses[1], tuple(masks))"""),
    ("attention_rollout", """
    identity = product = torch.eye(attentions[0].shape[1])
    for matrix in attentions:
        product = (matrix + identity) / 2 @ product
    return product[:, 0, 1:]"""),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    out = tmp_path_factory.mktemp("kit") / "copy"
    make.main([str(out)])
    return out


def body(name):
    """Return the lines of a function of lodisc.py after its docstring."""
    node = FUNCTIONS[name]
    return "\n".join(SOURCE.splitlines()[node.body[0].end_lineno:node.end_lineno])


@pytest.fixture(scope="module")
def graders(kit):
    return make.load(kit / "test_exercises.py", "graders")


def failures(graders, exercise):
    """Run the graders of an exercise -> {name of those that fail: their message, None without}."""
    messages = {}
    for name, grader in inspect.getmembers(graders, inspect.isfunction):
        if name.startswith(f"test_{exercise}_"):
            try:
                grader()
            except pytest.xfail.Exception:
                pass  # a hint without points
            except (AssertionError, pytest.fail.Exception) as error:
                messages[name] = str(error)
            except Exception:
                messages[name] = None
    return messages


def changed(name, new_body, tmp_path):
    """Import lodisc.py with another body of a function."""
    before = body(name)
    assert SOURCE.count(before) == 1
    (tmp_path / "changed.py").write_text(SOURCE.replace(before, new_body), encoding="utf-8")
    return make.load(tmp_path / "changed.py", "changed_lodisc")


@pytest.fixture(scope="module")
def graded(kit, tmp_path_factory):
    """Grade the blank kit, the real bodies and a syntax error -> {name: (status, text)}."""
    folders = {name: shutil.copytree(kit, tmp_path_factory.mktemp("students") / name)
               for name in ("blank", "solved", "broken")}
    solution = (kit / "lodisc.py").read_text(encoding="utf-8")
    for exercise in DEFAULT:
        for name in make.EXERCISES[exercise]:
            indent = "        " if "." in name else "    "
            hole = f'{indent}raise NotImplementedError("exercise {exercise}: {name}")'
            assert solution.count(hole) == 1
            solution = solution.replace(hole, body(name))
    (folders["solved"] / "lodisc.py").write_text(solution, encoding="utf-8")
    (folders["broken"] / "lodisc.py").write_text("def broken(:\n")
    (folders["broken"] / "test_mine.py").write_text("def test_foo():\n    pass\n")
    command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider"]
    commands = {name: (command, folders[name]) for name in folders}
    commands["one exercise"] = [*command, "-k", "mask"], folders["solved"]
    begun = {name: subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
             for name, (words, folder) in commands.items()}
    printed = {name: process.communicate(timeout=200)[0] for name, process in begun.items()}
    return {name: (begun[name].returncode, text) for name, text in printed.items()}


def test_kit_contains_no_solution(kit):
    assert sorted(path.name for path in kit.rglob("*")) == [
        "METHOD.md", "README.md", "conftest.py", "expected.pt", "lodisc.py", "method.png",
        "points.json", "pytest.ini", "questions.md", "requirements.txt", "test_exercises.py"]
    blank = make.functions((kit / "lodisc.py").read_text(encoding="utf-8"))
    removed = {name: exercise for exercise in DEFAULT for name in make.EXERCISES[exercise]}
    assert blank.keys() == FUNCTIONS.keys()
    for name, exercise in removed.items():
        _, statement = blank[name].body
        assert ast.get_docstring(blank[name]) == ast.get_docstring(FUNCTIONS[name])
        assert ast.unparse(statement) == f"raise NotImplementedError('exercise {exercise}: {name}')"
    text = "\n".join(path.read_text(encoding="utf-8") for path in kit.iterdir()
                     if path.suffix in (".py", ".md"))
    bodies = "\n".join(body(name) for name in removed)
    for line in map(str.strip, bodies.splitlines()):
        elsewhere = SOURCE.count(line) - bodies.count(line)
        assert len(line) <= 30 or text.count(line) == elsewhere, line
    for name in FUNCTIONS.keys() - removed.keys():
        assert ast.unparse(FUNCTIONS[name]) == ast.unparse(blank[name])


def test_pages_of_the_kit_are_filled_in(kit):
    page = (kit / "README.md").read_text(encoding="utf-8")
    points = json.loads((kit / "points.json").read_text(encoding="utf-8"))
    assert list(points) == DEFAULT and sum(points.values()) == 100
    for exercise, value in points.items():
        names = ", ".join(f"`{name}`" for name in make.EXERCISES[exercise])
        assert f"| {exercise} | {names} | {value} |" in page
    assert "| total | | 100 |" in page and "-k attention" in page
    assert not re.search(r"\b(ROWS|FIRST|TOTAL|LOSSES)\b", page)
    method = (kit / "METHOD.md").read_text(encoding="utf-8")
    assert "method.png" in method and "pitfall" in method and "chance level" in method
    questions = (kit / "questions.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\d+)\.", questions, re.M) == [str(n) for n in range(1, 12)]


def test_answers_are_of_the_questions():
    """Each has one, and no answer is in the kit."""
    questions = (make.HERE / "kit" / "questions.md").read_text(encoding="utf-8")
    answers = (make.HERE / "ANSWERS.md").read_text(encoding="utf-8")
    points = re.findall(r"^(\d+)\. \[(\d+)\]", questions, re.M)
    assert re.findall(r"^(\d+)\. \[(\d+)\]", answers, re.M) == points
    assert sum(int(value) for _, value in points) == 38
    for picture in re.findall(r"\]\(([^)]+\.png)\)", answers):
        assert (make.HERE / picture).stat().st_size < 200_000


@pytest.mark.slow
def test_blank_kit_has_no_points_and_names_first_exercise(graded):
    status, text = graded["blank"]
    lines = text.splitlines()
    assert status == 1 and lines[-1] == "total         0 of 100"
    points = make.points_of(DEFAULT)
    assert lines[-12:-1] == [f"{name:<12}  0 of {value}" for name, value in points.items()]
    assert "exercise attention: attention_weights" in text and len(lines) < 160


@pytest.mark.slow
def test_original_bodies_get_full_points(graded):
    status, text = graded["solved"]
    assert status == 0 and text.endswith("total       100 of 100\n"), text
    assert "hint" not in text


@pytest.mark.slow
def test_one_exercise_alone_gives_its_own_points(graded):
    status, text = graded["one exercise"]
    assert status == 0 and text.endswith("total        10 of 100\n")
    assert "mask         10 of 10\n" in text and "pixels        0 of 8   8 not run\n" in text
    assert len(re.findall("not run", text)) == 10


@pytest.mark.slow
def test_kit_with_syntax_error_has_no_points(graded):
    _, text = graded["broken"]
    assert "INTERNALERROR" not in text and text.endswith("total         0 of 100\n")


def test_no_grader_has_the_name_of_another_exercise(graders):
    """So that -k EXERCISE runs that exercise."""
    names = [name for name, _ in inspect.getmembers(graders, inspect.isfunction)
             if name.startswith("test_")]
    for exercise in make.EXERCISES:
        own = [name for name in names if name.startswith(f"test_{exercise}_")]
        assert own and [name for name in names if exercise in name] == own
    assert all(isinstance(getattr(graders, name).points, int) for name in names)


def test_chosen_exercises_alone_are_removed_and_graded(tmp_path):
    make.main([str(tmp_path / "kit"), "--exercises", "rollout,mask"])
    text = (tmp_path / "kit" / "lodisc.py").read_text(encoding="utf-8")
    assert re.findall(r'"exercise (.*)"', text) == ["mask: location_mask",
                                                    "rollout: attention_rollout"]
    points = (tmp_path / "kit" / "points.json").read_text(encoding="utf-8")
    assert json.loads(points) == {"mask": 10, "rollout": 6}
    with pytest.raises(SystemExit):
        make.main([str(tmp_path / "other"), "--exercises", "mask,mash"])
    with pytest.raises(SystemExit):
        make.main([str(tmp_path / "kit")])
    assert not (tmp_path / "other").exists()


def test_exercises_have_enough_wrong_and_equivalent_solutions():
    assert len(WRONG) >= 50 and len({wrong[:3] for wrong in WRONG}) == len(WRONG)
    assert len(EQUIVALENT) >= 10
    for exercise, names in make.EXERCISES.items():
        assert sum(wrong[0] == exercise for wrong in WRONG) >= 3
        assert {name for name, _ in EQUIVALENT} >= set(names)
        assert all(wrong[2] in names for wrong in WRONG if wrong[0] == exercise)


@pytest.mark.parametrize("exercise, what, name, right, wrong", WRONG,
                         ids=[f"{wrong[0]}: {wrong[1]}" for wrong in WRONG])
def test_wrong_solutions_are_caught(graders, tmp_path, monkeypatch, exercise, what, name, right,
                                    wrong):
    assert body(name).count(right) >= 1, f"{name} does not contain {right!r}"
    mistaken = changed(name, body(name).replace(right, wrong), tmp_path)
    monkeypatch.setattr(graders, "lodisc", mistaken)
    messages = [message for message in failures(graders, exercise).values() if message]
    assert messages
    for message in messages:  # a hint, no bare assertion
        assert len(message.partition("\n")[0]) > 10 and not message.startswith("assert "), message
    assert not any(right in message for message in messages)


@pytest.mark.parametrize("name, new_body", EQUIVALENT)
def test_equivalent_solutions_are_accepted(graders, tmp_path, monkeypatch, name, new_body):
    monkeypatch.setattr(graders, "lodisc", changed(name, new_body, tmp_path))
    exercise, = (exercise for exercise, names in make.EXERCISES.items() if name in names)
    assert not failures(graders, exercise)


@pytest.mark.parametrize("name", [name for names in make.EXERCISES.values() for name in names])
def test_unsolved_function_costs_its_own_exercise_alone(graders, tmp_path, monkeypatch, name):
    indent = "        " if "." in name else "    "
    monkeypatch.setattr(graders, "lodisc", changed(name, f"{indent}raise NotImplementedError",
                                                   tmp_path))
    for exercise, names in make.EXERCISES.items():
        assert bool(failures(graders, exercise)) == (name in names), exercise


def test_update_that_rounds_has_a_hint(graders, tmp_path, monkeypatch):
    rounding = next(text for name, text in EQUIVALENT if name == "momentum_update")
    monkeypatch.setattr(graders, "lodisc", changed("momentum_update", rounding, tmp_path))
    with pytest.raises(pytest.xfail.Exception, match="costs nothing"):
        graders.test_update_of_equal_weights()


@pytest.mark.slow
def test_submissions_are_graded_to_csv(tmp_path, kit, capfd):
    """By fresh graders. A function without an end, or that ends the process, costs itself alone."""
    blank = (kit / "lodisc.py").read_text(encoding="utf-8")

    def with_body(name, text):
        return SOURCE.replace(body(name), text)

    submissions = {
        "solved": with_body("momentum_update", "    os.chdir('/')\n" + body("momentum_update")),
        "blank": blank, "broken": "def broken(:\n",
        "hangs": with_body("attention_weights", "    while True: pass"),
        "ends": with_body("momentum_update", """
    import pathlib
    pathlib.Path("../points.json").write_text("{")
    os._exit(1)"""),
        "inflates": "import json, os, sys\npath = sys.argv[sys.argv.index('--points') + 1]\n"
                    "points = dict.fromkeys(['loss', 'mask'], 50)\n"
                    "json.dump({'earned': points, 'ran': points}, open(path, 'w'))\nos._exit(0)\n"}
    for name, text in submissions.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "lodisc.py").write_text(text, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank" / "test_exercises.py").write_text("")
    (tmp_path / "blank" / "conftest.py").write_text("raise SystemExit")
    chosen = ["--exercises", "attention,update,loss", "--timeout", "25"]
    grade.main([*(str(tmp_path / name) for name in [*submissions, "empty"]), *chosen])
    rows = {Path(row["folder"]).name: row for row in csv.DictReader(
        capfd.readouterr().out.splitlines())}
    points = [[int(row[name]) for name in ("attention", "update", "loss", "total")]
              for row in rows.values()]
    assert dict(zip(rows, points)) == {
        "solved": [15, 6, 14, 35], "blank": 4 * [0], "broken": 4 * [0], "hangs": [0, 6, 14, 20],
        "ends": [15, 0, 14, 29], "inflates": [0, 0, 14, 14], "empty": 4 * [0]}
    notes = {name: row["note"] for name, row in rows.items()}
    assert notes["solved"] == notes["blank"] == "" and notes["empty"] == "no lodisc.py"
    assert notes["broken"].startswith("SyntaxError")
    assert notes["hangs"] == "attention: not done after 25 s"
    assert notes["ends"] == "update: the file of points was damaged"


@pytest.mark.parametrize("name", [name for names in make.EXERCISES.values() for name in names])
def test_function_that_returns_nothing_gets_hints(graders, tmp_path, monkeypatch, name):
    indent = "        " if "." in name else "    "
    monkeypatch.setattr(graders, "lodisc", changed(name, f"{indent}return None", tmp_path))
    exercise, = (exercise for exercise, names in make.EXERCISES.items() if name in names)
    messages = failures(graders, exercise)
    assert messages and all(messages.values()), messages


@pytest.mark.parametrize("exercise", [name for name in make.EXERCISES
                                      if name not in ("mocov3", "lodisc")])
def test_kit_of_one_exercise_contains_no_solution_of_it(exercise):
    blank = make.without_bodies(SOURCE, [exercise])
    bodies = "\n".join(body(name) for name in make.EXERCISES[exercise])
    for line in map(str.strip, bodies.splitlines()):
        elsewhere = SOURCE.count(line) - bodies.count(line)
        assert len(line) <= 30 or blank.count(line) == elsewhere == 0, line


def test_exercises_that_show_each_other_go_together(tmp_path):
    for names in ("mocov3", "lodisc,mask"):
        with pytest.raises(SystemExit):
            make.main([str(tmp_path / "kit"), "--exercises", names])
    make.main([str(tmp_path / "kit"), "--exercises", "mocov3,lodisc"])
