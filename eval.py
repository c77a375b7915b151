"""Evaluate an encoder (linear probe, k-NN, retrieval), draw what it sees, write its features.

    python eval.py all runs/synthetic-lodisc-1
    python eval.py all WEIGHTS --data DIR        published weights, see README.md
    python eval.py masks runs/synthetic-lodisc-1 [my-image.jpg ...]
    python eval.py neighbours runs/synthetic-lodisc-1
    python eval.py embed runs/synthetic-lodisc-1 [my-image.jpg ... | --data DIR] [--out f.csv]
    python eval.py export runs/synthetic-lodisc-1

A run's metrics go into its eval.json, and per test image into per_image.json. Features are of the
online encoder on a centre crop; nothing is chosen on the test set."""

import argparse
import csv
import importlib.util
import io
import json
import os
import sys
import time
import uuid
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import v2

from data.augment import (Plain, Preprocessing, Readable, cropped_maps, decode_map, plain_crop,
                          to_tensor)
from data.birds import BIRD
from data.datasets import (Fold, Gallery, check_headers, data_name, default_workers,
                           fitting_workers, hash_images, load_data, load_gallery,
                           naming_dead_workers, open_image, printable, read_headers,
                           say_if_dark)
from data.draw import (PART_COLOURS, SHOWN, TILE, example_indices, mask_sheet, neighbour_sheet,
                       sheet)
from lodisc import (METHODS, NORMALISATIONS, MoCoV3, UserError, VisionTransformer, load_encoder,
                    location_mask, patch_importance, read_weights, require)

VERSION = 2  # of the metrics; 1: the probe's grid ended at 1e-5, its split followed the run's seed
STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))  # of the probe's L2 term, strong first
METRICS = {"linear top-1": ("linear", "top1"), "top-5": ("linear", "top5"),  # in eval.json
           "k-NN top-1": ("knn", "top1"), "rank-1": ("retrieval", "rank1"),
           "rank-5": ("retrieval", "rank5"), "mAP": ("retrieval", "mAP")}
MAIN_METRICS = {name: place for name, place in METRICS.items() if not name.endswith("-5")}
BATCH = 64  # images
PLAIN = {"registers": 0, "eps": 1e-6}  # sizes of an encoder that is not from published weights
META = "https://dl.fbaipublicfiles.com/"
WEIGHTS = {  # name: the publisher's address
    "dino": META + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",  # ViT-S/16
    "dinov2": META + "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",  # ViT-S/14
    "imagenet": ViT_B_16_Weights.IMAGENET1K_V1.url,  # ViT-B/16, trained with labels
}


# --- features ---------------------------------------------------------------------------------


class RawPixels(torch.nn.Module):
    """Features without an encoder: pixels pooled to 16 x 16."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, min(16, images.shape[-1])).flatten(1)


def input_of(encoder):
    """Return the Preprocessing of the images that an encoder expects."""
    return Preprocessing(encoder.image_size, encoder.mean, encoder.std)


def plain_loader(dataset, preprocessing, workers, items=Plain):
    """Return a DataLoader of (centre crops, labels), or of what the Dataset class `items` returns,
    with as many workers as fit in shared memory."""
    workers = fitting_workers(workers, BATCH * 3 * preprocessing.crop**2 * 4)
    return DataLoader(items(dataset, preprocessing), BATCH, num_workers=workers,
                      generator=torch.Generator())  # so that it does not draw from torch's


def encode(encoder, images, kind):
    """Return features (B, D): kind "class", the class token; "mean", the mean of the patch tokens;
    or "patches", the patch tokens, (B, N, D)."""
    is_raw = isinstance(encoder, RawPixels)  # which has no class token to compare with
    if kind == "class" or (kind == "mean" and is_raw):
        return encoder(images)
    _, patches = encoder.tokens(images)
    return patches.mean(dim=1) if kind == "mean" else patches


@torch.no_grad()
def extract(encoders, dataset, preprocessing, device="cpu", workers=0, kind="class"):
    """{name: encoder} -> {name: (features (n, D), labels (n,))} on the CPU, reading images once.

    dataset: (image, class) pairs; preprocessing: the encoders' input; kind: as in `encode`."""
    loader = plain_loader(dataset, preprocessing, workers)
    encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
    features, labels = {name: [] for name in encoders}, []
    with naming_dead_workers():
        for images, label in loader:
            images = images.to(device)
            labels.append(label)
            for name, encoder in encoders.items():
                features[name].append(encode(encoder, images, kind).float().cpu())
    return {name: (torch.cat(batches), torch.cat(labels)) for name, batches in features.items()}


# --- metrics ----------------------------------------------------------------------------------


def require_finite(features):
    """Raise UserError unless all features (n, D) are finite."""
    broken = int((~features.isfinite()).any(dim=1).sum())
    require(not broken, f"the features of {broken} of {len(features)} images are not finite: the "
            "encoder has diverged, or its weights are damaged", UserError)


