"""Metrics of volumes: reconstruction scores, spectra, MS-SSIM, histograms, tissue volumes.

Distances between groups of volumes are in `ldm.evaluation.distances`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import MultiScaleSSIMMetric, PSNRMetric, SSIMMetric
from scipy.stats import wasserstein_distance
from skimage.filters import threshold_multiotsu

FOREGROUND = 0.05  # of the unit range; darker voxels are background
BINS = 256  # of an intensity histogram over the unit range
TISSUES = ("dark", "middle", "bright")  # in T1w: fluid, grey matter, white matter
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM (Wang et al., 2003)
WINDOW = 4  # voxels of MS-SSIM's window, as in the literature on generated brains (Pinaya et al., 2022)


def reconstruction_metrics(reconstruction: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """PSNR in dB, SSIM and L1 of each volume, data range 1: two (B, C, D, H, W) -> tensors of (B,).

    SSIM's Gaussian window is 11 voxels, or the largest odd number that a smaller volume holds.
    """
    window = min(11, (min(image.shape[2:]) - 1) // 2 * 2 + 1)
    return {
        "psnr": PSNRMetric(max_val=1.0)(reconstruction, image).mean(1),
        "ssim": SSIMMetric(spatial_dims=3, data_range=1.0, win_size=window)(reconstruction, image).mean(1),
        "l1": (reconstruction - image).abs().mean((1, 2, 3, 4)),
    }


def mean_dice(made: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Dice of label channels (1, L, D, H, W), each where it is the largest and over one half, averaged over
    the labels that either of the two has; 1 where neither has one."""
    masks = [(one > 0.5) & (one == one.max(1, keepdim=True).values) for one in (made, given)]
    both, sizes = (masks[0] & masks[1]).sum((0, 2, 3, 4)), sum(one.sum((0, 2, 3, 4)) for one in masks)
    count = (sizes > 0).sum()
    return torch.where(count > 0, (2 * both / sizes.clamp_min(1)).sum() / count.clamp_min(1), 1.0)


