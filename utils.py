"""What the scripts share: arguments, config and environment files, start of processes, loaders, dry runs."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ldm import UserError, brief, configs
from ldm.data.datasets import EpochSampler
from ldm.data.prepare import patch_sizes, prepare_data
from ldm.diffusion.process import NoiseProcess
from ldm.environment import check_environment, check_writable
from ldm.system import ranks
from ldm.system.checkpoints import SCALE_FACTOR, require_checkpoint
from ldm.system.errors import command as command
from ldm.system.files import parse_json, read_json
from ldm.system.ranks import Run
from ldm.system.schemas import StrictValidator
from ldm.system.signals import leave_signals_to_the_main_process
from ldm.training import memory

ROOT = Path(__file__).resolve().parent
MOST_SIGNAL_LEFT = 0.1  # at the last time of a noise schedule


# ---------------------------------------------------------------- arguments


def script_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments of all training and inference scripts."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for letter, name, file, what in (
        ("-c", "--config-file", "config/config_train_32g.json", "what to train"),
        ("-e", "--environment-file", "config/environment.json", "paths of data and results"),
    ):
        add(letter, name, default=str(ROOT / file), help=f"{what}: JSON; default: {file}")
    add("-g", "--gpus", type=int, default=None, help="processes on this machine; checked against torchrun's")
    override = "override a config key, such as diffusion_train.lr=1e-4"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=override)
    add("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    for name, what in (("--amp", "mixed precision"), ("--compile", "torch.compile")):
        about = f"{what}; default: as the config says"
        add(name, action=argparse.BooleanOptionalAction, default=None, help=about)
    return parser


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The argument of the scripts whose memory can be estimated."""
    what = (
        "only print the estimated peak memory by part, for a GPU (or --device cpu), and what would lower it"
    )
    parser.add_argument("--dry-run", action="store_true", help=what)


def training_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments of both training scripts."""
    parser = script_parser(manual)
    add_dry_run(parser)
    parser.add_argument("--fold", type=int, default=None, help="the fold that is held out, from 0: data.fold")
    start = parser.add_mutually_exclusive_group()
    fresh = "start over; earlier files are moved to model_dir/old-N"
    start.add_argument("--fresh", action="store_true", help=fresh)
    start.add_argument(
        "--resume", type=Path, default=None, metavar="FILE", help="resume from this checkpoint"
    )
    skip = "read all data first; if there is no split.json yet, leave out bad cases, listed in skipped.json"
    parser.add_argument("--skip-bad", action="store_true", help=skip)
    profile = "write a trace of a few steps to model_dir, then end"
    parser.add_argument("--profile", action="store_true", help=profile)
    return parser


def add_networks(parser: argparse.ArgumentParser) -> None:
    """The arguments that name the checkpoints of both networks."""
    add = parser.add_argument
    add("--autoencoder", type=Path, default=None, help="default: model_dir/autoencoder.pt")
    add("--unet", type=Path, default=None, help="default: model_dir/diffusion_unet.pt")
    add("--scale-factor", type=float, default=None, help="for weights without one")


def add_max_memory(parser: argparse.ArgumentParser, what: str) -> None:
    """The argument that limits the memory to `what`, "encode" or "decode"."""

    def gigabytes(text: str) -> float:
        if not 0 < (value := float(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected a number of GB above 0.")
        return value

    parser.add_argument("--max-memory", type=gigabytes, metavar="GB", help=f"memory to {what} in")


def check_scale_factor(value: float | None) -> None:
    """Raise UserError where `--scale-factor` is given and out of range."""
    if value is not None and not StrictValidator(SCALE_FACTOR).is_valid(value):
        least, most = SCALE_FACTOR["minimum"], SCALE_FACTOR["maximum"]
        raise UserError(f"--scale-factor {value}: expected a number from {least} to {most}.")


# ---------------------------------------------------------------- configuration


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Read a training config: `--set` over the file over the schema's defaults; checked, references resolved.

    Raises:
        UserError: an unknown or mistyped key, a wrong value, an expression; the key is named.
    """
    config = read_json(path, "config")
    for override in overrides:
        apply_override(config, override)
    return configs.check_config(config, f"{path} with --set" if overrides else path)


