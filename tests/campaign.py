"""Broken inputs, kills and full disks by the thousand: each must end in a result, or in one line.

    python tests/campaign.py headers 20000 --seed=1         one family
    python tests/campaign.py all 1000                       every family, so many trials each (kills: a tenth)

Every trial follows from (family, seed, number) alone and is printed with them when it fails, so that
`python tests/campaign.py headers 1 --seed=1 --first=17` repeats it. A trial fails when anything but the error
type of its room comes out, when its text is longer than a line or does not name the file, when weights differ
after a kill, when a damaged file is taken for a whole one, or when a file is left that nobody asked for.
"""
import argparse
import contextlib
import gzip
import io
import json
import locale
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import configs
import data
import finetune
import pretrain
import run
import tasks
from model import Swin3D, WeightsError, load_weights


class Wrong(Exception):
    """What a trial showed that it must not."""


def one_line(error, name=None):
    """An error that is foreseen is one line that names the file (or several lines, each of which does)."""
    text = str(error)
    if not text or len(text) > 2000 or ("\n" in text.strip() and name is None):
        raise Wrong(f"not one line: {text[:300]!r}")
    if name is not None and name not in text:
        raise Wrong(f"does not name {name}: {text[:300]!r}")


def flipped(content, rng, most=8):
    """Bytes with some of them changed, or cut short, or longer than they were."""
    content, kind = bytearray(content), rng.random()
    if kind < 0.15:
        return bytes(content[:rng.randrange(len(content))])
    if kind < 0.2:
        return bytes(content) + rng.randbytes(rng.randrange(1, 500))
    for _ in range(rng.randrange(1, most)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


# ---------------------------------------------------------------------------------------------------- scans

ODD = [0.0, -1.0, 1e13, 40.0, -0.001, 1e-30, 1e38, float("nan"), float("inf"), 3.4e38]
FIELDS = [(0, "i"), (40, "8h"), (70, "h"), (72, "h"), (76, "8f"), (108, "f"), (112, "f"), (116, "f"),
          (123, "b"), (252, "h"), (254, "h"), (256, "6f"), (280, "4f"), (296, "4f"), (312, "4f"), (344, "4s")]


def header(folder, rng):
    """A NIfTI file whose header says something else, through `read_volume` and `preprocess`."""
    path = folder / f"scan.nii{rng.choice(['', '.gz'])}"
    shape = tuple(rng.randrange(4, 12) for _ in range(3))
    kind = rng.choice([np.uint8, np.int16, np.float32])
    values = np.random.default_rng(rng.randrange(2 ** 32)).integers(0, 200, shape).astype(kind)
    content = bytearray(nib.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0])).to_bytes())
    for _ in range(rng.randrange(1, 4)):
        place, form = rng.choice(FIELDS)
        size = struct.calcsize("<" + form)
        old = list(struct.unpack("<" + form, content[place:place + size]))
        k = rng.randrange(len(old))
        if form[-1] == "f":
            odd = rng.choice([*ODD, old[k] * 40, old[k] * 1e13, old[k] * 1e-6, rng.uniform(-1e4, 1e4)])
            old[k] = odd if abs(odd) < 3.4e38 or not abs(odd) < np.inf else 3.4e38
        elif form[-1] == "h":
            old[k] = rng.choice([0, -1, 1, 2, 4, 5, 7, 16, 512, 32767, -32768, rng.randrange(-9, 99)])
        else:
            content[place:place + size] = rng.choice([rng.randbytes(size), b"ni1\0"[:size], b"\0" * size])
            continue
        content[place:place + size] = struct.pack("<" + form, *old)
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    read_and_preprocess(path, rng)


def picture(folder, rng):
    """A .mha, .mhd, .nrrd, DICOM series or folder of slices with bytes changed."""
    import SimpleITK as sitk
    from PIL import Image
    kind = rng.choice(["mha", "mhd", "nrrd", "dicom", "slices"])
    values = np.random.default_rng(rng.randrange(2 ** 32)).integers(-99, 900, (5, 9, 8)).astype(np.int16)
    if kind == "slices":
        path = folder / "slices"
        path.mkdir()
        for k, row in enumerate(values):
            Image.fromarray((row % 256).astype(np.uint8)).save(path / f"{k}.png")
    elif kind == "dicom":
        path, before = folder / "series", locale.setlocale(locale.LC_CTYPE)
        path.mkdir()
        for k, row in enumerate(values):
            image = sitk.GetImageFromArray(row[None])
            for tag, text in (("0020|000e", "1.2.3"), ("0020|0032", f"0\\0\\{2 * k}"), ("0020|0013", str(k))):
                image.SetMetaData(tag, text)
            sitk.WriteImage(image, str(path / f"{k}.dcm"))
        locale.setlocale(locale.LC_CTYPE, before)                   # GDCM leaves "C": open() would read ASCII
    else:
        path = folder / f"scan.{kind}"
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path), useCompression=rng.random() < 0.3)
    files = (path if path.is_dir() else folder).iterdir()
    victim = rng.choice(sorted(each for each in files if each.is_file()))
    victim.write_bytes(flipped(victim.read_bytes(), rng))
    read_and_preprocess(path, rng)


