"""The study in small on real PET: tumour against all else in the scan, air too, on patients that pre-training
has not seen.

    S2DC_DATA=$S2DC_REAL_DATA python -m lab.study configs/study_pet.py

Six scans without their labels: two brain templates, a whole body and three sarcomas of the limbs. The probe
learns on these four patients and is tested on three others.
"""
name = "study_pet"
seeds = (0, 1, 2)
jobs = 2
pretrain_config = "configs/demo.py"
rows = {"random": None, "L_g": {"weights": (1, 0, 0)}, "all three": {}}
pretrain_keys = {
    "steps": 200, "warmup": 20, "save_every": 200,
    "dataset": "study_pet",
    "scans": ("pet/spm_pet_template.nii.gz", "pet/spm_spect_template.nii.gz",
              "pet/sts_001_wholebody_fdg.nii.gz",
              "pet/sts_002_pet.nii.gz", "pet/sts_008_pet.nii.gz", "pet/sts_012_pet.nii.gz"),
    "intensity": "zscore", "zscore_over": "volume", "foreground": 0.0,
    "spacing": (2.5, 2.5, 2.5),
}
probe_keys = {
    "scans": (), "image": "pet/sts_{id}.nii.gz", "label": "pet/labels/sts_{id}_gtv.nii.gz",
    "labels": {1: "tumour", 2: "rest"}, "remap": {0: 2},      # whatever is no tumour is the other class
    "probe_train": 0.57,        # the first of the labelled scans train the probe, the rest test it
}
