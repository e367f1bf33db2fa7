"""metrics.py against MONAI, scikit-image, scikit-learn, closed forms and brute force."""
import itertools

import numpy as np
import pytest
import torch
from einops import rearrange
from scipy import ndimage

import metrics


def rng(seed=0):
    return np.random.default_rng(seed)


def blobs(shape, classes, seed):
    """Smooth random label map, so that surfaces and components look like organs and not like noise."""
    fields = np.stack([ndimage.gaussian_filter(rng(seed + i).normal(size=shape), 2) for i in range(classes)])
    fields[0] += np.abs(fields).max() * 0.3
    return fields.argmax(0)


def onehot(ids, classes):
    """(x, y, z) ids -> (1, k, x, y, z) float, as MONAI wants them."""
    return rearrange(torch.nn.functional.one_hot(torch.from_numpy(ids), classes), "x y z k -> 1 k x y z").float()


# ---- segmentation


def test_dice_equals_monai_and_knows_absent_classes():
    meandice = pytest.importorskip("monai.metrics.meandice")
    p, t = blobs((24, 20, 22), 5, 0), blobs((24, 20, 22), 5, 3)
    p[p == 3] = 0                                           # 3 absent from the prediction, 5 and 6 from the truth
    p[0, 0, 0] = 5
    found = metrics.dice(p.astype(np.uint8), torch.from_numpy(t), 7)
    expected = meandice.compute_dice(onehot(p, 7), onehot(t, 7), ignore_empty=False)[0].numpy()
    assert found.shape == (7,) and found[3] == 0 and found[5] == 0 and np.isnan(found[6])
    np.testing.assert_allclose(found[:6], expected[:6], atol=1e-6)
    for c in (1, 2):
        both = sum(a == c and b == c for a, b in zip(p.flat, t.flat))
        np.testing.assert_allclose(found[c], 2 * both / ((p == c).sum() + (t == c).sum()), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.full((2, 2), 3), np.full((2, 2), -1), np.full((2, 2), 0.5), np.full((2, 2), np.nan),
                                 np.zeros((2, 3), int)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_dice_refuses(bad):
    with pytest.raises(ValueError, match="dice"):
        metrics.dice(bad, np.zeros((2, 2), int), 3)


def test_dice_of_regions_that_overlap():
    true, other = (np.array(ids).reshape(4, 1, 1) for ids in ([0, 1, 2, 4], [0, 1, 2, 2]))
    true, other = (np.stack([np.isin(ids, g) for g in ((1, 4), (1, 2, 4), (4,))]) for ids in (true, other))
    np.testing.assert_allclose(metrics.dice_regions(other, true), [2 / 3, 1, 0])            # TC, WT, ET
    assert np.isnan(metrics.dice_regions(other & False, true & False)).all()


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 3.0)])
def test_hausdorff95_equals_monai(spacing):
    witness = pytest.importorskip("monai.metrics")
    p, t = blobs((24, 28, 22), 4, 0), blobs((24, 28, 22), 4, 9)
    metric = witness.HausdorffDistanceMetric(include_background=True, percentile=95, reduction="none")
    expected = metric(onehot(p, 4), onehot(t, 4), spacing=spacing)[0].numpy()
    found = [metrics.hausdorff95(p == c, t == c, spacing) for c in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_hausdorff95_by_brute_force_and_for_absent_objects():
    p, t, empty = np.zeros((9, 8, 7), bool), np.zeros((9, 8, 7), bool), np.zeros((9, 8, 7), bool)
    p[1:5, 1:6, 1:6], t[4:9, 2:8, 0:3] = True, True
    steps = np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)])

    def surface(mask):
        at = set(map(tuple, np.argwhere(mask)))
        rim = [v for v in sorted(at) if any(tuple(np.add(v, s)) not in at for s in steps)]
        return np.array(rim) * (1.0, 2.0, 3.5)

    pairs = np.linalg.norm(surface(p)[:, None] - surface(t)[None], axis=-1)
    expected = max(np.percentile(pairs.min(1), 95), np.percentile(pairs.min(0), 95))
    np.testing.assert_allclose(metrics.hausdorff95(p, t, (1.0, 2.0, 3.5)), expected, rtol=1e-12)
    assert metrics.hausdorff95(p, p, (1, 1, 1)) == 0
    assert np.isnan(metrics.hausdorff95(empty, empty, (1, 1, 1)))
    assert metrics.hausdorff95(p, empty, (1, 1, 1)) == metrics.hausdorff95(empty, p, (1, 1, 1)) == np.inf


