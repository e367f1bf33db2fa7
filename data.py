"""From files on disk to tensors on the device: read, check, preprocess, cache, sample, move (3D affine), match, jitter.

Also a program:   python data.py configs/x.py      checks every file of a config, prints a summary, fills the cache.

Points are in voxel units with voxel centres at integers; patch k of edge p has its centre at (k + 1/2) p - 1/2.
H is a 4x4 matrix that sends a point of V to the point of V' that shows the same tissue. Volumes are RAS+.
"""
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
import zlib
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from scipy import ndimage

import configs


@dataclasses.dataclass
class Config:
    """The keys about files and preprocessing; every script adds its own. Sources: paper, released code, VoCo, ours."""
    # where the files are
    data: str = "data"              # root folder of all patterns; the environment variable S2DC_DATA goes before it
    scans: str | tuple = ()         # pre-training: glob patterns, one or several data sets, every file one scan
    image: str | tuple = ()         # or one pattern with fields, "imagesTr/img{id}.nii.gz"; several are the channels of one case
    label: str = ""                 # pattern with the same fields, an integer class map
    target: str | tuple = ()        # pattern(s) with the same fields, the image(s) to be predicted (translation, reconstruction)
    datalist: str = ""              # or an MSD dataset.json / MONAI datalist, relative to the root; needs `section`
    section: str = "training"       # the list inside it
    datalist_label: str = "label"   # key of an entry's class map; "" where "label" means something else
    datalist_target: str = "target" # key of an entry's image(s) to be predicted
    exclude: str | tuple = ()       # ids (or patterns of ids) left out on purpose
    labels: dict = dataclasses.field(default_factory=dict)   # {id: name} of every class but background; {} accepts any id
    remap: dict = dataclasses.field(default_factory=dict)    # {id in the file: id in `labels`}
    # preprocessing: everything here is part of the cache's key
    dataset: str = "scans"          # first part of the cache folder's name
    intensity: str = "window"       # "window": clip to `window`, scale to [0, 1] (CT); "scale": the same without clipping;
                                    # "zscore": (v - mean) / std (MRI, PET)
    window: tuple = (-1000.0, 1000.0)   # HU, or the unit of the file; released code (fine-tuning on BTCV: -175, 250)
    zscore_over: str = "foreground" # "foreground" or "volume"; released code: the volume, zeros included
    foreground: float = -500.0      # a voxel above this (file's unit) is foreground; ours for CT (released code: -1000, all but air)
    crop_foreground: bool = True    # cut to the bounding box of the foreground; released code
    spacing: tuple = ()             # mm per voxel along x y z to resample to, () keeps each scan's own; released code: own
    resize: tuple = ()              # voxels along x y z to which every scan is stretched at the end, () keeps its size (classification)
    cache: str = "cache"            # folder of the memory-mapped arrays
    workers: int = 4                # processes that fill the cache, and that load batches for each rank


class VolumeError(ValueError):
    """A file that cannot be used; the text is one line that starts with the file's name."""


# ---------------------------------------------------------------------------------------------------------------------
# read

def read_volume(path, label=False):
    """One scan as (voxels (x, y, z) float32, spacing (3,) mm, affine (4, 4) voxel -> mm), axes in RAS+ order.

    NIfTI (.nii, .nii.gz) by nibabel; .mha .mhd .nrrd and a DICOM folder by SimpleITK; a folder of .png / .jpg slices, sorted
    by the number in their names, by Pillow (no spacing known: 1 mm; rows run front to back, columns right to left, slices
    towards the head). scl_slope is applied. label=True allows a volume of one value (a scan without any object).
    Raises VolumeError, one line with the file's name, for anything that is no finite single-channel 3D volume.
    """
    voxels, affine = read_stored(path, label)
    voxels, affine = to_ras(voxels, affine)
    return np.ascontiguousarray(voxels), spacing_of(affine), affine


def read_stored(path, label=False):
    """As read_volume, but (voxels, affine) in the axis order of the file: for writing results beside it."""
    path = Path(path)
    if not path.exists():
        raise VolumeError(f"{path}: no such file")
    if path.is_dir():
        voxels, affine = _read_folder(path)
    elif path.stat().st_size == 0:
        raise VolumeError(f"{path}: the file is empty (0 bytes)")
    elif path.name.endswith((".nii", ".nii.gz")):
        voxels, affine = _read_nifti(path)
    elif path.suffix in (".mha", ".mhd", ".nrrd"):
        voxels, affine = _read_itk(path)
    else:
        raise VolumeError(f"{path}: unknown format, expected .nii .nii.gz .mha .mhd .nrrd, a DICOM folder or a folder of slices")
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad:
        raise VolumeError(f"{path}: {bad} of {voxels.size} voxels are not finite as float32 (NaN or infinite)")
    if not label and voxels.min() == voxels.max():
        raise VolumeError(f"{path}: every voxel is {voxels.flat[0]:g}, a constant volume holds nothing to learn")
    return voxels, affine


def to_ras(voxels, affine):
    """(voxels, affine) with the axes flipped and ordered so that x y z run closest to right, front, head."""
    orientation = nib.io_orientation(affine)
    turned = nib.apply_orientation(voxels, orientation)
    return turned, affine @ nib.orientations.inv_ornt_aff(orientation, voxels.shape)


def spacing_of(affine):
    """(3,) mm along the voxel axes of an affine (4, 4)."""
    return np.sqrt((affine[:3, :3] ** 2).sum(0))


def _check_header(path, shape, affine):
    shape = list(shape)
    while len(shape) > 3 and shape[-1] == 1:                        # a trailing singleton axis means nothing
        shape.pop()
    if len(shape) != 3 or min(shape) < 2:
        kind = "one slice only" if len(shape) == 3 and min(shape) == 1 else f"{len(shape)}D"
        raise VolumeError(f"{path}: shape {tuple(shape)} is {kind}, expected one 3D volume with at least 2 voxels per axis")
    if not np.isfinite(affine).all():
        raise VolumeError(f"{path}: the affine holds NaN or infinite values")
    lengths = spacing_of(affine)
    if min(lengths) <= 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise VolumeError(f"{path}: the affine is singular (axis lengths {', '.join(f'{v:.3g}' for v in lengths)} mm), "
                          "expected three independent axes")
    return shape


