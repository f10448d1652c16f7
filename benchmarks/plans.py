"""The plans of several data sets for several GPUs, as a table.

    python -m benchmarks.plans --out DIR DATA [DATA ...]

Beside the folders DATA two sets are made in DIR: volumes as those of BraTS (240 x 240 x 155 at 1 mm, 4
channels), and slices of 0.5 x 0.5 x 6 mm. Nothing is trained; the peaks are those of the memory forecast.
"""

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np

import plan
from ldm.data.fingerprint import fingerprint
from ldm.data.layouts import find_cases
from ldm.data.reading import by_times
from ldm.planning.choices import make_plan
from ldm.planning.memory import peaks_of
from ldm.planning.plan import STAGES, Machine, Plan
from ldm.training.memory import GB, highest

MEMORIES = (8, 16, 24, 80)
MADE = {  # name: shape, spacing, channels
    "like_brats": ((240, 240, 155), (1.0, 1.0, 1.0), ("FLAIR", "T1w", "t1gd", "T2w")),
    "thick_slices": ((384, 384, 24), (0.5, 0.5, 6.0), ("T2w",)),
}
CASES = 6
HEAD = (
    "| data | GB | spacing, mm | volume | stage 1 | latents | stage 2 | forecast, GB |\n" + "|---" * 8 + "|"
)


def make(folder: Path, shape: tuple, spacing: tuple, channels: tuple) -> None:
    """Bright ellipsoids on an empty ground, in nnU-Net's layout."""
    (folder / "imagesTr").mkdir(parents=True)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij", sparse=True)
    for i in range(CASES):
        inside = sum((axis * (1.3 + 0.05 * i)) ** 2 for axis in axes) < 1
        for c in range(len(channels)):
            image = nib.Nifti1Image((inside * (100 + 20 * c)).astype(np.int16), np.diag([*spacing, 1]))
            nib.save(image, folder / "imagesTr" / f"case{i}_{c:04d}.nii.gz")
    names = {str(c): name for c, name in enumerate(channels)}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": names, "file_ending": ".nii.gz"}))


def row(name: str, gigabytes: int, made: Plan, machine: Machine) -> str:
    """A line of the table."""
    config = made.checked()
    first, second = (config[stage] for stage in STAGES)
    autoencoder, unet = config["autoencoder_def"], config["diffusion_def"]

    def words(section: dict) -> str:
        text = f"batch {section['batch_size']}"
        text += f" x {section['accumulate_steps']}" * (section["accumulate_steps"] > 1)
        return text + ", checkpointing" * section["gradient_checkpointing"]

    strides = autoencoder.get("level_strides")
    stage_1 = f"{autoencoder.get('channels')}, {words(first)}, " + (
        "whole" if first["patch_size"] == second["patch_size"] else by_times(first["patch_size"])
    )
    stage_1 += f", strides {strides}" if strides else ""
    latents = f"{config['latent_channels']} of {by_times(made.grids[0])}"
    stage_2 = f"{unet['channels']}, {words(second)}" + ", from the disk" * second["latent_cache"]
    peaks = ", ".join(f"{highest(peaks_of(made, stage, machine)).total / GB:.1f}" for stage in STAGES)
    cells = (name, gigabytes, by_times(config["spacing"]), by_times(second["patch_size"]))
    lowres = f"; first at {by_times(made.lowres_spacing)} mm" if made.lowres_spacing else ""
    return "| " + " | ".join(map(str, (*cells, stage_1 + lowres, latents, stage_2, peaks))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    for name, about in MADE.items():
        if not (args.out / name).exists():
            make(args.out / name, *about)
    print(HEAD)
    for folder in (*args.data, *(args.out / name for name in MADE)):
        cases, validation = find_cases(folder)
        measured = fingerprint([*cases, *validation])
        names = plan.channel_names(folder, None, None, measured)
        for gigabytes in MEMORIES:
            machine = Machine(round(gigabytes * GB), True)
            print(row(folder.name, gigabytes, make_plan(measured, names, machine), machine), flush=True)


if __name__ == "__main__":
    main()
