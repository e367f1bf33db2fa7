"""Which maps the token losses should see, and what else might become a default: probes and few-label Dice on
phantoms.

    python -m lab.phantom --demo
    python -m lab.study configs/study_maps.py

A row with a method is in lab/rivals/variants.py; `file`: stage 2 starts from a decoder that learned as well.
Row by row where time is short: --rows, --shots and --tuned of some, the tables then hold these.
"""
name = "study_maps"
seeds = (0, 1, 2)
jobs = 2
workers = 0
rows = {
    "random": None,
    "tokens of 8 voxels": {},
    "tokens of 16 voxels": {"token_patch": 16},
    "tokens of 32 voxels": {"token_patch": 32},
    "tokens of 8, 16 and 32 voxels": {"method": "maps"},
    "the decoder's map of 8 voxels, too": {"decoder": True, "file": "network.pt"},
    "the decoder's map of 4 voxels, too": {"method": "decoder_4", "file": "network.pt"},
    "L_g + L_p2s, released form": {"weights": (1, 0, 1), "structure": "released"},
    "tokens inside the scan, air too": {"tokens": "inside"},
    "a queue, as printed": {"negatives": "queue", "queue": 128},
    # what the decoder makes of an encoder that stays as it is
    "random, frozen": {"steps": 1, "warmup": 0, "lr": 1e-9},
    "tokens of 8 voxels, frozen": {"init": "runs/study_maps/tokens of 8 voxels-{seed}/encoder.pt"},
    # .. and three times as many crops of the two labelled scans
    "random, 450 crops": None,
    "tokens of 8 voxels, 450 crops": {"init": "runs/study_maps/tokens of 8 voxels-{seed}/encoder.pt"},
    "the decoder's map of 8 voxels, too, 450 crops": {
        "init": "runs/study_maps/the decoder's map of 8 voxels, too-{seed}/network.pt"},
    "random, frozen, 450 crops": {"init": "runs/study_maps/random, frozen-{seed}/encoder.pt"},
    "tokens of 8 voxels, frozen, 450 crops": {
        "init": "runs/study_maps/tokens of 8 voxels-{seed}/encoder.pt"},
}
shots = dict.fromkeys(rows, (2,))
_longer, _frozen = {"steps": 450, "warmup": 45, "eval_every": 450}, {"freeze_encoder": True}
tuned = {row: (_longer if "450 crops" in row else {}) | (_frozen if "frozen" in row else {}) for row in rows}
labelled = 20
pretrain_config = "configs/demo.py"
pretrain_keys = {"steps": 200, "warmup": 20, "save_every": 200}
finetune_config = "configs/demo_segmentation.py"
finetune_keys = {"test": "unseen_100*", "exclude": ("unseen_101*", "unseen_102*", "unseen_103*"),
                 "eval_every": 150}
