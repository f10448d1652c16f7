"""Find the cases of a data set, whichever way its folder is laid out, and say what was passed over.

Layouts read by `find_cases`: a Medical Segmentation Decathlon folder, an nnU-Net raw folder, a plain or
BIDS-like folder of NIfTI files with an optional `participants.tsv`, and a JSON list of training and
validation files. Names of masks, contrasts and patients are those of the public data sets.
"""

import csv
import fnmatch
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldm import UserError, brief
from ldm.datasets import Case, parse_json, read_json
from ldm.provenance import record_path
from ldm.transforms import IMAGE_SUFFIXES

FOREIGN_SUFFIX = re.compile(
    r"\.(mha|mhd|nrrd|nhdr|dcm|ima|img|img\.gz|hdr|mgh|mnc|gipl|head|npy|npz|h5|hdf5)$", re.IGNORECASE
)
SYSTEM_FOLDERS = {"lost+found", "system volume information", "$recycle.bin", "__macosx"}

# A word of a name ends at "_", "-", ".", "+", a space, or before a capital.
WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])")
# FreeSurfer's aseg, FSL's pveseg, BIDS' dseg and probseg, seg35 of OASIS in Learn2Reg, BrainExtractionMask.
MASK_WORD = re.compile(
    r"\w*(mask|seg|segm|segmentation|label|labelmap|parcellation)s?\d*|msk|gt|roi|rois|wmh|wmparc|aparc|aseg"
    r"|\w*lesions?|pve|probmap|ribbon|staple|annotations?|groundtruth|truth"
)
FIRST_MASK_WORD = re.compile(r"(mask|seg|segmentation|label|gt|msk)s?\d*")
INNER_MASK_WORDS = {"aparc", "aseg", "wmparc", "brainmask"}  # aparc.DKTatlas, aseg.auto, brainmask_fs.2
FREESURFER_MASKS = {"wm", "filled", "ctrl_pts", "entowm"}  # in .mgz
MASK_FOLDER = re.compile(
    r"(masks?|labels?(tr|ts|va|val)?|segmentations?|seg|segs|annotations?|groundtruth|gt|rois?|parcellations?|silver)"
)
TEMPLATE = re.compile(r"(mni152|avg152|icbm152|colin27|sri24|template|tpl-)", re.IGNORECASE)
LABEL_WORDS = ("dseg", "seg", "label", "mask", "segmentation", "gt", "labels", "msk")
IMAGE_WORD = re.compile(r"images|image|imaging|img|volume", re.IGNORECASE)

CONTRAST_WORD = re.compile(
    r"(3d)?(t1w?|t1c|t1ce|t1gd|t1n|t2w?|t2f|t2s|t2star|flair|pdw?|dwi|adc|swi|dti|bold|asl|ct|cta|ctres|pet|suv"
    r"|mri?|mra|tof|mprage|mp2rage|dce|stir)"
)
CHANNEL_WORD = re.compile(r"_000\d")
PROCESSED_WORD = re.compile(r"brain|bet|stripped|orig|norm|nu|restore|rawavg")
VISIT_WORD = re.compile(
    r"(ses|session|visit|v|scan|run|tp|time|timepoint|m|month|y|year|w|week|d|day|frame|bl|baseline|fu|followup"
    r"|screening|sc|i|s)?\d*|bl|baseline|screening"
)
RETURN_WORD = re.compile(
    r"(ses|session|visit|v|tp|time|timepoint|m|month|y|year|w|week|fu|followup)\d+|bl|baseline|followup|screening"
)
# What of a BIDS name makes another version of a scan, where the patient, the session and the run are one.
VERSIONS = ("space-", "desc-", "rec-", "res-", "ce-", "echo-", "part-", "inv-", "label-", "mt-", "flip-")

# How the public data sets name a patient: BIDS, ADNI, OASIS-1 and -2, OASIS-3, BraTS since 2023, IXI, ACDC.
PATIENT = re.compile(
    r"(?<![A-Za-z0-9])(sub-[A-Za-z0-9]+|\d{3}_S_\d{4,5}|OAS[12]_\d{4}|OAS3\d{4}|BraTS-[A-Za-z]+-\d{5}|IXI\d{3}"
    r"|patient\d+)(?![A-Za-z0-9])"
)
# Folders that hold many patients, not the visits of one.
SETS = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|images?(tr|ts|va)?|raw(data)?|data|site|cent(er|re)|batch|part|fold"
    r"|group|hgg|lgg|ad|cn|mci|hc|nc|controls?|patients|healthy|normals?|diseased?)[_ -]?([a-z]|\d*)",
    re.IGNORECASE,
)
MOST_SCANS = 12  # of a patient, on average; a folder that holds more is a site's
SHOWN = 100  # characters of names, of each kind, in the line on what was found


