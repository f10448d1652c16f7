"""Autoencoders whose decoder gets quantised latents: a codebook (VQ-VAE), or rounded channels (FSQ).

The diffusion model learns the latents before they are quantised, each channel with mean 0 and standard
deviation 1; what it samples is quantised before it is decoded (Khader et al., 2023).
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from monai.networks.layers.vector_quantizer import EMAQuantizer
from monai.networks.nets import VQVAE, AutoencoderKL
from torch import nn

DECAY = 0.99  # of the running mean and variance of the channels
LEAST_STD = 0.1  # of a channel, as a share of the largest: a channel that is left empty is not blown up
DEAD = 0.02  # of the mean use of a code; one that is used less is replaced
MOST_CODES = 2**62
FIRST_RESTART = 20  # steps, before which no code is replaced


class Quantised(nn.Module):
    """What autoencoders with quantised latents share. A subclass has `_raw(images)`, `_quantise(raw)` and
    `_decoded(quantised)`, and calls `_start` when it is built.

    After a call of `decode` in training, `quantisation_loss` is what is added to the loss, a scalar, and
    `code_numbers` the number of each code, a flat tensor.
    """

    def _start(self, channels: int, codes: int) -> None:
        self.codes = codes
        self.register_buffer("channel_mean", torch.zeros(channels))
        self.register_buffer("channel_square", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.quantisation_loss = self.code_numbers = None

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the channels, to be broadcast."""
        std = (self.channel_square - self.channel_mean.square()).clamp_min(0).sqrt()
        std = std.clamp_min(LEAST_STD * std.max()).clamp_min(1e-6)
        shape = (1, -1, *(1,) * (like.dim() - 2))
        return self.channel_mean.reshape(shape), std.reshape(shape)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, D, H, W) -> the standardised latents (B, c, d, h, w), float32, and zeros: a posterior
        without spread."""
        raw = self._raw(x).float()
        if self.training:
            self._measure(raw.detach())
        mean, std = self._affine(raw)
        z = (raw - mean) / std
        return z, torch.zeros_like(z)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, c, d, h, w), standardised and not quantised -> images (B, C, D, H, W)."""
        mean, std = self._affine(z)
        kind = "cpu" if z.is_meta else z.device.type
        with torch.autocast(kind, enabled=False):  # in half precision another code would be nearest
            quantised, self.quantisation_loss, self.code_numbers = self._quantise(z.float() * std + mean)
        return self._decoded(quantised)

    @torch.no_grad()
    def _measure(self, raw: torch.Tensor) -> None:
        """Follow the channels' mean and mean square, over all ranks. A step that is not finite does not
        count."""
        axes = [axis for axis in range(raw.dim()) if axis != 1]
        now = torch.stack([raw.mean(axes), raw.square().mean(axes)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(now)
            now /= dist.get_world_size()
        good = now.isfinite().all()
        weight = torch.where(self.steps == 0, 1.0, 1 - DECAY)
        for kept, new in zip((self.channel_mean, self.channel_square), now, strict=True):
            kept.copy_(torch.where(good, kept + weight * (new - kept), kept))
        self.steps += good.long()

    def use_of_codes(self) -> dict[str, torch.Tensor]:
        """Of the last batch: `perplexity`, the number of codes that equally frequent ones would be, and the
        share of codes that occur, `codes_used`."""
        counts = self.code_numbers.unique(return_counts=True)[1].float()
        shares = counts / counts.sum()
        used = counts.new_tensor(len(counts) / self.codes)
        return {"perplexity": (-(shares * shares.log()).sum()).exp(), "codes_used": used}


class RestartingQuantizer(EMAQuantizer):
    """MONAI's codebook, of which codes that are hardly used any more are replaced by latents of the batch
    (Dhariwal et al., 2020): they would never be chosen again. A step that is not finite changes nothing."""

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, c, d, h, w), float32 -> the nearest codes with the gradient of the inputs, the commitment loss,
        and the numbers of the codes (B, d, h, w)."""
        rows = inputs.movedim(1, -1)
        codes = self.embedding.weight
        distances = codes.square().sum(1) - 2 * rows @ codes.T
        numbers = distances.argmin(-1)
        quantised = self.embedding(numbers).movedim(-1, 1)
        if self.training:
            self._follow(rows.detach().flatten(0, -2), numbers.flatten())
        loss = self.commitment_cost * nn.functional.mse_loss(inputs, quantised.detach())
        return inputs + (quantised - inputs).detach(), loss, numbers

    @torch.no_grad()
    def _follow(self, rows: torch.Tensor, numbers: torch.Tensor) -> None:
        """Move each code towards the mean of the latents that it stands for (van den Oord et al., 2017,
        appendix A.1), over all ranks; then replace the dead ones."""
        counts = torch.zeros_like(self.ema_cluster_size).index_add_(0, numbers, rows.new_ones(len(rows)))
        sums = torch.zeros_like(self.ema_w).index_add_(0, numbers, rows)
        # Which latents replace dead codes: a function of the step, so that a resumed training takes the same.
        places = (torch.arange(len(counts), device=rows.device) * 7919 + self.steps * 104729) % len(rows)
        fresh = rows[places]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(fresh, 0)
        good = sums.isfinite().all()
        size = self.decay * self.ema_cluster_size + (1 - self.decay) * counts
        total = self.decay * self.ema_w + (1 - self.decay) * sums
        mean = size.mean()
        dead = ((size < DEAD * mean) & (self.steps >= FIRST_RESTART))[:, None]
        size, total = torch.where(dead[:, 0], mean, size), torch.where(dead, mean * fresh, total)
        smoothed = (size + self.epsilon) / (size.sum() + len(size) * self.epsilon) * size.sum()
        for kept, new in (
            (self.ema_cluster_size, size),
            (self.ema_w, total),
            (self.embedding.weight, total / smoothed[:, None]),
        ):
            kept.copy_(torch.where(good, new, kept))
        self.steps += good.long()


class VQ(Quantised, VQVAE):
    """`monai.networks.nets.VQVAE` with the interface of an autoencoder, see `with_codebook`."""

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        return VQVAE.encode(self, x)

    def _quantise(self, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantised, loss, numbers = self.quantizer.quantizer(raw)
        return quantised, loss, numbers.flatten()

    def _decoded(self, quantised: torch.Tensor) -> torch.Tensor:
        return VQVAE.decode(self, quantised)


def with_codebook(network: VQVAE) -> VQ:
    """Make MONAI's VQVAE a `VQ`, in place. Its weights and their names stay; buffers are added."""
    network.__class__ = VQ
    network.latent_channels = network.embedding_dim
    network._start(network.embedding_dim, network.num_embeddings)
    quantizer = network.quantizer.quantizer
    quantizer.__class__ = RestartingQuantizer
    quantizer.register_buffer("steps", torch.zeros((), dtype=torch.long))
    return network


class FSQ(Quantised, AutoencoderKL):
    """An autoencoder whose latent channels are rounded to a few levels each: finite scalar quantisation
    (Mentzer et al., 2024). There is no codebook to learn, and no further loss.

    Args:
        channel_levels: such as [8, 8, 8, 5, 5, 5]: of each latent channel, so as many channels as numbers.
        arguments: those of `monai.networks.nets.AutoencoderKL`, but `latent_channels`.
    """

    def __init__(self, channel_levels: Sequence[int], **arguments):
        AutoencoderKL.__init__(self, latent_channels=len(channel_levels), **arguments)
        if min(channel_levels) < 3 or math.prod(channel_levels) > MOST_CODES:
            raise ValueError(
                f"channel_levels: expected 3 or more of each and at most 2^62 codes, found {channel_levels}"
            )
        del self.quant_conv_log_sigma
        counts = torch.tensor(channel_levels, dtype=torch.float32)
        self._start(len(channel_levels), math.prod(channel_levels))
        self.register_buffer("counts", counts, persistent=False)

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv_mu(self.encoder(x))

    def _quantise(self, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mentzer et al., 2024, appendix A.1: bounded by tanh, rounded with the gradient of the bounded."""
        counts = self.counts.reshape(1, -1, *(1,) * (raw.dim() - 2))
        half, even = (counts - 1) * 0.999 / 2, counts % 2 == 0
        offset = even * 0.5
        bounded = (raw + (offset / half).atanh()).tanh() * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        digits = (bounded.round() + (counts / 2).floor()).long()
        places = torch.cat([self.counts.new_ones(1), self.counts[:-1]]).long().cumprod(0)
        numbers = (digits * places.reshape(counts.shape)).sum(1)
        return rounded / (counts / 2).floor(), raw.new_zeros(()), numbers.flatten()

    def _decoded(self, quantised: torch.Tensor) -> torch.Tensor:
        return AutoencoderKL.decode(self, quantised)
