"""The noise process: signal and noise levels, training times and targets, and the times that samplers visit.

`NoiseProcess` holds one of two families, whose signal and noise levels give z_t = a(t) z_0 + s(t) noise:

    discrete    a^2 = prod(1 - beta), s^2 = 1 - a^2, t = 0 .. T-1      (Ho et al., 2020)
    flow        a = 1 - t/T, s = t/T, 0 < t <= T                       (Liu et al., 2023; Lipman et al., 2023)
"""

import json
import math
from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from ldm import UserError
from ldm.models.definitions import SCHEDULERS, instantiate

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


def resolve_timestep_sampling(section: dict, sampling: str) -> str:
    """How training times are sampled; refuses options of a scheduler by `_target_` that have no effect.

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
        size: of the latents, (d, h, w), that the shift is for, where it follows their size, see `at`.

    Raises:
        UserError: signal or noise level 0 at a time that is trained on.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor | None,
        prediction: str,
        num_train_timesteps: int,
        shift: float = 1.0,
        size: Sequence[int] | None = None,
    ):
        self.alphas_cumprod = None if alphas_cumprod is None else alphas_cumprod.double()
        self.prediction, self.num_train_timesteps, self.shift = prediction, num_train_timesteps, shift
        self.size = size
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

    @property
    def signal_left(self) -> float:
        """The weight of z_0 in z_t at the last time: 0 in rectified flow."""
        return 0.0 if self.is_flow else float(self.alphas_cumprod[-1].sqrt())

    @classmethod
    def of_checkpoint(cls, checkpoint: dict, section: dict, size: Sequence[int]) -> "NoiseProcess":
        """The process that a checkpoint of this project was trained with, for latents of this size:
        `from_config`, with its own shift, or that of the config where it is from before checkpoints held
        one."""
        if "shift" not in checkpoint:
            process = cls.from_config(section)
            process.shift = section.get("shift", 1.0)
            return process
        process = cls.from_config(section, checkpoint.get("latent_shape", [1, *size])[1:])
        process.shift = checkpoint["shift"]
        return process.at(size)

    def at(self, size: Sequence[int]) -> "NoiseProcess":
        """This process for latents of another size, (d, h, w). Only the shift of RFlowScheduler's
        `use_timestep_transform` follows it: by the third root of the number of voxels."""
        if self.size is None or tuple(size) == tuple(self.size):
            return self
        shift = self.shift * (math.prod(size) / math.prod(self.size)) ** (1 / len(size))
        return NoiseProcess(None, self.prediction, self.num_train_timesteps, shift, size)

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
            if not scheduler.use_timestep_transform or size is None:
                return cls(None, "velocity", scheduler.num_train_timesteps)
            shift = (math.prod(size) / scheduler.base_img_size_numel) ** (1 / len(size))
            return cls(None, "velocity", scheduler.num_train_timesteps, shift, size)  # `timestep_transform`
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
