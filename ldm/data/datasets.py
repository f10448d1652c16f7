"""The cases of a data set, and their volumes as a loader serves them."""

import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ldm.data.augmentation import augmentation
from ldm.data.cases import Case
from ldm.data.labels import with_label
from ldm.data.preprocessing import Preprocessing, crop_or_pad
from ldm.system.files import write_array
from ldm.system.messages import print_and_log

LEFT_BEHIND = 24 * 3600  # seconds without a change, after which a partial file is of a killed process


def stream(seed: int, *what: object) -> torch.Generator:
    """A CPU random generator that is a function of the seed and of its purpose alone.

    Posterior noise, noise and time of a case use `stream(seed, purpose, epoch, case)`, crop and augmentation
    the version that the epoch has (`version_of`), so that they depend on no worker, rank or batch.
    """
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def version_of(seed: int, epoch: int, case: str, versions: int | None) -> int:
    """The random version of a case in an epoch: a new one each epoch (`versions` None), or one of `versions`
    in turn, from a start that depends on the case."""
    if versions is None:
        return epoch
    return (stream(seed, "version", case).initial_seed() + epoch) % versions


def augmentation_rng(seed: int, version: int, case: str) -> np.random.RandomState:
    """The random numbers of a version of a case."""
    return np.random.RandomState(stream(seed, "augment", version, case).initial_seed() % 2**32)


