"""Choose a config for a data set and a GPU, and say why.

    python plan.py --data data/brains --gpu-memory 16                 # writes plans/brains/config.json
    python plan.py --data data/brains --cpu-memory 8 --minutes 20     # for a CPU; both stages together
    python plan.py --data data/brains --gpu-memory 16 --set diffusion_train.max_epochs=200
    python plan.py --data 4 --gpu-memory 24                           # $nnUNet_raw/Dataset004_*
    python plan.py --data data/brains --gpu-memory 16 --with-labels   # images and labels together

Every volume is read once. Beside the config are written

    dataset_fingerprint.json   spacings, shapes and intensities, with nnU-Net's keys
    config_planned.json        the config as it was planned: values of the config that differ from it were
                               changed by hand, and the next plan keeps them
    environment.json           paths of data and results; kept if it is there

The config is an ordinary one and may be edited. Its key `_why` has the reason of each choice; docs/planner.md
has the rules. Spacings are in mm along right, anterior and superior. Where the patches of stage 1 see less
than a quarter of a volume, a second plan at a lower resolution is written, config_lowres.json, to be trained
first.

Of an nnUNetPlans.json (--plans, or that of the data set in $nnUNet_preprocessed) spacing, strides and CT
windows are used.

Exit codes: 0 done, 1 the disk failed, 2 wrong usage, bad data, or a plan that cannot fit.
"""

import argparse
import functools
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import utils
from ldm import UserError, counted
from ldm.configs import flat
from ldm.data import nnunet
from ldm.data.fingerprint import fingerprint
from ldm.data.labels import check_labelled
from ldm.data.layouts import find_cases
from ldm.data.reading import by_times
from ldm.planning.choices import SPACES, make_plan
from ldm.planning.plan import REMOVED, Machine, Plan
from ldm.system.files import read_json, write_json
from ldm.training.memory import GB

