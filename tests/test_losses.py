"""Every equation against loops in numpy that were written from the paper, in value and in gradient (central
differences of the loops). Sinkhorn against a convex solver, a linear program and plain scaling; the losses of
the tasks against MONAI and scikit-image."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog, minimize

import losses
from losses import (
    dice_bce,
    dice_ce,
    dual_softmax,
    info_nce,
    masked_l1_l2,
    patch_to_patch,
    patch_to_structure,
    recognition,
    reconstruction_loss,
    s2dc_loss,
    sharpe_ratio,
    similarity,
    sinkhorn,
)

FORMS = ["printed", "sum", "mean", "released"]
each_form = pytest.mark.parametrize("form", FORMS)
each_matching = pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(x, **options):
    return torch.tensor(x, dtype=torch.float64, **options)


def assert_close(a, b, tolerance=1e-9):
    a, b = (x.detach().cpu().numpy() if torch.is_tensor(x) else np.asarray(x) for x in (a, b))
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def slope(f, x, step=1e-5):
    """Central differences of f: numpy array -> float."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        there, back = x.copy(), x.copy()
        there[place] += step
        back[place] -= step
        gradient[place] = (f(there) - f(back)) / (2 * step)
    return gradient


# The paper in loops -----------------------------------------------------------------------------------------


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / np.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def cosines(tokens, tokens_):           # of one sample -> (t, t)
    return np.array([[cosine(a, b) for b in tokens_] for a in tokens])


def loop_info_nce(query, key, queue, tau):
    value = 0
    for q, k in zip(query, key):
        terms = [np.exp(cosine(q, other) / tau) for other in [k, *queue]]
        value -= np.log(terms[0] / sum(terms)) / len(query)
    return value


def loop_dual_softmax(M, tau, rows, columns):
    """M (t, t) of one sample; rows, columns: the indices that take part -> probabilities, nan elsewhere."""
    out = np.full(M.shape, np.nan)
    for i in rows:
        for j in columns:
            across = np.exp(M[i, j] / tau) / sum(np.exp(M[i, m] / tau) for m in columns)
            down = np.exp(M[i, j] / tau) / sum(np.exp(M[n, j] / tau) for n in rows)
            out[i, j] = across * down
    return out


def loop_sinkhorn(M, tau, score, iterations, rows, columns):
    """Scaling of the padded matrix with the marginals, in plain numbers instead of logarithms."""
    n, m = len(rows), len(columns)
    K = np.full((n + 1, m + 1), np.exp(score / tau))
    K[:n, :m] = np.exp(M[np.ix_(rows, columns)] / tau)
    a, b, y = np.r_[np.ones(n), m], np.r_[np.ones(m), n], np.ones(m + 1)
    for _ in range(iterations):
        x = a / (K @ y)
        y = b / (K.T @ x)
    out = np.full(M.shape, np.nan)
    out[np.ix_(rows, columns)] = (x[:, None] * K * y)[:n, :m]
    return out


def loop_sharpe(D):
    mean = sum(D) / len(D)
    return (max(D) - mean) / np.sqrt(sum((d - mean) ** 2 for d in D) / len(D))


def loop_structure(M, M_hat, match, rows, columns, form, S):
    """Eq. 7-8 of one sample; S: the similarities that the Sharpe ratios take, M or what M was (detached)."""
    sr = {i: loop_sharpe([S[i, j] for j in columns]) for i in rows}
    sr_ = {j: loop_sharpe([S[i, j] for i in rows]) for j in columns}
    w = {i: np.exp(sr[i]) / sum(np.exp(x) for x in sr.values()) for i in rows}
    w_ = {j: np.exp(sr_[j]) / sum(np.exp(x) for x in sr_.values()) for j in columns}
    total, mass, apart = 0, 0, []
    for i in rows:
        for j in columns:
            weight = (w[i] + w_[j]) / 2
            if match[i, j]:
                total += weight * -np.log((1 + M[i, j]) / 2 if form == "released" else M_hat[i, j])
                mass += weight
            elif form == "released":
                apart.append(-np.log(1 - (1 + M[i, j]) / 2))
    if not mass:
        return 0
    return {"printed": total / (len(rows) * len(columns)), "sum": total, "mean": total / mass,
            "released": total + (sum(apart) / len(apart) if apart else 0)}[form]


