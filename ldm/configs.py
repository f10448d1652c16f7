"""Training configs: checked against the schema, completed with its defaults, compared."""

import copy
import difflib
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ldm import UserError, brief
from ldm.models.definitions import (
    NETWORKS,
    SCHEDULERS,
    check_definition,
    check_networks,
    instantiate,
    resolve_references,
)
from ldm.models.embedding import COVARIATES, embedded_size
from ldm.system.schemas import StrictValidator, explained

LABELS = "label_values"
ONLY = "only"  # of `with_labels`: label maps without images
# Keys that a checkpoint's weights depend on. `LABELS` count where labels are drawn, or are masks.
MODEL = ("autoencoder_def", "channel", "spacing", "data.own_spacing", "intensity", "with_labels", LABELS)
FIXED = {"autoencoder": MODEL, "diffusion": (*MODEL, "diffusion_def", "NoiseScheduler", "conditions")}
FIXED["diffusion"] += ("data.sizes", "data.own_spacing")
FIXED["controlnet"] = (*FIXED["diffusion"], "controlnet_def")
RESUMING = "Resume with the config that the run began with, or use another model_dir."
# Arguments of networks that change memory and speed, not the result.
RESULT_FREE = {
    "use_checkpoint",
    "use_checkpointing",
    "use_flash_attention",
    "num_splits",
    "norm_float16",
    "save_mem",
    "print_info",
}
NOT_LEARNED = {"conditions.dropout", "intensity.whole_numbers"}  # of training, and of what is written

IMAGE_TERMS = ("gradient_weight", "perceptual_weight", "adversarial_weight")  # of stage 1's loss

ABSENT = object()
SCHEMA = Path(__file__).resolve().parents[1] / "config/schema.json"


def check_config(config: dict, path: str | Path) -> dict:
    """A config ready for use: checked, its references resolved, the schema's defaults filled in.

    Args:
        path: the file that it came from, for messages.

    Raises:
        UserError: as `load_config`.
    """
    schema, config = _schema(), _with_voxels(_with_volume_channels(config, path), path)
    try:
        config = resolve_references(config, config, "config")
        check_schema(config, schema, path, hint="docs/config.md lists the keys.")
        _sizes_as_covariates(config, path)
        _embed_covariates(config, path)
    except RecursionError:
        raise UserError(f"{path}: lists or references are nested too deeply.") from None
    config.pop("_why", None)
    for section in ("autoencoder_train", "diffusion_train"):
        if "n_epochs" in config.get(section, {}):
            config[section].setdefault("max_epochs", config[section].pop("n_epochs"))
    stated = dict(config.get("intensity", {}))
    _fill(config, schema)
    if "_target_" in config["NoiseScheduler"]:
        check_definition(config["NoiseScheduler"], SCHEDULERS, "NoiseScheduler")
    if config["with_labels"] == ONLY:
        config["autoencoder_train"] |= dict.fromkeys(IMAGE_TERMS, 0.0)  # there is no image to compare
        if not config["autoencoder_train"]["label_weight"]:
            raise UserError(f"{path}: autoencoder_train.label_weight: the only term; set it above 0.")
    elif len(channels_of(config)) != config["image_channels"]:
        raise UserError(
            f"{path}: channel names {len(channels_of(config))} channel(s), "
            f"image_channels is {config['image_channels']}."
        )
    if config["spacing"] and config["longest_side"] and not config["data"]["own_spacing"]:
        raise UserError(f"{path}: spacing and longest_side: set one of them, not both.")
    _check_intensity(config, stated, path)
    _check_slices(config, path)
    _check_sizes(config, path)
    check_networks(config)
    return config


def _with_volume_channels(config: dict, path: str | Path) -> dict:
    """The config with `volume_channels`, to which its networks may refer.

    Raises:
        UserError: it has another number already, or labels without their values.
    """
    images, labels = config.get("image_channels", 1), config.get("label_values")
    with_labels = config.get("with_labels", False)
    drawn = with_labels is True or with_labels == ONLY
    if drawn and not labels:
        raise UserError(f"{path}: with_labels: name the labels by label_values, such as [1, 2].")
    if type(images) is not int or not (labels is None or isinstance(labels, list)):
        return config  # the schema says what is wrong
    channels = (images if with_labels != ONLY else 0) + (len(labels) if drawn else 0)
    found = config.get("volume_channels", channels)
    if type(found) is not int or found != channels:
        raise UserError(f"{path}: volume_channels: expected {channels}, found {brief(found)}. Leave it out.")
    return {**config, "volume_channels": channels}


