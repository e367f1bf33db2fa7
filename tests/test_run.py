"""run.py: learning rate, places, resuming, the log, versions, by closed forms and by hand."""
import copy
import dataclasses
import errno
import math
import os
import platform
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import HERE, environment

import data
import pretrain
import run


def ends(call, *arguments):
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config(**keys):
    return dataclasses.replace(pretrain.Config(), **keys)


@dataclasses.dataclass
class Early:
    """A config as the code once had it, and as it has it now: `depth` has come, `width` has gone."""
    lr: float = 1e-3
    workers: int = 2
    width: int = 7


@dataclasses.dataclass
class Late:
    lr: float = 1e-3
    workers: int = 2
    depth: int = 3


def test_a_run_goes_on_unless_something_changes_that_it_depends_on(tmp_path):
    assert run.resume(tmp_path, Early(), (), print) is None
    run.save(tmp_path / "last.pt", dict(step=4, config=dataclasses.asdict(Early())))
    free = ("workers",)
    for cfg in (Early(), Early(workers=9), Late(), Late(workers=9), Late(depth=3)):
        assert run.resume(tmp_path, cfg, free, print)["step"] == 4
    assert ends(run.resume, tmp_path, Late(depth=4), free, print)
    said = ends(run.resume, tmp_path, Late(depth=4, lr=0.1), free, print)
    assert said == (f"{tmp_path}/last.pt belongs to another configuration: lr was 0.001, now 0.1; depth was 3, now 4. "
                    f"Give --name=another, or remove {tmp_path}")


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(pretrain.Config)])
def test_pretraining_depends_on_every_key_but_those_that_say_where_and_how_fast(tmp_path, key):
    run.save(tmp_path / "last.pt", dict(step=4, config=dataclasses.asdict(pretrain.Config())))
    other = copy.copy(pretrain.Config())
    setattr(other, key, {"steps": 7, "lr": 1.0}.get(key, "else"))
    free = ("name", "data", "runs", "cache", "workers", "labels", "remap", "checkpointing", "accumulate", "compile", "fill_share",
            "log_every", "save_every", "keep")
    if key in free:
        assert run.resume(tmp_path, other, pretrain.FREE, print)["step"] == 4
    else:
        assert f": {key} was " in ends(run.resume, tmp_path, other, pretrain.FREE, print)


def test_log_forgets_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "log.jsonl"
    header, steps = '{"torch": "2"}\n', ['{"step": 2}\n', '{"step": 4}\n', '{"step": 6}\n']
    path.write_text("".join([header, *steps, '{"st']))              # killed in the middle of a line
    run.start_log(tmp_path, pretrain.Config(), 4, {"torch": "3"})
    assert path.read_text() == "".join([header, *steps[:2], '{"torch": "3", "resumed": 4}\n'])
    path.write_text("".join([header, *steps]))
    run.start_log(tmp_path, pretrain.Config(), 0, {"torch": "3"})   # killed before the first checkpoint
    assert path.read_text() == header + '{"torch": "3", "resumed": 0}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.py", "lock", "log.jsonl"]
    path.write_text(header + "{]\n")
    assert ends(run.start_log, tmp_path, pretrain.Config(), 4, {}) == f"{path}: line 2 is no JSON object; mend or remove the file"


FORESEEN = [
    (SystemExit("one line"), "one line"), (SystemExit(3), None), (KeyboardInterrupt(), "stopped; the same command goes on"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/last.pt"), "runs/last.pt: cannot be written, the disk is full"),
    (OSError(errno.ENOTDIR, "Not a directory", "runs/a"), "runs/a: not a directory; if it was to be written, give --runs"),
    (OSError(errno.EROFS, "Read-only file system", "runs/a"), "runs/a: read-only file system; if it was to be written, give"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), "out of memory (Default"),
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA"),
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "a process that loads batches was killed"),
    (data.VolumeError("Caught VolumeError in DataLoader worker process 0.\nOriginal Traceback\nvolumes.VolumeError: a.npy: gone"),
     "a.npy: gone"),
    (ImportError("matplotlib is not installed: pip install matplotlib"), "matplotlib is not installed"),
    (ValueError("a defect"), None), (OSError(errno.EIO, "Input/output error", "x"), None), (RuntimeError("shapes"), None),
]


