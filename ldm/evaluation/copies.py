"""Is a sample a copy of a training volume? Its distance to the nearest one, against that of held-out volumes
to theirs, which cannot be copies.

The distance is sqrt(2 - 2 r), r the correlation of two volumes that were brought to a small grid and
smoothed, at
the shift, and mirrored or not, where it is largest: 0 for a copy, whatever its brightness and contrast, and
little for one that was moved, mirrored, or passed through the autoencoder, which loses fine detail only. No
network has a say in it, so that it means the same for every model.
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
SMOOTHING = 1.0  # voxels of it
SHIFT = 1 / 8  # of a side, up to which volumes are moved against each other
CANDIDATES = 8  # training volumes that are looked at on the small grid, after all were on one half as fine
COPY = 0.5  # of the held-out volumes' median distance, below which a sample is called a copy
IDENTICAL = 0.05  # below which it is one in any case: a correlation of 0.9988 after smoothing
CONSTANT = 1e-5  # of the unit range; what varies less is rounding
BATCH = 64  # training volumes at a time


@dataclass(frozen=True)
class Neighbour:
    """The training volume that is nearest to a volume: its index, the distance, and whether it was mirrored
    left to right for it."""

    index: int
    distance: float
    mirrored: bool


def thumbnail(volume: torch.Tensor) -> torch.Tensor:
    """(1, C, D, H, W) -> what is compared of it, (C, d, h, w) float16 on the CPU: mean 0 and norm 1 over all
    channels; all 0 where it is constant."""
    size = volume.shape[2:]
    small = [max(1, round(side * min(1.0, LONGEST / max(size)))) for side in size]
    pooled = nn.functional.adaptive_avg_pool3d(volume[0].float(), small).cpu().numpy()
    smooth = torch.from_numpy(gaussian_filter(pooled, (0, *[SMOOTHING] * 3)))
    return _normalised(smooth).half()


def _normalised(x: torch.Tensor) -> torch.Tensor:
    """(..., C, d, h, w) -> each channel with mean 0, all of them together with norm 1."""
    x = x.float() - x.float().mean((-3, -2, -1), keepdim=True)
    spread = x.square().mean((-4, -3, -2, -1), keepdim=True).sqrt().clamp_min(CONSTANT)
    return x / (spread * math.prod(x.shape[-4:]) ** 0.5)


class TrainingVolumes:
    """What samples may be copies of.

    Args:
        thumbnails: of the training volumes, (C, d, h, w) each, all of one shape; one at least.
        device: to compare on.
    """

    def __init__(self, thumbnails: Sequence[torch.Tensor], device: torch.device):
        self.fine, self.device = thumbnails, device
        halves = [_halved(one) for one in thumbnails]
        self.coarse = torch.cat(
            [_spectrum(torch.stack(halves[i : i + BATCH])) for i in range(0, len(halves), BATCH)]
        )

    def nearest(self, thumbnail: torch.Tensor) -> Neighbour:
        """Of a volume's `thumbnail`."""
        whole = _normalised(thumbnail)  # again, since float16 rounds
        both = torch.stack([whole, whole.flip(-3)])  # as it is, mirrored left to right
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
        """Of volumes (V, C, d, h, w) with those of `spectra`, (M, C, d, h, w'), each at its best shift: (V,
        M).

        Args:
            between: also where the best shift lies between voxels, by a parabola along each axis.
        """
        size = volumes.shape[-3:]
        own = _spectrum(volumes.to(self.device))[:, None]
        product = (own * spectra.to(self.device).conj()).sum(2)
        maps = torch.fft.irfftn(product, s=size, dim=(-3, -2, -1))
        if between:
            maps = maps + sum(_above_the_voxel(maps, axis) for axis in (-3, -2, -1))
        for axis, side in zip((-3, -2, -1), size, strict=True):
            most = int(side * SHIFT)
            shifts = torch.arange(-most, most + 1, device=maps.device) % side
            maps = maps.index_select(axis, shifts)
        return maps.amax((-3, -2, -1))


def _above_the_voxel(maps: torch.Tensor, axis: int) -> torch.Tensor:
    """How much higher than at a voxel the parabola through it and its neighbours along an axis comes between
    them; 0 where the voxel is no maximum."""
    before, after = maps.roll(1, axis), maps.roll(-1, axis)
    curvature = 2 * maps - before - after
    highest = (maps >= before) & (maps >= after) & (curvature > 0)
    return torch.where(highest, (before - after).square() / (8 * curvature), 0.0)


def _halved(thumbnail: torch.Tensor) -> torch.Tensor:
    return _normalised(nn.functional.avg_pool3d(thumbnail.float(), 2, ceil_mode=True))


def _spectrum(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfftn(x.float(), dim=(-3, -2, -1))


@dataclass(frozen=True)
class Verdict:
    """What distances of samples and of held-out volumes to the training set say.

    `limit` is the distance below which a sample is called a copy, `copies` which samples are, `leaks` which
    held-out volumes are; `closer` the share of pairs of a sample and a held-out volume in which the sample is
    closer to the training set, 0.5 where samples are like held-out volumes; `z` the same as a number of
    standard deviations of chance, -3 and less being suspicious (the three-sample test of Meehan et al.,
    2020).
    """

    limit: float
    copies: np.ndarray
    leaks: np.ndarray
    closer: float
    z: float


def judge(samples: np.ndarray, held_out: np.ndarray) -> Verdict:
    """Distances of samples (N,) and of held-out volumes (M,), one of each at least, to the training set.

    The limit is half of the held-out volumes' median, or `IDENTICAL` where held-out volumes are copies
    themselves and bring it down. On real brains and hippocampi no volume of another subject came so close
    (docs/evaluation.md); two scans of one subject do, and are told as leaks where one is held out.
    """
    limit = max(IDENTICAL, COPY * float(np.median(held_out)))
    n, m = len(samples), len(held_out)
    u = mannwhitneyu(samples, held_out).statistic  # pairs in which the held-out volume is closer
    deviation = np.sqrt(n * m * (n + m + 1) / 12)
    return Verdict(limit, samples < limit, held_out < limit, 1 - u / (n * m), (u - n * m / 2) / deviation)
