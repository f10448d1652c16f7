"""A model card: what a trained model is, from its files: data, training, figures, limits, and code that uses
what `ldm.export.bundle` wrote."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ldm import UserError, brief, configs
from ldm.data.intensity import Intensity
from ldm.data.splits import read_split
from ldm.diffusion.samplers import SAMPLERS, choose_sampler
from ldm.generation import Networks
from ldm.models.definitions import downsampling
from ldm.system.checkpoints import load_checkpoint
from ldm.system.files import read_json, sha256_of
from ldm.system.schemas import StrictValidator, fault, fields
from ldm.training.logs import read_log

STAGES = {  # file name -> name in the log, section of the config, name in words
    "autoencoder": ("autoencoder", "autoencoder_train", "autoencoder"),
    "diffusion_unet": ("diffusion", "diffusion_train", "diffusion model"),
}

NUMBER_OR_NONE, TEXT_OR_NONE = {"type": ["number", "null"]}, {"type": ["string", "null"]}
INTERVAL_OR_NONE = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
TEXT = {"type": "string"}
FIGURE = fields(group=TEXT, name=TEXT, value=NUMBER_OR_NONE)

FIGURE["properties"] |= dict.fromkeys(("interval", "floor_interval"), INTERVAL_OR_NONE)

FIGURE["properties"] |= dict.fromkeys(("better", "missing", "unit", "counts"), TEXT_OR_NONE)

FIGURE["properties"]["floor"] = NUMBER_OR_NONE

METRICS = fields(figures={"type": "array", "items": FIGURE})  # the part of evaluate.py's file that is shown

METRICS["properties"]["verdicts"] = {"type": "array", "items": fields(tone=TEXT, text=TEXT)}

METRICS["properties"] |= dict.fromkeys(("autoencoder_sha256", "unet_sha256"), TEXT_OR_NONE)


# ---------------------------------------------------------------- what is known


def history(path: Path, name: str) -> dict:
    """What a checkpoint, and the log and the split beside it, tell of its training.

    Args:
        name: of the network, as `StageFiles` has it.

    Returns:
        `sha256` of the file; `config` that it was trained with, None for weights from elsewhere; `step` and
        `validation` of these weights; `steps` and `minutes` of the whole training; `cases`, the number of
        training and of held-out ones. What is not known is None, or empty.

    Raises:
        UserError: no checkpoint, or one to go on from, whose weights are not the averaged ones; or the log or
            the split is none.
    """
    content = load_checkpoint(path, "autoencoder" if name == "autoencoder" else "unet")
    if "stepper" in content:
        raise UserError(
            f"{path}: is there to resume from; its weights are neither the best nor averaged. Name {name}.pt."
        )
    log, split = path.with_name("train_log.jsonl"), path.with_name("split.json")
    try:
        entries = [one for one in read_log(log) if one["stage"] == STAGES[name][0]]
        steps = max((one["step"] for one in entries), default=None)
        seconds = max((one["seconds"] for one in entries if "seconds" in one), default=None)
        minutes = None if seconds is None else seconds / 60
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log}: not the log of a training ({brief(error)}). Move it away.") from None
    return {
        "sha256": sha256_of(path),
        "config": configs.completed(content["config"]) if "config" in content else None,
        "step": content.get("step"),
        "validation": content.get("validation", {}),
        "steps": steps,
        "minutes": minutes,
        "cases": [len(names) for names in read_split(split)] if split.is_file() else None,
    }


def read_metrics(path: Path, autoencoder: str, unet: str) -> dict:
    """The figures and verdicts of an evaluation.

    Args:
        autoencoder: SHA-256 of the file of the one that is exported.
        unet: the same of the UNet.

    Raises:
        UserError: they are none, or of another autoencoder or UNet.
    """
    content = read_json(path, "metrics")
    if what := fault(StrictValidator(METRICS), content):
        raise UserError(f"metrics {path}: {what}. Give the metrics.json that evaluate.py wrote.")
    for name, exported in (("autoencoder", autoencoder), ("unet", unet)):
        named = content.get(f"{name}_sha256")
        if named and named != exported:
            raise UserError(
                f"metrics {path}: of a model with another {name} (SHA-256 {named[:12]}, exported "
                f"{exported[:12]}). Evaluate this model, or leave --metrics out."
            )
    return {"figures": content["figures"], "verdicts": content.get("verdicts", [])}


def describe(networks: Networks, config: dict) -> str:
    """One sentence on what a model draws."""
    size, spacing = (by(networks.geometry[key]) for key in ("size", "spacing"))
    kind = "rectified flow" if networks.process.is_flow else "diffusion"
    channels = f" of {config['image_channels']} channels" if config["image_channels"] > 1 else ""
    return f"A latent {kind} model that draws volumes{channels} of {size} voxels of {spacing} mm from noise."


def by(values: Sequence[float]) -> str:
    """`16 x 20 x 12`."""
    return " x ".join(f"{value:g}" for value in values)


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- the card

CARD = """\
# {title}

