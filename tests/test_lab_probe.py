"""lab/probe.py against scikit-learn, closed forms and brute force, and the command."""
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import QUIET, SPHERES, encoder_file, nifti
from einops import rearrange
from scipy import ndimage

import configs
import data
import pretrain
from lab import probe


def rng(seed=0):
    return np.random.default_rng(seed)


# 4. probes


def blobs(shape, classes, seed):
    """Smooth random label map, so that surfaces and components look like organs and not like noise."""
    fields = np.stack([ndimage.gaussian_filter(rng(seed + i).normal(size=shape), 2) for i in range(classes)])
    fields[0] += np.abs(fields).max() * 0.3
    return fields.argmax(0)


def test_token_labels_by_brute_force():
    labels = blobs((12, 8, 10), 5, 2) * 7                                 # ids with gaps
    labels[:4, :4, :5], labels[0, 0, 0] = 0, 28                           # one voxel of 80: below the share
    ids, purity = probe.token_labels(labels, (4, 4, 5), share=0.1)
    token = 0
    for x, y, z in itertools.product(range(3), range(2), range(2)):       # x slowest
        patch = labels[4 * x:4 * x + 4, 4 * y:4 * y + 4, 5 * z:5 * z + 5].ravel().tolist()
        organs = sorted({v for v in patch if v}, key=lambda v: (-patch.count(v), v))
        expected = organs[0] if organs and patch.count(organs[0]) >= 8 else 0
        assert ids[token] == expected and purity[token] == patch.count(expected) / 80
        token += 1
    assert token == len(ids) and ids[0] == 0 and len(set(ids)) > 2
    tiny = np.zeros((8, 8, 8), int)
    tiny[:4, :5, :5] = 3                                                  # 100 of 512 voxels
    assert probe.token_labels(tiny, 8)[0].tolist() == [3]
    for share, label in ((0.2, 0), (100 / 512, 3)):                       # the share itself is enough
        assert probe.token_labels(tiny, 8, share=share)[0].tolist() == [label]
    for bad in (np.zeros((8, 8, 9), int), np.zeros((8, 8, 8))):
        with pytest.raises(ValueError, match="token_labels"):
            probe.token_labels(bad, 8)


def features(seed, centres, count):
    """Gaussian clouds, class i of count[i] tokens around centres[i]."""
    y = np.repeat(np.arange(len(count)) + 1, count)
    return centres[y - 1] + rng(seed).normal(size=(len(y), centres.shape[1])), y


def test_probes_read_separable_features_and_no_others():
    pytest.importorskip("sklearn")
    centres, count = rng(9).normal(size=(4, 16)) * 6, (300, 60, 30, 25)
    train, test = features(0, centres, count), features(1, centres, count)
    blind_train, blind_test = features(2, centres * 0, count), features(3, centres * 0, count)
    for score in (probe.linear_probe, probe.knn_probe):
        good, bad = score(*train, *test), score(*blind_train, *blind_test)
        assert good["balanced_accuracy"] > 0.97 and list(good["recall"]) == [1, 2, 3, 4]
        assert bad["balanced_accuracy"] < 0.4           # a quarter is chance, whatever the class sizes
        drawn = [score(*blind_train, *blind_test, seed=seed, limit=24) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]                           # the seed alone chooses the tokens
        fewer = score(train[0][train[1] != 4], train[1][train[1] != 4], *test)
        assert fewer["untrained"] == [4] and list(fewer["recall"]) == [1, 2, 3]
    scaled = [a * np.logspace(-4, 4, 16) + 1e3 for a in (train[0], test[0])]         # standardised away
    assert probe.linear_probe(scaled[0], train[1], scaled[1], test[1])["balanced_accuracy"] > 0.97
    lengths = rng(5).uniform(0.1, 9, (415, 1))          # cosine: length is nothing
    longer = probe.knn_probe(train[0] * lengths, train[1], *test)
    assert longer == probe.knn_probe(*train, *test)


