"""Find the cases of a plain or BIDS-like folder: every image below it except masks and the like. What names
mean is in `ldm.data.names`."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldm import UserError, brief, counted, few
from ldm.data.cases import Case
from ldm.data.names import (
    FOREIGN_SUFFIX,
    PATIENT,
    SYSTEM_FOLDERS,
    TEMPLATE,
    File,
    Kinds,
    is_mask,
    is_spm_map,
    kinds_of,
    mask_names,
    mask_of,
    matches,
    parts_of_pattern,
    patients_of,
    stem_of,
    suffix_of,
)
from ldm.data.reading import IMAGE_SUFFIXES
from ldm.system.files import parse_json, record_path

SHOWN = 100  # characters of names, of each kind, in the line on what was found


@dataclass
class Search:
    """What is searched for, and what was found on the way.

    Args:
        pattern, contrasts, subject, outputs, generated, label_maps: as of `find_cases`.
        passed: names of what was passed over, by kind, in which `{s}` marks the plural.
        folder_each: an example of a folder or beginning of names that was taken for a patient, if any.
        read: the folder or list that was read.
        plain: whether it is a plain folder.
    """

    pattern: str | None
    contrasts: Sequence[str] | None
    subject: re.Pattern | None
    outputs: Sequence[Path]
    generated: bool
    label_maps: bool = False
    passed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    folder_each: str = ""
    read: Path | None = None
    plain: bool = False

    def subject_of(self, name: str, path: str) -> str:
        """The patient of a scan: by `data.subject`, or as in public data sets; else the scan's name."""
        if self.subject is not None:
            if not (match := self.subject.search(path)) or not match[1]:
                what = brief(repr(self.subject.pattern))
                raise UserError(f"data.subject is {what}, which finds no subject in {brief(path)}.")
            return match[1]
        if name.startswith("sub-"):
            return name.split("_")[0]
        known = PATIENT.search(name) or PATIENT.search(path)
        return known[1] if known else name

    def subject_of_file(self, name: str, file: File, patients: dict[File, str]) -> str:
        """As `subject_of`; where that gives only the scan's own name, the patient by `patients`, if any."""
        subject = self.subject_of(name, file.name)
        if self.subject is None and subject == name and file in patients:
            subject = patients[file]
            self.folder_each = self.folder_each or subject
        return subject


def in_words(passed: dict[str, list[str]]) -> str:
    """The number of names of each kind, masks first, with the names where they are few."""
    parts = []
    for kind, names in sorted(passed.items(), key=lambda item: item[0] != "mask{s}"):
        if not names:
            continue
        distinct = list(dict.fromkeys(map(brief, names)))
        shown = ", ".join(distinct)
        if len(shown) > SHOWN and len(distinct) > 1:
            shown = f"such as {distinct[0]}"
        parts.append(f"{counted(len(names), kind)} ({shown})")
    return ", ".join(parts)


def unreadable(folder: str | Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: this folder cannot be read ({error.strerror}). Allow reading it, or move it away."
    )


def _walk(root: Path, search: Search) -> list[File]:
    """The images and masks below a folder, links followed, each folder once; other files are noted in
    `search.passed`.

    Raises:
        UserError: a folder cannot be read.
    """
    own = {os.path.realpath(path): Path(path) for path in search.outputs}
    top = os.path.realpath(root)
    found, seen, linked, waiting = [], {top}, [], [(Path(root), ())]
    while waiting or linked:
        # Links last: a folder that is found both itself and by a link keeps its own name.
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
            raise unreadable(folder, error) from None
        inner = []
        for entry in entries:
            where = (*parts, entry.name)
            name, image = "/".join(where), suffix_of(entry.name)
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


def _is_generated(file: File) -> bool:
    """Whether a record of inference.py lies beside a volume; BIDS scans have a JSON of that name too."""
    record = record_path(file.path)
    if record == file.path or not record.is_file():
        return False
    try:
        content = parse_json(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "seed", "sampler", "volume"} <= set(content)


def cases_below(root: Path, search: Search) -> list[Case]:
    glob = parts_of_pattern(search.pattern) if search.pattern is not None else None
    every = _walk(root, search)
    images = _chosen(every, glob, search)
    if not images:
        what = f"no image matches {search.pattern!r}" if glob else f"no image ({', '.join(IMAGE_SUFFIXES)})"
        instead = f" (passed over: {in_words(search.passed)})" if any(search.passed.values()) else ""
        raise UserError(
            f"{root}: {what} there{instead}. Check the option that names the folder, or `data_base_dir`."
        )
    taken = set(images)
    labels = {(file.folder, file.stem.lower()): file.path for file in every if file not in taken}
    if search.contrasts:
        found = _by_contrast(root, images, labels, search)
    else:
        found = _one_case_a_file(root, images, labels, search)
    used = {case.label for case in found}
    for kind in ("mask{s}", "file{s} under derivatives"):
        search.passed[kind] = [
            name for name in search.passed[kind] if root.joinpath(*name.split("/")) not in used
        ]
    return sorted(found, key=lambda case: case.images[0])


