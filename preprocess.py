"""Make raw scans ready for training: one folder of NIfTI files at one spacing, and a dataset.json.

    python preprocess.py --in RAW --out data/brains                        # the median spacing of the scans
    python preprocess.py --in RAW --out data/brains --brain-mask auto --size 128 128 128 --spacing 1
    python preprocess.py --in CT --out data/ct --intensity window --window -1000 1000
    python preprocess.py --in NEW --out data/new --like data/brains/preprocessing.json
    python preprocess.py --in CT --out ct --body --labels label_dict.json --pseudo-labels SEG --modality ct

RAW is a folder in any layout of docs/data.md, of NFBS or CC359 (whose brain masks are used), or with DICOM
series, .nrrd or .mha files (with SimpleITK installed). Each scan is turned to RAS; what lies outside of its
mask, and NaN there, becomes 0; it is cropped to what is not 0, resampled, and its intensities are mapped. The
affine is true after each step.

--brain-mask names a mask, a folder of masks named as the scans, or `auto`: DIPY's median_otsu (with DIPY
installed). Where a mask hardly is that of a brain, a warning names it and DIR/doubtful shows it.

--labels names the values of labels, {"liver": 1, ...}: labels are given the values of their names, in any
order of their words. --pseudo-labels is a folder of label maps, which count where a scan's own label is 0.
--body gives the rest of the body in a CT the value 200: what is not air around it, without the table where
lungs are labelled. --modality writes MAISI's list, with folds by subject and the regions of the body.

Writes the layout of nnU-Net (version 2), which the other scripts read:

    DIR/imagesTr/NAME_0000.nii.gz  float32, one file a channel
    DIR/labelsTr/NAME.nii.gz       labels, where there are any: the largest of the resampled indicators wins
    DIR/participants.tsv           a copy of RAW's, where it has one
    DIR/dataset.json               channels, labels, number of cases; written last
    DIR/preprocessing.json         all settings, the spacing too: --like repeats them on other scans
    DIR/dataset_maisi.json         with --modality: image, label, dim, spacing, modality, fold, region indices

A CT (--modality ct) of whole numbers is written in whole HU, int16, if --intensity keeps them.

Scans are done in parallel. The same command goes on where it broke off. Nothing is overwritten.

Exit codes: 0 done, 1 the disk failed, 2 wrong usage or a scan that cannot be used.
"""

import argparse
import functools
import os
import shutil
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

import utils
from ldm import UserError, brief, counted, few, figures
from ldm.data import folds
from ldm.data import scan as steps
from ldm.data.body import BODY, LUNGS, region_indices, values_of, with_body
from ldm.data.cases import rounded
from ldm.data.label_names import DATASET, names_file, names_in, read_label_dict
from ldm.data.layouts import INDICES
from ldm.data.nnunet import dataset_folder
from ldm.data.raw_cases import AUTO, RawCase, find_raw_cases, open_any, read_raw
from ldm.data.reading import LARGEST_LABEL, ras_geometry
from ldm.generation import nifti_gz
from ldm.system.files import read_json, write_json, written_whole

SETTINGS, LIST, DOUBTFUL = "preprocessing.json", "dataset_maisi.json", "doubtful"
PARTICIPANTS = "participants.tsv"
FOLD_SEED = 0  # of the list's folds
INT16 = np.iinfo(np.int16).min, np.iinfo(np.int16).max