def fit_logistic(features, labels, strength, start, tolerance=1e-7):
    """Multinomial logistic regression: mean cross-entropy + strength / 2 * |W|^2, by L-BFGS.

    features (n, D), labels (n,), start and result (D + 1, classes), the last row the bias. The
    penalty makes the objective strongly convex in W: |gradient|^2 / (2 strength) bounds its
    distance from the minimum, but for the bias. The fit ends when this estimate is `tolerance` of
    the objective (or 1e-8), or when 20 iterations lower it by less than twice that; float64 takes
    over where float32 would only follow its rounding errors."""
    weights = start.detach()
    for dtype, least_progress in ((torch.float32, 1e-3), (torch.float64, 2 * tolerance)):
        inputs, weights = features.to(dtype), weights.to(dtype, copy=True).requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=20, tolerance_grad=0, tolerance_change=0,
                                      history_size=20, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            loss = F.cross_entropy(inputs @ weights[:-1] + weights[-1], labels)
            loss = loss + strength / 2 * weights[:-1].square().sum()
            loss.backward()
            return loss

        for _ in range(250):
            before = optimizer.step(objective).item()
            loss = objective().item()
            gap = weights.grad.double().square().sum().item() / (2 * strength)
            if gap <= max(tolerance * loss, 1e-8):
                return weights.detach().to(features.dtype)
            stalled = before - loss <= least_progress * loss
            if stalled:
                break
        weights = weights.detach()
    if not stalled:
        warnings.warn(f"the linear probe of strength {strength:g} has not converged: its objective "
                      f"{loss:.4g} is about {gap:.1g} above the minimum")
    return weights.to(features.dtype)


def split_by_class(labels):
    """Return the images on which the probe's strength is chosen, bool (n,): a stratified tenth,
    drawn with seed 0; classes with a single image are left out."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order.to(labels.device)
    order = order[labels[order].argsort(stable=True)]  # class by class
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    held_out[order[::10]] = True
    return held_out & (labels.bincount()[labels] > 1)  # every class keeps an image to train on


def linear_probe(train, test, device="cpu", held_out=None):
    """Return top-1 and top-5 accuracy of a linear classifier on frozen features.

    train, test: (features (n, D), labels (n,)). Features are standardised by the training set, the
    L2 strength is chosen on held_out, bool (n,), by default `split_by_class`, then the classifier
    is fitted on all; without held-out images the strongest is taken. By L-BFGS, not SGD: values
    compare with no published probe's. Raises UserError for features that are not finite."""
    if torch.device(device).type == "mps":  # MPS has no float64
        device = "cpu"
    features, labels = train[0].to(device), train[1].to(device)
    test_features, test_labels = test[0].to(device), test[1].to(device)
    require_finite(features)
    require_finite(test_features)
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    features, test_features = (features - mean) / std, (test_features - mean) / std
    classes = int(labels.max()) + 1
    if held_out is None:
        held_out = split_by_class(labels)
    losses, weights = {}, features.new_zeros(features.shape[1] + 1, classes)
    for strength in STRENGTHS if held_out.any() else STRENGTHS[:1]:
        weights = fit_logistic(features[~held_out], labels[~held_out], strength, weights, 1e-5)
        scores = features[held_out] @ weights[:-1] + weights[-1]
        # by cross-entropy: accuracy on so few images is too noisy
        losses[strength] = F.cross_entropy(scores, labels[held_out]).item()
    strength = min(losses, key=losses.get)
    weights = fit_logistic(features, labels, strength, torch.zeros_like(weights))
    ranked = (test_features @ weights[:-1] + weights[-1]).topk(min(5, classes), dim=1).indices
    hits = ranked == test_labels[:, None]  # (n, 5)
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(1).float().mean().item(),
            "strength": strength, "per_image": {"top1": hits[:, 0].int().tolist(),
                                                "predicted": ranked[:, 0].tolist()}}


def knn(train, test, k=20, temperature=0.07):
    """Return top-1 accuracy of a vote of the k nearest training images by cosine similarity, each
    weighted by exp(similarity / temperature): the protocol of Wu et al. 2018 and DINO."""
    require_finite(train[0])
    require_finite(test[0])
    bank, queries = F.normalize(train[0], dim=1), F.normalize(test[0], dim=1)
    votes = torch.zeros(len(queries), int(train[1].max()) + 1)  # (n, classes)
    for rows in torch.arange(len(queries)).split(1024):
        similarity, nearest = (queries[rows] @ bank.T).topk(min(k, len(bank)), dim=1)  # (rows, k)
        weights = (similarity / temperature).exp()
        votes[rows] = votes[rows].scatter_add(1, train[1][nearest], weights)
    hits = votes.argmax(1) == test[1]
    return {"top1": hits.double().mean().item(), "per_image": {"top1": hits.int().tolist()}}


