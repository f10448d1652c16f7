"""The model card: data, training, figures, limits, and code that uses what `export_model.py` wrote, all from
the files of a trained model."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ldm import UserError, brief, configs
from ldm.data.intensity import Intensity
from ldm.data.splits import read_split
from ldm.export.usage import by, usage
from ldm.generation import Networks
from ldm.models.definitions import downsampling_factor, per_axis
from ldm.system.checkpoints import load_checkpoint
from ldm.system.files import read_json, sha256_of
from ldm.system.schemas import StrictValidator, fault, fields
from ldm.training.logs import read_log

STAGES = {  # file name -> name in the log, section of the config, name in words
    "autoencoder": ("autoencoder", "autoencoder_train", "autoencoder"),
    "diffusion_unet": ("diffusion", "diffusion_train", "diffusion model"),
}
TEXT, TEXT_OR_NONE = {"type": "string"}, {"type": ["string", "null"]}
NUMBER_OR_NONE = {"type": ["number", "null"]}
INTERVAL_OR_NONE = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
FIGURE = fields(group=TEXT, name=TEXT, value=NUMBER_OR_NONE)
FIGURE["properties"] |= {
    "floor": NUMBER_OR_NONE,
    **dict.fromkeys(("interval", "floor_interval"), INTERVAL_OR_NONE),
    **dict.fromkeys(("better", "missing", "unit", "counts"), TEXT_OR_NONE),
}
METRICS = fields(figures={"type": "array", "items": FIGURE})  # the part of metrics.json that the card shows
METRICS["properties"] |= {
    "verdicts": {"type": "array", "items": fields(tone=TEXT, text=TEXT)},
    **dict.fromkeys(("autoencoder_sha256", "unet_sha256"), TEXT_OR_NONE),
}


# ---------------------------------------------------------------- what is known


def history(path: Path, name: str) -> dict:
    """How a network was trained, by its checkpoint and the log and the split beside it.

    Args:
        name: a key of `STAGES`.

    Returns:
        `sha256` of the file; `config` that it was trained with; `step` and `validation` of these weights;
        `steps` and `minutes` of the whole training; `cases`, the numbers of training and of held-out ones.
        What is not known is None, or empty.

    Raises:
        UserError: no checkpoint, or one to resume from, whose weights are not averaged; or the log or the
            split cannot be read.
    """
    content = load_checkpoint(path, "autoencoder" if name == "autoencoder" else "unet")
    if "stepper" in content:
        raise UserError(
            f"{path}: a checkpoint to resume from, neither the best nor averaged. Name {name}.pt."
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
        autoencoder, unet: SHA-256 of the exported checkpoints.

    Raises:
        UserError: not such a file, or of another model.
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
    """One sentence on what a model generates."""
    size, spacing = (by(networks.geometry[key]) for key in ("size", "spacing"))
    kind = "rectified flow" if networks.process.is_flow else "diffusion"
    channels = f" of {config['image_channels']} channels" if config["image_channels"] > 1 else ""
    labels = f" with labels {', '.join(map(str, networks.labels))}" if networks.labels else ""
    return f"A latent {kind} model that generates volumes{channels}{labels} of {size} voxels of {spacing} mm."


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
- Conditions: {conditions}.
- Sampling: {sampler}, {steps} steps, by default.
- Exported with torch {torch}, MONAI {monai}, in float32.

## Data

- Source: {source}.
- Cases: {cases}.
- Image channels: {channels}.
- Volumes: {size} voxels of {spacing} mm, RAS.
- Intensities: {intensity} became 0 and 1. Samples are in the typical range of the training set,
  {limits}.

## Training

{training}

## Figures

{figures}

## Limits

- Not for diagnosis, treatment or any decision about a patient. Not a medical device; no radiologist has rated
  its samples.
- It was trained on {seen} only: it cannot generate what they lack, and it has their biases. Their
  scanners, ages and diseases are not known here.
- It generates volumes of {size} voxels of {spacing} mm. Samples lack the detail that the autoencoder loses.
- {memorisation}
- On other hardware, or with other versions, a seed gives the same volume only up to rounding.
- The rights to the weights follow from those to the data, which are not known here.

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
    """The card, in Markdown.

    Args:
        origin: the `history` of each checkpoint.
        about: `description`, `authors`, `data_source`, and `channels`, the meaning of each image channel.
        metrics: as of `read_metrics`.
        formats: those that were written.
        takes: as of `write_torchscript`.
    """
    process, geometry, cases = networks.process, networks.geometry, origin["diffusion_unet"]["cases"]
    sampler, steps = networks.sampling()
    return CARD.format(
        title=title,
        description=about["description"],
        authors=about["authors"],
        autoencoder=_network(config["autoencoder_def"], networks.autoencoder),
        factor=per_axis(downsampling_factor(config["autoencoder_def"])),
        latents=by(networks.latent_shape),
        scale_factor=networks.scale_factor,
        unet=_network(config["diffusion_def"], networks.unet),
        prediction=process.prediction,
        noise=f"rectified flow, shift {process.shift:g}"
        if process.is_flow
        else f"a noise schedule of {process.num_train_timesteps} steps",
        conditions=networks.conditions.describe(),
        sampler=sampler,
        steps=steps,
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
        use=usage(networks, formats, takes),
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
    rates = f"{how['lr']:g} (Adam)"
    if how["optimizer"] == "muon":
        rates += f", {how['muon_lr']:g} (Muon)"
    return {
        **known,
        "training": length,
        "these weights": f"{chosen}; {average}",
        "batch of a process": str(how["batch_size"] * how["accumulate_steps"]),
        "learning rate": f"{rates}, {how['lr_schedule']}",
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
    "power_share": "{:.3g} of the high-frequency power retained",
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
        unit = one.get("unit")
        value = _number(one["value"], unit) or one.get("missing") or "missing"
        of_value, of_floor = _interval(one.get("interval")), _interval(one.get("floor_interval"))
        cells = [one["group"], one["name"], value, of_value, _number(one.get("floor"), unit), of_floor]
        cells += [one.get(key) or "" for key in ("better", "counts")]
        rows.append([" ".join(cell.split()).replace("|", "\\|") for cell in cells])
    lines += [f"| {' | '.join(row)} |" for row in rows]
    verdicts = [f"- {' '.join(one['text'].split())}" for one in metrics["verdicts"]]
    return [*lines, "", *verdicts] if verdicts else lines


def _number(value: float | None, unit: str | None) -> str:
    return "" if value is None else f"{value:.4g} {unit or ''}".rstrip()


def _interval(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
