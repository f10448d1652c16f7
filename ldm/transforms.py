"""From an image file to a normalised volume, and back to the units of a scanner.

    file -> chosen channels -> orient RAS -> low-pass and resample -> intensity by percentiles of the whole
    volume, or by a fixed window

The whole volume is mapped before any crop, so that a crop and its volume agree. Training, validation and
inference build the way from `Preprocessing` alone.
"""

import functools
import gzip
import io
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    Orientation,
    RandAffine,
    RandFlip,
    RandScaleIntensity,
    RandShiftIntensity,
    ResizeWithPadOrCrop,
    Spacing,
)
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.ndimage import gaussian_filter

from ldm import UserError
from ldm.processes import tell

nib.imageglobals.logger.setLevel(logging.CRITICAL)  # what it puts right in a header; `header_notes` tells
RAS = axcodes2ornt("RAS")
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz")  # in any case of letters
SMALLEST_VOXEL, LARGEST_VOXEL = 1e-4, 100.0  # mm; beyond these a header is damaged, or in other units
MICROSCOPY = 0.01  # mm; voxels below this are rather in another unit, unless the header says micrometres
LARGEST_VIEW = 5000.0  # mm along a side
FARTHEST = 1e5  # mm from the scanner's origin; float32, which headers use, tells 0.01 mm apart there
PIXDIM_TOLERANCE = 0.01  # of a voxel size
MGH_TAGS = 2**24  # bytes that may follow the voxels of an MGH file; in NIfTI nothing follows them
MM = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # NIfTI's units of length; any other is taken for mm
MOST_FIRST_CHANNELS = 4  # a first axis no longer than this, before a longer last one, is one of channels
CHUNK = 2**20
LARGEST_VALUE = 1e37  # differences and sums of such values are float32, too
BULK = 99.9  # % of the voxels; there is a note on values further out that set the range
FAR_BELOW, FAR_ABOVE, FAR_BELOW_PADDING = 0.5, 0.9, 0.33  # of the range from 0 to 1 that hold no bulk
LEAST_OF_WINDOW = 0.05
RESAMPLING = 1  # raised with each change of `_resample` or of the intensities: cached volumes are made anew
CODE = f"{RESAMPLING} MONAI {monai.__version__}"  # what makes a volume of a file
MOST_VOXELS = 2**31  # of a resampled channel: 8 GB


