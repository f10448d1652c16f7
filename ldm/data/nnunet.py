"""What users of nnU-Net have already: data sets by number, and plans."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm import UserError, brief
from ldm.data.reading import open_image
from ldm.system.files import read_json
from ldm.system.schemas import StrictValidator, fault, fields

RAW, PREPROCESSED = "nnUNet_raw", "nnUNet_preprocessed"
PLANS = "nnUNetPlans.json"
AXES = {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}
ORDER = AXES | {"items": {"enum": [0, 1, 2]}, "uniqueItems": True}
OBJECT = {"type": "object"}
CONTENT = StrictValidator(
    fields(dataset_name={"type": "string"}, transpose_backward=ORDER, configurations=OBJECT)
)
CONFIGURATION = StrictValidator(
    fields(spacing=AXES, normalization_schemes={"type": "array", "items": {"type": "string"}})
)


@dataclass(frozen=True)
class NnunetPlan:
    """What is used of an nnUNetPlans.json, along right, anterior and superior.

    Attributes:
        spacing: in mm.
        strides: of each level after the first, 1 or 2 along each axis.
        windows: of each channel, the 0.5th and the 99.5th percentile of the foreground where nnU-Net
            normalises it as CT, else None.
    """

    path: Path
    configuration: str
    spacing: list[float]
    strides: list[list[int]]
    windows: list[list[float] | None]


def dataset_folder(given: str) -> Path:
    """The folder that `--data` names: a number stands for `$nnUNet_raw/DatasetNNN_*`.

    Raises:
        UserError: a number, and the variable is not set, or no or several folders have it.
    """
    if not given.isdigit() or Path(given).exists():
        return Path(given)
    if not (root := os.environ.get(RAW)):
        raise UserError(f"{given}: a number names a data set in ${RAW}, which is not set. Name a folder.")
    wanted = f"Dataset{int(given):03d}_"
    found = [path for path in sorted(Path(root).glob(f"{wanted}*")) if path.is_dir()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{root}: expected one folder {wanted}*, found {names}.")
    return found[0]


def plans_of(folder: Path) -> Path | None:
    """The plans that nnU-Net made for a data set of `$nnUNet_raw`, if there are any."""
    root = os.environ.get(PREPROCESSED)
    path = Path(root or "") / folder.name / PLANS
    return path if root and path.is_file() else None


def read_plans(path: Path, folder: Path, image: Path, configuration: str = "3d_fullres") -> NnunetPlan:
    """Read an nnUNetPlans.json.

    nnU-Net reads axes as SimpleITK does, the last of the file first, and puts that of the largest spacing in
    front (`transpose_forward`); both are undone here.

    Args:
        folder: of the data set.
        image: one of its files, whose header says which of its axes runs where.

    Raises:
        UserError: no plans, or of another data set; or the configuration is missing.
    """
    content = read_json(path, "plans")
    if what := fault(CONTENT, content):
        raise UserError(f"{path}: {what}. Expected the plans of nnU-Net, version 2.")
    name = content["dataset_name"]
    if re.match(r"Dataset\d{3}_", folder.name) and name != folder.name:
        raise UserError(f"{path}: is for the data set {brief(name)}, not for {folder.name}.")
    chosen = _inherited(content["configurations"], configuration, path)
    if what := fault(CONFIGURATION, chosen):
        raise UserError(f"{path}: {configuration}: {what}. Expected the plans of nnU-Net, version 2.")
    image_ras = np.argsort(nib.orientations.io_orientation(open_image(image).affine)[:, 0])

    def to_ras(values: Sequence) -> list:
        file_order = [values[axis] for axis in content["transpose_backward"]][::-1]
        return [file_order[axis] for axis in image_ras]

    network = chosen.get("architecture", {}).get("arch_kwargs", {})
    strides = network.get("strides") or chosen.get("pool_op_kernel_sizes") or []
    found = content.get("foreground_intensity_properties_per_channel", {})
    windows = [
        [float(found[str(c)][f"percentile_{end}"]) for end in ("00_5", "99_5")]
        if scheme == "CTNormalization" and str(c) in found
        else None
        for c, scheme in enumerate(chosen["normalization_schemes"])
    ]
    spacing = [float(side) for side in to_ras(chosen["spacing"])]
    levels = [to_ras(level if isinstance(level, list) else [level] * 3) for level in strides[1:]]
    return NnunetPlan(path, configuration, spacing, levels, windows)


def _inherited(configurations: dict, name: str, path: Path, seen: tuple[str, ...] = ()) -> dict:
    """A configuration with the keys of what it `inherits_from`."""
    if name in seen:
        raise UserError(f"{path}: the configuration {brief(name)} inherits from itself.")
    if not isinstance(configurations.get(name), dict):
        raise UserError(f"{path}: has no configuration {brief(name)}, only {', '.join(configurations)}.")
    own = configurations[name]
    parent = own.get("inherits_from")
    return {**_inherited(configurations, parent, path, (*seen, name)), **own} if parent else own
