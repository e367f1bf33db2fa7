"""What a network is taught: Eq. 1-9 of S2DC (Pan et al., ICCV 2025, arXiv:2507.02581) in the paper's order
and symbols, then the losses of the downstream tasks.

V is a source volume, V' its augmented copy; a trailing underscore (tokens_, valid_) means "of V'". Axes:
b batch, c channel, t tokens, i (paper: n) a token of V, j (paper: m) one of V', x y z voxels. valid (b, t)
bool: the tokens inside the scan, the others take no part in anything; None: all. Losses are means over
samples, so that half batches on two devices equal the whole on one, and computed in float32 whatever comes in
(float64 stays), also under autocast. Gradients flow into every argument: make the teacher's under no_grad.
"""
import functools

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch.utils.checkpoint import checkpoint

LOW = -1e30         # log of "nothing": finite, so that a softmax over nothing has gradient 0 instead of NaN


def full_precision(function):
    """Outside autocast, from float32 up: bfloat16 has 2 or 3 digits of a cosine, Eq. 4 divides it by 0.1."""
    def up(x):
        return x.float() if torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16) else x

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        with torch.autocast(device, enabled=False):
            return function(*map(up, args), **{name: up(x) for name, x in kwargs.items()})
    return wrapped


def recomputed(function):     # keeps the arguments and not the t x t insides, which backward makes again
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def unit(x):                  # (.., c) -> length 1; eps bounds the gradient of an all-zero row
    return F.normalize(x, dim=-1, eps=1e-6)


def products(q, k):
    return einsum(q, k, "b i c, b j c -> b i j")


def or_all(valid, like, dim=1):         # (b, t); None: every token along dim of `like` (b, ..)
    return like.new_ones(len(like), like.shape[dim], dtype=torch.bool) if valid is None else valid


def both(valid, valid_):
    return rearrange(valid, "b i -> b i 1") & rearrange(valid_, "b j -> b 1 j")


def moments(x, where, dim):   # mean and population variance over the True places, 0 if none is; dim is kept
    count = where.sum(dim, keepdim=True).clamp(min=1)
    mean = x.masked_fill(~where, 0).sum(dim, keepdim=True) / count
    return mean, (x - mean).masked_fill(~where, 0).square().sum(dim, keepdim=True) / count


@full_precision
def info_nce(query, key, queue, temperature, allowed=None):
    """L_g, Eq. 1: the student's crop recognises its own augmented twin among the negatives.
    query (b, c)  pooled student features q_i        key (b, c)  teacher features q*_i' of the augmented twins
    queue (K, c)  the negatives: K other teacher features, of this step or earlier
    allowed       (b, K) bool: which of them count for each query, say none of its own subject; None: all
    returns ()    0: the twin is certain; log(K + 1): all look alike. The denominator sums all K + 1
    All are l2-normalised here (the paper does not say; MoCo does), so q . q* is a cosine."""
    positive, negative = twin_and_others(query, key, queue, allowed)
    logits = torch.cat([rearrange(positive, "b -> b 1"), negative], dim=1) / temperature
    return (logits.logsumexp(dim=1) - positive / temperature).mean()


def twin_and_others(query, key, queue, allowed):    # cosines (b,), (b, K), where not allowed LOW
    negative = einsum(unit(query), unit(queue), "b c, k c -> b k")
    if allowed is not None:
        negative = negative.masked_fill(~allowed, LOW)
    return einsum(unit(query), unit(key), "b c, b c -> b"), negative


@torch.no_grad()
@full_precision
def recognition(query, key, queue, temperature, allowed=None):
    """What L_g is worth among keys of ONE teacher: () each of "top1", the share of queries whose twin is more
    similar than every negative, "nce", Eq. 1, and what both are by chance. A queue of earlier keys can be
    beaten by telling now from then, since the teacher drifts; these cannot."""
    positive, negative = twin_and_others(query, key, queue, allowed)
    others = (negative > LOW).sum(dim=1) + 1
    top = (rearrange(positive, "b -> b 1") > negative).all(dim=1)
    return {"top1": top.to(positive).mean(), "top1_chance": (1 / others).mean(),
            "nce": info_nce(query, key, queue, temperature, allowed), "nce_chance": others.log().mean()}


