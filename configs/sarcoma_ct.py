"""Soft-tissue sarcoma in CT: the tumour, of at most 24 training patients; 3 choose, 14 are reported.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python finetune.py configs/sarcoma_ct.py --name=ct_tuned --init=runs/sarcoma_pretrain_ct/encoder.pt
    python finetune.py configs/sarcoma_ct.py --name=ct_scratch
    python evaluate.py configs/sarcoma_ct.py --name=ct_scratch

Hold the Dice against floors.json, what the box of the scan alone gives away: see lab/sarcoma.py.
"""
task = "segmentation"
name = "sarcoma_ct"
dataset = "sarcoma_ct"
image = "sarcoma/ct/imagesTr/{id}.nii.gz"
label = "sarcoma/ct/labelsTr/{id}.nii.gz"
labels = {1: "tumour"}
val = ("sts_003", "sts_022", "sts_041")
test = ("sts_001", "sts_004", "sts_008", "sts_012", "sts_018", "sts_024", "sts_026", "sts_031", "sts_034",
        "sts_036", "sts_042", "sts_044", "sts_048", "sts_050")
window = (-175.0, 250.0)        # HU; soft tissue, as in configs/demo.py: sarcoma and muscle differ little
spacing = (2.0, 2.0, 3.27)      # mm; half the resolution in plane, z as stored: a crop of 128 x 128 x 105 mm
crop = (64, 64, 32)
feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4
workers = 2
rotation = (10.0, 10.0, 10.0)   # degrees
flip = (0.5, 0.0, 0.0)          # a left leg is a mirrored right one
crops_per_case = 1
batch = 1
balance = 0.5                   # a tumour is a few per cent of the scan
steps = 200
warmup = 20
lr = 2e-2                       # a short run needs it
layer_decay = 0.4               # as in configs/demo_segmentation.py
eval_every = 100
save_every = 100
sheets = 2
