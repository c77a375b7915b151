"""Evaluate an encoder: linear probe, k-NN, retrieval, parts, a picture of its pivotal patches.

    python eval.py all runs/synthetic-lodisc-1
    python eval.py all WEIGHTS --data DIR        published weights, see README.md
    python eval.py masks runs/synthetic-lodisc-1 [my-image.jpg ...]
    python eval.py parts runs/synthetic-lodisc-1 [--shots 10]
    python eval.py export runs/synthetic-lodisc-1

A run's metrics go into its eval.json, and per test image into per_image.json. Features are of the
online encoder on a centre crop; nothing is chosen on the test set."""

import argparse
import importlib.util
import json
import os
import sys
import uuid
import warnings
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from data.augment import Plain, plain_crop, to_tensor
from data.birds import BIRD, PART, cropped_maps, part_labels
from data.datasets import (data_name, default_workers, fitting_workers, load_data,
                           naming_dead_workers, open_image, shuffled_by_class)
from data.draw import example_indices, mask_sheet, sheet
from lodisc import (IMPORTANCES, METHODS, LoDisc, UserError, VisionTransformer, load_encoder,
                    location_mask, read_weights, require)

VERSION = 2  # of the metrics; 1: the probe's grid ended at 1e-5, its split followed the run's seed
STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))  # of the probe's L2 term, strong first
METRICS = {"linear top-1": ("linear", "top1"), "top-5": ("linear", "top5"),  # in eval.json
           "k-NN top-1": ("knn", "top1"), "rank-1": ("retrieval", "rank1"),
           "rank-5": ("retrieval", "rank5"), "mAP": ("retrieval", "mAP")}
MAIN_METRICS = {name: place for name, place in METRICS.items() if not name.endswith("-5")}
SHOTS, DRAWS = 10, 10  # of few-shot part segmentation: labelled images, and draws of them
BATCH = 64  # images


class RawPixels(torch.nn.Module):
    """Features without an encoder: pixels pooled to 16 x 16; a patch's token is its pixels."""

    def __init__(self, patch_size=1):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, min(16, images.shape[-1])).flatten(1), []

    def tokens(self, images):
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).mT  # (B, N, 3 p p)
        return F.pad(patches, (0, 0, 1, 0)), []  # zeros for the class token


def plain_loader(dataset, image_size, mean, std, workers):
    """Return batches of (centre crops, classes), by as many processes as shared memory has room."""
    workers = fitting_workers(workers, BATCH * 3 * image_size**2 * 4)
    return DataLoader(Plain(dataset, image_size, mean, std), BATCH, num_workers=workers)


@torch.no_grad()
def extract(encoders, dataset, crop, device="cpu", workers=0, kind="class"):
    """{name: encoder} -> {name: (features (n, D), labels (n,))} on the CPU, reading images once.

    dataset: (image, class) pairs; crop: (image_size, mean, std), the encoders' input; kind:
    "class", the class token; "mean", the mean of the patch tokens; "patches", these, (n, N, D)."""
    loader = plain_loader(dataset, *crop, workers)
    encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
    features, labels = {name: [] for name in encoders}, []
    with naming_dead_workers():
        for images, label in loader:
            images = images.to(device)
            labels.append(label)
            for name, encoder in encoders.items():
                if kind == "class" or kind == "mean" and isinstance(encoder, RawPixels):
                    found = encoder(images)[0]  # (batch, D)
                else:
                    found = encoder.tokens(images)[0][:, 1:]  # (batch, N, D)
                    found = found.mean(dim=1) if kind == "mean" else found
                features[name].append(found.float().cpu())
    return {name: (torch.cat(rows), torch.cat(labels)) for name, rows in features.items()}


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