@dataclass(frozen=True)
class File:
    """A file below the data folder; `parts` are the names on the way to it."""

    path: Path
    parts: tuple[str, ...]
    is_link: bool = False

    @property
    def folder(self) -> tuple[str, ...]:
        return self.parts[:-1]

    @property
    def stem(self) -> str:
        return _stem(self.parts[-1])

    @property
    def name(self) -> str:
        return "/".join(self.parts)


@dataclass
class Search:
    """What is looked for, and what was passed over on the way: names by kind, `{s}` marking the plural."""

    pattern: str | None
    contrasts: Sequence[str] | None
    subject: re.Pattern | None
    outputs: Sequence[Path]
    generated: bool
    passed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    folder_each: str = ""  # a folder or beginning of names that was taken for a patient, if one was
    read: Path | None = None  # the folder or list that was
    plain: bool = False  # whether it is a plain folder

    def subject_of(self, name: str, path: str) -> str:
        """The patient of a scan: by `data.subject`, or as the public sets name it; else the scan's name."""
        if self.subject is not None:
            if not (match := self.subject.search(path)) or not match[1]:
                what = brief(repr(self.subject.pattern))
                raise UserError(f"data.subject is {what}, which finds no subject in {brief(path)}.")
            return match[1]
        if name.startswith("sub-"):
            return name.split("_")[0]
        known = PATIENT.search(name) or PATIENT.search(path)
        return known[1] if known else name


def find_cases(
    source: Path | Sequence[Path],
    pattern: str | None = None,
    *,
    contrasts: Sequence[str] | None = None,
    subject: str | None = None,
    outputs: Sequence[Path] = (),
    generated: bool = True,
    say: Callable[[str], None] | None = None,
) -> tuple[list[Case], list[Case]]:
    """List the cases of a data set, sorted by name.

    Args:
        source: a folder, the parent of one, a `.json` list, or several of these.
        pattern: glob of the images of a plain folder.
        contrasts: endings of the files of a plain folder that become the channels of one case, in this order.
        subject: regular expression with one group, searched in an image's path below the folder, that gives
            its subject.
        outputs: folders of the run's own, passed over where they lie below `source`.
        generated: whether volumes with a record of inference.py beside them are taken.
        say: is given one line on what was found and what was passed over.

    Returns:
        (cases, validation): `validation` is empty unless the data set itself names validation cases.

    Raises:
        UserError: nothing there, a folder that cannot be read, names that are not unique, or several images
            of a patient where one is expected.

    Whether all files that a data set names are there and can be read is what `ldm.checks` tells.
    """
    regex, searches, cases, validation = _subject_pattern(subject), [], [], []
    alone = isinstance(source, (str, Path))
    roots = [Path(one) for one in ([source] if alone else source)]
    for root, prefix in zip(roots, [""] if alone else _distinct_names(roots), strict=True):
        searches.append(Search(pattern, contrasts, regex, outputs, generated))
        for to, found in zip((cases, validation), _find_in(root, searches[-1]), strict=True):
            to += found if alone else [_renamed(case, f"{prefix}/") for case in found]
    names = Counter(case.name for case in [*cases, *validation])
    if twice := next((name for name, count in names.items() if count > 1), None):
        where = ", ".join(map(str, roots))
        raise UserError(f"{where}: the case '{twice}' is there twice. Every case needs a name of its own.")
    if say:
        say(_line(cases, validation, searches))
    return cases, validation


def _line(cases: list[Case], validation: list[Case], searches: list[Search]) -> str:
    """What was found and what was passed over, in one line."""
    passed = defaultdict(list)
    for search in searches:
        for kind, names in search.passed.items():
            passed[kind] += names
    every = [*cases, *validation]
    files = max((len(case.images) for case in every), default=1)
    each = f" of {files} files each" if files > 1 else ""
    of_these = f" ({len(validation)} of them for validation)" if validation else ""
    subjects = _count(len({case.subject for case in every}), "subject{s}")
    guessed = next((search.folder_each for search in searches if search.folder_each), None)
    by = f" (a folder or name each, such as {brief(guessed)})" if guessed else ""
    line = (
        f"found: {_count(len(every), 'image{s}')}{each}{of_these}, "
        f"{_count(sum(case.label is not None for case in every), 'label{s}')}, "
        f"{subjects}{by} in {', '.join(str(search.read) for search in searches)}"
    )
    if searches[0].pattern is not None and not any(search.plain for search in searches):
        line += " (data.pattern is for plain folders, and not used)"
    return f"{line}; passed over: {_passed(passed)}" if any(passed.values()) else line


def _passed(passed: dict[str, list[str]]) -> str:
    told = []
    for kind, names in sorted(passed.items(), key=lambda item: item[0] != "mask{s}"):
        if not names:
            continue
        distinct = list(dict.fromkeys(map(brief, names)))
        few = ", ".join(distinct)
        few = few if len(distinct) == 1 or len(few) <= SHOWN else f"such as {distinct[0]}"
        told.append(f"{_count(len(names), kind)} ({few})")
    return ", ".join(told)


