"""BraTS23: contrast-enhanced T1 from plain T1-weighted MRI; everything else as in brats23_t1_to_t2.py.

    python finetune.py configs/brats23_t1_to_t1ce.py --init=runs/mri/encoder.pt --name=t1_to_t1ce
    python evaluate.py configs/brats23_t1_to_t1ce.py --name=t1_to_t1ce
"""
from configs.brats23_t1_to_t2 import *

name = "brats23_t1_to_t1ce"
dataset = "brats23_t1_to_t1ce"
target = ("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-{subject}-{visit}/"
          "BraTS-GLI-{subject}-{visit}-t1c.nii.gz")