def retrieval(test, block=512):
    """Rank every other test image for each test image: rank-1, rank-5 and mAP, by cosine.

    Rank-k: whether one of the k nearest is of the query's class. Average precision: the mean of
    the precision at every image of its class. Queries without another image of their class are
    left out and counted. Ties go against the query's class: rank-1 of constant features is 0."""
    require_finite(test[0])
    features, labels = F.normalize(test[0], dim=1), test[1]
    n, siblings = len(labels), labels.bincount()[labels] - 1  # siblings: others of its class, (n,)
    require(siblings.max() > 0, "retrieval needs a class with two test images", UserError)
    place = torch.arange(1, siblings.max() + 1)  # of a sibling among the siblings, nearest first
    first_ranks, average_precisions = [], []
    for queries in torch.arange(n).split(block):
        similarity = features[queries] @ features.T  # (block, n)
        same_class = labels[queries, None] == labels
        wrong = np.sort(similarity.masked_fill(same_class, -torch.inf).numpy(), axis=1)
        same_class[torch.arange(len(queries)), queries] = False  # a query is no result of its own
        right = similarity.masked_fill(~same_class, -torch.inf).topk(len(place)).values
        wrong_before = n - torch.searchsorted(torch.from_numpy(wrong), right)  # (block, places)
        rank = wrong_before + place  # of the sibling among all images
        precision = place / rank
        exists = place <= siblings[queries, None]
        average = (precision * exists).sum(1) / siblings[queries].clamp_min(1)
        first_ranks.append(rank[:, 0])
        average_precisions.append(average)
    first_rank, average_precision = torch.cat(first_ranks), torch.cat(average_precisions)
    counted = siblings > 0
    values = {"rank1": (first_rank == 1).float(), "rank5": (first_rank <= 5).float(),
              "average_precision": average_precision}
    means = {name: value[counted].double().mean().item() for name, value in values.items()}
    per_image = {}
    for name, value in values.items():
        per_image[name] = [x if has_siblings else None
                           for x, has_siblings in zip(value.tolist(), counted.tolist())]
    return {"rank1": means["rank1"], "rank5": means["rank5"], "mAP": means["average_precision"],
            "queries": int(counted.sum()), "left_out": int((~counted).sum()),
            "per_image": per_image}


def evaluate(encoders, data, preprocessing, what="all", device="cpu", workers=0, kind="class"):
    """{name: encoder} -> {name: {"linear": {...}, "knn": {...}, "retrieval": {...}}}, or only the
    one that `what` names; the other arguments as in `extract`."""
    test = extract(encoders, data.test, preprocessing, device, workers, kind)
    if what != "retrieval":
        train = extract(encoders, data.train, preprocessing, device, workers, kind)
    _, labels = next(iter(test.values()))
    has_pairs = labels.bincount().max() > 1
    if what == "all" and not has_pairs:
        print("no retrieval: no class has two test images")
    rows = {}
    for name in encoders:
        row = rows[name] = {}
        if what in ("all", "linear"):
            row["linear"] = linear_probe(train[name], test[name], device)
            strength = row["linear"]["strength"]
            if strength in (STRENGTHS[0], STRENGTHS[-1]):
                print(f"{name}: the probe's best strength, {strength:g}, is at the edge of its "
                      "grid")
        if what in ("all", "knn"):
            row["knn"] = knn(train[name], test[name])
        if what == "retrieval" or (what == "all" and has_pairs):
            row["retrieval"] = retrieval(test[name])
    return rows


@torch.no_grad()
def importance_of(encoder, images, name):
    """Importance (B, N) of normalised images (B, 3, H, W) on the CPU; name: in IMPORTANCES."""
    _, importance = patch_importance(encoder, images.to(encoder.cls_token.device), name)
    require_finite(importance)
    return importance.cpu()


def object_cover(masks, cover):
    """Return how much of the object the kept patches show: the mean of cover over them, relative to
    the mean over all patches, so that 1 is chance level.

    masks bool (n, N); cover (n, N): the fraction of a patch's pixels that the object covers."""
    return (cover[masks].mean() / cover.mean()).item()


def border_fraction(masks):
    """Return the fraction of the kept patches, bool (n, N), on the border of the square grid."""
    grid = rearrange(masks, "n (side columns) -> n side columns", side=round(masks.shape[1]**0.5))
    return 1 - (grid[:, 1:-1, 1:-1].sum() / grid.sum()).item()


def patch_cover(dataset, size, patch_size, least=BIRD):
    """Return the fraction of each patch's pixels whose region is `least` or above: (n, N)."""
    regions = cropped_maps(dataset.regions, range(len(dataset)), size)  # (n, H, W)
    return F.avg_pool2d((regions >= least).float(), patch_size).flatten(1)


def location_masks(encoder, dataset, importance="product", keep_ratio=0.3, workers=0,
                   choose=location_mask):
    """Return the location masks of a data set's centre crops, or what else the function `choose`
    keeps: bool (n, N)."""
    preprocessing = input_of(encoder)
    masks = []
    with naming_dead_workers():
        for images, _ in plain_loader(dataset, preprocessing, workers):
            masks.append(choose(importance_of(encoder, images, importance), keep_ratio))
    return torch.cat(masks)


# --- results ----------------------------------------------------------------------------------


def table(rows, metrics=METRICS):
    """{row name: metrics}, as `evaluate` returns them, as aligned text."""
    columns = []
    for name, (part, key) in metrics.items():
        if any(key in results.get(part, {}) for results in rows.values()):
            columns.append((name, part, key))
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name:>14}" for name, _, _ in columns)]
    for row, results in rows.items():
        cells = [f"{results[part][key]:>14.3f}" for _, part, key in columns]
        lines.append(f"{row:<{width}}" + "".join(cells))
    return "\n".join(lines)


