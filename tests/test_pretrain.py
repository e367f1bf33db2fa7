"""pretrain.py: the script itself, tiny, on phantoms, as one process and as two; one step against the same written out in loops.

Networks without the residual convolutions (v2=False) wherever runs are compared over many steps: in a network of four channels
one voxel on the kink of a leaky ReLU can turn a rounding of 1e-7 into 4 % of the gradient, and Adam carries that on.
"""
import collections
import copy
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import configs
import data
import losses
import pretrain
from lab import phantom
from model import Swin3D, SwinUNETR, load_weights

HERE = Path(pretrain.__file__).parent
TINY = dict(slab=(64, 64, 64), crop=(64, 64, 64), token_patch=8, feature_size=4, num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1),
            window_size=4, hidden=16, embedding=8, queue=7, batch=2, lr=1e-3, momentum=0.99, warmup=5, save_every=50, workers=0,
            log_every=1)
TEN = dict(name="ten", steps=10, lr=1e-4, save_every=4, v2=False)       # the run that is interrupted, shared out, and repeated
TERMS = ("loss", "global", "p2p", "p2s")
TIMES = ("slabs_per_s", "waiting", "memory_gb")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with four phantoms, for the caches and runs of this file."""
    folder = tmp_path_factory.mktemp("pretrain")
    phantom.write(folder / "data/demo_ct/train", range(4), size=64)
    return folder


def argv(place, **keys):
    keys = TINY | dict(data=place / "data", runs=place / "runs", cache=place / "cache") | keys
    return [str(HERE / "configs/demo.py"), *(f"--{key}={value}" for key, value in keys.items())]


def config(place, **keys):
    return configs.load(pretrain.Config, argv(place, **keys))


def start(place, arguments, launcher=()):
    """The command in a process group of its own, without a GPU."""
    outside = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    here = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(HERE))
    return subprocess.Popen([sys.executable, *launcher, *arguments], cwd=HERE, env=outside | here, start_new_session=True,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    try:
        said = process.communicate(timeout=400)[0]
    finally:
        if process.poll() is None:                                  # nothing that waits for another may stay behind
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


def script(place, **keys):
    return finish(start(place, ["pretrain.py", *argv(place, **keys)]))


def within(place, arguments):
    """The same in this process, for the time of an import less."""
    with pytest.MonkeyPatch.context() as patch:
        for key in LAUNCHER:
            patch.delenv(key, raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        pretrain.main(arguments)


def alone(place, **keys):
    within(place, argv(place, **keys))
    return Path(keys.get("runs", place / "runs")) / keys["name"]


def batch_of(place, cfg, step):
    slabs = data.Slabs(data.open_scans(cfg, say=lambda _: None), cfg, cfg.batch, cfg.seed)
    return data.collate([slabs[step, k] for k in range(cfg.batch)])


def ends(call, *arguments):
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code     # a text: the exit code is 1
    return caught.value.code


def last(run):
    return torch.load(run / "last.pt", weights_only=True)


def log(run):
    """(lines that say where a run was started, lines of steps)"""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" not in line], [line for line in lines if "step" in line]


def flat(tree, name=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: leaf for key, value in pairs for path, leaf in flat(value, f"{name}/{key}").items()}
    return {name: tree}


def assert_equal(run, other):
    """Everything that a run goes on from is equal bit for bit; what is logged, a mean over ranks or passes, to rounding."""
    mine, theirs = ({k: v for k, v in flat(last(each)).items() if not k.startswith("/config/")} for each in (run, other))
    assert mine.keys() == theirs.keys() and len([k for k in mine if k.startswith("/optimizer/state/")]) > 100
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key], key
    (_, lines), (_, others) = log(run), log(other)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, expected in zip(lines, others):                       # accuracy is a mean of shares, of other sets of tokens
        for key in (*TERMS, "matches", "spread", "lr", "grad_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (line["step"], key)


def assert_same_gradient(run, other):
    """After one step: the gradient, of which AdamW keeps a tenth, and the losses agree to the rounding of float32.

    Of later steps nothing of the kind holds: AdamW turns a gradient below the rounding into a step of full size, either way.
    """
    a, b = last(run), last(other)
    assert a["step"] == b["step"] == 1
    mine, theirs = (torch.cat([s["exp_avg"].flatten() for s in state["optimizer"]["state"].values()]) for state in (a, b))
    assert theirs.norm() > 0 and (mine - theirs).norm() < 1e-2 * theirs.norm()
    torch.testing.assert_close(a["queue"], b["queue"], rtol=0, atol=1e-3)
    for key in (*TERMS, "grad_norm"):
        assert log(run)[1][0][key] == pytest.approx(log(other)[1][0][key], rel=1e-2), key


# ------------------------------------------------------------------------------------------------------- runs that tests share

@pytest.fixture(scope="module")
def ten(place):
    """Ten steps of the script without interruption -> (run folder, what it said)."""
    said = script(place, **TEN)
    return place / "runs/ten", said


@pytest.fixture(scope="module")
def killed(place):
    """The same, killed at once with its loader when a step after the first checkpoint has been logged."""
    run = place / "killed/ten"
    process = start(place, ["pretrain.py", *argv(place, runs=run.parent, **TEN | dict(workers=1))])
    until = time.time() + 200
    while not ((run / "last.pt").exists() and '"step": 5' in (run / "log.jsonl").read_text()):
        assert process.poll() is None and time.time() < until, process.communicate()[0]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return run


DRIVER = """
import faulthandler, json, os, sys
import torch.distributed as dist
import pretrain
faulthandler.dump_traceback_later(300, exit=True)                   # says where it waits, if it does
rank = int(os.environ["RANK"])
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"                # it would still hold the addresses of the run before
for number, (port, runs) in enumerate(json.load(open(sys.argv[1]))):
    os.environ["MASTER_PORT"] = str(port)
    try:
        pretrain.main(runs[rank % len(runs)])
    except SystemExit as end:
        open(f"{sys.argv[1]}-{number}-{rank}", "w").write(str(end))
        dist.destroy_process_group()
