"""Demo of classification: the subject class (0, 1, 2) of synthetic abdomens.

    python -m lab.phantom --demo
    python finetune.py configs/demo_classification.py --init=runs/demo/encoder.pt
    python evaluate.py configs/demo_classification.py

It shows that the stage runs, and stays at chance: classes differ in the size of a spleen or of the kidneys,
and even a logistic regression on their true volumes is right in only 0.75 of 56 phantoms, each left out once.
"""
task = "classification"
name = "demo_classification"
dataset = "demo_ct"
image = "demo_ct/train/imagesTr/phantom_{id}.nii.gz"
table = "demo_ct/train/participants.csv"
table_key = "{id}"
case_key = "phantom_{id}"
class_from = "{class}"
classes = {"0": 0, "1": 1, "2": 2}
val_share = 0.25
test_share = 0.25
window = (-175.0, 250.0)        # HU, as in configs/demo.py
resize = (64, 64, 64)
crop = (64, 64, 64)
feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4
workers = 2
flip = (0.0, 0.0, 0.0)
crops_per_case = 1
batch = 4
steps = 100
warmup = 10
lr = 3e-4
eval_every = 50
save_every = 50
