"""finetune.py, and the tasks, splits, scores and files of evaluate.py: the real scripts on folders laid out as downloaded."""
import csv
import dataclasses
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from einops import rearrange

import configs
import data
import evaluate as ev
import finetune
import pretrain
from model import Classifier, Swin3D, SwinUNETR, save, to_monai
from phantom import phantom
from phantom import write as write_phantoms

HERE = Path(finetune.__file__).parent
NETWORK = dict(feature_size=4, num_heads=(1, 1, 1, 1), window_size=4)
SHORT = dict(steps=2, warmup=1, eval_every=2, save_every=2, log_every=1, batch=1, crops_per_case=1)
AXES = "RAS", "LPS", "PSR", "LPS"       # how the files of a phantom are stored, by its seed modulo 4


@pytest.fixture(autouse=True, scope="module")
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
    return os.environ | dict(S2DC_DATA=str(root), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")


def script(folder, root, *argv):
    """Run a script in `folder` to its good end; what it printed."""
    done = subprocess.run(argv, cwd=folder, env=environment(root), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def here(monkeypatch, capsys, folder, root, main, config, *args):
    """The same in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("S2DC_DATA", str(root))
    capsys.readouterr()
    main([str(HERE / "configs" / f"{config}.py"), *args])
    return capsys.readouterr().out


def settings(name, kind=ev.Config, **keys):
    return dataclasses.replace(configs.load(kind, [str(HERE / "configs" / f"{name}.py")], foreign=True), **keys)


# ---------------------------------------------------------------------------------------------------------------------
# folders as after the download


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


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """link(path, seed, modality, image or {new id: old ids}): a volume of a phantom, written once, linked to where it is due."""
    folder = tmp_path_factory.mktemp("pool")

    def link(path, seed, modality, what, scale=1):
        source = folder / (f"{seed} {modality} {what} {scale}.nii" + ".gz" * str(path).endswith(".gz"))
        if not source.exists():
            subject = drawn(seed, modality)
            voxels = subject["images"][what] * scale if isinstance(what, str) else np.zeros(subject["label"].shape)
            for new, old in what.items() if isinstance(what, dict) else ():
                voxels[subject["lesion"] > 0 if old == "lesion" else np.isin(subject["label"], old)] = new
            whole = modality != "pet" or not isinstance(what, str)
            nifti(source, np.round(voxels) if whole else voxels, subject["affine"], AXES[seed % 4],
                  (np.int16 if isinstance(what, str) else np.uint8) if whole else np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)
    return link


def lay_btcv(root, link):
    for k, number in enumerate((1, 2, 21, 35, 36, 37, 38, 39, 40)):
        folder = root / "BTCV/Abdomen/RawData/Training"
        link(folder / f"img/img{number:04d}.nii.gz", 1 + k % 3, "ct", "ct")
        link(folder / f"label/label{number:04d}.nii.gz", 1 + k % 3, "ct", {k: k for k in range(1, 14)})


def lay_msd(root, link, task, name, ids, labels):
    for k, number in enumerate(ids):
        for part, what in (("imagesTr", "ct"), ("labelsTr", labels)):
            link(root / task / part / f"{name}_{number}.nii.gz", 1 + k % 3, "ct", what)
            (root / task / part / f"._{name}_{number}.nii.gz").write_bytes(b"\0\5\x16\7 Mac OS X")
    (root / task / "dataset.json").write_text("{}")


def lay_liver(root, link):
    lay_msd(root, link, "Task03_Liver", "liver", ("0", "4", *settings("msd_liver").val), {1: 6, 2: "lesion"})


def lay_lung(root, link):
    lay_msd(root, link, "Task06_Lung", "lung", ("001", "003", *settings("msd_lung").val), {1: "lesion"})


def lay_spleen(root, link):
    lay_msd(root, link, "Task09_Spleen", "spleen", ("2", "3", *settings("msd_spleen").val), {1: 1})


def lay_brats21(root, link):
    for k, subject in enumerate(("BraTS2021_00000", "BraTS2021_00002", "BraTS2021_01146", "BraTS2021_01666")):
        for name in ("flair", "t1ce", "t1", "t2"):
            link(root / "BraTS2021" / subject / f"{subject}_{name}.nii.gz", 1 + k % 2, "mri", name)
        link(root / "BraTS2021" / subject / f"{subject}_seg.nii.gz", 1 + k % 2, "mri", {2: 6, 1: 7, 4: 1})


STUDY = "03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-{}"


def lay_autopet(root, link):
    for k, patient in enumerate(("0011f3deaf", "01140d52d8", "0143bab87a", "01547a6a5b", "0168df2ed8", "01e1f80a8d")):
        for study in range(2 if k in (0, 2) else 1):
            folder = root / "FDG-PET-CT-Lesions" / f"PETCT_{patient}" / STUDY.format(10000 + k + study)
            link(folder / "SUV.nii.gz", 1 + k % 3, "pet", "full")
            link(folder / "CTres.nii.gz", 1 + k % 3, "ct", "ct")
            link(folder / "SEG.nii.gz", 1 + k % 3, "pet", {1: "lesion"} if study == 0 and k < 5 else {})


CCII = [(kind, k * 10 + p, 100 * k + p, p) for k, kind in enumerate(("Normal", "CP", "NCP")) for p in range(4)]
CCII += [("CP", 10, 150, 0), ("NCP", 29, 209, None)]        # the second scan of a patient, and one that no list names


def lay_cc_ccii(root, link):
    Image = pytest.importorskip("PIL.Image")
    lists = {(fold, part): [] for fold in range(3) for part in ("train", "valid")}
    for kind, patient, scan, role in CCII:                  # role 0: in all valid lists, 1 .. 3: in that of fold 0 .. 2
        for z in range(11):
            grey = np.clip(drawn(1 + patient % 3, "ct")["images"]["ct"][::2, ::2, 5 * z] / 4 + 128, 0, 255).astype(np.uint8)
            folder = root / "CC-CCII" / kind / str(patient) / str(scan)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(folder / f"{z + 1}.png")
        row = [f"{kind}-1.zip", ("Normal", "CP", "NCP").index(kind), kind, patient, scan, 11, 1, f"[{scan}, {scan + 50}]"]
        for fold in range(3) if role is not None else ():
            lists[fold, "valid" if role in (0, fold + 1) else "train"].append(row)
    (root / "CC-CCII/csv").mkdir()
    for (fold, part), rows in lists.items():
        with open(root / f"CC-CCII/csv/CC_CCII_fold{fold}_{part}.csv", "w", newline="") as file:
            head = "zip_file,target,label,patient_id,scan_id,n_slice,scan_count,all_scan_ids".split(",")
            csv.writer(file).writerows([head, *rows])


ADNI = ["CN", "SMC", "CN", "MCI", "EMCI", "LMCI", "AD", "AD", "AD"]


def lay_adni(root, link):
    rows = [["Image Data ID", "Subject", "Group", "Sex", "Age", "Visit", "Modality", "Description", "Type", "Acq Date", "Format",
             "Downloaded"]]
    for k, group in enumerate(ADNI):
        for visit in range(1 + (k % 2)):
            subject, number = f"{k + 2:03d}_S_{295 + k:04d}", f"I{123456 + 10 * k + visit}"
            kind, day = "Coreg,_Avg,_Standardized_Image_and_Voxel_Size", f"2006-0{visit + 1}-02_13_31_45.0"
            path = root / "ADNI" / subject / kind / day / number / f"ADNI_{subject}_PT_{kind}_Br_{number}.nii"
            link(path, 1 + k % 3, "pet", "full")
            rows.append([number, subject, group, "F", 74, "sc", "PET", "Coreg, Avg, Standardized Image and Voxel Size",
                         "Processed", "1/02/2006", "NiFTI", "1/01/2020"])
    with open(root / "ADNI/ADNI.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)


def lay_udpet(root, link):
    for k in range(4):
        for name, what in (("drf_50", "low"), ("full", "full")):
            link(root / "UDPET" / f"Anonymous_ANO_{k:04d}" / f"{name}.nii.gz", 1 + k % 3, "pet", what, scale=4000)


def lay_brats23(root, link):
    for k, visit in enumerate(("00000-000", "00002-000", "00002-001", "00003-000", "00005-000")):
        case = f"BraTS-GLI-{visit}"
        folder = root / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData" / case
        for name, what in (("t1n", "t1"), ("t1c", "t1ce"), ("t2w", "t2"), ("t2f", "flair"), ("seg", {2: 6, 1: 7, 3: 1})):
            link(folder / f"{case}-{name}.nii.gz", 1 + k % 2, "mri", what)


def write_case(root, number, seed, axes=None):
    """A subject of the demo of segmentation."""
    subject = drawn(seed, "ct")
    for part, voxels, kind in (("imagesTr", subject["images"]["ct"], np.int16), ("labelsTr", subject["label"], np.uint8)):
        nifti(root / f"demo_ct/train/{part}/phantom_{number:03d}.nii.gz", voxels, subject["affine"], axes or AXES[seed % 4], kind)


@pytest.fixture(scope="module")
def abdomens(tmp_path_factory):
    """Five labelled CT in the demo's layout, numbers 0 to 4."""
    root = tmp_path_factory.mktemp("abdomens")
    for number in range(5):
        write_case(root, number, number)
    rows = ["id,seed,class,lesion"] + [f"phantom_{n:03d},{n},{n % 2},0" for n in range(5)]
    (root / "demo_ct/train/participants.csv").write_text("\n".join(rows) + "\n")
    return root


DEMO = dict(image="demo_ct/train/imagesTr/phantom_{id}.nii.gz", label="demo_ct/train/labelsTr/phantom_{id}.nii.gz", workers=0,
            label_fraction=1.0, val="003", test="004", **NETWORK)
KINDS = dict(resize=(64, 64, 64), classes={"0": 0, "1": 1}, val=("002", "003"), test="004", val_share=0.0, test_share=0.0,
             workers=0, **NETWORK)


# ---------------------------------------------------------------------------------------------------------------------
# every config, from the folder of the download to the table

TASKS = {   # layout, keys of both scripts, cases that train, cases that are reported
    "btcv": (lay_btcv, dict(spacing=(4.5, 4.5, 4.5)), 3, ("0035", "0036", "0037", "0038", "0039", "0040")),
    "msd_liver": (lay_liver, dict(spacing=(5.0, 5.0, 6.0)), 2, settings("msd_liver").val),
    "msd_lung": (lay_lung, dict(spacing=(5.0, 5.0, 9.0)), 2, settings("msd_lung").val),
    "msd_spleen": (lay_spleen, dict(spacing=(4.5, 4.5, 4.5)), 2, settings("msd_spleen").val),
    "brats21": (lay_brats21, {}, 3, None),
    "autopet": (lay_autopet, {}, 5, None),
    "cc_ccii": (lay_cc_ccii, dict(resize=(64, 64, 64)), 6, ("Normal_0_0", "CP_10_100", "CP_10_150", "NCP_20_200")),
    "adni": (lay_adni, dict(resize=(64, 64, 64)), None, None),
    "udpet": (lay_udpet, {}, 2, None),
    "brats23_t1_to_t2": (lay_brats23, {}, None, None),
    "brats23_t1_to_t1ce": (lay_brats23, {}, None, None),
}


@pytest.mark.parametrize("name", TASKS)
def test_config_from_download_to_table(name, tmp_path, pool):
    lay, keys, trained, reported = TASKS[name]
    lay(tmp_path / "data", pool)
    both = flags(crop=(64, 64, 64), workers=0, **NETWORK, **keys)
    said = script(tmp_path, tmp_path / "data", *command("finetune.py", name, *both, *flags(**SHORT)))
    log = [json.loads(line) for line in (tmp_path / f"runs/{name}/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log[1:]] == [1, 2, 2] and "val" in log[-1]
    assert np.isfinite([line["loss"] for line in log[1:3]]).all()
    if trained:
        assert f"train: {trained} cases" in said

    said = script(tmp_path, tmp_path / "data", *command("evaluate.py", name, *both, "--sheets=1"))
    results = json.loads((tmp_path / f"runs/{name}/results.json").read_text())
    (checkpoint, result), = results["results"].items()
    cfg = settings(name)
    rows = {row["id"]: row for row in result["rows"]}
    assert checkpoint == f"runs/{name}/best.pt" and results["config"]["seed"] == cfg.seed
    assert results["torch"] and results["commit"]
    assert reported is None or sorted(rows) == sorted(reported)
    assert ("chose the checkpoint" in said and "chose the checkpoint" in results["part"]) == (cfg.test == "val")
    grid, metric, part = ev.TASKS[cfg.task].best
    assert np.isfinite(result["summary"][grid][metric][part]["mean"])
    if cfg.task != "classification":
        assert len(list((tmp_path / f"runs/{name}/predictions").glob("*.png"))) == 1
        check_predictions(tmp_path, name, cfg, rows)
    CHECKS.get(name, lambda *_: None)(tmp_path, rows, result, said)


def check_predictions(folder, name, cfg, rows):
    """On the voxels of the very input file: affine, shape, axes; ids in one byte, and only declared ones."""
    os.environ["S2DC_DATA"] = str(folder / "data")
    try:
        cases = {case["id"]: case for case in data.find_cases(cfg)}
    finally:
        del os.environ["S2DC_DATA"]
    axes = set()
    for each in rows:
        written, source = nib.load(folder / f"runs/{name}/predictions/{each}.nii.gz"), nib.load(cases[each]["images"][0])
        np.testing.assert_array_equal(written.affine, source.affine)
        assert written.shape == source.shape and nib.aff2axcodes(written.affine) == nib.aff2axcodes(source.affine)
        assert all(written.header[key] == source.header[key] for key in ("sform_code", "qform_code"))
        assert written.get_data_dtype() == (np.uint8 if cfg.task == "segmentation" else np.float32)
        assert cfg.task != "segmentation" or set(np.unique(written.dataobj)) <= {0, *cfg.labels}
        axes.add("".join(nib.aff2axcodes(source.affine)))
    assert len(rows) == 1 or axes - {"RAS"}


def check_btcv(folder, rows, result, said):
    assert "S2DC [paper]" in said and "84.14" in said and "from scratch [paper]" in said and "80.53" in said
    assert said.count("  95 %") == 4                        # Dice and distance on both grids
    for grid in ("preprocessed", "original"):               # 13 organs and their mean
        dice, hd95 = (result["summary"][grid][metric] for metric in ("dice", "hd95"))
        assert len(dice) == 14 and list(hd95) == list(dice)
    row = rows["0035"]["scores"]["original"]["dice"]
    np.testing.assert_allclose(row["mean"], np.nanmean([v for k, v in row.items() if k != "mean"]))


def check_brats21(folder, rows, result, said):
    assert list(result["summary"]["original"]["dice"]) == ["TC", "WT", "ET", "mean"]
    for path in (folder / "cache").glob("brats21-*/*.label.npy"):
        assert set(np.unique(np.load(path))) == {0, 1, 2, 3}            # 4 in the files


def check_autopet(folder, rows, result, said):
    assert {row["subject"] for row in rows.values()} == {"PETCT_0011f3deaf", "PETCT_01e1f80a8d"} and len(rows) == 3
    parts = result["summary"]["original"]
    assert parts["dice_of_positive"]["lesion"]["cases"] == 1 and {"false_positive_ml", "false_negative_ml"} <= set(parts)
    for each, row in rows.items():                          # without a lesion: NaN where none was predicted, else 0
        scores, found = row["scores"]["original"], nib.load(folder / f"runs/autopet/predictions/{each}.nii.gz").get_fdata().any()
        if each.endswith("10000"):
            assert np.isfinite(scores["dice"]["lesion"]) and scores["dice_of_positive"] == {"lesion": scores["dice"]["lesion"]}
        else:
            assert scores["dice"]["lesion"] == 0 if found else np.isnan(scores["dice"]["lesion"])
            assert scores["false_negative_ml"]["lesion"] == 0 and scores["dice_of_positive"] == {}


def check_classes(names):
    def check(folder, rows, result, said):
        with open(next(folder.glob("runs/*/predictions/probabilities.csv"))) as file:
            table = {row["id"]: row for row in csv.DictReader(file)}
        assert set(table) == set(rows)
        for row in table.values():
            assert sum(float(row[k]) for k in names) == pytest.approx(1, abs=1e-5)
        summary = result["summary"]["scans"]
        cases = np.bincount([row["scores"]["scans"]["class"]["true"] for row in rows.values()], minlength=3)
        assert cases.all() and summary["majority_accuracy"]["all"]["mean"] == pytest.approx(cases.max() / cases.sum())
        assert [summary["recall"][k]["cases"] for k in names] == cases.tolist()
        assert np.sum(summary["confusion"]) == len(rows) and {"accuracy", "balanced_accuracy", "auc"} <= set(summary)
        assert "confusion of runs/" in said and "(rows: truth, columns: prediction; " + ", ".join(names) in said
    return check


def check_udpet(folder, rows, result, said):
    (row,) = rows.values()
    assert row["scores"]["preprocessed"]["data_range"] == {"used": 1.0}
    assert {"psnr", "ssim", "nmse"} <= set(result["summary"]["preprocessed"])
    written = nib.load(folder / f"runs/udpet/predictions/{row['id']}.nii.gz").get_fdata()
    low = nib.load(folder / f"data/UDPET/{row['id']}/drf_50.nii.gz").get_fdata()
    assert np.corrcoef(written.ravel(), low.ravel())[0, 1] > 0.5 and 0.2 < written.max() / low.max() < 5    # Bq/ml again


def check_brats23(folder, rows, result, said):
    assert {"whole", "pasted", "tissue", "input"} == set(result["summary"]["preprocessed"]["psnr"])


CHECKS = dict(btcv=check_btcv, brats21=check_brats21, autopet=check_autopet, udpet=check_udpet, brats23_t1_to_t2=check_brats23,
              brats23_t1_to_t1ce=check_brats23, cc_ccii=check_classes(["Normal", "CP", "NCP"]),
              adni=check_classes(["CN", "MCI", "AD"]))


# ---------------------------------------------------------------------------------------------------------------------
# several processes, and a kill at any moment

def log_of(run):
    """Complete lines of a log that may just be growing."""
    path = run / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def test_two_processes_follow_one(tmp_path, abdomens):
    args = flags(**DEMO | dict(val=("002", "003", "004"), test="val"), **SHORT | dict(batch=2, crops_per_case=2))
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))):
        python, *rest = command("finetune.py", "demo_segmentation", *args, f"--name={name}")
        script(tmp_path, abdomens, python, *launcher, *rest)
    one, two = (log_of(tmp_path / "runs" / name) for name in ("one", "two"))
    assert [line.get("step") for line in one] == [line.get("step") for line in two] == [None, 1, 2, 2]
    for a, b in zip(one[1:], two[1:]):
        for key, reach in (("loss", dict(abs=1e-4)), ("val", dict(abs=1e-4)), ("grad_norm", dict(rel=1e-3))):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], **reach)
    # AdamW's first steps are a sign for each weight, whatever the size of its gradient, and a gradient that is the difference of
    # two large ones may fall either way: the gradients (first moments) are compared as a whole, and all but a few of the weights
    one, two = (torch.load(tmp_path / f"runs/{name}/last.pt", weights_only=True) for name in ("one", "two"))
    cfg = configs.load(finetune.Config, [str(tmp_path / "runs/one/config.py")])
    network = ev.TASKS[cfg.task].network(cfg)
    names = {id(p): name for name, p in network.named_parameters()}
    order = [names[id(p)] for group in finetune.groups_of(network, cfg) for p in group["params"]]
    flat = lambda run, values: torch.cat([values(run, k, name).flatten() for k, name in enumerate(order)])
    moments = [flat(run, lambda run, k, _: run["optimizer"]["state"][k]["exp_avg"]) for run in (one, two)]
    assert (moments[0] - moments[1]).norm() < 3e-3 * moments[0].norm()
    clear = moments[0].abs() > 1e-4
    assert clear.sum() > 1000
    first, second = (flat(run, lambda run, _, name: run["model"][name])[clear] for run in (one, two))
    assert ((second - first).abs() > 1e-4).float().mean() < 2e-3


