"""What a volume covers, as a condition of the network: its spacing, and the body regions of its two ends.

Networks such as MAISI's `DiffusionModelUNetMaisi` have an input for each. A region is one of four, one-hot,
at the top and at the bottom of the volume; both and the spacing in mm are multiplied by 100, as MAISI does.
Other networks are told the spacing in mm among the numbers in their embedding.
"""

from collections.abc import Sequence

import torch

from ldm import UserError, brief
from ldm.data.cases import Case
from ldm.data.layouts import INDICES

SPACING, REGION = "spacing_tensor", ("top_region_index_tensor", "bottom_region_index_tensor")
REGIONS = ("head", "chest", "abdomen", "lower")  # from the top down
SCALE = 100.0


def region_of(case: Case) -> str:
    """The regions of a case, from the one at its top to the one at its bottom: `chest:abdomen`.

    Raises:
        UserError: its entry has none, or something else than four numbers of which one is 1.
    """
    names = []
    for key in INDICES:
        index = case.covariates.get(key)
        if not isinstance(index, list | tuple) or sorted(index, key=str) != [0, 0, 0, 1]:
            found = "missing" if index is None else f"found {brief(index)}"
            raise UserError(
                f"{case.name}: {key}: {found}. conditions.region needs both indices of each case in a JSON "
                "list, such as [0, 1, 0, 0] for the chest."
            )
        names.append(REGIONS[list(index).index(1)])
    if REGIONS.index(names[0]) > REGIONS.index(names[1]):
        raise UserError(f"{case.name}: its top region, {names[0]}, lies below its bottom region, {names[1]}.")
    return ":".join(names)


def check_region(text: str) -> str:
    """The value in `--condition region=chest:abdomen`. Raises UserError: it has another form."""
    top, _, bottom = text.partition(":")
    if top not in REGIONS or bottom not in REGIONS or REGIONS.index(top) > REGIONS.index(bottom):
        raise UserError(
            f"--condition region={text}: expected two of {', '.join(REGIONS)} from the top down, such as "
            "chest:abdomen."
        )
    return text


def region_tensors(regions: Sequence[str]) -> dict[str, torch.Tensor]:
    """The network's inputs of a batch of regions such as `chest:abdomen`, (B, 4) each."""
    ends = zip(*[[REGIONS.index(name) for name in one.split(":")] for one in regions], strict=True)
    one_hot = SCALE * torch.eye(len(REGIONS))
    return {key: one_hot[list(end)] for key, end in zip(REGION, ends, strict=True)}


def spacing_tensor(spacing: Sequence[float], batch: int) -> torch.Tensor:
    """The network's input of a spacing in mm, (B, 3)."""
    return SCALE * torch.tensor([*spacing]).expand(batch, -1)
