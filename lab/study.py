"""The study: many small runs, one table.

    python -m lab.study configs/study.py
    python -m lab.study configs/study_rivals.py
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
import finetune
import metrics
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
    # {row: keys of pretrain.py, or of lab.rivals if `method` is among them, and `file`, what of its folder
    # stage 2 starts from if not encoder.pt; None: random weights; {"init": file}: an encoder there is, of
    # each {seed}}
    rows: dict = dataclasses.field(default_factory=dict)
    seeds: tuple = ()               # of every row, e.g. (0, 1, 2)
    # Learning rates that every row tries with the first seed: it keeps that of the best linear probe of the
    # scans of rate_keys. (): the rate of its keys
    rates: tuple = ()
    rate_keys: dict = dataclasses.field(default_factory=dict)       # of lab.probe, over probe_keys
    jobs: int = 1                   # processes at a time
    probes: bool = True             # lab.probe for every row
    shots: dict = dataclasses.field(default_factory=dict)   # {row: labelled scans, e.g. (1, 2, 4, 8)}
    labelled: int = 20              # training subjects of the fine-tuning config
    grid: str = "preprocessed"      # on which segmentations are scored, or "original"
    hd95: bool = False
    pretrain_config: str = ""
    finetune_config: str = ""
    pretrain_keys: dict = dataclasses.field(default_factory=dict)   # for all rows alike
    probe_keys: dict = dataclasses.field(default_factory=dict)      # .. of lab.probe alone
    finetune_keys: dict = dataclasses.field(default_factory=dict)


def check(cfg):
    """Exit unless there are rows, seeds, scans to judge rates by, and cfg.labelled training subjects, of
    which the shots are shares."""
    if not cfg.rows or not cfg.seeds or set(cfg.shots) - set(cfg.rows):
        raise SystemExit("the study needs `seeds`, `rows`, and shots of some of them; found seeds "
                         f"{cfg.seeds}, rows {', '.join(cfg.rows) or 'none'}, shots {cfg.shots}")
    if cfg.rates and not cfg.rate_keys:
        raise SystemExit(f"rates = {cfg.rates} are judged on the scans that rate_keys name; it is empty, and "
                         "the scans that the table reports must not choose")
    if not all(0 < n <= cfg.labelled for numbers in cfg.shots.values() for n in numbers):
        raise SystemExit(f"shots = {cfg.shots}: expected 1 to {cfg.labelled} (labelled)")
    if cfg.shots:
        keys = cfg.finetune_keys | dict(data=cfg.data, label_fraction=1.0)
        cases = tasks.split_cases(configs.load(finetune.Config, [cfg.finetune_config, *flags(keys)]))
        found = sorted({case["subject"] for case in cases["train"]})
        if len(found) != cfg.labelled:
            raise SystemExit(f"labelled = {cfg.labelled}, but {cfg.finetune_config} with finetune_keys "
                             f"trains on {len(found)} subjects ({', '.join(found[:3])}, ..)")


def flags(keys):
    return [f"--{key}={value}" for key, value in keys.items()]


def plan(row, seed, cfg):
    """{part: [[module, config, ..], ..]}: "pretrain", "rate" (the probe that chooses a learning rate),
    "probe" and every number of labelled scans."""
    name, own, runs = f"{row}-{seed}", cfg.rows[row], Path(cfg.runs) / cfg.name
    same = dict(runs=runs, seed=seed, data=cfg.data, cache=cfg.cache, workers=cfg.workers)
    probing = same | cfg.pretrain_keys | cfg.probe_keys | dict(name=name, probe_random=False)
    parts, init = {}, ""
    if own is None:
        probing["checkpoint"] = "random"
    elif "init" in own:
        init = probing["checkpoint"] = own["init"].format(seed=seed)
    else:
        own = dict(own)
        init = runs / name / own.pop("file", "encoder.pt")
        keys = same | cfg.pretrain_keys | own | dict(name=name)
        module = "lab.rivals" if "method" in own else "pretrain"
        parts["pretrain"] = [[module, cfg.pretrain_config, *flags(keys)]]
        # Of the row its network alone: all rows are probed by the same moves and tokens.
        probing |= {k: v for k, v in own.items() if k in inspect.signature(Swin3D).parameters}
        if cfg.rates and seed == cfg.seeds[0]:
            parts["rate"] = [["lab.probe", cfg.pretrain_config, *flags(probing | cfg.rate_keys)]]
    if cfg.probes:
        parts["probe"] = [["lab.probe", cfg.pretrain_config, *flags(probing)]]
    for shots in cfg.shots.get(row, ()):
        tuned = f"{name}-{shots}"
        keys = same | cfg.finetune_keys | dict(init=init, name=tuned, label_fraction=shots / cfg.labelled)
        resolved = [cfg.finetune_config, str(runs / tuned / "config.py")]   # of which it takes its own keys
        parts[str(shots)] = [["finetune", cfg.finetune_config, *flags(keys)],
                             ["evaluate", *resolved, "--sheets=0", "--predictions=False",
                              f"--hd95={cfg.hd95}"]]
    return parts


def number(folder, part, cfg):
    """What a part found: the probe's numbers, or {metric: {case: value}} of the test scans on cfg.grid."""
    if part == "pretrain":
        return None
    if part in ("rate", "probe"):
        return next(iter(json.loads((folder / "probe.json").read_text())["probe"].values()))
    results = json.loads(Path(f"{folder}-{part}", "results.json").read_text())["results"]
    rows = next(iter(results.values()))["rows"]
    return {metric: {row["id"]: row["scores"][cfg.grid][metric].get("mean", np.nan) for row in rows}
            for metric in ("dice", "hd95")[:1 + cfg.hd95]}


