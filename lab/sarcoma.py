"""Soft-tissue sarcomas in CT, T1 and FDG PET: a public set of real scans, made a benchmark of segmentation.

    git clone --depth 1 https://github.com/theibsi/data_sets
    python -m lab.sarcoma data_sets data/sarcoma          or data_sets/ibsi_validation

    ct/ t1/ pet/    imagesTr/sts_001.nii.gz, labelsTr/sts_001.nii.gz, dataset.json: CT in HU, T1 with fat near
                    1000, PET in SUV; masks uint8, 1 tumour (GTV_Mass)
    multi/          sts_001_{t1,ct,pet,label}.nii.gz on the grid of T1: linear, outside the scan's least value
    t1_ct/          sts_010_{t1,ct}.nii.gz on the lattice that both share, of the patients where they fit
    split.json, pairs.json (what modalities have in common), floors.json

The source cut its scans 5 cm around the tumour, so the box alone tells where it lies: an ellipsoid in it has
Dice .70 on CT. Here every scan is trimmed by margins that follow from the patient's number: `world_box`. What
the box still tells, or a threshold on PET, is measured on the files: these floors any score has to beat.

Licence CC BY 3.0; prepared by Alex Zwanenburg with MIRP; TCIA forbids any attempt to identify a patient. Cite
    Vallieres, Freeman, Skamene, El Naqa (2015). A radiomics model from joint FDG-PET and MRI texture features
        for the prediction of lung metastases in soft-tissue sarcomas of the extremities. The Cancer Imaging
        Archive, doi 10.7937/K9/TCIA.2015.7GO2GSKS; Phys. Med. Biol., doi 10.1088/0031-9155/60/14/5471
    Clark et al. (2013). The Cancer Imaging Archive (TCIA). J. Digital Imaging, doi 10.1007/s10278-013-9622-7
"""
import argparse
import gzip
import itertools
import re
from collections import namedtuple
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from configs import replacing
from configs import sarcoma_t1_ct as recipe
from metrics import dice_regions, mae, psnr
from run import program, write_json
from volumes import VolumeError, read_stored, spacing_of, stretch

FILES = {"ct": "CT", "t1": "MR_T1", "pet": "PET"}       # modality: how the source names its files
PARTS = {"test": "001 004 008 012 018 024 026 031 034 036 042 044 048 050".split(),
         "val": "003 022 041".split(),
         "reserved": "005 014 017 019 028 033 040 043 045 046".split()}         # in no list; all others train
# Scans of training patients that the source has and the tables of RESULTS.md were measured without
LEFT_OUT = {"ct": "007 009 011 013 016 020 021 027 030 037 039 049".split(), "t1": ["009", "020"], "pet": []}
RIM = 50.0                      # mm around the tumour in the source
Scan = namedtuple("Scan", "voxels mask affine")  # (x, y, z) float32 as stored; bool; (4, 4) to mm RAS


def part(number):
    return next((name for name, numbers in PARTS.items() if number in numbers), "train")


def source_folder(source):
    """The folder of STS_001 .. in a clone, or in its ibsi_validation."""
    tried = [Path(source, below) for below in ("ibsi_validation/nifti", "nifti", ".")]
    for folder in tried:
        if next(folder.glob("STS_*"), None):
            return folder
    raise SystemExit(f"{source}: no STS_*/ in {', '.join(map(str, tried))}; expected theibsi/data_sets")


def read_scan(image, label):
    """Raises VolumeError, one line, for a file that is missing or unusable."""
    voxels, affine = read_stored(image)
    mask, mask_affine = read_stored(label, label=True)
    if mask.shape != voxels.shape or not np.allclose(mask_affine, affine, atol=0.02):
        raise VolumeError(f"{label}: lies on another grid than {image.name}")
    if not np.isin(mask, (0, 1)).all() or not mask.any():
        raise VolumeError(f"{label}: expected voxels of 0 and of 1, found {np.unique(mask)[:4].tolist()}")
    return Scan(voxels, mask > 0, affine)


