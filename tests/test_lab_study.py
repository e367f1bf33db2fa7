"""The study: every row an ordinary run, its table what the runs scored."""
import dataclasses
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy
import torch
from conftest import HERE, NETWORK, flags, script

import configs
import data
import pretrain
from lab import probe, study
from lab.phantom import write as write_phantoms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("argv, text", [
    (["--rows={'a': {}}"],
     "the study needs `seeds` and `rows`; found seeds (), rows a"),
    (["--seeds=0,", "--rows={'a': {}}", "--shots={'b': (1,)}"], "shots: found 'b', expected some of the rows 'a'"),
    (["--seeds=0,", "--rows={'a': {}}", "--tuned={'b': {}}"], "tuned: found 'b', expected some of the rows 'a'"),
    (["--seeds=0,", "--rows={'a': {}, 'b': {}}", "--only=('b', 'c')"],
     "only: found 'c', expected some of the rows 'a', 'b'"),
    (["--seeds=0,", "--rows={'a': {}, 'b': {'of': 'a'}}", "--only=('b',)"],
     "row b: expected 'of' a row before it that learns (named in `only`, too), and no other key, found {'of': 'a'}; there are none"),
    (["--seeds=0,", "--rows={'a': {}}", "--rates=0.1,"], "scans that the table reports must not choose"),
])
def test_a_study_without_rows_or_seeds_is_refused(argv, text):
    with pytest.raises(SystemExit) as caught:
        study.conduct(configs.load(study.Config, argv))
    assert str(caught.value).endswith(text)


@pytest.mark.skipif(not os.environ.get("S2DC_REAL_DATA"), reason="S2DC_REAL_DATA is not set")
@pytest.mark.parametrize("modality, train, tested", [
    ("ct", 6, ["sts_042"]), ("mri", 15, ["sts_012", "sts_042"]),
    ("pet", 6, ["013_pet", "019_pet", "042_pet"])])
def test_the_studies_of_real_scans_probe_patients_that_pretraining_has_not_seen(modality, train, tested):
    asked = configs.load(study.Config, [str(HERE / f"configs/study_{modality}.py")])
    keys = asked.pretrain_keys | dict(data=os.environ["S2DC_REAL_DATA"])
    # takes every key
    stage = configs.load(pretrain.Config, [str(HERE / asked.pretrain_config), *flags(**keys)])
    seen = [str(file) for case in data.find_cases(stage) for file in case["images"]]
    argv = [str(HERE / asked.pretrain_config), *flags(**keys | asked.probe_keys)]
    cfg = probe.load(probe.Config, argv)
    cases = [case for case in data.find_cases(cfg) if case["label"]]
    held_out = cases[max(1, round(cfg.probe_train * len(cases))):]
    assert len(seen) == train and len(held_out) == len(tested)
    assert all(want in str(case["images"]) for want, case in zip(tested, held_out))
    patients = [re.search(r"(sts_)?(\d{3})", Path(case["images"][0]).name).group(2) for case in held_out]
    assert not any(f"sts_{patient}" in Path(file).name for patient in patients for file in seen)


