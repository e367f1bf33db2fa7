"""tasks.py: windows against MONAI, the way back against nibabel, splits of every data set, scores by hand."""
import dataclasses
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CCII, NETWORK, lay_cc_ccii, nifti, perfect, settings
from nibabel.processing import resample_from_to

import data
import evaluate
import finetune
import tasks
from model import SwinUNETR

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = ("original", "hd95", "ssim")


def rng(seed=0):
    return np.random.default_rng(seed)


# ---------------------------------------------------------- sliding window, and back to the scan's own grid

@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75, (0.3, 0.55, 0.7)])
@pytest.mark.parametrize("size, window", [
    ((37, 41, 29), 16), ((37, 41, 29), (16, 12, 20)), ((9, 33, 11), 16), ((16, 16, 16), 16),
    ((17, 15, 48), (16, 15, 9)), ((40, 33, 31), (20, 8, 16))])
def test_sliding_window_equals_monai(size, window, overlap, blend):
    inferers = pytest.importorskip("monai.inferers")
    torch.manual_seed(0)
    # the weights of the blend are float32 on both sides
    for kind, atol, store in ((torch.float32, 1e-5, None), (torch.float64, 1e-6, "cpu")):
        network = torch.nn.Conv3d(2, 3, 5, padding=2, dtype=kind)         # its border shows in every blend
        volume, seen = torch.randn(2, 2, *size, dtype=kind), []
        with torch.no_grad():
            wanted = inferers.sliding_window_inference(volume, window, 3, network, overlap, mode=blend)
        network.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
        found = tasks.sliding_window(network, volume, window, overlap, 3, blend, store=store)
        assert found.dtype == kind and max(seen) <= 3
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_sliding_window_accumulates_bfloat16_in_float32():
    volume = torch.ones(1, 1, 20, 20, 20)
    found = tasks.sliding_window(lambda x: (x * 3).bfloat16(), volume, 8, 0.75, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, volume * 3, rtol=0, atol=1e-5)      # bfloat16 sums would be off by 1e-2


TILT = np.array([[0.995, -0.0998, 0], [0.0998, 0.995, 0], [0, 0, 1]])
WINDOW = dict(predict=lambda x: x, volume=torch.zeros(1, 1, 8, 8, 8), window=4, overlap=0.5, batch=2)
BACK = dict(array=np.eye(4)[None], affine_pre=np.eye(4), affine_orig=np.eye(4), shape_orig=(4, 4, 4), order=1)


@pytest.mark.parametrize("change, text", [
    (dict(volume=torch.zeros(1, 8, 8, 8)), "volume"), (dict(overlap=1.0), "overlap"),
    (dict(window=(4, 4)), "three"), (dict(blend="linear"), "linear"), (dict(store="gpu"), "gpu"),
    (dict(window=0), "window"), (dict(predict=lambda x: x[:, :, 1:]), "predict must return"),
    (dict(batch=0), "batch"),
    (dict(order=2), "order"), (dict(array=np.zeros((4, 4))), "expected"),
    (dict(affine_orig=np.pad(TILT - np.eye(3), (0, 1)) + np.eye(4), shape_orig=(8, 8, 8)), "turned")])
