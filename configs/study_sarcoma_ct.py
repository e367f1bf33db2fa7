"""Sarcoma in CT: from scratch against pre-training, few labels and all, the same recipe and budget.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python -m lab.study configs/study_sarcoma_ct.py

The rows "all modalities" start from the encoders of configs/study_sarcoma_all.py. Crops and
weights follow from the seed, alike for all rows; the patients of a share of labels are those of all seeds.
"""
from configs.study_sarcoma_t1 import *

name = "study_sarcoma_ct"
shots = {"scratch": (4, 8, 12), "all three": (4, 8, 12), "L_g": (8,), "all modalities, same steps": (8,),
         "all modalities, same total": (8,)}
labelled = 12
pretrain_config = "configs/sarcoma_pretrain_ct.py"
finetune_config = "configs/sarcoma_ct.py"
