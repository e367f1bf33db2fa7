"""Pre-training on sarcoma scans, FDG PET: the training patients of configs/sarcoma_pet.py without labels.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python pretrain.py configs/sarcoma_pretrain_pet.py

At most 24 scans; network and preprocessing are those of configs/sarcoma_pet.py, the rest is configs/demo.py.
"""
from configs.demo import *
from configs.sarcoma_pet import foreground, intensity, spacing, window
from configs.sarcoma_pet import test as _test
from configs.sarcoma_pet import val as _val

name = "sarcoma_pretrain_pet"
dataset = "sarcoma_pet"
scans = ()                      # .. of the demo
image = "sarcoma/pet/imagesTr/{id}.nii.gz"
exclude = (*_test, *_val)       # nobody who is scored
keep = ()
slab = crop = (64, 64, 32)      # that of fine-tuning: of one of 64^3 a third would be padding
batch = 4
steps = 300
warmup = 30
