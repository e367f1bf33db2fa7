"""lab/phantom.py: one anatomy in every modality, by the seed alone, and the files of it, read by nibabel."""
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from conftest import HERE
from scipy import ndimage, stats

from lab import phantom as ph
from lab.phantom import ID, phantom, write

PROGRAM = [sys.executable, "-m", "lab.phantom"]


@pytest.fixture(scope="module")
def cts():
    """Six subjects at the usual size; classes and lesions of every kind are among them."""
    return [phantom(seed, "ct") for seed in range(6)]


def inner(d, organ):
    """Where an organ is without its rim, where neighbours mix in."""
    return ndimage.binary_erosion(d["label"] == ID[organ])


def centre(d, organ):
    """Centre of an organ in mm, by the affine."""
    return d["affine"][:3] @ [*np.argwhere(d["label"] == ID[organ]).mean(0), 1]


# ---- the subject

def test_a_box_leaves_out_no_voxel_that_shows_it():
    """Every voxel whose anatomical place lies between the corners; and not just the whole grid."""
    s, turned = ph.Subject(11, (48, 40, 56)), ph.Subject(11, (48, 40, 56))
    # a strong turn without displacement: no slack hides an error
    turned.matrix = ph.Rotation.from_euler("xyz", (20, -15, 40), degrees=True).as_matrix() * 0.8
    turned.reach, places = 0.0, np.stack(np.meshgrid(*turned.grid, indexing="ij"))
    turned.p = np.einsum("ij,jxyz->ixyz", turned.matrix, places) + turned.shift[:, None, None, None]
    for subject in (s, turned):
        for low, high in (((-60, -30, 20), (-20, 40, 60)), ((10, -40, -90), (30, -10, -50))):
            within = np.all([(a <= p) & (p <= b) for p, a, b in zip(subject.p, low, high)], axis=0)
            box = subject.box(low, high)
            assert within.any() and within[box].size < 0.6 * within.size
            within[box] = False
            assert not within.any()


def test_same_arguments_same_arrays():
    a, b, other = phantom(3, "mri", 32), phantom(3, "mri", 32), phantom(4, "mri", 32)
    assert all(np.array_equal(image, b["images"][name]) for name, image in a["images"].items())
    assert np.array_equal(a["label"], b["label"]) and not np.array_equal(a["label"], other["label"])
    assert all(v.dtype == np.float32 and v.shape == (32, 32, 32) for v in a["images"].values())
    assert a["label"].dtype == a["lesion"].dtype == np.uint8


def test_modalities_show_one_anatomy():
    ct, mri, pet = (phantom(1, m, 40) for m in ("ct", "mri", "pet"))
    for d in (mri, pet):
        assert all(np.array_equal(ct[key], d[key]) for key in ("label", "lesion", "class", "affine"))
    assert [*ct["images"], *mri["images"], *pet["images"]] == "ct t1 t2 t1ce flair full low".split()


def test_anatomy_in_mm_does_not_depend_on_the_size(cts):
    for size in (64, (80, 64, 72)):
        d = phantom(0, "ct", size)
        assert np.allclose(d["spacing"] * d["label"].shape, ph.FOV)
        middle = (np.array(d["label"].shape) - 1) / 2
        assert np.allclose(d["affine"] @ [*middle, 1], [0, 0, 0, 1])
        assert np.allclose(np.diag(d["affine"])[:3], d["spacing"])
        for organ in ("liver", "spleen", "kidney_left", "stomach", "aorta"):
            litres = [(x["label"] == ID[organ]).sum() * x["spacing"].prod() / 1e6 for x in (d, cts[0])]
            assert litres[0] == pytest.approx(litres[1], rel=0.08)
            assert np.linalg.norm(centre(d, organ) - centre(cts[0], organ)) < 2


