"""How far two sets of feature rows are apart, and what of one lies within the other: rows in, numbers out.

Every estimate comes with an interval, by drawing the volumes of both sets anew (a bootstrap), since with tens
of volumes the sets themselves are the largest source of error.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

SHARE = 0.95  # of the intervals
DRAWS = 1000  # of a bootstrap


def interval(values: np.ndarray, share: float = SHARE) -> list[float]:
    """Between which `share` of drawn values lie; those that are NaN do not count."""
    low = (1 - share) / 2
    return [float(x) for x in np.nanquantile(values, [low, 1 - low])]


class KernelDistance:
    """Squared maximum mean discrepancy, unbiased, with the kernel (x.y / F + 1)^3 of KID (Binkowski et al.,
    2018, eq. 3 and 4). It can be negative where the sets do not differ, and does not grow with their sizes.

    Args:
        first, second: (N, F) and (M, F), at least 2 rows each.
    """

    def __init__(self, first: torch.Tensor, second: torch.Tensor):
        both = torch.cat([first, second])
        self.kernel = ((both @ both.T / both.shape[1] + 1) ** 3).numpy()
        self.sizes = len(first), len(second)

    @property
    def value(self) -> float:
        """The distance."""
        return float(self._weighted(*(np.ones((1, n)) for n in self.sizes))[0])

    def bootstrap(self, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
        """Distances of sets drawn anew. A row is never paired with itself, however often it was drawn; NaN
        where one was drawn every time."""
        rng = np.random.default_rng(seed)
        # The second set first: two distances to the same set are drawn alike, and may be subtracted.
        second, first = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in self.sizes[::-1])
        return self._weighted(first.astype(float), second.astype(float))

    def _weighted(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Of sets in which row i counts weights[:, i] times: (draws, N), (draws, M) -> (draws,)."""
        n = self.sizes[0]
        inner = [_mean_of_pairs(self.kernel[:n, :n], first), _mean_of_pairs(self.kernel[n:, n:], second)]
        across = np.einsum("bi,ij,bj->b", first, self.kernel[:n, n:], second, optimize=True)
        return inner[0] + inner[1] - 2 * across / (first.sum(1) * second.sum(1))


def _mean_of_pairs(kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
    kernel = kernel - np.diag(np.diag(kernel))
    sums = np.einsum("bi,ij,bj->b", weights, kernel, weights, optimize=True)
    pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
    return sums / np.where(pairs > 0, pairs, np.nan)


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance of the normal distributions that two sets have the means and covariances of (Heusel et
    al., 2017): |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    Args:
        first, second: (N, F) and (M, F), at least 2 rows each.

    The last trace is the sum of the singular values of X1 X2^T / sqrt((N - 1)(M - 1)), X being the centred
    rows: exact whatever N and F, where the square root of a product of covariances of rank below F is mostly
    rounding.
    """
    rows = [x.double() for x in (first, second)]
    means = [x.mean(0) for x in rows]
    centred = [(x - mean) / math.sqrt(len(x) - 1) for x, mean in zip(rows, means, strict=True)]
    traces = sum(x.square().sum() for x in centred)
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return max(0.0, float((means[0] - means[1]).square().sum() + traces - 2 * root))


class Moments:
    """Mean and covariance of rows that come one after the other and are not kept."""

    def __init__(self):
        self.count, self.total, self.products = 0, 0.0, 0.0

    def add(self, rows: torch.Tensor) -> None:
        """(N, F) more of them."""
        rows = rows.double()
        self.count += len(rows)
        self.total, self.products = self.total + rows.sum(0), self.products + rows.T @ rows

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments()
        for name in ("count", "total", "products"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    @property
    def mean(self) -> torch.Tensor:
        """(F,)"""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """(F, F), by N - 1."""
        mean = self.mean
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_of_moments(first: Moments, second: Moments) -> float:
    """The Fréchet distance of two sets of at least 2 rows each, from their means and covariances."""
    root = _root(first.covariance)
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp_min(0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return max(0.0, float((first.mean - second.mean).square().sum() + traces - 2 * cross))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    first: np.ndarray,
    second: np.ndarray,
    draws: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """A distance of two sets, each drawn anew, shifted so that the mean is the distance of the sets
    themselves: sets that hold volumes twice are farther apart than those that they were drawn from."""
    rng = np.random.default_rng(seed)
    values = np.array(
        [statistic(*(x[rng.integers(len(x), size=len(x))] for x in (first, second))) for _ in range(draws)]
    )
    return np.maximum(0, values - np.nanmean(values) + statistic(first, second))


class PrincipalAxes:
    """The directions in which real rows vary most, in which few rows suffice for a covariance.

    Args:
        real: (N, F) rows.
        count: of directions.
    """

    def __init__(self, real: torch.Tensor, count: int):
        self.centre = real.mean(0)
        self.axes = torch.linalg.svd(real - self.centre, full_matrices=False).Vh[:count]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, F) -> (N, count)."""
        return (rows - self.centre) @ self.axes.T


def _within(rows: torch.Tensor, others: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Whether each of `rows` lies no farther from one of `others` than that one's `neighbours`-th nearest."""
    radii = torch.cdist(others, others).kthvalue(neighbours + 1, dim=1).values  # the nearest is itself
    return (torch.cdist(rows, others) <= radii).any(1)


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, neighbours: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, eq. 1 and 2).

    Args:
        real, generated: (N, F) and (M, F), more than `neighbours` rows each.

    Returns:
        For each generated row whether it lies within the real ones' balls, and for each real row whether it
        lies within the generated ones': their means are precision and recall.
    """
    return (
        _within(generated, real, neighbours).double().numpy(),
        _within(real, generated, neighbours).double().numpy(),
    )


def bootstrap_mean(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means of values drawn anew, (N,) or (N, K) -> (draws,) or (draws, K)."""
    picked = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.asarray(values)[picked].mean(1)


def inception_score(probabilities: torch.Tensor) -> float:
    """exp of the mean KL divergence of each volume's classes from those of all (Salimans et al., 2016): from
    1, all alike, to the number of classes. (N, K) rows that sum to 1."""
    p = probabilities.double().clamp_min(1e-12)
    return float((p * (p.log() - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
