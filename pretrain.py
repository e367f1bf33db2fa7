"""Stage 1: self-supervised pre-training by S2DC (Pan et al., ICCV 2025, arXiv:2507.02581).

    python pretrain.py configs/demo.py                                  one process
    torchrun --nproc_per_node=8 pretrain.py configs/ct.py --batch=8     eight GPUs; --nnodes: more machines

Started again with the same name it goes on from runs/<name>/last.pt; stage 2 reads runs/<name>/encoder.pt, or
network.pt beside it where the decoder learned as well (--decoder=True).
"""
import copy
import dataclasses
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import configs
import data
import losses
import run
from model import Projector, Swin3D, SwinUNETR, WeightsError, load_weights, read_file


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
    init: str = ""                  # weights to start from, of any kind that model.load_weights knows
    downsample: str = "legacy"      # how a MONAI-style file of them merges patches, see model.load_weights
    hidden: int = 2048              # width of the tokens' projector; released code
    embedding: int = 512            # output of both heads; released code
    # a training sample
    slab: tuple = (384, 384, 96)    # voxels that one step sees of a scan; released code
    crop: tuple = (96, 96, 96)      # voxels of each crop that the network sees, they tile the slab; paper
    fill_share: float = 0.3         # least mean share of the slab that the scans fill, else it is refused
    # the move from V to V', drawn uniformly; rotations and shear act in mm: anisotropic voxels turn rigidly
    rotation: tuple = (5.0, 5.0, 30.0)  # +- degrees about x y z; z: released code; x y: ours (slabs are flat)
    scale: tuple = (0.9, 1.2)       # least and largest zoom per axis; released code: one for all axes
    shear: float = 0.05             # +- ratio; ours
    shift: tuple = (24.0, 24.0, 8.0)    # +- voxels along x y z; x and y: released code, z: ours
    flip: tuple = (0.0, 0.0, 0.0)   # probability per axis; ours: off, a mirrored liver is on the wrong side
    # the same for the twin of the one crop that L_g compares
    twin_rotation: tuple = (20.0, 20.0, 20.0)   # ours (released code: in plane)
    twin_scale: tuple = (0.95, 1.05)            # released code
    twin_shear: float = 0.0                     # released code
    twin_shift: tuple = (24.0, 24.0, 24.0)      # ours (released code: in plane)
    # intensity changes of V' and of the twin: probability, then the range
    jitter_shift: tuple = (0.1, 0.1)    # +- in units of the preprocessed volume; released code
    jitter_scale: tuple = (0.3, 0.1)    # +- ratio; ours
    jitter_gamma: tuple = (0.3, 0.3)    # exponent in [1 / (1 + r), 1 + r], in the volume's own range; ours
    jitter_noise: tuple = (0.3, 0.03)   # largest standard deviation, same units as shift; ours
    jitter_blur: tuple = (0.2, 1.0)     # largest sigma in voxels; ours
    # objective
    weights: tuple = (1.0, 1.0, 1.0)    # of L_g, L_p2p, L_p2s; paper, Eq. 9 (released code 0.5 each)
    token_patch: int = 8            # voxels a token spans: 2 4 8 16 32 by map; ours (released code 32)
    decoder: bool = False           # token losses half on Swin-UNETR's decoder's map of such tokens; ours
    tokens: str = "body"            # that take part: of the body, or all "inside" the scan; ours (paper: all)
    matching: str = "dual_softmax"  # paper; or "sinkhorn" (released script)
    temperature: float = 0.1        # of Eq. 4; ours (released code: none, that is 1)
    sinkhorn_iterations: int = 100  # released code
    sinkhorn_bin: float = 1.0       # first value of the dustbin score, trained; released code: fixed
    structure: str = "sum"          # form of Eq. 8: printed, sum, mean, released; see the README's table
    structure_detach: bool = True   # no gradient through the Sharpe weights; ours
    global_temperature: float = 0.2 # of Eq. 1; MoCo v2 (released code 0.9)
    negatives: str = "step"         # of L_g: this step's other crops; paper: "queue"; or "both"; ours
    queue: int = 1024               # earlier keys in the queue; ours (released code 90 a sample)
    momentum: float = 0.999         # of the teacher; released code
    # optimisation
    steps: int = 100_000            # paper
    warmup: int = 500               # steps; released code
    lr: float = 3e-4                # AdamW peak; released code
    min_lr: float = 0.0             # at the end of the cosine
    decay: float = 0.1              # weight decay, of matrices, position tables, kernels; released code
    clip: float = 1.0               # largest gradient norm; ours
    batch: int = 1                  # slabs per optimizer step over all processes; released code
    accumulate: int = 1             # forward-backward passes that share one optimizer step
    bf16: bool = True               # bfloat16 autocast on GPUs that have it; ours (released code float32)
    bf16_cpu: bool = False          # the same on CPUs that have it (AMX, AVX512-BF16); ours
    compile: bool = False           # torch.compile the encoders
    # record
    log_every: int = 20             # steps
    save_every: int = 1000          # steps between last.pt
    keep: tuple = ()                # steps whose encoder stays as encoder-<step>.pt, to see features evolve