def _with_voxels(config: dict, path: str | Path) -> dict:
    """The config with the network that stands for no autoencoder, where the diffusion model learns voxels.

    Raises:
        UserError: it has another autoencoder.
    """
    if config.get("diffusion_space") != "pixel":
        return config
    channels = config.get("volume_channels", 1)
    voxels = {"_target_": "ldm.models.Haar", "spatial_dims": config.get("spatial_dims", 3)}
    voxels |= {"in_channels": channels, "levels": 0}
    if config.get("autoencoder_def", voxels) != voxels:
        raise UserError(f"{path}: diffusion_space pixel: needs no autoencoder_def. Remove one of the two.")
    return {**config, "autoencoder_def": voxels, "latent_channels": config.get("latent_channels", channels)}


def _sizes_as_covariates(config: dict, path: str | Path) -> None:
    """Make each of `conditions.structure_sizes` a number among the covariates, with a list of label values.

    Raises:
        UserError: it is a covariate with categories.
    """
    section = config.get("conditions", {})
    for name, values in (sizes := section.get("structure_sizes", {})).items():
        sizes[name] = [values] if isinstance(values, int) else values
        known = section.setdefault("covariates", {}).setdefault(name, "number")
        if known != "number" and isinstance(known[0], str):
            raise UserError(
                f"{path}: conditions.covariates.{name}: a size is a number, or [low, high] in ml."
            )


def _embed_covariates(config: dict, path: str | Path) -> None:
    """Give the diffusion network an embedding of covariates and spacing, where the config leads them there.

    Raises:
        UserError: it has one of another size, or one of classes.
    """
    section, definition = config.get("conditions", {}), config.get("diffusion_def")
    covariates = section.get("covariates")
    for name, known in (covariates or {}).items():
        if known != "number" and not isinstance(known[0], str) and not known[0] < known[1]:
            raise UserError(
                f"{path}: conditions.covariates.{name}: expected [low, high], found {brief(known)}."
            )
        if known != "number" and "unknown" in known and section.get("unknown", True):
            raise UserError(
                f"{path}: conditions.covariates.{name}: 'unknown' is no category. Leave such cells empty."
            )
    if definition is None or not (size := embedded_size(section, definition)):
        return
    if (found := definition.setdefault(COVARIATES, size)) != size:
        raise UserError(f"{path}: diffusion_def.{COVARIATES}: expected {size}, found {brief(found)}.")
    if definition.get("num_class_embeds") is not None:
        raise UserError(
            f"{path}: diffusion_def.num_class_embeds: {'covariates take' if covariates else 'spacing takes'} "
            "its place. Remove it, or set conditions."
            + ("into to channels or cross_attention." if covariates else "spacing to false.")
        )


def check_schema(content: dict, schema: dict, path: str | Path, hint: str) -> None:
    """Check the content of a JSON file against a JSON Schema.

    Args:
        path: the file, for messages.
        hint: where its keys are listed; printed with an unknown or missing key that has no near one.

    Raises:
        UserError: an unknown or missing key, or a wrong value; the key is named.
    """
    errors = StrictValidator(schema).iter_errors(content)
    error = min(errors, key=lambda error: len(error.absolute_path), default=None)
    if error is None:
        return
    what = f"{explained(error)}."
    if error.validator == "required":
        what += f" {hint}"
    elif error.validator in ("additionalProperties", "unevaluatedProperties"):
        known = error.schema["properties"]
        key = next(key for key in error.instance if key not in known)
        near = difflib.get_close_matches(key, known, 1)
        near = near or [f"{name}.{key}" for name, sub in known.items() if key in sub.get("properties", ())]
        where = ".".join(map(str, [*error.absolute_path, key]))
        what = f"unknown key {brief(where)}. {f'Did you mean {near[0]}?' if near else hint}"
    raise UserError(f"{path}: {what}")