def test_killed_at_any_moment_ends_in_the_same_weights(tmp_path, abdomens):
    args = flags(**DEMO, **SHORT | dict(steps=6, save_every=2, eval_every=3))
    again = lambda name: command("finetune.py", "demo_segmentation", *args, f"--name={name}")
    script(tmp_path, abdomens, *again("whole"))
    run, done = tmp_path / "runs/killed", []
    moments = [("before the first checkpoint", lambda log: any(line.get("step") == 1 for line in log)),
               ("right after a validation", lambda log: any("val" in line for line in log)),
               ("between two checkpoints", lambda log: any(line.get("step") == 5 for line in log))]
    for moment, reached in moments:
        process = subprocess.Popen(again("killed"), cwd=tmp_path, env=environment(abdomens), stdout=subprocess.DEVNULL)
        while not reached(log_of(run)):
            assert process.poll() is None, moment
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done.append(torch.load(run / "last.pt", weights_only=True)["step"] if (run / "last.pt").exists() else 0)
    assert done == [0, 2, 4]                                # it went on from there, and not from the start
    said = script(tmp_path, abdomens, *again("killed"))
    assert "resumed from runs/killed/last.pt at step 4" in said
    whole, killed = (torch.load(tmp_path / f"runs/{name}/last.pt", weights_only=True) for name in ("whole", "killed"))
    for part in ("last.pt", "best.pt"):
        mine, theirs = weights(run / part), weights(tmp_path / "runs/whole" / part)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert whole["best"] == killed["best"] and np.isfinite(whole["best"]) and whole["step"] == killed["step"] == 6
    logs = [[(line["step"], line.get("loss"), line.get("val")) for line in log_of(tmp_path / "runs" / name) if "step" in line]
            for name in ("whole", "killed")]
    assert logs[0] == logs[1]                               # what was done twice stands once in the log


