"""A config for scans that the project has never seen: `python data.py --plan="my_ct/*.nii.gz"`.

Reads all headers and the voxels of a few scans, and writes configs/<folder>.py, every choice with its reason
and what it is unsure of; then measures a step of it on this machine (--time=False leaves that out). Nothing
that it writes is final: it is a file of plain assignments.
"""
import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import configs
import data
import volumes
from run import program


@dataclasses.dataclass
class Config:
    plan: str | tuple = ()          # glob patterns below the data root ("ct/*/": DICOM folders), or a folder
    exclude: str | tuple = ()       # ids, or patterns of them, that are no scans, e.g. "*mask*"
    data: str = "data"              # root of the patterns; or S2DC_DATA, or where the pattern fits from here
    out: str = ""                   # the config, default configs/<folder of the first pattern>.py
    look: int = 8                   # scans whose voxels are read, drawn at random
    time: bool = True               # measure memory and seconds of a step


def main(argv):
    cfg = configs.load(Config, argv)
    patterns, root = rooted(cfg)
    out = Path(cfg.out or f"configs/{plain_name(patterns[0], root)}.py")
    if out.exists():
        raise SystemExit(f"{out}: there is such a config already; give --out=another.py")
    cases = data.find_cases(data.Config(data=str(root), scans=patterns, exclude=cfg.exclude))
    headers, broken = looked_at(cases)
    samples = drawn(headers, cfg.look, broken)
    if not samples:
        raise SystemExit(f"none of the {len(cases)} scans can be read")
    refuse_mixtures(samples)
    text = written(out, root, patterns, [*headers.values()], samples)
    if left_out := (*data.several(cfg.exclude), *broken):
        text += f"exclude = {left_out}" + f"    # the last {len(broken)} cannot be read" * bool(broken) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    with configs.replacing(out) as aside:
        aside.write_text(text)
    print(text)
    elsewhere = Path(os.environ.get("S2DC_DATA") or root).resolve() != root.resolve()
    print(f"written: {out}; next: python data.py {out}"
          + f" --data={root}, for S2DC_DATA goes before the config's `data`" * elsewhere)
    if cfg.time:
        print(timed(out, root, [s["path"] for s in samples[:2]]))


def rooted(cfg):
    """Patterns below a root, and that root: cfg.data, or the folder in which they fit as they stand."""
    root, patterns = Path(cfg.data), []
    for pattern in data.several(cfg.plan):
        folder = next((p for p in (root / pattern, Path(pattern)) if p.is_dir()), None)
        patterns += endings(pattern.rstrip("/"), folder) if folder else [pattern]
    if not patterns:
        raise SystemExit("plan = (): expected a folder of scans, or a pattern as in 'my_ct/*.nii.gz'")
    if not all(p[0] != "/" and any(root.glob(re.sub(r"\{\w+\}", "*", p.rstrip("/")))) for p in patterns):
        heads = []
        for pattern in patterns:
            fixed = Path(re.split(r"[{*?\[]", pattern)[0])
            heads.append(fixed if pattern.startswith(f"{fixed}/") and str(fixed) != pattern.rstrip("/")
                         else fixed.parent)
            if not heads[-1].is_dir():
                raise SystemExit(f"plan = {pattern!r}: found neither below {cfg.data} nor from here")
        if len({head.is_absolute() for head in heads}) > 1:
            heads = [Path(os.path.abspath(head)) for head in heads]
        root = Path(os.path.commonpath([head.parent for head in heads]))
        patterns = [os.path.relpath(p, root) + "/" * p.endswith("/") for p in patterns]
    return tuple(patterns), root


def endings(pattern, folder):
    """Patterns of what lies in a folder: volumes by their ending, in it or one folder deeper, else DICOM
    folders, else itself as one."""
    ends = "*.nii", "*.nii.gz", "*.mha", "*.mhd", "*.nrrd"
    within = [end for end in ends if any(folder.glob(end))]
    within = within or [f"*/{end}" for end in ends if any(folder.glob(f"*/{end}"))]
    within = within or ["*/"] * any(path.is_dir() for path in folder.iterdir()) or [""]
    return [f"{glob.escape(pattern)}/{end}" for end in within]


def plain_name(pattern, root):
    """A name for the config from the folders of a pattern, or of its root."""
    parts = [part for part in Path(pattern).parts[:-1] if not re.search(r"[*?\[{]", part)]
    own = [part for part in parts if not part.startswith(("images", "labels"))]     # folders of any data set
    above = [root.name] * bool(root.name and root.name != "data")
    return re.sub(r"\W+", "_", [*own[:1], *above, *parts, "my_scans"][0].lower())


def looked_at(cases):
    """{id: (path, shape, spacing)} of the cases, RAS+, from their headers, [ids] of what is no scan."""
    headers, broken = {}, []
    for case in cases:
        try:
            headers[case["id"]] = case["images"][0], *volumes.read_header(case["images"][0])
        except data.VolumeError as error:
            print(f"unusable  {error}")
            broken.append(case["id"])
    return headers, broken