CONFIG, FINGERPRINT = "config.json", "dataset_fingerprint.json"
COMMAND_LINE, BY_HAND = "set on the command line", "changed by hand"


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)

    # Step 1: the data set, and what it looks like
    folder = nnunet.dataset_folder(args.data)
    path = args.config_out or Path("plans") / folder.resolve().name / CONFIG
    given = given_values(args)
    overrides = changed_by_hand(path) | given
    check_environment_file(environment_of(path), folder)
    data = {key: overrides.get(f"data.{key}", (None,))[0] for key in ("pattern", "contrasts", "subject")}
    cases, validation = find_cases(folder, **data, outputs=[path.parent], generated=False, log=print)
    cases = [*cases, *validation]
    plans = args.plans or nnunet.plans_of(folder)
    from_nnunet = nnunet.read_plans(plans, folder, cases[0].images[0]) if plans else None
    measured = fingerprint(cases, functools.partial(utils.parallel, workers=args.jobs))

    # Step 2: the plan; and that of a lower resolution, where patches see little
    print("forecasting the memory of networks and patches; this takes a minute or two", flush=True)
    memory = round((args.gpu_memory or args.cpu_memory) * GB)
    machine = Machine(memory, args.cpu_memory is None, args.minutes)
    names = channel_names(folder, args.channels, data["contrasts"], measured)
    if args.with_labels:
        check_labelled(cases, "--with-labels")
    given_data = {"dims": args.dims, "nnunet": from_nnunet, "with_labels": args.with_labels}
    plan = functools.partial(make_plan, measured, names, machine, args.space, **given_data)
    chosen = {path: plan(spacing=args.spacing, overrides=overrides)}
    if coarser := chosen[path].lowres_spacing:
        lowres = path.with_stem(f"{path.stem}_lowres")
        own = changed_by_hand(lowres) | {key: value for key, value in given.items() if key != "spacing"}
        chosen = {lowres: plan(spacing=coarser, overrides=own)} | chosen

    # Step 3: write it, and print it with the next commands
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_name(FINGERPRINT), measured)
    print(summary(chosen[path], path))
    print("next:")
    for file, one in chosen.items():
        write_json(file, one.result())
        write_json(planned(file), one.config)
        environment = environment_of(file)
        if not environment.exists():
            write_json(environment, paths_of(folder, file))
        print("\n".join(next_commands(file, environment, one, machine)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="a data folder, a JSON list, or the number of a data set of nnU-Net")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of the GPU, in 10^9 bytes")
    where.add_argument("--cpu-memory", type=float, metavar="GB", help="train on a CPU with so much memory")
    about = "time to train both stages, a quarter and three quarters of it (default: by steps)"
    add("--minutes", type=float, metavar="M", help=about)
    add("--config-out", type=Path, metavar="FILE", help="default: plans/NAME/config.json")
    add(
        "--space", choices=SPACES, default="latent", help="what is diffused: latents, voxels or Haar wavelets"
    )
    add("--dims", type=int, choices=(2, 3), default=3, help="of the networks; 2: slice by slice (default: 3)")
    add("--spacing", type=float, nargs="+", metavar="MM", help="one or three (default: by the volumes)")
    add("--channels", type=int, nargs="+", metavar="C", help="numbers of the channels to use (default: all)")
    add("--with-labels", action="store_true", help="draw labels with images")
    add("--plans", type=Path, metavar="FILE", help="an nnUNetPlans.json to follow")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    add("-j", "--jobs", type=int, default=os.cpu_count(), metavar="N", help="volumes at a time")
    args = parser.parse_args(argv)
    numbers = {"gpu_memory": args.gpu_memory, "cpu_memory": args.cpu_memory, "minutes": args.minutes}
    for name, number in (*numbers.items(), ("jobs", args.jobs)):
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {number:g}: expected a number above 0.")
    if args.spacing is not None:
        if len(args.spacing) not in (1, 3) or not min(args.spacing) > 0:
            raise UserError("--spacing: give one or three numbers above 0, in mm.")
        args.spacing *= 3 // len(args.spacing)
    utils.find_files(plans=[args.plans])
    return args


def given_values(args: argparse.Namespace) -> dict[str, tuple[object, str]]:
    """{dotted key: (value, reason)} of `--set`."""
    config = {}
    for override in args.set:
        utils.apply_override(config, override)
    return {key: (value, COMMAND_LINE) for key, value in flat(config).items()}


def planned(path: Path) -> Path:
    """Where a config is kept as it was planned."""
    return path.with_stem(f"{path.stem}_planned")


def changed_by_hand(path: Path) -> dict[str, tuple[object, str]]:
    """{dotted key: (value, reason)} of the values of an earlier config that its plan had otherwise.

    Raises:
        UserError: the file is there, and no plan beside it says what was changed.
    """
    if not path.exists():
        return {}
    if not planned(path).is_file():
        raise UserError(f"{path}: is there already, and was not planned. Name another --config-out.")
    now, before = flat(read_json(path) | {"_why": {}}), flat(read_json(planned(path)))
    changed = {key: value for key, value in now.items() if key != "_why" and before.get(key) != value}
    changed |= {key: REMOVED for key in before if key not in now}
    if changed:
        print(f"kept as changed by hand in {path}: {', '.join(changed)}")
    return {key: (value, BY_HAND) for key, value in changed.items()}


def channel_names(
    folder: Path, channels: Sequence[int] | None, contrasts: Sequence[str] | None, measured: dict
) -> dict[int, str]:
    """Names of the channels that are used, by number: those of dataset.json, else endings of files.

    Raises:
        UserError: a number that the images do not have.
    """
    count = len(measured["foreground_intensity_properties_per_channel"])
    files = [folder / "dataset.json", *sorted(folder.glob("*/dataset.json"))] if folder.is_dir() else [folder]
    content = next((read_json(file) for file in files if file.is_file()), {})
    found = content.get("channel_names") or content.get("modality") or {}
    names = list(found.values()) if isinstance(found, dict) else []
    if len(names) != count:
        names = [end.strip("_") for end in contrasts or ()]
    if len(names) != count:
        names = [f"channel {c}" for c in range(count)] if count > 1 else ["image"]
    for c in channels or ():
        if not 0 <= c < count:
            raise UserError(f"--channels {c}: the images have {counted(count, 'channel{s}')}, from 0 on.")
    return {c: str(names[c]) for c in dict.fromkeys(channels or range(count))}


def environment_of(path: Path) -> Path:
    """The environment file of a config: environment.json of config.json."""
    stem = path.stem.removeprefix("config").strip("_-")
    return path.with_name(f"environment_{stem}.json" if stem else "environment.json")


def check_environment_file(path: Path, folder: Path) -> None:
    """Raise UserError where an environment file is there already and names other data."""
    if path.exists() and (base := read_json(path).get("data_base_dir")) != str(folder.resolve()):
        raise UserError(f"{path}: names the data {base}, not {folder.resolve()}. Name another --config-out.")


def paths_of(folder: Path, config_file: Path) -> dict:
    """The content of an environment file: results go to a folder of the config's own."""
    stem = environment_of(config_file).stem.removeprefix("environment")
    out = f"outputs/{config_file.resolve().parent.name}{stem}"
    folders = {"model_dir": "models", "tfevent_path": "tensorboard", "output_dir": "samples"}
    return {"data_base_dir": str(folder.resolve()), **{key: f"{out}/{name}" for key, name in folders.items()}}


def summary(chosen: Plan, path: Path) -> str:
    """The values that have a reason, each with it."""
    config = chosen.result()
    reasons, values = config.pop("_why"), flat(config)
    lines = [f"plan: {path}"]
    for key, reason in reasons.items():
        value = values.get(key)
        text = by_times(value) if key.endswith(("spacing", "patch_size")) and value else value
        lines.append(f"  {key}: {reason}" if text is None else f"  {key} {text}: {reason}")
    return "\n".join(lines)


def next_commands(file: Path, environment: Path, chosen: Plan, machine: Machine) -> list[str]:
    """The commands that train with a plan, draw volumes and evaluate them."""
    common, section = ["-c", str(file), "-e", str(environment)], chosen.config["diffusion_train"]
    slabs = ["--max-memory", f"{machine.memory / GB:g}"]
    steps = [
        ["train_autoencoder.py"],
        ["train_diffusion.py"],
        ["inference.py", "--num", "8"],
        ["evaluate.py"],
    ]
    if "diffusion_train.sample_interval" in chosen.why:  # decoding a whole volume does not fit
        steps[2] += slabs
    if section.get("latent_cache"):
        steps.insert(1, ["cache_latents.py", *slabs])
    return [f"  {shlex.join(['python', script, *common, *more])}" for script, *more in steps]


if __name__ == "__main__":
    main()