def loop_terms(tokens, tokens_, match, valid, valid_, matching, tau, form, score=0.3, fixed=None):
    """L_p2p, L_p2s: means over the samples."""
    p2p, p2s = 0, 0
    for s in range(len(tokens)):
        M = cosines(tokens[s], tokens_[s])
        rows, columns = np.flatnonzero(valid[s]), np.flatnonzero(valid_[s])
        M_hat = (loop_dual_softmax(M, tau, rows, columns) if matching == "dual_softmax" else
                 loop_sinkhorn(M, tau, score, 6, rows, columns))
        found = [-np.log(M_hat[i, j]) for i in rows for j in columns if match[s, i, j]]
        p2p += sum(found) / max(len(found), 1) / len(tokens)
        S = M if fixed is None else fixed[s]
        p2s += loop_structure(M, M_hat, match[s], rows, columns, form, S) / len(tokens)
    return p2p, p2s


def scene(b=3, t=7, c=4, seed=1):
    """Tokens, matches with several partners, and padding; the last sample matches on padding alone."""
    tokens, tokens_ = normal(b, t, c, seed=seed), normal(b, t, c, seed=seed + 1)
    match = normal(b, t, t, seed=seed + 2) > 0.7
    valid, valid_ = normal(b, t, seed=seed + 3) > -0.8, normal(b, t, seed=seed + 4) > -0.8
    valid[:, 0] = valid_[0, t - 1] = False
    match[-1] = False
    match[-1, 0, :] = True
    assert match[0].sum(1).max() > 1 and valid.sum(1).min() > 1 and valid_.sum(1).min() > 1
    return tokens, tokens_, match, valid, valid_


# One equation at a time -------------------------------------------------------------------------------------


def test_info_nce_value_and_gradient():
    query, key, queue = normal(3, 5), normal(3, 5, seed=1), normal(6, 5, seed=2)
    query.requires_grad_(), key.requires_grad_()
    value = info_nce(query, key, queue, 0.2)
    value.backward()
    q, k, n = query.detach().numpy(), key.detach().numpy(), queue.numpy()
    assert_close(value, loop_info_nce(q, k, n, 0.2))
    assert_close(query.grad, slope(lambda x: loop_info_nce(x, k, n, 0.2), q), 1e-7)
    assert_close(key.grad, slope(lambda x: loop_info_nce(q, x, n, 0.2), k), 1e-7)


def test_info_nce_among_allowed_negatives():
    query, key, queue = normal(3, 5), normal(3, 5, seed=1), normal(6, 5, seed=2)
    allowed = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    each = [loop_info_nce(query[b:b + 1].numpy(), key[b:b + 1].numpy(), queue[allowed[b]].numpy(), 0.2) for b in range(3)]
    assert_close(info_nce(query, key, queue, 0.2, allowed), np.mean(each))
    assert each[1] == 0                                             # nothing to be taken for


def test_recognition_counts_the_twins_that_nothing_beats():
    query, key, queue = normal(8, 5), normal(8, 5, seed=1), normal(6, 5, seed=2)
    allowed = normal(8, 6, seed=3) > 0
    wins = [all(cosine(q, k) > cosine(q, n) for n, a in zip(queue.numpy(), mine) if a)
            for q, k, mine in zip(query.numpy(), key.numpy(), allowed)]
    others = allowed.sum(dim=1).numpy()
    found = recognition(query, key, queue, 0.2, allowed)
    assert 0 < np.mean(wins) < 1 and found["top1"] == np.mean(wins)
    assert_close(found["nce"], info_nce(query, key, queue, 0.2, allowed))
    chance = np.mean(1 / (1 + others)), np.mean(np.log(1 + others))
    assert [found[name].item() for name in ("top1_chance", "nce_chance")] == pytest.approx(chance, rel=1e-6)
    assert recognition(query, queue[:1].expand(8, 5), queue, 0.2)["top1"] == 0      # a tie is no recognition


