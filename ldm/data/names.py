"""What the names of files and folders mean: which file is a mask, and of which image; which contrasts a
patient has; which scans are of one patient. Nothing here opens a file.

The names of masks, contrasts and patients are those of the public data sets.
"""

import fnmatch
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ldm import UserError, brief
from ldm.data.reading import IMAGE_SUFFIXES

# Image formats that are not read.
FOREIGN_SUFFIX = re.compile(
    r"\.(mha|mhd|nrrd|nhdr|dcm|ima|img|img\.gz|hdr|mgh|mnc|gipl|head|npy|npz|h5|hdf5)$", re.IGNORECASE
)

SYSTEM_FOLDERS = {"lost+found", "system volume information", "$recycle.bin", "__macosx"}

# Words of a name end at "_", "-", ".", "+", a space, or before a capital.
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
    r"(masks?|labels?(tr|ts|va|val)?|segmentations?|seg|segs|annotations?|(ground)?truth|gt|rois?|parcellations?|silver)"
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

# The BIDS entities in which two versions of one scan differ.
VERSIONS = ("space-", "desc-", "rec-", "res-", "ce-", "echo-", "part-", "inv-", "label-", "mt-", "flip-")

# Patients in the names of public data sets: BIDS, ADNI, OASIS-1 and -2, OASIS-3, BraTS since 2023, IXI, ACDC.
PATIENT = re.compile(
    r"(?<![A-Za-z0-9])(sub-[A-Za-z0-9]+|\d{3}_S_\d{4,5}|OAS[12]_\d{4}|OAS3\d{4}|BraTS-[A-Za-z]+-\d{5}|IXI\d{3}"
    r"|patient\d+)(?![A-Za-z0-9])"
)

# Folders of many patients, not of the visits of one.
SETS = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|images?(tr|ts|va)?|raw(data)?|data|site|cent(er|re)|batch|part|fold"
    r"|group|hgg|lgg|ad|cn|mci|hc|nc|controls?|patients|healthy|normals?|diseased?)[_ -]?([a-z]|\d*)",
    re.IGNORECASE,
)

MOST_SCANS = 12  # of a patient, on average; folders with more are those of sites


@dataclass(frozen=True)
class File:
    """A file below the data folder; `parts` are the names of its path there."""

    path: Path
    parts: tuple[str, ...]
    is_link: bool = False

    @property
    def folder(self) -> tuple[str, ...]:
        return self.parts[:-1]

    @property
    def stem(self) -> str:
        return stem_of(self.parts[-1])

    @property
    def name(self) -> str:
        return "/".join(self.parts)


def suffix_of(name: str) -> str:
    """`.nii.gz` as it is spelt in a name, "" if it is not the name of an image."""
    end = next((end for end in IMAGE_SUFFIXES if name.lower().endswith(end)), "")
    return name[len(name) - len(end) :]


def stem_of(name: str) -> str:
    """The name of a file without its suffix."""
    end = suffix_of(name)
    return name[: -len(end)] if end else PurePosixPath(name).stem


def words_of(name: str) -> list[str]:
    """`sub`, `01` and `t1w` of `sub-01_T1w`."""
    return [word.lower() for word in WORDS.split(name) if word]


def _ending_of(stem: str) -> tuple[str, str, str]:
    """`P001`, `_` and `t1` of `P001_t1`; the first two are "" without a `_` or `-`."""
    return re.fullmatch(r"(.*?)([_-]?)([^_-]*)", stem, re.DOTALL).groups()


