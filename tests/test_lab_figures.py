"""lab/figures.py: the numbers against numpy loops, closed forms, SVD and scikit-learn, and the pictures."""
import itertools
import json
import re
import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHAPE, SPACING, SPHERES, encoder_file
from einops import rearrange

import configs
import data
import evaluate
from lab import figures, probe

pytest.importorskip("matplotlib")

P = 8                                       # voxels of a patch; of the scans' 60 a half is left over
PRETRAINED = [dict(torch="x", resumed=0)]
PRETRAINED += [{"step": s, "loss": 9 / s, "global": 1 / s, "p2p": 5 / s, "p2s": 3 / s, "accuracy": s / 50,
                "spread": 0.9, "lr": 1e-3, "grad_norm": 2.0} for s in (5, 10, 15)]
PRETRAINED += [dict(torch="x", resumed=15)]             # it goes on, and has not logged yet
TUNED = [dict(torch="x"), dict(step=2, loss=3.0, lr=1e-3, grad_norm=2.0),
         dict(step=2, val=0.4, metric="dice mean"), dict(step=4, loss=2.0, lr=1e-4, grad_norm=1.0)]


def write_log(path, lines, rest=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)


@pytest.fixture(scope="module")
def folder(spheres):
    """The scans with two kept checkpoints and a log of a pre-training."""
    write_log(spheres / "runs/tiny/log.jsonl", PRETRAINED)
    for name, seed, step in (("encoder-5", 1, 5), ("encoder-10", 2, 10), ("encoder", 2, 10)):
        torch.manual_seed(seed)
        encoder_file(spheres / f"runs/tiny/{name}.pt", step=step, **SPHERES)
    return spheres


def open_shown(folder, *argv):
    return figures.Shown(configs.load(figures.Config, [str(folder / "x.py"), *argv]), torch.device("cpu"))


def draw(folder, names, *argv, out="other"):
    """What one call of the command wrote: JSON file -> content."""
    figures.main([str(folder / "x.py"), f"--figures={names}", f"--out={folder}/{out}", *argv])
    return lambda name: json.loads((folder / f"{out}/figures/{name}.json").read_text())


@pytest.fixture(scope="module")
def files(folder):
    return "random", f"{folder}/runs/tiny/encoder.pt"


@pytest.fixture(scope="module")
def read(folder, files):
    """JSON file -> content, of all figures."""
    return draw(folder, "all", f"--checkpoint={files}", "--figure_tokens=40", "--token_patch=32", out="all")


@pytest.fixture(scope="module")
def shown(folder, files):
    return open_shown(folder, f"--checkpoint={files}", "--token_patch=32")          # the losses' own


def flat(tokens):
    return tokens.reshape(len(tokens), -1).T.double().numpy()             # (t, c)


def cosine(a, b):
    return np.array([[float(np.dot(p, q) / np.sqrt(np.dot(p, p) * np.dot(q, q))) for q in b] for p in a])


def similarities(shown, file, of=slice(None)):
    """Of V's tokens with those of V', (n, t)."""
    return cosine(flat(shown.tokens(file))[of], flat(shown.tokens(file, True)))


def matches(shown, content):
    """(t, t) bool after the H that a file states, columns outside the scan False; (t,) those inside."""
    M = data.correspondence(torch.tensor(content["H"]), shown.grid, P).numpy()
    home = np.linalg.inv(content["H"]) @ np.vstack([shown.centres.T, np.ones(len(M))])
    inside = ((home[:3].T >= -0.5) & (home[:3].T <= np.array(SHAPE) - 0.5)).all(1)
    return M & inside, inside


def patches(volume):
    """(t, voxels) of the whole patches of (x, y, z)."""
    return rearrange(volume[:, :56], "(i p) (j q) (k r) -> (i j k) (p q r)", p=P, q=P, r=P)


def tissue(shown):
    """(t,) bool: patches brighter than the scan."""
    V = shown.pair["V"][0].numpy()
    return patches(V).mean(1) > V.mean()


