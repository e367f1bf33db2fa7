"""CC-CCII: COVID-19 (NCP), other pneumonia (CP) and normal lungs in CT slices.

    python finetune.py configs/cc_ccii.py --init=runs/ct/encoder.pt --name=cc_ccii
    python evaluate.py configs/cc_ccii.py --name=cc_ccii

Download: ncov-ai.big.ac.cn/download, unpacked to data/CC-CCII/{NCP,CP,Normal}/<patient>/<scan>/<slice>.png
(Pillow reads them), and the curated lists CC_CCII_fold{0,1,2}_{train,valid}.csv to data/CC-CCII/csv. Pictures
are 8 bit, windowed already: no HU. The three valid lists share 405 scans: they are the test set here, the
rest of fold 0's valid list chooses. Scans that no list names are left out of every part by `only`.
"""
task = "classification"
name = "cc_ccii"
dataset = "cc_ccii"
image = "CC-CCII/{class}/{subject}/{scan}/"
classes = {"Normal": 0, "CP": 1, "NCP": 2}
table_key = "{patient_id}_{scan_id}"
case_key = "{subject}_{scan}"
only = ("CC-CCII/csv/CC_CCII_fold0_train.csv", "CC-CCII/csv/CC_CCII_fold0_valid.csv")
val = "CC-CCII/csv/CC_CCII_fold0_valid.csv"
test = ("CC-CCII/csv/CC_CCII_fold0_valid.csv", "CC-CCII/csv/CC_CCII_fold1_valid.csv",
        "CC-CCII/csv/CC_CCII_fold2_valid.csv")
intensity = "window"
window = (0.0, 255.0)           # grey levels
foreground = -1.0               # the whole picture
crop_foreground = False
resize = (256, 256, 64)         # voxels x y z; released code (64 slices of 256 x 256)
crop = (256, 256, 64)
rotation = (0.0, 0.0, 5.0)      # ours
shift = (12.0, 12.0, 0.0)       # voxels; released code: 18 of 384
flip = (0.0, 0.0, 0.5)          # released code: the slice axis
jitter_shift = (1.0, 0.07)      # released code
jitter_scale = (1.0, 0.05)      # released code
crops_per_case = 1
batch = 4                       # released code
steps = 63_000                  # 100 epochs x 2515 scans / 4; released code
warmup = 3150                   # 5 epochs; released code
eval_every = 3150
lr = 3e-4                       # released code
decay = 1e-2                    # AdamW's default; released code
