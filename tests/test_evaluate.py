"""evaluate.py: pictures, and what it writes of networks that were never trained."""
import csv
import dataclasses
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BOX, DEMO, KINDS, NETWORK, encoder_file, flags, here, nifti, settings
from scipy import ndimage

import data
import evaluate
import finetune
import run
import tasks
from model import to_monai
from run import save

pytestmark = pytest.mark.usefixtures("one_thread")


def rng(seed=0):
    return np.random.default_rng(seed)


def blobs(shape, classes, seed):
    """Smooth random label map, so that surfaces and components look like organs and not like noise."""
    fields = np.stack([ndimage.gaussian_filter(rng(seed + i).normal(size=shape), 2) for i in range(classes)])
    fields[0] += np.abs(fields).max() * 0.3
    return fields.argmax(0)


# -------------------------------------------------------------------------------------------------- pictures

def test_pictures_keep_left_and_right():
    volume = np.zeros((5, 6, 7))
    volume[4, 0, 0], volume[0, 5, 0], volume[0, 0, 6] = 1, 2, 3           # right, front, head ends
    cuts = {plane[0]: evaluate.slice_through(plane, (0, 0, 0), volume)[0] for plane in evaluate.PLANES}
    assert cuts["axial"].shape == (6, 5) and cuts["axial"][0, 0] == 1      # right on the left; 0 is low
    assert cuts["axial"][5, 4] == 2 and cuts["coronal"][6, 4] == 3 and cuts["coronal"][0, 0] == 1
    assert cuts["sagittal"][0, 0] == 2 and cuts["sagittal"][6, 5] == 3    # front on the left, head on top


def test_contact_sheet_cuts_the_largest_object():
    truth = np.zeros((20, 21, 22), int)
    truth[2:5, 2:5, 2:5], truth[10:18, 9:14, 6], truth[12, 10:12, 3:9] = 1, 2, 2
    truth[:, :, 20][np.indices((20, 21)).sum(0) % 2 == 0] = 2         # more voxels, none beside another
    assert evaluate.centre_of_largest(truth, np.roll(truth, 1)) == [12, 10, 6]
    assert evaluate.centre_of_largest(truth * 0, truth) == [12, 10, 6]
    assert evaluate.centre_of_largest(truth * 0, truth * 0) == [10, 10, 11]


