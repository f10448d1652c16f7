"""Distances between two sets of feature rows, with bootstrap intervals and a permutation test.

With tens of volumes the choice of volumes is the largest source of error, which the bootstrap over both sets
estimates. The permutation test is exact however few the volumes are.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import binomtest, norm, t

SHARE = 0.95  # confidence level of the intervals
DRAWS = 1000  # bootstrap samples
PERMUTATIONS = 999
LEVEL = 0.05  # significance level of the permutation test
POWER = 0.8
SHIFTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # standard deviations, of the shifts that are simulated
MAX_SIMULATED = 200  # rows of a simulated set


def interval(values: np.ndarray) -> list[float]:
    """The central interval that holds `SHARE` of the values; NaNs are ignored."""
    low = (1 - SHARE) / 2
    if np.isnan(values).all():
        return [math.nan, math.nan]
    return [float(x) for x in np.nanquantile(values, [low, 1 - low])]


def t_interval(draws: np.ndarray, value: float, count: int) -> list[float] | None:
    """The interval of `value`, from its bootstrap draws over `count` volumes on each side; None for one.

    The draws are centred on `value` and widened by the ratio of Student's t to the normal distribution:
    percentile intervals of ten volumes are too short (Hesterberg, 2015).
    """
    if count < 2:
        return None
    wider = t.ppf((1 + SHARE) / 2, count - 1) / norm.ppf((1 + SHARE) / 2) * math.sqrt(count / (count - 1))
    return interval(value + wider * (draws - np.nanmean(draws)))


def share_interval(found: np.ndarray) -> list[float]:
    """The interval of a proportion, from values 0 or 1 (Wilson, 1927): not empty for 0 of 10."""
    limits = binomtest(int(found.sum()), len(found)).proportion_ci(SHARE, "wilson")
    return [float(limits.low), float(limits.high)]


def share_difference(first: np.ndarray, second: np.ndarray) -> list[float]:
    """The interval of the difference of two proportions (Newcombe, 1998, method 10)."""
    a, b = first.mean(), second.mean()
    (low_a, high_a), (low_b, high_b) = share_interval(first), share_interval(second)
    low, high = math.hypot(a - low_a, high_b - b), math.hypot(high_a - a, b - low_b)
    return [float(a - b - low), float(a - b + high)]


def polynomial_kernel(rows: torch.Tensor) -> torch.Tensor:
    """(x.y / F + 1)^3 of all pairs of rows, (..., N, F) -> (..., N, N)."""
    return (rows @ rows.mT / rows.shape[-1] + 1) ** 3


def distance_kernel(rows: torch.Tensor) -> torch.Tensor:
    """-|x - y| of all pairs of rows, (..., N, F) -> (..., N, N). With it the squared maximum mean discrepancy
    is the energy distance, 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely and Rizzo, 2013; Sejdinovic et al.,
    2013, theorem 22)."""
    return -torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


class KernelDistance:
    """Unbiased squared maximum mean discrepancy, by default with the kernel (x.y / F + 1)^3 of KID (Binkowski
    et al., 2018, eq. 3 and 4). It can be negative, and does not depend on the sizes of the sets.

    Args:
        first, second: (N, F) and (M, F), at least 2 rows each.
        kernel: of all pairs of rows.
    """

    def __init__(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        kernel: Callable[[torch.Tensor], torch.Tensor] = polynomial_kernel,
    ):
        self.kernel = kernel(torch.cat([first, second])).numpy()
        self.sizes = len(first), len(second)

    @property
    def value(self) -> float:
        """The distance."""
        return float(self._weighted(*(np.ones((1, n)) for n in self.sizes))[0])

    def bootstrap(self, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
        """Distances of resampled sets (draws,). A row is never paired with itself, however often it was
        drawn; NaN where a set consists of one row."""
        rng = np.random.default_rng(seed)
        # The second set first: distances to the same set use the same draws of it, and may be subtracted.
        second, first = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in self.sizes[::-1])
        return self._weighted(first.astype(float), second.astype(float))

    def p_value(self, seed: int = 0) -> float:
        """Of a permutation test (Gretton et al., 2012): (1 + permutations with at least this distance)
        / (1 + permutations). Exact for exchangeable rows: their scaling must not depend on the set."""
        return float(permutation_p_values(self.kernel[None], self.sizes[0], PERMUTATIONS, seed)[0])

    def _weighted(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Distances (draws,) of sets in which each row is repeated this often: (draws, N), (draws, M)."""
        n = self.sizes[0]
        inner = [_mean_of_pairs(self.kernel[:n, :n], first), _mean_of_pairs(self.kernel[n:, n:], second)]
        across = np.einsum("bi,ij,bj->b", first, self.kernel[:n, n:], second, optimize=True)
        return inner[0] + inner[1] - 2 * across / (first.sum(1) * second.sum(1))