def _read_nifti(path):
    try:
        image = nib.load(path)
    except Exception as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({_one_line(error)})") from None
    kind = image.get_data_dtype()
    if kind.names or kind.kind == "c":
        raise VolumeError(f"{path}: voxels are {'RGB' if kind.names else 'complex'} ({kind}), expected one real number per voxel")
    shape = _check_header(path, image.shape, image.affine)
    start = int(image.dataobj.offset)
    claimed = start + math.prod(image.shape) * kind.itemsize
    packed, size = path.name.endswith(".gz"), path.stat().st_size
    if claimed > size * (1032 if packed else 1):                    # deflate cannot pack more than 1032 to 1
        raise VolumeError(f"{path}: the header claims {math.prod(image.shape)} voxels ({claimed:.3g} bytes), "
                          f"the file holds {size} bytes{' packed' if packed else ''}")
    # nibabel stops at the last voxel and never sees the gzip checksum behind it: read the stream to its end ourselves
    try:
        with (gzip.open if packed else open)(path, "rb") as stream:
            content = bytearray()                                   # grows with what is there, whatever the header claims
            while piece := stream.read(1 << 22):
                content += piece[:claimed - len(content)]
    except (EOFError, OSError, zlib.error) as error:
        raise VolumeError(f"{path}: the file is damaged ({_one_line(error)})") from None
    if len(content) < claimed:
        raise VolumeError(f"{path}: the header claims {claimed} bytes of header and voxels, the file holds {len(content)}")
    stored = np.frombuffer(content, kind, math.prod(image.shape), start).reshape(shape, order="F")
    slope, inter = image.dataobj.slope, image.dataobj.inter
    with np.errstate(over="ignore", invalid="ignore"):              # what overflows is refused by the caller, with its count
        if (slope, inter) == (1, 0):
            return stored.astype(np.float32), image.affine
        return (stored * float(slope) + float(inter)).astype(np.float32), image.affine


def _sitk(path):
    try:
        import SimpleITK
    except ImportError:
        raise VolumeError(f"{path}: this format needs SimpleITK, install it with: pip install SimpleITK") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _read_itk(path, files=None):
    sitk = _sitk(path)
    try:
        image = sitk.ReadImage(files or str(path))
    except Exception as error:
        reason = re.sub(r"(?s).*ERROR: (\w+\(0x\w+\): )?", "", str(error))    # before it: where in its own source
        raise VolumeError(f"{path}: not readable by SimpleITK ({_one_line(reason)})") from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError(f"{path}: {image.GetNumberOfComponentsPerPixel()} values per voxel, expected one")
    size, space, origin = image.GetSize(), image.GetSpacing(), image.GetOrigin()
    if len(size) != 3:
        raise VolumeError(f"{path}: shape {size} is {len(size)}D, expected one 3D volume")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * space
    affine[:3, 3] = origin
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine               # DICOM's world is left, back, head; NIfTI's right, front, head
    _check_header(path, size, affine)
    voxels = sitk.GetArrayFromImage(image)
    if voxels.dtype.kind == "c":
        raise VolumeError(f"{path}: voxels are complex, expected one real number per voxel")
    return rearrange(voxels, "z y x -> x y z").astype(np.float32), affine


def _read_folder(path):
    names = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
    slices = [p for p in names if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if slices:
        return _read_slices(path, slices)
    series = _sitk(path).ImageSeriesReader.GetGDCMSeriesIDs(str(path)) if names else ()
    if len(series) != 1:
        raise VolumeError(f"{path}: a folder with {len(names)} files and {len(series)} DICOM series, "
                          "expected one DICOM series or .png / .jpg slices")
    files = list(_sitk(path).ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0]))
    reader, places = _sitk(path).ImageFileReader(), []
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        places.append(reader.GetOrigin())
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)         # SimpleITK would spread the others over the gap
    if len(steps) and (steps.min() <= 0 or np.abs(steps - np.median(steps)).max() > 0.25 * np.median(steps)):
        raise VolumeError(f"{path}: its {len(files)} slices lie {steps.min():.4g} to {steps.max():.4g} mm apart, "
                          "expected one distance (is a slice missing, or there twice?)")
    return _read_itk(path, files)


def _read_slices(path, files):
    try:
        from PIL import Image
    except ImportError:
        raise VolumeError(f"{path}: a folder of slices needs Pillow, install it with: pip install pillow") from None
    numbers = {}
    for file in files:
        digits = re.findall(r"\d+", file.stem)
        if not digits or int(digits[-1]) in numbers:
            raise VolumeError(f"{file}: slices are sorted by the last number in their names, this one has "
                              + (f"the same as {numbers[int(digits[-1])].name}" if digits else "none"))
        numbers[int(digits[-1])] = file
    rows = []
    for _, file in sorted(numbers.items()):
        try:
            with Image.open(file) as picture:
                row = np.asarray(picture.convert("RGB") if picture.mode in ("P", "RGBA") else picture)
        except Exception as error:
            raise VolumeError(f"{file}: not a readable picture ({_one_line(error)})") from None
        if row.ndim == 3 and (row == row[..., :1]).all():           # grey stored as RGB
            row = row[..., 0]
        if row.ndim != 2 or (rows and row.shape != rows[0].shape):
            raise VolumeError(f"{file}: shape {row.shape}, expected a grey slice"
                              + (f" of {rows[0].shape} like the first" if rows else ""))
        rows.append(row)
    voxels = rearrange(np.stack(rows), "z row column -> column row z").astype(np.float32)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    _check_header(path, voxels.shape, affine)
    return voxels, affine


def _one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# find cases

def root(cfg):
    """Folder of the data: the environment variable S2DC_DATA, else cfg.data."""
    return Path(os.environ.get("S2DC_DATA") or cfg.data)


def find_cases(cfg, section=None, base=None):
    """List of {"id", "subject", "images": [path], "label": path or None, "targets": [path]} in a stable order, ids unique;
    "fields" too where patterns have them. `section` of a datalist, default cfg.section; `base` folder, default the data root.

    Raises SystemExit with one line when a pattern finds nothing, a channel is missing or an id comes twice. `{field}` in a
    pattern stands for a part of one file or folder name; {subject} names the person, otherwise the id does.
    """
    ways = [key for key in ("scans", "image", "datalist") if getattr(cfg, key)]
    if len(ways) != 1:
        raise SystemExit(f"exactly one of the keys scans, image, datalist must say where the files are, found {ways or 'none'}")
    base = base or root(cfg)
    if ways == ["datalist"]:
        cases = _from_datalist(base / cfg.datalist, section or cfg.section, cfg)
    elif ways == ["scans"]:
        cases = [dict(id=plain_id(path.relative_to(base)), images=[str(path)], label=None, targets=[])
                 for pattern in several(cfg.scans) for path, _ in _found(base, pattern)]
    else:
        cases = _from_patterns(base, cfg)
    for case in cases:
        case.setdefault("subject", case["id"])
    seen = {}
    for case in cases:
        if case["id"] in seen:
            raise SystemExit(f"two cases have the id {case['id']!r}: {seen[case['id']]} and {case['images'][0]}")
        seen[case["id"]] = case["images"][0]
    unused = [name for name in several(cfg.exclude) if not fnmatch.filter(seen, name)]
    if unused:
        raise SystemExit(f"exclude names {unused[0]!r}, no case has that id; there are: {', '.join(list(seen)[:5])} ..")
    return [case for case in cases if not any(fnmatch.fnmatch(case["id"], name) for name in several(cfg.exclude))]


def several(value):
    return (value,) if isinstance(value, str) else tuple(value)


