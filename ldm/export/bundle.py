"""A trained model as others use it: safetensors, TorchScript, a MONAI bundle, and a card that tells what it
is.

Each form gives the volumes of `inference.py`, to rounding. The bundle's `scripts/sampling.py` is made of this
project's own functions, so that it needs torch, MONAI and nibabel only.
"""

import importlib
import inspect
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ldm.data.intensity import from_unit_range
from ldm.diffusion import samplers
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import SAMPLERS, choose_sampler, sample_latents
from ldm.export.model_card import version_of
from ldm.generation import Networks, nifti_bytes
from ldm.models.definitions import downsampling, network_divisor
from ldm.system.checkpoints import save_safetensors, weights_hash
from ldm.system.files import sha256_of, write_json, written_whole

FORMATS = ("safetensors", "torchscript", "bundle")
TOLERANCE = 1e-4  # share of its largest value by which a trace may differ from what was traced
BUNDLE_SCHEMA = (  # what `monai.bundle verify_metadata` checks metadata.json against
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- safetensors


def write_safetensors(folder: Path, networks: Networks, config: dict, origin: dict) -> None:
    """A file a network, which `inference.py --autoencoder FILE --unet FILE` reads.

    Args:
        origin: the `history` of each checkpoint.
    """
    autoencoder, unet = _weights(networks.autoencoder.network), _weights(networks.unet)
    follows = {
        "scale_factor": networks.scale_factor,
        "autoencoder": weights_hash(autoencoder),
        "latent_shape": networks.latent_shape,
        "geometry": networks.geometry,
        "shift": networks.process.shift,
    }
    for name, weights, facts in (("autoencoder", autoencoder, {}), ("diffusion_unet", unet, follows)):
        trained = origin[name]
        known = {key: trained[key] for key in ("step", "validation") if trained[key]}
        facts = {"config": trained["config"] or config, **known, **facts}
        facts["checkpoint_sha256"] = trained["sha256"]
        save_safetensors(folder / f"{name}.safetensors", {**facts, "model": weights})


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().cpu().contiguous() for name, one in network.state_dict().items()}


# ---------------------------------------------------------------- TorchScript


