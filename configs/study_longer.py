"""Whether the gain of pre-training grows with its length and batch, and whether the same minutes of training
from scratch do as well: probes and few-label Dice on phantoms. Stage 2 has 450 crops, for with 150 the score
says how fast it starts and not where it ends.

    python -m lab.phantom --demo
    python -m lab.study configs/study_longer.py         hours on two cores; --only for some of its rows
"""
from configs.study import *

name = "study_longer"
rows = {
    "scratch": None,
    "100 steps": {"steps": 100, "warmup": 10},
    "400 steps": {},
    "1600 steps": {"steps": 1600, "warmup": 160},
    "6400 steps": {"steps": 6400, "warmup": 640},
    "100 steps of 8": {"steps": 100, "warmup": 10, "batch": 8},
    "200 steps of 8": {"steps": 200, "warmup": 20, "batch": 8},
    "200 steps of 8, without L_g": {"steps": 200, "warmup": 20, "batch": 8, "weights": (0, 1, 1)},
    # more minutes than 400 steps and 450 crops: 450 crops take as long as some 650 steps of 2
    "scratch, 900 crops": None,
}
shots = dict.fromkeys(rows, (2,))
finetune_keys = finetune_keys | {"steps": 450, "warmup": 45, "eval_every": 450}
tuned = {"scratch, 900 crops": {"steps": 900, "warmup": 90, "eval_every": 900}}
pretrain_keys = {"save_every": 200}