def plain_id(path):
    name = re.sub(r"\.(nii|nii\.gz|mha|mhd|nrrd)$", "", str(path).strip("/"))
    return re.sub(r"[^\w.\-]+", "__", name)


def _found(base, pattern):
    """(path, {field: text}) of every file, or folder when the pattern ends in '/', that fits; never empty."""
    expression, names = "", set()
    for part in re.split(r"(\{\w+\}|\*\*/|\*|\?|\[[^\]]+\])", pattern.rstrip("/")):
        name = part[1:-1]
        if part.startswith("{"):
            expression += f"(?P={name})" if name in names else f"(?P<{name}>[^/]+?)"
            names.add(name)
        elif part.startswith("["):
            expression += part.replace("[!", "[^")
        else:
            expression += {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    want_folder = pattern.endswith("/")
    hits = []
    for path in sorted(base.glob(re.sub(r"\{\w+\}", "*", pattern.rstrip("/")))):
        fits = re.fullmatch(expression, path.relative_to(base).as_posix())
        if fits and path.is_dir() == want_folder and not path.name.startswith("._"):    # ._x: a macOS twin, no image
            hits.append((path, fits.groupdict()))
    if not hits:
        folder = base / re.split(r"[{*?]", pattern)[0]
        folder = folder if folder.is_dir() else folder.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        there = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
        raise SystemExit(f"pattern {pattern!r} finds nothing below {base}; {folder} holds: "
                         + (", ".join(there[:8]) + (f" .. ({len(there)} entries)" if len(there) > 8 else "") or "nothing"))
    return hits


def _from_patterns(base, cfg):
    first, *others = several(cfg.image)
    cases = []
    for path, fields in _found(base, first):
        def other(pattern):
            try:
                file = base / pattern.format(**fields)
            except KeyError as error:
                raise SystemExit(f"pattern {pattern!r} has the field {error}, the first image pattern {first!r} has not") from None
            if not file.exists():
                raise SystemExit(f"{file}: no such file, expected beside {path}")
            return str(file)
        case = dict(id=plain_id("_".join(fields.values()) or path.relative_to(base)), fields=fields,
                    images=[str(path)] + list(map(other, others)),
                    label=other(cfg.label) if cfg.label else None, targets=list(map(other, several(cfg.target))))
        if "subject" in fields:
            case["subject"] = fields["subject"]
        cases.append(case)
    return cases


def _from_datalist(path, section, cfg):
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such datalist") from None
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON ({_one_line(error)})") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{path}: holds a JSON {type(content).__name__}, expected an object with the list {section!r}")
    if section not in content or not content[section]:
        lists = [key for key, value in content.items() if isinstance(value, list) and value]
        raise SystemExit(f"{path}: no entries under {section!r}; lists there: {', '.join(lists) or 'none'}")
    cases = []
    for entry in content[section]:
        entry = {"image": entry} if isinstance(entry, str) else entry
        if "image" not in entry:
            raise SystemExit(f"{path}: an entry of {section!r} has no key 'image', its keys: {', '.join(entry)}")
        images = several(entry["image"])
        case = dict(id=entry.get("id") or plain_id(images[0].removeprefix("./")), images=[str(path.parent / p) for p in images],
                    label=None, targets=[str(path.parent / p) for p in several(entry.get(cfg.datalist_target) or ())])
        if isinstance(entry.get(cfg.datalist_label), str):
            case["label"] = str(path.parent / entry[cfg.datalist_label])
        cases.append(case | {key: entry[key] for key in ("subject", "fold") if key in entry})
    return [case for case in cases if not Path(case["images"][0]).name.startswith("._")]


# ---------------------------------------------------------------------------------------------------------------------
# preprocess

PREPROCESSING_VERSION = 1           # raise it when `preprocess` changes what it returns: old caches are then left alone
PREPROCESSING_KEYS = ("intensity", "window", "zscore_over", "foreground", "crop_foreground", "spacing", "resize", "labels", "remap")


def preprocessing(cfg):
    """The part of a configuration that decides what the network sees; stored in every checkpoint."""
    keys = {"version": PREPROCESSING_VERSION} | {key: getattr(cfg, key) for key in PREPROCESSING_KEYS}
    if not (cfg.label or (cfg.datalist and cfg.datalist_label)):     # names of labels that are not read make no other cache
        keys |= dict(labels={}, remap={})
    return keys


def preprocess(case, cfg):
    """Read, check, resample, crop and scale one case.

    returns {"image": (c, x, y, z) float16, "label": (x, y, z) uint8 or int16 or absent, "target": (c, x, y, z) or absent} and a
    record for the index: shape, spacing, affine (of the returned grid), fill (c,) the value that stands for "outside the
    scan" (each channel's least value), and what the summary table shows. Raises VolumeError.
    """
    volumes = [read_stored(path) for path in case["images"] + case["targets"]]
    record = dict(files=case["images"], stored="".join(nib.aff2axcodes(volumes[0][1])), stored_shape=list(volumes[0][0].shape),
                  stored_spacing=[float(v) for v in spacing_of(to_ras(*volumes[0])[1])],
                  range=[float(volumes[0][0].min()), float(volumes[0][0].max())])
    for path, volume in zip((case["images"] + case["targets"])[1:], volumes[1:]):
        _same_grid(path, *volume, case["images"][0], *volumes[0])
    label = None
    if case["label"]:
        label, label_affine = read_stored(case["label"], label=True)
        _same_grid(case["label"], label, label_affine, case["images"][0], *volumes[0])
        label = label_ids(case["label"], label, cfg)
        record["ids"] = [int(v) for v in np.unique(label)]
        label, label_affine = to_ras(label, label_affine)
    stack, affine = [to_ras(*volume)[0] for volume in volumes], to_ras(*volumes[0])[1]
    del volumes
    if cfg.spacing:
        if len(cfg.spacing) != 3 or not min(cfg.spacing) > 0:
            raise SystemExit(f"spacing = {cfg.spacing}, expected three lengths in mm, or () to keep each scan's own")
        stack = [resample(volume, affine, cfg.spacing, order=1) for volume in stack]
        label = None if label is None else resample(label, affine, cfg.spacing, order=0)
        affine = affine @ np.diag([*(np.array(cfg.spacing) / spacing_of(affine)), 1.0])
    inside = np.any([volume > cfg.foreground for volume in stack[:len(case["images"])]], axis=0)
    if not inside.any():
        raise VolumeError(f"{case['images'][0]}: no voxel is above the foreground threshold {cfg.foreground:g}, "
                          f"the largest is {max(v.max() for v in stack):g}")
    box = ndimage.find_objects(inside.astype(np.uint8))[0] if cfg.crop_foreground else (slice(None),) * 3
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [s.start or 0 for s in box]
    if cfg.resize:
        if len(cfg.resize) != 3 or not min(cfg.resize) >= 1:
            raise SystemExit(f"resize = {cfg.resize}, expected three numbers of voxels, or () to keep each scan's size")
        step = np.array(stack[0][box].shape) / cfg.resize           # old voxels per new one; both grids cover the same space
        affine = affine @ np.array([[*row, (step[k] - 1) / 2] for k, row in enumerate(np.diag(step))] + [[0, 0, 0, 1]])
        stack = [stretch(v[box], cfg.resize, 1) for v in stack]
        label, box = None if label is None else stretch(label[box], cfg.resize, 0), (slice(None),) * 3
    stack = [scale_intensity(volume[box], volume[box] > cfg.foreground, cfg, path)
             for volume, path in zip(stack, case["images"] + case["targets"])]
    arrays = {"image": np.stack(stack[:len(case["images"])])}
    if case["targets"]:
        arrays["target"] = np.stack(stack[len(case["images"]):])
    if label is not None:
        arrays["label"] = label[box]
    if case["targets"]:
        record["target_fill"] = [float(v) for v in arrays["target"].reshape(len(case["targets"]), -1).min(1)]
    record |= dict(shape=list(arrays["image"].shape[1:]), channels=len(case["images"]), affine=affine.tolist(),
                   spacing=[float(v) for v in spacing_of(affine)],
                   fill=[float(v) for v in arrays["image"].reshape(len(case["images"]), -1).min(1)])
    return arrays, record