@dataclass(frozen=True)
class Settings:
    """What is done to each scan, as `preprocessing.json` holds it."""

    spacing: list[float]
    size: list[int] | None
    crop: bool
    interpolation: str
    intensity: str
    window: list[float] | None
    brain_mask: str | None
    labels: str | None = None
    pseudo_labels: str | None = None
    body: int | None = None
    modality: str | None = None

    @property
    def dictionary(self) -> dict[str, int] | None:
        """The values of labels by name."""
        return read_label_dict(Path(self.labels)) if self.labels else None

    def labelled(self, cases: Sequence[RawCase]) -> bool:
        """Whether any of these scans gets a label."""
        return bool(self.pseudo_labels or self.body) or any(case.label for case in cases)


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    out = Path(args.out).resolve()

    # Step 1: the scans, and what to do to them
    args.source = dataset_folder(str(args.source))
    cases = find_raw_cases(args.source, args.pattern, args.contrasts, [out])
    settings = choose_settings(args, cases)
    begun = check_output(out, args.source, settings)

    # Step 2: each scan by itself
    left = [case for case in cases if not image_file(out, case.name, 0).is_file()]
    if begun:
        print(f"{len(cases) - len(left)} of {counted(len(cases), 'scan{s}')} were done before")
    for folder in ("imagesTr", *(["labelsTr"] if settings.labelled(cases) else [])):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_json(out / SETTINGS, {"source": str(args.source.resolve()), **asdict(settings)})
    one = functools.partial(preprocess, settings, out)
    doubts = list(filter(None, tqdm(utils.parallel(one, left, args.jobs), total=len(left), unit="scan")))

    # Step 3: participants.tsv, MAISI's list, and dataset.json, which completes the folder
    if (args.source / PARTICIPANTS).is_file():
        shutil.copyfile(args.source / PARTICIPANTS, out / PARTICIPANTS)
    for doubt in doubts:
        print(f"warning: {doubt}")
    values = {case.name: values_in_label(out / "labelsTr" / f"{case.name}.nii.gz") for case in cases}
    if settings.body and (tables := without_lungs(settings, values)):
        print(f"note: no lungs are labelled in {few(tables)}: a table counts as body there")
    if settings.modality:
        write_json(out / LIST, {"training": list_entries(settings, out, cases, values)})
    write_json(out / DATASET, describe(args, settings, out, cases, set().union(*values.values())))
    where = " x ".join(f"{side:g}" for side in settings.spacing)
    print(f"{counted(len(cases), 'scan{s}')} at {where} mm in {out}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--in",
        dest="source",
        required=True,
        type=Path,
        metavar="RAW",
        help="a folder, a JSON list, or the number of a data set of nnU-Net",
    )
    add("--out", required=True, metavar="DIR", help="folder to make, or to go on with")
    add("--like", type=Path, metavar="JSON", help="a preprocessing.json: all settings of that run")
    add("--pattern", help="which files are scans, as data.pattern of a config")
    add("--contrasts", nargs="+", help="endings of files that are the channels of a scan, as data.contrasts")
    add("--brain-mask", metavar="FILE", help="a mask, a folder of masks, or auto")
    add("--labels", type=Path, metavar="JSON", help='names and values of labels: {"liver": 1, ...}')
    add("--pseudo-labels", type=Path, metavar="DIR", help="label maps named as the scans; needs --labels")
    what = f"label the rest of the body in a CT (default: {BODY})"
    add("--body", type=int, nargs="?", const=BODY, metavar="VALUE", help=what)
    add("--modality", metavar="NAME", help="such as ct or mri: also write MAISI's list of the scans")
    add("--spacing", type=float, nargs="+", metavar="MM", help="one or three (default: the median)")
    add("--size", type=int, nargs=3, metavar="N", help="a fixed grid of so many voxels, about the centre")
    add("--no-crop", action="store_true", help="keep the background around")
    add("--interpolation", choices=list(steps.IMAGE_ORDERS), default="cubic", help="default: cubic")
    add(
        "--intensity", choices=steps.INTENSITIES, default="keep", help="how values are mapped (default: keep)"
    )
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the two values of --intensity window")
    add(
        "-j", "--jobs", type=int, default=os.cpu_count(), metavar="N", help="scans at a time (default: cores)"
    )
    args = parser.parse_args(argv)
    if args.spacing is not None and (len(args.spacing) not in (1, 3) or not min(args.spacing) > 0):
        raise UserError("--spacing: give one or three numbers above 0, in mm.")
    if args.size and not (args.spacing and min(args.size) > 0):
        raise UserError("--size: give three numbers above 0, and the --spacing of that grid.")
    if (args.window is None) == (args.intensity == "window"):
        raise UserError("--window: two numbers for --intensity window, and for nothing else.")
    if args.window and not args.window[0] < args.window[1]:
        raise UserError("--window: the first number should be below the second.")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: give 1 or more.")
    if args.pseudo_labels and not args.labels:
        raise UserError("--pseudo-labels: give --labels too, the names and values of the combined label.")
    if args.pseudo_labels and not args.pseudo_labels.is_dir():
        raise UserError(f"--pseudo-labels {args.pseudo_labels}: no such folder.")
    if args.body is not None and not 1 <= args.body <= LARGEST_LABEL:
        raise UserError(f"--body {args.body}: give a value from 1 to {LARGEST_LABEL}.")
    if args.body and args.brain_mask:
        raise UserError("--body: is found by the air around it; leave out --brain-mask.")
    settings = ("brain_mask", "spacing", "size", "no_crop", "interpolation", "intensity", "window", "labels")
    settings += ("pseudo_labels", "body", "modality")
    own = [key for key in settings if getattr(args, key) != parser.get_default(key)]
    if args.like and own:
        raise UserError(f"--like: takes all settings of that run; leave out --{own[0].replace('_', '-')}.")
    return args