def test_info_nce_limits():
    e = torch.eye(4, dtype=torch.float64)
    assert_close(info_nce(e[:1], e[:1], e[:1].repeat(9, 1), 0.5), np.log(10))       # all alike
    assert info_nce(e[:1], e[:1], -e[:1].repeat(9, 1), 0.01) < 1e-9                 # found with certainty


@pytest.mark.parametrize("masked", [False, True])
def test_dual_softmax(masked):
    _, _, _, valid, valid_ = scene()
    sim = normal(3, 7, 7).tanh()
    if not masked:
        valid, valid_ = torch.ones_like(valid), torch.ones_like(valid_)
    got = dual_softmax(sim, 0.1, valid, valid_) if masked else dual_softmax(sim, 0.1)
    for s in range(3):
        rows, columns = np.flatnonzero(valid[s]), np.flatnonzero(valid_[s])
        want = np.log(loop_dual_softmax(sim[s].numpy(), 0.1, rows, columns))
        assert_close(got[s], np.where(np.isnan(want), -np.inf, want))


@pytest.mark.parametrize("dim", [1, 2])
def test_sharpe_ratio(dim):
    *_, valid, _ = scene()
    sim = normal(3, 7, 7)
    got = sharpe_ratio(sim, dim, valid)
    for s in range(3):
        rows = sim[s].numpy() if dim == 2 else sim[s].numpy().T
        assert_close(got[s], [loop_sharpe(row[np.flatnonzero(valid[s])]) for row in rows])
    assert torch.autograd.gradcheck(lambda x: sharpe_ratio(x, dim, valid), sim.requires_grad_())


def test_sharpe_ratio_without_spread():
    sim = torch.full((1, 7, 7), 0.1 + 0.2, requires_grad=True)                      # whose mean is not exact
    ratio = sharpe_ratio(sim, 2)
    ratio.sum().backward()
    assert ratio.abs().max() < 0.1 and sim.grad.isfinite().all()
    assert not sharpe_ratio(sim, 2, torch.zeros(1, 7, dtype=torch.bool)).any()      # no tokens at all


# Sinkhorn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 7])
def test_sinkhorn_equals_scaling(iterations):
    _, _, _, valid, valid_ = scene()
    sim = normal(3, 7, 7).tanh()
    got = sinkhorn(sim, 0.2, number(0.3), iterations, valid, valid_)
    for s in range(3):
        rows, columns = np.flatnonzero(valid[s]), np.flatnonzero(valid_[s])
        want = loop_sinkhorn(sim[s].numpy(), 0.2, 0.3, iterations, rows, columns)
        assert_close(got[s].exp(), np.nan_to_num(want))


def test_sinkhorn_marginals():
    sim = normal(2, 6, 6).tanh()
    valid, valid_ = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    P = sinkhorn(sim, 0.1, number(0.2), 2000, valid, valid_).exp()
    assert (P.sum(2) <= 1 + 1e-9).all() and (P.sum(1) <= 1 + 1e-9).all()
    assert not P[1, 4:].any()
    certain = sinkhorn(sim, 0.5, number(-20.), 2000).exp()      # bins too poor to be used: doubly stochastic
    assert_close(certain.sum(2), torch.ones(2, 6), 1e-3)        # the error falls as 1 / iterations here
    assert_close(certain.sum(1), torch.ones(2, 6), 1e-3)
    assert sinkhorn(sim, 0.1, number(5.), 2000).exp().max() < 1e-9      # bins that beat all partners


def transport_problem(sim, score):
    """Z (n + 1, n + 1), and A, m with A P.flatten() = m where a plan P has its marginals."""
    n = len(sim)
    Z, eye, row = np.full((n + 1, n + 1), score), np.eye(n + 1), np.ones((1, n + 1))
    Z[:n, :n] = sim
    A = np.r_[np.kron(eye, row), np.kron(row, eye)]
    return Z, A[:-1], np.r_[np.ones(n), n, np.ones(n)]      # the last one follows from the others


