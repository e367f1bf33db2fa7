"""Speed and memory beside peers: two things in one process, interleaved, with the spread of their ratio.

    python -m lab.bench all             every row (needs monai), a table and bench.json, lines as they come
    python -m lab.bench encoder unetr   rows: encoder unetr step losses loading sliding demo
    python -m lab.bench profile         where the time of the step goes, by operation

Each pair has the same inputs, weights and dtype; in a line "by default", in the step and in the sliding
window each runs as its users run it, in a process of its own. Floor: the operations that a row has to do
over what this machine multiplies, measured in the same run: 1 would mean that nothing but matrix products is
done, at full rate. Times are medians after one round of warming up.
"""
import contextlib
import copy
import functools
import json
import multiprocessing
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import configs
import data
import losses
import pretrain
import run
from model import SwinUNETR, from_monai
from tasks import sliding_window

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROOT = Path(__file__).resolve().parents[1]
FOUND = []                              # all rows of this call, for bench.json
versions = functools.cache(run.versions)            # once: it says when the call started


class Peak:
    """Peak memory above the start, in GB: of the GPU, or of this process (sampled every 5 ms)."""

    def __enter__(self):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = self.highest = self.resident()
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def resident(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def watch(self):
        while not self.stop.wait(0.005):
            self.highest = max(self.highest, self.resident())

    def __exit__(self, *_):
        if CUDA:
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()
        self.gb = (self.highest - self.start) / 1e9


def seconds(call):
    with Peak() as peak:
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    return took, peak.gb


class Apart:
    """The call that build(*args) makes, in a process of its own: what a program asks of the C library or of a
    GPU is not asked for its peer. Calling it gives what `seconds` gives there; close() ends the process."""

    def __init__(self, build, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, build, args)).start()
        theirs.close()                                  # a child that has died ends what waits for it

    def __call__(self):
        self.pipe.send("once more")
        return self.pipe.recv()

    def close(self):
        self.pipe.close()


def serve(pipe, build, args):
    call = build(*args)
    with contextlib.suppress(EOFError):                 # the other end was closed
        while pipe.recv():
            pipe.send(seconds(call))


def matrix_rate(dtype=torch.float32, n=2048):
    """Floating-point operations a second of a matrix product of this machine, the best of five."""
    a = torch.randn(n, n, device=DEVICE).to(dtype)
    return max(2 * n ** 3 / seconds(lambda: a @ a)[0] for _ in range(5))


def record(row, **numbers):
    """A line of the table, of JSON, and of bench.json, at once: an interrupted call keeps what it found."""
    FOUND.append(dict(row=row, **numbers))
    print(json.dumps(FOUND[-1]), flush=True)
    with configs.replacing(Path("bench.json")) as aside:
        aside.write_text(json.dumps(dict(versions(), rows=FOUND), indent=1))


def compare(row, calls, rounds=3, operations=None, dtype=torch.float32):
    """Interleaved rounds of {name: call}, ours first: seconds and ratios to ours, each with its spread."""
    found, names = {name: [] for name in calls}, list(calls)
    with contextlib.ExitStack() as ended:
        for call in calls.values():
            if isinstance(call, Apart):
                ended.callback(call.close)
        for call in calls.values():
            call()
        for k in range(rounds):
            for name in (names if k % 2 == 0 else names[::-1]):     # who comes first alternates
                call = calls[name]
                found[name].append(call() if isinstance(call, Apart) else seconds(call))
    ours = found[names[0]]
    for name, several in found.items():
        ratios = sorted(a[0] / b[0] for a, b in zip(several, ours))
        middle = statistics.median(s for s, _ in several)
        more = dict(ratio=[round(r, 3) for r in (statistics.median(ratios), ratios[0], ratios[-1])])
        if operations and name == names[0]:
            more = dict(floor=round(operations / matrix_rate(dtype) / middle, 3))
        record(row, who=name, seconds=round(middle, 4), gb=round(max(g for _, g in several), 3), **more)


