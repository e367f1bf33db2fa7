"""tasks.py: sliding windows against MONAI, the way back to the scan against nibabel, splits of every data set, scores."""
import dataclasses
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import CCII, NETWORK, lay_cc_ccii, nifti, perfect, settings
from einops import rearrange

import data
import evaluate
import finetune
import tasks
from model import SwinUNETR

pytestmark = pytest.mark.usefixtures("one_thread")


def rng(seed=0):
    return np.random.default_rng(seed)


# 1. sliding window, and back to the scan's own grid

CASES = [((37, 41, 29), 16), ((37, 41, 29), (16, 12, 20)), ((9, 33, 11), 16), ((16, 16, 16), 16), ((17, 15, 48), (16, 15, 9))]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("size, window", CASES)
def test_sliding_window_equals_monai(size, window, overlap, blend):
    inferers = pytest.importorskip("monai.inferers")
    torch.manual_seed(0)
    network = torch.nn.Conv3d(2, 3, 5, padding=2)                         # its border effects make every blend visible
    volume = torch.randn(2, 2, *size)
    with torch.no_grad():
        expected = inferers.sliding_window_inference(volume, window, 3, network, overlap, mode=blend)
    found = tasks.sliding_window(network, volume, window, overlap, 3, blend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sliding_window_equals_monai_in_double_and_per_axis():
    inferers = pytest.importorskip("monai.inferers")
    network, volume = torch.nn.Conv3d(1, 2, 5, padding=2).double(), torch.randn(1, 1, 40, 33, 31, dtype=torch.float64)
    with torch.no_grad():
        expected = inferers.sliding_window_inference(volume, (20, 8, 16), 4, network, (0.3, 0.55, 0.7), mode="gaussian")
    found = tasks.sliding_window(network, volume, (20, 8, 16), (0.3, 0.55, 0.7), 4)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)        # weights are float32 on both sides


@pytest.mark.parametrize("blend, batch, store", [("gaussian", 1, None), ("gaussian", 5, "cpu"), ("constant", 100, "device")])
def test_sliding_window_of_a_pointwise_network_is_its_forward(blend, batch, store):
    volume, seen = torch.randn(1, 1, 21, 30, 7), []
    def network(x):
        seen.append(len(x))
        return torch.cat([x, x**2, x.sin()], 1)
    found = tasks.sliding_window(network, volume, (8, 11, 9), 0.6, batch, blend, store=store)
    torch.testing.assert_close(found, network(volume), rtol=0, atol=1e-5)
    assert max(seen[:-1]) <= batch


def test_sliding_window_accumulates_bfloat16_in_float32():
    volume = torch.ones(1, 1, 20, 20, 20)
    found = tasks.sliding_window(lambda x: (x * 3).bfloat16(), volume, 8, 0.75, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, volume * 3, rtol=0, atol=1e-5)      # bfloat16 sums would be off by 1e-2


@pytest.mark.parametrize("change, text", [
    (dict(volume=torch.zeros(1, 8, 8, 8)), "volume"), (dict(overlap=1.0), "overlap"), (dict(window=(4, 4)), "three"),
    (dict(blend="linear"), "linear"), (dict(store="gpu"), "gpu"), (dict(predict=lambda x: x[:, :, 1:]), "predict must return"),
    (dict(batch=0), "batch"), (dict(window=0), "window")])
def test_sliding_window_refuses(change, text):
    given = dict(predict=lambda x: x, volume=torch.zeros(1, 1, 8, 8, 8), window=4, overlap=0.5, batch=2) | change
    with pytest.raises(ValueError, match=text) as error:
        tasks.sliding_window(**given)
    assert "\n" not in str(error.value)


