"""What the four downstream tasks are, from the split of the cases to the score of one.

1. keys; 2. who trains, who chooses, who is reported; 3. sliding window; 4. networks and losses; 5. scores of
a case; 6. the four tasks; 7. predictions and scores of many cases. Back to a scan's own voxels: volumes.py.
Axis letters: b batch, c channel, k class, n cases, x y z voxels (RAS+: right, front, head)."""
import csv
import dataclasses
import fnmatch
import hashlib
import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import data
import losses
import metrics
import volumes
from model import UNETR, Classifier, SwinUNETR
from volumes import painted, sided, to_original

# -------------------------------------------------------------------------------------------------- 1. keys

@dataclasses.dataclass
class Config(data.Config):
    """What training and scoring of a task share; finetune.py and evaluate.py add their own."""
    name: str = "finetune"          # run folder below `runs`
    runs: str = "runs"
    seed: int = 3407                # released code
    task: str = "segmentation"      # segmentation, classification, reconstruction, translation
    # network; the other keys as in pretrain.py
    network: str = "swin_unetr"     # or "unetr", its ViT 16 x feature_size wide with num_heads[2] heads
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
    # what is predicted; regions {"WT": (1, 2, 3), ..} may overlap, sigmoid; {}: softmax over `labels`
    regions: dict = dataclasses.field(default_factory=dict)
    classes: dict = dataclasses.field(default_factory=dict)         # {class name in the data: class number}
    class_from: str = "{class}"     # a case's class name, from its pattern's fields or a column of `table`
    table: str = ""                 # csv below the data root with a row a case
    table_key: str = "{id}"         # what names the case in the table's columns ..
    case_key: str = "{id}"          # .. and in the case's fields, id and subject
    # who trains, who chooses the checkpoint, who is reported
    only: str | tuple = ()          # csv files: cases that none of them names are left out, of every part
    val: str | tuple = ()           # ids or patterns of ids; or csv files: the cases that every file names
    test: str | tuple = ()          # the same; "val": the cases that chose, as much of the field reports
    val_section: str = ""           # section of the datalist instead
    test_section: str = ""
    fold: int = -1                  # val = the datalist's entries of it, or subjects [fold::folds]; -1: none
    folds: int = 5
    test_share: float = 0.0         # share of the subjects, drawn by split_seed, where nothing else says
    val_share: float = 0.0          # the same, of the subjects that test leaves
    split_seed: int = 0
    label_fraction: float = 1.0     # of the training subjects; the 10 % lie within the 50 % (paper, Table 8)
    # inference
    overlap: float = 0.5            # of windows of `crop` voxels; MONAI (released code validates with 0.75)
    blend: str = "gaussian"         # or "constant"; MONAI
    windows: int = 4                # windows per forward
    flips: bool = False             # average over the mirrored copies: 8, or 4 where names tell sides
    data_range: float = 0.0         # of PSNR, SSIM, in preprocessed units; 0: each target's own range
    bf16: bool = True               # bfloat16 autocast on GPUs that have it, in training and in prediction
    downsample: str = "legacy"      # how a MONAI-style file merges patches, see model.load_weights


