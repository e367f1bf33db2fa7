"""plan.py: on phantoms of three modalities, on broken folders, and on real scans where they are at hand."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from test_data import write_dicom

import configs
import data
import plan
import pretrain
import volumes
from lab import phantom

ROOT = Path(plan.__file__).parent
REAL = os.environ.get("S2DC_REAL_DATA")


@pytest.fixture(autouse=True)
def no_root_from_outside(monkeypatch):
    monkeypatch.delenv("S2DC_DATA", raising=False)


def planned(tmp_path, pattern, **keys):
    """What the plan's config says, read as pretrain.py reads it."""
    out = tmp_path / "planned.py"
    plan.main([f"--plan={pattern}", f"--out={out}", *(f"--{key}={value}" for key, value in (dict(time=False) | keys).items())])
    return configs.load(pretrain.Config, [str(out)]), out.read_text()


@pytest.mark.parametrize("modality, intensity", [("ct", "window"), ("mri", "zscore"), ("pet", "scale")])
def test_a_plan_knows_the_modality_and_fills_its_slab(tmp_path, modality, intensity):
    phantom.write(tmp_path / "scans", range(3), modality=modality, size=64)
    files = sorted((tmp_path / "scans").rglob("*.nii.gz"))
    images = [file for file in files if "images" in str(file) and "_t2" not in file.name and "_low" not in file.name]
    (tmp_path / "my_set").mkdir()
    for file in images:
        shutil.copy(file, tmp_path / "my_set")
    cfg, text = planned(tmp_path, tmp_path / "my_set")              # a folder alone
    assert cfg.intensity == intensity and f"# {modality.upper()}: values from" in text
    scans = data.open_scans(cfg.__class__(**vars(cfg) | dict(cache=str(tmp_path / "cache"))), say=lambda *_: None)
    assert len(scans) == len(images) and pretrain.check(cfg, 1) is None and pretrain.check_fill(scans, cfg) is None


def test_a_plan_leaves_out_what_cannot_be_read_and_writes_over_nothing(tmp_path, capsys):
    phantom.write(tmp_path / "scans", range(2), size=64)
    folder = tmp_path / "scans/imagesTr"
    (folder / "broken.nii.gz").write_bytes(b"no scan")
    cfg, _ = planned(tmp_path, f"{folder}/*.nii.gz")
    assert len(data.find_cases(cfg)) == 2 and "unusable" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="planned.py: there is such a config already"):
        planned(tmp_path, f"{folder}/*.nii.gz")
    with pytest.raises(SystemExit, match="found neither below data nor from here"):
        planned(tmp_path / "new", tmp_path / "nowhere/at/all/*.nii.gz")


def test_scans_whose_voxels_are_damaged_are_named_and_left_out(tmp_path, capsys):
    phantom.write(tmp_path / "scans", range(3), size=64)
    file, *others = sorted((tmp_path / "scans/imagesTr").glob("*.nii.gz"))
    file.write_bytes(file.read_bytes()[:20000])
    cfg, _ = planned(tmp_path, f"{tmp_path}/scans/imagesTr/*.nii.gz")
    said = f"unusable  {file}: the file is damaged "
    assert said in capsys.readouterr().out and [case["images"] for case in data.find_cases(cfg)] == [[str(f)] for f in others]
    for other in others:
        other.unlink()
    with pytest.raises(SystemExit, match="^none of the 1 scans can be read$"):
        planned(tmp_path / "again", f"{tmp_path}/scans/imagesTr/*.nii.gz")
    assert said in capsys.readouterr().out and not (tmp_path / "again").exists()


def volume(path, low, high, whole=False):
    import nibabel as nib
    voxels = ndimage.gaussian_filter(np.random.default_rng(len(str(path))).normal(size=(40, 40, 40)), 3)
    voxels = low + (high - low) * (voxels - voxels.min()) / np.ptp(voxels)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mha":
        sitk = pytest.importorskip("SimpleITK")
        sitk.WriteImage(sitk.GetImageFromArray(voxels.astype(np.float32)), str(path))
    else:
        nib.save(nib.Nifti1Image(np.round(voxels).astype(np.float32) if whole else voxels.astype(np.float32), np.eye(4)), path)


def test_label_maps_among_the_scans_are_refused_wherever_they_stand(tmp_path):
    for k in range(8):                                              # alternating by name, 8 of 16 are read
        volume(tmp_path / f"set/p{k}_image.nii.gz", 0, 800)
        volume(tmp_path / f"set/p{k}_mask.nii.gz", 0, 3, whole=True)
    with pytest.raises(SystemExit, match="_mask.nii.gz: holds 4 values, all whole: a label map?"):
        planned(tmp_path, tmp_path / "set")
    cfg, text = planned(tmp_path, tmp_path / "set", exclude="*_mask")
    assert len(data.find_cases(cfg)) == 8 and "# 8 scans" in text.replace('"""', "# ")


