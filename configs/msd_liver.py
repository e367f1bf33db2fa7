"""MSD Task03 Liver: CT, liver and its tumours.

    python finetune.py configs/msd_liver.py --init=runs/ct/encoder.pt --name=msd_liver
    python evaluate.py configs/msd_liver.py --name=msd_liver

Download: medicaldecathlon.com, Task03_Liver.tar unpacked below the data root: imagesTr/liver_0.nii.gz,
labelsTr/, 131 labelled scans. FLARE23, part of configs/ct.py, gathers older public sets: its images may be
among these, say so beside a score.
"""
task = "segmentation"
name = "msd_liver"
dataset = "msd_liver"
image = "Task03_Liver/imagesTr/liver_{id}.nii.gz"
label = "Task03_Liver/labelsTr/liver_{id}.nii.gz"
labels = {1: "liver", 2: "tumour"}
val = ("126", "100", "49", "57", "92", "85", "123", "74", "2", "99", "103", "81", "48", "65", "116", "67",
       "16", "14", "51", "17", "70", "101", "3")            # Large-Scale-Medical, 108 / 23
test = "val"                    # the public splits have no third part
window = (-175.0, 250.0)        # HU; Large-Scale-Medical
foreground = -175.0             # HU; ours
spacing = (1.5, 1.5, 1.5)       # mm; Large-Scale-Medical
crop = (96, 96, 96)             # Large-Scale-Medical
positive = 0.5                  # 1 : 1; Large-Scale-Medical
crops_per_case = 2              # Large-Scale-Medical
batch = 2                       # 1 case a step
steps = 54_000                  # 500 epochs x 108 cases; Large-Scale-Medical
warmup = 540                    # 5 epochs; Large-Scale-Medical
eval_every = 2700               # 25 epochs; ours
lr = 3e-4                       # Large-Scale-Medical
overlap = 0.75                  # Large-Scale-Medical
