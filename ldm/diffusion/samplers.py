"""The samplers: from noise to latents."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ldm import UserError
from ldm.diffusion.process import NoiseProcess

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _noise_like(x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    draws = [torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generators]
    return torch.stack(draws).to(x)


def _steps(process: NoiseProcess, times: torch.Tensor, progress) -> Iterator[tuple]:
    """For each step: its time, and the levels a, s here and at the next time."""
    pairs = list(zip(times[:-1], times[1:], strict=True))
    for t, nxt in progress(pairs):
        yield t, *(tuple(level.item() for level in process.levels(time)) for time in (t, nxt))


def _at(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.full((len(x),), t.item(), dtype=t.dtype, device=x.device)  # a copy would be waited for


def sample_ddpm(model: Model, process: NoiseProcess, x, times, generators, progress=iter) -> torch.Tensor:
    """Ancestral sampling (Ho et al., 2020, alg. 2), with the posterior between the times actually visited."""
    for t, (a, s), (a_next, s_next) in _steps(process, times, progress):
        z0, _ = process.clean_and_noise(model(x, _at(t, x)), x, _at(t, x))
        ratio = a / a_next  # sqrt of alpha between the two times
        variance = s_next**2 / s**2 * (1 - ratio**2)
        x = a_next * (1 - ratio**2) / s**2 * z0 + ratio * s_next**2 / s**2 * x
        if s_next:
            x = x + variance**0.5 * _noise_like(x, generators)
    return x


def sample_ddim(
    model: Model, process: NoiseProcess, x, times, generators=None, progress=iter
) -> torch.Tensor:
    """Deterministic DDIM (Song et al., 2021, eq. 12 with eta 0), to the true next time. First order."""
    for t, _, (a_next, s_next) in _steps(process, times, progress):
        z0, noise = process.clean_and_noise(model(x, _at(t, x)), x, _at(t, x))
        x = a_next * z0 + s_next * noise
    return x


# Adams and Bashforth's weights of the last predictions of the noise, newest first: Liu et al., 2022, eq. 12.
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def sample_pndm(
    model: Model, process: NoiseProcess, x, times, generators=None, progress=iter
) -> torch.Tensor:
    """Pseudo linear multistep (Liu et al., 2022), begun with as many predictions as there are: second order,
    and at the start no better than that."""
    noises = []
    for t, (a, s), (a_next, s_next) in _steps(process, times, progress):
        _, noise = process.clean_and_noise(model(x, _at(t, x)), x, _at(t, x))
        noises = [noise, *noises[:3]]
        weights = ADAMS_BASHFORTH[len(noises) - 1] if s_next else (1,)
        noise = sum(weight * one for weight, one in zip(weights, noises, strict=False))
        x = a_next / a * (x - s * noise) + s_next * noise
    return x


def sample_dpmpp_2m(
    model: Model, process: NoiseProcess, x, times, generators=None, progress=iter
) -> torch.Tensor:
    """DPM-Solver++ (2M), deterministic (Lu et al., 2022b, alg. 2). Second order."""
    return _multistep(model, process, x, times, progress, corrected=False)


def sample_unipc(
    model: Model, process: NoiseProcess, x, times, generators=None, progress=iter
) -> torch.Tensor:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al., 2023, alg. 5 and 7): the step of DPM-Solver++ (2M), corrected
    by the prediction at its end, which the next step needs in any case. Third order."""
    return _multistep(model, process, x, times, progress, corrected=True)


def _multistep(model: Model, process: NoiseProcess, x, times, progress, corrected: bool) -> torch.Tensor:
    """x' = s'/s x + a' (1 - e^-h) D with h = lambda' - lambda, and D the mean of z_0 on the way: of the line
    through the last two predictions, or, corrected, of the parabola through them and the one at the end."""
    before = correct = None  # (lambda, z_0) of the step before; what makes its end better
    for t, (a, s), (a_next, s_next) in _steps(process, times, progress):
        z0, _ = process.clean_and_noise(model(x, _at(t, x)), x, _at(t, x))
        if corrected and correct:
            x = correct(z0)
        if not s_next:
            return z0  # h is infinite
        here = math.log(a / s)
        h = math.log(a_next / s_next) - here
        back, slope = None, 0.0  # where the one before lies, if this step is 0 .. 1
        if before:
            back = (before[0] - here) / h
            slope = (before[1] - z0) / back
        start, gain = s_next / s * x, -a_next * math.expm1(-h)
        correct = functools.partial(_corrected, start, gain, z0, slope, back, h)
        before, x = (here, z0), start + gain * (z0 + slope / 2)
    return x


