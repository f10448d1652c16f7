"""What frozen networks see in a volume: a row of numbers for each, by which sets of volumes are compared.

`AutoencoderFeatures` needs no weights from elsewhere: the encoder is the one that was trained on the user's
own data. Distances in it compare models over the same autoencoder and are never to be set beside published
ones. `MedicalNetFeatures` and `RadImageNetFeatures` are those of the published 3D and 2.5D Fréchet distances.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ldm.models.autoencoder import Autoencoder
from ldm.models.perceptual import medicalnet, radimagenet, standardised, trunk

GRID = 2  # cells a side, over which the encoder's activations are pooled
FLAT = 0.1  # of a group's typical standard deviation: features that vary less do not count for more
BGR_MEANS = (0.406, 0.456, 0.485)  # which the slices that RadImageNet was trained on lack
PLANES = ("sagittal", "coronal", "axial")


class AutoencoderFeatures:
    """Of each resolution of an autoencoder's encoder, and of the posterior mean, each channel's mean and
    standard deviation in each of GRID^3 cells.

    Args:
        autoencoder: frozen. The activations are those after the last block of each resolution.
    """

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder

    @torch.no_grad()
    def __call__(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """(1, C, D, H, W) -> a row (F,) for each resolution and one for the mean, float64 on the CPU."""
        device = next(self.autoencoder.parameters()).device
        return [_pooled(x)[0].double().cpu() for x in self.autoencoder.activations(volume.to(device))]


def _pooled(activation: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of each channel in each cell: (N, c, d, h, w) -> (N, F)."""
    activation = activation.float()
    mean, square = (
        nn.functional.adaptive_avg_pool3d(x, GRID).flatten(1) for x in (activation, activation.square())
    )
    return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], 1)


def rows_of(network, volumes: torch.Tensor) -> list[torch.Tensor]:
    """Rows (N, F) of volumes (N, C, D, H, W), one by one: a tensor for each group of features of
    `network`."""
    return stacked([network(volume[None]) for volume in volumes])


def stacked(features: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Rows of volumes, a list of groups each -> (N, F) a group."""
    return [torch.stack(group) for group in zip(*features, strict=True)]


class FeatureSpace:
    """Features standardised by those of real volumes, each group with the same weight.

    Args:
        real: rows of real volumes, a tensor (N, F) a group; N of 2 or more.
    """

    def __init__(self, real: list[torch.Tensor]):
        self.centres = [group.mean(0) for group in real]
        self.scales = [
            spread.clamp_min(FLAT * spread.square().mean().sqrt()).clamp_min(1e-12)
            for spread in (group.std(0) for group in real)
        ]

    def __call__(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """Rows (N, F) of each group -> (N, all of them), float64; the mean square of real volumes' is about
        1."""
        parts = [
            (group - centre) / scale / (len(scale) * len(groups)) ** 0.5
            for group, centre, scale in zip(groups, self.centres, self.scales, strict=True)
        ]
        features = torch.cat(parts, 1)
        return features * features.shape[1] ** 0.5


class MedicalNetFeatures:
    """The mean over space of MedicalNet's last feature map, of a volume with mean 0 and standard deviation 1,
    one channel after the other. The features of the published 3D Fréchet distance.

    Args:
        state: weights of the network of this depth.
    """

    def __init__(self, depth: int, state: dict, where: str, device: torch.device):
        self.network = medicalnet(depth, state, where).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """(1, C, D, H, W) -> one row (C * F,), float64 on the CPU."""
        maps = trunk(self.network, standardised(volume[0][:, None].float()))
        return [maps.mean((2, 3, 4)).flatten().double().cpu()]


class RadImageNetFeatures:
    """For each of three planes the mean over its slices of RadImageNet's features: those of the published
    2.5D Fréchet distance, which takes one distance a plane and their mean.

    A slice has the same values in all three channels, is scaled by the least and the most of the volume, and
    lacks `BGR_MEANS`.
    """

    def __init__(self, state: dict, where: str, device: torch.device, slices: int = 32):
        self.network = radimagenet(state, where).to(device).eval().requires_grad_(False)
        self.slices = slices  # at a time

    @torch.no_grad()
    def __call__(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """(1, 1, D, H, W) -> a row (slices, F) for each of `PLANES`, float64 on the CPU."""
        volume = volume[0, 0].float()
        low, high = volume.min(), volume.max()
        volume = (volume - low) / (high - low + 1e-10)
        means = torch.tensor(BGR_MEANS, device=volume.device).reshape(1, 3, 1, 1)
        rows = []
        for axis in range(3):
            images = volume.movedim(axis, 0)[:, None] - means
            rows.append(
                torch.cat([trunk(self.network, some).mean((2, 3)) for some in images.split(self.slices)])
                .double()
                .cpu()
            )
        return rows
