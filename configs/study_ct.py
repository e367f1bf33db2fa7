"""The study in small on real CT: tumour against all else in the scan, air too, on patients that pre-training
has not seen.

    S2DC_DATA=$S2DC_REAL_DATA python -m lab.study configs/study_ct.py

Six scans without their labels: abdomen, chest, head, liver and two sarcomas of the limbs. The probe learns on
the two sarcomas and is tested on a third patient.
"""
name = "study_ct"
seeds = (0, 1, 2)
jobs = 2
pretrain_config = "configs/demo.py"
rows = {"random": None, "L_g": {"weights": (1, 0, 0)}, "all three": {}}
pretrain_keys = {
    "steps": 200, "warmup": 20, "save_every": 200,
    "dataset": "study_ct",
    "scans": ("ct/ts_abdomen_3mm.nii.gz", "ct/ts_aorta_1p5mm.nii.gz", "ct/ts_brain_atlas_1mm.nii.gz",
              "ct/crlm_1004_abdomen.nii.gz", "ct/sts_008_ct.nii.gz", "ct/sts_012_ct.nii.gz"),
    "window": (-175.0, 250.0),
    "spacing": (1.0, 1.0, 1.0),
}
probe_keys = {
    "scans": (), "image": "ct/{id}_ct.nii.gz", "label": "ct/labels/{id}_ct_gtv.nii.gz",
    "labels": {1: "tumour", 2: "rest"}, "remap": {0: 2},      # whatever is no tumour is the other class
    "probe_train": 0.67,        # the first of the labelled scans train the probe, the rest test it
}
