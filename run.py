"""What every training run does alike; functions only, the loops stand in pretrain.py and finetune.py.

A run's folder is runs/<name>; `rank` counts its processes, `local` those on one machine.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import traceback
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import configs
from model import WeightsError, read_file


def program(main):
    """main(arguments) of a script; what is foreseen to go wrong ends it with one line and an exit code.

    Under torchrun the line stands on the screen once, and in torchrun's closing summary. S2DC_DEBUG=1 keeps
    the traceback; what is not foreseen always does.
    """
    try:
        main(sys.argv[1:])
    except BaseException as error:
        said = foreseen(error)
        if said is None or os.environ.get("S2DC_DEBUG"):
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):       # torchrun shows py_callstack at its end
            extra = dict(py_callstack=said, timestamp=str(int(time.time())))
            Path(file).write_text(json.dumps({"message": {"message": said, "extraInfo": extra}}))
        if processes()[2] == 0:
            print(said, file=sys.stderr, flush=True)
        else:
            time.sleep(2)                                           # torchrun stops all when the first ends
        sys.stdout.flush()
        if dist.is_initialized():
            os._exit(code)                                          # the others may wait in a collective
        sys.exit(code)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHUT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def foreseen(error):
    """One line (of a list of files: several) on an error that a person can do something about, or None."""
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else None
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on from the last checkpoint"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.filename or 'a file'}: cannot be written, the disk is full"
    if isinstance(error, OSError) and error.errno in SHUT:
        return (f"{error.filename}: {error.strerror.lower()}; if it was to be written, give --runs, --cache "
                "or --out elsewhere")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text:
        return f"out of memory ({text[:120]}); try a smaller crop or batch, or --checkpointing=True"
    if "DataLoader worker" in text and "killed by signal" in text:
        return "a process that loads batches was killed (out of memory?); try fewer --workers"
    if type(error).__name__ == "VolumeError":                       # of a worker: behind its traceback
        return str(error).strip().splitlines()[-1].removeprefix("volumes.VolumeError: ")
    if isinstance(error, ImportError) and "pip install" in text:
        return text
    return None


def refuse(rules):
    """Exit with the text of the first of the rules (fine, text) that is not kept."""
    for fine, text in rules:
        if not fine:
            raise SystemExit(text)


def check_training(cfg, ranks):
    """Refuse the keys that no training can run with, one line each."""
    refuse([
        (cfg.accumulate > 0 and cfg.batch > 0 and cfg.batch % (ranks * cfg.accumulate) == 0,
         f"batch = {cfg.batch} does not divide into {ranks} processes x {cfg.accumulate} accumulated passes"),
        (min(cfg.steps, cfg.log_every, cfg.save_every) > 0,
         "steps, log_every and save_every must be above 0"),
        (cfg.lr > 0 and cfg.clip > 0, f"lr = {cfg.lr} and clip = {cfg.clip}, expected both above 0"),
        (min(cfg.warmup, cfg.min_lr, cfg.decay, cfg.seed) >= 0,
         "warmup, min_lr, decay and seed must not be below 0"),
        (cfg.seed < 2 ** 63, f"seed = {cfg.seed}, expected below 2^63"),
        (not cfg.init or Path(cfg.init).is_file() or Path(cfg.runs, cfg.name, "last.pt").exists(),
         f"init = {cfg.init!r}, no such file"),
        (0 < cfg.scale[0] <= cfg.scale[1], f"scale = {cfg.scale}, expected (least, largest), both above 0"),
        (min(cfg.in_channels, cfg.feature_size, cfg.window_size, *cfg.depths, *cfg.num_heads) > 0,
         "in_channels, feature_size, window_size, depths and num_heads must be above 0"),
        (0 <= cfg.workers <= 256, f"workers = {cfg.workers}, expected 0 to 256"),
    ])
    if cfg.warmup >= cfg.steps and processes()[0] == 0:
        print(f"warmup = {cfg.warmup} of steps = {cfg.steps}: the rate never reaches lr = {cfg.lr:g}, but "
              f"ends at {lr_at(cfg.steps - 1, cfg):.2g}")


def preprocessing_differences(then, now):
    """A line for each key in which a checkpoint's preprocessing is not that of now, data.preprocessing of a
    config; labels are no part."""
    if not isinstance(then, dict):
        return []
    now = {key: value for key, value in now.items() if key not in ("labels", "remap")}
    kinds = [then | own for own in then.get("rules", {}).values()] or [then]        # of several modalities
    return min(([f"preprocessing differs: {key} was {kind.get(key)!r} in training, is {value!r}"
                 for key, value in now.items() if json.dumps(kind.get(key)) != json.dumps(value)]
                for kind in kinds), key=len)


def processes():
    """(rank, ranks, local) as torchrun set them; (0, 1, 0) for a single process."""
    return tuple(int(os.environ.get(*key)) for key in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def silent(*_):
    """The `print` of every process but the first."""


def choose_device(local=0):
    """A GPU if there are any, else the CPU, with the C library told to keep what is freed: on its own it
    gives tensors above 32 MB back to the kernel, which clears their pages at each use, a third of a step.
    The price is a quarter to a half more memory at the peak."""
    if torch.cuda.is_available():
        return torch.device("cuda", local)
    with contextlib.suppress(AttributeError):           # of glibc alone
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)                       # M_MMAP_THRESHOLD: from here on mapped one by one
        libc.mallopt(-1, 2 ** 31 - 1)                   # M_TRIM_THRESHOLD: so much may lie idle
    return torch.device("cpu")


def join(ranks, local, folder, first, prepare):
    """Device of this process, after the first of each machine has called prepare() and all have met; exits
    where that refuses something on any machine, or when they would go on from different steps."""
    refused = None
    if local == 0:
        try:
            prepare()
        except (SystemExit, Exception) as error:                    # the other machines must hear of it
            if ranks == 1:
                raise
            if (refused := foreseen(error)) is None:
                traceback.print_exc()
                refused = f"{type(error).__name__}: {error}"
    device = choose_device(local)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        if local == 0 and ranks > int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):
            print(f"{platform.node()}: waiting for the other machines", flush=True)
        # days: the first of a machine may fill the cache meanwhile
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=7))
        seen = [None] * ranks
        dist.all_gather_object(seen, (first, platform.node(), refused))             # waits for all, too
        for _, node, why in seen:
            if why:
                raise SystemExit(why if node == platform.node() else f"{node}: {why}")
        if len(steps := {step for step, *_ in seen}) > 1:
            raise SystemExit(f"the ranks would go on from steps {sorted(steps)}: "
                             f"all machines must see the same {folder}")
        # from here on a machine that is gone is noticed; the longest that one waits is for scans to be scored
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(hours=3))      # no public name does it
    return device


def bfloat16(cfg, device):
    """Whether products are computed in bfloat16: where the hardware does it, on a GPU by default, on a CPU if
    cfg.bf16_cpu asks for it; exits where a CPU would have to emulate it."""
    if device.type == "cuda":
        return cfg.bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.bf16_cpu and not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        raise SystemExit("bf16_cpu: this CPU multiplies no bfloat16 (AMX or AVX512-BF16), it would be slower")
    return cfg.bf16_cpu


def products(bf16, device):
    """What products are computed in, for the log: torch rounds what float32 convolutions multiply to TF32's
    ten bits on GPUs that have it."""
    if bf16:
        return "bfloat16"
    rounded = (device.type == "cuda" and torch.backends.cudnn.allow_tf32
               and torch.cuda.get_device_capability(device) >= (8, 0))
    return "float32, convolutions in TF32" if rounded else "float32"


def parallel(network, ranks, device):
    """The network, or around it what averages the gradients of several processes in backward."""
    if ranks == 1:
        return network
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, devices, forward_sync_buffers=False)


def batches(samples, cfg, rank, ranks, first, collate):
    """Iterator over the batches of this rank from step `first` on."""
    mine = list(places(cfg, rank, ranks, first))
    return iter(torch.utils.data.DataLoader(samples, batch_sampler=mine, num_workers=cfg.workers,
                                            collate_fn=collate, pin_memory=torch.cuda.is_available()))


def to_device(batch, device):
    """The batch with its tensors on the device."""
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}


def lr_at(step, cfg):
    """Learning rate of step 0 .. steps - 1, by the step alone: linear warm-up, then half a cosine."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * progress))


