"""lab/sarcoma.py: small patients as NIfTI files whose voxels say where they lie; nibabel reads them back."""
import itertools
import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import HERE, nifti
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio

from lab import sarcoma

REAL = os.environ.get("S2DC_REAL_DATA")
NAMES = {"ct": "CT", "t1": "MR_T1", "pet": "PET"}
SPACING = {"ct": (4, 4, 8), "t1": (4, 4, 8), "pet": (6, 6, 8)}
NAMED = [number for numbers in sarcoma.PARTS.values() for number in numbers]
PATIENTS = sorted({*NAMED, "002", "006", "009", "010"})
WRITTEN = sorted({*PATIENTS} - {*sarcoma.PARTS["reserved"]})
LACKS = {"006": ["ct"], "009": ["ct", "t1"]}            # as in the public part: not every scan is there


def worth(modality, mm):
    """The value of a modality at points (.., 3) mm: linear, so that linear interpolation is exact."""
    return mm @ {"ct": (3, 1, 2), "t1": (-1, 2, 5), "pet": (1, 1, 1)}[modality]


def places(shape, affine):
    """(.., 3) mm of every voxel centre."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def lay_patient(root, number):
    """A tumour of three half axes somewhere, in scans that end about 5 cm around it, T1 nearer."""
    rng = np.random.default_rng(1000 + int(number))
    centre, radii = rng.uniform(-40, 40, 3), rng.uniform(14, 26, 3)
    for modality in set(NAMES) - {*LACKS.get(number, ())}:
        spacing = np.array(SPACING[modality])
        rim = rng.uniform(10, 50, (2, 3)) if modality == "t1" else np.full((2, 3), 50.0)
        low = np.floor((centre - radii - rim[0]) / spacing)
        shape = (np.ceil((centre + radii + rim[1]) / spacing) - low + 1).astype(int)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = low * spacing
        mm = places(shape, affine)
        axes = "LPS" if int(number) % 5 else "PSR"
        folder = root / f"STS_{number}"
        nifti(folder / f"{NAMES[modality]}_image.nii.gz", worth(modality, mm), affine, axes, np.float32)
        mask = (((mm - centre) / radii) ** 2).sum(-1) <= 1
        nifti(folder / f"{NAMES[modality]}_mask.nii.gz", mask, affine, axes, np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clone, reserved patients in it."""
    clone = tmp_path_factory.mktemp("data_sets")
    for number in PATIENTS:
        lay_patient(clone / "ibsi_validation/nifti", number)
    return clone


