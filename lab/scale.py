"""What size costs: memory by crop and width, many scans, a step's traffic: counted, or measured where it can
be measured here.

    python -m lab.scale memory      what a step keeps for its backward pass, by feature size, crop and batch
    python -m lab.scale scans       finding, caching, opening 10,000 scans, and the first batch of them
    python -m lab.scale traffic     of a step: floating-point operations, bytes over disk and network
    python -m lab.scale processes   the demo's pace with one process of two threads, and two of one
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

import data
import model
import pretrain
import run
from lab import bench

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------- memory

class Fused(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and a sum a row, and no probabilities."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def kept(call, parameters):
    """Bytes that the autograd graph of call() holds beside the parameters, every storage once."""
    own, held = {p.untyped_storage()._cdata for p in parameters}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage      # alive until all are counted: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    total = sum(storage.nbytes() for storage in held.values())
    del out                                     # held until here, as what it was made of
    return total


def of_crop(feature, crop, checkpointing):
    """(parameters, bytes kept, bytes kept for a moment while a checkpointed block is computed again) of
    Swin3D in bfloat16 on a GPU, for one crop. On torch's "meta" device, which computes shapes alone."""
    attention = mock.patch.object(model.F, "scaled_dot_product_attention",
                                  lambda q, k, v, attn_mask: Fused.apply(q, k, v, attn_mask))
    with torch.device("meta"), attention:
        heads = tuple(max(1, n * feature // 48) for n in (3, 6, 12, 24))
        network = model.Swin3D(feature_size=feature, num_heads=heads, checkpointing=checkpointing).bfloat16()
        parameters = [*network.parameters(), *network.buffers()]
        volume = torch.zeros(1, 1, crop, crop, crop, dtype=torch.bfloat16)
        held, again = kept(lambda: network(volume), parameters), 0
        if checkpointing:
            first = rearrange(network.embed(volume), "b c x y z -> b x y z c").detach().requires_grad_()
            again = max(kept(lambda: block(first), parameters) for block in network.stages[0].blocks)
    return sum(p.numel() for p in network.parameters()), held, again


def memory():
    """GB of a pre-training process by feature size, crop and crops at a time (16 are a slab of the paper)."""
    heads = ("feature", "crop", "crops", "kept", "checkpointed", "weights, AdamW, teacher", "in all",
             "in all, checkpointed")
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for feature in (24, 48, 96):
        for crop in (64, 96, 128):
            count, held, _ = of_crop(feature, crop, False)
            _, few, again = of_crop(feature, crop, True)
            fixed = count * 4 * 5           # weights, gradients, two moments; the teacher's weights
            for crops in (1, 4, 16):
                # V, V', the twins and what they are cut from; the teacher's two largest maps for a moment
                views = crops * crop ** 3 * 4 * 6 + crops * (crop // 2) ** 3 * feature * 2 * 6
                sums = [fixed + views + crops * n for n in (held, few + again)]
                gb = [crops * held, crops * (few + again), fixed, *sums]
                print(f"| {feature} | {crop} | {crops} | " + " | ".join(f"{n / 1e9:.2f}" for n in gb) + " |")


# --------------------------------------------------------------------------------------------- scans, traffic

def scans(count=10000, edge=16):
    """Seconds to find, check and cache `count` tiny files, to open them again, to have the first batch."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        rng, affine = np.random.default_rng(0), np.diag([1.0, 1.0, 1.0, 1.0])
        (Path(folder) / "in").mkdir()
        for n in range(count):
            voxels = rng.integers(-200, 300, (edge, edge, edge)).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, affine), f"{folder}/in/scan{n:06d}.nii.gz")
        print(f"{count} files of {edge}^3 voxels written: {time.time() - began:.1f} s")
        cfg = pretrain.Config(data=folder, scans="in/*.nii.gz", cache=f"{folder}/cache", slab=(edge,) * 3,
                              crop=(edge,) * 3, token_patch=8, batch=2, workers=2, fill_share=0)
        for text, call in (("found", lambda: data.find_cases(cfg)),
                           ("read, checked and cached", lambda: data.open_scans(cfg, say=run.silent)),
                           ("opened again", lambda: data.open_scans(cfg, say=run.silent))):
            began = time.time()
            found = call()
            print(f"{text}: {time.time() - began:.1f} s")
        began = time.time()
        next(run.batches(data.Slabs(found, cfg, 2, 0), cfg, 0, 1, 0, data.collate))
        print(f"first batch: {time.time() - began:.1f} s; memory of this process {run.memory_gb():.2f} GB")
        index = data.cache_folder(cfg) / "index.json"
        print(f"index.json: {index.stat().st_size / count:.0f} bytes a scan")


def traffic():
    """Of a step of the paper's size, one slab of 16 crops of 96^3 on a GPU."""
    with torch.device("meta"):
        network = pretrain.Network(pretrain.Config())
        parameters = sum(p.numel() for p in network.parameters())
        volume = torch.zeros(1, 1, 96, 96, 96)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.encoder(volume)
    once = counter.get_total_flops()
    # student forward and backward of V, the teacher on V' and on one twin
    whole = once * (3 * 16 + 16 + 1)
    print(f"encoder of feature 48: {once / 1e9:.0f} GFLOP forward a crop of 96^3, {whole / 1e12:.1f} TFLOP a "
          f"slab; {parameters / 1e6:.1f} M parameters, {parameters * 4 / 1e6:.0f} MB of gradients a step")
    with tempfile.TemporaryDirectory() as folder:
        batch, _ = bench.one_batch(folder, bench.step_config(16))
    megabytes = batch["cutout"].nbytes / 1e6
    print(f"one slab with what its moved copy shows, as it lies in the cache: {megabytes:.0f} MB")


def processes(steps=60):
    """Slabs a second of the demo: one process with two threads, two processes of one thread by torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    for turn in range(3):
        for ranks, threads, front in ((1, 2, [sys.executable]), (2, 1, launch)):
            with tempfile.TemporaryDirectory() as folder:
                line = [*front, "pretrain.py", "configs/demo.py", f"--steps={steps}", f"--runs={folder}",
                        "--warmup=3", "--keep=()", f"--workers={2 // ranks}", f"--log_every={steps // 3}"]
                subprocess.run(line, cwd=ROOT, check=True, capture_output=True,
                               env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                log = [json.loads(text) for text in Path(folder, "demo/log.jsonl").read_text().splitlines()]
            pace = [entry["slabs_per_s"] for entry in log if "slabs_per_s" in entry][1:]
            print(f"round {turn + 1}: {ranks} process(es) x {threads} thread(s): {np.mean(pace):.2f} slabs/s")


ROWS = dict(memory=memory, scans=scans, traffic=traffic, processes=processes)


def main(argv):
    if not argv or set(argv) - set(ROWS):
        raise SystemExit(f"lab.scale: expected some of {', '.join(ROWS)}; found {argv}")
    print(json.dumps(run.versions()))
    for name in argv:
        ROWS[name]()


if __name__ == "__main__":
    run.program(main)
