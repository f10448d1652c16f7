"""The last part of the model card: code that samples with each form of an exported model. Tests run it."""

from collections.abc import Sequence

from ldm.data.reading import label_type
from ldm.diffusion.samplers import SAMPLERS
from ldm.generation import Networks

SAFETENSORS = """\
`safetensors/`: the weights of each network, under the names of its class; in the metadata, as JSON, the
config, and the UNet's scale factor, geometry and latent shape. `inference.py --autoencoder FILE --unet FILE`
reads them, and so does MONAI:

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

TORCHSCRIPT = """\
`torchscript/`: `encode.ts` ({images} -> mean and standard deviation of the scaled latents),
`decode.ts` (scaled latents -> {images}) and `unet.ts` (latents, times{labels} -> {prediction}), in
float32, with weights and scale factor inside, and `model.json` with the other facts.
{takes}
A volume by {method}:

```python
import json

import nibabel
import numpy as np
import torch

facts = json.load(open("torchscript/model.json"))
unet, decode = (torch.jit.load(f"torchscript/{{name}}.ts") for name in ("unet", "decode")){label}
process, geometry = facts["process"], facts["geometry"]
steps, T = {steps}, process["num_train_timesteps"]
z = torch.randn(facts["latent_shape"], generator=torch.Generator().manual_seed(0))[None]{shared}
with torch.inference_mode():
{loop}
    volume = decode(z)[0].numpy(){outside}
low, high = np.array(geometry["limits"]).T[:, :, None, None, None]
image = volume[:len(low)] * (high - low) + low
voxels = np.moveaxis(image.astype(np.float32), 0, -1).squeeze()
affine = np.diag([*geometry["spacing"], 1.0])
affine[:3, 3] = -affine.diagonal()[:3] * (np.array(geometry["size"]) - 1) / 2  # centred on the origin
nibabel.save(nibabel.Nifti1Image(voxels, affine), "sample.nii.gz"){drawn}
```
"""

DRAWN_LABEL = """
channels = volume[len(low):]  # one for each label; 0 is background
label = np.where(channels.max(0) > 0.5, np.array({values}, np.{kind})[channels.argmax(0)], 0)
nibabel.save(nibabel.Nifti1Image(label.astype(np.{kind}), affine), "sample_label.nii.gz")"""

SHARED = "\nz = z[..., :1].expand_as(z)  # slices of a volume begin with the same noise"
OUTSIDE = """
first, end = geometry["slices"]  # others are empty
volume[..., :first] = volume[..., end:] = 0"""

HEUN = """\
    times = np.linspace(1, 0, steps + 1)
    times = process["shift"] * times / (1 + (process["shift"] - 1) * times)
    for t, following in zip(times[:-1], times[1:]):
        velocity = unet(z, torch.tensor([T * t]){argument})
        if following > 0:
            end = unet(z + (t - following) * velocity, torch.tensor([T * following]){argument})
            velocity = (velocity + end) / 2
        z = z + (t - following) * velocity"""

DDIM = """\
    logs = np.log([1, *process["alphas_cumprod"]])  # of a^2, at times -1, 0 .. T - 1
    times = [*np.linspace(T - 1, 0, steps), -1]
    for t, following in zip(times[:-1], times[1:]):
        now, then = np.interp([t, following], range(-1, T), logs)
        a, s = np.exp(now / 2), np.sqrt(-np.expm1(now))
        output = unet(z, torch.tensor([t]){argument})
        {estimates}
        z = np.exp(then / 2) * clean + np.sqrt(-np.expm1(then)) * noise"""

ESTIMATES = {
    "epsilon": "clean, noise = (z - s * output) / a, output",
    "sample": "clean, noise = output, (z - a * output) / s",
    "v_prediction": "clean, noise = a * z - s * output, s * z + a * output",
}

BUNDLE = """\
`bundle/`: a MONAI bundle, which needs torch, MONAI and what `configs/metadata.json` names, and nothing of the
project that made it. In its folder,

```bash
python -m pip install fire  # MONAI's command line needs it
python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
    --seed 3 --num 2
```

writes `outputs/sample_000003.nii.gz` and `outputs/sample_000004.nii.gz`{pairs}. `--steps`,
`--sampler` ({samplers}), {condition}`--output_dir` and `--device` may be added; from elsewhere
`--bundle_root FOLDER`.
"""


def by(values: Sequence[float]) -> str:
    """`16 x 20 x 12`."""
    return " x ".join(f"{value:g}" for value in values)


def _drawn_label(values: Sequence[int]) -> str:
    return DRAWN_LABEL.format(values=list(values), kind=label_type(values).__name__)


def usage(networks: Networks, formats: Sequence[str], takes: dict | None) -> str:
    """How the forms that were written are used, in Markdown.

    Args:
        takes: as of `write_torchscript`.
    """
    process, conditions, parts = networks.process, networks.conditions, []
    if "safetensors" in formats:
        parts.append(SAFETENSORS)
    if "torchscript" in formats:
        name, method, loop = ("heun", "Heun's method", HEUN) if process.is_flow else ("ddim", "DDIM", DDIM)
        labels, label, argument = "", "", ""
        if conditions.column is not None:
            meaning = ", ".join(f"{i}: {value}" for i, value in enumerate([*conditions.values, "unknown"]))
            label = f"\nlabel = torch.tensor([{len(conditions.values)}])  # {conditions.column}: {meaning}"
            labels, argument = ", class labels", ", label"
        if conditions.covariates:
            encoded = [
                round(one, 4) for one in conditions.covariates.encode(conditions.covariates.example).tolist()
            ]
            meaning = "; ".join(conditions.covariates.names_of_inputs())
            label += f"\ncovariates = torch.tensor([{encoded}])  # {meaning}"
            labels, argument = labels + ", covariates", argument + ", covariates"
        parts.append(
            TORCHSCRIPT.format(
                prediction=process.prediction,
                images="images in [0, 1]" + " and a channel for each label" * bool(networks.labels),
                takes=_takes(takes),
                method=method,
                steps=SAMPLERS[name].steps,
                labels=labels,
                label=label,
                shared=SHARED if networks.autoencoder.is_slicewise else "",
                outside=OUTSIDE if "slices" in networks.geometry else "",
                drawn=_drawn_label(networks.labels) if networks.labels else "",
                loop=loop.format(argument=argument, estimates=ESTIMATES.get(process.prediction)),
            )
        )
    if "bundle" in formats:
        fitting = [name for name, one in SAMPLERS.items() if one.for_flow == process.is_flow]
        names = [conditions.column] * (conditions.column is not None)
        names += conditions.covariates.columns if conditions.covariates else []
        asked = ",".join(f"{name}=VALUE" for name in names)
        condition = f"`--condition {asked}`, `--guidance`,\n" if conditions else ""
        pairs = ", each with its `_label.nii.gz`" if networks.labels else ""
        parts.append(BUNDLE.format(samplers=", ".join(fitting), condition=condition, pairs=pairs))
    return "\n".join(parts).rstrip()


def _takes(takes: dict) -> str:
    """What batches and sizes TorchScript takes, in words."""
    return " ".join(
        f"\n`{name}.ts` takes any batch, its sides multiples of {one['sides_are_multiples_of']}."
        if one["size"] is None
        else f"\n`{name}.ts` takes one volume at a time, of {by(one['size'])}."
        for name, one in takes.items()
    ).strip()
