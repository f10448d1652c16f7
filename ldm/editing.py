"""What the scripts that edit scans share: a scan on the model's grid, and what is written of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from ldm import UserError, configs
from ldm.data.intensity import from_unit_range
from ldm.data.preprocessing import Preprocessing, crop_or_pad
from ldm.export import records
from ldm.generation import Networks, as_written, nifti_bytes


def read_scan(paths: Sequence[Path], config: dict, networks: Networks) -> tuple[torch.Tensor, np.ndarray]:
    """A scan on the grid of a model: (1, C, D, H, W) in the unit range, and the intensities that are 0 and 1,
    (C, 2). Raises UserError: it cannot be read."""
    config = configs.with_spacing(config, networks.geometry["spacing"])
    preprocessing = Preprocessing.from_config(config)
    limits = preprocessing.limits(paths)
    volume = crop_or_pad(preprocessing(paths), networks.geometry["size"])
    return torch.from_numpy(volume.copy())[None], limits


def free_names(paths: Sequence[Path]) -> None:
    """Raise UserError where a file exists already."""
    if there := [path for path in paths if path.exists()]:
        raise UserError(f"{there[0]} exists. Move it away, or choose another --out.")


def save_scan(path: Path, volume: torch.Tensor, limits: np.ndarray, networks: Networks) -> None:
    """Write a volume (C, D, H, W) in the unit range, in the scan's own units, on the model's grid."""
    voxels = as_written(from_unit_range(volume.cpu().numpy(), limits), networks)
    path.parent.mkdir(parents=True, exist_ok=True)
    records.save_volume(path, nifti_bytes(voxels, networks.geometry["spacing"], voxels.dtype.type))


def seamless(
    drawn: torch.Tensor, scan: torch.Tensor, region: torch.Tensor, border: float, spacing: Sequence[float]
) -> torch.Tensor:
    """Put a region of one image into a scan, which stays exactly as it is outside the region.

    Args:
        drawn, scan: (C, D, H, W).
        region: (D, H, W) bool.
        border: in mm, inside the region, over which one goes over into the other.
        spacing: of the voxels, in mm.
    """
    padded = np.pad(region.cpu().numpy(), 1, "edge")
    depth = ndimage.distance_transform_edt(padded, sampling=spacing)[1:-1, 1:-1, 1:-1]
    weight = torch.from_numpy((depth / (border + min(spacing))).clip(0, 1)).to(drawn)
    return torch.where(region, weight * drawn + (1 - weight) * scan, scan)
