"""What the scripts share: arguments, configuration, distributed set-up, loaders, model wrapping, the training
log."""

import argparse
import contextlib
import copy
import difflib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from jsonschema import Draft202012Validator, validators
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm import UserError
from ldm.checkpoints import StageFiles, load_training_checkpoint, save_checkpoint, written_whole
from ldm.checks import check_cases, check_headers
from ldm.datasets import (
    Case,
    EpochSampler,
    choose_spacing,
    find_cases,
    read_json,
    split_cases,
    stream,
    volume_size,
)
from ldm.download import fetch_task01
from ldm.logs import TrainLog, read_log, write_log
from ldm.networks import (
    NETWORKS,
    SCHEDULERS,
    add_checkpointing,
    check_definition,
    check_divisible,
    downsampling,
    instantiate,
    resolve_references,
)
from ldm.training import Clock, Means, Stepper, Watch, learning_rate
from ldm.transforms import Preprocessing

ROOT = Path(__file__).resolve().parent


CLEAN_UP = contextlib.ExitStack()  # closed when a script ends: process group, locks, signal handlers


# ---------------------------------------------------------------- command line


def command(main: Callable) -> Callable:
    """Let a script's `main(argv=None)` end on a UserError with its message and exit code 2, as argparse does;
    on a failure of the disk, the network or the numbers with exit code 1; on Ctrl-C with 130, as a shell
    does."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None):
        try:
            return main(argv)
        except (UserError, OSError, FloatingPointError) as error:
            CLEAN_UP.close()
            if int(os.environ.get("LOCAL_RANK", 0)):
                time.sleep(10)  # where all ranks fail alike, torchrun ends this one before it says so again
            text = str(error)
            if text.startswith("Caught "):  # in a loader process: torch puts the whole traceback before it
                text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
            print(f"error: {text}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            CLEAN_UP.close()

    return wrapper


def script_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments that all training and inference scripts take."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-c", "--config-file", default=str(ROOT / "config/config_train_32g.json"), help="what to train: JSON")
    add(
        "-e",
        "--environment-file",
        default=str(ROOT / "config/environment.json"),
        help="where things are: JSON",
    )
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


def training_parser(manual: str) -> argparse.ArgumentParser:
    """The arguments of both training scripts."""
    parser = script_parser(manual)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--fresh", action="store_true", help="start over; what is there is moved to model_dir/old-N"
    )
    start.add_argument("--resume", type=Path, default=None, metavar="FILE", help="go on from this checkpoint")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="read all data first, leave bad cases out and list them in model_dir/skipped.json",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of a few steps to model_dir and end"
    )
    return parser


# ---------------------------------------------------------------- configuration


def _is_integer(_, value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(_, value) -> bool:
    return _is_integer(_, value) or isinstance(value, float) and math.isfinite(value)


# JSON Schema takes 2.0 for an integer, which range() does not; Python's json reads NaN, which is no number.
STRICT_TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})
ConfigValidator = validators.extend(Draft202012Validator, type_checker=STRICT_TYPES)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Read a training config: `--set` over the file over the schema's defaults; checked, references resolved.

    Raises:
        UserError: an unknown or mistyped key, a wrong value, an expression; the key is named.
    """
    config = read_json(path, "config")
    for override in overrides:
        _apply_override(config, override)
    schema = json.loads((ROOT / "config/schema.json").read_text(encoding="utf-8"))
    config = resolve_references(config, config, "config")
    error = min(ConfigValidator(schema).iter_errors(config), key=lambda e: len(e.absolute_path), default=None)
    if error is not None:
        raise UserError(f"{path}: {_explain(error)}")
    for section in ("autoencoder_train", "diffusion_train"):
        if "n_epochs" in config.get(section, {}):
            config[section].setdefault("max_epochs", config[section].pop("n_epochs"))
    _fill_defaults(config, schema, schema)
    definitions = {"autoencoder_def": NETWORKS, "diffusion_def": NETWORKS, "NoiseScheduler": SCHEDULERS}
    for key, packages in definitions.items():
        if "_target_" in config.get(key, {}):
            check_definition(config[key], packages, key)
    if len(channels_of(config)) != config["image_channels"]:
        raise UserError(
            f"{path}: channel names {len(channels_of(config))} channel(s), "
            f"image_channels is {config['image_channels']}."
        )
    if config["spacing"] and config["longest_side"]:
        raise UserError(f"{path}: give spacing or longest_side, not both.")
    if config["intensity"]["lower_percentile"] >= config["intensity"]["upper_percentile"]:
        raise UserError(f"{path}: intensity.lower_percentile must lie below upper_percentile.")
    return config


