"""The masks that samples follow: taken in turn or found by the sizes of structures, deformed, with labels
moved. All that is random is a function of the sample's seed."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.signal import fftconvolve
from scipy.spatial.transform import Rotation

from ldm import UserError
from ldm.data.datasets import stream
from ldm.data.labels import sizes_in_file
from ldm.data.reading import ras_geometry
from ldm.diffusion.covariates import shares_of
from ldm.generation import Networks, read_mask

TRIES = 20  # of a deformation
LARGEST_CHANGE = 1.5  # of the size of a label, by a deformation
DEGREES, SCALE = 5.0, 0.05  # of a deformation's affine part, about each axis and along it
ELASTIC_MM, SMOOTH_MM = 3.0, 16.0  # standard deviation of its displacement, and of the filter of this


@dataclass(frozen=True)
class GivenMask:
    """A mask on the grid of the volumes, (D, H, W), and its file; the sizes in ml of structures in it;
    what was done to it, as the record of a sample has it."""

    path: Path
    voxels: torch.Tensor
    sizes: dict[str, float]
    changes: dict


# ---------------------------------------------------------------- found by sizes


def distance(
    shares: dict[str, float], asked: dict[str, float], fov: np.ndarray, size: np.ndarray, spacing: np.ndarray
) -> float:
    """How far a mask is from what is asked for: by the shares of structures' sizes, and by field of view
    (/ 10 mm), voxels (/ 100) and spacing (/ mm), which NVIDIA's MAISI chooses by, their mean over the axes.

    Args:
        shares, asked: by structure, 0 to 1.
        fov, size, spacing: differences along the axes, (3,) each.
    """
    grid = np.abs(fov) / 10 + np.abs(size) / 100 + np.abs(spacing)
    return sum(abs(shares[name] - share) for name, share in asked.items()) + float(grid.mean())


class MaskSearch:
    """Masks of a folder, by what they are like.

    Args:
        paths: of the masks.
        structures: values of labels by name.
        ranges: of their sizes in ml, which become 0 and 1; where one is missing, that of the masks.
        geometry: `size` and `spacing` of the volumes.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        structures: dict[str, Sequence[int]],
        ranges: dict[str, Sequence[float]],
        geometry: dict,
    ):
        self.paths, self.sizes = list(paths), [sizes_in_file(path, structures) for path in paths]
        self.shares = [{} for _ in paths]
        for name in structures:
            found = [sizes[name] for sizes in self.sizes]
            low, high = ranges.get(name, (min(found), max(found)))
            for shares, ml in zip(self.shares, found, strict=True):
                shares[name] = (ml - low) / (high - low) if high > low else 0.0
        size, spacing = (np.array(geometry[key], float) for key in ("size", "spacing"))
        self.apart = []
        for path in paths:
            own_size, own_spacing = ras_geometry(path)
            fov = own_size * own_spacing - size * spacing
            self.apart.append((fov, own_size - size, own_spacing - spacing))
        self._left: list[int] = []

    def closest(self, asked: dict[str, float]) -> Path:
        """The closest of the masks that were not taken yet; once all were, of all again."""
        self._left = self._left or list(range(len(self.paths)))
        best = min(self._left, key=lambda i: distance(self.shares[i], asked, *self.apart[i]))
        self._left.remove(best)
        return self.paths[best]


# ---------------------------------------------------------------- changed


def deformed(mask: np.ndarray, spacing: Sequence[float], rng: np.random.Generator, where: str) -> np.ndarray:
    """A mask (D, H, W) under a small rotation, scaling and elastic deformation that keeps every label, at a
    size that differs by a factor of less than `LARGEST_CHANGE`.

    Each label is resampled as an indicator, and the largest share of a voxel wins.

    Args:
        spacing: in mm.
        where: the mask, for the message.

    Raises:
        UserError: none of `TRIES` deformations kept them.
    """
    values, counts = np.unique(mask, return_counts=True)
    middle = (np.array(mask.shape) - 1) / 2
    places = np.stack(np.meshgrid(*map(np.arange, mask.shape), indexing="ij")) - middle[:, None, None, None]
    mm = np.array(spacing, float)
    for _ in range(TRIES):
        turn = Rotation.from_euler("xyz", rng.uniform(-DEGREES, DEGREES, 3), degrees=True).as_matrix()
        affine = turn @ np.diag(rng.uniform(1 - SCALE, 1 + SCALE, 3))
        affine = np.diag(1 / mm) @ affine @ np.diag(mm)
        moved = np.tensordot(affine, places, 1) + middle[:, None, None, None]
        for axis in range(3):
            field = ndimage.gaussian_filter(rng.standard_normal(mask.shape), SMOOTH_MM / mm)
            moved[axis] += field / field.std() * ELASTIC_MM / mm[axis]
        best, result = np.full(mask.shape, -1.0), np.zeros_like(mask)
        for value in values:
            outside = float(value == 0)
            indicator = (mask == value).astype(np.float32)
            share = ndimage.map_coordinates(indicator, moved, order=1, cval=outside)
            larger = share > best
            result[larger], best = value, np.maximum(best, share)
        now = np.array([np.count_nonzero(result == value) for value in values])
        change = np.maximum(now, 1) / counts
        inside = values > 0
        if (now > 0).all() and (np.maximum(change, 1 / change)[inside] < LARGEST_CHANGE).all():
            return result
    raise UserError(
        f"{where}: none of {TRIES} deformations kept all its labels at about their sizes. Leave out "
        "--augment-masks for it."
    )