def check(cfg):
    """Refuse a configuration that cannot run, one line, before anything is read."""
    if not all(type(k) is int for k in cfg.labels) or not all(type(g) is tuple for g in cfg.regions.values()):
        raise SystemExit(f"labels = {cfg.labels}, regions = {cfg.regions}: expected {{id: name}} and {{name: "
                         "(id, ..)}, one id as (3,)")
    if not all(type(name) is str for name in cfg.classes):
        raise SystemExit(f"classes = {cfg.classes}: expected {{name: number}}, names as texts: {{'0': 0}}")
    names = names_of(cfg) if cfg.task == "segmentation" else list(cfg.classes)
    labels, numbers = sorted(cfg.labels), sorted(set(cfg.classes.values()))
    segments, classifies = cfg.task == "segmentation", cfg.task == "classification"
    unknown = [k for group in cfg.regions.values() for k in group if k not in cfg.labels]
    rules = [
        (cfg.task in TASKS, f"task = {cfg.task!r}, expected one of {', '.join(TASKS)}"),
        (not segments or labels, "segmentation needs `labels` = {id: name}"),
        (not segments or cfg.regions or labels == list(range(1, len(labels) + 1)),
         f"labels: ids must be 1 to {len(labels)} without gaps (rename with `remap`), found {labels}"),
        (not classifies or len(numbers) > 1, "classification needs `classes` = {name: number}"),
        (not classifies or numbers == list(range(len(numbers))),
         f"classes: numbers must be 0, 1, .. without gaps, found {numbers}"),
        (cfg.task not in ("reconstruction", "translation") or cfg.target or cfg.datalist,
         f"{cfg.task} needs `target`, the image to be predicted"),
        (all(c > 0 and c % 32 == 0 for c in cfg.crop) and max(cfg.crop) >= 64,
         f"crop = {cfg.crop}, expected multiples of 32, one of them at least 64"),
        (0 < cfg.label_fraction <= 1, f"label_fraction = {cfg.label_fraction}, expected above 0, at most 1"),
        (0 <= cfg.overlap < 1, f"overlap = {cfg.overlap}, expected 0 or more, below 1"),
        (cfg.blend in ("gaussian", "constant"), f"blend = {cfg.blend!r}, expected 'gaussian' or 'constant'"),
        (cfg.windows > 0 and cfg.data_range >= 0,
         f"windows = {cfg.windows}, data_range = {cfg.data_range}: expected above 0, and 0 or more"),
        (0 <= cfg.val_share < 1 and 0 <= cfg.test_share < 1,
         f"val_share = {cfg.val_share}, test_share = {cfg.test_share}, expected shares from 0 to below 1"),
        (len(set(names)) == len(names) and not {"mean", "id"} & set(names),
         f"names {names}: each must be another, and none 'mean' or 'id', as columns of the tables are"),
        (not unknown, f"regions: id {unknown[:1]} is not in `labels`"),
        (all(cfg.regions.values()), f"regions = {cfg.regions}: expected an id in each"),
        (cfg.datalist or not (cfg.val_section or cfg.test_section),
         "val_section and test_section are sections of a `datalist`, which is not given"),
        (not cfg.test_section or not cfg.test, f"test_section = {cfg.test_section!r}, test = {cfg.test!r}: "
         "which of them is reported? Give --test='()' for the section"),
        ((cfg.fold >= 0) + bool(cfg.val) + bool(cfg.val_section) < 2, f"fold = {cfg.fold}, val = {cfg.val!r}"
         f", val_section = {cfg.val_section!r}: which of them chooses? Clear the others"),
        (not cfg.test_share or cfg.test != "val", f"test_share = {cfg.test_share} and test = 'val': give "
         "--test='()' for a share, --test_share=0 for the cases that choose"),
    ]
    if wrong := [text for fine, text in rules if not fine]:
        raise SystemExit(wrong[0])


# ------------------------------------------------------------ 2. who trains, who chooses, who is reported

def split_cases(cfg, needed=("train", "val", "test")):
    """{"train": [case], "val": [case], "test": [case]}, with a number under "class" of classification. A line
    for subjects on two sides, a needed part that is empty or lacks what the task asks. test = "val": val."""
    parts = {"train": data.find_cases(cfg)}
    for part, section in (("val", cfg.val_section), ("test", cfg.test_section)):
        if section:
            parts[part] = data.find_cases(cfg, section)
    if cfg.only:
        tables = [_table(data.root(cfg) / file, cfg.table_key) for file in data.several(cfg.only)]
        listed = set().union(*tables)
        for part, cases in parts.items():
            parts[part] = [case for case in cases if _case_key(case, cfg) in listed]
    everyone = parts["train"]
    if cfg.test and cfg.test != "val":
        _move(parts, "test", _named(everyone, cfg.test, cfg, everyone))
    if cfg.val:
        _move(parts, "val", _named(parts["train"], cfg.val, cfg, everyone))
    elif cfg.fold >= 0:
        _move_fold(parts, everyone, cfg)
    for part, share in (("test", cfg.test_share), ("val", cfg.val_share)):
        if share and part not in parts:
            _move(parts, part, _share(parts["train"], share, part, cfg))
    if cfg.test == "val":
        parts["test"] = parts.get("val", [])
    if cfg.task == "classification":
        for group in parts.values():
            for case, k in zip(group, _classes(group, cfg)):
                case["class"] = k
        there = {case["class"] for case in parts["train"]}
        if "train" in needed and (lost := {*cfg.classes.values()} - there):
            raise SystemExit(f"classes: no case of {sorted(lost)} is left for train; look at the split")
    kept = _share(parts["train"], cfg.label_fraction, "labels", cfg)
    parts["train"] = [case for case in parts["train"] if case["id"] in kept]
    _check_parts(parts, cfg, needed)
    return parts


