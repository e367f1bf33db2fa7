"""Every equation against loops in numpy that were written from the paper, in value and in gradient (central differences of the
loops). Sinkhorn against a convex solver, a linear program and plain scaling; downstream losses against MONAI and scikit-image."""
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
    reconstruction_loss,
    s2dc_loss,
    sharpe_ratio,
    similarity,
    sinkhorn,
)

FORMS = ["printed", "sum", "mean", "released"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


# The paper in loops -------------------------------------------------------------------------------


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / (np.sqrt(sum(x * x for x in a)) * np.sqrt(sum(y * y for y in b)))


def loop_info_nce(query, key, queue, tau):
    value = 0
    for q, k in zip(query, key):
        terms = [np.exp(cosine(q, other) / tau) for other in [k, *queue]]
        value -= np.log(terms[0] / sum(terms)) / len(query)
    return value


def loop_dual_softmax(M, tau, rows, columns):
    """M (t, t) of one sample, rows and columns: the indices that take part -> probabilities, nan elsewhere."""
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


def loop_structure(M, M_hat, match, rows, columns, form, fixed=None):
    """Eq. 7-8 of one sample; fixed: similarities that the Sharpe ratios take instead of M (detached weights)."""
    S = M if fixed is None else fixed
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


def loop_terms(tokens, tokens_, match, valid, valid_, matching, tau, form, score=0.3, iterations=6, fixed=None):
    """L_p2p, L_p2s: means over the samples."""
    p2p, p2s = 0, 0
    for s in range(len(tokens)):
        M = np.array([[cosine(a, b) for b in tokens_[s]] for a in tokens[s]])
        rows, columns = np.flatnonzero(valid[s]), np.flatnonzero(valid_[s])
        M_hat = (loop_dual_softmax(M, tau, rows, columns) if matching == "dual_softmax" else
                 loop_sinkhorn(M, tau, score, iterations, rows, columns))
        found = [-np.log(M_hat[i, j]) for i in rows for j in columns if match[s, i, j]]
        p2p += sum(found) / max(len(found), 1) / len(tokens)
        p2s += loop_structure(M, M_hat, match[s], rows, columns, form, None if fixed is None else fixed[s]) / len(tokens)
    return p2p, p2s


def scene(b=3, t=7, c=4, seed=1):
    """Tokens, matches with several partners, and padding; the last sample has matches on padding only, that is none."""
    tokens, tokens_ = normal(b, t, c, seed=seed), normal(b, t, c, seed=seed + 1)
    match = normal(b, t, t, seed=seed + 2) > 0.7
    valid, valid_ = normal(b, t, seed=seed + 3) > -0.8, normal(b, t, seed=seed + 4) > -0.8
    valid[:, 0] = valid_[0, t - 1] = False
    match[-1] = False
    match[-1, 0, :] = True
    assert match[0].sum(1).max() > 1 and valid.sum(1).min() > 1 and valid_.sum(1).min() > 1
    return tokens, tokens_, match, valid, valid_


# One equation at a time ---------------------------------------------------------------------------


def test_info_nce_value_and_gradient():
    query, key, queue = normal(3, 5), normal(3, 5, seed=1), normal(6, 5, seed=2)
    query.requires_grad_(), key.requires_grad_()
    value = info_nce(query, key, queue, 0.2)
    value.backward()
    q, k, n = query.detach().numpy(), key.detach().numpy(), queue.numpy()
    assert_close(value, loop_info_nce(q, k, n, 0.2))
    assert_close(query.grad, slope(lambda x: loop_info_nce(x, k, n, 0.2), q), 1e-7)
    assert_close(key.grad, slope(lambda x: loop_info_nce(q, x, n, 0.2), k), 1e-7)


def test_info_nce_limits():
    e = torch.eye(4, dtype=torch.float64)
    assert_close(info_nce(e[:1], e[:1], e[:1].repeat(9, 1), 0.5), np.log(10))              # all alike
    assert info_nce(e[:1], e[:1], -e[:1].repeat(9, 1), 0.01) < 1e-9                 # found with certainty


def test_similarity_is_the_cosine():
    q, k = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    assert_close(similarity(q, k), [[[cosine(a, b) for b in k[s].numpy()] for a in q[s].numpy()] for s in range(2)])


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
        keep = np.flatnonzero(valid[s])
        want = [loop_sharpe(sim[s].numpy()[n, keep] if dim == 2 else sim[s].numpy()[keep, n]) for n in range(7)]
        assert_close(got[s], want)
    assert torch.autograd.gradcheck(lambda x: sharpe_ratio(x, dim, valid), sim.requires_grad_())


def test_sharpe_ratio_without_spread():
    sim = torch.full((1, 7, 7), 0.1 + 0.2, requires_grad=True)                      # whose mean is not exact in float32
    ratio = sharpe_ratio(sim, 2)
    ratio.sum().backward()
    assert ratio.abs().max() < 0.1 and sim.grad.isfinite().all()
    assert not sharpe_ratio(sim, 2, torch.zeros(1, 7, dtype=torch.bool)).any()      # no tokens at all


# Sinkhorn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 7])
def test_sinkhorn_equals_scaling(iterations):
    _, _, _, valid, valid_ = scene()
    sim = normal(3, 7, 7).tanh()
    got = sinkhorn(sim, 0.2, torch.tensor(0.3, dtype=torch.float64), iterations, valid, valid_)
    for s in range(3):
        want = loop_sinkhorn(sim[s].numpy(), 0.2, 0.3, iterations, np.flatnonzero(valid[s]), np.flatnonzero(valid_[s]))
        assert_close(got[s].exp(), np.nan_to_num(want))


def test_sinkhorn_marginals():
    sim, score = normal(2, 6, 6).tanh(), torch.tensor(0.2, dtype=torch.float64)
    valid, valid_ = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    P = sinkhorn(sim, 0.1, score, 2000, valid, valid_).exp()
    assert (P.sum(2) <= 1 + 1e-9).all() and (P.sum(1) <= 1 + 1e-9).all()
    assert not P[1, 4:].any()
    certain = sinkhorn(sim, 0.5, score - 20, 2000).exp()                            # bins too poor to be used: doubly stochastic
    assert_close(certain.sum(2), torch.ones(2, 6), 1e-3)                       # at this limit the error falls as 1 / iterations
    assert_close(certain.sum(1), torch.ones(2, 6), 1e-3)
    assert sinkhorn(sim, 0.1, score + 5, 2000).exp().max() < 1e-9                   # bins that beat every partner


def transport_constraints(n, m):
    """A P.flatten() = marginals for (n + 1, m + 1) plans."""
    A = np.array([[r == row for r in range(n + 1) for _ in range(m + 1)] for row in range(n + 1)]
                 + [[c == column for _ in range(n + 1) for c in range(m + 1)] for column in range(m + 1)], float)
    return A[:-1], np.r_[np.ones(n), m, np.ones(m)]                                 # the last one follows from the others


def test_sinkhorn_solves_the_stated_problem():
    sim, tau, score, n = normal(1, 3, 3).tanh(), 0.5, 0.1, 3
    Z = np.full((n + 1, n + 1), score)
    Z[:n, :n] = sim[0]
    A, marginal = transport_constraints(n, n)
    start = np.outer(np.r_[np.ones(n), n], np.r_[np.ones(n), n]).ravel() / (2 * n)
    best = minimize(lambda p: np.sum(p * np.log(p)) - p @ Z.ravel() / tau, start, jac=lambda p: np.log(p) + 1 - Z.ravel() / tau,
                    bounds=[(1e-12, None)] * Z.size, method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000},
                    constraints={"type": "eq", "fun": lambda p: A @ p - marginal, "jac": lambda p: A})
    assert np.abs(A @ best.x - marginal).max() < 1e-9
    got = sinkhorn(sim, tau, torch.tensor(score, dtype=torch.float64), 1000).exp()
    assert_close(got[0], best.x.reshape(n + 1, n + 1)[:n, :n], 1e-5)


