"""Does a condition come out? Brains with and without a tumour are asked for, and tumours in samples counted.

    python -m benchmarks.conditions --out DIR [--spacing 4] [--minutes 2 6] [--num 16] [--guidance 1 2 4]

Simulates 96 brains, half with a tumour, whose participants.tsv has a column `tumour`. Trains both
stages of the demo's config, on FLAIR, with `conditions.class_labels` "tumour". Samples each class with each
guidance. A volume counts as one with a tumour where its largest bright region (hyperintense oedema) exceeds a
size. Brightness and size are fitted to the training scans; their accuracy is measured on held-out scans.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

import inference
from benchmarks import simulated

BRIGHTNESS = np.arange(1.2, 2.01, 0.05)  # times the median of the brain


def largest_region(volume: np.ndarray, brightness: float) -> int:
    """Voxels of the largest connected region of a volume (D, H, W) brighter than so many times its median."""
    brain = volume[volume > 0.05 * volume.max()]
    regions, _ = ndimage.label(volume > brightness * np.median(brain))
    return int(np.bincount(regions.ravel())[1:].max(initial=0))


def fit_detector(volumes: Sequence[np.ndarray], tumours: np.ndarray) -> tuple[float, int]:
    """The brightness and the size that tell volumes with a tumour best from others."""
    best = (0.0, 0.0, 0)
    for brightness in BRIGHTNESS:
        sizes = np.array([largest_region(volume, brightness) for volume in volumes])
        for size in np.unique(sizes):
            best = max(best, (float(((sizes > size) == tumours).mean()), float(brightness), int(size)))
    return best[1:]


def read(path: Path) -> np.ndarray:
    """FLAIR of a simulated scan, or a sample: (D, H, W)."""
    voxels = np.asarray(nib.load(path).dataobj, dtype=np.float32)
    return voxels[..., 0] if voxels.ndim == 4 else voxels


def main() -> None:
    args = simulated.parser(__doc__, 16, "each class and guidance").parse_args()

    # Step 1: data, config, training
    config = simulated.demo_config(args.spacing)
    config["conditions"] = {"class_labels": "tumour"}
    config["diffusion_def"]["num_class_embeds"] = 3  # without, with, unknown
    simulated.train(args, config)
    data = args.out / "data"

    # Step 2: the detector, on scans
    rows = [line.split("\t") for line in (data / "participants.tsv").read_text().splitlines()]
    column = rows[0].index("tumour")
    has_tumour = {row[0]: row[column] == "1" for row in rows[1:]}
    split = json.loads((args.out / "models/split.json").read_text())
    scans, tumours = {}, {}
    for part in ("training", "validation"):
        names = [name.removesuffix(".nii.gz") for name in split[part]]
        scans[part] = [read(data / f"imagesTr/{name}.nii.gz") for name in names]
        tumours[part] = np.array([has_tumour[name] for name in names])
    brightness, size = fit_detector(scans["training"], tumours["training"])
    for part, volumes in scans.items():
        found = np.array([largest_region(volume, brightness) > size for volume in volumes])
        print(f"{part} scans: {(found == tumours[part]).sum()} of {len(found)} classified correctly")

    # Step 3: samples of each class
    for guidance in args.guidance:
        for tumour in (0, 1):
            folder = args.out / f"samples_{tumour}_{guidance:g}"
            files = simulated.samples_in(args.out, folder.name)
            asked = ["--condition", f"tumour={tumour}", "--guidance", str(guidance)]
            inference.main([*files, "--num", str(args.num), *asked])
            found = [
                largest_region(read(path), brightness) > size for path in sorted(folder.glob("*.nii.gz"))
            ]
            print(f"tumour={tumour}, guidance {guidance:g}: {sum(found)} of {len(found)} samples have one")


if __name__ == "__main__":
    main()
