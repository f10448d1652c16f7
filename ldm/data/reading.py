"""Read NIfTI and MGH files: headers, geometry, voxels."""

import gzip
import io
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation

from ldm import UserError

RAS = axcodes2ornt("RAS")
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz")  # in any case of letters
EMBEDDING = "_emb.nii.gz"  # the end of the names of MAISI's latents
MICROSCOPY = 0.01  # mm; smaller voxels suggest another unit, unless the header says micrometres
SMALLEST_VOXEL, LARGEST_VOXEL = 1e-4, 100.0  # mm; beyond these a header is damaged, or in other units
LARGEST_VIEW = 5000.0  # mm along a side
FARTHEST = 1e5  # mm from the scanner's origin, where float32, which headers use, resolves 0.01 mm
PIXDIM_TOLERANCE = 0.01  # of a voxel size
MGH_TAGS = 2**24  # bytes that may follow the voxels of an MGH file; in NIfTI nothing follows them
MM = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # NIfTI's units of length; any other counts as mm
MOST_FIRST_CHANNELS = 4  # a first axis up to this length, with a longer last one, is one of channels
CHUNK = 2**20


def open_image(path: Path) -> nib.spatialimages.SpatialImage:
    """Open an image and check by its header that it is a volume; `read_image` reads the voxels too.

    Its `affine` is in mm, whatever the unit of the header; the header itself is unchanged. nibabel takes the
    sform of a NIfTI, else its qform, else pixdim.

    Raises:
        UserError: no file, not a NIfTI or MGH image, not 3D or 4D with channels last, voxels that are not
            real numbers, an unusable scaling or affine, impossible sizes, or (where the file is not
            compressed) another length than the header describes.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: cannot be read: no such file. Is the data set unpacked whole?")
    try:
        image = nib.load(path)
        with nib.openers.ImageOpener(path) as file:  # `image.header` is corrected, and has no scaling
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
    if stored is not None and np.isinf(stored["scl_slope"]):  # nibabel reads it as "unscaled"
        raise UserError(f"{path}: its intensity scaling is infinite; the header is damaged.")
    if stored is not None and image.header["sform_code"] == 0:
        # nibabel corrects what is stored: a voxel size of 0 becomes 1 mm, an unknown code "no affine", which
        # mirrors the volume.
        if image.header["qform_code"] == 0 and (stored["qform_code"] != 0 or stored["sform_code"] != 0):
            raise UserError(
                f"{path}: its qform_code {stored['qform_code']} and sform_code {stored['sform_code']} do not "
                "say where it lies; the header is damaged."
            )
        if (stored["pixdim"][1:4] == 0).any():
            raise UserError(f"{path}: its voxels are {by_times(stored['pixdim'][1:4])} mm. Fix the header.")
    name, factor = _unit(image)
    image.affine[:3] *= factor
    sizes = nib.affines.voxel_sizes(image.affine)
    finite = np.isfinite(image.affine).all()
    if not finite or abs(np.linalg.det(image.affine[:3, :3])) <= 1e-6 * np.prod(sizes):
        raise UserError(f"{path}: its affine is not invertible; the header is damaged.")
    if sizes.min() < SMALLEST_VOXEL or sizes.max() > LARGEST_VOXEL:
        stated = f" ({by_times(sizes / factor)} {name} in its header)" if name != "mm" else ""
        raise UserError(
            f"{path}: its voxels are {by_times(sizes)} mm{stated}; expected {SMALLEST_VOXEL:g} to "
            f"{LARGEST_VOXEL:g} mm. Fix the header."
        )
    if (sizes * shape[:3]).max() > LARGEST_VIEW:
        raise UserError(f"{path}: covers {by_times(sizes * shape[:3] / 1000)} m; the header is damaged.")
    if (distance := np.abs(image.affine[:3, 3]).max()) > FARTHEST:
        raise UserError(f"{path}: lies {distance:.3g} mm from the scanner's origin; the header is damaged.")
    if not _is_compressed(path):
        _check_length(path, image, Path(path).stat().st_size)
    return image


def read_image(path: Path) -> nib.spatialimages.SpatialImage:
    """Open an image that is complete and, where it is compressed, passes gzip's checksum.

    nibabel stops reading at the last voxel that it needs, before the checksum, and so accepts flipped bits.

    Raises:
        UserError: as `open_image`, and where the file is cut short or damaged.
    """
    image = open_image(path)
    if not _is_compressed(path):
        return image
    try:
        content, most = io.BytesIO(), _lengths(image)[1]
        with gzip.open(path) as file:  # to its end, where the checksum is, but not much further than allowed
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


def is_embedding(path: Path) -> bool:
    """Whether a file holds latents in the place of an image."""
    return Path(path).name.endswith(EMBEDDING)


def refuse_embedding(path: Path) -> None:
    """Raise UserError where an image is needed, and the file is an embedding."""
    if is_embedding(path):
        raise UserError(f"{path}: is an embedding, and the image itself is needed here. Name it in the list.")


def header_notes(image: nib.spatialimages.SpatialImage) -> list[str]:
    """Notes on what `open_image` converts or chooses where a header is unusual or contradicts itself."""
    if not isinstance(image, nib.Nifti1Image):
        return []
    header, (name, factor) = image.header, _unit(image)
    notes = [f"header in {name}, converted to mm"] if name != "mm" else []
    sizes = nib.affines.voxel_sizes(image.affine)
    if sizes.max() < MICROSCOPY and factor != MM[3][1]:
        notes.append(f"voxels of {by_times(sizes)} mm: is the unit in its header wrong?")
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
            f"pixdim says voxels of {by_times(pixdim)} mm, the sform {by_times(sizes)} mm: the sform wins"
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
    """The largest distance in mm between the corners of a volume under two affines."""
    corners = np.stack(np.meshgrid(*([0, side - 1] for side in shape[:3])), -1).reshape(-1, 3)
    apart = nib.affines.apply_affine(a, corners) - nib.affines.apply_affine(b, corners)
    return float(np.linalg.norm(apart, axis=1).max())


def grids_differ(image: nib.spatialimages.SpatialImage, other: nib.spatialimages.SpatialImage) -> str | None:
    """How the grid of an image differs from that of another, or None where it does not."""
    if other.shape[:3] != image.shape[:3]:
        return f"{other.shape[:3]}, not {image.shape[:3]}"
    apart = corners_apart(image.shape, image.affine, other.affine)
    close = apart <= SAME_GRID * nib.affines.voxel_sizes(image.affine).min()
    return None if close else f"lies up to {apart:.2g} mm apart"


def check_grid(
    path: Path, other: nib.spatialimages.SpatialImage, image_path: Path, image: nib.spatialimages.SpatialImage
) -> None:
    """Raise UserError where a label or a mask does not lie on the grid of its image."""
    if how := grids_differ(image, other):
        raise UserError(f"{path}: its grid is not that of {image_path.name}: {how}. Resample it to that.")


def voxels_of(path: Path, image: nib.spatialimages.SpatialImage, channel: int) -> np.ndarray:
    """One channel of an image of `read_image`, in the file's units: (X, Y, Z) float32.

    Raises:
        UserError: the channel is missing; `path` is for the message.
    """
    if channel >= channel_count(image):
        raise UserError(
            f"{path}: has {channel_count(image)} channel(s); `channel`, counted from 0, asks for number "
            f"{channel}."
        )
    index = (..., *(channel if side > 1 else 0 for side in image.shape[3:]))
    stored = image.dataobj if len(image.shape) == 3 else image.dataobj[index]
    with np.errstate(over="ignore", invalid="ignore"):  # values beyond float32 become infinite
        return np.require(stored, np.float32, ["E", "W"])  # a copy where the file is memory-mapped


def channel_count(image: nib.spatialimages.SpatialImage) -> int:
    """Volumes in an image."""
    return math.prod(map(int, image.shape[3:]))


def _is_compressed(path: Path) -> bool:
    return str(path).lower().endswith((".gz", ".mgz"))


def _lengths(image: nib.spatialimages.SpatialImage) -> tuple[int, int]:
    """The least and the greatest length in bytes of a file with this header, uncompressed."""
    least = image.dataobj.offset + math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
    return least, least + (MGH_TAGS if isinstance(image, nib.MGHImage) else 0)


def _check_length(path: Path, image: nib.spatialimages.SpatialImage, held: int) -> None:
    least, most = _lengths(image)
    if not least <= held <= most:
        hint = "Is the file whole?" if held < least else "The header is damaged."
        raise UserError(
            f"{path}: its voxels cannot be read ({held} bytes where the header asks for {least}). {hint}"
        )


SAME_GRID = 0.01  # of a voxel: how far the corners of two grids may be apart
LARGEST_LABEL = 32767  # labels are uint8, or int16 where a value needs it


def label_type(values: Sequence[int]) -> type:
    """The type of voxels that holds these label values."""
    return np.uint8 if max(values, default=0) <= 255 else np.int16


def label_fault(label: np.ndarray) -> str | None:
    """Why the stored values of a label are not whole numbers from 0 to `LARGEST_LABEL`, or None."""
    if bad := label.size - np.count_nonzero(np.isfinite(label)):
        return f"label has {bad} NaN or infinite voxels"
    if label.dtype.kind == "f" and (bad := np.count_nonzero(label != np.rint(label))):
        return f"label has {bad} voxels that are no whole numbers: an image, or resampled without `nearest`?"
    if label.min() < 0 or label.max() > LARGEST_LABEL:
        return f"label has values from {label.min():g} to {label.max():g}; expected 0 to {LARGEST_LABEL}"
    return None


def by_times(numbers: Sequence[float]) -> str:
    """`2 x 1.5 x 3` of three numbers."""
    return " x ".join(f"{number:.4g}" for number in numbers)


def ras_geometry(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Shape and voxel size in mm of an image along right, anterior and superior, from its header alone."""
    image = open_image(path)
    order = np.argsort(io_orientation(image.affine)[:, 0])
    return np.array(image.shape[:3])[order], np.array(nib.affines.voxel_sizes(image.affine))[order]
