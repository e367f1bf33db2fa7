"""model.py against MONAI's SwinUNETR (float64), against itself where an identity must hold, and against files of every kind."""
import os
import re

import numpy as np
import pytest
import torch
from einops import repeat
from torch import nn

import model as model_file
from model import (
    LEGACY,
    Classifier,
    Merge,
    Projector,
    Swin3D,
    SwinUNETR,
    WeightsError,
    from_monai,
    load_weights,
    to_monai,
)
from run import save

SMALL = dict(feature_size=12, depths=(1, 2, 1, 1))                                # 3.5 M parameters with v2, quick on one core


def monai_net(v2, channels=1, classes=3, downsample="merging", depths=(2, 2, 2, 2)):
    """MONAI's SwinUNETR of feature size 12, float64, with weights large enough that no bias or norm weight goes unseen."""
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")

    class LegacyMerging(nn.Module):                        # MONAI's "merging" until January 2025, by its neighbours' offsets
        def __init__(self, dim, norm_layer, spatial_dims):
            super().__init__()
            self.norm, self.reduction = norm_layer(8 * dim), nn.Linear(8 * dim, 2 * dim, bias=False)

        def forward(self, x):
            takes = "000 100 010 001 101 010 001 111".split()
            return self.reduction(self.norm(torch.cat([x[:, int(t[0])::2, int(t[1])::2, int(t[2])::2] for t in takes], dim=-1)))

    torch.manual_seed(0)
    net = nets.SwinUNETR(channels, classes, feature_size=12, use_v2=v2, depths=depths,
                         downsample=LegacyMerging if downsample == "legacy" else downsample).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias_table"):
                parameter += torch.randn_like(parameter) * 0.3
    return net


def merge_for(downsample):
    return "legacy" if downsample == "legacy" else "all"


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# ------------------------------------------------------------------------------------------------------- equal to MONAI

@pytest.mark.parametrize("v2, channels, batch, size, downsample", [
    (False, 1, 2, (32, 64, 32), "merging"), (True, 4, 1, (64, 32, 32), "mergingv2"), (True, 1, 1, (32, 32, 64), "legacy"),
])
def test_network_and_gradients_equal_monai(v2, channels, batch, size, downsample):
    monai = monai_net(v2, channels, 3, downsample)
    ours = SwinUNETR(channels, 3, feature_size=12, v2=v2, merge=merge_for(downsample)).double()
    ours.load_state_dict(from_monai(monai.state_dict(), downsample))
    volume = torch.randn(batch, channels, *size, dtype=torch.float64)
    wanted, found = monai(volume), ours(volume)
    assert difference(found, wanted) < 1e-9
    weight = torch.randn_like(wanted)
    (wanted * weight).mean().backward()
    (found * weight).mean().backward()
    gradients = to_monai({name: p.grad for name, p in ours.named_parameters()}, downsample)
    for name, parameter in monai.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0 and (gradients[name] - parameter.grad).abs().max() < 1e-9 * max(scale, 1e-3), name