# Eq. 2-3, M_gt(i, j) = 1 where patch i of V and patch j of V' show each other's centre, is `correspondence`
# of data.py: it needs the affine map and the patch size, no network. Here M_gt comes in as (b, t, t) bool.


@full_precision
def similarity(q, k):
    """M_t of Eq. 4: the cosine of each token of V with each of V'. q, k (b, t, c) -> (b, t, t) in [-1, 1]."""
    return products(unit(q), unit(k))


@full_precision
def dual_softmax(sim, temperature, valid=None, valid_=None):
    """Eq. 4: log M_hat(i, j) = log softmax(M_t(i, .))_j + log softmax(M_t(., j))_i. LOGS, as Eq. 5 needs.
    sim (b, t, t)      M_t;  temperature  divides M_t (not in the paper; the released code has none, i.e. 1)
    returns (b, t, t)  0: sure of each other both ways; below: less; -inf: an invalid token, in no softmax"""
    pair = both(or_all(valid, sim), or_all(valid_, sim))
    logits = (sim / temperature).masked_fill(~pair, LOW)
    return (logits.log_softmax(dim=2) + logits.log_softmax(dim=1)).masked_fill(~pair, float("-inf"))


@full_precision
def sinkhorn(sim, temperature, bin_score, iterations=100, valid=None, valid_=None):
    """The appendix's alternative to Eq. 4: entropic optimal transport, a spare bin on each side for tokens
    without partner. Returns LOGS (b, t, t), -inf as in `dual_softmax`.

    The plan P >= 0 maximises <P, Z> / temperature + H(P), Z = sim with one row and column of bin_score more.
    Each valid token has the marginal 1, the bin of V as much as V' has valid tokens, the bin of V' as V has.
    M_hat is P without bins: rows and columns sum to at most 1, what is missing went into a bin. Stationarity
    gives P = exp(Z / temperature + u + v); u, v are set in turn so that first rows, then columns have their
    marginals: in the end columns exactly, rows as converged (slowly where temperature is far below 0.1).
    bin_score  () tensor in units of sim, how similar a partner must be to beat "no partner"; a Parameter of
               the caller. Gradients go through all iterations. (Released code: 1, which no optimizer knows.)
    """
    valid, valid_, scores = or_all(valid, sim), or_all(valid_, sim), sim / temperature
    u, v = potentials(recomputed(lambda v: (scores + rearrange(v, "b j -> b 1 j")).logsumexp(dim=2)),
                      recomputed(lambda u: (scores + rearrange(u, "b i -> b i 1")).logsumexp(dim=1)),
                      bin_score / temperature, iterations, valid, valid_)
    log_M_hat = scores + rearrange(u, "b i -> b i 1") + rearrange(v, "b j -> b 1 j")
    return log_M_hat.masked_fill(~both(valid, valid_), float("-inf"))


def potentials(rows, columns, spare, iterations, valid, valid_):
    """u, v (b, t) of the plan; rows(v) = logsumexp_j(scores + v), columns(u) = logsumexp_i(scores + u)."""
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, found {iterations}")
    n, n_ = (rearrange(x.sum(dim=1), "b -> b 1").to(spare).log().clamp(min=LOW) for x in (valid, valid_))
    v, v_bin = LOW * (~valid_).to(spare), torch.zeros_like(n)
    for _ in range(iterations):
        u = (-torch.logaddexp(rows(v), spare + v_bin)).masked_fill(~valid, LOW)
        u_bin = n_ - torch.logaddexp(spare + v.logsumexp(dim=1, keepdim=True), spare + v_bin)
        v = (-torch.logaddexp(columns(u), spare + u_bin)).masked_fill(~valid_, LOW)
        v_bin = n - torch.logaddexp(spare + u.logsumexp(dim=1, keepdim=True), spare + u_bin)
    return u, v


