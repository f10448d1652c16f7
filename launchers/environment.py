"""Make the project's .venv and install into it what a requirements file names.

    python launchers/environment.py                                         # what the scripts need
    python launchers/environment.py requirements.txt requirements-test.txt  # and what the tests need

Any Python from 3.11 on runs this. A .venv of the same Python version is kept. Where everything is installed
already in the versions of constraints.txt, pip takes a second and no network.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ready(*requirements):
    """Install requirements files (names in the project's folder) into .venv; return the path of its Python.

    Ends the program where venv or pip fails.
    """
    same_version = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    quiet = ["--quiet"]
    if not PYTHON.exists() or subprocess.run([PYTHON, "-c", same_version], capture_output=True).returncode:
        # .venv's own Python runs this where making it was interrupted: nothing in it has to go.
        clear = [] if Path(sys.executable).parent.resolve() == PYTHON.parent else ["--clear"]
        print(f"making {VENV}; installing takes some minutes", flush=True)
        run([sys.executable, "-m", "venv", *clear, VENV], "the virtual environment could not be made")
        quiet = []
    files = [f"--requirement={name}" for name in requirements]
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", *quiet]
    run([*pip, *files, "--constraint=constraints.txt"], "pip could not install the requirements")
    return PYTHON


def run(command, failure):
    """Run a command; where it fails, print what failed and end with exit code 1."""
    if subprocess.run([str(part) for part in command], cwd=ROOT).returncode:
        sys.exit(f"error: {failure}: see the lines above. Then run the same command again.")


if __name__ == "__main__":
    ready(*(sys.argv[1:] or ["requirements.txt"]))
