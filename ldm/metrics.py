"""Numbers about volumes: tensors in, numbers out."""

import torch
from monai.metrics import PSNRMetric, SSIMMetric


def reconstruction_metrics(reconstruction: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """PSNR in dB, SSIM and L1 of each volume, data range 1: two (B, C, D, H, W) -> tensors of (B,).

    SSIM's Gaussian window is 11 voxels, or the largest odd number that a smaller volume holds.
    """
    window = min(11, (min(image.shape[2:]) - 1) // 2 * 2 + 1)
    return {
        "psnr": PSNRMetric(max_val=1.0)(reconstruction, image).mean(1),
        "ssim": SSIMMetric(spatial_dims=3, data_range=1.0, win_size=window)(reconstruction, image).mean(1),
        "l1": (reconstruction - image).abs().mean((1, 2, 3, 4)),
    }


def band_power(volumes: torch.Tensor, low: float = 0.25, high: float = 0.5) -> torch.Tensor:
    """Spectral power between two radial frequencies in cycles a voxel: (B, C, D, H, W) -> (B,).

    Fine detail lives there; a blurred volume has little. Mean of |FFT|^2 over the band, over voxels and
    channels.
    """
    spectrum = torch.fft.fftn(volumes.float(), dim=(-3, -2, -1)).abs().square()
    axes = [torch.fft.fftfreq(n, device=volumes.device) for n in volumes.shape[-3:]]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    band = (radius >= low) & (radius < high)
    return spectrum[..., band].mean((1, 2)) / volumes[0, 0].numel()