@full_precision
def patch_to_patch(log_M_hat, M_gt):
    """L_p2p, Eq. 5: -1/|M_gt| sum_ij M_gt(i, j) log M_hat(i, j) -> (); |M_gt| of a sample, not of the batch.
    log_M_hat (b, t, t)  of `dual_softmax` or `sinkhorn`; a match that is -inf there (invalid) does not count
    M_gt      (b, t, t)  bool. A sample without a match adds exactly zero loss and zero gradient"""
    M_gt = M_gt & (log_M_hat != float("-inf"))
    return (-log_M_hat.masked_fill(~M_gt, 0).sum(dim=(1, 2)) / M_gt.sum(dim=(1, 2)).clamp(min=1)).mean()


@full_precision
def sharpe_ratio(sim, dim, valid=None):
    """Eq. 6: sr_n = (max(D_n) - mean(D_n)) / sigma(D_n), D_n: similarities of token n with the other view's.
    Above `block` tokens (see s2dc_loss) `row_sharpe_ratio` computes the same: change both.
    sim (b, t, t);  dim 2: sr of V's tokens, D_n are rows; 1: of V' tokens, columns;  valid: of the other view
    returns (b, t)  in [0, sqrt(t)]; low: many similar patches, a structure; high: one peak; 0 over no tokens
    sigma is the population standard deviation (the text says variance; Sharpe and the released code take the
    deviation). 1e-12 added to its square: where all are equal, sr is 0, no rounding taken for a peak."""
    if dim not in (1, 2):
        raise ValueError(f"dim: expected 1 or 2, found {dim}")
    where = rearrange(or_all(valid, sim, dim), "b j -> b 1 j" if dim == 2 else "b i -> b i 1")
    mean, variance = moments(sim, where, dim)
    peak = sim.gather(dim, sim.masked_fill(~where, LOW).argmax(dim, keepdim=True))
    ratio = (peak - mean) / (variance + 1e-12).sqrt()
    return ratio.masked_fill(~where.any(dim, keepdim=True), 0).squeeze(dim)


@full_precision
def patch_to_structure(log_M_hat, M_gt, sim, form="sum", detach=True, valid=None, valid_=None):
    """L_p2s, Eq. 7-8: l_nm = (softmax(sr_V)_n + softmax(sr_V')_m) / 2 * -log M_hat(n, m) at the matches.

    log_M_hat, M_gt, sim (b, t, t), as above -> (); the softmax is over the valid tokens
    form  "printed"   Eq. 8: sum of l_nm / (N N'), N valid tokens. Weights sum to 1: 1e-5 of L_p2p, cannot act
          "sum"       sum of l_nm; small where few tokens match, because all valid tokens share the weight
          "mean"      divided by the weight at the matches: a weighted mean of -log M_hat, on L_p2p's scale
          "released"  as in the released code: -log((1 + s) / 2) for -log M_hat (not read), s the cosine; plus
                      the mean of -log(1 - (1 + s) / 2) over valid pairs without match. Logs of at least 1e-6
    detach            True: no gradient through sr (ours, else the network flattens sr to win); paper: False
    """
    valid, valid_, source = or_all(valid, sim), or_all(valid_, sim), sim.detach() if detach else sim
    pair = both(valid, valid_)
    M_gt = M_gt & pair
    w, w_ = softmax(sharpe_ratio(source, 2, valid_), valid), softmax(sharpe_ratio(source, 1, valid), valid_)
    weight = (rearrange(w, "b i -> b i 1") + rearrange(w_, "b j -> b 1 j")) / 2
    l_nm = weight * (match_cost(sim) if form == "released" else -log_M_hat).masked_fill(~M_gt, 0)
    apart = match_cost(-sim).masked_fill(M_gt | ~pair, 0).sum(dim=(1, 2)) if form == "released" else None
    sums = (x.sum(dim=(1, 2)) for x in (l_nm, weight.masked_fill(~M_gt, 0), M_gt, pair))
    return structure_sum(*sums, apart, form)