def _same_grid(path, voxels, affine, other_path, other_voxels, other_affine):
    (voxels, affine), (other_voxels, other_affine) = to_ras(voxels, affine), to_ras(other_voxels, other_affine)
    if voxels.shape != other_voxels.shape:
        raise VolumeError(f"{path}: shape {voxels.shape} (RAS), but {Path(other_path).name} has {other_voxels.shape}")
    corners = np.array([[*corner, 1] for corner in product(*[(0, n - 1) for n in voxels.shape])])
    off = np.linalg.norm(corners @ (affine - other_affine).T, axis=1).max()
    if off > 0.2 * spacing_of(affine).min():                        # header rounding stays far below, a lost offset far above
        raise VolumeError(f"{path}: lies up to {off:.3g} mm away from {Path(other_path).name} (different affines)")


def label_ids(path, label, cfg):
    ids = np.unique(label)
    broken = ids[ids != np.round(ids)]
    if len(broken):
        raise VolumeError(f"{path}: label ids must be whole numbers, found {', '.join(f'{v:g}' for v in broken[:4])}")
    ids = ids.astype(np.int64)
    known = set(cfg.labels) | set(cfg.remap) | {0} if cfg.labels else set(range(32768))
    unknown = [int(v) for v in ids if int(v) not in known]
    if unknown:
        said = f"declared are 0 and {', '.join(map(str, sorted(known - {0})))}" if cfg.labels else "expected 0 to 32767"
        raise VolumeError(f"{path}: holds label ids {', '.join(map(str, unknown[:8]))}; {said}")
    clash = [(old, new) for old, new in cfg.remap.items() if old in ids and new in ids and new not in cfg.remap]
    if clash:
        old, new = clash[0]
        raise VolumeError(f"{path}: holds both id {old} and the id {new} that it would be renamed to; if they are to be one, "
                          f"remap needs {new}: {new} too")
    strange = sorted(set(cfg.remap.values()) - set(cfg.labels) - {0}) if cfg.labels else []
    if strange:
        raise SystemExit(f"remap = {cfg.remap}: {strange[0]} is no id of labels = {cfg.labels}")
    label = label.astype(np.uint8 if max([*ids, *cfg.remap.values()]) < 256 else np.int16)
    if cfg.remap:
        renamed = label.copy()
        for old, new in cfg.remap.items():
            renamed[label == old] = new
        label = renamed
    return label


def resample(volume, affine, spacing, order):
    """`volume` (x, y, z) on a grid of `spacing` mm that keeps voxel 0 in place; order 1 linear, 0 nearest."""
    step = np.array(spacing, float) / spacing_of(affine)            # old voxels per new voxel
    if np.allclose(step, 1, atol=1e-4):
        return volume
    shape = np.round((np.array(volume.shape) - 1) / step).astype(int) + 1     # the outermost centres stay where they were, to half a voxel
    return ndimage.affine_transform(volume, step, output_shape=tuple(shape), order=order, mode="nearest")


def stretch(volume, shape, order):
    """`volume` (x, y, z) on `shape` voxels that together cover the same space; order 1 linear, 0 nearest."""
    return ndimage.zoom(volume, np.array(shape) / volume.shape, order=order, mode="nearest", grid_mode=True)


def scale_intensity(volume, inside, cfg, path):
    """float16 copy: "window" clips to cfg.window and maps it to [0, 1], "scale" does not clip; "zscore" has mean 0 and std 1 over
    the voxels `inside`, or all."""
    if cfg.intensity in ("window", "scale"):
        low, high = cfg.window
        if not low < high:
            raise SystemExit(f"window = {cfg.window}, expected (low, high)")
        scaled = ((np.clip(volume, low, high) if cfg.intensity == "window" else volume) - low) / (high - low)
    elif cfg.intensity == "zscore":
        if cfg.zscore_over not in ("foreground", "volume"):
            raise SystemExit(f"zscore_over = {cfg.zscore_over!r}, expected 'foreground' or 'volume'")
        if cfg.zscore_over == "foreground" and not inside.any():
            raise VolumeError(f"{path}: no voxel is above the foreground threshold {cfg.foreground:g}, the largest is {volume.max():g}")
        sample = volume[inside] if cfg.zscore_over == "foreground" else volume
        mean, std = sample.mean(dtype=np.float64), sample.std(dtype=np.float64)
        if not std > 0:
            raise VolumeError(f"{path}: the foreground is constant ({mean:g}), a z-score would divide by zero")
        scaled = (volume - np.float32(mean)) / np.float32(std)
    else:
        raise SystemExit(f"intensity = {cfg.intensity!r}, expected 'window', 'scale' or 'zscore'")
    scaled = scaled.astype(np.float16)
    if not np.isfinite(scaled).all():
        raise VolumeError(f"{path}: scaled voxels beyond 65504 do not fit 2 bytes, look at `intensity` and `window`")
    return scaled


# ---------------------------------------------------------------------------------------------------------------------
# cache: one memory-mapped .npy per array, an index.json beside them

FIRST_PER_CLASS = 4096              # foreground positions kept per class and scan, spread evenly over the class


