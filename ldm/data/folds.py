"""Ways to divide the cases of a data set by subject: a share held out, three parts, or folds; or as the folds
of a list say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm import UserError, counted, few
from ldm.data.cases import Case
from ldm.data.datasets import stream
from ldm.system.files import read_json
from ldm.system.schemas import StrictValidator, fault, fields

THREE_PARTS, FIVE_FOLDS = "train-val-test", "5-fold"
SHARES = (0.7, 0.1)  # of training and validation in three parts; the rest are for testing
FOLDS = 5
FOLDS_FILE = "splits_final.json"  # nnU-Net's name, and its format
NAMES = {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True}
FOLDS_CONTENT = StrictValidator({"type": "array", "minItems": 1, "items": fields(train=NAMES, val=NAMES)})


@dataclass(frozen=True)
class Division:
    """Cases by side. `folds` are all folds as lists of names, where there are any."""

    training: list[Case]
    validation: list[Case]
    test: list[Case]
    folds: list[dict[str, list[str]]] | None = None


def divide(cases: Sequence[Case], data: dict, seed: int) -> Division:
    """Divide cases as the config's section `data` says. All scans of a subject fall on the same side.

    Args:
        data: `split`, `fold`, `val_fraction`.
        seed: of the draw of subjects.

    Raises:
        UserError: too few subjects, a fold that is out of range or leaves nothing, or a file of folds that
            does not fit.
    """
    how, fold = data["split"], data["fold"]
    if how is None and any(case.fold is not None for case in cases):
        return by_listed_fold(cases, fold)
    if how is None or how == THREE_PARTS:
        if fold is not None:
            raise UserError(
                f"data.fold {fold}: needs data.split {FIVE_FOLDS}, a file of folds, or a list with folds."
            )
        return hold_out(cases, data["val_fraction"], seed) if how is None else three_parts(cases, seed)
    folds = five_folds(cases, seed) if how == FIVE_FOLDS else read_folds(Path(how), cases)
    fold = fold or 0
    if fold >= len(folds):
        raise UserError(f"data.fold {fold}: {how} has {counted(len(folds), 'fold{s}')}, from 0 on.")
    by_name = {case.name: case for case in cases}
    sides = ([by_name[name] for name in folds[fold][part]] for part in ("train", "val"))
    return Division(*sides, [], folds)


def hold_out(cases: Sequence[Case], val_fraction: float, seed: int) -> Division:
    """Hold out a share of the subjects, at least one. A single subject is on both sides: the caller warns."""
    subjects = _shuffled(cases, seed)
    if len(subjects) == 1:
        return Division(list(cases), list(cases), [])
    count = min(max(1, round(val_fraction * len(subjects))), len(subjects) - 1)
    return Division(*_sides(cases, subjects[count:], subjects[:count]), [])


def three_parts(cases: Sequence[Case], seed: int) -> Division:
    """70 % of the subjects for training, 10 % for validation, 20 % for testing; at least one of each."""
    subjects = _shuffled(cases, seed)
    if len(subjects) < 3:
        raise UserError(f"data.split {THREE_PARTS}: needs 3 subjects, found {len(subjects)}.")
    train, val = (max(1, round(share * len(subjects))) for share in SHARES)
    train = min(train, len(subjects) - val - 1)
    parts = subjects[:train], subjects[train : train + val], subjects[train + val :]
    return Division(*_sides(cases, *parts))


def by_listed_fold(cases: Sequence[Case], fold: int | None) -> Division:
    """As MAISI reads its lists: the cases whose fold equals this one are for validation, all others for
    training. None: the first fold there is.

    Raises:
        UserError: nothing is left for a side.
    """
    there = sorted({case.fold for case in cases if case.fold is not None})
    fold = there[0] if fold is None else fold
    validation = [case for case in cases if case.fold == fold]
    train = [case for case in cases if case.fold != fold]
    for side, what in (
        (validation, "no case of the list has it, and nothing is held out"),
        (train, "every case of the list has it, and nothing is left to train on"),
    ):
        if not side:
            raise UserError(
                f"data.fold {fold}: {what} (folds there: {few(list(map(str, there)))}). Choose another by "
                f"--fold, or set data.split, such as {FIVE_FOLDS}, which replaces the list's folds."
            )
    return Division(train, validation, [])


def fold_of_subjects(cases: Sequence[Case], seed: int) -> dict[str, int]:
    """A fold from 0 to 4 for each subject, at random; of fewer than five subjects each has its own."""
    return {subject: i % FOLDS for i, subject in enumerate(_shuffled(cases, seed))}


def five_folds(cases: Sequence[Case], seed: int) -> list[dict[str, list[str]]]:
    """Five folds, each with another fifth of the subjects for validation."""
    subjects = fold_of_subjects(cases, seed)
    if len(subjects) < FOLDS:
        raise UserError(f"data.split {FIVE_FOLDS}: needs {FOLDS} subjects, found {len(subjects)}.")
    folds = []
    for k in range(FOLDS):
        held_out = [one for one, fold in subjects.items() if fold == k]
        sides = _sides(cases, [one for one in subjects if one not in held_out], held_out)
        names = [[case.name for case in side] for side in sides]
        folds.append(dict(zip(("train", "val"), names, strict=True)))
    return folds


def read_folds(path: Path, cases: Sequence[Case]) -> list[dict[str, list[str]]]:
    """The folds of a splits_final.json of nnU-Net.

    Raises:
        UserError: it holds no folds, or names a case that the data set has not.
    """
    folds = read_json(path, "folds", list)
    if what := fault(FOLDS_CONTENT, folds):
        raise UserError(f'{path}: {what}. Expected a list of {{"train": [names], "val": [names]}}.')
    known = {case.name for case in cases}
    missing = sorted({name for fold in folds for part in fold.values() for name in part} - known)
    if missing:
        raise UserError(f"{path}: names {counted(len(missing), 'case{s}')} not found: {few(missing)}.")
    return folds


def _shuffled(cases: Sequence[Case], seed: int) -> list[str]:
    """The subjects in a random order."""
    subjects = sorted({case.subject for case in cases})
    return [subjects[i] for i in torch.randperm(len(subjects), generator=stream(seed, "split")).tolist()]


def _sides(cases: Sequence[Case], *groups: Sequence[str]) -> list[list[Case]]:
    """The cases of each group of subjects, in their order."""
    return [[case for case in cases if case.subject in set(group)] for group in groups]
