"""Build the networks that a config names, check what they can take, and load weights of any origin into
them."""

import difflib
import importlib
import inspect
from collections.abc import Sequence

import torch
from monai.utils import IgniteInfo
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ldm import UserError

NETWORKS = ("monai.networks.nets", "monai.apps.generation.maisi.networks", "generative.networks.nets")
SCHEDULERS = ("monai.networks.schedulers", "generative.networks.schedulers")


def resolve_references(section, config: dict, where: str, seen: tuple[str, ...] = ()):
    """Replace each `"@name"` (or `"$@name"`) in a section by the config's value of that name.

    Nested names are written `@section::key`. No other `$` expression is evaluated: a config is data.
    """
    if isinstance(section, dict):
        return {
            key: resolve_references(value, config, f"{where}.{key}", seen) for key, value in section.items()
        }
    if isinstance(section, list):
        return [resolve_references(value, config, where, seen) for value in section]
    if not isinstance(section, str) or not section.startswith(("@", "$")):
        return section
    name = section.removeprefix("$")
    if not name.startswith("@"):
        raise UserError(
            f"{where}: {section!r} is an expression. A config is data: write the value itself, or @name."
        )
    name = name[1:].replace("#", "::")
    if name in seen:
        raise UserError(f"{where}: the reference @{name} leads back to itself.")
    value = config
    for part in name.split("::"):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{where}: @{name} refers to a key that the config does not have.")
        value = value[part]
    return resolve_references(value, config, where, (*seen, name))


def named_class(target: str, packages: Sequence[str], where: str) -> type[nn.Module]:
    """The class that a `_target_` names, if it is a network (or scheduler) class of one of `packages`."""
    module_name, _, class_name = target.rpartition(".")
    package = next((p for p in packages if module_name == p or module_name.startswith(p + ".")), None)
    if package is None:
        raise UserError(
            f"{where}: _target_ {target!r} is not allowed. It may name a class of {', '.join(packages)}."
        )
    if package == "generative.networks.schedulers":
        # monai-generative 0.2.3 looks for IgniteInfo where MONAI no longer has it.
        importlib.import_module("monai.config").IgniteInfo = IgniteInfo
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise UserError(f"{where}: _target_ {target!r} cannot be imported ({error}).") from None
    if not (
        isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(package)
    ):
        known = [n for n, c in vars(importlib.import_module(package)).items() if isinstance(c, type)]
        near = difflib.get_close_matches(class_name, known, 1)
        hint = f" Did you mean {package}.{near[0]}?" if near else ""
        raise UserError(f"{where}: _target_ {target!r} is no network or scheduler class.{hint}")
    return found


def check_definition(definition: dict, packages: Sequence[str], where: str) -> type[nn.Module]:
    """The class that a section's `_target_` names. Raises UserError also for an argument it does not have."""
    cls = named_class(definition["_target_"], packages, where)
    signature = inspect.signature(cls)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in definition.keys() - {"_target_"}:
        if key not in signature.parameters and not takes_any:
            near = difflib.get_close_matches(key, signature.parameters, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"{where}.{key}: {cls.__name__} has no such argument.{hint}")
    return cls


def instantiate(definition: dict, packages: Sequence[str], where: str) -> nn.Module:
    """Build what a section with resolved references defines: `_target_` names the class, the rest its
    arguments."""
    cls = check_definition(definition, packages, where)
    arguments = {key: value for key, value in definition.items() if key != "_target_"}
    try:
        return cls(**arguments)
    except (TypeError, ValueError, AssertionError, NotImplementedError, ZeroDivisionError) as error:
        raise UserError(f"{where}: {cls.__name__} refuses these arguments: {error}") from None


def downsampling(definition: dict) -> int:
    """Factor between a network's finest and coarsest grid: 2 for each level after the first."""
    channels = definition.get("channels", definition.get("num_channels"))
    if not isinstance(channels, list) or not channels:
        raise UserError(f"{definition['_target_']}: `channels` should list the channels of each level.")
    return 2 ** (len(channels) - 1)