USED = {"train": "subjects", "val": "chose"}    # where a checkpoint of finetune.py keeps a part's subjects


def used_by(then, part, cases, cfg):
    """Those of `cases` that trained ("train") or chose ("val") the checkpoint `then`: by their files and,
    where the data set has the name of its own, by their subjects. None of what finetune.py did not write."""
    if then.get("format") != "s2dc/finetune":
        return []
    subjects = then.get(USED[part], ()) if then["config"].get("dataset") == cfg.dataset else ()
    files = set(then.get("files", {}).get(part, ()))
    return [case for case in cases if case["subject"] in subjects
            or any(data.known_as(file, cfg) & files for file in case["images"])]


def _move(parts, part, ids):
    parts[part] = [case for case in parts["train"] if case["id"] in ids]
    parts["train"] = [case for case in parts["train"] if case["id"] not in ids]


def _move_fold(parts, everyone, cfg):
    """Entries of cfg.fold choose, or every cfg.folds-th subject; a test is drawn first, one for all folds."""
    if cfg.test_share and "test" not in parts:
        _move(parts, "test", _share(parts["train"], cfg.test_share, "test", cfg))
        everyone = parts["train"]
    if any("fold" in case for case in everyone):
        return _move(parts, "val", {case["id"] for case in everyone if case.get("fold") == cfg.fold})
    if cfg.fold >= cfg.folds:
        raise SystemExit(f"fold = {cfg.fold}, expected 0 to {cfg.folds - 1} (folds = {cfg.folds})")
    subjects = sorted({case["subject"] for case in everyone})[cfg.fold::cfg.folds]
    _move(parts, "val", {case["id"] for case in everyone if case["subject"] in subjects})


def _named(cases, which, cfg, everyone):
    """Ids of the cases, what is left of everyone, that `which` names: ids and patterns of ids, or csv files
    (cases that all name)."""
    which = data.several(which)
    if which[0].endswith(".csv"):
        tables = [_table(data.root(cfg) / file, cfg.table_key) for file in which]
        named = {case["id"] for case in cases if all(_case_key(case, cfg) in table for table in tables)}
    else:
        if lost := [name for name in which if not fnmatch.filter([case["id"] for case in everyone], name)]:
            raise SystemExit(f"the split names {', '.join(map(repr, lost[:4]))}, no case has such an id; "
                             f"there are: {', '.join(case['id'] for case in everyone[:4])} ..")
        if gone := [name for name in which if not fnmatch.filter([case["id"] for case in cases], name)]:
            raise SystemExit(f"val names {', '.join(map(repr, gone[:4]))}, but test has these cases")
        named = {case["id"] for case in cases if any(fnmatch.fnmatch(case["id"], name) for name in which)}
    if not named:
        example = f"an id here is {cases[0]['id']!r}" if cases else "another part of the split has taken all"
        raise SystemExit(f"{', '.join(which[:3])} names none of the {len(cases)} cases; {example}")
    return named


def _share(cases, share, purpose, cfg):
    """Ids of the cases of a share of the subjects, of each class by itself, at least one subject.
    Seed and purpose fix an order of subjects, of which the first are taken: a smaller share lies in a larger.
    A subject with several classes belongs to the largest number, so that nobody is divided."""
    own = {}
    for case, k in zip(cases, _classes(cases, cfg) if cfg.task == "classification" else [0] * len(cases)):
        own[case["subject"]] = max(k, own.get(case["subject"], k))
    drawn = set()
    for k in sorted(set(own.values())):
        mine = {hashlib.sha256(f"{cfg.split_seed} {purpose} {s}".encode()).hexdigest(): s
                for s in own if own[s] == k}
        order = [mine[key] for key in sorted(mine)]
        drawn.update(order[:max(1, round(share * len(order)))])
    return {case["id"] for case in cases if case["subject"] in drawn}