def test_sliding_window_and_to_original_refuse(change, text):
    back = set(change) <= set(BACK)
    with pytest.raises(ValueError, match=text) as error:
        tasks.to_original(**BACK | change) if back else tasks.sliding_window(**WINDOW | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA"])
@pytest.mark.parametrize("order", [0, 1])
def test_to_original_equals_nibabel(axes, order):
    """An oblique scan, and a RAS, resampled and cropped copy of it."""
    ras, shape = np.eye(4), (23, 31, 18)
    ras[:3, :3], ras[:3, 3] = TILT @ np.diag([0.9, 1.3, 2.5]), (-40, 13, 7)
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", axes)))
    orig = ras @ nib.orientations.inv_ornt_aff(turn, shape)
    shape = tuple(np.array(shape)[np.argsort(turn[:, 0])])
    pre, size = ras @ np.diag([1.5 / 0.9, 1.1 / 1.3, 2.0 / 2.5, 1]), (11, 29, 17)
    pre[:3, 3] = (pre @ [1, 2, 1, 1])[:3]
    array = rng().normal(size=size).astype(np.float32)
    found = tasks.to_original(array, pre, orig, shape, order, fill=-5).numpy()
    image = nib.Nifti1Image(array, pre)
    wanted = resample_from_to(image, (shape, orig), order=order, mode="constant", cval=-5).get_fdata()
    at = np.linalg.inv(pre) @ orig @ np.vstack([np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])
    at, last = at[:3].reshape(3, *shape), np.array(size).reshape(3, 1, 1, 1) - 1
    between = ((at >= 0) & (at <= last)).all(0)             # nibabel stops at the outermost centres
    beyond = ((at < -0.51) | (at > last + 0.51)).any(0)
    assert between.sum() > 500 and beyond.any()
    np.testing.assert_allclose(found[between], wanted[between], atol=1e-4)
    assert (found[beyond] == -5).all() and (found[~between & ~beyond] != -5).mean() > 0.95
    several = tasks.to_original(torch.from_numpy(np.stack([array, -array])), pre, orig, shape, order, fill=-5)
    np.testing.assert_array_equal(several[0].numpy(), found)
    ids = (10 * array).astype(np.uint8)
    assert torch.equal(tasks.to_original(ids, pre, pre, size, 0), torch.from_numpy(ids))


def test_losses_of_the_tasks_see_their_own_channel_and_place():
    torch.manual_seed(0)
    cfg = settings("brats21", finetune.Config)              # {"TC": .., "WT": .., "ET": ..}
    label, output = torch.randint(0, 4, (2, 1, 6, 5, 4)), torch.full((2, 3, 6, 5, 4), -9.0)
    for k, group in enumerate(cfg.regions.values()):        # each channel says its own region alone
        output[:, k][torch.isin(label[:, 0], torch.tensor(group))] = 9.0

    def loss(*channels):
        return tasks.TASKS["segmentation"].loss(output[:, channels], {"label": label}, cfg)
    assert loss(0, 1, 2) < 0.01 and all(loss(*order) > 1 for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0)))
    target, guess = torch.randn(2, 1, 6, 5, 4), torch.randn(2, 1, 6, 5, 4)
    fill = torch.tensor([[-0.5], [0.1]])
    target[:, :, :3] = fill[:, :, None, None, None]         # half of it is air
    body = target > fill[:, :, None, None, None] + 0.01
    assert not body[:, :, :3].any() and 20 < body.sum() < 120
    expected = np.mean([(e[b].abs() + e[b] ** 2).mean().item() for e, b in zip(guess - target, body)])
    cfg = settings("brats23_t1_to_t2", finetune.Config)
    found = tasks.TASKS["translation"].loss(guess, {"target": target, "target_fill": fill}, cfg)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------- who trains, who chooses, who is reported

@pytest.fixture
def split(tmp_path, monkeypatch):
    """split(config, files below the root, keys) -> {part: [case]}; nothing is read but the names."""
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))

    def cases(name, files=(), **keys):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return tasks.split_cases(settings(name, **keys))
    return cases


def ids(part):
    return [case["id"] for case in part]


def subjects(part):
    return {case["subject"] for case in part}


def apart(parts):
    """No subject in two parts."""
    own = [part for name, part in parts.items() if name != "test" or part is not parts["val"]]
    return all(not subjects(a) & subjects(b) for a, b in itertools.combinations(own, 2))


def studies(patients):
    """AutoPET's tree, with 1 to 3 studies a patient."""
    return [f"FDG-PET-CT-Lesions/PETCT_{k:04x}/{study}/{file}.nii.gz"
            for k in range(patients) for study in range(1 + k % 3) for file in ("SUV", "CTres", "SEG")]


@pytest.mark.parametrize("fold", range(5))
def test_autopet_divides_patients_by_nnunets_rule_and_never_their_studies(split, fold):
    folder = "FDG-PET-CT-Lesions/{subject}/{study}/"
    channels = (folder + "SUV.nii.gz", folder + "CTres.nii.gz")
    parts = split("autopet", studies(23), fold=fold, image=channels, in_channels=2)
    assert apart(parts) and len(parts["train"]) + len(parts["val"]) == sum(1 + k % 3 for k in range(23))
    assert subjects(parts["val"]) == {f"PETCT_{k:04x}" for k in range(fold, 23, 5)}
    assert parts["test"] == parts["val"]
    for case in parts["train"] + parts["val"]:
        assert [Path(p).name for p in case["images"]] == ["SUV.nii.gz", "CTres.nii.gz"]


@pytest.mark.parametrize("name", ["brats23_t1_to_t2", "udpet"])
def test_shares_are_of_subjects_and_do_not_depend_on_the_order_of_files(split, name):
    brats = "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-{0}/BraTS-GLI-{0}-{1}.nii.gz"
    files = [brats.format(f"{k:05d}-{visit:03d}", channel)
             for k in range(50) for visit in range(1 + k % 2) for channel in ("t1n", "t2w", "t1c")]
    files += [f"UDPET/{k:03d}/{dose}.nii.gz" for k in range(50) for dose in ("drf_50", "drf_20", "full")]
    parts = split(name, files)
    assert apart(parts)
    assert [len(subjects(parts[p])) for p in ("test", "val", "train")] == [10, 4, 36]   # 0.2 of 50, 0.1 of 40
    assert {p: ids(c) for p, c in split(name, files[::-1]).items()} == {p: ids(c) for p, c in parts.items()}
    assert ids(split(name, files, split_seed=1)["test"]) != ids(parts["test"])


