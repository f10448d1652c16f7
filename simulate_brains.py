"""Simulate brains: images and tumour labels for the whole pipeline, offline, without any patient's data.

    python simulate_brains.py --out data/simulated                   # 96 subjects at 4 mm, half with a tumour
    python simulate_brains.py --out data/simulated --num 400 --spacing 2
    python simulate_brains.py --out data/healthy --tumour-fraction 0
    python simulate_brains.py --out data/thick --spacing 2 2 6 --seed 1

Writes the layout of MSD Task01_BrainTumour, which is read as the BraTS data are:

    DIR/dataset.json
    DIR/participants.tsv          participant_id, age (20 to 80, which widens ventricles and sulci and thins
                                  the cortex), sex (f, m: larger brains), tumour (0 or 1), ageing (0 to 1)
    DIR/imagesTr/SIM_0000.nii.gz  int16 (X, Y, Z, 4): FLAIR, T1w, t1gd, T2w in arbitrary units, 0 outside
    DIR/labelsTr/SIM_0000.nii.gz  uint8 (X, Y, Z): 1 edema, 2 non-enhancing tumor, 3 enhancing tumour

Volumes are RAS and cover 160 x 192 x 160 mm; the brain is skull-stripped and lies inside. Subject i of a
--seed is the same for any --num and --workers, and has the same anatomy at any --spacing. The method is in
ldm/data/simulation.py. DIR must be new or empty; it appears, complete, when the last subject is done. 96
subjects at 4 mm take about half a minute on two cores.

Exit codes: 0 done, 1 the disk failed, 2 wrong usage.
"""

import argparse
import functools
import json
import math
import os
import tempfile
from pathlib import Path

import nibabel
from tqdm import tqdm

import utils
from ldm import UserError
from ldm.data.simulation import CONTRASTS, LABELS, has_tumour, load_atlas, output_grid, simulate_subject
from ldm.system.files import new_folder


@utils.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, new or empty")
    parser.add_argument("--num", type=int, default=96, help="number of subjects (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="which population (default: 0)")
    parser.add_argument(
        "--spacing", type=float, nargs="+", default=[4.0], metavar="MM", help="one or three (default: 4)"
    )
    parser.add_argument(
        "--tumour-fraction", type=float, default=0.5, help="share of subjects with a tumour (default: 0.5)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core and 8 subjects)")
    args = parser.parse_args(argv)

    # Step 1: check the arguments
    for key, least in (("num", 1), ("seed", 0), ("workers", 1)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key} {value}: give {least} or more")
    if not 0 <= args.tumour_fraction <= 1:
        raise UserError(f"--tumour-fraction {args.tumour_fraction}: give a share from 0 to 1")
    spacing = args.spacing * 3 if len(args.spacing) == 1 else args.spacing
    output_grid(spacing)
    out = new_folder(args.out)

    # Step 2: simulate into a temporary folder, which is renamed when it is complete
    workers = args.workers or min(os.cpu_count() or 1, math.ceil(args.num / 8))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True)
        write = functools.partial(write_subject, folder, args.seed, spacing, args.tumour_fraction)
        rows = [("participant_id", "age", "sex", "tumour", "ageing")]
        load_atlas()  # forked workers inherit it, spawned ones read it themselves
        rows += tqdm(utils.parallel(write, range(args.num), workers), total=args.num, unit="subject")
        table = "".join("\t".join(row) + "\n" for row in rows)
        (folder / "participants.tsv").write_text(table, encoding="utf-8")
        description = describe(args.num, args.seed, spacing)
        (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        folder.rename(out)
    print(f"{args.num} simulated subjects in {args.out}")


def case_name(subject):
    return f"SIM_{subject:04d}.nii.gz"


def write_subject(folder, seed, spacing, tumour_fraction, subject):
    """Simulate one subject, write its image and label below `folder`; its row of participants.tsv."""
    tumour = has_tumour(subject, tumour_fraction)
    simulated = simulate_subject(seed, subject, spacing, tumour)
    for name, volume in (("imagesTr", simulated.image), ("labelsTr", simulated.label)):
        nifti = nibabel.Nifti1Image(volume, simulated.affine)
        nifti.set_qform(simulated.affine, code="scanner")
        nifti.set_sform(simulated.affine, code="scanner")
        nifti.header.set_xyzt_units("mm")
        nibabel.save(nifti, folder / name / case_name(subject))
    name = case_name(subject).removesuffix(".nii.gz")
    return name, f"{simulated.age:.1f}", simulated.sex, str(int(tumour)), f"{simulated.ageing:.3f}"


def describe(num, seed, spacing):
    """The content of dataset.json, in the keys of the Medical Segmentation Decathlon."""
    return {
        "name": "Simulated brains",
        "description": f"made from the MNI152 atlas by simulate_brains.py, seed {seed}, spacing {spacing} mm",
        "tensorImageSize": "4D",
        "modality": {str(i): name for i, name in enumerate(CONTRASTS)},
        "labels": {str(i): name for i, name in enumerate(LABELS)},
        "numTraining": num,
        "numTest": 0,
        "training": [
            {"image": f"./imagesTr/{case_name(i)}", "label": f"./labelsTr/{case_name(i)}"} for i in range(num)
        ],
        "test": [],
    }


if __name__ == "__main__":
    main()
