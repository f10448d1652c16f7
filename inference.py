"""Generate volumes with trained networks: one NIfTI a sample, named by its seed, and a picture of them.

    python inference.py -c config/config_train_16g.json -e config/environment.json --num 8
    python inference.py -c CONFIG -e ENV --num 100 --seed 1000 --batch-size 4 --steps 50 --sampler unipc
    python inference.py -c CONFIG -e ENV --num 8 --condition group=1 age=20:40 --guidance 2
    python inference.py -c CONFIG -e ENV --num 4 --grid age=20,35,50
    python inference.py -c CONFIG -e ENV --autoencoder model_autoencoder.pt --unet model.pt --scale-factor 0.9
    python inference.py -c CONFIG -e ENV --mask masks/ --seed 100
    python inference.py -c CONFIG -e ENV --num 4 --size 96,112,96 --spacing 2,2,2
    python inference.py -c CONFIG -e ENV --max-memory 12
    torchrun --standalone --nproc_per_node=4 inference.py -c CONFIG -e ENV -n 100
    python inference.py --reproduce outputs/sample_000003.json

Sample i has the seed `--seed` + i, and is the same volume whatever `--num` and, up to rounding, whatever
`--batch-size`: sampling runs in float32, on a GPU without TF32. `--amp` trades that for speed. Networks are
read from `autoencoder.pt` and `diffusion_unet.pt` of `model_dir`, or from other files (bare state dicts, old
or new names) with their scale factor. Volumes are written to `output_dir` in RAS with the spacing that was
trained on, their intensities in the training set's typical range; those of a model `with_labels` each beside
their label, `sample_000003_label.nii.gz`, which is all that a model of label maps writes. No volume is
overwritten: re-running the same command makes the missing ones, another request is refused. (torchrun takes
`--num` for an option of its own; use `-n`.)

`--condition` asks for a class, a category or a number of a model that was trained with `conditions`; of a
range, `age=20:80`, each sample draws its own. Without it a class is unknown, and a covariate is that of a
training volume, drawn by the seed. `--structure-size "ventricles=0.8"` asks for the size of a structure, as a
share of the range that was trained on. `--conditions TABLE` has a row for each sample. `--grid age=20,40,60`
makes each seed under each value, to be compared in `grid.png`. `--guidance` strengthens conditions by
classifier-free guidance, which doubles the passes of the network; `--interval 0.2:0.8` limits it to these
times.
`--mask` names a mask, or a folder of them in turn, that images follow through the ControlNet of
train_controlnet.py; it is brought to the grid of the volumes and written beside each. With `--structure-size`
the masks of the folder are taken that are closest to these sizes. `--augment-masks` deforms each mask,
`--move 5:2` moves label 5 within label 2. `--mask-model ENV` draws the masks, of the sizes asked for, by the
model of label maps of another environment file, into its `output_dir`.
Samples with a label are checked: the median intensity of each structure should be within four standard
deviations of that of scans, and, with `--segmenter` of evaluate.py --segmentation, the label should be found
in the image. One that fails is drawn again, `--tries` times in all, then written to `output_dir`/failed.
`--size` asks for volumes of other voxels than were trained on; the networks need multiples of their factors.
`--spacing` asks for voxels of other mm, of a model with `conditions.spacing`. What lies beyond the field of
view or the spacings of training is warned of, and drawn.
`--autoguidance` moves samples away from what the model drew early in its training, which makes them sharper
and doubles the passes too; the model needs the snapshot of `diffusion_train.snapshot`.

`--max-memory GB` (10^9 bytes) limits the memory of the device for decoding, the weights of both networks
included: volumes are decoded in slabs, with the statistics of the whole volume, and are the same up to
rounding. Less memory takes longer. It limits neither the memory of sampling nor, on a CPU, that of the
program itself, about half a GB.

Beside each volume lies its record, `sample_000003.json`: seed, sampler, steps, hashes of checkpoints and
config, the config itself, versions. `--reproduce` makes the volume of a record again, from the checkpoints
that it names (or `--autoencoder`, `--unet`, `--controlnet`: moved, but the same files), in the same batch,
precision and number of threads. It writes `sample_000003_reproduced.nii.gz` beside the record and prints
whether the bytes are the same, or how far the volumes are apart; over 1e-4 of the range is exit code 1.
`--device` is the only other option that it takes.
"""

