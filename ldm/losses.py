"""The terms of the autoencoder's loss. The adversarial term and its discriminator are MONAI's."""

from pathlib import Path

import torch
from torch import nn

from ldm import UserError
from ldm.backbones import medicalnet, standardised, trunk
from ldm.checkpoints import load_checkpoint
from ldm.networks import load_weights, plain_names


def kl_divergence(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, std^2) || N(0, 1)), summed over the latent and averaged over the batch (Kingma & Welling,
    2014)."""
    mean, std = mean.float(), std.float()
    kl = 0.5 * (mean.square() + std.square() - std.square().clamp_min(1e-20).log() - 1)
    return kl.sum() / len(mean)


def gradient_difference(reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the two volumes' finite differences, summed over the three axes.

    A blurred edge costs an L1 loss little and this one much (Mathieu et al., 2016, eq. 6, with exponent 1).
    """
    error = reconstruction - image
    return sum(error.diff(dim=axis).abs().mean() for axis in (-3, -2, -1))


MEDICALNET_DEPTHS = {"medicalnet_resnet10": 10, "medicalnet_resnet50": 50}
UNTRAINED = object()  # in place of a file of weights: random ones, to count what the network takes


class PerceptualLoss(nn.Module):
    """Distance of two volumes in the features of a frozen network, whose weights come from a local file.

    `squeeze`, `vgg`, `alex`: LPIPS (Zhang et al., 2018; package lpips) on slices of the three planes, summed
    over the planes. `medicalnet_*`: 3D features of MedicalNet (Chen et al., 2019), normalised over channels,
    squared difference.

    Args:
        network: one of the names above.
        weights: torchvision's weights of the 2D network, a whole LPIPS state dict, or MedicalNet's weights;
            or `UNTRAINED`.
        slice_ratio: share of the slices of each plane that are compared.

    Raises:
        UserError: the file or the package is missing, or the weights do not fit; it says how to go on
            without.
    """

    def __init__(self, network: str, weights: str | Path | object | None, slice_ratio: float = 0.2):
        super().__init__()
        without = "or set autoencoder_train.perceptual_weight to 0"
        self.slice_ratio, self.is_3d = slice_ratio, network.startswith("medicalnet")
        if not weights:
            source = "MedicalNet's" if self.is_3d else f"torchvision's {network}"
            raise UserError(
                f"autoencoder_train.perceptual_weight is above 0, but no weights are named. Save {source} "
                f'weights to a file and name it by "perceptual_weights" in the environment file, {without}.'
            )
        try:
            state = None if weights is UNTRAINED else load_checkpoint(Path(weights))["model"]
            if self.is_3d:
                self.network = medicalnet(MEDICALNET_DEPTHS[network], state, str(weights))
            else:
                self.network = _lpips(network, state, str(weights))
        except UserError as error:
            raise UserError(f"perceptual_weights: {error} Fix that, {without}.") from None
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in evaluation mode: the network is frozen."""
        return super().train(False)

    def forward(
        self, reconstruction: torch.Tensor, image: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """(B, C, D, H, W) twice -> scalar. `generator` (CPU) draws the slices that are compared."""
        reconstruction, image = (x.float().flatten(0, 1).unsqueeze(1) for x in (reconstruction, image))
        if self.is_3d:
            return (self._features(reconstruction) - self._features(image)).square().mean()
        total = reconstruction.new_zeros(())
        for axis in (2, 3, 4):
            a, b = (x.movedim(axis, 1).flatten(0, 1) for x in (reconstruction, image))
            count = max(1, int(len(a) * self.slice_ratio))
            chosen = torch.randperm(len(a), generator=generator)[:count].to(a.device)
            total = (
                total + self.network(a[chosen].expand(-1, 3, -1, -1), b[chosen].expand(-1, 3, -1, -1)).mean()
            )
        return total

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = trunk(self.network, standardised(x))
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def missing_package(network: str) -> str | None:
    """What to install for a perceptual network that cannot be built here, or None."""
    if network.startswith("medicalnet"):
        return None
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return (
            f"The network '{network}' needs the packages lpips and torchvision ({error}). Install them (pip "
            "install lpips), or choose a medicalnet network."
        )
    return None


def _lpips(network: str, state: dict | None, where: str) -> nn.Module:
    if missing := missing_package(network):
        raise UserError(missing)
    from lpips import LPIPS  # needed only by who asks for it, since it brings torchvision along

    # The linear layers come with the package; the trunk's weights from the file.
    model = LPIPS(net=network, pnet_rand=True, pretrained=state is not None, verbose=False)
    if state is None:
        return model
    state = plain_names(state)
    if any(name.startswith("features.") for name in state):
        # LPIPS cuts torchvision's `features` into slices and keeps each layer's number as its name.
        own = {name.partition(".")[2]: name for name in model.net.state_dict()}
        trunk = {
            own[key]: value for name, value in state.items() if (key := name.removeprefix("features.")) in own
        }
        load_weights(model.net, trunk, where)
    else:
        load_weights(model, state, where)
    return model