def test_every_organ_lies_where_it_does_in_a_patient(cts):
    for d in cts:
        count = np.bincount(d["label"].ravel(), minlength=14)
        assert len(count) == 14 and (count[1:] >= 30).all(), count
        at = {organ: centre(d, organ) for organ in ID}
        for right, left in (("kidney_right", "kidney_left"), ("liver", "spleen"), ("gallbladder", "stomach"),
                            ("inferior_vena_cava", "aorta"), ("adrenal_gland_right", "adrenal_gland_left")):
            assert at[right][0] > at[left][0]                                   # x to the patient's right
        assert at["gallbladder"][1] > at["liver"][1] > at["kidney_right"][1]    # y to the front
        assert at["esophagus"][2] > at["spleen"][2] > at["kidney_left"][2]      # z to the head


def test_lesions_lie_in_one_organ_and_show_in_every_modality():
    for seed in [s for s in range(30) if ph.diagnosis(s)[1]][:3]:
        for modality, names in ph.IMAGES.items():
            d = phantom(seed, modality, 64)
            ill, (organ,) = d["lesion"] == 1, np.unique(d["label"][d["lesion"] == 1])
            well = (d["label"] == organ) & ~ndimage.binary_dilation(ill, iterations=2)
            assert organ > 0 and ill.sum() >= 8
            for image in d["images"].values():                      # 0 like the organ around it, 1 disjoint
                assert stats.ks_2samp(image[ill], image[well]).statistic > 0.35, (seed, modality)
    healthy = next(s for s in range(30) if not ph.diagnosis(s)[1])
    assert phantom(healthy, "ct", 32)["lesion"].sum() == 0


def test_classes_are_balanced_and_change_organs():
    kinds = [ph.diagnosis(s)[0] for s in range(60)]
    assert np.bincount(kinds).tolist() == [20, 20, 20]
    assert len({tuple(kinds[i:i + 3]) for i in range(0, 60, 3)}) > 3
    assert 15 < sum(ph.diagnosis(s)[1] for s in range(60)) < 45
    sizes = [[], [], []]
    for seed in range(24):
        d = phantom(seed, "ct", 40)
        count = np.bincount(d["label"].ravel(), minlength=14)
        sizes[d["class"]].append((count[1], count[2] + count[3]))
    (spleen, kidneys), (large, same), (usual, small) = (np.median(each, 0) for each in sizes)
    assert large > 1.25 * spleen and large > 1.25 * usual and small < 0.75 * kidneys and small < 0.75 * same


# ---- the scanners

def test_ct_has_the_hounsfield_units_of_its_tissues(cts):
    for d in cts:
        ct = d["images"]["ct"]
        assert ct.min() >= -1024 and 350 < ct.max() < 1500
        assert np.median(ct[:, -4:]) == pytest.approx(-1000, abs=25)            # air before the body
        assert -115 < np.median(ct[(ct > -150) & (ct < -50)]) < -85             # fat
        for organ in ("liver", "spleen", "kidney_left", "pancreas"):
            assert 20 < ct[inner(d, organ)].mean() < 110
        assert abs(ct[inner(d, "gallbladder")].mean()) < 25 and ct[inner(d, "stomach")].min() < -500    # gas


def test_mri_contrasts_and_rician_noise():
    d = phantom(2, "mri", 64)
    organs = {organ: inner(d, organ) for organ in ("liver", "gallbladder", "inferior_vena_cava")}
    mean = {name: [image[mask].mean() for mask in organs.values()] for name, image in d["images"].items()}
    (liver, bile, _), (dim, dark, _) = mean["t2"], mean["flair"]
    assert bile > 2 * liver and dark < dim                                      # fluid bright, suppressed
    liver, bile, vein = np.divide(mean["t1ce"], mean["t1"])
    assert vein > 1.3 * liver > 1.3 * bile
    for image in d["images"].values():          # no signal: Rayleigh, closed form of mean / deviation
        air = image[:, -4:]
        ratio = (np.pi / (4 - np.pi)) ** 0.5
        assert air.min() >= 0 and air.mean() / air.std() == pytest.approx(ratio, rel=0.06)


