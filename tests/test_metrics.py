"""Metrics of volumes whose numbers are known by hand."""

import math

import numpy as np
import pytest
import torch

from ldm.metrics import (
    BINS,
    RadialSpectrum,
    band_power,
    histogram,
    histogram_distance,
    ms_ssim,
    reconstruction_metrics,
    scales_of,
    spectrum_distance,
    tissue_volumes,
)


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


# ---------------------------------------------------------------- MS-SSIM


@pytest.mark.parametrize(
    "size, scales", [((64, 80, 64), 5), ((40, 48, 40), 4), ((32, 32, 32), 3), ((4, 9, 9), 1), ((3, 9, 9), 0)]
)
def test_scales_for_which_there_is_room(size, scales):
    assert scales_of(size) == scales


def test_ms_ssim_of_the_same_of_similar_and_of_other_volumes():
    a, b = numbers(1, 1, 32, 32, 32), numbers(1, 1, 32, 32, 32, seed=1)
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert 0.2 > ms_ssim(a, b) < ms_ssim(a, 0.5 * a + 0.5 * b) < 1
    with pytest.raises(ValueError, match="4 voxels"):
        ms_ssim(a[..., :3], b[..., :3])


def test_ms_ssim_of_constants():
    """Of one scale only the luminance counts: (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2."""
    a, b = 0.2, 0.6
    found = ms_ssim(torch.full((1, 1, 6, 6, 6), a), torch.full((1, 1, 6, 6, 6), b))
    assert found == pytest.approx((2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4), rel=1e-3)


# ---------------------------------------------------------------- spectrum


def test_spectrum_of_a_sinusoid_lies_in_its_shell():
    """A cos(2 pi f x) over N voxels: |FFT|^2 = (A N / 2)^2 at f and -f; the mean of their shell."""
    size, f, amplitude = (16, 16, 16), 5 / 16, 0.3
    spectrum = RadialSpectrum(size)
    wave = amplitude * torch.cos(2 * math.pi * f * torch.arange(16.0)).reshape(16, 1, 1).expand(size) + 0.5
    found = spectrum(wave[None, None])
    assert spectrum.frequencies.tolist() == pytest.approx([k / 16 for k in range(1, 9)])
    cycles = [min(k, 16 - k) / 16 for k in range(16)]
    shell = sum(round(16 * math.hypot(x, y, z)) == 5 for x in cycles for y in cycles for z in cycles)
    expected = 2 * (amplitude * 16**3 / 2) ** 2 / 16**3 / shell
    assert found[4] == pytest.approx(expected, rel=1e-5)
    assert np.delete(found, 4).max() < 1e-10 * expected  # neither the mean nor any other frequency


def test_spectrum_of_white_noise_is_flat_in_odd_and_even_sizes():
    noise = 0.2 * torch.randn(1, 2, 31, 40, 33, generator=torch.Generator().manual_seed(0))
    assert RadialSpectrum((31, 40, 33))(noise)[3:] == pytest.approx(0.04, rel=0.1)


def test_spectrum_distance_by_hand():
    """Twice the amplitude is 6.02 dB more at every frequency; of one frequency in four, a quarter of that."""
    rows = np.array([[1.0, 2, 3, 4], [3.0, 2, 1, 4]])
    assert spectrum_distance(4 * rows, rows) == pytest.approx(10 * math.log10(4))
    assert spectrum_distance(rows * [1, 1, 4, 1], rows) == pytest.approx(10 * math.log10(4) / 4)
    assert spectrum_distance(rows, rows[::-1]) == 0


# ---------------------------------------------------------------- histogram and tissues


def test_histogram_leaves_the_background_out():
    volume = torch.tensor([0.0] * 90 + [0.01] * 10 + [0.5] * 30 + [1.0] * 10).reshape(1, 1, 10, 14, 1)
    found = histogram(volume)
    assert (
        found.sum() == pytest.approx(1)
        and found[128] == pytest.approx(0.75)
        and found[-1] == pytest.approx(0.25)
    )
    assert histogram(torch.zeros(1, 1, 4, 4, 4)).sum() == 0


def test_histogram_distance_is_how_far_intensities_were_moved():
    volume = 0.2 + 0.5 * numbers(1, 1, 16, 16, 16)
    rows = [histogram(volume + shift)[None] for shift in (0, 0.1)]
    assert histogram_distance(*rows) == pytest.approx(0.1, abs=1 / BINS)
    assert histogram_distance(rows[0], rows[0]) == 0
    assert math.isnan(histogram_distance(rows[0], 0 * rows[0]))


def test_tissue_volumes_of_known_classes():
    """1000 dark, 2000 middle and 3000 bright voxels of 2 x 2 x 1 mm: 4, 8 and 12 ml."""
    rng = np.random.default_rng(0)
    parts = [np.zeros(4000), *(rng.normal(m, 0.01, n) for m, n in ((0.2, 1000), (0.5, 2000), (0.8, 3000)))]
    volume = np.concatenate(parts).reshape(10, 10, 100).astype(np.float32)
    found = tissue_volumes(volume, (2.0, 2.0, 1.0))
    assert [found.foreground, found.dark, found.middle, found.bright] == pytest.approx(
        [24, 4, 8, 12], rel=2e-3
    )
    flat = tissue_volumes(np.full((5, 5, 5), 0.5), (1.0, 1.0, 1.0))
    assert flat.foreground == pytest.approx(0.125) and math.isnan(flat.dark)
    assert tissue_volumes(np.zeros((5, 5, 5)), (1.0, 1.0, 1.0)).foreground == 0
