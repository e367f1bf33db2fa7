"""What an encoder knows without labels: token features of a scan, linear probe, k-NN, silhouette, correspondence.

    python -m lab.probe configs/demo.py

scikit-learn is imported where it is used. Axis letters: c channel, x y z voxels, i j k tokens of a grid, t tokens, d features.
"""
import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import configs
import data
import evaluate
import losses
import metrics
import pretrain
import run
import tasks
from model import Swin3D, WeightsError, load_weights, read_file


@dataclasses.dataclass
class Config(pretrain.Config):
    """The keys of pre-training, which say what the encoder is and what it saw, and those of the probe."""
    checkpoint: str | tuple = ()    # default runs/<name>/encoder.pt; several are compared; "random": random weights
    out: str = ""                   # folder of what is written, default runs/<name>
    probe_random: bool = True       # probe random weights first
    probe_train: float = 0.5        # share of the scans (the first by id) that train the probe, the rest test it
    probe_share: float = 0.5        # least share of a token's patch that an organ covers to name it; tiny organs need less
    probe_limit: int = 1000         # tokens per class that train it
    probe_crop: tuple = ()          # voxels that the encoder sees at once, () as `crop`; larger is faster


def load(Config, argv):
    """The config that argv names and, over it, the one beside it that says which labelled scans are probed: configs/demo.py and
    configs/demo_probe.py."""
    files = [arg for arg in argv if not arg.startswith("--")]
    beside = [str(Path(file).with_name(f"{Path(file).stem}_probe.py")) for file in files]
    beside = [file for file in beside if Path(file).is_file()]
    if beside:
        print(f"with {', '.join(beside)}")
    return configs.load(Config, [*files, *beside, *[arg for arg in argv if arg.startswith("--")]])


def token_labels(label_map, patch, share=0.15):
    """Give every token the organ that its patch shows.

    label_map  (x, y, z) integer ids, 0 background;   patch  voxels, one number or three, dividing the map
    share      least share of the patch that the organ must cover.  Tiny organs decide it: at 1.5 mm an adrenal gland
               touches about ten patches of 8^3 and fills half of one alone; 0.15 keeps most of them, and takes little
               more than the rim from the large organs
    returns    ids (t,): the most frequent id other than 0 (of equals the least), or 0 where none covers `share`;
               purity (t,): the share of the patch that has this id.  Token order "(x y z)", x slowest
    """
    label_map, patch = np.asarray(label_map), tasks.three(patch)
    if label_map.ndim != 3 or label_map.dtype.kind not in "iub" or any(s % p for s, p in zip(label_map.shape, patch)):
        raise ValueError(f"token_labels: expected integers, sides in steps of {patch}, found {label_map.dtype} {label_map.shape}")
    ids, index = np.unique(np.append(label_map.ravel(), 0), return_inverse=True)     # 0 is always among the ids
    p, q, r = patch
    patches = rearrange(index[:-1].reshape(label_map.shape), "(x p) (y q) (z r) -> (x y z) (p q r)", p=p, q=q, r=r)
    t, voxels = patches.shape
    flat = patches + len(ids) * np.arange(t)[:, None]
    covered = np.bincount(flat.ravel(), minlength=t * len(ids)).reshape(t, len(ids)) / voxels
    background = int(np.searchsorted(ids, 0))
    organs = covered.copy()
    organs[:, background] = -1
    best = organs.argmax(1)
    best[organs.max(1) < share] = background
    return ids[best], covered[np.arange(t), best]


def linear_probe(train_x, train_y, test_x, test_y, seed=0, limit=1000):
    """How well a linear map reads organs from features: multinomial logistic regression, every class of equal weight.

    *_x      (t, d) features, standardised by the training mean and deviation;   *_y  (t,) ids
    limit    at most so many training tokens per class, drawn by `seed` (scans hold mostly background and liver)
    returns  dict: balanced_accuracy, recall {id: share found}, both over the classes of the test set that were trained;
             untrained [ids] of the test set that were not
    """
    linear = evaluate.need("sklearn.linear_model", "scikit-learn")
    train_x, train_y, test_x, test_y = _probe_sets(train_x, train_y, test_x, test_y, seed, limit)
    mean, deviation = train_x.mean(0), train_x.std(0)
    deviation[deviation == 0] = 1
    probe = linear.LogisticRegression(class_weight="balanced", max_iter=2000)
    probe.fit((train_x - mean) / deviation, train_y)
    return _recalls(probe.predict((test_x - mean) / deviation), test_y, train_y)


