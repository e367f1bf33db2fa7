"""What every training run does alike; functions only, the loops stand in pretrain.py and finetune.py.

A run's folder is runs/<name>; `rank` counts its processes, `local` those on one machine.
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
from torch.nn.parallel import DistributedDataParallel

import configs
from model import WeightsError, read_file


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
        (not cfg.init or Path(cfg.init).is_file(), f"init = {cfg.init!r}, no such file"),
    ])


def processes():
    """(rank, ranks, local) as torchrun set them; (0, 1, 0) for a single process."""
    return tuple(int(os.environ.get(*key)) for key in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def silent(*_):
    """The `print` of every process but the first."""


def join(ranks, local, folder, first):
    """Device of this process, after all have met; exits when they would go on from different steps."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
        seen = [None] * ranks
        dist.all_gather_object(seen, first)                         # waits for all, too
        if len(set(seen)) > 1:
            raise SystemExit(f"the ranks would go on from steps {sorted(set(seen))}: "
                             f"all machines must see the same {folder}")
    return device


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


def resume(folder, cfg, free):
    """State of <folder>/last.pt, None for a new run; exits when a key that the run depends on has changed.

    free: the keys that it does not depend on. A key that the checkpoint lacks had its default; one that the
    code has lost is not asked for.
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
    said = "; ".join(f"{key} was {then[key]!r}, now {now[key]!r}" for key in changed[:4])
    if changed:
        raise SystemExit(f"{path} belongs to another configuration: {said}. "
                         f"Give --name=another, or remove {folder}")
    return state


def start_log(folder, cfg, first, origin):
    """config.py as resolved; a log that ends at step `first`, where the run goes on, then says `origin`."""
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
    line = {key: round(value, 7) if isinstance(value, float) else value for key, value in line.items()}
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def save(path, state):
    """torch.save that leaves either the old file or the whole new one, whenever it is killed."""
    with configs.replacing(path) as aside:
        torch.save(state, aside)


def last_good(folder):
    """What to say of the checkpoint when a run has to stop: names one only where there is one."""
    path = folder / "last.pt"
    return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"


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
