"""model.py against MONAI in float64, itself where an identity must hold, and files of every kind."""
import itertools
import os
import re

import numpy as np
import pytest
import torch
from einops import repeat
from torch import nn

import model as model_file
from model import (
    UNETR,
    Classifier,
    Projector,
    Swin3D,
    SwinUNETR,
    WeightsError,
    from_monai,
    load_weights,
    to_monai,
)
from run import save

SMALL = dict(feature_size=12, depths=(1, 2, 1, 1))          # 3.5 M parameters with v2, quick on one core


def monai_net(v2, channels=1, classes=3, downsample="merging"):
    """MONAI's SwinUNETR of feature size 12, float64, with weights so large that no bias goes unseen."""
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")

    class LegacyMerging(nn.Module):     # MONAI's "merging" until January 2025, by its neighbours' offsets
        def __init__(self, dim, norm_layer, spatial_dims):
            super().__init__()
            self.norm, self.reduction = norm_layer(8 * dim), nn.Linear(8 * dim, 2 * dim, bias=False)

        def forward(self, x):
            takes = [[int(d) for d in take] for take in "000 100 010 001 101 010 001 111".split()]
            return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in takes], dim=-1)))

    torch.manual_seed(0)
    net = nets.SwinUNETR(channels, classes, feature_size=12, use_v2=v2,
                         downsample=LegacyMerging if downsample == "legacy" else downsample).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias_table"):
                parameter += torch.randn_like(parameter) * 0.3
    return net


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def copied(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a, b):
    """All tensors of a state dict, bit for bit."""
    return all(torch.equal(v, b[k]) for k, v in a.items())


# --------------------------------------------------------------------------------------- equal to MONAI

@pytest.mark.parametrize("kind, v2, channels, batch, size, downsample", [
    (SwinUNETR, False, 1, 2, (32, 64, 32), "merging"), (SwinUNETR, True, 4, 1, (64, 32, 32), "mergingv2"),
    (SwinUNETR, True, 1, 1, (32, 32, 64), "legacy"), (Swin3D, True, 1, 1, (64, 64, 64), "merging"),
    (Swin3D, False, 4, 1, (64, 96, 32), "legacy")])
