"""BTCV: 13 abdominal organs in portal-venous CT.

    python finetune.py configs/btcv.py --init=runs/ct_1k/encoder.pt --name=btcv
    python evaluate.py configs/btcv.py --name=btcv

Download: synapse.org syn3193805, unpacked to data/BTCV/Abdomen/RawData/Training/{img/img0001.nii.gz,
label/label0001.nii.gz}, 30 scans. The field trains on 24, and chooses and reports on the same six cases; so
does this config, and its table says so. For a test of its own: --test="('0035', '0036', '0037')"
--val="('0038', '0039', '0040')".
"""
task = "segmentation"
name = "btcv"
dataset = "btcv"
image = "BTCV/Abdomen/RawData/Training/img/img{id}.nii.gz"
label = "BTCV/Abdomen/RawData/Training/label/label{id}.nii.gz"
labels = {1: "spleen", 2: "R kidney", 3: "L kidney", 4: "gallbladder", 5: "esophagus", 6: "liver",
          7: "stomach", 8: "aorta", 9: "IVC", 10: "portal+splenic v.", 11: "pancreas", 12: "R adrenal",
          13: "L adrenal"}
val = ("0035", "0036", "0037", "0038", "0039", "0040")  # VoCo and MONAI dataset_0.json
test = "val"                    # as all public recipes do
window = (-175.0, 250.0)        # HU; released code, VoCo, MONAI
foreground = -175.0             # HU; released code: above 0 after scaling
spacing = (1.5, 1.5, 1.5)       # mm; released code, VoCo (MONAI 1.5 x 1.5 x 2)
crop = (96, 96, 96)             # released code
positive = 0.75                 # 3 : 1; released code
crops_per_case = 4              # released code
batch = 4                       # 1 case a step; released code
steps = 72_000                  # 3000 epochs x 24 cases; released code
warmup = 2400                   # 100 epochs; released code
eval_every = 1200               # 50 epochs; released code
lr = 3e-4                       # VoCo (released code 2e-3)
overlap = 0.75                  # released code, VoCo
blend = "constant"              # released code validates so
# Table 1: pre-trained as configs/ct_1k.py; from scratch: copied from VoCo there
paper = {"from scratch": {"mean": 80.53}, "S2DC": {"mean": 84.14}}