def lesions(mask):
    """18-connected components as sets of voxels, by flood fill."""
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if 0 < np.abs(s).sum() < 3]
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            v = edge.pop()
            part.add(v)
            near = {tuple(a + b for a, b in zip(v, s)) for s in steps} & left
            left -= near
            edge += near
        found.append(part)
    return found


def test_false_volumes_by_flood_fill():
    for seed in range(4):
        p, t = rng(seed).random((12, 11, 10)) < 0.06, rng(seed + 9).random((12, 11, 10)) < 0.06
        voxels = [sum(len(part) for part in lesions(a) if not any(b[v] for v in part)) for a, b in ((p, t), (t, p))]
        assert min(voxels) > 0
        found = metrics.false_volumes(p, t, (2.0, 2.0, 3.0))
        np.testing.assert_allclose(found, np.array(voxels) * 0.012, rtol=1e-12)
    corner = np.zeros((4, 4, 4), bool)
    corner[0, 0, 0] = corner[1, 1, 1] = True                # share a corner alone: two lesions
    hit = corner.copy()
    hit[1, 1, 1] = False
    assert metrics.false_volumes(corner, hit, (10, 10, 10)) == (1.0, 0.0)
    assert metrics.false_volumes(corner & False, corner, (10, 10, 10)) == (0.0, 2.0)


# ---- images


@pytest.mark.parametrize("shape", [(7, 9, 11), (30, 24, 20), (140, 9, 8)])      # the last is scored in three slabs
def test_psnr_and_ssim_equal_scikit_image(shape):
    witness = pytest.importorskip("skimage.metrics")
    t = ndimage.gaussian_filter(rng().normal(size=shape), 1.5) * 100
    p = t + rng(1).normal(size=shape) * 5
    expected = witness.peak_signal_noise_ratio(t, p, data_range=80.0)
    np.testing.assert_allclose(metrics.psnr(p, t, 80.0), expected, rtol=1e-12)
    for reach, window in ((80.0, 7), (3.0, 5)):
        expected = witness.structural_similarity(t, p, data_range=reach, win_size=window)
        np.testing.assert_allclose(metrics.ssim(p, t, reach, window), expected, rtol=1e-8)
    single = torch.from_numpy(p).float()[None, None], torch.from_numpy(t).float()[None, None]
    np.testing.assert_allclose(metrics.ssim(*single, 80.0), metrics.ssim(p, t, 80.0), rtol=1e-5)


def test_image_scores_in_closed_form():
    t = rng().normal(size=(8, 8, 8))
    t = (t - t.mean()) / t.std()
    p = t + 0.1
    np.testing.assert_allclose(metrics.psnr(p, t, 1.0), 20, rtol=1e-9)          # 10 log10(1 / 0.01)
    np.testing.assert_allclose(metrics.nmse(p, t), 0.01, rtol=1e-9)             # z-scored: the mean squared error
    np.testing.assert_allclose(metrics.nmse(np.zeros_like(t), 7 * t), 1, rtol=1e-12)
    assert metrics.psnr(t, t, 1.0) == np.inf and metrics.ssim(t, t, 1.0) == 1 and metrics.nmse(t, t) == 0
    assert np.isnan(metrics.psnr(np.full_like(t, np.nan), t, 1.0))              # never the inf of a perfect image
    assert metrics.psnr(np.array([255], np.uint8), np.array([0], np.uint8), 255) == 0       # no wrap-around


@pytest.mark.parametrize("metric, change", [
    ("psnr", dict(data_range=0)), ("ssim", dict(data_range=np.nan)), ("ssim", dict(data_range=1.0, window=9)),
    ("ssim", dict(data_range=1.0, window=4)), ("nmse", dict(target=np.zeros((8, 8, 8)))),
    ("nmse", dict(target=np.zeros((7, 8, 8))))])
def test_image_scores_refuse(metric, change):
    given = dict(prediction=np.ones((8, 8, 8)), target=np.ones((8, 8, 8))) | change
    with pytest.raises(ValueError, match=f"^{metric}: "):
        getattr(metrics, metric)(**given)


# ---- classes


