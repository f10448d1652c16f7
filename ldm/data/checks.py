"""Find what is wrong with a data set before hours of work: from headers alone, and from every voxel.

Nothing here raises because a file is bad: it becomes a `Problem`, a row of a table.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from tqdm import tqdm

from ldm import UserError
from ldm.data.cases import Case, own_geometry
from ldm.data.embeddings import read_embedding
from ldm.data.intensity import Intensity
from ldm.data.label_names import folders_of, label_values, names_file
from ldm.data.masks import mask_values, masks_among
from ldm.data.reading import (
    channel_count,
    corners_apart,
    header_notes,
    label_fault,
    open_image,
    ras_geometry,
    read_image,
    voxels_of,
)

AS_BY_DEFAULT = Intensity()
ABOVE_WINDOW, TIMES_USUAL = 0.1, 5  # share of the voxels above the window, and above that of most cases
WRAPPED = 2**16 - 2**12  # -4096 of 16 bit, read without a sign
CORNER_TOLERANCE = 0.01  # of a voxel: how far apart the corners of grids that are the same may lie


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a case; `case` is "" where the file belongs to none.

    A `note` is on something that does no harm or that a config key handles: its case is trained on.
    """

    case: str
    file: Path
    reason: str
    note: bool = False


def note_lines(problems: Sequence[Problem]) -> list[str]:
    """The notes among some problems, a line for all that have the same reason."""
    files: dict[str, list[Path]] = {}
    for problem in problems:
        if problem.note:
            files.setdefault(problem.reason, []).append(problem.file)
    return [
        f"note: {some[0]}: {reason}"
        if len(some) == 1
        else f"note: {len(some)} files ({some[0].name}, ...): {reason}"
        for reason, some in files.items()
    ]


@dataclass(frozen=True)
class Reading:
    """What reading every voxel of a case gave.

    `intensities` is the least and the greatest value of the channels that are used. `digests` holds a hash of
    the voxels of each good image. `above` is the largest share of a channel that lies above its window (0
    without a window). `masks` are the images that look like masks, with the number of their values.
    """

    problems: list[Problem]
    intensities: tuple[float, float] | None
    digests: dict[Path, str]
    above: float = 0.0
    masks: dict[Path, int] = field(default_factory=dict)


# ---------------------------------------------------------------- headers


def check_headers(
    cases: Sequence[Case], channels: Sequence[int] | None = None, labels: bool = True
) -> list[Problem]:
    """What is wrong with a data set by its headers, and masks among its images where a look at few files
    shows them.

    Args:
        cases: the whole data set, since a case is also compared with the others.
        channels: the channels that will be used; None: all.
        labels: whether labels are checked.
    """
    problems = _header_problems(cases, channels, labels)
    bad = {problem.case for problem in problems if not problem.note}
    scans = [case for case in cases if not (case.name in bad or case.is_label_map or case.is_embedding)]
    masks = masks_among(scans)
    return _in_order([*problems, *(_mask_problem(*mask) for mask in masks)], cases)


def _header_problems(cases: Sequence[Case], channels: Sequence[int] | None, labels: bool) -> list[Problem]:
    """Unreadable files, wrong shapes and affines, channels and labels that are missing."""
    with ThreadPoolExecutor(8) as pool:  # opening files is waiting for a disk
        checked = list(pool.map(partial(check_header, channels=channels, labels=labels), cases))
    problems = [problem for found, _ in checked for problem in found]
    bad = {problem.case for problem in problems if not problem.note}
    counts = Counter(count for _, count in checked if count)
    usual = min(counts, key=lambda count: (-counts[count], count), default=0)
    for case, (_, count) in zip(cases, checked, strict=True):
        if count not in (0, usual) and case.name not in bad:
            hint = ": 4D, expected 3D" if usual == 1 else ""
            reason = f"has {count} channel(s), most cases have {usual}{hint}"
            problems.append(Problem(case.name, case.images[0], reason))
    if labels and sum(case.label is not None for case in cases) > len(cases) / 2:
        problems += [
            Problem(case.name, case.images[0], "its label is missing; most cases have one")
            for case in cases
            if case.label is None
        ]
    return problems


def check_header(
    case: Case, channels: Sequence[int] | None = None, labels: bool = True
) -> tuple[list[Problem], int]:
    """What is wrong with one case by its headers, and the number of its channels (0: some file is bad)."""
    problems, opened = [], {}

    def add(file: Path, reason: str, note: bool = False) -> None:
        problems.append(Problem(case.name, file, reason, note))

    for file in dict.fromkeys([*case.images, *([case.label] if labels and case.label else [])]):
        try:
            opened[file] = open_image(file)
        except UserError as error:
            add(file, _without_name(error, file))
    first, several = case.images[0], len(case.images) > 1
    for file, image in opened.items():
        name = "the image" if file == case.label else first.name
        if case.is_embedding:
            if file == case.label and (reason := _other_size(case)):
                add(file, reason)
        elif first in opened and (reason := _misplaced(image, opened[first], name)):
            add(file, reason)
        if (several or file != first or case.is_label_map) and channel_count(image) > 1:
            add(file, f"4D, {channel_count(image)} volumes; expected 3D")
        if file != case.label or case.is_label_map:
            if min(image.shape[:3]) == 1:
                add(file, f"shape {tuple(map(int, image.shape))}: a single slice; expected a volume")
            for reason in header_notes(image):
                add(file, reason, note=True)
    if not all(file in opened for file in case.images):
        return problems, 0
    if case.is_embedding:  # as many channels as are asked for
        return problems, 1 if channels is None else max(channels) + 1
    count = len(case.images) if several else channel_count(opened[first])
    if channels and max(channels) >= count:
        add(first, f"has {count} channel(s); `channel` asks for number {max(channels)}, counted from 0")
    return problems, count