def test_sinkhorn_tends_to_the_linear_program():
    sim, score, n = normal(1, 6, 6), 0.8, 6
    Z = np.full((n + 1, n + 1), score)
    Z[:n, :n] = sim[0]
    A, marginal = transport_constraints(n, n)
    plan = linprog(-Z.ravel(), A_eq=A, b_eq=marginal).x.reshape(n + 1, n + 1)[:n, :n]
    assert 0 < plan.sum() < n                                                       # some tokens stay without a partner
    assert_close(sinkhorn(sim, 0.003, torch.tensor(score, dtype=torch.float64), 2000).exp()[0], plan, 1e-3)


def test_sinkhorn_gradients_of_similarity_and_score():
    sim, score = normal(1, 4, 4).tanh().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    pick = normal(4, 4, seed=9).numpy()
    (sinkhorn(sim, 0.2, score, 5)[0] * torch.from_numpy(pick)).sum().backward()
    loop = lambda x, y: np.sum(pick * np.log(loop_sinkhorn(x[0], 0.2, float(y), 5, range(4), range(4))))
    assert_close(sim.grad, slope(lambda x: loop(x, 0.3), sim.detach().numpy()), 1e-6)
    assert_close(score.grad, slope(lambda y: loop(sim.detach().numpy(), y), np.array(0.3)), 1e-6)


