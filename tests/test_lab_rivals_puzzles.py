"""lab/rivals/puzzles.py: labels by brute force, puzzles undone, and chance where the input tells nothing."""
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import NETWORK, settings

from lab.rivals import __main__ as rivals
from lab.rivals import puzzles
from lab.rivals.puzzles import METHODS, TURNS, TURNS_Z

pytestmark = pytest.mark.usefixtures("one_thread")
CFG = settings("demo", rivals.Config, hidden=16, embedding=8, depths=(1, 1, 1, 1), **NETWORK)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(V=None, b=2):
    V = torch.rand(b, 1, 64, 64, 64, generator=seeded(9)) if V is None else V
    b, sides = len(V), [n // 4 for n in V.shape[:1:-1] for _ in range(2)]
    around = torch.nn.functional.pad(V, sides, mode="replicate")
    return dict(V=V, around=around, offset=torch.full((b, 3), 16), start=torch.tensor([[0, 8, 30]] * b),
                shape=torch.tensor([[96, 72, 94]] * b),
                valid=torch.rand(b, V[0].numel() // 512, generator=seeded(8)) < 0.6)


def built(name):
    torch.manual_seed(0)
    return METHODS[name](CFG)


# ------------------------------------------------------------------------------------------------- turns

def test_turns_are_those_of_numpy_and_all_different():
    torch.manual_seed(0)
    V = torch.rand(10, 2, 6, 6, 6)
    for i, (v, w) in enumerate(zip(V, puzzles.turned(V, torch.arange(10), TURNS))):
        plane, k = TURNS[i]
        np.testing.assert_array_equal(np.rot90(v.numpy(), k, [axis - 1 for axis in plane]), w)
    ten = puzzles.turned(V[:1].expand(10, -1, -1, -1, -1), torch.arange(10), TURNS)
    assert len({v.numpy().tobytes() for v in ten}) == 10
    about_z = puzzles.turned(V[:4], torch.arange(4), TURNS_Z)
    assert torch.allclose(about_z.sum((2, 3)), V[:4].sum((2, 3)), atol=1e-5)    # each slice keeps its voxels
    assert torch.equal(about_z[0], V[0]) and not torch.equal(about_z[1], V[1])


def test_a_crop_that_looks_alike_from_all_sides_tells_no_turn():
    at = torch.linspace(-1, 1, 64)
    ball = (at[:, None, None] ** 2 + at[:, None] ** 2 + at**2)[None, None].expand(10, -1, -1, -1, -1)
    method, logits = built("rotation"), []
    method.head.register_forward_hook(lambda _, __, x: logits.append(x.detach()))
    with torch.no_grad():
        method(batch(ball), seeded())
        method(batch(ball * at), seeded())                  # this one does have an up and a down
    alike, told = (x - x[0] for x in logits)
    assert alike.abs().max() < 1e-5 < 1e-3 < told.abs().max()


# ------------------------------------------------------------------------------------------------- jigsaw

def test_permutations_are_each_the_farthest_from_those_before():
    chosen = puzzles.far_permutations(5, 8).tolist()
    every = list(itertools.permutations(range(5)))

    def distance(p, before):
        return min(sum(a != b for a, b in zip(p, q)) for q in before)
    for k in range(1, 8):
        assert distance(chosen[k], chosen[:k]) == max(distance(p, chosen[:k]) for p in every)
    hundred = puzzles.far_permutations(8, 100)
    assert len({tuple(p) for p in hundred.tolist()}) == 100 and (hundred.sort(1)[0] == torch.arange(8)).all()
    apart = (hundred[:, None] != hundred).sum(2) + 8 * torch.eye(100, dtype=torch.long)
    assert apart.min() >= 5


def test_pieces_lie_in_their_cells_and_the_label_is_their_order(monkeypatch):
    method, V, places = built("jigsaw"), torch.rand(2, 1, 32, 32, 32, generator=seeded()), set()
    pieces = method.pieces(V, seeded())
    assert pieces.shape == (2, 8, 1, 14, 14, 14)
    for b, (n, cell) in itertools.product(range(2), enumerate(itertools.product((0, 16), repeat=3))):
        found = []
        for shift in itertools.product(range(3), repeat=3):
            x, y, z = (c + s for c, s in zip(cell, shift))
            w = V[b, :, x:x + 14, y:y + 14, z:z + 14]
            if torch.allclose(pieces[b, n], (w - w.mean()) / w.std(), atol=1e-4):
                found.append(shift)
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 8                                  # the gaps differ

    def network(x):                                         # a piece's feature is a voxel of it
        return [x[:, :, :1, :1, :1]]
    monkeypatch.setattr(method.encoder, "forward", network)
    orders, laid = [], []
    method.reduce = torch.nn.Identity()
    monkeypatch.setattr(method.head, "forward", lambda x: laid.append(x) or x)
    monkeypatch.setattr(puzzles.F, "cross_entropy", lambda _, order: orders.append(order))
    method(dict(V=V), seeded())
    assert laid[0].shape == (64, 8) and len(set(orders[0].tolist())) > 25
    for k, order in enumerate(orders[0]):
        assert torch.equal(laid[0][k], pieces[k // 32, method.permutations[order], 0, 0, 0, 0])


# ----------------------------------------------------------------------------------------------- Rubik's cube

def test_a_cube_is_twisted_layer_by_layer_and_back():
    V = torch.rand(2, 16, 16, 16, generator=seeded())
    for axis, layer, k in itertools.product(range(3), range(4), (1, 2, 3)):
        wanted = np.moveaxis(V.numpy().copy(), axis + 1, 0)
        part = slice(4 * layer, 4 * layer + 4)
        wanted[part] = np.rot90(wanted[part], k, (2, 3))
        found = puzzles.twist(V, [(axis, layer, k)], 4)
        np.testing.assert_array_equal(found, np.moveaxis(wanted, 0, axis + 1))
    moves = [(0, 1, 1), (2, 3, 2), (1, 0, 3), (0, 1, 3)]
    twisted = puzzles.twist(V, moves, 4)
    assert not torch.equal(twisted, V) and not torch.equal(puzzles.twist(V, moves[::-1], 4), twisted)
    back = [(axis, layer, 4 - k) for axis, layer, k in moves[::-1]]
    assert torch.equal(puzzles.twist(twisted, back, 4), V)


def test_every_move_is_drawn(monkeypatch):
    method, moves = built("rubiks_cube"), []
    monkeypatch.setattr(puzzles, "twist", lambda v, each, cells: moves.extend(map(tuple, each)) or v)
    method.scrambled(torch.zeros(300, 1, 4, 4, 4), seeded())
    assert len(moves) == 900 and set(moves) == set(itertools.product(range(3), range(4), (1, 2, 3)))


def test_the_critic_learns_against_the_network():
    """Its gradient goes down its own cost, and up it in what it judges."""
    x = torch.randn(3, requires_grad=True)
    torch.nn.functional.softplus(puzzles.Reverse.apply(x)).sum().backward()
    assert torch.allclose(x.grad, -x.detach().sigmoid())


# ----------------------------------------------------------------------------------------------- positions

def test_position_labels_token_by_token():
    method, given = built("position_label"), batch()
    labels = method.labels(given["start"], given["shape"], (64, 64, 64))
    assert labels.shape == (2, 512, 3)
    for n, token in enumerate(itertools.product(range(8), repeat=3)):
        for axis, (k, start, length) in enumerate(zip(token, (0, 8, 30), (96, 72, 94))):
            middle = start + 8 * k + 4                      # in voxels from the scan's face
            assert labels[1, n, axis] == min(int(middle / length * 8), 7)
    truth, blind = (method.labels(s, given["shape"], (64, 64, 64))[given["valid"]]
                    for s in (given["start"], (given["shape"] - 64) / 2))
    measured = method(given, seeded())[1]
    assert measured["accuracy_blind"] == pytest.approx((truth == blind).float().mean().item())
    assert method(given | dict(valid=torch.zeros(2, 512, dtype=torch.bool)), seeded())[0] == 0


def test_overlaps_are_the_shares_of_voxels():
    edge, grid = torch.tensor([6, 4, 5]), (3, 2, 2)
    bases = torch.tensor(list(itertools.product(*(range(0, g * e, e) for g, e in zip(grid, edge.tolist())))))
    rooms = [(g - 1) * e + 1 for g, e in zip(grid, edge.tolist())]
    starts = torch.stack([torch.randint(room, (20,), generator=seeded(room)) for room in rooms], dim=1)
    found = puzzles.overlaps(starts, bases, edge)
    for k, n in itertools.product(range(20), range(len(bases))):
        painted = np.zeros((18, 8, 10))
        for at in (starts[k], bases[n]):
            painted[tuple(slice(a, a + e) for a, e in zip(at.tolist(), edge.tolist()))] += 1
        assert found[k, n] == pytest.approx((painted == 2).sum() / 120)
    assert torch.allclose(found.sum(1), torch.ones(20))


def test_voco_by_its_equations(monkeypatch):
    method, given, crops = built("voco"), batch(), []
    z = torch.randn(32, 8, generator=seeded(3)).requires_grad_()        # 2 samples x (8 base + 8 random)
    monkeypatch.setattr(method.head, "forward", lambda x: z)
    method.encoder.register_forward_pre_hook(lambda _, inputs: crops.append(inputs[0]))
    kept = []

    def overlaps(*args, plain=puzzles.overlaps):
        kept.append((args[0], plain(*args)))
        return kept[-1][1]
    monkeypatch.setattr(puzzles, "overlaps", overlaps)
    loss, measures = method(given, seeded())
    wanted, hits = 0, 0
    for b in range(2):
        (starts, y), around = kept[b], given["around"][b]
        for k, (x, yy, zz) in enumerate(starts.tolist()):               # the crops are where the labels say
            cut = around[None, :, x:x + 48, yy:yy + 48, zz:zz + 48]
            cut = torch.nn.functional.interpolate(cut, [32] * 3, mode="trilinear")[0]
            assert torch.equal(crops[0][16 * b + 8 + k], cut)
        base, query = z[16 * b:16 * b + 8], z[16 * b + 8:16 * b + 16]
        for k, n in itertools.product(range(8), range(8)):
            l = max(0, torch.cosine_similarity(query[k], base[n], dim=0).item())
            wanted -= math.log(1 - abs(y[k, n].item() - l)) / 128
            if k != n:
                wanted += max(0, torch.cosine_similarity(base[k], base[n], dim=0).item()) / 112
        nearest = torch.cosine_similarity(query[:, None], base, dim=2).argmax(1)
        hits += (nearest == y.argmax(1)).sum().item()
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert measures["accuracy"].item() == pytest.approx(hits / 16)
    assert measures["chance"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("name", ["voco", "jigsaw"])
def test_a_crop_without_a_picture_tells_nothing(name):
    """All crops of a constant volume are one: each choice is as likely, and windows' padding adds nothing."""
    method, outputs = built(name), []
    last = method.head[-1]
    last.register_forward_hook(lambda _, __, x: outputs.append(x.detach()))
    for seed in range(2):
        method(batch(torch.full((2, 1, 64, 64, 64), 0.3)), seeded(seed))
    outputs = torch.cat(outputs)
    assert (outputs - outputs[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name, crop", [*((name, (64, 64, 64)) for name in METHODS), ("voco", (64, 64, 32)),
                                        ("jigsaw", (64, 64, 32)), ("position_label", (64, 64, 32))])
def test_learns_through_the_encoder_with_the_passes_it_states(name, crop):
    torch.manual_seed(0)
    cfg = dataclasses.replace(CFG, crop=crop, slab=crop, method=name)
    method, passes = METHODS[name](cfg), []
    method.encoder.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape))
    given = batch(torch.rand(2, 1, *crop, generator=seeded(9)))
    loss, measures = method(given, seeded())
    loss.backward()
    full = sum(shape[0] * math.prod(-(-n // 32) * 32 for n in shape[2:]) for shape in passes)   # as it pads
    assert (full / (2 * math.prod(crop)), 0) == rivals.passes(cfg, METHODS[name])
    assert loss.shape == () and loss.isfinite()
    assert name != "voco" or all(shape[2:] == (32, 32, 32) for shape in passes)     # and none is padded
    for measure, value in measures.items():
        assert value.shape == () and value.isfinite() and not value.requires_grad, measure
    assert method.encoder.embed.weight.grad.abs().max() > 0
    torch.manual_seed(0)
    again = METHODS[name](cfg)
    assert again(given, seeded())[0].item() == pytest.approx(loss.item(), rel=1e-4)
    assert again(given, seeded(1))[0].item() != loss.item() or name == "position_label"    # which draws nothing


def test_small_inputs_cost_what_the_encoder_makes_of_them():
    cubes = {name: [METHODS[name].passes((n, n, n))[0] for n in (64, 96, 128)] for name in ("voco", "jigsaw")}
    assert cubes["voco"] == pytest.approx([2, 16 * 64**3 / 96**3, 2])
    assert cubes["jigsaw"] == pytest.approx([1, 8 * 64**3 / 96**3, 1])