def _apply_override(config: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: should be key=value, such as autoencoder_train.lr=8e-5.")
    try:
        value = json.loads(text)
    except ValueError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            raise UserError(f"--set {override}: {section} is no section.")
    config[last] = value


def _explain(error) -> str:
    where = ".".join(str(part) for part in error.absolute_path)
    if error.validator in ("additionalProperties", "unevaluatedProperties"):
        known = error.schema["properties"]
        key = next(key for key in error.instance if key not in known)
        near = difflib.get_close_matches(key, known, 1)
        hint = f" Did you mean {near[0]}?" if near else " docs/config.md lists the keys."
        return f"unknown key {'.'.join(filter(None, [where, key]))}.{hint}"
    if error.validator == "required":
        return f"{where or 'config'}: {error.message}."
    allowed = error.schema.get("description", "").split(". ")[0]
    return f"{where}: {error.message}. ({allowed})"


def _fill_defaults(section: dict, schema: dict, root: dict) -> None:
    for key, about in schema.get("properties", {}).items():
        if "$ref" in about:
            about = root["$defs"][about["$ref"].rpartition("/")[2]]
        if key not in section and "default" in about and not (key != "_target_" and "_target_" in section):
            section[key] = copy.deepcopy(about["default"])
        if isinstance(section.get(key), dict):
            _fill_defaults(section[key], about, root)


PATHS = {"data_base_dir": None, "model_dir": None, "tfevent_path": None, "output_dir": None}
OPTIONAL = {"resume_ckpt": None, "download_brats": False, "perceptual_weights": None, "cache_dir": None}


def load_environment(path: str | Path) -> dict:
    """Read an environment file: where data are and results go.

    Relative paths count from the working directory. `data_base_dir` may be a list of folders. Optional keys:
    `resume_ckpt`, `download_brats`, `perceptual_weights`, `cache_dir` (default `model_dir`/cache).
    """
    environment = read_json(path, "environment file")
    known = PATHS | OPTIONAL
    for key, value in environment.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(f"{path}: unknown key {key}.{f' Did you mean {near[0]}?' if near else ''}")
        kinds = (bool,) if key in ("resume_ckpt", "download_brats") else (str,)
        kinds += (list,) if key == "data_base_dir" else ()
        kinds += (type(None),) if key in ("perceptual_weights", "cache_dir") else ()
        if not isinstance(value, kinds):
            raise UserError(
                f"{path}: {key} is {value!r}; {' or '.join(kind.__name__ for kind in kinds)} is due."
            )
    base = environment.get("data_base_dir")
    if isinstance(base, list) and not (base and all(isinstance(one, str) for one in base)):
        raise UserError(f"{path}: data_base_dir is {base!r}; a folder or a list of folders is due.")
    for key in PATHS:
        if key not in environment:
            raise UserError(f"{path}: {key} is missing. config/environment.json.example shows the keys.")
    environment = OPTIONAL | environment
    for key in ("model_dir", "tfevent_path", "output_dir"):
        environment[key] = Path(environment[key])
    environment["data_base_dir"] = [Path(one) for one in base] if isinstance(base, list) else Path(base)
    environment["cache_dir"] = Path(environment["cache_dir"] or environment["model_dir"] / "cache")
    return environment


# ---------------------------------------------------------------- processes and devices


@dataclass
class Run:
    """This process among the others, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    amp_dtype: torch.dtype | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def autocast(self):
        """Mixed precision, or nothing where it is off."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes, without breaking a progress bar."""
        if self.is_main:
            tqdm.write(text)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks."""
        if self.world_size > 1:
            tensor = tensor.to(self.device) if dist.get_backend() == "nccl" else tensor.cpu()
            dist.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, value) -> list:
        """A plain value of every rank, in the order of ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable):
        """What `make()` gives on the main process, on every rank; an error there is raised on every rank."""
        result = error = None
        if self.is_main:
            try:
                result = make()
            except (UserError, OSError) as caught:
                error = caught
        if self.world_size > 1:
            box = [result, isinstance(error, UserError), str(error) if error else None]
            dist.broadcast_object_list(box)
            if not self.is_main and box[2] is not None:
                error = (UserError if box[1] else OSError)(box[2])
            result = box[0]
        if error:
            raise error
        return result


