"""The noise process, what the network learns of it, and the samplers.

`NoiseProcess` holds one of two families, whose signal and noise levels give z_t = a(t) z_0 + s(t) noise:

    discrete    a^2 = prod(1 - beta), s^2 = 1 - a^2, t = 0 .. T-1      (Ho et al., 2020)
    flow        a = 1 - t/T, s = t/T, 0 < t <= T                       (Liu et al., 2023; Lipman et al., 2023)
"""

from collections.abc import Callable, Sequence

import torch
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from ldm import UserError
from ldm.networks import SCHEDULERS, instantiate

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NoiseProcess:
    """A noise schedule and the target of the network under it.

    Args:
        alphas_cumprod: a^2 at t = 0 .. T-1, (T,), or None for the straight paths of rectified flow.
        prediction: "epsilon", "v_prediction", "sample", or "velocity" with rectified flow.
        num_train_timesteps: T; with rectified flow only the scale of the time that the network sees.

    Raises:
        UserError: signal or noise level 0 at a time that is trained on.
    """

    def __init__(self, alphas_cumprod: torch.Tensor | None, prediction: str, num_train_timesteps: int):
        self.alphas_cumprod = None if alphas_cumprod is None else alphas_cumprod.double()
        self.prediction, self.num_train_timesteps = prediction, num_train_timesteps
        if not self.is_flow and not ((self.alphas_cumprod > 0) & (self.alphas_cumprod < 1)).all():
            raise UserError(
                f"NoiseScheduler: over {num_train_timesteps} steps this schedule leaves no signal, or adds "
                "no noise. Change num_train_timesteps or the betas."
            )

    @classmethod
    def from_config(cls, section: dict) -> "NoiseProcess":
        """Build from the config's `NoiseScheduler`, with its defaults.

        The betas are those of MONAI's schedules. Raises UserError for what does not go together.
        """
        if "_target_" in section:
            return cls._from_scheduler(
                instantiate(section, SCHEDULERS, "NoiseScheduler"), section["_target_"]
            )
        steps, prediction = section["num_train_timesteps"], section["prediction_type"]
        is_flow = section["schedule"] == "rectified_flow"
        prediction = prediction or ("velocity" if is_flow else "epsilon")
        if (prediction == "velocity") != is_flow:
            raise UserError(
                f"NoiseScheduler: prediction_type {prediction} does not go with schedule "
                f"{section['schedule']}; velocity and rectified_flow go with each other only."
            )
        if is_flow:
            return cls(None, prediction, steps)
        betas = (
            {}
            if section["schedule"] == "cosine"
            else {key: section[key] for key in ("beta_start", "beta_end")}
        )
        scheduler = DDPMScheduler(steps, schedule=section["schedule"], **betas)
        return cls(scheduler.alphas_cumprod, prediction, steps)

    @classmethod
    def _from_scheduler(cls, scheduler: nn.Module, target: str) -> "NoiseProcess":
        if hasattr(scheduler, "alphas_cumprod"):
            kind = str(getattr(scheduler, "prediction_type", "epsilon"))
            return cls(scheduler.alphas_cumprod, kind, scheduler.num_train_timesteps)
        if type(scheduler).__name__ == "RFlowScheduler":
            return cls(None, "velocity", scheduler.num_train_timesteps)
        raise UserError(f"NoiseScheduler._target_: {target} has neither a beta schedule nor straight paths.")

    @property
    def is_flow(self) -> bool:
        """Whether the paths are those of rectified flow."""
        return self.alphas_cumprod is None

    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise level a(t), s(t) at times t, in float64. t = -1 is the clean end of a discrete
        schedule."""
        if self.is_flow:
            s = t.double() / self.num_train_timesteps
            return 1 - s, s
        table = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod])  # index 0 is t = -1
        squared = table.to(t.device)[t.long() + 1]
        return squared.sqrt(), (1 - squared).sqrt()

    def draw_times(self, uniform: torch.Tensor, sampling: str = "uniform") -> torch.Tensor:
        """Training times of draws from U[0, 1): integers 0 .. T-1, or reals in (0, T] with rectified flow."""
        if sampling == "logit_normal":  # Esser et al., 2024, eq. 19
            uniform = torch.special.expit(torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)))
        t = uniform.double() * self.num_train_timesteps
        return (self.num_train_timesteps - t).float() if self.is_flow else t.long()

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

    def sampling_times(self, steps: int) -> torch.Tensor:
        """Times of a sampler with this many steps, from pure noise on, and the clean end: (steps + 1,)."""
        if self.is_flow:
            return torch.linspace(self.num_train_timesteps, 0, steps + 1, dtype=torch.float64)
        if steps > self.num_train_timesteps:
            raise UserError(
                f"--steps {steps}: the model was trained with {self.num_train_timesteps} time steps."
            )
        times = torch.linspace(self.num_train_timesteps - 1, 0, steps, dtype=torch.float64).round()
        return torch.cat([times, times.new_full((1,), -1)])


def _noise_like(x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    draws = [torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generators]
    return torch.stack(draws).to(x)


def sample_ddpm(
    model: Model, process: NoiseProcess, x, steps: int, generators, progress=iter
) -> torch.Tensor:
    """Ancestral sampling (Ho et al., 2020, alg. 2), with the posterior between the times actually visited."""
    times = process.sampling_times(steps)
    for t, nxt in progress(list(zip(times[:-1], times[1:], strict=True))):
        batch = t.expand(len(x)).to(x.device)
        z0, _ = process.clean_and_noise(model(x, batch), x, batch)
        (a, s), (a_next, s_next) = (tuple(v.item() for v in process.levels(time)) for time in (t, nxt))
        ratio = a / a_next  # sqrt of alpha between the two times
        variance = s_next**2 / s**2 * (1 - ratio**2)
        x = a_next * (1 - ratio**2) / s**2 * z0 + ratio * s_next**2 / s**2 * x
        if nxt >= 0:
            x = x + variance**0.5 * _noise_like(x, generators)
    return x


def sample_ddim(
    model: Model, process: NoiseProcess, x, steps: int, generators=None, progress=iter
) -> torch.Tensor:
    """Deterministic DDIM (Song et al., 2021, eq. 12 with eta 0), to the true next time."""
    times = process.sampling_times(steps)
    for t, nxt in progress(list(zip(times[:-1], times[1:], strict=True))):
        batch = t.expand(len(x)).to(x.device)
        z0, noise = process.clean_and_noise(model(x, batch), x, batch)
        a_next, s_next = (level.item() for level in process.levels(nxt))
        x = a_next * z0 + s_next * noise
    return x


def sample_euler(
    model: Model, process: NoiseProcess, x, steps: int, generators=None, progress=iter
) -> torch.Tensor:
    """Euler steps along the velocity field of rectified flow, on unrounded times."""
    times = process.sampling_times(steps)
    for t, nxt in progress(list(zip(times[:-1], times[1:], strict=True))):
        batch = t.expand(len(x)).to(x)
        x = x + model(x, batch) * ((t - nxt).item() / process.num_train_timesteps)
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "euler": sample_euler}


def choose_sampler(name: str | None, process: NoiseProcess) -> Callable:
    """The sampler of this name, or the default of the process: `euler` for rectified flow, else `ddim`.

    Raises:
        UserError: a sampler that does not fit the trained process.
    """
    fitting = ["euler"] if process.is_flow else ["ddim", "ddpm"]
    if name is not None and name not in fitting:
        kind = "rectified flow" if process.is_flow else f"a beta schedule ({process.prediction})"
        raise UserError(
            f"--sampler {name} does not fit: the model was trained with {kind}. Use {' or '.join(fitting)}."
        )
    return SAMPLERS[name or fitting[0]]


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
    draw = choose_sampler(sampler, process)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)
    return draw(model, process, x, steps, generators, progress)
