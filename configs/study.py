"""The study: what each loss, and each choice that the paper leaves open, is worth on synthetic abdomens
(Tables 7 and 8).

    python -m lab.phantom --demo
    python -m lab.study configs/study.py

Every row and seed is an ordinary run of configs/demo.py with the keys below; started again it goes on where
it stopped. Hours and hours on two cores: --only="('random', 'Sinkhorn')" is of some of the rows. A row with
a method is in lab/rivals/variants.py; `file`: stage 2 starts from a decoder that learned as well.
"""
name = "study"
seeds = (0, 1, 2)
jobs = 2                        # processes at a time; one per GPU, or sharing the cores
workers = 0
pretrain_config = "configs/demo.py"
pretrain_keys = {"steps": 200, "warmup": 20, "save_every": 200}
rows = {
    "random": None,
    # Table 7
    "L_g": {"weights": (1, 0, 0)},
    "L_g + L_p2p": {"weights": (1, 1, 0)},
    "L_g + L_p2s": {"weights": (1, 0, 1)},
    "L_p2p + L_p2s": {"weights": (0, 1, 1)},
    "all three": {},
    # Eq. 4: matching and temperature
    "Sinkhorn": {"matching": "sinkhorn", "sinkhorn_iterations": 20},
    "temperature 1": {"temperature": 1.0},
    # Eq. 7: the weights of tokens; Eq. 8: its form
    "gradient through the Sharpe weights": {"structure_detach": False},
    "L_g + L_p2s, released form": {"weights": (1, 0, 1), "structure": "released"},
    # tokens
    "tokens of 16 voxels": {"token_patch": 16},
    "tokens of 32 voxels": {"token_patch": 32},
    "tokens of 8, 16 and 32 voxels": {"method": "maps"},
    "tokens of air, too": {"tokens": "inside"},
    # a decoder that learns
    "the decoder's map of 8 voxels, too": {"decoder": True, "file": "network.pt"},
    "the decoder's map of 4 voxels, too": {"method": "decoder_4", "file": "network.pt"},
    # moves
    "rotation in plane": {"rotation": (0, 0, 28.6)},
    "smaller moves": {"rotation": (10.0, 10.0, 10.0), "scale": (0.95, 1.05), "shift": (4.0, 4.0, 4.0)},
    # Eq. 1: what a crop is told from, and the projectors before it
    "a queue, as printed": {"negatives": "queue", "queue": 128},
    "the step and a short queue": {"negatives": "both", "queue": 50},
    "projector of 64, embedding of 16": {"hidden": 64, "embedding": 16},
    "projector of 1024, embedding of 256": {"hidden": 1024, "embedding": 256},
    # Eq. 9: the weights of the losses
    "token losses halved": {"weights": (1, 0.5, 0.5)},
    "token losses doubled": {"weights": (1, 2, 2)},
    # what stage 2 makes of an encoder that stays as it is, and of more crops than 150
    "random, frozen": {"steps": 1, "warmup": 0, "lr": 1e-9},
    "all three, frozen": {"of": "all three"},
    "random, 300 crops": None,
    "random, 450 crops": None,
    "all three, 450 crops": {"of": "all three"},
    "the decoder's map of 8 voxels, too, 450 crops": {"of": "the decoder's map of 8 voxels, too"},
    "random, frozen, 450 crops": {"of": "random, frozen"},
    "all three, frozen, 450 crops": {"of": "all three"},
}
shots = dict.fromkeys(rows, (2,)) | dict.fromkeys(("random", "L_g", "all three"), (1, 2, 4, 8))
shots |= {"random, 450 crops": (1, 2, 20), "all three, 450 crops": (1, 2)}
_crops = {row: int(row.split()[-2]) for row in rows if row.endswith(" crops")}
tuned = {row: {"steps": n, "warmup": n // 10, "eval_every": n} for row, n in _crops.items()}
tuned |= {row: tuned.get(row, {}) | {"freeze_encoder": True} for row in rows if "frozen" in row}
labelled = 20                   # training subjects of the fine-tuning config
finetune_config = "configs/demo_segmentation.py"
# 10 of the 32
finetune_keys = {"test": "unseen_100*", "exclude": ("unseen_101*", "unseen_102*", "unseen_103*"),
                 "eval_every": 150}