def moved_within(
    mask: np.ndarray, labels: Sequence[int], within: int, rng: np.random.Generator, where: str
) -> np.ndarray:
    """A mask (D, H, W) whose voxels of some labels, together and possibly mirrored, lie elsewhere in another
    label, which takes their former place.

    All places in which they lie wholly within it are found by a convolution, and one of them is drawn.

    Raises:
        UserError: a label is missing, or there is no such place.
    """
    part = np.isin(mask, labels)
    for name, found in ((labels, part), ([within], mask == within)):
        if not found.any():
            raise UserError(f"{where}: --move: has no voxel of {' or '.join(map(str, name))}.")
    both = part | (mask == within)
    box, room = (ndimage.find_objects(one.astype(np.uint8))[0] for one in (part, both))
    emptied = np.where(part, np.array(within, mask.dtype), mask)
    inside, start = emptied[room] == within, [here.start for here in room]
    before = tuple(here.start - first for here, first in zip(box, start, strict=True))
    forms = list(itertools.product((1, -1), repeat=3))
    for form in (forms[i] for i in rng.permutation(len(forms))):
        mirror = tuple(slice(None, None, step) for step in form)
        shape, values = part[box][mirror], mask[box][mirror]
        overlap = fftconvolve(inside.astype(float), shape[::-1, ::-1, ::-1].astype(float), mode="valid")
        places = np.argwhere(overlap > shape.sum() - 0.5)
        places = places[(places != before).any(1)]
        if len(places):
            corner = places[rng.integers(len(places))] + start
            there = tuple(slice(a, a + n) for a, n in zip(corner, shape.shape, strict=True))
            result = emptied.copy()
            result[there][shape] = values[shape]
            return result
    raise UserError(
        f"{where}: --move: labels {', '.join(map(str, labels))} fit nowhere else within label {within}."
    )


def parse_move(text: str) -> tuple[tuple[int, ...], int]:
    """The labels of `--move 5,6:2`, and the one within which they move. Raises UserError: another form."""
    if not re.fullmatch(r"\d{1,5}(,\d{1,5})*:\d{1,5}", text):
        raise UserError(f"--move {text}: expected LABEL:WITHIN, such as 5:2, or 5,6:2 for several together.")
    labels, _, within = text.partition(":")
    return tuple(map(int, labels.split(","))), int(within)


# ---------------------------------------------------------------- of samples


class MaskSource:
    """The masks of samples, in the order of their seeds.

    Args:
        paths: of masks.
        networks: with a ControlNet.
        structures: values of labels by name, whose sizes the model may be conditioned on.
        asked: texts of `--structure-size`; the closest masks are taken. Else each in turn.
        augment: deform each mask.
        move: the text of `--move`, or None.
        log: prints a line.

    Raises:
        UserError: a mask cannot be read, or what is asked for does not fit.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        networks: Networks,
        structures: dict[str, Sequence[int]],
        asked: Sequence[str],
        augment: bool,
        move: str | None,
        log: Callable[[str], None],
    ):
        self.paths, self.networks, self.structures, self.log = list(paths), networks, structures, log
        self.augment, self.move = augment, move and parse_move(move)
        self.changes = {**({"augmented": True} if augment else {}), **({"moved": move} if move else {})}
        self._read: dict[Path, torch.Tensor] = {}
        self._taken, self.search = 0, None
        self.asked = self._parsed(asked)
        if self.asked:
            if len(paths) < 2:
                raise UserError("--structure-size: chooses among masks. Name a folder of them by --mask.")
            known = {**structures, **{name: [int(name)] for name in self.asked if name not in structures}}
            covariates = networks.conditions.covariates
            ranges = {name: covariates.columns[name] for name in structures} if covariates else {}
            self.search = MaskSearch(paths, known, ranges, networks.geometry)

    def _parsed(self, texts: Sequence[str]) -> dict[str, list[float]]:
        asked = {}
        for text in texts:
            name, equals, share = text.rpartition("=")
            if (
                not equals
                or name in asked
                or not (name in self.structures or re.fullmatch("[0-9]{1,4}", name))
            ):
                known = " or ".join([*self.structures, "the value of a label, such as 3"])
                raise UserError(f"--structure-size {text}: expected NAME=SHARE, NAME being {known}.")
            asked[name] = shares_of(name, share)
        return asked

    def __call__(self, seed: int) -> GivenMask:
        """The next mask, for the sample of this seed."""
        if self.search:
            place = stream(seed, "structure sizes")
            draws = {name: float(torch.rand((), generator=place)) for name in self.asked}
            shares = {n: ends[0] + draws[n] * (ends[-1] - ends[0]) for n, ends in self.asked.items()}
            path = self.search.closest(shares)
            found = self.search.shares[self.paths.index(path)]
            about = ", ".join(f"{name} {found[name]:.2f} (asked for {shares[name]:.2f})" for name in shares)
            self.log(f"mask of seed {seed}: {path.name}, {about}")
        else:
            path = self.paths[self._taken % len(self.paths)]
        self._taken += 1
        if path not in self._read:
            self._read[path], note = read_mask(path, self.networks)
            if note:
                self.log(f"warning: {note}")
        before = self._read[path]
        mask, rng = before.numpy(), np.random.default_rng(stream(seed, "mask").initial_seed())
        if self.augment:
            mask = deformed(mask, self.networks.geometry["spacing"], rng, str(path))
        if self.move:
            mask = moved_within(mask, *self.move, rng, str(path))
        return GivenMask(path, torch.from_numpy(mask), self._sizes(path, before.numpy(), mask), self.changes)

    def _sizes(self, path: Path, before: np.ndarray, mask: np.ndarray) -> dict[str, float]:
        """As in the file, times what the changes made of them on the grid."""
        sizes = sizes_in_file(path, self.structures)
        for name, values in self.structures.items():
            then, now = (np.isin(one, values).sum() for one in (before, mask))
            sizes[name] = float(f"{sizes[name] * now / then:.6g}") if then else 0.0
        return sizes
