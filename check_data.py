"""Read every header and every voxel of a data set, and list all that is wrong with it in one table.

    python check_data.py /data/Task01_BrainTumour
    python check_data.py -c config/config_demo.json -e config/environment.json
    python check_data.py data/siteA data/siteB -c config/config_demo.json --set data.pattern="**/*_T1w.nii.gz"

Folders are read in any layout of docs/data.md; without one, `data_base_dir` of the environment file is read.
With a config, only its channels are asked for and its `intensity` is used. Nothing is changed.

It finds: files that are missing, cut short, damaged (by gzip's checksum) or not an image; NaN, infinite, all
zero, constant or nearly empty volumes; masks among the images; files of a case on different grids; 4D where
3D is expected; labels that are missing, or have values that dataset.json does not name; scans stored twice;
patients under both training and validation of a list; macOS's `._*` files. The first line says what was found
and, by kind, what was passed over.

Notes are on what is no fault but may surprise you, and change no exit code: a stray voxel or padding that
sets the range of intensities; a header in units other than mm, that contradicts itself, or without
orientation.

Exit codes: 0 all good, 1 the disk failed, 2 wrong usage, or something is wrong with the data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from ldm import UserError, configs, counted
from ldm.data.cases import Case, own_geometry
from ldm.data.checks import Problem, check_cases, note_lines, stray_files
from ldm.data.intensity import Intensity
from ldm.data.layouts import find_cases
from ldm.data.prepare import own_folders
from ldm.data.splits import shared_subjects


@utils.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="data set, or a JSON list")
    parser.add_argument("-c", "--config-file", help="which files, channels and intensities: JSON")
    parser.add_argument("-e", "--environment-file", help="where the data are, in place of DIR: JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key"
    )
    parser.add_argument(
        "-j", "--jobs", type=int, metavar="N", help="files read at a time (default: one per core, at most 16)"
    )
    args = parser.parse_args(argv)

    # Step 1: what to read
    if bool(args.folders) == bool(args.environment_file):
        raise UserError("give the folder of a data set, or -e ENVIRONMENT_FILE, which names one.")
    if args.set and not args.config_file:
        raise UserError("--set overrides keys of a config: give -c CONFIG_FILE too.")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: give 1 or more.")
    source, where, how = args.folders, {"generated": False, "log": print}, {}
    if args.environment_file:
        environment = utils.load_environment(args.environment_file)
        source, where["outputs"] = environment["data_base_dir"], own_folders(environment)
        where["lists"] = environment["json_data_list"]
    elif len(source) == 1:
        source = source[0]
    if args.config_file:
        config = utils.load_config(args.config_file, args.set)
        where |= {key: config["data"][key] for key in ("pattern", "contrasts", "subject")}
        where["label_maps"] = config["with_labels"] == configs.ONLY
        how["channels"], how["intensity"] = configs.channels_of(config), Intensity.from_config(config)

    # Step 2: read it
    training, validation = find_cases(source, **where)
    cases = training + validation
    problems, intensities = check_cases(cases, workers=args.jobs, **how)
    problems += shared_subjects(training, validation) + stray_files(cases)
    notes, problems = note_lines(problems), [problem for problem in problems if not problem.note]

    # Step 3: print what is wrong
    for line in notes:
        print(line)
    if not problems:
        print(f"{'no faults' if notes else 'all good'}: {summary(cases, intensities)}")
        return
    print(table(problems))
    bad = {problem.case for problem in problems} - {""}
    found = counted(len(cases), "case{s}"), counted(len(problems), "problem{s}"), counted(len(bad), "case{s}")
    print("{}, {} in {}".format(*found))
    raise SystemExit(2)


def table(problems: Sequence[Problem]) -> str:
    """Case, file and reason in aligned columns."""
    rows = [("case", "file", "reason")]
    rows += [(problem.case or "-", str(problem.file), problem.reason) for problem in problems]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{case:{widths[0]}}  {file:{widths[1]}}  {reason}" for case, file, reason in rows)


def summary(cases: Sequence[Case], intensities: dict[str, tuple[float, float]]) -> str:
    """One line on a good data set: cases, voxels and spacing along R, A and S, intensities."""
    geometry = [own_geometry(case) for case in cases]
    shapes, spacings = (np.array([one[i] for one in geometry]) for i in (0, 1))
    line = f"{len(cases)} cases of {by_axis(shapes)} voxels of {by_axis(spacings)} mm"
    if not intensities:  # embeddings alone
        return line
    minima, maxima = np.array(list(intensities.values())).T
    return f"{line}, minima {span(minima, ' to ')}, maxima {span(maxima, ' to ')}"


def by_axis(values: np.ndarray) -> str:
    """(N, 3) numbers as `35-43 x 40-59 x 35`."""
    return " x ".join(span(axis, "-") for axis in values.T)


def span(values: np.ndarray, between: str) -> str:
    """The smallest and the largest number, or one where they are equal."""
    low, high = (f"{value:.4g}" for value in (values.min(), values.max()))
    return low if low == high else low + between + high


if __name__ == "__main__":
    main()
