"""What configs/study.py finds to help on phantoms, on real scans: sarcoma in PET, 8 labelled patients.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python -m lab.study configs/study_sarcoma_maps.py

In CT: --name=study_sarcoma_maps_ct --pretrain_config=configs/sarcoma_pretrain_ct.py
--finetune_config=configs/sarcoma_ct.py --labelled=12; in T1 the same with t1 and 22.
"""
from configs.study_sarcoma_rivals import *

name = "study_sarcoma_maps"
rows = {
    "scratch": None,
    "tokens of 8 voxels": {},
    "the decoder's map of 8 voxels, too": {"decoder": True, "file": "network.pt"},
    "tokens of 16 voxels": {"token_patch": 16},
    "tokens of 8, 16 and 32 voxels": {"method": "maps"},
}
shots = dict.fromkeys(rows, (8,))
