"""The paper's figures: what an encoder learned, as pictures with the numbers behind them.

    python -m lab.figures configs/demo.py                       all of them
    python -m lab.figures configs/demo.py --figures=tsne,pca    some

Axes: c channel, x y z voxels, i j k or t tokens. A point (3,): in voxels of a scan; a file is a checkpoint
or "random". matplotlib and scikit-learn are imported where they are used.
"""
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy import ndimage, spatial

import configs
import data
import evaluate
import losses
import metrics
import run
from lab import probe
from model import read_file


@dataclasses.dataclass
class Config(probe.Config):
    """The keys of the probe, whose scans are shown, and those of the figures."""
    figures: str | tuple = "all"    # or some of similarity, distribution, tsne, pca, correspondence, ..
    figure_scan: str = ""           # id of the scan that is shown, default the first
    query: tuple = ()               # point whose patch the others are compared with, x y z in its voxels ..
    query_mm: tuple = ()            # .. or R A S in mm; default one per organ, without labels the middle
    figure_organs: tuple = ()       # ids of the organs that are queried, default all
    figure_tokens: int = 200        # tokens per organ that t-SNE shows; ours


STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
         "legend.fontsize": 8, "legend.frameon": False, "figure.titlesize": 11, "figure.facecolor": "white",
         "savefig.dpi": 150}
ORANGE, SKY, GREEN, _, BLUE, RED = evaluate.COLOURS[:6]
BRIGHT = [c for c in evaluate.COLOURS if c not in (BLUE, "#882255", "#332288", "#999933")]     # on black; ten


class NoFigure(Exception):
    """Why a picture cannot be made of the scans, checkpoints or log at hand; one line."""


class Shown:
    """What several pictures share: a scan, its organs, query points and tokens, and its moved copy."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.patch = cfg, device, cfg.probe_patch
        self.headings, self.cases = headings(cfg), data.find_cases(cfg)
        self.scan = open_scan(cfg, self.cases)
        self.grid = tuple(s // self.patch for s in self.scan.shape)
        self.centres = data.patch_centres(self.grid, self.patch).numpy()
        self.middle = (np.array(self.grid) // 2 + 0.5) * self.patch - 0.5
        self.organs = None                          # or ids (t,), 0 where a patch shows none, and purity (t,)
        if self.scan.case["label"]:
            label = self.scan.open("label")[0][tuple(slice(n * self.patch) for n in self.grid)]
            self.organs = probe.token_labels(label, self.patch, cfg.probe_share)
        self.queries = query_points(self)
        self.encoders, self.encoded = {}, {}

    def organ_name(self, organ):
        return self.cfg.labels.get(organ, f"organ {organ}")

    def token_of(self, point):
        """Token (i, j, k) whose patch holds a point; exits where none does."""
        token = index_of(point, self.patch)
        if (token < 0).any() or (token >= self.grid).any():
            at, last = np.round(point, 1).tolist(), [n * self.patch - 1 for n in self.grid]
            raise SystemExit(f"query: voxel {at} lies in no patch of {self.scan.id}, they span 0 to {last}")
        return tuple(token.tolist())

    def encoder(self, file):
        """The encoder of a checkpoint, loaded once; exits where it cannot take the scan."""
        if file not in self.encoders:
            self.encoders[file] = probe.load_encoder(file, self.cfg, self.device)
        takes, holds = self.encoders[file].arguments["in_channels"], self.scan.record["channels"]
        if takes != holds:
            raise SystemExit(f"{file}: takes {takes} channels, {self.scan.id} has {holds}")
        return self.encoders[file]

    def tokens(self, file, moved=False):
        """(c, i, j, k) features of V, or of V'; crops overlap by half, so that their edges do not show."""
        if (file, moved) not in self.encoded:
            volume = self.pair["V'"] if moved else torch.from_numpy(np.ascontiguousarray(self.scan.open()))
            self.encoded[file, moved] = probe.encode(self.encoder(file), volume, self.cfg.crop, self.patch,
                                                     self.device, overlap=0.5)
        return self.encoded[file, moved]

    def similarities(self, file, of=None):
        """Blocks (rows, t): similarity of V's tokens, all or those `of` (n,), with all of V'."""
        q, k = (rearrange(self.tokens(file, moved), "c i j k -> 1 (i j k) c") for moved in (False, True))
        rows = torch.arange(q.shape[1]) if of is None else torch.as_tensor(of)
        for block in rows.split(2048):
            yield losses.similarity(q[:, block], k)[0]

    @functools.cached_property
    def pair(self):
        """V, the whole scan, and V', moved and jittered within the config's ranges, (c, x, y, z); H (4, 4);
        matches (m, 2): rows (i, j) of Eq. 2-3 inside the scan; valid_ (t,): tokens of V' that show the scan;
        bright (t,): tokens of V above its mean."""
        shape = self.scan.shape
        whole = dataclasses.replace(self.cfg, slab=shape, crop=shape, token_patch=self.patch)
        sample = data.Slabs([self.scan], whole, 1, whole.seed).sample
        batch = data.collate([sample(self.scan, np.random.default_rng(whole.seed))])
        V, V_, _ = data.views(batch, whole)
        valid, valid_ = batch["valid"], batch["valid_"]
        _, i, j = data.matches(batch["H"], self.grid, self.patch).T
        matches = torch.stack([i, j], 1)[valid[0, i] & valid_[0, j]]
        bright = F.avg_pool3d(V[0, :1], self.patch).flatten() > V[0, 0].mean()
        return {"V": V[0], "V'": V_[0], "H": batch["H"][0].numpy(), "matches": matches.numpy(),
                "valid_": valid_[0], "bright": bright.numpy()}

    def write_numbers(self, path, **numbers):
        of_scan = {key: getattr(self.scan, key) for key in ("id", "shape", "spacing", "affine")}
        run.write_json(path, of_scan | dict(patch=self.patch, grid=self.grid) | numbers)