"""
FOUR = dict(name="four", batch=4, steps=1, warmup=1, v2=False)
ONE = dict(name="one", steps=1, warmup=1, v2=False)
WIDE = dict(name="wide", slab=(128, 64, 64), steps=3, warmup=1, v2=False)
P2P = dict(name="p2p_alone", weights=(0, 1, 0), steps=2, v2=False)
DECODER = dict(name="decoder", decoder=True, slab=(128, 64, 64), steps=2, v2=False)
SINKHORN = dict(name="sinkhorn", matching="sinkhorn", sinkhorn_iterations=10, steps=2, v2=False)


@pytest.fixture(scope="module")
def two(place, killed, ten):
    """Folder of runs of two processes, one after the other by one torchrun."""
    for runs in ("two", "elsewhere"):
        shutil.copytree(killed.parent, place / runs)
    shutil.rmtree(place / "elsewhere/ten")
    jobs = [dict(FOUR, accumulate=2), WIDE, P2P, SINKHORN, DECODER, dict(TEN, log_every=3)]
    jobs = [[argv(place, runs=place / "two", **keys)] for keys in jobs]
    shutil.copytree(killed, place / "disagree/ten")
    jobs.append([argv(place, runs=place / runs, **TEN) for runs in ("disagree", "elsewhere")])
    (place / "driver.py").write_text(DRIVER)
    doors = [socket.create_server(("localhost", 0)) for _ in jobs]
    (place / "jobs").write_text(json.dumps([(door.getsockname()[1], job) for door, job in zip(doors, jobs)]))
    for door in doors:
        door.close()
    finish(start(place, [str(place / "driver.py"), str(place / "jobs")],
                 ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")))
    return place / "two"


# ------------------------------------------------------------------------------------------------------------- two processes

def test_torchrun_of_two_equals_one_process_of_two_passes(place):
    finish(start(place, ["pretrain.py", *argv(place, runs=place / "torchrun", **TEN)],
                 ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")))
    run = alone(place, runs=place / "passes", **TEN, accumulate=2)
    assert_equal(place / "torchrun/ten", run)
    assert last(run)["queue_count"] == 20                           # more than the queue holds


@pytest.mark.parametrize("keys", [WIDE, P2P, SINKHORN, DECODER], ids=lambda keys: keys["name"])
def test_two_processes_equal_one_of_two_passes(place, two, keys):
    assert_equal(two / keys["name"], alone(place, **keys, accumulate=2))


def test_the_gradient_does_not_depend_on_ranks_and_passes(place, two):
    assert_same_gradient(two / "four", alone(place, **FOUR))
    whole = alone(place, **ONE)
    assert_same_gradient(alone(place, runs=place / "accumulate", **ONE, accumulate=2), whole)


def test_two_processes_go_on_from_a_checkpoint_of_one(place, two, killed):
    shutil.copytree(killed.parent, place / "gone_on")
    run = alone(place, runs=place / "gone_on", **TEN | dict(log_every=3), accumulate=2)
    assert [line["resumed"] for line in log(two / "ten")[0]] == [0, 4]
    assert [line["step"] for line in log(two / "ten")[1]] == [1, 2, 3, 4, 6, 9, 10]
    assert_equal(two / "ten", run)


def test_processes_that_see_different_checkpoints_are_refused(place, two):
    for rank in (0, 1):
        text = (place / f"jobs-6-{rank}").read_text()
        assert "steps [0, 4]" in text and "disagree/ten" in (place / "jobs-6-0").read_text() and "\n" not in text
    assert not (place / "elsewhere/ten").exists() and last(place / "disagree/ten")["step"] == 4


@pytest.mark.parametrize("v2", [True, False])
def test_gradient_of_a_batch_is_the_mean_of_its_halves(place, v2):
    """In double precision, where no kink can hide that a norm or a loss mixes the samples of a batch."""
    cfg = config(place, v2=v2)
    generator = torch.Generator().manual_seed(0)
    V, V_, twin = torch.rand(3, 2, 1, 64, 64, 64, generator=generator, dtype=torch.float64)
    pairs = torch.tensor([[b, i, (i + 3) % 512] for b in (0, 1) for i in range(100 + 50 * b)])
    torch.manual_seed(0)
    student = pretrain.Network(cfg).double()
    negatives = torch.rand(5, cfg.embedding, generator=generator, dtype=torch.float64)

    def gradient(which):
        student.zero_grad()
        keep = torch.ones(len(which), 1, dtype=torch.bool)
        tokens, embeddings, _ = student(V[which], keep)
        with torch.no_grad():
            tokens_, keys, _ = student(V_[which], keep, twin[which])
        query, key = embeddings[:, 0], keys[:, -1]
        mine = torch.cat([pairs[pairs[:, 0] == b] * torch.tensor([0, 1, 1]) + torch.tensor([k, 0, 0])
                          for k, b in enumerate(which)])
        losses.s2dc_loss(tokens, tokens_, mine, query, key, negatives)["loss"].backward()
        return {name: p.grad.clone() for name, p in student.named_parameters()}

    whole, halves = gradient([0, 1]), (gradient([0]), gradient([1]))
    assert max(g.abs().max() for g in whole.values()) > 0.1
    for name, g in whole.items():
        torch.testing.assert_close(g, (halves[0][name] + halves[1][name]) / 2, rtol=1e-7, atol=1e-9)


# -------------------------------------------------------------------------------------------------------------- kill, resume

def test_killed_and_started_again_equals_uninterrupted_bit_for_bit(place, killed, ten):
    left = last(killed)
    assert left["step"] == 4 and max(line["step"] for line in log(killed)[1]) in range(5, 10)
    assert all(torch.load(file, weights_only=True) for file in killed.glob("*.pt"))
    shutil.copytree(killed.parent, place / "resumed")
    # other workers and other records make no other run
    said = script(place, runs=place / "resumed", **TEN | dict(workers=2, save_every=3, keep=(9,)))
    run = place / "resumed/ten"
    assert "ten/last.pt at step 4" in said
    mine, theirs = last(run), last(ten[0])
    mine, theirs = ({k: v for k, v in flat(state).items() if not k.startswith("/config/")} for state in (mine, theirs))
    assert mine.keys() == theirs.keys() and len([k for k in mine if k.startswith("/optimizer/state/")]) > 100
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key], key
    (began, lines), (_, steps) = log(run), log(ten[0])
    assert [line["resumed"] for line in began] == [0, 4]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line, step in zip(lines, steps):
        assert {k: v for k, v in line.items() if k not in TIMES} == {k: v for k, v in step.items() if k not in TIMES}
    assert torch.load(run / "encoder-9.pt", weights_only=True)["step"] == 9
    assert {file.name for file in run.glob("*.pt")} == {"encoder-9.pt", "encoder.pt", "encoder.prev.pt", "last.pt", "last.prev.pt"}


def test_complete_run_says_so_and_changes_nothing(place, ten, capsys):
    def state():
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in ten[0].iterdir()}
    before = state()
    within(place, argv(place, **TEN | dict(workers=3, compile=True, log_every=7, save_every=2, keep=(3,), cache="nowhere")))
    assert state() == before and not (HERE / "nowhere").exists()
    assert capsys.readouterr().out == f"{ten[0]} is complete: 10 steps; its encoder is {ten[0]}/encoder.pt\n"


def test_resumption_with_another_learning_rate_is_refused(place, killed):
    before = (killed / "last.pt").read_bytes(), (killed / "log.jsonl").read_bytes()
    text = ends(within, place, argv(place, runs=killed.parent, **TEN | dict(lr=2e-3)))
    assert "lr was 0.0001, now 0.002" in text and "killed/ten/last.pt" in text
    assert before == ((killed / "last.pt").read_bytes(), (killed / "log.jsonl").read_bytes())


def test_a_checkpoint_of_an_older_network_is_one_line(place, killed, tmp_path):
    (tmp_path / "ten").mkdir()
    state = last(killed)
    state["student"] = {key: value for key, value in state["student"].items() if not key.startswith("standard.")}
    torch.save(state, tmp_path / "ten/last.pt")
    text = ends(within, place, argv(place, runs=tmp_path, **TEN))
    assert text.startswith("ten: last.pt is of another version of this program") and "--init takes its encoder.pt" in text


def test_damaged_checkpoint_is_one_line(place, killed, tmp_path):
    (tmp_path / "ten").mkdir()
    (tmp_path / "ten/last.pt").write_bytes((killed / "last.pt").read_bytes()[:5000])
    assert "last.pt" in ends(within, place, argv(place, runs=tmp_path, **TEN))
    assert [file.name for file in (tmp_path / "ten").iterdir()] == ["last.pt"]


# ------------------------------------------------------------------------------------------------------------- not finite, bad

def test_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(place):
    # the learning rate of steps 0 .. 3 is 3e-4 6e-4 1e-3 0, that of step 4 is 1e37
    keys = dict(name="explodes", steps=8, warmup=3, min_lr=1e38, save_every=4, v2=False)
    text = ends(within, place, argv(place, **keys))
    run = place / "runs/explodes"
    assert text.startswith("step 5: not finite (loss nan, global nan, p2p nan, p2s nan") and "gradient norm nan" in text
    assert f"cases: {', '.join(batch_of(place, config(place, **keys), 5)['id'])});" in text
    assert f"; the last good checkpoint is {run}/last.pt, of step 4; the same command with a lower --lr goes on" in text
    state = last(run)
    assert state["step"] == 4 and [line["step"] for line in log(run)[1]] == [1, 2, 3, 4, 5]
    leaves = [leaf for leaf in flat(state).values() if torch.is_tensor(leaf)]
    assert len(leaves) > 200 and all(leaf.isfinite().all() for leaf in leaves)


def test_non_finite_loss_before_the_first_checkpoint(place):
    text = ends(within, place, argv(place, name="at_once", steps=4, warmup=0, lr=1e36, v2=False))
    assert text.startswith("step 1: not finite") and text.endswith("there is no checkpoint yet; try a lower --lr")
    assert not list((place / "runs/at_once").glob("*.pt"))


def test_a_checkpoint_that_has_trained_no_step_gives_way_to_the_one_before_it(place, capsys):
    """Finite weights of 1e36 are saved at step 5 and ruin step 5; the same command with a lower rate goes on from step 4."""
    keys = dict(name="ruined", steps=8, warmup=3, min_lr=1e38, save_every=1, v2=False, decoder=True)
    text = ends(within, place, argv(place, **keys))
    run = place / "runs/ruined"
    assert torch.load(run / "network.pt", weights_only=True)["step"] == 4
    assert "step 5: not finite" in text and "last.pt, of step 4; the same command with a lower --lr goes on" in text
    assert last(run)["step"] == 4 and torch.load(run / "encoder.pt", weights_only=True)["step"] == 4
    assert torch.load(run / "last.bad.pt", weights_only=True)["step"] == 5
    capsys.readouterr()
    ends(within, place, argv(place, **keys | dict(lr=9e-4)))
    assert "lr was 0.001, now 0.0009: from step 4 on the rate is" in capsys.readouterr().out


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(place, monkeypatch):
    def overflow(teacher, student, momentum):
        for network in (teacher, student):
            network.encoder.embed.weight.data[0] = math.inf
    monkeypatch.setattr(pretrain, "follow", overflow)
    text = ends(within, place, argv(place, name="end", steps=1, v2=False))
    assert text == "step 1: not finite (encoder.embed.weight after it); there is no checkpoint yet; try a lower --lr"
    assert not list((place / "runs/end").glob("*.pt"))


def test_a_longer_run_goes_on_from_a_shorter_one_and_a_name_in_use_is_refused(place, capsys):
    run = alone(place, name="longer", steps=2, warmup=0, v2=False)
    capsys.readouterr()
    alone(place, name="longer", steps=3, warmup=0, v2=False)
    assert "steps was 2, now 3: from step 2 on the rate is 0.00025, falling to 0" in capsys.readouterr().out
    assert last(run)["step"] == 3
    held = open(run / "lock")
    fcntl.flock(held, fcntl.LOCK_EX)
    (run / "lock").write_text("1")                                  # the number of another process
    text = ends(within, place, argv(place, name="longer", steps=4, warmup=0, v2=False))
    assert text == f"{run}: another process trains under this name; give --name=another"


def test_torchrun_says_what_is_missing_once_and_in_its_summary(place):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py",
               *argv(place, name="missing", scans="nowhere/*.nii.gz")]
    process = start(place, command)
    said = process.communicate(timeout=200)[0]
    line = f"pattern 'nowhere/*.nii.gz' finds nothing below {place}/data; {place}/data holds: demo_ct/"
    assert process.returncode == 1 and said.splitlines().count(line) == 1
    assert f"traceback : {line}" in said and "pretrain.py\", line" not in said


def test_what_one_machine_refuses_ends_the_others(place):
    with socket.create_server(("localhost", 0)) as door:
        port = door.getsockname()[1]
    line, machines = "pattern 'nowhere/*.nii.gz' finds nothing below", []
    for rank, scans in enumerate(("demo_ct/train/imagesTr/*.nii.gz", "nowhere/*.nii.gz")):
        here = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=port)
        code = f"import os\nos.environ |= {({k: str(v) for k, v in here.items()})}\nimport pretrain, run\nrun.program(pretrain.main)"
        machines.append(start(place, ["-c", code, *argv(place, name="machines", scans=scans)]))
    try:
        said = [machine.communicate(timeout=200)[0] for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    assert [machine.returncode for machine in machines] == [1, 1]
    assert all(line in text.splitlines()[-1] and "Traceback" not in text for text in said), said
    assert ": waiting for the other machines" in said[0] and not (place / "runs/machines").exists()


REFUSED = [
    (dict(token_patch=6), "token_patch = 6"), (dict(matching="some"), "matching ="), (dict(structure="some"), "structure ="),
    (dict(crop=(32, 32, 32), slab=(32, 32, 32)), "crop = (32, 32, 32)"), (dict(crop=(80, 64, 64), slab=(80, 64, 64)), "crop ="),
    (dict(crop=(0, 64, 64)), "crop = (0, 64, 64)"), (dict(slab=(96, 64, 64)), "slab = (96, 64, 64)"),
    (dict(slab=(0, 64, 64)), "slab = (0, 64, 64)"), (dict(batch=3, accumulate=2), "batch = 3"), (dict(batch=0), "batch = 0"),
    (dict(accumulate=0), "0 accumulated"), (dict(accumulate=-1), "-1 accumulated"), (dict(queue=1), "queue = 1"),
    (dict(temperature=0), "temperatures"), (dict(global_temperature=-1), "temperatures"), (dict(momentum=1.5), "momentum = 1.5"),
    (dict(steps=0), "steps"), (dict(log_every=0), "log_every"), (dict(save_every=0), "save_every"), (dict(lr=0), "lr = 0"),
    (dict(clip=-1), "clip = -1"), (dict(warmup=-1), "warmup"), (dict(seed=-1), "seed"),
    (dict(sinkhorn_iterations=0), "sinkhorn_iterations = 0"), (dict(init="nowhere.pt"), "'nowhere.pt'"),
    (dict(num_heads=(3, 1, 1, 1)), "num_heads"), (dict(merge="some"), "merge"), (dict(depths=(2, 2)), "depths"),
    (dict(sharpness=1), "sharpness"), (dict(scale=(2.0, 1.0)), "scale = (2.0, 1.0)"), (dict(workers=100000), "workers = 100000"),
    (dict(twin_scale=(0.0, 1.0)), "twin_scale"), (dict(tokens="all"), "tokens = 'all'"), (dict(negatives="none"), "negatives ="),
    (dict(decoder=True, token_patch=32), "found token_patch = 32"), (dict(decoder=True, weights=(1, 0, 0)), "token losses teach it"),
    (dict(negatives="step", batch=1, queue=1), "a batch of one crop has no other"),
    (dict(weights=(0, 0, 0)), "not all 0"), (dict(weights=(1, -1, 0)), "weights = (1.0, -1.0, 0.0)"),
]


@pytest.mark.parametrize("keys, words", REFUSED, ids=lambda x: x if isinstance(x, str) else None)
def test_what_cannot_run_is_refused_in_one_line_before_anything_is_written(place, tmp_path, keys, words):
    assert words in ends(within, place, argv(place, **dict(runs=tmp_path / "runs", cache=tmp_path / "cache", name="bad") | keys))
    assert not list(tmp_path.iterdir())


def test_a_batch_must_divide_among_the_processes(place):
    cfg = config(place, batch=8, queue=8, accumulate=2)
    assert pretrain.check(cfg, 4) is None
    assert "8 does not divide into 3 processes x 2" in ends(pretrain.check, cfg, 3)


def test_weights_of_another_network_are_refused_in_one_line(place, ten):
    text = ends(within, place, argv(place, name="unfit", init=ten[0] / "encoder.pt"))
    assert "encoder.pt" in text and "v2 is False in the file, True in the model" in text


def test_another_preprocessing_of_the_weights_to_begin_with_is_said(place, ten, capsys):
    cfg = config(place, init=ten[0] / "encoder.pt", window=(-200.0, 300.0), v2=False)
    pretrain.build(cfg, torch.device("cpu"), True)
    said = capsys.readouterr().out
    assert "encoder.pt: preprocessing differs: window was (-175.0, 250.0) in training, is (-200.0, 300.0) here\n" in said
    pretrain.build(dataclasses.replace(cfg, window=(-175.0, 250.0)), torch.device("cpu"), True)
    assert "differs" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ what it writes

def test_encoder_file_loads_with_its_preprocessing(place, ten, capsys):
    run = alone(place, name="kept", steps=2, save_every=2, keep=(1,), window=(-200.0, 300.0), cache=place / "cache_kept")
    cfg = config(place, window=(-200.0, 300.0))
    for file, step in (("encoder.pt", 2), ("encoder-1.pt", 1)):
        content = torch.load(run / file, weights_only=True)
        assert content["format"] == "s2dc/encoder" and content["step"] == step
        assert content["preprocessing"] == data.preprocessing(cfg) != data.preprocessing(config(place))
        encoder = Swin3D(**content["arguments"])
        report = load_weights(encoder, run / file)
        assert report["loaded"] == report["total"] == len(encoder.state_dict()) and report["initial"] == {}
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, content["encoder"][name])
    student, final = last(run)["student"], torch.load(run / "encoder.pt", weights_only=True)["encoder"]
    assert all(torch.equal(student[f"encoder.{name}"], tensor) for name, tensor in final.items())
    assert last(run)["preprocessing"] == data.preprocessing(cfg)
    assert load_weights(Swin3D(**last(run)["arguments"]), run / "last.pt")["loaded"] == len(encoder.state_dict())


def test_a_decoder_that_learned_goes_on_and_is_there_for_stage_2(place, monkeypatch):
    """Stopped after two of three steps and not; network.pt holds the student's encoder and decoder but for the last layer."""
    keys, save = dict(name="decoded", decoder=True, steps=3, save_every=2, v2=False), pretrain.save_state

    def save_and_copy(path, *rest):
        save(path, *rest)
        if rest[5] == 2:
            shutil.copytree(path.parent, place / "stopped/decoded")

    monkeypatch.setattr(pretrain, "save_state", save_and_copy)
    run = alone(place, **keys)
    monkeypatch.undo()
    again = alone(place, runs=place / "stopped", **keys)
    assert [line["resumed"] for line in log(again)[0]] == [0, 2]
    assert_equal(again, run)
    student, network = last(run)["student"], SwinUNETR(1, 5, **{k: v for k, v in last(run)["arguments"].items() if k != "in_channels"})
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = load_weights(network, run / "network.pt")
    assert report["reasons"] == {} and set(report["initial"]) == {"skips", "ups", "out"}
    load_weights(encoder := Swin3D(**last(run)["arguments"]), run / "encoder.pt")
    torch.manual_seed(config(place, **keys).seed)
    before = pretrain.Network(config(place, **keys)).state_dict()
    for name, tensor in network.state_dict().items():
        taught = f"swin_unetr.{name}"
        if name.startswith(UNTAUGHT[8]):        # those of stage 2
            assert torch.equal(tensor, fresh[name])
        else:
            assert torch.equal(tensor, student[taught]) and not torch.equal(tensor, before[taught])
        if name.startswith("encoder."):
            assert torch.equal(tensor, encoder.state_dict()[name[8:]]) and torch.equal(tensor, student[name])
    on = alone(place, **keys | dict(name="from_both", steps=1, lr=1e-12, warmup=0, init=run / "network.pt"))
    for name, tensor in last(on)["student"].items():
        if name.startswith(("swin_unetr.bottom.", "swin_unetr.ups.1.", "encoder.")):
            assert torch.allclose(tensor, student[name], atol=1e-6)
    whole, part = (torch.load(run / name, weights_only=True) for name in ("network.pt", "encoder.pt"))
    assert whole["preprocessing"] == part["preprocessing"] == data.preprocessing(config(place, **keys))
    assert whole["seen"] == part["seen"] and len(whole["seen"]) > 3 and whole["step"] == part["step"] == 3
    assert not (alone(place, **keys | dict(name="not_decoded", decoder=False)) / "network.pt").exists()


