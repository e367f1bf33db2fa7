"""What the four downstream tasks are, from the split of the cases to the score of one.

1. sliding window, and back to the scan's own grid; 2. tasks: networks, losses, keys; 3. who trains, who chooses, who is reported;
4. predictions and scores of cases.
Axis letters: b batch, c channel, k class, x y z voxels (RAS+: to the patient's right, front and head), n cases.
"""
import csv
import dataclasses
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import data
import losses
import metrics
from model import Classifier, SwinUNETR

# ---------------------------------------------------------------------------------------------------------------------
# 1. sliding window, and back to the scan's own grid


@torch.no_grad()
def sliding_window(predict, volume, window, overlap, batch, blend="gaussian", device=None, store=None, pad=0.0):
    """Run `predict` on overlapping windows and blend what it says into one map of the whole volume.

    predict     (n, c, *window) -> (n, k, *window), n <= batch; called on `device`, and must keep no hold of its input
    volume      (b, c, x, y, z), on any device: windows are copied from where it lies
    window      voxels, one number or three;   overlap  share of the window in [0, 1), one number or three
    batch       windows per call of predict
    blend       "gaussian": weight exp(-d^2 / 2 sigma^2), sigma = window / 8, nowhere below 1e-3; "constant": plain mean
    device      where predict runs, default the volume's
    store       "device", "cpu", or None: on the device if, after the first batch, 9/10 of its free memory hold the
                output, else on the CPU
    pad         value around a volume that is smaller than the window (half before, half after; cropped off again)
    returns     (b, k, x, y, z), float32 or wider, where it was stored

    Beside the output it holds one batch of windows and its prediction. Grid and weights are those of MONAI's
    sliding_window_inference (sigma_scale 0.125), so both agree.
    Raises ValueError for shapes, overlap, blend or store that do not fit.
    """
    window, size = three(window), volume.shape[2:]
    volume, before, starts = _grid(volume, window, three(overlap), batch, pad)
    jobs = [(i, *(slice(s, s + w) for s, w in zip(corner, window)))
            for i in range(len(volume)) for corner in itertools.product(*starts)]
    device = volume.device if device is None else torch.device(device)
    stack = torch.empty(batch, volume.shape[1], *window, dtype=volume.dtype, device=device)
    total, weight = None, _weight(window, blend)
    for first in range(0, len(jobs), batch):
        group = jobs[first:first + batch]
        for slot, (i, x, y, z) in zip(stack, group):
            slot.copy_(volume[i, :, x, y, z])
        part = predict(stack[:len(group)])
        if total is None:
            total = _output(part, len(group), volume, window, store)
            weight = weight.to(total)
        part = part.to(total)
        for p, (i, x, y, z) in zip(part, group):
            total[i, :, x, y, z].addcmul_(p, weight)                       # in place, nothing allocated per window
        part = p = None                                                    # or the next batch would lie beside this one
    total /= _summed(weight, starts, volume.shape[2:])
    x, y, z = (slice(b, b + s) for b, s in zip(before, size))
    return total[:, :, x, y, z]


def three(value):
    """One number for all three axes, or a number per axis."""
    value = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(value) != 3:
        raise ValueError(f"expected one number or three, found {value}")
    return value


