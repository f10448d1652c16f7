"""Muon: momentum whose matrices are orthogonalised, for the weights of convolutions and linear layers.

Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/). An update has singular values of about 1, so
that rare directions of the gradient are learned as fast as common ones. `torch.optim.Muon` takes matrices
alone, and iterates in bfloat16 on the wide matrix, which is slow on a CPU.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ldm.system.ranks import without_tf32

MOMENTUM = 0.95
MOMENTUM_STATE = "momentum"  # the key of its state
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al.: brings singular values near 1 in the fewest steps
ITERATIONS = 5


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition of a matrix (rows, columns), float32, up to singular values
    between about 0.7 and 1.2; 0 for 0.

    Newton-Schulz iterations X <- (a + b X X^T + c (X X^T)^2) X. All are polynomials in the first G = X X^T
    times the first X, so only G, on the smaller side, is iterated, and X is multiplied twice in all. Rounding
    can make eigenvalues of G slightly negative, which float32 keeps harmless and bfloat16 and TF32 do not.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.mT).mT
    matrix = matrix / matrix.norm().clamp_min(1e-30)  # the largest singular value is at most 1
    gram = matrix @ matrix.mT
    product = identity = torch.eye(len(gram), device=gram.device)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, for weights (rows, ...) of two or more dimensions, seen as matrices.

    The rate of wide and of tall matrices is multiplied by sqrt(max(1, rows / columns)). Under torchrun each
    rank orthogonalises its share, and all take the same step.

    Args:
        parameters: in the same order on every rank.
        shared: whether the ranks of this run share the work.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], shared: bool):
        super().__init__(parameters, {})
        self.weights = self.param_groups[0]["params"]
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self.shares = self._shares()

    def _shares(self) -> list[list[nn.Parameter]]:
        """The weights of each rank, in the order in which their updates are sent. The costliest come first,
        each to the rank with the least to do."""
        shares, costs = [[] for _ in range(self.world_size)], [0] * self.world_size
        cost = {weight: weight.numel() * min(len(weight), weight[0].numel()) for weight in self.weights}
        for weight in sorted(self.weights, key=lambda weight: -cost[weight]):
            least = costs.index(min(costs))
            shares[least].append(weight)
            costs[least] += cost[weight]
        return shares

    @torch.no_grad()
    def step(self, rate: float, skip: torch.Tensor) -> None:
        """Update momentum and weights at this learning rate; neither where `skip` is 1 (0 or 1, on the
        device)."""
        rate = rate * (1 - skip)
        directions = {}
        for weight in filter(lambda weight: weight.grad is not None, self.weights):
            if not self.state[weight]:
                self.state[weight][MOMENTUM_STATE] = torch.zeros_like(weight)
            momentum = self.state[weight][MOMENTUM_STATE]
            gradient = torch.where(skip.bool(), momentum, weight.grad)
            momentum.lerp_(gradient, 1 - MOMENTUM)
            directions[weight] = gradient.lerp_(momentum, MOMENTUM)
        with without_tf32():
            mine = [orthogonalised(directions[weight].flatten(1)) for weight in self._used(self.rank)]
        for owner in range(self.world_size):
            weights = self._used(owner)
            for weight, matrix in zip(weights, self._sent(mine, weights, owner), strict=True):
                tall = max(1, matrix.shape[0] / matrix.shape[1])
                weight.sub_(matrix.view(weight.shape) * (rate * tall**0.5))

    def _used(self, rank: int) -> list[nn.Parameter]:
        """The weights of a rank's share that have a gradient."""
        return [weight for weight in self.shares[rank] if weight.grad is not None]

    def _sent(
        self, mine: list[torch.Tensor], weights: list[nn.Parameter], owner: int
    ) -> Sequence[torch.Tensor]:
        """The matrices of these weights, which `owner` has, on every rank; `mine` are those of this rank."""
        if self.world_size == 1 or not weights:
            return mine if owner == self.rank else []
        sizes = [weight.numel() for weight in weights]
        flat = (
            torch.cat([matrix.flatten() for matrix in mine])
            if owner == self.rank
            else weights[0].new_empty(sum(sizes))
        )
        dist.broadcast(flat, owner)
        return [one.view(len(weight), -1) for one, weight in zip(flat.split(sizes), weights, strict=True)]
