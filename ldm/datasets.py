"""Find the cases of a data set, split them, and serve them to a loader.

Layouts read by `find_cases`: a Medical Segmentation Decathlon folder, an nnU-Net raw folder, a plain or
BIDS-like folder of NIfTI files with an optional `participants.tsv`, and a JSON list of training and
validation files.
"""

import csv
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ldm import UserError, brief
from ldm.checkpoints import write_array
from ldm.processes import tell
from ldm.transforms import Preprocessing, augmentation, fit, ras_geometry

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz")
LABEL_SUFFIXES = ("_dseg", "_seg", "_label", "_mask")
LABEL_FOLDERS = {"derivatives", "labels", "labelstr", "labelsts", "masks"}
TYPICAL_CASES = 16
LEFT_BEHIND = 24 * 3600  # seconds without a change, after which no one is writing a volume any more


@dataclass(frozen=True)
class Case:
    """One volume of a data set.

    `images` is one file (3D, or 4D with the channels last) or one file a channel; `subject` groups the scans
    that must stay on one side of the split; `covariates` is the subject's row of `participants.tsv`.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    subject: str = ""
    covariates: dict = field(default_factory=dict, compare=False)


def find_cases(source: Path | Sequence[Path], pattern: str | None = None) -> tuple[list[Case], list[Case]]:
    """List the cases of a data set, sorted by name.

    Args:
        source: a folder, the parent of one, a `.json` list, or several of these.
        pattern: glob of the images of a plain folder.

    Returns:
        (cases, validation): `validation` is empty unless the data set itself names validation cases.

    Raises:
        UserError: nothing there, or names that are not unique.

    Whether all files that a data set names are there and can be read is what `ldm.checks` tells.
    """
    if not isinstance(source, (str, Path)):
        found = [(Path(one), *find_cases(Path(one), pattern)) for one in source]
        cases = [_renamed(case, f"{root.name}/") for root, train, _ in found for case in train]
        validation = [_renamed(case, f"{root.name}/") for root, _, held_out in found for case in held_out]
    else:
        cases, validation = _find_in(Path(source), pattern)
    names = [case.name for case in [*cases, *validation]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{source}: the case '{twice}' is there twice. Every case needs a name of its own.")
    return cases, validation


def _renamed(case: Case, prefix: str) -> Case:
    return Case(prefix + case.name, case.images, case.label, prefix + case.subject, case.covariates)


def _find_in(source: Path, pattern: str | None) -> tuple[list[Case], list[Case]]:
    if source.suffix == ".json":
        return _from_json_list(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such data folder. Name another (`data_base_dir`, or the option).")
    if (source / "dataset.json").is_file():
        return _from_dataset_json(source)
    inside = sorted(path.parent for path in source.glob("*/dataset.json"))
    if len(inside) == 1:  # `data_base_dir` may be the data set's parent, as in the MONAI tutorial
        return _from_dataset_json(inside[0])
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise UserError(
            f"{source}: holds several data sets ({names}). Name one of them in `data_base_dir`, or a list."
        )
    return _from_plain_folder(source, pattern), []


def parse_json(text: str) -> object:
    """Parse JSON, strictly. Raises ValueError: not JSON, nested too deep, or a key twice in an object."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        content = {}
        for key, value in pairs:
            if key in content:  # json would let the last one win in silence
                raise ValueError(f"the key {brief(repr(key))} is there twice")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("lists or objects within each other lead too deep") from None


def read_json(path: str | Path, what: str = "") -> dict:
    """Read a JSON object. Raises UserError that names the file, after `what` it is."""
    path = Path(path)
    where = f"{what} {path}".strip()
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: should hold a JSON object.")
    return content


def _stem(path: Path | str) -> str:
    name = Path(path).name
    return next((name[: -len(end)] for end in IMAGE_SUFFIXES if name.endswith(end)), Path(name).stem)


def _listed(entries: list, root: Path, where: str) -> list[Case]:
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
        name = str(entry.get("name", _stem(images[0])))
        others = {key: value for key, value in entry.items() if key not in {"name", "image", "label"}}
        cases.append(Case(name, images, label, str(entry.get("subject", _subject_of(name))), others))
    if not cases:
        raise UserError(f"{where}: lists no training cases.")
    return sorted(cases, key=lambda case: case.name)


