"""Classifier-free guidance, and autoguidance by an early snapshot."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ldm import UserError, configs
from ldm.models.denoiser import Autoguided, predict
from ldm.models.weights import load_weights


def guided(
    unet: Callable,
    cond: dict,
    unknown: dict,
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
) -> Callable:
    """The model function of the samplers: classifier-free guidance (Ho & Salimans, 2022, eq. 6).

    The prediction is u + guidance * (c - u), with c under `cond` and u under `unknown`; the paper's w is
    guidance - 1. At 1 it is c, in one pass of the network; else there are two.

    Args:
        interval: the times, as the network takes them, within which there is guidance (Kynkäänniemi et al.,
            2024); None: all.
    """

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = predict(unet, x, t, cond).float()
        if guidance == 1 or (interval and not interval[0] <= float(t[0]) <= interval[1]):
            return conditional
        unconditional = predict(unet, x, t, unknown).float()
        return unconditional + guidance * (conditional - unconditional)

    return model


def check_guide(section: dict) -> None:
    """Raise UserError where `diffusion_train` asks for autoguidance and keeps no snapshot to guide by."""
    if section["autoguidance"] != 1 and section["snapshot"] is None:
        raise UserError(
            "diffusion_train.autoguidance: needs a guide. Set diffusion_train.snapshot, such as to 0.3, or "
            "autoguidance to 1."
        )


def with_guide(unet: nn.Module, state: dict | None, config: dict, where: str | Path) -> Autoguided:
    """The network under autoguidance of the config's strength.

    Args:
        state: weights of the guide, the entry `guide` of a checkpoint.
        where: the checkpoint, for messages.

    Raises:
        UserError: there is no guide.
    """
    weight = config["diffusion_train"]["autoguidance"]
    if state is None:
        raise UserError(
            f"{where}: holds no early snapshot, as diffusion_train.autoguidance {weight:g} needs. Train with "
            "diffusion_train.snapshot, or set autoguidance to 1."
        )
    guide = configs.define_network(config, "diffusion_def")
    load_weights(guide, state, f"{where}: guide")
    return Autoguided(unet, guide, weight)


def with_any_guide(unet: nn.Module, config: dict, device: torch.device) -> nn.Module:
    """The network as it samples, where a forecast of memory asks for its size and not for its weights: under
    autoguidance, where the config has it, of a guide with random weights."""
    weight = config["diffusion_train"]["autoguidance"]
    if weight == 1:
        return unet
    return Autoguided(unet, configs.define_network(config, "diffusion_def").to(device), weight)
