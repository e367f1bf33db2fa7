"""ADNI: Alzheimer's disease, mild cognitive impairment and normal cognition in brain PET.

    python finetune.py configs/adni.py --init=runs/pet/encoder.pt --name=adni
    python evaluate.py configs/adni.py --name=adni

Download: adni.loni.usc.edu, one collection as NIfTI with its csv:
data/ADNI/<subject>/<description>/<date>/<I123456>/<file>.nii and data/ADNI/ADNI.csv (columns Image Data ID,
Subject, Group). Tracer, counts and split of the paper are not published; all values are ours or as said. The
paper's accuracies lie near 56 % for every method: the majority class is printed beside the score.
"""
task = "classification"
name = "adni"
dataset = "adni_cls"
image = "ADNI/{subject}/{description}/{date}/{scan}/*.nii"
table = "ADNI/ADNI.csv"
table_key = "{Image Data ID}"
case_key = "{scan}"
class_from = "{Group}"
classes = {"CN": 0, "SMC": 0, "MCI": 1, "EMCI": 1, "LMCI": 1, "AD": 2}  # merged groups; ours
val_share = 0.1                 # of the subjects, stratified; ours
test_share = 0.2                # ours
intensity = "zscore"
zscore_over = "volume"          # as in pre-training
foreground = 0.0
resize = (128, 128, 96)         # voxels; standardised images are commonly 160 x 160 x 96, mostly air; ours
crop = (128, 128, 96)
rotation = (10.0, 10.0, 10.0)   # degrees; ours
flip = (0.5, 0.0, 0.0)          # left-right; ours
crops_per_case = 1
batch = 4
steps = 20_000
warmup = 1000
eval_every = 1000
lr = 1e-4
decay = 1e-2
