"""Find the cases of a data set, and print what was found and passed over.

Layouts read by `find_cases`: a Medical Segmentation Decathlon folder, an nnU-Net raw folder, a plain or
BIDS-like folder of NIfTI files, and a JSON list of training and validation files, as MAISI has it too; each
with an optional `participants.tsv`.
"""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ldm import UserError, brief, counted
from ldm.data.cases import PARTS, Case
from ldm.data.folders import Search, cases_below, in_words, unreadable
from ldm.data.labels import as_label_maps
from ldm.data.names import stem_of, suffix_of
from ldm.data.reading import EMBEDDING, IMAGE_SUFFIXES, is_embedding
from ldm.system.files import read_json
from ldm.system.schemas import StrictValidator, fault, fields

NAME = {"type": "string"}
ENTRY = fields(image={"anyOf": [NAME, {"type": "array", "items": NAME, "minItems": 1}]})
ENTRY["properties"]["label"] = {"type": ["string", "null"]}
REGION = {  # of MAISI: in which part of the body a volume begins or ends
    "title": "four numbers, one of them 1 and the others 0 (head, chest, abdomen, lower body)",
    "type": "array",
    "items": {"enum": [0, 1]},
    "minItems": 4,
    "maxItems": 4,
    "contains": {"const": 1},
    "maxContains": 1,
}
INDICES = ("top_region_index", "bottom_region_index")  # of an entry
ENTRY["properties"] |= {
    "fold": {"type": "integer", "minimum": 0},
    "dim": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 3, "maxItems": 3},
    "spacing": {
        "type": "array",
        "items": {"type": "number", "exclusiveMinimum": 0},
        "minItems": 3,
        "maxItems": 3,
    },
    "modality": {"type": ["string", "integer"]},
    "embedding": NAME,
} | dict.fromkeys(INDICES, REGION)
FILES = {"name", "image", "label", "embedding", "fold"}  # what is no covariate
ENTRY["dependentRequired"] = {one: [other] for one, other in (INDICES, INDICES[::-1])}
ENTRIES = {"type": "array", "items": ENTRY}
LISTS = StrictValidator(fields(training=ENTRIES | {"minItems": 1}, validation=ENTRIES))


def find_cases(
    source: Path | Sequence[Path],
    pattern: str | None = None,
    *,
    contrasts: Sequence[str] | None = None,
    subject: str | None = None,
    outputs: Sequence[Path] = (),
    generated: bool = True,
    lists: Sequence[Path] | None = None,
    label_maps: bool = False,
    log: Callable[[str], None] | None = None,
) -> tuple[list[Case], list[Case]]:
    """List the cases of a data set, sorted by name.

    Args:
        source: a folder, the parent of one, a `.json` list, or several of these.
        pattern: glob of the images of a plain folder.
        contrasts: endings of files in a plain folder that become the channels of one case, in this order.
        subject: regular expression, whose one group is the subject, searched in an image's path below the
            folder.
        outputs: folders that the run writes to, passed over where they lie below `source`.
        generated: whether volumes with a record of inference.py beside them are cases.
        lists: a JSON list for each folder of `source`, whose file names count from that folder.
        label_maps: the cases are label maps without images: of each folder or list the labels, or where it
            has none, what it lists; masks, where a plain folder holds nothing else.
        log: prints a line; one on what was found and what was passed over.

    Returns:
        (cases, validation): `validation` is empty unless the data set itself names validation cases.

    Raises:
        UserError: no data, a folder that cannot be read, names that are not unique, or several images of a
            patient where one is expected.

    `ldm.data.checks` checks whether all files exist and can be read.
    """
    regex = None if subject is None else _subject_pattern(subject)
    searches, cases, validation = [], [], []
    alone = isinstance(source, (str, Path))
    roots = [Path(one) for one in ([source] if alone else source)]
    named = [Path(one).with_suffix("") for one in lists] if lists else roots
    prefixes = [""] if alone else _distinct_names(named)
    for root, prefix, path in zip(roots, prefixes, lists or [None] * len(roots), strict=True):
        searches.append(Search(pattern, contrasts, regex, outputs, generated, label_maps))
        found = _find_in(root, searches[-1], path)
        if label_maps:
            maps = as_label_maps([*found[0], *found[1]])
            found = maps[: len(found[0])], maps[len(found[0]) :]
        folders = dict.fromkeys(p if p.is_dir() else p.parent for p in (root, searches[-1].read))
        for to, some in zip((cases, validation), found, strict=True):
            some = _with_covariates(some, folders)
            to += some if alone else [_renamed(case, f"{prefix}/") for case in some]
    names = Counter(case.name for case in [*cases, *validation])
    if twice := next((name for name, count in names.items() if count > 1), None):
        where = ", ".join(map(str, roots))
        raise UserError(f"{where}: the case '{twice}' is there twice. Every case needs a name of its own.")
    if log:
        log(_line(cases, validation, searches))
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
    subjects = counted(len({case.subject for case in every}), "subject{s}")
    guessed = next((search.folder_each for search in searches if search.folder_each), None)
    by = f" (a folder or name each, such as {brief(guessed)})" if guessed else ""
    what = counted(len(every), "label map{s}") + of_these
    if not searches[0].label_maps:
        labels = counted(sum(case.label is not None for case in every), "label{s}")
        what = f"{counted(len(every), 'image{s}')}{each}{of_these}, {labels}"
    line = f"found: {what}, {subjects}{by} in {', '.join(str(search.read) for search in searches)}"
    if searches[0].pattern is not None and not any(search.plain for search in searches):
        line += " (data.pattern is for plain folders, and not used)"
    return f"{line}; passed over: {in_words(passed)}" if any(passed.values()) else line