def cache_folder(cfg):
    """Where the scans of this config lie preprocessed: another folder for every other preprocessing."""
    key = json.dumps(preprocessing(cfg), sort_keys=True, default=list)
    return Path(cfg.cache) / f"{cfg.dataset}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def cache_name(case):
    """File stem of a case: its id and a hash of its files' roles, names, sizes and times, so that a changed scan is redone."""
    sources = [len(case["images"]), len(case["targets"])]
    for path in map(Path, case["images"] + case["targets"] + ([case["label"]] if case["label"] else [])):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        sources += [(path.name, f.name, f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else (path.name, "missing") for f in files]
    return f"{case['id']}-{hashlib.sha256(repr(sources).encode()).hexdigest()[:12]}"


def read_index(folder):
    """{name: record} of the scans in a cache folder, {} of none."""
    try:
        return json.loads((folder / "index.json").read_text())["scans"]
    except FileNotFoundError:
        return {}


def _merge_index(folder, cfg, records):
    """Add records under a lock, so that several programs may fill one cache at the same time."""
    import fcntl
    with open(folder / "index.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scans = read_index(folder) | records
        with configs.replacing(folder / "index.json") as aside:
            aside.write_text(json.dumps({"preprocessing": preprocessing(cfg), "scans": scans}, default=list))


def _write_array(path, array):
    with configs.replacing(path) as aside, open(aside, "wb") as file:
        np.save(file, array)


def _fill_one(case, cfg, folder, name):
    """Worker: cache one case. Returns (name, record) or (name, reason)."""
    try:
        arrays, record = preprocess(case, cfg)
        # z slowest: a slab takes a run of slices, so a cut reads few pages besides its own
        for key in ("image", "target"):
            if key in arrays:
                _write_array(folder / f"{name}.{key}.npy", np.ascontiguousarray(rearrange(arrays[key], "c x y z -> c z x y")))
        if "label" in arrays:
            _write_array(folder / f"{name}.label.npy", np.ascontiguousarray(rearrange(arrays["label"], "x y z -> z x y")))
            _write_array(folder / f"{name}.positions.npy", _positions(arrays["label"]))
        return name, record
    except VolumeError as error:
        return name, str(error)
    except OSError as error:
        return name, f"{folder / name}: cannot be written ({_one_line(error)})"


def _positions(label):
    """(m, 4) int32 rows (class, x, y, z): up to FIRST_PER_CLASS voxels of every class but 0, evenly picked in memory order."""
    rows = [np.zeros((0, 4), np.int32)]
    for k in np.unique(label[label > 0]):
        flat = np.flatnonzero(label == k)
        flat = flat[np.linspace(0, len(flat) - 1, min(len(flat), FIRST_PER_CLASS)).astype(np.int64)]
        rows.append(np.stack([np.full(len(flat), k), *np.unravel_index(flat, label.shape)], 1).astype(np.int32))
    return np.concatenate(rows)


def fill_cache(cases, cfg, say=print):
    """Cache every case that is not cached yet. Returns ([(case, name, record)] in the order of `cases`, [reason] of the others).

    Announces the size before it writes; exits with one line when the disk is too small. Killed at any moment it leaves
    whole arrays only and goes on from there when called again; several programs may fill the same folder.
    """
    folder = cache_folder(cfg)
    names = [cache_name(case) for case in cases]
    index = read_index(folder)
    todo = [k for k, name in enumerate(names) if name not in index]
    reasons = {}
    if todo:
        need = sum(_expected_bytes(cases[k], cfg) for k in todo)
        parent = next(p for p in [folder, *folder.resolve().parents] if p.exists())
        free = shutil.disk_usage(parent).free
        say(f"cache {folder}: {len(todo)} of {len(cases)} scans to write, at most {need / 1e9:.2f} GB, {free / 1e9:.1f} GB free")
        if need > 0.98 * free:
            raise SystemExit(f"{folder}: the cache needs up to {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):                           # of a killed run; a live one is younger
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
        for name, result in _in_processes(cases, names, todo, cfg, folder, say):
            if isinstance(result, str):
                reasons[name] = result
        index = read_index(folder)
    good = [(case, name, index[name]) for case, name in zip(cases, names) if name in index and name not in reasons]
    return good, [reasons[name] for name in names if name in reasons]


def _end_with_parent():
    """In a worker: when the program is killed, end too, instead of waiting for its next job for ever."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _in_processes(cases, names, todo, cfg, folder, say):
    started = shown = saved = time.time()
    fresh, unusable = {}, 0
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized() else "spawn"
    processes, context = max(1, min(cfg.workers, len(todo))), multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=_end_with_parent) as pool:
        jobs = [pool.submit(_fill_one, cases[k], cfg, folder, names[k]) for k in todo]
        try:
            for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                name, result = job.result()
                unusable += isinstance(result, str)
                if not isinstance(result, str):
                    fresh[name] = result
                now = time.time()
                if now - saved > 20 or done == len(jobs):           # the index of 10,000 scans is large: not after each of them
                    _merge_index(folder, cfg, fresh)
                    fresh, saved = {}, now
                if now - shown > 5 or done == len(jobs):
                    rate = done / (now - started)
                    say(f"  {done}/{len(jobs)} scans, {unusable} unusable, {rate:.2f} scans/s, {(len(jobs) - done) / rate:.0f} s left")
                    shown = now
                yield name, result
        except concurrent.futures.process.BrokenProcessPool:
            raise SystemExit(f"a process that fills {folder} was killed (out of memory?); try --workers={max(1, cfg.workers // 2)}") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _expected_bytes(case, cfg):
    """Upper bound of what a case will take, from the headers alone; 0 for what the reader will refuse anyway."""
    total = 0
    for path in map(Path, case["images"] + case["targets"] + ([case["label"]] if case["label"] else [])):
        try:
            if str(path) == case["label"]:                          # its table of positions, 16 bytes a row
                total += 16 * FIRST_PER_CLASS * (len(cfg.labels) or 32)
            if cfg.resize:
                total += 2 * math.prod(cfg.resize)
            elif path.name.endswith((".nii", ".nii.gz")):
                image = nib.load(path)
                voxels = math.prod(image.shape)
                if voxels * image.get_data_dtype().itemsize > path.stat().st_size * 1032:
                    continue
                if cfg.spacing:
                    voxels *= math.prod(spacing_of(image.affine)) / math.prod(cfg.spacing)
                total += 2 * int(voxels)
            else:                                                   # packed pictures: about 2 bytes a voxel after unpacking 2 to 1
                total += 2 * sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]))
        except Exception:                                           # the reader names the reason, here only the size counts
            continue
    return total


class Scan:
    """A cached case: memory-mapped arrays, opened when first used (so that it travels to worker processes as a few strings)."""

    def __init__(self, folder, name, case, record):
        self.stem, self.id, self.subject, self.case, self.record = str(Path(folder) / name), case["id"], case["subject"], case, record
        self.shape, self.fill = tuple(record["shape"]), np.array(record["fill"], np.float32)
        self.spacing, self.affine = np.array(record["spacing"]), np.array(record["affine"])

    def open(self, key="image"):
        """(c, x, y, z) float16 for "image" and "target", (1, x, y, z) for "label": a view of the file, nothing is read yet."""
        array = np.load(f"{self.stem}.{key}.npy", mmap_mode="r")
        return rearrange(array, "c z x y -> c x y z" if key != "label" else "z x y -> 1 x y z")

    def positions(self):
        return np.load(f"{self.stem}.positions.npy", mmap_mode="r")

    def cut(self, low, high, key="image", fill=None):
        """Voxels [low, high) along x y z, which may reach outside the scan: there is `fill` (a value per channel)."""
        array = self.open(key)
        fill = self.fill if fill is None else np.asarray(fill)
        low, high = np.asarray(low), np.asarray(high)
        out = np.empty((array.shape[0], *(high - low)), array.dtype)
        out[:] = fill[:, None, None, None]
        a, b = np.maximum(low, 0), np.minimum(high, self.shape)
        if (b > a).all():
            into = tuple(slice(i, j) for i, j in zip(a - low, b - low))
            out[(slice(None), *into)] = array[(slice(None), *(slice(i, j) for i, j in zip(a, b)))]
        return out


def open_scans(cfg, cases=None, say=print):
    """The cached scans of `cases`, default all that the config finds; exits with one line per unusable file."""
    good, reasons = fill_cache(find_cases(cfg) if cases is None else cases, cfg, say)
    if reasons:
        raise SystemExit("\n".join(reasons) + f"\n{len(reasons)} unusable; mend them or name their ids under `exclude`")
    folder = cache_folder(cfg)
    return [Scan(folder, name, case, record) for case, name, record in good]


# ---------------------------------------------------------------------------------------------------------------------
# move and match

def random_affine(generator, centre, rotation=(0, 0, 0), scale=(1, 1), shear=0.0, shift=(0, 0, 0), flip=(0, 0, 0), spacing=(1, 1, 1)):
    """One random H (4, 4) float64 about the point `centre` (3,) in voxels.

    rotation (3,) largest angle about x, y, z in degrees; scale (least, largest) zoom, drawn per axis; shear largest ratio;
    shift (3,) largest translation in voxels; flip (3,) probability per axis; all uniform in +- the range. Rotation and
    shear act in mm (`spacing` (3,)), so that a turned body stays a body on anisotropic voxels.
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
    k = np.eye(3)
    k[~np.eye(3, dtype=bool)] = lean
    d = np.asarray(spacing, float)
    linear = (r_z @ r_y @ r_x @ k) * d / d[:, None] * (zoom * mirror)
    H = np.eye(4)
    H[:3, :3] = linear
    H[:3, 3] = np.asarray(centre) + move - linear @ np.asarray(centre, float)
    return torch.from_numpy(H)


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
    source = torch.tensor(volume.shape[2:], dtype=torch.float64, device=H.device)
    goal = torch.tensor(tuple(size), dtype=torch.float64, device=H.device)
    # torch samples at normalised points, -1 and 1 the outer faces of the outermost voxels, axes listed z y x
    into = torch.diag_embed(torch.cat([goal / 2, goal.new_ones(1)]))
    into[:3, 3] = goal / 2 - 0.5
    out = torch.diag_embed(torch.cat([2 / source, source.new_ones(1)]))
    out[:3, 3] = 1 / source - 1
    theta = (out @ torch.linalg.inv(H.double()) @ into)[:, :3]
    theta = torch.cat([theta[:, :, :3].flip(1, 2), theta[:, :, 3:].flip(1)], 2)
    real = volume if volume.is_floating_point() else volume.float()
    grid = F.affine_grid(theta.to(real.dtype), (len(volume), 1, *size), align_corners=False)
    fill = torch.as_tensor(fill, dtype=real.dtype, device=real.device)
    fill = rearrange(fill, "b c -> b c 1 1 1") if fill.ndim else fill
    moved = F.grid_sample(real - fill, grid, mode="bilinear" if mode == "linear" else "nearest", align_corners=False) + fill
    return moved.to(volume.dtype)


def patch_centres(grid, patch):
    """(t, 3) float64 centres, in voxels, of grid (i, j, k) patches of edge `patch` (one number or three); order "(i j k)"."""
    edges = (patch,) * 3 if isinstance(patch, int) else patch
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) * p - 0.5 for n, p in zip(grid, edges)]
    return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "d i j k -> (i j k) d")


