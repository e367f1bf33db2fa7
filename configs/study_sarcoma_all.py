"""One encoder for sarcoma in CT, T1 and PET, for the rows "all modalities" of configs/study_sarcoma_*.py.

    python -m lab.study configs/study_sarcoma_all.py
"""
name = "study_sarcoma_all"
seeds = (0, 1, 2, 3, 4)
jobs = 2
workers = 0
rows = {"same steps": {}, "same total": {"steps": 900, "warmup": 90}}      # as one modality has, as all three
probes = False
pretrain_config = "configs/sarcoma_pretrain_all.py"
