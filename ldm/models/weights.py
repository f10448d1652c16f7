"""Load weights into a network: of this project, MONAI, monai-generative, Lightning."""

from collections import Counter

import torch
from torch import nn

from ldm import UserError


def plain_names(state: dict) -> dict:
    """Parameter names without the prefixes of DDP, torch.compile and the EMA model."""
    prefixes = ("module.", "_orig_mod.")
    while state and (prefix := next((p for p in prefixes if all(n.startswith(p) for n in state)), None)):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_weights(network: nn.Module, state: dict, where: str) -> None:
    """Load a state dict, strictly. The network's part of a larger one, such as Lightning's, is found by its
    names, and names of monai-generative are translated to MONAI's.

    In monai-generative the attention's output projection `proj_attn` is stored but never applied. MONAI's
    `load_old_state_dict` copies it into `out_proj`, which is applied, so the outputs differ. Here `out_proj`
    becomes the identity, as the weights were trained.

    Raises:
        UserError: names, shapes or types do not fit, or values are not finite; the first of each kind is
            named. Or the state dict holds several such networks.
    """
    own = network.state_dict()
    state = _part_of(plain_names(dict(state)), own, where)
    if set(state) != set(own):
        state = _translated(state, own)
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    both = sorted(set(own) & set(state))
    shapes = [name for name in both if own[name].shape != state[name].shape]
    kinds = [name for name in both if own[name].is_floating_point() != state[name].is_floating_point()]
    wild = [
        name
        for name in both
        if name not in {*shapes, *kinds} and not state[name].to(own[name].dtype).isfinite().all()
    ]
    what = [
        f"{len(names)} {kind} ({names[0]})"
        for names, kind in (
            (missing, "missing"),
            (extra, "unknown"),
            (shapes, "of another shape"),
            (kinds, "of another type"),
            (wild, "not finite"),
        )
        if names
    ]
    if what:
        raise UserError(f"{where}: weights do not fit the network in the config: {', '.join(what)}.")
    network.load_state_dict(state)


def _part_of(state: dict, own: dict, where: str) -> dict:
    """The entries below one prefix, such as `autoencoder.`: the prefix with most of the network's names. All
    entries, if any has a name of the network."""
    if any(name in own for name in state):
        return state
    found = Counter()
    for name in state:
        parts = name.split(".")
        for i in range(1, len(parts)):
            found[".".join(parts[:i]) + "."] += ".".join(parts[i:]) in own
    most = max(found.values(), default=0)
    if most < len(own) / 4:
        return state
    prefixes = [prefix for prefix, count in found.items() if count == most]
    if len(prefixes) > 1:
        raise UserError(
            f"{where}: holds several networks of this kind ({', '.join(prefixes)}). Save the state dict of "
            "the right one to a file of its own."
        )
    return {name.removeprefix(p): state[name] for p in prefixes for name in state if name.startswith(p)}


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