def test_a_finished_or_other_run_is_not_touched(tmp_path, abdomens, monkeypatch, capsys):
    args = flags(**KINDS, **SHORT, name="r")
    train = functools.partial(here, monkeypatch, capsys, tmp_path, abdomens, finetune.main, "demo_classification")
    train(*args)
    before = (tmp_path / "runs/r/last.pt").read_bytes()
    assert "is complete: 2 steps" in train(*args, "--workers=0", "--log_every=2")      # such keys may change
    with pytest.raises(SystemExit, match="runs/r/last.pt belongs to another configuration: lr was 0.0003, now 0.1. Give --name="):
        train(*args, "--lr=0.1")
    assert (tmp_path / "runs/r/last.pt").read_bytes() == before
    (tmp_path / "runs/r/last.pt").write_bytes(before[:5000])
    with pytest.raises(SystemExit, match="runs/r/last.pt: not a file of torch.save"):
        train(*args)


def test_stops_at_the_first_non_finite_step_and_keeps_the_last_checkpoint(tmp_path, abdomens, monkeypatch, capsys):
    args = flags(**KINDS, **SHORT | dict(steps=9, save_every=1, warmup=0, lr=1e30))
    with pytest.raises(SystemExit, match=r"step [1-8]: not finite \(loss .*cases: 00[01]; the last good checkpoint is runs/"):
        here(monkeypatch, capsys, tmp_path, abdomens, finetune.main, "demo_classification", *args)
    assert all(value.isfinite().all() for value in weights(tmp_path / "runs/demo_classification/last.pt").values())