@pytest.fixture
def adni(split, tmp_path):
    """80 subjects with one visit or two; adni(keys) -> parts."""
    groups = ["CN"] * 20 + ["SMC"] * 20 + ["EMCI"] * 10 + ["LMCI"] * 10 + ["MCI"] * 10 + ["AD"] * 10
    rows = [(k, f"I{k}{visit}", group) for k, group in enumerate(groups) for visit in range(1 + k % 2)]
    for k, scan, _ in rows:
        (tmp_path / f"ADNI/{k:03d}/d/t/{scan}").mkdir(parents=True)
        (tmp_path / f"ADNI/{k:03d}/d/t/{scan}/x.nii").touch()
    lines = ["Image Data ID,Subject,Group", *[f"{scan},{k},{group}" for k, scan, group in rows]]
    (tmp_path / "ADNI/ADNI.csv").write_text("\n".join(lines))
    image = "ADNI/{subject}/{description}/{date}/{scan}/*.nii"
    return lambda **keys: split("adni", image=image, **keys)


@pytest.mark.parametrize("name", ["adni", "autopet"])
def test_shares_keep_the_mixture_of_classes_and_fractions_of_labels_are_nested(split, adni, name):
    parts = [adni(label_fraction=f) if name == "adni" else split("autopet", studies(50), label_fraction=f)
             for f in (0.1, 0.5, 1.0)]
    small, half, full = (subjects(each["train"]) for each in parts)
    assert small < half < full and all(parts[0][p] == parts[1][p] == parts[2][p] for p in ("val", "test"))
    assert parts[0]["train"] == [case for case in parts[2]["train"] if case["subject"] in small]
    if name == "adni":
        def per_class(part):
            return np.bincount([*{case["subject"]: case["class"] for case in part}.values()]).tolist()
        assert [per_class(each["train"]) for each in parts] == [[3, 2, 1], [14, 11, 4], [29, 22, 7]]
        assert apart(parts[2]) and [per_class(parts[0][p]) for p in ("test", "val")] == [[8, 6, 2], [3, 2, 1]]
    else:
        assert [len(s) for s in (small, half, full)] == [4, 20, 40]


def test_a_test_share_is_the_same_whatever_the_fold(split):
    brats = "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-{0}/BraTS-GLI-{0}-{1}.nii.gz"
    files = [brats.format(f"{k:05d}-000", channel) for k in range(30) for channel in ("t1n", "t2w")]
    folds = [split("brats23_t1_to_t2", files, fold=fold, val_share=0.0) for fold in range(5)]
    assert all(apart(parts) and ids(parts["test"]) == ids(folds[0]["test"]) for parts in folds)
    chosen = [subject for parts in folds for subject in subjects(parts["val"])]
    assert sorted(chosen) == sorted(subjects(folds[0]["train"] + folds[0]["val"])) and len(chosen) == 24
    for fold, folds in ((5, 5), (1, 1), (0, 0)):
        with pytest.raises(SystemExit, match=f"^fold = {fold}, expected 0 to {folds - 1} "):
            split("brats23_t1_to_t2", fold=fold, folds=folds, val_share=0.0)


def test_a_test_share_is_the_same_whatever_the_fold_of_a_datalist(split, tmp_path):
    entries = [{"image": f"{k}.nii.gz", "label": f"{k}_l.nii.gz", "fold": k % 5} for k in range(20)]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    keys = dict(image=(), label="", datalist="list.json", test=(), test_share=0.2)
    folds = [split("brats21", **keys, fold=fold) for fold in range(5)]
    assert all(apart(parts) and ids(parts["test"]) == ids(folds[0]["test"]) for parts in folds)
    assert len(folds[0]["test"]) == 4 and sorted(sum((ids(parts["val"]) for parts in folds), [])) == sorted(
        {str(k) for k in range(20)} - {*ids(folds[0]["test"])})


def test_rows_of_one_key_must_be_of_one_class(split, tmp_path):
    keys = dict(image="s/{id}.nii.gz", table="t.csv", table_key="{who}", case_key="{id}", class_from="{dx}", classes={"MCI": 0, "AD": 1},
                val_share=0.3, test_share=0.3)
    rows = [f"{k},{visit},{('MCI', 'AD')[k % 2]}" for k in range(6) for visit in ("m00", "m24")]
    (tmp_path / "t.csv").write_text("\n".join(["who,visit,dx", *rows, "7,m00,AD", "7,m24,MCI"]))    # 7: nobody here
    parts = split("adni", [f"s/{k}.nii.gz" for k in range(6)], **keys)
    assert all(case["class"] == int(case["id"]) % 2 for cases in parts.values() for case in cases)
    (tmp_path / "t.csv").write_text("\n".join(["who,visit,dx", *rows[:-1], "5,m24,MCI"]))
    with pytest.raises(SystemExit, match="^t.csv: 2 rows '5', of AD and MCI; give a table_key and a case_key that tell them apart$"):
        split("adni", **keys)


