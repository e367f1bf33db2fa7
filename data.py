"""From files on disk to tensors on the device: find, preprocess, cache, sample, move, match, jitter.

Also a program: `python data.py configs/x.py` checks all files of a config, prints a summary, fills the cache;
`python data.py --plan="folder/*.nii.gz"` writes such a config, see plan.py.

Points are in voxel units, voxel centres at integers; patch k of edge p has its centre at (k + 1/2) p - 1/2.
H is a 4x4 matrix that sends a point of V to the point of V' that shows the same tissue. Volumes are RAS+.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import threading
import time
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from scipy import ndimage

import configs
import volumes
from volumes import VolumeError, read_stored, spacing_of
from volumes import read_volume as read_volume


@dataclasses.dataclass
class Config:
    """Keys of files and preprocessing; each script adds its own. Sources: paper, released code, ours."""
    # where the files are
    data: str = "data"              # root of all patterns, or S2DC_DATA; --data goes before that
    scans: str | tuple = ()         # pre-training: patterns, "set/{subject}/*.nii.gz", a scan a file
    image: str | tuple = ()         # or with fields, "imagesTr/img{id}.nii.gz"; several: a case's channels
    label: str = ""                 # pattern with the same fields, an integer class map
    target: str | tuple = ()        # the same, the image(s) to be predicted (translation, reconstruction)
    datalist: str = ""              # or an MSD dataset.json / MONAI datalist below the root; needs `section`
    section: str = "training"       # the list inside it
    datalist_label: str = "label"   # key of an entry's class map; "" where "label" means something else
    datalist_target: str = "target" # key of an entry's image(s) to be predicted
    exclude: str | tuple = ()       # ids (or patterns of ids) left out on purpose
    labels: dict = dataclasses.field(default_factory=dict)  # {id: name} of all but background; {}: any id
    remap: dict = dataclasses.field(default_factory=dict)   # {id in the file: id in `labels`}
    # preprocessing: everything here is part of the cache's key
    dataset: str = "scans"          # first part of the cache folder's name
    intensity: str = "window"       # "window" clips (CT), "scale" does not: [0, 1]; "zscore": MRI, PET
    window: tuple = (-1000.0, 1000.0)   # HU or the file's unit; released code (fine-tuning, BTCV: -175, 250)
    zscore_over: str = "foreground" # or "volume" (released code); "robust": 0.5th to 99.5th percentile of it
    foreground: float = -500.0      # above it (file's unit) is foreground; ours for CT (released code: -1000)
    crop_foreground: bool = True    # cut to the bounding box of the foreground; released code
    spacing: tuple = ()             # mm per voxel along x y z, () keeps each scan's own; released code: own
    resize: tuple = ()              # voxels along x y z to stretch to, () keeps the size (classification)
    # several modalities in one set: {pattern of ids: {intensity, window, spacing, ..}}, each scan by its own
    rules: dict = dataclasses.field(default_factory=dict)
    cache: str = "cache"            # folder of the memory-mapped arrays
    workers: int = 4                # processes that fill the cache, and that load batches for each rank


# ------------------------------------------------------------------------------------------------- find cases

def root(cfg):
    """Folder of the data."""
    return Path(cfg.data)


def known_as(path, cfg):
    """{12 digits} of a file's size and its place below the data root, and on this machine: enough to tell
    later whether it was seen, on another machine or below another root."""
    places = os.path.relpath(path, root(cfg)), os.path.realpath(path)
    size = os.path.isfile(path) and os.path.getsize(path)
    return {hashlib.sha256(f"{place} {size}".encode()).hexdigest()[:12] for place in places}


def find_cases(cfg, section=None, base=None):
    """List of {"id", "subject", "images": [path], "label": path or None, "targets": [path]} in stable order.

    Ids are unique; "fields" are there too where patterns have them. `section` of a datalist, default
    cfg.section; `base` folder, default the data root. Raises SystemExit with one line when a pattern finds
    nothing, a channel is missing or an id comes twice. `{field}` in a pattern stands for a part of one file
    or folder name, from the left as little as fits; {subject} names the person, otherwise the id does.
    """
    ways = [key for key in ("scans", "image", "datalist") if getattr(cfg, key)]
    if len(ways) != 1:
        raise SystemExit("exactly one of the keys scans, image, datalist must say where the files are, "
                         f"found {ways or 'none'}")
    base = base or root(cfg)
    if ways == ["datalist"]:
        cases = _from_datalist(base / cfg.datalist, section or cfg.section, cfg)
    elif ways == ["scans"]:
        cases = [dict(id=plain_id(path.relative_to(base)), images=[str(path)], label=None, targets=[],
                      fields=fields)
                 for pattern in several(cfg.scans) for path, fields in _found(base, pattern)]
    else:
        cases = _from_patterns(base, cfg)
    seen = {}
    for case in cases:
        name, file = case["id"], case["images"][0]
        if name in seen:
            raise SystemExit(f"two cases have the id {name!r}: {seen[name]} and {file}")
        seen[name] = file
        case.setdefault("subject", case.get("fields", {}).get("subject", name))
    for pattern in several(cfg.exclude):
        if not fnmatch.filter(seen, pattern):
            raise SystemExit(f"exclude names {pattern!r}, no case has that id; "
                             f"there are: {', '.join(list(seen)[:5])} ..")
    kept = [case for case in cases if not any(fnmatch.fnmatch(case["id"], p) for p in several(cfg.exclude))]
    if not kept:
        raise SystemExit(f"exclude = {cfg.exclude!r} leaves none of the {len(cases)} cases")
    lost = [(case, file) for case in kept for file in case.pop("lost", ())]
    if lost:
        lines = [f"{file}: no such file, expected beside {case['images'][0]}" for case, file in lost]
        names = ", ".join(dict.fromkeys(repr(case["id"]) for case, _ in lost))
        lines.append(f"{len(lines)} files are missing; add them, or leave their cases out: "
                     f"exclude = ({names},)")
        raise SystemExit("\n".join(lines))
    return kept


def several(value):
    """A text alone, or some, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def plain_id(path):
    """A path without its ending, and with nothing in it that a file name cannot hold."""
    name = re.sub(r"\.(nii|nii\.gz|mha|mhd|nrrd)$", "", str(path).strip("/"))
    return re.sub(r"[^\w.\-]+", "__", name)


