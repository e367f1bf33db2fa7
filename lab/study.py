"""The study: many small runs, one table.

    python -m lab.study configs/study.py
"""
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import configs
import run
import tasks
from model import Swin3D


@dataclasses.dataclass
class Config:
    """The keys of a study."""
    name: str = "study"
    runs: str = "runs"
    data: str = "data"
    cache: str = "cache"
    workers: int = 1                # of each process
    rows: dict = dataclasses.field(default_factory=dict)            # {row: keys of pretrain.py, or None: not pre-trained}
    seeds: tuple = ()               # of every row, e.g. (0, 1, 2)
    jobs: int = 1                   # processes at a time
    shot_rows: tuple = ()           # rows that are fine-tuned with few labels
    shots: tuple = ()               # labelled scans, e.g. (1, 2, 4, 8)
    labelled: int = 20              # training subjects of the fine-tuning config
    pretrain_config: str = ""
    finetune_config: str = ""
    pretrain_keys: dict = dataclasses.field(default_factory=dict)   # for all rows alike
    probe_keys: dict = dataclasses.field(default_factory=dict)      # .. of lab.probe alone; the others it shares with pretrain.py
    finetune_keys: dict = dataclasses.field(default_factory=dict)


def study(cfg):
    """Pre-train every row of cfg.rows with every seed, probe it, fine-tune it with few labels; print and store one table.

    Each run is the ordinary command in a process of its own, so that a row can be repeated by hand; what is complete is not run
    again. cfg.jobs processes run at a time, dealt out to the GPUs if there are any, else sharing the cores.
    """
    lost = [row for row in cfg.shot_rows if row not in cfg.rows]
    if lost or not cfg.rows or not cfg.seeds:
        raise SystemExit(f"the study needs `seeds`, `rows`, and shot_rows among them; found seeds {cfg.seeds}, "
                         f"rows {', '.join(cfg.rows) or 'none'}, shot_rows {cfg.shot_rows}")
    check_shots(cfg)
    jobs = [(row, seed) for seed in cfg.seeds for row in cfg.rows]      # every row once before any row twice
    with ThreadPoolExecutor(cfg.jobs) as pool:
        outcomes = list(pool.map(lambda k: study_run(*jobs[k], k % cfg.jobs, cfg), range(len(jobs))))
    results = {f"{row}-{seed}": outcome for (row, seed), outcome in zip(jobs, outcomes)}
    text = study_table(results, cfg)
    out = Path(cfg.runs) / cfg.name
    run.write_json(out / "study.json", dict(results=results, config=dataclasses.asdict(cfg), **run.versions()))
    (out / "study.md").write_text(text + "\n")
    print(text)


def check_shots(cfg):
    """Exit unless the fine-tuning config has cfg.labelled training subjects, of which the shots are shares."""
    if not cfg.shots:
        return
    if not all(0 < n <= cfg.labelled for n in cfg.shots):
        raise SystemExit(f"shots = {cfg.shots}: expected 1 to {cfg.labelled} (labelled)")
    fields = {field.name for field in dataclasses.fields(tasks.Config)}
    keys = {k: v for k, v in cfg.finetune_keys.items() if k in fields} | dict(data=cfg.data, label_fraction=1.0)
    cases = tasks.split_cases(configs.load(tasks.Config, [cfg.finetune_config, *[f"--{k}={v}" for k, v in keys.items()]]))
    subjects = {case["subject"] for case in cases["train"]}
    if len(subjects) != cfg.labelled:
        raise SystemExit(f"labelled = {cfg.labelled}, but {cfg.finetune_config} with finetune_keys trains on {len(subjects)} subjects "
                         f"({', '.join(sorted(subjects)[:3])}, ..)")


