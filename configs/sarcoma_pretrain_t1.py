"""Pre-training on sarcoma scans, T1: the training patients of configs/sarcoma_t1.py without labels.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python pretrain.py configs/sarcoma_pretrain_t1.py

At most 24 scans; network and preprocessing are those of configs/sarcoma_t1.py, the rest is configs/demo.py.
"""
from configs.demo import *
from configs.sarcoma_t1 import foreground, intensity, spacing, window
from configs.sarcoma_t1 import test as _test
from configs.sarcoma_t1 import val as _val

name = "sarcoma_pretrain_t1"
dataset = "sarcoma_t1"
scans = ()                      # .. of the demo
image = "sarcoma/t1/imagesTr/{id}.nii.gz"
exclude = (*_test, *_val)       # nobody who is scored
keep = ()
slab = crop = (64, 64, 32)      # that of fine-tuning: of one of 64^3 a third would be padding
batch = 4
steps = 300
warmup = 30