def _found(base, pattern):
    """(path, {field: text}) of every file, or folder when the pattern ends in '/', that fits; never empty."""
    if pattern.startswith("/"):
        raise SystemExit(f"pattern {pattern!r}: expected one below data = {str(base)!r}; or set data = '/'")
    expression, field, wild = "", r"\{[^\W\d]\w*\}", {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    for part in re.split(rf"({field}|\*\*/|\*|\?|\[[^\]]+\])", pattern.rstrip("/")):
        name = part[1:-1]
        if re.fullmatch(field, part):
            expression += f"(?P={name})" if f"(?P<{name}>" in expression else f"(?P<{name}>[^/]+?)"
        elif part.startswith("["):
            expression += part.replace("[!", "[^")
        else:
            expression += wild.get(part, re.escape(part))
    hits = []
    for path in sorted(base.glob(re.sub(field, "*", pattern.rstrip("/")))):
        fits = re.fullmatch(expression, path.relative_to(base).as_posix())
        image = not path.name.startswith("._")                      # ._x: what macOS leaves beside an image
        if fits and path.is_dir() == pattern.endswith("/") and image:
            hits.append((path, fits.groupdict()))
    if not hits:
        if not base.is_dir():
            raise SystemExit(f"data = {str(base)!r}: no such folder; give --data=.. (S2DC_DATA goes before "
                             "what a config says)")
        sought = base / re.split(r"[{*?]", pattern)[0]
        folder = next(p for p in (sought, *sought.parents) if p.is_dir())
        there = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
        more = f" .. ({len(there)} entries)" if len(there) > 8 else ""
        raise SystemExit(f"pattern {pattern!r} finds nothing below {base}; {folder} holds: "
                         f"{', '.join(there[:8]) or 'nothing'}{more}")
    return hits


def _from_patterns(base, cfg):
    first, *others = several(cfg.image)
    cases = []
    for path, fields in _found(base, first):
        files = [str(path)]
        for pattern in (*others, *([cfg.label] if cfg.label else []), *several(cfg.target)):
            try:
                file = base / pattern.format(**fields)
            except (KeyError, IndexError, ValueError) as error:
                raise SystemExit(f"pattern {pattern!r}: {{field}} must be one of the first image pattern "
                                 f"{first!r} ({volumes.one_line(error)})") from None
            files.append(str(file))
        n = 1 + len(others)
        label = files.pop(n) if cfg.label else None
        case = dict(id=plain_id("_".join(fields.values()) or path.relative_to(base)), fields=fields,
                    images=files[:n], label=label, targets=files[n:])
        cases.append(case | dict(lost=[file for file in map(str, _files(case)) if not Path(file).exists()]))
    return cases


def _from_datalist(path, section, cfg):
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such datalist") from None
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON ({volumes.one_line(error)})") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{path}: holds a JSON {type(content).__name__}, "
                         f"expected an object with the list {section!r}")
    entries = content.get(section)
    if not isinstance(entries, list) or not entries:
        lists = [key for key, value in content.items() if isinstance(value, list) and value]
        raise SystemExit(f"{path}: no entries under {section!r}; lists there: {', '.join(lists) or 'none'}")
    cases = [_from_entry(path, section, {"image": e} if isinstance(e, str) else e, cfg) for e in entries]
    return [case for case in cases if not Path(case["images"][0]).name.startswith("._")]


def _from_entry(path, section, entry, cfg):
    """The case of an entry of a datalist; ids become plain names, for files are named after them."""
    if not isinstance(entry, dict) or "image" not in entry:
        has = f"its keys: {', '.join(entry)}" if isinstance(entry, dict) else f"it is {entry!r:.60}"
        raise SystemExit(f"{path}: an entry of {section!r} has no key 'image', {has}")
    images, targets = entry["image"], entry.get(cfg.datalist_target) or ()
    for key, value in (("image", images), (cfg.datalist_target, targets)):
        texts = [value] if isinstance(value, str) else value
        fine = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
        if not fine or (key == "image" and not value):
            raise SystemExit(f"{path}: {key!r} of an entry of {section!r} is {value!r:.60}, "
                             "expected a file name or a list of them")
    for key in ("id", "subject", "fold"):
        if not isinstance(entry.get(key, 0), (str, int)):
            raise SystemExit(f"{path}: {key!r} of an entry of {section!r} is {entry[key]!r:.60}, "
                             "expected a text or a number")
    images, label = several(images), entry.get(cfg.datalist_label)
    case = dict(id=plain_id(entry.get("id") or images[0].removeprefix("./")),
                images=[str(path.parent / p) for p in images],
                label=str(path.parent / label) if isinstance(label, str) else None,
                targets=[str(path.parent / p) for p in several(targets)])
    if "subject" in entry:
        case["subject"] = str(entry["subject"])
    return case | {key: entry[key] for key in ("fold",) if key in entry}


# ------------------------------------------------------------------------------------------------- preprocess

PREPROCESSING_VERSION = 1           # raise it when `preprocess` changes what it returns
PREPROCESSING_KEYS = ("intensity", "window", "zscore_over", "foreground", "crop_foreground", "spacing",
                      "resize", "labels", "remap")


def preprocessing(cfg):
    """The part of a configuration that decides what the network sees; stored in every checkpoint."""
    keys = {"version": PREPROCESSING_VERSION} | {key: getattr(cfg, key) for key in PREPROCESSING_KEYS}
    keys |= {"rules": cfg.rules} if cfg.rules else {}
    if not (cfg.label or (cfg.datalist and cfg.datalist_label)):    # names of what is not read do not count
        keys |= dict(labels={}, remap={})
    return keys


def ruled(case, cfg):
    """The config with what cfg.rules say of this case; without any rules the config itself."""
    if not cfg.rules:
        return cfg
    known = ("intensity", "window", "zscore_over", "foreground", "crop_foreground", "spacing")
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    if not all(isinstance(keys, dict) and isinstance(p, str) for p, keys in cfg.rules.items()):
        raise SystemExit(f"rules = {cfg.rules}: expected {{pattern of ids: {{key: value}}}}")
    own = [keys for pattern, keys in cfg.rules.items() if fnmatch.fnmatch(case["id"], pattern)]
    strange = [key for keys in cfg.rules.values() for key in keys if key not in known]
    if len(own) != 1 or strange:
        found = f"{len(own)} patterns that fit the id {case['id']!r}"
        found = f"the key {strange[0]!r}" if strange else found
        raise SystemExit(f"rules: found {found}; expected one pattern for every id, with keys among "
                         f"{', '.join(known)}")
    said = {key: configs.checked(fields, key, value, "rules") for key, value in own[0].items()}
    return dataclasses.replace(cfg, **said)


