"""One scan on disk as an array: read, checked, its axes in RAS+ order; scaled; its label ids; another grid.

NIfTI by nibabel; .mha .mhd .nrrd and DICOM by SimpleITK; slices by Pillow. What cannot be used is refused in
one line that starts with the file's name.
"""
import gzip
import math
import re
import zlib
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from einops import rearrange
from scipy import ndimage


class VolumeError(ValueError):
    """A file that cannot be used; the text is one line that starts with the file's name."""


def read_volume(path, label=False):
    """One scan as (voxels (x, y, z) float32, spacing (3,) mm, affine (4, 4) voxel -> mm), axes in RAS+ order.

    NIfTI (.nii, .nii.gz) by nibabel; .mha .mhd .nrrd and a DICOM folder by SimpleITK; a folder of .png / .jpg
    slices, sorted by the number in their names, by Pillow (no spacing known: 1 mm; rows run front to back,
    columns right to left, slices towards the head). scl_slope is applied. label=True allows a volume of one
    value (a scan without any object). Raises VolumeError, one line with the file's name, for anything that is
    no finite single-channel 3D volume.
    """
    voxels, affine = to_ras(*read_stored(path, label))
    return np.ascontiguousarray(voxels), spacing_of(affine), affine


def few_values(voxels, most=32):
    """How many values a volume has where they are whole and at most `most`, as of a label map, or up to 256
    and most voxels like the next, as of one of many organs and no scan of 8 bits, else 0; by a hundred
    thousand of its voxels and more."""
    some = voxels.ravel("K")[::max(1, voxels.size // 200_000)]
    values, counts = np.unique(some, return_counts=True)
    if len(values) > 256 or not (values == np.round(values)).all():
        return 0
    if len(values) > most:
        step = max(1, voxels.shape[-1] // 8)
        planes = voxels[..., step // 2::step]
        plain = values[0], values[-1], values[counts.argmax()]      # what a window cuts off, the background
        shown = ~np.isin(planes[:-1], plain)
        if not shown.any() or (planes[1:] == planes[:-1])[shown].mean() < 0.6:
            return 0
    return len(values)


def background_of(voxels):
    """What surrounds the brain of a skull-stripped scan (x, y, z): the most frequent value, if a tenth of the
    voxels have it and at most a tenth less, for interpolation goes below the air; else the least."""
    some = voxels.ravel()[::max(1, voxels.size // 1_000_000)]
    values, counts = np.unique(some, return_counts=True)
    most = values[counts.argmax()]
    return float(most if counts.max() >= 0.1 * some.size and (some < most).mean() <= 0.1 else voxels.min())


def header_doubts(path):
    """[text]: what the header of a scan leaves open or contradicts, and how it was read all the same."""
    path = Path(path)
    if path.name.endswith((".nii", ".nii.gz")):
        return _nifti_doubts(nib.load(path))
    said = []
    if path.suffix in (".mha", ".mhd", ".nrrd") and path.is_file():
        with open(path, "rb") as file:
            text = file.read(1 << 16).decode("latin-1")             # ends in voxels, which hold none of these
        axes, lengths = ((r"^space: *(left|right|las|lps|ras)", r"^(space directions|spacings):")
                         if path.suffix == ".nrrd" else
                         (r"^(TransformMatrix|Rotation|Orientation) *=", r"^Element(Spacing|Size) *="))
        if not re.search(axes, text, re.MULTILINE | re.IGNORECASE):
            said.append("orientation unknown (the header has none): x taken to run left, y back, z up")
        if not re.search(lengths, text, re.MULTILINE | re.IGNORECASE):
            said.append("voxel size unknown (the header has none): taken for 1 mm")
    return said


def _nifti_doubts(image):
    said, header, affine = [], image.header, image.affine[:3, :3]
    lengths = np.linalg.norm(affine, axis=0)
    if not (header["sform_code"] or header["qform_code"]):
        said.append("orientation unknown (sform_code and qform_code are 0): taken for LAS")
    if header["sform_code"]:
        if np.abs(np.abs(header["pixdim"][1:4]) / lengths - 1).max() > 0.01:
            said.append("voxel sizes of `pixdim` and of `sform` differ: those of `sform` are used")
        if header["qform_code"] and (header["pixdim"][0] < 0) != (np.linalg.det(affine) < 0):   # its qfac
            said.append("`sform` and `qform` are mirror images of each other: `sform` is used")
        cosines = (affine / lengths).T @ (affine / lengths)
        if np.abs(cosines - np.eye(3)).max() > 0.02:                # a degree
            said.append("axes not at right angles (a tilted gantry, a registration?): taken for straight")
    return said


def read_header(path):
    """(shape (3,), spacing (3,) mm) of a scan in RAS+ order: from the header alone where it is NIfTI."""
    if str(path).endswith((".nii", ".nii.gz")):
        _, affine, shape = _open_nifti(Path(path))
        orientation = nib.io_orientation(affine)
        shape = np.array(shape)[np.argsort(orientation[:, 0])]
        return shape, spacing_of(affine @ nib.orientations.inv_ornt_aff(orientation, tuple(shape)))
    voxels, spacing, _ = read_volume(path)
    return np.array(voxels.shape), spacing


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
        raise VolumeError(f"{path}: unknown format, "
                          "expected .nii .nii.gz .mha .mhd .nrrd, a DICOM folder or a folder of slices")
    bad, count = np.count_nonzero(~np.isfinite(voxels)), voxels.size
    if bad:
        raise VolumeError(f"{path}: {bad} of {count} voxels are not finite as float32 (NaN or infinite)")
    if not label and (least := voxels.min()) == voxels.max():
        raise VolumeError(f"{path}: every voxel is {least:g}, a constant volume holds nothing to learn")
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
        raise VolumeError(f"{path}: shape {tuple(shape)} is {kind}, "
                          "expected one 3D volume with at least 2 voxels per axis")
    if not np.isfinite(affine).all():
        raise VolumeError(f"{path}: the affine holds NaN or infinite values")
    lengths = spacing_of(affine)
    if min(lengths) <= 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise VolumeError(f"{path}: the affine is singular (axis lengths "
                          f"{', '.join(f'{v:.3g}' for v in lengths)} mm), expected three independent axes")
    if not plausible(lengths):
        raise VolumeError(f"{path}: voxels of {' x '.join(f'{v:.3g}' for v in lengths)} mm, expected 0.01 to "
                          "100 mm; is the affine in metres or microns?")
    return shape


def plausible(lengths):
    """Whether voxels of these lengths (3,) in mm can be those of a scan: 0.01 to 100."""
    return 0.01 <= min(lengths) and max(lengths) <= 100


def _open_nifti(path):
    """The image of nibabel, not yet read, its affine in mm, and its checked shape."""
    try:
        image = nib.load(path)
    except Exception as error:
        raise VolumeError(f"{path}: not a readable NIfTI file ({one_line(error)})") from None
    if not isinstance(image, nib.spatialimages.SpatialImage):       # CIFTI: surfaces, in a .nii of its own
        raise VolumeError(f"{path}: holds a {type(image).__name__}, expected a volume of voxels")
    kind = image.get_data_dtype()
    if kind.names or kind.kind == "c":
        raise VolumeError(f"{path}: voxels are {'RGB' if kind.names else 'complex'} ({kind}), "
                          "expected one real number per voxel")
    affine = image.affine.copy()
    affine[:3] *= {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)    # m, microns to mm
    shape = _check_header(path, image.shape, affine)
    count, start = math.prod(shape), int(image.dataobj.offset)
    if start < 0:
        raise VolumeError(f"{path}: the voxels begin at byte {start} by the header, expected 0 or more")
    claimed, packed, size = start + count * kind.itemsize, path.name.endswith(".gz"), path.stat().st_size
    if claimed > size * (1032 if packed else 1):                    # deflate cannot pack more than 1032 to 1
        raise VolumeError(f"{path}: the header claims {count} voxels ({claimed:.3g} bytes), "
                          f"the file holds {size} bytes{' packed' if packed else ''}")
    return image, affine, shape


def _read_nifti(path):
    image, affine, shape = _open_nifti(path)
    kind, count, start = image.get_data_dtype(), math.prod(shape), int(image.dataobj.offset)
    claimed, packed = start + count * kind.itemsize, path.name.endswith(".gz")
    # nibabel stops at the last voxel, before the gzip checksum: read the stream to its end ourselves
    try:
        with (gzip.open if packed else open)(path, "rb") as stream:
            content, there = bytearray(), 0                         # grows with what is there, not as claimed
            while piece := stream.read(1 << 22):
                content += piece[:claimed - len(content)]
                there += len(piece)
    except (EOFError, OSError, zlib.error) as error:
        raise VolumeError(f"{path}: the file is damaged ({one_line(error)})") from None
    if not claimed <= there < claimed + kind.itemsize:
        raise VolumeError(f"{path}: the header claims {claimed} bytes of header and voxels, "
                          f"the file holds {there}")
    voxels = np.frombuffer(content, kind, count, start).reshape(shape, order="F")
    slope, inter = image.dataobj.slope, image.dataobj.inter
    with np.errstate(over="ignore", invalid="ignore"):              # the caller refuses what overflows
        if (slope, inter) != (1, 0):
            voxels = voxels * float(slope) + float(inter)
        return voxels.astype(np.float32), affine


DICOM_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's world: left, back, head; NIfTI's: right, front, head


def _sitk(path):
    try:
        import SimpleITK
    except ImportError:
        raise VolumeError(f"{path}: this format needs SimpleITK, "
                          "install it with: pip install SimpleITK") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def files_of(path):
    """The files that a volume is read from: itself, those of a folder, of .mhd those that it names, too."""
    path = Path(path)
    if path.is_dir():
        return sorted(path.iterdir())
    return [path, *(_named_by(path) if path.suffix == ".mhd" and path.is_file() else ())]


def _named_by(header):
    """The files of voxels that an .mhd names: one, numbered ones or a list; none where they follow in it."""
    with open(header, errors="replace") as file:
        text = file.read(1 << 20)
    found = re.search(r"^ElementDataFile *= *(\S.*?) *$", text, re.MULTILINE)
    names = [found[1]] if found and found[1].lower() != "local" else []
    if found and found[1].startswith("LIST"):
        names = text[found.end():].split("\n")
    elif found and re.fullmatch(r"\S*%\d*d\S*( \d+){2,3}", found[1]):
        name, *span = found[1].split()
        first, last, step = *map(int, span[:2]), int(span[2]) if len(span) > 2 else 1
        names = [name % k for k in range(first, last + 1, max(step, 1))]
    return [header.parent / name.strip() for name in names if name.strip()]


def _check_room(reader, files):
    """RuntimeError where an image cannot lie in its files (.mhd: one beside), before room is made for it."""
    voxels, there = math.prod(reader.GetSize()), sum(Path(file).stat().st_size for file in files)
    if voxels > 1032 * there:                                       # as of NIfTI above
        raise RuntimeError(f"the header claims {voxels} voxels, the file holds {there} bytes")


def _itk_reason(error):
    """Its last words: before them stands where in its source it was."""
    return one_line(re.sub(r"(?s).*(ERROR: (\w+\(0x\w+\): )?|\.(cxx|h):\d+ \(\):)", "", str(error)))


def _read_itk(path, files=None):
    sitk = _sitk(path)
    try:
        if not files:
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            _check_room(reader, files_of(path))
        # a PET series has a slope for each slice: the first one's type would cut the fractions of the others
        image = sitk.ReadImage(files, sitk.sitkFloat32) if files else sitk.ReadImage(str(path))
    except Exception as error:
        raise VolumeError(f"{path}: not readable by SimpleITK ({_itk_reason(error)})") from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError(f"{path}: {image.GetNumberOfComponentsPerPixel()} values per voxel, expected one")
    size = image.GetSize()
    if len(size) != 3:
        raise VolumeError(f"{path}: shape {size} is {len(size)}D, expected one 3D volume")
    axes = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine = DICOM_TO_RAS @ nib.affines.from_matvec(axes, image.GetOrigin())
    _check_header(path, size, affine)
    voxels = sitk.GetArrayFromImage(image)
    if voxels.dtype.kind == "c":
        raise VolumeError(f"{path}: voxels are complex, expected one real number per voxel")
    return rearrange(voxels, "z y x -> x y z").astype(np.float32), affine


def _read_folder(path):
    names = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
    slices = [p for p in names if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
    dicom = [p for p in names if _looks_dicom(p)]
    if slices and dicom:
        raise VolumeError(f"{path}: a folder with {len(slices)} pictures and {len(dicom)} DICOM files, "
                          "expected either; move the others away")
    if slices:
        return _read_slices(path, slices)
    series, places, turns, reader = (), [], [], _sitk(path).ImageFileReader()
    try:
        if names:
            series = _sitk(path).ImageSeriesReader.GetGDCMSeriesIDs(str(path))
        files = _sitk(path).ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0]) if series else ()
        for file in files:
            reader.SetFileName(file)
            reader.ReadImageInformation()
            _check_room(reader, [file])
            places.append(reader.GetOrigin())
            turns.append(reader.GetDirection())
            if reader.GetNumberOfComponents() != 1:
                raise VolumeError(f"{file}: {reader.GetNumberOfComponents()} values per voxel, expected one")
    except RuntimeError as error:
        raise VolumeError(f"{path}: not readable by SimpleITK ({_itk_reason(error)})") from None
    if len(series) != 1:
        raise VolumeError(f"{path}: a folder with {len(names)} files and {len(series)} DICOM series, "
                          "expected one DICOM series or .png / .jpg slices")
    used = {Path(file).name for file in files}
    left = [p for p in names if p.name not in used and (p in dicom or not p.stat().st_size)]
    if left:                            # at either end of the stack no gap would tell of them
        raise VolumeError(f"{left[0]}: no readable slice of the series ({left[0].stat().st_size} bytes), as "
                          f"{len(left)} of {len(names)} files; are they cut off? Mend them or move them away")
    gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)          # SimpleITK would spread them over a gap
    if len(gaps) and (gaps.min() <= 0 or np.abs(gaps - np.median(gaps)).max() > 0.25 * np.median(gaps)):
        raise VolumeError(f"{path}: its {len(files)} slices lie {gaps.min():.4g} to {gaps.max():.4g} mm "
                          "apart, expected one distance (is a slice missing, or there twice?)")
    _check_stack(path, np.array(places), np.array(turns), max(reader.GetSpacing()[:2]))
    return _read_itk(path, list(files))


def _looks_dicom(file):
    """Whether a file claims to be DICOM, by its ending or its magic word; an index of many is none."""
    with open(file, "rb") as stream:
        magic = stream.read(132)[128:] == b"DICM"
    return file.name.upper() != "DICOMDIR" and (magic or file.suffix.lower() in (".dcm", ".ima"))


def _check_stack(path, places, turns, pixel):
    """VolumeError where slices at `places` (n, 3) mm, with axes `turns` (n, 9), do not lie straight and
    evenly above each other, say by a tilted gantry: an affine that SimpleITK makes of them has no shear, one
    distance and the axes of one of them, so some would lie elsewhere. pixel: mm."""
    if len(places) < 2:
        return
    if (turned := np.abs(turns - turns[0]).max()) > 0.02:           # a degree
        raise VolumeError(f"{path}: the axes of its slices differ (direction cosines by {turned:.2g}), "
                          "expected one stack; is it two?")
    along, normal = places[-1] - places[0], turns[-1].reshape(3, 3)[:, 2]
    drift = np.linalg.norm(along - normal * (along @ normal))
    if drift > pixel:
        raise VolumeError(f"{path}: the last slice is shifted by {drift:.3g} mm against the first within "
                          "its plane (was the gantry tilted?), expected slices straight above each "
                          "other; resample the series")
    even = places[0] + np.linspace(0, 1, len(places))[:, None] * along
    off = np.linalg.norm(places - even, axis=1).max()
    if off > 0.5 * np.linalg.norm(along) / (len(places) - 1):
        raise VolumeError(f"{path}: spread evenly, a slice would lie {off:.3g} mm from its place: the "
                          "distance of the slices changes along the stack; resample the series")


def _read_slices(path, files):
    try:
        from PIL import Image
    except ImportError:
        raise VolumeError(f"{path}: a folder of slices needs Pillow, "
                          "install it with: pip install pillow") from None
    numbers = {}
    for p in files:
        digits = re.findall(r"\d+", p.stem)
        if not digits or int(digits[-1]) in numbers:
            has = f"the same as {numbers[int(digits[-1])].name}" if digits else "none"
            raise VolumeError(f"{p}: slices are sorted by the last number in their names, this one has {has}")
        numbers[int(digits[-1])] = p
    rows = []
    for _, file in sorted(numbers.items()):
        try:
            with Image.open(file) as picture:
                row = np.asarray(picture.convert("RGB") if picture.mode in ("P", "RGBA") else picture)
        except Exception as error:
            raise VolumeError(f"{file}: not a readable picture ({one_line(error)})") from None
        if row.ndim == 3 and (row == row[..., :1]).all():           # grey stored as RGB
            row = row[..., 0]
        if row.ndim != 2 or (rows and row.shape != rows[0].shape):
            like = f" of {rows[0].shape} like the first" if rows else ""
            raise VolumeError(f"{file}: shape {row.shape}, expected a grey slice{like}")
        rows.append(row)
    voxels = rearrange(np.stack(rows), "z row column -> column row z").astype(np.float32)
    _check_header(path, voxels.shape, DICOM_TO_RAS)
    return voxels, DICOM_TO_RAS.copy()


def one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


def on_grid_of(first, shape, first_affine, path, voxels, affine):
    """The voxels (x, y, z) of a file with this affine (4, 4) as RAS+; VolumeError where they do not lie on
    the grid, `shape` and first_affine in RAS+, of the case's first file."""
    voxels, affine = to_ras(voxels, affine)
    if voxels.shape != shape:
        raise VolumeError(f"{path}: shape {voxels.shape} (RAS), but {Path(first).name} has {shape}")
    corners = np.array([[*corner, 1] for corner in product(*[(0, n - 1) for n in shape])])
    off = np.linalg.norm(corners @ (affine - first_affine).T, axis=1).max()
    if off > 0.2 * spacing_of(affine).min():                        # rounded headers: far below it
        raise VolumeError(f"{path}: lies up to {off:.3g} mm away from {Path(first).name} (different affines)")
    return voxels


def scale_intensity(volume, inside, cfg, path):
    """float16 copy: "window" clips to cfg.window and maps it to [0, 1], "scale" does not clip; "zscore" has
    mean 0 and std 1 over the voxels `inside`, or all, or those `inside` without their extremes."""
    if cfg.intensity in ("window", "scale"):
        low, high = cfg.window
        if not low < high:
            raise SystemExit(f"window = {cfg.window}, expected (low, high)")
        if cfg.intensity == "window":
            volume = np.clip(volume, low, high)
        scaled = (volume - low) / (high - low)
    elif cfg.intensity == "zscore":
        if cfg.zscore_over not in ("foreground", "volume", "robust"):
            raise SystemExit(f"zscore_over = {cfg.zscore_over!r}, "
                             "expected 'foreground', 'volume' or 'robust'")
        sample = volume if cfg.zscore_over == "volume" else volume[inside]
        if not sample.size:
            raise VolumeError(f"{path}: no voxel is above the foreground threshold {cfg.foreground:g}, "
                              f"the largest is {volume.max():g}")
        if cfg.zscore_over == "robust":                             # no single voxel decides
            least, most = np.percentile(sample, [0.5, 99.5])
            sample = sample[(sample >= least) & (sample <= most)]
        mu, sigma = sample.mean(dtype=np.float64), sample.std(dtype=np.float64)
        if not sigma > 0:
            raise VolumeError(f"{path}: the foreground is constant ({mu:g}), a z-score would divide by zero")
        scaled = (volume - np.float32(mu)) / np.float32(sigma)
    else:
        raise SystemExit(f"intensity = {cfg.intensity!r}, expected 'window', 'scale' or 'zscore'")
    scaled = scaled.astype(np.float16)
    if not np.isfinite(scaled).all():
        raise VolumeError(f"{path}: scaled voxels beyond 65504 do not fit 2 bytes, "
                          "look at `intensity` and `window`")
    return scaled


def window_used(volume, cfg):
    """Share of cfg.window that the values of a volume take, from the 0.1th to the 99.9th percentile: above 1
    where "scale" goes beyond it, 1 of "zscore", which has none; near 0 the network sees one grey."""
    if cfg.intensity == "zscore":
        return 1.0
    values, (low, high) = np.percentile(volume[::2, ::2, ::2], [0.1, 99.9]), cfg.window
    least, most = np.clip(values, low, high) if cfg.intensity == "window" else values
    return float((most - least) / (high - low))


def clipped(volume, cfg):
    """Share of a volume's voxels above cfg.foreground that lie above cfg.window, where that clips, else 0."""
    if cfg.intensity != "window":
        return 0.0
    few = volume[::2, ::2, ::2]
    inside = few > cfg.foreground
    return float((few > cfg.window[1]).sum() / max(1, inside.sum()))


def doubts_of(record, cfg):
    """[text]: how a scan, by what the index holds of it, may not be what its config takes it for."""
    said, used = [], record["window_used"]
    if record["few_values"]:
        said.append("few values, all whole, as of label maps: `exclude` them if they are no scans")
    if not (0.55 if cfg.intensity == "window" else 0.1) < min(used) <= max(used) < 50:
        said.append("values that hardly fit `window`: are it and `intensity` (by default for HU) of these "
                    "scans?")
    elif record["clipped"] > 0.5:       # of CT under a window of 80 HU up to 0.48
        said.append("of what is above `foreground` half and more is above `window`, where all becomes 1: are "
                    "they of these scans?")
    if (cfg.intensity == "zscore" and cfg.zscore_over != "volume"
            and cfg.foreground < 0 <= record["range"][0]):
        said.append("all voxels are above `foreground` and count in the z-score, air too: MRI and PET have 0")
    return said + record["header"]


def label_ids(path, label, cfg):
    """A class map (x, y, z) as uint8 or int16 with the ids of cfg.labels, those of the file renamed by
    cfg.remap. What a slope in the header adds to whole numbers, up to 0.001, is rounded away. VolumeError
    where it holds others, SystemExit where labels and remap do not fit each other."""
    if not all(type(v) is int for v in [*cfg.remap, *cfg.remap.values(), *cfg.labels]):
        raise SystemExit(f"labels = {cfg.labels}, remap = {cfg.remap}: expected whole numbers as in "
                         "labels = {1: 'liver'}, remap = {255: 1}")
    broken = [f"{v:.6g}" for v in np.unique(label) if abs(v - np.round(v)) > 1e-3]
    if broken:
        raise VolumeError(f"{path}: label ids must be whole numbers, found {', '.join(broken[:4])}")
    label = np.round(label)
    ids, known, said = np.unique(label).astype(np.int64).tolist(), range(32768), "expected 0 to 32767"
    if cfg.labels:
        known = sorted({0, *cfg.labels, *cfg.remap})
        said = f"declared are 0 and {', '.join(str(v) for v in known if v)}"
    unknown = [str(v) for v in ids if v not in known and v not in cfg.remap]
    if unknown:
        hint = f" (or remap = {{{unknown[0]}: {known[1]}}})" if len(unknown) == 1 and len(known) == 2 else ""
        raise VolumeError(f"{path}: holds label ids {', '.join(unknown[:8])}; {said}{hint}")
    for old, new in cfg.remap.items():
        if old in ids and new in ids and new not in cfg.remap:
            raise VolumeError(f"{path}: holds both id {old} and the id {new} that it would be renamed to; "
                              f"if they are to be one, remap needs {new}: {new} too")
    strange = sorted(v for v in cfg.remap.values() if v not in ({*cfg.labels, 0} if cfg.labels else known))
    if strange:
        why = f" is no id of labels = {cfg.labels}" if cfg.labels else f", {said}"
        raise SystemExit(f"remap = {cfg.remap}: {strange[0]}{why}")
    renamed = label.copy()              # in the file's range: 65535 is no int16
    for old, new in cfg.remap.items():
        renamed[label == old] = new
    return renamed.astype(np.uint8 if max(cfg.remap.get(v, v) for v in ids) < 256 else np.int16)


def painted(masks, cfg):
    """(k, x, y, z) bool -> (x, y, z) ids in the smallest type that holds them.

    Of regions the larger first, so that a smaller one lies on it, each with the id that no smaller has.
    """
    groups = list(cfg.regions.values()) or [(k,) for k in sorted(cfg.labels)]
    ids = torch.zeros(masks.shape[1:], dtype=torch.uint8 if max(cfg.labels) < 256 else torch.int16)
    for group, mask in sorted(zip(groups, masks), key=lambda pair: -len(pair[0])):
        smaller = set().union(*[g for g in groups if len(g) < len(group)])
        ids[mask] = min(set(group) - smaller or group)
    return ids


def sided(cfg):
    """Names of labels, regions and classes that tell left from right."""
    names = map(str, [*cfg.labels.values(), *cfg.regions, *cfg.classes])
    words = {name: set(re.split(r"\W|_|(?<=[a-z])(?=[A-Z])", name)) for name in names}     # "LeftKidney"
    return [name for name, said in words.items() if {w.lower() for w in said} & {"left", "right", "l", "r"}]


def resample(volume, affine, spacing, order):
    """`volume` (x, y, z) on a grid of `spacing` mm that keeps voxel 0 in place; order 1 linear, 0 nearest."""
    step = np.array(spacing, float) / spacing_of(affine)            # old voxels per new voxel
    if np.allclose(step, 1, atol=1e-4):
        return volume
    # the outermost centres stay where they were, to half a voxel
    shape = tuple(np.round((np.array(volume.shape) - 1) / step).astype(int) + 1)
    return ndimage.affine_transform(volume, step, output_shape=shape, order=order, mode="nearest")


def stretch(volume, shape, order):
    """`volume` (x, y, z) on `shape` voxels that together cover the same space; order 1 linear, 0 nearest."""
    return ndimage.zoom(volume, np.array(shape) / volume.shape, order=order, mode="nearest", grid_mode=True)


def to_original(array, affine_pre, affine_orig, shape_orig, order, fill=0):
    """Bring a prediction from the preprocessed grid to the scan's own: undoes crop, spacing and orientation.

    array     (x, y, z) or (k, x, y, z) on the preprocessed grid, numpy or tensor
    affine_*  (4, 4) voxel -> mm of either grid;   shape_orig  (3,) voxels of the scan as stored
    order     1: linear, for probabilities, class by class; 0: nearest, for ids
    fill      value of voxels beyond the preprocessed grid (0 in all classes is class 0 by argmax)
    returns   tensor (.., *shape_orig), the array's dtype (linear: float32 or wider); exact where centres meet

    A voxel fills half a step to each side of its centre, so that the rim of a scan that was merely resampled
    keeps its prediction; scipy and nibabel stop at the outermost centres. Beside the output it holds about
    three volumes. Raises ValueError for another order or rank, and for grids that are rotated against each
    other: by half a voxel, of the coarser grid, at the far end and more; what is below that, as of labels
    whose headers were rounded, is left out."""
    array = torch.as_tensor(array)
    affine_pre, affine_orig = np.asarray(affine_pre, float), np.asarray(affine_orig, float)
    if array.ndim not in (3, 4) or order not in (0, 1):
        raise ValueError(f"to_original: expected (x, y, z) or (k, x, y, z) and order 0 or 1, "
                         f"found {tuple(array.shape)}, {order}")
    matrix = np.linalg.inv(affine_pre) @ affine_orig                # voxel of the scan -> voxel of the array
    reach = np.abs(matrix[:3, :3]) * np.asarray(shape_orig)         # voxels from end to end of the scan
    owner = reach.argmax(1)                                         # axis of the scan that each axis follows
    step = np.abs(matrix[:3, :3]).max(1)                            # of the scan, in voxels of the array
    if len(set(owner)) < 3 or (reach.sum(1) - reach.max(1) > 0.5 * step.clip(1)).any():
        raise ValueError(f"to_original: the grids are turned against each other: "
                         f"{affine_pre.tolist()}, {affine_orig.tolist()}")
    if order == 1:
        array = array.to(torch.promote_types(array.dtype, torch.float32))
    each = array if array.ndim == 4 else array[None]
    out = torch.empty(len(each), *shape_orig, dtype=array.dtype, device=array.device)
    for place, one in zip(out, each):
        place.copy_(_resample(one, matrix, owner, shape_orig, order, fill))
    return out if array.ndim == 4 else out[0]


def _resample(volume, matrix, owner, shape, order, fill):
    """Three one-dimensional interpolations: the grids' axes differ by order, sign, step and offset alone."""
    outside = []
    for axis, j in enumerate(owner):                                # axis of the array, axis j of the scan
        n = volume.shape[axis]
        at = np.round(matrix[axis, j] * np.arange(shape[j]) + matrix[axis, 3], 5)       # centres meet exactly
        outside.append(torch.from_numpy(np.flatnonzero((at < -0.5) | (at > n - 0.5))).to(volume.device))
        at = at.clip(0, n - 1)
        low = np.floor(at if order == 1 else at + 0.5).astype(np.int64).clip(0, n - 1)
        part = volume.index_select(axis, torch.from_numpy(low).to(volume.device))
        if order == 1 and (at != low).any():
            high = torch.from_numpy((low + 1).clip(max=n - 1)).to(volume.device)
            share = torch.from_numpy(at - low).to(volume).reshape([-1 if m == axis else 1 for m in range(3)])
            part.lerp_(volume.index_select(axis, high), share)
        volume = part
    for axis, places in enumerate(outside):
        volume.index_fill_(axis, places, fill)
    names = dict(zip(owner.tolist(), "xyz"))
    return rearrange(volume, f"x y z -> {names[0]} {names[1]} {names[2]}")