def read_all(folder, everything=False):
    """{number: {modality: Scan}} without the reserved and LEFT_OUT, or with it. A training patient may have
    no image and no mask of a modality; anything else that is missing or unusable ends the program, with a
    line each."""
    there = {path.name[4:] for path in folder.iterdir() if re.fullmatch(r"STS_\d{3}", path.name)}
    patients, wrong = {}, []
    for number in sorted((there | {*PARTS["test"], *PARTS["val"]}) - {*PARTS["reserved"]}):
        patients[number] = {}
        for modality, name in FILES.items():
            pair = [folder / f"STS_{number}" / f"{name}_{kind}.nii.gz" for kind in ("image", "mask")]
            if part(number) == "train" and not any(path.exists() for path in pair):
                continue
            if number in LEFT_OUT[modality] and not everything:
                continue
            try:
                patients[number][modality] = read_scan(*pair)
            except VolumeError as error:
                wrong.append(str(error))
    train = {modality for number, scans in patients.items() if part(number) == "train" for modality in scans}
    wrong += [f"{folder}: no usable {FILES[m]}_image of a training patient" for m in FILES if m not in train]
    if wrong:
        raise SystemExit("\n".join([*wrong, f"{len(wrong)} missing or unusable; nothing was written"]))
    return patients


def margins(number):
    """(2, 3) mm off low and high end of the axes right, front, head: 0 to RIM, of the number alone."""
    return np.random.default_rng(int(number)).uniform(0, RIM, (2, 3))


def corners(ranges, matrix):
    """(8, 3) corners of a box, three ranges (low, high), sent through a matrix (4, 4)."""
    return (np.array(list(itertools.product(*ranges, [1]))) @ matrix.T)[:, :3]


def world_box(number, scans):
    """(2, 3) mm in RAS: the box to which all scans of a patient are cut, as far as they reach.

    Each side lies RIM - margin (0 to 5 cm) beyond the tumour, from the outer edges of the voxels that any
    modality marks: the tumour is never cut, and a scan that the source cut at 5 cm is trimmed by the margin.
    One that ends nearer to the tumour (T1's field of view, a last slice) keeps its end.
    """
    edges = []
    for scan in scans.values():
        box = ndimage.find_objects(scan.mask.astype(np.uint8))[0]
        edges.append(corners([(s.start - 0.5, s.stop - 0.5) for s in box], scan.affine))
    low, high = RIM - margins(number)
    return np.stack([np.min(edges, (0, 1)) - low, np.max(edges, (0, 1)) + high])


def trim(scan, box):
    """The voxels whose centres lie in the box (2, 3) mm; of an oblique scan, the block around them."""
    inside = corners(box.T, np.linalg.inv(scan.affine))
    low = np.maximum(np.ceil(inside.min(0) - 1e-3), 0).astype(int)
    high = np.minimum(np.floor(inside.max(0) + 1e-3) + 1, scan.mask.shape).astype(int)
    return cut(scan, low, high)


def cut(scan, low, high):
    """The voxels from low to high, with the affine that leaves each where it was."""
    box, affine = tuple(map(slice, low, high)), scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    return scan._replace(voxels=scan.voxels[box], mask=scan.mask[box], affine=affine)


def onto(volume, affine, scan, order, fill):
    """`volume` (x, y, z) at the voxels of another scan, `fill` outside; order 1 linear, 0 nearest."""
    move = np.linalg.inv(affine) @ scan.affine
    matrix, offset = move[:3, :3].round(6), move[:3, 3].round(3)    # or headers' rounding loses the border
    return ndimage.affine_transform(volume, matrix, offset, scan.mask.shape, None, order, "constant", fill)


def agreement(scans):
    """{"t1_ct": Dice of the two masks in the world, ..}, on the grid of the first by nearest neighbour."""
    dice = {}
    for a, b in itertools.combinations([m for m in ("t1", "ct", "pet") if m in scans], 2):
        moved = onto(scans[b].mask.astype(np.uint8), scans[b].affine, scans[a], 0, 0)
        dice[f"{a}_{b}"] = dice_regions(moved[None] > 0, scans[a].mask[None])[0]
    return dice


def lattice_offset(t1, ct):
    """(3,) voxels from CT's first voxel to T1's, or None where the two do not share a lattice."""
    move = np.linalg.inv(ct.affine) @ t1.affine
    offset = move[:3, 3].round().astype(int)
    same = np.allclose(move[:3, :3], np.eye(3), atol=1e-4) and np.abs(move[:3, 3] - offset).max() < 0.05
    return offset if same else None


