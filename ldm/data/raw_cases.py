"""Find raw scans, with the brain masks of data sets that have them; read one with label and mask."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm import UserError, counted, few
from ldm.data import foreign
from ldm.data.label_names import folders_of, names_file, names_in, renumbered
from ldm.data.layouts import find_cases
from ldm.data.names import stem_of, suffix_of
from ldm.data.reading import (
    channel_count,
    grids_differ,
    label_fault,
    label_type,
    read_image,
    refuse_embedding,
    voxels_of,
)
from ldm.data.scan import Scan

AUTO = "auto"


@dataclass(frozen=True)
class RawCase:
    """A raw scan: one file, or one a channel, in any format; with label and brain mask, where it has them. No
    `subject` stands for the name."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    mask: Path | None = None
    subject: str = ""


def find_raw_cases(
    source: Path,
    pattern: str | None = None,
    contrasts: Sequence[str] | None = None,
    outputs: Sequence[Path] = (),
    log: Callable[[str], None] = print,
) -> list[RawCase]:
    """The scans of a folder or list: of NFBS or CC359 with their brain masks; or DICOM series, NRRD and
    MetaImage files; or those of `ldm.data.layouts.find_cases`, whose arguments these are. Names are such that
    files can bear them.

    Raises:
        UserError: as `find_cases`; or NIfTI files among others, numbers of files that differ, or two scans
            with one name.
    """
    if source.is_dir() and not pattern and (cases := _nfbs(source) or _cc359(source)):
        log(f"found: {counted(len(cases), 'scan{s}')} with brain masks in {source}")
    elif source.is_dir() and not pattern and (found := list(foreign.images_below(source))):
        nifti = next((path for path in sorted(source.rglob("*")) if suffix_of(path.name)), None)
        if nifti:
            raise UserError(
                f"{source}: holds {nifti.name} and also {found[0][1].name}. Put NIfTI files and others into "
                "folders of their own, or choose NIfTI files by --pattern."
            )
        log(f"found: {counted(len(found), 'DICOM, NRRD or MetaImage scan{s}')} in {source}")
        cases = [RawCase(name, (file,)) for name, file in found]
    else:
        some = find_cases(source, pattern, contrasts=contrasts, outputs=outputs, generated=False, log=log)
        cases = [
            RawCase(one.name, one.images, one.label, subject=one.subject) for part in some for one in part
        ]
    if len(counts := {len(case.images) for case in cases}) > 1:
        raise UserError(f"{source}: some scans have {min(counts)} files, others {max(counts)}.")
    names = [re.sub(r"[^A-Za-z0-9.-]+", "_", case.name) for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{source}: two scans would be written under one name: {few(twice)}. Rename one.")
    return [
        replace(case, name=name, subject=case.subject or case.name)
        for name, case in zip(names, cases, strict=True)
    ]


def _nfbs(source: Path) -> list[RawCase]:
    """Scans of the NFB skull-stripped repository: A000*/sub-A000*_ses-NFB3_T1w.nii.gz and ..._brainmask."""
    masks = sorted(source.glob("**/*_T1w_brainmask.nii.gz"))
    pairs = [(mask.with_name(mask.name.replace("_brainmask", "")), mask) for mask in masks]
    return [RawCase(stem_of(scan.name), (scan,), None, mask) for scan, mask in pairs if scan.is_file()]


def _cc359(source: Path) -> list[RawCase]:
    """Scans of the Calgary-Campinas set: Original/CC*.nii.gz, with CC*_ss or CC*_staple in folders beside."""
    cases = []
    for scan in sorted(source.glob("**/Original/CC*.nii.gz")):
        beside = scan.parent.parent
        masks = [sorted(beside.glob(f"**/{stem_of(scan.name)}{end}.nii.gz")) for end in ("_staple", "_ss")]
        if found := [*masks[0], *masks[1]]:
            cases.append(RawCase(stem_of(scan.name), (scan,), None, found[0]))
    return cases


# ---------------------------------------------------------------- reading


def open_any(path: Path) -> nib.spatialimages.SpatialImage:
    """An image in any format that is read."""
    return foreign.read(path) if foreign.is_foreign(path) else read_image(path)


def read_raw(
    case: RawCase,
    brain_mask: str | None = None,
    dictionary: dict[str, int] | None = None,
    pseudo_labels: Path | None = None,
) -> Scan:
    """All channels of a case, its label and its mask.

    Args:
        brain_mask: a file, a folder of files named as the scans, or `auto`; None: the case's own mask, if it
            has one.
        dictionary: the values of the label by name, see `renumbered`; None: those of the file.
        pseudo_labels: a folder of label maps named as the scans, which count where the case's own label is 0;
            they need the dictionary.

    Raises:
        UserError: a file that cannot be read or is missing, grids that differ, or labels that the dictionary
            does not name.
    """
    refuse_embedding(case.images[0])
    images = [(path, open_any(path)) for path in case.images]
    first, affine, shape = case.images[0], images[0][1].affine, images[0][1].shape[:3]

    def check_grid(path: Path, image: nib.spatialimages.SpatialImage) -> None:
        if grids_differ(images[0][1], image):
            raise UserError(f"{path}: lies on another grid than {first}.")

    for path, image in images[1:]:
        check_grid(path, image)
    voxels = np.stack(
        [voxels_of(path, image, c) for path, image in images for c in range(channel_count(image))]
    )
    label = mask = None

    def read_label(path: Path, folders: Sequence[Path]) -> np.ndarray:
        image = open_any(path)
        check_grid(path, image)
        values = np.asanyarray(image.dataobj).reshape(shape)
        if fault := label_fault(values):
            raise UserError(f"{path}: {fault}.")
        values = values.astype(label_type([values.max()]))
        if not dictionary:
            return values
        named = names_file(folders)
        return renumbered(values, names_in(named) if named else {}, dictionary, path)

    if case.label:
        label = read_label(case.label, folders_of(case.label))
    if pseudo_labels:
        other = read_label(_file_of(case, pseudo_labels, "label map"), [pseudo_labels])
        label = other if label is None else np.where(label > 0, label, other)
    if brain_mask == AUTO:
        mask = automatic_mask(voxels[0])
    elif path := _mask_file(case, brain_mask):
        image = open_any(path)
        check_grid(path, image)
        mask = np.asanyarray(image.dataobj).reshape(shape) > 0
    return Scan(voxels, affine, label, mask)


def _mask_file(case: RawCase, brain_mask: str | None) -> Path | None:
    if brain_mask is None:
        return case.mask
    given = Path(brain_mask)
    return _file_of(case, given, "mask") if given.is_dir() else given


def _file_of(case: RawCase, folder: Path, what: str) -> Path:
    """The file of a folder that is named as a case or its first image; else the one whose name begins so."""
    stem, paths = stem_of(case.images[0].name), sorted(folder.iterdir())
    exact = [path for path in paths if stem_of(path.name) in (case.name, stem)]
    fitting = exact or [path for path in paths if re.match(rf"{re.escape(stem)}(?![0-9])", path.name)]
    if len(fitting) != 1:
        raise UserError(
            f"{folder}: {len(fitting)} files begin with {stem}; expected one {what} for each scan."
        )
    return fitting[0]


def automatic_mask(voxels: np.ndarray) -> np.ndarray:
    """A brain mask by DIPY's median_otsu, an optional dependency: (X, Y, Z) -> bool.

    Raises:
        UserError: DIPY is not installed.
    """
    try:
        from dipy.segment.mask import median_otsu
    except ImportError:
        raise UserError(
            "--brain-mask auto: needs DIPY, which is not installed: pip install dipy. Or name masks."
        ) from None
    return median_otsu(np.nan_to_num(voxels), median_radius=4, numpass=4)[1].astype(bool)
