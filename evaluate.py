"""Stage 3: score a network as the field does, and show what it learned.

    python evaluate.py configs/btcv.py --name=btcv                                     scores, predictions, contact sheets
    python evaluate.py configs/btcv.py --name=btcv --images="scans/*.nii.gz" --out=there    scans without labels
    python evaluate.py configs/demo.py --probe                                         what an encoder knows without labels
    python evaluate.py configs/demo.py --figures=all                                   .. and in pictures
    python evaluate.py configs/study.py --study                                        many small runs, one table

Axis letters: b batch, c channel, k class, x y z voxels (RAS+: to the patient's right, front and head), n cases, t tokens.
scikit-learn and matplotlib are needed by probes and pictures alone and imported there.
"""
import dataclasses
import functools
import gzip
import importlib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy import ndimage
from scipy.spatial import cKDTree

import configs
import data
import losses
import metrics
import run
import tasks
from model import Swin3D, WeightsError, load_weights, read_file


def _need(module, package):
    """A module that only some commands use."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{package} is not installed, and this command needs it: pip install {package}") from None


def token_labels(label_map, patch, share=0.15):
    """Give every token the organ that its patch shows.

    label_map  (x, y, z) integer ids, 0 background;   patch  voxels, one number or three, dividing the map
    share      least share of the patch that the organ must cover.  Tiny organs decide it: at 1.5 mm an adrenal gland
               touches about ten patches of 8^3 and fills half of one alone; 0.15 keeps most of them, and takes little
               more than the rim from the large organs
    returns    ids (t,): the most frequent id other than 0 (of equals the least), or 0 where none covers `share`;
               purity (t,): the share of the patch that has this id.  Token order "(x y z)", x slowest
    """
    label_map, patch = np.asarray(label_map), tasks.three(patch)
    if label_map.ndim != 3 or label_map.dtype.kind not in "iub" or any(s % p for s, p in zip(label_map.shape, patch)):
        raise ValueError(f"token_labels: expected integers, sides in steps of {patch}, found {label_map.dtype} {label_map.shape}")
    ids, index = np.unique(np.append(label_map.ravel(), 0), return_inverse=True)     # 0 is always among the ids
    p, q, r = patch
    patches = rearrange(index[:-1].reshape(label_map.shape), "(x p) (y q) (z r) -> (x y z) (p q r)", p=p, q=q, r=r)
    t, voxels = patches.shape
    flat = patches + len(ids) * np.arange(t)[:, None]
    covered = np.bincount(flat.ravel(), minlength=t * len(ids)).reshape(t, len(ids)) / voxels
    background = int(np.searchsorted(ids, 0))
    organs = covered.copy()
    organs[:, background] = -1
    best = organs.argmax(1)
    best[organs.max(1) < share] = background
    return ids[best], covered[np.arange(t), best]


def linear_probe(train_x, train_y, test_x, test_y, seed=0, limit=1000):
    """How well a linear map reads organs from features: multinomial logistic regression, every class of equal weight.

    *_x      (t, d) features, standardised by the training mean and deviation;   *_y  (t,) ids
    limit    at most so many training tokens per class, drawn by `seed` (scans hold mostly background and liver)
    returns  dict: balanced_accuracy, recall {id: share found}, both over the classes of the test set that were trained;
             untrained [ids] of the test set that were not
    """
    linear = _need("sklearn.linear_model", "scikit-learn")
    train_x, train_y, test_x, test_y = _probe_sets(train_x, train_y, test_x, test_y, seed, limit)
    mean, deviation = train_x.mean(0), train_x.std(0)
    deviation[deviation == 0] = 1
    probe = linear.LogisticRegression(class_weight="balanced", max_iter=2000)
    probe.fit((train_x - mean) / deviation, train_y)
    return _recalls(probe.predict((test_x - mean) / deviation), test_y, train_y)


def knn_probe(train_x, train_y, test_x, test_y, seed=0, limit=1000, k=20):
    """How well neighbours share organs: majority of the k training tokens of largest cosine similarity; see linear_probe."""
    neighbors = _need("sklearn.neighbors", "scikit-learn")
    train_x, train_y, test_x, test_y = _probe_sets(train_x, train_y, test_x, test_y, seed, limit)
    if len(train_x) < k:
        raise ValueError(f"knn_probe: k = {k} neighbours asked of {len(train_x)} training tokens")
    probe = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train_x, train_y)
    return _recalls(probe.predict(test_x), test_y, train_y)


def _probe_sets(train_x, train_y, test_x, test_y, seed, limit):
    """Checked, in float64, the training tokens thinned to `limit` per class."""
    train_x, test_x = np.asarray(train_x, np.float64), np.asarray(test_x, np.float64)
    train_y, test_y = np.asarray(train_y), np.asarray(test_y)
    for which, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != x.shape[:1] or not np.isfinite(x).all():
            raise ValueError(f"probe: {which} must be finite (t, d) features with (t,) ids, found {x.shape} and {y.shape}")
    if len(np.unique(train_y)) < 2:
        raise ValueError(f"probe: training tokens must show two classes at least, found {np.unique(train_y).tolist()}")
    chosen = _thin(train_y, seed, limit)
    return train_x[chosen], train_y[chosen], test_x, test_y


def _thin(y, seed, limit):
    """Sorted indices of at most `limit` tokens per class, drawn by `seed`."""
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:limit] for c in np.unique(y)]))


def _recalls(predicted, true, trained):
    known = np.intersect1d(true, trained)
    recall = {int(c): float(np.mean(predicted[true == c] == c)) for c in known}
    return dict(balanced_accuracy=metrics.mean(list(recall.values())), recall=recall, untrained=np.setdiff1d(true, trained).tolist())


def silhouette(x, y, metric="cosine", seed=0, limit=1000):
    """How well tokens (t, d) gather by organ y (t,), Rousseeuw 1987: 1 compact and apart, 0 mixed, below 0 misplaced.

    metric   "cosine" or "euclidean" (the paper's figures use Euclidean on raw features)
    limit    at most so many tokens per class, drawn by `seed`: time grows with the square of their number
    returns  (mean over tokens, {id: mean over its tokens})
    """
    measures = _need("sklearn.metrics", "scikit-learn")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"silhouette: metric must be 'cosine' or 'euclidean', found {metric!r}")
    x, y = np.asarray(x, np.float64), np.asarray(y)
    chosen = _thin(y, seed, limit)
    x, y = x[chosen], y[chosen]
    if not 2 <= len(np.unique(y)) < len(y):
        raise ValueError(f"silhouette: expected two classes and more tokens than classes, found {len(set(y))} and {len(y)}")
    values = measures.silhouette_samples(x, y, metric=metric)
    return float(values.mean()), {int(c): float(values[y == c].mean()) for c in np.unique(y)}


def effective_rank(x):
    """Dimensions that features (t, d) really use (Roy and Vetterli 2007): exp of the entropy of the singular values.

    Centred features; between 1 (a line) and min(t - 1, d) (all directions alike); 0 for collapsed, equal tokens.
    """
    x = np.asarray(x, np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    if values[0] <= 1e-12 * max(np.abs(x).max(), 1):
        return 0.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


# ---------------------------------------------------------------------------------------------------------------------
# pictures


# The first seven are Okabe and Ito's (2008), told apart by all kinds of colour vision; fourteen cannot all be, and later
# ones repeat, so every class also carries its number in the picture.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
           "#44AA99", "#882255", "#DDCC77", "#332288", "#999933", "#99DDFF", "#EE8866")


# name, axis that is cut, axes across and up, letters at the left, right, lower and upper edge
PLANES = (("axial", 2, 0, 1, "RLPA"), ("coronal", 1, 0, 2, "RLIS"), ("sagittal", 0, 1, 2, "APIS"))


def contact_sheet(path, image, truth, prediction, spacing, title, window=None, names=None):
    """One PNG per case: three planes through the largest object; above the scan alone, below prediction and truth on it.

    image              (x, y, z) RAS+;   truth, prediction  (x, y, z) ids, 0 background;   spacing  (3,) mm
    title              one line: case, scores
    window             (low, high) grey values; None: the 1st and 99th percentile of what is shown
    names              {id: name} for the legend; None: ids alone

    Filled: prediction.  Outlined in the same colour: truth.  So a fill without a line is false positive, a line without a
    fill false negative.  Radiological display: the patient's right on the left of the axial and coronal picture, axial
    seen from the feet; sagittal with the front on the left.  The planes are those in which the largest connected part of
    the truth's largest class (of the prediction's, if the truth is empty) has its largest area.  All at one scale in mm.
    """
    _need("matplotlib", "matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    image, truth, prediction = (np.asarray(a) for a in (image, truth, prediction))
    if not image.shape == truth.shape == prediction.shape or image.ndim != 3:
        raise ValueError(f"contact_sheet: expected one shape (x, y, z), found {image.shape}, {truth.shape}, {prediction.shape}")
    centre = _show_where(truth, prediction)
    cuts = [_cut(plane, centre, image, truth, prediction) for plane in PLANES]
    low, high = window or np.percentile(np.concatenate([cut[0].ravel() for cut in cuts]), [1, 99])
    shown = sorted({int(c) for cut in cuts for ids in cut[1:] for c in np.unique(ids)} - {0})

    across, up = ([spacing[plane[i]] * image.shape[plane[i]] for plane in PLANES] for i in (2, 3))
    width, gap, heading, legend = 11.0, 0.15, 0.75, 0.45 + 0.22 * -(-(len(shown) + 2) // 6)              # inches
    scale = (width - 4 * gap) / sum(across)                                # inches per mm, the same everywhere
    height = heading + 2 * (max(up) * scale + gap) + legend
    figure = Figure((width, height), facecolor="white")
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=12)
    for row, column in itertools.product(range(2), range(3)):
        (name, cut, _, _, letters), (grey, true, predicted) = PLANES[column], cuts[column]
        left, top = gap + column * gap + sum(across[:column]) * scale, height - heading - row * (max(up) * scale + gap)
        w, h = across[column] * scale, up[column] * scale
        axes = figure.add_axes((left / width, (top - h) / height, w / width, h / height))
        axes.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", aspect="auto", interpolation="bilinear")
        axes.set_axis_off()
        if row == 0:
            axes.set_title(f"{name}, {'xyz'[cut]} = {centre[cut]} of {image.shape[cut]}", fontsize=10)
        else:
            _overlay(axes, true, predicted, shown)
        _letters(axes, letters)
    _legend(figure, shown, names, truth.any(), prediction.any())
    figure.text(0.5, 0.08 / height, f"grey values {low:.4g} to {high:.4g}", ha="center", fontsize=8)
    figure.savefig(path, dpi=120)


def image_sheet(path, source, truth, prediction, spacing, title):
    """Input, target, prediction and their difference (x, y, z) through the middle of the target, three planes, one scale each for
    input and for target and prediction; the difference from blue (too low) over white to red (too high)."""
    _need("matplotlib", "matplotlib")
    from matplotlib.figure import Figure
    centre = [s // 2 for s in truth.shape]
    low, high = np.percentile(truth, [0.5, 99.8])
    reach = max(float(np.percentile(np.abs(prediction - truth), 99.8)), 1e-6)
    figure = Figure((11, 9), facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(3, 4)
    columns = (("input", source, "gray", *np.percentile(source, [0.5, 99.8])), ("target", truth, "gray", low, high),
               ("prediction", prediction, "gray", low, high), ("prediction - target", prediction - truth, "RdBu_r", -reach, reach))
    for k, (row, plane) in enumerate(zip(axes, PLANES)):
        for axis, (name, volume, colours, least, most) in zip(row, columns):
            drawn = axis.imshow(_cut(plane, centre, volume)[0], cmap=colours, vmin=least, vmax=most, origin="lower",
                                aspect=spacing[plane[3]] / spacing[plane[2]], interpolation="bilinear")
            axis.set_axis_off()
            axis.set_title(f"{name}, {plane[0]}" if k == 0 else plane[0], fontsize=9)
            _letters(axis, plane[4])
            if k == 2:
                figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.8)
    figure.savefig(path, dpi=110)


def _show_where(truth, prediction):
    """Voxel (3,): per axis the plane where the largest object has most voxels; the middle where there is no object."""
    ids = truth if truth.any() else prediction
    if not ids.any():
        return [s // 2 for s in ids.shape]
    parts, _ = ndimage.label(ids == np.bincount(ids[ids > 0].astype(np.int64)).argmax())
    largest = parts == np.bincount(parts[parts > 0]).argmax()
    return [int(largest.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3)]


def _cut(plane, centre, *volumes):
    """The volumes' slices as (up, across) pictures, the across axis turned: R, or the front, comes on the left."""
    _, axis, across, up, _ = plane
    return [rearrange(np.take(v, centre[axis], axis), "across up -> up across")[:, ::-1] for v in volumes]


