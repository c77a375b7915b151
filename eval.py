"""Judge an encoder: linear probe, k-NN, retrieval, and a picture of where it looks.

    python eval.py all runs/synthetic-lodisc-1
    python eval.py masks runs/synthetic-lodisc-1 [my-picture.jpg ...]
    python eval.py export runs/synthetic-lodisc-1

Features are the class token of the online encoder on a centre crop. Every figure goes to the
table on screen and into eval.json beside the checkpoint. Nothing is chosen on the test set here.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from data.augment import Plain, plain_crop, to_tensor
from data.birds import BIRD, PART
from data.datasets import data_name, load_data
from data.draw import mask_sheet
from data.pictures import open_picture
from data.run import FIGURES, filmed, merge_json, pick_device, read_json
from lodisc import IMPORTANCES, load_encoder, location_mask, require

STRENGTHS = tuple(10.0**power for power in range(0, -6, -1))  # of the probe's L2 term, strong first


# --- features -------------------------------------------------------------------------------


class RawPixels(torch.nn.Module):
    """The baseline that has learnt nothing: the picture itself, at 32 px at most, as a feature."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, min(32, images.shape[-1])).flatten(1), []


@torch.no_grad()
def extract(encoders, dataset, crop, device="cpu", workers=0, batch_size=256):
    """{name: encoder} -> {name: (features (n, D), labels (n,))} on the CPU; one reading for all.

    dataset: (image, class) pairs; crop: (image_size, mean, std), as the encoders want them.
    """
    loader = DataLoader(Plain(dataset, *crop), batch_size, num_workers=workers)
    encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
    features, labels = {name: [] for name in encoders}, []
    for images, label in loader:
        images = images.to(device)
        labels.append(label)
        for name, encoder in encoders.items():
            features[name].append(encoder(images)[0].float().cpu())
    labels = torch.cat(labels)
    return {name: (torch.cat(rows), labels) for name, rows in features.items()}


# --- the three judgements, on features --------------------------------------------------------


def fit_logistic(features, labels, classes, strength, start=None):
    """Multinomial logistic regression, mean cross-entropy + strength / 2 * |W|^2, by L-BFGS.

    features (n, D), labels (n,) -> weights (D + 1, classes), the last row the bias.
    """
    weights = torch.zeros(features.shape[1] + 1, classes) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weights[:-1] + weights[-1], labels)
        loss = loss + strength / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear_probe(train, test, seed=0):
    """Top-1 and top-5 accuracy of a linear classifier on frozen features.

    train, test: (features (n, D), labels (n,)). Features are standardised by the training set's
    figures; the L2 strength is chosen on a held-out tenth of train (a tenth of every class), then
    the classifier is fitted again on all of it.
    """
    (features, labels), (test_features, test_labels) = train, test
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    features, test_features = (features - mean) / std, (test_features - mean) / std
    classes = int(labels.max()) + 1

    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled[labels[shuffled].argsort(stable=True)]  # class by class
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[shuffled[::10]] = True
    losses, weights = {}, None
    for strength in STRENGTHS:  # by cross-entropy: accuracy on so few pictures is a lottery
        weights = fit_logistic(features[~held_out], labels[~held_out], classes, strength, weights)
        scores = features[held_out] @ weights[:-1] + weights[-1]
        losses[strength] = F.cross_entropy(scores, labels[held_out]).item()
    strength = min(losses, key=losses.get)
    weights = fit_logistic(features, labels, classes, strength)
    ranked = (test_features @ weights[:-1] + weights[-1]).topk(min(5, classes), dim=1).indices
    hits = ranked == test_labels[:, None]
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(1).float().mean().item(),
            "strength": strength}


def knn(train, test, k=20, temperature=0.07, block=1024):
    """Top-1 accuracy of a weighted vote of the k nearest training images.

    Cosine similarity s, weight exp(s / temperature); the protocol of Wu et al. 2018 and DINO.
    """
    bank, queries = F.normalize(train[0], dim=1), F.normalize(test[0], dim=1)
    classes, right = int(train[1].max()) + 1, 0
    for rows, labels in zip(queries.split(block), test[1].split(block)):
        similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, train[1][nearest], (similarity / temperature).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return {"top1": right / len(queries)}


