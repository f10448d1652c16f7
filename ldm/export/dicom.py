"""A generated volume as a DICOM image series. (`segmentations` has its label.)

pydicom is an optional dependency, which only `package` imports. Sections, such as A.3, are those of DICOM
PS3.3.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.ndimage import find_objects

from ldm import UserError
from ldm.data.foreign import TO_RAS
from ldm.data.label_names import named_values
from ldm.data.reading import channel_count, check_grid, label_fault, label_type, read_image, voxels_of
from ldm.export import records
from ldm.system.files import read_json, sha256_of

IMAGE_CLASSES = {"CT": "CTImageStorage", "MR": "MRImageStorage"}
LPS = axcodes2ornt("LPS")
STEPS = 65000  # of the 65536 of 16 bits, into which the range of an MR image is divided
LEAST_RANGE = 10.0  # HU; an image with less is in other units
ACROSS = 1e-4  # cosine of the angle between two axes, up to which they count as perpendicular
LONGEST_NAME = 64  # characters of DICOM's LO
SOFTWARE = "3D latent diffusion"
SYNTHETIC = "Synthetic: drawn, wholly or in part, by a latent diffusion model. Not for diagnosis."


def package(name: str):
    """An optional package, or a module of one.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        needed = name.partition(".")[0]
        raise UserError(f"DICOM needs {needed}, which is not installed: pip install {needed}") from None


# ---------------------------------------------------------------- what is exported


@dataclass(frozen=True)
class Pair:
    """A generated volume and its label. Their axes run to the left, backwards and upwards, as DICOM's do.

    Attributes:
        path: of the image.
        name: of the sample.
        voxels: (C, X, Y, Z) float32, finite.
        label: (X, Y, Z) whole numbers, or None.
        affine: (4, 4), from voxels to mm in DICOM's axes (LPS).
        hashes: SHA-256 of the files of image and label; "" without a label.
        origin: how the volume was made, by its record.
    """

    path: Path
    name: str
    voxels: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    hashes: tuple[str, str]
    origin: str

    @property
    def spacing(self) -> np.ndarray:
        """In mm along X, Y and Z."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def values(self) -> list[int]:
        """The values of the label, without 0."""
        boxes = [] if self.label is None else find_objects(self.label)
        return [value for value, box in enumerate(boxes, 1) if box]

    def uid(self, *of: object) -> str:
        """A UID that follows from the content of the image's file and from what it is the UID `of`."""
        return package("pydicom.uid").generate_uid(entropy_srcs=["/".join(map(str, (self.hashes[0], *of)))])


def read_pair(path: Path, label: Path | None, name: str) -> Pair:
    """Read an image, and its label where it has one.

    Raises:
        UserError: a file cannot be read, voxels are not finite, axes are not perpendicular, the label is no
            label or of another grid, or the record is damaged or of another file.
    """
    image = read_image(path)
    voxels = np.stack([voxels_of(path, image, c) for c in range(channel_count(image))])
    if bad := voxels.size - np.count_nonzero(np.isfinite(voxels)):
        raise UserError(f"{path}: has {bad} NaN or infinite voxels, which DICOM cannot hold.")
    directions = image.affine[:3, :3] / nib.affines.voxel_sizes(image.affine)
    if np.abs(directions.T @ directions - np.eye(3)).max() > ACROSS:
        raise UserError(
            f"{path}: its axes are not perpendicular (a sheared affine), which DICOM cannot say. Resample it."
        )
    mask, hashes = None, (sha256_of(path), "")
    if label:
        mask, hashes = read_label(label, path, image), (hashes[0], sha256_of(label))
    turn = ornt_transform(io_orientation(image.affine), LPS)
    affine = TO_RAS @ image.affine @ inv_ornt_aff(turn, image.shape[:3])
    voxels = np.stack([apply_orientation(one, turn) for one in voxels])
    mask = None if mask is None else apply_orientation(mask, turn)
    return Pair(path, name, voxels, mask, affine, hashes, origin_of(path, hashes[0], label, hashes[1]))