@pytest.fixture(scope="module")
def ran(source, tmp_path_factory):
    """(what was written, what was printed); for once T1 and CT fit without a look at them."""
    out, lines = tmp_path_factory.mktemp("data") / "sarcoma", []

    def say(*words, sep=" ", **_):
        lines.append(sep.join(map(str, words)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sarcoma, "print", say, raising=False)
        patch.setattr(sarcoma, "fit", lambda t1, ct: dict(fits=True, why=""))
        sarcoma.main([str(source), str(out)])
    return out, "\n".join(lines)


def test_scans_that_the_tables_lack_are_left_out_of_a_larger_copy(source, tmp_path, monkeypatch):
    """As the public copy is: 009 has all three scans there."""
    for folder in (source / "ibsi_validation/nifti").iterdir():
        if folder.name != "STS_009":
            (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.delitem(LACKS, "009")
    lay_patient(tmp_path, "009")
    plain, larger = sarcoma.read_all(tmp_path), sarcoma.read_all(tmp_path, everything=True)
    assert {*plain["009"]} == {"pet"} and {*larger["009"]} == {"ct", "t1", "pet"}
    assert all({*plain[number]} == {*larger[number]} for number in plain if number != "009")
    assert not [n for numbers in sarcoma.LEFT_OUT.values() for n in numbers if sarcoma.part(n) != "train"]


def load(path):
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


@pytest.fixture(scope="module")
def pairs(source, ran):
    """(number, modality, source's image and mask, written image and mask), each with its affine."""
    found = []
    for number, modality in itertools.product(WRITTEN, NAMES):
        if modality not in LACKS.get(number, ()):
            name = f"ibsi_validation/nifti/STS_{number}/{NAMES[modality]}"
            paths = [source / f"{name}_image.nii.gz", source / f"{name}_mask.nii.gz",
                     *sarcoma.paths(ran[0], modality, number)]
            found.append((number, modality, *map(load, paths)))
    return found


# ---- the split

def test_the_lists_name_every_written_scan_once_and_no_reserved_patient(ran):
    out, said = ran
    assert len(NAMED) == len(set(NAMED)) == 27 and len(sarcoma.PARTS["test"]) == 14
    assert [sarcoma.part(n) for n in ("001", "003", "005", "002")] == ["test", "val", "reserved", "train"]
    split = json.loads((out / "split.json").read_text())
    parts = [split[name] for name in ("train", "val", "test")]
    assert sorted(sum(parts, [])) == [f"sts_{number}" for number in WRITTEN]
    assert split["train"] == ["sts_002", "sts_006", "sts_009", "sts_010"] and len(split["reserved"]) == 10
    assert not [path for path in out.rglob("sts_*") if path.name[4:7] in sarcoma.PARTS["reserved"]]
    for modality, count in (("ct", 2), ("t1", 3), ("pet", 4)):
        content, named = json.loads((out / modality / "dataset.json").read_text()), []
        for name, ids in zip(("training", "validation", "test"), parts):
            for entry in content[name]:
                image, label = (out / modality / entry[kind] for kind in ("image", "label"))
                assert image.is_file() and label.is_file() and image.name == label.name
                assert image.name[:7] in ids
                named.append(image.name)
        assert sorted(named) == sorted(path.name for path in (out / modality / "imagesTr").iterdir())
        assert content["numTraining"] == count and content["labels"] == {"0": "background", "1": "tumour"}
        assert f"{count} train   3 val  14 test" in said
    assert "not in RESULTS.md's tables, left out: ct of 007 009 011" in said
    assert "reserved, nowhere used: 005 014" in said and "missing modality: 006 009" in said


# ---- trimming

def test_margins_follow_from_the_number_alone():
    drawn = np.array([sarcoma.margins(f"{n:03d}") for n in range(1, 52)])
    assert drawn.shape == (51, 2, 3) and drawn.min() >= 0 and drawn.max() <= 50
    assert len(np.unique(drawn)) == drawn.size and abs(drawn.mean() - 25) < 3
    np.testing.assert_allclose(drawn[0], [[25.5911, 47.5232, 7.2080], [47.4325, 15.5916, 21.1663]], atol=1e-4)


def marked(mask, affine):
    """(n, 3) mm of the voxels of a mask."""
    return np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]


def points(mm):
    return {*map(tuple, mm.round(2))}


def test_every_modality_of_a_patient_is_cut_to_one_box(pairs):
    """By brute force over voxel centres: the tumour's edges in any modality, 5 cm more, less margins."""
    for number in WRITTEN:
        mine, edges = [pair[1:] for pair in pairs if pair[0] == number], []
        for _, _, (mask, affine), *_ in mine:
            corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) @ affine[:3, :3].T
            edges += [marked(mask, affine) + corner for corner in corners]
        edges, margins = np.concatenate(edges), sarcoma.margins(number)
        low, high = edges.min(0) - 50 + margins[0], edges.max(0) + 50 - margins[1]
        for modality, (image, affine), _, (small, small_affine), _ in mine:
            mm, kept = places(image.shape, affine), places(small.shape, small_affine)
            inside = ((mm >= low) & (mm <= high)).all(-1)
            assert points(mm[inside]) == points(kept.reshape(-1, 3)), (number, modality)
    assert sum(pair[2][0].size for pair in pairs) > 1.5 * sum(pair[4][0].size for pair in pairs)


def test_the_tumour_is_never_cut_and_every_voxel_stays_where_it_was(pairs, ran):
    for _, modality, _, (mask, affine), (small, small_affine), (label, label_affine) in pairs:
        assert label.dtype == np.uint8 and set(np.unique(label)) == {0, 1} and small.dtype == np.float32
        np.testing.assert_allclose(small, worth(modality, places(small.shape, small_affine)), atol=1e-3)
        assert np.array_equal(small_affine, label_affine) and small.shape == label.shape
        assert nib.aff2axcodes(small_affine) == nib.aff2axcodes(affine)
        assert points(marked(mask, affine)) == points(marked(label, label_affine))
    header = nib.load(ran[0] / "pet/imagesTr/sts_001.nii.gz").header        # scanner coordinates, both ways
    assert header["sform_code"] == header["qform_code"] == 1 and header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-4)