def test_only_leaves_cases_out_of_every_part(split, tmp_path):
    entries = [{"image": f"{k}.nii.gz", "label": f"{k}_l.nii.gz", "id": str(k)} for k in range(6)]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries[:4], "validation": entries[4:]}))
    (tmp_path / "clean.csv").write_text("id\n1\n2\n5\n")
    parts = split("btcv", image=(), label="", datalist="list.json", val_section="validation", val=(), only="clean.csv",
                  table_key="{id}", case_key="{id}")
    assert ids(parts["train"]) == ["1", "2"] and ids(parts["val"]) == ["5"]


def test_cc_ccii_reports_the_scans_that_all_valid_lists_share(split, tmp_path):
    lay_cc_ccii(tmp_path)
    role = {f"{kind}_{patient}_{scan}": r for kind, patient, scan, r in CCII}
    for fold in range(3):                                   # of the lists of another fold too
        lists = tuple(f"CC-CCII/csv/CC_CCII_fold{fold}_{part}.csv" for part in ("train", "valid"))
        parts = split("cc_ccii", only=lists, val=lists[1])
        assert apart(parts)
        for part, roles in (("test", {0}), ("val", {fold + 1}), ("train", {1, 2, 3} - {fold + 1})):
            assert sorted(ids(parts[part])) == sorted(each for each in role if role[each] in roles)
        for case in sum(parts.values(), []):
            assert case["class"] == ("Normal", "CP", "NCP").index(case["id"].split("_")[0])


def test_folds_and_sections_of_a_datalist(split, tmp_path):
    entries = [{"image": f"{k}.nii.gz", "label": f"{k}_l.nii.gz", "fold": k % 3} for k in range(9)]
    tree = {"training": entries, "validation": entries[:2], "test": entries[3:5]}
    (tmp_path / "list.json").write_text(json.dumps(tree))
    source = dict(image=(), label="", datalist="list.json")
    parts = split("brats21", **source, fold=1)
    assert ids(parts["val"]) == ["1", "4", "7"] and ids(parts["train"]) == ["0", "2", "3", "5", "6", "8"]
    sections = source | dict(val_section="validation", val=(), test="val")
    parts = split("btcv", **sections, section="test")
    assert ids(parts["train"]) == ["3", "4"] and ids(parts["val"]) == ["0", "1"]
    with pytest.raises(SystemExit, match="2 subjects are in train and in val: 0, 1$"):
        split("btcv", **sections)
    for keys, text in ((dict(val="3"), "fold = -1, val = '3', val_section = 'validation': which of them chooses"),
                       (dict(fold=0), "fold = 0, val = (), val_section = 'validation': which of them chooses"),
                       (dict(test_section="test"), "test_section = 'test', test = 'val': which of them is reported"),
                       (dict(datalist="", image="{id}.nii.gz"), "sections of a `datalist`, which is not given")):
        with pytest.raises(SystemExit) as caught:
            tasks.check(settings("btcv", **sections | keys))
        assert text in str(caught.value)


BTCV = [f"BTCV/Abdomen/RawData/Training/{part}/{part}{n}.nii.gz"
        for part in ("img", "label") for n in ("0001", "0002", "0035", "0036")]
REST = "val_share = 0.0, test_share = 0.0, fold = -1"


@pytest.mark.parametrize("name, files, keys, text", [
    ("autopet", studies(9), dict(test=("PETCT_0001_0", "PETCT_0003_0")),
     "1 subjects are in train and in test: PETCT_0001"),
    ("autopet", studies(11), dict(test=("PETCT_0005_0", "PETCT_0003_0")),
     "1 subjects are in val and in test: PETCT_0005"),
    ("btcv", BTCV, dict(val=("0035", "0099")),
     "the split names '0099', no case has such an id; there are: 0001, 0002, 0035, 0036 .."),
    ("btcv", BTCV, dict(val=("0035", "0002"), test="0002"), "val names '0002', but test has these cases"),
    ("btcv", BTCV, dict(val="00*"),
     f"no case is left for train; the config gives val = '00*', test = 'val', {REST}"),
    ("btcv", BTCV, dict(val=()), f"no case is left for val; the config gives val = (), test = 'val', {REST}"),
    ("btcv", BTCV, dict(val="0035", test=""),
     f"no case is left for test; the config gives val = '0035', test = '', {REST}"),
    ("btcv", BTCV, dict(only="latin.csv"), "{s}/latin.csv: not a csv in UTF-8 ('utf-8' codec can't decode "),
    ("btcv", BTCV, dict(only="utf16.csv"), "{s}/utf16.csv: not a csv in UTF-8 ('utf-8' codec can't decode ")])
def test_splits_that_cannot_be(split, tmp_path, name, files, keys, text):
    (tmp_path / "latin.csv").write_bytes("id,class\n0,\u00e9\n".encode("latin-1"))
    (tmp_path / "utf16.csv").write_bytes("id,class\n".encode("utf-16"))
    with pytest.raises(SystemExit) as caught:
        split(name, files, **keys)
    assert str(caught.value).startswith(text.format(s=tmp_path)) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ scores and files

