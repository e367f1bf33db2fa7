"""metrics.py against MONAI, scikit-image, scikit-learn, closed forms and brute force."""
import itertools

import numpy as np
import pytest
import torch
from einops import rearrange
from numpy.random import default_rng as rng
from scipy import ndimage

import metrics


def blobs(shape, classes, seed):
    """Smooth random label map, so that surfaces and components look like organs and not like noise."""
    fields = np.stack([ndimage.gaussian_filter(rng(seed + i).normal(size=shape), 2) for i in range(classes)])
    fields[0] += np.abs(fields).max() * 0.3
    return fields.argmax(0)


def onehot(ids, k):
    """(x, y, z) ids -> (1, k, x, y, z) float, as MONAI wants them."""
    return rearrange(torch.nn.functional.one_hot(torch.from_numpy(ids), k), "x y z k -> 1 k x y z").float()


def test_dice_equals_monai_and_knows_absent_classes():
    meandice = pytest.importorskip("monai.metrics.meandice")
    p, t = blobs((24, 20, 22), 5, 0), blobs((24, 20, 22), 5, 3)
    p[p == 3] = 0                                       # 3 absent from the prediction, 5 and 6 from the truth
    p[0, 0, 0] = 5
    found = metrics.dice(p.astype(np.uint8), torch.from_numpy(t), 7)
    expected = meandice.compute_dice(onehot(p, 7), onehot(t, 7), ignore_empty=False)[0].numpy()
    assert found.shape == (7,) and found[3] == 0 and found[5] == 0 and np.isnan(found[6])
    np.testing.assert_allclose(found[:6], expected[:6], atol=1e-6)
    for c in (1, 2):
        both = sum(a == c and b == c for a, b in zip(p.flat, t.flat))
        np.testing.assert_allclose(found[c], 2 * both / ((p == c).sum() + (t == c).sum()), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.full((2, 2), 3), np.full((2, 2), -1), np.full((2, 2), 0.5),
                                 np.full((2, 2), np.nan), np.zeros((2, 3), int)])
def test_dice_refuses(bad):
    with pytest.raises(ValueError, match="dice"):
        metrics.dice(bad, np.zeros((2, 2), int), 3)


def test_dice_of_regions_that_overlap():
    true, other = (np.array(ids).reshape(4, 1, 1) for ids in ([0, 1, 2, 4], [0, 1, 2, 2]))
    true, other = (np.stack([np.isin(ids, g) for g in ((1, 4), (1, 2, 4), (4,))]) for ids in (true, other))
    np.testing.assert_allclose(metrics.dice_regions(other, true), [2 / 3, 1, 0])        # BraTS21's TC, WT, ET
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
    p, t, empty = np.zeros((3, 9, 8, 7), bool)
    p[1:5, 1:6, 1:6], t[4:9, 2:8, 0:3] = True, True
    steps = [*np.eye(3, dtype=int), *-np.eye(3, dtype=int)]

    def surface(mask):
        at = set(map(tuple, np.argwhere(mask)))
        edge = [v for v in sorted(at) if any(tuple(v + s) not in at for s in steps)]
        return np.array(edge) * (1.0, 2.0, 3.5)
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
        p, t = (rng(s).random((12, 11, 10)) < 0.06 for s in (seed, seed + 9))
        parts = [[part for part in lesions(a) if not any(b[v] for v in part)] for a, b in ((p, t), (t, p))]
        expected = [sum(map(len, each)) * 0.012 for each in parts]
        assert min(expected) > 0
        np.testing.assert_allclose(metrics.false_volumes(p, t, (2.0, 2.0, 3.0)), expected, rtol=1e-12)
    corner = np.zeros((4, 4, 4), bool)
    corner[0, 0, 0] = corner[1, 1, 1] = True            # share a corner alone: two lesions
    hit = corner & (np.arange(4) < 1)
    assert metrics.false_volumes(corner, hit, (10, 10, 10)) == (1.0, 0.0)
    assert metrics.false_volumes(corner & False, corner, (10, 10, 10)) == (0.0, 2.0)