def retrieval(test, block=512):
    """Each test image is a query against all others: rank-1, rank-5 and mAP, by cosine.

    Rank-k: whether one of the k nearest is of the query's class. Average precision: the mean of
    the precision at every image of its class. Queries without another image of their class are
    left out and counted. Of equally near images those of another class count as the nearer, so
    that features which tell nothing apart score nothing. Blocks of queries: no n x n matrix exists.
    """
    features, labels = F.normalize(test[0], dim=1), test[1]
    n, others = len(labels), labels.bincount()[labels] - 1  # others of a query's class, (n,)
    require(others.max() > 0, "retrieval needs a class with two test images or more, found none")
    count = torch.arange(1, others.max() + 1)
    found = []
    for own in torch.arange(n).split(block):
        similarity = features[own] @ features.T  # (block, n)
        same = labels[own, None] == labels
        wrong = np.sort(similarity.masked_fill(same, -torch.inf).numpy(), axis=1)
        same[torch.arange(len(own)), own] = False  # never its own answer
        right = similarity.masked_fill(~same, -torch.inf).topk(len(count)).values  # nearest first
        nearer = n - torch.searchsorted(torch.from_numpy(wrong), right)  # of the wrong ones
        rank = (nearer + count).masked_fill(count > others[own, None], n)  # (block, most others)
        average = (count / rank * (count <= others[own, None])).sum(1) / others[own].clamp_min(1)
        found.append(torch.stack([rank[:, 0] == 1, rank[:, 0] <= 5, average], dim=1))
    counted = torch.cat(found)[others > 0]
    rank1, rank5, mean_average = counted.double().mean(0).tolist()
    return {"rank1": rank1, "rank5": rank5, "mAP": mean_average, "queries": len(counted),
            "left_out": n - len(counted)}


def evaluate(encoders, data, crop, what="all", device="cpu", workers=0, seed=0):
    """{name: encoder} -> {name: {"linear": {...}, "knn": {...}, "retrieval": {...}}}, or of these
    only the one asked for.
    """
    test = extract(encoders, data.test, crop, device, workers)
    if what in ("all", "linear", "knn"):
        train = extract(encoders, data.train, crop, device, workers)
    retrievable = test[next(iter(test))][1].bincount().max() > 1
    if what == "all" and not retrievable:
        print("no retrieval: no class has two test images")
    results = {name: {} for name in encoders}
    for name, result in results.items():
        if what in ("all", "linear"):
            result["linear"] = linear_probe(train[name], test[name], seed)
        if what in ("all", "knn"):
            result["knn"] = knn(train[name], test[name])
        if what == "retrieval" or what == "all" and retrievable:
            result["retrieval"] = retrieval(test[name])
    return results


def table(rows):
    """{row name: figures}, as evaluate gives them, as aligned text."""
    columns = {name: place for name, place in FIGURES.items()
               if any(place[0] in results for results in rows.values())}
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name:>14}" for name in columns)]
    for name, results in rows.items():
        cells = (results[part][figure] for part, figure in columns.values())
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>14.3f}" for cell in cells))
    return "\n".join(lines)


# --- where it looks ---------------------------------------------------------------------------


@torch.no_grad()
def importance_of(encoder, images, importance):
    """Importance (B, N) of normalised images (B, 3, H, W); importance: a name in IMPORTANCES."""
    stored = "full" if importance == "rollout" else "row"
    images = images.to(encoder.cls_token.device)
    return IMPORTANCES[importance](encoder(images, attention=stored)[1]).cpu()


def localisation(encoder, dataset, importance="product", keep_ratio=0.3, workers=0):
    """How well the kept patches find the object, on plain pictures that know where it is.

    For the object, and for the drawn birds' deciding parts: the mean share of a patch's pixels
    that they cover, in the kept patches over that in all patches: 1 is chance, NAME_most what the
    patches that hold most of it would have, NAME_fixed the best that a mask has which is the same
    for all pictures. pointing_game: how often the middle of the most
    important patch lies on the object (after Zhang et al. 2016). dataset: one with
    regions(index), see data/birds.py.
    """
    size, patch = encoder.image_size, encoder.patch_size
    crop = v2.Compose(plain_crop(size, InterpolationMode.NEAREST))
    loader = DataLoader(Plain(dataset, size, encoder.mean, encoder.std), 256, num_workers=workers)
    weights = torch.cat([importance_of(encoder, batch, importance) for batch, _ in loader])
    kept, top = location_mask(weights, keep_ratio), weights.argmax(1)  # (n, N), (n,)
    shares, hits = {"object": [], "parts": []}, 0
    for i in range(len(dataset)):
        regions = torch.from_numpy(np.array(crop(dataset.regions(i))))  # (H, W)
        for name, least in (("object", BIRD), ("parts", PART)):
            covered = (regions >= least).float()[None]
            shares[name].append(F.avg_pool2d(covered, patch).flatten())
        middle = regions[patch // 2::patch, patch // 2::patch].flatten()[top[i]]
        hits += int(middle >= BIRD)
    shares = {name: torch.stack(rows) for name, rows in shares.items()}  # (n, N)
    figures, k = {}, int(kept[0].sum())
    for name, share in shares.items():
        if share.any():
            for kind, held in (("", share[kept]), ("_most", share.topk(k).values),
                               ("_fixed", share.mean(0).topk(k).values)):
                figures[name + kind] = (held.mean() / share.mean()).item()
    return {**figures, "pointing_game": hits / len(dataset)}


def write_masks(encoder, pictures, config, path):
    """A PNG of three rows: the pictures, their importance as a heat map, the kept patches."""
    crop = v2.Compose(plain_crop(encoder.image_size))
    normalise = v2.Compose(to_tensor(encoder.mean, encoder.std))
    pictures = [crop(picture) for picture in pictures]
    images = torch.stack([normalise(picture) for picture in pictures])
    importance = importance_of(encoder, images, config["importance"])
    masks = location_mask(importance, config["keep_ratio"])
    mask_sheet(pictures, importance, masks).save(path)


# --- the command line -------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["linear", "knn", "retrieval", "all", "masks",
                                         "export"])
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or its checkpoint.pt")
    parser.add_argument("images", nargs="*", type=Path,
                        help="masks: picture files instead of eight test pictures")
    parser.add_argument("--data", help="a data set by name, or a folder; default: what the run "
                        "trained on")
    parser.add_argument("--data-root", help="where named data sets lie; default: as in training")
    parser.add_argument("--momentum", action="store_true",
                        help="judge the momentum encoder; masks always show that one")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--workers", type=int, default=2, help="loading processes; default: 2")
    parser.add_argument("--out", type=Path, help="a new file; default: masks.png, for export "
                        "encoder.pth, beside the checkpoint")
    return parser.parse_args(argv)