def read_and_preprocess(path, rng):
    cfg = pretrain.Config(spacing=rng.choice([(), (), (2.0, 2.0, 2.0)]), foreground=-1e9,
                          intensity=rng.choice(["window", "zscore"]))
    case = dict(id="scan", images=[str(path)], label=None, targets=[])
    for what in (lambda: data.read_volume(path), lambda: data.preprocess(case, cfg)):
        try:
            with np.errstate(all="ignore"):
                what()
        except data.VolumeError as error:
            one_line(error, path.name)


# ---------------------------------------------------------------------------------------- lists and configs

JUNK = [None, 3, -1, 1.5, True, "", "x", "../../x", "/abs/x", [], {}, [1], ["x"], {"a": 1}, [[]],
        "\u00e9\u4e2d", "a" * 500]


def mutated(tree, rng):
    """A JSON tree with one of its parts replaced, removed or wrapped."""
    if rng.random() < 0.3 or not isinstance(tree, (list, dict)) or not tree:
        return rng.choice([rng.choice(JUNK), [tree], {"image": tree}])
    if isinstance(tree, list):
        k = rng.randrange(len(tree))
        return tree[:k] + ([mutated(tree[k], rng)] if rng.random() < 0.8 else []) + tree[k + 1:]
    key = rng.choice(sorted(tree))
    rest = {k: v for k, v in tree.items() if k != key}
    return rest | ({key: mutated(tree[key], rng)} if rng.random() < 0.8 else {})


def datalist(folder, rng):
    """A datalist with parts of other types, through `find_cases` and `split_cases`."""
    entries = [{"image": f"i{k}.nii.gz", "label": f"l{k}.nii.gz", "fold": k % 2} for k in range(4)]
    tree = mutated({"training": entries, "validation": entries[:1], "name": "x"}, rng)
    content = json.dumps(tree).encode()
    (folder / "list.json").write_bytes(content if rng.random() < 0.8 else flipped(content, rng))
    cfg = finetune.Config(data=str(folder), datalist="list.json", labels={1: "one"}, test="val",
                          val=rng.choice(["i1", ("i1",), "*1*"]), fold=rng.choice([-1, 0]))
    foreseen(lambda: tasks.split_cases(cfg))
    try:
        cases = data.find_cases(cfg)
    except SystemExit:
        return
    for case in cases:
        if (folder / case["id"]).resolve().parent != folder.resolve():
            raise Wrong(f"the id {case['id']!r} leads out of its folder")


def table(folder, rng):
    """A csv in another encoding, without its column, or with other bytes."""
    for k in range(4):
        (folder / f"s{k}.nii.gz").touch()
    text = "id,class\n" + "".join(f"{k},{'ab'[k % 2]}\n" for k in range(4))
    text = rng.choice([text, text.replace("id", "name"), text.replace("a", "\u00e9"), "", "id\n",
                       text.replace(",", ";")])
    content = text.encode(rng.choice(["utf-8", "latin-1", "utf-16"]))
    (folder / "t.csv").write_bytes(content if rng.random() < 0.5 or not content else flipped(content, rng))
    cfg = finetune.Config(data=str(folder), task="classification", image="s{id}.nii.gz", table="t.csv",
                          case_key="{id}", class_from="{class}", classes={"a": 0, "b": 1}, val_share=0.25,
                          test_share=0.25)
    foreseen(lambda: tasks.split_cases(cfg))


