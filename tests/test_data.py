"""data.py against witnesses: nibabel, SimpleITK, scipy, closed forms, brute force, and a point of light."""
import contextlib
import dataclasses
import gzip
import json
import locale
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from itertools import combinations, permutations, product
from pathlib import Path

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
import torch
from conftest import STILL
from scipy import ndimage
from scipy.spatial.transform import Rotation

import data
import finetune
import pretrain

HERE = Path(data.__file__).parent
REAL = os.environ.get("S2DC_REAL_DATA")
TURN = Rotation.from_euler("xyz", [10, -20, 15], degrees=True).as_matrix()
TILTED = nib.affines.from_matvec(TURN * (1.0, 2.0, 3.0), (5, -6, 7))


@pytest.fixture(autouse=True)
def no_root_from_outside(monkeypatch):
    monkeypatch.delenv("S2DC_DATA", raising=False)


def noise(*shape, seed=0, kind=np.int16):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(kind)


def nifti(path, voxels, affine=TILTED, order="<"):
    image = nib.Nifti1Image(voxels, affine, nib.Nifti1Header(endianness=order))
    image.header.set_data_dtype(voxels.dtype.newbyteorder(order))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def patched(path, at, form, *values):
    """The file with header bytes changed by hand."""
    packed = path.name.endswith(".gz")
    content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    struct.pack_into(form, content, at, *values)
    path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    return path


def refusal(path, **options):
    with pytest.raises(data.VolumeError) as caught:
        data.read_volume(path, **options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path)), text
    return text


def ends(call, *arguments, **options):
    """The one line (or lines) with which a program ends."""
    with pytest.raises(SystemExit) as caught:
        call(*arguments, **options)
    return str(caught.value)


def config(folder, **keys):
    plain = dict(data=str(folder), cache=str(folder / "cache"), workers=1, foreground=-1e9, slab=(16,) * 3, crop=(8,) * 3)
    return pretrain.Config(**(plain | keys))


def write_config(folder, keys):
    (folder / "x.py").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    return folder / "x.py"


def open_scans(cfg):
    return data.open_scans(cfg, say=lambda text: None)


# ---------------------------------------------------------------------------------------------------------------------
# read

def test_read_keeps_every_voxel_at_its_world_point_for_all_48_axis_orders(tmp_path):
    voxels = noise(5, 6, 7)
    index = np.stack(np.meshgrid(*map(np.arange, voxels.shape), indexing="ij"), -1).reshape(-1, 3)
    for order in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            affine = TILTED.copy()
            affine[:3, :3] = (TILTED[:3, :3] * signs)[:, order]
            path = nifti(tmp_path / "a.nii", voxels, affine)
            found, spacing, grid = data.read_volume(path)
            assert nib.aff2axcodes(grid) == ("R", "A", "S") and found.dtype == np.float32 and found.flags.c_contiguous
            np.testing.assert_allclose(spacing, (1, 2, 3), atol=1e-5)
            world = nib.affines.apply_affine(nib.load(path).affine, index)
            there = nib.affines.apply_affine(np.linalg.inv(grid), world)
            np.testing.assert_allclose(there, there.round(), atol=1e-4)
            assert (found[tuple(there.round().astype(int).T)] == voxels.reshape(-1)).all()


def test_read_applies_slope_and_intercept(tmp_path):
    voxels = noise(5, 6, 7)
    path = patched(nifti(tmp_path / "a.nii.gz", voxels, np.eye(4)), 112, "<2f", 0.25, -3.5)    # scl_slope, scl_inter
    np.testing.assert_array_equal(data.read_volume(path)[0], voxels * 0.25 - 3.5)
    for slope in (0.0, math.nan):                                   # by the standard: no scaling
        np.testing.assert_array_equal(data.read_volume(patched(path, 112, "<2f", slope, 7.0))[0], voxels)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_read_takes_every_number_type_in_both_byte_orders(tmp_path, kind):
    voxels = noise(5, 6, 7, kind=kind)
    for order, name in product("<>", ("a.nii", "a.nii.gz")):
        found = data.read_volume(nifti(tmp_path / name, voxels, np.eye(4), order))[0]
        np.testing.assert_array_equal(found, voxels.astype(np.float32))


def test_read_drops_a_trailing_axis_of_one(tmp_path):
    voxels = noise(5, 6, 7)
    for shape in ((5, 6, 7, 1), (5, 6, 7, 1, 1)):
        found, spacing, affine = data.read_volume(nifti(tmp_path / "a.nii.gz", voxels.reshape(shape), np.diag([1, 2, 3, 1])))
        np.testing.assert_array_equal(found, voxels)
        np.testing.assert_array_equal(spacing, (1, 2, 3))


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    return path


def cut_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


def with_voxel(value):
    voxels = noise(5, 6, 7, kind=np.float32)
    voxels[1, 2, 3] = value
    return voxels


RGB = np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])
REFUSED = {
    "two axes": ("shape (5, 6) is 2D", lambda p: nifti(p, noise(5, 6))),
    "four axes": ("shape (5, 6, 7, 2) is 4D", lambda p: nifti(p, noise(5, 6, 7, 2))),
    "five axes": ("(5, 6, 7, 1, 2) is 5D", lambda p: nifti(p, noise(5, 6, 7, 1, 2))),
    "one slice": ("one slice only", lambda p: nifti(p, noise(5, 6, 1))),
    "no bytes": ("empty (0 bytes)", lambda p: cut_file(nifti(p, noise(5, 6, 7)), 0)),
    "cut stream": ("damaged", lambda p: cut_file(nifti(p, noise(20, 20, 20)), 9000)),
    "cut before the checksum": ("damaged", lambda p: cut_file(nifti(p, noise(20, 20, 20)), -6)),
    "checksum": ("damaged", lambda p: flip_bit(nifti(p, noise(20, 20, 20)), -8)),
    "checksum after exactly 4 MiB": ("damaged", lambda p: flip_bit(nifti(p, np.resize(np.uint8(range(251)), (96, 79, 553))), -8)),
    "length behind the checksum": ("damaged", lambda p: flip_bit(nifti(p, noise(20, 20, 20)), -2)),
    "one bit of the voxels": ("damaged", lambda p: flip_bit(nifti(p, noise(20, 20, 20)), 9000)),
    "fewer voxels, whole stream": ("claims", lambda p: patched(nifti(p, noise(5, 6, 7)), 42, "<h", 50)),
    "complex": ("complex", lambda p: nifti(p, noise(5, 6, 7).astype(np.complex64))),
    "RGB": ("RGB", lambda p: nifti(p, RGB)),
    "NaN": ("1 of 210 voxels are not finite", lambda p: nifti(p, with_voxel(math.nan))),
    "infinite": ("1 of 210 voxels are not finite", lambda p: nifti(p, with_voxel(-math.inf))),
    "beyond float32": ("not finite", lambda p: patched(nifti(p, noise(5, 6, 7)), 112, "<2f", 1e36, 0)),
    "constant": ("every voxel is -1000", lambda p: nifti(p, np.full((5, 6, 7), -1000, np.int16))),
    "flat affine": ("singular", lambda p: patched(nifti(p, noise(5, 6, 7)), 280, "<12f", 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)),
    "parallel axes": ("singular", lambda p: patched(nifti(p, noise(5, 6, 7)), 280, "<12f", 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0)),
    "NaN affine": ("affine holds NaN", lambda p: patched(nifti(p, noise(5, 6, 7)), 280, "<f", math.nan)),
    "infinite affine": ("affine holds NaN or inf", lambda p: patched(nifti(p, noise(5, 6, 7)), 292, "<f", math.inf)),
    "no NIfTI": ("not a readable NIfTI", lambda p: p.write_bytes(gzip.compress(b"once upon a time")) and p),
    "no gzip": ("not a readable NIfTI", lambda p: p.write_text("once upon a time") and p),
    "unknown voxel type": ("not a readable NIfTI", lambda p: patched(nifti(p, noise(5, 6, 7)), 70, "<h", 7777)),
    "not there": ("no such file", lambda p: p),
}


@pytest.mark.parametrize("what", REFUSED)
def test_read_refuses_in_one_line_with_the_name(tmp_path, what):
    words, make = REFUSED[what]
    assert words in refusal(make(tmp_path / "scan.nii.gz"))


def test_read_refuses_plain_files_that_are_too_short_or_of_unknown_kind(tmp_path):
    assert "claims 210 voxels" in refusal(cut_file(nifti(tmp_path / "a.nii", noise(5, 6, 7)), -1))
    (tmp_path / "a.tiff").write_text("x")
    assert "unknown format" in refusal(tmp_path / "a.tiff")
    assert "no such file" in refusal(tmp_path / "b.nii")


def test_labels_may_be_constant_but_not_broken(tmp_path):
    empty = nifti(tmp_path / "empty.nii.gz", np.zeros((5, 6, 7), np.uint8))
    assert (data.read_volume(empty, label=True)[0] == 0).all()
    assert "not finite" in refusal(nifti(tmp_path / "nan.nii.gz", with_voxel(math.nan)), label=True)


def test_a_header_that_claims_too_much_takes_no_memory(tmp_path):
    tiny = patched(nifti(tmp_path / "tiny.nii.gz", noise(5, 6, 7)), 42, "<3h", 30000, 30000, 30000)     # 54 TB
    # dense noise, so that the claim (400 MB) passes for what gzip could at most have packed into the file
    large = patched(nifti(tmp_path / "large.nii.gz", noise(80, 80, 80)), 42, "<3h", 800, 800, 312)
    plain = patched(nifti(tmp_path / "plain.nii", noise(5, 6, 7)), 42, "<3h", 800, 800, 312)
    for path in (tiny, large, plain):
        tracemalloc.start()
        assert "claims" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 3e7
        tracemalloc.stop()


def test_headers_with_random_bytes_are_read_or_refused_never_more(tmp_path):
    rng = np.random.default_rng(0)
    whole = nifti(tmp_path / "a.nii", noise(5, 6, 7)).read_bytes()
    read = 0
    for _ in range(300):
        content = bytearray(whole)
        for at in rng.integers(0, 352, 2):
            content[at] = rng.integers(256)
        (tmp_path / "a.nii").write_bytes(content)
        try:
            voxels, spacing, affine = data.read_volume(tmp_path / "a.nii")
            assert np.isfinite(voxels).all() and np.isfinite(affine).all() and (spacing > 0).all()
            read += 1
        except data.VolumeError as error:
            assert "\n" not in str(error) and "a.nii" in str(error)
    assert 20 < read < 290


def itk_volume(shape=(6, 7, 9)):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(noise(*shape[::-1]))
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((5.0, 6.0, 7.0))
    image.SetDirection(Rotation.from_euler("xyz", [170, 20, -35], degrees=True).as_matrix().ravel())
    return sitk, image


def assert_same_scan(one, other):
    (a, a_spacing, a_affine), (b, b_spacing, b_affine) = data.read_volume(one), data.read_volume(other)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a_spacing, b_spacing, atol=1e-4)
    np.testing.assert_allclose(a_affine, b_affine, atol=2e-4)


def write_dicom(folder, sitk, image, leave_out=(), series="1.2.3.4.5", tilt=0.0, slopes=None, depths=(), turned=0):
    """tilt: mm by which each slice lies further along its columns; slopes: of its values, one a slice; depths: where
    slices lie, for their number; turned: how many of the first have other axes, by 29 degrees."""
    folder.mkdir(exist_ok=True)
    before = locale.setlocale(locale.LC_CTYPE)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    turn = np.array(image.GetDirection()).reshape(3, 3)
    for k in set(range(image.GetSize()[2])) - set(leave_out):
        page = sitk.GetImageFromArray(sitk.GetArrayFromImage(image)[k])
        page.SetSpacing(image.GetSpacing()[:2])
        place = np.add(image.TransformIndexToPhysicalPoint((0, 0, k)), tilt * k * turn[:, 1])
        place = image.GetOrigin() + depths[k] * turn[:, 2] if depths else place
        axes = turn @ Rotation.from_euler("z", 29 * (k < turned), degrees=True).as_matrix()
        if slopes:
            for tag, value in {"0028|1052": 0, "0028|1053": slopes[k], "0028|0100": 16, "0028|0101": 16, "0028|0102": 15,
                               "0028|0103": 1}.items():
                page.SetMetaData(tag, str(value))
        for tag, value in {"0008|0060": "CT", "0020|000d": "1.2.3.4", "0020|000e": series, "0008|0018": f"{series}.{k + 1}",
                           "0020|0013": str(k + 1), "0020|0032": "\\".join(f"{v:.10g}" for v in place),
                           "0020|0037": "\\".join(f"{v:.10g}" for v in (*axes[:, 0], *axes[:, 1]))}.items():
            page.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{k * 7 % 9}.dcm"))   # names out of order: places decide
        writer.Execute(page)
    locale.setlocale(locale.LC_CTYPE, before)                           # GDCM leaves "C": open() would read ASCII
    return folder


