"""The study in small on real MRI: tumour against all else in the scan, air too, on patients that pre-training
has not seen.

    S2DC_DATA=$S2DC_REAL_DATA python -m lab.study configs/study_mri.py

Fifteen scans without their labels: heads, spines, a thigh and four sarcomas of the limbs. The probe learns on
two of them and is tested on two other patients.
"""
name = "study_mri"
seeds = (0, 1, 2)
jobs = 2
pretrain_config = "configs/demo.py"
rows = {"random": None, "L_g": {"weights": (1, 0, 0)}, "all three": {}}
pretrain_keys = {
    "steps": 200, "warmup": 20, "save_every": 200,
    "dataset": "study_mri",
    "scans": ("mri/avg152_t1.nii.gz", "mri/avg152_t2.nii.gz", "mri/avg152_pd.nii.gz",
              "mri/single_subject_t1.nii.gz",
              "mri/stroke_t1.nii.gz", "mri/stroke_t2.nii.gz", "mri/stroke_flair.nii.gz",
              "mri/sts_001_thigh_t1.nii.gz", "mri/sts_001_thigh_t2fs.nii.gz", "mri/spine_t1.nii.gz",
              "mri/spine_t2.nii.gz", "mri/sts_002_t1.nii.gz", "mri/sts_004_t1.nii.gz",
              "mri/sts_008_t1.nii.gz",
              "mri/sts_019_t1.nii.gz"),
    "intensity": "zscore", "zscore_over": "foreground", "foreground": 0.0,
    "spacing": (1.0, 1.0, 1.0),
}
probe_keys = {
    "scans": (), "image": (), "label": "", "datalist": "mri_gtv_seg.json",
    "labels": {1: "tumour", 2: "rest"}, "remap": {0: 2},      # whatever is no tumour is the other class
    "probe_train": 0.5,        # the first of the labelled scans train the probe, the rest test it
}