def preprocessed(shape_orig, affine_orig, step, corner, size):
    """Grid of a RAS, resampled (step mm) and cropped copy of a scan: its affine and shape."""
    nib = pytest.importorskip("nibabel")
    turn = nib.orientations.inv_ornt_aff(nib.io_orientation(affine_orig), shape_orig)
    ras = affine_orig @ turn
    pre = ras @ np.diag([*(np.asarray(step) / np.linalg.norm(ras[:3, :3], axis=0)), 1])
    pre[:3, 3] = (pre @ [*corner, 1])[:3]
    return pre, size


TILT = np.array([[0.995, -0.0998, 0], [0.0998, 0.995, 0], [0, 0, 1]])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "ILA"])
@pytest.mark.parametrize("order", [0, 1])
def test_to_original_equals_nibabel(axes, order):
    nib = pytest.importorskip("nibabel")
    from nibabel.processing import resample_from_to
    shape = (23, 31, 18)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    ras = np.eye(4)
    ras[:3, :3], ras[:3, 3] = TILT @ np.diag([0.9, 1.3, 2.5]), (-40, 13, 7)      # an oblique scan stays one
    orig = ras @ nib.orientations.inv_ornt_aff(turn, shape)
    shape = tuple(np.array(shape)[np.argsort(turn[:, 0])])
    pre, size = preprocessed(shape, orig, (1.5, 1.1, 2.0), (1, 2, 1), (11, 29, 17))
    array = rng().normal(size=size).astype(np.float32)
    found = tasks.to_original(array, pre, orig, shape, order).numpy()
    expected = resample_from_to(nib.Nifti1Image(array, pre), (shape, orig), order=order, mode="constant").get_fdata()
    at = np.linalg.inv(pre) @ orig @ np.vstack([np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])
    at, last = at[:3].reshape(3, *shape), np.array(size).reshape(3, 1, 1, 1) - 1
    between = ((at >= 0) & (at <= last)).all(0)                           # nibabel stops at the outermost centres
    beyond = ((at < -0.51) | (at > last + 0.51)).any(0)
    assert between.sum() > 500 and beyond.any()
    np.testing.assert_allclose(found[between], expected[between], atol=1e-4)
    assert (found[beyond] == 0).all() and (found[~between & ~beyond] != 0).mean() > 0.95
    several = tasks.to_original(torch.from_numpy(np.stack([array, -array])), pre, orig, shape, order)
    np.testing.assert_array_equal(several.numpy(), np.stack([found, -found]))


def test_to_original_is_exact_where_centres_meet():
    nib = pytest.importorskip("nibabel")
    orig = np.diag([-0.7, -0.7, 3.0, 1.0])
    orig[:3, 3] = (101.3, 88.1, -17.9)                                    # LPS
    ids = rng().integers(0, 9, (14, 17, 6)).astype(np.uint8)
    same = tasks.to_original(ids, orig, orig, ids.shape, 0)
    assert same.dtype == torch.uint8 and (same.numpy() == ids).all()
    values = rng(1).normal(size=ids.shape).astype(np.float32)
    image = nib.as_closest_canonical(nib.Nifti1Image(values, orig))
    crop = image.slicer[2:12, 3:15, 1:5]
    back = tasks.to_original(crop.get_fdata(dtype=np.float32), crop.affine, orig, ids.shape, 1, fill=-5).numpy()
    whole = np.full_like(values, -5)
    whole[2:12, 2:14, 1:5] = values[2:12, 2:14, 1:5]                      # x: 14 - 12 .. 14 - 2, y: 17 - 15 .. 17 - 3
    np.testing.assert_array_equal(back, whole)


@pytest.mark.parametrize("change, text", [(dict(order=2), "order"), (dict(array=np.zeros((4, 4))), "expected"),
                                          (dict(affine_orig=np.pad(TILT - np.eye(3), (0, 1)) + np.eye(4)), "turned")])
def test_to_original_refuses(change, text):
    given = dict(array=np.zeros((4, 4, 4)), affine_pre=np.eye(4), affine_orig=np.eye(4), shape_orig=(4, 4, 4), order=1) | change
    with pytest.raises(ValueError, match=text):
        tasks.to_original(**given)


