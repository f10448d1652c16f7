"""What is written of samples: the bytes of their files, and pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldm import UserError, figures, generation
from ldm.data.intensity import to_unit_range
from ldm.diffusion.conditioning import texts_of
from ldm.export import records
from ldm.generation import Networks
from ldm.given_masks import GivenMask
from ldm.system.files import label_path

SHOWN = 8  # volumes in the picture


@dataclass(frozen=True)
class Sample:
    """One volume to make."""

    seed: int
    condition: dict  # as of `Conditions.parse`
    path: Path
    mask: GivenMask | None = None

    def record(self) -> dict:
        """The entries of its record that are its own."""
        entries = {"seed": self.seed}
        if self.condition:
            entries["condition"] = texts_of(self.condition)
        if self.mask:
            path = self.mask.path
            about = {"path": path.as_posix(), "sha256": records.sha256_of(path)}
            entries["mask"] = {**about, **self.mask.changes}
        return entries


def recorded_masks(volume: Path, record: dict, place: int, networks: Networks) -> list[torch.Tensor]:
    """The masks of the samples of a batch, which lie beside the volume; where one is missing, its own stands
    for it. Other samples of a batch change a sample by rounding alone.

    Args:
        volume: the one that is made again, at this place of the batch.

    Raises:
        UserError: its own mask is missing or was changed.
    """
    own = label_path(volume)
    if not own.is_file() or records.sha256_of(own) != record["volume"]["label"]["sha256"]:
        what = "was changed" if own.is_file() else "no such mask"
        raise UserError(f"{own}: {what}; the volume was made for it. Put it beside the record.")
    files = [label_path(volume.with_name(f"sample_{seed:06d}.nii.gz")) for seed in record["batch"]]
    files = [file if file.is_file() else own for file in files]
    files[place] = own
    return [generation.read_mask(file, networks)[0] for file in files]


def largest_difference(volume: np.ndarray, original: np.ndarray) -> float:
    """As a share of the range of `original`; NaN where a voxel is."""
    if volume.shape != original.shape:
        return math.inf
    volume, original = volume.astype(np.float64), original.astype(np.float64)  # int16 would overflow
    return float(np.abs(volume - original).max() / (np.ptp(original) or 1))


def cleared(volumes: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Volumes (B, C, D, H, W) that are 0 where their masks are, (D, H, W) each."""
    return volumes * (torch.stack([*masks])[:, None] > 0)


def contents(
    voxels: np.ndarray, volume: torch.Tensor, networks: Networks, mask: torch.Tensor | None = None
) -> tuple[bytes, bytes | None]:
    """The files of a volume, and of its label where one is drawn beside it or was given as a mask.

    Args:
        voxels: what is written: the image, in its units, or the label map.
        volume: image and label as drawn, (C, D, H, W).
        mask: (D, H, W).
    """
    spacing = networks.geometry["spacing"]
    label = generation.drawn_label(volume, networks) if mask is None else mask[None].numpy()
    written = None if label is None else generation.nifti_bytes(label, spacing, label.dtype.type)
    return generation.nifti_bytes(voxels, spacing, voxels.dtype.type), written


def show_slices(networks: Networks, voxels: np.ndarray, seed: int, path: Path) -> None:
    """Write the slices of a volume (C, D, H, W) as a PNG beside it."""
    unit = as_picture(networks, voxels).clip(0, 1)
    picture = path.with_name(path.name.removesuffix(".nii.gz") + ".png")
    figures.axial_slices(unit, picture, f"seed {seed}", networks.geometry["spacing"])


def show_samples(networks: Networks, samples: Sequence[Sample], folder: Path) -> Path:
    """Write samples.png, three planes of each volume, and of its label."""
    rows = {"sample": [in_unit_range(networks, one) for one in samples]}
    values = networks.labels or (networks.masks and networks.masks.values)
    if values and not networks.label_maps:
        labels = [generation.read_volume(label_path(one.path))[0] for one in samples]
        rows["label"] = [torch.from_numpy(label / max(values)).float() for label in labels]
    figures.montage(
        rows,
        folder / "samples.png",
        f"Generated volumes, seeds {samples[0].seed} to {samples[-1].seed}",
        spacing=networks.geometry["spacing"],
    )
    return folder / "samples.png"


def show_grid(
    networks: Networks, samples: Sequence[Sample], name: str, values: Sequence[str], folder: Path
) -> Path:
    """Write grid.png: an axial slice of each volume, a row for each seed and a column for each value; nothing
    in the place of a sample that is not in `folder`."""
    count, blank = len(values), torch.zeros(*networks.geometry["size"])

    def shown(sample: Sample) -> torch.Tensor:
        there = sample.path.parent == folder and sample.path.exists()
        return in_unit_range(networks, sample) if there else blank

    rows = [
        (f"seed {samples[i].seed}", [shown(one) for one in samples[i : i + count]])
        for i in range(0, min(len(samples), SHOWN * count), count)
    ]
    title = f"{name} {', '.join(values)}"
    figures.slice_grid(rows, folder / "grid.png", title, networks.geometry["spacing"])
    return folder / "grid.png"


def in_unit_range(networks: Networks, sample: Sample) -> torch.Tensor:
    """What pictures show of a volume that was written, (D, H, W)."""
    return torch.from_numpy(as_picture(networks, generation.read_volume(sample.path)))


def as_picture(networks: Networks, voxels: np.ndarray) -> np.ndarray:
    """The first channel of a volume (C, D, H, W), 0 to 1 in the typical range; of a label map the place of
    each label among all, as a share: (D, H, W) float32."""
    if networks.label_maps:
        places = sum((i + 1) * (voxels[0] == value) for i, value in enumerate(networks.labels))
        return (places / len(networks.labels)).astype(np.float32)
    return to_unit_range(voxels, np.array(networks.geometry["limits"]), clip=False)[0]