def preprocess(case, cfg):
    """Read, check, resample, crop and scale one case.

    returns {"image": (c, x, y, z) float16, "body": (i, j, k) bool of body_map, "label": (x, y, z) uint8 or
    int16 or absent, "target": (c, x, y, z) or absent} and a record for the index: shape, spacing, affine (of
    the returned grid), fill (c,) what stands for "outside the scan" (each channel's least value), what the
    summary shows. Raises VolumeError.
    """
    cfg, paths, channels = ruled(case, cfg), case["images"] + case["targets"], len(case["images"])
    parts, affine, record = _read_case(case, cfg)
    orders = [1] * len(paths) + [0]                                 # linear; nearest for the label at the end
    if cfg.spacing:
        if len(cfg.spacing) != 3 or not min(cfg.spacing) > 0:
            raise SystemExit(f"spacing = {cfg.spacing}, expected three lengths in mm, "
                             "or () to keep each scan's own")
        parts = [volumes.resample(v, affine, cfg.spacing, order) for v, order in zip(parts, orders)]
        affine = affine @ np.diag([*(np.array(cfg.spacing) / spacing_of(affine)), 1.0])
    inside = np.any([v > cfg.foreground for v in parts[:channels]], axis=0)
    if not inside.any():
        raise VolumeError(f"{paths[0]}: no voxel is above the foreground threshold {cfg.foreground:g}, "
                          f"the largest is {max(v.max() for v in parts[:len(paths)]):g}")
    box = ndimage.find_objects(inside.astype(np.uint8))[0] if cfg.crop_foreground else (slice(0, None),) * 3
    if case["label"]:
        record["label_cut"] = int(np.count_nonzero(parts[-1]) - np.count_nonzero(parts[-1][box]))
    parts = [v[box] for v in parts]
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
    if cfg.resize:
        if len(cfg.resize) != 3 or not min(cfg.resize) >= 1:
            raise SystemExit(f"resize = {cfg.resize}, expected three numbers of voxels, "
                             "or () to keep each scan's size")
        step = np.array(parts[0].shape) / cfg.resize              # old voxels per new, over the same space
        affine = affine @ nib.affines.from_matvec(np.diag(step), (step - 1) / 2)
        parts = [volumes.stretch(v, cfg.resize, order) for v, order in zip(parts, orders)]
    scaled = [volumes.scale_intensity(v, v > cfg.foreground, cfg, path) for v, path in zip(parts, paths)]
    record["window_used"] = [volumes.window_used(v, cfg) for v in parts[:len(paths)]]
    record["clipped"] = max(volumes.clipped(v, cfg) for v in parts[:len(paths)])
    arrays = {"image": np.stack(scaled[:channels]), "body": body_map(parts[:channels], cfg.foreground)}
    if case["targets"]:
        arrays["target"] = np.stack(scaled[channels:])
        record["target_fill"] = [volumes.background_of(channel) for channel in arrays["target"]]
    if case["label"]:
        arrays["label"] = parts[-1]
    record |= dict(shape=list(arrays["image"].shape[1:]), channels=channels, affine=affine.tolist(),
                   spacing=spacing_of(affine).tolist(), fill=arrays["image"].min((1, 2, 3)).tolist())
    return arrays, record


def _read_case(case, cfg):
    """([image, .., target, .., label if there is one], affine, first part of the record): one grid, RAS+."""
    first, *others = case["images"] + case["targets"]
    stored, affine = read_stored(first)
    axes, low, high = "".join(nib.aff2axcodes(affine)), float(stored.min()), float(stored.max())
    volume, affine = volumes.to_ras(stored, affine)
    record = dict(files=case["images"], stored=axes, stored_shape=list(stored.shape),
                  stored_spacing=spacing_of(affine).tolist(), range=[low, high],
                  few_values=volumes.few_values(stored), header=volumes.header_doubts(first))
    grid = first, volume.shape, affine
    parts = [volume] + [volumes.on_grid_of(*grid, path, *read_stored(path)) for path in others]
    if case["label"]:
        label = volumes.on_grid_of(*grid, case["label"], *read_stored(case["label"], label=True))
        parts.append(volumes.label_ids(case["label"], label, cfg))
        record["ids"] = np.unique(parts[-1]).tolist()
    return parts, affine, record


BODY_CELL = 8                       # voxels along each axis of a cell of the body map
BODY_SHARE = 0.25                   # of a cell's voxels that must be tissue


def body_map(parts, foreground):
    """(i, j, k) bool: the cells of BODY_CELL voxels of one scan's channels (x, y, z) that show the body.

    Tissue lies above `foreground`, and a tenth of the way from a channel's 2nd to its 98th percentile (as FSL
    BET begins): noise in the air of MRI and PET lies above 0. Axial holes are filled: lungs and ventricles
    are body. Where no cell holds BODY_SHARE of it, the fullest ones count.
    """
    tissue = np.zeros(parts[0].shape, bool)
    for volume in parts:
        low, high = np.percentile(volume[::2, ::2, ::2], [2, 98])
        tissue |= volume > max(foreground, low + 0.1 * (high - low))
    size, edge = tissue.shape, BODY_CELL
    tissue = np.pad(tissue, [(0, -n % edge) for n in size])
    count = reduce(tissue, "(i x) (j y) (k z) -> i j k", "sum", x=edge, y=edge, z=edge)
    i, j, k = (np.minimum(edge, n - np.arange(0, n, edge)) for n in size)        # the last hold fewer
    body = count >= BODY_SHARE * rearrange(i, "i -> i 1 1") * rearrange(j, "j -> j 1") * k
    if not body.any():
        body = count == count.max()
    filled = [ndimage.binary_fill_holes(axial) for axial in rearrange(body, "i j k -> k i j")]
    return rearrange(np.stack(filled), "k i j -> i j k")


# ----------------------------------------- cache: one memory-mapped .npy per array, an index.json beside them

FIRST_PER_CLASS = 4096              # foreground positions kept per class and scan, spread evenly over it
CACHE_VERSION = 6                   # raise it when a scan gets other files or another record


def cache_folder(cfg):
    """Where the scans of this config lie preprocessed: another folder for every other preprocessing."""
    key = json.dumps(preprocessing(cfg) | {"cache": CACHE_VERSION}, sort_keys=True, default=list)
    return Path(cfg.cache) / f"{cfg.dataset}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def cache_name(case, cfg):
    """File stem of a case: id, hash of its files' roles, places below the root, sizes, times: a changed scan
    is redone, data that move as a whole are not."""
    sources = [len(case["images"]), len(case["targets"])]
    for path in _files(case):
        for file in volumes.files_of(path):
            state = file.stat() if file.exists() else None
            said = (state.st_size, state.st_mtime_ns) if state else ("missing",)
            sources.append((os.path.relpath(file, root(cfg)), *said))
    return f"{case['id']}-{hashlib.sha256(repr(sources).encode()).hexdigest()[:12]}"


def _files(case):
    return [Path(path) for path in [*case["images"], *case["targets"], case["label"]] if path]


def read_index(folder):
    """{name: record} of the scans in a cache folder, {} of none, or where the index is damaged."""
    try:
        scans = json.loads((folder / "index.json").read_text())["scans"]
        return {name: record for name, record in scans.items() if isinstance(record, dict)}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, LookupError, TypeError, AttributeError):
        print(f"{folder / 'index.json'}: damaged, its scans are cached anew")
        return {}