def _table(path, key):
    """{key: [row]} of a csv."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such table")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows, found = list(csv.DictReader(file)), {}
    except (UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path}: not a csv in UTF-8 ({error})") from None
    try:
        for row in rows:
            found.setdefault(key.format_map(row), []).append(row)
        return found
    except KeyError as error:
        raise SystemExit(f"{path}: no column {error}; columns: {', '.join(rows[0])}") from None


def _case_key(case, cfg):
    fields = case.get("fields", {}) | dict(id=case["id"], subject=case["subject"])
    try:
        return cfg.case_key.format_map(fields)
    except KeyError as error:
        raise SystemExit(f"case_key = {cfg.case_key!r}: no {error} in {', '.join(fields)}") from None


def _classes(cases, cfg):
    """The class number of each case."""
    table = _table(data.root(cfg) / cfg.table, cfg.table_key) if cfg.table else None
    numbers = []
    for case in cases:
        rows = [case.get("fields", {})]
        if table is not None and not (rows := table.get(_case_key(case, cfg))):
            raise SystemExit(f"{case['images'][0]}: {cfg.table} has no row {_case_key(case, cfg)!r}")
        try:
            name, *others = {cfg.class_from.format_map(row): None for row in rows}
        except KeyError as error:
            known = ", ".join(rows[0]) or "the pattern"
            raise SystemExit(f"class_from = {cfg.class_from!r}: no {error} in {known}") from None
        if others:
            raise SystemExit(f"{cfg.table}: {len(rows)} rows {_case_key(case, cfg)!r}, of {name} and "
                             f"{others[0]}; give a table_key and a case_key that tell them apart")
        if name not in cfg.classes:
            raise SystemExit(f"{case['images'][0]}: class {name!r} is not declared; "
                             f"classes: {', '.join(cfg.classes)}")
        numbers.append(cfg.classes[name])
    return numbers


def _check_parts(parts, cfg, needed):
    need = {"segmentation": "label", "reconstruction": "targets", "translation": "targets"}.get(cfg.task)
    for part in needed:
        if not parts.get(part):
            shares = f"val_share = {cfg.val_share}, test_share = {cfg.test_share}, fold = {cfg.fold}"
            raise SystemExit(f"no case is left for {part}; the config gives val = {cfg.val!r}, test = "
                             f"{cfg.test!r}, {shares}")
        bare = [case["images"][0] for case in parts[part] if need and not case[need]]
        if bare:
            raise SystemExit(f"{bare[0]}: a {part} case without {need.rstrip('s')}")
    for a, b in [("train", "val"), ("train", "test")] + [("val", "test")] * (cfg.test != "val"):
        both = set.intersection(*({case["subject"] for case in parts.get(part, ())} for part in (a, b)))
        if both:
            raise SystemExit(f"{len(both)} subjects are in {a} and in {b}: {', '.join(sorted(both)[:4])}")


# ---------------------------------------------------------------------------------------- 3. sliding window

@torch.no_grad()
def sliding_window(predict, volume, window, overlap, batch, blend="gaussian", device=None, store=None,
                   pad=0.0):
    """Run `predict` on overlapping windows and blend what it says into one map of the whole volume.

    predict  (n, c, *window) -> (n, k, *window), n <= batch; runs on `device`; keeps no hold of its input
    volume   (b, c, x, y, z), on any device: windows are copied from where it lies
    window   voxels, one number or three;   overlap  share of the window in [0, 1), one number or three
    batch    windows per call of predict
    blend    "gaussian": weight exp(-d^2 / 2 sigma^2) >= 1e-3, sigma = window / 8; "constant": plain mean
    device   where predict runs, default the volume's
    store    "device", "cpu", or None: on the device if, after the first batch, 9/10 of its free memory hold
             the output twice (who makes probabilities of it needs another), else on the CPU
    pad      value around a volume smaller than the window (half before, half after; cropped off again)
    returns  (b, k, x, y, z), float32 or wider, where it was stored

    Beside the output it holds one batch of windows and its prediction. Grid and weights are those of MONAI's
    sliding_window_inference (sigma_scale 0.125), so both agree. Raises ValueError for shapes, overlap, blend
    or store that do not fit."""
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
            total[i, :, x, y, z].addcmul_(p, weight)                # in place, nothing allocated per window
        part = p = None                                             # or the next batch would lie beside it
    total /= _summed(weight, starts, volume.shape[2:])
    x, y, z = (slice(b, b + s) for b, s in zip(before, size))
    return total[:, :, x, y, z]


def three(value):
    """One number for all three axes, or a number per axis."""
    value = (value,) * 3 if isinstance(value, int | float) else tuple(value)
    if len(value) != 3:
        raise ValueError(f"expected one number or three, found {value}")
    return value


def _grid(volume, window, overlap, batch, pad):
    """The volume, padded to hold a window; the margin before it; first voxels of the windows per axis."""
    size = volume.shape[2:]
    if volume.ndim != 5:
        raise ValueError(f"sliding_window: expected volume (b, c, x, y, z), found {tuple(volume.shape)}")
    if min(window) < 1 or batch < 1 or not all(0 <= o < 1 for o in overlap):
        raise ValueError(f"sliding_window: expected window and batch >= 1, 0 <= overlap < 1, "
                         f"found {window}, {batch}, {overlap}")
    missing = [max(w - s, 0) for w, s in zip(window, size)]
    before = [m // 2 for m in missing]
    if any(missing):                                                # F.pad counts from the last axis
        margins = [side for m, b in zip(missing[::-1], before[::-1]) for side in (b, m - b)]
        volume = F.pad(volume, margins, value=pad)
    starts = []
    for s, w, o in zip(volume.shape[2:], window, overlap):          # a fixed step; the last window moves back
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
    """(x, y, z) sum of all windows' weights; those that start at one x form a slab, the same for every x."""
    slab, summed = weight.new_zeros(len(weight), *size[1:]), weight.new_zeros(size)
    for y, z in itertools.product(*starts[1:]):
        slab[:, y:y + weight.shape[1], z:z + weight.shape[2]] += weight
    for x in starts[0]:
        summed[x:x + len(slab)] += slab
    return summed


