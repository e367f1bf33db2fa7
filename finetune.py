"""Stage 2: train one of the four downstream tasks from a pre-trained encoder, or from scratch.

    python finetune.py configs/btcv.py --init=runs/ct/encoder.pt --name=btcv
    torchrun --nproc_per_node=4 finetune.py configs/btcv.py --batch=16

Started again with the same name it goes on from runs/<name>/last.pt. runs/<name>/best.pt is the
checkpoint that did best on the validation cases; python evaluate.py configs/btcv.py scores it.
"""
import dataclasses
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import configs
import data
import run
import tasks
from model import WeightsError, load_weights, read_file


@dataclasses.dataclass
class Config(tasks.Config):
    """What training adds; the task's own keys are in tasks.Config. Sources: paper, released code, ours."""
    init: str = ""                  # weights to start from, as model.load_weights knows them; "" from scratch
    freeze_encoder: bool = False    # train the rest alone
    layer_decay: float = 1.0        # learning rate times this for each stage away from the decoder; ours: off
    # the moves of training crops, as in pretrain.py; these defaults suit segmentation
    rotation: tuple = (0.0, 0.0, 15.0)  # degrees; ours (released code: quarter turns, probability 0.2)
    scale: tuple = (0.9, 1.1)       # ours
    shear: float = 0.0
    shift: tuple = (0.0, 0.0, 0.0)  # voxels; the crop's place is random already
    flip: tuple = (0.2, 0.2, 0.2)   # released code; where labels name sides, better none along x
    jitter_shift: tuple = (0.5, 0.1)    # released code
    jitter_scale: tuple = (0.1, 0.1)    # released code
    jitter_gamma: tuple = (0.0, 0.0)
    jitter_noise: tuple = (0.0, 0.0)
    jitter_blur: tuple = (0.0, 0.0)
    positive: float = 0.75          # share of crops centred on a labelled voxel; released code: 3 to 1
    crops_per_case: int = 4         # crops of one case in a batch; released code
    balance: float = 0.0            # of `labels`: a voxel weighs (share of its class) ** -balance; ours: off
    # optimisation
    steps: int = 72_000             # released code: 3000 epochs x 24 cases / 1 case a step
    warmup: int = 2400              # steps; released code: 100 epochs
    lr: float = 3e-4                # AdamW peak; VoCo (released code 2e-3)
    min_lr: float = 0.0
    decay: float = 1e-5             # weight decay of matrices, position tables, kernels; released code
    clip: float = 1.0               # largest gradient norm; ours
    batch: int = 4                  # crops per optimizer step over all processes = cases x crops_per_case
    accumulate: int = 1
    bf16_cpu: bool = False          # bfloat16 in training on CPUs that have it (AMX, AVX512-BF16), too
    compile: bool = False
    log_every: int = 20             # steps
    eval_every: int = 1200          # steps between validations; released code: 50 epochs
    save_every: int = 600           # steps between last.pt


# a run goes on when these change: where things lie, how fast, how much memory, how it is judged; it depends
# on every other key
FREE = ("name", "data", "runs", "cache", "workers", "checkpointing", "accumulate", "compile", "log_every",
        "save_every", "overlap", "blend", "windows", "flips")