def _count(number: int, kind: str) -> str:
    return f"{number} {kind.format(s='' if number == 1 else 's')}"


def _subject_pattern(subject: str | None) -> re.Pattern | None:
    if subject is None:
        return None
    try:
        pattern = re.compile(subject)
    except re.error as error:
        raise UserError(f"data.subject is {brief(repr(subject))}, no regular expression ({error}).") from None
    if pattern.groups != 1:
        raise UserError(
            f"data.subject is {brief(repr(subject))}; expected one group in parentheses, found "
            f'{pattern.groups}. An example: "^([^/]+)/" takes the first folder.'
        )
    return pattern


def _distinct_names(roots: list[Path]) -> list[str]:
    """The last names of some folders, with as many of those above as keep them apart."""
    full = [root.resolve() for root in roots]
    for i, one in enumerate(full):
        for other in full[:i]:
            if one == other:
                raise UserError(f"{one}: is named twice in the list of data folders. Name it once.")
            for inner, outer in ((one, other), (other, one)):
                if inner.is_dir() and outer in inner.parents:
                    raise UserError(
                        f"{inner}: lies in {outer}, which is in the list of data folders too. Name one."
                    )
    for count in range(1, max(len(one.parts) for one in full) + 1):
        names = ["/".join(one.parts[-count:]).replace("//", "/") for one in full]
        if len(set(names)) == len(names):
            break
    return names


def _renamed(case: Case, prefix: str) -> Case:
    return Case(prefix + case.name, case.images, case.label, prefix + case.subject, case.covariates)


def _find_in(source: Path, search: Search) -> tuple[list[Case], list[Case]]:
    search.read = source
    if source.suffix != ".json" and not source.is_dir():
        raise UserError(f"{source}: no such data folder. Name another (`data_base_dir`, or the option).")
    own = (source / "dataset.json").is_file()
    inside = [] if own else sorted(path.parent for path in source.glob("*/dataset.json"))
    lists = source.suffix == ".json" or own or inside
    if lists and search.contrasts:
        raise UserError(
            f"{source}: names its files itself; data.contrasts is for plain folders. Remove that key."
        )
    if not lists:
        search.plain = True
        return _from_plain_folder(source, search), []
    if source.suffix == ".json":
        return _from_json_list(source, search)
    if own:
        return _from_dataset_json(source, search)
    if len(inside) == 1:  # `data_base_dir` may be the data set's parent, as in the MONAI tutorial
        search.read = inside[0]
        beside = [name for name in _names_in(source) if name[0] != "." and (source / name).is_dir()]
        search.passed["folder{s} beside it"] = [name for name in beside if name != inside[0].name]
        return _from_dataset_json(inside[0], search)
    names = ", ".join(path.name for path in inside)
    raise UserError(
        f"{source}: holds several data sets ({names}). Name one of them in `data_base_dir`, or a list."
    )


# ---------------------------------------------------------------- lists


def _listed(entries: list, root: Path, where: str, search: Search) -> list[Case]:
    """Cases of a list of `{"image": ..., "label": ...}` or of plain file names, below `root`."""
    cases = []
    for number, entry in enumerate(entries):
        entry = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or "image" not in entry:
            raise UserError(f'{where}: entry {number} has no "image".')
        names = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f'{where}: "image" of entry {number} should be a file name or a list of them.')
        if not isinstance(entry.get("label"), str | None):
            raise UserError(f'{where}: "label" of entry {number} should be a file name.')
        images = tuple(root / name for name in names)
        label = root / entry["label"] if entry.get("label") is not None else None
        name = str(entry.get("name", _stem(images[0].name)))
        others = {key: value for key, value in entry.items() if key not in {"name", "image", "label"}}
        subject = str(entry["subject"]) if "subject" in entry else search.subject_of(name, names[0])
        cases.append(Case(name, images, label, subject, others))
    if not cases:
        raise UserError(f"{where}: lists no training cases.")
    return sorted(cases, key=lambda case: case.name)


def _from_json_list(path: Path, search: Search) -> tuple[list[Case], list[Case]]:
    content = read_json(path)
    if not isinstance(content.get("training"), list):
        raise UserError(
            f'{path}: should hold a list "training" of {{"image": file}}, and may hold "validation".'
        )
    return _both_lists(content, path.parent, str(path), search)


def _both_lists(content: dict, root: Path, where: str, search: Search) -> tuple[list[Case], list[Case]]:
    """The lists `training` and `validation` of a JSON; a list `test` is passed over."""
    validation = content.get("validation") or []
    if not isinstance(validation, list):
        raise UserError(f'{where}: "validation" should be a list of {{"image": file}}.')
    if isinstance(test := content.get("test"), list):
        for entry in test:
            name = entry.get("image") if isinstance(entry, dict) else entry
            search.passed["test scan{s} of the list"].append(name if isinstance(name, str) else repr(name))
    return (
        _listed(content["training"], root, f"{where}, training", search),
        _listed(validation, root, f"{where}, validation", search) if validation else [],
    )


