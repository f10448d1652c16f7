"""The search for copies finds copies whatever was done to them, and nothing else."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ldm.evaluation import copies
from ldm.evaluation.copies import TrainingVolumes, find_copies, thumbnail

CPU = torch.device("cpu")
torch.set_num_threads(1)  # faster than several on volumes this small
SHAPE = (40, 44, 36)


def brain(seed: int, shape: tuple = SHAPE) -> torch.Tensor:
    """A smooth random blob with structure of its own, dark outside, (1, 1, D, H, W)."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum((axis / rng.uniform(0.6, 0.75)) ** 2 for axis in axes) < 1
    texture = gaussian_filter(rng.normal(size=shape), 2)
    return torch.tensor(inside * (0.5 + 2 * texture), dtype=torch.float32)[None, None]


@pytest.fixture(scope="module")
def training() -> TrainingVolumes:
    return TrainingVolumes([thumbnail(brain(seed)) for seed in range(12)], CPU)


CHANGES = {
    "as it is": lambda x: x,
    "brighter, with less contrast": lambda x: 0.3 * x + 0.4,
    "moved": lambda x: torch.roll(x, (3, -4, 2), (2, 3, 4)),
    "mirrored": lambda x: x.flip(2),
    "mirrored and moved": lambda x: torch.roll(x.flip(2), (-2, 3, 1), (2, 3, 4)),
    "blurred": lambda x: torch.tensor(gaussian_filter(x.numpy(), (0, 0, 0.7, 0.7, 0.7))),
    "noisy": lambda x: x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_whatever_was_done_to_it(training, change):
    others = np.array([training.nearest(thumbnail(brain(seed))).distance for seed in range(100, 110)])
    for seed in (0, 7, 11):
        found = training.nearest(thumbnail(CHANGES[change](brain(seed))))
        assert found.index == seed and found.mirrored == ("mirrored" in change)
        assert found.distance < 0.4 * np.median(others), change
        assert find_copies(np.array([found.distance]), others).copies.all()
    assert not find_copies(others, others).copies.any()


def test_the_distance_is_that_of_the_correlation():
    """Of volumes that need no shift: sqrt(2 - 2 r)."""
    a = thumbnail(brain(3)).float()
    b = copies._normalised(0.8 * a + 0.6 * copies._normalised(thumbnail(brain(4)).float()))
    expected = math.sqrt(2 - 2 * float((a * b).sum()))
    assert TrainingVolumes([a], CPU).nearest(b).distance == pytest.approx(expected, abs=2e-3)


def test_thumbnails_are_small_and_normalised():
    small = thumbnail(brain(0, (96, 60, 120)))
    assert small.shape == (1, 38, 24, 48) and small.dtype == torch.float16
    assert float(small.float().mean()) == pytest.approx(0, abs=1e-3)
    assert float(small.float().square().sum()) == pytest.approx(1, abs=1e-2)
    assert thumbnail(torch.cat([brain(0), brain(1)], 1)).shape == (2, *SHAPE)
    assert thumbnail(torch.full((1, 1, 8, 8, 8), 0.3)).abs().max() < 1e-3  # and no division by 0


def test_volumes_of_several_channels_are_compared_in_all_of_them():
    """Alike in one channel only is no copy."""
    both = [torch.cat([brain(seed), brain(seed + 50)], 1) for seed in range(4)]
    training = TrainingVolumes([thumbnail(one) for one in both], CPU)
    assert training.nearest(thumbnail(both[2])).distance < 0.05
    half = training.nearest(thumbnail(torch.cat([brain(2), brain(99)], 1)))
    other = training.nearest(thumbnail(torch.cat([brain(98), brain(99)], 1)))
    assert half.index == 2 and 0.5 * other.distance < half.distance < 0.9 * other.distance


def test_the_threshold_and_the_three_sample_test_by_hand():
    """Held-out volumes at 1, 2, 3, of which half of the median is 1. A sample at 0.5 is a copy and is closer
    than all three, one at 2.5 than one of them: U = 2 of 6 pairs, z = (2 - 3) / sqrt(2 * 3 * 6 / 12)."""
    found = find_copies(np.array([0.5, 2.5]), np.array([1.0, 2.0, 3.0]))
    assert found.threshold == 1.0 and found.copies.tolist() == [True, False] and not found.leaks.any()
    assert found.closer == pytest.approx(4 / 6) and found.z == pytest.approx(-1 / math.sqrt(3))


def test_copies_are_found_even_if_the_held_out_scans_are_copies_too(training):
    """Where the whole split leaks, half of the held-out median is 0: identical volumes are still found."""
    distances = np.array([training.nearest(thumbnail(brain(seed))).distance for seed in range(8)])
    assert distances.max() < 2e-3
    found = find_copies(distances, distances)
    assert found.copies.all() and found.leaks.all() and found.threshold == copies.IDENTICAL


def test_a_held_out_scan_of_a_subject_that_was_trained_on_is_a_leak():
    found = find_copies(np.array([2.0]), np.array([0.1, 2.0, 2.0, 2.1]))
    assert found.leaks.tolist() == [True, False, False, False] and not found.copies.any()
