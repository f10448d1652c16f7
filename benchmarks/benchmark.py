"""This project beside the reference recipe: the same networks, batches and data, in one process, in turn.

    python -m benchmarks.benchmark                                 # on a GPU where there is one, else the CPU
    python -m benchmarks.benchmark -c config/config_t1_2mm.json --data BRAINS --out figures.json
    python -m benchmarks.benchmark --parts diffusion sampling --rounds 9 --device cpu
    python -m benchmarks.benchmark --quality --data BRAINS             # 20 minutes each on a CPU, 4 on a GPU
    python -m benchmarks.benchmark --quality 10 --data BRAINS --autoencoder models/autoencoder.pt

The reference is MONAI's 3D latent diffusion tutorial, in its precision and on MONAI's classes
(benchmarks/reference.py). Without --data, brains are simulated.

The table: a step of each stage, from a batch in memory to the next weights; one volume drawn and decoded, the
reference by all of its 1000 steps of DDPM, of which `--reference-steps` are timed; one latent decoded; each
with the median over the rounds, its range, and peak memory. On a GPU also the share of the time that 790
TFLOP/s would need for the arithmetic. The loss of stage 1 is the reference's on both sides; memory on a CPU
is that of a process of its own.

--quality trains both for the same time from the same autoencoder and the same initial UNet, in alternating
slices, and compares their volumes with held-out ones (benchmarks/quality.py).
"""

import argparse
import copy
import functools
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

import simulate_brains
import train_autoencoder
import utils
from benchmarks import measure, project, quality, reference
from benchmarks.report import NAMES, SIDES, quality_report, table
from ldm import UserError, configs, generation
from ldm.data.cases import Case
from ldm.data.datasets import VolumeDataset
from ldm.data.prepare import patch_sizes, prepare_data
from ldm.data.preprocessing import Preprocessing
from ldm.diffusion.process import NoiseProcess
from ldm.environment import FOLDERS
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import latent_size
from ldm.system.files import write_json
from ldm.system.ranks import Run
from ldm.training.latents import load_autoencoder

PARTS = tuple(NAMES)
CONFIGS = {  # by device and whether quality is asked for
    ("cpu", False): "config/config_t1_2mm.json",
    ("cpu", True): "config/config_demo.json",
    ("cuda", False): "config/config_train_32g.json",
    ("cuda", True): "config/config_t1_2mm.json",
}
QUALITY_MINUTES = {"cpu": 20.0, "cuda": 4.0}
REFERENCE_STEPS = {"cpu": 20, "cuda": 100}  # of 1000, timed
SIMULATED = 96  # subjects, for --quality


# ---------------------------------------------------------------- data


class VolumesInMemory(Dataset):
    """Volumes read once, as a `VolumeDataset` without augmentation serves them."""

    versions, seed = 1, 0

    def __init__(self, cases: Sequence[Case], images: torch.Tensor):
        self.cases, self.images = cases, images

    def image(self, i: int, version: int) -> torch.Tensor:
        """Case `i`, (C, D, H, W)."""
        return self.images[i]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        return {"image": self.images[i], "epoch": epoch, "index": i}


def in_memory(cases: Sequence[Case], config: dict, size: Sequence[int]) -> VolumesInMemory:
    """Read cases, cropped or padded to `size` about the centre."""
    volumes = VolumeDataset(cases, Preprocessing.from_config(config), size)
    return VolumesInMemory(cases, torch.stack([volumes[(0, i)]["image"].clone() for i in range(len(cases))]))