def test_other_formats_lie_where_the_same_nifti_lies(tmp_path):
    sitk, image = itk_volume()
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))                  # SimpleITK turns the axes of the world itself
    for name in ("a.mha", "a.mhd", "a.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        assert_same_scan(tmp_path / "a.nii.gz", tmp_path / name)
    assert_same_scan(tmp_path / "a.nii.gz", write_dicom(tmp_path / "series", sitk, image))


def test_other_formats_are_refused_in_one_line(tmp_path):
    sitk, image = itk_volume()
    for name in ("a.mha", "a.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        assert "not readable by SimpleITK" in refusal(cut_file(tmp_path / name, -100))
    sitk.WriteImage(sitk.Compose(image, image), str(tmp_path / "two.mha"))
    assert "2 values per voxel" in refusal(tmp_path / "two.mha")
    sitk.WriteImage(image[:, :, 3], str(tmp_path / "flat.mha"))
    assert "2D" in refusal(tmp_path / "flat.mha")
    assert "3 to 6 mm apart" in refusal(write_dicom(tmp_path / "gap", sitk, image, leave_out=[4]))
    write_dicom(tmp_path / "both", sitk, image)
    assert "2 DICOM series" in refusal(write_dicom(tmp_path / "both", sitk, image, series="1.2.3.4.6"))
    voxels, *_ = data.read_volume(write_dicom(tmp_path / "rounded", sitk, image, tilt=0.1))     # less than a pixel in all
    assert sorted(voxels.shape) == [6, 7, 9]
    assert "the last slice is shifted by 4 mm" in refusal(write_dicom(tmp_path / "tilted", sitk, image, tilt=0.5))
    depths = np.cumsum([0, *[2.3] * 3, *[3.0] * 2, *[3.7] * 3]).tolist()        # each gap within a quarter of the median
    assert "would lie 2.1 mm from its place" in refusal(write_dicom(tmp_path / "uneven", sitk, image, depths=depths))
    said = refusal(write_dicom(tmp_path / "turned", sitk, image, turned=4))
    assert "the axes of its slices differ (direction cosines by" in said
    (tmp_path / "nothing").mkdir()
    assert "a folder with 0 files" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [700, 0])
def test_slices_that_were_cut_off_at_the_end_of_a_series_do_not_shorten_it(tmp_path, keep):
    """In the middle the gap would tell."""
    sitk, image = itk_volume()
    folder = write_dicom(tmp_path / "series", sitk, image)
    (folder / "notes.txt").write_text("no slice")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert data.read_volume(folder)[0].size == 6 * 7 * 9
    last = folder / f"1.2.3.4.5_{8 * 7 % 9}.dcm"
    cut_file(last, keep)
    with pytest.raises(data.VolumeError, match=f"^{re.escape(str(last))}: no readable slice of the series .{keep} bytes., as 1 of 11"):
        data.read_volume(folder)


def test_pictures_beside_a_series_are_refused(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    sitk, image = itk_volume()
    folder = write_dicom(tmp_path / "series", sitk, image)
    for k in range(2):
        Image.fromarray(noise(12, 16, kind=np.uint8)).save(folder / f"preview_{k}.png")
    assert "a folder with 2 pictures and 9 DICOM files, expected either" in refusal(folder)


def test_voxels_of_an_mhd_are_where_its_header_says(tmp_path):
    """One file of any name, numbered slices, a list of them, or behind the header; a changed one is another scan."""
    sitk, image = itk_volume()
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / "one.mhd"))
    header, raw = (tmp_path / "one.mhd").read_text(), (tmp_path / "one.raw").read_bytes()
    pages = [raw[k * len(raw) // 9:(k + 1) * len(raw) // 9] for k in range(9)]
    for k, page in enumerate(pages):
        (tmp_path / f"slice{k:02}.bin").write_bytes(page)
    (tmp_path / "other name.img").write_bytes(raw)
    names = "\n".join(f"slice{k:02}.bin" for k in range(9))
    for said, files in (("other name.img", ["other name.img"]), (f"LIST\n{names}", names.split()),
                        ("slice%02d.bin 0 8 1", names.split()), ("LOCAL", [])):
        path = tmp_path / "scan[1].mhd"
        path.write_bytes(header.replace("one.raw", said).encode() + raw * (said == "LOCAL"))
        assert [file.name for file in data.volumes.files_of(path)] == [path.name, *files]
        assert_same_scan(tmp_path / "a.nii.gz", path)
    path.write_text(header.replace("one.raw", "other name.img"))
    case = dict(id="x", images=[str(path)], targets=[], label=None)
    before = data.cache_name(case, config(tmp_path))
    os.utime(tmp_path / "other name.img", ns=(1, 1))
    assert data.cache_name(case, config(tmp_path)) != before


def test_a_series_whose_slices_have_slopes_of_their_own_keeps_fractions(tmp_path):
    sitk, image = itk_volume()
    slopes = [1, 0.25, 2, 0.5, 1.75, 1, 1, 3, 0.125]                # the first gives whole numbers
    wanted = sitk.GetArrayFromImage(image)
    wanted[:] = np.abs(wanted) // 2
    pages = sitk.GetImageFromArray(wanted)
    pages.CopyInformation(image)
    raw = (wanted // np.array(slopes)[:, None, None]).astype(np.int16)
    stored = sitk.GetImageFromArray((raw * np.array(slopes)[:, None, None]).astype(np.float64))
    stored.CopyInformation(image)
    folder = write_dicom(tmp_path / "pet", sitk, stored, slopes=slopes)
    sitk.WriteImage(stored, str(tmp_path / "pet.nii.gz"))
    assert_same_scan(tmp_path / "pet.nii.gz", folder)


def test_a_surface_file_is_no_volume(tmp_path):
    axis = nib.cifti2.ScalarAxis(["a"]), nib.cifti2.BrainModelAxis.from_mask(np.ones((3, 3, 3)), affine=np.eye(4))
    nib.save(nib.Cifti2Image(np.ones((1, 27), np.float32), header=axis), tmp_path / "a.dscalar.nii")
    assert "holds a Cifti2Image, expected a volume" in refusal(tmp_path / "a.dscalar.nii")


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG"])
def test_slices_are_sorted_by_number_and_turned(tmp_path, ending):
    Image = pytest.importorskip("PIL.Image")
    picture = np.zeros((12, 16), np.uint8)
    picture[:4] = 60                    # rows 0..3: front of the patient
    picture[:, :8] += 30                # columns 0..7: the patient's right
    for k in (1, 2, 3, 10, 11):
        Image.fromarray(picture + k * 10).save(tmp_path / f"case7_slice{k}.{ending}", quality=100)
    voxels, spacing, affine = data.read_volume(tmp_path)
    assert voxels.shape == (16, 12, 5) and nib.aff2axcodes(affine) == ("R", "A", "S") and (spacing == 1).all()
    np.testing.assert_allclose(voxels[0, 0], [10, 20, 30, 100, 110], atol=1)         # left back, slices towards the head
    np.testing.assert_allclose(voxels[15, 0], [40, 50, 60, 130, 140], atol=1)        # right back
    np.testing.assert_allclose(voxels[0, 11], [70, 80, 90, 160, 170], atol=1)        # left front


def test_slices_are_refused_when_they_do_not_stack(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    grey = noise(12, 16, kind=np.uint8)
    for name, odd in {"shape": grey[:, :9], "colour": np.stack([grey, grey, 255 - grey], -1)}.items():
        (tmp_path / name).mkdir()
        for k, picture in enumerate((grey, odd)):
            Image.fromarray(picture).save(tmp_path / name / f"{k}.png")
        text = refusal(tmp_path / name)
        assert "1.png" in text and "expected a grey slice" in text
    for names, words in ((("a.png", "b1.png"), "has none"), (("a1.png", "b01.png"), "the same as")):
        folder = tmp_path / words.replace(" ", "")
        folder.mkdir()
        for name in names:
            Image.fromarray(grey).save(folder / name)
        assert words in refusal(folder)
    (tmp_path / "shape" / "1.png").write_text("x")
    assert "not a readable picture" in refusal(tmp_path / "shape")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "a.mha").write_text("x")
    (tmp_path / "1.png").write_text("x")
    assert "pip install SimpleITK" in refusal(tmp_path / "a.mha")
    assert "pip install pillow" in refusal(tmp_path)


@pytest.mark.skipif(not REAL, reason="S2DC_REAL_DATA is not set")
def test_the_program_says_of_every_bad_file_what_its_index_says(tmp_path):
    index = json.loads((Path(REAL) / "bad" / "index.json").read_text())
    cases = index["cases"] if "cases" in index else next(v for v in index.values() if isinstance(v, list))
    listed = [{"id": c["id"]} | {key: f"{REAL}/{c[key]}" for key in ("image", "label") if c[key]} for c in cases]
    (tmp_path / "list.json").write_text(json.dumps({"training": listed}))
    keys = dict(data=str(tmp_path), cache=str(tmp_path / "cache"), datalist="list.json", foreground=-2000.0, workers=2,
                labels={k: f"organ {k}" for k in range(1, 14)})
    done = subprocess.run([sys.executable, HERE / "data.py", write_config(tmp_path, keys)], capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("unusable")]
    rejected = [c for c in cases if c["expect"] == "reject"]
    assert done.returncode != 0 and "Traceback" not in done.stderr and len(said) == len(rejected) > 10
    for case in rejected:
        file = Path(case["label"] or case["image"]).name
        assert sum(f"{file}:" in line for line in said) == 1, (file, done.stdout)
    cached = json.loads(next((tmp_path / "cache").glob("*/index.json")).read_text())["scans"]
    assert sorted(name.rsplit("-", 1)[0] for name in cached) == sorted(c["id"] for c in cases if c["expect"] == "accept")
    for case in cases:
        if "equals" in case or "equals_after_ras" in case:
            assert_same_scan(Path(REAL) / case["image"], Path(REAL) / "bad" / "ok_control.nii.gz")


# ---------------------------------------------------------------------------------------------------------------------
# find cases

def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def test_patterns_with_fields_channels_and_back_references(tmp_path):
    for who in ("P1", "P2"):
        touch(tmp_path, *[f"{who}/{who}_{c}.nii.gz" for c in ("t1", "t2", "seg", "pet")])
        touch(tmp_path, f"{who}/other_t1.nii.gz", f"{who}/._{who}_t1.nii.gz")
    cfg = config(tmp_path, image=("{subject}/{subject}_t1.nii.gz", "{subject}/{subject}_t2.nii.gz"),
                 label="{subject}/{subject}_seg.nii.gz", target="{subject}/{subject}_pet.nii.gz")
    at = lambda who, *what: [str(tmp_path / who / f"{who}_{w}.nii.gz") for w in what]
    assert data.find_cases(cfg) == [dict(id=who, subject=who, fields=dict(subject=who), images=at(who, "t1", "t2"),
                                         label=at(who, "seg")[0], targets=at(who, "pet")) for who in ("P1", "P2")]
    (tmp_path / "P2/P2_t2.nii.gz").unlink()
    with pytest.raises(SystemExit, match="P2_t2.nii.gz: no such file, expected beside .*/P2_t1.nii.gz\n1 files are missing"):
        data.find_cases(cfg)
    cfg.label = "{subject}/{session}.nii.gz"
    assert "'session'" in ends(data.find_cases, cfg)
    for label in ("{subject}/{}.nii.gz", "{subject}/{id.nii.gz"):
        cfg.label = label
        assert f"pattern {label!r}: {{field}} must be one of the first" in ends(data.find_cases, cfg)
    assert "pattern '{0}.nii' finds nothing" in ends(data.find_cases, config(tmp_path, image="{0}.nii"))
    assert "expected one below data = " in ends(data.find_cases, config(tmp_path, scans=f"{tmp_path}/*/*.nii.gz"))


def test_a_scan_is_known_again_on_another_machine_and_below_another_root(tmp_path):
    touch(tmp_path, "here/set/a.nii.gz", "there/set/a.nii.gz")
    at = lambda root: data.Config(data=str(tmp_path / root))
    seen = data.known_as(tmp_path / "here/set/a.nii.gz", at("here"))
    assert seen & data.known_as(tmp_path / "there/set/a.nii.gz", at("there"))       # the same data elsewhere
    assert seen & data.known_as(tmp_path / "here/set/a.nii.gz", at("here/set"))     # the same file
    (tmp_path / "link").symlink_to(tmp_path / "here")
    assert seen & data.known_as(tmp_path / "link/set/a.nii.gz", at("link/set"))
    assert not seen & data.known_as(tmp_path / "there/set/a.nii.gz", at("there/set"))
    (tmp_path / "there/set/a.nii.gz").write_bytes(b"another scan")                  # of a hospital that counts alike
    assert not seen & data.known_as(tmp_path / "there/set/a.nii.gz", at("there"))


def test_fields_make_ids_and_subjects(tmp_path):
    touch(tmp_path, "s01/pre/ct.nii.gz", "s01/post/ct.nii.gz", "s02/pre/ct.nii.gz", "s02/pre/deep/ct.nii.gz")
    found = data.find_cases(config(tmp_path, image="{subject}/{visit}/ct.nii.gz"))
    assert [(c["id"], c["subject"]) for c in found] == [("s01_post", "s01"), ("s01_pre", "s01"), ("s02_pre", "s02")]
    found = data.find_cases(config(tmp_path, image="s{id}/pre/ct.nii.gz"))
    assert [(c["id"], c["subject"]) for c in found] == [("01", "01"), ("02", "02")]
    found = data.find_cases(config(tmp_path, scans=("{subject}/pre/ct.nii.gz", "{subject}/post/*.nii.gz")))
    assert [(c["id"], c["subject"]) for c in found] == [("s01__pre__ct", "s01"), ("s02__pre__ct", "s02"),
                                                        ("s01__post__ct", "s01")]
    found = data.find_cases(config(tmp_path / "elsewhere", image="{id}/ct.nii.gz"), base=tmp_path / "s01")
    assert [c["fields"] for c in found] == [{"id": "post"}, {"id": "pre"}]


def test_glob_patterns_over_several_sets(tmp_path):
    touch(tmp_path, "A/img1.nii.gz", "A/._img1.nii.gz", "A/img2.nii", "A/note.txt", "B/x/y/ct.nii.gz", "B/ct.nii.gz",
          "C/D1/1.dcm", "C/D2/1.dcm", "C/d3")
    ids = lambda **keys: [c["id"] for c in data.find_cases(config(tmp_path, **keys))]
    assert ids(scans="A/img?.nii*") == ["A__img1", "A__img2"]
    assert ids(scans=("B/**/ct.nii.gz", "A/*[1].nii.gz")) == ["B__ct", "B__x__y__ct", "A__img1"]
    assert ids(scans="C/[Dd]*/") == ["C__D1", "C__D2"]
    assert ids(scans="A/*.nii*", exclude="*img1") == ["A__img2"]
    assert ids(scans="A/*[!2].nii*") == ["A__img1"]
    assert "exclude names '*img7'" in ends(ids, scans="A/*.nii*", exclude=("*img1", "*img7"))


def test_a_pattern_without_hits_shows_pattern_folder_and_content(tmp_path):
    touch(tmp_path, "imagesTr/liver_0.nii.gz", "imagesTr/old/x")
    text = ends(data.find_cases, config(tmp_path, image="imagesTr/img{id}.nii.gz"))
    assert "'imagesTr/img{id}.nii.gz'" in text and f"{tmp_path}/imagesTr holds: liver_0.nii.gz, old/" in text and "\n" not in text
    text = ends(data.find_cases, config(tmp_path, scans="nowhere/deep/*.nii.gz"))
    assert "'nowhere/deep/*.nii.gz'" in text and f"{tmp_path} holds: imagesTr/" in text
    assert "exactly one of" in ends(data.find_cases, config(tmp_path))
    assert "exactly one of" in ends(data.find_cases, config(tmp_path, scans="*", datalist="x.json"))


def test_two_cases_with_one_id_are_refused(tmp_path):
    touch(tmp_path, "A/a.nii.gz", "A/a.nii")
    text = ends(data.find_cases, config(tmp_path, scans="A/*"))
    assert text == f"two cases have the id 'A__a': {tmp_path}/A/a.nii and {tmp_path}/A/a.nii.gz"


def test_datalists(tmp_path):
    (tmp_path / "T").mkdir()
    listed = {"name": "T", "test": ["./imagesTs/c.nii.gz"],
              "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz", "fold": 2, "subject": "S"},
                           {"image": ["b_0.nii.gz", "b_1.nii.gz"], "target": "b_2.nii.gz", "id": "b"},
                           {"image": "./imagesTr/._a.nii.gz", "label": "./labelsTr/._a.nii.gz"}]}
    (tmp_path / "T/dataset.json").write_text(json.dumps(listed))
    cfg = config(tmp_path, datalist="T/dataset.json")
    at = lambda *names: [str(tmp_path / "T" / name) for name in names]
    a, b = data.find_cases(cfg)
    assert a == dict(id="imagesTr__a", subject="S", fold=2, images=at("imagesTr/a.nii.gz"), targets=[],
                     label=at("labelsTr/a.nii.gz")[0])
    assert b == dict(id="b", subject="b", images=at("b_0.nii.gz", "b_1.nii.gz"), label=None, targets=at("b_2.nii.gz"))
    assert [c["images"] for c in data.find_cases(cfg, "test")] == [at("imagesTs/c.nii.gz")]
    swapped = config(tmp_path, datalist="T/dataset.json", datalist_label="", datalist_target="label")
    assert [(c["label"], c["targets"]) for c in data.find_cases(swapped)] == [(None, at("labelsTr/a.nii.gz")), (None, [])]
    assert "no entries under 'validation'; lists there: test, training" in ends(data.find_cases, cfg, "validation")
    for text, words in (("[1]", "holds a JSON list"), ("{", "not JSON"), ('{"training": [{"label": "x"}]}', "no key 'image'")):
        (tmp_path / "T/dataset.json").write_text(text)
        assert words in ends(data.find_cases, cfg)
    assert "no such datalist" in ends(data.find_cases, config(tmp_path, datalist="x.json"))


def test_cases_without_a_partner_are_listed_at_once_and_can_be_left_out(tmp_path):
    touch(tmp_path, *[f"img/{k}.nii.gz" for k in range(4)], "seg/1.nii.gz")
    keys = dict(image="img/{id}.nii.gz", label="seg/{id}.nii.gz")
    *lines, last = str(pytest.raises(SystemExit, data.find_cases, config(tmp_path, **keys)).value).splitlines()
    assert lines == [f"{tmp_path}/seg/{k}.nii.gz: no such file, expected beside {tmp_path}/img/{k}.nii.gz" for k in (0, 2, 3)]
    assert last == "3 files are missing; add them, or leave their cases out: exclude = ('0', '2', '3',)"
    assert [case["id"] for case in data.find_cases(config(tmp_path, exclude=("0", "2", "3"), **keys))] == ["1"]


def test_a_cache_that_lost_a_file_or_its_index_is_made_anew(tmp_path, capsys):
    cfg = config(tmp_path, **data_set(tmp_path, 3))
    whole, folder = open_scans(cfg), data.cache_folder(cfg)
    before = contents(cfg)
    Path(f"{whole[1].stem}.image.npy").unlink()
    Path(f"{whole[2].stem}.image.npy").write_bytes(b"cut")
    with pytest.raises(data.VolumeError, match="image.npy: the cache was deleted or damaged; start again"):
        whole[2].open()
    open_scans(cfg)
    same_contents(contents(cfg), before)
    (folder / "index.json").write_text('{"scans": {')
    open_scans(cfg)
    same_contents(contents(cfg), before)
    assert f"{folder}/index.json: damaged, its scans are cached anew" in capsys.readouterr().out
    blocked = dataclasses.replace(cfg, cache=str(tmp_path / "img/case0.nii.gz"))
    assert "cannot be made" in ends(data.fill_cache, data.find_cases(blocked), blocked)


@pytest.mark.parametrize("unit, factor", [("meter", 1000.0), ("micron", 0.001)])
def test_the_unit_of_the_header_is_applied(tmp_path, unit, factor):
    image = nib.Nifti1Image(noise(6, 7, 8), np.diag([2 / factor, 1 / factor, 3 / factor, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    _, spacing, affine = data.read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(spacing, (2, 1, 3), rtol=1e-5)
    np.testing.assert_allclose(affine, np.diag([2, 1, 3, 1]), rtol=1e-5)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_more_voxels_than_the_header_claims_are_refused(tmp_path, ending):
    path = nifti(tmp_path / f"a.{ending}", noise(6, 7, 8))
    with (gzip.open if ending == "nii.gz" else open)(path, "ab") as file:
        file.write(b"\0" * 2)
    assert f"the header claims {352 + 2 * 336} bytes of header and voxels, the file holds {354 + 2 * 336}" in refusal(path)


@pytest.mark.parametrize("ending", ["mha", "nrrd", "mhd"])
def test_a_picture_is_not_made_room_for_where_its_file_cannot_hold_it(tmp_path, ending):
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(noise(20, 20, 20)), str(path), useCompression=False)
    data.read_volume(path)
    one, other = (b"sizes: 20 20", b"sizes: 9999 9999") if ending == "nrrd" else (b"DimSize = 20 20", b"DimSize = 9999 9999")
    path.write_bytes(path.read_bytes().replace(one, other))
    assert f"the header claims {9999 * 9999 * 20} voxels, the file holds 16" in refusal(path)


def test_a_robust_zscore_is_not_moved_by_one_voxel_and_the_summary_names_the_scan(tmp_path, capsys):
    voxels = ndimage.gaussian_filter(noise(20, 20, 20).astype(np.float32), 1) + 500
    for k in range(4):
        nifti(tmp_path / f"{k}.nii.gz", voxels + k)
    voxels[3, 4, 5] = 3e4
    nifti(tmp_path / "4.nii.gz", voxels)
    cfg = config(tmp_path, scans="*.nii.gz", intensity="zscore", zscore_over="robust", foreground=0.0)
    plain, spiked = open_scans(cfg)[0::4]
    same = np.ones((20, 20, 20), bool)
    same[3, 4, 5] = False
    np.testing.assert_allclose(spiked.open()[0][same], plain.open()[0][same], atol=0.01)
    inner = np.sort(voxels.ravel())[40:-40]                         # half a per cent at either end
    np.testing.assert_allclose(plain.open()[0, 3, 4, 6], (voxels[3, 4, 6] - inner.mean()) / inner.std(), atol=0.01)
    data.main([str(write_config(tmp_path, dict(data=str(tmp_path), cache=str(tmp_path / "cache"), scans="*.nii.gz")))])
    said = capsys.readouterr().out
    assert "ranges more than ten times wider or narrower than the others': look at them; 1 scans: 4\n" in said


def test_each_modality_of_a_set_follows_its_own_rule(tmp_path):
    """As each would be alone; an id without a rule, or a key that is none of intensity, is refused."""
    for name in ("ct_1", "pet_1"):
        nifti(tmp_path / f"{name}.nii.gz", noise(9, 8, 7, seed=len(name)))
    rules = {"ct*": dict(window=(-175, 250)),
             "pet*": dict(intensity="zscore", foreground=0.0, spacing=(2.0, 2.0, 2.0))}
    both = open_scans(config(tmp_path, scans="*.nii.gz", rules=rules))
    for scan, (pattern, own) in zip(both, rules.items(), strict=True):
        alone, = open_scans(config(tmp_path, scans=f"{pattern}.nii.gz", **own))
        np.testing.assert_array_equal(scan.open(), alone.open())
        assert scan.record == alone.record
    for wrong, text in (({"ct*": {}}, "0 patterns that fit the id 'pet_1'"),
                        ({"*": {}, "ct*": {}}, "2 patterns that fit the id 'ct_1'"),
                        ({"*": {"slab": 3}}, "the key 'slab'")):
        with pytest.raises(SystemExit, match=f"rules: found {re.escape(text)}; expected one pattern"):
            open_scans(config(tmp_path, scans="*.nii.gz", rules=wrong))


def test_the_summary_says_what_of_a_slab_is_padding(tmp_path, capsys):
    keys = data_set(tmp_path, 2) | dict(data=str(tmp_path), cache=str(tmp_path / "cache"), slab=(24, 10, 16), crop=(12, 10, 8))
    data.main([str(write_config(tmp_path, keys))])
    said = capsys.readouterr().out
    assert "slab = (24, 10, 16): the scans fill 25% of it, the rest will be padding" in said and "crop =" not in said


def test_the_environment_moves_the_root(tmp_path, monkeypatch):
    """The command line goes before the environment, which goes before a file; what was used is what is stored."""
    touch(tmp_path, "here/a.nii.gz")
    path = str(write_config(tmp_path, dict(data="elsewhere", scans="*.nii.gz")))
    monkeypatch.setenv("S2DC_DATA", str(tmp_path / "here"))
    cfg = data.configs.load(data.Config, [path])
    assert cfg.data == str(tmp_path / "here") and data.find_cases(cfg)[0]["images"] == [str(tmp_path / "here/a.nii.gz")]
    assert data.configs.load(data.Config, [path, "--data=/there"]).data == "/there"


# ---------------------------------------------------------------------------------------------------------------------
# preprocess

def case_of(*images, label=None, targets=()):
    return dict(id="case", subject="case", images=list(map(str, images)), label=label and str(label),
                targets=list(map(str, targets)))


def float16(values):
    return np.asarray(values, np.float64).astype(np.float32).astype(np.float16).astype(np.float64)


def test_window_clips_and_scales(tmp_path):
    voxels = noise(8, 9, 10)
    case = case_of(nifti(tmp_path / "a.nii.gz", voxels, np.eye(4)))
    arrays, record = data.preprocess(case, config(tmp_path, window=(-175.0, 250.0)))
    assert arrays["image"].dtype == np.float16
    np.testing.assert_allclose(arrays["image"][0], np.clip((voxels + 175) / 425, 0, 1), atol=5e-4)
    assert record["fill"] == [0.0] and record["range"] == [voxels.min(), voxels.max()] and record["shape"] == [8, 9, 10]
    unclipped = data.preprocess(case, config(tmp_path, window=(-175.0, 250.0), intensity="scale"))[0]["image"][0]
    np.testing.assert_allclose(unclipped, (voxels + 175) / 425, rtol=5e-4, atol=5e-4)


def test_zscore_over_foreground_or_volume(tmp_path):
    voxels, other = noise(8, 9, 10), noise(8, 9, 10, seed=1) * 3 + 500
    case = case_of(nifti(tmp_path / "a.nii.gz", voxels, np.eye(4)), nifti(tmp_path / "b.nii.gz", other, np.eye(4)))
    for over in ("foreground", "volume"):
        cfg = config(tmp_path, intensity="zscore", zscore_over=over, foreground=100.0, crop_foreground=False)
        arrays, record = data.preprocess(case, cfg)
        for found, v, fill in zip(arrays["image"], (voxels, other), record["fill"]):
            sample = v[v > 100] if over == "foreground" else v
            expected = (v - sample.mean()) / sample.std()
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
            assert fill == found.min()


def test_unknown_choices_and_constant_foreground_are_refused(tmp_path):
    case = case_of(nifti(tmp_path / "a.nii.gz", noise(8, 9, 10), np.eye(4)))
    for keys, words in ((dict(intensity="zscore", zscore_over="body"), "zscore_over = 'body', expected"),
                        (dict(intensity="percentile"), "intensity = 'percentile', expected"),
                        (dict(window=(5.0, 5.0)), "window = (5.0, 5.0), expected"),
                        (dict(spacing=(1.0, 1.0)), "spacing = (1.0, 1.0), expected"),
                        (dict(spacing=(1.0, 1.0, 0.0)), "spacing = (1.0, 1.0, 0.0), expected"),
                        (dict(resize=(9, 9)), "resize = (9, 9), expected")):
        assert words in ends(data.preprocess, case, config(tmp_path, **keys))
    flat = np.where(noise(8, 9, 10) > 0, 5, 0).astype(np.int16)
    case = case_of(nifti(tmp_path / "flat.nii.gz", flat, np.eye(4)))
    with pytest.raises(data.VolumeError, match="flat.nii.gz: the foreground is constant"):
        data.preprocess(case, config(tmp_path, intensity="zscore", foreground=0.0))
    with pytest.raises(data.VolumeError, match="flat.nii.gz: no voxel is above the foreground threshold 9, the largest is 5"):
        data.preprocess(case, config(tmp_path, foreground=9.0))


def test_foreground_crop_keeps_world_positions(tmp_path):
    voxels = np.full((20, 18, 16), -1000, np.int16)
    voxels[4:13, 5:9, 2:15] = noise(9, 4, 13) // 2 + 500             # a box of foreground
    voxels[6, 6, 6] = -900                                          # with a hole
    affine = TILTED.copy()
    affine[:3, 1] *= -1                                             # stored with one axis the other way round
    path, same = nifti(tmp_path / "a.nii.gz", voxels, affine), nifti(tmp_path / "t.nii.gz", voxels // 2, affine)
    labels = nifti(tmp_path / "l.nii.gz", (voxels > 600).astype(np.uint8), affine)
    cfg = config(tmp_path, foreground=-500.0, window=(-1000.0, 1000.0))
    arrays, record = data.preprocess(case_of(path, label=labels, targets=[same]), cfg)
    assert arrays["image"].shape == arrays["target"].shape == (1, 9, 4, 13)
    index = np.stack(np.meshgrid(*map(np.arange, voxels.shape), indexing="ij"), -1)[voxels > -500]
    world = nib.affines.apply_affine(nib.load(path).affine, index)
    there = nib.affines.apply_affine(np.linalg.inv(record["affine"]), world).round().astype(int)
    np.testing.assert_allclose(arrays["image"][0][tuple(there.T)], (voxels[voxels > -500] + 1000) / 2000, atol=5e-4)
    np.testing.assert_allclose(arrays["target"][0][tuple(there.T)], (voxels[voxels > -500] // 2 + 1000) / 2000, atol=5e-4)
    np.testing.assert_array_equal(arrays["label"][tuple(there.T)], voxels[voxels > -500] > 600)
    np.testing.assert_allclose(record["spacing"], (1, 2, 3), atol=1e-5)


def test_foreground_is_that_of_all_channels_together(tmp_path):
    one, two = np.zeros((2, 20, 18, 16), np.int16)
    one[4:8, 5, 6], two[5, 9:12, 3:7] = 50, 60
    paths = [nifti(tmp_path / f"{k}.nii.gz", v, np.eye(4)) for k, v in enumerate((one, two))]
    arrays, _ = data.preprocess(case_of(*paths), config(tmp_path, foreground=10.0, window=(0.0, 100.0)))
    np.testing.assert_allclose(arrays["image"], np.stack([one, two])[:, 4:8, 5:12, 3:7] / 100, atol=5e-4)


@pytest.mark.parametrize("spacing", [(1.7, 1.7, 1.7), (0.6, 2.0, 4.0)])
def test_resampling_against_nibabel(tmp_path, spacing):
    voxels = ndimage.gaussian_filter(noise(20, 18, 16).astype(np.float32), 1)
    label = (voxels > 20).astype(np.uint8) * 3
    image, labels = nifti(tmp_path / "a.nii.gz", voxels), nifti(tmp_path / "l.nii.gz", label)
    arrays, record = data.preprocess(case_of(image, label=labels), config(tmp_path, spacing=spacing, window=(-1000.0, 1000.0)))
    np.testing.assert_allclose(record["spacing"], spacing, rtol=1e-5)
    last = (np.array(voxels.shape) - 1) * (1, 2, 3) / spacing       # where the outermost centres of the scan lie on the new grid
    assert list(arrays["image"].shape[1:]) == [round(v) + 1 for v in last]
    target = (arrays["image"].shape[1:], np.array(record["affine"]))
    for found, path, order, tolerance in ((arrays["image"][0] * 2000.0 - 1000, image, 1, 1.1), (arrays["label"], labels, 0, 0)):
        expected = nibabel.processing.resample_from_to(nib.load(path), target, order=order, mode="nearest").get_fdata()
        off = np.abs(found - expected) > tolerance
        assert off.mean() < (2e-3 if order == 0 else 1e-9)          # nearest: rounding of exact halves is free


def test_resizing_stretches_the_foreground_and_keeps_world_positions(tmp_path):
    voxels = np.full((20, 18, 16), -1000, np.int16)
    voxels[4:14, 3:11, 2:14] = ndimage.gaussian_filter(noise(10, 8, 12).astype(np.float32), 1) + 500
    label = (voxels > 500).astype(np.uint8) * 3
    image, labels = nifti(tmp_path / "a.nii.gz", voxels), nifti(tmp_path / "l.nii.gz", label)
    cfg = config(tmp_path, resize=(20, 6, 12), foreground=-500.0, window=(-1000.0, 1000.0))
    arrays, record = data.preprocess(case_of(image, label=labels), cfg)
    box = lambda v: torch.tensor(v[None, None, 4:14, 3:11, 2:14], dtype=torch.float32)
    stretched = lambda v, mode: torch.nn.functional.interpolate(box(v), (20, 6, 12), mode=mode)[0, 0]
    np.testing.assert_allclose(arrays["image"][0] * 2000.0 - 1000, stretched(voxels, "trilinear"), atol=1.1)
    np.testing.assert_array_equal(arrays["label"], stretched(label, "nearest-exact"))
    np.testing.assert_allclose(record["spacing"], (1 * 10 / 20, 2 * 8 / 6, 3 * 12 / 12), rtol=1e-5)
    for corner in product((0, 1), repeat=3):                        # both grids have their outer corners at the same place
        old = nib.affines.apply_affine(nib.load(image).affine, np.array((4, 3, 2)) + np.array(corner) * (10, 8, 12) - 0.5)
        new = nib.affines.apply_affine(np.array(record["affine"]), np.array(corner) * (20, 6, 12) - 0.5)
        np.testing.assert_allclose(new, old, atol=1e-4)
    assert data.expected_bytes(case_of(image, targets=[image]), cfg) == 256 + 2 * (
        2 * 20 * 6 * 12 + int(3.5 * 1.75 * 2.5) + 256)          # the body map, the files' own headers


def test_label_ids_are_renamed_checked_and_kept(tmp_path):
    voxels = noise(8, 9, 10)
    image = nifti(tmp_path / "a.nii.gz", voxels, np.eye(4))
    ids = np.random.default_rng(0).choice([0, 1, 2, 4], (8, 9, 10)).astype(np.uint8)
    write = lambda values: nifti(tmp_path / "l.nii.gz", values, np.eye(4))
    run = lambda path, **keys: data.preprocess(case_of(image, label=path), config(tmp_path, **keys))
    three = {1: "necrosis", 2: "oedema", 3: "tumour"}
    arrays, record = run(write(ids), labels=three, remap={4: 3})
    np.testing.assert_array_equal(arrays["label"], np.array([0, 1, 2, 9, 3])[ids])
    assert record["ids"] == [0, 1, 2, 3] and arrays["label"].dtype == np.uint8
    arrays, _ = run(write(ids), labels=three, remap={1: 2, 2: 1, 4: 3})         # names that change places
    np.testing.assert_array_equal(arrays["label"], np.array([0, 2, 1, 9, 3])[ids])
    arrays, _ = run(write(ids.astype(np.int16) * 300))
    np.testing.assert_array_equal(arrays["label"], ids.astype(np.int16) * 300)
    arrays, _ = run(write(ids), remap={4: 300})
    np.testing.assert_array_equal(arrays["label"], np.array([0, 1, 2, 9, 300])[ids])
    for values, words, keys in ((ids, r"l.nii.gz: holds label ids 4; declared are 0 and 1, 2, 3", dict(labels=three)),
                                (ids * 0.5, "whole numbers, found 0.5", {}), (ids.astype(np.int16) - 1, "label ids -1", {}),
                                (np.where(ids == 1, 3, ids), "both id 4 and the id 3", dict(labels=three, remap={4: 3}))):
        with pytest.raises(data.VolumeError, match=words):
            run(write(values), **keys)
    assert "5 is no id of labels" in ends(run, write(ids), labels=three, remap={4: 5})
    assert "-1, expected 0 to 32767" in ends(run, write(ids), remap={4: -1})
    assert "expected whole numbers" in ends(run, write(ids), labels=three, remap={"4": 3})
    assert "expected whole numbers" in ends(run, write(ids), labels={"background": 0, "liver": 1})


@pytest.mark.parametrize("kind, stored, remap", [
    (np.uint16, (0, 1, 65535), {65535: 2}),                         # as int16 it is -1
    (np.int32, (0, 1, 65537), {65537: 2}), (np.int16, (0, 1, -255), {-255: 2}),     # .. as uint8 these are 1
    (np.int16, (-1, 1, 2), {-1: 0, 0: 0}), (np.int32, (0, 1, 1 << 23), {1 << 23: 2})])
def test_ids_that_fit_no_label_are_renamed_as_told(tmp_path, kind, stored, remap):
    image = nifti(tmp_path / "a.nii.gz", noise(8, 9, 10), np.eye(4))
    which = np.random.default_rng(0).integers(0, 3, (8, 9, 10))
    label = nifti(tmp_path / "l.nii.gz", np.array(stored, kind)[which], np.eye(4))
    for labels in ({}, {1: "a", 2: "b"}):
        arrays, record = data.preprocess(case_of(image, label=label), config(tmp_path, labels=labels, remap=remap))
        np.testing.assert_array_equal(arrays["label"], which)
        assert arrays["label"].dtype == np.uint8 and record["ids"] == [0, 1, 2]


def test_what_a_slope_adds_to_an_id_is_rounded_away_and_no_more(tmp_path):
    image, ids = nifti(tmp_path / "a.nii.gz", noise(8, 9, 10), np.eye(4)), noise(8, 9, 10, seed=3) > 0
    run = lambda values: data.preprocess(case_of(image, label=nifti(tmp_path / "l.nii.gz", values, np.eye(4))), config(tmp_path))
    arrays, _ = run((2.0000305 * ids).astype(np.float32))
    np.testing.assert_array_equal(arrays["label"], 2 * ids)
    with pytest.raises(data.VolumeError, match="whole numbers, found 2.002"):
        run((2.002 * ids).astype(np.float32))


def test_labels_that_are_cut_away_with_the_background_are_counted(tmp_path):
    voxels, label = np.full((20, 10, 10), -1000.0, np.float32), np.zeros((20, 10, 10), np.uint8)
    voxels[:12] = noise(12, 10, 10, seed=2) * 0 + 40 + np.arange(12)[:, None, None]
    label[8:15, 2:7, 3:9] = 1
    (tmp_path / "img").mkdir()
    (tmp_path / "seg").mkdir()
    nifti(tmp_path / "img/a.nii.gz", voxels, np.eye(4))
    nifti(tmp_path / "seg/a.nii.gz", label, np.eye(4))
    cfg = config(tmp_path, image="img/{id}.nii.gz", label="seg/{id}.nii.gz", foreground=-500.0)
    good, _ = data.fill_cache(data.find_cases(cfg), cfg, lambda line: None)
    assert good[0][2]["label_cut"] == 3 * 5 * 6
    assert "labelled voxels cut away with the background (below `foreground`), 1 scans: a 90" in data.summary(good, cfg)


def test_label_and_channels_must_lie_on_the_grid_of_the_image(tmp_path):
    voxels = noise(8, 9, 10)
    image = nifti(tmp_path / "a.nii.gz", voxels)
    ids = (voxels > 0).astype(np.uint8)
    moved = TILTED.copy()
    moved[0, 3] += 30
    shorter, shifted = nifti(tmp_path / "short.nii.gz", ids[:, :, :8]), nifti(tmp_path / "shift.nii.gz", ids, moved)
    for make in (lambda p: case_of(image, label=p), lambda p: case_of(image, p), lambda p: case_of(image, targets=[p])):
        with pytest.raises(data.VolumeError, match=r"short.nii.gz: shape \(8, 9, 8\) \(RAS\), but a.nii.gz has \(8, 9, 10\)"):
            data.preprocess(make(shorter), config(tmp_path))
        with pytest.raises(data.VolumeError, match=r"shift.nii.gz: lies up to 30 mm away from a.nii.gz"):
            data.preprocess(make(shifted), config(tmp_path))
    # what the rounding of a header does is no other grid, a quarter of the smallest voxel is
    step = np.sqrt((TILTED[:3, :3] ** 2).sum(0)).min()
    for off, fits in ((0.15, True), (0.25, False)):
        moved = TILTED.copy()
        moved[2, 3] += off * step
        near = nifti(tmp_path / f"near{off}.nii.gz", ids, moved)
        with contextlib.nullcontext() if fits else pytest.raises(data.VolumeError, match="different affines"):
            data.preprocess(case_of(image, label=near), config(tmp_path))
    # the same grid stored the other way round is the same grid
    turn = np.array([[-1, 0, 0, 7], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    turned = nifti(tmp_path / "turned.nii.gz", ids[::-1], TILTED @ turn)
    arrays, _ = data.preprocess(case_of(image, label=turned), config(tmp_path))
    np.testing.assert_array_equal(arrays["label"], ids)


def test_targets_are_scaled_like_images(tmp_path):
    voxels, wanted = noise(8, 9, 10), noise(8, 9, 10, seed=1)
    paths = [nifti(tmp_path / f"{k}.nii.gz", v, np.eye(4)) for k, v in enumerate((voxels, wanted))]
    cfg = config(tmp_path, intensity="zscore", foreground=-2000.0)
    arrays, record = data.preprocess(case_of(paths[0], targets=paths[1:]), cfg)
    np.testing.assert_allclose(arrays["target"][0], (wanted - wanted.mean()) / wanted.std(), rtol=1e-3, atol=1e-3)
    assert arrays["image"].shape == arrays["target"].shape == (1, 8, 9, 10) and record["target_fill"] == [arrays["target"].min()]


# ---------------------------------------------------------------------------------------------------------------------
# cache

def data_set(folder, count, size=(12, 10, 8)):
    for k in range(count):
        voxels = noise(*size, seed=k)
        nifti(folder / "img" / f"case{k}.nii.gz", voxels, np.eye(4))
        nifti(folder / "seg" / f"case{k}.nii.gz", (voxels > 500).astype(np.uint8), np.eye(4))
    return dict(image="img/case{id}.nii.gz", label="seg/case{id}.nii.gz")


def contents(cfg):
    return {path.name: np.load(path) for path in data.cache_folder(cfg).glob("*.npy")}


def same_contents(one, other):
    assert one.keys() == other.keys() and len(one)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_cache_holds_two_bytes_a_voxel_whatever_the_number_of_workers(tmp_path):
    keys = data_set(tmp_path, 5)
    one, three = config(tmp_path, workers=1, **keys), config(tmp_path, workers=3, cache=str(tmp_path / "other"), **keys)
    scans = open_scans(one)
    for k, scan in enumerate(scans):
        voxels = noise(12, 10, 8, seed=k)
        assert Path(f"{scan.stem}.image.npy").stat().st_size == 2 * voxels.size + 128
        np.testing.assert_allclose(scan.open()[0], np.clip((voxels + 1000) / 2000, 0, 1), atol=5e-4)
        np.testing.assert_array_equal(scan.open("label")[0], voxels > 500)
        assert isinstance(scan.open(), np.memmap)
        positions = scan.positions()
        np.testing.assert_array_equal(positions, np.stack([np.ones((voxels > 500).sum()), *np.nonzero(voxels > 500)], 1))
    open_scans(three)
    same_contents(contents(one), contents(three))
    case = data.find_cases(one)[0]
    assert 2 * 12 * 10 * 8 <= data.expected_bytes(case | dict(label=None), one) < 2.1 * 12 * 10 * 8 + 512
    written = sum(path.stat().st_size for path in data.cache_folder(one).glob("0-*.npy"))
    assert written <= data.expected_bytes(case, one)


@pytest.mark.parametrize("unit, edge, spacing", [("meter", 0.002, ()), ("meter", 0.002, (1.0, 1.0, 1.0)),
                                                 ("mm", 1.0, (8.0, 8.0, 8.0)), ("mm", 1.0, (0.7, 0.7, 3.0))])
def test_the_size_that_is_announced_is_never_too_small(tmp_path, unit, edge, spacing):
    image = nib.Nifti1Image(noise(20, 21, 23), np.diag([edge, edge, edge, 1]))
    image.header.set_xyzt_units(unit)
    (tmp_path / "img").mkdir()
    nib.save(image, tmp_path / "img/a.nii.gz")
    cfg = config(tmp_path, image="img/{id}.nii.gz", spacing=spacing, foreground=-2000.0)
    open_scans(cfg)
    written = sum(path.stat().st_size for path in data.cache_folder(cfg).glob("*.npy"))
    announced = data.expected_bytes(data.find_cases(cfg)[0], cfg)
    assert written <= announced < 1.6 * written + 1024


def test_positions_are_spread_over_large_classes():
    label = np.zeros((40, 40, 40), np.uint8)
    label[5:35], label[0, 0, :3] = 2, 7
    rows = data.labelled_positions(label)
    assert (label[tuple(rows[:, 1:].T)] == rows[:, 0]).all() and (rows[:, 0] == 7).sum() == 3
    large = rows[rows[:, 0] == 2]
    assert len(large) == 4096 and len(np.unique(large, axis=0)) == 4096
    np.testing.assert_allclose(large[:, 1:].mean(0), (19.5, 19.5, 19.5), atol=1)


def test_every_preprocessing_key_has_its_own_folder(tmp_path):
    other = dict(intensity="zscore", window=(0.0, 1.0), zscore_over="volume", foreground=3.0, crop_foreground=False,
                 spacing=(1.0, 1.0, 1.0), resize=(9, 9, 9), labels={1: "a"}, remap={1: 2}, dataset="x")
    assert set(other) == {*data.PREPROCESSING_KEYS, "dataset"}
    folders = lambda **read: [data.cache_folder(config(tmp_path, **read, **keys))
                              for keys in ({}, *({key: value} for key, value in other.items()))]
    for read in (dict(label="{id}.nii"), dict(datalist="x.json")):
        assert len(set(folders(**read))) == 1 + len(other)
    for read in (dict(scans="*"), dict(datalist="x.json", datalist_label="")):      # without a label its names say nothing
        assert len(set(folders(**read))) == 1 + len(other) - 2
    plain, aside = folders(scans="*", slab=(16, 16, 16))[0], folders(scans="*", slab=(8, 8, 8), rotation=(0.0, 0.0, 0.0))[0]
    assert plain == aside


def test_a_changed_file_is_done_again_and_nothing_else(tmp_path):
    cfg = config(tmp_path, **data_set(tmp_path, 3))
    first = open_scans(cfg)
    times = {s.id: Path(f"{s.stem}.image.npy").stat().st_mtime_ns for s in first}
    nifti(tmp_path / "seg/case1.nii.gz", (noise(12, 10, 8, seed=1) > 0).astype(np.uint8), np.eye(4))     # only the label
    second = open_scans(cfg)
    assert [a.stem == b.stem for a, b in zip(first, second)] == [True, False, True]
    assert [Path(f"{s.stem}.image.npy").stat().st_mtime_ns == times[s.id] for s in second] == [True, False, True]
    np.testing.assert_array_equal(second[1].open("label")[0], noise(12, 10, 8, seed=1) > 0)


def test_two_files_of_one_name_size_and_time_are_two(tmp_path):
    for folder, sign in (("t1", 1), ("t2", -1)):
        (tmp_path / folder).mkdir()
        nifti(tmp_path / folder / "a.nii", sign * noise(8, 8, 8), np.eye(4))
        os.utime(tmp_path / folder / "a.nii", (1e9, 1e9))
    one, two = (open_scans(config(tmp_path, image=f"{f}/{{id}}.nii", foreground=-1e4))[0].open()[0] for f in ("t1", "t2"))
    np.testing.assert_allclose(one, 1 - two, atol=1e-3)
    os.utime(tmp_path / "t1/a.nii", (2e9, 2e9))                    # the same size, another time: another file
    cfg = config(tmp_path, image="t1/{id}.nii", foreground=-1e4)
    assert not (data.cache_folder(cfg) / f"{data.cache_name(data.find_cases(cfg)[0], cfg)}.image.npy").exists()


def test_data_that_move_as_a_whole_stay_cached(tmp_path):
    keys = data_set(tmp_path / "here", 1)
    stem = open_scans(config(tmp_path, data=str(tmp_path / "here"), **keys))[0].stem
    (tmp_path / "here").rename(tmp_path / "there")
    assert open_scans(config(tmp_path, data=str(tmp_path / "there"), **keys))[0].stem == stem


@pytest.mark.parametrize("key", ["image", "label", "positions", "body", "target"])
def test_a_cache_that_lost_an_array_is_made_anew(tmp_path, key):
    cfg = config(tmp_path, **data_set(tmp_path, 1), target="img/case{id}.nii.gz")
    scan = open_scans(cfg)[0]
    Path(f"{scan.stem}.{key}.npy").unlink()
    assert open_scans(cfg)[0].stem == scan.stem and Path(f"{scan.stem}.{key}.npy").exists()


def test_the_same_files_in_other_roles_are_other_cases(tmp_path):
    data_set(tmp_path, 1)
    two = config(tmp_path, image=("img/case{id}.nii.gz", "seg/case{id}.nii.gz"))
    aim = config(tmp_path, image="img/case{id}.nii.gz", target="seg/case{id}.nii.gz")
    labelled = config(tmp_path, image="img/case{id}.nii.gz", label="seg/case{id}.nii.gz")
    assert len({data.cache_name(data.find_cases(cfg)[0], cfg) for cfg in (two, aim, labelled)}) == 3
    assert open_scans(two)[0].open().shape[0] == 2 and open_scans(aim)[0].open("target").shape[0] == 1


KILLED = """
import io, os, sys, time
import numpy as np
import data
import finetune
import pretrain
save, count = np.save, 0
def half(file, array):
    global count
    count += 1
    if count < 8:
        return save(file, array)
    whole = io.BytesIO()
    save(whole, array)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    print(os.getpid(), flush=True)
    os.kill(os.getppid(), 9)
    time.sleep(60)
np.save = half
cfg = data.Config(data=sys.argv[1], cache=sys.argv[2], workers=1, foreground=-1e9, image="img/case{id}.nii.gz",
                  label="seg/case{id}.nii.gz")
data.fill_cache(data.find_cases(cfg), cfg)
"""


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_program_killed_while_it_writes_leaves_no_half_file_and_no_worker(tmp_path):
    keys = data_set(tmp_path, 6)
    clean = config(tmp_path, cache=str(tmp_path / "clean"), **keys)
    open_scans(clean)
    with open(tmp_path / "said", "w") as said:                      # no pipe: a worker left behind would hold it open
        killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path, tmp_path / "cache"], stdout=said, stderr=said, cwd=HERE)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()
    worker = int((tmp_path / "said").read_text().split()[-1])
    patience = time.time() + 10
    while alive(worker) and time.time() < patience:
        time.sleep(0.05)
    left_behind = alive(worker)
    if left_behind:
        os.kill(worker, signal.SIGKILL)
    cfg = config(tmp_path, **keys)
    assert len(contents(cfg)) == 7                                  # np.load opens every array that has its final name
    open_scans(cfg)
    same_contents(contents(cfg), contents(clean))
    assert data.read_index(data.cache_folder(cfg)) == data.read_index(data.cache_folder(clean))
    assert not left_behind


def test_two_programs_fill_one_cache(tmp_path):
    keys = data_set(tmp_path, 12)
    path = write_config(tmp_path, dict(data=str(tmp_path), cache=str(tmp_path / "cache"), foreground=-1e9, **keys))
    parts = ("1?", "[2-4]"), ("[5-9]",)                             # each leaves out other cases, two are done by both
    programs = [subprocess.Popen([sys.executable, HERE / "data.py", path, "--workers=1", f"--exclude={part}"],
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for part in parts]
    for program in programs:
        said = program.communicate()[0]
        assert program.returncode == 0, said
    cfg = config(tmp_path, foreground=-1e9, **keys)
    cases = data.find_cases(cfg)
    index = data.read_index(data.cache_folder(cfg))
    assert sorted(index) == sorted(data.cache_name(c, cfg) for c in cases) and not list(data.cache_folder(cfg).glob("*.tmp"))
    clean = config(tmp_path, cache=str(tmp_path / "clean"), **keys)
    open_scans(clean)
    same_contents(contents(cfg), contents(clean))


def test_no_record_is_lost_when_many_write_the_index(tmp_path):
    cfg = config(tmp_path)
    children = []
    for part in range(4):
        child = os.fork()
        if not child:
            try:
                for k in range(25):
                    data.merge_index(tmp_path, cfg, {f"{part}-{k}": {}})
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert len(data.read_index(tmp_path)) == 100


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    cfg = config(tmp_path, **data_set(tmp_path, 3))
    need = sum(data.expected_bytes(case, cfg) for case in data.find_cases(cfg))
    assert need >= 3 * 2 * 12 * 10 * 8
    said = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), dict(total=1, used=0, free=need)))
    assert "the cache needs up to" in ends(data.fill_cache, data.find_cases(cfg), cfg, said.append)
    assert len(said) == 1 and "3 of 3 scans to write, at most" in said[0] and not (tmp_path / "cache").exists()


def test_unusable_files_are_named_and_the_others_cached(tmp_path, capsys):
    cfg = config(tmp_path, **data_set(tmp_path, 4))
    cut_file(tmp_path / "img/case2.nii.gz", 300)
    good, reasons = data.fill_cache(data.find_cases(cfg), cfg)
    assert [case["id"] for case, _, _ in good] == ["0", "1", "3"]
    assert len(reasons) == 1 and reasons[0].startswith(f"{tmp_path}/img/case2.nii.gz: ")
    assert "4/4 scans, 1 unusable" in capsys.readouterr().out
    assert "1 unusable; mend them or name their ids under `exclude`" in ends(data.open_scans, cfg, say=print)
    assert [scan.id for scan in data.open_scans(cfg, [case for case, _, _ in good], say=print)] == ["0", "1", "3"]
    cfg.exclude = "2"
    assert [scan.id for scan in open_scans(cfg)] == ["0", "1", "3"]


def test_program_prints_the_table(tmp_path, capsys):
    volumes = [noise(12, 10, 8), noise(14, 10, 8, seed=1), noise(13, 10, 20, seed=2)]
    for k, voxels in enumerate(volumes):
        affine = np.diag([-1, 1, 2.5, 1]) if k else np.eye(4)
        nifti(tmp_path / f"img/{k}.nii.gz", voxels, affine)
        nifti(tmp_path / f"seg/{k}.nii.gz", np.clip(voxels, 0, k).astype(np.uint8), affine)
    path = write_config(tmp_path, dict(data=str(tmp_path), cache=str(tmp_path / "cache"), image="img/{id}.nii.gz",
                                       label="seg/{id}.nii.gz", foreground=-2000.0, lr=1.0, workers=1))
    data.main([str(path)])
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in said.splitlines()]
    rows = {row[0]: row[1:] for row in rows}
    assert rows["shape, as stored"] == rows["shape in the cache"] == ["12 x 10 x 8", "13 x 10 x 8", "14 x 10 x 20"]
    assert rows["spacing x y z, mm"] == ["1 x 1 x 1", "1 x 1 x 2.5", "1 x 1 x 2.5"]
    least, most = sorted(v.min() for v in volumes), sorted(v.max() for v in volumes)
    assert rows["smallest value"] == [str(v) for v in least] and rows["largest value"] == [str(v) for v in most]
    assert "stored axes: LAS 2, RAS 1" in said and "label ids (scans): 0 (3), 1 (2), 2 (1)" in said
    assert "3 cases of 3 subjects below" in said and "3 usable scans in" in said and "keys left to other scripts: lr" in said


def test_cut_reaches_outside_the_scan(tmp_path):
    voxels = noise(12, 10, 8)
    nifti(tmp_path / "a.nii.gz", voxels, np.eye(4))
    scan = open_scans(config(tmp_path, scans="*.nii.gz", intensity="zscore"))[0]
    whole = np.asarray(scan.open())
    around = ((0, 0),) + ((20, 20),) * 3
    boxes = (((2, 3, 1), (9, 7, 5)), ((-5, -1, 3), (4, 14, 28)), ((-9, -9, -9), (-1, 5, 5)), ((12, 0, 0), (15, 4, 4)),
             ((-20, -20, -20), (30, 30, 28)))
    for low, high in boxes:
        box = (slice(None), *(slice(a + 20, b + 20) for a, b in zip(low, high)))
        np.testing.assert_array_equal(scan.cut(low, high), np.pad(whole, around, constant_values=whole.min())[box])
        np.testing.assert_array_equal(scan.cut(low, high, fill=[7.0]), np.pad(whole, around, constant_values=7)[box])


# ---------------------------------------------------------------------------------------------------------------------
# move

class Always:
    """A generator whose draws lie at given fractions of their ranges."""

    def __init__(self, *fractions):
        self.fractions = np.array(fractions)

    def uniform(self, low, high, size):
        return low + (high - low) * np.resize(self.fractions, size)


CENTRE, SPACING = np.array((15.5, 11.5, 7.5)), np.array((0.8, 1.1, 5.0))


def matvec(matrix=np.eye(3), vector=(0, 0, 0)):
    return nib.affines.from_matvec(np.asarray(matrix, float), vector)


def test_each_factor_of_a_random_affine_alone():
    alone = lambda fraction=0.75, **ranges: data.random_affine(Always(fraction), CENTRE, spacing=SPACING, **ranges).numpy()
    about = lambda matrix: matvec(np.eye(3), CENTRE) @ matvec(matrix) @ matvec(np.eye(3), -CENTRE)
    mm, back = np.diag(SPACING), np.diag(1 / SPACING)
    np.testing.assert_allclose(alone(), np.eye(4), atol=1e-12)
    for axis, name in enumerate("xyz"):                             # +- 40 degrees at 3/4 of the range: +20
        turn = Rotation.from_euler(name, 20, degrees=True).as_matrix()
        np.testing.assert_allclose(alone(rotation=40 * np.eye(3)[axis]), about(back @ turn @ mm), atol=1e-12)
    np.testing.assert_allclose(alone(scale=(0.8, 1.2)), about(np.eye(3) * 1.1), atol=1e-12)
    lean = np.full((3, 3), 0.1) + 0.9 * np.eye(3)
    np.testing.assert_allclose(alone(shear=0.2), about(back @ lean @ mm), atol=1e-12)
    np.testing.assert_allclose(alone(0.25, shift=(8, 6, 4)), matvec(np.eye(3), (-4, -3, -2)), atol=1e-12)
    np.testing.assert_allclose(alone(flip=(1, 0, 0.8)), about(np.diag([-1, 1, -1])), atol=1e-12)


def test_a_random_affine_composes_its_factors_in_the_stated_order():
    fractions = np.array((0.9, 0.6, 0.2))                           # along x, y, z: each axis has its own angle, zoom, ...
    share = 2 * fractions - 1
    found = data.random_affine(Always(*fractions), CENTRE, (10, 20, 30), (0.5, 1.5), 0.3, (5, 6, 7), (0, 1, 0), SPACING)
    angles = share * (10, 20, 30)
    r_x, r_y, r_z = [Rotation.from_euler(axis, angle, degrees=True).as_matrix() for axis, angle in zip("xyz", angles)]
    lean = np.eye(3)
    lean[~np.eye(3, dtype=bool)] = 0.3 * np.tile(share, 2)
    linear = np.diag(1 / SPACING) @ r_z @ r_y @ r_x @ lean @ np.diag(SPACING) @ np.diag(0.5 + fractions) @ np.diag([1, -1, 1])
    expected = matvec(np.eye(3), CENTRE + share * (5, 6, 7)) @ matvec(linear) @ matvec(np.eye(3), -CENTRE)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_random_affines_fill_their_ranges_and_stay_in_them():
    limits, found = np.array((10.0, 20.0, 60.0)), []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        H = data.random_affine(generator, CENTRE, rotation=limits, spacing=SPACING)
        rigid = np.diag(SPACING) @ H[:3, :3].numpy() @ np.diag(1 / SPACING)         # in mm a rotation, whatever the voxels
        np.testing.assert_allclose(rigid @ rigid.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rigid) > 0
        np.testing.assert_allclose(H.numpy() @ [*CENTRE, 1], [*CENTRE, 1], atol=1e-12)
        found.append(Rotation.from_matrix(rigid).as_euler("xyz", degrees=True))     # about the fixed axes x, then y, then z
        after = generator.uniform()
        other = np.random.default_rng(seed)
        data.random_affine(other, CENTRE, (1, 2, 3), (0.5, 2), 0.3, (4, 5, 6), (0.5, 0.5, 0.5))
        assert other.uniform() == after                             # the ranges do not change how much is drawn
    found = np.array(found) / limits
    assert np.abs(found).max() <= 1 + 1e-9
    np.testing.assert_allclose(np.quantile(found, (0.1, 0.5, 0.9), axis=0), np.repeat([[-0.8], [0], [0.8]], 3, 1), atol=0.2)
    assert np.abs(np.corrcoef(found.T) - np.eye(3)).max() < 0.2
    draw = lambda seed, **ranges: data.random_affine(np.random.default_rng(seed), CENTRE, **ranges).numpy()
    zoom = np.array([np.diag(draw(seed, scale=(0.7, 1.3)))[:3] for seed in range(300)])
    assert 0.7 < zoom.min() < 0.72 and 1.28 < zoom.max() < 1.3 and np.abs(np.corrcoef(zoom.T) - np.eye(3)).max() < 0.2
    flips = np.array([np.diag(draw(seed, flip=(0.1, 0.5, 0.9)))[:3] < 0 for seed in range(300)])
    np.testing.assert_allclose(flips.mean(0), (0.1, 0.5, 0.9), atol=0.08)
    assert (draw(3, rotation=limits, shift=(1, 2, 3)) == draw(3, rotation=limits, shift=(1, 2, 3))).all()


def general_affine(seed, centre, **ranges):
    wide = dict(rotation=(30, 40, 180), scale=(0.7, 1.4), shear=0.2, shift=(6, 5, 4), flip=(0.5,) * 3, spacing=(1.0, 1.5, 2.0))
    return data.random_affine(np.random.default_rng(seed), centre, **(wide | ranges))


def scipy_warp(volume, H, size, order, fill=0.0):
    """The same from its definition V'(p) = V(H^-1 p), in float64."""
    back = np.linalg.inv(np.asarray(H))
    return ndimage.affine_transform(np.asarray(volume, np.float64), back[:3, :3], back[:3, 3], tuple(size), order=order,
                                    mode="grid-constant", cval=fill)


def test_warp_by_identity_and_whole_voxels():
    x = torch.rand(2, 3, 13, 11, 9)
    still = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    torch.testing.assert_close(data.warp(x, still, x.shape[2:], fill=5.0), x, rtol=0, atol=1e-5)
    ids = torch.randint(0, 200, (2, 1, 13, 11, 9), dtype=torch.uint8)
    found = data.warp(ids, still, ids.shape[2:], "nearest")
    assert found.dtype == torch.uint8 and (found == ids).all()
    moved = data.warp(ids, data.translation(torch.tensor([[2.0, -1, 3], [0, 0, -9]])), (13, 11, 9), "nearest", fill=201.0)
    assert (moved[0, :, 2:, :-1, 3:] == ids[0, :, :-2, 1:, :-3]).all()              # V'(x + 2, y - 1, z + 3) = V(x, y, z)
    assert all((empty == 201).all() for empty in (moved[0, :, :2], moved[0, :, :, -1], moved[0, ..., :3], moved[1]))
    with pytest.raises(ValueError, match="'cubic'"):
        data.warp(x, still, (13, 11, 9), "cubic")


@pytest.mark.parametrize("kind", [torch.int16, torch.float16, torch.bfloat16])
def test_warp_of_short_numbers_is_that_of_float32_rounded_once(kind):
    x = (200 * torch.rand(1, 1, 40, 9, 8) - 100).to(kind)
    move = general_affine(0, (20.0, 4.0, 4.0), scale=(0.8, 1.25), spacing=(1, 1, 1))[None]
    for H in (torch.eye(4, dtype=torch.float64)[None], move):
        exact = data.warp(x.float(), H, (30, 9, 8))
        assert torch.equal(data.warp(x, H, (30, 9, 8)), exact.round().to(kind) if kind == torch.int16 else exact.to(kind))


def test_warp_of_one_voxel_thick_tissue_leaves_the_rest_to_the_fill():
    x = torch.rand(1, 1, 1, 6, 5)
    moved = data.warp(x, data.translation(torch.tensor([[2.0, 0, 0]])), (4, 6, 5), fill=7.0)
    torch.testing.assert_close(moved[:, :, 2], x[:, :, 0], rtol=0, atol=1e-5)
    assert (moved[:, :, [0, 3]] == 7).all()


@pytest.mark.parametrize("size", [(14, 17, 12), (25, 9, 20)])
def test_warp_against_scipy(size):
    shape = (14, 17, 12)
    x = torch.rand(4, 2, *shape)
    H = torch.stack([general_affine(seed, (np.array(shape) - 1) / 2) for seed in range(4)])
    fill = torch.rand(4, 2)
    found = data.warp(x, H, size, fill=fill)
    nearest = data.warp((x * 250).to(torch.uint8), H, size, "nearest", fill=255.0)
    for b, c in product(range(4), range(2)):
        np.testing.assert_allclose(found[b, c], scipy_warp(x[b, c], H[b], size, 1, float(fill[b, c])), atol=2e-5)
        expected = scipy_warp((x[b, c] * 250).to(torch.uint8), H[b], size, 0, 255)
        assert (nearest[b, c].numpy() != expected).mean() < 1e-3   # a point within rounding of the middle may go either way


# ---------------------------------------------------------------------------------------------------------------------
# match

def brute_force(H, grid, patch):
    """Eq. 2 and 3 word for word, over all pairs of patches."""
    H = np.asarray(H, np.float64)
    back = np.linalg.inv(H)
    centres = [np.array([(k + 0.5) * p - 0.5 for k, p in zip(cell, patch)]) for cell in product(*map(range, grid))]
    there, home = [[M[:3, :3] @ c + M[:3, 3] for c in centres] for M in (H, back)]
    found = np.zeros((len(centres), len(centres)), bool)
    for i, c_i in enumerate(centres):
        for j, c_j in enumerate(centres):
            forward = all(-p / 2 <= d <= p / 2 for d, p in zip(there[i] - c_j, patch))
            found[i, j] = forward and all(-p / 2 <= d <= p / 2 for d, p in zip(home[j] - c_i, patch))
    return found


GRIDS = [((4, 4, 4), (8, 8, 8)), ((5, 3, 2), (4, 8, 16)), ((2, 6, 3), (7, 5, 9)), ((1, 1, 9), (6, 6, 6))]


@pytest.mark.parametrize("grid, patch", GRIDS)
def test_correspondence_against_brute_force(grid, patch):
    centre = (np.array(grid) * patch - 1) / 2
    H = torch.stack([general_affine(seed, centre, shift=np.array(patch) * 1.5) for seed in range(6)])
    found = data.correspondence(H, grid, patch)
    expected = np.stack([brute_force(h, grid, patch) for h in H])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(data.matches(H, grid, patch), np.argwhere(expected))
    assert expected.any()
    for h, m in zip(H, found):                                      # one matrix alone, and in float32
        assert (data.correspondence(h, grid, patch) == m).all() and (data.correspondence(h.float(), grid, patch) == m).all()


def test_correspondence_in_closed_form():
    still = torch.eye(4, dtype=torch.float64)
    t = 4 * 3 * 2
    assert (data.correspondence(still, (4, 3, 2), 8) == torch.eye(t, dtype=torch.bool)).all()
    one = data.correspondence(data.translation([8.0, 0, -8]), (4, 3, 2), 8)     # whole patches: (i, j, k) -> (i + 1, j, k - 1)
    cells = {cell: n for n, cell in enumerate(product(range(4), range(3), range(2)))}
    expected = torch.zeros(t, t, dtype=torch.bool)
    for (i, j, k), n in cells.items():
        if (i + 1, j, k - 1) in cells:
            expected[n, cells[i + 1, j, k - 1]] = True
    assert (one == expected).all() and one.sum() == 3 * 3 * 1
    tie = data.correspondence(data.translation([4.0, 0, 0]), (4, 3, 2), 8)          # half a patch: on the border of two
    along_x = torch.eye(4, dtype=torch.bool) | torch.diag(torch.ones(3, dtype=torch.bool), 1)
    assert (tie == torch.kron(along_x, torch.eye(6, dtype=torch.bool))).all()
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    mirror[0, 3] = 31
    assert (data.correspondence(mirror, (4, 3, 2), 8) == torch.kron(torch.eye(4).flip(0), torch.eye(6)).bool()).all()
    assert not data.correspondence(data.translation([100.0, 0, 0]), (4, 3, 2), 8).any()
    assert data.matches(data.translation([[100.0, 0, 0]]), (4, 3, 2), 8).shape == (0, 3)


def centre_of_light(images):
    return np.array([ndimage.center_of_mass(image) for image in images[:, 0].numpy()])


@pytest.mark.parametrize("seed", range(3))
def test_light_from_patch_i_arrives_in_patch_j_where_the_matrix_says_so(seed):
    grid, patch, dark = (3, 3, 3), 8, 8                         # `dark`: a border around V', so that no light nearby is cut off
    size = np.array(grid) * patch
    H = general_affine(seed, (size - 1) / 2, scale=(0.8, 1.25), shear=0.1, spacing=(1, 1, 1))
    c = data.patch_centres(grid, patch).numpy()
    voxel = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    blobs = torch.tensor(np.stack([np.exp(-((voxel - c_i) ** 2).sum(-1) / 2)[None] for c_i in c]), dtype=torch.float32)

    def shine(matrix):
        frame = data.translation([float(dark)] * 3) @ matrix
        return centre_of_light(data.warp(blobs, frame.expand(len(blobs), 4, 4), size + 2 * dark)) - dark
    there, home = shine(H), shine(torch.linalg.inv(H))
    lit = lambda where, slack: (np.abs(where[:, None] - c) <= patch / 2 + slack).all(-1)
    M = data.correspondence(H, grid, patch).numpy()
    # light is seen to a tenth of a voxel: surely in both ways -> True, surely not -> False
    assert M[lit(there, -0.1) & lit(home, -0.1).T].all() and not M[~(lit(there, 0.1) & lit(home, 0.1).T)].any()
    assert (lit(there, -0.1) & lit(home, -0.1).T).sum() >= 5 and M.any(1).mean() > 0.3


# ---------------------------------------------------------------------------------------------------------------------
# intensity

NEUTRAL = (0.0, 1.0, 1.0, 0.0, 0.0)                                 # shift, scale, gamma, noise, blur


def jittered(x, *draws, seeds=None):
    return data.jitter(x, torch.tensor(draws, dtype=torch.float32), torch.tensor(seeds or range(len(x))))


def test_neutral_draws_leave_the_volume_alone():
    x = torch.rand(2, 2, 9, 8, 7)
    kept = x.clone()
    assert (jittered(x, NEUTRAL, NEUTRAL) == kept).all()
    jittered(x, (0.5, 1.2, 0.7, 0.1, 1.0), NEUTRAL)
    assert (x == kept).all()                                        # nor is the caller's volume written to


def test_each_intensity_change_in_closed_form():
    x = torch.rand(2, 2, 12, 11, 10) * 3 - 1
    torch.testing.assert_close(jittered(x, (0.25, 1, 1, 0, 0), NEUTRAL), x + torch.tensor([0.25, 0]).reshape(2, 1, 1, 1, 1))
    torch.testing.assert_close(jittered(x, (0.25, 1.5, 1, 0, 0), NEUTRAL)[0], x[0] * 1.5 + 0.25)
    low, high = x[0].min(), x[0].max()
    found = jittered(x, (0, 1, 0.6, 0, 0), NEUTRAL)
    torch.testing.assert_close(found[0], low + (high - low) * ((x[0] - low) / (high - low)) ** 0.6)
    assert (found[1] == x[1]).all()
    for sigma in (0.3, 0.7, 1.0):
        found = jittered(x, (0, 1, 1, 0, sigma), NEUTRAL)
        plain = x[0].double().numpy()
        expected = ndimage.gaussian_filter(plain, (0, sigma, sigma, sigma), mode="nearest", truncate=3 / sigma)     # 3 voxels
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
        torch.testing.assert_close(found[1], x[1], rtol=0, atol=1e-6)


def test_noise_has_its_standard_deviation_and_its_own_seed():
    x = torch.zeros(3, 1, 40, 40, 40)
    found = jittered(x, (0, 1, 1, 0.03, 0), (0, 1, 1, 0.2, 0), (0, 1, 1, 0.03, 0), seeds=[5, 6, 5])
    np.testing.assert_allclose(found.std((1, 2, 3, 4)), (0.03, 0.2, 0.03), rtol=0.02)
    assert found.mean((1, 2, 3, 4)).abs().max() < 0.003
    assert (found[0] == found[2]).all() and abs(np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]) < 0.02


def test_a_sample_changes_alike_alone_and_in_company():
    x = torch.rand(8, 2, 10, 9, 8)
    cfg = pretrain.Config(**{f"jitter_{k}": (0.6, r) for k, r in dict(shift=0.1, scale=0.2, gamma=0.3, noise=0.05, blur=2.5).items()})
    draws = torch.from_numpy(np.stack([data.draw_jitter(np.random.default_rng(k), cfg) for k in range(8)]))
    assert draws[:, 4].max() > 4 / 3 and 0 < draws[draws[:, 4] > 0, 4].min() < 1            # kernels of different reach
    together = data.jitter(x, draws, torch.arange(8))
    for k in range(8):
        alone = data.jitter(x[k:k + 1], draws[k:k + 1], torch.arange(8)[k:k + 1])
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-6)


def test_draws_follow_their_probabilities_and_ranges():
    chance = dict(shift=(0.1, 0.2), scale=(0.9, 0.3), gamma=(0.5, 0.4), noise=(0.3, 0.05), blur=(0.7, 1.2))
    cfg = pretrain.Config(**{f"jitter_{k}": v for k, v in chance.items()})
    draws = np.stack([data.draw_jitter(np.random.default_rng(k), cfg) for k in range(3000)])
    np.testing.assert_allclose((draws != np.float32(NEUTRAL)).mean(0), [p for p, _ in chance.values()], atol=0.03)
    low, high = (-0.2, 0.7, 1 / 1.4, 0, 0), (0.2, 1.3, 1.4, 0.05, 1.2)
    np.testing.assert_allclose(draws.max(0), high, rtol=0.02)
    np.testing.assert_allclose(draws.min(0), low, rtol=0.02)
    assert (draws.max(0) <= np.float32(high)).all() and (draws.min(0) >= np.float32(low)).all()


# ---------------------------------------------------------------------------------------------------------------------
# pre-training samples

QUIET = {f"jitter_{change}": (0.0, 0.1) for change in ("shift", "scale", "gamma", "noise", "blur")}


@pytest.fixture(scope="module")
def several_scans(tmp_path_factory):
    """Smooth scans around the slab of 16^3: larger, smaller, mixed; two channels."""
    folder = tmp_path_factory.mktemp("scans")
    for k, size in enumerate(((40, 36, 30), (10, 12, 9), (30, 11, 16), (26, 33, 21), (16, 16, 16))):
        for c in range(2):
            smooth = ndimage.gaussian_filter(noise(*size, seed=10 * k + c).astype(np.float32), 1)
            nifti(folder / f"{k}_{c}.nii.gz", smooth, np.diag([0.8, 1.0, 1.6, 1]))
    cfg = config(folder, image=("{id}_0.nii.gz", "{id}_1.nii.gz"), intensity="zscore", rotation=(20.0, 20.0, 40.0), shear=0.1,
                 shift=(6.0, 5.0, 4.0), flip=(0.3, 0.3, 0.3), twin_shift=(3.0, 3.0, 3.0), **QUIET)
    return open_scans(cfg), cfg


def test_views_show_the_scan_itself_and_the_whole_scan_moved(several_scans):
    scans, cfg = several_scans
    slabs = data.Slabs(scans, cfg, batch=2, seed=3)
    seen = set()
    for step in range(10):
        batch = data.collate([slabs[step, place] for place in range(2)])
        V, V_, twin = data.views(batch, cfg)
        for b in range(2):
            scan = next(s for s in scans if s.id == batch["id"][b])
            seen.add(scan.id)
            start, crop = batch["start"][b].numpy(), batch["crop"][b].numpy()
            assert np.ravel_multi_index(crop // 8, (2, 2, 2)) == batch["chosen"][b]
            assert all(0 <= s <= n - 16 if n > 16 else s == -((16 - n) // 2) for s, n in zip(start, scan.shape))
            assert (crop % 8 == 0).all() and (crop < 16).all()
            np.testing.assert_array_equal(V[b], scan.cut(start, start + 16).astype(np.float32))
            for c in range(2):
                whole = scan.open()[c].astype(np.float64)
                for found, H, origin, edge in ((V_, batch["H"], start, 16), (twin, batch["H_twin"], start + crop, 8)):
                    expected = scipy_warp(whole, H[b].numpy() @ matvec(np.eye(3), -origin), (edge,) * 3, 1, scan.fill[c])
                    np.testing.assert_allclose(found[b, c], expected, atol=1e-3)    # values of some units: 4 standard deviations
    assert len(seen) == 5


def test_views_jitter_the_moved_copies_only(several_scans):
    scans, cfg = several_scans
    batch = data.collate([data.Slabs(scans, cfg, 2, 3)[0, place] for place in range(2)])
    plain = data.views(batch, cfg)
    batch["draws"] = torch.tensor([[(0.5, 1, 1, 0, 0), (0, 2, 1, 0, 0)], [(0, 3, 1, 0, 0), (-0.25, 1, 1, 0, 0)]])
    V, V_, twin = data.views(batch, cfg)
    assert (V == plain[0]).all()
    torch.testing.assert_close(V_, torch.stack([plain[1][0] + 0.5, plain[1][1] * 3]))
    torch.testing.assert_close(twin, torch.stack([plain[2][0] * 2, plain[2][1] - 0.25]))


def loaded(scans, cfg, workers, places):
    slabs = data.Slabs(scans, cfg, batch=4, seed=7)
    loader = torch.utils.data.DataLoader(slabs, batch_sampler=places, num_workers=workers, collate_fn=data.collate)
    return [{key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()} for batch in loader]


def same_sample(one, b, other, d):
    """Sample b of one batch is sample d of another, but for the padding that its neighbours ask for."""
    assert one["id"][b] == other["id"][d]
    for key in one:
        if key not in ("id", "cutout"):
            assert torch.equal(one[key][b], other[key][d]), key
    common = tuple(slice(min(n, m)) for n, m in zip(one["cutout"].shape[1:], other["cutout"].shape[1:]))
    assert torch.equal(one["cutout"][b][common], other["cutout"][d][common])


def test_samples_depend_on_seed_step_and_place_alone(several_scans):
    scans, cfg = several_scans
    places = [[(step, place) for place in range(4)] for step in range(3)]
    plain = loaded(scans, cfg, 0, places)
    for one, other in zip(plain, loaded(scans, cfg, 2, places)):
        assert all(torch.equal(one[key], other[key]) if key != "id" else one[key] == other[key] for key in one)
    # two ranks with half the batch each, begun again at step 1
    for rank in range(2):
        half = loaded(scans, cfg, 0, [[(step, 2 * rank + k) for k in range(2)] for step in (1, 2)])
        for step, batch in zip((1, 2), half):
            for k in range(2):
                same_sample(batch, k, plain[step], 2 * rank + k)
    matrices = torch.cat([batch["H"] for batch in plain])
    assert len(torch.unique(matrices, dim=0)) == 12                 # and no draw comes twice
    other_seed = data.Slabs(scans, cfg, 4, 8)[0, 0]
    assert not torch.equal(other_seed["H"], plain[0]["H"][0])


def test_an_epoch_visits_every_scan_once(several_scans):
    scans, cfg = several_scans
    slabs = data.Slabs(scans, cfg, batch=2, seed=3)
    order = [slabs[divmod(n, 2)]["id"] for n in range(20)]
    epochs = [order[k:k + 5] for k in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(s.id for s in scans) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    slabs = data.Slabs(scans, cfg, batch=2, seed=4)
    assert order != [slabs[divmod(n, 2)]["id"] for n in range(20)]


def test_slabs_must_be_tiled_by_crops(several_scans):
    scans, cfg = several_scans
    text = ends(data.Slabs, scans, dataclasses.replace(cfg, crop=(8, 8, 7)), 1, 0)
    assert text == "slab = (16, 16, 16) is not tiled by crops of (8, 8, 7)"


@pytest.fixture(scope="module")
def body_scans(tmp_path_factory):
    """Air with noise above 0, a hollow body in a corner of it, and a slab far smaller than the scan."""
    folder = tmp_path_factory.mktemp("body")
    for k in range(4):
        place = np.moveaxis(np.indices((70, 61, 52)), 0, -1)
        far = np.linalg.norm(place - (50 - 4 * k, 20, 12 + 6 * k), axis=-1)
        voxels = noise(70, 61, 52, seed=k) % 20 + 900 * ((far < 16) & (far > 9))
        nifti(folder / f"{k}.nii.gz", voxels, np.diag([1, 1, 1.5, 1]))
    cfg = config(folder, scans="*.nii.gz", intensity="scale", foreground=0.0, crop_foreground=False, rotation=(9.0, 9.0, 30.0),
                 shift=(6.0, 5.0, 4.0), slab=(32, 32, 16), crop=(16, 16, 16), token_patch=4, **QUIET)
    return open_scans(cfg), cfg


@pytest.mark.parametrize("size", [(40, 33, 26), (16, 8, 24), (9, 7, 5)])
def test_body_map_against_loops(size):
    """A quarter of each cell, cells at the end of the scan by the voxels that they have, holes of axial slices filled."""
    place = np.moveaxis(np.indices(size), 0, -1) - (np.array(size) - 1) / 2
    far = np.abs(place).max(-1) / (min(size) / 2)
    volume = np.where((far < 0.9) & (far > 0.5), 100.0, noise(*size) % 5)
    low, high = np.percentile(volume[::2, ::2, ::2], [2, 98])
    found = data.body_map([volume], -500.0)
    tissue, cells = volume > low + 0.1 * (high - low), {}
    for x, y, z in product(*map(range, size)):
        cells.setdefault((x // 8, y // 8, z // 8), []).append(tissue[x, y, z])
    expected = np.zeros(found.shape, bool)
    for cell, voxels in cells.items():
        expected[cell] = np.mean(voxels) >= 0.25
    for k in range(expected.shape[2]):                              # what the outside does not reach by faces is filled
        outside = np.pad(~expected[:, :, k], 1, constant_values=True)
        expected[:, :, k] = ~(ndimage.label(outside)[0] == ndimage.label(outside)[0][0, 0])[1:-1, 1:-1]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(data.body_map([np.zeros(size), volume], 50.0), found)     # channels together
    speck = np.zeros(size)
    speck[3, 2, 1] = 9                                              # less than a quarter of any cell: what there is
    assert np.argwhere(data.body_map([speck], 0.0)).tolist() == [[0, 0, 0]]
    assert not np.array_equal(data.body_map([volume], 100.0), found)        # the foreground threshold counts too


def test_noise_in_the_air_is_no_body_and_what_is_enclosed_is(body_scans):
    scans, _ = body_scans
    for k, scan in enumerate(scans):
        middle = np.array((50 - 4 * k, 20, 12 + 6 * k)) // data.BODY_CELL
        assert 0.02 < scan.body().mean() < 0.2 and scan.body()[tuple(middle)] and not scan.body()[0].any()


def test_slabs_and_their_crops_show_the_body(body_scans):
    scans, cfg = body_scans
    slabs, seen = data.Slabs(scans, cfg, batch=1, seed=5), set()
    for step in range(60):
        sample = slabs[step, 0]
        scan = next(s for s in scans if s.id == sample["id"])
        centres = np.argwhere(scan.body()) * 8 + 3.5 - sample["start"].numpy()
        held = {crop: sum(((c >= np.array(crop) * 16 - 0.5) & (c < np.array(crop) * 16 + 15.5)).all() for c in centres)
                for crop in product(range(2), range(2), range(1))}
        mine = tuple((sample["crop"] // 16).tolist())
        assert held[mine] > 0 and held[mine] >= max(held.values()) / 2
        assert (sample["start"] >= 0).all() and (sample["start"].numpy() + cfg.slab <= scan.shape).all()
        seen.add(mine)
    assert len(seen) == 4


def test_a_cell_of_few_voxels_at_the_end_of_a_scan_gives_a_slab(tmp_path):
    voxels = np.full((196, 72, 72), -1000, np.int16)
    voxels[:20] = noise(20, 72, 72) // 50
    voxels[192:] = 40                                               # a plate, in the last 4 voxels of 196
    nifti(tmp_path / "a.nii.gz", voxels, np.eye(4))
    cfg = config(tmp_path, scans="*.nii.gz", foreground=-1e4, slab=(64,) * 3, crop=(64,) * 3, token_patch=8, **QUIET)
    slabs, ends_there = data.Slabs(open_scans(cfg), cfg, batch=1, seed=0), 0
    for step in range(120):
        sample = slabs[step, 0]
        ends_there += int(sample["start"][0]) == 132
        assert (sample["crop"] == 0).all() and (sample["start"] >= 0).all()
    assert ends_there > 5


def sizes_in_mm(H, spacing):
    """Singular values of the linear part as it acts in mm: 1 1 1 of a turn."""
    linear = np.diag(spacing) @ H.numpy()[:3, :3] @ np.diag(1 / np.array(spacing))
    return np.linalg.svd(linear)[1]


def test_a_turn_is_one_in_mm_in_every_sample(tmp_path):
    nifti(tmp_path / "a.nii.gz", noise(40, 40, 20), np.diag([0.7, 0.9, 3.0, 1]))
    cfg = config(tmp_path, scans="*.nii.gz", rotation=(40.0, 40.0, 90.0), twin_rotation=(40.0, 40.0, 90.0), shear=0.0, scale=(1.0, 1.0),
                 twin_scale=(1.0, 1.0), **QUIET)
    scans = open_scans(cfg)
    tuned = finetune.Config(crop=(16,) * 3, rotation=(40.0, 40.0, 90.0), scale=(1.0, 1.0), flip=(0.0,) * 3)
    for step in range(4):
        sample = data.Slabs(scans, cfg, batch=1, seed=1)[step, 0]
        for H in (sample["H"], sample["H_twin"], data.Crops(scans, tuned, batch=1, seed=1)[step, 0]["H"]):
            assert abs(H[0, 1]) > 1e-3
            np.testing.assert_allclose(sizes_in_mm(H, scans[0].spacing), 1, atol=1e-9)


def test_crops_of_the_moved_slab_that_show_none_of_the_chosen_one(body_scans):
    scans, cfg = body_scans
    for step in range(10):
        sample = data.Slabs(scans, cfg, batch=1, seed=5)[step, 0]
        back = np.linalg.inv(sample["H"].numpy())
        for n, crop in enumerate(product(range(2), range(2), range(1))):
            middle = back[:3, :3] @ (np.array(crop) * 16 + 7.5) + back[:3, 3]
            near = all(abs(m - c - 7.5) < 16 for m, c in zip(middle, sample["crop"].numpy()))
            assert sample["apart"][n] == (not near)


@pytest.mark.parametrize("fixture, tokens", [("several_scans", "inside"), ("body_scans", "inside"), ("body_scans", "body")])
def test_tokens_that_take_part_against_brute_force(fixture, tokens, request):
    scans, cfg = request.getfixturevalue(fixture)
    cfg = dataclasses.replace(cfg, tokens=tokens, token_patch=4)
    shares = []
    for place in range(5):
        sample = data.Slabs(scans, cfg, batch=5, seed=1)[0, place]
        scan = next(s for s in scans if s.id == sample["id"])
        back = np.linalg.inv(sample["H"].numpy())

        def shown(point):
            at = point + sample["start"].numpy()
            inside = all(-0.5 <= v <= n - 0.5 for v, n in zip(at, scan.shape))
            return inside and (tokens == "inside" or scan.body()[tuple(int((v + 0.5) // 8) for v in at)])
        centres = [np.array(cell) * 4 + 1.5 for cell in product(*[range(s // 4) for s in cfg.slab])]
        expected = np.array([[shown(c), shown(back[:3, :3] @ c + back[:3, 3])] for c in centres])
        np.testing.assert_array_equal(np.stack([sample["valid"], sample["valid_"]], 1), expected)
        shares.append(expected.mean(0))
    assert np.min(shares) < 0.5 < np.max(shares) or fixture == "body_scans"     # both kinds were there
    assert tokens == "inside" or np.mean(shares) < 0.7


# ---------------------------------------------------------------------------------------------------------------------
# downstream samples

@pytest.fixture(scope="module")
def labelled_scans(tmp_path_factory):
    """The image's channels are each voxel's own x, y, z and a constant: a crop tells what it shows, and what of it is scan."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for k, size in enumerate(((40, 36, 30), (40, 9, 30), (8, 10, 7))):
        full = np.full(size, 40)
        full[0, 0, 0] = 0                                           # so that the fill is 0
        for c, values in zip("xyzw", (*np.meshgrid(*map(np.arange, size), indexing="ij"), full)):
            nifti(folder / f"{k}_{c}.nii.gz", values.astype(np.float32), np.eye(4))
        blocks = rng.choice([0, 0, 0, 1, 2, 300 if k == 1 else 3], [-(-n // 4) for n in size])
        label = np.kron(blocks, np.ones((4, 4, 4)))[tuple(map(slice, size))].astype(np.int16)
        label[0, 0, 0] = 0
        nifti(folder / f"{k}_l.nii.gz", label, np.eye(4))
        nifti(folder / f"{k}_t.nii.gz", np.clip(label, 0, 20) + 5, np.eye(4))
    cfg = config(folder, image=tuple(f"{{id}}_{c}.nii.gz" for c in "xyzw"), label="{id}_l.nii.gz", target="{id}_t.nii.gz",
                 window=(0.0, 40.0), foreground=-1.0, crop=(16, 12, 10), rotation=(20.0, 20.0, 40.0), shear=0.1,
                 shift=(4.0, 4.0, 4.0), flip=(0.5, 0.5, 0.5), **QUIET)
    cfg.positive, cfg.crops_per_case = 0.5, 2
    return open_scans(cfg), cfg


def test_image_label_and_target_of_a_crop_move_together(labelled_scans):
    scans, cfg = labelled_scans
    crops = data.Crops(scans, cfg, batch=6, seed=0)
    compared = outside = 0
    for step in range(6):
        batch = data.collate([crops[step, place] for place in range(6)])
        image, label, target = data.moved_crops(batch, cfg)
        for b in range(6):
            scan = next(s for s in scans if s.id == batch["id"][b])
            ids, aim = scan.open("label")[0].astype(int), scan.open("target")[0].astype(float)
            *point, share = image[b].numpy() * 40                   # the scan's point that each voxel shows
            point, share = np.stack(point, -1), share / 40
            deep = (share > 0.999) & (point.sum(-1) > 3)
            sure = deep & (np.abs(point - np.floor(point) - 0.5).min(-1) > 0.1)         # which voxel is nearest is not in doubt
            np.testing.assert_array_equal(label[b, 0].numpy()[sure], ids[tuple(np.round(point[sure]).astype(int).T)])
            expected = ndimage.map_coordinates(aim, point[deep].T, order=1, mode="nearest") * 40
            np.testing.assert_allclose(target[b, 0].numpy()[deep] * 40, expected, atol=0.6)     # 40 / 2^11 voxels, a step of 20
            gone = share == 0
            assert not label[b, 0].numpy()[gone].any() and np.allclose(target[b, 0].numpy()[gone], aim.min())
            compared, outside = compared + sure.sum(), outside + gone.sum()
    assert compared > 3000 and outside > 3000


def test_crops_of_a_small_scan_lie_around_its_middle(labelled_scans):
    scans, cfg = labelled_scans
    scan, none = scans[2], (0.0, 0.0, 0.0)                          # 8 x 10 x 7 voxels in crops of 16 x 12 x 10
    start, centre = np.array((-4, -1, -1)), np.array((7.5, 5.5, 4.5))
    for zoom in (0.7, 1.0, 1.3):
        fixed = dataclasses.replace(cfg, rotation=none, scale=(zoom, zoom), shear=0.0, shift=none, flip=(0.0, 1.0, 0.0))
        fixed.positive, fixed.crops_per_case = 1.0, 1
        image, label, target = data.moved_crops(data.collate([data.Crops([scan], fixed, 1, 0)[0, 0]]), fixed)
        H = matvec(np.eye(3), centre) @ matvec(np.diag([zoom, -zoom, zoom])) @ matvec(np.eye(3), -centre - start)
        for found, whole, fill in ((image[0, 1], scan.open()[1], 0), (target[0, 0], scan.open("target")[0], 5 / 40)):
            np.testing.assert_allclose(found, scipy_warp(whole, H, cfg.crop, 1, fill), atol=1e-4)
        assert (label[0, 0].numpy() != scipy_warp(scan.open("label")[0], H, cfg.crop, 0)).mean() < 0.01


def test_a_batch_keeps_large_label_ids_beside_small_ones(labelled_scans):
    scans, cfg = labelled_scans
    assert scans[0].open("label").dtype == np.uint8 and scans[1].open("label").dtype == np.int16
    samples = [data.Crops([scan], cfg, 1, 0)[0, 0] for scan in scans[:2]]
    samples[1]["label"][:] = 300
    batch = data.collate(samples)
    assert batch["label"][1][:, :5, :5, :5].unique().tolist() == [300] and batch["label"].max().item() == 300


@pytest.mark.parametrize("moves", [STILL, dict(rotation=(0.0, 0.0, 15.0), scale=(0.9, 1.1), flip=(0.2, 0.2, 0.2))])
def test_every_positive_crop_shows_the_class_that_was_drawn(scans, moves):
    label = np.zeros((60, 60, 60))
    label[12, 13, 14], label[44:47, 46, 45] = 1, 2                  # farther apart than a crop: it can hold one of them alone
    found, cfg = scans([label], positive=1.0, crops_per_case=1, **moves)
    crops = data.Crops(found, cfg, 1, 0)
    labels = [data.moved_crops(data.collate([crops[step, 0]]), cfg)[1][0, 0] for step in range(60)]
    shown = [set(label.unique().tolist()) - {0} for label in labels]
    assert all(len(ids) == 1 for ids in shown)
    assert 15 < shown.count({1}) < 45                               # each as likely, whatever its size
    if moves is STILL:                                              # the voxel aimed at is the middle one
        assert all({int(label[10, 10, 10])} == ids for label, ids in zip(labels, shown))


def test_the_share_of_positive_crops(scans):
    label = np.zeros((60, 60, 60))
    label[30, 30, 30] = 1
    for share, least, most in ((0.0, 0, 25), (0.5, 40, 80)):        # of 100; by chance a crop shows the middle in 12 %
        found, cfg = scans([label], positive=share, crops_per_case=1, **STILL)
        crops = data.Crops(found, cfg, 1, 0)
        assert least <= sum(bool(crops[step, 0]["label"].any()) for step in range(100)) <= most


def same_item(a, b):
    return a["id"] == b["id"] and all(torch.equal(a[key], b[key]) for key in a if key != "id")


def test_a_crop_depends_on_seed_step_and_place_alone(scans):
    rng = np.random.default_rng(0)
    found, cfg = scans([rng.random((30, 30, 30)) > 0.9 for _ in range(3)], crops_per_case=2)
    places = [(step, place) for step in range(3) for place in range(4)]
    first, second, other = (data.Crops(found, cfg, 4, seed) for seed in (7, 7, 8))
    items = {p: first[p] for p in places}
    assert all(same_item(second[p], items[p]) for p in places[::-1])
    assert not any(same_item(items[a], items[b]) for a, b in combinations(places, 2))
    assert not any(same_item(other[p], items[p]) for p in places)
    for step in range(3):                                           # the two crops of a case
        assert items[step, 0]["id"] == items[step, 1]["id"] and items[step, 2]["id"] == items[step, 3]["id"]
    order = [items[step, place]["id"] for step in range(3) for place in (0, 2)]
    assert sorted(order[:3]) == sorted(order[3:]) == ["0", "1", "2"]    # an epoch visits every case


def test_scans_without_an_object_and_smaller_than_a_crop(scans):
    block = np.zeros((6, 9, 30))
    block[3, 4, 20] = 1
    found, cfg = scans([np.zeros((30, 30, 30)), block], positive=1.0, crops_per_case=1, **STILL)
    crops = data.Crops(found, cfg, 1, 0)
    for step in range(8):
        item = crops[step, 0]
        image, label, _ = data.moved_crops(data.collate([item]), cfg)
        assert image.shape == (1, 1, 20, 20, 20) and label.any() == (item["id"] == "1")
        if item["id"] == "1":                                       # centred; around the scan its least value
            assert label[0, 0, 10, 9, :].any()
            np.testing.assert_allclose(np.delete(image[0, 0].numpy(), np.s_[7:13], 0), -1, atol=1e-6)


@pytest.mark.parametrize("name", ["/home/me/scan", "../../x", "a/b", "..", "C:\\x"])
def test_ids_of_a_datalist_stay_in_their_folder(tmp_path, name):
    nifti(tmp_path / "a.nii.gz", np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(np.int16))
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "id": name}]}))
    before = {p for p in tmp_path.parent.rglob("*") if "cache" not in p.parts}
    cfg = config(tmp_path, datalist="list.json")
    (scan,) = data.open_scans(cfg, say=lambda *_: None)
    assert (tmp_path / f"{scan.id}.nii.gz").resolve().parent == tmp_path.resolve()
    assert Path(scan.stem).resolve().parent == data.cache_folder(cfg).resolve()
    assert {p for p in tmp_path.parent.rglob("*") if "cache" not in p.parts} == before


@pytest.mark.parametrize("entry, text", [
    (3, "has no key 'image', it is 3"), ({"image": []}, "'image' of an entry of 'training' is [], expected a file name"),
    ({"image": 3}, "'image' of an entry of 'training' is 3"), ({"image": ["a", 1]}, "expected a file name or a list of them"),
    ({"image": "a", "id": {}}, "'id' of an entry of 'training' is {}, expected a text or a number"),
    ({"image": "a", "target": 7}, "'target' of an entry of 'training' is 7")])
def test_entries_of_a_datalist_of_another_type(tmp_path, entry, text):
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry]}))
    said = ends(data.find_cases, config(tmp_path, datalist="list.json"))
    assert said.startswith(f"{tmp_path}/list.json: ") and text in said and "\n" not in said
    (tmp_path / "list.json").write_text(json.dumps({"training": 3}))
    assert "no entries under 'training'" in ends(data.find_cases, config(tmp_path, datalist="list.json"))


@pytest.mark.parametrize("factor", [1e13, 60, 1e-4])
def test_voxels_of_no_scan_are_one_unusable_file_among_the_others(tmp_path, factor):
    voxels = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(np.int16)
    nifti(tmp_path / "a.nii.gz", voxels)
    nib.save(nib.Nifti1Image(voxels, np.diag([factor * 2.0] * 3 + [1.0])), tmp_path / "b.nii.gz")
    cfg = config(tmp_path, scans="*.nii.gz", spacing=(2.0, 2.0, 2.0))
    good, reasons = data.fill_cache(data.find_cases(cfg), cfg, lambda *_: None)
    assert [case["id"] for case, *_ in good] == ["a"]
    assert reasons[0].startswith(f"{tmp_path}/b.nii.gz: voxels of ") and "expected 0.01 to 100 mm" in reasons[0]


def test_what_surrounds_a_brain_is_its_most_frequent_value():
    rng = np.random.default_rng(0)
    x = np.zeros((20, 20, 20), np.float32)
    x[5:15, 5:18, 5:18] = rng.uniform(100, 800, (10, 13, 13))
    assert data.volumes.background_of(x) == 0 == data.volumes.background_of(x[5:15, 4:18, 4:18])      # cut to the brain, too
    x[5, 5, 5] = -400                                               # interpolation went below the air
    assert data.volumes.background_of(x) == 0
    noise = rng.normal(50, 9, (20, 20, 20))
    assert data.volumes.background_of(noise) == noise.min()              # not stripped
    bright = np.where(rng.uniform(size=noise.shape) < 0.2, 255, noise)
    assert data.volumes.background_of(bright) == noise.min()             # what is cut off above is no air


def test_what_is_doubtful_of_scans_is_said(tmp_path):
    """Label maps, one grey, no orientation, air in a z-score; and nothing of scans as they should be."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(24, 24, 24)), 2)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    values = dict(ct=3000 * smooth - 1000, pet=20 * smooth, mask=np.round(3 * smooth), mri=2000 * smooth)
    blocks = np.kron(np.arange(1, 65).reshape(4, 4, 4), np.ones((6, 6, 6)))         # 64 organs, and air
    values |= dict(organs=np.where(smooth > 0.4, blocks, 0), bits=np.round(255 * smooth))
    values["cut"] = np.round(255 * np.clip(20 * smooth - 9.5, 0, 1))         # a narrow window: most is one of its ends
    for name, voxels in values.items():
        nifti(tmp_path / f"{name}.nii.gz", voxels.astype(np.float32))
    lost = nib.Nifti1Image(values["ct"].astype(np.float32), None)
    nib.save(lost, tmp_path / "lost.nii.gz")

    def said(*names, **keys):
        lines = []
        data.open_scans(config(tmp_path, scans=tuple(f"{name}.nii.gz" for name in names), **keys), say=lines.append)
        return [line for line in lines if "scans: " in line]
    assert said("ct") == []
    window = "values that hardly fit `window`: are it and `intensity` (by default for HU) of these scans?"
    assert said("pet") == [f"{window}; 1 scans: pet"] and said("mri") == [f"{window}; 1 scans: mri"]
    assert said("pet", intensity="scale", window=(0.0, 5.0)) == said("mri", intensity="zscore", foreground=0.0) == []
    assert said("mri", intensity="scale", window=(0.0, 5.0)) == [f"{window}; 1 scans: mri"]     # 400 times as bright
    assert said("pet", intensity="scale", window=(0.0, 300.0)) == [f"{window}; 1 scans: pet"]
    assert said("pet", intensity="scale", window=(0.0, 100.0)) == []
    assert said("mask", intensity="zscore", zscore_over="volume")[0].startswith("few values, all whole, as of label maps")
    assert said("organs", intensity="zscore", zscore_over="volume")[0].startswith("few values, all whole, as of label maps")
    assert said("bits", intensity="scale", window=(0.0, 255.0)) == said("cut", intensity="scale", window=(0.0, 255.0)) == []
    assert said("mri", intensity="zscore", foreground=-500.0)[0].startswith("all voxels are above `foreground` and count")
    assert said("ct", intensity="zscore", foreground=-500.0) == []
    for name, channel in (("ct", "a"), ("pet", "b")):               # a target in another unit than the image
        nifti(tmp_path / f"1_{channel}.nii.gz", values[name].astype(np.float32))
    assert said(image="{id}_a.nii.gz", target="{id}_b.nii.gz") == [f"{window}; 1 scans: 1"]
    # PET in Bq/ml with noise below 0 under the rule of CT: the values span the window, and most are cut off
    values["becquerels"] = np.where(smooth > 0.4, 20000 * smooth, 1) + 250 * np.random.default_rng(1).normal(size=smooth.shape)
    nifti(tmp_path / "becquerels.nii.gz", values["becquerels"].astype(np.float32))
    assert said("becquerels")[0].startswith("of what is above `foreground` half and more is above `window`")
    assert said("becquerels", intensity="scale", window=(0.0, 20000.0), foreground=0.0) == []
    assert said("lost") == ["orientation unknown (sform_code and qform_code are 0): taken for LAS; 1 scans: lost"]


def header_of(path, sform, pixdim=(1.5, 1.5, 5.0), qform=None):
    """A NIfTI with these axes, (3, 3), whatever they say of each other; the codes are 1 of what is given."""
    image = nib.Nifti1Image(noise(8, 9, 10).astype(np.float32), None)
    image.header["pixdim"][1:4] = pixdim
    if sform is not None:
        image.header.set_sform(nib.affines.from_matvec(sform), code=1)
    if qform is not None:
        image.header.set_qform(nib.affines.from_matvec(qform), code=1)
    nib.save(nib.Nifti1Image(image.dataobj, None, image.header), path)


def test_a_header_that_contradicts_itself_or_says_nothing_is_doubted(tmp_path):
    straight, file = np.diag([1.5, 1.5, 5.0]), tmp_path / "a.nii.gz"
    lean = straight + np.outer([0, 1, 0], [0, 0, 5 * np.tan(np.radians(20))])           # a gantry's tilt in the sform
    oblique = Rotation.from_euler("xyz", [20, 10, 5], degrees=True).as_matrix() @ straight
    for keys, words in ((dict(sform=straight), ""), (dict(sform=oblique, qform=oblique), ""), (dict(sform=None, qform=oblique), ""),
                        (dict(sform=-straight, qform=-straight), ""),
                        (dict(sform=np.eye(3)), "voxel sizes of `pixdim` and of `sform` differ"),
                        (dict(sform=np.diag([-1.5, 1.5, 5.0]), qform=straight), "mirror images of each other"),
                        (dict(sform=lean, pixdim=(1.5, 1.5, 5 / np.cos(np.radians(20)))), "axes not at right angles")):
        header_of(file, **keys)
        said = data.volumes.header_doubts(file)
        assert len(said) == bool(words) and words in "".join(said), (keys, said)
    lines, cfg = [], config(tmp_path, scans="a.nii.gz", intensity="zscore", zscore_over="volume")
    data.open_scans(cfg, say=lines.append)
    assert any(line.startswith("axes not at right angles") and line.endswith("1 scans: a") for line in lines)


DIRECTIONS = "space directions: (1,0,0) (0,1,0) (0,0,2)"


@pytest.mark.parametrize("ending, lines, unknown", [
    ("nrrd", ["space: left-posterior-superior", DIRECTIONS], []), ("nrrd", ["space: RAS", DIRECTIONS], []),
    ("nrrd", ["space: scanner-xyz", DIRECTIONS], ["orientation"]), ("nrrd", ["spacings: 1 1 2"], ["orientation"]),
    ("nrrd", [], ["orientation", "voxel"]), ("mha", ["TransformMatrix = 1 0 0 0 1 0 0 0 1", "ElementSpacing = 1 1 2"], []),
    ("mha", ["ElementSpacing = 1 1 2"], ["orientation"]), ("mha", [], ["orientation", "voxel"])])
def test_headers_of_other_formats_that_say_nothing_are_doubted(tmp_path, ending, lines, unknown):
    pytest.importorskip("SimpleITK")
    before, after = {"nrrd": (["NRRD0004", "type: float", "dimension: 3"], ["sizes: 8 7 6", "endian: little", "encoding: raw", ""]),
                     "mha": (["NDims = 3"], ["DimSize = 8 7 6", "ElementType = MET_FLOAT", "ElementDataFile = LOCAL"])}[ending]
    file = tmp_path / f"a.{ending}"
    file.write_bytes("\n".join([*before, *lines, *after, ""]).encode() + noise(6, 7, 8).astype(np.float32).tobytes())
    assert [said.split()[0] for said in data.volumes.header_doubts(file)] == unknown
    assert data.read_volume(file)[0].shape == (8, 7, 6)


@pytest.mark.parametrize("rules, text", [
    ({"*": {"spacing": 2.0}}, "rules: spacing = 2.0 is float, expected tuple"),
    ({"*": {"window": (1,)}}, "rules: window = (1,), expected 2 numbers like"),
    ({"*": {"foreground": "0"}}, "rules: foreground = '0' is str, expected float"),
    ({"*": {"crop_foreground": "False"}}, "rules: crop_foreground = 'False' is str, expected bool"),
    ({1: {}}, "rules = {1: {}}: expected {pattern of ids: {key: value}}")])
def test_rules_are_checked_as_keys_are(tmp_path, rules, text):
    nifti(tmp_path / "a.nii.gz", noise(12, 12, 12))
    said = ends(open_scans, config(tmp_path, scans="*.nii.gz", rules=rules))
    assert said.startswith(text) and "\n" not in said


def test_a_root_that_is_not_there_is_named(tmp_path):
    said = ends(open_scans, config(tmp_path / "nowhere", scans="*.nii.gz"))
    assert said.startswith(f"data = '{tmp_path}/nowhere': no such folder; give --data=..")


def test_exclude_leaves_somebody(tmp_path):
    nifti(tmp_path / "a.nii.gz", noise(12, 12, 12))
    assert ends(open_scans, config(tmp_path, scans="*.nii.gz", exclude="*")) == "exclude = '*' leaves none of the 1 cases"


def test_a_subject_keeps_its_number_when_others_come(tmp_path):
    for name in "bcd":
        nifti(tmp_path / f"{name}.nii.gz", noise(20, 20, 20, seed=ord(name)))
    numbers = {}
    for _ in range(2):
        cfg = config(tmp_path, scans="*.nii.gz")
        scans = open_scans(cfg)
        slabs = data.Slabs(scans, cfg, len(scans), 0)
        order = [data.nth_scan(scans, 0, k).subject for k in range(len(scans))]
        for name, number in zip(order, slabs.subjects(0).tolist()):
            assert numbers.setdefault(name, number) == number
        nifti(tmp_path / "a.nii.gz", noise(20, 20, 20))
    assert len(set(numbers.values())) == 4