def test_a_perfect_prediction_scores_1_on_both_grids_and_is_the_label_file(organs, tmp_path):
    found, cfg = organs(("001", "002"))
    stored = set()
    for scan in found:
        ready = perfect(scan, cfg)
        for scores in tasks.score_segmentation(ready, scan, cfg, ALL).values():
            assert [*scores["dice"].values(), *scores["hd95"].values()] == [1.0] * 14 + [0.0] * 14
        evaluate.write_prediction(tmp_path, scan, ready, cfg)
        written, truth = nib.load(tmp_path / f"{scan.id}.nii.gz"), nib.load(scan.case["label"])
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(truth.dataobj))
        np.testing.assert_array_equal(written.affine, truth.affine)
        stored.add("".join(nib.aff2axcodes(written.affine)))
    assert stored == {"LPS", "PSR"}
    (scan,), cfg = organs(("002",), spacing=(3.0, 5.0, 4.0))                # resampled: close, and not exact
    scores = tasks.score_segmentation(perfect(scan, cfg), scan, cfg, ALL)
    assert set(scores["preprocessed"]["dice"].values()) == {1.0}
    assert 0.85 < scores["original"]["dice"]["mean"] < 1 and scores["original"]["dice"]["liver"] > 0.95


def test_soft_probabilities_go_back_to_a_turned_scan_and_distances_are_in_its_mm(tmp_path, monkeypatch):
    """PSR, anisotropic, scores that a plain last-above-background would paint wrongly; renamed ids."""
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))
    shape, spacing = (14, 12, 10), (1.0, 2.0, 4.0)
    label = np.zeros(shape, np.uint8)
    label[3:8, 3:7, 2:6], label[8:11, 3:7, 2:6] = 1, 4
    image = np.arange(np.prod(shape)).reshape(shape) / 100.0
    for name, voxels in (("i", image), ("l", label)):
        nifti(tmp_path / f"1_{name}.nii.gz", voxels, np.diag([*spacing, 1.0]), "PSR", np.float32)
    cfg = settings("btcv", image="{id}_i.nii.gz", label="{id}_l.nii.gz", labels={1: "a", 2: "b", 3: "c"}, remap={4: 3},
                   spacing=(), intensity="scale", window=(0.0, 20.0), foreground=-1.0, cache=str(tmp_path / "cache"))
    (scan,) = data.open_scans(cfg, say=lambda *_: None)
    soft = np.full((4, *shape), 0.1, np.float32)
    soft[0] = 0.15
    moved = np.zeros(shape, int)
    moved[5:10, 3:7, 2:6], moved[8:11, 3:7, 2:6] = 1, 3             # 1 lies two voxels, 2 mm, further right
    soft[1][moved == 1], soft[3][moved == 3] = 0.5, 0.4
    soft[2][(moved == 1) | (moved == 3)] = 0.3                      # above the background, below the best
    scores = tasks.score_segmentation(torch.from_numpy(soft), scan, cfg, ("original", "hd95"))
    true = np.where(label == 4, 3, label)
    for grid in ("preprocessed", "original"):
        for k, name in ((1, "a"), (3, "c")):
            a, b = moved == k, true == k
            assert scores[grid]["dice"][name] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert np.isnan(scores[grid]["dice"]["b"]) and scores[grid]["hd95"]["a"] == 2.0 and scores[grid]["hd95"]["c"] == 0


@pytest.mark.parametrize("angle, spacing, least", [(3e-4, (), 1), (3e-3, (0.2, 0.2, 0.5), 0.98)])
def test_a_label_whose_header_is_rounded_is_scored(tmp_path, monkeypatch, angle, spacing, least):
    """On grids much finer than the scan's, too: what on_grid_of lets pass is a share of a voxel of the scan."""
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))
    label = np.zeros((40, 38, 36), np.uint8)
    label[10:25, 10:25, 10:25] = 1
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nifti(tmp_path / "1_i.nii.gz", label * 50 + np.arange(36))
    nifti(tmp_path / "1_l.nii.gz", label, turn, kind=np.uint8)
    cfg = settings("btcv", image="{id}_i.nii.gz", label="{id}_l.nii.gz", labels={1: "a"}, spacing=spacing, foreground=-9.0,
                   cache=str(tmp_path / "cache"))
    (scan,) = data.open_scans(cfg, say=lambda *_: None)
    scores = tasks.score_segmentation(perfect(scan, cfg), scan, cfg, ALL)
    assert scores["original"]["dice"]["a"] >= least and scores["preprocessed"]["dice"]["a"] == 1


