"""DICOM series, NRRD and MetaImage files, read by SimpleITK, an optional dependency."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm import UserError

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's and ITK's axes run to the left, backwards and upwards
SERIES = "0020|000e"  # the tag of a series


def simple_itk():
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("SimpleITK")
    except ImportError:
        raise UserError(
            "DICOM, NRRD and MetaImage files need SimpleITK, which is not installed: pip install SimpleITK"
        ) from None


def is_foreign(path: Path) -> bool:
    """Whether `read` reads this file: by its suffix, or as DICOM by its content."""
    return path.name.lower().endswith(SUFFIXES) or is_dicom(path)


def is_dicom(path: Path) -> bool:
    """Whether the file is DICOM, by its 132 first bytes."""
    if path.name.lower().endswith(SUFFIXES) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def images_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each image below a folder, sorted: of a DICOM series its first file. Names are paths
    below the folder; of a second series in one folder, its number is added."""
    folders = sorted([folder, *(path for path in folder.rglob("*") if path.is_dir())])
    for one in folders:
        files = sorted(path for path in one.iterdir() if path.is_file() and path.name[0] != ".")
        for file in files:
            if file.name.lower().endswith(SUFFIXES):
                yield file.relative_to(folder).with_suffix("").as_posix(), file
        if not any(is_dicom(file) for file in files):
            continue
        reader = simple_itk().ImageSeriesReader
        for number, series in enumerate(reader.GetGDCMSeriesIDs(str(one))):
            name = one.relative_to(folder).as_posix() if one != folder else folder.name
            first = Path(reader.GetGDCMSeriesFileNames(str(one), series)[0])
            yield name if number == 0 else f"{name}_{number + 1}", first


def read(path: Path) -> nib.Nifti1Image:
    """An image as NIfTI has it: axes X, Y, Z (and channels), millimetres in RAS. Of a DICOM file its series.

    Raises:
        UserError: it cannot be read, or is no volume.
    """
    sitk = simple_itk()
    try:
        if path.name.lower().endswith(SUFFIXES):
            image = sitk.ReadImage(str(path))
        else:
            header = sitk.ImageFileReader()
            header.SetFileName(str(path))
            header.ReadImageInformation()
            reader = sitk.ImageSeriesReader()
            names = reader.GetGDCMSeriesFileNames(str(path.parent), header.GetMetaData(SERIES))
            reader.SetFileNames(names)
            image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: cannot be read as an image ({reason}).") from None
    if image.GetDimension() != 3:
        raise UserError(f"{path}: has {image.GetDimension()} dimensions; expected a volume.")
    array = sitk.GetArrayFromImage(image)  # (Z, Y, X) or (Z, Y, X, C)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return nib.Nifti1Image(np.moveaxis(array, (0, 1, 2), (2, 1, 0)), TO_RAS @ affine)
