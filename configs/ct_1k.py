"""CT, the small collection: BTCV + TCIA CT-Images-in-COVID-19 (the paper's "1k").

    torchrun --nproc_per_node=8 pretrain.py configs/ct_1k.py --batch=8

Download, both need a free account:
    BTCV      30 scans   synapse.org syn3193805
                         data/BTCV/Abdomen/RawData/Training/img/img0001.nii.gz ..
    COVID-19  771 scans  The Cancer Imaging Archive
                         data/CT-Images-in-COVID-19/volume-covid19-A-0000.nii.gz ..
795 scans are used: the six that BTCV is later scored on are left out, so that no test image is seen here. The
released code lists 746 (24 + 722 of 771). Then: python data.py configs/ct_1k.py checks the files and fills
the cache, 2 bytes a voxel.
"""
name = "ct_1k"
dataset = "ct_1k"
scans = (
    "BTCV/Abdomen/RawData/Training/img/img*.nii.gz",
    "CT-Images-in-COVID-19/volume-covid19-A-*.nii.gz",
)
exclude = ("*img003[5-9]", "*img0040")  # BTCV's validation cases
intensity = "window"
window = (-1000.0, 1000.0)      # HU; released code
foreground = -500.0             # HU, body against air; ours (released code: above -1000)
slab = (384, 384, 96)           # voxels, 4 x 4 x 1 crops of 96; released code
token_patch = 32                # voxels a token, 12 x 12 x 3 a slab; released code (on phantoms 8 is better)
steps = 100_000                 # paper
keep = (1000, 10_000)           # for the picture of how features evolve (the paper's Fig. 7); ours
warmup = 500                    # released code
lr = 3e-4                       # released code