def test_an_encoder_ahead_of_the_checkpoint_gives_way_to_the_one_before(tmp_path):
    """A kill between the two saves; else encoder.prev.pt would end as another step's than in an undisturbed run."""
    for step in (2, 3):
        run.save(tmp_path / "encoder.pt", dict(step=step), keep=True)
    run.start_log(tmp_path, pretrain.Config(), 3, {})
    assert run.read_file(tmp_path / "encoder.pt")["step"] == 3
    run.start_log(tmp_path, pretrain.Config(), 2, {})
    assert run.read_file(tmp_path / "encoder.pt")["step"] == 2 and not (tmp_path / "encoder.prev.pt").exists()


@pytest.mark.parametrize("error, text", FORESEEN, ids=lambda x: type(x).__name__)
def test_what_is_foreseen_is_one_line_and_the_rest_keeps_its_traceback(error, text, monkeypatch, capsys):
    said = run.foreseen(error)
    assert (said is None) == (text is None) and (text is None or said.startswith(text) and "\n" not in said)

    def fails(arguments):
        raise error
    monkeypatch.delenv("S2DC_DEBUG", raising=False)
    with pytest.raises(BaseException) as caught:
        run.program(fails)
    if text is None:
        assert caught.value is error
    else:
        assert caught.value.code == (130 if isinstance(error, KeyboardInterrupt) else 1) and capsys.readouterr().err == said + "\n"
    monkeypatch.setenv("S2DC_DEBUG", "1")
    with pytest.raises(type(error)):
        run.program(fails)


