"""Demo: a tiny network learns from 24 synthetic abdomens in minutes on two CPU cores.

    python -m lab.phantom --demo
    python pretrain.py configs/demo.py
    python -m lab.probe configs/demo.py         on the scans of configs/demo_probe.py
"""
name = "demo"
dataset = "demo_ct"
scans = "demo_ct/train/imagesTr/*.nii.gz"
# HU; soft tissue, as VoCo pre-trains: between air and bone the organs differ by a few per cent
window = (-175.0, 250.0)
slab = (64, 64, 64)             # voxels of 3 mm
crop = (64, 64, 64)             # one crop a slab
workers = 2

feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4                 # tokens; 7 costs ten times as much attention on a CPU
hidden = 256
embedding = 64
token_patch = 8                 # voxels, 8 x 8 x 8 tokens a slab
momentum = 0.99                 # the teacher of a short run has to follow faster
negatives = "step"

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
keep = (10, 50)                 # for the picture of how features evolve
