"""Labels as further channels of a volume.

After the channels of the image comes one for each label value: 1 where a voxel has it, 0 elsewhere, and a
share between where the grid is coarser than the label's. Background is 0 in all of them. An autoencoder gives
them back as numbers of the same scale, whose `logits` the loss compares and `label_of` reads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from nibabel.affines import voxel_sizes
from scipy import ndimage

from ldm import UserError
from ldm.data.cases import Case
from ldm.data.reading import LARGEST_LABEL, label_fault, label_type, read_image

SURROUNDINGS = "surroundings"  # what may replace a structure, see `without_structure`
LOGIT_SCALE = 8.0  # a channel of 1 is a probability of 0.98 against background


def with_label(image: np.ndarray, label: np.ndarray, case: Case) -> np.ndarray:
    """(C, D, H, W) and (L, D, H, W) -> (C + L, D, H, W). Raises UserError: they are of different grids."""
    if image.shape[1:] != label.shape[1:]:
        raise UserError(
            f"{case.label}: its grid {label.shape[1:]} is not that of its image {image.shape[1:]}."
        )
    return np.concatenate([image, label])


def check_labelled(cases: Sequence[Case], why: str) -> None:
    """Raise UserError where a case has no label. `why` is what needs one."""
    if without := [case.name for case in cases if case.label is None]:
        raise UserError(
            f"{why}: {len(without)} of {len(cases)} cases have no label, such as {without[0]}. docs/data.md "
            "says where labels go."
        )


def as_label_maps(cases: Sequence[Case]) -> list[Case]:
    """The cases of a data set as label maps without images: their labels; where none has a label, their
    images are the label maps. Raises UserError: only some have one."""
    if not any(case.label for case in cases):
        return [replace(case, label=case.images[0]) for case in cases]
    check_labelled(cases, "label maps")
    return [replace(case, images=(case.label,), embedding=None) for case in cases]


def values_in(cases: Sequence[Case]) -> tuple[int, ...]:
    """The values other than 0 of the labels of some cases. Raises UserError: they cannot be read."""
    values = set()
    for case in cases:
        if case.label is not None:
            voxels = np.asanyarray(read_image(case.label).dataobj)
            if fault := label_fault(voxels):
                raise UserError(f"{case.label}: {fault}.")
            values |= {*np.unique(voxels).astype(int).tolist()}
    return tuple(sorted(values - {0}))


def structure_sizes(label: np.ndarray, voxel: float, structures: dict[str, Sequence[int]]) -> dict:
    """{name: ml} of structures, each of one or more values of a label whose voxels have `voxel` mm³."""
    counts = np.bincount(label.astype(np.int64).ravel(), minlength=LARGEST_LABEL + 1)
    return {
        name: float(f"{counts[list(values)].sum() * voxel / 1000:.6g}") for name, values in structures.items()
    }


def sizes_in_file(path: Path, structures: dict[str, Sequence[int]]) -> dict:
    """As `structure_sizes`, of a file. Raises UserError: it cannot be read, or is no label."""
    image = read_image(path)
    voxels = np.asanyarray(image.dataobj)
    if fault := label_fault(voxels):
        raise UserError(f"{path}: {fault}.")
    return structure_sizes(voxels, float(np.prod(voxel_sizes(image.affine))), structures)


def with_sizes(cases: Sequence[Case], structures: dict[str, Sequence[int]]) -> list[Case]:
    """The cases with the sizes of structures in their labels, as files have them, among their covariates;
    without a label they are unknown (`ldm.data.checks` refuses these where most cases have one).

    Raises:
        UserError: no case has a label, or one cannot be read.
    """
    if cases and all(case.label is None for case in cases):
        raise UserError("conditions.structure_sizes: no case has a label. docs/data.md says where labels go.")

    def measured(case: Case) -> Case:
        if case.label is None:
            return case
        sizes = sizes_in_file(case.label, structures)
        return replace(case, covariates={**case.covariates, **sizes})

    with ThreadPoolExecutor(8) as pool:  # reading waits for disk and gzip
        return list(pool.map(measured, cases))


def logits(channels: torch.Tensor) -> torch.Tensor:
    """Label channels (B, L, D, H, W) -> logits of background and labels, (B, 1 + L, D, H, W)."""
    scaled = LOGIT_SCALE * (channels - 0.5)
    return torch.cat([torch.zeros_like(scaled[:, :1]), scaled], 1)


def shares(channels: torch.Tensor) -> torch.Tensor:
    """Label channels of a scan -> shares of background and labels, (B, 1 + L, D, H, W), which sum to 1."""
    return torch.cat([(1 - channels.sum(1, keepdim=True)).clamp_min(0), channels], 1)


def label_of(channels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Label channels (L, D, H, W) -> the label, (D, H, W) of `label_type`: the value of the largest channel,
    where it is over one half, else 0."""
    best = channels.argmax(0)
    known = np.array(values, label_type(values))
    return np.where(channels.max(0) > 0.5, known[best], 0).astype(known.dtype)


def without_structure(mask: np.ndarray, value: int, instead: int | str) -> np.ndarray:
    """A mask (D, H, W) with another label in the place of one: that of the nearest other voxel, for
    `SURROUNDINGS`."""
    inside = mask == value
    if instead != SURROUNDINGS:
        return np.where(inside, mask.dtype.type(instead), mask)
    if inside.all() or not inside.any():
        return mask
    nearest = ndimage.distance_transform_edt(inside, return_distances=False, return_indices=True)
    return mask[tuple(nearest)]


def shown(volume: torch.Tensor, labels: int) -> torch.Tensor:
    """What pictures show of a volume (C, D, H, W) whose last channels are those of `labels`: its first
    channel; of a label map alone, the place of the label among them, as a share: (D, H, W)."""
    if labels < len(volume):
        return volume[0]
    return torch.from_numpy(label_of(volume.float().cpu().numpy(), range(1, labels + 1)) / labels).float()


def channels_of_label(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """A label (D, H, W) -> its channels, (L, D, H, W) float32."""
    return np.stack([label == value for value in values]).astype(np.float32)