def drawn(headers, look, broken):
    """What is `described` of `look` scans, drawn at random for kinds may alternate by name; whose voxels are
    broken goes from `headers` to `broken`, and another is drawn."""
    samples, names = [], list(headers)
    for k in np.random.default_rng(0).permutation(len(names)):
        if len(samples) < look:
            try:
                samples.append(described(headers[names[k]][0]))
            except data.VolumeError as error:                       # its header was fine
                print(f"unusable  {error}")
                broken.append(names[k])
                del headers[names[k]]
    return sorted(samples, key=lambda s: s["path"])


def described(path):
    """What the voxels of one scan say: few_values of a label map, least, largest, bright (99.9th percentile),
    tail (that of its tissue over the 90th), and box, the share along x y z that its tissue takes."""
    voxels, _, _ = data.read_volume(path)
    few = voxels[::2, ::2, ::2]
    low, high, bright = np.percentile(few, [2, 98, 99.9])
    threshold = low + 0.1 * (high - low)
    tissue = few[few > threshold] if few.max() > threshold else voxels
    most, nearly = np.percentile(tissue, [99.9, 90])
    body = voxels > (max(threshold, -500) if low < -500 else threshold)
    along = [np.flatnonzero(body.any(axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    box = [(np.ptp(places) + 1) / n if len(places) else 1.0 for places, n in zip(along, voxels.shape)]
    tail = float(most / max(nearly, 1e-6))
    return dict(path=str(path), few_values=volumes.few_values(voxels), least=float(few.min()),
                largest=float(few.max()), bright=float(bright), tail=tail, box=box)


def refuse_mixtures(samples):
    """Exit where label maps are among the scans, or CT among others: no one rule fits their values."""
    for s in samples:
        if s["few_values"]:
            raise SystemExit(f"{s['path']}: holds {s['few_values']} values, all whole: a label map? Give a "
                             "pattern that fits scans alone, or --exclude of such ids, as --exclude='*mask*'")
    ct = [s for s in samples if modality_of([s])[0] == "CT"]
    others = [s for s in samples if modality_of([s])[0] != "CT"]
    if others and any(s["least"] <= -500 for s in ct):
        a, b = ct[0], others[0]
        raise SystemExit(f"{a['path']}: values from {a['least']:.4g}, as of CT, but {b['path']}: from "
                         f"{b['least']:.4g}, as of no CT ({len(ct)} and {len(others)} of {len(samples)} "
                         "scans); plan them apart and join them by `rules` (configs/sarcoma_pretrain_all.py)")


def modality_of(samples):
    """("CT", "MRI" or "PET", why, what is unsure)."""
    keys = "least", "largest", "tail"
    least, largest, tail = (float(np.median([s[key] for s in samples])) for key in keys)
    values = f"values from {least:.4g} to {largest:.4g}"
    if least <= -500:
        strange = "PET in Bq/ml with noise below 0?" * (largest > 5000) or "phases of MRI?" * (least < -3500)
        return "CT", f"{values}: Hounsfield units", strange
    # noise and interpolation push MRI and PET a little below 0, z-scores lie within some tens
    if least < -20 and least < -0.02 * largest and largest > 100:
        return "CT", values, "CT cut off below? Of MRI or PET, intensity and foreground would be wrong"
    unsure = [f"PET or MRI: the tail of {tail:.1f} is near the border of 2.2"] if 1.7 < tail < 2.8 else []
    if least < 0:
        unsure.append("values below 0 that are no CT's; scaled already? Then `foreground` cuts tissue away")
    if least >= 0 and 2000 <= largest <= 5000:
        unsure.append("CT that is stored without its offset has such values, too")
    kinds = [modality_of([s])[0] for s in samples] if len(samples) > 1 else []
    if len(set(kinds)) > 1:
        unsure.append("scan by scan " + ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds))))
    unsure = "; ".join(unsure)
    said = f"{values}, the 99.9th percentile of tissue {tail:.1f} times its 90th"
    if tail > 2.2:
        return "PET", f"{said}: hot spots", unsure
    return "MRI", f"{said}: no hot spots (nor has PET of the brain)", unsure


def sizes(boxes):
    """slab, crop and the share of the slab that boxes (n, 3) in voxels fill."""
    median = np.median(boxes, axis=0)
    for edge in (96, 64):
        crop = np.array([edge] * 3)
        slab = np.minimum(np.maximum(np.floor(median / edge), 1) * edge, [384, 384, 192]).astype(int)
        share = float((np.minimum(boxes, slab) / slab).prod(1).mean())
        if share > 0.6:
            break
    return tuple(slab.tolist()), tuple(crop.tolist()), share


