"""Is a sample a copy of a training volume? Its distance to the nearest one, compared with the distances of
held-out volumes, which cannot be copies.

The distance is sqrt(2 - 2 r), r the largest correlation of two small, smoothed volumes over shifts and
left-right mirroring: 0 for a copy, whatever its brightness and contrast, and small for one that was moved,
mirrored or passed through the autoencoder, which loses high frequencies only. No network is involved, so that
distances are comparable between models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import mannwhitneyu
from torch import nn

LONGEST = 48  # voxels of the small grid along the longest side
SMOOTHING = 1.0  # voxels of the small grid
MAX_SHIFT = 1 / 8  # of a side
CANDIDATES = 8  # training volumes compared on the small grid, the nearest on one half as fine
COPY = 0.5  # threshold, as a share of the held-out volumes' median distance
IDENTICAL = 0.05  # smallest threshold: a correlation of 0.9988 after smoothing
CONSTANT = 1e-5  # standard deviation; below it, variation is rounding
BATCH = 64  # training volumes at a time


@dataclass(frozen=True)
class Neighbour:
    """The nearest training volume: its index, the distance, and whether it matched mirrored left to right."""

    index: int
    distance: float
    mirrored: bool


def thumbnail(volume: torch.Tensor) -> torch.Tensor:
    """(1, C, D, H, W) -> small, smoothed (C, d, h, w) float16 on the CPU, with mean 0 and norm 1 over all
    channels; all 0 for a constant volume."""
    size = volume.shape[2:]
    small = [max(1, round(side * min(1.0, LONGEST / max(size)))) for side in size]
    pooled = nn.functional.adaptive_avg_pool3d(volume[0].float(), small).cpu().numpy()
    smooth = torch.from_numpy(gaussian_filter(pooled, (0, *[SMOOTHING] * 3)))
    return _normalised(smooth).half()


def _normalised(x: torch.Tensor) -> torch.Tensor:
    """(..., C, d, h, w) -> each channel with mean 0, all channels together with norm 1."""
    x = x.float() - x.float().mean((-3, -2, -1), keepdim=True)
    spread = x.square().mean((-4, -3, -2, -1), keepdim=True).sqrt().clamp_min(CONSTANT)
    return x / (spread * math.prod(x.shape[-4:]) ** 0.5)


class TrainingVolumes:
    """The nearest training volume, found by its thumbnail.

    Args:
        thumbnails: of the training volumes, at least one, (C, d, h, w) each, all of one shape.
        device: to compare on.
    """

    def __init__(self, thumbnails: Sequence[torch.Tensor], device: torch.device):
        self.fine, self.device = thumbnails, device
        halves = [_halved(one) for one in thumbnails]
        self.coarse = torch.cat(
            [_spectrum(torch.stack(halves[i : i + BATCH])) for i in range(0, len(halves), BATCH)]
        )

    def nearest(self, thumbnail: torch.Tensor) -> Neighbour:
        """The training volume nearest to a volume, by its `thumbnail`."""
        whole = _normalised(thumbnail)  # again, since float16 rounds
        both = torch.stack([whole, whole.flip(-3)])  # as it is and mirrored left to right
        coarse = torch.stack([_halved(one) for one in both])
        found = torch.cat([self._correlations(coarse, some) for some in self.coarse.split(BATCH)], 1)
        candidates = found.amax(0).topk(min(CANDIDATES, len(self.fine))).indices.cpu()
        fine = _spectrum(torch.stack([_normalised(self.fine[i]) for i in candidates]))
        correlations = self._correlations(both, fine, between=True)
        mirrored, place = divmod(int(correlations.argmax()), len(candidates))
        r = min(1.0, float(correlations.max()))
        return Neighbour(int(candidates[place]), float(np.sqrt(2 - 2 * r)), bool(mirrored))

    def _correlations(
        self, volumes: torch.Tensor, spectra: torch.Tensor, between: bool = False
    ) -> torch.Tensor:
        """Largest correlations over shifts, (V, M), of volumes (V, C, d, h, w) with those of `spectra`
        (M, C, d, h, w').

        Args:
            between: also look for the maximum between voxels, by a parabola along each axis.
        """
        size = volumes.shape[-3:]
        own = _spectrum(volumes.to(self.device))[:, None]
        product = (own * spectra.to(self.device).conj()).sum(2)
        maps = torch.fft.irfftn(product, s=size, dim=(-3, -2, -1))
        if between:
            maps = maps + sum(_above_the_voxel(maps, axis) for axis in (-3, -2, -1))
        for axis, side in zip((-3, -2, -1), size, strict=True):
            most = int(side * MAX_SHIFT)
            shifts = torch.arange(-most, most + 1, device=maps.device) % side
            maps = maps.index_select(axis, shifts)
        return maps.amax((-3, -2, -1))


def _above_the_voxel(maps: torch.Tensor, axis: int) -> torch.Tensor:
    """How far the parabola through a voxel and its neighbours along an axis rises above the voxel; 0 where
    the voxel is no maximum."""
    before, after = maps.roll(1, axis), maps.roll(-1, axis)
    curvature = 2 * maps - before - after
    highest = (maps >= before) & (maps >= after) & (curvature > 0)
    return torch.where(highest, (before - after).square() / (8 * curvature), 0.0)


def _halved(thumbnail: torch.Tensor) -> torch.Tensor:
    return _normalised(nn.functional.avg_pool3d(thumbnail.float(), 2, ceil_mode=True))


def _spectrum(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfftn(x.float(), dim=(-3, -2, -1))


@dataclass(frozen=True)
class Copies:
    """Which volumes are copies of training volumes, by their distances.

    `copies` are the samples and `leaks` the held-out volumes below `threshold`. `closer` is the share of
    pairs of a sample and a held-out volume in which the sample is closer to the training set, 0.5 where they
    are alike, and `z` the same in standard deviations: the three-sample test of Meehan et al. (2020), for
    which -3 and less is suspicious.
    """

    threshold: float
    copies: np.ndarray
    leaks: np.ndarray
    closer: float
    z: float


def find_copies(samples: np.ndarray, held_out: np.ndarray) -> Copies:
    """From distances of samples (N,) and of held-out volumes (M,), at least one of each, to the training set.

    The threshold is half of the held-out volumes' median, but at least `IDENTICAL`, since held-out volumes
    that are copies themselves lower the median. On real brains and hippocampi no volume of another subject
    came so close (docs/evaluation.md); two scans of one subject do.
    """
    threshold = max(IDENTICAL, COPY * float(np.median(held_out)))
    n, m = len(samples), len(held_out)
    u = mannwhitneyu(samples, held_out).statistic  # pairs in which the held-out volume is closer
    deviation = np.sqrt(n * m * (n + m + 1) / 12)
    z = (u - n * m / 2) / deviation
    return Copies(threshold, samples < threshold, held_out < threshold, 1 - u / (n * m), z)