def one_line(error):
    """An error for people; of one that a loading process raised, the line that matters."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return last.removeprefix("ValueError: ").removeprefix("OSError: ")


def keep(folder, data, config, figures):
    """Into eval.json; of other data than the run's own, below its name."""
    merge_json(folder / "eval.json", figures if data == config["data"] else {data: figures})
    print(f"merged into {folder / 'eval.json'}")


def masks_command(args, encoder, folder, config):
    """Where the momentum encoder looks: a PNG, and for the drawn birds how well it finds them."""
    require(args.out is None or not args.out.exists(), f"{args.out} exists; give another --out")
    out = args.out or folder / "masks.png"
    if args.images:
        pictures = [open_picture(path) for path in args.images]
    else:
        test = load_data(args.data, args.data_root).test
        require(test is not None, "this data has no test pictures; name picture files instead")
        labels = getattr(test, "targets", range(len(test)))
        by_class = sorted(range(len(test)), key=labels.__getitem__)  # from all classes
        pictures = [test[by_class[i]][0] for i in filmed(len(test))]
        if hasattr(test, "regions"):  # it knows where the object is
            figures = localisation(encoder, test, config["importance"], config["keep_ratio"],
                                   args.workers)
            print("kept patches' share over that of all patches:")
            for name in ("object", "parts"):
                if name in figures:
                    print(f"  {name} {figures[name]:.2f}, at most {figures[name + '_most']:.2f}; "
                          f"one mask for all pictures: {figures[name + '_fixed']:.2f}")
            print(f"pointing game: {figures['pointing_game']:.2f}")
            keep(folder, args.data, config, {"localisation": figures})
    write_masks(encoder, pictures, config, out)
    print(f"wrote {out}")


def export(encoder, path):
    """The encoder's weights alone, by timm's names, as torch.save writes them."""
    require(not path.exists(), f"{path} exists; give another --out")
    torch.save(encoder.state_dict(), path)
    print(f"wrote {path}: timm.models.VisionTransformer(img_size={encoder.image_size}, "
          f"patch_size={encoder.patch_size}, embed_dim={encoder.dim}, depth={len(encoder.blocks)}, "
          f"num_heads={encoder.blocks[0].attn.heads}, num_classes=0) takes it; pictures normalised "
          f"by mean {encoder.mean}, std {encoder.std}")


def main(argv=None):
    args = parse_args(argv)
    require(args.what == "masks" or not args.images, f"{args.what} takes no picture files, got "
            f"{', '.join(map(str, args.images))}; masks does")
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    encoder = load_encoder(args.checkpoint, momentum=args.momentum or args.what == "masks")
    if args.what == "export":
        return export(encoder, args.out or folder / "encoder.pth")
    config = read_json(folder / "config.json")
    args.data = data_name(args.data) if args.data else config["data"]
    args.data_root = args.data_root or config.get("data_root", "datasets")
    device = pick_device(args.device)
    if args.what == "masks":
        encoder.to(device)
        return masks_command(args, encoder, folder, config)
    data = load_data(args.data, args.data_root)
    require(data.test is not None, data.note)
    crop = (encoder.image_size, encoder.mean, encoder.std)
    name = "momentum" if args.momentum else "trained"
    results = evaluate({name: encoder}, data, crop, args.what, device, args.workers,
                       config["seed"])
    print(table(results))
    keep(folder, args.data, config, results if args.momentum else results[name])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # for people: one line, no traceback
        print(f"eval.py: {one_line(error)}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(2)  # not sys.exit, which waits for loading processes; they follow by themselves
