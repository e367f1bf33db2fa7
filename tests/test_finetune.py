"""finetune.py: the real script on folders laid out as downloaded."""
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import (
    AXES,
    BOX,
    DEMO,
    NETWORK,
    SHORT,
    command,
    drawn,
    encoder_file,
    environment,
    flags,
    lay_cc_ccii,
    log_of,
    nifti,
    script,
    settings,
)
from test_model import PUBLIC, monai_state

import configs
import data
import evaluate
import finetune
import run as run_module
import tasks
from lab.phantom import IMAGES
from model import UNETR, Classifier, from_monai
from run import save

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Two state dicts, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# ------------------------------------------ every config, from the folder of the download to the table

LIVER, LUNG, SPLEEN = (settings(f"msd_{organ}").val for organ in ("liver", "lung", "spleen"))
ORGANS = {k: k for k in range(1, 14)}
MR = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": {2: 6, 1: 7, 3: 1}}
BRATS23 = ("00000-000", "00002-000", "00002-001", "00003-000", "00005-000"), {
    f"ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-{{0}}/BraTS-GLI-{{0}}-{name}": what
    for name, what in MR.items()}
PET = "FDG-PET-CT-Lesions/PETCT_{}/"
SUV = {PET + "SUV": "full", PET + "CTres": "ct"}
STUDY = "{}/03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-{}"
ILL = [STUDY.format(*study) for study in (("0011f3deaf", 10000), ("01140d52d8", 10001), ("0143bab87a", 10002),
                                          ("01547a6a5b", 10003), ("0168df2ed8", 10004))]
WELL = [STUDY.format(*study) for study in (("0011f3deaf", 10001), ("0143bab87a", 10003),
                                           ("01e1f80a8d", 10005))]
AVERAGE = "Coreg, Avg, Standardized Image and Voxel Size"
ADNI = [(f"{k + 2:03d}_S_{295 + k:04d}", AVERAGE.replace(" ", "_"), f"I{1234 + 10 * k + visit}", group, visit)
        for k, group in enumerate(("CN", "SMC", "CN", "MCI", "EMCI", "LMCI", "AD", "AD", "AD"))
        for visit in range(1 + k % 2)]
SCANS = ["ADNI/{0}/{1}/2006-1{4}-02_13_31_45.0/{2}/ADNI_{0}_PT_{1}_Br_{2}.nii".format(*scan) for scan in ADNI]