def index_of(point, edge):
    """Index (3,) of the voxel (edge 1) or patch that holds a point: half a voxel beyond voxel centres."""
    return np.floor((np.asarray(point) + 0.5) / edge).astype(int)


def headings(cfg):
    """{file: heading}: run and step, or the whole path where two would be called the same."""
    files = list(data.several(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "encoder.pt")]
    short = {f: "/".join(Path(f).with_suffix("").parts[-2:]).removesuffix("/encoder") for f in files}
    if "random" in short:
        short["random"] = "random weights"
    return short if len(set(short.values())) == len(short) else {f: f for f in files}


def open_scan(cfg, cases):
    """The scan of cfg.figure_scan, which must hold a patch at least."""
    found = [case for case in cases if cfg.figure_scan in ("", case["id"])]
    if not found:
        raise SystemExit(f"figure_scan = {cfg.figure_scan!r}, no case has that id; there are: "
                         f"{', '.join(case['id'] for case in cases[:4])} ..")
    scan, = data.open_scans(cfg, found[:1])
    if min(scan.shape) < cfg.probe_patch:
        raise SystemExit(f"{scan.id}: {scan.shape} voxels do not hold one patch of {cfg.probe_patch}")
    return scan


def query_points(shown):
    """[(name, organ id or None, point)]: the point asked for; or every organ's purest patch, of equals that
    nearest to its middle; or, without labels, the middle of the scan. Empty: no patch shows an organ."""
    cfg, scan = shown.cfg, shown.scan
    if cfg.query or cfg.query_mm:
        point = cfg.query or (np.linalg.inv(scan.affine) @ [*cfg.query_mm, 1])[:3]
        shown.token_of(point)                                              # or it exits
        return [("query", None, np.array(point, float))]
    if shown.organs is None:
        print(f"{scan.id}: no label and no query, so the point shown is the middle of the scan")
        return [("middle of the scan", None, shown.middle)]
    ids, purity = shown.organs
    lost = [organ for organ in cfg.figure_organs if organ not in ids]
    if lost:
        raise SystemExit(f"{scan.id}: no patch of {shown.patch} voxels shows organ {lost[0]} "
                         f"(probe_share = {cfg.probe_share:g}); give a query")
    points = []
    for organ in cfg.figure_organs or sorted(set(ids.tolist()) - {0}):
        own = ids == organ
        away = np.linalg.norm(shown.centres - shown.centres[own].mean(0), axis=1)
        away[~own | (purity < purity[own].max())] = np.inf
        points.append((shown.organ_name(organ), organ, shown.centres[away.argmin()]))
    return points


def principal_components(tokens):
    """First three (i, j, k, 3) of tokens (c, i, j, k), and each one's share of the variance (3,). A sign is
    arbitrary: scikit-learn makes the largest weight positive, so a picture is the same on every machine."""
    x = rearrange(tokens, "c i j k -> (i j k) c").double().numpy()
    if min(x.shape) < 3:
        raise NoFigure(f"{x.shape[0]} tokens of {x.shape[1]} features have no three components")
    pca = evaluate.need("sklearn.decomposition", "scikit-learn").PCA(3, svd_solver="full")
    return pca.fit_transform(x).reshape(*tokens.shape[1:], 3), pca.explained_variance_ratio_


def new_figure(width, height, title, layout="constrained", title_at=None):
    figure = evaluate.need("matplotlib.figure", "matplotlib").Figure((width, height), layout=layout)
    figure.suptitle(title, y=title_at)
    return figure


