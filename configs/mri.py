"""MRI: OASIS3, head scans of several contrasts (6605 in the paper).

    torchrun --nproc_per_node=8 pretrain.py configs/mri.py --batch=8

Download from sites.wustl.edu/oasisbrains (data use agreement), as its scripts lay it out:
    data/OASIS3/OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz
(some files spell sess-d0129).
Which sequences make 6605 scans is not published; T1w, T2w and FLAIR are taken here (ours).
"""
name = "mri"
dataset = "oasis3"
scans = (
    "OASIS3/{subject}_MR_d*/anat*/*_T1w.nii.gz",    # {subject}: L_g tells nobody from himself
    "OASIS3/{subject}_MR_d*/anat*/*_T2w.nii.gz",
    "OASIS3/{subject}_MR_d*/anat*/*_FLAIR.nii.gz",
)
intensity = "zscore"
zscore_over = "volume"          # zeros included; released code
foreground = 0.0                # crop to the voxels above it; released code
# 2 x 2 x 1 crops; ours: a head is smaller than 384 voxels (released code enlarges it to 384 x 384 x 96)
slab = (192, 192, 96)
token_patch = 32                # voxels; released code (on phantoms 8 is better)
rotation = (20.0, 20.0, 30.0)   # degrees about x y z; z: released code, x y: ours, a head turns freely
steps = 100_000                 # paper
keep = (1000, 10_000)           # for the picture of how features evolve (the paper's Fig. 7); ours
warmup = 500                    # released code
lr = 3e-4                       # released code