def fit(t1, ct, reach=np.array([10, 10, 2]), bins=32):
    """{fits, why, shift_voxels, shift_mm}: how far T1 has to be moved along its stored axes to lie on CT.

    By the shift, up to reach, with most mutual information of T1 (0 to 1280) and CT (-250 to 250 HU), every
    second voxel in plane. They fit when it is at most a voxel along each axis: 1 mm in plane and a slice.
    """
    offset = lattice_offset(t1, ct)
    if offset is None:
        return dict(fits=False, why="not on one lattice")
    low = np.maximum(np.maximum(offset, 0), reach)
    high = np.minimum(offset + t1.mask.shape, ct.mask.shape - reach)
    if min(high - low) < 8:
        return dict(fits=False, why="too little in common")

    def levels(voxels, least, most, start):
        box = tuple(map(slice, low - start, high - start, (2, 2, 1)))
        return (np.clip((voxels[box] - least) / (most - least), 0, 0.999) * bins).astype(np.int64)
    ours, information = levels(t1.voxels, 0, 1280, offset) * bins, {}
    for shift in itertools.product(*[range(-r, r + 1) for r in reach]):
        pairs = (ours + levels(ct.voxels, -250, 250, -np.array(shift))).ravel()
        p = np.bincount(pairs, minlength=bins * bins).reshape(bins, bins) / pairs.size
        apart = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
        information[shift] = (p[p > 0] * np.log(p[p > 0] / apart[p > 0])).sum()
    best = np.array(max(information, key=information.get))
    mm = float(np.linalg.norm(best * spacing_of(t1.affine)))
    why = f"{'at least ' if any(abs(best) == reach) else ''}{mm:.1f} mm apart"
    return dict(fits=bool(abs(best).max() <= 1), why=why, shift_voxels=best, shift_mm=mm)


def ellipsoid(scan, less, mean):
    """In the box, to its voxels' outer edges, less some mm a side; no box left: nothing is marked, Dice 0."""
    shape, size = scan.mask.shape, scan.mask.shape * spacing_of(scan.affine)
    radii = size / 2 - less
    if min(radii) <= 0:
        return np.zeros(shape, bool)
    x, y, z = np.ix_(*[((np.arange(n) + 0.5) / n - 0.5) * s / r for n, s, r in zip(shape, size, radii)])
    return x ** 2 + y ** 2 + z ** 2 <= 1


def above(scan, value, mean, share=False, largest=False):
    """From a value or a share of the scan's maximum; all of it or its largest component (faces touching)."""
    mask = scan.voxels >= (value * scan.voxels.max() if share else value)
    parts, count = ndimage.label(mask) if largest else (mask, 0)
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax() if count else mask


def measure(modality, train, test):
    """[{floor, value, dice, n, each}] of {id: Scan}: what guesses from the box score, and on PET a threshold.
    `value`, of each floor's range, has the best mean Dice on train; `dice` is the mean over test."""
    mean = np.mean([stretch(scan.mask.astype(np.float32), (32, 32, 32), 1) for scan in train.values()], 0)
    means = {i: stretch(mean, scan.mask.shape, 1) for i, scan in (train | test).items()}
    ways = {"ellipsoid in the box less 50 mm": (ellipsoid, [RIM]),
            "ellipsoid in the box less .. mm": (ellipsoid, np.arange(21) * 2.5),
            "mean training mask from": (lambda scan, level, mean: mean >= level, np.arange(1, 20) / 20)}
    for name, one in (("", False), (", largest part", True)) if modality == "pet" else ():
        ways[f"SUV from{name}"] = partial(above, largest=one), np.arange(1, 81) / 4
        ways[f"share of maximum from{name}"] = partial(above, share=True, largest=one), np.arange(1, 50) / 50
    rows = []
    for name, (predict, values) in ways.items():
        def dice(scans, value):
            return {i: dice_regions(predict(scan, value, means[i])[None], scan.mask[None])[0]
                    for i, scan in scans.items()}
        value = max(map(float, values), key=lambda value: sum(dice(train, value).values()))
        each = dice(test, value)
        rows.append(dict(floor=name, value=value, dice=np.mean([*each.values()]), n=len(each), each=each))
    return rows