# The sum of them ----------------------------------------------------------------------------------


def run(tokens, tokens_, match, valid, valid_, autocast=False, **options):
    """s2dc_loss without L_g, and the gradients of L_p2p + L_p2s for both sides and for Sinkhorn's score."""
    tokens, tokens_ = tokens.clone().requires_grad_(), tokens_.clone().requires_grad_()
    score = torch.tensor(0.3, dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device, requires_grad=True)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        out = s2dc_loss(tokens, tokens_, match, None, None, None, weights=(0, 1, 1), valid=valid, valid_=valid_, bin_score=score,
                        **{"temperature": 0.2, "iterations": 6, **options})
    out["loss"].backward()
    return out, tokens.grad, tokens_.grad, score.grad


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])
def test_p2p_and_p2s_value_and_gradient(matching, form, detach):
    parts = scene(b=2, t=5, c=3)
    out, gradient, gradient_, _ = run(*parts, matching=matching, form=form, detach=detach)
    a, b, match, valid, valid_ = (x.numpy() for x in parts)
    fixed = np.array([[[cosine(x, y) for y in b[s]] for x in a[s]] for s in range(2)]) if detach else None
    loop = lambda x, y: loop_terms(x, y, match, valid, valid_, matching, 0.2, form, fixed=fixed)
    assert_close(torch.stack([out["p2p"], out["p2s"]]), loop(a, b))
    assert out["p2p"] > 0 and out["p2s"] > 0
    assert_close(gradient, slope(lambda x: sum(loop(x, b)), a), 1e-6)
    assert_close(gradient_, slope(lambda y: sum(loop(a, y)), b), 1e-6)


def test_temperature_of_the_sharpe_weights():
    sim, match = normal(1, 5, 5).tanh(), torch.eye(5, dtype=torch.bool)[None]
    log_M_hat, uniform = dual_softmax(sim, 0.2), patch_to_patch(dual_softmax(sim, 0.2), match)
    assert_close(patch_to_structure(log_M_hat, match, sim, temperature_sr=1e9), uniform, 1e-6)         # equal weights
    sharp = patch_to_structure(log_M_hat, match, sim, temperature_sr=1e-3)                      # the two highest peaks alone
    row, column = (loop_sharpe_argmax(sim[0].numpy(), axis) for axis in (0, 1))
    assert_close(sharp, -(log_M_hat[0, row, row] + log_M_hat[0, column, column]) / 2, 1e-6)


def test_weights_that_vanish_are_no_division_by_zero():
    sim = normal(1, 5, 5).tanh().requires_grad_()
    peak, peak_ = (loop_sharpe_argmax(sim[0].detach().numpy(), axis) for axis in (0, 1))
    match = torch.ones(1, 5, 5, dtype=torch.bool)
    match[:, peak], match[:, :, peak_] = False, False
    value = patch_to_structure(dual_softmax(sim, 0.2), match, sim, form="mean", detach=False, temperature_sr=1e-6)
    value.backward()
    assert value == 0 and sim.grad.isfinite().all()


def loop_sharpe_argmax(M, axis):
    return int(np.argmax([loop_sharpe(M[n] if axis == 0 else M[:, n]) for n in range(len(M))]))


