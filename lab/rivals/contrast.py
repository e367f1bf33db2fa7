"""Rivals that compare views: SimCLR, MoCo v3, VICRegL, PCRLv1, PCRLv2, GVSL.

Written from the papers; numbers that these leave open are of the released codes, "(code)". MoCo v2 is L_g
alone: pretrain.py --weights=1,0,0. All see two or three samples a step on small machines, whose batch
statistics say little: where the papers have batch norm, features are standardised by running statistics.
Negatives are the step's other subjects: keys of earlier steps can be beaten by telling now from then
(losses.recognition). Axes: b batch, c channel, x y z voxels, i j k tokens of a map, t tokens, n rows, d
numbers of an embedding.
"""
import copy
import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import nn

import data
import losses
import pretrain
import tasks
from model import Projector, Swin3D, SwinUNETR


class Head(nn.Module):
    """Pooled features (n, c) -> embeddings (n, d): standardised by running statistics and one linear map, as
    S2DC's head of L_g. The papers' two or three layers with batch norms between make all embeddings of two
    samples alike within a hundred steps, or, with running statistics in every layer, blow up."""

    def __init__(self, channels, cfg):
        super().__init__()
        self.standard = pretrain.Standard(channels)
        self.map = nn.Linear(channels, cfg.embedding, bias=False)

    def forward(self, x):
        x = x.float()
        out = self.map(self.standard(x)).float()
        if self.training:
            self.standard.follow(x.detach())
        return out


def pooled(maps):
    return reduce(maps[-1], "n c i j k -> n c", "mean")


def contrasted(query, keys, subjects, temperature):
    """NT-Xent, Eq. 1 of SimCLR, and what it is worth: query and keys (2 b, d), one view of a batch behind the
    other; row n finds key n + b, and key n - b, among all keys of other subjects; subjects (b,)."""
    subjects = torch.cat([subjects, subjects])
    allowed = rearrange(subjects, "n -> n 1") != subjects
    key = keys.roll(len(keys) // 2, 0)
    loss = losses.info_nce(query, key, keys, temperature, allowed)
    found = losses.recognition(query, key, keys, temperature, allowed)
    return loss, {name: found[name] for name in ("top1", "top1_chance")}


class SimCLR(nn.Module):
    """A Simple Framework for Contrastive Learning (arXiv:2002.05709): two views of a sample find each other.

    Eq. 1, NT-Xent over the 2 b views V_ and twin; temperature 0.1 (Table 5). Ours: a batch of cfg.batch for
    4096, that is 2 b - 2 negatives (b = 2: two, chance 1/3), none of the same subject; `Head` for two layers;
    AdamW for LARS; our moves and jitter.
    """
    passes = 2, 0
    temperature = 0.1

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Swin3D(cfg.in_channels, **tasks.swin(cfg))
        self.head = Head(16 * cfg.feature_size, cfg)

    def forward(self, batch, generator):
        z = self.head(pooled(self.encoder(torch.cat([batch["V_"], batch["twin"]]))))
        return contrasted(z, z, batch["subjects"], self.temperature)


class MoCoV3(nn.Module):
    """An Empirical Study of Training Self-Supervised Vision Transformers (arXiv:2104.02057).

    Algorithm 1: ctr(q1, k2) + ctr(q2, k1), each InfoNCE times 2 tau, tau = 0.2 (code); q =
    predictor(projector(encoder)), k the same without predictor, its weights an average of the former's:
    momentum 0.99, to 1 by half a cosine (code). Ours: keys of both views are negatives, 2 b - 2 (paper: b - 1
    of 4095); `Head` for a projector of three layers, a linear map, at first the identity, for a predictor of
    two; the patch embedding is trained, which the paper freezes for stability.
    """
    passes = 2, 2
    temperature, momentum = 0.2, 0.99

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Swin3D(cfg.in_channels, **tasks.swin(cfg))
        self.projector = Head(16 * cfg.feature_size, cfg)
        self.predictor = nn.Linear(cfg.embedding, cfg.embedding, bias=False)
        nn.init.eye_(self.predictor.weight)
        self.slow = copy.deepcopy(nn.ModuleList([self.encoder, self.projector])).requires_grad_(False)

    def forward(self, batch, generator):
        views = torch.cat([batch["V_"], batch["twin"]])
        q = self.predictor(self.projector(pooled(self.encoder(views))))
        with torch.no_grad():
            encoder, projector = self.slow
            k = projector(pooled(encoder(views)))
        loss, measures = contrasted(q, k, batch["subjects"], self.temperature)
        return 2 * 2 * self.temperature * loss, measures

    def after_step(self, step, steps):
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * step / steps)) / 2
        pretrain.follow(self.slow, nn.ModuleList([self.encoder, self.projector]), momentum)


