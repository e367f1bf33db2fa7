"""CT from T1 MRI of sarcoma patients: a demonstration; 6 patients train, 1 chooses, 4 are reported.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python finetune.py configs/sarcoma_t1_ct.py
    python evaluate.py configs/sarcoma_t1_ct.py

The scans are not registered: of 29 patients with both these 11 lie within a voxel of each other (pairs.json
says by how much, and why the others do not). MAE is in HU.
"""
from configs.sarcoma_ct import *

task = "translation"
name = "sarcoma_t1_ct"
dataset = "sarcoma_t1_ct"
image = "sarcoma/t1_ct/{id}_t1.nii.gz"
target = "sarcoma/t1_ct/{id}_ct.nii.gz"
label, labels, balance = "", {}, 0.0
val = ("sts_015",)
test = ("sts_024", "sts_026", "sts_042", "sts_048")
intensity = "window"            # one for both: HU from fat to all but dense bone; T1 has fat near 1000
window = (-250.0, 1250.0)       # what CT has at its lower end is air, and no tissue
crop = (64, 32, 32)             # smaller than the scans: else all crops show air, and not every scan does
rotation = (20.0, 20.0, 20.0)   # degrees
scale = (0.8, 1.25)
jitter_scale = (0.5, 0.2)       # of T1 alone: what it says of HU differs from patient to patient
positive = 0.0
batch = 4
steps = 500
warmup = 50
lr = 3e-3
layer_decay = 1.0
eval_every = 100