def test_a_study_runs_every_row_once_and_its_table_is_what_the_runs_scored(tmp_path):
    """Two rows, one seed, two scans with labels; then with one more, of which only the new part may run."""
    write_phantoms(tmp_path / "data/demo_ct/train", range(3), size=64)
    write_phantoms(tmp_path / "data/demo_ct/unseen", range(50, 54), size=64)
    small = dict(NETWORK) | {"crop": (64, 64, 64)}
    (tmp_path / "study.py").write_text(f"""
name, seeds, jobs, labelled = "study", (5,), 2, 2
pretrain_config = {str(HERE / "configs/demo.py")!r}
finetune_config = {str(HERE / "configs/demo_segmentation.py")!r}
rows = {{"random": None, "in plane": {{"rotation": (0, 0, 20.0)}}}}
pretrain_keys = {small | dict(slab=(64, 64, 64), steps=2, warmup=1, hidden=8, embedding=8, save_every=2)!r}
probe_keys = {{"probe_train": 0.3, "probe_crop": (64, 64, 64), "probe_least": 1}}
finetune_keys = {small | dict(steps=1, warmup=0, val="train_002", test="unseen_050", overlap=0.0,
                              exclude=("unseen_05[123]",))!r}
workers = 0
""")
    command = sys.executable, "-m", "lab.study", str(tmp_path / "study.py")
    run = lambda *more: script(tmp_path, tmp_path / "data", *command, *more)
    shots = lambda *n: "--shots=" + repr({"random": n, "in plane": n})      # of every row
    few = "labelled = 3, but .* trains on 2 subjects .train_000, train_001, ...\\n"
    with pytest.raises(AssertionError, match=few):
        run(shots(1), "--labelled=3")
    drawn = "redraw: expected val and test named in .*demo_segmentation.py, .* found test_share 0.0, val_share 0.3\\n"
    with pytest.raises(AssertionError, match=drawn):
        run(shots(1), "--redraw=True", "--finetune_keys=" + repr(dict(val="", val_share=0.3, test="unseen_050")))
    first = run(shots(1))
    folder = tmp_path / "runs/study"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pt")}
    again = run(shots(1, 2))
    # the rest was there
    assert "probe" not in again.split("|")[0] and ", 2: " in again and ", 1: " not in again
    assert all(path.stat().st_mtime_ns == t for path, t in times.items()) and len(times) >= 6
    stored = json.loads((folder / "study.json").read_text())["results"]
    assert (folder / "study.md").read_text() == again[again.index("| row"):] and first.index("| row")
    lines = [[cell.strip() for cell in line.split("|")] for line in again.splitlines()]
    table = {line[1]: line[2:-1] for line in lines if len(line) > 3 and not line[1].isdigit()}
    tuned = {(line[2], int(line[1])): line[3:-1] for line in lines if len(line) > 3 and line[1].isdigit()}
    for row in ("random", "in plane"):
        probed = json.loads((folder / f"{row}-5/probe.json").read_text())
        # all rows are probed alike
        assert probed["config"]["rotation"] != [0, 0, 20.0] and probed["config"]["seed"] == 5
        assert probed["config"]["probe_train"] == 0.3
        (encoder, numbers), = probed["probe"].items()
        assert encoder == ("random" if row == "random" else f"runs/study/{row}-5/encoder.pt")
        linear = numbers["linear"]["balanced_accuracy"]
        assert table[row][0] == f"{linear:.3f} ({linear:.3f})"
        assert stored[f"{row}-5"]["probe"]["value"] == numbers
        for n in (1, 2):
            result, = json.loads((folder / f"{row}-5-{n}/results.json").read_text())["results"].values()
            score = result["summary"]["preprocessed"]["dice"]["mean"]["mean"]
            assert tuned[row, n][0] == f"{score:.3f} ({score:.3f})" and len(result["rows"]) == 1
            trained = torch.load(folder / f"{row}-5-{n}/best.pt", weights_only=True)
            assert len(trained["subjects"]) == n
            assert trained["config"]["init"] == ("" if row == "random" else encoder)
    assert list(tuned) == [("random", 1), ("in plane", 1), ("random", 2), ("in plane", 2)]
    few = run("--only=random", "--shots={}", "--table=few")
    assert [line for line in few.splitlines() if line.startswith("| random")] == [
        line for line in again.splitlines() if line.startswith("| random")] and "in plane" not in few
    assert (folder / "study.md").read_text() in again and (folder / "few.md").read_text() in few


