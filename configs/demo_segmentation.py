r"""Demo of segmentation: 11 .. 13 organs of synthetic abdomens from two labelled ones, after configs/demo.py.

    python finetune.py configs/demo_segmentation.py --init=runs/demo/encoder.pt --name=demo_pretrained
    python finetune.py configs/demo_segmentation.py --name=demo_scratch
    python evaluate.py configs/demo_segmentation.py \
        --checkpoint="('runs/demo_scratch/best.pt', 'runs/demo_pretrained/best.pt')"
"""
task = "segmentation"
name = "demo_segmentation"
dataset = "demo_ct"
image = "demo_ct/{set}/imagesTr/phantom_{id}.nii.gz"
label = "demo_ct/{set}/labelsTr/phantom_{id}.nii.gz"
labels = {1: "spleen", 2: "R kidney", 3: "L kidney", 4: "gallbladder", 5: "esophagus", 6: "liver",
          7: "stomach", 8: "aorta", 9: "IVC", 10: "portal+splenic v.", 11: "pancreas", 12: "R adrenal",
          13: "L adrenal"}
val = "train_02*"               # four of the 24
test = "unseen_*"               # 32 subjects that pre-training has not seen either
label_fraction = 0.1            # 2 of the other 20
window = (-175.0, 250.0)        # HU, as in configs/demo.py
crop = (64, 64, 64)
feature_size = 12
num_heads = (1, 2, 4, 8)
window_size = 4
workers = 2
rotation = (10.0, 10.0, 10.0)   # degrees
flip = (0.0, 0.0, 0.0)          # left and right kidney have different names
crops_per_case = 1
batch = 1
balance = 0.5                   # small organs weigh more: without it most stay empty in so short a run
steps = 150
warmup = 15
lr = 2e-2                       # a short run needs it
# each encoder stage away from the decoder learns at 0.4 of the rate: what it brings along is kept
layer_decay = 0.4
eval_every = 75
save_every = 50
hd95 = False
sheets = 2