def test_run_starts_from_an_encoder(place, ten):
    run = alone(place, name="init", steps=1, lr=1e-12, warmup=0, v2=False, init=ten[0] / "encoder.pt")
    start = torch.load(ten[0] / "encoder.pt", weights_only=True)["encoder"]
    for part in ("student", "teacher"):
        for name, tensor in start.items():
            torch.testing.assert_close(last(run)[part][f"encoder.{name}"], tensor, rtol=1e-6, atol=1e-9)


def test_stored_configuration_is_a_config_file_and_the_log_says_where(place, ten):
    run, said = ten
    cfg = config(place, **TEN)
    assert configs.load(pretrain.Config, [str(run / "config.py")]) == cfg
    assert last(run)["config"] == dataclasses.asdict(cfg)
    first = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert first["torch"] == torch.__version__ and first["device"] == "cpu, 1 threads" and first["resumed"] == 0
    git = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert first["commit"][:12] == git[:12] if git else first["commit"] == "unknown"
    assert configs.differing(cfg) in said and "lr = 0.0001" in configs.differing(cfg).splitlines()
    for words in ("1 x cpu, 1 threads, float32, 4 scans, cache 0.00 GB", "batch 2 slabs x 1 crops = 1 ranks x 1 passes x 2",
                  "512 tokens a slab; steps 0 to 10", "step     10  loss ", " left\n", "10 steps in "):
        assert words in said
    network = pretrain.Network(cfg)
    count = sum(p.numel() for p in network.parameters())
    assert f"student {count / 1e6:.2f} M" in said
    wanted = {"step", *TERMS, "matches", "accuracy", "spread", "top1", "top1_chance", "nce", "nce_chance", "lr", "grad_norm",
              *TIMES}
    assert all(set(line) == wanted for line in log(run)[1])


