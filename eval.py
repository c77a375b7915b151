"""Evaluate an encoder: linear probe, k-NN, retrieval, and a picture of its pivotal patches.

    python eval.py all runs/synthetic-lodisc-1
    python eval.py all WEIGHTS --data DIR        published weights, see README.md
    python eval.py masks runs/synthetic-lodisc-1 [my-image.jpg ...]
    python eval.py export runs/synthetic-lodisc-1

A run's metrics go into its eval.json, and per test image into per_image.json. Features are of the
online encoder on a centre crop; nothing is chosen on the test set.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from data.augment import Plain, plain_crop, to_tensor
from data.birds import BIRD, PART
from data.datasets import data_name, load_data, open_image
from data.draw import example_indices, mask_sheet
from lodisc import (IMPORTANCES, METHODS, LoDisc, UserError, VisionTransformer, load_encoder,
                    location_mask, read_weights, require)

STRENGTHS = tuple(10.0**power for power in range(0, -6, -1))  # of the probe's L2 term, strong first
# a metric's name in tables, and its place in eval.json
METRICS = {"linear top-1": ("linear", "top1"), "top-5": ("linear", "top5"),
           "k-NN top-1": ("knn", "top1"), "rank-1": ("retrieval", "rank1"),
           "rank-5": ("retrieval", "rank5"), "mAP": ("retrieval", "mAP")}
MAIN_METRICS = {name: place for name, place in METRICS.items() if not name.endswith("-5")}
LOADERS = min(8, max(1, (os.cpu_count() or 2) - 1))  # loading processes


class RawPixels(torch.nn.Module):
    """The baseline without an encoder: the image itself, pooled to 16 x 16 px, as a feature."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, min(16, images.shape[-1])).flatten(1), []


@torch.no_grad()
def extract(encoders, dataset, crop, device="cpu", workers=0, kind="class", batch_size=256):
    """{name: encoder} -> {name: (features (n, D), labels (n,))} on the CPU, reading images once.

    dataset: (image, class) pairs; crop: (image_size, mean, std), the encoders' input; kind:
    "class", the class token, or "mean", the mean of the patch tokens."""
    loader = DataLoader(Plain(dataset, *crop), batch_size, num_workers=workers)
    encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
    features, labels = {name: [] for name in encoders}, []
    for images, label in loader:
        images = images.to(device)
        labels.append(label)
        for name, encoder in encoders.items():
            if kind == "mean" and isinstance(encoder, VisionTransformer):
                found = encoder.tokens(images)[0][:, 1:].mean(dim=1)
            else:
                found = encoder(images)[0]
            features[name].append(found.float().cpu())  # (batch, D)
    labels = torch.cat(labels)
    return {name: (torch.cat(rows), labels) for name, rows in features.items()}


def fit_logistic(features, labels, classes, strength, start=None):
    """Multinomial logistic regression: mean cross-entropy + strength / 2 * |W|^2, by L-BFGS.

    features (n, D), labels (n,) -> weights (D + 1, classes), the last row the bias."""
    weights = features.new_zeros(features.shape[1] + 1, classes) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-5,
                                  tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weights[:-1] + weights[-1], labels)
        loss = loss + strength / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear_probe(train, test, seed=0, device="cpu"):
    """Return top-1 and top-5 accuracy of a linear classifier on frozen features.

    train, test: (features (n, D), labels (n,)). Features are standardised by the training set; the
    L2 strength is chosen on a tenth of it, held out class by class, then the classifier is fitted
    on all. L-BFGS rather than SGD: values do not compare with published linear probes."""
    (features, labels), (test_features, test_labels) = [
        (features.to(device), labels.to(device)) for features, labels in (train, test)]
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    features, test_features = (features - mean) / std, (test_features - mean) / std
    classes = int(labels.max()) + 1

    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(device)
    shuffled = shuffled[labels[shuffled].argsort(stable=True)]  # class by class
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    held_out[shuffled[::10]] = True
    held_out &= labels.bincount()[labels] > 1  # every class keeps an image to train on
    losses, weights = {}, None
    for strength in STRENGTHS:  # by cross-entropy: accuracy on so few images is too noisy
        weights = fit_logistic(features[~held_out], labels[~held_out], classes, strength, weights)
        scores = features[held_out] @ weights[:-1] + weights[-1]
        losses[strength] = F.cross_entropy(scores, labels[held_out]).item()
    strength = min(losses, key=losses.get)
    weights = fit_logistic(features, labels, classes, strength)
    ranked = (test_features @ weights[:-1] + weights[-1]).topk(min(5, classes), dim=1).indices
    hits = ranked == test_labels[:, None]  # (n, 5)
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(1).float().mean().item(),
            "strength": strength, "per_image": {"top1": hits[:, 0].int().tolist()}}


