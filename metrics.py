"""What a prediction is worth: Dice, Hausdorff, lesion volumes, PSNR, SSIM, NMSE, MAE, AUC; means, intervals.

Pure functions on numpy arrays or CPU tensors. Axis letters: k class, r region, x y z voxels, n cases.
"""
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.stats import bootstrap, rankdata


def _pair(name, prediction, target, kind="real", data_range=1.0):
    """Both as numpy arrays, of one shape and of a kind that the metric takes."""
    p, t = np.asarray(prediction), np.asarray(target)
    if p.shape != t.shape:
        raise ValueError(f"{name}: prediction and target must have one shape, found {p.shape} and {t.shape}")
    for which, array in (("prediction", p), ("target", t)):
        if array.dtype.kind not in {"bool": "b", "real": "iubf"}[kind]:
            raise ValueError(f"{name}: {which} must be {kind}, found {array.dtype}")
    if not (np.isfinite(data_range) and data_range > 0):
        raise ValueError(f"{name}: data_range must be finite and above 0, found {data_range}")
    return p, t


def dice(prediction, target, classes):
    """Dice of every class: 2 |P and T| / (|P| + |T|); 1 the same voxels, 0 none in common.

    prediction, target  (x, y, z) or any one shape, whole numbers 0 .. classes - 1, of any type
    returns             (classes,) float64, id 0 first; NaN: absent from both, no part of a mean; 0: from one
    Raises ValueError for other shapes, ids beyond the classes and fractions.
    """
    p, t = _pair("dice", prediction, target)
    for a in (p, t):
        if not np.isin(a, np.arange(classes)).all():
            found = f"{a.min()} .. {a.max()}"
            raise ValueError(f"dice: ids must be whole numbers in 0 .. {classes - 1}, found {found}")
    return np.concatenate([dice_regions((p == c)[None], (t == c)[None]) for c in range(classes)])


def dice_regions(prediction, target):
    """Dice of masks (r, x, y, z) bool that may overlap, as BraTS TC, WT, ET -> (r,) float64, like `dice`."""
    p, t = _pair("dice_regions", prediction, target, "bool")
    axes = tuple(range(1, p.ndim))
    size = p.sum(axes) + t.sum(axes)
    return np.divide(2.0 * (p & t).sum(axes), size, out=np.full(len(size), np.nan), where=size > 0)


def hausdorff95(prediction, target, spacing):
    """95 % Hausdorff distance in mm: the larger of the 95th percentiles of both directed surface distances.

    prediction, target  (x, y, z) bool;   spacing  (3,) mm
    returns             float >= 0; NaN: absent from both; inf: absent from one, no distance: count these and
                        average the rest, or put a penalty in their place (BraTS: 373.13, a volume's diagonal)

    Surface: voxels of the mask with a face neighbour outside it, or at the volume's edge, as in MONAI's
    HausdorffDistanceMetric(percentile=95). Nearest surface voxels by k-d tree: exact, and unlike a distance
    transform it costs no more for far outliers.
    """
    p, t = _pair("hausdorff95", prediction, target, "bool")
    if not (p.any() and t.any()):
        return np.inf if p.any() or t.any() else np.nan
    p, t = (_surface(mask) * np.asarray(spacing, float) for mask in (p, t))
    return float(max(np.percentile(cKDTree(there).query(here)[0], 95) for here, there in ((p, t), (t, p))))


