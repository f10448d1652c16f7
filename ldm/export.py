"""A trained model as others use it: safetensors, TorchScript, a MONAI bundle, and a card that tells what it
is.

Each form gives the volumes of `inference.py`, to rounding. The bundle's `scripts/sampling.py` is made of this
project's own functions, so that it needs torch, MONAI and nibabel only.
"""

import hashlib
import importlib
import inspect
import math
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ldm import UserError, brief, configs, diffusion, generation, provenance
from ldm.checkpoints import (
    load_checkpoint,
    save_safetensors,
    sha256_of,
    weights_hash,
    write_json,
    written_whole,
)
from ldm.datasets import read_json
from ldm.diffusion import SAMPLERS, NoiseProcess, choose_sampler, sample_latents
from ldm.generation import Networks, nifti_bytes
from ldm.logs import read_log
from ldm.networks import downsampling, network_divisor
from ldm.schemas import StrictValidator, fault, fields
from ldm.transforms import from_unit_range

FORMATS = ("safetensors", "torchscript", "bundle")
STAGES = {"autoencoder": "autoencoder", "diffusion_unet": "diffusion"}  # file name -> name in the log
TOLERANCE = 1e-4  # share of its largest value by which a trace may differ from what was traced
BUNDLE_SCHEMA = (  # what `monai.bundle verify_metadata` checks metadata.json against
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
ROOT = Path(__file__).resolve().parents[1]

NUMBER_OR_NONE, TEXT_OR_NONE = {"type": ["number", "null"]}, {"type": ["string", "null"]}
INTERVAL_OR_NONE = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
FIGURE = fields(group={"type": "string"}, name={"type": "string"}, value=NUMBER_OR_NONE)
FIGURE["properties"] |= {"interval": INTERVAL_OR_NONE, "floor": NUMBER_OR_NONE} | {
    "floor_interval": INTERVAL_OR_NONE,
    **dict.fromkeys(("better", "missing"), TEXT_OR_NONE),
}
METRICS = fields(figures={"type": "array", "items": FIGURE})  # the part of evaluate.py's file that is shown
METRICS["properties"]["verdicts"] = {
    "type": "array",
    "items": fields(tone={"type": "string"}, text={"type": "string"}),
}


# ---------------------------------------------------------------- where the weights come from


def history(path: Path, name: str) -> dict:
    """What a checkpoint, and the log and the split beside it, tell of its training.

    Args:
        name: of the network, as `StageFiles` has it.

    Returns:
        `sha256` of the file; `config` as it was trained with, None for weights from elsewhere; `step` and
        `validation` of these weights; `steps` and `minutes` of the whole training; `cases`, the number of
        training and of held-out ones. What is not known is None.

    Raises:
        UserError: no checkpoint, or one to go on from, whose weights are not the averaged ones; or the log or
            the split is none.
    """
    content = load_checkpoint(path)
    if "stepper" in content:
        raise UserError(
            f"{path}: is there to go on from; its weights are neither the best nor averaged. Name {name}.pt."
        )
    log, split = path.with_name("train_log.jsonl"), path.with_name("split.json")
    try:
        entries = [one for one in read_log(log) if one["stage"] == STAGES[name]]
        steps = max((one["step"] for one in entries), default=None)
        seconds = max((one["seconds"] for one in entries if "seconds" in one), default=None)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log}: not the log of a training ({brief(error)}). Move it away.") from None
    parts = read_json(split, "split") if split.is_file() else {}
    return {
        "sha256": sha256_of(path),
        "config": configs.completed(content["config"]) if "config" in content else None,
        "step": content.get("step"),
        "validation": content.get("validation", {}),
        "steps": steps,
        "minutes": None if seconds is None else seconds / 60,
        "cases": [len(parts[part]) for part in ("training", "validation")] if parts else None,
    }


def read_metrics(path: Path) -> dict:
    """The figures and verdicts of an evaluation. Raises UserError where they are none."""
    content = read_json(path, "metrics")
    if what := fault(StrictValidator(METRICS), content):
        raise UserError(f"metrics {path}: {what}. Give the metrics.json that evaluate.py wrote.")
    return {"figures": content["figures"], "verdicts": content.get("verdicts", [])}


# ---------------------------------------------------------------- safetensors


