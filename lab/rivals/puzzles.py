"""Rivals that ask where something is, how it was turned, or how its pieces were mixed.

Each method: `loss, measures = method(batch, generator)`. Accuracies are logged beside their chance, or beside
what a network knows that sees nothing of the picture (_blind).
"""
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn

from data import patch_centres
from losses import similarity
from model import Projector, Swin3D, SwinUNETR
from tasks import swin

# (axes of rot90, quarter turns): about z as Swin-UNETR has it; and all ten of a volume, the first none
TURNS_Z = [((2, 3), k) for k in range(4)]
TURNS = [((2, 3), 0)] + [(plane, k) for plane in ((2, 3), (2, 4), (3, 4)) for k in (1, 2, 3)]


def turned(V, classes, turns):
    """Sample i of V (b, c, x, y, z), a cube, turned as turns[classes[i]] says."""
    return torch.stack([torch.rot90(v, turns[k][1], [axis - 1 for axis in turns[k][0]])
                        for v, k in zip(V, classes.tolist())])


def accuracy(logits, target):
    """Share of the rows (.., k) whose largest is the target (..)."""
    return (logits.detach().argmax(-1) == target).float().mean()


def classifier(cfg, classes):
    """Head on pooled features: an MLP of one hidden layer."""
    width = 16 * cfg.feature_size
    return nn.Sequential(nn.Linear(width, cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, classes))


class Rotation(nn.Module):
    """Gidaris et al., ICLR 2018, arXiv:1803.07728, in 3D as Taleb et al., NeurIPS 2020, arXiv:2006.03829.

    Eq. 1-3: the class of a turn by multiples of 90 degrees, cross-entropy. In a volume ten classes: none, and
    90, 180, 270 degrees about each axis (Taleb, Sec. 3). rot90 moves voxels and interpolates nothing.
    Deviations: a sample is turned once a step (paper: all turns in one batch); crops must be cubes; with
    anisotropic voxels the sharpness along an axis gives the turn away.
    """
    passes, alike = (1, 0), 3

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Swin3D(cfg.in_channels, **swin(cfg))
        self.head = classifier(cfg, len(TURNS))

    def forward(self, batch, generator):
        V = batch["V"]
        turns = torch.randint(len(TURNS), (len(V),), generator=generator, device=V.device)
        maps = self.encoder(turned(V, turns, TURNS))
        logits = self.head(reduce(maps[-1], "b c x y z -> b c", "mean")).float()
        chance = logits.new_tensor(1 / len(TURNS))
        return F.cross_entropy(logits, turns), dict(accuracy=accuracy(logits, turns), chance=chance)


