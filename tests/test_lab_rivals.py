"""lab.rivals: the loop that all rivals share, and the methods of contrast.py, each core against loops or a closed form."""
import copy
import dataclasses
import inspect
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import configs
import data
import losses
import pretrain
import run
from lab import phantom
from lab.rivals import __main__ as rivals
from lab.rivals import contrast, variants
from model import SwinUNETR, load_weights

HERE = Path(pretrain.__file__).parent
TINY = dict(feature_size=4, num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), window_size=4, hidden=16, embedding=8, batch=2,
            lr=1e-3, warmup=1, workers=0, log_every=1, v2=False)
SWIN = {key: TINY[key] for key in ("feature_size", "num_heads", "depths", "window_size", "v2")}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three phantoms of 96 voxels, for the caches and runs of this file."""
    folder = tmp_path_factory.mktemp("rivals")
    phantom.write(folder / "data/demo_ct/train", range(3), size=96)
    return folder


def argv(place, **keys):
    keys = TINY | dict(data=place / "data", runs=place / "runs", cache=place / "cache") | keys
    return [str(HERE / "configs/demo.py"), *(f"--{key}={value}" for key, value in keys.items())]


def config(place=Path("."), method="simclr", **keys):
    return rivals.load(argv(place, method=method, **keys))


@pytest.fixture(scope="module")
def batch(place):
    """A batch as a method sees it, with what is around, and its config."""
    cfg = config(place)
    samples = rivals.Samples(data.open_scans(cfg, say=lambda _: None), cfg, surroundings=True)
    grid = tuple(s // cfg.token_patch for s in cfg.crop)
    raw = pretrain.assemble([samples[3, k] for k in range(cfg.batch)], grid, cfg.token_patch)
    return rivals.on_device(raw, cfg, torch.device("cpu")), cfg, samples


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=dice(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------------ the loop

@pytest.mark.parametrize("method", list(rivals.METHODS))
def test_two_steps_make_an_encoder_that_stage_2_takes(place, method, capsys):
    learning, frozen = rivals.passes(config(place), rivals.METHODS[method])
    cost = 3 * learning + frozen
    rivals.main(argv(place, method=method, steps=round(2 * cost / 5), keep=()))
    folder = place / f"runs/demo-{method}"
    said = capsys.readouterr().out
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(steps) == 2 and all("nan" not in line for line in steps)
    network = SwinUNETR(1, 3, **SWIN)
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    report = load_weights(network, folder / "encoder.pt")
    assert report["loaded"] == report["total"] == len(before)
    learned = torch.load(folder / "encoder.pt", weights_only=True)
    assert learned["name"] == f"demo-{method}" and learned["preprocessing"] == data.preprocessing(config(place))
    torch.manual_seed(config(place).seed)
    fresh = rivals.METHODS[method](config(place, method)).encoder.state_dict()
    moved = [name for name, tensor in fresh.items() if not torch.equal(tensor, learned["encoder"][name])]
    assert {"embed.weight", "stages.0.blocks.0.qkv.weight"} <= set(moved)       # the gradient reaches the first layers
    assert method not in contrast.METHODS or len(moved) == len(fresh)           # these teach every tensor
    rivals.main(argv(place, method=method, steps=round(2 * cost / 5), keep=()))
    assert "is complete: 2 steps" in capsys.readouterr().out


def test_a_stopped_run_goes_on_bit_for_bit(place, monkeypatch):
    """Of the method with the longest memory."""
    keys, names = dict(method="vicregl", steps=4, save_every=2, keep=()), ("whole", "parts")        # 3 steps of its own
    rivals.main(argv(place, name=names[0], **keys))

    def stop(folder, line, write=run.write_log):
        write(folder, line)
        if line["step"] == 3:                                       # a step after the checkpoint
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "write_log", stop)
        rivals.main(argv(place, name=names[1], **keys))
    rivals.main(argv(place, name=names[1], **keys))
    whole, parts = (torch.load(place / f"runs/{name}/last.pt", weights_only=True) for name in names)
    assert whole["step"] == parts["step"] == 3 and whole["network"].keys() == parts["network"].keys()
    for name, tensor in whole["network"].items():
        assert torch.equal(tensor, parts["network"][name]), name
    for k, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(v, parts["optimizer"]["state"][k][name]) for name, v in state.items())


def test_no_run_goes_on_with_that_of_another(place):
    rivals.main(argv(place, name="taken", method="simclr", steps=2))
    for keys, text in ((dict(method="vicregl"), "method was 'simclr', now 'vicregl'"), (dict(lr=2e-3), "lr was 0.001")):
        with pytest.raises(SystemExit, match=text):
            rivals.main(argv(place, **dict(name="taken", method="simclr", steps=2) | keys))
    with pytest.raises(SystemExit):                                 # and stage 1 refuses its folder
        pretrain.main([arg for arg in argv(place, name="taken", steps=3) if "method" not in arg])


@pytest.mark.parametrize("keys, text", [
    (dict(method="mocov2"), "method = 'mocov2', expected one of simclr,"),
    (dict(method="simclr", slab=(128, 64, 64)), r"slab = \(128, 64, 64\), crop = \(64, 64, 64\): .*--slab=64,64,64"),
    (dict(method="simclr", accumulate=2), "one process"),
    (dict(method="simclr", init=HERE / "run.py"), "init"),
    (dict(method="simclr", lr=-1.0), "lr = -1.0"),
    (dict(method="rotation", crop=(64, 64, 32), slab=(64, 64, 32)), r"rotation .* first 3 edges are alike, found crop = \(64, 64, 32\)"),
    (dict(method="rubiks_cube", crop=(64, 32, 64), slab=(64, 32, 64)), r"rubiks_cube .* first 3 edges are alike, found crop = \(64, 32, 64\)"),
    (dict(method="swinmm", crop=(64, 32, 64), slab=(64, 32, 64)), r"swinmm .* first 2 edges are alike, found"),
])
def test_what_cannot_run_is_refused_in_one_line(place, keys, text):
    with pytest.raises(SystemExit, match=text) as caught:
        rivals.main(argv(place, **keys))
    assert "\n" not in str(caught.value)


def test_names_and_budget(place):
    assert config(place).name == "demo-simclr" and config(place, name="mine").name == "mine"
    file = place / "resolved.py"
    file.write_text(configs.dump(config(place)))
    assert rivals.load([str(file)]).name == "demo-simclr"
    for passes, steps, warmup in (((1, 2), 400, 40), ((2, 0), 333, 33), ((2, 2), 250, 25), ((3, 0), 222, 22), ((1, 1), 500, 50)):
        method = type("Any", (), dict(passes=passes))
        plan = rivals.planned(config(place, steps=400, warmup=40), method)
        assert (plan.steps, plan.warmup) == (steps, warmup)
        assert abs(plan.steps * (3 * passes[0] + passes[1]) - 400 * 5) <= (3 * passes[0] + passes[1]) / 2
    flat = config(place, steps=400, warmup=40, crop=(64, 64, 32), slab=(64, 64, 32))    # VoCo: 16 x 32^3 of 2^17 voxels
    assert rivals.planned(flat, rivals.METHODS["voco"]).steps == 167 and rivals.planned(flat, contrast.SimCLR).steps == 333


@pytest.mark.parametrize("method", contrast.METHODS)
def test_the_passes_of_those_that_compare_views(batch, method):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network, passes = contrast.METHODS[method](cfg), [0, 0]
    for module in network.modules():
        if type(module) is type(network.encoder):
            module.register_forward_pre_hook(
                lambda _, inputs: passes.__setitem__(not torch.is_grad_enabled(),
                                                     passes[not torch.is_grad_enabled()] + len(inputs[0]) / 2))
    network(found, dice())
    assert tuple(passes) == network.passes


def test_a_loss_that_is_not_finite_ends_the_run(place, monkeypatch):
    monkeypatch.setattr(contrast.SimCLR, "temperature", float("nan"))
    with pytest.raises(SystemExit, match="step 0: not finite"):
        rivals.main(argv(place, name="nan", method="simclr", steps=4))
    assert not (place / "runs/nan/last.pt").exists()


def test_what_is_around_holds_the_crop(batch):
    found, cfg, samples = batch
    assert found["around"].shape == (2, 1, 96, 96, 96) and found["around"].dtype == torch.float32
    number = {scan.id: scan for scan in samples.scans}
    for n in range(2):
        scan, start, corner = number[found["id"][n]], found["start"][n], found["around_start"][n]
        assert found["shape"][n].tolist() == list(scan.shape) and data.subject_number(scan.subject) == found["subjects"][n]
        i, j, k = (slice(a, a + 64) for a in (start - corner).tolist())
        assert torch.equal(found["around"][n, :, i, j, k], found["V"][n])
    with pytest.MonkeyPatch.context() as patch:                     # drawn by seed, step and place
        patch.setattr(samples, "around", lambda scan, start, generator: {"around": generator.integers(10 ** 9)})
        draws = [samples[step, k]["around"] for step, k in ((3, 0), (3, 0), (3, 1), (4, 0))]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_the_region_around_lies_in_the_scan_where_it_can(batch):
    _, cfg, samples = batch
    shape, corners = (300, 96, 70), []
    scan = type("Scan", (), dict(shape=shape, cut=lambda self, low, high: np.zeros((1, *(high - low)), np.float16)))()
    for seed, start in itertools.product(range(40), (np.array([0, 0, 0]), np.array([100, 30, 6]), np.array([236, 3, 5]))):
        corner = samples.around(scan, start, np.random.default_rng(seed))["around_start"].numpy()
        assert corner[1] == 0 and corner[2] == -13 and 0 <= corner[0] <= 300 - 96
        assert (corner <= start).all() and (corner + 96 >= start + 64).all()
        corners.append(corner[0])
    assert len(set(corners) & set(range(68, 101))) > 15             # drawn, not always the same


@pytest.mark.parametrize("method", list(rivals.METHODS))
def test_all_draws_come_from_the_generator(batch, method):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = rivals.METHODS[method](dataclasses.replace(cfg, method=method))
    state = copy.deepcopy(network.state_dict())

    def value(seed, other):
        network.load_state_dict(state)
        torch.manual_seed(other)
        with torch.no_grad():
            return network(found, dice(seed))[0].item()
    first = value(1, 1)
    assert value(1, 2) == first
    assert method not in contrast.METHODS or (value(2, 1) != first) == (method in ("pcrlv1", "pcrlv2", "gvsl"))


@pytest.mark.parametrize("method", [name for name in rivals.METHODS if name not in variants.METHODS])
def test_a_method_is_short_and_says_where_it_is_from(method):
    of = rivals.METHODS[method]
    assert len(inspect.getsource(of).splitlines()) <= 60
    assert any(where in of.__doc__ for where in ("arXiv", "ICCV", "AAAI"))
    assert any(word in of.__doc__ for word in ("Ours:", "Deviation"))


# --------------------------------------------------------------------------------------------------- SimCLR, MoCo v3, VICRegL

def nt_xent(query, keys, subjects, temperature):
    """Eq. 1 in loops; also the share of queries whose partner is the most similar."""
    query, keys = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (query, keys))
    n = len(query)
    whose, costs, top = [*subjects, *subjects], [], []
    for i in range(n):
        partner = (i + n // 2) % n
        others = [k for k in range(n) if whose[k] != whose[i]]
        likeness = {k: math.exp(query[i] @ keys[k] / temperature) for k in [partner, *others]}
        costs.append(-math.log(likeness[partner] / sum(likeness.values())))
        top.append(likeness[partner] > max(likeness[k] for k in others))
    return np.mean(costs), np.mean(top)


@pytest.mark.parametrize("subjects", [(0, 1), (0, 1, 2), (4, 1, 4, 2)])
def test_nt_xent(subjects):
    query, keys = rows(2 * len(subjects), 5), rows(2 * len(subjects), 5, seed=1)
    for other in (query, keys):
        loss, found = contrast.contrasted(query, other, torch.tensor(subjects), 0.3)
        expected, top = nt_xent(query, other, subjects, 0.3)
        assert loss.item() == pytest.approx(expected, rel=1e-9) and found["top1"].item() == pytest.approx(top)
    if len(set(subjects)) == len(subjects):                         # of distinct samples: Eq. 1 has 2 b - 1 terms
        assert found["top1_chance"].item() == pytest.approx(1 / (2 * len(subjects) - 1))


def test_simclr_contrasts_its_two_moved_views(batch):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = contrast.SimCLR(cfg).eval()
    with torch.no_grad():
        z = [network.head(network.encoder(found[view])[-1].mean(dim=(2, 3, 4))) for view in ("V_", "twin")]
        loss, _ = network(found, None)
    assert loss.item() == pytest.approx(nt_xent(torch.cat(z), torch.cat(z), found["subjects"].tolist(), 0.1)[0], rel=1e-4)


@pytest.mark.parametrize("method", list(contrast.METHODS))
def test_crops_that_show_nothing_are_told_apart_by_chance_alone(batch, method):
    """Six steps on crops of one value: padding, place and seeds of a crop leave nothing to tell it from others."""
    found, cfg, _ = batch
    blank = {name: torch.full_like(found[name], 0.3) for name in ("V", "V_", "twin", "around")}
    torch.manual_seed(0)
    network = rivals.METHODS[method](cfg).train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    for step in range(6):
        loss, measures = network(found | blank, dice(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in measures.keys() & {"top1", "found"}:
            assert measures[name] <= measures[f"{name}_chance"], step
        if method in ("simclr", "mocov3"):                          # all alike: the logarithm of their number
            weight = 1 if method == "simclr" else 2 * 2 * 0.2
            assert loss.item() == pytest.approx(weight * math.log(3), rel=1e-4)
        if method == "gvsl":
            assert measures["misplaced"] > 0.9                      # 1: no move found


def test_mocov3_is_algorithm_1_and_its_momentum_ends_at_one(batch):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = contrast.MoCoV3(cfg).eval()
    with torch.no_grad():
        for p in network.encoder.parameters():
            p.mul_(1.3)                                             # the two encoders differ
        q, k = {}, {}
        for view in ("V_", "twin"):
            q[view] = network.predictor(network.projector(network.encoder(found[view])[-1].mean(dim=(2, 3, 4))))
            k[view] = network.slow[1](network.slow[0](found[view])[-1].mean(dim=(2, 3, 4)))
        loss, _ = network(found, None)
    total = 0.0                                                     # two samples: the negatives are the other one's keys
    for a, b in (("V_", "twin"), ("twin", "V_")):
        for n in range(2):
            cos = [F.cosine_similarity(q[a][n], key, dim=0).item() / 0.2 for key in (k[b][n], k[b][1 - n], k[a][1 - n])]
            total += 2 * 0.2 * (math.log(sum(map(math.exp, cos))) - cos[0]) / 2
    assert loss.item() == pytest.approx(total, rel=1e-4)

    fast, slow = network.encoder.embed.weight, network.slow[0].embed.weight
    for step, momentum in ((0, 0.99), (50, 0.995), (100, 1.0)):
        before = slow.clone()
        network.after_step(step, 100)
        assert torch.allclose(slow, momentum * before + (1 - momentum) * fast, atol=1e-7)
        assert step == 100 or not torch.equal(slow, before)
    assert not any(p.requires_grad for p in network.slow.parameters())
    mine, theirs = ({id(p) for p in part.parameters()} for part in (network.encoder, network.slow))
    assert not mine & theirs


def vicreg_loops(z, z_):
    (n, d), terms = z.shape, dict(invariance=((z - z_) ** 2).mean(), variance=0.0, covariance=0.0)
    for side in (z, z_):
        mean = side.sum(0) / n
        for i, j in itertools.product(range(d), repeat=2):
            c = sum((side[k, i] - mean[i]) * (side[k, j] - mean[j]) for k in range(n)) / (n - 1)
            if i == j:
                terms["variance"] += max(0.0, 1 - math.sqrt(c + 1e-4)) / d / 2
            else:
                terms["covariance"] += c ** 2 / d / 2
    return terms


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_three_terms_of_vicreg(scale):
    z, z_ = scale * rows(6, 4), scale * rows(6, 4, seed=1) + 2
    terms, expected = contrast.vicreg(z, z_), vicreg_loops(z.numpy(), z_.numpy())
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    assert scale < 3 or terms["variance"] < 0.1


def test_vicreg_in_closed_form():
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)     # numbers unrelated
    terms = contrast.vicreg(corners * math.sqrt(7 / 8), corners * math.sqrt(7 / 8))
    assert {name: round(value.item(), 9) for name, value in terms.items()} == dict(invariance=0, variance=0, covariance=0)
    point = torch.ones(5, 3, dtype=torch.float64)                   # collapsed: all of the variance term, 1 - sqrt(1e-4)
    assert contrast.vicreg(point, point)["variance"].item() == pytest.approx(0.99)


def test_earlier_rows_count_in_the_statistics_and_stand_for_gradient():
    z, z_, old, old_ = (rows(n, 4, seed=k) for k, n in enumerate((2, 2, 6, 6)))
    z.requires_grad_()
    terms = contrast.vicreg(z, z_, old, old_)
    whole = torch.cat([z, old])
    expected = contrast.vicreg(whole, torch.cat([z_, old_]))
    for name in ("variance", "covariance"):
        assert terms[name].item() == pytest.approx(expected[name].item())
        mine, theirs = (torch.autograd.grad(x[name], z, retain_graph=True)[0] for x in (terms, expected))
        torch.testing.assert_close(mine, 4 * theirs)
    assert terms["invariance"].item() == pytest.approx(((z - z_) ** 2).mean().item())


def test_closest_pairs_and_found_again():
    z, z_ = rows(2, 7, 3), rows(2, 7, 3, seed=1)
    valid, valid_ = torch.rand(2, 2, 7, generator=dice()) < 0.7
    expected = set()
    for n in range(2):
        best = []
        for i in range(7):
            away = {j: (z[n, i] - z_[n, j]).norm().item() for j in range(7) if valid[n, i] and valid_[n, j]}
            if away:
                best.append((min(away.values()), n, i, min(away, key=away.get)))
        expected |= {pair[1:] for pair in sorted(best)[:3]}
    found = contrast.closest(z, z_, valid, valid_, 3)
    assert {tuple(pair) for pair in found.T.tolist()} == expected and found.shape[1] == len(expected)
    assert contrast.closest(z, z_, valid, torch.zeros_like(valid_), 3).shape == (3, 0)

    pairs = torch.tensor([[0, 1, 2], [0, 3, 3], [1, 0, 5], [1, 6, 1]])
    cosine = torch.stack([F.cosine_similarity(a[:, None], b[None], dim=2) for a, b in zip(z, z_)])
    hits = [max((cosine[n, i, k].item(), k) for k in range(7) if valid_[n, k])[1] == j for n, i, j in pairs.tolist()]
    measured = contrast.found_again(z, z_, pairs, valid_)
    assert measured["found"].item() == pytest.approx(np.mean(hits))
    assert measured["found_chance"].item() == pytest.approx(np.mean([1 / valid_[n].sum() for n in pairs[:, 0]]))
    opposite = torch.tensor([[[-1.0, 0.1], [1.0, 0.0]]])            # the one valid token is nearest, however far
    alone = contrast.found_again(torch.tensor([[[1.0, 0.0]]]), opposite, torch.tensor([[0, 0, 0]]), torch.tensor([[True, False]]))
    assert alone["found"] == 1
    perfect = contrast.found_again(z, z[:, [3, 0, 1, 2, 4, 5, 6]], torch.tensor([[0, 0, 1], [1, 3, 0]]), valid_ | True)
    assert perfect["found"] == 1


def test_vicregl_adds_its_parts(batch):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = contrast.VICRegL(cfg).eval()
    with torch.no_grad():
        loss, _ = network(found, None)
        views = [network.encoder(found[view]) for view in ("V", "V_")]
        g, g_ = (network.expander(maps[-1].mean(dim=(2, 3, 4))) for maps in views)
        z, z_ = (network.local(maps[2].flatten(2).mT) for maps in views)
        n, i, j = found["pairs"].T
        near = torch.cat([contrast.closest(z, z_, found["valid"], found["valid_"], 20),
                          contrast.closest(z_, z, found["valid_"], found["valid"], 20)[[0, 2, 1]]], dim=1)
        weigh = [25 * t["invariance"] + 25 * t["variance"] + t["covariance"] for t in (
            contrast.vicreg(g, g_), contrast.vicreg(z[n, i], z_[n, j]), contrast.vicreg(z[near[0], near[1]], z_[near[0], near[2]]))]
    assert loss.item() == pytest.approx((0.75 * weigh[0] + 0.25 * weigh[1] + 0.25 * weigh[2]).item(), rel=1e-4)
    torch.testing.assert_close(network.memory[:, -2:], torch.stack([g, g_]), atol=1e-5, rtol=1e-4)
    assert network.count == 2 and (network.memory[:, :-2] == 0).all()
    with torch.no_grad():                                           # these rows count in the next step's statistics
        again, _ = network(found, None)
        t = contrast.vicreg(torch.cat([g, g]), torch.cat([g_, g_]))
    second = 25 * t["invariance"] + 25 * t["variance"] + t["covariance"]
    assert (again - loss).item() == pytest.approx(0.75 * (second - weigh[0]).item(), rel=1e-3)
    assert abs(again - loss) > 0.01 and network.count == 4
    with torch.no_grad():                                           # without a match nothing is undefined
        empty = found | dict(pairs=found["pairs"][:0], valid=found["valid"] & False)
        loss, measures = network(empty, None)
    assert torch.isfinite(torch.stack([loss, *measures.values()])).all() and measures["found"] == 0


# ------------------------------------------------------------------------------------------------------------ PCRL v1 and v2

def test_decoded_is_the_decoder_of_swinunetr():
    torch.manual_seed(0)
    network = SwinUNETR(1, 2, **SWIN | dict(v2=True)).eval()
    volume = torch.randn(1, 1, 64, 64, 32, generator=dice())
    with torch.no_grad():
        maps = network.encoder(volume)
        free = contrast.decoded(network, maps, skips=False)
        for p in network.skips[0].parameters():
            p.zero_()                                               # the skip of the volume gives zeros
        out = contrast.decoded(network, maps)
        torch.testing.assert_close(network.out(out[-1]), network(volume))
        assert [m.shape[2] for m in out] == [4, 8, 16, 32, 64] and [m.shape[1] for m in out] == [32, 16, 8, 4, 4]
        bare = [maps[0] * 0, maps[1] * 0, maps[2] * 0, maps[3] * 0, maps[4]]
        torch.testing.assert_close(contrast.decoded(network, bare, skips=False)[-1], free[-1])      # reads the last map alone
        assert len(contrast.decoded(network, maps, levels=2)) == 2


def test_painted_hides_boxes_and_nothing_else():
    x = torch.rand(2, 1, 48, 36, 24, generator=dice())
    out, where = contrast.painted(x, dice(1))
    assert torch.equal(out[~where], x[~where]) and (out[where] != x[where]).float().mean() > 0.99
    assert out.min() >= x.min() and out.max() <= x.max() and not torch.equal(where[0], where[1])
    again, _ = contrast.painted(x, dice(1))
    assert torch.equal(again, out)
    for seed in range(20):
        _, box = contrast.painted(x, dice(seed), boxes=1)
        for sample in box[:, 0]:
            i, j, k = sample.nonzero(as_tuple=True)
            edges = [int(axis.max() - axis.min()) + 1 for axis in (i, j, k)]
            assert sample.sum() == math.prod(edges)                 # one whole box
            assert all(n // 6 <= edge <= n // 3 for n, edge in zip(sample.shape, edges))


def test_flipped_enlarged_explained():
    x = torch.rand(3, 1, 4, 6, 8, generator=dice())
    bits = torch.tensor([[True, True, False], [False, False, False], [False, True, False]])
    expected = np.stack([np.flip(x[0].numpy(), (1, 2)), x[1].numpy(), np.flip(x[2].numpy(), 2)])
    assert np.array_equal(contrast.flipped(x, bits), expected)

    ramp = torch.arange(16.0).expand(1, 1, 16, 16, 16)              # along z: what is enlarged has half the slope
    for seed in range(5):
        part = contrast.enlarged(ramp, dice(seed))
        assert part.shape == ramp.shape and part.max() - part.min() == pytest.approx(7)
        assert torch.allclose(part[0, 0, 0, 0, 2:-2].diff(), torch.tensor(0.5))
    starts = {contrast.enlarged(ramp, dice(seed)).min().item() for seed in range(60)}
    assert starts == {float(n) for n in range(9)}                   # any place, both ends included

    assert contrast.explained(x, x) == 1 and contrast.explained(x * 0 + x.mean(), x).item() == pytest.approx(0, abs=0.01)
    where = x > 0.5
    assert contrast.explained(torch.where(where, x, 9.0), x, where[:, :1]) == 1


def test_pcrlv1_loss_in_parts(batch):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = contrast.PCRLv1(cfg).eval()
    with torch.no_grad():
        for p in network.encoder.parameters():
            p.mul_(1.1)
        loss, measures = network(found, dice(3))
        draws = dice(3)
        bits, bits_ = torch.rand(2, 2, 3, generator=draws) < 0.5
        a = max(a := torch.rand((), generator=draws).item(), 1 - a)
        x, x_ = found["V_"], found["twin"]
        maps, maps_ = network.encoder(x), network.slow[0](x_)
        q, k = network.head(maps[-1].mean(dim=(2, 3, 4))), network.slow[1](maps_[-1].mean(dim=(2, 3, 4)))
        cos = F.cosine_similarity(q[:, None], k[None], dim=2).numpy() / 0.2
        nce = np.mean([math.log(math.exp(cos[n, 0]) + math.exp(cos[n, 1])) - cos[n, n] for n in range(2)])
        maps[-1], maps_[-1] = (m[-1] * network.condition(b.float())[:, :, None, None, None] for m, b in ((maps, bits), (maps_, bits_)))
        goal, goal_ = contrast.flipped(x, bits), contrast.flipped(x_, bits_)
        plain = network.network.out(contrast.decoded(network.network, maps)[-1])
        mixed = network.network.out(contrast.decoded(network.network, [a * m + (1 - a) * m_ for m, m_ in zip(maps, maps_)])[-1])
        errors = ((plain - goal) ** 2).mean(), ((mixed - a * goal - (1 - a) * goal_) ** 2).mean()
    assert loss.item() == pytest.approx(nce + sum(errors).item() / 2, rel=1e-4) and measures["top1_chance"] == 0.5
    assert measures["restored"].item() == pytest.approx(1 - errors[0].item() / goal.var().item(), rel=1e-4)
    before, fast = network.slow[0].embed.weight.clone(), network.encoder.embed.weight
    network.after_step(0, 10)
    assert torch.allclose(network.slow[0].embed.weight, cfg.momentum * before + (1 - cfg.momentum) * fast, atol=1e-7)


def test_pcrlv2_compares_by_stopped_gradients_and_lets_go_of_the_middle(batch):
    p, z = rows(3, 4).requires_grad_(), rows(3, 4, seed=1).requires_grad_()
    value = contrast.siamese(p, z)
    value.backward()
    assert z.grad is None and p.grad.abs().max() > 0
    assert value.item() == pytest.approx(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                                                  for a, b in zip(p.detach().numpy(), z.detach().numpy())]))
    network = contrast.PCRLv2(batch[1])
    weights = [network.middle.item()]
    for step in range(10):
        network.after_step(step, 10)
        weights.append(network.middle.item())
    assert weights == pytest.approx([(1 + math.cos(math.pi * n / 10)) / 2 for n in range(11)], abs=1e-6)


@pytest.mark.parametrize("seed", [0, 3])
def test_pcrlv2_loss_in_parts(batch, seed):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network, draws = contrast.PCRLv2(cfg), dice(seed)
    with torch.no_grad():
        loss, measures = network(found, dice(seed))
        views = [contrast.painted(found[name], draws)[0] for name in ("V", "V_")] + [contrast.enlarged(found["twin"], draws)]
        scale = torch.randint(4, (), generator=draws).item()
        pyramids = [contrast.decoded(network.network, network.encoder(view), skips=False) for view in views]
        means = torch.cat([pyramid[scale].mean(dim=(2, 3, 4)) for pyramid in pyramids])
        z = (means - means.mean(dim=0)) / (means.var(dim=0, unbiased=False) + 1e-5).sqrt()
        p = network.predictors[scale](z)
        cos = [[F.cosine_similarity(p[2 * u:2 * u + 2], z[2 * v:2 * v + 2]).mean().item() for v in range(3)] for u in range(3)]
        both = [(cos[u][v] + cos[v][u]) / 2 for u, v in ((0, 1), (0, 2), (1, 2))]
        size = tuple(found["V"].shape[2:])
        rough = F.interpolate(network.restorers[scale](pyramids[0][scale]), size=size, mode="trilinear")
        errors = [((x - found["V"]) ** 2).mean().item() for x in (network.network.out(pyramids[0][-1]), rough)]
    assert loss.item() == pytest.approx(errors[0] + errors[1] - both[0] - (both[1] + both[2]) / 2, rel=1e-3)
    assert measures["alike"].item() == pytest.approx(both[0], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------- GVSL

def test_local_ncc_in_loops():
    a, b = (torch.rand(2, 1, 5, 6, 7, generator=dice(k), dtype=torch.float64) for k in (0, 1))
    b[1] = 3 * a[1] - 1                                             # the same up to a scale and a shift
    values = []
    for n, i, j, k in itertools.product(range(2), range(5), range(6), range(7)):
        windows = []
        for x in (a, b):
            window = np.zeros((3, 3, 3))
            for u, v, w in itertools.product(range(3), repeat=3):
                at = i + u - 1, j + v - 1, k + w - 1
                if all(0 <= p < size for p, size in zip(at, (5, 6, 7))):
                    window[u, v, w] = x[n, 0][at] - x[n].mean()
            windows.append(window - window.mean())
        cross, s_a, s_b = (windows[0] * windows[1]).sum(), (windows[0] ** 2).sum(), (windows[1] ** 2).sum()
        values.append(cross ** 2 / (s_a * s_b + 1e-5))
    assert contrast.local_ncc(a, b, 3).item() == pytest.approx(np.mean(values), rel=1e-9)
    flat, noise = (20 + level * torch.randn(1, 1, 24, 24, 24, generator=dice(k)) for k, level in enumerate((0.01, 1.0)))
    assert contrast.local_ncc(flat, noise) < 0.05 and contrast.local_ncc(flat, flat) < 1.0001      # far from 0


def torch_matrix(H, size):
    """H (b, 4, 4) of voxels x y z as F.affine_grid takes it, (b, 3, 4): of [-1, 1], axes z y x, written out."""
    swap, unit = torch.eye(4, dtype=torch.float64)[[2, 1, 0, 3]], torch.eye(4, dtype=torch.float64)
    size = torch.tensor(size).double()
    unit[:3, :3], unit[:3, 3] = torch.diag(2 / size), 1 / size - 1  # voxels -> [-1, 1]
    return (swap @ unit @ H @ torch.linalg.inv(unit) @ swap)[:, :3].float()


def test_positions_and_misplaced_know_the_true_move():
    """The matrix that torch wants of the true H, written out, undoes the move: V_ at these positions is V."""
    size, H = (32, 24, 40), torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)
    H[0, :3] = torch.tensor([[1.05, 0.1, 0, -2], [-0.1, 0.95, 0.05, 1], [0, 0, 1, 3.0]])
    matrix = torch_matrix(H, size)
    still = torch.zeros(2, 3, 16, 12, 20)
    smooth = sum(torch.meshgrid(*[torch.arange(n) * slope for n, slope in zip(size, (0.1, -0.2, 0.05))], indexing="ij"))
    smooth = smooth.expand(2, 1, *size)                             # a slope, which interpolation keeps as it is
    moved = data.warp(smooth, H, size)
    position = contrast.positions(matrix, still, size)
    back = F.grid_sample(moved, position, align_corners=False)
    inner = slice(6, -6), slice(6, -6), slice(6, -6)
    assert (back[:, 0][:, *inner] - smooth[:, 0][:, *inner]).abs().max() < 1e-3 < (moved - smooth)[0, 0][inner].abs().max()
    valid = torch.rand(2, 4 * 3 * 5, generator=dice()) < 0.5
    assert contrast.misplaced(position, H, valid, 8) < 1e-5
    identity = contrast.positions(torch.eye(3, 4).repeat(2, 1, 1), still, size)
    assert contrast.misplaced(identity, H, valid, 8).item() == pytest.approx(1, abs=1e-5)
    shift = contrast.positions(torch.eye(3, 4).repeat(1, 1, 1), still[:1] + torch.tensor([3.0, 2.0, 1.0])[None, :, None, None, None], size)
    H = data.translation(torch.tensor([[1.0, 2.0, 3.0]]))           # the field alone: voxels along z y x
    assert contrast.misplaced(shift, H, valid[:1], 8) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):                     # whose digits are half a voxel here
        torch.testing.assert_close(contrast.positions(matrix, still, size), position, atol=1e-5, rtol=0)


def test_gvsl_starts_without_a_move_and_its_loss_has_three_parts(batch):
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = contrast.GVSL(cfg).eval()
    with torch.no_grad():
        loss, measures = network(found, dice())
        damaged, _ = contrast.painted(found["V"], dice())
        out = network.network.out(contrast.decoded(network.network, network.encoder(damaged))[-1])
    assert measures["misplaced"].item() == pytest.approx(1, abs=1e-5)
    left = torch.eye(4) + (found["H"].float() - torch.eye(4)) / 3
    near = data.warp(found["V_"], left @ torch.linalg.inv(found["H"].float()), found["V"].shape[2:])
    ncc = contrast.local_ncc(near, found["V"])
    restored = F.mse_loss(out, found["V"])
    assert loss.item() == pytest.approx((1 - ncc + restored).item(), rel=1e-4)      # a field of zeros is smooth

    def sloped(x):                                                  # .03, .02, .01 voxels a voxel along x, y, z
        grids = torch.meshgrid(*[torch.arange(n) * 2.0 for n in x.shape[2:]], indexing="ij")
        return sum(slope * grid for slope, grid in zip((0.03, 0.02, 0.01), grids)).expand(len(x), 3, *x.shape[2:])
    network.field.forward = sloped
    with torch.no_grad():
        loss, measures = network(found, dice())
    rough = loss - (1 - measures["ncc"]) - restored
    assert rough.item() == pytest.approx((0.03 ** 2 + 0.02 ** 2 + 0.01 ** 2) / 3, rel=0.01)


def test_gvsl_has_a_third_of_the_move_left(batch, monkeypatch):
    """With its matrix V_ moved back lies on V; half of it leaves half."""
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = contrast.GVSL(cfg).eval()
    still, seen = torch.eye(4, dtype=torch.float64), []
    for share in (0.0, 0.5, 1.0):
        matrix = torch_matrix(still + share / 3 * (found["H"].double() - still), found["V"].shape[2:])
        monkeypatch.setattr(network, "matrix", lambda a, b: matrix)
        with torch.no_grad():
            seen.append(network(found, dice())[1])
    assert [m["misplaced"].item() for m in seen] == pytest.approx([1, 0.5, 0], abs=1e-4)
    assert seen[0]["ncc"] < seen[1]["ncc"] < seen[2]["ncc"]


def test_gvsl_answers_a_swapped_pair_with_the_move_reversed(batch):
    """So no answer fits all pairs, and a pair of equal maps has no move."""
    _, cfg, _ = batch
    torch.manual_seed(0)
    network = contrast.GVSL(cfg)
    network.affine.weight.data.normal_()
    a, b = (torch.randn(3, 16 * cfg.feature_size, 2, 2, 2, generator=dice(k)) for k in (0, 1))
    still = torch.eye(3, 4)
    with torch.no_grad():
        there, back, none = network.matrix(a, b) - still, network.matrix(b, a) - still, network.matrix(a, a) - still
    torch.testing.assert_close(there, -back, atol=1e-6, rtol=1e-4)
    assert none.abs().max() < 1e-6 < there.std(dim=0).min() and there.abs().max() < 0.75


def test_gvsl_learns_the_same_in_bfloat16(batch):
    """Its head convolves a map of 2 x 2 x 2, of which oneDNN's bfloat16 weight gradient is what lay in memory."""
    found, cfg, _ = batch
    torch.manual_seed(0)
    network = rivals.METHODS["gvsl"](cfg)
    network.affine.weight.data.normal_(std=0.1)                     # at 0 no gradient reaches the head
    heads = [p for p in network.whole.parameters() if p.ndim > 1]
    gradients = []
    for bf16 in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            network(found, dice())[0].backward()
        gradients.append([p.grad.clone() for p in heads])
    for exact, found in zip(*gradients):
        assert (found - exact).norm() < 0.5 * exact.norm()