def _from_json_list(path: Path) -> tuple[list[Case], list[Case]]:
    content = read_json(path)
    if not isinstance(content.get("training"), list):
        raise UserError(
            f'{path}: should hold a list "training" of {{"image": file}}, and may hold "validation".'
        )
    validation = content.get("validation") or []
    if not isinstance(validation, list):
        raise UserError(f'{path}: "validation" should be a list of {{"image": file}}.')
    return (
        _listed(content["training"], path.parent, f"{path}, training"),
        _listed(validation, path.parent, f"{path}, validation") if validation else [],
    )


def _from_dataset_json(root: Path) -> tuple[list[Case], list[Case]]:
    path = root / "dataset.json"
    content = read_json(path)
    if isinstance(content.get("training"), list):  # Medical Segmentation Decathlon
        return _listed(content["training"], root, str(path)), []
    if not isinstance(content.get("channel_names"), dict) or not content["channel_names"]:
        raise UserError(
            f'{path}: has neither a list "training" (Decathlon) nor an object "channel_names" (nnU-Net) that '
            "names a channel."
        )
    ending = content.get("file_ending", ".nii.gz")
    if ending not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: file_ending {ending} is not read; convert the images to .nii.gz.")
    channels = len(content["channel_names"])
    files = (root / "imagesTr").glob(f"[!.]*{ending}")
    cases = []
    for name in sorted({image.name[: -len(ending)].rpartition("_")[0] for image in files}):
        images = tuple(root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(channels))
        label = root / "labelsTr" / f"{name}{ending}"
        cases.append(Case(name, images, label if label.is_file() else None, _subject_of(name)))
    if not cases:
        raise UserError(f"{root / 'imagesTr'}: no *_0000{ending} images there.")
    return cases, []


def _subject_of(name: str) -> str:
    """`sub-01` of `sub-01_ses-2_T1w`: the BIDS subject, or the whole name where it has none."""
    return name.split("_")[0] if name.startswith("sub-") else name


