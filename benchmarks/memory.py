"""Predicted and measured peak memory, on the GPU or, without one, on this CPU (Linux).

    python -m benchmarks.memory                       # the cases below
    python -m benchmarks.memory autoencoder 1 96 96 96 --amp --config config/config_t1_2mm.json

Both run the rehearsal of the training script, the measurement with real tensors, in separate processes. On a
GPU it measures `torch.cuda.max_memory_allocated`, on a CPU the peak of the resident set minus its size before
the networks were built; freed memory that the C library keeps is returned before each phase.
"""

import argparse
import contextlib
import ctypes
import multiprocessing
import sys

import torch

import train_autoencoder
import train_diffusion
import utils
from benchmarks.measure import forget_peak, resident
from ldm.data.prepare import patch_sizes
from ldm.system import ranks
from ldm.system.ranks import Run
from ldm.training.memory import GB, Forecast, Peak, take_steps

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


class MeasuringMeter:
    """Measures where `ldm.training.memory.Meter` predicts: {phase: bytes} in `peaks`."""

    def __init__(self, device: torch.device):
        self.device, self.peaks = device, {}

    def __enter__(self):
        self._give_back()
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *error):
        pass

    def hold(self, part, *modules):
        pass

    def hold_optimizers(self, steppers):
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
            self._give_back()
            forget_peak()
            yield
            self.peaks[name] = resident("VmHWM") - self.before

    def _give_back(self) -> None:
        """Return the freed memory that glibc keeps, which would distort the next phase."""
        if self.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)


class Case:
    """A stage, its config and precision, from command line words."""

    def __init__(self, argv: list[str]):
        parser = argparse.ArgumentParser()
        parser.add_argument("stage", choices=["autoencoder", "diffusion"])
        parser.add_argument("numbers", type=int, nargs=4, help="batch, and voxels along each axis")
        parser.add_argument("--config", default=SMALL)
        parser.add_argument("--amp", action="store_true")
        args = parser.parse_args(argv)
        batch, *size = args.numbers
        self.stage = f"{args.stage}_train"
        keys = {f"{self.stage}.batch_size": batch, f"{self.stage}.amp": "true" if args.amp else "false"}
        keys |= {f"{one}_train.patch_size": size for one in ("autoencoder", "diffusion")}
        keys |= {"autoencoder_train.perceptual_weight": 0}
        self.config = utils.load_config(
            utils.ROOT / args.config, [f"{key}={value}" for key, value in keys.items()]
        )
        self.sizes = patch_sizes(self.config, [])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.half = ranks.amp_dtype(self.device) if args.amp else None
        self.rehearse = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}[args.stage].rehearse


def predict(argv: list[str]) -> dict[str, Peak]:
    """{phase: Peak}."""
    case = Case(argv)
    gpu = case.device.type == "cuda"
    return Forecast(case.rehearse, case.stage, case.sizes, gpu, case.half).peaks(case.config)


def measure(argv: list[str]) -> dict[str, int]:
    """{phase: bytes}."""
    case = Case(argv)
    meter = MeasuringMeter(case.device)
    case.rehearse(case.config, case.sizes, meter, Run(0, 1, case.device, case.half))
    return meter.peaks


def compare(argv: list[str]) -> None:
    """Print predicted and measured GB of each phase of a case."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        predicted, measured = pool.apply(predict, [argv]), pool.apply(measure, [argv])
    for phase, found in measured.items():
        peak = predicted[phase]
        print(
            f"| {' '.join(argv)} | {phase} | {peak.tensors / GB:.2f} | {peak.total / GB:.2f} | "
            f"{found / GB:.2f} | {peak.total / found - 1:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    shipped = ON_GPU if torch.cuda.is_available() else ON_CPU
    print("| case | phase | tensors | with workspace | measured, GB | error |\n|---|---|---|---|---|---|")
    for case in [sys.argv[1:]] if sys.argv[1:] else map(str.split, shipped):
        compare(case)
