"""BraTS23: T2-weighted from T1-weighted MRI.

    python finetune.py configs/brats23_t1_to_t2.py --init=runs/mri/encoder.pt --name=t1_to_t2
    python evaluate.py configs/brats23_t1_to_t2.py --name=t1_to_t2
Any other pair of t1n, t1c, t2w, t2f by --image and --target.

Download: synapse.org syn51156910,
data/ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-00000-000/..-{t1n,t1c,t2w,t2f,seg}.nii.gz. The
loss is L1 + L2 over the brain (released code: 10 x the square, where the z-score is above -0.35). Split: not
published.
"""
task = "translation"
name = "brats23_t1_to_t2"
dataset = "brats23_t1_to_t2"
image = ("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-{subject}-{visit}/"
         "BraTS-GLI-{subject}-{visit}-t1n.nii.gz")
target = ("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-{subject}-{visit}/"
          "BraTS-GLI-{subject}-{visit}-t2w.nii.gz")
intensity = "zscore"
zscore_over = "volume"          # zeros included; released code
crop_foreground = False         # .. of the whole file, 240 x 240 x 155, on which scores are taken, too
foreground = 0.0
val_share = 0.1                 # of the subjects; ours
test_share = 0.2                # ours
crop = (96, 96, 96)             # ours
flip = (0.2, 0.2, 0.2)          # released code
jitter_shift = (0.0, 0.0)       # input and target are scaled alike
jitter_scale = (0.0, 0.0)
positive = 0.0
crops_per_case = 2
batch = 4
steps = 90_000                  # 300 epochs x about 1200 cases / 4; released code tests epoch 300
warmup = 500
eval_every = 4500
lr = 2e-4                       # released code
overlap = 0.5
