"""Pre-train our Swin3D by another self-supervised method, on the same data and with the same budget.

    python -m lab.rivals configs/demo.py --method=simclr        -> runs/demo-simclr/encoder.pt

A method is a small nn.Module: `encoder`, `passes` (encoder passes of a crop per sample and step: with and
without gradient; a function of the crop where inputs have another size) and forward(batch, generator) ->
(loss (), {name: () to log}); after_step(step, steps), `swin_unetr`, whose decoder learns as well, and
`alike`, how many first edges of a crop must be equal, if it has them. All its draws come from the generator,
which is seeded by the run's seed and the step. batch:

    V, V_, twin             (b, c, x, y, z) a crop; its moved copy, intensities changed; a second one of those
    H, H_twin               (b, 4, 4) float64, V -> V_ and V -> twin in voxels
    pairs                   (m, 3) rows (b, i, j): true matches V <-> V_ among the body's tokens (token_patch)
    valid, valid_           (b, t) bool, the tokens of V and V_ that show the body
    start, shape, subjects  (b, 3) first voxel of V in its scan; (b, 3) size of the scan; (b,) whose scan
    around, around_start    with `surroundings = True` only: (b, c, 3x/2, 3y/2, 3z/2) more of its scan;
                            (b, 3) its first voxel in the scan

Budget: a pass with gradient counts 3, one without 1. S2DC's step at one crop a slab counts 5 a sample (V; V'
and twin without gradient), so `steps` and `warmup`, which are S2DC's, are multiplied by 5 over the method's
count. Decoders and heads are not counted. One process: the batch is what a method contrasts.
"""
import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import configs
import data
import pretrain
import run
from lab.rivals import contrast, masking, puzzles, variants

METHODS = contrast.METHODS | masking.METHODS | puzzles.METHODS | variants.METHODS
S2DC = 3 * 1 + 2        # what a step of S2DC counts per sample


@dataclasses.dataclass
class Config(pretrain.Config):
    """The keys of pre-training, of which a method reads those of data, network, optimisation and heads."""
    method: str = ""                # which rival; steps and warmup are S2DC's, see the head of this file


