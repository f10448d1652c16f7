"""2D networks on volumes, slice by slice along the last axis.

A 2D network of a config becomes one that takes volumes: each axial slice is an item of its batch. So data,
latents, noise, samplers, files and evaluation are those of volumes, whose latents are not downsampled from
slice to slice.
"""

import torch
from torch import nn

AXES = 3  # of a volume


def as_slices(volumes: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W, D) -> (B * D, C, H, W)."""
    return volumes.movedim(-1, 1).flatten(0, 1)


def as_volumes(slices: torch.Tensor, batch: int) -> torch.Tensor:
    """(B * D, C, H, W) -> (B, C, H, W, D)."""
    return slices.unflatten(0, (batch, -1)).movedim(1, -1)


class SliceWise(nn.Module):
    """What `on_volumes` makes of a 2D network."""


class _Autoencoder(SliceWise):
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(as_volumes(one, len(x)) for one in super().encode(as_slices(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return as_volumes(super().decode(as_slices(z)), len(z))


class _Denoiser(SliceWise):
    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        depth = x.shape[-1]
        each = {name: value.repeat_interleave(depth, 0) for name, value in cond.items()}
        slices = super().forward(as_slices(x), timesteps=timesteps.repeat_interleave(depth, 0), **each)
        return as_volumes(slices, len(x))


class _Discriminator(SliceWise):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return super().forward(as_slices(x))


def on_volumes(network: nn.Module) -> nn.Module:
    """Make a 2D autoencoder, diffusion network or PatchDiscriminator take volumes, in place; its weights and
    their names stay. Others are left as they are."""
    kinds = {"decode": _Autoencoder, "time_embed": _Denoiser, "final_conv": _Discriminator}
    kind = next((kind for name, kind in kinds.items() if hasattr(network, name)), None)
    if kind:
        network.__class__ = type(type(network).__name__, (kind, type(network)), {})
    return network


def per_volume_axis(factor: tuple[int, ...]) -> tuple[int, ...]:
    """Factors of each axis of a volume: 1 from slice to slice for a 2D network."""
    return (*factor, *(1,) * (AXES - len(factor)))


def within(volumes: torch.Tensor, geometry: dict) -> torch.Tensor:
    """Volumes (B, C, H, W, D) whose other slices than the `slices` of a geometry are 0, in place: a network
    that was not trained on empty slices cannot draw them."""
    if "slices" in geometry:
        first, end = geometry["slices"]
        volumes[..., :first] = volumes[..., end:] = 0
    return volumes