@pytest.mark.parametrize("v2, channels, size, downsample", [
    (True, 1, (64, 64, 64), "merging"), (False, 4, (64, 96, 32), "legacy"),
])
def test_encoder_maps_and_gradients_equal_monai(v2, channels, size, downsample):
    monai = monai_net(v2, channels, 2, downsample).swinViT
    ours = Swin3D(channels, feature_size=12, v2=v2, merge=merge_for(downsample)).double()
    ours.load_state_dict(from_monai(monai.state_dict(), downsample))
    volume = torch.randn(1, channels, *size, dtype=torch.float64)
    wanted, found = monai(volume), ours(volume)
    assert [tuple(x.shape[1:]) for x in found] == [(12 * 2**k, *(n // 2 ** (k + 1) for n in size)) for k in range(5)]
    for x, y in zip(found, wanted):
        assert difference(x, y) < 1e-9
    sum((x * x.cos()).mean() for x in wanted).backward()
    sum((x * x.cos()).mean() for x in found).backward()
    gradients = to_monai({name: p.grad for name, p in ours.named_parameters()}, downsample)
    for name, parameter in monai.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0 and (gradients[name] - parameter.grad).abs().max() < 1e-9 * max(scale, 1e-3), name


def test_decoder_equals_monai_on_a_cube():
    monai = monai_net(True, 1, 2, "merging")
    ours = SwinUNETR(1, 2, feature_size=12).double()
    ours.load_state_dict(from_monai(monai.state_dict()))
    volume = torch.randn(1, 1, 64, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert difference(ours(volume), monai(volume)) < 1e-9


@pytest.mark.parametrize("v2, tensors, millions", [(False, 159, 62.19), (True, 167, 72.76)])
def test_base_size_has_as_many_tensors_and_parameters_as_monai(v2, tensors, millions):
    net = SwinUNETR(1, 14, feature_size=48, v2=v2)
    assert len(to_monai(net.state_dict())) == tensors
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.006
    assert Swin3D(v2=False).arguments == dict(in_channels=1, feature_size=48, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24),
                                              window_size=7, v2=False, merge="all", checkpointing=False)


# -------------------------------------------------------------------------------------------------- weights both ways

@pytest.mark.parametrize("downsample", ["merging", "mergingv2", "legacy"])
def test_weights_travel_to_monai_and_back_unchanged(downsample):
    for ours, monai in ((SwinUNETR(2, 3, feature_size=12), monai_net(True, 2, 3)),
                        (Swin3D(2, feature_size=12), monai_net(True, 2, 3).swinViT)):
        theirs = to_monai(ours.state_dict(), downsample)
        assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in monai.state_dict().items()}
        assert all(torch.equal(v, monai.state_dict()[k]) for k, v in theirs.items() if k.endswith("index"))
        back = from_monai(theirs, downsample)
        assert list(back) == list(ours.state_dict()) and all(torch.equal(v, back[k]) for k, v in ours.state_dict().items())
    head = Classifier(2, 3, feature_size=12)
    theirs = to_monai(head.state_dict(), downsample)
    assert theirs.keys() == {k for k in monai_net(True, 2, 3).state_dict() if k.startswith("swinViT.")}
    assert all(torch.equal(v, head.state_dict()[k]) for k, v in from_monai(theirs, downsample).items())


def test_translation_refuses_what_it_does_not_know():
    net = Swin3D(feature_size=12)
    theirs = to_monai(net.state_dict())
    with pytest.raises(ValueError, match="fancy.weight"):
        to_monai(SwinUNETR(1, 2, **SMALL).state_dict() | {"fancy.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="fancy.weight"):
        from_monai({"fancy.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="downsample.*old"):
        from_monai(theirs, "old")
    index = next(k for k in theirs if k.endswith("index"))
    with pytest.raises(ValueError, match=re.escape(index)):
        from_monai(theirs | {index: theirs[index].T.contiguous()})


def test_merge_puts_each_neighbour_once_and_legacy_repeats_two():
    x = torch.arange(2 * 4 * 6 * 2 * 3.).reshape(2, 4, 6, 2, 3)
    seen = {}
    for kind in ("all", "legacy"):
        merge = Merge(3, kind)
        merge.norm, merge.reduce = nn.Identity(), nn.Identity()
        seen[kind] = merge(x)
    assert seen["all"].shape == (2, 2, 3, 1, 24) and torch.equal(seen["all"].flatten().sort().values, x.flatten())
    for b, i, j, k in ((0, 0, 0, 0), (1, 1, 2, 0)):
        for n, at in enumerate(LEGACY):
            dx, dy, dz = at // 4, at // 2 % 2, at % 2
            assert torch.equal(seen["legacy"][b, i, j, k, 3 * n: 3 * n + 3], x[b, 2 * i + dx, 2 * j + dy, 2 * k + dz])
    assert len(set(LEGACY)) == 6


# ----------------------------------------------------------------------------------------------------- sizes and errors

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


def test_maps_are_normalised_over_channels():
    x = Swin3D(**SMALL)(torch.randn(1, 1, 40, 32, 32))
    for each in x:
        assert each.mean(dim=1).abs().max() < 1e-5 and (each.var(dim=1, unbiased=False) - 1).abs().max() < 0.05


def test_unfit_volumes_and_arguments_are_refused_in_one_line():
    encoder, net = Swin3D(2, **SMALL), SwinUNETR(2, 3, **SMALL)
    for forward in (encoder, net, Classifier(2, 3, **SMALL)):
        for shape in ((2, 32, 32, 32), (1, 1, 64, 64, 64), (1, 2, 0, 64, 64)):
            text = re.escape(f"volume: expected (b, 2, x, y, z) with no empty axis, found {shape}")
            with pytest.raises(ValueError, match=text):
                forward(torch.zeros(shape))
    with pytest.raises(ValueError, match="longer than 32 voxels, found 32 20 32"):
        net(torch.zeros(1, 2, 32, 20, 32))
    for wrong, text in ((dict(depths=(2, 2)), "depths and num_heads"), (dict(num_heads=(3, 6, 12, 25)), "num_heads"),
                        (dict(merge="old"), "merge.*'old'")):
        with pytest.raises(ValueError, match=text):
            Swin3D(**wrong)


# --------------------------------------------------------------------------------------- masks, compile, precision, memory

def test_windows_do_not_look_across_the_ends_of_the_volume(monkeypatch):
    """Independent of MONAI: the shifted blocks equal plain attention with a mask over all pairs of tokens of a window."""
    torch.manual_seed(0)
    block = model_file.Block(6, 2, 3, shifted=True).double()
    x = torch.randn(1, 5, 3, 7, 6, dtype=torch.float64)                   # windows 3, shifts 1 0 1, padded to 6 3 9
    with torch.no_grad():
        found = block.windows(x)
        full = torch.zeros(1, 6, 3, 9, 6, dtype=torch.float64)
        full[:, :5, :, :7] = x
        place = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(3), torch.arange(9), indexing="ij"), dim=-1)
        q, k, v = block.qkv(full)[0].chunk(3, dim=-1)
        wanted = torch.zeros_like(full[0])
        for i in place.reshape(-1, 3).tolist():
            mates, biases = [], []
            for j in place.reshape(-1, 3).tolist():
                # rolled by 1: windows start at -2 1 4 .. along x and z; what wraps round is in a region of its own
                if all((a - s) // 3 == (b - s) // 3 and (a < s) == (b < s) for a, b, s in zip(i, j, (1, 0, 1))):
                    at = lambda p: ((p[0] - 1) % 6 % 3, p[1] % 3, (p[2] - 1) % 9 % 3)
                    row = 0
                    for a, b in zip(at(i), at(j)):
                        row = row * 5 + a - b + 2
                    mates.append(j), biases.append(block.table[row])
            for h in range(2):
                c = slice(3 * h, 3 * h + 3)
                keys, values = (torch.stack([t[tuple(j)][c] for j in mates]) for t in (k, v))
                wanted[tuple(i)][c] = (keys @ q[tuple(i)][c] / 3**0.5 + torch.stack(biases)[:, h]).softmax(0) @ values
        wanted = block.project(wanted)[None, :5, :, :7]
    assert difference(found, wanted) < 1e-12


def test_masks_and_offsets_are_made_once(monkeypatch):
    net = Swin3D(**SMALL)
    for name in ("rolled_apart", "offsets"):
        monkeypatch.setattr(model_file, name, lambda *_: pytest.fail("made in the forward pass"))
    with torch.no_grad():
        net(torch.zeros(1, 1, 32, 32, 32)), net(torch.zeros(1, 1, 32, 64, 32))
    assert not any(name.endswith(("cuts", "offsets")) for name in net.state_dict())


@pytest.mark.parametrize("checkpointing, backend", [(False, "aot_eager"), (True, "eager")])
def test_encoder_compiles_into_one_graph(checkpointing, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Swin3D(feature_size=12, depths=(2, 1, 1, 1), checkpointing=checkpointing)
    compiled = torch.compile(net, backend=backend, fullgraph=True)                         # an error if the graph breaks
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
    for p, q in zip(*(net.parameters() for net in nets)):                   # several threads add up in any order
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * largest)
    assert kept[1] < 0.4 * kept[0], kept


def test_norms_and_maps_are_float32_under_autocast(monkeypatch):
    torch.manual_seed(0)
    net, volume, seen = SwinUNETR(1, 3, **SMALL), torch.randn(1, 1, 32, 64, 32), []
    for name in ("layer_norm", "instance_norm"):
        plain = getattr(torch.nn.functional, name)
        monkeypatch.setattr(model_file.F, name, lambda x, *a, plain=plain, **k: (seen.append((x.dtype, plain(x, *a, **k)))
                                                                                 or seen[-1][1]))
    plain_maps, plain_out = net.encoder(volume), net(volume)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        maps, out = net.encoder(volume), net(volume)
        convolved = net.encoder.embed(volume)
    assert convolved.dtype == out.dtype == torch.bfloat16               # autocast is at work
    assert len(seen) > 30 and all(dtype == result.dtype == torch.float32 for dtype, result in seen)
    for x, y in zip([*maps, out.float()], [*plain_maps, plain_out]):
        assert x.dtype == torch.float32 and ((x - y).square().mean() / y.square().mean()).sqrt() < 0.05


# ------------------------------------------------------------------------------------------------------------- heads

def test_projector_sees_each_vector_alone():
    torch.manual_seed(0)
    net, x = Projector(24, 64, 16).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    y = net(x)
    assert y.shape == (2, 5, 16) and torch.allclose(net(x[1, 3]), y[1, 3], atol=1e-12)
    first, norm1, _, second, norm2, _, last = net.layers
    norm = lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gelu = lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2
    wanted = last(gelu(norm(second(gelu(norm(first(x)))))))
    assert torch.allclose(y, wanted, atol=1e-12)
    assert Projector(24).arguments == dict(in_channels=24, hidden=2048, out_channels=512)


def test_classifier_pools_the_last_map():
    torch.manual_seed(0)
    net, volume = Classifier(1, 4, hidden=8, **SMALL), torch.randn(2, 1, 20, 33, 40)
    last = net.encoder(volume)[-1]
    assert last.shape[2:] == (1, 2, 2)
    hidden = net.head[0](last.flatten(2).mean(-1))
    gelu = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    assert torch.allclose(net(volume), net.head[2](gelu), atol=1e-5)


def test_initial_weights():
    torch.manual_seed(0)
    net = Classifier(1, 4, feature_size=24)
    for name, p in net.named_parameters():
        if p.ndim == 2 and p.numel() > 5000:
            assert abs(p.std().item() - 0.02) < 0.001 and abs(p.mean().item()) < 0.001, name
        elif p.ndim == 1 and "embed" not in name:
            assert torch.equal(p, torch.ones_like(p) if "norm" in name and name.endswith("weight") else torch.zeros_like(p)), name


def test_arguments_rebuild_the_network_from_a_file(tmp_path):
    kinds = dict(depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=4, v2=False, merge="legacy", checkpointing=True)
    volume = torch.rand(1, 2, 64, 33, 40)
    for net in (Swin3D(2, 24, **kinds), SwinUNETR(2, 3, feature_size=24, **kinds), Classifier(2, 3, hidden=7, feature_size=24, **kinds)):
        save(tmp_path / "best.pt", {"arguments": net.arguments, "model": net.state_dict()})
        file = torch.load(tmp_path / "best.pt", weights_only=True)
        again = type(net)(**file["arguments"])
        again.load_state_dict(file["model"])
        assert again.arguments == net.arguments and again.arguments["checkpointing"]
        with torch.no_grad():
            one, other = net(volume), again(volume)
        assert all(map(torch.equal, one, other))


# --------------------------------------------------------------------------------------------------------- load_weights

def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def part(state, *starts):
    return {k: v for k, v in state.items() if k.startswith(starts)}


def other(state):
    """The same names with other weights, as a teacher has them: zeros, where weights are numbers."""
    return {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in state.items()}


def swin(state):
    return {k.removeprefix("swinViT."): v for k, v in part(state, "swinViT.").items()}


SKIPS = tuple(f"encoder{n}." for n in (1, 2, 3, 4, 10))
STRAY = {"proj_head.layer1.0.weight": torch.ones(4, 4), "proj_head.layer3.0.bias": torch.ones(4)}


# Each entry: v2, how the file is made from MONAI's state dict, tensors that must load into a SwinUNETR and be skipped.
PUBLIC = {
    "MONAI model_swinvit.pt": (False, lambda s: {"epoch": 1, "state_dict": prefixed("module.", {
        k.replace("mlp.linear", "mlp.fc"): v for k, v in swin(s).items()})}, 126, 0),
    "MONAI supervised": (False, lambda s: {"epoch": 7, "best_acc": np.float64(0.8), "state_dict": s}, 159, 0),
    "MONAI ssl_pretrained_weights.pth": (False, lambda s: {"model": {
        "encoder.mask_token": torch.ones(1), "encoder.norm.weight": torch.ones(2), "encoder.norm.bias": torch.ones(2),
        "out.conv.conv.weight": s["out.conv.conv.weight"], "out.conv.conv.bias": s["out.conv.conv.bias"],
        **prefixed("encoder.", {re.sub(r"^(layers\d\.0)\.", r"\1.0.", k): v for k, v in swin(s).items()})}}, 126, 5),
    "VoCo_10k.pt": (True, lambda s: prefixed("module.", STRAY | {
        k.replace("swinViT", "swin_vit"): v for k, v in part(s, "swinViT.", *SKIPS).items()}), 145, 2),
    "VoCo training, optimizer left out": (True, lambda s: {"global_step": 9, "state_dict": {
        **prefixed("module.student.", part(s, "swinViT.", *SKIPS) | STRAY),
        **prefixed("module.teacher.", other(part(s, "swinViT.", *SKIPS)) | STRAY)}}, 145, 149),
    "VoCo_B_SSL_head.pt": (True, lambda s: part(s, "swinViT.", *SKIPS), 145, 0),
    "VoCo-large training": (True, lambda s: {"state_dict": {
        **prefixed("student.", STRAY), **prefixed("teacher.", STRAY),
        **prefixed("backbone.", part(s, "swinViT.", *SKIPS))}}, 145, 4),
    "VoComni_B.pt": (True, lambda s: s | {"out.conv.conv.weight": torch.ones(21, 12, 1, 1, 1),
                                          "out.conv.conv.bias": torch.ones(21)}, 165, 2),
    "SuPreM": (False, lambda s: {"net": prefixed("module.backbone.", {
        k.replace("swinViT", "swin_vit"): v for k, v in s.items()})}, 159, 0),
    "S2DC model_stepN.pt": (True, lambda s: {"global_step": 5, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
                                             "state_dict": prefixed("module.", {
        **prefixed("student.", part(s, "swinViT.") | {
            "proj_head_geo.layer1.0.weight": torch.ones(2),
            "encoder_cof.layer.conv1.conv.weight": s["encoder10.layer.conv1.conv.weight"]}),
        **prefixed("teacher.", other(part(s, "swinViT."))), "queue_cl": torch.ones(3), "queue_ptr": torch.zeros(1).long()})}, 134, 138),
    "S2DC final_model.pth": (True, lambda s: {
        **prefixed("student.", part(s, "swinViT.") | {"proj_head_cl.layer1.0.weight": torch.ones(2)}),
        **prefixed("teacher.", other(part(s, "swinViT."))), "queue_cl": torch.ones(3)}, 134, 136),
}


@pytest.fixture(scope="module")
def monai_states():
    return {v2: {k: v.float() if v.is_floating_point() else v for k, v in monai_net(v2, 1, 3, "legacy").state_dict().items()}
            for v2 in (False, True)}


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_files_load_whole(kind, monai_states, tmp_path, capsys):
    v2, make, must, skipped = PUBLIC[kind]
    state, path = monai_states[v2], tmp_path / "weights.pt"
    torch.save(make(state), path)
    net = SwinUNETR(1, 3, feature_size=12, v2=v2, merge="legacy")
    before, truth = {k: v.clone() for k, v in net.state_dict().items()}, from_monai(state, "legacy")
    report = load_weights(net, path)
    assert (report["loaded"], report["skipped"], report["total"]) == (must, skipped, must + skipped)
    assert f"loaded {must} of {must + skipped}, skipped {skipped}" in capsys.readouterr().out
    changed = {k for k, v in net.state_dict().items() if torch.equal(v, truth[k])}
    same = {k for k, v in net.state_dict().items() if torch.equal(v, before[k])}
    assert changed | same == net.state_dict().keys()
    assert len(changed) == must - 8 and len(same) == sum(report["initial"].values())    # MONAI counts 8 index tensors
    for bare in (Swin3D(feature_size=12, v2=v2, merge="legacy"), Classifier(1, 5, feature_size=12, v2=v2, merge="legacy")):
        report = load_weights(bare, path)
        assert report["loaded"] == (134 if v2 else 126) and report["loaded"] + report["skipped"] == must + skipped
        encoder = bare if isinstance(bare, Swin3D) else bare.encoder
        assert all(torch.equal(v, truth[f"encoder.{k}"]) for k, v in encoder.state_dict().items())


def test_skipped_parts_are_named(monai_states, tmp_path, capsys):
    for kind, words in (("S2DC model_stepN.pt", ["teacher: 134 not in Swin3D", "queue_cl: 1", "student: 2"]),
                        ("VoComni_B.pt", ["skips: 9 not in Swin3D", "ups: 20 ", "bottom: 2 ", "out: 2 "])):
        torch.save(PUBLIC[kind][1](monai_states[True]), tmp_path / "w.pt")
        load_weights(Swin3D(feature_size=12, merge="legacy"), tmp_path / "w.pt")
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and all(word in line for word in words), line
    load_weights(SwinUNETR(1, 14, feature_size=12, merge="legacy"), tmp_path / "w.pt")
    assert "out: 2 21 outputs in the file, 14 in the model" in capsys.readouterr().out


def test_newer_monai_files_need_their_downsample(tmp_path):
    monai = monai_net(True, 1, 3, "merging").float()
    torch.save(monai.state_dict(), tmp_path / "w.pt")
    net, volume = SwinUNETR(1, 3, feature_size=12), torch.randn(1, 1, 32, 32, 64)
    with pytest.raises(WeightsError, match="w.pt: does not say how it merges.*build the model with merge='legacy', or pass "
                                           "downsample='merging' or 'mergingv2'"):
        load_weights(net, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="build the model with merge='all', or pass downsample='legacy'"):
        load_weights(SwinUNETR(1, 3, feature_size=12, merge="legacy"), tmp_path / "w.pt", "merging")
    assert load_weights(net, tmp_path / "w.pt", downsample="merging")["loaded"] == 167
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
    for kind in ("encoder", "pretrain"):
        source = Swin3D(**SMALL)
        path = ours_file(tmp_path / f"{kind}.pt", kind, source)
        for net in (Swin3D(**SMALL), SwinUNETR(1, 3, **SMALL), Classifier(1, 3, **SMALL)):
            count = len(source.state_dict())
            report = load_weights(net, path)
            assert report["loaded"] == count and report["skipped"] == (count + 2 if kind == "pretrain" else 0)
            encoder = net if isinstance(net, Swin3D) else net.encoder
            assert all(torch.equal(v, source.state_dict()[k]) for k, v in encoder.state_dict().items())
    for source, others in ((SwinUNETR(1, 3, **SMALL), 0), (Classifier(1, 3, **SMALL), 4)):
        path = ours_file(tmp_path / "best.pt", "finetune", source)
        same = SwinUNETR(1, 3, **SMALL) if others == 0 else Classifier(1, 3, **SMALL)
        report = load_weights(same, path)
        assert report["loaded"] == len(source.state_dict()) and not report["initial"]
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in same.state_dict().items())
        other = Classifier(1, 3, **SMALL) if others == 0 else SwinUNETR(1, 3, **SMALL)
        assert load_weights(other, path)["loaded"] == len(source.encoder.state_dict())
        assert all(torch.equal(v, source.encoder.state_dict()[k]) for k, v in other.encoder.state_dict().items())
    report = load_weights(Classifier(1, 5, **SMALL), path)               # two classes more: the last layer alone is new
    assert report["reasons"] == {"head": "2 3 outputs in the file, 5 in the model"} and report["initial"] == {"head": 2}


@pytest.mark.parametrize("change, text", [
    (dict(feature_size=24), "feature_size is 12 in the file, 24 in the model"),
    (dict(v2=False), "v2 is True in the file, False in the model"),
    (dict(merge="legacy"), "merge is all in the file, legacy in the model"),
    (dict(window_size=5), "window_size is 7 in the file, 5 in the model"),
    (dict(depths=(2, 2, 1, 1)), r"depths is \(1, 2, 1, 1\) in the file, \(2, 2, 1, 1\) in the model"),
    (dict(num_heads=(3, 6, 12, 12)), r"num_heads is \(3, 6, 12, 24\) in the file, \(3, 6, 12, 12\) in the model"),
])
def test_our_files_of_another_network_are_refused(change, text, tmp_path):
    path = ours_file(tmp_path / "encoder.pt", "encoder", Swin3D(**SMALL))
    net = SwinUNETR(1, 3, **SMALL | change)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(WeightsError, match=f"encoder.pt: does not fit the model: {text}") as error:
        load_weights(net, path)
    assert "\n" not in str(error.value) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_public_files_of_another_network_are_refused(monai_states, tmp_path):
    def refused(state, text, **arguments):
        torch.save(state, tmp_path / "w.pt")
        net = SwinUNETR(1, 3, merge="legacy", **{"feature_size": 12} | arguments)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(WeightsError, match=f"w.pt: .*{text}") as error:
            load_weights(net, tmp_path / "w.pt")
        assert "\n" not in str(error.value) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    v1, v2 = monai_states[False], monai_states[True]
    refused(PUBLIC["MONAI model_swinvit.pt"][1](v1), "v2 is False in the file, True in the model")
    refused(PUBLIC["S2DC final_model.pth"][1](v2), "v2 is True in the file, False in the model", v2=False)
    refused(v2, "feature_size is 12 in the file, 24 in the model", feature_size=24)
    refused(v2, r"depths is \(2, 2, 2, 2\)", depths=(1, 2, 2, 2))
    lone = "encoder1.layer.conv1.conv.weight"
    refused({k: v for k, v in v2.items() if k != "swinViT.layers3.0.blocks.1.norm2.bias"},
            "lacks 1 .*stages.2.blocks.1.norm2.bias")
    refused({k: v for k, v in v2.items() if not k.startswith("encoder1.") or k == lone}, "lacks 2 tensors of the model: skips.0")
    refused(v2 | {lone: torch.ones(12, 1, 5, 5, 5)}, r"skips.0.conv1.weight is \(12, 1, 5, 5, 5\) in the file")
    refused(v2 | {lone: v2[lone] * float("nan")}, "skips.0.conv1.weight holds numbers that are not finite")
    refused(v2 | {"swinViT.norm.weight": torch.ones(3)}, "swinViT.norm.weight")
    refused(v2 | {"swinViT.layers1.0.blocks.1.attn.gate": torch.ones(3)}, "attn.gate is .* absent in the model")


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


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_objects_are_refused_and_never_run(monai_states, tmp_path):
    marker = tmp_path / "ran"
    for content in ({"state_dict": monai_states[True], "optimizer": Bomb(str(marker))},
                    {"state_dict": monai_states[True], "optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=r"w.pt: holds a pickled object \([\w.]+\), which is never run") as error:
            load_weights(Swin3D(feature_size=12, merge="legacy"), tmp_path / "w.pt")
        assert "\n" not in str(error.value) and not marker.exists()


def test_files_that_hold_no_weights_are_refused(tmp_path):
    net, path = Swin3D(**SMALL), tmp_path / "w.pt"

    def refused(text):
        with pytest.raises(WeightsError, match=f"w.pt: {text}") as error:
            load_weights(net, path)
        assert "\n" not in str(error.value)

    refused("no such file")
    for content in (b"", b"<html>404</html>\n" * 50, os.urandom(3000)):
        path.write_bytes(content)
        refused("not a file of torch.save")
    torch.save(Swin3D(**SMALL).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    refused("not a file of torch.save")
    torch.save([torch.ones(1)], path)
    refused("expected a dict of tensors, found list")
    torch.save({"epoch": 1}, path)
    refused("holds no Swin encoder of four stages; its tensors: none")
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict(), path)
    refused("holds no Swin encoder of four stages; its tensors: 0.weight, 0.bias, 1.weight and 1 more")
    ours_file(path, "encoder", net, format="s2dc/other")
    refused("unknown format 's2dc/other'")
    ours_file(path, "encoder", net, arguments=None)
    refused("of format 's2dc/encoder', but without arguments")


def test_save_is_all_or_nothing(tmp_path):
    path = tmp_path / "last.pt"
    save(path, {"step": 1})
    with pytest.raises(Exception):
        save(path, {"step": 2, "bad": lambda: 0})                        # fails halfway
    assert torch.load(path, weights_only=True) == {"step": 1} and os.listdir(tmp_path) == ["last.pt"]
    save(path, {"step": 3})
    assert torch.load(path, weights_only=True) == {"step": 3} and os.listdir(tmp_path) == ["last.pt"]


def test_one_flipped_bit_is_refused(tmp_path):
    net = Swin3D(1, **SMALL)
    path, other = tmp_path / "encoder.pt", Swin3D(1, **SMALL)
    save(path, dict(format="s2dc/encoder", encoder=net.state_dict(), arguments=net.arguments))
    raw, before = bytearray(path.read_bytes()), {k: v.clone() for k, v in other.state_dict().items()}
    for place in range(len(raw) // 7, len(raw) * 6 // 7, len(raw) // 9):        # among the numbers, not in the directory
        damaged = bytearray(raw)
        damaged[place] ^= 64
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="encoder.pt: the file is damaged, the checksum of .* does not fit$"):
            load_weights(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("value", [None, "x", 3])
def test_what_is_no_tensor_is_refused(tmp_path, value):
    net = Swin3D(1, **SMALL)
    state = net.state_dict() | {"embed.bias": value}
    save(tmp_path / "e.pt", dict(format="s2dc/encoder", encoder=state, arguments=net.arguments))
    with pytest.raises(WeightsError, match="e.pt: embed.bias is .*, expected a tensor"):
        load_weights(net, tmp_path / "e.pt")
