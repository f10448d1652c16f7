"""Spacing, sizes and downsampling, by the rules of nnU-Net (Isensee et al., 2021).

Strides are lists, one for each level after the first, of a 2 along the axes that the level halves, else a 1.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ldm.data.cases import rounded

ANISOTROPY = 3  # spacing and number of voxels of the worst axis against the others
SMALLEST_LATENT = 4  # voxels along a side of the UNet's coarsest grid
MOST_PADDING = 1.25  # of the voxels of the volumes, for a further level of the UNet


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[list[float], str]:
    """nnU-Net's rule: the median along each axis; but the 10th percentile along an axis of thick slices.

    Args:
        spacings: in mm, (N, 3).
        shapes: in voxels, (N, 3).
    """
    spacing, why = np.median(spacings, axis=0), "the median of the volumes along each axis"
    size = np.median(shapes, axis=0)
    worst = int(spacing.argmax())
    others = [axis for axis in range(3) if axis != worst]
    thick = spacing[worst] > ANISOTROPY * spacing[others].max()
    if thick and size[worst] * ANISOTROPY < size[others].min():
        finer = max(np.percentile(spacings[:, worst], 10), spacing[others].max())
        why += f"; along axis {worst}, of thick slices, the 10th percentile"
        spacing[worst] = finer
    return [rounded(side) for side in spacing], why


def coarser(spacing: Sequence[float], size: Sequence[int], most: float) -> list[float]:
    """The spacing at which a volume has at most so many voxels: the finest axes become coarser first."""
    spacing, lengths = np.array(spacing, float), np.array(spacing) * size
    low, high = spacing.min(), lengths.max()
    for _ in range(40):  # halving
        middle = (low + high) / 2
        too_many = (lengths / np.maximum(spacing, middle)).prod() > most
        low, high = (middle, high) if too_many else (low, middle)
    return [rounded(side) for side in np.maximum(spacing, math.ceil(high * 100) / 100)]


def strides_for(spacing: Sequence[float], size: Sequence[int], levels: int) -> list[list[int]]:
    """For each level after the first, 2 along the axes that it halves: of those with at least
    2 * `SMALLEST_LATENT` voxels the ones whose voxels are less than twice as long as the shortest; else 1."""
    spacing, size, strides = np.array(spacing, float), np.array(size), []
    for _ in range(levels):
        large = size >= 2 * SMALLEST_LATENT  # axes that can be halved; the others do not hold them up
        finest = spacing[large].min() if large.any() else 0
        strides.append(np.where(large & (spacing < 2 * finest), 2, 1).tolist())
        spacing, size = spacing * strides[-1], -(-size // strides[-1])
    return strides


def padded(size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """A size rounded up to what the strides divide."""
    divisor = [math.prod(axis) for axis in zip(*strides, strict=True)] if strides else [1] * len(size)
    return [int(-(-side // step) * step) for side, step in zip(size, divisor, strict=True)]


def unet_strides(spacing: Sequence[float], size: Sequence[int], first: list, most: int) -> list[list[int]]:
    """Strides of the UNet behind those of the autoencoder: as many levels, up to `most`, as keep a side of
    `SMALLEST_LATENT` and pad the volumes by at most a quarter."""
    factor = np.prod([[1] * len(size), *first], axis=0)
    latent = np.array(padded(size, first)) // factor
    every = strides_for(np.array(spacing) * factor, latent, most)
    every = list(itertools.takewhile(lambda level: 2 in level, every))
    count = len(every)
    while count and math.prod(padded(size, first + every[:count])) > MOST_PADDING * math.prod(
        padded(size, first)
    ):
        count -= 1
    return every[: max(count, min(1, len(every)))]


def grids_of(volume: Sequence[int], first: list, second: list) -> list[list[int]]:
    """Voxels along each side of the grids of the UNet, from the latents to the coarsest."""
    factors = np.cumprod([np.prod([[1] * len(volume), *first], axis=0), *second], axis=0)
    return [[side // int(step) for side, step in zip(volume, factor, strict=True)] for factor in factors]


def shrunk(patch: Sequence[int], spacing: Sequence[float], factor: Sequence[int]) -> list[int]:
    """A patch with its longest side in mm a fifth shorter, on the network's grid; itself where none is."""
    lengths = [
        side * mm if side > step * 4 else 0 for side, mm, step in zip(patch, spacing, factor, strict=True)
    ]
    if not max(lengths):
        return list(patch)
    axis = int(np.argmax(lengths))
    side = min(patch[axis] - factor[axis], int(patch[axis] * 0.8) // factor[axis] * factor[axis])
    return [side if i == axis else old for i, old in enumerate(patch)]
