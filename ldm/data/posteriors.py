"""Posteriors of the volumes that stage 2 trains on: a data set of them, and how they are encoded."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.cases import Case
from ldm.data.datasets import VolumeDataset, filled_slices, version_of
from ldm.data.embeddings import read_embedding
from ldm.models.autoencoder import Autoencoder
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run, without_tf32
from ldm.system.signals import leave_signals_to_the_main_process


class Posteriors(Dataset):
    """Posterior mean and std of each version of each volume.

    The key of an item is `(epoch, i)`; the item is `{"mean", "std": (c, d, h, w) float32, "epoch": int,
    "index": int}`, of the version that the epoch has of that case.

    Args:
        cases: one for each entry.
        entries: (versions, 2, c, d, h, w) of each case, mean before std: their files, which are read
            memory-mapped; or one tensor of all, or parts of one for each size of the volumes, which loader
            processes share, however they are started.
        seed: seed of the order of versions.
        slices: (cases, versions, 2), of each version what `filled_slices` gives, which items then hold too.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        entries: Sequence[Path] | Sequence[torch.Tensor] | torch.Tensor,
        seed: int,
        slices: torch.Tensor | None = None,
    ):
        self.cases, self.entries, self.seed, self.slices = list(cases), entries, seed, slices

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def versions(self) -> int:
        """How many versions of a volume the epochs go through."""
        return len(self._entry(0))

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        entry = self._entry(i)
        version = version_of(self.seed, epoch, self.cases[i].name, len(entry))
        mean, std = entry[version]
        slices = {} if self.slices is None else {"slices": self.slices[i, version]}
        return {"mean": mean, "std": std, "epoch": epoch, "index": i, **slices}

    def _entry(self, i: int) -> torch.Tensor:
        entry = self.entries[i]
        if isinstance(entry, Path):
            entry = torch.from_numpy(np.load(entry, mmap_mode="c"))  # writable, as torch wants it
        return entry


class _Versions(Dataset):
    """The versions of some volumes, one after the other."""

    def __init__(self, volumes: VolumeDataset, cases: Iterable[int]):
        self.volumes = volumes
        self.pairs = [(i, version) for i in cases for version in range(volumes.versions)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> tuple[int, int, torch.Tensor]:
        i, version = self.pairs[k]
        return i, version, self.volumes.image(i, version)


@torch.no_grad()
def encode(
    encoder: Autoencoder, volumes: VolumeDataset, cases: Sequence[int], run: Run, workers: int, what: str
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Encode all versions of some volumes, without autocast and TF32: what is kept is read in every epoch.
    Those with an embedding come first, as they are, with a std of 0.

    Args:
        cases: their indices.
        workers: loader processes.
        what: the name of the progress bar.

    Yields:
        The index of each; (versions, 2, c, d, h, w) float32 on the CPU, mean before std; and the
        `filled_slices` of each version, (versions, 2).
    """
    embedded = [i for i in cases if volumes.cases[i].embedding]
    for i in embedded:
        yield i, read_embedding(volumes.cases[i]), torch.zeros(1, 2, dtype=torch.long)
    loader = DataLoader(
        _Versions(volumes, [i for i in cases if i not in {*embedded}]),
        batch_size=None,
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )
    versions, slices = [], []
    for i, version, image in progress_bar(run, what, items=loader, unit="volume"):
        with without_tf32():
            mean, std = encoder.encode(image[None].to(run.device, non_blocking=True))
        versions.append(torch.stack([mean[0], std[0]]).cpu())
        slices.append(filled_slices(image))
        if version + 1 == volumes.versions:
            yield i, torch.stack(versions), torch.stack(slices)
            versions, slices = [], []


def encode_all(encoder: Autoencoder, volumes: VolumeDataset, run: Run, workers: int, what: str) -> Posteriors:
    """Encode all versions of each volume, each rank its share of the volumes; every rank gets all
    posteriors."""
    groups = rows_by_size(volumes)
    rows = {i: row for members in groups.values() for row, i in enumerate(members)}
    mine = [i for members in groups.values() for i in members[run.rank :: run.world_size]]
    stacks, slices = {}, torch.zeros(len(volumes), volumes.versions, 2, dtype=torch.long)
    for i, entry, filled in encode(encoder, volumes, mine, run, workers, what):
        size = volumes.size_of(i)
        if size not in stacks:
            stacks[size] = torch.empty(len(groups[size]), *entry.shape)
        stacks[size][rows[i]], slices[i] = entry, filled
    shapes = {}
    for part in run.gather({size: [*stack.shape] for size, stack in stacks.items()}):
        shapes |= part
    for size in groups:  # on every rank in the same order
        if size not in stacks:  # fewer volumes than ranks
            stacks[size] = torch.empty(shapes[size])
        run.broadcast_rows(stacks[size])
    if len(stacks) == 1:
        (entries,) = stacks.values()
    else:
        entries = [stacks[volumes.size_of(i)][rows[i]] for i in range(len(volumes))]
    slices = run.sum(slices) if volumes.find_slices else None  # of each rank, 0 but in its own rows
    return Posteriors(volumes.cases, entries, volumes.seed, slices)


def rows_by_size(volumes: VolumeDataset) -> dict[tuple[int, ...], list[int]]:
    """The indices of the volumes of each size, in order."""
    groups = {}
    for i in range(len(volumes)):
        groups.setdefault(volumes.size_of(i), []).append(i)
    return groups