def config(folder, rng):
    """A config with other bytes, other values, other types."""
    name = rng.choice(["demo", "ct", "btcv", "demo_segmentation", "pet"])
    lines = (ROOT / f"configs/{name}.py").read_text().splitlines()
    if rng.random() < 0.5:
        k = rng.choice([k for k, line in enumerate(lines) if " = " in line])
        key = lines[k].split(" = ")[0]
        other = rng.choice([*map(repr, JUNK), "(", "1 +", "undefined", "-1", "0", "(1, 2)", "1e400"])
        lines[k] = f"{key} = {other}"
        content = "\n".join(lines).encode()
    else:
        content = flipped("\n".join(lines).encode(), rng, 3)
    (folder / "x.py").write_bytes(content)
    script = finetune if b"task" in content else pretrain
    foreseen(lambda: script.check(configs.load(script.Config, [str(folder / "x.py")]), 1), one=False)


def foreseen(what, one=True):
    """Run it; SystemExit with a text is how a program ends when it knows why."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            what()
    except SystemExit as error:
        if one:
            one_line(error)
        elif not str(error) or isinstance(error.code, int):
            raise Wrong(f"ends without a word: {error.code!r}") from None


# ---------------------------------------------------------------------------------------------- checkpoints

def checkpoint(folder, rng):
    """A checkpoint with one flipped bit, cut short, or of other content: refused, or equal to the saved."""
    torch.manual_seed(0)
    arguments = dict(feature_size=4, num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), window_size=2, v2=False)
    encoder = Swin3D(1, **arguments)
    content = dict(format="s2dc/encoder", encoder=encoder.state_dict(), arguments=encoder.arguments)
    kind, path = rng.random(), folder / "encoder.pt"
    if kind > 0.7:
        name = rng.choice(sorted(content["encoder"]))
        content["encoder"][name] = rng.choice([None, torch.tensor(float("nan")), torch.zeros(2), "x",
                                               torch.zeros(3, dtype=torch.long)])
    elif kind > 0.6:
        content[rng.choice(sorted(content))] = rng.choice(JUNK)
    path = folder / "encoder.pt"
    torch.save(content, path)
    if kind < 0.6:
        raw = bytearray(path.read_bytes())
        place = rng.randrange(len(raw))
        raw[place] ^= 1 << rng.randrange(8)
        path.write_bytes(raw if kind < 0.5 else raw[:place])
    other = Swin3D(1, **arguments)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load_weights(other, path)
    except WeightsError as error:
        one_line(error, path.name)
        return
    for (name, ours), theirs in zip(other.state_dict().items(), encoder.state_dict().values()):
        if not torch.equal(ours, theirs):
            raise Wrong(f"{name} was loaded and is not what was saved")


# ------------------------------------------------------------------------------------- kills and full disks

CONTEXT = multiprocessing.get_context("forkserver")     # of one process that has read torch: starts are short
CONTEXT.set_forkserver_preload(["pretrain", "finetune"])
STAGES = dict(pretrain=["configs/demo.py", "--slab=(64,32,32)", "--hidden=16", "--embedding=8", "--queue=7"],
              finetune=["configs/demo_segmentation.py", "--image=demo_ct/train/imagesTr/phantom_{id}.nii.gz",
                        "--label=demo_ct/train/labelsTr/phantom_{id}.nii.gz", "--val=002",
                        "--test=003", "--label_fraction=1.0", "--eval_every=2", "--overlap=0"])
SMALL = ["--crop=(64,32,32)", "--feature_size=4", "--num_heads=(1,1,1,1)", "--depths=(1,1,1,1)", "--batch=2",
         "--window_size=4", "--warmup=1", "--workers=0", "--log_every=1", "--save_every=1", "--steps=6",
         "--name=r"]
_shared = {}


def stage(name, folder, place, limit):
    """The body of a process that trains; no file may grow beyond `limit` bytes, if there is one."""
    torch.set_num_threads(1)
    with open(folder / "said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ["S2DC_DATA"] = str(place / "data")
    config, *keys = STAGES[name]
    sys.argv = [name, str(ROOT / config), *keys, *SMALL, f"--runs={folder}/runs", f"--cache={folder}/cache"]
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run.program(dict(pretrain=pretrain, finetune=finetune)[name].main)


def train(name, folder, place, limit=0):
    folder.mkdir(exist_ok=True)
    process = CONTEXT.Process(target=stage, args=(name, folder, place, limit))
    process.start()
    return process


def finish(name, folder, place, before=""):
    """Train to the end, undisturbed."""
    process = train(name, folder, place)
    process.join()
    if process.exitcode:
        raise Wrong(before + (folder / "said").read_text()[-300:])


def phantoms(name):
    """A data folder with four phantoms, and of a run of a stage that nobody disturbed its folder and its
    seconds; made once."""
    if "place" not in _shared:
        from lab import phantom
        _shared["place"] = Path(tempfile.mkdtemp(prefix="campaign-"))
        with contextlib.redirect_stdout(io.StringIO()):
            phantom.write(_shared["place"] / "data/demo_ct/train", range(4), size=64)
    place = _shared["place"]
    if name not in _shared:
        finish(name, place / f"warm-{name}", place)
        began = time.time()
        finish(name, place / name, place)
        _shared[name] = time.time() - began
    return place, place / name, _shared[name]


def same(one, other):
    """Whether two checkpoints are equal bit for bit, their configurations and times aside."""
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "config")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def compare(folder, expected):
    """The run's last checkpoint is that of a run left alone, and so are the names of all its files."""
    files = [{str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} for base in (expected, folder)]
    if files[0] != files[1]:
        raise Wrong(f"files: too many {sorted(files[1] - files[0])[:3]}, missing {sorted(files[0] - files[1])[:3]}")
    for name in sorted(name for name in files[0] if name.endswith(".pt")):
        if not same(*(torch.load(base / name, weights_only=True) for base in (expected, folder))):
            raise Wrong(f"{name} is not that of a run that was left alone")