def _from_dataset_json(root: Path, search: Search) -> tuple[list[Case], list[Case]]:
    path = root / "dataset.json"
    content = read_json(path)
    if isinstance(content.get("training"), list):  # Medical Segmentation Decathlon
        cases, validation = _both_lists(content, root, str(path), search)
        modality = content.get("modality")
        if isinstance(modality, dict) and modality:
            cases = [_one_file_a_channel(case, len(modality)) for case in cases]
            validation = [_one_file_a_channel(case, len(modality)) for case in validation]
        _pass_over_unlisted([*cases, *validation], root, search)
        return cases, validation
    if not isinstance(content.get("channel_names"), dict) or not content["channel_names"]:
        raise UserError(
            f'{path}: has neither a list "training" (Decathlon) nor an object "channel_names" (nnU-Net) that '
            "names a channel."
        )
    ending = content.get("file_ending", ".nii.gz")
    if ending not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: file_ending {ending} is not read; convert the images to .nii.gz.")
    channels = len(content["channel_names"])
    files = [name for name in _names_in(root / "imagesTr") if name.endswith(ending) and name[0] != "."]
    cases = []
    for name in sorted({image[: -len(ending)].rpartition("_")[0] for image in files}):
        images = tuple(root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(channels))
        label = root / "labelsTr" / f"{name}{ending}"
        subject = search.subject_of(name, f"imagesTr/{images[0].name}")
        cases.append(Case(name, images, label if label.is_file() else None, subject))
    if not cases:
        raise UserError(f"{root / 'imagesTr'}: no *_0000{ending} images there.")
    for name in _names_in(root / "imagesTs"):
        if _suffix(name) and name[0] != ".":
            search.passed["file{s} in imagesTs"].append(name)
    _pass_over_unlisted(cases, root, search)
    return cases, []


def _one_file_a_channel(case: Case, channels: int) -> Case:
    """nnU-Net of version 1 lists NAME.nii.gz where NAME_0000.nii.gz and so on are."""
    image = case.images[0]
    stem, suffix = _stem(image.name), image.name[len(_stem(image.name)) :]
    images = tuple(image.with_name(f"{stem}_{channel:04d}{suffix}") for channel in range(channels))
    if len(case.images) > 1 or image.is_file() or not images[0].is_file():
        return case
    return Case(case.name, images, case.label, case.subject, case.covariates)


def _pass_over_unlisted(cases: list[Case], root: Path, search: Search) -> None:
    """Note the images that lie beside those of `dataset.json` and are not named by it."""
    named = {image for case in cases for image in case.images}
    for folder in sorted({image.parent for image in named}):
        for name in _names_in(folder):
            if _suffix(name) and name[0] != "." and folder / name not in named:
                search.passed["file{s} that dataset.json does not name"].append(name)


def _names_in(folder: Path) -> list[str]:
    """Names in a folder, none where it is not there. Raises UserError: it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # also a name that no folder can have
        return []
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: str | Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: this folder cannot be read ({error.strerror}). Allow reading it, or move it away."
    )


# ---------------------------------------------------------------- folders


def _suffix(name: str) -> str:
    """`.nii.gz` as it is written in a name, "" where it names no image."""
    end = next((end for end in IMAGE_SUFFIXES if name.lower().endswith(end)), "")
    return name[len(name) - len(end) :]


def _stem(name: str) -> str:
    end = _suffix(name)
    return name[: -len(end)] if end else PurePosixPath(name).stem


def _words(name: str) -> list[str]:
    return [word.lower() for word in WORDS.split(name) if word]


def _walk(root: Path, search: Search) -> list[File]:
    """The images and masks below a folder, links followed, each folder once; what else there is, noted.

    Raises:
        UserError: a folder cannot be read.
    """
    own = {os.path.realpath(path): Path(path) for path in search.outputs}
    top = os.path.realpath(root)
    found, seen, linked, waiting = [], {top}, [], [(Path(root), ())]
    while waiting or linked:
        # Links last: a folder that is there itself and by a link has its own name.
        folder, parts = waiting.pop() if waiting else linked.pop(0)
        real = os.path.realpath(folder)
        if parts and real in seen:
            search.passed["link{s} to a folder that is read anyway"].append("/".join(parts))
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise _unreadable(folder, error) from None
        inner = []
        for entry in entries:
            where = (*parts, entry.name)
            name, image = "/".join(where), _suffix(entry.name)
            try:
                folder_here, file_here = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                folder_here = file_here = False
            if folder_here:
                if image:
                    search.passed["folder{s} named like an image"].append(name)
                if real_own := own.get(os.path.realpath(entry.path)):
                    search.passed["folder{s} of this run"].append(str(real_own))
                elif entry.name[0] != "." and entry.name.lower() not in SYSTEM_FOLDERS:
                    (linked if entry.is_symlink() else inner).append((Path(entry.path), where))
            elif entry.name[0] == ".":
                if image:
                    search.passed["hidden file{s}"].append(name)
            elif not file_here:
                if image or not PurePosixPath(entry.name).suffix:
                    search.passed["link{s} to nowhere"].append(name)
            elif image:
                found.append(File(Path(entry.path), where, entry.is_symlink()))
            elif end := FOREIGN_SUFFIX.search(entry.name):
                search.passed[f"{end[0].lower()} file{{s}} not read"].append(name)
        waiting += reversed(inner)
    return sorted(found, key=lambda file: file.path)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path is what a glob names: `**` stands for any folders, also for none."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or bool(parts) and _matches(parts[1:], pattern)
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _glob(pattern: str) -> tuple[str, ...]:
    path = PurePosixPath(pattern)
    if path.is_absolute() or not path.parts or any("**" in part and part != "**" for part in path.parts):
        raise UserError(
            f"data.pattern is {brief(repr(pattern))}; expected a pattern of files below the data folder, "
            'such as "**/*_T1w.nii.gz".'
        )
    return path.parts


def _is_mask(file: File) -> bool:
    """By the name of the file or of a folder that it lies in."""
    words = _words(file.stem)
    named = [word for word in words if not word.isdigit()] or [""]
    return bool(
        MASK_WORD.fullmatch(named[-1])
        or FIRST_MASK_WORD.fullmatch(named[0])
        or INNER_MASK_WORDS & set(named)
        or (_suffix(file.parts[-1]).lower() == ".mgz" and file.stem.removeprefix("lh.") in FREESURFER_MASKS)
        or any(MASK_FOLDER.fullmatch(word) for part in file.folder for word in _words(part))
        or any(part.lower() == "ground_truth" for part in file.folder)
    )


def _is_map_of(file: File, stems: set[tuple]) -> bool:
    """Whether a file is what SPM's segmentation makes of a scan beside it: c1scan, mwc2scan, y_scan."""
    match = re.fullmatch(r"(?:[smwr]{0,4}c[1-6]|i?y_|u_)(.+)", file.stem)
    return bool(match and (file.folder, match[1]) in stems)