def test_contact_sheet_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    real = os.environ.get("S2DC_REAL_DATA")
    if real:
        folder = Path(real) / "ct"
        scan = nib.as_closest_canonical(nib.load(folder / "ts_abdomen_3mm.nii.gz"))
        label = nib.as_closest_canonical(nib.load(folder / "labels/ts_abdomen_3mm_organs13.nii.gz"))
        truth, voxels, spacing = label.get_fdata().astype(int), scan.get_fdata(), scan.header.get_zooms()
    else:
        truth, spacing = blobs((40, 30, 50), 4, 0), (1.0, 2.0, 1.0)
        voxels = truth + rng().normal(size=truth.shape)
    none, names = truth * 0, {k: f"organ {k}" for k in range(1, 14)}
    pairs = dict(both=(truth, np.roll(truth, 2, 0)), none=(none, none), false=(none, truth),
                 exact=(truth, truth))
    seen = {}
    for name, (a, b) in pairs.items():
        evaluate.contact_sheet(tmp_path / "sheet.png", voxels, a, b, spacing, name, names)
        seen[name] = np.asarray(image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
        assert seen[name].shape[1] == 1320
    coloured = {name: (np.ptp(picture, axis=2) > 40).mean() for name, picture in seen.items()}
    assert coloured["none"] == 0 and coloured["both"] > coloured["false"] > 0.02        # lines over a fill
    strong = {name: (np.ptp(picture, axis=2) > 140).mean() for name, picture in seen.items()}
    assert strong["exact"] > 2 * strong["false"]            # lines are of full colour, and so is the legend
    with pytest.raises(ValueError, match="contact_sheet: expected one shape"):
        evaluate.contact_sheet(tmp_path / "x.png", voxels, truth[1:], truth, spacing, "x", names)


def test_image_sheet_names_its_columns_and_shows_their_scales(monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    kept = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: kept.append(self))
    target = np.random.default_rng(0).normal(size=(9, 8, 7))
    evaluate.image_sheet("sheet.png", target + 1, target, target * 2, (1, 1, 2), "case")
    titles = [axis.get_title() for axis in kept[0].axes]
    assert titles[:4] == ["input, axial", "target, axial", "prediction, axial", "prediction - target, axial"]
    assert titles[4:12] == ["coronal"] * 4 + ["sagittal"] * 4 and len(titles) == 16         # four colour bars
    drawn = [axis.images[0] for axis in kept[0].axes[:4]]
    for picture, volume in zip(drawn, (target + 1, target, target * 2, target)):    # 2 t errs by t
        np.testing.assert_allclose(picture.get_array(), volume[:, :, 3].T[:, ::-1])
    low, high = drawn[3].get_clim()
    assert drawn[1].get_clim() == drawn[2].get_clim() and -low == high > 0


NOBODY = run.versions() | dict(subjects=[], chose=[], files={}, cases={}, seen=[])


# -------------------------------------------------------------------------- networks that were never trained

def checkpoint_file(path, cfg, seed, subjects=(), chose=(), **other):
    torch.manual_seed(seed)
    network = tasks.TASKS[cfg.task].network(cfg)
    for p in network.parameters():                          # untrained outputs hardly differ
        p.data *= 1.5
    state = finetune.checkpoint(network, cfg, 0, 0.0, NOBODY | {"subjects": list(subjects), "chose": list(chose)})
    save(path, state | dict(config=state["config"] | other))
    return network.eval()


BOTH = "('a.pt', 'b.pt')"


@pytest.fixture
def judged(abdomens, monkeypatch, capsys, tmp_path):
    """judged(config, keys) -> what evaluate.py printed; a.pt and b.pt are of the demo of segmentation."""
    for seed, name in enumerate("ab"):
        checkpoint_file(tmp_path / f"{name}.pt", settings("demo_segmentation", **DEMO), seed)

    def said(config="demo_segmentation", root=abdomens, **keys):
        base = DEMO if config == "demo_segmentation" else KINDS
        return here(monkeypatch, capsys, tmp_path, root, evaluate.main, config, *flags(**base | keys))
    return said


def test_several_checkpoints_and_bare_scans(judged, abdomens, tmp_path):
    said = judged(checkpoint=BOTH, out="both", sheets=0)
    results = json.loads((tmp_path / "both/results.json").read_text())["results"]
    a, b = (results[f"{name}.pt"]["rows"][0]["scores"]["original"]["dice"]["mean"] for name in "ab")
    assert f"b.pt minus a.pt: dice mean, original grid {100 * (b - a):+.4g} points, no interval (1 cases, paired)" in said
    found = [nib.load(tmp_path / f"both/predictions_{k}/004.nii.gz") for k in range(2)]
    assert (found[0].get_fdata() != found[1].get_fdata()).any()
    # the same scan without its label: the same prediction, on the scan's own voxels
    (tmp_path / "scans").mkdir()
    source = abdomens / "demo_ct/train/imagesTr/phantom_004.nii.gz"
    os.link(source, tmp_path / "scans/new.nii.gz")
    judged(root=tmp_path, checkpoint="a.pt", images="scans/*.nii.gz", out="bare")
    label, scan = nib.load(tmp_path / "bare/new.nii.gz"), nib.load(source)
    assert label.shape == scan.shape and np.array_equal(label.affine, scan.affine)
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(label.get_fdata(), found[0].get_fdata())
    assert sorted(p.name for p in (tmp_path / "bare").iterdir()) == ["new.nii.gz", "new.png"]
    # what is doubtful of it is said here, too
    lost = nib.Nifti1Image(scan.get_fdata().astype(np.float32), None)
    (tmp_path / "odd").mkdir()
    nib.save(lost, tmp_path / "odd/lost.nii.gz")
    said = judged(root=tmp_path, checkpoint="a.pt", images="odd", out="odd_bare", sheets=0)
    assert "orientation unknown (sform_code and qform_code are 0): taken for LAS; 1 scans: lost" in said
    # a folder, one of its files broken: the other is predicted, and the broken one can be left out
    (tmp_path / "scans/broken.nii.gz").write_bytes(source.read_bytes()[:5000])
    with pytest.raises(SystemExit) as caught:
        judged(root=tmp_path, checkpoint="a.pt", images=str(tmp_path / "scans"), out="folder", sheets=0)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}/scans/broken.nii.gz: the file is damaged")
    assert second.startswith("1 of 2 scans are unusable")
    assert (tmp_path / "folder/new.nii.gz").read_bytes() == (tmp_path / "bare/new.nii.gz").read_bytes()
    assert "new: whole" in judged(root=tmp_path, checkpoint="a.pt", images="scans", out="whole", sheets=0,
                                      exclude=("broken", "of_training"))


