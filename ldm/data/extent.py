"""Size, spacing and field of view of volumes: what a model was trained on, and what is asked of it.

The `geometry` of a checkpoint holds `size` in voxels and `spacing` in mm of the volumes that it draws where
nothing else is asked, and the ranges that it was trained on, `spacing_range` and `fov_range` (the field of
view: size times spacing, in mm), a pair for each axis.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ldm import UserError
from ldm.data.cases import Case, choose_spacing, own_geometry, size_at
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


def fitting_size(
    whole: Sequence[int], sizes: Sequence[Sequence[int]] | str, divisor: Sequence[int]
) -> tuple[int, ...]:
    """The size that a volume of `whole` voxels is cropped or padded to.

    Args:
        sizes: the smallest of these that holds it, else the one that keeps most of it; or `own`: its own
            size, rounded up to multiples of `divisor`.
    """
    if isinstance(sizes, str):
        return tuple(math.ceil(side / step) * step for side, step in zip(whole, divisor, strict=True))
    return tuple(min(sizes, key=lambda size: (-math.prod(np.minimum(size, whole).tolist()), math.prod(size))))


def with_own_extent(
    config: dict, cases: Sequence[Case], spacing: Sequence[float], divisor: Sequence[int]
) -> list[Case]:
    """The cases with a `spacing` of their own where `data.own_spacing` says so, and with a `size` of their
    own where `data.sizes` does; only headers are read.

    Args:
        spacing: in mm, of all cases where they have none of their own.
        divisor: of the networks, see `network_divisor`.

    Raises:
        UserError: a size of `data.sizes` that does not fit the networks.
    """
    data, found = config["data"], []
    for size in data["sizes"] if isinstance(data["sizes"], list) else []:
        check_size(size, divisor, "data.sizes")
    for case in cases:
        if data["own_spacing"]:
            case = replace(case, spacing=tuple(choose_spacing([case], config["longest_side"])))
        if data["sizes"]:
            whole = size_at(*own_geometry(case), case.spacing or spacing).astype(int).tolist()
            case = replace(case, size=fitting_size(whole, data["sizes"], divisor))
        found.append(case)
    return found


def largest_size(cases: Sequence[Case], size: Sequence[int]) -> list[int]:
    """The size with most voxels of cases with their own; `size` of others."""
    return list(max((case.size or tuple(size) for case in cases), key=math.prod, default=size))


def usual_spacing(cases: Sequence[Case], longest_side: int | None) -> list[float]:
    """The median of the cases' own spacings in mm, as `choose_spacing` has them."""
    return np.median([choose_spacing([case], longest_side) for case in cases], axis=0).tolist()


def trained_geometry(
    cases: Sequence[Case], size: Sequence[int], spacing: Sequence[float], limits: list
) -> dict:
    """The geometry of a model of some training cases.

    Args:
        size, spacing: of cases without their own, in voxels and mm.
        limits: of intensity, see `ldm.data.cases.typical_limits`.

    Returns:
        Its `size` is the most frequent one of the cases.
    """
    sizes = [tuple(case.size or size) for case in cases]
    usual = list(max(sorted(set(sizes)), key=sizes.count))
    ranges = trained_ranges(sizes, [case.spacing or spacing for case in cases])
    return {"spacing": list(spacing), "size": usual, "limits": limits, **ranges}


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
