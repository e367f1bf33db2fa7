"""Speed and memory beside peers: what is compared does the same work, and ratios are of rounds."""
import copy
import functools
import json
import math
import os
import time

import numpy as np
import pytest
import torch
from torch import nn

import pretrain
from lab import bench

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ratios_are_of_each_round_and_who_comes_first_alternates(monkeypatch, tmp_path):
    """Ours takes 2, 4, 1 s, the peer 6, 4, 5 s: 3, 1 and 5 times as long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "FOUND", [])
    monkeypatch.setattr(bench, "matrix_rate", lambda dtype: 10.0)
    took, order = {"ours": [2.0, 4.0, 1.0], "peer": [6.0, 4.0, 5.0]}, []
    monkeypatch.setattr(bench, "seconds", lambda call: (took[call()].pop(0), 0.5))
    calls = {name: lambda name=name: order.append(name) or name for name in took}
    bench.compare("a row", calls, operations=5.0)
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]        # warmed up first
    ours, peer = bench.FOUND
    assert ours == dict(row="a row", who="ours", seconds=2.0, gb=0.5, floor=0.25)       # 5 of 10 a second in 2
    assert peer == dict(row="a row", who="peer", seconds=5.0, gb=0.5, ratio=[3.0, 1.0, 5.0])
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == bench.FOUND
    assert bench.table().splitlines()[2:] == ["| a row | ours | 2.0 |  | 0.5 | 0.25 |  |",
                                              "| a row | peer | 5.0 | 3.00 (1.00 .. 5.00) | 0.5 |  |  |"]
    with pytest.raises(SystemExit, match="expected all, profile, or some of encoder, .* found .'enc'"):
        bench.main(["enc"])


def test_operations_are_those_of_products_and_convolutions():
    network, volume = nn.Conv3d(3, 5, 3, padding=1), torch.ones(2, 3, 4, 6, 8)
    forward = 2 * 5 * 3 * 27 * volume[:, 0].numel()
    count = lambda train: bench.operations_of(
        lambda: bench.used(network, volume, train, torch.float32))
    assert count(False) == forward and count(True) == 2 * forward       # the slope of weights, not of the input


def hold(*counts):
    for count in counts:
        held = [np.ones(25_000_000) for _ in range(count)]      # 0.2 GB each
        time.sleep(0.1)
        del held


@pytest.mark.skipif(bench.CUDA, reason="memory is counted on the GPU there")
def test_a_process_of_its_own_says_how_long_its_call_took_and_the_most_that_it_held_at_a_time():
    call = bench.Apart(functools.partial, hold, 1, 2, 1)
    (took, gb), _ = call(), call.close()
    assert took >= 0.3 and gb == pytest.approx(0.4, abs=0.05)


def test_the_death_of_a_process_is_noticed():
    dead = bench.Apart(os._exit, 3)
    with pytest.raises((EOFError, ConnectionError)):
        dead()


def test_the_networks_that_are_timed_compute_the_same():
    pytest.importorskip("monai")
    volume = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = {name: net.eval()(volume) for name, net in bench.ours_and_peers("encoder", True).items()}
    ours, *peers = outputs.values()
    assert list(outputs) == ["ours", "MONAI", "MONAI flash"] and len(ours) == 5
    for peer in peers:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, peer, strict=True))


def test_the_timed_step_trains_the_student_and_its_teacher_follows(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "write_scans", functools.partial(bench.write_scans, shape=(80, 72, 40)))
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    cfg = pretrain.Config(slab=(64, 32, 32), crop=(32, 32, 32), token_patch=16, fill_share=0, feature_size=12,
                          num_heads=(1, 2, 4, 8), hidden=8, embedding=8, workers=0, lr=1e-2, momentum=0.9)
    batch, grid = bench.one_batch(tmp_path, cfg)
    assert grid == (4, 2, 2)
    student, teacher, *rest = pretrain.build(cfg, torch.device("cpu"), new=True)
    before = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    bench.our_step(cfg, batch, student, teacher, *rest)
    now, slow = student.state_dict(), teacher.state_dict()
    assert all(not torch.equal(now[name], before[0][name]) for name, _ in student.named_parameters())
    for name, parameter in teacher.named_parameters():
        follows = 0.9 * before[1][name] + 0.1 * now[name]
        assert torch.allclose(slow[name], follows, atol=1e-6) and math.isfinite(parameter.sum())