def test_prediction_is_by_the_task_and_by_the_keys(organs):
    """Sigmoid of regions, softmax of labels; windows, overlap and blend as the config says."""
    inferers = pytest.importorskip("monai.inferers")
    (scan,), cfg = organs(("001",))
    torch.manual_seed(0)
    network, device = torch.nn.Conv3d(1, 2, 7, padding=3), torch.device("cpu")
    regions = dict(labels={1: "a", 2: "b"}, regions={"all": (1, 2), "b": (2,)})
    volume, fill = torch.from_numpy(np.ascontiguousarray(scan.open())).float()[None], float(scan.fill[0])
    found = []
    for keys, ready in ((dict(labels={1: "a"}), lambda x: x.softmax(1)), (regions, torch.sigmoid)):
        for blend, overlap in (("gaussian", 0.5), ("constant", 0.5), ("gaussian", 0.0)):
            own = dataclasses.replace(cfg, crop=(32, 32, 32), blend=blend, overlap=overlap, windows=3, **keys)
            with torch.no_grad():
                wanted = inferers.sliding_window_inference(volume - fill, (32, 32, 32), 2, lambda x: network(x + fill),
                                                           overlap, mode=blend)
            found.append(tasks.predict(network, scan, own, device))
            torch.testing.assert_close(found[-1], ready(wanted)[0], rtol=0, atol=1e-4)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("name", ["demo_segmentation", "demo_classification", "demo_reconstruction", "demo_translation"])
def test_the_better_predictions_choose(name):
    """Of each task: rows that are better where it counts, and equal or worse in all else."""
    cfg = settings(name)
    names = dict.fromkeys(["whole", "pasted", "tissue", "input"], 20.0)
    counts = {"demo_reconstruction": "whole", "demo_translation": "tissue"}
    if name == "demo_segmentation":
        rows = [[dict(id=k, subject=k, scores={"preprocessed": {"dice": dict(a=a, mean=a)}}) for k in range(2)] for a in (0.5, 0.6)]
    elif name == "demo_classification":
        guess = lambda p, true: dict(id="x", subject="x", scores={"scans": {"probability": {"0": 1 - p, "1": p}, "class": {"true": true}}})
        # three of four right by the majority alone, against two of three classes' recall
        rows = [[guess(0.1, 0)] * 3 + [guess(0.1, 1)], [guess(0.1, 0)] * 2 + [guess(0.9, 0), guess(0.9, 1)]]
    else:
        good = counts[name]
        rows = [[dict(id="x", subject="x", scores={"preprocessed": {"psnr": names | other}})] for other in (
            dict.fromkeys(set(names) - {good}, 30.0), {good: 21.0})]
    assert tasks.main_score(rows[0], cfg) < tasks.main_score(rows[1], cfg)


def test_hand_made_dice_and_absent_classes(scans):
    label, guess = np.zeros((12, 10, 8)), np.zeros((12, 10, 8), int)
    label[2:6, 2:6, 2:6] = guess[4:8, 2:6, 2:6] = 1         # 64 voxels each, half of them in common
    guess[0, 0, 0] = 2                                      # absent from the truth alone; 3 from both
    (scan,), cfg = scans([label], labels={1: "cube", 2: "ghost", 3: "nothing"})
    nan = np.nan                                            # it is left out of the mean, 0 is not
    ready = torch.nn.functional.one_hot(torch.from_numpy(guess), 4).movedim(-1, 0).float()
    for scores in tasks.score_segmentation(ready, scan, cfg, ALL).values():
        np.testing.assert_equal(scores["dice"], dict(cube=0.5, ghost=0.0, nothing=nan, mean=0.25))
        np.testing.assert_equal(scores["hd95"], dict(cube=2.0, ghost=np.inf, nothing=nan, mean=2.0))


def test_regions_overlap_and_are_painted_so_that_none_is_lost(scans, tmp_path):
    label = np.zeros((12, 10, 8))
    label[1:9, 1:9, 1:7], label[2:6, 2:6, 2:6], label[3:5, 3:5, 3:5] = 2, 1, 3
    brats = settings("brats21")
    (scan,), cfg = scans([label], labels=brats.labels, regions=brats.regions)
    ready = perfect(scan, cfg)
    assert [int(mask.sum()) for mask in ready] == [64, 384, 8]          # TC, WT, ET
    scores = tasks.score_segmentation(ready, scan, cfg, ALL)
    assert all(list(scores[grid]["dice"].values()) == [1.0] * 4 for grid in scores)
    evaluate.write_prediction(tmp_path, scan, ready, cfg)
    np.testing.assert_array_equal(nib.load(tmp_path / "0.nii.gz").get_fdata(), label)
    cfg = dataclasses.replace(cfg, regions=dict(reversed(cfg.regions.items())))
    masks = tasks.masks_of(torch.from_numpy(label.astype(int)), cfg)
    np.testing.assert_array_equal(tasks.painted(masks, cfg), label)


