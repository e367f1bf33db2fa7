"""Sarcoma in FDG PET: from scratch against pre-training, few labels and all, the same recipe and budget.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python -m lab.study configs/study_sarcoma_pet.py

The rows "all modalities" start from the encoders of configs/study_sarcoma_all.py. Crops and
weights follow from the seed, alike for all rows; the patients of a share of labels are those of all seeds.
"""
from configs.study_sarcoma_t1 import *

name = "study_sarcoma_pet"
shots = {"scratch": (4, 8, 24), "all three": (4, 8, 24), "L_g": (8,), "all modalities, same steps": (8,),
         "all modalities, same total": (8,)}
labelled = 24
pretrain_config = "configs/sarcoma_pretrain_pet.py"
finetune_config = "configs/sarcoma_pet.py"
