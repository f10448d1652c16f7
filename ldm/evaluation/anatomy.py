"""Features of gross anatomy: smoothed volumes along the principal axes of other real ones.

Features of an encoder are pooled over large cells: they see texture, and hardly whether the parts of a volume
belong together. Here each volume is smoothed to several scales in mm, so that no texture is left, and
described by its coordinates along the principal axes of real scans, each divided by its standard deviation
there, and by how far it lies from all of them. A volume is far off if it has what scans never have, and also
if it combines what scans do not combine, such as a small left half and a large right one.
"""

import math
from collections.abc import Sequence

import torch

SCALES = (8.0, 16.0)  # standard deviations of the smoothing in mm, and spacings of the smoothed volumes
SHRINKAGE = 1.0  # added to the variance of each axis, as a share of the mean
RESIDUAL_WEIGHT = 10.0  # of the residual, as of so many axes
MIN_SPREAD = 0.05  # smallest standard deviation of residuals, as a share of their mean
MIN_SCANS, MAX_SCANS = 4, 500  # that determine the axes


class SmoothedVolumes:
    """Volumes smoothed by Gaussians of `SCALES` mm, at points as far apart.

    Args:
        spacing: of the volumes, in mm.
    """

    def __init__(self, spacing: Sequence[float]):
        self.spacing = tuple(spacing)

    @torch.no_grad()
    def __call__(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """(1, C, D, H, W) -> a row (F,) for each scale, float32 on the CPU. Outside the volume is 0."""
        rows = []
        for scale in SCALES:
            smooth = volume[0].float()
            for axis, (count, spacing) in enumerate(zip(volume.shape[2:], self.spacing, strict=True), 1):
                weights = _gaussian_weights(count, spacing, scale).to(smooth)
                smooth = (smooth.movedim(axis, -1) @ weights.T).movedim(-1, axis)
            rows.append(smooth.flatten().cpu())
        return rows


def _gaussian_weights(count: int, spacing: float, scale: float) -> torch.Tensor:
    """(points, count): weights of voxels for each point, a Gaussian density over the voxels' width. Points
    lie symmetrically about the centre, `scale` mm apart, and cover the volume."""
    points = math.ceil(count * spacing / scale)
    at = (torch.arange(points) - (points - 1) / 2) * scale
    voxels = (torch.arange(count) - (count - 1) / 2) * spacing
    density = torch.exp(-0.5 * ((at[:, None] - voxels) / scale).double().square())
    return (density * spacing / (scale * math.sqrt(2 * math.pi))).float()


class AnatomySpace:
    """Coordinates along the principal axes of real volumes, and the distance from their span.

    Along an axis of variance v a coordinate is divided by sqrt(v + `SHRINKAGE` * the mean variance), so that
    axes count about equally, such as symmetric and antisymmetric ones, but not those that few scans determine
    badly. The residual, the norm of what no axis explains, is standardised by the residuals of each real
    volume from the span of the others.

    Args:
        real: `MIN_SCANS` or more volumes, one tensor (N, F) per scale, which must not be among those that
            are compared: a volume lies in the span of itself.
    """

    def __init__(self, real: list[torch.Tensor]):
        self.scales = [_Axes(rows.double()) for rows in real]

    def __call__(self, layers: list[torch.Tensor]) -> list[torch.Tensor]:
        """One tensor (M, F) per scale -> (M, N) per scale, float64. The values depend on N, the number of
        real volumes: only distances in one space can be compared."""
        return [axes(rows.double()) for axes, rows in zip(self.scales, layers, strict=True)]


def all_scales(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of `AnatomySpace`, one tensor (M, N) per scale, side by side; each scale has the same weight."""
    return torch.cat(rows, 1) / len(rows) ** 0.5


class _Axes:
    """`AnatomySpace` at one scale."""

    def __init__(self, rows: torch.Tensor):
        self.centre = rows.mean(0)
        count = len(rows) - 1
        _, spread, axes = torch.linalg.svd(rows - self.centre, full_matrices=False)
        variances = spread[:count].square() / count
        rounding = 1e-6 * rows.norm(dim=1).mean()  # where all scans are equal
        self.axes = axes[:count]
        self.scales = (variances + SHRINKAGE * variances.mean()).sqrt().clamp_min(rounding)
        residuals = _leave_one_out(rows - self.centre)
        self.typical = residuals.mean()
        self.spread = residuals.std().clamp_min(MIN_SPREAD * self.typical).clamp_min(rounding)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        centred = rows - self.centre
        along = centred @ self.axes.T
        residual = (centred - along @ self.axes).norm(dim=1)
        residual = RESIDUAL_WEIGHT**0.5 * (residual - self.typical) / self.spread
        return torch.cat([along / self.scales, residual[:, None]], 1) / self.axes.shape[0] ** 0.5


def _leave_one_out(centred: torch.Tensor) -> torch.Tensor:
    """Distance of each row from the affine span of the others, (N, F) -> (N,), N of 3 or more.

    1 / (G^-1)_ii is the squared distance of row i from the linear span of the others, G being the matrix of
    inner products; a column of large equal numbers makes the span affine.
    """
    products = centred @ centred.T
    size = products.trace() / len(products)
    if size == 0:
        return centred.new_zeros(len(centred))
    # The last term keeps the inverse finite where rows are equal.
    products = products + 1e4 * size + torch.eye(len(products)).to(products) * (1e-9 * size)
    return products.inverse().diagonal().clamp_min(1e-300).rsqrt()