class Encode(nn.Module):
    """(B, C, D, H, W) in [0, 1] -> mean and std of the scaled latents, each (B, c, d, h, w)."""

    def __init__(self, autoencoder: nn.Module, scale_factor: float):
        super().__init__()
        self.autoencoder, self.scale_factor = autoencoder, scale_factor

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See above."""
        mean, std = self.autoencoder.encode(images)
        return mean.float() * self.scale_factor, std.float() * self.scale_factor


class Decode(nn.Module):
    """Scaled latents (B, c, d, h, w) -> (B, C, D, H, W), about [0, 1]."""

    def __init__(self, autoencoder: nn.Module, scale_factor: float):
        super().__init__()
        self.autoencoder, self.scale_factor = autoencoder, scale_factor

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """See above."""
        return self.autoencoder.decode(latents / self.scale_factor).float()


def write_torchscript(folder: Path, networks: Networks, config: dict) -> dict:
    """encode.ts, decode.ts and unet.ts, in float32, and model.json, which says how to sample with them.

    Returns:
        Of each, the `batch` and `size` that it takes, None where any does whose sides are multiples of
        `sides_are_multiples_of`.

    Raises:
        FloatingPointError: a trace gives other values than its network.
    """
    generator = torch.Generator().manual_seed(0)
    image_channels, latent_channels = config["image_channels"], networks.latent_shape[0]
    plain = {"memory_format": torch.contiguous_format}
    autoencoder, unet = networks.autoencoder.network.to(**plain), networks.unet.to(**plain)
    scale_factor, last = networks.scale_factor, networks.process.num_train_timesteps

    def images(batch: int, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return (torch.rand(batch, image_channels, *size, generator=generator),)

    def latents(batch: int, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, latent_channels, *size, generator=generator),)

    def noisy(batch: int, size: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return *latents(batch, size), torch.rand(batch, generator=generator) * last

    divisor, factor = network_divisor(config), downsampling(config["autoencoder_def"])
    image_size, latent_size = networks.geometry["size"], networks.latent_shape[1:]
    sizes = {}
    for name, module, example, size, multiple in (
        ("encode", Encode(autoencoder, scale_factor), images, image_size, divisor),
        ("decode", Decode(autoencoder, scale_factor), latents, latent_size, divisor // factor),
        ("unet", unet, noisy, latent_size, divisor // factor),
    ):
        script, general = traced(name, module.eval(), example, size, multiple)
        with written_whole(folder / f"{name}.ts") as file:
            torch.jit.save(script, file)
        sizes[name] = {"batch": None if general else 1, "size": None if general else list(size)}
        sizes[name] |= {"sides_are_multiples_of": multiple} if general else {}
    process, sampler = networks.process, choose_sampler(None, networks.process)
    facts = {
        "latent_shape": networks.latent_shape,
        "geometry": networks.geometry,
        "scale_factor_inside": scale_factor,
        "takes": sizes,
        "sampler": sampler,
        "steps": _steps(sampler, process),
        "process": {
            "prediction": process.prediction,
            "num_train_timesteps": process.num_train_timesteps,
            "shift": process.shift,
            "alphas_cumprod": None if process.is_flow else process.alphas_cumprod.tolist(),
        },
    }
    write_json(folder / "model.json", facts)
    return sizes


def traced(
    name: str, module: nn.Module, example: Callable, size: Sequence[int], multiple: int
) -> tuple[torch.jit.ScriptModule, bool]:
    """Record what a network computes as TorchScript, with its weights as constants, and see that it computes
    the same.

    A small volume is traced, and another of other sides in a batch of two compared. Where a network counts
    its input in Python, so that this fails, a volume of the true size is traced, and no other can be taken.

    Args:
        example: `example(batch, size)` -> inputs of a volume of so many voxels.
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
            f"{name}: TorchScript's values are off by {apart:.1e} of the largest. Export the other --formats."
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
    made, due = (
        (one,) if isinstance(one, torch.Tensor) else one for one in (script(*inputs), module(*inputs))
    )
    shares = [(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in zip(made, due, strict=True)]
    return torch.stack(shares).max().item()


def _steps(sampler: str, process: NoiseProcess) -> int:
    return SAMPLERS[sampler].steps or process.num_train_timesteps


# ---------------------------------------------------------------- MONAI bundle


def loaded(network: nn.Module, path: str, device: torch.device) -> nn.Module:
    """A network with the weights of a file, to draw with."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.to(device).eval()


@torch.inference_mode()
def draw(
    seed: int,
    network: nn.Module,
    autoencoder: nn.Module,
    process: NoiseProcess,
    latent_shape: Sequence[int],
    scale_factor: float,
    limits: Sequence,
    spacing: Sequence[float],
    steps: int,
    sampler: str,
    device: torch.device,
    output_dir: str,
) -> Path:
    """Draw the volume of a seed, and write it as `sample_000003.nii.gz`: RAS, mm, centred on the origin.

    Raises:
        FileExistsError: it is there already.
        FloatingPointError: a voxel is not finite.
    """
    path = Path(output_dir) / f"sample_{seed:06d}.nii.gz"
    if path.exists():
        raise FileExistsError(f"{path} is there already. Move it away, or give another --output_dir.")
    latents = sample_latents(network, process, latent_shape, [seed], steps, sampler, device)
    volume = autoencoder.decode(latents / scale_factor)[0].float().cpu()
    voxels = from_unit_range(volume.numpy(), np.array(limits))
    if not np.isfinite(voxels).all():
        raise FloatingPointError(f"the volume of seed {seed} is not finite, and is not written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti_bytes(voxels, spacing))
    print(path)
    return path


SCRIPT_START = '''"""From noise to a volume. Made by export_model.py of functions of 3D latent diffusion.

z_t = a(t) z_0 + s(t) noise, with
    discrete    a^2 = prod(1 - beta), s^2 = 1 - a^2, t = 0 .. T-1      (Ho et al., 2020)
    flow        a = 1 - t/T, s = t/T, 0 < t <= T                       (Liu et al., 2023; Lipman et al., 2023)
"""

import functools
import gzip
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

UserError = ValueError
'''

FOR_TRAINING = ("from_config", "_from_scheduler", "draw_times", "add_noise", "target", "min_snr_weight")


def sampling_script() -> str:
    """The source of a module that draws volumes without this project: the noise process but for what only
    training needs, the samplers, and the way to a file."""
    process = inspect.getsource(NoiseProcess)
    for name in FOR_TRAINING:
        process = process.replace(inspect.getsource(getattr(NoiseProcess, name)), "")
    process = re.sub(r"\n{3,}(?=    \S)", "\n\n", process)
    source = inspect.getsource(samplers)
    source = source[source.index("Model = Callable") :]  # after the imports
    functions = [inspect.getsource(one) for one in (from_unit_range, nifti_bytes, loaded, draw)]
    return "\n\n".join([SCRIPT_START, process.strip() + "\n", source.strip() + "\n", *functions])


def write_bundle(
    folder: Path, networks: Networks, config: dict, card: str, about: dict, figures: Sequence[dict]
) -> None:
    """A folder that `python -m monai.bundle run` draws volumes from.

    Args:
        card: what the README says.
        about: as of `ldm.export.model_card.model_card`.
        figures: of an evaluation.
    """
    models = {"model.pt": networks.unet, "autoencoder.pt": networks.autoencoder.network}
    contents = {name: _weights(network) for name, network in models.items()}
    if not networks.process.is_flow:
        contents["alphas_cumprod.pt"] = networks.process.alphas_cumprod
    for name, content in contents.items():
        with written_whole(folder / "models" / name) as file:
            torch.save(content, file)
    write_json(folder / "configs" / "inference.json", inference_config(networks, config))
    write_json(folder / "configs" / "metadata.json", bundle_metadata(networks, config, about, figures))
    for part, name, text in (
        ("docs", "README.md", card),
        ("scripts", "__init__.py", ""),
        ("scripts", "sampling.py", sampling_script()),
    ):
        with written_whole(folder / part / name) as file:
            file.write(text.encode())
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


def inference_config(networks: Networks, config: dict) -> dict:
    """configs/inference.json: `--seed`, `--num`, `--steps`, `--sampler`, `--output_dir` and `--device`
    override it on the command line."""
    process, sampler = networks.process, choose_sampler(None, networks.process)

    def model(name: str) -> str:
        return f"$@bundle_root + '/models/{name}'"

    def network(definition: str, name: str) -> dict:
        component = {"_target_": "scripts.sampling.loaded", "network": definition, "path": model(name)}
        return component | {"device": "@device"}

    arguments = list(inspect.signature(draw).parameters)[1:]  # all but the seed
    alphas = {"_target_": "torch.load", "f": model("alphas_cumprod.pt"), "weights_only": True}
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/outputs'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "seed": 0,
        "num": 1,
        "sampler": sampler,
        "steps": _steps(sampler, process),
        "latent_shape": networks.latent_shape,
        "scale_factor": networks.scale_factor,
        "spacing": list(networks.geometry["spacing"]),
        "limits": networks.geometry["limits"],
        "network_def": _fused(config["diffusion_def"]),
        "autoencoder_def": _fused(config["autoencoder_def"]),
        "network": network("@network_def", "model.pt"),
        "autoencoder": network("@autoencoder_def", "autoencoder.pt"),
        "process": {
            "_target_": "scripts.sampling.NoiseProcess",
            "alphas_cumprod": None if process.is_flow else alphas,
            "prediction": process.prediction,
            "num_train_timesteps": process.num_train_timesteps,
            "shift": process.shift,
        },
        "draw": {
            "_target_": "scripts.sampling.draw",
            "_mode_": "callable",
            **{key: f"@{key}" for key in arguments},
        },
        "run": ["$list(map(@draw, range(@seed, @seed + @num)))"],
    }


def _fused(definition: dict) -> dict:
    """A network's definition with MONAI's fused attention, as `ldm.models.layers.fuse_attention` has it."""
    module, _, name = definition["_target_"].rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    if not module.startswith("monai.networks.") or "use_flash_attention" not in parameters:
        return definition
    return {**definition, "use_flash_attention": not definition.get("dropout_cattn")}


def bundle_metadata(networks: Networks, config: dict, about: dict, figures: Sequence[dict]) -> dict:
    """configs/metadata.json: what MONAI's schema asks for, of these networks."""
    shape, size = networks.latent_shape, networks.geometry["size"]
    latent_names = [f"latent channel {i}" for i in range(shape[0])]
    latent = _tensor("latent", latent_names, shape[1:])
    image = _tensor("magnitude", about["channels"], size)
    unit = {**image, "value_range": [0, 1]}
    last = networks.process.num_train_timesteps
    times = {**_tensor("timesteps", ["time, one a volume"], []), "type": "tuples", "value_range": [0, last]}
    packages = ["nibabel", "fire"]
    if any(definition["_target_"].startswith("generative.") for definition in _definitions(config)):
        packages.append("monai-generative")
    if any(
        "attn" in name for network in (networks.unet, networks.autoencoder) for name in network.state_dict()
    ):
        packages.append("einops")
    versions = {name: version_of(name) for name in packages}
    scores = {f"{one['group']}: {one['name']}": one["value"] for one in figures if one["value"] is not None}
    return {
        "schema": BUNDLE_SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by export_model.py"},
        "monai_version": version_of("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {name: version for name, version in versions.items() if version},
        "task": "Unconditional generation of 3D volumes by latent diffusion",
        "description": about["description"],
        "authors": about["authors"],
        "copyright": f"weights: {about['authors']}; scripts: see LICENSE",
        "data_source": about["data_source"],
        "data_type": "nibabel",
        "image_classes": ", ".join(about["channels"]),
        "eval_metrics": scores,
        "intended_use": "Research. Not a medical device, and not for diagnosis.",
        "references": [],
        "network_data_format": {
            "inputs": {"latent": latent, "timesteps": times},
            "outputs": {
                "pred": {**latent, "channel_def": _numbered(_target_names(networks.process, shape[0]))}
            },
            "post_processed_outputs": {"image": image},
        },
        "autoencoder_data_format": {
            "inputs": {"image": unit},
            "outputs": {"reconstruction": image, "mean": latent, "std": latent},
        },
    }


def _tensor(form: str, names: Sequence[str], size: Sequence[int]) -> dict:
    return {
        "type": "image",
        "format": form,
        "modality": "n/a",
        "num_channels": len(names),
        "spatial_shape": list(size),
        "dtype": "float32",
        "value_range": [],  # not known beforehand
        "is_patch_data": False,
        "channel_def": _numbered(names),
    }


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(i): name for i, name in enumerate(names)}


def _target_names(process: NoiseProcess, channels: int) -> list[str]:
    what = {
        "epsilon": "noise",
        "sample": "clean latent",
        "v_prediction": "v (a noise - s latent)",
        "velocity": "velocity (latent - noise)",
    }[process.prediction]
    return [f"{what}, channel {i}" for i in range(channels)]


def _definitions(config: dict) -> list[dict]:
    return [config["diffusion_def"], config["autoencoder_def"]]


# ---------------------------------------------------------------- checksums


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of all files below a folder, for `sha256sum --check`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    with written_whole(folder / "SHA256SUMS") as file:
        file.write("".join(lines).encode())
