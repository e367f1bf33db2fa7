"""Stage 1: self-supervised pre-training by S2DC (Pan et al., ICCV 2025, arXiv:2507.02581).

    python pretrain.py configs/demo.py                                  one process
    torchrun --nproc_per_node=8 pretrain.py configs/ct.py --batch=8     eight GPUs; several machines with torchrun's --nnodes

Started again with the same name it goes on from runs/<name>/last.pt. runs/<name>/encoder.pt is what stage 2 reads.
"""
import copy
import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import configs
import data
import losses
import run
from model import Projector, Swin3D, WeightsError, load_weights


@dataclasses.dataclass
class Config(data.Config):
    """Everything a run depends on. Sources of the defaults: paper, released code, MoCo, ours."""
    name: str = "pretrain"          # run folder below `runs`
    runs: str = "runs"
    seed: int = 3407                # released code (fine-tuning)
    # network
    in_channels: int = 1
    feature_size: int = 48          # Swin-B; paper
    depths: tuple = (2, 2, 2, 2)    # paper
    num_heads: tuple = (3, 6, 12, 24)   # paper
    window_size: int = 7            # paper
    v2: bool = True                 # residual convolutions at the head of each stage; released code
    merge: str = "all"              # patch merging; "legacy" to start from an older public checkpoint
    checkpointing: bool = False     # recompute activations in backward: less memory, more time
    init: str = ""                  # encoder weights to start from, any kind that model.load_weights knows
    hidden: int = 2048              # projector width; released code
    embedding: int = 512            # projector output; released code
    # a training sample
    slab: tuple = (384, 384, 96)    # voxels that one step sees of a scan; released code
    crop: tuple = (96, 96, 96)      # voxels of each crop that the network sees, they tile the slab; paper
    # the move from V to V', each drawn uniformly; rotations and shear act in mm, so anisotropic voxels turn rigidly
    rotation: tuple = (5.0, 5.0, 30.0)  # +- degrees about x y z; z: released code, x and y: ours (flat slabs leave the view fast)
    scale: tuple = (0.9, 1.2)       # least and largest zoom per axis; released code, there the same for all axes
    shear: float = 0.05             # +- ratio; ours
    shift: tuple = (24.0, 24.0, 8.0)    # +- voxels along x y z; x and y: released code, z: ours
    flip: tuple = (0.0, 0.0, 0.0)   # probability per axis; ours: off, a mirrored body has its liver on the wrong side
    # the same for the twin of the one crop that L_g compares
    twin_rotation: tuple = (20.0, 20.0, 20.0)   # released code
    twin_scale: tuple = (0.95, 1.05)            # released code
    twin_shear: float = 0.0                     # released code
    twin_shift: tuple = (24.0, 24.0, 24.0)      # released code
    # intensity changes of V' and of the twin: probability, then the range
    jitter_shift: tuple = (0.1, 0.1)    # +- in units of the preprocessed volume; released code
    jitter_scale: tuple = (0.3, 0.1)    # +- ratio; ours
    jitter_gamma: tuple = (0.3, 0.3)    # exponent in [1 / (1 + r), 1 + r], on the volume scaled to its own range; ours
    jitter_noise: tuple = (0.3, 0.03)   # largest standard deviation, same units as shift; ours
    jitter_blur: tuple = (0.2, 1.0)     # largest sigma in voxels; ours
    # objective
    weights: tuple = (1.0, 1.0, 1.0)    # of L_g, L_p2p, L_p2s; paper, Eq. 9 (released code 0.5 each)
    token_patch: int = 8            # voxels a token spans: 2 4 8 16 32 for the five maps; ours (released code 32, its figures 8)
    matching: str = "dual_softmax"  # paper; or "sinkhorn" (released script)
    temperature: float = 0.1        # of Eq. 4; ours (released code: none, that is 1)
    sinkhorn_iterations: int = 100  # released code
    sinkhorn_bin: float = 1.0       # first value of the trainable dustbin score; released code, there never trained
    structure: str = "sum"          # form of Eq. 8: printed, sum, mean, released; see the README's table
    structure_detach: bool = True   # no gradient through the Sharpe weights; ours
    global_temperature: float = 0.2 # of Eq. 1; MoCo v2 (released code 0.9)
    queue: int = 1024               # keys of earlier steps that L_g compares with; ours (released code 90 a sample)
    momentum: float = 0.999         # of the teacher; released code
    # optimisation
    steps: int = 100_000            # paper
    warmup: int = 500               # steps; released code
    lr: float = 3e-4                # AdamW peak; released code
    min_lr: float = 0.0             # at the end of the cosine
    decay: float = 0.1              # weight decay, of matrices and kernels only; released code
    clip: float = 1.0               # largest gradient norm; ours
    batch: int = 1                  # slabs per optimizer step over all processes; released code
    accumulate: int = 1             # forward-backward passes that share one optimizer step
    bf16: bool = True               # bfloat16 autocast on GPUs that have it; ours (released code float32)
    compile: bool = False           # torch.compile the encoders
    # record
    log_every: int = 20             # steps
    save_every: int = 1000          # steps between last.pt
    keep: tuple = ()                # steps whose encoder is kept as encoder-<step>.pt (for pictures of how features evolve)


