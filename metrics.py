"""What a prediction is worth: Dice, Hausdorff, lesion volumes, PSNR, SSIM, NMSE, AUC; means over cases and their intervals.

Pure functions on arrays; numpy arrays and CPU tensors are both welcome. Axis letters: k class, x y z voxels, n cases.
"""
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.stats import rankdata


def _pair(name, prediction, target, kinds):
    """Both as numpy arrays, of one shape and of a kind that the metric takes."""
    prediction, target = np.asarray(prediction), np.asarray(target)
    if prediction.shape != target.shape:
        raise ValueError(f"{name}: prediction and target must have one shape, found {prediction.shape} and {target.shape}")
    for which, array in (("prediction", prediction), ("target", target)):
        if array.dtype.kind not in kinds:
            expected = {"b": "bool", "iubf": "real"}[kinds]
            raise ValueError(f"{name}: {which} must be {expected}, found {array.dtype}")
    return prediction, target


def dice(prediction, target, classes):
    """Dice of every class: 2 |P and T| / (|P| + |T|); 1 the same voxels, 0 none in common.

    prediction, target  (x, y, z) or any one shape, whole numbers 0 .. classes - 1
    returns             (classes,) float64, id 0 first; NaN: absent from both, to be left out of means;
                        0: absent from one only
    Raises ValueError for other shapes, ids beyond the classes and fractions.
    """
    prediction, target = (_ids("dice", ids, classes) for ids in _pair("dice", prediction, target, "iubf"))
    count = [np.bincount(ids.ravel(), minlength=classes) for ids in (prediction, target, target[prediction == target])]
    return _dice(*count)


def dice_regions(prediction, target):
    """Dice of masks that may overlap, such as BraTS TC, WT, ET.

    prediction, target  (r, x, y, z) bool;   returns (r,) float64, as `dice`
    """
    prediction, target = _pair("dice_regions", prediction, target, "b")
    axes = tuple(range(1, prediction.ndim))
    return _dice(prediction.sum(axes), target.sum(axes), (prediction & target).sum(axes))


def _ids(name, array, classes):
    """Whole numbers in 0 .. classes - 1, whatever their type; label maps are often read as float32."""
    ids = array.astype(np.int64)
    if (ids != array).any() or (ids.size and not 0 <= ids.min() <= ids.max() < classes):
        raise ValueError(f"{name}: ids must be whole numbers in 0 .. {classes - 1}, found {array.min()} .. {array.max()}")
    return ids


def _dice(predicted, true, both):
    """(k,) from counts of voxels, NaN where there are none."""
    size = predicted + true
    return np.divide(2.0 * both, size, out=np.full(len(size), np.nan), where=size > 0)


def regions(labels, groups):
    """(x, y, z) ids -> (r, x, y, z) bool: voxel belongs to region r if its id is one of groups[r].

    BraTS21: groups = ((1, 4), (1, 2, 4), (4,)) are TC, WT, ET.
    """
    return np.stack([np.isin(labels, group) for group in groups])


def hausdorff95(prediction, target, spacing):
    """95 % Hausdorff distance in mm: of both directed surface distances the 95th percentiles, and of these the larger.

    prediction, target  (x, y, z) bool;   spacing  (3,) mm
    returns             float >= 0; NaN: absent from both; inf: absent from one, which has no distance: count these
                        and average the rest, or put a penalty in their place (BraTS: 373.13 mm, its volume's diagonal)

    Surface: voxels of the mask with a face neighbour outside it, or at the volume's edge.  As MONAI's
    HausdorffDistanceMetric(percentile=95).
    Nearest surface voxels by k-d tree: exact, and unlike a distance transform it costs no more for far outliers.
    """
    prediction, target = _pair("hausdorff95", prediction, target, "b")
    if not (prediction.any() and target.any()):
        return np.inf if prediction.any() or target.any() else np.nan
    surfaces = [_surface(mask) * np.asarray(spacing, float) for mask in (prediction, target)]
    trees = [cKDTree(points) for points in surfaces]
    return float(max(np.percentile(trees[1 - i].query(surfaces[i])[0], 95) for i in range(2)))