def test_classification_scores_equal_scikit_learn():
    witness = pytest.importorskip("sklearn.metrics")
    labels = rng().choice(3, 90, p=(0.6, 0.3, 0.1))
    probabilities = rng(1).dirichlet((1, 1, 1), 90).round(2) + 0.5 * np.eye(3)[labels]      # rounded: ties
    probabilities /= probabilities.sum(1, keepdims=True)
    found, predicted = metrics.classification_scores(probabilities, labels), probabilities.argmax(1)
    assert found["confusion"] == witness.confusion_matrix(labels, predicted).tolist()
    np.testing.assert_allclose(found["accuracy"], witness.accuracy_score(labels, predicted))
    np.testing.assert_allclose(found["balanced_accuracy"], witness.balanced_accuracy_score(labels, predicted))
    np.testing.assert_allclose(found["recall"], witness.recall_score(labels, predicted, average=None))
    expected = witness.roc_auc_score(labels, probabilities, multi_class="ovr")
    np.testing.assert_allclose(found["auc_mean"], expected)
    assert found["majority_accuracy"] == np.bincount(labels).max() / 90
    few = labels != 2
    without = metrics.classification_scores(probabilities[few], labels[few])
    assert np.isnan(without["recall"][2]) and np.isnan(without["auc"][2]) and np.isfinite(without["auc_mean"])
    np.testing.assert_allclose(without["auc"][1], witness.roc_auc_score(labels[few] == 1, probabilities[few, 1]))
    for bad in (labels[1:], labels + 1, labels * 1.0):
        with pytest.raises(ValueError, match="labels"):
            metrics.classification_scores(probabilities, bad)


# ---- means and their intervals


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    values = rng().normal(3, 2, 40)
    error = values.std() / np.sqrt(40)                      # many cases: the normal interval
    expected = (values.mean(), values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    np.testing.assert_allclose(metrics.bootstrap_mean(values, seed=1), expected, atol=0.12 * error)
    intervals = [metrics.bootstrap_mean(rng(seed).normal(3, 2, 40), seed)[1:] for seed in range(200)]
    assert 0.88 < np.mean([low <= 3 <= high for low, high in intervals]) < 0.99


def test_bootstrap_by_enumeration_of_all_samples():
    values = np.array([0.0, 1.0, 5.0, 7.0])
    means = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=4)])        # all 256
    at = [means[256 * 25 // 1000], means[256 * 975 // 1000]]
    for share, value in zip((0.025, 0.975), at):            # both lie amid equals, beyond the noise of 10,000 draws
        assert (means < value).mean() < share - 0.005 and (means <= value).mean() > share + 0.005
    np.testing.assert_allclose(metrics.bootstrap_mean(values)[1:], at, rtol=1e-12)


def test_bootstrap_of_more_cases_than_one_batch_of_draws_holds():
    values = rng().normal(size=5000)                        # 838 of the 10,000 draws at once
    mean, low, high = metrics.bootstrap_mean(values)
    np.testing.assert_allclose((high - low) / 2, 1.96 * values.std() / np.sqrt(5000), rtol=0.1)


def test_bootstrap_of_few_cases_and_of_gaps():
    whole = metrics.bootstrap_mean([0.2, 0.8, 0.5], seed=3)
    again = metrics.bootstrap_mean([0.2, 0.8, 0.5], seed=3)
    assert metrics.bootstrap_mean([0.2, np.nan, 0.8, 0.5, np.nan], seed=3) == whole == again
    assert whole[1] < whole[0] < whole[2]
    assert metrics.bootstrap_mean([0.7])[0] == 0.7 and np.isnan(metrics.bootstrap_mean([0.7])[1:]).all()
    assert np.isnan(metrics.bootstrap_mean([])).all() and np.isnan(metrics.bootstrap_mean([np.nan])).all()
    mean, low, high = metrics.bootstrap_mean([1.0, np.inf])
    assert mean == np.inf and np.isnan([low, high]).all()
    with pytest.raises(ValueError, match="one number per case"):
        metrics.bootstrap_mean(np.zeros((3, 2)))


def test_paired_difference_sees_what_unpaired_means_hide():
    hard = rng().normal(0.6, 0.2, 12)                       # cases differ far more than models
    a, b = hard + 0.02 + rng(1).normal(0, 0.005, 12), hard.copy()
    b[3], a[5] = np.nan, np.nan
    mean, low, high = metrics.paired_difference(a, b)
    both = np.isfinite(a) & np.isfinite(b)
    np.testing.assert_allclose(mean, np.mean(a[both] - b[both]))
    assert 0 < low < mean < high and metrics.bootstrap_mean(a)[1] < metrics.bootstrap_mean(b)[0]
    with pytest.raises(ValueError, match="same cases"):
        metrics.paired_difference(a, b[1:])