def load_training_config(args: argparse.Namespace, stage: str) -> dict:
    """As `load_config`, with `--amp` and `--compile` in the section `stage`."""
    fold = [] if args.fold is None else [f"data.fold={args.fold}"]
    config = load_config(args.config_file, [*args.set, *fold])
    flags = {key: getattr(args, key) for key in ("amp", "compile")}
    config[stage] |= {key: value for key, value in flags.items() if value is not None}
    return config


def apply_override(config: dict, override: str) -> None:
    """Set the value of `--set KEY=VALUE` in a config. Raises UserError: it has another form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected key=value, such as autoencoder_train.lr=8e-5.")
    try:
        value = parse_json(text)
    except ValueError:
        value = text  # a bare word is a string
    configs.put(config, key, value)


def load_environment(path: str | Path, writable: Sequence[str] = ()) -> dict:
    """Read an environment file, as `check_environment` checks it.

    Args:
        writable: its folders that must be writable, before hours of work.
    """
    environment = check_environment(read_json(path, "environment file"), path)
    for key in writable:
        check_writable(environment[key], key)
    return environment


# ---------------------------------------------------------------- processes and devices


def start(args: argparse.Namespace, section: dict | None = None) -> Run:
    """Join the other processes, by torchrun's variables, and choose device and precision.

    Args:
        section: the config's section of a training run, whose `amp` turns on mixed precision. None for
            results that are kept (volumes, latents, metrics): float32 without TF32, unless `--amp` is given,
            and cuDNN's deterministic algorithms.

    Raises:
        UserError: `-g` and the number of processes disagree, or there is no GPU for this process.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if args.gpus is not None and args.gpus != local_world:
        line = f"torchrun --standalone --nproc_per_node={args.gpus} {shlex.join(sys.argv)}"
        count = f"torchrun started {local_world} processes here"
        count = count if "WORLD_SIZE" in os.environ else "this is one process"
        raise UserError(f"-g {args.gpus}, but {count}. Start it as:\n  {line}")
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = ranks.find_device(kind, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
    training = section is not None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        ranks.choose_kernels(tf32=training, repeatable=not training)
    slow_group = None
    if world_size > 1:
        # Gloo beside NCCL, so that the connections of the slow group exist already.
        on_gpus = device.type == "cuda" and dist.is_nccl_available()
        backends = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        try:
            dist.init_process_group(backends, timeout=timedelta(minutes=30))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise OSError(f"the processes cannot connect at {where} ({brief(error)}).") from None
        # A download, a check of all voxels or a slow disk may take longer than a step should.
        slow_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    amp = args.amp if args.amp is not None else training and section.get("amp", True)
    amp_dtype = ranks.amp_dtype(device) if amp else None
    run = Run(rank, world_size, device, amp_dtype, slow_group, shlex.join(["python", *sys.argv]))
    if amp and amp_dtype is None:
        run.print("mixed precision is off: this CPU is not faster in bfloat16, and computes in float32")
    return run


# ---------------------------------------------------------------- loaders and networks


def make_loader(
    dataset: Dataset, section: dict, config: dict, run: Run, workers: int | None = None
) -> DataLoader:
    """A loader of this rank's share of the cases. Set `loader.batch_sampler.epoch` before each epoch."""
    sampler = EpochSampler(
        len(dataset),
        section["batch_size"],
        config["seed"],
        run.rank,
        run.world_size,
        section["accumulate_steps"],
        getattr(dataset, "shapes", None),
    )
    if copies := sampler.copies():
        run.print(
            f"note: {copies} of {len(dataset) + copies} places in an epoch's batches hold a volume again: "
            "a batch of all ranks has one size. Fewer sizes (data.sizes) or a smaller batch_size waste less"
        )
    workers = config["data"]["num_workers"] if workers is None else workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
        persistent_workers=workers > 0,
    )


