"""MAISI's networks, built for any device, size and precision.

Its classes split convolutions, round group norms to float16 and empty the GPU's cache so that large volumes
fit. Here `--max-memory` limits the memory instead, and the values are those of the whole network.
"""

from torch import nn

from ldm.system.messages import tell_once

PACKAGE = "monai.apps.generation.maisi.networks."
UNET, CONTROLNET = (
    f"{PACKAGE}{module}"
    for module in (
        "diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
        "controlnet_maisi.ControlNetMaisi",
    )
)


def plain_arguments(cls: type[nn.Module], arguments: dict, where: str) -> dict:
    """The arguments of a class with which it runs anywhere: those of others as they are, of MAISI's

    - `num_splits` 1: splitting changes no value, but loses voxels of a side that it does not divide;
    - `use_flash_attention` false: the class wants a GPU for it, and attention is fused anyway;
    - `norm_float16` false: its convolutions, in float32, cannot take what it gives. This is told.
    """
    if not cls.__module__.startswith(PACKAGE.rstrip(".")):
        return arguments
    changed = {"use_flash_attention": False} if "use_flash_attention" in arguments else {}
    if cls.__name__ == "AutoencoderKlMaisi":
        changed |= {"num_splits": 1, "save_mem": False, "norm_float16": False}
    if arguments.get("norm_float16"):
        tell_once(
            f"note: {where}.norm_float16 is not followed: float16 is for mixed precision, and --max-memory "
            "limits the memory"
        )
    return {**arguments, **changed}


def plain_norms(network: nn.Module) -> None:
    """Make MAISI's group norms, which compute one group after another in a fixed memory layout, those of
    torch, in place. Their weights and names are the same."""
    for module in network.modules():
        if type(module).__name__ == "MaisiGroupNorm3D":
            module.__class__ = nn.GroupNorm