def matches(H, grid, patch):
    """Eq. 2 and 3 as a list: long (m, 3) rows (b, i, j), sorted, patch i of V and patch j of V' show the same tissue.

    H (b, 4, 4). Cost and memory grow with t, not t^2: only the patches around H(c_i) are looked at.
    Both borders of a patch belong to it, as Eq. 3 says, so an exact half-patch shift gives a token two partners.
    """
    edges = torch.tensor((patch,) * 3 if isinstance(patch, int) else tuple(patch), dtype=torch.float64)
    size = torch.tensor(tuple(grid))
    H = H.detach().double().cpu()
    c = patch_centres(grid, patch)                                  # (t, 3)
    there, back = transform(H, c), torch.linalg.inv(H)              # (b, t, 3)
    cell = (there + 0.5) / edges - 0.5                              # patch j has its centre at cell j
    low, high = torch.ceil(cell - 0.5 - 1e-9).long(), torch.floor(cell + 0.5 + 1e-9).long()
    rows = []
    for corner in product((0, 1), repeat=3):                        # low and high differ only on a border between patches
        pick = torch.tensor(corner, dtype=torch.bool)
        j = torch.where(pick, high, low)
        ok = (~pick | (high != low)).all(-1) & (j >= 0).all(-1) & (j < size).all(-1)
        b, i = ok.nonzero(as_tuple=True)
        j = j[b, i]
        c_j = (j + 0.5) * edges - 0.5
        home = (back[b, :3, :3] @ c_j[:, :, None])[:, :, 0] + back[b, :3, 3]
        both = ((there[b, i] - c_j).abs() <= edges / 2).all(-1) & ((home - c[i]).abs() <= edges / 2).all(-1)
        flat = (j[:, 0] * size[1] + j[:, 1]) * size[2] + j[:, 2]
        rows.append(torch.stack([b, i, flat], 1)[both])
    rows = torch.cat(rows)
    t = int(size.prod())
    return rows[torch.argsort((rows[:, 0] * t + rows[:, 1]) * t + rows[:, 2])]


def correspondence(H, grid, patch):
    """M_gt of Eq. 2 and 3: bool (t, t), or (b, t, t) for H (b, 4, 4); True where patch i of V and patch j of V' match.

    Row i is patch i of V, column j patch j of V', t = product of grid, order "(i j k)". H(c_i) must lie in patch j and
    H^-1(c_j) in patch i.
    """
    t = math.prod(grid)
    many = H if H.ndim == 3 else H[None]
    pairs = matches(many, grid, patch)
    M_gt = torch.zeros(len(many), t, t, dtype=torch.bool)
    M_gt[pairs[:, 0], pairs[:, 1], pairs[:, 2]] = True
    return (M_gt if H.ndim == 3 else M_gt[0]).to(H.device)


# ---------------------------------------------------------------------------------------------------------------------
# intensity

def draw_jitter(generator, cfg):
    """(5,) float32 shift, scale, gamma, noise, blur of one view; 0, 1, 1, 0, 0 leave it as it is."""
    on, size = generator.uniform(0, 1, 5), generator.uniform(-1, 1, 5)
    ranges = (cfg.jitter_shift, cfg.jitter_scale, cfg.jitter_gamma, cfg.jitter_noise, cfg.jitter_blur)
    shift, scale, gamma, noise, blur = [size[k] * r * (on[k] < p) for k, (p, r) in enumerate(ranges)]
    gamma = 1 + gamma if gamma >= 0 else 1 / (1 - gamma)
    return np.array([shift, 1 + scale, gamma, abs(noise), abs(blur)], np.float32)


