"""CT, the large collection: eight public data sets (the paper's "10k").

    torchrun --nproc_per_node=8 pretrain.py configs/ct.py --batch=8

Download (scans; folder below the data root, as the original archives unpack; LUNA16,
STOIC21, HNSCC and LIDC-IDRI need SimpleITK):
    BTCV             24 of 30   BTCV/Abdomen/RawData/Training/img/              synapse.org syn3193805
    COVID-19             771    CT-Images-in-COVID-19/                          TCIA, NIfTI release
    LUNA16               888    LUNA16/subset0 .. subset9/*.mhd                 luna16.grand-challenge.org
    STOIC21             2000    stoic2021-training/data/mha/*.mha               AWS open data, CC BY-NC
    TotalSegmentator v1 1203    Totalsegmentator_dataset/s0000/ct.nii.gz        zenodo 6802614
    FLARE23             4000    FLARE23/imagesTr2200/, FLARE23/unlabeledTr1800/ flare 2023 challenge
    HNSCC               1071    HNSCC/<patient>/<study>/<CT series>/*.dcm       TCIA
    LIDC-IDRI            589    LIDC-IDRI/<patient>/<study>/<CT series>/*.dcm   TCIA
These are 10,546, the released code's lists 10,452 (of COVID-19 722, say). TCIA folders hold other series too (structure sets, PET):
keep the CT series or name the others under `exclude`; python data.py configs/ct.py names every file that
cannot be used. LUNA16 is a part of LIDC-IDRI and FLARE23 gathers older public sets, so scans come twice, and
images (never labels) of MSD may be among them: say so when a downstream score on MSD is reported.
"""
name = "ct"
dataset = "ct"
scans = (
    "BTCV/Abdomen/RawData/Training/img/img*.nii.gz",
    "CT-Images-in-COVID-19/volume-covid19-A-*.nii.gz",
    "LUNA16/subset*/*.mhd",
    "stoic2021-training/data/mha/*.mha",
    "Totalsegmentator_dataset/s*/ct.nii.gz",
    "FLARE23/imagesTr2200/*.nii.gz",
    "FLARE23/unlabeledTr1800/*.nii.gz",
    "HNSCC/*/*/*/",             # a pattern that ends in / finds folders, one DICOM series each
    "LIDC-IDRI/*/*/*/",
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
