"""The networks of S2DC, a Swin transformer with its decoder, a classifier, a projector; UNETR; their weights.

Swin transformer: arXiv:2103.14030. SwinUNETR: arXiv:2201.01266. SwinUNETR-v2 (`v2`): MICCAI 2023, a residual
convolution block at the head of each stage. UNETR: arXiv:2103.10504. S2DC: arXiv:2507.02581. Holding the same
weights, `Swin3D`, `SwinUNETR` and `UNETR` compute what MONAI 1.6 computes, its habits included:
- A map smaller than the window along an axis is one window along it, and not shifted along it. The position
  bias of its n tokens is the one of the first n tokens of the full window, not the one of the same offsets.
- Zeros that complete the last window are put behind the norm, and the tokens of the volume do attend to them.
Axes: b batch, c channel, x y z voxels or tokens, h heads, n tokens of one window, d channels of one head.
"""
import functools
import math
import re
import zipfile
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

# Neighbours (x y z offsets) that patch merging puts side by side, as 4x + 2y + z; ours counts 0..7.
MERGING = (0, 4, 2, 1, 6, 5, 3, 7)       # MONAI's "merging" since January 2025; its "mergingv2" is ours
LEGACY = (0, 4, 2, 1, 5, 2, 1, 7)        # MONAI's "merging" before: 010 and 001 twice, 110 and 011 never

AT_A_TIME = 2 ** 27     # numbers of an attention bias' gradient, window by window: 0.27 GB in bfloat16
doubling = functools.partial(nn.ConvTranspose3d, kernel_size=2, stride=2, bias=False)
for operation in (rearrange, reduce):
    torch.compiler.allow_in_graph(operation)    # else torch.compile is busy tracing einops' own Python

# ----------------------------------------------------------------------------------------------------- layers