def _is_whole(folder, name, record):
    """Whether the arrays of a cached scan are there in full: somebody may have swept the folder."""
    try:
        voxels = math.prod(record["shape"])
        least = {"image": 2 * record["channels"] * voxels, "body": 0}
        least |= {"label": voxels, "positions": 0} if "ids" in record else {}
        least |= {"target": 2 * len(record["target_fill"]) * voxels} if "target_fill" in record else {}
        return all((folder / f"{name}.{key}.npy").stat().st_size > size for key, size in least.items())
    except (OSError, LookupError, TypeError):
        return False


def merge_index(folder, cfg, records):
    """Add records under a lock, so that several programs may fill one cache at the same time."""
    import fcntl
    with open(folder / "index.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scans = read_index(folder) | records
        with configs.replacing(folder / "index.json") as aside:
            aside.write_text(json.dumps({"preprocessing": preprocessing(cfg), "scans": scans}, default=list))


def _fill_one(case, cfg, folder, name):
    """Worker: cache one case. Returns (name, record) or (name, reason)."""
    try:
        arrays, record = preprocess(case, cfg)
        if "label" in arrays:
            arrays["positions"] = labelled_positions(arrays["label"])
        for key, array in arrays.items():
            if key in ("image", "label", "target"):     # z slowest: a cut reads a run of slices
                array = np.ascontiguousarray(rearrange(array, "... x y z -> ... z x y"))
            with configs.replacing(folder / f"{name}.{key}.npy") as aside, open(aside, "wb") as file:
                np.save(file, array)
        return name, record
    except VolumeError as error:
        return name, str(error)
    except OSError as error:
        return name, f"{folder / name}: cannot be written ({volumes.one_line(error)})"


def labelled_positions(label):
    """(m, 4) int32 rows (class, x, y, z): up to FIRST_PER_CLASS voxels of each class but 0, evenly picked."""
    rows = [np.zeros((0, 4), np.int32)]
    for k in np.unique(label[label > 0]):
        flat = np.flatnonzero(label == k)
        flat = flat[np.linspace(0, len(flat) - 1, min(len(flat), FIRST_PER_CLASS)).astype(np.int64)]
        points = np.unravel_index(flat, label.shape)
        rows.append(np.stack([np.full(len(flat), k), *points], 1).astype(np.int32))
    return np.concatenate(rows)


def fill_cache(cases, cfg, say=print):
    """Cache what is not cached yet. Returns [(case, name, record)] in their order, [reason] of the unusable.

    Announces the size before it writes; exits with one line when the disk is too small. Killed at any moment
    it leaves whole arrays only, and goes on from there when called again; several programs may fill a folder.
    """
    folder = cache_folder(cfg)
    names = [cache_name(case, cfg) for case in cases]
    index, reasons = read_index(folder), {}
    todo = {name: case for name, case in zip(names, cases)
            if name not in index or not _is_whole(folder, name, index[name])}
    if todo:
        need = sum(expected_bytes(case, cfg) for case in todo.values())
        parent = next(p for p in [folder, *folder.resolve().parents] if p.exists())
        free = shutil.disk_usage(parent).free
        say(f"cache {folder}: {len(todo)} of {len(cases)} scans to write, at most {need / 1e9:.2f} GB, "
            f"{free / 1e9:.1f} GB free")
        if need > 0.98 * free:
            raise SystemExit(f"{folder}: the cache needs up to {need / 1e9:.1f} GB, "
                             f"the disk has {free / 1e9:.1f} GB free")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            said = volumes.one_line(error)
            raise SystemExit(f"{folder}: cannot be made ({said}); give another --cache") from None
        reasons = _in_processes(todo, cfg, folder, say)
        index = read_index(folder)
    configs.sweep(folder)
    good = [(case, n, index[n]) for case, n in zip(cases, names) if n in index and n not in reasons]
    return good, [reasons[n] for n in names if n in reasons]


def end_with_parent():
    """In a worker: when the program is killed, end too, instead of waiting for its next job for ever."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def _in_processes(todo, cfg, folder, say):
    """Cache the cases {name: case}; returns {name: reason} of those that are unusable."""
    started = saved = time.time()
    fresh, reasons = {}, {}
    fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    workers = max(1, min(cfg.workers, len(todo)))
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        jobs = [pool.submit(_fill_one, case, cfg, folder, name) for name, case in todo.items()]
        try:
            for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                name, result = job.result()
                place = reasons if isinstance(result, str) else fresh
                place[name] = result
                now, left = time.time(), len(jobs) - done
                if now - saved > 10 or not left:                    # a large index: not after each scan
                    merge_index(folder, cfg, fresh)
                    rate = done / (now - started)
                    say(f"  {done}/{len(jobs)} scans, {len(reasons)} unusable, {rate:.2f} scans/s, "
                        f"{left / rate:.0f} s left")
                    fresh, saved = {}, now
        except concurrent.futures.process.BrokenProcessPool:
            raise SystemExit(f"a process that fills {folder} was killed (out of memory?); "
                             f"try --workers={max(1, cfg.workers // 2)}") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return reasons


def expected_bytes(case, cfg):
    """Upper bound of what a case will take, from the headers alone; 0 for what the reader will refuse.

    2 bytes a voxel, a byte a cell of the first image's body map, and what every file begins with.
    """
    cfg, total = ruled(case, cfg), 256
    if case["label"]:                                               # its table of positions, 16 bytes a row
        total += 16 * FIRST_PER_CLASS * (len(cfg.labels) or 32)
    for path in _files(case):
        with contextlib.suppress(Exception):                        # the reader will name the reason
            if cfg.resize or path.name.endswith((".nii", ".nii.gz")):
                shape, lengths = volumes.read_header(path)
                if cfg.spacing:
                    shape = (np.array(shape) - 1) * lengths / cfg.spacing + 2
                shape = np.array(cfg.resize or shape)
                total += int(2 * shape.prod() + (shape / BODY_CELL + 1).prod()) + 256
            else:                                                   # pictures are packed about 2 to 1
                files = path.iterdir() if path.is_dir() else [path]
                total += 2 * sum(file.stat().st_size for file in files)
    return total


class Scan:
    """A cached case: memory-mapped arrays, opened when used, so it travels to workers as a few strings."""

    def __init__(self, folder, name, case, record):
        self.stem, self.case, self.record = str(Path(folder) / name), case, record
        self.id, self.subject = case["id"], case["subject"]
        self.shape, self.fill = tuple(record["shape"]), np.array(record["fill"], np.float32)
        self.spacing, self.affine = np.array(record["spacing"]), np.array(record["affine"])

    def open(self, key="image"):
        """(c, x, y, z) float16 for "image" and "target", (1, x, y, z) for "label"; nothing is read yet."""
        array = self._load(key, mmap_mode="r")
        return rearrange(array, "z x y -> 1 x y z" if key == "label" else "c z x y -> c x y z")

    def _load(self, key, **how):
        try:
            return np.load(f"{self.stem}.{key}.npy", **how)
        except (OSError, ValueError) as error:
            said = volumes.one_line(error)
            raise VolumeError(f"{self.stem}.{key}.npy: the cache was deleted or damaged; start again and it "
                              f"is made anew (remove what is left of the file; {said})") from None

    def positions(self):
        """(m, 4) int32 rows (class, x, y, z) of `labelled_positions`."""
        return self._load("positions", mmap_mode="r")

    def body(self):
        """(i, j, k) bool of `body_map`: 1/1024 of the image's bytes."""
        return self._load("body")

    def cut(self, low, high, key="image", fill=None):
        """Voxels [low, high) along x y z, which may lie outside the scan: `fill` is there, one a channel."""
        array, low, high = self.open(key), np.asarray(low), np.asarray(high)
        out = np.empty((len(array), *(high - low)), array.dtype)
        out[:] = rearrange(self.fill if fill is None else np.asarray(fill), "c -> c 1 1 1")
        a, b = np.maximum(low, 0), np.minimum(high, self.shape)
        if (b > a).all():
            into, source = ((slice(None), *map(slice, a - first, b - first)) for first in (low, 0))
            out[into] = array[source]
        return out


def open_scans(cfg, cases=None, say=print):
    """The cached scans of `cases`, default all that the config finds; exits with a line per unusable file."""
    good, reasons = fill_cache(find_cases(cfg) if cases is None else cases, cfg, say)
    if reasons:
        raise SystemExit("\n".join(reasons)
                         + f"\n{len(reasons)} unusable; mend them or name their ids under `exclude`")
    for line in doubts(good, cfg):
        say(line)
    return [Scan(cache_folder(cfg), name, case, record) for case, name, record in good]


# --------------------------------------------------------------------------------------------- move and match

def random_affine(generator, centre, rotation=(0, 0, 0), scale=(1, 1), shear=0.0, shift=(0, 0, 0),
                  flip=(0, 0, 0), spacing=(1, 1, 1)):
    """One random H (4, 4) float64 about the point `centre` (3,) in voxels.

    rotation (3,) largest angle about x, y, z in degrees; scale (least, largest) zoom, drawn per axis; shear
    largest ratio; shift (3,) largest translation in voxels; flip (3,) probability per axis; all uniform in +-
    the range. Rotation and shear act in mm (`spacing` (3,)): a turned body stays one on anisotropic voxels.
    H = T(centre + shift) D^-1 R_z R_y R_x K D S F T(-centre), D = diag(spacing), K shear, S scale, F flip.
    generator: a numpy Generator; the same number of draws is taken whatever the ranges are.
    """
    angle = np.deg2rad(generator.uniform(-1, 1, 3) * rotation)
    zoom = generator.uniform(scale[0], scale[1], 3)
    lean = generator.uniform(-1, 1, 6) * shear
    move = generator.uniform(-1, 1, 3) * shift
    mirror = np.where(generator.uniform(0, 1, 3) < flip, -1.0, 1.0)
    (cx, cy, cz), (sx, sy, sz) = np.cos(angle), np.sin(angle)
    r_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    r_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    r_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    k, d = np.eye(3), np.asarray(spacing, float)
    k[~np.eye(3, dtype=bool)] = lean
    linear = (r_z @ r_y @ r_x @ k) * d / d[:, None] * (zoom * mirror)
    centre = np.asarray(centre, float)
    return torch.from_numpy(nib.affines.from_matvec(linear, centre + move - linear @ centre))


def translation(offset):
    """H (.., 4, 4) float64 that adds `offset` (.., 3)."""
    offset = torch.as_tensor(offset, dtype=torch.float64)
    H = torch.eye(4, dtype=torch.float64, device=offset.device).expand(*offset.shape[:-1], 4, 4).clone()
    H[..., :3, 3] = offset
    return H


def transform(H, points):
    """Points (.., t, 3) moved by H (.., 4, 4)."""
    return points @ H[..., :3, :3].mT + H[..., None, :3, 3]


def warp(volume, H, size, mode="linear", fill=0.0):
    """V' (b, c, *size) with V'(H c) = V(c), by one interpolation.

    volume (b, c, x, y, z); H (b, 4, 4); size (3,) of V'; mode "linear" (image) or "nearest" (label).
    fill: a number or (b, c), the value of everything outside the volume.
    """
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode = {mode!r}, expected 'linear' or 'nearest'")
    source, goal = np.array(volume.shape[2:]), np.array(size)
    # torch samples at normalised points: -1 and 1 are the outer faces of the outermost voxels, axes z y x
    into = torch.from_numpy(nib.affines.from_matvec(np.diag(goal / 2), goal / 2 - 0.5)).to(H.device)
    out = torch.from_numpy(nib.affines.from_matvec(np.diag(2 / source), 1 / source - 1)).to(H.device)
    theta = (out @ torch.linalg.inv(H.double()) @ into)[:, :3]
    theta = torch.cat([theta[:, :, :3].flip(1, 2), theta[:, :, 3:].flip(1)], 2)
    real = volume if volume.dtype == torch.float64 else volume.float()
    grid = F.affine_grid(theta.to(real.dtype), (len(volume), 1, *size), align_corners=False)
    fill = torch.as_tensor(fill, dtype=real.dtype, device=real.device)
    fill = rearrange(fill, "b c -> b c 1 1 1") if fill.ndim else fill
    way = "bilinear" if mode == "linear" else "nearest"
    moved = F.grid_sample(real - fill, grid, mode=way, align_corners=False) + fill
    return (moved if volume.is_floating_point() else moved.round()).to(volume.dtype)


def patch_centres(grid, patch):
    """(t, 3) float64 centres, in voxels, of grid (i, j, k) patches of edge(s) `patch`; order "(i j k)"."""
    edges = torch.as_tensor(patch, dtype=torch.float64).expand(3)
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) * p - 0.5 for n, p in zip(grid, edges)]
    return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "d i j k -> (i j k) d")