def _is_generated(file: File) -> bool:
    """Whether inference.py's record lies beside a volume; BIDS scans have a JSON of that name too."""
    record = record_path(file.path)
    if record == file.path or not record.is_file():
        return False
    try:
        content = parse_json(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "seed", "sampler", "volume"} <= set(content)


def _from_plain_folder(root: Path, search: Search) -> list[Case]:
    glob = _glob(search.pattern) if search.pattern is not None else None
    every = _walk(root, search)
    images = _chosen(every, glob, search)
    if not images:
        what = f"no image matches {search.pattern!r}" if glob else f"no image ({', '.join(IMAGE_SUFFIXES)})"
        instead = f" (passed over: {_passed(search.passed)})" if any(search.passed.values()) else ""
        raise UserError(
            f"{root}: {what} there{instead}. Name another folder (`data_base_dir`, or the option)."
        )
    taken = set(images)
    labels = {(file.folder, file.stem.lower()): file.path for file in every if file not in taken}
    if search.contrasts:
        found = _by_contrast(root, images, labels, search)
    else:
        found = _one_case_a_file(root, images, labels, search)
    rows = _participants(root / "participants.tsv")
    used = {case.label for case in found}
    for kind in ("mask{s}", "file{s} under derivatives"):
        search.passed[kind] = [
            name for name in search.passed[kind] if root.joinpath(*name.split("/")) not in used
        ]
    cases = [Case(c.name, c.images, c.label, c.subject, rows.get(c.subject, {})) for c in found]
    return sorted(cases, key=lambda case: case.images[0])


def _chosen(files: list[File], glob: tuple[str, ...] | None, search: Search) -> list[File]:
    """The images among the files, without what is a mask, a template, a generated volume or there twice."""
    chosen = []
    for file in files:
        if glob and not _matches(file.parts, glob):
            search.passed["mask{s}" if _is_mask(file) else "file{s} that data.pattern leaves out"].append(
                file.name
            )
        elif not glob and "derivatives" in [part.lower() for part in file.folder]:
            search.passed["file{s} under derivatives"].append(file.name)
        elif not glob and TEMPLATE.match(file.stem):
            search.passed["template{s}"].append(file.name)
        elif not search.generated and _is_generated(file):
            search.passed["volume{s} that inference.py made"].append(file.name)
        else:
            chosen.append(file)
    if not glob:
        stems = {(file.folder, file.stem) for file in chosen}
        spm = {file for file in chosen if _is_map_of(file, stems)}
        search.passed["map{s} of SPM"] = [file.name for file in chosen if file in spm]
        chosen = [file for file in chosen if file not in spm]
    masks = [file for file in chosen if _is_mask(file)]
    if not (glob and len(masks) == len(chosen)):  # a pattern that names masks alone means them
        search.passed["mask{s}"] += [file.name for file in masks]
        masks = set(masks)
        chosen = [file for file in chosen if file not in masks]
    if not any(file.is_link for file in chosen):
        return chosen
    seen, once = set(), []
    for file in sorted(chosen, key=lambda file: file.is_link):
        real = os.path.realpath(file.path)
        if real in seen:
            search.passed["link{s} to a file that is read anyway"].append(file.name)
        else:
            once.append(file)
        seen.add(real)
    return sorted(once, key=lambda file: file.path)