def test_all_figures_are_pictures_of_readme_size(folder, read):
    image = pytest.importorskip("matplotlib.image")
    expected = {"distribution", "distribution_map", "tsne", "pca", "correspondence", "curves"}
    expected |= {f"{kind}_organ_{k}" for kind in ("similarity", "evolution") for k in (1, 2, 3)}
    pictures = {path.stem: path for path in (folder / "all/figures").glob("*.png")}
    assert set(pictures) == expected
    for path in pictures.values():
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 1350 and 700 < height < 2600                      # 9 inches at 150 dots
        pixels = image.imread(path)[..., :3]
        colours = (pixels * 255).astype(int).reshape(-1, 3) @ (1, 256, 65536)
        assert pixels.std() > 0.05 and len(np.unique(colours)) > 50


def test_similarity_is_the_cosine_of_every_pair(read, shown, files):
    content = read("similarity")
    assert content["grid"] == [8, 7, 7]
    assert [query["name"] for query in content["queries"]] == ["organ 1", "organ 2", "organ 3"]
    for query, file in itertools.product(content["queries"], files):
        x, token = shown.tokens(file), tuple(query["token"])
        expected = cosine([x[(slice(None), *token)].numpy()], flat(x)).reshape(content["grid"])
        np.testing.assert_allclose(query["maps"][file], expected, atol=2e-5)
        assert np.array(query["maps"][file])[token] == pytest.approx(1, abs=1e-5)


def test_a_query_per_organ_lies_in_its_purest_patch(read, folder):
    label = nib.as_closest_canonical(nib.load(folder / "label0.nii.gz")).get_fdata()
    for k, query in enumerate(read("similarity")["queries"], 1):
        share = (patches(label) == k).mean(1).reshape(8, 7, 7)
        assert share[tuple(query["token"])] == share.max()
        np.testing.assert_allclose(query["mm"], np.array(query["voxel"]) * SPACING + (-50, -40, 100))


def test_a_purer_patch_goes_before_one_nearer_to_the_middle(folder):
    fresh = open_shown(folder)
    ids, purity = np.zeros((8, 7, 7), int), np.zeros((8, 7, 7))
    ids[1:6, 3, 3], purity[1:6, 3, 3] = 1, (0.9, 0.4, 0.6, 0.9, 0.5)      # its middle is token 3
    fresh.organs = ids.ravel(), purity.ravel()
    (name, organ, point), = figures.query_points(fresh)
    assert (name, organ) == ("organ 1", 1) and point.tolist() == [4 * P + 3.5, 3 * P + 3.5, 3 * P + 3.5]


def test_a_patch_reaches_half_a_voxel_beyond_its_voxels(shown):
    assert shown.token_of((7.4, 7.6, -0.4)) == (0, 1, 0) and shown.token_of((63.4, 55.4, 55.4)) == (7, 6, 6)
    for outside in ((63.6, 0, 0), (0, 55.6, 0), (0, 0, -0.6)):
        with pytest.raises(SystemExit, match="lies in no patch"):
            shown.token_of(outside)


def test_query_in_mm_is_the_query_in_voxels(folder):
    by_voxel, = draw(folder, "similarity", "--query=(41, 13.4, 20)")("similarity")["queries"]
    by_mm, = draw(folder, "similarity", "--query_mm=(32, -6.5, 160)")("similarity")["queries"]
    assert by_voxel["token"] == by_mm["token"] == [5, 1, 2]
    np.testing.assert_allclose(by_mm["voxel"], (41, 13.4, 20), atol=1e-6)


