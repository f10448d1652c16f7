"""From an image file to a normalised volume, and back to the units of a scanner.

    file -> chosen channels -> low-pass -> orient RAS -> resample -> intensity by percentiles of the whole
    volume, or by a fixed window

The whole volume is mapped before any crop, so that a crop has the intensities of its volume. Training,
validation and inference all use `Preprocessing`.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Orientation,
    ResizeWithPadOrCrop,
    Spacing,
)
from nibabel.orientations import io_orientation, ornt_transform
from scipy.ndimage import gaussian_filter

from ldm import UserError, few
from ldm.configs import channels_of, labels_of
from ldm.data.intensity import LATER, Intensity, to_unit_range
from ldm.data.reading import (
    RAS,
    by_times,
    channel_count,
    label_fault,
    label_type,
    read_image,
    refuse_embedding,
    voxels_of,
)
from ldm.models.definitions import MAX_VOXELS
from ldm.system.messages import tell_once

nib.imageglobals.logger.setLevel(logging.CRITICAL)  # its corrections of headers; see `header_notes`

RESAMPLING = 1  # raised with each change of `_resample` or of the intensities, which outdates cached volumes
CODE = f"{RESAMPLING} MONAI {monai.__version__}"  # version of all that makes a volume from a file


def crop_or_pad(volume: np.ndarray | torch.Tensor, size: Sequence[int]) -> np.ndarray | torch.Tensor:
    """Crop or zero-pad about the centre: (C, D, H, W) -> (C, *size)."""
    fitted = ResizeWithPadOrCrop(tuple(size))(volume)
    fitted = fitted.as_tensor() if isinstance(fitted, MetaTensor) else fitted
    return fitted.numpy() if isinstance(volume, np.ndarray) and isinstance(fitted, torch.Tensor) else fitted


def largest_share(shares: Iterable[np.ndarray], values: Sequence[int]) -> np.ndarray:
    """The shares of labels in each voxel, (D, H, W) for each of `values` -> the label, (D, H, W) of
    `label_type`: the value with the largest share, background among them."""
    total, largest, label = 0.0, 0.0, None
    for value, share in zip(values, shares, strict=True):
        label = np.zeros(share.shape, label_type(values)) if label is None else label
        label[share > largest] = value
        largest, total = np.maximum(largest, share), total + share
    label[1 - total >= largest] = 0
    return label


@dataclass(frozen=True)
class Preprocessing:
    """Files of a case -> normalised volume (C, D, H, W), float32, RAS, at `spacing`.

    Args:
        channels: which channels of the image, in this order; none of label maps alone.
        spacing: voxel size in mm along right, anterior, superior.
        intensity: what becomes 0 and 1.
        labels: values of the labels that become further channels, see `ldm.data.labels`.
        notes: print a line where a label has others.
    """

    channels: tuple[int, ...]
    spacing: tuple[float, float, float]
    intensity: Intensity = Intensity()
    labels: tuple[int, ...] = ()
    notes: bool = True

    @classmethod
    def from_config(cls, config: dict) -> "Preprocessing":
        """As the config says, for training, validation and inference alike."""
        intensity = Intensity.from_config(config)
        return cls(channels_of(config), tuple(config["spacing"]), intensity, labels_of(config))

    @property
    def key(self) -> str:
        """What the result depends on besides the files."""
        intensity = self.intensity
        late = [f"{key}={getattr(intensity, key)!r}" for key in LATER if getattr(intensity, key)]
        # The same text as before these keys existed, so that volumes cached then are still found.
        return (
            f"Preprocessing(channels={self.channels!r}, spacing={self.spacing!r}, lower={intensity.lower!r}, "
            f"upper={intensity.upper!r}, clip={intensity.clip!r}) {' '.join([CODE, *late])}"
        )

    def read(self, images: Sequence[Path]) -> np.ndarray:
        """The resampled volume in the file's own units, (C, D, H, W).

        Raises:
            UserError: a channel that is missing, or values that are not finite.
        """
        refuse_embedding(images[0])
        if len(images) > 1:
            if max(self.channels) >= len(images):
                raise UserError(
                    f"{images[0]}: `channel` is {max(self.channels)}, the case has {len(images)} files."
                )
            files = [(images[c], read_image(images[c]), 0) for c in self.channels]
        else:
            image = read_image(images[0])
            files = [(images[0], image, c) for c in self.channels]
        volumes = [
            _resample(*file, self.spacing, self.intensity.of_channel(i)) for i, file in enumerate(files)
        ]
        if len({volume.shape for volume in volumes}) > 1:
            raise UserError(f"{images[0]}: its channels differ in shape: {[v.shape for v in volumes]}.")
        return np.stack(volumes)

    def __call__(self, images: Sequence[Path]) -> np.ndarray:
        """The normalised volume, (C, D, H, W); a warning is printed where most of it has little contrast.

        Raises:
            UserError: as `read`, and where a channel is constant or outside of its window.
        """
        volume = self.read(images)
        limits = self.intensity.limits(volume)
        for i, c in enumerate(self.channels):
            where = str(images[c] if len(images) > 1 else images[0])
            where += f": channel {c}" if len(images) == 1 and len(self.channels) > 1 else ""
            intensity = self.intensity.of_channel(i)
            if fault := intensity.constant_reason(volume[i], limits[i]):
                raise UserError(f"{where}: {fault}.")
            if what := intensity.low_contrast_reason(volume[i], limits[i]):
                tell_once(f"warning: {where}: {what}.")
        return to_unit_range(volume, limits, self.intensity.clip)

    def limits(self, images: Sequence[Path]) -> np.ndarray:
        """The values that become 0 and 1, in the file's own units: (C, 2)."""
        if self.intensity.window is not None:
            return np.array(self.intensity.window)
        return self.intensity.limits(self.read(images))

    def label(self, path: Path) -> np.ndarray:
        """The label on the same grid: (1, D, H, W), of `label_type`.

        Raises:
            UserError: as `read_image`, and for values that are no labels.
        """
        image = read_image(path)
        voxels = np.asanyarray(image.dataobj)
        if fault := label_fault(voxels):
            raise UserError(f"{path}: {fault}.")
        return _resample(path, image, 0, self.spacing)[None].astype(label_type([voxels.max()]))

    def label_channels(self, path: Path) -> np.ndarray:
        """The share of each of `labels` in each voxel of the same grid: (L, D, H, W), float32, 0 to 1.

        Raises:
            UserError: as `label`.
        """
        return np.stack([*self._shares(path)])

    def mask(self, path: Path) -> np.ndarray:
        """Which of `labels` has the largest share of each voxel of the same grid, 0 where background has:
        (D, H, W), of `label_type`. One channel at a time is in memory.

        Raises:
            UserError: as `label`.
        """
        return largest_share(self._shares(path), self.labels)

    def _shares(self, path: Path) -> Iterator[np.ndarray]:
        """The channels of `label_channels`, (D, H, W) each."""
        image = read_image(path)
        voxels = np.asanyarray(image.dataobj)
        if fault := label_fault(voxels):
            raise UserError(f"{path}: {fault}.")
        if self.notes and (others := {*np.unique(voxels).astype(int).tolist()} - {0, *self.labels}):
            tell_once(
                "note: labels have values that label_values lacks, and are background there: "
                f"{few(list(map(str, sorted(others))), 12)}"
            )
        voxels = voxels_of(path, image, 0)
        for value in self.labels:
            indicator = (voxels == value).astype(np.float32)
            yield _onto_grid(path, indicator, image.affine, self.spacing, False)