def test_sinkhorn_solves_the_stated_problem():
    sim, tau, score, n = normal(1, 3, 3).tanh(), 0.5, 0.1, 3
    Z, A, marginal = transport_problem(sim[0], score)
    z = Z.ravel() / tau
    start = np.outer(np.r_[np.ones(n), n], np.r_[np.ones(n), n]).ravel() / (2 * n)
    best = minimize(lambda p: np.sum(p * np.log(p)) - p @ z, start, jac=lambda p: np.log(p) + 1 - z,
                    bounds=[(1e-12, None)] * Z.size, method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000},
                    constraints={"type": "eq", "fun": lambda p: A @ p - marginal, "jac": lambda p: A})
    assert np.abs(A @ best.x - marginal).max() < 1e-9
    got = sinkhorn(sim, tau, number(score), 1000).exp()
    assert_close(got[0], best.x.reshape(n + 1, n + 1)[:n, :n], 1e-4)


def test_sinkhorn_tends_to_the_linear_program():
    sim, score, n = normal(1, 6, 6), 0.8, 6
    Z, A, marginal = transport_problem(sim[0], score)
    plan = linprog(-Z.ravel(), A_eq=A, b_eq=marginal).x.reshape(n + 1, n + 1)[:n, :n]
    assert 0 < plan.sum() < n      # some stay without a partner
    assert_close(sinkhorn(sim, 0.003, number(score), 2000).exp()[0], plan, 1e-3)


# The sum of them --------------------------------------------------------------------------------------------


def run(tokens, tokens_, match, valid, valid_, autocast=False, **options):
    """s2dc_loss without L_g, and the gradients of L_p2p + L_p2s for both sides and for Sinkhorn's score."""
    tokens, tokens_ = tokens.clone().requires_grad_(), tokens_.clone().requires_grad_()
    score = number(0.3).to(tokens.device, torch.promote_types(tokens.dtype, torch.float32)).requires_grad_()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        out = s2dc_loss(tokens, tokens_, match, None, None, None, weights=(0, 1, 1), bin_score=score,
                        valid=valid, valid_=valid_, **{"temperature": 0.2, "iterations": 6, **options})
    out["loss"].backward()
    return out, tokens.grad, tokens_.grad, score.grad


@pytest.mark.parametrize("detach", [True, False])
@each_form
@each_matching
def test_p2p_and_p2s_value_and_gradient(matching, form, detach):
    parts = scene(b=2, t=5, c=3)
    out, gradient, gradient_, slant = run(*parts, matching=matching, form=form, detach=detach)
    a, b, match, valid, valid_ = (x.numpy() for x in parts)
    fixed = [cosines(*pair) for pair in zip(a, b)] if detach else None

    def loop(x, y, score=0.3):
        return loop_terms(x, y, match, valid, valid_, matching, 0.2, form, float(score), fixed=fixed)

    assert_close(torch.stack([out["p2p"], out["p2s"]]), loop(a, b))
    assert out["p2p"] > 0 and out["p2s"] > 0
    assert_close(gradient, slope(lambda x: sum(loop(x, b)), a), 1e-6)
    assert_close(gradient_, slope(lambda y: sum(loop(a, y)), b), 1e-6)
    if matching == "sinkhorn":
        assert_close(slant, slope(lambda score: sum(loop(a, b, score)), np.array(0.3)), 1e-6)


def test_total_weights_and_diagnostics():
    tokens, tokens_, match, valid, valid_ = scene()
    query, key, queue = normal(3, 5), normal(3, 5, seed=1), normal(6, 5, seed=2)
    out = s2dc_loss(tokens.clone().requires_grad_(), tokens_, match, query, key, queue, weights=(2, 3, 5),
                    global_temperature=0.4, valid=valid, valid_=valid_)
    assert_close(out["global"], info_nce(query, key, queue, 0.4))
    assert out["loss"].requires_grad and out["p2p"].requires_grad
    assert_close(out["loss"], 2 * out["global"] + 3 * out["p2p"] + 5 * out["p2s"])
    hits, matched, partners = 0, 0, 0
    for s in range(3):
        M, columns = cosines(tokens[s].numpy(), tokens_[s].numpy()), np.flatnonzero(valid_[s])
        for i in np.flatnonzero(valid[s]):
            true = [j for j in columns if match[s, i, j]]
            partners += len(true)
            matched += len(true) > 0
            hits += columns[M[i, columns].argmax()] in true
    assert 0 < hits < matched
    assert_close(out["accuracy"], np.float32(hits / matched), 1e-6)
    assert_close(out["matches"], np.float32(partners / int(valid.sum())), 1e-6)
    assert not any(out[name].requires_grad for name in ("accuracy", "matches", "spread"))


