"""The body in a CT, by threshold and morphology; and in which parts of the body a volume begins and ends.

Sizes are in millimetres, sides of boxes: 4.5 and 7.5 mm are the 3 and 5 voxels of MAISI's grid of 1.5 mm.
Label values are MAISI's, or those that a dictionary gives to the same names.
"""

from collections.abc import Collection, Sequence

import numpy as np
from scipy import ndimage

from ldm import UserError
from ldm.data.label_names import words_key
from ldm.data.reading import label_type

AIR = -800.0  # HU, below which lies air
CLOSING, OPENING = 4.5, 7.5  # mm
BODY = 200  # the value of what has no other label, as in MAISI
LUNGS = {
    "left lung upper lobe": 28,
    "left lung lower lobe": 29,
    "right lung upper lobe": 30,
    "right lung middle lobe": 31,
    "right lung lower lobe": 32,
}
ABDOMEN = {"liver": 1, "kidney": 2, "spleen": 3, "pancreas": 4, "right kidney": 5, "left kidney": 14}
REGIONS = (  # from the top to the bottom: head, chest, abdomen, lower body
    {"brain": 22, "skull": 120},
    LUNGS,
    ABDOMEN,
    {"left femur": 93, "right femur": 94},
)


def values_of(organs: dict[str, int], dictionary: dict[str, int] | None) -> set[int]:
    """The label values of some organs: those of a dictionary (values by name) that names one of them, in any
    order of its words; without a dictionary MAISI's."""
    if dictionary is None:
        return set(organs.values())
    wanted = {words_key(name) for name in organs}
    return {value for name, value in dictionary.items() if words_key(name) in wanted}


def region_indices(
    values: Collection[int], dictionary: dict[str, int] | None = None
) -> tuple[list[int], list[int]] | None:
    """Where a volume begins and ends: the uppermost and the lowest of head, chest, abdomen and lower body
    that it holds an organ of, each as four numbers of which one is 1. None: it holds no such organ.

    Args:
        values: that its label holds.
        dictionary: as of `values_of`.
    """
    there = [i for i, organs in enumerate(REGIONS) if values_of(organs, dictionary) & {*values}]
    if not there:
        return None
    top, bottom = ([int(i == one) for i in range(len(REGIONS))] for one in (there[0], there[-1]))
    return top, bottom


def body_mask(
    voxels: np.ndarray, spacing: Sequence[float], label: np.ndarray, dictionary: dict[str, int] | None = None
) -> np.ndarray:
    """The body in a CT: (X, Y, Z) bool.

    Air is what lies below -800 HU and has no label: its largest part, and all parts that reach the left,
    right, front or back of the volume. It is closed; the rest is the body, with the air in it. Where lungs
    are labelled, the body is eroded, and what is dilated again and closed is its largest part alone, without
    the table. (Elsewhere the largest part may be one of two legs.)

    Args:
        voxels: (X, Y, Z) in Hounsfield units, RAS.
        spacing: in mm.
        label: (X, Y, Z), 0 where there is none.
        dictionary: as of `values_of`.

    Raises:
        UserError: nothing lies below -800 HU, or everything.
    """
    low = (voxels < AIR) & (label == 0)
    if not low.any():
        raise UserError(f"no voxel without a label is below {AIR:g} HU: --body is for CT with air around it")
    parts, _ = ndimage.label(low)
    faces = [parts[0], parts[-1], parts[:, 0], parts[:, -1]]
    outside = np.unique(np.concatenate([face.ravel() for face in faces]))
    outside = np.union1d(outside, [_largest(parts)])
    body = ~_closed(np.isin(parts, outside[outside > 0]), spacing)
    if np.isin(label, [*values_of(LUNGS, dictionary)]).any():
        parts, count = ndimage.label(_box(ndimage.minimum_filter, body, OPENING, spacing))
        if count:
            body = _box(ndimage.maximum_filter, parts == _largest(parts), OPENING, spacing)
            body = _closed(body, spacing)
    if not body.any():
        raise UserError("everything is air: is it a CT in Hounsfield units?")
    return body


def with_body(
    label: np.ndarray, voxels: np.ndarray, spacing: Sequence[float], value: int, dictionary: dict | None
) -> np.ndarray:
    """The label with this value wherever the body has none; arguments as of `body_mask`."""
    body = body_mask(voxels, spacing, label, dictionary)
    label_kind = label_type([value, label.max()])
    return np.where((label == 0) & body, value, label).astype(label_kind)


def _largest(parts: np.ndarray) -> int:
    return int(np.bincount(parts.ravel())[1:].argmax()) + 1


def _box(change, mask: np.ndarray, side: float, spacing: Sequence[float]) -> np.ndarray:
    """A mask after an erosion (`minimum_filter`) or a dilation (`maximum_filter`) by a box, whose side in
    voxels is the nearest odd number; beyond the edges the mask goes on."""
    voxels = [2 * round((side / one - 1) / 2) + 1 for one in spacing]
    return change(mask.astype(np.uint8), [max(1, one) for one in voxels], mode="nearest").astype(bool)


def _closed(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    wide = _box(ndimage.maximum_filter, mask, CLOSING, spacing)
    return _box(ndimage.minimum_filter, wide, CLOSING, spacing)
