"""Synthetic abdomens as CT, MRI or PET with labels, for the demo, tests and studies; no patient is in them.

    python -m lab.phantom data/phantom --subjects=24 --modality=ct --size=96

A subject is drawn in millimetres: some sixty bodies (ellipsoids, tubes, level sets of random fields) in one
anatomical frame, moved by a pose and a smooth random displacement and painted one over the other with soft
edges. The anatomy follows from the seed alone; a modality gives each tissue its intensity, then blur and
noise. Axes x y z in RAS+: x to the patient's right, y to the front, z to the head; mm from the middle.
"""
import argparse
import gzip
import hashlib
import itertools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from einops import rearrange
from scipy import ndimage
from scipy.spatial.transform import Rotation

import configs
from data import end_with_parent

VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]    # files of another text are stale
FOV = 288.0          # mm, edge of the cube in view, whatever the number of voxels
DOSE_REDUCTION = 50  # full counts / low counts of a PET pair
COUNTS = 500.0       # full-dose counts per SUV and ml: at 3 mm 4 % noise in the liver, 27 % at a 50th of them
ORIENTATIONS = "RAS", "LPS", "RAS", "PSR"   # of files, by seed modulo 4: a reader has to turn them
IMAGES = {"ct": ("ct",), "mri": ("t1", "t2", "t1ce", "flair"), "pet": ("full", "low")}
ORGANS = {1: "spleen", 2: "kidney_right", 3: "kidney_left", 4: "gallbladder", 5: "esophagus", 6: "liver",
          7: "stomach", 8: "aorta", 9: "inferior_vena_cava", 10: "portal_vein_and_splenic_vein",
          11: "pancreas", 12: "adrenal_gland_right", 13: "adrenal_gland_left"}        # organs and ids of BTCV
ID = {name: k for k, name in ORGANS.items()}

# HU without contrast agent, HU added by it, texture in HU and its grain (0 coarse .. 2 fine); then the MR
# signal in arbitrary units, the part of T1 added by the agent, and the uptake in SUV. Parenchyma overlaps in
# HU, as it does in a real scan: the means differ by less than the noise; place and texture tell organs apart.
TISSUE = {  #            HU  agent texture grain |  T1   T2 flair agent |  SUV
    "air":         (-1000,    0,      0,    0,      0,    0,    0, 0.00,  0.01),
    "table":        (-850,    0,      0,    0,      0,    0,    0, 0.00,  0.01),
    "skin":           (10,    5,     15,    2,    450,  220,  300, 0.10,  0.60),
    "fat":          (-106,    0,      9,    1,    900,  520,  640, 0.00,  0.25),
    "visceral fat": (-102,    0,     13,    2,    860,  500,  600, 0.00,  0.35),
    "muscle":         (50,    8,     13,    2,    360,  150,  260, 0.10,  0.70),
    "bone":          (500,    0,    110,    2,    150,   90,  110, 0.00,  0.80),
    "marrow":        (170,    5,     35,    2,    520,  260,  330, 0.10,  1.40),
    "disc":           (80,    0,      8,    1,    300,  300,  220, 0.00,  0.50),
    "csf":            (18,    0,      5,    1,    170,  950,   90, 0.00,  0.30),
    "lung":         (-810,   15,     45,    2,     40,   40,   40, 0.20,  0.40),
    "heart":          (42,   45,      7,    0,    330,  230,  300, 0.60,  2.20),
    "bowel":          (40,   20,      9,    2,    340,  240,  300, 0.30,  1.60),
    "chyme":          (22,    3,     24,    2,    350,  600,  260, 0.00,  1.20),
    "stool":         (-20,    0,    140,    2,    420,  300,  240, 0.00,  1.30),
    "gas":          (-940,    0,     10,    2,     10,   10,   10, 0.00,  0.20),
    "urine":           (6,    0,      3,    1,    180,  980,  100, 0.20, 14.00),
    "spleen":         (47,   32,      5,    0,    330,  360,  420, 0.45,  2.00),
    "kidney":         (36,   44,     11,    1,    350,  400,  400, 0.85,  2.60),
    "sinus":         (-30,   10,     30,    2,    500,  650,  350, 0.30,  5.00),
    "gallbladder":    (10,    0,      4,    1,    260,  920,  150, 0.00,  0.50),
    "esophagus":      (38,   15,     12,    2,    350,  260,  330, 0.30,  1.50),
    "liver":          (54,   26,      6,    1,    470,  170,  290, 0.35,  2.30),
    "stomach":        (40,   20,      8,    2,    340,  230,  300, 0.40,  1.90),
    "blood":          (42,   48,      4,    0,    280,  190,  250, 1.20,  1.70),
    "pancreas":       (36,   28,     18,    2,    450,  230,  320, 0.50,  1.50),
    "adrenal":        (26,   30,      9,    2,    380,  260,  330, 0.50,  1.60),
    "lesion":           (4,    6,      9,    1,    225,  560,  680, 3.60,  7.50),
    "necrosis":        (-8,    0,      5,    1,    190,  760,  420, 0.05,  3.00),
}