def test_an_oblique_scan_keeps_all_of_the_box_and_its_place():
    turn = np.eye(4)
    turn[:3, :3] = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ np.diag([3, -3, 4])
    turn[:3, 3] = 11, -7, 5
    mm = places((40, 40, 30), turn)
    mask = np.linalg.norm(mm - mm[20, 20, 15], axis=-1) < 20
    scan = sarcoma.Scan(worth("ct", mm), mask, turn)
    box = sarcoma.world_box("007", {"ct": scan})
    small = sarcoma.trim(scan, box)
    at = places(small.mask.shape, small.affine)
    np.testing.assert_allclose(small.voxels, worth("ct", at), atol=1e-9)
    assert small.mask.sum() == mask.sum() and small.mask.size < mask.size
    inside, before = (((p >= box[0]) & (p <= box[1])).all(-1).sum() for p in (at, mm))
    assert inside == before > 0


# ---- several modalities

def test_multi_lies_on_the_grid_of_t1(source, ran):
    out, _ = ran
    numbers = {*WRITTEN} - {*LACKS}
    names = {f"sts_{n}_{name}.nii.gz" for n in numbers for name in (*NAMES, "label")}
    assert {path.name for path in (out / "multi").iterdir()} == names
    for number in numbers:
        files = {name: load(out / f"multi/sts_{number}_{name}.nii.gz") for name in (*NAMES, "label")}
        (t1, grid), (label, _) = map(load, sarcoma.paths(out, "t1", number))
        mm = places(t1.shape, grid)
        assert all(np.array_equal(affine, grid) for _, affine in files.values())
        assert np.array_equal(files["t1"][0], t1) and np.array_equal(files["label"][0], label)
        for name in ("ct", "pet"):
            whole, own = load(source / f"ibsi_validation/nifti/STS_{number}/{NAMES[name]}_image.nii.gz")
            at = (mm - own[:3, 3]) @ np.linalg.inv(own[:3, :3]).T
            there = ((at > -1e-6) & (at < np.array(whole.shape) - 1 + 1e-6)).all(-1)
            wanted = np.where(there, worth(name, mm), whole.min())
            np.testing.assert_allclose(files[name][0], wanted, atol=0.05)


def test_outside_of_a_scan_is_its_fill_and_header_rounding_loses_no_border():
    grid = np.diag([2.0, 2.0, 4.0, 1.0])
    volume = worth("ct", places((6, 6, 5), grid)).astype(np.float32)
    for rounding in (-2e-5, 2e-5):
        moved = grid.copy()
        moved[:3, 3] = np.array([-4, 0, 4]) + rounding
        found = sarcoma.onto(volume, grid, sarcoma.Scan(None, np.zeros((8, 6, 5), bool), moved), 1, -9.0)
        mm = places((8, 6, 5), moved)
        there = ((mm > -0.1) & (mm < np.array([10, 10, 16]) + 0.1)).all(-1)
        np.testing.assert_allclose(found, np.where(there, worth("ct", mm), -9), atol=1e-2)
        assert there.sum() == 6 * 6 * 4


def test_a_pair_of_t1_and_ct_lies_on_one_lattice(ran):
    out, _ = ran
    assert len(list((out / "t1_ct").iterdir())) == 2 * 19
    for t1 in (out / "t1_ct").glob("*_t1.nii.gz"):
        (a, grid), (b, other) = load(t1), load(str(t1).replace("_t1.nii", "_ct.nii"))
        assert np.array_equal(grid, other) and a.shape == b.shape and a.size > 500
        np.testing.assert_allclose(a, worth("t1", places(a.shape, grid)), atol=1e-3)
        np.testing.assert_allclose(b, worth("ct", places(b.shape, grid)), atol=1e-3)