def _check_intensity(config: dict, stated: dict, path: str | Path) -> None:
    """Check that `intensity` has percentiles or a window. With a window the percentiles become null.

    Args:
        stated: the section without its defaults.

    Raises:
        UserError: it has both, or neither, or wrong values.
    """
    section, ends = config["intensity"], ("lower_percentile", "upper_percentile")
    window, (lower, upper) = section["window"], (section[end] for end in ends)
    if window is None:
        if lower is None or upper is None:
            raise UserError(f"{path}: intensity: expected two percentiles, or a window.")
        if lower >= upper:
            raise UserError(f"{path}: intensity.lower_percentile must lie below upper_percentile.")
        return
    if any(stated.get(end) is not None for end in ends):
        raise UserError(
            f"{path}: intensity: set a window or percentiles, not both. With a window, remove "
            "lower_percentile and upper_percentile, or set them to null."
        )
    section |= dict.fromkeys(ends)
    pairs = window if isinstance(window[0], list) else [window]
    numbers = all(isinstance(pair, list) and not any(isinstance(one, list) for one in pair) for pair in pairs)
    if not numbers or not all(len(pair) == 2 and pair[0] < pair[1] for pair in pairs):
        raise UserError(
            f"{path}: intensity.window: expected [low, high], such as [-1000, 1000], or a list with one such "
            f"pair for each channel; found {brief(json.dumps(window))}."
        )
    if pairs is window and len(pairs) != len(channels_of(config)):
        raise UserError(
            f"{path}: intensity.window: {len(pairs)} pair(s) for {len(channels_of(config))} channel(s)."
        )


def _check_slices(config: dict, path: str | Path) -> None:
    """Raise UserError where `slices` is set for 3D networks, or leaves open how many slices a step takes."""
    section = config["slices"]
    if config["spatial_dims"] == 3 and (section["per_volume"] is not None or section["foreground"]):
        raise UserError(f"{path}: slices: is for spatial_dims 2. Remove it.")
    if section["foreground"] and section["per_volume"] is None:
        raise UserError(
            f"{path}: slices.foreground: set slices.per_volume too, such as to 4: volumes have different "
            "numbers of slices that are not empty."
        )
    for stage in ("autoencoder_train", "diffusion_train"):
        if section["foreground"] and config[stage]["augment"]["intensity_shift"]:
            raise UserError(
                f"{path}: {stage}.augment.intensity_shift: would fill empty slices, which slices.foreground "
                "leaves out. Set one of them to 0 or false."
            )


def _check_sizes(config: dict, path: str | Path) -> None:
    """Raise UserError where `data.sizes` stands beside what it replaces, or 2D networks."""
    if not config["data"]["sizes"]:
        return
    if config["diffusion_train"]["patch_size"]:
        raise UserError(f"{path}: data.sizes and diffusion_train.patch_size: set one of them, not both.")
    if config["spatial_dims"] == 2:
        raise UserError(f"{path}: data.sizes: is for spatial_dims 3. Remove it.")


def completed(config: dict) -> dict:
    """A resolved config from a checkpoint, with the defaults of keys that are newer than it."""
    schema, config = _schema(), copy.deepcopy(config)
    _fill(config, schema)
    config.setdefault("volume_channels", config["image_channels"])
    return config


