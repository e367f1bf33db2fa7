"""The paper's figures: what an encoder learned, as pictures with the numbers behind them.

    python -m lab.figures configs/demo.py                       all of them
    python -m lab.figures configs/demo.py --figures=tsne,pca    some
"""
import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy import ndimage
from scipy.spatial import cKDTree

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
    figures: str | tuple = "all"    # or some of similarity, distribution, tsne, pca, correspondence, evolution, curves
    figure_scan: str = ""           # id of the scan that is shown, default the first
    query: tuple = ()               # point whose patch the others are compared with, x y z in voxels of the preprocessed scan ..
    query_mm: tuple = ()            # .. or R A S in mm; default one per organ, without labels the middle of the scan
    figure_organs: tuple = ()       # ids of the organs that are queried, default all
    figure_tokens: int = 200        # tokens per organ that t-SNE shows; ours


STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
         "legend.fontsize": 8, "legend.frameon": False, "figure.titlesize": 11, "figure.facecolor": "white", "savefig.dpi": 150}


class NoFigure(Exception):
    """Why a picture cannot be made of the scans, checkpoints or log at hand; one line."""


class Shown:
    """What several pictures share, each made when first asked for: a scan, its query points, tokens, a moved copy."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.patch = cfg, device, cfg.token_patch
        files = list(data.several(cfg.checkpoint)) or [str(Path(cfg.runs) / cfg.name / "encoder.pt")]
        short = ["/".join(Path(f).with_suffix("").parts[-2:]).removesuffix("/encoder") for f in files]
        short = ["random weights" if f == "random" else s for f, s in zip(files, short)]
        self.heads = dict(zip(files, short if len(set(short)) == len(set(files)) else files))    # {file: heading}
        self.encoders, self.encoded = {}, {}

    @functools.cached_property
    def cases(self):
        return data.find_cases(self.cfg)

    @functools.cached_property
    def scan(self):
        found = [case for case in self.cases if self.cfg.figure_scan in ("", case["id"])]
        if not found:
            raise SystemExit(f"figure_scan = {self.cfg.figure_scan!r}, no case has that id; there are: "
                             f"{', '.join(case['id'] for case in self.cases[:4])} ..")
        return data.open_scans(self.cfg, found[:1])[0]

    @functools.cached_property
    def grid(self):
        if min(self.scan.shape) < self.patch:
            raise SystemExit(f"{self.scan.id}: {self.scan.shape} voxels do not hold one patch of {self.patch}")
        return tuple(s // self.patch for s in self.scan.shape)

    @functools.cached_property
    def centres(self):
        return data.patch_centres(self.grid, self.patch).numpy()

    def name(self, organ):
        return self.cfg.labels.get(organ, f"organ {organ}")

    @functools.cached_property
    def organs(self):
        """ids (t,), 0 where a patch shows none, and purity (t,); None without a label."""
        if not self.scan.case["label"]:
            return None
        inside = tuple(slice(n * self.patch) for n in self.grid)
        return probe.token_labels(np.ascontiguousarray(self.scan.open("label")[0][inside]), self.patch, self.cfg.probe_share)

    @functools.cached_property
    def queries(self):
        """[(name, organ id or None, point (3,) in voxels)]: the point asked for; or of every organ the purest patch, of equals
        the one nearest to the organ's middle; or, without labels, the middle of the scan."""
        cfg, scan, given = self.cfg, self.scan, self.cfg.query or self.cfg.query_mm
        if (cfg.query and cfg.query_mm) or (given and (len(given) != 3 or not configs.numbers(given))):
            raise SystemExit(f"query = {cfg.query}, query_mm = {cfg.query_mm}: expected three numbers, in one of them")
        if given:
            return [("query", None, np.array(given, float) if cfg.query else (np.linalg.inv(scan.affine) @ [*given, 1])[:3])]
        if self.organs is None:
            print(f"{scan.id}: no label and no query, so the point shown is the middle of the scan")
            return [("middle of the scan", None, (np.array(self.grid) // 2 + 0.5) * self.patch - 0.5)]
        ids, purity = self.organs
        asked = list(cfg.figure_organs) or sorted(set(ids.tolist()) - {0})
        lost = [f"organ {k}" for k in asked if k not in ids] or ["an organ"] * (not asked)
        if lost:
            raise SystemExit(f"{scan.id}: no patch of {self.patch} voxels shows {lost[0]} "
                             f"(probe_share = {cfg.probe_share:g}); give a query")
        points = []
        for k in asked:
            away = np.linalg.norm(self.centres - self.centres[ids == k].mean(0), axis=1)
            best = (ids == k) & (purity == purity[ids == k].max())
            points.append((self.name(k), k, self.centres[np.where(best, away, np.inf).argmin()]))
        return points

    def cell(self, point):
        """Token (i, j, k) whose patch holds a point."""
        cell = np.floor((np.asarray(point) + 0.5) / self.patch).astype(int)
        if (cell < 0).any() or (cell >= self.grid).any():
            raise SystemExit(f"query: voxel {np.round(point, 1).tolist()} lies in no patch of {self.scan.id}, "
                             f"they span voxels 0 to {[n * self.patch - 1 for n in self.grid]}")
        return tuple(cell.tolist())

    def encoder(self, file):
        if file not in self.encoders:
            self.encoders[file] = probe.load_encoder(file, self.cfg, self.device)
        takes, holds = self.encoders[file].arguments["in_channels"], self.scan.record["channels"]
        if takes != holds:
            raise SystemExit(f"{file}: takes {takes} channels, {self.scan.id} has {holds}")
        return self.encoders[file]

    def tokens(self, file, moved=False):
        """(c, i, j, k) features of the scan, or of its moved copy; crops overlap by half, so that their edges do not show."""
        if (file, moved) not in self.encoded:
            volume = self.pair["V'"] if moved else torch.from_numpy(np.ascontiguousarray(self.scan.open()))
            self.encoded[file, moved] = probe.encode(self.encoder(file), volume, self.cfg.crop, self.patch, self.device, 0.5)
        return self.encoded[file, moved]

    def similar(self, file, which=None):
        """Blocks (rows, t): similarity of V's tokens, all or `which` (n,), with all of V'."""
        q, k = (rearrange(self.tokens(file, moved), "c i j k -> 1 (i j k) c") for moved in (False, True))
        for rows in (torch.arange(q.shape[1]) if which is None else torch.as_tensor(which)).split(2048):
            yield losses.similarity(q[:, rows], k)[0]

    @functools.cached_property
    def pair(self):
        """V, the whole scan, and V', moved and jittered within the config's ranges, (c, x, y, z); H (4, 4); matches (m, 2), rows
        (i, j) of Eq. 2-3 inside the scan; valid_ (t,): tokens of V' that show the scan; bright (t,): tokens of V above its mean."""
        whole = dataclasses.replace(self.cfg, slab=self.scan.shape, crop=self.scan.shape)
        batch = data.collate([data.Slabs([self.scan], whole, 1, whole.seed).sample(self.scan, np.random.default_rng(whole.seed))])
        V, V_, _ = data.views(batch, whole)
        valid, valid_ = data.tokens_inside(batch, self.grid, self.patch)
        _, i, j = data.matches(batch["H"], self.grid, self.patch).T
        bright = F.avg_pool3d(V[0, :1], self.patch).flatten() > V[0, 0].mean()
        return {"V": V[0], "V'": V_[0], "H": batch["H"][0].numpy(), "valid_": valid_[0], "bright": bright.numpy(),
                "matches": torch.stack([i, j], 1)[valid[0, i] & valid_[0, j]].numpy()}

    def write(self, path, **numbers):
        keys = ("id", "shape", "spacing", "affine")
        run.write_json(path, {key: getattr(self.scan, key) for key in keys} | dict(patch=self.patch, grid=self.grid) | numbers)


def cosine_map(tokens, cell):
    """Cosine similarity (i, j, k) of all tokens (c, i, j, k) with the one at `cell`; 1 the same direction."""
    query = rearrange(tokens[(slice(None), *cell)], "c -> 1 1 c")
    return losses.similarity(query, rearrange(tokens, "c i j k -> 1 (i j k) c")).reshape(tokens.shape[1:]).numpy()


def components(tokens, n=3):
    """First n principal components (i, j, k, n) of tokens (c, i, j, k), and each one's share of the variance (n,). The sign of a
    component is arbitrary: here its largest weight is positive, so that a picture does not change from machine to machine."""
    x = rearrange(tokens, "c i j k -> (i j k) c").double().numpy()
    x = x - x.mean(0)
    values, vectors = (a[..., ::-1] for a in np.linalg.eigh(x.T @ x))
    vectors = vectors[:, :n] * np.sign(vectors[np.abs(vectors[:, :n]).argmax(0), np.arange(n)])
    return (x @ vectors).reshape(*tokens.shape[1:], n), values[:n] / values.sum()


def blank(width, height, title, layout="constrained"):
    from matplotlib.figure import Figure
    figure = Figure((width, height), layout=layout)
    figure.suptitle(title, y=None if layout else 1 - 0.08 / height)
    return figure


def draw_plane(axes, shown, plane, point, volume, look, organ=None, mark=True):
    """One slice in the frame of the scan's voxels, whether `volume` holds voxels or tokens; R, or the front, on the left."""
    from matplotlib.patches import Rectangle
    _, cut, across, up, letters = plane
    shape, p, step = shown.scan.shape, shown.patch, 1 if volume.shape == shown.scan.shape else shown.patch
    channels = rearrange(volume, "i j k c -> c i j k") if volume.ndim == 4 else volume[None]
    picture = np.stack(evaluate.slice_through(plane, np.floor((np.asarray(point) + 0.5) / step).astype(int), *channels), -1)
    end = shape[across] - 0.5                                              # grey where no whole patch fits
    drawn = axes.imshow(picture.squeeze(-1) if volume.ndim == 3 else picture, origin="lower", interpolation="nearest", **look,
                        extent=(end - picture.shape[1] * step, end, -0.5, picture.shape[0] * step - 0.5))
    axes.set(xlim=(-0.5, end), ylim=(-0.5, shape[up] - 0.5), xticks=[], yticks=[], facecolor="0.6")
    axes.set_aspect(shown.scan.spacing[up] / shown.scan.spacing[across])
    if organ is not None:
        mask = evaluate.slice_through(plane, np.floor(np.asarray(point) + 0.5).astype(int), shown.scan.open("label")[0] == organ)[0]
        if mask.any():
            axes.contour(mask, [0.5], colors=["white"], linewidths=0.9)
    if mark:
        x, y = (np.array(shown.cell(point)) * p - 0.5)[[across, up]]
        for colour, line in (("black", 2.6), ("#56B4E9", 1.3)):
            axes.add_patch(Rectangle((shape[across] - 1 - x - p, y), p, p, fill=False, edgecolor=colour, linewidth=line))
    evaluate.draw_letters(axes, letters)
    return drawn


def plane_sheet(path, shown, point, columns, title, organ=None, mark=True):
    """One PNG: a row per plane through `point` (3,) voxels; the scan, then a column per volume, all at one scale in mm.

    columns  (heading, volume, look, unit): tokens (i, j, k) and dict(cmap, vmin, vmax), or colours (i, j, k, 3) in [0, 1] and {}
    organ    id that is outlined where the label has it;   mark: a square on the patch that holds the point
    """
    scan, unit = shown.scan, "z-score" if shown.cfg.intensity == "zscore" else "value (CT: HU)"
    low, high = (0, 1) if unit == "z-score" else shown.cfg.window
    image = scan.open()[0].astype(np.float32) * (high - low) + low
    cuts = [evaluate.slice_through(plane, np.floor(point + 0.5).astype(int), image)[0].ravel() for plane in evaluate.PLANES]
    low, high = np.percentile(np.concatenate(cuts), [1, 99.5])
    columns = [("scan", image, dict(cmap="gray", vmin=low, vmax=high), unit), *columns]
    mm, n = np.array(scan.shape) * scan.spacing, len(columns)
    heights, widest, width = [mm[plane[3]] for plane in evaluate.PLANES], max(mm[plane[2]] for plane in evaluate.PLANES), max(9.0, 1.75 * n)
    head, foot, gap = 0.5 + 0.16 * max(heading.count("\n") + 1 for heading, *_ in columns), 0.55, 0.07      # inches
    scale = min(((width - 0.35) / n - gap) / widest, 9.5 / sum(heights))                                   # inches per mm
    total, left = head + sum(heights) * scale + 3 * gap + foot, 0.35 + (width - 0.35 - n * (widest * scale + gap)) / 2
    figure = blank(width, total, title, None)
    box = lambda x, y, w, h: figure.add_axes((x / width, y / total, w / width, h / total))
    for heading, volume, look, unit in columns:
        top, middle = total - head, (left + widest * scale / 2) / width
        figure.text(middle, (top + 0.05) / total, heading, ha="center", va="bottom")
        for plane, h in zip(evaluate.PLANES, heights):
            w = mm[plane[2]] * scale
            axes = box(left + (widest * scale - w) / 2, top - h * scale, w, h * scale)
            drawn = draw_plane(axes, shown, plane, point, volume, look, organ, mark)
            if heading == "scan":
                name = f"{plane[0]}, {'xyz'[plane[1]]} = {point[plane[1]]:.4g}"
                figure.text((left - 0.05) / width, (top - h * scale / 2) / total, name, rotation=90, ha="right", va="center")
            top -= h * scale + gap
        if look:
            bar = box(left + 0.1, top - 0.1, widest * scale - 0.2, 0.1)
            figure.colorbar(drawn, cax=bar, orientation="horizontal").set_label(unit, labelpad=1)
            bar.locator_params(nbins=4)
        else:
            figure.text(middle, top / total, unit, ha="center", va="top")
        left += widest * scale + gap
    figure.savefig(path)
    return path


def similarity_sheets(shown, out, kind, heads):
    """A sheet per query point: where the scan looks like it to each encoder of {file: heading}, all on one colour scale."""
    made, numbers = [], []
    for name, organ, point in shown.queries:
        maps, mm = {f: cosine_map(shown.tokens(f), shown.cell(point)) for f in heads}, (shown.scan.affine @ [*point, 1])[:3]
        look = dict(cmap="magma", vmin=min(m.min() for m in maps.values()), vmax=1)
        path = out / (f"{kind}_{data.plain_id(name.replace(' ', '_'))}.png" if len(shown.queries) > 1 else f"{kind}.png")
        title = f"Similarity to the marked patch: {name}\nscan {shown.scan.id}, R A S = {', '.join(f'{v:.0f}' for v in mm)} mm"
        columns = [(heads[f], m, look, "cosine similarity") for f, m in maps.items()]
        made.append(plane_sheet(path, shown, point, columns, title, organ))
        numbers.append(dict(name=name, organ=organ, voxel=point, mm=mm, token=shown.cell(point),
                            maps={f: m.round(5) for f, m in maps.items()}))
    shown.write(out / f"{kind}.json", queries=numbers)
    return made


def draw_similarity(shown, out):
    """Fig. 1B: cosine similarity of a query patch with all patches of the scan, a column per encoder."""
    return similarity_sheets(shown, out, "similarity", shown.heads)


def draw_evolution(shown, out):
    """Fig. 7: the same maps from the checkpoints that pre-training kept (its key `keep`), after random weights."""
    folder = Path(shown.cfg.runs) / shown.cfg.name
    kept = {int(path.stem[8:]): str(path) for path in folder.glob("encoder-*.pt") if path.stem[8:].isdigit()}
    if not kept:
        raise NoFigure(f"{folder} holds no encoder-<step>.pt; pre-train with, for instance, --keep=\"(10, 100, 1000)\"")
    if (folder / "encoder.pt").exists():
        kept.setdefault(read_file(folder / "encoder.pt").get("step"), str(folder / "encoder.pt"))
    return similarity_sheets(shown, out, "evolution", {"random": "random weights"} | {kept[n]: f"step {n}" for n in sorted(kept)})


def draw_distribution(shown, out):
    """Fig. 3: similarities of a patch with all of V' and its Sharpe ratio (Eq. 6), for two patches; the map of the ratio over V.

    The two have the highest and the lowest ratio, to the last encoder, of all patches of tissue (of an organ, where there are
    labels) whose true partner is in V'. A query point takes their place.
    """
    scan, pair, usable, numbers = shown.scan, shown.pair, shown.pair["valid_"], []
    sharpe = lambda rows: losses.sharpe_ratio(rows[None], 2, usable[None])[0]
    ratio = {f: torch.cat([sharpe(rows) for rows in shown.similar(f)]).numpy() for f in shown.heads}
    if shown.cfg.query or shown.cfg.query_mm:
        chosen = {"query": int(np.ravel_multi_index(shown.cell(shown.queries[0][2]), shown.grid))}
    else:
        own = pair["bright"] if shown.organs is None else pair["bright"] & (shown.organs[0] > 0)      # a label may hold air
        fit = np.intersect1d(np.flatnonzero(own), pair["matches"][:, 0])
        if not len(fit):
            raise NoFigure("no patch of tissue (of an organ, where there are labels) has its partner in V' after the config's moves")
        last = ratio[list(shown.heads)[-1]][fit]
        chosen = {"highest ratio": int(fit[last.argmax()]), "lowest ratio": int(fit[last.argmin()])}
    figure = blank(9, 2.9 + 2.1 * len(ratio), f"Similarity of a patch of V with the {usable.sum()} patches of V', scan {scan.id}")
    axes = figure.subplots(1 + len(ratio), len(chosen), squeeze=False, height_ratios=[1.4] + [1] * len(ratio))
    image = scan.open()[0].astype(np.float32)
    grey = dict(zip(("vmin", "vmax"), np.percentile(image, [1, 99.5])), cmap="gray")
    for column, (which, t) in zip(axes.T, chosen.items()):
        organ = "" if shown.organs is None or not shown.organs[0][t] else f", {shown.name(shown.organs[0][t])}"
        draw_plane(column[0], shown, evaluate.PLANES[0], shown.centres[t], image, grey)
        column[0].set_title(f"{which}{organ}, axial, z = {shown.centres[t][2]:.4g}")
        for axis, f in zip(column[1:], ratio):
            row, partners = next(shown.similar(f, [t]))[0], pair["matches"][pair["matches"][:, 0] == t][:, 1]
            numbers.append(dict(which=which, encoder=f, token=t, sharpe_ratio=ratio[f][t], true_partners=row[partners].numpy(),
                                similarities=row[usable].numpy().round(5)))
            draw_histogram(axis, row[usable].numpy(), numbers[-1], shown.heads[f])
        axis.set_xlabel("cosine similarity")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(out / "distribution.png")
    look = dict(cmap="viridis", vmin=min(r.min() for r in ratio.values()), vmax=max(r.max() for r in ratio.values()))
    columns = [(shown.heads[f], r.reshape(shown.grid), look, "Sharpe ratio, Eq. 6") for f, r in ratio.items()]
    plane_sheet(out / "distribution_map.png", shown, shown.centres[next(iter(chosen.values()))], columns,
                f"Sharpe ratio of every patch: high, one peak; low, many similar patches\nscan {scan.id}")
    shown.write(out / "distribution.json", H=pair["H"], chosen=numbers,
                sharpe_ratio={f: r.round(5).reshape(shown.grid) for f, r in ratio.items()})
    return [out / "distribution.png", out / "distribution_map.png"]


def draw_histogram(axes, values, number, heading):
    """Counts on a logarithmic axis, so that a peak of one patch is seen beside thousands."""
    true = number["true_partners"]
    axes.hist(values, np.linspace(-1, 1, 81), color="#0072B2", log=True)
    axes.axvline(values.mean(), color="0.2", linewidth=1.2, linestyle=":", label="mean")
    axes.axvline(values.max(), color="#D55E00", linewidth=1.4, label="largest")
    axes.plot(true, [0.62] * len(true), "^", color="#009E73", markersize=8, clip_on=False, label="true partner", zorder=5)
    axes.set(xlim=(-1, 1), ylim=(0.62, None), ylabel="patches")
    ratio = f"({values.max():.2f} {-values.mean():+.2f}) / {values.std():.2f} = {number['sharpe_ratio']:.2f}"
    axes.set_title(f"{heading}: Sharpe ratio {ratio}")


def draw_tsne(shown, out):
    """Fig. 4, 5: t-SNE (perplexity 24, as published) of tokens that show an organ, and every organ's silhouette (Euclidean, as
    published, and cosine), in the labelled scans."""
    manifold, cfg, numbers = evaluate.need("sklearn.manifold", "scikit-learn"), shown.cfg, {}
    labelled = [case for case in shown.cases if case["label"]]
    if not labelled:
        raise NoFigure("the scans have no labels; give image and label, or a datalist")
    scans = data.open_scans(shown.cfg, labelled)
    for f in shown.heads:
        x, y, n = probe.organ_tokens(shown.encoder(f), scans, cfg, shown.device, 0.5)
        kept, organs = probe.thin(y, cfg.seed, cfg.figure_tokens), np.unique(y).tolist()
        if len(organs) < 2 or len(kept) <= 24:
            raise NoFigure(f"{len(kept)} tokens of {len(organs)} organs; more than 24 of two are needed (perplexity 24)")
        flat = manifold.TSNE(2, perplexity=24, init="pca", random_state=cfg.seed).fit_transform(x[kept])
        scores = {metric: probe.silhouette(x, y, metric, cfg.seed, cfg.probe_limit) for metric in ("euclidean", "cosine")}
        numbers[f] = dict(points=flat.round(3), organ=y[kept], scan=n[kept], tokens={k: int((y == k).sum()) for k in organs},
                          silhouette={m: dict(mean=mean, mean_of_organs=metrics.mean(list(each.values())), organs=each)
                                      for m, (mean, each) in scores.items()})
    figure = blank(9, 9, f"Tokens of {shown.patch} voxels that show an organ, {len(scans)} scans; t-SNE, perplexity 24")
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    for axes, (f, number) in zip(above.subplots(1, len(numbers), squeeze=False)[0], numbers.items()):
        for k in organs:
            points = number["points"][number["organ"] == k]
            axes.scatter(*points.T, s=9, color=evaluate.colour_of(k), linewidths=0, label=f"{k} {shown.name(k)}")
            densest = cKDTree(points).query(points, range(1, min(10, len(points)) + 1))[0].mean(1).argmin()
            axes.text(*points[densest], k, weight="bold", ha="center", va="center", zorder=5,
                      bbox=dict(facecolor="white", alpha=0.75, linewidth=0, pad=0.8))
        means = ", ".join(f"{metric} {score['mean']:.3f}" for metric, score in number["silhouette"].items())
        axes.set(xticks=[], yticks=[], title=f"{shown.heads[f]}; silhouette of all tokens:\n{means}")
    above.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=3)
    width = 0.8 / len(numbers)
    for axes, metric in zip(below.subplots(2, 1, sharex=True), ("euclidean", "cosine")):
        for k, (f, number) in enumerate(numbers.items()):
            score = number["silhouette"][metric]
            values = [*score["organs"].values(), score["mean_of_organs"], score["mean"]]
            axes.bar(np.arange(len(values)) + (k + 0.5) * width - 0.4, values, 0.9 * width,
                     color=("0.6", *evaluate.COLOURS[4:])[k % 11], label=shown.heads[f])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(len(organs) - 0.5, color="0.6", linewidth=0.8)
        axes.set_ylabel(f"silhouette, {metric}")
    names = [f"{shown.name(k)} ({count})" for k, count in number["tokens"].items()]
    axes.set_xticks(range(len(organs) + 2), [*names, "mean of organs", "all tokens"], rotation=35, ha="right")
    below.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.draw_without_rendering()                 # the layout of tick labels settles at the second pass
    figure.savefig(out / "tsne.png")
    run.write_json(out / "tsne.json", dict(scans=[s.id for s in scans], names={k: shown.name(k) for k in organs}, encoders=numbers))
    return [out / "tsne.png"]


def draw_pca(shown, out):
    """Fig. 6: first three principal components of a scan's tokens as red, green, blue, and the first alone; central slices."""
    columns, numbers = [], {}
    for f, heading in shown.heads.items():
        values, share = components(shown.tokens(f))
        low, high = np.percentile(values.reshape(-1, 3), [1, 99], axis=0)
        unit = f"{', '.join(f'{s:.0%}' for s in share)}\nof the variance"
        columns.append((f"{heading}\nfirst three as RGB", np.clip((values - low) / (high - low), 0, 1), {}, unit))
        look = dict(cmap="cividis", vmin=low[0], vmax=high[0])
        columns.append((f"{heading}\nfirst alone", values[..., 0], look, "component 1"))
        numbers[f] = dict(share_of_variance=share, components=values.round(5))
    middle = (np.array(shown.grid) // 2 + 0.5) * shown.patch - 0.5
    plane_sheet(out / "pca.png", shown, middle, columns, f"Principal components of the tokens\nscan {shown.scan.id}", mark=False)
    shown.write(out / "pca.json", encoders=numbers)
    return [out / "pca.png"]


def draw_correspondence(shown, out):
    """V, V' and lines between the centres of matched patches: above the true ones (Eq. 2-3), below each encoder's most similar.

    V is cut at the layer of patches with most matches. V' is shown on the surface to which H sends that plane, seen along z: so
    the same tissue lies under both ends of a true line, and where H, warp and the matches disagree, it does not.
    """
    scan, pair, centres, numbers = shown.scan, shown.pair, shown.centres, {}
    everyone, first = np.unique(pair["matches"][:, 0], return_index=True)
    i, j = pair["matches"][first][pair["bright"][everyone]].T
    back = np.linalg.inv(pair["H"])
    if not len(i) or abs(back[2, 2]) < 0.3:
        raise NoFigure("the config's moves leave no match of tissue, or put the axial plane on edge; try another seed or less rotation")
    layers, counts = np.unique(centres[i, 2], return_counts=True)
    layer = layers[counts.argmax()]
    i, j = i[centres[i, 2] == layer], j[centres[i, 2] == layer]
    few = np.linspace(len(i) - 1, 0, min(10, len(i))).astype(int)          # tokens are ordered by x: spread from left to right
    i, j = i[few], j[few]
    rows = [("true partners (Eq. 2-3); dotted: the patch of V as H moves it", j, None)]
    for f, heading in shown.heads.items():
        nearest = [block.masked_fill(~pair["valid_"], -2).argmax(1) for block in shown.similar(f, everyone)]
        guess = dict(zip(everyone.tolist(), torch.cat(nearest).tolist()))
        right = {a for a, b in pair["matches"].tolist() if guess[a] == b}
        numbers[f] = dict(predicted=[guess[a] for a in i.tolist()], right=len(right), matched=len(everyone))
        text = f"most similar, {heading}: {len(right)} of all {len(everyone)} matched patches right"
        rows.append((f"{text} (dashed: wrong, by so many mm)", numbers[f]["predicted"], [a in right for a in i.tolist()]))
    cuts = [surface(pair[name][0].numpy(), G, layer) for name, G in (("V", np.eye(4)), ("V'", back))]
    tall = min(4.2 * scan.shape[1] * scan.spacing[1] / (scan.shape[0] * scan.spacing[0]), 3.6)     # inches
    title = f"Patches of {shown.patch} voxels, scan {scan.id}: V (left, axial, z = {layer:.4g}) and V' (right)"
    figure = blank(9, 0.4 + (tall + 0.3) * len(rows), title)
    for part, (heading, partner, right) in zip(figure.subfigures(len(rows), 1), rows):
        part.suptitle(heading, fontsize=9)
        both = part.subplots(1, 2, gridspec_kw=dict(wspace=0.1))
        for axes, cut in zip(both, cuts):
            low, high = np.percentile(cut, [1, 99.5])
            axes.imshow(cut, cmap="gray", origin="lower", interpolation="bilinear", vmin=low, vmax=high)
            axes.set(xlim=(-0.5, scan.shape[0] - 0.5), ylim=(-0.5, scan.shape[1] - 0.5), xticks=[], yticks=[])
            axes.set_aspect(scan.spacing[1] / scan.spacing[0])
            evaluate.draw_letters(axes, evaluate.PLANES[0][4])
        draw_lines(part, both, shown, centres[i], centres[partner], centres[j], right)
    figure.savefig(out / "correspondence.png")
    shown.write(out / "correspondence.json", H=pair["H"], i=i, true=j, encoders=numbers)
    return [out / "correspondence.png"]


def surface(volume, G, z):
    """Picture (up, across), the patient's right on the left, of `volume` (x, y, z) where G (4, 4) sends it into the plane `z`."""
    x, y = np.meshgrid(*map(np.arange, volume.shape[:2]), indexing="ij")
    height = (z - G[2, 3] - G[2, 0] * x - G[2, 1] * y) / G[2, 2]
    return rearrange(ndimage.map_coordinates(volume, [x, y, height], order=1, cval=float(volume.min())), "x y -> y x")[:, ::-1]


def draw_lines(figure, both, shown, start, end, true, right):
    """Numbered patches in V and V' with lines between. right None: the true ones, with the outline to which H moves the patch;
    else those that are not right are dashed, with their distance from the true partner."""
    from matplotlib.patches import ConnectionPatch, Polygon, Rectangle
    from matplotlib.patheffects import withStroke
    p, H, flip, text = shown.patch, shown.pair["H"], shown.scan.shape[0] - 1, dict(path_effects=[withStroke(linewidth=2.2, foreground="black")])
    corners = np.array([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)]) * p / 2
    bright = [c for c in evaluate.COLOURS if c not in ("#0072B2", "#882255", "#332288", "#999933")]     # ten that show on black
    for n, (a, b, t) in enumerate(zip(start, end, true)):
        fine = right is None or right[n]
        colour = bright[n] if right is None else "#56B4E9" if fine else "#E69F00"
        ends = [(flip - c[0], c[1]) for c in (a, b)]
        for axes, (x, y) in zip(both, ends):
            axes.add_patch(Rectangle((x - p / 2, y - p / 2), p, p, fill=False, edgecolor=colour, linewidth=1.4, clip_on=False))
            axes.text(x - 0.4 * p, y + 0.4 * p, n + 1, color=colour, size=8, ha="left", va="top", weight="bold", **text)
        figure.add_artist(ConnectionPatch(*ends, "data", "data", axesA=both[0], axesB=both[1], color=colour, linewidth=1.1,
                                          linestyle="-" if fine else "--"))
        if right is None:
            moved = ((a + corners) @ H[:3, :3].T + H[:3, 3])[:, :2] * (-1, 1) + (flip, 0)
            both[1].add_patch(Polygon(moved, fill=False, edgecolor="white", linewidth=1, linestyle=":"))
        if not fine:
            off = np.linalg.norm((b - t) * shown.scan.spacing)
            axes.text(x, y - 0.6 * p, f"{off:.0f} mm", color=colour, size=7, ha="center", va="top", clip_on=True, **text)


def draw_curves(shown, out):
    """What log.jsonl tells: of a pre-training losses, matching accuracy, feature spread and learning rate; of a fine-tuning loss,
    validation, learning rate and gradient norm."""
    path = Path(shown.cfg.runs) / shown.cfg.name / "log.jsonl"
    if not path.exists():
        raise NoFigure(f"{path}: no such log")
    lines = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]     # the last may be half
    panels = [("losses", "loss", {"loss": "sum", "global": "L_g", "p2p": "L_p2p", "p2s": "L_p2s"}),
              ("matching accuracy", "share of matched tokens", {"accuracy": ""}),
              ("feature spread", "0 collapsed, 1 apart", {"spread": ""}),
              ("validation", next((line["metric"] for line in lines if "metric" in line), ""), {"val": ""}),
              ("learning rate", "learning rate", {"lr": ""}), ("gradient norm", "gradient norm", {"grad_norm": ""})]
    curves = {key: [[line[k] for line in lines if key in line] for k in ("step", key)]
              for _, _, keys in panels for key in keys if any(key in line for line in lines)}
    if not curves:
        raise NoFigure(f"{path} holds no logged step")
    figure = blank(9, 6, f"{shown.cfg.name}, {lines[-1]['step']} steps")
    for axes, (title, unit, keys) in zip(figure.subplots(2, 2).flat, [panel for panel in panels if set(panel[2]) & set(curves)]):
        for (key, text), colour, dash in zip(keys.items(), ("black", "#E69F00", "#0072B2", "#D55E00"), ("-", "--", "-", "-.")):
            if key in curves:
                axes.plot(*curves[key], color=colour, linestyle=dash, marker="." if len(curves[key][0]) < 40 else "", linewidth=1.6, label=text)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(color="0.9")
        if "p2p" in keys and "p2p" in curves:
            axes.legend(ncols=4, loc="upper center")
        if title != "validation":
            axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    figure.savefig(out / "curves.png")
    run.write_json(out / "curves.json", dict(log=str(path), curves=curves))
    return [out / "curves.png"]


FIGURES = {"similarity": draw_similarity, "distribution": draw_distribution, "tsne": draw_tsne, "pca": draw_pca,
           "correspondence": draw_correspondence, "evolution": draw_evolution, "curves": draw_curves}


def figures(cfg, device):
    """The pictures that cfg.figures names, below <out>/figures. What cannot be made: left out of "all", an error by name."""
    asked = [name.strip() for name in (cfg.figures.split(",") if isinstance(cfg.figures, str) else cfg.figures)]
    unknown = [name for name in asked if name not in (*FIGURES, "all")]
    if unknown:
        raise SystemExit(f"figures: no {unknown[0]!r}; there are: all, {', '.join(FIGURES)}")
    if cfg.token_patch not in (2, 4, 8, 16, 32):
        raise SystemExit(f"token_patch = {cfg.token_patch}, expected 2, 4, 8, 16 or 32")
    shown, out = Shown(cfg, device), Path(cfg.out or Path(cfg.runs) / cfg.name) / "figures"
    out.mkdir(parents=True, exist_ok=True)
    with evaluate.need("matplotlib", "matplotlib").rc_context(STYLE):
        for name in FIGURES if "all" in asked else asked:
            try:
                print(f"{name}: {', '.join(map(str, FIGURES[name](shown, out)))}")
            except NoFigure as reason:
                if "all" not in asked:
                    raise SystemExit(f"{name}: {reason}") from None
                print(f"{name}: left out, {reason}")


def main(argv):
    cfg = probe.load(Config, argv)
    figures(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main(sys.argv[1:])
