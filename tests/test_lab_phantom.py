import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage, stats

from lab import phantom as ph
from lab.phantom import ID, phantom, write

PROGRAM = [sys.executable, "-m", "lab.phantom"]
ROOT = Path(ph.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cts():
    """Six subjects at the usual size; classes and lesions of every kind are among them."""
    return [phantom(seed, "ct") for seed in range(6)]


def inner(d, organ):
    """HU of an organ without its rim, where neighbours mix in."""
    return d["images"]["ct"][ndimage.binary_erosion(d["label"] == ID[organ])]


def centre(d, organ):
    """Centre of an organ in mm, by the affine."""
    return d["affine"][:3] @ [*np.argwhere(d["label"] == ID[organ]).mean(0), 1]


# ---- the geometry, against brute force

def test_field_is_the_same_in_mm_at_every_size():
    """At three times the voxels every third centre is an old centre."""
    coarse = ph.smooth_field(np.random.default_rng(1), 40, (20, 16, 24))
    fine = ph.smooth_field(np.random.default_rng(1), 40, (60, 48, 72))
    np.testing.assert_allclose(fine[1::3, 1::3, 1::3], coarse, atol=1e-5)


def test_field_has_unit_deviation_and_the_length_asked_for():
    fields = np.stack([ph.smooth_field(np.random.default_rng(seed), 30, (32, 32, 32)) for seed in range(30)])   # 9 mm voxels
    assert abs(fields.mean()) < 0.05 and abs(fields.std() - 1) < 0.05
    near, far = ((fields[:, n:] * fields[:, :-n]).mean() for n in (1, 7))        # 9 mm, 63 mm
    assert near > 0.8 and abs(far) < 0.1


def test_tube_is_the_distance_to_a_chain_of_balls():
    p = np.random.default_rng(0).uniform(-20, 20, (3, 6, 6, 6)).astype(np.float32)
    points, radii = np.array([(-9., 0, 3), (4, 8, -2), (9, -7, 0)]), np.float32([2, 5, 1])
    steps = np.linspace(0, 2, 4001)
    at = np.stack([np.interp(steps, range(3), points[:, i]) for i in range(3)], 1)
    to_axis = np.linalg.norm(p.reshape(3, -1).T[:, None] - at, axis=2)
    nearest = to_axis.reshape(-1, 4001)[:, :2001].argmin(1), 2000 + to_axis[:, 2000:].argmin(1)
    brute = np.minimum(*(to_axis[np.arange(216), n] - np.interp(steps[n], range(3), radii) for n in nearest))
    np.testing.assert_allclose(ph.tube(p, points, radii).ravel(), brute, atol=0.02)


def test_ellipsoid_is_a_distance_near_its_surface():
    centre, radii, turn = (3, -2, 5), np.array([12., 20, 30]), (20, -35, 50)
    unit = np.random.default_rng(0).standard_normal((3, 400))
    unit /= np.linalg.norm(unit, axis=0)
    turned = ph.Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    normal = unit / radii[:, None]
    normal /= np.linalg.norm(normal, axis=0)
    for off in (-1.5, 0, 1.5):                                     # mm along the true normal
        p = turned @ (unit * radii[:, None] + off * normal) + np.array(centre)[:, None]
        found = ph.ellipsoid(p.reshape(3, 20, 20, 1).astype(np.float32), centre, radii, turn)
        np.testing.assert_allclose(found.ravel(), off, atol=0.25)


def test_a_box_leaves_out_no_voxel_that_shows_it():
    """Every voxel whose anatomical place lies between the corners is inside, and a box is not just the whole grid."""
    s = ph.Subject(11, (48, 40, 56))
    turned = ph.Subject(11, (48, 40, 56))                          # a strong turn without displacement: no slack hides an error
    turned.matrix, turned.reach = ph.Rotation.from_euler("xyz", (20, -15, 40), degrees=True).as_matrix() * 0.8, 0.0
    turned.p = np.einsum("ij,jxyz->ixyz", turned.matrix, np.stack(np.meshgrid(*turned.grid, indexing="ij")))
    turned.p += turned.shift[:, None, None, None]
    for subject in (s, turned):
        for low, high in (((-60, -30, 20), (-20, 40, 60)), ((10, -40, -90), (30, -10, -50))):
            within = np.all([(a <= p) & (p <= b) for p, a, b in zip(subject.p, low, high)], axis=0)
            box = subject.box(low, high)
            assert within.any() and within[box].size < 0.6 * within.size
            within[box] = False
            assert not within.any()


# ---- the subject

def test_same_arguments_same_arrays():
    a, b, other = phantom(3, "mri", 32), phantom(3, "mri", 32), phantom(4, "mri", 32)
    assert all(np.array_equal(a["images"][k], b["images"][k]) for k in ("t1", "t2", "t1ce", "flair"))
    assert np.array_equal(a["label"], b["label"]) and not np.array_equal(a["label"], other["label"])
    assert all(v.dtype == np.float32 and v.shape == (32, 32, 32) for v in a["images"].values())
    assert a["label"].dtype == a["lesion"].dtype == np.uint8


def test_modalities_show_one_anatomy():
    ct, mri, pet = (phantom(1, m, 40) for m in ("ct", "mri", "pet"))
    for d in (mri, pet):
        assert np.array_equal(ct["label"], d["label"]) and np.array_equal(ct["lesion"], d["lesion"])
        assert ct["class"] == d["class"] and np.array_equal(ct["affine"], d["affine"])
    names = [n for d in (ct, mri, pet) for n in d["images"]]
    assert names == ["ct", "t1", "t2", "t1ce", "flair", "full", "low"]


def test_anatomy_in_mm_does_not_depend_on_the_size(cts):
    for size in (64, (80, 64, 72)):
        d = phantom(0, "ct", size)
        assert np.allclose(d["spacing"] * d["label"].shape, ph.FOV)
        middle = (np.array(d["label"].shape) - 1) / 2
        assert np.allclose(d["affine"] @ [*middle, 1], [0, 0, 0, 1]) and np.allclose(np.diag(d["affine"])[:3], d["spacing"])
        for organ in ("liver", "spleen", "kidney_left", "stomach", "aorta"):
            litres = [(x["label"] == ID[organ]).sum() * x["spacing"].prod() / 1e6 for x in (d, cts[0])]
            assert litres[0] == pytest.approx(litres[1], rel=0.08)
            assert np.linalg.norm(centre(d, organ) - centre(cts[0], organ)) < 2


def test_every_organ_is_there(cts):
    for d in cts:
        count = np.bincount(d["label"].ravel(), minlength=14)
        assert len(count) == 14 and (count[1:] >= 30).all(), count


def test_organs_lie_where_they_do_in_a_patient(cts):
    for d in cts:
        at = {organ: centre(d, organ) for organ in ID}
        for right, left in (("kidney_right", "kidney_left"), ("liver", "spleen"), ("gallbladder", "stomach"),
                            ("inferior_vena_cava", "aorta"), ("adrenal_gland_right", "adrenal_gland_left")):
            assert at[right][0] > at[left][0]                      # RAS+: x grows to the patient's right
        assert at["gallbladder"][1] > at["liver"][1] > at["kidney_right"][1]              # y to the front
        assert at["esophagus"][2] > at["spleen"][2] > at["kidney_left"][2]                # z to the head


def test_kidneys_differ_in_place_alone(cts):
    def apart(a, b):                                               # Kolmogorov-Smirnov distance of the HU, 0 alike, 1 disjoint
        return np.mean([stats.ks_2samp(inner(d, a), inner(d, b)).statistic for d in cts])
    assert apart("kidney_right", "kidney_left") < 0.1
    assert apart("kidney_right", "gallbladder") > 0.6              # the same distance does see another organ
    volumes = [[(d["label"] == ID[k]).sum() for k in ("kidney_right", "kidney_left")] for d in cts]
    assert np.median([a / b for a, b in volumes]) == pytest.approx(1, abs=0.25)


def test_lesions_lie_in_one_organ_and_show_in_every_modality():
    seeds = [s for s in range(30) if ph.diagnosis(s)[1]][:3]
    for seed in seeds:
        for modality, names in ph.IMAGES.items():
            d = phantom(seed, modality, 64)
            ids = np.unique(d["label"][d["lesion"] == 1])
            assert len(ids) == 1 and ids[0] > 0 and d["lesion"].sum() >= 8
            ill, well = d["lesion"] == 1, (d["label"] == ids[0]) & ~ndimage.binary_dilation(d["lesion"], iterations=2)
            for name in names:                                     # 0 like the organ around it, 1 disjoint
                assert stats.ks_2samp(d["images"][name][ill], d["images"][name][well]).statistic > 0.35, (seed, name)
    healthy = next(s for s in range(30) if not ph.diagnosis(s)[1])
    assert phantom(healthy, "ct", 32)["lesion"].sum() == 0


def test_classes_are_balanced_and_change_organs():
    kinds = [ph.diagnosis(s)[0] for s in range(60)]
    assert np.bincount(kinds).tolist() == [20, 20, 20] and len({tuple(kinds[i:i + 3]) for i in range(0, 60, 3)}) > 3
    assert 15 < sum(ph.diagnosis(s)[1] for s in range(60)) < 45
    sizes = {k: [] for k in range(3)}
    for seed in range(24):
        d = phantom(seed, "ct", 40)
        sizes[d["class"]].append(np.bincount(d["label"].ravel(), minlength=14))
    spleen = [np.median([n[1] for n in sizes[k]]) for k in range(3)]
    kidneys = [np.median([n[2] + n[3] for n in sizes[k]]) for k in range(3)]
    assert spleen[1] > 1.25 * spleen[0] and spleen[1] > 1.25 * spleen[2]
    assert kidneys[2] < 0.75 * kidneys[0] and kidneys[2] < 0.75 * kidneys[1]


# ---- the scanners

def test_ct_has_the_hounsfield_units_of_its_tissues(cts):
    for d in cts:
        ct = d["images"]["ct"]
        assert ct.min() >= -1024 and 350 < ct.max() < 1500
        assert np.median(ct[:, -4:]) == pytest.approx(-1000, abs=25)             # air before the body
        assert -115 < np.median(ct[(ct > -150) & (ct < -50)]) < -85              # fat
        means = {k: inner(d, k).mean() for k in ("liver", "spleen", "kidney_left", "pancreas", "gallbladder")}
        assert all(20 < means[k] < 110 for k in ("liver", "spleen", "kidney_left", "pancreas")) and abs(means["gallbladder"]) < 25
        assert 6 < inner(d, "spleen").std() < 25
        assert inner(d, "stomach").min() < -500                                  # gas


def test_hu_alone_does_not_tell_parenchyma_apart(cts):
    """The best threshold between the voxels of two organs errs often, over subjects; gallbladder and liver it separates."""
    def best(a, b):
        x, y = (np.concatenate([inner(d, k)[:2000] for d in cts]) for k in (a, b))
        return 0.5 + stats.ks_2samp(x, y).statistic / 2                          # balanced accuracy of that threshold
    assert max(best("liver", "spleen"), best("kidney_left", "spleen"), best("pancreas", "kidney_right")) < 0.8
    assert best("liver", "gallbladder") > 0.85


def test_mri_contrasts_bias_field_and_rician_noise():
    d = phantom(2, "mri", 64)
    image, liver, bile, vein = d["images"], *(ndimage.binary_erosion(d["label"] == ID[k])
                                              for k in ("liver", "gallbladder", "inferior_vena_cava"))
    assert image["t2"][bile].mean() > 2 * image["t2"][liver].mean()              # fluid bright, on FLAIR suppressed
    assert image["flair"][bile].mean() < image["flair"][liver].mean()
    gain = {k: image["t1ce"][m].mean() / image["t1"][m].mean() for k, m in (("vein", vein), ("bile", bile), ("liver", liver))}
    assert gain["vein"] > 1.3 * gain["liver"] > 1.3 * gain["bile"]
    for name in image:                                                           # no signal: Rayleigh, closed form of mean / sd
        air = image[name][:, -4:]
        assert air.min() >= 0 and air.mean() / air.std() == pytest.approx((np.pi / (4 - np.pi)) ** 0.5, rel=0.06)


def test_mri_shading_is_strong_smooth_and_shared_by_the_sequences(monkeypatch):
    """With one signal for all tissue the coil alone is left in the picture."""
    plain = {t: (*v[:2], 0, v[3], *(3 * [0 if t == "air" else 2000]), 0, v[8]) for t, v in ph.TISSUE.items()}
    monkeypatch.setattr(ph, "TISSUE", plain)
    spread, together = [], []
    for seed in range(4):
        d = phantom(seed, "mri", 32)
        body = ndimage.binary_erosion(ndimage.binary_closing(d["images"]["t1"] > 600, iterations=3), iterations=5)
        t1, t2 = (np.log(d["images"][k]) for k in ("t1", "t2"))
        spread.append(t1[body].std())
        together.append(np.corrcoef(t1[body], t2[body])[0, 1])
        assert np.abs(np.diff(ndimage.gaussian_filter(t1, 1), axis=0))[body[1:]].max() < 0.12       # of 9 mm steps
    assert np.mean(spread) > 0.1 and np.mean(together) > 0.7


def test_thinned_counts_are_poisson():
    """Closed form: mean and variance m / factor, and a covariance with the full counts of m / factor, for they are among them."""
    rng, m, factor = np.random.default_rng(0), 300.0, 50
    full = rng.poisson(m, 400_000)
    low = ph.thin(full, factor, rng)
    assert low.mean() == pytest.approx(m / factor, rel=0.005)
    assert low.var() == pytest.approx(m / factor, rel=0.01)
    assert np.cov(full, low)[0, 1] == pytest.approx(m / factor, rel=0.05)
    assert (low <= full).all()


def test_low_dose_pet_has_the_variance_of_its_counts():
    """Given the full counts n, the low image is unbiased and strays by n (factor - 1), times the filter's sum of squares."""
    d = phantom(5, "pet", 96)
    full, low = d["images"]["full"], d["images"]["low"]
    filter_gain = (ndimage.gaussian_filter1d(np.eye(1, 33, 16)[0], 0.8) ** 2).sum() ** 3
    per_suv = ph.COUNTS * d["spacing"].prod() / 1000
    body = ndimage.binary_erosion(full > 0.3, iterations=3)
    expected = filter_gain * (ph.DOSE_REDUCTION - 1) / per_suv * full[body].mean()
    assert (low - full)[body].var() == pytest.approx(expected, rel=0.05)
    assert low[body].mean() == pytest.approx(full[body].mean(), rel=0.02)
    assert full[d["label"] == ID["liver"]].mean() == pytest.approx(2.3, rel=0.45)        # SUV
    assert full.min() >= 0 and low.min() >= 0


# ---- the files

def read(path):
    """(voxels, affine) in RAS+, the axis codes as stored, and the header."""
    image = nib.load(path)
    ras = nib.as_closest_canonical(image)
    return ras.get_fdata(), ras.affine, "".join(nib.aff2axcodes(image.affine)), image.header


def test_written_ct_reads_back(tmp_path):
    folder = write(tmp_path / "ct", range(4), size=(32, 40, 24))
    for seed in range(4):
        d, name = phantom(seed, "ct", (32, 40, 24)), f"phantom_{seed:03d}.nii.gz"
        for sub, want, dtype in (("imagesTr", np.round(d["images"]["ct"]), np.int16), ("labelsTr", d["label"], np.uint8),
                                 ("lesionsTr", d["lesion"], np.uint8)):
            voxels, affine, codes, header = read(folder / sub / name)
            assert np.array_equal(voxels, want) and header.get_data_dtype() == dtype
            np.testing.assert_allclose(affine, d["affine"], atol=1e-4)
            assert codes == ("RAS", "LPS", "RAS", "PSR")[seed]
    listed = json.loads((folder / "dataset.json").read_text())
    assert listed["labels"]["13"] == "adrenal_gland_left" and listed["numTraining"] == 4
    assert listed["training"][3] == {"image": "imagesTr/phantom_003.nii.gz", "label": "labelsTr/phantom_003.nii.gz"}
    rows = (folder / "participants.csv").read_text().splitlines()
    assert rows[0] == "id,seed,class,lesion" and len(rows) == 5
    assert rows[2] == f"phantom_001,1,{ph.diagnosis(1)[0]},{int(ph.diagnosis(1)[1])}"


def test_written_pet_and_mri_read_back_and_share_a_folder(tmp_path):
    write(tmp_path, [1], "pet", 32)
    write(tmp_path, [1], "mri", 32)
    pet, mri = phantom(1, "pet", 32)["images"], phantom(1, "mri", 32)["images"]
    for name, image in pet.items():
        voxels, _, _, header = read(tmp_path / f"imagesTr/phantom_001_{name}.nii.gz")
        assert header.get_data_dtype() == np.int16
        np.testing.assert_allclose(voxels, image, atol=np.ptp(image) / 2 ** 16)
    for name, image in mri.items():
        assert np.array_equal(read(tmp_path / f"imagesTr/phantom_001_{name}.nii.gz")[0], np.round(image))
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
    assert json.loads((tmp_path / "dataset.json").read_text())["numTraining"] == 1       # the others are of another version


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
    one, two = write(tmp_path / "1", range(3), "pet", 24), write(tmp_path / "2", range(3), "pet", 24, workers=2)
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(names) == 14 and names == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


def test_an_interrupted_file_has_no_name(tmp_path, monkeypatch):
    whole = Path.write_bytes

    def torn(path, content):
        whole(path, content[:len(content) // 2])
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [0], size=16)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_killed_and_started_again_ends_as_if_uninterrupted(tmp_path):
    command = [*PROGRAM, str(tmp_path / "killed"), "--subjects=12", "--size=32"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert run.stdout.readline().startswith("phantom_000")
    time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    left = list((tmp_path / "killed").rglob("*.nii.gz"))
    assert 3 <= len(left) < 36
    for path in left:
        gzip.decompress(path.read_bytes())                         # raises on a torn stream
        assert nib.load(path).get_fdata().shape == (32, 32, 32)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    whole = write(tmp_path / "whole", range(12), size=32)
    for path in whole.rglob("*.nii.gz"):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(whole)).read_bytes()


def test_program_says_what_it_does_and_refuses_in_one_line(tmp_path):
    def program(*arguments):
        return subprocess.run([*PROGRAM, str(tmp_path), *arguments], capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    out = program("--subjects=2", "--first=7", "--modality=pet", "--size", "24", "16", "20").stdout.splitlines()
    assert out[0].startswith("phantom_007  pet  class") and out[-1].startswith(f"{tmp_path}: 2 subjects") and "MB" in out[-1]
    assert nib.load(tmp_path / "labelsTr/phantom_008.nii.gz").shape == (24, 16, 20)
    assert "give either a FOLDER or --demo" in program("--demo").stderr
    refused = program("--first=-1")
    assert refused.returncode == 1 and "seed: expected" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("seeds, more, text", [
    ([], {}, "seeds: expected at least one"), ([0, -1], {}, "seed: .* found -1"), ([0], {"size": 5}, "size: .* found 5"),
    ([0], {"layout": "bids"}, "layout: expected 'msd', found 'bids'")])
def test_wrong_data_sets_are_refused_before_anything_is_written(tmp_path, seeds, more, text):
    with pytest.raises(ValueError, match=text):
        write(tmp_path, seeds, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, text", [
    ((-1, "ct"), "seed: expected a whole number from 0 up, found -1"), ((0.5, "ct"), "seed: .* found 0.5"),
    ((0, "xray"), "modality: expected one of ct, mri, pet, found 'xray'"),
    ((0, "ct", 8), "size: .* found 8"), ((0, "ct", (32, 32)), "size: "), ((0, "ct", 32.0), "size: .* found 32.0")])
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        phantom(*arguments)
