"""The labelled scans on which the demo's encoder is probed and shown: 32 phantoms that pre-training has not
seen.

Read by lab.probe and lab.figures over configs/demo.py, as any <name>_probe.py beside a <name>.py.
"""
scans = ()                      # those of pre-training have no labels
image = "demo_ct/unseen/imagesTr/phantom_{id}.nii.gz"
label = "demo_ct/unseen/labelsTr/phantom_{id}.nii.gz"
labels = {1: "spleen", 2: "R kidney", 3: "L kidney", 4: "gallbladder", 5: "esophagus", 6: "liver",
          7: "stomach", 8: "aorta", 9: "IVC", 10: "portal+splenic v.", 11: "pancreas", 12: "R adrenal",
          13: "L adrenal"}
probe_crop = (96, 96, 96)       # the whole scan