def merge(stored, new):
    """Return nested dicts with new values in place of stored ones; other stored values stay."""
    merged = dict(stored)
    for name, value in new.items():
        merged[name] = merge(stored.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def without_per_image(results):
    """Return nested dicts without their values per image."""
    kept = {}
    for name, value in results.items():
        if name != "per_image":
            kept[name] = without_per_image(value) if isinstance(value, dict) else value
    return kept


def write_whole(path, write):
    """Write a file atomically by write(binary file). Raises UserError if that fails, and leaves
    the file as it was."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # another process has its own
    try:
        with open(part, "xb") as file:
            write(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # on a full disk torch.save raises RuntimeError
        if isinstance(error.__context__, KeyboardInterrupt):  # which torch.save replaces
            raise error.__context__ from None
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}): is the disk full, or the folder "
                        "not yours to write to?") from None
    finally:
        if part.exists():  # unlink(missing_ok=True) raises on a read-only file system
            part.unlink()


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def save_picture(picture, path):
    """Write a PIL image in the format that path's ending names."""
    kind = picture_format(path)
    write_whole(path, lambda file: picture.save(file, kind))


def picture_format(path):
    """Return Pillow's name of the format; raise UserError if it cannot be written."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    require(kind in Image.SAVE, f"{path}: expected the ending of a picture, such as .png",
            UserError)
    return kind


@contextmanager
def locked(folder):
    """Hold the folder's lock, so that two processes do not merge into the same file at once. There
    is none on Windows, nor on file systems without locks."""
    handle = None
    try:
        import fcntl  # not on Windows
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def read_results(path):
    """Return the results in a JSON file, {} if there is none; raise UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(results, dict), f"expected {{...}}, got a {type(results).__name__}")
        return results
    except ValueError as error:  # UnicodeDecodeError too
        raise UserError(f"{path} is damaged ({error}); move it away, then evaluate again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def save_results(folder, rows, *below):
    """Merge the rows of `evaluate` into eval.json, and with values per test image into
    per_image.json: the last row at the top, or below the names given, others below their own.

    A damaged file raises UserError and is left alone. If the folder cannot be written to, a line
    says so; the results have been printed."""
    *baselines, last = rows
    results = dict(rows[last])
    for name in baselines:
        results[name.replace("raw ", "")] = rows[name]
    for name in below:
        results = {name: results}
    summary, per_image = folder / "eval.json", folder / "per_image.json"
    with locked(folder):
        stored_summary, stored_per_image = read_results(summary), read_results(per_image)
        try:
            merged = merge(stored_summary, without_per_image(results))
            write_text(summary, json.dumps(merged, indent=2) + "\n")
            write_text(per_image, json.dumps(merge(stored_per_image, results)) + "\n")
            print(f"merged into {summary}")
        except UserError as error:
            print(f"not stored: {error}")


# --- methods and runs -------------------------------------------------------------------------


def load_method(name):
    """Return the class of --method: in METHODS, or CLASS of "FILE.py:CLASS"."""
    if name in METHODS:
        return METHODS[name]
    path, _, class_name = name.rpartition(":")
    require(Path(path).is_file(), f"--method {name}: no such method; expected "
            f"{', '.join(METHODS)}, or FILE.py:CLASS, of a run where the file is now", UserError)
    spec = importlib.util.spec_from_file_location(f"method_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that its neighbours hide no installed module
    spec.loader.exec_module(module)
    require(hasattr(module, class_name), f"--method {name}: no class {class_name} in that file",
            UserError)
    return getattr(module, class_name)


def weights_file(name):
    """Return the path of weights; those of a name in WEIGHTS are fetched once."""
    if name not in WEIGHTS:
        return name
    path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS[name].split("/")[-1])
    try:  # the hash in a file's name, if any, is checked
        torch.hub.load_state_dict_from_url(WEIGHTS[name], map_location="cpu", weights_only=True,
                                           check_hash="-" in path.name)
    except Exception as error:  # of the network OSError, of torch.load many types
        reason = " ".join(str(error).split())[:100]
        if path.exists() and not isinstance(error, OSError):
            raise UserError(f"{path} is damaged ({reason}): delete it, and the same command "
                            "fetches it again") from None
        raise UserError(f"could not fetch {WEIGHTS[name]} ({reason}); download it and give the "
                        "file's path, as in --init FILE") from None
    return str(path)


def current_config(config):
    """Return the settings of a checkpoint, those of older versions by today's names."""
    config = {"global_weight": 1.0, "local_weight": 1.0, **config}
    if config["method"] == "global":
        config["method"] = "mocov3"
    elif config["method"] == "local":
        config["method"], config["global_weight"] = "lodisc", 0.0
    return config


def build_model(config, fresh=True):
    """Return the model before training, or with fresh=False without reading the file of --init."""
    torch.manual_seed(config["seed"])
    has_init = config["init"] != "none"
    if has_init and fresh:
        encoder = load_encoder(config["init"], config["init_momentum"], config["image_size"],
                               config["heads"])
    else:
        sizes = {**PLAIN, **config}  # runs of older versions do not have those of PLAIN
        names = ("image_size", "patch_size", "dim", "depth", "heads", "registers", "eps")
        encoder = VisionTransformer(**{name: sizes[name] for name in names},
                                    learned_positions=has_init, train_projection=has_init)
    encoder.mean, encoder.std = config["mean"], config["std"]  # --normalise's, if given
    require(config.get("mask") != "block", "the run has --mask block, which has moved to "
            "tests/experiments/controls.py:Block: give that to a new run's --method", UserError)
    method = load_method(config["method"])
    options = {name: config[name] for name in method.OPTIONS}
    try:
        return method(encoder, **options, **config["method_options"])
    except TypeError as error:  # of a class that has no such argument, or of the class's own code
        for name in config["method_options"]:
            if f"argument '{name}'" in str(error):
                raise UserError(f"--method-option {name}: {error}") from None
        raise


def load_state(model, checkpoint):
    """Load a run's weights into its method; raise UserError if they are another method's."""
    try:
        model.load_state_dict(read_weights(checkpoint)["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{checkpoint} does not fit --method: {reason[:300]}") from None


def compared_encoders(config, encoder):
    """Return {row: encoder} to compare: raw pixels, a run's encoder before training, its own."""
    rows = {"raw pixels": RawPixels()}
    if not config:
        return {**rows, "published": encoder}
    before = "untrained" if config["init"] == "none" else "initial"
    try:
        rows[before] = build_model(config).encoder
    except UserError as error:
        print(f"no row for the initial weights: {error}")
    return {**rows, "trained": encoder}


def save_maps(folder, maps, dataset):
    """Write a run's maps of its training images, a PNG's bytes each, with a hash of the images."""
    contents = {"maps": maps, "images": hash_images(dataset)}
    write_whole(folder / "maps.pt", lambda file: torch.save(contents, file))


def read_maps(folder, dataset):
    """Return the maps in a run's folder; raise UserError if there are none of this data set."""
    path = folder / "maps.pt"
    require(path.exists(), f"{path} is missing; it has the maps made by the initial "
            "weights and cannot be regenerated: copy it back, or start a new run",
            UserError)
    stored = read_weights(path)
    require(stored.get("images") == hash_images(dataset), f"{path} is of images with other names "
            "or sizes: give the run's own by --data, or start a new run", UserError)
    return stored["maps"]


# --- commands ---------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=["linear", "knn", "retrieval", "all", "masks", "neighbours", "embed",
                         "export"])
    add("checkpoint", type=lambda text: Path(weights_file(text)),
        help=f"a run's folder, its checkpoint.pt, published weights, or {', '.join(WEIGHTS)}")
    add("images", nargs="*", type=Path, default=[],
        help="masks, embed: image files, instead of images of the data set")
    add("--data", help="a data set by name, or a folder; default: the run's")
    add("--data-root", help="folder of the named data sets; default: the run's")
    add("--features", choices=["class", "mean"], default="class",
        help="class token, or mean patch token")
    add("--method", help="masks: FILE.py:CLASS of a run whose method file has moved")
    add("--image-size", type=int, help="for published weights (default: about 98, on a GPU 224)")
    add("--heads", type=int, help="attention heads, if the weights do not state them")
    add("--normalise", choices=NORMALISATIONS, help="mean and std of the images, likewise")
    add("--momentum", action="store_true", help="take the momentum encoder, as a run's masks do")
    add("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if any)")
    add("--workers", type=int, default=default_workers(),
        help="DataLoader workers; 0: none (default: one per processor, here %(default)s)")
    add("--out", type=Path, help="a new file; default: in the run's folder, or the current one; "
        "embed: .npz (default) or .csv")
    return parser.parse_intermixed_args(argv)  # image files may follow options


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
    size = 224 if device.type == "cuda" else 98
    return patch_size * round(size / patch_size)


