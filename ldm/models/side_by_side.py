"""Two autoencoders, one of the image and one of its labels, whose latents lie side by side."""

from collections.abc import Sequence

import torch
from monai.networks.nets import AutoencoderKL
from torch import nn


class SideBySide(nn.Module):
    """An autoencoder for `with_labels` whose image does not share latent channels with its labels.

    Args:
        in_channels, out_channels: of the volumes, those of the image first.
        image_channels: how many of them are the image's.
        latent_channels: of both together.
        label_latents: how many of them, the last, are those of the labels.
        channels: widths of the image's autoencoder.
        label_widths: widths of the other.
        arguments: others of `monai.networks.nets.AutoencoderKL`, for both.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_channels: int,
        latent_channels: int,
        label_latents: int,
        channels: Sequence[int],
        label_widths: Sequence[int],
        **arguments,
    ):
        super().__init__()
        if not 0 < label_latents < latent_channels or not image_channels < in_channels == out_channels:
            raise ValueError("expected latents of both, and channels of labels after those of the image")
        if len(channels) != len(label_widths):
            raise ValueError(f"label_widths: expected {len(channels)} levels, found {len(label_widths)}")
        self.latent_channels, self.split = latent_channels, (image_channels, in_channels - image_channels)
        self.latent_split = (latent_channels - label_latents, label_latents)
        self.image, self.labels = (
            AutoencoderKL(
                in_channels=count, out_channels=count, latent_channels=latents, channels=widths, **arguments
            )
            for count, latents, widths in zip(
                self.split, self.latent_split, (channels, label_widths), strict=True
            )
        )

    @property
    def encoder(self) -> nn.Module:
        """That of the image, whose strides are those of both."""
        return self.image.encoder

    @property
    def parts(self) -> tuple[AutoencoderKL, AutoencoderKL]:
        """The two autoencoders."""
        return self.image, self.labels

    def parts_of(self, volumes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The channels of volumes (B, C, D, H, W) that each of the two gets."""
        return volumes.split(self.split, 1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, D, H, W) -> mean and std of the posterior, (B, c, d, h, w) each."""
        found = [part.encode(one) for part, one in zip(self.parts, self.parts_of(x), strict=True)]
        return tuple(torch.cat(both, 1) for both in zip(*found, strict=True))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, c, d, h, w) -> volumes (B, C, D, H, W)."""
        halves = z.split(self.latent_split, 1)
        return torch.cat([part.decode(one) for part, one in zip(self.parts, halves, strict=True)], 1)