def draw_plane(axes, shown, plane, point, volume, look, organ=None, mark=True):
    """One slice in the frame of the scan's voxels, of voxels or tokens alike; R, or the front, is left."""
    from matplotlib.patches import Rectangle
    _, _, across, up, letters = plane
    shape, spacing, patch = shown.scan.shape, shown.scan.spacing, shown.patch
    step = 1 if volume.shape == shape else patch
    channels = rearrange(volume, "i j k c -> c i j k") if volume.ndim == 4 else [volume]
    picture = np.stack(evaluate.slice_through(plane, index_of(point, step), *channels), -1)
    end = shape[across] - 0.5                                              # grey where no whole patch fits
    extent = end - picture.shape[1] * step, end, -0.5, picture.shape[0] * step - 0.5
    drawn = axes.imshow(picture, origin="lower", interpolation="nearest", extent=extent, **look)
    axes.set(xlim=(-0.5, end), ylim=(-0.5, shape[up] - 0.5), xticks=[], yticks=[], facecolor="0.6")
    axes.set_aspect(spacing[up] / spacing[across])
    if organ is not None:
        mask, = evaluate.slice_through(plane, index_of(point, 1), shown.scan.open("label")[0] == organ)
        if mask.any():
            axes.contour(mask, [0.5], colors=["white"], linewidths=0.9)
    if mark:
        first = np.array(shown.token_of(point)) * patch
        corner = end - first[across] - patch, first[up] - 0.5
        for colour, line in (("black", 2.6), (SKY, 1.3)):
            axes.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=colour, linewidth=line))
    evaluate.draw_letters(axes, letters)
    return drawn


def scan_column(shown, point):
    """The scan as a column of draw_sheet, grey from the 1st to the 99.5th percentile of its slices."""
    own = data.ruled(shown.scan.case, shown.cfg)
    unit, (low, high) = "value (CT: HU)", own.window
    if own.intensity == "zscore":
        unit, low, high = "z-score", 0, 1
    image = shown.scan.open()[0].astype(np.float32) * (high - low) + low
    slices = [evaluate.slice_through(plane, index_of(point, 1), image)[0] for plane in evaluate.PLANES]
    low, high = np.percentile(np.concatenate([picture.ravel() for picture in slices]), [1, 99.5])
    return "scan", image, dict(cmap="gray", vmin=low, vmax=high), unit


def draw_sheet(path, shown, point, columns, title, organ=None, mark=True):
    """One PNG: a row per plane through `point`; the scan, then a column per volume, all at one scale in mm.
    columns  (heading, volume, look, unit): tokens (i, j, k) and dict(cmap, vmin, vmax), or their colours
             (i, j, k, 3) in [0, 1] and {}
    organ    id that is outlined where the label has it;   mark: a square on the patch that holds the point
    """
    columns = [scan_column(shown, point), *columns]
    mm, n = np.array(shown.scan.shape) * shown.scan.spacing, len(columns)
    widths, heights = (mm[[plane[axis] for plane in evaluate.PLANES]] for axis in (2, 3))
    side, foot, gap, width = 0.35, 0.45, 0.07, max(9.0, 1.75 * n)          # inches, as all that follows
    head = 0.5 + 0.16 * max(heading.count("\n") + 1 for heading, *_ in columns)
    scale = min(((width - side) / n - gap) / max(widths), 9.5 / sum(heights))      # inches per mm
    broad, heights = max(widths) * scale, [*heights * scale, 0.1]          # the last for the colour bars
    height, left = head + sum(heights) + 3 * gap + foot, side + (width - side - n * (broad + gap)) / 2
    figure = new_figure(width, height, title, layout=None, title_at=1 - 0.08 / height)
    places = dict(left=left / width, right=(left + n * (broad + gap) - gap) / width, wspace=gap / broad,
                  bottom=foot / height, top=1 - head / height, hspace=gap / np.mean(heights))
    cells = figure.subplots(4, n, height_ratios=heights, gridspec_kw=places)
    for (*above, below), (heading, volume, look, unit) in zip(cells.T, columns):
        above[0].set_title(heading)
        for axes, plane in zip(above, evaluate.PLANES):
            drawn = draw_plane(axes, shown, plane, point, volume, look, organ, mark)
        below.axis("off")
        if look:
            bar = below.inset_axes((0.05, 0, 0.9, 1))
            figure.colorbar(drawn, cax=bar, orientation="horizontal").set_label(unit, labelpad=1)
            bar.locator_params(nbins=4)
        else:
            below.text(0.5, 1, unit, ha="center", va="top")
    for axes, (name, cut, *_) in zip(cells[:, 0], evaluate.PLANES):
        axes.set_ylabel(f"{name}, {'xyz'[cut]} = {point[cut]:.4g}")
    figure.savefig(path)


