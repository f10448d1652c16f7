"""Build the networks that a config names, and check that they fit its images and each other."""

import contextlib
import difflib
import importlib
import inspect
import itertools
import math
import typing
from collections.abc import Iterable, Iterator, Sequence

import torch
from monai.networks.nets import VQVAE
from monai.utils import IgniteInfo
from torch import nn
from torch.utils._pytree import tree_leaves
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from ldm import UserError, brief
from ldm.models.denoiser import example_cond, predict
from ldm.models.embedding import COVARIATES, embed_covariates
from ldm.models.layers import fuse_attention, norm_in_half
from ldm.models.maisi import plain_arguments, plain_norms
from ldm.models.quantised import with_codebook
from ldm.models.slicewise import on_volumes, per_volume_axis
from ldm.models.strides import KEY, check_strides, set_strides
from ldm.models.wavelet import Haar

NETWORKS = ("monai.networks.nets", "monai.apps.generation.maisi.networks", "generative.networks.nets")
NETWORKS += ("ldm.models",)  # Haar
OWN = (KEY, COVARIATES)  # of a definition in a config, unknown to the classes
SCHEDULERS = ("monai.networks.schedulers", "generative.networks.schedulers")
MAX_COUNT = 65_536  # the largest whole number in the arguments of a network
MAX_LEVELS = 9  # a factor of 256
MAX_VOXELS = 2**31  # of a channel: 8 GB
MAX_VALUES = 10**6  # in a config, references resolved


def resolve_references(section, config: dict, where: str):
    """Replace each `"@name"` (or `"$@name"`) in a section by the config's value of that name.

    Nested names are written `@section::key`, as in MONAI. No other `$` expression is evaluated: a config is
    data.

    Raises:
        UserError: a reference to a missing key or to itself, another expression, or too many values.
    """
    count = itertools.count()

    def resolved(value, where: str, seen: tuple[str, ...]):
        if next(count) > MAX_VALUES:  # each reference to a list of two references doubles it
            raise UserError(f"{where}: references to references make more than {MAX_VALUES} values.")
        if isinstance(value, dict):
            return {key: resolved(one, f"{where}.{key}", seen) for key, one in value.items()}
        if isinstance(value, list):
            return [resolved(one, where, seen) for one in value]
        if not isinstance(value, str) or not value.startswith(("@", "$")):
            return value
        name = value.removeprefix("$")
        if not name.startswith("@"):
            hint = "A config is data: write the value itself, or @name."
            raise UserError(f"{where}: {value!r} is an expression. {hint}")
        name = name[1:].replace("#", "::")
        if name in seen:
            raise UserError(f"{where}: the reference @{name} leads back to itself.")
        found = config
        for part in name.split("::"):
            if not isinstance(found, dict) or part not in found:
                raise UserError(f"{where}: @{name} refers to a key that the config does not have.")
            found = found[part]
        return resolved(found, where, (*seen, name))

    return resolved(section, where, ())


def named_class(target: str, packages: Sequence[str], where: str) -> type[nn.Module]:
    """The class that a `_target_` names.

    Raises:
        UserError: it is no network or scheduler class of `packages`.
    """
    module_name, _, class_name = target.rpartition(".")
    package = next((p for p in packages if module_name == p or module_name.startswith(p + ".")), None)
    if package is None:
        allowed = ", ".join(packages)
        raise UserError(f"{where}: _target_ {target!r} is not allowed. It may name a class of {allowed}.")
    if package == "generative.networks.schedulers":
        # monai-generative 0.2.3 looks for IgniteInfo where MONAI no longer has it.
        importlib.import_module("monai.config").IgniteInfo = IgniteInfo
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise UserError(f"{where}: _target_ {target!r} cannot be imported ({error}).") from None
    own = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(package)
    if not own:
        known = [n for n, c in vars(importlib.import_module(package)).items() if isinstance(c, type)]
        hint = _did_you_mean(class_name, known, f"{package}.")
        raise UserError(f"{where}: _target_ {target!r} is no network or scheduler class.{hint}")
    return found


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def check_definition(definition: dict, packages: Sequence[str], where: str) -> type[nn.Module]:
    """The class of a section, whose arguments are checked by its signature and type hints.

    Raises:
        UserError: the class is not allowed, or an argument is unknown, of a wrong type or too large.
    """
    cls = named_class(definition["_target_"], packages, where)
    parameters, hints = inspect.signature(cls).parameters, typing.get_type_hints(cls.__init__)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in definition.keys() - {"_target_", *OWN}:
        if key not in parameters and not takes_any:
            hint = _did_you_mean(key, parameters)
            raise UserError(f"{where}.{key}: {cls.__name__} has no such argument.{hint}")
        value, default = definition[key], parameters[key].default if key in parameters else None
        if value is default is None:  # though the hint may say int
            continue
        if packages is NETWORKS and any(
            type(n) is int and not 0 <= n <= MAX_COUNT for n in tree_leaves(value)
        ):
            expected = f"whole numbers from 0 to {MAX_COUNT}"
            raise UserError(f"{where}.{key}: expected {expected}, found {brief(value)}.")
        if key in hints and not (_is_a(value, hints[key]) or _is_a(_tuples(value), hints[key])):
            kind = inspect.formatannotation(hints[key]).replace("collections.abc.", "")
            raise UserError(f"{where}.{key}: expected {kind}, found {brief(value)}.")
    return cls


