"""Size, spacing and field of view of volumes: what a model was trained on, and what is asked of it.

The `geometry` of a checkpoint holds `size` in voxels and `spacing` in mm of the volumes that it draws where
nothing else is asked, and the ranges that it was trained on, `spacing_range` and `fov_range` (the field of
view: size times spacing, in mm), a pair for each axis.
"""

import math
from collections.abc import Sequence

import numpy as np

from ldm import UserError
from ldm.data.cases import Case
from ldm.data.reading import by_times
from ldm.models.definitions import check_size

TOLERANCE = 1e-3  # of a range: headers store float32


def three_numbers(text: str, option: str, whole: bool) -> list:
    """The numbers above 0 in `96,112,96`, whole ones or floats. Raises UserError: it has another form."""
    try:
        numbers = [int(one) if whole else float(one) for one in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(0 < one < math.inf for one in numbers):
        example = "whole numbers above 0, such as 96,112,96" if whole else "numbers above 0, such as 2,2,2"
        raise UserError(f"{option} {text}: expected three {example}.")
    return numbers


def trained_geometry(
    cases: Sequence[Case], size: Sequence[int], spacing: Sequence[float], limits: list
) -> dict:
    """The geometry of a model of some training cases.

    Args:
        size, spacing: of cases without their own, in voxels and mm.
        limits: of intensity, see `ldm.data.cases.typical_limits`.

    Returns:
        `size` is the most frequent of the cases, `spacing` the median of those of this size.
    """
    sizes = [tuple(case.size or size) for case in cases]
    spacings = [case.spacing or spacing for case in cases]
    usual = max(sorted(set(sizes)), key=sizes.count)
    of_usual = [mm for one, mm in zip(sizes, spacings, strict=True) if one == usual]
    return {
        "spacing": np.median(of_usual, axis=0).tolist(),
        "size": list(usual),
        "limits": limits,
        **trained_ranges(sizes, spacings),
    }


def trained_ranges(sizes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]]) -> dict:
    """The entries `spacing_range` and `fov_range` of a geometry, by size in voxels and spacing in mm of each
    volume that was trained on."""
    spacings = np.array(spacings, float)
    values = {"spacing_range": spacings, "fov_range": np.array(sizes) * spacings}
    return {key: [[float(axis.min()), float(axis.max())] for axis in one.T] for key, one in values.items()}


def asked_geometry(
    geometry: dict, size: Sequence[int] | None, spacing: Sequence[float] | None, divisor: Sequence[int]
) -> dict:
    """The geometry of a model with another size in voxels and spacing in mm. The `slices` of 2D networks stay
    in place about the centre.

    Args:
        divisor: of the networks, see `network_divisor`.

    Raises:
        UserError: a size that the networks cannot make; the nearest that they can are named.
    """
    asked = {**trained_ranges([geometry["size"]], [geometry["spacing"]]), **geometry}
    if size is not None:
        check_size(size, divisor, "--size")
        asked["size"] = list(size)
        if "slices" in geometry:
            moved = (size[-1] - geometry["size"][-1]) // 2
            first, end = (min(max(one + moved, 0), size[-1]) for one in geometry["slices"])
            asked["slices"] = [first, end]
    if spacing is not None:
        asked["spacing"] = list(spacing)
    return asked


def beyond_training(geometry: dict) -> list[str]:
    """In what volumes of an `asked_geometry` lie beyond what the model was trained on, in words."""
    fov = np.multiply(geometry["size"], geometry["spacing"])
    found = []
    for name, key, values in (
        ("cover", "fov_range", fov),
        ("have voxels of", "spacing_range", np.array(geometry["spacing"])),
    ):
        low, high = np.array(geometry[key]).T
        if (values < low * (1 - TOLERANCE)).any() or (values > high * (1 + TOLERANCE)).any():
            trained = by_times(low) if np.allclose(low, high) else f"{by_times(low)} to {by_times(high)}"
            found.append(f"volumes {name} {by_times(values)} mm; the model was trained on {trained} mm")
    return found
