"""Plant defects, one at a time, in a copy of the project, and see whether the fast tests notice.

    python tests/planted.py                     # all: an hour or more; the same command resumes
    python tests/planted.py --only momentum     # those whose text or description has this word
    python tests/planted.py --jobs 2            # so many at a time

Prints killed or survived for each. What was killed is kept in runs/planted.json and not run again
until its file or the test changes; survivors run again. Left out of the tests are those that
compare the source's text, which would notice any change (test_assignment.py, test_planted.py). A
survivor is a test that is missing, or a change without an effect: EXPLAINED says why."""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "runs" / "planted.json"
HOURS = 1  # then the tests of a defect hang
FIRST = {  # the tests most likely to notice come first
    "lodisc.py": "mask branches regions transformer weights loop",
    "train.py": "loop train methods maps resume files processes",
    "eval.py": "loop eval train weights maps", "data/augment.py": "data maps loop",
    "data/datasets.py": "datasets folders images data maps",
    "data/birds.py": "data parts", "data/draw.py": "draw",
    "tests/baselines/particle.py": "particle maps", "tests/baselines/cvsa.py": "cvsa maps",
    "tests/baselines/part_discovery.py": "particle maps cvsa",
    "tests/baselines/released.py": "released maps",
    "tests/experiments/controls.py": "controls",
    "tests/experiments/localisation.py": "localisation"}
LEFT_OUT = ("test_assignment.py", "test_planted.py")


class Defect(NamedTuple):
    file: str
    old: str  # occurs once in the file
    new: str
    breaks: str


