"""What a data set looks like, measured once: `dataset_fingerprint.json`, with nnU-Net's keys and some more.

Everything is given along right, anterior and superior (RAS); nnU-Net's own files count the axes as SimpleITK
reads them.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from ldm import UserError
from ldm.data.cases import Case
from ldm.data.raw_cases import RawCase, read_raw
from ldm.data.scan import cropped, to_ras, without_background

SAMPLED = 10_000  # foreground voxels of each case, as nnU-Net samples them
COARSE = 16  # voxels along each side of the small volumes that are compared
STATISTICS = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")


def measure_case(case: Case) -> dict:
    """Shape, spacing and intensities of one case.

    Returns:
        `spacing` in mm; `shape`, and `shape_after_crop` to what is not 0, in voxels; whether it holds `nan`;
        the share of voxels that are `not_zero`; the `label_values` that are not 0;
        `foreground`, a sample (C, n) of the voxels under the label, else of those that are not 0; `small`
        (16, 16, 16), the first channel at a low resolution, between 0 and 1.

    Raises:
        UserError: the case cannot be read, its label lies on another grid, or every voxel is 0.
    """
    try:
        scan = to_ras(read_raw(RawCase(case.name, case.images, case.label)))
        nan, scan = bool(np.isnan(scan.voxels).any()), without_background(scan)
        after = cropped(scan).voxels.shape[1:]
    except UserError as error:
        named = str(case.images[0]) in str(error) or str(case.label) in str(error)
        raise UserError(str(error) if named else f"{case.images[0]}: {error}.") from None
    inside = not_zero = (scan.voxels != 0).any(axis=0)
    labels = [] if scan.label is None else sorted({*np.unique(scan.label).astype(int).tolist()} - {0})
    if scan.label is not None and scan.label.any():
        inside = scan.label > 0
    values = scan.voxels[:, inside]
    if values.shape[1] > SAMPLED:
        values = values[:, np.random.RandomState(0).choice(values.shape[1], SAMPLED, replace=False)]
    low, high = np.percentile(scan.voxels[0], [0.5, 99.5])
    small = np.clip((scan.voxels[0] - low) / max(high - low, 1e-9), 0, 1)
    return {
        "spacing": scan.spacing.tolist(),
        "shape": list(inside.shape),
        "shape_after_crop": list(after),
        "nan": nan,
        "not_zero": float(not_zero.mean()),
        "label_values": labels,
        "foreground": values,
        "small": ndimage.zoom(small, COARSE / np.array(small.shape), order=1, grid_mode=True, mode="nearest"),
    }


def fingerprint(cases: Sequence[Case], each: Callable = map) -> dict:
    """The fingerprint of a data set, as plain values.

    Args:
        each: `map`, or the like in several processes.

    Returns:
        nnU-Net's `spacings`, `shapes_after_crop`, `median_relative_size_after_cropping` and
        `foreground_intensity_properties_per_channel`; and `shapes`, the `median_share_not_zero` of voxels,
        how many cases have a label (`labels`) or NaN (`nan`), the `label_values`, `subjects`, and `symmetry`
        (median correlation of a volume with its mirror image, left to right).

    Raises:
        UserError: as `measure_case`; or cases with different numbers of channels.
    """
    found = list(each(measure_case, cases))
    for case, one in zip(cases, found, strict=True):
        if (count := len(one["foreground"])) != (expected := len(found[0]["foreground"])):
            raise UserError(
                f"{case.images[0]}: has {count} channel(s), {cases[0].images[0]} has {expected}. Keep cases "
                "with equal channels."
            )
    foreground = np.concatenate([one["foreground"] for one in found], axis=1)
    small = np.stack([one["small"] for one in found])
    shapes, after = (np.array([one[key] for one in found]) for key in ("shape", "shape_after_crop"))
    return {
        "spacings": [one["spacing"] for one in found],
        "shapes": shapes.tolist(),
        "shapes_after_crop": after.tolist(),
        "median_relative_size_after_cropping": float(np.median(after.prod(1) / shapes.prod(1))),
        "foreground_intensity_properties_per_channel": {
            str(c): dict(zip(STATISTICS, _statistics(values), strict=True))
            for c, values in enumerate(foreground)
        },
        "median_share_not_zero": float(np.median([one["not_zero"] for one in found])),
        "labels": sum(case.label is not None for case in cases),
        "label_values": sorted({value for one in found for value in one["label_values"]}),
        "nan": sum(one["nan"] for one in found),
        "subjects": len({case.subject for case in cases}),
        "symmetry": float(np.median([_correlation(one, one[::-1]) for one in small])),
    }


def _statistics(values: np.ndarray) -> list[float]:
    some = (values.mean(), np.median(values), values.std(), values.min(), values.max())
    return [float(one) for one in (*some, *np.percentile(values, [99.5, 0.5]))]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0
