"""Stage 3: score a network as the field does.

    python evaluate.py configs/btcv.py --name=btcv                  scores, predictions, contact sheets
    python evaluate.py configs/btcv.py --name=btcv --images="scans/*.nii.gz" --out=there    without labels

Axis letters: k class, x y z voxels (RAS+: to the patient's right, front and head).
matplotlib is needed by pictures alone and imported there.
"""
import dataclasses
import fnmatch
import gzip
import importlib
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from einops import rearrange
from scipy import ndimage

import configs
import data
import metrics
import run
import tasks
from model import load_weights, read_file


@dataclasses.dataclass
class Config(tasks.Config):
    """What scoring adds to the task's own keys."""
    checkpoint: str | tuple = ()    # default runs/<name>/best.pt; several are compared
    part: str = "test"              # which part of the split is scored; of train, val: results_val.json, ..
    hd95: bool = True               # 95 % Hausdorff distance, mm
    lesion_volumes: bool = False    # false positive and false negative volume (AutoPET)
    predictions: bool = True        # write NIfTI files
    sheets: int = 4                 # contact sheets of the first cases
    images: str | tuple = ()        # scans without labels to predict (one pattern a channel), not to score
    out: str = ""                   # folder of predictions and results, default runs/<name>
    # {row: {column: value}} printed under ours, marked as the paper's
    paper: dict = dataclasses.field(default_factory=dict)


def need(module, package):
    """A module that only some commands use."""
    try:
        return importlib.import_module(module)
    except ImportError:
        text = f"{package} is not installed, and this command needs it: pip install {package}"
        raise ImportError(text) from None


# -------------------------------------------------------------------------------------------------- pictures

# The first seven are Okabe and Ito's (2008), told apart by all kinds of colour vision; fourteen cannot all
# be, and later ones repeat, so every class also carries its number in the picture.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
           "#44AA99", "#882255", "#DDCC77", "#332288", "#999933", "#99DDFF", "#EE8866")

# name, axis that is cut, axes across and up, letters at the left, right, lower and upper edge
PLANES = (("axial", 2, 0, 1, "RLPA"), ("coronal", 1, 0, 2, "RLIS"), ("sagittal", 0, 1, 2, "APIS"))


def contact_sheet(path, image, truth, prediction, spacing, title, names):
    """One PNG per case: three planes through the largest object; above the scan alone, below with both on it.

    image  (x, y, z) RAS+;   truth, prediction  (x, y, z) ids, 0 background; truth None: not known
    spacing  (3,) mm
    title  one line: case, scores;   names  {id: name} for the legend

    Filled: prediction.  Outlined in the same colour: truth.  So a fill without a line is false positive, a
    line without a fill false negative.  Radiological display: the patient's right on the left of the axial
    and coronal picture, axial seen from the feet; sagittal with the front on the left.  All at one scale in
    mm; grey values from the 1st to the 99th percentile of what is shown.
    """
    Figure = need("matplotlib.figure", "matplotlib").Figure         # not pyplot: no display, no global state
    known, truth = truth is not None, prediction * 0 if truth is None else truth
    image, truth, prediction = (np.asarray(a) for a in (image, truth, prediction))
    if not image.shape == truth.shape == prediction.shape or image.ndim != 3:
        found = f"{image.shape}, {truth.shape}, {prediction.shape}"
        raise ValueError(f"contact_sheet: expected one shape (x, y, z), found {found}")
    centre = centre_of_largest(truth, prediction)
    cuts = [slice_through(plane, centre, image, truth, prediction) for plane in PLANES]
    low, high = np.percentile(np.concatenate([grey.ravel() for grey, _, _ in cuts]), [1, 99])
    shown = sorted({int(c) for _, *ids in cuts for c in np.unique(ids)} - {0})

    across, up = ([spacing[plane[i]] * image.shape[plane[i]] for plane in PLANES] for i in (2, 3))       # mm
    width, gap, heading, legend = 11.0, 0.15, 0.75, 0.45 + 0.22 * -(-(len(shown) + 2) // 6)          # inches
    scale = (width - 4 * gap) / sum(across)                         # inches per mm, the same everywhere
    height = heading + 2 * (max(up) * scale + gap) + legend
    figure = Figure((width, height), facecolor="white")
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=12)
    for column, ((name, cut, _, _, letters), (grey, true, predicted)) in enumerate(zip(PLANES, cuts)):
        for row in range(2):
            left = gap + column * gap + sum(across[:column]) * scale
            top = height - heading - row * (max(up) * scale + gap)
            w, h = across[column] * scale, up[column] * scale
            axes = figure.add_axes((left / width, (top - h) / height, w / width, h / height))
            axes.imshow(grey, "gray", aspect="auto", interpolation="bilinear", vmin=low, vmax=high,
                        origin="lower")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(f"{name}, {'xyz'[cut]} = {centre[cut]} of {image.shape[cut]}", fontsize=10)
            else:
                _overlay(axes, true, predicted, shown)
            draw_letters(axes, letters)
    line = "line: truth" if truth.any() else "line: truth (empty)"
    _legend(figure, shown, names, line if known else "truth: not known", prediction.any())
    figure.text(0.5, 0.08 / height, f"grey values {low:.4g} to {high:.4g}", ha="center", fontsize=8)
    figure.savefig(path, dpi=120)


