"""This project's steps, by the functions of its own scripts; what they log and save is left out."""

import dataclasses

import torch
from torch import nn
from torch.utils.data import Dataset

import train_autoencoder
import train_diffusion
from ldm import configs, generation
from ldm.data import latents
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import SAMPLERS, choose_sampler
from ldm.models.autoencoder import LatentEncoder
from ldm.models.layers import on_device
from ldm.system.ranks import Run
from ldm.training.loop import Clock
from ldm.training.step import learning_rate


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


def define_network(config: dict, key: str, run: Run) -> nn.Module:
    """A network as inference.py has it, which draws in float32."""
    network = configs.define_network(config, key)
    return network.to(run.device) if key == "diffusion_def" else on_device(network, run.device)


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
        latent_shape = train_autoencoder.latent_shape_of(config, autoencoder, size)
        criterion = train_autoencoder.AutoencoderLoss(self.section, None)
        self.networks = train_autoencoder.build_networks(
            config, autoencoder, size, size, criterion, self.section["compile"], self.run
        )
        self.dataset = train_autoencoder.WithPosteriorDraw(dataset, latent_shape, config["seed"])
        self.clock = Clock(self.section, len(dataset))

    def step(self, batch: dict) -> None:
        """One step of each network on a batch of the dataset, as the loader makes it."""
        images, eps = (batch[key].to(self.run.device, non_blocking=True) for key in ("image", "eps"))
        train_autoencoder.train_batch(
            self.networks, images, eps, slices=None, adversarial_on=True, last=True, run=self.run
        )
        optimise(self.networks, self.section, self.clock, int(batch["epoch"][0]))


class Diffusion:
    """Stage 2 on latents in memory, or, where each epoch has versions of its own, encoded as they come.

    Its batches are those of a loader of `dataset`.

    Args:
        config: resolved.
        encoder: the frozen autoencoder, whose scale factor is measured here.
        volumes: what to encode.
        run: device and precision.
        weights: of the UNet, to begin with.
    """

    def __init__(self, config: dict, encoder: LatentEncoder, volumes: Dataset, run: Run, weights: dict):
        self.section, self.encoder = config["diffusion_train"], encoder
        self.run = run = run_of(self.section, run)
        kept = volumes if volumes.versions is None else latents.encode_all(encoder, volumes, run, 0, "encode")
        first = train_diffusion.posterior_of(train_diffusion.one_of(kept, 0), encoder, run)[0]
        self.shape = list(first.shape[1:])
        source = train_diffusion.Latents(kept, kept, encoder, "", self.shape, {})
        encoder.scale_factor = train_diffusion.measure_scale(source, run)
        self.dataset = train_diffusion.WithChance(kept, self.shape, config["seed"])
        self.process = NoiseProcess.from_config(config["NoiseScheduler"])
        self.learner = train_diffusion.build_learner(config, self.section["compile"], self.run)
        self.learner.unet.load_state_dict(weights)
        if self.learner.ema:
            self.learner.ema.module.load_state_dict(weights)
        self.clock = Clock(self.section, len(volumes))

    def step(self, batch: dict) -> None:
        """One step on a batch of the dataset, as the loader makes it."""
        eps, noise, uniform = (
            batch[key].to(self.run.device, non_blocking=True) for key in ("eps", "noise", "uniform")
        )
        mean, std = train_diffusion.posterior_of(batch, self.encoder, self.run)
        z0 = (mean + std * eps) * self.encoder.scale_factor
        t = self.process.draw_times(uniform, self.section["timestep_sampling"])
        loss = train_diffusion.diffusion_loss(
            self.learner.wrapped, self.process, z0, noise, t, self.run, self.section["min_snr_gamma"]
        )
        self.learner.stepper.backward(loss)
        optimise(self.learner, self.section, self.clock, int(batch["epoch"][0]))


def sampling_networks(encoder: LatentEncoder, unet: nn.Module, process: NoiseProcess, latent_shape, size):
    """Networks as `generation.draw` takes them."""
    geometry = {"size": list(size), "spacing": [1.0] * 3, "limits": [[0.0, 1.0]]}
    return generation.Networks(encoder, unet.eval(), process, list(latent_shape), geometry, None)


def default_sampler(process: NoiseProcess) -> tuple[str, int]:
    """Name and steps that inference.py takes where none are given."""
    name = choose_sampler(None, process)
    return name, SAMPLERS[name].steps or process.num_train_timesteps
