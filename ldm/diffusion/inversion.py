"""From latents back to the noise that a sampler makes them of."""

from collections.abc import Sequence

import torch

from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import SAMPLERS, Model

ITERATIONS = 4  # of each step


def inverting_sampler(process: NoiseProcess) -> str:
    """The sampler whose steps are inverted: one that is deterministic and looks at one time only."""
    return "heun" if process.is_flow else "ddim"


@torch.no_grad()
def invert(
    model: Model, process: NoiseProcess, latents: torch.Tensor, times: torch.Tensor, progress=iter
) -> torch.Tensor:
    """The noise from which `inverting_sampler` gives these latents (B, c, d, h, w), float32.

    Each step x -> y of the sampler is solved for x by iterating x <- y - (step(x) - x) (Pan et al., 2023,
    AIDI), from the last to the first. Where the iteration has not converged, sampling from the result gives
    other latents: compare them.

    Args:
        times: those of the sampler, from noise on, as of `NoiseProcess.sampling_times`.
        progress: wraps the list of steps, for a progress bar.
    """
    solve = SAMPLERS[inverting_sampler(process)].solve
    pairs: Sequence = list(zip(times[:-1], times[1:], strict=True))[::-1]
    y = latents
    for t, nxt in progress(pairs):
        x, step = y, torch.stack([t, nxt])
        for _ in range(ITERATIONS):
            x = y - (solve(model, process, x, step, None) - x)
        y = x
    return y