def check(cfg, ranks):
    """Refuse a configuration that cannot run, one line, before anything is read."""
    tasks.check(cfg)
    run.check_training(cfg, ranks)
    run.refuse([
        (cfg.crops_per_case > 0 and cfg.batch % cfg.crops_per_case == 0,
         f"batch = {cfg.batch} is no multiple of crops_per_case = {cfg.crops_per_case}; crops_per_case = 1 "
         "takes each crop from another case"),
        (cfg.init or not cfg.freeze_encoder, "freeze_encoder without init would keep random weights"),
        (0 <= cfg.positive <= 1, f"positive = {cfg.positive}, expected 0 to 1"),
        (0 <= cfg.balance <= 1, f"balance = {cfg.balance}, expected 0 to 1"),
        (not cfg.resize or tuple(cfg.resize) == cfg.crop,
         f"resize = {cfg.resize} and crop = {cfg.crop} must agree"),
        (cfg.task != "classification" or cfg.resize,
         "classification sees whole scans: give `resize`, the voxels that each is stretched to"),
        (cfg.eval_every > 0, "eval_every must be above 0"),
        (cfg.balance == 0 or (cfg.task == "segmentation" and not cfg.regions),
         "balance acts on segmentation of `labels` alone"),
        (cfg.network in ("swin_unetr", "unetr"),
         f"network = {cfg.network!r}, expected 'swin_unetr' or 'unetr'"),
        (cfg.network != "unetr" or cfg.task != "classification", "a UNETR classifies nothing"),
    ])
    try:
        with torch.device("meta"):                                  # that shape, but without any numbers
            tasks.TASKS[cfg.task].network(cfg)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def tell_moves(cfg, say):
    """Lines on changes of the training crops that do not suit what is to be learned."""
    if cfg.flip[0] > 0 and (names := tasks.sided(cfg)):
        say(f"flip = {cfg.flip} mirrors left and right, but labels name sides ({names[0]!r}): a mirror image "
            f"keeps its name; flip = {(0.0, *cfg.flip[1:])} leaves sides as they are")
    if cfg.task in ("reconstruction", "translation") and max(cfg.jitter_shift[0], cfg.jitter_scale[0]) > 0:
        say(f"jitter_shift = {cfg.jitter_shift}, jitter_scale = {cfg.jitter_scale} change the input and not "
            "what is to be predicted; where their values belong together give (0.0, 0.0) for both")


def check_split(path, then, parts, cfg):
    """Refuse cases that choose or are reported and trained the checkpoint `then` of `path`, with labels."""
    for part in ("val", "test"):
        if ids := [case["id"] for case in tasks.used_by(then, "train", parts[part], cfg)]:
            raise SystemExit(f"{path}: {len(ids)} of the {len(parts[part])} {part} cases trained it: "
                             f"{', '.join(ids[:4])}; give the split, and the scans, of its training, or "
                             "begin with another file")


def tell_other_cases(state, parts, cfg, say):
    """A line for each part in which a resumed run has other cases than it had."""
    for part, before in state.get("cases", {}).items():
        now, new = len(parts[part]), len(parts[part]) - len(tasks.used_by(state, part, parts[part], cfg))
        if new or now != before:
            say(f"{part}: not the cases that this run had: {before} then, {now} now, {new} of them new")


def origin_of(then, parts, cfg):
    """Who was used, as a checkpoint keeps it: the cases of this run, and those of the checkpoint `then` that
    it goes on from or began with ({}: none). {"subjects", "chose": of this data set, "files": {part:
    [data.known_as]}, "cases": {part: number, of this run alone}, "seen": by a pre-training}."""
    ours = then if str(then.get("format")).startswith("s2dc/") else {}
    same = ours.get("config", {}).get("dataset") == cfg.dataset
    origin = dict(files={}, cases={}, seen=sorted(ours.get("seen", ())))
    for part, key in tasks.USED.items():
        subjects = {case["subject"] for case in parts[part]}
        files = [data.known_as(file, cfg) for case in parts[part] for file in case["images"]]
        origin[key] = sorted(subjects.union(ours.get(key, ()) if same else ()))
        origin["files"][part] = sorted(set(ours.get("files", {}).get(part, ())).union(*files))
        origin["cases"][part] = len(parts[part])
    return origin


def start_from(network, cfg, parts, say):
    """Load cfg.init -> its content; say which cases of val and test it has seen, and how its preprocessing
    differs. Refuses those that trained it."""
    try:
        load_weights(network, cfg.init, cfg.downsample)
        stored = read_file(cfg.init)
        then, seen = stored.get("preprocessing"), set(stored.get("seen", ()))
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    check_split(cfg.init, stored, parts, cfg)
    for part in ("val", "test"):
        files = [case["images"] + case["targets"] for case in parts[part]]
        if count := sum(any(data.known_as(file, cfg) & seen for file in each) for each in files):
            say(f"{cfg.init} was pre-trained on {count} of the {len(files)} {part} cases, without their "
                "labels")
    if not isinstance(then, dict):
        say(f"{cfg.init} does not say under which preprocessing it was trained")
    for line in run.preprocessing_differences(then, data.preprocessing(cfg)):
        say(f"  {line} here")
    return stored