def test_ct_among_others_is_refused_and_a_mixture_of_others_is_doubted(tmp_path):
    for k in range(8):
        volume(tmp_path / f"set/a{k}.nii.gz", -1000, 1500)
    for k in range(7):                                              # behind the first eight
        volume(tmp_path / f"set/b{k}.nii.gz", 0, 800)
    with pytest.raises(SystemExit, match=r"a.\.nii\.gz: values from -[\d.]+, as of CT, but .*/b.\.nii\.gz: from .* of 8 scans"):
        planned(tmp_path, tmp_path / "set")
    kinds = [dict(least=0, largest=900, tail=tail) for tail in (1.2, 1.3, 5.0)]
    assert "scan by scan 2 MRI, 1 PET" in plan.modality_of(kinds)[2]


def test_other_endings_odd_names_dicom_and_several_folders(tmp_path, monkeypatch):
    volume(tmp_path / "here/mhas/scan[1].mha", -1000, 1500)
    volume(tmp_path / "here/mhas/b.mha", -1000, 1500)
    cfg, text = planned(tmp_path / "a", tmp_path / "here/mhas")
    assert len(data.find_cases(cfg)) == 2 and "# CT: " in text
    volume(tmp_path / "here/other/c.nii.gz", -1000, 1500)
    both = f"('{tmp_path}/here/mhas', '{tmp_path}/here/other/*.nii.gz')"
    cfg, _ = planned(tmp_path / "b", both)
    assert cfg.data == f"{tmp_path}/here" and len(data.find_cases(cfg)) == 3
    assert len(data.find_cases(planned(tmp_path / "d", tmp_path / "here")[0])) == 3     # a folder of folders
    monkeypatch.chdir(tmp_path)
    cfg, _ = planned(tmp_path / "c", "here/mhas", time=True)        # as it stands from here, and a step of it
    assert len(data.find_cases(cfg)) == 2
    with pytest.raises(SystemExit, match=r"plan = \(\): expected a folder of scans"):
        plan.main(["--plan=()"])


@pytest.mark.parametrize("pattern, found", [("dicoms", 2), ("dicoms/*/", 2), ("dicoms/p1", 1)])
def test_folders_of_dicom_and_a_step_of_them(tmp_path, pattern, found, capsys):
    sitk = pytest.importorskip("SimpleITK")
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(9, 40, 40)), (1, 3, 3))
    image = sitk.GetImageFromArray((2500 * (smooth - smooth.min()) / np.ptp(smooth) - 1000).astype(np.int16))
    image.SetSpacing((4.0, 4.0, 16.0))
    (tmp_path / "dicoms").mkdir()
    for name in ("p1", "p2"):
        write_dicom(tmp_path / "dicoms" / name, sitk, image)
    cfg, _ = planned(tmp_path / "a", f"{tmp_path}/{pattern}", time=found == 2)
    assert len(data.find_cases(cfg)) == found
    assert found == 1 or "a step takes" in capsys.readouterr().out.splitlines()[-1]


def test_the_next_line_says_where_the_data_are_if_the_environment_says_otherwise(tmp_path, monkeypatch, capsys):
    volume(tmp_path / "set/a.nii.gz", 0, 800)
    volume(tmp_path / "set/b.nii.gz", 0, 800)
    monkeypatch.setenv("S2DC_DATA", str(tmp_path / "nowhere"))
    plan.main([f"--plan={tmp_path}/set", f"--out={tmp_path}/x.py", "--time=False"])
    assert f"next: python data.py {tmp_path}/x.py --data={tmp_path}," in capsys.readouterr().out
    assert f"python pretrain.py {tmp_path}/x.py" in (tmp_path / "x.py").read_text()


@pytest.mark.parametrize("pattern, root, name", [
    ("site_a/images/*.nii.gz", "/where/all", "site_a"), ("images/*.nii.gz", "/where/site_a", "site_a"),
    ("*.nii.gz", "/where/My CTs", "my_cts"), ("imagesTr/*.nii.gz", "data", "imagestr"), ("*.nii.gz", "data", "my_scans")])
def test_a_plan_is_named_after_the_folder_that_tells_a_data_set(pattern, root, name):
    assert plan.plain_name(pattern, Path(root)) == name


def test_boxes_decide_slab_and_crop():
    assert plan.sizes(np.array([[400, 390, 100]] * 3)) == ((384, 384, 96), (96, 96, 96), 1.0)
    assert plan.sizes(np.array([[70, 66, 64], [64, 64, 32]])) == ((64, 64, 64), (64, 64, 64), 0.75)