def _other_size(case: Case) -> str | None:
    """Why the label of a case without an image has not the size that its entry in the list says, or None."""
    (shape, _), (dim, _) = ras_geometry(case.label), own_geometry(case)
    return (
        None
        if [*shape] == [*dim]
        else f"shape {tuple(map(int, shape))}, dim in the list says {tuple(map(int, dim))}"
    )


def _misplaced(image: nib.spatialimages.SpatialImage, first: nib.spatialimages.SpatialImage, name: str):
    """Why an image is not on the grid of the first image of its case, or None."""
    shape, expected = (tuple(int(side) for side in one.shape[:3]) for one in (image, first))
    if shape != expected:
        return f"shape {shape}, but {name} has {expected}"
    distance = corners_apart(shape, image.affine, first.affine)
    if distance > CORNER_TOLERANCE * nib.affines.voxel_sizes(first.affine).min():
        return f"lies elsewhere than {name}: its affine puts a corner {distance:.3g} mm away"
    return None


# ---------------------------------------------------------------- voxels


def check_cases(
    cases: Sequence[Case],
    channels: Sequence[int] | None = None,
    intensity: Intensity = AS_BY_DEFAULT,
    labels: bool = True,
    workers: int | None = None,
) -> tuple[list[Problem], dict[str, tuple[float, float]]]:
    """All that is wrong with a data set: with its headers and voxels, masks among its images, scans stored
    twice.

    Args:
        cases, channels, labels: as of `check_headers`.
        intensity: how training will map the values of these channels to 0 and 1.
        workers: volumes in memory at a time; default: one a core, 16 at most.

    Returns:
        (problems, intensities): the least and the greatest value of each case that could be read, by name.
    """
    problems = _header_problems(cases, channels, labels)
    folders = {case.label.parent: folders_of(case.label) for case in cases if labels and case.label}
    files = {folder: names_file(some) for folder, some in folders.items()}

    def read_case(case: Case) -> Reading:
        expected = files[case.label.parent] if labels and case.label else None
        return check_voxels(case, channels, intensity, labels, expected)

    # Threads: gzip, numpy and hashlib, which take nearly all the time, release Python's lock, and a process
    # would first spend seconds on importing torch.
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 16)) as pool:
        readings = list(tqdm(pool.map(read_case, cases), total=len(cases), desc="reading", unit="case"))
    problems += [problem for reading in readings for problem in reading.problems]
    if any(reading.digests.keys() - reading.masks.keys() for reading in readings):  # some are scans
        problems += [
            _mask_problem(case, file, values)
            for case, reading in zip(cases, readings, strict=True)
            for file, values in reading.masks.items()
        ]
    bad = {problem.case for problem in problems if not problem.note}
    first: dict[str, tuple[str, Path]] = {}
    for case, reading in zip(cases, readings, strict=True):
        # A copy of a scan that is left out anyway is no problem.
        for file, digest in reading.digests.items() if case.name not in bad else ():
            if (other := first.setdefault(digest, (case.name, file))) != (case.name, file):
                twin = other[1].name if other[1].name != file.name else f"{other[0]}, {other[1]}"
                reason = f"the same voxels as {twin}: the split may put one on each side. Remove one"
                problems.append(Problem(case.name, file, reason))
    problems += [problem for problem in _above_window(cases, readings) if problem.case not in bad]
    read = zip(cases, readings, strict=True)
    return _in_order(problems, cases), {case.name: one.intensities for case, one in read if one.intensities}


def _above_window(cases: Sequence[Case], readings: Sequence[Reading]) -> list[Problem]:
    """Notes on cases of which far more lies above the window than of the others, such as a CT stored from 0
    on among CTs in Hounsfield units."""
    usual = float(np.median([reading.above for reading in readings]))
    return [
        Problem(
            case.name,
            case.images[0],
            f"{reading.above:.1%} of its voxels lie above intensity.window, {usual:.1%} in most cases. Is "
            "it in other units?",
            note=True,
        )
        for case, reading in zip(cases, readings, strict=True)
        if reading.above > max(ABOVE_WINDOW, TIMES_USUAL * usual)
    ]