def _surface(mask):
    """(x, y, z) bool -> (m, 3) voxels on the mask's inner surface."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]            # whatever lies beyond is not in the mask
    return np.argwhere(mask[box] & ~ndimage.binary_erosion(mask[box])) + [axis.start for axis in box]


def false_volumes(prediction, target, spacing):
    """AutoPET's false positive and false negative volume, ml (val_script.py of lab-midas/autoPET at 8da2f7e).

    prediction, target  (x, y, z) bool;   spacing  (3,) mm
    returns             (fp, fn): volume of predicted lesions without a true voxel, of true ones without a
                        predicted voxel. A lesion is an 18-connected component: voxels share a face or an edge
    """
    p, t = _pair("false_volumes", prediction, target, "bool")
    voxel, volumes = float(np.prod(np.asarray(spacing, float))) / 1000, []      # mm^3 -> ml
    for lesions, other in ((p, t), (t, p)):
        parts, _ = ndimage.label(lesions, ndimage.generate_binary_structure(3, 2))
        size = np.bincount(parts.ravel())
        size[np.unique(parts[other])] = 0                           # lesions that the other mask touches
        volumes.append(int(size[1:].sum()) * voxel)
    return tuple(volumes)


def psnr(prediction, target, data_range):
    """Peak signal to noise ratio in dB, 10 log10(data_range^2 / mean squared error); inf for equal images.

    prediction, target  one shape, real;   data_range  the largest minus the smallest value that images can
                        take: state it beside the number, which means nothing without it
    """
    p, t = _pair("psnr", prediction, target, data_range=data_range)
    error = np.mean(np.subtract(p, t, dtype=np.float64) ** 2)
    return np.inf if error == 0 else float(10 * np.log10(data_range**2 / error))


def ssim(prediction, target, data_range, window=7):
    """Mean structural similarity (Wang et al. 2004) in three dimensions; 1 equal, 0 unrelated.

    prediction, target  (x, y, z) real, sides of at least `window` voxels (odd);   data_range as in `psnr`

    Uniform window, sample covariance, K1 = 0.01, K2 = 0.03, windows that leave the volume not counted: the
    defaults of skimage.metrics.structural_similarity, but in float64. Slabs of x bound the memory.
    """
    p, t = _pair("ssim", prediction, target, data_range=data_range)
    if p.ndim > 3 and p.size == np.prod(p.shape[-3:]):              # b and c of one
        p, t = p.reshape(p.shape[-3:]), t.reshape(t.shape[-3:])
    if p.ndim != 3 or window % 2 == 0 or min(p.shape) < window:
        expected = f"three sides of at least window = {window} voxels, odd"
        raise ValueError(f"ssim: expected {expected}; found {p.shape}")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    sample = window**3 / max(window**3 - 1, 1)                      # sample covariance: n - 1 instead of n
    inner = (slice(window // 2, -(window // 2) or None),) * 3       # centres of the windows within the volume
    total, count = 0.0, 0
    for first in range(0, p.shape[0] - window + 1, 64):
        a, b = (v[first:first + 64 + window - 1].astype(np.float64) for v in (p, t))
        mu_a, mu_b, aa, bb, ab = (ndimage.uniform_filter(v, window)[inner] for v in (a, b, a**2, b**2, a * b))
        var_a, var_b, cov = sample * (aa - mu_a**2), sample * (bb - mu_b**2), sample * (ab - mu_a * mu_b)
        score = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
        total, count = total + score.sum(), count + score.size
    return float(total / count)


def mae(prediction, target):
    """Mean absolute error, in the unit of both, which have one shape; 0 for equal images."""
    p, t = _pair("mae", prediction, target)
    return float(np.mean(np.abs(np.subtract(p, t, dtype=np.float64))))


def nmse(prediction, target):
    """Normalised mean squared error, sum (p - t)^2 / sum t^2; 0 equal, 1 as bad as an image of zeros.
    For a target that was z-scored over the whole volume this is the mean squared error."""
    p, t = _pair("nmse", prediction, target)
    power = np.sum(np.square(t, dtype=np.float64))
    if power == 0:
        raise ValueError("nmse: target is zero everywhere, so the error cannot be normalised")
    return float(np.sum(np.subtract(p, t, dtype=np.float64) ** 2) / power)


def classification_scores(probabilities, labels):
    """Scores of a classifier, the largest class's share beside them.

    probabilities  (n, k), rows sum to one;   labels  (n,) integer ids 0 .. k - 1
    returns        dict of plain numbers and lists:
        accuracy           share of cases whose most probable class (the first of equals) is the true one
        majority_accuracy  accuracy of always naming the most frequent class of these labels
        recall             [k] share of each class's cases found; NaN for a class without a case
        balanced_accuracy  mean recall of the classes that have cases
        auc                [k] one-vs-rest area under the ROC curve, ties count half; NaN: no case on a side
        auc_mean           mean of those (macro)
        confusion          [k][k] cases, rows true, columns predicted
    """
    probabilities, labels = np.asarray(probabilities, float), np.asarray(labels)
    n, k = probabilities.shape
    whole = labels.shape == (n,) and labels.dtype.kind in "iu"
    if not (n and whole and 0 <= labels.min() <= labels.max() < k):
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"classification_scores: labels must be ({n},) integers below {k}, found {found}")
    if not np.isfinite(probabilities).all():
        raise ValueError("classification_scores: probabilities hold NaN or infinite values")
    confusion = np.zeros((k, k), int)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    cases = confusion.sum(1)
    recall = np.divide(confusion.diagonal(), cases, out=np.full(k, np.nan), where=cases > 0)
    auc = []
    for c in range(k):                                      # Mann-Whitney: how often a case outranks the rest
        positive = labels == c
        m, rest = cases[c], n - cases[c]
        rank = rankdata(probabilities[:, c])[positive].sum() - m * (m + 1) / 2
        auc.append(float(rank / (m * rest)) if m and rest else np.nan)
    return dict(accuracy=float(confusion.trace() / n), majority_accuracy=float(cases.max() / n),
                recall=recall.tolist(), balanced_accuracy=float(np.nanmean(recall)),
                auc=auc, auc_mean=mean(auc), confusion=confusion.tolist())


def mean(values):
    """Mean without NaN; NaN of nothing, without numpy's warning."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else np.nan