def operations_of(call):
    """Floating-point operations of matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# -------------------------------------------------------------------------------------------------- networks

def used(network, volume, train, dtype):
    """One use: forward, or forward and backward of a loss over all that comes out."""
    with torch.set_grad_enabled(train), torch.autocast(DEVICE.type, torch.bfloat16, dtype != torch.float32):
        out = network(volume)
        out = out if isinstance(out, list | tuple) else [out]
    if train:
        network.zero_grad()
        slope = [torch.linspace(-1, 1, x.shape[-1], device=DEVICE) for x in out]
        sum((x.float() * w).pow(2).mean() for x, w in zip(out, slope)).backward()


def ours_and_peers(kind, v2):
    """{name: network}: Swin-UNETR of feature 48 or its encoder, ours and MONAI's, plain and with flash
    attention, all of the same weights."""
    from monai.networks.nets.swin_unetr import SwinUNETR as Peer
    peers = {name: Peer(1, 14, feature_size=48, use_v2=v2, use_flash_attention=flash).to(DEVICE)
             for name, flash in (("MONAI", False), ("MONAI flash", True))}
    weights = peers["MONAI"].state_dict()
    peers["MONAI flash"].load_state_dict(weights)
    ours = SwinUNETR(1, 14, v2=v2).to(DEVICE)
    ours.load_state_dict(from_monai(weights))
    if kind == "encoder":
        ours, peers = ours.encoder, {name: peer.swinViT for name, peer in peers.items()}
    return {"ours": ours, **peers}


def by_default(who, kind, v2, train):
    """One use as a user of `who` has it: ours as our programs run it, MONAI's in float32."""
    network, dtype = ours_and_peers(kind, v2)[who], torch.float32
    if who == "ours":
        run.choose_device()
        if CUDA:
            network.compile()
            dtype = torch.bfloat16
    return partial(used, network, torch.randn(1, 1, 96, 96, 96, device=DEVICE), train, dtype)


