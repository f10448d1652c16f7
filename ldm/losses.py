"""The terms of the autoencoder's loss. The discriminator of the adversarial term is MONAI's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ldm import UserError
from ldm.data.labels import logits, shares
from ldm.models.perceptual import medicalnet, standardised, trunk
from ldm.models.weights import load_weights, plain_names
from ldm.system.checkpoints import load_checkpoint


def kl_divergence(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, std^2) || N(0, 1)), summed over the latent and averaged over the batch (Kingma & Welling,
    2014)."""
    mean, std = mean.float(), std.float()
    kl = 0.5 * (mean.square() + std.square() - std.square().clamp_min(1e-20).log() - 1)
    return kl.sum() / len(mean)


def gradient_difference(
    reconstruction: torch.Tensor, image: torch.Tensor, axes: Sequence[int] = (-3, -2, -1)
) -> torch.Tensor:
    """Mean absolute difference of the two volumes' finite differences, summed over the axes.

    It penalises blurred edges, which an L1 loss hardly does (Mathieu et al., 2016, eq. 6, with exponent 1).
    """
    error = reconstruction - image
    return sum(error.diff(dim=axis).abs().mean() for axis in axes)


def least_squares(logits: torch.Tensor, target: float) -> torch.Tensor:
    """Least-squares adversarial loss (Mao et al., 2017) of the discriminator's output against 1 (real) or 0.

    The same as MONAI's `PatchAdversarialLoss`, including its leaky ReLU. MONAI's copies its target from the
    CPU at every call, which makes the CPU wait for the GPU.
    """
    logits = nn.functional.leaky_relu(logits, 0.05)
    return nn.functional.mse_loss(logits, torch.full_like(logits, target))


