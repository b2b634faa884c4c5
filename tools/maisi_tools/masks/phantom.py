"""Procedural anatomy: label masks of a human who never lived, for demos and tests.

One template, from the vertex to the thighs, is written down in millimetres and painted solid by solid, later ones over
earlier ones; `kind` says which part of it is in view. Its axes are RAS (x grows to the patient's right, so left organs
have negative x), its origin is the middle of the brainstem. Sizes and positions of the head, the neck and the
shoulders are medians over OpenKBP's patients (outline of the body, path of the spinal cord, extent of the delineated
structures); the trunk follows adult standard anatomy. Brainstem, larynx and parotid glands have the placeholder ids
that :mod:`maisi_tools.masks.data_sets` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.interpolate import PchipInterpolator

from maisi_tools.errors import InputError
from maisi_tools.files import replacing
from maisi_tools.masks.canvas import LabelCanvas, Point
from maisi_tools.masks.label_maps import LABEL_MAPS
from maisi_tools.masks.vocabulary import BODY, label_id, labels_in_group

CENTERS = {"head_neck": (0.0, 8.0, -95.0), "torso": (0.0, -8.0, -420.0)}
"""The kinds of phantoms, each with the template's point (mm) in the middle of its volume."""

SIDES = {"left": -1, "right": 1}
BRAINSTEM, LARYNX = LABEL_MAPS["openkbp"][1], LABEL_MAPS["openkbp"][4]
PAROTID = {"left": LABEL_MAPS["openkbp"][6], "right": LABEL_MAPS["openkbp"][7]}
BONE, AIRWAY = label_id("skull"), label_id("airway")

# z: half width, y of the back, y of the front (mm). Shoulders without arms.
_OUTLINE = {
    -860: (178, -135, 80),
    -760: (180, -135, 84),
    -700: (181, -137, 92),
    -640: (180, -128, 100),
    -580: (168, -114, 108),
    -520: (157, -106, 108),
    -460: (160, -110, 107),
    -400: (168, -118, 106),
    -330: (174, -122, 104),
    -260: (176, -121, 93),
    -200: (186, -121, 72),
    -170: (190, -114, 57),
    -150: (177, -102, 54),
    -140: (150, -95, 56),
    -130: (112, -84, 61),
    -120: (86, -76, 67),
    -110: (74, -68, 76),
    -100: (69, -61, 92),
    -90: (67, -58, 106),
    -80: (67, -56, 114),
    -60: (72, -58, 118),
    -40: (77, -68, 118),
    -20: (79, -80, 115),
    0: (78, -88, 111),
    30: (77, -91, 103),
    50: (74, -87, 98),
    70: (68, -79, 89),
    85: (60, -70, 80),
    100: (46, -56, 64),
    112: (27, -34, 42),
    120: (1, 3, 5),
}
# z: y of the spinal canal (mm), then depth, width and height of the vertebral bodies there.
_SPINE = {
    -720: (-108, 20, 30, 20),
    -660: (-104, 26, 40, 24),
    -612: (-84, 30, 48, 27),
    -582: (-67, 33, 48, 28),
    -549: (-57, 33, 46, 28),
    -516: (-53, 32, 45, 28),
    -484: (-56, 31, 43, 27),
    -453: (-62, 30, 41, 26),
    -400: (-75, 28, 37, 23),
    -340: (-80, 27, 34, 21),
    -300: (-77, 25, 32, 20),
    -260: (-71, 23, 31, 19),
    -230: (-63, 21, 31, 18),
    -200: (-50, 19, 31, 17),
    -170: (-34, 18, 31, 16),
    -140: (-19, 17, 30, 15),
    -110: (-8, 16, 28, 14),
    -80: (-2, 16, 26, 14),
    -60: (-1, 15, 25, 14),
    -30: (0, 15, 24, 14),
}
_VERTEBRAE = {
    **{"C1": -42, "C2": -58, "C3": -76, "C4": -93, "C5": -110, "C6": -127, "C7": -145},
    **{"T1": -164, "T2": -185, "T3": -206, "T4": -228, "T5": -251, "T6": -274, "T7": -298, "T8": -322, "T9": -346},
    **{"T10": -371, "T11": -397, "T12": -424, "L1": -453, "L2": -484, "L3": -516, "L4": -549, "L5": -582, "S1": -612},
}
# z: half width and half depth (mm) of the rib cage, on whose surface the ribs lie.
_CAGE = {
    -560: (112, 82),
    -480: (124, 94),
    -420: (129, 98),
    -370: (130, 97),
    -323: (126, 92),
    -274: (116, 84),
    -251: (108, 77),
    -228: (99, 68),
    -206: (86, 58),
    -185: (68, 46),
    -168: (42, 30),
    -156: (20, 16),
}