TASKS = {   # (cases, {pattern: what it shows}) of the download, keys, cases that train, cases reported
    "btcv": ([(("0001", "0002", "0021", "0035", "0036", "0037", "0038", "0039", "0040"),
               {"BTCV/Abdomen/RawData/Training/img/img{}": "ct",
                "BTCV/Abdomen/RawData/Training/label/label{}": ORGANS})],
             dict(spacing=(4.5, 4.5, 4.5)), 3, ("0035", "0036", "0037", "0038", "0039", "0040")),
    "msd_liver": ([(("0", "4", *LIVER), {"Task03_Liver/imagesTr/liver_{}": "ct",
                                         "Task03_Liver/labelsTr/liver_{}": {1: 6, 2: "lesion"}})],
                  dict(spacing=(5.0, 5.0, 6.0)), 2, LIVER),
    "msd_lung": ([(("001", "003", *LUNG), {"Task06_Lung/imagesTr/lung_{}": "ct",
                                           "Task06_Lung/labelsTr/lung_{}": {1: "lesion"}})],
                 dict(spacing=(5.0, 5.0, 9.0)), 2, LUNG),
    "msd_spleen": ([(("2", "3", *SPLEEN), {"Task09_Spleen/imagesTr/spleen_{}": "ct",
                                           "Task09_Spleen/labelsTr/spleen_{}": {1: 1}})],
                   dict(spacing=(4.5, 4.5, 4.5)), 2, SPLEEN),
    "brats21": ([(("00000", "00002", "01146", "01666"),
                  {f"BraTS2021/BraTS2021_{{0}}/BraTS2021_{{0}}_{name}": what for name, what in dict(
                      flair="flair", t1ce="t1ce", t1="t1", t2="t2", seg={2: 6, 1: 7, 4: 1}).items()})],
                {}, 3, None),
    "autopet": ([(ILL, SUV | {PET + "SEG": {1: "lesion"}}), (WELL, SUV | {PET + "SEG": {}})], {}, 5, None),
    "cc_ccii": ([], dict(resize=(64, 64, 64)), 6, ("Normal_0_0", "CP_10_100", "CP_10_150", "NCP_20_200")),
    "adni": ([(SCANS, {"{}": "full"})], dict(resize=(64, 64, 64)), None, None),
    "udpet": ([("0123", {"UDPET/Anonymous_ANO_000{}/drf_50": "low",
                         "UDPET/Anonymous_ANO_000{}/full": "full"})], {}, 2, None),
    "brats23_t1_to_t2": ([BRATS23], {}, None, None),
    "brats23_t1_to_t1ce": ([BRATS23], {}, None, None),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """pool(path, seed, what): a volume of a phantom, an image or {new id: old ids}, written once, linked."""
    folder = tmp_path_factory.mktemp("pool")

    def link(path, seed, what):
        scale = 4000 if "UDPET" in str(path) else 1         # Bq/ml
        source = folder / (f"{seed} {what} {scale}" + "".join(path.suffixes[-2:]))
        if not source.exists():
            modality = next((name for name, images in IMAGES.items() if what in images), "ct")
            subject = drawn(seed, modality)
            if isinstance(what, str):
                kind, voxels = np.float32 if modality == "pet" else np.int16, subject["images"][what] * scale
            else:
                kind, voxels = np.uint8, np.zeros(subject["label"].shape)
                for new, old in what.items():
                    inside = subject["lesion"] > 0 if old == "lesion" else subject["label"] == old
                    voxels[inside] = new
            nifti(source, voxels, subject["affine"], AXES[seed % 4], kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)
    return link


def lay(root, name, pool):
    """The folder of a config's download."""
    for cases, files in TASKS[name][0]:
        for (k, case), (pattern, what) in itertools.product(enumerate(cases), files.items()):
            file = root / (case if name == "adni" else pattern.format(case) + ".nii.gz")
            pool(file, 1 + k % 3, what)
            if "msd_" in name:
                file.with_name("._" + file.name).write_bytes(b"\0\5\x16\7 Mac OS X")
                (file.parents[1] / "dataset.json").write_text("{}")
    if name == "cc_ccii":
        lay_cc_ccii(root)
    if name == "adni":
        head = ("Image Data ID,Subject,Group,Sex,Age,Visit,Modality,Description,Type,Acq Date,Format,"
                "Downloaded")
        more = "F", 74, "sc", "PET", AVERAGE, "Processed", "1/02/2006", "NiFTI", "1/01/2020"
        rows = [[number, subject, group, *more] for subject, _, number, group, _ in ADNI]
        with open(root / "ADNI/ADNI.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([head.split(","), *rows])


@pytest.mark.parametrize("name", TASKS)
def test_config_from_download_to_table(name, tmp_path, pool, monkeypatch):
    _, keys, trained, reported = TASKS[name]
    root, run, cfg = tmp_path / "data", tmp_path / "runs" / name, settings(name)
    lay(root, name, pool)
    both = flags(crop=(64, 64, 64), workers=0, **NETWORK, **keys)
    said = script(tmp_path, root, *command("finetune.py", name, *both, *flags(**SHORT)))
    log = log_of(run)[1:]
    assert [line["step"] for line in log] == [1, 2, 2] and "val" in log[-1]
    assert np.isfinite([line["loss"] for line in log[:2]]).all()
    assert trained is None or f"train: {trained} cases" in said

    said = script(tmp_path, root, *command("evaluate.py", name, *both, "--sheets=1"))
    results = json.loads((run / "results.json").read_text())
    (checkpoint, result), = results["results"].items()
    rows = {row["id"]: row for row in result["rows"]}
    assert checkpoint == f"runs/{name}/best.pt" and results["config"]["seed"] == cfg.seed
    assert results["torch"] and results["commit"] and (reported is None or sorted(rows) == sorted(reported))
    chose = "chose the checkpoint"
    assert (chose in said) == (chose in results["part"]) == (cfg.test == "val")
    grid, metric, part = tasks.TASKS[cfg.task].best
    assert np.isfinite(result["summary"][grid][metric][part]["mean"])
    if cfg.task != "classification":
        assert len(list((run / "predictions").glob("*.png"))) == 1
        check_predictions(run / "predictions", dataclasses.replace(cfg, data=str(root)), rows)
    if name in CHECKS:
        CHECKS[name](tmp_path, rows, result, said)


def check_predictions(folder, cfg, rows):
    """On the voxels of the very input file: affine, shape, axes; ids in one byte, and only declared ones."""
    cases, axes = {case["id"]: case for case in data.find_cases(cfg)}, set()
    for each in rows:
        written, source = nib.load(folder / f"{each}.nii.gz"), nib.load(cases[each]["images"][0])
        np.testing.assert_array_equal(written.affine, source.affine)
        assert written.shape == source.shape
        assert all(written.header[key] == source.header[key] for key in ("sform_code", "qform_code"))
        assert written.get_data_dtype() == (np.uint8 if cfg.task == "segmentation" else np.float32)
        assert cfg.task != "segmentation" or set(np.unique(written.dataobj)) <= {0, *cfg.labels}
        axes.add(nib.aff2axcodes(source.affine))
    assert len(rows) == 1 or axes - {tuple("RAS")}


def check_btcv(folder, rows, result, said):
    assert all(text in said for text in ("S2DC [paper]", "84.14", "from scratch [paper]", "80.53"))
    assert said.count("  95 %") == 4                        # Dice and distance on both grids
    for grid in ("preprocessed", "original"):               # 13 organs and their mean
        dice, hd95 = (result["summary"][grid][metric] for metric in ("dice", "hd95"))
        assert len(dice) == 14 and list(hd95) == list(dice)
    *organs, mean = rows["0035"]["scores"]["original"]["dice"].values()
    assert mean == pytest.approx(np.nanmean(organs))


def check_brats21(folder, rows, result, said):
    assert list(result["summary"]["original"]["dice"]) == ["TC", "WT", "ET", "mean"]
    for path in (folder / "cache").glob("brats21-*/*.label.npy"):
        assert set(np.unique(np.load(path))) == {0, 1, 2, 3}            # 4 in the files


def check_autopet(folder, rows, result, said):
    assert {row["subject"] for row in rows.values()} == {"PETCT_0011f3deaf", "PETCT_01e1f80a8d"}
    parts = result["summary"]["original"]
    assert {"false_positive_ml", "false_negative_ml"} <= set(parts) and len(rows) == 3
    assert parts["dice_of_positive"]["lesion"]["cases"] == 1
    for each, row in rows.items():
        scores = row["scores"]["original"]
        dice, positive = scores["dice"]["lesion"], scores["dice_of_positive"]
        if each.endswith("10000"):
            assert np.isfinite(dice) and positive == {"lesion": dice}
        else:                                               # no lesion: NaN where none was predicted, else 0
            found = nib.load(folder / f"runs/autopet/predictions/{each}.nii.gz").get_fdata().any()
            assert dice == 0 if found else np.isnan(dice)
            assert scores["false_negative_ml"]["lesion"] == 0 and positive == {}


def check_classes(folder, rows, result, said):
    with open(next(folder.glob("runs/*/predictions/probabilities.csv"))) as file:
        table = {row.pop("id"): row for row in csv.DictReader(file)}
    for row in table.values():
        assert sum(map(float, row.values())) == pytest.approx(1, abs=1e-5)
    names, summary = list(row), result["summary"]["scans"]
    assert set(table) == set(rows) and names in (["Normal", "CP", "NCP"], ["CN", "MCI", "AD"])
    cases = np.bincount([row["scores"]["scans"]["class"]["true"] for row in rows.values()], minlength=3)
    assert cases.all() and [summary["recall"][k]["cases"] for k in names] == cases.tolist()
    assert summary["majority_accuracy"]["all"]["mean"] == pytest.approx(cases.max() / cases.sum())
    assert np.sum(summary["confusion"]) == len(rows)
    assert {"accuracy", "balanced_accuracy", "auc"} <= set(summary) and "confusion of runs/" in said
    assert "(rows: truth, columns: prediction; " + ", ".join(names) in said


def check_udpet(folder, rows, result, said):
    (row,) = rows.values()
    assert row["scores"]["preprocessed"]["data_range"] == {"used": 1.0}
    assert {"psnr", "ssim", "nmse"} <= set(result["summary"]["preprocessed"])
    written, low = (nib.load(folder / path).get_fdata() for path in (
        f"runs/udpet/predictions/{row['id']}.nii.gz", f"data/UDPET/{row['id']}/drf_50.nii.gz"))
    assert np.corrcoef(written.ravel(), low.ravel())[0, 1] > 0.5
    assert 0.2 < written.max() / low.max() < 5              # Bq/ml again


def check_brats23(folder, rows, result, said):
    assert {"whole", "pasted", "tissue", "input", "constant"} == set(result["summary"]["preprocessed"]["psnr"])


CHECKS = dict(btcv=check_btcv, brats21=check_brats21, autopet=check_autopet, udpet=check_udpet,
              brats23_t1_to_t2=check_brats23, brats23_t1_to_t1ce=check_brats23, cc_ccii=check_classes,
              adni=check_classes)


# ------------------------------------------------------------------ several processes, kills, resuming

def test_two_processes_equal_one_of_two_passes(tmp_path, abdomens):
    """Bit for bit; the first gradient is that of one pass over the whole batch, to rounding."""
    keys = DEMO | SHORT | dict(val=("002", "003", "004"), test="val", batch=2, crops_per_case=2)
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    whole = dict(steps=1, warmup=0)
    runs = dict(two={}, passes=dict(accumulate=2), halves=whole | dict(accumulate=2), whole=whole)
    states = []
    for name, more in runs.items():
        python, *rest = command("finetune.py", "demo_segmentation", *flags(**keys | more, name=name))
        script(tmp_path, abdomens, python, *launch if name == "two" else (), *rest)
        states.append(opened(tmp_path / f"runs/{name}/last.pt"))
    first, second = ([[state[key] for state in each["optimizer"]["state"].values()] for each in states]
                     for key in ("exp_avg", "exp_avg_sq"))
    assert same(states[0]["model"], states[1]["model"]) and states[0]["best"] == states[1]["best"]
    assert len(first[0]) > 50 and all(map(torch.equal, first[0] + second[0], first[1] + second[1]))
    one, other = (log_of(tmp_path / "runs" / name) for name in ("two", "passes"))
    assert [line.get("step") for line in one] == [line.get("step") for line in other] == [None, 1, 2, 2]
    for a, b in zip(one[1:], other[1:]):
        assert a.get("val") == b.get("val")
        for key in ("loss", "grad_norm") if "loss" in a else ():
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    halves, whole = (torch.cat([m.flatten() for m in each]) for each in first[2:])
    assert (halves - whole).norm() < 2e-2 * whole.norm() and whole.norm() > 0


def test_killed_at_any_moment_ends_in_the_same_weights(tmp_path, abdomens):
    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    keys = DEMO | SHORT | dict(steps=6, eval_every=3)
    again = command("finetune.py", "demo_segmentation", *flags(**keys, name="killed"))
    script(tmp_path, abdomens, *command("finetune.py", "demo_segmentation", *flags(**keys, name="whole")))
    done = []
    # before the first checkpoint, right after a validation, between two checkpoints
    for mark in (("step", 1), ("metric", "dice mean"), ("step", 5)):
        process = subprocess.Popen(again, cwd=tmp_path, env=environment(abdomens), stdout=subprocess.DEVNULL)
        while not any(mark in line.items() for line in log_of(killed)):
            assert process.poll() is None, mark
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done.append(opened(killed / "last.pt")["step"] if (killed / "last.pt").exists() else 0)
    assert done == [0, 2, 4]                                # it went on from there, and not from the start
    assert "resumed from runs/killed/last.pt at step 4" in script(tmp_path, abdomens, *again)
    for part in ("last.pt", "best.pt"):
        mine, theirs = opened(killed / part), opened(whole / part)
        assert same(mine["model"], theirs["model"]) and mine["step"] == theirs["step"]
        assert np.isfinite(mine["score"]) and mine["score"] == theirs["score"]
        assert mine.get("best") == theirs.get("best")
    logs = [[(line["step"], line.get("loss"), line.get("val")) for line in log_of(run) if "step" in line]
            for run in (whole, killed)]
    assert logs[0] == logs[1]                               # what was done twice stands once in the log


def test_a_run_goes_on_with_its_best_and_is_left_alone_when_finished(train, monkeypatch):
    scores = mock.Mock(side_effect=[0.5, OSError("power cut"), 0.4, 0.3])
    monkeypatch.setattr(finetune, "validate", scores)
    with pytest.raises(OSError, match="power cut"):
        train(steps=6)
    said, run = train(steps=6)
    kept, before = opened(run / "best.pt"), (run / "last.pt").read_bytes()
    assert "at step 2" in said and kept["subjects"] == ["0", "1"]
    assert (kept["step"], kept["score"]) == (2, 0.5)
    assert "is complete: 6 steps" in train(steps=6, log_every=2)[0]      # such a key may change
    other = "runs/run/last.pt belongs to another configuration: lr was 0.0003, now 0.1. Give --name="
    with pytest.raises(SystemExit, match=other):
        train(steps=6, lr=0.1)
    assert (run / "last.pt").read_bytes() == before
    (run / "last.pt").write_bytes(before[:5000])
    with pytest.raises(SystemExit, match="runs/run/last.pt: not a file of torch.save"):
        train(steps=6)


def test_a_best_from_steps_that_are_done_again_stays_until_it_is_beaten(train, monkeypatch):
    """.9 at step 4 is on disk, last.pt of step 3; then the run goes on with other scores."""
    monkeypatch.setattr(finetune, "validate", mock.Mock(side_effect=[0.5, 0.9, OSError("power cut")]))
    with pytest.raises(OSError, match="power cut"):
        train(steps=6, save_every=3)
    monkeypatch.setattr(finetune, "validate", mock.Mock(side_effect=[0.45, 0.95]))
    said, run = train(steps=6, save_every=3)
    assert "best.pt is of step 4, which this run does again, and scored 0.9000; it stays" in said
    kept = opened(run / "best.pt")
    assert (kept["step"], kept["score"], kept["chose"]) == (6, 0.95, ["2"]) and opened(run / "last.pt")["best"] == 0.95
    assert said.count("best so far") == 1


def test_a_run_goes_on_without_the_file_that_it_began_from(train, tmp_path):
    encoder_file(tmp_path / "enc.pt")
    said, _ = train(steps=2, init=str(tmp_path / "enc.pt"))
    (tmp_path / "enc.pt").unlink()
    assert "resumed from" in train(steps=4, init=str(tmp_path / "enc.pt"))[0]
    with pytest.raises(SystemExit, match="no such file"):
        train(steps=2, init=str(tmp_path / "enc.pt"), name="another")


@pytest.mark.parametrize("key, value", [
    ("seed", 1), ("batch", 2), ("val", ("1",)), ("label_fraction", 0.5), ("rotation", (0.0, 0.0, 1.0)), ("lr", 0.1),
    ("feature_size", 8), ("positive", 0.1), ("flip", (0.3, 0.0, 0.0)), ("decay", 0.5), ("clip", 0.1), ("jitter_shift", (0.0, 0.1)),
    ("window", (0.0, 9.0)), ("crops_per_case", 3), ("eval_every", 1), ("warmup", 0), ("balance", 0.1), ("freeze_encoder", True)])
def test_a_run_depends_on_every_key_that_changes_a_number(tmp_path, key, value):
    cfg = settings("demo_segmentation", finetune.Config, init="x")
    assert getattr(cfg, key) != value
    save(tmp_path / "last.pt", dict(config=dataclasses.asdict(cfg), step=1))
    assert run_module.resume(tmp_path, cfg, finetune.FREE, print)["step"] == 1
    with pytest.raises(SystemExit, match=f"belongs to another configuration: {key} was"):
        run_module.resume(tmp_path, dataclasses.replace(cfg, **{key: value}), finetune.FREE, print)


# ----------------------------------------------------------------------------------------------- steps

def test_stops_at_the_first_non_finite_step_and_keeps_the_last_checkpoint(train, small):
    """Finite weights of 1e30 are saved after the first step and ruin the second: they are no checkpoint to go on from."""
    text = r"step 1: not finite \(loss .*cases: [01]\); there is no checkpoint yet; try a lower --lr"
    with pytest.raises(SystemExit, match=text):
        train(steps=9, save_every=1, warmup=0, lr=1e30)
    files = {file.name for file in (small.parent / "runs/run").glob("*.pt")}
    assert files == {"last.bad.pt"}
    assert all(value.isfinite().all() for value in opened(small.parent / "runs/run/last.bad.pt")["model"].values())


def test_three_steps_equal_the_same_written_out(train):
    """Passes, clipping, schedule, layer decay and AdamW by their formulas; of the script crops and network.

    Weights are compared after one step, where the gradient is more than rounding: AdamW divides by its size,
    so what is nothing but rounding (the bias of attention's keys) moves a weight as far as any.
    """
    keys = dict(warmup=2, lr=1e-3, min_lr=1e-4, decay=0.2, clip=0.05, batch=4, accumulate=2, layer_decay=0.5)
    log = log_of(train(name="three", steps=3, eval_every=3, **keys)[1])[1:4]
    _, run = train(name="one", steps=1, eval_every=3, **keys)
    last, cfg = opened(run / "last.pt")["model"], configs.load(finetune.Config, [str(run / "config.py")])
    parts = tasks.split_cases(cfg)
    scans = data.open_scans(cfg, parts["train"], lambda *_: None)
    classes = {case["id"]: case["class"] for case in parts["train"]}
    crops = data.Crops(scans, cfg, cfg.batch, cfg.seed, classes)
    torch.manual_seed(cfg.seed)
    network = Classifier(1, 2, **NETWORK)
    names = dict(network.named_parameters())
    m, v = ({name: torch.zeros_like(p) for name, p in names.items()} for _ in range(2))
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
        for (name, p), g in zip(names.items(), grads):
            depth = 0 if name.startswith("head") else 5 if "embed" in name else 4 - int(name.split(".")[2])
            lr, g, sure = rate * 0.5 ** depth, g * cfg.clip / norm, g.abs() * cfg.clip / norm > 1e-5
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g ** 2
            mean, square = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            with torch.no_grad():
                p.mul_(1 - lr * (0.2 if p.ndim > 1 else 0))
                p.sub_(lr * mean / (square.sqrt() + 1e-8))
            clear += int(sure.sum())
            if step == 0:
                torch.testing.assert_close(last[name][sure], p[sure], rtol=0, atol=2e-6, msg=name)
        assert step or clear > 1000


@pytest.mark.parametrize("scores, best", [
    ((0.5, 0.7, 0.6), 4), ((0.3, 0.3, 0.2), 2), ((np.nan, 0.1, np.nan), 4)])
def test_the_best_validation_keeps_its_weights(train, monkeypatch, scores, best):
    seen = []

    def validate(network, *_):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return scores[len(seen) - 1]
    monkeypatch.setattr(finetune, "validate", validate)
    said, run = train(steps=6)
    kept, k = opened(run / "best.pt"), best // 2 - 1
    assert (kept["step"], kept["score"]) == (best, scores[k]) and same(kept["model"], seen[k])
    assert [line.endswith("best so far") for line in said.splitlines() if " val " in line][k]
    assert f"best val balanced_accuracy all {scores[k]:.4f}: " in said


def test_speed_is_that_of_training_whenever_validation_comes(train, monkeypatch):
    clock = itertools.count()                               # a second passes whenever somebody looks
    monkeypatch.setattr(finetune.time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(finetune, "validate", lambda *_: sum(1 for _ in zip(range(10_000), clock)))
    speeds = []
    for name, every in (("late", 9), ("within", 4)):
        _, run = train(name=name, steps=9, log_every=9, eval_every=every, save_every=99)
        speeds += [line["crops_per_s"] for line in log_of(run) if "loss" in line]
    assert len(speeds) == 2 and speeds[1] == pytest.approx(speeds[0], rel=0.2)


# -------------------------------------------------------------- bad inputs, before any training step

def spoil(folder, voxels):
    nifti(folder / "s1_lab.nii.gz", voxels, kind=np.float32)


def bare_datalist(folder):
    """Its second case has no label."""
    entries = [{"image": f"s{k}_img.nii.gz", "label": f"s{k}_lab.nii.gz"} for k in range(4)]
    del entries[1]["label"]
    (folder / "list.json").write_text(json.dumps({"training": entries}))


LIST = dict(image=(), label="", datalist="list.json", val="s2_img", test="s3_img")


@pytest.mark.parametrize("keys, change, text", [
    ({}, lambda s: spoil(s, (BOX > 20) * 0.5),
     "{s}/s1_lab.nii.gz: label ids must be whole numbers, found 0.5"),
    ({}, lambda s: (s / "s1_lab.nii.gz").unlink(),
     "{s}/s1_lab.nii.gz: no such file, expected beside {s}/s1_img.nii.gz"),
    (dict(in_channels=2), lambda s: None, "{s}/s0_img.nii.gz: the scan has 1 channels, in_channels = 2"),
    (LIST, bare_datalist, "{s}/s1_img.nii.gz: a train case without label"),
    (LIST | dict(val="s1_img"), bare_datalist, "{s}/s1_img.nii.gz: a val case without label"),
    (dict(val="val.csv", test="*", table_key="{id}"), lambda s: (s / "val.csv").write_text("id\n2\n"),
     "val.csv names none of the 0 cases; another part of the split has taken all"),
    (dict(init="w.pt"), lambda s: None, "init = 'w.pt', no such file"),
    (dict(init="w.pt"), lambda s: encoder_file(s.parent / "w.pt", feature_size=8),
     "w.pt: does not fit the model: feature_size is 8 in the file, 4 in the model"),
])
def test_files_that_do_not_fit(refused, small, keys, change, text):
    change(small)
    assert refused(keys) == text.format(s=small)


@pytest.mark.parametrize("keys, text", [
    (dict(task="guessing"),
     "task = 'guessing', expected one of segmentation, classification, reconstruction, translation"),
    (dict(val=()), "no case is left for val; "),
    (dict(labels={1: "a", 3: "b"}),
     "labels: ids must be 1 to 2 without gaps (rename with `remap`), found [1, 3]"),
    (dict(labels={}), "segmentation needs `labels` = {id: name}"),
    (dict(regions={"WT": (1, 2)}), "regions: id [2] is not in `labels`"),
    (dict(task="translation"), "translation needs `target`, the image to be predicted"),
    (dict(task="classification", classes={"a": 0, "b": 2}),
     "classes: numbers must be 0, 1, .. without gaps, found [0, 2]"),
    (dict(task="classification", classes={"a": 0, "b": 1}),
     "classification sees whole scans: give `resize`, the voxels that "),
    (dict(crop=(64, 64, 48)), "crop = (64, 64, 48), expected multiples of 32, one of them at least 64"),
    (dict(batch=3, crops_per_case=2), "batch = 3 is no multiple of crops_per_case = 2; crops_per_case = 1 takes each crop from another case"),
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
    (dict(windows=0), "windows = 0, data_range = 0.0: expected above 0"),
    (dict(data_range=-1.0), "windows = 4, data_range = -1.0: expected above 0, and 0 or more"),
    (dict(val_share=-0.5), "val_share = -0.5, test_share = 0.0, expected shares"),
    (dict(labels={1: "kidney", 2: "kidney"}), "names ['kidney', 'kidney']: each must be another"),
    (dict(labels={1: "mean", 2: "b"}), "names ['mean', 'b']: each must be another, and none 'mean'"),
    (dict(labels={1: "a", "2": "b"}), "labels = {1: 'a', '2': 'b'}, regions = {}: expected {id: name}"),
    (dict(regions={"WT": 1}), "labels = {1: 'one'}, regions = {'WT': 1}: expected {id: name}"),
    (dict(val=(), fold=5, folds=5), "fold = 5, expected 0 to 4"),
    (dict(fold=2), "fold = 2, val = "), (dict(test="val", test_share=0.3), "test_share = 0.3 and test = 'val': give "),
    (dict(regions={"a": ()}), "regions = {'a': ()}: expected an id in each"),
    (dict(classes={0: 0, 1: 1}), "classes = {0: 0, 1: 1}: expected {name: number}, names as texts"),
])
def test_keys_that_cannot_be(refused, keys, text):
    assert refused(keys).startswith(text)


@pytest.mark.parametrize("keys, rows, text", [
    ({}, "0,a\n1,c\n2,a\n3,b", "{s}/s1_img.nii.gz: class 'c' is not declared; classes: a, b"),
    ({}, "0,a\n2,a\n3,b", "{s}/s1_img.nii.gz: t.csv has no row '1'"),
    (dict(table="no.csv"), "", "{s}/no.csv: no such table"),
    (dict(table_key="{name}"), "0,a", "{s}/t.csv: no column 'name'; columns: id, class"),
    (dict(class_from="{group}"), "0,a\n1,b\n2,a\n3,b", "class_from = '{{group}}': no 'group' in id, class"),
    (dict(case_key="{patient}"), "0,a\n1,b\n2,a\n3,b",
     "case_key = '{{patient}}': no 'patient' in id, subject"),
    ({}, "0,a\n1,b,a field too many\n2,a\n3,c",
     "{s}/s3_img.nii.gz: class 'c' is not declared; classes: a, b"),
])
def test_tables_that_do_not_fit(refused, small, keys, rows, text):
    (small / "t.csv").write_text(f"id,class\n{rows}\n")
    assert refused(keys, "demo_classification") == text.format(s=small)


# ---------------------------------------------------------------------------------- starting weights

def test_encoder_is_loaded_whole_and_its_preprocessing_compared(tmp_path, capsys):
    path = tmp_path / "encoder.pt"
    encoder = encoder_file(path)
    cfg = settings("demo_segmentation", finetune.Config, init=str(path), window=(-160.0, 240.0),
                   spacing=(1.5, 1.5, 2.0), **NETWORK)
    network, lines = tasks.TASKS["segmentation"].network(cfg), []
    scored = [dict(images=[os.path.join(cfg.data, name)], targets=[]) for name in ("a.nii.gz", "b/c.nii.gz")]
    parts = dict(train=scored, val=scored[:1], test=scored)
    finetune.start_from(network, cfg, parts, lines.append)
    assert same(network.encoder.state_dict(), encoder.state_dict())
    assert "loaded 126 of 126" in capsys.readouterr().out
    save(path, opened(path) | {"preprocessing": data.preprocessing(settings("demo", data.Config)),
                               "seen": [hashlib.sha256(b"b/c.nii.gz False").hexdigest()[:12]]})
    finetune.start_from(network, cfg, parts, lines.append)
    assert [line.strip() for line in lines] == [
        f"{path} does not say under which preprocessing it was trained",
        f"{path} was pre-trained on 1 of the 2 test cases, without their labels",
        "preprocessing differs: window was (-175.0, 250.0) in training, is (-160.0, 240.0) here",
        "preprocessing differs: spacing was () in training, is (1.5, 1.5, 2.0) here"]


def test_labels_that_name_sides():
    at = lambda names: finetune.Config(labels=dict(enumerate(names, 1)))
    assert tasks.sided(at(["spleen", "R kidney", "left_lung", "portal+splenic v.", "Lesion (right)", "liver"])) == [
        "R kidney", "left_lung", "Lesion (right)"]
    assert tasks.sided(at(["liver", "bright spot", "cleft", "lr"])) == []
    assert tasks.sided(at(["LeftKidney", "kidneyR", "Leftover", "NCR"])) == ["LeftKidney", "kidneyR"]
    assert tasks.sided(finetune.Config(classes={"left": 0, "none": 1})) == ["left"]
    assert tasks.sided(finetune.Config(labels={1: "a", 2: "b"}, regions={"right lung": (1, 2)})) == ["right lung"]


def test_what_trained_never_chooses_or_is_reported_later(train, small):
    """Scans that come between two starts shift the folds; another run may begin with a best.pt."""
    keys = dict(config="demo_segmentation", val=(), fold=0, folds=2, test="val", eval_every=9, save_every=9)
    said, run = train(steps=1, **keys)
    first = opened(run / "best.pt")
    assert first["subjects"] == ["1", "3"] and first["chose"] == ["0", "2"] and first["cases"] == dict(train=2, val=2)
    for part in ("img", "lab"):
        shutil.copy(small / f"s1_{part}.nii.gz", small / f"s9_{part}.nii.gz")
    said, _ = train(steps=2, **keys)
    assert "val: not the cases that this run had: 2 then, 3 now, 1 of them new\n" in said and "train: not the" not in said
    for part in ("img", "lab"):
        (small / f"s9_{part}.nii.gz").rename(small / f"s0a_{part}.nii.gz")
    with pytest.raises(SystemExit, match="runs/run/last.pt: 2 of the 3 val cases trained it: 1, 3; give the split, and"):
        train(steps=3, **keys)
    assert opened(run / "last.pt")["step"] == 2
    for part in ("img", "lab"):
        (small / f"s0a_{part}.nii.gz").unlink()
    init = dict(init="runs/run/best.pt", steps=1)
    with pytest.raises(SystemExit, match="runs/run/best.pt: 2 of the 2 val cases trained it: 1, 3; give the split"):
        train(**keys | init | dict(name="fold1", fold=1))
    save(run / "best.pt", first | dict(subjects=["1", "3", "77"], seen=["abc"]))
    _, run = train(**keys | init | dict(name="again"))
    kept = opened(run / "best.pt")
    assert (kept["subjects"], kept["chose"], kept["seen"]) == (["1", "3", "77"], ["0", "2"], ["abc"])
    _, run = train(**keys | init | dict(name="elsewhere", dataset="another"))       # its subjects are others; its files not
    kept = opened(run / "best.pt")
    assert kept["subjects"] == ["1", "3"] and set(kept["files"]["train"]) == set(first["files"]["train"])


def test_a_rate_that_never_gets_up_is_said(train):
    assert "warmup = 4 of steps = 2: the rate never reaches lr = 0.01, but ends at 0.005\n" in train(steps=2, warmup=4, lr=0.01)[0]
    assert "never reaches" not in train(steps=2, warmup=1, lr=0.01, name="other")[0]


@pytest.mark.parametrize("keys", [dict(freeze_encoder=True), dict(layer_decay=0.0)])
def test_a_frozen_encoder_stays_and_the_head_learns(small, train, keys):
    """layer_decay 0 leaves nothing of the learning rate from the last stage on."""
    encoder = encoder_file(small.parent / "encoder.pt")
    _, run = train(decay=0.1, init="encoder.pt", **keys)
    trained = opened(run / "last.pt")["model"]
    assert all(torch.equal(trained[f"encoder.{name}"], value) for name, value in encoder.state_dict().items())
    torch.manual_seed(settings("demo_classification").seed)
    new = Classifier(1, 2, **NETWORK).head.state_dict()
    assert len(new) == 4 and not any(torch.equal(trained[f"head.{name}"], new[name]) for name in new)


@pytest.mark.parametrize("kind", ["VoCo_10k.pt", "MONAI ssl_pretrained_weights.pth", "SuPreM"])
def test_a_public_file_is_fine_tuned_and_scored(train, small, kind):
    """From a file laid out as VoCo, MONAI and SuPreM publish theirs to a table; all of its encoder gets there."""
    v2, make, must, skipped = PUBLIC[kind]
    state = monai_state(v2)
    torch.save(make(state), small.parent / "public.pt")
    keys = dict(feature_size=12, num_heads=(3, 6, 12, 24), window_size=7, merge="legacy", v2=v2,
                crop=(64, 32, 32))
    said, run = train("demo_segmentation", init="public.pt", freeze_encoder=True, **keys)
    taken = must - 2 * (kind == "SuPreM")                   # the output layer of other organs
    assert f"public.pt: loaded {taken} of {must + skipped}" in said
    trained, truth = opened(run / "best.pt")["model"], from_monai(state, "legacy")
    encoder = {name for name in truth if name.startswith("encoder.")}
    assert len(encoder) > 100 and all(torch.equal(trained[name], truth[name]) for name in encoder)
    evaluate.main([str(run / "config.py"), "--sheets=0", "--predictions=False"])
    result, = json.loads((run / "results.json").read_text())["results"].values()
    assert 0 <= result["summary"]["preprocessed"]["dice"]["mean"]["mean"] <= 1


def test_a_unetr_trains_starts_from_its_own_and_no_other(train, small):
    keys = dict(network="unetr", crop=(64, 64, 64))
    _, run = train("demo_segmentation", **keys)
    assert [line["step"] for line in log_of(run)[1:]] == [1, 2, 2]
    cfg = configs.load(evaluate.Config, [str(run / "config.py")])
    assert type(evaluate.restore(run / "best.pt", cfg, torch.device("cpu"))) is UNETR
    first, rest = opened(run / "best.pt")["model"], dict(init="runs/run/best.pt", layer_decay=0.0)
    _, run = train("demo_segmentation", name="again", **keys | rest)    # 0: of the whole ViT
    again = opened(run / "last.pt")["model"]
    stays = {name for name in first if torch.equal(first[name], again[name])}
    assert stays == {name for name in first if name.startswith("encoder.")} and len(stays) < len(first)
    _, run = train("demo_segmentation", name="frozen", **keys | dict(rest, layer_decay=1.0, freeze_encoder=True))
    frozen = opened(run / "last.pt")["model"]
    assert {name for name in first if torch.equal(first[name], frozen[name])} == stays
    encoder_file(small.parent / "encoder.pt")
    for more, text in ((keys | dict(init="encoder.pt"), "encoder.pt: holds no UNETR of ours, the model is a UNETR"),
                       (dict(init="runs/run/best.pt"), "holds a UNETR of ours, the model is a SwinUNETR"),
                       (dict(network="vit"), "network = 'vit', expected 'swin_unetr' or 'unetr'"),
                       (keys | dict(num_heads=(1, 1, 5, 1)), "UNETR: expected width 64 a multiple of heads 5")):
        with pytest.raises(SystemExit, match=text):
            train("demo_segmentation", **more | dict(name="refused"))
    with pytest.raises(SystemExit, match="a UNETR classifies nothing"):
        train(network="unetr", name="refused")


@pytest.mark.parametrize("config, keys, words", [
    ("demo_translation", {}, ""), ("demo_translation", dict(jitter_shift=(0.5, 0.1)), "change the input and not"),
    ("demo_reconstruction", dict(jitter_scale=(0.1, 0.1)), "change the input and not"),
    ("demo_segmentation", dict(jitter_shift=(0.5, 0.1), flip=(0.0, 0.2, 0.2)), ""),
    ("demo_segmentation", dict(flip=(0.2, 0.0, 0.0)), "mirrors left and right")])
def test_moves_that_do_not_suit_the_task_are_said(config, keys, words):
    lines = []
    finetune.tell_moves(settings(config, finetune.Config, **keys), lines.append)
    assert len(lines) == bool(words) and words in "".join(lines)