def precise(x):
    """x in float32, or float64 if it was: what norms compute in. Autocast alone leaves it to the device."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def instance_norm(x):
    """Zero mean and unit variance over x y z, per sample and channel of (b, c, x, y, z); no parameters."""
    return F.group_norm(precise(x), x.shape[1]).to(x.dtype)     # a fifth of F.instance_norm's time on a CPU


def convolve(conv, x):
    """conv(x) for a 3x3x3 convolution of (b, c, x, y, z) that pads by one voxel. On a CPU as oneDNN is fast:
    channels last, and one small volume as two halves of a batch, which torch would else do without it."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return conv(x)
    nx, half = x.shape[2], (x.shape[2] + 1) // 2
    if len(x) == 1 and nx > 1 and x.shape[1:4].numel() <= 20480:    # as torch's ConvParams::use_mkldnn asks
        x = F.pad(x, (0, 0, 0, 0, 1, 1 + nx % 2)).contiguous(memory_format=torch.channels_last_3d)
        x = torch.cat([x[:, :, : half + 2], x[:, :, half:]])        # each with the layer beyond its end
        x = F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))
        return rearrange(x, "s c x y z -> 1 c (s x) y z", s=2)[:, :, :nx].contiguous()
    if nx == 2:         # there oneDNN's bfloat16 gives the weights a gradient of what lay in memory
        with torch.autocast("cpu", enabled=False):
            return F.conv3d(precise(x), precise(conv.weight), conv.bias, padding=1)
    blocked = x.shape[1] % 16 == 0 == conv.out_channels % 16        # oneDNN's own order of channels fits
    return conv(x if blocked else x.contiguous(memory_format=torch.channels_last_3d)).contiguous()


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, computed in float32, given back in the dtype that came in."""

    def forward(self, x):
        return F.layer_norm(precise(x), self.normalized_shape, precise(self.weight), precise(self.bias),
                            self.eps).to(x.dtype)


def run(module, checkpointing, *inputs):
    """module(*inputs); with checkpointing its activations are computed again in the backward pass."""
    if not checkpointing:
        return module(*inputs)
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)   # none draws numbers


def attend(qkv, bias, cuts, shut=None, axis=0):
    """Attention within each window: q, k, v as (3, b, nx, ny, nz, h, n, d) and bias (1, h, n, n) -> (b, nx,
    ny, nz, h, n, d).

    cuts: for x, y, z None, or (n, n) bool: the pairs that are neighbours only because the volume was rolled
    along that axis. They meet in the last window of the axis alone. So there are at most eight kinds of
    window, each with one bias for all its windows, and no mask of (windows, n, n) is held."""
    if axis == 3:
        grid = dict(zip(("b", "x", "y", "z"), qkv.shape[1:]))
        if shut is not None:
            bias = bias - 100.0 * shut                     # as MONAI: shut out by a factor exp(-100)
        q, k, v = rearrange(qkv, "s b x y z h n d -> s (b x y z) h n d")
        if q.device.type == "cpu" and torch.is_grad_enabled():
            # No fused kernel takes a bias that wants a gradient; add_: new memory is what costs.
            x = (q * q.shape[-1] ** -0.5 @ k.mT).add_(bias.to(q.dtype)).softmax(-1) @ v
        else:   # training: some at a time, for the kernel makes the bias' gradient of every window
            some = max(1, AT_A_TIME // bias.numel() if torch.is_grad_enabled() else len(q))
            x = [F.scaled_dot_product_attention(*part, attn_mask=bias.to(q.dtype))
                 for part in zip(q.split(some), k.split(some), v.split(some))]
            x = x[0] if len(x) == 1 else torch.cat(x)
        return rearrange(x, "(b x y z) h n d -> b x y z h n d", **grid)
    if cuts[axis] is None:
        return attend(qkv, bias, cuts, shut, axis + 1)
    inner, last = qkv.split([qkv.shape[axis + 2] - 1, 1], dim=axis + 2)
    edge = cuts[axis] if shut is None else shut | cuts[axis]
    return torch.cat([attend(inner, bias, cuts, shut, axis + 1), attend(last, bias, cuts, edge, axis + 1)],
                     dim=axis + 1)


class Block(nn.Module):
    """Attention within windows (every second block: windows shifted by half) and an MLP: (b, x, y, z, c)."""

    def __init__(self, channels, heads, window, shifted):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        self.norm1 = LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 3, heads))    # by offset x y z and head
        self.project = nn.Linear(channels, channels)
        self.norm2 = LayerNorm(channels)
        self.expand, self.contract = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        nn.init.trunc_normal_(self.table, std=0.02)
        # Both follow from the window alone: made once, for every size of volume, and no part of the weights.
        self.register_buffer("offsets", offsets(window), persistent=False)
        self.register_buffer("cuts", rolled_apart(window, self.shift) if shifted else None, persistent=False)

    def forward(self, x):
        x = x + self.windows(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))

    def windows(self, x):
        size = x.shape[1:4]
        wx, wy, wz = (min(n, self.window) for n in size)
        shift = [self.shift if n > self.window else 0 for n in size]
        x = pad(x, (wx, wy, wz), first=1)
        x = torch.roll(x, [-s for s in shift], dims=(1, 2, 3)) if any(shift) else x
        grid = dict(wx=wx, wy=wy, wz=wz, nx=x.shape[1] // wx, ny=x.shape[2] // wy, nz=x.shape[3] // wz)
        qkv = rearrange(self.qkv(x), "b (nx wx) (ny wy) (nz wz) (s h d) -> s b nx ny nz h (wx wy wz) d",
                        s=3, h=self.heads, **grid)
        bias = rearrange(self.table[self.offsets[: wx * wy * wz, : wx * wy * wz]], "n m h -> 1 h n m")
        cuts = [None, None, None]
        if any(shift):
            far = rearrange(self.cuts[:, :wx, :wy, :wz, :wx, :wy, :wz], "a x y z i j k -> a (x y z) (i j k)")
            cuts = [cut if s else None for cut, s in zip(far, shift)]
        x = attend(qkv, bias, cuts)
        x = self.project(rearrange(x, "b nx ny nz h (wx wy wz) d -> b (nx wx) (ny wy) (nz wz) (h d)", **grid))
        x = torch.roll(x, shift, dims=(1, 2, 3)) if any(shift) else x
        return x[:, : size[0], : size[1], : size[2]]


def offsets(window):
    """(n, n) int64: for tokens i, j of a full window the row of the position table, by their offset."""
    at = torch.cartesian_prod(*[torch.arange(window)] * 3)                       # (n, 3)
    x, y, z = rearrange(at[:, None] - at + window - 1, "n m a -> a n m")
    return (x * (2 * window - 1) + y) * (2 * window - 1) + z


def rolled_apart(window, shift):
    """(3, x, y, z, x, y, z) bool: whether two tokens of the last window come from opposite ends of axis a."""
    side = torch.arange(window) >= window - shift
    sides = torch.stack(torch.meshgrid(side, side, side, indexing="ij"))         # (3, x, y, z)
    return rearrange(sides, "a x y z -> a x y z 1 1 1") != rearrange(sides, "a x y z -> a 1 1 1 x y z")


class Merge(nn.Module):
    """Patch merging: 2 x 2 x 2 tokens become one, (b, x, y, z, c) -> (b, x/2, y/2, z/2, 2 c)."""

    def __init__(self, channels, merge):
        super().__init__()
        self.legacy = merge == "legacy"
        self.norm = LayerNorm(8 * channels)
        self.reduce = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, x):
        x = rearrange(x, "b (x i) (y j) (z k) c -> b x y z (i j k c)", i=2, j=2, k=2)
        if self.legacy:
            x = torch.cat([x.chunk(8, dim=-1)[n] for n in LEGACY], dim=-1)
        return self.reduce(self.norm(x))


class Global(nn.Module):
    """Attention among all tokens and an MLP, each behind a norm: (b, t, c)."""

    def __init__(self, channels, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(channels), LayerNorm(channels)
        self.qkv, self.project = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels)
        self.expand, self.contract = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (s h d) -> s b h t d", s=3, h=self.heads)
        x = x + self.project(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class ResidualConv(nn.Module):
    """Two 3x3x3 convolutions with instance norm around a shortcut: (b, c, x, y, z) -> (b, c_out, x, y, z)."""

    def __init__(self, channels, channels_out):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(channels_out, channels_out, 3, padding=1, bias=False)
        self.match = nn.Conv3d(channels, channels_out, 1, bias=False) if channels != channels_out else None

    def forward(self, x):
        shortcut = x if self.match is None else instance_norm(self.match(x))
        x = F.leaky_relu(instance_norm(convolve(self.conv1, x)), 0.01)
        return F.leaky_relu(instance_norm(convolve(self.conv2, x)) + shortcut, 0.01)


class Stage(nn.Module):
    """[residual convolution,] blocks, merging: (b, c, x, y, z) -> (b, 2 c, x/2, y/2, z/2)."""

    def __init__(self, channels, depth, heads, window, v2, merge, checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        self.local = ResidualConv(channels, channels) if v2 else None
        self.blocks = nn.ModuleList(Block(channels, heads, window, shifted=i % 2 == 1) for i in range(depth))
        self.merge = Merge(channels, merge)

    def forward(self, x):
        x = x if self.local is None else run(self.local, self.checkpointing, x)
        x = rearrange(x, "b c x y z -> b x y z c")
        for block in self.blocks:
            x = run(block, self.checkpointing, x)
        return rearrange(run(self.merge, self.checkpointing, x), "b x y z c -> b c x y z")


class Up(nn.Module):
    """One step of the decoder: (b, c, x/2, y/2, z/2) and skip (b, c_out, x, y, z) -> (b, c_out, x, y, z)."""

    def __init__(self, channels, channels_out):
        super().__init__()
        self.up = doubling(channels, channels_out)
        self.mix = ResidualConv(2 * channels_out, channels_out)

    def forward(self, x, skip):
        return self.mix(torch.cat([self.up(x), skip], dim=1))


def pad(x, multiples, first):
    """Zeros behind the end of the axis `first` and the next two, up to multiples of `multiples`."""
    x_end, y_end, z_end = (-n % m for n, m in zip(x.shape[first:], multiples))
    if not (x_end or y_end or z_end):
        return x
    return F.pad(x, [0, 0] * (x.ndim - first - 3) + [0, z_end, 0, y_end, 0, x_end])


def check_volume(volume, channels, size=()):
    found = tuple(volume.shape)
    if len(found) != 5 or found[1] != channels or 0 in found or (size and found[2:] != size):
        wanted = ", ".join(map(str, (channels, *(size or "xyz"))))
        raise ValueError(f"volume: expected (b, {wanted}) with no empty axis, found {found}")


def initialise(module):
    """Initial weights as in Swin: linear layers and position tables normal with deviation 0.02, biases 0.
    Convolutions keep torch's default, as in MONAI (which keeps it for the linear layers too)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------- networks

