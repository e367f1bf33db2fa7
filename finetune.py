"""Stage 2: train one of the four downstream tasks from a pre-trained encoder, or from scratch.

    python finetune.py configs/btcv.py --init=runs/ct/encoder.pt --name=btcv
    torchrun --nproc_per_node=4 finetune.py configs/btcv.py --batch=16

Started again with the same name it goes on from runs/<name>/last.pt. runs/<name>/best.pt is the checkpoint that did best on
the validation cases; python evaluate.py configs/btcv.py scores it.
"""
import dataclasses
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import configs
import data
import run
import tasks
from model import WeightsError, load_weights, read_file


@dataclasses.dataclass
class Config(tasks.Config):
    """What training adds; the task's own keys are in tasks.Config. Sources: paper, released code, ours."""
    init: str = ""                  # weights to start from, any kind that model.load_weights knows; "" from scratch
    downsample: str = "legacy"      # how a MONAI-style file merges patches, see model.load_weights
    freeze_encoder: bool = False    # train the rest alone
    layer_decay: float = 1.0        # learning rate times this for each encoder stage away from the decoder; ours: off
    # the moves of training crops, as in pretrain.py; these defaults suit segmentation
    rotation: tuple = (0.0, 0.0, 15.0)  # degrees; ours (released code: quarter turns, probability 0.2)
    scale: tuple = (0.9, 1.1)       # ours
    shear: float = 0.0
    shift: tuple = (0.0, 0.0, 0.0)  # voxels; the crop's place is random already
    flip: tuple = (0.2, 0.2, 0.2)   # released code
    jitter_shift: tuple = (0.5, 0.1)    # released code
    jitter_scale: tuple = (0.1, 0.1)    # released code
    jitter_gamma: tuple = (0.0, 0.0)
    jitter_noise: tuple = (0.0, 0.0)
    jitter_blur: tuple = (0.0, 0.0)
    positive: float = 0.75          # share of crops centred on a labelled voxel; released code: 3 to 1
    crops_per_case: int = 4         # crops of one case in a batch; released code
    balance: float = 0.0            # segmentation of `labels`: cross-entropy weighs a voxel by (share of its class) ** -balance; ours: off
    # optimisation
    steps: int = 72_000             # released code: 3000 epochs x 24 cases / 1 case a step
    warmup: int = 2400              # steps; released code: 100 epochs
    lr: float = 3e-4                # AdamW peak; VoCo (released code 2e-3)
    min_lr: float = 0.0
    decay: float = 1e-5             # weight decay of matrices and kernels; released code
    clip: float = 1.0               # largest gradient norm; ours
    batch: int = 4                  # crops per optimizer step over all processes = cases x crops_per_case
    accumulate: int = 1
    bf16: bool = True               # bfloat16 autocast on GPUs that have it
    compile: bool = False
    log_every: int = 20             # steps
    eval_every: int = 1200          # steps between validations; released code: 50 epochs
    save_every: int = 600           # steps between last.pt


# what a run does not depend on, so that it goes on when they change: where things lie, how fast, how much memory, how it is judged
FREE = ("data", "runs", "cache", "workers", "checkpointing", "accumulate", "compile", "log_every", "save_every", "overlap", "blend",
        "windows", "flips")


def check(cfg, ranks):
    """Refuse a configuration that cannot run, one line, before anything is read."""
    tasks.check(cfg)
    rules = [
        (cfg.batch > 0 and cfg.accumulate > 0 and cfg.batch % (ranks * cfg.accumulate) == 0,
         f"batch = {cfg.batch} does not divide into {ranks} processes x {cfg.accumulate} accumulated passes"),
        (cfg.crops_per_case > 0 and cfg.batch % cfg.crops_per_case == 0,
         f"batch = {cfg.batch} is no multiple of crops_per_case = {cfg.crops_per_case}"),
        (not (cfg.freeze_encoder and not cfg.init), "freeze_encoder without init would keep random weights"),
        (not cfg.init or Path(cfg.init).is_file(), f"init = {cfg.init!r}, no such file"),
        (0 <= cfg.positive <= 1, f"positive = {cfg.positive}, expected 0 to 1"),
        (0 <= cfg.balance <= 1, f"balance = {cfg.balance}, expected 0 to 1"),
        (not cfg.resize or tuple(cfg.resize) == cfg.crop, f"resize = {cfg.resize} and crop = {cfg.crop} must agree"),
        (cfg.task != "classification" or cfg.resize, "classification sees whole scans: give `resize`, the voxels that each is stretched to"),
        (min(cfg.steps, cfg.log_every, cfg.eval_every, cfg.save_every) > 0, "steps, log_every, eval_every, save_every must be above 0"),
        (cfg.balance == 0 or cfg.task == "segmentation" and not cfg.regions, "balance acts on segmentation of `labels` alone"),
    ]
    for fine, text in rules:
        if not fine:
            raise SystemExit(text)