def read_label(path: Path, image_path: Path, image: nib.spatialimages.SpatialImage) -> np.ndarray:
    """The label of an image, (X, Y, Z) on the image's own axes.

    Raises:
        UserError: it cannot be read, has several channels or values that are none, or another grid.
    """
    label = read_image(path)
    if channel_count(label) > 1:
        raise UserError(f"{path}: has {channel_count(label)} channels; expected a label, which has one.")
    check_grid(path, label, image_path, image)
    voxels = np.asanyarray(label.dataobj).reshape(label.shape[:3])
    if fault := label_fault(voxels):
        raise UserError(f"{path}: {fault}.")
    return voxels.astype(label_type([voxels.max()]))


def origin_of(path: Path, digest: str, label: Path | None, label_digest: str) -> str:
    """How a volume was made, by the record beside it.

    Raises:
        UserError: it is damaged, or the volume or the label beside it is not the one that it describes.
    """
    record, file = records.record_of(path), records.record_path(path)
    if record is None:
        return "It has no record of how it was made."
    described = {path: record["volume"]["sha256"]}
    if "label" in record["volume"]:
        described[records.label_path(path)] = record["volume"]["label"]["sha256"]
    for one, found in ((path, digest), (label, label_digest)):
        if described.get(one, found) != found:
            raise UserError(
                f"{one}: was changed since inference.py wrote it, so {file.name} does not describe it. Move "
                "the record away to export it without."
            )
    return f"Record {file.name}: seed {record['seed']}, SHA-256 of the config {record['config_sha256']}."


def read_names(path: Path) -> dict[int, str]:
    """The names of label values in a dataset.json, or in a JSON object of names and values.

    Raises:
        UserError: it has none, or one that DICOM cannot hold.
    """
    content = read_json(path)
    names = named_values(content.get("labels", content))
    if not names:
        raise UserError(
            f'{path}: names no label. Expected a dataset.json, or an object such as {{"liver": 1}}.'
        )
    for name in names.values():
        if not name.strip() or len(name) > LONGEST_NAME or "\\" in name or not name.isprintable():
            raise UserError(
                f"{path}: the name {name[:80]!r} cannot be DICOM's: at most {LONGEST_NAME} characters, no \\."
            )
    return names


# ---------------------------------------------------------------- any dataset


def save(dataset, path: Path) -> None:
    """Write a dataset as a DICOM file (PS3.10)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def header(pair: Pair, storage: str, modality: str, series: Sequence[object], number: int):
    """A dataset with what all of a study's have: synthetic patient, study, series, equipment, SOP class.

    Args:
        storage: the SOP class, such as CTImageStorage.
        series: of what the series' UID is.
        number: of the series.
    """
    pydicom = package("pydicom")
    dataset = pydicom.Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"  # UTF-8
    dataset.SOPClassUID = getattr(pydicom.uid, storage)
    dataset.SyntheticData = "YES"
    name = re.sub(r"[\\^=]", "_", pair.name)[: LONGEST_NAME - 10]
    dataset.PatientName, dataset.PatientID = f"Synthetic^{name}", f"SYNTHETIC-{pair.hashes[0][:16]}"
    dataset.StudyInstanceUID, dataset.StudyDescription = pair.uid("study"), "Synthetic, latent diffusion"
    dataset.SeriesInstanceUID, dataset.SeriesNumber = pair.uid("series", *series), number
    dataset.Modality = modality
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = pair.uid("frame of reference"), ""
    dataset.Manufacturer, dataset.ManufacturerModelName = SOFTWARE, "export_dicom.py"
    for unknown in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
        setattr(dataset, unknown, "")
    dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    return dataset


def decimals(*numbers: float) -> list[str]:
    """Numbers as DICOM's decimal strings, of at most 16 characters."""
    formatted = package("pydicom.valuerep").format_number_as_ds
    return [formatted(float(number) + 0.0) for number in numbers]  # -0.0 + 0.0 is 0.0


# ---------------------------------------------------------------- image


