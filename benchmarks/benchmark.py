"""Speed and memory next to the reference recipe: same networks, batches and data, in one process, in turn.

    python -m benchmarks.benchmark                                 # on a GPU if there is one, else the CPU
    python -m benchmarks.benchmark -c config/config_t1_2mm.json --data BRAINS --out results.json
    python -m benchmarks.benchmark --parts diffusion sampling --rounds 9 --device cpu

The reference is MONAI's 3D latent diffusion tutorial, in its precision and on MONAI's classes
(benchmarks/reference.py). Without --data, brains are simulated.

Prints a table: a training step of each stage, from a batch in memory to the updated weights; one sample with
its decoding, by the reference's 1000 DDPM steps, of which `--reference-steps` are timed; one decoding. Each
row has the median and range over the rounds, and peak memory; on a GPU also the fraction of 790 TFLOP/s. Both
sides use the reference's loss in stage 1, and Adam. On a CPU, memory is that of a separate process.
"""

import argparse
import functools
import itertools
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import simulate_brains
import utils
from benchmarks import measure, project, reference
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

PARTS = {
    "autoencoder": "autoencoder step",
    "diffusion": "diffusion step",
    "sampling": "a sample, generated and decoded",
    "decoding": "decoding",
}
SIDES = ("reference", "ours")
CONFIGS = {"cpu": "config/config_t1_2mm.json", "cuda": "config/config_train_32g.json"}
RECIPE = ["conditions.mean_latent=false", "diffusion_def.in_channels=@latent_channels"]  # the reference's
RECIPE += [
    f"{stage}_train.{value}"
    for stage in ("autoencoder", "diffusion")
    for value in ("accumulate_steps=1", "optimizer=adam")
]
REFERENCE_STEPS = {"cpu": 20, "cuda": 100}  # timed, of 1000


# ---------------------------------------------------------------- data


class VolumesInMemory(Dataset):
    """Volumes in memory, with the interface of a `VolumeDataset` without augmentation."""

    versions, seed, find_slices = 1, 0, False

    def __init__(self, cases: Sequence[Case], images: torch.Tensor):
        self.cases, self.images = cases, images

    def size_of(self, i: int) -> tuple[int, ...]:
        """Voxels of case `i`."""
        return tuple(self.images.shape[2:])

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


def endless(loader: DataLoader) -> Iterator[dict]:
    """The batches of epoch after epoch."""
    for epoch in itertools.count():
        loader.batch_sampler.epoch = epoch
        yield from loader


def find_data(args: argparse.Namespace, config: dict, folder: Path, count: int, run: Run) -> dict:
    """The environment for `--data`, or for `count` simulated subjects in `folder`."""
    data = args.data
    if data is None:
        data = folder / "simulated"
        spacing = [min(max(side, 2.0), 10.0) for side in config["spacing"] or [4.0]]
        run.print(f"no --data: simulating {count} brains")
        options = ["--num", str(count), "--spacing", *map(str, spacing)]
        simulate_brains.main(["--out", str(data), *options])
    places = {key: folder / key for key in FOLDERS}
    return {"data_base_dir": Path(data).expanduser(), "download_brats": False, **places}


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Bench:
    """Input of both sides.

    `flags` are torch's, by side, and "inference" for this project's sampling; `reference_steps` of the 1000
    are timed.
    """

    config: dict
    run: Run
    patches: VolumesInMemory
    volumes: VolumesInMemory
    reference_steps: int
    flags: dict


def build(bench: Bench, part: str, side: str) -> measure.Work:
    """One side's work of one part. Both sides start from the same weights."""
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
    batches = endless(utils.make_loader(dataset, config[section], config, bench.run, workers=0))
    return measure.Work(((lambda: stage.step(next(batches)), 1),), bench.flags[side])


def our_sampling(bench: Bench, part: str, encoder: Autoencoder, unet, latents) -> measure.Work:
    """A sample, or the decoding of a latent (1, c, d, h, w), by inference.py's defaults."""
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
    """The same by the reference; some of its 1000 steps are timed and stand for all."""
    steps = bench.reference_steps

    def draw() -> None:
        reference.draw_latents(unet, latents.shape[1:], [0], steps, bench.run.device)

    def decode() -> None:
        reference.decode(encoder.network, latents, 1.0)

    parts = ((decode, 1),) if part == "decoding" else ((draw, reference.STEPS / steps), (decode, 1))
    return measure.Work(parts, bench.flags["reference"])