def _tuples(value):
    """A value of JSON with tuples for lists, as some arguments are declared."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_a(value, kind) -> bool:
    try:
        check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def instantiate(definition: dict, packages: Sequence[str], where: str) -> nn.Module:
    """Build the network or scheduler of a section with resolved references: `_target_` names the class, the
    other keys are its arguments.

    Raises:
        UserError: as `check_definition`, or the class raises an error.
    """
    cls = check_definition(definition, packages, where)
    arguments = {key: value for key, value in definition.items() if key not in ("_target_", *OWN)}
    if COVARIATES in definition:
        arguments["num_class_embeds"] = 1  # an embedding, which `embed_covariates` replaces
    arguments = plain_arguments(cls, arguments, where)
    try:
        built = cls(**arguments)
    except Exception as error:  # of any type: its arguments caused it
        raise UserError(f"{where}: {cls.__name__} refuses these arguments: {brief(error)}") from None
    if packages is not NETWORKS:
        return built
    if KEY in definition:
        set_strides(built, definition[KEY], where)
    if COVARIATES in definition:
        embed_covariates(built, definition[COVARIATES], where)
    if isinstance(built, VQVAE):
        built = with_codebook(built)
    if definition.get("spatial_dims") == 2 and not isinstance(built, Haar):
        on_volumes(built)
    plain_norms(built)
    return norm_in_half(fuse_attention(built))


def check_networks(config: dict) -> None:
    """Build the networks of a config and run them on a small volume, with zeros for the UNet's conditions, on
    torch's meta device, where tensors have shapes but no values: it takes no memory.

    Raises:
        UserError: a network cannot be built, or does not fit the images or the latents.
    """
    for key in [key for key in ("autoencoder_def", "diffusion_def") if key in config]:
        dims, expected = config[key].get("spatial_dims"), config["spatial_dims"]
        if (type(dims), dims) != (int, expected):
            raise UserError(f"{key}.spatial_dims: expected {expected}, found {brief(dims)}.")
        if KEY in config[key]:
            check_strides(config[key][KEY], dims, key)
        if (levels := _level_count(config[key])) > MAX_LEVELS:
            raise UserError(f"{key}: {levels} levels are too many. Expected at most {MAX_LEVELS}.")
    with torch.device("meta"), torch.no_grad():
        images = small_input(config, "autoencoder_def")
        autoencoder = _checked_layers(config, "autoencoder_def")
        with _explained("autoencoder_def", "as an autoencoder", images):
            latents = autoencoder.encode(images)[0]
            reconstruction = autoencoder.decode(latents)
        _check_same("autoencoder_def: it reconstructs", reconstruction, "images", images)
        if "diffusion_def" not in config:
            return
        unet, found = _checked_layers(config, "diffusion_def"), config["diffusion_def"].get("out_channels")
        if found != latents.shape[1]:
            expected = f"{latents.shape[1]}, as many as the latents of the autoencoder have"
            raise UserError(f"diffusion_def.out_channels: expected {expected}, found {brief(found)}.")
        with _explained("diffusion_def", "with the autoencoder's latents", latents):
            cond = example_cond(config["diffusion_def"], 1, latents.shape[2:])
            output = predict(unet, latents, torch.zeros(1), cond)
        _check_same("diffusion_def: it predicts", output, "latents", latents)


def small_input(config: dict, key: str) -> torch.Tensor:
    """The smallest images (1, C, D, H, W) that both networks take or, for `diffusion_def`, such inputs of the
    UNet, with the channels of its conditions; on torch's meta device."""
    sides, channels = [2 * side for side in network_divisor(config)], config["volume_channels"]
    if key == "diffusion_def":
        sides, channels = latent_size(config, sides), config[key]["in_channels"]
    return torch.empty(1, channels, *sides, device="meta")