def linear_probe(train, test, device="cpu", held_out=None):
    """Return top-1 and top-5 accuracy of a linear classifier on frozen features.

    train, test: (features (n, D), labels (n,)). Features are standardised by the training set, the
    L2 strength is chosen on held_out, bool (n,), then the classifier is fitted on all. held_out is
    by default every tenth image of the training set, drawn by seed 0 and counted class by class,
    but for classes of one image; if there are no others, the strongest is taken. By L-BFGS, not
    SGD: values compare with no published probe's. Raises UserError for features that are not
    finite."""
    device = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
    (features, labels), (test_features, test_labels) = [
        (features.to(device), labels.to(device)) for features, labels in (train, test)]
    require_finite(features)
    require_finite(test_features)
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    features, test_features = (features - mean) / std, (test_features - mean) / std
    classes = int(labels.max()) + 1
    if held_out is None:
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        shuffled = shuffled.to(device)[labels[shuffled].argsort(stable=True)]  # class by class
        held_out = torch.zeros_like(labels, dtype=torch.bool)
        held_out[shuffled[::10]] = True
        held_out &= labels.bincount()[labels] > 1  # every class keeps an image to train on
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
    found = [(rows @ bank.T).topk(min(k, len(bank)), dim=1) for rows in queries.split(1024)]
    similarity, nearest = map(torch.cat, zip(*found))  # (n, k)
    votes = torch.zeros(len(queries), int(train[1].max()) + 1)
    votes.scatter_add_(1, train[1][nearest], (similarity / temperature).exp())
    hits = votes.argmax(1) == test[1]
    return {"top1": hits.double().mean().item(), "per_image": {"top1": hits.int().tolist()}}


def retrieval(test, block=512):
    """Rank every other test image for each test image: rank-1, rank-5 and mAP, by cosine.

    Rank-k: whether one of the k nearest is of the query's class. Average precision: the mean of
    the precision at every image of its class. Queries without another image of their class are
    left out and counted. Ties go against the query's class, so that constant features score 0."""
    require_finite(test[0])
    features, labels = F.normalize(test[0], dim=1), test[1]
    n, others = len(labels), labels.bincount()[labels] - 1  # others of a query's class, (n,)
    require(others.max() > 0, "retrieval needs a class with two test images", UserError)
    count, found = torch.arange(1, others.max() + 1), []
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


def evaluate(encoders, data, crop, what="all", device="cpu", workers=0, kind="class"):
    """{name: encoder} -> {name: {"linear": {...}, "knn": {...}, "retrieval": {...}}}, or only the
    one that `what` names; the other arguments as in `extract` and `linear_probe`."""
    test = extract(encoders, data.test, crop, device, workers, kind)
    train = what != "retrieval" and extract(encoders, data.train, crop, device, workers, kind)
    metrics = {"linear": lambda name: linear_probe(train[name], test[name], device),
               "knn": lambda name: knn(train[name], test[name]),
               "retrieval": lambda name: retrieval(test[name])}
    wanted = list(metrics) if what == "all" else [what]
    if what == "all" and next(iter(test.values()))[1].bincount().max() < 2:
        print(f"no {wanted.pop()}: no class has two test images")
    rows = {name: {metric: metrics[metric](name) for metric in wanted} for name in encoders}
    for name, row in rows.items():
        strength = row.get("linear", {}).get("strength")
        if strength in (STRENGTHS[0], STRENGTHS[-1]):
            print(f"{name}: the probe's best strength, {strength:g}, is at the edge of its grid")
    return rows


def table(rows, metrics=METRICS):
    """{row name: metrics}, as `evaluate` returns them, as aligned text."""
    columns = {name: (part, key) for name, (part, key) in metrics.items()
               if any(key in results.get(part, {}) for results in rows.values())}
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{name:>14}" for name in columns)]
    lines += [f"{name:<{width}}" + "".join(f"{results[part][key]:>14.3f}" for part, key in
                                           columns.values()) for name, results in rows.items()]
    return "\n".join(lines)


def merge(known, new, skip):
    """Add the values of nested dicts, without the keys `skip`; other known values stay."""
    return {**known, **{name: merge(known.get(name, {}), value, skip) if isinstance(value, dict)
                        else value for name, value in new.items() if name != skip}}