class Samples(data.Slabs):
    """Slabs, each one crop, with what methods ask beyond S2DC."""

    def __init__(self, scans, cfg, surroundings):
        super().__init__(scans, cfg, cfg.batch, cfg.seed)
        self.surroundings = surroundings

    def __getitem__(self, step_place):
        step, place = step_place
        scan = data.nth_scan(self.scans, self.seed, step * self.batch + place)
        sample = super().__getitem__(step_place)
        subject = torch.tensor(data.subject_number(scan.subject))
        sample |= dict(shape=torch.tensor(scan.shape), subjects=subject)
        if self.surroundings:
            generator = np.random.default_rng((self.seed, 4, step, place))
            sample |= self.around(scan, sample["start"].numpy(), generator)
        return sample

    def around(self, scan, start, generator):
        """Half as long again as the crop at `start`, which it holds: any place within the scan, or centred on
        a scan that is smaller."""
        crop, shape = np.array(self.cfg.crop), np.array(scan.shape)
        size = crop + crop // 2
        low, high = np.maximum(start + crop - size, 0), np.minimum(start, shape - size)
        drawn = generator.integers(low, np.maximum(high, low) + 1)
        low = np.where(shape < size, -((size - shape) // 2), drawn)
        return dict(around=torch.from_numpy(scan.cut(low, low + size)), around_start=torch.from_numpy(low))


def on_device(batch, cfg, device):
    """What a method sees of the loader's batch: see the head of this file."""
    batch = run.to_device(batch, device)
    views = dict(zip(("V", "V_", "twin"), data.views(batch, cfg)))
    return batch | views | {key: batch[key].float() for key in ("around",) if key in batch}


def load(argv):
    """The config, named <name>-<method> unless --name is given, so that no method goes on with another's
    run."""
    cfg = configs.load(Config, argv)
    if cfg.method not in METHODS:
        raise SystemExit(f"method = {cfg.method!r}, expected one of {', '.join(METHODS)}")
    if not any(arg.startswith("--name=") for arg in argv) and not cfg.name.endswith(f"-{cfg.method}"):
        cfg = dataclasses.replace(cfg, name=f"{cfg.name}-{cfg.method}")
    return cfg


def check(cfg, ranks):
    """Refuse what cannot run, one line each, before anything is read or written."""
    pretrain.check(cfg, ranks)
    alike = getattr(METHODS[cfg.method], "alike", 0)
    run.refuse([
        (cfg.slab == cfg.crop, f"slab = {cfg.slab}, crop = {cfg.crop}: a rival sees one crop of a scan, give "
         f"--slab={','.join(map(str, cfg.crop))}"),
        (ranks == 1 and cfg.accumulate == 1,
         "rivals train in one process, a step in one pass: methods contrast the samples of a batch"),
        (len(set(cfg.crop[:alike])) <= 1, f"{cfg.method} turns crops whose first {alike} edges are alike, "
         f"found crop = {cfg.crop}"),
        (not cfg.init, "init: rivals start from random weights"),
        (not cfg.decoder, "decoder = True: pretrain.py reads it, a rival does not"),
        (cfg.method not in variants.METHODS or (cfg.matching, cfg.negatives) == ("dual_softmax", "step"),
         f"{cfg.method} matches by 'dual_softmax' and has negatives of the 'step' alone, found "
         f"matching = {cfg.matching!r}, negatives = {cfg.negatives!r}"),
    ])


def passes(cfg, method):
    """(with, without gradient): encoder passes of one crop that a step of the method costs a sample."""
    return method.passes(cfg.crop) if callable(method.passes) else method.passes


def planned(cfg, method):
    """The config with the method's own steps and warm-up, as many encoder passes as S2DC's `steps` cost."""
    learning, frozen = passes(cfg, method)
    ratio = S2DC / (3 * learning + frozen)
    return dataclasses.replace(cfg, steps=max(1, round(cfg.steps * ratio)), warmup=round(cfg.warmup * ratio))


def build(cfg, device):
    torch.manual_seed(cfg.seed)
    network = METHODS[cfg.method](cfg).to(device).train()
    if cfg.compile:
        network.encoder.compile()
    return network, pretrain.adamw(network, cfg)


def save(folder, network, optimizer, plan, step, origin):
    """encoder.pt, as of stage 1, network.pt of a method whose decoder is to be fine-tuned, and last.pt."""
    pretrain.save_encoder(folder / "encoder.pt", network, plan, step, origin)
    if whole := getattr(network, "swin_unetr", None):
        pretrain.save_network(folder / "network.pt", whole, network.ups, plan, step, origin)
    state = dict(format="s2dc/rival", network=network.state_dict(), optimizer=optimizer.state_dict())
    state |= dict(step=step, config=dataclasses.asdict(plan), seen=origin["seen"], scans=origin["scans"])
    run.save(folder / "last.pt", state, keep=True)


def report(line):
    tail = "lr", "samples_per_s", "waiting", "memory_gb"
    measures = "  ".join(f"{name} {value:.4f}" for name, value in line.items() if name not in ("step", *tail))
    lr, pace, waiting, memory = (line[name] for name in tail)
    return (f"step {line['step']:6d}  {measures}  lr {lr:.2e}  {pace:.2f} samples/s  waiting {waiting:.0%}  "
            f"{memory:.2f} GB")


def open_run(cfg, plan, scans, device, state):
    """(network, optimizer, iterator of batches) at the step that `state` is of."""
    network, optimizer = build(plan, device)
    if state is not None:
        with run.of_this_version(state):
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
        print(f"resumed at step {state['step']}")
    grid = tuple(s // cfg.token_patch for s in cfg.crop)
    samples = Samples(scans, plan, getattr(network, "surroundings", False))
    batches = run.batches(samples, plan, 0, 1, state["step"] if state else 0,
                          functools.partial(pretrain.assemble, token_grid=grid, patch=cfg.token_patch))
    return network, optimizer, batches


def main(argv):
    cfg = load(argv)
    check(cfg, run.processes()[1])
    method, folder = METHODS[cfg.method], Path(cfg.runs) / cfg.name
    plan = planned(cfg, method)
    state = run.resume(folder, plan, pretrain.FREE, print)
    first = state["step"] if state else 0
    if first >= plan.steps:
        print(f"{folder} is complete: {first} steps; its encoder is {folder}/encoder.pt")
        return
    print(configs.differing(cfg))
    scans, device = pretrain.open_scans(cfg, 1, 0, folder, first, print)
    network, optimizer, batches = open_run(cfg, plan, scans, device, state)
    cost = passes(cfg, method)
    origin = run.versions() | dict(passes=cost, steps_of_s2dc=cfg.steps, steps=plan.steps)
    print("{:.3g} encoder passes with, {:.3g} without gradient a sample: ".format(*cost)
          + f"steps {first} to {plan.steps} cost what {cfg.steps} of S2DC do")
    print(f"{origin['device']}, {len(scans)} scans")
    lock = run.start_log(folder, cfg, first, origin)
    # for the encoder's file, not for the log
    origin |= dict(seen=pretrain.seen_so_far(scans, cfg, state, print), scans=len(scans))
    train(cfg, plan, folder, first, network, optimizer, batches, device, origin)
    del lock            # another process may train under this name now


def train(cfg, plan, folder, first, network, optimizer, batches, device, origin):
    """Steps `first` to plan.steps."""
    bf16 = run.bfloat16(cfg, device)
    learned = [p for p in network.parameters() if p.requires_grad]
    sums, waited, counted = {}, 0.0, 0
    began = tick = time.time()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr_at(step, plan)
        start = time.time()
        batch = next(batches)
        waited += time.time() - start
        draws = int(np.random.default_rng((cfg.seed, 5, step)).integers(2 ** 62))
        generator = torch.Generator(device).manual_seed(draws)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, measures = network(on_device(batch, cfg, device), generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learned, cfg.clip)
        terms = {"loss": loss} | measures | {"grad_norm": norm}
        if not torch.isfinite(norm + loss):             # nothing of this step reaches the weights or the disk
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            run.diverged(folder, step, f"{values}; cases: {', '.join(batch['id'])}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(network, "after_step"):
            network.after_step(step, plan.steps)
        sums |= {name: sums.get(name, 0) + value.detach().float() for name, value in terms.items()}
        counted, done = counted + 1, step + 1

        if done % cfg.log_every == 0 or done == plan.steps:
            now = time.time()
            pace = dict(samples_per_s=counted * cfg.batch / (now - tick), waiting=waited / (now - tick))
            line = dict(step=done, **pretrain.average(sums, counted, 1), lr=run.lr_at(step, plan), **pace,
                        memory_gb=run.memory_gb())
            print(report(line) + f"  {run.clock((now - began) / (done - first) * (plan.steps - done))} left")
            run.write_log(folder, line)
            sums, waited, counted, tick = {}, 0.0, 0, now
        if done in cfg.keep:
            pretrain.save_encoder(folder / f"encoder-{done}.pt", network, plan, done, origin)
        if done % cfg.save_every == 0 or done == plan.steps:
            save(folder, network, optimizer, plan, done, origin)
    print(f"{plan.steps} steps in {run.clock(time.time() - began)}; encoder: {folder}/encoder.pt")


if __name__ == "__main__":
    run.program(main)
