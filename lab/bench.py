"""Speed and memory, two things compared in one run, interleaved, as ratios with their spread. No tests.

    python -m lab.bench sliding      sliding_window against MONAI's, 512 x 512 x 300 voxels (needs monai)
    python -m lab.bench step         a pre-training step of the paper's size, compiled or not (needs a GPU)
    python -m lab.bench tokens       L_p2p + L_p2s for 27,648 tokens, forward and backward, time and memory
    python -m lab.bench data         slabs per second that the loader cuts from a cache, by number of workers
"""
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import data
import losses
import pretrain
from tasks import sliding_window


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Peak:
    """Peak memory above the start, in GB: of the GPU, or of this process (sampled every 5 ms)."""

    def __enter__(self):
        self.cuda = torch.cuda.is_available()
        if self.cuda:
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
        if self.cuda:
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()
        self.gb = (self.highest - self.start) / 1e9


def seconds(call):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    with Peak() as peak:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start, peak.gb


def compare(ours, theirs, names, rounds):
    """Interleaved rounds; prints the median of each and the median ratio with its least and largest."""
    rows = [[], []]
    for k in range(rounds):
        for which in ((0, 1) if k % 2 == 0 else (1, 0)):            # who comes first alternates
            rows[which].append(seconds((ours, theirs)[which]))
    ratios = [b[0] / a[0] for a, b in zip(*rows)]
    for name, row in zip(names, rows):
        median, peak = statistics.median(r[0] for r in row), max(r[1] for r in row)
        print(f"  {name:24s} {median:8.2f} s   peak {peak:6.2f} GB above the start")
    print(f"  {names[1]} / {names[0]}: time x {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} .. {max(ratios):.2f}), {rounds} rounds")


def sliding(rounds=3, classes=14):
    from monai.inferers import sliding_window_inference
    volume = torch.randn(1, 1, 512, 512, 300)
    torch.manual_seed(0)
    network = nn.Conv3d(1, classes, 1).to(device()).eval()      # cheap, so that the window's own cost shows

    def ours():
        sliding_window(network, volume, 96, 0.5, 4, blend, device=device(), store="cpu")

    def theirs():
        sliding_window_inference(volume, 96, 4, network, 0.5, blend, sw_device=device(), device="cpu")

    for blend in ("gaussian", "constant"):
        print(f"512 x 512 x 300 voxels, window 96^3, overlap 0.5, {classes} classes, {blend}, on {device()}")
        with torch.no_grad():
            compare(ours, theirs, ("ours", "MONAI"), rounds)


def tokens(t=(48, 48, 12), c=64):
    n = t[0] * t[1] * t[2]
    rng, centre = np.random.default_rng(0), (191.5, 191.5, 47.5)
    H = data.random_affine(rng, centre, (5, 5, 30), (0.9, 1.2), 0.05, (24, 24, 8))
    pairs = data.matches(H[None], t, 8).to(device())
    q, k = (torch.randn(1, n, c, device=device()) for _ in range(2))
    q.requires_grad_()

    def both():
        losses.s2dc_loss(q, k, pairs, None, None, None, weights=(0, 1, 1))["loss"].backward()
    took, peak = seconds(both)
    print(f"{n} tokens of {c} channels, {len(pairs)} matches, forward and backward: {took:.1f} s, "
          f"peak {peak:.2f} GB above the start, on {device()}")


def step(rounds=20):
    """The paper's setting: slab 384 x 384 x 96, 16 crops, feature 48, v2, bfloat16."""
    if not torch.cuda.is_available():
        raise SystemExit("lab.bench step needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        write_scans(Path(folder), 4)
        for compiled in (False, True):
            command = [sys.executable, "pretrain.py", "configs/ct.py", f"--name=bench_{compiled}",
                       f"--data={folder}", "--scans=*.nii.gz", "--exclude=()", f"--cache={folder}/cache",
                       f"--runs={folder}/runs", f"--compile={compiled}", f"--steps={3 * rounds}",
                       f"--log_every={rounds}", f"--save_every={3 * rounds}", "--workers=8", *sys.argv[2:]]
            print(f"pretrain.py, compile={compiled}", flush=True)
            subprocess.run(command, cwd=Path(__file__).resolve().parents[1], check=True)


def write_scans(folder, count, shape=(512, 512, 200)):
    import nibabel as nib
    from scipy import ndimage
    for k in range(count):
        rng = np.random.default_rng(k)
        field = ndimage.zoom(rng.normal(size=(16, 16, 8)), np.array(shape) / (16, 16, 8), order=1)
        voxels = (field * 400 + rng.normal(size=shape) * 20).clip(-1000, 1000).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 0.8, 1.5, 1])), folder / f"scan{k}.nii.gz")


def loading(count=12):
    with tempfile.TemporaryDirectory() as folder:
        write_scans(Path(folder), 2)
        cfg = pretrain.Config(data=folder, scans="*.nii.gz", cache=f"{folder}/cache", batch=1, workers=2)
        scans = data.open_scans(cfg)
        for workers in (0, 1, 2):
            slabs, jobs = data.Slabs(scans, cfg, 1, 0), [[(s, 0)] for s in range(count)]
            loader = DataLoader(slabs, batch_sampler=jobs, num_workers=workers, collate_fn=data.collate)
            took, _ = seconds(lambda: [batch["cutout"].shape for batch in loader])
            rate = f"{count / took:.2f} slabs/s"
            print(f"slabs of {cfg.slab} with their surroundings, {workers} workers: {rate}")


if __name__ == "__main__":
    todo = {"sliding": sliding, "step": step, "tokens": tokens, "data": loading}
    if len(sys.argv) < 2 or sys.argv[1] not in todo:
        raise SystemExit(__doc__)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    todo[sys.argv[1]]()