def test_spread_shows_collapse():
    def of(x, valid=None):
        nothing = torch.zeros(0, 3, dtype=torch.long)
        return s2dc_loss(x, x, nothing, None, None, None, weights=(0, 1, 1), valid=valid)["spread"]

    assert_close(of(normal(1, 1000, 8)), 1.0, 0.02)
    assert_close(of(normal(1, 1, 8).expand(1, 1000, 8)), 0.0, 1e-6)
    x, valid = normal(2, 50, 8), torch.ones(2, 50, dtype=torch.bool)
    valid[0, 30:] = valid[1, 5:9] = False
    unit = [(x[s] / x[s].norm(dim=1, keepdim=True))[valid[s]].numpy() for s in range(2)]
    assert_close(of(x, valid), np.mean([u.std(axis=0).mean() * 8 ** 0.5 for u in unit]))


@pytest.mark.parametrize("block", [4, 100])
@each_matching
@each_form
def test_no_match_gives_exactly_nothing(form, matching, block):
    tokens, tokens_, match, valid, valid_ = scene()
    nothing, empty = torch.zeros_like(valid), torch.zeros(0, 3, dtype=torch.long)
    for parts in ([x[-1:] for x in scene()],                                        # matches on padding only
                  (tokens, tokens_, match & False, None, None), (tokens, tokens_, empty, None, None),
                  (tokens, tokens_, match, nothing, valid_), (tokens, tokens_, match, valid, nothing),
                  (tokens, tokens_, match, nothing, nothing)):                      # nothing inside the scan
        out, gradient, gradient_, score = run(*parts, form=form, matching=matching, detach=False, block=block)
        assert out["p2p"] == 0 and out["p2s"] == 0 and out["accuracy"] == 0 and out["matches"] == 0
        assert not gradient.any() and not gradient_.any() and (score is None or score == 0)
        assert all(x.isfinite() for x in out.values())


@pytest.mark.parametrize("block", [4, 100])
@each_matching
@each_form
def test_padding_tokens_take_no_part(form, matching, block):
    tokens, tokens_, match, valid, valid_ = (x[:1] for x in scene())
    valid[:], valid_[:] = torch.arange(7) < 6, torch.arange(7) > 0                  # equally many, to be cut
    options = dict(form=form, matching=matching, detach=False)
    out, gradient, gradient_, _ = run(tokens, tokens_, match, valid, valid_, block=block, **options)
    cut, small, small_, _ = run(tokens[:, :6], tokens_[:, 1:], match[:, :6, 1:], None, None, **options)
    assert out["p2s"] > 0
    for name in ("p2p", "p2s", "accuracy", "matches", "spread"):
        assert_close(out[name], cut[name])
    assert_close(gradient[:, :6], small)
    assert_close(gradient_[:, 1:], small_)
    assert not gradient[:, 6:].any() and not gradient_[:, :1].any()


def test_log_of_an_invalid_token_does_not_reach_the_loss():
    tokens, tokens_, match, valid, valid_ = scene()
    sim = similarity(tokens, tokens_).requires_grad_()
    both = dual_softmax(sim, 0.2, valid, valid_), sinkhorn(sim, 0.2, number(1.), 5, valid, valid_)
    for log_M_hat in both:
        assert (log_M_hat[match] == -torch.inf).any()
        value = patch_to_structure(log_M_hat, match, sim, detach=False, valid=valid, valid_=valid_)
        value = value + patch_to_patch(log_M_hat, match)
        value.backward()
        assert value < 1e3 and sim.grad.isfinite().all()


# Blocks -----------------------------------------------------------------------------------------------------


