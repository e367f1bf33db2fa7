"""Rivals that hide or spoil parts of a crop and restore them.

Each method: `loss, measures = method(batch, generator)`. All take intensities as the data's preprocessing
leaves them. The names of the measures say what a squared error is a part of; above 1 less is learned than
the shortcut knows:
of_mean    of the error of the own mean of what is to be restored, which takes no look at its surroundings
of_near    of the error of what is seen, continued smoothly: the shortcut of all restoring
of_input   of the error of the spoilt crop as it is
"""
import copy
import functools
import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import nn

import pretrain
from lab.rivals.contrast import contrasted
from lab.rivals.puzzles import TURNS_Z, accuracy, classifier, turned
from losses import similarity
from model import Swin3D, SwinUNETR
from tasks import swin


def hidden_patches(like, patch, share, generator):
    """(b, 1, x, y, z) bool: round(share t) of the t patches of edge `patch` of each sample, drawn anew."""
    i, j, k = (n // patch for n in like.shape[2:])
    order = torch.rand(len(like), i * j * k, generator=generator, device=like.device).argsort(1).argsort(1)
    return repeat(order < round(share * i * j * k), "b (i j k) -> b 1 (i x) (j y) (k z)", i=i, j=j, k=k,
                  x=patch, y=patch, z=patch)


def boxes(like, least, most, count, generator, share=math.inf):
    """(b, 1, x, y, z) bool: up to `count` boxes a sample, their edges `least` to `most` of the crop's, drawn
    until their volumes add up to `share` (a number or (b, 1)) of it."""
    size = torch.tensor(like.shape[2:], device=like.device)
    draw = torch.rand(2, len(like), count, 3, generator=generator, device=like.device)
    edge = ((least + (most - least) * draw[0]) * size).round()
    start = ((size - edge + 1) * draw[1]).floor()
    volume = (edge / size).prod(-1)
    used = (volume.cumsum(1) - volume < share).float()                          # (b, n)
    sides = []
    for n, first, length in zip(like.shape[2:], start.unbind(-1), edge.unbind(-1)):
        at = torch.arange(n, device=like.device) - rearrange(first, "b n -> b n 1")
        sides.append(((at >= 0) & (at < rearrange(length, "b n -> b n 1"))).float())        # (b, n, x)
    inside = einsum(used, *sides, "b n, b n x, b n y, b n z -> b x y z") > 0
    return rearrange(inside, "b x y z -> b 1 x y z")


def noise(V, generator):
    """Uniform noise in each sample's own range."""
    low, high = V.amin((1, 2, 3, 4), keepdim=True), V.amax((1, 2, 3, 4), keepdim=True)
    return low + (high - low) * torch.rand(V.shape, generator=generator, device=V.device)


def masked_mean(x, hidden):
    """Mean of x (b, c, x, y, z) over the hidden voxels (b, 1, x, y, z); 0 if there are none."""
    return (x * hidden).sum() / (hidden.sum() * x.shape[1]).clamp(min=1)


def near(V, hidden, cell=4, sweeps=40):
    """V (b, c, x, y, z) continued smoothly into the hidden voxels (b, 1, x, y, z): cells of cell^3 voxels,
    none of them seen, become the mean of the 3^3 cells around, again and again, and are interpolated."""
    seen = (~hidden).to(V)
    share = F.avg_pool3d(seen, cell)
    known, x = share > 0, F.avg_pool3d(V * seen, cell) / share.clamp(min=1e-6)
    out = x + ~known * (x * known).sum((2, 3, 4), True) / known.sum((2, 3, 4), True).clamp(min=1)
    for _ in range(sweeps):
        out = torch.where(known, x, F.avg_pool3d(out, 3, 1, 1, count_include_pad=False))
    return F.interpolate(out, V.shape[2:], mode="trilinear")


@torch.no_grad()
def restored(prediction, truth, hidden, guess):
    """{of_mean, of_near}: squared error over the hidden voxels as parts of those of two shortcuts."""
    mean = (truth * hidden).sum((2, 3, 4), keepdim=True) / hidden.sum((2, 3, 4), keepdim=True).clamp(min=1)
    error, flat, blurred = (masked_mean((x - truth).square(), hidden) for x in (prediction, mean, guess))
    return dict(of_mean=error / flat.clamp(min=1e-12), of_near=error / blurred.clamp(min=1e-12))


def pooled(maps):
    """Mean of the last map over its tokens, standardised over the batch: pooled features are nearly alike."""
    x = reduce(maps[-1], "b c x y z -> b c", "mean")
    return F.batch_norm(x.float(), None, None, training=True) if len(x) > 1 else x


def upsampled(conv, x, edge):
    """One layer back to voxels: conv gives each token its edge^3 voxels."""
    return rearrange(conv(x), "b (c i j k) x y z -> b c (x i) (y j) (z k)", i=edge, j=edge, k=edge).float()


class SimMIM(nn.Module):
    """Xie et al., CVPR 2022, arXiv:2111.09886: hidden patches become a token, their voxels are regressed.

    Sec. 3.2-3.4: random masking at ratio 0.6, the token stands for the embedded patch, a one-layer head on
    the last map, L1 on hidden voxels alone. Deviations: patches of 16 voxels (paper: 32 pixels of 192, a
    sixth; of a 64^3 crop 32 would leave 8 patches); intensities are regressed as the data are scaled.
    """
    passes = (1, 0)
    patch, share = 16, 0.6

    def __init__(self, cfg):
        super().__init__()
        self.encoder = Swin3D(cfg.in_channels, **swin(cfg))
        self.token = nn.Parameter(0.02 * torch.randn(cfg.feature_size))
        self.head = nn.Conv3d(16 * cfg.feature_size, cfg.in_channels * 32**3, 1)

    def restore(self, V, hidden):
        """V (b, c, x, y, z) with the voxels of the hidden patches as the network sees them."""
        def hide(_, __, x):
            return torch.where(hidden[:, :, ::2, ::2, ::2], rearrange(self.token, "f -> f 1 1 1").to(x), x)
        hook = self.encoder.embed.register_forward_hook(hide)
        try:
            return upsampled(self.head, self.encoder(V)[-1], 32)
        finally:
            hook.remove()

    def forward(self, batch, generator):
        V = batch["V"]
        hidden = hidden_patches(V, self.patch, self.share, generator)
        x = self.restore(V, hidden)
        return masked_mean((x - V).abs(), hidden), restored(x, V, hidden, near(V, hidden))


class MAE3D(nn.Module):
    """He et al., CVPR 2022, arXiv:2111.06377, in 3D: three quarters of the patches are hidden and decoded.

    Fig. 1: ratio 0.75, patches of 16; Sec. 3: mean squared error on hidden patches, targets normalised within
    each patch (Table 1d). Deviations: a Swin encoder cannot drop tokens, so hidden voxels hold a learned
    value and cost as much as others; the decoder is SwinUNETR's, its skips see hidden voxels hidden as well.
    """
    passes = (1, 0)
    patch, share = 16, 0.75

    def __init__(self, cfg):
        super().__init__()
        self.network = SwinUNETR(cfg.in_channels, cfg.in_channels, **swin(cfg))
        self.encoder = self.network.encoder
        self.token = nn.Parameter(torch.zeros(cfg.in_channels))

    def targets(self, V):
        """V less each patch's mean over its deviation, by channel."""
        p = self.patch
        x = rearrange(V, "b c (i x) (j y) (k z) -> b c i j k (x y z)", x=p, y=p, z=p)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        return rearrange(x, "b c i j k (x y z) -> b c (i x) (j y) (k z)", x=p, y=p, z=p)

    def forward(self, batch, generator):
        V = batch["V"]
        hidden = hidden_patches(V, self.patch, self.share, generator)
        x = self.network(torch.where(hidden, rearrange(self.token, "c -> c 1 1 1"), V)).float()
        truth = self.targets(V)
        guess = self.targets(near(V, hidden))           # at the best contrast: a patch may have any
        fit = masked_mean(guess * truth, hidden) / masked_mean(guess.square(), hidden).clamp(min=1e-6)
        measures = restored(x, truth, hidden, fit * guess)
        return masked_mean((x - truth).square(), hidden), measures


class GLMAE(nn.Module):
    """Zhuang et al., arXiv:2306.08913 (TMI 2025): masked autoencoding of a global and a local view, and both
    agree with the complete global view.

    Fig. 2: reconstruction of both masked views, global-to-global and global-to-local consistency with the
    complete global view as anchor, which a momentum teacher encodes; mean squared error on hidden voxels.
    Ours: patches of 16, share 0.6; all four terms weigh 1; consistency by DINO's cross-entropy (2104.14294:
    temperatures 0.1 and 0.04, centre 0.9), teacher by cfg.momentum. Deviations: the global view is the crop
    (paper: of the whole scan), the local one of half its edges, enlarged to the crop; hidden as in MAE3D;
    the head is a layer of hidden units on features standardised over the batch (`pooled`).
    """
    passes = (2, 1)
    patch, share = 16, 0.6

    def __init__(self, cfg):
        super().__init__()
        self.network = SwinUNETR(cfg.in_channels, cfg.in_channels, **swin(cfg))
        self.encoder = self.network.encoder
        self.token = nn.Parameter(torch.zeros(cfg.in_channels))
        self.head = classifier(cfg, cfg.embedding)
        self.teacher = nn.ModuleList([copy.deepcopy(self.encoder), copy.deepcopy(self.head)])
        self.teacher.requires_grad_(False)
        self.momentum = cfg.momentum
        self.register_buffer("centre", torch.zeros(cfg.embedding))

    def forward(self, batch, generator):
        V = batch["V"]
        half = [n // 2 for n in V.shape[2:]]
        starts = torch.rand(len(V), 3, generator=generator, device=V.device).cpu()
        starts = (starts * (torch.tensor(half) + 1)).long().tolist()
        local = [v[:, x:x + half[0], y:y + half[1], z:z + half[2]] for v, (x, y, z) in zip(V, starts)]
        views = torch.cat([V, F.interpolate(torch.stack(local), V.shape[2:], mode="trilinear")])
        hidden, seen = hidden_patches(views, self.patch, self.share, generator), []
        hook = self.encoder.register_forward_hook(lambda _, __, maps: seen.append(maps[-1]))
        x = self.network(torch.where(hidden, rearrange(self.token, "c -> c 1 1 1"), views)).float()
        hook.remove()
        with torch.no_grad():
            anchor = self.teacher[1](pooled(self.teacher[0](V))).float()
            target = ((anchor - self.centre) / 0.04).softmax(1)
            self.centre.lerp_(anchor.mean(0), 0.1)
        logits = self.head(torch.cat([pooled([maps]) for maps in seen[0].chunk(2)])).float() / 0.1
        agree = 2 * F.cross_entropy(logits, torch.cat([target, target]))            # of the two views
        restore = 2 * masked_mean((x - views).square(), hidden)
        both = (rearrange(x, "n e -> 1 n e") for x in (logits[:len(V)], anchor - self.centre))
        scores = similarity(*both)[0]
        top1 = accuracy(scores, torch.arange(len(V), device=V.device))
        measures = dict(top1=top1, top1_chance=logits.new_tensor(1 / len(V)), agree=agree.detach(),
                        agree_chance=logits.new_tensor(2 * math.log(logits.shape[1])))
        return restore + agree, measures | restored(x, views, hidden, near(views, hidden))

    def after_step(self, step, steps):
        pretrain.follow(self.teacher, nn.ModuleList([self.encoder, self.head]), self.momentum)


class ModelsGenesis(nn.Module):
    """Zhou et al., MICCAI 2019 and MedIA 2021, arXiv:2004.07882: a spoilt crop is restored as a whole.

    Sec. 2 and the released code: monotone Bezier curve of intensities (probability 0.9, half of them
    falling), local shuffling (0.5), then painting (0.9): a fifth in-painting, 5 boxes of a sixth to a third
    of the edges become noise; else out-painting, all but 5 boxes of 3/7 to 4/7 do; mean squared error over
    all voxels.
    Deviations: shuffled are half of the tiles of a grid of 4^3 voxels (released code: 10,000 windows of up to
    a tenth of the edges); no flips, here a mirrored liver is on the wrong side.
    """
    passes = (1, 0)

    def __init__(self, cfg):
        super().__init__()
        self.network = SwinUNETR(cfg.in_channels, cfg.in_channels, **swin(cfg))
        self.encoder = self.network.encoder

    def curve(self, V, draw):
        """V through a cubic Bezier curve from corner to corner of each sample's own square of intensities."""
        low, high = V.amin((1, 2, 3, 4), keepdim=True), V.amax((1, 2, 3, 4), keepdim=True)
        t, control = torch.linspace(0, 1, 256, device=V.device), draw(2, len(V), 2)
        falls = draw(len(V), 1) < 0.5
        x, y = (3 * t * (1 - t) ** 2 * p[:, :1] + 3 * t**2 * (1 - t) * p[:, 1:] + t**3 for p in control)
        y = torch.where(falls, y.flip(1), y)
        at = rearrange((V - low) / (high - low).clamp(min=1e-6), "b c x y z -> b (c x y z)").contiguous()
        k = torch.searchsorted(x.contiguous(), at).clamp(1, 255)
        (x0, x1), (y0, y1) = ((c.gather(1, k - 1), c.gather(1, k)) for c in (x, y))
        at = y0 + (y1 - y0) * ((at - x0) / (x1 - x0).clamp(min=1e-6)).clamp(0, 1)
        return low + (high - low) * at.view_as(V)

    def shuffle(self, V, draw, edge=4):
        """Half of the tiles of edge^3 voxels with their voxels in random order, channels together."""
        grid = dict(x=edge, y=edge, z=edge, i=V.shape[2] // edge, j=V.shape[3] // edge)
        tiles = rearrange(V, "b c (i x) (j y) (k z) -> b c (i j k) (x y z)", **grid)
        order = draw(len(V), 1, *tiles.shape[2:]).argsort(-1).expand_as(tiles)
        tiles = torch.where(draw(len(V), 1, tiles.shape[2], 1) < 0.5, tiles.gather(-1, order), tiles)
        return rearrange(tiles, "b c (i j k) (x y z) -> b c (i x) (j y) (k z)", **grid)

    def spoilt(self, V, generator):
        draw = functools.partial(torch.rand, generator=generator, device=V.device)
        on = rearrange(draw(4, len(V)) < torch.tensor([[0.9], [0.5], [0.9], [0.2]], device=V.device),
                       "n b -> n b 1 1 1 1")
        x = torch.where(on[0], self.curve(V, draw), V)
        x = torch.where(on[1], self.shuffle(x, draw), x)
        inner = boxes(V, 1 / 6, 1 / 3, 5, generator)
        outer = ~boxes(V, 3 / 7, 4 / 7, 5, generator)
        return torch.where(on[2] & torch.where(on[3], inner, outer), noise(x, generator), x)

    def forward(self, batch, generator):
        V = batch["V"]
        spoilt = self.spoilt(V, generator)
        x = self.network(spoilt).float()
        loss, spread = (x - V).square().mean(), (V - V.mean((2, 3, 4), keepdim=True)).square().mean()
        return loss, dict(of_input=loss.detach() / (spoilt - V).square().mean().clamp(min=1e-12),
                          of_mean=loss.detach() / spread.clamp(min=1e-12))


class SwinUNETRPretraining(nn.Module):
    """Tang et al., CVPR 2022, arXiv:2111.14791: inpainting, rotation and contrast of two spoilt copies.

    Sec. 3.2 and the released code: each copy is turned by 0, 90, 180 or 270 degrees about z, then boxes of 5
    to 25 % of the edges, until a share drawn up to 30 % is full, become noise; L1 over all voxels, cross-
    entropy of the turn, NT-Xent at temperature 0.5, all of weight 1. Decoder: one layer from the last map,
    as its transposed convolution. Deviations: crops are square in x y; both heads read the mean of the last
    map, standardised over the batch (`pooled`; code: a token each), the turn's has two layers (code: one);
    the released code also pastes boxes of other crops.
    """
    passes, alike = (2, 0), 2

    def __init__(self, cfg):
        super().__init__()
        self.encoder, f = Swin3D(cfg.in_channels, **swin(cfg)), 16 * cfg.feature_size
        self.decoder = nn.Conv3d(f, cfg.in_channels * 32**3, 1)
        self.rotation, self.contrast = classifier(cfg, 4), nn.Linear(f, cfg.embedding)

    def forward(self, batch, generator):
        V = torch.cat([batch["V"], batch["V"]])
        turns = torch.randint(4, (len(V),), generator=generator, device=V.device)
        V = turned(V, turns, TURNS_Z)
        most = 0.3 * torch.rand(len(V), 1, generator=generator, device=V.device)
        hidden = boxes(V, 0.05, 0.25, 150, generator, most)
        maps = self.encoder(torch.where(hidden, noise(V, generator), V))
        x, z = upsampled(self.decoder, maps[-1], 32), pooled(maps)
        logits = self.rotation(z).float()
        z = self.contrast(z)
        contrast, found = contrasted(z, z, batch["subjects"], 0.5)
        inpaint, rotate = (x - V).abs().mean(), F.cross_entropy(logits, turns)
        measures = dict(inpaint=inpaint, rotate=rotate, contrast=contrast, **found)
        measures |= dict(turn=accuracy(logits, turns), turn_chance=logits.new_tensor(1 / 4))
        measures |= restored(x, V, hidden, near(V, hidden))
        return inpaint + rotate + contrast, {name: value.detach() for name, value in measures.items()}


class SwinMM(nn.Module):
    """Wang et al., MICCAI 2023, arXiv:2307.12591: masked multi-view learning.

    Sec. 2.1 and the released code: two copies, each turned about z by 0 to 270 degrees and half of its
    patches of 16 voxels hidden; each is seen from two sides (axes permuted cyclically). Tasks, all of weight
    1: mean squared error over hidden voxels, of each crop standardised (code), the turn, NT-Xent (0.5) of the
    two copies, and the mutual loss: both sides restore the hidden voxels alike. Decoder: SwinUNETR's, as
    there. Deviations: crops are square in x y, and one that is no cube tells its side; the second copy's
    sides are compared with each other (released code: with the first's); heads as in Swin-UNETR's
    pre-training; hidden voxels hold the mean of the others (there: 0, which may be tissue).
    """
    passes, alike = (4, 0), 2
    patch, share = 16, 0.5
    SIDES = ("b c x y z -> b c y z x", "b c x y z -> b c z x y")
    BACK = ("b c y z x -> b c x y z", "b c z x y -> b c x y z")

    def __init__(self, cfg):
        super().__init__()
        self.network = SwinUNETR(cfg.in_channels, cfg.in_channels, **swin(cfg))
        self.encoder, f = self.network.encoder, 16 * cfg.feature_size
        self.rotation, self.contrast = classifier(cfg, 4), nn.Linear(f, cfg.embedding)

    def forward(self, batch, generator):
        V = torch.cat([batch["V"], batch["V"]])
        turns = torch.randint(4, (len(V),), generator=generator, device=V.device)
        V = turned(V, turns, TURNS_Z)
        hidden = hidden_patches(V, self.patch, self.share, generator)
        mean = (V * ~hidden).sum((2, 3, 4), keepdim=True) / (~hidden).sum((2, 3, 4), keepdim=True)
        masked = torch.where(hidden, mean, V)
        V = (V - V.mean((1, 2, 3, 4), True)) / (V.var((1, 2, 3, 4), keepdim=True) + 1e-6).sqrt()
        side, seen = int(torch.randint(2, (), generator=generator, device=V.device)), []
        hook = self.encoder.register_forward_hook(lambda _, __, maps: seen.append(pooled(maps)))
        x = self.network(masked).float()
        other = rearrange(self.network(rearrange(masked, self.SIDES[side])).float(), self.BACK[side])
        hook.remove()
        mutual, loss = masked_mean((x - other).square(), hidden), 0
        measures = restored(x, V, hidden, near(V, hidden))
        for z, y in zip(seen, (x, other)):
            logits = self.rotation(z).float()
            z = self.contrast(z)
            contrast, found = contrasted(z, z, batch["subjects"], 0.5)
            loss = loss + masked_mean((y - V).square(), hidden) + F.cross_entropy(logits, turns) + contrast
            measures |= dict(turn=accuracy(logits, turns), turn_chance=logits.new_tensor(1 / 4), **found)
        return loss + 2 * mutual, measures | dict(mutual=mutual.detach())


METHODS = {"simmim": SimMIM, "mae3d": MAE3D, "gl_mae": GLMAE, "models_genesis": ModelsGenesis,
           "swin_unetr": SwinUNETRPretraining, "swinmm": SwinMM}