def load_subject(args, device):
    """Return the encoder of the command line, and its run's settings, {} for published weights."""
    def load(image_size):
        return load_encoder(args.checkpoint, args.momentum, image_size, args.heads, args.normalise)

    encoder = load(args.image_size)
    config = {}
    if "num_images" in encoder.config:
        config = current_config(encoder.config)
    if args.method:
        require(config, "--method is for a run", UserError)
        require(args.method.split(":")[-1] == config["method"].split(":")[-1], f"--method "
                f"{args.method}: the run's is {config['method']}", UserError)
        config["method"] = args.method
    require(not config or args.image_size is None, "--image-size is for published weights",
            UserError)
    if not encoder.config and args.image_size is None:
        encoder = load(recipe_image_size(encoder.patch_size, device))
    print(f"{encoder.source}; at {encoder.image_size} px")
    return encoder, config


def read_data(args, config):
    """Load the data of the command line, or else of the run; it must have test images."""
    data = load_named(args, config)
    require(data.test is not None, data.note, UserError)
    check_and_describe(data)
    return data


def check_and_describe(data):
    """Raise UserError for broken image files; print what the data are."""
    check_headers(data)
    print(f"data: {data.describe()}")


def load_named(args, config):
    """Load the data of the command line, or else of the run, with or without test images."""
    name_data(args, config)
    held_out = args.data == config.get("data") and config["held_out"]
    return load_data(args.data, args.data_root, held_out=held_out)


