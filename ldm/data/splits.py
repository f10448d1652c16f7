"""Which cases are trained on and which are held out: kept in `split.json`, checked for leaks, and remembered
by the checkpoints that were trained on it."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm import UserError, brief, counted, few
from ldm.data import folds
from ldm.data.cases import PARTS, Case
from ldm.data.checks import Problem, check_cases, check_headers, note_lines
from ldm.data.intensity import Intensity
from ldm.system.files import read_json, sha256_of, write_json
from ldm.system.schemas import StrictValidator, fault, fields

SPLIT = "split.json"  # in model_dir
SPLIT_SCHEMA = fields(**dict.fromkeys(PARTS, folds.NAMES))
SPLIT_SCHEMA["properties"] |= {"test": {"type": "array", "items": {"type": "string"}}}  # also split, fold
SPLIT_CONTENT = StrictValidator(SPLIT_SCHEMA)
HOW = ("split", "fold")  # keys of the config's `data` that a split is kept with
NOTES_PRINTED = 5  # at the start of a training
SAMPLED, PLACES = 2**16, 3  # bytes of a file, and in how many places, that are compared before all of it

Sides = tuple[list[Case], list[Case]]


def read_split(path: Path) -> tuple[list[str], list[str]]:
    """The names of the training and of the validation cases. Raises UserError: the file holds no split."""
    content = _content(path)
    return content["training"], content["validation"]


def held_out_names(path: Path) -> list[str]:
    """The names of the cases for testing, else of the validation cases. Raises UserError: as `read_split`."""
    content = _content(path)
    return content.get("test") or content["validation"]


def _content(path: Path) -> dict:
    content = read_json(path, "split")
    if what := fault(SPLIT_CONTENT, content):
        raise UserError(
            f"{path}: {what}. Expected two lists of case names, `training` and `validation`. Restore it, "
            "or choose another model_dir."
        )
    return content


def write_split(path: Path, train: Sequence[str], validation: Sequence[str], **more) -> None:
    """Write the names of the training and of the validation cases; and `test`, `split` and `fold`."""
    write_json(path, dict(zip(PARTS, (list(train), list(validation)), strict=True)) | more)


def left_out(cases: Sequence[Case], where: str, path: Path) -> str:
    """The line on cases that a file does not name."""
    verb, names = "is" if len(cases) == 1 else "are", few([case.name for case in cases])
    return f"{counted(len(cases), 'scan{s}')} in {where} {verb} not in {path} and {verb} left out: {names}"


@dataclass(frozen=True)
class Splitter:
    """Splits the cases of a data set as split.json says, or makes a new split.

    Args:
        path: of the split.json.
        where: the data folders, for messages.
        for_training: a training ends where a case of split.json is missing, bad or on the other side, and
            writes a new split. Else such cases are left out, and nothing is written.
        log: prints a line.
        data: the config's section: `val_fraction`, `split`, `fold`.
        test: the cases for testing, where there are any, take the place of the validation cases.
    """

    path: Path
    where: str
    for_training: bool
    log: Callable[[str], None]
    data: dict
    test: bool = False

    def select(self, cases: list[Case], validation: list[Case]) -> Sides:
        """The cases that split.json names. Others are left out and named; without a split.json, none are.

        Args:
            cases, validation: all cases, as the data set divides them.

        Raises:
            UserError: as `for_training` says; or no case of a side is left.
        """
        if not self.path.is_file():
            return cases, validation
        by_name = {case.name: case for case in [*cases, *validation]}
        names, content = read_split(self.path), _content(self.path)
        known = {name for part in (*names, content.get("test", [])) for name in part}
        for key in HOW:
            if self.for_training and content.get(key) != self.data[key]:
                raise UserError(
                    f"{self.path}: was made with data.{key} {brief(content.get(key))}, now it is "
                    f"{brief(self.data[key])}. Choose another model_dir."
                )
        if self.test:
            names = (names[0], held_out_names(self.path))
        missing = [name for name in dict.fromkeys([*names[0], *names[1]]) if name not in by_name]
        what = f"{counted(len(missing), 'case{s}')} of {self.path} not found in {self.where}"
        if missing and self.for_training:
            raise UserError(
                f"{what}: {few(missing)}. Put them back, or choose another model_dir, where a new split is "
                "made."
            )
        sides = tuple([by_name[name] for name in part if name in by_name] for part in names)
        if empty := [part for part, side in zip(PARTS, sides, strict=True) if not side]:
            raise UserError(f"{what}, and no {empty[0]} case is left: {few(missing)}. Put them back.")
        if missing:
            self.log(f"warning: {what}, and left out: {few(missing)}")
        if others := [case for case in by_name.values() if case.name not in known]:
            remedy = ". Another model_dir would take them in" if self.for_training else ""
            self.log(f"data: {left_out(others, self.where, self.path)}{remedy}")
        if moved := sorted({case.name for case in validation} & {case.name for case in sides[0]}):
            what = f"{self.where}: has {few(moved)} under validation, {self.path} has under training."
            if self.for_training:
                raise UserError(f"{what} Choose another model_dir, where a new split is made.")
            self.log(f"warning: {what} The model was trained on them")
        return sides

    def without_bad(
        self,
        cases: list[Case],
        validation: list[Case],
        channels: Sequence[int],
        intensity: Intensity,
        labels: bool,
        skip: bool,
    ) -> Sides:
        """The cases without the bad ones; notes on the data are printed.

        Args:
            channels, intensity, labels: as of `ldm.data.checks.check_cases`.
            skip: read every voxel, and where there is no split.json, leave bad cases out; a training lists
                them in skipped.json. Else only headers are read.

        Raises:
            UserError: bad cases that may not be left out, or none is left of a side.
        """
        every, kept = [*cases, *validation], self.path.is_file()
        if skip:
            problems, _ = check_cases(every, channels, intensity, labels)
        else:
            problems = check_headers(every, channels, labels)
        notes, problems = note_lines(problems), [problem for problem in problems if not problem.note]
        for line in notes[:NOTES_PRINTED]:
            self.log(line)
        if (more := len(notes) - NOTES_PRINTED) > 0:
            self.log(f"note: {more} more notes; check_data.py lists all")
        bad = {problem.case for problem in problems}
        if bad and (self.for_training if kept else not skip):
            first, of = problems[0], f" of {self.path}" if kept else ""
            remedy = (
                "Put good copies in their place, or leave them out by --skip-bad in another model_dir."
                if kept
                else "check_data.py lists all. Fix or remove them, or train without them by --skip-bad."
            )
            raise UserError(
                f"{first.file}: {first.reason}. {len(bad)} of {len(every)} cases{of} are bad.\n{remedy}"
            )
        skipped = self.path.with_name("skipped.json")
        if skip and self.for_training and not kept:
            write_json(skipped, [{"case": p.case, "file": str(p.file), "reason": p.reason} for p in problems])
        if bad:
            which = f": {few(sorted(bad))}" if kept else f", listed in {skipped}"
            self.log(f"data: {len(bad)} bad case(s) left out{which}")
        train, val = ([case for case in some if case.name not in bad] for some in (cases, validation))
        if not train or validation and not val:
            part = "validation" if train else "training"
            raise UserError(f"{self.where}: every {part} case is bad. check_data.py says why.")
        return train, val

    def divide(
        self,
        cases: list[Case],
        validation: list[Case],
        seed: int,
        resumed: dict | None = None,
        autoencoder: Path | None = None,
        known: dict | None = None,
    ) -> Sides:
        """The training and the validation cases, checked for leaks; a training's new split is written.

        Args:
            cases, validation: as split.json or the data set divides them. Without validation cases, those are
                held out that a checkpoint held out, else a share of the subjects.
            seed: as of `folds.divide`.
            resumed: the checkpoint that is resumed.
            autoencoder, known: the file of stage 1's weights, and the `subjects` in it.

        Raises:
            UserError: a held-out case is trained on, or a case changed sides since a checkpoint was trained;
                or as `folds.divide`.
        """
        path, kept, what, problems = self.path, self.path.is_file(), "", []
        how, drawn = {key: self.data[key] for key in HOW if self.data[key] is not None}, None
        if validation and not kept and how:
            raise UserError(
                f"{self.where}: names its validation cases itself. Remove data.split and data.fold."
            )
        if not validation and not (problems := one_file_of_two_subjects(cases)):
            before = (resumed or {}).get("subjects") or known
            if before and not how and (alike := split_alike(cases, before)):
                cases, validation = alike
                of = (resumed or {}).get("path", autoencoder)
                self.log(f"data: no {path} yet: held out is what {of} held out")
            else:
                drawn = folds.divide(cases, self.data, seed)
                cases = drawn.training
                validation = drawn.test if self.test and drawn.test else drawn.validation
        if validation:
            what, problems = "held out and also trained on: ", leaks(cases, validation)
        if problems:
            first, more = problems[0], f" ({len(problems)} such cases)" if len(problems) > 1 else ""
            advice = (
                "Choose another model_dir, for data with each patient on one side and no scan twice."
                if kept
                else "Keep each patient on one side and no scan twice; check_data.py lists all."
            )
            source = path if kept else self.where
            raise UserError(f"{source}: {what}{first.file} {first.reason}{more}.\n{advice}")
        if resumed:
            check_unchanged(path, cases, validation, resumed)
        if known and (seen := on_side(validation, known, "training")):
            of_all = f"{len(seen)} of {counted(len(validation), 'validation case{s}')}"
            what = f"{autoencoder}: was trained on {of_all} ({few([case.name for case in seen])})"
            if self.for_training and autoencoder.parent.resolve() == path.parent.resolve():
                raise UserError(f"{what}: {path} has changed since. Restore it, or choose another model_dir.")
            self.log(f"warning: {what}: figures on them are better than on new scans")
        if self.for_training and not kept:
            if drawn and drawn.test:
                how["test"] = [case.name for case in drawn.test]
            if drawn and drawn.folds:
                write_json(path.with_name(folds.FOLDS_FILE), drawn.folds)
            write_split(path, *([case.name for case in some] for some in (cases, validation)), **how)
        return cases, validation


# ---------------------------------------------------------------- leaks


def is_single_subject(train: Sequence[Case], validation: Sequence[Case]) -> bool:
    """Whether both sides hold scans of one subject, which is its own validation on purpose."""
    return len({case.subject for case in [*train, *validation]}) == 1


def leaks(train: Sequence[Case], validation: Sequence[Case]) -> list[Problem]:
    """Validation cases that are also trained on: of the same subject, the same file under two names (links
    are followed), or another file of the same bytes.

    Files are read only where their sizes agree, in a few places first, and whole only where these agree too.
    The same voxels in files of other bytes are found by `ldm.data.checks.check_cases`.
    """
    if is_single_subject(train, validation):
        return []
    found = shared_subjects(train, validation)
    leaking = {problem.case for problem in found}
    rest = [case for case in validation if case.name not in leaking]
    files = {_real(path): case.name for case in train for path in case.images}
    own = [path for case in rest for path in map(_real, case.images)]
    twins = dict(_twins(list(files), [path for path in own if path not in files]))
    twins |= {path: path for path in own if path in files}
    for case in rest:
        path = _real(case.images[0])
        if all(_real(one) in twins for one in case.images):  # all channels: cases may share an atlas
            what = "is" if path == twins[path] else f"holds the same bytes as {twins[path]}, which is"
            reason = f"{what} also under training, as {files[twins[path]]}"
            found.append(Problem(case.name, case.images[0], reason))
    return found


def shared_subjects(train: Sequence[Case], validation: Sequence[Case]) -> list[Problem]:
    """Validation cases of a subject that is trained on, unless it is the only one."""
    subjects = {} if is_single_subject(train, validation) else {case.subject: case.name for case in train}
    reason = "is of subject {}, who is under training too, as {}"
    return [
        Problem(case.name, case.images[0], reason.format(brief(case.subject), subjects[case.subject]))
        for case in validation
        if case.subject in subjects
    ]


def one_file_of_two_subjects(cases: Sequence[Case]) -> list[Problem]:
    """The same files under two subjects: a draw of subjects may put one on each side."""
    found, first = [], {}
    for case in cases:
        other = first.setdefault(tuple(map(_real, case.images)), case)
        if other.subject != case.subject:
            reason = f"is there as {other.name} and as {case.name}: the split may put one on each side"
            found.append(Problem(case.name, case.images[0], reason))
    return found


def _twins(some: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Those of the second files that hold the same bytes as one of the first, each with that one. Files that
    cannot be read are reported elsewhere."""
    groups = {None: (some, others)}
    for key in (lambda path: path.stat().st_size, _sample, sha256_of):
        finer = defaultdict(lambda: ([], []))
        for group, sides in groups.items():
            for side, paths in enumerate(sides):
                for path in paths:
                    try:
                        finer[group, key(path)][side].append(path)
                    except OSError:
                        continue
        groups = {group: sides for group, sides in finer.items() if all(sides)}
    return [(path, first[0]) for first, second in groups.values() for path in second]


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, it takes links in a circle