def check_divisible(size: Sequence[int], divisor: int, where: str) -> None:
    """Raise UserError with the nearest sizes that fit, unless `divisor` divides each side."""
    if any(side % divisor for side in size):
        near = [
            sorted({max(divisor, side // divisor * divisor), -(-side // divisor) * divisor}) for side in size
        ]
        choices = " x ".join(" or ".join(map(str, sides)) for sides in near)
        raise UserError(
            f"{where}: {list(size)} does not fit the networks, which need multiples of {divisor}: {choices}."
        )


def check_discriminator_size(discriminator: nn.Module, size: Sequence[int], where: str) -> None:
    """Raise UserError where patches of this size leave the discriminator nothing to judge."""
    side = min(size)
    for module in discriminator.modules():
        if isinstance(module, nn.Conv3d):
            side = (side + 2 * module.padding[0] - module.kernel_size[0]) // module.stride[0] + 1
    # Instance normalisation needs more than one value, hence at least 2 after the last convolution but one.
    if side < 1:
        raise UserError(
            f"{where}: {list(size)} is too small for the discriminator. Lower its `num_layers_d` or set "
            "adversarial_weight to 0."
        )


def add_checkpointing(network: nn.Module) -> None:
    """Compute the activations of each block again in the backward pass, in place.

    `DiffusionModelUNet` has no switch for it, and `AutoencoderKL`'s covers encoder and decoder as one piece
    each, which lowers the peak little. Names in the state dict stay as they are.
    """
    lists = [getattr(network, name, None) for name in ("down_blocks", "up_blocks")]
    lists += [getattr(getattr(network, part, None), "blocks", None) for part in ("encoder", "decoder")]
    for blocks in lists:
        for i, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else []):
            blocks[i] = checkpoint_wrapper(block)
    if isinstance(getattr(network, "middle_block", None), nn.Module):
        network.middle_block = checkpoint_wrapper(network.middle_block)


def plain_names(state: dict) -> dict:
    """Parameter names without what DDP, torch.compile or EMA put before them."""
    prefixes = ("module.", "_orig_mod.")
    while state and (prefix := next((p for p in prefixes if all(n.startswith(p) for n in state)), None)):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_weights(network: nn.Module, state: dict, where: str) -> None:
    """Load a state dict, strictly; names of monai-generative are translated to MONAI's.

    In monai-generative the attention's output projection `proj_attn` is in the file but never applied.
    MONAI's own
    `load_old_state_dict` copies it into `out_proj`, which is applied, so that the outputs differ; here
    `out_proj` becomes the identity, which is what the weights were trained with.

    Raises:
        UserError: names or shapes that do not fit the network; the first few are named.
    """
    state = plain_names(dict(state))
    own = network.state_dict()
    if set(state) != set(own):
        state = _translated(state, own)
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [name for name in set(own) & set(state) if own[name].shape != state[name].shape]
    if missing or extra or shapes:
        what = [
            f"{len(names)} {kind} ({names[0]})"
            for names, kind in (
                (missing, "missing"),
                (extra, "unknown"),
                (sorted(shapes), "of another shape"),
            )
            if names
        ]
        raise UserError(f"{where}: weights do not fit the network in the config: {', '.join(what)}.")
    network.load_state_dict(state)


def _translated(state: dict, own: dict) -> dict:
    """Names of monai-generative 0.2.3 -> names of monai.networks.nets, for an AutoencoderKL or
    DiffusionModelUNet."""
    old = dict(state)
    new = {name: old.pop(name) for name in own if name in old}
    for name in own:
        if name in new:
            continue
        if (was := name.replace(".postconv.", ".conv.").replace(".attn.to_", ".to_")) in old:
            new[name] = old.pop(was)
        elif ".attn.out_proj." in name and (was := name.replace(".attn.out_proj.", ".proj_attn.")) in old:
            old.pop(was)
            new[name] = torch.eye(len(own[name])) if name.endswith("weight") else torch.zeros_like(own[name])
        elif ".out_proj." in name and (was := name.replace(".out_proj.", ".to_out.0.")) in old:
            new[name] = old.pop(was)  # cross-attention, where the projection is applied
    # With include_fc=False MONAI's attention has no projection to load the unused one into.
    return new | {name: value for name, value in old.items() if ".proj_attn." not in name}
