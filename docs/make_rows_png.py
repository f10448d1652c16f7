"""Draw figs/hippocampus_spaces.png: the first volumes of several folders below each other.

python docs/make_rows_png.py --title TITLE --out OUT.png "held-out scans=DIR" "latents=DIR" ...
"""

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm import figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    rows, spacing = {}, None
    for row in args.rows:
        name, _, folder = row.partition("=")
        images = [nib.as_closest_canonical(nib.load(f)) for f in sorted(Path(folder).glob("*.nii.gz"))[:2]]
        rows[name] = [unit_range(image.get_fdata(dtype=np.float32)) for image in images]
        spacing = images[0].header.get_zooms()[:3]
    figures.montage(rows, args.out, args.title, spacing=spacing)


def unit_range(voxels: np.ndarray) -> torch.Tensor:
    """From the lowest value to percentile 99.5."""
    low, high = np.percentile(voxels, [0, 99.5])
    return torch.from_numpy(np.clip((voxels - low) / (high - low), 0, 1))


if __name__ == "__main__":
    main()