def draw_similarity(shown, out, kind="similarity", headings=None):
    """Fig. 1B: cosine similarity of a query patch with all patches of the scan, a column per encoder {file:
    heading}, default those of shown; a sheet per query."""
    headings, made, numbers = headings or shown.headings, [], []
    if not shown.queries:
        raise NoFigure(f"{shown.scan.id}: no patch of {shown.patch} voxels shows an organ "
                       f"(probe_share = {shown.cfg.probe_share:g}); give a query")
    for name, organ, point in shown.queries:
        token, mm = shown.token_of(point), (shown.scan.affine @ [*point, 1])[:3]
        maps = {file: cosine_map(shown.tokens(file), token) for file in headings}
        look = dict(cmap="magma", vmin=min(m.min() for m in maps.values()), vmax=1)
        columns = [(headings[file], m, look, "cosine similarity") for file, m in maps.items()]
        place = ", ".join(f"{v:.0f}" for v in mm)
        title = f"Similarity to the marked patch: {name}\nscan {shown.scan.id}, R A S = {place} mm"
        part = f"_{data.plain_id(name.replace(' ', '_'))}" if len(shown.queries) > 1 else ""
        made.append(out / f"{kind}{part}.png")
        draw_sheet(made[-1], shown, point, columns, title, organ)
        numbers.append(dict(name=name, organ=organ, voxel=point, mm=mm, token=token,
                            maps={file: m.round(5) for file, m in maps.items()}))
    shown.write_numbers(out / f"{kind}.json", queries=numbers)
    return made


def cosine_map(tokens, token):
    """Cosine similarity (i, j, k) of all tokens (c, i, j, k) with that at `token`; 1 the same direction."""
    query = rearrange(tokens[(slice(None), *token)], "c -> 1 1 c")
    similarity = losses.similarity(query, rearrange(tokens, "c i j k -> 1 (i j k) c"))
    return similarity.reshape(tokens.shape[1:]).numpy()


def draw_evolution(shown, out):
    """Fig. 7: the same maps of random weights and of the checkpoints that pre-training kept (key `keep`)."""
    folder = Path(shown.cfg.runs) / shown.cfg.name
    kept = {int(file.stem[8:]): str(file) for file in folder.glob("encoder-*.pt") if file.stem[8:].isdigit()}
    if not kept:
        raise NoFigure(f'{folder} holds no encoder-<step>.pt; pre-train with, say, --keep="(10, 100, 1000)"')
    last = folder / "encoder.pt"
    if last.exists():
        kept.setdefault(read_file(last).get("step"), str(last))
    steps = {kept[step]: f"step {step}" for step in sorted(kept)}
    return draw_similarity(shown, out, "evolution", {"random": "random weights"} | steps)


def tokens_to_compare(shown, ratios):
    """{what: token}: that of the query; or those of the highest and the lowest ratio (t,) of all patches of
    tissue (of an organ, where there are labels) whose true partner is in V'."""
    if shown.cfg.query or shown.cfg.query_mm:
        return {"query": int(np.ravel_multi_index(shown.token_of(shown.queries[0][2]), shown.grid))}
    wanted = shown.pair["bright"]
    if shown.organs is not None:
        wanted = wanted & (shown.organs[0] > 0)                            # a label may hold air
    tokens = np.intersect1d(np.flatnonzero(wanted), shown.pair["matches"][:, 0])
    if not len(tokens):
        raise NoFigure("the config's moves leave no patch of tissue, or of an organ, its partner in V'")
    highest, lowest = tokens[ratios[tokens].argmax()], tokens[ratios[tokens].argmin()]
    return {"highest ratio": int(highest), "lowest ratio": int(lowest)}