def groups_of(network, cfg):
    """AdamW groups with their factor of the learning rate: layer_decay by stage; only matrices decay."""
    groups = {}
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        depth = 0
        if name.startswith("encoder."):
            part = name.split(".")
            depth = 4 - int(part[2]) if part[1] == "stages" else 5
        decay = cfg.decay if p.ndim > 1 else 0.0
        new = dict(params=[], factor=cfg.layer_decay ** depth, weight_decay=decay)
        groups.setdefault((depth, p.ndim > 1), new)["params"].append(p)
    return list(groups.values())


def validate(network, scans, cfg, device, rank, ranks):
    """The main score over all validation scans, shared out between the ranks."""
    rows = [tasks.score_case(network, scan, cfg, device)[1] for scan in scans[rank::ranks]]
    network.train()
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, rows)
        rows = sorted(sum(parts, []), key=lambda row: row["id"])
    return tasks.main_score(rows, cfg)


def open_scans(cfg, ranks, local, folder, first, say):
    """(cases by part, scans that train, that choose, device); one process a machine fills the cache first."""
    parts = tasks.split_cases(cfg)
    say("  ".join(f"{part}: {len(cases)} cases of {len({case['subject'] for case in cases})} subjects"
                  for part, cases in parts.items()))
    used, n = parts["train"] + parts["val"], len(parts["train"])
    device = run.join(ranks, local, folder, first, lambda: data.open_scans(cfg, used, say))
    scans = tasks.check_channels(data.open_scans(cfg, used, run.silent), cfg)
    return parts, scans[:n], scans[n:], device


def crops_of(scans, cases, cfg):
    """The training crops; those of classification know the class of their case."""
    classes = None
    if cfg.task == "classification":
        classes = {case["id"]: case["class"] for case in cases}
    return data.Crops(scans, cfg, cfg.batch, cfg.seed, classes)


def build(cfg, device, new, parts, say):
    """Network and optimizer before the first step, {} or the content of cfg.init that it starts from."""
    torch.manual_seed(cfg.seed)
    network = tasks.TASKS[cfg.task].network(cfg).to(device)
    began = start_from(network, cfg, parts, say) if new and cfg.init else {}
    if cfg.freeze_encoder:
        network.encoder.requires_grad_(False)
    if cfg.compile:
        network.compile(dynamic=False)
    return network, torch.optim.AdamW(groups_of(network, cfg), lr=cfg.lr), began


def restore(state, network, optimizer):
    """What a resumed run takes from last.pt beside step and best score; the keys are those of save_state."""
    with run.of_this_version(state):
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


def beyond(path, first, best, say):
    """The best score so far, that of a best.pt from steps after `first`, which are now done again, as well:
    it stays until it is beaten."""
    if not path.exists() or (kept := read_file(path))["step"] <= first:
        return best
    say(f"{path} is of step {kept['step']}, which this run does again, and scored {kept['score']:.4f}; it "
        "stays unless a later one scores more")
    return kept["score"]


def save_state(path, kept, optimizer, best):
    """last.pt: a checkpoint as best.pt is one, and what restore and run.resume read beside it."""
    run.save(path, kept | {"optimizer": optimizer.state_dict(), "best": best}, keep=True)


def checkpoint(network, cfg, step, score, origin):
    """Content of best.pt. Of origin "subjects": who trained, so that evaluate.py scores nobody of them by
    mistake; "chose": whose scores made it the best, so that evaluate.py says so where it reports them;
    "files": data.known_as of both, for subjects may have other names under another config."""
    return dict(format="s2dc/finetune", model=network.state_dict(), arguments=network.arguments,
                preprocessing=data.preprocessing(cfg), task=cfg.task, step=step, score=score,
                **{key: origin[key] for key in ("subjects", "chose", "files", "cases", "seen")},
                config=dataclasses.asdict(cfg), commit=origin["commit"], torch=origin["torch"])