def networks(kind, rounds=3):
    """A crop of 96^3; Swin-UNETR as v2 alone, its convolutions are the same."""
    volume = torch.randn(1, 1, 96, 96, 96, device=DEVICE)
    fast = bool(CUDA or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    for v2 in (False, True)[kind == "unetr":]:
        everybody = ours_and_peers(kind, v2)
        for train in (False, True):
            row = f"{kind} v{1 + v2} {'training' if train else 'inference'}"
            work = operations_of(partial(used, everybody["ours"], volume, train, torch.float32))
            for dtype in (torch.float32, torch.bfloat16)[:1 + fast]:
                calls = {name: partial(used, net, volume, train, dtype) for name, net in everybody.items()}
                compare(f"{row} {str(dtype)[6:]}", calls, rounds, work, dtype)
            compare(f"{row} by default", {who: Apart(by_default, who, kind, v2, train)
                                          for who in ("ours", "MONAI")}, rounds)


# ----------------------------------------------------------------------------------------- pre-training step

def step_config(crops):
    return pretrain.Config(slab=(96 * crops, 96, 96) if crops < 16 else (384, 384, 96), token_patch=32,
                           fill_share=0, workers=0, checkpointing=False, compile=CUDA)


def one_step(who):
    """A pre-training step of true size: 2 crops on a CPU, 16 on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = step_config(16 if CUDA else 2)
        batch, _ = one_batch(folder, cfg)
    if who == "ours":
        return partial(our_step, cfg, batch, *pretrain.build(cfg, run.choose_device(), new=True))
    return partial(released_step, cfg, batch, Released().to(DEVICE))


def step(rounds=3):
    compare("pre-training step", {who: Apart(one_step, who) for who in ("ours", "released recipe")}, rounds)


def one_batch(folder, cfg):
    write_scans(Path(folder), 1)
    cfg.data, cfg.scans, cfg.cache = folder, "*.nii.gz", f"{folder}/cache"
    slabs = data.Slabs(data.open_scans(cfg, say=run.silent), cfg, 1, 0)
    grid = tuple(s // cfg.token_patch for s in cfg.slab)
    return pretrain.assemble([slabs[0, 0]], grid, cfg.token_patch), grid


def our_step(cfg, batch, student, teacher, optimizer, queue):
    """As the loop of pretrain.py has it, for one process and one pass."""
    batch, V, tokens_, keys, _ = pretrain.taught(batch, teacher, cfg, DEVICE, CUDA)
    chosen, b = batch["chosen"], torch.arange(len(V), device=DEVICE)
    keep = pretrain.crops_seen(batch["valid"], cfg).index_put((b, chosen), batch["valid"].new_ones(()))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        tokens, embeddings, _ = student(V, keep)
    subjects = torch.zeros(len(V), dtype=torch.long, device=DEVICE)
    others, allowed = pretrain.others_of_step(keys, subjects, b, batch["apart"])
    losses.s2dc_loss(tokens, tokens_, batch["pairs"], embeddings[b, chosen], keys[:, -1], others,
                     allowed=allowed)["loss"].backward()
    nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    pretrain.follow(teacher, student, cfg.momentum)


class Released(nn.Module):
    """What the released training step computes, rebuilt from its description: MONAI's v2 encoder for student
    and teacher, projectors 768-2048-2048-512, AdamW, float32, nothing compiled."""

    def __init__(self):
        super().__init__()
        from monai.networks.nets.swin_unetr import SwinUNETR as Peer
        self.student = nn.ModuleList([Peer(1, 14, feature_size=48, use_v2=True).swinViT, *(
            nn.Sequential(nn.Linear(768, 2048), nn.BatchNorm1d(2048, affine=False), nn.ReLU(),
                          nn.Linear(2048, 2048), nn.BatchNorm1d(2048, affine=False), nn.ReLU(),
                          nn.Linear(2048, 512)) for _ in range(2))])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=3e-4, weight_decay=0.1)
        self.register_buffer("queue", F.normalize(torch.randn(90, 512), dim=1))


def released_step(cfg, batch, peer):
    """Three teacher passes of all crops, one of the student, Sinkhorn of 100 iterations for every layer of
    tokens in z, in a Python loop; the update of the teacher before its forward."""
    V, V_, _ = data.views(run.to_device(batch, DEVICE), cfg)
    cut = partial(rearrange, pattern="b c (ni x) (nj y) (nk z) -> (b ni nj nk) c x y z", x=96, y=96, z=96)
    with torch.no_grad():
        for slow, fast in zip(peer.teacher.parameters(), peer.student.parameters()):
            slow.lerp_(fast, 0.001)
        passes = [peer.teacher[0](cut(view))[-1] for view in (V_, V, V_)]
        tokens_ = peer.teacher[1](rearrange(passes[0], "n c i j k -> (n i j k) c"))
        keys = F.normalize(peer.teacher[2](passes[1].mean((2, 3, 4))), dim=1)
    maps = peer.student[0](cut(V))[-1]
    tokens = peer.student[1](rearrange(maps, "n c i j k -> (n i j k) c"))
    query = F.normalize(peer.student[2](maps.mean((2, 3, 4)))[:1], dim=1)
    loss = losses.info_nce(query, keys[:1], torch.cat([keys[1:], peer.queue]), 0.9)
    layers = [rearrange(x, "(n i j k) c -> k (n i j) c", i=3, j=3, k=3) for x in (tokens, tokens_)]
    for q, k in zip(*(rearrange(x, "k t c -> k 1 t c") for x in layers)):
        plan = losses.sinkhorn(losses.similarity(q, k), 1.0, torch.ones((), device=DEVICE))
        match = torch.eye(q.shape[1], dtype=torch.bool, device=DEVICE).expand(1, -1, -1)
        loss = loss + losses.patch_to_patch(plan, match) / 3
    peer.optimizer.zero_grad()
    loss.backward()
    peer.optimizer.step()


def profile():
    from torch.profiler import ProfilerActivity
    with tempfile.TemporaryDirectory() as folder:
        cfg = step_config(16 if CUDA else 2)
        batch, _ = one_batch(folder, cfg)
        parts = pretrain.build(cfg, run.choose_device(), new=True)
        our_step(cfg, batch, *parts)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
            our_step(cfg, batch, *parts)
    by = f"self_{'device' if CUDA else 'cpu'}_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=50))


# -------------------------------------------------------------------------------------- losses, data, windows

def token_losses(rounds=3, c=64):
    """L_p2p + L_p2s forward and backward."""
    for grid, patch in (((12, 12, 3), 32), ((24, 24, 6), 16), ((48, 48, 12), 8)):
        n, centre = grid[0] * grid[1] * grid[2], (191.5, 191.5, 47.5)
        H = data.random_affine(np.random.default_rng(0), centre, (5, 5, 30), (0.9, 1.2), 0.05, (24, 24, 8))
        pairs = data.matches(rearrange(H, "i j -> 1 i j"), grid, patch).to(DEVICE)
        q, k = (torch.randn(1, n, c, device=DEVICE) for _ in range(2))
        q.requires_grad_()

        def both(q=q, k=k, pairs=pairs):
            losses.s2dc_loss(q, k, pairs, None, None, None, weights=(0, 1, 1))["loss"].backward()
        compare(f"losses, {n} tokens", {"ours": both}, rounds, operations=8 * n * n * c)


def write_scans(folder, count, shape=(512, 512, 200)):
    import nibabel as nib
    from scipy import ndimage
    for k in range(count):
        rng = np.random.default_rng(k)
        field = ndimage.zoom(rng.normal(size=(16, 16, 8)), np.array(shape) / (16, 16, 8), order=1)
        voxels = (field * 400 + rng.normal(size=shape) * 20).clip(-1000, 1000).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 1.5, 1])), folder / f"scan{k}.nii.gz")


def loading(count=6):
    """A slab and its moved copies beside a MONAI pipeline, without and with its own caches, on disk and in
    memory: ours cuts a slab with what lies around it out of the cache, and moves it on the device. All caches
    are filled before."""
    from monai import transforms as T
    from monai.data import CacheDataset, PersistentDataset
    with tempfile.TemporaryDirectory() as folder:
        write_scans(Path(folder), 2)
        cfg = pretrain.Config(data=folder, scans="*.nii.gz", cache=f"{folder}/cache", batch=1, workers=2)
        scans = data.open_scans(cfg, say=run.silent)
        slabs = data.Slabs(scans, cfg, 1, 0)
        peer = T.Compose([
            T.LoadImaged("image"), T.EnsureChannelFirstd("image"), T.Orientationd("image", axcodes="RAS"),
            T.ScaleIntensityRanged("image", -1000, 1000, 0, 1, clip=True),
            T.CropForegroundd("image", source_key="image", allow_smaller=True),
            T.RandSpatialCropd("image", cfg.slab, random_size=False), T.SpatialPadd("image", cfg.slab),
            T.CopyItemsd("image", names=["moved"]),
            T.RandAffined("moved", prob=1, rotate_range=(0, 0, 0.5), translate_range=24,
                          padding_mode="border"),
            T.RandShiftIntensityd("moved", 0.1, prob=0.1)])
        files = [dict(image=f"{folder}/scan{k}.nii.gz") for k in range(2)]
        disk = PersistentDataset(files, peer, cache_dir=f"{folder}/peer")
        memory = CacheDataset(files, peer, num_workers=1, progress=False)

        def cut(views):
            for k in range(count):
                batch = pretrain.assemble([slabs[k, 0]], (12, 12, 3), 32)
                if views:
                    data.views(run.to_device(batch, DEVICE), cfg)
        compare(f"{count} slabs with their moved copies", {
            "ours": partial(cut, True), "MONAI": lambda: [peer(files[k % 2]) for k in range(count)],
            "MONAI, PersistentDataset": lambda: [disk[k % 2] for k in range(count)],
            "MONAI, CacheDataset": lambda: [memory[k % 2] for k in range(count)]})
        compare(f"{count} slabs, cut alone", {"ours": partial(cut, False)})
        for workers in (1, 2):
            steps = [[(step, 0)] for step in range(2 * count)]
            loader = DataLoader(slabs, batch_sampler=steps, num_workers=workers, collate_fn=data.collate)
            took, _ = seconds(lambda loader=loader: [batch["cutout"].shape for batch in loader])
            record(f"slabs a second, {workers} workers", who="ours", rate=round(2 * count / took, 2))


def windows(who, blend, classes=14):
    """512 x 512 x 300 voxels (on a CPU 256 x 256 x 300), windows of 96^3, overlap 0.5, a network that costs
    little itself."""
    from monai.inferers import sliding_window_inference
    volume = torch.randn(1, 1, *(512, 512) if CUDA else (256, 256), 300)
    network = nn.Conv3d(1, classes, 1).to(DEVICE).eval().requires_grad_(False)
    if who == "ours":
        device = run.choose_device()
        return partial(sliding_window, network, volume, 96, 0.5, 4, blend, device=device, store="cpu")
    return partial(sliding_window_inference, volume, 96, 4, network, 0.5, blend, sw_device=DEVICE,
                   device="cpu")


def sliding(rounds=3):
    for blend in ("gaussian", "constant"):
        calls = {who: Apart(windows, who, blend) for who in ("ours", "MONAI")}
        compare(f"sliding window, {blend}", calls, rounds)


def demo():
    """The README's two lines, seconds by part."""
    texts = [line for line in (ROOT / "README.md").read_text().splitlines() if "configs/demo" in line]
    first = next(line for line in texts if "pretrain.py" in line)
    second = next(line for line in texts if "demo_pretrained" in line)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", str(ROOT), folder], check=True)
        for name, line in (("first", first), ("second", second)):
            for part in line.split(" && "):
                if part.startswith("python ") and "python3" not in part:
                    took, _ = seconds(partial(subprocess.run, part, shell=True, cwd=folder, check=True,
                                              stdout=subprocess.DEVNULL))
                    record(f"README, {name} line", who=part[:60], seconds=round(took, 1))


ROWS = dict(encoder=partial(networks, "encoder"), unetr=partial(networks, "unetr"), step=step,
            losses=token_losses, loading=loading, sliding=sliding, demo=demo)


def table():
    """Markdown of what was found."""
    heads = ("row", "who", "seconds", "ratio", "gb", "floor", "rate")
    lines = [heads, ("---",) * len(heads)]
    for found in FOUND:
        ratio = found.get("ratio")
        cells = dict(found, ratio="{:.2f} ({:.2f} .. {:.2f})".format(*ratio) if ratio else "")
        lines.append([str(cells.get(head, "")) for head in heads])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv):
    names = list(ROWS) if argv == ["all"] else argv
    if argv == ["profile"]:
        return profile()
    if not names or set(names) - set(ROWS):
        raise SystemExit(f"lab.bench: expected all, profile, or some of {', '.join(ROWS)}; found {argv}")
    print(json.dumps(versions()), flush=True)
    for name in names:
        ROWS[name]()
    print(table())


if __name__ == "__main__":
    run.program(main)