def places(cfg, rank, ranks, first):
    """For each pass of this rank the list of (step, place in the global batch) it works on."""
    b = cfg.batch // (ranks * cfg.accumulate)
    for step in range(first, cfg.steps):
        for a in range(cfg.accumulate):
            yield [(step, (rank * cfg.accumulate + a) * b + i) for i in range(b)]


def resume(folder, cfg, free, say):
    """State of <folder>/last.pt, None for a new run; exits when a key that the run depends on has changed.

    free: the keys that it does not depend on. A key that the checkpoint lacks had its default; one that the
    code has lost is not asked for. More steps than were planned, and a lower rate, go on from there too: the
    learning rate of every later step is then that of the new plan, and a line says so.
    """
    path = folder / "last.pt"
    if not path.exists():
        return None
    try:
        state = read_file(path)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise SystemExit(f"{path}: holds no run of this program; give --name=another")
    now, then = dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)()) | state["config"]
    changed = [key for key in now if key not in free and then[key] != now[key]]
    may = [key for key in changed if (key == "steps" and now[key] > then[key]) or
           (key == "lr" and now[key] < then[key])]
    wrong = [key for key in changed if key not in may]
    said = "; ".join(f"{key} was {then[key]!r}, now {now[key]!r}" for key in (wrong or may)[:8])
    if wrong:
        raise SystemExit(f"{path} belongs to another configuration: {said}. "
                         f"Give --name=another, or remove {folder}")
    if may:
        step = state["step"]
        say(f"{said}: from step {step} on the rate is {lr_at(step, cfg):.3g}, falling to {cfg.min_lr:.3g}")
    return state