def test_distribution_is_the_sharpe_ratio_in_closed_form(read, shown, folder, files):
    content = read("distribution")
    M, usable = matches(shown, content)
    for file in files:
        sim = similarities(shown, file)[:, usable]
        expected = (sim.max(1) - sim.mean(1)) / np.sqrt((sim ** 2).mean(1) - sim.mean(1) ** 2)
        np.testing.assert_allclose(np.ravel(content["sharpe_ratio"][file]), expected, rtol=1e-3)
    last = np.ravel(content["sharpe_ratio"][files[1]])
    tokens = {number["which"]: number["token"] for number in content["chosen"]}
    shows = last[(shown.organs[0] > 0) & tissue(shown) & M.any(1)]
    assert last[tokens["highest ratio"]] == shows.max() and last[tokens["lowest ratio"]] == shows.min()
    one_way = [t for t in np.flatnonzero(M.any(1)) if M[:, t].any() and not (M[t] & M[:, t]).any()]
    argv = f"--checkpoint={files[1]}", f"--query={tuple(shown.centres[one_way[0]].tolist())}"
    asked, = draw(folder, "distribution", *argv, out="asked")("distribution")["chosen"]
    assert asked["token"] == one_way[0]                                   # goes to others than come to it
    for number in [*content["chosen"], asked]:
        sim, partners = similarities(shown, number["encoder"], [number["token"]])[0], M[number["token"]]
        np.testing.assert_allclose(number["similarities"], sim[usable], atol=2e-5)
        np.testing.assert_allclose(np.sort(number["true_partners"]), np.sort(sim[partners]), atol=2e-5)


def test_distribution_of_a_label_that_holds_air_shows_tissue(folder, tmp_path):
    fresh = open_shown(folder)
    figures.draw_distribution(fresh, tmp_path)
    (ratio,) = json.loads((tmp_path / "distribution.json").read_text())["sharpe_ratio"].values()
    ratio, matched = np.ravel(ratio), np.isin(np.arange(8 * 7 * 7), fresh.pair["matches"][:, 0])
    air = ~tissue(fresh) & matched
    inside = tissue(fresh) & matched & (ratio > ratio[air].min()) & (ratio < ratio[air].max())
    assert len(np.unique(ratio[inside])) > 9
    fresh.organs = (air | inside).astype(int), np.ones(8 * 7 * 7)     # both extremes of this label lie in air
    figures.draw_distribution(fresh, tmp_path)
    chosen = json.loads((tmp_path / "distribution.json").read_text())["chosen"]
    assert [ratio[n["token"]] for n in chosen] == [ratio[inside].max(), ratio[inside].min()]


def test_tsne_silhouettes_equal_scikit_learn(read, shown, files):
    witness = pytest.importorskip("sklearn.metrics")
    scans = probe.probe_scans(shown.cfg)
    for file in files:
        number = read("tsne")["encoders"][file]
        x, y, _ = probe.organ_tokens(shown.encoder(file), scans, shown.cfg, "cpu", 0.5)
        for metric in ("euclidean", "cosine"):
            found, each = number["silhouette"][metric], witness.silhouette_samples(x, y, metric=metric)
            assert found["mean"] == pytest.approx(witness.silhouette_score(x, y, metric=metric), abs=1e-5)
            assert found["organs"]["2"] == pytest.approx(each[y == 2].mean(), abs=1e-5)
        assert number["tokens"] == {str(k): int((y == k).sum()) for k in (1, 2, 3)}
        shows = sum(min(40, n) for n in number["tokens"].values())
        assert len(number["points"]) == len(number["organ"]) == shows


def test_pca_equals_the_singular_value_decomposition(read, shown, files):
    for file in files:
        number, x = read("pca")["encoders"][file], flat(shown.tokens(file))
        u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
        found = np.reshape(number["components"], (-1, 3))
        sign = np.sign((found * u[:, :3]).sum(0))
        np.testing.assert_allclose(found, sign * u[:, :3] * s[:3], atol=1e-3 * s[0])
        np.testing.assert_allclose(number["share_of_variance"], s[:3] ** 2 / (s ** 2).sum(), rtol=1e-4)
        weights = (x - x.mean(0)).T @ found                           # (c, 3) a multiple each: the sign rule
        assert (weights[np.abs(weights).argmax(0), range(3)] > 0).all()
    with pytest.raises(figures.NoFigure, match="2 tokens of 9 features"):
        figures.principal_components(torch.zeros(9, 1, 2, 1))