def intensity_of(modality, bright):
    """Lines of the config on what a value means; bright: what but a thousandth of the voxels lie below."""
    if modality == "CT":
        return ['intensity = "window"            # CT has an absolute unit',
                "window = (-1000.0, 1000.0)      # HU; for soft tissue alone (-175.0, 250.0)",
                "foreground = -500.0             # HU, body against air"]
    if modality == "MRI":
        return ['intensity = "zscore"            # MRI has no unit',
                'zscore_over = "robust"          # of the foreground, without its extremes',
                "foreground = 0.0                # what lies at 0 or below is cut away and not counted"]
    unit, high = ("SUV", 5.0) if bright < 100 else ("Bq/ml", float(f"{bright:.1g}"))
    said = "the 99.9th percentile" if unit == "Bq/ml" else f"of which {bright:.3g} is the 99.9th percentile"
    doubt = [f"# UNSURE: {bright:.3g} is little for Bq/ml, much for SUV"] if 30 < bright < 1000 else []
    return [*doubt, 'intensity = "scale"             # keeps the unit and clips nothing',
            f"window = (0.0, {high})            # what becomes 0 and 1; {unit}, {said}", "foreground = 0.0"]


SMALL = """\
# no GPU here: a smaller network than the paper's (feature_size 48, num_heads 3 6 12 24), or it takes weeks
feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4
hidden = 256
embedding = 64
momentum = 0.99                 # the teacher of a short run has to follow faster
steps = 1000
warmup = 100
lr = 1e-3
save_every = 100"""


def written(out, root, patterns, headers, samples):
    """The text of the config."""
    name = out.stem
    shapes, spacings = (np.array([header[k] for header in headers]) for k in (1, 2))
    body = shapes * spacings * np.mean([s["box"] for s in samples], axis=0)     # mm
    modality, why, unsure = modality_of(samples)
    middle, spread = np.median(spacings, axis=0), (spacings.max(0) / spacings.min(0)).max()
    shown = ", ".join(f"{a:.3g} to {b:.3g}" for a, b in zip(spacings.min(0), spacings.max(0)))
    finer = np.minimum(middle, np.median(body, axis=0) / 64)
    spacing, reason = "()", "each scan's own: they are alike"
    if spread > 1.5 or (finer < middle).any():
        spacing = tuple(float(f"{v:.3g}") for v in finer)
        reason = "the median" if spread > 1.5 else "finer than the scans' own"
        if (finer < middle).any():
            reason += ", small enough for a crop of 64 to be filled"
    boxes = body / (spacings if spacing == "()" else finer)
    slab, crop, share = sizes(boxes)
    size = " x ".join(f"{v:.0f}" for v in np.median(boxes, axis=0))
    lines = [f'"""{len(headers)} scans, planned from their headers and the voxels of {len(samples)}.', "",
             f"    python data.py {out}       checks all, fills the cache",
             f"    python pretrain.py {out}", '"""', f"# {modality}: {why}",
             *([f"# UNSURE: {unsure}"] if unsure else []), f"name = {name!r}", f"dataset = {name!r}",
             f"data = {str(root)!r}", f"scans = {patterns!r}",
             *intensity_of(modality, float(np.median([s["bright"] for s in samples]))),
             f"# mm along x y z: {shown}", f"spacing = {spacing}     # {reason}",
             f"# the median body is {size} voxels; bodies fill {share:.0%} of the slab",
             *(["# UNSURE: that is little, the rest is padding"] if share < 0.5 else []),
             f"slab = {slab}", f"fill_share = {min(0.3, round(0.8 * share, 2))}", f"crop = {crop}",
             f"token_patch = 8                 # {np.prod(slab) // 8 ** 3} tokens; larger ones taught less",
             f"shift = {tuple(round(n / 16, 1) for n in slab)}       # voxels; a sixteenth of the slab",
             "# UNSURE: flips are off, for sides have names; and are the scans tilted more than `rotation`?",
             *([] if torch.cuda.is_available() else [SMALL]),
             "batch = 2                       # L_g tells a crop from the others of the step"]
    return "\n".join(lines) + "\n"


def timed(config, root, files):
    """A line on memory and seconds of a step, of two scans in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        scans = tuple(glob.escape(os.path.relpath(file, root)) + "/" * Path(file).is_dir() for file in files)
        command = [sys.executable, str(Path(__file__).with_name("pretrain.py")), str(config),
                   f"--scans={scans!r}", f"--data={root}", "--exclude=()", "--fill_share=0",
                   f"--runs={folder}", f"--cache={folder}/cache", "--name=plan", "--steps=3", "--warmup=1",
                   "--log_every=1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"a step could not be measured: {done.stderr.strip().splitlines()[-1]}"
        lines = [json.loads(line) for line in Path(folder, "plan/log.jsonl").read_text().splitlines()]
        last = lines[-1]
    batch = int(re.search(r"^batch = (\d+)", Path(config).read_text(), re.MULTILINE)[1])
    return f"a step takes {batch / last['slabs_per_s']:.1f} s and {last['memory_gb']:.2f} GB on this machine"


if __name__ == "__main__":
    program(main)
