"""Measure how well images are told apart when only some of their patches are shown."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from data.augment import Plain
from eval import border_fraction, importance_of, retrieval
from lodisc import IMPORTANCES, MASKS, location_mask, mask_pixels, patch_importance

SHOWN = ("location", "random", "least")  # masks
IMAGES = 512  # at most, evenly spaced


def evenly_spaced(dataset):
    return range(0, len(dataset), -(-len(dataset) // IMAGES))


@torch.no_grad()
def encode(encoder, dataset, preprocessing, keep_ratio=0.3, device="cpu"):
    """Encode whole images and masked ones -> {"all" or a mask: features (n, D)}, and the location
    masks, bool (n, N). The importance is the encoder's own, the product over its layers."""
    features, kept = {name: [] for name in ("all", *SHOWN)}, []
    encoder, draws = encoder.to(device), torch.Generator().manual_seed(0)
    for images, _ in DataLoader(Plain(dataset, preprocessing), 256):
        whole, importance = patch_importance(encoder, images.to(device), "product")
        features["all"].append(whole.cpu())
        for name in SHOWN:
            mask = MASKS[name].function(importance.cpu(), keep_ratio, draws)  # (B, N)
            masked = mask_pixels(images, mask, encoder.patch_size).to(device)
            features[name].append(encoder(masked).cpu())
            if name == "location":
                kept.append(mask)
    return {name: torch.cat(batches) for name, batches in features.items()}, torch.cat(kept)


def measure(encoders, dataset, preprocessing, keep_ratio=0.3, device="cpu"):
    """Measure {row: encoder} on test images -> {row: {"all" or a mask: metrics}}.

    rank1, mAP   retrieval among the images, all masked alike
    own          of the whole images, the fraction whose nearest masked image is their own; the
                 local loss wants this, of augmented views
    in_common    of the location masks' patches, the fraction that the first row keeps too"""
    chosen = evenly_spaced(dataset)
    labels = torch.tensor(dataset.targets)[chosen]
    results, kept_first = {}, None
    for row, encoder in encoders.items():
        features, kept = encode(encoder, Subset(dataset, chosen), preprocessing, keep_ratio, device)
        if kept_first is None:
            kept_first = kept
        metrics = results[row] = {}
        for name, of_images in features.items():
            ranked = retrieval((of_images, labels))
            metrics[name] = {"rank1": ranked["rank1"], "mAP": ranked["mAP"]}
        whole = F.normalize(features["all"], dim=1)  # (n, D)
        for name in SHOWN:
            nearest = (whole @ F.normalize(features[name], dim=1).T).argmax(1)  # (n,)
            is_itself = nearest == torch.arange(len(nearest))
            metrics[name]["own"] = is_itself.double().mean().item()
        in_common = (kept_first & kept).sum() / kept.sum()
        metrics["location"]["in_common"] = in_common.item()
    return results


def border_fractions(encoder, dataset, preprocessing, keep_ratio=0.3):
    """Return {importance: the fraction of the kept patches on the image's border}, over test
    images."""
    masks = {name: [] for name in IMPORTANCES}
    subset = Subset(dataset, evenly_spaced(dataset))
    for images, _ in DataLoader(Plain(subset, preprocessing), 64):
        for name in IMPORTANCES:
            masks[name].append(location_mask(importance_of(encoder, images, name), keep_ratio))
    return {name: border_fraction(torch.cat(batches)) for name, batches in masks.items()}
