"""Does pre-training help with two labels? Two rows of configs/study_longer.py, whose runs it shares, with ten
seeds: enough for an interval over them. Its table takes the place of the other's, which is remade in no time.

    python -m lab.phantom --demo
    python -m lab.study configs/study_seeds.py
"""
from configs.study_longer import *

seeds = tuple(range(10))
rows = {"scratch": None, "400 steps": {}}
shots = dict.fromkeys(rows, (2,))
tuned = {}
probes = False
