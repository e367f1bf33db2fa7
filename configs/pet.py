"""PET: UDPET (whole-body FDG) + ADNI (brain), 3519 scans in the paper.

    torchrun --nproc_per_node=8 pretrain.py configs/pet.py --batch=8

Download, each under its own agreement:
    UDPET   udpet-challenge.github.io   DICOM series, or NIfTI in newer releases
            data/UDPET/<scanner folder>/<patient>/<dose folder>/*.dcm
            dose folder: Full_dose, or one that ends in normal / NORMAL
    ADNI    adni.loni.usc.edu           data/ADNI/<subject 002_S_0295>/<description>/<date>/<I123456>/*.nii
How many scans of each, which tracers and which doses make 3519 is not published; the full dose alone is taken
here (ours). Patients whom udpet.py and adni.py test are among them, as presumably in the paper; finetune.py
counts them, and --exclude=.. leaves them out. DICOM needs SimpleITK. A pattern of a set you do not have is an
error: give --scans="('ADNI/{subject}/*/*/I*/*.nii',)".
"""
name = "pet"
dataset = "pet"
scans = (
    "UDPET/*/{subject}/Full_dose/",     # Biograph Vision Quadra
    "UDPET/*/{subject}/*[nN][oO][rR][mM][aA][lL]/",     # uEXPLORER
    "ADNI/{subject}/*/*/I*/*.nii",      # visits of one person: L_g does not tell them apart
)
intensity = "zscore"
zscore_over = "volume"          # released code
foreground = 0.0                # Bq/ml
crop_foreground = True          # ours: air around the patient is most of a PET field of view
slab = (384, 384, 96)           # padded with the least value where a scan is smaller; released code: with 0
token_patch = 32                # voxels; released code (on phantoms 8 is better)
steps = 100_000                 # paper
keep = (1000, 10_000)           # for the picture of how features evolve (the paper's Fig. 7); ours
warmup = 500                    # released code
lr = 3e-4                       # released code