def test_low_dose_pet_keeps_a_part_of_the_counts():
    """Closed form: mean, variance and covariance with the full counts are m / factor. SUV stays, and given
    the full counts n the low ones stray by n (factor - 1), times the sum of squares of the filter."""
    rng, m, factor = np.random.default_rng(0), 300.0, 50
    full = rng.poisson(m, 400_000)
    low = ph.thin(full, factor, rng)
    assert low.mean() == pytest.approx(m / factor, rel=0.005) and (low <= full).all()
    assert low.var() == pytest.approx(m / factor, rel=0.01)
    assert np.cov(full, low)[0, 1] == pytest.approx(m / factor, rel=0.05)
    d = phantom(5, "pet", 96)
    full, low = d["images"]["full"], d["images"]["low"]
    body = ndimage.binary_erosion(full > 0.3, iterations=3)
    kernel = ndimage.gaussian_filter1d(np.eye(1, 33, 16)[0], 0.8)
    counts = ph.COUNTS * d["spacing"].prod() / 1000 * full[body].mean()
    expected = (kernel ** 2).sum() ** 3 * (ph.DOSE_REDUCTION - 1) * full[body].mean() ** 2 / counts
    assert (low - full)[body].var() == pytest.approx(expected, rel=0.05)
    assert low[body].mean() == pytest.approx(full[body].mean(), rel=0.02) and min(full.min(), low.min()) >= 0
    assert full[d["label"] == ID["liver"]].mean() == pytest.approx(2.3, rel=0.45)


# ---- the files

def read(path):
    """(voxels, affine) in RAS+, the axis codes as stored, and the header."""
    image = nib.load(path)
    ras = nib.as_closest_canonical(image)
    return ras.get_fdata(), ras.affine, "".join(nib.aff2axcodes(image.affine)), image.header


def test_written_ct_reads_back(tmp_path):
    folder = write(tmp_path / "ct", range(4), size=(32, 40, 24))
    for seed, axes in enumerate(("RAS", "LPS", "RAS", "PSR")):
        d = phantom(seed, "ct", (32, 40, 24))
        for sub, want, dtype in (("imagesTr", np.round(d["images"]["ct"]), np.int16),
                                 ("labelsTr", d["label"], np.uint8), ("lesionsTr", d["lesion"], np.uint8)):
            voxels, affine, codes, header = read(folder / sub / f"phantom_{seed:03d}.nii.gz")
            assert np.array_equal(voxels, want) and header.get_data_dtype() == dtype and codes == axes
            np.testing.assert_allclose(affine, d["affine"], atol=1e-4)
    listed, path = json.loads((folder / "dataset.json").read_text()), "Tr/phantom_003.nii.gz"
    assert listed["labels"]["13"] == "adrenal_gland_left" and listed["numTraining"] == 4
    assert listed["training"][3] == {"image": "images" + path, "label": "labels" + path}
    rows = (folder / "participants.csv").read_text().splitlines()
    assert rows[0] == "id,seed,class,lesion" and len(rows) == 5
    assert rows[2] == f"phantom_001,1,{ph.diagnosis(1)[0]},{int(ph.diagnosis(1)[1])}"


def test_written_pet_and_mri_read_back_and_share_a_folder(tmp_path):
    for modality in ("pet", "mri"):
        write(tmp_path, [1], modality, 32)
        for name, image in phantom(1, modality, 32)["images"].items():
            voxels, _, _, header = read(tmp_path / f"imagesTr/phantom_001_{name}.nii.gz")
            want, atol = (image, np.ptp(image) / 2 ** 16) if modality == "pet" else (np.round(image), 0)
            assert header.get_data_dtype() == np.int16
            np.testing.assert_allclose(voxels, want, atol=atol, rtol=0)
    listed = json.loads((tmp_path / "dataset.json").read_text())
    assert listed["modality"] == {"0": "t1", "1": "t2", "2": "t1ce", "3": "flair"}
    assert listed["training"][0]["image"][2] == "imagesTr/phantom_001_t1ce.nii.gz"