# ------------------------------------------------------------------------------------------------------------ parts, by hand


def test_queue_overwrites_the_oldest_first():
    queue, ring = pretrain.Queue(7, 2, "cpu"), collections.deque(maxlen=7)
    assert queue.filled()[0].shape == (0, 2)
    for start in range(0, 30, 3):
        keys = torch.arange(start, start + 3).float()[:, None] * torch.tensor([1.0, -1.0])
        queue.push(keys, torch.arange(start, start + 3) + 100)
        ring.extend(keys[:, 0].tolist())
        assert queue.count == start + 3
        found, subjects = queue.filled()
        assert sorted(found[:, 0].tolist()) == list(ring)
        assert found[(start + 2) % 7].tolist() == [start + 2, -start - 2]
        assert torch.equal(subjects, found[:, 0].long() + 100)
    assert queue.filled()[0].data_ptr() == queue.keys.data_ptr()


def decoder_map(network, crop, patch):
    """The decoder's map with tokens of patch voxels, overheard in Swin-UNETR's own forward pass."""
    seen = []
    hook = network.swin_unetr.ups[{16: 0, 8: 1, 4: 2, 2: 3}[patch]].register_forward_hook(lambda _, __, x: seen.append(x))
    network.swin_unetr(crop)
    hook.remove()
    return seen[0]