def test_total_weights_and_diagnostics():
    tokens, tokens_, match, valid, valid_ = scene()
    query, key, queue = normal(3, 5), normal(3, 5, seed=1), normal(6, 5, seed=2)
    out = s2dc_loss(tokens.clone().requires_grad_(), tokens_, match, query, key, queue, weights=(2, 3, 5), global_temperature=0.4,
                    valid=valid, valid_=valid_)
    assert_close(out["global"], info_nce(query, key, queue, 0.4))
    assert out["loss"].requires_grad and out["p2p"].requires_grad
    assert_close(out["loss"], 2 * out["global"] + 3 * out["p2p"] + 5 * out["p2s"])
    hits, matched, partners = 0, 0, 0
    for s in range(3):
        columns = np.flatnonzero(valid_[s])
        for i in np.flatnonzero(valid[s]):
            true = [j for j in columns if match[s, i, j]]
            partners += len(true)
            if true:
                matched += 1
                hits += columns[np.argmax([cosine(tokens[s, i].numpy(), tokens_[s, j].numpy()) for j in columns])] in true
    assert 0 < hits < matched
    assert_close(out["accuracy"], np.float32(hits / matched), 1e-6)
    assert_close(out["matches"], np.float32(partners / int(valid.sum())), 1e-6)
    assert not any(out[name].requires_grad for name in ("accuracy", "matches", "spread"))


def test_spread_shows_collapse():
    of = lambda x: s2dc_loss(x, x, torch.eye(x.shape[1], dtype=torch.bool)[None], None, None, None, weights=(0, 1, 1))["spread"]
    assert_close(of(normal(1, 1000, 8)), 1.0, 0.02)
    assert_close(of(normal(1, 1, 8).expand(1, 1000, 8)), 0.0, 1e-6)
    x, valid = normal(2, 50, 8), torch.ones(2, 50, dtype=torch.bool)
    valid[0, 30:] = valid[1, 5:9] = False
    got = s2dc_loss(x, x, torch.zeros(2, 50, 50, dtype=torch.bool), None, None, None, weights=(0, 1, 1), valid=valid)["spread"]
    unit = [(x[s] / x[s].norm(dim=1, keepdim=True))[valid[s]].numpy() for s in range(2)]
    assert_close(got, np.mean([u.std(axis=0).mean() * 8 ** 0.5 for u in unit]))


@pytest.mark.parametrize("block", [4, 100])
@pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])
@pytest.mark.parametrize("form", FORMS)
def test_no_match_gives_exactly_nothing(form, matching, block):
    tokens, tokens_, match, valid, valid_ = scene()
    last, nothing, empty = slice(-1, None), torch.zeros_like(valid), torch.zeros(0, 3, dtype=torch.long)
    for parts in ((tokens[last], tokens_[last], match[last], valid[last], valid_[last]),        # matches on padding only
                  (tokens, tokens_, torch.zeros_like(match), None, None), (tokens, tokens_, empty, None, None),
                  (tokens, tokens_, match, nothing, valid_), (tokens, tokens_, match, valid, nothing),
                  (tokens, tokens_, match, nothing, nothing)):                                  # nothing inside the scan
        out, gradient, gradient_, score = run(*parts, form=form, matching=matching, detach=False, block=block)
        assert out["p2p"] == 0 and out["p2s"] == 0 and out["accuracy"] == 0 and out["matches"] == 0
        assert not gradient.any() and not gradient_.any() and (score is None or score == 0)
        assert all(x.isfinite() for x in out.values())


@pytest.mark.parametrize("block", [4, 100])
@pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_tokens_take_no_part(form, matching, block):
    tokens, tokens_, match, valid, valid_ = (x[:1] for x in scene())
    valid[:], valid_[:] = torch.arange(7) < 6, torch.arange(7) > 0                  # equally many, so that they can be cut
    options = dict(form=form, matching=matching, detach=False)
    out, gradient, gradient_, _ = run(tokens, tokens_, match, valid, valid_, block=block, **options)
    cut, small, small_, _ = run(tokens[:, :6], tokens_[:, 1:], match[:, :6, 1:], None, None, **options)
    assert out["p2s"] > 0
    for name in ("p2p", "p2s", "accuracy", "matches", "spread"):
        assert_close(out[name], cut[name])
    assert_close(gradient[:, :6], small)
    assert_close(gradient_[:, 1:], small_)
    assert not gradient[:, 6:].any() and not gradient_[:, :1].any()