class _Profile:
    """A table over z (mm), interpolated monotonically; beyond its ends the end values hold."""

    def __init__(self, table: Mapping[int, tuple[int, ...]]) -> None:
        self.heights = np.array(sorted(table), dtype=float)
        self._curve = PchipInterpolator(self.heights, np.array([table[z] for z in sorted(table)], dtype=float))

    def __call__(self, z: float | np.ndarray) -> list[np.ndarray]:
        values = self._curve(np.clip(z, self.heights[0], self.heights[-1]))
        return [values[..., k] for k in range(values.shape[-1])]


_outline, _spine, _cage_size = _Profile(_OUTLINE), _Profile(_SPINE), _Profile(_CAGE)


def make_phantom(
    kind: str = "head_neck",
    size: Sequence[int] = (96, 80, 96),
    spacing: Sequence[float] = (4.0, 4.0, 2.5),
    seed: int = 0,
) -> np.ndarray:
    """Draw a random anatomy, body label included.

    Args:
        kind: "head_neck" (arms down) or "torso" (arms up).
        size: voxels along x, y, z.
        spacing: mm along x, y, z.
        seed: equal seeds give equal anatomies; size and spacing only choose what of it is sampled.

    Returns:
        (X, Y, Z) uint8 in MAISI's vocabulary, RAS axes.

    Raises:
        InputError: an unknown kind, or a size, spacing or seed that is none.
    """
    _check(kind, size, spacing, seed)
    canvas = LabelCanvas(size, spacing, CENTERS[kind], np.random.default_rng(seed))
    _skin(canvas, arms=kind == "head_neck")
    _muscles(canvas)
    _cranium(canvas)
    _face(canvas)
    _lungs_and_diaphragm(canvas)
    _abdomen(canvas)
    _pelvis(canvas)
    _vertebrae(canvas)
    _ribs(canvas)
    _shoulders(canvas, arms=kind == "head_neck")
    _vessels_and_heart(canvas)
    _throat(canvas)
    _cord(canvas)
    return canvas.labels


def write_phantom(
    path: str | Path,
    kind: str = "head_neck",
    size: Sequence[int] = (96, 80, 96),
    spacing: Sequence[float] = (4.0, 4.0, 2.5),
    seed: int = 0,
) -> Path:
    """Write :func:`make_phantom` as NIfTI (uint8, RAS, the world's origin in the middle of the volume).

    Raises:
        InputError: as :func:`make_phantom`, or a path that does not end in .nii or .nii.gz.
        OSError: the file cannot be written; nothing is left then.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"phantom file {path} has no NIfTI name; allowed are .nii and .nii.gz: name it {path}.nii.gz")
    labels = make_phantom(kind, size, spacing, seed)
    affine = np.diag([*spacing, 1.0]).astype(float)
    affine[:3, 3] = -(np.asarray(labels.shape) - 1) / 2 * np.asarray(spacing, dtype=float)
    image = nib.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    with replacing(path) as part:
        nib.save(image, part)
    return path


def flat_ct(labels: np.ndarray) -> np.ndarray:
    """A CT of a phantom in which each tissue has one value: sharp and known, but not realistic.

    Args:
        labels: (X, Y, Z) in MAISI's vocabulary.

    Returns:
        int16 HU: -1000 outside and in the airway, -800 in the lungs, 700 in bone, 40 elsewhere.
    """
    tissues = [np.isin(labels, labels_in_group(group)) for group in ("airway", "lung", "bone")]
    return np.select([labels == 0, *tissues], [-1000, -1000, -800, 700], 40).astype(np.int16)


def _check(kind: str, size: Sequence[int], spacing: Sequence[float], seed: int) -> None:
    if kind not in CENTERS:
        raise InputError(f"phantom kind {kind!r} is unknown; allowed are {', '.join(CENTERS)}")
    if len(size) != 3 or any(int(n) != n or n < 1 for n in size):
        raise InputError(f"phantom size {tuple(size)} is not usable; give three positive whole numbers of voxels")
    if len(spacing) != 3 or not all(np.isfinite(mm) and mm > 0 for mm in spacing):
        raise InputError(f"phantom spacing {tuple(spacing)} is not usable; give three positive lengths in mm")
    if int(seed) != seed or seed < 0:
        raise InputError(f"phantom seed {seed!r} is not usable; give a whole number from 0 up")


def _canal(z: float | np.ndarray) -> np.ndarray:
    """Y of the middle of the spinal canal."""
    return _spine(z)[0]


def _front(z: float | np.ndarray) -> np.ndarray:
    """Y of the front of the vertebral bodies."""
    y, depth, *_ = _spine(z)
    return y + 8 + depth


def _cage(z: float | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half width, half depth and y of the middle of the rib cage."""
    width, depth = _cage_size(z)
    return width, depth, _canal(z) - 20 + depth


