"""lab/rivals/masking.py: what is hidden and how much, losses in closed form, and nothing hidden is seen."""
import functools
import math

import numpy as np
import pytest
import scipy.ndimage
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

def test_near_continues_what_is_seen_smoothly():
    """Hidden cells: a linear system, each the mean of the cells around it; between cells: linear interpolation."""
    V, hidden = volume(1, 24)[:, :, :16, :12, :20].double(), torch.zeros(1, 1, 16, 12, 20, dtype=torch.bool)
    cells = torch.rand(4, 3, 5, generator=seeded()) < 0.7
    hidden |= cells.repeat_interleave(4, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    hidden[0, 0, :2] = True                                 # half of a cell: what is left of it counts
    cells, mean = cells.numpy(), np.zeros((4, 3, 5))
    matrix, right = np.eye(60), np.zeros(60)
    for n, at in enumerate(np.ndindex(4, 3, 5)):
        box = tuple(slice(4 * k, 4 * k + 4) for k in at)
        if not cells[at]:
            mean[at] = right[n] = V[0, 0][box][~hidden[0, 0][box]].mean()
            continue
        around = [c for c in np.ndindex(4, 3, 5) if max(abs(a - b) for a, b in zip(at, c)) <= 1]
        for c in around:
            matrix[n, np.ravel_multi_index(c, (4, 3, 5))] -= 1 / len(around)
    wanted = np.linalg.solve(matrix, right).reshape(4, 3, 5)
    grid = np.meshgrid(*[(np.arange(n) + 0.5) / 4 - 0.5 for n in (16, 12, 20)], indexing="ij")
    wanted = scipy.ndimage.map_coordinates(wanted, grid, order=1, mode="nearest")
    found = masking.near(V, hidden, sweeps=3000)
    assert np.allclose(found[0, 0], wanted, atol=1e-9)
    both = masking.near(torch.cat([V, 3 - V], dim=1), hidden, sweeps=3000)          # each channel for itself
    assert torch.allclose(both, torch.cat([found, 3 - found], dim=1))


def test_near_knows_more_than_the_mean():
    V = volume(4)
    hidden = masking.hidden_patches(V, 16, 0.6, seeded())
    guess = masking.near(V, hidden)
    assert masking.restored(guess, V, hidden, guess)["of_mean"] < 0.8
    assert torch.equal(guess, masking.near(torch.where(hidden, 7.0, V), hidden))


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


def test_genesis_paints_as_often_and_as_much_as_it_says(monkeypatch):
    method = built("models_genesis")
    monkeypatch.setattr(masking, "noise", lambda x, _: torch.full_like(x, 9.0))
    share = (method.spoilt(torch.rand(1000, 1, 16, 16, 16, generator=seeded()), seeded()) == 9).float().mean((1, 2, 3, 4))
    inside = (share > 0) & (share <= 5 * (5 / 16) ** 3)     # five boxes of at most a third of the edges
    assert (share == 0).float().mean() == pytest.approx(0.1, abs=0.03)
    assert inside.float().mean() == pytest.approx(0.9 * 0.2, abs=0.04)
    assert share[inside].mean() == pytest.approx(5 * (1 / 4) ** 3, abs=0.03)
    rng, kept = np.random.default_rng(0), []                # all but five boxes of 3/7 to 4/7 of the edges
    for _ in range(500):
        room = np.ones((16, 16, 16))
        for _ in range(5):
            edges = np.round(16 * rng.uniform(3 / 7, 4 / 7, 3)).astype(int)
            room[tuple(slice(a, a + n) for a, n in zip(rng.integers(0, 17 - edges), edges))] = 0
        kept.append(room.mean())
    assert share[share > 0.16].mean() == pytest.approx(np.mean(kept), abs=0.02)


def turned(V, turns):
    return torch.stack([torch.from_numpy(np.rot90(v, int(k), (1, 2)).copy()) for v, k in zip(V.numpy(), turns)])


def standardised(maps):
    x = maps[-1].mean((2, 3, 4))
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def entropy(logits, target):
    """Cross-entropy of rows, target: classes or their probabilities."""
    log = (logits - logits.exp().sum(1, keepdim=True).log()).double()
    return -(log * target).sum(1).mean() if target.ndim == 2 else -log[range(len(log)), target].mean()


def test_the_parts_of_genesis(monkeypatch):
    method, V, given = built("models_genesis"), volume(), []
    guess = torch.rand(V.shape, generator=seeded(1))
    monkeypatch.setattr(method.network, "forward", lambda x: given.append(x) or guess)
    loss, measures = method(batch(), seeded(2))
    assert loss.item() == pytest.approx(((guess - V) ** 2).mean().item(), rel=1e-5)
    assert torch.equal(given[0], method.spoilt(V, seeded(2))) and not torch.equal(given[0], V)
    assert measures["of_input"] == pytest.approx((loss / ((given[0] - V) ** 2).mean()).item(), rel=1e-5)


def test_the_parts_of_gl_mae():
    method, draws = built("gl_mae"), seeded(3)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(1.1)
        for k, seed in enumerate((3, 4)):                   # the second step's targets are less the centre
            V, draws, centre = volume(3, seed=seed), seeded(seed), method.centre.clone()
            loss, measures = method(dict(V=V, subjects=torch.arange(3)), seeded(seed))
            starts = (torch.rand(3, 3, generator=draws) * 33).long().tolist()
            local = torch.stack([v[:, x:x + 32, y:y + 32, z:z + 32] for v, (x, y, z) in zip(V, starts)])
            views = torch.cat([V, torch.nn.functional.interpolate(local, (64,) * 3, mode="trilinear")])
            hidden = masking.hidden_patches(views, 16, 0.6, draws)
            masked = torch.where(hidden, 0.0, views)
            error = ((method.network(masked) - views)[hidden] ** 2).mean()
            anchor = method.teacher[1](standardised(method.teacher[0](V)))
            target = (25 * (anchor - centre)).exp()
            target = (target / target.sum(1, keepdim=True)).double()
            agree = [entropy(10 * method.head(standardised([m])), target)
                     for m in (method.encoder(masked)[-1][:3], method.encoder(masked)[-1][3:])]
            assert loss.item() == pytest.approx(2 * error.item() + sum(agree).item(), rel=1e-4)
            assert measures["agree"].item() == pytest.approx(sum(agree).item(), rel=1e-4)
            assert torch.allclose(method.centre, 0.9 * centre + 0.1 * anchor.mean(0), atol=1e-5)
            assert abs(anchor.mean(0)).max() > 1e-3 and measures["top1_chance"].item() == pytest.approx(1 / 3)
            assert measures["agree_chance"].item() == pytest.approx(2 * math.log(8))


def test_the_parts_of_swin_unetr(monkeypatch):
    method, draws, V = built("swin_unetr"), seeded(5), volume(3)
    with torch.no_grad():
        loss, measures = method(batch(3), seeded(5))
        turns = torch.randint(4, (6,), generator=draws)
        V = turned(torch.cat([V, V]), turns)
        hidden = masking.boxes(V, 0.05, 0.25, 150, draws, 0.3 * torch.rand(6, 1, generator=draws))
        maps = method.encoder(torch.where(hidden, masking.noise(V, draws), V))
        x = masking.upsampled(method.decoder, maps[-1], 32)
        z = standardised(maps)
        cos = torch.cosine_similarity(*(method.contrast(z)[at] for at in np.ogrid[:6, :6]), dim=2) / 0.5
        cos[range(6), range(6)] = -1e4                      # nobody finds itself
        contrast = entropy(cos, torch.arange(6).roll(3))
        rotate = entropy(method.rotation(z), turns)
    assert loss.item() == pytest.approx(((x - V).abs().mean() + rotate + contrast).item(), rel=1e-4)
    for name, value in dict(inpaint=(x - V).abs().mean(), rotate=rotate, contrast=contrast).items():
        assert measures[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert len(set(turns.tolist())) > 2 and 0.02 < hidden.float().mean() < 0.2
    monkeypatch.setattr(masking, "upsampled", lambda *_: V - 0.1)       # as it was turned, a tenth too dark
    assert method(batch(3), seeded(5))[1]["inpaint"].item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("seed", [5, 6])
def test_the_parts_of_swinmm(seed):
    method, draws, V = built("swinmm"), seeded(seed), volume(3)
    with torch.no_grad():
        loss, measures = method(batch(3), seeded(seed))
        turns = torch.randint(4, (6,), generator=draws)
        V = turned(torch.cat([V, V]), turns)
        hidden = masking.hidden_patches(V, 16, 0.5, draws)
        masked = torch.stack([torch.where(h, v[~h].mean(), v) for v, h in zip(V, hidden)])
        order = [(3, 4, 2), (4, 2, 3)][torch.randint(2, (), generator=draws)]
        sides = masked, masked.permute(0, 1, *order)
        back = [2 + order.index(axis) for axis in (2, 3, 4)]
        restored = method.network(sides[0]), method.network(sides[1]).permute(0, 1, *back)
        goal = torch.stack([(v - v.mean()) / v.std() for v in V])
        wanted = 2 * ((restored[0] - restored[1])[hidden] ** 2).mean()
        for side, x in zip(sides, restored):
            z = standardised(method.encoder(side))
            cos = torch.cosine_similarity(*(method.contrast(z)[at] for at in np.ogrid[:6, :6]), dim=2) / 0.5
            cos[range(6), range(6)] = -1e4
            wanted = wanted + ((x - goal)[hidden] ** 2).mean()
            wanted = wanted + entropy(method.rotation(z), turns) + entropy(cos, torch.arange(6).roll(3))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


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