def run_row(n, row, seed, cfg, asked):
    """Run what is not complete, of the parts asked for (None: all) -> {part: {"value", "minutes",
    "commands"}}, as outcome.json holds it."""
    folder, gpus = Path(cfg.runs) / cfg.name / f"{row}-{seed}", torch.cuda.device_count()
    folder.mkdir(parents=True, exist_ok=True)
    done, log = folder / "outcome.json", folder / "out.log"
    outcome = json.loads(done.read_text()) if done.exists() else {}
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parents[1]))   # -m anywhere
    if gpus:
        environment |= dict(CUDA_VISIBLE_DEVICES=str(n % cfg.jobs % gpus))
    else:
        environment |= dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // cfg.jobs)))
    for part, commands in plan(row, seed, cfg).items():
        if outcome.get(part, {}).get("commands") == commands or asked and part not in asked:
            continue
        began = time.time()
        for command in commands:
            with open(log, "a") as file:
                print("python -m", *command, file=file, flush=True)
                line = [sys.executable, "-m", *command]
                ended = subprocess.run(line, env=environment, stdout=file, stderr=subprocess.STDOUT)
            if ended.returncode:
                raise SystemExit(f"python -m {' '.join(command)}\nfailed, see {log}")
        minutes = (time.time() - began) / 60
        outcome[part] = dict(value=number(folder, part, cfg), minutes=minutes, commands=commands)
        run.write_json(done, outcome)
        print(f"{folder.name}, {part}: {minutes:.1f} min", flush=True)
    return outcome


def cells(values, form="{:.3f}"):
    """Mean over the seeds, and every seed."""
    return f"{form.format(np.nanmean(values))} ({', '.join(map(form.format, values))})" if values else "-"