def test_three_steps_equal_the_same_written_out(small, monkeypatch, capsys):
    """Passes, clipping, the schedule, layer decay and AdamW, by their formulas; of the script only the crops and the network."""
    torch.manual_seed(1)
    init_file(small.parent / "encoder.pt")
    keys = SHORT | dict(steps=3, warmup=2, lr=1e-3, min_lr=1e-4, decay=0.2, clip=0.05, batch=4, accumulate=2, layer_decay=0.5, eval_every=3)
    args = flags(**TABLE, **keys, init="encoder.pt")
    here(monkeypatch, capsys, small.parent, small, finetune.main, "demo_classification", *args)
    cfg = configs.load(finetune.Config, [str(small.parent / "runs/demo_classification/config.py")])
    parts = ev.split_cases(cfg)
    scans = data.open_scans(cfg, parts["train"], lambda *_: None)
    crops = data.Crops(scans, cfg, cfg.batch, cfg.seed, {case["id"]: case["class"] for case in parts["train"]})
    torch.manual_seed(cfg.seed)
    network = Classifier(1, 2, **NETWORK)
    network.encoder.load_state_dict(torch.load(small.parent / "encoder.pt", weights_only=True)["encoder"])
    names = dict(network.named_parameters())
    m, v = ({name: torch.zeros_like(p) for name, p in names.items()} for _ in range(2))
    rates, costs, norms = (5e-4, 1e-3, 1e-3), [], []        # two steps of warm-up, then the top of the cosine
    for step, rate in enumerate(rates):
        batch = data.collate([crops[step, place] for place in range(4)])
        image, _, _ = data.moved_crops(batch, cfg)
        cost = -network(image).log_softmax(1)[torch.arange(4), batch["class"]].mean()
        grads = torch.autograd.grad(cost, list(names.values()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        costs.append(cost.item())
        norms.append(norm.item())
        assert norm > cfg.clip
        with torch.no_grad():
            for (name, p), g in zip(names.items(), grads):
                g = g * cfg.clip / norm
                depth = 0 if name.startswith("head") else 5 if "embed" in name else 4 - int(name.split(".")[2])
                lr = rate * 0.5 ** depth
                p.mul_(1 - lr * (0.2 if p.ndim > 1 else 0))
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g ** 2
                p.sub_(lr * m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    log = log_of(small.parent / "runs/demo_classification")[1:4]
    assert [line["lr"] for line in log] == pytest.approx(rates)
    assert [line["loss"] for line in log] == pytest.approx(costs, rel=1e-3)
    assert [line["grad_norm"] for line in log] == pytest.approx(norms, rel=1e-2)
    # AdamW divides by the size of a gradient, so one that is nothing but rounding (the bias of attention's keys) moves a weight
    # as far as any: first moments are compared as a whole, and weights where there is a gradient
    last = torch.load(small.parent / "runs/demo_classification/last.pt", weights_only=True)
    by_place = {id(p): name for name, p in names.items()}
    order = [by_place[id(p)] for group in finetune.groups_of(network, cfg) for p in group["params"]]
    flat = lambda values: torch.cat([values(k, name).flatten() for k, name in enumerate(order)])
    mine, theirs = flat(lambda _, name: m[name]), flat(lambda k, _: last["optimizer"]["state"][k]["exp_avg"])
    assert (mine - theirs).norm() < 1e-2 * mine.norm()
    clear, moved = mine.abs() > 1e-5, flat(lambda _, name: last["model"][name] - names[name].detach()).abs()
    assert clear.sum() > 1000 and (moved[clear] > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("scores, best", [((0.5, 0.7, 0.6), 4), ((0.3, 0.3, 0.2), 2), ((np.nan, 0.1, np.nan), 4)])
def test_the_best_validation_keeps_its_weights(small, monkeypatch, capsys, scores, best):
    seen, told = [], iter(scores)

    def validate(network, *_):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return next(told)
    monkeypatch.setattr(finetune, "validate", validate)
    args = flags(**TABLE, **SHORT | dict(steps=6))
    said = here(monkeypatch, capsys, small.parent, small, finetune.main, "demo_classification", *args)
    kept = torch.load(small.parent / "runs/demo_classification/best.pt", weights_only=True)
    assert (kept["step"], kept["score"]) == (best, scores[best // 2 - 1])
    assert all(torch.equal(kept["model"][name], value) for name, value in seen[best // 2 - 1].items())
    assert [line.endswith("best so far") for line in said.splitlines() if " val " in line][best // 2 - 1]
    assert f"best val balanced_accuracy all {scores[best // 2 - 1]:.4f}: " in said


def test_a_resumed_run_remembers_its_best(small, monkeypatch, capsys):
    told = iter((0.5, None, 0.4, 0.3))

    def validate(*_):
        score = next(told)
        if score is None:
            raise OSError("power cut")
        return score
    monkeypatch.setattr(finetune, "validate", validate)
    train = functools.partial(here, monkeypatch, capsys, small.parent, small, finetune.main, "demo_classification",
                              *flags(**TABLE, **SHORT | dict(steps=6)))
    with pytest.raises(OSError, match="power cut"):
        train()
    assert "at step 2" in train()
    kept = torch.load(small.parent / "runs/demo_classification/best.pt", weights_only=True)
    assert (kept["step"], kept["score"]) == (2, 0.5)


def test_speed_is_that_of_training_whenever_validation_comes(small, monkeypatch, capsys):
    clock = itertools.count()                               # a second passes whenever somebody looks
    monkeypatch.setattr(finetune.time, "time", lambda: float(next(clock)))

    def validate(*_):
        for _ in range(10_000):
            next(clock)
        return 0.5
    monkeypatch.setattr(finetune, "validate", validate)
    for name, every in (("late", 9), ("within", 4)):
        here(monkeypatch, capsys, small.parent, small, finetune.main, "demo_classification",
             *flags(**TABLE, **SHORT | dict(steps=9, log_every=9, eval_every=every, save_every=99), name=name))
    late, within = (next(line["crops_per_s"] for line in log_of(small.parent / "runs" / name) if "loss" in line) for name in ("late", "within"))
    assert within == pytest.approx(late, rel=0.2)


def test_losses_of_the_tasks_see_their_own_channel_and_place():
    torch.manual_seed(0)
    cfg = settings("brats21", finetune.Config)              # {"TC": .., "WT": .., "ET": ..}
    label = torch.randint(0, 4, (2, 1, 6, 5, 4))
    output = torch.full((2, 3, 6, 5, 4), -9.0)
    for k, group in enumerate(cfg.regions.values()):        # each channel says its own region, and nothing else
        for member in group:
            output[:, k][label[:, 0] == member] = 9.0
    loss = lambda said: ev.TASKS["segmentation"].loss(said, {"label": label}, cfg)
    assert loss(output) < 0.01 and all(loss(output[:, order]) > 1 for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0)))
    target, guess = torch.randn(2, 1, 6, 5, 4), torch.randn(2, 1, 6, 5, 4)
    fill = torch.tensor([[-0.5], [0.1]])
    target[:, :, :3] = fill[:, :, None, None, None]         # half of it is air
    error = np.abs((guess - target).numpy())
    body = target.numpy() > fill.numpy()[:, :, None, None, None] + 0.01
    assert not body[:, :, :3].any() and 20 < body.sum() < 120
    expected = np.mean([(e[b] + e[b] ** 2).mean() for e, b in zip(error, body)])
    loss = ev.TASKS["translation"].loss(guess, {"target": target, "target_fill": fill}, settings("brats23_t1_to_t2", finetune.Config))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# who trains, who chooses, who is reported

@pytest.fixture
def split(tmp_path, monkeypatch):
    """split(config, files below the root, keys) -> {part: [case]}; nothing is read but the names."""
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))

    def cases(name, files, **keys):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return ev.split_cases(settings(name, **keys))
    return cases


def ids(part):
    return [case["id"] for case in part]


def subjects(part):
    return {case["subject"] for case in part}


def apart(parts):
    """No subject in two parts."""
    pairs = itertools.combinations([part for part in parts if part != "test" or parts["test"] is not parts["val"]], 2)
    return all(not subjects(parts[a]) & subjects(parts[b]) for a, b in pairs)


def studies(patients):
    """AutoPET's tree, with 1 to 3 studies a patient."""
    return [f"FDG-PET-CT-Lesions/PETCT_{k:04x}/{study}/{file}.nii.gz" for k in range(patients) for study in range(1 + k % 3)
            for file in ("SUV", "CTres", "SEG")]


@pytest.mark.parametrize("fold", range(5))
def test_autopet_divides_patients_by_nnunets_rule_and_never_their_studies(split, fold):
    parts = split("autopet", studies(23), fold=fold)
    assert apart(parts) and len(parts["train"]) + len(parts["val"]) == sum(1 + k % 3 for k in range(23))
    assert subjects(parts["val"]) == {f"PETCT_{k:04x}" for k in range(fold, 23, 5)} and parts["test"] == parts["val"]


def test_autopet_takes_the_ct_as_a_second_channel(split):
    folder = "FDG-PET-CT-Lesions/{subject}/{study}/"
    parts = split("autopet", studies(6), image=(folder + "SUV.nii.gz", folder + "CTres.nii.gz"), in_channels=2)
    assert all([Path(p).name for p in case["images"]] == ["SUV.nii.gz", "CTres.nii.gz"] for case in parts["train"] + parts["val"])


@pytest.mark.parametrize("name", ["brats23_t1_to_t2", "udpet"])
def test_shares_are_of_subjects_and_do_not_depend_on_the_order_of_files(split, name):
    brats = "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-{0:05d}-{1:03d}/BraTS-GLI-{0:05d}-{1:03d}-{2}.nii.gz"
    files = [brats.format(k, visit, c) for k in range(50) for visit in range(1 + k % 2) for c in ("t1n", "t2w", "t1c")]
    files += [f"UDPET/{k:03d}/{dose}.nii.gz" for k in range(50) for dose in ("drf_50", "drf_20", "full")]
    parts = split(name, files)
    assert apart(parts) and [len(subjects(parts[p])) for p in ("test", "val", "train")] == [10, 4, 36]   # 0.2 of 50, 0.1 of 40
    assert {p: ids(c) for p, c in split(name, files[::-1]).items()} == {p: ids(c) for p, c in parts.items()}
    assert ids(split(name, files, split_seed=1)["test"]) != ids(parts["test"])


def adni(split, groups, **keys):
    rows = [f"I{k}{v},{k},{g}" for k, g in enumerate(groups) for v in range(1 + k % 2)]
    split("demo_translation", [f"ADNI/{k:03d}/d/t/I{k}{v}/x.nii" for k in range(len(groups)) for v in range(1 + k % 2)],
          image="ADNI/{subject}/d/t/{scan}/x.nii", target="ADNI/{subject}/d/t/{scan}/x.nii")
    (data.root(settings("adni")) / "ADNI/ADNI.csv").write_text("\n".join(["Image Data ID,Subject,Group", *rows]))
    return split("adni", (), image="ADNI/{subject}/{description}/{date}/{scan}/*.nii", **keys)


GROUPS = ["CN"] * 20 + ["SMC"] * 20 + ["EMCI"] * 10 + ["LMCI"] * 10 + ["MCI"] * 10 + ["AD"] * 10


def per_class(part):
    return [len({case["subject"] for case in part if case["class"] == k}) for k in range(3)]


def test_classification_shares_keep_the_mixture_of_classes(split):
    parts = adni(split, GROUPS)
    assert apart(parts) and [per_class(parts[p]) for p in ("test", "val", "train")] == [[8, 6, 2], [3, 2, 1], [29, 22, 7]]


@pytest.mark.parametrize("name", ["adni", "autopet"])
def test_label_fractions_are_nested_and_leave_the_other_parts_alone(split, name):
    parts = {f: adni(split, GROUPS, label_fraction=f) if name == "adni" else split("autopet", studies(50), label_fraction=f)
             for f in (0.1, 0.5, 1.0)}
    small, half, full = (subjects(parts[f]["train"]) for f in parts)
    assert small < half < full and all(parts[0.1][p] == parts[0.5][p] == parts[1.0][p] for p in ("val", "test"))
    assert all(case in parts[1.0]["train"] for case in parts[0.1]["train"])
    if name == "adni":
        assert [per_class(parts[f]["train"]) for f in parts] == [[3, 2, 1], [14, 11, 4], [29, 22, 7]]
    else:
        assert [len(s) for s in (small, half, full)] == [4, 20, 40]
        kept = [case for case in parts[1.0]["train"] if case["subject"] in small]
        assert parts[0.1]["train"] == kept                  # with all of their studies


def test_cc_ccii_reports_the_scans_that_all_valid_lists_share(split, tmp_path):
    lay_cc_ccii(tmp_path, None)
    for fold in range(3):                                   # of the lists of another fold too
        lists = [f"CC-CCII/csv/CC_CCII_fold{fold}_{part}.csv" for part in ("train", "valid")]
        parts = split("cc_ccii", (), only=tuple(lists), val=lists[1])
        by_role = {role: sorted(f"{kind}_{patient}_{scan}" for kind, patient, scan, r in CCII if r == role) for role in range(4)}
        assert sorted(ids(parts["test"])) == by_role[0] and sorted(ids(parts["val"])) == by_role[fold + 1] and apart(parts)
        assert sorted(ids(parts["train"])) == sorted(by_role[(fold + 1) % 3 + 1] + by_role[(fold + 2) % 3 + 1])
        for case in sum(parts.values(), []):
            assert case["class"] == ("Normal", "CP", "NCP").index(case["id"].split("_")[0])


def test_folds_and_sections_of_a_datalist(split, tmp_path):
    entries = [{"image": f"{k}.nii.gz", "label": f"{k}_l.nii.gz", "fold": k % 3} for k in range(9)]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries, "validation": entries[:2], "test": entries[3:5]}))
    source = dict(image=(), label="", datalist="list.json")
    parts = split("brats21", (), **source, fold=1)
    assert ids(parts["val"]) == ["1", "4", "7"] and ids(parts["train"]) == ["0", "2", "3", "5", "6", "8"]
    parts = split("btcv", (), **source, section="test", val_section="validation", val=(), test="val")
    assert ids(parts["train"]) == ["3", "4"] and ids(parts["val"]) == ["0", "1"]
    with pytest.raises(SystemExit, match="2 subjects are in train and in val: 0, 1$"):
        split("btcv", (), **source, val_section="validation", val=(), test="val")


def test_a_test_list_that_shares_a_subject_with_training_is_refused(split):
    with pytest.raises(SystemExit, match="^1 subjects are in train and in test: PETCT_0001$"):
        split("autopet", studies(9), test=("PETCT_0001_0", "PETCT_0003_0"))
    with pytest.raises(SystemExit, match="^1 subjects are in val and in test: PETCT_0005$"):
        split("autopet", studies(11), test=("PETCT_0005_0", "PETCT_0003_0"))


@pytest.mark.parametrize("keys, text", [
    (dict(val=("0035", "0099")), "the split names '0099', no case has such an id; there are: 0001, 0002, 0035, 0036 .."),
    (dict(val="00*"), "no case is left for train; the config gives val = '00*', test = 'val', "),
    (dict(val=()), "no case is left for val; the config gives val = (), test = 'val', "),
    (dict(val="0035", test=""), "no case is left for test; the config gives val = '0035', test = '', "),
])
def test_an_empty_part_is_an_error(split, keys, text):
    folder, numbers = "BTCV/Abdomen/RawData/Training", ("0001", "0002", "0035", "0036")
    files = [f"{folder}/{part}/{part}{n}.nii.gz" for part in ("img", "label") for n in numbers]
    with pytest.raises(SystemExit) as caught:
        split("btcv", files, **keys)
    assert str(caught.value).removesuffix("val_share = 0.0, test_share = 0.0, fold = -1") == text


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one line each, before any training step

BOX = np.indices((16, 16, 16)).sum(0)                       # an image, and the source of its label


@pytest.fixture
def small(tmp_path):
    """Four small labelled scans with ids 0 to 3, of which 2 chooses and 3 is reported; spoil one and try."""
    for k in range(4):
        for part, voxels in (("img", BOX * (k + 1)), ("lab", BOX > 20)):
            nifti(tmp_path / f"data/s{k}_{part}.nii.gz", voxels)
    (tmp_path / "data/t.csv").write_text("id,class\n0,a\n1,b\n2,a\n3,b\n")
    return tmp_path / "data"


SMALL = dict(image="s{id}_img.nii.gz", label="s{id}_lab.nii.gz", labels={1: "one"}, val=("2",), test=("3",), crop=(64, 64, 64),
             foreground=-1.0, label_fraction=1.0, workers=0, **NETWORK)
TABLE = dict(image="s{id}_img.nii.gz", table="t.csv", table_key="{id}", case_key="{id}", class_from="{class}", workers=0,
             classes={"a": 0, "b": 1}, val=("2",), test=("3",), val_share=0.0, test_share=0.0, foreground=-1.0,
             resize=(64, 64, 64), **NETWORK)


@pytest.fixture
def refused(small, monkeypatch, capsys):
    """refused(keys, config) -> the text that finetune.py ended with; nothing was trained."""
    def run(keys={}, config="demo_segmentation", main=finetune.main, training=SHORT):
        base = {"demo_segmentation": SMALL, "demo_classification": TABLE}[config]
        with pytest.raises(SystemExit) as caught:
            here(monkeypatch, capsys, small.parent, small, main, config, *flags(**base | training | keys))
        assert not list(small.parent.glob("runs/*/log.jsonl")) and "step      " not in capsys.readouterr().out
        line, *count = str(caught.value).split("\n")
        assert count in ([], ["1 unusable; mend them or name their ids under `exclude`"])      # the latter of the cache
        return line
    return run


def encoder_file(path, **other):
    encoder = Swin3D(**NETWORK | other)
    save(path, dict(format="s2dc/encoder", encoder=encoder.state_dict(), arguments=encoder.arguments))
    return encoder


def test_an_unspoilt_set_trains(small, monkeypatch, capsys):
    for config, base in (("demo_segmentation", SMALL), ("demo_classification", TABLE)):
        here(monkeypatch, capsys, small.parent, small, finetune.main, config, *flags(**base, **SHORT | dict(steps=1)))
        run = small.parent / "runs" / config
        assert [line.get("step") for line in log_of(run)] == [None, 1, 1] and np.isfinite(log_of(run)[1]["loss"])
        assert torch.load(run / "best.pt", weights_only=True)["subjects"] == ["0", "1"]


@pytest.mark.parametrize("file, text", [
    (None, "init = 'w.pt', no such file"),
    ("hello", "w.pt: not a file of torch.save ("),
    (dict(feature_size=8), "w.pt: does not fit the model: feature_size is 8 in the file, 4 in the model"),
    (dict(v2=False), "w.pt: does not fit the model: v2 is False in the file, True in the model"),
    (dict(merge="legacy"), "w.pt: does not fit the model: merge is legacy in the file, all in the model"),
    (dict(in_channels=2), "w.pt: in_channels is 2 in the file, 1 in the model; only 1 can be spread over several"),
])
def test_checkpoints_that_do_not_fit(refused, small, file, text):
    if isinstance(file, str):
        (small.parent / "w.pt").write_text(file)
    elif file:
        encoder_file(small.parent / "w.pt", **file)
    assert refused(dict(init="w.pt")).startswith(text)


def spoil(small, part, voxels, affine=np.eye(4), kind=np.float32):
    nifti(small / f"s1_{part}.nii.gz", voxels, affine, kind=kind)


@pytest.mark.parametrize("keys, change, text", [
    ({}, lambda s: spoil(s, "lab", BOX[:15] > 20), "s1_lab.nii.gz: shape (15, 16, 16) (RAS), but s1_img.nii.gz has (16, 16, 16)"),
    ({}, lambda s: spoil(s, "lab", BOX > 20, np.eye(4) + np.eye(4, k=3)),
     "s1_lab.nii.gz: lies up to 1 mm away from s1_img.nii.gz (different affines)"),
    ({}, lambda s: spoil(s, "lab", (BOX > 20) * 0.5), "s1_lab.nii.gz: label ids must be whole numbers, found 0.5"),
    ({}, lambda s: spoil(s, "lab", (BOX > 20) * 1 + (BOX > 30) * 6), "s1_lab.nii.gz: holds label ids 7; declared are 0 and 1"),
    (dict(labels={1: "a", 2: "b", 3: "c"}, remap={4: 3}), lambda s: spoil(s, "lab", (BOX > 20) * 3 + (BOX > 30)),
     "s1_lab.nii.gz: holds both id 4 and the id 3 that it would be renamed to; if they are to be one, remap needs 3: 3 too"),
    ({}, lambda s: (s / "s1_lab.nii.gz").unlink(), "s1_lab.nii.gz: no such file, expected beside {s}/s1_img.nii.gz"),
    (dict(in_channels=2), lambda s: None, "s0_img.nii.gz: the scan has 1 channels, in_channels = 2"),
])
def test_scans_that_do_not_fit(refused, small, keys, change, text):
    change(small)
    assert refused(keys) == f"{small}/" + text.format(s=small)


def test_a_case_of_a_datalist_without_a_label(refused, small):
    entries = [{"image": f"s{k}_img.nii.gz", "label": f"s{k}_lab.nii.gz"} for k in range(4)]
    del entries[1]["label"]
    (small / "list.json").write_text(json.dumps({"training": entries}))
    source = dict(image=(), label="", datalist="list.json", val="s2_img", test="s3_img")
    assert refused(source) == f"{small}/s1_img.nii.gz: a train case without label"
    assert refused(source | dict(val="s1_img")) == f"{small}/s1_img.nii.gz: a val case without label"


def test_a_list_of_validation_cases_after_test_took_all(refused, small):
    (small / "val.csv").write_text("id\n2\n")
    assert refused(dict(val="val.csv", test="*", table_key="{id}")) == "val.csv names none of the 0 cases; another part of the split has taken all"


@pytest.mark.parametrize("keys, text", [
    (dict(task="guessing"), "task = 'guessing', expected one of segmentation, classification, reconstruction, translation"),
    (dict(val=()), "no case is left for val; "),
    (dict(labels={1: "a", 3: "b"}), "labels: ids must be 1 to 2 without gaps (rename with `remap`), found [1, 3]"),
    (dict(labels={}), "segmentation needs `labels` = {id: name}"),
    (dict(regions={"WT": (1, 2)}), "regions: id [2] is not in `labels`"),
    (dict(task="translation"), "translation needs `target`, the image to be predicted"),
    (dict(task="classification", classes={"a": 0, "b": 2}), "classes: numbers must be 0, 1, .. without gaps, found [0, 2]"),
    (dict(task="classification", classes={"a": 0, "b": 1}), "classification sees whole scans: give `resize`, the voxels that "),
    (dict(crop=(64, 64, 48)), "crop = (64, 64, 48), expected multiples of 32, at least 64"),
    (dict(batch=3, crops_per_case=2), "batch = 3 is no multiple of crops_per_case = 2"),
    (dict(batch=3, accumulate=2), "batch = 3 does not divide into 1 processes x 2 accumulated passes"),
    (dict(accumulate=0), "batch = 1 does not divide into 1 processes x 0 accumulated passes"),
    (dict(freeze_encoder=True), "freeze_encoder without init would keep random weights"),
    (dict(positive=1.5), "positive = 1.5, expected 0 to 1"),
    (dict(label_fraction=0.0), "label_fraction = 0.0, expected above 0, at most 1"),
    (dict(steps=0), "steps, log_every, eval_every, save_every must be above 0"),
    (dict(overlap=1.0), "overlap = 1.0, expected 0 or more, below 1"),
    (dict(overlap=-0.1), "overlap = -0.1, expected 0 or more, below 1"),
    (dict(resize=(64, 64, 96)), "resize = (64, 64, 96) and crop = (64, 64, 64) must agree"),
    (dict(task="classification", classes={"a": 0}), "classification needs `classes` = {name: number}"),
    (dict(balance=1.5), "balance = 1.5, expected 0 to 1"),
    (dict(balance=0.5, regions={"all": (1,)}), "balance acts on segmentation of `labels` alone"),
    (dict(blend="linear"), "blend = 'linear', expected 'gaussian' or 'constant'"),
    (dict(part="all"), "part = 'all', expected 'train', 'val' or 'test'"),
])
def test_keys_that_cannot_be(refused, keys, text):
    assert refused(keys).startswith(text)


@pytest.mark.parametrize("keys, rows, text", [
    ({}, "0,a\n1,c\n2,a\n3,b", "{s}/s1_img.nii.gz: class 'c' is not declared; classes: a, b"),
    ({}, "0,a\n2,a\n3,b", "{s}/s1_img.nii.gz: t.csv has no row '1'"),
    (dict(table="no.csv"), "", "{s}/no.csv: no such table"),
    (dict(table_key="{name}"), "0,a", "{s}/t.csv: no column 'name'; columns: id, class"),
    (dict(class_from="{group}"), "0,a\n1,b\n2,a\n3,b", "class_from = '{{group}}': no 'group' in id, class"),
    (dict(case_key="{patient}"), "0,a\n1,b\n2,a\n3,b", "case_key = '{{patient}}': no 'patient' in id, subject"),
    ({}, "0,a\n1,b,x\n2,a\n3,c", "{s}/s3_img.nii.gz: class 'c' is not declared; classes: a, b"),     # x: a field too many
])
def test_tables_that_do_not_fit(refused, small, keys, rows, text):
    (small / "t.csv").write_text(f"id,class\n{rows}\n")
    assert refused(keys, "demo_classification") == text.format(s=small)


def test_scripts_end_with_one_line_on_the_terminal(small):
    spoil(small, "lab", (BOX > 20) * 9)
    args = command("finetune.py", "demo_segmentation", *flags(**SMALL, **SHORT))
    done = subprocess.run(args, cwd=small.parent, env=environment(small), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines() == [f"{small}/s1_lab.nii.gz: holds label ids 9; declared are 0 and 1",
                                        "1 unusable; mend them or name their ids under `exclude`"]


# ---------------------------------------------------------------------------------------------------------------------
# starting weights

def init_file(path, **other):
    """A file as pre-training leaves it, trained under the preprocessing of configs/demo.py."""
    encoder = encoder_file(path, **other)
    content = torch.load(path, weights_only=True) | {"preprocessing": data.preprocessing(settings("demo", data.Config))}
    save(path, content)
    return encoder


def test_encoder_is_loaded_whole_and_its_preprocessing_compared(small, monkeypatch, capsys):
    encoder = init_file(small.parent / "encoder.pt")
    cfg = settings("demo_segmentation", finetune.Config, init=str(small.parent / "encoder.pt"), window=(-160.0, 240.0),
                   spacing=(1.5, 1.5, 2.0), **NETWORK)
    torch.manual_seed(5)
    network, lines = ev.TASKS["segmentation"].network(cfg), []
    finetune.start_from(network, cfg, lines.append)
    for name, value in encoder.state_dict().items():
        assert torch.equal(network.encoder.state_dict()[name], value)
    assert [line.strip() for line in lines] == [
        "preprocessing differs: window was (-175.0, 250.0) in training, is (-160.0, 240.0) here",
        "preprocessing differs: spacing was () in training, is (1.5, 1.5, 2.0) here"]
    assert "loaded 126 of 126" in capsys.readouterr().out
    encoder_file(small.parent / "encoder.pt")
    finetune.start_from(network, cfg, lines.append)
    assert lines[2:] == [f"{cfg.init} does not say under which preprocessing it was trained"]


def test_one_channel_is_spread_over_the_four_of_brats(tmp_path):
    encoder = init_file(tmp_path / "encoder.pt")
    cfg = settings("brats21", finetune.Config, init=str(tmp_path / "encoder.pt"), **NETWORK)
    network = ev.TASKS["segmentation"].network(cfg)
    finetune.start_from(network, cfg, lambda *_: None)
    mine, theirs = network.encoder.state_dict(), encoder.state_dict()
    torch.testing.assert_close(mine.pop("embed.weight"), theirs.pop("embed.weight").repeat(1, 4, 1, 1, 1) / 4)
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    volume = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():                                   # four equal channels give what the one gave
        for a, b in zip(network.encoder(volume.expand(1, 4, 64, 64, 64)), encoder(volume)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keys", [dict(freeze_encoder=True), dict(layer_decay=0.0)])
def test_a_frozen_encoder_stays_and_the_head_learns(small, monkeypatch, capsys, keys):
    """layer_decay 0 leaves nothing of the learning rate from the last stage on: the factors do reach the optimizer."""
    encoder = init_file(small.parent / "encoder.pt")
    args = flags(**TABLE, **SHORT | dict(decay=0.1), init="encoder.pt", **keys)
    here(monkeypatch, capsys, small.parent, small, finetune.main, "demo_classification", *args)
    trained, moved = weights(small.parent / "runs/demo_classification/last.pt"), []
    for name, value in trained.items():
        if name.startswith("encoder."):
            assert torch.equal(value, encoder.state_dict()[name.removeprefix("encoder.")])
    torch.manual_seed(settings("demo_classification").seed)
    for name, value in Classifier(1, 2, **NETWORK).state_dict().items():
        moved += [not torch.equal(trained[name], value)] if name.startswith("head.") else []
    assert all(moved) and len(moved) == 4


def test_layer_decay_gives_each_stage_its_factor():
    network = SwinUNETR(1, 3, **NETWORK)
    network.skips.requires_grad_(False)
    cfg = settings("btcv", finetune.Config, layer_decay=0.5, decay=0.01)
    groups = finetune.groups_of(network, cfg)
    found = {id(p): (group["factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    powers = {"encoder.embed": 5, "encoder.stages.0": 4, "encoder.stages.1": 3, "encoder.stages.2": 2, "encoder.stages.3": 1}
    for name, p in network.named_parameters():
        if name.startswith("skips."):
            assert id(p) not in found
        else:
            power = next((k for start, k in powers.items() if name.startswith(start + ".")), 0)
            assert found[id(p)] == (0.5 ** power, 0.01 if p.ndim > 1 else 0.0), name


def test_learning_rate_warms_up_and_falls_to_its_least():
    cfg = settings("btcv", finetune.Config, steps=100, warmup=10, lr=1.0, min_lr=0.1)
    assert [finetune.lr_at(step, cfg) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert finetune.lr_at(55, cfg) == pytest.approx(0.55) and finetune.lr_at(99, cfg) == pytest.approx(0.1, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# training crops

STILL = dict(rotation=(0.0, 0.0, 0.0), scale=(1.0, 1.0), shift=(0.0, 0.0, 0.0), flip=(0.0, 0.0, 0.0), shear=0.0)
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
        usual = dict(image="s{id}_img.nii.gz", label="s{id}_lab.nii.gz", spacing=(), window=(0.0, 1.0), intensity="scale",
                     foreground=-9.0, cache=str(tmp_path / "cache"), crop=(20, 20, 20), labels={}, workers=0)
        cfg = settings("btcv", finetune.Config, **usual | QUIET | keys)
        return data.open_scans(cfg, say=lambda *_: None), cfg
    return make


@pytest.mark.parametrize("moves", [STILL, dict(rotation=(0.0, 0.0, 15.0), scale=(0.9, 1.1), flip=(0.2, 0.2, 0.2))])
def test_every_positive_crop_shows_the_class_that_was_drawn(scans, moves):
    label = np.zeros((60, 60, 60))
    label[12, 13, 14], label[44:47, 46, 45] = 1, 2          # farther apart than a crop: it can hold one of them alone
    found, cfg = scans([label], positive=1.0, crops_per_case=1, **moves)
    crops = data.Crops(found, cfg, 1, 0)
    shown = [torch.unique(data.moved_crops(data.collate([crops[step, 0]]), cfg)[1]).tolist() for step in range(60)]
    kinds = [set(ids) - {0} for ids in shown]
    assert all(len(kind) == 1 for kind in kinds) and 15 < sum(kind == {1} for kind in kinds) < 45


def test_image_and_label_go_through_one_matrix(scans):
    x = rearrange(np.indices((40, 44, 36)), "c x y z -> x y z c")
    label = (((x - [18, 22, 17]) / [11, 7, 9]) ** 2).sum(-1) < 1
    found, cfg = scans([label], rotation=(40.0, 40.0, 40.0), scale=(0.7, 1.3), shear=0.2, shift=(5.0, 5.0, 5.0),
                       flip=(0.5, 0.5, 0.5), crop=(32, 32, 32))
    crops = data.Crops(found, cfg, 8, 1)
    image, label, _ = data.moved_crops(data.collate([crops[step, 0] for step in range(8)]), cfg)
    assert torch.equal(label[image > 0.999], torch.ones_like(label[image > 0.999]))        # all eight neighbours are 1
    assert not label[image.abs() < 1e-3].any()
    assert ((image > 0.5) == (label > 0)).float().mean() > 0.995 and (label > 0).float().mean() > 0.02
    grid = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij"))
    centre = [(grid * weight.clamp(0, 1)).sum((2, 3, 4)) / weight.clamp(0, 1).sum((2, 3, 4)) for weight in (image, label.float())]
    torch.testing.assert_close(centre[0], centre[1], rtol=0, atol=0.1)


def same(a, b):
    return a["id"] == b["id"] and all(torch.equal(a[key], b[key]) for key in a if key != "id")


def test_a_crop_depends_on_seed_step_and_place_alone(scans):
    rng = np.random.default_rng(0)
    found, cfg = scans([(rng.random((30, 30, 30)) > 0.9) * 1.0 for _ in range(3)], crops_per_case=2)
    where = [(step, place) for step in range(3) for place in range(4)]
    first, second = data.Crops(found, cfg, 4, 7), data.Crops(found, cfg, 4, 7)
    items = {w: first[w] for w in where}
    assert all(same(second[w], items[w]) for w in where[::-1])
    assert not any(same(items[a], items[b]) for a, b in itertools.combinations(where, 2))
    assert not any(same(data.Crops(found, cfg, 4, 8)[w], items[w]) for w in where)
    for step in range(3):                                   # the two crops of a case, and an epoch visits every case
        assert items[step, 0]["id"] == items[step, 1]["id"] and items[step, 2]["id"] == items[step, 3]["id"]
    order = [items[step, place]["id"] for step in range(3) for place in (0, 2)]
    assert sorted(order[:3]) == sorted(order[3:]) == ["0", "1", "2"]


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (2, 1), (4, 2), (1, 8)])
def test_ranks_and_passes_share_out_the_same_places(ranks, accumulate):
    cfg = settings("btcv", finetune.Config, batch=8, steps=5, accumulate=accumulate)
    passes = [list(finetune.places(cfg, rank, ranks, 2)) for rank in range(ranks)]
    assert all(len(each) == 3 * accumulate for each in passes)
    for n, step in enumerate((2, 3, 4)):
        mine = [w for each in passes for part in each[n * accumulate:(n + 1) * accumulate] for w in part]
        assert mine == [(step, place) for place in range(8)]


def test_scans_without_an_object_and_smaller_than_a_crop(scans):
    label = np.zeros((30, 30, 30))
    block = np.zeros((6, 9, 30))
    block[3, 4, 20] = 1
    found, cfg = scans([label, block], positive=1.0, crops_per_case=1, **STILL)
    crops = data.Crops(found, cfg, 1, 0)
    for step in range(8):
        item = crops[step, 0]
        image, label, _ = data.moved_crops(data.collate([item]), cfg)
        assert image.shape == (1, 1, 20, 20, 20) and label.any() == (item["id"] == "1")
        if item["id"] == "1":                               # centred; around the scan its least value
            assert label[0, 0, 10, 9, :].any()
            np.testing.assert_allclose(np.delete(image[0, 0].numpy(), np.s_[7:13], 0), -1, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# scores and files

def perfect(scan, cfg):
    """Probabilities (k, x, y, z) that name the truth."""
    truth = torch.from_numpy(scan.open("label")[0].astype(np.int64))
    if cfg.regions:
        return ev.masks_of(truth, cfg).float()
    return rearrange(torch.nn.functional.one_hot(truth, 1 + max(cfg.labels)), "x y z k -> k x y z").float()


@pytest.fixture
def organs(abdomens, monkeypatch, tmp_path):
    """organs(ids, keys) -> (scans of the demo, config)."""
    monkeypatch.setenv("S2DC_DATA", str(abdomens))

    def make(numbers, **keys):
        cfg = settings("demo_segmentation", **DEMO | dict(cache=str(tmp_path / "cache"), hd95=True) | keys)
        return data.open_scans(cfg, [case for case in data.find_cases(cfg) if case["id"] in numbers], say=lambda *_: None), cfg
    return make


def test_a_perfect_prediction_scores_1_on_both_grids_and_is_the_label_file(organs, tmp_path):
    found, cfg = organs(("001", "002"))
    stored = set()
    for scan in found:
        ready = perfect(scan, cfg)
        scores = ev.score_segmentation(ready, scan, cfg, full=True)
        for grid in ("preprocessed", "original"):
            assert list(scores[grid]["dice"].values()) == [1.0] * 14 and list(scores[grid]["hd95"].values()) == [0.0] * 14
        ev.write_prediction(tmp_path, scan, ready, dataclasses.replace(cfg, probabilities=True))
        written, truth = nib.load(tmp_path / f"{scan.id}.nii.gz"), nib.load(scan.case["label"])
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(truth.dataobj))
        np.testing.assert_array_equal(written.affine, truth.affine)
        several = nib.load(tmp_path / f"{scan.id}_probabilities.nii.gz")
        np.testing.assert_array_equal(several.get_fdata().argmax(-1), np.asarray(truth.dataobj))
        np.testing.assert_array_equal(several.affine, truth.affine)
        stored.add("".join(nib.aff2axcodes(written.affine)))
    assert stored == {"LPS", "PSR"}


def test_a_resampled_perfect_prediction_stays_close_on_the_scans_own_voxels(organs):
    (scan,), cfg = organs(("002",), spacing=(3.0, 5.0, 4.0))
    scores = ev.score_segmentation(perfect(scan, cfg), scan, cfg, full=True)
    assert set(scores["preprocessed"]["dice"].values()) == {1.0}
    assert 0.85 < scores["original"]["dice"]["mean"] < 1 and scores["original"]["dice"]["liver"] > 0.95


def test_hand_made_dice_and_absent_classes(scans):
    label = np.zeros((12, 10, 8))
    label[2:6, 2:6, 2:6] = 1                                # 64 voxels
    (scan,), cfg = scans([label], labels={1: "cube", 2: "ghost", 3: "nothing"})
    guess = np.zeros(label.shape, int)
    guess[4:8, 2:6, 2:6] = 1                                # 64, half of them in common
    guess[0, 0, 0] = 2                                      # absent from the truth alone; 3 from both
    ready = rearrange(torch.nn.functional.one_hot(torch.from_numpy(guess), 4), "x y z k -> k x y z").float()
    for grid, scores in ev.score_segmentation(ready, scan, cfg, full=True).items():
        assert scores["dice"]["cube"] == 0.5 and scores["dice"]["ghost"] == 0 and np.isnan(scores["dice"]["nothing"])
        assert scores["dice"]["mean"] == 0.25               # NaN is left out, 0 is not
        assert scores["hd95"]["cube"] == 2.0 and scores["hd95"]["ghost"] == np.inf and np.isnan(scores["hd95"]["nothing"])
        assert scores["hd95"]["mean"] == 2.0


def test_regions_overlap_and_are_painted_so_that_none_is_lost(scans, tmp_path):
    label = np.zeros((12, 10, 8))
    label[1:9, 1:9, 1:7], label[2:6, 2:6, 2:6], label[3:5, 3:5, 3:5] = 2, 1, 3
    keys = {key: getattr(settings("brats21"), key) for key in ("labels", "regions")}
    (scan,), cfg = scans([label], **keys)
    ready = perfect(scan, cfg)
    assert [int(mask.sum()) for mask in ready] == [64, 384, 8]          # TC, WT, ET
    scores = ev.score_segmentation(ready, scan, cfg, full=True)
    assert all(list(scores[grid]["dice"].values()) == [1.0] * 4 for grid in scores)
    ev.write_prediction(tmp_path, scan, ready, cfg)
    np.testing.assert_array_equal(nib.load(tmp_path / "0.nii.gz").get_fdata(), label)
    reverse = dataclasses.replace(cfg, regions=dict(reversed(cfg.regions.items())))
    np.testing.assert_array_equal(ev.painted(ev.masks_of(torch.from_numpy(label.astype(int)), reverse), reverse), label)


def test_summary_is_the_mean_over_cases_with_its_bootstrap_interval():
    cfg = settings("msd_liver")
    rows = [dict(id=k, scores={"original": {"dice": dict(liver=a, tumour=b), "hd95": dict(liver=c)}})
            for k, (a, b, c) in enumerate([(0.2, np.nan, 3.0), (0.6, 0.5, np.inf)])]
    dice, hd95 = (ev.summarise(rows, cfg)["original"][metric] for metric in ("dice", "hd95"))
    # of two cases a quarter of the draws is twice the first, a quarter twice the second
    assert dice["liver"] == pytest.approx(dict(mean=0.4, low=0.2, high=0.6, cases=2))
    assert dice["tumour"]["mean"] == 0.5 and dice["tumour"]["cases"] == 1 and np.isnan(dice["tumour"]["low"])
    assert hd95["liver"]["mean"] == 3.0 and hd95["liver"]["missed"] == 1 and hd95["liver"]["cases"] == 1


def test_each_channel_is_padded_with_its_own_value(scans, tmp_path):
    block = np.zeros((10, 30, 40))
    block[5, 5, 5] = 1
    scans([block])
    nifti(tmp_path / "s0_two.nii.gz", block * 7 + 3, kind=np.float32)   # least value 3, the first channel's -1
    two = "s{id}_img.nii.gz", "s{id}_two.nii.gz"
    (scan,), cfg = scans([block], image=two, in_channels=2, crop=(64, 64, 64), labels={1: "a"})
    seen = []

    def network(x):
        seen.append(x.clone())
        return torch.zeros(len(x), 2, *x.shape[2:])
    network.eval = lambda: None
    ev.predict([network], scan, cfg, torch.device("cpu"))
    np.testing.assert_allclose(scan.fill, [-1, 3])
    inside = seen[0][0, :, 27:37, 17:47, 12:52]
    np.testing.assert_allclose(inside, scan.open().astype(np.float32), atol=1e-5)
    assert seen[0][0, 0].sum() == pytest.approx(float(inside[0].sum()) - (64**3 - 12000), rel=1e-5)
    assert seen[0][0, 1].sum() == pytest.approx(float(inside[1].sum()) + 3 * (64**3 - 12000), rel=1e-5)


# evaluate.py on networks that were never trained: what it writes is what they say

def checkpoint_file(path, cfg, seed, subjects=(), **other):
    torch.manual_seed(seed)
    network = ev.TASKS[cfg.task].network(cfg)
    for p in network.parameters():                          # untrained outputs hardly differ
        p.data *= 1.5
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, finetune.checkpoint(network, cfg, 0, 0.0, list(subjects), dataclasses.asdict(cfg) | other, ev.versions()))
    return network.eval()


@pytest.fixture
def judged(abdomens, monkeypatch, capsys, tmp_path):
    """judged(config, keys) -> what evaluate.py printed; and two checkpoints a.pt, b.pt of the demo of segmentation."""
    cfg = settings("demo_segmentation", **DEMO)
    networks = [checkpoint_file(tmp_path / f"{name}.pt", cfg, seed) for seed, name in enumerate("ab")]
    run = lambda config="demo_segmentation", root=abdomens, **keys: here(
        monkeypatch, capsys, tmp_path, root, ev.main, config, *flags(**(DEMO if config == "demo_segmentation" else KINDS) | keys))
    run.networks, run.folder = networks, tmp_path
    return run


def probabilities(folder, number="004"):
    return nib.load(folder / f"{number}_probabilities.nii.gz").get_fdata()


def test_several_checkpoints_ensembles_flips_and_bare_scans(judged, abdomens):
    both, keys = "('a.pt', 'b.pt')", dict(probabilities=True, sheets=0)
    said = judged(checkpoint=both, out="both", **keys)
    results = json.loads((judged.folder / "both/results.json").read_text())["results"]
    a, b = (results[f"{name}.pt"]["rows"][0]["scores"]["preprocessed"]["dice"]["mean"] for name in "ab")
    assert f"b.pt minus a.pt: dice mean {b - a:+.4f}, 95 % interval" in said and "(1 cases, paired)" in said
    single = [probabilities(judged.folder / f"both/predictions_{k}") for k in range(2)]
    assert np.abs(single[0] - single[1]).max() > 1e-3
    judged(checkpoint=both, out="mean", ensemble=True, **keys)
    np.testing.assert_allclose(probabilities(judged.folder / "mean/predictions"), (single[0] + single[1]) / 2, atol=1e-6)
    # the same scan without its label: the same prediction, on the scan's own voxels
    (judged.folder / "scans").mkdir()
    source = abdomens / "demo_ct/train/imagesTr/phantom_004.nii.gz"
    os.link(source, judged.folder / "scans/new.nii.gz")
    judged(root=judged.folder, checkpoint="a.pt", images="scans/*.nii.gz", out="bare", probabilities=True)
    np.testing.assert_allclose(probabilities(judged.folder / "bare", "new"), single[0], atol=1e-6)
    label, scan = nib.load(judged.folder / "bare/new.nii.gz"), nib.load(source)
    assert label.shape == scan.shape and np.array_equal(label.affine, scan.affine) and label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(label.get_fdata(), nib.load(judged.folder / "both/predictions_0/004.nii.gz").get_fdata())
    assert sorted(p.name for p in (judged.folder / "bare").iterdir()) == ["new.nii.gz", "new_probabilities.nii.gz"]


@pytest.mark.parametrize("argv, text", [
    (["--rows={'a': {}}"], "the study needs `seeds`, `rows`, and shot_rows among them; found seeds (), rows a, shot_rows ()"),
    (["--seeds=0,", "--rows={'a': {}}", "--shot_rows=('b',)"], "found seeds (0,), rows a, shot_rows ('b',)"),
])
def test_a_study_without_rows_or_seeds_is_refused(argv, text):
    with pytest.raises(SystemExit) as caught:
        ev.main(["--study", *argv])
    assert str(caught.value).endswith(text)


def test_a_study_is_not_taken_for_a_task():
    with pytest.raises(SystemExit, match="configs/study.py holds the rows of a study; run it with --study$"):
        ev.main([str(HERE / "configs/study.py")])


@pytest.mark.skipif(not os.environ.get("S2DC_REAL_DATA"), reason="S2DC_REAL_DATA is not set")
@pytest.mark.parametrize("modality, train, tested", [("ct", 6, ["sts_042"]), ("mri", 15, ["sts_012", "sts_042"]),
                                                     ("pet", 6, ["013_pet", "019_pet", "042_pet"])])
def test_the_studies_of_real_scans_probe_patients_that_pretraining_has_not_seen(modality, train, tested):
    study = configs.load(ev.Study, [str(HERE / f"configs/study_{modality}.py")])
    keys = study.pretrain_keys | dict(data=os.environ["S2DC_REAL_DATA"])
    script = configs.load(pretrain.Config, [str(HERE / study.pretrain_config), *flags(**keys)])         # takes every key
    seen = [str(file) for case in data.find_cases(script) for file in case["images"]]
    keys = {key: value for key, value in keys.items() if hasattr(ev.Config(), key)} | study.probe_keys
    cfg = configs.load(ev.Config, [str(HERE / study.pretrain_config), *flags(**keys)], foreign=True)
    cases = [case for case in data.find_cases(ev.probe_source(cfg)) if case["label"]]
    held_out = cases[max(1, round(cfg.probe_train * len(cases))):]
    assert len(seen) == train and len(held_out) == len(tested)
    assert all(want in str(case["images"]) for want, case in zip(tested, held_out))
    patients = [re.search(r"(sts_)?(\d{3})", Path(case["images"][0]).name).group(2) for case in held_out]
    assert not any(f"sts_{patient}" in Path(file).name for patient in patients for file in seen)


def test_a_study_runs_every_row_once_and_its_table_is_what_the_runs_scored(tmp_path):
    """Two rows, one seed, two scans with labels; then the same with one more, of which only the new part may run."""
    write_phantoms(tmp_path / "data/demo_ct/train", range(3), size=64)
    write_phantoms(tmp_path / "data/demo_ct/unseen", range(50, 54), size=64)
    small = dict(NETWORK) | {"crop": (64, 64, 64)}
    (tmp_path / "study.py").write_text(f"""
name, seeds, jobs, labelled = "study", (5,), 2, 2
pretrain_config, finetune_config = {str(HERE / "configs/demo.py")!r}, {str(HERE / "configs/demo_segmentation.py")!r}
rows = {{"random": None, "in plane": {{"rotation": (0, 0, 20.0)}}}}
shot_rows = "random", "in plane"
pretrain_keys = {small | dict(slab=(64, 64, 64), probe_crop=(64, 64, 64), steps=2, warmup=1, hidden=8, embedding=8, save_every=2)!r}
probe_keys = {{"probe_train": 0.3}}
finetune_keys = {small | dict(steps=1, warmup=0, val="train_002", test="unseen_050", exclude=("unseen_05[123]",), overlap=0.0)!r}
workers = 0
""")
    study = sys.executable, str(HERE / "evaluate.py"), str(tmp_path / "study.py"), "--study"
    run = lambda *more: script(tmp_path, tmp_path / "data", *study, *more)
    with pytest.raises(AssertionError, match="labelled = 3, but .* trains on 2 subjects .train_000, train_001, ...\\n"):
        run("--shots=1,", "--labelled=3")
    first = run("--shots=1,")
    folder = tmp_path / "runs/study"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pt")}
    again = run("--shots=1,2")
    assert "probe" not in again.split("|")[0] and ", 2: " in again and ", 1: " not in again        # the rest was there
    assert all(path.stat().st_mtime_ns == t for path, t in times.items()) and len(times) >= 6
    stored = json.loads((folder / "study.json").read_text())["results"]
    assert (folder / "study.md").read_text() == again[again.index("| row"):] and first.index("| row")
    table = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in map(lambda line: line.split("|"), again.splitlines()) if len(cells) > 3}
    for row in ("random", "in plane"):
        probed = json.loads((folder / f"{row}-5/probe.json").read_text())
        assert probed["config"]["rotation"] != [0, 0, 20.0] and probed["config"]["seed"] == 5      # all rows are probed alike
        assert probed["config"]["probe_train"] == 0.3
        (encoder, numbers), = probed["probe"].items()
        assert encoder == ("random" if row == "random" else f"runs/study/{row}-5/encoder.pt")
        linear = numbers["linear"]["balanced_accuracy"]
        assert table[row][0] == f"{linear:.3f} ({linear:.3f})" and stored[f"{row}-5"]["probe"]["value"] == numbers
        for column, shots in ((5, 1), (6, 2)):
            result, = json.loads((folder / f"{row}-5-{shots}/results.json").read_text())["results"].values()
            score = result["summary"]["preprocessed"]["dice"]["mean"]["mean"]
            assert table[row][column] == f"{score:.3f} ({score:.3f})" and len(result["rows"]) == 1
            trained = torch.load(folder / f"{row}-5-{shots}/best.pt", weights_only=True)
            assert len(trained["subjects"]) == shots and trained["config"]["init"] == ("" if row == "random" else encoder)
    assert table["row"][5:] == ["Dice, 1 labelled", "Dice, 2 labelled"]


def test_flips_average_the_eight_mirrored_outputs(organs):
    (scan,), cfg = organs(("001",))
    torch.manual_seed(0)
    network = SwinUNETR(1, 14, **NETWORK).eval()
    found = ev.predict([network], scan, dataclasses.replace(cfg, flips=True), torch.device("cpu"))
    volume, total = torch.from_numpy(np.ascontiguousarray(scan.open())).float()[None], 0
    missing = [64 - n for n in scan.shape]
    before = [m // 2 for m in missing]
    for axes in itertools.chain.from_iterable(itertools.combinations((2, 3, 4), n) for n in range(4)):
        padded = torch.full((1, 1, 64, 64, 64), float(scan.fill[0]))
        x, y, z = (slice(b, b + n) for b, n in zip(before, scan.shape))
        padded[:, :, x, y, z] = volume.flip(axes)
        with torch.no_grad():
            total += network(padded).softmax(1)[:, :, x, y, z].flip(axes)
    torch.testing.assert_close(found, total[0] / 8, rtol=0, atol=1e-4)


def test_windows_of_background_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))
    body = np.full((160, 64, 64), -1000)
    body[10:50, 10:50, 10:50] = 40
    for part, voxels in (("img", body), ("lab", body > 0)):
        nifti(tmp_path / f"s0_{part}.nii.gz", voxels)
    cfg = settings("demo_segmentation", **SMALL | dict(cache=str(tmp_path / "cache"), crop_foreground=False), overlap=0.5, windows=1)
    (scan,), seen = data.open_scans(cfg, say=lambda *_: None), []

    class Everywhere(torch.nn.Module):
        def forward(self, x):                               # says class 1, wherever it is asked
            seen.append(x.shape)
            return torch.stack([-x[:, 0] * 0, x[:, 0] * 0 + 5], 1)
    everything, some = (ev.predict([Everywhere()], scan, dataclasses.replace(cfg, skip_background=skip), torch.device("cpu")) for skip in (False, True))
    assert len(seen) == 4 + 2                               # windows from 0, 32, 64 and 96; the box ends before 50
    assert (everything[1] > 0.99).all() and (some[1, :96] > 0.99).all() and (some[1, 96:] < 0.01).all() and (some[0, 96:] > 0.99).all()


def test_classes_of_bare_scans_and_a_second_run(judged, abdomens):
    cfg = settings("demo_classification", **KINDS)
    network = checkpoint_file(judged.folder / "c.pt", cfg, 0)
    os.environ["S2DC_DATA"] = str(abdomens)
    for _ in range(2):                                      # the table of a second run replaces the first one's
        judged("demo_classification", checkpoint="c.pt", part="val", out="scored")
        bare = f"{abdomens}/demo_ct/train/imagesTr/phantom_00[23].nii.gz"
        judged("demo_classification", checkpoint="c.pt", images=bare, out="bare")
    tables = [list(csv.reader(open(judged.folder / path / "probabilities.csv"))) for path in ("scored/predictions", "bare")]
    assert [[row[0] for row in table] for table in tables] == [["id", "002", "003"], ["id", "phantom_002", "phantom_003"]]
    assert tables[0][0] == ["id", "0", "1"] and [row[1:] for row in tables[0]] == [row[1:] for row in tables[1]]
    scans = data.open_scans(dataclasses.replace(cfg, cache=str(judged.folder / "cache")), say=lambda *_: None)
    with torch.no_grad():
        expected = network(torch.from_numpy(np.ascontiguousarray(scans[2].open())).float()[None]).softmax(1)[0]
    np.testing.assert_allclose([float(v) for v in tables[0][1][1:]], expected, atol=1e-5)


def test_nobody_is_scored_who_trained_the_network(judged, tmp_path):
    """Scored under another split than it was trained under."""
    cfg = settings("demo_segmentation", **DEMO)
    checkpoint_file(tmp_path / "t.pt", cfg, 0, subjects=["000", "001", "002"])
    with pytest.raises(SystemExit, match="^t.pt: 1 test subjects trained it: 002; give the split of its training "):
        judged(checkpoint="t.pt", val="004", test="002")
    with pytest.raises(SystemExit, match="^t.pt: 2 val subjects trained it: 001, 002; "):
        judged(checkpoint="t.pt", val=("001", "002"), test="val", part="val")


def test_folders_of_slices_without_labels(judged):
    Image = pytest.importorskip("PIL.Image")
    for folder, shade in (("a", 3), ("b", 2)):
        (judged.folder / "slices" / folder).mkdir(parents=True)
        for z in range(4):
            Image.fromarray((np.arange(48 * 40).reshape(48, 40) // shade % 256).astype(np.uint8)).save(
                judged.folder / "slices" / folder / f"{z}.png")
    checkpoint_file(judged.folder / "c.pt", settings("demo_classification", **KINDS), 0)
    judged("demo_classification", root=judged.folder, checkpoint="c.pt", images="slices/*/", out="bare")
    assert [row[0] for row in csv.reader(open(judged.folder / "bare/probabilities.csv"))] == ["id", "a", "b"]


@pytest.mark.parametrize("keys, text", [
    (dict(checkpoint="no.pt"), "no.pt: no such checkpoint; train it with finetune.py, or give --checkpoint=FILE"),
    (dict(checkpoint="encoder.pt"), "encoder.pt: holds no fine-tuned segmentation network, 33 tensors are missing (skips, bottom, "
     "ups, out); expected the best.pt of finetune.py"),
    (dict(labels={1: "a", 2: "b"}), "a.pt: trained with labels = {1: 'spleen', "),
    (dict(labels={k: f"organ {k}" for k in range(1, 14)}), "a.pt: trained with labels = {1: 'spleen', "),
    (dict(checkpoint="f.pt", merge="legacy", labels={1: "a", 2: "b"}), "f.pt: 14 outputs in the file, 3 in the model; the config "
     "declares other classes than it was trained for"),
    (dict(feature_size=8), "a.pt: does not fit the model: feature_size is 4 in the file, 8 in the model"),
    (dict(in_channels=2), "a.pt: trained with in_channels = 1, the config has 2"),
    (dict(residual=True), "a.pt: trained with residual = False, the config has True"),
    (dict(checkpoint="t.pt"), "t.pt: trained with task = 'translation', the config has 'segmentation'"),
    (dict(part="rest"), "part = 'rest', expected 'train', 'val' or 'test'"),
    (dict(images="nowhere/*.nii.gz"), "pattern '*.nii.gz' finds nothing below nowhere; "),
    (dict(images="('{id}_a.nii.gz', '{id}_b.nii.gz')"), "1_a.nii.gz: the scan has 2 channels, in_channels = 1"),
])
def test_what_evaluate_refuses(judged, keys, text):
    encoder_file(judged.folder / "encoder.pt")
    checkpoint_file(judged.folder / "t.pt", settings("demo_segmentation", **DEMO), 0, task="translation")
    save(judged.folder / "f.pt", to_monai(judged.networks[0].state_dict(), "legacy"))   # states nothing but its weights
    for name in ("1_a", "1_b"):
        nifti(judged.folder / f"{name}.nii.gz", BOX)
    with pytest.raises(SystemExit) as caught:
        judged(**dict(checkpoint="a.pt") | keys)
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


def test_regions_in_another_order_are_refused_and_preprocessing_is_compared(tmp_path, capsys):
    cfg = settings("brats21", **NETWORK)
    checkpoint_file(tmp_path / "r.pt", cfg, 0)
    with pytest.raises(SystemExit, match="r.pt: trained with regions = {'TC': "):
        ev.restore(tmp_path / "r.pt", dataclasses.replace(cfg, regions=dict(reversed(cfg.regions.items()))), torch.device("cpu"))
    capsys.readouterr()
    ev.restore(tmp_path / "r.pt", cfg, torch.device("cpu"))
    assert "differs" not in capsys.readouterr().out
    ev.restore(tmp_path / "r.pt", dataclasses.replace(cfg, spacing=(2.0, 2.0, 2.0)), torch.device("cpu"))
    assert "r.pt: preprocessing differs: spacing was () in training, is (2.0, 2.0, 2.0) here" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# translation and reconstruction

@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A scan whose target is 0 outside a block; and its config."""
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    target = np.zeros((16, 14, 12))
    target[3:12, 2:10, 4:9] = 10 + rng.random((9, 8, 5)) * 5
    nifti(tmp_path / "1_a.nii.gz", target + rng.random(target.shape), kind=np.float32)
    nifti(tmp_path / "1_b.nii.gz", target, kind=np.float32)
    cfg = settings("demo_translation", image="{id}_a.nii.gz", target="{id}_b.nii.gz", intensity="scale", window=(2.0, 12.0),
                   foreground=-1.0, cache=str(tmp_path / "cache"), workers=0)
    (scan,) = data.open_scans(cfg, say=lambda *_: None)
    truth = torch.from_numpy(np.ascontiguousarray(scan.open("target"))).float()
    return scan, cfg, truth, torch.from_numpy(np.ascontiguousarray(scan.open())).float()


def test_the_target_itself_scores_perfectly(pair):
    scan, cfg, truth, _ = pair
    scores = ev.score_image(truth, scan, cfg, full=True)["preprocessed"]
    assert all(scores["psnr"][part] == np.inf and scores["nmse"][part] == 0 for part in ("whole", "pasted", "tissue"))
    assert scores["ssim"]["whole"] == pytest.approx(1) and scores["psnr"]["input"] < 100


@pytest.mark.parametrize("reach", [0.0, 2.0])
def test_pasted_tissue_and_input_by_closed_form(pair, reach):
    scan, cfg, truth, image = pair
    inside = truth > truth.min() + 0.1                      # air is -0.2 in these units
    n, k = truth.numel(), int(inside.sum())
    assert k == 9 * 8 * 5
    guess = truth + torch.where(inside, 0.1, 0.3)           # the error within and around
    scores = ev.score_image(guess, scan, dataclasses.replace(cfg, data_range=reach), full=True)["preprocessed"]
    span = reach or float(truth.max() - truth.min())
    left = float(((image - truth) ** 2).sum())
    errors = {"whole": k * 0.01 + (n - k) * 0.09, "pasted": k * 0.01, "tissue": k * 0.01, "input": left}
    for part, error in errors.items():
        assert scores["psnr"][part] == pytest.approx(10 * np.log10(span ** 2 * (k if part == "tissue" else n) / error), abs=1e-4)
        power = float((truth[inside] ** 2).sum() if part == "tissue" else (truth ** 2).sum())
        assert scores["nmse"][part] == pytest.approx(error / power, rel=1e-4)
    assert scores["data_range"] == {"used": pytest.approx(span)} and set(scores["ssim"]) == {"whole", "pasted", "input"}
    skimage = pytest.importorskip("skimage.metrics")
    pasted = torch.where(inside, guess, truth)
    for part, each in (("whole", guess), ("pasted", pasted), ("input", image)):
        expected = skimage.structural_similarity(each[0].numpy().astype(float), truth[0].numpy().astype(float), data_range=span)
        assert scores["ssim"][part] == pytest.approx(expected, abs=1e-6)


def test_a_predicted_image_is_written_in_the_unit_of_the_file(pair, tmp_path):
    scan, cfg, truth, _ = pair
    ev.write_prediction(tmp_path / "out", scan, truth, cfg)
    written, source = nib.load(tmp_path / "out/1.nii.gz"), nib.load(tmp_path / "1_b.nii.gz")
    np.testing.assert_allclose(written.get_fdata(), source.get_fdata(), atol=0.01)     # 2 bytes a voxel between
    assert written.get_data_dtype() == np.float32 and np.array_equal(written.affine, source.affine)


def test_a_residual_network_starts_as_the_identity():
    cfg = settings("udpet", **NETWORK)
    volume = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        assert torch.equal(ev.forward(ev.TASKS[cfg.task].network(cfg), volume, cfg), volume)