def knn(train, test, k=20, temperature=0.07, block=1024):
    """Return top-1 accuracy of a weighted vote of the k nearest training images.

    Cosine similarity s, weight exp(s / temperature); the protocol of Wu et al. 2018 and DINO."""
    bank, queries = F.normalize(train[0], dim=1), F.normalize(test[0], dim=1)
    classes, hits = int(train[1].max()) + 1, []
    for rows, labels in zip(queries.split(block), test[1].split(block)):
        similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, train[1][nearest], (similarity / temperature).exp())
        hits += (votes.argmax(1) == labels).int().tolist()
    return {"top1": sum(hits) / len(queries), "per_image": {"top1": hits}}


def retrieval(test, block=512):
    """Rank every other test image for each test image: rank-1, rank-5 and mAP, by cosine.

    Rank-k: whether one of the k nearest is of the query's class. Average precision: the mean of
    the precision at every image of its class. Queries without another image of their class are
    left out and counted. Ties go against the query's class, so that constant features score 0."""
    features, labels = F.normalize(test[0], dim=1), test[1]
    n, others = len(labels), labels.bincount()[labels] - 1  # others of a query's class, (n,)
    require(others.max() > 0, "retrieval needs a class with two test images", UserError)
    count = torch.arange(1, others.max() + 1)
    found = []
    for own in torch.arange(n).split(block):
        similarity = features[own] @ features.T  # (block, n)
        same = labels[own, None] == labels
        wrong = np.sort(similarity.masked_fill(same, -torch.inf).numpy(), axis=1)
        same[torch.arange(len(own)), own] = False  # every query's nearest neighbour is itself
        right = similarity.masked_fill(~same, -torch.inf).topk(len(count)).values  # nearest first
        nearer = n - torch.searchsorted(torch.from_numpy(wrong), right)  # of the wrong ones
        rank = (nearer + count).masked_fill(count > others[own, None], n)  # (block, most others)
        average = (count / rank * (count <= others[own, None])).sum(1) / others[own].clamp_min(1)
        found.append(torch.stack([rank[:, 0] == 1, rank[:, 0] <= 5, average], dim=1))
    found, counted = torch.cat(found), others > 0
    rank1, rank5, mean_average = found[counted].double().mean(0).tolist()
    per_image = {name: [value if own else None for value, own in zip(values.tolist(), counted)]
                 for name, values in zip(("rank1", "rank5", "average_precision"), found.T)}
    return {"rank1": rank1, "rank5": rank5, "mAP": mean_average, "queries": int(counted.sum()),
            "left_out": n - int(counted.sum()), "per_image": per_image}


def evaluate(encoders, data, crop, what="all", device="cpu", workers=0, seed=0, kind="class"):
    """{name: encoder} -> {name: {"linear": {...}, "knn": {...}, "retrieval": {...}}}, or only the
    one that `what` names; the other arguments as in `extract` and `linear_probe`."""
    test = extract(encoders, data.test, crop, device, workers, kind)
    if what in ("all", "linear", "knn"):
        train = extract(encoders, data.train, crop, device, workers, kind)
    retrievable = test[next(iter(test))][1].bincount().max() > 1
    if what == "all" and not retrievable:
        print("no retrieval: no class has two test images")
    results = {name: {} for name in encoders}
    for name, result in results.items():
        if what in ("all", "linear"):
            result["linear"] = linear_probe(train[name], test[name], seed, device)
        if what in ("all", "knn"):
            result["knn"] = knn(train[name], test[name])
        if what == "retrieval" or what == "all" and retrievable:
            result["retrieval"] = retrieval(test[name])
    return results


def table(rows):
    """{row name: metrics}, as `evaluate` returns them, as aligned text."""
    columns = {name: place for name, place in METRICS.items()
               if any(place[0] in results for results in rows.values())}
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name:>14}" for name in columns)]
    for name, results in rows.items():
        cells = (results[part][metric] for part, metric in columns.values())
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>14.3f}" for cell in cells))
    return "\n".join(lines)


def merge_json(path, results, skip=None, indent=None):
    """Add results, without the keys `skip`, to a JSON file; other results in it stay."""
    def merged(known, new):
        return {**known, **{name: merged(known.get(name, {}), value) if isinstance(value, dict)
                            else value for name, value in new.items() if name != skip}}

    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(merged(known, results), indent=indent) + "\n")


def save_results(folder, results):
    """Merge results into eval.json, and with the values per test image into per_image.json."""
    merge_json(folder / "eval.json", results, skip="per_image", indent=2)
    merge_json(folder / "per_image.json", results)