def jitter(x, draws, seeds):
    """Intensity changes of x (b, c, x, y, z) float32; draws (b, 5) of draw_jitter, seeds (b,) for the noise field."""
    shift, scale, gamma, noise, blur = rearrange(draws, "b k -> k b 1 1 1 1")
    if (gamma != 1).any():
        low, high = x.amin((1, 2, 3, 4), keepdim=True), x.amax((1, 2, 3, 4), keepdim=True)
        reach = (high - low).clamp(min=1e-6)
        x = torch.where(gamma == 1, x, low + reach * ((x - low) / reach).clamp(0, 1) ** gamma)
    if (blur > 0).any():
        x = _blur(x, blur.flatten())
    x = x * scale + shift
    for k in (noise.flatten() > 0).nonzero().flatten().tolist():    # one generator per sample: the field is the sample's own
        field = torch.Generator(x.device).manual_seed(int(seeds[k]))
        x[k] += noise[k] * torch.randn(x[k].shape, generator=field, device=x.device)
    return x


def _blur(x, sigma):
    reach = max(3, math.ceil(3 * float(sigma.max())))
    steps = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=1e-3)[:, None]) ** 2)     # sigma 0 leaves the centre alone
    kernel = kernel * (steps.abs() <= (3 * sigma).ceil().clamp(min=3)[:, None])    # a sample's kernel is its own, whoever is beside it
    kernel = repeat(kernel / kernel.sum(1, keepdim=True), "b k -> (b c) k", c=x.shape[1])
    flat = rearrange(x, "b c x y z -> 1 (b c) x y z")
    for shape, pad in (("n k -> n 1 k 1 1", (0, 0, 0, 0, reach, reach)), ("n k -> n 1 1 k 1", (0, 0, reach, reach, 0, 0)),
                       ("n k -> n 1 1 1 k", (reach, reach, 0, 0, 0, 0))):
        flat = F.conv3d(F.pad(flat, pad, mode="replicate"), rearrange(kernel, shape), groups=len(kernel))
    return rearrange(flat, "1 (b c) x y z -> b c x y z", b=len(x))


# ---------------------------------------------------------------------------------------------------------------------
# pre-training samples