def choose_settings(args: argparse.Namespace, cases: Sequence[RawCase]) -> Settings:
    """The settings of the command line, or of `--like`; where no spacing is given, the scans' median."""
    if args.like:
        content = read_json(args.like)
        content.pop("source", None)
        needed = {one.name for one in fields(Settings) if one.default is MISSING}
        if not needed <= set(content) <= {one.name for one in fields(Settings)}:
            raise UserError(f"{args.like}: is no preprocessing.json of this script.")
        return Settings(**content)
    spacing = args.spacing and [*args.spacing] * (3 // len(args.spacing))
    if not spacing:
        images = [open_any(case.images[0]) for case in cases]
        sizes = [nib.affines.voxel_sizes(nib.as_closest_canonical(image).affine) for image in images]
        spacing = [rounded(side) for side in np.median(sizes, axis=0)]
    mask = args.brain_mask
    if mask not in (None, AUTO):
        utils.find_files(brain_mask=[] if Path(mask).is_dir() else [mask])
        mask = str(Path(mask).resolve())
    if args.labels:
        read_label_dict(args.labels)
    paths = [one and str(one.resolve()) for one in (args.labels, args.pseudo_labels)]
    how = args.interpolation, args.intensity, args.window, mask
    return Settings(spacing, args.size, not args.no_crop, *how, *paths, args.body, args.modality)


def check_output(out: Path, source: Path, settings: Settings) -> bool:
    """Whether an earlier run with this source and these settings began the folder.

    Raises:
        UserError: it holds something else, is complete, or was begun with other settings.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / SETTINGS).is_file():
        raise UserError(f"--out {out}: holds something else. Name a new folder.")
    if (out / DATASET).is_file():
        raise UserError(f"--out {out}: is complete. Name a new folder, or delete that one first.")
    before = read_json(out / SETTINGS)
    for key, value in {"source": str(source.resolve()), **asdict(settings)}.items():
        if before.get(key) != value:
            raise UserError(
                f"--out {out}: was begun with {key} {brief(before.get(key))}, now it is {brief(value)}. Give "
                "the same options, or name a new folder."
            )
    return True


def image_file(out: Path, name: str, channel: int) -> Path:
    return out / "imagesTr" / f"{name}_{channel:04d}.nii.gz"


# ---------------------------------------------------------------- one scan


def preprocess(settings: Settings, out: Path, case: RawCase) -> str | None:
    """Read, change and write one case. Returns a doubt about its mask, if there is one."""
    dictionary, whole_hu = settings.dictionary, False
    pseudo_labels = Path(settings.pseudo_labels) if settings.pseudo_labels else None
    try:
        scan = steps.to_ras(read_raw(case, settings.brain_mask, dictionary, pseudo_labels))
        if (settings.modality or "").lower().startswith("ct") and settings.intensity == "keep":
            whole_hu = np.array_equal(scan.voxels, np.rint(scan.voxels))
        doubt = scan.mask is not None and steps.mask_doubt(scan.mask, scan.spacing)
        if doubt:
            draw_mask(scan, out / DOUBTFUL / f"{case.name}.png")
        scan = steps.without_background(scan)
        scan = steps.cropped(scan) if settings.crop else scan
        grid = steps.grid_at(scan, settings.spacing, settings.size)
        scan = steps.resampled(scan, *grid, steps.IMAGE_ORDERS[settings.interpolation])
        scan = steps.without_background(scan)  # splines ring beyond the mask
        label = scan.label
        if settings.body:
            label = np.zeros(scan.voxels.shape[1:], np.uint8) if label is None else label
            label = with_body(label, scan.voxels[0], scan.spacing, settings.body, dictionary)
        scan = steps.with_intensities(scan, settings.intensity, settings.window)
    except UserError as error:
        paths = (*case.images, case.label, case.mask, pseudo_labels, settings.labels)
        named = any(str(path) in str(error) for path in paths if path)
        raise UserError(str(error) if named else f"{case.images[0]}: {error}") from None
    voxels = np.rint(scan.voxels).clip(*INT16).astype(np.int16) if whole_hu else scan.voxels
    files = [(image_file(out, case.name, c), channel) for c, channel in enumerate(voxels)]
    if label is not None:
        files.append((out / "labelsTr" / f"{case.name}.nii.gz", label))
    for path, array in reversed(files):  # the first channel last: it marks the end
        with written_whole(path) as file:
            file.write(nifti_gz(array, scan.affine))
    return (
        f"{case.images[0]}: its brain mask looks wrong: {doubt}; {DOUBTFUL}/{case.name}.png"
        if doubt
        else None
    )


def draw_mask(scan: steps.Scan, path: Path) -> None:
    """Three slices of the whole scan, and of what its mask keeps."""
    low, high = np.nanpercentile(scan.voxels[0], [1, 99])
    volume = np.nan_to_num(np.clip((scan.voxels[0] - low) / max(high - low, 1e-9), 0, 1))
    rows = {"scan": volume, "in its mask": volume * scan.mask}
    rows = {name: [torch.from_numpy(one).float()] for name, one in rows.items()}
    path.parent.mkdir(exist_ok=True)
    figures.montage(rows, path, path.stem, spacing=scan.spacing.tolist())


# ---------------------------------------------------------------- all scans


def values_in_label(path: Path) -> set[int]:
    """The values of a label that was written, none where there is none."""
    return set(np.unique(np.asanyarray(nib.load(path).dataobj)).tolist()) if path.is_file() else set()


def without_lungs(settings: Settings, values: dict[str, set[int]]) -> list[str]:
    """The scans whose label, given by its values, has no lung."""
    lungs = values_of(LUNGS, settings.dictionary)
    return [name for name, some in values.items() if not lungs & some]


def list_entries(
    settings: Settings, out: Path, cases: Sequence[RawCase], values: dict[str, set[int]]
) -> list[dict]:
    """The entries of MAISI's list, sorted by name. Scans without region indices are printed.

    Args:
        values: of the label of each case.
    """
    dictionary, fold_of = settings.dictionary, folds.fold_of_subjects(cases, FOLD_SEED)
    entries, regionless = [], []
    for case in sorted(cases, key=lambda case: case.name):
        images = sorted((out / "imagesTr").glob(f"{case.name}_????.nii.gz"))
        shape, spacing = ras_geometry(images[0])
        names = [path.relative_to(out).as_posix() for path in images]
        entry = {"name": case.name, "subject": case.subject, "image": names if len(names) > 1 else names[0]}
        if values[case.name]:
            entry["label"] = f"labelsTr/{case.name}.nii.gz"
        entry |= {"dim": shape.tolist(), "spacing": [rounded(side) for side in spacing]}
        entry |= {"modality": settings.modality, "fold": fold_of[case.subject]}
        if regions := region_indices(values[case.name], dictionary):
            entry |= dict(zip(INDICES, regions, strict=True))
        else:
            regionless.append(case.name)
        entries.append(entry)
    if regionless:
        print(f"note: no region indices of {few(regionless)}: no organ of a region is labelled there")
    return entries


def describe(
    args: argparse.Namespace, settings: Settings, out: Path, cases: Sequence[RawCase], values: set[int]
) -> dict:
    """The content of dataset.json, in nnU-Net's keys; channels and labels have the names of the source, or of
    --labels.

    Args:
        values: of the labels of all cases.
    """
    known = read_json(args.source / DATASET) if (args.source / DATASET).is_file() else {}
    channels = len(list((out / "imagesTr").glob(f"{cases[0].name}_????.nii.gz")))
    names = known.get("channel_names") or known.get("modality") or {}
    if len(names) != channels:
        ends = args.contrasts or [f"channel {c}" if channels > 1 else "image" for c in range(channels)]
        names = {str(c): end.strip("_") for c, end in enumerate(ends)}
    content = {"channel_names": names, "labels": {"background": 0}, "numTraining": len(cases)}
    if (out / "labelsTr").is_dir():
        named = Path(settings.labels) if settings.labels else names_file([args.source])
        by_value = {settings.body: "body"} | (names_in(named) if named else {})
        content["labels"] |= {by_value.get(value, f"label {value}"): value for value in sorted(values - {0})}
    return content | {"file_ending": ".nii.gz"}


if __name__ == "__main__":
    main()
