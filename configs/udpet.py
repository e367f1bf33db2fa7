"""UDPET: full-dose PET from a low-dose one (dose reduction factor 50).

    python finetune.py configs/udpet.py --init=runs/pet/encoder.pt --name=udpet
    python evaluate.py configs/udpet.py --name=udpet
another factor: --image="UDPET/{subject}/drf_20.nii.gz"

Download: udpet-challenge.github.io (data transfer agreement), NIfTI form in Bq/ml:
data/UDPET/<patient>/{drf_50,full}.nii.gz. DICOM series work as folders:
    --image="UDPET/{group}/{subject}/1-50 dose/" --target="UDPET/{group}/{subject}/Full_dose/"
Files in SUV need another `window`. The loss is 0.95 L1 + 0.05 (1 - SSIM), which a public UDPET solution found
best: L1 follows the median and does not blur hot spots as the square does. The network adds a correction to
its input. What the paper did is not published.
"""
task = "reconstruction"
name = "udpet"
dataset = "udpet"
image = "UDPET/{subject}/drf_50.nii.gz"
target = "UDPET/{subject}/full.nii.gz"
residual = True                 # ours
intensity = "scale"             # not clipped: the bladder lies far above
window = (0.0, 14973.0)         # Bq/ml, 99.9th percentile of full-dose Quadra scans; public (uEXPLORER 14297)
foreground = 0.0
crop_foreground = False
# of PSNR and SSIM: the 99.9th percentile (0: each target's maximum, higher scores)
data_range = 1.0
val_share = 0.1                 # of the subjects; ours
test_share = 0.2                # ours
crop = (96, 96, 96)             # ours
flip = (0.5, 0.0, 0.0)          # ours
jitter_shift = (0.0, 0.0)       # the scale of input and target belong together
jitter_scale = (0.0, 0.0)
crops_per_case = 2
batch = 4
steps = 50_000                  # ours
warmup = 500
eval_every = 2500
lr = 1e-4
overlap = 0.5
