"""Does CT follow masks? Deformed copies of one CT with its mask, through all three stages.

    python -m benchmarks.ct_masks --ct CT.nii.gz --mask MASK.nii.gz --out DIR [--spacing 6] [--minutes 3 6 6]

MASK has TotalSegmentator's 104 classes. They become ten (other tissue of the body among them), and CT and
mask are deformed 48 times: rotated, scaled, shifted, and bent. The demo's config learns them with a window of
-1000 to 1000 HU, then a ControlNet on their masks. Held-out masks are drawn as they are, and 3 voxels to the
left. For each structure, the median of HU where the mask says so is printed beside that of the scans.
"""

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Rand3DElastic
from nibabel.processing import resample_to_output
from scipy import ndimage

import inference
import train_controlnet
from benchmarks import simulated

GROUPS = {  # of the 104 classes
    "liver": [5],
    "kidneys": [2, 3],
    "spleen": [1],
    "bone": [*range(18, 42), *range(58, 93)],
    "lungs": [*range(13, 18)],
    "vessels": [7, 8, 9, 49, 51, 52, 53, 54],
    "bowel": [6, 42, 55, 56, 57],
    "muscle": [*range(94, 104)],
    "heart": [*range(44, 49)],
}
BODY = "other tissue"
AIR = -1000
COPIES, HELD_OUT, SHIFT = 48, 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ct", type=Path, required=True)
    parser.add_argument("--mask", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spacing", type=float, default=6, help="mm of the volumes")
    parser.add_argument("--minutes", type=float, nargs=3, default=[3, 6, 6], help="of the stages")
    args = parser.parse_args()

    # Step 1: deformed copies, Decathlon's layout
    data = args.out / "data"
    names = [*GROUPS, BODY]
    if not data.exists():
        deformed_copies(args, names)

    # Step 2: three stages
    config = simulated.demo_config(args.spacing)
    del config["longest_side"]
    config |= {"channel": 0, "spacing": [args.spacing] * 3}
    config["intensity"] = {"window": [AIR, 1000], "whole_numbers": True}
    config["data"]["val_fraction"] = HELD_OUT / COPIES
    for stage in ("autoencoder_train", "diffusion_train"):
        config[stage]["augment"] = {}
    config["diffusion_train"]["autoguidance"] = 1.0
    stages, minutes = args.minutes[:2], args.minutes[2]
    args.minutes = stages
    files = simulated.train(args, config)
    train_controlnet.main([*files, "--set", f"controlnet_train.max_minutes={minutes}"])

    # Step 3: held-out masks, as they are and moved
    held_out = json.loads((args.out / "models/split.json").read_text())["validation"]
    masks = {kind: args.out / f"masks_{kind}" for kind in ("held_out", "moved")}
    for folder in masks.values():
        folder.mkdir(exist_ok=True)
    scans = []
    for name in held_out:
        image = nib.load(data / f"labelsTr/{name}.nii.gz")
        label = np.asarray(image.dataobj)
        nib.save(image, masks["held_out"] / f"{name}.nii.gz")
        moved = nib.Nifti1Image(np.roll(label, -SHIFT, 0), image.affine)
        nib.save(moved, masks["moved"] / f"{name}.nii.gz")
        scans.append((np.asarray(nib.load(data / f"imagesTr/{name}.nii.gz").dataobj), label))
    found = {"scans": medians(scans, len(names))}
    for kind, folder in masks.items():
        files = simulated.samples_in(args.out, f"samples_{kind}")
        inference.main([*files, "--mask", str(folder), "--batch-size", "4", "--steps", "20", "--tries", "0"])
        samples = []
        for path in sorted((args.out / f"samples_{kind}").glob("sample_*.nii.gz")):
            if "_label" not in path.name:
                label = path.with_name(path.name.replace(".nii", "_label.nii"))
                samples.append((np.asarray(nib.load(path).dataobj), np.asarray(nib.load(label).dataobj)))
        found[kind] = medians(samples, len(names))
    print(f"{'HU':14}" + "".join(f"{kind:>10}" for kind in found))
    for i, name in enumerate(["air", *names]):
        print(f"{name:14}" + "".join(f"{values[i]:10.0f}" for values in found.values()))


def deformed_copies(args: argparse.Namespace, names: list[str]) -> None:
    """Write the data set."""
    ct = resample_to_output(nib.load(args.ct), [args.spacing] * 3, order=1, cval=AIR)
    classes = nib.load(args.mask)
    body = np.asarray(nib.load(args.ct).dataobj) > -500
    found = ndimage.label(ndimage.binary_opening(body, iterations=2))[0]
    body = ndimage.binary_fill_holes(found == 1 + np.argmax(np.bincount(found.ravel())[1:]))
    groups = np.where(body, len(names), 0).astype(np.uint8)
    voxels = np.asarray(classes.dataobj)
    groups[(voxels > 0) & body] = len(names)
    for value, members in enumerate(GROUPS.values(), 1):
        groups[np.isin(voxels, members)] = value
    mask = resample_to_output(nib.Nifti1Image(groups, classes.affine), [args.spacing] * 3, order=0)
    image = torch.tensor(ct.get_fdata(), dtype=torch.float32)[None] - AIR  # so that air is padded
    label = torch.tensor(np.asarray(mask.dataobj), dtype=torch.float32)[None]
    for folder in ("imagesTr", "labelsTr"):
        (args.out / "data" / folder).mkdir(parents=True)
    for i in range(COPIES):
        bend = Rand3DElastic(
            sigma_range=(4, 6),
            magnitude_range=(50, 150),
            prob=1.0,
            rotate_range=[0.1] * 3,
            scale_range=[0.1] * 3,
            translate_range=[3] * 3,
            padding_mode="zeros",
        )
        parts = []
        for volume, mode in ((image, "bilinear"), (label, "nearest")):
            bend.set_random_state(i)
            parts.append(np.asarray(bend(volume, mode=mode))[0])
        voxels = (np.rint(parts[0]) + AIR).astype(np.int16), parts[1].astype(np.uint8)
        for folder, one in zip(("imagesTr", "labelsTr"), voxels, strict=True):
            nib.save(nib.Nifti1Image(one, ct.affine), args.out / f"data/{folder}/CT_{i:03d}.nii.gz")
    labels = {str(i): name for i, name in enumerate(["background", *names])}
    pairs = [
        {"image": f"./imagesTr/CT_{i:03d}.nii.gz", "label": f"./labelsTr/CT_{i:03d}.nii.gz"}
        for i in range(COPIES)
    ]
    about = {"name": "CT", "modality": {"0": "CT"}, "labels": labels, "training": pairs}
    (args.out / "data/dataset.json").write_text(json.dumps(about, indent=1))


def medians(pairs: list[tuple[np.ndarray, np.ndarray]], count: int) -> list[float]:
    """The median of all voxels of each structure, air first; NaN of one that is not there."""
    voxels, labels = (np.concatenate([one.ravel() for one in some]) for some in zip(*pairs, strict=True))
    inside = [voxels[labels == value] for value in range(count + 1)]
    return [float(np.median(one)) if one.size else np.nan for one in inside]


if __name__ == "__main__":
    main()