def name_data(args, config):
    """Put the run's data and data root in place of what the command line does not give."""
    require(config or args.data is not None, "published weights: give the images by --data",
            UserError)
    args.data = config["data"] if args.data is None else data_name(args.data)
    args.data_root = os.path.expanduser(args.data_root or config.get("data_root", "datasets"))
    if config.get("held_out") and args.data != config["data"]:
        print(f"the run holds out images of {config['data']}; none of {args.data}")


def run_folder(args):
    return args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent


def save_metrics(args, config, rows):
    """Save a run's rows, below the names of features, encoder and data other than its own."""
    if not config:
        return
    below = []
    if args.features == "mean":
        below.append("mean")
    if args.momentum:
        below.append("momentum")
    if args.data != config["data"]:
        below.append(args.data)
    folder = run_folder(args)
    if args.checkpoint.name not in (folder.name, "checkpoint.pt"):
        below.append(args.checkpoint.stem)
    save_results(folder, rows, *below)


def output_path(args, config, name):
    """Return where a file goes; only a run's own picture of an earlier call is overwritten."""
    folder = run_folder(args) if config else Path()
    path = args.out or folder / name
    is_new = not os.path.lexists(path)
    if config and args.what not in ("embed", "export") and not args.out:
        is_new = True  # replaces the run's picture of an earlier call
    require(path.parent.is_dir(), f"--out {path}: there is no folder {path.parent}", UserError)
    require(is_new, f"{path} already exists: move it, or give another --out FILE", UserError)
    return path


def measure(args, encoder, config, device):
    """Print and save metrics of the encoder."""
    name = "trained" if config else "published"
    if args.momentum:
        name = "momentum"
    preprocessing = input_of(encoder)
    rows = evaluate({name: encoder}, read_data(args, config), preprocessing, args.what, device,
                    args.workers, args.features)
    print(table(rows))
    save_metrics(args, config, rows)


def load_masks_model(args, encoder, config):
    """Return the run's method with its weights, or MoCo v3 around published weights."""
    if not config:
        return MoCoV3(encoder, hidden_dim=8, output_dim=8)
    model = build_model(config, fresh=False)
    load_state(model, args.checkpoint)
    require(hasattr(model, "momentum_encoder"), f"--method {config['method']} has no "
            "momentum_encoder, whose attention is drawn", UserError)
    return model


def read_own_maps(args, config):
    """Return a run's data and the maps that its method made of the training images, or None if
    there are none in its folder, or if --data names other images."""
    folder, name = run_folder(args), config["data"]
    if args.data is not None:
        name = data_name(args.data)
    if not (folder / "maps.pt").exists():
        print(f"no maps.pt in {folder}: drawing test images, which have no map")
        return None
    try:
        data = load_data(name, args.data_root or config["data_root"], held_out=config["held_out"])
        maps = read_maps(folder, data.train)
    except UserError:
        if name == config["data"]:
            raise
        return None
    args.data = config["data"]  # though its folder may have moved
    return data, maps


def map_page(model, dataset, maps):
    """Draw eight training images with their maps, and what the method's drawn_views, if it has
    them, makes of both."""
    size, indices = model.encoder.image_size, example_indices(dataset.targets)
    crop = v2.Compose(plain_crop(size))
    images = [crop(dataset[i][0]) for i in indices]
    cropped = cropped_maps(lambda i: decode_map(maps[i]), indices, size)  # (n, H, W)
    values = cropped.flatten(1).long()
    if values.max() >= len(PART_COLOURS):  # no parts, or too many
        values = values.float()
    rows = {"training\nimage": (images, None), "its map": (images, values)}
    if hasattr(model, "drawn_views"):
        pixels = torch.stack([v2.functional.to_image(image) for image in images]).float() / 255
        for name, views in model.drawn_views(pixels, cropped).items():
            views = [v2.functional.to_pil_image(view.clamp(0, 1)) for view in views]
            rows[name] = views, None
    return sheet(rows)


def draw_masks(args, encoder, config, device):
    """Draw the momentum encoder's pivotal patches, as the run's method returns them, or the run's
    maps on training images. For data with regions, print and save where the patches of all test
    images lie."""
    path = output_path(args, config, "masks.png")
    picture_format(path)  # before it is drawn
    model = load_masks_model(args, encoder, config).to(device).eval()
    if args.images:
        page = attention_page(model, config, [open_image(image) for image in args.images])
    else:
        own = read_own_maps(args, config) if hasattr(model, "annotate") else None
        data = own[0] if own else read_data(args, config)
        if hasattr(data.test, "regions"):
            measure_place(args, model, config, data.test)
        if own:
            page = map_page(model, data.train, own[1])
        else:
            drawn = Fold(data.test, example_indices(data.test.targets))
            page = attention_page(model, config, [image for image, _ in drawn], drawn)
    save_picture(page, path)
    print(f"wrote {path}")


def measure_place(args, model, config, dataset):
    """Print and save where the pivotal patches of all images lie, of a data set with regions."""
    importance, keep_ratio = config.get("importance", "product"), config.get("keep_ratio", 0.3)
    encoder, choose = model.momentum_encoder, getattr(model, "pivotal_mask", location_mask)
    masks = location_masks(encoder, dataset, importance, keep_ratio, args.workers, choose)
    cover = patch_cover(dataset, encoder.image_size, encoder.patch_size)
    place = {"object_cover": object_cover(masks, cover), "border_fraction": border_fraction(masks)}
    chance = border_fraction(torch.ones_like(masks))
    print(f"object cover {place['object_cover']:.2f} (chance level 1), border fraction "
          f"{place['border_fraction']:.2f} (chance level {chance:.2f})")
    save_metrics(args, config, {"momentum encoder": {"masks": place}})