def matches(H, grid, patch):
    """Eq. 2 and 3 as a list: long (m, 3) rows (b, i, j), sorted; patch i of V, j of V' show the same tissue.

    H (b, 4, 4). Cost and memory grow with t, not t^2: only the patches around H(c_i) are looked at. Both
    borders of a patch belong to it, as Eq. 3 says, so an exact half-patch shift gives a token two partners.
    """
    edges, size = torch.as_tensor(patch, dtype=torch.float64).expand(3), torch.tensor(tuple(grid))
    H = H.detach().double().cpu()
    c = patch_centres(grid, patch)                                  # (t, 3)
    there, back = transform(H, c), torch.linalg.inv(H)              # (b, t, 3), (b, 4, 4)
    arrival = (there + 0.5) / edges - 0.5                           # in patches: j is the centre of patch j
    low, high = torch.ceil(arrival - 0.5 - 1e-9).long(), torch.floor(arrival + 0.5 + 1e-9).long()
    rows = []
    for corner in product((False, True), repeat=3):                 # low and high differ on a border only
        pick = torch.tensor(corner)
        j = torch.where(pick, high, low)
        ok = (~pick | (high != low)).all(-1) & (j >= 0).all(-1) & (j < size).all(-1)
        b, i = ok.nonzero(as_tuple=True)
        j = j[b, i]
        c_j = (j + 0.5) * edges - 0.5
        home = (back[b, :3, :3] @ c_j[:, :, None])[:, :, 0] + back[b, :3, 3]
        both = ((there[b, i] - c_j).abs() <= edges / 2).all(-1) & ((home - c[i]).abs() <= edges / 2).all(-1)
        flat = (j[:, 0] * size[1] + j[:, 1]) * size[2] + j[:, 2]
        rows.append(torch.stack([b, i, flat], 1)[both])
    rows, t = torch.cat(rows), len(c)
    return rows[torch.argsort((rows[:, 0] * t + rows[:, 1]) * t + rows[:, 2])]