def test_classes_of_bare_scans_and_a_second_run(judged, abdomens, tmp_path):
    cfg = settings("demo_classification", **KINDS)
    network = checkpoint_file(tmp_path / "c.pt", cfg, 0, chose=("002", "003"))
    bare = f"{abdomens}/demo_ct/train/imagesTr/phantom_00[23].nii.gz"
    for _ in range(2):                                      # a second run's table replaces the first one's
        said = judged("demo_classification", checkpoint="c.pt", part="val", out="scored")
        judged("demo_classification", checkpoint="c.pt", images=bare, out="bare")
    assert "\ndemo_classification: 2 val cases (the cases that chose the checkpoint)\n" in said
    paths = tmp_path / "scored/predictions_val/probabilities.csv", tmp_path / "bare/probabilities.csv"
    scored, unlabelled = (list(csv.reader(open(path))) for path in paths)
    assert [row[0] for row in scored] == ["id", "002", "003"]
    assert [row[0] for row in unlabelled] == ["id", "phantom_002", "phantom_003"]
    assert scored[0][1:] == ["0", "1"] and [row[1:] for row in scored] == [row[1:] for row in unlabelled]
    cfg = dataclasses.replace(cfg, data=str(abdomens), cache=str(tmp_path / "cache"))
    scans = data.open_scans(cfg, say=lambda *_: None)
    with torch.no_grad():
        image = torch.from_numpy(np.ascontiguousarray(scans[2].open())).float()
        expected = network(image[None]).softmax(1)[0]
    np.testing.assert_allclose([float(v) for v in scored[1][1:]], expected, atol=1e-5)


def test_nobody_is_scored_who_trained_the_network(judged, tmp_path):
    """Scored under another split than it was trained under."""
    cfg = settings("demo_segmentation", **DEMO)
    checkpoint_file(tmp_path / "t.pt", cfg, 0, subjects=["000", "001", "002"])
    with pytest.raises(SystemExit, match="^t.pt: 1 test subjects trained it: 002; give the split of its "):
        judged(checkpoint="t.pt", val="004", test="002")
    with pytest.raises(SystemExit, match="^t.pt: 2 val subjects trained it: 001, 002; "):
        judged(checkpoint="t.pt", val=("001", "002"), test="val", part="val")
    assert "3 train cases\n" in judged(checkpoint="t.pt", part="train", predictions=False, sheets=0)


def test_a_cohort_that_trains_nobody_is_scored_whole(judged, abdomens, tmp_path):
    said = judged(checkpoint="a.pt", test="*", val=(), sheets=0, predictions=False)
    count = len(list((abdomens / "demo_ct/train/imagesTr").glob("*.nii.gz")))
    assert f"{count} test cases\n" in said
    with pytest.raises(SystemExit, match="^no case is left for train; the config gives val = "):
        judged(checkpoint="a.pt", test="*", val=(), part="train")


