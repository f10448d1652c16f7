"""Does evaluate.py measure what it should? A data set in two halves: a model is trained on the one, and the
other is held out; then known things stand in for samples.

    python -m benchmarks.evaluation --data T1_2MM --out outputs/evaluation
    python -m benchmarks.evaluation --data T1_2MM --out outputs/evaluation --minutes 5 20 --config
    config/config_demo.json

In place of samples: real scans (half of the held-out ones, against the others), training scans as they are,
blurred by a voxel of the model's grid, as noise of the same mean and variance, and mirrored; and samples of
the model. Prints the table of docs/evaluation.md; each page is OUT/evaluations/NAME/report.html. What is
there already is not made again. The demo's config at 4 mm takes 35 minutes on one CPU core, 25 of them
training.
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
VERSIONS = {  # of each training volume, so that a diffusion model of few does not learn them by heart
    "flip_axes": "[0]",
    "affine_prob": "1.0",
    "rotate_degrees": "6",
    "scale": "0.05",
    "translate_voxels": "1",
    "versions": "12",
}
ROWS = (  # key, what the table calls it, digits
    ("mmd_own", "kernel distance, own features", ".3g"),
    ("frechet_own", "Fréchet distance, own features", ".3g"),
    ("precision", "precision", ".2f"),
    ("recall", "recall", ".2f"),
    ("ms_ssim", "MS-SSIM between samples", ".3f"),
    ("spectrum", "power spectrum (dB)", ".2f"),
    ("fine_power", "fine detail", ".2f"),
    ("histogram", "intensity histogram (%)", ".2f"),
    ("tissue_foreground", "foreground volume (ml)", ".0f"),
    ("tissue_dark", "dark tissue (ml)", ".0f"),
    ("tissue_middle", "middle tissue (ml)", ".0f"),
    ("tissue_bright", "bright tissue (ml)", ".0f"),
    ("copies", "copies (%)", ".0f"),
    ("nearest", "distance to the nearest training scan", ".3f"),
    ("closer", "samples closer than held-out scans (%)", ".0f"),
)


def split_in_halves(data: Path, folder: Path) -> dict[str, Path]:
    """Copy the images of a data set to two folders, by a seeded draw."""
    cases = sorted(find_cases(data)[0], key=lambda case: case.name)
    random.Random(0).shuffle(cases)
    halves = {"training": cases[: len(cases) // 2], "held-out": cases[len(cases) // 2 :]}
    for name, half in halves.items():
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            for case in half:
                shutil.copy(case.images[0], folder / name)
    return {name: folder / name for name in halves}


def changed(
    source: Path, target: Path, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]
) -> Path:
    """A folder of the volumes of another, changed."""
    if target.exists():
        return target
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, path in enumerate(sorted(source.glob("*.nii*"))):
        image = nib.load(path)
        voxels = change(image.get_fdata().astype(np.float32), rng)
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), image.affine), target / f"volume_{i:03d}.nii.gz")
    return target


def conditions(halves: dict[str, Path], folder: Path, spacing: float) -> dict[str, tuple[Path, Path]]:
    """What stands in for samples, and the held-out scans beside it."""
    scans, held = halves["training"], halves["held-out"]
    first, second = folder / "held-out 1", folder / "held-out 2"
    if not first.exists():
        for half, start in ((first, 0), (second, 1)):
            half.mkdir(parents=True)
            for path in sorted(held.glob("*.nii*"))[start::2]:
                shutil.copy(path, half)
    sizes = nib.load(next(scans.glob("*.nii*"))).header.get_zooms()[:3]
    sigma = [spacing / size for size in sizes]
    return {
        "real scans": (second, first),
        # Brighter, since files of the training set themselves are left out.
        "copies": (changed(scans, folder / "copies", lambda x, rng: 2 * x), held),
        "mirrored copies": (changed(scans, folder / "mirrored", lambda x, rng: x[::-1]), held),
        "blurred copies": (
            changed(scans, folder / "blurred", lambda x, rng: gaussian_filter(x, sigma)),
            held,
        ),
        "noise": (
            changed(scans, folder / "noise", lambda x, rng: rng.normal(x.mean(), x.std(), x.shape)),
            held,
        ),
    }


def table(found: dict[str, dict]) -> str:
    """The figures of each condition beside the floor, in Markdown."""
    figures = {name: {one["key"]: one for one in content["figures"]} for name, content in found.items()}
    lines = [f"| | floor | {' | '.join(figures)} |", "|---" * (len(figures) + 2) + "|"]
    for key, name, digits in ROWS:
        floor = figures["copies"][key]["floor"]
        values = [one[key]["value"] for one in figures.values()]
        cells = ["-" if value is None else format(value, digits) for value in (floor, *values)]
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
    halves = split_in_halves(args.data, args.out)
    places = {
        "data_base_dir": str(halves["training"]),
        "model_dir": str(args.out / "models"),
        "tfevent_path": str(args.out / "tensorboard"),
        "output_dir": str(args.out / "samples"),
    }
    (args.out / "environment.json").write_text(json.dumps(places, indent=1))
    common = ["-c", args.config, "-e", str(args.out / "environment.json"), "--device", "cpu"]
    minutes = [
        ["--set", f"{stage}_train.max_minutes={m}"]
        for stage, m in zip(("autoencoder", "diffusion"), args.minutes, strict=True)
    ]
    versions = [
        word
        for key, value in VERSIONS.items()
        for word in ("--set", f"diffusion_train.augment.{key}={value}")
    ]
    if not (args.out / "models/diffusion_unet.pt").exists():
        train_autoencoder.main([*common, *minutes[0]])
        train_diffusion.main([*common, *minutes[1], *versions, "--set", "diffusion_train.val_interval=2"])
    inference.main([*common, "--num", str(SAMPLES), "--batch-size", "4"])

    # Step 2: each condition
    trained = load_checkpoint(args.out / "models/autoencoder.pt")["config"]
    compared = conditions(halves, args.out / "conditions", trained["spacing"][0])
    compared["samples"] = (args.out / "samples", halves["held-out"])
    found = {}
    for name, (generated, held) in compared.items():
        out = args.out / "evaluations" / name.replace(" ", "_")
        if not (out / "metrics.json").exists():
            sets = ["--real", str(held), "--generated", str(generated), "--train", str(halves["training"])]
            autoencoder = ["--autoencoder", str(args.out / "models/autoencoder.pt")]
            evaluate.main([*sets, *autoencoder, "--out", str(out), "--device", "cpu"])
        found[name] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    # Step 3: what it says
    print(table(found))
    for name, content in found.items():
        print(f"\n{name}")
        for line in content["verdicts"]:
            print(f"  {line['tone']}: {line['text']}")


if __name__ == "__main__":
    main()