def draw_distribution(shown, out):
    """Fig. 3: similarities of a patch with all of V' and its Sharpe ratio (Eq. 6); the map of the ratio."""
    pair, usable, ratios, numbers = shown.pair, shown.pair["valid_"], {}, []
    for file in shown.headings:
        blocks = [losses.sharpe_ratio(rows[None], 2, usable[None])[0] for rows in shown.similarities(file)]
        ratios[file] = torch.cat(blocks).numpy()
    chosen = tokens_to_compare(shown, ratios[file])                        # of the last encoder
    title = f"Similarity of a patch of V with the {usable.sum()} patches of V', scan {shown.scan.id}"
    figure = new_figure(9, 2.9 + 2.1 * len(ratios), title)
    heights = [1.4] + [1] * len(ratios)
    columns = figure.subplots(len(heights), len(chosen), squeeze=False, height_ratios=heights).T
    image = shown.scan.open()[0].astype(np.float32)
    low, high = np.percentile(image, [1, 99.5])
    for (above, *below), (which, token) in zip(columns, chosen.items()):
        point, title = shown.centres[token], which
        if shown.organs is not None and shown.organs[0][token]:
            title += f", {shown.organ_name(shown.organs[0][token])}"
        draw_plane(above, shown, evaluate.PLANES[0], point, image, dict(cmap="gray", vmin=low, vmax=high))
        above.set_title(f"{title}, axial, z = {point[2]:.4g}")
        partners = pair["matches"][pair["matches"][:, 0] == token][:, 1]
        for axes, file in zip(below, ratios):
            row, ratio = next(shown.similarities(file, [token]))[0], ratios[file][token]
            values, true = row[usable].numpy(), row[partners].numpy()
            draw_histogram(axes, values, true, ratio, shown.headings[file])
            numbers.append(dict(which=which, encoder=file, token=token, sharpe_ratio=ratio,
                                true_partners=true, similarities=values.round(5)))
        axes.set_xlabel("cosine similarity")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(out / "distribution.png")
    maps = {file: values.reshape(shown.grid) for file, values in ratios.items()}
    low, high = min(m.min() for m in maps.values()), max(m.max() for m in maps.values())
    look = dict(cmap="viridis", vmin=low, vmax=high)
    columns = [(shown.headings[file], m, look, "Sharpe ratio, Eq. 6") for file, m in maps.items()]
    title = f"Sharpe ratio of every patch: high, one peak; low, many similar patches\nscan {shown.scan.id}"
    draw_sheet(out / "distribution_map.png", shown, shown.centres[list(chosen.values())[0]], columns, title)
    maps = {file: m.round(5) for file, m in maps.items()}
    shown.write_numbers(out / "distribution.json", H=pair["H"], chosen=numbers, sharpe_ratio=maps)
    return [out / "distribution.png", out / "distribution_map.png"]


def draw_histogram(axes, values, true, ratio, heading):
    """Counts on a logarithmic axis, so that a peak of one patch is seen beside thousands."""
    axes.hist(values, np.linspace(-1, 1, 81), color=BLUE, log=True)
    axes.axvline(values.mean(), color="0.2", linewidth=1.2, linestyle=":", label="mean")
    axes.axvline(values.max(), color=RED, linewidth=1.4, label="largest")
    style = dict(color=GREEN, markersize=8, clip_on=False, zorder=5)
    axes.plot(true, np.full(len(true), 0.62), "^", label="true partner", **style)
    axes.set(xlim=(-1, 1), ylim=(0.62, None), ylabel="patches")
    text = f"({values.max():.2f} {-values.mean():+.2f}) / {values.std():.2f} = {ratio:.2f}"
    axes.set_title(f"{heading}: Sharpe ratio {text}")


def draw_tsne(shown, out):
    """Fig. 4, 5: t-SNE and silhouettes of tokens that show an organ, in all labelled scans."""
    labelled = [case for case in shown.cases if case["label"]]
    if not labelled:
        raise NoFigure("the scans have no labels; give image and label, or a datalist")
    scans = data.open_scans(shown.cfg, labelled)
    numbers = {file: tsne(shown, file, scans) for file in shown.headings}
    title = f"Tokens of {shown.patch} voxels that show an organ, {len(scans)} scans; t-SNE, perplexity 24"
    figure = new_figure(9, 9, title)
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    for axes, (file, number) in zip(above.subplots(1, len(numbers), squeeze=False)[0], numbers.items()):
        draw_points(axes, shown, number, shown.headings[file])
    above.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=3)
    draw_silhouettes(below, shown, numbers)
    figure.draw_without_rendering()                 # the layout of tick labels settles at the second pass
    figure.savefig(out / "tsne.png")
    names = {organ: shown.organ_name(organ) for organ in number["tokens"]}
    run.write_json(out / "tsne.json", dict(scans=[scan.id for scan in scans], names=names, encoders=numbers))
    return [out / "tsne.png"]


def tsne(shown, file, scans):
    """Of one encoder: points (t, 2) of few tokens, their organs and scans; counts and silhouettes of all."""
    manifold, cfg = evaluate.need("sklearn.manifold", "scikit-learn"), shown.cfg
    x, y, n = probe.organ_tokens(shown.encoder(file), scans, cfg, shown.device, 0.5)
    counts = {organ: int((y == organ).sum()) for organ in np.unique(y).tolist()}
    kept = probe.thin(y, cfg.seed, cfg.figure_tokens)
    if len(counts) < 2 or len(kept) <= 24:
        raise NoFigure(f"{len(kept)} tokens of {len(counts)} organs, more than 24 of two are needed")
    points = manifold.TSNE(2, perplexity=24, init="pca", random_state=cfg.seed).fit_transform(x[kept])
    scores = {}
    for metric in ("euclidean", "cosine"):                                 # Euclidean: as published
        mean, each = probe.silhouette(x, y, metric, cfg.seed, len(y))      # of all
        scores[metric] = dict(mean=mean, mean_of_organs=metrics.mean(list(each.values())), organs=each)
    return dict(points=points.round(3), organ=y[kept], scan=n[kept], tokens=counts, silhouette=scores)