def assert_equal_runs(a, b):
    """Of `run`: all terms and gradients."""
    for name in a[0]:
        assert_close(a[0][name], b[0][name])
    for x, y in zip(a[1:], b[1:]):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.any()
            assert_close(x, y)


@pytest.mark.parametrize("detach", [True, False])
@each_form
@each_matching
def test_blocks_equal_the_plain_form(matching, form, detach):
    tokens, tokens_, match, valid, valid_ = scene(b=3, t=23, c=5)
    options = dict(matching=matching, form=form, detach=detach)
    plain = run(tokens, tokens_, match, valid, valid_, **options)
    for M_gt, block in ((match, 11), (match.nonzero(), 11), (match.nonzero(), 4096)):  # 11: 5 rows, at last 3
        assert_equal_runs(run(tokens, tokens_, M_gt, valid, valid_, block=block, **options), plain)


@each_form
def test_blocks_equal_the_plain_form_with_ties(form):
    corners = torch.cat([torch.eye(4), -torch.eye(4), torch.tensor([[1., 1, 1, 1], [1, -1, 1, -1]]) / 2])
    pick = torch.randint(10, (2, 2, 17), generator=torch.Generator().manual_seed(3))  # exact ties
    tokens, tokens_ = corners[pick].double()
    match = (pick[0][:, :, None] == pick[1][:, None]) & (normal(2, 17, 17) > -1)
    assert match.sum(2).max() > 2
    plain = run(tokens, tokens_, match, None, None, form=form, detach=False)
    blocks = run(tokens, tokens_, match.nonzero(), None, None, form=form, detach=False, block=9)
    assert_equal_runs(blocks, plain)


@each_matching
@each_form
def test_blocks_in_float32_and_bfloat16(form, matching):
    tokens, tokens_, match, valid, valid_ = scene(b=2, t=150, c=16)
    tokens, tokens_ = tokens.bfloat16(), tokens_.bfloat16()
    match &= normal(2, 150, 150, seed=8) > 1.5
    options = dict(matching=matching, form=form)
    exact, exact_gradient, *_ = run(tokens.double(), tokens_.double(), match, valid, valid_, **options)
    peak = exact_gradient.abs().max()
    for block in (40, 4096):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):  # a gradient is as fine as x
            got, gradient, *_ = run(tokens.to(dtype), tokens_.to(dtype), match, valid, valid_, block=block,
                                    autocast=True, **options)
            assert got["loss"].dtype == torch.float32
            for name in ("p2p", "p2s", "spread", "accuracy"):
                assert_close(got[name].double(), exact[name].double(), 1e-5)
            assert_close(gradient.double() / peak, exact_gradient / peak, tolerance)


@pytest.mark.parametrize("block", [10, 100])
@each_matching
def test_extreme_logits(matching, block):
    tokens = F.normalize(normal(1, 32, 4).float(), dim=2)
    match = torch.eye(32, dtype=torch.bool)[None].roll(5, 2)  # all matches are wrong
    options = dict(temperature=0.01, matching=matching, detach=False, block=block)
    for form in FORMS:
        out, gradient, gradient_, _ = run(tokens, tokens, match, None, None, form=form, **options)
        assert all(x.isfinite().all() for x in (*out.values(), gradient, gradient_))
    a, everyone = tokens.double().numpy(), np.ones((1, 32))
    want = loop_terms(a, a, match.numpy(), everyone, everyone, matching, 0.01, "sum")[0]
    assert want > 50
    assert_close(out["p2p"].double(), want, 1e-5)


def test_extreme_logits_of_info_nce():
    query, queue = normal(2, 4), normal(6, 4, seed=1)
    got = info_nce(query.float(), -query.float(), queue.float(), 0.005)                  # the worst answer
    assert got > 200
    assert_close(got.double(), loop_info_nce(query.numpy(), -query.numpy(), queue.numpy(), 0.005), 1e-5)