def start_from(network, cfg, say):
    """Load cfg.init and say every difference between the preprocessing it was trained under and the config's."""
    try:
        load_weights(network, cfg.init, cfg.downsample)
        then = read_file(cfg.init).get("preprocessing")
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    if not isinstance(then, dict):
        say(f"{cfg.init} does not say under which preprocessing it was trained")
        return
    for line in tasks.preprocessing_differences(then, cfg):
        say(f"  {line} here")


def groups_of(network, cfg):
    """AdamW groups with their factor of the learning rate: weight decay for matrices alone, layer_decay by encoder stage."""
    groups = {}
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        depth = 0
        if name.startswith("encoder."):
            part = name.split(".")
            depth = 4 - int(part[2]) if part[1] == "stages" else 5
        key = (depth, p.ndim > 1)
        groups.setdefault(key, dict(params=[], factor=cfg.layer_decay ** depth, weight_decay=cfg.decay if p.ndim > 1 else 0.0))
        groups[key]["params"].append(p)
    return list(groups.values())


def validate(network, scans, cfg, device, rank, ranks):
    """The main score over all validation scans, shared out between the ranks."""
    rows = tasks.score_cases(network, scans[rank::ranks], cfg, device)
    network.train()
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, rows)
        rows = sorted(sum(parts, []), key=lambda row: row["id"])
    return tasks.main_score(rows, cfg)


