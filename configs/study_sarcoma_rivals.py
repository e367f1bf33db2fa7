"""S2DC beside the methods that the paper retrained, two that share its crops and tokens, and PositionLabel,
which leads on phantoms; sarcoma in PET: few-label Dice from 8 patients, the same recipe and budget for all.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python -m lab.study configs/study_sarcoma_rivals.py

Each at the rate that configs/study_rivals.py found on phantoms, in 40 steps of 8 (here: 300 of 4). In CT:
--name=study_sarcoma_rivals_ct --pretrain_config=configs/sarcoma_pretrain_ct.py
--finetune_config=configs/sarcoma_ct.py --labelled=12; in T1 the same with t1 and 22.
"""
name = "study_sarcoma_rivals"
seeds = (0, 1, 2)
jobs = 2
workers = 0
rows = {
    "scratch": None,
    "S2DC": {"lr": 3e-3},
    "VoCo": {"method": "voco", "lr": 1e-2},
    "Swin-UNETR": {"method": "swin_unetr", "lr": 3e-3},
    "SwinMM": {"method": "swinmm", "lr": 3e-3},
    "PCRLv2": {"method": "pcrlv2", "lr": 3e-3},
    "SimMIM": {"method": "simmim", "lr": 3e-3},
    "VICRegL": {"method": "vicregl", "lr": 3e-3},
    "PositionLabel": {"method": "position_label", "lr": 3e-3},
}
shots = dict.fromkeys(rows, (8,))
labelled = 24                   # patients that train
probes = False
grid = "original"
hd95 = True
pretrain_config = "configs/sarcoma_pretrain_pet.py"
finetune_config = "configs/sarcoma_pet.py"
