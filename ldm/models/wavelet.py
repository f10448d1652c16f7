"""Haar wavelets, or the voxels themselves, in the place of a learned autoencoder. Nothing is trained."""

from collections.abc import Iterable

import torch
from torch import nn

SMALLEST_STD = 1e-4  # of a band, in the unit range; dividing by less would amplify rounding
WHITENING = 0.5  # 0 keeps the variances of the bands, 1 makes them equal


class Haar(nn.Module):
    """The orthonormal Haar transform with the interface of an autoencoder: lossless, without weights.

    Each level halves the sides and makes 4 (2D) or 8 (3D) bands of every channel, as a wavelet packet: C
    channels become C * 8^levels in 3D. With 0 levels the latents are the voxels. From each band its mean is
    subtracted, and it is divided by its standard deviation to the power `WHITENING`; `fit` measures both, and
    checkpoints keep them. Friedrich et al., "WDM" (2024), train diffusion models on such bands. In 2D the
    slices of volumes are transformed, along their first two axes.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the images.
        levels: how often the sides are halved.
    """

    def __init__(self, spatial_dims: int, in_channels: int, levels: int):
        super().__init__()
        self.spatial_dims, self.levels = spatial_dims, levels
        self.latent_channels = in_channels * 2 ** (spatial_dims * levels)
        self.register_buffer("mean", torch.zeros(self.latent_channels))
        self.register_buffer("gain", torch.ones(self.latent_channels))

    @property
    def factor(self) -> tuple[int, ...]:
        """Voxels per latent voxel along each axis."""
        return (2**self.levels,) * self.spatial_dims

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, D, H, W) -> the bands (B, c, d, h, w), float32, and zeros: a posterior without spread."""
        bands = self.bands(images)[-1]
        scaled = (bands - _along_channels(self.mean, bands)) * _along_channels(self.gain, bands)
        return scaled, torch.zeros_like(scaled)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, c, d, h, w) -> images (B, C, D, H, W), float32."""
        x = latents.float() / _along_channels(self.gain, latents) + _along_channels(self.mean, latents)
        for _ in range(self.levels):
            for axis in range(self.spatial_dims + 1, 1, -1):
                low, high = x.chunk(2, 1)
                x = torch.stack([low + high, low - high], axis + 1).flatten(axis, axis + 1) * 0.5**0.5
        return x

    def bands(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The bands of each level, as they are; those of level 0 are the images."""
        every = [images.float()]
        for _ in range(self.levels):
            x = every[-1]
            for axis in range(2, self.spatial_dims + 2):
                even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
                x = torch.cat([even + odd, even - odd], 1) * 0.5**0.5
            every.append(x)
        return every

    @torch.no_grad()
    def fit(self, volumes: Iterable[torch.Tensor]) -> None:
        """Measure mean and standard deviation of each band over volumes (1, C, D, H, W)."""
        sums, count = torch.zeros(2, self.latent_channels, dtype=torch.float64), 0
        for volume in volumes:
            values = self.bands(volume)[-1].transpose(0, 1).flatten(1).double().cpu()
            sums += torch.stack([values.sum(1), values.square().sum(1)])
            count += values.shape[1]
        mean, square = sums / count
        std = (square - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        self.gain.copy_(torch.where(std > SMALLEST_STD, std, std.max()) ** -WHITENING)


def _along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *(1,) * (x.ndim - 2))