def _grid(volume, window, overlap, batch, pad):
    """The volume, padded to hold a window; the margin before it; first voxels of the windows per axis."""
    size = volume.shape[2:]
    if volume.ndim != 5:
        raise ValueError(f"sliding_window: expected volume (b, c, x, y, z), found {tuple(volume.shape)}")
    if min(window) < 1 or batch < 1 or not all(0 <= o < 1 for o in overlap):
        raise ValueError(f"sliding_window: expected window and batch >= 1, 0 <= overlap < 1, found {window}, {batch}, {overlap}")
    before = [max(w - s, 0) // 2 for w, s in zip(window, size)]
    margins = [m for s, w, m0 in zip(size[::-1], window[::-1], before[::-1]) for m in (m0, max(w - s, 0) - m0)]
    if any(margins):                                                       # F.pad counts from the last axis
        volume = F.pad(volume, margins, value=pad)
    starts = []
    for s, w, o in zip(volume.shape[2:], window, overlap):                 # a fixed step; the last window moves back
        starts.append([*range(0, s - w, max(int(w * (1 - o)), 1)), s - w])
    return volume, before, starts


def _weight(window, blend):
    """(x, y, z) weight of a window's voxels."""
    if blend == "constant":
        return torch.ones(window)
    if blend != "gaussian":
        raise ValueError(f"sliding_window: blend must be 'gaussian' or 'constant', found {blend!r}")
    x, y, z = (torch.exp(-0.5 * ((torch.arange(w) - (w - 1) / 2) / (w / 8)) ** 2) for w in window)
    return torch.einsum("x,y,z->xyz", x, y, z).clamp(min=1e-3)


def _summed(weight, starts, size):
    """(x, y, z) sum of the weights of all windows; those that start at one x form a slab, the same for every x."""
    slab, summed = weight.new_zeros(len(weight), *size[1:]), weight.new_zeros(size)
    for y, z in itertools.product(*starts[1:]):
        slab[:, y:y + weight.shape[1], z:z + weight.shape[2]] += weight
    for x in starts[0]:
        summed[x:x + len(slab)] += slab
    return summed


def _output(part, n, volume, window, store):
    """Zeros for the whole volume, placed after the first batch, when the network has taken the memory that it needs."""
    if part.ndim != 5 or part.shape[0] != n or tuple(part.shape[2:]) != window:
        raise ValueError(f"sliding_window: predict must return ({n}, classes, *{window}), found {tuple(part.shape)}")
    if store not in (None, "device", "cpu"):
        raise ValueError(f"sliding_window: store must be 'device', 'cpu' or None, found {store!r}")
    shape, dtype = (len(volume), part.shape[1], *volume.shape[2:]), torch.promote_types(part.dtype, torch.float32)
    if store is None and part.device.type == "cuda":
        store = "device" if np.prod(shape) * dtype.itemsize < 0.9 * torch.cuda.mem_get_info(part.device)[0] else "cpu"
    return torch.zeros(shape, dtype=dtype, device=part.device if store == "device" else "cpu")


def to_original(array, affine_pre, affine_orig, shape_orig, order, fill=0):
    """Bring a prediction from the preprocessed grid to the scan's own voxels: undoes cropping, spacing and orientation.

    array        (x, y, z) or (k, x, y, z) on the preprocessed grid, numpy or tensor
    affine_*     (4, 4) voxel -> mm of either grid;   shape_orig  (3,) voxels of the scan as stored
    order        1: linear, for probabilities, class by class; 0: nearest, for ids
    fill         value of voxels beyond the preprocessed grid (0 in all classes is class 0 by argmax)
    returns      tensor (.., *shape_orig), the array's dtype (linear: float32 or wider); exact where voxel centres meet

    A voxel fills half a step to each side of its centre, so that the rim of a scan that was merely resampled keeps its
    prediction; scipy and nibabel stop at the outermost centres.  Beside the output it holds about three volumes.
    Raises ValueError for another order or rank, and for grids that are rotated against each other (data.py makes none).
    """
    array, affine_pre, affine_orig = torch.as_tensor(array), np.asarray(affine_pre, float), np.asarray(affine_orig, float)
    if array.ndim not in (3, 4) or order not in (0, 1):
        raise ValueError(f"to_original: expected (x, y, z) or (k, x, y, z) and order 0 or 1, found {tuple(array.shape)}, {order}")
    matrix = np.linalg.inv(affine_pre) @ affine_orig                       # voxel of the scan -> voxel of the array
    reach = np.abs(matrix[:3, :3]) * np.asarray(shape_orig)                # voxels from end to end of the scan
    owner = reach.argmax(1)                                                # axis of the scan that each axis follows
    if len(set(owner)) < 3 or (reach.sum(1) - reach.max(1) > 0.01).any():
        raise ValueError(f"to_original: the grids are turned against each other: {affine_pre.tolist()}, {affine_orig.tolist()}")
    if order == 1:
        array = array.to(torch.promote_types(array.dtype, torch.float32))
    volumes = array if array.ndim == 4 else array[None]
    out = torch.empty(len(volumes), *shape_orig, dtype=array.dtype, device=array.device)
    for place, one in zip(out, volumes):
        place.copy_(_resample(one, matrix, owner, shape_orig, order, fill))
    return out if array.ndim == 4 else out[0]


def _resample(volume, matrix, owner, shape, order, fill):
    """Three one-dimensional interpolations: the grids differ by order, sign, step and offset of their axes alone."""
    inside = []
    for axis, j in enumerate(owner):                                       # axis of the array, axis j of the scan
        n = volume.shape[axis]
        at = np.round(matrix[axis, j] * np.arange(shape[j]) + matrix[axis, 3], 5)     # centres that meet, meet exactly
        inside.append((at >= -0.5) & (at <= n - 0.5))
        at = at.clip(0, n - 1)
        low = np.floor(at if order == 1 else at + 0.5).astype(np.int64).clip(0, n - 1)
        part = volume.index_select(axis, torch.from_numpy(low).to(volume.device))
        if order == 1 and (at != low).any():
            high = torch.from_numpy((low + 1).clip(max=n - 1)).to(volume.device)
            share = torch.from_numpy(at - low).to(volume).reshape([-1 if m == axis else 1 for m in range(3)])
            part.lerp_(volume.index_select(axis, high), share)
        volume = part
    for axis in range(3):
        volume.index_fill_(axis, torch.from_numpy(np.flatnonzero(~inside[axis])).to(volume.device), fill)
    names = dict(zip(owner.tolist(), "xyz"))
    return rearrange(volume, f"x y z -> {names[0]} {names[1]} {names[2]}")


# ---------------------------------------------------------------------------------------------------------------------
# 2. tasks: all that differs between the four stands here


@dataclasses.dataclass
class Config(data.Config):
    """What training and scoring of a task share; finetune.py and evaluate.py add their own."""
    name: str = "finetune"          # run folder below `runs`
    runs: str = "runs"
    seed: int = 3407                # released code
    task: str = "segmentation"      # segmentation, classification, reconstruction, translation
    # network, as in pretrain.py
    in_channels: int = 1
    feature_size: int = 48
    depths: tuple = (2, 2, 2, 2)
    num_heads: tuple = (3, 6, 12, 24)
    window_size: int = 7
    v2: bool = True
    merge: str = "all"
    checkpointing: bool = False
    residual: bool = False          # reconstruction, translation: the network adds to the first input channel
    crop: tuple = (96, 96, 96)      # voxels that the network sees at once; paper
    # what is predicted
    regions: dict = dataclasses.field(default_factory=dict)    # {"WT": (1, 2, 3), ..} overlapping regions, sigmoid; {}: softmax over `labels`
    classes: dict = dataclasses.field(default_factory=dict)    # classification: {name in the data: class number}
    class_from: str = "{class}"     # the class name of a case, from its pattern's fields, or from a column of `table`
    table: str = ""                 # csv below the data root with a row a case
    table_key: str = "{id}"         # what names the case in the table's columns ..
    case_key: str = "{id}"          # .. and in the case's fields, id and subject
    # who trains, who chooses the checkpoint, who is reported
    only: str | tuple = ()          # csv files: cases that none of them names are left out
    val: str | tuple = ()           # ids or patterns of ids; or csv files: the cases that every file names
    test: str | tuple = ()          # the same; "val": reported on the cases that chose, as much of the field does
    val_section: str = ""           # section of the datalist instead
    test_section: str = ""
    fold: int = -1                  # val = the datalist's entries of this fold, or subjects [fold::folds]; -1: not used
    folds: int = 5
    test_share: float = 0.0         # share of the subjects, drawn by split_seed, where nothing else says
    val_share: float = 0.0          # the same, of the subjects that test leaves
    split_seed: int = 0
    label_fraction: float = 1.0     # share of the training subjects; nested: the 10 % lie within the 50 % (paper, Table 8)
    # inference
    overlap: float = 0.5            # of sliding windows of `crop` voxels; MONAI (released code validates with 0.75)
    blend: str = "gaussian"         # or "constant"; MONAI
    windows: int = 4                # windows per forward
    flips: bool = False             # average over the 8 mirrored copies
    data_range: float = 0.0         # of PSNR and SSIM, in preprocessed units; 0: each target's largest minus least


def swin(cfg):
    """Arguments of the encoder."""
    keys = ("feature_size", "depths", "num_heads", "window_size", "v2", "merge", "checkpointing")
    return {key: getattr(cfg, key) for key in keys}


def names_of(cfg):
    """Names of the output channels that are scored."""
    return list(cfg.regions) if cfg.regions else [str(cfg.labels[k]) for k in sorted(cfg.labels)]


def image_network(cfg):
    """SwinUNETR with one output per target image; with cfg.residual it starts as the identity."""
    network = SwinUNETR(cfg.in_channels, max(1, len(data.several(cfg.target))), **swin(cfg))
    if cfg.residual:                                                    # the correction starts at none
        torch.nn.init.zeros_(network.out.weight)
        torch.nn.init.zeros_(network.out.bias)
    return network


def segmentation_loss(output, truth, cfg):
    """Dice + cross-entropy of logits (b, k, x, y, z): softmax over classes, or sigmoid per region -> ()."""
    label = truth["label"]                                              # (b, 1, x, y, z) ids
    if cfg.regions:
        masks = [torch.isin(label, label.new_tensor(group)) for group in cfg.regions.values()]
        return losses.dice_bce(output, torch.cat(masks, 1).float())
    return losses.dice_ce(output, label, balance=cfg.balance)


def translation_loss(output, truth, cfg):
    """L1 + L2 of (b, c, x, y, z) over the tissue of the target -> ()."""
    return losses.masked_l1_l2(output, truth["target"], above_background(truth["target"], truth["target_fill"]))


def above_background(target, fill):
    """(b, c, x, y, z) bool: where a skull-stripped target is more than its background, the least value."""
    return target > rearrange(torch.as_tensor(fill, dtype=target.dtype, device=target.device), "b c -> b c 1 1 1") + 1e-2


@dataclasses.dataclass
class Task:
    """All that differs between the four tasks."""
    network: Callable               # cfg -> network
    loss: Callable                  # output, {"label" (b, 1, x, y, z), "class" (b,), "target" (b, c, x, y, z), "target_fill"}, cfg -> ()
    ready: Callable                 # output, cfg -> probabilities, or the predicted image itself
    score: Callable                 # ready output of one case, scan, cfg, extra -> {grid: {metric: {part: number}}}
    best: tuple                     # metric whose largest mean over val chooses the checkpoint


TASKS = {
    "segmentation": Task(
        network=lambda cfg: SwinUNETR(cfg.in_channels, len(cfg.regions) or 1 + max(cfg.labels), **swin(cfg)),
        loss=segmentation_loss,
        ready=lambda output, cfg: output.sigmoid() if cfg.regions else output.softmax(1),
        score=lambda *case: score_segmentation(*case), best=("preprocessed", "dice", "mean")),
    "classification": Task(
        network=lambda cfg: Classifier(cfg.in_channels, 1 + max(cfg.classes.values()), **swin(cfg)),
        loss=lambda output, truth, cfg: F.cross_entropy(output.float(), truth["class"]),
        ready=lambda output, cfg: output.softmax(1),
        score=lambda *case: score_classification(*case), best=("scans", "balanced_accuracy", "all")),
    "reconstruction": Task(
        network=image_network,
        loss=lambda output, truth, cfg: losses.reconstruction_loss(output, truth["target"], cfg.data_range or 1.0),
        ready=lambda output, cfg: output,
        score=lambda *case: score_image(*case), best=("preprocessed", "psnr", "whole")),
    "translation": Task(
        network=image_network,
        loss=translation_loss,
        ready=lambda output, cfg: output,
        score=lambda *case: score_image(*case), best=("preprocessed", "psnr", "tissue")),
}


def forward(network, image, cfg):
    """float32 output of a network; with cfg.residual added to the first input channels. (b, c, x, y, z), or (b, k) for classes."""
    output = network(image).float()
    return output + image[:, :output.shape[1]] if cfg.residual else output


def check(cfg):
    """Refuse a configuration that cannot run, one line, before anything is read."""
    rules = [
        (cfg.task in TASKS, f"task = {cfg.task!r}, expected one of {', '.join(TASKS)}"),
        (cfg.task != "segmentation" or cfg.labels, "segmentation needs `labels` = {id: name}"),
        (cfg.task != "segmentation" or cfg.regions or sorted(cfg.labels) == list(range(1, len(cfg.labels) + 1)),
         f"labels: ids must be 1 to {len(cfg.labels)} without gaps (rename with `remap`), found {sorted(cfg.labels)}"),
        (cfg.task != "classification" or len(set(cfg.classes.values())) > 1, "classification needs `classes` = {name: number}"),
        (cfg.task != "classification" or set(cfg.classes.values()) == set(range(len(set(cfg.classes.values())))),
         f"classes: numbers must be 0, 1, .. without gaps, found {sorted(set(cfg.classes.values()))}"),
        (cfg.task not in ("reconstruction", "translation") or cfg.target or cfg.datalist, f"{cfg.task} needs `target`, the image to be predicted"),
        (all(c % 32 == 0 and c >= 64 for c in cfg.crop), f"crop = {cfg.crop}, expected multiples of 32, at least 64"),
        (0 < cfg.label_fraction <= 1, f"label_fraction = {cfg.label_fraction}, expected above 0, at most 1"),
        (0 <= cfg.overlap < 1, f"overlap = {cfg.overlap}, expected 0 or more, below 1"),
        (cfg.blend in ("gaussian", "constant"), f"blend = {cfg.blend!r}, expected 'gaussian' or 'constant'"),
    ]
    unknown = [k for group in cfg.regions.values() for k in group if k not in cfg.labels]
    rules.append((not unknown, f"regions: id {unknown[:1]} is not in `labels`"))
    for fine, text in rules:
        if not fine:
            raise SystemExit(text)


# ---------------------------------------------------------------------------------------------------------------------
# 3. who trains, who chooses, who is reported


def split_cases(cfg):
    """{"train": [case], "val": [case], "test": [case]} with a class number under "class" for classification.

    A subject on two sides, a part that stays empty, a case without what the task needs: one line. test = "val" repeats val.
    """
    parts = {"train": data.find_cases(cfg)}
    for part, section in (("val", cfg.val_section), ("test", cfg.test_section)):
        if section:
            parts[part] = data.find_cases(cfg, section)
    if cfg.only:
        listed = set().union(*[_table(data.root(cfg) / file, cfg.table_key) for file in data.several(cfg.only)])
        parts["train"] = [case for case in parts["train"] if _case_key(case, cfg) in listed]
    everyone = parts["train"]
    subjects = sorted({case["subject"] for case in everyone})
    if cfg.test and cfg.test != "val":
        _move(parts, "test", _named(everyone, cfg.test, cfg))
    if cfg.val:
        _move(parts, "val", _named(parts["train"], cfg.val, cfg))
    elif cfg.fold >= 0 and any("fold" in case for case in everyone):
        _move(parts, "val", {case["id"] for case in everyone if case.get("fold") == cfg.fold})
    elif cfg.fold >= 0:
        mine = set(subjects[cfg.fold::cfg.folds])
        _move(parts, "val", {case["id"] for case in everyone if case["subject"] in mine})
    for part, share in (("test", cfg.test_share), ("val", cfg.val_share)):
        if share and part not in parts:
            groups = _by_class(parts["train"], cfg) if cfg.task == "classification" else {0: parts["train"]}
            mine = {s for group in groups.values() for s in _share_of({c["subject"] for c in group}, share, cfg.split_seed, part)}
            _move(parts, part, {case["id"] for case in parts["train"] if case["subject"] in mine})
    if cfg.test == "val":
        parts["test"] = parts.get("val", [])
    if cfg.task == "classification":
        for group in parts.values():
            for case, k in zip(group, _classes(group, cfg)):
                case["class"] = k
    groups = _by_class(parts["train"], cfg) if cfg.task == "classification" else {0: parts["train"]}
    kept = {s for group in groups.values() for s in _share_of({c["subject"] for c in group}, cfg.label_fraction, cfg.split_seed, "labels")}
    parts["train"] = [case for case in parts["train"] if case["subject"] in kept]
    _check_parts(parts, cfg)
    return parts


def _named(cases, which, cfg):
    """Ids of the cases that `which` names: ids and patterns of ids, or csv files (the cases that all of them name)."""
    which = data.several(which)
    if which[0].endswith(".csv"):
        sets = [set(_table(data.root(cfg) / file, cfg.table_key)) for file in which]
        named = {case["id"] for case in cases if all(_case_key(case, cfg) in s for s in sets)}
    else:
        lost = [name for name in which if not any(fnmatch.fnmatch(case["id"], name) for case in cases)]
        if lost:
            raise SystemExit(f"the split names {', '.join(map(repr, lost[:4]))}, no case has such an id; there are: "
                             f"{', '.join(case['id'] for case in cases[:4])} ..")
        named = {case["id"] for case in cases if any(fnmatch.fnmatch(case["id"], name) for name in which)}
    if not named:
        example = f"an id here is {cases[0]['id']!r}" if cases else "another part of the split has taken all"
        raise SystemExit(f"{', '.join(which[:3])} names none of the {len(cases)} cases; {example}")
    return named


def _table(path, key):
    """{key: row} of a csv; a key that comes twice keeps its last row."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such table")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    try:
        return {key.format_map(row): row for row in rows}
    except KeyError as error:
        raise SystemExit(f"{path}: no column {error}; columns: {', '.join(rows[0])}") from None


def _case_key(case, cfg):
    fields = case.get("fields", {}) | dict(id=case["id"], subject=case["subject"])
    try:
        return cfg.case_key.format_map(fields)
    except KeyError as error:
        raise SystemExit(f"case_key = {cfg.case_key!r}: no {error} in {', '.join(fields)}") from None


def _classes(cases, cfg):
    table = _table(data.root(cfg) / cfg.table, cfg.table_key) if cfg.table else None
    numbers = []
    for case in cases:
        fields = case.get("fields", {})
        if table is not None:
            if _case_key(case, cfg) not in table:
                raise SystemExit(f"{case['images'][0]}: {cfg.table} has no row {_case_key(case, cfg)!r}")
            fields = table[_case_key(case, cfg)]
        try:
            name = cfg.class_from.format_map(fields)
        except KeyError as error:
            raise SystemExit(f"class_from = {cfg.class_from!r}: no {error} in {', '.join(fields) or 'the pattern'}") from None
        if name not in cfg.classes:
            raise SystemExit(f"{case['images'][0]}: class {name!r} is not declared; classes: {', '.join(cfg.classes)}")
        numbers.append(cfg.classes[name])
    return numbers


def _by_class(cases, cfg):
    """{class: cases}; a subject with several classes belongs to the largest number, so that nobody is divided."""
    numbers = _classes(cases, cfg)
    own = {}
    for case, k in zip(cases, numbers):
        own[case["subject"]] = max(k, own.get(case["subject"], k))
    return {k: [case for case in cases if own[case["subject"]] == k] for k in sorted(set(own.values()))}


def _share_of(subjects, share, seed, purpose):
    """The first share of the subjects in an order that seed and purpose fix, at least one: a smaller share lies in a larger."""
    order = sorted(subjects, key=lambda s: hashlib.sha256(f"{seed} {purpose} {s}".encode()).hexdigest())
    return order[:max(1, round(share * len(order)))]


def _move(parts, part, ids):
    parts[part] = [case for case in parts["train"] if case["id"] in ids]
    parts["train"] = [case for case in parts["train"] if case["id"] not in ids]


def _check_parts(parts, cfg):
    for part in ("train", "val", "test"):
        if not parts.get(part):
            raise SystemExit(f"no case is left for {part}; the config gives val = {cfg.val!r}, test = {cfg.test!r}, val_share = "
                             f"{cfg.val_share}, test_share = {cfg.test_share}, fold = {cfg.fold}")
        need = {"segmentation": "label", "reconstruction": "targets", "translation": "targets"}.get(cfg.task)
        bare = [case["images"][0] for case in parts[part] if need and not case[need]]
        if bare:
            raise SystemExit(f"{bare[0]}: a {part} case without {need.rstrip('s')}")
    pairs = [("train", "val"), ("train", "test")] + ([("val", "test")] if cfg.test != "val" else [])
    for a, b in pairs:
        both = {case["subject"] for case in parts[a]} & {case["subject"] for case in parts[b]}
        if both:
            raise SystemExit(f"{len(both)} subjects are in {a} and in {b}: {', '.join(sorted(both)[:4])}")


# ---------------------------------------------------------------------------------------------------------------------
# 4. predict and score cases


@torch.no_grad()
def predict(network, scan, cfg, device):
    """Ready output of one cached scan on its preprocessed grid, (k, x, y, z) or (k,) for classification, on the CPU.

    With cfg.flips the mean over the 8 mirrored copies.
    """
    task, total = TASKS[cfg.task], 0
    volume = torch.from_numpy(np.ascontiguousarray(scan.open())).float()[None]
    fill = rearrange(torch.from_numpy(scan.fill), "c -> c 1 1 1")       # around the scan each channel has its own, as in training
    mirrored = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)] if cfg.flips else [()]
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    network.eval()
    for axes in mirrored:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            seen = volume.flip(axes)
            if cfg.task == "classification":
                output = forward(network, seen.to(device), cfg)
            else:
                output = sliding_window(lambda x: forward(network, x + fill.to(device), cfg), seen - fill, cfg.crop, cfg.overlap,
                                        cfg.windows, cfg.blend, device)
        output = task.ready(output.float(), cfg)
        total = total + (output if cfg.task == "classification" else output.flip(axes)).cpu()
    return (total / len(mirrored))[0]


def masks_of(ready, cfg):
    """(k, x, y, z) bool of the scored classes or regions, from probabilities (k, x, y, z) or an id map (x, y, z)."""
    if ready.ndim == 4:
        if cfg.regions:
            return ready > 0.5
        ready = ready.argmax(0)
    if cfg.regions:
        return torch.stack([torch.isin(ready, torch.tensor(group)) for group in cfg.regions.values()])
    return torch.stack([ready == k for k in sorted(cfg.labels)])


def score_segmentation(ready, scan, cfg, extra=()):
    """Dice per class on the preprocessed grid; with `full` also on the scan's own voxels (probabilities go back linearly, the
    truth as stored), Hausdorff distance and lesion volumes."""
    truth = torch.from_numpy(scan.open("label")[0].astype(np.int64))
    grids = {"preprocessed": (masks_of(ready, cfg), masks_of(truth, cfg), scan.spacing)}
    if "original" in extra:
        stored, affine = data.read_stored(scan.case["label"], label=True)
        own = torch.from_numpy(data.label_ids(scan.case["label"], stored, cfg).astype(np.int64))
        grids["original"] = (on_scan(ready, scan, affine, stored.shape, cfg), masks_of(own, cfg), data.spacing_of(affine))
    scores, names = {}, names_of(cfg)
    for grid, (predicted, true, spacing) in grids.items():
        predicted, true = predicted.numpy(), true.numpy()
        values = dict(zip(names, metrics.dice_regions(predicted, true).tolist()))
        scores[grid] = {"dice": values | {"mean": metrics.mean(list(values.values()))}}
        if "hd95" in extra:
            values = {name: metrics.hausdorff95(p, t, spacing) for name, p, t in zip(names, predicted, true)}
            scores[grid]["hd95"] = values | {"mean": metrics.mean([v if np.isfinite(v) else np.nan for v in values.values()])}
        if "lesion_volumes" in extra:
            volumes = [metrics.false_volumes(p, t, spacing) for p, t in zip(predicted, true)]
            for k, metric in enumerate(("false_positive_ml", "false_negative_ml")):
                scores[grid][metric] = {name: pair[k] for name, pair in zip(names, volumes)}
            positive = [name for name, t in zip(names, true) if t.any()]
            scores[grid]["dice_of_positive"] = {name: values_ for name, values_ in scores[grid]["dice"].items() if name in positive}
    return scores


def on_scan(ready, scan, affine, shape, cfg):
    """(k, x, y, z) bool on the scan's own voxels: each channel goes back linearly, one at a time, then the largest wins."""
    if cfg.regions:
        return torch.stack([to_original(p, scan.affine, affine, shape, 1) > 0.5 for p in ready])
    best = to_original(ready[0], scan.affine, affine, shape, 1, fill=1.0)
    ids = torch.zeros(tuple(shape), dtype=torch.uint8 if len(ready) <= 256 else torch.int16)
    for k in range(1, len(ready)):
        p = to_original(ready[k], scan.affine, affine, shape, 1)
        ids[p > best] = k
        best = torch.maximum(best, p)
    return masks_of(ids, cfg)