def write_whole(path, write):
    """Call write(file) with a binary file: path gets all of its bytes, or stays as it was. Raises
    UserError if that is not possible."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # another process has its own
    try:
        with open(part, "xb") as file:
            write(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # of a full disk torch.save raises RuntimeError
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


def save_rows(folder, rows, *below):
    """Merge the rows of `evaluate` into eval.json, and with values per test image into
    per_image.json: the last row at the top, or below the names given, others below their own.

    A damaged file raises UserError and is left alone. If the folder cannot be written to, a line
    says so; the results have been printed."""
    *others, own = rows
    results = rows[own] | {name.replace("raw ", ""): rows[name] for name in others}
    for name in below:
        results = {name: results}
    summary, per_image = folder / "eval.json", folder / "per_image.json"
    with locked(folder):
        known = [read_results(path) for path in (summary, per_image)]
        try:
            text = json.dumps(merge(known[0], results, skip="per_image"), indent=2)
            write_text(summary, text + "\n")
            write_text(per_image, json.dumps(merge(known[1], results, skip=None)) + "\n")
            print(f"merged into {summary}")
        except UserError as error:
            print(f"not stored: {error}")


def load_method(name):
    """Return the class CLASS of "FILE.py:CLASS", or LoDisc as a function for its own methods."""
    if name in METHODS:
        return lambda encoder, **options: LoDisc(encoder, name, **options)
    path, _, wanted = name.rpartition(":")
    require(Path(path).is_file(), f"--method {name}: no such method; expected FILE.py:CLASS, or "
            f"{', '.join(METHODS)}", UserError)
    spec = importlib.util.spec_from_file_location(f"method_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that its neighbours hide no installed module
    spec.loader.exec_module(module)
    require(hasattr(module, wanted), f"--method {name}: no class {wanted} in that file", UserError)
    return getattr(module, wanted)


def build_model(config, fresh=True):
    """Return the model before training, or with fresh=False without reading the file of --init."""
    torch.manual_seed(config["seed"])
    init = config["init"] != "none"
    sizes = (config[name] for name in ("image_size", "patch_size", "dim", "depth", "heads"))
    encoder = (load_encoder(config["init"], config["init_momentum"], config["image_size"])
               if init and fresh else
               VisionTransformer(*sizes, learned_positions=init, train_projection=init))
    names = "mask importance local_input keep_ratio temperature hidden_dim output_dim".split()
    try:
        return load_method(config["method"])(encoder, **{name: config[name] for name in names},
                                             **config["method_options"])
    except TypeError as error:  # of a class that has no such argument, or of the class's own code
        odd = [name for name in config["method_options"] if f"argument '{name}'" in str(error)]
        raise UserError(f"--method-option {odd[0]}: {error}") if odd else error


def load_state(model, checkpoint):
    """Load a run's weights into its method; raise UserError if they are another method's."""
    try:
        model.load_state_dict(read_weights(checkpoint)["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{checkpoint} does not fit --method: {reason[:300]}") from None


def compared_encoders(config, encoder):
    """Return {row: encoder} to compare: raw pixels, a run's encoder before training, its own."""
    rows = {"raw pixels": RawPixels(encoder.patch_size)}
    if config:
        try:
            rows[{"none": "untrained"}.get(config["init"], "initial")] = build_model(config).encoder
        except UserError as error:
            print(f"no row for the initial weights: {error}")
    return {**rows, "trained" if config else "published": encoder}


@torch.no_grad()
def importance_of(encoder, images, importance):
    """Importance (B, N) of normalised images (B, 3, H, W); importance: a name in IMPORTANCES."""
    function, stored = IMPORTANCES[importance]
    values = function(encoder(images.to(encoder.cls_token.device), attention=stored)[1]).cpu()
    require_finite(values)
    return values


def localisation(encoder, dataset, importance="product", keep_ratio=0.3, workers=0):
    """Measure how well the kept patches localise the object, on centre crops.

    For the object, and for the drawn birds' deciding parts: the mean fraction of a kept patch's
    pixels that they cover, relative to that of all patches. 1 is chance level, NAME_most the most
    for as few patches, NAME_fixed the best of one mask for all. dataset: with regions(index)."""
    size, patch = encoder.image_size, encoder.patch_size
    loader = plain_loader(dataset, size, encoder.mean, encoder.std, workers)
    with naming_dead_workers():
        kept = torch.cat([location_mask(importance_of(encoder, batch, importance), keep_ratio)
                          for batch, _ in loader])  # (n, N)
    regions = cropped_maps(dataset.regions, range(len(dataset)), size)  # (n, H, W)
    metrics, k = {}, int(kept[0].sum())
    for name, least in (("object", BIRD), ("parts", PART)):
        cover = F.avg_pool2d((regions >= least).float(), patch).flatten(1)  # (n, N)
        if cover.any():
            for kind, chosen in (("", cover[kept]), ("_most", cover.topk(k).values),
                                 ("_fixed", cover.mean(0).topk(k).values)):
                metrics[name + kind] = (chosen.mean() / cover.mean()).item()
    return metrics