def anatomy(shift):
    """T1 and CT of one random field, T1 with another contrast; what T1 shows lies `shift` voxels too far."""
    field = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(70, 70, 24)), (3, 3, 1))
    field = field / field.std()
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    moved = np.roll(field, shift, (0, 1, 2))[15:55, 15:55, 4:20]
    ct = sarcoma.Scan(80 * field, field > 3, affine)
    at = affine @ np.array([[1, 0, 0, 15], [0, 1, 0, 15], [0, 0, 1, 4], [0, 0, 0, 1]])
    return sarcoma.Scan(600 - 200 * np.tanh(moved), moved > 3, at), ct


@pytest.mark.parametrize("shift, fits, why", [
    ((0, 0, 0), True, "0.0 mm apart"), ((1, -1, 1), True, "3.3 mm apart"),
    ((3, -2, 0), False, "3.6 mm apart"), ((10, 0, 0), False, "at least 10.0 mm apart")])
def test_how_far_t1_has_to_be_moved(shift, fits, why):
    found = sarcoma.fit(*anatomy(shift))
    assert (found["fits"], found["why"]) == (fits, why)
    assert np.array_equal(found["shift_voxels"], -np.array(shift))


def test_what_cannot_be_compared_is_said():
    t1, ct = anatomy((0, 0, 0))
    small = sarcoma.cut(t1, (0, 0, 0), (9, 7, 9))
    t1.affine[0, 3] += 0.4
    assert sarcoma.fit(t1, ct) == dict(fits=False, why="not on one lattice")
    assert sarcoma.fit(small, ct) == dict(fits=False, why="too little in common")


def test_masks_are_compared_in_the_world():
    mask = np.zeros((20, 20, 20), bool)
    mask[5:10, 5:10, 5:10] = True
    grid, moved = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    moved[0, 3] = 2.0                                   # a voxel aside: 4 of 5 slices in common
    scans = {"t1": sarcoma.Scan(None, mask, grid), "ct": sarcoma.Scan(None, mask, moved)}
    fine = sarcoma.Scan(None, mask.repeat(2, 0).repeat(2, 1).repeat(2, 2), np.diag([1.0, 1, 1, 1]))
    fine.affine[:3, 3] = -0.5
    assert sarcoma.agreement(scans | {"pet": fine}) == pytest.approx(dict(t1_ct=0.8, t1_pet=1.0, ct_pet=0.8))


# ---- floors

def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def in_ellipsoid(shape, spacing, less):
    """Voxel by voxel."""
    mask, half = np.zeros(shape, bool), np.array(shape) * spacing / 2
    for index in np.ndindex(*shape):
        mm = (np.array(index) + 0.5) * spacing - half
        mask[index] = (half > less).all() and ((mm / (half - less)) ** 2).sum() <= 1
    return mask


def stretched(volume, shape):
    """Linear interpolation axis by axis at cell centres, the border held."""
    for axis, n in enumerate(shape):
        at = (np.arange(n) + 0.5) / n * volume.shape[axis] - 0.5
        volume = np.apply_along_axis(lambda line: np.interp(at, np.arange(len(line)), line), axis, volume)
    return volume


@pytest.mark.parametrize("less", [0, 3, 11.9, 12])
def test_ellipsoid_voxel_by_voxel_and_nothing_where_no_box_is_left(less):
    scan = sarcoma.Scan(None, np.zeros((9, 8, 6), bool), np.diag([-3.0, 4.0, 4.0, 1]))      # 27 x 32 x 24 mm
    found = sarcoma.ellipsoid(scan, less, None)
    assert np.array_equal(found, in_ellipsoid((9, 8, 6), (3, 4, 4), less)) and found.any() == (less < 11)