@pytest.mark.parametrize("moves", ["", "--rotation=(0,0,40) --shift=(20,20,12)"], ids=["near", "far"])
def test_correspondence_is_of_the_matches_of_h(folder, files, tmp_path, monkeypatch, moves):
    shown, lines = open_shown(folder, f"--checkpoint={files}", *moves.split()), []
    monkeypatch.setattr(figures, "draw_lines", lambda figure, both, shown, *row: lines.append(row))
    figures.draw_correspondence(shown, tmp_path)
    content = json.loads((tmp_path / "correspondence.json").read_text())
    (M, inside), i, true = matches(shown, content), np.array(content["i"]), content["true"]
    assert 5 <= len(i) <= 10 and M[i, true].all() and tissue(shown)[i].all()
    assert len(set(np.unravel_index(i, shown.grid)[2])) == 1              # one layer of V
    found, dashes = [true], [None]
    for file in files:
        sim, number = similarities(shown, file), content["encoders"][file]
        nearest = np.where(inside, sim, -2).argmax(1)
        right = M[np.arange(len(M)), nearest]
        assert (number["right"], number["matched"]) == (right.sum(), M.any(1).sum())
        assert number["predicted"] == nearest[i].tolist()
        if moves and file == "random":                                    # some are nearer to padding
            assert right.sum() != M[np.arange(len(M)), sim.argmax(1)].sum()
        found.append(nearest[i])
        dashes.append(right[i].tolist())
    for (*points, fine), end, expected in zip(lines, found, dashes, strict=True):
        np.testing.assert_array_equal(points, shown.centres[[i, end, true]])
        assert fine == expected
    assert moves or {fine for row in dashes[1:] for fine in row} == {True, False}
    V, fill = torch.from_numpy(shown.scan.open().astype(np.float32)), torch.from_numpy(shown.scan.fill)
    V_ = data.warp(V[None], torch.tensor(content["H"])[None], SHAPE, fill=fill[None])[0]
    torch.testing.assert_close(shown.pair["V"], V)
    torch.testing.assert_close(shown.pair["V'"], V_, rtol=0, atol=1e-4)   # V' is V moved by the H of the file
    encoder = shown.encoder(files[1])
    for volume, moved in ((V, False), (V_, True)):
        expected = probe.encode(encoder, volume, (64,) * 3, P, "cpu", 0.5)
        torch.testing.assert_close(shown.tokens(files[1], moved), expected, rtol=0, atol=5e-3)


def test_lines_join_the_centres_of_patches(shown):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    both = figure.subplots(1, 2)
    a, b, c = shown.centres[[10, 100, 120]]
    figures.draw_lines(figure, both, shown, [a, b], [b, c], [b, b], [True, False])
    figures.draw_lines(figure, both, shown, [a], [b], [b], None)

    def on(*points):                                                  # the patient's right comes on the left
        return [pytest.approx((63 - point[0], point[1])) for point in points]

    lines, squares = figure.artists, [patch for patch in both[1].patches if hasattr(patch, "get_x")]
    assert [line.xy1 for line in lines] == on(a, b, a) and [line.xy2 for line in lines] == on(b, c, b)
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-"]
    assert [(p.get_x() + P / 2, p.get_y() + P / 2) for p in squares] == on(b, c, b)
    H = shown.pair["H"]
    d = shown.centres[np.linalg.norm(shown.centres - (H @ [*b, 1])[:3], axis=1).argmin()]       # where b really goes
    height = [(np.linalg.inv(H) @ [*end, 1])[2] - start[2] for start, end in ((a, b), (b, c), (a, b), (b, d))]
    figures.draw_lines(figure, both, shown, [b], [d], [d], [True])
    dots = [p.get_linestyle() == ":" for p in [*squares, both[1].patches[-1]]]
    assert dots == [abs(h) > P / 2 for h in height] == [True, True, True, False]
    far = f"{np.linalg.norm((c - b) * SPACING):.0f} mm"
    assert [text.get_text() for text in both[1].texts] == ["1", "2", far, "1", "1"]
    corner, outline = H @ [*(a + (4, 4, 0)), 1], both[1].patches[-2].get_xy()
    assert any([tuple(point)] == on(corner) for point in outline) and len(outline) == 5