def test_scores_of_few_labels_are_paired_case_by_case_and_seed_by_seed():
    cases = [f"case_{k}" for k in range(30)]
    rng, better = np.random.default_rng(0), np.linspace(0, 0.2, 30)
    of = {seed: rng.uniform(0.3, 0.6, 30) for seed in (3, 4)}
    value = lambda dice, mm: {"value": dict(dice=dict(zip(cases, dice)), hd95=dict.fromkeys(cases, mm))}
    more = {3: -0.02, 4: 0.04}
    results = {f"{row}-{seed}": {"4": value(of[seed] + add + (row == "all") * more[seed], mm)} for seed in (3, 4)
               for row, add, mm in (("scratch", 0, 20.0), ("all", better, 10.0))}
    cfg = study.Config(rows={"scratch": None, "all": {}}, seeds=(3, 4), shots={"scratch": (4,), "all": (4,)},
                       hd95=True, probes=False)
    results = {key: {k: v | {"minutes": 1.5} for k, v in parts.items()} for key, parts in results.items()}
    _, _, scratch, tuned, _, minutes = study.table(results, cfg).splitlines()
    assert minutes.startswith("Mean (seeds 3, 4); 6 minutes")
    means = [of[seed].mean() for seed in (3, 4)]
    assert scratch == (f"| 4 | scratch | {np.mean(means):.3f} ({means[0]:.3f}, {means[1]:.3f}) "
                       "| 20.0 (20.0, 20.0) |  |  |")
    gain = re.fullmatch(r".*\| 10.0 \(10.0, 10.0\) \| (\S+) \((\S+) \.\. (\S+)\) \| (\S+), (\S+) \((\S+) \.\. (\S+)\) \|",
                        tuned).groups()
    t = scipy.stats.sem(better) * 1.96                              # the bootstrap's interval, nearly
    assert np.allclose(np.float64(gain[:3]), [0.11, 0.11 - t, 0.11 + t], atol=0.004)
    # of two numbers the standard error is half their difference
    assert np.allclose(np.float64(gain[3:]), [0.08, 0.14, 0.11 - 12.7062 * 0.03, 0.11 + 12.7062 * 0.03], atol=5e-4)
    assert study.by_seed([0.5]) == "+0.500"


def test_a_row_may_start_from_an_encoder_that_is_there():
    cfg = study.Config(rows={"other": {"init": "runs/x-{seed}/encoder.pt"}}, seeds=(2,), shots={"other": (5,)},
                       pretrain_config="p.py", finetune_config="f.py", probes=False)
    (tune, score), = study.plan("other", 2, cfg).values()
    assert "--init=runs/x-2/encoder.pt" in tune and "--label_fraction=0.25" in tune and "--hd95=False" in score
    assert not any(arg.startswith("--split_seed") for arg in tune)
    (redrawn, _), = study.plan("other", 2, dataclasses.replace(cfg, redraw=True)).values()
    assert [arg for arg in redrawn if arg not in tune] == ["--split_seed=2"]


def test_a_row_may_fine_tune_what_another_row_learned(monkeypatch):
    """Of the file that the other starts from, in the study's own folder, and not before the other is done."""
    cfg = study.Config(rows={"more": {"decoder": True, "file": "network.pt"}, "long": {"of": "more"}},
                       seeds=(2, 3), shots={"more": (5,), "long": (5,)}, pretrain_config="p.py",
                       finetune_config="f.py", runs="r", name="s", jobs=4, tuned={"long": {"steps": 9}})
    parts = study.plan("long", 3, cfg)
    assert parts.keys() == {"5"} and "--init=r/s/more-3/network.pt" in parts["5"][0] and "--steps=9" in parts["5"][0]
    seen = []

    def run_row(n, row, seed, cfg, asked):
        time.sleep(0.2 * (row == "more"))
        seen.append((row, seed))
        return dict(row=row)

    monkeypatch.setattr(study, "run_row", run_row)
    assert list(study.run_all(cfg, cfg.seeds)) == ["more-2", "long-2", "more-3", "long-3"]
    assert all(seen.index(("more", seed)) < seen.index(("long", seed)) for seed in (2, 3))
    for own, found in (({"of": "less"}, "{'of': 'less'}; there are more"), ({"of": "more", "lr": 1}, "'lr': 1}"),
                       ({"of": "long"}, "there are more")):
        with pytest.raises(SystemExit, match=f"row long: expected 'of' a row before it that learns.*{found}"):
            study.check(dataclasses.replace(cfg, rows=cfg.rows | {"long": own}))
    assert study.probe_table({f"more-{seed}": {"probe": {"value": dict(
        linear=dict(balanced_accuracy=0.5), knn=dict(balanced_accuracy=0.5), silhouette_cosine=[0.1],
        effective_rank=3.0, correspondence=0.2)}} for seed in (2, 3)}, cfg).count("\n") == 2


