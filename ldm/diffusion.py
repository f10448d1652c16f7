"""The noise process, what the network learns of it, and the samplers.

`NoiseProcess` holds one of two families, whose signal and noise levels give z_t = a(t) z_0 + s(t) noise:

    discrete    a^2 = prod(1 - beta), s^2 = 1 - a^2, t = 0 .. T-1      (Ho et al., 2020)
    flow        a = 1 - t/T, s = t/T, 0 < t <= T                       (Liu et al., 2023; Lipman et al., 2023)
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from ldm import UserError
from ldm.networks import SCHEDULERS, instantiate

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Arguments of a scheduler named by `_target_` that nothing here follows: the value of what is done anyway,
# and why no other is.
FIXED = {
    "clip_sample_min": (-1.0, "latents are not clipped"),
    "clip_sample_max": (1.0, "latents are not clipped"),
    "variance_type": ("fixed_small", "--sampler ddpm draws with the variance of the posterior"),
    "set_alpha_to_one": (True, "samplers end at the clean end"),
    "steps_offset": (0, "samplers go through the times that were trained on"),
    "skip_prk_steps": (True, "--sampler pndm begins without Runge-Kutta steps"),
    "use_discrete_timesteps": (False, "the times of rectified flow are real numbers"),
}
FIXED_FOR = {  # those that matter only beside another one
    "use_timestep_transform": {
        "transform_scale": (1.0, "MONAI does not use it. Schedule rectified_flow has `shift` for that"),
        "spatial_dim": (3, "volumes have three axes"),
    },
    "sample_method": {
        "loc": (0.0, "logit_normal has location 0 and scale 1"),
        "scale": (1.0, "logit_normal has location 0 and scale 1"),
    },
}


def check_scheduler(section: dict, sampling: str) -> str:
    """Whether the options of the config's `NoiseScheduler` are followed, where `_target_` names a scheduler.

    MONAI's `clip_sample` is the exception: it may stand there, as it does in published configs, and is not
    followed, since it cuts latents of unit variance at 1.

    Args:
        sampling: `diffusion_train.timestep_sampling`.

    Returns:
        `sampling`, or what the scheduler's `sample_method` says instead.

    Raises:
        UserError: an option that would change nothing; it says what is done.
    """
    fixed, method = dict(FIXED), section.get("sample_method")
    if section.get("use_timestep_transform"):
        fixed |= FIXED_FOR["use_timestep_transform"]
        if section.get("base_img_size_numel", 1) < 1:
            raise UserError("NoiseScheduler.base_img_size_numel: a number of voxels is above 0.")
    if method == "logit-normal":
        fixed |= FIXED_FOR["sample_method"]
    for key in section.keys() & fixed.keys():
        value, why = fixed[key]
        if section[key] != value:
            raise UserError(
                f"NoiseScheduler.{key}: {json.dumps(section[key])} would change nothing: {why}. Set it to "
                f"{json.dumps(value)} or leave it out."
            )
    if method == "uniform" and sampling != "uniform":
        raise UserError(
            f"NoiseScheduler.sample_method is uniform, diffusion_train.timestep_sampling {sampling}. Leave "
            "one of them out."
        )
    return "logit_normal" if method == "logit-normal" else sampling


class NoiseProcess:
    """A noise schedule and the target of the network under it.

    Args:
        alphas_cumprod: a^2 at t = 0 .. T-1, (T,), or None for the straight paths of rectified flow.
        prediction: "epsilon", "v_prediction", "sample", or "velocity" with rectified flow.
        num_train_timesteps: T; with rectified flow only the scale of the time that the network sees.
        shift: of rectified flow: times t/T become shift t / (1 + (shift - 1) t), in training and sampling
            (Esser et al., 2024, eq. 23); above 1 spends more of them on noise, as large volumes need.

    Raises:
        UserError: signal or noise level 0 at a time that is trained on.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor | None,
        prediction: str,
        num_train_timesteps: int,
        shift: float = 1.0,
    ):
        self.alphas_cumprod = None if alphas_cumprod is None else alphas_cumprod.double()
        self.prediction, self.num_train_timesteps, self.shift = prediction, num_train_timesteps, shift
        if not self.is_flow and not ((self.alphas_cumprod > 0) & (self.alphas_cumprod < 1)).all():
            raise UserError(
                f"NoiseScheduler: over {num_train_timesteps} steps this schedule leaves no signal, or adds "
                "no noise. Change num_train_timesteps or the betas."
            )
        if not self.is_flow:
            # log a^2 at t = -1 .. T-1, between which it is interpolated, as Lu et al., 2022, do: (T + 1,)
            logs = self.alphas_cumprod.log()
            self.log_squared_signal = torch.cat([logs.new_zeros(1), logs])
            self.log_squared_signals = {}  # by device: a copy at each step would have to be waited for

    @classmethod
    def from_config(cls, section: dict, size: Sequence[int] | None = None) -> "NoiseProcess":
        """Build from the config's `NoiseScheduler`, with its defaults.

        The betas are those of MONAI's schedules. Raises UserError for what does not go together.

        Args:
            size: of the latents, (d, h, w), from which RFlowScheduler's `use_timestep_transform` has its
                shift. None: without it, as this project once trained under such a config.
        """
        if "_target_" in section:
            scheduler = instantiate(section, SCHEDULERS, "NoiseScheduler")
            return cls._from_scheduler(scheduler, section["_target_"], size)
        steps, prediction = section["num_train_timesteps"], section["prediction_type"]
        is_flow = section["schedule"] == "rectified_flow"
        prediction = prediction or ("velocity" if is_flow else "epsilon")
        if (prediction == "velocity") != is_flow:
            raise UserError(
                f"NoiseScheduler: prediction_type {prediction} does not go with schedule "
                f"{section['schedule']}; velocity and rectified_flow go with each other only."
            )
        if is_flow:
            if section["zero_terminal_snr"]:
                raise UserError("NoiseScheduler.zero_terminal_snr: rectified_flow ends in noise as it is.")
            return cls(None, prediction, steps, section["shift"])
        if section["shift"] != 1:
            raise UserError("NoiseScheduler.shift: goes with schedule rectified_flow only.")
        betas = (
            {}
            if section["schedule"] == "cosine"
            else {key: section[key] for key in ("beta_start", "beta_end")}
        )
        scheduler = DDPMScheduler(steps, schedule=section["schedule"], **betas)
        alphas_cumprod = scheduler.alphas_cumprod.double()
        if section["zero_terminal_snr"]:
            if prediction == "epsilon":
                raise UserError(
                    "NoiseScheduler.zero_terminal_snr: with prediction_type epsilon the network would be "
                    "asked for what it is given. Use v_prediction or sample."
                )
            alphas_cumprod = _to_zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, prediction, steps)

    @classmethod
    def _from_scheduler(cls, scheduler: nn.Module, target: str, size: Sequence[int] | None) -> "NoiseProcess":
        if hasattr(scheduler, "alphas_cumprod"):
            kind = str(getattr(scheduler, "prediction_type", "epsilon"))
            return cls(scheduler.alphas_cumprod, kind, scheduler.num_train_timesteps)
        if type(scheduler).__name__ == "RFlowScheduler":
            shift = 1.0
            if scheduler.use_timestep_transform and size is not None:  # MONAI's `timestep_transform`
                shift = (math.prod(size) / scheduler.base_img_size_numel) ** (1 / len(size))
            return cls(None, "velocity", scheduler.num_train_timesteps, shift)
        raise UserError(f"NoiseScheduler._target_: {target} has neither a beta schedule nor straight paths.")

    @property
    def is_flow(self) -> bool:
        """Whether the paths are those of rectified flow."""
        return self.alphas_cumprod is None

    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise level a(t), s(t) at times t, whole or not, in float64. t = -1 is the clean end of
        a discrete schedule."""
        if self.is_flow:
            s = t.double() / self.num_train_timesteps
            return 1 - s, s
        if t.device not in self.log_squared_signals:
            self.log_squared_signals[t.device] = self.log_squared_signal.to(t.device)
        logs = self.log_squared_signals[t.device]
        place = (t.double() + 1).clamp(0, self.num_train_timesteps)  # index 0 is t = -1
        below = place.long().clamp(max=self.num_train_timesteps - 1)
        log = torch.lerp(logs[below], logs[below + 1], place - below)
        return (log / 2).exp(), (-torch.expm1(log)).sqrt()

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        """lambda = log(a / s) at times t, in float64; infinite at the clean end."""
        a, s = self.levels(t)
        return a.log() - s.log()

    def draw_times(self, uniform: torch.Tensor, sampling: str = "uniform") -> torch.Tensor:
        """Training times of draws from U[0, 1): integers 0 .. T-1, or reals in (0, T] with rectified flow."""
        if sampling == "logit_normal":  # Esser et al., 2024, eq. 19
            uniform = torch.special.expit(torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)))
        if self.is_flow:
            return (self.num_train_timesteps * self._shifted(1 - uniform.double())).float()
        return (uniform.double() * self.num_train_timesteps).long()

    def _shifted(self, share: torch.Tensor) -> torch.Tensor:
        return self.shift * share / (1 + (self.shift - 1) * share)

    def add_noise(self, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """z_t of clean latents (B, c, d, h, w) at times (B,)."""
        a, s = self._broadcast(t, z0)
        return a * z0 + s * noise

    def target(self, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should predict at z_t."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return z0
        if self.prediction == "velocity":  # d z / d(a), towards the data, as MONAI's RFlowScheduler has it
            return z0 - noise
        a, s = self._broadcast(t, z0)
        return a * noise - s * z0  # v_prediction, Salimans & Ho, 2022

    def min_snr_weight(self, t: torch.Tensor, gamma: float) -> torch.Tensor:
        """Weight of the squared error of the prediction at times (B,), with which the error of z_0 has weight
        min(SNR, gamma) (Hang et al., 2023, eq. 8), float32."""
        a, s = self.levels(t)
        snr = (a / s) ** 2
        # How much larger the squared error of the prediction is than that of z_0.
        larger = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1, "velocity": 1 / s**2}
        return (snr.clamp(max=gamma) / larger[self.prediction]).float()

    def clean_and_noise(self, output: torch.Tensor, zt: torch.Tensor, t: torch.Tensor):
        """The estimates of z_0 and of the noise that a prediction at z_t amounts to."""
        a, s = self._broadcast(t, zt)
        if self.prediction == "epsilon":
            return (zt - s * output) / a, output
        if self.prediction == "sample":
            return output, (zt - a * output) / s
        if self.prediction == "velocity":
            return zt + s * output, zt - a * output
        return a * zt - s * output, s * zt + a * output

    def _broadcast(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1,) + (1,) * (like.ndim - 1)
        return tuple(level.to(like.dtype).reshape(shape) for level in self.levels(t))

    def sampling_times(self, steps: int, even: str = "time") -> torch.Tensor:
        """Times of a sampler with this many steps, from pure noise on, and the clean end: (steps + 1,).

        Args:
            even: what the times are even in, "time" or "log_snr" (of a discrete schedule). They are not
                rounded, which would cost a solver its order.
        """
        if self.is_flow:
            shares = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            return self.num_train_timesteps * self._shifted(shares)
        if steps > self.num_train_timesteps:
            raise UserError(
                f"--steps {steps}: the model was trained with {self.num_train_timesteps} time steps."
            )
        times = torch.linspace(self.num_train_timesteps - 1, 0, steps, dtype=torch.float64)
        if even == "log_snr":
            grid = torch.arange(self.num_train_timesteps, dtype=torch.float64)
            known = self.log_snr(grid)  # falls as t grows
            wanted = torch.linspace(known[-1], known[0], steps, dtype=torch.float64)
            log = -torch.log1p((-2 * wanted).exp())  # of a^2 = 1 / (1 + e^(-2 lambda))
            logs = self.log_squared_signal[1:]
            times = torch.from_numpy(np.interp(log, logs.flip(0), grid.flip(0)))
        return torch.cat([times, times.new_full((1,), -1)])


def _to_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Move a schedule's a so that the last is 0 and the first as it was (Lin et al., 2024, alg. 1). For 0
    stands half of the one before it, so that log(a / s) is finite."""
    a = alphas_cumprod.sqrt()
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return torch.cat([a[:-1], a[-2:-1] / 2]).square()


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
) -> torch.Tensor:
    """Draw one latent a seed: (len(seeds), *shape), float32.

    Each seed has a random stream of its own, so that a sample depends neither on the batch it is drawn in nor
    on the device. `progress` wraps the list of steps, for a progress bar.
    """
    chosen = SAMPLERS[choose_sampler(sampler, process)]
    times = process.sampling_times(steps, chosen.even)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)
    return chosen.solve(model, process, x, times, generators, progress)
