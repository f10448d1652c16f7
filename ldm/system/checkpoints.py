"""Write and read checkpoints: written whole or not at all, and read without running code."""

import hashlib
import json
import re
import warnings
import zipfile
from pathlib import Path

import torch
from jsonschema import validators
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from ldm import UserError, brief
from ldm.system.files import written_whole
from ldm.system.schemas import StrictValidator, fault, fields

FORMAT = 1
MEAN_LATENT = "mean_latent"  # an entry beside the weights that is a tensor
GUIDE = "guide."  # before the names of a guide's weights in safetensors


# ---------------------------------------------------------------- entries


def _is_dense(_, value) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _is_floats(_, value) -> bool:
    return _is_dense(_, value) and value.is_floating_point()


def _is_sum(_, value) -> bool:
    return _is_floats(_, value) and value.shape == (2,) and bool(value.isfinite().all())


def _is_json_object(_, value) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, dict)


def _is_interval(_, value) -> bool:
    number = StrictValidator({"type": "number"}).is_valid
    return isinstance(value, list) and len(value) == 2 and all(map(number, value)) and value[0] < value[1]


TYPES = {  # beyond those of JSON
    "array": lambda _, value: isinstance(value, list | tuple),
    "dense tensor": _is_dense,
    "dense tensor of floats": _is_floats,
    "sum and count": _is_sum,
    "JSON object": _is_json_object,
    "interval": _is_interval,
}
Validator = validators.extend(StrictValidator, type_checker=StrictValidator.TYPE_CHECKER.redefine_many(TYPES))

STATE_DICT = {
    "type": "object",
    "minProperties": 1,
    "propertyNames": {"type": "string"},
    "additionalProperties": {"type": "dense tensor"},
}
STATE_DICT_OR_NONE = {**STATE_DICT, "type": ["object", "null"]}
FLOATS = {"type": "dense tensor of floats"}
AMOUNT, POSITIVE = {"type": "number", "minimum": 0}, {"type": "number", "exclusiveMinimum": 0}
COUNT, SIZE = {"type": "integer", "minimum": 0, "maximum": 2**53}, {"type": "integer", "minimum": 1}
TEXTS = {"type": "array", "items": {"type": "string"}}
SCALE_FACTOR = {"type": "number", "minimum": 1e-9, "maximum": 1e9}  # 1 / std of latents, with room to spare


def _array(items: dict, count: int) -> dict:
    return {"type": "array", "items": items, "minItems": count, "maxItems": count}


def _stepper(state: dict, **more) -> dict:
    """The state of a `Optimizer`, which checks itself that it fits the parameters."""
    adam, muon = fields(step=FLOATS, exp_avg=FLOATS, exp_avg_sq=FLOATS), fields(momentum=FLOATS)
    optimizer = fields(
        state={"type": "object", "additionalProperties": {"anyOf": [adam, muon]}, **state},
        param_groups=_array(fields(lr=AMOUNT, betas=_array(AMOUNT, 2)), 1),
    )
    factors = dict.fromkeys(("scale", "growth_factor", "backoff_factor"), POSITIVE)
    scaling = fields(**factors, growth_interval=SIZE, _growth_tracker=COUNT)
    scaler = {"type": "object", "anyOf": [{"maxProperties": 0}, scaling]}
    return {**fields(optimizer=optimizer, scaler=scaler), **more}


