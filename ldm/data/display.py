"""A volume for display: its grey values, positions in mm, and another volume on its grid.

Volumes are `nib.Nifti1Image` in the orientation closest to RAS, as `read` returns them.
"""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy.ndimage import gaussian_filter

from ldm import UserError
from ldm.data.reading import channel_count, read_image, voxels_of

PERCENTILES = (0.5, 99.5)  # of the voxels, shown black and white
DIRECTIONS = ("LR", "PA", "IS")  # negative and positive direction of each axis


def read(path: Path, channel: int) -> nib.Nifti1Image:
    """One channel of a file, (D, H, W) float32, its axes reoriented to the nearest of right, anterior,
    superior.

    Raises:
        UserError: it cannot be read, or no voxel is finite.
    """
    image = read_image(path)
    voxels = voxels_of(path, image, channel if len(image.shape) > 3 else 0)
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad == voxels.size:
        raise UserError(f"{path}: all voxels are NaN or infinite; nothing to show.")
    if bad:
        print(f"{path}: {bad} of {voxels.size} voxels are NaN or infinite")
    return nib.as_closest_canonical(nib.Nifti1Image(voxels, image.affine))


def voxels_in(image: nib.Nifti1Image) -> np.ndarray:
    """The array of an image that `read` returned, (D, H, W) float32."""
    return np.asarray(image.dataobj)


def spacing_of(image: nib.Nifti1Image) -> np.ndarray:
    """Voxel size in mm along right, anterior, superior."""
    return nib.affines.voxel_sizes(image.affine)


def window_of(voxels: np.ndarray, asked: Sequence[float] | None) -> tuple[float, float]:
    """The values that are black and white."""
    if asked:
        return tuple(asked)
    finite = voxels[np.isfinite(voxels)]
    low, high = np.percentile(finite, PERCENTILES)
    return (float(low), float(high)) if low < high else (float(finite.min()), float(finite.max()))


def shade(voxels: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Grey values in [0, 1], float32: NaN is black, a constant volume half grey."""
    low, high = window
    with np.errstate(invalid="ignore"):
        grey = (voxels - low) / (high - low) if low < high else voxels * 0 + 0.5
    return np.nan_to_num(np.clip(grey, 0, 1), nan=0.0).astype(np.float32)


def about(image: nib.Nifti1Image, window: Sequence[float]) -> str:
    """Size, voxels and grey values of a volume in a line."""
    sides = " x ".join(f"{mm:.3g}" for mm in spacing_of(image))
    low, high = window
    greys = f"grey values {low:.4g} to {high:.4g}" if low < high else f"constant: {low:.4g}"
    return f"{' x '.join(map(str, image.shape))} voxels of {sides} mm, {greys}"


def position(image: nib.Nifti1Image, axis: int, index: int) -> str:
    """Position of the centre of a slice in mm, as scanners write it: `S 12.0`."""
    voxel = (np.array(image.shape) - 1) / 2
    voxel[axis] = index
    mm = round(float(nib.affines.apply_affine(image.affine, voxel)[axis]), 1)
    return f"{DIRECTIONS[axis][mm >= 0]} {abs(mm):.1f}"


def positions(image: nib.Nifti1Image, at: Sequence[int]) -> list[str]:
    """Positions of the three slices through a voxel."""
    return [position(image, axis, index) for axis, index in enumerate(at)]


def voxel_at(path: Path, image: nib.Nifti1Image, at: Sequence[float]) -> np.ndarray:
    """The voxel at a position in mm. Raises UserError: it is outside."""
    voxel = np.rint(nib.affines.apply_affine(np.linalg.inv(image.affine), at)).astype(int)
    if (voxel < 0).any() or (voxel >= image.shape).any():
        position = " ".join(f"{mm:g}" for mm in at)
        raise UserError(f"{path}: --at {position} is outside; the volume covers {covers(image)}.")
    return voxel


def covers(image: nib.Nifti1Image) -> str:
    """Extent of a volume in mm: `R -90 to 90, A -126 to 90, S -72 to 108`."""
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in image.shape])).reshape(3, -1).T
    corners = nib.affines.apply_affine(image.affine, corners)
    spans = zip("RAS", corners.min(0), corners.max(0), strict=True)
    return ", ".join(f"{letter} {low:.0f} to {high:.0f}" for letter, low, high in spans)


def on_one_grid(a: nib.Nifti1Image, b: nib.Nifti1Image) -> bool:
    """Whether voxels are at the same positions, to 1 % of the smallest voxel side."""
    return a.shape == b.shape and np.allclose(a.affine, b.affine, rtol=0, atol=0.01 * spacing_of(a).min())


def resampled(path: Path, image: nib.Nifti1Image, onto: nib.Nifti1Image, nearest: bool) -> np.ndarray:
    """An image resampled onto the grid of another, by their headers; NaN outside of it.

    Raises:
        UserError: they do not overlap.
    """
    values = voxels_in(image)
    if not nearest:  # low-pass filter against aliasing, as in training
        values = gaussian_filter(values, np.maximum(0, (spacing_of(onto) / spacing_of(image) - 1) / 2))

    def on_grid(values: np.ndarray, **options) -> np.ndarray:
        source = nib.Nifti1Image(values, image.affine)
        return voxels_in(resample_from_to(source, (onto.shape, onto.affine), **options))

    inside = on_grid(np.ones(image.shape, np.uint8), order=0, mode="grid-constant", cval=0) > 0
    if not inside.any():
        raise UserError(
            f"{path}: does not overlap the scan: it covers {covers(image)} mm, the scan {covers(onto)} mm. "
            "Check that it is of the same subject, and its header."
        )
    print(f"{path}: on another grid; resampled by its header; it covers {inside.mean():.0%} of the scan")
    # mode "nearest": the outer half of the outermost voxels is constant.
    return np.where(inside, on_grid(values, order=0 if nearest else 1, mode="nearest"), np.nan)


def read_mask(path: Path) -> nib.Nifti1Image:
    """Labels, as `read` returns them. Raises UserError: 4D, or values other than 0, 1, 2, ..."""
    if (count := channel_count(read_image(path))) > 1:
        raise UserError(f"{path}: holds {count} volumes; expected one volume of labels.")
    mask = read(path, 0)
    voxels = voxels_in(mask)
    if not np.isfinite(voxels).all() or voxels.min() < 0 or (voxels != np.rint(voxels)).any():
        raise UserError(f"{path}: not a mask; expected labels 0, 1, 2, ... Was it resampled, or scaled?")
    return mask