def flat(config: dict, prefix: str = "") -> dict:
    """The values of a config by dotted key."""
    values = {}
    for key, value in config.items():
        below = isinstance(value, dict) and value
        values |= flat(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return values


def put(config: dict, key: str, value: object) -> None:
    """Set the value of a dotted key. Raises UserError: a part of the key is not a section."""
    *sections, last = key.split(".")
    for name in sections:
        config = config.setdefault(name, {})
        if not isinstance(config, dict):
            raise UserError(f"{key}: {name} is not a section.")
    config[last] = value


def drop(config: dict, key: str) -> None:
    """Delete a dotted key, if it is there."""
    *sections, last = key.split(".")
    for name in sections:
        config = config.get(name, {})
    config.pop(last, None)


def differences(trained: dict, config: dict) -> dict[str, tuple[str, str]]:
    """{dotted key: the two values as text} where two configs differ."""

    def words(value: object) -> str:
        return "not given" if value is ABSENT else brief(json.dumps(value))

    was, now = flat(trained), flat(config)
    pairs = {key: (was.get(key, ABSENT), now.get(key, ABSENT)) for key in dict.fromkeys([*now, *was])}
    return {key: (words(a), words(b)) for key, (a, b) in pairs.items() if a != b}


def check_fixed(
    trained: dict,
    config: dict,
    keys: Sequence[str],
    path: Path,
    remedy: str = "",
    source: str = "the config",
) -> None:
    """Check that a config has the values that a checkpoint's weights depend on.

    Args:
        trained: the config in the checkpoint.
        keys: some of `FIXED`, or dotted ones.
        path: of the checkpoint, for the message.
        source: what holds the config, for the message.

    Raises:
        UserError: a value differs; the key is named.
    """
    trained = completed(trained)
    if not (trained["with_labels"] or config["with_labels"] or "controlnet_def" in keys):
        keys = [key for key in keys if key != LABELS]
    for key, (was, now) in differences(trained, config).items():
        if not any(f"{key}.".startswith(f"{one}.") for one in keys):
            continue
        if key.rpartition(".")[2] not in RESULT_FREE and key not in NOT_LEARNED:
            raise UserError(f"{path}: was trained with {key} {was}; {source} says {now}. {remedy}".rstrip())


def changes(trained: dict, config: dict) -> str:
    """How a config differs from a checkpoint's, on one line. A spacing that the data decide is no change."""
    found = differences(completed(trained), config)
    for key in [key for key in found if key.startswith("controlnet_train.")]:
        if found.get(key.replace("controlnet_train.", "diffusion_train.")) == found[key]:
            del found[key]  # taken from there
    if config["spacing"] is None:
        found = {key: pair for key, pair in found.items() if key not in ("spacing", "longest_side")}
    return "; ".join(f"{key} {now}, was {was}" for key, (was, now) in found.items())


def with_spacing(config: dict, spacing: Sequence[float], resumed: dict | None = None) -> dict:
    """The config with this spacing in mm where it leaves the spacing open; else the config itself.

    Raises:
        UserError: it is not the spacing of the checkpoint that is resumed.
    """
    if config["spacing"] is None:
        longest_side = config["longest_side"] if config["data"]["own_spacing"] else None
        config = {**config, "spacing": list(spacing), "longest_side": longest_side}
    if resumed:
        check_fixed(resumed["config"], config, ("spacing",), resumed["path"], RESUMING)
    return config


def _schema() -> dict:
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def _fill(config: dict, schema: dict) -> None:
    """Fill in missing keys: of `controlnet_train` with the values that `diffusion_train` has, of all others
    with the schema's defaults."""
    stated = set(config.get("controlnet_train", {}))
    _fill_defaults(config, schema, schema)
    for key in config["controlnet_train"].keys() & config["diffusion_train"].keys() - stated:
        config["controlnet_train"][key] = copy.deepcopy(config["diffusion_train"][key])


def _fill_defaults(section: dict, schema: dict, root: dict) -> None:
    """Fill in missing keys; and make numbers floats, since torch does not always accept an int."""
    for key, about in schema.get("properties", {}).items():
        while "$ref" in about:
            about = functools.reduce(dict.__getitem__, about["$ref"].removeprefix("#/").split("/"), root)
        if key not in section and "default" in about and not (key != "_target_" and "_target_" in section):
            section[key] = copy.deepcopy(about["default"])
        value = section.get(key)
        if isinstance(value, dict):
            _fill_defaults(value, about, root)
        elif "number" in about.get("type", ()) and isinstance(value, int):
            section[key] = float(value)
        elif isinstance(value, list) and about.get("items", {}).get("type") == "number":
            section[key] = [float(one) for one in value]


def channels_of(config: dict) -> tuple[int, ...]:
    """The channels of an image that are used, in this order; none of label maps alone."""
    if config["with_labels"] == ONLY:
        return ()
    return tuple(config["channel"]) if isinstance(config["channel"], list) else (config["channel"],)


def labels_of(config: dict) -> tuple[int, ...]:
    """The values of the labels that are drawn, with images or alone; none without `with_labels`."""
    return tuple(config["label_values"]) if config["with_labels"] else ()


def define_network(config: dict, key: str) -> nn.Module:
    """Build the network of a config section, such as `autoencoder_def`."""
    if key not in config:
        raise UserError(f"{key}: missing from the config.")
    return instantiate(config[key], NETWORKS, key)