def discriminator_loss(
    discriminator: nn.Module, reconstruction: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """Least-squares loss of the discriminator on reconstructions and images, in one pass."""
    logits = discriminator(torch.cat([reconstruction.detach(), images]).contiguous())[-1]
    fake, real = logits.float().chunk(2)
    return 0.5 * (least_squares(fake, 0.0) + least_squares(real, 1.0))


def adversarial_loss(discriminator: nn.Module, reconstruction: torch.Tensor) -> torch.Tensor:
    """The generator's least-squares loss; the discriminator's weights get no gradient."""
    discriminator.requires_grad_(False)
    logits = discriminator(reconstruction.contiguous())[-1]
    discriminator.requires_grad_(True)
    return least_squares(logits.float(), 1.0)


UNTRAINED = object()  # instead of a file: random weights, for the memory forecast


class PerceptualLoss(nn.Module):
    """Distance of two volumes in the features of a frozen network, whose weights come from a local file.

    `squeeze`, `vgg`, `alex`: LPIPS (Zhang et al., 2018; package lpips) on slices of the three planes, summed
    over the planes.
    `medicalnet_*`: 3D features of MedicalNet (Chen et al., 2019), normalised over channels, squared
    difference.

    Args:
        network: one of the names above.
        weights: torchvision's weights of the 2D network, a whole LPIPS state dict, or MedicalNet's weights;
            or `UNTRAINED`.
        slice_ratio: share of the slices of each plane that are compared.
        dims: of the autoencoder. 2: LPIPS sees the axial slices alone, as the autoencoder does.

    Raises:
        UserError: the file or the package is missing, or the weights do not fit; the message says how to
            train without.
    """

    def __init__(
        self, network: str, weights: str | Path | object | None, slice_ratio: float = 0.2, dims: int = 3
    ):
        super().__init__()
        self.across = (2, 3, 4) if dims == 3 else (4,)  # axes to take slices along
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
                depth = int(network.removeprefix("medicalnet_resnet"))
                self.network = medicalnet(depth, state, str(weights))
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
            a, b = (unit_vectors(trunk(self.network, standardised(x))) for x in (reconstruction, image))
            return (a - b).square().mean()
        total = reconstruction.new_zeros(())
        for axis in self.across:
            a, b = (x.movedim(axis, 1).flatten(0, 1) for x in (reconstruction, image))
            count = max(1, int(len(a) * self.slice_ratio))
            chosen = torch.randperm(len(a), generator=generator)[:count].to(a.device, non_blocking=True)
            total = total + lpips_distance(self.network, a[chosen], b[chosen]).mean()
        return total


def unit_vectors(features: torch.Tensor) -> torch.Tensor:
    """Features (B, c, ...) over their norm along the channels.

    The constant is inside the root: the gradient of a norm is NaN at zero, which a ReLU gives in uniform
    regions.
    """
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def lpips_distance(network: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LPIPS of grey slices (n, 1, H, W) in [0, 1], (n, 1, 1, 1): Zhang et al., 2018, eq. 1.

    As `network(a, b, normalize=True)` of the package lpips, but with `unit_vectors` for its own, which has
    NaN gradients at zero features.
    """
    of_a, of_b = (network.net(network.scaling_layer((2 * x - 1).expand(-1, 3, -1, -1))) for x in (a, b))
    return sum(
        linear((unit_vectors(one) - unit_vectors(other)).square()).mean((2, 3), keepdim=True)
        for linear, one, other in zip(network.lins, of_a, of_b, strict=True)
    )


def missing_package(network: str) -> str | None:
    """What to install for a perceptual network that cannot be built here, or None."""
    if network.startswith("medicalnet"):
        return None
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError) as error:
        what = f"The network '{network}' needs the packages lpips and torchvision ({error})."
        return f"{what} Install them (pip install lpips), or choose a medicalnet network."
    return None


def _lpips(network: str, state: dict | None, where: str) -> nn.Module:
    if missing := missing_package(network):
        raise UserError(missing)
    from lpips import LPIPS  # optional: it needs torchvision

    # The linear layers come with the package, the weights of the trunk from the file.
    model = LPIPS(net=network, pnet_rand=True, pretrained=state is not None, verbose=False)
    state = plain_names(state or {})
    if any(name.startswith("features.") for name in state):
        # LPIPS cuts torchvision's `features` into slices and keeps each layer's number as its name.
        state = {name.removeprefix("features."): value for name, value in state.items()}
        own = {name.partition(".")[2]: name for name in model.net.state_dict()}
        load_weights(model.net, {own[key]: state[key] for key in own.keys() & state}, where)
    elif state:
        load_weights(model, state, where)
    return model


def dice_and_cross_entropy(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """1 - soft Dice over the batch, the mean of all labels but background (Milletari et al., 2016), plus
    cross-entropy: logits and shares of background and labels, (B, 1 + L, D, H, W) each -> a scalar.

    The values of MONAI's `DiceCELoss`, which reads its inputs on the CPU, so that a GPU would wait for it.
    """
    axes, probabilities = (0, 2, 3, 4), logits.softmax(1)
    overlap = (probabilities * shares).sum(axes)[1:]
    sizes = (probabilities + shares).sum(axes)[1:]
    dice = (2 * overlap + 1e-5) / (sizes + 1e-5)
    return 1 - dice.mean() + nn.functional.cross_entropy(logits, shares)


RECON_LOSSES = {"l1": nn.functional.l1_loss, "l2": nn.functional.mse_loss}


class AutoencoderLoss(nn.Module):
    """The autoencoder's loss: reconstruction, gradient difference, KL and perceptual terms, each with its
    weight, and of labels Dice and cross-entropy. The adversarial term is added by the training loop after the
    warm-up.

    Args:
        section: `autoencoder_train` of the config.
        perceptual_weights: as of `PerceptualLoss`.
        dims: of the autoencoder. A 2D one sees no differences from slice to slice.
        labels: how many channels, the last, are those of labels; the other terms are of the image alone.
        image: whether volumes have channels of an image.
    """

    def __init__(
        self,
        section: dict,
        perceptual_weights: str | None,
        dims: int = 3,
        labels: int = 0,
        image: bool = True,
    ):
        super().__init__()
        self.axes = (-3, -2, -1)[:dims]
        self.section, self.recon = section, RECON_LOSSES[section["recon_loss"]]
        terms = ["gradient", "perceptual"] + ["label"] * bool(labels)
        weights = {f"{term}_loss": section[f"{term}_weight"] for term in terms}
        weights = {"recon_loss": float(image), **weights}
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self.labels, self.image = labels, image
        self.perceptual = None
        if section["perceptual_weight"]:
            self.perceptual = PerceptualLoss(
                section["perceptual_network"], perceptual_weights, section["perceptual_slice_ratio"], dims
            )

    def forward(self, images, reconstruction, mean, std, generator) -> dict[str, torch.Tensor]:
        """Terms by name, unweighted, and their weighted sum as "loss". `std` (B,) is the loss of quantised
        latents, in the place of KL."""
        if std.dim() == 1:
            terms = self._terms(images, reconstruction, generator, None)
            terms["quantisation_loss"] = std.mean()
            return {**terms, "loss": terms["loss"] + terms["quantisation_loss"]}
        return self._terms(images, reconstruction, generator, kl_divergence(mean, std))

    def image_of(self, volumes: torch.Tensor) -> torch.Tensor:
        """The channels of volumes (B, C, D, H, W) that are the image's."""
        return volumes[:, : volumes.shape[1] - self.labels]

    def labels_of(self, volumes: torch.Tensor) -> torch.Tensor:
        """The channels that are the label's."""
        return volumes[:, volumes.shape[1] - self.labels :]

    def _reconstruction(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The mean error, in which voxels that are 0 in all channels have the weight `background_weight`."""
        if (least := self.section["background_weight"]) == 1:
            return self.recon(reconstruction, images)
        weights = torch.where((images > 0).any(1, keepdim=True), 1.0, least)
        errors = self.recon(reconstruction, images, reduction="none")
        return (weights * errors).sum() / weights.expand_as(errors).sum().clamp_min(1e-6)

    def held_out(self, images, reconstruction, generator) -> dict[str, torch.Tensor]:
        """The same without KL, which does not compare reconstructions with images."""
        return self._terms(images, reconstruction, generator, None)

    def _terms(self, images, reconstruction, generator, kl: torch.Tensor | None) -> dict[str, torch.Tensor]:
        reconstruction, weights = reconstruction.float(), dict(self.weights)
        given, made = self.labels_of(images), self.labels_of(reconstruction)
        images, reconstruction = self.image_of(images), self.image_of(reconstruction)
        terms = {}
        if "recon_loss" in self.weights:
            terms["recon_loss"] = self._reconstruction(reconstruction, images)
        if kl is not None:
            terms["kl_loss"], weights["kl_loss"] = kl, self.section["kl_weight"]
        if "gradient_loss" in self.weights:
            terms["gradient_loss"] = gradient_difference(reconstruction, images, self.axes)
        if self.perceptual is not None:
            terms["perceptual_loss"] = self.perceptual(reconstruction, images, generator)
        if "label_loss" in self.weights:
            terms["label_loss"] = dice_and_cross_entropy(logits(made), shares(given))
        return {**terms, "loss": sum(weights[name] * term for name, term in terms.items())}