def test_a_large_slab_has_tokens_of_8_voxels_too(tmp_path):
    import nibabel as nib
    voxels = np.full((210, 210, 104), -1000, np.int16)
    noise = np.random.default_rng(0).normal(40, 20, (200, 200, 96))
    voxels[5:-5, 5:-5, 4:-4] = ndimage.gaussian_filter(noise, 1) + 40
    (tmp_path / "scans").mkdir()
    for name in "ab":
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"scans/{name}.nii.gz")
    cfg, text = planned(tmp_path, tmp_path / "scans")
    assert (cfg.slab, cfg.token_patch) == ((192, 192, 96), 8) and "# 6912 tokens; larger ones" in text


def test_headers_alone_give_shape_and_spacing(tmp_path):
    import nibabel as nib
    affine = np.array([[0, 0, 3.0, 1], [-1.5, 0, 0, 2], [0, 2.0, 0, 3], [0, 0, 0, 1]])
    voxels = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(10, 12, 14)), 1)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii.gz")
    read, spacing, _ = data.read_volume(tmp_path / "a.nii.gz")
    shape, found = volumes.read_header(tmp_path / "a.nii.gz")
    assert tuple(shape) == read.shape == (14, 10, 12)
    np.testing.assert_allclose(found, spacing)


def test_the_command_writes_a_config_and_times_a_step_of_it(tmp_path):
    phantom.write(tmp_path / "scans", range(2), size=64)
    command = [sys.executable, str(ROOT / "data.py"), "--plan=scans/imagesTr/*.nii.gz", f"--data={tmp_path}", "--out=mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stderr
    assert "written: mine.py" in done.stdout and " GB on this machine" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("bright, unit, window, unsure", [
    (6.0, "SUV", 5.0, False), (6.0 * 16000, "Bq/ml", 1e5, False), (45.0, "SUV", 5.0, True), (400.0, "Bq/ml", 400.0, True)])
def test_the_window_of_pet_follows_from_all_but_its_hottest_voxels(bright, unit, window, unsure):
    lines = plan.intensity_of("PET", bright)
    assert f"window = (0.0, {window})" in lines[-2] and f"1; {unit}, " in lines[-2] and lines[0].startswith("# UNSURE") == unsure


def test_a_hotter_bladder_does_not_widen_the_window(tmp_path):
    import nibabel as nib
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(60, 60, 60)), 4)
    tissue = 8 * np.maximum(smooth - smooth.mean(), 0) / smooth.max()
    for name, hottest in (("a", 20.0), ("b", 300.0)):
        tissue[30:33, 30:33, 30:33] = hottest
        nib.save(nib.Nifti1Image(tissue.astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    found = [plan.described(tmp_path / f"{name}.nii.gz") for name in "ab"]
    assert found[0]["bright"] == found[1]["bright"] < 9 and found[1]["largest"] == 300


@pytest.mark.skipif(not REAL, reason="S2DC_REAL_DATA is not set")
@pytest.mark.parametrize("folder, sign", [("ct", "# CT: "), ("mri", "# MRI: "), ("pet", "# PET: ")])
def test_real_scans(tmp_path, folder, sign):
    cfg, text = planned(tmp_path, Path(REAL) / folder)
    assert sign in text and pretrain.check(cfg, 1) is None


@pytest.mark.skipif(not REAL, reason="S2DC_REAL_DATA is not set")
@pytest.mark.parametrize("kind, sign", [("CT", "# CT: "), ("MR_T1", "# MRI: "), ("PET", "# PET: ")])
def test_real_sarcomas(tmp_path, kind, sign):
    _, text = planned(tmp_path, f"{REAL}/ibsi_validation/nifti/*/{kind}_image.nii.gz")
    assert sign in text and "UNSURE: PET or MRI" not in text


@pytest.mark.parametrize("least, largest, tail, modality, words", [
    (-1024, 3071, 1.5, "CT", ""), (-200, 300, 1.5, "CT", "CT cut off below"), (0, 900, 1.4, "MRI", ""),
    (-3, 1200, 1.4, "MRI", "values below 0"), (-0.02, 8, 4.0, "PET", "values below 0"), (-2.5, 8, 1.5, "MRI", "values below 0"),
    (0, 4095, 1.4, "MRI", "without its offset"), (0, 4235, 1.4, "MRI", "without its offset"),
    (-959, 20000, 1.4, "CT", "PET in Bq/ml"), (-4096, 4095, 1.4, "CT", "phases"), (0, 20, 2.4, "PET", "near the border")])
def test_guesses_and_their_doubts(least, largest, tail, modality, words):
    found, said, unsure = plan.modality_of([dict(least=least, largest=largest, tail=tail)])
    assert found == modality and words in unsure and bool(words) == bool(unsure)
