"""A trained model as safetensors and TorchScript. Each gives the volumes of `inference.py`, up to
rounding."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ldm import UserError
from ldm.generation import Networks
from ldm.models.definitions import latent_size, network_divisor
from ldm.models.denoiser import Autoguided, predict
from ldm.system.checkpoints import save_safetensors, weights_hash
from ldm.system.files import sha256_of, write_json, written_whole

TOLERANCE = 1e-4  # share of its largest value by which a trace may differ from what was traced


# ---------------------------------------------------------------- safetensors


def write_safetensors(folder: Path, networks: Networks, config: dict, origin: dict) -> None:
    """One file a network, for `inference.py --autoencoder FILE --unet FILE`.

    Args:
        origin: the `history` of each checkpoint.
    """
    autoencoder, (unet, guide) = weights_of(networks.autoencoder.network), weights_and_guide(networks)
    needed = {
        "scale_factor": networks.scale_factor,
        "autoencoder": weights_hash(autoencoder),
        "latent_shape": networks.latent_shape,
        "geometry": networks.geometry,
        "shift": networks.process.shift,
        **networks.conditions.state(),
        "guide": guide,
    }
    for name, weights, more in (("autoencoder", autoencoder, {}), ("diffusion_unet", unet, needed)):
        trained = origin[name]
        facts = {"config": trained["config"] or config, "checkpoint_sha256": trained["sha256"]}
        facts |= {key: trained[key] for key in ("step", "validation") if trained[key]}
        save_safetensors(folder / f"{name}.safetensors", {**facts, **more, "model": weights})


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Its state dict, on the CPU."""
    return {name: one.detach().cpu().contiguous() for name, one in network.state_dict().items()}


def weights_and_guide(networks: Networks) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """State dicts of the diffusion network and of its guide; None without autoguidance."""
    if isinstance(networks.unet, Autoguided):
        return weights_of(networks.unet.unet), weights_of(networks.unet.guide)
    return weights_of(networks.unet), None


# ---------------------------------------------------------------- TorchScript


class Call(nn.Module):
    """A module of a call of a network, since only modules can be traced."""

    def __init__(self, network: nn.Module, call: Callable):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """`call(network, *inputs)`."""
        return self.call(self.network, *inputs)


def write_torchscript(folder: Path, networks: Networks, config: dict) -> dict:
    """encode.ts, decode.ts and unet.ts, in float32, and model.json, which says how to sample with them.

    Returns:
        The `batch` and `size` that each takes; None where any batch does, and any size whose sides are
        multiples of `sides_are_multiples_of`.

    Raises:
        FloatingPointError: a trace gives other values than its network.
        UserError: a condition that a trace does not take.
    """
    for key in ("spacing", "region", "modality"):
        if config["conditions"][key]:
            raise UserError(f"conditions.{key}: no TorchScript is made with it. Give --formats safetensors.")
    generator = torch.Generator().manual_seed(0)
    plain = {"memory_format": torch.contiguous_format}
    autoencoder, unet = networks.autoencoder.network.to(**plain), networks.unet.to(**plain)
    process, conditions, scale_factor = networks.process, networks.conditions, networks.scale_factor

    def encode(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = network.encode(images)
        return mean.float() * scale_factor, std.float() * scale_factor

    def decode(network: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        return network.decode(latents / scale_factor).float()

    def model(network: nn.Module, latents: torch.Tensor, times: torch.Tensor, *given: torch.Tensor):
        return predict(network, latents, times, conditions.cond_of(len(latents), *given))

    def images(batch: int, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return (torch.rand(batch, config["volume_channels"], *size, generator=generator),)

    def latents(batch: int, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, networks.latent_shape[0], *size, generator=generator),)

    def noisy(batch: int, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        times = torch.rand(batch, generator=generator) * process.num_train_timesteps
        given = []
        if conditions.column is not None:
            given.append(torch.arange(batch) % (len(conditions.values) + 1))
        if conditions.covariates:
            given.append(torch.rand(batch, conditions.covariates.size, generator=generator))
        return *latents(batch, size), times, *given

    sides = network_divisor(config)
    divisor, latent_divisor = math.lcm(*sides), math.lcm(*latent_size(config, sides))
    takes = {}
    for name, module, example, size, multiple in (
        ("encode", Call(autoencoder, encode), images, networks.geometry["size"], divisor),
        ("decode", Call(autoencoder, decode), latents, networks.latent_shape[1:], latent_divisor),
        ("unet", Call(unet, model), noisy, networks.latent_shape[1:], latent_divisor),
    ):
        script, general = traced(name, module.eval(), example, size, multiple)
        with written_whole(folder / f"{name}.ts") as file:
            torch.jit.save(script, file)
        takes[name] = {"batch": None if general else 1, "size": None if general else list(size)}
        takes[name] |= {"sides_are_multiples_of": multiple} if general else {}
    sampler, steps = networks.sampling()
    facts = {
        "latent_shape": networks.latent_shape,
        "geometry": networks.geometry,
        "scale_factor_inside": scale_factor,
        "takes": takes,
        "sampler": sampler,
        "steps": steps,
        "conditions": conditions.state().get("conditions", {}),
        "process": {
            "prediction": process.prediction,
            "num_train_timesteps": process.num_train_timesteps,
            "shift": process.shift,
            "alphas_cumprod": None if process.is_flow else process.alphas_cumprod.tolist(),
        },
    }
    write_json(folder / "model.json", facts)
    return takes


def traced(
    name: str, module: nn.Module, example: Callable, size: Sequence[int], multiple: int
) -> tuple[torch.jit.ScriptModule, bool]:
    """A network as TorchScript, with its weights as constants, checked against the network.

    A small volume is traced, and a batch of two of another shape compared. Where that fails, since a network
    reads its input's size in Python, a volume of the true size is traced, and the script takes no other.

    Args:
        example: `example(batch, size)` -> inputs for volumes of so many voxels.
        size: the true one.
        multiple: what sides are multiples of.

    Returns:
        The script, and whether it takes any batch and any such sides.

    Raises:
        FloatingPointError: it gives other values.
    """
    try:
        script = _trace(module, example(1, [2 * multiple] * 3))
        if _difference(script, module, example(2, [3 * multiple, 2 * multiple, 2 * multiple])) < TOLERANCE:
            return script, True
    except Exception:  # whatever a class of another package raises at a size that it was not traced at
        pass
    script = _trace(module, example(1, size))
    apart = _difference(script, module, example(1, size))
    if not apart < TOLERANCE:
        raise FloatingPointError(
            f"{name}: TorchScript's values differ by {apart:.1e} of the largest. Export the other --formats."
        )
    return script, False


@torch.no_grad()
def _trace(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python values in the trace, which is compared; of its age
        script = torch.jit.trace(module, inputs, check_trace=False)
        # Computes what follows from constants, such as the UNet's frequencies, whose device would be fixed.
        return torch.jit.freeze(script)


@torch.no_grad()
def _difference(script: nn.Module, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Largest difference, as a share of the largest value; NaN where a value is."""
    outputs = script(*inputs), module(*inputs)
    pairs = zip(*((one,) if isinstance(one, torch.Tensor) else one for one in outputs), strict=True)
    shares = [(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs]
    return torch.stack(shares).max().item()


# ---------------------------------------------------------------- checksums


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of all files below a folder, for `sha256sum --check`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    with written_whole(folder / "SHA256SUMS") as file:
        file.write("".join(lines).encode())
