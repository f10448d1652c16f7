"""A ControlNet beside a frozen diffusion network: the image follows a mask (Zhang et al., 2023).

The mask enters as binary-coded channels, as many as the largest label has bits, which MONAI's
`ControlNetConditioningEmbedding` brings to the grid of the latents.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from ldm import UserError
from ldm.models import maisi
from ldm.models.denoiser import REGION_INPUTS

MASK = "mask"  # the argument of `Controlled`, in `cond`
TARGETS = {  # the ControlNet of a diffusion network
    "monai.networks.nets.DiffusionModelUNet": "monai.networks.nets.ControlNet",
    maisi.UNET: maisi.CONTROLNET,
}
EMBEDDING = ("conditioning_embedding_in_channels", "conditioning_embedding_num_channels")
ONLY_IN_UNET = ("_target_", "out_channels", "dropout_cattn")  # arguments that the ControlNet lacks
ONLY_IN_UNET += ("include_spacing_input", *REGION_INPUTS)
EMBEDDING_WIDTHS = (16, 32, 64, 96, 128)
CONTRAST = 2.0  # mean difference of predictions above which a structure shows enough


def bits_of(values: Sequence[int]) -> int:
    """How many bits code these labels."""
    return max(values).bit_length()


def coded(mask: torch.Tensor, bits: int) -> torch.Tensor:
    """A mask (B, D, H, W) of whole numbers below 2^bits -> its binary digits, the lowest first,
    (B, bits, D, H, W) float32."""
    return torch.stack([(mask >> bit) & 1 for bit in range(bits)], 1).float()


def control_definition(diffusion: dict, factor: Sequence[int], values: Sequence[int]) -> dict:
    """The definition of a ControlNet for a diffusion network.

    Args:
        diffusion: the config's `diffusion_def`.
        factor: voxels per latent voxel along each axis.
        values: of the labels.

    Raises:
        UserError: MONAI has no ControlNet for such a network.
    """
    if diffusion["_target_"] not in TARGETS or diffusion["spatial_dims"] != 3:
        raise UserError(
            "controlnet_def: missing. A ControlNet is derived for MONAI's DiffusionModelUNet and MAISI's "
            "DiffusionModelUNetMaisi in 3D alone; define it for others."
        )
    halvings = max(factor).bit_length() - 1
    if any(one & (one - 1) for one in factor) or halvings >= len(EMBEDDING_WIDTHS):
        raise UserError(
            f"controlnet_def: latents are {' x '.join(map(str, factor))} times coarser than the mask; "
            "MONAI's embedding of masks needs powers of two up to 16."
        )
    definition = {key: value for key, value in diffusion.items() if key not in ONLY_IN_UNET}
    widths = list(EMBEDDING_WIDTHS[: halvings + 1])
    embedding = dict(zip(EMBEDDING, (bits_of(values), widths), strict=True))
    return {"_target_": TARGETS[diffusion["_target_"]], **definition, **embedding}


def fit_embedding(control: nn.Module, factor: Sequence[int]) -> None:
    """Change the strides of a derived ControlNet's embedding in place, so that it brings masks to latents
    that are coarser by another factor along each axis: an axis with fewer halvings waits for the others."""
    convolutions = [one for one in control.controlnet_cond_embedding.modules() if isinstance(one, nn.Conv3d)]
    halving = [one for one in convolutions if one.stride != (1, 1, 1)]
    for place, convolution in enumerate(halving):
        left = len(halving) - place  # this one included
        convolution.stride = tuple(2 if one.bit_length() - 1 >= left else 1 for one in factor)


class Controlled(nn.Module):
    """A diffusion network that follows a mask. It is called as the network is, with `mask` beside the other
    conditions.

    Args:
        unet: frozen; takes `down_block_additional_residuals` and `mid_block_additional_residual`.
        control: the ControlNet. It gets those of the conditions that it has arguments for: MAISI's has none
            for spacing and regions.
    """

    def __init__(self, unet: nn.Module, control: nn.Module):
        super().__init__()
        self.unet, self.control = unet.requires_grad_(False), control
        self.shared = {*inspect.signature(control.forward).parameters}

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, mask: torch.Tensor, **cond: torch.Tensor
    ) -> torch.Tensor:
        """(B, c, d, h, w), times (B,) and a coded mask (B, bits, D, H, W) -> the prediction."""
        shared = {key: value for key, value in cond.items() if key in self.shared}
        down, middle = self.control(x, timesteps=timesteps, controlnet_cond=mask.to(x.dtype), **shared)
        added = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        return self.unet(x, timesteps=timesteps, **cond, **added)


def start_as_unet(control: nn.Module, unet: nn.Module) -> int:
    """Copy the weights that a ControlNet shares with the diffusion network, its encoder, by name and shape;
    return how many tensors. Layers that see the embedding of the time alone, where the network's see those of
    spacing and regions after it, get the weights of the time."""
    own, theirs = control.state_dict(), unet.state_dict()
    shared = {}
    for name in own.keys() & theirs.keys():
        one = theirs[name]
        if name.endswith("time_emb_proj.weight"):
            one = one[:, : own[name].shape[1]]
        if one.shape == own[name].shape:
            shared[name] = one
    control.load_state_dict(shared, strict=False)
    return len(shared)


def contrast_loss(
    prediction: torch.Tensor, without: torch.Tensor, mask: torch.Tensor, mask_without: torch.Tensor
) -> torch.Tensor:
    """How little a prediction (B, c, d, h, w) differs from that for a mask without one of its structures,
    where that structure is, and how much elsewhere: after the contrast term of MAISI-v2 (Zhao et al., 2025).
    Masks that are the same do not count.

    Args:
        without: the other prediction, which has no gradient.
        mask, mask_without: (B, D, H, W).
    """
    changed = (mask != mask_without)[:, None].float()
    region = nn.functional.adaptive_max_pool3d(changed, without.shape[2:])
    apart = (prediction.float() - without.float()).abs().mean(1, keepdim=True)
    within = (apart * region).flatten(1).sum(1) / region.flatten(1).sum(1).clamp_min(1)
    outside = (apart * (1 - region)).flatten(1).sum(1) / (1 - region).flatten(1).sum(1).clamp_min(1)
    counts = region.flatten(1).amax(1)
    return (counts * ((CONTRAST - within).relu() + outside)).sum() / counts.sum().clamp_min(1)


def region_weights(
    mask: torch.Tensor, labels: Sequence[int], weight: float, size: Sequence[int]
) -> torch.Tensor:
    """Weights of latent voxels: `weight` where a voxel of one of the labels lies in or beside them, else 1;
    of mean 1 in each volume, so that the scale of the loss does not follow the size of a structure.

    Regions are found by maximum, so that a structure of one voxel counts.

    Args:
        mask: (B, D, H, W) whole numbers.
        size: of the latents, (d, h, w).

    Returns:
        (B, 1, d, h, w) float32.
    """
    inside = sum(mask == label for label in labels).float()[:, None]
    region = nn.functional.adaptive_max_pool3d(inside, tuple(size))
    region = nn.functional.max_pool3d(region, 3, 1, 1)
    weights = 1 + (weight - 1) * region
    return weights / weights.mean((1, 2, 3, 4), keepdim=True)
