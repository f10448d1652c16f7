"""The versions of the software that made a result."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "monai", "monai-generative", "nibabel", "numpy")
ROOT = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a sample depends on, and the project's commit; None where
    it is unknown."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that the project is at, `-dirty` behind it where files were changed."""
    if not (ROOT / ".git").exists():  # else git would describe a repository around the project
        return None
    line = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository that it does not trust
        return None