# ------------------------------------------------------------------------------------------------------ S2DC on other maps

@pytest.fixture
def variant(batch):
    """method -> (network, batch, config), twice the same numbers."""
    found, cfg, _ = batch

    def made(method):
        own = dataclasses.replace(cfg, method=method, matching="dual_softmax")
        torch.manual_seed(0)
        return rivals.METHODS[method](own), found, own
    return made


def test_s2dc_as_a_rival_computes_what_pretraining_does(variant):
    """Loss and gradients of the encoder, of weights that both hold."""
    network, found, cfg = variant("s2dc")
    for side in (network.student, network.teacher):                 # not those of the first step, where they are 0 and 1
        side.standard.follow(torch.randn(5, 16 * cfg.feature_size))
    pair = []
    for side in (network.student, network.teacher):
        own = pretrain.Network(cfg)
        state = {name.replace("heads.0.", "token_head."): x for name, x in side.state_dict().items()}
        assert not (set(own.state_dict()) ^ set(state))
        own.load_state_dict(state)
        pair.append(own.train())
    student, teacher = pair
    keep = torch.ones(len(found["V"]), 1, dtype=torch.bool)
    tokens, embeddings, _ = student(found["V"], keep)
    with torch.no_grad():
        tokens_, keys, _ = teacher(found["V_"], keep, found["twin"])
        keys = F.normalize(keys, dim=-1)
    b = torch.arange(len(keep))
    negatives, allowed = pretrain.others_of_step(keys, found["subjects"], b, found["apart"])
    out = losses.s2dc_loss(tokens, tokens_, found["pairs"], embeddings[:, 0], keys[:, -1], negatives, allowed=allowed,
                           weights=cfg.weights, temperature=cfg.temperature, global_temperature=cfg.global_temperature,
                           form=cfg.structure, detach=cfg.structure_detach, valid=found["valid"], valid_=found["valid_"])
    out["loss"].backward()
    loss, measures = network(found, None)
    loss.backward()
    assert loss.item() == pytest.approx(out["loss"].item(), rel=1e-5)
    assert measures["global"].item() == pytest.approx(out["global"].item(), rel=1e-5)
    assert measures["accuracy_8"].item() == pytest.approx(out["accuracy"].item())
    for (name, ours), theirs in zip(network.encoder.named_parameters(), student.encoder.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5 * theirs.grad.abs().max().item()), name