def _from_plain_folder(root: Path, pattern: str | None) -> list[Case]:
    try:
        found = sorted(root.glob(pattern or "**/*"))
    except (NotImplementedError, ValueError, IndexError):  # absolute, "**a", "."; pathlib's own words differ
        raise UserError(
            f"data.pattern is {brief(repr(pattern))}, no pattern of files below a folder; one such as "
            '"**/*_T1w.nii.gz" is due.'
        ) from None
    paths = [
        path
        for path in found
        if path.name.endswith(IMAGE_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if pattern is None:
        paths = [
            path
            for path in paths
            if not _stem(path).endswith(LABEL_SUFFIXES)
            and not LABEL_FOLDERS & {part.lower() for part in path.relative_to(root).parts[:-1]}
        ]
    if not paths:
        what = f"no image matches {pattern!r}" if pattern else f"no image ({', '.join(IMAGE_SUFFIXES)})"
        raise UserError(f"{root}: {what} there. Name another folder (`data_base_dir`, or the option).")
    contrasts = {_stem(path).rpartition("_")[2] for path in paths if path.name.startswith("sub-")}
    if pattern is None and len(contrasts) > 1:
        some = sorted(contrasts)
        raise UserError(
            f"{root}: holds several kinds of image ({', '.join(some)}). Choose one by "
            f'"data": {{"pattern": "**/*_{some[0]}.*"}} in the config.'
        )
    rows = _participants(root / "participants.tsv")
    names = [_stem(path) for path in paths]
    if len(set(names)) < len(names):  # the same file name in a folder a subject
        names = [_stem(path.relative_to(root).as_posix().replace("/", "_")) for path in paths]
    cases = []
    for name, path in zip(names, paths, strict=True):
        labels = [path.with_name(_stem(path) + end + path.name[len(_stem(path)) :]) for end in LABEL_SUFFIXES]
        label = next((one for one in labels if one.is_file() and one not in paths), None)
        subject = _subject_of(name)
        cases.append(Case(name, (path,), label, subject, rows.get(subject, {})))
    return cases


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


def split_cases(cases: Sequence[Case], val_fraction: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Hold out a share of the subjects, at least one, by a seeded draw.

    All scans of a subject fall on the same side. A single subject is on both: the caller says so to the user.
    """
    subjects = sorted({case.subject for case in cases})
    if len(subjects) == 1:
        return list(cases), list(cases)
    order = torch.randperm(len(subjects), generator=stream(seed, "split")).tolist()
    count = min(max(1, round(val_fraction * len(subjects))), len(subjects) - 1)
    held_out = {subjects[i] for i in order[:count]}
    return [c for c in cases if c.subject not in held_out], [c for c in cases if c.subject in held_out]


def choose_spacing(cases: Sequence[Case], longest_side: int | None) -> list[float]:
    """The first case's own spacing; or, isotropic, the multiple of its finest that brings the longest side to
    about `longest_side` voxels."""
    shape, sizes = ras_geometry(cases[0].images[0])
    if longest_side is None:
        return [round(float(size), 4) for size in sizes]
    factor = max(1, round(float((shape * sizes).max()) / (longest_side * sizes.min())))
    return [round(float(sizes.min()) * factor, 4)] * 3


def volume_size(cases: Sequence[Case], spacing: Sequence[float], divisor: int) -> list[int]:
    """The size in voxels that holds every case at `spacing`, rounded up to what the networks divide; from
    headers."""
    largest = np.max([size_at(*ras_geometry(case.images[0]), spacing) for case in cases], axis=0)
    return [int(math.ceil(side / divisor) * divisor) for side in largest]


def size_at(shape: np.ndarray, sizes: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Voxels of a volume of this shape and voxel size in mm at `spacing`: from the centre of the first to
    that of the last, as MONAI's `Spacing` counts."""
    return np.round((shape - 1) * sizes / spacing + 1)


def stream(seed: int, *what: object) -> torch.Generator:
    """A CPU random generator that is a function of the seed and of what it is for, and of nothing else.

    Crop, augmentation, posterior draw, noise and time of a case use `stream(seed, purpose, epoch, case)`, so
    that they depend neither on the worker nor on the rank nor on the batch.
    """
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def typical_limits(preprocessing: Preprocessing, cases: Sequence[Case]) -> list[list[float]]:
    """Median over some cases of the intensities that become 0 and 1, for each channel."""
    return np.median([preprocessing.limits(case.images) for case in cases[:TYPICAL_CASES]], axis=0).tolist()


def version_of(seed: int, epoch: int, case: str, versions: int | None) -> int:
    """Which random version of a case an epoch has: one of its own, or each of so many in turn, from one on
    that the case begins with."""
    if versions is None:
        return epoch
    return (stream(seed, "version", case).initial_seed() + epoch) % versions


class VolumeDataset(Dataset):
    """Preprocessed volumes of a list of cases, cropped or padded, augmented where asked.

    An item is asked for by `(epoch, i)`, as `EpochSampler` does, and is `{"image": (C, D, H, W) float32,
    "epoch": int, "index": int}`. Its random part is a function of (seed, epoch, case), by way of the version
    that the epoch has (`version_of`).

    Args:
        cases: what to serve.
        preprocessing: from file to a normalised volume.
        size: voxels of the crop, smaller volumes being padded.
        random_crop: a random crop, else the centre.
        augment: the `augment` section of the config, or None.
        cache_dir: folder of ready-made volumes, memory-mapped and shared by all processes of a machine.
        cache_rate: share of the cases that are kept there.
        seed: seed of crops and augmentation.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        preprocessing: Preprocessing,
        size: Sequence[int],
        random_crop: bool = False,
        augment: dict | None = None,
        cache_dir: Path | None = None,
        cache_rate: float = 0.0,
        seed: int = 0,
    ):
        self.cases, self.preprocessing, self.size, self.seed = list(cases), preprocessing, tuple(size), seed
        self.augmentation = augmentation(augment or {}, self.size, random_crop)
        self._versions = augment.get("versions") if augment else None
        self.foreground = bool(random_crop and augment and augment["foreground_prob"])
        self.cache_dir = cache_dir
        self.cached = round(cache_rate * len(self.cases)) if cache_dir else 0
        self.cache_is_writable = True  # until it is not; then it is only read
        if self.cached:
            _clear_left_behind(cache_dir)

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def versions(self) -> int | None:
        """How many versions of a volume the epochs go through; None: each has one of its own."""
        return 1 if self.augmentation is None else self._versions

    def volume(self, i: int) -> np.ndarray:
        """The whole normalised volume of case `i`, (C, D, H, W) float32, from the cache where it is kept."""
        return self._kept(i, "image", lambda case: self.preprocessing(case.images))

    def _label(self, i: int) -> np.ndarray | None:
        if self.cases[i].label is None:
            return None
        return self._kept(i, "label", lambda case: self.preprocessing.label(case.label))

    def _kept(self, i: int, kind: str, make) -> np.ndarray:
        case = self.cases[i]
        if i >= self.cached:
            return make(case)
        files = case.images if kind == "image" else (case.label,)
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        key = hashlib.sha256(repr((kind, facts, self.preprocessing.key)).encode()).hexdigest()[:32]
        path = self.cache_dir / f"{key}.npy"
        if path.is_file():
            try:
                return np.load(path, mmap_mode="c")  # writable, as torch wants it, but never written
            except (OSError, ValueError, EOFError) as error:
                tell(f"warning: {path}: this cached volume is damaged ({error}) and is made again")
        volume = make(case)
        if self.cache_is_writable:
            self.cache_dir.mkdir(parents=True, exist_ok=True)  # a file in its place is an error
            try:
                write_array(path, volume)
            except OSError as error:
                self.cache_is_writable = False
                reason = error.__context__ or error
                tell(
                    f"warning: {self.cache_dir}: the cache cannot be written ({reason.strerror or reason}). "
                    "Volumes that are not in it are read from their files in each epoch, which is slower. "
                    "Free space, choose another cache_dir, or set data.cache_rate to 0"
                )
        return volume

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        image = self.image(i, version_of(self.seed, epoch, self.cases[i].name, self.versions))
        return {"image": image, "epoch": epoch, "index": i}

    def image(self, i: int, version: int) -> torch.Tensor:
        """A version of case `i`, (C, *size) float32."""
        volume = self.volume(i)
        if self.augmentation is None:
            return torch.from_numpy(np.array(fit(volume, self.size)))
        rng = np.random.RandomState(
            stream(self.seed, "augment", version, self.cases[i].name).initial_seed() % 2**32
        )
        label = self._label(i) if self.foreground else None
        if label is not None and label.shape[1:] != volume.shape[1:]:
            raise UserError(
                f"{self.cases[i].label}: shape {label.shape[1:]} is not the image's, {volume.shape[1:]}."
            )
        return self.augmentation(volume, label, rng)


def _clear_left_behind(cache_dir: Path) -> None:
    """Delete what a killed process had begun to write. Runs share the folder, so what was changed of late may
    be another's that is at work."""
    for part in cache_dir.glob(".*.npy.*.part"):
        try:
            if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                part.unlink()
        except FileNotFoundError:
            continue  # it was another run's, which ended it, or it was deleted by one


class EpochSampler(Sampler):
    """Order of the cases: a function of (seed, epoch), dealt to the ranks in turn.

    Batch `b` of rank `r` of `w` holds entries `[(b * w + r) * n, (b * w + r + 1) * n)` of the epoch's order,
    so that `w` ranks with batches of `n` see together what one rank with batches of `w * n` sees. An epoch is
    a whole number of steps, each of `accumulate` batches; the last is filled up from the start of the order.

    Set `epoch` before each epoch, and `first`, the batch to begin with, after a resume in the middle of one.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int, world_size: int, accumulate: int = 1
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-self.length // (self.batch_size * self.world_size * self.accumulate)) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=stream(self.seed, "order", self.epoch)).tolist()
        together = self.batch_size * self.world_size
        for b in range(self.first, len(self)):
            first = b * together + self.rank * self.batch_size
            yield [(self.epoch, order[i % self.length]) for i in range(first, first + self.batch_size)]