def _letters(axes, letters):
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
              (0.5, 0.02, "center", "bottom"), (0.5, 0.98, "center", "top"))
    for letter, (x, y, horizontal, vertical) in zip(letters, places):
        axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white", fontsize=10,
                  bbox=dict(facecolor="black", alpha=0.5, linewidth=0, pad=1.5))


def _colour(c):
    return COLOURS[(c - 1) % len(COLOURS)]


def _overlay(axes, true, predicted, shown):
    """Prediction filled, truth outlined along the voxels' edges, the id where a class is thickest."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke
    fill, fine = np.zeros((*true.shape, 4)), 4                             # 4 points a voxel make the outline square
    for c in shown:
        fill[predicted == c] = (*to_rgb(_colour(c)), 0.45)
    axes.imshow(fill, origin="lower", aspect="auto", interpolation="nearest")
    up, across = ((np.arange(n * fine + 2) - 0.5) / fine - 0.5 for n in true.shape)
    for c in shown:
        if (true == c).any():
            mask = np.pad((true == c).repeat(fine, 0).repeat(fine, 1), 1)
            axes.contour(across, up, mask, [0.5], colors=[_colour(c)], linewidths=1.6)
    axes.set(xlim=(-0.5, true.shape[1] - 0.5), ylim=(-0.5, true.shape[0] - 0.5))
    for c in shown if len(shown) > 1 else ():                              # numbers last, above every line
        seen = true == c if (true == c).any() else predicted == c
        if seen.any():
            depth = ndimage.distance_transform_edt(np.pad(seen, 1))[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            axes.text(x, y, c, color="white", fontsize=8, ha="center", va="center", weight="bold", clip_on=True,
                      path_effects=[withStroke(linewidth=2, foreground="black")])


def _legend(figure, shown, names, has_truth, has_prediction):
    """Number and name of every class in sight, and what fill and line mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    handles = [Patch(facecolor=_colour(c), label=f"{c} {names[c]}" if names else str(c)) for c in shown]
    handles += [Patch(facecolor="0.7", label="fill: prediction" + ("" if has_prediction else " (empty)")),
                Line2D([], [], color="0.3", label="line: truth" + ("" if has_truth else " (empty)"))]
    figure.legend(handles=handles, loc="lower center", ncols=6, fontsize=9, frameon=False,
                  bbox_to_anchor=(0.5, 0.22 / figure.get_figheight()))


# ---------------------------------------------------------------------------------------------------------------------
# results: files and tables


def write_prediction(folder, scan, ready, cfg):
    """The prediction on the scan's own voxels as NIfTI: affine, shape and axes of the first image, so that any viewer lays one over
    the other. Ids in the smallest type that holds them; images in the unit of the file where the scaling can be undone."""
    path = scan.case["images"][0]
    stored, affine = data.read_stored(path)
    shape = stored.shape
    if cfg.task == "segmentation":
        ids = painted(tasks.on_scan(ready, scan, affine, shape, cfg), cfg)
        write_nifti(folder / f"{scan.id}.nii.gz", ids.numpy(), affine, path)
        if cfg.probabilities:
            several = torch.stack([tasks.to_original(p, scan.affine, affine, shape, 1, fill=float(k == 0 and not cfg.regions)) for k, p in enumerate(ready)], -1)
            write_nifti(folder / f"{scan.id}_probabilities.nii.gz", several.numpy(), affine, path)
        return
    unit = ready
    if cfg.intensity in ("window", "scale"):
        unit = ready * (cfg.window[1] - cfg.window[0]) + cfg.window[0]
    for k, channel in enumerate(unit):
        back = tasks.to_original(channel, scan.affine, affine, shape, 1, fill=float(channel.min()))
        write_nifti(folder / (f"{scan.id}.nii.gz" if len(unit) == 1 else f"{scan.id}_{k}.nii.gz"), back.numpy(), affine, path)


def painted(masks, cfg):
    """(k, x, y, z) bool -> (x, y, z) ids in the smallest type that holds them; of regions the larger first, so that a smaller one
    lies on it, each with the id that it has and no smaller one has."""
    groups = list(cfg.regions.values()) or [(k,) for k in sorted(cfg.labels)]
    ids = torch.zeros(masks.shape[1:], dtype=torch.uint8 if max(cfg.labels) < 256 else torch.int16)
    for group, mask in sorted(zip(groups, masks), key=lambda pair: -len(pair[0])):
        smaller = set().union(*[g for g in groups if len(g) < len(group)])
        ids[mask] = min(set(group) - smaller or group)
    return ids


def write_nifti(path, array, affine, like):
    """Written aside and renamed; keeps the source's header where it is a NIfTI file, its affine codes above all."""
    header = nib.load(like).header.copy() if str(like).endswith((".nii", ".nii.gz")) else None
    if header is not None:
        header.set_data_dtype(array.dtype)
        header["descrip"], header["cal_min"], header["cal_max"] = b"", 0, 0
    image = (nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image)(array, affine, header)
    image.header.set_slope_inter(1, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = image.to_bytes()
    with configs.replacing(path) as aside:
        aside.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)


def cell(value, metric=""):
    if value is None or np.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if metric in ("dice", "dice_of_positive", "accuracy", "balanced_accuracy", "majority_accuracy", "recall",
                                              "auc", "auc_mean") else f"{value:.4g}"