def find_data(args: argparse.Namespace, config: dict, folder: Path, count: int, run: Run) -> dict:
    """The environment of the data set that is named, or of `count` simulated subjects in `folder`."""
    data = args.data
    if data is None:
        data = folder / "simulated"
        spacing = [min(max(side, 2.0), 10.0) for side in config["spacing"] or [4.0]]
        run.say(f"no --data: {count} brains are simulated")
        options = ["--num", str(count), "--spacing", *map(str, spacing)]
        simulate_brains.main(["--out", str(data), *options])
    places = {key: folder / key for key in FOLDERS}
    return {"data_base_dir": Path(data).expanduser(), "download_brats": False, **places}


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Bench:
    """What both sides are given.

    `flags` are torch's, by side, and "inference" for this project's sampling; `reference_steps` is how many
    of the 1000 are timed.
    """

    config: dict
    run: Run
    patches: VolumesInMemory
    volumes: VolumesInMemory
    reference_steps: int
    flags: dict


def build(bench: Bench, part: str, side: str) -> measure.Work:
    """One side's work of one part with its networks, whose initial weights are the same on both."""
    config, run = bench.config, bench.run
    torch.manual_seed(config["seed"])
    if part == "autoencoder":
        if side == "reference":
            stage, dataset = reference.Autoencoder(config, run), bench.patches
        else:
            stage = project.Autoencoder(config, bench.patches, run)
            dataset = stage.dataset
        return training_work(bench, stage, dataset, "autoencoder_train", side)
    define = reference.define_network if side == "reference" else project.define_network
    unet = define(config, "diffusion_def", run)
    autoencoder = define(config, "autoencoder_def", run).eval().requires_grad_(False)
    if part == "diffusion" and side == "reference":
        section = config["diffusion_train"]
        first = bench.volumes.images[: section["batch_size"]]
        stage = reference.Diffusion(autoencoder, unet, first, section["lr"], run.device)
        return training_work(bench, stage, bench.volumes, "diffusion_train", side)
    encoder = Autoencoder(autoencoder)
    if part == "diffusion":
        stage = project.Diffusion(config, encoder, bench.volumes, run, unet.state_dict())
        return training_work(bench, stage, stage.dataset, "diffusion_train", side)
    shape = [encoder.latent_channels, *latent_size(config, bench.volumes.images.shape[2:])]
    latents = torch.randn(1, *shape).to(run.device)
    of_side = our_sampling if side == "ours" else reference_sampling
    return of_side(bench, part, encoder, unet.eval().requires_grad_(False), latents)


def training_work(bench: Bench, stage, dataset: Dataset, section: str, side: str) -> measure.Work:
    """Steps of a stage on batch after batch of a data set."""
    config = bench.config
    batches = quality.endless(utils.make_loader(dataset, config[section], config, bench.run, workers=0))
    return measure.Work(((lambda: stage.step(next(batches)), 1),), bench.flags[side])


def our_sampling(bench: Bench, part: str, encoder: Autoencoder, unet, latents) -> measure.Work:
    """A volume, or the decoding of a latent (1, c, d, h, w), as inference.py makes it by default."""
    run, process = Run(0, 1, bench.run.device), NoiseProcess.from_config(bench.config["NoiseScheduler"])
    size = bench.volumes.images.shape[2:]
    networks = project.sampling_networks(encoder, 1.0, unet, process, latents.shape[1:], size)

    @torch.inference_mode()
    def work() -> None:
        if part == "decoding":
            encoder.decode(latents)
        else:
            generation.draw(networks, [0], *project.default_sampler(process), run)

    return measure.Work(((work, 1),), bench.flags["inference"])


def reference_sampling(bench: Bench, part: str, encoder: Autoencoder, unet, latents) -> measure.Work:
    """The same as the reference makes it; of its 1000 steps, some are run and stand for all."""
    steps = bench.reference_steps

    def draw() -> None:
        reference.draw_latents(unet, latents.shape[1:], [0], steps, bench.run.device)

    def decode() -> None:
        reference.decode(encoder.network, latents, 1.0)

    parts = ((decode, 1),) if part == "decoding" else ((draw, reference.STEPS / steps), (decode, 1))
    return measure.Work(parts, bench.flags["reference"])