DEFECTS = [Defect(*row) for row in [
    # --- features to a file, neighbours ---------------------------------------------------------
    ("eval.py", "features[len(rows):len(rows) + len(readable)] =",
     "features[done:done + len(readable)] =", "features of other images after a broken one"),
    ("eval.py", "encode(encoder, images[readable].to(device), kind)",
     'encode(encoder, images[readable].to(device), "class")', "--features mean ignored by embed"),
    ("eval.py", "rows += [done + i for i in readable]", "rows += readable",
     "rows counted from the batch"),
    ("eval.py", "                require_finite(batch)\n", "", "diverged features written"),
    ("eval.py", 'if config and args.what not in ("embed", "export") and not args.out:',
     "if config and not args.out:", "features overwritten"),
    ("eval.py", "row.astype(str)", 'map("{:.6f}".format, row)', "csv with fewer digits"),
    ("eval.py", 'errors="surrogateescape", newline="")', 'newline="")',
     "csv fails for a name that is not UTF-8"),
    ("eval.py", "parse_intermixed_args", "parse_args", "image files behind options refused"),
    ("eval.py", "    similarity[torch.arange(len(queries)), queries] = -torch.inf\n", "",
     "each query is its own neighbour"),
    ("eval.py", "labels[neighbours] == labels[queries, None]",
     "labels[neighbours] == labels[neighbours[:, :1]]", "frames by the nearest one's class"),
    ("eval.py", "queries = [i * len(dataset) // count for", "queries = [i for",
     "the first eight as queries"),
    ("eval.py", "queries = [i * len(dataset) // count for",
     "queries = [i * len(dataset) // SHOWN for", "few images are queries twice"),
    ("eval.py", "if args.momentum:\n        encoders = {", "if False:\n        encoders = {",
     "momentum encoder drawn as the trained one"),
    ("eval.py", "if labels.min() >= 0 and", "if True and", "frames without classes"),
    ("eval.py", "border_fraction(mask[None]) for mask in masks",
     "border_fraction(masks) for mask in masks", "the same border fraction beside all images"),
    ("eval.py", "{covered[mask].mean():.2f}", "{covered[~mask].mean():.2f}",
     "object cover of the patches left out"),
    ("data/augment.py", "except UserError as error:\n            return self.blank",
     "except KeyError as error:\n            return self.blank", "a broken image ends embed"),
    ("data/datasets.py", "    require_file(image)\n", "    pass\n", "embed waits for a pipe"),
    ("data/datasets.py", "require_file(folder / name / path)", "pass",
     "broken link known only in training"),
    ("data/datasets.py", "order = sorted(range(len(names)), key=names.__getitem__)",
     "order = range(len(names))", "gallery in the order of the file system"),
    ("data/datasets.py", "labels[class_of[path]] if path in class_of else -1",
     "labels[class_of[path]] if path in class_of else 0",
     "images without a class are of the first"),
    ("data/datasets.py", '"masks.png", "neighbours.png")', '"masks.png")',
     "neighbours.png is taken for data"),
    ("data/draw.py", "colour = BLUE if hit else RED", "colour = RED if hit else BLUE",
     "frame colours swapped"),
    ("data/draw.py", "hits[row][column])", "hits[0][column])",
     "frames of the first query in all rows"),
    # --- train.py: retrieval among held-out images ----------------------------------------------
    ("train.py", "total += weight * level", "total += level", "chance level of an unweighted sum"),
    ("train.py", 'if self.config["method"] in METHODS:', "if True:",
     "a chance level of another method's total"),
    ("train.py", "    model.train()  # extract has", "    # extract has",
     "trained in eval mode after the first epoch"),
    ("train.py", '({"online": model.encoder},', '({"online": model.momentum_encoder},',
     "held-out retrieval of the momentum encoder"),
    ("train.py", "list(history[-1]))", "list(history[0]))", "an older held-out run cannot go on"),
    ("train.py", "if max(Counter(dataset.targets).values()) < 2:", "if False:",
     "held-out classes of one image stop the run"),
    ("train.py", 'require(config["local_input"] != "crop" or', "require(True or",
     "crop with another mask is no user's mistake"),
    ("eval.py", "num_workers=workers,\n                      generator=torch.Generator())",
     "num_workers=workers)", "evaluation moves torch's random stream"),
    ("data/draw.py", "if column in row]", "]", "retrieval of an older run cannot be drawn"),
    # --- train.py: options that do not arrive -------------------------------------------------
    ("train.py", 'seed, config["crop_min"], maps)\n', "seed, maps=maps)\n", "--crop-min ignored"),
    ("train.py", 'weight_decay=config["weight_decay"]', "weight_decay=0.1",
     "--weight-decay ignored"),
    ("train.py", 'lr=0.0, weight_decay=config["weight_decay"]', "lr=0.0, weight_decay=0.0",
     "weight decay 0"),
    ("train.py", 'total, config["momentum"])\n', "total)\n", "--momentum ignored"),
    ("train.py", '{"params": encoder, "peak": config["encoder_lr"]}',
     '{"params": encoder, "peak": config["lr"] * config["batch_size"] / 256}',
     "--encoder-lr ignored"),
    ("train.py", '"peak": config["lr"] * config["batch_size"] / 256}', '"peak": config["lr"]}',
     "--lr not per 256 images"),
    ("train.py", 'round(steps * config["warmup_epochs"])', "steps", "--warmup-epochs ignored"),
    ("train.py", 'workers = fitting_workers(config["workers"],', "workers = fitting_workers(0,",
     "--workers ignored in training"),
    ("train.py", 'pick_precision(config["amp"], device', 'pick_precision("auto", device',
     "--amp ignored"),
    ("train.py", 'self.download,\n                              self.config["held_out"])',
     "self.download)", "--held-out ignored"),
    ("train.py", 'load_data(self.config["data"], self.config["data_root"], self.download',
     'load_data(self.config["data"], "datasets", self.download', "--data-root ignored"),
    ("train.py", 'load_data(self.config["data"], self.config["data_root"], self.download',
     'load_data(self.config["data"], self.config["data_root"], False', "--download ignored"),
    ("train.py", "    time.sleep(SILENCE)\n", "", "rank 0 cut off before it prints an error"),
    ("train.py", '("init_momentum", False)', "", "--init-momentum ignored without --init"),
    ("data/datasets.py", "not download or name in NAMED", "True", "--download of a folder ignored"),
    ("train.py", 'load_encoder(settings["init"], settings["init_momentum"],',
     'load_encoder(settings["init"], False,', "--init-momentum ignored by the sizes"),
    ("train.py", 'settings["init_momentum"], None, settings["heads"]',
     'settings["init_momentum"], None, None', "--heads of --init ignored"),
    ("train.py", 'if config["compile"]:', "if False:", "--compile ignored"),
    ("train.py", 'self.device = pick_device(self.config["device"])',
     'self.device = pick_device("auto")', "--device ignored"),
    ("train.py", 'augment.Batches(len(dataset), config["batch_size"], seed, rank',
     'augment.Batches(len(dataset), config["batch_size"], 0, rank',
     "--seed does not reach the order"),
    ("train.py", "augment.TwoViews(dataset, preprocessing_of(config), seed,",
     "augment.TwoViews(dataset, preprocessing_of(config), 0,", "--seed does not reach the views"),
    # --- train.py: schedules and order of calls -----------------------------------------------
    ("train.py", "    model.update_momentum(m)\n    return output", "    return output",
     "no EMA at all"),
    ("train.py", 'm = momentum_schedule(step, total, config["momentum"])', 'm = config["momentum"]',
     "EMA momentum constant"),
    ("train.py", """    optimizer.zero_grad()
    scale = scaler.get_scale()
    scaler.scale(output.total).backward()
    scaler.step(optimizer)
    scaler.update()
    model.update_momentum(m)
""", """    optimizer.zero_grad()
    scale = scaler.get_scale()
    scaler.scale(output.total).backward()
    model.update_momentum(m)
    scaler.step(optimizer)
    scaler.update()
""", "EMA before the optimiser's step"),
    ("train.py", "    optimizer.zero_grad()\n", "", "gradients add up over steps"),
    ("train.py", "    scaler.step(optimizer)\n", "", "no optimiser step"),
    ("train.py", "output = parallel(*views, generator, progress)",
     "output = parallel(views[0], views[0], generator, progress)", "view 2 is view 1"),
    ("train.py", "output = parallel(*views, generator, progress)",
     "output = parallel(views[0], views[1].roll(1, 0), generator, progress)",
     "view 2 of another image"),
    ("train.py", "generator, step / total, m,", "generator, 0.0, m,",
     "progress does not reach the method"),
    ("train.py", "if step < warmup:", "if step <= warmup:", "warm-up one step too long"),
    ("train.py", "return peak * step / warmup", "return peak", "no rise in the warm-up"),
    ("train.py", "return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2",
     "return peak", "no cosine of the learning rate"),
    ("train.py", "        batches.epoch = epoch\n", "        batches.epoch = 0\n",
     "the same order and views in every epoch"),
    ("train.py", 'mask_seed = augment.mix_seed(augment.MASK_NOISE, config["seed"], step, rank)',
     'mask_seed = augment.mix_seed(augment.MASK_NOISE, config["seed"], step)',
     "rank left out of the masks' seed"),
    ("train.py", 'mask_seed = augment.mix_seed(augment.MASK_NOISE, config["seed"], step, rank)',
     'mask_seed = augment.mix_seed(augment.MASK_NOISE, config["seed"], rank)',
     "step left out of the masks' seed"),
    ("train.py", 'mask_seed = augment.mix_seed(augment.MASK_NOISE, config["seed"], step, rank)',
     "mask_seed = augment.mix_seed(augment.MASK_NOISE, 0, step, rank)",
     "--seed does not reach the masks"),
    ("train.py", "    model.train()\n    for epoch", "    model.eval()\n    for epoch",
     "BatchNorm with running statistics while training"),
    ("train.py", 'group["lr"] = learning_rate(step, warmup, total, group["peak"])',
     'group["lr"] = learning_rate(step, warmup, total, 1e-3)',
     "both groups at one peak"),
    ("train.py", 'if name.startswith("encoder.") else heads',
     'if name.startswith("other.") else heads', "no parameter in the encoder's group"),
    # --- train.py: record, resume, results ----------------------------------------------------
    ("train.py", "    for epoch in range(step // steps, epochs):",
     "    for epoch in range(epochs):", "a resumed run begins anew"),
    ("train.py", "        if checkpoint[name]:  # the",
     '        if checkpoint[name] and name != "optimizer":  # the',
     "--resume forgets the optimiser's state"),
    ("train.py", '    torch.set_rng_state(checkpoint["random"])', "    pass",
     "--resume forgets the random state"),
    ("train.py", "self.sums / max(1, self.done - self.skipped)", "self.sums / max(1, self.done)",
     "skipped steps count in the mean loss"),
    ("train.py",
     "            dist.all_reduce(self.sums)\n            self.sums /= dist.get_world_size()\n",
     "            pass\n", "losses of rank 0 alone"),
    ("train.py", 'recipe["lr"] *= min(1, recipe["batch_size"] / batch_size)',
     'recipe["lr"] *= 1', "peak rate grows with the batch"),
    ("train.py", "if self.skipped == self.steps:", "if False:",
     "a run of skipped steps is not noticed"),
    ("train.py", "compared_encoders(config, load_encoder(folder))",
     "compared_encoders(config, load_encoder(folder, True))",
     "the momentum encoder evaluated as the online one"),
    ("train.py", 'preprocessing_of(config), "all", device',
     'Preprocessing(config["image_size"], (0.5,) * 3, (0.5,) * 3), "all", device',
     "evaluation with another normalisation"),
    ("train.py", "film += pivotal_patches(model, examples, epoch + 1)",
     "film += pivotal_patches(model, examples, epoch)", "masks of the film one epoch off"),
    # --- eval.py ------------------------------------------------------------------------------
    ("eval.py", "test = extract(encoders, data.test, preprocessing",
     "test = extract(encoders, data.train, preprocessing", "evaluation on the training images"),
    ("eval.py", "train = extract(encoders, data.train, preprocessing",
     "train = extract(encoders, data.test, preprocessing", "probe fitted on the test images"),
    ("eval.py", "train = extract(encoders, data.train, preprocessing, device, workers, kind)",
     'train = extract(encoders, data.train, preprocessing, device, workers, "class")',
     "--features ignored in train"),
    ("eval.py", "return patches.mean(dim=1) if kind",
     "return torch.cat([_[:, None], patches], 1).mean(dim=1) if kind",
     "class token in the patches' mean"),
    ("eval.py", "encoder.to(device).eval() for", "encoder.to(device) for",
     "encoder not in eval mode"),
    ("eval.py",
     "mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)\n    features,",
     "mean, std = test_features.mean(0), test_features.std(0, correction=0).clamp_min(1e-6)\n   "
     " features,", "standardised by the test set"),
    ("eval.py", "held_out[order[::10]] = True", "held_out[order[::2]] = True",
     "half of the training set held out"),
    ("eval.py", "features[~held_out], labels[~held_out], strength", "features, labels, strength",
     "strength chosen on images that were fitted"),
    ("eval.py",
     "    weights = fit_logistic(features, labels, strength, torch.zeros_like(weights))\n", "",
     "no last fit on all training images"),
    ("eval.py", "strength = min(losses, key=losses.get)", "strength = max(losses, key=losses.get)",
     "the worst strength"),
    ("eval.py", "strength / 2 * weights[:-1].square().sum()",
     "strength / 2 * weights.square().sum()", "penalty on the bias"),
    ("eval.py", "def knn(train, test, k=20, temperature=0.07)",
     "def knn(train, test, k=5, temperature=0.07)", "k-NN with five neighbours"),
    ("eval.py", "def knn(train, test, k=20, temperature=0.07)",
     "def knn(train, test, k=20, temperature=10)", "k-NN without weights"),
    ("eval.py",
     "        same_class[torch.arange(len(queries)), queries] = False  # a query is no result "
     "of its own\n", "", "the query finds itself"),
    ("eval.py", "(first_rank <= 5)", "(first_rank <= 4)", "rank-5 is rank-4"),
    ("eval.py", "precision = place / rank", "precision = 1 / rank",
     "average precision of one image"),
    ("eval.py", "features, labels = F.normalize(test[0], dim=1), test[1]",
     "features, labels = test", "retrieval by dot product"),
    ("eval.py", "if has_init and fresh:", "if has_init:", "--resume needs the file of --init"),
    ("eval.py", 'torch.manual_seed(config["seed"])', "torch.manual_seed(0)",
     "--seed does not reach the initial weights"),
    ("eval.py", "learned_positions=has_init, train_projection=has_init)",
     "learned_positions=has_init)", "projection of loaded weights frozen"),
    ("eval.py", "options = {name: config[name] for name in method.OPTIONS}",
     'options = {name: config[name] for name in method.OPTIONS if name != "keep_ratio"}',
     "--keep-ratio ignored"),
    ("eval.py", "options = {name: config[name] for name in method.OPTIONS}",
     'options = {name: config[name] for name in method.OPTIONS if name != "temperature"}',
     "--temperature ignored"),
    ("eval.py", "options = {name: config[name] for name in method.OPTIONS}",
     'options = {name: config[name] for name in method.OPTIONS if name != "mask"}',
     "--mask ignored"),
    ("eval.py", "load_encoder(args.checkpoint, args.momentum, image_size,",
     "load_encoder(args.checkpoint, False, image_size,", "eval.py --momentum ignored"),
    ("eval.py", 'held_out = args.data == config.get("data") and config["held_out"]',
     "held_out = False", "eval.py opens the test images of a held-out run"),
    ("eval.py", "os.replace(part, path)", "path.write_bytes(part.read_bytes())",
     "files overwritten in place"),
    # --- data ---------------------------------------------------------------------------------
    ("data/augment.py", "scale=(crop_min, 1.0)", "scale=(0.08, 1.0)", "crop_min does not arrive"),
    ("data/augment.py", "v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)",
     "v2.ColorJitter(0.4, 0.4, 0.2, 0.1)", "colours always jittered"),
    ("data/augment.py", "crop_min, blur=0.1, solarise=0.2)", "crop_min, blur=1.0, solarise=0.0)",
     "both views from the first side"),
    ("data/augment.py", "mix_seed(AUGMENTATION, self.seed, epoch, index)",
     "mix_seed(AUGMENTATION, self.seed, index)", "the same views in every epoch"),
    ("data/augment.py", "mix_seed(AUGMENTATION, self.seed, epoch, index)",
     "mix_seed(AUGMENTATION, self.seed, epoch)", "the same augmentation for every image"),
    ("data/augment.py", "        np.random.seed(seed)\n", "", "numpy not seeded for each image"),
    ("data/augment.py", "        random.seed(seed)\n", "", "random not seeded for each image"),
    ("data/augment.py", "mix_seed(ORDER, self.seed, self.epoch)", "mix_seed(ORDER, self.seed)",
     "the same order in every epoch"),
    ("data/augment.py", "start = batch * self.batch_size + self.rank * self.per_rank",
     "start = batch * self.batch_size", "every rank has the same images"),
    ("data/augment.py", "return self.length // self.batch_size",
     "return -(-self.length // self.batch_size)", "incomplete last batch kept"),
    ("data/augment.py", "v2.Resize(round(image_size * 8 / 7), interpolation)",
     "v2.Resize(image_size, interpolation)", "centre crop of the whole short side"),
    ("data/augment.py", "v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)",
     "v2.ToDtype(torch.float32, scale=True)", "no normalisation"),
    ("data/datasets.py",
     "splits = [n for n in numbers if n % 5], [n for n in numbers if n % 5 == 0]",
     "splits = [n for n in numbers if n % 5], [n for n in numbers if n % 5 != 1]",
     "training images among the test images of flowers17"),
    ("data/datasets.py", '(in_train[i] == "1") == (split == "train")',
     '(in_train[i] == "0") == (split == "train")', "the splits of CUB exchanged"),
    ("data/datasets.py", 'for split in ("trainval", "test")', 'for split in ("train", "test")',
     "Aircraft trained on train alone"),
    ("data/datasets.py", "        kept += indices[count:]", "        kept += indices",
     "held-out images trained on"),
    ("data/datasets.py", "return image.transpose(TRANSPOSED[orientation])", "return image",
     "images not turned upright"),
    ("data/datasets.py", "(values.astype(np.uint32) >> 8)", "(values.astype(np.uint32) >> 4)",
     "16 bits read as 12"),
    ("data/datasets.py", "scale = 255 if high <= 1 else 1", "scale = 1",
     "float images in [0, 1] black"),
    ("data/datasets.py", "require(0 <= low <= high <= 255,", "require(low <= high <= 255,",
     "negative values wrap"),
    ("data/datasets.py", ' <= 4095 and not SIXTEEN_BIT["said"]:', " <= 4095:",
     "the line on dark images for every file"),
    ("data/datasets.py", "SIXTEEN_BIT.update(greatest=0, said=False)\n    if name == ",
     "pass\n    if name == ", "dark images of a second data set not told"),
    ("data/datasets.py", "SIXTEEN_BIT.update(greatest=0, said=False)\n    if name not in",
     "pass\n    if name not in", "dark images of a second folder not told by embed"),
    ("data/datasets.py", "            if refuse:\n                raise", "            raise",
     "values that cannot be scaled end embed"),
    ("data/datasets.py", 'trained = sorted(filter(None, names["train"]))', "trained = []",
     "classes of features.npz in another order than the training's"),
    ("eval.py", "    write_whole(path, lambda file: None)  # so", "    path.touch()  # so",
     "a folder that cannot be written to has a traceback"),
    ("eval.py", "labelled = [i for i, label in enumerate(gallery.targets) if label >= 0]",
     "labelled = range(len(gallery))", "a stray image takes all frames away"),
    ("eval.py", "    is_new = not os.path.lexists(path)", "    is_new = not path.exists()",
     "a dangling link is overwritten"),
    ("data/datasets.py", "if name.startswith(NOT_DATA):\n                left_out[\"hidden files",
     "if False:\n                left_out[\"hidden files", "hidden files are images"),
    ("data/datasets.py", "if is_run or name.startswith(NOT_DATA):", "if name.startswith(NOT_DATA):",
     "pictures of runs are images"),
    ("data/datasets.py", "if is_run or name.startswith(NOT_DATA):", "if is_run:",
     "hidden folders are classes"),
    ("data/datasets.py", "SPLITS.get(folder.lower())", "SPLITS.get(folder)",
     "Train/ and Test/ are classes"),
    ("data/datasets.py", "or (len(splits) == 1 and len(groups) > 1):", "or False:",
     "classes beside one called train left out"),
    ("data/datasets.py", "if 2 * len(loose) > len(images):", "if loose:",
     "one stray image drops all labels"),
    ("data/datasets.py", "if os.path.realpath(folder) in above:", "if False:",
     "links to a folder above are entered"),
    ("data/datasets.py", "{len(broken) - 1} more", "{len(broken)} more",
     "broken files not counted"),
    ("data/datasets.py", "for dataset in (data.train, data.test)", "for dataset in (data.train,)",
     "headers of test images not opened"),
    ("train.py", "        if self.rank == 0:\n            check_headers(self.data)\n", "",
     "headers not opened before the training"),
    ("eval.py", "    check_headers(data)\n", "", "headers not opened before the evaluation"),
    ("data/datasets.py", "if self.size + size <= self.limit():", "if True:",
     "cache without a limit"),
    ("data/birds.py", 'rng = random.Random(f"{seed}/{split}/{index}")',
     'rng = random.Random(f"{seed}/{index}")', "test birds drawn as the training birds"),
    # --- lodisc.py ----------------------------------------------------------------------------
    ("lodisc.py", "return (q * q.shape[-1] ** -0.5 @ k", "return (q @ k", "attention not scaled"),
    ("lodisc.py", "weights = attention_weights(q[:, :, :1], k).squeeze(2)",
     "weights = attention_weights(q[:, :, 1:2], k).squeeze(2)", "row of the first patch"),
    ("lodisc.py", "            x = x[:, :1]\n", "            x = 0 * x[:, :1]\n",
     "no residual in the last layer"),
    ("lodisc.py", "act=nn.GELU(),",
     'act=nn.GELU("tanh"),', "approximate GELU"),
    ("lodisc.py", "patches = torch.cat([rows, columns], dim=1)",
     "patches = torch.cat([columns, rows], dim=1)", "positions of rows and columns exchanged"),
    ("lodisc.py", "x = self.patch_embed(images) + self.pos_embed[:, 1:]",
     "x = self.patch_embed(images) + self.pos_embed[:, :-1]", "positions one patch off"),
    ("lodisc.py", "        x = self.norm(x)\n        return x[:, 0]", "        return x[:, 0]",
     "no last LayerNorm"),
    ("lodisc.py", "self.patch_embed.requires_grad_(train_projection)",
     "self.patch_embed.requires_grad_(True)", "patch projection trained"),
    ("lodisc.py", ".squeeze(2).mean(dim=1)  # (B, T)", ".squeeze(2).amax(dim=1)  # (B, T)",
     "maximum over heads"),
    ("lodisc.py", ".log() for row in attentions]", ".log() for row in attentions[1:]]",
     "first layer left out of the product"),
    ("lodisc.py", "return attentions[-1]", "return attentions[0]", "first layer as the last"),
    ("lodisc.py", "for matrix in reversed(attentions):", "for matrix in attentions:",
     "rollout in reverse"),
    ("lodisc.py", "return max(1, math.floor(keep_ratio * num_patches + 1e-9))",
     "return max(1, math.ceil(keep_ratio * num_patches))", "kept patches rounded up"),
    ("lodisc.py", "order = importance.argsort(dim=1, descending=True, stable=True)",
     "order = importance.argsort(dim=1, stable=True)", "the least important patches kept"),
    ("lodisc.py", "return images.masked_fill(~pixels, 0)", "return images.masked_fill(pixels, 0)",
     "the kept patches blackened"),
    ("lodisc.py", "old.lerp_(new, 1 - m)", "old.lerp_(new, m)", "EMA the wrong way round"),
    ("lodisc.py", "nn.BatchNorm1d(out_dim, affine=False)", "nn.BatchNorm1d(out_dim)",
     "affine last BatchNorm"),
    ("lodisc.py", "return 1 - (1 - base) * (1 + math.cos(math.pi * step / total)) / 2",
     "return base + (1 - base) * step / total", "EMA momentum rises linearly"),
    ("lodisc.py", "keys = F.normalize(at_least_float32(keys.detach()), dim=1)",
     "keys = at_least_float32(keys.detach())", "keys not normalised"),
    ("lodisc.py", "return 2 * temperature * F.cross_entropy(logits, positives)",
     "return F.cross_entropy(logits, positives)", "loss not times 2 T"),
    ("lodisc.py", "return torch.cat(keys_of_ranks), dist.get_rank() * len(keys)",
     "return torch.cat(keys_of_ranks), 0", "positives of rank 0 for every rank"),
    ("lodisc.py",
     "        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)\n        local_loss",
     "        global_loss = self.contrast(q1, k1) + self.contrast(q2, k2)\n        local_loss",
     "global loss of the same view"),
    ("lodisc.py", "local_loss = self.contrast(q1, l2) + self.contrast(q2, l1)",
     "local_loss = self.contrast(q1, l1) + self.contrast(q2, l2)", "local loss of the same view"),
    ("lodisc.py", "return self.predictor(self.projector(self.encoder(view)))",
     "return self.projector(self.encoder(view))", "no predictor"),
    ("lodisc.py", "        momentum_update(self.projector, self.momentum_projector, m)\n", "",
     "momentum projector never moves"),
    ("lodisc.py", "        self.momentum_projector.train()\n", "",
     "momentum BatchNorm in eval mode"),
    ("lodisc.py", 'grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)',
     'grid = F.interpolate(grid, (side, side), mode="bicubic")',
     "positions resized without antialiasing"),
    ("lodisc.py", 'state[layer + ".bias"] = scale * state[layer + ".bias"]', "pass",
     "layer scale left out of the biases"),
    # --- the two methods and their options -------------------------------------------------
    ("lodisc.py",
     "        global_loss = self.contrast(q1, k2) + self.contrast(q2, k1)\n        return "
     "MoCoV3Output",
     "        global_loss = self.contrast(q1, k1) + self.contrast(q2, k2)\n        return "
     "MoCoV3Output", "MoCo v3's loss of the same view"),
    ("lodisc.py", "self.global_weight * global_loss", "global_loss", "--global-weight ignored"),
    ("lodisc.py", "self.local_weight * local_loss", "local_loss", "--local-weight ignored"),
    ("lodisc.py", "weights[:, first:] if kind", "weights[:, :-first] if kind",
     "attention one patch off"),
    ("lodisc.py", 'x = x.gather(1, repeat(keep, "b k -> b k d", d=self.dim))',
     "x = x[:, :keep.shape[1]]", "the first patches enter, not the kept ones"),
    ("lodisc.py", "_, importance = patch_importance(self.momentum_encoder, images",
     "_, importance = patch_importance(self.encoder, images", "pictures of the online encoder"),
    ("lodisc.py", "patches if needs_patches else None", "None",
     "patch tokens do not reach an importance"),
    ("lodisc.py", "view = mask_pixels(view, mask, size)", "pass",
     "the local key sees the whole view"),
    ("lodisc.py", "view = enlarge_box(view, mask, size, math.isqrt(self.num_kept))", "pass",
     "the local key of crop sees the whole view"),
    ("lodisc.py", "scores.flatten(1).argmax(dim=1)", "scores.flatten(1).argmin(dim=1)",
     "the least important box"),
    ("lodisc.py", "round(math.sqrt(keep_ratio * importance.shape[1]))",
     "int(math.sqrt(keep_ratio * importance.shape[1]))", "the box rounded down"),
    ("lodisc.py", "first // columns, first % columns]", "first % columns, first // columns]",
     "row and column of the box exchanged"),
    ("lodisc.py", 'return F.interpolate(boxes, images.shape[2:], mode="bilinear")',
     "return F.interpolate(boxes, images.shape[2:])", "the box enlarged by the nearest pixel"),
    ("lodisc.py", "self.pivotal_mask = box_mask", "pass",
     "pictures of crop show no box"),
    ("lodisc.py", "require(mask == \"location\", f\"local_input 'crop'", "require(True, f\"local",
     "crop with another mask accepted"),
    # --- experiments/controls.py and localisation.py -------------------------------------------
    ("tests/experiments/controls.py", "box_mask(importance, self.keep_ratio)\n\n\nclass Control",
     "location_mask(importance, self.keep_ratio)\n\n\nclass Control",
     "Box keeps the paper's patches"),
    ("tests/experiments/controls.py", "    pivotal_mask = staticmethod(box_mask)\n", "",
     "Box draws the paper's patches"),
    ("tests/experiments/controls.py", "        scores = -scores\n", "        pass\n",
     "first component of either sign"),
    ("tests/experiments/controls.py", "3 * (patch_centres", "2 * (patch_centres",
     "the inner half for the inner third"),
    ("tests/experiments/controls.py", "directions[:, -1]", "directions[:, -2]",
     "second principal component"),
    ("tests/experiments/controls.py", "centred = centred - centred.mean(dim=(0, 1))", "pass",
     "first component of tokens that are not centred"),
    ("tests/experiments/controls.py", "return cover - TIE * distance", "return cover",
     "the oracle's ties by the lower index"),
    ("tests/experiments/controls.py", "size.clamp_min(1), middle)", "size.clamp_min(1), 0.0)",
     "a view without object by distance to its corner"),
    ("tests/experiments/controls.py", "sign = -1", "sign = 1", "the antioracle sees the object"),
    ("tests/experiments/controls.py", "2 * first + box)", "2 * first)",
     "the random box off its place"),
    ("tests/experiments/controls.py", "int(region >= BIRD)", "int(region < BIRD)",
     "the ground for the object"),
    ("tests/experiments/controls.py", "self.mask_of(maps[0]), self.mask_of(maps[1])",
     "self.mask_of(maps[1]), self.mask_of(maps[0])", "the other view's map"),
    ("tests/experiments/controls.py", "no_object = 1 - (torch", "no_object = (torch",
     "share of views with the object"),
    ("tests/experiments/controls.py", 'if name not in ("mask", "importance"))', "if name)",
     "controls accept options that they ignore"),
    ("eval.py", 'require(config.get("mask") != "block",', "require(True,",
     "a run with --mask block ends in a traceback"),
    ("eval.py", "importance, keep_ratio, args.workers, choose)",
     "importance, keep_ratio, args.workers)", "the box of crop measured as a mask"),
    ("tests/experiments/localisation.py", "points[points.isnan().any(1)] = torch.nan", "pass",
     "a part beside the view half visible"),
    ("tests/experiments/localisation.py", "find(columns[0], self.points[index][:, 1])",
     "find(rows[:, 0], self.points[index][:, 1])", "columns of parts by the rows"),
    ("tests/experiments/localisation.py", "inside = (line.min() <= values) & (values < ",
     "inside = (line.min() - 3 <= values) & (values < ", "parts outside of the view counted"),
    ("tests/experiments/localisation.py", "matrix[:, 0, -count:]", "matrix[:, 0, 1:1 + count]",
     "registers counted as patches"),
    ("tests/experiments/localisation.py", "attention_product(rows[-4:])",
     "attention_product(rows[:4])", "the first four layers"),
    ("tests/experiments/localisation.py", "self.transforms[place % len(self.transforms)]",
     "self.transforms[0]", "the first view's augmentation alone"),
    ("tests/experiments/localisation.py", "located[located[:, 4] == 0, 2:4] = np.nan", "pass",
     "invisible parts at the corner"),
    ("tests/experiments/localisation.py", "[:, [3, 2]]", "[:, [2, 3]]", "part locations (x, y)"),
    ("tests/experiments/localisation.py", "values = values[~values.isnan()]", "pass",
     "means with NaN"),
    ("lodisc.py", "            k2, mask2 = self.key_and_mask(view2, generator)",
     "            k2, mask2 = self.key_and_mask(view2)",
     "generator does not reach the second mask"),
    ("eval.py", 'config["method"], config["global_weight"] = "lodisc", 0.0',
     'config["method"], config["global_weight"] = "lodisc", 1.0',
     "older runs of the local branch alone have both losses"),
    ("train.py", "check_method_options(self.given, config, self.model.OPTIONS)", "pass",
     "an option that the method lacks is accepted"),
    ("train.py",
     "        config.update(encoder.sizes, mean=list(encoder.mean), std=list(encoder.std))",
     "        config.update(encoder.sizes)", "normalisation of --init ignored"),
    # --- published weights --------------------------------------------------------------------
    ("lodisc.py", "HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}",
     "HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20}", "heads of a ViT-H by its width / 64"),
    ("lodisc.py", 'usual["heads"] = 12', "pass", "MoCo v3's ViT-S with 6 heads"),
    ("lodisc.py", "facts = {**usual, **given, **stated}", "facts = {**usual, **stated}",
     "--heads and --normalise without effect"),
    ("lodisc.py", "require(np.array_equal(stated.get(name, value), value),", "require(True,",
     "a config that contradicts the tensors"),
    ("lodisc.py", 'registers=registers, eps=facts["eps"],', "registers=registers,",
     "LayerNorm's eps of a config ignored"),
    ("lodisc.py", "extra = torch.cat([extra, self.reg_token], dim=1)",
     "extra = torch.cat([extra, 0 * self.reg_token], dim=1)", "register tokens are zero"),
    ("lodisc.py", "return x[:, 0], x[:, first:], attention", "return x[:, 0], x[:, 1:], attention",
     "registers among the patch tokens"),
    ("lodisc.py", "importance[:, -encoder.num_patches:]", "importance[:, :encoder.num_patches]",
     "registers in the importance by rollout"),
    ("lodisc.py", "positions = F.pad(positions, (0, 0, 1, 0))",
     "positions = F.pad(positions, (0, 0, 0, 1))", "missing class position put last"),
    ("lodisc.py", 'for part in "qkv"]', 'for part in "qvk"]', "key and value exchanged"),
    ("lodisc.py", "prefix not in averaged] or averaged", "prefix] or averaged",
     "the momentum encoder first"),
    ("lodisc.py", 'require(tensor.is_floating_point(), f"{name}', 'require(True, f"{name}',
     "integer tensors accepted"),
    ("lodisc.py", "require(state[ours].isfinite().all(),", "require(True,", "NaN accepted"),
    ("lodisc.py", "require(start <= first <= last <= len(data),", "require(True,",
     "safetensors' offsets not checked"),
    ("lodisc.py", "start = 8 + int.from_bytes", "start = 16 + int.from_bytes",
     "safetensors read 8 bytes off"),
    ("eval.py", 'state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]', "pass",
     "class position lost in exports with registers"),
    ("eval.py", ',\n                               config["heads"])', ")",
     "--heads lost when a model is built"),
    ("eval.py", "args.momentum, image_size, args.heads, args.normalise)",
     "args.momentum, image_size)",
     "eval.py --heads and --normalise ignored"),
    # --- maps that travel with the image ------------------------------------------------------
    ("data/augment.py", "view1, map1 = self.view1(image, image_map)",
     "view1, map1 = self.view1(image, image_map)[0], self.view2(image, image_map)[1]",
     "map 1 of another crop"),
    ("data/augment.py", "view2, map2 = self.view2(image, image_map)",
     "view2, map2 = self.view2(image, image_map)[0], map1", "map 2 is map 1"),
    ("data/augment.py", "decode_map(self.maps[index])", "decode_map(self.maps[index - 1])",
     "map of another image"),
    ("data/augment.py", "if isinstance(image, tv_tensors.Mask):", "if False:", "maps blurred"),
    ("data/augment.py", "plain_map(map1), plain_map(map2)", "plain_map(map2), plain_map(map1)",
     "maps of the views exchanged"),
    ("data/augment.py", 'file, "PNG")', 'file, "JPEG")', "maps stored with loss"),
    ("data/datasets.py", "return getattr(self.dataset, name)(self.indices[index])",
     "return getattr(self.dataset, name)(index)", "regions of another image in a fold"),
    ("data/datasets.py", 'for name in ("regions", "part_map"):', 'for name in ("regions",):',
     "part maps lost in a fold"),
    ("data/datasets.py", 'f"{name} {size}\\n".encode(', 'f"{name}\\n".encode(',
     "hash of images without their sizes"),
    ("data/datasets.py", "path.relative_to(root).as_posix(), path", "path.as_posix(), path",
     "hash of images with the folder's place"),
    ("train.py", "device, rank, processes, maps)\n    generator",
     "device, rank, processes)\n    generator",
     "maps do not reach the views"),
    ("train.py", "generator, progress, maps=tuple(maps))", "generator, progress, maps=maps[::-1])",
     "maps of the views exchanged on their way to the method"),
    ("train.py", "return None  # finished: to be evaluated", "pass",
     "maps needed by a finished run"),
    ("train.py", "        require(sizes == expected,", "        require(True,",
     "maps of any size accepted"),
    ("train.py", "            return read_maps(self.folder, self.data.train)", "            pass",
     "maps made anew by a resumed run"),
    ("train.py", "with torch.no_grad(), augment.seeded(self.config[\"seed\"]):\n            maps",
     "with torch.no_grad():\n            maps", "annotation moves the random stream"),
    ("train.py", "        save_maps(self.folder, maps, self.data.train)\n", "", "maps not stored"),
    ("train.py", "shared = [message]\n    dist.broadcast_object_list(shared, 0, group=group)",
     "shared = [message or {\"result\": None}]", "maps do not reach other processes"),
    ("eval.py", 'stored.get("images") == hash_images(dataset)', "True",
     "maps of other images accepted"),
    ("eval.py", 'config["data_root"], held_out=config["held_out"])', 'config["data_root"])',
     "maps of a run with --held-out drawn on other images"),
    ("eval.py", "decode_map(maps[i]), indices, size)", "decode_map(maps[i]), range(8), size)",
     "maps drawn on other images"),
    ("eval.py", 'encoder.mean, encoder.std = config["mean"], config["std"]', "pass",
     "--normalise does not reach the maps"),
    # --- the method files of tests/baselines --------------------------------------------------
    ("tests/baselines/part_discovery.py", "means > SALIENT", "means >= 0",
     "every cluster is foreground"),
    ("tests/baselines/part_discovery.py", ">= VOTES * len(assignment)", "> 0",
     "one vote is enough"),
    ("tests/baselines/part_discovery.py", "error > ELBOW * before", "error > before",
     "always as many clusters as allowed"),
    ("tests/baselines/part_discovery.py", "qkv.chunk(3, dim=-1)[1]", "qkv.chunk(3, dim=-1)[0]",
     "queries as descriptors"),
    ("tests/baselines/part_discovery.py", "ids = (nearest - len(background) + 1).clamp_min(0)",
     "ids = (nearest - len(background)).clamp_min(0)", "a part is background"),
    ("tests/baselines/part_discovery.py",
     "order = torch.randperm(len(dataset), generator=generator)",
     "order = torch.arange(len(dataset))", "blocks in the order of the data set"),
    ("tests/baselines/part_discovery.py", "patches[block] = ids.cpu()",
     "patches[block.sort()[0]] = ids.cpu()",
     "maps in another order"),
    ("tests/baselines/particle.py", "counted[rows, len(rows) + rows] = False", "pass",
     "a query's own row in the denominator"),
    ("tests/baselines/particle.py", "(losses * (present & present_in_other)).sum()",
     "(losses * present).sum()", "parts without a counterpart count"),
    ("tests/baselines/particle.py", "/ present.sum()\n", "/ (present & present_in_other).sum()\n",
     "parts without a counterpart not in the mean"),
    ("tests/baselines/particle.py", "keys = torch.cat([other.flatten(0, 1), own.flatten(0, 1)])",
     "keys = torch.cat([other.flatten(0, 1), other.flatten(0, 1)])",
     "no negatives of the own view"),
    ("tests/baselines/particle.py", "global_loss + self.weight * loss,", "global_loss + loss,",
     "weight of the part loss ignored"),
    ("tests/baselines/particle.py",
     "        momentum_update(self.part_projector, self.momentum_part_projector, m)\n", "",
     "momentum part projector never moves"),
    ("tests/baselines/cvsa.py", "j = (i + 1) % len(boxes)\n        view,",
     "j = i\n        view,", "views are not swapped"),
    ("tests/baselines/cvsa.py", "place = paste(place, box, torch.zeros_like(place), boxes[j])",
     "pass", "foreground aligned at its old place"),
    ("tests/baselines/cvsa.py", "if not 1 / MOST_STRETCHED <= ratio <= MOST_STRETCHED:",
     "if ratio > MOST_STRETCHED:", "views shrunk by any factor"),
    ("tests/baselines/cvsa.py", "has_foreground.sum().clamp_min(1)", "len(row)",
     "images without foreground in the alignment's mean"),
    ("tests/baselines/cvsa.py", "k1, k2 = self.key(view1), self.key(view2)",
     "k1, k2 = self.key(view1.flip(0)), self.key(view2)", "keys of other images"),
    ("tests/baselines/cvsa.py", "maps.patches.clamp_max(1)", "maps.patches.clamp_max(2)",
     "parts in the foreground's map"),
    ("tests/baselines/released.py",
     "k1, k2 = self.key(view1), self.key(view2)\n            self.move_momentum_encoder(m)\n",
     "k1, k2 = self.key(view1), self.key(view2)\n", "one of four EMA steps left out"),
    ("tests/baselines/released.py", "m = momentum_schedule(progress, 1, self.momentum)",
     "m = self.momentum", "the release's momentum is constant"),
    ("tests/baselines/released.py", "return importance > importance",
     "return importance >= importance",
     "the release's mask keeps the threshold"),
    ("tests/baselines/released.py", "nn.Dropout(0.2)", "nn.Dropout(0.1)", "dropout of 0.1"),
    ("tests/baselines/released.py", "[1000 * row for row in attentions]", "attentions[-1:]",
     "the release's mask of the last layer"),
]]
EXPLAINED = {  # description of a defect: why no test can notice it
    "encoder not in eval mode": "without effect: the encoder has no dropout and no BatchNorm",
}