def test_losses_of_the_tasks_see_their_own_channel_and_place():
    torch.manual_seed(0)
    cfg = settings("brats21", finetune.Config)              # {"TC": .., "WT": .., "ET": ..}
    label = torch.randint(0, 4, (2, 1, 6, 5, 4))
    output = torch.full((2, 3, 6, 5, 4), -9.0)
    for k, group in enumerate(cfg.regions.values()):        # each channel says its own region, and nothing else
        for member in group:
            output[:, k][label[:, 0] == member] = 9.0
    loss = lambda said: tasks.TASKS["segmentation"].loss(said, {"label": label}, cfg)
    assert loss(output) < 0.01 and all(loss(output[:, order]) > 1 for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0)))
    target, guess = torch.randn(2, 1, 6, 5, 4), torch.randn(2, 1, 6, 5, 4)
    fill = torch.tensor([[-0.5], [0.1]])
    target[:, :, :3] = fill[:, :, None, None, None]         # half of it is air
    error = np.abs((guess - target).numpy())
    body = target.numpy() > fill.numpy()[:, :, None, None, None] + 0.01
    assert not body[:, :, :3].any() and 20 < body.sum() < 120
    expected = np.mean([(e[b] + e[b] ** 2).mean() for e, b in zip(error, body)])
    loss = tasks.TASKS["translation"].loss(guess, {"target": target, "target_fill": fill}, settings("brats23_t1_to_t2", finetune.Config))
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
        return tasks.split_cases(settings(name, **keys))
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
    lay_cc_ccii(tmp_path)
    for fold in range(3):                                   # of the lists of another fold too
        lists = [f"CC-CCII/csv/CC_CCII_fold{fold}_{part}.csv" for part in ("train", "valid")]
        parts = split("cc_ccii", (), only=tuple(lists), val=lists[1])
        by_role = {role: sorted(f"{kind}_{patient}_{scan}" for kind, patient, scan, r in CCII if r == role) for role in range(4)}
        assert sorted(ids(parts["test"])) == by_role[0] and sorted(ids(parts["val"])) == by_role[fold + 1] and apart(parts)
        assert sorted(ids(parts["train"])) == sorted(by_role[(fold + 1) % 3 + 1] + by_role[(fold + 2) % 3 + 1])
        for case in sum(parts.values(), []):
            assert case["class"] == ("Normal", "CP", "NCP").index(case["id"].split("_")[0])


@pytest.mark.parametrize("content", ["id,class\n0,\u00e9\n".encode("latin-1"), "id,class\n".encode("utf-16")])
def test_a_table_in_another_encoding_is_one_line(split, tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=r"^.*t\.csv: not a csv in UTF-8 \([^\n]*\)$"):
        split("btcv", ["a0.nii.gz"], image="a{id}.nii.gz", label="", only="t.csv")


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


def test_a_perfect_prediction_scores_1_on_both_grids_and_is_the_label_file(organs, tmp_path):
    found, cfg = organs(("001", "002"))
    stored = set()
    for scan in found:
        ready = perfect(scan, cfg)
        scores = tasks.score_segmentation(ready, scan, cfg, ("original", "hd95", "ssim"))
        for grid in ("preprocessed", "original"):
            assert list(scores[grid]["dice"].values()) == [1.0] * 14 and list(scores[grid]["hd95"].values()) == [0.0] * 14
        evaluate.write_prediction(tmp_path, scan, ready, cfg)
        written, truth = nib.load(tmp_path / f"{scan.id}.nii.gz"), nib.load(scan.case["label"])
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(truth.dataobj))
        np.testing.assert_array_equal(written.affine, truth.affine)
        stored.add("".join(nib.aff2axcodes(written.affine)))
    assert stored == {"LPS", "PSR"}