def load_method(name):
    """Return the class CLASS of "FILE.py:CLASS"."""
    path, _, wanted = name.rpartition(":")
    require(Path(path).is_file(), f"--method {name}: no such file; expected FILE.py:CLASS, or "
            f"{', '.join(METHODS)}", UserError)
    spec = importlib.util.spec_from_file_location(f"method_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, wanted), f"--method {name}: no class {wanted} in that file", UserError)
    return getattr(module, wanted)


def build_method(config, encoder):
    """Return a run's model around an encoder, its heads drawn from torch's generator."""
    options = {name: config[name] for name in ("mask", "importance", "local_input", "keep_ratio",
                                               "temperature", "hidden_dim", "output_dim")}
    if config["method"] in METHODS:
        return LoDisc(encoder, config["method"], **options)
    return load_method(config["method"])(encoder, **options, **config["method_options"])


@torch.no_grad()
def importance_of(encoder, images, importance):
    """Importance (B, N) of normalised images (B, 3, H, W); importance: a name in IMPORTANCES."""
    function, stored = IMPORTANCES[importance]
    images = images.to(encoder.cls_token.device)
    return function(encoder(images, attention=stored)[1]).cpu()


def localisation(encoder, dataset, importance="product", keep_ratio=0.3, workers=0):
    """Measure how well the kept patches find the object, on plain images that know where it is.

    For the object, and for the drawn birds' deciding parts: the mean fraction of a patch's pixels
    that they cover, in the kept patches over that in all patches: 1 is chance, NAME_most the most
    that so many patches can have, NAME_fixed the best of one mask for all images.
    pointing_game: how often the centre of the most important patch is on the object (after Zhang
    et al. 2016). dataset: one with regions(index), see data/birds.py."""
    size, patch = encoder.image_size, encoder.patch_size
    crop = v2.Compose(plain_crop(size, InterpolationMode.NEAREST))
    loader = DataLoader(Plain(dataset, size, encoder.mean, encoder.std), 256, num_workers=workers)
    weights = torch.cat([importance_of(encoder, batch, importance) for batch, _ in loader])
    kept, top = location_mask(weights, keep_ratio), weights.argmax(1, keepdim=True)  # (n, N)
    regions = torch.stack([torch.from_numpy(np.array(crop(dataset.regions(i))))
                           for i in range(len(dataset))])[:, None]  # (n, 1, H, W)
    metrics, k = {}, int(kept[0].sum())
    for name, least in (("object", BIRD), ("parts", PART)):
        share = F.avg_pool2d((regions >= least).float(), patch).flatten(1)  # (n, N)
        if share.any():
            for kind, held in (("", share[kept]), ("_most", share.topk(k).values),
                               ("_fixed", share.mean(0).topk(k).values)):
                metrics[name + kind] = (held.mean() / share.mean()).item()
    centres = regions[:, 0, patch // 2::patch, patch // 2::patch].flatten(1)  # (n, N)
    return {**metrics, "pointing_game": (centres.gather(1, top) >= BIRD).float().mean().item()}


# --- the command line -------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=["linear", "knn", "retrieval", "all", "masks", "export"])
    add("checkpoint", type=Path, help="a run's folder, its checkpoint.pt, or published weights")
    add("images", nargs="*", type=Path, help="masks: image files in place of eight test images")
    add("--data", help="a data set by name, or a folder; default: the run's")
    add("--data-root", help="folder of the named data sets; default: the run's")
    add("--features", choices=["class", "mean"], default="class",
        help="the class token, or the mean of the patch tokens (default: class)")
    add("--image-size", type=int, help="pixels per side, for published weights; default: the "
        "multiple of the patch nearest to 98 on a CPU, 224 on a GPU")
    add("--momentum", action="store_true", help="evaluate the momentum (or teacher's) encoder; "
        "masks of a run always show that one")
    add("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if any)")
    add("--workers", type=int, default=LOADERS, help=f"loading processes (default: {LOADERS})")
    add("--out", type=Path, help="masks, export: a new file; default: beside a run's checkpoint, "
        "for published weights in the current folder")
    return parser.parse_args(argv)


def pick_device(name):
    """Return a device that works; "auto" is the accelerator, if there is one."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda" and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: one GPU per process
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def recipe_image_size(patch_size, device):
    """Return the multiple of the patch nearest to 98 px, or 224 px on a GPU."""
    return patch_size * round((224 if device.type == "cuda" else 98) / patch_size)


def read_data(args, config):
    """Load the data of the command line, or else of the run; it must have test images."""
    require(args.data or config, "published weights: give the images by --data", UserError)
    args.data = data_name(args.data) if args.data else config["data"]
    data = load_data(args.data, args.data_root or config.get("data_root", "datasets"),
                     held_out=args.data == config.get("data") and config["held_out"])
    require(data.test is not None, data.note, UserError)
    return data


def keep(args, config, results):
    """Save a run's results; other data, features or encoders than its own go below their name."""
    for name, applies in (("mean", args.features == "mean"), ("momentum", args.momentum),
                          (args.data, args.data != config.get("data"))):
        results = {name: results} if applies else results
    if config:
        save_results(args.folder, results)
        print(f"merged into {args.folder / 'eval.json'}")


def draw_masks(args, encoder, config, device):
    """Return a picture of the pivotal patches; for images with regions print how well they fit."""
    if config:  # a run: its momentum encoder, and the patches that its method shows
        model = build_method(config, encoder)
        model.load_state_dict(read_weights(args.checkpoint)["model"])
        model.momentum_encoder.mean, model.momentum_encoder.std = encoder.mean, encoder.std
        encoder = model.momentum_encoder
    else:
        model = LoDisc(encoder, hidden_dim=8, output_dim=8)
    model.to(device).eval()
    importance, keep_ratio = config.get("importance", "product"), config.get("keep_ratio", 0.3)
    if args.images:
        images = [open_image(path) for path in args.images]
    else:
        test = read_data(args, config).test
        by_class = sorted(range(len(test)), key=test.targets.__getitem__)  # from all classes
        images = [test[by_class[i]][0] for i in example_indices(len(test))]
        if hasattr(test, "regions"):
            found = localisation(encoder, test, importance, keep_ratio, args.workers)
            print("\n".join(f"{name:<16}{value:.2f}" for name, value in found.items()))
            keep(args, config, {"localisation": found})
    images = [v2.Compose(plain_crop(encoder.image_size))(image) for image in images]
    batch = torch.stack([v2.Compose(to_tensor(encoder.mean, encoder.std))(i) for i in images])
    masks = model.masks(batch.to(device))
    return mask_sheet(images, importance_of(encoder, batch, importance),
                      None if masks is None else masks.cpu())


def export(encoder, path):
    """Write the encoder by timm's names, with what load_encoder needs to build it again."""
    config = dict(image_size=encoder.image_size, patch_size=encoder.patch_size, dim=encoder.dim,
                  depth=len(encoder.blocks), heads=encoder.blocks[0].attn.heads,
                  mean=list(encoder.mean), std=list(encoder.std))
    torch.save({"state_dict": encoder.state_dict(), "config": config}, path)
    print("for timm.models.VisionTransformer(img_size={image_size}, patch_size={patch_size}, "
          "embed_dim={dim}, depth={depth}, num_heads={heads}, num_classes=0)".format(**config))


def main(argv=None):
    args = parse_args(argv)
    require(args.what == "masks" or not args.images, f"{args.what} takes no image files, got "
            f"{', '.join(map(str, args.images))}; masks does", UserError)
    device = pick_device(args.device)
    encoder = load_encoder(args.checkpoint, args.momentum, args.image_size)
    config = encoder.config if "method" in encoder.config else {}
    require(not (config and args.image_size), "--image-size is for published weights", UserError)
    if not (encoder.config or args.image_size):
        size = recipe_image_size(encoder.patch_size, device)
        encoder = load_encoder(args.checkpoint, args.momentum, size)
    if not config:
        print(f"{encoder.source}; at {encoder.image_size} px")
    args.folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    if args.what in ("masks", "export"):
        name = "masks.png" if args.what == "masks" else "encoder.pth"
        out = args.out or (args.folder if config else Path()) / name
        own = config and args.what == "masks" and not args.out  # of an earlier call
        require(own or not out.exists(), f"{out} exists; give another --out", UserError)
        if args.what == "masks":
            draw_masks(args, encoder, config, device).save(out)
        else:
            export(encoder, out)
        return print(f"wrote {out}")
    name = "momentum" if args.momentum else "trained" if config else "published"
    crop = encoder.image_size, encoder.mean, encoder.std
    results = evaluate({name: encoder}, read_data(args, config), crop, args.what, device,
                       args.workers, config.get("seed", 0), args.features)
    print(table(results))
    keep(args, config, results[name])


def exit_with_line(program, error):
    """Print a user's mistake in one line (of a loading process: the last) and exit with 2."""
    line = str(error).splitlines()[-1].removeprefix("lodisc.UserError: ")
    print(f"{program}: {line}", file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(2)  # sys.exit would wait for the loading processes


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with_line("eval.py", error)
