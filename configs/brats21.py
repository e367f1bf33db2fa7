"""BraTS21: glioma regions in four MRI contrasts; tumour core, whole tumour and enhancing tumour overlap.

    python finetune.py configs/brats21.py --init=runs/mri/encoder.pt --name=brats21
    python evaluate.py configs/brats21.py --name=brats21

Download: synapse.org syn25829067, unpacked to
data/BraTS2021/BraTS2021_00000/BraTS2021_00000_{flair,t1ce,t1,t2,seg}.nii.gz, 1251 cases. Enhancing tumour is
id 4 here and 3 in BraTS23; both are read as 3, and 3 in predictions; a file with both is refused. MONAI's
list brats21_folds.json, put into data, names its files below TrainingData: `ln -s BraTS2021
data/TrainingData`. Both commands take its folds with --datalist=brats21_folds.json --fold=0 --image="()"
--label= ; without that file a fifth of the subjects is drawn by split_seed.
"""
task = "segmentation"
name = "brats21"
dataset = "brats21"
in_channels = 4
# order of MONAI's fold file
image = ("BraTS2021/{subject}/{subject}_flair.nii.gz", "BraTS2021/{subject}/{subject}_t1ce.nii.gz",
         "BraTS2021/{subject}/{subject}_t1.nii.gz", "BraTS2021/{subject}/{subject}_t2.nii.gz")
label = "BraTS2021/{subject}/{subject}_seg.nii.gz"
labels = {1: "necrotic core", 2: "edema", 3: "enhancing"}
remap = {4: 3}                  # BraTS21's id of enhancing tumour
regions = {"TC": (1, 3), "WT": (1, 2, 3), "ET": (3,)}   # order of the public recipes
val_share = 0.2                 # ours; with the fold file: fold = 0 (MONAI, 1000 / 251)
test = "val"                    # as all public recipes do
intensity = "zscore"            # per channel over the brain; MONAI
zscore_over = "foreground"      # MONAI
foreground = 0.0                # skull-stripped
crop = (128, 128, 128)          # MONAI, Large-Scale-Medical; 1 mm, native
flip = (0.5, 0.5, 0.5)          # MONAI
jitter_shift = (1.0, 0.1)       # MONAI
jitter_scale = (1.0, 0.1)       # MONAI
rotation = (0.0, 0.0, 0.0)      # MONAI
scale = (1.0, 1.0)              # MONAI
positive = 0.5                  # Large-Scale-Medical (MONAI: anywhere)
crops_per_case = 1              # MONAI
batch = 1
steps = 300_000                 # 300 epochs x 1000 cases; MONAI
warmup = 50_000                 # 50 epochs; MONAI
eval_every = 25_000             # 25 epochs; ours
lr = 1e-4                       # MONAI
overlap = 0.5                   # MONAI
