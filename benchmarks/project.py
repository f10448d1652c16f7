"""This project's training steps, as in its scripts but without logging and saving."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import Dataset

from ldm import configs, generation
from ldm.data import posteriors
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import SAMPLERS, choose_sampler
from ldm.losses import AutoencoderLoss, adversarial_loss, discriminator_loss
from ldm.models import autoencoder as autoencoders
from ldm.models.denoiser import predict
from ldm.models.layers import on_device
from ldm.system.ranks import Run
from ldm.training import autoencoder as stage1
from ldm.training import diffusion as stage2
from ldm.training.latents import Latents, WithNoise
from ldm.training.progress import Clock
from ldm.training.step import Optimizer, learning_rate


def run_of(section: dict, run: Run) -> Run:
    """The run with or without mixed precision, as a section of the config says."""
    return dataclasses.replace(run, amp_dtype=run.amp_dtype if section["amp"] else None)


def optimise(optimizers: Sequence[Optimizer], section: dict, clock: Clock, epoch: int) -> torch.Tensor:
    """From gradients to the next weights: clip, rate, step. Returns whether the step was skipped."""
    skip = (~torch.stack([optimizer.clip() for optimizer in optimizers]).all()).double()
    rate = learning_rate(section, 1, clock.progress(clock.seconds), clock.step, epoch)
    for optimizer in optimizers:
        optimizer.step(rate, skip)
    clock.step += 1
    return skip


def define_network(config: dict, key: str, run: Run) -> nn.Module:
    """A network as inference.py has it, which draws in float32."""
    network = configs.define_network(config, key)
    return on_device(network, Run(0, 1, run.device), key == "autoencoder_def")


class Autoencoder:
    """Stage 1 with all terms of its loss on.

    Its batches are those of a loader of `dataset`.

    Args:
        config: resolved.
        dataset: the volumes.
        run: device and precision.
    """

    def __init__(self, config: dict, dataset: Dataset, run: Run):
        self.section = config["autoencoder_train"]
        self.run, size = run_of(self.section, run), dataset[(0, 0)]["image"].shape[1:]
        autoencoder = configs.define_network(config, "autoencoder_def")
        criterion = AutoencoderLoss(self.section, None)
        self.learner = stage1.build_learner(
            config, autoencoder, size, size, criterion, self.section["compile"], self.run
        )
        latent_shape = stage1.latent_shape_of(config, self.learner.autoencoder, size)
        self.dataset = stage1.WithPosteriorDraw(dataset, latent_shape, config["seed"])
        self.clock = Clock(self.section, len(dataset))

    def step(self, batch: dict) -> None:
        """One step of each network on a batch of the dataset, as the loader makes it."""
        images, eps = (
            batch[key].to(self.run.device, non_blocking=True) for key in ("image", "posterior_noise")
        )
        learner, run = self.learner, self.run
        with run.autocast():
            reconstruction, mean, std = learner.model(images, eps)
        loss = learner.criterion(images, reconstruction, mean, std, None)["loss"]
        with run.autocast():
            adversarial = adversarial_loss(learner.discriminator, reconstruction)
        learner.optimizer.backward(loss + self.section["adversarial_weight"] * adversarial)
        with run.autocast():
            loss = discriminator_loss(learner.wrapped_discriminator, reconstruction, images)
        learner.discriminator_optimizer.backward(loss)
        optimizers = list(learner.optimizers.values())
        skip = optimise(optimizers, self.section, self.clock, int(batch["epoch"][0]))
        if learner.ema_model:
            learner.ema_model.update(learner.autoencoder, skip)


class Diffusion:
    """Stage 2 on latents in memory.

    Its batches are those of a loader of `dataset`.

    Args:
        config: resolved.
        encoder: the frozen autoencoder.
        volumes: what to encode.
        run: device and precision.
        weights: of the UNet, to begin with.
    """

    def __init__(
        self, config: dict, encoder: autoencoders.Autoencoder, volumes: Dataset, run: Run, weights: dict
    ):
        self.section, self.encoder = config["diffusion_train"], encoder
        self.run = run = run_of(self.section, run)
        kept = posteriors.encode_all(encoder, volumes, run, 0, "encode")
        self.shape = list(kept.entries[0].shape[2:])
        self.data = Latents(kept, kept, encoder, "", self.shape, {})
        self.scale_factor = self.data.moments(run)[0]
        self.dataset = WithNoise(kept, self.shape, config["seed"])
        self.process = NoiseProcess.from_config(config["NoiseScheduler"])
        self.learner = stage2.build_learner(config, self.section["compile"], self.run)
        self.learner.unet.load_state_dict(weights)
        if self.learner.ema_model:
            self.learner.ema_model.module.load_state_dict(weights)
        self.clock = Clock(self.section, len(volumes))

    def step(self, batch: dict) -> None:
        """One step on a batch of the dataset, as the loader makes it."""
        eps, noise, uniform = (
            batch[key].to(self.run.device, non_blocking=True)
            for key in ("posterior_noise", "noise", "uniform")
        )
        process, learner = self.process, self.learner
        mean, std = self.data.posterior(batch, self.run)
        z0 = (mean + std * eps) * self.scale_factor
        t = process.draw_times(uniform, self.section["timestep_sampling"])
        with self.run.autocast():
            prediction = predict(learner.model, process.add_noise(z0, noise, t), t, {})
        loss = diffusion_loss(process, prediction, z0, noise, t, self.section["min_snr_gamma"])
        learner.optimizer.backward(loss)
        skip = optimise([learner.optimizer], self.section, self.clock, int(batch["epoch"][0]))
        if learner.ema_model:
            learner.ema_model.update(learner.unet, skip)


def sampling_networks(
    encoder: autoencoders.Autoencoder,
    scale_factor: float,
    unet: nn.Module,
    process: NoiseProcess,
    latent_shape: Sequence[int],
    size: Sequence[int],
) -> generation.Networks:
    """Networks as `generation.draw` takes them."""
    geometry = {"size": list(size), "spacing": [1.0] * 3, "limits": [[0.0, 1.0]]}
    return generation.Networks(
        encoder, scale_factor, unet.eval(), process, list(latent_shape), geometry, None
    )


def default_sampler(process: NoiseProcess) -> tuple[str, int]:
    """Name and steps that inference.py takes where none are given."""
    name = choose_sampler(None, process)
    return name, SAMPLERS[name].steps or process.num_train_timesteps