def score_classification(ready, scan, cfg, extra=()):
    """Probabilities (k,) of a case and its true class, from which `summarise` makes accuracy, AUC and confusion over all cases."""
    return {"scans": {"probability": {str(k): float(p) for k, p in enumerate(ready)}, "class": {"true": scan.case["class"]}}}


def score_image(ready, scan, cfg, extra=()):
    """PSNR, SSIM and NMSE of a predicted image on the preprocessed grid and in its units: over the whole volume; with the
    background copied from the target ("pasted", as the released code scores); over the tissue alone (PSNR, NMSE); and of the input
    left as it is ("input"). Background: the target's least value."""
    truth = torch.from_numpy(np.ascontiguousarray(scan.open("target"))).float()
    image = torch.from_numpy(np.ascontiguousarray(scan.open())).float()[:1].expand_as(truth)
    inside = above_background(truth[None], [scan.record["target_fill"]])[0]
    pasted = torch.where(inside, ready, truth)
    reach = cfg.data_range or float(truth.max() - truth.min())
    scores = {"psnr": {}, "nmse": {}} | ({"ssim": {}} if "ssim" in extra else {})
    for part, guess, where in (("whole", ready, None), ("pasted", pasted, None), ("tissue", ready, inside), ("input", image, None)):
        a, b = (guess, truth) if where is None else (guess[where], truth[where])
        scores["psnr"][part], scores["nmse"][part] = metrics.psnr(a, b, reach), metrics.nmse(a, b)
        if "ssim" in extra and where is None:
            scores["ssim"][part] = float(np.mean([metrics.ssim(p, t, reach) for p, t in zip(guess.numpy(), truth.numpy())]))
    return {"preprocessed": scores | {"data_range": {"used": reach}}}


