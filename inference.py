"""Generate volumes with trained networks: one NIfTI a sample, named by its seed, and a picture of them.

    python inference.py -c config/config_train_16g.json -e config/environment.json --num 8
    python inference.py -c CONFIG -e ENV --num 100 --seed 1000 --batch-size 4 --steps 50 --sampler unipc
    python inference.py -c CONFIG -e ENV --autoencoder model_autoencoder.pt --unet model.pt --scale-factor 0.9
    python inference.py -c CONFIG -e ENV --max-memory 12
    torchrun --standalone --nproc_per_node=4 inference.py -c CONFIG -e ENV -n 100
    python inference.py --reproduce outputs/sample_000003.json

Sample i has the seed `--seed` + i, and is the same volume whatever `--num` and, to rounding, whatever
`--batch-size`. Sampling runs in float32 for that reason, on a GPU without TF32; `--amp` trades it for speed.
Reads `autoencoder.pt` and `diffusion_unet.pt` of `model_dir`, or weights from elsewhere (bare state dicts,
old or new names) with their scale factor. Volumes are written to `output_dir` in RAS with the spacing that
was trained on, their intensities in the training set's typical range. No volume is overwritten: the same
command again makes those that are missing, another one is refused. (torchrun takes `--num` for an option of
its own; `-n` is the same.)

With `--max-memory GB` (of 10^9 bytes) volumes are decoded within so much memory of the device, the weights of
both networks included: in slabs, with the statistics of the whole volume, so that they are the same volumes
to rounding. The less there is, the longer it takes. It limits neither what the UNet takes to sample nor, on
a CPU, what the program itself takes, about half a GB.

Beside each volume lies its record, `sample_000003.json`: seed, sampler, steps, the hashes of checkpoints and
config, the config itself, versions. `--reproduce` makes the volume of a record again, from the checkpoints
that it names (or `--autoencoder`, `--unet`: moved, but the same files), in the same batch, precision and
number of threads. It writes `sample_000003_reproduced.nii.gz` beside the record and says whether the bytes
are the same, or how far the volumes are apart; over 1e-4 of the range is exit code 1. `--device` is the only
other option it takes.
"""

import argparse
import contextlib
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import utils
from ldm import UserError, configs, counted, figures, generation
from ldm.data.intensity import to_unit_range
from ldm.diffusion.samplers import SAMPLERS, choose_sampler
from ldm.export import records
from ldm.lowmem.slabwise import Budget, decoding_peak, weights_bytes
from ldm.metrics import band_power
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import latent_size
from ldm.system import ranks, versions
from ldm.system.checkpoints import load_checkpoint
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run
from ldm.training import memory

SHOWN = 8  # volumes in the picture
TOLERANCE = 1e-4  # share of its range by which a volume may differ from the one that it reproduces