def segment_parts(encoders, data, crop, shots=SHOTS, device="cpu", workers=0):
    """Few-shot part segmentation: {name: encoder} -> {name: {"parts": {...}}}.

    `linear_probe` of patch tokens, on `shots` labelled training images of all classes in turn,
    every tenth held out; means over ten draws of each part's intersection over union, summed over
    all patches, and of mean_iou, without ground (part 0) and parts absent from the test patches.
    data: sets with part_map(index), see data/birds.py."""
    parts, patch_size = data.test.parts, next(reversed(encoders.values())).patch_size
    draws = [[i for turn in zip_longest(*shuffled_by_class(data.train.targets, draw)) for i in turn
              if i is not None][:shots] for draw in range(DRAWS)]
    used, draws = torch.tensor(draws).unique(return_inverse=True)  # draws (DRAWS, shots)
    shown = Subset(data.train, used.tolist())
    train = extract(encoders, shown, crop, device, workers, "patches")
    test = extract(encoders, data.test, crop, device, workers, "patches")
    labels = part_labels(data.train, shown.indices, crop[0], patch_size)  # (images, N)
    true = part_labels(data.test, range(len(data.test)), crop[0], patch_size).flatten()  # (n N,)
    held_out = (torch.arange(shots) % 10 == 0).repeat_interleave(labels.shape[1])
    masks, results = F.one_hot(true, len(parts)).bool(), {}  # masks (n N, parts)
    present = masks.any(0)  # (parts,)
    require(bool(present[1:].any()), "no part covers most of a patch; use smaller ones", UserError)
    for name in encoders:
        features, tested, found = train[name][0], (test[name][0].flatten(0, 1), true), []
        for own in draws:
            probe = linear_probe((features[own].flatten(0, 1), labels[own].flatten()), tested,
                                 device=device, held_out=held_out)
            guess = F.one_hot(torch.tensor(probe["per_image"]["predicted"]), len(parts)).bool()
            found.append((masks & guess).sum(0) / (masks | guess).sum(0))
        found = torch.stack(found)  # (DRAWS, parts)
        means = found[:, 1:][:, present[1:]].mean(1)
        each = {part: found[:, i].mean().item() for i, part in enumerate(parts) if present[i]}
        results[name] = {"parts": {
            "mean_iou": means.mean().item(), "std": means.std().item(), "shots": shots, **each,
            "draws": means.tolist(), "per_image": {"last_draw": guess.int().argmax(1).tolist()}}}
    return results


# --- the command line -------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices="linear knn retrieval all masks parts export".split())
    add("checkpoint", type=Path, help="a run's folder, its checkpoint.pt, or published weights")
    add("images", nargs="*", type=Path, help="masks: image files in place of eight test images")
    add("--data", help="a data set by name, or a folder; default: the run's")
    add("--data-root", help="folder of the named data sets; default: the run's")
    add("--features", choices=["class", "mean"], default="class", help="token, or mean of patches")
    add("--method", help="masks, parts: FILE.py:CLASS of a run whose method file has moved")
    add("--shots", type=int, default=SHOTS, help="parts: labelled images (default: %(default)s)")
    add("--image-size", type=int, help="for published weights (default: about 98, on a GPU 224)")
    add("--momentum", action="store_true", help="take the momentum encoder, as a run's masks do")
    add("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if any)")
    add("--workers", type=int, default=default_workers(),
        help="loading processes; 0: none (default: one per processor, here %(default)s)")
    add("--out", type=Path, help="a new file; default: in the run's folder, or the current one")
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


def save_metrics(args, config, rows):
    """Save a run's rows, below the names of features, data and shots other than its own."""
    names = {"mean": args.features == "mean", "momentum": args.momentum,
             f"{args.shots} shots": args.shots != SHOTS, args.data: args.data != config.get("data"),
             args.checkpoint.stem: args.checkpoint.name not in (args.folder.name, "checkpoint.pt")}
    if config:
        save_rows(args.folder, rows, *(name for name, applies in names.items() if applies))


def draw_masks(args, encoder, config, device):
    """Return a picture of the pivotal patches; for data with regions print the localisation."""
    if config:  # a run: its momentum encoder, and the patches that its method shows
        model = build_model(config, fresh=False)
        load_state(model, args.checkpoint)
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
        images = [test[i][0] for i in example_indices(test.targets)]
        if hasattr(test, "regions"):
            found = localisation(encoder, test, importance, keep_ratio, args.workers)
            print("\n".join(f"{name:<16}{value:.2f}" for name, value in found.items()))
            save_metrics(args, config, {"": {"localisation": found}})
    images = [v2.Compose(plain_crop(encoder.image_size))(image) for image in images]
    batch = torch.stack([v2.Compose(to_tensor(encoder.mean, encoder.std))(i) for i in images])
    masks = model.masks(batch.to(device))
    return mask_sheet(images, importance_of(encoder, batch, importance),
                      None if masks is None else masks.cpu())