def main(argv):
    cfg = configs.load(Config, argv)
    rank, ranks, local = run.processes()
    say = print if rank == 0 else lambda *_: None
    check(cfg, ranks)
    folder = Path(cfg.runs) / cfg.name
    resolved = dataclasses.asdict(cfg)
    state = run.resume(folder, cfg, FREE)
    first, best = (state["step"], state["best"]) if state else (0, None)
    if first >= cfg.steps:
        say(f"{folder} is complete: {first} steps, best {best}; python evaluate.py scores {folder}/best.pt")
        return
    say(configs.dump(cfg))

    # the cases and their scans: one process a machine fills the cache, before the others are waited for
    parts = tasks.split_cases(cfg)
    say("  ".join(f"{part}: {len(cases)} cases of {len({c['subject'] for c in cases})} subjects" for part, cases in parts.items()))
    used = parts["train"] + parts["val"]
    if local == 0:
        data.open_scans(cfg, used, say)
    device = run.join(ranks, local, folder, first)
    cuda = device.type == "cuda"
    scans = tasks.check_channels(data.open_scans(cfg, used, say), cfg)
    train, val = scans[:len(parts["train"])], scans[len(parts["train"]):]

    # the network
    task = tasks.TASKS[cfg.task]
    torch.manual_seed(cfg.seed)
    network = task.network(cfg).to(device)
    if cfg.init and state is None:
        start_from(network, cfg, say)
    if cfg.freeze_encoder:
        network.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups_of(network, cfg), lr=cfg.lr)
    if state is not None:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"resumed from {folder}/last.pt at step {first}")
    if cfg.compile:
        network.compile()
    model = DistributedDataParallel(network, [local] if cuda else None, forward_sync_buffers=False) if ranks > 1 else network
    bf16 = cfg.bf16 and cuda and torch.cuda.is_bf16_supported(including_emulation=False)

    # the batches
    classes = {case["id"]: case["class"] for case in parts["train"]} if cfg.task == "classification" else None
    crops = data.Crops(train, cfg, cfg.batch, cfg.seed, classes)
    loader = torch.utils.data.DataLoader(crops, batch_sampler=list(run.places(cfg, rank, ranks, first)), num_workers=cfg.workers,
                                         collate_fn=data.collate, pin_memory=cuda)
    batches = iter(loader)
    subjects = sorted({case["subject"] for case in parts["train"]})
    where = run.versions()
    say(f"{ranks} x {where['device']}, {'bfloat16' if bf16 else 'float32'}, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M "
        f"parameters, {len(train)} scans train, {len(val)} choose; batch {cfg.batch} crops of {cfg.crop}; steps {first} to {cfg.steps}")
    if rank == 0:
        run.start_log(folder, cfg, first, where)

    sums, waited, counted = torch.zeros(2, device=device), 0.0, 0
    began = tick = time.time()
    network.train()
    for step in range(first, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr_at(step, cfg) * group["factor"]
        loss, cases = 0.0, []
        for a in range(cfg.accumulate):
            start = time.time()
            batch = next(batches)
            waited += time.time() - start
            cases += batch["id"]
            batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
            with torch.no_grad():
                image, label, target = data.moved_crops(batch, cfg)
            model.require_backward_grad_sync = a == cfg.accumulate - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = tasks.forward(model, image, cfg)
            part = task.loss(output, batch | {"label": label, "target": target}, cfg) / cfg.accumulate
            part.backward()
            loss = loss + part.detach()
        norm = nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
        if not torch.isfinite(loss + norm):
            raise SystemExit(f"step {step}: not finite (loss {loss.item():.4g}, gradient norm {norm.item():.4g}); cases: "
                             f"{', '.join(cases)}; {run.last_good(folder)}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss, norm])
        counted += 1

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            if ranks > 1:
                dist.all_reduce(sums)
            mean, now = (sums / counted / ranks).tolist(), time.time()
            line = dict(step=done, loss=mean[0], grad_norm=mean[1], lr=run.lr_at(step, cfg), crops_per_s=counted * cfg.batch / (now - tick),
                        waiting=waited / (now - tick), memory_gb=run.memory_gb())
            say(f"step {done:6d}  loss {mean[0]:.4f}  grad {mean[1]:.2f}  lr {line['lr']:.2e}  {line['crops_per_s']:.2f} crops/s  waiting "
                f"{line['waiting']:.0%}  {line['memory_gb']:.2f} GB  {run.clock((now - began) / (done - first) * (cfg.steps - done))} left")
            if rank == 0:
                run.write_log(folder, line)
            sums, waited, counted, tick = torch.zeros(2, device=device), 0.0, 0, now
        if done % cfg.eval_every == 0 or done == cfg.steps:
            start = time.time()
            score = validate(network, val, cfg, device, rank, ranks)
            tick += time.time() - start                             # crops per second of training alone
            better = best is None or best != best or score > best   # NaN: nothing could be scored yet
            best = score if better else best
            name = " ".join(task.best[1:])
            say(f"step {done:6d}  val {name} {score:.4f}{'  best so far' if better else ''}")
            if rank == 0:
                run.write_log(folder, {"step": done, "val": score, "metric": name})
                if better:
                    run.save(folder / "best.pt", checkpoint(network, cfg, done, score, subjects, resolved, where))
        if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps):
            run.save(folder / "last.pt", checkpoint(network, cfg, done, best, subjects, resolved, where)
                 | {"optimizer": optimizer.state_dict(), "best": best})
    say(f"{cfg.steps} steps in {run.clock(time.time() - began)}; best val {' '.join(task.best[1:])} {best:.4f}: {folder}/best.pt")
    if ranks > 1:
        del model                                                   # before its process group: the other way round gloo may hang
        dist.destroy_process_group()


def checkpoint(network, cfg, step, score, subjects, resolved, where):
    """Content of best.pt. subjects: those that trained, so that evaluate.py scores nobody of them by mistake."""
    return dict(format="s2dc/finetune", model=network.state_dict(), arguments=network.arguments, preprocessing=data.preprocessing(cfg),
                task=cfg.task, step=step, score=score, subjects=subjects, config=resolved, commit=where["commit"], torch=where["torch"])


if __name__ == "__main__":
    main(sys.argv[1:])