# ---------------------------------------------------------------- command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its numbers checked."""
    parser = utils.script_parser(__doc__)
    utils.add_dry_run(parser)
    add = parser.add_argument
    add("-n", "--num", type=int, default=1, help="how many volumes")
    add("--seed", type=int, default=0, help="seed of the first; the others count on from it")
    add("--batch-size", type=int, default=1, help="volumes at a time")
    defaults = ", ".join(f"{name} {sampler.steps or 'all'}" for name, sampler in SAMPLERS.items())
    add("--steps", type=int, default=None, help=f"sampling steps; default: {defaults}")
    add("--sampler", default=None, help="default: heun for rectified flow, else dpmpp_2m")
    add("--autoencoder", type=Path, default=None, help="default: model_dir/autoencoder.pt")
    add("--unet", type=Path, default=None, help="default: model_dir/diffusion_unet.pt")
    add("--scale-factor", type=float, default=None, help="for weights that do not bring theirs")
    utils.add_max_memory(parser, "decode")
    add("--reproduce", type=Path, default=None, metavar="FILE", help="make the volume of this record again")
    args = parser.parse_args(argv)
    if args.reproduce:
        unset = argparse.Namespace(**dict.fromkeys(vars(args)))
        given = {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
        if others := sorted(given - {"reproduce", "autoencoder", "unet", "device"}):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise UserError(f"--reproduce: takes everything from its file; leave out {names}.")
    for name in ("num", "batch_size", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1.")
    if args.steps is not None and args.steps > records.MOST_STEPS:
        raise UserError(f"--steps {args.steps}: at most {records.MOST_STEPS} are possible.")
    if not 0 <= args.seed <= records.LAST_SEED - args.num:
        raise UserError(f"--seed {args.seed}: expected 0 or more, and less than 2^63 for all.")
    utils.check_scale_factor(args.scale_factor)
    return args


def hardware(run: Run) -> str:
    """The GPU's name, or the kind of CPU and of its vector instructions."""
    if run.device.type == "cuda":
        return torch.cuda.get_device_name(run.device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


# ---------------------------------------------------------------- networks


def counting(bar) -> Callable[[Sequence], Iterator]:
    """Iterate over the steps of a sampler, and count them on a progress bar."""

    def counted(steps: Sequence) -> Iterator:
        for step in steps:
            yield step
            bar.update()

    return counted


# ---------------------------------------------------------------- memory, predicted


def rehearse(config: dict, size: Sequence[int], batch: int, meter: memory.Meter, run: Run) -> None:
    """What takes memory: a step of sampling, and decoding, of a batch of volumes of `size` voxels."""
    shape = [config["diffusion_def"]["out_channels"], *latent_size(config, size)]
    with meter, torch.no_grad(), run.autocast():
        encoder = Autoencoder(configs.define_network(config, "autoencoder_def").to(run.device).eval())
        unet = configs.define_network(config, "diffusion_def").to(run.device).eval()
        meter.hold("weights", encoder, unet)
        latents = torch.zeros(batch, *shape, device=run.device)
        with meter.phase("sampling"):
            unet(latents, timesteps=torch.zeros(batch, device=run.device)).float()
        with meter.phase("decoding"):
            encoder.decode(latents)


def tell_memory(args: argparse.Namespace, config: dict) -> None:
    """The dry run: print the peaks by part, and what would lower them. Nothing is written.

    Raises:
        UserError: volumes cannot be decoded within `--max-memory`.
        ForecastError: the peaks cannot be predicted.
    """
    gpu, size = utils.meant_for_gpu(args), planned_size(args, config)

    def peaks(batch: int, amp: bool, max_memory: float | None) -> dict[str, memory.Peak]:
        meter, half = memory.Meter(gpu), memory.half_precision(gpu) if amp else None
        run = Run(0, 1, torch.device("cpu"), half)
        with memory.forecasting():
            rehearse(config, size, batch, meter, run)
        if max_memory:
            weights = meter.peaks["decoding"].parts["weights"]
            budget = Budget(max_memory * memory.GB, like_gpu=gpu)
            meter.peaks["decoding"] = peak_within(budget, config, size, weights, run)
        return meter.peaks

    batch, amp, limit = args.batch_size, bool(args.amp), args.max_memory
    half = memory.half_precision(gpu) if amp else None
    found = peaks(batch, amp, limit)
    now, sampling = memory.highest(found).total, found["sampling"].total
    options = {"--batch-size 1": (1, amp, limit)} if batch > 1 else {}
    if not amp and memory.half_precision(gpu):
        options["--amp"] = (batch, True, limit)
    if not limit:  # what sampling takes anyway, of which decoding plans with 0.9
        least = math.ceil(sampling / 1e8) / 10
        options[f"--max-memory {least}"] = (batch, amp, least)
    lower = {}
    for words, option in options.items():
        with contextlib.suppress(UserError, memory.ForecastError):  # too little to decode in
            lower[words] = memory.highest(peaks(*option)).total
    lower = {words: total for words, total in sorted(lower.items(), key=lambda item: item[1]) if total < now}
    print(memory.report(found, lower, gpu, half, batch, size))
    if limit and sampling > limit * memory.GB:
        print(f"--max-memory {limit:g} holds for decoding; sampling takes {sampling / memory.GB:.2f} GB")


def peak_within(budget: Budget, config: dict, size: Sequence[int], weights: int, run: Run) -> memory.Peak:
    """The peak of decoding a volume of `size` voxels within a budget, `weights` bytes of both networks
    included. Raises UserError where that is too little."""
    autoencoder = configs.define_network(config, "autoencoder_def").eval()
    latents = torch.zeros(1, config["diffusion_def"]["out_channels"], *latent_size(config, size))
    budget = replace(budget, beside=weights - weights_bytes(autoencoder))
    with run.autocast():
        most = decoding_peak(autoencoder, latents, budget)
    parts = {**dict.fromkeys(memory.PARTS, 0), "weights": weights, "activations": int(most) - weights}
    return memory.Peak(parts)


def planned_size(args: argparse.Namespace, config: dict) -> list[int]:
    """Voxels of the volumes: by the config, else by the checkpoint, else by the data's headers."""
    if not config["diffusion_train"]["patch_size"]:
        path = args.unet or utils.load_environment(args.environment_file)["model_dir"] / "diffusion_unet.pt"
        if path.is_file():
            return generation.geometry_of(load_checkpoint(path), config, path)["size"]
    return utils.planned_sizes(config, args)[1]


# ---------------------------------------------------------------- making one again


def reproduce(args: argparse.Namespace) -> None:
    """Make the volume of a record again, and compare it with the one that was written."""
    # Step 0: the record, and the files that it names
    record = records.read_record(args.reproduce)
    config = configs.check_config(record["config"], args.reproduce)
    original = args.reproduce.with_name(f"{args.reproduce.stem}.nii.gz")
    path = args.reproduce.with_name(f"{args.reproduce.stem}{records.REPRODUCED}.nii.gz")
    if path.exists():
        raise UserError(f"{path} is there already. Move it away first.")
    folder = args.reproduce.parent
    checkpoints = [
        records.find_checkpoint(record, key, folder, getattr(args, key)) for key in records.CHECKPOINTS
    ]

    # Step 1: the same device and precision, and networks
    args.device, args.amp = args.device or record["device"], False
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("--reproduce makes one volume: start it without torchrun.")
    if record["precision"] in ("bfloat16", "float16"):
        run.amp_dtype = getattr(torch, record["precision"])
    ranks.choose_kernels(tf32=record["precision"] == "tf32", repeatable=True)  # of an earlier version
    torch.set_num_threads(record["threads"])
    networks = generation.load_networks(
        *checkpoints,
        config,
        args.reproduce,
        record["scale_factor"],
        record["compile"],
        record.get("max_memory"),
        run,
    )

    # Step 2: the same batch
    bar = progress_bar(run, f"sample ({record['steps']} steps)", total=record["steps"])
    volumes = generation.draw(
        networks, record["batch"], record["sampler"], record["steps"], run, counting(bar)
    )
    bar.close()
    seed = record["seed"]
    volume = generation.in_typical_units(volumes[record["batch"].index(seed)], networks, seed)
    content = generation.nifti_bytes(volume, networks.geometry["spacing"])
    records.save_volume(path, content)

    # Step 3: is it the same?
    due = record["volume"]["sha256"]
    if hashlib.sha256(content).hexdigest() == due:
        run.say(f"reproduced: {path}\n  its bytes are those recorded")
        return
    now = {**versions.versions(), "hardware": hardware(run)}
    was = {**record["versions"], "hardware": record["hardware"]}
    changed = ", ".join(
        f"{key} {was.get(key)} then, {now[key]} now" for key in now if was.get(key) != now[key]
    )
    changed = changed or "nothing that the record tells has changed"
    if not original.exists() or records.sha256_of(original) != due:
        run.say(
            f"reproduced: {path}\n  its bytes are not those recorded ({changed}), and {original.name} is not "
            "there as it was written, to compare with"
        )
        return
    apart = largest_difference(volume, generation.read_volume(original))
    told = f"{path}: differs from {original.name} by up to {apart:.1e} of its range ({changed})"
    if not apart <= TOLERANCE:
        raise FloatingPointError(f"{told}.\nMore than {TOLERANCE} is more than rounding: not reproduced.")
    run.say(f"reproduced: {told}: the same but for rounding")


def largest_difference(volume: np.ndarray, original: np.ndarray) -> float:
    """As a share of the range of `original`; NaN where a voxel is."""
    if volume.shape != original.shape:
        return math.inf
    return float(np.abs(volume - original).max() / (np.ptp(original) or 1))


# ---------------------------------------------------------------- the script


@utils.command
@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration and device
    args = parse_arguments(argv)
    if args.reproduce:
        return reproduce(args)
    config = utils.load_config(args.config_file, args.set)
    if args.dry_run:
        return tell_memory(args, config)
    environment = utils.load_environment(args.environment_file)
    utils.check_writable(environment, "output_dir")
    run = utils.start(args)
    output_dir = environment["output_dir"]

    # Step 1: checkpoints and networks
    checkpoints = {
        "autoencoder": args.autoencoder or environment["model_dir"] / "autoencoder.pt",
        "unet": args.unet or environment["model_dir"] / "diffusion_unet.pt",
    }
    networks = generation.load_networks(
        *checkpoints.values(),
        config,
        args.config_file,
        args.scale_factor,
        bool(args.compile),
        args.max_memory,
        run,
        args.set,
    )
    process, geometry = networks.process, networks.geometry

    # Step 2: what to draw, and what of it is there already
    sampler = choose_sampler(args.sampler, process)
    steps = args.steps or SAMPLERS[sampler].steps or process.num_train_timesteps
    request = {
        "sampler": sampler,
        "steps": steps,
        "scale_factor": networks.scale_factor,
        "precision": run.precision,
        "compile": bool(args.compile),
        "device": run.device.type,
        "hardware": hardware(run),
        "threads": torch.get_num_threads(),
        **{
            key: {"path": path.as_posix(), "sha256": records.sha256_of(path)}
            for key, path in checkpoints.items()
        },
        "config_sha256": records.config_hash(config),
        "config": config,
        "versions": versions.versions(),
        **({"max_memory": args.max_memory} if args.max_memory else {}),
    }
    seeds = list(range(args.seed, args.seed + args.num))
    paths = {seed: output_dir / f"sample_{seed:06d}.nii.gz" for seed in seeds}
    due = run.from_main(lambda: records.missing(paths, request))  # before any rank writes its first
    if len(due) < len(seeds):
        run.say(f"inference: {len(seeds) - len(due)} of {len(seeds)} volumes are there already")

    # Step 3: sample, decode, write; each rank its share of the batches. A batch that is there in part is
    # drawn whole, so that its volumes are what they would have been.
    batches = [seeds[i : i + args.batch_size] for i in range(0, len(seeds), args.batch_size)]
    mine = [batch for batch in batches if due.intersection(batch)][run.rank :: run.world_size]
    bar = progress_bar(run, f"sample ({steps} steps)", total=len(mine) * steps)
    power = torch.zeros(2, dtype=torch.float64)  # sum and count
    for batch in mine:
        volumes = generation.draw(networks, batch, sampler, steps, run, counting(bar))
        power += torch.tensor([band_power(volumes).sum().item(), len(batch)])
        for seed, volume in zip(batch, volumes, strict=True):
            if seed not in due:
                continue
            voxels = generation.in_typical_units(volume, networks, seed)
            content = generation.nifti_bytes(voxels, geometry["spacing"])
            about = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "shape": list(voxels.shape[1:]),
                "spacing": list(geometry["spacing"]),
                "limits": geometry["limits"],
            }
            records.save_volume(
                paths[seed], content, {"seed": seed, "batch": batch, **request, "volume": about}
            )
    bar.close()
    power, count = run.sum(power).tolist()  # and all are written

    # Step 4: a picture, and how sharp the samples are beside the autoencoder's reconstructions
    if run.is_main:
        limits = np.array(geometry["limits"])
        shown = [
            to_unit_range(generation.read_volume(paths[seed]), limits, clip=False)[0]
            for seed in seeds[:SHOWN]
        ]
        figures.montage(
            {"sample": [torch.from_numpy(volume) for volume in shown]},
            output_dir / "samples.png",
            f"Generated volumes, seeds {seeds[0]} to {seeds[:SHOWN][-1]}",
            spacing=geometry["spacing"],
        )
        sharpness = ""
        if count and networks.power:
            share = power / count / networks.power
            sharpness = f"; fine spectral power {share:.2f} of the reconstructions'"
        volumes = counted(args.num, "volume{s}")
        run.say(f"inference: {volumes} in {output_dir}{sharpness}\n  {output_dir / 'samples.png'}")


if __name__ == "__main__":
    main()
