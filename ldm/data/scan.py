"""From a raw scan to one that is ready for training: mask, crop, resampling, intensities.

A `Scan` holds voxels and the affine that takes their indices to the scanner's millimetres. Every step takes a
scan and gives a new one, whose affine is true: a landmark keeps its coordinates in millimetres.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from scipy import ndimage

from ldm import UserError
from ldm.data.reading import RAS

IMAGE_ORDERS = {"cubic": 3, "linear": 1}
INTENSITIES = ("keep", "minmax", "percentiles", "zscore", "window")
LOW, HIGH = 0.5, 99.5  # of `percentiles`
BRAIN_ML = (700.0, 2200.0)  # a mask of less or more is no brain of a child or an adult
EDGE = 1e-3  # of a voxel
LARGEST_PART = 0.95  # of a brain mask, in one piece


@dataclass(frozen=True)
class Scan:
    """A scan of one case.

    Attributes:
        voxels: (C, X, Y, Z) float32.
        affine: (4, 4), from indices to millimetres.
        label: (X, Y, Z) whole numbers on the same grid, or None.
        mask: (X, Y, Z) bool on the same grid: the brain, or the body; or None.
    """

    voxels: np.ndarray
    affine: np.ndarray
    label: np.ndarray | None = None
    mask: np.ndarray | None = None

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along each axis."""
        return nib.affines.voxel_sizes(self.affine)

    def _each(self, change) -> dict:
        """`change` of each array (X, Y, Z) that the scan has, by the name of the field."""
        some = {"label": self.label, "mask": self.mask}
        changed = {key: None if one is None else change(one) for key, one in some.items()}
        return {"voxels": np.stack([change(channel) for channel in self.voxels]), **changed}


def to_ras(scan: Scan) -> Scan:
    """Permute and flip the axes so that they run to the right, forwards and upwards; nothing is resampled."""
    turn = ornt_transform(io_orientation(scan.affine), RAS)
    affine = scan.affine @ inv_ornt_aff(turn, scan.voxels.shape[1:])
    return Scan(affine=affine, **scan._each(lambda array: apply_orientation(array, turn)))


def without_background(scan: Scan) -> Scan:
    """Background 0: all outside of the mask, and NaN there. Without a mask, NaN becomes 0.

    Raises:
        UserError: NaN inside of the mask, infinite voxels without one, or an empty mask.
    """
    if scan.mask is None:
        if infinite := np.count_nonzero(np.isinf(scan.voxels)):
            raise UserError(f"has {infinite} infinite voxels")
        return replace(scan, voxels=np.nan_to_num(scan.voxels))
    if not scan.mask.any():
        raise UserError("its mask is empty")
    if bad := np.count_nonzero(~np.isfinite(scan.voxels[:, scan.mask])):
        raise UserError(f"{bad} voxels in its mask are NaN or infinite")
    label = None if scan.label is None else np.where(scan.mask, scan.label, 0)
    return replace(scan, voxels=np.where(scan.mask, scan.voxels, np.float32(0)), label=label)


def cropped(scan: Scan) -> Scan:
    """Crop to the smallest box that holds every voxel above or below 0 in any channel.

    Raises:
        UserError: every voxel is 0.
    """
    inside = (scan.voxels != 0).any(axis=0)
    if not inside.any():
        raise UserError("every voxel is 0")
    box = ndimage.find_objects(inside.astype(np.uint8))[0]
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [one.start for one in box]
    return Scan(affine=affine, **scan._each(lambda array: array[box]))


def grid_at(scan: Scan, spacing: Sequence[float], size: Sequence[int] | None) -> tuple[tuple, np.ndarray]:
    """Shape and affine of a grid with the scan's axes and centre at this spacing in mm: of `size` voxels, or
    of as many as cover the scan."""
    spacing, shape = np.asarray(spacing, float), np.array(scan.voxels.shape[1:])
    wanted = np.maximum(1, np.round(shape * scan.spacing / spacing)) if size is None else np.asarray(size)
    affine = scan.affine.copy()
    affine[:3, :3] *= spacing / scan.spacing
    centre = scan.affine[:3, :3] @ ((shape - 1) / 2) + scan.affine[:3, 3]
    affine[:3, 3] = centre - affine[:3, :3] @ ((wanted - 1) / 2)
    return tuple(int(side) for side in wanted), affine


