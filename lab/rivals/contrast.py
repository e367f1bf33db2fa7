"""Rivals that compare views: SimCLR, MoCo v3, VICRegL, PCRLv1, PCRLv2, GVSL. Written from the papers; numbers that
papers leave open are of the released codes ("code"). MoCo v2 is L_g alone: pretrain.py --weights=1,0,0.

All see two or three samples a step on small machines, so that the papers' batch norms would know two numbers:
`Head` standardises by running statistics instead. Negatives are the step's other subjects, in both of their views:
keys of earlier steps can be beaten by telling now from then (see losses.recognition).
Axes: b batch, c channel, x y z voxels, i j k tokens of a map, t tokens, n rows, d numbers of an embedding.
"""
import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

import data
import losses
import pretrain
import tasks
from model import Swin3D, SwinUNETR


class Head(nn.Module):
    """Features (n, c) -> embeddings (n, d): standardised by running statistics, then `layers` linear maps with ReLUs
    between. Hidden width and d are cfg.hidden and cfg.embedding, S2DC's (papers: 2048 to 8192, and 128 to 8192)."""

    def __init__(self, channels, cfg, layers=2):
        super().__init__()
        self.standard = pretrain.Standard(channels)
        widths = [channels] + [cfg.hidden] * (layers - 1) + [cfg.embedding]
        self.layers = nn.Sequential(nn.Linear(*widths[:2]))
        for pair in zip(widths[1:], widths[2:]):
            self.layers.extend([nn.ReLU(), nn.Linear(*pair)])

    def forward(self, x):
        out = self.layers(self.standard(x.float()))
        if self.training:
            self.standard.follow(x.detach().float())
        return out


def predictor(cfg):
    return nn.Sequential(nn.Linear(cfg.embedding, cfg.hidden), nn.ReLU(), nn.Linear(cfg.hidden, cfg.embedding))


def pooled(maps):
    return reduce(maps[-1], "n c i j k -> n c", "mean")


def contrasted(query, keys, subjects, temperature):
    """NT-Xent, Eq. 1 of SimCLR, and what it is worth: query and keys (2 b, d), the two views of a batch one after
    the other, row n of one the partner of row n + b of the other; negatives: all keys of other subjects."""
    subjects = torch.cat([subjects, subjects])
    allowed = rearrange(subjects, "n -> n 1") != subjects
    key = keys.roll(len(keys) // 2, 0)
    loss = losses.info_nce(query, key, keys, temperature, allowed)
    found = losses.recognition(query, key, keys, temperature, allowed)
    return loss, {name: found[name] for name in ("top1", "top1_chance")}


class SimCLR(nn.Module):
    """A Simple Framework for Contrastive Learning (arXiv:2002.05709): the two views of a sample find each other.

    Eq. 1, NT-Xent over the 2 b views V_ and twin of the batch; temperature 0.1 (Table 5), head of two layers (Fig. 8).
    Ours: the encoder and its moves; a batch of cfg.batch for 4096, that is 2 b - 2 negatives (b = 2: two, chance 1/3);
    running standardisation for batch norm; AdamW for LARS; no negatives of the same subject.
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

    Algorithm 1: ctr(q1, k2) + ctr(q2, k1), each InfoNCE times 2 tau, tau = 0.2 (code); q = predictor(projector(encoder)),
    k = the same without predictor, its weights an average of the former's: momentum 0.99, to 1 by half a cosine (code).
    Projector of three layers, predictor of two. Ours: keys of both views are negatives, 2 b - 2 of them (paper: b - 1
    of 4095); running standardisation for batch norms; the embedding is a convolution as elsewhere, and trained.
    """
    passes = 2, 2
    temperature, momentum = 0.2, 0.99

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Swin3D(cfg.in_channels, **tasks.swin(cfg))
        self.projector = Head(16 * cfg.feature_size, cfg, 3)
        self.predictor = predictor(cfg)
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

    invariance  mean squared difference of partners (code: over n and d; Eq. 5: sums over d)
    variance    Eq. 1-2 of each side: mean over d of max(0, 1 - sqrt(var + 1e-4)); half their sum (code)
    covariance  Eq. 3-4 of each side: sum over pairs of different numbers of cov^2, over d; summed
    earlier     (m, d) without gradient: rows that the statistics take in, too. Then a row of now stands for (n + m) / n
                in their gradients, as if one of that many were drawn to learn
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
    return terms | {"variance": sum(spread) / 2, "covariance": sum(mixed)}


class VICRegL(nn.Module):
    """Self-Supervised Learning of Local Visual Features (arXiv:2210.01571): VICReg of crops and of patches.

    Eq. 3-5: 0.75 x global + 0.25 x local, weights 25 25 1 (code); the local one of location matches, Eq. 1, and of feature
    matches, Eq. 2: the 20 nearest pairs of a sample (code, for ResNets). Projectors of three layers (code). Global: V, V_.
    Ours: location matches are S2DC's, Eq. 2-3 there, so that the two differ by the local loss alone; tokens of
    cfg.token_patch voxels, not of the last map; local statistics over all matches of the step and not over the batch
    place by place, which has two samples; the global ones over the step and the 32 crops of earlier ones.
    """
    passes = 2, 0
    share, weights, nearest, earlier = 0.75, dict(invariance=25.0, variance=25.0, covariance=1.0), 20, 32

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.level = Swin3D(cfg.in_channels, **tasks.swin(cfg)), int(math.log2(cfg.token_patch)) - 1
        self.expander = Head(16 * cfg.feature_size, cfg, 3)
        self.local = Head(cfg.feature_size * 2 ** self.level, cfg, 3)
        self.register_buffer("memory", torch.zeros(2, 0, cfg.embedding))

    def criterion(self, *sides):
        terms = vicreg(*sides)
        return sum(self.weights[name] * term for name, term in terms.items()), terms

    def forward(self, batch, generator):
        maps, b = self.encoder(torch.cat([batch["V"], batch["V_"]])), len(batch["V"])
        both = self.expander(pooled(maps))
        whole, terms = self.criterion(both[:b], both[b:], *self.memory)
        tokens = rearrange(maps[self.level], "n c i j k -> n (i j k) c")
        t, valid, valid_ = tokens.shape[1], batch["valid"], batch["valid_"]
        tokens = rearrange(self.local(rearrange(tokens, "n t c -> (n t) c")), "(n t) d -> n t d", t=t).float()
        places, partners, _ = *batch["pairs"].T[[0, 1]], None
        raise NotImplementedError


METHODS = dict(simclr=SimCLR, mocov3=MoCoV3)
