"""What the scripts share: arguments, configuration, distributed set-up, loaders, model wrapping, the training
log."""

import argparse
import contextlib
import copy
import difflib
import functools
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ldm import UserError, brief, configs, counted
from ldm.data import splits
from ldm.data.cases import Case, choose_spacing, warn_of_padding
from ldm.data.datasets import EpochSampler, VolumeDataset
from ldm.data.download import fetch_task01
from ldm.data.layouts import find_cases
from ldm.losses import missing_package
from ldm.lowmem.slabwise import Budget
from ldm.models.autoencoder import LatentEncoder
from ldm.models.layers import add_checkpointing, on_device
from ldm.models.weights import load_weights
from ldm.system import messages, ranks
from ldm.system.checkpoints import SCALE_FACTOR, load_checkpoint, require_checkpoint, weights_hash
from ldm.system.files import NO_SPACE, parse_json, read_json
from ldm.system.messages import CLEAN_UP, SAID
from ldm.system.ranks import Run
from ldm.system.schemas import StrictValidator
from ldm.system.signals import leave_signals_to_the_main_process
from ldm.system.versions import versions
from ldm.training import memory
from ldm.training.logs import TextLog, read_log, write_log
from ldm.training.run_folder import StageFiles, load_training_checkpoint

ROOT = Path(__file__).resolve().parent
SPLIT = "split.json"
LATENTS = "latents"  # the folder in `cache_dir` that cache_latents.py writes


# What gloo and NCCL raise as RuntimeError in the processes that wait for one that has gone.
LOST = re.compile("connection (was )?(closed|reset|refused)|remote process exited|timed out", re.IGNORECASE)


# ---------------------------------------------------------------- command line


def command(main: Callable) -> Callable:
    """Let a script's `main(argv=None)` end on a UserError with its message and exit code 2, as argparse does;
    on a failure of the disk, the network, the memory or the numbers, or of another process, with its message
    and exit code 1; on Ctrl-C with 130, as a shell does. What else is raised keeps its traceback."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None):
        message, code = None, None
        try:
            result = main(argv)
        except (UserError, FloatingPointError, memory.ForecastError) as error:
            message, code = messages.words_of(error), 2 if isinstance(error, UserError) else 1
        except OSError as error:
            message, code = messages.disk_failure(error), 1
        except (RuntimeError, MemoryError) as error:
            code, message = 1, messages.memory_failure(error)
            if message is None and dist.is_initialized() and LOST.search(str(error)):
                message = f"another process of this run ended or hangs ({brief(error)}); it says why."
            if message is None:
                raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            if message or sys.exception():  # what else is raised, with its traceback
                SAID.error(f"error: {message or 'not foreseen'}", exc_info=sys.exception())
            CLEAN_UP.close()
        if message and int(os.environ.get("LOCAL_RANK", 0)):
            # Where all ranks fail alike, torchrun ends this one before it says so again. Until then it stays
            # in its group: the others would be told of a lost connection before they hear the reason.
            time.sleep(10)
        if message:
            print(f"error: {message}", file=sys.stderr)
        if dist.is_initialized():
            if not code:
                dist.destroy_process_group()  # on a failure the others may not come to it
            if main.__module__ == "__main__":
                # Gloo's threads outlive a group that DDP has used. One that lets go of a tensor while the
                # interpreter shuts down aborts the process (CPython before 3.14): there is no shutting down.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code or 0)
        if code is not None:
            raise SystemExit(code)
        return result

    return wrapper


def script_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments that all training and inference scripts take."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for letter, name, file, what in (
        ("-c", "--config-file", "config/config_train_32g.json", "what to train"),
        ("-e", "--environment-file", "config/environment.json", "where things are"),
    ):
        add(letter, name, default=str(ROOT / file), help=f"{what}: JSON; default: {file}")
    add("-g", "--gpus", type=int, default=None, help="processes on this machine; checked against torchrun's")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key, such as diffusion_train.lr=1e-4",
    )
    add("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mixed precision; default: as the config says",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile; default: as the config says",
    )
    return parser


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The argument of the scripts whose memory can be predicted."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only tell the peak memory by part, for a GPU (or --device cpu), and what would lower it",
    )


def training_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments of both training scripts."""
    parser = script_parser(manual)
    add_dry_run(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--fresh", action="store_true", help="start over; what is there is moved to model_dir/old-N"
    )
    start.add_argument("--resume", type=Path, default=None, metavar="FILE", help="go on from this checkpoint")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="read all data first; where there is no split.json yet, leave bad cases out and list them in "
        "model_dir/skipped.json",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of a few steps to model_dir and end"
    )
    return parser