def attention_page(model, config, images, dataset=None):
    """Draw images, their importance by the momentum encoder, and the method's pivotal patches, and
    say of each where these lie; dataset: of the images, with or without regions."""
    encoder = model.momentum_encoder
    images = [v2.Compose(plain_crop(encoder.image_size))(image) for image in images]
    normalise = v2.Compose(to_tensor(encoder.mean, encoder.std))
    batch = torch.stack([normalise(image) for image in images])
    masks = model.pivotal_patches(batch.to(encoder.cls_token.device))
    if masks is not None:
        masks = masks.cpu()
    importance = importance_of(encoder, batch, config.get("importance", "product"))
    cover = None
    if hasattr(dataset, "regions"):
        cover = patch_cover(dataset, encoder.image_size, encoder.patch_size)
    notes = [] if masks is None else place_notes(masks, cover)
    return mask_sheet(images, importance, masks, notes)


def place_notes(masks, cover=None):
    """Return the notes of `sheet`: per image, the fraction of kept patches (masks: bool (n, N)) on
    the border and, given cover (n, N), on the object, each with its chance level."""
    chance = border_fraction(torch.ones_like(masks))
    borders = [border_fraction(mask[None]) for mask in masks]
    print(f"border fraction of the drawn images {sum(borders) / len(borders):.2f} (chance level "
          f"{chance:.2f})")
    head, notes = "on the border\n(chance)", [f"{border:.2f} ({chance:.2f})" for border in borders]
    if cover is not None:
        head = "on the border,\non the object\n(chance)"
        for i, (mask, covered) in enumerate(zip(masks, cover)):
            notes[i] += f"\n{covered[mask].mean():.2f} ({covered.mean():.2f})"
    return [head, *notes]