def softmax(sr, valid):       # (b, t) -> (b, t), sum 1 over the valid tokens
    return sr.masked_fill(~valid, LOW).softmax(dim=1)


def match_cost(s):            # of a match with the cosine s, of a pair that is none with -s
    return -((1 + s) / 2).clamp(min=1e-6).log()


def structure_sum(value, mass, matches, pairs, apart, form):
    """Eq. 8 -> (). Of each sample, (b,): sums of l_nm and of the weights over its matches, how many matches
    and valid pairs it has, the summed cost of the valid pairs that do not match."""
    if form not in ("printed", "sum", "mean", "released"):
        raise ValueError(f"form: expected printed, sum, mean or released, found {form!r}")
    if form == "printed":
        value = value / pairs.clamp(min=1)
    elif form == "mean":
        value = value / mass.masked_fill(mass == 0, 1)
    elif form == "released":
        value = value + apart / (pairs - matches).clamp(min=1)
    return value.masked_fill(matches == 0, 0).mean()


@full_precision
def s2dc_loss(tokens, tokens_, M_gt, query, key, queue, *, allowed=None, weights=(1.0, 1.0, 1.0),
              matching="dual_softmax", temperature=0.1, global_temperature=0.2, form="sum", detach=True,
              valid=None, valid_=None, bin_score=None, iterations=100, block=4096):
    """Eq. 9: L = L_g + L_p2p + L_p2s, each with its weight (paper: 1, released code: 0.5), and what to watch.

    tokens, tokens_    (b, t, c)  student tokens of V, teacher tokens of V'; normalised here
    M_gt               (b, t, t) bool, or its True places as a long tensor (m, 3) of distinct rows (b, i, j)
    query, key, queue, allowed  as in `info_nce`; may be None where weights[0] is 0, then L_g is 0
    matching           "dual_softmax", or "sinkhorn" with bin_score; form, detach, .. as in these functions
    block              above this many tokens no t x t matrix is held, at most block^2 similarities a sample,
                       made again in backward (give M_gt as a list then). Equal up to rounding
    returns dict of () tensors: "loss", its unweighted terms "global", "p2p", "p2s", and without gradient
      "accuracy"  share of V's matched tokens whose most similar valid token of V' is a partner; 0 if none
      "matches"   matches per valid token of V
      "spread"    standard deviation of a scan's unit valid tokens of V, mean over channels and scans, times
                  sqrt(c): 1 all over the sphere, 0 collapsed to a point
    The paper gives no temperature; 0.1 is ours (released code: 1), global 0.2 MoCo v2's (released code: 0.9).
    Raises ValueError for shapes that do not fit, an unknown form or matching, sinkhorn without bin_score.
    """
    b, t, c = tokens.shape
    if tokens_.shape != tokens.shape:
        raise ValueError(f"tokens_: expected {tuple(tokens.shape)} like tokens, found {tuple(tokens_.shape)}")
    listed = M_gt.dtype == torch.long and M_gt.shape[1:] == (3,)
    if not listed and (M_gt.dtype != torch.bool or M_gt.shape != (b, t, t)):
        found = f"{tuple(M_gt.shape)} {M_gt.dtype}"
        raise ValueError(f"M_gt: expected ({b}, {t}, {t}) bool or (m, 3) long, found {found}")
    valid, valid_ = or_all(valid, tokens), or_all(valid_, tokens)
    for name, x in (("valid", valid), ("valid_", valid_)):
        if x.dtype != torch.bool or x.shape != (b, t):
            raise ValueError(f"{name}: expected ({b}, {t}) bool, found {tuple(x.shape)} {x.dtype}")
    if matching not in ("dual_softmax", "sinkhorn"):
        raise ValueError(f"matching: expected dual_softmax or sinkhorn, found {matching!r}")
    if matching == "sinkhorn" and bin_score is None:
        raise ValueError("bin_score: expected a () tensor for sinkhorn, found None")
    options = dict(temperature=temperature, bin_score=bin_score if matching == "sinkhorn" else None,
                   iterations=iterations, form=form, detach=detach)
    terms = plain_terms if t <= block else functools.partial(blocked_terms, block=block)
    p2p, p2s, hit, partners = terms(tokens, tokens_, M_gt, valid, valid_, **options)
    no_global = query is None and weights[0] == 0
    L_g = tokens.new_zeros(()) if no_global else info_nce(query, key, queue, global_temperature, allowed)
    _, variance = moments(unit(tokens.detach()), rearrange(valid, "b t -> b t 1"), 1)
    return {"loss": weights[0] * L_g + weights[1] * p2p + weights[2] * p2s, "global": L_g, "p2p": p2p,
            "p2s": p2s, "accuracy": hit.sum() / (partners > 0).sum().clamp(min=1),
            "matches": partners.sum() / valid.sum().clamp(min=1), "spread": variance.sqrt().mean() * c ** 0.5}


