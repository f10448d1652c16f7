"""Metrics of volumes whose numbers are known by hand."""

import math

import pytest
import torch

from ldm.metrics import band_power, reconstruction_metrics


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", [16, 7, 3])  # SSIM's window of 11 voxels, and smaller ones
def test_perfect_and_offset_volumes(side):
    image = 0.5 * numbers(3, 1, side, side, side)
    offsets = torch.tensor([0.0, 0.1, 0.01]).reshape(3, 1, 1, 1, 1)
    metrics = reconstruction_metrics(image + offsets, image)
    assert metrics["l1"].tolist() == pytest.approx([0, 0.1, 0.01], abs=1e-6)
    assert metrics["psnr"].tolist() == pytest.approx(
        [math.inf, 20, 40], rel=1e-4
    )  # of each volume, not of all
    assert metrics["ssim"][0] == pytest.approx(1, abs=1e-5)
    assert metrics["ssim"][1] < metrics["ssim"][2] < 1


def test_psnr_and_l1_of_an_error_in_a_quarter_of_the_voxels():
    image = numbers(1, 2, 8, 8, 8)
    reconstruction = image.clone()
    reconstruction[:, :, :4, :4] += 0.2
    metrics = reconstruction_metrics(reconstruction, image)
    assert metrics["l1"].item() == pytest.approx(0.05, rel=1e-4)
    assert metrics["psnr"].item() == pytest.approx(-10 * math.log10(0.2**2 / 4), rel=1e-4)  # range 1


def test_ssim_of_constants():
    """With no variance the structure term is 1, and SSIM = (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2."""
    a, b = 0.2, 0.6
    metrics = reconstruction_metrics(torch.full((1, 1, 12, 12, 12), a), torch.full((1, 1, 12, 12, 12), b))
    assert metrics["ssim"].item() == pytest.approx((2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4), rel=5e-3)


def test_ssim_of_the_negative():
    image = numbers(1, 1, 16, 16, 16)
    assert reconstruction_metrics(1 - image, image)["ssim"].item() < -0.5


def in_band(shape, low=0.25, high=0.5) -> int:
    """Number of frequencies of a volume's spectrum between two radii."""
    cycles = [[min(k, n - k) / n for k in range(n)] for n in shape]
    return sum(low <= math.hypot(x, y, z) < high for x in cycles[0] for y in cycles[1] for z in cycles[2])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_band_power_of_a_sinusoid(axis):
    """A cos(2 pi f x) over N voxels has |FFT|^2 = (A N / 2)^2 at f and -f (Parseval: together N sum(x^2))."""
    shape, amplitude = (16, 20, 24), 0.7
    count, n = 16 * 20 * 24, shape[axis]
    x = torch.arange(float(n)).reshape([n if a == axis else 1 for a in range(3)])

    def wave(k):
        return (amplitude * torch.cos(2 * math.pi * k / n * x)).expand(shape)[None, None] + 3

    power = 2 * (amplitude * count / 2) ** 2 / in_band(shape) / count
    inside, below = round(0.35 * n), round(0.15 * n)
    assert band_power(wave(inside)).tolist() == pytest.approx([power], rel=1e-4)
    assert band_power(wave(below)).item() < 1e-6 * power  # neither it nor the constant 3
    assert band_power(wave(below), 0.1, 0.2).item() == pytest.approx(
        2 * (amplitude * count / 2) ** 2 / in_band(shape, 0.1, 0.2) / count, rel=1e-4
    )
    both = torch.cat([wave(inside), wave(below)])
    assert band_power(both).tolist() == pytest.approx([power, 0], rel=1e-4, abs=1e-6)  # of each volume
    assert band_power(both.transpose(0, 1)).tolist() == pytest.approx(
        [power / 2], rel=1e-4
    )  # mean of channels


def test_band_power_of_white_noise_is_its_variance():
    noise = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    assert band_power(noise).item() == pytest.approx(0.09, rel=0.05)
    blurred = torch.nn.functional.avg_pool3d(noise, 3, 1, 1)
    assert band_power(blurred).item() < 0.1 * band_power(noise).item()