def image_sheet(path, source, truth, prediction, spacing, title):
    """Three planes (x, y, z) through the middle of input, target, prediction and their difference.

    One scale for input, one for target and prediction; difference: blue too low, white equal, red too high.
    """
    figure = need("matplotlib.figure", "matplotlib").Figure((11, 9), facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12)
    error, grey = prediction - truth, np.percentile(truth, [0.5, 99.8])
    reach = max(float(np.percentile(np.abs(error), 99.8)), 1e-6)
    columns = (("input", source, "gray", np.percentile(source, [0.5, 99.8])),
               ("target", truth, "gray", grey), ("prediction", prediction, "gray", grey),
               ("prediction - target", error, "RdBu_r", (-reach, reach)))
    for k, (row, plane) in enumerate(zip(figure.subplots(3, 4), PLANES)):
        for axes, (name, volume, colours, (low, high)) in zip(row, columns):
            picture = slice_through(plane, [s // 2 for s in truth.shape], volume)[0]
            drawn = axes.imshow(picture, colours, aspect=spacing[plane[3]] / spacing[plane[2]],
                                interpolation="bilinear", vmin=low, vmax=high, origin="lower")
            axes.set_axis_off()
            axes.set_title(f"{name}, {plane[0]}" if k == 0 else plane[0], fontsize=9)
            draw_letters(axes, plane[4])
            if k == 2:
                figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.8)
    figure.savefig(path, dpi=110)


def centre_of_largest(truth, prediction):
    """Voxel (3,): per axis the plane where the largest connected part of the largest class has most voxels.

    Of the truth, or of the prediction where the truth is empty; the middle where both are.
    """
    ids = truth if truth.any() else prediction
    if not ids.any():
        return [s // 2 for s in ids.shape]
    parts, _ = ndimage.label(ids == np.bincount(ids[ids > 0].astype(np.int64)).argmax())
    largest = np.argwhere(parts == np.bincount(parts[parts > 0]).argmax())
    return [int(np.bincount(places).argmax()) for places in largest.T]


def slice_through(plane, centre, *volumes):
    """The volumes' slices as (up, across) pictures, across turned: R, or the front, comes on the left."""
    cut = plane[1]
    return [rearrange(np.take(v, centre[cut], cut), "across up -> up across")[:, ::-1] for v in volumes]


def draw_letters(axes, letters):
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
              (0.5, 0.02, "center", "bottom"), (0.5, 0.98, "center", "top"))
    for letter, (x, y, horizontal, vertical) in zip(letters, places):
        axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white",
                  fontsize=10, bbox=dict(facecolor="black", alpha=0.5, linewidth=0, pad=1.5))


def colour_of(c):
    return COLOURS[(c - 1) % len(COLOURS)]


