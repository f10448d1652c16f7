"""Alternating timings, peak memory, arithmetic, and a description of the machine."""

import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import monai
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ldm.training.progress import peak_memory_gb

PROC = Path("/proc/self")  # of Linux
LEAST = 0.5  # minimum seconds of one timing
REFERENCE_FLAGS = (True, False, True, False)  # as set by the tutorial and torch; see `read_flags`
PEAK_FLOPS = 790e12  # sustained by an H200-class GPU in bf16 matrix products


@dataclass(frozen=True)
class Work:
    """Something to measure.

    Args:
        parts: calls and their weights: 10 steps that stand for 1000 have weight 100.
        flags: of torch.backends, as `read_flags` gives them.
    """

    parts: tuple[tuple[Callable[[], object], float], ...]
    flags: tuple[bool, bool, bool, bool]

    def seconds(self, device: torch.device) -> float:
        """Time of all parts, including the wait for the device."""
        write_flags(self.flags)
        total = 0.0
        for call, count in self.parts:
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            total += count * (time.perf_counter() - start)
        return total

    def flops(self) -> float:
        """Floating point operations of all parts; see `count_flops`."""
        write_flags(self.flags)
        total = 0.0
        with torch.compiler.set_stance("force_eager"):
            for call, count in self.parts:
                total += count * count_flops(call)
        return total


def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of a call's matrix products, convolutions and attention."""
    aten = torch.ops.aten
    on_a_cpu = {  # not counted by torch
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=on_a_cpu) as counter:
        call()
    return counter.get_total_flops()


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_flags() -> tuple[bool, bool, bool, bool]:
    """cuDNN's benchmark and deterministic, TF32 in convolutions and in matrix products."""
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def write_flags(flags: tuple[bool, bool, bool, bool]) -> None:
    """Set what `read_flags` reads."""
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def alternate(works: dict[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work in each round. The order alternates, so that warming up or slowing down favours
    none."""
    counts = {}
    for name, work in works.items():
        work.seconds(device)
        counts[name] = max(1, round(LEAST / work.seconds(device)))
    seconds = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            times = [works[name].seconds(device) for _ in range(counts[name])]
            seconds[name].append(statistics.fmean(times))
    return seconds


def ratio(reference: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians, and smallest and largest ratio of a round."""
    rounds = [a / b for a, b in zip(reference, ours, strict=True)]
    return statistics.median(reference) / statistics.median(ours), min(rounds), max(rounds)


# ---------------------------------------------------------------- memory


def peak_on_gpu(build: Callable[[], Work], device: torch.device) -> tuple[Work, float]:
    """A work, and its peak memory in bytes above what was allocated before it was built."""
    before = torch.cuda.memory_allocated(device)
    work = build()
    for warm in (True, False):  # cuDNN tries kernels in the first run
        if not warm:
            torch.cuda.reset_peak_memory_stats(device)
        work.seconds(device)
    return work, torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(build: Callable[..., Work], *arguments) -> float:
    """Peak memory of a work in bytes, with its networks, in a separate process; NaN on Windows.

    Args:
        build: a module-level function, called with `arguments`.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak, torch.get_num_threads(), build, *arguments).result()


def forget_peak() -> None:
    """Reset `resident("VmHWM")`, on Linux."""
    if (forget := PROC / "clear_refs").exists():
        forget.write_text("5")


def resident(key: str) -> int:
    """Bytes of VmRSS, the resident set of this process, or of VmHWM, its peak, on Linux."""
    lines = (PROC / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _peak(threads: int, build: Callable[..., Work], *arguments) -> float:
    torch.set_num_threads(threads)
    forget_peak()  # of the imports; where this is impossible it is the smallest peak that can be measured
    before = _high_water()
    work = build(*arguments)
    for _ in range(2):  # the second run starts with the state of the optimiser
        work.seconds(torch.device("cpu"))
    return _high_water() - before


def _high_water() -> float:
    return 1e9 * peak_memory_gb(torch.device("cpu"))


# ---------------------------------------------------------------- machine


def machine(device: torch.device) -> dict:
    """Hardware and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
    }
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    return about


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


@contextlib.contextmanager
def flags_kept() -> Iterator[None]:
    """Restore torch's flags afterwards."""
    before = read_flags()
    try:
        yield
    finally:
        write_flags(before)
