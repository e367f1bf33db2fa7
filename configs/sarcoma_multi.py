"""Soft-tissue sarcoma in T1, CT and PET as three channels: the tumour, of at most 24 training patients.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python finetune.py configs/sarcoma_multi.py
    python evaluate.py configs/sarcoma_multi.py

CT and PET are resampled onto the grid of T1; the scans are not registered, pairs.json says by how much T1 and
CT lie apart. Hold the Dice against T1's floors in floors.json, what the box of the scan alone gives away.
"""
task = "segmentation"
name = "sarcoma_multi"
dataset = "sarcoma_multi"
image = ("sarcoma/multi/{id}_t1.nii.gz", "sarcoma/multi/{id}_ct.nii.gz", "sarcoma/multi/{id}_pet.nii.gz")
label = "sarcoma/multi/{id}_label.nii.gz"   # of T1
labels = {1: "tumour"}
val = ("sts_003", "sts_022", "sts_041")
test = ("sts_001", "sts_004", "sts_008", "sts_012", "sts_018", "sts_024", "sts_026", "sts_031", "sts_034",
        "sts_036", "sts_042", "sts_044", "sts_048", "sts_050")
in_channels = 3
intensity = "zscore"            # one rule for three units
zscore_over = "foreground"
foreground = -500.0             # HU: mean and std of CT are those of the body without air; T1, PET lie above
                                # it everywhere, so theirs are of the whole scan and nothing is cut away
spacing = (2.0, 2.0, 3.27)      # mm; T1's grid, half its resolution in plane: a crop of 128 x 128 x 209 mm
crop = (64, 64, 64)
feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4
workers = 2
rotation = (10.0, 10.0, 10.0)   # degrees
flip = (0.5, 0.0, 0.0)          # a left leg is a mirrored right one
crops_per_case = 1
batch = 1
balance = 0.5                   # a tumour is a few per cent of the scan
steps = 300
warmup = 30
lr = 2e-2                       # a short run needs it
layer_decay = 0.4               # as in configs/demo_segmentation.py
eval_every = 100
save_every = 100
sheets = 2