def test_linear_probe_weighs_classes_alike():
    pytest.importorskip("sklearn")
    centres = np.array([[0.0, 0], [1.5, 0]])                              # overlapping, 40 to 1
    found = probe.linear_probe(*features(0, centres, (800, 20)), *features(1, centres, (800, 200)))
    assert abs(found["recall"][1] - found["recall"][2]) < 0.2 and found["recall"][2] > 0.6


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_silhouette_by_hand(metric):
    pytest.importorskip("sklearn")
    x, y = features(4, rng(8).normal(size=(3, 5)) * 2, (6, 5, 4))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T if metric == "cosine" else np.linalg.norm(x[:, None] - x[None], axis=-1)
    values = []
    for i in range(len(x)):
        own = distance[i, (y == y[i]) & (np.arange(len(x)) != i)].mean()
        other = min(distance[i, y == c].mean() for c in (1, 2, 3) if c != y[i])
        values.append((other - own) / max(own, other))
    mean, per_class = probe.silhouette(x, y, metric)
    np.testing.assert_allclose(mean, np.mean(values), rtol=1e-9)
    for c in (1, 2, 3):
        np.testing.assert_allclose(per_class[c], np.mean(np.array(values)[y == c]), rtol=1e-9)
    for bad in (dict(metric="manhattan"), dict(y=np.ones(15))):
        with pytest.raises(ValueError, match="silhouette"):
            probe.silhouette(**dict(x=x, y=y, metric=metric) | bad)


def test_effective_rank_in_closed_form():
    basis = np.linalg.qr(rng().normal(size=(50, 6)) - 0)[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0]                        # orthonormal columns of mean 0
    turn = np.linalg.qr(rng(1).normal(size=(6, 6)))[0]
    for values in ([1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [8, 4, 2, 1, 1, 0]):
        share = np.array([v for v in values if v]) / sum(values)
        found = probe.effective_rank(basis * values @ turn.T + 7.0)          # an offset is centred away
        np.testing.assert_allclose(found, np.exp(-(share * np.log(share)).sum()), rtol=1e-6)
    assert probe.effective_rank(np.ones((9, 4)) * 3.3) == 0


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match="scikit-learn is not installed.*pip install"):
        probe.silhouette(np.eye(4), [0, 0, 1, 1])


@pytest.mark.parametrize("size, crop, overlap, patch", [
    ((96, 64, 70), 64, 0.5, 8), ((130, 64, 64), 64, 0.25, 16), ((64, 64, 64), 64, 0.5, 8)])