def main(argv):
    cfg = configs.load(Config, argv)
    rank, ranks, local = run.processes()
    say = print if rank == 0 else run.silent
    check(cfg, ranks)
    folder = Path(cfg.runs) / cfg.name
    state = run.resume(folder, cfg, FREE, say)
    first, best = (state["step"], state["best"]) if state else (0, None)
    if first >= cfg.steps:
        say(f"{folder} is complete: {first} steps, best {best}; python evaluate.py scores {folder}/best.pt")
        return
    say(configs.differing(cfg))
    tell_moves(cfg, say)
    parts, train, val, device = open_scans(cfg, ranks, local, folder, first, say)
    network, optimizer, began = build(cfg, device, state is None, parts, say)
    if state is not None:
        check_split(folder / "last.pt", state, parts, cfg)
        tell_other_cases(state, parts, cfg, say)
        restore(state, network, optimizer)
        say(f"resumed from {folder}/last.pt at step {first}")
        best = beyond(folder / "best.pt", first, best, say)
    model = run.parallel(network, ranks, device)
    bf16 = run.bfloat16(cfg, device)
    task = tasks.TASKS[cfg.task]
    batches = run.batches(crops_of(train, parts["train"], cfg), cfg, rank, ranks, first, data.collate)
    metric = " ".join(task.best[1:])
    origin = run.versions()
    say(f"{ranks} x {origin['device']}, {run.products(bf16, device)}, "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {len(train)} scans train, "
        f"{len(val)} choose; batch {cfg.batch} crops of {cfg.crop}; steps {first} to {cfg.steps}")
    lock = run.start_log(folder, cfg, first, origin) if rank == 0 else None
    origin |= origin_of(state or began, parts, cfg)                 # not for the log

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
            batch = run.to_device(batch, device)
            with torch.no_grad():
                image, label, target = data.moved_crops(batch, cfg)
            model.require_backward_grad_sync = a == cfg.accumulate - 1  # gradients travel once
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = tasks.forward(model, image, cfg)
            part = task.loss(output, batch | {"label": label, "target": target}, cfg) / cfg.accumulate
            part.backward()
            loss = loss + part.detach()
        norm = nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
        if not torch.isfinite(loss + norm):         # nothing of this step reaches the weights or the disk
            values = f"loss {loss.item():.4g}, gradient norm {norm.item():.4g}"
            run.diverged(folder, step, f"{values}; cases: {', '.join(cases)}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss, norm])
        counted += 1

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            if ranks > 1:
                dist.all_reduce(sums)
            mean, now = (sums / counted / ranks).tolist(), time.time()
            line = dict(step=done, loss=mean[0], grad_norm=mean[1], lr=run.lr_at(step, cfg),
                        crops_per_s=counted * cfg.batch / (now - tick), waiting=waited / (now - tick),
                        memory_gb=run.memory_gb())
            left = run.clock((now - began) / (done - first) * (cfg.steps - done))
            say(f"step {done:6d}  loss {mean[0]:.4f}  grad {mean[1]:.2f}  lr {line['lr']:.2e}  "
                f"{line['crops_per_s']:.2f} crops/s  waiting {line['waiting']:.0%}  "
                f"{line['memory_gb']:.2f} GB  {left} left")
            if rank == 0:
                run.write_log(folder, line)
            sums, waited, counted, tick = torch.zeros(2, device=device), 0.0, 0, now
        if done % cfg.eval_every == 0 or done == cfg.steps:
            start = time.time()
            score = validate(network, val, cfg, device, rank, ranks)
            tick += time.time() - start                             # crops per second of training alone
            better = best is None or best != best or score > best   # NaN: nothing could be scored yet
            best = score if better else best
            say(f"step {done:6d}  val {metric} {score:.4f}{'  best so far' if better else ''}")
            if rank == 0:
                run.write_log(folder, {"step": done, "val": score, "metric": metric})
                if better:
                    run.save(folder / "best.pt", checkpoint(network, cfg, done, score, origin))
        if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps):
            kept = checkpoint(network, cfg, done, best, origin)
            save_state(folder / "last.pt", kept, optimizer, best)
    say(f"{cfg.steps} steps in {run.clock(time.time() - began)}; "
        f"best val {metric} {best:.4f}: {folder}/best.pt")
    del lock            # another process may train under this name now
    if ranks > 1:
        del model       # before its process group: the other way round gloo may hang
        dist.destroy_process_group()


if __name__ == "__main__":
    run.program(main)
