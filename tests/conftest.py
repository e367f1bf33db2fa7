"""What several files of tests share: tiny networks and data sets, and ways to run a script on them.

One thread for each worker of `pytest -n 2` and for the programs it starts: more would wait for each other.
"""
import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from einops import rearrange

import configs
import data
import evaluate
import finetune
import tasks
from lab.phantom import phantom
from model import Swin3D
from run import save

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

HERE = Path(finetune.__file__).parent
NETWORK = dict(feature_size=4, num_heads=(1, 1, 1, 1), window_size=4)
SHORT = dict(steps=2, warmup=1, eval_every=2, save_every=2, log_every=1, batch=1, crops_per_case=1)
AXES = "RAS", "LPS", "PSR", "LPS"       # how the files of a phantom are stored, by its seed modulo 4


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flags(**keys):
    return [f"--{key}={value}" for key, value in keys.items()]


def command(script, config, *args):
    return [sys.executable, str(HERE / script), str(HERE / "configs" / f"{config}.py"), *args]


def environment(root):
    return os.environ | dict(PYTHONPATH=str(HERE), S2DC_DATA=str(root), OMP_NUM_THREADS="1",
                             CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")


def script(folder, root, *argv):
    """Run a script in `folder` to its good end; what it printed."""
    done = subprocess.run(argv, cwd=folder, env=environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def here(monkeypatch, capsys, folder, root, main, config, *args):
    """The same in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("S2DC_DATA", str(root))
    capsys.readouterr()
    main([str(HERE / "configs" / f"{config}.py"), *args])
    return capsys.readouterr().out


def settings(name, kind=evaluate.Config, **keys):
    return dataclasses.replace(configs.load(kind, [str(HERE / "configs" / f"{name}.py")]), **keys)


# ---------------------------------------------------------------------------- folders as after the download

@functools.lru_cache(None)
def drawn(seed, modality):
    return phantom(seed, modality, 64)


def nifti(path, voxels, affine=np.eye(4), axes="RAS", kind=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.asarray(voxels, kind), affine)
    image.set_sform(affine, 1)                              # scanner coordinates; nibabel's own choice is 2
    image.set_qform(affine, 1)
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", axes)))
    nib.save(image.as_reoriented(turn), path)


# kind, patient, scan, role: 0 in the valid list of every fold, 1 .. 3 in that of fold 0 .. 2, None in no list
NAMES = "Normal", "CP", "NCP"
CCII = [(kind, k * 10 + p, 100 * k + p, p) for k, kind in enumerate(NAMES) for p in range(4)]
CCII += [("CP", 10, 150, 0), ("NCP", 29, 209, None)]


def lay_cc_ccii(root):
    Image = pytest.importorskip("PIL.Image")
    head = "zip_file,target,label,patient_id,scan_id,n_slice,scan_count,all_scan_ids"
    lists = {(fold, part): [head.split(",")] for fold in range(3) for part in ("train", "valid")}
    for kind, patient, scan, role in CCII:
        volume = drawn(1 + patient % 3, "ct")["images"]["ct"][::2, ::2, :55:5]
        folder = root / "CC-CCII" / kind / str(patient) / str(scan)
        folder.mkdir(parents=True)
        for z, grey in enumerate(np.moveaxis(np.clip(volume / 4 + 128, 0, 255).astype(np.uint8), 2, 0)):
            Image.fromarray(grey).save(folder / f"{z + 1}.png")
        row = [f"{kind}-1.zip", NAMES.index(kind), kind, patient, scan, 11, 1, f"[{scan}, {scan + 50}]"]
        for fold in range(3) if role is not None else ():
            lists[fold, "valid" if role in (0, fold + 1) else "train"].append(row)
    (root / "CC-CCII/csv").mkdir()
    for (fold, part), rows in lists.items():
        with open(root / f"CC-CCII/csv/CC_CCII_fold{fold}_{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def abdomens(tmp_path_factory):
    """Five labelled CT in the demo's layout, numbers 0 to 4."""
    root, rows = tmp_path_factory.mktemp("abdomens"), ["id,seed,class,lesion"]
    for n in range(5):
        subject = drawn(n, "ct")
        for part, voxels, kind in (("imagesTr", subject["images"]["ct"], np.int16),
                                   ("labelsTr", subject["label"], np.uint8)):
            path = root / f"demo_ct/train/{part}/phantom_{n:03d}.nii.gz"
            nifti(path, voxels, subject["affine"], AXES[n % 4], kind)
        rows.append(f"phantom_{n:03d},{n},{n % 2},0")
    (root / "demo_ct/train/participants.csv").write_text("\n".join(rows) + "\n")
    return root


DEMO = dict(image="demo_ct/train/imagesTr/phantom_{id}.nii.gz", workers=0, label_fraction=1.0, val="003",
            label="demo_ct/train/labelsTr/phantom_{id}.nii.gz", test="004", **NETWORK)
KINDS = dict(resize=(64, 64, 64), classes={"0": 0, "1": 1}, val=("002", "003"), test="004", val_share=0.0,
             test_share=0.0, workers=0, **NETWORK)


def log_of(run):
    """Complete lines of a log that may just be growing."""
    path = run / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# --------------------------------------------------------------------- bad input: one line, before any step

BOX = np.indices((16, 16, 16)).sum(0)                       # an image, and the source of its label


@pytest.fixture
def small(tmp_path):
    """Four small labelled scans with ids 0 to 3, of which 2 chooses and 3 is reported; spoil one and try."""
    for k in range(4):
        for part, voxels in (("img", BOX * (k + 1)), ("lab", BOX > 20)):
            nifti(tmp_path / f"data/s{k}_{part}.nii.gz", voxels)
    (tmp_path / "data/t.csv").write_text("id,class\n0,a\n1,b\n2,a\n3,b\n")
    return tmp_path / "data"


SMALL = dict(image="s{id}_img.nii.gz", label="s{id}_lab.nii.gz", labels={1: "one"}, val=("2",), test=("3",),
             crop=(64, 64, 64), foreground=-1.0, label_fraction=1.0, workers=0, **NETWORK)
TABLE = dict(image="s{id}_img.nii.gz", table="t.csv", table_key="{id}", case_key="{id}", class_from="{class}",
             classes={"a": 0, "b": 1}, val=("2",), test=("3",), val_share=0.0, test_share=0.0, workers=0,
             foreground=-1.0, resize=(64, 64, 64), **NETWORK)


@pytest.fixture
def train(small, monkeypatch, capsys):
    """train(config, keys) -> (what finetune.py printed, the folder of its run)."""
    def run(config="demo_classification", **keys):
        base = {"demo_segmentation": SMALL, "demo_classification": TABLE}[config]
        args = flags(**base | SHORT | dict(name="run") | keys)
        said = here(monkeypatch, capsys, small.parent, small, finetune.main, config, *args)
        return said, small.parent / "runs" / keys.get("name", "run")
    return run


@pytest.fixture
def refused(train, small, capsys):
    """refused(keys, config) -> the text that finetune.py ended with; nothing was trained."""
    def run(keys, config="demo_segmentation"):
        with pytest.raises(SystemExit) as caught:
            train(config, **keys)
        assert not list(small.parent.glob("runs/*/log.jsonl")) and "step      " not in capsys.readouterr().out
        line, *count = str(caught.value).split("\n")        # the count is of the cache
        assert count in ([], ["1 unusable; mend them or name their ids under `exclude`"],
                         ["1 files are missing; add them, or leave their cases out: exclude = ('1',)"])
        return line
    return run


def encoder_file(path, step=0, **other):
    encoder = Swin3D(**NETWORK | other)
    content = dict(format="s2dc/encoder", encoder=encoder.state_dict(), arguments=encoder.arguments, step=step)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, content)
    return encoder


# ------------------------------------------------------------------------ training crops, scores and files

NONE = (0.0, 0.0, 0.0)
STILL = dict(rotation=NONE, scale=(1.0, 1.0), shift=NONE, flip=NONE, shear=0.0)
QUIET = {f"jitter_{kind}": (0.0, 0.0) for kind in ("shift", "scale", "gamma", "noise", "blur")}


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """scans(label maps, keys) -> (cached scans whose image is their label, config)."""
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))

    def make(maps, **keys):
        for k, label in enumerate(maps):
            image = label.astype(np.float32)
            image[0, 0, 0] = -1                             # the fill, and no constant volume
            nifti(tmp_path / f"s{k}_img.nii.gz", image, kind=np.float32)
            nifti(tmp_path / f"s{k}_lab.nii.gz", label, kind=np.uint8)
        usual = dict(image="s{id}_img.nii.gz", label="s{id}_lab.nii.gz", spacing=(),
                     window=(0.0, 1.0), intensity="scale", foreground=-9.0, cache=str(tmp_path / "cache"),
                     crop=(20, 20, 20), labels={}, workers=0)
        cfg = settings("btcv", finetune.Config, **usual | QUIET | keys)
        return data.open_scans(cfg, say=lambda *_: None), cfg
    return make


