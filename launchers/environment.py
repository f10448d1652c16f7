"""Make the project's .venv, or reuse it where nothing that it was made from has changed.

    python launchers/environment.py                                         # what the scripts need
    python launchers/environment.py requirements.txt requirements-test.txt  # and what the tests need

Any Python from 3.11 on runs this; nothing has to be installed. For each requirements file the .venv keeps a
hash of that file, constraints.txt and the Python version, written after pip succeeded: while they are equal,
nothing is done, and no network is needed.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed.json"

VERSION = "{}.{}".format(*sys.version_info[:2])
PROBE = "import sys; print('{}.{}'.format(*sys.version_info[:2]), flush=True); import pip"


def main(argv=None):
    requirements = sys.argv[1:] if argv is None else argv
    ready(*(requirements or ["requirements.txt"]))


def ready(*requirements):
    """Install requirements files (names in the project's folder) into .venv; return the path of its Python.

    A .venv of another Python version than the running one is made anew. Ends the program where pip fails.
    """
    make_venv()
    wanted = {name: digest(name) for name in requirements}
    installed = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    if wanted.items() <= installed.items():
        return PYTHON

    print(f"installing {', '.join(requirements)} into {VENV}: some minutes the first time", flush=True)
    STAMP.unlink(missing_ok=True)  # from here on .venv may be half changed
    files = [f"--requirement={name}" for name in requirements]
    pip = [PYTHON, "-m", "pip", "install", *files, "--constraint=constraints.txt"]
    run(pip, failure="pip could not install the requirements")
    unfinished = STAMP.with_suffix(".tmp")
    unfinished.write_text(json.dumps(installed | wanted, indent=1))
    unfinished.replace(STAMP)
    return PYTHON


def make_venv():
    """Make .venv where there is none of this Python with pip."""
    try:
        probe = subprocess.run([PYTHON, "-c", PROBE], capture_output=True, text=True)
        found, has_pip = probe.stdout.strip(), probe.returncode == 0
    except OSError:  # no .venv, or the Python that it points to is gone
        found, has_pip = None, False
    if found == VERSION and has_pip:
        return
    # A .venv of the right version only lacks pip (making it was interrupted): nothing in it has to go.
    clear = [] if found == VERSION else ["--clear"]
    print(f"making {VENV} with Python {VERSION}", flush=True)
    run([sys.executable, "-m", "venv", *clear, VENV], failure="the virtual environment could not be made")


def digest(name):
    """What an installation of a requirements file follows from, as a hash."""
    content = [VERSION.encode(), (ROOT / "constraints.txt").read_bytes(), (ROOT / name).read_bytes()]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


def run(command, failure):
    """Run a command; where it fails, say what failed and end with exit code 1."""
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if code:
        print(f"error: {failure}: the lines above say why. Then run the same command again.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