def _surface(mask):
    """(x, y, z) bool -> (m, 3) voxels on the mask's inner surface."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]                  # whatever lies beyond is not in the mask
    corner = [axis.start for axis in box]
    return np.argwhere(mask[box] & ~ndimage.binary_erosion(mask[box])) + corner


def false_volumes(prediction, target, spacing):
    """AutoPET's false positive and false negative volume in ml (val_script.py of lab-midas/autoPET at 8da2f7e).

    prediction, target  (x, y, z) bool;   spacing  (3,) mm
    returns             (fp, fn): volume of predicted lesions that touch no true voxel, of true lesions that no predicted
                        voxel touches.  A lesion is an 18-connected component (voxels that share a face or an edge)
    """
    prediction, target = _pair("false_volumes", prediction, target, "b")
    voxel = float(np.prod(np.asarray(spacing, float))) / 1000             # mm^3 -> ml
    return _missed(prediction, target) * voxel, _missed(target, prediction) * voxel


def _missed(lesions, other):
    """Voxels in the components of `lesions` that hold no voxel of `other`."""
    parts, _ = ndimage.label(lesions, ndimage.generate_binary_structure(3, 2))
    size = np.bincount(parts.ravel())
    size[np.unique(parts[other])] = 0
    return int(size[1:].sum())


def psnr(prediction, target, data_range):
    """Peak signal to noise ratio in dB, 10 log10(data_range^2 / mean squared error); inf for equal images.

    prediction, target  one shape, real;   data_range  the largest minus the smallest value that the images can take:
                        state it beside the number, which means nothing without it
    """
    prediction, target = _pair("psnr", prediction, target, "iubf")
    _positive("psnr", data_range)
    error = np.mean(np.subtract(prediction, target, dtype=np.float64) ** 2)
    return np.inf if error == 0 else float(10 * np.log10(data_range**2 / error))


def ssim(prediction, target, data_range, window=7):
    """Mean structural similarity (Wang et al. 2004) in three dimensions; 1 equal, 0 unrelated.

    prediction, target  (x, y, z) real, sides of at least `window`;   data_range as in `psnr`;   window  odd, voxels

    Uniform window, sample covariance, K1 = 0.01, K2 = 0.03, windows that leave the volume not counted: the defaults of
    skimage.metrics.structural_similarity, but in float64.  Works on slabs of x, so memory stays small on whole bodies.
    """
    prediction, target = _pair("ssim", prediction, target, "iubf")
    _positive("ssim", data_range)
    if prediction.ndim > 3 and prediction.size == np.prod(prediction.shape[-3:]):                    # b and c of one
        prediction, target = (a.reshape(a.shape[-3:]) for a in (prediction, target))
    if prediction.ndim != 3 or window % 2 == 0 or min(prediction.shape) < window:
        raise ValueError(f"ssim: expected three sides of at least window = {window} voxels, odd; found {prediction.shape}")
    total, count, valid = 0.0, 0, (slice(window // 2, -(window // 2) or None),) * 3
    for first in range(0, prediction.shape[0] - window + 1, 64):
        planes = slice(first, first + 64 + window - 1)
        p, t = prediction[planes].astype(np.float64), target[planes].astype(np.float64)
        mean_p, mean_t, pp, tt, pt = (ndimage.uniform_filter(v, window)[valid] for v in (p, t, p * p, t * t, p * t))
        sample = window**3 / max(window**3 - 1, 1)
        var_p, var_t, cov = sample * (pp - mean_p**2), sample * (tt - mean_t**2), sample * (pt - mean_p * mean_t)
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        score = (2 * mean_p * mean_t + c1) * (2 * cov + c2) / ((mean_p**2 + mean_t**2 + c1) * (var_p + var_t + c2))
        total, count = total + score.sum(), count + score.size
    return float(total / count)


def nmse(prediction, target):
    """Normalised mean squared error, sum (p - t)^2 / sum t^2; 0 equal, 1 as bad as an image of zeros.

    For a target that was z-scored over the whole volume this is the mean squared error.
    """
    prediction, target = _pair("nmse", prediction, target, "iubf")
    power = np.sum(np.square(target, dtype=np.float64))
    if power == 0:
        raise ValueError("nmse: target is zero everywhere, so the error cannot be normalised")
    return float(np.sum(np.subtract(prediction, target, dtype=np.float64) ** 2) / power)


def _positive(name, data_range):
    if not (np.isfinite(data_range) and data_range > 0):
        raise ValueError(f"{name}: data_range must be finite and above 0, found {data_range}")


def classification_scores(probabilities, labels):
    """Scores of a classifier, the larger class's share beside them.

    probabilities  (n, k), rows sum to one;   labels  (n,) integer ids 0 .. k - 1
    returns        dict of plain numbers and lists:
        accuracy           share of cases whose most probable class (the first of equals) is the true one
        majority_accuracy  accuracy of always naming the most frequent class of these labels
        recall             [k] share of each class's cases found; NaN for a class without a case
        balanced_accuracy  mean recall of the classes that have cases
        auc                [k] one-vs-rest area under the ROC curve, ties count half; NaN without cases on both sides
        auc_mean           mean of those (macro)
        confusion          [k][k] cases, rows true, columns predicted
    """
    probabilities, labels = np.asarray(probabilities, float), np.asarray(labels)
    n, k = probabilities.shape
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or not n or not 0 <= labels.min() <= labels.max() < k:
        raise ValueError(f"classification_scores: labels must be ({n},) integers below {k}, found {labels.dtype} {labels.shape}")
    if not np.isfinite(probabilities).all():
        raise ValueError("classification_scores: probabilities hold NaN or infinite values")
    confusion = np.zeros((k, k), int)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    cases = confusion.sum(1)
    recall = np.divide(confusion.diagonal(), cases, out=np.full(k, np.nan), where=cases > 0)
    auc = []
    for c in range(k):                                                     # Mann-Whitney: how often a case outranks the rest
        positive = labels == c
        m, rest = positive.sum(), n - positive.sum()
        rank = rankdata(probabilities[:, c])[positive].sum() - m * (m + 1) / 2
        auc.append(float(rank / (m * rest)) if m and rest else np.nan)
    return dict(accuracy=float(confusion.trace() / n), majority_accuracy=float(cases.max() / n), recall=recall.tolist(),
                balanced_accuracy=float(np.nanmean(recall)), auc=auc, auc_mean=mean(auc), confusion=confusion.tolist())


def mean(values):
    """Mean without NaN; NaN of nothing, without numpy's warning."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else np.nan