def measure_part(bench: Bench, part: str, rounds: int, memory: bool) -> dict:
    """Time of both sides in alternation, their ratio and, with `memory`, their peak memory."""
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
            floor = works[side].flops() / measure.PEAK_FLOPS
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
    add("--device", default=None, help="cpu or cuda; default: cuda where available")
    add("--data", type=Path, default=None, help="folder of volumes; default: simulated brains")
    add("--parts", nargs="+", choices=[*PARTS, "memory"], default=[*PARTS, "memory"], help="default: all")
    add("--rounds", type=int, default=5, help="of each side, in alternation")
    add("--reference-steps", type=int, default=None, help="timed, of 1000; default: 20, on a GPU 100")
    add("--out", type=Path, default=None, metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: expected at least 1.")
    if not 1 <= (args.reference_steps or 1) <= reference.STEPS:
        raise UserError(f"--reference-steps {args.reference_steps}: expected 1 to {reference.STEPS}.")
    if args.out and args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file.")
    if args.parts == ["memory"]:
        args.parts = [*PARTS, "memory"]
    return args


def measure_speed(args: argparse.Namespace, config: dict, folder: Path, flags: dict, run: Run) -> list[dict]:
    """The rows of the table."""
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
    run.print(
        f"autoencoder: batch {batch[0]} of {patch}; diffusion: batch {batch[1]} of {size}; reference in "
        f"{'fp32, diffusion fp16 autocast' if run.device.type == 'cuda' else 'fp32'}, ours trains in "
        f"{run.amp_dtype or torch.float32} and samples in fp32; no perceptual term on either side; "
        f"{bench.reference_steps} of the reference's {reference.STEPS} sampling steps are timed"
    )
    rows = []
    for part in PARTS:
        if part in args.parts:
            rows.append(measure_part(bench, part, args.rounds, "memory" in args.parts))
            run.print(f"{PARTS[part]}: ratio {rows[-1]['ratio']:.2f}")
    return rows


def shown_time(side: dict) -> str:
    """Median and range in seconds and, on a GPU, the fraction of peak arithmetic."""
    seconds = side["seconds"]
    text = f"{statistics.median(seconds):.3g} s ({min(seconds):.3g}–{max(seconds):.3g})"
    return text + (f", {side['floor_share']:.1%} of 790 TFLOP/s" if "floor_share" in side else "")


def table(rows: Sequence[dict]) -> str:
    """In Markdown, a line per part."""
    lines = ["| | reference | ours | ratio | reference GB | ours GB | ratio |", "|---" * 7 + "|"]
    for row in rows:
        cells = [PARTS[row["part"]], *(shown_time(row[side]) for side in SIDES)]
        cells.append(f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})")
        peaks = [row[side].get("peak_bytes", math.nan) for side in SIDES]
        cells += [f"{peak / 1e9:.3g}" for peak in peaks] + [f"{peaks[0] / peaks[1]:.2f}" if peaks[1] else ""]
        lines.append(f"| {' | '.join(cell.replace('nan', '') for cell in cells)} |")
    return "\n".join(lines)


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    start = argparse.Namespace(device=args.device, gpus=None, amp=None)
    with measure.flags_kept():
        flags = {"reference": measure.REFERENCE_FLAGS}
        run = utils.start(start, {})  # the sections of the config say whether to use mixed precision
        flags["ours"] = measure.read_flags()
        utils.start(start)
        flags["inference"] = measure.read_flags()
        args.config_file = args.config_file or str(utils.ROOT / CONFIGS[run.device.type])
        config = utils.load_config(args.config_file, [*args.set, *RECIPE])
        report = {
            "command": shlex.join(["python", "-m", "benchmarks.benchmark", *(argv or sys.argv[1:])]),
            "config": args.config_file,
            "machine": measure.machine(run.device),
        }
        run.print(f"command: {report['command']}\nconfig: {report['config']}")
        run.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
        with tempfile.TemporaryDirectory() as folder:
            report["rows"] = measure_speed(args, config, Path(folder), flags, run)
        print(f"\n{table(report['rows'])}\n")
    if args.out:
        write_json(args.out, report)


if __name__ == "__main__":
    main()
