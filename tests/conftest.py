"""Fixtures that several test files share. Nothing here trains."""

from pathlib import Path

import nibabel
import numpy as np
import pytest


def pytest_addoption(parser):
    """`--kills N` for tests/faults."""
    parser.addoption("--kills", type=int, default=3, help="how often tests/faults kills a training")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real volumes beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real volumes are not here ({folder})")
    return folder


@pytest.fixture(scope="session")
def write_image():
    """`write_image(path, voxels, affine)` -> path, its folder made where it is missing."""

    def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = nibabel.MGHImage if path.suffix == ".mgz" else nibabel.Nifti1Image
        nibabel.save(kind(voxels, np.eye(4) if affine is None else affine), path)
        return path

    return write