import argparse
import contextlib
import csv
import hashlib
import math
import os
import platform
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import utils
from ldm import UserError, configs, counted, few, generation
from ldm.data.datasets import stream
from ldm.data.extent import beyond_training, three_numbers
from ldm.data.reading import IMAGE_SUFFIXES
from ldm.diffusion.conditioning import REGION_NAME, Conditions, texts_of
from ldm.diffusion.samplers import SAMPLERS
from ldm.evaluation.segmentation import load_segmenter
from ldm.export import records
from ldm.generation import Networks
from ldm.given_masks import MaskSource
from ldm.metrics import band_power
from ldm.models.definitions import check_size, network_divisor
from ldm.outputs import (
    SHOWN,
    Sample,
    cleared,
    contents,
    largest_difference,
    recorded_masks,
    show_grid,
    show_samples,
    show_slices,
)
from ldm.quality import Check, draw_until_fit, seed_again
from ldm.sampling_memory import peak_within, rehearse
from ldm.system import ranks, versions
from ldm.system.checkpoints import load_checkpoint
from ldm.system.files import label_path
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run
from ldm.training import memory

FAILED = "failed"  # the folder of samples that do not pass the check, in output_dir
NOISY = 3.0  # high-frequency power, as a multiple of the reconstructions', above which samples are noise
TOLERANCE = 1e-4  # share of its range by which a volume may differ from the one that it reproduces
LABELS_TOLERANCE = 1e-3  # share of the voxels of a label map


