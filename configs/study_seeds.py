"""Does pre-training help with two labels and 150 crops? Three rows of configs/study.py, whose runs it shares,
with ten seeds: enough for an interval over them.

    python -m lab.phantom --demo
    python -m lab.study configs/study_seeds.py
"""
from configs.study import *

table = "seeds"
seeds = tuple(range(10))
only = ("random", "all three", "the decoder's map of 8 voxels, too")
shots = dict.fromkeys(only, (2,))
tuned = {}
probes = False