def draw_parts(args, encoder, config, device):
    """Print and save the metrics of part segmentation; return a picture of it."""
    data, size = read_data(args, config), encoder.image_size
    require(hasattr(data.train, "part_map"), f"--data {args.data} has no part maps; the drawn "
            "birds have (--data synthetic, of a run without --held-out)", UserError)
    require(2 <= args.shots <= len(data.train), f"--shots must be in [2, {len(data.train)}], got "
            f"{args.shots}", UserError)
    rows = segment_parts(compared_encoders(config, encoder), data,
                         (size, encoder.mean, encoder.std), args.shots, device, args.workers)
    parts, own = data.test.parts, list(rows.values())[-1]["parts"]
    print(table(rows, {"mean IoU": ("parts", "mean_iou"), "± draws": ("parts", "std"),
                       **{part: ("parts", part) for part in (*parts[1:], parts[0])}}))
    for part in [part for part in parts if part not in own]:
        print(f"left out, as on no test patch: {part}")
    save_metrics(args, config, rows)
    shown = example_indices(data.test.targets)
    images = [v2.Compose(plain_crop(size))(data.test[i][0]) for i in shown]
    true = part_labels(data.test, shown, size, encoder.patch_size)
    predicted = torch.tensor(own["per_image"]["last_draw"]).view(len(data.test), -1)[shown]
    return sheet({"image": (images, None), "true\nparts": (images, true),
                  "predicted\nparts": (images, predicted)}, parts)


def export(encoder, path):
    """Write the encoder by timm's names, with what load_encoder needs to build it again."""
    config = dict(image_size=encoder.image_size, patch_size=encoder.patch_size, dim=encoder.dim,
                  depth=len(encoder.blocks), heads=encoder.blocks[0].attn.heads,
                  mean=list(encoder.mean), std=list(encoder.std))
    contents = {"state_dict": encoder.state_dict(), "config": config}
    write_whole(path, lambda file: torch.save(contents, file))
    print("for timm.models.VisionTransformer(img_size={image_size}, patch_size={patch_size}, "
          "embed_dim={dim}, depth={depth}, num_heads={heads}, num_classes=0)".format(**config))


def main(argv=None):
    args = parse_args(argv)
    require(args.what == "masks" or not args.images, "image files are only for masks", UserError)
    device = pick_device(args.device)
    encoder = load_encoder(args.checkpoint, args.momentum, args.image_size)
    config = encoder.config if "method" in encoder.config else {}
    if args.method:
        require(config, "--method is for a run", UserError)
        require(args.method.split(":")[-1] == config["method"].split(":")[-1], f"--method "
                f"{args.method}: the run's is {config['method']}", UserError)
        config["method"] = args.method
    require(not (config and args.image_size), "--image-size is for published weights", UserError)
    if not (encoder.config or args.image_size):
        size = recipe_image_size(encoder.patch_size, device)
        encoder = load_encoder(args.checkpoint, args.momentum, size)
    print(f"{encoder.source}; at {encoder.image_size} px")
    args.folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    files = {"masks": ("masks.png", draw_masks), "parts": ("parts.png", draw_parts),
             "export": ("encoder.pth", None)}
    if args.what in files:
        name, draw = files[args.what]
        out = args.out or (args.folder if config else Path()) / name
        own = config and draw and not args.out  # of an earlier call
        require(out.parent.is_dir() and (own or not out.exists()),
                f"--out {out}: expected a new file in a folder that exists", UserError)
        if draw:
            picture_format(out)  # before it is drawn
            save_picture(draw(args, encoder, config, device), out)
        else:
            export(encoder, out)
        return print(f"wrote {out}")
    name = "momentum" if args.momentum else "trained" if config else "published"
    results = evaluate({name: encoder}, read_data(args, config),
                       (encoder.image_size, encoder.mean, encoder.std), args.what, device,
                       args.workers, args.features)
    print(table(results))
    save_metrics(args, config, results)


def exit_with_line(program, error):
    """Print a user's mistake in one line (of a loading process: the last) and exit with 2."""
    line = str(error).splitlines()[-1].removeprefix("lodisc.UserError: ")
    print(f"{program}: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for process in torch.multiprocessing.active_children():
        process.terminate()  # loading processes would end seconds later, with the pipes open
    os._exit(2)  # sys.exit would wait for them


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with_line("eval.py", error)