def measure_part(bench: Bench, part: str, rounds: int, memory: bool) -> dict:
    """Time of both sides in alternation, their ratio, and, where asked for, their peak memory."""
    device, works, peaks, on_gpu = bench.run.device, {}, {}, bench.run.device.type == "cuda"
    for side in SIDES:
        build_side = functools.partial(build, bench, part, side)
        if on_gpu:
            works[side], peaks[side] = measure.peak_on_gpu(build_side, device)
        else:
            if memory:
                peaks[side] = measure.peak_on_cpu(build, bench, part, side)
            works[side] = build_side()
    seconds = measure.alternate(works, rounds, device)
    middle, low, high = measure.ratio(*(seconds[side] for side in SIDES))
    row = {"part": part, "ratio": middle, "ratio_low": low, "ratio_high": high}
    for side in SIDES:
        row[side] = {"seconds": seconds[side]}
        if memory:
            row[side]["peak_bytes"] = peaks[side]
        if on_gpu:
            floor = works[side].flops() / measure.FLOOR
            row[side]["floor_share"] = floor / statistics.median(seconds[side])
    return row


# ---------------------------------------------------------------- command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its numbers checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-c", "--config-file", default=None, help="networks and batches; default: by device, see CONFIGS")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    add("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    add("--data", type=Path, default=None, help="folder of volumes; default: simulated brains")
    add("--parts", nargs="+", choices=[*PARTS, "memory"], help="default: all; none with --quality")
    add("--rounds", type=int, default=5, help="of each side, in alternation")
    add("--reference-steps", type=int, default=None, help="of the 1000, timed; default: 20, on a GPU 100")
    add("--quality", nargs="?", type=float, const=True, metavar="MINUTES", help="train both, this long each")
    add("--samples", type=int, default=24, help="volumes that --quality judges at a time")
    add("--autoencoder", type=Path, default=None, help="for --quality; default: trained first, by stage 1")
    add("--out", type=Path, default=None, metavar="FILE", help="write the figures as JSON too")
    args = parser.parse_args(argv)
    for name, least in (("rounds", 1), ("samples", 2), ("reference_steps", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}.")
    if (args.reference_steps or 1) > reference.STEPS:
        raise UserError(f"--reference-steps {args.reference_steps}: there are {reference.STEPS}.")
    if args.quality is not None and not 0 < args.quality < math.inf:
        raise UserError(f"--quality {args.quality}: expected minutes, more than 0.")
    if args.out and args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file.")
    if args.autoencoder and args.quality is None:
        raise UserError("--autoencoder: goes with --quality; speed does not depend on the weights.")
    if args.parts == ["memory"]:
        args.parts = [*PARTS, "memory"]
    if args.parts is None:
        args.parts = [] if args.quality is not None else [*PARTS, "memory"]
    return args


def read_config(args: argparse.Namespace, kind: str) -> dict:
    """The config, one batch a step; for --quality a third of the subjects is held out, unless --set says
    otherwise."""
    with_quality = args.quality is not None
    args.config_file = args.config_file or str(utils.ROOT / CONFIGS[kind, with_quality])
    args.set = ["data.val_fraction=0.34"] * with_quality + args.set
    for section in ("autoencoder_train", "diffusion_train"):
        args.set.append(f"{section}.accumulate_steps=1")
    return utils.load_config(args.config_file, args.set)


def measure_speed(args: argparse.Namespace, config: dict, folder: Path, flags: dict, run: Run) -> list[dict]:
    """The rows of the table."""
    config = copy.deepcopy(config)
    config["autoencoder_train"].update(reference.LOSS)
    count = 2 * max(config[section]["batch_size"] for section in ("autoencoder_train", "diffusion_train"))
    environment = find_data(args, config, folder, count + 2, run)
    train, held_out, spacing = prepare_data(config, environment, run)
    config = configs.with_spacing(config, spacing)
    patch, size, _ = patch_sizes(config, [*train, *held_out])
    few = train[:count]
    bench = Bench(
        config,
        run,
        in_memory(few, config, patch),
        in_memory(few, config, size),
        args.reference_steps or REFERENCE_STEPS[run.device.type],
        flags,
    )
    batch = [config[section]["batch_size"] for section in ("autoencoder_train", "diffusion_train")]
    run.say(
        f"autoencoder: batch {batch[0]} of {patch}; diffusion: batch {batch[1]} of {size}; reference in "
        f"{'fp32, diffusion fp16 autocast' if run.device.type == 'cuda' else 'fp32'}, ours trains in "
        f"{run.amp_dtype or torch.float32} and draws in fp32; no perceptual term on either side; "
        f"{bench.reference_steps} of the reference's {reference.STEPS} sampling steps are run"
    )
    rows = []
    for part in PARTS:
        if part in args.parts:
            rows.append(measure_part(bench, part, args.rounds, "memory" in args.parts))
            run.say(f"{NAMES[part]}: ratio {rows[-1]['ratio']:.2f}")
    return rows


def measure_quality(args: argparse.Namespace, config: dict, folder: Path, flags: dict, run: Run) -> dict:
    """What `quality.compare` finds, after stage 1 where no autoencoder is named."""
    environment = find_data(args, config, folder, SIMULATED, run)
    path = args.autoencoder
    if path is None:
        places = {key: str(value) for key, value in environment.items() if key != "download_brats"}
        write_json(folder / "environment.json", places)
        settings = [word for one in args.set for word in ("--set", one)]
        files = ["-c", args.config_file, "-e", str(folder / "environment.json")]
        train_autoencoder.main([*files, "--device", run.device.type, *settings])
        path = environment["model_dir"] / "autoencoder.pt"
    train, held_out, spacing = prepare_data(config, environment, run)
    config = configs.with_spacing(config, spacing)
    if len(held_out) < 2:
        raise UserError(f"--quality: {len(held_out)} held-out volume is too few. Raise data.val_fraction.")
    _, size, _ = patch_sizes(config, [*train, *held_out])
    encoder = load_autoencoder(path, config, run)
    changing = VolumeDataset(
        train, Preprocessing.from_config(config), size, augment=config["diffusion_train"]["augment"]
    )
    kept = in_memory(train, config, size)
    return quality.compare(
        config,
        encoder,
        kept,
        in_memory(held_out, config, size),
        kept if changing.versions == 1 else changing,
        QUALITY_MINUTES[run.device.type] if args.quality is True else args.quality,
        args.samples,
        args.reference_steps or REFERENCE_STEPS[run.device.type],
        flags,
        run,
    )


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    start = argparse.Namespace(device=args.device, gpus=None, amp=None)
    with measure.flags_kept():
        flags = {"reference": measure.REFERENCE_FLAGS}
        run = utils.start(start, {})  # whether to use mixed precision, each section of the config says
        flags["ours"] = measure.read_flags()
        utils.start(start)
        flags["inference"] = measure.read_flags()
        config = read_config(args, run.device.type)
        report = {
            "command": shlex.join(["python", "-m", "benchmarks.benchmark", *(argv or sys.argv[1:])]),
            "config": args.config_file,
            "machine": measure.machine(run.device),
        }
        run.say("\n".join(f"{key}: {value}" for key, value in [*report.items()][:2]))
        run.say(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
        with tempfile.TemporaryDirectory() as folder:
            if any(part in args.parts for part in PARTS):
                report["rows"] = measure_speed(args, config, Path(folder, "speed"), flags, run)
                print(f"\n{table(report['rows'])}\n")
            if args.quality is not None:
                report["quality"] = measure_quality(args, config, Path(folder, "quality"), flags, run)
                print(f"\n{quality_report(report['quality'])}\n")
    if args.out:
        write_json(args.out, report)


if __name__ == "__main__":
    main()
