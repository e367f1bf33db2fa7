"""Sarcoma in T1: from scratch against pre-training, few labels and all, the same recipe and budget.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python -m lab.study configs/study_sarcoma_t1.py

The rows "all modalities" start from the encoders of configs/study_sarcoma_all.py. Crops and
weights follow from the seed, alike for all rows; the patients of a share of labels are those of all seeds.
"""
name = "study_sarcoma_t1"
seeds = (0, 1, 2, 3, 4)
jobs = 2
workers = 0
rows = {
    "scratch": None,
    "all three": {},
    "L_g": {"weights": (1, 0, 0)},
    "all modalities, same steps": {"init": "runs/study_sarcoma_all/same steps-{seed}/encoder.pt"},
    "all modalities, same total": {"init": "runs/study_sarcoma_all/same total-{seed}/encoder.pt"},
}
shots = {"scratch": (4, 8, 22), "all three": (4, 8, 22), "L_g": (8,), "all modalities, same steps": (8,),
         "all modalities, same total": (8,)}
labelled = 22                   # patients that train
probes = False
grid = "original"
hd95 = True
pretrain_config = "configs/sarcoma_pretrain_t1.py"
finetune_config = "configs/sarcoma_t1.py"