def curves(train, test, window, bins=64):
    """[{floor, mae, psnr, n, each}] of {id: (T1, CT)}: HU of a voxel told from its T1, its place unseen.

    The mean or median CT of train's voxels in the same of `bins` equal bins of T1 (in an empty bin: of all of
    them), or in one bin for all. As configs/sarcoma_t1_ct.py has it both are clipped to window, and tissue
    counts, where CT is above the window's low end by more than a hundredth of it. MAE in HU, PSNR at the
    window's range in dB: means over test.
    """
    low, high = window

    def tissue(pair):
        t1, ct = (np.clip((scan - low) / (high - low), 0, 1) for scan in pair)
        return t1[ct > 0.01], ct[ct > 0.01] * (high - low)
    seen, truth = map(np.concatenate, zip(*map(tissue, train.values())))
    rows = []
    for (name, middle), n in itertools.product((("mean", np.mean), ("median", np.median)), (1, bins)):
        def binned(t1):
            return np.minimum((t1 * n).astype(int), n - 1)
        there, of_all = binned(seen), middle(truth)
        curve = np.array([middle(truth[there == k]) if (there == k).any() else of_all for k in range(n)])
        each = {}
        for i, (t1, ct) in {i: tissue(pair) for i, pair in test.items()}.items():
            predicted = curve[binned(t1)]
            each[i] = dict(mae=mae(predicted, ct), psnr=psnr(predicted, ct, high - low))
        means = {metric: np.mean([score[metric] for score in each.values()]) for metric in ("mae", "psnr")}
        of = f"in each of {n} bins of T1" if n > 1 else "for all"
        rows.append(dict(floor=f"{name} HU {of}", **means, n=len(each), each=each))
    return rows


def write_floors(patients, out):
    """floors.json of the written files, each beside that of the scans as downloaded; prints a table. T1 to CT
    has its own, of the patients that configs/sarcoma_t1_ct.py trains and tests."""
    found = {}
    print(f"floors{'':42}best on train  test Dice  as downloaded   n")
    for modality in FILES:
        before, after = ({"train": {}, "test": {}} for _ in range(2))
        for number, scans in patients.items():
            if modality in scans and part(number) in before:
                before[part(number)][f"sts_{number}"] = scans[modality]
                after[part(number)][f"sts_{number}"] = read_scan(*paths(out, modality, number))
        found[modality] = measure(modality, **after)
        for row, old in zip(found[modality], measure(modality, **before)):
            row["as_downloaded"] = old["dice"]
            print("{:4}{floor:44}{value:13g}{dice:11.3f}{as_downloaded:15.3f}{n:4}".format(modality, **row))
    files = {path.name[:7]: path for path in sorted((out / "t1_ct").glob("sts_*_t1.nii.gz"))}
    pairs = {i: [read_stored(path.with_name(f"{i}_{m}.nii.gz"))[0] for m in ("t1", "ct")]
             for i, path in files.items()}
    test = {i: pair for i, pair in pairs.items() if i in recipe.test}
    train = {i: pair for i, pair in pairs.items() if i not in (*recipe.test, *recipe.val)}
    found["t1_ct"] = curves(train, test, recipe.window) if train and test else []
    if not found["t1_ct"]:
        print(f"t1_ct: no floor, {len(train)} pairs to learn from and {len(test)} to test")
    for row in found["t1_ct"]:
        print("t1_ct {floor:42} MAE {mae:.0f} HU, PSNR {psnr:.1f} dB, n {n}".format(**row))
    write_json(out / "floors.json", found)


def paths(out, modality, number):
    return [out / modality / kind / f"sts_{number}.nii.gz" for kind in ("imagesTr", "labelsTr")]


def write_volume(path, array, affine):
    """NIfTI; a file of that name is always whole, and equal voxels make equal bytes."""
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 1)                                      # 1: the scanner's coordinates
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


def write_patient(number, scans, out):
    """All files of a patient; returns their paths, and the patient's entry of pairs.json."""
    box = world_box(number, scans)
    small = {modality: trim(scan, box) for modality, scan in scans.items()}
    todo, pair = [], {"masks": agreement(scans)}
    for modality, scan in small.items():
        todo += zip(paths(out, modality, number), (scan.voxels, scan.mask.astype(np.uint8)), (scan, scan))
    if len(small) == len(FILES):
        t1 = small["t1"]
        arrays = {m: onto(scan.voxels, scan.affine, t1, 1, scan.voxels.min()) for m, scan in scans.items()}
        arrays["label"] = t1.mask.astype(np.uint8)
        todo += [(out / "multi" / f"sts_{number}_{name}.nii.gz", array, t1) for name, array in arrays.items()]
    if "t1" in scans and "ct" in scans:
        pair["t1_ct"] = fit(scans["t1"], scans["ct"])
        if pair["t1_ct"]["fits"]:
            t1, ct = small["t1"], small["ct"]
            offset = lattice_offset(t1, ct)
            low, high = np.maximum(offset, 0), np.minimum(offset + t1.mask.shape, ct.mask.shape)
            t1, ct = cut(t1, low - offset, high - offset), cut(ct, low, high)
            todo += [(out / "t1_ct" / f"sts_{number}_t1.nii.gz", t1.voxels, t1),
                     (out / "t1_ct" / f"sts_{number}_ct.nii.gz", ct.voxels, t1)]
    for path, array, scan in todo:
        write_volume(path, array, scan.affine)
    shapes = [f"{m} {scans[m].mask.shape} -> {small[m].mask.shape}" for m in small]
    print(f"sts_{number}", f"{part(number):5}", *shapes, sep="  ", flush=True)
    return [path for path, _, _ in todo], pair


