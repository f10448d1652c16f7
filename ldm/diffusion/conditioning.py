"""What a diffusion model is conditioned on.

`cond` is one dict of tensors, whose keys are arguments of the network (`ldm.models.denoiser`); `{}` where
nothing is conditioned. It holds classes or covariates, taken from columns of `participants.tsv`, and further
`channels`: the mean latent of the training set, which of data in a common frame tells the network what lies
where; the position along some axes, which a 2D network needs to know which slice it draws; and what the
augmentation did to a volume, which samples are drawn without (Karras et al., 2022, appendix F.2). What a
volume covers, its spacing and its body regions (`ldm.diffusion.coverage`), is never dropped.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ldm import UserError, brief, few
from ldm.data.augmentation import count_parameters
from ldm.data.cases import Case
from ldm.diffusion import modality
from ldm.diffusion.covariates import Covariates
from ldm.diffusion.coverage import REGION, SPACING, check_region, region_of, region_tensors, spacing_tensor
from ldm.diffusion.guidance import guided
from ldm.models.embedding import has_spacing_input

MISSING = ("", "n/a", "nan")  # of a table's cells; n/a is that of BIDS
REGION_NAME = "region"  # in `--condition`


@dataclass(frozen=True)
class Conditions:
    """The conditions of a diffusion model: class labels from a column of `participants.tsv`, covariates from
    several, regions, the spacing, the mean latent, the position, all, some or nothing. It is true where there
    are classes, covariates or regions.

    The class of a case is the index of its value. The class after the last means "unknown": a case without a
    value, a condition that training drops, and a sample of no particular class.

    Args:
        column: of `participants.tsv`, or a key of a list's entries. None: the model is unconditioned.
        values: of the column, sorted.
        dropout: share of conditions that training drops (Ho & Salimans, 2022, alg. 1).
        mean_latent: of the training set, (c, d, h, w), scaled as z_0 is. It is never dropped. Where it
            follows the covariates, (1 + n, c, d, h, w): the mean, and its slope over each of the n numbers
            that encode them.
        position: axes along which the network is told the position, see `position_channels`.
        shape: of the latents, (c, d, h, w), where there are channels.
        frame: sides of the latents (d, h, w) that were trained on, along which positions go from -1 to 1;
            none: those of `shape`.
        told: how many parameters of the augmentation the network is told, a constant channel for each.
        covariates: numbers and categories; None where there are none.
        slicewise: whether the network is a 2D one.
        spacing: in mm, of volumes that do not say theirs; None: the network is not told.
        spacing_input: whether it has an input for that, else it is told in its embedding.
        regions: of the training volumes, `chest:abdomen`; None: the network is not told.
        modality: whether its classes are MAISI's codes of modalities.
        codes: those that it knows.
    """

    column: str | None = None
    values: Sequence[str] = ()
    dropout: float = 0.0
    mean_latent: torch.Tensor | None = None
    position: Sequence[int] = ()
    shape: Sequence[int] = ()
    told: int = 0
    covariates: Covariates | None = None
    slicewise: bool = False
    frame: Sequence[int] = ()
    spacing: Sequence[float] | None = None
    spacing_input: bool = False
    regions: Sequence[str] | None = None
    modality: bool = False
    codes: Sequence[int] = ()

    def __bool__(self) -> bool:
        has_column = self.column is not None or self.covariates is not None
        return has_column or self.regions is not None or self.modality

    @property
    def can_drop(self) -> bool:
        """Whether something that the network is told may be unknown, as guidance needs."""
        return self.covariates.unknown if self.covariates else self.column is not None or self.modality

    @classmethod
    def of_training(
        cls, config: dict, cases: Sequence[Case], resumed: dict | None, train: Sequence[Case] = ()
    ) -> "Conditions":
        """The conditions that a config asks for, with the values of the training and validation cases, or
        those of the checkpoint that is resumed.

        Args:
            train: the training cases, whose values set the ranges of numbers.

        Raises:
            UserError: no case has a column, a value does not fit, or the network has another number of
                classes.
        """
        if resumed:
            return cls.from_checkpoint(resumed, config)
        section, told = config["conditions"], told_parameters(config)
        slicewise, axes = config["spatial_dims"] == 2, tuple(section["position"])
        conditions = cls(position=axes, told=told, dropout=section["dropout"], slicewise=slicewise)
        if section["spacing"]:
            has_input = has_spacing_input(config["diffusion_def"])
            conditions = replace(conditions, spacing=config["spacing"], spacing_input=has_input)
        if section["region"]:
            found = {case.name: region_of(case) for case in cases}
            regions = sorted(found[case.name] for case in train or cases)
            conditions = replace(conditions, regions=regions)
        if section["modality"]:
            codes = {modality.code_of(modality.modality_of(case), "") for case in train or cases}
            codes |= {0, *map(modality.generic, codes)}
            conditions = replace(conditions, modality=True, codes=sorted(codes))
            conditions.check_codes(config, cases)
        if section["covariates"]:
            covariates = _covariates_of(section, train or cases)
            conditions = replace(conditions, covariates=covariates)
            for case in cases:  # a value that does not fit is found before anything is trained
                _encoded(case, covariates)
        if (column := section["class_labels"]) is None:
            return conditions
        values = sorted({value for case in cases if (value := _value(case, column)) is not None})
        if not values:
            raise _no_values(f"class_labels: no case has a value of {brief(column)}", cases, (column,))
        conditions = replace(conditions, column=column, values=values)
        conditions.check_classes(config)
        return conditions

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, config: dict) -> "Conditions":
        """The conditions that a model was trained with; of weights from elsewhere, those of the config."""
        section, saved = config["conditions"], checkpoint.get("conditions", {})
        labels, covariates = saved.get("class_labels"), saved.get("covariates")
        if covariates is None and section["covariates"]:
            covariates = {"columns": _stated(section), "rows": []}
        if covariates is not None:
            covariates = Covariates(
                covariates["columns"], section["into"], section["unknown"], covariates["rows"]
            )
        conditions = cls(
            dropout=section["dropout"],
            mean_latent=checkpoint.get("mean_latent"),
            position=tuple(section["position"]),
            shape=tuple(checkpoint.get("latent_shape", ())),
            frame=tuple(checkpoint.get("latent_shape", ())[1:]),
            told=told_parameters(config),
            covariates=covariates,
            slicewise=config["spatial_dims"] == 2,
            spacing=checkpoint.get("geometry", config)["spacing"] if section["spacing"] else None,
            spacing_input=section["spacing"] and has_spacing_input(config["diffusion_def"]),
            regions=saved.get("regions", []) if section["region"] else None,
            modality=section["modality"],
            codes=_codes(saved, config) if section["modality"] else (),
        )
        if labels is None:
            return conditions
        conditions = replace(conditions, column=labels["column"], values=labels["values"])
        conditions.check_classes(config)
        return conditions

    def of_latents(self, shape: Sequence[int], mean: torch.Tensor | None) -> "Conditions":
        """These conditions for latents (c, d, h, w), with their mean, scaled as z_0 is, or None."""
        return replace(self, shape=tuple(shape), mean_latent=mean)

    def at(self, shape: Sequence[int]) -> "Conditions":
        """These conditions for latents of another shape, (c, d, h, w)."""
        return self if tuple(shape) == tuple(self.shape) else self.of_latents(shape, self.mean_latent)

    def of_spacing(self, spacing: Sequence[float] | None) -> "Conditions":
        """These conditions for volumes of another spacing in mm; None: of the same."""
        return self if None in (spacing, self.spacing) else replace(self, spacing=spacing)

    def check_size(self, shape: Sequence[int], where: str | Path) -> None:
        """Raise UserError unless the mean latent, where there is one, has the shape of the latents."""
        follows = self.covariates is not None and "mean_latent" in self.covariates.into
        expected = [1 + self.covariates.size, *shape] if follows else [*shape]
        if self.mean_latent is not None and (found := [*self.mean_latent.shape]) != expected:
            raise UserError(
                f"{where}: its mean latent is {found}, its latents are {[*shape]}. Use the "
                "checkpoint as train_diffusion.py wrote it."
            )

    def check_asked(self, asked: Collection[str]) -> None:
        """Raise UserError where the model cannot draw volumes of another `size` or `spacing` than its own,
        if they are in `asked`."""
        if "spacing" in asked and self.spacing is None:
            raise UserError(
                "--spacing: this model was not told spacings, and draws volumes of its own alone. Leave it "
                "out, or train with conditions.spacing."
            )
        if "size" in asked and self.mean_latent is not None:
            trained = " x ".join(map(str, self.mean_latent.shape[-3:]))
            raise UserError(
                f"--size: this model is told the mean latent of its training set ({trained}), and draws no "
                "other size. Leave it out, or train without conditions.mean_latent."
            )

    def deviations(self, cases: Sequence[Case]) -> torch.Tensor:
        """How the covariates of cases differ from the mean, (cases, n), see `Covariates.deviations`."""
        return self.covariates.deviations(torch.stack([_encoded(case, self.covariates) for case in cases]))

    def check_classes(self, config: dict) -> None:
        """Raise UserError unless the network has a class for each value and one for unknown."""
        found, expected = config["diffusion_def"].get("num_class_embeds"), len(self.values) + 1
        if found != expected:
            raise UserError(
                f"diffusion_def.num_class_embeds: expected {expected}, found {found}: {brief(self.column)} "
                f"has {len(self.values)} values ({few(self.values)}), and one class stands for unknown."
            )

    def check_codes(self, config: dict, cases: Sequence[Case]) -> None:
        """Raise UserError unless the network has a class for the code of each modality."""
        found = config["diffusion_def"].get("num_class_embeds") or 0
        most = max(modality.code_of(modality.modality_of(case), "") for case in cases)
        if found <= most:
            raise UserError(
                f"diffusion_def.num_class_embeds: expected more than {most}, the largest code of a modality; "
                f"found {found}. MAISI's networks have 128."
            )

    def summary(self, cases: Sequence[Case]) -> str:
        """How many cases have each value, in one line."""
        parts = []
        if self.column is not None:
            counts = Counter(int(self.of(case)["class_labels"]) for case in cases)
            named = enumerate([*self.values, "unknown"])
            parts += [
                f"classes by {self.column}, with their cases: "
                + ", ".join(f"{value} ({counts[i]})" for i, value in named)
            ]
        for name, known in self.covariates.columns.items() if self.covariates else ():
            found = [_known(case, name, self.covariates) for case in cases]
            if self.covariates.is_number(name):
                text = f"{name} {known[0]:g} to {known[1]:g}"
            else:
                text = f"{name} " + ", ".join(f"{one} ({found.count(one)})" for one in known)
            missing = found.count(None)
            parts += [text + f", unknown of {missing}" * bool(missing)]
        if self.regions is not None:
            counts = Counter(region_of(case) for case in cases)
            parts += ["region " + ", ".join(f"{region} ({counts[region]})" for region in sorted(counts))]
        if self.modality:
            counts = Counter(modality.modality_of(case) for case in cases)
            parts += ["modality " + ", ".join(f"{name} ({counts[name]})" for name in sorted(counts))]
        return f"conditions: {'; '.join(parts)}"

    def describe(self) -> str:
        """What a model card says."""
        parts = []
        if self.column is not None:
            parts += [f"`{self.column}`, one of {', '.join(self.values)}; or unknown"]
        for name, known in self.covariates.columns.items() if self.covariates else ():
            number = self.covariates.is_number(name)
            values = f"{known[0]:g} to {known[1]:g}" if number else f"one of {', '.join(known)}"
            parts += [f"`{name}`, {values}" + "; or unknown" * self.covariates.unknown]
        parts += ["the mean latent of the training set"] if self.mean_latent is not None else []
        parts += ["the position along axes " + ", ".join(map(str, self.position))] if self.position else []
        parts += ["the parameters of the augmentation, none in samples"] if self.told else []
        parts += ["the spacing"] if self.spacing is not None else []
        parts += ["the body regions at top and bottom"] if self.regions is not None else []
        parts += ["the modality, by MAISI's codes"] if self.modality else []
        return "; and ".join(parts) or "none"

    def examples(self, most: int) -> dict[str, dict]:
        """Conditions to draw samples under during training, by name: of each class; of each category, or the
        ends and the middle of the range, of the first covariate."""
        if self.column is not None:
            rest = self.covariates.example if self.covariates else {}
            return {f"{self.column}_{value}": {**rest, self.column: value} for value in self.values[:most]}
        if not self.covariates:
            return {}
        name, known = next(iter(self.covariates.columns.items()))
        if self.covariates.is_number(name):
            known = [known[0], sum(known) / 2, known[1]]
        return {
            f"{name}_{value:g}" if type(value) is float else f"{name}_{value}": {
                **self.covariates.example,
                name: value,
            }
            for value in known[:most]
        }

    def state(self) -> dict:
        """The checkpoint's entries `conditions` and `mean_latent`, where there are any."""
        entries = {}
        if self.column is not None:
            entries["class_labels"] = {"column": self.column, "values": list(self.values)}
        if self.covariates:
            columns = {name: list(known) for name, known in self.covariates.columns.items()}
            entries["covariates"] = {"columns": columns, "rows": [list(row) for row in self.covariates.rows]}
        if self.regions is not None:
            entries["regions"] = list(self.regions)
        if self.modality:
            entries["modalities"] = list(self.codes)
        mean = {} if self.mean_latent is None else {"mean_latent": self.mean_latent}
        return {**({"conditions": entries} if entries else {}), **mean}

    def of(self, case: Case) -> dict[str, torch.Tensor]:
        """The condition of one case, without a batch dimension.

        Raises:
            UserError: a value that the model does not know.
        """
        return self._one(case, self._chosen(case))

    def _chosen(self, case: Case) -> dict:
        """The values of a case, as `parse` gives them."""
        chosen = _known_values(case, self.covariates) if self.covariates else {}
        if self.column is not None and (value := _value(case, self.column)) is not None:
            if value not in self.values:
                raise UserError(
                    f"{case.name}: its {brief(self.column)} is {brief(value)}, which the model was not "
                    f"trained with ({few(self.values)}). Restore participants.tsv, or start another training."
                )
            chosen[self.column] = value
        if self.regions is not None:
            chosen[REGION_NAME] = region_of(case)
        if self.modality:
            chosen[modality.NAME] = modality.modality_of(case)
        return chosen

    def _one(self, case: Case, chosen: dict) -> dict[str, torch.Tensor]:
        """The condition of one case, without a batch dimension."""
        return {key: value[0] for key, value in self.of_spacing(case.spacing).cond([chosen]).items()}

    def draw(self, case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """As `of`, dropped with a chance of `dropout`. An unconditioned model draws nothing, nor does one
        without inputs for what is unknown."""
        chosen = self._chosen(case)
        if self.modality:
            chosen[modality.NAME] = modality.dropped(chosen[modality.NAME], self.dropout, generator)
        if self.can_drop and torch.rand((), generator=generator) < self.dropout:
            chosen = never_dropped(chosen)
        return self._one(case, chosen)

    def unknown(self, batch: int) -> dict[str, torch.Tensor]:
        """What stands for no condition, for a batch."""
        return self.cond([{}] * batch)

    def _channels(self) -> list[torch.Tensor]:
        """The channels that are the same in all samples, (k, d, h, w) each."""
        parts = [] if self.mean_latent is None or self.mean_latent.dim() > 4 else [self.mean_latent]
        for axis in self.position:
            sides = self.shape[1:]
            along = position_channels(sides[axis], self.slicewise, (self.frame or sides)[axis])
            shape = [-1 if i == axis else 1 for i in range(3)]
            parts.append(along.reshape(len(along), *shape).expand(-1, *sides))
        return parts + ([torch.zeros(self.told, *self.shape[1:])] if self.told else [])

    def tell(self, channels: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """The channels (c, d, h, w) of one case with the parameters of its augmentation, (told,), where `of`
        has those of a volume that is not augmented."""
        told = parameters[:, None, None, None].expand(-1, *channels.shape[1:])
        constant = self.covariates.size if self.covariates and "channels" in self.covariates.into else 0
        end = len(channels) - constant
        return torch.cat([channels[: end - self.told], told, channels[end:]])

    def parse(self, texts: Sequence[str]) -> dict:
        """`{"group": "1", "age": 70.0}` of `["group=1", "age=70"]`; of a range, `age=20:80`, its two ends.

        Raises:
            UserError: the model is unconditioned, or knows no such column or value.
        """
        chosen, names = {}, [self.column] * (self.column is not None)
        names += self.covariates.columns if self.covariates else []
        names += [REGION_NAME] if self.regions is not None else []
        names += [modality.NAME] if self.modality else []
        for text in texts:
            column, equals, value = text.partition("=")
            if not self:
                raise UserError(f"--condition {text}: this model is unconditioned. Leave it out.")
            if not equals or column not in names or column in chosen:
                expected = " or ".join(f"{name}=VALUE" for name in names)
                raise UserError(f"--condition {text}: expected one {expected}.")
            if column == REGION_NAME and self.regions is not None:
                chosen[column] = check_region(value)
            elif self.modality and column == modality.NAME:
                if modality.code_of(value, f"--condition {column}=") not in self.codes:
                    known = ", ".join(map(modality.name_of, self.codes))
                    raise UserError(f"--condition {text}: the model was trained on {known}.")
                chosen[column] = value
            elif column != self.column:
                chosen[column] = self.covariates.parse(column, value)
            elif value not in self.values:
                raise UserError(f"--condition {text}: expected one of {', '.join(self.values)}.")
            else:
                chosen[column] = value
        return chosen

    def parse_sizes(self, texts: Sequence[str], structures: Collection[str]) -> dict:
        """As `parse`, of `["ventricles=0.8"]`: shares of the range of structures' sizes.

        Args:
            structures: the names of `conditions.structure_sizes`.

        Raises:
            UserError: the model knows no such structure, or a share is none.
        """
        chosen = {}
        for text in texts:
            name, equals, share = text.rpartition("=")
            if not equals or name not in structures or name in chosen:
                expected = " or ".join(f'"{one}=SHARE"' for one in structures)
                raise UserError(
                    f"--structure-size {text}: "
                    + (f"expected one {expected}." if structures else "this model was trained without sizes.")
                )
            chosen[name] = self.covariates.at_share(name, share)
        return chosen

    def for_sample(self, chosen: dict, generator: torch.Generator) -> dict:
        """The condition of one sample: of `chosen`, as `parse` gives it, with a value of each covariate, see
        `Covariates.complete`."""
        label = {self.column: chosen[self.column]} if self.column in chosen else {}
        values = self.covariates.complete(chosen, generator) if self.covariates else {}
        if self.modality and modality.NAME in chosen:
            label[modality.NAME] = chosen[modality.NAME]
        if self.regions is None:
            return {**label, **values}
        if not (REGION_NAME in chosen or self.regions):
            raise UserError(
                f"{REGION_NAME}: the weights do not say what they were trained on. Give it by --condition "
                f"{REGION_NAME}=chest:abdomen."
            )
        place = int(torch.randint(max(1, len(self.regions)), (), generator=generator))
        region = chosen[REGION_NAME] if REGION_NAME in chosen else self.regions[place]
        return {**label, **values, REGION_NAME: region}

    def cond(self, chosen: Sequence[dict]) -> dict[str, torch.Tensor]:
        """`cond` of a batch: a condition for each sample, as `parse` gives it; what it lacks is unknown."""
        given = []
        if self.column is not None:
            known = [*self.values, None]
            given.append(torch.tensor([known.index(one.get(self.column)) for one in chosen]))
        if self.covariates:
            given.append(torch.stack([self.covariates.encode(one) for one in chosen]))
        if self.modality:
            codes = [modality.code_of(one.get(modality.NAME, "unknown"), "") for one in chosen]
            given.append(torch.tensor(codes))
        cond = self.cond_of(len(chosen), *given)
        if self.regions is not None:
            usual = next(iter(self.regions), "chest:abdomen")
            cond |= region_tensors([one.get(REGION_NAME, usual) for one in chosen])
        return cond

    @property
    def inputs(self) -> dict[str, torch.Size]:
        """The shape of each entry of `cond`, for one sample."""
        classes = [torch.zeros(1, dtype=torch.int64)]
        given = classes * (self.column is not None)
        given += [torch.zeros(1, self.covariates.size)] if self.covariates else []
        given += classes * self.modality
        regions = {} if self.regions is None else dict.fromkeys(REGION, torch.zeros(1, 4))
        return {key: value.shape for key, value in {**self.cond_of(1, *given), **regions}.items()}

    def cond_of(self, batch: int, *given: torch.Tensor) -> dict[str, torch.Tensor]:
        """`cond` of a batch of class indices (B,), encoded covariates (B, n) and codes of modalities (B,), of
        each where it is told; without regions."""
        cond, channels = {}, [one.expand(batch, *one.shape) for one in self._channels()]
        if self.column is not None:
            cond["class_labels"] = given[0]
        if self.modality:
            cond["class_labels"] = given[-1]
        embedded = []
        if self.covariates:
            vectors = given[self.column is not None]
            if "embedding" in self.covariates.into:
                embedded.append(vectors)
            if "cross_attention" in self.covariates.into:
                cond["context"] = vectors[:, None]
            if self.mean_latent is not None and self.mean_latent.dim() > 4:
                mean, slopes = self.mean_latent[0], self.mean_latent[1:]
                deviations = self.covariates.deviations(vectors)
                channels.insert(0, mean + torch.tensordot(deviations, slopes.to(deviations.device), 1))
            if "channels" in self.covariates.into:
                channels.append(vectors[..., None, None, None].expand(batch, -1, *self.shape[1:]))
        if self.spacing is not None and self.spacing_input:
            cond[SPACING] = spacing_tensor(self.spacing, batch)
        elif self.spacing is not None:
            embedded.append(torch.tensor([*self.spacing]).expand(batch, -1))
        if embedded:
            cond["class_labels"] = torch.cat(embedded, 1)
        return {**cond, "channels": torch.cat(channels, 1)} if channels else cond

    def guided_model(
        self,
        unet: Callable,
        chosen: Sequence[dict],
        guidance: float,
        device: torch.device,
        interval: tuple[float, float] | None = None,
    ) -> Callable:
        """The model function for a batch of samples, each under its condition, see `guided`."""
        cond = {key: value.to(device) for key, value in self.cond(chosen).items()}
        if guidance == 1:
            return guided(unet, cond, cond)
        unknown = {key: value.to(device) for key, value in self.cond([*map(never_dropped, chosen)]).items()}
        return guided(unet, cond, unknown, guidance, interval)


def never_dropped(chosen: dict) -> dict:
    """What of the values of a sample stays where its condition is dropped: the region."""
    return {key: value for key, value in chosen.items() if key == REGION_NAME}


UNCONDITIONED = Conditions()


def position_channels(count: int, slicewise: bool, frame: int | None = None) -> torch.Tensor:
    """What tells a network the position along an axis of so many voxels: -1 to 1, (1, count). For a 2D
    network sines and cosines of it, (4, count): a slice has one position, and of a single number that is the
    same in a whole slice, group normalisation leaves little but the sign. Where `frame` voxels were trained
    on, these go from -1 to 1, and others about the same centre keep their distances."""
    along = torch.linspace(-1, 1, count)
    if frame not in (None, count):
        along = along * (count - 1) / max(frame - 1, 1)
    if not slicewise:
        return along[None]
    angles = [turns * math.pi / 2 * along for turns in (1, 4)]
    return torch.stack([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)])


def _codes(saved: dict, config: dict) -> Sequence[int]:
    """The codes of modalities that a model was trained on; of weights from elsewhere all that its network
    has."""
    return saved.get("modalities", range(config["diffusion_def"].get("num_class_embeds") or 0))


def _value(case: Case, column: str) -> str | None:
    value = case.covariates.get(column)
    if isinstance(value, list | dict):
        raise UserError(f"{case.name}: {brief(column)} is {brief(value)}. Expected a text or a number.")
    text = "" if value is None else str(value).strip()
    return None if text.lower() in MISSING else text


def _known(case: Case, name: str, covariates: Covariates) -> float | str | None:
    """A covariate of a case; None where it is unknown."""
    text = _value(case, name)
    if text is None:
        return None
    if covariates.is_number(name):
        return _number(text, f"{case.name}: {name}")
    if text not in covariates.columns[name]:
        raise UserError(
            f"{case.name}: its {brief(name)} is {brief(text)}, expected one of "
            f"{few(list(covariates.columns[name]))}. Fix the table, or conditions.covariates.{name}."
        )
    return text


def _known_values(case: Case, covariates: Covariates) -> dict[str, float | str | None]:
    """All covariates of a case, in the order of the columns."""
    return {name: _known(case, name, covariates) for name in covariates.columns}


def _encoded(case: Case, covariates: Covariates) -> torch.Tensor:
    """As `Covariates.encode`, of a case, which is named in errors."""
    try:
        return covariates.encode(_known_values(case, covariates))
    except UserError as error:
        raise UserError(error if case.name in str(error) else f"{case.name}: {error}") from None


def _number(text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{what} is {brief(text)}, expected a number. Leave unknown values empty or n/a; for categories "
            "list them in conditions.covariates."
        )
    return number


def _covariates_of(section: dict, cases: Sequence[Case]) -> Covariates:
    """The covariates of a config's `conditions`. A number has the range of the cases, or the config's."""
    columns = {}
    for name, known in section["covariates"].items():
        texts = [text for case in cases if (text := _value(case, name)) is not None]
        if not texts:
            raise _no_values(f"covariates: no training case has a value of {brief(name)}", cases, (name,))
        if known == "number":
            values = [_number(text, f"conditions.covariates: {name}") for text in texts]
            known = [min(values), max(values)]
            if known[0] == known[1]:
                raise UserError(f"conditions.covariates: {name} is {known[0]:g} in every training case.")
        columns[name] = known
    covariates = Covariates(columns, section["into"], section["unknown"])
    rows = [[*_known_values(case, covariates).values()] for case in cases]
    return replace(covariates, rows=sorted(rows, key=str))  # in an order that does not tell the cases


def _stated(section: dict) -> dict:
    """The columns of `conditions.covariates` where no training says the ranges of numbers."""
    for name, known in section["covariates"].items():
        if known == "number":
            raise UserError(
                f"conditions.covariates.{name}: the weights do not say its range. Give it as [low, high]."
            )
    return section["covariates"]


def _no_values(what: str, cases: Sequence[Case], columns: Sequence[str]) -> UserError:
    others = sorted({key for case in cases for key in case.covariates} - {*columns, "participant_id"})
    hint = f"found {few(others)}" if others else "no participants.tsv was found beside the data"
    return UserError(
        f"conditions.{what} ({hint}). Name a column of participants.tsv; run cache_latents.py again if the "
        "latents were cached before it was there."
    )


def told_parameters(config: dict) -> int:
    """How many parameters of the augmentation a config's network is told."""
    if not config["conditions"]["augmentation"]:
        return 0
    return count_parameters(config["diffusion_train"]["augment"])


def texts_of(condition: dict) -> dict[str, str]:
    """The values of a condition as `--condition` takes them."""
    return {
        name: "unknown" if value is None else f"{value:.12g}" if isinstance(value, float) else value
        for name, value in condition.items()
    }