def _one_case_a_file(root: Path, images: list[File], labels: dict, search: Search) -> list[Case]:
    kinds = _kinds(images)
    if kinds and search.pattern is None:
        raise _several(root, kinds)
    names = [file.stem for file in images]
    if len(set(names)) < len(names):  # the same file name in a folder a subject
        names = [_stem("_".join(file.parts)) for file in images]
    folders = {} if search.subject else _patients(images)
    claims = Counter(one for file in images if (one := _label_of(file, labels, True)))
    cases = []
    for name, file in zip(names, images, strict=True):
        label = _label_of(file, labels, False)
        if label is None and claims[replaced := _label_of(file, labels, True)] == 1:
            label = replaced
        subject = search.subject_of(name, file.name)
        if search.subject is None and subject == name:
            if file in folders:
                subject = folders[file]
                search.folder_each = search.folder_each or subject
            elif kinds:
                subject = kinds.units.get(file, name)
        cases.append(Case(name, (file.path,), label, subject))
    return cases


def _label_of(file: File, labels: dict[tuple, Path], replaced: bool) -> Path | None:
    """The mask that is named after an image: NAME_seg; or, `replaced`, X_seg for X_t1, segmentation for
    imaging, label0001 for img0001, labelsTr/NAME for imagesTr/NAME."""
    stem = file.stem.lower()
    if not replaced:
        tries = [(file.folder, f"{stem}{mark}{word}") for word in LABEL_WORDS for mark in "_-"]
    else:
        stem = stem.removesuffix("_0000")  # nnU-Net's number of the channel
        rest, mark, last = re.fullmatch(r"(.*?)([_-]?)([^_-]*)", stem, re.DOTALL).groups()
        tries = [] if last.isdigit() else [(file.folder, f"{rest}{mark}{word}") for word in LABEL_WORDS]
        for word in LABEL_WORDS:
            parts = [_swapped(part, word) for part in file.folder]
            tries += [(tuple(parts), _swapped(stem, word).lower())]
    key = next((key for key in tries if key in labels and key != (file.folder, stem)), None)
    return labels[key] if key else None


def _swapped(name: str, word: str) -> str:
    """`labelsTr` for `imagesTr`."""

    def change(match: re.Match) -> str:
        return word + "s" if match[0].lower() == "images" and word != "labels" else word

    return IMAGE_WORD.sub(change, name)


# ---------------------------------------------------------------- contrasts of one patient


@dataclass(frozen=True)
class Kinds:
    """Several images of a patient: what tells them apart, a glob of one of them, the patient of each."""

    names: list[str]
    pattern: str
    endings: list[str] | None
    units: dict[File, str]


def _several(root: Path, kinds: Kinds) -> UserError:
    shown = ", ".join(kinds.names[:8]) + ", ..." * (len(kinds.names) > 8)
    message = (
        f"{root}: holds several kinds of image ({shown}). Choose one by "
        f'"data": {{"pattern": "{kinds.pattern}"}} in the config'
    )
    if not kinds.endings:
        return UserError(f"{message}, or move the others away.")
    endings = ", ".join(f'"{ending}"' for ending in kinds.endings[:8])
    return UserError(
        f'{message},\nor make several the channels of one volume by "data": {{"contrasts": [{endings}]}}.'
    )


def _kinds(images: list[File]) -> Kinds | None:
    """The contrasts, or the versions of a scan, that a patient has; None where each has one."""
    bids = [file for file in images if file.stem.startswith("sub-")]
    if len(kinds := sorted({_bids_kind(file.stem) for file in bids} - {""})) > 1:
        return Kinds(kinds, f"**/*_{_last(kinds)}.*", [f"_{kind}" for kind in kinds], {})
    others = [file for file in images if not file.stem.startswith("sub-")]
    return _by_folder(others) or _by_name(others) or _by_ending(others) or _by_beginning(others)


def _last(kinds: list[str]) -> str:
    """One that no other ends like, so that a glob of its end names it alone."""
    return next(kind for kind in kinds if not any(other != kind and other.endswith(kind) for other in kinds))


def _bids_kind(stem: str) -> str:
    """`desc-brain_T1w` of `sub-01_ses-2_run-1_desc-brain_T1w`: all but who and when."""
    words = [word for word in stem.split("_") if not word.isdigit()]
    return "_".join(word for word in words if word.startswith(VERSIONS) or "-" not in word)


def _contrasts_in(name: str) -> tuple[str, ...]:
    return tuple(word for word in _words(name) if CONTRAST_WORD.fullmatch(word))