def grid_tokens(network, volume, cfg, decoder=False):
    """(1, t, e) tokens of a volume (1, c, x, y, z): every crop encoded alone, each of its tokens put to its place by loops."""
    rows, level = {}, {2: 0, 4: 1, 8: 2, 16: 3, 32: 4}[cfg.token_patch]
    for x, y, z in itertools.product(*(range(0, s, c) for s, c in zip(cfg.slab, cfg.crop))):
        crop = volume[:, :, x:x + cfg.crop[0], y:y + cfg.crop[1], z:z + cfg.crop[2]]
        features = (decoder_map(network, crop, cfg.token_patch) if decoder else network.encoder(crop)[level])[0]
        for i, j, k in itertools.product(*map(range, features.shape[1:])):
            rows[x // cfg.token_patch + i, y // cfg.token_patch + j, z // cfg.token_patch + k] = features[:, i, j, k]
    grid = [s // cfg.token_patch for s in cfg.slab]
    head = network.decoder_head if decoder else network.token_head
    return head(torch.stack([rows[at] for at in itertools.product(*map(range, grid))])[None])


def features(network, crop):
    return network.encoder(crop)[-1].mean(dim=(2, 3, 4))


def pooled(network, crop):
    seen = network.standard
    return (features(network, crop) - seen.mean) / (seen.variance + 1e-5) ** 0.5 @ network.global_head.weight.T


def test_crops_without_body_pass_neither_network_and_change_nothing(place):
    """In double precision: loss and gradient of a slab of two crops, one of air, as if the air had been encoded."""
    cfg = config(place, slab=(128, 64, 64), v2=False)
    generator = torch.Generator().manual_seed(0)
    V, V_ = torch.rand(2, 2, 1, 128, 64, 64, generator=generator, dtype=torch.float64)
    twin = torch.rand(2, 1, 64, 64, 64, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 16, 8, 8, dtype=torch.bool)
    valid[:, 8:] = False
    valid[1, 9, 3, 3] = True                                        # one token of the other slab's second crop
    valid, pairs = valid.flatten(1), torch.tensor([[b, i, (i + 3) % 512] for b in (0, 1) for i in range(300)])
    torch.manual_seed(0)
    student, passed = pretrain.Network(cfg).double(), []
    student.encoder.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))

    def step(keep):
        student.zero_grad()
        with torch.no_grad():
            tokens_, keys, _ = student(V_, keep, twin)
        tokens, embeddings, _ = student(V, keep)
        negatives, allowed = pretrain.others_of_step(keys, torch.tensor([4, 7]), torch.tensor([0, 1]),
                                                     torch.tensor([[False, False], [True, False]]))
        loss = losses.s2dc_loss(tokens, tokens_, pairs, embeddings[:, 0], keys[:, -1], negatives, allowed=allowed,
                                valid=valid, valid_=valid)["loss"]
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in student.parameters()]), allowed

    keep = pretrain.crops_seen(valid, cfg)
    assert keep.tolist() == [[True, False], [True, True]]
    loss, gradient, allowed = step(keep)
    assert passed == [5, 3] and allowed.tolist() == [[False, False, False, True, True, True], [True, False, True, True, False, False]]
    allowed_before = allowed.clone()
    everything = torch.ones_like(keep)
    student_keys = pretrain.others_of_step

    def without_the_air(keys, *others):                             # its key is no negative in either case
        negatives, allowed = student_keys(keys, *others)
        return negatives, allowed & allowed_before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "others_of_step", without_the_air)
        loss_all, gradient_all, _ = step(everything)
    assert passed[2:] == [6, 4]
    torch.testing.assert_close(loss, loss_all, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, gradient_all, rtol=1e-9, atol=1e-12)
    student.compiled = True                                         # all pass, and nothing else changes
    loss_compiled, gradient_compiled, allowed_compiled = step(keep)
    assert passed[4:] == [6, 4] and torch.equal(allowed_compiled, allowed_before)
    torch.testing.assert_close(loss, loss_compiled, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, gradient_compiled, rtol=1e-9, atol=1e-12)