EPOCH_LAYOUT = ("batches_per_epoch", "cases_per_batch", "accumulate_steps")
COUNTS = ("epoch", "batch", "step", "masked", "lines", *EPOCH_LAYOUT)
ENTRIES = {  # of a checkpoint of this project: what each is, where it is present
    "format": SIZE,
    "model": STATE_DICT,
    "config": {"type": "JSON object", "required": ["autoencoder_def", "channel", "spacing", "intensity"]},
    # the data, and the position in the training
    "subjects": fields(training=TEXTS, validation=TEXTS),
    **dict.fromkeys(COUNTS, COUNT),
    "seconds": AMOUNT,
    "sums": {"type": "object", "additionalProperties": {"type": "sum and count"}},
    # what else the next step depends on; the discriminator takes its first step after the warm-up
    "stepper": _stepper({"minProperties": 1}),
    "ema": STATE_DICT_OR_NONE,
    "discriminator": STATE_DICT_OR_NONE,
    "discriminator_stepper": _stepper({}, type=["object", "null"]),
    "guide": STATE_DICT_OR_NONE,  # an early snapshot of a diffusion model, for autoguidance
    # validation
    "best": {"type": "number"},
    "validation": {"type": "object", "properties": {"power": {"type": "number"}}},
    # what sampling needs beside the weights of a diffusion model
    "scale_factor": SCALE_FACTOR,
    "autoencoder": {"type": "string"},  # `weights_hash`
    "latent_shape": _array(SIZE, 4),
    "conditions": {  # of a conditioned model, see `ldm.diffusion.conditioning`
        "type": "object",
        "properties": {
            "class_labels": fields(column={"type": "string"}, values={**TEXTS, "minItems": 1}),
            "covariates": fields(
                columns={"type": "object", "additionalProperties": {"type": "array", "minItems": 1}},
                rows={"type": "array", "items": {"type": "array"}},
            ),
            "regions": TEXTS,
            "modalities": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        },
    },
    MEAN_LATENT: FLOATS,  # an input of the network
    # of a ControlNet: the `weights_hash` of its diffusion model, and the labels of its masks
    "unet": {"type": "string"},
    "label_values": {"type": "array", "items": SIZE, "minItems": 1},
    "shift": POSITIVE,  # of the times of rectified flow; 1 in other schedules
    "geometry": fields(
        spacing=_array(POSITIVE, 3),
        size=_array(SIZE, 3),
        limits={"type": "array", "items": {"type": "interval"}},  # none of label maps alone
    ),
}
ENTRIES["structures"] = {"type": "object"}  # of a ControlNet: as of `ldm.data.structures.usual_medians`
ENTRIES["empty_masks"] = {"type": "boolean"}
ENTRIES["geometry"]["properties"]["structures"] = ENTRIES["structures"]  # of a model of labels
ENTRIES["geometry"]["properties"]["slices"] = _array({"type": "integer", "minimum": 0}, 2)  # of 2D networks
for _range in ("spacing_range", "fov_range"):  # that were trained on, a pair for each axis
    ENTRIES["geometry"]["properties"][_range] = _array(_array(POSITIVE, 2), 3)
CHECKPOINT = Validator(
    {
        "type": "object",
        "properties": ENTRIES,
        "required": ["format", "model", "config"],
        "dependentRequired": {
            "scale_factor": ["autoencoder", "latent_shape", "geometry"],
            "best": ["epoch"],
        },
    }
)


# ---------------------------------------------------------------- writing


def save_checkpoint(path: Path, content: dict, keep: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all; the previous one is renamed to `keep`.

    Raises:
        OSError: as `written_whole`.
    """
    with written_whole(path, keep) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:  # torch's zip writer turns an OSError into one
            cause = error.__cause__ or error.__context__
            raise cause if isinstance(cause, OSError) else OSError(brief(error)) from None


def save_safetensors(path: Path, content: dict) -> None:
    """Write what sampling needs as a safetensors file: the weights under their plain names, those of a guide
    after `guide.`, and the mean latent; in the metadata every other entry as JSON, and a SHA-256 over all.

    Raises:
        OSError: as `written_whole`.
    """
    entries = {"format": FORMAT, **content}
    state = {name: tensor.contiguous() for name, tensor in entries.pop("model").items()}
    for name, tensor in (entries.pop("guide", None) or {}).items():
        state[GUIDE + name] = tensor.contiguous()
    if MEAN_LATENT in entries:
        state[MEAN_LATENT] = entries.pop(MEAN_LATENT).contiguous()
    metadata = {key: json.dumps(value) for key, value in entries.items()}
    with written_whole(path) as file:
        file.write(to_safetensors(state, {**metadata, "sha256": _digest(metadata, state)}))


def _read_safetensors(path: Path) -> dict:
    """A checkpoint that `save_safetensors` wrote, or `{"model": state}` of other safetensors files.

    Raises:
        UserError: the SHA-256 does not match the content; other files have none.
    """
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata() or {}, file.keys()
        state = {name: file.get_tensor(name) for name in names}
    digest = metadata.pop("sha256", None)
    if digest is None and "config" not in metadata:
        return {"model": state}
    if digest != _digest(metadata, state):
        raise UserError(f"{path}: damaged (its SHA-256 does not match). Use another checkpoint.")
    entries = {key: json.loads(value) for key, value in metadata.items()}
    if MEAN_LATENT in state:
        entries[MEAN_LATENT] = state.pop(MEAN_LATENT)
    guide = {name: state.pop(name) for name in list(state) if name.startswith(GUIDE)}
    if guide:
        entries["guide"] = {name.removeprefix(GUIDE): tensor for name, tensor in guide.items()}
    return {**entries, "model": state}


def _digest(metadata: dict[str, str], state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{sorted(metadata.items())} {weights_hash(state)}".encode()).hexdigest()


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict: names, types, shapes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- reading

MADE_BY = {"autoencoder": "train_autoencoder.py", "unet": "train_diffusion.py"}
MADE_BY["controlnet"] = "train_controlnet.py"


def require_checkpoint(path: Path, role: str) -> None:
    """Raise UserError, with the next step, where the checkpoint of a role (of `MADE_BY`) is missing."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint. Run {MADE_BY[role]} first, or name a file of weights by --{role}."
        )