def test_what_other_files_or_another_encoder_made_is_not_reported(tmp_path, monkeypatch):
    """Nor scored on other scans than it was trained on. The programs are stood in for; their files are there."""
    (tmp_path / "p.py").write_text("lr = 0.1\n")
    (tmp_path / "f.py").write_text("steps = 5\n")
    ran = []

    def program(line, env, **_):
        module, folder = line[2], tmp_path / "runs/s/a-0"
        ran.append((module, env["S2DC_DATA"]))
        tuned = Path(f"{folder}-5")
        if module == "pretrain":
            (folder / "encoder.pt").write_bytes(b"learned")
        elif module == "finetune":
            tuned.mkdir()
            (tuned / "last.pt").write_bytes(b"")
        else:
            rows = [dict(id="1", scores=dict(preprocessed=dict(dice=dict(mean=0.5))))]
            (tuned / "results.json").write_text(json.dumps(dict(results=dict(a=dict(rows=rows)))))
        return mock.Mock(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", program)
    monkeypatch.setattr(study.run, "versions", lambda: dict(commit="abc"))
    cfg = study.Config(rows={"a": {}}, seeds=(0,), shots={"a": (5,)}, probes=False, runs=str(tmp_path / "runs"), name="s",
                       pretrain_config=str(tmp_path / "p.py"), finetune_config=str(tmp_path / "f.py"), data="where")

    def again():
        ran.clear()
        study.run_row(0, "a", 0, cfg, None)
        return [module for module, _ in ran]
    assert again() == ["pretrain", "finetune", "evaluate"] and {data for _, data in ran} == {"where"}
    assert again() == []
    (tmp_path / "p.py").write_text("lr = 0.1\nlog_every = 3        # changes nothing\n")
    assert again() == []
    (tmp_path / "f.py").write_text("steps = 5\nlabels = {1: 'a', 2: 'b'}\n")      # of which pre-training is free
    with pytest.raises(SystemExit, match="s/a-0, 5: .*f.py, or what --init names, is not what it was"):
        again()
    (tmp_path / "f.py").write_text("steps = 5\n")
    (tmp_path / "p.py").write_text("lr = 0.2\n")
    with pytest.raises(SystemExit, match="s/a-0, pretrain: .*p.py, or what --init names, is not what it was then; remove it and"):
        again()
    (tmp_path / "p.py").write_text("lr = 0.1\n")
    (tmp_path / "runs/s/a-0/encoder.pt").write_bytes(b"other")
    with pytest.raises(SystemExit, match="s/a-0, 5: .*f.py, or what --init names, is not what it was"):
        again()
    shutil.rmtree(tmp_path / "runs/s/a-0")
    with pytest.raises(SystemExit, match="s/a-0-5: a run that a-0 does not know of; remove it and all a-0-"):
        again()
    shutil.rmtree(tmp_path / "runs/s/a-0-5")
    assert again() == ["finetune", "evaluate"]


def test_a_run_that_fails_is_named_at_once_and_stops_only_those_that_need_it(monkeypatch, capsys):
    cfg = study.Config(rows={"bad": {}, "after": {"of": "bad"}, "good": {}}, seeds=(0,), jobs=1, name="s")
    ran, said = [], []

    def run_row(n, row, seed, cfg, asked):
        ran.append(row)
        if row == "bad":
            raise SystemExit("no such scans")
        said.append(capsys.readouterr().out)
        return {}

    monkeypatch.setattr(study, "run_row", run_row)
    with pytest.raises(SystemExit, match="2 of 3 runs of s failed: bad-0, after-0; started again"):
        study.run_all(cfg, cfg.seeds)
    assert ran == ["bad", "good"]
    assert said == ["bad-0: no such scans\nafter-0: not run, for bad-0 failed\n"]


def test_a_row_may_fine_tune_more_of_its_run_than_the_encoder():
    cfg = study.Config(rows={"more": {"method": "decoder_4", "file": "network.pt"}}, seeds=(2,), shots={"more": (5,)},
                       pretrain_config="p.py", finetune_config="f.py", runs="r")
    parts = study.plan("more", 2, cfg)
    assert "--init=r/study/more-2/network.pt" in parts["5"][0] and "--method=decoder_4" in parts["pretrain"][0]
    assert not [flag for part in parts.values() for command in part for flag in command if "--file" in flag]
    assert cfg.rows["more"]["file"] == "network.pt"                 # for the next seed


def test_a_row_may_have_keys_of_its_own_in_stage_2():
    cfg = study.Config(rows={"short": None, "long": None}, seeds=(2,), shots={"short": (5,), "long": (5,)},
                       finetune_keys={"steps": 10, "lr": 0.1}, tuned={"long": {"steps": 30}}, probes=False,
                       pretrain_config="p.py", finetune_config="f.py")
    short, long = (study.plan(row, 2, cfg)["5"][0] for row in cfg.rows)
    assert "--steps=10" in short and "--steps=30" in long and "--steps=10" not in long and "--lr=0.1" in long
    few = study.narrow(dataclasses.replace(cfg, only=("short",)))
    assert few == dataclasses.replace(cfg, only=("short",), rows={"short": None}, shots={"short": (5,)}, tuned={})
    assert study.narrow(cfg) == cfg


def test_every_row_that_learns_keeps_the_rate_of_its_best_probe(monkeypatch, tmp_path):
    """Rates are tried with the first seed alone and judged by their own part; a run at the best is not redone."""
    cfg = study.Config(rows={"none": None, "here": {"init": "e.pt"}, "ours": {}, "theirs": {"method": "voco"},
                             "again": {"of": "ours"}}, seeds=(4, 5), rates=(1e-3, 1e-2),
                       rate_keys={"exclude": ("a*",)}, runs=str(tmp_path), pretrain_config="p.py", shots={"none": (2,), "theirs": (2,)}, jobs=1,
                       tuned={"theirs": {"steps": 3}})
    ran, scores = [], {("ours", 1e-3): 0.5, ("ours", 1e-2): 0.3, ("theirs", 1e-3): 0.2, ("theirs", 1e-2): 0.4}
    plans = {}

    def run_row(n, row, seed, cfg, asked):
        plans[row, seed] = study.plan(row, seed, cfg)
        ran.append((row, seed, asked))
        name, rate = row.split(", ")
        found = scores[name, float(rate)]
        trained = {"pretrain": {"minutes": 2.0, "commit": "abc"}}
        return trained if found is None else trained | {"rate": {
            "minutes": 0.5, "value": {"linear": {"balanced_accuracy": found}}}}

    monkeypatch.setattr(study, "run_row", run_row)
    chosen, tried = study.at_best_rates(cfg)
    only = ("pretrain", "rate")
    assert ran == [("ours, 0.001", 4, only), ("ours, 0.01", 4, only), ("theirs, 0.001", 4, only),
                   ("theirs, 0.01", 4, only)]
    assert chosen.rows == {"none": None, "here": {"init": "e.pt"}, "ours, 0.001": {"lr": 1e-3},
                           "theirs, 0.01": {"method": "voco", "lr": 1e-2}, "again": {"of": "ours, 0.001"}}
    assert chosen.shots == {"none": (2,), "theirs, 0.01": (2,)} and chosen.tuned == {"theirs, 0.01": {"steps": 3}}
    assert chosen.seeds == (4, 5)
    assert tried.splitlines()[2:4] == ["| ours | 0.500 | 0.300 |", "| theirs | 0.200 | 0.400 |"]
    assert tried.endswith("\n\nRates that were not kept: 5 minutes more; code of abc, unknown.")
    same, later = study.plan("theirs, 0.01", 4, chosen), study.plan("theirs, 0.01", 5, chosen)
    assert same["pretrain"] == plans["theirs, 0.01", 4]["pretrain"] and same["pretrain"][0][0] == "lab.rivals"
    assert same["rate"] == plans["theirs, 0.01", 4]["rate"] and "--exclude=('a*',)" in same["rate"][0]
    assert "--exclude=('a*',)" not in same["probe"][0] and "rate" not in later
    assert plans["ours, 0.01", 4]["pretrain"][0][0] == "pretrain"

    # while the best is at an end one rate more is tried; one that diverges has lost
    wide = dataclasses.replace(cfg, rates=(1e-3, 3e-3, 1e-2), widen=2)
    ran.clear()
    scores |= {(row, 3e-3): 0.1 for row in ("ours", "theirs")} | {
        ("ours", 3e-4): 0.45, ("theirs", 3e-2): 0.5, ("theirs", 1e-1): None}
    chosen, tried = study.at_best_rates(wide)
    assert [row for row, *_ in ran[6:]] == ["ours, 0.0003", "theirs, 0.03", "theirs, 0.1"]
    assert list(chosen.rows) == ["none", "here", "ours, 0.001", "theirs, 0.03", "again"]
    assert tried.splitlines()[0] == "| linear probe that chooses | " + " | ".join(
        f"rate {rate}" for rate in ("0.0003", "0.001", "0.003", "0.01", "0.03", "0.1")) + " |"
    assert tried.splitlines()[2:4] == ["| ours | 0.450 | 0.500 | 0.100 | 0.300 |  |  |",
                                       "| theirs |  | 0.200 | 0.100 | 0.400 | 0.500 | diverged |"]
    scores |= dict.fromkeys([("ours", rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)], None)
    with pytest.raises(SystemExit, match="ours: diverged at every rate"):
        study.at_best_rates(dataclasses.replace(wide, widen=0))
    assert study.widened([1.0, 2.0, 4.0], 4.0) == [1, 2, 4, 8] and study.widened([1.0, 2.0, 4.0], 2.0) == [1, 2, 4]


class Commands:
    """Stands for the programs: each writes what it was asked for, or diverges."""

    def __init__(self, monkeypatch):
        self.ran, self.diverges = [], ()
        monkeypatch.setattr(study.subprocess, "run", self)
        monkeypatch.setattr(study, "number", lambda folder, part, cfg: None if part == "pretrain" else len(self.ran))
        monkeypatch.setattr(study.run, "versions", lambda: {"commit": f"c{len(self.ran)}"})

    def __call__(self, line, env, stdout, stderr):
        self.ran.append(line[2])
        lost = any(flag in line for flag in self.diverges)
        print("step 3: not finite (loss nan)" if lost else "fine", file=stdout, flush=True)
        return type("Ended", (), dict(returncode=int(lost)))


def test_no_row_reports_what_other_keys_made(monkeypatch, tmp_path):
    cfg = study.Config(rows={"one": {"method": "swinmm", "lr": 1e-2}}, seeds=(0,), shots={"one": (2,)},
                       pretrain_config="p.py", finetune_config="f.py", runs=str(tmp_path))
    programs = Commands(monkeypatch)
    first = study.run_row(0, "one", 0, cfg, None)
    assert programs.ran == ["lab.rivals", "lab.probe", "finetune", "evaluate"]
    assert {part: found["commit"] for part, found in first.items()} == {"pretrain": "c0", "probe": "c0", "2": "c0"}
    assert study.run_row(0, "one", 0, dataclasses.replace(cfg, workers=3, cache="elsewhere"), None) == first
    for rows in ({"method": "swinmm", "lr": 3e-3}, {"method": "swinmm", "lr": 1e-2, "steps": 5}, {"lr": 1e-2}):
        with pytest.raises(SystemExit, match="one-0, pretrain: was made by `lab.rivals p.py .*; remove it") as caught:
            study.run_row(0, "one", 0, dataclasses.replace(cfg, rows={"one": rows}), None)
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match="one-0, 2: was made by `finetune f.py"):
        study.run_row(0, "one", 0, dataclasses.replace(cfg, finetune_keys={"lr": 1e-4}), None)
    assert len(programs.ran) == 4
    study.run_row(0, "one", 0, dataclasses.replace(cfg, probe_keys={"probe_train": 0.3}), None)    # holds no state
    assert programs.ran[4:] == ["lab.probe"]