# ---------------------------------------------------------------------------------------------------------------------
# means and their intervals


def bootstrap_mean(values, seed=0, n=10000):
    """Mean over cases and its 95 % interval: 2.5th and 97.5th percentile of `n` means of cases drawn with replacement.

    values   (m,) one number per case; NaN: the case has no score and is left out
    returns  (mean, low, high); with one case or an infinite value there is no interval: NaN.  With fewer than about ten
             cases it is too narrow: it cannot know of cases unlike those at hand
    """
    values = np.asarray(values, float)
    if values.ndim != 1:
        raise ValueError(f"bootstrap_mean: expected one number per case, found shape {values.shape}")
    values = values[~np.isnan(values)]
    if len(values) < 2 or not np.isfinite(values).all():
        return mean(values), np.nan, np.nan
    rng, rows = np.random.default_rng(seed), max(1, 2**22 // len(values))            # at most 32 MiB of indices at once
    means = [values[rng.integers(len(values), size=(min(rows, n - i), len(values)))].mean(1) for i in range(0, n, rows)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return mean(values), float(low), float(high)


def paired_difference(a, b, seed=0, n=10000):
    """Mean of a - b over the cases that both scored, and its interval, as `bootstrap_mean`.

    a, b  (m,) one number per case, the same cases in the same order; above 0: a is larger
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"paired_difference: a and b must score the same cases, found {a.shape} and {b.shape}")
    return bootstrap_mean(a - b, seed, n)
