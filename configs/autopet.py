"""AutoPET: lesions in whole-body FDG PET/CT; half of the studies have none.

    python finetune.py configs/autopet.py --init=runs/pet/encoder.pt --name=autopet
    python evaluate.py configs/autopet.py --name=autopet
with the CT resampled to the PET grid as second channel:
    --in_channels=2
    --image="('FDG-PET-CT-Lesions/{subject}/{study}/SUV.nii.gz',
              'FDG-PET-CT-Lesions/{subject}/{study}/CTres.nii.gz')"

Download: TCIA FDG-PET-CT-Lesions, NIfTI form:
data/FDG-PET-CT-Lesions/PETCT_<hash>/<study>/{CTres,SUV,SEG}.nii.gz, 1014 studies of 900 patients. Patients
with several studies are never divided. What the paper did here is not published; all values are ours or as
said.
"""
task = "segmentation"
name = "autopet"
dataset = "autopet"
image = "FDG-PET-CT-Lesions/{subject}/{study}/SUV.nii.gz"
label = "FDG-PET-CT-Lesions/{subject}/{study}/SEG.nii.gz"
labels = {1: "lesion"}
fold = 0                        # val = patients[0::5]; nnU-Net's rule for this set
folds = 5
test = "val"                    # the challenge's test set is hidden
lesion_volumes = True           # false positive and negative volume; the challenge
intensity = "zscore"            # SUV has no upper limit; ours
zscore_over = "volume"          # as in pre-training
foreground = 0.05               # SUV, the body; ours
crop = (96, 96, 96)             # ours
positive = 0.5                  # ours; studies without a lesion are drawn anywhere
crops_per_case = 2
batch = 4                       # 2 studies a step; ours
steps = 100_000                 # ours, about 250 epochs
warmup = 1000
eval_every = 5000
lr = 1e-4                       # nnU-Net baseline of the challenge
overlap = 0.5
hd95 = False
