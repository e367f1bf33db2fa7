"""Whether the gain of pre-training grows with its length and batch, and whether the same minutes of training
from scratch do as well: probes and few-label Dice on phantoms.

    python -m lab.phantom --demo
    python -m lab.study configs/study_longer.py
    python -m lab.study configs/study_seeds.py          ten seeds of two of these rows
"""
from configs.study import *

name = "study_longer"
rows = {
    "scratch": None,
    "100 steps": {"steps": 100, "warmup": 10},
    "400 steps": {},
    "1600 steps": {"steps": 1600, "warmup": 160},
    "100 steps of 8": {"steps": 100, "warmup": 10, "batch": 8},
    "200 steps of 8": {"steps": 200, "warmup": 20, "batch": 8},
    "scratch, 450 crops": None,
    "400 steps, 450 crops": {"of": "400 steps"},
}
shots = dict.fromkeys(rows, (2,))
tuned = dict.fromkeys(list(rows)[-2:], {"steps": 450, "warmup": 45, "eval_every": 450})
pretrain_keys = {"save_every": 200}