# what a run does not depend on, so that it goes on when they change: where things lie, how fast, how much memory, what is written
FREE = ("data", "runs", "cache", "workers", "labels", "remap", "checkpointing", "accumulate", "compile", "log_every", "save_every",
        "keep")


class Network(nn.Module):
    """Encoder and the two projectors: the student, and by deep copy the teacher."""

    def __init__(self, cfg):
        super().__init__()
        self.crop, self.level = cfg.crop, int(math.log2(cfg.token_patch)) - 1
        self.encoder = Swin3D(cfg.in_channels, cfg.feature_size, cfg.depths, cfg.num_heads, cfg.window_size, cfg.v2, cfg.merge,
                              cfg.checkpointing)
        self.token_head = Projector(cfg.feature_size * 2 ** self.level, cfg.hidden, cfg.embedding)
        self.global_head = Projector(cfg.feature_size * 16, cfg.hidden, cfg.embedding)
        if cfg.matching == "sinkhorn":
            self.bin_score = nn.Parameter(torch.tensor(cfg.sinkhorn_bin))

    def forward(self, slab, chosen=None, twin=None):
        """slab (b, c, x, y, z) -> tokens (b, t, e) on the slab's one grid, and one embedding (b, e) of a crop per slab:
        of the slab's crop number `chosen` (b,), or of `twin` (b, c, x, y, z), which then passes the encoder as one more crop."""
        x, y, z = self.crop
        b, (ni, nj, nk) = len(slab), [s // c for s, c in zip(slab.shape[2:], self.crop)]
        crops = rearrange(slab, "b c (ni x) (nj y) (nk z) -> (b ni nj nk) c x y z", x=x, y=y, z=z)
        maps = self.encoder(crops if twin is None else torch.cat([crops, twin]))
        tokens = rearrange(maps[self.level][:len(crops)], "(b ni nj nk) c i j k -> b (ni i nj j nk k) c", b=b, ni=ni, nj=nj, nk=nk)
        pooled = reduce(maps[-1], "n c i j k -> n c", "mean")
        if twin is None:
            picked = pooled[torch.arange(b, device=slab.device) * (ni * nj * nk) + chosen]
        else:
            picked = pooled[len(crops):]
        return self.token_head(tokens), self.global_head(picked)


class Queue:
    """The last K teacher embeddings, one per slab, oldest overwritten first; the same on every rank."""

    def __init__(self, length, width, device):
        self.keys, self.count = torch.zeros(length, width, device=device), 0

    def filled(self):
        return self.keys[:min(self.count, len(self.keys))]          # no invented negatives before the first K steps

    def push(self, keys):
        where = (self.count + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[where] = keys
        self.count += len(keys)


def check(cfg, ranks):
    """Refuse what cannot run, one line each, before anything is read or written."""
    rules = [
        (cfg.token_patch in (2, 4, 8, 16, 32), f"token_patch = {cfg.token_patch}, expected 2, 4, 8, 16 or 32"),
        (cfg.matching in ("dual_softmax", "sinkhorn"), f"matching = {cfg.matching!r}, expected 'dual_softmax' or 'sinkhorn'"),
        (cfg.structure in ("printed", "sum", "mean", "released"),
         f"structure = {cfg.structure!r}, expected printed, sum, mean or released"),
        (all(c % 32 == 0 and c >= 64 for c in cfg.crop), f"crop = {cfg.crop}, expected multiples of 32, at least 64"),
        (all(s >= c > 0 and s % c == 0 for s, c in zip(cfg.slab, cfg.crop)),
         f"slab = {cfg.slab} is not tiled by crops of {cfg.crop}"),
        (cfg.accumulate > 0 and cfg.batch > 0 and cfg.batch % (ranks * cfg.accumulate) == 0,
         f"batch = {cfg.batch} does not divide into {ranks} processes x {cfg.accumulate} accumulated passes"),
        (cfg.queue >= cfg.batch, f"queue = {cfg.queue} is shorter than one batch of {cfg.batch}"),
        (cfg.temperature > 0 and cfg.global_temperature > 0, "temperatures must be above 0"),
        (0 <= cfg.momentum <= 1, f"momentum = {cfg.momentum}, expected 0 to 1"),
        (cfg.steps > 0 and cfg.log_every > 0 and cfg.save_every > 0, "steps, log_every and save_every must be above 0"),
        (cfg.lr > 0 and cfg.clip > 0, f"lr = {cfg.lr} and clip = {cfg.clip}, expected both above 0"),
        (min(cfg.warmup, cfg.min_lr, cfg.decay, cfg.seed) >= 0, "warmup, min_lr, decay and seed must not be below 0"),
        (cfg.sinkhorn_iterations > 0, f"sinkhorn_iterations = {cfg.sinkhorn_iterations}, expected at least 1"),
        (not cfg.init or Path(cfg.init).is_file(), f"init = {cfg.init!r}, no such file"),
    ]
    for fine, text in rules:
        if not fine:
            raise SystemExit(text)
    try:
        with torch.device("meta"):                                  # a network of that shape, but without any numbers
            Network(cfg)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def assemble(samples, grid, patch):
    """A batch with its true matches: pairs (m, 3) of Eq. 2-3 among the tokens that lie inside the scan."""
    batch = data.collate(samples)
    valid, valid_ = data.tokens_inside(batch, grid, patch)
    pairs = data.matches(batch["H"], grid, patch)
    b, i, j = pairs.T
    return batch | {"valid": valid, "valid_": valid_, "pairs": pairs[valid[b, i] & valid_[b, j]]}


def main(argv):
    cfg = configs.load(Config, argv)
    rank, ranks, local = run.processes()
    master = rank == 0
    say = print if master else lambda *_: None
    check(cfg, ranks)
    folder = Path(cfg.runs) / cfg.name
    state = run.resume(folder, cfg, FREE)
    first = state["step"] if state else 0
    if first >= cfg.steps:
        say(f"{folder} is complete: {first} steps; its encoder is {folder}/encoder.pt")
        return
    say(configs.dump(cfg))

    # the scans: one process a machine fills the cache, before the others are waited for
    if local == 0:
        scans = data.open_scans(cfg, say=say)
    device = run.join(ranks, local, folder, first)
    cuda = device.type == "cuda"
    if local != 0:
        scans = data.open_scans(cfg, say=say)
    if scans[0].record["channels"] != cfg.in_channels:
        raise SystemExit(f"the scans have {scans[0].record['channels']} channels, in_channels = {cfg.in_channels}")

    # the networks
    torch.manual_seed(cfg.seed)
    student = Network(cfg).to(device)
    if cfg.init and state is None:
        try:
            load_weights(student.encoder, cfg.init)
        except WeightsError as error:
            raise SystemExit(str(error)) from None
    teacher = copy.deepcopy(student).requires_grad_(False)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=cfg.decay), dict(params=vectors, weight_decay=0.0)], lr=cfg.lr)
    queue = Queue(cfg.queue, cfg.embedding, device)
    if state is not None:
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        queue.keys.copy_(state["queue"])
        queue.count = state["queue_count"]
        say(f"resumed from {folder}/last.pt at step {first}")
    if cfg.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    model = DistributedDataParallel(student, [local] if cuda else None, forward_sync_buffers=False) if ranks > 1 else student
    bf16 = cfg.bf16 and cuda and torch.cuda.is_bf16_supported(including_emulation=False)

    # the batches
    grid = tuple(s // cfg.token_patch for s in cfg.slab)
    slabs = data.Slabs(scans, cfg, cfg.batch, cfg.seed)
    loader = torch.utils.data.DataLoader(slabs, batch_sampler=list(run.places(cfg, rank, ranks, first)), num_workers=cfg.workers,
                                         collate_fn=functools.partial(assemble, grid=grid, patch=cfg.token_patch), pin_memory=cuda)
    batches = iter(loader)
    per_crop = math.prod(s // c for s, c in zip(cfg.slab, cfg.crop))
    where = run.versions()
    cached = sum(Path(f"{s.stem}.image.npy").stat().st_size for s in scans)
    say(f"{ranks} x {where['device']}, {'bfloat16' if bf16 else 'float32'}, {len(scans)} scans, cache {cached / 1e9:.2f} GB\n"
        f"encoder {sum(p.numel() for p in student.encoder.parameters()) / 1e6:.2f} M parameters, "
        f"student {sum(p.numel() for p in student.parameters()) / 1e6:.2f} M; "
        f"batch {cfg.batch} slabs x {per_crop} crops = {ranks} ranks x {cfg.accumulate} passes x {cfg.batch // ranks // cfg.accumulate}; "
        f"{math.prod(grid)} tokens a slab; steps {first} to {cfg.steps}")
    if master:
        run.start_log(folder, cfg, first, where)

    sums, waited, counted, tick = {}, 0.0, 0, time.time()
    began = tick
    for step in range(first, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr_at(step, cfg)
        new_keys, terms, cases = [], {}, []
        for a in range(cfg.accumulate):
            start = time.time()
            batch = next(batches)
            waited += time.time() - start
            cases += batch["id"]
            batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
            with torch.no_grad():
                V, V_, twin = data.views(batch, cfg)                # V' is made from the tissue around the slab
            tiles = batch["crop"] // torch.tensor(cfg.crop, device=device)
            chosen = (tiles[:, 0] * grid_of(cfg)[1] + tiles[:, 1]) * grid_of(cfg)[2] + tiles[:, 2]
            model.require_backward_grad_sync = a == cfg.accumulate - 1  # gradients travel once per optimizer step
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens, query = model(V, chosen)                    # (b, t, e), (b, e)
                with torch.no_grad():
                    tokens_, key = teacher(V_, twin=twin)           # (b, t, e), (b, e)
            out = losses.s2dc_loss(tokens, tokens_, batch["pairs"], query, key, queue.filled(), weights=cfg.weights,
                                   matching=cfg.matching, temperature=cfg.temperature, global_temperature=cfg.global_temperature,
                                   form=cfg.structure, detach=cfg.structure_detach, valid=batch["valid"], valid_=batch["valid_"],
                                   bin_score=getattr(student, "bin_score", None), iterations=cfg.sinkhorn_iterations)
            (out["loss"] / cfg.accumulate).backward()
            new_keys.append(nn.functional.normalize(key.float(), dim=-1))
            for name, value in out.items():
                terms[name] = terms.get(name, 0) + value.detach() / cfg.accumulate
        norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        if not torch.isfinite(norm + terms["loss"]):                # nothing of this step reaches the weights or the disk
            values = ", ".join(f"{k} {v.item():.4g}" for k, v in terms.items())
            raise SystemExit(f"step {step}: not finite ({values}, gradient norm {norm.item():.4g}); "
                             f"cases: {', '.join(cases)}; {run.last_good(folder)}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters()):
                slow.lerp_(fast, 1 - cfg.momentum)
        queue.push(gathered(torch.cat(new_keys), ranks))
        for name, value in (terms | {"grad_norm": norm}).items():
            sums[name] = sums.get(name, 0) + value.float()
        counted += 1

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            means = average(sums, counted, ranks)
            now = time.time()
            line = dict(step=done) | means | dict(lr=run.lr_at(step, cfg), slabs_per_s=counted * cfg.batch / (now - tick),
                                                  waiting=waited / (now - tick), memory_gb=run.memory_gb())
            if master:
                left = run.clock((now - began) / (done - first) * (cfg.steps - done))
                say(report(line) + f"  {left} left")
                run.write_log(folder, line)
            sums, waited, counted, tick = {}, 0.0, 0, now
        if master and done in cfg.keep:
            run.save(folder / f"encoder-{done}.pt", exported(student, cfg, done, where))
        if master and (done % cfg.save_every == 0 or done == cfg.steps):
            run.save(folder / "encoder.pt", exported(student, cfg, done, where))
            run.save(folder / "last.pt", dict(format="s2dc/pretrain", student=student.state_dict(), teacher=teacher.state_dict(),
                                       optimizer=optimizer.state_dict(), queue=queue.keys, queue_count=queue.count, step=done,
                                       arguments=student.encoder.arguments, preprocessing=data.preprocessing(cfg), config=dataclasses.asdict(cfg)))
    say(f"{cfg.steps} steps in {run.clock(time.time() - began)}; encoder: {folder}/encoder.pt")
    if ranks > 1:
        del model                                                   # before its process group: the other way round gloo may hang
        dist.destroy_process_group()


def grid_of(cfg):
    return tuple(s // c for s, c in zip(cfg.slab, cfg.crop))        # crops along x y z


def gathered(keys, ranks):
    """Keys of all ranks (batch, e) in the order of their places in the global batch."""
    if ranks == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(ranks)]
    dist.all_gather(parts, keys)
    return torch.cat(parts)


def average(sums, counted, ranks):
    """Means over the steps since the last line and over the ranks, as floats."""
    values = torch.stack([sums[k].double() for k in sums]) / counted
    if ranks > 1:
        values = values.float()
        dist.all_reduce(values)
        values = values / ranks
    return dict(zip(sums, values.tolist()))


def exported(student, cfg, step, where):
    return dict(format="s2dc/encoder", encoder=student.encoder.state_dict(), arguments=student.encoder.arguments,
                preprocessing=data.preprocessing(cfg), step=step, name=cfg.name, commit=where["commit"], torch=where["torch"])


def report(line):
    return (f"step {line['step']:6d}  loss {line['loss']:.4f}  L_g {line['global']:.4f}  L_p2p {line['p2p']:.4f}  "
            f"L_p2s {line['p2s']:.4f}  matches/token {line['matches']:.2f}  accuracy {line['accuracy']:.3f}  "
            f"spread {line['spread']:.3f}  lr {line['lr']:.2e}  grad {line['grad_norm']:.2f}  {line['slabs_per_s']:.2f} slabs/s  "
            f"waiting {line['waiting']:.0%}  {line['memory_gb']:.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