def test_those_who_chose_are_named_under_another_split(judged, tmp_path):
    cfg = settings("demo_segmentation", **DEMO)
    network = checkpoint_file(tmp_path / "v.pt", cfg, 0, subjects=["000"])
    origin = NOBODY | {"subjects": ["000"], "chose": ["002", "003"]}
    save(tmp_path / "v.pt", finetune.checkpoint(network, cfg, 0, 0.0, origin))
    assert "2 test cases (1 of them chose a checkpoint)\n" in judged(checkpoint="v.pt", val="001", test=("002", "004"), sheets=0)
    assert "1 test cases\n" in judged(checkpoint="v.pt", val="001", test="004", sheets=0)


def test_files_that_trained_are_known_under_other_names(judged, abdomens, tmp_path):
    """As where a list of the same data names its subjects otherwise."""
    cfg = dataclasses.replace(settings("demo_segmentation", **DEMO), data=str(abdomens))
    file = lambda k: abdomens / f"demo_ct/train/imagesTr/phantom_{k}.nii.gz"
    origin = NOBODY | {"subjects": ["a", "b"], "chose": ["c"], "files": dict(train=sorted(data.known_as(file("002"), cfg)),
                                                                             val=sorted(data.known_as(file("003"), cfg)))}
    network = checkpoint_file(tmp_path / "o.pt", cfg, 0)
    save(tmp_path / "o.pt", finetune.checkpoint(network, dataclasses.replace(cfg, dataset="other"), 0, 0.0, origin))
    with pytest.raises(SystemExit, match="^o.pt: 1 test subjects trained it: 002; give the split"):
        judged(checkpoint="o.pt", val="001", test=("002", "003"))
    assert "2 test cases (1 of them chose a checkpoint)\n" in judged(checkpoint="o.pt", val="001", test=("003", "004"), sheets=0)
    said = judged(checkpoint="o.pt", val="003", test="val", out="there", sheets=0)
    assert "1 test cases (the cases that chose the checkpoint)\n" in said
    judged(checkpoint="o.pt", val="003", test="004", part="val", out="there", sheets=0)
    assert {"results.json", "results_val.json", "predictions", "predictions_val"} <= {p.name for p in (tmp_path / "there").iterdir()}


def test_predictions_never_lie_where_the_images_are(judged, abdomens, tmp_path):
    (tmp_path / "mine").mkdir()
    source = abdomens / "demo_ct/train/imagesTr/phantom_003.nii.gz"
    before = source.read_bytes()
    (tmp_path / "mine/a.nii.gz").write_bytes(before)
    with pytest.raises(SystemExit, match="^out = 'mine': the images lie there, and predictions have their names"):
        judged(checkpoint="a.pt", images="mine/*.nii.gz", out="mine")
    assert (tmp_path / "mine/a.nii.gz").read_bytes() == before and len(list((tmp_path / "mine").iterdir())) == 1
    with pytest.raises(SystemExit, match="^images = 'mine': no scan is left; give --exclude="):
        judged(checkpoint="a.pt", images="mine", out="else", exclude="a")
    (tmp_path / "mine/b.nii.gz").write_bytes(before)
    said = judged(checkpoint="a.pt", images="mine", out="else", exclude="a")
    assert "1 of 2 scans are left out by exclude = 'a'" in said and not (tmp_path / "else/a.nii.gz").exists()
    assert (tmp_path / "else/b.nii.gz").exists() and "the predictions hold" not in said
    said = judged(checkpoint="a.pt", images="mine", out="third", exclude="a", remap={14: 1})
    assert said.endswith("the predictions hold the ids of `labels`, after remap = {14: 1}\n")


def test_one_case_has_no_interval():
    made = lambda v: dict(rows=[dict(id=0, subject=0, scores={"original": {"dice": {"mean": v}}})])
    said = evaluate.compare(dict(a=made(0.5), b=made(0.75)), settings("autopet"))
    assert said == "b minus a: dice mean, original grid +25 points, no interval (1 cases, paired)"