def smooth_field(rng, mm, size):
    """A Gaussian random field (x, y, z) float32 of mean 0 and deviation 1 that changes over some `mm`.

    Cubic B-spline over random knots every `mm`, so that a generator state gives one field in mm at any size.
    """
    weights = []
    for n in size:
        at = (np.arange(n) + 0.5) * FOV / n / mm                              # voxel centres in knots
        t = np.abs(at[:, None] + 1 - np.arange(int(np.ceil(FOV / mm)) + 3))   # (voxels, knots)
        outer = np.clip(2 - t, 0, None) ** 3 / 6
        weights.append(np.where(t < 1, 2 / 3 - t ** 2 + t ** 3 / 2, outer).astype(np.float32))
    knots = rng.standard_normal([w.shape[1] for w in weights], np.float32)
    knots /= (151 / 315) ** 1.5                                         # mean sum of squared weights per axis
    return np.einsum("ijk,zk,yj,xi->xyz", knots, *weights[::-1], optimize=True)


def ellipse(x, y, a, b, corner=0.0):
    """About the distance in mm to a cylinder along z, half axes a, b; `corner` > 0 squarer< 0 inside."""
    x, y = (x / a) ** 2, (y / b) ** 2
    return (np.sqrt(x + y - corner * x * y) - 1) * (a * b) ** 0.5


def ellipsoid(p, centre, radii, turn=(0, 0, 0)):
    """About the distance in mm of the points p (3, ..) to an ellipsoid; `turn`: degrees about x, y, z."""
    axes = Rotation.from_euler("xyz", turn, degrees=True).as_matrix().T
    q = np.einsum("ij,j...->i...", (axes / np.array(radii)[:, None]).astype(np.float32),
                  p - rearrange(np.float32(centre), "c -> c 1 1 1"))
    k = np.sqrt(np.einsum("i...,i...->...", q, q))
    slope = np.sqrt(np.einsum("i...,i...,i->...", q, q, np.float32(1 / np.array(radii) ** 2)))
    return k * (k - 1) / np.maximum(slope, 1e-6)     # first-order distance: value over length of the gradient


def tube(p, points, radii):
    """Distance in mm of the points p (3, ..) to capsules through `points` (n, 3) with `radii` (n,)."""
    best = None
    for a, b, ra, rb in zip(points, points[1:], radii, radii[1:]):
        q = p - rearrange(np.float32(a), "c -> c 1 1 1")
        ab = np.float32(b - a)
        w = np.clip(np.einsum("i,i...->...", ab / (ab @ ab), q), 0, 1)
        q -= rearrange(ab, "c -> c 1 1 1") * w
        d = np.sqrt(np.einsum("i...,i...->...", q, q)) - (ra + w * (rb - ra))
        best = d if best is None else np.minimum(best, d)
    return best


def blend(a, b, mm):
    """Union of two distances with a fillet of about `mm`."""
    return np.minimum(a, b) - np.clip(mm - np.abs(a - b), 0, None) ** 2 / (4 * mm)