def _skin(canvas: LabelCanvas, arms: bool) -> None:
    def trunk(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        width, back, front = _outline(z)
        v = (y - (back + front) / 2) / ((front - back) / 2)
        # Jaw and face are narrower in front; the trunk is boxier than head and neck.
        face = np.exp(-(((z + 55) / 50.0) ** 2))
        power = np.where(z < -150, 2.5, 2.15)
        width = width * (1 - 0.32 * face * v.clip(0, 1) ** 2)
        return (np.abs(x / width) ** power + np.abs(v) ** power <= 1) & (z < 120)

    canvas.paint(BODY, (-260, -160, -2000), (260, 140, 125), trunk, on_background=True)
    canvas.ellipsoid(BODY, (0, 112, -18), (13, 17, 20), on_background=True)  # nose
    for sign in SIDES.values():
        canvas.ellipsoid(BODY, (sign * 76, -2, -15), (9, 17, 28), turn=(0, 0, -sign * 15), on_background=True)  # ear
        if arms:
            path = [(sign * 150, -35, -186), (sign * 188, -33, -192), (sign * 200, -33, -260), (sign * 208, -35, -900)]
            canvas.tube(BODY, path, (38, 46, 45, 38), on_background=True)


def _muscles(canvas: LabelCanvas) -> None:
    heights = (-150, -200, -260, -330, -400, -453, -516, -582, -640)
    for side, sign in SIDES.items():
        back = [(sign * 26, float(_canal(z)) - 26, z) for z in heights]
        canvas.tube(label_id(f"{side} autochthon"), back, (8, 9, 10, 11, 13, 16, 18, 18, 10), stretch=(1.6, 1, 1))
        psoas = [(sign * 38, -38, -460), (sign * 46, -28, -540), (sign * 68, 2, -640), (sign * 98, 0, -715)]
        canvas.tube(label_id(f"{side} iliopsoas"), psoas, (9, 20, 23, 14))
        canvas.ellipsoid(label_id(f"{side} gluteus medius"), (sign * 118, -52, -640), (20, 44, 52))
        canvas.ellipsoid(label_id(f"{side} gluteus maximus"), (sign * 78, -108, -690), (55, 26, 62))


def _base(y: np.ndarray) -> np.ndarray:
    """Z of the underside of the skull: low behind, at the height of the orbits' roofs in front."""
    return -36 + 42 / (1 + np.exp(-(y - 25) / 8))


def _cranium(canvas: LabelCanvas) -> None:
    center, radii, thickness = (0, 4, 36), np.array((71, 90, 76)), 7
    canvas.ellipsoid(BONE, center, radii, 2.3, vary=0, where=lambda x, y, z: z > _base(y))
    inside = radii - thickness
    canvas.ellipsoid(label_id("brain"), center, inside, 2.3, vary=0, where=lambda x, y, z: z > _base(y) + thickness)
    for sign in SIDES.values():
        canvas.ellipsoid(BONE, (sign * 48, 0, -24), (17, 15, 14))  # temporal bone with mastoid
    canvas.tube(BONE, [(0, 22, -26), (0, 38, -8)], 7, stretch=(2.2, 1, 1))  # clivus


def _face(canvas: LabelCanvas) -> None:
    canvas.ellipsoid(BONE, (0, 82, -42), (28, 24, 6))  # palate
    canvas.tube(BONE, [(-26, 72, -50), (-17, 95, -51), (0, 102, -51), (17, 95, -51), (26, 72, -50)], 5)  # upper teeth
    canvas.tube(BONE, [(-14, 97, -8), (0, 108, -2), (14, 97, -8)], 4)  # nasal bones
    for sign in SIDES.values():
        canvas.ellipsoid(BONE, (sign * 30, 76, -24), (17, 20, 17))  # maxilla
        canvas.ellipsoid(BONE, (sign * 33, 78, 6), (22, 24, 20))  # orbit
        canvas.tube(BONE, [(sign * 52, 78, -14), (sign * 64, 50, -14), (sign * 62, 22, -14)], 4)  # zygomatic arch
    for sign in SIDES.values():
        canvas.ellipsoid(BODY, (sign * 33, 84, 6), (17, 25, 15))
        canvas.ellipsoid(AIRWAY, (sign * 30, 75, -24), (12, 15, 12))  # maxillary sinus
        canvas.tube(AIRWAY, [(sign * 7, 106, -26), (sign * 7, 74, -20), (sign * 5, 44, -24)], 5, stretch=(1, 1, 2.4))

    jaw = [(50, 21, -12), (52, 27, -30), (49, 33, -64)]
    body = [(49, 33, -66), (40, 62, -73), (24, 89, -77), (0, 102, -78)]
    for sign in SIDES.values():
        canvas.tube(BONE, [(sign * x, y, z) for x, y, z in jaw], (5, 5, 5.5), stretch=(1, 2, 1))
        canvas.tube(BONE, [(sign * x, y, z) for x, y, z in body], 5.5, stretch=(1, 1, 1.9))


def _dome(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Z of the diaphragm."""
    width, depth, middle = _cage(z)
    crest = np.where(x < 0, -372.0, -358.0)
    slope = ((np.abs(x) - 55) / 85) ** 2 + ((y - middle - 8) / depth) ** 2 * np.where(y > middle + 8, 0.15, 1.0)
    return crest - 50 * np.minimum(slope, 1.2)


def _lungs_and_diaphragm(canvas: LabelCanvas) -> None:
    def lung(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        width, depth, middle = _cage(z)
        inside = (x / (width - 7)) ** 2 + ((y - middle) / (depth - 7)) ** 2 <= 1
        mediastinum = 17 + 10 / (1 + np.exp(-(y - middle) / 6))
        return inside & (np.abs(x) > mediastinum) & (z > _dome(x, y, z)) & (z < -160)

    def lower(y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return z < -288 - 0.9 * (y + 20)  # the oblique fissure rises to the back

    low, high = (-140, -130, -560), (140, 120, -150)
    lobes = {
        "left lung upper lobe": lambda x, y, z: lung(x, y, z) & (x < 0),
        "left lung lower lobe": lambda x, y, z: lung(x, y, z) & (x < 0) & lower(y, z),
        "right lung upper lobe": lambda x, y, z: lung(x, y, z) & (x > 0),
        "right lung middle lobe": lambda x, y, z: lung(x, y, z) & (x > 0) & (z < -300),
        "right lung lower lobe": lambda x, y, z: lung(x, y, z) & (x > 0) & lower(y, z),
    }
    for name, inside in lobes.items():
        canvas.paint(label_id(name), low, high, inside)


def _abdomen(canvas: LabelCanvas) -> None:
    def below_dome(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        width, depth, middle = _cage(z)
        return ((x / (width - 9)) ** 2 + ((y - middle) / (depth - 9)) ** 2 <= 1) & (z < _dome(x, y, z) - 5)

    colon = [(86, 5, -610), (94, 0, -540), (88, 12, -478), (40, 62, -492), (-25, 66, -485), (-86, 8, -446)]
    colon += [(-98, -8, -520), (-94, 0, -600), (-55, 20, -645), (-10, 10, -660), (0, -62, -670), (0, -60, -735)]
    canvas.tube(label_id("colon"), colon, (27, 25, 22, 19, 18, 19, 17, 16, 15, 15, 17, 15))
    loops = canvas.rng.uniform((-58, 12, -620), (58, 78, -510), size=(22, 3))
    canvas.tube(label_id("small bowel"), loops, 13, over=[BODY])

    tissue = [BODY]
    stomach = [(-20, -4, -392), (-48, 18, -402), (-54, 38, -440), (-20, 50, -470), (18, 42, -458)]
    canvas.tube(label_id("stomach"), stomach, (12, 31, 30, 22, 11), where=below_dome)
    liver = label_id("liver")
    canvas.ellipsoid(liver, (62, 0, -412), (88, 84, 78), 2.4, where=below_dome, over=tissue)
    canvas.ellipsoid(liver, (0, 42, -402), (70, 40, 38), where=below_dome, over=tissue)
    canvas.ellipsoid(label_id("gallbladder"), (42, 48, -468), (13, 14, 26), turn=(20, 0, 0))
    for side, sign, height in (("left", -1, -468), ("right", 1, -480)):
        # A ring of fat around the kidney, so that it does not melt into the liver.
        canvas.ellipsoid(BODY, (sign * 62, -40, height), (32, 30, 60), turn=(0, sign * 12, 0), over=[liver])
        canvas.ellipsoid(label_id(f"{side} kidney"), (sign * 62, -40, height), (27, 25, 53), turn=(0, sign * 12, 0))
        canvas.ellipsoid(label_id(f"{side} adrenal gland"), (sign * 38, -30, height + 52), (6, 9, 13))
    canvas.ellipsoid(label_id("spleen"), (-96, -42, -418), (29, 46, 54), turn=(0, 0, 20), where=below_dome, over=tissue)
    canvas.tube(label_id("duodenum"), [(22, 40, -460), (46, 22, -470), (48, 10, -508), (8, 8, -514)], 12)
    pancreas = [(32, 16, -472), (2, 22, -462), (-35, 8, -448), (-72, -16, -432)]
    canvas.tube(label_id("pancreas"), pancreas, (14, 11, 10, 8))
    portal = [(48, 20, -415), (18, 14, -440), (-10, 10, -452), (-64, -14, -436)]
    canvas.tube(label_id("portal vein and splenic vein"), portal, (6, 7, 5, 4))


def _pelvis(canvas: LabelCanvas) -> None:
    canvas.ellipsoid(label_id("bladder"), (0, 22, -708), (40, 34, 32))
    canvas.ellipsoid(label_id("prostate"), (0, 8, -752), (22, 17, 17))
    sacrum = [(0, float(_front(-612)) - 16, -628), (0, -92, -660), (0, -104, -695), (0, -96, -722)]
    canvas.tube(label_id("sacrum"), sacrum, (19, 17, 12, 7), stretch=(2.6, 1, 1))
    for side, sign in SIDES.items():
        hip, femur = label_id(f"{side} hip"), label_id(f"{side} femur")
        canvas.ellipsoid(hip, (sign * 93, -42, -628), (8, 58, 62), 2.3, turn=(0, sign * 18, -sign * 32))
        canvas.ellipsoid(hip, (sign * 94, -32, -704), (32, 32, 32))
        canvas.tube(hip, [(sign * 80, -20, -708), (sign * 45, 18, -722), (sign * 10, 30, -738)], (10, 7, 9))
        canvas.tube(hip, [(sign * 82, -48, -718), (sign * 68, -62, -770)], 14)
        canvas.tube(hip, [(sign * 64, -58, -772), (sign * 10, 26, -748)], 7)
        canvas.ellipsoid(BODY, (sign * 98, -30, -706), (27, 27, 27), vary=0)  # joint
        canvas.tube(femur, [(sign * 98, -30, -706), (sign * 99, -30, -707)], 23, vary=0)
        canvas.tube(femur, [(sign * 98, -30, -706), (sign * 140, -38, -740), (sign * 138, -30, -900)], (16, 20, 15))


def _vertebrae(canvas: LabelCanvas) -> None:
    for name, z in _VERTEBRAE.items():
        label = label_id(f"vertebrae {name}")
        y, depth, width, height = (float(value) for value in _spine(z))
        if name != "C1":  # the atlas has no body
            middle = (0, y + 8 + depth / 2, z)
            canvas.ellipsoid(label, middle, (width / 2, depth / 2, height / 2 + 0.5), 3.5, vary=0.03)
        canvas.ellipsoid(label, (0, y, z - 1), (width / 2 + 3, 14, height * 0.4), 2.3)  # arch, hollowed by the canal
        long = {"C": 22.0, "T": 26.0, "L": 30.0, "S": 14.0}[name[0]] * (0.6 if name in ("C1", "C3", "C4") else 1)
        drop = 14 if name[0] == "T" else 5
        canvas.tube(label, [(0, y - 11, z - 3), (0, y - 8 - long, z - 3 - drop)], 3.5, stretch=(0.9, 1, 1.3))
        for sign in SIDES.values():
            tip = (sign * (width / 2 + 12), y - (8 if name[0] == "T" else 2), z)
            canvas.tube(label, [(sign * width / 2 * 0.8, y + 2, z), tip], 3.5)


def _ribs(canvas: LabelCanvas) -> None:
    sternum = [(0, 40, -204), (0, 52, -232), (0, 66, -285), (0, 74, -345)]
    levels = [_VERTEBRAE[f"T{number}"] for number in range(1, 13)]
    for number, top in enumerate(levels, start=1):
        drop = (22, 32, 42, 50, 56, 62, 68, 72, 74, 70, 52, 40)[number - 1]
        end = 148 if number <= 7 else {8: 138, 9: 126, 10: 112, 11: 85, 12: 62}[number]
        angle = np.radians(np.linspace(9, end, 10))
        z = top - drop * (1 - np.cos(angle)) / 2
        width, depth, middle = _cage(z)
        for side, sign in SIDES.items():
            rib = np.stack([sign * width * np.sin(angle), middle - depth * np.cos(angle), z], axis=1)
            rib = np.concatenate([[(sign * 15, float(_canal(top)) + 10, top)], rib])
            canvas.tube(label_id(f"{side} rib {number}"), rib, 4.2, stretch=(1, 1, 1.3), vary=0.03)
            if number <= 7:
                height = np.interp(number, (1, 7), (-214, -335))
                insertion = (sign * 16, float(np.interp(-height, (204, 345), (42, 73))), height)
                canvas.tube(label_id("costal cartilages"), [rib[-1], insertion], 4.2, vary=0.03)
    canvas.tube(label_id("sternum"), sternum, (7, 6, 5.5, 4), stretch=(2.8, 1, 1))


def _shoulders(canvas: LabelCanvas, arms: bool) -> None:
    for side, sign in SIDES.items():
        clavicula = [(12, 42, -206), (55, 36, -188), (105, 4, -168), (148, -28, -163)]
        canvas.tube(label_id(f"{side} clavicula"), [(sign * x, y, z) for x, y, z in clavicula], (7, 5.5, 5.5, 6))
        scapula = label_id(f"{side} scapula")
        canvas.ellipsoid(scapula, (sign * 110, -72, -232), (42, 5.5, 62), turn=(0, -sign * 12, sign * 28))
        spine = [(sign * 78, -94, -195), (sign * 125, -78, -178), (sign * 162, -42, -166)]
        canvas.tube(scapula, spine, (4, 6, 6))
        canvas.tube(scapula, [(sign * 125, -62, -200), (sign * 146, -45, -192)], (6, 12))  # neck and glenoid
        if arms:
            humerus = [(176, -33, -192), (180, -33, -196), (194, -33, -240), (205, -35, -900)]
            canvas.tube(label_id(f"{side} humerus"), [(sign * x, y, z) for x, y, z in humerus], (23, 22, 12, 11))


def _vessels_and_heart(canvas: LabelCanvas) -> None:
    def prevertebral(x: float, offset: float, *heights: float) -> list[tuple[float, float, float]]:
        return [(x, float(_front(z)) + offset, z) for z in heights]

    canvas.ellipsoid(label_id("heart"), (-22, 24, -318), (50, 42, 60), turn=(28, -32, 0))
    aorta: list[Point] = [(2, 18, -288), (10, 22, -262), (2, 8, -242), (-16, -22, -244)]
    aorta += prevertebral(-20, 8, -275, -340) + prevertebral(-8, 11, -420, -545)
    canvas.tube(label_id("aorta"), aorta, (15, 15, 14, 13, 12, 12, 11, 9))
    cava = prevertebral(18, 11, -548, -480, -420) + [(24, 2, -372), (18, 6, -350)]
    canvas.tube(label_id("inferior vena cava"), cava, (10, 11, 12, 12, 12))
    canvas.tube(label_id("superior vena cava"), [(26, 22, -238), (24, 18, -290)], 9)
    canvas.tube(label_id("brachiocephalic trunk"), [(8, 14, -236), (16, 8, -205)], 6)
    for side, sign in SIDES.items():
        canvas.tube(label_id(f"{side} brachiocephalic vein"), [(sign * 42, 20, -192), (24, 26, -232)], 6)
        subclavian = [(sign * 15, 2, -215), (sign * 40, 2, -182), (sign * 95, -12, -190)]
        canvas.tube(label_id(f"{side} subclavian artery"), subclavian, 4.5)
        carotid = [(sign * 24, 26, -72), (sign * 23, 24, -112), (sign * 21, 14, -152), (sign * 14, 2, -200)]
        canvas.tube(label_id(f"{side} common carotid artery"), carotid, 3.8)
        iliac = prevertebral(sign * 12, 9, -552)
        iliac += [(sign * 42, -18, -632), (sign * 68, 26, -712), (sign * 72, 42, -780)]
        canvas.tube(label_id(f"{side} iliac artery"), iliac, (6, 6, 5, 5))
        vein = [(x - 4 * sign, y - 12, z) for x, y, z in iliac[:3]]
        canvas.tube(label_id(f"{side} iliac vena"), vein, 6.5)


def _throat(canvas: LabelCanvas) -> None:
    for side, sign in SIDES.items():
        gland = (sign * 58, 23, -44)
        canvas.ellipsoid(PAROTID[side], gland, (12, 18, 24), turn=(12, 0, 0), over=[BODY])
        lobe = (sign * 15, float(_front(-150)) + 22, -148)
        canvas.ellipsoid(label_id("thyroid gland"), lobe, (8, 10, 19))
    esophagus = [(0, float(_front(z)) + 6, z) for z in (-146, -180, -230, -290, -350)] + [(-18, 0, -386)]
    canvas.tube(label_id("esophagus"), esophagus, (5.5, 6, 6.5, 7, 7, 8))
    canvas.tube(AIRWAY, [(0, 44, -22), (0, 38, -42), (0, 35, -68), (0, 35, -92), (0, 35, -138)], (9, 8, 7, 8, 7))
    trachea = [(0, 35, -136)] + [(0, float(_front(z)) + 21, z) for z in (-155, -180, -230, -256)]
    canvas.tube(label_id("trachea"), trachea, (7, 8, 8.5, 9, 9))
    for sign in SIDES.values():
        start = trachea[-1]
        canvas.tube(label_id("trachea"), [start, (sign * 40, start[1] - 8, -285)], (8, 5.5))
    canvas.ellipsoid(LARYNX, (0, 35, -120), (16, 17, 15), 2.3)  # with its lumen, as OpenKBP delineates it


def _cord(canvas: LabelCanvas) -> None:
    heights = (-30, -60, -90, -120, -150, -180, -210, -240, -280, -330, -390, -430, -468)
    cord = [(0, float(_canal(z)), z) for z in heights]
    canal = cord + [(0, float(_canal(z)), z) for z in (-500, -540, -580, -610)]
    canvas.tube(BODY, canal, 8.5, vary=0)
    canvas.tube(BRAINSTEM, [(0, 0, -32), (0, 1, -14), (0, 2, 4), (0, 0, 18)], (8, 11, 14, 13))
    canvas.tube(label_id("spinal cord"), cord, 5.5)
