"""From files to groups of volumes: which samples are the model's, and how all volumes come to one grid and
to the unit range.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ldm import UserError, few
from ldm.data import splits
from ldm.data.cases import Case, size_at
from ldm.data.datasets import stream
from ldm.data.intensity import Intensity, to_unit_range
from ldm.data.labels import with_label
from ldm.data.preprocessing import Preprocessing, crop_or_pad
from ldm.data.reading import ras_geometry
from ldm.evaluation.features import RADIMAGENET
from ldm.evaluation.groups import (
    GENERATED,
    HELD_OUT,
    TRAINING,
    Comparison,
    DegradedScans,
    VolumeGroup,
)
from ldm.export import records
from ldm.metrics import RadialSpectrum
from ldm.models.autoencoder import Autoencoder
from ldm.system.files import sha256_of
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run

EXAMPLES = 4  # volumes of a group that the report shows
MAX_DEGRADED = 32  # real scans that are blurred


@dataclass
class Source:
    """The files of a group of volumes; `left_out` gives the reason by case."""

    name: str
    folder: str
    cases: list[Case]
    left_out: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- which volumes are compared


def samples_of_model(folder: Path, autoencoder: Path, unet: Path) -> tuple[Source, list[dict], list[str]]:
    """The samples in a folder that these checkpoints generated, their records, and a note on other volumes.

    Raises:
        UserError: there are none, or no such checkpoint.
    """
    if not unet.is_file():
        raise UserError(
            f"{unet}: no such checkpoint. Run train_diffusion.py, or name the samples by --generated."
        )
    samples, others = records.samples_of(folder, {"autoencoder": autoencoder, "unet": unet})
    left_out = f"left out: {records.listed(others)}" if others else ""
    if not samples:
        raise UserError(
            f"{folder}: found no samples of {unet}{f' ({left_out})' * bool(others)}.\n"
            "Run inference.py, or name the samples by --generated."
        )
    records.check_one_model(folder, samples.values())
    cases = [Case(path.name.removesuffix(".nii.gz"), (path,), records.labelled(path)) for path in samples]
    notes = [f"{GENERATED}: {left_out}."] if others else []
    return Source(GENERATED, str(folder), cases), [*samples.values()], notes


def check_named_samples(source: Source, unet: Path | None) -> tuple[list[dict], list[str]]:
    """The records of the samples in a folder that the user named, where there are any, and notes on what is
    unexpected. Removes what --reproduce made, duplicates, and what did not pass the check of inference.py.

    Args:
        unet: the checkpoint of the run, or None.

    Raises:
        UserError: there are no samples, or by their records they are of several models.
    """
    named = [case for case in source.cases if not case.name.endswith(records.REPRODUCED)]
    if not named:
        raise UserError(f"{source.folder}: found no {source.name} volumes but those of --reproduce.")
    found, source.cases, without, duplicates, changed, failed = {}, [], [], [], [], []
    for case in named:
        record = None
        with contextlib.suppress(UserError):  # a damaged one is listed when its volume is read
            record = records.record_of(case.images[0])
        key = record and (record["seed"], record["volume"]["sha256"])
        if key in found:
            duplicates.append(case.name)
            continue
        if record and "faults" in record:
            failed.append(case.name)
            continue
        source.cases.append(case)
        if record is None:
            without.append(case.name)
            continue
        found[key] = record
        if sha256_of(case.images[0]) != record["volume"]["sha256"]:
            changed.append(case.name)
    if not source.cases:
        raise UserError(
            f"{source.folder}: none of its {len(named)} volumes passed the check of inference.py."
        )
    found = [*found.values()]
    records.check_one_model(source.folder, found)
    notes = [
        f"{source.name}: {len(names)} of {len(named)} volumes {what} ({few(names, 3)})."
        for what, names in (
            ("have no record of inference.py", without if found else []),
            ("were changed after inference.py wrote them", changed),
            ("are duplicates and count once", duplicates),
            ("did not pass the check of inference.py and are left out", failed),
        )
        if names
    ]
    if found and unet and unet.is_file() and (digest := found[0]["unet"]["sha256"]) != sha256_of(unet):
        origin = f"{found[0]['unet']['path']} (SHA-256 {digest[:12]})"
        notes.append(f"{source.name}: generated by {origin}, not by {unet} as it is now.")
    return found, notes


def remove_scans(sources: dict[str, Source]) -> list[dict]:
    """Remove generated volumes that are files of the scans, by path or by content; returns a line for each
    group, as `verdicts` does.

    Raises:
        UserError: none is left.
    """
    generated, lines = sources[GENERATED], []
    total, digest_of = len(generated.cases), functools.cache(sha256_of)
    for name in (TRAINING, HELD_OUT):
        scans = sources[name].cases if name in sources else []
        by_size = {}  # only files of the same size are read
        for path in filter(Path.is_file, (path for case in scans for path in case.images)):
            by_size.setdefault(path.stat().st_size, []).append(path)

        def is_scan(case: Case, by_size: dict = by_size) -> bool:
            return any(
                digest_of(path) == digest_of(scan)
                for path in filter(Path.is_file, case.images)
                for scan in by_size.get(path.stat().st_size, ())
            )

        removed = [case.name for case in generated.cases if is_scan(case)]
        if not removed:
            continue
        if len(removed) == len(generated.cases):
            raise UserError(f"{generated.folder}: all generated volumes are files of the {name} set.")
        generated.cases = [case for case in generated.cases if case.name not in removed]
        text = f"{len(removed)} of {total} generated volumes are files of the {name} set and left out"
        lines.append({"tone": "bad", "text": f"{text}: {few(removed, 3)}."})
    return lines


def split_notes(split: Path, source: Source) -> list[str]:
    """A note on the cases of split.json that are missing or damaged."""
    if not split.is_file():
        return []
    held_out = source.name == HELD_OUT
    names = splits.held_out_names(split) if held_out else splits.read_split(split)[0]
    missing = sorted(set(names) - {case.name for case in source.cases})
    text = (
        f"{source.name}: {len(missing)} of {len(names)} cases of {split} are missing or damaged, and left out"
    )
    return [f"{text}: {few(missing)}"] if missing else []


# ---------------------------------------------------------------- volumes


class Reader:
    """Reads volumes onto one grid in the unit range, with the channels of their labels where `preprocessing`
    has labels; of label maps those alone.

    Args:
        preprocessing: of the scans.
        size: voxels of the grid.
        device: of the volumes.
    """

    def __init__(self, preprocessing: Preprocessing, size: Sequence[int], device: torch.device):
        self.preprocessing, self.size, self.device = preprocessing, tuple(size), device

    def __call__(self, case: Case) -> torch.Tensor:
        """(1, C, D, H, W) float32. Raises UserError: it cannot be read, is constant, or has no label."""
        if case.is_label_map:
            volume = self.preprocessing.label_channels(case.label)
        elif np.ptp(volume := self._unit_range(case)) == 0:
            raise UserError(f"{case.images[0]}: constant, an empty image.")
        elif self.preprocessing.labels:
            if case.label is None:
                raise UserError(f"{case.images[0]}: has no label, which the autoencoder needs.")
            volume = with_label(volume, self.preprocessing.label_channels(case.label), case)
        return torch.from_numpy(np.ascontiguousarray(crop_or_pad(volume, self.size)))[None].to(self.device)

    @property
    def labels(self) -> int:
        """How many of the channels, the last, are those of labels."""
        return len(self.preprocessing.labels)

    def _unit_range(self, case: Case) -> np.ndarray:
        """Scans as in training; samples by the limits in their records."""
        limits = records.limits_of(case.images[0]) if len(case.images) == 1 else None
        if limits is None:
            return np.clip(self.preprocessing(case.images), 0, 1)
        channels = tuple(range(len(limits)))  # a sample has only the channels that were trained on
        sample = replace(self.preprocessing, channels=channels, intensity=Intensity())
        return to_unit_range(sample.read(case.images), np.array(limits), clip=True)


def resampling_notes(source: Source, preprocessing: Preprocessing, size: Sequence[int]) -> list[str]:
    """Notes on volumes that are not on the grid already."""
    geometries = [ras_geometry(case.images[0]) for case in source.cases]
    notes, total, spacing = [], len(geometries), preprocessing.spacing
    other = [mm for _, mm in geometries if not np.allclose(mm, spacing, rtol=1e-3, atol=0)]
    if other:
        kinds = few(sorted({" x ".join(f"{side:.3g}" for side in mm) for mm in other}), 3)
        notes.append(
            f"{source.name}: {len(other)} of {total} volumes have another spacing ({kinds} mm) and were "
            "resampled."
        )
    if fitted := sum(any(size_at(*geometry, spacing) != size) for geometry in geometries):
        notes.append(
            f"{source.name}: {fitted} of {total} volumes have another size and were cropped or padded."
        )
    return notes


def volumes_of(source: Source, read: Reader, run: Run) -> Iterator[tuple[Case, torch.Tensor]]:
    """The volumes of a group; those that cannot be read go to `source.left_out`.

    The order is random but depends on their number alone: neighbours in a folder may be scans of one subject,
    and MS-SSIM is taken of neighbours.

    Raises:
        UserError: none can be read.
    """
    order = torch.randperm(len(source.cases), generator=stream(0, "evaluation", source.name)).tolist()
    for i in progress_bar(run, source.name, items=order, unit="volume"):
        case = source.cases[i]
        try:
            volume = read(case)
        except UserError as error:
            source.left_out[case.name] = str(error)
            continue
        yield case, volume
    if len(source.left_out) == len(source.cases):
        raise UserError(
            f"{source.folder}: no {source.name} volume can be used. {next(iter(source.left_out.values()))}"
        )


@torch.inference_mode()
def read_groups(
    sources: dict[str, Source],
    read: Reader,
    networks: dict[str, Callable],
    encoder: Autoencoder | None,
    classifier: Callable | None,
    run: Run,
    structures: dict[str, Callable] | None = None,
) -> tuple[Comparison, dict[str, list[tuple[str, np.ndarray]]]]:
    """Read all volumes once (for the 2.5D distance twice).

    Args:
        networks: feature networks by name.
        classifier: a network (1, C, D, H, W) -> (1, classes), or None.
        structures: as of `VolumeGroup`.

    Returns:
        The groups, and of each a few examples for the report: (name, (D, H, W)).
    """
    spectrum = RadialSpectrum(read.size)
    degraded = DegradedScans(networks, encoder.reconstruct if encoder else None, read.labels)
    groups, examples = {}, {}
    reference = TRAINING if TRAINING in sources else HELD_OUT
    for name, source in sources.items():
        chosen = set(sorted(case.name for case in source.cases)[:EXAMPLES])
        spacing, count = read.preprocessing.spacing, len(source.cases)
        group = groups[name] = VolumeGroup(
            name, networks, spectrum, spacing, count, classifier, structures, read.labels
        )
        examples[name] = []
        for number, (case, volume) in enumerate(volumes_of(source, read, run)):
            in_reference = name == reference and (name == TRAINING or number % 2 == 0)
            if in_reference and degraded.count < MAX_DEGRADED:
                degraded.add(volume)
            if name == HELD_OUT and encoder:
                group.add_reconstruction(encoder.reconstruct(volume), volume)
            group.add(case.name, volume, case.subject)
            if case.name in chosen:
                examples[name].append((case.name, volume[0, 0].cpu().numpy()))
        examples[name].sort(key=lambda example: example[0])
    comparison = Comparison(groups[HELD_OUT], groups[GENERATED], groups.get(TRAINING), degraded)
    if RADIMAGENET in networks:  # the number of volumes on each side is known only now
        for side, (group, indices) in comparison.sides.items():
            cases = {case.name: case for case in sources[group.name].cases}
            for i in progress_bar(run, f"slices of {group.name}", items=indices, unit="volume"):
                comparison.add_slices(side, read(cases[group.names[i]]))
    return comparison, examples