def _chosen(files: list[File], glob: tuple[str, ...] | None, search: Search) -> list[File]:
    """The images among the files, without masks, templates, generated volumes and links to others."""
    chosen, passed = [], search.passed
    every = {(file.folder, file.stem) for file in files}
    for file in files:
        if glob and not matches(file.parts, glob):
            passed["mask{s}" if is_mask(file) else "file{s} that data.pattern leaves out"].append(file.name)
        elif not glob and "derivatives" in [part.lower() for part in file.folder]:
            passed["file{s} under derivatives"].append(file.name)
        elif not glob and TEMPLATE.match(file.stem):
            passed["template{s}"].append(file.name)
        elif file.stem.endswith("_emb") and (file.folder, file.stem.removesuffix("_emb")) in every:
            passed["embedding{s}"].append(file.name)
        elif not search.generated and _is_generated(file):
            passed["volume{s} that inference.py made"].append(file.name)
        else:
            chosen.append(file)
    if not glob:
        stems = {(file.folder, file.stem) for file in chosen}
        maps = {file for file in chosen if is_spm_map(file, stems)}
        passed["map{s} of SPM"] = [file.name for file in chosen if file in maps]
        chosen = [file for file in chosen if file not in maps]
    masks = {file for file in chosen if is_mask(file)}
    means_masks = glob or search.label_maps
    if not means_masks or len(masks) < len(chosen):  # a pattern that names masks alone means them
        passed["mask{s}"] += [file.name for file in chosen if file in masks]
        chosen = [file for file in chosen if file not in masks]
    return _each_once(chosen, search)


def _each_once(files: list[File], search: Search) -> list[File]:
    """The files, without links to another of them."""
    seen, once = set(), []
    for file in sorted(files, key=lambda file: file.is_link):
        real = os.path.realpath(file.path)
        if real in seen:
            search.passed["link{s} to a file that is read anyway"].append(file.name)
        else:
            once.append(file)
        seen.add(real)
    return sorted(once, key=lambda file: file.path)


def _one_case_a_file(root: Path, images: list[File], labels: dict, search: Search) -> list[Case]:
    kinds = kinds_of(images)
    if kinds and search.pattern is None:
        raise _several(root, kinds)
    names = [file.stem for file in images]
    if len(set(names)) < len(names):  # the same file name in a folder a subject
        names = [stem_of("_".join(file.parts)) for file in images]
    patients = (kinds.patients if kinds else {}) | patients_of(images)
    shared = [mask_of(file, labels, True) for file in images]
    claims = Counter(shared)
    cases = []
    for name, file, mask in zip(names, images, shared, strict=True):
        label = mask_of(file, labels, False) or (mask if claims[mask] == 1 else None)
        subject = search.subject_of_file(name, file, patients)
        cases.append(Case(name, (file.path,), label, subject))
    return cases


def _several(root: Path, kinds: Kinds) -> UserError:
    message = (
        f"{root}: holds several kinds of image ({few(kinds.names, 8)}). Choose one by "
        f'"data": {{"pattern": "{kinds.pattern}"}} in the config'
    )
    if not kinds.endings:
        return UserError(f"{message}, or move the others away.")
    endings = ", ".join(f'"{ending}"' for ending in kinds.endings[:8])
    return UserError(
        f'{message},\nor make several the channels of one volume by "data": {{"contrasts": [{endings}]}}.'
    )


def _by_contrast(root: Path, images: list[File], labels: dict, search: Search) -> list[Case]:
    """Cases with one file for each contrast. A missing file is named all the same: the check of the headers
    reports it."""
    endings = sorted(search.contrasts, key=len, reverse=True)
    named: list[tuple[File, str, str]] = []  # a file, its stem without the ending, and the ending
    for file in images:
        ending = next((one for one in endings if file.stem.endswith(one)), None)
        if ending is None:
            search.passed["other contrast{s}"].append(re.search(r"[_-]?[^_-]*$", file.stem)[0])
        else:
            named.append((file, file.stem.removesuffix(ending), ending))
    if not named:
        raise UserError(f"{root}: no image ends like one of data.contrasts ({', '.join(search.contrasts)}).")
    # By the name alone where that is unique, since contrasts may lie in folders of their own.
    by_name = Counter((rest, ending) for _, rest, ending in named)
    alone = all(rest.strip("_-") for _, rest, _ in named) and max(by_name.values()) == 1
    units, rests = defaultdict(dict), {}
    for file, rest, ending in named:
        unit = rest if alone else "/".join((*file.folder, rest))
        units[unit][ending], rests[unit] = file, rest
    names = {unit: rest.strip("_-") for unit, rest in rests.items()}
    if len(set(names.values())) < len(names) or not all(names.values()):
        names = {unit: unit.strip("_-/").replace("/", "_") for unit in units}
    patients = patients_of([next(iter(files.values())) for files in units.values()])
    cases = []
    for unit, files in units.items():
        rest, (ending, first) = rests[unit], next(iter(files.items()))
        suffix = first.path.name.removeprefix(rest + ending)
        paths = [
            files[one].path if one in files else first.path.with_name(f"{rest}{one}{suffix}")
            for one in search.contrasts
        ]
        masks = [mask.lstrip("_-") for mask in mask_names(rest.rstrip("_-").lower())]
        keys = [(file.folder, mask) for file in files.values() for mask in masks]
        label = next((labels[key] for key in keys if key in labels), None)
        name = names[unit] or root.name
        cases.append(Case(name, tuple(paths), label, search.subject_of_file(name, first, patients)))
    return cases