def test_a_row_that_was_stopped_goes_on_under_its_own_keys_alone(monkeypatch, tmp_path):
    cfg = study.Config(rows={"one": {"lr": 1e-2}}, seeds=(0,), pretrain_config="p.py", runs=str(tmp_path))
    programs = Commands(monkeypatch)
    programs.diverges = ["--lr=0.01"]
    with pytest.raises(SystemExit) as caught:                       # outside a search of rates
        study.run_row(0, "one", 0, cfg, None)
    said = str(caught.value)
    assert said.startswith(f"step 3: not finite (loss nan), says {tmp_path}/study/one-0/out.log of python -m pretrain p.py")
    assert "\n" not in said
    with pytest.raises(SystemExit, match="pretrain: was made by"):
        study.run_row(0, "one", 0, dataclasses.replace(cfg, rows={"one": {"lr": 1e-3}}), None)
    programs.diverges = []
    assert study.run_row(0, "one", 0, cfg, None).keys() == {"pretrain", "probe"}


def test_a_fine_tuning_that_was_broken_off_and_is_asked_for_no_more_is_in_no_table(monkeypatch, tmp_path):
    cfg = study.Config(rows={"one": {}}, seeds=(0,), shots={"one": (2,)}, pretrain_config="p.py",
                       finetune_config="f.py", runs=str(tmp_path))
    programs = Commands(monkeypatch)
    monkeypatch.setattr(study, "number", lambda folder, part, cfg: 1 / (part != "2"))        # ends stage 2
    with pytest.raises(ZeroDivisionError):
        study.run_row(0, "one", 0, cfg, None)
    assert "minutes" not in json.loads((tmp_path / "study/one-0/outcome.json").read_text())["2"]
    found = study.run_row(0, "one", 0, dataclasses.replace(cfg, shots={}), None)
    assert found.keys() == {"pretrain", "probe"} and study.cost({"one-0": found})[1] == ["c0"]
    assert programs.ran == ["pretrain", "lab.probe", "finetune", "evaluate"]


