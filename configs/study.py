"""The study: what each loss, and each choice that the paper leaves open, is worth on synthetic abdomens (Tables 7 and 8).

    python phantom.py --demo
    python evaluate.py configs/study.py --study

Every row and seed is an ordinary run of configs/demo.py with the keys below; started again it goes on where it stopped.
"""
name = "study"
seeds = (0, 1, 2)
jobs = 2                        # processes at a time; one per GPU, or sharing the cores
rows = {
    "random": None,
    # Table 7
    "L_g": {"weights": (1, 0, 0)},
    "L_g + L_p2p": {"weights": (1, 1, 0)},
    "L_g + L_p2s": {"weights": (1, 0, 1)},
    "all three": {},
    # Eq. 8: the forms
    "Eq. 8 printed": {"structure": "printed"},
    "Eq. 8 mean": {"structure": "mean"},
    "Eq. 8 released": {"structure": "released"},
    "Eq. 8 sum, gradient through weights": {"structure_detach": False},
    # Eq. 4: matching and temperature
    "Sinkhorn": {"matching": "sinkhorn", "sinkhorn_iterations": 20},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.05": {"temperature": 0.05},
    # tokens and moves
    "tokens of 16 voxels": {"token_patch": 16},
    "rotation in plane": {"rotation": (0, 0, 28.6)},
}
shot_rows = ("random", "L_g", "all three")
shots = (1, 2, 4, 8)
labelled = 20                   # training subjects of the fine-tuning config
pretrain_config = "configs/demo.py"
finetune_config = "configs/demo_segmentation.py"