{description} Trained by: {authors}.

- Autoencoder: {autoencoder}, factor {factor}, latents {latents}, scale factor {scale_factor:.6g}.
- UNet: {unet}, predicts {prediction}, {noise}.
- Sampling: {sampler}, {steps} steps, unless told otherwise.
- Exported with torch {torch}, MONAI {monai}, in float32.

## Data

- Source: {source}.
- Cases: {cases}.
- Image channels: {channels}.
- Volumes: {size} voxels of {spacing} mm, RAS.
- Intensities: {intensity} became 0 and 1. Drawn volumes are in the typical range of the training set,
  {limits}.

## Training

{training}

## Figures

{figures}

## Limits

- Not for diagnosis, treatment or any decision about a patient. It is no medical device, and no reader has
  judged its volumes.
- It has seen {seen} and nothing else. What they lack it does not draw, and their biases are its
  own. Of which scanners, ages and diseases they are, this card does not know.
- It draws volumes of {size} voxels of {spacing} mm. Detail that the autoencoder does not keep is in no
  sample.
- {memorisation}
- On other hardware, or with other versions, a seed gives the same volume to rounding only.
- The rights to the weights follow from those to the data, which this card does not know.

## Use

Paths count from the folder with `MODEL_CARD.md`.

{use}
"""

COPIES = {
    True: "Whether samples copy training volumes was measured: see the figures on copies.",
    False: "Whether samples copy training volumes was not checked. Until it is, treat weights and samples\n"
    "  as you treat the data.",
}


def model_card(
    title: str,
    networks: Networks,
    config: dict,
    origin: dict,
    about: dict,
    metrics: dict | None,
    formats: Sequence[str],
    takes: dict | None,
) -> str:
    """What a model is, in Markdown.

    Args:
        origin: the `history` of each checkpoint.
        about: `description`, `authors`, `data_source`, and `channels`, the meaning of each image channel.
        metrics: as of `read_metrics`.
        formats: of `ldm.export.bundle.FORMATS`, those that were written.
        takes: what batches and sizes each TorchScript takes, as `write_torchscript` returns it.
    """
    process, geometry = networks.process, networks.geometry
    sampler, cases = choose_sampler(None, process), origin["diffusion_unet"]["cases"]
    return CARD.format(
        title=title,
        description=about["description"],
        authors=about["authors"],
        autoencoder=_network(config["autoencoder_def"], networks.autoencoder),
        factor=downsampling(config["autoencoder_def"]),
        latents=by(networks.latent_shape),
        scale_factor=networks.scale_factor,
        unet=_network(config["diffusion_def"], networks.unet),
        prediction=process.prediction,
        noise=f"rectified flow, shift {process.shift:g}"
        if process.is_flow
        else f"a noise schedule of {process.num_train_timesteps} steps",
        sampler=sampler,
        steps=SAMPLERS[sampler].steps or process.num_train_timesteps,
        torch=torch.__version__,
        monai=version_of("monai"),
        source=about["data_source"],
        cases=f"{cases[0]} for training, {cases[1]} held out" if cases else "not known here",
        channels=", ".join(about["channels"]),
        size=by(geometry["size"]),
        spacing=by(geometry["spacing"]),
        intensity=Intensity.from_config(config),
        limits=", ".join(f"{low:.6g} to {high:.6g}" for low, high in geometry["limits"]),
        training=_training(networks, origin),
        figures="\n".join(_figures(origin, metrics)),
        seen=f"{cases[0]} training volumes" if cases else "its training data",
        memorisation=COPIES[bool(metrics) and any(map(_on_copies, metrics["figures"]))],
        use="\n".join(_use(networks, formats, takes)),
    )


def _network(definition: dict, network: nn.Module) -> str:
    millions = sum(one.numel() for one in network.parameters()) / 1e6
    return f"{definition['_target_'].rpartition('.')[2]}, {millions:.3g} M parameters"


def _on_copies(figure: dict) -> bool:
    return figure["value"] is not None and "copies" in f"{figure['group']} {figure['name']}".lower()


def _training(networks: Networks, origin: dict) -> str:
    """A table with a column a network."""
    columns = {STAGES[name][2]: _trained(networks, name, trained) for name, trained in origin.items()}
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [[key, *(column.get(key, "not known") for column in columns.values())] for key in keys]
    lines = [["", *columns], ["---"] * 3, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _trained(networks: Networks, name: str, trained: dict) -> dict[str, str]:
    known = {"checkpoint (SHA-256)": f"`{trained['sha256']}`"}
    if trained["config"] is None:
        return {**known, "training": "weights from elsewhere: not known"}
    how = trained["config"][STAGES[name][1]]
    length = "not known" if trained["steps"] is None else f"{trained['steps']} steps"
    length += "" if trained["minutes"] is None else f", {trained['minutes']:.3g} minutes"
    chosen = "not known" if trained["step"] is None else f"of step {trained['step']}, the best in validation"
    average = f"averaged exponentially, decay {how['ema_decay']:g}" if how["ema_decay"] else "not averaged"
    return {
        **known,
        "training": length,
        "these weights": f"{chosen}; {average}",
        "batch of a process": str(how["batch_size"] * how["accumulate_steps"]),
        "learning rate": f"{how['lr']:g}, {how['lr_schedule']}",
        "patch": by(how["patch_size"]) if how["patch_size"] else "whole volumes",
        "loss": _loss(networks, how, name),
    }


def _loss(networks: Networks, how: dict, name: str) -> str:
    if name == "diffusion_unet":
        return f"squared error of {networks.process.prediction}, times {how['timestep_sampling']}"
    terms = [(how[f"{kind}_weight"], kind) for kind in ("gradient", "kl", "perceptual", "adversarial")]
    return " + ".join([how["recon_loss"], *(f"{weight:g} {kind}" for weight, kind in terms if weight)])


SCORES = {  # of a validation
    "psnr": "PSNR {:.4g} dB",
    "ssim": "SSIM {:.4g}",
    "l1": "L1 {:.4g}",
    "power_share": "{:.3g} of the fine spectral power kept",
    "loss": "loss {:.4g}",
}


def _figures(origin: dict, metrics: dict | None) -> list[str]:
    lines = []
    for name, one in origin.items():
        scores = [
            text.format(one["validation"][key]) for key, text in SCORES.items() if key in one["validation"]
        ]
        lines += [f"- {STAGES[name][2]}: {', '.join(scores)}"] if scores else []
    if lines:
        lines = ["On the held-out cases, by which these weights were chosen:", "", *lines, ""]
    if not metrics:
        return [*lines, "Not evaluated beyond that: `export_model.py` was given no `metrics.json`."]
    lines += [
        "By `evaluate.py`, with 95 % intervals. The floor is what real volumes reach against real ones.",
        "",
    ]
    rows = [["", "", "value", "interval", "floor", "interval", "better", "volumes"], ["---"] * 8]
    for one in metrics["figures"]:
        value, floor = (_number(one.get(key), one.get("unit")) for key in ("value", "floor"))
        spread, floor_spread = (_interval(one.get(key)) for key in ("interval", "floor_interval"))
        cells = [
            one["group"],
            one["name"],
            value or one.get("missing") or "missing",
            spread,
            floor,
            floor_spread,
        ]
        cells += [one.get(key) or "" for key in ("better", "counts")]
        rows.append([" ".join(cell.split()).replace("|", "\\|") for cell in cells])
    lines += [f"| {' | '.join(row)} |" for row in rows]
    verdicts = [f"- {' '.join(one['text'].split())}" for one in metrics["verdicts"]]
    return [*lines, "", *verdicts] if verdicts else lines


def _number(value: float | None, unit: str | None) -> str:
    return "" if value is None else f"{value:.4g} {unit or ''}".rstrip()


def _interval(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


# ---------------------------------------------------------------- how each form is used

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
`torchscript/`: `encode.ts` (images in [0, 1] -> mean and standard deviation of the scaled latents),
`decode.ts` (scaled latents -> images in [0, 1]) and `unet.ts` (latents, times -> {prediction}), in float32,
with weights and scale factor inside, and `model.json` with the other facts.
{takes}
A volume by {method}:

```python
import json

import nibabel
import numpy as np
import torch

facts = json.load(open("torchscript/model.json"))
unet, decode = (torch.jit.load(f"torchscript/{{name}}.ts") for name in ("unet", "decode"))
process, geometry = facts["process"], facts["geometry"]
steps, T = {steps}, process["num_train_timesteps"]
z = torch.randn(facts["latent_shape"], generator=torch.Generator().manual_seed(0))[None]
with torch.inference_mode():
{loop}
    volume = decode(z)[0].numpy()
low, high = np.array(geometry["limits"]).T[:, :, None, None, None]
voxels = np.moveaxis((volume * (high - low) + low).astype(np.float32), 0, -1).squeeze()
affine = np.diag([*geometry["spacing"], 1.0])
affine[:3, 3] = -affine.diagonal()[:3] * (np.array(geometry["size"]) - 1) / 2  # centred on the origin
nibabel.save(nibabel.Nifti1Image(voxels, affine), "sample.nii.gz")
```
"""

