"""Soft-tissue sarcoma in T1: the tumour, of at most 24 training patients; 3 choose, 14 are reported.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python finetune.py configs/sarcoma_t1.py --name=t1_tuned --init=runs/sarcoma_pretrain_t1/encoder.pt
    python finetune.py configs/sarcoma_t1.py --name=t1_scratch
    python evaluate.py configs/sarcoma_t1.py --name=t1_scratch

Hold the Dice against floors.json, what the box of the scan alone gives away: see lab/sarcoma.py.
"""
from configs.sarcoma_ct import *

name = "sarcoma_t1"
dataset = "sarcoma_t1"
image = "sarcoma/t1/imagesTr/{id}.nii.gz"
label = "sarcoma/t1/labelsTr/{id}.nii.gz"
intensity = "scale"
window = (0.0, 1000.0)          # the source set fat near 1000 in every scan. A z-score would move with
                                # the share of air that the trimming leaves in a scan
foreground = 0.0                # the same unit; air is 0 to 60