# ---------------------------------------------------------------- command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its numbers checked."""
    parser = utils.script_parser(__doc__)
    utils.add_dry_run(parser)
    add = parser.add_argument
    many = "how many volumes; default: 1, or one for each mask that is not chosen by --structure-size"
    add("-n", "--num", type=int, default=None, help=many)
    add("--seed", type=int, default=0, help="seed of the first; the others count on from it")
    add("--batch-size", type=int, default=1, help="volumes at a time")
    defaults = ", ".join(f"{name} {sampler.steps or 'all'}" for name, sampler in SAMPLERS.items())
    add("--steps", type=int, default=None, help=f"sampling steps; default: {defaults}")
    add("--sampler", default=None, help="default: heun for rectified flow, else dpmpp_2m")
    add(
        "--condition",
        action="extend",
        nargs="+",
        default=[],
        metavar="COLUMN=VALUE",
        help="such as age=20:80",
    )
    add(
        "--structure-size",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="the size of a structure, from 0, the smallest of training, to 1, the largest",
    )
    add(
        "--conditions",
        type=Path,
        metavar="TABLE",
        help="a TSV or CSV with a row of conditions for each sample",
    )
    add(
        "--grid",
        metavar="COLUMN=V1,V2,...",
        help="each seed under each of these values, and grid.png of them",
    )
    add("--autoguidance", type=float, help="strength of the early snapshot as a guide; default: the config's")
    add("--guidance", type=float, default=None, help="strength of the condition; default: 1, no guidance")
    add(
        "--interval",
        metavar="LOW:HIGH",
        help="times within which --guidance acts; 0 is no noise, 1 all noise",
    )
    utils.add_networks(parser)
    add("--mask", type=Path, metavar="PATH", help="a mask, or a folder of masks, that images should follow")
    drawn = "draw a mask for each image by the model of label maps of this environment file"
    add("--mask-model", type=Path, metavar="ENV", help=drawn)
    add("--augment-masks", action="store_true", help="deform each mask at random, by the sample's seed")
    add("--move", metavar="LABELS:WITHIN", help="move labels of masks within another, such as 5:2 or 5,6:2")
    add("--controlnet", type=Path, default=None, help="default: model_dir/controlnet.pt, with --mask")
    add(
        "--clear-background",
        action="store_true",
        default=None,
        help="where the mask is 0, write the lowest value, such as air outside of a body",
    )
    add("--tries", type=int, default=3, help="draws of a sample whose label does not fit; 0: no check")
    add(
        "--segmenter",
        type=Path,
        metavar="FILE",
        help="that also checks labels, of evaluate.py --segmentation",
    )
    add("--size", metavar="X,Y,Z", help="voxels of the volumes; default: as trained")
    add("--spacing", metavar="X,Y,Z", help="their spacing in mm; default: as trained")
    utils.add_max_memory(parser, "decode")
    add("--reproduce", type=Path, default=None, metavar="FILE", help="make the volume of this record again")
    args = parser.parse_args(argv)
    if args.reproduce:
        unset = argparse.Namespace(**dict.fromkeys(vars(args)))
        given = {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
        if others := sorted(given - {"reproduce", *records.CHECKPOINTS, records.CONTROL, "device"}):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise UserError(f"--reproduce: takes everything from its file; leave out {names}.")
    for name in ("num", "batch_size", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1.")
    if args.steps is not None and args.steps > records.MOST_STEPS:
        raise UserError(f"--steps {args.steps}: at most {records.MOST_STEPS} are possible.")
    if not 0 <= args.seed <= records.LAST_SEED - (args.num or 1):
        raise UserError(f"--seed {args.seed}: expected 0 or more, and less than 2^63 for all.")
    most = records.MOST_GUIDANCE
    for name in ("guidance", "autoguidance"):
        strength = getattr(args, name)
        if strength is not None and not 0 <= strength <= most:
            raise UserError(f"--{name} {strength}: expected a number from 0 to {most}.")
    conditioned = args.condition or args.structure_size or args.conditions or args.grid
    if args.guidance is not None and not conditioned:
        raise UserError("--guidance: strengthens a condition. Give one by --condition, such as group=1.")
    if args.interval is not None:
        args.interval = interval_of(args.interval, args.guidance)
    if args.grid:
        name, equals, values = args.grid.partition("=")
        args.grid = (name, values.split(","))
        if not (name and equals and all(args.grid[1])) or len(set(args.grid[1])) < len(args.grid[1]):
            raise UserError(
                f"--grid {name}{equals}{values}: expected different values, such as age=20,40,60."
            )
    if args.conditions and args.num is not None:
        raise UserError("--conditions: makes a sample for each row of its table; leave out --num.")
    masked = args.mask or args.mask_model
    for name in ("clear_background", "controlnet", "augment_masks", "move"):
        if getattr(args, name) and not masked:
            raise UserError(
                f"--{name.replace('_', '-')}: is for images that follow a mask. Give one by --mask."
            )
    if args.mask_model and (args.mask or args.conditions):
        other = "--mask" if args.mask else "--conditions"
        raise UserError(f"--mask-model: draws --num masks; leave out {other}.")
    if args.tries < 0:
        raise UserError(f"--tries {args.tries}: expected 0 or more.")
    if args.segmenter and not args.tries:
        raise UserError("--segmenter: checks samples. Leave out --tries 0.")
    args.size = three_numbers(args.size, "--size", True) if args.size is not None else None
    args.spacing = three_numbers(args.spacing, "--spacing", False) if args.spacing is not None else None
    args.masks = masks_below(args.mask) if args.mask else []
    args.num = args.num or (1 if args.structure_size else max(1, len(args.masks)))
    utils.check_scale_factor(args.scale_factor)
    return args


def masks_below(path: Path) -> list[Path]:
    """A mask, or all NIfTI files in a folder. Raises UserError: there are none."""
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.name.lower().endswith(IMAGE_SUFFIXES))
        found = [one for one in files if one.name[0] != "." and records.REPRODUCED not in one.name]
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise UserError(f"--mask {path}: no such file, or a folder without {', '.join(IMAGE_SUFFIXES)}.")
    return found


def interval_of(text: str, guidance: float | None) -> list[float]:
    """The two ends of `--interval`. Raises UserError: they are not two shares in order, or nothing is
    guided."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UserError(f"--interval {text}: expected two numbers from 0 to 1 in order, such as 0.2:0.8.")
    if guidance in (None, 1):
        raise UserError("--interval: limits guidance. Give its strength by --guidance, such as 3.")
    return [low, high]


def hardware(run: Run) -> str:
    """The GPU's name, or the kind of CPU and of its vector instructions."""
    if run.device.type == "cuda":
        return torch.cuda.get_device_name(run.device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def counting(bar) -> Callable[[Sequence], Iterator]:
    """Iterate over the steps of a sampler, and count them on a progress bar."""

    def steps_of(steps: Sequence) -> Iterator:
        for step in steps:
            yield step
            bar.update()

    return steps_of


# ---------------------------------------------------------------- dry run


def print_memory(args: argparse.Namespace, config: dict) -> None:
    """The dry run: print the peaks by part, and what would lower them. Nothing is written.

    Raises:
        UserError: volumes cannot be decoded within `--max-memory`.
        ForecastError: the peaks cannot be estimated.
    """
    gpu, size = utils.meant_for_gpu(args), planned_size(args, config)
    half = memory.half_precision(gpu)

    def peaks(batch: int, amp: bool, limit: float | None) -> dict[str, memory.Peak]:
        meter, run = memory.Meter(gpu), Run(0, 1, torch.device("cpu"), half if amp else None)
        with memory.forecasting():
            masks = bool(args.masks or args.mask_model)
            rehearse(config, size, batch, meter, run, args.guidance or 1.0, masks)
        if limit:
            weights = meter.peaks["decoding"].parts["weights"]
            meter.peaks["decoding"] = peak_within(limit, gpu, config, size, weights, run)
        return meter.peaks

    batch, amp, limit = args.batch_size, bool(args.amp), args.max_memory
    found = peaks(batch, amp, limit)
    now, sampling = memory.highest(found).total, found["sampling"].total
    options = {"--batch-size 1": (1, amp, limit)} if batch > 1 else {}
    if not amp and half:
        options["--amp"] = (batch, True, limit)
    if not limit:  # what sampling takes anyway, of which decoding plans with 0.9
        least = math.ceil(sampling / 1e8) / 10
        options[f"--max-memory {least}"] = (batch, amp, least)
    lower = {}
    for words, option in options.items():
        with contextlib.suppress(UserError, memory.ForecastError):  # too little to decode in
            lower[words] = memory.highest(peaks(*option)).total
    lower = {words: total for words, total in sorted(lower.items(), key=lambda item: item[1]) if total < now}
    print(memory.report(found, lower, gpu, half if amp else None, batch, size))
    if limit and sampling > limit * memory.GB:
        print(f"--max-memory {limit:g} holds for decoding; sampling takes {sampling / memory.GB:.2f} GB")


def planned_size(args: argparse.Namespace, config: dict) -> list[int]:
    """Voxels of the volumes: as asked, else by the config, the checkpoint, or the data's headers."""
    if args.size:
        check_size(args.size, network_divisor(config), "--size")
        return args.size
    if not config["diffusion_train"]["patch_size"]:
        path = args.unet or utils.load_environment(args.environment_file)["model_dir"] / "diffusion_unet.pt"
        if path.is_file():
            return generation.geometry_of(load_checkpoint(path), config, path)["size"]
    return utils.planned_sizes(config, args)[1]


# ---------------------------------------------------------------- reproduce


def reproduce(args: argparse.Namespace) -> None:
    """Make the volume of a record again, and compare it with the one that was written."""
    # Step 0: the record, and the files that it names
    record = records.read_record(args.reproduce)
    config = configs.check_config(record["config"], args.reproduce)
    original = args.reproduce.with_name(f"{args.reproduce.stem}.nii.gz")
    path = args.reproduce.with_name(f"{args.reproduce.stem}{records.REPRODUCED}.nii.gz")
    for one in (path, label_path(path)):
        if one.exists():
            raise UserError(f"{one} already exists. Move it away first.")
    folder = args.reproduce.parent
    checkpoints = [
        records.find_checkpoint(record, key, folder, getattr(args, key)) for key in records.CHECKPOINTS
    ]
    control = None
    if records.CONTROL in record:
        control = records.find_checkpoint(record, records.CONTROL, folder, args.controlnet)

    # Step 1: the same device, precision, threads and networks
    args.device, args.amp = args.device or record["device"], False
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("--reproduce makes one volume: start it without torchrun.")
    if record["precision"] in ("bfloat16", "float16"):
        run.amp_dtype = getattr(torch, record["precision"])
    ranks.choose_kernels(tf32=record["precision"] == "tf32", repeatable=True)  # of an earlier version
    torch.set_num_threads(record["threads"])
    scale_factor, compiled, limit = record["scale_factor"], record["compile"], record.get("max_memory")
    asked = {"size": record["volume"]["shape"], "spacing": record["volume"]["spacing"]}
    networks = generation.load_networks(
        *checkpoints,
        config,
        args.reproduce,
        scale_factor,
        compiled,
        limit,
        run,
        control_path=control,
        **asked,
    )

    # Step 2: the same batch
    batch, sampler, steps, seed = (record[key] for key in ("batch", "sampler", "steps", "seed"))
    bar = progress_bar(run, f"sample ({steps} steps)", total=steps)
    condition = record.get("condition", {})
    recorded = record.get("conditions", [condition] * len(batch))
    chosen = [networks.conditions.parse([f"{k}={v}" for k, v in one.items()]) for one in recorded]
    guidance, interval = record.get("guidance", 1.0), record.get("interval")
    noise_seed = record.get("again", {}).get("seed", seed)
    place = list(zip(batch, recorded, strict=True)).index((noise_seed, condition))
    masks = recorded_masks(original, record, place, networks) if control else None
    volumes = generation.draw(
        networks, batch, sampler, steps, run, counting(bar), chosen, guidance, interval, masks
    )
    bar.close()
    volumes = cleared(volumes, masks) if record.get("clear_background") else volumes
    volume = generation.in_typical_units(volumes[place], networks, seed)
    content, label = contents(volume, volumes[place], networks, masks and masks[place])
    records.save_volume(path, content, label=label)

    # Step 3: compare
    expected = record["volume"]["sha256"]
    same = hashlib.sha256(content).hexdigest() == expected
    if label is not None:
        same_label = hashlib.sha256(label).hexdigest() == record["volume"]["label"]["sha256"]
        about = "byte-identical to" if same_label else "not byte-identical to"
        run.print(f"reproduced: {label_path(path)}\n  {about} the recorded label")
    if same:
        run.print(f"reproduced: {path}\n  byte-identical to the recorded volume")
        return
    before = {**record["versions"], "hardware": record["hardware"]}
    now = {**versions.versions(), "hardware": hardware(run)}
    changed = [f"{key} {before.get(key)} then, {now[key]} now" for key in now if before.get(key) != now[key]]
    changed = ", ".join(changed) or "same versions and hardware"
    if not original.exists() or records.sha256_of(original) != expected:
        run.print(
            f"reproduced: {path}\n  not byte-identical to the recorded volume ({changed}), and "
            f"{original.name} is missing or was changed, so they cannot be compared"
        )
        return
    before, tolerance = generation.read_volume(original), TOLERANCE
    if networks.label_maps:
        apart, tolerance = float(np.mean(volume != before)), LABELS_TOLERANCE
        result = f"{path}: differs from {original.name} in {apart:.1e} of its voxels ({changed})"
    else:
        apart = largest_difference(volume, before)
        if networks.whole_numbers:  # rounded
            tolerance = max(tolerance, 1.001 / max(np.ptp(before.astype(np.int64)), 1))
        result = f"{path}: differs from {original.name} by up to {apart:.1e} of its range ({changed})"
    if not apart <= tolerance:
        raise FloatingPointError(f"{result}.\nMore than {tolerance} is not rounding: not reproduced.")
    run.print(f"reproduced: {result}: equal up to rounding")


# ---------------------------------------------------------------- what to sample


def requested(
    args: argparse.Namespace,
    conditions: Conditions,
    structures: Collection[str],
    folder: Path,
    end: str,
    masks: MaskSource | None,
    run: Run,
) -> list[Sample]:
    """The volumes of the command line; with `--grid` those of a seed follow each other.

    Args:
        structures: whose sizes the model is conditioned on.
        folder, end: of the files.
        masks: that they follow; what they hold of the structures is their condition.

    Raises:
        UserError: a condition that the model does not know.
    """
    given = conditions.parse(args.condition)
    sizes = {} if masks else conditions.parse_sizes(args.structure_size, structures)
    if twice := given.keys() & sizes.keys():
        raise UserError(f"--structure-size: {min(twice)} is given by --condition, too. Leave one out.")
    given |= sizes
    rows = read_conditions(args.conditions, conditions) if args.conditions else [{}] * args.num
    name, values = args.grid or ("", [])
    suffixes = [f"_{name}-{value}" for value in values]
    if odd := [one for one in suffixes if re.search(r"[^\w.+-]", one)]:
        raise UserError(f"--grid: {odd[0][1:]} cannot be part of a file's name. Use --conditions for it.")
    columns = [
        (one, conditions.parse([f"{name}={value}"])) for one, value in zip(suffixes, values, strict=True)
    ]
    columns = columns or [("", {})]
    if conditions and not conditions.can_drop and args.guidance not in (None, 1):
        raise UserError("--guidance: this model has no input for an unknown condition. Leave it out.")
    samples, known = [], {}
    for seed, row in enumerate(rows, args.seed):
        mask = masks(seed) if masks else None
        known = mask.sizes if mask else {}
        for suffix, column in columns:
            condition = conditions.for_sample({**known, **given, **row, **column}, stream(seed, "conditions"))
            samples.append(Sample(seed, condition, folder / f"sample_{seed:06d}{suffix}{end}", mask))
    asked = {**known, **given, **rows[0], **columns[0][1]}
    if conditions.column is not None and conditions.column not in asked:
        values = few(conditions.values, 8)
        run.print(f"inference: no --condition, so {conditions.column} is unknown (it may be {values})")
    left = [*conditions.covariates.columns] if conditions.covariates else []
    left += [REGION_NAME] if conditions.regions is not None else []
    if left := [one for one in left if one not in asked]:
        run.print(f"inference: {', '.join(left)} not given: drawn from the training volumes'")
    if conditions.covariates:
        for warning in sorted(
            {text for one in samples for text in conditions.covariates.outside(one.condition)}
        ):
            run.print(f"warning: {warning}. Such samples may be wrong")
    return samples


def read_conditions(path: Path, conditions: Conditions) -> list[dict]:
    """The conditions in a table, a row for each sample: tab- or comma-separated, with a header that names the
    columns. Empty cells are not given.

    Raises:
        UserError: the table cannot be read, or has something that the model does not know.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--conditions {path}: cannot be read ({error}).") from None
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in text.partition("\n")[0] else ","))
    if not rows:
        raise UserError(f"--conditions {path}: has no rows below its header.")
    found = []
    for number, row in enumerate(rows, 2):
        row.pop("participant_id", None)
        if None in row or None in row.values():
            raise UserError(f"--conditions {path}, line {number}: has not as many cells as the header.")
        try:
            found.append(conditions.parse([f"{name}={cell}" for name, cell in row.items() if cell.strip()]))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return found


# ---------------------------------------------------------------- the script


@utils.command
@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration and device
    args = parse_arguments(argv)
    if args.reproduce:
        return reproduce(args)
    config = utils.load_config(args.config_file, args.set)
    if args.autoguidance is not None:
        config["diffusion_train"]["autoguidance"] = args.autoguidance
    if args.dry_run:
        return print_memory(args, config)
    environment = utils.load_environment(args.environment_file, writable=("output_dir",))
    if args.mask_model:
        args.masks, args.structure_size = draw_masks(args), []
    run = utils.start(args)
    output_dir, model_dir, compiled = environment["output_dir"], environment["model_dir"], bool(args.compile)

    # Step 1: networks
    checkpoints = {
        "autoencoder": args.autoencoder or model_dir / "autoencoder.pt",
        "unet": args.unet or model_dir / "diffusion_unet.pt",
    }
    control = (args.controlnet or model_dir / "controlnet.pt") if args.masks else None
    networks = generation.load_networks(
        *checkpoints.values(),
        config,
        args.config_file,
        args.scale_factor,
        compiled,
        args.max_memory,
        run,
        args.set,
        control,
        args.size,
        args.spacing,
    )
    geometry = networks.geometry
    for what in beyond_training(geometry) if networks.asked else []:
        run.print(f"warning: {what}. Such samples may be wrong")

    # Step 2: what to sample, and which samples already exist
    sampler, steps = networks.sampling(args.sampler, args.steps)
    guidance = 1.0 if args.guidance is None else args.guidance
    end = "_label.nii.gz" if networks.label_maps else ".nii.gz"
    structures = config["conditions"]["structure_sizes"]
    masks = None
    if control:
        changes = args.structure_size, args.augment_masks, args.move
        masks = MaskSource(args.masks, networks, structures, *changes, run.print)
    samples = requested(args, networks.conditions, structures, output_dir, end, masks, run)
    request = {
        "sampler": sampler,
        "steps": steps,
        "scale_factor": networks.scale_factor,
        **({"guidance": guidance} if any(one.condition for one in samples) else {}),
        **({"interval": args.interval} if args.interval else {}),
        "precision": run.precision,
        "compile": compiled,
        "device": run.device.type,
        "hardware": hardware(run),
        "threads": torch.get_num_threads(),
        **{
            key: {"path": path.as_posix(), "sha256": records.sha256_of(path)}
            for key, path in {**checkpoints, **({records.CONTROL: control} if control else {})}.items()
        },
        "config_sha256": records.config_hash(config),
        "config": config,
        "versions": versions.versions(),
        **({"max_memory": args.max_memory} if args.max_memory else {}),
        **({"clear_background": True} if args.clear_background else {}),
        **networks.asked,
    }
    check = checking(args, networks, run)
    if check:
        segmenter = {"segmenter": records.sha256_of(args.segmenter)} if args.segmenter else {}
        request["check"] = {"tries": args.tries, **segmenter}
    failed = output_dir / FAILED
    before = [failed / one.path.name for one in samples]  # they stay there
    samples = [
        replace(one, path=path) if check and path.exists() else one
        for one, path in zip(samples, before, strict=True)
    ]
    requests = {one.path: {**request, **one.record()} for one in samples}
    missing = run.from_main(lambda: records.missing(requests))  # before any rank writes
    if len(missing) < len(samples):
        run.print(f"inference: {len(samples) - len(missing)} of {len(samples)} volumes already exist")

    # Step 3: sample, decode, write; each rank its share of the batches. A batch that exists in part is
    # sampled whole: in a smaller one its volumes would be rounded otherwise.
    batches = [samples[i : i + args.batch_size] for i in range(0, len(samples), args.batch_size)]
    mine = [batch for batch in batches if any(one.path in missing for one in batch)]
    mine = mine[run.rank :: run.world_size]
    bar = progress_bar(run, f"sample ({steps} steps)", total=len(mine) * steps)
    power = torch.zeros(2, dtype=torch.float64)  # sum and count

    def draw(seeds: Sequence[int], batch: Sequence[Sample], progress: Callable = iter) -> torch.Tensor:
        chosen = [one.condition for one in batch]
        masks = [one.mask.voxels for one in batch] if control else None
        drawn = generation.draw(
            networks, seeds, sampler, steps, run, progress, chosen, guidance, args.interval, masks
        )
        return cleared(drawn, masks) if args.clear_background else drawn

    for batch in mine:
        seeds, chosen = ([getattr(one, key) for one in batch] for key in ("seed", "condition"))
        volumes = draw(seeds, batch, counting(bar))
        together = {"batch": seeds}
        if any(one != chosen[0] for one in chosen):
            together["conditions"] = [texts_of(one) for one in chosen]
        if not networks.label_maps:
            images = volumes[:, : len(geometry["limits"])]
            power += torch.tensor([band_power(images).sum().item(), len(batch)])
        for one, volume in zip(batch, volumes, strict=True):
            if one.path not in missing:
                continue
            path, own = one.path, together
            if check:
                volume, number, faults = draw_until_fit(
                    one.seed,
                    volume,
                    lambda seed, one=one: draw([seed], [one])[0],
                    lambda volume, one=one: faults_of(check, networks, volume, one.mask and one.mask.voxels),
                    args.tries,
                )
                if number:
                    seed = seed_again(one.seed, number)
                    own = {"batch": [seed], "again": {"draws": number, "seed": seed}}
                if faults:
                    path, own = failed / one.path.name, {**own, "faults": faults}
                    failed.mkdir(exist_ok=True)
                    run.print(f"{one.path.name}: drawn {counted(number + 1, 'time{s}')}, {faults[0]}")
            voxels = generation.in_typical_units(volume, networks, one.seed)
            content, label = contents(voxels, volume, networks, one.mask and one.mask.voxels)
            about = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "shape": list(voxels.shape[1:]),
                "spacing": list(geometry["spacing"]),
                "limits": geometry["limits"],
                **({"label": {"sha256": hashlib.sha256(label).hexdigest()}} if label else {}),
            }
            record = {**own, **requests[one.path], "volume": about}
            records.save_volume(path, content, record, label)
            if networks.autoencoder.is_slicewise:
                show_slices(networks, voxels, one.seed, path)
    bar.close()
    power, count = run.sum(power).tolist()  # once all ranks have written

    # Step 4: a picture, and how sharp the samples are compared with the autoencoder's reconstructions
    everyone, asked = samples, len(samples)
    samples = [one for one in samples if one.path.parent != failed and one.path.exists()]
    if run.is_main and len(samples) < asked:
        run.print(
            f"warning: {asked - len(samples)} of {asked} volumes do not fit their labels and are in "
            f"{failed}; their records say why"
        )
    if run.is_main and samples:
        if args.grid:
            picture = show_grid(networks, everyone, *args.grid, output_dir)
        else:
            picture = show_samples(networks, samples[:SHOWN], output_dir)
        sharpness = ""
        if count and networks.power:
            share = power / count / networks.power
            sharpness = f"; high-frequency power {share:.2f} of the reconstructions'"
            if share > NOISY:
                run.print("warning: the samples are mostly noise. Train the diffusion model for more steps.")
        kind = "label map{s}" if networks.label_maps else "volume{s}"
        beside = not networks.label_maps and (networks.labels or control)
        what = counted(len(samples), kind) + " and their labels" * bool(beside)
        run.print(f"inference: {what} in {output_dir}{sharpness}\n  {picture}")


def checking(args: argparse.Namespace, networks: Networks, run: Run) -> Check | None:
    """The check of samples with labels; None where there is nothing to check, or `--tries` is 0."""
    if not args.tries or networks.label_maps or not (networks.labels or networks.masks):
        if args.segmenter:
            raise UserError("--segmenter: checks images with labels, which this model does not draw.")
        return None
    if not (networks.structures or args.segmenter):
        run.print("note: the checkpoint does not hold the intensities of structures: samples are not checked")
        return None
    channels = len(networks.geometry["limits"])
    segment = (
        load_segmenter(args.segmenter, channels, networks.geometry["spacing"], run)
        if args.segmenter
        else None
    )
    return Check(networks.structures, segment, segment.values if segment else ())


def faults_of(check: Check, networks: Networks, volume: torch.Tensor, mask: torch.Tensor | None) -> list[str]:
    """What is wrong with a volume (C, D, H, W) as drawn."""
    label = generation.drawn_label(volume, networks) if mask is None else mask[None].numpy()
    return check.faults(volume[: len(networks.geometry["limits"])], label[0])


def draw_masks(args: argparse.Namespace) -> list[Path]:
    """Draw a mask for each sample by the model of `--mask-model`, as its own command would: the files."""
    environment = utils.load_environment(args.mask_model)
    config = environment["model_dir"] / "config_diffusion.json"
    if utils.load_config(config)["with_labels"] != configs.ONLY:
        raise UserError(
            f"--mask-model {args.mask_model}: its model draws images. Name one of label maps alone."
        )
    if "WORLD_SIZE" in os.environ:
        raise UserError("--mask-model: runs in one process. Draw the masks first, and name them by --mask.")
    argv = ["-c", str(config), "-e", str(args.mask_model), "-n", str(args.num), "--seed", str(args.seed)]
    for name in ("batch_size", "steps", "device"):
        if (value := getattr(args, name)) is not None:
            argv.append(f"--{name.replace('_', '-')}={value}")
    main.__wrapped__(argv + [f"--structure-size={one}" for one in args.structure_size])
    seeds = range(args.seed, args.seed + args.num)
    return [environment["output_dir"] / f"sample_{seed:06d}_label.nii.gz" for seed in seeds]


if __name__ == "__main__":
    main()