def diagnosis(seed):
    """(class 0 to 2, lesion or not) of a subject. Classes come in shuffled threes, so few have all."""
    kind = np.random.default_rng([seed // 3, 1]).permutation(3)[seed % 3]
    return int(kind), bool(np.random.default_rng([seed, 3]).random() < 0.5)


class Subject:
    """One anatomy on one grid: where each voxel lies in the anatomical frame, and what is painted so far.

    p (3, x, y, z) mm: anatomical place of voxels. texture: three fields (x, y, z), coarse to fine. layers:
    (tissue, box, share of voxel). label (x, y, z) uint8. site {organ: (centre, radius)} mm: for a lesion.
    """

    def __init__(self, seed, size):
        self.seed, self.size, self.spacing = seed, size, FOV / np.array(size)
        self.kind, self.ill = diagnosis(seed)
        self.rng = rng = np.random.default_rng([seed, 0])
        self.fat = rng.uniform(6, 17)                                          # mm under the skin
        turn = Rotation.from_euler("xyz", rng.normal(0, 2.5, 3), degrees=True).as_matrix()
        self.matrix = turn / np.exp(rng.normal(0, [0.03, 0.03, 0.04]))
        self.shift = rng.normal(0, [3, 3, 7])
        self.grid = [((np.arange(n) + 0.5) / n - 0.5) * FOV for n in size]     # mm of the voxel centres
        fields = [6.0 * smooth_field(rng, 75, size) + 1.2 * smooth_field(rng, 26, size) for _ in range(3)]
        self.p = np.stack(fields)
        self.reach = 1.25 * float(np.abs(self.p).max())          # mm that the displacement can add to a place
        x, y, z = np.ix_(*(np.float32(g) for g in self.grid))
        for p, (a, b, c), t in zip(self.p, np.float32(self.matrix), np.float32(self.shift)):
            p += (a * x + t) + b * y + c * z
        self.texture = [smooth_field(rng, mm, size) for mm in (28, 14, 7)]
        self.layers, self.label, self.site = [], np.zeros(size, np.uint8), {}

    def box(self, low, high):
        """Slices of the voxels that can show anatomy between the corners `low` and `high`, in mm."""
        corners = np.array(list(itertools.product(*zip(low, high)))) - self.shift
        mm = corners @ np.linalg.inv(self.matrix).T
        edges = zip(self.grid, mm.min(0) - self.reach, mm.max(0) + self.reach)
        return tuple(slice(*np.searchsorted(grid, (a, b))) for grid, a, b in edges)

    def paint(self, tissue, box, distance, organ=0, halo=0.0, part=1.0, within=None):
        """Lay `tissue` over all where `distance` < 0, an edge voxel getting its share; `organ`: its label.

        halo: about so many mm of fat around it. part: at most this share of it. within: only on this label.
        """
        if halo:
            self.paint("visceral fat", box, distance - halo * (1 + 0.5 * self.texture[0][box]))
        share = (0.5 - distance / np.float32(np.prod(self.spacing) ** (1 / 3))).clip(0, 1) * np.float32(part)
        if within is not None:
            share *= self.label[box] == within
        self.layers.append((tissue, box, share))
        self.label[box][share >= 0.5] = organ

    def ball(self, tissue, centre, radii, turn=(0, 0, 0), **more):
        """Paint an ellipsoid; `more` goes to paint."""
        margin = max(radii) + 2.5 * more.get("halo", 0) + 4
        box = self.box(np.array(centre) - margin, np.array(centre) + margin)
        self.paint(tissue, box, ellipsoid(self.p[(..., *box)], centre, radii, turn), **more)

    def pipe(self, tissue, points, radii, mm=2.0, lumps=0.0, **more):
        """Paint a tube through points that stray by `mm`, its surface by `lumps` mm -> its box, distance."""
        points = np.array(points, float) + self.rng.normal(0, mm, (len(points), 3))
        margin = max(radii) + 2.5 * more.get("halo", 0) + 3 * lumps + 4
        box = self.box(points.min(0) - margin, points.max(0) + margin)
        distance = tube(self.p[(..., *box)], points, np.float32(radii))
        distance = distance + np.float32(lumps) * self.texture[1][box]
        self.paint(tissue, box, distance, **more)
        return box, distance


def torso(s):
    """Table, skin, fat, muscle, lungs and heart; s.cavity, s.room: distance to inside of ribs, abdomen."""
    everywhere = np.s_[:, :, :]
    x, y, z = np.ix_(*(np.float32(g) for g in s.grid))
    s.paint("table", everywhere, np.abs(y + 130 - x ** 2 / 900) - 2 + 0 * z)
    x, y, z = s.p
    wall = ellipse(x, y + 8, 113, 86, 0.25)                                           # outside of the muscles
    skin = wall - s.fat * (1 - 0.002 * y)                                               # more fat at the back
    s.paint("skin", everywhere, skin)
    s.paint("fat", everywhere, skin + 2.5)
    s.paint("muscle", everywhere, wall)
    s.paint("fat", everywhere, np.abs(wall + 7 + 3 * s.texture[0]) - 0.9, part=0.6)   # between sheets of it
    s.cavity = ellipse(x, y - 8, 100, 64, 0.25)
    s.paint("visceral fat", everywhere, s.cavity)
    domes = [s.rng.normal(top, 4) - ((x - side) ** 2 + (y - 5) ** 2) / 105
             for top, side in ((108, 54), (98, -56))]
    above = 0.75 * (z - np.maximum(*domes) - 0.3 * np.minimum(y, 0))      # the diaphragm is lower at the back
    s.room = np.maximum(above + 4, s.cavity + 3)
    lung = np.maximum(s.cavity - 1, -above)
    s.paint("muscle", everywhere, lung - 3)                                 # its rim remains as the diaphragm
    s.paint("lung", everywhere, lung)
    # Two level sets of random fields meet in curves: vessels of the lungs and of the fat between the organs.
    s.paint("blood", everywhere, np.maximum(np.hypot(s.texture[0], s.texture[1]) * 10 - 1.6, s.cavity + 4))
    s.ball("heart", (-18, 30, 150), (58, 42, 52))
    s.ball("visceral fat", (0, -22, 160), (26, 22, 90))


def bones(s):
    """A spine of vertebrae with arch and canal, ribs, wings of the pelvis, psoas muscles between them."""
    box = s.box((-42, -95, -400), (42, -20, 400))
    x, y, z = s.p[(..., *box)]
    level = 17 - np.abs((z + s.rng.normal(600, 8)) % 34 - 17)                   # mm from the middle of a disc
    body = ellipse(x, y + 41, 22, 17)
    s.paint("disc", box, body)
    s.paint("bone", box, np.maximum(body, 3.5 - level))
    s.paint("marrow", box, np.maximum(body + 2.5, 6 - level))
    arch = np.minimum(ellipse(x, y + 64, 19, 12), ellipse(x, y + 78, 4, 14))
    s.paint("bone", box, np.maximum(arch, 5 - level))
    s.paint("bone", box, np.maximum(ellipse(x, y + 60, 34, 4), 12 - level))             # transverse processes
    s.paint("csf", box, ellipse(x, y + 64, 11, 8))
    x, y, z = s.p
    rib = np.hypot(s.cavity - 6, 0.8 * ((z + 0.55 * y + s.rng.normal(600, 6)) % 29 - 14.5)) - 3.4
    rib = np.maximum(rib, 0.6 * (0.7 * y - 15 - z))                     # the costal margin rises to the front
    s.paint("bone", np.s_[:, :, :], rib)
    s.paint("marrow", np.s_[:, :, :], rib + 2.2)
    for side in (1, -1):
        s.pipe("muscle", [(side * 25, -40, 25), (side * 42, -26, -90), (side * 52, -5, -200)], (7, 19, 18))
        box = s.box((side * 75 - 55, -75, -260), (side * 75 + 55, 50, -80))
        x, y, z = s.p[(..., *box)]
        bowl = np.abs(ellipsoid(s.p[(..., *box)], (side * 34, 18, -78), (70, 66, 88))) - 3.5
        bowl = np.maximum(np.maximum(bowl, y - 30), np.maximum(30 - side * x, z + 92 - 0.3 * y))
        s.paint("bone", box, bowl)
        s.paint("marrow", box, bowl + 2)


def bowel(s):
    """Loops of small bowel (the level set of a random field), colon and bladder: background, no label."""
    box = s.box((-110, -60, -400), (110, 80, 60))
    y, z = s.p[(1, *box)], s.p[(2, *box)]
    room = np.maximum(np.maximum(s.cavity[box] + 7, z - 12 + 0.4 * y), -28 - y)
    loops = np.maximum(room, (0.15 - smooth_field(s.rng, 17, s.size)[box]) * 7)
    s.paint("bowel", box, loops)
    s.paint("chyme", box, loops + 3.5)
    s.paint("gas", box, np.maximum(loops + 3.5, 28 - y - 14 * s.texture[0][box]))
    for points in ([(78, -8, -95), (80, 0, -40), (74, 20, -2)],
                   [(74, 28, -2), (40, 52, -22), (-35, 54, -12), (-76, 18, 24)],
                   [(-78, 10, 26), (-84, -10, -20), (-80, -6, -90), (-60, 5, -150)]):
        box, wall = s.pipe("bowel", points, s.rng.normal(15, 1.5, len(points)), mm=4, lumps=3)
        s.paint("stool", box, wall + 3)
        s.paint("gas", box, np.maximum(wall + 3.5, 8 - 12 * s.texture[0][box]))
    s.ball("bowel", (0, 22, -168), (38, 34, 34))
    s.ball("urine", (0, 22, -168), (34, 30, 30))


def solid_organs(s):
    """Liver, spleen, kidneys and stomach. In class 1 the spleen is large, in 2 both kidneys are small."""
    def place(*mm):
        return np.array(mm) + s.rng.normal(0, 3, 3)

    def grow(factor=1.0):
        return factor * float(np.exp(s.rng.normal(0, 0.05)))

    at, k = place(52, 6, 46), grow()
    box = s.box(at - (130, 80, 90), at + (70, 80, 90))
    right = ellipsoid(s.p[(..., *box)], at, np.array([54, 64, 74]) * k)
    left = ellipsoid(s.p[(..., *box)], at + (-50, 26, 24), np.array([54, 26, 26]) * k, (0, 14, 0))
    behind = ellipsoid(s.p[(..., *box)], (50, -48, -14), (40, 42, 66))           # where the right kidney lies
    whole = np.maximum(blend(right, left, 24), s.room[box])
    s.paint("liver", box, -blend(-whole, behind, 16), ID["liver"])
    s.site["liver"] = at + np.array([12, 14, 6]) * k, 24 * k
    at, k = place(-70, -20, 42), grow(1.3 if s.kind == 1 else 1.0)
    box = s.box(at - 70, at + 70)
    whole = np.maximum(ellipsoid(s.p[(..., *box)], at, np.array([30, 44, 50]) * k, (15, -20, 0)), s.room[box])
    hilum = ellipsoid(s.p[(..., *box)], at + np.array([38, 16, 0]) * k, np.array([22, 34, 44]) * k)
    s.paint("spleen", box, np.maximum(whole, -hilum), ID["spleen"])
    s.site["spleen"] = at + np.array([-5, 6, 14]) * k, 6 * k
    k = grow(0.83 if s.kind == 2 else 1.0)
    for side, name in ((1, "kidney_right"), (-1, "kidney_left")):         # mirror images, the right one lower
        at, turn = place(side * 52, -28, -5 - 7 * side), (-12, -8 * side, -25 * side)
        s.ball("kidney", at, np.array([24, 27, 52]) * k, turn, organ=ID[name], halo=6)
        s.ball("sinus", at + np.array([-14 * side, 6, 0]) * k, np.array([13, 8, 21]) * k, turn)
        s.site[name] = at + np.array([5 * side, -4, 0]) * k, 11 * k
    path = (-10, 8, 92), (-34, 2, 88), (-46, 18, 72), (-46, 38, 44), (-20, 50, 22), (4, 46, 18), (24, 36, 24)
    radii = np.array([9, 19, 23, 19, 15, 12, 7]) * grow()
    box, wall = s.pipe("stomach", path, radii, mm=3, organ=ID["stomach"], halo=2)
    s.paint("chyme", box, wall + 4.5, ID["stomach"])
    gas = s.rng.uniform(25, 50) - s.p[(1, *box)]                          # rises to the front of one who lies
    s.paint("gas", box, np.maximum(wall + 4.5, gas), ID["stomach"])


def small_organs(s):
    """Esophagus, gallbladder, pancreas, great vessels and adrenals; painted last, so that none is buried."""
    s.pipe("esophagus", [(-3, -4, 200), (-6, -2, 120), (-11, 8, 93)], (8, 8, 8), organ=ID["esophagus"])
    s.pipe("gallbladder", [(42, 34, 26), (46, 44, 10), (48, 50, 0)], (7, 12, 13),
           organ=ID["gallbladder"], halo=1.5)
    head = s.rng.normal((24, 14, 12), 2)
    s.pipe("pancreas", [head + (2, 0, -12), head, (4, 20, 24), (-24, 12, 32), (-56, -4, 44)],
           (12, 15, 9, 10, 9), lumps=1.6, organ=ID["pancreas"], halo=2)
    s.site["pancreas"] = head, 6
    for tip in ((74, 12, 71), (54, -33, 76), (28, 42, 88)):                # hepatic veins belong to the liver
        s.pipe("blood", [(14, 2, 96), np.add(tip, (14, 2, 104)) / 2, tip], (5, 4, 2.5),
               organ=ID["liver"], within=ID["liver"])
    s.pipe("blood", [(-58, -12, 48), (-28, 3, 30), (4, 8, 26), (26, 14, 44), (44, 14, 54)],
           (5, 5.5, 7.5, 7.5, 6), organ=ID["portal_vein_and_splenic_vein"])
    s.pipe("blood", [(4, 10, 28), (6, 16, -8), (2, 22, -40)], (6, 5.5, 4))                 # mesenteric vein
    for side in (1, -1):
        s.pipe("blood", [(-3, -12, -70), (22 * side, -10, -120), (40 * side, 5, -180)], (7, 6.5, 6))  # iliac
    s.pipe("blood", [(16, -12, -76), (18, -10, 0), (21, -5, 50), (18, 2, 98), (14, 10, 112)],
           (10.5, 10.5, 11, 11, 10), organ=ID["inferior_vena_cava"])
    s.pipe("blood", [(-24, -23, 200), (-19, -18, 100), (-6, -12, 30), (-3, -12, -72)], (11.5, 10.5, 9.5, 8.5),
           organ=ID["aorta"], halo=1.5)
    for side, organ, foot in ((1, 12, (30, -18, 54)), (-1, 13, (-33, -12, 52))):
        foot = s.rng.normal(foot, 1.5)
        for limb in ((12 * side, -20, -2), (-2 * side, -22, -10)):
            s.pipe("adrenal", [foot + (0, 0, 6), foot + limb], (4.4, 3.9), mm=0.5, organ=organ, halo=2)


def lesion(s):
    """Paint a tumour with a dead core into one organ of every second subject; mask (x, y, z), 1 inside."""
    mask, rng = np.zeros(s.size, np.uint8), np.random.default_rng([s.seed, 2])
    if not s.ill:
        return mask
    share = {"liver": 0.5, "spleen": 0.15, "kidney_right": 0.125, "kidney_left": 0.125, "pancreas": 0.1}
    name = str(rng.choice(list(share), p=list(share.values())))
    step, radius = rng.standard_normal(3), rng.uniform(10, 17 if name == "liver" else 13)
    centre, room = s.site[name]
    centre = centre + step / np.linalg.norm(step) * room * rng.random() ** (1 / 3)      # even within the ball
    box = s.box(centre - 2 * radius - 8, centre + 2 * radius + 8)
    distance = ellipsoid(s.p[(..., *box)], centre, radius * rng.uniform(0.85, 1.15, 3)) + s.texture[1][box]
    mask[box] = (distance < 0) & (s.label[box] == ID[name])
    s.paint("lesion", box, distance, ID[name], within=ID[name])
    s.paint("necrosis", box, distance + 0.55 * radius, ID[name], within=ID[name])
    return mask


def render(s, mean, rough):
    """Image (x, y, z) float32 of the painted layers; mean, rough {tissue: value, stray of its texture}."""
    image = np.full(s.size, mean["air"], np.float32)
    for tissue, box, alpha in s.layers:
        fill = np.float32(rough[tissue]) * s.texture[TISSUE[tissue][3]][box] + np.float32(mean[tissue])
        image[box] += alpha * (fill - image[box])
    return image


def blur_with_noise(image, noise, voxels):
    """Blur of `voxels` deviation over an image and white noise, which ends at deviation `noise`."""
    kernel = ndimage.gaussian_filter1d(np.eye(1, 65, 32)[0], voxels)
    return ndimage.gaussian_filter(image + noise / np.float32((kernel @ kernel) ** 1.5), voxels)


def ct(s, rng):
    """HU. Somewhere between no and a portal-venous contrast agent; noise rises to the middle of the body."""
    agent = rng.uniform(0, 1)
    mean = {t: v[0] + agent * v[1] + rng.normal(0, 4) for t, v in TISSUE.items()}
    image = render(s, mean, {t: v[2] for t, v in TISSUE.items()})
    depth = np.clip(1 - s.cavity / 64, 0.6, 2)
    noise = rng.standard_normal(s.size, np.float32) * np.float32(rng.uniform(6, 10)) * depth
    return {"ct": np.maximum(blur_with_noise(image, noise, 0.6), -1024)}


def mri(s, rng):
    """Four sequences in arbitrary units: coil shading (bias field), Rician noise, each its own gain."""
    shading = np.exp(0.3 * smooth_field(rng, 150, s.size))
    stray = {t: np.exp(rng.normal(0, 0.06)) for t in TISSUE}
    images = {}
    for name, column in {"t1": 4, "t2": 5, "t1ce": 4, "flair": 6}.items():
        agent = name == "t1ce"
        mean = {t: v[column] * stray[t] * (1 + agent * v[7]) for t, v in TISSUE.items()}
        image = render(s, mean, {t: mean[t] * v[2] / 120 for t, v in TISSUE.items()})
        image *= shading * np.exp(0.06 * smooth_field(rng, 150, s.size))
        noise = rng.standard_normal((2, *s.size), np.float32) * 14
        image = np.hypot(blur_with_noise(image, noise[0], 0.6), blur_with_noise(0, noise[1], 0.6))
        images[name] = image * np.float32(np.exp(rng.normal(0, 0.15)))
    return images


def thin(counts, factor, rng):
    """Counts of the same scan at a `factor`-th of the dose: every count is kept with probability 1 / factor.

    Poisson counts of mean m become Poisson counts of mean m / factor, as if the dose had been so low.
    """
    return rng.binomial(counts, 1 / factor)


def pet(s, rng):
    """SUV at full dose and at 1 / DOSE_REDUCTION of its counts, after a camera of 6 mm and a mild filter."""
    gain = np.exp(rng.normal(0, 0.1))
    mean = {t: v[8] * gain * np.exp(rng.normal(0, 0.12)) for t, v in TISSUE.items()}
    image = render(s, mean, {t: mean[t] * min(v[2], 30) / 100 for t, v in TISSUE.items()})
    image = ndimage.gaussian_filter(np.maximum(image, 0), 6 / 2.355 / s.spacing)
    scale = COUNTS * np.prod(s.spacing) / 1000                                    # counts of a voxel at SUV 1
    full = rng.poisson(image * scale)
    counts = {"full": full / scale, "low": thin(full, DOSE_REDUCTION, rng) * (DOSE_REDUCTION / scale)}
    return {name: ndimage.gaussian_filter(c.astype(np.float32), 0.8) for name, c in counts.items()}


def checked(seed, modality, size):
    """The size as three voxel counts; one line for what cannot be drawn."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed: expected a whole number from 0 up, found {seed!r}")
    if modality not in IMAGES:
        raise ValueError(f"modality: expected one of {', '.join(IMAGES)}, found {modality!r}")
    voxels = (size,) * 3 if np.ndim(size) == 0 else tuple(size)
    if len(voxels) != 3 or not all(isinstance(n, (int, np.integer)) and n >= 16 for n in voxels):
        raise ValueError(f"size: expected one or three whole numbers of at least 16 voxels, found {size!r}")
    return tuple(int(n) for n in voxels)


def phantom(seed, modality, size=96):
    """One subject, drawn anew from (seed, modality, size) alone.

    seed      whole number from 0 up: the subject. Label, lesion and class do not depend on the modality
    modality  "ct", "mri" or "pet"
    size      voxels per edge, or three counts; the view stays 288 mm wide, so the spacing is 288 / size mm

    Returns a dict: images {name: (x, y, z) float32}, "ct" in HU; "t1", "t2", "t1ce", "flair" in arbitrary
    units, 0 no signal; "full", "low" in SUV, the second at 1 / DOSE_REDUCTION of the counts. label (x, y, z)
    uint8, 0 or a key of ORGANS; lesion (x, y, z) uint8, 1 inside; class 0 usual, 1 large spleen, 2 small
    kidneys; spacing (3,) mm; affine (4, 4), voxel to mm, RAS+. Raises ValueError for arguments but these.
    """
    size = checked(seed, modality, size)
    s = Subject(int(seed), size)
    for part in (torso, bones, bowel, solid_organs, small_organs):
        part(s)
    mask = lesion(s)
    rng = np.random.default_rng([seed, 4, list(IMAGES).index(modality)])
    images = {"ct": ct, "mri": mri, "pet": pet}[modality](s, rng)
    affine = np.diag([*s.spacing, 1.0])
    affine[:3, 3] = [g[0] for g in s.grid]
    arrays = {"images": images, "label": s.label, "lesion": mask}
    return arrays | {"class": s.kind, "spacing": s.spacing, "affine": affine}


def files(seed, modality, size):
    """{volume: (its path in a data set, the line in its header that says what it shows)} of one subject."""
    paths = {m: f"imagesTr/phantom_{seed:03d}{'' if m == 'ct' else '_' + m}.nii.gz" for m in IMAGES[modality]}
    paths |= {m: f"{m}sTr/phantom_{seed:03d}.nii.gz" for m in ("label", "lesion")}
    return {m: (p, f"phantom {VERSION} {m} {seed} {'x'.join(map(str, size))}") for m, p in paths.items()}


def is_there(path, line):
    """Whether `path` holds the volume that `line` describes; FileExistsError where it holds no phantom."""
    if not path.exists():
        return False
    try:
        found = nib.load(path).header["descrip"].item().decode("latin-1")
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, KeyError):
        found = "no NIfTI file"
    if not found.startswith("phantom "):
        raise FileExistsError(f"{path}: expected a phantom or nothing, found {found or 'another scan'!r}; "
                              "choose another folder")
    return found == line


def put(path, content):
    """Under its own name a file is always whole."""
    with configs.replacing(path) as aside:
        aside.write_bytes(content)


def write_subject(folder, seed, modality, size):
    """Write what is missing of one subject; returns a line that says what was done."""
    start, all_files = time.time(), files(seed, modality, size)
    todo = {name: (folder / path, line) for name, (path, line) in all_files.items()}
    todo = {name: file for name, file in todo.items() if not is_there(*file)}
    if not todo:
        return f"phantom_{seed:03d}  {modality}  already there"
    drawn = phantom(seed, modality, size)
    axes = "RAS", ORIENTATIONS[seed % 4]
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, axes))
    for name, (path, line) in todo.items():
        voxels = drawn["images"][name] if name in drawn["images"] else drawn[name]
        if modality in ("ct", "mri") and name in drawn["images"]:
            voxels = np.round(voxels).astype(np.int16)    # a PET keeps its fractions: nibabel finds a slope
        image = nib.Nifti1Image(voxels, drawn["affine"]).as_reoriented(turn)
        image.set_data_dtype(np.int16 if name in drawn["images"] else np.uint8)
        image.header["descrip"] = line
        image.header.set_xyzt_units("mm")
        put(path, gzip.compress(image.to_bytes(), 1, mtime=0))
    ill = f"lesion of {drawn['lesion'].sum()} voxels" if drawn["lesion"].any() else "no lesion"
    return f"phantom_{seed:03d}  {modality}  class {drawn['class']}, {ill}  {time.time() - start:.1f} s"


def write_lists(folder, modality, size):
    """participants.csv and dataset.json of the subjects in the folder of modality and size -> files."""
    numbers = [path.name[8:-7] for path in (folder / "labelsTr").glob("phantom_*.nii.gz")]
    rows, entries, written = ["id,seed,class,lesion"], [], []
    for seed in sorted(int(number) for number in numbers if number.isdigit()):
        f = files(seed, modality, size)
        if not all(is_there(folder / path, line) for path, line in f.values()):
            continue
        written += [folder / path for path, _ in f.values()]
        kind, ill = diagnosis(seed)
        rows.append(f"phantom_{seed:03d},{seed},{kind},{int(ill)}")
        images = [f[m][0] for m in IMAGES[modality]]
        entries.append({"image": images if len(images) > 1 else images[0], "label": f["label"][0]})
    put(folder / "participants.csv", "\n".join([*rows, ""]).encode())
    put(folder / "dataset.json", json.dumps({
        "name": f"phantom {modality}", "description": "synthetic abdomens, no patients",
        "tensorImageSize": "3D", "modality": {str(i): m for i, m in enumerate(IMAGES[modality])},
        "labels": {"0": "background"} | {str(k): name for k, name in ORGANS.items()},
        "numTraining": len(entries), "numTest": 0, "training": entries, "test": []}, indent=1).encode())
    return written


def write(folder, seeds, modality="ct", size=96, layout="msd", workers=1):
    """Write the phantoms of `seeds` as a data set in MSD layout; returns the folder as a Path.

    imagesTr/phantom_000.nii.gz   int16 HU; others a file per image: phantom_000_t1.nii.gz, int16 signal;
                                  phantom_000_full.nii.gz, int16 with slope, SUV. Half are not stored in RAS
    labelsTr/, lesionsTr/         uint8, one phantom_000.nii.gz per subject, on the grid of the images
    participants.csv              id, seed, class, lesion (0 or 1)
    dataset.json                  MSD's: names, label ids, training list

    Files that this very text of phantom.py wrote for the same seed and size are kept, other phantoms of that
    name made anew. Modalities of one size may share a folder; the lists name every subject that has the one
    written last. `workers` processes share the subjects: where Python spawns them, call this below
    `if __name__ == "__main__"`. Raises ValueError as phantom does, FileExistsError for a file that is none.
    """
    if layout != "msd":
        raise ValueError(f"layout: expected 'msd', found {layout!r}")
    folder, seeds, start = Path(folder), list(seeds), time.time()
    if not seeds:
        raise ValueError("seeds: expected at least one, found none")
    size = [checked(seed, modality, size) for seed in seeds][0]
    for name in ("imagesTr", "labelsTr", "lesionsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = [(folder, int(seed), modality, size) for seed in sorted(set(seeds))]
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        for line in (pool.map if workers > 1 else map)(write_subject, *zip(*jobs)):
            print(line, flush=True)
    written = write_lists(folder, modality, size)
    megabytes = sum(path.stat().st_size for path in written) / 1e6
    print(f"{folder}: {len(jobs)} subjects, {len(written)} files in its lists, {megabytes:.1f} MB, "
          f"{time.time() - start:.1f} s")
    return folder


def write_demo(modality, workers):
    """The folders that configs/demo*.py read, below the data root: 24 + 32 CT, or 10 of MRI or PET."""
    base = Path(os.environ.get("S2DC_DATA") or "data")
    if modality == "ct":
        write(base / "demo_ct" / "train", range(24), workers=workers)
        write(base / "demo_ct" / "unseen", range(1000, 1032), workers=workers)
    else:
        write(base / f"demo_{modality}", range(10), modality, workers=workers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write synthetic abdomens as NIfTI files in MSD layout.")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--demo", action="store_true", help="what configs/demo*.py read, instead of FOLDER")
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="seed of the first subject")
    parser.add_argument("--modality", choices=list(IMAGES), default="ct")
    parser.add_argument("--size", type=int, nargs="+", default=[96], help="voxels per edge of 288 mm, 1 or 3")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the subjects")
    args = parser.parse_args()
    if bool(args.folder) == args.demo:
        parser.error("give either a FOLDER or --demo")
    try:
        if args.demo:
            write_demo(args.modality, args.workers)
        else:
            write(args.folder, range(args.first, args.first + args.subjects), args.modality,
                  args.size[0] if len(args.size) == 1 else args.size, workers=args.workers)
    except (ValueError, OSError) as error:
        raise SystemExit(f"lab.phantom: {error}") from None