def _mean_of_pairs(kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
    kernel = kernel - np.diag(np.diag(kernel))
    sums = np.einsum("bi,ij,bj->b", weights, kernel, weights, optimize=True)
    pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
    return sums / np.where(pairs > 0, pairs, np.nan)


def permutation_p_values(kernels: np.ndarray, first: int, permutations: int, seed: int = 0) -> np.ndarray:
    """p-values (S,) of the squared maximum mean discrepancy of the first `first` rows and the others, from
    kernel matrices of all rows (S, N, N)."""
    total = kernels.shape[1]
    second = total - first
    kernels = kernels * (1 - np.eye(total))  # a row is not paired with itself
    rng = np.random.default_rng(seed)
    # The observed order, then permutations.
    orders = np.vstack([np.arange(total), rng.permuted(np.tile(np.arange(total), (permutations, 1)), axis=1)])
    chosen = (orders < first).astype(float)  # (permutations + 1, N): which rows are of the first set
    sums = chosen @ kernels  # (S, permutations + 1, N)
    within = (sums * chosen).sum(2)
    across = sums.sum(2) - within
    others = kernels.sum((1, 2))[:, None] - within - 2 * across
    distances = (
        within / (first * (first - 1)) + others / (second * (second - 1)) - 2 * across / (first * second)
    )
    observed, permuted = distances[:, :1], distances[:, 1:]
    rounding = 1e-9 * np.abs(kernels).mean((1, 2))[:, None]
    return (1 + (permuted >= observed - rounding).sum(1)) / (1 + permutations)


def detectable_shift(
    real: torch.Tensor, first: int, second: int, simulations: int = 200, permutations: int = 199
) -> float | None:
    """The smallest of `SHIFTS` that the permutation test detects with `POWER` at `LEVEL`, with `first` and
    `second` rows; None where it detects none.

    By simulation: normal rows with the covariance of real ones. All features of the first set are shifted by
    that many standard deviations, with the signs of the first principal axis: along the largest variance a
    shift is hard to detect.

    Args:
        real: (N, F), at least 2 rows.
    """
    first, second = min(first, MAX_SIMULATED), min(second, MAX_SIMULATED)
    if min(first, second) < 2:
        return None
    _, spread, axes = torch.linalg.svd(real - real.mean(0), full_matrices=False)
    # Coordinates in the span of the axes and the shift: inner products stay the same.
    direction = real.std(0) * torch.where(axes[0] < 0, -1.0, 1.0).to(real)
    orthogonal = direction - axes.T @ (axes @ direction)
    direction = torch.cat([axes @ direction, orthogonal.norm()[None]])
    scales = torch.cat([spread / math.sqrt(len(real) - 1), spread.new_zeros(1)])
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(simulations, first + second, len(scales), generator=generator, dtype=real.dtype)
    is_first = (torch.arange(first + second) < first).to(real)[:, None]
    for shift in SHIFTS:
        detected = 0
        for part in draws.split(50):
            rows = part * scales + shift * is_first * direction
            rows = rows - rows.mean(1, keepdim=True)
            products = rows @ rows.mT / real.shape[1]
            p = permutation_p_values(((products + 1) ** 3).numpy(), first, permutations)
            detected += int((p <= LEVEL).sum())
        if detected >= POWER * simulations:
            return shift
    return None


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance of two sets, as normal distributions (Heusel et al., 2017):
    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    Args:
        first, second: (N, F) and (M, F), at least 2 rows each.

    The last trace is the sum of the singular values of X1 X2^T / sqrt((N - 1)(M - 1)), X being the centred
    rows. This is exact for any N and F; the matrix square root of rank-deficient covariances is mostly
    rounding error.
    """
    rows = [x.double() for x in (first, second)]
    means = [x.mean(0) for x in rows]
    centred = [(x - mean) / math.sqrt(len(x) - 1) for x, mean in zip(rows, means, strict=True)]
    traces = sum(x.square().sum() for x in centred)
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return max(0.0, float((means[0] - means[1]).square().sum() + traces - 2 * root))


class Moments:
    """Running mean and covariance of rows, which are not kept."""

    def __init__(self):
        self.count, self.total, self.products = 0, 0.0, 0.0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (N, F)."""
        rows = rows.double()
        self.count += len(rows)
        self.total, self.products = self.total + rows.sum(0), self.products + rows.T @ rows

    @property
    def mean(self) -> torch.Tensor:
        """(F,)"""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """(F, F), normalised by N - 1."""
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
    *firsts: np.ndarray,
    second: np.ndarray,
    draws: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap distances of each of `firsts` to `second`: (firsts, draws). All use the same draws of the
    second set, so that distances may be subtracted.

    They are centred on the observed distance: resampled sets, with their repeated rows, are farther apart.
    """
    rng = np.random.default_rng(seed)
    values = np.empty((len(firsts), draws))
    for i in range(draws):
        other = second[rng.integers(len(second), size=len(second))]
        values[:, i] = [statistic(x[rng.integers(len(x), size=len(x))], other) for x in firsts]
    means = np.array([[statistic(x, second)] for x in firsts])
    return values - np.nanmean(values, 1, keepdims=True) + means


class PrincipalAxes:
    """Projection onto the first `count` principal axes of rows (N, F): a few rows suffice for a covariance
    there."""

    def __init__(self, rows: torch.Tensor, count: int):
        self.centre = rows.mean(0)
        self.axes = torch.linalg.svd(rows - self.centre, full_matrices=False).Vh[:count]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, F) -> (N, count)."""
        return (rows - self.centre) @ self.axes.T


def _within(rows: torch.Tensor, others: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Which of `rows` lie in the ball of any of `others`, up to its `neighbours`-th nearest neighbour."""
    radii = torch.cdist(others, others).kthvalue(neighbours + 1, dim=1).values  # the nearest is itself
    return (torch.cdist(rows, others) <= radii).any(1)


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, neighbours: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, eq. 1 and 2).

    Args:
        real, generated: (N, F) and (M, F), more than `neighbours` rows each.

    Returns:
        For each generated row 1 if it lies in a ball of a real one, else 0, and the same for each real row:
        their means are precision and recall.
    """
    return (
        _within(generated, real, neighbours).double().numpy(),
        _within(real, generated, neighbours).double().numpy(),
    )


def bootstrap_mean(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap means, (N,) or (N, K) -> (draws,) or (draws, K)."""
    picked = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.asarray(values)[picked].mean(1)


def inception_score(probabilities: torch.Tensor) -> float:
    """exp of the mean KL divergence of each volume's classes from those of all (Salimans et al., 2016): from
    1, all alike, to the number of classes. (N, K) rows that sum to 1."""
    p = probabilities.double().clamp_min(1e-12)
    return float((p * (p.log() - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