SHAPE, SPACING = (64, 60, 56), (2.0, 2.5, 3.0)


SPHERES = dict(feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2)


@pytest.fixture(scope="module")
def spheres(tmp_path_factory):
    """Two scans with three organs each, and x.py, a config of lab.probe and lab.figures that finds them."""
    folder = tmp_path_factory.mktemp("spheres")
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = -50, -40, 100
    x, y, z = np.indices(SHAPE)
    for n in range(2):
        label = np.zeros(SHAPE, np.uint8)
        for k, (a, b, c, r) in enumerate(((20, 30, 28, 14), (44, 20, 20, 11), (42, 42, 40, 12)), 1):
            label[(x - a - n) ** 2 + (y - b) ** 2 + (z - c) ** 2 < r ** 2] = k
        body = (x - 32) ** 2 / 30 ** 2 + (y - 30) ** 2 / 29 ** 2 < 1
        image = np.where(body, 60.0 * label, -1000) + np.random.default_rng(n).normal(0, 15, SHAPE)
        for kind, voxels in (("image", image), ("label", label)):         # stored LPS: mm must not show it
            nifti(folder / f"{kind}{n}.nii.gz", voxels, affine, "LPS")
    keys = SPHERES | dict.fromkeys(QUIET, (0.0, 0.1)) | dict(
        name="tiny", runs=f"{folder}/runs", cache=f"{folder}/cache", data=str(folder), workers=1,
        image="image{id}.nii.gz", label="label{id}.nii.gz", crop=(64, 64, 64), crop_foreground=False,
        rotation=(8.0, 8.0, 20.0), shift=(6.0, 6.0, 4.0), probe_share=0.3, probe_least=1, tokens="inside")
    (folder / "x.py").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    return folder


def perfect(scan, cfg):
    """Probabilities (k, x, y, z) that name the truth."""
    truth = torch.from_numpy(scan.open("label")[0].astype(np.int64))
    if cfg.regions:
        return tasks.masks_of(truth, cfg).float()
    return rearrange(torch.nn.functional.one_hot(truth, 1 + max(cfg.labels)), "x y z k -> k x y z").float()


@pytest.fixture
def organs(abdomens, monkeypatch, tmp_path):
    """organs(ids, keys) -> (scans of the demo, config)."""
    monkeypatch.setenv("S2DC_DATA", str(abdomens))

    def make(numbers, **keys):
        cfg = settings("demo_segmentation", **DEMO | dict(cache=str(tmp_path / "cache"), hd95=True) | keys)
        cases = [case for case in data.find_cases(cfg) if case["id"] in numbers]
        return data.open_scans(cfg, cases, say=lambda *_: None), cfg
    return make