def test_a_case_where_one_finds_nothing_rightly_counts_in_the_comparison():
    nan = np.nan
    made = lambda values: dict(rows=[dict(id=k, subject=k, scores={"original": {"dice": {"mean": v}}}) for k, v in
                                     enumerate(values)])
    cfg = settings("autopet")
    said = evaluate.compare(dict(a=made([0.6, nan, nan, nan]), b=made([0.7, 0.0, 0.0, nan])), cfg)
    assert said.startswith("b minus a: dice mean, original grid -63.33 points, 95 % interval ")
    assert said.endswith("(3 of 4 cases, paired; in 2 one rightly finds nothing, which counts 100)")


def test_masks_that_were_missed_are_in_the_table():
    nan = np.nan
    rows = [dict(id=k, subject=k, scores={"original": {"hd95": dict(liver=v, spleen=2.0, mean=m)}})
            for k, (v, m) in enumerate([(3.0, 2.5), (np.inf, 2.0), (np.inf, 2.0), (nan, 2.0)])]
    cfg = settings("btcv")
    text = evaluate.result_tables({"a": dict(rows=rows, summary=tasks.summarise(rows, cfg))}, cfg)
    assert [line.split() for line in text.splitlines() if "missed, cases" in line] == [["missed,", "cases", "2"]]


def test_images_are_written_in_the_unit_of_their_own_rule(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))
    for name in ("ct1", "mr1"):
        nifti(tmp_path / f"{name}_a.nii.gz", BOX)
        nifti(tmp_path / f"{name}_b.nii.gz", BOX)
    cfg = settings("demo_translation", image="{id}_a.nii.gz", target="{id}_b.nii.gz", intensity="scale", window=(0.0, 1000.0),
                   foreground=-1.0, rules={"ct*": {"window": (-50.0, 150.0)}, "mr*": {}}, cache=str(tmp_path / "cache"))
    for scan in data.open_scans(cfg, say=lambda *_: None):
        evaluate.write_prediction(tmp_path / "out", scan, torch.from_numpy(np.ascontiguousarray(scan.open("target"))).float(), cfg)
        found = nib.load(tmp_path / f"out/{scan.id}.nii.gz").get_fdata()
        np.testing.assert_allclose(found, nib.load(scan.case["targets"][0]).get_fdata(), atol=0.6)


def test_thin_scans_have_no_ssim_and_targets_of_another_unit_or_number_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DC_DATA", str(tmp_path))
    thin = np.random.default_rng(0).integers(0, 100, (20, 22, 6)).astype(np.int16)
    for name in "ab":
        nifti(tmp_path / f"1_{name}.nii.gz", thin)
    keys = dict(image="{id}_a.nii.gz", target="{id}_b.nii.gz", intensity="scale", foreground=-1.0, cache=str(tmp_path / "cache"))
    cfg = settings("demo_translation", **keys, window=(0.0, 100.0))
    scan, = data.open_scans(cfg, say=lambda *_: None)
    ready = torch.from_numpy(np.ascontiguousarray(scan.open("target"))).float()
    scores = tasks.score_image(ready, scan, cfg, ["ssim"])["preprocessed"]
    assert np.isnan(scores["ssim"]["whole"]) and scores["mae"]["whole"] == 0
    cfg = settings("demo_translation", **keys, window=(0.0, 15000.0))
    scan, = data.open_scans(cfg, say=lambda *_: None)
    with pytest.raises(SystemExit, match="1_b.nii.gz: no voxel lies 0.01 above air once scaled by intensity = 'scale', window"):
        tasks.score_image(ready, scan, cfg)
    cfg = dataclasses.replace(cfg, target=("{id}_b.nii.gz",) * 2)
    scan, = data.open_scans(cfg, say=lambda *_: None)
    with pytest.raises(SystemExit, match="1_a.nii.gz: the scan has 2 targets, expected 1, as many as `target` names"):
        tasks.check_channels([scan], dataclasses.replace(cfg, target="{id}_b.nii.gz"))