class VolumeDataset(Dataset):
    """Preprocessed volumes of a list of cases, cropped or padded, augmented where asked. Their channels are
    those of the image, then those of the label, where `preprocessing` has labels.

    The key of an item is `(epoch, i)`, as `EpochSampler` gives it; the item is `{"image": (C, D, H, W)
    float32, "epoch": int, "index": int}`. Its random part is a function of (seed, epoch, case), by the
    version that the epoch has (`version_of`).

    Args:
        size: voxels of the crop; smaller volumes are padded.
        random_crop: crop at a random place, else about the centre.
        augment: the `augment` section of the config, or None.
        cache_dir: folder of preprocessed volumes, memory-mapped, which all processes of a machine share.
        cache_rate: share of the cases that are cached.
        seed: seed of crops and augmentation.
        find_slices: items also hold `slices`, see `filled_slices`.
        own_sizes: crop or pad each case to its own `size`, where it has one.
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
        find_slices: bool = False,
        own_sizes: bool = False,
    ):
        self.cases, self.preprocessing, self.size, self.seed = list(cases), preprocessing, tuple(size), seed
        self.own_sizes = own_sizes
        self.augmentation = augmentation(augment or {}, self.size, random_crop, len(preprocessing.channels))
        self._versions = augment.get("versions") if augment else None
        self.foreground = bool(random_crop and augment and augment["foreground_prob"])
        self.find_slices = find_slices
        self.cache_dir = cache_dir
        self.cached = round(cache_rate * len(self.cases)) if cache_dir else 0
        self.cache_is_writable = True  # after an error of the disk, the cache is only read
        if self.cached:
            _clear_left_behind(cache_dir)

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def versions(self) -> int | None:
        """How many versions of a volume the epochs go through; None: each epoch has its own."""
        return 1 if self.augmentation is None else self._versions

    def labels_alone(self, values: Sequence[int]) -> "VolumeDataset":
        """The channels of these labels without the images, cropped and augmented as they are."""
        alone = copy.copy(self)
        alone.preprocessing = replace(self.preprocessing, channels=(), labels=tuple(values), notes=False)
        alone.cached = 0  # a mask is made once
        if self.augmentation:
            alone.augmentation = replace(self.augmentation, image_channels=0)
        return alone

    def size_of(self, i: int) -> tuple[int, ...]:
        """Voxels of case `i` as it is served."""
        return (self.cases[i].size if self.own_sizes else None) or self.size

    def _preprocessing_of(self, case: Case) -> Preprocessing:
        return replace(self.preprocessing, spacing=case.spacing) if case.spacing else self.preprocessing

    def volume(self, i: int) -> np.ndarray:
        """The whole normalised volume of case `i`, (C, D, H, W) float32, from the cache if it is there."""
        labels, image = self.preprocessing.labels, None
        if self.preprocessing.channels:
            image = self._cached(i, "image", lambda case: self._preprocessing_of(case)(case.images))
        if not labels:
            return image
        label = self._cached(
            i, f"labels {labels}", lambda case: self._preprocessing_of(case).label_channels(case.label)
        )
        return label if image is None else with_label(image, label, self.cases[i])

    def _label(self, i: int) -> np.ndarray | None:
        if self.cases[i].label is None:
            return None
        return self._cached(i, "label", lambda case: self._preprocessing_of(case).label(case.label))

    def _cached(self, i: int, kind: str, make: Callable[[Case], np.ndarray]) -> np.ndarray:
        """What `make` gives for case `i`, from the cache where it is there; `kind` is "image", or a form of
        the label."""
        case = self.cases[i]
        if i >= self.cached:
            return make(case)
        files = case.images if kind == "image" else (case.label,)
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        made_by = self._preprocessing_of(case).key
        key = hashlib.sha256(repr((kind, facts, made_by)).encode()).hexdigest()[:32]
        path = self.cache_dir / f"{key}.npy"
        if path.is_file():
            try:
                return np.load(path, mmap_mode="c")  # torch wants it writable; it is never written
            except (OSError, ValueError, EOFError) as error:
                print_and_log(f"warning: {path}: this cached volume is damaged ({error}) and is made again")
        volume = make(case)
        if self.cache_is_writable:
            self.cache_dir.mkdir(parents=True, exist_ok=True)  # a file in its place is an error
            try:
                write_array(path, volume)
            except OSError as error:
                self.cache_is_writable = False
                reason = error.__context__ or error
                print_and_log(
                    f"warning: {self.cache_dir}: the cache cannot be written ({reason.strerror or reason}). "
                    "Volumes that are not in it are read from their files in each epoch, which is slower. "
                    "Free space, choose another cache_dir, or set data.cache_rate to 0"
                )
        return volume

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        image = self.image(i, version_of(self.seed, epoch, self.cases[i].name, self.versions))
        slices = {"slices": filled_slices(image)} if self.find_slices else {}
        return {"image": image, "epoch": epoch, "index": i, **slices}

    def image(self, i: int, version: int) -> torch.Tensor:
        """A version of case `i`, (C, *size) float32."""
        volume, size = self.volume(i), self.size_of(i)
        if self.augmentation is None:
            return torch.from_numpy(np.array(crop_or_pad(volume, size)))
        rng = augmentation_rng(self.seed, version, self.cases[i].name)
        augment = replace(self.augmentation, size=size)
        return augment(volume, self._label(i) if self.foreground else None, rng)


def filled_slices(volume: torch.Tensor) -> torch.Tensor:
    """The first axial slice of a volume (C, D, H, W) that holds something above 0, and the one after the
    last, (2,) int64. All slices, where the volume is empty."""
    filled = (volume > 0).flatten(0, 2).any(0).nonzero()
    return torch.tensor([filled[0], filled[-1] + 1] if len(filled) else [0, volume.shape[-1]])


def among(item: dict) -> slice:
    """The slices of an item to train on: those that its `slices` name, else all."""
    return slice(*item["slices"].tolist()) if "slices" in item else slice(None)


class SliceWindows(Dataset):
    """Some neighbouring slices of each volume, for 2D networks: at a random place among those that an item's
    `slices` name, else among all. The place is a function of (seed, epoch, case).

    The items are those of `dataset`, of whose volumes `count` slices are left; `start` is the first of them.

    Args:
        dataset: has `cases`, `versions`, and keys `(epoch, i)`.
    """

    def __init__(self, dataset: Dataset, count: int, seed: int):
        self.dataset, self.cases, self.count, self.seed = dataset, dataset.cases, count, seed

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def versions(self) -> int | None:
        """As of `dataset`."""
        return self.dataset.versions

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        item = self.dataset[key]
        volumes = {name: item[name] for name in ("image", "mean", "std") if name in item}
        depth = next(iter(volumes.values())).shape[-1]
        first, end, _ = among(item).indices(depth)
        first = min(first, depth - self.count)
        places = max(1, end - self.count - first + 1)
        generator = stream(self.seed, "window", epoch, self.cases[i].name)
        start = first + int(torch.randint(places, (), generator=generator))
        item.pop("slices", None)
        cut = {name: volume[..., start : start + self.count] for name, volume in volumes.items()}
        return {**item, **cut, "start": start}


class WithDraws(Dataset):
    """A data set whose items also hold random draws: functions of (seed, epoch, case), which the loader's
    processes make.

    Args:
        dataset: has `cases`, and keys `(epoch, i)`.
        shape: of the latents, (c, d, h, w).
        shapes: of the latents of each case, where they differ.
    """

    purpose: str  # of `stream`

    def __init__(
        self,
        dataset: Dataset,
        shape: Sequence[int],
        seed: int,
        shapes: Sequence[Sequence[int]] | None = None,
    ):
        self.dataset, self.cases, self.shape, self.seed = dataset, dataset.cases, tuple(shape), seed
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.dataset)

    def draw(self, generator: torch.Generator, case: Case, shape: Sequence[int]) -> dict:
        """The draws of one item, whose latents have this shape."""
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        case = self.cases[i]
        generator = stream(self.seed, self.purpose, epoch, case.name)
        shape = self.shape if self.shapes is None else self.shapes[i]
        return {**self.dataset[key], **self.draw(generator, case, shape)}


def _clear_left_behind(cache_dir: Path) -> None:
    """Delete the partial files of killed processes. Runs share the folder: a file that has just changed may
    be another run's, which is writing it."""
    for part in cache_dir.glob(".*.npy.*.part"):
        try:
            if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                part.unlink()
        except FileNotFoundError:
            continue  # another run has completed or deleted it


