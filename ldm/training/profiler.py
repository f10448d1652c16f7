"""Profile a few steps of a training."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ldm import UserError
from ldm.system.ranks import Run


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
    run.print(f"profile: {path} (open in chrome://tracing or ui.perfetto.dev)")
