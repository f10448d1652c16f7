"""Call a diffusion network with its conditions: `cond`, a dict of tensors, `{}` where nothing is conditioned.

Its keys are the arguments of the network: `class_labels` (B,) int64, or (B, k) float32 of a network that
embeds covariates, `context` (B, n, e), and MAISI's `spacing_tensor` (B, 3), `top_region_index_tensor` and
`bottom_region_index_tensor` (B, 4), `down_block_additional_residuals` and `mid_block_additional_residual` of
a ControlNet. The key `channels` is the exception: (B, k, d, h, w), appended to the noisy latents.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ldm.models.embedding import COVARIATES

REGION_INPUTS = {
    "include_top_region_index_input": "top_region_index_tensor",
    "include_bottom_region_index_input": "bottom_region_index_tensor",
}


def predict(unet: Callable, zt: torch.Tensor, timesteps: torch.Tensor, cond: dict) -> torch.Tensor:
    """What the network predicts at noisy latents (B, c, d, h, w) and times (B,), under these conditions."""
    inputs = dict(cond)
    if "channels" in inputs:
        zt = torch.cat([zt, inputs.pop("channels").to(zt.dtype)], 1)
    return unet(zt, timesteps=timesteps, **inputs)


class Autoguided(nn.Module):
    """A diffusion network guided by a worse version of itself: g + weight * (d - g), d being the prediction
    of the network and g that of its early snapshot, under the same conditions (Karras et al., 2024, eq. 2).

    Where the two differ, the snapshot errs as the network does, only more: samples move away from that.
    """

    def __init__(self, unet: nn.Module, guide: nn.Module, weight: float):
        super().__init__()
        self.unet, self.guide, self.weight = unet, guide, weight

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        """As the network's: (B, c, d, h, w), float32."""
        guide = self.guide(x, timesteps=timesteps, **cond).float()
        return guide + self.weight * (self.unet(x, timesteps=timesteps, **cond).float() - guide)


def added_channels(definition: dict) -> int:
    """Channels that `cond` appends to the latents: the network's inputs beyond its outputs."""
    return definition["in_channels"] - definition["out_channels"]


def example_cond(definition: dict, batch: int, size: Sequence[int]) -> dict[str, torch.Tensor]:
    """Zeros in the place of every condition that a network needs, by its definition in the config.

    Args:
        definition: the config's `diffusion_def`.
        batch: samples.
        size: of the latents, (d, h, w).
    """
    cond = {}
    if definition.get(COVARIATES):
        cond["class_labels"] = torch.zeros(batch, definition[COVARIATES])
    elif definition.get("num_class_embeds"):
        cond["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    if definition.get("with_conditioning"):
        cond["context"] = torch.zeros(batch, 1, definition["cross_attention_dim"])
    if definition.get("include_spacing_input"):
        cond["spacing_tensor"] = torch.zeros(batch, 3)
    for key, name in REGION_INPUTS.items():
        if definition.get(key):
            cond[name] = torch.zeros(batch, 4)
    if (extra := added_channels(definition)) > 0:
        cond["channels"] = torch.zeros(batch, extra, *size)
    return cond