@pytest.mark.parametrize("shape", [(7, 9, 11), (30, 24, 20), (140, 9, 8)])      # the last in three slabs
def test_psnr_and_ssim_equal_scikit_image(shape):
    witness = pytest.importorskip("skimage.metrics")
    t = ndimage.gaussian_filter(rng(0).normal(size=shape), 1.5) * 100
    p = t + rng(1).normal(size=shape) * 5
    assert metrics.psnr(p, t, 80.0) == pytest.approx(witness.peak_signal_noise_ratio(t, p, data_range=80.0))
    for reach, window in ((80.0, 7), (3.0, 5)):
        expected = witness.structural_similarity(t, p, data_range=reach, win_size=window)
        np.testing.assert_allclose(metrics.ssim(p, t, reach, window), expected, rtol=1e-8)
    single = (torch.from_numpy(a).float()[None, None] for a in (p, t))
    assert metrics.ssim(*single, 80.0) == pytest.approx(metrics.ssim(p, t, 80.0), rel=1e-5)


def test_image_scores_in_closed_form():
    t = rng(0).normal(size=(8, 8, 8))
    t = (t - t.mean()) / t.std()
    p = t + 0.1
    np.testing.assert_allclose(metrics.psnr(p, t, 1.0), 20, rtol=1e-9)      # 10 log10(1 / 0.01)
    np.testing.assert_allclose(metrics.nmse(p, t), 0.01, rtol=1e-9)         # z-scored: mean squared error
    np.testing.assert_allclose(metrics.nmse(np.zeros_like(t), 7 * t), 1, rtol=1e-12)
    np.testing.assert_allclose(metrics.mae(t + np.where(t > 0, 0.4, -0.2), t), np.where(t > 0, 0.4, 0.2).mean(), rtol=1e-9)
    assert metrics.mae(np.array([250, 3], np.uint8), np.array([252, 0], np.uint8)) == 2.5       # no wrap-around
    assert metrics.psnr(t, t, 1.0) == np.inf and metrics.ssim(t, t, 1.0) == 1 and metrics.nmse(t, t) == 0
    assert np.isnan(metrics.psnr(np.full_like(t, np.nan), t, 1.0))          # never the inf of equal images
    assert metrics.psnr(np.array([255], np.uint8), np.array([0], np.uint8), 255) == 0   # no wrap-around
    for metric, *given in (("psnr", t, 0), ("ssim", t, np.nan), ("ssim", t, 1.0, 9), ("ssim", t, 1.0, 4),
                           ("nmse", t * 0), ("nmse", t[1:]), ("mae", t[1:])):
        with pytest.raises(ValueError, match=f"^{metric}: "):
            getattr(metrics, metric)(t, *given)


def test_classification_scores_equal_scikit_learn():
    witness = pytest.importorskip("sklearn.metrics")
    labels = rng(0).choice(3, 90, p=(0.6, 0.3, 0.1))
    probabilities = rng(1).dirichlet((1, 1, 1), 90).round(2) + 0.5 * np.eye(3)[labels]      # rounded: ties
    probabilities /= probabilities.sum(1, keepdims=True)
    found, predicted = metrics.classification_scores(probabilities, labels), probabilities.argmax(1)
    assert found["confusion"] == witness.confusion_matrix(labels, predicted).tolist()
    assert found["majority_accuracy"] == np.bincount(labels).max() / 90
    for name, expected in (("accuracy", witness.accuracy_score(labels, predicted)),
                           ("balanced_accuracy", witness.balanced_accuracy_score(labels, predicted)),
                           ("recall", witness.recall_score(labels, predicted, average=None)),
                           ("auc_mean", witness.roc_auc_score(labels, probabilities, multi_class="ovr"))):
        np.testing.assert_allclose(found[name], expected)
    few = labels != 2
    without = metrics.classification_scores(probabilities[few], labels[few])
    assert np.isnan(without["recall"][2]) and np.isnan(without["auc"][2]) and np.isfinite(without["auc_mean"])
    assert without["auc"][1] == pytest.approx(witness.roc_auc_score(labels[few] == 1, probabilities[few, 1]))
    for bad in (labels[1:], labels + 1, labels * 1.0):
        with pytest.raises(ValueError, match="labels"):
            metrics.classification_scores(probabilities, bad)


