"""What an encoder knows without labels: features of tokens, linear probe, k-NN, silhouette, correspondence.

    python -m lab.probe configs/demo.py

scikit-learn is imported where it is used. Axes: c channel, x y z voxels, i j k or t tokens, d features.
"""
import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce

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
    checkpoint: str | tuple = ()    # default runs/<name>/encoder.pt; several are compared; "random" is none
    out: str = ""                   # folder of what is written, default runs/<name>
    probe_random: bool = True       # probe random weights first
    probe_patch: int = 8            # voxels of a patch that is probed or drawn, whatever token_patch was
    probe_train: float = 0.5        # share of the subjects, the first as found, that train it, not test it
    probe_share: float = 0.25       # least share of a patch that its organ covers; tiny organs need less
    probe_least: int = 20           # tokens of an organ in either part, or it is left out
    probe_limit: int = 1000         # tokens per class that train it
    probe_crop: tuple = ()          # voxels that the encoder sees at once, () as `crop`; larger is faster
    probe_draws: int = 1            # of 64 crops, over which L_g is averaged; one has a deviation of 0.03


def load(Config, argv):
    """The config of argv and, over it, x_probe.py beside x.py, which says which labelled scans are probed."""
    files = [arg for arg in argv if not arg.startswith("--")]
    beside = [Path(file).with_name(f"{Path(file).stem}_probe.py") for file in files]
    beside = [str(file) for file in beside if file.is_file()]
    if beside:
        print(f"with {', '.join(beside)}")
    return configs.load(Config, [*files, *beside, *[arg for arg in argv if arg.startswith("--")]])


def load_encoder(path, cfg, device):
    """Swin3D as the checkpoint, or else the config, states it; "random": with weights drawn by cfg.seed."""
    arguments = dict(in_channels=cfg.in_channels) | tasks.swin(cfg)
    if path == "random":
        torch.manual_seed(cfg.seed)
        return Swin3D(**arguments).to(device).eval()
    try:
        content = read_file(path)
        stated = content.get("arguments")
        for line in run.preprocessing_differences(content.get("preprocessing"), data.preprocessing(cfg)):
            print(f"  {path}: {line} here")
        if isinstance(stated, dict):
            arguments |= {k: stated[k] for k in arguments if k in stated}
        encoder = Swin3D(**arguments | dict(checkpointing=False))
        load_weights(encoder, path)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    return encoder.to(device).eval()