class Slabs(torch.utils.data.Dataset):
    """Pre-training samples; item (step, place) depends on the seed, the step and the place in the global batch alone."""

    def __init__(self, scans, cfg, batch, seed):
        if any(s % c for s, c in zip(cfg.slab, cfg.crop)):
            raise SystemExit(f"slab = {cfg.slab} is not tiled by crops of {cfg.crop}")
        self.scans, self.cfg, self.batch, self.seed = scans, cfg, batch, seed
        self.epoch, self.order = None, None

    def __getitem__(self, where):
        step, place = where
        epoch, k = divmod(step * self.batch + place, len(self.scans))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.scans))
        return self.sample(self.scans[self.order[k]], np.random.default_rng((self.seed, 2, step, place)))

    def sample(self, scan, generator):
        """Cut one slab and what its two moved copies need around it.

        returns cutout (c, x, y, z) float16, offset (3,) of the slab in it, H (4, 4) in slab coordinates, crop (3,) start of the
        crop of L_g in the slab, H_twin (4, 4) in crop coordinates, scan_box (2, 3) the scan's extent in slab coordinates,
        fill (c,), draws (2, 5) and seeds (2,) of the intensity changes (V', twin), id.
        """
        cfg = self.cfg
        size, crop, shape = np.array(cfg.slab), np.array(cfg.crop), np.array(scan.shape)
        room = shape - size
        start = np.where(room > 0, generator.integers(0, np.maximum(room, 0) + 1), -((-room) // 2))
        H = random_affine(generator, (size - 1) / 2, cfg.rotation, cfg.scale, cfg.shear, cfg.shift, cfg.flip, scan.spacing)
        crop_start = generator.integers(0, size // crop) * crop
        H_twin = random_affine(generator, (crop - 1) / 2, cfg.twin_rotation, cfg.twin_scale, cfg.twin_shear, cfg.twin_shift,
                               cfg.flip, scan.spacing)
        low, high = start, start + size                             # the slab itself, padded where the scan is smaller
        for move, edge, origin in ((H, size, start), (H_twin, crop, start + crop_start)):
            a, b = seen_through(move, edge, origin, shape)
            low, high = np.minimum(low, a), np.maximum(high, b)
        return dict(cutout=torch.from_numpy(scan.cut(low, high)), offset=torch.from_numpy(start - low), H=H, H_twin=H_twin,
                    crop=torch.from_numpy(crop_start), scan_box=torch.from_numpy(np.stack([-start, shape - start])),
                    fill=torch.from_numpy(scan.fill), draws=torch.from_numpy(np.stack([draw_jitter(generator, cfg) for _ in range(2)])),
                    seeds=torch.from_numpy(generator.integers(0, 2 ** 62, 2)), id=scan.id)


def seen_through(H, size, origin, shape):
    """Box (low, high) of scan voxels, within `shape`, that a view of `size` voxels shows after H about a frame at `origin`."""
    corners = torch.tensor(list(product(*[(0.0, n - 1.0) for n in size])), dtype=torch.float64)
    seen = transform(torch.linalg.inv(H), corners).numpy() + origin
    low = np.clip(np.floor(seen.min(0)), 0, shape).astype(int)
    return low, np.maximum(np.clip(np.ceil(seen.max(0)) + 1, 0, shape).astype(int), low)


def collate(samples):
    """Stack samples; the cutout (and its label and target) is padded at the end of each axis to the largest of the batch."""
    cuts = [key for key in ("cutout", "label", "target") if key in samples[0]]
    batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0] if key not in (*cuts, "id")}
    largest = [max(s["cutout"].shape[d] for s in samples) for d in (1, 2, 3)]
    for key in cuts:
        fill = batch["target_fill" if key == "target" else "fill"] * (key != "label")
        fill = fill[:, :samples[0][key].shape[0]]                   # a label has one channel, background is 0
        kind = torch.int16 if key == "label" else torch.float16     # of labels some scans hold uint8, some int16
        batch[key] = rearrange(fill, "b c -> b c 1 1 1").to(kind).repeat(1, 1, *largest)
        for k, s in enumerate(samples):
            batch[key][k][tuple(slice(n) for n in s[key].shape)] = s[key]
    return batch | {"id": [s["id"] for s in samples]}


def views(batch, cfg):
    """On the device: V (b, c, *slab), V' (b, c, *slab) and the twin of one crop (b, c, *crop), all float32.

    V' is interpolated from the tissue around the slab, so that what turns into view is real tissue; V is left plain, V'
    and the twin change their intensities.
    """
    cutout, fill, offset = batch["cutout"].float(), batch["fill"], batch["offset"]
    V = torch.stack([t[:, x:x + cfg.slab[0], y:y + cfg.slab[1], z:z + cfg.slab[2]] for t, (x, y, z) in zip(cutout, offset.tolist())])
    V_ = warp(cutout, batch["H"] @ translation(-offset), cfg.slab, fill=fill)
    twin = warp(cutout, batch["H_twin"] @ translation(-offset - batch["crop"]), cfg.crop, fill=fill)
    return V, jitter(V_, batch["draws"][:, 0], batch["seeds"][:, 0]), jitter(twin, batch["draws"][:, 1], batch["seeds"][:, 1])


def tokens_inside(batch, grid, patch):
    """valid, valid_ (b, t) bool: tokens of V and of V' whose patch centre lies inside the scan, not in padding."""
    low, high = rearrange(batch["scan_box"].double(), "b e d -> e b 1 d") - 0.5
    c = patch_centres(grid, patch).to(low.device)
    home = transform(torch.linalg.inv(batch["H"]), c)
    return [((p >= low) & (p <= high)).all(-1) for p in (c.expand_as(home), home)]


# ---------------------------------------------------------------------------------------------------------------------
# downstream samples

class Crops(torch.utils.data.Dataset):
    """Labelled training crops; item (step, place) depends on the seed, the step and the place in the global batch alone.

    `scans` hold a label map, a target image or a class number (`classes`: {id: int}). cfg.positive is the share of crops that are
    centred on a labelled voxel: of a class drawn among those the scan has, each as likely, then of a voxel of that class.
    """

    def __init__(self, scans, cfg, batch, seed, classes=None):
        self.scans, self.cfg, self.batch, self.seed, self.classes = scans, cfg, batch, seed, classes
        self.epoch, self.order = None, None

    def __getitem__(self, where):
        step, place = where
        case, crop = divmod(place, self.cfg.crops_per_case)
        epoch, k = divmod(step * (self.batch // self.cfg.crops_per_case) + case, len(self.scans))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.scans))
        return self.sample(self.scans[self.order[k]], np.random.default_rng((self.seed, 2, step, place)))

    def sample(self, scan, generator):
        """cutout (c, x, y, z) float16 around a crop, H (4, 4) from cutout to crop, and label / target on the cutout's grid,
        or the class number; fill, draws (1, 5), seeds (1,), id as in Slabs."""
        cfg, shape, size = self.cfg, np.array(scan.shape), np.array(self.cfg.crop)
        room = shape - size
        start = np.where(room > 0, generator.integers(0, np.maximum(room, 0) + 1), -((-room) // 2))
        aim, pick = generator.uniform(), generator.integers(0, 2 ** 31, 2)
        if "ids" in scan.record and aim < cfg.positive:
            positions = scan.positions()
            present = np.unique(positions[:, 0])
            if len(present):                                        # a scan without any object is drawn at random places
                mine = positions[positions[:, 0] == present[pick[0] % len(present)]]
                centred = mine[pick[1] % len(mine), 1:] - size // 2
                start = np.where(room > 0, np.clip(centred, 0, np.maximum(room, 0)), start)
        H = random_affine(generator, (size - 1) / 2, cfg.rotation, cfg.scale, cfg.shear, cfg.shift, cfg.flip, scan.spacing)
        low, high = seen_through(H, size, start, shape)
        high = np.maximum(high, low + 1)                            # moved wholly out of the scan: one voxel that says so
        low = np.minimum(low, shape - 1)
        high = np.minimum(high, shape)
        out = dict(cutout=torch.from_numpy(scan.cut(low, high)), H=H @ translation(low - start), fill=torch.from_numpy(scan.fill),
                   draws=torch.from_numpy(draw_jitter(generator, cfg)[None]), id=scan.id,
                   seeds=torch.from_numpy(generator.integers(0, 2 ** 62, 1)))
        if "ids" in scan.record:
            out["label"] = torch.from_numpy(scan.cut(low, high, "label", [0]))
        if "target_fill" in scan.record:
            fill = np.array(scan.record["target_fill"], np.float32)
            out |= dict(target=torch.from_numpy(scan.cut(low, high, "target", fill)), target_fill=torch.from_numpy(fill))
        if self.classes:
            out["class"] = torch.tensor(self.classes[scan.id])
        return out


def moved_crops(batch, cfg):
    """On the device: image (b, c, *crop) float32, changed in place and intensity, and label (b, 1, *crop) long, target
    (b, c, *crop) float32 or None, through the same matrix (linear for images, nearest for labels)."""
    image = warp(batch["cutout"].float(), batch["H"], cfg.crop, fill=batch["fill"])
    label = warp(batch["label"].float(), batch["H"], cfg.crop, "nearest").round().long() if "label" in batch else None
    target = warp(batch["target"].float(), batch["H"], cfg.crop, fill=batch["target_fill"]) if "target" in batch else None
    return jitter(image, batch["draws"][:, 0], batch["seeds"][:, 0]), label, target


# ---------------------------------------------------------------------------------------------------------------------
# program

def summary(good):
    """Text table of what the usable scans are like."""
    records = [record for _, _, record in good]
    rows = [("", "least", "median", "largest")]

    def row(name, values, form):
        values = np.array(values, float)
        rows.append((name, *[" x ".join(form.format(v) for v in np.atleast_1d(f(values, axis=0))) for f in (np.min, np.median, np.max)]))
    row("shape, as stored", [r["stored_shape"] for r in records], "{:.0f}")
    row("spacing x y z, mm", [r["stored_spacing"] for r in records], "{:.3g}")
    row("smallest value", [r["range"][0] for r in records], "{:.4g}")
    row("largest value", [r["range"][1] for r in records], "{:.4g}")
    row("shape in the cache", [r["shape"] for r in records], "{:.0f}")
    width = [max(len(r[k]) for r in rows) for k in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, width)).rstrip() for r in rows]
    axes = {o: sum(r["stored"] == o for r in records) for o in sorted({r["stored"] for r in records})}
    lines.append("stored axes: " + ", ".join(f"{o} {n}" for o, n in axes.items()))
    labelled = [r["ids"] for r in records if "ids" in r]
    if labelled:
        lines.append("label ids (scans): " + ", ".join(f"{k} ({sum(k in ids for ids in labelled)})" for k in sorted(set().union(*labelled))))
    return "\n".join(lines)


def main(argv):
    cfg = configs.load(Config, argv)
    cases = find_cases(cfg)
    print(f"{len(cases)} cases below {root(cfg)}")
    good, reasons = fill_cache(cases, cfg)
    if good:
        print(summary(good))
        print(f"{len(good)} usable scans in {cache_folder(cfg)}")
    for reason in reasons:
        print(f"unusable  {reason}")
    if reasons:
        raise SystemExit(f"{len(reasons)} of {len(cases)} cases are unusable; mend them or name their ids under `exclude`")


if __name__ == "__main__":
    main(sys.argv[1:])