def test_regions_are_scored_as_their_file_is_scored(scans, tmp_path):
    """Where sigmoids contradict each other, a core that is no part of the whole, the file holds the core."""
    label = np.zeros((12, 10, 8))
    label[1:9, 1:9, 1:7], label[2:6, 2:6, 2:6] = 2, 1
    brats = settings("brats21")
    (scan,), cfg = scans([label], labels=brats.labels, regions=brats.regions)
    ready = perfect(scan, cfg)
    ready[1, 2:6, 2:6, 2:6] = 0.2                           # WT; TC stays
    evaluate.write_prediction(tmp_path, scan, ready, cfg)
    file = nib.load(tmp_path / "0.nii.gz").get_fdata()
    scores = tasks.score_segmentation(ready, scan, cfg, ALL)
    for name, group in cfg.regions.items():
        mine, true = np.isin(file, group), np.isin(label, group)
        if true.any():
            assert scores["original"]["dice"][name] == pytest.approx(2 * (mine & true).sum() / (mine.sum() + true.sum()))
    assert scores["original"]["dice"]["WT"] == 1 and scores["preprocessed"]["dice"]["WT"] == pytest.approx(2 * 320 / (320 + 384))


def test_summary_is_the_mean_over_cases_with_its_bootstrap_interval():
    cfg = settings("msd_liver")
    rows = [dict(id=k, subject=k, scores={"original": {"dice": dict(liver=a, tumour=b), "hd95": dict(liver=c)}})
            for k, (a, b, c) in enumerate([(0.2, np.nan, 3.0), (0.6, 0.5, np.inf)])]
    dice, hd95 = (tasks.summarise(rows, cfg)["original"][metric] for metric in ("dice", "hd95"))
    # of two cases a quarter of the draws is twice the first, a quarter twice the second
    assert dice["liver"] == pytest.approx(dict(mean=0.4, low=0.2, high=0.6, cases=2))
    assert dice["tumour"]["mean"] == 0.5 and dice["tumour"]["cases"] == 1 and np.isnan(dice["tumour"]["low"])
    perfect = [dict(id=k, subject=k, scores={"preprocessed": {"psnr": dict(whole=v)}}) for k, v in enumerate((np.inf, 20.0))]
    assert tasks.summarise(perfect, cfg)["preprocessed"]["psnr"]["whole"]["mean"] == np.inf     # left in
    assert hd95["liver"]["mean"] == 3.0 and hd95["liver"]["missed"] == 1 and hd95["liver"]["cases"] == 1


def test_each_channel_is_padded_with_its_own_value(scans, tmp_path):
    block = np.zeros((10, 30, 40))
    block[5, 5, 5] = 1
    scans([block])
    nifti(tmp_path / "s0_two.nii.gz", block * 7 + 3, kind=np.float32)   # fill 3, the first's -1
    two = "s{id}_img.nii.gz", "s{id}_two.nii.gz"
    (scan,), cfg = scans([block], image=two, in_channels=2, crop=(64, 64, 64), labels={1: "a"})
    seen = []

    class Network:
        def eval(self):
            pass

        def __call__(self, x):
            seen.append(x.clone())
            return torch.zeros(len(x), 2, *x.shape[2:])
    tasks.predict(Network(), scan, cfg, torch.device("cpu"))
    inside = seen[0][0, :, 27:37, 17:47, 12:52].clone()
    np.testing.assert_allclose(inside, scan.open().astype(np.float32), atol=1e-5)
    for k, fill in enumerate((-1, 3)):
        assert scan.fill[k] == pytest.approx(fill)
        around = seen[0][0, k].sum() - inside[k].sum()
        assert around.item() == pytest.approx(fill * (64**3 - 12000), rel=1e-5)