def plain_terms(q, k, M_gt, valid, valid_, temperature, bin_score, iterations, form, detach):
    """L_p2p, L_p2s; (b, t) for V's tokens: is the most similar one a partner, how many partners are there."""
    sim = similarity(q, k)
    if M_gt.dtype == torch.long:
        M_gt = torch.zeros_like(sim, dtype=torch.bool).index_put(M_gt.unbind(dim=1), valid.new_ones(()))
    M_gt = M_gt & both(valid, valid_)
    log_M_hat = (dual_softmax(sim, temperature, valid, valid_) if bin_score is None else
                 sinkhorn(sim, temperature, bin_score, iterations, valid, valid_))
    p2p = patch_to_patch(log_M_hat, M_gt)
    p2s = patch_to_structure(log_M_hat, M_gt, sim, form, detach, valid, valid_)
    nearest = sim.detach().masked_fill(~rearrange(valid_, "b j -> b 1 j"), LOW).argmax(dim=2, keepdim=True)
    return p2p, p2s, M_gt.gather(2, nearest).squeeze(2), M_gt.sum(dim=2)


def blocked_terms(q, k, M_gt, valid, valid_, temperature, bin_score, iterations, form, detach, block):
    """`plain_terms` for many tokens. log M_hat(i, j) of a match needs s_ij and the logsumexp of row i and of
    column j: a list of matches (m,) and a few numbers per token are all that has to be kept."""
    few = min(block ** 2, 2 ** 22) if q.device.type == "cpu" else block ** 2    # 16 MB: what a cache holds
    q, k, size = unit(q), unit(k), max(1, few // q.shape[1])
    b, i, j = (M_gt.nonzero() if M_gt.dtype == torch.bool else M_gt).unbind(dim=1)
    live = valid[b, i] & valid_[b, j]
    mine = live & (b == rearrange(torch.arange(len(q), device=b.device), "b -> b 1"))      # (b, m), by sample
    s = einsum(q[b, i], k[b, j], "m c, m c -> m")
    nearest = most_ = None
    rows = functools.partial(row_logsumexp, q, k, temperature, size)
    columns = functools.partial(row_logsumexp, k, q, temperature, size)
    if bin_score is not None:
        u, v = potentials(rows, columns, bin_score / temperature, iterations, valid, valid_)
        log_M_hat = s / temperature + u[b, i] + v[b, j]
    else:
        if temperature > 0.025:
            row, column, nearest, most_ = Logsumexps.apply(q, k, temperature, valid, valid_, size)
        else:
            row, column = rows(LOW * (~valid_).to(q)), columns(LOW * (~valid).to(q))
        log_M_hat = (s / temperature - row[b, i]) + (s / temperature - column[b, j])
    source, source_ = (q.detach(), k.detach()) if detach else (q, k)
    sr, nearest = row_sharpe_ratio(source, source_, valid_, size, nearest)
    sr_, _ = row_sharpe_ratio(source_, source, valid, size, most=most_ if detach else None)
    weight = (softmax(sr, valid)[b, i] + softmax(sr_, valid_)[b, j]) / 2
    apart = non_match_cost(q, k, valid, valid_, b, i, j, size).sum(dim=1) if form == "released" else None
    l_nm = weight * (match_cost(s) if form == "released" else -log_M_hat)
    l_p2p, l_p2s, mass = (torch.where(mine, x, 0).sum(dim=1) for x in (-log_M_hat, l_nm, weight))      # (b,)
    matches, pairs = mine.sum(dim=1), valid.sum(dim=1) * valid_.sum(dim=1)
    partners, hits = (torch.zeros_like(valid, dtype=torch.long).index_put((b, i), x.long(), accumulate=True)
                      for x in (live, live & (nearest[b, i] == j)))
    p2s = structure_sum(l_p2s, mass, matches, pairs, apart, form)
    return (l_p2p / matches.clamp(min=1)).mean(), p2s, hits > 0, partners


def by_rows(function, q, size):         # (b, t) from function(rows of q, index of the first) -> (b, rows)
    starts = range(0, q.shape[1], size)
    return torch.cat([recomputed(function)(q[:, start:start + size], start) for start in starts], dim=1)


class Logsumexps(torch.autograd.Function):
    """For unit q, k (b, t, c): logsumexp of s_ij / temperature over j (b, t) and over i (b, t), of valid
    tokens alone; where the most similar valid one of each i is, and how similar that of each j is (b, t).
    One pass over the similarities, one more in backward: a cosine is at most 1, so exp((s - 1) / temperature)
    needs no maximum first and serves both sums; above a temperature of 0.025 it is at least exp(-80), which
    float32 holds. Invalid pairs, s = -2, are in no sum.
    """

    @staticmethod
    def forward(ctx, q, k, temperature, valid, valid_, size):
        b, t, _ = q.shape
        rows, columns, most_ = q.new_zeros(b, t), q.new_zeros(b, t), q.new_full((b, t), -2.0)
        nearest, whole = torch.zeros(b, t, dtype=torch.long, device=q.device), valid.all() and valid_.all()
        for start in range(0, t, size):
            part = slice(start, start + size)
            s = products(q[:, part], k)
            if not whole:
                s.masked_fill_(~both(valid[:, part], valid_), -2)
            nearest[:, part] = s.argmax(dim=2)
            most_ = torch.maximum(most_, s.amax(dim=1))
            e = s.sub_(1).div_(temperature).exp_()
            rows[:, part] = einsum(e, valid_.to(q), "b i j, b j -> b i")
            columns += einsum(e, valid[:, part].to(q), "b i j, b i -> b j")
        ctx.save_for_backward(q, k, valid, valid_, rows, columns)
        ctx.temperature, ctx.size = temperature, size
        ctx.mark_non_differentiable(nearest, most_)
        row, column = (n.log().clamp(min=LOW) + 1 / temperature for n in (rows, columns))
        return row, column, nearest, most_

    @staticmethod
    def backward(ctx, g_rows, g_columns, *_):
        q, k, valid, valid_, rows, columns = ctx.saved_tensors
        g_rows, g_columns = (torch.where(n > 0, g / (n * ctx.temperature), 0)
                             for g, n in ((g_rows, rows), (g_columns, columns)))
        g_q, g_k = torch.empty_like(q), torch.zeros_like(k)
        for start in range(0, q.shape[1], ctx.size):
            part = slice(start, start + ctx.size)
            e = products(q[:, part], k).sub_(1).div_(ctx.temperature).exp_()
            e *= (einsum(g_rows[:, part], valid_.to(q), "b i, b j -> b i j")
                  + einsum(valid[:, part].to(q), g_columns, "b i, b j -> b i j"))
            g_q[:, part] = einsum(e, k, "b i j, b j c -> b i c")
            g_k += einsum(e, q[:, part], "b i j, b i c -> b j c")
        return g_q, g_k, None, None, None, None


def row_logsumexp(q, k, temperature, size, v):      # (b, t): logsumexp over j of s_ij / temperature + v_j
    return by_rows(lambda part, _: (products(part / temperature, k)
                                    + rearrange(v, "b j -> b 1 j")).logsumexp(dim=2), q, size)


def row_sharpe_ratio(q, k, valid_, size, nearest=None, most=None):
    """`sharpe_ratio` of q's tokens, and where each one's most similar valid token of k is. Mean and variance
    of q_i . k_j over j follow from those of k (much faster): only the peak has to be searched for, unless
    its place or, where no gradient is asked for, its height `most` is known."""
    where, out_ = rearrange(valid_, "b j -> b j 1"), ~rearrange(valid_, "b j -> b 1 j")
    if nearest is None and most is None:
        with torch.no_grad():
            nearest = by_rows(lambda part, _: products(part, k).masked_fill(out_, LOW).argmax(dim=2), q, size)
    mean, _ = moments(k, where, 1)
    around = (k - mean).masked_fill(~where, 0)
    covariance = einsum(around, around, "b j c, b j d -> b c d") / where.sum(dim=1, keepdim=True).clamp(min=1)
    variance = (einsum(q, covariance, "b i c, b c d -> b i d") * q).sum(dim=2).clamp(min=0)
    if most is None:
        most = (q * k.gather(1, rearrange(nearest, "b i -> b i 1").expand_as(k))).sum(dim=2)
    ratio = (most - (q * mean).sum(dim=2)) / (variance + 1e-12).sqrt()
    return ratio.masked_fill(~valid_.any(dim=1, keepdim=True), 0), nearest


def non_match_cost(q, k, valid, valid_, b, i, j, size):
    """(b, t): for each token of q, the summed cost of its valid pairs that are no match (b, i, j)."""
    def cost(part, start):              # matches of other blocks are written into a spare last row
        n = part.shape[1]
        here = torch.where((i >= start) & (i < start + n), i - start, n)
        M_gt = valid.new_zeros(len(q), n + 1, k.shape[1]).index_put((b, here, j), valid.new_ones(()))[:, :-1]
        pair = both(valid[:, start:start + n], valid_)
        return match_cost(-products(part, k)).masked_fill(M_gt | ~pair, 0).sum(dim=2)
    return by_rows(cost, q, size)


# Downstream. Classification is torch.nn.functional.cross_entropy as it stands -------------------------------


@full_precision
def dice_ce(logits, target, background=True, smooth=1e-5, balance=0.0):
    """Softmax Dice + cross-entropy, for classes that exclude each other -> (); 0: certain and right.

    logits (b, k, x, y, z);  target (b, x, y, z) or (b, 1, x, y, z), integer ids 0 .. k - 1
    Dice = (2 sum p y + smooth) / (sum p + sum y + smooth) per sample and class, 1 - its mean. A class that a
    sample lacks costs nearly 1 unless predicted nowhere. background=False leaves class 0 to cross-entropy,
    which weighs a voxel by (its class's share of the sample) ** -balance; 0: voxels alike, 1: classes alike.
    """
    if target.is_floating_point():
        raise ValueError(f"target: expected integer class ids, found {target.dtype}")
    target = rearrange(target, "b 1 x y z -> b x y z" if target.ndim == 5 else "b x y z -> b x y z").long()
    classes = rearrange(torch.arange(logits.shape[1], device=target.device), "k -> k 1 1 1")
    onehot, first = rearrange(target, "b x y z -> b 1 x y z") == classes, 0 if background else 1
    dice = dice_loss(logits.softmax(dim=1)[:, first:], onehot[:, first:], smooth)
    return dice + balanced_ce(logits, target, onehot, balance)


def balanced_ce(logits, target, onehot, balance):
    """Cross-entropy of (b, k, x, y, z), a voxel weighted by (its class's share of the sample) ** -balance."""
    if balance == 0:
        return F.cross_entropy(logits, target)
    share = reduce(onehot.to(logits.dtype), "b k x y z -> b k 1 1 1", "mean")
    weight = (onehot * torch.where(share > 0, share, 1) ** -balance).sum(dim=1)          # (b, x, y, z)
    cost = F.cross_entropy(logits, target, reduction="none") * weight
    return (reduce(cost, "b x y z -> b", "sum") / reduce(weight, "b x y z -> b", "sum")).mean()


@full_precision
def dice_bce(logits, target, smooth=1e-5):
    """Sigmoid Dice + binary cross-entropy. Regions (b, r, x, y, z) that may overlap, target 0 or 1 -> ()."""
    if target.shape != logits.shape:
        raise ValueError(f"target: expected {tuple(logits.shape)} like logits, found {tuple(target.shape)}")
    target = target.to(logits.dtype)
    return dice_loss(logits.sigmoid(), target, smooth) + F.binary_cross_entropy_with_logits(logits, target)


def dice_loss(p, y, smooth):
    """1 - soft Dice of probabilities p and truth y, (b, k, x, y, z), mean over samples and classes -> ()."""
    overlap, size = (p * y).sum(dim=(2, 3, 4)), p.sum(dim=(2, 3, 4)) + y.sum(dim=(2, 3, 4))
    return (1 - (2 * overlap + smooth) / (size + smooth)).mean()


def above_background(target, fill):
    """Tissue of a skull-stripped target: bool, where target (b, c, x, y, z), preprocessed, is more than 0.01
    above fill (b, c), its background (volumes.background_of)."""
    fill = torch.as_tensor(fill, dtype=target.dtype, device=target.device)
    return target > rearrange(fill, "b c -> b c 1 1 1") + 1e-2


@full_precision
def masked_l1_l2(prediction, target, mask, l1=1.0, l2=1.0):
    """Translation: l1 |error| + l2 error^2, mean over each sample's mask, then samples -> (). Empty mask: 0.
    prediction, target (b, c, x, y, z) z-scored;  mask (b, c or 1, x, y, z) bool, the body: nothing outside is
    read. The released code has l1 = 0, l2 = 10 and mask = target >= -0.35."""
    error = (prediction - target).masked_fill(~mask, 0)
    count = mask.expand_as(error).sum(dim=(1, 2, 3, 4)).clamp(min=1)
    return ((l1 * error.abs() + l2 * error.square()).sum(dim=(1, 2, 3, 4)) / count).mean()


@full_precision
def reconstruction_loss(prediction, target, data_range, ssim_weight=0.05):
    """Low to full dose: (1 - w) L1 + w (1 - SSIM), 0: equal; w 0.05 as in a public dose-reduction recipe.
    prediction, target (b, c, x, y, z);  data_range, a number or (b,): the span of values, to which both parts
    are relative, so that the loss does not change with the unit of activity."""
    span = torch.as_tensor(data_range, dtype=target.dtype, device=target.device)
    span = rearrange(span.reshape(-1), "b -> b 1 1 1 1")
    error = (prediction - target).abs() / span
    return (1 - ssim_weight) * error.mean() + ssim_weight * (1 - ssim_3d(prediction / span, target / span))


def ssim_3d(a, b, window=7):
    """Structural similarity -> (), 1: equal. a, b (b, c, x, y, z) in units of the data range; uniform window,
    sample covariance, K1 = 0.01, K2 = 0.03; mean over windows that lie wholly inside. Differentiable."""
    if min(a.shape[2:]) < window:
        raise ValueError(f"volume: expected at least {window} voxels an axis, found {tuple(a.shape[2:])}")

    def local(x):                       # three passes of 7 voxels instead of one of 343
        for kernel in ((window, 1, 1), (1, window, 1), (1, 1, window)):
            x = F.avg_pool3d(x, kernel, stride=1)
        return x
    mean_a, mean_b, sample = local(a), local(b), window ** 3 / (window ** 3 - 1)
    spread_a, spread_b = sample * (local(a * a) - mean_a ** 2), sample * (local(b * b) - mean_b ** 2)
    covariance = sample * (local(a * b) - mean_a * mean_b)
    light = (2 * mean_a * mean_b + 0.01 ** 2) / (mean_a ** 2 + mean_b ** 2 + 0.01 ** 2)
    return (light * (2 * covariance + 0.03 ** 2) / (spread_a + spread_b + 0.03 ** 2)).mean()