def knn_probe(train_x, train_y, test_x, test_y, seed=0, limit=1000, k=20):
    """How well neighbours share organs: majority of the k training tokens of largest cosine similarity; see linear_probe."""
    neighbors = evaluate.need("sklearn.neighbors", "scikit-learn")
    train_x, train_y, test_x, test_y = _probe_sets(train_x, train_y, test_x, test_y, seed, limit)
    if len(train_x) < k:
        raise ValueError(f"knn_probe: k = {k} neighbours asked of {len(train_x)} training tokens")
    probe = neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train_x, train_y)
    return _recalls(probe.predict(test_x), test_y, train_y)


def _probe_sets(train_x, train_y, test_x, test_y, seed, limit):
    """Checked, in float64, the training tokens thinned to `limit` per class."""
    train_x, test_x = np.asarray(train_x, np.float64), np.asarray(test_x, np.float64)
    train_y, test_y = np.asarray(train_y), np.asarray(test_y)
    for which, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != x.shape[:1] or not np.isfinite(x).all():
            raise ValueError(f"probe: {which} must be finite (t, d) features with (t,) ids, found {x.shape} and {y.shape}")
    if len(np.unique(train_y)) < 2:
        raise ValueError(f"probe: training tokens must show two classes at least, found {np.unique(train_y).tolist()}")
    chosen = thin(train_y, seed, limit)
    return train_x[chosen], train_y[chosen], test_x, test_y


def thin(y, seed, limit):
    """Sorted indices of at most `limit` tokens per class, drawn by `seed`."""
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:limit] for c in np.unique(y)]))


def _recalls(predicted, true, trained):
    known = np.intersect1d(true, trained)
    recall = {int(c): float(np.mean(predicted[true == c] == c)) for c in known}
    return dict(balanced_accuracy=metrics.mean(list(recall.values())), recall=recall, untrained=np.setdiff1d(true, trained).tolist())


def silhouette(x, y, metric="cosine", seed=0, limit=1000):
    """How well tokens (t, d) gather by organ y (t,), Rousseeuw 1987: 1 compact and apart, 0 mixed, below 0 misplaced.

    metric   "cosine" or "euclidean" (the paper's figures use Euclidean on raw features)
    limit    at most so many tokens per class, drawn by `seed`: time grows with the square of their number
    returns  (mean over tokens, {id: mean over its tokens})
    """
    measures = evaluate.need("sklearn.metrics", "scikit-learn")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"silhouette: metric must be 'cosine' or 'euclidean', found {metric!r}")
    x, y = np.asarray(x, np.float64), np.asarray(y)
    chosen = thin(y, seed, limit)
    x, y = x[chosen], y[chosen]
    if not 2 <= len(np.unique(y)) < len(y):
        raise ValueError(f"silhouette: expected two classes and more tokens than classes, found {len(set(y))} and {len(y)}")
    values = measures.silhouette_samples(x, y, metric=metric)
    return float(values.mean()), {int(c): float(values[y == c].mean()) for c in np.unique(y)}