def draw_points(axes, shown, number, heading):
    """The tokens of every organ, and its id at the one whose nine nearest are nearest."""
    box = dict(facecolor="white", alpha=0.75, linewidth=0, pad=0.8)
    for organ in number["tokens"]:
        points = number["points"][number["organ"] == organ]
        label = f"{organ} {shown.organ_name(organ)}"
        axes.scatter(*points.T, s=9, color=evaluate.colour_of(organ), linewidths=0, label=label)
        nearest, _ = spatial.cKDTree(points).query(points, range(1, min(10, len(points)) + 1))
        densest = points[nearest.mean(1).argmin()]
        axes.text(*densest, organ, weight="bold", ha="center", va="center", zorder=5, bbox=box)
    means = ", ".join(f"{metric} {score['mean']:.3f}" for metric, score in number["silhouette"].items())
    axes.set(xticks=[], yticks=[], title=f"{heading}; silhouette of all tokens:\n{means}")


def draw_silhouettes(figure, shown, numbers):
    """Bars per organ, then for the mean of the organs and of all tokens; a colour per encoder."""
    width, colours = 0.8 / len(numbers), ("0.6", *evaluate.COLOURS[4:])
    for axes, metric in zip(figure.subplots(2, 1, sharex=True), ("euclidean", "cosine")):
        for n, (file, number) in enumerate(numbers.items()):
            score = number["silhouette"][metric]
            values = [*score["organs"].values(), score["mean_of_organs"], score["mean"]]
            places = np.arange(len(values)) + (n + 0.5) * width - 0.4
            axes.bar(places, values, 0.9 * width, color=colours[n % len(colours)], label=shown.headings[file])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(len(values) - 2.5, color="0.6", linewidth=0.8)
        axes.set_ylabel(f"silhouette, {metric}")
    names = [f"{shown.organ_name(organ)} ({count})" for organ, count in number["tokens"].items()]
    names += ["mean of organs", "all tokens"]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)


def draw_pca(shown, out):
    """Fig. 6: three principal components of a scan's tokens as red, green, blue, and the first alone."""
    columns, numbers = [], {}
    for file, heading in shown.headings.items():
        values, shares = principal_components(shown.tokens(file))
        low, high = np.percentile(values.reshape(-1, 3), [1, 99], axis=0)
        colours, unit = np.clip((values - low) / (high - low), 0, 1), ", ".join(f"{s:.0%}" for s in shares)
        columns.append((f"{heading}\nfirst three as RGB", colours, {}, f"{unit}\nof the variance"))
        look = dict(cmap="cividis", vmin=low[0], vmax=high[0])
        columns.append((f"{heading}\nfirst alone", values[..., 0], look, "component 1"))
        numbers[file] = dict(share_of_variance=shares, components=values.round(5))
    title = f"Principal components of the tokens\nscan {shown.scan.id}"
    draw_sheet(out / "pca.png", shown, shown.middle, columns, title, mark=False)
    shown.write_numbers(out / "pca.json", encoders=numbers)
    return [out / "pca.png"]


def matches_of_a_layer(shown):
    """z of V's layer of patches with most matches of tissue; i, j (n,) of up to ten, from left to right."""
    pair, z = shown.pair, shown.centres[:, 2]
    matched, first = np.unique(pair["matches"][:, 0], return_index=True)   # the first partner of each
    i, j = pair["matches"][first][pair["bright"][matched]].T
    if not len(i) or abs(np.linalg.inv(pair["H"])[2, 2]) < 0.3:
        raise NoFigure("the moves leave no match of tissue, or the axial plane on edge; try another seed")
    layers, counts = np.unique(z[i], return_counts=True)
    layer = layers[counts.argmax()]
    i, j = i[z[i] == layer], j[z[i] == layer]
    few = np.linspace(len(i) - 1, 0, min(10, len(i))).astype(int)          # tokens are ordered by x
    return layer, i[few], j[few]


def most_similar(shown, file):
    """{i: most similar token of V'} of all matched tokens i of V, and those i whose is a true partner."""
    matches, outside = shown.pair["matches"], ~shown.pair["valid_"]
    matched = np.unique(matches[:, 0])
    nearest = [rows.masked_fill(outside, -2).argmax(1) for rows in shown.similarities(file, matched)]
    guess = dict(zip(matched.tolist(), torch.cat(nearest).tolist()))
    return guess, {i for i, j in matches.tolist() if guess[i] == j}


