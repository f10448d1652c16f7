"""What takes memory in sampling, for forecasts."""

from collections.abc import Sequence

import torch

from ldm import configs
from ldm.diffusion.guidance import guided, with_any_guide
from ldm.generation import controlled
from ldm.models.autoencoder import Autoencoder
from ldm.models.control import MASK
from ldm.models.definitions import latent_size
from ldm.models.denoiser import example_cond
from ldm.system.ranks import Run
from ldm.training import memory
from ldm.training.controlnet import define_control


def rehearse(
    config: dict,
    size: Sequence[int],
    batch: int,
    meter: memory.Meter,
    run: Run,
    guidance: float = 1.0,
    masks: bool = False,
) -> None:
    """What takes memory: a step of sampling, with a ControlNet for `masks`, and decoding, of a batch of
    volumes of `size` voxels."""
    shape = [config["diffusion_def"]["out_channels"], *latent_size(config, size)]
    with meter, torch.no_grad(), run.autocast():
        autoencoder = Autoencoder(configs.define_network(config, "autoencoder_def").to(run.device).eval())
        unet = configs.define_network(config, "diffusion_def").to(run.device).eval()
        unet = with_any_guide(unet, config, run.device)
        latents, cond = torch.zeros(batch, *shape), example_cond(config["diffusion_def"], batch, shape[1:])
        meter.hold("weights", autoencoder, unet)
        if masks:
            control, bits = define_control(config, config["label_values"] or [255])
            meter.hold("weights", control)
            unet, cond[MASK] = controlled(unet, control.eval()), torch.zeros(batch, bits, *size)
        with meter.phase("sampling"):
            guided(unet, cond, cond, guidance)(latents, torch.zeros(batch))
        with meter.phase("decoding"):
            autoencoder.decode(latents)


def peak_within(
    max_memory: float, gpu: bool, config: dict, size: Sequence[int], weights: int, run: Run
) -> memory.Peak:
    """The peak of decoding a volume of `size` voxels within `max_memory` GB, `weights` bytes of both networks
    included. Raises UserError where that is too little."""
    from ldm.lowmem.slabwise import Budget, decoding_peak, weights_bytes

    autoencoder = configs.define_network(config, "autoencoder_def").eval()
    latents = torch.zeros(1, config["diffusion_def"]["out_channels"], *latent_size(config, size))
    budget = Budget(max_memory * memory.GB, beside=weights - weights_bytes(autoencoder), like_gpu=gpu)
    with run.autocast():
        most = decoding_peak(autoencoder, latents, budget)
    parts = {**dict.fromkeys(memory.PARTS, 0), "weights": weights, "activations": int(most) - weights}
    return memory.Peak(parts)
