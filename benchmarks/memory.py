"""Predicted against measured peak memory, on the GPU or, where there is none, on this CPU (Linux).

    python benchmarks/memory.py                       # the cases below
    python benchmarks/memory.py autoencoder 1 96 96 96 --amp --config config/config_t1_2mm.json

What is measured is what is predicted: the rehearsal of the script, once with values. Each case runs in a
process of its own. On a GPU it is `torch.cuda.max_memory_allocated`, on a CPU the peak of the resident set
less what it was before there was a network.
"""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_autoencoder  # noqa: E402
import train_diffusion  # noqa: E402
import utils  # noqa: E402
from ldm.memory import GB, Forecast, take_steps  # noqa: E402
from ldm.processes import Run  # noqa: E402

BRATS, SMALL = "config/config_train_16g.json", "config/config_t1_2mm.json"
ON_GPU = [
    f"{stage} {batch} {size} --amp --config {BRATS}"
    for stage, size in (("autoencoder", "112 128 80"), ("diffusion", "144 176 112"))
    for batch in (1, 2)
]
ON_CPU = [
    f"autoencoder 2 80 96 80 --config {SMALL}",
    f"autoencoder 2 80 96 80 --amp --config {SMALL}",
    f"diffusion 32 80 96 80 --config {SMALL}",
    f"autoencoder 1 64 64 64 --config {BRATS}",
    f"autoencoder 1 64 64 64 --amp --config {BRATS}",
]


class Ruler:
    """Stands in for `ldm.memory.Meter`, with values: {phase: bytes} in `peaks`."""

    def __init__(self, device: torch.device):
        self.device, self.peaks = device, {}

    def __enter__(self):
        self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *error):
        pass

    def hold(self, part, *modules):
        pass

    def hold_steppers(self, steppers):
        for stepper in steppers:
            for parameter in stepper.parameters:
                parameter.grad = torch.zeros_like(parameter)
            take_steps([stepper])

    @contextlib.contextmanager
    def phase(self, name):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peaks[name] = torch.cuda.max_memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            yield
            self.peaks[name] = self._resident("VmHWM") - self.before

    def _resident(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def compare(argv: list[str]) -> None:
    """One case: a line of predicted and measured GB of each phase above 0.1 GB."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=["autoencoder", "diffusion"])
    parser.add_argument("numbers", type=int, nargs=4, help="batch, and voxels along each axis")
    parser.add_argument("--config", default=SMALL)
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, *size = args.numbers
    stage = f"{args.stage}_train"
    keys = {f"{stage}.batch_size": batch, f"{stage}.amp": "true" if args.amp else "false"}
    keys |= {f"{one}_train.patch_size": size for one in ("autoencoder", "diffusion")}
    keys |= {"autoencoder_train.perceptual_weight": 0, "diffusion_train.val_times": 1}
    config = utils.load_config(ROOT / args.config, [f"{key}={value}" for key, value in keys.items()])
    sizes = utils.patch_sizes(config, [])
    half = utils.amp_dtype(device) if args.amp else None
    rehearse = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}[args.stage].rehearse
    predicted = Forecast(rehearse, stage, sizes, device.type == "cuda", half).peaks(config)
    ruler = Ruler(device)
    rehearse(config, sizes, ruler, Run(0, 1, device, half))
    for phase, measured in ruler.peaks.items():
        peak = predicted[phase]
        print(
            f"| {' '.join(argv)} | {phase} | {peak.tensors / GB:.2f} | {peak.total / GB:.2f} | "
            f"{measured / GB:.2f} | {peak.total / measured - 1:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:]:
        compare(sys.argv[1:])
    else:
        print("| case | phase | tensors | with workspace | measured, GB | off |\n|---|---|---|---|---|---|")
        for case in ON_GPU if torch.cuda.is_available() else ON_CPU:
            subprocess.run([sys.executable, __file__, *case.split()], check=True)
