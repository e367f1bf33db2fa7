"""Stage 3: score a network as the field does.

    python evaluate.py configs/btcv.py --name=btcv                                     scores, predictions, contact sheets
    python evaluate.py configs/btcv.py --name=btcv --images="scans/*.nii.gz" --out=there    scans without labels

Axis letters: k class, x y z voxels (RAS+: to the patient's right, front and head).
matplotlib is needed by pictures alone and imported there.
"""
import dataclasses
import gzip
import importlib
import itertools
import os
import re
import sys
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
from model import WeightsError, load_weights, read_file


@dataclasses.dataclass
class Config(tasks.Config):
    """What scoring adds to the task's own keys."""
    checkpoint: str | tuple = ()    # default runs/<name>/best.pt; several are compared
    part: str = "test"              # which part of the split is scored
    hd95: bool = True               # 95 % Hausdorff distance, mm
    lesion_volumes: bool = False    # false positive and false negative volume (AutoPET)
    predictions: bool = True        # write NIfTI files
    sheets: int = 4                 # contact sheets of the first cases
    images: str | tuple = ()        # scans without labels to predict (one pattern a channel), instead of scoring
    out: str = ""                   # folder of predictions and results, default runs/<name>
    paper: dict = dataclasses.field(default_factory=dict)      # {row: {column: value}} printed under ours, marked as the paper's


def need(module, package):
    """A module that only some commands use."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{package} is not installed, and this command needs it: pip install {package}") from None


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
    need("matplotlib", "matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    image, truth, prediction = (np.asarray(a) for a in (image, truth, prediction))
    if not image.shape == truth.shape == prediction.shape or image.ndim != 3:
        raise ValueError(f"contact_sheet: expected one shape (x, y, z), found {image.shape}, {truth.shape}, {prediction.shape}")
    centre = _show_where(truth, prediction)
    cuts = [slice_through(plane, centre, image, truth, prediction) for plane in PLANES]
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
        draw_letters(axes, letters)
    _legend(figure, shown, names, truth.any(), prediction.any())
    figure.text(0.5, 0.08 / height, f"grey values {low:.4g} to {high:.4g}", ha="center", fontsize=8)
    figure.savefig(path, dpi=120)


def image_sheet(path, source, truth, prediction, spacing, title):
    """Input, target, prediction and their difference (x, y, z) through the middle of the target, three planes, one scale each for
    input and for target and prediction; the difference from blue (too low) over white to red (too high)."""
    need("matplotlib", "matplotlib")
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
            drawn = axis.imshow(slice_through(plane, centre, volume)[0], cmap=colours, vmin=least, vmax=most, origin="lower",
                                aspect=spacing[plane[3]] / spacing[plane[2]], interpolation="bilinear")
            axis.set_axis_off()
            axis.set_title(f"{name}, {plane[0]}" if k == 0 else plane[0], fontsize=9)
            draw_letters(axis, plane[4])
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


def slice_through(plane, centre, *volumes):
    """The volumes' slices as (up, across) pictures, the across axis turned: R, or the front, comes on the left."""
    _, axis, across, up, _ = plane
    return [rearrange(np.take(v, centre[axis], axis), "across up -> up across")[:, ::-1] for v in volumes]


def draw_letters(axes, letters):
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
              (0.5, 0.02, "center", "bottom"), (0.5, 0.98, "center", "top"))
    for letter, (x, y, horizontal, vertical) in zip(letters, places):
        axes.text(x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white", fontsize=10,
                  bbox=dict(facecolor="black", alpha=0.5, linewidth=0, pad=1.5))


def colour_of(c):
    return COLOURS[(c - 1) % len(COLOURS)]


def _overlay(axes, true, predicted, shown):
    """Prediction filled, truth outlined along the voxels' edges, the id where a class is thickest."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke
    fill, fine = np.zeros((*true.shape, 4)), 4                             # 4 points a voxel make the outline square
    for c in shown:
        fill[predicted == c] = (*to_rgb(colour_of(c)), 0.45)
    axes.imshow(fill, origin="lower", aspect="auto", interpolation="nearest")
    up, across = ((np.arange(n * fine + 2) - 0.5) / fine - 0.5 for n in true.shape)
    for c in shown:
        if (true == c).any():
            mask = np.pad((true == c).repeat(fine, 0).repeat(fine, 1), 1)
            axes.contour(across, up, mask, [0.5], colors=[colour_of(c)], linewidths=1.6)
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
    handles = [Patch(facecolor=colour_of(c), label=f"{c} {names[c]}" if names else str(c)) for c in shown]
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


# ---------------------------------------------------------------------------------------------------------------------
# program


def inference_scans(cfg):
    """Scans without labels: cfg.images is a glob pattern (a tuple: a pattern with {id} per channel)."""
    patterns = data.several(cfg.images)
    base = Path(re.split(r"[{*?\[]", patterns[0])[0])
    base = base if patterns[0].startswith(f"{base}/") or base.is_dir() else base.parent
    inside = [os.path.relpath(p, base) + "/" * p.endswith("/") for p in patterns]     # "/": folders of slices
    several = dict(image=tuple(inside), scans=()) if len(patterns) > 1 else dict(scans=(inside[0],), image=())
    source = dataclasses.replace(cfg, datalist="", label="", target=(), exclude=(), **several)
    return tasks.check_channels(data.open_scans(source, data.find_cases(source, base=base)), cfg)


def main(argv):
    cfg = configs.load(Config, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(cfg.out or Path(cfg.runs) / cfg.name)
    tasks.check(cfg)
    if cfg.part not in ("train", "val", "test"):
        raise SystemExit(f"part = {cfg.part!r}, expected 'train', 'val' or 'test'")
    files = list(data.several(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "best.pt")]
    lost = [file for file in files if not Path(file).is_file()]
    if lost:
        raise SystemExit(f"{lost[0]}: no such checkpoint; train it with finetune.py, or give --checkpoint=FILE")
    networks = {file: restore(file, cfg, device) for file in files}
    if cfg.images:
        (out / "probabilities.csv").unlink(missing_ok=True)             # of an earlier run: deliver appends
        for scan in inference_scans(cfg):
            ready = tasks.predict(next(iter(networks.values())), scan, cfg, device)
            deliver(out, scan, ready, cfg)
            print(f"{scan.id}: {out}")
        return
    scans = tasks.check_channels(data.open_scans(cfg, tasks.split_cases(cfg)[cfg.part]), cfg)
    check_unseen(files, scans, cfg)
    extra = ["original", "ssim"] + ["hd95"] * cfg.hd95 + ["lesion_volumes"] * cfg.lesion_volumes
    results = {}
    for k, (name, network) in enumerate(networks.items()):
        folder = out / "predictions" if len(networks) == 1 else out / f"predictions_{k}"
        (folder / "probabilities.csv").unlink(missing_ok=True)
        sheets = iter(range(cfg.sheets))
        rows = tasks.score_cases(network, scans, cfg, device, extra,
                                 after=lambda scan, ready: deliver(folder, scan, ready, cfg, next(sheets, None)))
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