@losses.full_precision
def vicreg(z, z_, earlier=None, earlier_=None):
    """VICReg (arXiv:2105.04906), z and z_ (n, d) -> its three terms () by name.

    invariance  mean squared difference of partners, over n and d (code; Eq. 5 sums over d)
    variance    Eq. 1-2 of each side: mean over d of max(0, 1 - sqrt(var + 1e-4)); half their sum (code)
    covariance  Eq. 3-4 of each side: sum over pairs of different numbers of cov^2, over d; half their sum
                (VICRegL's code; the paper and VICReg's own sum)
    earlier     (m, d) without gradient: rows that the statistics take in, too. In their gradients a row now
                stands for (n + m) / n, as if so many rows had been made and n of them drawn to learn
    """
    terms = {"invariance": (z - z_).square().mean()}
    spread, mixed = [], []
    for now, before in ((z, earlier), (z_, earlier_)):
        if before is not None and len(before):
            now = torch.cat([now.detach() + (now - now.detach()) * (1 + len(before) / len(now)), before])
        centred = now - now.mean(dim=0)
        covariance = centred.mT @ centred / (len(now) - 1)
        spread.append((1 - (covariance.diagonal() + 1e-4).sqrt()).relu().mean())
        mixed.append((covariance.square().sum() - covariance.diagonal().square().sum()) / now.shape[1])
    return terms | {"variance": sum(spread) / 2, "covariance": sum(mixed) / 2}


class VICRegL(nn.Module):
    """Self-Supervised Learning of Local Visual Features (arXiv:2210.01571): VICReg of crops and of patches.

    Eq. 3-5: 0.75 x global + 0.25 x local, weights 25 25 1 (code). Local: of location matches, Eq. 1, and of
    feature matches, Eq. 2, the 20 nearest pairs of a sample both ways (the code's number for location; by
    feature its default takes all). Ours: views are V and V_; location matches, all of them, tokens and the
    projector before them are S2DC's, so that the two differ by the local loss alone (paper: the last map,
    three layers with batch norm); local statistics over all matches of the step and not place by place over
    the batch, which has two samples; global ones over the step and the 32 crops before it; `Head` expands.
    """
    passes = 2, 0
    share, weights, nearest, earlier = 0.75, dict(invariance=25.0, variance=25.0, covariance=1.0), 20, 32

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Swin3D(cfg.in_channels, **tasks.swin(cfg))
        self.level = int(math.log2(cfg.token_patch)) - 1
        self.expander = Head(16 * cfg.feature_size, cfg)
        self.local = Projector(cfg.feature_size * 2 ** self.level, cfg.hidden, cfg.embedding)
        self.register_buffer("memory", torch.zeros(2, self.earlier, cfg.embedding))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def criterion(self, z, z_, *earlier):
        if len(z) < 2:
            return 0.0 * z.sum()
        return sum(self.weights[name] * term for name, term in vicreg(z, z_, *earlier).items())

    def forward(self, batch, generator):
        maps, b = self.encoder(torch.cat([batch["V"], batch["V_"]])), len(batch["V"])
        whole = rearrange(self.expander(pooled(maps)), "(s b) d -> s b d", s=2)
        loss = self.share * self.criterion(*whole, *self.memory[:, max(self.earlier - int(self.count), 0):])
        self.memory = torch.cat([self.memory, whole.detach()], dim=1)[:, -self.earlier:]
        self.count += b
        tokens = rearrange(maps[self.level], "(s b) c i j k -> s b (i j k) c", s=2)
        z, z_ = self.local(tokens).float()
        valid, valid_, (n, i, j) = batch["valid"], batch["valid_"], batch["pairs"].T
        loss = loss + (1 - self.share) * self.criterion(z[n, i], z_[n, j])
        back = closest(z_, z, valid_, valid, self.nearest)[[0, 2, 1]]
        n, i, j = torch.cat([closest(z, z_, valid, valid_, self.nearest), back], dim=1)
        loss = loss + (1 - self.share) * self.criterion(z[n, i], z_[n, j])
        whole = rearrange(whole - self.memory.mean(dim=1, keepdim=True), "s b d -> (s b) d")
        _, measures = contrasted(whole, whole, batch["subjects"], 1.0)
        return loss, measures | found_again(z, z_, batch["pairs"], valid_)