def test_flips_average_the_eight_mirrored_outputs(organs):
    (scan,), cfg = organs(("001",))
    torch.manual_seed(0)
    network, names = SwinUNETR(1, 14, **NETWORK).eval(), {k: f"organ {k}" for k in cfg.labels}      # none tells a side
    found = tasks.predict(network, scan, dataclasses.replace(cfg, flips=True, labels=names), torch.device("cpu"))
    volume, total = torch.from_numpy(np.ascontiguousarray(scan.open())).float()[None], 0
    x, y, z = (slice((64 - n) // 2, (64 - n) // 2 + n) for n in scan.shape)
    for axes in itertools.chain.from_iterable(itertools.combinations((2, 3, 4), n) for n in range(4)):
        padded = torch.full((1, 1, 64, 64, 64), float(scan.fill[0]))
        padded[:, :, x, y, z] = volume.flip(axes)
        with torch.no_grad():
            total += network(padded).softmax(1)[:, :, x, y, z].flip(axes)
    torch.testing.assert_close(found, total[0] / 8, rtol=0, atol=1e-4)


def test_flips_leave_sides_where_they_are_if_names_tell_them(scans):
    """A network that calls everything by the half of its input that it lies in."""
    label = np.zeros((64, 20, 20))
    label[:32], label[32:] = 1, 2

    class Network:
        def eval(self):
            pass

        def __call__(self, x):
            out = torch.zeros(len(x), 3, *x.shape[2:])
            out[:, 1, :32], out[:, 2, 32:] = 9, 9
            return out
    for names, told in ((("left kidney", "right kidney"), True), (("one", "other"), False)):
        (scan,), cfg = scans([label], labels=dict(enumerate(names, 1)), flips=True, crop=(64, 32, 32))
        found = tasks.predict(Network(), scan, cfg, torch.device("cpu"))
        assert found[1, :32].mean() > 0.99 if told else found[1, :32].mean() == pytest.approx(0.5, abs=0.01)


# ---------------------------------------------------------------------------- translation and reconstruction

@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A scan whose target is 0 outside a block; and its config."""
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))
    target, noise = np.zeros((16, 14, 12)), rng().random((16, 14, 12))
    target[3:12, 2:10, 4:9] = 10 + noise[3:12, 2:10, 4:9] * 5
    nifti(tmp_path / "1_a.nii.gz", target + noise[::-1], kind=np.float32)
    nifti(tmp_path / "1_b.nii.gz", target, kind=np.float32)
    cfg = settings("demo_translation", image="{id}_a.nii.gz", target="{id}_b.nii.gz", intensity="scale",
                   window=(2.0, 12.0), foreground=-1.0, cache=str(tmp_path / "cache"), workers=0)
    (scan,) = data.open_scans(cfg, say=lambda *_: None)
    truth = torch.from_numpy(np.ascontiguousarray(scan.open("target"))).float()
    return scan, cfg, truth, torch.from_numpy(np.ascontiguousarray(scan.open())).float()


@pytest.mark.parametrize("reach", [0.0, 2.0])
def test_pasted_tissue_and_input_by_closed_form(pair, reach):
    skimage = pytest.importorskip("skimage.metrics")
    scan, cfg, truth, image = pair
    cfg = dataclasses.replace(cfg, data_range=reach)
    inside = truth > truth.min() + 0.1                      # air is -0.2 in these units
    n, k = truth.numel(), int(inside.sum())
    assert k == 9 * 8 * 5
    guess = truth + torch.where(inside, 0.1, 0.3)           # the error within and around
    scores = tasks.score_image(guess, scan, cfg, ALL)["preprocessed"]
    span = reach or float(truth.max() - truth.min())
    left = float(((image - truth) ** 2).sum())
    flat = truth[inside] - truth[inside].mean()             # one number for all the tissue
    errors = {"whole": k * 0.01 + (n - k) * 0.09, "pasted": k * 0.01, "tissue": k * 0.01, "input": left,
              "constant": float((flat ** 2).sum())}
    for part, error in errors.items():
        voxels, true = (k, truth[inside]) if part in ("tissue", "constant") else (n, truth)
        psnr = 10 * np.log10(span ** 2 * voxels / error)
        assert scores["psnr"][part] == pytest.approx(psnr, abs=1e-4)
        assert scores["nmse"][part] == pytest.approx(error / float((true ** 2).sum()), rel=1e-4)
    off = float((image - truth).abs().sum())                # in the unit of the file: its window is ten wide
    for part, error, voxels in (("whole", k * 0.1 + (n - k) * 0.3, n), ("pasted", k * 0.1, n), ("tissue", k * 0.1, k), ("input", off, n),
                                ("constant", float(flat.abs().sum()), k)):
        assert scores["mae"][part] == pytest.approx(10 * error / voxels, rel=1e-4)
    other = dataclasses.replace(cfg, intensity="zscore")
    assert tasks.score_image(guess, scan, other)["preprocessed"]["mae"]["tissue"] == pytest.approx(0.1, rel=1e-4)
    assert scores["data_range"] == {"used": pytest.approx(span)}
    images = dict(whole=guess, pasted=torch.where(inside, guess, truth), input=image)
    assert set(scores["ssim"]) == set(images)
    for part, each in images.items():
        a, b = (v[0].numpy().astype(float) for v in (each, truth))
        ssim = skimage.structural_similarity(a, b, data_range=span)
        assert scores["ssim"][part] == pytest.approx(ssim, abs=1e-6)


def test_the_target_itself_scores_perfectly_and_is_written_in_the_unit_of_its_file(pair, tmp_path):
    scan, cfg, truth, _ = pair
    scores = tasks.score_image(truth, scan, cfg, ALL)["preprocessed"]
    for part in ("whole", "pasted", "tissue"):
        assert scores["psnr"][part] == np.inf and scores["nmse"][part] == scores["mae"][part] == 0
    assert scores["ssim"]["whole"] == pytest.approx(1) and scores["psnr"]["input"] < 100
    evaluate.write_prediction(tmp_path / "out", scan, truth, cfg)
    written, source = nib.load(tmp_path / "out/1.nii.gz"), nib.load(tmp_path / "1_b.nii.gz")
    np.testing.assert_allclose(written.get_fdata(), source.get_fdata(), atol=0.01)     # 2 bytes a voxel
    assert written.get_data_dtype() == np.float32 and np.array_equal(written.affine, source.affine)


def test_a_residual_network_starts_as_the_identity():
    cfg = settings("udpet", **NETWORK)
    volume = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        assert torch.equal(tasks.forward(tasks.TASKS[cfg.task].network(cfg), volume, cfg), volume)