def test_surface_shows_the_same_tissue_at_both_ends_of_a_line():
    def tissue(x, y, z):
        return np.sin(x / 7) + np.cos(y / 9 + z / 6)

    V = torch.from_numpy(tissue(*np.indices((48, 40, 44)))).float()[None, None]
    rng, centre = np.random.default_rng(3), (23.5, 19.5, 21.5)
    H = data.random_affine(rng, centre, (25, 25, 30), (0.9, 1.1), 0.05, (4, 4, 3))
    V_, back = data.warp(V, H[None], (48, 40, 44))[0, 0].numpy(), np.linalg.inv(H.numpy())
    left, right = figures.surface(V[0, 0].numpy(), np.eye(4), 20.0), figures.surface(V_, back, 20.0)
    points = np.array([(x, y, 20.0) for x in range(14, 34, 3) for y in range(12, 28, 3)])
    moved = data.transform(H, torch.from_numpy(points)).numpy()
    assert np.ptp(moved[:, 2]) > 4                                        # the plane leaves the axial slices
    pixels = np.round(moved[:, :2]).astype(int)
    exact = points[:, :2] + (pixels - moved[:, :2]) @ back[:2, :2].T      # what the rounding moves
    seen = right[pixels[:, 1], 47 - pixels[:, 0]]
    np.testing.assert_allclose(seen, tissue(exact[:, 0], exact[:, 1], 20), atol=0.12)
    np.testing.assert_allclose(left[20, 47 - 10], tissue(10, 20, 20), atol=1e-5)


@pytest.mark.parametrize("plane", evaluate.PLANES, ids=lambda plane: plane[0])
def test_a_token_is_drawn_over_the_voxels_of_its_patch(shown, plane):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    tokens, voxels, edges = np.zeros(shown.grid, np.float32), np.zeros(SHAPE, np.float32), []
    tokens[5, 2, 4] = voxels[40:48, 16:24, 32:40] = 1
    for volume in (tokens, voxels, np.stack([tokens] * 3, -1)):           # the last: colours
        axes, look = figure.add_subplot(), dict(cmap="gray", vmin=0, vmax=1)
        drawn = figures.draw_plane(axes, shown, plane, (41.2, 17.2, 33.2), volume, look)
        left, right, bottom, _ = drawn.get_extent()
        picture = np.asarray(drawn.get_array())
        step = (right - left) / picture.shape[1]
        up, across = np.nonzero(picture.max(2) if picture.ndim == 3 else picture)
        edges.append([left + step * across.min(), left + step * (across.max() + 1),
                      bottom + step * up.min(), bottom + step * (up.max() + 1)])
        x, y = axes.patches[-1].get_xy()
        assert edges[-1] == pytest.approx(edges[0]) and edges[-1] == pytest.approx([x, x + P, y, y + P])


def test_evolution_takes_the_kept_steps_once(read, files):
    maps, own = read("evolution")["queries"][0]["maps"], read("similarity")["queries"][0]["maps"][files[1]]
    assert [file.rsplit("/")[-1] for file in maps] == ["random", "encoder-5.pt", "encoder-10.pt"]
    _, first, last = maps.values()
    np.testing.assert_array_equal(last, own)
    assert not np.allclose(first, own, atol=0.05)


@pytest.mark.parametrize("lines, expected", [
    (PRETRAINED, {key: [[5, 10, 15], [line[key] for line in PRETRAINED[1:4]]]
                  for key in ("loss", "global", "p2p", "p2s", "accuracy", "spread", "lr", "grad_norm")}),
    (TUNED, {"loss": [[2, 4], [3.0, 2.0]], "val": [[2], [0.4]], "lr": [[2, 4], [1e-3, 1e-4]],
             "grad_norm": [[2, 4], [2.0, 1.0]]})], ids=["pretrained", "tuned"])
