"""The study: many small runs, one table.

    python -m lab.study configs/study.py
    python -m lab.study configs/study_rivals.py
"""
import dataclasses
import hashlib
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import configs
import data
import finetune
import metrics
import pretrain
import run
import tasks
from lab import probe
from model import Swin3D


@dataclasses.dataclass
class Config:
    """The keys of a study."""
    name: str = "study"             # of the folder of its runs, which other studies may share
    table: str = "study"            # of its tables there, <table>.md and .json
    runs: str = "runs"
    data: str = "data"
    cache: str = "cache"
    workers: int = 1                # of each process
    # {row: keys of pretrain.py, or of lab.rivals if `method` is among them, and `file`, what of its folder
    # stage 2 starts from if not encoder.pt; None: random weights; {"of": row}: what an earlier row learned,
    # fine-tuned in another way; {"init": file}: an encoder of another study, of each {seed}}
    rows: dict = dataclasses.field(default_factory=dict)
    only: str | tuple = ()          # of `rows`, the few that are run and shown; (): all
    seeds: tuple = ()               # of every row, e.g. (0, 1, 2)
    # Learning rates that every row tries with the first seed: it keeps that of the best linear probe of the
    # scans of rate_keys. (): the rate of its keys
    rates: tuple = ()
    widen: int = 0                  # how often a row whose best is the least or largest tries one beyond it
    rate_keys: dict = dataclasses.field(default_factory=dict)       # of lab.probe, over probe_keys
    jobs: int = 1                   # processes at a time
    probes: bool = True             # lab.probe for every row
    shots: dict = dataclasses.field(default_factory=dict)   # {row: labelled scans, e.g. (1, 2, 4, 8)}
    labelled: int = 20              # training subjects of the fine-tuning config
    # Other labelled subjects with every seed (split_seed = seed), so that an interval over seeds is of both;
    # False: the same for all
    redraw: bool = False
    grid: str = "preprocessed"      # on which segmentations are scored, or "original"
    hd95: bool = False
    pretrain_config: str = ""
    finetune_config: str = ""
    pretrain_keys: dict = dataclasses.field(default_factory=dict)   # for all rows alike
    probe_keys: dict = dataclasses.field(default_factory=dict)      # .. of lab.probe alone
    finetune_keys: dict = dataclasses.field(default_factory=dict)
    tuned: dict = dataclasses.field(default_factory=dict)   # {row: keys of its stage 2, over finetune_keys}


def base(own):
    """The row whose encoder a row of these keys fine-tunes, or None."""
    return (own or {}).get("of")


def learns(own):
    """Whether a row of these keys pre-trains, and is not random weights or an encoder that is there."""
    return own is not None and not {"of", "init"} & {*own}


def narrow(cfg):
    """cfg with the rows of cfg.only alone, and what is asked of these."""
    cfg = dataclasses.replace(cfg, only=data.several(cfg.only))
    for key in ("only", "shots", "tuned"):
        if lost := sorted({*getattr(cfg, key)} - {*cfg.rows}):
            raise SystemExit(f"{key}: found {str(lost)[1:-1]}, expected some of the rows "
                             f"{str([*cfg.rows])[1:-1] or 'none'}")
    kept = {key: {row: own for row, own in getattr(cfg, key).items() if row in (cfg.only or cfg.rows)}
            for key in ("rows", "shots", "tuned")}
    return dataclasses.replace(cfg, **kept)


