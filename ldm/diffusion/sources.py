"""Does a config give its diffusion network each condition that it needs, and no other?"""

from ldm import UserError, brief
from ldm.diffusion import modality
from ldm.diffusion.conditioning import REGION_NAME, position_channels, told_parameters
from ldm.diffusion.coverage import REGION, SPACING
from ldm.models.denoiser import example_cond
from ldm.models.embedding import COVARIATES, encoded_size, has_spacing_input


def check_sources(config: dict, stage: str = "diffusion_train") -> None:
    """See that a config gives the network each condition that it needs, and no other.

    Args:
        stage: whose augmentation should leave the conditions true.

    Raises:
        UserError: it does not; the key is named.
    """
    if "diffusion_def" not in config:
        raise UserError("diffusion_def: missing from the config.")
    definition, labels = config["diffusion_def"], "class_labels"
    needed, column = example_cond(definition, 1, [1, 1, 1]), config["conditions"][labels]
    mean, position = config["conditions"]["mean_latent"], config["conditions"]["position"]
    told, covariates = told_parameters(config), config["conditions"]["covariates"]
    if config["data"]["sizes"] and (mean or position):
        raise UserError(
            f"conditions.{'mean_latent' if mean else 'position'}: is for volumes of one size, in one frame. "
            "Leave it out, or set data.sizes to null."
        )
    if config["data"]["own_spacing"] and not config["conditions"]["spacing"]:
        raise UserError(
            "data.own_spacing: a model that is not told the spacing would draw volumes of any. Set "
            "conditions.spacing to true."
        )
    section, augment = config["conditions"], config[stage]["augment"]
    if section["region"] and 2 in augment["flip_axes"]:
        raise UserError(
            f"{stage}.augment.flip_axes: 2 turns a volume upside down, which conditions.region would not "
            "follow. Leave it out."
        )
    scaled = next((key for key in ("structure_sizes", "spacing") if section[key]), None)
    if scaled and augment["scale"] and not section["augmentation"]:
        raise UserError(
            f"{stage}.augment.scale: changes the size of what is drawn, and conditions.{scaled} would not "
            "follow. Set it to 0, or conditions.augmentation to true."
        )
    if config["conditions"]["augmentation"] and not told:
        raise UserError(
            "conditions.augmentation: diffusion_train.augment has neither flips nor affine changes. "
            "Set some, or leave it out."
        )
    size = encoded_size(covariates, config["conditions"]["unknown"])
    into = config["conditions"]["into"] if covariates else []
    _check_coverage(config["conditions"], definition, needed)
    if "embedding" in into:
        needed.pop(labels, None)
        if column is not None:
            raise UserError(
                "conditions.class_labels: covariates take its place in the network. Name the column among "
                "conditions.covariates, or set conditions.into to channels or cross_attention."
            )
    if "cross_attention" in into:
        needed.pop("context", None)
        if (found := definition.get("cross_attention_dim")) != size or not definition.get(
            "with_conditioning"
        ):
            raise UserError(
                f"diffusion_def.cross_attention_dim: expected {size}, as many numbers as encode "
                f"conditions.covariates, and with_conditioning true; found {brief(found)}."
            )
    if "mean_latent" in into and not mean:
        raise UserError("conditions.into: mean_latent needs conditions.mean_latent true.")
    constant = size if "channels" in into else 0
    if mean or position or told or constant:
        needed.pop("channels", None)
        inputs, latent = definition["in_channels"], definition["out_channels"]
        position = len(position) * len(position_channels(2, config["spatial_dims"] == 2))
        expected = latent * (1 + mean) + position + told + constant
        if inputs != expected:
            parts = [f"{latent} of the noisy latents"]
            parts += [f"{latent} of conditions.mean_latent"] * mean
            parts += [f"{position} of conditions.position"] * bool(position)
            parts += [f"{told} of conditions.augmentation"] * bool(told)
            parts += [f"{constant} of conditions.covariates"] * bool(constant)
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
            SPACING: "set conditions.spacing true",
            **dict.fromkeys(REGION, "set conditions.region true"),
            labels: "name a column by conditions.class_labels, or set conditions.modality",
            "context": "name covariates by conditions.covariates",
            "channels": "set conditions.mean_latent, conditions.position, conditions.augmentation or "
            "conditions.covariates",
        }
        where = "".join(f": {hints[key]}" for key in missing[:1] if key in hints)
        raise UserError(
            f"diffusion_def: the network needs {', '.join(missing)}, which the config does not give{where}."
        )


def _check_coverage(section: dict, definition: dict, needed: dict) -> None:
    """See that a network takes spacing and region where `conditions` gives them, and remove their inputs from
    those that it needs. Raises UserError: it does not take them."""
    if section["region"]:
        if lacking := [key for key in REGION if key not in needed]:
            raise UserError(
                f"conditions.region: the network takes no {lacking[0]}. Use MAISI's DiffusionModelUNetMaisi "
                "with include_top_region_index_input and include_bottom_region_index_input."
            )
        if REGION_NAME in section["covariates"] or section["class_labels"] == REGION_NAME:
            raise UserError("conditions.region: a column has the same name. Rename the column.")
        for key in REGION:
            del needed[key]
    if section["modality"]:
        if "class_labels" not in needed or COVARIATES in definition or section["class_labels"] is not None:
            raise UserError(
                "conditions.modality: needs classes of its own. Set diffusion_def.num_class_embeds, such as "
                "to 128, and neither conditions.class_labels nor covariates into the embedding."
            )
        if modality.NAME in section["covariates"]:
            raise UserError("conditions.modality: a column has the same name. Rename the column.")
        del needed["class_labels"]
    if section["spacing"]:
        needed.pop(SPACING, None)
        if not has_spacing_input(definition):
            needed.pop("class_labels", None)
            if section["class_labels"] is not None:
                raise UserError(
                    "conditions.spacing: takes the place of classes in this network. Name the column of "
                    "conditions.class_labels among conditions.covariates."
                )
