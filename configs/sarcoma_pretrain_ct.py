"""Pre-training on sarcoma scans, CT: the training patients of configs/sarcoma_ct.py without labels.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python pretrain.py configs/sarcoma_pretrain_ct.py

At most 24 scans; network and preprocessing are those of configs/sarcoma_ct.py, the rest is configs/demo.py.
"""
from configs.demo import *
from configs.sarcoma_ct import spacing, window
from configs.sarcoma_ct import test as _test
from configs.sarcoma_ct import val as _val

name = "sarcoma_pretrain_ct"
dataset = "sarcoma_ct"
scans = ()                      # .. of the demo
image = "sarcoma/ct/imagesTr/{id}.nii.gz"
exclude = (*_test, *_val)       # nobody who is scored
keep = ()
slab = crop = (64, 64, 32)      # that of fine-tuning: of one of 64^3 a third would be padding
batch = 4
steps = 300
warmup = 30