def _overlay(axes, true, predicted, shown):
    """Prediction filled, truth outlined along the voxels' edges, the id where a class is thickest."""
    from matplotlib.colors import to_rgba
    from matplotlib.patheffects import withStroke
    fill, fine = np.zeros((*true.shape, 4)), 4                      # 4 points a voxel make the outline square
    up, across = ((np.arange(n * fine + 2) - 0.5) / fine - 0.5 for n in true.shape)
    for c in shown:
        seen = true == c
        fill[predicted == c] = to_rgba(colour_of(c), 0.45)
        if seen.any():
            mask = np.pad(seen.repeat(fine, 0).repeat(fine, 1), 1)
            axes.contour(across, up, mask, [0.5], colors=[colour_of(c)], linewidths=1.6)
        else:
            seen = predicted == c
        if seen.any() and len(shown) > 1:
            depth = ndimage.distance_transform_edt(np.pad(seen, 1))[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            axes.text(x, y, c, color="white", fontsize=8, ha="center", va="center", weight="bold",
                      clip_on=True, path_effects=[withStroke(linewidth=2, foreground="black")])
    axes.imshow(fill, aspect="auto", interpolation="nearest", origin="lower")
    axes.set(xlim=(-0.5, true.shape[1] - 0.5), ylim=(-0.5, true.shape[0] - 0.5))


def _legend(figure, shown, names, line, has_prediction):
    """Number and name of every class in sight, and what fill and line mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    fill = "fill: prediction" if has_prediction else "fill: prediction (empty)"
    handles = [Patch(facecolor=colour_of(c), label=f"{c} {names[c]}") for c in shown]
    handles += [Patch(facecolor="0.7", label=fill), Line2D([], [], color="0.3", label=line)]
    figure.legend(handles=handles, loc="lower center", ncols=6, fontsize=9, frameon=False,
                  bbox_to_anchor=(0.5, 0.22 / figure.get_figheight()))


# ------------------------------------------------------------------------------------------- files of a case

def write_case(folder, k, scan, ready, cfg):
    """The prediction of case k: NIfTI, or a line of probabilities.csv, which case 0 begins anew."""
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.task == "classification":
        with open(folder / "probabilities.csv", "a" if k else "w") as file:
            if k == 0:
                print("id", *tasks.class_names(cfg), sep=",", file=file)
            print(scan.id, *[f"{float(p):.6f}" for p in ready], sep=",", file=file)
    elif cfg.predictions:
        write_prediction(folder, scan, ready, cfg)


def write_prediction(folder, scan, ready, cfg):
    """The prediction as NIfTI: affine, shape and axes of the first image, so that viewers lay it over that.

    Ids in the smallest type that holds them; images in the unit of the file where the scaling can be undone.
    The header of a NIfTI source is kept, its affine codes above all.
    """
    path = scan.case["images"][0]
    stored, affine = data.read_stored(path)
    if cfg.task == "segmentation":
        arrays = [tasks.painted(tasks.on_scan(ready, scan, affine, stored.shape, cfg), cfg)]
    else:
        slope, offset = tasks.file_unit(scan.case, cfg)
        ready = ready * slope + offset
        arrays = [tasks.to_original(channel, scan.affine, affine, stored.shape, 1, fill=float(channel.min()))
                  for channel in ready]
    header = nib.load(path).header if path.endswith((".nii", ".nii.gz")) else None
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    folder.mkdir(parents=True, exist_ok=True)
    for k, array in enumerate(arrays):
        image = kind(array.numpy(), affine, header)                 # which copies the header
        image.set_data_dtype(image.dataobj.dtype)
        image.header["descrip"], image.header["cal_min"], image.header["cal_max"] = b"", 0, 0
        image.header.set_slope_inter(1, 0)
        image.header.set_xyzt_units("mm")                           # as the affine is
        name = f"{scan.id}_{k}.nii.gz" if len(arrays) > 1 else f"{scan.id}.nii.gz"
        with configs.replacing(folder / name) as aside:
            aside.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


def draw_case(path, scan, ready, cfg):
    """The contact sheet of a case on the preprocessed grid."""
    image = scan.open()[0].astype(np.float32)
    if cfg.task == "segmentation":
        ids, truth = tasks.painted(tasks.masks_of(ready, cfg), cfg).numpy(), None
        if scan.case["label"]:
            known = torch.from_numpy(scan.open("label")[0].astype(np.int64))
            truth = tasks.painted(tasks.masks_of(known, cfg), cfg).numpy()
        contact_sheet(path, image, truth, ids, scan.spacing, scan.id, cfg.labels)
    else:
        target = scan.open("target")[0].astype(np.float32)
        image_sheet(path, image, target, ready[0].numpy(), scan.spacing, scan.id)


# ---------------------------------------------------------------------------------------------------- tables

PERCENT = ("dice", "dice_of_positive", "accuracy", "balanced_accuracy", "majority_accuracy", "recall", "auc",
           "auc_mean")
NOTES = {
    "dice": "%, mean over cases; a class absent from truth and prediction is left out; "
            "`mean`: per case over its classes",
    "mae": "lower is better; of images as the network has them, clipped to `window` and at `spacing`; in the "
           "unit of the file, or in standard deviations where they are z-scored",
    "hd95": "mm, lower is better; cases where one of the two masks is empty are left out and "
            "counted as missed"}


def text_of(value, metric):
    """A number as tables show it: shares in per cent; "-" where there is none."""
    if value is None or np.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if metric in PERCENT else f"{value:.4g}"


def text_table(rows):
    """Aligned columns; the first row is the head."""
    names, *columns = [[str(cell) for cell in column] for column in zip(*rows)]
    padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(row) for row in zip([name.ljust(max(map(len, names))) for name in names], *padded)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def result_tables(results, cfg):
    """Text of everything scored: a table per grid and metric, a row per checkpoint, the paper's below."""
    text, first = [], next(iter(results.values()))["summary"]
    for grid, metric in [(grid, metric) for grid in first for metric in first[grid]]:
        found = {name: result["summary"][grid][metric] for name, result in results.items()}
        if metric == "confusion":
            names = ", ".join(tasks.class_names(cfg))
            text += [f"confusion of {name} (rows: truth, columns: prediction; {names}): {counts}"
                     for name, counts in found.items()]
            continue
        columns = list(first[grid][metric])
        rows = [[f"{metric}, scans" if grid == "scans" else f"{metric}, {grid} grid", *columns]]
        for name, parts in found.items():
            rows.append([name, *[text_of(parts[c]["mean"], metric) for c in columns]])
            spans = ["..".join(text_of(parts[c][end], metric) for end in ("low", "high") if end in parts[c])
                     for c in columns]
            if set(spans) - {"", "-..-"}:                           # no interval: of one case, or of an AUC
                rows.append(["  95 %", *spans])
            missed = [parts[c].get("missed", 0) for c in columns]
            if metric == "hd95" and any(missed):
                rows.append(["  missed, cases", *[str(n) if n else "" for n in missed]])
        if metric in ("dice", "accuracy", "psnr", "ssim", "nmse") and not text:
            rows += [[f"{name} [paper]", *[str(values.get(c, "-")) for c in columns]]
                     for name, values in cfg.paper.items()]
        text.append(text_table(rows))
        if metric in NOTES:
            text[-1] += f"\n({NOTES[metric]})"
    return "\n\n".join(text)


def case_line(row):
    """The main number of each metric of a case."""
    texts = [row["id"]]
    for grid, scored in row["scores"].items():
        for metric, parts in scored.items():
            for part in ("mean", "whole"):
                if part in parts:
                    texts.append(f"{grid} {metric} {text_of(parts[part], metric)}")
    return "  ".join(texts)


def compare(results, cfg):
    """Paired difference of each checkpoint to the first, on the main score, case by case, in the unit of the
    tables; of segmentation on the scans' own grid, which results are reported on."""
    grid, metric, part = tasks.TASKS[cfg.task].best
    if cfg.task == "segmentation":
        grid = "original"
    what, values = f"{metric} {part}, {grid} grid", {}
    for name, result in results.items():
        scores = [row["scores"][grid] for row in result["rows"]]
        if cfg.task == "classification":
            metric = what = "accuracy"
            guesses = [np.argmax(list(case["probability"].values())) for case in scores]
            values[name] = [float(guess == case["class"]["true"]) for guess, case in zip(guesses, scores)]
        else:
            values[name] = [case[metric].get(part, np.nan) for case in scores]
    lines, (first, *others) = [], values
    subjects = [row["subject"] for row in results[first]["rows"]]
    for name in others:
        scale, unit = (100, " points") if metric in PERCENT else (1, "")
        a, b = np.array(values[name]), np.array(values[first])
        alone = (np.isnan(a) ^ np.isnan(b)) & (metric == "dice")
        a[alone & np.isnan(a)] = b[alone & np.isnan(b)] = 1         # right to find nothing where nothing is
        found, pairs = metrics.paired_difference(a, b, subjects=subjects), np.isfinite(a - b).sum()
        mean, low, high = (scale * value for value in found)
        of = f" of {len(a)}" if pairs < len(a) else ""
        said = f"; in {alone.sum()} one rightly finds nothing, which counts 100" if alone.any() else ""
        reach = "no interval" if np.isnan(low) else f"95 % interval {low:+.4g} .. {high:+.4g}"
        lines.append(f"{name} minus {first}: {what} {mean:+.4g}{unit}, {reach} "
                     f"({pairs}{of} cases, paired{said})")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- program

def restore(path, cfg, device, cases=()):
    """The fine-tuned network of a checkpoint; exits with one line when it is none, or another one.

    Or when some of the `cases` trained it, as under another fold, share or list of the same data; subjects of
    those that chose it stand in network.chose.
    """
    try:
        network = tasks.TASKS[cfg.task].network(cfg)
        network.chose = set()
        report = load_weights(network, path, cfg.downsample)
        stored = read_file(path)
    except ValueError as error:                                     # a WeightsError is one, too
        raise SystemExit(str(error)) from None
    then = stored.get("config") if stored.get("format") == "s2dc/finetune" else None
    if isinstance(then, dict):                                      # other files do not say
        for key in ("task", "in_channels", "labels", "regions", "classes", "residual"):
            theirs, ours = then.get(key), getattr(cfg, key)
            reordered = key == "regions" and theirs == ours and list(theirs) != list(ours)
            if theirs != ours or reordered:                         # the channels follow the order of regions
                raise SystemExit(f"{path}: trained with {key} = {theirs!r}, the config has {ours!r}")
        network.chose = {case["subject"] for case in tasks.used_by(stored, "val", cases, cfg)}
        seen = sorted({case["subject"] for case in tasks.used_by(stored, "train", cases, cfg)})
        if cfg.part != "train" and seen:
            raise SystemExit(f"{path}: {len(seen)} {cfg.part} subjects trained it: {', '.join(seen[:4])}; "
                             "give the split of its training (val, test, fold, ..), or --part=train")
    lost = [r for r in report["reasons"].values() if "outputs" in r]
    if lost:
        raise SystemExit(f"{path}: {lost[0].split(' ', 1)[1]}; the config declares other classes than it was "
                         "trained for")
    if report["initial"]:
        count, parts = sum(report["initial"].values()), ", ".join(report["initial"])
        raise SystemExit(f"{path}: holds no fine-tuned {cfg.task} network, {count} tensors are missing "
                         f"({parts}); expected the best.pt of finetune.py")
    for line in run.preprocessing_differences(stored.get("preprocessing"), data.preprocessing(cfg)):
        print(f"{path}: {line} here")
    return network.to(device).eval()


def choosers(networks, scans):
    """A remark on how many of the scans chose one of the checkpoints, by the split of its training."""
    chose = set().union(*(network.chose for network in networks.values()))
    count = sum(scan.subject in chose for scan in scans)
    if count == len(scans):
        return " (the cases that chose the checkpoint)"
    return f" ({count} of them chose a checkpoint)" if count else ""


def predict_images(network, folder, cfg, device):
    """Scans without labels: cfg.images is a glob pattern (a tuple: a pattern with {id} per channel), or a
    folder of NIfTI files. What cannot be read is named at the end, when the others are predicted: exit 1."""
    patterns = [f"{p.rstrip('/')}/*.nii*" if Path(p).is_dir() and len(data.several(cfg.images)) == 1 else p
                for p in data.several(cfg.images)]
    base = Path(re.split(r"[{*?\[]", patterns[0])[0])
    if not patterns[0].startswith(f"{base}/"):
        base = base.parent
    if not base.is_dir():
        raise SystemExit(f"images = {cfg.images!r}: there is no folder {base} (from here, not below `data`)")
    tails = ["/" if pattern.endswith("/") else "" for pattern in patterns]         # "/": folders of slices
    inside = tuple(os.path.relpath(pattern, base) + tail for pattern, tail in zip(patterns, tails))
    where = dict(scans=inside, image=()) if len(inside) == 1 else dict(scans=(), image=inside)
    source = dataclasses.replace(cfg, datalist="", label="", target=(), exclude=(), **where)
    found = data.find_cases(source, base=base)
    cases = [case for case in found                                 # the config excludes training cases, too
             if not any(fnmatch.fnmatch(case["id"], pattern) for pattern in data.several(cfg.exclude))]
    if len(cases) < len(found):
        print(f"{len(found) - len(cases)} of {len(found)} scans are left out by exclude = {cfg.exclude!r}")
    if not cases:
        raise SystemExit(f"images = {cfg.images!r}: no scan is left; give --exclude='()'")
    if folder.resolve() in {Path(file).resolve().parent for case in cases for file in case["images"]}:
        raise SystemExit(f"out = {str(folder)!r}: the images lie there, and predictions have their names; "
                         "give another --out")
    good, reasons = data.fill_cache(cases, source)
    for line in data.doubts(good, source):
        print(line)
    scans = [data.Scan(data.cache_folder(source), name, case, record) for case, name, record in good]
    for k, scan in enumerate(tasks.check_channels(scans, cfg)):
        ready = tasks.predict(network, scan, cfg, device)
        write_case(folder, k, scan, ready, cfg)
        if k < cfg.sheets and cfg.task == "segmentation":
            draw_case(folder / f"{scan.id}.png", scan, ready, cfg)
        print(f"{scan.id}: {folder}")
    tell_ids(cfg)
    if reasons:
        raise SystemExit("\n".join(reasons) + f"\n{len(reasons)} of {len(scans) + len(reasons)} scans are "
                         "unusable; mend them or name their ids under `exclude`")


def tell_ids(cfg):
    """A line where the ids of predictions are not those of the files of labels."""
    if cfg.remap and cfg.task == "segmentation":
        print(f"\nthe predictions hold the ids of `labels`, after remap = {cfg.remap}")


def score(network, scans, folder, cfg, device):
    """A row a case, {"id", "subject", "scores"}; predictions and sheets in `folder`."""
    extra = ["original", "ssim", *[key for key in ("hd95", "lesion_volumes") if getattr(cfg, key)]]
    rows = []
    for k, scan in enumerate(scans):
        ready, row = tasks.score_case(network, scan, cfg, device, extra)
        rows.append(row)
        write_case(folder, k, scan, ready, cfg)
        if k < cfg.sheets and cfg.task != "classification":
            draw_case(folder / f"{scan.id}.png", scan, ready, cfg)
    return rows


def main(argv):
    cfg = configs.load(Config, argv)
    device = run.choose_device()
    folder = Path(cfg.runs) / cfg.name
    out = Path(cfg.out) if cfg.out else folder
    tasks.check(cfg)
    if cfg.part not in ("train", "val", "test"):
        raise SystemExit(f"part = {cfg.part!r}, expected 'train', 'val' or 'test'")
    files = data.several(cfg.checkpoint) or (str(folder / "best.pt"),)
    lost = [file for file in files if not Path(file).is_file()]
    if lost:
        raise SystemExit(f"{lost[0]}: no such checkpoint; train it with finetune.py, or give "
                         "--checkpoint=FILE")
    if cfg.images:
        if len(files) > 1:
            raise SystemExit(f"checkpoint = {cfg.checkpoint!r}, expected one with `images`")
        predict_images(restore(files[0], cfg, device), out, cfg, device)
        return
    cases = tasks.split_cases(cfg, needed=(cfg.part,))[cfg.part]
    networks = {file: restore(file, cfg, device, cases) for file in files}
    scans = tasks.check_channels(data.open_scans(cfg, cases), cfg)
    results, of_part = {}, "" if cfg.part == "test" else f"_{cfg.part}"
    for k, (name, network) in enumerate(networks.items()):
        predictions = out / (f"predictions{of_part}" + f"_{k}" * (len(networks) > 1))
        rows = score(network, scans, predictions, cfg, device)
        results[name] = dict(rows=rows, summary=tasks.summarise(rows, cfg))
    if cfg.task != "classification":
        print("\n".join(case_line(row) for result in results.values() for row in result["rows"]))
    same = choosers(networks, scans)
    print(f"\n{cfg.name}: {len(scans)} {cfg.part} cases{same}\n\n" + result_tables(results, cfg))
    if len(results) > 1:
        print("\n" + compare(results, cfg))
    made = dict(part=cfg.part + same, config=dataclasses.asdict(cfg), **run.versions())
    if cfg.predictions:
        tell_ids(cfg)
    run.write_json(out / f"results{of_part}.json", dict(results=results, **made))
    print(f"\n{out / f'results{of_part}.json'}")


if __name__ == "__main__":
    run.program(main)