def write_safetensors(folder: Path, networks: Networks, config: dict, origin: dict) -> None:
    """A file a network, which `inference.py --autoencoder FILE --unet FILE` reads.

    Args:
        origin: the `history` of each file.
    """
    autoencoder = _weights(networks.encoder.autoencoder)
    known = {"validation": {"power": networks.power}} if networks.power is not None else {}
    save_safetensors(
        folder / "autoencoder.safetensors",
        {"config": config, **known, **_source(origin["autoencoder"]), "model": autoencoder},
    )
    follows = {
        "scale_factor": networks.encoder.scale_factor,
        "autoencoder": weights_hash(autoencoder),
        "latent_shape": networks.latent_shape,
        "geometry": networks.geometry,
    }
    unet = _weights(networks.unet)
    save_safetensors(
        folder / "diffusion_unet.safetensors",
        {"config": config, **follows, **_source(origin["diffusion_unet"]), "model": unet},
    )


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().cpu().contiguous() for name, one in network.state_dict().items()}


def _source(trained: dict) -> dict:
    """The checkpoint that weights came from."""
    return {"checkpoint_sha256": trained["sha256"]}


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


class Decode(Encode):
    """Scaled latents (B, c, d, h, w) -> (B, C, D, H, W), about [0, 1]."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """See above."""
        return self.autoencoder.decode(latents / self.scale_factor).float()


def write_torchscript(folder: Path, networks: Networks, config: dict) -> dict:
    """encode.ts, decode.ts and unet.ts, in float32, and model.json, which says how to sample with them.

    Returns:
        What model.json holds.

    Raises:
        FloatingPointError: a trace gives other values than its network.
    """
    generator = torch.Generator().manual_seed(0)
    image_channels, latent_channels = config["image_channels"], networks.latent_shape[0]
    plain = {"memory_format": torch.contiguous_format}
    autoencoder, unet = networks.encoder.autoencoder.to(**plain), networks.unet.to(**plain)
    scale_factor, last = networks.encoder.scale_factor, networks.process.num_train_timesteps

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
    return facts


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
    pairs = [(one,) if isinstance(one, torch.Tensor) else one for one in (script(*inputs), module(*inputs))]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*pairs, strict=True))


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
    """The source of a module that draws volumes without this project: `ldm.diffusion` but for what is of
    training or needs a config, and the way to a file."""
    source = inspect.getsource(diffusion)
    methods = (getattr(NoiseProcess, name) for name in FOR_TRAINING)
    for part in (diffusion._to_zero_terminal_snr, *methods):
        source = source.replace(inspect.getsource(part), "")
    source = source[source.index("Model = Callable") :]  # after the imports
    source = re.sub(r"\n{3,}(?=    \S)", "\n\n", source)
    functions = [inspect.getsource(one) for one in (from_unit_range, nifti_bytes, loaded, draw)]
    parts = [SCRIPT_START, re.sub(r"\n{4,}", "\n\n\n", source.strip()) + "\n", *functions]
    return "\n\n".join(parts)


def write_bundle(
    folder: Path, networks: Networks, config: dict, card: str, about: dict, figures: Sequence[dict]
) -> None:
    """A folder that `python -m monai.bundle run` draws volumes from.

    Args:
        card: what docs/README.md says.
        about: `description`, `authors`, `data_source` and `channels`, the meaning of each image channel.
        figures: of an evaluation.
    """
    models = {"model.pt": networks.unet, "autoencoder.pt": networks.encoder.autoencoder}
    contents = {name: _weights(network) for name, network in models.items()}
    if not networks.process.is_flow:
        contents["alphas_cumprod.pt"] = networks.process.alphas_cumprod
    for name, content in contents.items():
        with written_whole(folder / "models" / name) as file:
            torch.save(content, file)
    write_json(folder / "configs" / "inference.json", inference_config(networks, config))
    write_json(folder / "configs" / "metadata.json", bundle_metadata(networks, config, about, figures))
    for name, text in (
        ("docs/README.md", card),
        ("scripts/__init__.py", ""),
        ("scripts/sampling.py", sampling_script()),
    ):
        with written_whole(folder / name) as file:
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
        "scale_factor": networks.encoder.scale_factor,
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
    """A network's definition with MONAI's fused attention, as `ldm.networks.fuse_attention` has it."""
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
    if any("attn" in name for network in (networks.unet, networks.encoder) for name in network.state_dict()):
        packages.append("einops")
    versions = {name: _version(name) for name in packages}
    scores = {f"{one['group']}: {one['name']}": one["value"] for one in figures if one["value"] is not None}
    return {
        "schema": BUNDLE_SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by export_model.py"},
        "monai_version": _version("monai"),
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
            "outputs": {"reconstruction": {**image}, "mean": latent, "std": latent},
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- the card


def describe(networks: Networks, config: dict) -> str:
    """One sentence on what the model draws."""
    geometry, channels = networks.geometry, config["image_channels"]
    size, spacing = (_by(geometry[key]) for key in ("size", "spacing"))
    kind = "rectified flow" if networks.process.is_flow else "diffusion"
    return (
        f"A latent {kind} model that draws volumes of {size} voxels of {spacing} mm, {channels} channel(s), "
        "from noise."
    )


def model_card(
    title: str,
    networks: Networks,
    config: dict,
    origin: dict,
    about: dict,
    metrics: dict | None,
    formats: Sequence[str],
    script: dict | None,
) -> str:
    """What a model is, in Markdown: data, training, figures, limits, and how each form is used.

    Args:
        origin: the `history` of each checkpoint.
        about: as of `write_bundle`.
        metrics: as of `read_metrics`.
        script: what `write_torchscript` returned.
    """
    figures = metrics["figures"] if metrics else []
    sections = {
        "What it is": [about["description"], *_facts(networks, config)],
        "Data": _data(networks, config, origin, about),
        "Training": _training(networks, config, origin),
        "Figures": _figures(origin, metrics),
        "Limits": _limits(networks, origin, figures),
        "Use": _use(networks, formats, script),
    }
    text = "\n\n".join(f"## {name}\n\n" + "\n".join(lines) for name, lines in sections.items())
    return f"# {title}\n\n{text}\n"


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _count(network: nn.Module) -> str:
    return f"{sum(one.numel() for one in network.parameters()) / 1e6:.3g} M parameters"


def _facts(networks: Networks, config: dict) -> list[str]:
    process, factor = networks.process, downsampling(config["autoencoder_def"])
    name = choose_sampler(None, process)
    definitions = {
        key: config[key]["_target_"].rpartition(".")[2] for key in ("autoencoder_def", "diffusion_def")
    }
    noise = (
        f"rectified flow, shift {process.shift:g}"
        if process.is_flow
        else f"a noise schedule of {process.num_train_timesteps} steps"
    )
    return [
        "",
        f"- Autoencoder: {definitions['autoencoder_def']}, {_count(networks.encoder)}, factor {factor}, latents "
        f"{_by(networks.latent_shape)}, scale factor {networks.encoder.scale_factor:.6g}.",
        f"- UNet: {definitions['diffusion_def']}, {_count(networks.unet)}, {noise}, predicts {process.prediction}.",
        f"- Sampling: {name}, {_steps(name, process)} steps, unless told otherwise.",
        f"- Exported with torch {torch.__version__}, MONAI {_version('monai')}, in float32.",
    ]


def _data(networks: Networks, config: dict, origin: dict, about: dict) -> list[str]:
    cases, geometry, intensity = origin["diffusion_unet"]["cases"], networks.geometry, config["intensity"]
    count = f"{cases[0]} for training, {cases[1]} held out" if cases else "not known here"
    limits = "; ".join(f"{low:.6g} to {high:.6g}" for low, high in geometry["limits"])
    return [
        f"- Source: {about['data_source']}.",
        f"- Cases: {count}.",
        f"- Channels: {', '.join(about['channels'])}.",
        f"- Volumes: {_by(geometry['size'])} voxels of {_by(geometry['spacing'])} mm, RAS.",
        f"- Intensities: percentiles {intensity['lower_percentile']:g} to {intensity['upper_percentile']:g} of "
        f"each volume to [0, 1]; drawn volumes are in the training set's typical range, {limits}.",
    ]


def _training(networks: Networks, config: dict, origin: dict) -> list[str]:
    rows = {}
    for name, section, what in (
        ("autoencoder", "autoencoder_train", "autoencoder"),
        ("diffusion_unet", "diffusion_train", "diffusion model"),
    ):
        trained = origin[name]
        rows[what] = {"checkpoint (SHA-256)": f"`{trained['sha256']}`"}
        if trained["config"] is None:
            rows[what]["training"] = "weights from elsewhere: not known here"
            continue
        how = trained["config"][section]
        length = [f"{trained['steps']} steps" if trained["steps"] is not None else "steps not known"]
        length += [f"{trained['minutes']:.3g} minutes"] if trained["minutes"] is not None else []
        decay = how["ema_decay"]
        rows[what] |= {
            "training": ", ".join(length),
            "these weights": f"of step {trained['step']}, the best in validation; "
            + (f"exponential average, decay {decay:g}" if decay else "not averaged"),
            "batch a process, learning rate": f"{how['batch_size'] * how['accumulate_steps']}, "
            f"{how['lr']:g} ({how['lr_schedule']})",
            "patch": _by(how["patch_size"]) if how["patch_size"] else "whole volumes",
            "loss": _loss(networks, how, name),
        }
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    return lines + [
        f"| {key} | " + " | ".join(row.get(key, "") for row in rows.values()) + " |" for key in keys
    ]


def _loss(networks: Networks, how: dict, name: str) -> str:
    if name == "diffusion_unet":
        return f"squared error of {networks.process.prediction}, times {how['timestep_sampling']}"
    weights = [(1, how["recon_loss"])] + [
        (how[f"{kind}_weight"], kind) for kind in ("gradient", "kl", "perceptual", "adversarial")
    ]
    return " + ".join(f"{weight:g} {kind}" for weight, kind in weights if weight)


def _figures(origin: dict, metrics: dict | None) -> list[str]:
    lines = [f"- {name}: {_scores(one['validation'])}." for name, one in origin.items() if one["validation"]]
    lines = (
        ["In validation, on the held-out cases, by which the weights were chosen:", "", *lines]
        if lines
        else []
    )
    if not metrics:
        return [*lines, "", "Not evaluated beyond that: no `metrics.json` was given to `export_model.py`."]
    lines += ["", "By `evaluate.py`; the floor is what real volumes reach against real ones:", ""]
    lines += ["| | | value | 95 % interval | floor | its interval | better |", "|---" * 7 + "|"]
    for one in metrics["figures"]:
        value = one.get("missing") or "missing" if one["value"] is None else f"{one['value']:.4g}"
        cells = [one["group"], one["name"], value, _interval(one.get("interval"))]
        floor = one.get("floor")
        cells += ["" if floor is None else f"{floor:.4g}", _interval(one.get("floor_interval"))]
        lines.append(f"| {' | '.join(map(_cell, [*cells, one.get('better') or '']))} |")
    lines += ["", *(f"- {_cell(one['text'])} ({_cell(one['tone'])})" for one in metrics["verdicts"])]
    return lines


def _scores(validation: dict) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in validation.items())


def _interval(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _limits(networks: Networks, origin: dict, figures: Sequence[dict]) -> list[str]:
    cases = origin["diffusion_unet"]["cases"]
    count = f"{cases[0]} training volumes" if cases else "its training volumes"
    checked = any(
        "memori" in f"{one['group']} {one['name']}".lower() and one["value"] is not None for one in figures
    )
    size, spacing = (_by(networks.geometry[key]) for key in ("size", "spacing"))
    return [
        "- Not for diagnosis, treatment or any decision about a patient: it is no medical device, and no reader has "
        "judged its volumes.",
        f"- It knows {count} and nothing else. What they lack it cannot draw, and their biases are its own; which "
        "scanners, ages and diseases they are of is for whoever holds the data to say.",
        f"- It draws volumes of {size} voxels of {spacing} mm. Detail that the autoencoder does not keep is in no "
        "sample.",
        "- "
        + (
            "Whether samples copy training volumes was measured: see the figures on memorisation."
            if checked
            else "Whether samples copy training volumes was not checked. Until it is, treat weights and samples as "
            "you treat the data."
        ),
        "- The same seed gives the same volume to rounding only on other hardware or versions.",
        "- The rights to the weights follow from those to the data, which this card does not know.",
    ]


SAFETENSORS_USE = """\
`safetensors/`: weights under MONAI's names, and in each file's metadata, as JSON, the config, and for the UNet
scale factor, geometry and latent shape. `inference.py --autoencoder FILE --unet FILE` reads them; so does MONAI:

