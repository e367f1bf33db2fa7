"""finetune.py: the real script on folders laid out as downloaded."""
import csv
import functools
import itertools
import json
import os
import signal
import subprocess
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import (
    AXES,
    BOX,
    DEMO,
    KINDS,
    NETWORK,
    SHORT,
    SMALL,
    TABLE,
    command,
    drawn,
    encoder_file,
    environment,
    flags,
    here,
    lay_cc_ccii,
    log_of,
    nifti,
    script,
    settings,
    weights,
)

import configs
import data
import finetune
import tasks
from model import Classifier, SwinUNETR
from run import save

pytestmark = pytest.mark.usefixtures("one_thread")


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
    grid, metric, part = tasks.TASKS[cfg.task].best
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


def test_two_processes_equal_one_of_two_passes(tmp_path, abdomens):
    """Bit for bit; against one pass over the whole batch the gradient of the first step agrees to rounding."""
    args = flags(**DEMO | dict(val=("002", "003", "004"), test="val"), **SHORT | dict(batch=2, crops_per_case=2))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    once = ["--steps=1", "--warmup=0"]
    for name, launcher, more in (("two", launch, []), ("passes", (), ["--accumulate=2"]),
                                 ("halves", (), [*once, "--accumulate=2"]), ("whole", (), once)):
        python, *rest = command("finetune.py", "demo_segmentation", *args, *more, f"--name={name}")
        script(tmp_path, abdomens, python, *launcher, *rest)
    two, passes, halves, whole = (torch.load(tmp_path / f"runs/{name}/last.pt", weights_only=True)
                                  for name in ("two", "passes", "halves", "whole"))
    assert all(torch.equal(value, passes["model"][name]) for name, value in two["model"].items())
    moments = [[state[key] for state in each["optimizer"]["state"].values() for key in ("exp_avg", "exp_avg_sq")]
               for each in (two, passes)]
    assert len(moments[0]) > 100 and all(map(torch.equal, *moments)) and two["best"] == passes["best"]
    one, other = (log_of(tmp_path / "runs" / name) for name in ("two", "passes"))
    assert [line.get("step") for line in one] == [line.get("step") for line in other] == [None, 1, 2, 2]
    for a, b in zip(one[1:], other[1:]):
        assert a.get("val") == b.get("val")
        for key in ("loss", "grad_norm") if "loss" in a else ():
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    first = [torch.cat([state["exp_avg"].flatten() for state in each["optimizer"]["state"].values()]) for each in (halves, whole)]
    assert (first[0] - first[1]).norm() < 2e-2 * first[1].norm() and first[1].norm() > 0


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
    """Passes, clipping, the schedule, layer decay and AdamW, by their formulas; of the script the crops and the network.

    Weights are compared after one step, where the gradient is more than rounding: AdamW divides by its size, so what is nothing
    but rounding (the bias of attention's keys) moves a weight as far as any, and the steps after it carry that on.
    """
    torch.manual_seed(1)
    init_file(small.parent / "encoder.pt")
    keys = SHORT | dict(steps=3, warmup=2, lr=1e-3, min_lr=1e-4, decay=0.2, clip=0.05, batch=4, accumulate=2, layer_decay=0.5,
                        eval_every=3, init="encoder.pt")
    for name, steps in (("three", 3), ("one", 1)):
        here(monkeypatch, capsys, small.parent, small, finetune.main, "demo_classification",
             *flags(**TABLE, **keys | dict(steps=steps, name=name)))
    cfg = configs.load(finetune.Config, [str(small.parent / "runs/three/config.py")])
    parts = tasks.split_cases(cfg)
    scans = data.open_scans(cfg, parts["train"], lambda *_: None)
    crops = data.Crops(scans, cfg, cfg.batch, cfg.seed, {case["id"]: case["class"] for case in parts["train"]})
    torch.manual_seed(cfg.seed)
    network = Classifier(1, 2, **NETWORK)
    network.encoder.load_state_dict(torch.load(small.parent / "encoder.pt", weights_only=True)["encoder"])
    names = dict(network.named_parameters())
    m, v = ({name: torch.zeros_like(p) for name, p in names.items()} for _ in range(2))
    log, last = log_of(small.parent / "runs/three")[1:4], torch.load(small.parent / "runs/one/last.pt", weights_only=True)
    for step, rate in enumerate((5e-4, 1e-3, 1e-3)):        # two steps of warm-up, then the top of the cosine
        batch = data.collate([crops[step, place] for place in range(4)])
        image, _, _ = data.moved_crops(batch, cfg)
        cost = -network(image).log_softmax(1)[torch.arange(4), batch["class"]].mean()
        grads = torch.autograd.grad(cost, list(names.values()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > cfg.clip and log[step]["lr"] == pytest.approx(rate)
        assert log[step]["loss"] == pytest.approx(cost.item(), rel=1e-2 if step else 1e-4)
        assert log[step]["grad_norm"] == pytest.approx(norm.item(), rel=0.1 if step else 1e-2)
        clear = 0
        with torch.no_grad():
            for (name, p), g in zip(names.items(), grads):
                g = g * cfg.clip / norm
                depth = 0 if name.startswith("head") else 5 if "embed" in name else 4 - int(name.split(".")[2])
                lr = rate * 0.5 ** depth
                p.mul_(1 - lr * (0.2 if p.ndim > 1 else 0))
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g ** 2
                p.sub_(lr * m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
                sure = g.abs() > 1e-5
                clear += int(sure.sum())
                if step == 0:
                    torch.testing.assert_close(last["model"][name][sure], p[sure], rtol=0, atol=2e-6, msg=name)
        assert step or clear > 1000


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
    (dict(steps=0), "steps, log_every and save_every must be above 0"),
    (dict(eval_every=0), "eval_every must be above 0"),
    (dict(clip=-1.0), "lr = 0.02 and clip = -1.0, expected both above 0"),
    (dict(warmup=-1), "warmup, min_lr, decay and seed must not be below 0"),
    (dict(overlap=1.0), "overlap = 1.0, expected 0 or more, below 1"),
    (dict(overlap=-0.1), "overlap = -0.1, expected 0 or more, below 1"),
    (dict(resize=(64, 64, 96)), "resize = (64, 64, 96) and crop = (64, 64, 64) must agree"),
    (dict(task="classification", classes={"a": 0}), "classification needs `classes` = {name: number}"),
    (dict(balance=1.5), "balance = 1.5, expected 0 to 1"),
    (dict(balance=0.5, regions={"all": (1,)}), "balance acts on segmentation of `labels` alone"),
    (dict(blend="linear"), "blend = 'linear', expected 'gaussian' or 'constant'"),
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
    network, lines = tasks.TASKS["segmentation"].network(cfg), []
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
    network = tasks.TASKS["segmentation"].network(cfg)
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