def _subject_pattern(subject: str) -> re.Pattern:
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
    """The last name of each folder, with as many of those above it as make them unique."""
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
    return replace(case, name=prefix + case.name, subject=prefix + case.subject)


def _find_in(source: Path, search: Search, path: Path | None = None) -> tuple[list[Case], list[Case]]:
    """The cases below a folder, or those of its list at `path`."""
    search.read = path or source
    if source.suffix != ".json" and not source.is_dir():
        if source.exists():
            raise UserError(f"{source}: is a file. Expected a data folder, or a list of files, LIST.json.")
        raise UserError(f"{source}: no such data folder. Check the option that names it, or `data_base_dir`.")
    own = (source / "dataset.json").is_file()
    inside = [] if own else sorted(path.parent for path in source.glob("*/dataset.json"))
    lists = path or source.suffix == ".json" or own or inside
    if lists and search.contrasts:
        raise UserError(
            f"{search.read}: names its files itself; data.contrasts is for plain folders. Remove that key."
        )
    if not lists:
        search.plain = True
        return cases_below(source, search), []
    if path or source.suffix == ".json":
        return _from_lists(read_json(search.read), search.read, search, source if path else source.parent)
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


def _from_lists(content: dict, path: Path, search: Search, root: Path) -> tuple[list[Case], list[Case]]:
    """Cases of the lists `training` and `validation` of a JSON, whose entries are file names below `root` or
    `{"image": ..., "label": ...}`; a list `test` is passed over."""
    lists = {part: content.get(part) or [] for part in PARTS}
    for part, entries in lists.items():
        if isinstance(entries, list):
            lists[part] = [{"image": entry} if isinstance(entry, str) else entry for entry in entries]
    if what := fault(LISTS, lists):
        raise UserError(f'{path}: {what}. Expected lists of {{"image": file}}, "training" and "validation".')
    if isinstance(test := content.get("test"), list):
        for entry in test:
            name = entry.get("image") if isinstance(entry, dict) else entry
            search.passed["test scan{s} of the list"].append(name if isinstance(name, str) else repr(name))
    unnamed = {_first(one) for part in PARTS for one in lists[part] if "name" not in one}
    by_path = len({stem_of(Path(one).name) for one in unnamed}) < len(unnamed)  # a folder for each patient
    cases, validation = ([_case(one, root, search, by_path) for one in lists[part]] for part in PARTS)
    return sorted(cases, key=lambda case: case.name), sorted(validation, key=lambda case: case.name)


