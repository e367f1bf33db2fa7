"""The figures of evaluate.py: the numbers behind them against numpy loops, closed forms, SVD and scikit-learn, and the pictures."""
import dataclasses
import itertools
import json
import re
import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from einops import rearrange

import configs
import data
import evaluate
from lab import figures, probe
from model import Swin3D
from run import save

pytest.importorskip("matplotlib")


SMALL = dict(feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2)


SHAPE, SPACING, P = (64, 60, 56), (2.0, 2.5, 3.0), 8                      # 60 voxels: half a patch is left over


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scans with three organs each, two kept checkpoints and a log, and a config that finds them."""
    folder = tmp_path_factory.mktemp("figures")
    for n in range(2):
        rng = np.random.default_rng(n)
        x, y, z = np.indices(SHAPE)
        label = np.zeros(SHAPE, np.uint8)
        for k, (a, b, c, r) in enumerate(((20, 30, 28, 14), (44, 20, 20, 11), (42, 42, 40, 12)), 1):
            label[(x - a - n) ** 2 + (y - b) ** 2 + (z - c) ** 2 < r ** 2] = k
        body = (x - 32) ** 2 / 30 ** 2 + (y - 30) ** 2 / 29 ** 2 < 1
        image = np.where(body, 60.0 * label, -1000) + rng.normal(0, 15, SHAPE)
        affine = np.diag([*SPACING, 1.0])
        affine[:3, 3] = -50, -40, 100
        turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("LPS"))
        for kind, array in (("image", image.astype(np.int16)), ("label", label)):
            turned = nib.orientations.apply_orientation(array, turn)      # stored LPS: mm must not depend on it
            nib.save(nib.Nifti1Image(turned, affine @ nib.orientations.inv_ornt_aff(turn, SHAPE)), folder / f"{kind}{n}.nii.gz")
    (folder / "runs/tiny").mkdir(parents=True)
    for name, seed, step in (("encoder-5", 1, 5), ("encoder-10", 2, 10), ("encoder", 2, 10)):
        torch.manual_seed(seed)
        encoder = Swin3D(1, **SMALL)
        save(folder / f"runs/tiny/{name}.pt", dict(format="s2dc/encoder", encoder=encoder.state_dict(), arguments=encoder.arguments, step=step))
    lines = [dict(torch="x", resumed=0)] + [dict(step=s, loss=9 / s, p2p=5 / s, p2s=3 / s, accuracy=s / 50, spread=0.9, lr=1e-3, **{"global": 1 / s})
                                            for s in (5, 10, 15)]
    (folder / "runs/tiny/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo')
    (folder / "x.py").write_text(f"name, runs, cache, data = 'tiny', '{folder}/runs', '{folder}/cache', '{folder}'\n"
                                 f"image, label, crop, workers = 'image{{id}}.nii.gz', 'label{{id}}.nii.gz', (64, 64, 64), 1\n"
                                 f"crop_foreground, rotation, shift, probe_share = False, (8.0, 8.0, 20.0), (6.0, 6.0, 4.0), 0.3\n"
                                 + "".join(f"jitter_{kind} = (0.0, 0.1)\n" for kind in ("shift", "scale", "gamma", "noise", "blur"))
                                 + "\n".join(f"{k} = {v!r}" for k, v in SMALL.items()))
    return folder


def load(folder, *argv):
    return configs.load(figures.Config, [str(folder / "x.py"), *argv])


def draw(folder, names, *argv, out="other"):
    """What one call of the command wrote: JSON file -> content."""
    figures.main([str(folder / "x.py"), f"--figures={names}", f"--out={folder}/{out}", *argv])
    return lambda name: json.loads((folder / f"{out}/figures/{name}.json").read_text())


@pytest.fixture(scope="module")
def drawn(folder):
    checkpoints = ("random", f"{folder}/runs/tiny/encoder.pt")
    return checkpoints, draw(folder, "all", f"--checkpoint={checkpoints}", "--figure_tokens=40", out="all")


@pytest.fixture(scope="module")
def shown(folder):
    return figures.Shown(load(folder, f"--checkpoint=('random', '{folder}/runs/tiny/encoder.pt')"), torch.device("cpu"))


def flat(tokens):
    return tokens.reshape(len(tokens), -1).T.double().numpy()             # (t, c)


def cosine(a, b):
    return np.array([[float(np.dot(p, q) / np.sqrt(np.dot(p, p) * np.dot(q, q))) for q in b] for p in a])


def tissue(shown):
    """(t,) bool: patches brighter than the scan."""
    V = shown.pair["V"][0].numpy()
    return rearrange(V[:, :56], "(i p) (j q) (k r) -> (i j k) (p q r)", p=P, q=P, r=P).mean(1) > V.mean()


def test_all_figures_are_pictures_of_readme_size(folder, drawn):
    image = pytest.importorskip("matplotlib.image")
    expected = {"distribution", "distribution_map", "tsne", "pca", "correspondence", "curves"}
    expected |= {f"{kind}_organ_{k}" for kind in ("similarity", "evolution") for k in (1, 2, 3)}
    files = {path.stem: path for path in (folder / "all/figures").glob("*.png")}
    assert set(files) == expected
    for path in files.values():
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 1350 and 700 < height < 2600                      # 9 inches at 150 dots
        pixels = image.imread(path)[..., :3]
        assert pixels.std() > 0.05 and len(np.unique((pixels * 255).astype(int).reshape(-1, 3) @ (1, 256, 65536))) > 50


def test_similarity_is_the_cosine_of_every_pair(drawn, shown):
    checkpoints, read = drawn
    content = read("similarity")
    assert content["grid"] == [8, 7, 7] and [q["name"] for q in content["queries"]] == ["organ 1", "organ 2", "organ 3"]
    for query, f in itertools.product(content["queries"], checkpoints):
        x, cell = shown.tokens(f), tuple(query["token"])
        expected = cosine([x[(slice(None), *cell)].numpy()], flat(x)).reshape(content["grid"])
        np.testing.assert_allclose(query["maps"][f], expected, atol=2e-5)
        assert np.array(query["maps"][f])[cell] == pytest.approx(1, abs=1e-5)


def test_a_query_per_organ_lies_in_its_purest_patch(drawn, folder):
    label = nib.as_closest_canonical(nib.load(folder / "label0.nii.gz")).get_fdata()[:, :56].astype(int)
    share = [(label.reshape(8, 8, 7, 8, 7, 8) == k).mean((1, 3, 5)) for k in (1, 2, 3)]
    for query, mine in zip(drawn[1]("similarity")["queries"], share):
        assert mine[tuple(query["token"])] == mine.max()
        np.testing.assert_allclose(query["mm"], np.array(query["voxel"]) * SPACING + (-50, -40, 100))


def test_a_purer_patch_goes_before_one_nearer_to_the_middle(folder):
    shown = figures.Shown(load(folder), torch.device("cpu"))
    ids, purity = np.zeros((8, 7, 7), int), np.zeros((8, 7, 7))
    ids[1:6, 3, 3], purity[1:6, 3, 3] = 1, (0.9, 0.4, 0.6, 0.9, 0.5)      # its middle is cell 3
    shown.organs = ids.ravel(), purity.ravel()
    (name, organ, point), = shown.queries
    assert (name, organ) == ("organ 1", 1) and point.tolist() == [4 * P + 3.5, 3 * P + 3.5, 3 * P + 3.5]


def test_a_patch_reaches_half_a_voxel_beyond_its_voxels(shown):
    assert shown.cell((7.4, 7.6, -0.4)) == (0, 1, 0) and shown.cell((63.4, 55.4, 55.4)) == (7, 6, 6)
    for outside in ((63.6, 0, 0), (0, 55.6, 0), (0, 0, -0.6)):
        with pytest.raises(SystemExit, match="lies in no patch"):
            shown.cell(outside)


def test_query_in_mm_is_the_query_in_voxels(folder):
    by_voxel = draw(folder, "similarity", "--query=(41, 13.4, 20)")("similarity")["queries"][0]
    by_mm = draw(folder, "similarity", "--query_mm=(32, -6.5, 160)")("similarity")["queries"][0]
    assert by_voxel["token"] == by_mm["token"] == [5, 1, 2]
    np.testing.assert_allclose(by_mm["voxel"], (41, 13.4, 20), atol=1e-6)


def test_distribution_is_the_sharpe_ratio_in_closed_form(drawn, shown, folder):
    checkpoints, read = drawn
    content, usable = read("distribution"), shown.pair["valid_"].numpy()
    for f in checkpoints:
        sim = cosine(flat(shown.tokens(f)), flat(shown.tokens(f, True))[usable])
        expected = (sim.max(1) - sim.mean(1)) / np.sqrt((sim ** 2).mean(1) - sim.mean(1) ** 2)
        np.testing.assert_allclose(np.ravel(content["sharpe_ratio"][f]), expected, rtol=1e-3)
    last, organ = np.ravel(content["sharpe_ratio"][checkpoints[1]]), (shown.organs[0] > 0) & tissue(shown)
    M = data.correspondence(torch.tensor(content["H"]), shown.grid, P).numpy() & usable
    matched = M.any(1)
    tokens = {n["which"]: n["token"] for n in content["chosen"]}
    assert last[tokens["highest ratio"]] == last[organ & matched].max() and last[tokens["lowest ratio"]] == last[organ & matched].min()
    for number in content["chosen"]:
        sim = cosine(flat(shown.tokens(number["encoder"]))[[number["token"]]], flat(shown.tokens(number["encoder"], True)))[0]
        np.testing.assert_allclose(number["similarities"], sim[usable], atol=2e-5)
        np.testing.assert_allclose(np.sort(number["true_partners"]), np.sort(sim[M[number["token"]]]), atol=2e-5)
    t = next(t for t in np.flatnonzero(matched) if M[:, t].any() and not (M[t] & M[:, t]).any())      # goes to others than come to it
    args = f"--checkpoint={checkpoints[1]}", f"--query={tuple(shown.centres[t].tolist())}"
    number, = draw(folder, "distribution", *args, out="asked")("distribution")["chosen"]
    sim = cosine(flat(shown.tokens(checkpoints[1]))[[t]], flat(shown.tokens(checkpoints[1], True)))[0]
    assert number["token"] == t
    np.testing.assert_allclose(np.sort(number["true_partners"]), np.sort(sim[M[t]]), atol=2e-5)


def test_distribution_of_a_label_that_holds_air_shows_tissue(folder, tmp_path):
    shown = figures.Shown(load(folder), torch.device("cpu"))
    figures.draw_distribution(shown, tmp_path)
    (ratio,) = json.loads((tmp_path / "distribution.json").read_text())["sharpe_ratio"].values()
    ratio, matched = np.ravel(ratio), np.isin(np.arange(8 * 7 * 7), shown.pair["matches"][:, 0])
    air = ~tissue(shown) & matched
    inside = tissue(shown) & matched & (ratio > ratio[air].min()) & (ratio < ratio[air].max())
    assert len(np.unique(ratio[inside])) > 9
    shown.organs = (air | inside).astype(int), np.ones(8 * 7 * 7)         # both extremes of this label lie in air
    figures.draw_distribution(shown, tmp_path)
    chosen = json.loads((tmp_path / "distribution.json").read_text())["chosen"]
    assert [ratio[n["token"]] for n in chosen] == [ratio[inside].max(), ratio[inside].min()]


def test_tsne_silhouettes_equal_scikit_learn(drawn, folder, shown):
    witness = pytest.importorskip("sklearn.metrics")
    checkpoints, read = drawn
    scans = probe.probe_scans(shown.cfg)
    for f in checkpoints:
        number = read("tsne")["encoders"][f]
        x, y, _ = probe.organ_tokens(shown.encoder(f), scans, shown.cfg, "cpu", 0.5)
        for metric in ("euclidean", "cosine"):
            assert number["silhouette"][metric]["mean"] == pytest.approx(witness.silhouette_score(x, y, metric=metric), abs=1e-5)
            each = witness.silhouette_samples(x, y, metric=metric)
            assert number["silhouette"][metric]["organs"]["2"] == pytest.approx(each[y == 2].mean(), abs=1e-5)
        assert number["tokens"] == {str(k): int((y == k).sum()) for k in (1, 2, 3)}
        assert len(number["points"]) == len(number["organ"]) == sum(min(40, n) for n in number["tokens"].values())


def test_pca_equals_the_singular_value_decomposition(drawn, shown):
    for f in drawn[0]:
        number, x = drawn[1]("pca")["encoders"][f], flat(shown.tokens(f))
        u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
        found = np.reshape(number["components"], (-1, 3))
        sign = np.sign((found * u[:, :3]).sum(0))
        np.testing.assert_allclose(found, sign * u[:, :3] * s[:3], atol=1e-3 * s[0])
        np.testing.assert_allclose(number["share_of_variance"], s[:3] ** 2 / (s ** 2).sum(), rtol=1e-4)
        weights = (x - x.mean(0)).T @ found                               # (c, 3) a multiple each: the sign rule
        assert (weights[np.abs(weights).argmax(0), range(3)] > 0).all()


def test_correspondence_lines_are_the_matches_of_h(drawn, shown):
    content, pair = drawn[1]("correspondence"), shown.pair
    M = data.correspondence(torch.tensor(content["H"]), shown.grid, P).numpy()
    home = np.linalg.inv(content["H"]) @ np.vstack([shown.centres.T, np.ones(len(M))])
    inside = ((home[:3].T >= -0.5) & (home[:3].T <= np.array(SHAPE) - 0.5)).all(1)
    M &= inside[None]
    assert 5 <= len(content["i"]) <= 10 and M[content["i"], content["true"]].all()
    assert len(set(np.unravel_index(content["i"], shown.grid)[2])) == 1   # one layer of V
    for f in drawn[0]:
        sim = np.where(inside, cosine(flat(shown.tokens(f)), flat(shown.tokens(f, True))), -2)
        right = M[np.arange(len(M)), sim.argmax(1)]
        number = content["encoders"][f]
        assert (number["right"], number["matched"]) == (right.sum(), M.any(1).sum())
        assert number["predicted"] == sim.argmax(1)[content["i"]].tolist()
    V = torch.from_numpy(shown.scan.open().astype(np.float32))
    V_ = data.warp(V[None], torch.tensor(content["H"])[None], SHAPE, fill=torch.from_numpy(shown.scan.fill)[None])[0]
    torch.testing.assert_close(pair["V"], V)
    torch.testing.assert_close(pair["V'"], V_, rtol=0, atol=1e-4)         # V' is V moved by the H that the file states
    f = drawn[0][1]
    for volume, moved in ((V, False), (V_, True)):
        torch.testing.assert_close(shown.tokens(f, moved), probe.encode(shown.encoder(f), volume, (64,) * 3, P, "cpu", 0.5), rtol=0, atol=5e-3)


def test_lines_start_in_tissue_and_are_dashed_where_wrong(drawn, shown, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = []
    monkeypatch.setattr(figures, "draw_lines", lambda figure, both, shown, *row: rows.append(row))
    figures.draw_correspondence(shown, tmp_path)
    content = json.loads((tmp_path / "correspondence.json").read_text())
    M, i = data.correspondence(torch.tensor(content["H"]), shown.grid, P).numpy(), np.array(content["i"])
    V = shown.pair["V"][0].numpy()
    shown_by = [V[a * P:a * P + P, b * P:b * P + P, c * P:c * P + P].mean() for a, b, c in np.stack(np.unravel_index(i, shown.grid), 1)]
    assert min(shown_by) > V.mean()
    for row, found in zip(rows, [content["true"], *[content["encoders"][f]["predicted"] for f in drawn[0]]], strict=True):
        start, end, true, right = row
        assert np.array_equal(start, shown.centres[i]) and np.array_equal(end, shown.centres[found])
        assert np.array_equal(true, shown.centres[content["true"]])
        assert right is None if row is rows[0] else right == M[i, found].tolist()
    assert {fine for row in rows[1:] for fine in row[3]} == {True, False}


def test_no_patch_outside_the_scan_is_called_most_similar(folder):
    far = ("--checkpoint=random", "--rotation=(0, 0, 40)", "--shift=(20, 20, 12)")
    content, shown = draw(folder, "correspondence", *far)("correspondence"), figures.Shown(load(folder, *far), "cpu")
    M = data.correspondence(torch.tensor(content["H"]), shown.grid, P).numpy() & shown.pair["valid_"].numpy()
    sim = cosine(flat(shown.tokens("random")), flat(shown.tokens("random", True)))
    rows, masked = np.flatnonzero(M.any(1)), np.where(shown.pair["valid_"].numpy(), sim, -2)
    assert not M[rows, sim.argmax(1)[rows]].sum() == M[rows, masked.argmax(1)[rows]].sum()     # some are nearer to padding
    assert content["encoders"]["random"]["right"] == M[rows, masked.argmax(1)[rows]].sum()
    assert content["encoders"]["random"]["predicted"] == masked.argmax(1)[content["i"]].tolist()


def test_lines_join_the_centres_of_patches(shown):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    both = figure.subplots(1, 2)
    (a, b, c), H = shown.centres[[10, 100, 120]], shown.pair["H"]
    figures.draw_lines(figure, both, shown, [a, b], [b, c], [b, b], [True, False])
    figures.draw_lines(figure, both, shown, [a], [b], [b], None)
    def on(point):                                                        # the patient's right comes on the left
        return pytest.approx((63 - point[0], point[1]))
    assert [line.xy1 for line in figure.artists] == [on(a), on(b), on(a)] and [line.xy2 for line in figure.artists] == [on(b), on(c), on(b)]
    assert [line.get_linestyle() for line in figure.artists] == ["-", "--", "-"]
    squares, texts = [patch for patch in both[1].patches if hasattr(patch, "get_x")], [t.get_text() for t in both[1].texts]
    assert [(p.get_x() + P / 2, p.get_y() + P / 2) for p in squares] == [on(b), on(c), on(b)]
    assert texts == ["1", "2", f"{np.linalg.norm((c - b) * SPACING):.0f} mm", "1"]
    corner = (H @ [*(a + (4, 4, 0)), 1])[:3]
    outline = both[1].patches[-1].get_xy()
    assert any(tuple(point) == on(corner) for point in outline) and len(outline) == 5


def test_surface_shows_the_same_tissue_at_both_ends_of_a_line():
    x, y, z = np.indices((48, 40, 44))
    V = torch.from_numpy(np.sin(x / 7) + np.cos(y / 9 + z / 6)).float()[None, None]
    H = data.random_affine(np.random.default_rng(3), (23.5, 19.5, 21.5), (25, 25, 30), (0.9, 1.1), 0.05, (4, 4, 3))
    V_ = data.warp(V, H[None], (48, 40, 44))[0, 0].numpy()
    left, right = figures.surface(V[0, 0].numpy(), np.eye(4), 20.0), figures.surface(V_, np.linalg.inv(H.numpy()), 20.0)
    points = np.array([(x, y, 20.0) for x in range(14, 34, 3) for y in range(12, 28, 3)])
    moved = data.transform(H, torch.from_numpy(points)).numpy()
    assert np.ptp(moved[:, 2]) > 4                                        # the plane leaves the axial slices
    across, up = np.round(moved[:, :2]).astype(int).T
    back = np.linalg.inv(H.numpy()[:3, :3])
    exact = points + ((np.stack([across, up], 1) - moved[:, :2]) @ back[:2, :2].T).dot(np.eye(2, 3))    # what the rounding moves
    seen = np.sin(exact[:, 0] / 7) + np.cos(exact[:, 1] / 9 + 20 / 6)
    np.testing.assert_allclose(right[up, 47 - across], seen, atol=0.12)
    np.testing.assert_allclose(left[20, 47 - 10], np.sin(10 / 7) + np.cos(20 / 9 + 20 / 6), atol=1e-5)


@pytest.mark.parametrize("row", range(3))
def test_a_token_is_drawn_over_the_voxels_of_its_patch(shown, row):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    cell = (5, 2, 4)
    tokens, voxels = np.zeros(shown.grid, np.float32), np.zeros(SHAPE, np.float32)
    tokens[cell] = 1
    voxels[40:48, 16:24, 32:40] = 1
    point = np.array(cell) * P + 1.2
    pictures = []
    for volume in (tokens, voxels):
        axes = figure.add_subplot()
        drawn = figures.draw_plane(axes, shown, evaluate.PLANES[row], point, volume, dict(cmap="gray", vmin=0, vmax=1), None, True)
        left, right, bottom, top = drawn.get_extent()
        array = np.asarray(drawn.get_array())
        up, across = np.nonzero(array)
        step = (right - left) / array.shape[1]
        pictures.append([left + step * across.min(), left + step * (across.max() + 1), bottom + step * up.min(), bottom + step * (up.max() + 1)])
        square = axes.patches[-1]
        assert [square.get_x(), square.get_x() + P, square.get_y(), square.get_y() + P] == pytest.approx(pictures[-1])
    assert pictures[0] == pytest.approx(pictures[1])


def test_evolution_takes_the_kept_steps_once(drawn):
    query = drawn[1]("evolution")["queries"][0]
    assert [f.rsplit("/")[-1] for f in query["maps"]] == ["random", "encoder-5.pt", "encoder-10.pt"]     # encoder.pt is step 10 too
    similarity = drawn[1]("similarity")["queries"][0]["maps"]
    last, own = list(query["maps"].values())[-1], list(similarity.values())[-1]
    np.testing.assert_array_equal(last, own)
    assert not np.allclose(list(query["maps"].values())[1], own, atol=0.05)


def test_curves_are_the_log(drawn):
    curves = drawn[1]("curves")["curves"]
    assert curves["p2p"] == [[5, 10, 15], [1, 0.5, 5 / 15]] and curves["global"][1] == [0.2, 0.1, 1 / 15] and "val" not in curves


def test_curves_of_a_fine_tuning(folder, tmp_path):
    (tmp_path / "f").mkdir()
    lines = [dict(torch="x"), dict(step=2, loss=3.0, lr=1e-3, grad_norm=2.0), dict(step=2, val=0.4, metric="dice mean"), dict(step=4, loss=2.0, lr=1e-4, grad_norm=1.0)]
    (tmp_path / "f/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = draw(folder, "curves", f"--runs={tmp_path}", "--name=f")("curves")["curves"]
    assert curves == {"loss": [[2, 4], [3.0, 2.0]], "val": [[2], [0.4]], "lr": [[2, 4], [1e-3, 1e-4]], "grad_norm": [[2, 4], [2.0, 1.0]]}


def test_pictures_do_not_change_from_call_to_call(folder):
    argv = ("pca,correspondence,similarity", "--checkpoint=random", "--figure_organs=(2,)")
    names = [f"other/figures/{name}.png" for name in ("pca", "correspondence", "similarity")]
    first = draw(folder, *argv) and [(folder / name).read_bytes() for name in names]
    assert first == (draw(folder, *argv) and [(folder / name).read_bytes() for name in names])


def refusal(folder, *argv):
    with pytest.raises(SystemExit) as caught:
        figures.main([str(folder / "x.py"), f"--out={folder}/refused", "--checkpoint=random", *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("argv, text", [
    (["--figures=umap"], "no 'umap'; there are: all, similarity"), (["--figures=similarity,umap"], "'umap'"),
    (["--figures=similarity", "--query=(1, 2, 60)"], "lies in no patch of 0"), (["--figures=similarity", "--query=(10, 57, 10)"], "63, 55, 55"),
    (["--figures=similarity", "--query=(1, 2)"], "three numbers"), (["--figures=similarity", "--query=(1, 2, 'a')"], "three numbers"),
    (["--figures=similarity", "--query=(1, 2, 3)", "--query_mm=(1, 2, 3)"], "in one of them"),
    (["--figures=similarity", "--figure_scan=7"], "no case has that id; there are: 0, 1"),
    (["--figures=similarity", "--figure_organs=(1, 9)"], "shows organ 9"), (["--figures=similarity", "--probe_share=1.1"], "shows an organ"),
    (["--figures=pca", "--token_patch=6"], "token_patch = 6"), (["--figures=pca", "--checkpoint=none.pt"], "no such file"),
    (["--figures=pca", "--in_channels=2"], "takes 2 channels, 0 has 1"), (["--figures=evolution", "--name=other"], "evolution: .*keep="),
    (["--figures=curves", "--name=other"], "curves: .*no such log"), (["--figures=tsne", "--label="], "tsne: the scans have no labels"),
    (["--figures=correspondence", "--rotation=(0, 0, 0)", "--shift=(500, 500, 500)"], "correspondence: .*no match")])
def test_refusals(folder, argv, text):
    assert re.search(text, refusal(folder, *argv))


def test_all_leaves_out_what_cannot_be_made_and_says_why(folder, tmp_path, capsys):
    figures.main([str(folder / "x.py"), "--figures=all", f"--out={tmp_path}", "--checkpoint=random", "--label=", "--runs=nowhere"])
    said = capsys.readouterr().out
    assert "tsne: left out, the scans have no labels" in said and "evolution: left out" in said and "curves: left out" in said
    assert "the point shown is the middle of the scan" in said
    assert {p.stem for p in (tmp_path / "figures").glob("*.png")} == {"similarity", "distribution", "distribution_map", "pca", "correspondence"}
    content = json.loads((tmp_path / "figures/similarity.json").read_text())
    assert content["queries"][0]["token"] == [4, 3, 3] and content["queries"][0]["organ"] is None


def test_z_scored_scans_and_two_checkpoints_of_one_name(folder, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/encoder.pt").write_bytes((folder / "runs/tiny/encoder-5.pt").read_bytes())
    files = (f"{folder}/runs/tiny/encoder.pt", f"{tmp_path}/runs/tiny/encoder.pt")
    shown = figures.Shown(dataclasses.replace(load(folder), checkpoint=files), "cpu")
    assert list(shown.heads.values()) == list(files)                      # both would be called tiny
    content = draw(folder, "similarity", "--intensity=zscore", f"--checkpoint={files}", "--query=(20, 30, 28)")("similarity")
    assert list(content["queries"][0]["maps"]) == list(files)


def test_probe_command_scores_the_second_scan_by_the_first(folder, capsys):
    """Neighbours, found patches and the table, written out with loops over the tokens of the encoder's own maps."""
    pytest.importorskip("sklearn")
    path = f"{folder}/runs/tiny/encoder.pt"
    probe.main([str(folder / "x.py"), "--slab=(64, 64, 64)", "--probe_limit=5000", f"--checkpoint={path}", f"--out={folder}/probed"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = json.loads((folder / "probed/probe.json").read_text())["probe"]
    assert list(found) == ["random", path]                                # random weights first
    cfg = load(folder, "--slab=(64, 64, 64)")
    scans, sets = probe.probe_scans(cfg), []
    assert [scan.id for scan in scans] == ["0", "1"]
    for scan in scans:
        volume = np.pad(scan.open()[0].astype(np.float32), [(0, 64 - s) for s in scan.shape], constant_values=scan.open().min())
        with torch.no_grad():
            maps = probe.load_encoder(path, cfg, "cpu")(torch.from_numpy(volume)[None, None])[2][0].double().numpy()
        label, cells = scan.open("label")[0], itertools.product(*[range(s // P) for s in scan.shape])
        tokens = []
        for i, j, k in cells:
            patch = label[i * P:i * P + P, j * P:j * P + P, k * P:k * P + P].ravel()
            share = [(patch == organ).mean() for organ in (1, 2, 3)]
            if max(share) >= 0.3:
                tokens.append((maps[:, i, j, k], 1 + int(np.argmax(share))))
        sets.append(tokens)
    right = {1: [], 2: [], 3: []}
    for x, organ in sets[1]:
        near = sorted(sets[0], key=lambda other: -cosine([x], [other[0]])[0, 0])[:20]
        votes = [sum(other[1] == k for other in near) for k in (1, 2, 3)]
        right[organ].append(1 + int(np.argmax(votes)) == organ)
    number = found[path]
    assert number["tokens"] == [len(each) for each in sets] and number["linear"]["untrained"] == []
    assert number["knn"]["balanced_accuracy"] == pytest.approx(np.mean([np.mean(r) for r in right.values()]), abs=0.01)
    batch = data.collate([data.Slabs(scans[1:], cfg, 1, cfg.seed).sample(scans[1], np.random.default_rng((cfg.seed, 0)))])
    V, V_, _ = data.views(batch, cfg)
    with torch.no_grad():
        q, k = (flat(probe.load_encoder(path, cfg, "cpu")(view)[2][0]) for view in (V, V_))
    inside = [mask[0].numpy() for mask in data.tokens_inside(batch, (8, 8, 8), P)]
    M = data.correspondence(batch["H"][0], (8, 8, 8), P).numpy() & inside[0][:, None] & inside[1]
    nearest = np.where(inside[1], cosine(q, k), -2).argmax(1)
    assert number["correspondence"] == pytest.approx(sum(M[i, nearest[i]] for i in range(len(M))) / M.sum(), abs=0.005)
    row = next(cells for cells in table if cells and cells[0] == path)
    assert row[1:3] + row[-1:] == [f"{number[k]['balanced_accuracy']:.3f}" for k in ("linear", "knn")] + [f"{number['correspondence']:.3f}"]