def test_a_resampled_perfect_prediction_stays_close_on_the_scans_own_voxels(organs):
    (scan,), cfg = organs(("002",), spacing=(3.0, 5.0, 4.0))
    scores = tasks.score_segmentation(perfect(scan, cfg), scan, cfg, ("original", "hd95", "ssim"))
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
    for grid, scores in tasks.score_segmentation(ready, scan, cfg, ("original", "hd95", "ssim")).items():
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
    scores = tasks.score_segmentation(ready, scan, cfg, ("original", "hd95", "ssim"))
    assert all(list(scores[grid]["dice"].values()) == [1.0] * 4 for grid in scores)
    evaluate.write_prediction(tmp_path, scan, ready, cfg)
    np.testing.assert_array_equal(nib.load(tmp_path / "0.nii.gz").get_fdata(), label)
    reverse = dataclasses.replace(cfg, regions=dict(reversed(cfg.regions.items())))
    np.testing.assert_array_equal(evaluate.painted(tasks.masks_of(torch.from_numpy(label.astype(int)), reverse), reverse), label)


def test_summary_is_the_mean_over_cases_with_its_bootstrap_interval():
    cfg = settings("msd_liver")
    rows = [dict(id=k, scores={"original": {"dice": dict(liver=a, tumour=b), "hd95": dict(liver=c)}})
            for k, (a, b, c) in enumerate([(0.2, np.nan, 3.0), (0.6, 0.5, np.inf)])]
    dice, hd95 = (tasks.summarise(rows, cfg)["original"][metric] for metric in ("dice", "hd95"))
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
    tasks.predict(network, scan, cfg, torch.device("cpu"))
    np.testing.assert_allclose(scan.fill, [-1, 3])
    inside = seen[0][0, :, 27:37, 17:47, 12:52]
    np.testing.assert_allclose(inside, scan.open().astype(np.float32), atol=1e-5)
    assert seen[0][0, 0].sum() == pytest.approx(float(inside[0].sum()) - (64**3 - 12000), rel=1e-5)
    assert seen[0][0, 1].sum() == pytest.approx(float(inside[1].sum()) + 3 * (64**3 - 12000), rel=1e-5)


def test_flips_average_the_eight_mirrored_outputs(organs):
    (scan,), cfg = organs(("001",))
    torch.manual_seed(0)
    network = SwinUNETR(1, 14, **NETWORK).eval()
    found = tasks.predict(network, scan, dataclasses.replace(cfg, flips=True), torch.device("cpu"))
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
    scores = tasks.score_image(truth, scan, cfg, ("original", "hd95", "ssim"))["preprocessed"]
    assert all(scores["psnr"][part] == np.inf and scores["nmse"][part] == 0 for part in ("whole", "pasted", "tissue"))
    assert scores["ssim"]["whole"] == pytest.approx(1) and scores["psnr"]["input"] < 100


@pytest.mark.parametrize("reach", [0.0, 2.0])
def test_pasted_tissue_and_input_by_closed_form(pair, reach):
    scan, cfg, truth, image = pair
    inside = truth > truth.min() + 0.1                      # air is -0.2 in these units
    n, k = truth.numel(), int(inside.sum())
    assert k == 9 * 8 * 5
    guess = truth + torch.where(inside, 0.1, 0.3)           # the error within and around
    scores = tasks.score_image(guess, scan, dataclasses.replace(cfg, data_range=reach), ("original", "hd95", "ssim"))["preprocessed"]
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
    evaluate.write_prediction(tmp_path / "out", scan, truth, cfg)
    written, source = nib.load(tmp_path / "out/1.nii.gz"), nib.load(tmp_path / "1_b.nii.gz")
    np.testing.assert_allclose(written.get_fdata(), source.get_fdata(), atol=0.01)     # 2 bytes a voxel between
    assert written.get_data_dtype() == np.float32 and np.array_equal(written.affine, source.affine)


def test_a_residual_network_starts_as_the_identity():
    cfg = settings("udpet", **NETWORK)
    volume = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        assert torch.equal(tasks.forward(tasks.TASKS[cfg.task].network(cfg), volume, cfg), volume)
