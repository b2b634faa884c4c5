"""Where the body is: its envelope from a CT or from labels, the body label, and masks completed from a CT."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from maisi_tools.errors import InputError
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.masks.vocabulary import BODY, VOCABULARY, label_id, labels_in_group

SKIN_HU = -300.0
"""Above it is tissue: fat has -100 HU, air -1000, and a voxel across the skin lies between."""

OPENING_MM = 6.0
"""What is thinner than twice this, such as a table top or a thermoplastic mask, is no body."""

SMALLEST_PART = 0.05
"""Separate parts, such as an arm, belong to the body from this share of the largest part's volume on."""

CLOSING_MM = 60.0
"""Without a CT, gaps between labels up to about this wide lie inside the body."""

MARGIN_MM = 20.0
"""Without a CT, the depth of the soft tissue around the outermost labels; fits adults with ribs and hips labelled."""

COUCH_HU, COUCH_SHARE = -800.0, 0.05
"""Foam or air inside a couch is below it, and takes at least this share of the body: 8 to 28 % (NV-Generate-CTMR)."""

ONE_SIDED = 0.25
"""Less than this share of the tissue lies behind a couch, or in front of it; lungs have tissue on both sides."""

AIR_HU = -400.0
"""Below it is air or lung, inside the body."""

LUNG_HU = (-950.0, -500.0)
"""Mean HU of aerated lung parenchyma: below it is air alone, as in trachea, bowel or stomach."""

BONE_HU = 250.0
"""Above it is bone: trabecular bone at a few millimetres of resolution has 200 to 400 HU, cortical bone more."""

LANDMARKS = 3
"""Organs that a mask must share with the template, for a body to be fitted by them."""

SIZE_PRIOR_MM = 30.0
"""Landmarks that spread less than this about their centre tell little of a patient's size: an average one is taken."""

ALL_LUNG, ALL_BONE = label_id("left lung upper lobe"), label_id("skull")
"""Labels that stand for all lung and all bone where these are found by their HU."""

LUNG_ML, BONE_ML = 30.0, 0.3
"""Smallest connected volumes that are taken for lung and for bone; smaller dense ones are calcification or noise."""

_COARSE_MM = 3.0
"""Distances of several millimetres, and tissues, are computed on a grid no finer than this."""

_TEMPLATE_SIZE, _TEMPLATE_MM = (96, 64, 220), 5.0
_NO_LANDMARKS = ("airway", "body", "bowel", "nerve", "vessel")

_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[:, 1, 1] = _IN_PLANE[1, :, 1] = True