@torch.no_grad()
def found_again(z, z_, pairs, valid_):
    """Share of the matches whose token of z has its partner nearest, by cosine, of the valid ones of z_."""
    n, i, j = pairs.T
    alike = losses.similarity(z, z_).masked_fill(~rearrange(valid_, "b j -> b 1 j"), losses.LOW)
    nearest = alike.argmax(dim=2)
    chance = 1 / valid_.sum(dim=1).clamp(min=1)
    return {"found": (nearest[n, i] == j).float().sum() / max(len(n), 1),
            "found_chance": chance[n].sum() / max(len(n), 1)}


@torch.no_grad()
def closest(z, z_, valid, valid_, most):
    """Eq. 2 of VICRegL: long (3, m), columns (sample, i, j): of z_ (b, t, d) j is the valid token that is
    nearest to the valid token i of z, for the `most` tokens i of each sample that have it nearest."""
    distance = torch.cdist(z, z_).masked_fill(~losses.both(valid, valid_), float("inf"))
    distance, j = distance.min(dim=2)
    distance, i = distance.topk(min(most, distance.shape[1]), dim=1, largest=False)
    sample = repeat(torch.arange(len(z), device=z.device), "b -> b m", m=i.shape[1])
    return torch.stack([sample, i, j.gather(1, i)])[:, distance < float("inf")]


def decoded(network, maps, skips=True, levels=5):
    """The first maps of SwinUNETR's decoder, tokens of 16, 8, 4, 2, 1 voxels. Zeros stand for the skip of the
    volume itself, which would tell the answer, and without `skips` for all."""
    given = [maps[3], *(network.skips[k + 1](maps[k]) for k in (2, 1, 0))] if skips else []
    x, out = network.bottom(maps[4]), []
    for k, up in enumerate(network.ups[:levels]):
        empty = x.new_zeros(len(x), up.up.out_channels, *(2 * n for n in x.shape[2:]))
        x = up(x, given[k] if k < len(given) else empty)
        out.append(x)
    return out


def painted(x, generator, boxes=5):
    """In-painting of Models Genesis (arXiv:1908.06912): x (b, c, x, y, z), five boxes a sample (code: at most
    five), edges a sixth to a third, of uniform noise in its range -> that, and where (b, 1, x, y, z) bool"""
    out, where = x.clone(), torch.zeros_like(x[:, :1], dtype=torch.bool)
    for sample, hidden in zip(out, where):
        low, high = sample.min(), sample.max()
        for _ in range(boxes):
            draws = torch.rand(2, 3, generator=generator, device=x.device).tolist()
            edges = [max(int(n * (1 + u) / 6), 1) for n, u in zip(x.shape[2:], draws[0])]
            starts = [int((n - edge + 1) * u) for n, edge, u in zip(x.shape[2:], edges, draws[1])]
            i, j, k = (slice(a, a + edge) for a, edge in zip(starts, edges))
            noise = torch.rand(sample[:, i, j, k].shape, generator=generator, device=x.device)
            sample[:, i, j, k], hidden[:, i, j, k] = low + (high - low) * noise, True
    return out, where