```python
import json

from monai.bundle import ConfigParser
from safetensors import safe_open

with safe_open("safetensors/diffusion_unet.safetensors", "pt") as file:
    facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "sha256"}
    weights = {name: file.get_tensor(name) for name in file.keys()}
unet = ConfigParser(facts["config"]).get_parsed_content("diffusion_def").eval()
unet.load_state_dict(weights)
```
"""

TORCHSCRIPT_USE = """\
`torchscript/`: `encode.ts` (images in [0, 1] -> mean and standard deviation of the scaled latents), `decode.ts`
(scaled latents -> images in [0, 1]; the scale factor is inside), `unet.ts` (latents, times ->
{prediction}), in float32, weights included, and `model.json`, which has the other facts.
{takes} A volume by {name}:

```python
import json

import nibabel
import numpy as np
import torch

facts = json.load(open("torchscript/model.json"))
unet, decode = (torch.jit.load(f"torchscript/{{name}}.ts") for name in ("unet", "decode"))
steps, T = {steps}, facts["process"]["num_train_timesteps"]
z = torch.randn(facts["latent_shape"], generator=torch.Generator().manual_seed(0))[None]
with torch.inference_mode():
{loop}
    volume = decode(z)[0].numpy()
low, high = np.array(facts["geometry"]["limits"]).T[:, :, None, None, None]
voxels = np.moveaxis(volume * (high - low) + low, 0, -1).squeeze(-1 if len(volume) == 1 else ())
nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), np.diag([*facts["geometry"]["spacing"], 1])), "sample.nii.gz")
```
"""

HEUN = """\
    times = torch.linspace(1, 0, steps + 1).double()
    times = (facts["process"]["shift"] * times / (1 + (facts["process"]["shift"] - 1) * times)).tolist()
    for t, following in zip(times[:-1], times[1:]):
        velocity = unet(z, torch.tensor([T * t]))
        if following:
            end = unet(z + (t - following) * velocity, torch.tensor([T * following]))
            velocity = (velocity + end) / 2
        z = z + (t - following) * velocity"""

DDIM = """\
    logs = np.log([1, *facts["process"]["alphas_cumprod"]])  # of a^2, at times -1 to T - 1
    times = [*np.linspace(T - 1, 0, steps), -1]
    for t, following in zip(times[:-1], times[1:]):
        (a, s), (a_next, s_next) = (
            (np.exp(log / 2), np.sqrt(-np.expm1(log))) for log in np.interp([t, following], range(-1, T), logs)
        )
        output = unet(z, torch.tensor([t]))
        {estimates}
        z = a_next * clean + s_next * noise"""
ESTIMATES = {
    "epsilon": "clean, noise = (z - s * output) / a, output",
    "sample": "clean, noise = output, (z - a * output) / s",
    "v_prediction": "clean, noise = a * z - s * output, s * z + a * output",
}

BUNDLE_USE = """\
`bundle/`: a MONAI bundle, which needs torch, MONAI, nibabel and fire, and nothing of the project that made it.
In its folder:

```bash
python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json
python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json --seed 3 --num 2 --steps {steps}
```

writes `outputs/sample_000003.nii.gz` and so on. `--sampler` takes {samplers}. From another folder add
`--bundle_root FOLDER`.
"""


def _use(networks: Networks, formats: Sequence[str], script: dict | None) -> list[str]:
    process = networks.process
    lines = ["Paths count from the folder with `MODEL_CARD.md`."]
    if "safetensors" in formats:
        lines += ["", SAFETENSORS_USE.rstrip()]
    if script:
        loop = HEUN if process.is_flow else DDIM.format(estimates=ESTIMATES[process.prediction])
        name = "Heun's method" if process.is_flow else "DDIM"
        steps = SAMPLERS["heun" if process.is_flow else "ddim"].steps
        text = TORCHSCRIPT_USE.format(
            prediction=process.prediction, takes=_takes(script["takes"]), name=name, steps=steps, loop=loop
        )
        lines += ["", text.rstrip()]
    if "bundle" in formats:
        fitting = [name for name, one in SAMPLERS.items() if one.for_flow == process.is_flow]
        steps = _steps(fitting[0], process)
        lines += ["", BUNDLE_USE.format(steps=2 * steps, samplers=", ".join(fitting)).rstrip()]
    return lines


def _takes(takes: dict) -> str:
    """What batches and sizes the traces take, in a sentence each."""
    return " ".join(
        f"`{name}.ts` takes any batch, and sides that are multiples of {one['sides_are_multiples_of']}."
        if one["size"] is None
        else f"`{name}.ts` takes one volume at a time, of {_by(one['size'])}."
        for name, one in takes.items()
    )


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of all files below a folder, for `sha256sum --check`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    with written_whole(folder / "SHA256SUMS") as file:
        file.write("".join(lines).encode())