def _read_pickle(path: Path) -> dict:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{path}: damaged ({damaged} fails its checksum). Use another checkpoint.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles and TorchScript: `_why_unread` is clearer
        return torch.load(path, map_location="cpu", weights_only=True)


def _why_unread(path: Path, error: Exception) -> str:
    """Why torch.load refuses a file. Torch's own message advises `weights_only=False`, which would run code
    from the file."""
    more = re.search(r"GLOBAL (\S+)", text := str(error))
    if more or (zipfile.is_zipfile(path) and "TorchScript" in text):
        kind = f"a pickle that holds more than tensors ({more[1]})" if more else "a TorchScript program"
        return (
            f"{kind}. It is refused, since reading it could run code. Save its weights alone where you trust "
            "it: docs/TROUBLESHOOTING.md, Weights from elsewhere."
        )
    reason = "" if "weights_only" in text else f" ({brief(f'{type(error).__name__}: {text}')})"
    return f"not a checkpoint of tensors, or damaged{reason}. Copy it again, or use another."


def load_checkpoint(path: Path, role: str | None = None) -> dict:
    """Read a checkpoint of this project (.pt or .safetensors), or weights from elsewhere, on the CPU.

    Args:
        role: which network to take of a file that holds several: one of `MADE_BY`.

    Returns:
        The checkpoint; of weights from elsewhere `{"model": state}`, and `scale_factor` where the file has
        one.

    Raises:
        UserError: the file is missing or damaged (the checksums of the zip are verified, which torch.load
            does not do, or the SHA-256 of safetensors), holds more than tensors and plain values, is of a
            later format, has an entry that `ENTRIES` does not allow, or several networks of the same role.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except UserError:
        raise
    except Exception as error:  # torch.load raises whatever a damaged or foreign file provokes
        raise UserError(f"{path}: {_why_unread(path, error)}") from None
    if not (isinstance(content, dict) and "format" in content):
        return _weights_from_elsewhere(path, content, role)
    version = content["format"]
    if StrictValidator(SIZE).is_valid(version) and version > FORMAT:
        raise UserError(f"{path}: written by a later version of this project (format {brief(version)}).")
    if what := fault(CHECKPOINT, content):
        raise UserError(f"{path}: wrong entry: {what}. Use another checkpoint.")
    return content


STATE_DICTS = ("state_dict", "model", "model_state_dict")  # as MONAI, Lightning and others name it
ROLE_NAMES = {"autoencoder": ("autoencoder", "vae"), "unet": ("unet", "diffusion")}  # MAISI: unet_state_dict
ROLE_NAMES["controlnet"] = ("controlnet",)


def _weights_from_elsewhere(path: Path, content: object, role: str | None) -> dict:
    """The only state dict of a file, or the one of its role, and the scale factor beside it."""
    is_weights = Validator(STATE_DICT).is_valid
    if is_weights(content):
        return {"model": content}
    networks = {k: v for k, v in content.items() if is_weights(v)} if isinstance(content, dict) else {}
    if not networks:
        raise UserError(f"{path}: holds neither a checkpoint of this project nor a state dict.")
    of_role = [key for key in networks if any(word in str(key).lower() for word in ROLE_NAMES.get(role, ()))]
    usual = [key for key in STATE_DICTS if key in networks]
    chosen = of_role or usual[:1] or list(networks)
    if len(chosen) > 1:
        raise UserError(
            f"{path}: holds several networks ({brief(', '.join(map(str, chosen)))}). Save the state dict of "
            "the right one to a file of its own."
        )
    found = {"model": networks[chosen[0]]}
    if "scale_factor" in content:
        factor = content["scale_factor"]
        if isinstance(factor, torch.Tensor) and factor.numel() == 1:  # MAISI's
            factor = factor.item()
        if what := fault(StrictValidator(SCALE_FACTOR), factor):
            raise UserError(f"{path}: scale_factor: {what}. Use another checkpoint.")
        found["scale_factor"] = factor
    return found