def check_voxels(
    case: Case,
    channels: Sequence[int] | None = None,
    intensity: Intensity = AS_BY_DEFAULT,
    labels: bool = True,
    expected: Path | None = None,
) -> Reading:
    """Read every byte of one case. `expected` is the file that names the values which its label may have;
    None: any."""
    problems, extremes, digests, above, masks = [], [], {}, 0.0, {}
    for number, file in enumerate(() if case.is_embedding else case.images):
        try:
            image = read_image(file)
        except UserError as error:
            problems.append(Problem(case.name, file, _without_name(error, file)))
            continue
        several = len(case.images) > 1
        stored = [0] if several else range(channel_count(image))
        if channels is not None and not case.is_label_map:
            stored = [c for c in stored if (number if several else c) in channels]
        hashed, faults = hashlib.sha256(), []
        for channel in stored:
            voxels = voxels_of(file, image, channel)
            used = number if several else channel
            if case.is_label_map:  # its values are no intensities
                fault, what, window = None if voxels.any() else "all zero: an empty label map", None, None
            else:
                way = intensity.of_channel(list(channels).index(used) if channels is not None else 0)
                (fault, what), window = _voxel_fault(voxels, way), way.window
                if image.get_data_dtype() == np.uint16:
                    what = what or _wrapped(voxels)
                if values := mask_values(voxels):
                    masks[file] = values
            which = f"channel {channel} " if channel_count(image) > 1 else ""
            if fault or what:
                faults.append(Problem(case.name, file, which + (fault or what), note=fault is None))
            if fault is None:
                extremes += [np.nanmin(voxels), np.nanmax(voxels)]
                above = max(above, np.mean(voxels > window[0][1]) if window else 0.0)
            voxels = apply_orientation(voxels, io_orientation(image.affine))  # RAS, whatever the storage
            hashed.update(repr(voxels.shape).encode())
            hashed.update(np.ascontiguousarray(voxels.T))
        if stored and all(one.note for one in faults):
            digests[file] = hashed.hexdigest()
        problems += faults
    if case.embedding:
        try:
            read_embedding(case)
        except UserError as error:
            problems.append(Problem(case.name, case.embedding, _without_name(error, case.embedding)))
    if labels and case.label:
        try:
            label = np.asanyarray(read_image(case.label).dataobj)
            fault = label_fault(label) or _unexpected(label, expected)
        except UserError as error:
            fault = _without_name(error, case.label)
        problems += [Problem(case.name, case.label, fault)] if fault else []
    intensities = (float(min(extremes)), float(max(extremes))) if extremes else None
    return Reading(problems, intensities, digests, float(above), masks)


def _voxel_fault(voxels: np.ndarray, intensity: Intensity) -> tuple[str | None, str | None]:
    """(Why a channel cannot be trained on, or None; else a note on it, or None)."""
    if fault := intensity.nonfinite_reason(voxels):
        return fault, None
    voxels = intensity.without_nan(voxels)
    limits = intensity.limits(voxels[None])[0]
    fault = intensity.constant_reason(voxels, limits)
    return fault, None if fault else intensity.low_contrast_reason(voxels, limits)


def _wrapped(voxels: np.ndarray) -> str | None:
    """A note where unsigned 16-bit values lie at both ends of the range and not between: negative numbers
    stored without a sign."""
    large, middle = voxels > WRAPPED, (voxels > 2**15) & (voxels <= WRAPPED)
    share = large.mean()
    if middle.any() or not 0.001 < share < 0.999 or len(np.unique(voxels[large])) < 3:
        return None
    return (
        f"{share:.1%} of its voxels lie above {WRAPPED}, none from {2**15} to there: negative numbers stored "
        "without a sign?"
    )


def _unexpected(label: np.ndarray, expected: Path | None) -> str | None:
    """Which values of a label a file does not name; an empty label is fine."""
    known = expected and label_values(expected)
    counts = np.bincount(label.astype(np.int64).ravel())
    unexpected = [value for value in np.flatnonzero(counts) if known and value not in known]
    if unexpected:
        found = ", ".join(f"{value} ({counts[value]} voxels)" for value in unexpected)
        return f"label has values that {expected.name} does not name: {found}"
    return None


def stray_files(cases: Sequence[Case]) -> list[Problem]:
    """The `._*` files that macOS leaves beside copies; `find_cases` ignores them."""
    files = {file for case in cases for file in [*case.images, *([case.label] if case.label else [])]}
    folders = sorted({file.parent for file in files if file.parent.is_dir()})
    reason = "macOS's note on a file, no image: it is passed over. Delete it"
    return [
        Problem("", stray, reason)
        for folder in folders
        for stray in sorted(folder.glob("._*"))
        if stray not in files
    ]


def _mask_problem(case: Case, file: Path, values: int) -> Problem:
    reason = f"holds {values} whole numbers in patches, other images hold many: a mask? Move it away"
    return Problem(case.name, file, f"{reason}, or choose the images by data.pattern")


def _without_name(error: UserError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ").removesuffix(".")


def _in_order(problems: Sequence[Problem], cases: Sequence[Case]) -> list[Problem]:
    """Sorted as the cases are, each once: an unreadable header is found again with the voxels."""
    place = {case.name: i for i, case in enumerate(cases)}
    return sorted(dict.fromkeys(problems), key=lambda problem: place[problem.case])
