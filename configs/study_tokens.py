"""How large should a token be where voxels are small and a slab has several crops, as in the paper's runs?
Phantoms of 1.5 mm, slabs of 128 x 128 x 64 voxels that are four crops: 2048 tokens of 8 voxels, 256 of 16 or
32 of 32.

    python -m lab.phantom data/demo_fine/train --size=192 --subjects=24
    python -m lab.phantom data/demo_fine/unseen --size=192 --first=1000 --subjects=8
    python -m lab.study configs/study_tokens.py

Probes alone: 150 crops of 64^3 are 96 mm wide here, and teach nobody to segment.
"""
from configs.study import *

name = "study_tokens"
rows = {
    "random": None,
    "tokens of 8 voxels": {},
    "tokens of 16 voxels": {"token_patch": 16},
    "tokens of 32 voxels": {"token_patch": 32},
}
shots, tuned = {}, {}
pretrain_keys = {"scans": "demo_fine/train/imagesTr/*.nii.gz", "slab": (128, 128, 64), "batch": 1,
                 "steps": 100, "warmup": 10, "save_every": 100}
probe_keys = {"scans": (), "image": "demo_fine/unseen/imagesTr/phantom_{id}.nii.gz",
              "label": "demo_fine/unseen/labelsTr/phantom_{id}.nii.gz"}