@pytest.mark.parametrize("n", [40, 5000])               # of 5000 cases 838 resamples are drawn at once
def test_bootstrap_of_many_cases_is_the_normal_interval(n):
    values = rng(0).normal(3, 2, n)
    error = values.std() / np.sqrt(n)
    expected = values.mean() + np.array([0, -1.96, 1.96]) * error
    np.testing.assert_allclose(metrics.bootstrap_mean(values, seed=1), expected, atol=0.12 * error)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    found = [metrics.bootstrap_mean(rng(seed).normal(3, 2, 40)) for seed in range(200)]
    assert 0.88 < np.mean([low <= 3 <= high for _, low, high in found]) < 0.99


def test_bootstrap_by_enumeration_of_all_samples():
    means = np.sort([np.mean(draw) for draw in itertools.product((0.0, 1.0, 5.0, 7.0), repeat=4)])
    expected = means[256 * 25 // 1000], means[256 * 975 // 1000]        # amid equals, clear of noise
    np.testing.assert_allclose(metrics.bootstrap_mean([0.0, 1.0, 5.0, 7.0])[1:], expected, rtol=1e-12)


def test_bootstrap_of_few_cases_and_of_gaps():
    whole = metrics.bootstrap_mean([0.2, 0.8, 0.5], seed=3)
    assert whole == metrics.bootstrap_mean([0.2, np.nan, 0.8, 0.5, np.nan], seed=3)
    assert whole[1] < whole[0] < whole[2]
    np.testing.assert_equal(metrics.bootstrap_mean([0.7]), (0.7, np.nan, np.nan))
    assert np.isnan([metrics.bootstrap_mean(nothing) for nothing in ([], [np.nan])]).all()
    np.testing.assert_equal(metrics.bootstrap_mean([1.0, np.inf]), (np.inf, np.nan, np.nan))
    with pytest.raises(ValueError, match="one number per case"):
        metrics.bootstrap_mean(np.zeros((3, 2)))


def test_bootstrap_of_subjects_with_several_cases_resamples_subjects():
    values, owner = [0.0, 0.0, 0.0, 6.0, 3.0], list("aaabc")
    mean, low, high = metrics.bootstrap_mean(values, 0, owner)
    sums, counts = dict(a=0.0, b=6.0, c=3.0), dict(a=3, b=1, c=1)
    means = np.sort([sum(sums[s] for s in d) / sum(counts[s] for s in d) for d in itertools.product("abc", repeat=3)])
    assert mean == np.mean(values) and (low, high) == (means[0], means[-1])     # one draw of 27 is 3.7 %
    alike = rng(0).normal(0, 1, 40).repeat(4)                       # four equal cases each: the interval of the 40
    wide, narrow = (np.ptp(metrics.bootstrap_mean(alike, 0, s)[1:]) for s in (np.arange(40).repeat(4), None))
    np.testing.assert_allclose(wide / narrow, 2, rtol=0.1)
    assert metrics.bootstrap_mean(values, 3, list("abcde")) == metrics.bootstrap_mean(values, 3)
    assert np.isnan(metrics.bootstrap_mean(values, 0, list("aaaaa"))[1:]).all()
    with_gap = metrics.bootstrap_mean([*values, np.nan], 0, [*owner, "d"])
    assert with_gap == (mean, low, high)
    np.testing.assert_allclose(metrics.paired_difference(np.array(values) + 1, values, subjects=owner), 1)


def test_paired_difference_sees_what_unpaired_means_hide():
    hard = rng(0).normal(0.6, 0.2, 12)                  # cases differ far more than models
    a, b = hard + 0.02 + rng(1).normal(0, 0.005, 12), hard.copy()
    b[3], a[5] = np.nan, np.nan
    mean, low, high = metrics.paired_difference(a, b)
    np.testing.assert_allclose(mean, np.nanmean(a - b))
    assert 0 < low < mean < high and metrics.bootstrap_mean(a)[1] < metrics.bootstrap_mean(b)[0]
    with pytest.raises(ValueError, match="same cases"):
        metrics.paired_difference(a, b[1:])
