"""Features of volumes by frozen networks, in which groups of volumes are compared.

`AutoencoderFeatures` needs no published weights: the encoder was trained on the user's own data. Distances in
it compare models over one autoencoder; they are not comparable with published ones. `MedicalNetFeatures` and
`RadImageNetFeatures` are those of the published 3D and 2.5D Fréchet distances.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ldm.models import perceptual
from ldm.models.autoencoder import Autoencoder
from ldm.models.perceptual import medicalnet, radimagenet, standardised, trunk

OWN, MEDICALNET, RADIMAGENET = "own", "medicalnet", "radimagenet"  # the networks
ANATOMY = "anatomy"  # beside them, without a network: `ldm.evaluation.anatomy`
GRID = 2  # cells a side, over which the encoder's activations are pooled
MIN_STD = 0.1  # smallest scale of a feature, relative to its layer's typical standard deviation
BGR_MEANS = (0.406, 0.456, 0.485)  # subtracted from the slices that RadImageNet was trained on
PLANES = ("sagittal", "coronal", "axial")


class AutoencoderFeatures:
    """Mean and standard deviation of each channel in each of GRID^3 cells, at each resolution of an
    autoencoder's encoder and of the posterior mean.

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


def stacked(features: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """One list of rows (F,) per volume, a row per layer -> one tensor (N, F) per layer."""
    return [torch.stack(layer) for layer in zip(*features, strict=True)]


class FeatureSpace:
    """Features standardised by those of real volumes; each layer has the same weight.

    Args:
        real: features of real volumes, one tensor (N, F) per layer; N of 2 or more.
    """

    def __init__(self, real: list[torch.Tensor]):
        self.centres = [layer.mean(0) for layer in real]
        self.scales = [
            spread.clamp_min(MIN_STD * spread.square().mean().sqrt()).clamp_min(1e-12)
            for spread in (layer.std(0) for layer in real)
        ]

    def __call__(self, layers: list[torch.Tensor]) -> torch.Tensor:
        """One tensor (N, F) per layer -> (N, sum of F), float64, with a mean square of about 1 for real
        volumes."""
        parts = [
            (layer - centre) / scale / (len(scale) * len(layers)) ** 0.5
            for layer, centre, scale in zip(layers, self.centres, self.scales, strict=True)
        ]
        features = torch.cat(parts, 1)
        return features * features.shape[1] ** 0.5


class MedicalNetFeatures:
    """Spatial mean of MedicalNet's last feature map, of each channel standardised to mean 0 and standard
    deviation 1: the features of the published 3D Fréchet distance.

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
    """RadImageNet's features of every slice in three planes: those of the published 2.5D Fréchet distance,
    the mean of one distance per plane.

    A slice is repeated in all three channels, scaled by the volume's minimum and maximum, less `BGR_MEANS`.
    """

    def __init__(self, state: dict, where: str, device: torch.device, batch: int = 32):
        self.network = radimagenet(state, where).to(device).eval().requires_grad_(False)
        self.batch = batch  # slices

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
            parts = [trunk(self.network, part).mean((2, 3)) for part in images.split(self.batch)]
            rows.append(torch.cat(parts).double().cpu())
        return rows


def feature_networks(
    autoencoder: Autoencoder | None,
    medicalnet_weights: Sequence[str] | None,
    radimagenet_weights: Sequence[str] | None,
    device: torch.device,
) -> tuple[dict[str, AutoencoderFeatures | MedicalNetFeatures | RadImageNetFeatures], dict[str, str]]:
    """The feature networks that are available, by name, and a line on each for the report.

    Args:
        medicalnet_weights, radimagenet_weights: a file, and, where it is to be checked, its SHA-256.

    Raises:
        UserError: a file cannot be read, does not fit, or has another SHA-256.
    """
    networks, about = {}, {}
    if autoencoder:
        networks[OWN] = AutoencoderFeatures(autoencoder)
        about["own features"] = "the autoencoder's encoder; not comparable with published values"
    if medicalnet_weights:
        path, *expected = medicalnet_weights
        state, digest = perceptual.read_weights(Path(path), *expected or [None])
        depth = perceptual.medicalnet_depth(state, path)
        networks[MEDICALNET] = MedicalNetFeatures(depth, state, path, device)
        about["MedicalNet"] = f"ResNet-{depth}, {Path(path).name}, SHA-256 {digest}"
    if radimagenet_weights:
        path, *expected = radimagenet_weights
        state, digest = perceptual.read_weights(Path(path), *expected or [None])
        networks[RADIMAGENET] = RadImageNetFeatures(state, path, device)
        about["RadImageNet"] = f"ResNet-50, {Path(path).name}, SHA-256 {digest}"
    return networks, about