def check(cfg):
    """Exit unless there are rows, seeds, scans to judge rates by that no table reports, and cfg.labelled
    training subjects, of which the shots are shares."""
    if not cfg.rows or not cfg.seeds:
        raise SystemExit(f"the study needs `seeds` and `rows`; found seeds {cfg.seeds}, rows "
                         f"{', '.join(cfg.rows) or 'none'}")
    before = []
    for row, own in cfg.rows.items():
        if base(own) and (base(own) not in before or len(own) > 1):
            raise SystemExit(f"row {row}: expected 'of' a row before it that learns (named in `only`, too), "
                             f"and no other key, found {own}; there are {', '.join(before) or 'none'}")
        before += [row] * learns(own)
    if cfg.rates and not cfg.rate_keys:
        raise SystemExit(f"rates = {cfg.rates} are judged on the scans that rate_keys name; it is empty, and "
                         "the scans that the table reports must not choose")
    if cfg.widen and len(cfg.rates) < 3:
        raise SystemExit(f"widen = {cfg.widen}: expected three rates, found rates = {cfg.rates}")
    if not all(0 < n <= cfg.labelled for numbers in cfg.shots.values() for n in numbers):
        raise SystemExit(f"shots = {cfg.shots}: expected 1 to {cfg.labelled} (labelled)")
    if cfg.shots:
        keys = cfg.finetune_keys | dict(data=cfg.data, label_fraction=1.0)
        own = configs.load(finetune.Config, [cfg.finetune_config, *flags(keys)])
        if cfg.redraw and (own.test_share or own.val_share):
            raise SystemExit(f"redraw: expected val and test named in {cfg.finetune_config}, lest they "
                             f"change, too; found test_share {own.test_share}, val_share {own.val_share}")
        cases = tasks.split_cases(own)
        found = sorted({case["subject"] for case in cases["train"]})
        if len(found) != cfg.labelled:
            raise SystemExit(f"labelled = {cfg.labelled}, but {cfg.finetune_config} with finetune_keys "
                             f"trains on {len(found)} subjects ({', '.join(found[:3])}, ..)")
    if cfg.rates:
        keys = cfg.pretrain_keys | cfg.probe_keys | dict(data=cfg.data)
        probing = [[cfg.pretrain_config, *flags(keys | more)] for more in (cfg.rate_keys, {})]
        judging, told = (data.find_cases(probe.load(probe.Config, argv)) for argv in probing)
        told = (told if cfg.probes else []) + (cases["test"] if cfg.shots else [])
        if both := {str(case["images"][0]) for case in judging} & {str(case["images"][0]) for case in told}:
            raise SystemExit(f"rate_keys: {len(both)} scans that the table reports would choose the rate, "
                             f"{min(both)} among them")


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
    elif base(own):
        init = runs / f"{base(own)}-{seed}" / cfg.rows[base(own)].get("file", "encoder.pt")
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
    if cfg.probes and not base(own):        # whose probe is of the same encoder
        parts["probe"] = [["lab.probe", cfg.pretrain_config, *flags(probing)]]
    for shots in cfg.shots.get(row, ()):
        tuned = f"{name}-{shots}"
        keys = same | cfg.finetune_keys | cfg.tuned.get(row, {})
        keys |= dict(init=init, name=tuned, label_fraction=shots / cfg.labelled)
        keys |= dict(split_seed=seed) if cfg.redraw else {}
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


def decisive(command):
    """A command less the keys that change no result."""
    return [arg for arg in command if not arg.startswith(("--workers=", "--cache=", "--log_every="))]


READING = threading.Lock()      # runpy, which reads configs, is not for several threads


def digest(command):
    """Of what a command leaves to files: the keys of its config and of lab.probe's beside it, but those that
    no stage depends on, and the weights that it starts from."""
    _, file, *words = command
    beside = Path(file).with_name(f"{Path(file).stem}_probe.py")
    with READING:
        keys = [configs.read(each) for each in (file, beside) if Path(each).is_file()]
    free = {*pretrain.FREE} & {*finetune.FREE}          # labels change scores, overlap predictions
    kept = [{key: own[key] for key in sorted(own) if key not in free} for own in keys]
    init = [Path(word.partition("=")[2]) for word in words if word.startswith("--init=")]
    weights = b"".join(path.read_bytes() for path in init if path.is_file())
    return hashlib.sha256(repr(kept).encode() + weights).hexdigest()[:16]


def other_than(before, commands, now):
    """How a part that was made before differs from what these commands, of digest `now`, make, or ""."""
    then = before["commands"]
    if [*map(decisive, then)] != [*map(decisive, commands)]:
        return f"was made by `{' '.join(then[0])}`, now `{' '.join(commands[0])}`"
    if before.get("digest", now) != now:
        return f"{commands[0][1]}, or what --init names, is not what it was then"
    return ""


