"""The reference recipe: a step of MONAI's 3D latent diffusion tutorial, built from MONAI's classes.

It runs as fast as possible: without anomaly detection and logging, with data in memory, and with the flags
set by the tutorial and by torch. It differs in two ways, to its advantage: there is no perceptual term on
either side, since its weights must be downloaded, and the scheduler does not clip latents to -1 .. 1, which
would damage its samples.
"""

from collections.abc import Sequence

import torch
from monai.inferers import DiffusionInferer, LatentDiffusionInferer
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from ldm.models.definitions import NETWORKS, check_definition
from ldm.system.ranks import Run

STEPS = 1000
NOISE = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
LOSS = {  # of stage 1, in the keys of `autoencoder_train`
    "recon_loss": "l1",
    "kl_weight": 1e-7,
    "gradient_weight": 0.0,
    "perceptual_weight": 0.0,
    "adversarial_weight": 0.01,
}
ADVERSARIAL = PatchAdversarialLoss(criterion="least_squares")


def define_network(config: dict, key: str, run: Run) -> nn.Module:
    """A network as the tutorial's users get it, without this project's faster attention and group norm."""
    arguments = {name: value for name, value in config[key].items() if name != "_target_"}
    return check_definition(config[key], NETWORKS, key)(**arguments).to(run.device)


def noise_scheduler() -> DDPMScheduler:
    """The tutorial's, without `clip_sample`."""
    return DDPMScheduler(STEPS, clip_sample=False, **NOISE)


class Autoencoder:
    """Stage 1 in fp32: a step of the generator, then one of the discriminator with passes of its own.

    Args:
        config: its `autoencoder_def`, and of `autoencoder_train` the learning rate and the discriminator.
        run: where to train.
    """

    def __init__(self, config: dict, run: Run):
        section = config["autoencoder_train"]
        self.device = device = run.device
        self.autoencoder = define_network(config, "autoencoder_def", run).train()
        self.discriminator = PatchDiscriminator(
            spatial_dims=3, in_channels=config["image_channels"], out_channels=1, **section["discriminator"]
        ).to(device)
        self.generator_optimizer = torch.optim.Adam(self.autoencoder.parameters(), section["lr"])
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), section["lr"])

    def step(self, batch: dict) -> None:
        """One step of each network on {"image": (B, C, D, H, W)}."""
        images = batch["image"].to(self.device)
        self.generator_optimizer.zero_grad(set_to_none=True)
        reconstruction, mean, std = self.autoencoder(images)
        kl = 0.5 * (mean**2 + std**2 - (std**2).log() - 1).sum() / len(mean)
        fooled = self._judged(reconstruction, is_real=True, for_discriminator=False)
        loss = nn.functional.l1_loss(reconstruction, images) + LOSS["kl_weight"] * kl
        (loss + LOSS["adversarial_weight"] * fooled).backward()
        self.generator_optimizer.step()

        self.discriminator_optimizer.zero_grad(set_to_none=True)
        fake = self._judged(reconstruction.detach(), is_real=False, for_discriminator=True)
        real = self._judged(images, is_real=True, for_discriminator=True)
        (LOSS["adversarial_weight"] * 0.5 * (fake + real)).backward()
        self.discriminator_optimizer.step()

    def _judged(self, images: torch.Tensor, is_real: bool, for_discriminator: bool) -> torch.Tensor:
        logits = self.discriminator(images.contiguous())[-1]
        return ADVERSARIAL(logits, target_is_real=is_real, for_discriminator=for_discriminator)


class Diffusion:
    """Stage 2: the frozen autoencoder encodes every batch, the UNet learns the noise; fp16 autocast on a GPU,
    fp32 on a CPU, where the tutorial knows no other.

    Args:
        autoencoder: trained.
        unet: to be trained.
        first_batch: images (B, C, D, H, W) that the scale factor is measured on, 1 / std of their latents.
        rate: learning rate.
        device: where all of these are.
    """

    def __init__(self, autoencoder: nn.Module, unet: nn.Module, first_batch, rate: float, device):
        self.autoencoder, self.unet, self.device = autoencoder.eval(), unet.train(), device
        self.amp = device.type == "cuda"
        with torch.no_grad(), self._autocast():
            latents = autoencoder.encode_stage_2_inputs(first_batch.to(device))
        self.latent_shape, self.scale_factor = latents.shape[1:], 1 / latents.float().std().item()
        self.inferer = LatentDiffusionInferer(noise_scheduler(), self.scale_factor)
        self.optimizer = torch.optim.Adam(unet.parameters(), rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.float16, enabled=self.amp)

    def loss(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the noise in the latents of images, at integer times (B,)."""
        with self._autocast():
            predicted = self.inferer(images, self.autoencoder, self.unet, noise, timesteps)
            return nn.functional.mse_loss(predicted.float(), noise.float())

    def step(self, batch: dict) -> None:
        """One step on {"image": (B, C, D, H, W)}."""
        images = batch["image"].to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        noise = torch.randn(len(images), *self.latent_shape).to(self.device)
        timesteps = torch.randint(0, STEPS, (len(images),), device=self.device)
        self.scaler.scale(self.loss(images, noise, timesteps)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def draw_latents(unet: nn.Module, shape: Sequence[int], seeds: Sequence[int], steps: int, device):
    """Scaled latents (len(seeds), *shape) by the first `steps` of the 1000 of DDPM, in fp32.

    These, divided by the scale factor and decoded, are what `LatentDiffusionInferer.sample` gives.
    """
    scheduler = noise_scheduler()
    scheduler.timesteps = scheduler.timesteps[:steps]
    noise = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    torch.manual_seed(seeds[0])  # of the noise that is added on the way
    return DiffusionInferer(scheduler).sample(torch.stack(noise).to(device), unet.eval(), verbose=False)


@torch.no_grad()
def decode(autoencoder: nn.Module, latents: torch.Tensor, scale_factor: float) -> torch.Tensor:
    """Scaled latents to images, in fp32."""
    return autoencoder.decode_stage_2_outputs(latents / scale_factor)
