"""Downsampling along some axes only. MONAI's networks halve every axis at each level; an axis of thick slices
should wait until the voxels are about as wide as they are thick."""

import itertools
from collections.abc import Sequence

from monai.networks.nets.autoencoderkl import AEKLDownsample
from monai.networks.nets.controlnet import ControlNet
from monai.networks.nets.diffusion_model_unet import DiffusionUnetDownsample
from torch import nn

from ldm import UserError, brief

KEY = "level_strides"  # of a definition in a config


def check_strides(strides: object, dims: int, where: str) -> None:
    """Raise UserError unless these are lists of a 1 or 2 for each axis."""
    good = isinstance(strides, list) and all(
        isinstance(level, list) and len(level) == dims and all(type(n) is int and n in (1, 2) for n in level)
        for level in strides
    )
    if not good:
        example = [[2] * (dims - 1) + [1], [2] * dims]
        raise UserError(f"{where}.{KEY}: expected lists such as {example}, found {brief(strides)}.")


def set_strides(network: nn.Module, strides: Sequence[Sequence[int]], where: str) -> None:
    """Change the down- and upsampling layers in place; weights and their names stay.

    Where an axis is not halved, a convolution of size 3 moves along it voxel by voxel, padded on both sides.

    Args:
        network: monai.networks.nets.AutoencoderKL (without transposed convolutions), DiffusionModelUNet, or
            ControlNet, which has no upsampling layers.
        strides: for each level after the first, 2 along the axes that it halves, else 1.

    Raises:
        UserError: the network has other layers or another number of levels.
    """
    modules = list(network.modules())
    downs = [module for module in modules if isinstance(module, (AEKLDownsample, DiffusionUnetDownsample))]
    ups = [module for module in modules if isinstance(module, nn.Upsample)]
    has_ups = not isinstance(network, ControlNet)
    if len(downs) != len(strides) or len(ups) != len(strides) * has_ups:
        raise UserError(
            f"{where}.{KEY}: {len(strides)} lists for {len(downs)} down- and {len(ups)} upsampling layers. "
            "Give one for each level after the first, of monai.networks.nets.AutoencoderKL without "
            "use_convtranspose or DiffusionModelUNet."
        )
    for down, factors in zip(downs, strides, strict=True):
        if isinstance(down, AEKLDownsample):
            # F.pad counts from the last axis. An axis that is halved is padded behind, as it was.
            pads = [(0, 1) if factor == 2 else (1, 1) for factor in reversed(factors)]
            down.pad.pad = tuple(itertools.chain(*pads))
            down.conv.conv.stride = tuple(factors)
        elif down.use_conv:
            down.op.conv.stride = tuple(factors)
        else:
            down.op.kernel_size = down.op.stride = tuple(factors)
    for up, factors in zip(ups, [*reversed(strides)][: len(ups)], strict=True):
        up.scale_factor = tuple(map(float, factors))
