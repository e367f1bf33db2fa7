"""MSD Task06 Lung: CT, lung tumours.

    python finetune.py configs/msd_lung.py --init=runs/ct/encoder.pt --name=msd_lung
    python evaluate.py configs/msd_lung.py --name=msd_lung

Download: medicaldecathlon.com, Task06_Lung.tar unpacked below the data root: imagesTr/lung_001.nii.gz,
labelsTr/, 63 labelled scans.
"""
task = "segmentation"
name = "msd_lung"
dataset = "msd_lung"
image = "Task06_Lung/imagesTr/lung_{id}.nii.gz"
label = "Task06_Lung/labelsTr/lung_{id}.nii.gz"
labels = {1: "tumour"}
val = ("006", "010", "033", "034", "041", "042", "046", "048", "059", "065", "066", "070",
       "079")                   # Large-Scale-Medical, 50 / 13
test = "val"                    # the public splits have no third part
window = (-1000.0, 500.0)       # HU; Large-Scale-Medical
foreground = -500.0             # HU, the body; ours
spacing = (1.25, 1.25, 5.0)     # mm; Large-Scale-Medical
crop = (128, 128, 128)          # Large-Scale-Medical
positive = 0.5                  # 1 : 1; Large-Scale-Medical
crops_per_case = 4              # Large-Scale-Medical
batch = 4                       # 1 case a step
steps = 50_000                  # 1000 epochs x 50 cases; Large-Scale-Medical
warmup = 250                    # 5 epochs; Large-Scale-Medical
eval_every = 2500               # 50 epochs; ours
lr = 3e-4                       # Large-Scale-Medical
decay = 5e-3                    # Large-Scale-Medical
overlap = 0.75                  # Large-Scale-Medical