def draw_correspondence(shown, out):
    """V, V' and lines between matched patches: above the true ones (Eq. 2-3), below every encoder's choice.
    V' is shown on the surface to which H sends the plane of V, seen along z: the same tissue lies under both
    ends of a true line, and where H, warp and the matches disagree, it does not."""
    scan, pair, centres, numbers = shown.scan, shown.pair, shown.centres, {}
    z, i, j = matches_of_a_layer(shown)
    rows = [("true partners (Eq. 2-3); dotted: the patch of V as H moves it", j, None)]
    for file, heading in shown.headings.items():
        guess, right = most_similar(shown, file)
        partners = [guess[token] for token in i.tolist()]
        numbers[file] = dict(predicted=partners, right=len(right), matched=len(guess))
        rows.append((f"most similar, {heading}: {len(right)} of all {len(guess)} matched patches right "
                     "(dashed: wrong, by so many mm; dotted: not in this slice)",
                     partners, [token in right for token in i.tolist()]))
    cuts = [surface(pair["V"][0].numpy(), np.eye(4), z),
            surface(pair["V'"][0].numpy(), np.linalg.inv(pair["H"]), z)]
    wide, deep, _ = scan.shape * scan.spacing                              # mm
    title = f"Patches of {shown.patch} voxels, scan {scan.id}: V (left, axial, z = {z:.4g}) and V' (right)"
    figure = new_figure(9, 0.4 + (min(4.2 * deep / wide, 3.6) + 0.3) * len(rows), title)
    for part, (text, partners, right) in zip(figure.subfigures(len(rows), 1), rows):
        part.suptitle(text, fontsize=9)
        both = part.subplots(1, 2, gridspec_kw=dict(wspace=0.1))
        for axes, cut in zip(both, cuts):
            low, high = np.percentile(cut, [1, 99.5])
            axes.imshow(cut, cmap="gray", origin="lower", interpolation="bilinear", vmin=low, vmax=high)
            axes.set(xlim=(-0.5, scan.shape[0] - 0.5), ylim=(-0.5, scan.shape[1] - 0.5), xticks=[], yticks=[])
            axes.set_aspect(scan.spacing[1] / scan.spacing[0])
            evaluate.draw_letters(axes, evaluate.PLANES[0][4])
        draw_lines(part, both, shown, centres[i], centres[partners], centres[j], right)
    figure.savefig(out / "correspondence.png")
    shown.write_numbers(out / "correspondence.json", H=pair["H"], i=i, true=j, encoders=numbers)
    return [out / "correspondence.png"]


def surface(volume, G, z):
    """Picture (up, across), R on the left, of a volume (x, y, z) where G (4, 4) sends it to the plane z."""
    x, y = np.meshgrid(*map(np.arange, volume.shape[:2]), indexing="ij")
    height = (z - G[2, 3] - G[2, 0] * x - G[2, 1] * y) / G[2, 2]
    values = ndimage.map_coordinates(volume, [x, y, height], order=1, cval=float(volume.min()))
    return rearrange(values, "x y -> y x")[:, ::-1]


def draw_lines(figure, both, shown, start, end, true, right):
    """Numbered patches in V and V' (axes `both`), lines from `start` to `end`, (n, 3) each. right (n,) bool:
    the others are dashed, with their distance from the true partner, their squares dotted where they lie half
    a patch or more from the slice that is shown; None: these are the true partners, with the outline to which
    H moves a patch."""
    from matplotlib import patches, patheffects
    p, H, last = shown.patch, shown.pair["H"], shown.scan.shape[0] - 1
    corners = np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)]) * p / 2
    words = dict(va="top", path_effects=[patheffects.withStroke(linewidth=2.2, foreground="black")])
    for n, (a, b, t) in enumerate(zip(start, end, true)):
        wrong = right is not None and not right[n]
        colour, dash = (ORANGE, "--") if wrong else (SKY, "-")
        if right is None:
            colour = BRIGHT[n]
        ink = words | dict(color=colour)
        ends = [(last - x, y) for x, y, _ in (a, b)]
        beside = abs((np.linalg.inv(H) @ [*b, 1])[2] - a[2]) > p / 2        # of the slice, in V
        for axes, (x, y), edge in zip(both, ends, ("-", ":" if beside else "-")):
            corner = x - p / 2, y - p / 2
            axes.add_patch(patches.Rectangle(corner, p, p, fill=False, ec=colour, lw=1.4, ls=edge,
                                             clip_on=False))
            axes.text(x - 0.4 * p, y + 0.4 * p, n + 1, size=8, weight="bold", **ink)
        figure.add_artist(patches.ConnectionPatch(*ends, "data", "data", axesA=both[0], axesB=both[1],
                                                  color=colour, lw=1.1, ls=dash))
        if right is None:
            moved = (a + corners) @ H[:3, :3].T + H[:3, 3]
            outline = np.stack([last - moved[:, 0], moved[:, 1]], 1)
            both[1].add_patch(patches.Polygon(outline, fill=False, ec="white", lw=1, ls=":"))
        if wrong:
            (x, y), mm = ends[1], np.linalg.norm((b - t) * shown.scan.spacing)
            both[1].text(x, y - 0.6 * p, f"{mm:.0f} mm", size=7, ha="center", clip_on=True, **ink)