def explained(out, target, where=None):
    """Share of the target's variance, over where (b, 1, x, y, z), that `out` has; 0: as good as its mean."""
    where = torch.ones_like(target, dtype=torch.bool) if where is None else where.expand_as(target)
    out, target = out.detach()[where].float(), target[where]
    return 1 - F.mse_loss(out, target) / target.var().clamp(min=1e-12)


def enlarged(x, generator):
    """A part of half the edges of each x (b, c, x, y, z), at one place drawn for all, as large as x."""
    draws = torch.rand(3, generator=generator, device=x.device).tolist()
    edges = [n // 2 for n in x.shape[2:]]
    i, j, k = (slice(int(u * (n + 1)), int(u * (n + 1)) + n) for u, n in zip(draws, edges))
    return F.interpolate(x[:, :, i, j, k], size=x.shape[2:], mode="trilinear")


def flipped(x, bits):
    """Each sample of x (b, c, x, y, z) mirrored along the axes that bits (b, 3) bool name."""
    axes = [[axis + 1 for axis in range(3) if on[axis]] for on in bits.tolist()]
    return torch.stack([sample.flip(along) for sample, along in zip(x, axes)])


class PCRLv1(nn.Module):
    """Preservational Learning (Zhou et al., ICCV 2021): contrast, and decode features into transformed
    inputs.

    L_c: InfoNCE of V_ against the momentum encoder's twin (code: NCE), temperature 0.2 (code), cfg.momentum
    (paper 0.999). L_p, transformation-conditioned attention: which axes are flipped goes through two layers
    and a sigmoid onto the channels of the last map, and the decoder makes the input flipped so; cross-model
    mixup: all maps of both encoders mixed by max(a, 1 - a), a ~ Beta(1, 1), are decoded into the two flipped
    inputs mixed alike. Mean of the two squared errors; L_c + L_p (code). Ours: the other subjects of the step
    for a queue of 16,384 (b = 2: one, chance 1/2); no quarter turns; no mixing of inputs inside L_c (C2L's,
    older); jitter for painted and shuffled voxels; SwinUNETR's decoder without the skip of the volume, its
    output not bounded to [0, 1].
    """
    passes = 1, 1
    temperature = 0.2

    def __init__(self, cfg):
        super().__init__()
        self.network = SwinUNETR(cfg.in_channels, cfg.in_channels, **tasks.swin(cfg))
        self.encoder, f, self.momentum = self.network.encoder, 16 * cfg.feature_size, cfg.momentum
        self.head = Head(f, cfg)
        self.slow = copy.deepcopy(nn.ModuleList([self.encoder, self.head])).requires_grad_(False)
        self.condition = nn.Sequential(nn.Linear(3, cfg.hidden), nn.ReLU(), nn.Linear(cfg.hidden, f),
                                       nn.Sigmoid())

    def attended(self, maps, bits):
        return [*maps[:-1], maps[-1] * rearrange(self.condition(bits.float()), "b c -> b c 1 1 1")]

    def forward(self, batch, generator):
        x, x_, b = batch["V_"], batch["twin"], len(batch["V_"])
        maps = self.encoder(x)
        query = self.head(pooled(maps))
        with torch.no_grad():
            maps_ = self.slow[0](x_)
            key = self.slow[1](pooled(maps_))
        allowed = rearrange(batch["subjects"], "b -> b 1") != batch["subjects"]
        loss = losses.info_nce(query, key, key, self.temperature, allowed)
        found = losses.recognition(query, key, key, self.temperature, allowed)

        bits, bits_ = torch.rand(2, b, 3, generator=generator, device=x.device) < 0.5
        a = torch.rand((), generator=generator, device=x.device)
        a = torch.maximum(a, 1 - a)
        goal, goal_ = flipped(x, bits), flipped(x_, bits_)
        maps = self.attended(maps, bits)
        mixed = [a * m + (1 - a) * m_ for m, m_ in zip(maps, self.attended(maps_, bits_))]
        out, both = (self.network.out(decoded(self.network, m)[-1]).float() for m in (maps, mixed))
        loss = loss + (F.mse_loss(out, goal) + F.mse_loss(both, a * goal + (1 - a) * goal_)) / 2
        measures = {name: found[name] for name in ("top1", "top1_chance")}
        return loss, measures | {"restored": explained(out, goal)}

    def after_step(self, step, steps):
        pretrain.follow(self.slow, nn.ModuleList([self.encoder, self.head]), self.momentum)


def siamese(p, z):
    """Mean cosine of predictions and what they predict (n, c), which is not to move towards them."""
    return F.cosine_similarity(p, z.detach()).mean()


class PCRLv2(nn.Module):
    """A Unified Visual Information Preservation Framework (arXiv:2301.00772): restore, compare, at several
    scales.

    Decoder without skips (nsUNet). At a scale drawn each step: siamese comparison, -cos(p, stop(z')) both
    ways, z the standardised mean of the decoder's map, p = predictor(z) of width 2 c (code), of painted V and
    painted V_, and of each with a local view, mean of the two; that map's restoration of V, times half a
    cosine from 1 to 0 (code); and the last map's. All weights 1 (code). Ours: one local view, a part of
    twin of half the edges enlarged to a crop (code: six small sub-crops, whose last map would here be one
    token); jitter and painted boxes for the code's blur, noise, gamma and swapped patches; one scale a step
    for all pairs, of 16, 8, 4, 2 voxels; a convolution of 1^3 restores; z is standardised over all 3 b views
    of the step, not each b of them (a mean of earlier steps lags behind, and all z of a step then point where
    the features drift); none in the predictor.
    """
    passes = 3, 0

    def __init__(self, cfg):
        super().__init__()
        self.network = SwinUNETR(cfg.in_channels, cfg.in_channels, **tasks.swin(cfg))
        self.encoder, widths = self.network.encoder, [cfg.feature_size * k for k in (8, 4, 2, 1)]
        pairs = [(nn.Linear(c, 2 * c), nn.Linear(2 * c, c)) for c in widths]
        self.predictors = nn.ModuleList(nn.Sequential(a, nn.ReLU(), b) for a, b in pairs)
        self.restorers = nn.ModuleList(nn.Conv3d(c, cfg.in_channels, 1) for c in widths)
        self.register_buffer("middle", torch.tensor(1.0))   # weight of the middle restoration

    def forward(self, batch, generator):
        V, b = batch["V"], len(batch["V"])
        (first, hidden), (second, _) = painted(V, generator), painted(batch["V_"], generator)
        maps = self.encoder(torch.cat([first, second, enlarged(batch["twin"], generator)]))
        scale = int(torch.randint(4, (), generator=generator, device=V.device))
        pyramid = decoded(self.network, [m[:b] for m in maps], skips=False)
        others = decoded(self.network, [m[b:] for m in maps], skips=False, levels=scale + 1)
        means = reduce(torch.cat([pyramid[scale], others[scale]]), "n c x y z -> n c", "mean").float()
        z = F.batch_norm(means, None, None, training=True)
        p, z = (rearrange(x.float(), "(s b) c -> s b c", s=3) for x in (self.predictors[scale](z), z))
        alike = [siamese(p[u], z[v]) / 2 + siamese(p[v], z[u]) / 2 for u, v in ((0, 1), (0, 2), (1, 2))]
        size = V.shape[2:]
        rough = F.interpolate(self.restorers[scale](pyramid[scale]).float(), size=size, mode="trilinear")
        out = self.network.out(pyramid[-1]).float()
        loss = F.mse_loss(out, V) + self.middle * F.mse_loss(rough, V) - alike[0] - (alike[1] + alike[2]) / 2
        allowed = rearrange(batch["subjects"], "b -> b 1") != batch["subjects"]
        found = losses.recognition(p[0], z[1], z[1], 1.0, allowed)
        return loss, {"top1": found["top1"], "top1_chance": found["top1_chance"], "alike": alike[0],
                      "restored": explained(out, V, hidden)}

    def after_step(self, step, steps):
        self.middle.fill_((1 + math.cos(math.pi * (step + 1) / steps)) / 2)


@losses.full_precision
def local_ncc(a, b, window=9):
    """Mean over voxels of the squared correlation of a and b (b, c, x, y, z) in the window^3 around each;
    each sample's mean lies beyond the border; 1e-5 beside the product of the two sums of squares (code)."""
    def mean(x):
        for axis in range(3):
            kernel = [window if k == axis else 1 for k in range(3)]
            x = F.avg_pool3d(x, kernel, 1, [n // 2 for n in kernel])
        return x
    # A mean square less a squared mean: around 0, where float32 has digits left for it.
    a, b = (x - x.mean(dim=(1, 2, 3, 4), keepdim=True) for x in (a, b))
    m_a, m_b, n = mean(a), mean(b), window ** 3
    pairs = (a * b, m_a * m_b), (a * a, m_a * m_a), (b * b, m_b * m_b)
    cross, s_a, s_b = (n * (mean(x) - y) for x, y in pairs)
    return (cross.square() / (s_a.clamp(min=0) * s_b.clamp(min=0) + 1e-5)).mean()


@losses.full_precision
def positions(matrix, field, size):
    """Where voxels of A are looked for in B: matrix (c + field(c)), for F.grid_sample, (b, *size, 3). matrix
    (b, 3, 4) as F.affine_grid takes it;  field (b, 3, ..) coarser, in voxels along z y x;  size (3,)"""
    still = rearrange(torch.eye(3, 4, device=field.device), "k l -> 1 k l")
    still = F.affine_grid(still, (1, 1, *size), align_corners=False)
    field = rearrange(F.interpolate(field, size=tuple(size), mode="trilinear"), "b l x y z -> b x y z l")
    moved = still + field * 2 / torch.tensor(tuple(size)[::-1], device=field.device)
    turned = einsum(moved, matrix[:, :, :3], "b x y z l, b k l -> b x y z k")
    return turned + rearrange(matrix[:, :, 3], "b k -> b 1 1 1 k")


@torch.no_grad()
def misplaced(position, H, valid, patch):
    """How far valid (b, t) patches lie from their true places, H c, over how far c itself is from them."""
    size, p = position.shape[1:4], dict(p=patch, q=patch, r=patch)
    position = reduce(position.double(), "b (i p) (j q) (k r) l -> b (i j k) l", "mean", **p).flip(-1)
    position = (position + 1) * torch.tensor(size, device=H.device) / 2 - 0.5
    c = data.patch_centres([n // patch for n in size], patch).to(H.device)
    truth = data.transform(H, c)
    off, still = ((x - truth).norm(dim=-1)[valid].sum() for x in (position, c))
    return off / still.clamp(min=1e-12)


class GVSL(nn.Module):
    """Geometric Visual Similarity Learning (arXiv:2303.00874): align two volumes, and restore one.

    Z-matching head: an affine map from the last maps of both, two convolutions and a mean; then a field of
    moves from the decoder's map of A beside that of B after the affine map. Loss: 1 - NCC of B moved onto A
    (windows of 9), mean squared slope of the moves, voxels a voxel, squared error of A restored from A
    painted, 1 : 1 : 1 (code). Ours: A is V and B its moved copy V_ (paper: two patients), moved back two
    thirds of the way (paper: hearts aligned beforehand; further off the slope of the NCC knows no way); five
    painted boxes (code: up to 30 smaller ones, shuffled voxels, bent intensities); a 3 x 4 matrix within 0.75
    of the identity for angles, zooms and shears, of 0.1 of the answer to (A, B) less that to (B, A), from
    difference and sum of the maps (paper: one answer, which here is one matrix for all); no move at first; a
    field of half the resolution, applied with the affine map at once. Measured: `misplaced`, 1: none learned.
    """
    passes, reach, pace, left = (2, 0), 0.75, 0.1, 1 / 3

    def __init__(self, cfg):
        super().__init__()
        self.network, f = SwinUNETR(cfg.in_channels, cfg.in_channels, **tasks.swin(cfg)), cfg.feature_size
        self.encoder, self.patch = self.network.encoder, cfg.token_patch
        self.whole = nn.Sequential(*[part for c in (32 * f, 8 * f) for part in (
            nn.Conv3d(c, 8 * f, 3, padding=1), nn.GroupNorm(f, 8 * f), nn.LeakyReLU(0.2))])
        self.affine = nn.Linear(8 * f, 12, bias=False)
        self.field = nn.Sequential(nn.Conv3d(2 * f, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.LeakyReLU(0.2),
                                   nn.Conv3d(16, 3, 3, padding=1))
        for zero in (self.affine.weight, *self.field[-1].parameters()):     # starts without a move
            nn.init.zeros_(zero)

    def matrix(self, a, b):
        """The last maps of A and B (b, c, i, j, k) -> (b, 3, 4), as F.affine_grid takes it."""
        apart, both = (F.group_norm(x, 1) for x in (a - b, a + b))
        pairs = torch.cat([torch.cat([x, both], dim=1) for x in (apart, -apart)])
        moves = self.affine(reduce(self.whole(pairs), "n c i j k -> n c", "mean"))
        there, back = rearrange(moves, "(s b) (k l) -> s b k l", s=2, k=3)
        return self.reach * (self.pace * (there - back)).tanh() + torch.eye(3, 4, device=a.device)

    def forward(self, batch, generator):
        A, H, b = batch["V"], batch["H"], len(batch["V"])
        left = torch.lerp(torch.eye(4).to(H), H, self.left)
        B = data.warp(batch["V_"], left @ torch.linalg.inv(H), A.shape[2:])
        damaged, hidden = painted(A, generator)
        maps = self.encoder(torch.cat([damaged, B]))
        map_A, whole_A = decoded(self.network, [m[:b] for m in maps])[-2:]
        map_B = decoded(self.network, [m[b:] for m in maps], levels=4)[-1].float()
        # A map two voxels deep (see model.convolve), and places, of which bfloat16 has half a voxel.
        with torch.autocast(A.device.type, enabled=False):
            matrix = self.matrix(*rearrange(maps[-1].float(), "(s b) c i j k -> s b c i j k", s=2))
            grid = F.affine_grid(matrix, map_B.shape, align_corners=False)
        moved = F.grid_sample(map_B, grid, align_corners=False)
        field = self.field(torch.cat([moved, map_A], dim=1)).float()
        position = positions(matrix, field, A.shape[2:])
        similar = local_ncc(F.grid_sample(B, position, align_corners=False, padding_mode="border"), A)
        rough = sum((field.diff(dim=axis) / 2).square().mean() for axis in (2, 3, 4)) / 3   # 2 voxels apart
        out = self.network.out(whole_A).float()
        loss = 1 - similar + rough + F.mse_loss(out, A)
        off = misplaced(position, left, batch["valid"], self.patch)
        return loss, {"ncc": similar, "misplaced": off, "restored": explained(out, A, hidden)}


METHODS = dict(simclr=SimCLR, mocov3=MoCoV3, vicregl=VICRegL, pcrlv1=PCRLv1, pcrlv2=PCRLv2, gvsl=GVSL)