def _checked_layers(config: dict, key: str) -> nn.Module:
    network = instantiate(config[key], NETWORKS, key)
    empty = next((name for name, weight in network.named_parameters() if not weight.numel()), None)
    if empty is not None:
        raise UserError(f"{key}: {empty} has no weights. Expected 1 or more channels, found a 0.")
    return network.eval()


@contextlib.contextmanager
def _explained(key: str, use: str, given: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any type: its arguments caused it
        shape = " x ".join(map(str, given.shape))
        raise UserError(f"{key}: it cannot be used {use} ({shape}): {brief(error)}") from None


def _check_same(what: str, made: torch.Tensor, of: str, given: torch.Tensor) -> None:
    if made.shape != given.shape:
        made, given = (" x ".join(map(str, tensor.shape)) for tensor in (made, given))
        raise UserError(f"{what} {made} from {of} of {given}. In and out should be of one size.")


# ---------------------------------------------------------------- sizes


def _levels(definition: dict) -> list:
    levels = definition.get("channels", definition.get("num_channels"))
    if not isinstance(levels, list) or not levels:
        raise UserError(f"{definition['_target_']}: `channels` should list the channels of each level.")
    return levels


def _level_count(definition: dict) -> int:
    """The grids of a network, from the finest to the coarsest."""
    if "levels" not in definition:
        return len(_levels(definition))
    if type(halvings := definition["levels"]) is not int:
        raise UserError(
            f"{definition['_target_']}: levels: expected a whole number, found {brief(halvings)}."
        )
    return halvings + 1


def downsampling_factor(definition: dict) -> tuple[int, ...]:
    """Factor between a network's finest and coarsest grid along each axis of a volume: 2 for each level after
    the first, or as its `level_strides` say; 1 from slice to slice in 2D."""
    if KEY in definition:
        return per_volume_axis(tuple(math.prod(axis) for axis in zip(*definition[KEY], strict=True)))
    halvings = _level_count(definition) - 1
    if definition.get("_target_", "").endswith(".VQVAE"):
        steps = definition.get("downsample_parameters", [2, 4, 1, 1])
        steps = steps if isinstance(steps[0], list) else [steps] * (halvings + 1)
        return per_volume_axis((math.prod(step[0] for step in steps),) * definition["spatial_dims"])
    return per_volume_axis((2**halvings,) * definition["spatial_dims"])


def latent_size(config: dict, size: Sequence[int]) -> list[int]:
    """Sides of the latents of a volume of `size` voxels."""
    factor = downsampling_factor(config["autoencoder_def"])
    return [side // step for side, step in zip(size, factor, strict=True)]


def network_divisor(config: dict) -> tuple[int, ...]:
    """What the sides of a volume must be multiples of: the autoencoder's factor times the UNet's."""
    definitions = [config[key] for key in ("autoencoder_def", "diffusion_def") if key in config]
    factors = [downsampling_factor(one) for one in definitions]
    return tuple(math.prod(axis) for axis in zip(*factors, strict=True))


def per_axis(values: Sequence[int]) -> str:
    """`4`, or `4 x 4 x 2` where the axes differ."""
    return str(values[0]) if len(set(values)) == 1 else " x ".join(map(str, values))


def check_size(size: Sequence[int], divisor: Sequence[int], where: str) -> None:
    """Check that each side of a volume is a multiple of `divisor`.

    Raises:
        UserError: it is not; the nearest sizes are named. Or the volume is too large.
    """
    if math.prod(size) > MAX_VOXELS:
        raise UserError(f"{where}: {list(size)} are more than {MAX_VOXELS} voxels.")
    pairs = list(zip(size, divisor, strict=True))
    if any(side % step for side, step in pairs):
        near = [sorted({max(step, side // step * step), -(-side // step) * step}) for side, step in pairs]
        choices = " x ".join(" or ".join(map(str, sides)) for sides in near)
        needs = f"which need multiples of {per_axis(divisor)}: {choices}"
        raise UserError(f"{where}: {list(size)} does not fit the networks, {needs}.")


def check_discriminator_size(discriminator: nn.Module, size: Sequence[int], where: str) -> None:
    """Raise UserError if patches of this size are too small for the discriminator."""
    convolutions = [one for one in discriminator.modules() if isinstance(one, nn.Conv2d | nn.Conv3d)]
    side = min(size[: convolutions[0].weight.ndim - 2])  # in 2D slices are not a side
    for module in convolutions:
        side = (side + 2 * module.padding[0] - module.kernel_size[0]) // module.stride[0] + 1
    # Instance normalisation needs more than one value, hence at least 2 after the last convolution but one.
    if side < 1:
        hint = "Lower its `num_layers_d` or set adversarial_weight to 0."
        raise UserError(f"{where}: {list(size)} is too small for the discriminator. {hint}")