class EpochSampler(Sampler):
    """Order of the cases: a function of (seed, epoch), distributed over the ranks.

    Batch `b` of rank `r` of `w` holds entries `[(b * w + r) * n, (b * w + r + 1) * n)` of the epoch's order,
    so that `w` ranks with batches of `n` together see what one rank with batches of `w * n` sees. An epoch is
    a whole number of steps, each of `accumulate` batches; the last is filled up from the start of the order.

    With `groups`, such as the shape of each case, the batches of all ranks together hold cases of one group.
    Each group is filled up to whole batches from its own start; the order of the batches is a function of
    (seed, epoch) too.

    Set `epoch` before each epoch, and `first`, the first batch, after a resume in the middle of an epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulate: int = 1,
        groups: Sequence | None = None,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.groups = [tuple(one) for one in groups] if groups else [()] * length
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        together = self.batch_size * self.world_size
        batches = sum(-(-count // together) for count in Counter(self.groups).values())
        return -(-batches // self.accumulate) * self.accumulate

    def copies(self) -> int:
        """How many places in an epoch's batches hold a case again, since its group does not fill them."""
        if len(set(self.groups)) == 1:
            return 0
        together = self.batch_size * self.world_size
        return sum(-count % together for count in Counter(self.groups).values())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=stream(self.seed, "order", self.epoch)).tolist()
        order = self._in_groups(order) if len(set(self.groups)) > 1 else order
        together = self.batch_size * self.world_size
        for b in range(self.first, len(self)):
            first = b * together + self.rank * self.batch_size
            yield [(self.epoch, order[i % len(order)]) for i in range(first, first + self.batch_size)]

    def _in_groups(self, order: Sequence[int]) -> list[int]:
        """The order with whole batches of each group, filled up, in an order of their own."""
        together, members = self.batch_size * self.world_size, {}
        for i in order:
            members.setdefault(self.groups[i], []).append(i)
        batches = []
        for some in members.values():
            filled = [some[k % len(some)] for k in range(-(-len(some) // together) * together)]
            batches += [filled[k : k + together] for k in range(0, len(filled), together)]
        places = torch.randperm(len(batches), generator=stream(self.seed, "batches", self.epoch)).tolist()
        return [i for place in places for i in batches[place]]
