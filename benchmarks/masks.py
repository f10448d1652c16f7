"""Do images follow masks? Simulated brains with tumours, through all three stages.

    python -m benchmarks.masks --out DIR [--spacing 4] [--minutes 3 6 6] [--num 48]

Simulates 120 brains, three of four with a tumour (edema, core, enhancing rim), and trains the demo's config
on FLAIR and t1gd, then a ControlNet on the tumours. Draws an image for each training mask: a segmenter is
trained on them and on scans (`evaluate.py --segmentation`), and the one of scans looks for the tumours that
were asked for. Then edits held-out masks, seed by seed: the tumour moved to the other side, grown, removed.
Prints how much the image changes inside the edited region and outside it, beside the autoencoder's error.
"""

import argparse
import json

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

import evaluate
import inference
import train_controlnet
from benchmarks import simulated
from ldm.data.intensity import to_unit_range
from ldm.figures import slice_grid
from ldm.system.files import record_path

CHANNELS = [0, 2]  # FLAIR, t1gd
REACH_MM = 12  # of an edit: beyond it, the image should stay


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=simulated.Path, required=True)
    parser.add_argument("--spacing", type=float, default=4, help="mm of the volumes")
    parser.add_argument("--minutes", type=float, nargs=3, default=[3, 6, 6], help="of the stages")
    parser.add_argument("--num", type=int, default=48, help="samples for the segmenter")
    parser.add_argument("--edits", type=int, default=4, help="held-out masks to edit")
    args = parser.parse_args()

    # Step 1: data, config, three stages
    config = simulated.demo_config(args.spacing) | {"channel": CHANNELS, "image_channels": len(CHANNELS)}
    config["data"]["val_fraction"] = 0.2
    config["diffusion_train"]["autoguidance"] = 1.0
    config["controlnet_train"] = {"weighted_loss_label": [1, 2, 3], "weighted_loss": 10.0}
    stages, minutes = args.minutes[:2], args.minutes[2]
    args.minutes = stages
    files = simulated.train(args, config, ["--num", "120", "--tumour-fraction", "0.75"])
    train_controlnet.main([*files, "--set", f"controlnet_train.max_minutes={minutes}"])

    # Step 2: what a segmenter learns from images of the training masks
    split = json.loads((args.out / "models/split.json").read_text())
    labels = args.out / "data/labelsTr"
    masks = {side: args.out / f"masks_{side}" for side in ("training", "validation")}
    for side, folder in masks.items():
        folder.mkdir(exist_ok=True)
        for name in split[side]:
            image = nib.load(labels / f"{name}.nii.gz")
            if np.asarray(image.dataobj).any():
                nib.save(image, folder / f"{name}.nii.gz")
    common = ["--batch-size", "4", "--steps", "20", "--tries", "0"]  # all are measured
    files = simulated.samples_in(args.out, "samples")
    inference.main([*files, "--mask", str(masks["training"]), "--num", str(args.num), *common])
    evaluate.main([*files, "--segmentation", "400"])
    segmenter = args.out / "samples/evaluation/segmenter.safetensors"
    files = simulated.samples_in(args.out, "held_out")
    inference.main([*files, "--mask", str(masks["validation"]), "--seed", "5000", *common])
    evaluate.main([*files, "--segmenter", str(segmenter)])

    # Step 3: the same seeds with edited masks
    edited = {kind: args.out / f"masks_{kind}" for kind in ("as it was", "moved", "grown", "removed")}
    for folder in edited.values():
        folder.mkdir(exist_ok=True)
    for path in sorted(masks["validation"].iterdir())[: args.edits]:
        image = nib.load(path)
        label = np.asarray(image.dataobj)
        for kind, voxels in edits(label).items():
            nib.save(nib.Nifti1Image(voxels, image.affine), edited[kind] / path.name)
    for kind, folder in edited.items():
        files = simulated.samples_in(args.out, f"edits_{kind.replace(' ', '_')}")
        inference.main([*files, "--mask", str(folder), "--seed", "7000", *common])
    report(args.out, list(edited))


def edits(label: np.ndarray) -> dict[str, np.ndarray]:
    """A label (X, Y, Z) with its tumour moved to the other side, 1.5 times as wide, and without it."""
    centre = np.array(ndimage.center_of_mass(label > 0))
    grown = ndimage.affine_transform(label, np.eye(3) / 1.5, centre - centre / 1.5, order=0)
    return {"as it was": label, "moved": label[::-1].copy(), "grown": grown, "removed": 0 * label}


def report(out: simulated.Path, kinds: list[str]) -> None:
    """Print the change inside and outside the edited regions, and draw the edits."""
    volumes, labels, found = {}, {}, {}
    for kind in kinds:
        folder = out / f"edits_{kind.replace(' ', '_')}"
        paths = sorted(path for path in folder.glob("sample_*.nii.gz") if "_label" not in path.name)
        found[kind] = paths
        limits = np.array(json.loads(record_path(paths[0]).read_text())["volume"]["limits"])
        volumes[kind] = [
            to_unit_range(np.moveaxis(nib.load(p).get_fdata(), -1, 0), limits, clip=True) for p in paths
        ]
        labels[kind] = [
            np.asarray(nib.load(p.with_name(p.name.replace(".nii", "_label.nii"))).dataobj) for p in paths
        ]
    spacing = nib.load(found[kinds[0]][0]).header.get_zooms()[:3]
    for kind in kinds[1:]:
        inside, outside = [], []
        for a, b, mask_a, mask_b in zip(
            volumes[kinds[0]], volumes[kind], labels[kinds[0]], labels[kind], strict=True
        ):
            distance = ndimage.distance_transform_edt((mask_a == 0) & (mask_b == 0), sampling=spacing)
            change, brain = np.abs(a - b).mean(0), a.mean(0) > 0.05
            inside.append(change[distance == 0].mean())
            outside.append(change[(distance > REACH_MM) & brain].mean())
        print(f"{kind}: change inside {np.mean(inside):.4f}, outside {np.mean(outside):.4f} of the range")
    rows = []
    for i, first in enumerate(volumes[kinds[0]]):
        depth = round(ndimage.center_of_mass(labels[kinds[0]][i] > 0)[2]) - first.shape[3] // 2
        at = [np.roll(volumes[kind][i][0], -depth, 2) for kind in kinds]  # the slice through the tumour
        rows.append((f"mask {i}", [torch.from_numpy(one).float() for one in at]))
    slice_grid(rows, out / "edits.png", "FLAIR: " + ", ".join(kinds), spacing)


if __name__ == "__main__":
    main()