def correspondence(H, grid, patch):
    """M_gt of Eq. 2 and 3: bool (t, t), or (b, t, t) for H (b, 4, 4); True where patch i of V, j of V' match.

    Row i is patch i of V, column j patch j of V', t = product of grid, order "(i j k)". H(c_i) must lie in
    patch j and H^-1(c_j) in patch i."""
    if H.ndim == 2:
        return correspondence(H[None], grid, patch)[0]
    t = math.prod(grid)
    M_gt = torch.zeros(len(H), t, t, dtype=torch.bool)
    M_gt[matches(H, grid, patch).unbind(1)] = True
    return M_gt.to(H.device)


# -------------------------------------------------------------------------------------------------- intensity

def draw_jitter(generator, cfg):
    """(5,) float32 shift, scale, gamma, noise, blur of one view; 0, 1, 1, 0, 0 leave it as it is."""
    on, size = generator.uniform(0, 1, 5), generator.uniform(-1, 1, 5)
    ranges = cfg.jitter_shift, cfg.jitter_scale, cfg.jitter_gamma, cfg.jitter_noise, cfg.jitter_blur
    chance, reach = np.transpose(ranges)
    shift, scale, gamma, noise, blur = size * reach * (on < chance)
    gamma = 1 + gamma if gamma >= 0 else 1 / (1 - gamma)
    return np.array([shift, 1 + scale, gamma, abs(noise), abs(blur)], np.float32)


def jitter(x, draws, seeds):
    """Intensity changes of x (b, c, x, y, z) float32; draws (b, 5) of draw_jitter, seeds (b,) of noise."""
    shift, scale, gamma, noise, blur = rearrange(draws, "b k -> k b 1 1 1 1")
    if (gamma != 1).any():
        low, high = x.amin((1, 2, 3, 4), keepdim=True), x.amax((1, 2, 3, 4), keepdim=True)
        reach = (high - low).clamp(min=1e-6)
        x = torch.where(gamma == 1, x, low + reach * ((x - low) / reach).clamp(0, 1) ** gamma)
    if (blur > 0).any():
        x = _blur(x, blur.flatten())
    x = x * scale + shift
    for k in (noise.flatten() > 0).nonzero().flatten().tolist():    # one generator each: its field is its own
        field = torch.Generator(x.device).manual_seed(int(seeds[k]))
        x[k] += noise[k] * torch.randn(x[k].shape, generator=field, device=x.device)
    return x


def _blur(x, sigma):
    reach = max(3, math.ceil(3 * float(sigma.max())))
    steps = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=1e-3)[:, None]) ** 2)    # sigma 0: the centre alone
    # a sample's kernel ends at its own three sigma, whoever is beside it
    kernel = kernel * (steps.abs() <= (3 * sigma).ceil().clamp(min=3)[:, None])
    kernel = repeat(kernel / kernel.sum(1, keepdim=True), "b k -> (b c) k", c=x.shape[1])
    flat = F.pad(rearrange(x, "b c x y z -> 1 (b c) x y z"), (reach,) * 6, mode="replicate")
    for form in ("n k -> n 1 k 1 1", "n k -> n 1 1 k 1", "n k -> n 1 1 1 k"):
        flat = F.conv3d(flat, rearrange(kernel, form), groups=len(kernel))
    return rearrange(flat, "1 (b c) x y z -> b c x y z", b=len(x))


# ---------------------------------------------------------------------------------------------------- samples

def nth_scan(scans, seed, n):
    """The n-th scan that a run sees: every epoch visits each once, in an order of its own."""
    epoch, k = divmod(n, len(scans))
    return scans[np.random.default_rng((seed, 1, epoch)).permutation(len(scans))[k]]


def draw_start(generator, shape, size):
    """(3,) first voxel of a window of `size`: anywhere in a scan of `shape`, or around a smaller one."""
    room = shape - size
    return np.where(room > 0, generator.integers(0, np.maximum(room, 0) + 1), -((-room) // 2))


def seen_through(H, size, origin, shape):
    """Box (low, high) in a scan of `shape` that a view of `size` shows after H about a frame at `origin`."""
    corners = torch.tensor(list(product(*[(0.0, n - 1.0) for n in size])), dtype=torch.float64)
    seen = transform(torch.linalg.inv(H), corners).numpy() + origin
    low = np.clip(np.floor(seen.min(0)), 0, shape).astype(int)
    return low, np.maximum(np.clip(np.ceil(seen.max(0)) + 1, 0, shape).astype(int), low)


def _finished(parts, scan, generator, cfg, copies):
    """`parts` as tensors, with fill (c,), draws (copies, 5) and seeds (copies,) of intensity changes, id."""
    parts |= dict(fill=scan.fill, draws=np.stack([draw_jitter(generator, cfg) for _ in range(copies)]))
    parts |= dict(seeds=generator.integers(0, 2 ** 62, copies))
    return {key: torch.as_tensor(value) for key, value in parts.items()} | {"id": scan.id}


def collate(samples):
    """Stack samples; cutout, label, target are padded at the end of each axis to the largest of the batch."""
    cuts = [key for key in ("cutout", "label", "target") if key in samples[0]]
    batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0] if key not in (*cuts, "id")}
    largest = np.max([s["cutout"].shape[1:] for s in samples], 0).tolist()
    fills = dict(cutout=batch["fill"], target=batch.get("target_fill"), label=torch.zeros(len(samples), 1))
    for key in cuts:
        kind = torch.int16 if key == "label" else torch.float16     # labels come as uint8 and as int16
        batch[key] = rearrange(fills[key], "b c -> b c 1 1 1").to(kind).repeat(1, 1, *largest)
        for k, s in enumerate(samples):
            batch[key][k][tuple(slice(n) for n in s[key].shape)] = s[key]
    return batch | {"id": [s["id"] for s in samples]}


