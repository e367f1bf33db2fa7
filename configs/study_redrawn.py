"""Is the gain with two labels that of two phantoms? The rows of configs/study_seeds.py, whose encoders it
starts from, with other labelled phantoms for every seed.

    python -m lab.phantom --demo
    python -m lab.study configs/study_seeds.py --only="('random', 'all three')"     first: the encoders
    python -m lab.study configs/study_redrawn.py
"""
from configs.study_seeds import *

name = table = "study_redrawn"
only = ()
redraw = True
rows = {"random": None, "all three": {"init": "runs/study/all three-{seed}/encoder.pt"}}
shots = dict.fromkeys(rows, (2,))