def write_lists(patients, pairs, out):
    """split.json, pairs.json, each modality's dataset.json; prints the counts, and who is left out where."""
    names = {name: [f"sts_{n}" for n in patients if part(n) == name] for name in ("train", "val", "test")}
    for m in FILES:
        here = {f"sts_{n}" for n, scans in patients.items() if m in scans}
        lists = [[i for i in ids if i in here] for ids in names.values()]
        print("{:4}{:3} train {:3} val {:3} test; not in the source:".format(m, *map(len, lists)),
              *[n for n in patients if f"sts_{n}" not in here])
        train, val, test = ([{kind: f"./{kind}sTr/{i}.nii.gz" for kind in ("image", "label")} for i in ids]
                            for ids in lists)
        write_json(out / m / "dataset.json", {
            "name": f"sarcoma {m}", "description": "theibsi/data_sets, trimmed unevenly: lab/sarcoma.py",
            "reference": "TCIA, doi 10.7937/K9/TCIA.2015.7GO2GSKS", "licence": "CC BY 3.0",
            "numTraining": len(train), "numTest": len(test), "modality": {"0": m}, "tensorImageSize": "3D",
            "labels": {"0": "background", "1": "tumour"}, "training": train, "validation": val, "test": test})
    names["reserved"] = [f"sts_{n}" for n in PARTS["reserved"]]
    write_json(out / "split.json", names | {"margins_mm": {f"sts_{n}": margins(n) for n in patients}})
    write_json(out / "pairs.json", {f"sts_{n}": pair for n, pair in pairs.items()})
    print("test:", *PARTS["test"], "\nval:", *PARTS["val"], "\nreserved, nowhere used:", *PARTS["reserved"])
    lack = {m: [n for n in LEFT_OUT[m] if m not in patients.get(n, ())] for m in ("ct", "t1")}
    print("not in RESULTS.md's tables, left out:", ", ".join(f"{m} of {' '.join(lack[m])}" for m in lack))
    print("multi, left out for a missing modality:", *[n for n in patients if len(patients[n]) < len(FILES)])
    fits = {n: pair["t1_ct"] for n, pair in pairs.items() if "t1_ct" in pair}
    print("t1_ct:", *[n for n in fits if fits[n]["fits"]])
    print("t1_ct, left out:", ", ".join(f"{n} {fits[n]['why']}" for n in fits if not fits[n]["fits"]))
    for m in ("t1_ct", "t1_pet", "ct_pet"):
        dice = sorted((pair["masks"][m], n) for n, pair in pairs.items() if m in pair["masks"])
        print("masks {}: median Dice {:.3f} {}, least {:.3f} {}".format(m, *dice[len(dice) // 2], *dice[0]))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepare the sarcomas of theibsi/data_sets as a benchmark.")
    parser.add_argument("source", help="clone of github.com/theibsi/data_sets, or its ibsi_validation")
    parser.add_argument("out", type=Path, help="folder to write; configs/sarcoma_*.py read data/sarcoma")
    parser.add_argument("--all", action="store_true", help="with the training scans that the tables of "
                        "RESULTS.md lack, too; studies then need another `labelled`")
    args = parser.parse_args(argv)
    patients = read_all(source_folder(args.source), args.all)
    written, pairs = set(), {}
    for number, scans in patients.items():
        files, pairs[number] = write_patient(number, scans, args.out)
        written.update(files)
    write_lists(patients, pairs, args.out)
    write_floors(patients, args.out)
    if strange := sorted(set(args.out.glob("**/sts_*.nii.gz")) - written):
        raise SystemExit(f"{strange[0]} and {len(strange) - 1} more are of another run; remove them")


if __name__ == "__main__":
    program(main)
