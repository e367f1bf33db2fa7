"""evaluate.py against MONAI, scikit-image, scikit-learn, nibabel, closed forms and brute force."""
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from scipy import ndimage

import evaluate as ev
import metrics


def rng(seed=0):
    return np.random.default_rng(seed)


def blobs(shape, classes, seed):
    """Smooth random label map, so that surfaces and components look like organs and not like noise."""
    fields = np.stack([ndimage.gaussian_filter(rng(seed + i).normal(size=shape), 2) for i in range(classes)])
    fields[0] += np.abs(fields).max() * 0.3
    return fields.argmax(0)


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
    found = ev.sliding_window(network, volume, window, overlap, 3, blend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sliding_window_equals_monai_in_double_and_per_axis():
    inferers = pytest.importorskip("monai.inferers")
    network, volume = torch.nn.Conv3d(1, 2, 5, padding=2).double(), torch.randn(1, 1, 40, 33, 31, dtype=torch.float64)
    with torch.no_grad():
        expected = inferers.sliding_window_inference(volume, (20, 8, 16), 4, network, (0.3, 0.55, 0.7), mode="gaussian")
    found = ev.sliding_window(network, volume, (20, 8, 16), (0.3, 0.55, 0.7), 4)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)        # weights are float32 on both sides


@pytest.mark.parametrize("blend, batch, store", [("gaussian", 1, None), ("gaussian", 5, "cpu"), ("constant", 100, "device")])
def test_sliding_window_of_a_pointwise_network_is_its_forward(blend, batch, store):
    volume, seen = torch.randn(1, 1, 21, 30, 7), []
    def network(x):
        seen.append(len(x))
        return torch.cat([x, x**2, x.sin()], 1)
    found = ev.sliding_window(network, volume, (8, 11, 9), 0.6, batch, blend, store=store)
    torch.testing.assert_close(found, network(volume), rtol=0, atol=1e-5)
    assert max(seen[:-1]) <= batch


def test_sliding_window_accumulates_bfloat16_in_float32():
    volume = torch.ones(1, 1, 20, 20, 20)
    found = ev.sliding_window(lambda x: (x * 3).bfloat16(), volume, 8, 0.75, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, volume * 3, rtol=0, atol=1e-5)      # bfloat16 sums would be off by 1e-2


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_sliding_window_skips_background_windows(blend):
    torch.manual_seed(1)
    network, volume = torch.nn.Conv3d(1, 2, 3, padding=1), torch.randn(1, 1, 26, 19, 5)
    foreground = torch.zeros(26, 19, 5, dtype=torch.bool)
    foreground[1:3, 2:5, 1] = foreground[20:22, 16:18, 3] = True
    runs = []
    def counted(x):
        runs.append(len(x))
        return network(x)
    found = ev.sliding_window(counted, volume, 8, 0.5, 2, blend, foreground, outside=(7.0, -7.0))

    padded = torch.nn.functional.pad(volume, (1, 2))                      # z: 5 -> 8, the smaller half in front
    mask = torch.nn.functional.pad(foreground, (1, 2))
    axis = np.exp(-0.5 * ((np.arange(8) - 3.5) / 1.0) ** 2)
    weight = np.maximum(axis[:, None, None] * axis[:, None] * axis, 1e-3) if blend == "gaussian" else np.ones((8, 8, 8))
    total, norm, windows = np.zeros((2, 26, 19, 8)), np.zeros((26, 19, 8)), 0
    for x, y in itertools.product((0, 4, 8, 12, 16, 18), (0, 4, 8, 11)):
        if mask[x:x + 8, y:y + 8].any():
            with torch.no_grad():
                total[:, x:x + 8, y:y + 8] += network(padded[:, :, x:x + 8, y:y + 8])[0].double().numpy() * weight
            norm[x:x + 8, y:y + 8] += weight
            windows += 1
    expected = np.where(norm > 0, total / np.where(norm > 0, norm, 1), np.array([7, -7]).reshape(2, 1, 1, 1))[..., 1:6]
    assert sum(runs) == windows < 24 and (norm == 0).any()
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("change, text", [
    (dict(volume=torch.zeros(1, 8, 8, 8)), "volume"), (dict(overlap=1.0), "overlap"), (dict(window=(4, 4)), "three"),
    (dict(blend="linear"), "linear"), (dict(store="gpu"), "gpu"), (dict(predict=lambda x: x[:, :, 1:]), "predict must return"),
    (dict(foreground=torch.zeros(8, 8, 8)), "no True voxel"), (dict(foreground=torch.zeros(8, 8, 9)), "foreground"),
    (dict(outside=(1, 2, 3)), "outside"), (dict(batch=0), "batch"), (dict(window=0), "window")])
