"""Between images and latents: encode, draw from the posterior, scale, decode."""

from collections.abc import Callable

import torch
from torch import nn

from ldm import UserError
from ldm.lowmem.slabwise import Budget, decode_within, encode_within


class LatentEncoder(nn.Module):
    """An autoencoder and the one scale factor of its latents.

    Latents z = (mean + std * eps) * scale_factor have unit variance over the training set (Rombach et al.,
    2022, section 4.3.2 and D.1); decoding divides by the same factor.

    Args:
        autoencoder: a network with `encode(x) -> (mean, std)` and `decode(z)`, such as AutoencoderKL.
        scale_factor: None until it is known; scaling without it is an error.
        budget: memory within which `posterior` and `decode` compute, in slabs where it takes them, to the
            same values but for rounding. None: as much as whole volumes take.
    """

    def __init__(
        self, autoencoder: nn.Module, scale_factor: float | None = None, budget: Budget | None = None
    ):
        super().__init__()
        self.autoencoder, self.scale_factor, self.budget = autoencoder, scale_factor, budget

    def forward(
        self, images: torch.Tensor, eps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One training pass, on unscaled latents: (B, C, D, H, W) -> reconstruction, posterior mean and
        std."""
        mean, std = self.autoencoder.encode(images)
        return self.autoencoder.decode(mean + std * eps), mean, std

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, D, H, W) -> mean and std of the posterior, unscaled, each (B, c, d, h, w) float32.

        With a budget the images may lie in host memory.
        """
        if self.budget:
            mean, std = encode_within(self.autoencoder, images, self.budget)
        else:
            mean, std = self.autoencoder.encode(images)
        return mean.float(), std.float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, c, d, h, w) -> images (B, C, D, H, W), float32; with a budget, on the CPU."""
        latents = latents / self._scale()
        if self.budget:
            return decode_within(self.autoencoder, latents, self.budget).float()
        return self.autoencoder.decode(latents).float()

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Decode the posterior mean: (B, C, D, H, W) -> the same, float32."""
        return self.autoencoder.decode(self.autoencoder.encode(images)[0]).float()

    def _scale(self) -> float:
        if self.scale_factor is None:
            raise UserError(
                "No scale factor: weights from elsewhere need --scale-factor X (1 / std of their latents)."
            )
        return self.scale_factor


def set_posterior_std(autoencoder: nn.Module, std: float) -> None:
    """Start training with posteriors of this standard deviation, by the bias of the log-variance layer."""
    layer = getattr(autoencoder, "quant_conv_log_sigma", None)
    if layer is None:
        raise UserError(
            "autoencoder_train.initial_posterior_std: this network has no log-variance layer; set null."
        )
    conv = next(module for module in layer.modules() if isinstance(module, nn.Conv3d))
    with torch.no_grad():
        conv.weight.mul_(0.1)
        conv.bias.fill_(2 * torch.tensor(std).log().item())


class LatentMoments:
    """Sums over latents that give their common standard deviation, reducible over ranks.

    The variance of draws mean + std * eps is E[mean^2] + E[std^2] - E[mean]^2, known without drawing.
    """

    def __init__(self):
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Add the posteriors of some volumes."""
        mean, std = mean.double(), std.double()
        values = [torch.tensor(float(mean.numel())), mean.sum(), (mean.square() + std.square()).sum()]
        self.sums += torch.stack([value.cpu().double() for value in values])

    def scale_factor(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> float:
        """1 / std over all volumes of all ranks; `reduce` adds the sums of the ranks up."""
        count, first, second = reduce(self.sums).tolist()
        variance = second / count - (first / count) ** 2
        if not variance > 0:
            raise UserError(
                f"The latents have variance {variance:.3g}: the autoencoder is not trained, or diverged."
            )
        return variance**-0.5
