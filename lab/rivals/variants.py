"""Not rivals: S2DC itself with its token losses on other maps, in the form of a rival, to be held against it.

At one crop a slab, tokens of 8 voxels, dual softmax and negatives of the step "s2dc" computes what
pretrain.py does, but for initial weights. Budgets count passes of the encoder; the decoder comes on top.
Where it learns, network.pt is beside encoder.pt: `finetune --init` of it starts from both. The decoder's map
of tokens as large as the encoder's needs no variant: `pretrain.py --decoder=True`.
"""
import copy

import torch
from einops import rearrange, reduce, repeat
from torch import nn

import data
import losses
import pretrain
from model import Projector, SwinUNETR
from tasks import swin

# voxels a token of the encoder's maps and of the decoder's that are taught
MAPS = {"s2dc": ((8,), ()), "maps": ((8, 16, 32), ()), "decoder_4": ((8,), (4,))}


class Student(nn.Module):
    """Encoder, decoder if it is asked for, a head for the tokens of each map and one for crops."""

    def __init__(self, cfg, of_encoder, of_decoder):
        super().__init__()
        self.of_encoder, self.of_decoder = of_encoder, of_decoder
        network, f = SwinUNETR(cfg.in_channels, 1, **swin(cfg)), cfg.feature_size
        self.network, self.encoder = network if of_decoder else None, network.encoder
        self.ups = 6 - of_decoder[0].bit_length() if of_decoder else 0      # the decoder's steps that learn
        patches = *of_encoder, *of_decoder              # maps of one size are as wide in both
        self.heads = nn.ModuleList(Projector(f * p // 2, cfg.hidden, cfg.embedding) for p in patches)
        self.standard = pretrain.Standard(16 * f)
        self.global_head = nn.Linear(16 * f, cfg.embedding, bias=False)

    def forward(self, V):
        """V (b, c, x, y, z) -> tokens [(b, t, e)] of each map, embeddings (b, e), pooled features (b, f)."""
        maps = self.encoder(V)
        chosen = [maps[p.bit_length() - 2] for p in self.of_encoder]
        if self.of_decoder:
            chosen.append(self.network.decode(maps, self.ups))
        tokens = [head(rearrange(x, "b c i j k -> b (i j k) c")) for head, x in zip(self.heads, chosen)]
        pooled = reduce(maps[-1], "b c i j k -> b c", "mean")
        return tokens, self.global_head(self.standard(pooled)), pooled.detach().float()


class Maps(nn.Module):
    """Eq. 9 with L_p2p and L_p2s the mean over the maps that MAPS names.

    A token of more voxels than cfg.token_patch takes part where one of those in it does, of fewer where that
    which holds it does.
    """
    passes = (1, 2)

    def __init__(self, cfg):
        super().__init__()
        self.cfg, (self.of_encoder, self.of_decoder) = cfg, MAPS[cfg.method]
        self.student = Student(cfg, self.of_encoder, self.of_decoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.encoder, self.seen = self.student.encoder, ()

    @property
    def ups(self):
        return self.student.ups

    @property
    def swin_unetr(self):
        """The network whose decoder learns as well, or None."""
        return self.student.network

    def taking_part(self, valid, p):
        """valid (b, t) of tokens of cfg.token_patch voxels -> (b, t) of tokens of p."""
        q = self.cfg.token_patch
        ni, nj, nk = (s // max(p, q) for s in self.cfg.crop)
        n = max(p, q) // q
        sizes = dict(ni=ni, nj=nj, nk=nk, i=n, j=n, k=n)
        valid = reduce(valid.float(), "b (ni i nj j nk k) -> b ni nj nk", "max", **sizes)
        n = q // min(p, q)
        return repeat(valid > 0, "b ni nj nk -> b (ni i nj j nk k)", i=n, j=n, k=n)

    def forward(self, batch, generator):
        cfg, b = self.cfg, torch.arange(len(batch["V"]), device=batch["V"].device)
        tokens, query, pooled = self.student(batch["V"])
        with torch.no_grad():
            tokens_, of_moved, pooled_ = self.teacher(batch["V_"])
            _, of_twin, of_twins = self.teacher(batch["twin"])
            keys = nn.functional.normalize(torch.stack([of_moved, of_twin], dim=1).float(), dim=-1)
        self.seen = pooled, torch.cat([pooled_, of_twins])
        negatives, allowed = pretrain.others_of_step(keys, batch["subjects"], b, batch["apart"])
        loss, measures, patches = 0, {}, [*self.of_encoder, *self.of_decoder]
        for k, (p, q, q_) in enumerate(zip(patches, tokens, tokens_)):
            valid, valid_ = (self.taking_part(batch[name], p) for name in ("valid", "valid_"))
            pairs = data.matches(batch["H"], [s // p for s in cfg.crop], p).to(q.device)
            sample, i, j = pairs.T
            pairs = pairs[valid[sample, i] & valid_[sample, j]]
            out = losses.s2dc_loss(
                q, q_, pairs, None, None, None, weights=(0, *(w / len(patches) for w in cfg.weights[1:])),
                temperature=cfg.temperature, form=cfg.structure, detach=cfg.structure_detach, valid=valid,
                valid_=valid_)
            where = f"{p}_decoder" if k >= len(self.of_encoder) else f"{p}"
            loss, measures = loss + out["loss"], measures | {f"accuracy_{where}": out["accuracy"]}
        L_g = losses.info_nce(query, keys[:, -1], negatives, cfg.global_temperature, allowed)
        found = losses.recognition(query, keys[:, -1], negatives, cfg.global_temperature, allowed)
        measures |= {"global": L_g.detach(), "top1": found["top1"], "top1_chance": found["top1_chance"]}
        return loss + cfg.weights[0] * L_g, measures

    def after_step(self, step, steps):
        pretrain.follow(self.teacher, self.student, self.cfg.momentum)
        for network, features in zip((self.student, self.teacher), self.seen):
            network.standard.follow(features)


METHODS = dict.fromkeys(MAPS, Maps)
