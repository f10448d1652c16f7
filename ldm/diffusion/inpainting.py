"""Redraw a region of an image and keep the rest."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ldm.data.datasets import stream
from ldm.diffusion.process import NoiseProcess


def region_of_latents(region: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The latent voxels that hold a voxel of a region: (D, H, W) bool -> (1, 1, d, h, w) float32."""
    return nn.functional.adaptive_max_pool3d(region[None, None].float(), tuple(size))


@torch.no_grad()
def inpaint(
    model: Callable,
    process: NoiseProcess,
    known: torch.Tensor,
    region: torch.Tensor,
    seed: int,
    steps: int,
    resamples: int,
    progress: Callable = iter,
) -> torch.Tensor:
    """Sample latents inside a region, given those outside (Lugmayr et al., "RePaint", 2022, alg. 1).

    After each deterministic step, the latents outside are those of the image, with the noise of that time.
    Each step is made `resamples` times, with noise added in between that leads back to its start, so that
    both sides come to fit.

    Args:
        model: (z_t, t) -> the prediction.
        known: latents of the image, (1, c, d, h, w), of unit variance.
        region: 1 where latents are drawn, (1, 1, d, h, w).
        seed: of all noise.

    Returns:
        Latents, (1, c, d, h, w): outside the region those of the image.
    """
    generator = stream(seed, "inpaint")

    def noise() -> torch.Tensor:
        return torch.randn(known.shape, generator=generator).to(known)

    times = process.sampling_times(steps)
    x = noise()
    for now, after in progress(list(zip(times[:-1], times[1:], strict=True))):
        (a, s), (a_after, s_after) = (
            tuple(level.item() for level in process.levels(one)) for one in (now, after)
        )
        for again in range(resamples):
            if again:  # back to the start of the step
                back = (s**2 - (a / a_after) ** 2 * s_after**2) ** 0.5
                x = a / a_after * x + back * noise()
            t = torch.full((1,), now.item(), device=known.device)
            z0, own_noise = process.clean_and_noise(model(x, t), x, t)
            x = a_after * z0 + s_after * own_noise
            x = region * x + (1 - region) * (a_after * known + s_after * noise())
            if not s_after:
                break
    return x