def study_run(row, seed, slot, cfg):
    """One row with one seed -> {part: {"value": .., "minutes": .., "commands": ..}}, also in outcome.json of its run folder.

    The parts are "probe" (its results) and every number of labelled scans (mean Dice of the test scans, preprocessed grid).
    """
    runs, name = Path(cfg.runs) / cfg.name, f"{row}-{seed}"
    here = Path(tasks.__file__).resolve().parent
    pretrain, finetune, evaluate, probe = (here / "pretrain.py",), (here / "finetune.py",), (here / "evaluate.py",), ("-m", "lab.probe")
    done, gpus = runs / name / "outcome.json", torch.cuda.device_count()
    outcome = json.loads(done.read_text()) if done.exists() else {}
    cores = max(1, (os.cpu_count() or 1) // cfg.jobs)
    environment = os.environ | {"PYTHONPATH": str(here)} | ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {"OMP_NUM_THREADS": str(cores)})
    same = dict(runs=runs, seed=seed, data=cfg.data, cache=cfg.cache, workers=cfg.workers)
    known = {field.name for field in dataclasses.fields(tasks.Config)}        # evaluate.py takes no key of the optimisation
    overrides, encoder = cfg.rows[row], runs / name / "encoder.pt"

    def part(key, value, *commands):
        """Run the commands of a part that is not complete, and keep value()."""
        lines = [[sys.executable, *map(str, script), str(config), *[f"--{k}={v}" for k, v in keys.items()]] for script, config, keys in commands]
        if outcome.get(key, {}).get("commands") == lines:
            return
        began = time.time()
        for line in lines:
            with open(done.with_name("out.log"), "a") as log:
                log.write(" ".join(line) + "\n")
                log.flush()
                if subprocess.run(line, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode:
                    raise SystemExit(f"{' '.join(line)}\nfailed, see {done.with_name('out.log')}")
        outcome[key] = dict(value=value(), minutes=(time.time() - began) / 60, commands=lines)
        run.write_json(done, outcome)
        print(f"{name}, {key}: {outcome[key]['minutes']:.1f} min", flush=True)

    done.parent.mkdir(parents=True, exist_ok=True)
    keys = cfg.pretrain_keys | (overrides or {})
    network = {k: v for k, v in keys.items() if k in inspect.signature(Swin3D).parameters}
    shared = {k: v for k, v in cfg.pretrain_keys.items() if k in known}     # not the row's: all are probed by the same moves and tokens
    probing = same | shared | cfg.probe_keys | network
    probing |= dict(name=name, out=runs / name, probe_random=overrides is None)
    probed = lambda: next(iter(json.loads((runs / name / "probe.json").read_text())["probe"].values()))
    if overrides is None:                                               # this row is not pre-trained
        part("probe", probed, (probe, cfg.pretrain_config, probing | dict(checkpoint="random")))
    else:
        part("probe", probed, (pretrain, cfg.pretrain_config, same | keys | dict(name=name)),
             (probe, cfg.pretrain_config, probing | dict(checkpoint=encoder)))
    for shots in cfg.shots if row in cfg.shot_rows else ():
        tuned = f"{name}-{shots}"
        keys = same | cfg.finetune_keys | dict(name=tuned, label_fraction=shots / cfg.labelled)
        scoring = {k: v for k, v in keys.items() if k in known} | dict(sheets=0, predictions=False, hd95=False)
        scored = lambda: next(iter(json.loads((runs / tuned / "results.json").read_text())["results"].values()))
        part(str(shots), lambda: scored()["summary"]["preprocessed"]["dice"]["mean"]["mean"],
             (finetune, cfg.finetune_config, keys | ({} if overrides is None else dict(init=encoder))),
             (evaluate, cfg.finetune_config, scoring))
    return outcome


def study_table(results, cfg):
    """A row of markdown per row of the study: mean over the seeds, and every seed in their order."""
    def cell(values):
        values = [float(v) for v in values]                             # absent: this row was not fine-tuned
        return f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})" if values else "-"
    columns = {"linear probe": lambda p: p["linear"]["balanced_accuracy"], "k-NN": lambda p: p["knn"]["balanced_accuracy"],
               "silhouette (cosine)": lambda p: p["silhouette_cosine"][0], "effective rank": lambda p: p["effective_rank"],
               "found again": lambda p: p["correspondence"]}
    heads = ["row", *columns, *[f"Dice, {n} labelled" for n in cfg.shots]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in cfg.rows:
        found = [results[f"{row}-{seed}"] for seed in cfg.seeds]
        cells = [cell([column(f["probe"]["value"]) for f in found]) for column in columns.values()]
        cells += [cell([f[str(n)]["value"] for f in found if str(n) in f]) for n in cfg.shots]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    minutes = sum(part["minutes"] for outcome in results.values() for part in outcome.values())
    return "\n".join(lines) + f"\n\nMean (seeds {', '.join(map(str, cfg.seeds))}); {minutes:.0f} minutes of processes, {cfg.jobs} at a time."


if __name__ == "__main__":
    study(configs.load(Config, sys.argv[1:]))