def child_of(process, parent):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1]) == parent
    except OSError:                                                 # it has ended
        return False


def kill(folder, rng):
    """A stage that is killed at a random moment, caching included, and started again until it is done."""
    name = rng.choice(sorted(STAGES))
    place, expected, seconds = phantoms(name)
    folder = folder / "run"
    for _ in range(rng.randrange(1, 12)):
        process = train(name, folder, place)
        process.join(rng.uniform(0, rng.choice([0.4, 1.1])) * seconds)
        workers = [p for p in Path("/proc").iterdir() if p.name.isdigit() and child_of(p, process.pid)]
        process.kill()
        process.join()
        while any(worker.exists() for worker in workers):           # they end by themselves, soon
            time.sleep(0.01)
        _shared["kills"] = _shared.get("kills", 0) + (process.exitcode == -signal.SIGKILL)
    finish(name, folder, place)
    compare(folder, expected)


def disk(folder, rng):
    """The same on a disk where no file may grow beyond a limit: one line, and an equal run with room."""
    name = rng.choice(sorted(STAGES))
    place, expected, _ = phantoms(name)
    folder, limit = folder / "run", int(10 ** rng.uniform(2, 6.3))
    full = train(name, folder, place, limit)
    full.join()
    said = (folder / "said").read_text()
    if "Traceback" in said:
        raise Wrong(f"limit {limit}: {said[-700:]}")
    if full.exitcode:
        if not said.strip():
            raise Wrong(f"limit {limit}: ended without a word")
        finish(name, folder, place, f"limit {limit}, then room: ")
    compare(folder, expected)


FAMILIES = dict(headers=header, pictures=picture, datalists=datalist, tables=table, configs=config,
                checkpoints=checkpoint, kills=kill, disks=disk)


def trials(family, count, seed=0, first=0):
    """[(number, what went wrong)] of so many trials of a family."""
    wrong = []
    for number in range(first, first + count):
        rng = random.Random(f"{family} {seed} {number}")
        folder = Path(tempfile.mkdtemp(prefix="trial-"))
        try:
            FAMILIES[family](folder, rng)
        except Wrong as error:
            wrong.append((number, str(error)))
        except Exception as error:
            wrong.append((number, f"{type(error).__name__}: {error}"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if family in ("kills", "disks") and number % 10 == 9:      # these take long
            kills = f" ({_shared.get('kills', 0)} kills)"
            print(f"{family}: {number + 1} trials{kills}, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=[*FAMILIES, "all"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))      # torch alone maps gigabytes
    failures = 0
    for family in FAMILIES if args.family == "all" else [args.family]:
        few = args.family == "all" and family in ("kills", "disks")
        count = max(1, args.count // 10) if few else args.count
        start = time.time()
        wrong = trials(family, count, args.seed, args.first)
        killed = f" ({_shared.get('kills', 0)} kills)" if family == "kills" else ""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        print(f"{family:12s} {count:6d} trials{killed}, seed {args.seed}: {len(wrong)} wrong; "
              f"{(time.time() - start) / 60:.1f} min, {peak:.2f} GB at most", flush=True)
        for number, text in wrong[:20]:
            print(f"   {number}: {text[:300]}")
        failures += len(wrong)
    if "place" in _shared:
        shutil.rmtree(_shared["place"], ignore_errors=True)
    raise SystemExit(min(failures, 1))


if __name__ == "__main__":
    main()