HEUN = """\
    times = np.linspace(1, 0, steps + 1)
    times = process["shift"] * times / (1 + (process["shift"] - 1) * times)
    for t, following in zip(times[:-1], times[1:]):
        velocity = unet(z, torch.tensor([T * t]))
        if following > 0:
            end = unet(z + (t - following) * velocity, torch.tensor([T * following]))
            velocity = (velocity + end) / 2
        z = z + (t - following) * velocity"""

DDIM = """\
    logs = np.log([1, *process["alphas_cumprod"]])  # of a^2, at times -1, 0 .. T - 1
    times = [*np.linspace(T - 1, 0, steps), -1]
    for t, following in zip(times[:-1], times[1:]):
        now, then = np.interp([t, following], range(-1, T), logs)
        a, s = np.exp(now / 2), np.sqrt(-np.expm1(now))
        output = unet(z, torch.tensor([t]))
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

writes `outputs/sample_000003.nii.gz` and `outputs/sample_000004.nii.gz`. `--steps`, `--sampler` ({samplers}),
`--output_dir` and `--device` may be added; from elsewhere `--bundle_root FOLDER`.
"""


def _use(networks: Networks, formats: Sequence[str], takes: dict | None) -> list[str]:
    process, parts = networks.process, []
    fitting = [name for name, one in SAMPLERS.items() if one.for_flow == process.is_flow]
    if "safetensors" in formats:
        parts.append(SAFETENSORS)
    if "torchscript" in formats:
        name, method = ("heun", "Heun's method") if process.is_flow else ("ddim", "DDIM")
        loop = HEUN if process.is_flow else DDIM.format(estimates=ESTIMATES[process.prediction])
        prediction, steps = process.prediction, SAMPLERS[name].steps
        facts = {"takes": _takes(takes), "method": method, "steps": steps, "loop": loop}
        parts.append(TORCHSCRIPT.format(prediction=prediction, **facts))
    if "bundle" in formats:
        parts.append(BUNDLE.format(samplers=", ".join(fitting)))
    return ["\n".join(parts).rstrip()]


def _takes(takes: dict) -> str:
    """What batches and sizes TorchScript takes, in words."""
    return " ".join(
        f"\n`{name}.ts` takes any batch, of sides that are multiples of {one['sides_are_multiples_of']}."
        if one["size"] is None
        else f"\n`{name}.ts` takes one volume at a time, of {by(one['size'])}."
        for name, one in takes.items()
    ).strip()
