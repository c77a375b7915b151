"""Measure how well images are told apart when only some of their patches are shown."""

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.utils.data import DataLoader, Subset

from data.augment import Plain
from data.draw import TILE
from eval import importance_of, retrieval
from lodisc import IMPORTANCES, MASKS, attention_product, location_mask, mask_pixels

SHOWN = ("location", "random", "least")  # masks
IMAGES = 512  # at most, evenly spaced


def evenly_spaced(dataset):
    return range(0, len(dataset), -(-len(dataset) // IMAGES))


@torch.no_grad()
def encode(encoder, dataset, crop, keep_ratio=0.3, device="cpu"):
    """Encode whole images and masked ones -> {"all" or a mask: features (n, D)}, and the location
    masks, bool (n, N). The importance is the encoder's own, the product over its layers. crop:
    (image_size, mean, std), the encoder's input."""
    features, kept = {name: [] for name in ("all", *SHOWN)}, []
    draws = torch.Generator().manual_seed(0)
    for images, _ in DataLoader(Plain(dataset, *crop), 256):
        whole, attentions = encoder.to(device)(images.to(device), attention="row")
        importance = attention_product(attentions).cpu()  # (B, N)
        masks = {name: MASKS[name][0](importance, keep_ratio, draws) for name in SHOWN}
        features["all"].append(whole.cpu())
        for name, mask in masks.items():
            masked = mask_pixels(images, mask, encoder.patch_size).to(device)
            features[name].append(encoder(masked)[0].cpu())
        kept.append(masks["location"])
    return {name: torch.cat(rows) for name, rows in features.items()}, torch.cat(kept)


def measure(encoders, dataset, crop, keep_ratio=0.3, device="cpu"):
    """Measure {row: encoder} on test images -> {row: {"all" or a mask: metrics}}.

    rank1, mAP   retrieval among the images, all masked alike
    own          of the whole images, the fraction whose nearest masked image is their own; the
                 local loss wants this, of augmented views
    in_common    of the location masks' patches, the fraction that the first row keeps too"""
    chosen = evenly_spaced(dataset)
    labels = torch.tensor(dataset.targets)[chosen]
    results, before = {}, None
    for row, encoder in encoders.items():
        features, kept = encode(encoder, Subset(dataset, chosen), crop, keep_ratio, device)
        before = kept if before is None else before
        results[row] = {name: {key: value for key, value in retrieval((found, labels)).items()
                               if key in ("rank1", "mAP")} for name, found in features.items()}
        whole = F.normalize(features["all"], dim=1)  # (n, D)
        for name in SHOWN:
            nearest = (whole @ F.normalize(features[name], dim=1).T).argmax(1)  # (n,)
            own = nearest == torch.arange(len(nearest))
            results[row][name]["own"] = own.double().mean().item()
        results[row]["location"]["in_common"] = ((before & kept).sum() / kept.sum()).item()
    return results


def border_shares(encoder, dataset, crop, keep_ratio=0.3):
    """Return {importance: the fraction of the kept patches that lie on the image's border}, over
    test images; crop: as in `encode`."""
    border, kept = dict.fromkeys(IMPORTANCES, 0), 0
    for images, _ in DataLoader(Plain(Subset(dataset, evenly_spaced(dataset)), *crop), 64):
        for name in IMPORTANCES:
            mask = location_mask(importance_of(encoder, images, name), keep_ratio)  # (B, N)
            mask = rearrange(mask, "b (h w) -> b h w", h=crop[0] // encoder.patch_size)
            border[name] += (mask.sum() - mask[:, 1:-1, 1:-1].sum()).item()
        kept += mask.sum().item()  # as many for every importance
    return {name: count / kept for name, count in border.items()}


def mosaic(image, patch_size):
    """Paint every patch of a PIL image in its mean colour, so that no photograph is copied."""
    side = image.width // patch_size
    return image.resize((side, side), Image.BOX).resize((TILE, TILE), Image.NEAREST)