def test_sliding_window_refuses(change, text):
    given = dict(predict=lambda x: x, volume=torch.zeros(1, 1, 8, 8, 8), window=4, overlap=0.5, batch=2) | change
    with pytest.raises(ValueError, match=text) as error:
        ev.sliding_window(**given)
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
    found = ev.to_original(array, pre, orig, shape, order).numpy()
    expected = resample_from_to(nib.Nifti1Image(array, pre), (shape, orig), order=order, mode="constant").get_fdata()
    at = np.linalg.inv(pre) @ orig @ np.vstack([np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])
    at, last = at[:3].reshape(3, *shape), np.array(size).reshape(3, 1, 1, 1) - 1
    between = ((at >= 0) & (at <= last)).all(0)                           # nibabel stops at the outermost centres
    beyond = ((at < -0.51) | (at > last + 0.51)).any(0)
    assert between.sum() > 500 and beyond.any()
    np.testing.assert_allclose(found[between], expected[between], atol=1e-4)
    assert (found[beyond] == 0).all() and (found[~between & ~beyond] != 0).mean() > 0.95
    several = ev.to_original(torch.from_numpy(np.stack([array, -array])), pre, orig, shape, order)
    np.testing.assert_array_equal(several.numpy(), np.stack([found, -found]))


def test_to_original_is_exact_where_centres_meet():
    nib = pytest.importorskip("nibabel")
    orig = np.diag([-0.7, -0.7, 3.0, 1.0])
    orig[:3, 3] = (101.3, 88.1, -17.9)                                    # LPS
    ids = rng().integers(0, 9, (14, 17, 6)).astype(np.uint8)
    same = ev.to_original(ids, orig, orig, ids.shape, 0)
    assert same.dtype == torch.uint8 and (same.numpy() == ids).all()
    values = rng(1).normal(size=ids.shape).astype(np.float32)
    image = nib.as_closest_canonical(nib.Nifti1Image(values, orig))
    crop = image.slicer[2:12, 3:15, 1:5]
    back = ev.to_original(crop.get_fdata(dtype=np.float32), crop.affine, orig, ids.shape, 1, fill=-5).numpy()
    whole = np.full_like(values, -5)
    whole[2:12, 2:14, 1:5] = values[2:12, 2:14, 1:5]                      # x: 14 - 12 .. 14 - 2, y: 17 - 15 .. 17 - 3
    np.testing.assert_array_equal(back, whole)


@pytest.mark.parametrize("change, text", [(dict(order=2), "order"), (dict(array=np.zeros((4, 4))), "expected"),
                                          (dict(affine_orig=np.pad(TILT - np.eye(3), (0, 1)) + np.eye(4)), "turned")])
def test_to_original_refuses(change, text):
    given = dict(array=np.zeros((4, 4, 4)), affine_pre=np.eye(4), affine_orig=np.eye(4), shape_orig=(4, 4, 4), order=1) | change
    with pytest.raises(ValueError, match=text):
        ev.to_original(**given)


# 4. probes


def test_token_labels_by_brute_force():
    labels = blobs((12, 8, 10), 5, 2) * 7                                 # ids with gaps
    labels[:4, :4, :5], labels[0, 0, 0] = 0, 28                           # one voxel of 80: below the share
    ids, purity = ev.token_labels(labels, (4, 4, 5), share=0.1)
    token = 0
    for x, y, z in itertools.product(range(3), range(2), range(2)):       # x slowest
        patch = labels[4 * x:4 * x + 4, 4 * y:4 * y + 4, 5 * z:5 * z + 5].ravel().tolist()
        organs = sorted({v for v in patch if v}, key=lambda v: (-patch.count(v), v))
        expected = organs[0] if organs and patch.count(organs[0]) >= 8 else 0
        assert ids[token] == expected and purity[token] == patch.count(expected) / 80
        token += 1
    assert token == len(ids) and ids[0] == 0 and len(set(ids)) > 2
    tiny = np.zeros((8, 8, 8), int)
    tiny[:4, :5, :5] = 3                                                  # 100 of 512 voxels
    assert ev.token_labels(tiny, 8)[0].tolist() == [3] and ev.token_labels(tiny, 8, share=0.2)[0].tolist() == [0]
    assert ev.token_labels(tiny, 8, share=100 / 512)[0].tolist() == [3]   # the share itself is enough
    for bad in (np.zeros((8, 8, 9), int), np.zeros((8, 8, 8))):
        with pytest.raises(ValueError, match="token_labels"):
            ev.token_labels(bad, 8)