MEMORY = """
import torch
from losses import s2dc_loss
torch.set_num_threads(1)
t, c = 4096, 8
tokens, tokens_ = torch.randn(1, t, c, requires_grad=True), torch.randn(1, t, c)
i = torch.arange(t)
pairs = torch.stack([0 * i, i, i.flip(0)], 1)
def mib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
def backward(t, pairs, block):
    s2dc_loss(tokens[:, :t], tokens_[:, :t], pairs, None, None, None, weights=(0, 1, 1), form="released",
              block=block)["loss"].backward()
backward(64, pairs[:1] * 0, 16)
before = mib("VmRSS")
backward(t, pairs, 512)
print(mib("VmHWM") - before, tokens.grad.abs().sum().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_blocks_never_hold_a_full_matrix():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # else libc keeps freed blocks
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment,
                         cwd=Path(losses.__file__).parent)
    assert out.returncode == 0, out.stderr
    growth, gradient = map(float, out.stdout.split())
    assert growth < 50 and gradient > 0                 # MiB; one matrix of 4096 x 4096 float32 alone has 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_matching
@each_form
def test_the_same_on_a_gpu(form, matching):
    parts = scene(b=2, t=40, c=8)
    for block in (17, 100):
        options = dict(form=form, matching=matching, detach=False, block=block)
        here, there = run(*parts, **options), run(*(x.cuda() for x in parts), autocast=True, **options)
        for name in here[0]:
            assert_close(there[0][name], here[0][name])
        assert_close(there[1], here[1])


@pytest.mark.parametrize("words, change", [
    (r"tokens_: expected \(3, 7, 4\)", lambda kept: dict(tokens_=kept["tokens_"][:, :3])),
    ("M_gt: expected", lambda kept: dict(M_gt=kept["M_gt"][0])),
    ("M_gt: expected .*float32", lambda kept: dict(M_gt=kept["M_gt"].float())),
    (r"valid: expected \(3, 7\)", lambda kept: dict(valid=torch.ones(7, dtype=torch.bool))),
    ("valid_: expected", lambda kept: dict(valid_=torch.ones(3, 7))),
    ("form: .* found 'other'", lambda kept: dict(form="other")),
    ("form: .* found 'other'", lambda kept: dict(form="other", block=3)),
    ("matching: expected", lambda kept: dict(matching="optimal")),
    ("bin_score: expected", lambda kept: dict(matching="sinkhorn")),
    ("iterations: expected", lambda kept: dict(matching="sinkhorn", bin_score=number(1.), iterations=0)),
])
def test_bad_input_is_named(words, change):
    tokens, tokens_, match, *_ = scene()
    kept = dict(tokens=tokens, tokens_=tokens_, M_gt=match, weights=(0, 1, 1))
    kept |= dict(query=None, key=None, queue=None)
    with pytest.raises(ValueError, match=words) as error:
        s2dc_loss(**kept | change(kept))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="dim: expected 1 or 2"):
        sharpe_ratio(match.float(), 0)


# Downstream -------------------------------------------------------------------------------------------------


def same_as(theirs, ours, logits):
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, witness = ours(a), theirs(b)
    assert_close(value, witness)
    value.backward(), witness.backward()
    assert_close(a.grad, b.grad)


def labelled():                         # of four classes the last is absent
    generator = torch.Generator().manual_seed(0)
    return 3 * normal(2, 4, 6, 5, 7), torch.randint(3, (2, 1, 6, 5, 7), generator=generator)


@pytest.mark.parametrize("background", [True, False])
def test_dice_ce_equals_monai(background):
    monai = pytest.importorskip("monai.losses")
    theirs = monai.DiceCELoss(to_onehot_y=True, softmax=True, include_background=background)
    logits, target = labelled()
    for given in (target, target[:, 0].to(torch.uint8)):
        same_as(lambda x: theirs(x, target), lambda x: dice_ce(x, given, background), logits)
    with pytest.raises(ValueError, match="target: expected integer class ids"):
        dice_ce(logits, target.float())


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_balanced_cross_entropy_is_torchs_with_the_weights_of_each_sample(balance):
    logits, target = labelled()
    target[0][target[0] == 2], target[1][:, :3] = 1, 0  # the first sample lacks class 2 too

    def theirs(x):
        parts = []
        for n in range(2):
            counts = np.bincount(target[n].numpy().ravel(), minlength=4)
            weight = torch.tensor([(210 / c) ** balance if c else 1e9 for c in counts])
            parts.append(F.cross_entropy(x[n:n + 1], target[n], weight))
        return sum(parts) / 2

    def ours(x):
        return dice_ce(x, target, balance=balance) - dice_ce(x, target) + F.cross_entropy(x, target[:, 0])

    same_as(theirs, ours, logits)
    halves = [dice_ce(logits[n:n + 1], target[n:n + 1], balance=balance) for n in range(2)]
    assert_close(dice_ce(logits, target, balance=balance), sum(halves) / 2)


def test_dice_bce_equals_monai():
    monai = pytest.importorskip("monai.losses")
    dice = monai.DiceLoss(sigmoid=True)
    logits, target = 3 * normal(2, 3, 6, 5, 7), normal(2, 3, 6, 5, 7, seed=1) > 0.5
    target[1, 2] = False                                            # a region that the sample lacks
    y = target.double()
    same_as(lambda x: dice(x, y) + F.binary_cross_entropy(x.sigmoid(), y),
            lambda x: dice_bce(x, target), logits)
    with pytest.raises(ValueError, match="target: expected"):
        dice_bce(logits, target[:, :1])


def test_downstream_in_bfloat16_under_autocast():
    logits, target = (3 * normal(2, 3, 8, 8, 8)).bfloat16(), normal(2, 3, 8, 8, 8, seed=1) > 0.5
    for loss in (lambda x: dice_ce(x, target[:, 0].long()), lambda x: dice_bce(x, target),
                 lambda x: masked_l1_l2(x, 0 * x, target),
                 lambda x: reconstruction_loss(x, x.roll(1, 2), 4.0)):
        exact = loss(logits.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(loss(logits).double(), exact, 1e-5)


def test_masked_l1_l2():
    prediction, target = normal(3, 2, 4, 4, 4).requires_grad_(), normal(3, 2, 4, 4, 4, seed=1)
    mask = target[:, :1] >= -0.35
    mask[1] = False                                                                 # an empty sample
    target[1], target[0, :, 0, 0, 0], mask[0, :, 0, 0, 0] = np.nan, np.inf, False   # outside is not read
    value = masked_l1_l2(prediction, target, mask, l1=0.5, l2=10)
    value.backward()
    want, gradient = 0, np.zeros(prediction.shape)
    p, y, m = prediction.detach().numpy(), target.numpy(), np.broadcast_to(mask.numpy(), target.shape)
    for s in (0, 2):
        error, n = (p[s] - y[s])[m[s]], m[s].sum()
        want += (0.5 * np.abs(error).sum() + 10 * (error ** 2).sum()) / n / 3
        gradient[s][m[s]] = (0.5 * np.sign(error) + 20 * error) / n / 3
    assert_close(value, want)
    assert_close(prediction.grad, gradient)


def test_reconstruction_loss_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    y = 500 + 100 * F.avg_pool3d(normal(2, 1, 14, 15, 12), 3, 1)
    x = y + 25 * normal(*y.shape, seed=1)
    span = torch.stack([volume.max() - volume.min() for volume in y])
    ssim = np.mean([metrics.structural_similarity(y[s, 0].numpy(), x[s, 0].numpy(), data_range=float(span[s]))
                    for s in range(2)])
    l1 = np.mean([(x[s] - y[s]).abs().mean() / span[s] for s in range(2)])
    assert 0.1 < ssim < 0.95
    assert_close(reconstruction_loss(x, y, span), 0.95 * l1 + 0.05 * (1 - ssim))
    assert_close(reconstruction_loss(x, y, span, ssim_weight=1), 1 - ssim)
    assert_close(reconstruction_loss(1e4 * x, 1e4 * y, 1e4 * span), reconstruction_loss(x, y, span))
    small, small_ = (volume[:, :, :8, :7, :7] / 100 for volume in (x, y))
    small = small.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reconstruction_loss(x, small_, 1.0, 0.5), small, fast_mode=True)
    with pytest.raises(ValueError, match="volume: expected at least 7 voxels"):
        reconstruction_loss(x[..., :6], y[..., :6], 1.0)
