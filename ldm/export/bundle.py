"""A trained model as a MONAI bundle, which gives the volumes of `inference.py`, up to rounding.

Its `scripts/sampling.py` is made of this project's own functions, so that it needs torch, MONAI and nibabel
only.
"""

import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ldm import UserError
from ldm.data.datasets import stream
from ldm.data.intensity import from_unit_range
from ldm.data.labels import label_of
from ldm.data.reading import label_type
from ldm.diffusion import samplers
from ldm.diffusion.conditioning import Conditions, never_dropped, position_channels
from ldm.diffusion.covariates import Covariates
from ldm.diffusion.guidance import guided
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import sample_latents
from ldm.export.formats import weights_and_guide, weights_of
from ldm.export.model_card import version_of
from ldm.generation import Networks, nifti_bytes, nifti_gz
from ldm.models.definitions import OWN
from ldm.models.denoiser import Autoguided, predict
from ldm.models.embedding import encoded_size
from ldm.models.maisi import plain_arguments
from ldm.system.files import write_json, written_whole

SCHEMA = (  # what `monai.bundle verify_metadata` checks metadata.json against
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
ROOT = Path(__file__).resolve().parents[2]


def loaded(network: nn.Module, path: str, device: torch.device) -> nn.Module:
    """A network with the weights of a file, for sampling."""
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
    labels: Sequence[int],
    spacing: Sequence[float],
    steps: int,
    sampler: str,
    conditions: Conditions,
    condition: str | None,
    guidance: float,
    device: torch.device,
    output_dir: str,
) -> Path:
    """Sample the volume of a seed, and write it as `sample_000003.nii.gz`: RAS, mm, centred on the origin;
    where labels are drawn, its label beside it.

    Raises:
        FileExistsError: the file exists.
        FloatingPointError: a voxel is not finite.
    """
    path = Path(output_dir) / f"sample_{seed:06d}.nii.gz"
    beside = path.with_name(f"sample_{seed:06d}_label.nii.gz")
    for one in (path, beside):
        if one.exists():
            raise FileExistsError(f"{one} already exists. Move it away, or give another --output_dir.")
    chosen = conditions.for_sample(
        conditions.parse(condition.split(",") if condition else []), stream(seed, "conditions")
    )
    model = conditions.guided_model(network, [chosen], guidance, device)
    latents = sample_latents(model, process, latent_shape, [seed], steps, sampler, device)
    volume = autoencoder.decode(latents / scale_factor)[0].float().cpu()
    voxels = from_unit_range(volume[: len(limits)].numpy(), np.array(limits))
    if not np.isfinite(voxels).all():
        raise FloatingPointError(f"the volume of seed {seed} is not finite, and is not written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if labels:
        label = label_of(volume[len(limits) :].numpy(), labels)[None]
        beside.write_bytes(nifti_bytes(label, spacing, label.dtype.type))
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
import hashlib
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
REGION_NAME = "region"
'''
FOR_TRAINING = {  # methods that sampling does not need
    NoiseProcess: "from_config _from_scheduler at draw_times add_noise target min_snr_weight",
    Conditions: "of_training from_checkpoint of_latents at of_spacing check_size check_asked check_classes "
    "check_codes summary describe examples state of _chosen _one draw tell deviations parse_sizes",
}


def sampling_script() -> str:
    """The source of a module that samples without this project: noise process, conditions, samplers, and the
    way to a file."""
    process, conditions = map(_for_sampling, FOR_TRAINING)
    solvers = inspect.getsource(samplers)
    solvers = solvers[solvers.index("Model = Callable") :].strip()  # after the imports
    functions = [
        stream,
        position_channels,
        never_dropped,
        predict,
        guided,
        Autoguided,
        from_unit_range,
        label_type,
        label_of,
        nifti_bytes,
        nifti_gz,
        loaded,
        draw,
    ]
    first, last = (
        [inspect.getsource(one).strip() for one in some] for some in ([encoded_size, Covariates], functions)
    )
    return "\n\n\n".join([SCRIPT_START.strip(), process, *first, conditions, solvers, *last]) + "\n"


def _for_sampling(cls: type) -> str:
    source = inspect.getsource(cls)
    for name in FOR_TRAINING[cls].split():
        source = source.replace(inspect.getsource(getattr(cls, name)), "")
    return re.sub(r"\n{3,}(?=    \S)", "\n\n", source).strip()


def check_definitions(config: dict) -> None:
    """Raise UserError where MONAI alone cannot build a network of the config."""
    if config["spatial_dims"] == 2:
        raise UserError(
            "spatial_dims 2: MONAI's 2D networks do not take volumes, as a bundle's should. Leave the bundle "
            "out by --formats safetensors torchscript."
        )
    if config["autoencoder_def"]["_target_"].endswith(".VQVAE"):
        raise UserError(
            "autoencoder_def: MONAI's VQVAE alone does not standardise latents, as the diffusion model has "
            "learned them. Leave the bundle out by --formats safetensors torchscript."
        )
    for key in ("spacing", "region", "modality"):
        if config["conditions"][key]:
            raise UserError(
                f"conditions.{key}: a bundle draws without it. Leave the bundle out by --formats safetensors."
            )
    for key in ("autoencoder_def", "diffusion_def"):
        own = next((name for name in OWN if name in config[key]), config[key]["_target_"])
        if own in OWN or own.startswith("ldm."):
            raise UserError(
                f"{key}: {own} is this project's own, unknown to MONAI. Leave the bundle out by "
                "--formats safetensors torchscript."
            )


def write_bundle(
    folder: Path, networks: Networks, config: dict, card: str, about: dict, figures: Sequence[dict]
) -> None:
    """A folder that `python -m monai.bundle run` makes volumes from.

    Args:
        card: the text of the README.
        about: as of `ldm.export.model_card.model_card`.
        figures: of an evaluation.
    """
    unet, guide = weights_and_guide(networks)
    contents = {
        "model.pt": unet,
        "autoencoder.pt": weights_of(networks.autoencoder.network),
    }
    if not networks.process.is_flow:
        contents["alphas_cumprod.pt"] = networks.process.alphas_cumprod
    if guide is not None:
        contents["guide.pt"] = guide
    if networks.conditions.mean_latent is not None:
        contents["mean_latent.pt"] = networks.conditions.mean_latent
    for name, content in contents.items():
        with written_whole(folder / "models" / name) as file:
            torch.save(content, file)
    write_json(folder / "configs" / "inference.json", inference_config(networks, config))
    write_json(folder / "configs" / "metadata.json", bundle_metadata(networks, config, about, figures))
    for part, name, text in (
        ("docs", "README.md", card),
        ("scripts", "__init__.py", ""),
        ("scripts", "sampling.py", sampling_script()),
        (".", "LICENSE", (ROOT / "LICENSE").read_text(encoding="utf-8")),
    ):
        with written_whole(folder / part / name) as file:
            file.write(text.encode())


def inference_config(networks: Networks, config: dict) -> dict:
    """configs/inference.json: `--seed`, `--num`, `--steps`, `--sampler`, `--condition`, `--guidance`,
    `--autoguidance`, `--output_dir` and `--device` override it on the command line."""
    process, conditions, (sampler, steps) = networks.process, networks.conditions, networks.sampling()

    def model(name: str) -> str:
        return f"$@bundle_root + '/models/{name}'"

    def network(definition: str, name: str) -> dict:
        component = {"_target_": "scripts.sampling.loaded", "network": definition, "path": model(name)}
        return component | {"device": "@device"}

    unet = {"network": network("@network_def", "model.pt")}
    if isinstance(networks.unet, Autoguided):
        unet = {
            "autoguidance": networks.unet.weight,
            "guide_def": _fused(config["diffusion_def"]),
            "network": {
                "_target_": "scripts.sampling.Autoguided",
                "unet": unet["network"],
                "guide": network("@guide_def", "guide.pt"),
                "weight": "@autoguidance",
            },
        }
    arguments = list(inspect.signature(draw).parameters)[1:]  # all but the seed

    def tensor(name: str) -> dict:
        return {"_target_": "torch.load", "f": model(name), "weights_only": True}

    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/outputs'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "seed": 0,
        "num": 1,
        "sampler": sampler,
        "steps": steps,
        "condition": None,
        "guidance": 1.0,
        "latent_shape": networks.latent_shape,
        "scale_factor": networks.scale_factor,
        "spacing": list(networks.geometry["spacing"]),
        "limits": networks.geometry["limits"],
        "labels": list(networks.labels),
        "network_def": _fused(config["diffusion_def"]),
        "autoencoder_def": _fused(config["autoencoder_def"]),
        **unet,
        "autoencoder": network("@autoencoder_def", "autoencoder.pt"),
        "process": {
            "_target_": "scripts.sampling.NoiseProcess",
            "alphas_cumprod": None if process.is_flow else tensor("alphas_cumprod.pt"),
            "prediction": process.prediction,
            "num_train_timesteps": process.num_train_timesteps,
            "shift": process.shift,
        },
        "conditions": {
            "_target_": "scripts.sampling.Conditions",
            "column": conditions.column,
            "values": list(conditions.values),
            "mean_latent": None if conditions.mean_latent is None else tensor("mean_latent.pt"),
            "position": list(conditions.position),
            "shape": list(conditions.shape),
            "told": conditions.told,
            "covariates": conditions.covariates
            and {
                "_target_": "scripts.sampling.Covariates",
                "columns": conditions.covariates.columns,
                "into": list(conditions.covariates.into),
                "unknown": conditions.covariates.unknown,
                "rows": conditions.covariates.rows,
            },
        },
        "draw": {
            "_target_": "scripts.sampling.draw",
            "_mode_": "callable",
            **{key: f"@{key}" for key in arguments},
        },
        "run": ["$list(map(@draw, range(@seed, @seed + @num)))"],
    }


def _fused(definition: dict) -> dict:
    """A network's definition with MONAI's fused attention, as `ldm.models.layers.fuse_attention` has it; of
    MAISI's classes as `ldm.models.maisi` has it."""
    module, _, name = definition["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    definition, parameters = plain_arguments(cls, definition, "definition"), inspect.signature(cls).parameters
    if not module.startswith("monai.networks.") or "use_flash_attention" not in parameters:
        return definition
    return {**definition, "use_flash_attention": not definition.get("dropout_cattn")}


def bundle_metadata(networks: Networks, config: dict, about: dict, figures: Sequence[dict]) -> dict:
    """configs/metadata.json: what MONAI's schema asks for."""
    shape, process, conditions = networks.latent_shape, networks.process, networks.conditions
    latent = _tensor("latent", [f"latent channel {i}" for i in range(shape[0])], shape[1:])
    image = _tensor("magnitude", about["channels"], networks.geometry["size"])
    named = [*about["channels"], *(f"label {value}" for value in networks.labels)]
    volume = _tensor("magnitude", named, networks.geometry["size"])
    times = {"type": "tuples", "value_range": [0, process.num_train_timesteps]}
    inputs = {"latent": latent, "timesteps": _tensor("timesteps", ["time, one a volume"], []) | times}
    if conditions.column is not None:
        meaning = [f"{i}: {value}" for i, value in enumerate([*conditions.values, "unknown"])]
        label = _tensor("class_labels", [f"{conditions.column} ({', '.join(meaning)})"], [])
        last = len(conditions.values)
        inputs["class_labels"] = label | {"type": "tuples", "dtype": "int64", "value_range": [0, last]}
    names = [] if conditions.mean_latent is None else [f"mean latent, channel {i}" for i in range(shape[0])]
    names += [f"position along axis {axis}" for axis in conditions.position]
    names += [f"parameter {i} of the augmentation, 0 in samples" for i in range(conditions.told)]
    if conditions.covariates:
        encoded, into = conditions.covariates.names_of_inputs(), conditions.covariates.into
        if "embedding" in into:
            inputs["class_labels"] = _tensor("covariates", encoded, []) | {"type": "tuples"}
        if "cross_attention" in into:
            inputs["context"] = _tensor("covariates", encoded, []) | {"type": "tuples"}
        names += encoded if "channels" in into else []
    if names:
        inputs["channels"] = _tensor("latent", names, shape[1:])
    predicted = {
        "epsilon": "noise",
        "sample": "clean latent",
        "v_prediction": "v (a noise - s latent)",
        "velocity": "velocity (latent - noise)",
    }[process.prediction]
    prediction = _tensor("latent", [f"{predicted}, channel {i}" for i in range(shape[0])], shape[1:])
    packages = ["nibabel", "fire"]
    if any(config[key]["_target_"].startswith("generative.") for key in ("diffusion_def", "autoencoder_def")):
        packages.append("monai-generative")
    if any(
        "attn" in name for network in (networks.unet, networks.autoencoder) for name in network.state_dict()
    ):
        packages.append("einops")
    versions = {name: version for name in packages if (version := version_of(name))}
    scores = {f"{one['group']}: {one['name']}": one["value"] for one in figures if one["value"] is not None}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by export_model.py"},
        "monai_version": version_of("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": versions,
        "task": f"{'C' if conditions else 'Unc'}onditional generation of 3D volumes by latent diffusion",
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
            "inputs": inputs,
            "outputs": {"pred": prediction},
            "post_processed_outputs": {"image": image},
        },
        "autoencoder_data_format": {
            "inputs": {"image": {**volume, "value_range": [0, 1]}},
            "outputs": {"reconstruction": volume, "mean": latent, "std": latent},
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
        "value_range": [],  # unknown
        "is_patch_data": False,
        "channel_def": {str(i): name for i, name in enumerate(names)},
    }