def features(seed, centres, count):
    """Gaussian clouds, class i of count[i] tokens around centres[i]."""
    y = np.repeat(np.arange(len(count)) + 1, count)
    return centres[y - 1] + rng(seed).normal(size=(len(y), centres.shape[1])), y


def test_probes_read_separable_features_and_no_others():
    pytest.importorskip("sklearn")
    centres, count = rng(9).normal(size=(4, 16)) * 6, (300, 60, 30, 25)
    train, test = features(0, centres, count), features(1, centres, count)
    blind_train, blind_test = features(2, centres * 0, count), features(3, centres * 0, count)
    for probe in (ev.linear_probe, ev.knn_probe):
        good, bad = probe(*train, *test), probe(*blind_train, *blind_test)
        assert good["balanced_accuracy"] > 0.97 and list(good["recall"]) == [1, 2, 3, 4]
        assert bad["balanced_accuracy"] < 0.4                             # a quarter is chance, whatever the class sizes
        drawn = [probe(*blind_train, *blind_test, seed=seed, limit=24) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]                           # the seed alone chooses the tokens
        fewer = probe(train[0][train[1] != 4], train[1][train[1] != 4], *test)
        assert fewer["untrained"] == [4] and list(fewer["recall"]) == [1, 2, 3]
    scaled = [a * np.logspace(-4, 4, 16) + 1e3 for a in (train[0], test[0])]         # standardised away
    assert ev.linear_probe(scaled[0], train[1], scaled[1], test[1])["balanced_accuracy"] > 0.97
    longer = ev.knn_probe(train[0] * rng(5).uniform(0.1, 9, (415, 1)), train[1], *test)      # cosine: length is nothing
    assert longer == ev.knn_probe(*train, *test)


def test_linear_probe_weighs_classes_alike():
    pytest.importorskip("sklearn")
    centres = np.array([[0.0, 0], [1.5, 0]])                              # overlapping, 40 to 1
    found = ev.linear_probe(*features(0, centres, (800, 20)), *features(1, centres, (800, 200)))
    assert abs(found["recall"][1] - found["recall"][2]) < 0.2 and found["recall"][2] > 0.6


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_silhouette_by_hand(metric):
    pytest.importorskip("sklearn")
    x, y = features(4, rng(8).normal(size=(3, 5)) * 2, (6, 5, 4))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T if metric == "cosine" else np.linalg.norm(x[:, None] - x[None], axis=-1)
    values = []
    for i in range(len(x)):
        own = distance[i, (y == y[i]) & (np.arange(len(x)) != i)].mean()
        other = min(distance[i, y == c].mean() for c in (1, 2, 3) if c != y[i])
        values.append((other - own) / max(own, other))
    mean, per_class = ev.silhouette(x, y, metric)
    np.testing.assert_allclose(mean, np.mean(values), rtol=1e-9)
    for c in (1, 2, 3):
        np.testing.assert_allclose(per_class[c], np.mean(np.array(values)[y == c]), rtol=1e-9)
    for bad in (dict(metric="manhattan"), dict(y=np.ones(15))):
        with pytest.raises(ValueError, match="silhouette"):
            ev.silhouette(**dict(x=x, y=y, metric=metric) | bad)


def test_effective_rank_in_closed_form():
    basis = np.linalg.qr(rng().normal(size=(50, 6)) - 0)[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0]                        # orthonormal columns of mean 0
    turn = np.linalg.qr(rng(1).normal(size=(6, 6)))[0]
    for values in ([1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [8, 4, 2, 1, 1, 0]):
        share = np.array([v for v in values if v]) / sum(values)
        found = ev.effective_rank(basis * values @ turn.T + 7.0)          # an offset is centred away
        np.testing.assert_allclose(found, np.exp(-(share * np.log(share)).sum()), rtol=1e-6)
    assert ev.effective_rank(np.ones((9, 4)) * 3.3) == 0


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match="scikit-learn is not installed.*pip install"):
        ev.silhouette(np.eye(4), [0, 0, 1, 1])