def test_several_maps_share_the_token_losses_evenly(variant):
    """As the mean of what each map alone gives, without L_g; of the maps of one encoder."""
    network, found, cfg = variant("maps")
    network.cfg = dataclasses.replace(cfg, weights=(0.0, 1.0, 1.0))
    whole, measures = network(found, None)
    heads, alone = list(network.student.heads), []
    heads_ = list(network.teacher.heads)
    for k, patch in enumerate((8, 16, 32)):
        network.of_encoder = network.student.of_encoder = network.teacher.of_encoder = (patch,)
        network.student.heads, network.teacher.heads = torch.nn.ModuleList([heads[k]]), torch.nn.ModuleList([heads_[k]])
        alone.append(network(found, None)[0].item())
    assert whole.item() == pytest.approx(np.mean(alone), rel=1e-5) and max(alone) > 1.02 * min(alone)
    assert {"accuracy_8", "accuracy_16", "accuracy_32"} <= set(measures)


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_who_takes_part_on_a_coarser_and_on_a_finer_map(variant, patch):
    network, found, cfg = variant("maps")
    valid = torch.rand(2, 512, generator=dice()) < 0.02
    taking = network.taking_part(valid, patch).reshape(2, *[64 // patch] * 3)
    fine = valid.reshape(2, 8, 8, 8)
    for b, i, j, k in itertools.product(range(2), *[range(64 // patch)] * 3):
        low, high = (np.array([i, j, k]) * patch) // 8, -(-(np.array([i, j, k]) + 1) * patch // 8)
        box = fine[(b, *(slice(a, z) for a, z in zip(low, high)))]
        assert taking[b, i, j, k] == box.any()


def test_the_decoders_tokens_are_of_swin_unetrs_map(variant):
    """Of its own forward pass, which the volume's skip joins only later."""
    network, found, cfg = variant("decoder_4")
    whole, seen = network.swin_unetr, []
    hook = whole.ups[2].register_forward_hook(lambda _, __, x: seen.append(x))
    with torch.no_grad():
        whole(found["V"])
        hook.remove()
        tokens = network.student(found["V"])[0]
        expected = network.student.heads[1](seen[0].flatten(2).mT)
    assert torch.allclose(tokens[1], expected, atol=1e-5)


@pytest.mark.parametrize("keys", [dict(matching="sinkhorn"), dict(negatives="queue")])
def test_variants_refuse_what_they_do_not_read(place, keys):
    with pytest.raises(SystemExit, match="matches by 'dual_softmax' and has negatives of the 'step' alone, found"):
        rivals.check(config(place, "maps", **keys), 1)
    rivals.check(config(place, "simclr", **keys), 1)


def test_a_rival_reads_no_decoder(place):
    with pytest.raises(SystemExit, match="decoder = True: pretrain.py reads it"):
        rivals.check(config(place, "maps", decoder=True), 1)


def test_stage_2_starts_from_a_decoder_that_was_taught(place, capsys):
    """network.pt holds it, changed as far as the map of 4 voxels, and the encoder of encoder.pt."""
    rivals.main(argv(place, method="decoder_4", name="both", steps=2, keep=()))
    capsys.readouterr()
    network, encoder = SwinUNETR(1, 3, **SWIN), SwinUNETR(1, 3, **SWIN).encoder
    report = load_weights(network, place / "runs/both/network.pt")
    assert report["reasons"] == {} and set(report["initial"]) == {"skips", "ups", "out"}
    load_weights(encoder, place / "runs/both/encoder.pt")
    for ours, theirs in zip(network.encoder.parameters(), encoder.parameters()):
        assert torch.equal(ours, theirs)
    cfg = config(place, "decoder_4")
    torch.manual_seed(cfg.seed)
    fresh = rivals.METHODS["decoder_4"](cfg).swin_unetr.state_dict()
    saved = torch.load(place / "runs/both/network.pt", weights_only=True)["model"]
    assert all(torch.equal(network.state_dict()[name], x) and not torch.equal(x, fresh[name]) for name, x in saved.items())
    assert {"ups.2.mix.conv2.weight", "skips.2.conv1.weight", "bottom.conv1.weight"} <= set(saved)
    assert not [name for name in saved if name.startswith(("ups.3", "ups.4", "skips.0", "skips.1", "out"))]