def _sample(path: Path) -> bytes:
    """Hash of some bytes of the start, the middle and the end of a file."""
    digest, last = hashlib.sha256(), max(0, path.stat().st_size - SAMPLED)
    with path.open("rb") as file:
        for place in range(PLACES):
            file.seek(last * place // (PLACES - 1))
            digest.update(file.read(SAMPLED))
    return digest.digest()


# ---------------------------------------------------------------- what a checkpoint remembers


def subjects_of(train: Sequence[Case], validation: Sequence[Case]) -> dict[str, list[str]]:
    """For a checkpoint: hashes of the subjects of each side, since names may identify a person."""
    sides = zip(PARTS, (train, validation), strict=True)
    return {part: sorted({_hashed(case.subject) for case in cases}) for part, cases in sides}


def _hashed(subject: str) -> str:
    return hashlib.sha256(subject.encode()).hexdigest()[:16]


def on_side(cases: Sequence[Case], subjects: dict[str, list[str]], part: str) -> list[Case]:
    """The cases whose subject a checkpoint's `subjects` have on this side, and not on the other."""
    (other,) = set(PARTS) - {part}
    on_it = set(subjects[part]) - set(subjects[other])
    return [case for case in cases if _hashed(case.subject) in on_it]


def split_alike(cases: Sequence[Case], subjects: dict[str, list[str]]) -> Sides | None:
    """Hold out what a checkpoint's training held out, and train on the rest; None where that leaves nothing
    on a side."""
    validation = on_side(cases, subjects, "validation")
    held_out = {case.name for case in validation}
    train = [case for case in cases if case.name not in held_out]
    return (train, validation) if train and validation else None


def check_unchanged(path: Path, train: Sequence[Case], validation: Sequence[Case], resumed: dict) -> None:
    """Check that no case has changed sides since the training that is resumed began.

    Args:
        path: of the split.json.
        resumed: the checkpoint.

    Raises:
        UserError: some have.
    """
    if (before := resumed.get("subjects")) is None:  # of an older version
        return
    crossed = on_side(validation, before, "training") + on_side(train, before, "validation")
    if crossed:
        what, names = counted(len(crossed), "case{s}"), few([case.name for case in crossed])
        raise UserError(
            f"{path}: has changed since {resumed['path']} was begun: {what} changed sides ({names}). "
            "Restore it, or choose another model_dir."
        )