def test_the_floors_of_the_written_files_by_brute_force(pairs, ran):
    floors = json.loads((ran[0] / "floors.json").read_text())
    for modality in NAMES:
        cases = {"train": [], "test": [], "val": []}
        for number, name, _, _, (voxels, affine), (label, _) in pairs:
            if name == modality:
                spacing = np.linalg.norm(affine[:3, :3], axis=0)
                cases[sarcoma.part(number)].append((voxels, label > 0, spacing))
        mean = np.mean([stretched(mask.astype(float), (32, 32, 32)) for _, mask, _ in cases["train"]], 0)
        ways = {"ellipsoid in the box less 50 mm": (lambda v, m, s, k: in_ellipsoid(m.shape, s, k), [50.0]),
                "mean training mask from": (lambda v, m, s, k: stretched(mean, m.shape) >= k,
                                            np.arange(0.05, 0.96, 0.05)),
                "SUV from": (lambda v, m, s, k: v >= k, np.arange(0.25, 20.1, 0.25)),
                "share of maximum from": (lambda v, m, s, k: v / v.max() >= k, np.arange(0.02, 0.99, 0.02))}
        rows = {row["floor"]: row for row in floors[modality]}
        assert len(rows) == (7 if modality == "pet" else 3) and {row["n"] for row in rows.values()} == {14}
        for name in [name for name in ways if name in rows]:
            (predict, values), row = ways[name], rows[name]
            scores = [np.mean([dice(predict(*case, k), case[1]) for case in cases["train"]]) for k in values]
            chosen = np.argmin(abs(values - np.array(row["value"])))
            assert scores[chosen] == pytest.approx(max(scores), abs=1e-6)
            test = [dice(predict(*case, row["value"]), case[1]) for case in cases["test"]]
            assert row["dice"] == pytest.approx(np.mean(test), abs=1e-3)
            assert list(row["each"].values()) == pytest.approx(test, abs=1e-2)
            assert f"{name:44}{row['value']:13g}{row['dice']:11.3f}" in ran[1]


def test_thresholds_take_the_value_or_a_share_of_the_maximum_and_the_largest_part():
    voxels = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(14, 13, 12)), 1)
    scan = sarcoma.Scan(voxels, None, None)
    for value in (0.1, 0.3, 0.5):
        whole = voxels >= value * voxels.max()
        assert np.array_equal(sarcoma.above(scan, value, None, share=True), whole)
        one = sarcoma.above(scan, value * voxels.max(), None, largest=True)
        parts, count = ndimage.label(whole)
        assert count > 1 and one.sum() == max(np.bincount(parts.ravel())[1:]) < whole.sum()
        assert ndimage.label(one)[1] == 1 and not (one & ~whole).any()
    assert not sarcoma.above(scan, 99.0, None, largest=True).any()


def test_what_a_curve_from_t1_to_ct_scores_voxel_by_voxel(ran):
    """Bins filled one voxel at a time; PSNR is scikit-image's."""
    out, said = ran

    def tissue(number):
        t1, ct = (np.clip(load(out / f"t1_ct/sts_{number}_{m}.nii.gz")[0], -250, 1250) for m in ("t1", "ct"))
        return [(a, b) for a, b in zip(t1.ravel().tolist(), ct.ravel().tolist()) if b > -235]
    test = ("024", "026", "042", "048")         # of configs/sarcoma_t1_ct.py, to which all others are to learn
    train = sum([tissue(n) for n in WRITTEN if n not in (*test, *LACKS)], [])
    test = [tissue(n) for n in test]
    rows = {row["floor"]: row for row in json.loads((out / "floors.json").read_text())["t1_ct"]}
    assert len(rows) == 4
    for name, middle in (("mean", np.mean), ("median", np.median)):
        for n, words in ((1, "for all"), (64, "in each of 64 bins of T1")):
            bins = {}
            for t1, ct in train:
                bins.setdefault(min(int((t1 + 250) / 1500 * n), n - 1), []).append(ct)
            whole, curve = middle([ct for _, ct in train]), {k: middle(values) for k, values in bins.items()}
            each = []
            for case in test:
                told = np.array([curve.get(min(int((t1 + 250) / 1500 * n), n - 1), whole) for t1, _ in case])
                ct = np.array([ct for _, ct in case])
                each.append((abs(told - ct).mean(), peak_signal_noise_ratio(ct, told, data_range=1500)))
            row = rows[f"{name} HU {words}"]
            assert (row["mae"], row["psnr"]) == pytest.approx(tuple(np.mean(each, 0)), rel=1e-4)
            assert row["n"] == 4 and f"{name} HU {words}" in said
    assert rows["median HU in each of 64 bins of T1"]["mae"] < rows["median HU for all"]["mae"]


# ---- files

