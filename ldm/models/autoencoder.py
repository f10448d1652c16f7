"""One interface for every autoencoder: encode, decode, and the shape of the latents."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldm import UserError
from ldm.models.quantised import Quantised
from ldm.models.slicewise import SliceWise, as_volumes, per_volume_axis

if TYPE_CHECKING:
    from ldm.lowmem.slabwise import Budget

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


class Autoencoder(nn.Module):
    """A network of any class that encodes images to a Gaussian posterior and decodes latents, 2D or 3D.

    Latents are unscaled: a diffusion model's are divided by its scale factor before they are decoded.

    Args:
        network: with `encode(x) -> (mean, std)`, `decode(z)` and `latent_channels`, such as AutoencoderKL.
        budget: memory within which `encode` and `decode` compute, in slabs where that is needed. The values
            are the same but for rounding. None: whole volumes at once.
    """

    def __init__(self, network: nn.Module, budget: "Budget | None" = None):
        super().__init__()
        self.autoencoder, self.budget = network, budget  # named as in checkpoints' averaged weights

    @property
    def network(self) -> nn.Module:
        """The network inside, whose `state_dict` is what checkpoints hold."""
        return self.autoencoder

    @property
    def learns(self) -> bool:
        """Whether the network has weights. Wavelets have none, and need no slabs."""
        return any(True for _ in self.network.parameters())

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.network.latent_channels

    @property
    def is_slicewise(self) -> bool:
        """Whether the network takes volumes slice by slice."""
        return isinstance(self.network, SliceWise) or getattr(self.network, "spatial_dims", 3) == 2

    @property
    def is_quantised(self) -> bool:
        """Whether the network quantises latents before it decodes them."""
        return isinstance(self.network, Quantised)

    @property
    def factor(self) -> tuple[int, ...]:
        """Voxels per latent voxel along each axis of a volume: the network's `factor`, or the product of the
        strides of its encoder's layers."""
        if hasattr(self.network, "factor"):
            return per_volume_axis(self.network.factor)
        strides = [
            layer.stride for layer in self.network.encoder.modules() if isinstance(layer, CONVOLUTIONS)
        ]
        return per_volume_axis(tuple(math.prod(axis) for axis in zip(*strides, strict=True)))

    def forward(
        self, images: torch.Tensor, eps: torch.Tensor, level: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One training pass: images (B, C, D, H, W) and noise (B, c, d, h, w) -> reconstruction, posterior
        mean and std; of quantised latents no std, but the loss of their quantisation, (B,).

        Args:
            level: (B,), standard deviation of further noise on the latents that are decoded, as a share of
                the spread of the latents of each volume.
        """
        mean, std = self.network.encode(images)
        if self.is_quantised:
            reconstruction, loss = self.network.decode(mean), self.network.quantisation_loss
            self.network.quantisation_loss = None  # else the network would hold the graph of the step
            return reconstruction, mean, loss.expand(len(images))
        spread = std
        if level is not None:  # the sum of two normal draws is one, of the summed variances
            further = (level * mean.detach().float().flatten(1).std(1)).reshape(-1, *(1,) * (mean.dim() - 1))
            spread = (std.square() + further.square()).sqrt()
        return self.network.decode(mean + spread * eps), mean, std

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, D, H, W) -> mean and std of the posterior, (B, c, d, h, w) float32 each.

        With a budget the images may lie in host memory.
        """
        if self.budget and self.learns and self.is_slicewise:
            parts = [self.network.encode(one.to(self._device)) for one in images.split(1, -1)]
            mean, std = (torch.cat(some, -1) for some in zip(*parts, strict=True))
        elif self.budget and self.learns:
            from ldm.lowmem.slabwise import encode_within

            mean, std = encode_within(self.network, images, self.budget)
        else:
            mean, std = self.network.encode(images)
        return mean.float(), std.float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, c, d, h, w) -> images (B, C, D, H, W), float32; with a budget, on the CPU."""
        if self.budget and self.learns and self.is_slicewise:
            parts = [self.network.decode(one.to(self._device)).cpu() for one in latents.split(1, -1)]
            return torch.cat(parts, -1).float()
        if self.budget and self.learns:
            from ldm.lowmem.slabwise import decode_within

            return decode_within(self.network, latents, self.budget).float()
        return self.network.decode(latents).float()

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Decode the posterior mean: (B, C, D, H, W) -> the same, float32."""
        return self.network.decode(self.network.encode(images)[0]).float()

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, D, H, W) -> what the encoder computes from them: the output of the last block of each
        resolution, and the posterior mean; of wavelets the bands of each level."""
        if hasattr(self.network, "bands"):
            return self.network.bands(images)[1:] or [images]
        outputs = []
        hooks = [
            block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for block in self.network.encoder.blocks
        ]
        try:
            mean = self.network.encode(images)[0]
        finally:
            for hook in hooks:
                hook.remove()
        if self.is_slicewise:
            outputs = [as_volumes(x, len(images)) for x in outputs]
        sizes = [x.shape[2:] for x in outputs] + [None]
        return [x for x, after in zip(outputs, sizes[1:], strict=True) if x.shape[2:] != after] + [mean]


def set_posterior_std(network: nn.Module, std: float) -> None:
    """Start training with posteriors of about this standard deviation: sets the bias of the log-variance
    layer, and scales its weights by 0.1, so that the standard deviation varies little between voxels.

    Raises:
        UserError: the network has no such layer.
    """
    layer = getattr(network, "quant_conv_log_sigma", None)
    if layer is None:
        raise UserError(
            "autoencoder_train.initial_posterior_std: this network has no log-variance layer. Set it to null."
        )
    conv = next(module for module in layer.modules() if isinstance(module, CONVOLUTIONS))
    with torch.no_grad():
        conv.weight.mul_(0.1)
        conv.bias.fill_(2 * torch.tensor(std).log().item())


class LatentMoments:
    """Sums over posteriors that give the scale factor, 1 / std over all voxels and channels (Rombach et al.,
    2022, appendix D.1).

    Latents are drawn as mean + std * eps, so their variance is E[mean^2] + E[std^2] - E[mean]^2. No draw is
    needed, and the sums of all ranks can be added.
    """

    def __init__(self):
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Add the posteriors of some volumes."""
        mean, std = mean.double(), std.double()
        values = [torch.tensor(float(mean.numel())), mean.sum(), (mean.square() + std.square()).sum()]
        self.sums += torch.stack([value.cpu().double() for value in values])

    def scale_factor(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> float:
        """1 / std over all volumes of all ranks; `reduce` adds the sums over ranks.

        Raises:
            UserError: the variance is 0 or not finite.
        """
        count, first, second = reduce(self.sums).tolist()
        variance = second / count - (first / count) ** 2
        if not variance > 0:
            raise UserError(
                f"The latents have variance {variance:.3g}: the autoencoder is not trained, or diverged."
            )
        return variance**-0.5
