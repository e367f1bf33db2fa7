"""lab/rivals/masking.py: what is hidden and how much, losses in closed form, and nothing hidden is seen."""
import functools
import math

import numpy as np
import pytest
import torch
from conftest import NETWORK, settings

import pretrain
from lab.rivals import masking
from lab.rivals.masking import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
CFG = settings("demo", pretrain.Config, hidden=16, embedding=8, depths=(1, 1, 1, 1), **NETWORK)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def volume(b=2, size=64, seed=0):
    """Not noise: blobs with a tilt, another in each sample."""
    torch.manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(b, 1, 8, 8, 8), (size,) * 3, mode="trilinear")
    return x + torch.linspace(0, 0.5, size)


def built(name):
    torch.manual_seed(0)
    return METHODS[name](CFG)


# ------------------------------------------------------------------------------------------ what is hidden

def test_hidden_patches_are_whole_and_as_many_as_asked():
    like = torch.zeros(3, 2, 32, 16, 48)
    for patch, share in ((8, 0.6), (16, 0.5), (4, 0.75)):
        hidden = masking.hidden_patches(like, patch, share, seeded())
        assert hidden.shape == (3, 1, 32, 16, 48) and hidden.dtype == torch.bool
        patches = hidden.numpy().reshape(3, 32 // patch, patch, 16 // patch, patch, 48 // patch, patch)
        inside = patches.mean((2, 4, 6)).reshape(3, -1)
        assert set(np.unique(inside)) == {0, 1}
        assert (inside.sum(1) == round(share * inside.shape[1])).all()
        assert (inside[0] != inside[1]).any()
        assert torch.equal(hidden, masking.hidden_patches(like, patch, share, seeded()))
    often = masking.hidden_patches(torch.zeros(400, 1, 16, 16, 16), 8, 0.5, seeded()).float().mean(0)
    assert (often - 0.5).abs().max() < 0.1                  # no place is preferred


def test_boxes_have_the_edges_and_the_share_asked_for():
    like = torch.zeros(40, 1, 32, 48, 32)
    one = masking.boxes(like, 1 / 4, 1 / 2, 1, seeded())[:, 0].numpy()
    for box in one:
        spans = [np.flatnonzero(box.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        edges = [span[-1] - span[0] + 1 for span in spans]
        assert box.sum() == math.prod(edges)                # solid
        assert all(n / 4 <= edge <= n / 2 for n, edge in zip(box.shape, edges))
    assert len({box.tobytes() for box in one}) == 40
    many = masking.boxes(like, 0.05, 0.25, 60, seeded(), torch.full((40, 1), 0.2)).float().mean((1, 2, 3, 4))
    assert (many < 0.2 + 0.25**3).all() and (many > 0.12).all()         # boxes may overlap
    first, as_well = (masking.boxes(like, 0.3, 0.4, 5, seeded(), share) for share in (1e-9, 1e-3))
    assert torch.equal(first, as_well) and first.any(4).any(3).any(2).all()
    assert not masking.boxes(like, 0.3, 0.4, 5, seeded(), 0).any()


# ------------------------------------------------------------------------------- closed forms and brute force

def test_near_is_the_mean_of_the_visible_voxels_around():
    torch.manual_seed(0)
    V, hidden = torch.rand(1, 2, 7, 6, 5, dtype=torch.float64), torch.rand(1, 1, 7, 6, 5) < 0.7
    found = masking.near(V, hidden, reach=2)
    for c, x, y, z in np.ndindex(2, 7, 6, 5):
        box = tuple(slice(max(0, k - 2), k + 3) for k in (x, y, z))
        assert found[0, c, x, y, z] == pytest.approx(V[0, c][box][~hidden[0, 0][box]].mean().item())


def test_restored_is_1_for_each_shortcut_and_0_for_the_truth():
    truth, hidden = volume(), masking.hidden_patches(volume(), 16, 0.5, seeded())
    guess = masking.near(truth, hidden)
    mean = torch.stack([v[:, h[0]].mean() * torch.ones_like(v) for v, h in zip(truth, hidden)])
    spoilt = torch.where(hidden, truth, 1e3)                # what is visible does not count
    assert masking.restored(spoilt, truth, hidden, guess) == {"of_mean": 0, "of_near": 0}
    assert masking.restored(mean, truth, hidden, guess)["of_mean"] == pytest.approx(1)
    assert masking.restored(guess, truth, hidden, guess)["of_near"] == pytest.approx(1)


@pytest.mark.parametrize("name, power", [("simmim", 1), ("mae3d", 2)])
def test_the_loss_is_that_of_hidden_voxels_alone(name, power, monkeypatch):
    method, V, guesses = built(name), volume(), []

    def guess(*_):
        guesses.append(torch.rand(V.shape, generator=seeded(1)).requires_grad_())
        return guesses[-1]
    monkeypatch.setattr(*((method, "restore") if name == "simmim" else (method.network, "forward")), guess)
    loss, _ = method(dict(V=V, subjects=torch.arange(len(V))), seeded())
    hidden = masking.hidden_patches(V, method.patch, method.share, seeded())
    truth = V
    if name == "mae3d":                                     # each patch has mean 0 and deviation 1
        truth = torch.zeros_like(V)
        for s, x, y, z in np.ndindex(2, 4, 4, 4):
            at = s, 0, slice(16 * x, 16 * x + 16), slice(16 * y, 16 * y + 16), slice(16 * z, 16 * z + 16)
            truth[at] = (V[at] - V[at].mean()) / V[at].std()
    wanted = (guesses[0] - truth)[hidden].abs().pow(power).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    loss.backward()
    assert ((guesses[0].grad != 0) == hidden).float().mean() > 0.999
    assert hidden.float().mean() == pytest.approx(dict(simmim=0.6, mae3d=0.75)[name], abs=0.01)


def test_genesis_spoils_as_it_says():
    method, V = built("models_genesis"), volume(40, 32)
    draw = functools.partial(torch.rand, generator=seeded())
    curved, falling = method.curve(V, draw), 0
    for v, w in zip(V, curved):
        order = v.flatten().argsort()
        steps = w.flatten()[order].diff()
        falling += int((steps <= 1e-5).all())
        assert (steps >= -1e-5).all() or (steps <= 1e-5).all()          # no grey passes another
        assert v.amin() - 1e-5 <= w.amin() and w.amax() <= v.amax() + 1e-5
        assert {round(w.amin().item(), 3), round(w.amax().item(), 3)} == {
            round(v.amin().item(), 3), round(v.amax().item(), 3)}       # from corner to corner
    assert 10 <= falling <= 30
    mixed = method.shuffle(V, draw)
    tiles = [x.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).reshape(40 * 512, 64) for x in (V, mixed)]
    assert torch.equal(*(t.sort(1)[0] for t in tiles))      # the same voxels in each tile
    assert 0.45 < (tiles[0] == tiles[1]).all(1).float().mean() < 0.55
    same = (method.spoilt(V, seeded()) == V).float().mean((1, 2, 3, 4))
    assert (same < 1).all() or (same == 1).float().mean() < 0.1


# ---------------------------------------------------------------- all methods; nothing hidden is seen

def batch(b=2, seed=0):
    return dict(V=volume(b, seed=seed), subjects=torch.arange(b))


@pytest.mark.parametrize("name", METHODS)
def test_learns_through_the_encoder_with_the_passes_it_states(name):
    method, passes = built(name), [0, 0]
    encoders = [method.encoder] + [m for m in method.modules() if type(m) is type(method.encoder)][1:]

    def count(_, inputs):
        passes[not torch.is_grad_enabled()] += inputs[0].numel() / (2 * 64**3)
    for encoder in encoders:
        encoder.register_forward_pre_hook(count)
    loss, measures = method(batch(), seeded())
    loss.backward()
    assert tuple(passes) == method.passes and loss.shape == () and loss.isfinite()
    for measure, value in measures.items():
        assert value.shape == () and value.isfinite() and not value.requires_grad, measure
    for part in (method.encoder.embed, method.encoder.stages[3].merge.reduce):
        assert part.weight.grad.abs().max() > 0
    torch.rand(3)                                           # all chance is the generator's
    with torch.no_grad():
        assert built(name)(batch(), seeded())[0].item() == pytest.approx(loss.item(), rel=1e-4)
    if hasattr(method, "after_step"):
        before = [p.clone() for p in method.teacher.parameters()]
        with torch.no_grad():
            for p in method.parameters():
                p.add_(p.requires_grad)
        method.after_step(0, 10)
        for p, old in zip(method.teacher.parameters(), before):
            assert torch.allclose(p, old + 1 - CFG.momentum, atol=1e-5)


@pytest.mark.parametrize("name", ["simmim", "mae3d", "swin_unetr", "swinmm", "gl_mae"])
def test_hidden_voxels_reach_no_feature(name, monkeypatch):
    """Two crops that differ in hidden voxels alone: all maps of the encoder are the same."""
    method, V, kept, seen = built(name), volume(1), [], []
    for function in ("hidden_patches", "boxes"):
        def spy(*args, plain=getattr(masking, function)):
            kept.append(plain(*args))
            return kept[-1]
        monkeypatch.setattr(masking, function, spy)
    monkeypatch.setattr(masking, "noise", lambda V, _: torch.zeros_like(V))     # else of the crop's own range
    monkeypatch.setattr(masking, "turned", lambda V, *_: V)
    if name == "gl_mae":                                    # its local view is a part of the same crop
        monkeypatch.setattr(masking.F, "interpolate", lambda x, size, mode: torch.zeros(len(x), 1, *size))
    method.encoder.register_forward_hook(lambda _, __, maps: seen.append([m.detach() for m in maps]))
    with torch.no_grad():
        method(dict(V=V, subjects=torch.arange(len(V))), seeded())
    hidden, calls = kept[0], len(seen)
    hidden = hidden[:1] if name in ("simmim", "mae3d", "gl_mae") else hidden[:1] & hidden[1:]
    assert hidden.any()
    with torch.no_grad():
        method(dict(V=torch.where(hidden, V + 1, V), subjects=torch.arange(len(V))), seeded())
        method(dict(V=torch.where(hidden.roll(3, 2), V + 1, V), subjects=torch.arange(len(V))), seeded())
    for first, second in zip(seen[:calls], seen[calls:2 * calls]):
        for a, b in zip(first, second):
            assert torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(seen[0][-1], seen[2 * calls][-1], atol=1e-2)      # others do reach it


def test_swinmm_compares_the_sides_voxel_by_voxel(monkeypatch):
    """A network that is the identity sees each side and gives it back: no mutual cost, whatever the side."""
    method = built("swinmm")

    def network(x):
        method.encoder(x[..., :32, :32, :32])               # its hooks want maps
        return x
    monkeypatch.setattr(method.network, "forward", network)
    with torch.no_grad():
        for seed in range(4):
            assert method(dict(V=volume(1), subjects=torch.arange(1)), seeded(seed))[1]["mutual"] == 0