def parts_of_pattern(pattern: str) -> tuple[str, ...]:
    """The parts of a `data.pattern`. Raises UserError: not a pattern of files below a folder."""
    path = PurePosixPath(pattern)
    if path.is_absolute() or not path.parts or any("**" in part and part != "**" for part in path.parts):
        raise UserError(
            f"data.pattern is {brief(repr(pattern))}; expected a pattern of files below the data folder, "
            'such as "**/*_T1w.nii.gz".'
        )
    return path.parts


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a pattern, in which `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or bool(parts) and matches(parts[1:], pattern)
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


# ---------------------------------------------------------------- masks


def is_mask(file: File) -> bool:
    """Whether a file is a mask by its name or by a folder that it lies in."""
    words = words_of(file.stem)
    named = [word for word in words if not word.isdigit()] or [""]
    return bool(
        MASK_WORD.fullmatch(named[-1])
        or FIRST_MASK_WORD.fullmatch(named[0])
        or INNER_MASK_WORDS & set(named)
        or (suffix_of(file.parts[-1]).lower() == ".mgz" and file.stem.removeprefix("lh.") in FREESURFER_MASKS)
        or any(MASK_FOLDER.fullmatch(word) for part in file.folder for word in words_of(part))
    )


def is_spm_map(file: File, stems: set[tuple]) -> bool:
    """Whether a file is an output of SPM's segmentation of a scan beside it: c1scan, mwc2scan, y_scan.

    Args:
        stems: (folder, stem) of all scans.
    """
    match = re.fullmatch(r"(?:[smwr]{0,4}c[1-6]|i?y_|u_)(.+)", file.stem)
    return bool(match and (file.folder, match[1]) in stems)


def mask_names(stem: str) -> list[str]:
    """The names of a mask beside a scan: NAME_seg, NAME-seg, ..."""
    return [f"{stem}{mark}{word}" for word in LABEL_WORDS for mark in "_-"]


def mask_of(file: File, masks: dict[tuple, Path], replaced: bool) -> Path | None:
    """The mask that is named after an image.

    Args:
        masks: by (folder, stem in lower case).
        replaced: replace a word of the image's name: X_seg for X_t1, segmentation for imaging, label0001 for
            img0001, labelsTr/NAME for imagesTr/NAME. Else add one: NAME_seg.
    """
    stem = file.stem.lower()
    if not replaced:
        tries = [(file.folder, name) for name in mask_names(stem)]
    else:
        stem = stem.removesuffix("_0000")  # nnU-Net's number of the channel
        rest, mark, last = _ending_of(stem)
        tries = [] if last.isdigit() else [(file.folder, f"{rest}{mark}{word}") for word in LABEL_WORDS]
        for word in LABEL_WORDS:
            parts = [_with_mask_word(part, word) for part in file.folder]
            tries.append((tuple(parts), _with_mask_word(stem, word).lower()))
    key = next((key for key in tries if key in masks and key != (file.folder, stem)), None)
    return masks[key] if key else None


def _with_mask_word(name: str, word: str) -> str:
    """`labelsTr` for `imagesTr`."""

    def change(match: re.Match) -> str:
        return word + "s" if match[0].lower() == "images" and word != "labels" else word

    return IMAGE_WORD.sub(change, name)


# ---------------------------------------------------------------- contrasts of one patient


@dataclass(frozen=True)
class Kinds:
    """The kinds of image that a patient has: their names, a pattern of one kind, the endings for
    data.contrasts (None where the kinds differ in something else), and the patient of each file."""

    names: list[str]
    pattern: str
    endings: list[str] | None
    patients: dict[File, str]


def kinds_of(images: list[File]) -> Kinds | None:
    """The contrasts, or the versions of a scan, that patients have; None where each has one image."""
    bids = [file for file in images if file.stem.startswith("sub-")]
    if len(kinds := sorted({_bids_kind(file.stem) for file in bids} - {""})) > 1:
        return Kinds(kinds, f"**/*_{_unlike_others(kinds)}.*", [f"_{kind}" for kind in kinds], {})
    others = [file for file in images if not file.stem.startswith("sub-")]
    return _by_folder(others) or _by_name(others) or _by_ending(others) or _by_beginning(others)


def _unlike_others(endings: list[str]) -> str:
    """The first ending that is not the end of another, so that a pattern with it matches one kind."""
    return next(one for one in endings if not any(other != one and other.endswith(one) for other in endings))


def _bids_kind(stem: str) -> str:
    """`desc-brain_T1w` of `sub-01_ses-2_run-1_desc-brain_T1w`: all but patient and visit."""
    words = [word for word in stem.split("_") if not word.isdigit()]
    return "_".join(word for word in words if word.startswith(VERSIONS) or "-" not in word)


def _contrasts_in(name: str) -> tuple[str, ...]:
    return tuple(word for word in words_of(name) if CONTRAST_WORD.fullmatch(word))


def _by_folder(images: list[File]) -> Kinds | None:
    """T1/P001.nii.gz and T2/P001.nii.gz, or P001/T1/x.nii.gz and P001/T2/x.nii.gz."""
    groups, patients = defaultdict(dict), {}
    for file in images:
        for i, part in enumerate(file.folder):
            if words := _contrasts_in(part):
                groups[file.folder[:i]][part] = words
                patients[file] = "/".join((*file.folder[:i], *file.folder[i + 1 :], file.stem))
    kinds = sorted({part for parts in groups.values() if len(set(parts.values())) > 1 for part in parts})
    return Kinds(kinds, f"**/{kinds[0]}/**/*", None, patients) if kinds else None


def _by_name(images: list[File]) -> Kinds | None:
    """P001/t1.nii.gz and P001/t2.nii.gz; s001/ct.nii.gz and s001/organs/liver.nii.gz."""
    folders, patients = defaultdict(list), patients_of(images)
    for file in images:
        if not VISIT_WORD.fullmatch("".join(words_of(file.stem))):  # 2001-01-01 too
            folders[patients.get(file, "/".join(file.folder))].append(file)
    count = Counter(stem for files in folders.values() for stem in {file.stem for file in files})
    several = {}
    for folder, files in folders.items():
        known = [f for f in files if count[f.stem] > 1 or CONTRAST_WORD.fullmatch(f.stem.lower())]
        if len({file.stem for file in known}) > 1:
            several[folder] = known
    kinds = {file.stem for files in several.values() for file in files}
    kinds = sorted(kinds, key=lambda stem: (not _contrasts_in(stem), stem))
    # Many names in few folders are those of sites that number their patients alike.
    if not kinds or not any(map(_contrasts_in, kinds)) and len(kinds) > len(several):
        return None
    patients = {file: folder for folder, files in several.items() for file in files}
    return Kinds(kinds, f"**/{kinds[0]}.*", kinds, patients)


def _by_ending(images: list[File]) -> Kinds | None:
    """P001_t1.nii.gz and P001_t2.nii.gz, or P001.nii.gz and P001_brain.nii.gz."""
    stems = {(file.folder, file.stem): file for file in images}
    units, count = defaultdict(dict), Counter()
    for file in images:
        rest, mark, last = _ending_of(file.stem)
        if rest:
            units[file.folder, rest][mark + last] = file
            count[mark + last] += 1

    def kind_of(ending: str) -> str | None:
        """The ending itself, or "visit" if it counts visits; None if it means nothing."""
        word, is_common = ending[1:].lower(), count[ending] > 1
        if is_common and CHANNEL_WORD.fullmatch(ending):  # nnU-Net's, without its dataset.json
            return ending
        if VISIT_WORD.fullmatch(word):
            return "visit"
        return ending if is_common or _contrasts_in(word) or PROCESSED_WORD.fullmatch(word) else None

    endings, bare, patients = set(), False, {}
    for (folder, rest), files in units.items():
        kinds = {ending: kind for ending in files if (kind := kind_of(ending))}
        distinct = set(kinds.values())
        if (folder, rest) in stems and distinct - {"visit"}:
            files[""] = stems[folder, rest]
            distinct.add("")
        if len(distinct) > 1:
            endings |= set(kinds)
            bare |= "" in distinct
            patients |= {file: "/".join((*folder, rest)) for file in files.values()}
    if not endings:
        return None
    endings = sorted(endings)
    names = ["no ending"] * bare + endings
    return Kinds(names, f"**/*{_unlike_others(endings)}.*", None if bare else endings, patients)


def _by_beginning(images: list[File]) -> Kinds | None:
    """scan.nii, mscan.nii and wmscan.nii: a scan and SPM's versions of it."""
    stems, patients = {(file.folder, file.stem): file for file in images}, {}
    beginnings = set()
    for file in images:
        for i in range(1, min(5, len(file.stem))):
            scan = stems.get((file.folder, file.stem[i:]))
            if scan and re.fullmatch("[smwr]+", file.stem[:i]):
                beginnings.add(file.stem[:i])
                patients[file] = patients[scan] = "/".join((*file.folder, scan.stem))
    if not beginnings:
        return None
    kinds = sorted(beginnings, key=lambda one: (len(one), one))
    return Kinds(["no beginning", *kinds], f"**/{kinds[-1]}*", None, patients)


# ---------------------------------------------------------------- patients


def patients_of(images: list[File]) -> dict[File, str]:
    """The patient of each scan: the topmost folder that the scan is named after; else the scan beside it that
    it is named after; else its name without the visit; else the topmost of several folders with few scans
    each. Scans for which none applies are left out; empty where no two scans share a patient."""
    found = {}
    for file in images:
        named = (i for i, part in enumerate(file.folder, 1) if _is_named_after(file, part))
        if depth := next(named, 0):
            found[file] = "/".join(file.folder[:depth])
    found |= _named_after_another([file for file in images if file not in found])
    found |= _visits([file for file in images if file not in found])
    found |= _folders_of_few([file for file in images if file not in found])
    return found if len(set(found.values())) < len(found) else {}


def _named_after_another(images: list[File]) -> dict[File, str]:
    """P03_gad of P03, where its name has a number: `brain_01` is no scan of a patient called `brain`."""
    scans, found = {(file.folder, file.stem): file for file in images}, {}
    for file in images:
        for mark in re.finditer(r"[_-]", file.stem):
            first = scans.get((file.folder, file.stem[: mark.start()]))
            if first and any(character.isdigit() for character in first.stem):
                found[first] = found[file] = "/".join((*first.folder, first.stem))
                break
    return found


def _is_named_after(file: File, part: str) -> bool:
    """Whether a scan P001_t1.nii.gz lies in its patient's folder P001."""
    rest = file.stem.removeprefix(part)
    numbered = any(character.isdigit() for character in part) and not SETS.fullmatch(part)
    return numbered and rest != file.stem and not rest[:1].isalnum()


def _visits(images: list[File]) -> dict[File, str]:
    """The patient of anna_bl and anna_m12, or of 003_1 and 003_2, where at least three are named so."""
    units, endings = defaultdict(list), Counter()
    for file in images:
        match = re.fullmatch(r"(.+)[_-]([^_-]+)", file.stem, re.DOTALL)
        if not match:
            continue
        name, ending = match.groups()
        counted = re.fullmatch(r"\d\d?", ending) and re.search(r"\d", name) and not SETS.fullmatch(name)
        if counted or RETURN_WORD.fullmatch(ending.lower()):
            units[(*file.folder, name)].append(file)
            endings[ending] += 1
    several = sum(len(files) > 1 for files in units.values())
    few = sum(map(len, units.values())) <= MOST_SCANS * len(units)
    if len(units) < 3 or not several or not few or max(endings.values()) < 2:
        return {}
    return {file: "/".join(unit) for unit, files in units.items() for file in files}


def _folders_of_few(images: list[File]) -> dict[File, str]:
    """The topmost level with several folders that hold few scans each, as patients do."""
    for depth in range(1, max((len(file.folder) for file in images), default=0) + 1):
        deep = [file for file in images if len(file.folder) >= depth]
        tops = Counter(file.folder[:depth] for file in deep)
        if max(tops.values()) == 1:
            break
        sets = any(SETS.fullmatch(top[-1]) for top in tops)
        if len(tops) > 1 and not sets and len(deep) <= MOST_SCANS * len(tops):
            return {file: "/".join(file.folder[:depth]) for file in deep}
    return {}