def test_folders_of_slices_without_labels(judged, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for folder, shade in (("a", 3), ("b", 2)):
        (tmp_path / "slices" / folder).mkdir(parents=True)
        grey = (np.arange(48 * 40).reshape(48, 40) // shade % 256).astype(np.uint8)
        for z in range(4):
            Image.fromarray(grey).save(tmp_path / "slices" / folder / f"{z}.png")
    checkpoint_file(tmp_path / "c.pt", settings("demo_classification", **KINDS), 0)
    judged("demo_classification", root=tmp_path, checkpoint="c.pt", images="slices/*/", out="bare")
    assert [row[0] for row in csv.reader(open(tmp_path / "bare/probabilities.csv"))] == ["id", "a", "b"]


@pytest.mark.parametrize("keys, text", [
    (dict(checkpoint="no.pt"), "no.pt: no such checkpoint; train it with finetune.py, or give --check"),
    (dict(checkpoint="encoder.pt"), "encoder.pt: holds no fine-tuned segmentation network, 33 tensors are "
     "missing (skips, bottom, ups, out); expected the best.pt of finetune.py"),
    (dict(labels={1: "a", 2: "b"}), "a.pt: trained with labels = {1: 'spleen', "),
    (dict(labels={k: f"organ {k}" for k in range(1, 14)}), "a.pt: trained with labels = {1: 'spleen', "),
    (dict(checkpoint="f.pt", merge="legacy", labels={1: "a", 2: "b"}), "f.pt: 14 outputs in the file, 3 in "
     "the model; the config declares other classes than it was trained for"),
    (dict(feature_size=8), "a.pt: does not fit the model: feature_size is 4 in the file, 8 in the model"),
    (dict(in_channels=2), "a.pt: trained with in_channels = 1, the config has 2"),
    (dict(residual=True), "a.pt: trained with residual = False, the config has True"),
    (dict(checkpoint="t.pt"), "t.pt: trained with task = 'translation', the config has 'segmentation'"),
    (dict(num_heads=(3, 1, 1, 1)), "num_heads"), (dict(merge="foo"), "merge"),
    (dict(part="rest"), "part = 'rest', expected 'train', 'val' or 'test'"),
    (dict(images="*.nii.gz", checkpoint=BOTH), "checkpoint = ('a.pt', 'b.pt'), expected one with `images`"),
    (dict(images="nowhere/*.nii.gz"), "images = 'nowhere/*.nii.gz': there is no folder nowhere"),
    (dict(images="/nowhere/at/all"), "images = '/nowhere/at/all': there is no folder /nowhere/at"),
    (dict(images="('{id}_a.nii.gz', '{id}_b.nii.gz')"), "1_a.nii.gz: the scan has 2 channels, in_channels "),
])
def test_what_evaluate_refuses(judged, keys, text, tmp_path):
    encoder_file(tmp_path / "encoder.pt")
    network = checkpoint_file(tmp_path / "t.pt", settings("demo_segmentation", **DEMO), 0, task="translation")
    save(tmp_path / "f.pt", to_monai(network.state_dict(), "legacy"))       # states nothing but its weights
    for name in ("1_a", "1_b"):
        nifti(tmp_path / f"{name}.nii.gz", BOX)
    with pytest.raises(SystemExit) as caught:
        judged(**dict(checkpoint="a.pt") | keys)
    said = str(caught.value)
    assert (said.startswith(text) or text in keys and text in said) and "\n" not in said


def test_regions_in_another_order_are_refused_and_preprocessing_is_compared(tmp_path, capsys):
    cfg, path = settings("brats21", **NETWORK), tmp_path / "r.pt"
    checkpoint_file(path, cfg, 0)

    def said(**keys):
        capsys.readouterr()
        evaluate.restore(path, dataclasses.replace(cfg, **keys), torch.device("cpu"))
        return capsys.readouterr().out
    with pytest.raises(SystemExit, match="r.pt: trained with regions = {'TC': "):
        said(regions=dict(reversed(cfg.regions.items())))
    assert "differs" not in said()
    expected = "r.pt: preprocessing differs: spacing was () in training, is (2.0, 2.0, 2.0) here"
    assert expected in said(spacing=(2.0, 2.0, 2.0))