def open_image(path: Path) -> nib.spatialimages.SpatialImage:
    """Open an image's header and see that it describes a volume; `read_image` reads the voxels too.

    Its `affine` is in mm, whatever the unit of the header; the header itself is as it was read. Of the
    affines of a NIfTI nibabel takes the sform, else the qform, else pixdim.

    Raises:
        UserError: no file, not a NIfTI or MGH image that nibabel reads, not 3D or one axis of channels more,
            voxels that are no real numbers, an unusable scaling or affine, sizes that no scan has, or (where
            the file is not compressed) not the bytes that the header describes.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: cannot be read: it is not there. Is the data set unpacked whole?")
    try:
        image = nib.load(path)
        with nib.openers.ImageOpener(path) as file:  # `image.header` is mended, and has no scaling
            is_nifti = isinstance(image, nib.Nifti1Image)
            stored = image.header_class.from_fileobj(file, check=False) if is_nifti else None
    except Exception as error:  # nibabel raises whatever a damaged or foreign file provokes
        raise UserError(f"{path}: cannot be read as an image ({error}).") from None
    if not isinstance(image, (nib.Nifti1Image, nib.MGHImage)):
        raise UserError(f"{path}: is a {type(image).__name__}; convert it to NIfTI in one file (.nii.gz).")
    shape = tuple(int(side) for side in image.shape)
    if len(shape) > 3 and shape[0] <= MOST_FIRST_CHANNELS < shape[-1] and min(shape) > 0:
        raise UserError(
            f"{path}: shape {shape}: channels first? Expected X, Y, Z and then the channels; move that axis "
            "to the end."
        )
    if len(shape) < 3 or min(shape) < 1 or sum(side > 1 for side in shape[3:]) > 1:
        raise UserError(f"{path}: shape {shape}; expected a 3D image, or 4D with the channels last.")
    if image.get_data_dtype().kind not in "iuf":
        kind = "colours" if image.get_data_dtype().names else f"of type {image.get_data_dtype()}"
        raise UserError(f"{path}: its voxels are {kind}; expected one real number each. Convert it.")
    if stored is not None and np.isinf(stored["scl_slope"]):  # nibabel takes it for "unscaled"
        raise UserError(f"{path}: its intensity scaling is infinite; the header is damaged.")
    if stored is not None and image.header["sform_code"] == 0:
        # nibabel mends what is stored: a voxel size of 0 is taken for 1 mm, a code that is none for "no
        # affine", which mirrors the volume.
        if image.header["qform_code"] == 0 and (stored["qform_code"] != 0 or stored["sform_code"] != 0):
            raise UserError(
                f"{path}: its qform_code {stored['qform_code']} and sform_code {stored['sform_code']} do not "
                "say where it lies; the header is damaged."
            )
        if (stored["pixdim"][1:4] == 0).any():
            raise UserError(f"{path}: its voxels are {_times(stored['pixdim'][1:4])} mm. Fix the header.")
    name, factor = _unit(image)
    image.affine[:3] *= factor
    sizes = nib.affines.voxel_sizes(image.affine)
    finite = np.isfinite(image.affine).all()
    if not finite or abs(np.linalg.det(image.affine[:3, :3])) <= 1e-6 * np.prod(sizes):
        raise UserError(f"{path}: its affine is not invertible; the header is damaged.")
    if sizes.min() < SMALLEST_VOXEL or sizes.max() > LARGEST_VOXEL:
        stated = f" ({_times(sizes / factor)} {name} in its header)" if name != "mm" else ""
        raise UserError(
            f"{path}: its voxels are {_times(sizes)} mm{stated}; expected {SMALLEST_VOXEL:g} to "
            f"{LARGEST_VOXEL:g} mm. Fix the header."
        )
    if (sizes * shape[:3]).max() > LARGEST_VIEW:
        raise UserError(f"{path}: covers {_times(sizes * shape[:3] / 1000)} m; the header is damaged.")
    if (distance := np.abs(image.affine[:3, 3]).max()) > FARTHEST:
        raise UserError(f"{path}: lies {distance:.3g} mm from the scanner's origin; the header is damaged.")
    if not _is_compressed(path):
        _check_length(path, image, Path(path).stat().st_size)
    return image


def read_image(path: Path) -> nib.spatialimages.SpatialImage:
    """Open an image of which every byte is there and, where it is compressed, passes gzip's checksum.

    nibabel stops reading at the last voxel it needs, before the checksum, and so takes flipped bits for
    voxels.

    Raises:
        UserError: as `open_image`, and where the file is cut short or damaged.
    """
    image = open_image(path)
    if not _is_compressed(path):
        return image
    try:
        content, most = io.BytesIO(), _length_due(image)[1]
        with gzip.open(path) as file:  # to its end, where the checksum is, but little further than it may be
            while content.tell() <= most and (chunk := file.read(CHUNK)):
                content.write(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: its voxels cannot be read ({error}). Is the file whole?") from None
    _check_length(path, image, content.tell())
    whole = type(image).from_bytes(content.getvalue())
    whole.affine[:] = image.affine
    return whole


def _unit(image: nib.spatialimages.SpatialImage) -> tuple[str, float]:
    """The unit of length of a header, and what it is in mm."""
    code = int(image.header["xyzt_units"]) % 8 if isinstance(image, nib.Nifti1Image) else 2
    return MM.get(code, ("mm", 1.0))


def header_notes(image: nib.spatialimages.SpatialImage) -> list[str]:
    """What `open_image` took otherwise than a reader of the header may think, and of no one's fault."""
    if not isinstance(image, nib.Nifti1Image):
        return []
    header, (name, factor) = image.header, _unit(image)
    notes = [f"header in {name}, converted to mm"] if name != "mm" else []
    sizes = nib.affines.voxel_sizes(image.affine)
    if sizes.max() < MICROSCOPY and factor != MM[3][1]:
        notes.append(f"voxels of {_times(sizes)} mm: is the unit in its header wrong?")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        notes.append(
            "no orientation in its header (qform_code and sform_code are 0): its axes are taken for left, "
            "anterior, superior"
        )
    if header["sform_code"] == 0:
        return notes
    pixdim = np.array(header.get_zooms()[:3]) * factor
    if not np.allclose(pixdim, sizes, rtol=PIXDIM_TOLERANCE):
        notes.append(
            f"pixdim says voxels of {_times(pixdim)} mm, the sform {_times(sizes)} mm: the sform wins"
        )
    elif header["qform_code"] != 0:
        try:
            qform = header.get_qform()
        except (nib.spatialimages.HeaderDataError, ValueError):
            qform = np.full((4, 4), np.nan)
        if not np.isfinite(qform).all():
            return [*notes, "its qform is no affine: the sform wins"]
        qform[:3] *= factor
        if (distance := corners_apart(image.shape, qform, image.affine)) > sizes.min() / 2:
            notes.append(f"qform and sform place it {distance:.2g} mm apart: the sform wins")
    return notes