def changed(defect, root=ROOT):
    """Return the file's text with the defect; raise ValueError unless the old text occurs once."""
    text = (root / defect.file).read_text(encoding="utf-8")
    count = text.count(defect.old)
    if count != 1:
        raise ValueError(f"{defect.file}: {defect.old!r} occurs {count} times, not once")
    text = text.replace(defect.old, defect.new)
    compile(text, defect.file, "exec")
    return text


def order_of_tests(file, folder):
    """Return the paths of the tests, those most likely to notice a change of the file first."""
    names = [path.name for path in sorted((folder / "tests").glob("test_*.py"))
             if path.name not in LEFT_OUT]
    first = [f"test_{word}.py" for word in FIRST.get(file, "").split()]
    return [f"tests/{name}" for name in [*first, *(name for name in names if name not in first)]]


def plant(defect, tests=None):
    """Run the fast tests on a copy with the defect -> the test that failed, or "" if none did."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", "runs", "datasets", "__pycache__", ".hypothesis", ".venv"))
        (copy / defect.file).write_text(changed(defect), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no",
                   *(tests or order_of_tests(defect.file, copy))]
        environment = {**os.environ, "CI": "true", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=copy, env=environment, text=True,
                                  capture_output=True, timeout=3600 * HOURS)
        except subprocess.TimeoutExpired:
            return "the tests hang"
    if done.returncode == 0:
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.M)
    if done.returncode != 1 or not failed:  # of the defect, not of the project
        raise RuntimeError(f"{defect.breaks}: pytest ended with {done.returncode}\n{done.stdout}")
    return failed[0]


def state_of(defect, test):
    """Return a hash of what a result depends on: the defect, its file and the test that failed."""
    texts = [repr(defect), (ROOT / defect.file).read_text(encoding="utf-8")]
    path = ROOT / test.split("::")[0]
    if path.is_file():
        texts.append(path.read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a word of the text or the description")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    args = parser.parse_args(argv)
    for defect in DEFECTS:  # before an hour is spent
        changed(defect)
    chosen = [defect for defect in DEFECTS if args.only in " ".join(defect)]
    killed = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    lock = Lock()

    def run(defect):
        test, state = killed.get(defect.breaks, ("", ""))
        if not test or state != state_of(defect, test):
            try:
                test = plant(defect)
            except RuntimeError as error:
                print(error, flush=True)
                test = ""
        verdict = "killed" if test else "survived"
        print(f"{verdict:<9} {defect.file:<18} {defect.breaks:<50} {test}", flush=True)
        if test:
            with lock:
                killed[defect.breaks] = test, state_of(defect, test)
                STORE.parent.mkdir(exist_ok=True)
                part = STORE.with_suffix(".part")
                part.write_text(json.dumps(killed, indent=1), encoding="utf-8")
                part.replace(STORE)
        return test

    unchanged = Defect("train.py", "in a method of one's own", "in one's own method", "nothing")
    failed = plant(unchanged)
    if failed:
        raise SystemExit(f"{failed} fails without any defect")
    with ThreadPoolExecutor(args.jobs) as pool:
        tests = list(pool.map(run, chosen))
    print(f"{sum(map(bool, tests))} of {len(tests)} killed")
    for defect, test in zip(chosen, tests):
        if not test:
            print(f"survived: {defect.breaks}: {EXPLAINED.get(defect.breaks, 'unexplained')}")


if __name__ == "__main__":
    main()