def start(args: argparse.Namespace, section: dict | None = None) -> Run:
    """Join the other processes (found by torchrun's variables) and choose device and precision.

    Raises:
        UserError: `-g` and the number of processes disagree, or the device is not there.
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
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {kind}: cpu or cuda is due.")
    if kind.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {kind}: torch {torch.__version__} finds no CUDA GPU here. Use --device cpu."
            )
        index = int(kind.partition(":")[2] or local_rank)
        if index >= torch.cuda.device_count():
            raise UserError(f"GPU number {index} is asked for; this machine has {torch.cuda.device_count()}.")
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        device = torch.device("cpu")
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        CLEAN_UP.callback(dist.destroy_process_group)
    amp = args.amp if args.amp is not None else section.get("amp", True) if section else True
    return Run(rank, world_size, device, amp_dtype(device) if amp else None)


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """bf16 where the hardware computes in it, fp16 on other GPUs, None on a CPU without bf16 (it would be
    slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None


# ---------------------------------------------------------------- data


def prepare_data(
    config: dict, environment: dict, run: Run, skip_bad: bool = False
) -> tuple[list[Case], list[Case]]:
    """Find the cases and split them; the split is written to `model_dir/split.json` and read from there
    again.

    Fixes `config["spacing"]` where the config leaves it open.

    Args:
        skip_bad: read every voxel first, and leave out the cases that something is wrong with; they are
            listed in `model_dir/skipped.json`. Else only the headers are read, and one that is bad ends it.

    Raises:
        UserError: no data, or something is wrong with them.
    """
    base, model_dir = environment["data_base_dir"], environment["model_dir"]
    if environment["download_brats"]:
        if isinstance(base, list):
            raise UserError("download_brats: data_base_dir should be one folder, not a list.")
        run.from_main(lambda: fetch_task01(base) and None)
    cases, validation = find_cases(base, config["data"]["pattern"])
    bad = run.from_main(lambda: _bad_cases([*cases, *validation], config, model_dir, skip_bad))
    named = bool(validation)
    cases, validation = ([case for case in some if case.name not in bad] for some in (cases, validation))
    if not cases or named and not validation:
        raise UserError(f"{base}: every {'validation' if cases else 'training'} case is bad.")
    if bad:
        run.say(f"data: {len(bad)} bad case(s) left out, listed in {model_dir / 'skipped.json'}")
    train, val = run.from_main(lambda: _write_split(cases, validation, config, model_dir))
    if {case.subject for case in train} == {case.subject for case in val}:
        run.say(
            f"warning: a single subject ({train[0].subject}): it is trained on and is its own validation."
        )
    if config["spacing"] is None:
        config["spacing"] = choose_spacing(train, config["longest_side"])
        config["longest_side"] = None
    run.say(f"data: {len(train)} training and {len(val)} validation cases, spacing {config['spacing']} mm")
    return train, val


def _bad_cases(cases: list[Case], config: dict, model_dir: Path, skip: bool) -> list[str]:
    """Names of the cases to leave out. Raises UserError where there are some and they may not be."""
    channels, intensity = channels_of(config), config["intensity"]
    stages = (config["autoencoder_train"], config["diffusion_train"])
    labels = any(section["augment"]["foreground_prob"] for section in stages)  # else no one looks at them
    if skip:
        limits = intensity["lower_percentile"], intensity["upper_percentile"]
        problems, _ = check_cases(cases, channels, limits, labels)
    else:
        problems = check_headers(cases, channels, labels)
    bad = sorted({problem.case for problem in problems})
    if problems and not skip:
        first = problems[0]
        raise UserError(
            f"{first.file}: {first.reason}. {len(bad)} of {len(cases)} cases are bad.\n"
            "check_data.py lists all. Mend or remove them, or train without them by --skip-bad."
        )
    if skip:
        listed = [{"case": p.case, "file": str(p.file), "reason": p.reason} for p in problems]
        model_dir.mkdir(parents=True, exist_ok=True)
        (model_dir / "skipped.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return bad


def _write_split(cases: list[Case], validation: list[Case], config: dict, model_dir: Path):
    path = model_dir / "split.json"
    by_name = {case.name: case for case in [*cases, *validation]}
    if path.is_file():
        split = read_json(path, "split")
        train, val = split.get("training", []), split.get("validation", [])
        if set(train) | set(val) != set(by_name):
            raise UserError(
                f"{path}: the data set is no longer the one this split was made for. Choose another "
                "model_dir, or delete the file to split anew."
            )
        return [by_name[name] for name in train], [by_name[name] for name in val]
    train, val = (
        (cases, validation)
        if validation
        else split_cases(cases, config["data"]["val_fraction"], config["seed"])
    )
    model_dir.mkdir(parents=True, exist_ok=True)
    split = {"training": [case.name for case in train], "validation": [case.name for case in val]}
    with written_whole(path) as file:
        file.write((json.dumps(split, indent=2) + "\n").encode())
    return train, val


def channels_of(config: dict) -> tuple[int, ...]:
    """The channels of an image that are used, in this order."""
    return tuple(config["channel"]) if isinstance(config["channel"], list) else (config["channel"],)


def preprocessing_of(config: dict) -> Preprocessing:
    """The one way from file to volume, for training, validation and inference."""
    intensity = config["intensity"]
    return Preprocessing(
        channels_of(config),
        tuple(config["spacing"]),
        intensity["lower_percentile"],
        intensity["upper_percentile"],
        intensity["clip"],
    )


def network_divisor(config: dict) -> int:
    """What each side of a volume must be a multiple of: the autoencoder's factor times the UNet's."""
    divisor = downsampling(config["autoencoder_def"])
    return divisor * downsampling(config["diffusion_def"]) if "diffusion_def" in config else divisor


def patch_sizes(config: dict, cases: Sequence[Case]) -> tuple[list[int], list[int]]:
    """Sizes in voxels of the autoencoder's training patches, and of the volumes that stage 2 encodes.

    Raises:
        UserError: a size that the networks cannot take; the nearest that they can are named.
    """
    auto, diffusion = config["autoencoder_train"]["patch_size"], config["diffusion_train"]["patch_size"]
    whole = (
        volume_size(cases, config["spacing"], network_divisor(config)) if not (auto and diffusion) else None
    )
    if auto:
        check_divisible(auto, downsampling(config["autoencoder_def"]), "autoencoder_train.patch_size")
    if diffusion:
        check_divisible(diffusion, network_divisor(config), "diffusion_train.patch_size")
    return auto or whole, diffusion or whole


def warn_of_padding(cases: Sequence[Case], spacing: Sequence[float], size: Sequence[int], run: Run) -> None:
    """Say in one line how many volumes are smaller than the patch and are padded."""
    small = [case.name for case in cases if any(np.less(volume_size([case], spacing, 1), size))]
    if small:
        run.say(
            f"data: {len(small)} of {len(cases)} volumes are smaller than {list(size)} and are padded "
            f"with background ({small[0]}, ...)"
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
    )


STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait; processes that start meanwhile begin with them waiting. Not on Windows."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def leave_signals_to_the_main_process(worker: int) -> None:
    """A loader process outlives a signal to the whole group for a while, or the main one would have no batch
    to end its step with. It ends with the main one, or 20 s after it was told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, where no one sends it SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


# ---------------------------------------------------------------- networks


def define_network(config: dict, key: str) -> nn.Module:
    """Build the network of a config section, such as `autoencoder_def`."""
    if key not in config:
        raise UserError(f"{key}: missing from the config.")
    return instantiate(config[key], NETWORKS, key)


def wrap_network(network: nn.Module, section: dict, run: Run, compiled: bool) -> nn.Module:
    """Gradient checkpointing -> SyncBatchNorm -> compile -> DDP. The parameters stay those of `network`."""
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
    return network.to(run.device)


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


def starting_point(args: argparse.Namespace, environment: dict, stage: str, files: StageFiles, run: Run):
    """The checkpoint to go on from, on every rank, or None to start: `--resume FILE`, `--fresh`, else the
    newest that is good, unless `resume_ckpt` is false.

    What a start leaves behind is moved to `model_dir/old-N`.

    Raises:
        UserError: the checkpoint that was named is missing or damaged, or none that is there is good.
    """
    found = {}

    def choose() -> Path | None:
        if args.resume:
            found["content"] = load_training_checkpoint(args.resume)
            if files.present() and args.resume.resolve() != files.last.resolve():
                run.say(f"what is in {files.last.parent} is copied to {set_aside(environment, stage, True)}")
            return args.resume
        if not files.present():
            if environment["resume_ckpt"]:
                run.say(f"{files.last.parent}: no checkpoint of this stage to go on from, so it starts.")
            return None
        if args.fresh or environment["resume_ckpt"] is False:
            why = "" if args.fresh else " (resume_ckpt is false; remove it to go on instead)"
            run.say(f"starting over{why}: what was there is now in {set_aside(environment, stage)}")
            return None
        path, found["content"] = files.newest(run.say)
        return path

    path = run.from_main(choose)
    if path is None:
        return None
    return found["content"] if run.is_main else load_training_checkpoint(path)


STAGE_FILES = {
    "autoencoder": ("*.pt", "*.json", "samples"),  # a diffusion model goes with its autoencoder
    "diffusion": ("diffusion_unet*.pt", "config_diffusion.json", "samples"),
}


def set_aside(environment: dict, stage: str, copy: bool = False) -> Path:
    """Move what a stage left in `model_dir`, its pictures and its TensorBoard files to a new `old-N`; or copy
    them there, to be gone on with."""
    model_dir, output_dir = environment["model_dir"], environment["output_dir"]
    old = next(p for n in itertools.count(1) if not (p := model_dir / f"old-{n}").exists())
    old.mkdir()
    log, stages = model_dir / "train_log.jsonl", [stage]
    if stage == "autoencoder":
        stages.append("diffusion")
    pictures = [output_dir / "losses.png"]
    pictures += [output_dir / "reconstructions.png"] if stage == "autoencoder" else []
    for path in [p for pattern in STAGE_FILES[stage] for p in model_dir.glob(pattern)] + pictures:
        if path.is_dir() and copy:
            shutil.copytree(path, old / path.name)
        elif path.exists():
            (shutil.copy2 if copy else shutil.move)(path, old / path.name)
    if log.is_file():
        shutil.copy2(log, old / log.name)
        if not copy:
            write_log(log, [entry for entry in read_log(log) if entry["stage"] not in stages])
    for one in [] if copy else stages:
        events = environment["tfevent_path"] / one
        if events.is_dir():
            shutil.move(events, old / f"tensorboard_{one}")
    return old


class Interruption:
    """SIGTERM and Ctrl-C: what is unsaved is saved first, then the script ends with the shell's exit code for
    that signal (143, 130)."""

    def __init__(self):
        self.signal, self.unsaved, self.process = None, False, os.getpid()
        for number in STOPPING:
            CLEAN_UP.callback(signal.signal, number, signal.signal(number, self._note))

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # a loader process, forked with this handler
            return
        self.signal = signal.Signals(number)
        if not self.unsaved:
            self.leave()

    def leave(self) -> None:
        """End the script; the same command goes on."""
        name = self.signal.name if self.signal else "a signal to another process"
        print(f"stopped by {name}; all is saved, and the same command goes on", file=sys.stderr)
        raise SystemExit(128 + (self.signal or signal.SIGTERM))


# ---------------------------------------------------------------- training


class Training:
    """The bookkeeping of a training run in either stage: where it is, what the ranks agree on, what is saved
    and logged. The script holds the loop:

        for epoch in training.epochs():
            for number, batch, last in training.batches():
                ...                                        # forward and backward
                training.step(terms, batch, last, steppers)
            if training.end_epoch():
                ...                                        # validate
                training.keep(score, scores)

    Whatever happens next is a function of (seed, epoch, batch, rank) and of what is saved here, so that a run
    that was killed at any moment and one that never was write the same weights and the same log.

    Args:
        stage: `autoencoder` or `diffusion`; its section of the config is `stage`_train.
        learner: the networks; has `shown` (the weights to keep), `state_dict()`, `load_state_dict(state)` and
            `update_average()`.
        loader: of `make_loader`.
        files: the stage's checkpoints.
        facts: what goes into each checkpoint besides, `config` among it.
        better: `better(score, best)`, such as `operator.gt`.
        resumed: of `starting_point`.
    """

    def __init__(
        self,
        stage: str,
        learner,
        loader: DataLoader,
        files: StageFiles,
        facts: dict,
        better: Callable[[float, float], bool],
        environment: dict,
        run: Run,
        resumed: dict | None,
    ):
        self.stage, self.learner, self.loader, self.files = stage, learner, loader, files
        self.facts, self.better, self.run = facts, better, run
        self.section, self.seed = facts["config"][f"{stage}_train"], facts["config"]["seed"]
        self.epoch, self.batch, step, sums = self._position(resumed)
        self.means, self.done = Means(sums), False
        seconds, masked = (resumed["seconds"], resumed["masked"]) if resumed else (0.0, 0)
        if resumed:
            try:
                learner.load_state_dict(resumed)
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise UserError(
                    f"{files.last}: its optimiser or averages do not fit this config ({error}). Go on with "
                    "the config that it was trained with, or start over with --fresh."
                ) from None
            run.say(
                f"resumed in epoch {self.epoch} after {self.batch} of its {len(loader)} batches, step {step}"
            )
        self.best = run.from_main(files.best_score)
        steps_per_epoch = len(loader) // self.section["accumulate_steps"]
        self.clock = Clock(self.section, steps_per_epoch, step, seconds)
        self.watch = Watch(
            run.world_size,
            run.gather,
            self.section["max_nonfinite_steps"],
            seconds,
            masked,
            learner.update_average,
            run.say,
        )
        if self.progress >= 1:
            run.say(f"{stage}: trained to the end already; raise max_epochs or max_minutes to go on.")
        self.log = None
        if run.is_main:
            write_resolved(facts["config"], environment["model_dir"] / f"config_{stage}.json")
            path, events = environment["model_dir"] / "train_log.jsonl", environment["tfevent_path"] / stage
            self.log = TrainLog(stage, path, events, step, resumed["lines"] if resumed else 0)
        self.bar = progress_bar(run, stage, self.clock.total_steps)
        self.bar.update(step)
        self.accumulated, self.names = 0.0, []  # loss and cases of the step under way
        self.interruption = Interruption()

    def _position(self, resumed: dict | None) -> tuple[int, int, int, dict]:
        """Epoch, batches of it that are done, optimiser steps, and the sums of its losses."""
        if resumed is None:
            return 0, 0, 0, {}
        epoch, batch, step, sums = (resumed[key] for key in ("epoch", "batch", "step", "sums"))
        before, now = resumed["batches_per_epoch"], len(self.loader)
        if before != now:
            epoch += batch == before
            batch, step, sums = 0, epoch * (now // self.section["accumulate_steps"]), {}
            self.run.say(f"an epoch had {before} batches before, it has {now} now: epoch {epoch} begins anew")
        if epoch >= self.section["max_epochs"]:  # fewer than before, or an epoch of others: nothing is left
            epoch, batch = self.section["max_epochs"] - 1, now
        # The sums are those of all ranks: the main one goes on with them.
        return epoch, batch, step, sums if self.run.is_main else {k: 0 * v for k, v in sums.items()}

    @property
    def progress(self) -> float:
        """Share of the training that is done, equal on all ranks."""
        return self.clock.progress(self.watch.seconds)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the one under way first."""
        for epoch in range(self.epoch, self.section["max_epochs"]):
            self.epoch = epoch
            self.loader.batch_sampler.epoch, self.loader.batch_sampler.first = self.epoch, self.batch
            yield self.epoch
            if self.done:
                return
            self.batch, self.means = 0, Means({})

    def batches(self) -> Iterator[tuple[int, dict, bool]]:
        """What is left of the epoch: number, batch, and whether it is the last of those of one step."""
        with signals_held_back():  # until the loader processes know what to do with them
            loading = iter(self.loader)
        for number, batch in enumerate(loading, self.batch):
            self.interruption.unsaved = True
            # For networks with dropout, which draw from torch's own generator.
            torch.manual_seed(stream(self.seed, "dropout", self.epoch, number, self.run.rank).initial_seed())
            last = (number + 1) % self.section["accumulate_steps"] == 0
            yield number, batch, last
            self.batch = number + 1
            if not last:
                continue
            if self.progress >= 1:
                return
            alone = self.run.world_size == 1 and self.interruption.signal is not None  # no one to agree with
            if (self.watch.stop or self.watch.save or alone) and self.batch < len(self.loader):
                self.watch.read(all_steps=True)
                self.save()

    def step(
        self, terms: dict[str, torch.Tensor], batch: dict, last: bool, steppers: Sequence[Stepper]
    ) -> None:
        """Take note of a batch's losses, whose gradients are there; after the last of a step, step."""
        self.means.add(terms)
        self.accumulated = self.accumulated + torch.stack([v.detach().float() for v in terms.values()]).sum()
        self.names += [self.loader.dataset.cases[i].name for i in batch["index"]]
        if not last:
            return
        finite = torch.stack([stepper.clip() for stepper in steppers]).all()
        asked, due = self.interruption.signal is not None, self.run.is_main and self.clock.save_due
        masked = self.watch.cast(
            self.accumulated, finite, asked, due, self.clock.seconds, self.clock.step, self.names
        )
        self.watch.read()
        self.accumulated, self.names = 0.0, []
        rate = learning_rate(self.section, self.run.world_size, self.progress, self.clock.step, self.epoch)
        for stepper in steppers:
            stepper.step(rate, masked)
        self.clock.step += 1
        if self.log and self.clock.step % 10 == 0:
            numbers = {
                "lr": rate,
                "grad_norm": steppers[0].norm,
                "memory_gb": peak_memory_gb(self.run.device),
            }
            self.log.scalars(self.clock.step, {**{k: v.detach() for k, v in terms.items()}, **numbers})
            fill_bar(self.bar, self.clock, loss=terms["loss"].item())

    def end_epoch(self) -> bool:
        """Save where it is time, write the epoch's line; whether it is an epoch to validate.

        What follows until the next epoch can be done again from what is saved here.
        """
        self.watch.read(all_steps=True)
        self.done = self.progress >= 1 or self.epoch + 1 == self.section["max_epochs"]
        validate = self.done or self.epoch % self.section["val_interval"] == 0
        self.batch = len(self.loader)  # the clock may have ended it early
        if self.interruption.unsaved and (validate or self.watch.stop or self.watch.save):
            self.save()
        totals = self.means.totals(self.run.sum)
        means = {k: float(total / count) for k, (total, count) in totals.items() if count}
        if self.log:
            rate = self.learner.steppers[0].optimizer.param_groups[0]["lr"]
            skipped = {"masked_steps": self.watch.masked} if self.watch.masked else {}
            seconds = self.clock.seconds
            self.log.record(
                step=self.clock.step, epoch=self.epoch, seconds=seconds, lr=rate, **skipped, **means
            )
        return validate

    def save(self) -> None:
        """Save what the run needs to go on from the end of this step; leave, if a signal asked for it."""
        sums, seconds = self.means.totals(self.run.sum), self.clock.seconds

        def write():
            state = {"sums": sums, "seconds": seconds, "masked": self.watch.masked, "lines": self.log.lines}
            self.files.save_last({**self.facts, **self._where(), **state, **self.learner.state_dict()})

        self.run.from_main(write)  # no rank goes on, or leaves, before it is written
        self.clock.saved_at, self.watch.save, self.interruption.unsaved = seconds, False, False
        if any(self.run.gather(self.watch.stop or self.interruption.signal is not None)):
            self.interruption.leave()

    def _where(self) -> dict:
        where = {"epoch": self.epoch, "batch": self.batch, "step": self.clock.step}
        return {**where, "batches_per_epoch": len(self.loader)}

    def keep(self, score: float, scores: dict[str, float]) -> None:
        """Log the validation of this epoch, and keep the weights if they are the best so far.

        Raises:
            FloatingPointError: the score is not finite.
        """
        if not math.isfinite(score):
            raise FloatingPointError(
                f"validation gives {score} in epoch {self.epoch}. What to do: docs/NaN_FIX_GUIDE.md"
            )
        if self.log:
            self.log.record(
                step=self.clock.step,
                epoch=self.epoch,
                **{f"val_{key}": value for key, value in scores.items()},
            )
        if self.best is None or self.better(score, self.best):
            self.best = score
            content = {**self.facts, **self._where(), "best": score, "validation": scores}
            shown = self.learner.shown
            self.run.from_main(
                lambda: save_checkpoint(self.files.best, {**content, "model": shown.state_dict()})
            )

    def close(self) -> None:
        """Finish bar and log."""
        self.bar.close()
        if self.log:
            self.log.close()


def progress_bar(run: Run, what: str, total: int | None = None, items=None, unit: str = "step") -> tqdm:
    """A bar with the time left, on the main process."""
    return tqdm(
        items, total=total, desc=what, unit=unit, disable=not run.is_main, dynamic_ncols=True, mininterval=0.5
    )


def fill_bar(bar: tqdm, clock: Clock, **numbers: float) -> None:
    """Advance the bar to the clock's step; a run that the clock will end has its length estimated as it
    goes."""
    if clock.limit and (progress := clock.seconds / clock.limit) > clock.step / clock.total_steps:
        bar.total = max(clock.step, round(clock.step / progress))
    bar.set_postfix({key: f"{value:.4g}" for key, value in numbers.items()}, refresh=False)
    bar.update(clock.step - bar.n)


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
    run.say(f"profile: {path} (open in chrome://tracing or ui.perfetto.dev)")


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of the GPU since the start, or of this process on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def write_resolved(config: dict, path: Path) -> None:
    """Write the config as it is used: defaults filled in, references resolved."""
    with written_whole(path) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
