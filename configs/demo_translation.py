"""Demo of translation: T2 from T1 of synthetic MRI.

    python -m lab.phantom --demo --modality=mri
    python finetune.py configs/demo_translation.py
    python evaluate.py configs/demo_translation.py
"""
task = "translation"
name = "demo_translation"
dataset = "demo_mri"
image = "demo_mri/imagesTr/phantom_{id}_t1.nii.gz"
target = "demo_mri/imagesTr/phantom_{id}_t2.nii.gz"
intensity = "zscore"
zscore_over = "volume"
foreground = 0.0
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