def dice(found: np.ndarray, true: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Dice of each value in two labels of one shape, (L,); NaN where neither has it."""
    pairs = [(found == value, true == value) for value in values]
    sizes = np.array([a.sum() + b.sum() for a, b in pairs], float)
    both = np.array([(a & b).sum() for a, b in pairs], float)
    return np.divide(2 * both, sizes, out=np.full(len(values), np.nan), where=sizes > 0)


def band_power(volumes: torch.Tensor, low: float = 0.25, high: float = 0.5) -> torch.Tensor:
    """Spectral power between two radial frequencies in cycles/voxel: (B, C, D, H, W) -> (B,).

    The mean of |FFT|^2 / voxels over the band and over channels. Blur lowers it.
    """
    spectrum = torch.fft.fftn(volumes.float(), dim=(-3, -2, -1)).abs().square()
    axes = [torch.fft.fftfreq(n, device=volumes.device) for n in volumes.shape[-3:]]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    band = (radius >= low) & (radius < high)
    return spectrum[..., band].mean((1, 2)) / volumes[0, 0].numel()


def scales_of(size: Sequence[int]) -> int:
    """The number of MS-SSIM's five scales that fit into a volume of this size.

    The coarsest scale must hold the window, and MONAI requires (scales - 1)^2 windows a side.
    """
    side = min(size)
    fits = [side // max(2**s, s**2) >= WINDOW for s in range(len(SCALE_WEIGHTS))]
    return (*fits, False).index(False)


def ms_ssim(first: torch.Tensor, second: torch.Tensor) -> float:
    """Multi-scale structural similarity of two volumes (1, C, D, H, W) in the unit range; 1 if identical. It
    uses as many of the five scales as fit, with their weights normalised.

    Raises:
        ValueError: no scale fits.
    """
    weights = SCALE_WEIGHTS[: scales_of(first.shape[2:])]
    if not weights:
        raise ValueError(f"MS-SSIM needs {WINDOW} voxels a side, not {tuple(first.shape[2:])}.")
    metric = MultiScaleSSIMMetric(
        spatial_dims=3,
        data_range=1.0,
        kernel_size=WINDOW,
        weights=[weight / sum(weights) for weight in weights],
    )
    return float(metric(first, second))


class RadialSpectrum:
    """Spectral power by radial frequency, of volumes of one size.

    Args:
        size: (D, H, W) in voxels.

    `frequencies` holds the centre of each shell in cycles/voxel, from the first above 0 to 0.5.
    """

    def __init__(self, size: Sequence[int]):
        axes = [torch.fft.fftfreq(size[0]), torch.fft.fftfreq(size[1]), torch.fft.rfftfreq(size[2])]
        radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
        count = max(size) // 2
        self.shell = (radius * 2 * count).round().long()  # shell 0 is the mean of the volume
        self.count = count
        self.frequencies = np.arange(1, count + 1) / (2 * count)
        # rfftn keeps half of the spectrum of a real volume; the other half counts by weights of 2.
        twice = torch.full((size[2] // 2 + 1,), 2.0)
        twice[0] = 1
        if size[2] % 2 == 0:
            twice[-1] = 1
        self.weight = twice.expand_as(self.shell)
        self.sizes = self._sums(torch.ones(self.shell.shape))

    def __call__(self, volume: torch.Tensor) -> np.ndarray:
        """(1, C, D, H, W) -> the mean power |FFT|^2 / voxels of each shell, over channels; float64."""
        power = torch.fft.rfftn(volume[0].double(), dim=(-3, -2, -1)).abs().square().mean(0).cpu()
        return (self._sums(power) / self.sizes / volume[0, 0].numel()).numpy()

    def _sums(self, values: torch.Tensor) -> torch.Tensor:
        kept = (self.shell > 0) & (self.shell <= self.count)
        weighted = (values * self.weight)[kept].double()
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.shell[kept] - 1, weighted)


def spectrum_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference in dB of the mean power spectra of two groups, (N, K) and (M, K)."""
    means = [np.log10(np.maximum(x.mean(0), 1e-30)) for x in (first, second)]
    return float(10 * np.abs(means[0] - means[1]).mean())


def histogram(volume: torch.Tensor) -> np.ndarray:
    """Share of the foreground voxels in each of `BINS` bins of the unit range; all 0 without foreground."""
    values = volume[volume > FOREGROUND].float().cpu()
    counts = torch.histc(values.clamp(0, 1), BINS, 0, 1).double()
    return (counts / counts.sum().clamp_min(1)).numpy()


def histogram_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Wasserstein distance of the mean histograms of two groups, (N, BINS) and (M, BINS), as a share of the
    intensity range. NaN if a group has no foreground."""
    means = [x.mean(0) for x in (first, second)]
    if not all(mean.sum() > 0 for mean in means):
        return float("nan")
    centres = (np.arange(BINS) + 0.5) / BINS
    return float(wasserstein_distance(centres, centres, *means))


@dataclass(frozen=True)
class Tissues:
    """Volumes in ml of the foreground and of its dark, middle and bright class."""

    foreground: float
    dark: float
    middle: float
    bright: float


def tissue_volumes(volume: np.ndarray, spacing: Sequence[float]) -> Tissues:
    """The foreground of (D, H, W) in the unit range and three classes of it, by Otsu's thresholds.

    In a skull-stripped T1w brain the classes are roughly fluid, grey and white matter; in other images they
    can still be compared between volumes of one kind. NaN if the foreground has fewer than three values.

    Args:
        spacing: in mm.
    """
    ml = float(np.prod(spacing)) / 1000
    inside = volume[volume > FOREGROUND]
    nan = [float("nan")] * len(TISSUES)
    if not len(inside) or np.ptp(inside) < 1 / BINS:
        return Tissues(len(inside) * ml, *nan)
    try:
        thresholds = threshold_multiotsu(inside, classes=len(TISSUES))
    except ValueError:  # fewer values than classes
        return Tissues(len(inside) * ml, *nan)
    counts = np.bincount(np.digitize(inside, thresholds), minlength=len(TISSUES))
    return Tissues(len(inside) * ml, *(counts * ml).tolist())