# a run goes on when these change: where things lie, how fast, how much memory, what is written; it depends on
# every other key
FREE = ("name", "data", "runs", "cache", "workers", "labels", "remap", "checkpointing", "accumulate",
        "compile", "fill_share", "log_every", "save_every", "keep")


class Standard(nn.Module):
    """Pooled features (.., c) less their mean, over their deviation: both followed from step to step.

    The pooled features of crops are nearly alike. Without this the quickest way down for L_g is to make all
    embeddings equal, where its gradient ends. The released code's projectors have batch norms, which do the
    same, but of a batch of the one process; here the numbers are those of all processes and earlier steps.
    """

    def __init__(self, channels, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        return (x - self.mean) / (self.variance + 1e-5).sqrt()

    @torch.no_grad()
    def follow(self, x):
        """Move towards the features x (n, c) of a step; rows of 0 were not made."""
        x = x[(x != 0).any(dim=1)]
        new = 1 - torch.clamp(self.steps / (self.steps + 1), max=self.momentum)     # at first a plain mean
        self.mean.lerp_(x.mean(dim=0), new)
        self.variance.lerp_((x - self.mean).square().mean(dim=0), new)
        self.steps += 1


class Network(nn.Module):
    """Encoder, decoder if that learns, heads for tokens and one for crops: the student, by deep copy the
    teacher."""

    def __init__(self, cfg):
        super().__init__()
        self.crop, self.level, self.compiled = cfg.crop, int(math.log2(cfg.token_patch)) - 1, cfg.compile
        keys = "feature_size", "depths", "num_heads", "window_size", "v2", "merge", "checkpointing"
        swin, width = {key: getattr(cfg, key) for key in keys}, cfg.feature_size * 2 ** self.level
        self.swin_unetr = SwinUNETR(cfg.in_channels, 1, **swin) if cfg.decoder else None
        self.encoder = self.swin_unetr.encoder if cfg.decoder else Swin3D(cfg.in_channels, **swin)
        self.token_head = Projector(width, cfg.hidden, cfg.embedding)
        self.standard = Standard(cfg.feature_size * 16)
        self.global_head = nn.Linear(cfg.feature_size * 16, cfg.embedding, bias=False)
        if cfg.matching == "sinkhorn":
            self.bin_score = nn.Parameter(torch.tensor(cfg.sinkhorn_bin))
        if cfg.decoder:
            self.decoder_head, self.ups = Projector(width, cfg.hidden, cfg.embedding), 4 - self.level
            for name, p in self.swin_unetr.named_parameters():
                p.requires_grad_(learns(name, self.ups))
        elif not cfg.weights[0]:     # L_g alone sees what lies behind the tokens' map: it would decay
            self.encoder.stages[self.level:].requires_grad_(False)

    def forward(self, slab, keep, twin=None):
        """Encode the crops of a slab that `keep` names, and a moved crop of each slab.

        slab (b, c, x, y, z);  keep (b, n) bool, n crops, the last axis first;  twin (b, c, x, y, z) or None
        -> tokens (b, t, e) on the slab's one grid, with a decoder (2 b, t, e): its tokens after all of the
        encoder's; embeddings (b, n, e) and pooled features (b, n, f), with the twin's at the end (b, n + 1,
        ..). Of the other crops all are 0.
        """
        (x, y, z), b = self.crop, len(slab)
        ni, nj, nk = (s // c for s, c in zip(slab.shape[2:], self.crop))
        crops = rearrange(slab, "b c (ni x) (nj y) (nk z) -> (b ni nj nk) c x y z", x=x, y=y, z=z)
        # a compiled encoder is given all, for it wants batches of one size; what is made of the others goes
        kept = rearrange(keep | self.compiled, "b n -> (b n)").nonzero().squeeze(1)
        maps = self.encoder(torch.cat([crops[kept], crops[:0] if twin is None else twin]))
        of_slabs = [x[:len(kept)] for x in maps]
        found, tokens = [(self.token_head, of_slabs[self.level])], []
        if self.swin_unetr is not None:         # no norm takes an empty batch; both maps have one shape
            decoded = self.swin_unetr.decode(of_slabs, self.ups) if len(kept) else of_slabs[self.level]
            found.append((self.decoder_head, decoded))
        for head, x in found:
            fine = head(rearrange(x, "n c i j k -> n i j k c"))
            fine = fine.new_zeros(len(crops), *fine.shape[1:]).index_copy(0, kept, fine)
            tokens.append(rearrange(fine, "(b ni nj nk) i j k e -> b (ni i nj j nk k) e", b=b, ni=ni, nj=nj,
                                    nk=nk))
        pooled = reduce(maps[-1], "n c i j k -> n c", "mean")
        parts = []
        for x in (self.global_head(self.standard(pooled)), pooled.detach()):
            part = rearrange(x.new_zeros(len(crops), x.shape[1]).index_copy(0, kept, x[:len(kept)]),
                             "(b n) e -> b n e", b=b).masked_fill(~rearrange(keep, "b n -> b n 1"), 0)
            parts.append(torch.cat([part, rearrange(x[len(kept):], "(b n) e -> b n e", b=b)], dim=1))
        return torch.cat(tokens), *parts


def learns(name, ups):
    """Whether a tensor of SwinUNETR has a say in the map that the first `ups` steps of its decoder make."""
    part, index = (*name.split("."), "")[:2]
    return part in ("encoder", "bottom") or (part, index) in (
        *(("ups", str(k)) for k in range(ups)), *(("skips", str(k)) for k in range(5 - ups, 4)))


class Queue:
    """The last K teacher embeddings, one per slab, oldest overwritten first; the same on every rank."""

    def __init__(self, length, width, device):
        self.keys, self.count = torch.zeros(length, width, device=device), 0
        self.subjects = torch.zeros(length, dtype=torch.long, device=device)

    def filled(self):
        """Keys (k, e) and their subjects (k,), k at most K: none invented before the first K."""
        length = min(self.count, len(self.keys))
        return self.keys[:length], self.subjects[:length]

    def push(self, keys, subjects):
        slots = (self.count + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[slots], self.subjects[slots] = keys, subjects
        self.count += len(keys)


def others_of_step(keys, subjects, places, apart):
    """The negatives that one step has for L_g, all keys of the one teacher of now.

    keys (batch, n + 1, e) of all ranks: the crops of each V', 0 where none was made, and its twin at the end;
    subjects (batch,); of this pass's queries places (b,) in the batch, apart (b, n) bool: which crops of its
    own V' lie apart from the query's crop -> negatives (batch (n + 1), e), allowed (b, batch (n + 1)) bool:
    nothing of the query's subject but those.
    """
    made = (keys != 0).any(dim=2)                                   # (batch, n + 1)
    other = rearrange(subjects[places], "b -> b 1") != subjects     # (b, batch)
    allowed = rearrange(other, "b m -> b m 1") & made
    own = torch.arange(len(places), device=keys.device)
    allowed[own, places, :-1] = made[places, :-1] & apart
    return rearrange(keys, "m n e -> (m n) e"), rearrange(allowed, "b m n -> b (m n)")


def negatives_of(cfg, step_keys, step_allowed, queue, subjects):
    """What Eq. 1 compares with: (K, e) and allowed (b, K); subjects (b,) of the queries."""
    old, whose = queue.filled()
    old_allowed = rearrange(subjects, "b -> b 1") != whose
    if cfg.negatives == "step":
        return step_keys, step_allowed
    if cfg.negatives == "queue":
        return old, old_allowed
    return torch.cat([step_keys, old]), torch.cat([step_allowed, old_allowed], dim=1)


@torch.no_grad()
def taught(batch, teacher, cfg, device, bf16):
    """The batch on the device, V, and of the teacher the tokens of V', the unit keys of its crops and the
    twin, and their pooled features."""
    batch = run.to_device(batch, device)
    V, V_, twin = data.views(batch, cfg)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        tokens_, keys, pooled = teacher(V_, crops_seen(batch["valid_"], cfg), twin)
    return batch, V, tokens_, nn.functional.normalize(keys.float(), dim=-1), pooled.float()


@torch.no_grad()
def follow(teacher, student, momentum):
    """The teacher's weights as an exponential moving average of the student's."""
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.lerp_(fast, 1 - momentum)


def of_maps(batch, maps):
    """A batch's pairs (m, 3), valid and valid_ (b, t), once for each of the maps whose tokens lie behind one
    another: (maps m, 3), the sample of map k counted from k b, and twice (maps b, t)."""
    valid, valid_ = (repeat(batch[name], "b t -> (maps b) t", maps=maps) for name in ("valid", "valid_"))
    first = torch.arange(maps, device=valid.device) * len(batch["valid"])           # sample of each map
    offset = F.pad(rearrange(first, "maps -> maps 1 1"), (0, 2))                    # b, i, j
    return rearrange(batch["pairs"] + offset, "maps m bij -> (maps m) bij"), valid, valid_


def crops_seen(valid, cfg):
    """(b, n) bool: the crops of a slab with a token that takes part, of valid (b, t)."""
    ni, nj, nk = (s // c for s, c in zip(cfg.slab, cfg.crop))
    i, j, k = (c // cfg.token_patch for c in cfg.crop)
    each = rearrange(valid, "b (ni i nj j nk k) -> b (ni nj nk) (i j k)", ni=ni, nj=nj, nk=nk, i=i, j=j, k=k)
    return each.any(dim=2)


def check(cfg, ranks):
    """Refuse what cannot run, one line each, before anything is read or written."""
    run.check_training(cfg, ranks)
    run.refuse([
        (0 < cfg.twin_scale[0] <= cfg.twin_scale[1],
         f"twin_scale = {cfg.twin_scale}, expected (least, largest), both above 0"),
        (cfg.token_patch in (2, 4, 8, 16, 32),
         f"token_patch = {cfg.token_patch}, expected 2, 4, 8, 16 or 32"),
        (not cfg.decoder or cfg.token_patch < 32,
         f"decoder = True: its maps have tokens of 2 to 16 voxels, found token_patch = {cfg.token_patch}"),
        (not cfg.decoder or any(cfg.weights[1:]),
         f"decoder = True: only the token losses teach it, found weights = {cfg.weights}"),
        (cfg.matching in ("dual_softmax", "sinkhorn"),
         f"matching = {cfg.matching!r}, expected 'dual_softmax' or 'sinkhorn'"),
        (cfg.structure in ("printed", "sum", "mean", "released"),
         f"structure = {cfg.structure!r}, expected printed, sum, mean or released"),
        (all(c > 0 and c % 32 == 0 for c in cfg.crop) and max(cfg.crop) >= 64,
         f"crop = {cfg.crop}, expected multiples of 32, one of them at least 64"),
        (all(s >= c > 0 and s % c == 0 for s, c in zip(cfg.slab, cfg.crop)),
         f"slab = {cfg.slab} is not tiled by crops of {cfg.crop}"),
        (min(cfg.hidden, cfg.embedding) > 0, "hidden and embedding must be above 0"),
        (min(cfg.weights) >= 0 and any(cfg.weights),
         f"weights = {cfg.weights}, expected numbers of 0 or more, not all 0"),
        (cfg.tokens in ("body", "inside"), f"tokens = {cfg.tokens!r}, expected 'body' or 'inside'"),
        (cfg.negatives in ("step", "queue", "both"),
         f"negatives = {cfg.negatives!r}, expected 'step', 'queue' or 'both'"),
        (cfg.negatives != "step" or cfg.weights[0] == 0 or cfg.batch > 1 or cfg.slab != cfg.crop,
         "negatives = 'step', but a batch of one crop has no other; give a larger batch or slab, or 'queue'"),
        (cfg.queue >= cfg.batch, f"queue = {cfg.queue} is shorter than one batch of {cfg.batch}"),
        (cfg.temperature > 0 and cfg.global_temperature > 0, "temperatures must be above 0"),
        (0 <= cfg.momentum <= 1, f"momentum = {cfg.momentum}, expected 0 to 1"),
        (cfg.sinkhorn_iterations > 0,
         f"sinkhorn_iterations = {cfg.sinkhorn_iterations}, expected at least 1"),
    ])
    try:
        with torch.device("meta"):                                  # that shape, but without any numbers
            Network(cfg)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def assemble(samples, token_grid, patch):
    """A batch with its true matches: pairs (m, 3) of Eq. 2-3 among the tokens that take part."""
    batch = data.collate(samples)
    pairs = data.matches(batch["H"], token_grid, patch)
    b, i, j = pairs.T
    return batch | {"pairs": pairs[batch["valid"][b, i] & batch["valid_"][b, j]]}


def check_fill(scans, cfg):
    """Refuse a slab that the scans hardly fill: a run on padding would learn nothing, and not say so."""
    shapes, slab = np.array([scan.shape for scan in scans]), np.array(cfg.slab)
    share = (np.minimum(shapes, slab) / slab).prod(axis=1).mean()
    if share < cfg.fill_share:
        median = np.median(shapes, axis=0)
        crop = tuple(c if m >= 0.75 * c else 64 for c, m in zip(cfg.crop, median))
        fits = tuple(max(1, round(m / c)) * c for c, m in zip(crop, median))
        sizes = " x ".join(f"{m:.0f}" for m in median)
        advice = f"slab = {fits} and crop = {crop}, or a smaller `spacing`"
        if math.prod(fits) >= math.prod(cfg.slab):
            advice = "a smaller `spacing`, or a smaller `fill_share` if so much padding is meant"
        raise SystemExit(f"slab = {cfg.slab}: the scans, of median {sizes} voxels, fill {share:.0%} of it, "
                         f"the rest is padding; fill_share asks for {cfg.fill_share:.0%}. Set {advice}")


def open_scans(cfg, ranks, local, folder, first, say):
    """(scans, device) of this process: one a machine fills the cache, before the others are waited for."""
    device = run.join(ranks, local, folder, first, lambda: data.open_scans(cfg, say=say))
    scans = data.open_scans(cfg, say=run.silent)
    others = [scan for scan in scans if scan.record["channels"] != cfg.in_channels]
    if others:
        raise SystemExit(f"{others[0].id}: has {others[0].record['channels']} channels, in_channels = "
                         f"{cfg.in_channels} ({len(others)} of {len(scans)} scans have others)")
    check_fill(scans, cfg)
    used = float(np.median([min(scan.record["window_used"]) for scan in scans]))
    if used < 0.02:
        raise SystemExit(f"the scans' values take {used:.2%} of window = {cfg.window}, the network would see "
                         f"one grey; set `intensity` (now {cfg.intensity!r}) and `window` for these scans")
    return scans, device


def check_subjects(scans, cfg):
    """Refuse an L_g whose crops have no other to be told from: its loss would be 0, its top-1 1."""
    alone = len({scan.subject for scan in scans}) == 1
    if alone and cfg.weights[0] and (cfg.negatives == "queue" or cfg.slab == cfg.crop):
        raise SystemExit(f"all {len(scans)} scans are of one subject: with negatives = {cfg.negatives!r} and "
                         f"slab = {cfg.slab} a crop has no other to be told from; give negatives = 'step' "
                         "and a slab of several crops, or weights that leave L_g out")


def adamw(network, cfg):
    """AdamW of all that learns, under which matrices, position tables among them, and kernels alone decay."""
    learned = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW([dict(params=[p for p in learned if p.ndim > 1], weight_decay=cfg.decay),
                              dict(params=[p for p in learned if p.ndim <= 1], weight_decay=0.0)], lr=cfg.lr)


def build(cfg, device, new):
    """Student, teacher, optimizer and queue before the first step; a new run may start from cfg.init."""
    torch.manual_seed(cfg.seed)
    student = Network(cfg).to(device)
    if new and cfg.init:
        try:
            load_weights(student.swin_unetr if cfg.decoder else student.encoder, cfg.init, cfg.downsample)
            then = read_file(cfg.init).get("preprocessing")
        except WeightsError as error:
            raise SystemExit(str(error)) from None
        lines = run.preprocessing_differences(then, data.preprocessing(cfg))
        for line in lines if run.processes()[0] == 0 else ():
            print(f"{cfg.init}: {line} here")
    teacher = copy.deepcopy(student).requires_grad_(False)
    if cfg.compile:
        student.encoder.compile(dynamic=False)      # the teacher has a twin more: no size is made a symbol
        teacher.encoder.compile(dynamic=False)
    return student, teacher, adamw(student, cfg), Queue(cfg.queue, cfg.embedding, device)


def seen_so_far(scans, cfg, state, say):
    """data.known_as of the scans, and of what a resumed run, or the file that a new one begins with, saw
    before; a line where a run goes on with other scans."""
    now = [data.known_as(file, cfg) for scan in scans for file in scan.case["images"]]
    before = set((state or {}).get("seen", ()))
    if before and ((new := sum(not each & before for each in now)) or len(scans) != state["scans"]):
        say(f"the scans are not those that this run saw before: it had {state['scans']}, now {len(scans)}, "
            f"{new} of their files are new")
    if state is None and cfg.init:
        before = set(read_file(cfg.init).get("seen", ()))
    return sorted(before.union(*now))


def restore(state, student, teacher, optimizer, queue):
    """What a resumed run takes from last.pt beside its step; the keys are those of save_state."""
    with run.of_this_version(state):
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        queue.keys.copy_(state["queue"])
        queue.subjects.copy_(state["queue_subjects"])
        queue.count = state["queue_count"]


def save_state(path, student, teacher, optimizer, queue, cfg, step, seen=(), scans=0):
    """last.pt: what restore and run.resume read, and what model.load_weights asks of an encoder; seen, scans:
    of seen_so_far."""
    state = dict(student=student.state_dict(), teacher=teacher.state_dict(), optimizer=optimizer.state_dict(),
                 queue=queue.keys, queue_subjects=queue.subjects, queue_count=queue.count, step=step,
                 config=dataclasses.asdict(cfg), seen=list(seen), scans=scans)
    run.save(path, state | dict(format="s2dc/pretrain", arguments=student.encoder.arguments,
                                preprocessing=data.preprocessing(cfg)), keep=True)


def save_weights(folder, student, cfg, step, origin):
    """What stage 2 starts from."""
    save_encoder(folder / "encoder.pt", student, cfg, step, origin)
    if cfg.decoder:
        save_network(folder / "network.pt", student.swin_unetr, student.ups, cfg, step, origin)


def save_encoder(path, student, cfg, step, origin):
    """encoder.pt: what stage 2 reads. seen: data.known_as of the scans, for it to know whom it scores."""
    weights = dict(encoder=student.encoder.state_dict(), arguments=student.encoder.arguments)
    run.save(path, dict(format="s2dc/encoder") | weights | of_origin(cfg, step, origin), keep=True)


def save_network(path, whole, ups, cfg, step, origin):
    """network.pt: encoder and what learned of the decoder, for stage 2 to start from both."""
    weights = {name: x for name, x in whole.state_dict().items() if learns(name, ups)}
    weights = dict(model=weights, arguments=whole.arguments)
    run.save(path, dict(format="s2dc/finetune") | weights | of_origin(cfg, step, origin), keep=True)


def of_origin(cfg, step, origin):
    """What a file of weights says of the run that made it."""
    return dict(preprocessing=data.preprocessing(cfg), step=step, name=cfg.name, commit=origin["commit"],
                torch=origin["torch"], seen=origin["seen"])


def heading(cfg, scans, student, crop_grid, token_grid, ranks, first):
    """What of the run is not in its config."""
    cached = sum(Path(f"{scan.stem}.image.npy").stat().st_size for scan in scans) / 1e9
    encoder, whole = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (student.encoder, student))
    learned = sum(p.numel() for p in student.encoder.parameters() if p.requires_grad) / 1e6
    left = f" ({learned:.2f} M learn: those behind the tokens' map only by L_g)" * (learned < encoder)
    return (f"{len(scans)} scans, cache {cached:.2f} GB\n"
            f"encoder {encoder:.2f} M parameters{left}, student {whole:.2f} M; batch {cfg.batch} slabs x "
            f"{math.prod(crop_grid)} crops = {ranks} ranks x {cfg.accumulate} passes x "
            f"{cfg.batch // ranks // cfg.accumulate}; {math.prod(token_grid)} tokens a slab; "
            f"steps {first} to {cfg.steps}")


def gathered(keys, ranks):
    """Keys of all ranks (batch, e), in the order of the global batch."""
    if ranks == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(ranks)]
    dist.all_gather(parts, keys)
    return torch.cat(parts)


def average(sums, counted, ranks):
    """Means over the steps since the last line and over the ranks, as floats."""
    values = torch.stack([value.double() for value in sums.values()]) / counted
    if ranks > 1:
        values = values.float()
        dist.all_reduce(values)
        values = values / ranks
    return dict(zip(sums, values.tolist()))


def report(line):
    return (f"step {line['step']:6d}  loss {line['loss']:.4f}  L_g {line['global']:.4f}  "
            f"top-1 {line['top1']:.2f} (chance {line['top1_chance']:.2f})  "
            f"L_p2p {line['p2p']:.4f}  L_p2s {line['p2s']:.4f}  matches/token {line['matches']:.2f}  "
            f"accuracy {line['accuracy']:.3f}  spread {line['spread']:.3f}  lr {line['lr']:.2e}  "
            f"grad {line['grad_norm']:.2f}  {line['slabs_per_s']:.2f} slabs/s  "
            f"waiting {line['waiting']:.0%}  {line['memory_gb']:.2f} GB")


def main(argv):
    cfg = configs.load(Config, argv)
    rank, ranks, local = run.processes()
    say = print if rank == 0 else run.silent
    check(cfg, ranks)
    folder = Path(cfg.runs) / cfg.name
    state = run.resume(folder, cfg, FREE, say)
    first = state["step"] if state else 0
    if first >= cfg.steps:
        say(f"{folder} is complete: {first} steps; its encoder is {folder}/encoder.pt"
            + f", with its decoder {folder}/network.pt" * cfg.decoder)
        return
    say(configs.differing(cfg))
    scans, device = open_scans(cfg, ranks, local, folder, first, say)
    check_subjects(scans, cfg)
    student, teacher, optimizer, queue = build(cfg, device, new=state is None)
    if state is not None:
        restore(state, student, teacher, optimizer, queue)
        say(f"resumed from {folder}/last.pt at step {first}")
    model = run.parallel(student, ranks, device)
    bf16 = run.bfloat16(cfg, device)
    crop_grid = tuple(s // c for s, c in zip(cfg.slab, cfg.crop))
    token_grid = tuple(s // cfg.token_patch for s in cfg.slab)
    slabs = data.Slabs(scans, cfg, cfg.batch, cfg.seed)
    batches = run.batches(slabs, cfg, rank, ranks, first,
                          functools.partial(assemble, token_grid=token_grid, patch=cfg.token_patch))
    origin = run.versions()
    say(f"{ranks} x {origin['device']}, {run.products(bf16, device)}, "
        + heading(cfg, scans, student, crop_grid, token_grid, ranks, first))
    lock = run.start_log(folder, cfg, first, origin) if rank == 0 else None
    # for the encoder's file, not for the log
    origin["seen"] = seen_so_far(scans, cfg, state, say)

    sums, waited, counted = {}, 0.0, 0
    began = tick = time.time()
    for step in range(first, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr_at(step, cfg)
        passes, keys, pooled_, pooled, terms = [], [], [], [], {}
        for _ in range(cfg.accumulate):     # the teacher first: all its keys are L_g's negatives
            start = time.time()
            batch = next(batches)
            waited += time.time() - start
            batch, V, tokens_, *new = taught(batch, teacher, cfg, device, bf16)     # .., 2 x (b, n + 1, ..)
            keys.append(new[0])
            pooled_.append(new[1])
            passes.append((batch, V, tokens_))
        keys = gathered(torch.cat(keys), ranks)                     # (batch, n + 1, e)
        subjects = slabs.subjects(step).to(device)                  # (batch,)
        for a, (batch, V, tokens_) in enumerate(passes):
            chosen, b = batch["chosen"], torch.arange(len(V), device=device)
            keep = crops_seen(batch["valid"], cfg).index_put((b, chosen), batch["valid"].new_ones(()))
            model.require_backward_grad_sync = a == cfg.accumulate - 1  # gradients travel once
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens, embeddings, new = model(V, keep)            # (maps b, t, e), (b, n, e), (b, n, f)
            pooled.append(new.float())
            query, places = embeddings[b, chosen], (rank * cfg.accumulate + a) * len(V) + b
            key, now = keys[places, -1], others_of_step(keys, subjects, places, batch["apart"])
            negatives, allowed = negatives_of(cfg, *now, queue, subjects[places])       # (K, e), (b, K)
            pairs, valid, valid_ = of_maps(batch, 1 + cfg.decoder)
            out = losses.s2dc_loss(
                tokens, tokens_, pairs, query, key, negatives, allowed=allowed, weights=cfg.weights,
                matching=cfg.matching, temperature=cfg.temperature, global_temperature=cfg.global_temperature,
                form=cfg.structure, detach=cfg.structure_detach, valid=valid, valid_=valid_,
                bin_score=getattr(student, "bin_score", None), iterations=cfg.sinkhorn_iterations)
            (out["loss"] / cfg.accumulate).backward()
            out |= losses.recognition(query, key, now[0], cfg.global_temperature, now[1])
            for name, value in out.items():
                terms[name] = terms.get(name, 0) + value.detach() / cfg.accumulate
        norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
        if not torch.isfinite(norm + terms["loss"]):    # nothing of this step reaches the weights or the disk
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            cases = ", ".join(case for batch, *_ in passes for case in batch["id"])
            run.diverged(folder, step, f"{values}, gradient norm {norm.item():.4g}; cases: {cases}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        follow(teacher, student, cfg.momentum)
        for network, seen in ((student, pooled), (teacher, pooled_)):
            network.standard.follow(rearrange(gathered(torch.cat(seen), ranks), "b n f -> (b n) f"))
        queue.push(keys[:, -1], subjects)
        for name, value in (terms | {"grad_norm": norm}).items():
            sums[name] = sums.get(name, 0) + value.float()
        counted += 1

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            means, now = average(sums, counted, ranks), time.time()
            pace = dict(slabs_per_s=counted * cfg.batch / (now - tick), waiting=waited / (now - tick))
            line = dict(step=done, **means, lr=run.lr_at(step, cfg), **pace, memory_gb=run.memory_gb())
            say(report(line) + f"  {run.clock((now - began) / (done - first) * (cfg.steps - done))} left")
            if rank == 0:
                run.write_log(folder, line)
            sums, waited, counted, tick = {}, 0.0, 0, now
        if rank == 0 and done in cfg.keep:
            save_encoder(folder / f"encoder-{done}.pt", student, cfg, done, origin)
        if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps):
            save_weights(folder, student, cfg, done, origin)
            save_state(folder / "last.pt", student, teacher, optimizer, queue, cfg, done, origin["seen"],
                       len(scans))
    say(f"{cfg.steps} steps in {run.clock(time.time() - began)}; encoder: {folder}/encoder.pt"
        + f", with its decoder: {folder}/network.pt" * cfg.decoder)
    del lock            # another process may train under this name now
    if ranks > 1:
        del model       # before its process group: the other way round gloo may hang
        dist.destroy_process_group()


if __name__ == "__main__":
    run.program(main)
