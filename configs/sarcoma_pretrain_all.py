"""Pre-training on sarcoma scans of all three modalities: one encoder for CT, T1 and FDG PET.

    python -m lab.sarcoma data_sets data/sarcoma        once; a clone of github.com/theibsi/data_sets
    python pretrain.py configs/sarcoma_pretrain_all.py

The scans of configs/sarcoma_pretrain_{ct,t1,pet}.py, each under the intensity rule of its modality; a batch
mixes them. The paper trains one encoder a modality.
"""
from configs import sarcoma_ct as _ct
from configs import sarcoma_pet as _pet
from configs import sarcoma_t1 as _t1
from configs.sarcoma_pretrain_ct import *

name = dataset = "sarcoma_pretrain_all"
image = ""
# {subject}: the three of a patient are no negatives of each other
scans = tuple(f"sarcoma/{_m}/imagesTr/{{subject}}.nii.gz" for _m in ("ct", "t1", "pet"))
exclude = tuple(f"*{_id}" for _id in (*_ct.test, *_ct.val))
rules = {
    "sarcoma__ct__*": {"window": _ct.window, "spacing": _ct.spacing},
    "sarcoma__t1__*": {"intensity": _t1.intensity, "window": _t1.window, "foreground": _t1.foreground,
                       "spacing": _t1.spacing},
    "sarcoma__pet__*": {"intensity": _pet.intensity, "window": _pet.window, "foreground": _pet.foreground,
                        "spacing": _pet.spacing},
}