@contextlib.contextmanager
def of_this_version(state):
    """Around what takes its parts from the state of a last.pt: one line where those are not in it."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError):
        raise SystemExit(f"{state['config']['name']}: last.pt is of another version of this program, which "
                         "cannot go on from it; give --name=another, --init takes its encoder.pt or "
                         "best.pt") from None


HELD = weakref.WeakValueDictionary()    # {folder: the open lock} of this process


def lock(folder):
    """An open file that keeps `folder` for this process while it is open or the process ends; exits when
    another one has it. Sweeps what killed saves left."""
    folder.mkdir(parents=True, exist_ok=True)
    held, place = open(folder / "lock", "a+"), str(folder.resolve())
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = HELD.get(place)          # what failed before in this process may still be remembered
        if held is None or held.closed:
            raise SystemExit(f"{folder}: another process trains under this name; "
                             "give --name=another") from None
    except OSError as error:
        raise SystemExit(f"{folder}: cannot be locked ({error.strerror}), its file system must have flock; "
                         "give --runs elsewhere") from None
    HELD[place] = held
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    return held


def start_log(folder, cfg, first, origin):
    """config.py as resolved; a log that ends at step `first`, where the run goes on, then says `origin`.
    Returns `lock(folder)`."""
    held = lock(folder)
    for name in ("encoder", "network"):
        ahead, before = folder / f"{name}.pt", folder / f"{name}.prev.pt"
        if first and ahead.exists() and before.exists() and read_file(ahead)["step"] > first:
            os.replace(before, ahead)   # a kill came between it and last.pt: it will be saved again
    with configs.replacing(folder / "config.py") as aside:
        aside.write_text(f'"""{folder.name}, as resolved."""\n{configs.dump(cfg)}\n')
    path = folder / "log.jsonl"
    kept = []
    for k, line in enumerate(path.read_text().splitlines(keepends=True) if path.exists() else [], 1):
        try:
            if line.endswith("\n") and json.loads(line).get("step", 0) <= first:
                kept.append(line)
        except (ValueError, AttributeError):
            raise SystemExit(f"{path}: line {k} is no JSON object; mend or remove the file") from None
    with configs.replacing(path) as aside:
        aside.write_text("".join(kept) + json.dumps(origin | {"resumed": first}) + "\n")
    return held


def write_log(folder, line):
    """One more line of log.jsonl."""
    line = {key: round(value, 7) if isinstance(value, float) else value for key, value in line.items()}
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def save(path, state, keep=False):
    """torch.save that leaves either the old file or the whole new one, whenever it is killed.

    Weights that are not finite are not saved, see `diverged`; finite ones may still ruin the next step: keep
    leaves the file before this one as <name>.prev.pt.
    """
    if bad := not_finite(state):
        diverged(path.parent, state["step"], f"{bad} after it")
    if keep and path.exists():
        with configs.replacing(path.with_suffix(".prev.pt")) as aside:
            try:
                os.link(path, aside)
            except OSError:                                         # a file system without links
                shutil.copyfile(path, aside)
    with configs.replacing(path) as aside:
        try:
            torch.save(state, aside)
        except RuntimeError as error:                               # torch's words for a short write
            if "unexpected pos" not in str(error) and "write" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "no space left", str(path)) from None


def not_finite(state, name=""):
    """Name of the first tensor with a number that is not finite in nested dicts and lists, or ""."""
    if torch.is_tensor(state):
        return "" if state.isfinite().all() else name
    parts = enumerate(state) if isinstance(state, list | tuple) else ()
    if isinstance(state, dict):
        parts = state.items()
    return next((bad for key, part in parts if (bad := not_finite(part, f"{name}.{key}".strip(".")))), "")


def diverged(folder, step, said):
    """Exit of a run whose numbers are not finite, so that the same command with a lower rate goes on.

    From the last checkpoint that has trained a step: one of this very step has not, and gives way to the one
    before it, or to none. The first process alone moves files.
    """
    if processes()[0] > 0:
        time.sleep(60)                  # torchrun would stop the first in the midst of it
        raise SystemExit(f"step {step}: not finite ({said})")
    for name in ("last.pt", "encoder.pt", "network.pt"):
        path = folder / name
        if path.exists() and read_file(path)["step"] == step:
            before = path.with_suffix(".prev.pt")
            os.replace(path, path.with_suffix(".bad.pt"))
            if before.exists():
                os.replace(before, path)
    last, good = folder / "last.pt", "there is no checkpoint yet; try a lower --lr"
    if last.exists():
        good = (f"the last good checkpoint is {last}, of step {read_file(last)['step']}; the same command "
                "with a lower --lr goes on from there")
    raise SystemExit(f"step {step}: not finite ({said}); {good}")


def write_json(path, content):
    """JSON, written as a whole or not at all; arrays become lists."""
    text = json.dumps(content, indent=1, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v))
    path.parent.mkdir(parents=True, exist_ok=True)
    with configs.replacing(path) as aside:
        aside.write_text(text)


def versions():
    """What a result was made with: library versions, device, command line, time, commit of this repository
    (with "-dirty" where files differ from it) or "unknown"."""
    command = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:                                                 # no git on this machine
        commit = ""
    device = f"cpu, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    started = datetime.datetime.now().isoformat(timespec="seconds")
    return dict(torch=str(torch.__version__), numpy=np.__version__, python=sys.version.split()[0],
                device=device, commit=commit or "unknown", argv=sys.argv, started=started)


def clock(seconds):
    """Seconds as '3 h 05 min', '4 min 10 s' or '9 s'."""
    minutes, seconds = divmod(int(max(0, seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def memory_gb():
    """Most memory that this process has held so far, in GB: of the GPU, if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