def corners_apart(shape: Sequence[int], a: np.ndarray, b: np.ndarray) -> float:
    """How far two affines put a corner of a volume from each other at most, in mm."""
    corners = np.stack(np.meshgrid(*([0, side - 1] for side in shape[:3])), -1).reshape(-1, 3)
    apart = nib.affines.apply_affine(a, corners) - nib.affines.apply_affine(b, corners)
    return float(np.linalg.norm(apart, axis=1).max())


def voxels_of(path: Path, image: nib.spatialimages.SpatialImage, channel: int) -> np.ndarray:
    """One channel of what `read_image` gave for `path`, in the file's units: (X, Y, Z) float32.

    Raises:
        UserError: there is no such channel.
    """
    if channel >= channel_count(image):
        raise UserError(
            f"{path}: has {channel_count(image)} channel(s); `channel`, counted from 0, asks for number "
            f"{channel}."
        )
    index = (..., *(channel if side > 1 else 0 for side in image.shape[3:]))
    stored = image.dataobj if len(image.shape) == 3 else image.dataobj[index]
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite
        return np.require(stored, np.float32, ["E", "W"])  # a copy where the file is memory-mapped


def channel_count(image: nib.spatialimages.SpatialImage) -> int:
    """Volumes in an image."""
    return math.prod(map(int, image.shape[3:]))


def _is_compressed(path: Path) -> bool:
    return str(path).lower().endswith((".gz", ".mgz"))


def _length_due(image: nib.spatialimages.SpatialImage) -> tuple[int, int]:
    """The least and the most bytes that a file with this header holds, unpacked."""
    due = image.dataobj.offset + math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
    return due, due + (MGH_TAGS if isinstance(image, nib.MGHImage) else 0)


def _check_length(path: Path, image: nib.spatialimages.SpatialImage, held: int) -> None:
    due, most = _length_due(image)
    if not due <= held <= most:
        hint = "Is the file whole?" if held < due else "The header is damaged."
        raise UserError(
            f"{path}: its voxels cannot be read ({held} bytes where the header asks for {due}). {hint}"
        )


def label_fault(label: np.ndarray) -> str | None:
    """What is wrong with the stored values of a label, or None: they are whole numbers from 0 to 255."""
    if bad := label.size - np.count_nonzero(np.isfinite(label)):
        return f"label has {bad} NaN or infinite voxels"
    if label.dtype.kind == "f" and (bad := np.count_nonzero(label != np.rint(label))):
        return f"label has {bad} voxels that are no whole numbers: an image, or resampled without `nearest`?"
    if label.min() < 0 or label.max() > 255:
        return f"label has values from {label.min():g} to {label.max():g}; expected 0 to 255"
    return None


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