def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_file(tmp_path):
    path = tmp_path / "last.pt"
    run.save(path, dict(step=1, a=torch.zeros(4)))
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            run.save(path, dict(step=2, a=torch.zeros(10 ** 5)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert run.foreseen(caught.value) == f"{path}: cannot be written, the disk is full"
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_only_the_first_process_moves_a_ruined_checkpoint(tmp_path, monkeypatch):
    for step in (3, 4):
        run.save(tmp_path / "last.pt", dict(step=step), keep=True)
    monkeypatch.setenv("RANK", "1")
    waited = []                                                     # torchrun would stop the first when this one ends
    monkeypatch.setattr(run.time, "sleep", waited.append)
    assert ends(run.diverged, tmp_path, 4, "loss nan") == "step 4: not finite (loss nan)"
    assert torch.load(tmp_path / "last.pt")["step"] == 4 and waited == [60]
    monkeypatch.setenv("RANK", "0")
    assert "last.pt, of step 3; the same command" in ends(run.diverged, tmp_path, 4, "loss nan")
    assert torch.load(tmp_path / "last.pt")["step"] == 3 and torch.load(tmp_path / "last.bad.pt")["step"] == 4


def test_a_lock_is_of_the_process_that_holds_it(tmp_path):
    """Not of one with the same number in another container; what failed in this process may be open still."""
    held = run.lock(tmp_path)
    assert run.lock(tmp_path) is held
    text = f"import run, pathlib; run.lock(pathlib.Path({str(tmp_path)!r}))"
    (tmp_path / "lock").write_text("7")
    other = subprocess.run([sys.executable, "-c", text], cwd=HERE, capture_output=True, text=True)
    assert other.returncode == 1 and "another process trains under this name" in other.stderr
    held.close()
    assert subprocess.run([sys.executable, "-c", text], cwd=HERE).returncode == 0


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(run.fcntl, "flock", refuse)
    assert ends(run.lock, tmp_path).startswith(f"{tmp_path}: cannot be locked (Function not implemented)")


def test_a_last_pt_of_another_program_is_one_line(tmp_path):
    run.save(tmp_path / "last.pt", dict(step=4, weights=torch.zeros(2)))
    assert ends(run.resume, tmp_path, Early(), (), print) == (f"{tmp_path}/last.pt: holds no run of this program; give "
                                                              "--name=another")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_wherever_it_stands(bad):
    state = dict(model={"w": torch.zeros(3)}, optimizer=dict(state={0: dict(exp_avg=torch.ones(2), step=torch.tensor(1))}))
    assert run.not_finite(state | dict(step=4, name="x", steps=(1, 2), keys=torch.arange(3))) == ""
    state["optimizer"]["state"][0]["exp_avg"][1] = bad
    assert run.not_finite(state) == "optimizer.state.0.exp_avg"


def test_a_file_system_without_links_keeps_the_checkpoint_before_by_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    for step in (1, 2, 3):
        run.save(tmp_path / "last.pt", dict(step=step), keep=True)
    assert torch.load(tmp_path / "last.prev.pt")["step"] == 2 and torch.load(tmp_path / "last.pt")["step"] == 3


def test_commit_is_unknown_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run.versions()["commit"] == "unknown"


def test_learning_rate_is_a_warm_up_and_half_a_cosine():
    cfg = config(steps=110, warmup=10, lr=2.0, min_lr=0.5)
    rate = [run.lr_at(step, cfg) for step in range(110)]
    assert rate[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    half = [0.5 + 1.5 * math.cos(math.pi * k / 200) ** 2 for k in range(100)]       # (1 + cos 2a) / 2
    assert rate[10:] == pytest.approx(half)
    assert rate[9] == rate[10] == 2.0 and rate[60] == pytest.approx(1.25) and 0.5 < rate[109] < 0.501
    plain = config(steps=4, warmup=0, lr=1.0)
    assert [run.lr_at(step, plain) for step in range(4)] == pytest.approx([1, 0.853553391, 0.5, 0.146446609])
    assert run.lr_at(3, config(steps=4, warmup=8, lr=1.0)) == 0.5


@pytest.mark.parametrize("ranks, accumulate, batch", [
    (1, 1, 3), (2, 1, 4), (1, 4, 4), (2, 3, 12), (8, 2, 16)])
def test_every_place_of_the_global_batch_is_worked_on_once_a_step(ranks, accumulate, batch):
    cfg = config(steps=5, batch=batch, queue=batch, accumulate=accumulate)
    passes = [list(run.places(cfg, rank, ranks, 2)) for rank in range(ranks)]
    for mine in passes:
        assert len(mine) == 3 * accumulate and {len(one) for one in mine} == {batch // ranks // accumulate}
    # rank after rank, each in the order of its passes, as keys are gathered
    for k, step in enumerate((2, 3, 4)):
        done = [one for mine in passes for one in mine[k * accumulate:(k + 1) * accumulate]]
        assert sum(done, []) == [(step, place) for place in range(batch)]


@pytest.mark.parametrize("amx, avx512, asked, found", [
    (False, False, False, False), (True, False, False, False), (True, False, True, True), (False, True, True, True)])
def test_bfloat16_on_a_cpu_is_asked_for_and_never_emulated(monkeypatch, amx, avx512, asked, found):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    cpu = torch.device("cpu")
    assert run.bfloat16(pretrain.Config(bf16_cpu=asked), cpu) is found
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if asked:
        with pytest.raises(SystemExit, match="bf16_cpu: this CPU multiplies no bfloat16"):
            run.bfloat16(pretrain.Config(bf16_cpu=True), cpu)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc and CPUs")
def test_memory_that_a_tensor_leaves_is_there_for_the_next():
    """64 MB are 16,384 pages, which the kernel would have to clear each time."""
    code = """
import resource, sys, torch, run
if "keep" in sys.argv:
    assert run.choose_device() == torch.device("cpu")
for n in range(30):
    if n == 20:         # the first few places are found anew
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = [int(subprocess.run([sys.executable, "-c", code, word], cwd=HERE, env=environment(HERE), text=True,
                                 capture_output=True, check=True).stdout) for word in ("keep", "plain")]
    assert faults[0] < 5000 < 9 * 2 ** 14 < faults[1]


@pytest.mark.parametrize("bf16, kind, capability, found", [
    (True, "cuda", (9, 0), "bfloat16"), (False, "cuda", (9, 0), "float32, convolutions in TF32"), (False, "cuda", (7, 5), "float32"),
    (False, "cpu", (9, 0), "float32")])
def test_the_log_says_what_products_are_computed_in(monkeypatch, bf16, kind, capability, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert run.products(bf16, torch.device(kind)) == found