def score_cases(network, scans, cfg, device, extra=(), after=None):
    """One row a case, {"id", "subject", "scores"}; `after(scan, ready)` may write what it likes."""
    rows = []
    for scan in scans:
        ready = predict(network, scan, cfg, device)
        rows.append(dict(id=scan.id, subject=scan.subject, scores=TASKS[cfg.task].score(ready, scan, cfg, extra)))
        if after:
            after(scan, ready)
    return rows


def summarise(rows, cfg):
    """{grid: {metric: {part: {"mean", "low", "high", "cases"}}}} over the cases: mean and its bootstrap 95 % interval."""
    if cfg.task == "classification":
        probabilities = np.array([list(row["scores"]["scans"]["probability"].values()) for row in rows])
        truth = np.array([row["scores"]["scans"]["class"]["true"] for row in rows])
        scores = metrics.classification_scores(probabilities, truth)
        right = metrics.bootstrap_mean((probabilities.argmax(1) == truth).astype(float))
        table = {"accuracy": {"all": dict(mean=right[0], low=right[1], high=right[2], cases=len(rows))}}
        for metric in ("balanced_accuracy", "majority_accuracy", "auc_mean"):
            table[metric] = {"all": dict(mean=scores[metric], cases=len(rows))}
        for metric in ("recall", "auc"):
            table[metric] = {name: dict(mean=v, cases=int((truth == k).sum())) for k, (name, v) in enumerate(zip(class_names(cfg), scores[metric]))}
        return {"scans": table | {"confusion": scores["confusion"]}}
    table = {}
    for grid, scored in rows[0]["scores"].items():
        table[grid] = {}
        for metric in scored:
            parts = list(dict.fromkeys(part for row in rows for part in row["scores"][grid][metric]))
            table[grid][metric] = {}
            for part in parts:
                values = [row["scores"][grid][metric].get(part, np.nan) for row in rows]
                mean, low, high = metrics.bootstrap_mean([v if np.isfinite(v) else np.nan for v in values])
                table[grid][metric][part] = dict(mean=mean, low=low, high=high, cases=int(np.isfinite(values).sum()))
                if np.isinf(values).any():
                    table[grid][metric][part]["missed"] = int(np.isinf(values).sum())      # one of the two masks was empty
    return table


def class_names(cfg):
    """One name per class number, the first that the config gives it."""
    return [next(name for name, k in cfg.classes.items() if k == number) for number in sorted(set(cfg.classes.values()))]


def main_score(rows, cfg):
    """The number that chooses a checkpoint: larger is better."""
    grid, metric, part = TASKS[cfg.task].best
    return summarise(rows, cfg)[grid][metric][part]["mean"]


def preprocessing_differences(then, cfg):
    """A line for each key under which a checkpoint was trained otherwise than the config says; labels are no part of it."""
    now = {key: value for key, value in data.preprocessing(cfg).items() if key not in ("labels", "remap")}
    return [f"preprocessing differs: {key} was {then.get(key)!r} in training, is {value!r}" for key, value in now.items()
            if json.dumps(then.get(key)) != json.dumps(value)] if isinstance(then, dict) else []


def check_channels(scans, cfg):
    """The scans, or one line that names the first with other than cfg.in_channels channels."""
    for scan in scans:
        if scan.record["channels"] != cfg.in_channels:
            raise SystemExit(f"{scan.case['images'][0]}: the scan has {scan.record['channels']} channels, in_channels = {cfg.in_channels}")
    return scans