def _by_folder(images: list[File]) -> Kinds | None:
    """T1/P001.nii.gz and T2/P001.nii.gz, or P001/T1/x.nii.gz and P001/T2/x.nii.gz."""
    groups, units = defaultdict(dict), {}
    for file in images:
        for i, part in enumerate(file.folder):
            if words := _contrasts_in(part):
                groups[file.folder[:i]][part] = words
                units[file] = "/".join((*file.folder[:i], *file.folder[i + 1 :], file.stem))
    kinds = sorted({part for parts in groups.values() if len(set(parts.values())) > 1 for part in parts})
    return Kinds(kinds, f"**/{kinds[0]}/**/*", None, units) if kinds else None


def _by_ending(images: list[File]) -> Kinds | None:
    """P001_t1.nii.gz and P001_t2.nii.gz, or P001.nii.gz and P001_brain.nii.gz."""
    stems = {(file.folder, file.stem): file for file in images}
    units, endings = defaultdict(dict), Counter()
    for file in images:
        rest, mark, last = re.fullmatch(r"(.*?)([_-]?)([^_-]*)", file.stem, re.DOTALL).groups()
        if rest and mark:
            units[file.folder, rest][mark + last] = file
            endings[mark + last] += 1
    for (folder, rest), files in units.items():
        if (folder, rest) in stems:
            files[""] = stems[folder, rest]
    kinds, bare, of = set(), False, {}
    for (folder, rest), files in units.items():
        counted = {}
        for ending in files:
            word = ending[1:].lower()
            if CHANNEL_WORD.fullmatch(ending) and endings[ending] > 1:  # nnU-Net's, without its dataset.json
                counted[ending] = ending
            elif ending and VISIT_WORD.fullmatch(word):
                counted[ending] = "visit"
            elif ending and (endings[ending] > 1 or _contrasts_in(word) or PROCESSED_WORD.fullmatch(word)):
                counted[ending] = ending
        told = set(counted.values()) | ({""} if "" in files and set(counted.values()) - {"visit"} else set())
        if len(told) > 1:
            kinds |= set(counted)
            bare |= "" in told
            of |= {file: "/".join((*folder, rest)) for file in files.values()}
    kinds = sorted(kinds)
    if not kinds:
        return None
    return Kinds(["no ending"] * bare + kinds, f"**/*{_last(kinds)}.*", None if bare else kinds, of)


def _by_name(images: list[File]) -> Kinds | None:
    """P001/t1.nii.gz and P001/t2.nii.gz; s001/ct.nii.gz and s001/organs/liver.nii.gz."""
    folders, patients = defaultdict(list), _patients(images)
    for file in images:
        if not VISIT_WORD.fullmatch("".join(_words(file.stem))):  # 2001-01-01 too
            folders[patients.get(file, "/".join(file.folder))].append(file)
    count = Counter(stem for files in folders.values() for stem in {file.stem for file in files})
    several = {}
    for folder, files in folders.items():
        told = [f for f in files if count[f.stem] > 1 or CONTRAST_WORD.fullmatch(f.stem.lower())]
        if len({file.stem for file in told}) > 1:
            several[folder] = told
    kinds = {file.stem for files in several.values() for file in files}
    kinds = sorted(kinds, key=lambda stem: (not _contrasts_in(stem), stem))
    # Sites that number their patients alike have many names in few folders.
    if not kinds or not any(map(_contrasts_in, kinds)) and len(kinds) > len(several):
        return None
    units = {file: folder for folder, files in several.items() for file in files}
    return Kinds(kinds, f"**/{kinds[0]}.*", kinds, units)


def _by_beginning(images: list[File]) -> Kinds | None:
    """scan.nii, mscan.nii and wmscan.nii, as SPM calls what it made of a scan."""
    stems, units = {(file.folder, file.stem): file for file in images}, {}
    beginnings = set()
    for file in images:
        for i in range(1, min(5, len(file.stem))):
            scan = stems.get((file.folder, file.stem[i:]))
            if scan and re.fullmatch("[smwr]+", file.stem[:i]):
                beginnings.add(file.stem[:i])
                units[file] = units[scan] = "/".join((*file.folder, scan.stem))
    if not beginnings:
        return None
    kinds = sorted(sorted(beginnings), key=len)
    return Kinds(["no beginning", *kinds], f"**/{kinds[-1]}*", None, units)