def cost(count, size, crop):
    """Passes of a crop that `count` inputs of `size` (3,) cost: the encoder pads edges to multiples of 32."""
    of_one, of_crop = (math.prod(-(-n // 32) for n in edges) for edges in (size, crop))
    return count * of_one / of_crop


def far_permutations(pieces, count, seed=0):
    """(count, pieces) permutations, each as far (Hamming) as can be from the nearest before it. Jigsaw's
    Alg. 1 sums the distances to all before it, which lets two be near: 2 of 8 places apart at 100, here 5."""
    generator = np.random.default_rng(seed)
    every = np.array(list(itertools.permutations(range(pieces))))
    chosen, nearest = [generator.integers(len(every))], np.full(len(every), pieces + 1)
    while len(chosen) < count:
        nearest = np.minimum(nearest, (every != every[chosen[-1]]).sum(1))
        chosen.append(generator.choice(np.flatnonzero(nearest == nearest.max())))
    return torch.from_numpy(every[chosen])


class Jigsaw(nn.Module):
    """Noroozi and Favaro, ECCV 2016, arXiv:1603.09246, in 3D: in which order do the pieces of a crop come?

    Each piece passes the encoder alone, their features side by side tell the permutation, one of 100 that
    are far from each other (paper: up to 1000). Against shortcuts: each piece is cut at random, with gaps of
    1/8 of a cell for the paper's 11 of 75 pixels, and has mean 0 and deviation 1. Deviations: 2^3 pieces
    (paper 3^2), what a crop of 64^3 holds; features of 64 channels a piece (paper: 512); each crop is laid in
    32 orders a step (paper: 1), which costs the encoder nothing.
    """
    cells, count, orders = 2, 100, 32

    @classmethod
    def passes(cls, crop):
        cells = [n // cls.cells for n in crop]
        return cost(cls.cells**3, [n - n // 8 for n in cells], crop), 0

    def __init__(self, cfg):
        super().__init__()
        self.encoder, pieces = Swin3D(cfg.in_channels, **swin(cfg)), self.cells**3
        self.register_buffer("permutations", far_permutations(pieces, self.count))
        self.reduce = nn.Linear(16 * cfg.feature_size, 64)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(64 * pieces, cfg.hidden), nn.GELU(),
                                  nn.Linear(cfg.hidden, self.count))

    def pieces(self, V, generator):
        """(b, n, c, x, y, z): the cells in their own order, each cut 1/8 smaller at a random place."""
        size = [n // self.cells for n in V.shape[2:]]
        i, j, k = (n - n // 8 for n in size)
        room = torch.tensor(size, device=V.device) // 8 + 1
        cell = torch.cartesian_prod(*[torch.arange(0, n, n // self.cells) for n in V.shape[2:]]).to(V.device)
        at = torch.rand(len(V), self.cells**3, 3, generator=generator, device=V.device)
        at = cell + (at * room).long()
        x = torch.stack([torch.stack([v[:, x:x + i, y:y + j, z:z + k] for x, y, z in rows])
                         for v, rows in zip(V, at.tolist())])
        return (x - x.mean((3, 4, 5), keepdim=True)) / x.std((3, 4, 5), keepdim=True).clamp(min=1e-6)

    def forward(self, batch, generator):
        x = self.pieces(batch["V"], generator)
        order = torch.randint(self.count, (len(x), self.orders), generator=generator, device=x.device)
        maps = self.encoder(rearrange(x, "b n c x y z -> (b n) c x y z"))
        features = self.reduce(reduce(maps[-1], "s c x y z -> s c", "mean"))
        laid = torch.stack([each[self.permutations[o]] for each, o in zip(features.chunk(len(x)), order)])
        logits = self.head(rearrange(laid, "b o n c -> (b o) (n c)")).float()
        order = order.flatten()
        measures = dict(accuracy=accuracy(logits, order), chance=logits.new_tensor(1 / self.count))
        return F.cross_entropy(logits, order), measures


class Reverse(torch.autograd.Function):
    """The value itself, and its gradient with the other sign."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def twist(V, moves, cells):
    """A cube V (c, x, y, z) as a Rubik's cube of `cells` layers an axis, after `moves` (axis, layer, k): k
    quarter turns of a layer about the axis, as rot90 turns the two axes after it."""
    V, edge = V.clone(), V.shape[1] // cells
    for axis, layer, k in moves:
        part = V.narrow(axis + 1, layer * edge, edge)
        part.copy_(torch.rot90(part, k, [n + 1 for n in range(3) if n != axis]))
    return V


class RubiksCube(nn.Module):
    """Tao et al., MICCAI 2020, arXiv:2007.08826 (Rubik's cube++): a twisted cube is restored as a whole.

    Sec. 2: layers of the volume turn about an axis (volume-wise transformation), an encoder-decoder restores
    the volume under a reconstruction and an adversarial loss. Ours: 4 layers an axis, 3 moves of 1 to 3
    quarter turns, mean squared error, weight 0.01 of the adversarial part. Deviations: the decoder is
    SwinUNETR's; the loop has one optimizer, so the discriminator (3 convolutions) learns in the same backward
    pass, behind a reversed gradient (1409.7495); crops are cubes.
    """
    passes, alike = (1, 0), 3
    cells, moves, adversarial = 4, 3, 0.01

    def __init__(self, cfg):
        super().__init__()
        self.network = SwinUNETR(cfg.in_channels, cfg.in_channels, **swin(cfg))
        self.encoder, f = self.network.encoder, cfg.feature_size
        self.critic = nn.Sequential(nn.Conv3d(cfg.in_channels, f, 4, 4), nn.LeakyReLU(0.2),
                                    nn.Conv3d(f, 2 * f, 4, 2), nn.LeakyReLU(0.2), nn.Conv3d(2 * f, 1, 3))

    def scrambled(self, V, generator):
        draw = torch.rand(len(V), self.moves, 3, generator=generator, device=V.device)
        moves = (draw * torch.tensor([3, self.cells, 3], device=V.device)).long().tolist()
        return torch.stack([twist(v, [(axis, layer, k + 1) for axis, layer, k in each], self.cells)
                            for v, each in zip(V, moves)])

    def forward(self, batch, generator):
        V = batch["V"]
        scrambled = self.scrambled(V, generator)
        x = self.network(scrambled).float()
        error, spread = (x - V).square().mean(), (V - V.mean((2, 3, 4), keepdim=True)).square().mean()
        real, made = self.critic(V), self.critic(Reverse.apply(x))
        judged = F.softplus(-real).mean() + F.softplus(made).mean()
        seen = ((real > 0).float().mean() + (made < 0).float().mean()) / 2
        measures = dict(of_input=error / (scrambled - V).square().mean().clamp(min=1e-12),
                        of_mean=error / spread.clamp(min=1e-12), critic=seen)
        return error + self.adversarial * judged, {name: value.detach() for name, value in measures.items()}


class PositionLabel(nn.Module):
    """Zhang and Gong, AAAI 2023, arXiv:2206.04981: a patch tells its absolute position, cross-entropy.

    Fig. 1: an MLP on the encoder's patch features gives the class of the patch's place (the first of the two
    labels; the second, relative one has no part here). Deviations: the place is that in the scan, in 8 parts
    an axis, a softmax an axis (paper: one class a patch of the image), for the place in a crop can be read
    off the zeros that pad its windows and convolutions. What remains of that shortcut is accuracy_blind: the
    token's place in the crop is known, and the crop taken for the middle one. Tokens of the body alone.
    """
    passes = (1, 0)
    parts = 8

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.patch = Swin3D(cfg.in_channels, **swin(cfg)), cfg.token_patch
        self.level = int(math.log2(cfg.token_patch)) - 1
        self.head = Projector(cfg.feature_size * 2**self.level, cfg.hidden, 3 * self.parts)

    def labels(self, start, shape, size):
        """(b, t, 3) long: in which part of its scan each token of a crop of `size` from `start` on lies."""
        grid = [n // self.patch for n in size]
        at = patch_centres(grid, self.patch).to(start.device) + rearrange(start, "b d -> b 1 d")
        return ((at + 0.5) / rearrange(shape, "b d -> b 1 d") * self.parts).long().clamp(0, self.parts - 1)

    def forward(self, batch, generator):
        V, valid, shape = batch["V"], batch["valid"], batch["shape"]
        x = rearrange(self.encoder(V)[self.level], "b c i j k -> b (i j k) c")
        logits = rearrange(self.head(x), "b t (d k) -> b t d k", d=3).float()[valid]
        room = shape - torch.tensor(V.shape[2:], device=V.device)
        truth, blind = (self.labels(start, shape, V.shape[2:])[valid] for start in (batch["start"], room / 2))
        if not len(truth):
            return logits.sum(), {}
        return F.cross_entropy(rearrange(logits, "t d k -> (t d) k"), truth.flatten()), dict(
            accuracy=accuracy(logits, truth), accuracy_blind=(truth == blind).float().mean())


def overlaps(starts, bases, edge):
    """(k, n) shares of crops at `starts` (k, 3) that lie in base crops at `bases` (n, 3), all `edge` (3,)."""
    shift = (rearrange(starts, "k d -> k 1 d") - bases).abs()
    return (edge - shift).clamp(min=0).prod(-1) / edge.prod()


class VoCo(nn.Module):
    """Wu et al., CVPR 2024, arXiv:2402.17300: where among a grid of base crops does a random crop lie?

    Fig. 2: y, the shares of the random crop's volume in each base crop; l, the cosine of their embeddings
    (negative: 0), no gradient into the base crops. Loss as the paper has it: -mean log(1 - |y - l|), and mean
    cosine of two base crops that are not the same, weight 1. The region `around` the crop is cut into a
    grid as the paper's slab of 4 x 4 crops is, 2 x 2 x 2; all are shrunk to half the crop's edges, up to a
    multiple of 32 (paper: 96 to 64). Projector as in the released code: batch norms without parameters.
    The released code is not the paper: it weighs the terms by y and adds l^2 where y is 0, squares cosines of
    base crops, has a slow teacher beside the student, takes five maps, flips and turns. Ours: the paper's
    loss, the last map, as many random crops as base crops (code: 2 to 8).
    """
    surroundings = True

    @classmethod
    def passes(cls, crop):
        return cost(2 * 8, cls.shrunk(crop), crop), 0

    @staticmethod
    def shrunk(crop):
        return [-(-n // 64) * 32 for n in crop]

    def __init__(self, cfg):
        super().__init__()
        self.encoder, self.crop = Swin3D(cfg.in_channels, **swin(cfg)), cfg.crop
        norms = [nn.BatchNorm1d(cfg.hidden, affine=False, track_running_stats=False) for _ in range(2)]
        self.head = nn.Sequential(nn.Linear(16 * cfg.feature_size, cfg.hidden), norms[0], nn.ReLU(),
                                  nn.Linear(cfg.hidden, cfg.hidden), norms[1], nn.ReLU(),
                                  nn.Linear(cfg.hidden, cfg.embedding))

    def forward(self, batch, generator):
        V = batch["around"]
        edge = torch.tensor(V.shape[2:], device=V.device) // 2
        bases = torch.cartesian_prod(*[torch.arange(2, device=V.device)] * 3) * edge            # (n, 3)
        n, (i, j, k) = len(bases), edge.tolist()
        starts = (torch.rand(len(V), n, 3, generator=generator, device=V.device) * (edge + 1)).long()
        places = torch.cat([repeat(bases, "n d -> b n d", b=len(V)), starts], dim=1).tolist()
        crops = torch.stack([v[:, x:x + i, y:y + j, z:z + k]
                             for v, rows in zip(V, places) for x, y, z in rows])
        maps = self.encoder(F.interpolate(crops, self.shrunk(self.crop), mode="trilinear"))
        z = self.head(reduce(maps[-1], "b c x y z -> b c", "mean"))
        base, query = rearrange(z, "(b s n) e -> s b n e", s=2, n=n)
        y = torch.stack([overlaps(each, bases, edge) for each in starts])                       # (b, n, n)
        l = similarity(query, base.detach()).relu()
        loss = -torch.log((1 - (y - l).abs()).clamp(min=1e-6)).mean()
        apart = similarity(base, base).relu()
        apart = (apart.sum() - apart.diagonal(dim1=1, dim2=2).sum()) / (len(V) * n * max(n - 1, 1))
        measures = dict(accuracy=accuracy(l, y.argmax(-1)), chance=l.new_tensor(1 / n), apart=apart.detach(),
                        of_mean=(y - l.detach()).abs().mean() / (y - 1 / n).abs().mean().clamp(min=1e-6))
        return loss + apart, measures


METHODS = {"jigsaw": Jigsaw, "rotation": Rotation, "rubiks_cube": RubiksCube, "position_label": PositionLabel,
           "voco": VoCo}