def resampled(scan: Scan, shape: Sequence[int], affine: np.ndarray, order: int = 3) -> Scan:
    """The scan on another grid of the same axes, background beyond its edges.

    An image is filtered before it is made coarser, and keeps its range of values, which splines overshoot,
    and its empty background (0 in every channel).
    Of labels and masks each value is resampled linearly as an indicator, background among them, and the
    largest wins.
    """
    if tuple(shape) == scan.voxels.shape[1:] and np.allclose(affine, scan.affine, rtol=0, atol=1e-6):
        return scan
    coarser = nib.affines.voxel_sizes(affine) / scan.spacing
    around = scan.affine.copy()  # of the scan with one voxel more on each side
    around[:3, 3] -= around[:3, :3].sum(1)
    to_scan, covered = np.linalg.inv(scan.affine) @ affine, []
    for axis, (side, own) in enumerate(zip(shape, scan.voxels.shape[1:], strict=True)):
        at = to_scan[axis, axis] * np.arange(side) + to_scan[axis, 3]  # in voxels of the scan
        covered.append((at > -0.5 - EDGE) & (at < own - 0.5 + EDGE))
    beyond = ~(covered[0][:, None, None] & covered[1][:, None] & covered[2])

    def onto(array: np.ndarray, order: int, outside: float = 0.0) -> np.ndarray:
        sigma = np.maximum(0, (coarser - 1) / 2)  # the low-pass filter of skimage's anti-aliased resizing
        array = ndimage.gaussian_filter(array.astype(np.float32), sigma) if sigma.any() else array
        # Voxels reach half a voxel beyond the outermost centres, where splines alone would find 0.
        image = nib.Nifti1Image(np.pad(np.asarray(array, np.float32), 1, mode="edge"), around)
        array = resample_from_to(image, (tuple(shape), affine), order=order).get_fdata(dtype=np.float32)
        return np.where(beyond, np.float32(outside), array)

    # Beyond the edges lies background: 0 around a mask, else what is lowest, such as air in a CT.
    lowest = [0.0 if scan.mask is not None else float(one.min()) for one in scan.voxels]
    voxels = np.stack(
        [
            np.clip(onto(one, order, outside), min(outside, one.min()), max(outside, one.max()))
            for one, outside in zip(scan.voxels, lowest, strict=True)
        ]
    )
    voxels[:, onto((scan.voxels == 0).all(0), 1) > 0.5] = 0  # where splines leave ripples
    label = None if scan.label is None else largest_indicator(scan.label, lambda one: onto(one, 1))
    mask = None if scan.mask is None else largest_indicator(scan.mask, lambda one: onto(one, 1)).astype(bool)
    return Scan(voxels, affine, label, mask)


def largest_indicator(label: np.ndarray, resample) -> np.ndarray:
    """Resample a label value by value: `resample` takes an indicator (float32) to the new grid.

    Beyond the edges every indicator is 0; there the background, 0, wins.
    """
    values = np.union1d([0], np.unique(label))
    best = found = None
    for value in values:
        share = resample((label == value).astype(np.float32))
        if best is None:
            best, found = share, np.full(share.shape, value, label.dtype)
        else:
            larger = share > best
            found[larger], best = value, np.maximum(best, share)
    return found


def with_intensities(scan: Scan, how: str, window: Sequence[float] | None = None) -> Scan:
    """Map the intensities of each channel; the background (0 in every channel) becomes the lowest value.

    Args:
        how: `keep`; `minmax` or `percentiles` of the foreground to 0 and 1; `zscore` of the foreground;
            `window`, two values that become 0 and 1, with what lies beyond clipped.

    Raises:
        UserError: a channel is constant.
    """
    if how == "keep":
        return scan
    foreground = (scan.voxels != 0).any(axis=0)
    channels = []
    for channel in scan.voxels:
        inside = channel[foreground]
        if how == "zscore":
            shift, scale, limits = inside.mean(), inside.std(), (-np.inf, np.inf)
        else:
            ends = {"minmax": (0, 100), "percentiles": (LOW, HIGH)}
            low, high = window if how == "window" else np.percentile(inside, ends[how])
            shift, scale, limits = low, high - low, (0, 1)
        if not scale > 0:
            raise UserError("a channel is constant in the foreground")
        mapped = np.clip((channel - shift) / scale, *limits)
        lowest = limits[0] if np.isfinite(limits[0]) else mapped[foreground].min()
        channels.append(mapped if how == "window" else np.where(foreground, mapped, lowest))
    return replace(scan, voxels=np.stack(channels).astype(np.float32))


def mask_doubt(mask: np.ndarray, spacing: Sequence[float]) -> str | None:
    """Why a mask (X, Y, Z) hardly is that of a brain, or None."""
    millilitres = mask.sum() * float(np.prod(spacing)) / 1000
    if not BRAIN_ML[0] <= millilitres <= BRAIN_ML[1]:
        return f"it covers {millilitres:.0f} ml, a brain {BRAIN_ML[0]:.0f} to {BRAIN_ML[1]:.0f} ml"
    parts, count = ndimage.label(mask)
    if count > 1 and (share := np.bincount(parts.ravel())[1:].max() / mask.sum()) < LARGEST_PART:
        return f"its largest part is {share:.0%} of it"
    return None
