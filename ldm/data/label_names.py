"""The names of label values: in a `dataset.json` (Decathlon, nnU-Net), or in MAISI's `label_dict.json`, which
is `{name: value}`."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm import UserError, few
from ldm.data.cases import Case
from ldm.data.names import words_of
from ldm.data.reading import LARGEST_LABEL, label_type
from ldm.system.files import read_json
from ldm.system.schemas import StrictValidator, fault

DATASET, LABEL_DICT = "dataset.json", "label_dict.json"
VALUE = {"type": "integer", "minimum": 0}
DICTIONARY = StrictValidator({"type": "object", "minProperties": 1, "additionalProperties": VALUE})


def read_label_dict(path: Path) -> dict[str, int]:
    """The values of a label_dict.json by name; several names may have one value.

    Raises:
        UserError: it is none.
    """
    content = read_json(path, "names of labels")
    if what := fault(DICTIONARY, content):
        raise UserError(f'{path}: {what}. Expected {{"name": value}}.')
    return content


def names_file(folders: Sequence[Path]) -> Path | None:
    """The first file in these folders that names labels."""
    files = (folder / name for folder in folders for name in (DATASET, LABEL_DICT))
    return next((file for file in files if file.is_file() and _labels(file)), None)


def folders_of(label: Path) -> list[Path]:
    """Where the file that names the values of a label is looked for."""
    return [label.parent, label.parent.parent]


def _labels(path: Path) -> dict:
    if not path.is_file():
        return {}
    if path.name != DATASET:
        return read_label_dict(path)
    labels = read_json(path).get("labels")
    return labels if isinstance(labels, dict) else {}


def label_values(path: Path) -> frozenset[int] | None:
    """The values that such a file gives labels; None where it gives none, or there is no file."""
    if not (labels := _labels(path)):
        return None
    if all(re.fullmatch("[0-9]{1,5}", key) for key in labels):  # Decathlon: {"1": "edema"}
        return frozenset(map(int, labels))
    values = [value for one in labels.values() for value in (one if isinstance(one, list) else [one])]
    return frozenset(values) if all(isinstance(value, int) for value in values) else None  # {"edema": 1}


def named_values(labels: object) -> dict[int, str]:
    """The names of label values by Decathlon's `{"1": "edema"}`, or `{"edema": 1}` of nnU-Net and MAISI; of
    several for one value the first; what says neither has none."""
    names = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if re.fullmatch("[0-9]{1,5}", key):
            names[int(key)] = str(value)
        elif isinstance(value, int):
            names.setdefault(value, key)
    return names


def names_in(path: Path) -> dict[int, str]:
    """The names that such a file gives label values."""
    return named_values(_labels(path))


def label_names(cases: Sequence[Case]) -> dict[int, str]:
    """The names of label values, by the files that name them beside the labels of the cases."""
    folders = {tuple(folders_of(case.label)) for case in cases if case.label}
    files = {names_file(some) for some in folders}
    names = {}
    for file in sorted(files - {None}):
        names |= names_in(file)
    return names


# ---------------------------------------------------------------- renumbering


def words_key(name: str) -> tuple[str, ...]:
    """What two spellings of a name have in common: `kidney_right` is `right kidney`."""
    return tuple(sorted(words_of(name)))


def renumbered(label: np.ndarray, names: dict[int, str], wanted: dict[str, int], where: Path) -> np.ndarray:
    """A label map in the values of a dictionary, by the names that its values have; values without names are
    those of the dictionary already.

    Args:
        label: whole numbers.
        names: of its values.
        wanted: the dictionary, values by name.
        where: the file, for messages.

    Raises:
        UserError: a value that occurs is not in the dictionary.
    """
    by_words, known = {words_key(name): value for name, value in wanted.items()}, {0, *wanted.values()}
    values, places = np.unique(label, return_inverse=True)
    new, unknown = [], []
    for value in values.tolist():
        if value in names and value != 0:
            to = by_words.get(words_key(names[value]))
        else:
            to = value if value in known else None
        if to is None or to > LARGEST_LABEL:
            unknown.append(f"{value} ({names[value]})" if value in names else str(value))
        new.append(to)
    if unknown:
        raise UserError(
            f"{where}: has labels that --labels does not name: {few(unknown, 10)}. Add their names to that "
            f"file, with values up to {LARGEST_LABEL}; two names may have one value."
        )
    return np.array(new, label_type(new))[places].reshape(label.shape)