def subject_number(subject):
    """A number of a subject's own, below 2^56: it stays when a run gets other scans."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:7], "big")


class Slabs(torch.utils.data.Dataset):
    """Pre-training samples; item (step, place) depends on seed, step and place in the global batch alone."""

    def __init__(self, scans, cfg, batch, seed):
        if any(s % c for s, c in zip(cfg.slab, cfg.crop)):
            raise SystemExit(f"slab = {cfg.slab} is not tiled by crops of {cfg.crop}")
        self.scans, self.cfg, self.batch, self.seed = scans, cfg, batch, seed

    def subjects(self, step):
        """(batch,) int64: subject_number of each sample of a step, of all ranks."""
        scans = [nth_scan(self.scans, self.seed, step * self.batch + place) for place in range(self.batch)]
        return torch.tensor([subject_number(scan.subject) for scan in scans])

    def __getitem__(self, step_place):
        step, place = step_place
        scan = nth_scan(self.scans, self.seed, step * self.batch + place)
        return self.sample(scan, np.random.default_rng((self.seed, 2, step, place)))

    def sample(self, scan, generator):
        """Cut one slab that shows the body, and what its two moved copies need around it.

        returns cutout (c, x, y, z) float16, first voxel (3,) of the slab in the scan, `start`, and in the
        cutout, `offset`, H (4, 4) in slab coordinates, crop (3,) start of the crop of L_g in the slab and
        chosen () its number, apart (n,) bool: which crops of V' come from a crop's edge or more away, and
        show none of it, or under turns a rim; H_twin (4, 4) in crop coordinates, valid, valid_ (t,) bool of
        tokens_of, fill (c,), draws (2, 5), seeds (2,) of the changes (V', twin), id.
        """
        cfg, body = self.cfg, scan.body()
        size, crop, shape = np.array(cfg.slab), np.array(cfg.crop), np.array(scan.shape)
        start = draw_start(generator, shape, size)
        shown = crops_with_body(body, start, size, crop)
        if not len(shown):                                          # a slab of air: another, around some body
            cells = np.argwhere(body)
            middle = (cells[generator.integers(len(cells))] * BODY_CELL + BODY_CELL // 2).astype(int)
            start = np.where(shape > size, np.clip(middle - size // 2, 0, np.maximum(shape - size, 0)), start)
            shown = crops_with_body(body, start, size, crop)
            if not len(shown):                                      # a cell of few voxels at the scan's end
                shown = (np.minimum(middle, shape - 1) - start)[None] // crop
        H = random_affine(generator, (size - 1) / 2, cfg.rotation, cfg.scale, cfg.shear, cfg.shift, cfg.flip,
                          scan.spacing)
        chosen = shown[generator.integers(len(shown))]
        crop_start = chosen * crop
        H_twin = random_affine(generator, (crop - 1) / 2, cfg.twin_rotation, cfg.twin_scale, cfg.twin_shear,
                               cfg.twin_shift, cfg.flip, scan.spacing)
        boxes = [seen_through(H, size, start, shape), seen_through(H_twin, crop, start + crop_start, shape),
                 (start, start + size)]                             # the slab itself, whole
        low, high = np.min([a for a, _ in boxes], 0), np.max([b for _, b in boxes], 0)
        valid, valid_ = tokens_of(shape, body if cfg.tokens == "body" else None, start, H, cfg)
        # where the middle of each crop of V' comes from
        home = transform(torch.linalg.inv(H), patch_centres(size // crop, crop)).numpy()
        apart = (np.abs(home - crop_start - (crop - 1) / 2) >= crop).any(1)
        parts = dict(cutout=scan.cut(low, high), start=start, offset=start - low, H=H, H_twin=H_twin,
                     crop=crop_start, chosen=np.ravel_multi_index(chosen, size // crop), apart=apart,
                     valid=valid, valid_=valid_)
        return _finished(parts, scan, generator, cfg, copies=2)


def crops_with_body(body, start, size, crop):
    """(m, 3) numbers along x y z of a slab's crops that hold at least half as many cells of the body as the
    fullest one does; none of a slab of air. Slab of `size` voxels from voxel `start` of the scan."""
    centres = np.argwhere(body) * BODY_CELL + (BODY_CELL - 1) / 2
    number = np.floor((centres - start + 0.5) / crop).astype(int)
    grid = tuple(size // crop)
    number = number[((number >= 0) & (number < grid)).all(1)]
    cells = np.bincount(np.ravel_multi_index(number.T, grid), minlength=math.prod(grid))
    enough = (cells > 0) & (2 * cells >= cells.max())
    return np.stack(np.unravel_index(np.flatnonzero(enough), grid), axis=1)


def tokens_of(shape, body, start, H, cfg):
    """valid, valid_ (t,) bool: the tokens of V and V' that take part, a slab from voxel `start` on.

    By the centre of a token's patch: it lies in the scan of `shape` (3,), and in its body map unless that is
    None.
    """
    patch = cfg.token_patch
    c = patch_centres([s // patch for s in cfg.slab], patch)
    home = transform(torch.linalg.inv(H), c)                        # what V' shows there, in V
    return [_is_shown(shape, body, points.numpy() + start) for points in (c, home)]


def _is_shown(shape, body, points):
    """(t,) bool: whether points (t, 3), in voxels of the scan, lie in it, and in its body if given."""
    inside = ((points >= -0.5) & (points <= shape - 0.5)).all(1)
    if body is not None:
        i, j, k = np.clip((points + 0.5) // BODY_CELL, 0, np.array(body.shape) - 1).astype(int).T
        inside &= body[i, j, k]
    return inside


def views(batch, cfg):
    """On the device: V (b, c, *slab), V' (b, c, *slab) and the twin of one crop (b, c, *crop), all float32.

    V' is interpolated from the tissue around the slab, so that what turns into view is real tissue; V is left
    plain, V' and the twin change their intensities.
    """
    cutout, fill, offset, (i, j, k) = batch["cutout"].float(), batch["fill"], batch["offset"], cfg.slab
    V = torch.stack([c[:, x:x + i, y:y + j, z:z + k] for c, (x, y, z) in zip(cutout, offset.tolist())])
    V_ = warp(cutout, batch["H"] @ translation(-offset), cfg.slab, fill=fill)
    twin = warp(cutout, batch["H_twin"] @ translation(-offset - batch["crop"]), cfg.crop, fill=fill)
    draws, seeds = batch["draws"], batch["seeds"]
    return V, jitter(V_, draws[:, 0], seeds[:, 0]), jitter(twin, draws[:, 1], seeds[:, 1])


class Crops(torch.utils.data.Dataset):
    """Labelled training crops; item (step, place) depends on seed, step and place in the global batch alone.

    `scans` hold a label map, a target image or a class number (`classes`: {id: int}). cfg.positive is the
    share of crops that are centred on a labelled voxel: of a class drawn among those the scan has, each as
    likely, then of a voxel of that class.
    """

    def __init__(self, scans, cfg, batch, seed, classes=None):
        self.scans, self.cfg, self.batch, self.seed, self.classes = scans, cfg, batch, seed, classes

    def __getitem__(self, step_place):
        step, place = step_place
        of_case = self.cfg.crops_per_case
        scan = nth_scan(self.scans, self.seed, step * (self.batch // of_case) + place // of_case)
        return self.sample(scan, np.random.default_rng((self.seed, 2, step, place)))

    def sample(self, scan, generator):
        """cutout (c, x, y, z) float16 around a crop, H (4, 4) from cutout to crop, and label / target on the
        cutout's grid, or the class number; fill, draws (1, 5), seeds (1,), id as in Slabs."""
        cfg, shape, size = self.cfg, np.array(scan.shape), np.array(self.cfg.crop)
        start = draw_start(generator, shape, size)
        aim, pick = generator.uniform(), generator.integers(0, 2 ** 31, 2)
        positions = scan.positions() if "ids" in scan.record and aim < cfg.positive else ()
        if len(positions):                                          # without any object: a random place
            present = np.unique(positions[:, 0])
            mine = positions[positions[:, 0] == present[pick[0] % len(present)]]
            centred = mine[pick[1] % len(mine), 1:] - size // 2
            start = np.where(shape > size, np.clip(centred, 0, np.maximum(shape - size, 0)), start)
        H = random_affine(generator, (size - 1) / 2, cfg.rotation, cfg.scale, cfg.shear, cfg.shift, cfg.flip,
                          scan.spacing)
        low, high = seen_through(H, size, start, shape)
        # moved wholly out of the scan: one voxel that says so
        low, high = np.minimum(low, shape - 1), np.minimum(np.maximum(high, low + 1), shape)
        parts = dict(cutout=scan.cut(low, high), H=H @ translation(low - start))
        if "ids" in scan.record:
            parts["label"] = scan.cut(low, high, "label", [0])
        if "target_fill" in scan.record:
            fill = np.array(scan.record["target_fill"], np.float32)
            parts |= dict(target=scan.cut(low, high, "target", fill), target_fill=fill)
        if self.classes:
            parts["class"] = self.classes[scan.id]
        return _finished(parts, scan, generator, cfg, copies=1)


def moved_crops(batch, cfg):
    """On the device: image (b, c, *crop) float32, changed in place and intensity, label (b, 1, *crop) long
    and target (b, c, *crop) float32 or None, through one matrix (linear for images, nearest for labels)."""
    move = functools.partial(warp, H=batch["H"], size=cfg.crop)
    image = move(batch["cutout"].float(), fill=batch["fill"])
    label = move(batch["label"].float(), mode="nearest").round().long() if "label" in batch else None
    target = move(batch["target"].float(), fill=batch["target_fill"]) if "target" in batch else None
    return jitter(image, batch["draws"][:, 0], batch["seeds"][:, 0]), label, target


# ---------------------------------------------------------------------------------------------------- program

def summary(good, cfg):
    """Text table of what the usable scans are like, and what is doubtful of them."""
    records = [record for _, _, record in good]
    rows = [("", "least", "median", "largest")]
    for name, form, values in (("shape, as stored", "{:.0f}", [r["stored_shape"] for r in records]),
                               ("spacing x y z, mm", "{:.3g}", [r["stored_spacing"] for r in records]),
                               ("smallest value", "{:.4g}", [r["range"][:1] for r in records]),
                               ("largest value", "{:.4g}", [r["range"][1:] for r in records]),
                               ("shape in the cache", "{:.0f}", [r["shape"] for r in records])):
        three = [f(np.array(values, float), axis=0) for f in (np.min, np.median, np.max)]
        rows.append((name, *[" x ".join(map(form.format, v)) for v in three]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    axes = collections.Counter(r["stored"] for r in records)
    lines.append("stored axes: " + ", ".join(f"{name} {n}" for name, n in sorted(axes.items())))
    ids = collections.Counter(k for r in records for k in r.get("ids", ()))
    if ids:
        lines.append("label ids (scans): " + ", ".join(f"{k} ({n})" for k, n in sorted(ids.items())))
    if cut := {case["id"]: r["label_cut"] for case, _, r in good if r.get("label_cut")}:
        lines.append(f"labelled voxels cut away with the background (below `foreground`), {len(cut)} scans: "
                     + ", ".join(f"{name} {n}" for name, n in [*cut.items()][:8]))
    return "\n".join([*lines, *doubts(good, cfg)])


def doubts(good, cfg):
    """Lines on scans that may not be what the config takes them for; ranges are compared within each of
    cfg.rules."""
    reach, odd = {case["id"]: r["range"][1] - r["range"][0] for case, _, r in good}, {}
    hint = ", or give zscore_over = 'robust'" * (cfg.intensity == "zscore")
    far = f"ranges more than ten times wider or narrower than the others': look at them{hint}"
    for pattern in cfg.rules or ("*",):
        alike = fnmatch.filter(reach, pattern)
        usual = np.median([reach[name] for name in alike]) if alike else 0.0
        for name in (name for name in alike if not 0.1 < reach[name] / usual < 10):
            odd.setdefault(far, []).append(name)
    for case, _, record in good:
        for said in volumes.doubts_of(record, ruled(case, cfg)):
            odd.setdefault(said, []).append(case["id"])
    return [f"{said}; {len(names)} scans: {', '.join(names[:8])}{' ..' * (len(names) > 8)}"
            for said, names in odd.items()]


def filling(good, files):
    """Lines on slabs and crops that the config files name and the scans hardly fill, else none."""
    lines, shapes = [], np.array([record["shape"] for _, _, record in good])
    for key in ("slab", "crop"):
        size = {k: v for file in files for k, v in configs.read(file).items()}.get(key)
        if size:
            share = (np.minimum(shapes, size) / size).prod(1).mean()
            if share < 0.5:
                lines.append(f"{key} = {size}: the scans fill {share:.0%} of it, the rest will be padding")
    return lines


def main(argv):
    cfg = configs.load(Config, argv)
    cases = find_cases(cfg)
    print(f"{len(cases)} cases of {len({case['subject'] for case in cases})} subjects below {root(cfg)}")
    good, reasons = fill_cache(cases, cfg)
    if good:
        files = [arg for arg in argv if not arg.startswith("--")]
        print("\n".join([summary(good, cfg), *filling(good, files)]))
        print(f"{len(good)} usable scans in {cache_folder(cfg)}")
    for reason in reasons:
        print(f"unusable  {reason}")
    if reasons:
        raise SystemExit(f"{len(reasons)} of {len(cases)} cases are unusable; "
                         "mend them or name their ids under `exclude`")


if __name__ == "__main__":
    from run import program  # as a program alone: what a person meets is one line here, too

    if any(arg.startswith("--plan") for arg in sys.argv[1:]):
        runpy.run_path(str(Path(__file__).with_name("plan.py")), run_name="__main__")
    else:
        program(main)