def test_curves_are_the_log(folder, tmp_path, monkeypatch, lines, expected):
    Axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *a, **k: drawn.append((x, y)) or plot(self, x, y, *a, **k))
    write_log(tmp_path / "f/log.jsonl", lines, '{"step": 20, "lo')        # a run is writing
    argv = f"--runs={tmp_path}", "--name=f", "--image=none.nii"           # no scan is needed
    assert draw(folder, "curves", *argv)("curves")["curves"] == expected
    assert sorted(map(str, map(list, drawn))) == sorted(map(str, expected.values()))       # each is in the picture


def test_pictures_do_not_change_from_call_to_call(folder):
    def pictures():
        draw(folder, ",".join(names), "--checkpoint=random", "--figure_organs=(2,)")
        return [(folder / f"other/figures/{name}.png").read_bytes() for name in names]

    names = "pca", "correspondence", "similarity"
    assert pictures() == pictures()


@pytest.mark.parametrize("argv, text", [
    ("umap", "no 'umap'; there are: all, similarity"), ("similarity,umap", "'umap'"),
    ("similarity --query=(1,2,60)", "lies in no patch of 0"), ("tsne --query=(10,57,10)", "63, 55, 55"),
    ("similarity --query=(1,2)", "three numbers"), ("similarity --query=(1,2,'a')", "expected numbers"),
    ("pca --query=(1,2,3) --query_mm=(1,2,3)", "in one of them"),
    ("similarity --figure_scan=7", "no case has that id; there are: 0, 1"),
    ("all --figure_organs=(1,9)", "shows organ 9"), ("similarity --probe_share=1.1", "shows an organ"),
    ("pca --probe_patch=6", "probe_patch = 6"), ("pca --checkpoint=('random','none.pt')", "no such file"),
    ("pca --in_channels=2", "takes 2 channels, 0 has 1"), ("evolution --name=other", "evolution: .*keep="),
    ("curves --name=other", "curves: .*no such log"), ("tsne --label=", "tsne: the scans have no labels"),
    ("correspondence --rotation=(0,0,0) --shift=(500,500,500)", "correspondence: .*no match")])
def test_refusals(folder, tmp_path, monkeypatch, argv, text):
    """One line each, before anything is encoded."""
    monkeypatch.setattr(probe, "encode", lambda *_, **__: pytest.fail("encoded"))
    argv = [f"--out={tmp_path}", "--checkpoint=random", *f"--figures={argv}".split()]
    with pytest.raises(SystemExit) as caught:
        figures.main([str(folder / "x.py"), *argv])
    assert re.search(text, str(caught.value)) and "\n" not in str(caught.value)


def test_all_leaves_out_what_cannot_be_made_and_says_why(folder, capsys):
    argv = "--checkpoint=random", "--label=", "--runs=nowhere"
    query, = draw(folder, "all", *argv, out="some")("similarity")["queries"]
    said = capsys.readouterr().out
    for text in ("tsne: left out, the scans have no labels", "evolution: left out", "curves: left out"):
        assert text in said
    assert said.count("the point shown is the middle of the scan") == 1
    made = {path.stem for path in (folder / "some/figures").glob("*.png")}
    assert made == {"similarity", "distribution", "distribution_map", "pca", "correspondence"}
    assert query["token"] == [4, 3, 3] and query["organ"] is None


def test_z_scored_scans_and_two_checkpoints_of_one_name(folder, files, tmp_path):
    encoder_file(tmp_path / "tiny/encoder.pt", **SPHERES)
    both = files[1], f"{tmp_path}/tiny/encoder.pt"
    shown = open_shown(folder, f"--checkpoint={both}")
    assert list(shown.headings.values()) == list(both)                    # both would be called tiny
    argv = "--intensity=zscore", f"--checkpoint={both}", "--query=(20, 30, 28)"
    query, = draw(folder, "similarity", *argv)("similarity")["queries"]
    assert list(query["maps"]) == list(both)