def _by_contrast(root: Path, images: list[File], labels: dict, search: Search) -> list[Case]:
    """Cases of one file a contrast. A file that a case lacks is named all the same: it is missed when the
    headers are read."""
    endings = sorted(search.contrasts, key=len, reverse=True)
    rests: list[tuple[File, str, str]] = []
    for file in images:
        ending = next((one for one in endings if file.stem.endswith(one)), None)
        if ending is None:
            other = re.search(r"[_-]?[^_-]*$", file.stem)[0]
            search.passed["other contrast{s}"].append(other)
        else:
            rests.append((file, file.stem.removesuffix(ending), ending))
    if not rests:
        raise UserError(f"{root}: no image ends like one of data.contrasts ({', '.join(search.contrasts)}).")
    # By the name alone where it tells patients apart, since contrasts may lie in folders of their own.
    by_name = Counter((rest, ending) for _, rest, ending in rests)
    alone = all(rest.strip("_-") for _, rest, _ in rests) and max(by_name.values()) == 1
    units = defaultdict(dict)
    for file, rest, ending in rests:
        units[rest if alone else "/".join((*file.folder, rest))][ending] = (file, rest)
    folders = {} if search.subject else _patients([next(iter(unit.values()))[0] for unit in units.values()])
    names = {unit: next(iter(files.values()))[1].strip("_-") for unit, files in units.items()}
    if len(set(names.values())) < len(names) or not all(names.values()):
        names = {unit: unit.strip("_-/").replace("/", "_") for unit in units}
    cases = []
    for unit, files in units.items():
        (first, rest), ending = next(iter(files.values())), next(iter(files))
        other = first.path.name.removeprefix(rest + ending)
        paths = [
            files[one][0].path if one in files else first.path.with_name(f"{rest}{one}{other}")
            for one in search.contrasts
        ]
        name = names[unit] or root.name
        bare = rest.rstrip("_-").lower()
        tries = [
            (f.folder, f"{bare}{mark}{word}".lstrip("_-"))
            for f, _ in files.values()
            for word in LABEL_WORDS
            for mark in "_-"
        ]
        label = next((labels[key] for key in tries if key in labels), None)
        subject = search.subject_of(name, first.name)
        if search.subject is None and subject == name and first in folders:
            subject = search.folder_each = folders[first]
        cases.append(Case(name, tuple(paths), label, subject))
    return cases


# ---------------------------------------------------------------- subjects


def _patients(images: list[File]) -> dict[File, str]:
    """What stands for a patient, of the scans that share it: the topmost folder that a scan is named after,
    or its name without the visit, or the topmost folder of which there are several with few scans each."""
    found, others = {}, []
    for file in images:
        named = (i for i, part in enumerate(file.folder) if _is_named_after(file, part))
        if (i := next(named, None)) is not None:
            found[file] = "/".join(file.folder[: i + 1])
        else:
            others.append(file)
    visits = _visits(others)
    found |= visits
    others = [file for file in others if file not in visits]
    depth = 0
    while True:
        deep = [file for file in others if len(file.folder) > depth]
        tops = Counter(file.folder[: depth + 1] for file in deep)
        if not tops or max(tops.values()) == 1:
            break
        sets = any(SETS.fullmatch(top[-1]) for top in tops)
        if len(tops) > 1 and not sets and len(deep) <= MOST_SCANS * len(tops):
            found |= {file: "/".join(file.folder[: depth + 1]) for file in deep}
            break
        depth += 1
    return found if len(set(found.values())) < len(found) else {}


def _visits(images: list[File]) -> dict[File, str]:
    """The patient of anna_bl and anna_m12, or of 003_1 and 003_2, where others come back as well."""
    units, endings = defaultdict(list), Counter()
    for file in images:
        match = re.fullmatch(r"(.+)[_-]([^_-]+)", file.stem, re.DOTALL)
        counted = match and re.fullmatch(r"\d\d?", match[2]) and re.search(r"\d", match[1])
        counted = counted and not SETS.fullmatch(match[1])
        if counted or match and RETURN_WORD.fullmatch(match[2].lower()):
            units[(*file.folder, match[1])].append(file)
            endings[match[2]] += 1
    several = sum(len(files) > 1 for files in units.values())
    few = sum(map(len, units.values())) <= MOST_SCANS * len(units)
    if len(units) < 3 or not several or not few or max(endings.values()) < 2:
        return {}
    return {file: "/".join(unit) for unit, files in units.items() for file in files}


def _is_named_after(file: File, part: str) -> bool:
    """Whether a scan P001_t1.nii.gz lies in its patient's folder P001."""
    rest = file.stem.removeprefix(part)
    numbered = any(character.isdigit() for character in part) and not SETS.fullmatch(part)
    return numbered and rest != file.stem and not rest[:1].isalnum()


def _participants(path: Path) -> dict[str, dict]:
    """Rows of a BIDS `participants.tsv` by subject, or none where the file is absent."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Strict, since a quotation mark that is not closed would swallow the rows after it.
            rows = list(csv.DictReader(file, delimiter="\t", strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a tab-separated table in UTF-8 ({error}).") from None
    if rows and "participant_id" not in rows[0]:
        raise UserError(f"{path}: has no column participant_id.")
    subjects = {}
    for row in rows:
        subject = row["participant_id"]
        if None in row:
            raise UserError(f"{path}: the row of {brief(subject)} has more fields than there are columns.")
        if subject in subjects:
            raise UserError(f"{path}: {brief(subject)} is there twice. Every subject needs one row.")
        subjects[subject] = row
    return subjects