def _output(part, n, volume, window, store):
    """Zeros for the whole volume, placed after the first batch, when the network has taken its memory."""
    if part.ndim != 5 or part.shape[0] != n or tuple(part.shape[2:]) != window:
        raise ValueError(f"sliding_window: predict must return ({n}, classes, *{window}), "
                         f"found {tuple(part.shape)}")
    if store not in (None, "device", "cpu"):
        raise ValueError(f"sliding_window: store must be 'device', 'cpu' or None, found {store!r}")
    shape = (len(volume), part.shape[1], *volume.shape[2:])
    dtype = torch.promote_types(part.dtype, torch.float32)
    if store is None and part.device.type == "cuda":
        free = torch.cuda.mem_get_info(part.device)[0]
        store = "device" if 2 * np.prod(shape) * dtype.itemsize < 0.9 * free else "cpu"
    return torch.zeros(shape, dtype=dtype, device=part.device if store == "device" else "cpu")


# -------------------------------------------------------------------------------- 4. networks and losses

def swin(cfg):
    """Arguments of the encoder."""
    keys = ("feature_size", "depths", "num_heads", "window_size", "v2", "merge", "checkpointing")
    return {key: getattr(cfg, key) for key in keys}


def _dense_network(cfg, outputs):
    if cfg.network == "unetr":      # at feature_size 48 the paper's: ViT-B, and a decoder of 16 channels
        f = cfg.feature_size
        return UNETR(cfg.in_channels, outputs, cfg.crop, max(1, f // 3), 16 * f, cfg.num_heads[2], 64 * f,
                     cfg.checkpointing)
    return SwinUNETR(cfg.in_channels, outputs, **swin(cfg))


def _segmentation_network(cfg):
    return _dense_network(cfg, len(cfg.regions) or 1 + max(cfg.labels))


def _classification_network(cfg):
    return Classifier(cfg.in_channels, 1 + max(cfg.classes.values()), **swin(cfg))


def _image_network(cfg):
    """One output per target image; with cfg.residual it starts as the identity."""
    network = _dense_network(cfg, max(1, len(data.several(cfg.target))))
    for p in network.out.parameters() if cfg.residual else ():      # the correction starts at none
        torch.nn.init.zeros_(p)
    return network


def forward(network, image, cfg):
    """float32 output, (b, c, x, y, z) or (b, k) for classes; cfg.residual: added to the first channels."""
    output = network(image).float()
    return output + image[:, :output.shape[1]] if cfg.residual else output


def _segmentation_loss(output, truth, cfg):
    """Dice + cross-entropy of logits (b, k, x, y, z): softmax over classes, or sigmoid per region."""
    label = truth["label"]
    if cfg.regions:
        masks = [torch.isin(label, label.new_tensor(group)) for group in cfg.regions.values()]
        return losses.dice_bce(output, torch.cat(masks, 1).float())
    return losses.dice_ce(output, label, balance=cfg.balance)


def _classification_loss(output, truth, cfg):
    return F.cross_entropy(output.float(), truth["class"])


def _reconstruction_loss(output, truth, cfg):
    return losses.reconstruction_loss(output, truth["target"], cfg.data_range or 1.0)


def _translation_loss(output, truth, cfg):
    """L1 + L2 over the tissue of the target."""
    mask = losses.above_background(truth["target"], truth["target_fill"])
    return losses.masked_l1_l2(output, truth["target"], mask)


def _probabilities(output, cfg):
    """Of each region by itself, or of classes that exclude each other."""
    return output.sigmoid() if cfg.task == "segmentation" and cfg.regions else output.softmax(1)


# ---------------------------------------------------------------------------------- 5. scores of a case
#
# Each score: ready output of a case, scan, cfg, extra -> {grid: {metric: {part: number}}}. `extra` names what
# a report wants beyond what chooses a checkpoint: "original", the scores of segmentation on the scan's own
# voxels too (of the ids that are written, the truth as stored); "hd95", Hausdorff distances;
# "lesion_volumes", AutoPET's false positive and negative volumes; "ssim" of predicted images.


def names_of(cfg):
    """Names of the output channels that are scored."""
    return list(cfg.regions) if cfg.regions else [str(cfg.labels[k]) for k in sorted(cfg.labels)]


def class_names(cfg):
    """One name per class number, the first that the config gives it."""
    first = {number: name for name, number in reversed(cfg.classes.items())}
    return [first[number] for number in sorted(first)]


def masks_of(ready, cfg):
    """(k, x, y, z) bool of the scored classes or regions, of probabilities (k, x, y, z) or ids (x, y, z)."""
    if ready.ndim == 4:
        if cfg.regions:
            return ready > 0.5
        ready = ready.argmax(0)
    if cfg.regions:
        return torch.stack([torch.isin(ready, torch.tensor(group)) for group in cfg.regions.values()])
    return torch.stack([ready == k for k in sorted(cfg.labels)])


def on_scan(ready, scan, affine, shape, cfg):
    """(k, x, y, z) bool on the scan's own voxels: each channel goes back linearly, the largest wins."""
    if cfg.regions:
        return torch.stack([to_original(p, scan.affine, affine, shape, 1) > 0.5 for p in ready])
    best = to_original(ready[0], scan.affine, affine, shape, 1, fill=1.0)
    ids = torch.zeros(tuple(shape), dtype=torch.uint8 if len(ready) <= 256 else torch.int16)
    for k in range(1, len(ready)):
        p = to_original(ready[k], scan.affine, affine, shape, 1)
        ids[p > best] = k
        best = torch.maximum(best, p)
    return masks_of(ids, cfg)


def score_segmentation(ready, scan, cfg, extra=()):
    """Dice per class on the preprocessed grid, and what `extra` names."""
    truth = torch.from_numpy(scan.open("label")[0].astype(np.int64))
    grids = {"preprocessed": (masks_of(ready, cfg), masks_of(truth, cfg), scan.spacing)}
    if "original" in extra:
        stored, affine = data.read_stored(scan.case["label"], label=True)
        own = torch.from_numpy(volumes.label_ids(scan.case["label"], stored, cfg).astype(np.int64))
        file = painted(on_scan(ready, scan, affine, stored.shape, cfg), cfg)     # as it is written
        grids["original"] = (masks_of(file, cfg), masks_of(own, cfg), data.spacing_of(affine))
    return {grid: _score_masks(p.numpy(), t.numpy(), spacing, names_of(cfg), extra)
            for grid, (p, t, spacing) in grids.items()}


def _score_masks(predicted, true, spacing, names, extra):
    """{metric: {part: number}} of masks (k, x, y, z); means leave out classes without a number."""
    dice = dict(zip(names, metrics.dice_regions(predicted, true).tolist()))
    scores = {"dice": dice | {"mean": metrics.mean(list(dice.values()))}}
    if "hd95" in extra:
        far = {name: metrics.hausdorff95(p, t, spacing) for name, p, t in zip(names, predicted, true)}
        finite = [v for v in far.values() if np.isfinite(v)]
        scores["hd95"] = far | {"mean": metrics.mean(finite)}
    if "lesion_volumes" in extra:
        found = [metrics.false_volumes(p, t, spacing) for p, t in zip(predicted, true)]
        for k, metric in enumerate(("false_positive_ml", "false_negative_ml")):
            scores[metric] = {name: pair[k] for name, pair in zip(names, found)}
        scores["dice_of_positive"] = {name: dice[name] for name, t in zip(names, true) if t.any()}
    return scores


def score_classification(ready, scan, cfg, extra=()):
    """Probabilities (k,) of a case and its true class, from which `summarise` scores all cases."""
    probability = {str(k): float(p) for k, p in enumerate(ready)}
    return {"scans": {"probability": probability, "class": {"true": scan.case["class"]}}}


def file_unit(case, cfg):
    """(slope, offset): preprocessed intensities times slope plus offset are in the unit of the case's file;
    1 and 0 of a z-score, which cannot be undone."""
    own = data.ruled(case, cfg)
    low, high = own.window if own.intensity in ("window", "scale") else (0.0, 1.0)
    return high - low, low


def score_image(ready, scan, cfg, extra=()):
    """PSNR, NMSE and MAE of a predicted image on the preprocessed grid, and what `extra` names. MAE is in the
    unit of the file, HU of a CT, or in deviations of a z-score; PSNR in the units of the preprocessed image.

    Parts: the whole volume; "pasted", the background copied from the target, much as the released code (which
    z-scores anew and has the larger range of both: a stroke's T2 +0.7 dB, +0.02 SSIM); the "tissue",
    no SSIM; the "input" as it is; "constant", the tissue's mean for all. See volumes.background_of."""
    unit, _ = file_unit(scan.case, cfg)
    truth = torch.from_numpy(np.ascontiguousarray(scan.open("target"))).float()
    image = torch.from_numpy(np.ascontiguousarray(scan.open())).float()[:1].expand_as(truth)
    inside = losses.above_background(truth[None], [scan.record["target_fill"]])[0]
    if not inside.any():
        raise SystemExit(f"{scan.case['targets'][0]}: no voxel lies 0.01 above air once scaled by "
                         f"intensity = {cfg.intensity!r}, window = {cfg.window}; is it in another unit?")
    reach = cfg.data_range or float(truth.max() - truth.min())
    guesses = {"whole": ready, "pasted": torch.where(inside, ready, truth), "tissue": ready, "input": image,
               "constant": truth[inside].mean().expand_as(truth)}
    scores = {"psnr": {}, "nmse": {}, "mae": {}}
    if "ssim" in extra:
        scores["ssim"] = {}
    for part, guess in guesses.items():
        a, b = (guess[inside], truth[inside]) if part in ("tissue", "constant") else (guess, truth)
        scores["psnr"][part], scores["nmse"][part] = metrics.psnr(a, b, reach), metrics.nmse(a, b)
        scores["mae"][part] = unit * metrics.mae(a, b)
        if "ssim" in extra and part not in ("tissue", "constant"):
            each = [metrics.ssim(p, t, reach) if min(t.shape) >= 7 else np.nan      # its window
                    for p, t in zip(guess.numpy(), truth.numpy())]
            scores["ssim"][part] = float(np.mean(each))
    return {"preprocessed": scores | {"data_range": {"used": reach}}}


# ------------------------------------------------------------------------------------- 6. the four tasks

@dataclasses.dataclass
class Task:
    """All that differs between the four tasks."""
    network: Callable               # cfg -> network
    loss: Callable                  # output, truth, cfg -> (); truth: a batch of data.Crops, moved
    ready: Callable                 # output, cfg -> probabilities, or the predicted image itself
    score: Callable                 # as in 5.
    best: tuple                     # grid, metric, part whose largest mean over val chooses the checkpoint


TASKS = {
    "segmentation": Task(_segmentation_network, _segmentation_loss, _probabilities,
                         score_segmentation, best=("preprocessed", "dice", "mean")),
    "classification": Task(_classification_network, _classification_loss, _probabilities,
                           score_classification, best=("scans", "balanced_accuracy", "all")),
    "reconstruction": Task(_image_network, _reconstruction_loss, lambda output, cfg: output,
                           score_image, best=("preprocessed", "psnr", "whole")),
    "translation": Task(_image_network, _translation_loss, lambda output, cfg: output,
                        score_image, best=("preprocessed", "psnr", "tissue")),
}


# ------------------------------------------------------------------- 7. predictions and scores of many cases

@torch.no_grad()
def predict(network, scan, cfg, device):
    """Ready output of one cached scan on its preprocessed grid, (k, x, y, z), or (k,) of classes, on the CPU.

    With cfg.flips the mean over the 8 mirrored copies, or those 4 that keep sides which the names tell."""
    task, total, copies = TASKS[cfg.task], 0, [()]
    if cfg.flips:
        mirrored = (3, 4) if sided(cfg) else (2, 3, 4)
        copies = [axes for n in range(4) for axes in itertools.combinations(mirrored, n)]
    volume = torch.from_numpy(np.ascontiguousarray(scan.open())).float()[None]
    fill = rearrange(torch.from_numpy(scan.fill), "c -> c 1 1 1")   # each channel's own, as in training
    bf16 = cfg.bf16 and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def above_fill(x):
        return forward(network, x + fill.to(device), cfg)
    network.eval()
    for axes in copies:
        seen = volume.flip(axes)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if cfg.task == "classification":
                output = forward(network, seen.to(device), cfg)
            else:
                output = sliding_window(above_fill, seen - fill, cfg.crop, cfg.overlap, cfg.windows,
                                        cfg.blend, device)
        output = task.ready(output.float(), cfg)
        if cfg.task != "classification":
            output = output.flip(axes)
        total = total + output.cpu()
    return (total / len(copies))[0]


def score_case(network, scan, cfg, device, extra=()):
    """Ready output of one case, and its row {"id", "subject", "scores"}."""
    ready = predict(network, scan, cfg, device)
    scores = TASKS[cfg.task].score(ready, scan, cfg, extra)
    return ready, dict(id=scan.id, subject=scan.subject, scores=scores)


def summarise(rows, cfg):
    """{grid: {metric: {part: {"mean", "low", "high", "cases"}}}}, low and high a bootstrap 95 % interval."""
    if cfg.task == "classification":
        return {"scans": _summarise_classes(rows, cfg)}
    table = {}
    for grid, scored in rows[0]["scores"].items():
        table[grid] = {}
        for metric in scored:
            each = [row["scores"][grid][metric] for row in rows]
            parts = dict.fromkeys(part for scores in each for part in scores)
            table[grid][metric] = {p: _summary([v.get(p, np.nan) for v in each], rows, metric) for p in parts}
    return table


def _summary(values, rows, metric):
    values = np.array(values, float)
    missed = np.isinf(values) & (metric == "hd95")                  # one of the two masks was empty
    values[missed] = np.nan
    mean, low, high = metrics.bootstrap_mean(values, 0, [row["subject"] for row in rows])
    found = dict(mean=mean, low=low, high=high, cases=int((~np.isnan(values)).sum()))
    return found | ({"missed": int(missed.sum())} if missed.any() else {})


def _summarise_classes(rows, cfg):
    probabilities = np.array([list(row["scores"]["scans"]["probability"].values()) for row in rows])
    truth = np.array([row["scores"]["scans"]["class"]["true"] for row in rows])
    scores = metrics.classification_scores(probabilities, truth)
    table = {"accuracy": {"all": _summary(probabilities.argmax(1) == truth, rows, "accuracy")}}
    for metric in ("balanced_accuracy", "majority_accuracy", "auc_mean"):
        table[metric] = {"all": dict(mean=scores[metric], cases=len(rows))}
    for metric in ("recall", "auc"):
        table[metric] = {name: dict(mean=value, cases=int((truth == k).sum()))
                         for k, (name, value) in enumerate(zip(class_names(cfg), scores[metric]))}
    return table | {"confusion": scores["confusion"]}


def main_score(rows, cfg):
    """The number that chooses a checkpoint: larger is better."""
    grid, metric, part = TASKS[cfg.task].best
    return summarise(rows, cfg)[grid][metric][part]["mean"]


def check_channels(scans, cfg):
    """The scans, or one line that names the first with other than cfg.in_channels channels, or with more or
    fewer targets than the network has outputs."""
    outputs = max(1, len(data.several(cfg.target)))
    for scan in scans:
        if scan.record["channels"] != cfg.in_channels:
            raise SystemExit(f"{scan.case['images'][0]}: the scan has {scan.record['channels']} channels, "
                             f"in_channels = {cfg.in_channels}")
        if (n := len(scan.case["targets"])) not in (0, outputs):
            raise SystemExit(f"{scan.case['images'][0]}: the scan has {n} targets, expected {outputs}, as "
                             f"many as `target` names ({cfg.target!r})")
    return scans
