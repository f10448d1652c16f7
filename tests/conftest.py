"""Fixtures that several test files share. Nothing here trains."""

import signal
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ldm.system.signals import STOPPING, Interruption


def pytest_addoption(parser):
    """`--kills N` for tests/faults."""
    parser.addoption("--kills", type=int, default=3, help="how often tests/faults kills a training")


@pytest.fixture(autouse=True)
def signals_end_pytest(monkeypatch):
    """A signal from outside ends pytest, though a script that is under test catches it; and no test leaves a
    handler behind. A test's own signals come from `signal.raise_signal`."""
    raised, foreign = [], []
    raise_signal, note = signal.raise_signal, Interruption._note

    def raise_own(number: int) -> None:
        raised.append(number)
        raise_signal(number)

    def note_both(self, number: int, frame) -> None:
        raised.remove(number) if number in raised else foreign.append(number)
        note(self, number, frame)

    monkeypatch.setattr(signal, "raise_signal", raise_own)
    monkeypatch.setattr(Interruption, "_note", note_both)
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    after = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        signal.signal(number, handler)
    if foreign:
        pytest.exit(f"stopped by {signal.Signals(foreign[0]).name}", 128 + foreign[0])
    assert after == before, "a signal handler was left behind"


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """The finished chain, a `chain.Project`. Look, but do not touch."""
    import chain  # noqa: PLC0415 - tests that run no script need not load it

    return chain.trained(tmp_path_factory.getbasetemp())


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
