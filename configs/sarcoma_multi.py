"""Soft-tissue sarcoma in T1, CT and PET as three channels: the tumour, of at most 24 training patients.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python finetune.py configs/sarcoma_multi.py
    python evaluate.py configs/sarcoma_multi.py

CT and PET are resampled onto the grid of T1; the scans are not registered, pairs.json says by how much T1 and
CT lie apart. Hold the Dice against T1's floors in floors.json, what the box of the scan alone gives away.
"""
from configs.sarcoma_ct import *

name = "sarcoma_multi"
dataset = "sarcoma_multi"
image = ("sarcoma/multi/{id}_t1.nii.gz", "sarcoma/multi/{id}_ct.nii.gz", "sarcoma/multi/{id}_pet.nii.gz")
label = "sarcoma/multi/{id}_label.nii.gz"   # of T1
in_channels = 3
intensity = "zscore"            # one rule for three units
zscore_over = "foreground"
foreground = -500.0             # HU: mean and std of CT are those of the body without air; T1, PET lie above
                                # it everywhere, so theirs are of the whole scan and nothing is cut away
