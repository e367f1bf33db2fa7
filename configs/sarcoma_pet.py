"""Soft-tissue sarcoma in FDG PET: the tumour, of at most 24 training patients; 3 choose, 14 are reported.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python finetune.py configs/sarcoma_pet.py --name=pet_tuned --init=runs/sarcoma_pretrain_pet/encoder.pt
    python finetune.py configs/sarcoma_pet.py --name=pet_scratch
    python evaluate.py configs/sarcoma_pet.py --name=pet_scratch

Hold the Dice against floors.json, what the box of the scan alone gives away: see lab/sarcoma.py.
"""
from configs.sarcoma_ct import *

name = "sarcoma_pet"
dataset = "sarcoma_pet"
image = "sarcoma/pet/imagesTr/{id}.nii.gz"
label = "sarcoma/pet/labelsTr/{id}.nii.gz"
intensity = "scale"
window = (0.0, 5.0)             # SUV: tumours have a median of 0.6 to 8.4, their maxima reach 29 and are not
                                # clipped. A z-score per scan would lose the unit that patients share
foreground = 0.0                # SUV
spacing = (3.27, 3.27, 3.27)    # mm; z as stored, in plane 3.9 to 5.5 there: a crop holds most scans
