"""MSD Task09 Spleen: CT, one organ.

    python finetune.py configs/msd_spleen.py --init=runs/ct/encoder.pt --name=msd_spleen
    python evaluate.py configs/msd_spleen.py --name=msd_spleen

Download: medicaldecathlon.com, Task09_Spleen.tar unpacked below the data root: imagesTr/spleen_2.nii.gz,
labelsTr/, 41 labelled scans.
"""
task = "segmentation"
name = "msd_spleen"
dataset = "msd_spleen"
image = "Task09_Spleen/imagesTr/spleen_{id}.nii.gz"
label = "Task09_Spleen/labelsTr/spleen_{id}.nii.gz"
labels = {1: "spleen"}
val = ("10", "13", "14", "17", "31", "33", "44", "47", "56")  # VoCo's successor (Large-Scale-Medical), 32 / 9
test = "val"                    # the public splits have no third part
window = (-175.0, 250.0)        # HU; Large-Scale-Medical
foreground = -175.0             # HU; ours
spacing = (1.5, 1.5, 1.5)       # mm; Large-Scale-Medical
crop = (96, 96, 96)             # Large-Scale-Medical
positive = 0.75                 # 3 : 1; Large-Scale-Medical
crops_per_case = 4              # Large-Scale-Medical
batch = 4                       # 1 case a step
steps = 16_000                  # 500 epochs x 32 cases; Large-Scale-Medical
warmup = 160                    # 5 epochs; Large-Scale-Medical
eval_every = 800                # 25 epochs; ours
lr = 3e-4                       # Large-Scale-Medical
overlap = 0.75                  # Large-Scale-Medical
