"""This project's steps, by the functions of its own scripts; what they log and save is left out."""

import dataclasses
import time

import torch
from torch import nn
from torch.utils.data import Dataset

import inference
import train_autoencoder
import train_diffusion
import utils
from ldm.diffusion import SAMPLERS, NoiseProcess, choose_sampler
from ldm.encoders import LatentEncoder
from ldm.networks import downsampling
from ldm.processes import Run
from ldm.training import Clock, learning_rate


def run_of(section: dict, run: Run) -> Run:
    """The run with or without mixed precision, as a section of the config says."""
    return dataclasses.replace(run, amp_dtype=run.amp_dtype if section["amp"] else None)


def optimise(learner, section: dict, clock: Clock, epoch: int) -> None:
    """From gradients to the next weights: clipping, rate, optimisers, average."""
    masked = (~torch.stack([stepper.clip() for stepper in learner.steppers]).all()).double()
    rate = learning_rate(section, 1, clock.progress(clock.seconds), clock.step, epoch)
    for stepper in learner.steppers:
        stepper.step(rate, masked)
    clock.step += 1
    learner.update_average()


class Autoencoder:
    """Stage 1 with all terms of its loss on.

    Args:
        config: resolved.
        dataset: what the batches come from.
        run: device and precision.
    """

    def __init__(self, config: dict, dataset: Dataset, run: Run):
        self.section, self.seed = config["autoencoder_train"], config["seed"]
        self.dataset, self.run = dataset, run_of(self.section, run)
        size = dataset[(0, 0)]["image"].shape[1:]
        autoencoder = utils.define_network(config, "autoencoder_def")
        self.latent_shape = [autoencoder.latent_channels]
        self.latent_shape += [side // downsampling(config["autoencoder_def"]) for side in size]
        self.networks = train_autoencoder.build_networks(
            config, autoencoder, size, None, self.section["compile"], self.run
        )
        self.clock = Clock(self.section, len(dataset))

    def step(self, batch: dict) -> None:
        """One step of each network on {"image": (B, C, D, H, W)}, as the loader makes it."""
        images = batch["image"].to(self.run.device, non_blocking=True)
        eps = train_autoencoder.posterior_noise(batch, self.dataset, self.latent_shape, self.seed)
        eps = eps.to(self.run.device, non_blocking=True)
        train_autoencoder.train_batch(
            self.networks, images, eps, slices=None, adversarial_on=True, last=True, run=self.run
        )
        optimise(self.networks, self.section, self.clock, int(batch["epoch"][0]))


class Diffusion:
    """Stage 2 on latents in memory, or, where volumes change from epoch to epoch, encoded as they come.

    Args:
        config: resolved.
        encoder: the frozen autoencoder with its scale factor.
        dataset: of posteriors or of volumes.
        run: device and precision.
        weights: of the UNet, to begin with.
    """

    def __init__(self, config: dict, encoder: LatentEncoder, dataset: Dataset, run: Run, weights: dict):
        self.section, self.seed = config["diffusion_train"], config["seed"]
        self.encoder, self.dataset, self.run = encoder, dataset, run_of(self.section, run)
        first = {key: x[None] for key, x in dataset[(0, 0)].items() if key in ("image", "mean", "std")}
        self.latent_shape = train_diffusion.posterior_of(first, encoder, self.run)[0].shape[1:]
        self.process = NoiseProcess.from_config(config["NoiseScheduler"])
        self.learner = train_diffusion.build_learner(config, self.section["compile"], self.run)
        self.learner.unet.load_state_dict(weights)
        if self.learner.ema:
            self.learner.ema.module.load_state_dict(weights)
        self.clock = Clock(self.section, len(dataset))

    def step(self, batch: dict) -> None:
        """One step on a batch of the dataset, as the loader makes it."""
        chance = train_diffusion.draws(batch, self.dataset, self.latent_shape, self.seed)
        eps, noise, uniform = (x.to(self.run.device, non_blocking=True) for x in chance)
        z0 = self.encoder.draw(*train_diffusion.posterior_of(batch, self.encoder, self.run), eps)
        t = self.process.draw_times(uniform, self.section["timestep_sampling"])
        loss = train_diffusion.diffusion_loss(
            self.learner.wrapped, self.process, z0, noise, t, self.run, self.section["min_snr_gamma"]
        )
        self.learner.stepper.backward(loss)
        optimise(self.learner, self.section, self.clock, int(batch["epoch"][0]))

    def resume_clock(self, seconds: float) -> None:
        """Go on as one that has trained for so long, whatever time passed between."""
        self.clock.before, self.clock.started = seconds, time.monotonic()


def sampling_networks(encoder: LatentEncoder, unet: nn.Module, process: NoiseProcess, latent_shape, size):
    """Networks as `inference.draw` takes them."""
    geometry = {"size": list(size), "spacing": [1.0] * 3, "limits": [[0.0, 1.0]]}
    return inference.Networks(encoder, unet.eval(), process, list(latent_shape), geometry, None)


def default_sampler(process: NoiseProcess) -> tuple[str, int]:
    """Name and steps that inference.py takes where none are given."""
    name = choose_sampler(None, process)
    return name, SAMPLERS[name].steps or process.num_train_timesteps