def run_row(n, row, seed, cfg, asked):
    """Run what is not complete, of the parts asked for (None: all) -> {part: {"value", "minutes", "commands",
    "commit"}} of those in its plan, out of outcome.json, which keeps others of before, whole or broken off.
    A trial of a rate that diverges has the value "diverged"."""
    folder, gpus = Path(cfg.runs) / cfg.name / f"{row}-{seed}", torch.cuda.device_count()
    folder.mkdir(parents=True, exist_ok=True)
    done, log = folder / "outcome.json", folder / "out.log"
    outcome, commit = json.loads(done.read_text()) if done.exists() else {}, run.versions()["commit"]
    # -m anywhere; evaluate, too, reads where training did
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parents[1]), S2DC_DATA=cfg.data)
    if gpus:
        environment |= dict(CUDA_VISIBLE_DEVICES=str(n % cfg.jobs % gpus))
    else:
        environment |= dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // cfg.jobs)))
    parts = plan(row, seed, cfg)
    for part, commands in parts.items():
        before, now = outcome.get(part, {}), digest(commands[0])
        other = before and other_than(before, commands, now)
        if "minutes" in before and not other or asked and part not in asked:
            continue
        if part != "pretrain" and outcome.get("pretrain", {}).get("value") == "diverged":
            break
        if part not in ("rate", "probe"):       # which train: theirs must be no other run under this name
            advice = f"remove it and all {folder.name}-*, or give the study another --name"
            if other:
                raise SystemExit(f"{folder}, {part}: {other}; {advice}")
            if not before and part != "pretrain" and Path(f"{folder}-{part}", "last.pt").exists():
                raise SystemExit(f"{folder}-{part}: a run that {folder.name} does not know of; {advice}")
            outcome[part] = dict(commands=commands, digest=now)
            run.write_json(done, outcome)
        began, value = time.time(), None
        for command in commands:
            with open(log, "a") as file:
                print("python -m", *command, file=file, flush=True)
                line = [sys.executable, "-m", *command]
                ended = subprocess.run(line, env=environment, stdout=file, stderr=subprocess.STDOUT)
            if ended.returncode:
                why = log.read_text().splitlines()[-1]
                if part != "pretrain" or not asked or "not finite" not in why:
                    raise SystemExit(f"{why}, says {log} of python -m {' '.join(command)} (status "
                                     f"{ended.returncode})")
                value = "diverged"
        minutes = (time.time() - began) / 60
        outcome[part] = dict(value=value or number(folder, part, cfg), minutes=minutes, commands=commands,
                             commit=commit, digest=now)
        run.write_json(done, outcome)
        print(f"{folder.name}, {part}: {minutes:.1f} min{', ' + value if value else ''}", flush=True)
    return {part: outcome[part] for part in parts if part in outcome}


def cells(values, form="{:.3f}"):
    """Mean over the seeds, and every seed."""
    return f"{form.format(np.nanmean(values))} ({', '.join(map(form.format, values))})" if values else "-"


