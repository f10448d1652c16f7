"""Write generated volumes as DICOM: an image series each, and their labels as SEG and RTSTRUCT.

    python export_dicom.py outputs/ --modality MR --out dicom --names data/brains/dataset.json
    python export_dicom.py outputs/sample_000003.nii.gz --modality CT --out dicom --segmentation RTSTRUCT
    python export_dicom.py image.nii.gz --label mask.nii.gz --modality MR --out dicom

Takes volumes as inference.py writes them, or a folder of them, and the label beside each
(sample_000003_label.nii.gz) or, of one volume, the --label. Of a folder it takes the volumes with a record
(sample_000003.json) and names the others; a file that is named needs no record. Writes

    DIR/sample_000003/CT/0001.dcm        or MR: a file a slice; of several channels MR_0, MR_1, ...
    DIR/sample_000003/SEG/0001.dcm       a segment for each value of the label
    DIR/sample_000003/RTSTRUCT/0001.dcm  outlines in each slice

--modality says what the values are, which a NIfTI file does not: CT for Hounsfield units, which are stored as
whole numbers; MR for any others, whose range is stored in 65 000 steps. Each volume is one patient and one
study. Every file says that it is synthetic. The same files give the same UIDs and the same bytes.

Needs pydicom, and highdicom for a SEG: pip install highdicom has both. DIR must be new or empty, and appears
once all of it is written. docs/export.md says more.

Exit codes: 0 done, 1 the disk failed, 2 wrong usage or a volume that cannot be exported.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import utils
from ldm import UserError, counted, few
from ldm.data.reading import IMAGE_SUFFIXES
from ldm.export import dicom, records
from ldm.export.segmentations import MAKERS, SEG
from ldm.system.files import new_folder


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: the command line, and whether the packages are there
    args = parse_arguments(argv)
    for needed in ("pydicom", *(["highdicom"] if SEG in args.segmentation else [])):
        dicom.package(needed)
    names = dicom.read_names(args.names) if args.names else {}

    # Step 1: which volumes
    volumes = find_volumes(args.volumes)
    studies = [name_of(path) for path in volumes]
    if twice := [name for name, number in Counter(studies).items() if number > 1]:
        raise UserError(f"several volumes are called {twice[0]}, which names their folder. Rename one.")
    if args.label and len(volumes) > 1:
        raise UserError(f"--label: is that of one volume, and {len(volumes)} are given.")

    # Step 2: write into a temporary folder beside DIR, then rename it
    out, without = new_folder(args.out), []
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        for path, study in zip(tqdm(volumes, unit="volume"), studies, strict=True):
            pair = dicom.read_pair(path, args.label or records.labelled(path), study)
            series = dicom.write_image(folder / study, pair, args.modality)
            for number, kind in enumerate(args.segmentation if pair.values else (), len(pair.voxels) + 1):
                dataset = MAKERS[kind](pair, series, number, names)
                dicom.save(dataset, folder / study / kind / "0001.dcm")
            without += [] if pair.values else [study]
        folder.rename(out)

    # Step 3: what was written
    print(f"exported {counted(len(volumes), 'volume{s}')} as {args.modality}: {out}")
    if args.segmentation and len(without) < len(volumes):
        print(f"  {' and '.join(args.segmentation)} of {len(volumes) - len(without)}")
    if args.segmentation and without:
        print(f"  only images of {few(without)}: no labelled voxel")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its files checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("volumes", nargs="+", type=Path, metavar="FILE", help="generated volumes, or folders of them")
    add("--modality", required=True, choices=list(dicom.IMAGE_CLASSES), help="CT for Hounsfield units")
    add("--out", required=True, metavar="DIR", help="a folder that is new or empty")
    add("--label", type=Path, metavar="FILE", help="of one volume; default: the label beside each")
    add("--names", type=Path, metavar="JSON", help="names of labels: a dataset.json, or {name: value}")
    add(
        "--segmentation",
        nargs="*",
        choices=list(MAKERS),
        default=list(MAKERS),
        help="how labels are written; default: both; nothing: only images",
    )
    args = parser.parse_args(argv)
    args.segmentation = list(dict.fromkeys(args.segmentation))
    utils.find_files(label=[args.label], names=[args.names])
    return args


def find_volumes(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and the samples in the folders. Prints what is left out or has no record.

    Raises:
        UserError: there is none.
    """
    found = []
    for path in paths:
        if path.is_file() and records.is_label(path):  # of outputs/*.nii.gz
            continue
        if not path.is_dir():
            if not path.is_file():
                raise UserError(f"{path}: no such file or folder. Check the path.")
            if (record := records.record_of(path)) is None:
                print(f"warning: {path} has no record of inference.py; it is exported as a synthetic volume")
            if record and not record["volume"].get("limits", True):
                raise UserError(f"{path}: is a label map without an image. DICOM shows labels on an image.")
            found.append(path)
            continue
        files = [one for one in sorted(path.iterdir()) if one.name.lower().endswith(IMAGE_SUFFIXES)]
        images = [one for one in files if one.name[0] != "." and not records.is_label(one)]
        samples = [one for one in images if records.record_of(one)]
        if not samples:
            raise UserError(f"{path}: has no volume with a record of inference.py. Name files one by one.")
        if others := [one.name for one in images if one not in samples]:
            print(f"left out, without a record of inference.py: {few(others)}")
        found += samples
    return found


def name_of(path: Path) -> str:
    """The name of a volume without its suffix."""
    end = next((end for end in IMAGE_SUFFIXES if path.name.lower().endswith(end)), "")
    return path.name[: len(path.name) - len(end)]


if __name__ == "__main__":
    main()
