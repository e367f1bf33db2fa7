"""What every training run does alike: process group, learning rate, resuming, the log, checkpoints, commit and versions.

Functions only: the loops stand in pretrain.py and finetune.py. A run's folder is runs/<name>; `rank` counts the processes of a
run, `local` those on one machine.
"""
import dataclasses
import datetime
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import configs
from model import WeightsError, read_file


def processes():
    """(rank, ranks, local) as torchrun set them; (0, 1, 0) for a single process."""
    return tuple(int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def join(ranks, local, folder, first):
    """Device of this process, after all processes of the run have met; exits when they would go on from different steps."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
        seen = [None] * ranks
        dist.all_gather_object(seen, first)                         # waits for all, too
        if len(set(seen)) > 1:
            raise SystemExit(f"the ranks would go on from steps {sorted(set(seen))}: all machines must see the same {folder}")
    return device


def lr_at(step, cfg):
    """Learning rate of step 0 .. steps - 1: linear warm-up, then half a cosine down to min_lr. A pure function of the step."""
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


def resume(folder, cfg, free):
    """State of <folder>/last.pt, or None for a new run; exits when the run depends on something else than it did.

    free: the keys that a run does not depend on. A key that the checkpoint lacks had its default; one that the code has lost
    is not asked for.
    """
    path = folder / "last.pt"
    if not path.exists():
        return None
    try:
        state = read_file(path)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    now, then = dataclasses.asdict(cfg), dataclasses.asdict(type(cfg)()) | state["config"]
    changed = [key for key in now if key not in free and then[key] != now[key]]
    if changed:
        said = "; ".join(f"{key} was {then[key]!r}, now {now[key]!r}" for key in changed[:4])
        raise SystemExit(f"{path} belongs to another configuration: {said}. Give --name=another, or remove {folder}")
    return state


def start_log(folder, cfg, first, origin):
    """The resolved config in config.py, and a log that ends at step `first`, from where the run goes on, then says `origin`."""
    folder.mkdir(parents=True, exist_ok=True)
    with configs.replacing(folder / "config.py") as aside:
        aside.write_text(f'"""{folder.name}, as resolved."""\n{configs.dump(cfg)}\n')
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("step", 0) <= first]
    with configs.replacing(path) as aside:
        aside.write_text("".join(kept) + json.dumps(origin | {"resumed": first}) + "\n")


def write_log(folder, line):
    """One more line of log.jsonl."""
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps({key: round(v, 7) if isinstance(v, float) else v for key, v in line.items()}) + "\n")


def save(path, state):
    """torch.save that leaves either the old file or the whole new one, whenever it is killed."""
    with configs.replacing(path) as aside:
        torch.save(state, aside)


def last_good(folder):
    """What to say of the checkpoint when a run has to stop."""
    path = folder / "last.pt"
    return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"


def write_json(path, content):
    """JSON, written as a whole or not at all; arrays become lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with configs.replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v)))


def versions():
    """What a result was made with: library versions, commit of this repository or "unknown", device, command line, time."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return dict(torch=str(torch.__version__), numpy=np.__version__, python=sys.version.split()[0], device=device,
                commit=commit(), argv=sys.argv, started=datetime.datetime.now().isoformat(timespec="seconds"))


def commit():
    """Commit of this repository, with "-dirty" where files differ from it, or "unknown"."""
    command = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True)
    except OSError:                                                 # no git on this machine
        return "unknown"
    return said.stdout.strip() or "unknown"


def clock(seconds):
    """Seconds as '3 h 05 min', '4 min 10 s' or '9 s'."""
    seconds = int(max(0, seconds))
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def memory_gb():
    """Most memory that this process has held so far, in GB: of the GPU, if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