def markdown(heads, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


def probe_table(results, cfg):
    """A row of markdown per row of the study: mean over the seeds, and every seed in their order."""
    lines = []
    for row in (row for row, own in cfg.rows.items() if not base(own)):
        probes = [results[f"{row}-{seed}"]["probe"]["value"] for seed in cfg.seeds]
        columns = [[p[which]["balanced_accuracy"] for p in probes] for which in ("linear", "knn")]
        columns += [[p["silhouette_cosine"][0] for p in probes]]
        columns += [[p[which] for p in probes] for which in ("effective_rank", "correspondence")]
        lines.append([row, *map(cells, columns)])
    return markdown(["row", "linear probe", "k-NN", "silhouette (cosine)", "effective rank", "found again"],
                    lines)


def by_seed(each):
    """Differences (n,), one a seed, and from two on Student's 95 % interval of their mean."""
    text = ", ".join(map("{:+.3f}".format, each))
    if len(each) > 1:
        far = stats.t.ppf(0.975, len(each) - 1) * stats.sem(each)
        text += " ({:+.3f} .. {:+.3f})".format(np.mean(each) - far, np.mean(each) + far)
    return text


def shots_table(results, cfg):
    """A row per number of labels and row: means over test cases, the seeds in their order, and the paired
    difference to the first row of that number, once with its interval over the cases, each the mean of its
    seeds, and once seed by seed, with Student's 95 % interval: would other seeds gain, too, with the same
    labelled subjects, or under cfg.redraw with others?"""
    heads = ["labelled", "row", "Dice"] + ["HD95, mm"] * cfg.hd95
    heads += ["Dice less the first row's", "of each seed"]
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
            dice = np.array([list(f["dice"].values()) for f in found])      # (seeds, cases)
            if first is None:
                first, columns = dice, [*columns, "", ""]
            else:
                gain = metrics.paired_difference(dice.mean(axis=0), first.mean(axis=0))
                each = np.nanmean(dice - first, axis=1)
                columns += ["{:+.3f} ({:+.3f} .. {:+.3f})".format(*gain), by_seed(each)]
            lines.append([str(shots), row, *columns])
    return markdown(heads, lines)


def cost(results):
    """(minutes of all parts, the commits that made them)."""
    parts = [part for outcome in results.values() for part in outcome.values()]
    return sum(part["minutes"] for part in parts), sorted({part.get("commit", "unknown") for part in parts})


def table(results, cfg):
    """The tables of what was asked for, and what they cost."""
    tables = (probe_table, cfg.probes), (shots_table, cfg.shots)
    texts = [make(results, cfg) for make, asked in tables if asked]
    minutes, commits = cost(results)
    texts.append(f"Mean (seeds {', '.join(map(str, cfg.seeds))}); {minutes:.0f} minutes of processes, "
                 f"{cfg.jobs} at a time; code of {', '.join(commits)}.")
    return "\n\n".join(texts)


def run_all(cfg, seeds, asked=None):
    """{row-seed: outcome of run_row}: cfg.jobs processes at a time, dealt out to the GPUs if there are any,
    else sharing the cores. A run that fails is named at once, the others go on, then one line says which."""
    jobs, ends = [(row, seed) for seed in seeds for row in cfg.rows], {}    # every row once before any twice

    def one(n, row, seed):
        needed = base(cfg.rows[row])        # which comes before, so it is done or under way
        try:
            if needed and ends[needed, seed].result() is None:
                raise SystemExit(f"not run, for {needed}-{seed} failed")
            return run_row(n, row, seed, cfg, asked)
        except SystemExit as error:
            print(f"{row}-{seed}: {error}", flush=True)

    with ThreadPoolExecutor(cfg.jobs) as pool:
        for n, job in enumerate(jobs):
            ends[job] = pool.submit(one, n, *job)
    outcomes = {f"{row}-{seed}": end.result() for (row, seed), end in ends.items()}
    if lost := [name for name, outcome in outcomes.items() if outcome is None]:
        raise SystemExit(f"{len(lost)} of {len(jobs)} runs of {cfg.name} failed: {', '.join(lost)}; started "
                         "again the study goes on with these")
    return outcomes


def widened(rates, best):
    """Sorted rates and, from three on, one more beyond the end that is `best`: after 1 3 10 comes 30, then
    100, as far from the last as the last but one from the one before."""
    for side in (rates, rates[::-1]) if len(rates) > 2 else ():
        if side[-1] == best:
            rates = sorted([*rates, float(f"{side[-1] * side[-2] / side[-3]:.6g}")])
    return rates


def at_best_rates(cfg):
    """(cfg with "row, rate" in place of every row that learns, a table of what each rate gave)."""
    learn = {row: own for row, own in cfg.rows.items() if learns(own)}
    asked, scores, results = {row: sorted(cfg.rates) for row in learn}, {}, {}
    for _ in range(1 + cfg.widen):
        todo = [(row, rate) for row in learn for rate in asked[row] if (row, rate) not in scores]
        named = {f"{row}, {rate:g}": learn[row] | dict(lr=rate) for row, rate in todo}
        trials = dataclasses.replace(cfg, rows=named, shots={}, tuned={})
        results |= run_all(trials, cfg.seeds[:1], ("pretrain", "rate"))
        for row, rate in todo:
            found = results[f"{row}, {rate:g}-{cfg.seeds[0]}"].get("rate")
            scores[row, rate] = found["value"]["linear"]["balanced_accuracy"] if found else -1
        best = {row: max((scores[r, rate], rate) for r, rate in scores if r == row)[1] for row in learn}
        asked = {row: widened(rates, best[row]) for row, rates in asked.items()}
    if lost := [row for row, rate in best.items() if scores[row, rate] < 0]:
        raise SystemExit(f"{', '.join(lost)}: diverged at every rate, see {Path(cfg.runs) / cfg.name}")
    named = {row: f"{row}, {rate:g}" for row, rate in best.items()}
    rows = {named.get(row, row): own | dict(lr=best[row]) if row in best else own
            for row, own in cfg.rows.items()}
    rows = {row: dict(of=named[base(own)]) if base(own) else own for row, own in rows.items()}
    shots, tuned = ({named.get(row, row): own for row, own in of.items()} for of in (cfg.shots, cfg.tuned))
    every, show = sorted({rate for _, rate in scores}), {None: "", -1: "diverged"}
    lines = [[row, *(show.get(x, x and f"{x:.3f}") for x in (scores.get((row, rate)) for rate in every))]
             for row in learn]
    text = markdown(["linear probe that chooses", *(f"rate {rate:g}" for rate in every)], lines)
    kept = {f"{name}-{cfg.seeds[0]}" for name in named.values()}
    minutes, commits = cost({name: found for name, found in results.items() if name not in kept})
    text += f"\n\nRates that were not kept: {minutes:.0f} minutes more; code of {', '.join(commits)}."
    return dataclasses.replace(cfg, rows=rows, shots=shots, tuned=tuned), text


def conduct(cfg):
    """Pre-train every row with every seed, probe it, fine-tune it with few labels; print and store one table.

    Each run is the ordinary command, so that it can be repeated by hand; what is complete is not run again.
    """
    cfg = narrow(cfg)
    check(cfg)
    cfg, tried = at_best_rates(cfg) if cfg.rates else (cfg, "")
    results = run_all(cfg, cfg.seeds)
    text, out = table(results, cfg) + (tried and f"\n\n{tried}"), Path(cfg.runs) / cfg.name
    found = dict(results=results, config=dataclasses.asdict(cfg)) | run.versions()
    run.write_json(out / f"{cfg.table}.json", found)
    (out / f"{cfg.table}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run.program(lambda argv: conduct(configs.load(Config, argv)))