def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_writes_equal_bytes_and_a_stray_file_is_named(source, ran, tmp_path, monkeypatch):
    before, out = contents(ran[0]), tmp_path / "out"
    shutil.copytree(ran[0], out)
    monkeypatch.setattr(sarcoma, "fit", lambda t1, ct: dict(fits=True, why=""))
    sarcoma.main([str(source / "ibsi_validation"), str(out)])           # the other way to name the source
    assert contents(out) == before and not [name for name in before if name.suffix == ".tmp"]
    stray = out / "pet/imagesTr/sts_077.nii.gz"
    stray.write_bytes(b"")
    monkeypatch.setattr(sarcoma, "write_floors", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        sarcoma.main([str(source), str(out)])
    assert str(caught.value) == f"{stray} and 0 more are of another run; remove them"


@pytest.mark.parametrize("file, change, words", [
    ("PET_image", "truncated", "damaged"), ("PET_mask", "removed", "no such file"),
    ("PET_mask", (1, 6), "lies on another grid"), ("PET_mask", (2, 0), "expected voxels of 0 and of 1"),
    ("PET_mask", (0, 0), "expected voxels of 0 and of 1")])
def test_an_unusable_file_is_one_line_and_nothing_is_written(source, tmp_path, file, change, words):
    shutil.copytree(source, tmp_path / "clone")
    folder = tmp_path / "clone/ibsi_validation/nifti"
    path = folder / f"STS_010/{file}.nii.gz"
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif change == "removed":
        path.unlink()
    else:                                               # voxels times the first, moved by the second
        voxels, affine = load(path)
        affine[0, 3] += change[1]
        nib.save(nib.Nifti1Image(voxels * np.uint8(change[0]), affine), path)
    for kind in ("image", "mask"):                      # a test patient may not lack a modality
        (folder / f"STS_001/CT_{kind}.nii.gz").unlink()
    with pytest.raises(SystemExit) as caught:
        sarcoma.main([str(tmp_path / "clone"), str(tmp_path / "out")])
    ct, pet, count = str(caught.value).split("\n")
    assert ct == f"{folder / 'STS_001/CT_image.nii.gz'}: no such file"
    assert pet.startswith(f"{path}: ") and words in pet and not (tmp_path / "out").exists()
    assert count == "2 missing or unusable; nothing was written"


def test_without_training_scans_there_are_no_floors(source, tmp_path):
    for number in (*sarcoma.PARTS["test"], *sarcoma.PARTS["val"], "006"):
        (tmp_path / f"STS_{number}").symlink_to(source / f"ibsi_validation/nifti/STS_{number}")
    with pytest.raises(SystemExit) as caught:
        sarcoma.main([str(tmp_path), str(tmp_path / "out")])
    assert str(caught.value).split("\n")[0] == f"{tmp_path}: no usable CT_image of a training patient"


def test_the_program_ends_with_1_and_one_line_where_there_is_no_clone(tmp_path):
    command = [sys.executable, "-m", "lab.sarcoma", str(tmp_path), "out"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    text = f"{tmp_path}: no STS_*/ in {tmp_path}/ibsi_validation/nifti, {tmp_path}/nifti, "
    assert done.stderr.startswith(text)


@pytest.mark.skipif(not REAL, reason="S2DC_REAL_DATA is not set")
def test_the_real_scans():
    patients = sarcoma.read_all(sarcoma.source_folder(REAL))
    counts = {m: [sum(m in s and sarcoma.part(n) == p for n, s in patients.items())
                  for p in ("train", "val", "test")] for m in NAMES}
    assert all(count[1:] == [3, 14] for count in counts.values())
    if len(patients) == 41:                             # those that the sample volumes hold
        assert counts == dict(ct=[12, 3, 14], t1=[22, 3, 14], pet=[24, 3, 14])
    for modality, known in (("ct", 0.70), ("t1", 0.25), ("pet", 0.66)):         # the data's own notes
        tested = [patients[n][modality] for n in sarcoma.PARTS["test"]]
        floor = np.mean([dice(sarcoma.ellipsoid(s, 50, None), s.mask) for s in tested])
        assert floor == pytest.approx(known, abs=0.01)
    for number, scans in patients.items():
        box = sarcoma.world_box(number, scans)
        for scan in scans.values():
            small = sarcoma.trim(scan, box)
            assert small.mask.sum() == scan.mask.sum() and min(small.mask.shape) > 5
    assert sarcoma.fit(patients["048"]["t1"], patients["048"]["ct"])["fits"]
    assert not sarcoma.fit(patients["036"]["t1"], patients["036"]["ct"])["fits"]
