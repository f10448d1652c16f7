"""Which memory layout and precision a CPU computes in fastest, by its instructions.

    python -m benchmarks.layouts                                # the networks of the demo, three sets of them
    python -m benchmarks.layouts -c config/config_t1_2mm.json --side 80 --isa AVX2 --rounds 5

Prints a table: seconds of a training step of each stage and of an evaluation of the UNet and a decoding as in
sampling, in torch's own layout and channels last, in float32 and bfloat16. Each set of instructions is a
separate process, in which oneDNN, which computes the convolutions, uses no more than these
(ONEDNN_MAX_CPU_ISA); DEFAULT is all that the CPU has. `ldm.system.instructions` holds the rule that follows.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import torch

import utils
from benchmarks import measure
from ldm import configs
from ldm.models.definitions import latent_size
from ldm.models.denoiser import example_cond, predict
from ldm.training.step import Optimizer

INSTRUCTIONS = ["DEFAULT", "AVX512_CORE", "AVX2"]
PARTS = ["autoencoder step", "diffusion step", "UNet evaluation", "decoding"]
LAYOUTS = {"own": torch.contiguous_format, "last": torch.channels_last_3d}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def call_of(part: str, config: dict, side: int, layout: str, dtype: str) -> Callable[[], object]:
    """One step or evaluation on random numbers; the losses are mean squares."""
    torch.manual_seed(0)
    stage = "autoencoder" if part in ("autoencoder step", "decoding") else "diffusion"
    section = config[f"{stage}_train"]
    network = configs.define_network(config, f"{stage}_def").to(memory_format=LAYOUTS[layout])
    latents = torch.randn(section["batch_size"], config["latent_channels"], *latent_size(config, [side] * 3))
    images = torch.rand(section["batch_size"], config["image_channels"], *[side] * 3)
    times = torch.rand(section["batch_size"]) * 1000
    cond = example_cond(config["diffusion_def"], section["batch_size"], latents.shape[2:])
    half = torch.autocast("cpu", DTYPES[dtype], enabled=DTYPES[dtype] is not None)

    @torch.inference_mode()
    def evaluate() -> None:
        with half:
            network.decode(latents) if stage == "autoencoder" else predict(network, latents, times, cond)

    if not part.endswith("step"):
        network.eval()
        return evaluate
    optimizer = Optimizer(network, section, DTYPES[dtype])

    def step() -> None:
        with half:
            target = images if stage == "autoencoder" else latents
            autoencodes = stage == "autoencoder"
            output = network(images)[0] if autoencodes else predict(network, latents, times, cond)
        optimizer.backward((output.float() - target).square().mean())
        optimizer.clip()
        optimizer.step(1e-4, torch.zeros((), dtype=torch.double))

    return step


def measure_here(args: argparse.Namespace, config: dict) -> None:
    """Print the rows of the table for the instructions of this process."""
    kinds, device = list(itertools.product(LAYOUTS, args.dtypes)), torch.device("cpu")
    for part in args.parts:
        works = {
            kind: measure.Work(((call_of(part, config, args.side, *kind), 1),), measure.read_flags())
            for kind in kinds
        }
        times = measure.alternate(works, args.rounds, device)
        cells = [f"{sorted(times[kind])[args.rounds // 2]:.3g} ({min(times[kind]):.3g})" for kind in kinds]
        print(f"| {os.environ['ONEDNN_MAX_CPU_ISA']} | {part} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-c", "--config-file", default=str(utils.ROOT / "config" / "config_demo.json"), help="networks")
    add("--side", type=int, default=48, help="voxels along each side of a volume")
    add("--isa", nargs="+", default=INSTRUCTIONS, help="values of ONEDNN_MAX_CPU_ISA; default: three")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    add("--rounds", type=int, default=3, help="of each, in alternation")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return measure_here(args, utils.load_config(args.config_file, []))
    print(", ".join(f"{key} {value}" for key, value in measure.machine(torch.device("cpu")).items()))
    print(f"seconds: median of {args.rounds} rounds (minimum)\n")
    titles = [f"{layout}, {dtype}" for layout, dtype in itertools.product(LAYOUTS, args.dtypes)]
    print(f"| instructions | | {' | '.join(titles)} |\n{'|---' * (2 + len(titles))}|", flush=True)
    for isa in args.isa:
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        subprocess.run([sys.executable, "-m", "benchmarks.layouts", *sys.argv[1:], "--here"], env=environment)


if __name__ == "__main__":
    main()