def ras_geometry(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Shape and voxel size in mm of an image along right, anterior and superior, from its header alone."""
    image = open_image(path)
    order = np.argsort(io_orientation(image.affine)[:, 0])
    return np.array(image.shape[:3])[order], np.array(nib.affines.voxel_sizes(image.affine))[order]


@dataclass(frozen=True)
class Intensity:
    """How the values of a file become 0 to 1.

    Args:
        lower, upper: percentiles of the whole volume that become 0 and 1, where there is no `window`.
        clip: clip to [0, 1].
        window: for each channel the two values that become 0 and 1, the same in every volume.
        nan_is_background: NaN is taken for background, see `background`; else it is an error.
    """

    lower: float | None = 0.0
    upper: float | None = 99.5
    clip: bool = True
    window: tuple[tuple[float, float], ...] | None = None
    nan_is_background: bool = False

    def __str__(self) -> str:
        """What becomes 0 and 1."""
        if self.window is None:
            return f"percentiles {self.lower:g} and {self.upper:g} of each volume"
        return "the values " + ", ".join(f"{low:g} and {high:g}" for low, high in self.window)

    def of_channel(self, c: int) -> "Intensity":
        """That of the channel at place `c` alone."""
        return self if self.window is None else replace(self, window=(self.window[c],))

    def limits(self, volume: np.ndarray) -> np.ndarray:
        """The values that become 0 and 1 in each channel of a whole volume: (C, D, H, W) -> (C, 2)."""
        if self.window is not None:
            return np.array(self.window)
        return np.percentile(volume.reshape(len(volume), -1), [self.lower, self.upper], axis=1).T

    def unknown(self, voxels: np.ndarray) -> str | None:
        """Which voxels of a channel, as they are stored, have no value that can be mapped."""
        nan, infinite = np.count_nonzero(np.isnan(voxels)), np.count_nonzero(np.abs(voxels) > LARGEST_VALUE)
        if infinite:
            return f"has {infinite} infinite voxels, or beyond {LARGEST_VALUE:g}. Fix or remove the file"
        if nan == voxels.size:
            return "every voxel is NaN. Remove the file"
        if nan and not self.nan_is_background:
            return (
                f"has {nan} NaN voxels. Set intensity.nan_is_background to true in the config if they lie "
                "outside of the body; else fix or remove the file"
            )
        return None

    def without_nan(self, voxels: np.ndarray) -> np.ndarray:
        """One channel in which NaN has become background: the low end of its window, else the least value
        that is there."""
        if not np.isnan(voxels).any():
            return voxels
        low = self.window[0][0] if self.window else np.nanmin(voxels)
        return np.where(np.isnan(voxels), np.float32(low), voxels)

    def unmappable(self, voxels: np.ndarray, limits: np.ndarray) -> str | None:
        """Why a channel with these `limits` (2,) shows nothing once it is mapped."""
        low, high = voxels.min(), voxels.max()
        if low == high:
            return "all zero" if low == 0 else f"constant: every voxel is {low:g}"
        if self.window and (low >= limits[1] or high <= limits[0]):
            return (
                f"its values, {low:g} to {high:g}, lie outside of intensity.window, {limits[0]:g} to "
                f"{limits[1]:g}. Is it in other units?"
            )
        if limits[1] <= limits[0]:
            return (
                f"constant between its percentiles {self.lower:g} and {self.upper:g}: nearly empty. Remove "
                "it, or change `intensity` in the config"
            )
        return None

    def squeezed(self, voxels: np.ndarray, limits: np.ndarray) -> str | None:
        """Why most of what a channel shows takes up little of the range from 0 to 1; None: it does not.

        The file is no worse for it, the mapping is: a stray voxel, or padding below all tissue, has become 0.
        """
        (low, high), (least, most) = limits, (voxels.min(), voxels.max())
        a, b = np.percentile(voxels, [100 - BULK, BULK])
        bulk = f"{BULK:g} % of its voxels lie between {a:.4g} and {b:.4g}"
        if self.window:
            if min(b, high) - max(a, low) < LEAST_OF_WINDOW * (high - low):
                return f"{bulk}, a small part of intensity.window, {low:g} to {high:g}. Is it in other units?"
            return None
        remedy = "or set intensity.window"
        if not self.clip:
            low, high = min(low, least), max(high, most)
        if a - low > FAR_BELOW * (high - low):
            return f"minimum {least:.4g}, but {bulk}: raise intensity.lower_percentile {remedy}"
        if high - b > FAR_ABOVE * (high - low):
            return f"maximum {most:.4g}, but {bulk}: lower intensity.upper_percentile {remedy}"
        if low >= 0:  # a mask's 0 around bright tissue is background as it should be
            return None
        above = voxels[voxels > low + 0.01 * (high - low)]
        share = 1 - above.size / voxels.size
        if above.size and share > 1 - BULK / 100:
            a = np.percentile(above, 2)
            if a - low > FAR_BELOW_PADDING * (high - low):
                return (
                    f"{share:.1%} of its voxels are {low:.4g} or less, nearly all others lie above {a:.4g}: "
                    "padding takes up much of the range. Set intensity.window"
                )
        return None


def to_unit_range(volume: np.ndarray, limits: np.ndarray, clip: bool) -> np.ndarray:
    """Map each channel's `limits` (C, 2) to 0 and 1; values outside are clipped where `clip`."""
    low, high = (limits[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
    volume = ((volume - low) / (high - low)).astype(np.float32)
    return np.clip(volume, 0, 1) if clip else volume


def from_unit_range(volume: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Inverse of `to_unit_range`, without its clipping."""
    low, high = (limits[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
    return (volume * (high - low) + low).astype(np.float32)


def fit(volume: np.ndarray | torch.Tensor, size: Sequence[int]) -> np.ndarray | torch.Tensor:
    """Crop or zero-pad about the centre: (C, D, H, W) -> (C, *size)."""
    fitted = ResizeWithPadOrCrop(tuple(size))(volume)
    fitted = fitted.as_tensor() if isinstance(fitted, MetaTensor) else fitted
    return fitted.numpy() if isinstance(volume, np.ndarray) and isinstance(fitted, torch.Tensor) else fitted


@dataclass(frozen=True)
class Preprocessing:
    """Files of a case -> normalised volume (C, D, H, W), float32, RAS, at `spacing`.

    Args:
        channels: which channels of the image, in this order.
        spacing: voxel size in mm along right, anterior, superior.
        intensity: what becomes 0 and 1.
    """

    channels: tuple[int, ...]
    spacing: tuple[float, float, float]
    intensity: Intensity = Intensity()

    @property
    def key(self) -> str:
        """What the result depends on besides the files."""
        way = self.intensity
        late = [
            f"{key}={getattr(way, key)!r}" for key in ("window", "nan_is_background") if getattr(way, key)
        ]
        # The text of before these keys, so that volumes that were cached then are found.
        return (
            f"Preprocessing(channels={self.channels!r}, spacing={self.spacing!r}, lower={way.lower!r}, "
            f"upper={way.upper!r}, clip={way.clip!r}) {' '.join([CODE, *late])}"
        )

    def read(self, images: Sequence[Path]) -> np.ndarray:
        """The resampled volume in the file's own units, (C, D, H, W).

        Raises:
            UserError: a channel that is not there, or values that are not finite.
        """
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
        """The normalised volume; a warning is printed where it hardly shows after that.

        Raises:
            UserError: as `read`, and where a channel is constant or outside of its window.
        """
        volume = self.read(images)
        limits = self.intensity.limits(volume)
        for i, c in enumerate(self.channels):
            where = str(images[c] if len(images) > 1 else images[0])
            where += f": channel {c}" if len(images) == 1 and len(self.channels) > 1 else ""
            way = self.intensity.of_channel(i)
            if fault := way.unmappable(volume[i], limits[i]):
                raise UserError(f"{where}: {fault}.")
            if what := way.squeezed(volume[i], limits[i]):
                _tell_once(f"warning: {where}: {what}.")
        return to_unit_range(volume, limits, self.intensity.clip)

    def limits(self, images: Sequence[Path]) -> np.ndarray:
        """The values that become 0 and 1, in the file's own units: (C, 2)."""
        if self.intensity.window is not None:
            return np.array(self.intensity.window)
        return self.intensity.limits(self.read(images))

    def label(self, path: Path) -> np.ndarray:
        """The label on the same grid: (1, D, H, W), uint8.

        Raises:
            UserError: as `read_image`, and for values that are no whole numbers from 0 to 255.
        """
        image = read_image(path)
        if fault := label_fault(np.asanyarray(image.dataobj)):
            raise UserError(f"{path}: {fault}.")
        return _resample(path, image, 0, self.spacing)[None].astype(np.uint8)


@functools.cache
def _tell_once(text: str) -> None:
    """Not in every epoch, where volumes are not cached."""
    tell(text)


def _resample(
    path: Path,
    image: nib.spatialimages.SpatialImage,
    channel: int,
    spacing: Sequence[float],
    intensity: Intensity | None = None,
) -> np.ndarray:
    """A channel at `spacing`, in RAS; a label, to the nearest voxel, where there is no `intensity`."""
    voxels, nearest = voxels_of(path, image, channel), intensity is None
    if intensity:
        if fault := intensity.unknown(voxels):
            raise UserError(f"{path}: {f'channel {channel} ' * (channel_count(image) > 1)}{fault}.")
        voxels = intensity.without_nan(voxels)  # before a filter that would spread it
    sizes = nib.affines.voxel_sizes(image.affine)
    # The low-pass filter of skimage's anti-aliased resizing; interpolation alone would alias what it skips.
    to_ras = ornt_transform(io_orientation(image.affine), RAS)
    target = np.array(spacing)[to_ras[:, 0].astype(int)]
    if np.prod(sizes * voxels.shape / target) > MOST_VOXELS:
        raise UserError(
            f"{path}: covers {_times(sizes * voxels.shape)} mm, which is more than {MOST_VOXELS} voxels at "
            f"{_times(target)} mm. Fix its header, or choose a coarser `spacing`."
        )
    if (np.array(voxels.shape) - 1 < target / sizes / 2).any():
        raise UserError(
            f"{path}: covers {_times(sizes * voxels.shape)} mm, a single voxel along an axis at "
            f"{_times(target)} mm. Choose a finer `spacing`, in mm."
        )
    if not nearest:
        sigma = np.maximum(0, (target / sizes - 1) / 2)
        voxels = gaussian_filter(voxels, sigma) if sigma.any() else voxels
    volume = MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(image.affine))
    volume = Orientation("RAS", labels=None)(volume)
    volume = Spacing(spacing, mode="nearest" if nearest else "bilinear", padding_mode="border")(volume)
    return volume.as_tensor()[0].numpy()


def augmentation(section: dict, size: Sequence[int], random_crop: bool) -> Callable | None:
    """The random part of the way: crop, flips, small affine, intensity. None where nothing is random.

    Args:
        section: the config's `augment`, with its defaults.
        size: voxels of the crop.
        random_crop: crop at a random place, else about the centre.

    Returns:
        `f(volume, label, rng)` -> (C, *size) float32 tensor, all of its chance from `rng`.
    """
    steps = [RandFlip(section["flip_prob"], axis) for axis in section.get("flip_axes", [])]
    if section.get("rotate_degrees") or section.get("scale") or section.get("translate_voxels"):
        steps.append(
            RandAffine(
                prob=section["affine_prob"],
                rotate_range=[np.deg2rad(section["rotate_degrees"])] * 3,
                scale_range=[section["scale"]] * 3,
                translate_range=[section["translate_voxels"]] * 3,
                padding_mode="zeros",
            )
        )
    if section.get("intensity_scale"):
        steps.append(RandScaleIntensity(section["intensity_scale"], section["intensity_prob"]))
    if section.get("intensity_shift"):
        steps.append(RandShiftIntensity(section["intensity_shift"], prob=section["intensity_prob"]))
    if not steps and not random_crop:
        return None
    return RandomPart(tuple(size), random_crop, section.get("foreground_prob", 0.0), Compose(steps))


@dataclass
class RandomPart:
    """See `augmentation`. A class, since loader processes on Windows need to pickle it."""

    size: tuple[int, ...]
    random_crop: bool
    foreground_prob: float
    steps: Compose

    def __call__(
        self, volume: np.ndarray, label: np.ndarray | None, rng: np.random.RandomState
    ) -> torch.Tensor:
        volume = self._crop(volume, label, rng) if self.random_crop else volume
        image = torch.from_numpy(np.array(fit(volume, self.size), np.float32))
        # Every step gets a seed of its own, drawn even where it is not used, so that one does not shift the
        # next.
        for step in self.steps.transforms:
            image = step.set_random_state(seed=int(rng.randint(2**31)))(image)
        return image.as_tensor() if isinstance(image, MetaTensor) else image

    def _crop(self, volume: np.ndarray, label: np.ndarray | None, rng: np.random.RandomState) -> np.ndarray:
        room = np.maximum(np.array(volume.shape[1:]) - self.size, 0)
        start = np.array([rng.randint(r + 1) for r in room])
        if rng.rand() < self.foreground_prob:
            mask = label[0] > 0 if label is not None and label.any() else volume[0] > 0
            inside = np.flatnonzero(mask)
            centre = np.array(np.unravel_index(inside[rng.randint(len(inside))], mask.shape))
            start = np.clip(centre - np.array(self.size) // 2, 0, room)
        end = start + self.size
        return volume[:, start[0] : end[0], start[1] : end[1], start[2] : end[2]]