def _resample(
    path: Path,
    image: nib.spatialimages.SpatialImage,
    channel: int,
    spacing: Sequence[float],
    intensity: Intensity | None = None,
) -> np.ndarray:
    """A channel in RAS at `spacing`; without `intensity` it is a label, resampled to the nearest voxel."""
    voxels, nearest = voxels_of(path, image, channel), intensity is None
    if intensity:
        if fault := intensity.nonfinite_reason(voxels):
            raise UserError(f"{path}: {f'channel {channel} ' * (channel_count(image) > 1)}{fault}.")
        voxels = intensity.without_nan(voxels)  # before a filter that would spread NaN
    return _onto_grid(path, voxels, image.affine, spacing, nearest)


def _onto_grid(
    path: Path, voxels: np.ndarray, affine: np.ndarray, spacing: Sequence[float], nearest: bool
) -> np.ndarray:
    """Voxels (X, Y, Z) in RAS at `spacing`: the nearest, or linearly after a low-pass filter."""
    sizes = nib.affines.voxel_sizes(affine)
    to_ras = ornt_transform(io_orientation(affine), RAS)
    target = np.array(spacing)[to_ras[:, 0].astype(int)]
    if np.prod(sizes * voxels.shape / target) > MAX_VOXELS:
        raise UserError(
            f"{path}: covers {by_times(sizes * voxels.shape)} mm, which is more than {MAX_VOXELS} voxels at "
            f"{by_times(target)} mm. Fix its header, or choose a coarser `spacing`."
        )
    if (np.array(voxels.shape) - 1 < target / sizes / 2).any():
        raise UserError(
            f"{path}: covers {by_times(sizes * voxels.shape)} mm, a single voxel along an axis at "
            f"{by_times(target)} mm. Choose a finer `spacing`, in mm."
        )
    if not nearest:  # the low-pass filter of skimage's anti-aliased resizing
        sigma = np.maximum(0, (target / sizes - 1) / 2)
        voxels = gaussian_filter(voxels, sigma) if sigma.any() else voxels
    volume = MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine))
    volume = Orientation("RAS", labels=None)(volume)
    volume = Spacing(spacing, mode="nearest" if nearest else "bilinear", padding_mode="border")(volume)
    return volume.as_tensor()[0].numpy()
