"""Run the tutorial from top to bottom and keep its outputs in it.

    python docs/make_tutorial.py

takes a quarter of an hour on two CPU cores and rewrites `3d_ldm_tutorial.ipynb`. If a cell fails, the file is
not changed. Needs the packages of requirements-test.txt.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "3d_ldm_tutorial.ipynb"
RESULTS = ROOT / "outputs" / "tutorial" / "simulated"


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in place, in the project's folder; overwritten states of progress bars are dropped.

    Raises:
        CellExecutionError: a cell failed.
    """
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", coalesce_streams=True)
    client.execute(cwd=str(ROOT))
    for cell in notebook.cells:
        cell.metadata = {}  # when each cell ran
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def smaller(picture: str) -> str:
    """The same PNG in base64, packed better."""
    packed = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def main() -> None:
    if RESULTS.exists():
        sys.exit(f"error: {RESULTS} already exists and would be resumed. Move it away first.")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        execute(notebook)
    except CellExecutionError as error:
        sys.exit(f"error: {error}")
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