def text_table(rows):
    """Aligned columns; the first row is the head."""
    width = [max(len(str(row[k])) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(str(c).ljust(w) if k == 0 else str(c).rjust(w) for k, (c, w) in enumerate(zip(row, width))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def result_tables(results, cfg):
    """Text of everything scored: a table per grid and metric, a row per checkpoint, the paper's rows below the first."""
    text = []
    first = next(iter(results.values()))["summary"]
    for grid, scored in first.items():
        for metric, parts in scored.items():
            if metric == "confusion":
                text += [f"confusion of {name} (rows: truth, columns: prediction; {', '.join(tasks.class_names(cfg))}): "
                         f"{result['summary'][grid][metric]}" for name, result in results.items()]
                continue
            columns = list(parts)
            head = f"{metric}, {grid} {'grid' if grid != 'scans' else ''}".strip()
            note = {"dice": "%, mean over cases; a class absent from truth and prediction is left out; `mean`: per case over its classes",
                    "hd95": "mm, lower is better; cases where one of the two masks is empty are left out and counted as missed"}.get(metric, "")
            rows = [[f"{head}" , *columns]]
            for name, result in results.items():
                rows.append([name, *[cell(result["summary"][grid][metric][c]["mean"], metric) for c in columns]])
                spans = [result["summary"][grid][metric][c] for c in columns]
                if any("low" in s and not np.isnan(s["low"]) for s in spans):
                    rows.append(["  95 %", *[f"{cell(s['low'], metric)}..{cell(s['high'], metric)}" if "low" in s else "" for s in spans]])
            if metric in ("dice", "accuracy", "psnr", "ssim", "nmse") and not text:
                for name, values in cfg.paper.items():
                    rows.append([f"{name} [paper]", *[str(values.get(c, "-")) for c in columns]])
            text.append(text_table(rows) + (f"\n({note})" if note else ""))
    return "\n\n".join(text)


def compare(results, cfg):
    """Paired difference of each checkpoint to the first, on the main score, case by case."""
    grid, metric, part = tasks.TASKS[cfg.task].best
    names, lines = list(results), []
    for name in names[1:]:
        if cfg.task == "classification":
            right = [[float(np.argmax(list(r["scores"]["scans"]["probability"].values())) == r["scores"]["scans"]["class"]["true"])
                      for r in results[n]["rows"]] for n in (name, names[0])]
            what = "accuracy"
        else:
            right = [[r["scores"][grid][metric].get(part, np.nan) for r in results[n]["rows"]] for n in (name, names[0])]
            what = f"{metric} {part}"
        mean, low, high = metrics.paired_difference(*right)
        lines.append(f"{name} minus {names[0]}: {what} {mean:+.4f}, 95 % interval {low:+.4f} .. {high:+.4f} ({len(right[0])} cases, paired)")
    return "\n".join(lines)


def restore(path, cfg, device):
    """The fine-tuned network of a checkpoint; exits with one line when it is none, or another one."""
    network = tasks.TASKS[cfg.task].network(cfg)
    try:
        report = load_weights(network, path)
        stored = read_file(path)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    then = stored.get("config") if stored.get("format") == "s2dc/finetune" else None    # other files do not say
    for key in ("task", "in_channels", "labels", "regions", "classes", "residual") if isinstance(then, dict) else ():
        theirs, ours = then.get(key), getattr(cfg, key)
        if theirs != ours or key == "regions" and list(theirs) != list(ours):       # the channels follow the order of regions
            raise SystemExit(f"{path}: trained with {key} = {theirs!r}, the config has {ours!r}")
    lost = [r for r in report["reasons"].values() if "outputs" in r]
    if lost:
        raise SystemExit(f"{path}: {lost[0].split(' ', 1)[1]}; the config declares other classes than it was trained for")
    if report["initial"]:
        raise SystemExit(f"{path}: holds no fine-tuned {cfg.task} network, {sum(report['initial'].values())} tensors are missing "
                         f"({', '.join(report['initial'])}); expected the best.pt of finetune.py")
    for line in tasks.preprocessing_differences(stored.get("preprocessing"), cfg):
        print(f"{path}: {line} here")
    return network.to(device).eval()


def check_unseen(files, scans, cfg):
    """Refuse to report a network on subjects that trained it, as another fold, share or list of the same data would do."""
    for file in files if cfg.part != "train" else ():
        stored = read_file(file)
        if stored.get("format") == "s2dc/finetune" and stored["config"]["dataset"] == cfg.dataset:
            both = sorted({scan.subject for scan in scans} & set(stored.get("subjects", ())))
            if both:
                raise SystemExit(f"{file}: {len(both)} {cfg.part} subjects trained it: {', '.join(both[:4])}; give the split of its training "
                                 "(val, test, fold, ..), or --part=train")


def load_encoder(path, cfg, device, seed=None):
    """Swin3D as the checkpoint states it, or with random weights ("random")."""
    if path == "random":
        torch.manual_seed(cfg.seed if seed is None else seed)
        encoder = Swin3D(cfg.in_channels, **tasks.swin(cfg))
    else:
        try:
            stated = read_file(path).get("arguments", {})
            known = {k: stated[k] for k in tasks.swin(cfg) if k in stated} if isinstance(stated, dict) else {}
            encoder = Swin3D(stated.get("in_channels", cfg.in_channels), **(tasks.swin(cfg) | known | {"checkpointing": False}))
            load_weights(encoder, path)
        except WeightsError as error:
            raise SystemExit(str(error)) from None
    return encoder.to(device).eval()


@torch.no_grad()
def encode(encoder, volume, crop, patch, device, overlap=None):
    """Token features (c, i, j, k) of one volume (c, x, y, z), in patches of `patch` voxels counted from voxel 0.

    The encoder sees crops side by side, as in pre-training; the last ones of an axis overlap so that all lie inside the volume
    padded to a multiple of 32. Only patches that lie wholly in the volume are returned.
    overlap: share of the crop by which neighbours overlap; every token then comes from the crop that has it nearest to its middle, so
    that the edges of crops do not show. None: side by side, a later crop replaces what an earlier one said.
    """
    level = int(math.log2(patch)) - 1
    size = [max(c, -(-n // 32) * 32) for n, c in zip(volume.shape[1:], crop)]
    pad = [p for n, s in zip(volume.shape[:0:-1], size[::-1]) for p in (0, s - n)]
    volume = F.pad(volume[None].float(), pad, value=float(volume.min()))
    steps = [c if overlap is None else max(int(c * (1 - overlap)) // patch, 1) * patch for c in crop]
    starts = [sorted({*range(0, s - c + 1, step), s - c}) for s, c, step in zip(size, crop, steps)]
    out = None
    for corner in itertools.product(*starts):
        x, y, z = (slice(s, s + c) for s, c in zip(corner, crop))
        tokens = encoder(volume[:, :, x, y, z].to(device))[level][0].float().cpu()
        if out is None:
            out = torch.zeros(len(tokens), *[s // patch for s in size])
        i, j, k = (slice(s // patch, (s + c) // patch) for s, c in zip(corner, crop))
        if overlap is None:
            out[:, i, j, k] = tokens
        else:
            own = [_most_central(axis, s, c, patch) for axis, s, c in zip(starts, corner, crop)]
            i, j, k = (np.ix_(*[o + s // patch for o, s in zip(own, corner)]))
            out[:, i, j, k] = tokens[:, *np.ix_(*own)]
    return out[:, :(size[0] - pad[5]) // patch, :(size[1] - pad[3]) // patch, :(size[2] - pad[1]) // patch]


def _most_central(starts, start, crop, patch):
    """Tokens, counted from `start`, that no other of the crops at `starts` has farther from its edges."""
    token = np.arange(crop // patch) + start // patch
    depth = [np.minimum(token - s // patch, (s + crop) // patch - 1 - token) for s in starts]
    return np.flatnonzero(np.argmax(depth, 0) == starts.index(start))


def probe_source(cfg):
    """The config with the files of the probe and the figures instead of its own, where it names any."""
    if cfg.probe_datalist:
        return dataclasses.replace(cfg, scans=(), image=(), label="", datalist=cfg.probe_datalist)
    if cfg.probe_image:
        return dataclasses.replace(cfg, scans=(), datalist="", image=cfg.probe_image, label=cfg.probe_label)
    return cfg


def probe_scans(cfg):
    """Labelled scans of the probe, preprocessed as the config says."""
    scans = [scan for scan in data.open_scans(probe_source(cfg)) if scan.case["label"]]
    if len(scans) < 2:
        raise SystemExit(f"a probe needs at least two labelled scans, found {len(scans)}; give probe_image and probe_label, or probe_datalist")
    return scans


def organ_tokens(encoder, scans, cfg, device, overlap=None):
    """(t, c) features, (t,) organ ids, (t,) scan numbers of all tokens that show an organ; overlap as in encode."""
    parts = []
    for n, scan in enumerate(scans):
        volume = torch.from_numpy(np.ascontiguousarray(scan.open()))
        features = encode(encoder, volume, cfg.probe_crop or cfg.crop, cfg.token_patch, device, overlap)
        i, j, k = features.shape[1:]
        label = scan.open("label")[0][:i * cfg.token_patch, :j * cfg.token_patch, :k * cfg.token_patch]
        ids, _ = token_labels(np.ascontiguousarray(label), cfg.token_patch, cfg.probe_share)
        x = rearrange(features, "c i j k -> (i j k) c").numpy()
        parts.append((x[ids > 0], ids[ids > 0], np.full((ids > 0).sum(), n)))
    return [np.concatenate(each) for each in zip(*parts)]


@torch.no_grad()
def correspondence_accuracy(encoder, scans, cfg, device):
    """Share of matched tokens whose most similar token of V' (cosine of encoder features) is the true partner; V' moved by the
    config's rotation, scale, shear and shift, one slab a scan."""
    slabs, right, total = data.Slabs(scans, cfg, 1, cfg.seed), 0, 0
    grid = tuple(s // cfg.token_patch for s in cfg.slab)
    for n, scan in enumerate(scans):
        batch = data.collate([slabs.sample(scan, np.random.default_rng((cfg.seed, n)))])
        valid, valid_ = data.tokens_inside(batch, grid, cfg.token_patch)
        _, i, j = data.matches(batch["H"], grid, cfg.token_patch).T
        V, V_, _ = data.views(batch, cfg)
        tokens = [rearrange(encode(encoder, view[0], cfg.crop, cfg.token_patch, device), "c i j k -> 1 (i j k) c") for view in (V, V_)]
        sim = losses.similarity(*tokens)[0].masked_fill(~valid_, -2)
        fair = valid[0, i] & valid_[0, j]
        right += int((sim.argmax(1)[i] == j)[fair].sum())
        total += int(fair.sum())
    return right / max(total, 1)


def probe(cfg, device):
    """Numbers that need no fine-tuning, one row per encoder, with cfg.probe_random random weights first."""
    scans = probe_scans(cfg)
    first = max(1, min(len(scans) - 1, round(cfg.probe_train * len(scans))))
    print(f"probe: {first} scans train, {len(scans) - first} test; tokens of {cfg.token_patch} voxels that show an organ")
    files = list(data._tuple(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "encoder.pt")]
    rows, results = [["encoder", "linear probe", "k-NN", "silhouette cos", "silhouette eucl", "effective rank", "correspondence"]], {}
    for path in dict.fromkeys(["random"] * cfg.probe_random + files):
        encoder = load_encoder(path, cfg, device)
        x, y, n = organ_tokens(encoder, scans, cfg, device)
        train = n < first
        linear = linear_probe(x[train], y[train], x[~train], y[~train], cfg.seed, cfg.probe_limit)
        near = knn_probe(x[train], y[train], x[~train], y[~train], cfg.seed, cfg.probe_limit)
        result = dict(linear=linear, knn=near, silhouette_cosine=silhouette(x[~train], y[~train], "cosine"),
                      silhouette_euclidean=silhouette(x[~train], y[~train], "euclidean"), effective_rank=effective_rank(x[~train]),
                      correspondence=correspondence_accuracy(encoder, scans[first:], cfg, device), tokens=[int(train.sum()), int((~train).sum())])
        results[path] = result
        rows.append([path, *[f"{v:.3f}" for v in (linear["balanced_accuracy"], near["balanced_accuracy"], result["silhouette_cosine"][0],
                                                  result["silhouette_euclidean"][0], result["effective_rank"], result["correspondence"])]])
    print(text_table(rows))
    print("(linear probe and k-NN: balanced accuracy over organs, 1 all right; silhouette: 1 apart, 0 mixed; correspondence: share of tokens "
          "found again after the config's moves)")
    return results


STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
         "legend.fontsize": 8, "legend.frameon": False, "figure.titlesize": 11, "figure.facecolor": "white", "savefig.dpi": 150}


class NoFigure(Exception):
    """Why a picture cannot be made of the scans, checkpoints or log at hand; one line."""


class Shown:
    """What several pictures share, each made when first asked for: a scan, its query points, tokens, a moved copy."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.source, self.patch = cfg, device, probe_source(cfg), cfg.token_patch
        files = list(data._tuple(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "encoder.pt")]
        short = ["/".join(Path(f).with_suffix("").parts[-2:]).removesuffix("/encoder") for f in files]
        short = ["random weights" if f == "random" else s for f, s in zip(files, short)]
        self.heads = dict(zip(files, short if len(set(short)) == len(set(files)) else files))    # {file: heading}
        self.encoders, self.encoded = {}, {}

    @functools.cached_property
    def cases(self):
        return data.find_cases(self.source)

    @functools.cached_property
    def scan(self):
        found = [case for case in self.cases if self.cfg.figure_scan in ("", case["id"])]
        if not found:
            raise SystemExit(f"figure_scan = {self.cfg.figure_scan!r}, no case has that id; there are: "
                             f"{', '.join(case['id'] for case in self.cases[:4])} ..")
        return data.open_scans(self.source, found[:1])[0]

    @functools.cached_property
    def grid(self):
        if min(self.scan.shape) < self.patch:
            raise SystemExit(f"{self.scan.id}: {self.scan.shape} voxels do not hold one patch of {self.patch}")
        return tuple(s // self.patch for s in self.scan.shape)

    @functools.cached_property
    def centres(self):
        return data.patch_centres(self.grid, self.patch).numpy()

    def name(self, organ):
        return self.cfg.labels.get(organ, f"organ {organ}")

    @functools.cached_property
    def organs(self):
        """ids (t,), 0 where a patch shows none, and purity (t,); None without a label."""
        if not self.scan.case["label"]:
            return None
        inside = tuple(slice(n * self.patch) for n in self.grid)
        return token_labels(np.ascontiguousarray(self.scan.open("label")[0][inside]), self.patch, self.cfg.probe_share)

    @functools.cached_property
    def queries(self):
        """[(name, organ id or None, point (3,) in voxels)]: the point asked for; or of every organ the purest patch, of equals
        the one nearest to the organ's middle; or, without labels, the middle of the scan."""
        cfg, scan, given = self.cfg, self.scan, self.cfg.query or self.cfg.query_mm
        if (cfg.query and cfg.query_mm) or (given and (len(given) != 3 or not configs._numbers(given))):
            raise SystemExit(f"query = {cfg.query}, query_mm = {cfg.query_mm}: expected three numbers, in one of them")
        if given:
            return [("query", None, np.array(given, float) if cfg.query else (np.linalg.inv(scan.affine) @ [*given, 1])[:3])]
        if self.organs is None:
            print(f"{scan.id}: no label and no query, so the point shown is the middle of the scan")
            return [("middle of the scan", None, (np.array(self.grid) // 2 + 0.5) * self.patch - 0.5)]
        ids, purity = self.organs
        asked = list(cfg.figure_organs) or sorted(set(ids.tolist()) - {0})
        lost = [f"organ {k}" for k in asked if k not in ids] or ["an organ"] * (not asked)
        if lost:
            raise SystemExit(f"{scan.id}: no patch of {self.patch} voxels shows {lost[0]} "
                             f"(probe_share = {cfg.probe_share:g}); give a query")
        points = []
        for k in asked:
            away = np.linalg.norm(self.centres - self.centres[ids == k].mean(0), axis=1)
            best = (ids == k) & (purity == purity[ids == k].max())
            points.append((self.name(k), k, self.centres[np.where(best, away, np.inf).argmin()]))
        return points

    def cell(self, point):
        """Token (i, j, k) whose patch holds a point."""
        cell = np.floor((np.asarray(point) + 0.5) / self.patch).astype(int)
        if (cell < 0).any() or (cell >= self.grid).any():
            raise SystemExit(f"query: voxel {np.round(point, 1).tolist()} lies in no patch of {self.scan.id}, "
                             f"they span voxels 0 to {[n * self.patch - 1 for n in self.grid]}")
        return tuple(cell.tolist())

    def encoder(self, file):
        if file not in self.encoders:
            self.encoders[file] = load_encoder(file, self.cfg, self.device)
        takes, holds = self.encoders[file].arguments["in_channels"], self.scan.record["channels"]
        if takes != holds:
            raise SystemExit(f"{file}: takes {takes} channels, {self.scan.id} has {holds}")
        return self.encoders[file]

    def tokens(self, file, moved=False):
        """(c, i, j, k) features of the scan, or of its moved copy; crops overlap by half, so that their edges do not show."""
        if (file, moved) not in self.encoded:
            volume = self.pair["V'"] if moved else torch.from_numpy(np.ascontiguousarray(self.scan.open()))
            self.encoded[file, moved] = encode(self.encoder(file), volume, self.cfg.crop, self.patch, self.device, 0.5)
        return self.encoded[file, moved]

    def similar(self, file, which=None):
        """Blocks (rows, t): similarity of V's tokens, all or `which` (n,), with all of V'."""
        q, k = (rearrange(self.tokens(file, moved), "c i j k -> 1 (i j k) c") for moved in (False, True))
        for rows in (torch.arange(q.shape[1]) if which is None else torch.as_tensor(which)).split(2048):
            yield losses.similarity(q[:, rows], k)[0]

    @functools.cached_property
    def pair(self):
        """V, the whole scan, and V', moved and jittered within the config's ranges, (c, x, y, z); H (4, 4); matches (m, 2), rows
        (i, j) of Eq. 2-3 inside the scan; valid_ (t,): tokens of V' that show the scan; tissue (t,): tokens of V above its mean."""
        whole = dataclasses.replace(self.cfg, slab=self.scan.shape, crop=self.scan.shape)
        batch = data.collate([data.Slabs([self.scan], whole, 1, whole.seed).sample(self.scan, np.random.default_rng(whole.seed))])
        V, V_, _ = data.views(batch, whole)
        valid, valid_ = data.tokens_inside(batch, self.grid, self.patch)
        _, i, j = data.matches(batch["H"], self.grid, self.patch).T
        tissue = F.avg_pool3d(V[0, :1], self.patch).flatten() > V[0, 0].mean()
        return {"V": V[0], "V'": V_[0], "H": batch["H"][0].numpy(), "valid_": valid_[0], "tissue": tissue.numpy(),
                "matches": torch.stack([i, j], 1)[valid[0, i] & valid_[0, j]].numpy()}

    def write(self, path, **numbers):
        keys = ("id", "shape", "spacing", "affine")
        run.write_json(path, {key: getattr(self.scan, key) for key in keys} | dict(patch=self.patch, grid=self.grid) | numbers)


def cosine_map(tokens, cell):
    """Cosine similarity (i, j, k) of all tokens (c, i, j, k) with the one at `cell`; 1 the same direction."""
    query = rearrange(tokens[(slice(None), *cell)], "c -> 1 1 c")
    return losses.similarity(query, rearrange(tokens, "c i j k -> 1 (i j k) c")).reshape(tokens.shape[1:]).numpy()


def components(tokens, n=3):
    """First n principal components (i, j, k, n) of tokens (c, i, j, k), and each one's share of the variance (n,). The sign of a
    component is arbitrary: here its largest weight is positive, so that a picture does not change from machine to machine."""
    x = rearrange(tokens, "c i j k -> (i j k) c").double().numpy()
    x = x - x.mean(0)
    values, vectors = (a[..., ::-1] for a in np.linalg.eigh(x.T @ x))
    vectors = vectors[:, :n] * np.sign(vectors[np.abs(vectors[:, :n]).argmax(0), np.arange(n)])
    return (x @ vectors).reshape(*tokens.shape[1:], n), values[:n] / values.sum()


def blank(width, height, title, layout="constrained"):
    from matplotlib.figure import Figure
    figure = Figure((width, height), layout=layout)
    figure.suptitle(title, y=None if layout else 1 - 0.08 / height)
    return figure


def draw_plane(axes, shown, plane, point, volume, look, organ=None, mark=True):
    """One slice in the frame of the scan's voxels, whether `volume` holds voxels or tokens; R, or the front, on the left."""
    from matplotlib.patches import Rectangle
    _, cut, across, up, letters = plane
    shape, p, step = shown.scan.shape, shown.patch, 1 if volume.shape == shown.scan.shape else shown.patch
    channels = rearrange(volume, "i j k c -> c i j k") if volume.ndim == 4 else volume[None]
    picture = np.stack(_cut(plane, np.floor((np.asarray(point) + 0.5) / step).astype(int), *channels), -1)
    end = shape[across] - 0.5                                              # grey where no whole patch fits
    drawn = axes.imshow(picture.squeeze(-1) if volume.ndim == 3 else picture, origin="lower", interpolation="nearest", **look,
                        extent=(end - picture.shape[1] * step, end, -0.5, picture.shape[0] * step - 0.5))
    axes.set(xlim=(-0.5, end), ylim=(-0.5, shape[up] - 0.5), xticks=[], yticks=[], facecolor="0.6")
    axes.set_aspect(shown.scan.spacing[up] / shown.scan.spacing[across])
    if organ is not None:
        mask = _cut(plane, np.floor(np.asarray(point) + 0.5).astype(int), shown.scan.open("label")[0] == organ)[0]
        if mask.any():
            axes.contour(mask, [0.5], colors=["white"], linewidths=0.9)
    if mark:
        x, y = (np.array(shown.cell(point)) * p - 0.5)[[across, up]]
        for colour, line in (("black", 2.6), ("#56B4E9", 1.3)):
            axes.add_patch(Rectangle((shape[across] - 1 - x - p, y), p, p, fill=False, edgecolor=colour, linewidth=line))
    _letters(axes, letters)
    return drawn


def plane_sheet(path, shown, point, columns, title, organ=None, mark=True):
    """One PNG: a row per plane through `point` (3,) voxels; the scan, then a column per volume, all at one scale in mm.

    columns  (heading, volume, look, unit): tokens (i, j, k) and dict(cmap, vmin, vmax), or colours (i, j, k, 3) in [0, 1] and {}
    organ    id that is outlined where the label has it;   mark: a square on the patch that holds the point
    """
    scan, unit = shown.scan, "z-score" if shown.cfg.intensity == "zscore" else "value (CT: HU)"
    low, high = (0, 1) if unit == "z-score" else shown.cfg.window
    image = scan.open()[0].astype(np.float32) * (high - low) + low
    cuts = [_cut(plane, np.floor(point + 0.5).astype(int), image)[0].ravel() for plane in PLANES]
    low, high = np.percentile(np.concatenate(cuts), [1, 99.5])
    columns = [("scan", image, dict(cmap="gray", vmin=low, vmax=high), unit), *columns]
    mm, n = np.array(scan.shape) * scan.spacing, len(columns)
    heights, widest, width = [mm[plane[3]] for plane in PLANES], max(mm[plane[2]] for plane in PLANES), max(9.0, 1.75 * n)
    head, foot, gap = 0.5 + 0.16 * max(heading.count("\n") + 1 for heading, *_ in columns), 0.55, 0.07      # inches
    scale = min(((width - 0.35) / n - gap) / widest, 9.5 / sum(heights))                                   # inches per mm
    total, left = head + sum(heights) * scale + 3 * gap + foot, 0.35 + (width - 0.35 - n * (widest * scale + gap)) / 2
    figure = blank(width, total, title, None)
    box = lambda x, y, w, h: figure.add_axes((x / width, y / total, w / width, h / total))
    for heading, volume, look, unit in columns:
        top, middle = total - head, (left + widest * scale / 2) / width
        figure.text(middle, (top + 0.05) / total, heading, ha="center", va="bottom")
        for plane, h in zip(PLANES, heights):
            w = mm[plane[2]] * scale
            axes = box(left + (widest * scale - w) / 2, top - h * scale, w, h * scale)
            drawn = draw_plane(axes, shown, plane, point, volume, look, organ, mark)
            if heading == "scan":
                name = f"{plane[0]}, {'xyz'[plane[1]]} = {point[plane[1]]:.4g}"
                figure.text((left - 0.05) / width, (top - h * scale / 2) / total, name, rotation=90, ha="right", va="center")
            top -= h * scale + gap
        if look:
            bar = box(left + 0.1, top - 0.1, widest * scale - 0.2, 0.1)
            figure.colorbar(drawn, cax=bar, orientation="horizontal").set_label(unit, labelpad=1)
            bar.locator_params(nbins=4)
        else:
            figure.text(middle, top / total, unit, ha="center", va="top")
        left += widest * scale + gap
    figure.savefig(path)
    return path


def similarity_sheets(shown, out, kind, heads):
    """A sheet per query point: where the scan looks like it to each encoder of {file: heading}, all on one colour scale."""
    made, numbers = [], []
    for name, organ, point in shown.queries:
        maps, mm = {f: cosine_map(shown.tokens(f), shown.cell(point)) for f in heads}, (shown.scan.affine @ [*point, 1])[:3]
        look = dict(cmap="magma", vmin=min(m.min() for m in maps.values()), vmax=1)
        path = out / (f"{kind}_{data._plain_id(name.replace(' ', '_'))}.png" if len(shown.queries) > 1 else f"{kind}.png")
        title = f"Similarity to the marked patch: {name}\nscan {shown.scan.id}, R A S = {', '.join(f'{v:.0f}' for v in mm)} mm"
        columns = [(heads[f], m, look, "cosine similarity") for f, m in maps.items()]
        made.append(plane_sheet(path, shown, point, columns, title, organ))
        numbers.append(dict(name=name, organ=organ, voxel=point, mm=mm, token=shown.cell(point),
                            maps={f: m.round(5) for f, m in maps.items()}))
    shown.write(out / f"{kind}.json", queries=numbers)
    return made


def draw_similarity(shown, out):
    """Fig. 1B: cosine similarity of a query patch with all patches of the scan, a column per encoder."""
    return similarity_sheets(shown, out, "similarity", shown.heads)


def draw_evolution(shown, out):
    """Fig. 7: the same maps from the checkpoints that pre-training kept (its key `keep`), after random weights."""
    folder = Path(shown.cfg.runs) / shown.cfg.name
    kept = {int(path.stem[8:]): str(path) for path in folder.glob("encoder-*.pt") if path.stem[8:].isdigit()}
    if not kept:
        raise NoFigure(f"{folder} holds no encoder-<step>.pt; pre-train with, for instance, --keep=\"(10, 100, 1000)\"")
    if (folder / "encoder.pt").exists():
        kept.setdefault(read_file(folder / "encoder.pt").get("step"), str(folder / "encoder.pt"))
    return similarity_sheets(shown, out, "evolution", {"random": "random weights"} | {kept[n]: f"step {n}" for n in sorted(kept)})


def draw_distribution(shown, out):
    """Fig. 3: similarities of a patch with all of V' and its Sharpe ratio (Eq. 6), for two patches; the map of the ratio over V.

    The two have the highest and the lowest ratio, to the last encoder, of all patches of tissue (of an organ, where there are
    labels) whose true partner is in V'. A query point takes their place.
    """
    scan, pair, usable, numbers = shown.scan, shown.pair, shown.pair["valid_"], []
    sharpe = lambda rows: losses.sharpe_ratio(rows[None], 2, usable[None])[0]
    ratio = {f: torch.cat([sharpe(rows) for rows in shown.similar(f)]).numpy() for f in shown.heads}
    if shown.cfg.query or shown.cfg.query_mm:
        chosen = {"query": int(np.ravel_multi_index(shown.cell(shown.queries[0][2]), shown.grid))}
    else:
        own = pair["tissue"] if shown.organs is None else pair["tissue"] & (shown.organs[0] > 0)      # a label may hold air
        fit = np.intersect1d(np.flatnonzero(own), pair["matches"][:, 0])
        if not len(fit):
            raise NoFigure("no patch of tissue (of an organ, where there are labels) has its partner in V' after the config's moves")
        last = ratio[list(shown.heads)[-1]][fit]
        chosen = {"highest ratio": int(fit[last.argmax()]), "lowest ratio": int(fit[last.argmin()])}
    figure = blank(9, 2.9 + 2.1 * len(ratio), f"Similarity of a patch of V with the {usable.sum()} patches of V', scan {scan.id}")
    axes = figure.subplots(1 + len(ratio), len(chosen), squeeze=False, height_ratios=[1.4] + [1] * len(ratio))
    image = scan.open()[0].astype(np.float32)
    grey = dict(zip(("vmin", "vmax"), np.percentile(image, [1, 99.5])), cmap="gray")
    for column, (which, t) in zip(axes.T, chosen.items()):
        organ = "" if shown.organs is None or not shown.organs[0][t] else f", {shown.name(shown.organs[0][t])}"
        draw_plane(column[0], shown, PLANES[0], shown.centres[t], image, grey)
        column[0].set_title(f"{which}{organ}, axial, z = {shown.centres[t][2]:.4g}")
        for axis, f in zip(column[1:], ratio):
            row, partners = next(shown.similar(f, [t]))[0], pair["matches"][pair["matches"][:, 0] == t][:, 1]
            numbers.append(dict(which=which, encoder=f, token=t, sharpe_ratio=ratio[f][t], true_partners=row[partners].numpy(),
                                similarities=row[usable].numpy().round(5)))
            draw_histogram(axis, row[usable].numpy(), numbers[-1], shown.heads[f])
        axis.set_xlabel("cosine similarity")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(out / "distribution.png")
    look = dict(cmap="viridis", vmin=min(r.min() for r in ratio.values()), vmax=max(r.max() for r in ratio.values()))
    columns = [(shown.heads[f], r.reshape(shown.grid), look, "Sharpe ratio, Eq. 6") for f, r in ratio.items()]
    plane_sheet(out / "distribution_map.png", shown, shown.centres[next(iter(chosen.values()))], columns,
                f"Sharpe ratio of every patch: high, one peak; low, many similar patches\nscan {scan.id}")
    shown.write(out / "distribution.json", H=pair["H"], chosen=numbers,
                sharpe_ratio={f: r.round(5).reshape(shown.grid) for f, r in ratio.items()})
    return [out / "distribution.png", out / "distribution_map.png"]


def draw_histogram(axes, values, number, heading):
    """Counts on a logarithmic axis, so that a peak of one patch is seen beside thousands."""
    true = number["true_partners"]
    axes.hist(values, np.linspace(-1, 1, 81), color="#0072B2", log=True)
    axes.axvline(values.mean(), color="0.2", linewidth=1.2, linestyle=":", label="mean")
    axes.axvline(values.max(), color="#D55E00", linewidth=1.4, label="largest")
    axes.plot(true, [0.62] * len(true), "^", color="#009E73", markersize=8, clip_on=False, label="true partner", zorder=5)
    axes.set(xlim=(-1, 1), ylim=(0.62, None), ylabel="patches")
    ratio = f"({values.max():.2f} {-values.mean():+.2f}) / {values.std():.2f} = {number['sharpe_ratio']:.2f}"
    axes.set_title(f"{heading}: Sharpe ratio {ratio}")


def draw_tsne(shown, out):
    """Fig. 4, 5: t-SNE (perplexity 24, as published) of tokens that show an organ, and every organ's silhouette (Euclidean, as
    published, and cosine), in the labelled scans."""
    manifold, cfg, numbers = _need("sklearn.manifold", "scikit-learn"), shown.cfg, {}
    labelled = [case for case in shown.cases if case["label"]]
    if not labelled:
        raise NoFigure("the scans have no labels; give probe_image and probe_label, or probe_datalist")
    scans = data.open_scans(shown.source, labelled)
    for f in shown.heads:
        x, y, n = organ_tokens(shown.encoder(f), scans, cfg, shown.device, 0.5)
        kept, organs = _thin(y, cfg.seed, cfg.figure_tokens), np.unique(y).tolist()
        if len(organs) < 2 or len(kept) <= 24:
            raise NoFigure(f"{len(kept)} tokens of {len(organs)} organs; more than 24 of two are needed (perplexity 24)")
        flat = manifold.TSNE(2, perplexity=24, init="pca", random_state=cfg.seed).fit_transform(x[kept])
        scores = {metric: silhouette(x, y, metric, cfg.seed, cfg.probe_limit) for metric in ("euclidean", "cosine")}
        numbers[f] = dict(points=flat.round(3), organ=y[kept], scan=n[kept], tokens={k: int((y == k).sum()) for k in organs},
                          silhouette={m: dict(mean=mean, mean_of_organs=metrics.mean(list(each.values())), organs=each)
                                      for m, (mean, each) in scores.items()})
    figure = blank(9, 9, f"Tokens of {shown.patch} voxels that show an organ, {len(scans)} scans; t-SNE, perplexity 24")
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    for axes, (f, number) in zip(above.subplots(1, len(numbers), squeeze=False)[0], numbers.items()):
        for k in organs:
            points = number["points"][number["organ"] == k]
            axes.scatter(*points.T, s=9, color=_colour(k), linewidths=0, label=f"{k} {shown.name(k)}")
            densest = cKDTree(points).query(points, range(1, min(10, len(points)) + 1))[0].mean(1).argmin()
            axes.text(*points[densest], k, weight="bold", ha="center", va="center", zorder=5,
                      bbox=dict(facecolor="white", alpha=0.75, linewidth=0, pad=0.8))
        means = ", ".join(f"{metric} {score['mean']:.3f}" for metric, score in number["silhouette"].items())
        axes.set(xticks=[], yticks=[], title=f"{shown.heads[f]}; silhouette of all tokens:\n{means}")
    above.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=3)
    width = 0.8 / len(numbers)
    for axes, metric in zip(below.subplots(2, 1, sharex=True), ("euclidean", "cosine")):
        for k, (f, number) in enumerate(numbers.items()):
            score = number["silhouette"][metric]
            values = [*score["organs"].values(), score["mean_of_organs"], score["mean"]]
            axes.bar(np.arange(len(values)) + (k + 0.5) * width - 0.4, values, 0.9 * width,
                     color=("0.6", *COLOURS[4:])[k % 11], label=shown.heads[f])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(len(organs) - 0.5, color="0.6", linewidth=0.8)
        axes.set_ylabel(f"silhouette, {metric}")
    names = [f"{shown.name(k)} ({count})" for k, count in number["tokens"].items()]
    axes.set_xticks(range(len(organs) + 2), [*names, "mean of organs", "all tokens"], rotation=35, ha="right")
    below.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.draw_without_rendering()                 # the layout of tick labels settles at the second pass
    figure.savefig(out / "tsne.png")
    run.write_json(out / "tsne.json", dict(scans=[s.id for s in scans], names={k: shown.name(k) for k in organs}, encoders=numbers))
    return [out / "tsne.png"]


def draw_pca(shown, out):
    """Fig. 6: first three principal components of a scan's tokens as red, green, blue, and the first alone; central slices."""
    columns, numbers = [], {}
    for f, heading in shown.heads.items():
        values, share = components(shown.tokens(f))
        low, high = np.percentile(values.reshape(-1, 3), [1, 99], axis=0)
        unit = f"{', '.join(f'{s:.0%}' for s in share)}\nof the variance"
        columns.append((f"{heading}\nfirst three as RGB", np.clip((values - low) / (high - low), 0, 1), {}, unit))
        look = dict(cmap="cividis", vmin=low[0], vmax=high[0])
        columns.append((f"{heading}\nfirst alone", values[..., 0], look, "component 1"))
        numbers[f] = dict(share_of_variance=share, components=values.round(5))
    middle = (np.array(shown.grid) // 2 + 0.5) * shown.patch - 0.5
    plane_sheet(out / "pca.png", shown, middle, columns, f"Principal components of the tokens\nscan {shown.scan.id}", mark=False)
    shown.write(out / "pca.json", encoders=numbers)
    return [out / "pca.png"]


def draw_correspondence(shown, out):
    """V, V' and lines between the centres of matched patches: above the true ones (Eq. 2-3), below each encoder's most similar.

    V is cut at the layer of patches with most matches. V' is shown on the surface to which H sends that plane, seen along z: so
    the same tissue lies under both ends of a true line, and where H, warp and the matches disagree, it does not.
    """
    scan, pair, centres, numbers = shown.scan, shown.pair, shown.centres, {}
    everyone, first = np.unique(pair["matches"][:, 0], return_index=True)
    i, j = pair["matches"][first][pair["tissue"][everyone]].T
    back = np.linalg.inv(pair["H"])
    if not len(i) or abs(back[2, 2]) < 0.3:
        raise NoFigure("the config's moves leave no match of tissue, or put the axial plane on edge; try another seed or less rotation")
    layers, counts = np.unique(centres[i, 2], return_counts=True)
    layer = layers[counts.argmax()]
    i, j = i[centres[i, 2] == layer], j[centres[i, 2] == layer]
    few = np.linspace(len(i) - 1, 0, min(10, len(i))).astype(int)          # tokens are ordered by x: spread from left to right
    i, j = i[few], j[few]
    rows = [("true partners (Eq. 2-3); dotted: the patch of V as H moves it", j, None)]
    for f, heading in shown.heads.items():
        nearest = [block.masked_fill(~pair["valid_"], -2).argmax(1) for block in shown.similar(f, everyone)]
        guess = dict(zip(everyone.tolist(), torch.cat(nearest).tolist()))
        right = {a for a, b in pair["matches"].tolist() if guess[a] == b}
        numbers[f] = dict(predicted=[guess[a] for a in i.tolist()], right=len(right), matched=len(everyone))
        text = f"most similar, {heading}: {len(right)} of all {len(everyone)} matched patches right"
        rows.append((f"{text} (dashed: wrong, by so many mm)", numbers[f]["predicted"], [a in right for a in i.tolist()]))
    cuts = [surface(pair[name][0].numpy(), G, layer) for name, G in (("V", np.eye(4)), ("V'", back))]
    tall = min(4.2 * scan.shape[1] * scan.spacing[1] / (scan.shape[0] * scan.spacing[0]), 3.6)     # inches
    title = f"Patches of {shown.patch} voxels, scan {scan.id}: V (left, axial, z = {layer:.4g}) and V' (right)"
    figure = blank(9, 0.4 + (tall + 0.3) * len(rows), title)
    for part, (heading, partner, right) in zip(figure.subfigures(len(rows), 1), rows):
        part.suptitle(heading, fontsize=9)
        both = part.subplots(1, 2, gridspec_kw=dict(wspace=0.1))
        for axes, cut in zip(both, cuts):
            low, high = np.percentile(cut, [1, 99.5])
            axes.imshow(cut, cmap="gray", origin="lower", interpolation="bilinear", vmin=low, vmax=high)
            axes.set(xlim=(-0.5, scan.shape[0] - 0.5), ylim=(-0.5, scan.shape[1] - 0.5), xticks=[], yticks=[])
            axes.set_aspect(scan.spacing[1] / scan.spacing[0])
            _letters(axes, PLANES[0][4])
        draw_lines(part, both, shown, centres[i], centres[partner], centres[j], right)
    figure.savefig(out / "correspondence.png")
    shown.write(out / "correspondence.json", H=pair["H"], i=i, true=j, encoders=numbers)
    return [out / "correspondence.png"]


def surface(volume, G, z):
    """Picture (up, across), the patient's right on the left, of `volume` (x, y, z) where G (4, 4) sends it into the plane `z`."""
    x, y = np.meshgrid(*map(np.arange, volume.shape[:2]), indexing="ij")
    height = (z - G[2, 3] - G[2, 0] * x - G[2, 1] * y) / G[2, 2]
    return rearrange(ndimage.map_coordinates(volume, [x, y, height], order=1, cval=float(volume.min())), "x y -> y x")[:, ::-1]


def draw_lines(figure, both, shown, start, end, true, right):
    """Numbered patches in V and V' with lines between. right None: the true ones, with the outline to which H moves the patch;
    else those that are not right are dashed, with their distance from the true partner."""
    from matplotlib.patches import ConnectionPatch, Polygon, Rectangle
    from matplotlib.patheffects import withStroke
    p, H, flip, text = shown.patch, shown.pair["H"], shown.scan.shape[0] - 1, dict(path_effects=[withStroke(linewidth=2.2, foreground="black")])
    corners = np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)]) * p / 2
    bright = [c for c in COLOURS if c not in ("#0072B2", "#882255", "#332288", "#999933")]     # ten that show on black
    for n, (a, b, t) in enumerate(zip(start, end, true)):
        fine = right is None or right[n]
        colour = bright[n] if right is None else "#56B4E9" if fine else "#E69F00"
        ends = [(flip - c[0], c[1]) for c in (a, b)]
        for axes, (x, y) in zip(both, ends):
            axes.add_patch(Rectangle((x - p / 2, y - p / 2), p, p, fill=False, edgecolor=colour, linewidth=1.4, clip_on=False))
            axes.text(x - 0.4 * p, y + 0.4 * p, n + 1, color=colour, size=8, ha="left", va="top", weight="bold", **text)
        figure.add_artist(ConnectionPatch(*ends, "data", "data", axesA=both[0], axesB=both[1], color=colour, linewidth=1.1,
                                          linestyle="-" if fine else "--"))
        if right is None:
            moved = ((a + corners) @ H[:3, :3].T + H[:3, 3])[:, :2] * (-1, 1) + (flip, 0)
            both[1].add_patch(Polygon(moved, fill=False, edgecolor="white", linewidth=1, linestyle=":"))
        if not fine:
            off = np.linalg.norm((b - t) * shown.scan.spacing)
            axes.text(x, y - 0.6 * p, f"{off:.0f} mm", color=colour, size=7, ha="center", va="top", clip_on=True, **text)


def draw_curves(shown, out):
    """What log.jsonl tells: of a pre-training losses, matching accuracy, feature spread and learning rate; of a fine-tuning loss,
    validation, learning rate and gradient norm."""
    path = Path(shown.cfg.runs) / shown.cfg.name / "log.jsonl"
    if not path.exists():
        raise NoFigure(f"{path}: no such log")
    lines = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]     # the last may be half
    panels = [("losses", "loss", {"loss": "sum", "global": "L_g", "p2p": "L_p2p", "p2s": "L_p2s"}),
              ("matching accuracy", "share of matched tokens", {"accuracy": ""}),
              ("feature spread", "0 collapsed, 1 apart", {"spread": ""}),
              ("validation", next((line["metric"] for line in lines if "metric" in line), ""), {"val": ""}),
              ("learning rate", "learning rate", {"lr": ""}), ("gradient norm", "gradient norm", {"grad_norm": ""})]
    curves = {key: [[line[k] for line in lines if key in line] for k in ("step", key)]
              for _, _, keys in panels for key in keys if any(key in line for line in lines)}
    if not curves:
        raise NoFigure(f"{path} holds no logged step")
    figure = blank(9, 6, f"{shown.cfg.name}, {lines[-1]['step']} steps")
    for axes, (title, unit, keys) in zip(figure.subplots(2, 2).flat, [panel for panel in panels if set(panel[2]) & set(curves)]):
        for (key, text), colour, dash in zip(keys.items(), ("black", "#E69F00", "#0072B2", "#D55E00"), ("-", "--", "-", "-.")):
            if key in curves:
                axes.plot(*curves[key], color=colour, linestyle=dash, marker="." if len(curves[key][0]) < 40 else "", linewidth=1.6, label=text)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(color="0.9")
        if "p2p" in keys and "p2p" in curves:
            axes.legend(ncols=4, loc="upper center")
        if title != "validation":
            axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    figure.savefig(out / "curves.png")
    run.write_json(out / "curves.json", dict(log=str(path), curves=curves))
    return [out / "curves.png"]


FIGURES = {"similarity": draw_similarity, "distribution": draw_distribution, "tsne": draw_tsne, "pca": draw_pca,
           "correspondence": draw_correspondence, "evolution": draw_evolution, "curves": draw_curves}


def figures(cfg, device):
    """The pictures that cfg.figures names, below <out>/figures. What cannot be made: left out of "all", an error by name."""
    asked = [name.strip() for name in (cfg.figures.split(",") if isinstance(cfg.figures, str) else cfg.figures)]
    unknown = [name for name in asked if name not in (*FIGURES, "all")]
    if unknown:
        raise SystemExit(f"figures: no {unknown[0]!r}; there are: all, {', '.join(FIGURES)}")
    if cfg.token_patch not in (2, 4, 8, 16, 32):
        raise SystemExit(f"token_patch = {cfg.token_patch}, expected 2, 4, 8, 16 or 32")
    shown, out = Shown(cfg, device), Path(cfg.out or Path(cfg.runs) / cfg.name) / "figures"
    out.mkdir(parents=True, exist_ok=True)
    with _need("matplotlib", "matplotlib").rc_context(STYLE):
        for name in FIGURES if "all" in asked else asked:
            try:
                print(f"{name}: {', '.join(map(str, FIGURES[name](shown, out)))}")
            except NoFigure as reason:
                if "all" not in asked:
                    raise SystemExit(f"{name}: {reason}") from None
                print(f"{name}: left out, {reason}")


@dataclasses.dataclass
class Study:
    """The keys of python evaluate.py configs/study.py --study."""
    study: bool = False
    name: str = "study"
    runs: str = "runs"
    data: str = "data"
    cache: str = "cache"
    workers: int = 1                # of each process
    rows: dict = dataclasses.field(default_factory=dict)            # {row: keys of pretrain.py, or None: not pre-trained}
    seeds: tuple = ()               # of every row, e.g. (0, 1, 2)
    jobs: int = 1                   # processes at a time
    shot_rows: tuple = ()           # rows that are fine-tuned with few labels
    shots: tuple = ()               # labelled scans, e.g. (1, 2, 4, 8)
    labelled: int = 20              # training subjects of the fine-tuning config
    pretrain_config: str = ""
    finetune_config: str = ""
    pretrain_keys: dict = dataclasses.field(default_factory=dict)   # for all rows alike
    probe_keys: dict = dataclasses.field(default_factory=dict)      # .. of evaluate.py --probe alone; the others it shares with pretrain.py
    finetune_keys: dict = dataclasses.field(default_factory=dict)


def study(cfg):
    """Pre-train every row of cfg.rows with every seed, probe it, fine-tune it with few labels; print and store one table.

    Each run is the ordinary command in a process of its own, so that a row can be repeated by hand; what is complete is not run
    again. cfg.jobs processes run at a time, dealt out to the GPUs if there are any, else sharing the cores.
    """
    lost = [row for row in cfg.shot_rows if row not in cfg.rows]
    if lost or not cfg.rows or not cfg.seeds:
        raise SystemExit(f"the study needs `seeds`, `rows`, and shot_rows among them; found seeds {cfg.seeds}, "
                         f"rows {', '.join(cfg.rows) or 'none'}, shot_rows {cfg.shot_rows}")
    check_shots(cfg)
    jobs = [(row, seed) for seed in cfg.seeds for row in cfg.rows]      # every row once before any row twice
    with ThreadPoolExecutor(cfg.jobs) as pool:
        outcomes = list(pool.map(lambda k: study_run(*jobs[k], k % cfg.jobs, cfg), range(len(jobs))))
    results = {f"{row}-{seed}": outcome for (row, seed), outcome in zip(jobs, outcomes)}
    text = study_table(results, cfg)
    out = Path(cfg.runs) / cfg.name
    run.write_json(out / "study.json", dict(results=results, config=dataclasses.asdict(cfg), **run.versions()))
    (out / "study.md").write_text(text + "\n")
    print(text)


def check_shots(cfg):
    """Exit unless the fine-tuning config has cfg.labelled training subjects, of which the shots are shares."""
    if not cfg.shots:
        return
    if not all(0 < n <= cfg.labelled for n in cfg.shots):
        raise SystemExit(f"shots = {cfg.shots}: expected 1 to {cfg.labelled} (labelled)")
    fields = {field.name for field in dataclasses.fields(tasks.Config)}
    keys = {k: v for k, v in cfg.finetune_keys.items() if k in fields} | dict(data=cfg.data, label_fraction=1.0)
    cases = tasks.split_cases(configs.load(tasks.Config, [cfg.finetune_config, *[f"--{k}={v}" for k, v in keys.items()]], foreign=True))
    subjects = {case["subject"] for case in cases["train"]}
    if len(subjects) != cfg.labelled:
        raise SystemExit(f"labelled = {cfg.labelled}, but {cfg.finetune_config} with finetune_keys trains on {len(subjects)} subjects "
                         f"({', '.join(sorted(subjects)[:3])}, ..)")


def study_run(row, seed, slot, cfg):
    """One row with one seed -> {part: {"value": .., "minutes": .., "commands": ..}}, also in outcome.json of its run folder.

    The parts are "probe" (its results) and every number of labelled scans (mean Dice of the test scans, preprocessed grid).
    """
    runs, here, name = Path(cfg.runs) / cfg.name, Path(__file__).resolve().parent, f"{row}-{seed}"
    done, gpus = runs / name / "outcome.json", torch.cuda.device_count()
    outcome = json.loads(done.read_text()) if done.exists() else {}
    cores = max(1, (os.cpu_count() or 1) // cfg.jobs)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {"OMP_NUM_THREADS": str(cores)})
    same = dict(runs=runs, seed=seed, data=cfg.data, cache=cfg.cache, workers=cfg.workers)
    known = {field.name for field in dataclasses.fields(tasks.Config)}        # evaluate.py takes no key of the optimisation
    overrides, encoder = cfg.rows[row], runs / name / "encoder.pt"

    def part(key, value, *commands):
        """Run the commands of a part that is not complete, and keep value()."""
        lines = [[sys.executable, str(here / script), str(config), *[f"--{k}={v}" for k, v in keys.items()]] for script, config, keys in commands]
        if outcome.get(key, {}).get("commands") == lines:
            return
        began = time.time()
        for line in lines:
            with open(done.with_name("out.log"), "a") as log:
                log.write(" ".join(line) + "\n")
                log.flush()
                if subprocess.run(line, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode:
                    raise SystemExit(f"{' '.join(line)}\nfailed, see {done.with_name('out.log')}")
        outcome[key] = dict(value=value(), minutes=(time.time() - began) / 60, commands=lines)
        run.write_json(done, outcome)
        print(f"{name}, {key}: {outcome[key]['minutes']:.1f} min", flush=True)

    done.parent.mkdir(parents=True, exist_ok=True)
    keys = cfg.pretrain_keys | (overrides or {})
    network = {k: v for k, v in keys.items() if k in inspect.signature(Swin3D).parameters}
    shared = {k: v for k, v in cfg.pretrain_keys.items() if k in known}     # not the row's: all are probed by the same moves and tokens
    probing = same | shared | cfg.probe_keys | network
    probing |= dict(name=name, out=runs / name, probe=True, probe_random=overrides is None)
    probed = lambda: next(iter(json.loads((runs / name / "probe.json").read_text())["probe"].values()))
    if overrides is None:                                               # this row is not pre-trained
        part("probe", probed, ("evaluate.py", cfg.pretrain_config, probing | dict(checkpoint="random")))
    else:
        part("probe", probed, ("pretrain.py", cfg.pretrain_config, same | keys | dict(name=name)),
             ("evaluate.py", cfg.pretrain_config, probing | dict(checkpoint=encoder)))
    for shots in cfg.shots if row in cfg.shot_rows else ():
        tuned = f"{name}-{shots}"
        keys = same | cfg.finetune_keys | dict(name=tuned, label_fraction=shots / cfg.labelled)
        scoring = {k: v for k, v in keys.items() if k in known} | dict(sheets=0, predictions=False, hd95=False)
        scored = lambda: next(iter(json.loads((runs / tuned / "results.json").read_text())["results"].values()))
        part(str(shots), lambda: scored()["summary"]["preprocessed"]["dice"]["mean"]["mean"],
             ("finetune.py", cfg.finetune_config, keys | ({} if overrides is None else dict(init=encoder))),
             ("evaluate.py", cfg.finetune_config, scoring))
    return outcome


def study_table(results, cfg):
    """A row of markdown per row of the study: mean over the seeds, and every seed in their order."""
    def cell(values):
        values = [float(v) for v in values]                             # absent: this row was not fine-tuned
        return f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})" if values else "-"
    columns = {"linear probe": lambda p: p["linear"]["balanced_accuracy"], "k-NN": lambda p: p["knn"]["balanced_accuracy"],
               "silhouette (cosine)": lambda p: p["silhouette_cosine"][0], "effective rank": lambda p: p["effective_rank"],
               "found again": lambda p: p["correspondence"]}
    heads = ["row", *columns, *[f"Dice, {n} labelled" for n in cfg.shots]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in cfg.rows:
        found = [results[f"{row}-{seed}"] for seed in cfg.seeds]
        cells = [cell([column(f["probe"]["value"]) for f in found]) for column in columns.values()]
        cells += [cell([f[str(n)]["value"] for f in found if str(n) in f]) for n in cfg.shots]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    minutes = sum(part["minutes"] for outcome in results.values() for part in outcome.values())
    return "\n".join(lines) + f"\n\nMean (seeds {', '.join(map(str, cfg.seeds))}); {minutes:.0f} minutes of processes, {cfg.jobs} at a time."


# ---------------------------------------------------------------------------------------------------------------------
# program


def inference_scans(cfg):
    """Scans without labels: cfg.images is a glob pattern (a tuple: a pattern with {id} per channel)."""
    patterns = data._tuple(cfg.images)
    base = Path(re.split(r"[{*?\[]", patterns[0])[0])
    base = base if patterns[0].startswith(f"{base}/") or base.is_dir() else base.parent
    inside = [os.path.relpath(p, base) + "/" * p.endswith("/") for p in patterns]     # "/": folders of slices
    several = dict(image=tuple(inside), scans=()) if len(patterns) > 1 else dict(scans=(inside[0],), image=())
    source = dataclasses.replace(cfg, datalist="", label="", target=(), exclude=(), **several)
    return tasks.check_channels(data.open_scans(source, data.find_cases(source, base=base)), cfg)


def main(argv):
    if any(arg.startswith("--study") for arg in argv):
        return study(configs.load(Study, argv))
    studies = [arg for arg in argv if Path(arg).is_file() and "rows" in runpy.run_path(arg)]
    if studies:
        raise SystemExit(f"{studies[0]} holds the rows of a study; run it with --study")
    cfg = configs.load(tasks.Config, argv, foreign=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(cfg.out or Path(cfg.runs) / cfg.name)
    if cfg.probe:
        results = probe(cfg, device)
        run.write_json(out / "probe.json", dict(probe=results, config=dataclasses.asdict(cfg), **run.versions()))
        return
    if cfg.figures:
        return figures(cfg, device)
    tasks.check(cfg)
    files = list(data._tuple(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "best.pt")]
    lost = [file for file in files if not Path(file).is_file()]
    if lost:
        raise SystemExit(f"{lost[0]}: no such checkpoint; train it with finetune.py, or give --checkpoint=FILE")
    networks = {file: restore(file, cfg, device) for file in files}
    if cfg.images:
        (out / "probabilities.csv").unlink(missing_ok=True)             # of an earlier run: deliver appends
        for scan in inference_scans(cfg):
            ready = tasks.predict(list(networks.values()), scan, cfg, device)
            deliver(out, scan, ready, cfg)
            print(f"{scan.id}: {out}")
        return
    scans = tasks.check_channels(data.open_scans(cfg, tasks.split_cases(cfg)[cfg.part]), cfg)
    check_unseen(files, scans, cfg)
    teams = {"ensemble of " + ", ".join(files): list(networks.values())} if cfg.ensemble else {f: [n] for f, n in networks.items()}
    results = {}
    for k, (name, team) in enumerate(teams.items()):
        folder = out / "predictions" if len(teams) == 1 else out / f"predictions_{k}"
        (folder / "probabilities.csv").unlink(missing_ok=True)
        sheets = iter(range(cfg.sheets))
        rows = tasks.score_cases(team, scans, cfg, device, full=True, after=lambda scan, ready: deliver(folder, scan, ready, cfg, next(sheets, None)))
        results[name] = dict(rows=rows, summary=tasks.summarise(rows, cfg))
    for name, result in results.items():
        for row in result["rows"] if cfg.task != "classification" else []:
            print(f"{row['id']}  " + "  ".join(f"{grid} {metric} {cell(parts.get('mean', parts.get('whole')), metric)}"
                                                for grid, scored in row["scores"].items() for metric, parts in scored.items()
                                                if "mean" in parts or "whole" in parts))
    same = " (the cases that chose the checkpoint)" if cfg.part == "test" and cfg.test == "val" or cfg.part == "val" else ""
    print(f"\n{cfg.name}: {len(scans)} {cfg.part} cases{same}\n\n" + result_tables(results, cfg))
    if len(results) > 1:
        print("\n" + compare(results, cfg))
    run.write_json(out / "results.json", dict(results=results, part=cfg.part + same, config=dataclasses.asdict(cfg), **run.versions()))
    print(f"\n{out / 'results.json'}")


def deliver(folder, scan, ready, cfg, sheet=None):
    """Files of one case: NIfTI, or a line of a csv for classes, and a contact sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.task == "classification":
        path = folder / "probabilities.csv"
        fresh = not path.exists()
        with open(path, "a") as file:
            if fresh:
                file.write("id," + ",".join(tasks.class_names(cfg)) + "\n")
            file.write(f"{scan.id}," + ",".join(f"{float(p):.6f}" for p in ready) + "\n")
        return
    if cfg.predictions:
        write_prediction(folder, scan, ready, cfg)
    if sheet is not None:
        draw_case(folder / f"{scan.id}.png", scan, ready, cfg)


def draw_case(path, scan, ready, cfg):
    image = scan.open()[0].astype(np.float32)
    if cfg.task == "segmentation":
        truth = torch.from_numpy(scan.open("label")[0].astype(np.int64))
        ids, truth = (painted(tasks.masks_of(each, cfg), cfg).numpy() for each in (ready, truth))
        contact_sheet(path, image, truth, ids, scan.spacing, scan.id, names={k: str(cfg.labels.get(k, k)) for k in cfg.labels})
    else:
        image_sheet(path, image, scan.open("target")[0].astype(np.float32), ready[0].numpy(), scan.spacing, scan.id)


if __name__ == "__main__":
    main(sys.argv[1:])
