"""Does a longer stage 2 show what an encoder is worth? Sarcoma in T1, 8 labelled patients, 600 crops and not
the 200 of the other studies, at the benchmark's rate and at one that moves the encoder less.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python -m lab.study configs/study_sarcoma_longer.py
"""
from configs.study_sarcoma_maps import *

name = "study_sarcoma_longer"
pretrain_config = "configs/sarcoma_pretrain_t1.py"
finetune_config = "configs/sarcoma_t1.py"
labelled = 22
finetune_keys = {"steps": 600, "warmup": 60, "eval_every": 300, "save_every": 300}
rows = {
    "scratch": None,
    "all three": {},
    "the decoder's map of 8 voxels, too": {"decoder": True, "file": "network.pt"},
    "scratch, rate 0.003": None,
    "all three, rate 0.003": {"of": "all three"},
    "the decoder's map of 8 voxels, too, rate 0.003": {"of": "the decoder's map of 8 voxels, too"},
}
shots = dict.fromkeys(rows, (8,))
tuned = {row: {"lr": 3e-3} for row in rows if row.endswith("rate 0.003")}