@pytest.mark.parametrize("form", FORMS)
def test_batch_is_the_mean_of_its_samples(form):
    tokens, tokens_, match, valid, valid_ = scene()
    out, gradient, *_ = run(tokens, tokens_, match, valid, valid_, form=form)
    alone = [run(*(x[s:s + 1] for x in (tokens, tokens_, match, valid, valid_)), form=form) for s in range(3)]
    for name in ("p2p", "p2s"):
        assert_close(out[name], torch.stack([one[0][name] for one in alone]).mean())
    assert_close(gradient, torch.cat([one[1] for one in alone]) / 3)


def test_log_of_an_invalid_token_does_not_reach_the_loss():
    tokens, tokens_, match, valid, valid_ = scene()
    sim = similarity(tokens, tokens_).requires_grad_()
    for log_M_hat in (dual_softmax(sim, 0.2, valid, valid_), sinkhorn(sim, 0.2, torch.tensor(1.0), 5, valid, valid_)):
        assert (log_M_hat[match] == -torch.inf).any()
        value = patch_to_patch(log_M_hat, match) + patch_to_structure(log_M_hat, match, sim, detach=False, valid=valid, valid_=valid_)
        value.backward()
        assert value < 1e3 and sim.grad.isfinite().all()


# Blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])
def test_blocks_equal_the_plain_form(matching, form, detach):
    tokens, tokens_, match, valid, valid_ = scene(b=3, t=23, c=5)
    options = dict(matching=matching, form=form, detach=detach)
    plain = run(tokens, tokens_, match, valid, valid_, **options)
    for where in (match, match.nonzero()):
        blocks = run(tokens, tokens_, where, valid, valid_, block=11, **options)        # 5 rows at a time, 3 in the last block
        for name in plain[0]:
            assert_close(blocks[0][name], plain[0][name])
        for a, b in zip(blocks[1:], plain[1:]):
            assert (a is None) == (b is None) and (a is None or a.any())
            a is None or assert_close(a, b)
    listed = run(tokens, tokens_, match.nonzero(), valid, valid_, **options)
    assert_close(listed[1], plain[1])


@pytest.mark.parametrize("form", FORMS)
def test_blocks_equal_the_plain_form_with_ties(form):
    corners = torch.cat([torch.eye(4), -torch.eye(4), torch.tensor([[1., 1, 1, 1], [1, -1, 1, -1]]) / 2]).double()
    pick = torch.randint(10, (2, 2, 17), generator=torch.Generator().manual_seed(3))        # without rounding: exact ties
    tokens, tokens_ = corners[pick]
    match = (pick[0][:, :, None] == pick[1][:, None]) & (normal(2, 17, 17) > -1)
    assert match.sum(2).max() > 2
    plain = run(tokens, tokens_, match, None, None, form=form, detach=False)
    blocks = run(tokens, tokens_, match.nonzero(), None, None, form=form, detach=False, block=9)
    for name in plain[0]:
        assert_close(blocks[0][name], plain[0][name])
    assert_close(blocks[1], plain[1])
    assert_close(blocks[2], plain[2])


@pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_in_float32_and_bfloat16(form, matching):
    tokens, tokens_, match, valid, valid_ = scene(b=2, t=150, c=16)
    match &= normal(2, 150, 150, seed=8) > 1.5
    exact = run(tokens.bfloat16().double(), tokens_.bfloat16().double(), match, valid, valid_, matching=matching, form=form)
    for block in (40, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            got = run(tokens.bfloat16().to(dtype), tokens_.bfloat16().to(dtype), match, valid, valid_, matching=matching,
                      form=form, block=block, autocast=True)
            assert got[0]["loss"].dtype == torch.float32
            for name in ("p2p", "p2s", "spread", "accuracy"):
                assert_close(got[0][name].double(), exact[0][name].double(), 1e-5)
            peak = exact[1].abs().max()
            assert_close(got[1].double() / peak, exact[1] / peak, 1e-5 if dtype == torch.float32 else 5e-3)    # gradient as fine as x


@pytest.mark.parametrize("block", [10, 100])
@pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])
def test_extreme_logits(matching, block):
    tokens = F.normalize(normal(1, 32, 4).float(), dim=2)
    match = torch.eye(32, dtype=torch.bool)[None].roll(5, 2)                                    # every match is a wrong one
    for form in FORMS:
        out, gradient, gradient_, _ = run(tokens, tokens, match, None, None, temperature=0.01, matching=matching, form=form,
                                          detach=False, block=block)
        assert all(x.isfinite() for x in out.values()) and gradient.isfinite().all() and gradient_.isfinite().all()
    a, everyone = tokens.double().numpy(), np.ones((1, 32))
    want = loop_terms(a, a, match.numpy(), everyone, everyone, matching, 0.01, "sum")[0]
    assert want > 50
    assert_close(out["p2p"].double(), want, 1e-5)