def add_max_memory(parser: argparse.ArgumentParser, what: str) -> None:
    """The argument that sets a limit to the memory of `what`, "encode" or "decode"."""

    def gigabytes(text: str) -> float:
        if not 0 < (value := float(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected a number of GB above 0.")
        return value

    parser.add_argument(
        "--max-memory", type=gigabytes, default=None, metavar="GB", help=f"{what} within so much memory"
    )


def check_scale_factor(value: float | None) -> None:
    """Raise UserError unless `--scale-factor` is left out or a number that a scale factor can be."""
    if value is not None and not StrictValidator(SCALE_FACTOR).is_valid(value):
        least, most = SCALE_FACTOR["minimum"], SCALE_FACTOR["maximum"]
        raise UserError(f"--scale-factor {value}: expected a number from {least} to {most}.")


def prepare_folder(path: str | Path) -> Path:
    """The absolute path of an `--out` folder that does not exist yet; an empty one makes way for it.

    Raises:
        UserError: something else is there, or the place cannot be written to.
    """
    out = Path(path).resolve()
    try:
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: {error}; name a folder that can be made.") from error
    if out.exists():
        raise UserError(f"--out {path} already holds something; name a new folder, or delete that one first.")
    return out


# ---------------------------------------------------------------- configuration


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Read a training config: `--set` over the file over the schema's defaults; checked, references resolved.

    Raises:
        UserError: an unknown or mistyped key, a wrong value, an expression; the key is named.
    """
    config = read_json(path, "config")
    for override in overrides:
        _apply_override(config, override)
    return configs.check_config(config, f"{path} with --set" if overrides else path)


def _apply_override(config: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: should be key=value, such as autoencoder_train.lr=8e-5.")
    try:
        value = parse_json(text)
    except ValueError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise UserError(f"--set {override}: {section} is no section.")
    config[last] = value


PATH = {  # that every system takes; an empty one would be the working directory
    "description": "a path of names of up to 255 printable characters",
    "type": "string",
    "minLength": 1,
    "maxLength": 1000,
    "not": {"pattern": r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|[^/\\]{256}"},
}
PATH_OR_NONE = {"description": f"{PATH['description']} or null", "anyOf": [PATH, {"type": "null"}]}
SOURCES = {"type": "array", "items": PATH, "minItems": 1}
FOLDERS = ("model_dir", "tfevent_path", "output_dir", "cache_dir")  # that results go to
ENVIRONMENT = {  # those with a default may be left out
    "data_base_dir": {"description": "a folder or a list of folders", "anyOf": [PATH, SOURCES]},
    "model_dir": PATH,
    "tfevent_path": PATH,
    "output_dir": PATH,
    "resume_ckpt": {"description": "true or false", "type": "boolean", "default": None},
    "download_brats": {"description": "true or false", "type": "boolean", "default": False},
    "perceptual_weights": {**PATH_OR_NONE, "default": None},
    "cache_dir": {**PATH_OR_NONE, "default": None},
}


def load_environment(path: str | Path) -> dict:
    """Read an environment file: where data are and results go.

    Relative paths count from the working directory; `~` is the home folder. `data_base_dir` may be a list of
    folders. Optional keys: `resume_ckpt`, `download_brats`, `perceptual_weights`, `cache_dir` (default
    `model_dir`/cache).

    Raises:
        UserError: an unknown or missing key, a value that `ENVIRONMENT` does not allow, or a file where a
            folder is expected; the key is named.
    """
    environment = read_json(path, "environment file")
    for key, value in environment.items():
        if key not in ENVIRONMENT:
            near = difflib.get_close_matches(key, ENVIRONMENT, 1)
            raise UserError(f"{path}: unknown key {brief(key)}.{f' Did you mean {near[0]}?' if near else ''}")
        if not StrictValidator(ENVIRONMENT[key]).is_valid(value):
            what = f"expected {ENVIRONMENT[key]['description']}, found {brief(repr(value))}"
            raise UserError(f"{path}: {key}: {what}.")
    for key, about in ENVIRONMENT.items():
        if "default" not in about and key not in environment:
            raise UserError(f"{path}: {key} is missing. config/environment.json.example shows the keys.")
    environment = {key: about.get("default") for key, about in ENVIRONMENT.items()} | environment
    for key in ("model_dir", "tfevent_path", "output_dir"):
        environment[key] = Path(environment[key]).expanduser()
    base = environment["data_base_dir"]
    folders = [Path(one).expanduser() for one in (base if isinstance(base, list) else [base])]
    environment["data_base_dir"] = folders if isinstance(base, list) else folders[0]
    if environment["perceptual_weights"]:
        environment["perceptual_weights"] = os.path.expanduser(environment["perceptual_weights"])
    cache = environment["cache_dir"]
    environment["cache_dir"] = Path(cache).expanduser() if cache else environment["model_dir"] / "cache"
    for key in FOLDERS:
        if not (there := _nearest(environment[key])).is_dir():
            raise UserError(f"{path}: {key} {environment[key]}: {there} is not a folder.")
    return environment


def _nearest(folder: Path) -> Path:
    """What is there of a path: itself, or the nearest of its parents."""
    return next(one for one in [folder, *folder.absolute().parents] if os.path.lexists(one))


def check_writable(environment: dict, *keys: str) -> None:
    """See that files can be written to these folders, or to where they will be made, before hours of work.

    Raises:
        UserError: they cannot; the key is named.
        OSError: the disk is full.
    """
    for key in keys:
        try:
            with tempfile.TemporaryFile(dir=_nearest(environment[key])):
                pass
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            raise UserError(
                f"{key} {environment[key]}: cannot be written ({error.strerror}). Name a folder that you own "
                "in the environment file."
            ) from None


# ---------------------------------------------------------------- processes and devices


def start(args: argparse.Namespace, section: dict | None = None) -> Run:
    """Join the other processes (found by torchrun's variables) and choose device and precision.

    Args:
        section: of the config that is trained, whose `amp` says whether in mixed precision. Without one, for
            volumes, latents and figures that are kept, all is computed in float32 (but for `--amp`) and comes
            out the same each time: on a GPU without TF32, and by cuDNN's deterministic algorithms.

    Raises:
        UserError: `-g` and the number of processes disagree, or there is no GPU for this process.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if args.gpus is not None and args.gpus != local_world:
        line = f"torchrun --standalone --nproc_per_node={args.gpus} {' '.join(sys.argv)}"
        under = (
            f"torchrun started {local_world} processes here"
            if "WORLD_SIZE" in os.environ
            else "this is one process"
        )
        raise UserError(f"-g {args.gpus}, but {under}. Start it as:\n  {line}")
    kind = _device_name(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device = _gpu(kind, local_rank) if kind != "cpu" else torch.device("cpu")
    training = section is not None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        ranks.choose_kernels(tf32=training, repeatable=not training)
    patient = None
    if world_size > 1:
        # With gloo beside NCCL, so that the group of the patient finds all connections made.
        on_gpus = device.type == "cuda" and dist.is_nccl_available()
        backends = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        try:
            dist.init_process_group(backends, timeout=timedelta(minutes=30))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise OSError(f"the processes do not find each other at {where} ({brief(error)}).") from None
        # A download, a check of all voxels or a slow disk may take longer than a step ever should.
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    amp = args.amp if args.amp is not None else training and section.get("amp", True)
    return Run(rank, world_size, device, ranks.amp_dtype(device) if amp else None, patient)


def _device_name(kind: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", kind):
        raise UserError(f"--device {kind}: expected cpu, cuda or cuda:N.")
    return kind


def _gpu(kind: str, local_rank: int) -> torch.device:
    """The GPU of this process: the one that is named, or under torchrun each its own."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {kind}: torch {torch.__version__} finds no CUDA GPU here{chosen}. Use --device cpu."
        )
    number, count = kind.partition(":")[2], torch.cuda.device_count()
    there = f"{counted(count, 'GPU{s}')} here{chosen}"
    if number and processes_here > 1:
        raise UserError(
            f"--device {kind}: torchrun started {processes_here} processes here, and each needs a GPU of its "
            "own.\nUse --device cuda; the variable CUDA_VISIBLE_DEVICES chooses the GPUs."
        )
    if not number and processes_here > count:
        raise UserError(
            f"{processes_here} processes for {there}: each process needs a GPU of its own.\n"
            f"Use torchrun --nproc_per_node={count}, or --device cpu."
        )
    if (index := int(number or local_rank)) >= count:
        raise UserError(f"--device {kind}: found {there}, numbered from 0.")
    return torch.device("cuda", index)


# ---------------------------------------------------------------- data


def own_folders(environment: dict) -> list[Path]:
    """Where the scripts write: what lies there is no data."""
    return [environment[key] for key in FOLDERS]


def data_folders(environment: dict) -> list[Path]:
    """The folder of the data, or several."""
    base = environment["data_base_dir"]
    return base if isinstance(base, list) else [base]


def find_data(
    config: dict, environment: dict, say: Callable[[str], None] | None = None
) -> tuple[list[Case], list[Case]]:
    """The cases that `data_base_dir` and the config's section `data` name, as `find_cases` gives them,
    without what this run or inference.py wrote."""
    data = config["data"]
    return find_cases(
        environment["data_base_dir"],
        data["pattern"],
        contrasts=data["contrasts"],
        subject=data["subject"],
        outputs=own_folders(environment),
        generated=False,
        say=say,
    )


def prepare_data(
    config: dict,
    environment: dict,
    run: Run,
    skip_bad: bool = False,
    write: bool = True,
    resumed: dict | None = None,
    autoencoder: Path | None = None,
    known: dict | None = None,
) -> tuple[list[Case], list[Case]]:
    """Find the cases and split them: as `model_dir/split.json` says; where it is not there, the split is made
    and written there.

    With a `split.json`, its cases are the run's: others are left out and named. Those of its cases that are
    gone or bad end a training; else they are left out and named too. Fixes `config["spacing"]` where the
    config leaves it open.

    Args:
        skip_bad: read every voxel first. Where the split is made, leave out the cases that something is wrong
            with; they are listed in `model_dir/skipped.json`. Else only the headers are read, and one that is
            bad ends it.
        write: it is for a training; else nothing is written or downloaded.
        resumed: the checkpoint that is resumed.
        autoencoder: the file of stage 1's weights. Where there is no split yet, what it was not trained on
            is held out.
        known: the `subjects` in that file, where it was read already.

    Raises:
        UserError: no data, something is wrong with them, or a held-out case is trained on.
    """
    base = environment["data_base_dir"]
    if environment["download_brats"] and write:
        if isinstance(base, list):
            raise UserError("download_brats: data_base_dir should be one folder, not a list.")
        run.from_main(lambda: fetch_task01(base) and None)
    found = find_data(config, environment, run.say)

    def divide() -> splits.Sides:
        path, where = environment["model_dir"] / SPLIT, ", ".join(map(str, data_folders(environment)))
        subjects = known
        if subjects is None and autoencoder and autoencoder.is_file():
            subjects = load_checkpoint(autoencoder).get("subjects")
        sides = splits.as_kept(path, *found, where, run.say, write) if path.is_file() else found
        stages = (config["autoencoder_train"], config["diffusion_train"])
        bad = splits.bad_cases(
            [*sides[0], *sides[1]],
            path,
            configs.channels_of(config),
            configs.intensity_of(config),
            labels=any(section["augment"]["foreground_prob"] for section in stages),  # else they are not read
            skip=skip_bad,
            strict=write,
            say=run.say,
        )
        return splits.divided(
            *splits.without(bad, *sides, where),
            path,
            where,
            val_fraction=config["data"]["val_fraction"],
            seed=config["seed"],
            strict=write,
            say=run.say,
            resumed=resumed,
            autoencoder=autoencoder,
            known=subjects,
        )

    train, val = run.from_main(divide)
    if splits.is_single_subject(train, val):
        run.say(
            f"warning: a single subject ({train[0].subject}): it is trained on and is its own validation."
        )
    configs.settle_spacing(config, lambda: choose_spacing(train, config["longest_side"]), resumed)
    run.say(f"data: {len(train)} training and {len(val)} validation cases, spacing {config['spacing']} mm")
    return train, val


def volumes_to_encode(
    config: dict,
    environment: dict,
    run: Run,
    skip_bad: bool,
    autoencoder: Path,
    resumed: dict | None = None,
) -> tuple[VolumeDataset, VolumeDataset]:
    """The training and the held-out volumes of stage 2, as images; arguments as of `prepare_data`."""
    train_cases, val_cases = prepare_data(
        config, environment, run, skip_bad, resumed=resumed, autoencoder=autoencoder
    )
    _, size, _ = configs.patch_sizes(config, [*train_cases, *val_cases])
    preprocessing, augment = configs.preprocessing_of(config), config["diffusion_train"]["augment"]
    cache_rate, seed = config["data"]["cache_rate"], config["seed"]
    common = {"cache_dir": environment["cache_dir"], "cache_rate": cache_rate, "seed": seed}
    warn_of_padding(train_cases, config["spacing"], size, run.say)
    return (
        VolumeDataset(train_cases, preprocessing, size, False, augment, **common),
        VolumeDataset(val_cases, preprocessing, size, **common),
    )


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


# ---------------------------------------------------------------- networks


def find_files(**named: Sequence[str | Path | None]) -> None:
    """See that the files that options name are there, before hours of work; None stands for none.

    Raises:
        UserError: one is not; the option is named.
    """
    for option, paths in named.items():
        for path in filter(None, paths):
            if not Path(path).is_file():
                raise UserError(f"--{option.replace('_', '-')} {path}: no such file. Check the path.")


def autoencoder_path(args: argparse.Namespace, environment: dict, needed: bool = True) -> Path:
    """The file of stage 1's weights: `--autoencoder`, or the one in `model_dir`.

    Raises:
        UserError: it is named, or `needed`, and not there.
    """
    find_files(autoencoder=[args.autoencoder])
    path = args.autoencoder or environment["model_dir"] / "autoencoder.pt"
    if needed:
        require_checkpoint(path, "autoencoder")
    return path


def load_autoencoder(
    path: Path, config: dict, run: Run, max_memory: float | None = None, checkpoint: dict | None = None
) -> LatentEncoder:
    """The frozen autoencoder of stage 1, checked against the config in what both stages share.

    Args:
        max_memory: GB to encode and decode in; None: no limit.
        checkpoint: the content of the file, where it was read already.
    """
    checkpoint = checkpoint or load_checkpoint(path, "autoencoder")
    configs.check_fixed(checkpoint.get("config", config), config, configs.FIXED["autoencoder"], path)
    autoencoder = configs.define_network(config, "autoencoder_def")
    load_weights(autoencoder, checkpoint["model"], str(path))
    budget = Budget(max_memory * memory.GB) if max_memory else None
    return LatentEncoder(on_device(autoencoder, run.device).eval().requires_grad_(False), budget=budget)


def wrap_network(network: nn.Module, section: dict, run: Run, compiled: bool) -> nn.Module:
    """Compile -> DDP, after `prepare_network`. The parameters stay those of `network`."""
    if compiled:
        network = torch.compile(network)
    if run.world_size > 1:
        # With accumulation, the first backward runs under no_sync, which a static graph does not allow.
        network = DistributedDataParallel(
            network,
            device_ids=[run.device.index] if run.device.type == "cuda" else None,
            static_graph=section["accumulate_steps"] == 1,
            gradient_as_bucket_view=True,
        )
    return network


def prepare_network(network: nn.Module, section: dict, run: Run) -> nn.Module:
    """Move to the device; checkpointing and synchronised batch norm, which change the network in place."""
    if section["gradient_checkpointing"]:
        add_checkpointing(network)
    if run.world_size > 1 and run.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return on_device(network, run.device)


# ---------------------------------------------------------------- memory, predicted


def planned(config: dict, stage: str, args: argparse.Namespace) -> dict:
    """The config with what the command line says of mixed precision."""
    config = copy.deepcopy(config)
    if args.amp is not None:
        config[stage]["amp"] = args.amp
    return config


def planned_sizes(config: dict, args: argparse.Namespace) -> tuple[list[int], list[int], list[int]]:
    """As `configs.patch_sizes`, for a dry run: by the config, or by the data where one is open."""
    cases = []
    if not all(config[stage]["patch_size"] for stage in ("autoencoder_train", "diffusion_train")):
        environment, run = load_environment(args.environment_file), Run(0, 1, torch.device("cpu"))
        skip = getattr(args, "skip_bad", False)
        cases = itertools.chain(*prepare_data(config, environment, run, skip, write=False))
    return configs.patch_sizes(config, list(cases))


def meant_for_gpu(args: argparse.Namespace) -> bool:
    """Whether a dry run tells the memory of a GPU, as it does by default, or of this CPU."""
    return _device_name(args.device or "cuda") != "cpu"


def tell_memory(rehearse: Callable, config: dict, stage: str, args: argparse.Namespace) -> None:
    """The dry run of a training script: print the peaks by part, and what would lower them. Nothing is
    written.

    Raises:
        UserError: the command line also says where to start, or asks for a trace.
        ForecastError: the peaks cannot be predicted.
    """
    if others := [f"--{name}" for name in ("fresh", "resume", "profile") if getattr(args, name)]:
        raise UserError(f"--dry-run: nothing is trained; leave out {', '.join(others)}.")
    config = planned(config, stage, args)
    section, gpu = config[stage], meant_for_gpu(args)
    if section.get("perceptual_weight") and (missing := missing_package(section["perceptual_network"])):
        print(f"not counted: the perceptual network. {missing}")
        section["perceptual_weight"] = 0.0
    sizes, ranks = planned_sizes(config, args), args.gpus or int(os.environ.get("WORLD_SIZE", 1))
    forecast = memory.Forecast(rehearse, stage, sizes, gpu, memory.half_precision(gpu), ranks)
    peaks = forecast.peaks(config)
    lower = forecast.savings(config, peaks)
    half = forecast.half if section["amp"] else None
    print(memory.report(peaks, lower, gpu, half, section["batch_size"], sizes[stage == "diffusion_train"]))


def refuse_what_cannot_fit(
    rehearse: Callable, config: dict, stage: str, sizes: Sequence, args: argparse.Namespace, run: Run
) -> None:
    """On GPUs: warn where the predicted peak is more than is free on any, or cannot be predicted.

    Memory that is in use may be free before the peak, and the libraries' workspace is an allowance: neither
    refuses a training.

    Args:
        sizes: as `configs.patch_sizes` gives them.

    Raises:
        UserError: the tensors alone are more than a whole GPU. Not on Windows, whose driver may put them into
            main memory, nor where the networks are compiled, which may keep fewer.
    """
    compiled = config[stage]["compile"] if args.compile is None else args.compile
    memories = run.gather(memory.gpu_memory(run.device))
    if None in memories:
        return
    free, everything = (min(values) for values in zip(*memories, strict=True))

    def check() -> None:
        wanted = planned(config, stage, args)
        half = ranks.amp_dtype(run.device)
        forecast = memory.Forecast(rehearse, stage, sizes, True, half, run.world_size)
        try:
            peaks = forecast.peaks(wanted)
        except (memory.ForecastError, UserError) as error:
            # Also a UserError: without values a check may fail that passes with them. Else it comes again.
            run.say(f"warning: no memory forecast: {brief(error)}. The training continues without it.")
            return
        peak = memory.highest(peaks)
        if peak.total <= free:
            return
        lower = memory.listed(forecast.savings(wanted, peaks)) or "smaller networks"
        needs = f"{stage}: expected peak {peak.total / memory.GB:.1f} GB"
        if peak.tensors > everything and not compiled and os.name != "nt":
            raise UserError(
                f"{needs}, but the GPU has {everything / memory.GB:.1f} GB in all.\nTo lower it: {lower}"
            )
        run.say(
            f"warning: {needs}. Of the GPU's {everything / memory.GB:.1f} GB {free / memory.GB:.1f} are free "
            f"now.\nTo lower it: {lower}"
        )

    run.from_main(check)


# ---------------------------------------------------------------- where a training starts and stops


def claim(model_dir: Path, run: Run) -> None:
    """Keep every other run from writing to a model folder until this script ends, however it ends.

    Raises:
        UserError: another run has it.
        OSError: the folder cannot be made or written to.
    """

    def lock():
        model_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(model_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{model_dir}: another run is writing there. Wait for its end, or choose another model_dir."
            ) from None
        CLEAN_UP.callback(lock.release)
        for part in model_dir.glob(".*.part"):  # of a save that was killed
            part.unlink()

    run.from_main(lock)


def starting_point(
    args: argparse.Namespace, config: dict, environment: dict, stage: str, files: StageFiles, run: Run
):
    """The checkpoint to go on from, on every rank, or None to start: `--resume FILE`, `--fresh`, else the
    newest that is good, unless `resume_ckpt` is false.

    What a start leaves behind is moved to `model_dir/old-N`. From here on `model_dir/log.txt` is kept. Keys
    of the config that differ from the checkpoint's are said.

    Raises:
        UserError: the checkpoint that was named is missing or damaged, or none that is there is good; it was
            trained with other networks or volumes than the config asks for; or there are no data to start
            over on.
    """
    found, model_dir = {}, environment["model_dir"]

    def check() -> None:
        """Before anything is moved. A spacing that the data decide is checked when they are found."""
        keys = [key for key in configs.FIXED[stage] if key != "spacing" or config["spacing"]]
        configs.check_fixed(
            found["content"]["config"], config, keys, found["content"]["path"], configs.RESUMING
        )

    log = TextLog(model_dir / "log.txt") if run.is_main else None

    def choose() -> Path | None:
        if args.resume:
            found["content"] = load_training_checkpoint(args.resume, files.name)
            check()
            if files.present() and args.resume.resolve() != files.last.resolve():
                run.say(f"what is in {files.last.parent} is copied to {set_aside(environment, stage, True)}")
            return args.resume
        if not files.present():
            if environment["resume_ckpt"]:
                run.say(f"{files.last.parent}: no checkpoint of this stage to go on from, so it starts.")
            return None
        if args.fresh or environment["resume_ckpt"] is False:
            from_cache = stage == "diffusion" and config["diffusion_train"]["latent_cache"]
            if not from_cache and not environment["download_brats"]:
                find_data(config, environment)  # before anything is moved
            why = "" if args.fresh else " (resume_ckpt is false; remove it to go on instead)"
            run.say(f"starting over{why}: what was there is now in {set_aside(environment, stage)}")
            return None
        path, found["content"] = files.newest(run.say)
        check()
        return path

    path = run.from_main(choose)
    if log:
        begun = f"goes on from {path}" if path else "starts"
        facts = {
            f"==== {stage}": begun,
            "command": shlex.join(["python", *sys.argv]),
            "config": model_dir / f"config_{stage}.json",
            "device": f"{run.device.type} x {run.world_size}, {run.amp_dtype or torch.float32}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items() if version),
        }
        log.begin(facts)
    if path is None:
        return None
    content = found["content"] if run.is_main else load_training_checkpoint(path, files.name)
    if changes := configs.changes(content["config"], config):
        run.say(f"differs from the checkpoint's config: {changes}")
    return content


def keep_pair(environment: dict, best: Path, run: Run) -> None:
    """Before stage 1's best weights are replaced, copy them to `old-N` if a diffusion model was trained on
    them: it is of no use without them."""
    unet = environment["model_dir"] / "diffusion_unet.pt"

    def copy():
        if not (unet.is_file() and best.is_file()):
            return
        if load_checkpoint(unet).get("autoencoder") == weights_hash(load_checkpoint(best)["model"]):
            old = set_aside(environment, "autoencoder", copy=True)
            run.say(f"{unet} was trained on {best}, which is now replaced: a copy of both is in {old}")

    run.from_main(copy)


STAGE_FILES = {
    # A diffusion model goes with its autoencoder.
    "autoencoder": ("*.pt", "*.json", "samples", "*.gif", "losses.png", "log.txt"),
    "diffusion": ("diffusion_unet*.pt", "config_diffusion.json", "samples", "samples.gif", "losses.png"),
}


def set_aside(environment: dict, stage: str, copy: bool = False) -> Path:
    """Move what a stage left in `model_dir`, its pictures and its TensorBoard files to a new `old-N`; or copy
    them there, to be gone on with."""
    model_dir, output_dir = environment["model_dir"], environment["output_dir"]
    old = next(p for n in itertools.count(1) if not (p := model_dir / f"old-{n}").exists())
    old.mkdir()
    log, text, stages = model_dir / "train_log.jsonl", model_dir / "log.txt", [stage]
    if stage == "autoencoder":
        stages.append("diffusion")
    pictures = [output_dir / "reconstructions.png"] if stage == "autoencoder" else []
    for path in [p for pattern in STAGE_FILES[stage] for p in model_dir.glob(pattern)] + pictures:
        if path.is_dir() and copy:
            shutil.copytree(path, old / path.name)
        elif path.exists():
            (shutil.copy2 if copy else shutil.move)(path, old / path.name)
    if text.is_file():  # of both stages: it goes on
        shutil.copy2(text, old / text.name)
    if log.is_file():
        shutil.copy2(log, old / log.name)
        if not copy:
            write_log(log, [entry for entry in read_log(log) if entry["stage"] not in stages])
    for one in [] if copy else stages:
        events = environment["tfevent_path"] / one
        if events.is_dir():
            shutil.move(events, old / f"tensorboard_{one}")
    return old


@contextlib.contextmanager
def profiled(enabled: bool, folder: Path, run: Run) -> Iterator[Callable[[], bool]]:
    """Profile a few steps; the trace goes to `folder/trace_rankN.json`. Yields what to call after each step,
    which says whether the trace is complete."""
    if not enabled:
        yield lambda: False
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace_rank{run.rank}.json"
    wait, warmup, active = 1, 2, 3
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
        profile_memory=True,
    ) as profile:

        def after_step() -> bool:
            profile.step()
            return profile.step_num >= wait + warmup + active

        yield after_step
    if profile.step_num < wait + warmup + active:
        raise UserError(
            f"--profile: only {profile.step_num} steps were left, expected {wait + warmup + active}. Raise "
            "max_epochs."
        )
    run.say(f"profile: {path} (open in chrome://tracing or ui.perfetto.dev)")