def bootstrap_mean(values, seed=0, subjects=None):
    """Mean over cases and its 95 % interval: percentile bootstrap, 10,000 resamples of the cases.

    values   (m,) one number per case; NaN: the case has no score and is left out
    subjects (m,) whose case it is: where one has several, subjects are resampled, each with all its cases
    returns  (mean, low, high); NaN: no interval, of one case or an infinite value. Too narrow with fewer than
             about ten cases: it cannot know of cases unlike those at hand
    """
    values = np.asarray(values, float)
    if values.ndim != 1:
        raise ValueError(f"bootstrap_mean: expected one number per case, found shape {values.shape}")
    known = ~np.isnan(values)
    values, owner = values[known], np.arange(known.sum())
    if subjects is not None:
        _, owner = np.unique(np.asarray(subjects)[known], return_inverse=True)
    if len(set(owner.tolist())) < 2 or not np.isfinite(values).all():
        return mean(values), np.nan, np.nan
    if owner.max() + 1 < len(values):
        sums, counts = np.bincount(owner, values), np.bincount(owner)
        rng, drawn = np.random.default_rng(seed), []
        for _ in range(100):                                                    # a hundredth at once
            picked = rng.integers(0, len(sums), (100, len(sums)))
            drawn.append(sums[picked].sum(1) / counts[picked].sum(1))
        return mean(values), *map(float, np.percentile(np.concatenate(drawn), [2.5, 97.5]))
    rng, batch = np.random.default_rng(seed), max(1, 2**22 // len(values))      # 32 MiB of indices at once
    drawn = bootstrap((values,), np.mean, method="percentile", n_resamples=10000, batch=batch, rng=rng)
    return mean(values), *map(float, drawn.confidence_interval)


def paired_difference(a, b, seed=0, subjects=None):
    """Mean of a - b over the cases that both scored, and its interval, as `bootstrap_mean`.
    a, b (m,): one number per case, the same cases in the same order; above 0: a is larger; subjects (m,)."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        found = f"{a.shape} and {b.shape}"
        raise ValueError(f"paired_difference: a and b must score the same cases, found {found}")
    return bootstrap_mean(a - b, seed, subjects)