def body_envelope(ct_hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """What lies inside the skin, airways and lungs included.

    Tissue is thresholded, and what it encloses in an axial plane is filled; thin things (table, mask, blankets) are
    removed by an opening, and the large parts that are left are taken. Parts of a volume that were never reconstructed
    (-1000 HU) count as air, so a body that ends in a plane is fine.

    Args:
        ct_hu: (X, Y, Z) in HU, the third axis along the patient's.
        spacing: mm along x, y, z.

    Returns:
        Boolean array of the same shape; all False where there is no tissue.

    Raises:
        InputError: not three axes, or a spacing that is not positive.
    """
    mm = checked_spacing(ct_hu.shape, spacing)
    tissue = ct_hu > SKIN_HU
    return _large_parts(tissue, _filled(tissue), mm)


def without_couch(
    body: np.ndarray, ct_hu: np.ndarray, spacing: Sequence[float], labels: np.ndarray | None = None
) -> np.ndarray:
    """An envelope without the couch that the patient lies on, where their outlines had run into one.

    A couch is a shell around foam or air. Each connected part below :data:`COUCH_HU` that no label claims, with at
    least :data:`COUCH_SHARE` of the body's volume and the patient on one side of it, is taken for its inside. The shell
    is as thick as that part is deep: a quarter of the part's surface lies no deeper below the envelope's.

    Args:
        body: (X, Y, Z), as :func:`body_envelope` gives it.
        ct_hu: the same shape, in HU, its second axis from back to front or from front to back.
        spacing: mm along x, y, z.
        labels: the same shape, 0 where nothing is known.

    Returns:
        Boolean array of the same shape; `body` itself where there is no couch.

    Raises:
        InputError: the shapes differ, or as :func:`body_envelope`.
    """
    _check_same(ct_hu, body)
    mm = checked_spacing(body.shape, spacing)
    hollow = body & (ct_hu < COUCH_HU)
    tissue = body & (ct_hu > SKIN_HU)
    if labels is not None:
        hollow &= labels == 0
    coarse_hollow, steps = _coarsen(hollow, mm, np.mean)
    coarse_body, coarse_tissue = ((_coarsen(mask, mm, np.mean)[0] >= 0.5) for mask in (body, tissue))
    coarse_mm = mm * steps
    parts, _ = ndimage.label(coarse_hollow >= 0.5)
    large = np.bincount(parts.ravel()) >= max(1.0, COUCH_SHARE * np.count_nonzero(coarse_body))
    couch = np.zeros(parts.shape, dtype=bool)
    for number in np.flatnonzero(large[1:]) + 1:
        part = parts == number
        middle, planes = int(np.nonzero(part)[1].mean()), part.any(axis=(0, 1))
        there = coarse_tissue[:, :, planes]
        behind, whole = np.count_nonzero(there[:, :middle]), np.count_nonzero(there)
        if ONE_SIDED * whole <= behind <= (1 - ONE_SIDED) * whole:
            continue
        surface = part & ~ndimage.binary_erosion(part, border_value=1)
        thickness = np.percentile(_distance(coarse_body, coarse_mm)[surface], 25)
        couch |= _distance(~part, coarse_mm) < thickness
    if not couch.any():
        return body
    rest = body & ~_refine(couch, steps, body.shape)
    return _large_parts(tissue & rest, rest, mm)


def _large_parts(tissue: np.ndarray, solid: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The thick and large parts of a filled outline (X, Y, Z), with the tissue inside it."""
    coarse_tissue, steps = _coarsen(tissue, spacing, np.mean)
    coarse_solid, _ = _coarsen(solid, spacing, np.mean)
    mm = spacing * steps
    # Opened with the lungs filled, since the wall of a chest is thin; measured in tissue, since a table is hollow.
    parts, _ = ndimage.label(_distance(coarse_solid >= 0.5, mm) > OPENING_MM)
    sizes = np.bincount(parts[_distance(coarse_tissue >= 0.5, mm) > OPENING_MM], minlength=parts.max() + 1)
    sizes[0] = 0
    kept = ((sizes > 0) & (sizes >= SMALLEST_PART * sizes.max()))[parts]
    if not kept.any():
        return np.zeros(tissue.shape, dtype=bool)
    near = _distance(~kept, mm) <= OPENING_MM + mm.max()
    return _filled(solid & _refine(near, steps, tissue.shape))


def envelope_of_labels(labels: np.ndarray, spacing: Sequence[float], margin_mm: float = MARGIN_MM) -> np.ndarray:
    """A smooth body around all labels, for masks without a CT.

    The labels are closed (with a ball of :data:`CLOSING_MM`), dilated by `margin_mm`, and filled in axial
    planes.

    Args:
        labels: (X, Y, Z), 0 is the background.
        spacing: mm along x, y, z.
        margin_mm: depth of the tissue outside the labels.

    Returns:
        Boolean array of the same shape, True at least where a label is; all False for a mask without labels.

    Raises:
        InputError: not three axes, or a spacing that is not positive.
    """
    mm = checked_spacing(labels.shape, spacing)
    present = labels > 0
    if not present.any():
        return present
    coarse, steps = _coarsen(present, mm, np.max)
    mm = mm * steps
    # Room for what the dilation reaches outside the volume; above and below, the body goes on as it is.
    room = np.ceil((CLOSING_MM + margin_mm) / mm).astype(int) + 1
    padded = np.pad(coarse, [(room[0],) * 2, (room[1],) * 2, (0, 0)])
    padded = np.pad(padded, [(0, 0), (0, 0), (room[2],) * 2], mode="edge")
    reached = _distance(~padded, mm) <= CLOSING_MM + margin_mm
    closed = _distance(reached, mm) > CLOSING_MM
    inner = tuple(slice(n, n + size) for n, size in zip(room, coarse.shape, strict=True))
    return _filled(_refine(closed[inner], steps, present.shape) | present)


def envelope_of_organs(labels: np.ndarray, spacing: Sequence[float]) -> np.ndarray | None:
    """The skin of the procedural anatomy, laid around the organs of a mask that has few of them.

    The template is moved and scaled so that the centres of the organs it shares with the mask meet (least squares,
    the scale drawn towards 1, see :data:`SIZE_PRIOR_MM`). Tubes such as the spinal cord are no landmarks, since a mask
    has any length of them, nor are organs that the volume cuts, nor the skull, of which a mask may have the mandible
    alone.

    Args:
        labels: (X, Y, Z) in the vocabulary, RAS axes.
        spacing: mm along x, y, z.

    Returns:
        Boolean array of the same shape, True at least where a label is. None where the mask shares fewer than
        :data:`LANDMARKS` organs with the template, or has the bones and muscles of the body wall, which tell better
        where the skin is (:func:`envelope_of_labels`).

    Raises:
        InputError: not three axes, or a spacing that is not positive.
    """
    mm = checked_spacing(labels.shape, spacing)
    present = [VOCABULARY[int(id)] for id in np.unique(labels) if int(id) in VOCABULARY]
    if any(label.side and label.group in ("bone", "muscle") for label in present):
        return None
    centers = _landmarks(labels, mm)
    template, landmarks = _template("torso")
    shared = sorted(centers.keys() & landmarks.keys())
    if len(shared) < LANDMARKS:
        return None
    # Heads and necks are scanned with the arms down, trunks with the arms up.
    if np.mean([landmarks[id][2] for id in shared]) > landmarks[label_id("thyroid gland")][2]:
        template, landmarks = _template("head_neck")
    here, there = (np.array([points[id] for id in shared]) for points in (centers, landmarks))
    middle, goal = here.mean(axis=0), there.mean(axis=0)
    prior = len(shared) * SIZE_PRIOR_MM**2
    scale = (((here - middle) * (there - goal)).sum() + prior) / (((here - middle) ** 2).sum() + prior)
    body = ndimage.affine_transform(
        template, scale * mm / _TEMPLATE_MM, (goal - scale * middle) / _TEMPLATE_MM, labels.shape, order=1
    )
    return _filled((body > 0.5) | (labels > 0))


def add_body(labels: np.ndarray, spacing: Sequence[float], ct: np.ndarray | None = None) -> np.ndarray:
    """The mask with :data:`~maisi_tools.masks.vocabulary.BODY` where no label is but the body.

    Args:
        labels: (X, Y, Z) in the vocabulary.
        spacing: mm along x, y, z.
        ct: the same shape, in HU; the body is taken from it. Without it a body is drawn around the labels, whose axes
            are RAS: :func:`envelope_of_organs` where that applies, else :func:`envelope_of_labels`.

    Returns:
        A copy with the body, or `labels` itself when it has the body label already.

    Raises:
        InputError: the CT has another shape, or as :func:`body_envelope`.
    """
    if (labels == BODY).any():
        return labels
    if ct is not None:
        _check_same(ct, labels)
    envelope = envelope_of_organs(labels, spacing) if ct is None else body_envelope(ct, spacing)
    if envelope is None:
        envelope = envelope_of_labels(labels, spacing)
    return np.where(envelope & (labels == 0), BODY, labels).astype(labels.dtype)


def label_from_ct(
    ct_hu: np.ndarray, labels: np.ndarray, spacing: Sequence[float], body: np.ndarray | None = None
) -> np.ndarray:
    """A mask completed by what the CT's intensities alone tell, so that weights can be trained on few organs.

    Inside the body and outside all given labels, air becomes "airway" or, where it has the HU and the volume of lung,
    :data:`ALL_LUNG`; dense components become :data:`ALL_BONE`; the rest becomes body. Labels that are given stay, so
    air inside a larynx label remains larynx.

    Args:
        ct_hu: (X, Y, Z) in HU.
        labels: (X, Y, Z) in the vocabulary, may be empty.
        spacing: mm along x, y, z.
        body: (X, Y, Z), None for that of :func:`body_envelope`.

    Returns:
        uint8 array of the same shape, 0 outside the body.

    Raises:
        InputError: the shapes differ, or as :func:`body_envelope`.
    """
    _check_same(ct_hu, labels)
    mm = checked_spacing(ct_hu.shape, spacing)
    voxel_ml = float(np.prod(mm)) / 1000
    completed = labels.astype(np.uint8)
    free = (body_envelope(ct_hu, spacing) if body is None else body) & (labels == 0)
    completed[free] = BODY

    air = free & (ct_hu < AIR_HU)
    completed[air] = label_id("airway")
    completed[air & _lung(ct_hu, air, mm)] = ALL_LUNG

    bone = free & (ct_hu > BONE_HU)
    parts, _ = ndimage.label(bone, np.ones((3, 3, 3)))
    large = np.bincount(parts.ravel()) * voxel_ml >= BONE_ML
    completed[bone & large[parts]] = ALL_BONE
    return completed


def tissues(
    ct_hu: np.ndarray, labels: np.ndarray, spacing: Sequence[float], body: np.ndarray | None = None
) -> np.ndarray:
    """:func:`label_from_ct` in blocks of up to :data:`_COARSE_MM`, about as coarse as weights of few labels are.

    A block is one tissue: what the mean HU of its voxels inside the body and outside all labels tells, and only these
    get it. Labels that are given stay, to the voxel. Arguments, result and errors are those of :func:`label_from_ct`.
    """
    _check_same(ct_hu, labels)
    mm = checked_spacing(ct_hu.shape, spacing)
    free = labels == 0 if body is None else (labels == 0) & body
    # With the HU of a labelled lung in it, the chest wall beside it would be air, as the skin with the air's.
    weight = np.where(free, 1, 1e-6).astype(np.float32)
    hu = _coarsen(ct_hu * weight, mm, np.mean)[0] / _coarsen(weight, mm, np.mean)[0]
    some, steps = _coarsen(free, mm, np.max)
    given = np.where(some, 0, BODY).astype(np.uint8)
    found = label_from_ct(hu, given, (mm * steps).tolist(), None if body is None else some)
    return np.where(free, _refine(found, steps, labels.shape), labels).astype(np.uint8)


def labels_of_more(present: Iterable[int] = ()) -> set[int]:
    """The ids under which a mask may have more than the organ they name, so that nobody can be asked to find that.

    A mask that was completed by HU (:func:`label_from_ct`) has all bone as "skull", or all that its data set has not
    labelled, and all lung as one lobe. So have masks that were merged.

    Args:
        present: the mask's ids, in the vocabulary.

    Returns:
        The bones, and :data:`ALL_LUNG` where it is the mask's only lobe.
    """
    lobes = set(labels_in_group("lung")).intersection(map(int, present))
    return set(labels_in_group("bone")) | (lobes if lobes == {ALL_LUNG} else set())


class AddBodyd(MapTransform):
    """MONAI dict transform of :func:`add_body` for masks (1, X, Y, Z), RAS, with an affine to read the spacing from.

    Args:
        keys: of the masks, `MetaTensor` in the vocabulary.
        ct_key: of a CT in HU on the same grid; None draws the body around the labels.
    """

    def __init__(self, keys: KeysCollection, ct_key: str | None = None) -> None:
        super().__init__(keys)
        self.ct_key = ct_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        ct = None if self.ct_key is None else torch.as_tensor(items[self.ct_key])[0].cpu().numpy()
        for key in self.key_iterator(items):
            mask: MetaTensor = items[key]
            labels = mask.as_tensor()[0].cpu().numpy()
            completed = torch.from_numpy(add_body(labels, [float(mm) for mm in mask.pixdim], ct))[None]
            items[key] = MetaTensor(
                completed.to(mask.device), meta=mask.meta, applied_operations=mask.applied_operations
            )
        return items


@functools.cache
def _template(kind: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The body of a phantom that reaches from the vertex to the thighs, float32, and its landmarks in mm."""
    labels = make_phantom(kind, _TEMPLATE_SIZE, (_TEMPLATE_MM,) * 3, seed=0)
    return (labels > 0).astype(np.float32), _landmarks(labels, np.full(3, _TEMPLATE_MM))


def _landmarks(labels: np.ndarray, spacing: np.ndarray) -> dict[int, np.ndarray]:
    """Organ -> its centre in mm from the first voxel, of organs that have a shape of their own and are whole."""
    faces = [labels.take(end, axis) for axis in range(3) for end in (0, -1)]
    cut = {int(id) for face in faces for id in np.unique(face)}
    whole = [
        int(id)
        for id in np.unique(labels)
        if id and int(id) not in cut and VOCABULARY[int(id)].group not in _NO_LANDMARKS and id != ALL_BONE
    ]
    middles = ndimage.center_of_mass(labels > 0, labels, whole)
    return {id: np.array(middle) * spacing for id, middle in zip(whole, middles, strict=True)}


def _lung(ct_hu: np.ndarray, air: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Voxels in or beside large air components whose mean HU is that of lung; bronchi and trachea stay outside."""
    # Averaged over about 1 cm, lung with its vessels is denser than the air of a trachea, whatever the noise.
    smooth = ndimage.gaussian_filter(ct_hu.astype(np.float32), 3.0 / spacing)
    core = _distance(air & (smooth > LUNG_HU[0]), spacing) > OPENING_MM
    parts, count = ndimage.label(core)
    lung = np.zeros(air.shape, dtype=bool)
    for part in range(1, count + 1):
        inside = parts == part
        volume = np.count_nonzero(inside) * np.prod(spacing) / 1000
        if volume >= LUNG_ML and LUNG_HU[0] < ct_hu[inside].mean() < LUNG_HU[1]:
            lung |= inside
    # Back to the surface that the opening took away.
    return _distance(~lung, spacing) <= OPENING_MM + spacing.max() if lung.any() else lung


def checked_spacing(shape: tuple[int, ...], spacing: Sequence[float]) -> np.ndarray:
    """The spacing of a volume of `shape` as an array.

    Raises:
        InputError: not three axes, or spacings that are not three positive numbers of mm.
    """
    mm = np.asarray(spacing, dtype=float)
    if len(shape) != 3 or mm.shape != (3,) or not (np.isfinite(mm) & (mm > 0)).all():
        raise InputError(
            f"the volume has the shape {shape} and the spacing {list(spacing)} mm; allowed are three axes and three "
            "positive spacings: pass one volume (X, Y, Z) and its spacing"
        )
    return mm


def _check_same(ct: np.ndarray, labels: np.ndarray) -> None:
    if ct.shape != labels.shape:
        raise InputError(
            f"the CT has the shape {ct.shape}, its mask {labels.shape}; allowed is the same grid for both: resample "
            "the mask to the CT with nearest neighbour"
        )


def _distance(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Mm from each voxel of `mask` to the nearest voxel outside it; the border of the volume is no outside."""
    if mask.all():
        return np.full(mask.shape, np.inf)
    return ndimage.distance_transform_edt(mask, sampling=spacing)


def _coarsen(mask: np.ndarray, spacing: np.ndarray, reduce: Any) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of `steps` voxels reduced to one, so that none is finer than needed; and the steps along x, y, z."""
    steps = np.maximum(1, np.floor(_COARSE_MM / spacing)).astype(int)
    padded = np.pad(mask, [(0, -size % step) for size, step in zip(mask.shape, steps, strict=True)], mode="edge")
    x, y, z = (size // step for size, step in zip(padded.shape, steps, strict=True))
    return reduce(padded.reshape(x, steps[0], y, steps[1], z, steps[2]), axis=(1, 3, 5)), steps


def _refine(coarse: np.ndarray, steps: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo :func:`_coarsen`: every voxel of a block gets the block's value."""
    for axis, step in enumerate(steps):
        coarse = coarse.repeat(step, axis=axis)
    return coarse[: shape[0], : shape[1], : shape[2]]


def _filled(mask: np.ndarray) -> np.ndarray:
    """With every hole that does not reach the border of its axial plane filled (each plane for itself)."""
    parts, count = ndimage.label(~mask, _IN_PLANE)
    outside = np.zeros(count + 1, dtype=bool)
    for face in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        outside[face.ravel()] = True
    return mask | ~outside[parts]