def markdown(heads, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


def probe_table(results, cfg):
    """A row of markdown per row of the study: mean over the seeds, and every seed in their order."""
    lines = []
    for row in cfg.rows:
        probes = [results[f"{row}-{seed}"]["probe"]["value"] for seed in cfg.seeds]
        columns = [[p[which]["balanced_accuracy"] for p in probes] for which in ("linear", "knn")]
        columns += [[p["silhouette_cosine"][0] for p in probes]]
        columns += [[p[which] for p in probes] for which in ("effective_rank", "correspondence")]
        lines.append([row, *map(cells, columns)])
    return markdown(["row", "linear probe", "k-NN", "silhouette (cosine)", "effective rank", "found again"],
                    lines)


def shots_table(results, cfg):
    """A row per number of labels and row: means over test cases, the seeds in their order, and the paired
    difference to the first row of that number, its interval over the cases, each the mean of its seeds."""
    heads = ["labelled", "row", "Dice"] + ["HD95, mm"] * cfg.hd95 + ["Dice less the first row's"]
    lines = []
    for shots in sorted({n for numbers in cfg.shots.values() for n in numbers}):
        first = None
        for row in (row for row in cfg.rows if shots in cfg.shots.get(row, ())):
            found = [results[f"{row}-{seed}"][str(shots)]["value"] for seed in cfg.seeds]
            columns = [cells([np.nanmean(list(f["dice"].values())) for f in found])]
            if cfg.hd95:
                far = np.array([list(f["hd95"].values()) for f in found])
                missed = f", {n} missed" if (n := np.isnan(far).sum()) else ""      # an empty mask has none
                columns.append(cells(list(np.nanmean(far, axis=1)), "{:.1f}") + missed)
            dice = np.mean([list(f["dice"].values()) for f in found], axis=0)
            if first is None:
                first, columns = dice, [*columns, ""]
            else:
                columns.append("{:+.3f} ({:+.3f} .. {:+.3f})".format(*metrics.paired_difference(dice, first)))
            lines.append([str(shots), row, *columns])
    return markdown(heads, lines)


def table(results, cfg):
    """The tables of what was asked for, and what they cost."""
    tables = (probe_table, cfg.probes), (shots_table, cfg.shots)
    texts = [make(results, cfg) for make, asked in tables if asked]
    minutes = sum(part["minutes"] for outcome in results.values() for part in outcome.values())
    seeds = ", ".join(map(str, cfg.seeds))
    texts.append(f"Mean (seeds {seeds}); {minutes:.0f} minutes of processes, {cfg.jobs} at a time.")
    return "\n\n".join(texts)


def run_all(cfg, seeds, asked=None):
    """{row-seed: outcome of run_row}: cfg.jobs processes at a time, dealt out to the GPUs if there are any,
    else sharing the cores."""
    jobs = [(row, seed) for seed in seeds for row in cfg.rows]  # every row once before any row twice
    with ThreadPoolExecutor(cfg.jobs) as pool:
        outcomes = list(pool.map(lambda n, job: run_row(n, *job, cfg, asked), range(len(jobs)), jobs))
    return {f"{row}-{seed}": outcome for (row, seed), outcome in zip(jobs, outcomes)}


def at_best_rates(cfg):
    """(cfg with "row, rate" in place of every row that learns, a table of what each rate gave)."""
    learn = {row: own for row, own in cfg.rows.items() if own is not None and "init" not in own}
    trials = {(row, rate): own | dict(lr=rate) for row, own in learn.items() for rate in cfg.rates}
    named = {trial: f"{trial[0]}, {trial[1]:g}" for trial in trials}
    of_trials = dataclasses.replace(cfg, rows={named[trial]: own for trial, own in trials.items()}, shots={})
    results = run_all(of_trials, cfg.seeds[:1], ("pretrain", "rate"))
    scores = {trial: results[f"{named[trial]}-{cfg.seeds[0]}"]["rate"]["value"]["linear"]["balanced_accuracy"]
              for trial in trials}
    best = {row: named[row, max(cfg.rates, key=lambda rate: scores[row, rate])] for row in learn}
    rows = {best.get(row, row): of_trials.rows.get(best.get(row), own) for row, own in cfg.rows.items()}
    shots = {best.get(row, row): numbers for row, numbers in cfg.shots.items()}
    lines = [[row, *(f"{scores[row, rate]:.3f}" for rate in cfg.rates)] for row in learn]
    tried = markdown(["linear probe that chooses", *(f"rate {rate:g}" for rate in cfg.rates)], lines)
    return dataclasses.replace(cfg, rows=rows, shots=shots), tried


def conduct(cfg):
    """Pre-train every row with every seed, probe it, fine-tune it with few labels; print and store one table.

    Each run is the ordinary command, so that it can be repeated by hand; what is complete is not run again.
    """
    check(cfg)
    cfg, tried = at_best_rates(cfg) if cfg.rates else (cfg, "")
    results = run_all(cfg, cfg.seeds)
    text, out = table(results, cfg) + (tried and f"\n\n{tried}"), Path(cfg.runs) / cfg.name
    run.write_json(out / "study.json", dict(results=results, config=dataclasses.asdict(cfg)) | run.versions())
    (out / "study.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run.program(lambda argv: conduct(configs.load(Config, argv)))