def test_overlapping_crops_give_the_most_central_token(size, crop, overlap, patch):
    def encoder(x):                 # tells every token which crop it comes from and where it lies in it
        grid = torch.meshgrid(*[torch.arange(s // patch).float() for s in x.shape[2:]], indexing="ij")
        at = x[0, :, patch // 2::patch, patch // 2::patch, patch // 2::patch]
        return [None] * (int(np.log2(patch)) - 1) + [torch.cat([torch.stack(grid), at])[None]]
    volume = torch.stack(torch.meshgrid(*[torch.arange(s).float() for s in size], indexing="ij"))
    found = probe.encode(encoder, volume, (crop,) * 3, patch, "cpu", overlap)
    assert tuple(found.shape[1:]) == tuple(s // patch for s in size)
    for axis, s in enumerate(size):
        padded, n = max(crop, -(-s // 32) * 32), crop // patch
        step = int(crop * (1 - overlap)) // patch * patch
        starts = sorted({*range(0, padded - crop + 1, step), padded - crop})
        for t in range(s // patch):
            depths = [min(t - a // patch, n - 1 - (t - a // patch)) for a in starts]
            index = found[axis].select(axis, t).unique()
            assert len(index) == 1 and min(index.item(), n - 1 - index.item()) == max(depths)
        place = rearrange(found[3 + axis], ("x y z -> x (y z)", "x y z -> y (x z)", "x y z -> z (x y)")[axis])
        assert (place == torch.arange(s // patch)[:, None] * patch + patch // 2).all()     # and it shows its own voxels


# the command


def cosine(a, b):
    return np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))


def organ_tokens(encoder, scan):
    """[(features, organ)], patch by patch."""
    volume, label = scan.open()[0].astype(np.float32), scan.open("label")[0]
    volume = np.pad(volume, [(0, 64 - s) for s in scan.shape], constant_values=volume.min())
    maps, tokens = encoder(torch.from_numpy(volume)[None, None])[2][0].double().numpy(), []
    for i, j, k in itertools.product(*[range(s // 8) for s in scan.shape]):
        patch = label[8 * i:8 * i + 8, 8 * j:8 * j + 8, 8 * k:8 * k + 8]
        share = [(patch == organ).mean() for organ in (1, 2, 3)]
        if max(share) >= 0.3:
            tokens.append((maps[:, i, j, k], 1 + int(np.argmax(share))))
    return tokens


@torch.no_grad()
def test_command_scores_the_second_scan_by_the_first(spheres, tmp_path, capsys):
    """Neighbours, found patches and the table, with loops over the tokens of the encoder's own maps."""
    sklearn = pytest.importorskip("sklearn")
    pytest.importorskip("sklearn.linear_model")
    file = str(tmp_path / "encoder.pt")
    torch.manual_seed(2)
    encoder = encoder_file(tmp_path / "encoder.pt", **SPHERES).eval()
    argv = [str(spheres / "x.py"), "--slab=(64, 64, 64)", "--probe_limit=5000", "--token_patch=32"]    # the losses' own
    probe.main([*argv, f"--checkpoint={file}", f"--out={tmp_path}"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = json.loads((tmp_path / "probe.json").read_text())["probe"]
    assert list(found) == ["random", file]                                # random weights first
    number, cfg = found[file], configs.load(probe.Config, argv)
    scans = probe.probe_scans(cfg)
    assert [scan.id for scan in scans] == ["0", "1"]
    train, test = (organ_tokens(encoder, scan) for scan in scans)
    right = {1: [], 2: [], 3: []}
    for x, organ in test:
        near = sorted(train, key=lambda other: -cosine(x, other[0]))[:20]
        votes = [sum(other == k for _, other in near) for k in (1, 2, 3)]
        right[organ].append(1 + int(np.argmax(votes)) == organ)
    assert number["tokens"] == [len(train), len(test)] and number["linear"]["untrained"] == []
    expected = np.mean([np.mean(each) for each in right.values()])
    assert number["knn"]["balanced_accuracy"] == pytest.approx(expected, abs=0.01)
    (x, y), (x_, y_) = ([np.array(each) for each in zip(*part)] for part in (train, test))
    linear = sklearn.linear_model.LogisticRegression(class_weight="balanced", max_iter=2000)
    guesses = linear.fit((x - x.mean(0)) / x.std(0), y).predict((x_ - x.mean(0)) / x.std(0))
    expected = np.mean([np.mean(guesses[y_ == k] == k) for k in (1, 2, 3)])
    assert number["linear"]["balanced_accuracy"] == pytest.approx(expected, abs=0.01)
    for metric in ("cosine", "euclidean"):
        expected = sklearn.metrics.silhouette_score(x_, y_, metric=metric)
        assert number[f"silhouette_{metric}"][0] == pytest.approx(expected, abs=1e-3)
    strength = np.linalg.svd(x_ - x_.mean(0), compute_uv=False)
    strength = strength[strength > 1e-9 * strength[0]] / strength.sum()
    assert number["effective_rank"] == pytest.approx(np.exp(-(strength * np.log(strength)).sum()), rel=1e-3)
    assert number["organs"] == {str(k): [sum(y == k), sum(y_ == k)] for k in (1, 2, 3)}
    slabs = data.Slabs(scans[1:], dataclasses.replace(cfg, token_patch=8), 1, cfg.seed)
    batch = data.collate([slabs.sample(scans[1], np.random.default_rng((cfg.seed, 0)))])
    V, V_, _ = data.views(batch, cfg)
    q, k = (rearrange(encoder(view)[2][0], "c x y z -> (x y z) c").numpy() for view in (V, V_))
    valid, valid_ = batch["valid"][0].numpy(), batch["valid_"][0].numpy()
    M = data.correspondence(batch["H"][0], (8, 8, 8), 8).numpy() & valid[:, None] & valid_
    sim = np.array([[cosine(a, b) for b in k] for a in q])
    nearest = np.where(valid_, sim, -2).argmax(1)
    expected = sum(M[i, nearest[i]] for i in range(len(M))) / M.sum()
    assert number["correspondence"] == pytest.approx(expected, abs=0.005)
    few = probe.correspondence_accuracy(encoder, scans[1:], dataclasses.replace(cfg, probe_patch=8), "cpu", rows=7)
    assert few == number["correspondence"]              # not all rows at once
    blank = rearrange(encoder(torch.zeros(1, 1, 64, 64, 64))[2][0], "c x y z -> (x y z) c").numpy()
    sim = np.where(valid_, [[cosine(a, b) for b in blank] for a in blank], -2)
    found = [M[i, j] for i, j in enumerate(sim.argmax(1)) if M[i].any()]
    assert number["correspondence_of_blanks"] == pytest.approx(sum(found) / M.sum(), abs=0.02)     # near ties
    row, crops = (columns for columns in table if columns and columns[0] == file)
    linear, near = (number[kind]["balanced_accuracy"] for kind in ("linear", "knn"))
    scores = linear, near, number["correspondence"], number["correspondence_of_blanks"]
    assert row[1:3] + row[6:] == [f"{score:.3f}" for score in scores]
    assert crops[1:] == ["pooled", "features", f"{number['crops']['top1']:.3f}", "(0.016)", "-", "-",    # one scan, one place
                         f"{number['crops']['nce']:.2f}", "(4.16)"]


def test_organs_of_few_tokens_are_left_out_on_both_sides():
    x = lambda y: np.arange(len(y), dtype=float)[:, None]
    train, test = np.repeat([1, 2, 3, 4], [30, 5, 4, 20]), np.repeat([1, 2, 4, 5], [6, 9, 5, 40])
    cfg = probe.Config(probe_least=5, labels={1: "liver", 2: "spleen"})
    sets, counts = probe.enough(x(train), train, x(test), test, cfg)
    for values, ids, all_ids in ((sets[0], sets[1], train), (sets[2], sets[3], test)):
        assert set(ids) == {1, 2, 4} and (all_ids[values[:, 0].astype(int)] == ids).all()
    assert len(sets[1]) == 55 and len(sets[3]) == 20
    assert counts == {1: [30, 6], 2: [5, 9], 3: [4, 0], 4: [20, 5], 5: [0, 40]}
    assert "3 organs by their tokens of 8 voxels (train/test): liver 30/6, spleen 5/9, 4 20/5; too few of 3 4/0, 5 0/40" in (
        probe.told(counts, cfg))
    with pytest.raises(SystemExit, match="two organs with 21 tokens each .*1: 30 and 6, 2: 5 and 9"):
        probe.enough(x(train), train, x(test), test, dataclasses.replace(cfg, probe_least=21))


def test_neighbours_of_a_perfect_encoder_are_all_right():
    """Even of the smallest class that is let in: k neighbours are of its own."""
    pytest.importorskip("sklearn")
    k = probe.Config().probe_least
    y = np.repeat([1, 2, 3], [900, 300, k])
    assert probe.knn_probe(np.eye(3)[y - 1], y, np.eye(3)[y - 1], y)["balanced_accuracy"] == 1
    fewer = np.repeat([1, 2, 3], [900, 300, 5])                     # .. and those of fewer cannot win the vote
    assert probe.knn_probe(np.eye(3)[fewer - 1] + 0.01, fewer, np.eye(3)[y - 1], y)["balanced_accuracy"] < 0.7


def test_nobody_trains_and_tests():
    scans = [type("scan", (), dict(subject=who, id=n)) for n, who in enumerate("abcabcab")]
    for share, first in ((0.5, "ab"), (0.01, "a"), (0.99, "ab")):
        train, test = probe.parts_of(scans, probe.Config(probe_train=share))
        assert {s.subject for s in train} == set(first) and {s.subject for s in test} == set("abc") - set(first)
        assert len(train) + len(test) == 8
    with pytest.raises(SystemExit, match="on other subjects, found 1"):
        probe.parts_of(scans[:1], probe.Config())


@pytest.mark.parametrize("keys, text", [
    (dict(probe_patch=6), "probe_patch = 6"), (dict(probe_patch=64), "probe_patch = 64"),
    (dict(probe_crop=(60, 60, 60)), "multiples of 32"), (dict(crop=(84, 96, 96)), "multiples of 32"),
    (dict(probe_share=1.5), "probe_share = 1.5"), (dict(probe_draws=0), "probe_draws = 0"), (dict(probe_train=1.0), "probe_train = 1.0")])
def test_keys_that_would_give_another_number_are_refused(keys, text):
    with pytest.raises(SystemExit) as caught:
        probe.check(probe.Config(**keys))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_crops_are_recognised_among_the_twins_of_one_teacher(spheres, tmp_path):
    """Student and teacher of a last.pt, by hand."""
    argv = [str(spheres / "x.py"), "--slab=(64, 64, 64)", "--hidden=16", "--embedding=8", "--seed=1", f"--cache={tmp_path}"]
    cfg = configs.load(probe.Config, argv)
    scans, device = probe.probe_scans(cfg), torch.device("cpu")
    torch.manual_seed(0)
    student, teacher = pretrain.Network(cfg), pretrain.Network(cfg)
    queue = pretrain.Queue(2, cfg.embedding, "cpu")
    optimizer = torch.optim.AdamW(student.parameters())
    pretrain.save_state(tmp_path / "last.pt", student, teacher, optimizer, queue, cfg, 1)
    asked = dataclasses.replace(cfg, hidden=24, embedding=12, matching="sinkhorn")     # the file knows better
    found = probe.crop_recognition(*probe.load_heads(tmp_path / "last.pt", asked, device), scans, cfg, device, crops=6)
    slabs, queries, keys = data.Slabs(scans, cfg, 1, 1), [], []
    with torch.no_grad():
        for n in range(6):
            batch = data.collate([slabs.sample(scans[n % len(scans)], np.random.default_rng((1, 3, n)))])
            V, _, twin = data.views(batch, cfg)
            x, y, z = batch["crop"][0].tolist()
            crop = V[:, :, x:x + cfg.crop[0], y:y + cfg.crop[1], z:z + cfg.crop[2]]
            for network, volume, rows in ((student, crop, queries), (teacher, twin, keys)):
                pooled = network.encoder(volume)[-1].mean((2, 3, 4))
                rows.append(network.global_head(network.standard(pooled))[0].numpy())
    sim = np.array([[cosine(q, k) for k in keys] for q in queries])
    assert found["top1"] == pytest.approx(np.mean(sim.argmax(1) == np.arange(6))) and found["top1_chance"] == pytest.approx(1 / 6)
    terms = [np.log(np.exp(row / cfg.global_temperature).sum()) - row[n] / cfg.global_temperature for n, row in enumerate(sim)]
    assert found["nce"] == pytest.approx(np.mean(terms), abs=1e-4)
    assert probe.load_heads("random", cfg, device) is None
    for other in (dict(crop=(96, 64, 64)), dict(global_temperature=0.5)):
        with pytest.raises(SystemExit, match=f"last.pt: L_g learned with {[*other][0]} = .*, found "):
            probe.load_heads(tmp_path / "last.pt", dataclasses.replace(cfg, **other), device)
    twice = probe.crop_recognition(*probe.load_heads(tmp_path / "last.pt", asked, device), scans,
                                   dataclasses.replace(cfg, probe_draws=2), device, crops=3)
    parts = [sim[:3, :3], sim[3:, 3:]]                      # the same six crops, three and three
    assert twice["top1"] == pytest.approx(np.mean([part.argmax(1) == np.arange(3) for part in parts]))
    terms = [np.log(np.exp(part / cfg.global_temperature).sum(1)) - part.diagonal() / cfg.global_temperature for part in parts]
    assert twice["nce"] == pytest.approx(np.mean(terms), abs=1e-4) and twice["top1_chance"] == pytest.approx(1 / 3)


@torch.no_grad()
def test_channels_are_padded_as_in_training_each_with_its_own_least():
    volume = torch.stack([torch.full((40, 64, 64), -3.0), torch.rand(40, 64, 64)])
    seen = []

    def encoder(x):
        seen.append(x)
        return [None, None, torch.zeros(1, 1, *[s // 8 for s in x.shape[2:]])]
    probe.encode(encoder, volume, (64,) * 3, 8, "cpu")
    (x,), least = seen, volume[1].min()
    assert (x[0, 0] == -3).all() and (x[0, 1, 40:] == least).all() and torch.allclose(x[0, :, :40], volume, atol=1e-6)


def test_crops_are_told_from_other_subjects_and_from_their_own_scan(tmp_path):
    """Three scans of two people. Who tells scans apart, and nothing within them, is right of all crops but those of
    its scan; who tells places is right within a scan. Scans and places are read back from the crops' voxels."""
    x, y, z = np.indices((128, 66, 64))
    for n in range(3):
        nifti(tmp_path / f"{'aab'[n]}_{n}.nii.gz", 300 * n + x + 1)
    cfg = configs.load(probe.Config, [])
    cfg = dataclasses.replace(cfg, **SPHERES, **QUIET, data=str(tmp_path), cache=str(tmp_path / "cache"), workers=0, seed=2,
                              image="{subject}_{id}.nii.gz", spacing=None, window=(0.0, 1000.0), foreground=0.0, tokens="inside",
                              crop=(64, 64, 64), slab=(64, 64, 64), rotation=(0, 0, 0), scale=(1, 1), shift=(0, 0, 0),
                              twin_rotation=(0, 0, 0), twin_scale=(1, 1), twin_shift=(0, 0, 0), flip=(0, 0, 0), probe_draws=2)
    scans, device, seen = data.open_scans(cfg, say=lambda *_: None), torch.device("cpu"), []
    assert [scan.subject for scan in scans] == ["a", "a", "b"]

    def of_scan(crop, near=0.0):
        value = crop.mean().item() * 1000 - 32.5                # 300 n + the crop's first x
        n, place = int(value // 300), value % 300
        seen.append((n, place))
        angle = near * place / 128
        embedding = torch.zeros(1, 6)
        embedding[0, 2 * n], embedding[0, 2 * n + 1] = np.cos(angle), np.sin(angle)
        return embedding
    crops = 10
    blind = probe.crop_recognition(of_scan, of_scan, scans, cfg, device, crops=crops)
    queries = seen[::2]
    assert [n for n, _ in queries] == [i % 3 for i in range(2 * crops)]
    sharp = probe.crop_recognition(lambda v: of_scan(v, 1.0), lambda v: of_scan(v, 1.0), scans, cfg, device, crops=crops)
    number, alone = dict(all=[], others=[], within=[]), []
    for i, (n, place) in enumerate(queries):
        mates = [q for k, q in enumerate(queries) if k // crops == i // crops and k != i]
        number["all"].append(len(mates))
        alone.append((n, round(place)) not in {(m, round(at)) for m, at in mates})
        number["others"].append(sum("aab"[m] != "aab"[n] for m, _ in mates))
        number["within"].append(sum(m == n and abs(at - place) > 15.5 for m, at in mates))
    assert 0 < sum(number["within"]) < sum(number["others"]) and 0 in number["within"] and max(number["within"]) > 1
    for found, right in ((blind, (0, 1, 0)), (sharp, (np.mean(alone), 1, 1))):
        for (kind, many), top in zip(number.items(), right):
            have, many = found if kind == "all" else found[kind], np.array([m for m in many if m])
            assert have["top1"] == pytest.approx(top) and have["top1_chance"] == pytest.approx(np.mean(1 / (1 + many)))
            assert have["nce_chance"] == pytest.approx(np.mean(np.log(1 + many)))
            assert kind == "all" or have["queries"] == len(many)
    words = probe.recognised(sharp)
    assert words[0] == f"{np.mean(alone):.3f} (0.100)" and words[2].startswith("1.000 (0.") and probe.recognised(dict(sharp, within=None))[2] == "-"
