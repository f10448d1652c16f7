"""How bright structures are: what the intensities of generated ones are checked against."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ldm import UserError
from ldm.data.cases import Case
from ldm.data.preprocessing import Preprocessing

LEAST_VOXELS = 5  # of a structure, below which its median says little
MOST_CASES = 64  # that are read for the usual medians


def medians(image: np.ndarray, label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """The median intensity of each structure, (L, C); NaN where it has fewer than `LEAST_VOXELS`.

    Args:
        image: (C, D, H, W).
        label: (D, H, W).
        values: of the structures.
    """
    found = np.full((len(values), len(image)), np.nan)
    for i, value in enumerate(values):
        inside = image[:, label == value]
        if inside.shape[1] >= LEAST_VOXELS:
            found[i] = np.median(inside, 1)
    return found


def usual_medians(
    preprocessing: Preprocessing, cases: Sequence[Case], values: Sequence[int]
) -> dict[str, list[list[float]]]:
    """Mean and standard deviation over scans of each structure's median, in the unit range: for each value,
    which is a text as keys of JSON are, and channel. Structures that fewer than two scans have are left out.

    Args:
        cases: with labels; the first `MOST_CASES` that have an image are read.
    """
    scans = [case for case in cases if not case.is_embedding][:MOST_CASES]

    def measured(case: Case) -> np.ndarray:
        spacing = case.spacing or preprocessing.spacing
        image = replace(preprocessing, labels=(), spacing=spacing)(case.images)
        mask = replace(preprocessing, labels=tuple(values), spacing=spacing).mask(case.label)
        if image.shape[1:] != mask.shape:
            raise UserError(
                f"{case.label}: its grid {mask.shape} is not that of its image {image.shape[1:]}."
            )
        return medians(image, mask, values)

    found = np.stack([measured(case) for case in scans]) if scans else np.empty((0, len(values), 1))
    usual = {}
    for i, value in enumerate(values):
        known = found[~np.isnan(found[:, i, 0]), i]
        if len(known) > 1:
            usual[str(value)] = np.stack([known.mean(0), known.std(0, ddof=1)], 1).tolist()
    return usual


def structures_of(preprocessing: Preprocessing, cases: Sequence[Case]) -> dict:
    """The entry `structures` of a geometry, `usual_medians`, where images have labels; else nothing."""
    if not (preprocessing.labels and preprocessing.channels):
        return {}
    return {"structures": usual_medians(preprocessing, cases, preprocessing.labels)}