class Swin3D(nn.Module):
    """Encoder. volume (b, in_channels, x, y, z) -> 5 maps, (b, f, x/2, ..), .. (b, 16f, x/32, ..).

    Each map is normalised over its channels (mean 0, variance 1, no parameters) and float32 even under
    autocast. Any size: zeros are put behind the end of each axis up to a multiple of 32, and map k is cropped
    to ceil(x / 2^k).

    feature_size   f, 48 in the paper;   depths, num_heads   blocks and heads of the four stages
    window_size    edge of a window, tokens;   v2   residual convolution at the head of each stage
    merge          "all": each of the 8 neighbours once (MONAI's weights pass through `from_monai`); "legacy":
                   two twice and two never, as MONAI did before 2025, and every public checkpoint of that time
    checkpointing  trade time for memory: activations of a block are computed again in the backward pass
    arguments      (attribute) the constructor's arguments, so that a checkpoint can state them
    torch.compile makes one graph of it, with dynamic=False in seconds (a symbolic size: minutes). Raises
    ValueError for arguments that do not fit each other, and for a volume of another rank or channel count."""

    def __init__(self, in_channels=1, feature_size=48, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24),
                 window_size=7, v2=True, merge="all", checkpointing=False):
        super().__init__()
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(f"depths and num_heads: expected 4 numbers each, found {depths} and {num_heads}")
        if merge not in ("all", "legacy"):
            raise ValueError(f'merge: expected "all" or "legacy", found {merge!r}')
        widths = [feature_size * 2**i for i in range(4)]
        if any(width % heads for width, heads in zip(widths, num_heads)):
            raise ValueError(f"num_heads: expected divisors of the channels {widths}, found {num_heads}")
        self.arguments = dict(in_channels=in_channels, feature_size=feature_size, depths=tuple(depths),
                              num_heads=tuple(num_heads), window_size=window_size, v2=v2, merge=merge,
                              checkpointing=checkpointing)
        self.embed = nn.Conv3d(in_channels, feature_size, 2, stride=2)
        self.stages = nn.ModuleList(Stage(width, depth, heads, window_size, v2, merge, checkpointing)
                                    for width, depth, heads in zip(widths, depths, num_heads))
        self.apply(initialise)

    def forward(self, volume):
        check_volume(volume, self.arguments["in_channels"])
        maps = [self.embed(pad(volume, (32, 32, 32), first=2))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        for k, x in enumerate(maps):
            nx, ny, nz = (math.ceil(n / 2 ** (k + 1)) for n in volume.shape[2:])
            x = rearrange(precise(x[:, :, :nx, :ny, :nz]), "b c x y z -> b x y z c")
            maps[k] = rearrange(F.layer_norm(x, x.shape[-1:]), "b x y z c -> b c x y z")
        return maps


class SwinUNETR(nn.Module):
    """Encoder and decoder. volume (b, in_channels, x, y, z) -> (b, out_channels, x, y, z), not yet squashed.

    `swin`: the arguments of Swin3D after in_channels. Any size as in Swin3D, except that the instance norm of
    the last map needs two tokens: ValueError if no axis is longer than 32 voxels."""

    def __init__(self, in_channels, out_channels, **swin):
        super().__init__()
        self.encoder = Swin3D(in_channels, **swin)
        self.arguments = self.encoder.arguments | {"out_channels": out_channels}
        f, self.checkpointing = (self.encoder.arguments[key] for key in ("feature_size", "checkpointing"))
        widths = ((in_channels, f), (f, f), (2 * f, 2 * f), (4 * f, 4 * f))  # volume, maps 1 to 3
        self.skips = nn.ModuleList(ResidualConv(*pair) for pair in widths)
        self.bottom = ResidualConv(16 * f, 16 * f)
        self.ups = nn.ModuleList(Up(n * f, m * f) for n, m in ((16, 8), (8, 4), (4, 2), (2, 1), (1, 1)))
        self.out = nn.Conv3d(f, out_channels, 1)

    def forward(self, volume):
        check_volume(volume, self.encoder.arguments["in_channels"])
        nx, ny, nz = volume.shape[2:]
        if max(nx, ny, nz) <= 32:
            raise ValueError(f"volume: expected one of x y z longer than 32 voxels, found {nx} {ny} {nz}")
        volume = pad(volume, (32, 32, 32), first=2)
        x = self.decode(self.encoder(volume))
        x = run(self.ups[4], self.checkpointing, x, run(self.skips[0], self.checkpointing, volume))
        return self.out(x)[:, :, :nx, :ny, :nz]

    def decode(self, maps, ups=4):
        """The encoder's maps -> the decoder's after `ups` of its steps, tokens of 16, 8, 4 or 2 voxels."""
        x = run(self.bottom, self.checkpointing, maps[4])
        for k, up in enumerate(self.ups[:ups]):
            skip = run(self.skips[4 - k], self.checkpointing, maps[3 - k]) if k else maps[3]
            x = run(up, self.checkpointing, x, skip)
        return x


class UNETR(nn.Module):
    """ViT-B and its decoder: volume (b, in_channels, *size) -> (b, out_channels, *size), not yet squashed.

    feature_size: channels of the decoder's finest map;   width, heads, hidden: of the ViT and its MLPs.
    A place is learned for each patch of 16 voxels, so the size is fixed. Skips leave the ViT after blocks 4,
    7 and 10, as in MONAI (paper: 3, 6, 9). Raises ValueError for arguments and volumes that do not fit."""

    def __init__(self, in_channels, out_channels, size, feature_size=16, width=768, heads=12, hidden=3072,
                 checkpointing=False):
        super().__init__()
        if width % heads or any(n % 16 for n in size):
            raise ValueError(f"UNETR: expected width {width} a multiple of heads {heads}, size {size} of 16")
        self.arguments = dict(in_channels=in_channels, out_channels=out_channels, size=tuple(size),
                              feature_size=feature_size, width=width, heads=heads, hidden=hidden)
        self.checkpointing = checkpointing
        stages = [nn.Sequential(*(Global(width, heads, hidden) for _ in range(n))) for n in (4, 3, 3, 2)]
        stages[3].append(LayerNorm(width))
        self.encoder = nn.ModuleDict(dict(embed=nn.Conv3d(in_channels, width, 16, stride=16),
                                          places=nn.Embedding(math.prod(size) // 16**3, width),
                                          stages=nn.ModuleList(stages)))
        widths = [width, 8 * feature_size, 4 * feature_size, 2 * feature_size, feature_size]
        self.skips = nn.ModuleList([ResidualConv(in_channels, feature_size)])
        for c, more in zip(widths[3:0:-1], (2, 1, 0)):      # of the ViT's maps, doubled 3, 2, 1 times an axis
            lift = [(doubling(c, c), ResidualConv(c, c)) for _ in range(more)]
            self.skips.append(nn.Sequential(doubling(width, c), *sum(lift, ())))
        self.ups = nn.ModuleList(Up(*pair) for pair in zip(widths, widths[1:]))
        self.out = nn.Conv3d(feature_size, out_channels, 1)
        self.apply(initialise)
        nn.init.trunc_normal_(self.encoder["places"].weight, std=0.02)

    def forward(self, volume):
        check_volume(volume, self.arguments["in_channels"], self.arguments["size"])
        nx, ny, nz = (n // 16 for n in volume.shape[2:])
        embed, places, stages = self.encoder.values()
        x, maps = rearrange(embed(volume), "b c x y z -> b (x y z) c") + places.weight, [volume]
        for stage in stages:
            x = run(stage, self.checkpointing, x)
            maps.append(rearrange(x, "b (x y z) c -> b c x y z", x=nx, y=ny, z=nz))
        skips = [run(skip, self.checkpointing, m) for skip, m in zip(self.skips, maps)]
        x = maps[-1]
        for up, skip in zip(self.ups, reversed(skips)):
            x = run(up, self.checkpointing, x, skip)
        return self.out(x)


class Classifier(nn.Module):
    """Encoder, mean of its last map, MLP. volume (b, in_channels, x, y, z) -> (b, classes), not yet softmax.

    `swin`: the arguments of Swin3D after in_channels. Released code: two linear layers, no GELU between."""

    def __init__(self, in_channels, classes, hidden=1024, **swin):
        super().__init__()
        self.encoder = Swin3D(in_channels, **swin)
        self.arguments = self.encoder.arguments | {"classes": classes, "hidden": hidden}
        self.head = nn.Sequential(nn.Linear(16 * self.encoder.arguments["feature_size"], hidden), nn.GELU(),
                                  nn.Linear(hidden, classes))
        self.head.apply(initialise)

    def forward(self, volume):
        return self.head(reduce(self.encoder(volume)[-1], "b c x y z -> b c", "mean"))


class Projector(nn.Module):
    """MLP of three layers in front of a similarity: (.., in_channels) -> (.., out_channels), not normalised.
    Each vector passes alone, behind layer norms and not the released code's batch norms."""

    def __init__(self, in_channels, hidden=2048, out_channels=512):
        super().__init__()
        self.arguments = dict(in_channels=in_channels, hidden=hidden, out_channels=out_channels)
        self.layers = nn.Sequential(nn.Linear(in_channels, hidden), LayerNorm(hidden), nn.GELU(),
                                    nn.Linear(hidden, hidden), LayerNorm(hidden), nn.GELU(),
                                    nn.Linear(hidden, out_channels))
        self.apply(initialise)

    def forward(self, x):
        return self.layers(x)


# --------------------------------------------------------------------------------------- weights, to and from

class WeightsError(ValueError):
    """A file of weights that cannot be read or does not fit the model: one line that names the file."""


# Ours, MONAI's. A name is rewritten by the first pair that begins it and every pair that begins with a dot.
NAMES = [("encoder.embed.", "swinViT.patch_embed.proj."), ("bottom.", "encoder10.layer."),
         ("out.", "out.conv.conv.")]
NAMES += [(f"encoder.stages.{i}.local.", f"swinViT.layers{i + 1}c.0.layer.") for i in range(4)]
NAMES += [(f"encoder.stages.{i}.", f"swinViT.layers{i + 1}.0.") for i in range(4)]
NAMES += [(f"skips.{i}.", f"encoder{i + 1}.layer.") for i in range(4)]
NAMES += [(f"ups.{i}.up.", f"decoder{5 - i}.transp_conv.conv.") for i in range(5)]
NAMES += [(f"ups.{i}.mix.", f"decoder{5 - i}.conv_block.") for i in range(5)]
NAMES += [(".conv1.", ".conv1.conv."), (".conv2.", ".conv2.conv."), (".match.", ".conv3.conv."),
          (".qkv.", ".attn.qkv."), (".project.", ".attn.proj."), (".expand.", ".mlp.linear1."),
          (".contract.", ".mlp.linear2."), (".table", ".attn.relative_position_bias_table"),
          (".merge.norm.", ".downsample.norm."), (".merge.reduce.", ".downsample.reduction.")]


def rename(name, pairs):
    head = next((pair for pair in pairs if pair[0][0] != "." and name.startswith(pair[0])), None)
    if head is None:
        raise ValueError(f"{name}: no such tensor in a Swin3D, a SwinUNETR or MONAI's SwinUNETR")
    name = head[1] + name[len(head[0]):]
    for old, new in pairs:
        name = name.replace(old, new) if old[0] == "." else name
    return name


def reorder(name, tensor, downsample, back):
    """Exchange the neighbours' order of merging between ours (binary) and that of MONAI's `downsample`."""
    if downsample not in ("merging", "mergingv2", "legacy"):
        raise ValueError(f'downsample: expected "merging", "mergingv2" or "legacy", found {downsample!r}')
    if downsample != "merging" or ".merge." not in name:
        return tensor
    order = [MERGING.index(n) for n in range(8)] if back else list(MERGING)
    return rearrange(rearrange(tensor, "... (n c) -> n ... c", n=8)[order], "n ... c -> ... (n c)")


def to_monai(state_dict, downsample="merging"):
    """state_dict of a SwinUNETR, Swin3D or Classifier -> of MONAI's SwinUNETR, its swinViT, its swinViT.*.

    downsample: the `downsample` of MONAI's network, "merging" (since January 2025) or "mergingv2", for a
    model of merge="all"; for a model of merge="legacy" "legacy", which only MONAI before 2025 can use. The
    head of a Classifier has no counterpart and is left out. Any other name that is not ours: ValueError."""
    bare, result = "embed.weight" in state_dict, {}
    for name, tensor in state_dict.items():
        if name.startswith("head."):
            continue
        name = f"encoder.{name}" if bare else name
        theirs = rename(name, NAMES)
        result[theirs] = reorder(name, tensor, downsample, back=False)
        if name.endswith(".table"):  # MONAI keeps the offsets of the tokens among its weights
            result[theirs.replace("bias_table", "index")] = offsets(window_of(tensor)).to(tensor.device)
    return {name.removeprefix("swinViT."): tensor for name, tensor in result.items()} if bare else result


def from_monai(state_dict, downsample="merging"):
    """state_dict of MONAI's SwinUNETR, or its swinViT -> of our SwinUNETR, or Swin3D; undoes `to_monai`.

    downsample: as MONAI's network was built (mind its version), see `to_monai`. Raises ValueError for a name
    that is not in MONAI's network, and for a relative_position_index that counts the tokens of a window in
    another way than MONAI 1.6."""
    bare, back, result = "patch_embed.proj.weight" in state_dict, [pair[::-1] for pair in NAMES], {}
    for name, tensor in state_dict.items():
        theirs = f"swinViT.{name}" if bare else name
        if theirs.endswith(".relative_position_index"):
            table = state_dict.get(name.replace("_index", "_bias_table"))
            if table is None or not torch.equal(tensor.cpu(), offsets(window_of(table))):
                raise ValueError(f"{name}: not the offsets of a cubic window counted along x, y, z")
            continue
        ours = rename(theirs, back)
        result[ours.removeprefix("encoder.") if bare else ours] = reorder(ours, tensor, downsample, back=True)
    return result


def window_of(table):
    """Edge of the window whose position table has (2 edge - 1)^3 rows."""
    return (round(len(table) ** (1 / 3)) + 1) // 2


# Public files' names, rewritten in this order to MONAI's: model_swinvit.pt has no "swinViT." and own names in
# the MLP, ssl_pretrained_weights.pth one 0 more; SuPreM and VoCo write swin_vit.
WRAPPERS = r"^(module\.|_orig_mod\.)+"                     # DDP, torch.compile
PUBLIC = [(r"^swin_vit\.", "swinViT."), (r"^(?=(patch_embed|layers\dc?)\.)", "swinViT."),
          (r"^(swinViT\.layers\dc?\.0\.)0\.", r"\1"), (r"\.mlp\.fc([12])\.", r".mlp.linear\1.")]
ROOTS = ("backbone.", "student.", "encoder.", "")          # under which of them is the encoder?
MONAI_NAME = re.compile(r"(swinViT|encoder(1|2|3|4|10)|decoder[1-5]|out)\.")
CONTAINERS = ("state_dict", "model", "net", "network_weights", "student")
PART = re.compile(r"(skips|ups)\.\d|\w+")                  # what a file holds as a whole or not at all
FIRST = ("encoder.embed.weight", "skips.0.conv1.weight", "skips.0.match.weight")   # see the input channels
# MONAI's trainer stores its best score as a numpy number, which is a value like a tensor, and no code.
SCALAR = np.float64(0).__reduce__()[0]
NUMBERS = [(SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
           *(type(np.dtype(kind)) for kind in "fdil")]


def read_file(path):
    """The dict in a file, opened so that no pickled object is ever built or run."""
    try:
        if zipfile.is_zipfile(path):                       # torch compares no checksum
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise WeightsError(f"{path}: the file is damaged, the checksum of {damaged} does not fit")
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except WeightsError:
        raise
    except Exception as error:                             # whatever the bytes provoke: the file is at fault
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        said = f"not a file of torch.save ({type(error).__name__})"
        if found:
            said = f"holds a pickled object ({found[1]}), which is never run; save its tensors in a file"
        raise WeightsError(f"{path}: {said}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


def read_ours(path, content):
    """A checkpoint of this project -> tensors by our names, stated arguments of the encoder, names of other
    tensors, 0."""
    part = {"s2dc/encoder": "encoder", "s2dc/pretrain": "student",
            "s2dc/finetune": "model"}.get(str(content["format"]))
    if part is None:
        raise WeightsError(f"{path}: unknown format {content['format']!r}")
    absent = [key for key in (part, "arguments") if not isinstance(content.get(key), dict)]
    if absent:
        raise WeightsError(f"{path}: of format {content['format']!r}, but without {' and '.join(absent)}")
    state = {re.sub(WRAPPERS, "", name): tensor for name, tensor in content[part].items()}
    strange = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if strange:
        raise WeightsError(f"{path}: {strange[0]} is {type(state[strange[0]]).__name__}, expected a tensor")
    if part == "encoder":
        return {f"encoder.{name}": tensor for name, tensor in state.items()}, content["arguments"], [], 0
    others = [name for name in state if part == "student" and not name.startswith("encoder.")]
    others += [f"teacher.{name}" for name in content.get("teacher", {})]
    return {name: tensor for name, tensor in state.items()
            if name not in others}, content["arguments"], others, 0


def read_public(path, content, downsample):
    """A file of MONAI's kind -> tensors by our names, what `downsample` says of its arguments, names of other
    tensors, and how many relative_position_index it held: `from_monai` compares them with ours, so they count
    as loaded."""
    content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    tensors = {re.sub(WRAPPERS, "", str(name)): tensor for name, tensor in content.items()
               if isinstance(tensor, torch.Tensor)}
    root = next((root for root in ROOTS
                 if any(re.match(re.escape(root) + r"(\w+\.)?patch_embed\.", n) for n in tensors)), "")
    state, others = {}, []
    for name, tensor in tensors.items():
        theirs = name.removeprefix(root)
        for pattern, substitute in PUBLIC:
            theirs = re.sub(pattern, substitute, theirs)
        if name.startswith(root) and MONAI_NAME.match(theirs):
            state[theirs] = tensor
        else:
            others.append(name)
    try:
        arguments = {"merge": "legacy" if downsample == "legacy" else "all"}
        compared = sum(name.endswith(".relative_position_index") for name in state)
        return from_monai(state, downsample), arguments, others, compared
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None


def encoder_arguments(path, state, others):
    """The arguments of the Swin3D whose tensors these are, read off their shapes."""
    embed = state.get("encoder.embed.weight")
    tables = [state.get(f"encoder.stages.{i}.blocks.0.table") for i in range(4)]
    if embed is None or embed.ndim != 5 or any(table is None or table.ndim != 2 for table in tables):
        names = [*others, *state]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WeightsError(f"{path}: holds no Swin encoder of four stages; its tensors: "
                           f"{', '.join(names[:3]) or 'none'}{more}")
    depths = Counter(name.split(".")[2] for name in state if re.match(r"encoder\..*\.table$", name))
    return dict(in_channels=embed.shape[1], feature_size=embed.shape[0], window_size=window_of(tables[0]),
                depths=tuple(depths[str(i)] for i in range(4)),
                num_heads=tuple(table.shape[1] for table in tables),
                v2=any(name.startswith("encoder.stages.") and ".local." in name for name in state))


def check_arguments(path, theirs, model, stated):
    """Refuse an encoder built in another way, naming all differences. stated: the file says how it merges."""
    keys = [key for key in model if key not in ("in_channels", "out_channels", "checkpointing")]
    theirs = {key: tuple(value) if isinstance(value, list) else value for key, value in theirs.items()}
    wrong = [key for key in keys if theirs.get(key) != model[key]]
    if wrong == ["merge"] and not stated:
        other = "'legacy'" if model["merge"] == "legacy" else "'merging' or 'mergingv2'"
        raise WeightsError(f"{path}: does not say how it merges patches; taken for {theirs['merge']!r}, "
                           "as all public files before 2025 are: build the model with "
                           f"merge={theirs['merge']!r}, or pass downsample={other} if it was trained so")
    if wrong:
        differ = [f"{key} is {theirs.get(key)} in the file, {model[key]} in the model" for key in wrong]
        raise WeightsError(f"{path}: does not fit the model: {'; '.join(differ)}")
    if theirs["in_channels"] not in (1, model["in_channels"]):
        raise WeightsError(f"{path}: in_channels is {theirs['in_channels']} in the file, "
                           f"{model['in_channels']} in the model; only 1 can be spread over several")


def fit(path, state, own, label):
    """Choose the tensors of `state` that `own` takes -> (tensors to load, {name: why it was skipped}, names
    inflated).

    Skipped: parts that the model has not, and an output layer of another number of outputs. Inflated:
    weights of one input channel to k, each 1 / k of them, so that k equal channels give what the one gave.
    All else must fit exactly."""
    chosen, skipped, inflated, there = {}, {}, [], {PART.match(name)[0] for name in own}
    for name, tensor in state.items():
        if name not in own and PART.match(name)[0] not in there:
            skipped[name] = f"not in {label}"
            continue
        shape = own[name].shape if name in own else ()
        if name in FIRST and tensor.shape[1:2] == (1,) and tensor.shape != shape:
            tensor = repeat(tensor / shape[1], "o 1 x y z -> o k x y z", k=shape[1])
            inflated.append(name)
        if name.startswith(("out.", "head.2.")) and tensor.shape[1:] == shape[1:] and tensor.shape != shape:
            skipped[name] = f"{len(tensor)} outputs in the file, {len(own[name])} in the model"
        elif name not in own or tensor.shape != shape:
            raise WeightsError(f"{path}: {name} is {tuple(tensor.shape)} in the file, "
                               f"{tuple(shape) if name in own else 'absent'} in the model")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} holds numbers that are not finite or not floating point")
        else:
            chosen[name] = tensor
    parts = {PART.match(name)[0] for name in state if name in own} | {"encoder"}    # each is there as a whole
    if lost := [name for name in own if name not in state and PART.match(name)[0] in parts]:
        more = ", .." if len(lost) > 3 else ""
        raise WeightsError(f"{path}: lacks {len(lost)} tensors of the model: {', '.join(lost[:3])}{more}")
    return chosen, skipped, inflated


def load_weights(model, path, downsample="legacy"):
    """Load a file of weights into a network of this file, or WeightsError before anything of it is changed.

    Reads this project's checkpoints (encoder.pt, network.pt; of pre-training's last.pt the student's encoder;
    those of fine-tuning, the only ones for a UNETR) and MONAI's (model_swinvit.pt, any state_dict), VoCo's
    and VoCo-large's, SuPreM's and the released S2DC's, told apart by their names. The latter cannot say how
    they merge: `downsample` does, as in `from_monai`; "legacy" holds for public files before 2025.

    The encoder loads as a whole: no v1 file into a v2 model or the reverse (its convolutions would stay
    untrained, or be lost), no other size. Any other part of the model (a skip, bottom, an up, out, head)
    loads whole if the file has it, else stays as initialised. See `fit` for what is skipped or inflated.
    Returns and prints the report: file, loaded + skipped = total (tensors in the file), reasons {part of the
    file: why skipped}, initial {part of the model: tensors left as initialised}, inflated (names)."""
    content, label = read_file(path), type(model).__name__
    ours, prefix = "format" in content, "encoder." if isinstance(model, Swin3D) else ""
    wanted = (model if isinstance(model, (Swin3D, UNETR)) else model.encoder).arguments
    read = read_ours if ours else functools.partial(read_public, downsample=downsample)
    state, arguments, others, compared = read(path, content)
    vit = ours and "width" in arguments
    if vit != isinstance(model, UNETR):
        raise WeightsError(f"{path}: holds {'a' if vit else 'no'} UNETR of ours, the model is a {label}")
    arguments = arguments if vit else encoder_arguments(path, state, others) | arguments
    check_arguments(path, arguments, wanted, stated=ours)
    own = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    chosen, skipped, inflated = fit(path, state, own, label)
    model.load_state_dict({name.removeprefix(prefix): x for name, x in chosen.items()}, strict=False)
    loaded = len(chosen) + compared
    why = Counter((name.split(".")[0], f"not in {label}") for name in others)
    why += Counter((name.split(".")[0], reason) for name, reason in skipped.items())
    initial = Counter(name.split(".")[0] for name in own if name not in chosen)
    report = dict(file=str(path), loaded=loaded, total=loaded + sum(why.values()), skipped=sum(why.values()),
                  reasons={part: f"{n} {reason}" for (part, reason), n in why.items()}, initial=dict(initial),
                  inflated=inflated)
    reasons = "; ".join(f"{part}: {reason}" for part, reason in report["reasons"].items())
    said = [f"{path}: loaded {loaded} of {report['total']}",
            f"skipped {report['skipped']}" + (f" ({reasons})" if reasons else "")]
    said += [f"inflated to {wanted['in_channels']} channels {', '.join(inflated)}"] if inflated else []
    print(", ".join(said + [f"left {n} of {part} as initialised" for part, n in initial.items()]))
    return report
