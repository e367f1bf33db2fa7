"""Demo of reconstruction: full-dose from low-dose synthetic PET (a 50th of the counts).

    python -m lab.phantom --demo --modality=pet
    python finetune.py configs/demo_reconstruction.py
    python evaluate.py configs/demo_reconstruction.py
"""
task = "reconstruction"
name = "demo_reconstruction"
dataset = "demo_pet"
image = "demo_pet/imagesTr/phantom_{id}_low.nii.gz"
target = "demo_pet/imagesTr/phantom_{id}_full.nii.gz"
residual = True
intensity = "scale"
window = (0.0, 10.0)            # SUV
foreground = 0.0
crop_foreground = False
data_range = 1.0                # 10 SUV
val_share = 0.2
test_share = 0.2
crop = (64, 64, 64)
feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4
workers = 2
jitter_shift = (0.0, 0.0)
jitter_scale = (0.0, 0.0)
crops_per_case = 2
batch = 4
steps = 150
warmup = 15
lr = 1e-3
eval_every = 75
save_every = 50