def _first(entry: dict) -> str:
    return entry["image"] if isinstance(entry["image"], str) else entry["image"][0]


def _case(entry: dict, root: Path, search: Search, by_path: bool) -> Case:
    names = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
    images = tuple(root / name for name in names)
    label = root / entry["label"] if entry.get("label") is not None else None
    path = Path(names[0])
    stem = "_".join(path.relative_to(path.anchor).parts) if by_path else path.name
    name = str(entry.get("name", stem_of(stem).removesuffix("_emb" * is_embedding(images[0]))))
    embedding = root / entry["embedding"] if "embedding" in entry else None
    if is_embedding(images[0]):
        embedding = images[0]
        if missing := [key for key in ("dim", "spacing") if key not in entry]:
            raise UserError(f"{search.read}: {names[0]} is an embedding: its entry needs {missing[0]}.")
    others = {key: value for key, value in entry.items() if key not in FILES}
    subject = str(entry["subject"]) if "subject" in entry else search.subject_of(name, names[0])
    return Case(name, images, label, subject, others, entry.get("fold"), embedding=embedding)


def _from_dataset_json(root: Path, search: Search) -> tuple[list[Case], list[Case]]:
    path = root / "dataset.json"
    content = read_json(path)
    if isinstance(content.get("training"), list):  # Medical Segmentation Decathlon
        cases, validation = _from_lists(content, path, search, root)
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
    files = _images_in(root / "imagesTr")
    files = [name for name in files if name.endswith(ending) and not name.endswith(EMBEDDING)]
    cases = []
    for name in sorted({image[: -len(ending)].rpartition("_")[0] for image in files}):
        images = tuple(root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(channels))
        label = root / "labelsTr" / f"{name}{ending}"
        subject = search.subject_of(name, f"imagesTr/{images[0].name}")
        cases.append(Case(name, images, label if label.is_file() else None, subject))
    if not cases:
        raise UserError(f"{root / 'imagesTr'}: no *_0000{ending} images there.")
    search.passed["file{s} in imagesTs"] += _images_in(root / "imagesTs")
    _pass_over_unlisted(cases, root, search)
    return cases, []


def _one_file_a_channel(case: Case, channels: int) -> Case:
    """nnU-Net version 1 lists NAME.nii.gz for the files NAME_0000.nii.gz, NAME_0001.nii.gz, ..."""
    image = case.images[0]
    stem, suffix = stem_of(image.name), image.name[len(stem_of(image.name)) :]
    images = tuple(image.with_name(f"{stem}_{channel:04d}{suffix}") for channel in range(channels))
    if len(case.images) > 1 or image.is_file() or not images[0].is_file():
        return case
    return replace(case, images=images)


def _pass_over_unlisted(cases: list[Case], root: Path, search: Search) -> None:
    """Note images beside those of `dataset.json` that it does not name."""
    named = {image for case in cases for image in case.images}
    for folder in sorted({image.parent for image in named}):
        names = [name for name in _images_in(folder) if folder / name not in named]
        search.passed["file{s} that dataset.json does not name"] += names


def _names_in(folder: Path) -> list[str]:
    """Names in a folder, none if it is missing. Raises UserError: it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # also a name that no folder can have
        return []
    except OSError as error:
        raise unreadable(folder, error) from None


def _images_in(folder: Path) -> list[str]:
    return [name for name in _names_in(folder) if suffix_of(name) and name[0] != "."]


# ---------------------------------------------------------------- participants.tsv


def _with_covariates(cases: list[Case], folders: Iterable[Path]) -> list[Case]:
    """The cases with their row of `participants.tsv`, by subject or by name, where one of the folders has it;
    a list's own entries win."""
    rows = {}
    for folder in folders:
        rows |= _participants(folder / "participants.tsv")
    return [
        replace(case, covariates={**rows.get(case.subject, rows.get(case.name, {})), **case.covariates})
        for case in cases
    ]


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