def _corrected(start, gain: float, z0, slope, back: float | None, h: float, z0_next) -> torch.Tensor:
    """The end of a step again, now that the prediction there is known (UniC, eq. 8 and 9)."""
    rise = z0_next - z0
    if back is None:
        return start + gain * (z0 + rise / 2)
    # Weights w of the differences D_k = (z_0(r_k) - z_0) / r_k that are exact for polynomials: sum of
    # w_k r_k^(i-1) = b_i, with b_i = i! phi_(i+1)(-h) / B(-h) over the r of the one before and of the end, 1.
    first = (math.expm1(-h) / -h - 1) / math.expm1(-h)
    second = 2 * ((math.expm1(-h) / -h - 1) / -h - 1 / 2) / math.expm1(-h)
    w_back = (first - second) / (1 - back)
    return start + gain * (z0 + w_back * slope + (first - w_back) * rise)


def sample_euler(
    model: Model, process: NoiseProcess, x, times, generators=None, progress=iter
) -> torch.Tensor:
    """Euler steps along the velocity field of rectified flow. First order."""
    for t, nxt in progress(list(zip(times[:-1], times[1:], strict=True))):
        x = x + model(x, _at(t, x).to(x.dtype)) * ((t - nxt).item() / process.num_train_timesteps)
    return x


def sample_heun(
    model: Model, process: NoiseProcess, x, times, generators=None, progress=iter
) -> torch.Tensor:
    """Heun steps along the velocity field of rectified flow, two predictions each, but one in the last, since
    the network knows no time 0 (Karras et al., 2022, alg. 1). Second order."""
    for t, nxt in progress(list(zip(times[:-1], times[1:], strict=True))):
        size = (t - nxt).item() / process.num_train_timesteps
        velocity = model(x, _at(t, x).to(x.dtype))
        if nxt:
            velocity = (velocity + model(x + size * velocity, _at(nxt, x).to(x.dtype))) / 2
        x = x + size * velocity
    return x


@dataclass(frozen=True)
class Sampler:
    """A way from noise to latents.

    Args:
        solve: `solve(model, process, x, times, generators, progress)`.
        for_flow: whether it is for rectified flow, else for discrete schedules.
        even: what its times are even in, see `NoiseProcess.sampling_times`.
        steps: where none are given; None: all of the training's.
    """

    solve: Callable
    for_flow: bool
    even: str
    steps: int | None


SAMPLERS = {  # the first of each family is its default; docs/PERFORMANCE.md says what each reaches
    "dpmpp_2m": Sampler(sample_dpmpp_2m, False, "log_snr", 30),
    "unipc": Sampler(sample_unipc, False, "log_snr", 30),
    "ddim": Sampler(sample_ddim, False, "time", 250),
    "pndm": Sampler(sample_pndm, False, "time", 50),
    "ddpm": Sampler(sample_ddpm, False, "time", None),
    "heun": Sampler(sample_heun, True, "time", 25),
    "euler": Sampler(sample_euler, True, "time", 100),
}


def choose_sampler(name: str | None, process: NoiseProcess) -> str:
    """This sampler, or the default of the process.

    Raises:
        UserError: a sampler that does not fit the trained process.
    """
    fitting = [one for one, sampler in SAMPLERS.items() if sampler.for_flow == process.is_flow]
    if name is not None and name not in fitting:
        kind = "rectified flow" if process.is_flow else f"a beta schedule ({process.prediction})"
        raise UserError(
            f"--sampler {name} does not fit: the model was trained with {kind}. Use {' or '.join(fitting)}."
        )
    return name or fitting[0]


def sample_latents(
    model: Model,
    process: NoiseProcess,
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    sampler: str | None = None,
    device: torch.device | str = "cpu",
    progress=iter,
    slicewise: bool = False,
) -> torch.Tensor:
    """Draw one latent a seed: (len(seeds), *shape), float32.

    Each seed has a random stream of its own, so that a sample depends neither on the batch it is drawn in nor
    on the device. `progress` wraps the list of steps, for a progress bar. With `slicewise`, for 2D networks,
    all slices of a volume begin with the same noise, so that they change little from one to the next.
    """
    chosen = SAMPLERS[choose_sampler(sampler, process)]
    times = process.sampling_times(steps, chosen.even)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)
    x = x[..., :1].expand_as(x) if slicewise else x
    return chosen.solve(model, process, x, times, generators, progress)