def test_no_key_of_ones_own_subject_from_anywhere_in_the_batch():
    """Slabs 0 and 2 are of one person, 1 of another; three crops and a twin each."""
    keys, subjects = torch.randn(3, 4, 5), torch.tensor([4, 7, 4])
    apart = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    negatives, allowed = pretrain.others_of_step(keys, subjects, torch.arange(3), apart)
    for b in range(3):
        for key, ok in zip(negatives, allowed[b]):
            (slab, crop), = (keys == key).all(2).nonzero().tolist()
            expected = subjects[slab] != subjects[b] or (slab == b and crop < 3 and apart[b, crop])
            assert ok == bool(expected), (b, slab, crop)


def test_an_encoder_remembers_all_that_it_has_seen(place, capsys):
    """Of a run that goes on with other scans, and of the file that a run begins with."""
    cfg, at = config(place), lambda *names: [type("scan", (), dict(case=dict(images=[place / "data" / n]))) for n in names]
    hashes = lambda *names: set().union(*(data.known_as(place / "data" / n, cfg) for n in names))
    first = pretrain.seen_so_far(at("a", "b"), cfg, None, print)
    assert set(first) == hashes("a", "b") and capsys.readouterr().out == ""
    state = dict(seen=first, scans=2)
    assert pretrain.seen_so_far(at("a", "b"), cfg, state, print) == first and capsys.readouterr().out == ""
    assert set(pretrain.seen_so_far(at("b", "c"), cfg, state, print)) == hashes("a", "b", "c")
    assert "it had 2, now 2, 1 of their files are new" in capsys.readouterr().out
    assert set(pretrain.seen_so_far(at("b"), cfg, state, print)) == hashes("a", "b")
    assert "it had 2, now 1, 0 of" in capsys.readouterr().out
    torch.save(dict(format="s2dc/encoder", encoder={}, seen=first), place / "seen.pt")
    begun = dataclasses.replace(cfg, init=str(place / "seen.pt"))
    assert set(pretrain.seen_so_far(at("c"), begun, None, print)) == hashes("a", "b", "c")


FAST = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@pytest.mark.skipif(not FAST, reason="this CPU multiplies no bfloat16")
def test_a_step_in_bfloat16_is_the_same_to_its_digits(place):
    found = {}
    for fast in (False, True):
        within(place, argv(place, name=f"bf16_{fast}", steps=1, warmup=1, bf16_cpu=fast))
        found[fast] = json.loads((place / f"runs/bf16_{fast}/log.jsonl").read_text().splitlines()[-1])
    for term in (*TERMS, "grad_norm", "spread"):
        assert found[True][term] == pytest.approx(found[False][term], rel=0.05), term
    assert found[True]["p2p"] != found[False]["p2p"] and found[True]["matches"] == found[False]["matches"]


def test_one_subject_alone_has_nobody_to_be_told_from(place):
    text = ends(within, place, argv(place, name="alone", scans="demo_ct/train/imagesTr/*_000.nii.gz"))
    assert text.startswith("all 1 scans are of one subject: with negatives = 'step'") and not (place / "runs/alone").exists()


@pytest.mark.parametrize("subjects, negatives, slab, refused", [
    ("a", "step", 64, True), ("a", "both", 64, True), ("a", "queue", 64, True), ("a", "queue", 128, True), ("a", "step", 128, False),
    ("a", "both", 128, False), ("ab", "step", 64, False), ("ab", "queue", 64, False)])
def test_what_one_subject_can_be_told_from(subjects, negatives, slab, refused):
    cfg = pretrain.Config(negatives=negatives, slab=(slab, 64, 64), crop=(64, 64, 64))
    scans = [type("scan", (), dict(subject=s)) for s in subjects]
    if refused:
        assert "no other to be told from" in ends(pretrain.check_subjects, scans, cfg)
    pretrain.check_subjects(scans, dataclasses.replace(cfg, weights=(0, 1, 1)))
    assert refused or pretrain.check_subjects(scans, cfg) is None


def test_scans_that_are_one_grey_or_of_other_channels_are_refused(place, tmp_path):
    text = ends(within, place, argv(place, name="grey", window=(-1e5, 1e5), cache=tmp_path / "cache"))
    assert "of window = (-100000.0, 100000.0), the network would see one grey" in text and "\n" not in text
    scans = sorted((place / "data/demo_ct/train/imagesTr").glob("*.nii.gz"))[:2]
    entries = [dict(image=str(scans[0])), dict(image=[str(scans[0])] * 2, id="two")]
    (place / "data/odd.json").write_text(json.dumps(dict(training=entries)))
    text = ends(within, place, argv(place, name="odd", scans=(), datalist="odd.json", section="training", fill_share=0))
    assert text == "two: has 2 channels, in_channels = 1 (1 of 2 scans have others)"


def test_a_slab_that_the_scans_hardly_fill_is_refused(place):
    text = ends(within, place, argv(place, name="empty", slab=(384, 384, 96), crop=(96, 96, 96)))
    assert text.startswith("slab = (384, 384, 96): the scans, of median 60 x ") and "fill_share asks for 30%" in text
    assert "Set slab = (64, 64, 64) and crop = (64, 64, 64)" in text and not (place / "runs/empty").exists()
    text = ends(within, place, argv(place, name="empty", fill_share=0.99))
    assert text.endswith("fill_share asks for 99%. Set a smaller `spacing`, or a smaller `fill_share` if so much padding is meant")