PANELS = [("losses", "loss", {"loss": "sum", "global": "L_g", "p2p": "L_p2p", "p2s": "L_p2s"}),
          ("matching accuracy", "share of matched tokens", {"accuracy": ""}),
          ("feature spread", "0 collapsed, 1 apart", {"spread": ""}),
          ("validation", "", {"val": ""}), ("learning rate", "learning rate", {"lr": ""}),
          ("gradient norm", "gradient norm", {"grad_norm": ""})]
STROKES = ("black", "-"), (ORANGE, "--"), (BLUE, "-"), (RED, "-.")


def draw_curves(cfg, out):
    """What log.jsonl, whose last line may be half a line, tells of a pre-training or a fine-tuning."""
    path, curves = Path(cfg.runs) / cfg.name / "log.jsonl", {}
    if not path.exists():
        raise NoFigure(f"{path}: no such log")
    lines = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
    for key in [key for _, _, keys in PANELS for key in keys]:
        logged = [line for line in lines if key in line]
        if logged:
            curves[key] = [[line[k] for line in logged] for k in ("step", key)]
    if not curves:
        raise NoFigure(f"{path} holds no logged step")
    metric = next((line["metric"] for line in lines if "metric" in line), "")
    panels = [panel for panel in PANELS if set(panel[2]) & set(curves)]
    columns, last = 2 if len(panels) <= 4 else 3, max(steps[-1] for steps, _ in curves.values())
    figure = new_figure(9, 6, f"{cfg.name}, {last} steps")
    places = figure.subplots(2, columns).flat
    for axes in places[len(panels):]:
        axes.axis("off")
    for axes, (title, unit, keys) in zip(places, panels):
        for (key, label), (colour, dash) in zip(keys.items(), STROKES):
            if key in curves:
                marker = "." if len(curves[key][0]) < 40 else ""
                axes.plot(*curves[key], dash, color=colour, marker=marker, linewidth=1.6, label=label)
        axes.set(title=title, xlabel="step", ylabel=metric if title == "validation" else unit)
        axes.grid(color="0.9")
        if "p2p" in keys and "p2p" in curves:
            axes.legend(ncols=2 if columns == 3 else 4, loc="upper center")
        if title != "validation":
            axes.set_ylim(0, (1.3 if "p2p" in keys else 1.15) * axes.get_ylim()[1])     # above: the legend
    figure.savefig(out / "curves.png")
    run.write_json(out / "curves.json", dict(log=str(path), curves=curves))
    return [out / "curves.png"]


OF_A_SCAN = {"similarity": draw_similarity, "distribution": draw_distribution, "tsne": draw_tsne,
             "pca": draw_pca, "correspondence": draw_correspondence, "evolution": draw_evolution}
FIGURES = [*OF_A_SCAN, "curves"]


def check(cfg):
    """The names in cfg.figures; refuses, before a scan is read, the keys that no figure can be drawn with."""
    names = cfg.figures.split(",") if isinstance(cfg.figures, str) else cfg.figures
    names = [name.strip() for name in names]
    unknown = [name for name in names if name not in (*FIGURES, "all")]
    points = [point for point in (cfg.query, cfg.query_mm) if point]
    run.refuse([
        (not unknown, f"figures: no {', '.join(map(repr, unknown))}; there are: all, {', '.join(FIGURES)}"),
        (cfg.probe_patch in (2, 4, 8, 16, 32), f"probe_patch = {cfg.probe_patch}, expected 2, 4, 8, 16, 32"),
        (len(points) < 2 and all(len(point) == 3 and configs.numbers(point) for point in points),
         f"query = {cfg.query}, query_mm = {cfg.query_mm}: expected three numbers, in one of them"),
    ])
    return names


def draw(cfg, device):
    """The pictures that cfg.figures names, in <out>/figures; of "all" those that can be made."""
    asked, out = check(cfg), Path(cfg.out or Path(cfg.runs) / cfg.name) / "figures"
    names = FIGURES if "all" in asked else asked
    shown = Shown(cfg, device) if set(names) & set(OF_A_SCAN) else None
    if set(names) - {"evolution", "curves"}:                               # which take no cfg.checkpoint
        for file in shown.headings:
            shown.encoder(file)                                            # or it exits, before any is used
    out.mkdir(parents=True, exist_ok=True)
    with evaluate.need("matplotlib", "matplotlib").rc_context(STYLE):
        for name in names:
            try:
                made = draw_curves(cfg, out) if name == "curves" else OF_A_SCAN[name](shown, out)
                print(f"{name}: {', '.join(map(str, made))}")
            except NoFigure as reason:
                if "all" not in asked:
                    raise SystemExit(f"{name}: {reason}") from None
                print(f"{name}: left out, {reason}")


def main(argv):
    draw(probe.load(Config, argv), run.choose_device())


if __name__ == "__main__":
    run.program(main)
