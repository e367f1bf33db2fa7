"""The methods of lab/rivals beside S2DC: one encoder, the same scans, crops, seeds and encoder passes, and
for each the best of three learning rates, or of more while the best is at an end.

    python -m lab.phantom --demo
    python -m lab.phantom data/demo_ct/fresh --first=2000 --subjects=16
    python -m lab.study configs/study_rivals.py

The rates are judged on 16 of the demo's unseen phantoms, the table is of 16 fresh ones: on the demo's the
defaults of S2DC were found.
"""
name = "study_rivals"
seeds = (0, 1, 2)
jobs = 2
workers = 0
rows = {
    "random": None,
    "S2DC": {},
    "VoCo": {"method": "voco"},
    "Swin-UNETR": {"method": "swin_unetr"},
    "SwinMM": {"method": "swinmm", "checkpointing": True},      # four decoder passes: 14 GB without
    "PCRLv2": {"method": "pcrlv2"},
    "SimMIM": {"method": "simmim"},
    "VICRegL": {"method": "vicregl"},
    "SimCLR": {"method": "simclr"},
    "MoCo v2 (L_g)": {"weights": (1, 0, 0)},
    "MoCo v3": {"method": "mocov3"},
    "PCRLv1": {"method": "pcrlv1"},
    "GVSL": {"method": "gvsl"},
    "MAE3D": {"method": "mae3d"},
    "GL-MAE": {"method": "gl_mae"},
    "Models Genesis": {"method": "models_genesis"},
    "Jigsaw": {"method": "jigsaw"},
    "rotation": {"method": "rotation"},
    "Rubik's cube++": {"method": "rubiks_cube"},
    "PositionLabel": {"method": "position_label"},
}
rates = (1e-3, 3e-3, 1e-2)
widen = 3
rate_keys = {"image": "demo_ct/unseen/imagesTr/phantom_{id}.nii.gz",
             "label": "demo_ct/unseen/labelsTr/phantom_{id}.nii.gz", "exclude": ("100*", "101[0-5]")}
shots = dict.fromkeys(rows, (2,))
labelled = 20
pretrain_config = "configs/demo.py"
pretrain_keys = {"steps": 40, "warmup": 4, "batch": 8, "save_every": 40, "log_every": 5}
probe_keys = {"image": "demo_ct/fresh/imagesTr/phantom_{id}.nii.gz",
              "label": "demo_ct/fresh/labelsTr/phantom_{id}.nii.gz"}
finetune_config = "configs/demo_segmentation.py"
finetune_keys = {"test": "fresh_*", "exclude": ("unseen_*", "fresh_201*"), "eval_every": 150}
