"""Does evaluate.py measure what it should? A model is trained on half of a data set; the other half is held
out; groups whose quality is known stand in for samples.

    python -m benchmarks.evaluation --data T1_2MM --out outputs/evaluation

In place of samples: real scans (one half of the held-out ones against the other), training scans as they are,
mirrored, blurred by a voxel of the model's grid, and noise of their mean and variance; then samples of the
model. Prints the table of docs/evaluation.md; each page is OUT/evaluations/NAME/report.html. Existing models
and evaluations are kept. With the demo's config this takes 35 minutes on one CPU core, 25 of them training.
"""

import argparse
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

import evaluate
import inference
import train_autoencoder
import train_diffusion
from ldm.data.layouts import find_cases
from ldm.system.checkpoints import load_checkpoint

SAMPLES = 30
AUGMENTATION = {  # so that a diffusion model of few scans does not memorise them
    "flip_axes": "[0]",
    "affine_prob": "1.0",
    "rotate_degrees": "6",
    "scale": "0.05",
    "translate_voxels": "1",
    "versions": "12",
}
ROWS = (  # key, name in the table, format
    ("mmd_own", "kernel distance, own features", ".3g"),
    ("frechet_own", "Fréchet distance, own features", ".3g"),
    ("anatomy", "anatomy distance", ".3g"),
    ("precision", "precision", ".2f"),
    ("recall", "recall", ".2f"),
    ("ms_ssim", "MS-SSIM between samples", ".3f"),
    ("spectrum", "power spectrum (dB)", ".2f"),
    ("fine_power", "high-frequency power", ".2f"),
    ("histogram", "intensity histogram (%)", ".2f"),
    ("tissue_foreground", "foreground volume (ml)", ".0f"),
    ("tissue_dark", "dark tissue (ml)", ".0f"),
    ("tissue_middle", "middle tissue (ml)", ".0f"),
    ("tissue_bright", "bright tissue (ml)", ".0f"),
    ("copies", "copies (%)", ".0f"),
    ("nearest", "distance to the nearest training scan", ".3f"),
    ("closer", "samples closer than held-out scans (%)", ".0f"),
)


def folder_of(folder: Path, paths: Sequence[Path], change: Callable | None = None) -> Path:
    """A folder with copies of volumes, or with `change(voxels, rng)` of them."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, path in enumerate(paths):
        if change is None:
            shutil.copy(path, folder)
            continue
        image = nib.load(path)
        voxels = change(image.get_fdata().astype(np.float32), rng).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, image.affine), folder / f"volume_{i:03d}.nii.gz")
    return folder


def train(halves: dict[str, Path], out: Path, config: str, minutes: Sequence[float]) -> None:
    """A model of the training half in `out`/models, and its samples in `out`/samples."""
    places = {"data_base_dir": halves["training"], "model_dir": out / "models"}
    places |= {"tfevent_path": out / "tensorboard", "output_dir": out / "samples"}
    environment = out / "environment.json"
    environment.write_text(json.dumps({key: str(path) for key, path in places.items()}))
    common = ["-c", config, "-e", str(environment), "--device", "cpu"]
    if not (out / "models/diffusion_unet.pt").exists():
        train_autoencoder.main([*common, "--set", f"autoencoder_train.max_minutes={minutes[0]}"])
        settings = {"max_minutes": minutes[1], "val_interval": 2}
        settings |= {f"augment.{key}": value for key, value in AUGMENTATION.items()}
        words = [
            word for key, value in settings.items() for word in ("--set", f"diffusion_train.{key}={value}")
        ]
        train_diffusion.main([*common, *words])
    inference.main([*common, "--num", str(SAMPLES), "--batch-size", "4"])


def table(found: dict[str, dict]) -> str:
    """The metrics of each group and the baseline, in Markdown."""
    metrics = {name: {one["key"]: one for one in content["figures"]} for name, content in found.items()}
    lines = [f"| | real vs real | {' | '.join(metrics)} |", "|---" * (len(metrics) + 2) + "|"]
    unknown = {"value": None, "floor": None}  # in an evaluation of an earlier version
    for key, name, digits in ROWS:
        rows = [one.get(key, unknown) for one in metrics.values()]
        values = [metrics["copies"].get(key, unknown)["floor"], *(row["value"] for row in rows)]
        cells = ["-" if value is None else format(value, digits) for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="scans of different subjects")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="config/config_demo.json")
    parser.add_argument("--minutes", type=float, nargs=2, default=[5.0, 20.0], help="of stage 1 and stage 2")
    args = parser.parse_args(argv)

    # Step 1: a model of one half
    paths = [case.images[0] for case in sorted(find_cases(args.data)[0], key=lambda case: case.name)]
    random.Random(0).shuffle(paths)
    middle = len(paths) // 2
    scans, rest = paths[:middle], sorted(paths[middle:])
    halves = {
        "training": folder_of(args.out / "training", scans),
        "held-out": folder_of(args.out / "held-out", rest),
    }
    train(halves, args.out, args.config, args.minutes)

    # Step 2: groups in place of samples, and the held-out scans that they are compared with
    checkpoint = args.out / "models/autoencoder.pt"
    voxel = load_checkpoint(checkpoint)["config"]["spacing"][0]
    sigma = [voxel / side for side in nib.load(scans[0]).header.get_zooms()[:3]]
    folder, held_out = args.out / "conditions", halves["held-out"]
    changes = {
        "copies": lambda x, rng: 2 * x,  # brighter: files of the training set themselves are left out
        "mirrored copies": lambda x, rng: x[::-1],
        "blurred copies": lambda x, rng: gaussian_filter(x, sigma),
        "noise": lambda x, rng: rng.normal(x.mean(), x.std(), x.shape),
    }
    compared = {"real scans": [folder_of(folder / f"half {i}", rest[i::2]) for i in (1, 0)]}
    for name, change in changes.items():
        compared[name] = folder_of(folder / name, sorted(scans), change), held_out
    compared["samples"] = args.out / "samples", held_out

    # Step 3: their evaluations
    found = {}
    for name, (generated, real) in compared.items():
        out = args.out / "evaluations" / name.replace(" ", "_")
        if not (out / "metrics.json").exists():
            options = {"real": real, "generated": generated, "train": halves["training"], "out": out}
            options |= {"autoencoder": checkpoint, "device": "cpu"}
            evaluate.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
        found[name] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    print(table(found))
    for name, content in found.items():
        print(f"\n{name}")
        for line in content["verdicts"]:
            print(f"  {line['tone']}: {line['text']}")


if __name__ == "__main__":
    main()