def parallel(function: Callable, jobs: Sequence, workers: int) -> Iterator:
    """Yield `function(job)` of each job in order, from `workers` processes, or from this one where one is
    enough."""
    if min(workers, len(jobs)) < 2:
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)))
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def find_files(**named: Sequence[str | Path | None]) -> None:
    """Raise UserError where a file that an option names is missing; None stands for none."""
    for option, paths in named.items():
        for path in filter(None, paths):
            if not Path(path).is_file():
                raise UserError(f"--{option.replace('_', '-')} {path}: no such file. Check the path.")


def make_noise_process(section: dict, size: Sequence[int], resumed: dict | None, run: Run) -> NoiseProcess:
    """The noise process of the config's `NoiseScheduler`, or of the checkpoint that is resumed.

    Args:
        size: of the latents, (d, h, w).
    """
    process = NoiseProcess.from_config(section, size)
    if section.get("clip_sample"):
        run.print("NoiseScheduler.clip_sample is not applied: it would cut latents of unit variance at 1")
    if (left := process.signal_left) > MOST_SIGNAL_LEFT:
        run.print(
            f"warning: NoiseScheduler: the last time still holds {left:.0%} of the signal, but sampling "
            "begins with pure noise. Use more steps, larger betas, zero_terminal_snr, or rectified_flow"
        )
    if not resumed:
        return process
    trained = NoiseProcess.of_checkpoint(resumed, section, size)
    if trained.shift != process.shift:
        run.print(f"the times keep the shift of {trained.shift:g} that this training began with")
    return trained


def autoencoder_path(args: argparse.Namespace, environment: dict, needed: bool = True) -> Path:
    """The file of stage 1's weights: `--autoencoder`, or the one in `model_dir`.

    Raises:
        UserError: it is missing, and named or `needed`.
    """
    find_files(autoencoder=[args.autoencoder])
    path = args.autoencoder or environment["model_dir"] / "autoencoder.pt"
    if needed:
        require_checkpoint(path, "autoencoder")
    return path


def describe_network(stage: str, network: nn.Module, frozen: Sequence[str], about: str, run: Run) -> None:
    """Print the size of the network that is trained, and on what it is trained."""
    if frozen:
        run.print(f"{stage}: {len(frozen)} parameters that no loss reaches are frozen, such as {frozen[0]}")
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    device = f"{run.device} x {run.world_size}, {run.amp_dtype or torch.float32}"
    run.print(f"{stage}: {millions:.1f} M parameters, {about}, {device}")


def meant_for_gpu(args: argparse.Namespace) -> bool:
    """Whether a dry run is for a GPU, which is the default, or for this CPU."""
    return ranks.check_device_name(args.device or "cuda") != "cpu"


def planned_sizes(config: dict, args: argparse.Namespace) -> tuple[list[int], list[int], list[int]]:
    """As `prepare.patch_sizes`, for a dry run: the data are read only where the config leaves a size open."""
    cases, stages = [], ("autoencoder_train", "diffusion_train")
    stated = isinstance(config["data"]["sizes"], list) or all(config[stage]["patch_size"] for stage in stages)
    if not stated:
        environment, run = load_environment(args.environment_file), Run(0, 1, torch.device("cpu"))
        skip = getattr(args, "skip_bad", False)
        train, val, spacing = prepare_data(config, environment, run, skip, for_training=False)
        config, cases = configs.with_spacing(config, spacing), [*train, *val]
    return patch_sizes(config, cases)


def dry_run(rehearse: Callable, config: dict, stage: str, args: argparse.Namespace) -> None:
    """Print the estimated peak memory of a training script, by part, and what would lower it.

    Args:
        rehearse: as of `memory.Forecast`.
        stage: the config's section.

    Raises:
        UserError: the command line asks for a training as well.
        ForecastError: the peaks cannot be estimated.
    """
    if others := [f"--{name}" for name in ("fresh", "resume", "profile") if getattr(args, name)]:
        raise UserError(f"--dry-run: nothing is trained; leave out {', '.join(others)}.")
    world_size = args.gpus or int(os.environ.get("WORLD_SIZE", 1))
    sizes = planned_sizes(config, args)
    print(memory.training_report(rehearse, config, stage, sizes, meant_for_gpu(args), world_size))
