"""What a diffusion model is conditioned on, classifier-free guidance and autoguidance.

`cond` is one dict of tensors, whose keys are arguments of the network (`ldm.models.denoiser`); `{}` where
nothing is conditioned. It holds `class_labels`, taken from a column of `participants.tsv`, and `channels`:
the mean latent of the training set, which of data in a common frame tells the network what lies where; the
position along some axes, which a 2D network needs to know which slice it draws; and what the augmentation did
to a volume, which samples are drawn without (Karras et al., 2022, appendix F.2).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ldm import UserError, brief, configs, few
from ldm.data.augmentation import count_parameters
from ldm.data.cases import Case
from ldm.models.denoiser import Autoguided, example_cond, predict
from ldm.models.weights import load_weights

MISSING = ("", "n/a", "nan")  # of a table's cells; n/a is that of BIDS


@dataclass(frozen=True)
class Conditions:
    """The conditions of a diffusion model: class labels from a column of `participants.tsv`, the mean latent,
    the position, all, some or nothing. It is true where there are classes.

    The class of a case is the index of its value. The class after the last means "unknown": a case without a
    value, a condition that training drops, and a sample of no particular class.

    Args:
        column: of `participants.tsv`, or a key of a list's entries. None: the model is unconditioned.
        values: of the column, sorted.
        dropout: share of conditions that training drops (Ho & Salimans, 2022, alg. 1).
        mean_latent: of the training set, (c, d, h, w), scaled as z_0 is. It is never dropped.
        position: axes along which the network is told the position, a channel from -1 to 1 for each.
        shape: of the latents, (c, d, h, w), where there are channels.
        told: how many parameters of the augmentation the network is told, a constant channel for each.
    """

    column: str | None = None
    values: Sequence[str] = ()
    dropout: float = 0.0
    mean_latent: torch.Tensor | None = None
    position: Sequence[int] = ()
    shape: Sequence[int] = ()
    told: int = 0

    def __bool__(self) -> bool:
        return self.column is not None

    @classmethod
    def of_training(cls, config: dict, cases: Sequence[Case], resumed: dict | None) -> "Conditions":
        """The conditions that a config asks for, with the values of the training and validation cases, or
        those of the checkpoint that is resumed.

        Raises:
            UserError: no case has the column, or the network has another number of classes.
        """
        if resumed:
            return cls.from_checkpoint(resumed, config)
        column, position = config["conditions"]["class_labels"], tuple(config["conditions"]["position"])
        told = told_parameters(config)
        if column is None:
            return cls(position=position, told=told)
        values = sorted({value for case in cases if (value := _value(case, column)) is not None})
        if not values:
            others = sorted({key for case in cases for key in case.covariates} - {column, "participant_id"})
            hint = f"found {few(others)}" if others else "no participants.tsv was found beside the data"
            raise UserError(
                f"conditions.class_labels: no case has a value of {brief(column)} ({hint}). Name a column of "
                "participants.tsv; run cache_latents.py again if the latents were cached before it was there."
            )
        conditions = cls(column, values, config["conditions"]["dropout"], position=position, told=told)
        conditions.check_classes(config)
        return conditions

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, config: dict) -> "Conditions":
        """The conditions that a model was trained with."""
        labels, mean = checkpoint.get("conditions", {}).get("class_labels"), checkpoint.get("mean_latent")
        position, shape = tuple(config["conditions"]["position"]), tuple(checkpoint.get("latent_shape", ()))
        channels = {
            "mean_latent": mean,
            "position": position,
            "shape": shape,
            "told": told_parameters(config),
        }
        if labels is None:
            return cls(**channels)
        conditions = cls(labels["column"], labels["values"], config["conditions"]["dropout"], **channels)
        conditions.check_classes(config)
        return conditions

    def of_latents(self, shape: Sequence[int], mean: torch.Tensor | None) -> "Conditions":
        """These conditions for latents (c, d, h, w), with their mean, scaled as z_0 is, or None."""
        return replace(self, shape=tuple(shape), mean_latent=mean)

    def check_size(self, shape: Sequence[int], where: str | Path) -> None:
        """Raise UserError unless the mean latent, where there is one, has the shape of the latents."""
        if self.mean_latent is not None and (found := [*self.mean_latent.shape]) != [*shape]:
            raise UserError(
                f"{where}: its mean latent is {found}, its latents are {[*shape]}. Use the "
                "checkpoint as train_diffusion.py wrote it."
            )

    def check_classes(self, config: dict) -> None:
        """Raise UserError unless the network has a class for each value and one for unknown."""
        found, expected = config["diffusion_def"].get("num_class_embeds"), len(self.values) + 1
        if found != expected:
            raise UserError(
                f"diffusion_def.num_class_embeds: expected {expected}, found {found}: {brief(self.column)} "
                f"has {len(self.values)} values ({few(self.values)}), and one class stands for unknown."
            )

    def summary(self, cases: Sequence[Case]) -> str:
        """How many cases have each value, in one line."""
        counts = Counter(int(self.of(case)["class_labels"]) for case in cases)
        classes = ", ".join(f"{value} ({counts[i]})" for i, value in enumerate([*self.values, "unknown"]))
        return f"conditions: classes by {self.column}, with their cases: {classes}"

    def describe(self) -> str:
        """What a model card says."""
        parts = [f"`{self.column}`, one of {', '.join(self.values)}; or unknown"] if self else []
        parts += ["the mean latent of the training set"] if self.mean_latent is not None else []
        parts += ["the position along axes " + ", ".join(map(str, self.position))] if self.position else []
        parts += ["the parameters of the augmentation, none in samples"] if self.told else []
        return "; and ".join(parts) or "none"

    def state(self) -> dict:
        """The checkpoint's entries `conditions` and `mean_latent`, where there are any."""
        labels = {"column": self.column, "values": list(self.values)}
        mean = {} if self.mean_latent is None else {"mean_latent": self.mean_latent}
        return {**({"conditions": {"class_labels": labels}} if self else {}), **mean}

    def of(self, case: Case) -> dict[str, torch.Tensor]:
        """The condition of one case, without a batch dimension.

        Raises:
            UserError: a value that the model does not know.
        """
        if not self:
            return self._channels()
        value = _value(case, self.column)
        if value is not None and value not in self.values:
            raise UserError(
                f"{case.name}: its {brief(self.column)} is {brief(value)}, which the model was not trained "
                f"with ({few(self.values)}). Restore participants.tsv, or start another training."
            )
        index = len(self.values) if value is None else self.values.index(value)
        return {"class_labels": torch.tensor(index), **self._channels()}

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """As `of`, dropped with a chance of `dropout`. An unconditioned model draws nothing."""
        if self and torch.rand((), generator=generator) < self.dropout:
            return {"class_labels": torch.tensor(len(self.values)), **self._channels()}
        return self.of(case)

    def unknown(self, batch: int) -> dict[str, torch.Tensor]:
        """What stands for no condition, for a batch."""
        labels = {"class_labels": torch.full((batch,), len(self.values))} if self else {}
        return {**labels, **self._channels(batch)}

    def _channels(self, *batch: int) -> dict[str, torch.Tensor]:
        parts = [] if self.mean_latent is None else [self.mean_latent]
        for axis in self.position:
            sides = self.shape[1:]
            along = torch.linspace(-1, 1, sides[axis]).reshape(*(-1 if i == axis else 1 for i in range(3)))
            parts.append(along.expand(1, *sides))
        parts += [torch.zeros(self.told, *self.shape[1:])] if self.told else []
        if not parts:
            return {}
        channels = torch.cat(parts)
        return {"channels": channels.expand(*batch, *channels.shape)}

    def tell(self, channels: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """The channels (c, d, h, w) of one case with the parameters of its augmentation, (told,), as the last
        of them, where `of` has those of a volume that is not augmented."""
        told = parameters[:, None, None, None].expand(-1, *channels.shape[1:])
        return torch.cat([channels[: len(channels) - self.told], told])

    def parse(self, texts: Sequence[str]) -> dict[str, str]:
        """`{"group": "1"}` of `["group=1"]`.

        Raises:
            UserError: the model is unconditioned, or knows no such column or value.
        """
        chosen = {}
        for text in texts:
            column, equals, value = text.partition("=")
            if not self:
                raise UserError(f"--condition {text}: this model is unconditioned. Leave it out.")
            if not equals or column != self.column or column in chosen:
                raise UserError(f"--condition {text}: expected one {self.column}=VALUE.")
            if value not in self.values:
                raise UserError(f"--condition {text}: expected one of {', '.join(self.values)}.")
            chosen[column] = value
        return chosen

    def cond(self, chosen: dict[str, str] | None, batch: int) -> dict[str, torch.Tensor]:
        """`cond` of a batch under one condition, as `parse` gives it; unknown without one."""
        if not chosen:
            return self.unknown(batch)
        labels = torch.full((batch,), self.values.index(chosen[self.column]))
        return {"class_labels": labels, **self._channels(batch)}

    def guided_model(
        self,
        unet: Callable,
        chosen: dict[str, str] | None,
        guidance: float,
        batch: int,
        device: torch.device,
    ) -> Callable:
        """The model function for a batch of samples under one condition, see `guided`."""
        cond, unknown = (
            {key: value.to(device) for key, value in self.cond(one, batch).items()} for one in (chosen, None)
        )
        return guided(unet, cond, unknown, guidance)


UNCONDITIONED = Conditions()


def _value(case: Case, column: str) -> str | None:
    value = case.covariates.get(column)
    if isinstance(value, list | dict):
        raise UserError(f"{case.name}: {brief(column)} is {brief(value)}. Expected a text or a number.")
    text = "" if value is None else str(value).strip()
    return None if text.lower() in MISSING else text


def told_parameters(config: dict) -> int:
    """How many parameters of the augmentation a config's network is told."""
    if not config["conditions"]["augmentation"]:
        return 0
    return count_parameters(config["diffusion_train"]["augment"])


def check_sources(config: dict) -> None:
    """See that a config gives the network each condition that it needs, and no other.

    Raises:
        UserError: it does not; the key is named.
    """
    if "diffusion_def" not in config:
        raise UserError("diffusion_def: missing from the config.")
    definition, labels = config["diffusion_def"], "class_labels"
    needed, column = example_cond(definition, 1, [1, 1, 1]), config["conditions"][labels]
    mean, position = config["conditions"]["mean_latent"], config["conditions"]["position"]
    told = told_parameters(config)
    if config["conditions"]["augmentation"] and not told:
        raise UserError(
            "conditions.augmentation: diffusion_train.augment has neither flips nor affine changes. "
            "Set some, or leave it out."
        )
    if mean or position or told:
        needed.pop("channels", None)
        inputs, latent = definition["in_channels"], definition["out_channels"]
        expected = latent * (1 + mean) + len(position) + told
        if inputs != expected:
            parts = [f"{latent} of the noisy latents"]
            parts += [f"{latent} of conditions.mean_latent"] * mean
            parts += [f"{len(position)} of conditions.position"] * bool(position)
            parts += [f"{told} of conditions.augmentation"] * bool(told)
            raise UserError(
                f"diffusion_def.in_channels: expected {expected}, found {inputs}: {', '.join(parts)}."
            )
    if column is not None and labels not in needed:
        raise UserError(
            "conditions.class_labels: the network takes no classes. Set diffusion_def.num_class_embeds to "
            f"the number of values of {brief(column)} plus 1, or leave class_labels out."
        )
    if missing := [key for key in needed if key != labels or column is None]:
        hints = {
            labels: "name a column by conditions.class_labels",
            "channels": "set conditions.mean_latent, conditions.position or conditions.augmentation",
        }
        where = "".join(f": {hints[key]}" for key in missing[:1] if key in hints)
        raise UserError(
            f"diffusion_def: the network needs {', '.join(missing)}, which the config does not give{where}."
        )


def guided(unet: Callable, cond: dict, unknown: dict, guidance: float = 1.0) -> Callable:
    """The model function of the samplers: classifier-free guidance (Ho & Salimans, 2022, eq. 6).

    The prediction is u + guidance * (c - u), with c under `cond` and u under `unknown`; the paper's w is
    guidance - 1. At 1 it is c, in one pass of the network; else there are two.
    """

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = predict(unet, x, t, cond).float()
        if guidance == 1:
            return conditional
        unconditional = predict(unet, x, t, unknown).float()
        return unconditional + guidance * (conditional - unconditional)

    return model


def check_guide(section: dict) -> None:
    """Raise UserError where `diffusion_train` asks for autoguidance and keeps no snapshot to guide by."""
    if section["autoguidance"] != 1 and section["snapshot"] is None:
        raise UserError(
            "diffusion_train.autoguidance: needs a guide. Set diffusion_train.snapshot, such as to 0.3, or "
            "autoguidance to 1."
        )


def with_guide(unet: nn.Module, state: dict | None, config: dict, where: str | Path) -> Autoguided:
    """The network under autoguidance of the config's strength.

    Args:
        state: weights of the guide, the entry `guide` of a checkpoint.
        where: the checkpoint, for messages.

    Raises:
        UserError: there is no guide.
    """
    weight = config["diffusion_train"]["autoguidance"]
    if state is None:
        raise UserError(
            f"{where}: holds no early snapshot, as diffusion_train.autoguidance {weight:g} needs. Train with "
            "diffusion_train.snapshot, or set autoguidance to 1."
        )
    guide = configs.define_network(config, "diffusion_def")
    load_weights(guide, state, f"{where}: guide")
    return Autoguided(unet, guide, weight)


def with_any_guide(unet: nn.Module, config: dict, device: torch.device) -> nn.Module:
    """The network as it samples, where a forecast of memory asks for its size and not for its weights: under
    autoguidance, where the config has it, of a guide with random weights."""
    weight = config["diffusion_train"]["autoguidance"]
    if weight == 1:
        return unet
    return Autoguided(unet, configs.define_network(config, "diffusion_def").to(device), weight)
