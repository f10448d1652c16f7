"""Covariates, and the spacing, added to the time embedding of a diffusion network, in place of its embedding
of classes."""

from collections.abc import Sequence

from torch import nn

from ldm import UserError

COVARIATES = "covariate_embed"  # of a definition in a config: how many numbers encode the covariates


def encoded_size(columns: dict[str, Sequence | str], unknown: bool) -> int:
    """How many numbers encode covariates: one of a number, as many as there are categories, and one more of
    each covariate that may be unknown.

    Args:
        columns: for each covariate a list of categories, or anything else for a number.
    """
    numbers = [isinstance(known, str) or not isinstance(known[0], str) for known in columns.values()]
    counts = [1 if number else len(known) for number, known in zip(numbers, columns.values(), strict=True)]
    return sum(counts) + len(counts) * unknown


def has_spacing_input(definition: dict) -> bool:
    """Whether a network, by its definition in a config, has an input for the spacing of volumes."""
    return bool(definition.get("include_spacing_input"))


def embedded_size(section: dict, definition: dict) -> int:
    """How many numbers a network is told in its embedding: covariates, and the spacing where it has no input
    for that.

    Args:
        section: `conditions` of the config.
        definition: of the network.
    """
    covariates = section.get("covariates") or {}
    if "embedding" not in section.get("into", ["embedding"]):
        covariates = {}
    spacing = 3 * bool(section.get("spacing") and not has_spacing_input(definition))
    return encoded_size(covariates, section.get("unknown", True)) + spacing


def embed_covariates(network: nn.Module, size: int, where: str) -> None:
    """Replace the embedding of classes by a small network on (B, size) floats, in place.

    Args:
        network: a diffusion network that was built for one class.

    Raises:
        UserError: it has no embedding of classes.
    """
    if not isinstance(getattr(network, "class_embedding", None), nn.Embedding):
        raise UserError(
            f"{where}: {type(network).__name__} adds nothing to its time embedding. Set conditions.into to "
            "channels or cross_attention."
        )
    width = network.class_embedding.embedding_dim
    network.class_embedding = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
