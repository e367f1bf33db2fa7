"""Pre-training on sarcoma scans, CT: the training patients of configs/sarcoma_ct.py without labels.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python pretrain.py configs/sarcoma_pretrain_ct.py

At most 24 scans; network and preprocessing are those of configs/sarcoma_ct.py, the rest is configs/demo.py.
"""
name = "sarcoma_pretrain_ct"
dataset = "sarcoma_ct"
image = "sarcoma/ct/imagesTr/{id}.nii.gz"
exclude = ("sts_001", "sts_004", "sts_008", "sts_012", "sts_018", "sts_024", "sts_026", "sts_031",
           "sts_034", "sts_036", "sts_042", "sts_044", "sts_048", "sts_050",      # test
           "sts_003", "sts_022", "sts_041")                            # val
window = (-175.0, 250.0)        # HU; soft tissue, as in configs/demo.py: sarcoma and muscle differ little
spacing = (2.0, 2.0, 3.27)      # mm; half the resolution in plane, z as stored: a crop of 128 x 128 x 209 mm
slab = (64, 64, 64)
crop = (64, 64, 64)             # one crop a slab
workers = 2

feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4
hidden = 256
embedding = 64
token_patch = 8                 # voxels, 8 x 8 x 8 tokens a slab
momentum = 0.99                 # the teacher of a short run has to follow faster
queue = 128

rotation = (28.6, 28.6, 28.6)   # degrees about x y z
scale = (0.85, 1.2)
shift = (8.0, 8.0, 8.0)         # voxels
twin_shift = (8.0, 8.0, 8.0)

steps = 400
warmup = 40
lr = 3e-3
batch = 2
log_every = 10
save_every = 50