def test_outputs_and_gradients_equal_monai(kind, v2, channels, batch, size, downsample):
    monai, more = monai_net(v2, channels, 3, downsample), (3,) if kind is SwinUNETR else ()
    monai = monai if more else monai.swinViT
    merge = "legacy" if downsample == "legacy" else "all"
    ours = kind(channels, *more, feature_size=12, v2=v2, merge=merge).double()
    ours.load_state_dict(from_monai(monai.state_dict(), downsample))
    volume = torch.randn(batch, channels, *size, dtype=torch.float64)
    wanted, found = ([net(volume)] if more else net(volume) for net in (monai, ours))
    if kind is Swin3D:
        shapes = [(batch, 12 * 2**k, *(n // 2 ** (k + 1) for n in size)) for k in range(5)]
        assert [tuple(x.shape) for x in found] == shapes
    assert all(difference(x, y) < 1e-9 for x, y in zip(found, wanted))
    weights = [torch.randn_like(x) for x in wanted]
    for maps in (wanted, found):
        sum((x * w * x.cos()).mean() for x, w in zip(maps, weights)).backward()
    gradients = to_monai({name: p.grad for name, p in ours.named_parameters()}, downsample)
    for name, parameter in monai.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0 and (gradients[name] - parameter.grad).abs().max() < 1e-9 * max(scale, 1e-3), name


@pytest.mark.parametrize("v2, tensors, millions", [(False, 159, 62.19), (True, 167, 72.76)])
def test_base_size_has_as_many_tensors_and_parameters_as_monai(v2, tensors, millions):
    net = SwinUNETR(1, 14, feature_size=48, v2=v2)
    assert len(to_monai(net.state_dict())) == tensors
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.006


DEPTHS = 4, 3, 3, 2                                         # blocks of the ViT before each map
UNETR_NAMES = [("encoder.embed.", "vit.patch_embedding.patch_embeddings."), ("out.", "out.conv.conv."),
               ("encoder.places.weight", "vit.patch_embedding.position_embeddings"),
               ("encoder.stages.3.2.", "vit.norm."), ("skips.0.", "encoder1.layer.")]
UNETR_NAMES += [(f"encoder.stages.{i}.{j}.", f"vit.blocks.{sum(DEPTHS[:i]) + j}.")
                for i, n in enumerate(DEPTHS) for j in range(n)]
for i in (1, 2, 3):
    UNETR_NAMES += [(f"skips.{i}.0.", f"encoder{i + 1}.transp_conv_init.conv.")]
    UNETR_NAMES += [(f"skips.{i}.{2 * k + 1}.", f"encoder{i + 1}.blocks.{k}.0.conv.") for k in range(3 - i)]
    UNETR_NAMES += [(f"skips.{i}.{2 * k + 2}.", f"encoder{i + 1}.blocks.{k}.1.") for k in range(3 - i)]
for i in range(4):
    UNETR_NAMES += [(f"ups.{i}.up.", f"decoder{5 - i}.transp_conv.conv."),
                    (f"ups.{i}.mix.", f"decoder{5 - i}.conv_block.")]
UNETR_PARTS = {".conv1.": ".conv1.conv.", ".conv2.": ".conv2.conv.", ".match.": ".conv3.conv.",
               ".qkv.": ".attn.qkv.", ".project.": ".attn.out_proj.", ".expand.": ".mlp.linear1.",
               ".contract.": ".mlp.linear2."}


def monai_name(name):
    """Of a tensor of our UNETR."""
    head, theirs = next(pair for pair in UNETR_NAMES if name.startswith(pair[0]))
    name = theirs + name.removeprefix(head)
    for ours, part in UNETR_PARTS.items():
        name = name.replace(ours, part)
    return name


@pytest.mark.parametrize("channels, batch, size", [(1, 2, (32, 48, 16)), (2, 1, (32, 32, 32))])
def test_unetr_equals_monai(channels, batch, size):
    """MONAI's norms of cross-attention, which it never uses, have no counterpart."""
    nets = pytest.importorskip("monai.networks.nets.unetr")
    torch.manual_seed(0)
    monai = nets.UNETR(channels, 3, size, feature_size=4, hidden_size=24, mlp_dim=40, num_heads=3).double()
    with torch.no_grad():
        for parameter in monai.parameters():
            if parameter.ndim == 1 or parameter.ndim == 3:
                parameter += torch.randn_like(parameter) * 0.3
    ours = UNETR(channels, 3, size, feature_size=4, width=24, heads=3, hidden=40).double()
    state, own = monai.state_dict(), ours.state_dict()
    names = {name: monai_name(name) for name in own}
    assert set(names.values()) == {name for name in state if "norm_cross_attn" not in name}
    ours.load_state_dict({name: state[names[name]].reshape(own[name].shape) for name in own})
    volume = torch.randn(batch, channels, *size, dtype=torch.float64)
    wanted, found = monai(volume), ours(volume)
    assert found.shape == (batch, 3, *size) and difference(found, wanted) < 1e-9
    weight, theirs = torch.randn_like(wanted), dict(monai.named_parameters())
    for x in (wanted, found):
        (x * weight * x.cos()).mean().backward()
    for name, parameter in ours.named_parameters():
        true = theirs[names[name]].grad.reshape(parameter.shape)
        scale = true.abs().max()
        assert scale > 0 and (parameter.grad - true).abs().max() < 1e-9 * max(scale, 1e-3), name


def test_unetr_of_the_paper_its_checkpointing_and_what_it_refuses():
    with torch.device("meta"):
        net = UNETR(1, 14, (96, 96, 96))
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(count - 92.79) < 0.01            # MONAI: 92.8 with 0.02 of cross-attention's norms (paper: 92.58)
    torch.manual_seed(0)
    keys = dict(size=(32, 16, 16), feature_size=2, width=8, heads=2, hidden=8)
    net, again = UNETR(1, 2, **keys), UNETR(1, 2, checkpointing=True, **keys)
    again.load_state_dict(net.state_dict())
    volume = torch.randn(1, 1, 32, 16, 16)
    for each in (net, again):
        each(volume).square().sum().backward()
    assert all(torch.allclose(p.grad, q.grad, atol=1e-5) for p, q in zip(net.parameters(), again.parameters()))
    with pytest.raises(ValueError, match=re.escape("expected (b, 1, 32, 16, 16) with no empty axis, found (1, 1, 16")):
        net(volume[:, :, :16])
    for wrong in (dict(size=(32, 16, 20)), dict(width=9)):
        with pytest.raises(ValueError, match="a multiple of heads 2, size .* of 16"):
            UNETR(1, 2, **keys | wrong)


# ----------------------------------------------------------------------------------- weights both ways

@pytest.mark.parametrize("downsample", ["merging", "mergingv2", "legacy"])
def test_weights_travel_to_monai_and_back_unchanged(downsample):
    monai = monai_net(True, 2, 3)
    nets = ((SwinUNETR(2, 3, feature_size=12), monai.state_dict()),
            (Swin3D(2, feature_size=12), monai.swinViT.state_dict()),
            (Classifier(2, 3, feature_size=12),
             {k: v for k, v in monai.state_dict().items() if k.startswith("swinViT.")}))
    for ours, wanted in nets:
        theirs = to_monai(ours.state_dict(), downsample)
        assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in wanted.items()}
        assert same({k: v for k, v in theirs.items() if k.endswith("index")}, wanted)
        own = {k: v for k, v in ours.state_dict().items() if not k.startswith("head.")}
        back = from_monai(theirs, downsample)
        assert list(back) == list(own) and same(own, back)


def test_translation_refuses_what_it_does_not_know():
    theirs = to_monai(Swin3D(feature_size=12).state_dict())
    index = next(k for k in theirs if k.endswith("index"))
    stray = {"fancy.weight": torch.zeros(1)}
    for text, translate, state, *downsample in (
            ("fancy.weight", to_monai, SwinUNETR(1, 2, **SMALL).state_dict() | stray),
            ("fancy.weight", from_monai, stray), ("downsample.*old", from_monai, theirs, "old"),
            (re.escape(index), from_monai, theirs | {index: theirs[index].T.contiguous()})):
        with pytest.raises(ValueError, match=text):
            translate(state, *downsample)


# -------------------------------------------------------------------------------------- sizes and errors

def test_any_size_equals_the_padded_volume_cropped():
    torch.manual_seed(0)
    net = SwinUNETR(2, 3, **SMALL).eval()
    with torch.no_grad():
        for size in ((33, 20, 50), (64, 1, 31)):
            volume, padded = torch.randn(1, 2, *size), torch.zeros(1, 2, *(-(-n // 32) * 32 for n in size))
            padded[:, :, : size[0], : size[1], : size[2]] = volume
            assert torch.equal(net(volume), net(padded)[:, :, : size[0], : size[1], : size[2]])
            for k, (x, y) in enumerate(zip(net.encoder(volume), net.encoder(padded)), start=1):
                nx, ny, nz = (-(-n // 2**k) for n in size)
                assert x.shape[2:] == (nx, ny, nz) and torch.equal(x, y[:, :, :nx, :ny, :nz])
        assert [tuple(x.shape[2:]) for x in net.encoder(torch.randn(1, 2, 5, 17, 32))] == [
            (3, 9, 16), (2, 5, 8), (1, 3, 4), (1, 2, 2), (1, 1, 1)]


def test_unfit_volumes_and_arguments_are_refused_in_one_line():
    net = SwinUNETR(2, 3, **SMALL)
    for forward in (net.encoder, net, Classifier(2, 3, **SMALL)):
        for shape in ((2, 32, 32, 32), (1, 1, 64, 64, 64), (1, 2, 0, 64, 64)):
            text = re.escape(f"volume: expected (b, 2, x, y, z) with no empty axis, found {shape}")
            with pytest.raises(ValueError, match=text):
                forward(torch.zeros(shape))
    with pytest.raises(ValueError, match="longer than 32 voxels, found 32 20 32"):
        net(torch.zeros(1, 2, 32, 20, 32))
    for wrong, text in ((dict(depths=(2, 2)), "depths and num_heads"),
                        (dict(num_heads=(3, 6, 12, 25)), "num_heads"), (dict(merge="old"), "merge.*'old'")):
        with pytest.raises(ValueError, match=text):
            Swin3D(**wrong)


# --------------------------------------------------------------------- masks, compile, precision, memory

def test_windows_do_not_look_across_the_ends_of_the_volume():
    """Independent of MONAI: shifted blocks equal plain attention masked over all pairs of a window."""
    torch.manual_seed(0)
    block = model_file.Block(6, 2, 3, shifted=True).double()
    x = torch.randn(1, 5, 3, 7, 6, dtype=torch.float64)     # windows 3, shifts 1 0 1, padded to 6 3 9
    full = torch.zeros(1, 6, 3, 9, 6, dtype=torch.float64)
    full[:, :5, :, :7] = x
    places = torch.cartesian_prod(torch.arange(6), torch.arange(3), torch.arange(9)).tolist()

    def within(p):
        return (p[0] - 1) % 6 % 3, p[1] % 3, (p[2] - 1) % 9 % 3
    with torch.no_grad():
        q, k, v = block.qkv(full)[0].chunk(3, dim=-1)
        wanted = torch.zeros_like(full[0])
        for i in places:
            mates, biases = [], []
            for j in places:
                # windows start at -2 1 4 .. along x and z; what wraps round is a region of its own
                pairs = zip(i, j, (1, 0, 1))
                if all((a - s) // 3 == (b - s) // 3 and (a < s) == (b < s) for a, b, s in pairs):
                    x_, y_, z_ = (a - b + 2 for a, b in zip(within(i), within(j)))
                    mates.append(j)
                    biases.append(block.table[25 * x_ + 5 * y_ + z_])
            for h in range(2):
                c = slice(3 * h, 3 * h + 3)
                keys, values = (torch.stack([t[tuple(j)][c] for j in mates]) for t in (k, v))
                scores = keys @ q[tuple(i)][c] / 3**0.5 + torch.stack(biases)[:, h]
                wanted[tuple(i)][c] = scores.softmax(0) @ values
        assert difference(block.windows(x), block.project(wanted)[None, :5, :, :7]) < 1e-12


@pytest.mark.parametrize("checkpointing, backend", [(False, "aot_eager"), (True, "eager")])
def test_encoder_compiles_into_one_graph(checkpointing, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Swin3D(feature_size=12, depths=(2, 1, 1, 1), checkpointing=checkpointing)
    compiled = torch.compile(net, backend=backend, fullgraph=True)      # an error if the graph breaks
    volume = torch.randn(1, 1, 32, 40, 32)
    for x, y in zip(compiled(volume), net(volume)):
        assert difference(x, y) < 1e-5
    sum(x.square().sum() for x in compiled(volume)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_checkpointing_changes_memory_and_nothing_else():
    volume, nets, kept = torch.randn(1, 1, 64, 32, 32), [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net, stored = SwinUNETR(1, 2, feature_size=12, checkpointing=checkpointing), {}
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def keep(x):
            stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = net(volume).square().mean()
        kept.append(sum(n for at, n in stored.items() if at not in weights))
        loss.backward()
        nets.append(net)
    largest = max(p.grad.abs().max().item() for p in nets[0].parameters())
    for p, q in zip(*(net.parameters() for net in nets)):     # several threads add up in any order
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * largest)
    assert kept[1] < 0.4 * kept[0], kept


def test_norms_and_maps_are_float32_under_autocast(monkeypatch):
    torch.manual_seed(0)
    net, volume, seen = SwinUNETR(1, 3, **SMALL), torch.randn(1, 1, 32, 64, 32), []
    wanted = [*net.encoder(volume), net(volume)]

    def spy(plain):
        def norm(x, *more, **keys):
            result = plain(x, *more, **keys)
            seen.append((x.dtype, result.dtype))
            return result
        return norm
    for name in ("layer_norm", "instance_norm"):
        monkeypatch.setattr(model_file.F, name, spy(getattr(torch.nn.functional, name)))
    with torch.autocast("cpu", torch.bfloat16):
        maps, out = net.encoder(volume), net(volume)
        assert net.encoder.embed(volume).dtype == out.dtype == torch.bfloat16           # autocast is at work
    assert len(seen) > 30 and set(seen) == {(torch.float32, torch.float32)}
    for x, y in zip([*maps, out.float()], wanted):
        assert x.dtype == torch.float32 and ((x - y).square().mean() / y.square().mean()).sqrt() < 0.05


@pytest.mark.parametrize("nx", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("b", [1, 2])
def test_convolutions_have_the_same_gradients_in_bfloat16(nx, b):
    """oneDNN's own gradient of the weights is of no use where a volume is two voxels deep."""
    torch.manual_seed(0)
    conv, x = torch.nn.Conv3d(24, 48, 3, padding=1, bias=False), torch.randn(b, 24, nx, 4, 6).bfloat16()
    slope = torch.randn(b, 48, nx, 4, 6)
    (wanted,) = torch.autograd.grad((conv(x.float()) * slope).sum(), conv.weight)
    with torch.autocast("cpu", torch.bfloat16):
        out = model_file.convolve(conv, x)
    (found,) = torch.autograd.grad((out.float() * slope).sum(), conv.weight)
    assert torch.linalg.norm(found - wanted) < 0.02 * torch.linalg.norm(wanted)


# -------------------------------------------------------------------------------------------------- heads

def gelu(z):
    return z * (1 + torch.erf(z / 2**0.5)) / 2


def test_projector_sees_each_vector_alone():
    torch.manual_seed(0)
    net, x = Projector(24, 64, 16).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    first, _, _, second, _, _, last = net.layers

    def norm(z):
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = net(x)
    assert y.shape == (2, 5, 16) and torch.allclose(net(x[1, 3]), y[1, 3], atol=1e-12)
    assert torch.allclose(y, last(gelu(norm(second(gelu(norm(first(x))))))), atol=1e-12)
    assert Projector(24).arguments == dict(in_channels=24, hidden=2048, out_channels=512)


def test_classifier_pools_the_last_map():
    torch.manual_seed(0)
    net, volume = Classifier(1, 4, hidden=8, **SMALL), torch.randn(2, 1, 20, 33, 40)
    last = net.encoder(volume)[-1]
    wanted = net.head[2](gelu(net.head[0](last.flatten(2).mean(-1))))
    assert last.shape[2:] == (1, 2, 2) and torch.allclose(net(volume), wanted, atol=1e-5)


def test_initial_weights():
    torch.manual_seed(0)
    for name, p in Classifier(1, 4, feature_size=24).named_parameters():
        if p.ndim == 2 and p.numel() > 5000:
            assert abs(p.std().item() - 0.02) < 0.001 and abs(p.mean().item()) < 0.001, name
        elif p.ndim == 1 and "embed" not in name:
            assert (p == float("norm" in name and name.endswith("weight"))).all(), name


def test_arguments_rebuild_the_network_from_a_file(tmp_path):
    keys = dict(feature_size=24, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=4, v2=False,
                merge="legacy", checkpointing=True)
    volume = torch.rand(1, 2, 64, 33, 40)
    for net in (Swin3D(2, **keys), SwinUNETR(2, 3, **keys), Classifier(2, 3, hidden=7, **keys)):
        save(tmp_path / "best.pt", {"arguments": net.arguments, "model": net.state_dict()})
        file = torch.load(tmp_path / "best.pt", weights_only=True)
        again = type(net)(**file["arguments"])
        again.load_state_dict(file["model"])
        assert again.arguments == net.arguments and again.arguments["checkpointing"]
        with torch.no_grad():
            assert all(map(torch.equal, net(volume), again(volume)))


# ------------------------------------------------------------------------------------------- load_weights

def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def encoder(state, *more):
    """What public files hold of MONAI's encoder, and parts besides."""
    return {k: v for k, v in state.items() if k.startswith(("swinViT.", *more))}


def bare(state):
    return {k.removeprefix("swinViT."): v for k, v in encoder(state).items()}


def renamed(old, new, state):
    return {re.sub(old, new, k): v for k, v in state.items()}


def teacher(state):
    """The same names with other weights: zeros, where weights are numbers."""
    return {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in state.items()}


SKIPS = tuple(f"encoder{n}." for n in (1, 2, 3, 4, 10))
STRAY = {"proj_head.layer1.0.weight": torch.ones(4, 4), "proj_head.layer3.0.bias": torch.ones(4)}


# v2, how the file is made from MONAI's state dict, tensors that must load into a SwinUNETR and be skipped
PUBLIC = {
    "MONAI model_swinvit.pt": (False, lambda s: {"epoch": 1, "state_dict": prefixed(
        "module.", renamed("mlp.linear", "mlp.fc", bare(s)))}, 126, 0),
    "MONAI supervised": (False, lambda s: {"epoch": 7, "best_acc": np.float64(0.8), "state_dict": s}, 159, 0),
    "MONAI ssl_pretrained_weights.pth": (False, lambda s: {"model": {
        **{k: torch.ones(2) for k in ("encoder.mask_token", "encoder.norm.weight", "encoder.norm.bias")},
        **{k: v for k, v in s.items() if k.startswith("out.")},
        **prefixed("encoder.", renamed(r"^(layers\d\.0)\.", r"\1.0.", bare(s)))}}, 126, 5),
    "VoCo_10k.pt": (True, lambda s: prefixed(
        "module.", STRAY | renamed("swinViT", "swin_vit", encoder(s, *SKIPS))), 145, 2),
    "VoCo training, optimizer left out": (True, lambda s: {"global_step": 9, "state_dict": {
        **prefixed("module.student.", encoder(s, *SKIPS) | STRAY),
        **prefixed("module.teacher.", teacher(encoder(s, *SKIPS)) | STRAY)}}, 145, 149),
    "VoCo-large training": (True, lambda s: {"state_dict": {
        **prefixed("student.", STRAY), **prefixed("teacher.", STRAY),
        **prefixed("backbone.", encoder(s, *SKIPS))}}, 145, 4),
    "VoComni_B.pt": (True, lambda s: s | {"out.conv.conv.weight": torch.ones(21, 12, 1, 1, 1),
                                          "out.conv.conv.bias": torch.ones(21)}, 165, 2),
    "SuPreM": (False, lambda s: {
        "net": prefixed("module.backbone.", renamed("swinViT", "swin_vit", s))}, 159, 0),
    "S2DC model_stepN.pt": (True, lambda s: {
        "global_step": 5, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "state_dict": prefixed("module.", {
            **prefixed("student.", encoder(s) | {
                "proj_head_geo.layer1.0.weight": torch.ones(2),
                "encoder_cof.layer.conv1.conv.weight": s["encoder10.layer.conv1.conv.weight"]}),
            **prefixed("teacher.", teacher(encoder(s))), "queue_cl": torch.ones(3),
            "queue_ptr": torch.zeros(1).long()})}, 134, 138),
    "S2DC final_model.pth": (True, lambda s: {
        **prefixed("student.", encoder(s) | {"proj_head_cl.layer1.0.weight": torch.ones(2)}),
        **prefixed("teacher.", teacher(encoder(s))), "queue_cl": torch.ones(3)}, 134, 136),
}


def monai_state(v2):
    """MONAI's state dict, float32."""
    state = monai_net(v2, 1, 3, "legacy").state_dict()
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture(scope="module")
def monai_states():
    """Without and with v2."""
    return [monai_state(v2) for v2 in (False, True)]


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_files_load_whole(kind, monai_states, tmp_path, capsys):
    v2, make, must, skipped = PUBLIC[kind]
    state, path = monai_states[v2], tmp_path / "weights.pt"
    torch.save(make(state), path)
    keys = dict(feature_size=12, v2=v2, merge="legacy")
    net = SwinUNETR(1, 3, **keys)
    before, truth = copied(net), from_monai(state, "legacy")
    report = load_weights(net, path)
    assert (report["loaded"], report["skipped"], report["total"]) == (must, skipped, must + skipped)
    assert f"loaded {must} of {must + skipped}, skipped {skipped}" in capsys.readouterr().out
    changed, kept = ({k for k, v in net.state_dict().items() if torch.equal(v, old[k])}
                     for old in (truth, before))
    assert changed | kept == before.keys() and len(kept) == sum(report["initial"].values())
    assert len(changed) == must - 8                         # MONAI counts 8 index tensors
    for net in (Swin3D(**keys), Classifier(1, 5, **keys)):
        report = load_weights(net, path)
        assert report["loaded"] == (134 if v2 else 126) and report["total"] == must + skipped
        assert same(prefixed("encoder.", getattr(net, "encoder", net).state_dict()), truth)


def test_skipped_parts_are_named(monai_states, tmp_path, capsys):
    path = tmp_path / "w.pt"
    for kind, net, words in (
            ("S2DC model_stepN.pt", Swin3D, ["teacher: 134 not in Swin3D", "queue_cl: 1", "student: 2"]),
            ("VoComni_B.pt", Swin3D, ["skips: 9 not in Swin3D", "ups: 20 ", "bottom: 2 ", "out: 2 "]),
            ("VoComni_B.pt", SwinUNETR, ["out: 2 21 outputs in the file, 14 in the model"])):
        torch.save(PUBLIC[kind][1](monai_states[True]), path)
        load_weights(net(1, *[14] * (net is SwinUNETR), feature_size=12, merge="legacy"), path)
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and all(word in line for word in words), line


def test_a_part_that_has_more_than_the_model_is_refused(monai_states, tmp_path):
    """MONAI's decoder with norms that learn would be computed without them."""
    path, state = tmp_path / "w.pt", monai_states[True]
    torch.save(state | {"decoder5.conv_block.norm1.weight": torch.ones(96)}, path)
    with pytest.raises(WeightsError, match=r"w.pt: .*norm1.weight is \(96,\) in the file, absent in the model"):
        load_weights(SwinUNETR(1, 3, feature_size=12, merge="legacy"), path)
    load_weights(Swin3D(1, feature_size=12, merge="legacy"), path)         # which has no decoder


def test_newer_monai_files_need_their_downsample(tmp_path):
    monai, path = monai_net(True, 1, 3, "merging").float(), tmp_path / "w.pt"
    torch.save(monai.state_dict(), path)
    net, volume = SwinUNETR(1, 3, feature_size=12), torch.randn(1, 1, 32, 32, 64)
    text = "build the model with merge='legacy', or pass downsample='merging' or 'mergingv2'"
    with pytest.raises(WeightsError, match="w.pt: does not say how it merges.*" + text):
        load_weights(net, path)
    with pytest.raises(WeightsError, match="build the model with merge='all', or pass downsample='legacy'"):
        load_weights(SwinUNETR(1, 3, feature_size=12, merge="legacy"), path, "merging")
    assert load_weights(net, path, downsample="merging")["loaded"] == 167
    with torch.no_grad():
        assert difference(net(volume), monai(volume)) < 1e-4


def ours_file(path, kind, net, **changes):
    state = {"format": f"s2dc/{kind}", "arguments": net.arguments, "step": 3}
    if kind == "pretrain":
        student = prefixed("encoder.", net.state_dict()) | {"token_head.layers.0.weight": torch.ones(2)}
        state |= {"student": student, "teacher": {k: torch.zeros_like(v) for k, v in student.items()}}
    else:
        state |= {"encoder" if kind == "encoder" else "model": net.state_dict()}
    save(path, state | changes)
    return path


def test_our_files_load(tmp_path):
    torch.manual_seed(0)

    def new():
        return Swin3D(**SMALL), SwinUNETR(1, 3, **SMALL), Classifier(1, 3, **SMALL)
    source, segments, classifies = new()
    count = len(source.state_dict())
    for kind in ("encoder", "pretrain"):
        path = ours_file(tmp_path / f"{kind}.pt", kind, source)
        for net in new():
            report = load_weights(net, path)
            assert (report["loaded"], report["skipped"]) == (count, count + 2 if kind == "pretrain" else 0)
            assert same(source.state_dict(), getattr(net, "encoder", net).state_dict())
    for source in (segments, classifies):
        path = ours_file(tmp_path / "best.pt", "finetune", source)
        for net in new()[1:]:
            report = load_weights(net, path)
            part = source if type(net) is type(source) else source.encoder
            assert report["loaded"] == len(part.state_dict())
            assert bool(report["initial"]) == (part is not source)
            assert same(part.state_dict(), (net if part is source else net.encoder).state_dict())
    report = load_weights(Classifier(1, 5, **SMALL), path)  # two classes more: the last layer alone is new
    assert report["reasons"] == {"head": "2 3 outputs in the file, 5 in the model"}
    assert report["initial"] == {"head": 2}


def assert_refused(path, net, text):
    """In one line, and nothing of the network is changed."""
    before = copied(net)
    with pytest.raises(WeightsError, match=f"{path.name}: {text}") as error:
        load_weights(net, path)
    assert "\n" not in str(error.value) and same(net.state_dict(), before)


@pytest.mark.parametrize("change, text", [
    (dict(feature_size=24), "feature_size is 12 in the file, 24 in the model"),
    (dict(merge="legacy"), "merge is all in the file, legacy in the model"),
    (dict(window_size=5), "window_size is 7 in the file, 5 in the model"),
    (dict(depths=(2, 2, 1, 1)), r"depths is \(1, 2, 1, 1\) in the file, \(2, 2, 1, 1\) in the model"),
    (dict(num_heads=(3, 6, 12, 12)), r"num_heads is \(3, 6, 12, 24\) in the file, \(3, 6, 12, 12\) in "),
])
def test_our_files_of_another_network_are_refused(change, text, tmp_path):
    path = ours_file(tmp_path / "encoder.pt", "encoder", Swin3D(**SMALL))
    assert_refused(path, SwinUNETR(1, 3, **SMALL | change), f"does not fit the model: {text}")


LONE = "encoder1.layer.conv1.conv.weight"


@pytest.mark.parametrize("v2, change, keys, text", [
    (False, PUBLIC["MONAI model_swinvit.pt"][1], {}, "v2 is False in the file, True in the model"),
    (True, PUBLIC["S2DC model_stepN.pt"][1], dict(v2=False), "v2 is True in the file, False in the model"),
    (True, dict, dict(depths=(1, 2, 2, 2), feature_size=24), r"size is 12 .*; depths is \(2, 2, 2, 2\) "),
    (True, lambda s: {k: v for k, v in s.items() if k != "swinViT.layers3.0.blocks.1.norm2.bias"}, {},
     "lacks 1 .*stages.2.blocks.1.norm2.bias"),
    (True, lambda s: {k: v for k, v in s.items() if not k.startswith("encoder1.") or k == LONE}, {},
     "lacks 2 tensors of the model: skips.0"),
    (True, lambda s: s | {LONE: torch.ones(12, 1, 5, 5, 5)}, {},
     r"skips.0.conv1.weight is \(12, 1, 5, 5, 5\) in the file"),
    (True, lambda s: s | {LONE: s[LONE] * float("nan")}, {},
     "skips.0.conv1.weight holds numbers that are not finite"),
    (True, lambda s: s | {"swinViT.norm.weight": torch.ones(3)}, {}, "swinViT.norm.weight"),
    (True, lambda s: s | {"swinViT.layers1.0.blocks.1.attn.gate": torch.ones(3)}, {},
     "attn.gate is .* absent in the model"),
])
def test_public_files_of_another_network_are_refused(monai_states, tmp_path, v2, change, keys, text):
    torch.save(change(monai_states[v2]), tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", SwinUNETR(1, 3, merge="legacy", **dict(feature_size=12) | keys), f".*{text}")


def test_one_channel_is_spread_and_others_are_refused(monai_states, tmp_path):
    torch.save(monai_states[True], tmp_path / "w.pt")
    one, four = (SwinUNETR(channels, 3, feature_size=12, merge="legacy") for channels in (1, 4))
    load_weights(one, tmp_path / "w.pt")
    report = load_weights(four, tmp_path / "w.pt")
    assert report["loaded"] == 167
    assert report["inflated"] == ["encoder.embed.weight", "skips.0.conv1.weight", "skips.0.match.weight"]
    volume = torch.randn(1, 1, 32, 64, 32)
    with torch.no_grad():
        assert difference(four(repeat(volume, "b 1 x y z -> b 4 x y z")), one(volume)) < 1e-4
    save(tmp_path / "four.pt", {"state_dict": to_monai(four.state_dict(), "legacy")})
    with pytest.raises(WeightsError, match="in_channels is 4 in the file, 1 in the model"):
        load_weights(one, tmp_path / "four.pt")


def test_a_unetr_starts_from_a_unetr_of_ours_alone(monai_states, tmp_path):
    keys = dict(feature_size=2, width=8, heads=2, hidden=8)
    source, net = UNETR(1, 3, (32, 32, 32), **keys), UNETR(1, 5, (32, 32, 32), **keys)
    path = ours_file(tmp_path / "best.pt", "finetune", source)
    report = load_weights(net, path)
    assert report["initial"] == {"out": 2} and same(source.encoder.state_dict(), net.encoder.state_dict())
    for net in (Swin3D(**SMALL), SwinUNETR(1, 3, **SMALL)):
        assert_refused(path, net, f"holds a UNETR of ours, the model is a {type(net).__name__}$")
    assert_refused(path, UNETR(1, 3, (32, 32, 48), **keys), r"does not fit the model: size is \(32, 32, 32\) in the file")
    net, none = UNETR(1, 3, (32, 32, 32), **keys), "holds no UNETR of ours, the model is a UNETR$"
    assert_refused(ours_file(path, "encoder", Swin3D(**SMALL)), net, none)
    assert_refused(ours_file(path, "finetune", SwinUNETR(1, 3, **SMALL)), net, none)
    torch.save(monai_states[True], path)
    assert_refused(path, net, none)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_objects_are_refused_and_never_run(monai_states, tmp_path):
    for extra in (Bomb(str(tmp_path / "ran")), torch.optim.SGD(nn.Linear(1, 1).parameters())):
        torch.save({"state_dict": monai_states[True], "optimizer": extra}, tmp_path / "w.pt")
        assert_refused(tmp_path / "w.pt", Swin3D(feature_size=12, merge="legacy"),
                r"holds a pickled object \([\w.]+\), which is never run")
        assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_weights_are_refused(tmp_path):
    net, path = Swin3D(**SMALL), tmp_path / "w.pt"
    assert_refused(path, net, "no such file")
    torch.save(net.state_dict(), path)
    for content in (b"", b"<html>404</html>\n" * 50, os.urandom(3000), path.read_bytes()[:5000]):
        path.write_bytes(content)
        assert_refused(path, net, "not a file of torch.save")
    none = "holds no Swin encoder of four stages; its tensors: "
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    for content, text in (([torch.ones(1)], "expected a dict of tensors, found list"),
                          ({"epoch": 1}, none + "none"),
                          (two, none + "0.weight, 0.bias, 1.weight and 1 more")):
        torch.save(content, path)
        assert_refused(path, net, text)
    for changes, text in ((dict(format="s2dc/other"), "unknown format 's2dc/other'"),
                          (dict(arguments=None), "of format 's2dc/encoder', but without arguments")):
        assert_refused(ours_file(path, "encoder", net, **changes), net, text)
    for value in (None, "x", 3):
        state = net.state_dict() | {"embed.bias": value}
        assert_refused(ours_file(path, "encoder", net, encoder=state), net, "embed.bias is .*, expected a tensor")


def test_save_is_all_or_nothing(tmp_path):
    path = tmp_path / "last.pt"
    save(path, {"step": 1})
    with pytest.raises(Exception):
        save(path, {"step": 2, "bad": lambda: 0})           # fails halfway
    assert torch.load(path, weights_only=True) == {"step": 1} and os.listdir(tmp_path) == ["last.pt"]
    save(path, {"step": 3})
    assert torch.load(path, weights_only=True) == {"step": 3} and os.listdir(tmp_path) == ["last.pt"]


def test_one_flipped_bit_is_refused(tmp_path):
    path = ours_file(tmp_path / "encoder.pt", "encoder", Swin3D(1, **SMALL))
    raw, net = path.read_bytes(), Swin3D(1, **SMALL)
    for place in range(len(raw) // 7, len(raw) * 6 // 7, len(raw) // 9):    # among the numbers
        damaged = bytearray(raw)
        damaged[place] ^= 64
        path.write_bytes(damaged)
        assert_refused(path, net, "the file is damaged, the checksum of .* does not fit$")


@pytest.mark.parametrize("at_a_time, calls", [(2 ** 27, 1), (8 * 8 * 3 * 5, 3), (1, 12)])
def test_windows_some_at_a_time_are_the_same_with_the_same_gradients(monkeypatch, at_a_time, calls):
    """As a GPU trains: 12 windows of 8 tokens, 3 heads; against the written-out form of a CPU."""
    torch.manual_seed(0)
    qkv, bias = torch.randn(3, 2, 3, 2, 1, 3, 8, 4, dtype=torch.float64), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    found = []
    for size in (None, at_a_time):
        parts, leaves = [], [tensor.clone().requires_grad_() for tensor in (qkv, bias)]
        with monkeypatch.context() as patch:
            if size:
                kernel, answers = model_file.F.scaled_dot_product_attention, itertools.cycle([False, True])
                patch.setattr(model_file, "AT_A_TIME", size)
                patch.setattr(model_file.F, "scaled_dot_product_attention", lambda *q, **kw: parts.append(1) or kernel(*q, **kw))
                patch.setattr(torch, "is_grad_enabled", lambda: next(answers))     # no CPU, but training
            out = model_file.attend(*leaves, [None, None, None])
        assert len(parts) == (calls if size else 0)
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