def write_image(folder: Path, pair: Pair, modality: str) -> list:
    """Write an image into a folder for each channel, and return the headers of the first one's slices.

    Args:
        folder: of the study.
        modality: CT, the values are Hounsfield units; or MR.

    Raises:
        UserError: values that are no Hounsfield units.
    """
    first, several = [], len(pair.voxels) > 1
    for channel in range(len(pair.voxels)):
        where = folder / (f"{modality}_{channel}" if several else modality)
        for dataset in image_series(pair, channel, modality):
            save(dataset, where / f"{dataset.InstanceNumber:04d}.dcm")
            if channel == 0:
                del dataset.PixelData
                first.append(dataset)
    return first


def image_series(pair: Pair, channel: int, modality: str) -> Iterator:
    """The slices of a channel from the feet upwards, as CT Image Storage (A.3) or MR Image Storage (A.4)."""
    slope, intercept = scaling(pair, channel, modality)
    columns, rows, slices = pair.voxels.shape[1:]
    x, y, z = pair.spacing
    right, down = (pair.affine[:3, :2] / (x, y)).T
    window = (40.0, 400.0)
    if modality == "MR":
        low, high = np.percentile(pair.voxels[channel], (1, 99))
        window = ((low + high) / 2, max(high - low, float(slope)))
    of = (modality, channel)
    for k in range(slices):
        dataset = header(pair, IMAGE_CLASSES[modality], modality, of, channel + 1)
        dataset.SOPInstanceUID, dataset.InstanceNumber = pair.uid("slice", *of, k), k + 1
        number = f", channel {channel}" if len(pair.voxels) > 1 else ""
        dataset.SeriesDescription = f"Synthetic {modality}{number}"
        dataset.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if modality == "CT" else "OTHER"]
        dataset.DerivationDescription, dataset.ImageComments = SYNTHETIC, f"{SYNTHETIC} {pair.origin}"
        dataset.PatientPosition, dataset.AcquisitionNumber = "HFS", ""
        corner = pair.affine @ (0, 0, k, 1)
        dataset.ImagePositionPatient = decimals(*corner[:3])
        dataset.ImageOrientationPatient = decimals(*right, *down)
        dataset.PixelSpacing = decimals(y, x)  # between rows, then between columns
        dataset.SliceThickness = dataset.SpacingBetweenSlices = decimals(z)[0]
        dataset.SliceLocation = decimals(np.cross(right, down) @ corner[:3])[0]
        dataset.Rows, dataset.Columns = rows, columns
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = 1  # signed
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        dataset.WindowCenter, dataset.WindowWidth = decimals(*window)
        if modality == "CT":
            dataset.RescaleType, dataset.KVP = "HU", ""
        else:
            dataset.RescaleType = "US"  # unspecified
            dataset.ScanningSequence, dataset.SequenceVariant = "RM", "NONE"  # research mode
            dataset.ScanOptions, dataset.MRAcquisitionType = "", "3D"
            dataset.RepetitionTime = dataset.EchoTime = dataset.EchoTrainLength = ""
        plane = (pair.voxels[channel, ..., k].T.astype(np.float64) - float(intercept)) / float(slope)
        dataset.PixelData = np.rint(plane).astype("<i2").tobytes()
        yield dataset


def scaling(pair: Pair, channel: int, modality: str) -> tuple[str, str]:
    """Slope and intercept that give the values of a channel back from int16, to half a slope.

    Of CT these are 1 and 0: whole Hounsfield units. The range of an MR image is divided into `STEPS`.

    Raises:
        UserError: values that are no Hounsfield units.
    """
    low, high = float(pair.voxels[channel].min()), float(pair.voxels[channel].max())
    if modality == "MR":
        return tuple(decimals((high - low) / STEPS or 1.0, (high + low) / 2))
    if high - low < LEAST_RANGE or round(low) < -(2**15) or round(high) >= 2**15:
        raise UserError(
            f"{pair.path}: its values, {low:.4g} to {high:.4g}, are no Hounsfield units. Use --modality MR."
        )
    return "1", "0"