def test_extreme_logits_of_info_nce():
    query, queue = normal(2, 4), normal(6, 4, seed=1)
    got = info_nce(query.float(), -query.float(), queue.float(), 0.005)                         # the worst answer possible
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
size = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
loss = lambda t, pairs, block: s2dc_loss(tokens[:, :t], tokens_[:, :t], pairs, None, None, None, weights=(0, 1, 1),
                                         form="released", block=block)["loss"].backward()
loss(64, pairs[:1] * 0, 16)
before = size("VmRSS")
loss(t, pairs, 512)
print(size("VmHWM") - before, tokens.grad.abs().sum().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_blocks_never_hold_a_full_matrix():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=Path(losses.__file__).parent,
                         env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"})       # else libc keeps freed blocks for itself
    assert out.returncode == 0, out.stderr
    growth, gradient = map(float, out.stdout.split())
    assert growth < 50 and gradient > 0                 # MiB; one matrix of 4096 x 4096 float32 alone has 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("matching", ["dual_softmax", "sinkhorn"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_on_a_gpu(form, matching):
    parts = scene(b=2, t=40, c=8)
    for block in (17, 100):
        here = run(*parts, form=form, matching=matching, detach=False, block=block)
        tokens, tokens_, match, valid, valid_ = (x.cuda() for x in parts)
        there = run(tokens, tokens_, match, valid, valid_, form=form, matching=matching, detach=False, block=block, autocast=True)
        for name in here[0]:
            assert_close(there[0][name], here[0][name])
        assert_close(there[1], here[1])


def test_bad_input_is_named():
    tokens, tokens_, match, valid, valid_ = scene()
    call = lambda **change: s2dc_loss(**{**dict(tokens=tokens, tokens_=tokens_, M_gt=match, query=None, key=None, queue=None,
                                                weights=(0, 1, 1)), **change})
    for change, words in [(dict(tokens_=tokens_[:, :3]), r"tokens_: expected \(3, 7, 4\)"),
                          (dict(M_gt=match[0]), "M_gt: expected"), (dict(M_gt=match.float()), "M_gt: expected .*float32"),
                          (dict(valid=valid[0]), r"valid: expected \(3, 7\)"), (dict(valid_=valid_.float()), "valid_: expected"),
                          (dict(form="other"), "form: .* found 'other'"), (dict(form="other", block=3), "form: .* found 'other'"),
                          (dict(matching="optimal"), "matching: expected"), (dict(matching="sinkhorn"), "bin_score: expected"),
                          (dict(matching="sinkhorn", bin_score=torch.tensor(1.), iterations=0), "iterations: expected")]:
        with pytest.raises(ValueError, match=words) as error:
            call(**change)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="dim: expected 1 or 2"):
        sharpe_ratio(match.float(), 0)


# Downstream ---------------------------------------------------------------------------------------


def same_as(theirs, ours, logits):
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, witness = ours(a), theirs(b)
    assert_close(value, witness)
    value.backward(), witness.backward()
    assert_close(a.grad, b.grad)