def test_a_trial_that_diverges_is_lost_and_not_repeated(monkeypatch, tmp_path):
    cfg = study.Config(rows={"one, 0.01": {"lr": 1e-2}}, seeds=(0,), pretrain_config="p.py", runs=str(tmp_path),
                       rates=(1e-2,), rate_keys={"exclude": ("a",)})
    programs = Commands(monkeypatch)
    programs.diverges = ["--lr=0.01"]
    for _ in range(2):
        found = study.run_row(0, "one, 0.01", 0, cfg, ("pretrain", "rate"))
        assert found.keys() == {"pretrain"} and found["pretrain"]["value"] == "diverged" and programs.ran == ["pretrain"]
    with pytest.raises(SystemExit, match="pretrain: was made by"):  # nor is it the loss of other keys
        study.run_row(0, "one, 0.01", 0, dataclasses.replace(cfg, pretrain_keys={"steps": 5}), ("pretrain", "rate"))


def test_the_scans_that_choose_rates_are_in_no_table(tmp_path):
    write_phantoms(tmp_path / "demo_ct/unseen", range(4), size=16)
    write_phantoms(tmp_path / "demo_ct/train", range(3), size=16)
    argv = ["--rows={'a': {}}", "--seeds=(0,)", "--rates=(0.1,)", f"--data={tmp_path}",
            f"--pretrain_config={HERE / 'configs/demo.py'}", f"--finetune_config={HERE / 'configs/demo_segmentation.py'}"]
    keys = "--rate_keys={'exclude': ('00[01]',)}", "--probe_keys={'exclude': ('00[23]',)}"
    study.check(configs.load(study.Config, [*argv, *keys]))
    with pytest.raises(SystemExit, match="rate_keys: 2 scans that the table reports would choose .*phantom_002.nii.gz"):
        study.check(configs.load(study.Config, [*argv, keys[0]]))
    tuned = "--shots={'a': (1,)}", "--labelled=2", "--finetune_keys={'val': 'train_002'}"
    with pytest.raises(SystemExit, match="rate_keys: 2 scans .*phantom_002.nii.gz"):
        study.check(configs.load(study.Config, [*argv, *keys, *tuned]))
    with pytest.raises(SystemExit, match="widen = 1: expected three rates, found rates = .0.1,."):
        study.check(configs.load(study.Config, [*argv, *keys, "--widen=1"]))