def test_only_what_is_missing_or_stale_is_made(tmp_path, monkeypatch, capsys):
    def stamps():
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "imagesTr").iterdir()}
    write(tmp_path, [0, 1], size=16)
    first = stamps()
    (tmp_path / "imagesTr/phantom_001.nii.gz").unlink()
    write(tmp_path, [0, 1, 2], size=16)
    second = stamps()
    assert "phantom_000  ct  already there" in capsys.readouterr().out
    assert second["phantom_000.nii.gz"] == first["phantom_000.nii.gz"] and len(second) == 3
    write(tmp_path, [2], size=17)
    assert nib.load(tmp_path / "imagesTr/phantom_002.nii.gz").shape == (17, 17, 17)
    monkeypatch.setattr(ph, "VERSION", "00000000")
    write(tmp_path, [0], size=16)
    assert stamps()["phantom_000.nii.gz"] > second["phantom_000.nii.gz"]
    # the others are of another version
    assert json.loads((tmp_path / "dataset.json").read_text())["numTraining"] == 1


@pytest.mark.parametrize("content", [b"", b"no scan", None])
def test_a_file_of_another_origin_is_not_overwritten(tmp_path, content):
    path = tmp_path / "imagesTr/phantom_000.nii.gz"
    path.parent.mkdir()
    if content is None:
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="phantom_000.nii.gz: expected a phantom or nothing"):
        write(tmp_path, [0], size=16)
    assert path.read_bytes() == before


def test_processes_write_what_one_writes(tmp_path):
    one = write(tmp_path / "1", range(3), "pet", 24)
    two = write(tmp_path / "2", range(3), "pet", 24, workers=2)
    first, second = ({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
                     for folder in (one, two))
    assert len(first) == 14 and first == second


def test_killed_and_started_again_ends_as_if_uninterrupted(tmp_path):
    command = [*PROGRAM, str(tmp_path / "killed"), "--subjects=12", "--size=32"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
    assert run.stdout.readline().startswith("phantom_000")
    time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=20)                                 # its end: when the last worker is gone, too
    left = list((tmp_path / "killed").rglob("*.nii.gz"))
    assert 3 <= len(left) < 36
    for path in left:
        gzip.decompress(path.read_bytes())                      # raises on a torn stream
        assert nib.load(path).get_fdata().shape == (32, 32, 32)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=HERE)
    whole = write(tmp_path / "whole", range(12), size=32)
    for path in whole.rglob("*.nii.gz"):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(whole)).read_bytes()


def test_program_says_what_it_does_and_refuses_in_one_line(tmp_path):
    def program(*arguments):
        return subprocess.run([*PROGRAM, str(tmp_path), *arguments], capture_output=True, text=True, cwd=HERE,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = program("--subjects=2", "--first=7", "--modality=pet", "--size", "24", "16", "20")
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("phantom_007  pet  class") and last.startswith(f"{tmp_path}: 2 subjects")
    assert "MB" in last and nib.load(tmp_path / "labelsTr/phantom_008.nii.gz").shape == (24, 16, 20)
    assert "give either a FOLDER or --demo" in program("--demo").stderr
    refused = program("--first=-1")
    assert refused.returncode == 1 and "seed: expected" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, text", [
    (dict(seeds=[]), "seeds: expected at least one"), (dict(size=(32, 32)), "size: "),
    (dict(layout="bids"), "layout: expected 'msd', found 'bids'"),
    (dict(seeds=[0, -1]), "seed: expected a whole number from 0 up, found -1"),
    (dict(seeds=[0.5]), "seed: .* found 0.5"), (dict(size=8), "size: .* found 8"),
    (dict(modality="xray"), "modality: expected one of ct, mri, pet, found 'xray'"),
    (dict(size=32.0), "size: .* found 32.0")])
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, arguments, text):
    with pytest.raises(ValueError, match=text):
        write(tmp_path, **dict(seeds=[0]) | arguments)
    assert not list(tmp_path.iterdir())