@pytest.mark.parametrize("background", [True, False])
def test_dice_ce_equals_monai(background):
    monai = pytest.importorskip("monai.losses")
    theirs = monai.DiceCELoss(to_onehot_y=True, softmax=True, include_background=background)
    logits, target = 3 * normal(2, 4, 6, 5, 7), torch.randint(3, (2, 1, 6, 5, 7), generator=torch.Generator().manual_seed(0))
    same_as(lambda x: theirs(x, target), lambda x: dice_ce(x, target, background), logits)      # class 3 is absent
    same_as(lambda x: theirs(x, target), lambda x: dice_ce(x, target[:, 0].to(torch.uint8), background), logits)
    with pytest.raises(ValueError, match="target: expected integer class ids"):
        dice_ce(logits, target.float())


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_balanced_cross_entropy_is_torchs_with_the_weights_of_each_sample(balance):
    logits, target = 3 * normal(2, 4, 6, 5, 7), torch.randint(3, (2, 1, 6, 5, 7), generator=torch.Generator().manual_seed(0))
    target[0][target[0] == 2], target[1][:, :3] = 1, 0                  # class 3 is absent, from the first sample class 2 too

    def theirs(x):
        parts = []
        for n in range(2):
            counts = np.bincount(target[n].numpy().ravel(), minlength=4)
            weight = torch.tensor([(210 / c) ** balance if c else 1e9 for c in counts])
            parts.append(F.cross_entropy(x[n:n + 1], target[n], weight))
        return sum(parts) / 2
    same_as(theirs, lambda x: dice_ce(x, target, balance=balance) - dice_ce(x, target) + F.cross_entropy(x, target[:, 0]), logits)
    halves = [dice_ce(logits[n:n + 1], target[n:n + 1], balance=balance) for n in range(2)]
    assert_close(dice_ce(logits, target, balance=balance), sum(halves) / 2)


def test_dice_bce_equals_monai():
    monai = pytest.importorskip("monai.losses")
    theirs = monai.DiceLoss(sigmoid=True)
    logits, target = 3 * normal(2, 3, 6, 5, 7), normal(2, 3, 6, 5, 7, seed=1) > 0.5
    target[1, 2] = False                                                                        # a region that the sample lacks
    same_as(lambda x: theirs(x, target.double()) + F.binary_cross_entropy(x.sigmoid(), target.double()),
            lambda x: dice_bce(x, target), logits)
    with pytest.raises(ValueError, match="target: expected"):
        dice_bce(logits, target[:, :1])


def test_downstream_in_bfloat16_under_autocast():
    logits, target = (3 * normal(2, 3, 8, 8, 8)).bfloat16(), normal(2, 3, 8, 8, 8, seed=1) > 0.5
    for loss in (lambda x: dice_ce(x, target[:, 0].long()), lambda x: dice_bce(x, target),
                 lambda x: masked_l1_l2(x, 0 * x, target), lambda x: reconstruction_loss(x, x.roll(1, 2), 4.0)):
        exact = loss(logits.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(loss(logits).double(), exact, 1e-5)


def test_masked_l1_l2():
    prediction, target = normal(3, 2, 4, 4, 4).requires_grad_(), normal(3, 2, 4, 4, 4, seed=1)
    mask = target[:, :1] >= -0.35
    mask[1] = False                                                                             # an empty sample
    target[1], target[0, :, 0, 0, 0], mask[0, :, 0, 0, 0] = np.nan, np.inf, False               # outside is not read
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
    target = 500 + 100 * F.avg_pool3d(normal(2, 1, 14, 15, 12), 3, 1)
    prediction = target + 25 * normal(*target.shape, seed=1)
    span = torch.stack([x.max() - x.min() for x in target])
    ssim = [metrics.structural_similarity(target[s, 0].numpy(), prediction[s, 0].numpy(), data_range=float(span[s]))
            for s in range(2)]
    l1 = [(prediction[s] - target[s]).abs().mean() / span[s] for s in range(2)]
    assert 0.1 < np.mean(ssim) < 0.95
    assert_close(reconstruction_loss(prediction, target, span), 0.95 * np.mean(l1) + 0.05 * (1 - np.mean(ssim)))
    assert_close(reconstruction_loss(prediction, target, span, ssim_weight=1), 1 - np.mean(ssim))
    assert_close(reconstruction_loss(1e4 * prediction, 1e4 * target, 1e4 * span), reconstruction_loss(prediction, target, span))
    a = (prediction / 100)[:, :, :8, :7, :7].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reconstruction_loss(x, target[:, :, :8, :7, :7] / 100, 1.0, 0.5), a, fast_mode=True)
    with pytest.raises(ValueError, match="volume: expected at least 7 voxels"):
        reconstruction_loss(prediction[..., :6], target[..., :6], 1.0)
