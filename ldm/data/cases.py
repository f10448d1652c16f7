"""Cases of a data set, and their spacing and size by their headers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ldm.data.preprocessing import Preprocessing
from ldm.data.reading import ras_geometry

PARTS = ("training", "validation")  # of a data set, in lists and split.json
TYPICAL_CASES = 16


@dataclass(frozen=True)
class Case:
    """One volume of a data set.

    `images` is one file (3D, or 4D with the channels last) or one file a channel; `subject` groups the scans
    that must stay on one side of the split; `covariates` are its row of `participants.tsv` and the other
    keys of its entry in a list, whose `fold` is kept apart. `spacing` in mm and `size` in voxels are those
    that its volume is brought to, where cases differ (`ldm.data.extent.with_own_extent`). A label map without
    an image is both: `images` holds the file of `label`. `embedding` are its latents, where others have
    encoded them; without an image, `images` holds that file.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    subject: str = ""
    covariates: dict = field(default_factory=dict, compare=False)
    fold: int | None = field(default=None, compare=False)
    spacing: tuple[float, ...] | None = field(default=None, compare=False)
    size: tuple[int, ...] | None = field(default=None, compare=False)
    embedding: Path | None = field(default=None, compare=False)

    @property
    def is_label_map(self) -> bool:
        """Whether it is a label map without an image."""
        return self.images == (self.label,)

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding without an image."""
        return self.images == (self.embedding,)


def own_geometry(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Shape and voxel size in mm along right, anterior and superior: of the image, by its header alone; of an
    embedding those of the image, by its entry in the list."""
    if not case.is_embedding:
        return ras_geometry(case.images[0])
    return np.array(case.covariates["dim"]), np.array(case.covariates["spacing"], float)


def choose_spacing(cases: Sequence[Case], longest_side: int | None) -> list[float]:
    """The first case's own spacing in mm; or, isotropic, the whole multiple of its finest spacing at which
    its longest side has about `longest_side` voxels."""
    shape, sizes = own_geometry(cases[0])
    if longest_side is None:
        return [rounded(size) for size in sizes]
    factor = max(1, round(float((shape * sizes).max()) / (longest_side * sizes.min())))
    return [rounded(sizes.min() * factor)] * 3


def rounded(size: float) -> float:
    """A voxel size in mm to 4 decimals, and to at least 4 digits: headers store float32."""
    return round(float(size), max(4, 3 - math.floor(math.log10(size))))


def volume_size(cases: Sequence[Case], spacing: Sequence[float], divisor: int | Sequence[int]) -> list[int]:
    """The size in voxels that holds every case at `spacing`, rounded up to a multiple of `divisor`, or
    along each axis of its own; only headers are read. Cases with a spacing of their own have that."""
    sizes = [size_at(*own_geometry(case), case.spacing or spacing) for case in cases]
    largest = np.max(sizes, axis=0)
    divisors = np.broadcast_to(divisor, len(largest)).tolist()
    return [int(math.ceil(side / n) * n) for side, n in zip(largest, divisors, strict=True)]


def size_at(shape: np.ndarray, sizes: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """The size at `spacing` of a volume of this shape and these voxel sizes in mm. Lengths count from the
    centre of the first voxel to that of the last, as in MONAI's `Spacing`."""
    return np.round((shape - 1) * sizes / spacing + 1)


def warn_of_padding(
    cases: Sequence[Case], spacing: Sequence[float], size: Sequence[int], log: Callable
) -> None:
    """Print one line on volumes that are smaller than the patch, and so are padded."""
    small = [case.name for case in cases if any(np.less(volume_size([case], spacing, 1), size))]
    if small:
        log(
            f"data: {len(small)} of {len(cases)} volumes are smaller than {list(size)} and are padded "
            f"with background ({small[0]}, ...)"
        )


def typical_limits(preprocessing: Preprocessing, cases: Sequence[Case]) -> list[list[float]]:
    """The intensities that become 0 and 1, (C, 2): the median over the first `TYPICAL_CASES` cases. Without
    channels of an image there are none."""
    if not preprocessing.channels:
        return []
    found = [
        replace(preprocessing, spacing=case.spacing or preprocessing.spacing).limits(case.images)
        for case in cases[:TYPICAL_CASES]
    ]
    return np.median(found, axis=0).tolist()