@torch.no_grad()
def encode(encoder, volume, crop, patch, device, overlap=None):
    """Features (c, i, j, k) of the whole patches of `patch` voxels, from voxel 0, in a volume (c, x, y, z).

    The encoder sees crops side by side, as in pre-training; the last overlap, to lie inside the volume
    padded to a multiple of 32. overlap: share of the crop by which neighbours overlap; a token then is of the
    crop that has it nearest to its middle, so that edges do not show. None: of the last crop that holds it.
    """
    level, shape = patch.bit_length() - 2, volume.shape[1:]                # the first level has patches of 2
    size = [max(c, -(-n // 32) * 32) for n, c in zip(shape, crop)]
    margins = [m for n, s in zip(shape[::-1], size[::-1]) for m in (0, s - n)]
    least = reduce(volume.float(), "c x y z -> c", "min").tolist()      # each channel is padded with its own
    volume = torch.stack([F.pad(v.float(), margins, value=m) for v, m in zip(volume, least)])[None]
    steps = crop if overlap is None else [max(int(c * (1 - overlap)) // patch, 1) * patch for c in crop]
    starts = [sorted({*range(0, s - c + 1, step), s - c}) for s, c, step in zip(size, crop, steps)]
    out = None
    for corner in itertools.product(*starts):
        x, y, z = (slice(s, s + c) for s, c in zip(corner, crop))
        tokens = encoder(volume[:, :, x, y, z].to(device))[level][0].float().cpu()
        if out is None:
            out = torch.zeros(len(tokens), *[s // patch for s in size])
        own = [np.arange(c // patch) for c in crop]
        if overlap is not None:
            own = [_most_central(axis, s, c, patch) for axis, s, c in zip(starts, corner, crop)]
        i, j, k = np.ix_(*[o + s // patch for o, s in zip(own, corner)])
        out[:, i, j, k] = tokens[:, *np.ix_(*own)]
    i, j, k = (slice(n // patch) for n in shape)
    return out[:, i, j, k]


def _most_central(starts, start, crop, patch):
    """Tokens, counted from `start`, that no other of the crops at `starts` has farther from its edges."""
    token = np.arange(crop // patch) + start // patch
    depth = [np.minimum(token - s // patch, (s + crop) // patch - 1 - token) for s in starts]
    return np.flatnonzero(np.argmax(depth, 0) == starts.index(start))


def check(cfg):
    """Refuse what no probe can be made with, one line each, before anything is read."""
    run.refuse([
        (cfg.probe_patch in (2, 4, 8, 16, 32),
         f"probe_patch = {cfg.probe_patch}, expected 2, 4, 8, 16 or 32"),
        (all(c > 0 and c % 32 == 0 for c in (*cfg.crop, *cfg.probe_crop)) and len(cfg.probe_crop) in (0, 3),
         f"crop = {cfg.crop}, probe_crop = {cfg.probe_crop}: expected multiples of 32"),
        (cfg.probe_draws > 0, f"probe_draws = {cfg.probe_draws}, expected 1 or more"),
        (0 < cfg.probe_train < 1 and 0 < cfg.probe_share <= 1 and min(cfg.probe_least, cfg.probe_limit) > 0,
         f"probe_train = {cfg.probe_train}, probe_share = {cfg.probe_share}, probe_least = "
         f"{cfg.probe_least}, probe_limit = {cfg.probe_limit}: expected shares up to 1, numbers above 0"),
    ])


def parts_of(scans, cfg):
    """(scans that train the probe, that test it): the first subjects, the rest, nobody in both."""
    subjects = list(dict.fromkeys(scan.subject for scan in scans))
    if len(subjects) < 2:
        raise SystemExit(f"a probe trains and tests on other subjects, found {len(subjects)}")
    first = subjects[:max(1, min(len(subjects) - 1, round(cfg.probe_train * len(subjects))))]
    return [[scan for scan in scans if (scan.subject in first) == training] for training in (True, False)]


def probe_scans(cfg):
    """Labelled scans of the probe, preprocessed as the config says."""
    scans = [scan for scan in data.open_scans(cfg) if scan.case["label"]]
    if len(scans) < 2:
        raise SystemExit(f"a probe needs at least two labelled scans, found {len(scans)}; give image and "
                         "label, or a datalist, in a config of the probe's own: configs/demo_probe.py")
    return tasks.check_channels(scans, cfg)


def organ_tokens(encoder, scans, cfg, device, overlap=None):
    """(t, c) features, (t,) organ ids, (t,) scan numbers of the tokens that show an organ; see encode."""
    parts, p = [], cfg.probe_patch
    for n, scan in enumerate(scans):
        volume = torch.from_numpy(np.ascontiguousarray(scan.open()))
        features = encode(encoder, volume, cfg.probe_crop or cfg.crop, p, device, overlap)
        x, y, z = (slice(cells * p) for cells in features.shape[1:])
        ids, _ = token_labels(scan.open("label")[0][x, y, z], p, cfg.probe_share)
        features = rearrange(features, "c i j k -> (i j k) c").numpy()
        parts.append((features[ids > 0], ids[ids > 0], np.full((ids > 0).sum(), n)))
    return [np.concatenate(each) for each in zip(*parts)]


@torch.no_grad()
def correspondence_accuracy(encoder, scans, cfg, device, blank=False, rows=2048):
    """Share of matched tokens whose most similar token of V' (cosine of features) is the true partner. V' is
    moved by the config's rotation, scale, shear and shift, one slab a scan. blank: of the same matches with
    nothing to be seen in either view: what a token's place in its crop, known by the padding, gives away.
    rows: so many tokens of V are compared with all of V' at a time."""
    p, grid = cfg.probe_patch, tuple(s // cfg.probe_patch for s in cfg.slab)
    slabs, found = data.Slabs(scans, dataclasses.replace(cfg, token_patch=p), 1, cfg.seed), []
    for n, scan in enumerate(scans):
        batch = data.collate([slabs.sample(scan, np.random.default_rng((cfg.seed, n)))])
        valid, valid_ = batch["valid"], batch["valid_"]
        _, i, j = data.matches(batch["H"], grid, p).T
        views = [view[0] * (not blank) for view in data.views(batch, cfg)[:2]]
        maps = [encode(encoder, view, cfg.crop, p, device) for view in views]
        q, k = (rearrange(features, "c i j k -> 1 (i j k) c") for features in maps)
        both = valid[0, i] & valid_[0, j]
        for i, j in zip(i[both].split(rows), j[both].split(rows)):     # a slab of the paper has 27,648 tokens
            found += (losses.similarity(q[:, i], k)[0].masked_fill(~valid_, -2).argmax(1) == j).tolist()
    return sum(found) / max(len(found), 1)


@torch.no_grad()
def crop_recognition(student, teacher, scans, cfg, device, crops=64):
    """losses.recognition of `crops` crops of these scans among each other's twins, all of one teacher: a
    measure of L_g that the teacher's drift cannot meet. student, teacher: crop (1, c, x, y, z) -> (1, e).

    returns dict over all queries of cfg.probe_draws draws: top1, nce and their chances among all `crops`, of
    which n scans told apart, and nothing within them, give a top-1 of n / crops; the same of "others", among
    crops of other subjects alone, and of "within", among crops of the query's own scan whose
    middles lie a quarter of a crop or more away, where no scan can be told. "queries": how many had any.
    """
    slabs, found, places = data.Slabs(scans, cfg, 1, cfg.seed), [], []
    for n in range(crops * cfg.probe_draws):
        generator = np.random.default_rng((cfg.seed, 3, n))
        batch = data.collate([slabs.sample(scans[n % len(scans)], generator)])
        V, _, twin = data.views(batch, cfg)
        x, y, z = (slice(s, s + c) for s, c in zip(batch["crop"][0].tolist(), cfg.crop))
        found.append([student(V[:, :, x, y, z].to(device)), teacher(twin.to(device))])
        places.append((batch["start"] + batch["crop"])[0])
    queries, keys = (torch.cat(each).cpu() for each in zip(*found))
    n = torch.arange(len(queries))
    scan, place = n % len(scans), torch.stack(places)
    subject = torch.tensor([data.subject_number(each.subject) for each in scans])[scan]
    drawn = _pairs(n // crops) & ~torch.eye(len(n), dtype=torch.bool)
    away = ((rearrange(place, "n a -> n 1 a") - place).abs() >= torch.tensor(cfg.crop) / 4).any(2)
    measured = {}
    for kind, allowed in (("all", drawn), ("others", drawn & ~_pairs(subject)),
                          ("within", drawn & _pairs(scan) & away)):
        asked = allowed.any(1)
        if asked.any():
            known = losses.recognition(queries[asked], keys[asked], keys, cfg.global_temperature,
                                       allowed[asked])
            measured[kind] = {name: value.item() for name, value in known.items()}
            measured[kind]["queries"] = int(asked.sum())
    return measured.pop("all") | measured


def _pairs(x):
    """(n, n) bool: which of x (n,) are alike."""
    return rearrange(x, "n -> n 1") == x


def recognised(found):
    """A line of words: the top-1s of crop_recognition with their chances, and Eq. 1 among all."""
    of = [found, found.get("others"), found.get("within")]
    return [*(f"{each['top1']:.3f} ({each['top1_chance']:.3f})" if each else "-" for each in of),
            f"{found['nce']:.2f} ({found['nce_chance']:.2f})"]


def load_heads(path, cfg, device):
    """Student and teacher of a last.pt, each crop -> embedding of L_g; None of a file without projectors.
    Exits where L_g learned from other crops, or at another temperature, than cfg has."""
    content = {} if path == "random" else read_file(path)
    if content.get("format") != "s2dc/pretrain":
        return None
    keys = {field.name for field in dataclasses.fields(pretrain.Config)}
    its_own = pretrain.Config(**{key: value for key, value in content["config"].items() if key in keys})
    for key in ("crop", "global_temperature"):
        if (then := getattr(its_own, key)) != getattr(cfg, key):
            raise SystemExit(f"{path}: L_g learned with {key} = {then}, found {getattr(cfg, key)}; give it "
                             "as it was, and `probe_crop` for what the encoder sees at once")
    networks = []
    for part in ("student", "teacher"):
        network = pretrain.Network(its_own)
        network.load_state_dict(content[part])
        networks.append(network.to(device).eval())
    return [functools.partial(_embedding, network) for network in networks]


def _embedding(network, volume):
    """(1, e) of a crop (1, c, x, y, z)."""
    return network(volume, torch.ones(1, 1, dtype=torch.bool, device=volume.device))[1][:, 0]


def _pooled(encoder, volume):
    """(1, 16 f): the last map's mean, what the projector of L_g sees."""
    return reduce(encoder(volume)[-1], "b c x y z -> b c", "mean")


def token_labels(label_map, patch, share=0.15):
    """Give every token the organ that its patch shows.

    label_map  (x, y, z) integer ids, 0 background;   patch  voxels, one number or three, dividing the map
    share      least share of it that the organ must cover.  Tiny organs decide it: at 1.5 mm an adrenal gland
               touches about ten patches of 8^3 and fills half of one; 0.15 keeps most, and takes little more
               than the rim from the large organs
    returns    ids (t,): the most frequent id but 0 (of equals the least), or 0 where none covers `share`;
               purity (t,): the share of the patch that has this id.  Token order "(x y z)", x slowest
    """
    label_map, patch = np.asarray(label_map), tasks.three(patch)
    shape, kind, (p, q, r) = label_map.shape, label_map.dtype, patch
    if len(shape) != 3 or kind.kind not in "iub" or any(s % n for s, n in zip(shape, patch)):
        raise ValueError(f"token_labels: expected integers, sides in steps of {patch}, found {kind} {shape}")
    ids, index = np.unique(np.append(label_map.ravel(), 0), return_inverse=True)   # 0 is always among the ids
    index = index[:-1].reshape(shape)
    patches = rearrange(index, "(x p) (y q) (z r) -> (x y z) (p q r)", p=p, q=q, r=r)
    t, voxels = patches.shape
    flat = patches + len(ids) * np.arange(t)[:, None]
    covered = np.bincount(flat.ravel(), minlength=t * len(ids)).reshape(t, len(ids)) / voxels
    organs = np.where(ids == 0, -1, covered)                               # background names no token
    best = np.where(organs.max(1) < share, np.searchsorted(ids, 0), organs.argmax(1))
    return ids[best], covered[np.arange(t), best]


def linear_probe(train_x, train_y, test_x, test_y, seed=0, limit=1000):
    """How well a linear map reads organs from features: logistic regression, every class of equal weight.

    *_x      (t, d) features, standardised by the training mean and deviation;   *_y  (t,) ids
    limit    at most so many training tokens per class, drawn by `seed` (scans are mostly background, liver)
    returns  dict: balanced_accuracy, recall {id: share found}, of the test set's classes that were trained;
             untrained [ids], those that were not
    """
    linear = evaluate.need("sklearn.linear_model", "scikit-learn")
    train_x, train_y, test_x, test_y = _probe_sets(train_x, train_y, test_x, test_y, seed, limit)
    mean, deviation = train_x.mean(0), train_x.std(0)
    deviation[deviation == 0] = 1
    probe = linear.LogisticRegression(class_weight="balanced", max_iter=2000)
    probe.fit((train_x - mean) / deviation, train_y)
    return _recalls(probe.predict((test_x - mean) / deviation), test_y, train_y)


def knn_probe(train_x, train_y, test_x, test_y, seed=0, limit=1000, k=20):
    """How well neighbours share organs: majority of the k training tokens of largest cosine; see above."""
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
            raise ValueError(f"probe: {which} must be finite (t, d) features with (t,) ids, "
                             f"found {x.shape} and {y.shape}")
    classes = np.unique(train_y).tolist()
    if len(classes) < 2:
        raise ValueError(f"probe: training tokens must show two classes at least, found {classes}")
    chosen = thin(train_y, seed, limit)
    return train_x[chosen], train_y[chosen], test_x, test_y


def thin(y, seed, limit):
    """Sorted indices of at most `limit` tokens per class, drawn by `seed`."""
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[:limit] for c in np.unique(y)]))


def _recalls(predicted, true, trained):
    known = np.intersect1d(true, trained)
    recall = {int(c): float(np.mean(predicted[true == c] == c)) for c in known}
    return dict(balanced_accuracy=metrics.mean(list(recall.values())), recall=recall,
                untrained=np.setdiff1d(true, trained).tolist())


def silhouette(x, y, metric="cosine", seed=0, limit=1000):
    """How well tokens (t, d) gather by organ y (t,), Rousseeuw 1987: 1 apart, 0 mixed, negative misplaced.

    metric   "cosine" or "euclidean" (the paper's figures use Euclidean on raw features)
    limit    at most so many tokens per class, drawn by `seed`: time grows with the square of their number
    returns  (mean over tokens, {id: mean over its tokens})
    """
    measures = evaluate.need("sklearn.metrics", "scikit-learn")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"silhouette: metric must be 'cosine' or 'euclidean', found {metric!r}")
    x, y = np.asarray(x, np.float64), np.asarray(y)
    chosen = thin(y, seed, limit)
    x, y, classes = x[chosen], y[chosen], np.unique(y)
    if not 2 <= len(classes) < len(y):
        raise ValueError("silhouette: expected two classes and more tokens than classes, "
                         f"found {len(classes)} and {len(y)}")
    values = measures.silhouette_samples(x, y, metric=metric)
    return float(values.mean()), {int(c): float(values[y == c].mean()) for c in classes}


def effective_rank(x):
    """Dimensions that features (t, d) really use: exp of the entropy of their singular values, centred;
    1 a line, min(t - 1, d) all directions alike, 0 collapsed, equal tokens. Roy and Vetterli 2007."""
    x = np.asarray(x, np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    if values[0] <= 1e-12 * max(np.abs(x).max(), 1):
        return 0.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def enough(train_x, train_y, test_x, test_y, cfg):
    """(train_x, train_y, test_x, test_y) of the organs with cfg.probe_least tokens in both, {id: [tokens that
    train, test]} of all: one token of three would be worth a third of an organ, and k neighbours of a class
    of fewer outvote it however well it is known."""
    count = {int(c): [int((y == c).sum()) for y in (train_y, test_y)] for c in np.union1d(train_y, test_y)}
    kept = [c for c, numbers in count.items() if min(numbers) >= cfg.probe_least]
    if len(kept) < 2:
        numbers = ", ".join(f"{c}: {n[0]} and {n[1]}" for c, n in count.items()) or "none"
        raise SystemExit(f"a probe needs two organs with {cfg.probe_least} tokens each that train and that "
                         f"test (probe_least), found {numbers}; a smaller probe_share gives more")
    train, test = np.isin(train_y, kept), np.isin(test_y, kept)
    return (train_x[train], train_y[train], test_x[test], test_y[test]), count


def told(counts, cfg):
    """What the probe is made of, in words."""
    names = {c: f"{cfg.labels.get(c, c)} {n[0]}/{n[1]}" for c, n in counts.items()}
    kept = [c for c, n in counts.items() if min(n) >= cfg.probe_least]
    few = [name for c, name in names.items() if c not in kept]
    return (f"; {len(kept)} organs by their tokens of {cfg.probe_patch} voxels (train/test): "
            f"{', '.join(names[c] for c in kept)}" + (f"; too few of {', '.join(few)}" if few else ""))


def measure(cfg, device):
    """{checkpoint: numbers that need no fine-tuning}, random weights first if probe_random; prints them."""
    check(cfg)
    train, test = parts_of(probe_scans(cfg), cfg)
    files, results = list(data.several(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "encoder.pt")], {}
    if cfg.probe_random:
        files = ["random", *files]
    rows = [["encoder", "linear probe", "k-NN", "silhouette cos", "silhouette eucl", "effective rank",
             "correspondence", "of blanks"]]
    heard = [["top-1 of 64 crops (chance)", "by", "all", "of other subjects", "of its scan", "Eq. 1"]]
    for path in dict.fromkeys(files):                               # each once
        encoder = load_encoder(path, cfg, device)
        sets, counts = enough(*organ_tokens(encoder, train, cfg, device)[:2],
                              *organ_tokens(encoder, test, cfg, device)[:2], cfg)
        if not results:
            print(f"probe: {len(train)} scans train, {len(test)} test" + told(counts, cfg))
        linear, near = (score(*sets, cfg.seed, cfg.probe_limit) for score in (linear_probe, knn_probe))
        cosine, euclidean = (silhouette(*sets[2:], metric) for metric in ("cosine", "euclidean"))
        rank = effective_rank(sets[2])
        found, place = (correspondence_accuracy(encoder, test, cfg, device, blank)
                        for blank in (False, True))
        pooled = functools.partial(_pooled, encoder)
        crops = crop_recognition(pooled, pooled, test, cfg, device)
        heads = load_heads(path, cfg, device)
        L_g = crop_recognition(*heads, test, cfg, device) if heads else {}
        results[path] = dict(linear=linear, knn=near, silhouette_cosine=cosine,
                             silhouette_euclidean=euclidean, effective_rank=rank, correspondence=found,
                             correspondence_of_blanks=place, crops=crops, L_g=L_g,
                             tokens=[len(sets[0]), len(sets[2])], organs=counts)
        values = [linear["balanced_accuracy"], near["balanced_accuracy"], cosine[0], euclidean[0], rank,
                  found, place]
        rows.append([path, *[f"{value:.3f}" for value in values]])
        heard += [[path, by, *recognised(known)] for by, known in (("pooled features", crops), ("L_g", L_g))
                  if known]
    print(evaluate.text_table(rows) + "\n\n" + evaluate.text_table(heard))
    classes = len(np.unique(sets[1]))
    print("(linear probe and k-NN: balanced accuracy over organs, 1 all right, chance "
          f"{1 / classes:.3f}; silhouette: 1 apart, 0 mixed; correspondence: share of tokens found again "
          "after the config's moves, of blanks: with nothing to be seen, by their place; top-1: share of "
          "crops whose twin is more similar than those of all 64, of other subjects' alone, or of the crops "
          "of its own scan that lie a quarter of a crop or more away)")
    return results


def main(argv):
    cfg = load(Config, argv)
    out = Path(cfg.out or Path(cfg.runs) / cfg.name)
    results = measure(cfg, run.choose_device())
    run.write_json(out / "probe.json", dict(probe=results, config=dataclasses.asdict(cfg), **run.versions()))


if __name__ == "__main__":
    run.program(main)