def draw_neighbours(args, encoder, config, device):
    """Draw eight test images, every n/8-th, and the nearest of the others by the initial and by the
    trained encoder, framed by their class if it is known."""
    path = output_path(args, config, "neighbours.png")
    picture_format(path)  # before it is drawn
    dataset = compared_images(args, config)
    require(len(dataset) > 1, "neighbours need two images", UserError)
    encoders = compared_encoders(config, encoder)
    del encoders["raw pixels"]
    if args.momentum:
        encoders = {("momentum" if name == "trained" else name): encoders[name]
                    for name in encoders}
    preprocessing = input_of(encoder)
    features = extract(encoders, dataset, preprocessing, device, args.workers, args.features)
    count = min(SHOWN, len(dataset))
    queries = [i * len(dataset) // count for i in range(count)]
    crop, blocks = v2.Compose(plain_crop(TILE)), {}
    for name, (vectors, labels) in features.items():
        require_finite(vectors)
        neighbours = nearest(vectors, queries)
        images = [[crop(dataset[i][0]) for i in row] for row in neighbours.tolist()]
        title, hits = name, None
        if labels.min() >= 0 and len(labels.unique()) > 1:
            hits = (labels[neighbours] == labels[queries, None]).tolist()
            if labels.bincount().max() > 1:
                title += f": rank-1 {retrieval(features[name])['rank1']:.3f}"
                print(title)
        blocks[title] = images, hits
    save_picture(neighbour_sheet([crop(dataset[i][0]) for i in queries], blocks), path)
    print(f"wrote {printable(path)}")


def compared_images(args, config):
    """Return the data's test images, else all that have a class, if most have one, else all."""
    data = load_named(args, config)
    if data.test is not None:
        check_and_describe(data)
        return data.test
    gallery = load_gallery(args.data, args.data_root)
    labelled = [i for i, label in enumerate(gallery.targets) if label >= 0]
    if 2 * len(labelled) <= len(gallery):
        labelled = range(len(gallery))
    print(f"{data.note}: neighbours among all {len(labelled)} images")
    if len(labelled) < len(gallery):
        print(f"left out: {len(gallery) - len(labelled)} images without a class")
    return Fold(gallery, labelled)


def nearest(features, queries, count=5):
    """Return the indices of the nearest other images of queries by cosine: (queries, count).

    features (n, D); queries: indices."""
    features = F.normalize(features, dim=1)
    similarity = features[queries] @ features.T  # (queries, n)
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    return similarity.topk(min(count, len(features) - 1)).indices


def export(args, encoder, config):
    """Write the encoder by timm's names, with what load_encoder needs to build it again."""
    path = output_path(args, config, "encoder.pth")
    config = dict(encoder.sizes, image_size=encoder.image_size, patch_size=encoder.patch_size,
                  mean=list(encoder.mean), std=list(encoder.std))
    state = encoder.state_dict()
    timm_options = ""
    if config["registers"]:  # which timm has without positions only if the class token has none
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
        timm_options += ", reg_tokens={registers}, no_embed_class=True"
    if config["eps"] != PLAIN["eps"]:
        timm_options += ", norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps})"
    contents = {"state_dict": state, "config": config}
    write_whole(path, lambda file: torch.save(contents, file))
    call = ("timm.models.VisionTransformer(img_size={image_size}, patch_size={patch_size}, "
            "embed_dim={dim}, depth={depth}, num_heads={heads}, num_classes=0" + timm_options + ")")
    print("for", call.format(**config))
    print(f"wrote {path}, the weights under state_dict")


def write_csv(file, features, paths, labels, classes):
    """Write a line per image: its path, the number of its class, -1 if unknown, its features."""
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", *(f"f{i}" for i in range(features.shape[1]))])
    for path, label, row in zip(paths, labels, features):
        writer.writerow([path, label, *row.astype(str)])  # as many digits as float32 needs
    text.detach()


FEATURE_FILES = {".npz": np.savez, ".csv": write_csv}  # ending: a function of (file, arrays)


def embed(args, encoder, config, device):
    """Write the features of all images of a data set, whatever their split, or of the image files
    given, with their paths and classes. Those that cannot be read are named and left out."""
    path = output_path(args, config, "features.npz")
    write = FEATURE_FILES.get(path.suffix.lower())
    require(write, f"{path}: expected the ending {' or '.join(FEATURE_FILES)}", UserError)
    write_whole(path, lambda file: None)  # so that it is known now if it cannot be written
    path.unlink()
    gallery = read_gallery(args, config)
    deep, _ = read_headers([image for image in gallery.images[:1000] if isinstance(image, str)])
    say_if_dark(deep, refuse=False)
    features, rows = extract_readable(encoder, gallery, device, args.workers, args.features)
    arrays = {"features": features.numpy(), "paths": np.array([gallery.names[i] for i in rows]),
              "labels": np.array([gallery.targets[i] for i in rows], dtype=np.int64),
              "classes": np.array(gallery.classes, dtype=str)}
    write_whole(path, lambda file: write(file, **arrays))
    print(f"wrote {printable(path)}: {len(rows)} images, {features.shape[1]} features")
    missing = len(gallery) - len(rows)
    if missing:
        print(f"warning: {missing} of {len(gallery)} images cannot be read and were left out")


@torch.no_grad()
def extract_readable(encoder, gallery, device, workers, kind):
    """Return the features (n, D) of the images that can be read, and their indices; print the
    others and the progress. Raises UserError if there are none."""
    encoder = encoder.to(device).eval()
    preprocessing = input_of(encoder)
    features = torch.empty(len(gallery), encoder.sizes["dim"])
    rows, done = [], 0
    begun = said = time.monotonic()
    with naming_dead_workers():
        for images, reasons in plain_loader(gallery, preprocessing, workers, Readable):
            readable = [i for i, reason in enumerate(reasons) if not reason]
            for reason in filter(None, reasons):
                print(f"left out: {reason}")
            if readable:
                batch = encode(encoder, images[readable].to(device), kind).float().cpu()
                require_finite(batch)
                features[len(rows):len(rows) + len(readable)] = batch
            rows += [done + i for i in readable]
            done += len(images)
            now = time.monotonic()
            if now - said > 10 or done == len(gallery):
                print(f"{done} of {len(gallery)} images, {done / (now - begun):.0f} a second")
                said = now
    require(rows, f"none of the {len(gallery)} images can be read", UserError)
    return features[:len(rows)], rows


def read_gallery(args, config):
    """Return the Gallery of the image files of the command line, or of all images of its data."""
    if not args.images:
        name_data(args, config)
        gallery = load_gallery(args.data, args.data_root)
        left_out = f"; left out: {gallery.left_out}" if gallery.left_out else ""
        print(f"data: {len(gallery)} images of {len(gallery.classes) or 'no'} classes{left_out}")
        return gallery
    require(args.data is None, "give image files or --data, not both", UserError)
    for path in args.images:
        require(not path.is_dir(), f"{path} is a folder: give it by --data", UserError)
        require(path.exists(), f"{path}: no such file", UserError)
    names = list(map(str, args.images))
    return Gallery(names, names, [-1] * len(names), [])


def main(argv=None):
    args = parse_args(argv)
    require(args.what in ("masks", "embed") or not args.images, "image files are only for masks "
            "and embed", UserError)
    device = pick_device(args.device)
    encoder, config = load_subject(args, device)
    if args.what == "masks":
        draw_masks(args, encoder, config, device)
    elif args.what == "neighbours":
        draw_neighbours(args, encoder, config, device)
    elif args.what == "embed":
        embed(args, encoder, config, device)
    elif args.what == "export":
        export(args, encoder, config)
    else:
        measure(args, encoder, config, device)


def exit_with_line(program, error):
    """Print a user's mistake in one line and exit with 2."""
    text = str(error).rpartition("\nlodisc.UserError: ")[2]  # a worker adds its traceback
    print(f"{program}:", *text.splitlines(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for process in torch.multiprocessing.active_children():
        process.terminate()  # DataLoader workers would end seconds later, with the pipes open
    os._exit(2)  # sys.exit would wait for them


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with_line("eval.py", error)
    except KeyboardInterrupt:
        exit_with_line("eval.py", "interrupted")
