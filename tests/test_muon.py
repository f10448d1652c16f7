"""Muon: its update against the iteration in float64, by hand, and where a step is skipped."""

import copy

import pytest
import torch
from chain import differences
from torch import nn

from ldm import UserError
from ldm.training.muon import orthogonalised
from ldm.training.step import Optimizer

SECTION = {
    "optimizer": "muon",
    "lr": 1e-2,
    "muon_lr": 0.05,
    "scale_lr": False,
    "adam_betas": [0.9, 0.99],
    "accumulate_steps": 1,
    "clip_grad_norm": None,
}
SHAPES = [(4, 4), (8, 200), (200, 8), (64, 1728)]


def iterated(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of Newton and Schulz as Jordan et al. write them, in float64."""
    x = matrix.double()
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp_min(1e-30)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_is_orthogonalised(shape):
    matrix = random(*shape) * 1e-4
    (found,) = orthogonalised(matrix[None])
    torch.testing.assert_close(found, iterated(matrix).float(), atol=1e-4, rtol=0)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    large = values > 0.02 * values.norm()
    assert ((left.mT @ found @ right.mT).diagonal()[large] - 1).abs().max() < 0.35


def test_what_rounding_could_spoil_stays_small():
    """Rank one, eigenvalues of 0 by the dozen; equal rows; and nothing at all."""
    rank_one = random(64, 1) @ random(1, 300, seed=1)
    for matrix in (rank_one, torch.ones(16, 100), random(32, 32) * 1e-12):
        torch.testing.assert_close(
            orthogonalised(matrix[None])[0], iterated(matrix).float(), atol=2e-3, rtol=0
        )
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(2, 6, 3), nn.Linear(3, 2), nn.Embedding(3, 4), nn.GroupNorm(2, 4))
    return layers.to(memory_format=torch.channels_last_3d)


def step(optimizer: Optimizer, seed: int, rate: float = 1e-2, skip: float = 0.0) -> list[torch.Tensor]:
    """One step with random gradients, which are returned."""
    gradients = [random(*p.shape, seed=seed + i) for i, p in enumerate(optimizer.parameters)]
    optimizer.backward(sum((p * g).sum() for p, g in zip(optimizer.parameters, gradients, strict=True)))
    optimizer.clip()
    optimizer.step(rate, torch.tensor(skip))
    return gradients


def test_two_steps_by_hand():
    """Matrices by Muon, at a fifth of Muon's rate where Adam's is at a fifth of its own; the rest by Adam."""
    layers = network()
    before = [p.detach().clone() for p in layers.parameters()]
    optimizer = Optimizer(layers, SECTION, None)
    gradients = [step(optimizer, 0, 1e-2), step(optimizer, 100, 2e-3)]
    names = [name for name, _ in layers.named_parameters()]
    for i, name in enumerate(names):
        weight, momentum = before[i].double(), torch.zeros_like(before[i]).double()
        mean = square = torch.zeros_like(weight)
        for count, rate in enumerate((1.0, 0.2)):
            gradient = gradients[count][i].double()
            if name in ("0.weight", "1.weight"):
                momentum = 0.95 * momentum + 0.05 * gradient
                update = iterated((0.05 * gradient + 0.95 * momentum).flatten(1))
                rows, columns = update.shape
                weight = weight - 0.05 * rate * max(1, rows / columns) ** 0.5 * update.view(weight.shape)
            else:
                mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
                corrected = (square / (1 - 0.99 ** (count + 1))).sqrt() + 1e-8
                weight = weight - 1e-2 * rate * mean / (1 - 0.9 ** (count + 1)) / corrected
        torch.testing.assert_close(dict(layers.named_parameters())[name].double(), weight, atol=2e-5, rtol=0)
    muon = [names[i] for i, one in optimizer.state_dict()["optimizer"]["state"].items() if "momentum" in one]
    assert muon == ["0.weight", "1.weight"]


def test_a_skipped_step_changes_nothing():
    layers = network()
    optimizer = Optimizer(layers, SECTION, None)
    step(optimizer, 0)
    before = copy.deepcopy((layers.state_dict(), optimizer.state_dict()["optimizer"]["state"]))
    step(optimizer, 10, skip=1.0)
    optimizer.backward(sum((p * torch.nan).sum() for p in optimizer.parameters))
    optimizer.clip()
    optimizer.step(1e-2, torch.zeros(()))
    assert not differences(before, (layers.state_dict(), optimizer.state_dict()["optimizer"]["state"]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_resumed_optimiser_takes_the_same_step(count):
    """To the bit, in another layout of memory too."""
    one, other = network(), network().to(memory_format=torch.contiguous_format)
    optimizer, resumed = (Optimizer(layers, SECTION, None) for layers in (one, other))
    for i in range(count):
        step(optimizer, 10 * i)
    other.load_state_dict(one.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()), "m.pt")
    assert resumed.muon_rate == optimizer.muon_rate == 0.05
    for each in (optimizer, resumed):
        step(each, 99, rate=5e-3)
        assert each.muon_rate == 0.025
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_a_scaled_loss_in_fp16_gives_the_same_step():
    """The scale is a power of 2. Where it overflows, neither optimiser steps, and the scale falls."""
    plain, scaled = network(), network()
    one, other = Optimizer(plain, SECTION, None), Optimizer(scaled, SECTION, torch.float16)
    for seed in (0, 10):
        step(one, seed)
        step(other, seed)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))
    scale = other.scaler.get_scale()
    before = copy.deepcopy((scaled.state_dict(), other.state_dict()["optimizer"]["state"]))
    other.backward(sum((p * 1e38).sum() for p in other.parameters))
    other.clip()
    other.step(1e-2, torch.zeros(()))
    assert other.scaler.get_scale() == scale / 2
    assert not differences(before, (scaled.state_dict(), other.state_dict()["optimizer"]["state"]))


def test_matrices_in_a_batch_do_not_know_of_each_other():
    matrices = random(5, 64, 200) * torch.tensor([1e-6, 1.0, 0.0, 1e4, 1.0])[:, None, None]
    alone = torch.cat([orthogonalised(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalised(matrices), alone, atol=1e-5, rtol=0)


def test_a_state_of_another_network_is_refused():
    muon = Optimizer(network(), SECTION, None)
    step(muon, 0)
    state = muon.state_dict()
    state["optimizer"]["state"][0]["momentum"] = torch.zeros(6, 2, 3, 3, 1)
    with pytest.raises(UserError, match="does not fit the network"):
        muon.load_state_dict(state, "m.pt")
