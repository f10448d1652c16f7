"""Own-feature distance: how far generated volumes are from real ones in the features of a frozen autoencoder.

No weights are fetched: the encoder is the one that was trained on the user's own data. Such figures compare
models over the same autoencoder, and are never to be set beside published ones.
"""

import numpy as np
import torch
from torch import nn

GRID = 2  # cells a side, over which activations are pooled
FLAT = 0.1  # of a group's typical standard deviation: features that vary less do not count for more


@torch.no_grad()
def pooled(activation: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of each channel in each of GRID^3 cells: (N, c, d, h, w) -> (N, F)."""
    activation = activation.float()
    mean, square = (
        nn.functional.adaptive_avg_pool3d(x, GRID).flatten(1) for x in (activation, activation.square())
    )
    return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], 1)


@torch.no_grad()
def encoder_features(autoencoder: nn.Module, volumes: torch.Tensor) -> list[torch.Tensor]:
    """Features of volumes (N, C, D, H, W), one by one: a tensor (N, F) for each resolution of the encoder and
    one for the posterior mean, float64 on the CPU.

    The activations are those after the last block of each resolution of `autoencoder.encoder.blocks`.
    """
    device = next(autoencoder.parameters()).device
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for block in autoencoder.encoder.blocks
    ]
    rows = []
    try:
        for volume in volumes:
            seen.clear()
            mean = autoencoder.encode(volume[None].to(device))[0]
            sizes = [x.shape[2:] for x in seen]
            last = [x for i, x in enumerate(seen) if i + 1 == len(seen) or sizes[i] != sizes[i + 1]]
            rows.append([pooled(x).double().cpu() for x in [*last, mean]])
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(group) for group in zip(*rows, strict=True)]


class FeatureSpace:
    """Features of one autoencoder, standardised by those of real volumes, each group with the same weight.

    Args:
        autoencoder: frozen, with `encoder.blocks` and `encode(x) -> (mean, ...)`.
        real: (N, C, D, H, W), which mean and standard deviation are taken from.
    """

    def __init__(self, autoencoder: nn.Module, real: torch.Tensor):
        self.autoencoder = autoencoder
        groups = encoder_features(autoencoder, real)
        self.centres = [group.mean(0) for group in groups]
        self.scales = [
            spread.clamp_min(FLAT * spread.square().mean().sqrt()).clamp_min(1e-12)
            for spread in (group.std(0) for group in groups)
        ]

    def __call__(self, volumes: torch.Tensor) -> torch.Tensor:
        """(N, C, D, H, W) -> (N, F), float64; the mean square of real volumes' rows is about 1."""
        groups = encoder_features(self.autoencoder, volumes)
        parts = [
            (group - centre) / scale / (len(scale) * len(groups)) ** 0.5
            for group, centre, scale in zip(groups, self.centres, self.scales, strict=True)
        ]
        features = torch.cat(parts, 1)
        return features * features.shape[1] ** 0.5


class Distance:
    """Squared maximum mean discrepancy of two sets of features, unbiased, with the kernel (x.y / F + 1)^3 of
    KID (Binkowski et al., 2018, eq. 3 and 4). It can be negative where the sets do not differ.

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

    def interval(self, share: float = 0.9, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Where `share` of the distances lie when both sets are drawn anew from themselves."""
        low = (1 - share) / 2
        return tuple(float(x) for x in np.nanquantile(self.bootstrap(draws, seed), [low, 1 - low]))

    def bootstrap(self, draws: int = 1000, seed: int = 0) -> np.ndarray:
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
