"""Muon: momentum whose matrices are orthogonalised, for the weights of convolutions and linear layers.

Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/). An update has singular values of about 1, so
that rare directions of the gradient are learned as fast as common ones. Gram matrices are iterated, as in
Zhang, Amsel, Chen and Dao, 2026 (https://dao-lab.ai/blog/2026/gram-newton-schulz). `torch.optim.Muon` takes
matrices alone, and iterates in bfloat16 on the wide matrix, one at a time.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ldm.system.ranks import without_tf32

MOMENTUM = 0.95
MOMENTUM_STATE = "momentum"  # the key of its state
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al.: brings singular values near 1 in the fewest steps
ITERATIONS = 5
TOGETHER = 2**22  # elements: up to so many, weights of one shape are orthogonalised together


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decompositions of matrices (N, rows, columns), float32, up to singular
    values between about 0.7 and 1.2; 0 for 0.

    Newton-Schulz iterations X <- (a + b X X^T + c (X X^T)^2) X. All are polynomials in the first G = X X^T
    times the first X, so only G, on the smaller side, is iterated, and X is multiplied twice in all. Rounding
    can make eigenvalues of G slightly negative. Errors of G grow by a^2 = 12 in an iteration: in float32 to
    0.001 at the end, while bfloat16 and TF32 would diverge.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT.contiguous()
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    matrices = matrices / norm.clamp_min(1e-30)  # the largest singular value is at most 1
    a, b, c = QUINTIC
    with without_tf32():
        gram, product = matrices @ matrices.mT, None
        for i in range(ITERATIONS):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            if i + 1 < ITERATIONS:
                gram = factor @ gram @ factor
        return product @ matrices


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, for weights (rows, ...) of two or more dimensions, seen as matrices.

    The rate of tall matrices is multiplied by sqrt(rows / columns). Weights of one shape are computed in
    batches, which do not depend on the number of ranks. Under torchrun each rank orthogonalises its share of
    the batches, and all take the same step, bit for bit that of one process.

    Args:
        parameters: in the same order on every rank.
        shared: whether the ranks of this run share the work.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], shared: bool):
        super().__init__(parameters, {})
        self.weights = self.param_groups[0]["params"]
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self.batches = self._batches()

    def _batches(self) -> list[tuple[int, list[nn.Parameter]]]:
        """Weights of one shape, with the rank that orthogonalises them, in the order in which the updates are
        sent. The costliest come first, each to the rank with the least to do."""
        alike, batches, costs = {}, [], [0] * self.world_size
        for weight in self.weights:
            alike.setdefault(weight.shape, []).append(weight)
        for weights in alike.values():
            count = max(1, TOGETHER // weights[0].numel())
            batches += [weights[i : i + count] for i in range(0, len(weights), count)]

        def cost(weights: list[nn.Parameter]) -> int:
            return sum(weight.numel() * min(len(weight), weight[0].numel()) for weight in weights)

        owned = []
        for weights in sorted(batches, key=cost, reverse=True):
            owner = costs.index(min(costs))
            costs[owner] += cost(weights)
            owned.append((owner, weights))
        return owned

    @torch.no_grad()
    def step(self, rate: float, skip: torch.Tensor) -> None:
        """Update momentum and weights at this learning rate; neither where `skip` is 1 (0 or 1, on the
        device)."""
        updates = self._updates(skip)
        if self.world_size > 1:
            updates = list(updates)  # each rank does its share before it waits for those of others
        for owner, weights, update in updates:
            if update is None:
                update = weights[0].new_empty(len(weights), *weights[0].flatten(1).shape)
            if self.world_size > 1:
                dist.broadcast(update, owner)
            tall = max(1, update.shape[1] / update.shape[2])
            update.mul_(rate * tall**0.5 * (1 - skip))
            torch._foreach_sub_(weights, list(update.view(-1, *weights[0].shape).unbind()))

    def _updates(self, skip: torch.Tensor) -> Iterator[tuple[int, list[nn.Parameter], torch.Tensor | None]]:
        """Update the momenta; of each batch its owner, the weights that have a gradient, and their matrices
        (N, rows, columns), orthogonalised: None where they are another rank's."""
        for owner, batch in self.batches:
            weights = [weight for weight in batch if weight.grad is not None]
            if weights:
                matrices = self._directions(weights, skip)
                yield owner, weights, orthogonalised(matrices) if owner == self.rank else None

    def _directions(self, weights: list[nn.Parameter], skip: torch.Tensor) -> torch.Tensor:
        """Update the momenta of weights of one shape; gradients and momenta by Nesterov, (N, rows,
        columns)."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight][MOMENTUM_STATE] = torch.zeros_like(weight)
        momenta = [self.state[weight][MOMENTUM_STATE] for weight in weights]
        gradients = torch.stack([weight.grad for weight in weights])
        gradients.masked_fill_(skip.bool(), 0.0)  # NaN times 0 would be NaN
        momentum = torch.stack(momenta).lerp_(gradients, (1 - MOMENTUM) * (1 - skip))
        torch._foreach_copy_(momenta, list(momentum.unbind()))
        return gradients.lerp_(momentum, MOMENTUM).flatten(2)