# 5. pictures


def test_pictures_keep_left_and_right():
    volume = np.zeros((5, 6, 7))
    volume[4, 0, 0], volume[0, 5, 0], volume[0, 0, 6] = 1, 2, 3           # right, front, head ends
    cuts = {plane[0]: ev._cut(plane, (0, 0, 0), volume)[0] for plane in ev.PLANES}
    assert cuts["axial"].shape == (6, 5) and cuts["axial"][0, 0] == 1     # right of the patient: left; row 0 is the lower edge
    assert cuts["axial"][5, 4] == 2 and cuts["coronal"][6, 4] == 3 and cuts["coronal"][0, 0] == 1
    assert cuts["sagittal"][0, 0] == 2 and cuts["sagittal"][6, 5] == 3    # front on the left, head on top


def test_contact_sheet_cuts_the_largest_object():
    truth = np.zeros((20, 21, 22), int)
    truth[2:5, 2:5, 2:5], truth[10:18, 9:14, 6], truth[12, 10:12, 3:9] = 1, 2, 2
    truth[:, :, 20][np.indices((20, 21)).sum(0) % 2 == 0] = 2             # more voxels of its class, none beside another
    assert ev._show_where(truth, truth * 0) == [12, 10, 6]
    assert ev._show_where(truth * 0, truth) == [12, 10, 6] and ev._show_where(truth * 0, truth * 0) == [10, 10, 11]


def test_contact_sheet_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    real = os.environ.get("S2DC_REAL_DATA")
    if real:
        nib = pytest.importorskip("nibabel")
        folder = Path(real) / "ct"
        scan = nib.as_closest_canonical(nib.load(folder / "ts_abdomen_3mm.nii.gz"))
        truth = nib.as_closest_canonical(nib.load(folder / "labels/ts_abdomen_3mm_organs13.nii.gz")).get_fdata().astype(int)
        voxels, spacing = scan.get_fdata(), scan.header.get_zooms()
    else:
        truth, spacing = blobs((40, 30, 50), 4, 0), (1.0, 2.0, 1.0)
        voxels = truth + rng().normal(size=truth.shape)
    pairs = dict(both=(truth, np.roll(truth, 2, 0)), none=(truth * 0, truth * 0), false=(truth * 0, truth), exact=(truth, truth))
    for name, (a, b) in pairs.items():
        ev.contact_sheet(tmp_path / f"{name}.png", voxels, a, b, spacing, name)
    seen = {file.stem: np.asarray(image.open(file).convert("RGB")).astype(int) for file in tmp_path.glob("*.png")}
    coloured = {name: (np.ptp(picture, axis=2) > 40).mean() for name, picture in seen.items()}
    assert all(picture.shape[1] == 1320 for picture in seen.values())
    assert coloured["none"] == 0 < coloured["false"] and coloured["both"] > coloured["false"] > 0.02       # lines over a fill
    strong = {name: (np.ptp(picture, axis=2) > 140).mean() for name, picture in seen.items()}              # of full colour: lines, legend
    assert strong["exact"] > 2 * strong["false"]
    with pytest.raises(ValueError, match="contact_sheet"):
        ev.contact_sheet(tmp_path / "x.png", voxels, truth[1:], truth, spacing, "x")


def test_image_sheet_names_its_columns_and_shows_their_scales(monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    kept = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: kept.append(self))
    target = np.random.default_rng(0).normal(size=(9, 8, 7))
    ev.image_sheet("sheet.png", target + 1, target, target * 2, (1, 1, 2), "case")
    titles = [axis.get_title() for axis in kept[0].axes]
    assert titles[:4] == ["input, axial", "target, axial", "prediction, axial", "prediction - target, axial"]
    assert titles[4:12] == ["coronal"] * 4 + ["sagittal"] * 4 and len(titles) == 16         # four colour bars
    drawn = [axis.images[0] for axis in kept[0].axes[:4]]
    for picture, volume in zip(drawn, (target + 1, target, target * 2, target)):            # twice the target errs by the target
        np.testing.assert_allclose(picture.get_array(), volume[:, :, 3].T[:, ::-1])
    low, high = drawn[3].get_clim()
    assert drawn[1].get_clim() == drawn[2].get_clim() and -low == high > 0