def effective_rank(x):
    """Dimensions that features (t, d) really use (Roy and Vetterli 2007): exp of the entropy of the singular values.

    Centred features; between 1 (a line) and min(t - 1, d) (all directions alike); 0 for collapsed, equal tokens.
    """
    x = np.asarray(x, np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    if values[0] <= 1e-12 * max(np.abs(x).max(), 1):
        return 0.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


# ---------------------------------------------------------------------------------------------------------------------
# features of an encoder


def load_encoder(path, cfg, device, seed=None):
    """Swin3D as the checkpoint states it, or with random weights ("random")."""
    if path == "random":
        torch.manual_seed(cfg.seed if seed is None else seed)
        encoder = Swin3D(cfg.in_channels, **tasks.swin(cfg))
    else:
        try:
            stated = read_file(path).get("arguments", {})
            known = {k: stated[k] for k in tasks.swin(cfg) if k in stated} if isinstance(stated, dict) else {}
            encoder = Swin3D(stated.get("in_channels", cfg.in_channels), **(tasks.swin(cfg) | known | {"checkpointing": False}))
            load_weights(encoder, path)
        except WeightsError as error:
            raise SystemExit(str(error)) from None
    return encoder.to(device).eval()


@torch.no_grad()
def encode(encoder, volume, crop, patch, device, overlap=None):
    """Token features (c, i, j, k) of one volume (c, x, y, z), in patches of `patch` voxels counted from voxel 0.

    The encoder sees crops side by side, as in pre-training; the last ones of an axis overlap so that all lie inside the volume
    padded to a multiple of 32. Only patches that lie wholly in the volume are returned.
    overlap: share of the crop by which neighbours overlap; every token then comes from the crop that has it nearest to its middle, so
    that the edges of crops do not show. None: side by side, a later crop replaces what an earlier one said.
    """
    level = int(math.log2(patch)) - 1
    size = [max(c, -(-n // 32) * 32) for n, c in zip(volume.shape[1:], crop)]
    pad = [p for n, s in zip(volume.shape[:0:-1], size[::-1]) for p in (0, s - n)]
    volume = F.pad(volume[None].float(), pad, value=float(volume.min()))
    steps = [c if overlap is None else max(int(c * (1 - overlap)) // patch, 1) * patch for c in crop]
    starts = [sorted({*range(0, s - c + 1, step), s - c}) for s, c, step in zip(size, crop, steps)]
    out = None
    for corner in itertools.product(*starts):
        x, y, z = (slice(s, s + c) for s, c in zip(corner, crop))
        tokens = encoder(volume[:, :, x, y, z].to(device))[level][0].float().cpu()
        if out is None:
            out = torch.zeros(len(tokens), *[s // patch for s in size])
        i, j, k = (slice(s // patch, (s + c) // patch) for s, c in zip(corner, crop))
        if overlap is None:
            out[:, i, j, k] = tokens
        else:
            own = [_most_central(axis, s, c, patch) for axis, s, c in zip(starts, corner, crop)]
            i, j, k = (np.ix_(*[o + s // patch for o, s in zip(own, corner)]))
            out[:, i, j, k] = tokens[:, *np.ix_(*own)]
    return out[:, :(size[0] - pad[5]) // patch, :(size[1] - pad[3]) // patch, :(size[2] - pad[1]) // patch]


def _most_central(starts, start, crop, patch):
    """Tokens, counted from `start`, that no other of the crops at `starts` has farther from its edges."""
    token = np.arange(crop // patch) + start // patch
    depth = [np.minimum(token - s // patch, (s + crop) // patch - 1 - token) for s in starts]
    return np.flatnonzero(np.argmax(depth, 0) == starts.index(start))


def probe_scans(cfg):
    """Labelled scans of the probe, preprocessed as the config says."""
    scans = [scan for scan in data.open_scans(cfg) if scan.case["label"]]
    if len(scans) < 2:
        raise SystemExit(f"a probe needs at least two labelled scans, found {len(scans)}; give image and label, or a datalist, in a config of the probe's own: configs/demo_probe.py")
    return scans


def organ_tokens(encoder, scans, cfg, device, overlap=None):
    """(t, c) features, (t,) organ ids, (t,) scan numbers of all tokens that show an organ; overlap as in encode."""
    parts = []
    for n, scan in enumerate(scans):
        volume = torch.from_numpy(np.ascontiguousarray(scan.open()))
        features = encode(encoder, volume, cfg.probe_crop or cfg.crop, cfg.token_patch, device, overlap)
        i, j, k = features.shape[1:]
        label = scan.open("label")[0][:i * cfg.token_patch, :j * cfg.token_patch, :k * cfg.token_patch]
        ids, _ = token_labels(np.ascontiguousarray(label), cfg.token_patch, cfg.probe_share)
        x = rearrange(features, "c i j k -> (i j k) c").numpy()
        parts.append((x[ids > 0], ids[ids > 0], np.full((ids > 0).sum(), n)))
    return [np.concatenate(each) for each in zip(*parts)]


@torch.no_grad()
def correspondence_accuracy(encoder, scans, cfg, device):
    """Share of matched tokens whose most similar token of V' (cosine of encoder features) is the true partner; V' moved by the
    config's rotation, scale, shear and shift, one slab a scan."""
    slabs, right, total = data.Slabs(scans, cfg, 1, cfg.seed), 0, 0
    grid = tuple(s // cfg.token_patch for s in cfg.slab)
    for n, scan in enumerate(scans):
        batch = data.collate([slabs.sample(scan, np.random.default_rng((cfg.seed, n)))])
        valid, valid_ = data.tokens_inside(batch, grid, cfg.token_patch)
        _, i, j = data.matches(batch["H"], grid, cfg.token_patch).T
        V, V_, _ = data.views(batch, cfg)
        tokens = [rearrange(encode(encoder, view[0], cfg.crop, cfg.token_patch, device), "c i j k -> 1 (i j k) c") for view in (V, V_)]
        sim = losses.similarity(*tokens)[0].masked_fill(~valid_, -2)
        fair = valid[0, i] & valid_[0, j]
        right += int((sim.argmax(1)[i] == j)[fair].sum())
        total += int(fair.sum())
    return right / max(total, 1)


def probe(cfg, device):
    """Numbers that need no fine-tuning, one row per encoder, with cfg.probe_random random weights first."""
    scans = probe_scans(cfg)
    first = max(1, min(len(scans) - 1, round(cfg.probe_train * len(scans))))
    print(f"probe: {first} scans train, {len(scans) - first} test; tokens of {cfg.token_patch} voxels that show an organ")
    files = list(data.several(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "encoder.pt")]
    rows, results = [["encoder", "linear probe", "k-NN", "silhouette cos", "silhouette eucl", "effective rank", "correspondence"]], {}
    for path in dict.fromkeys(["random"] * cfg.probe_random + files):
        encoder = load_encoder(path, cfg, device)
        x, y, n = organ_tokens(encoder, scans, cfg, device)
        train = n < first
        linear = linear_probe(x[train], y[train], x[~train], y[~train], cfg.seed, cfg.probe_limit)
        near = knn_probe(x[train], y[train], x[~train], y[~train], cfg.seed, cfg.probe_limit)
        result = dict(linear=linear, knn=near, silhouette_cosine=silhouette(x[~train], y[~train], "cosine"),
                      silhouette_euclidean=silhouette(x[~train], y[~train], "euclidean"), effective_rank=effective_rank(x[~train]),
                      correspondence=correspondence_accuracy(encoder, scans[first:], cfg, device), tokens=[int(train.sum()), int((~train).sum())])
        results[path] = result
        rows.append([path, *[f"{v:.3f}" for v in (linear["balanced_accuracy"], near["balanced_accuracy"], result["silhouette_cosine"][0],
                                                  result["silhouette_euclidean"][0], result["effective_rank"], result["correspondence"])]])
    print(evaluate.text_table(rows))
    print("(linear probe and k-NN: balanced accuracy over organs, 1 all right; silhouette: 1 apart, 0 mixed; correspondence: share of tokens "
          "found again after the config's moves)")
    return results


def main(argv):
    cfg = load(Config, argv)
    out = Path(cfg.out or Path(cfg.runs) / cfg.name)
    results = probe(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    run.write_json(out / "probe.json", dict(probe=results, config=dataclasses.asdict(cfg), **run.versions()))


if __name__ == "__main__":
    main(sys.argv[1:])