@pytest.mark.parametrize("patch, decoder", [(8, False), (16, False), (8, True), (16, True), (4, True)])
def test_tokens_of_all_crops_land_on_the_one_grid_of_the_slab(place, patch, decoder):
    cfg = config(place, slab=(128, 64, 192), crop=(64, 64, 96), token_patch=patch, decoder=decoder)
    torch.manual_seed(1)
    network = pretrain.Network(cfg).requires_grad_(False)
    slab, twin = torch.rand(2, 1, 128, 64, 192), torch.rand(2, 1, 64, 64, 96)
    keep = torch.tensor([[True] * 4, [True, False, True, True]])    # crops 0 1 2 3 start at x z = 0 0, 0 96, 64 0, 64 96
    network.standard.follow(torch.randn(40, 64) * 3 + 1)
    tokens, embeddings, seen = network(slab, keep)
    same, with_twin, seen_with_twin = network(slab, keep, twin)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4 if decoder else 1e-5)      # more layers
    close(tokens, same)
    maps = (False, True)[:1 + decoder]          # the encoder's tokens, then the decoder's
    by_hand = torch.cat([grid_tokens(network, v[None], cfg, which) for which in maps for v in slab])
    x, _, z = torch.meshgrid(*[torch.arange(s // patch) for s in cfg.slab], indexing="ij")
    skipped = ((x < 64 // patch) & (z >= 96 // patch)).flatten()
    by_hand[1::2, skipped] = 0
    close(tokens, by_hand)
    nothing, _, of_twins = network(slab, torch.zeros_like(keep), twin)          # a V' that shows air alone
    close(of_twins[:, 4], features(network, twin))
    assert nothing.shape == tokens.shape and (nothing == 0).all()
    close(embeddings[0:1, 1], pooled(network, slab[0:1, :, :64, :, 96:]))
    close(embeddings[1:2, 2], pooled(network, slab[1:2, :, 64:, :, :96]))
    assert (embeddings[1, 1] == 0).all()
    close(with_twin[:, :4], embeddings)
    close(with_twin[:, 4], pooled(network, twin))
    close(seen[1, 2], features(network, slab[1:2, :, 64:, :, :96])[0])
    close(seen_with_twin[:, 4], features(network, twin))
    assert (seen[1, 1] == 0).all()
    assert (embeddings[0, 1] - embeddings[1, 2]).abs().min() > 1e-3 and (tokens[0, 0] - tokens[0, 1]).abs().max() > 1e-3


def corners(cfg):
    """First voxels of a slab's crops, in their order."""
    return list(itertools.product(*(range(0, s, c) for s, c in zip(cfg.slab, cfg.crop))))


def cropped(volume, corner, cfg):
    x, y, z = (slice(a, a + c) for a, c in zip(corner, cfg.crop))
    return volume[:, :, x, y, z]


def crops_of_step(cfg, valid, volumes):
    """{(slab, crop): (1, c, x, y, z)} of the crops that show the body."""
    found, grid = {}, [s // cfg.token_patch for s in cfg.slab]
    for m in range(len(volumes)):
        for n, corner in enumerate(corners(cfg)):
            i, j, k = (slice(a // cfg.token_patch, (a + c) // cfg.token_patch) for a, c in zip(corner, cfg.crop))
            if valid.reshape(len(volumes), *grid)[m, i, j, k].any():
                found[m, n] = cropped(volumes[m:m + 1], corner, cfg)
    return found


@torch.no_grad()
def follow_by_hand(network, crops):
    """The running mean and deviation of pooled features, after a step in which these crops passed."""
    seen, x = network.standard, torch.cat([features(network, crop) for crop in crops])
    old = min(0.9, seen.steps.item() / (seen.steps.item() + 1))
    mean = old * seen.mean + (1 - old) * x.mean(0)
    variance = old * seen.variance + (1 - old) * ((x - mean) ** 2).mean(0)
    return dict(mean=mean, variance=variance, steps=seen.steps + 1)


def others(cfg, batch, keys, b, ring):
    """(K, e): what slab b is told from, keys centred already. ring: pairs of earlier keys and their scans."""
    def counts(m, n):
        return batch["id"][m] != batch["id"][b] or (m == b and n != "twin" and batch["apart"][b, n])
    now = [key for (m, n), key in keys.items() if counts(m, n)] if cfg.negatives in ("step", "both") else []
    old = [key for key, scan in ring if scan != batch["id"][b]] if cfg.negatives in ("queue", "both") else []
    return torch.stack([*now, *old]) if now or old else torch.zeros(0, cfg.embedding)


def written_out(cfg, student, teacher, batch, ring):
    """(3,) L_g, L_p2p, L_p2s of Eq. 1, 5 and 8, the new keys with their scans, and what both networks' means and
    deviations become: one slab, one crop, one equation after the other."""
    V, V_, twin = data.views(batch, cfg)
    grid = [s // cfg.token_patch for s in cfg.slab]
    with torch.no_grad():
        crops = crops_of_step(cfg, batch["valid_"], V_) | {(m, "twin"): twin[m:m + 1] for m in range(len(V_))}
        keys = {at: pooled(teacher, crop)[0] for at, crop in crops.items()}
    terms = []
    for b in range(len(V)):
        x, y, z = batch["crop"][b].tolist()
        queue = others(cfg, batch, keys, b, ring)
        query = pooled(student, V[b:b + 1, :, x:x + cfg.crop[0], y:y + cfg.crop[1], z:z + cfg.crop[2]])
        L_g = losses.info_nce(query, keys[b, "twin"][None], queue, cfg.global_temperature)
        M_gt = data.correspondence(batch["H"][b:b + 1], grid, cfg.token_patch)
        valid, valid_ = batch["valid"][b:b + 1], batch["valid_"][b:b + 1]
        for decoder in (False, True)[:1 + cfg.decoder]:             # each map has half a say
            with torch.no_grad():
                tokens_ = grid_tokens(teacher, V_[b:b + 1], cfg, decoder)
            sim = losses.similarity(grid_tokens(student, V[b:b + 1], cfg, decoder), tokens_)
            if cfg.matching == "sinkhorn":
                M_hat = losses.sinkhorn(sim, cfg.temperature, student.bin_score, cfg.sinkhorn_iterations, valid, valid_)
            else:
                M_hat = losses.dual_softmax(sim, cfg.temperature, valid, valid_)
            L_p2s = losses.patch_to_structure(M_hat, M_gt, sim, cfg.structure, cfg.structure_detach, valid, valid_)
            terms.append(torch.stack([L_g, losses.patch_to_patch(M_hat, M_gt), L_p2s]))
    twins = [(keys[b, "twin"] / keys[b, "twin"].norm(), scan) for b, scan in enumerate(batch["id"])]
    mine = crops_of_step(cfg, batch["valid"], V)
    for b in range(len(V)):
        mine.setdefault((b, batch["chosen"][b].item()), cropped(V[b:b + 1], batch["crop"][b].tolist(), cfg))
    return torch.stack(terms).mean(dim=0), twins, (follow_by_hand(student, mine.values()), follow_by_hand(teacher, crops.values()))


def test_four_steps_equal_the_same_written_out(place):
    """Slab, crop and twin, the terms, clipping, AdamW, its two rates of decay, the teacher and the queue, all by hand."""
    keys = dict(name="by_hand", steps=4, warmup=2, lr=2e-3, min_lr=1e-3, decay=0.5, clip=0.7, momentum=0.9, queue=5,
                slab=(128, 64, 64), weights=(0.5, 1.0, 2.0), temperature=0.2, global_temperature=0.3, structure="mean",
                structure_detach=False, v2=False, negatives="both")
    run, cfg = alone(place, **keys), config(place, **keys)
    assert len({tuple(start) for step in range(4) for start in batch_of(place, cfg, step)["crop"].tolist()}) == 2
    torch.manual_seed(cfg.seed)
    student = pretrain.Network(cfg)
    teacher = copy.deepcopy(student)
    first, second = ([torch.zeros_like(p) for p in student.parameters()] for _ in range(2))
    ring, norms = [], []
    for step, rate in enumerate((1e-3, 2e-3, 2e-3, 1.5e-3)):
        terms, new, followed = written_out(cfg, student, teacher, batch_of(place, cfg, step), ring)
        loss = 0.5 * terms[0] + terms[1] + 2 * terms[2]
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        norms.append(norm)
        logged = log(run)[1][step]
        expected = [loss.item(), *terms.tolist(), norm, rate]
        near = 2e-4 if step == 0 else 1e-2                          # AdamW carries rounding on
        assert [logged[key] for key in (*TERMS, "grad_norm", "lr")] == pytest.approx(expected, rel=near)
        if step == 0:
            first_step = [(name, p, slow, g) for (name, p), slow, g in zip(student.named_parameters(), teacher.parameters(), gradients)]
            before = {name: p.detach().clone() for name, p, *_ in first_step}
        with torch.no_grad():
            for p, slow, g, m, v in zip(student.parameters(), teacher.parameters(), gradients, first, second):
                g = g * 0.7 / norm                                  # far above the limit in every step
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g ** 2)
                p.mul_(1 - rate * 0.5 if p.ndim > 1 else 1)
                p.sub_(rate * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
                slow.copy_(0.9 * slow + 0.1 * p)
        for network, state in zip((student, teacher), followed):
            network.standard.load_state_dict(state)
        assert norm > 0.7
        ring = [*ring, *new][-5:]
    assert last(run)["queue_count"] == 8                            # slots 5 6 7 3 4 hold keys 5 6 7 3 4
    expected = torch.stack([ring[k][0] for k in (2, 3, 4, 0, 1)])
    torch.testing.assert_close(last(run)["queue"], expected, rtol=0, atol=2e-2)
    # the weights after one step, wherever the gradient is more than rounding
    state, clear = last(alone(place, **keys | dict(name="one_by_hand", steps=1, warmup=1))), 0
    for name, _, _, g in first_step:
        g, p = g * 0.7 / norms[0], before[name]
        p = p * (1 - 2e-3 * 0.5 if p.ndim > 1 else 1) - 2e-3 * g / (g.abs() + 1e-8)
        sure = g.abs() > 1e-5
        clear += int(sure.sum())
        torch.testing.assert_close(state["student"][name][sure], p[sure], rtol=0, atol=2e-6)
        torch.testing.assert_close(state["teacher"][name][sure], (0.9 * before[name] + 0.1 * p)[sure], rtol=0, atol=2e-6)
    assert clear > 2000


ABLATIONS = [dict(weights=(1, 0, 0)), dict(negatives="queue"), dict(negatives="both", tokens="inside"), dict(weights=(0, 1, 0)), dict(matching="sinkhorn", sinkhorn_iterations=10),
             dict(structure="printed"), dict(structure="mean"), dict(structure="released"), dict(token_patch=16), dict(decoder=True),
             dict(decoder=True, token_patch=16, matching="sinkhorn")]
UNTAUGHT = {8: ("skips.0.", "skips.1.", "skips.2.", "ups.2.", "ups.3.", "ups.4.", "out."),
            16: ("skips.", "ups.1.", "ups.2.", "ups.3.", "ups.4.", "out.")}


@pytest.mark.parametrize("keys", ABLATIONS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_ablations_are_switches(place, keys):
    name = "ablation-" + "-".join(map(str, keys.values())).replace(" ", "")
    keys = dict(name=name, steps=2, warmup=0, decay=0.1) | keys
    run, cfg = alone(place, **keys), config(place, **keys)
    torch.manual_seed(cfg.seed)
    before = pretrain.Network(cfg)
    with torch.no_grad():
        terms, _, _ = written_out(cfg, before, copy.deepcopy(before), batch_of(place, cfg, 0), [])
    line = log(run)[1][0]
    expected = [sum(w * t for w, t in zip(cfg.weights, terms.tolist())), *terms.tolist()]
    assert [line[key] for key in TERMS] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    after, start = last(run)["student"], before.state_dict()
    # what a switched-off term alone would train only decays, by both steps' rates: 1e-3 and 5e-4
    idle = {(1, 0, 0): ("token_head.",)}.get(cfg.weights, ("global_head.",) if not cfg.weights[0] else ())
    untaught = tuple(f"swin_unetr.{name}" for name in UNTAUGHT[cfg.token_patch])        # of the decoder: as they were
    if not cfg.weights[0] and not cfg.decoder:              # nor what lies behind the tokens' map
        untaught += ("encoder.stages.2.", "encoder.stages.3.")
    for key, value in start.items():
        decayed = value * (1 - 1e-4) * (1 - 5e-5) if value.ndim > 1 else value
        if key.startswith(untaught):
            assert torch.equal(after[key], value), key
            continue
        still = torch.allclose(after[key], decayed, rtol=1e-6, atol=1e-9)
        assert still if key.startswith(idle) else not still, key
    if cfg.matching == "sinkhorn":
        assert after["bin_score"] != 1.0 and last(run)["teacher"]["bin_score"] != 1.0
        assert after["bin_score"].item() == pytest.approx(1.0, abs=2e-3)


def test_it_learns_to_match(place):
    run = alone(place, name="learns", scans="demo_ct/train/imagesTr/phantom_00[01].nii.gz", steps=30, lr=3e-3, hidden=32,
                embedding=16, momentum=0.9, log_every=5)
    lines = log(run)[1]
    assert lines[-1]["p2p"] < 0.75 * lines[0]["p2p"] and lines[-1]["p2p"] < 2 * math.log(512) - 2     # that is 2 below chance
    assert lines[-1]["accuracy"] > 3 * lines[0]["accuracy"] and lines[-1]["spread"] > 0.1
