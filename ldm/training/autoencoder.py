"""What stage 1 trains: autoencoder and discriminator with their optimisers; its validation; its memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from monai.networks.nets import PatchDiscriminator
from torch import nn

from ldm import UserError, configs, figures
from ldm.data.cases import Case
from ldm.data.datasets import VolumeDataset, WithDraws, among, stream
from ldm.data.prepare import step_size
from ldm.losses import UNTRAINED, AutoencoderLoss, adversarial_loss, discriminator_loss
from ldm.metrics import band_power, mean_dice, reconstruction_metrics
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import check_discriminator_size, latent_size, small_input
from ldm.models.layers import freeze_unreached, on_device
from ldm.models.slicewise import on_volumes
from ldm.models.weights import load_weights
from ldm.system.checkpoints import load_checkpoint
from ldm.system.ranks import Run
from ldm.training.memory import Meter, take_steps
from ldm.training.run_folder import StageFiles
from ldm.training.step import EMA, Optimizer, make_ema
from ldm.training.wrapping import prepare_network, wrap_network

LPIPS_SIDE = 16  # at which the last pooling of its networks leaves nothing
AMPLIFIED = 4  # as small differences are hard to see
COMPARISON_TAG = f"scan, reconstruction, difference x {AMPLIFIED}"

# What the held-out loss depends on: where one of them differs, two losses do not compare.
HELD_OUT_LOSS = ("recon_loss", "gradient_weight", "perceptual_weight", "label_weight")
HELD_OUT_LOSS += ("background_weight", "perceptual_network", "perceptual_slice_ratio", "val_patch_size")


class WithPosteriorDraw(WithDraws):
    """A data set whose items also hold the `posterior_noise`, (c, d, h, w), and a `noise_level`, |n| of a
    normal draw n."""

    purpose = "posterior"

    def draw(self, generator: torch.Generator, case: Case, shape: Sequence[int]) -> dict:
        posterior_noise = torch.randn(shape, generator=generator)
        return {"posterior_noise": posterior_noise, "noise_level": torch.randn((), generator=generator).abs()}


@dataclass
class AutoencoderLearner:
    """Autoencoder and discriminator in training.

    `model` and `wrapped_discriminator` are the networks as they are called in training: compiled, in DDP.
    `ema_model` is None where nothing is averaged, the discriminator's parts where its weight is 0.
    """

    autoencoder: Autoencoder
    model: nn.Module
    optimizer: Optimizer
    ema_model: EMA | None
    criterion: AutoencoderLoss
    discriminator: nn.Module | None = None
    wrapped_discriminator: nn.Module | None = None
    discriminator_optimizer: Optimizer | None = None
    frozen: list[str] = field(default_factory=list)

    @property
    def eval_network(self) -> nn.Module:
        """The network to validate and to keep: with averaged weights, where there are any."""
        return (self.ema_model.module if self.ema_model else self.autoencoder).network

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """By what they train."""
        both = {"autoencoder": self.optimizer, "discriminator": self.discriminator_optimizer}
        return {name: optimizer for name, optimizer in both.items() if optimizer}

    def state_dict(self) -> dict:
        """The entries of a checkpoint."""
        return {
            "model": self.autoencoder.network.state_dict(),
            "stepper": self.optimizer.state_dict(),
            "ema": self.ema_model.state_dict() if self.ema_model else None,
            "discriminator": self.discriminator.state_dict() if self.discriminator else None,
            "discriminator_stepper": self.discriminator and self.discriminator_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Load a checkpoint, whose `path` is among the entries."""
        where = str(state["path"])
        load_weights(self.autoencoder.network, state["model"], where)
        self.optimizer.load_state_dict(state["stepper"], where)
        if self.ema_model and state["ema"]:
            load_weights(self.ema_model, state["ema"], f"{where}: ema")
        if self.discriminator and state["discriminator"]:
            where = f"{where}: discriminator"
            load_weights(self.discriminator, state["discriminator"], where)
            self.discriminator_optimizer.load_state_dict(state["discriminator_stepper"], where)


def make_criterion(config: dict, perceptual_weights: str | object | None) -> AutoencoderLoss:
    """The loss of stage 1. `perceptual_weights` is as of `PerceptualLoss`."""
    labels, image = len(configs.labels_of(config)), bool(configs.channels_of(config))
    return AutoencoderLoss(
        config["autoencoder_train"], perceptual_weights, config["spatial_dims"], labels, image
    )


def build_learner(
    config: dict,
    network: nn.Module,
    patch_size: Sequence[int],
    val_size: Sequence[int],
    criterion: AutoencoderLoss,
    compiled: bool,
    run: Run,
) -> AutoencoderLearner:
    """Autoencoder, loss and, where its weight is not 0, the discriminator, on the device and wrapped."""
    section = config["autoencoder_train"]
    criterion = criterion.to(run.device)
    dims = config["spatial_dims"]
    smallest = min(patch_size[:dims], val_size[:dims], key=min)
    if criterion.perceptual and not criterion.perceptual.is_3d and min(smallest) <= LPIPS_SIDE:
        raise UserError(
            f"autoencoder_train.perceptual_network: slices of {smallest} are too small for a 2D "
            f"network, which needs more than {LPIPS_SIDE} voxels a side. Set perceptual_weight to 0."
        )
    frozen = freeze_unreached(Autoencoder(network), small_input(config, "autoencoder_def"), 0.0)
    autoencoder = Autoencoder(prepare_network(network, section, run))
    model = wrap_network(autoencoder, section, run, compiled)
    optimizer = Optimizer(model, section, run.amp_dtype)
    ema_model = make_ema(autoencoder, section["ema_decay"])
    learner = AutoencoderLearner(autoencoder, model, optimizer, ema_model, criterion, frozen=frozen)
    if section["adversarial_weight"]:
        discriminator = PatchDiscriminator(
            spatial_dims=dims,
            in_channels=config["image_channels"],  # of labels, shares and numbers would give it away
            out_channels=1,
            **section["discriminator"],
        )
        discriminator = on_volumes(discriminator) if dims == 2 else discriminator
        check_discriminator_size(discriminator, patch_size, "autoencoder_train.patch_size")
        discriminator = prepare_network(discriminator, {**section, "gradient_checkpointing": False}, run)
        learner.discriminator = discriminator
        learner.wrapped_discriminator = wrap_network(discriminator, section, run, compiled)
        section = {**section, "optimizer": "adam"}
        learner.discriminator_optimizer = Optimizer(learner.wrapped_discriminator, section, run.amp_dtype)
    return learner


def latent_shape_of(config: dict, autoencoder: Autoencoder, size: Sequence[int]) -> list[int]:
    """(c, d, h, w) of the latents of volumes of this size in voxels."""
    return [autoencoder.latent_channels, *latent_size(config, size)]


# ---------------------------------------------------------------- validation


@torch.no_grad()
def compare_with_reconstruction(
    autoencoder: Autoencoder,
    criterion: AutoencoderLoss,
    image: torch.Tensor,
    slices: torch.Generator,
    run: Run,
) -> tuple[torch.Tensor, dict]:
    """Of one volume (1, C, D, H, W): its reconstruction; PSNR, SSIM and L1, Dice of labels, and the held-out
    loss with its terms, of label maps alone 1 - Dice. `slices` draws those that a 2D perceptual network
    compares."""
    with run.autocast():
        reconstruction = autoencoder.reconstruct(image)
    numbers = criterion.held_out(image, reconstruction, slices)
    if criterion.labels:
        numbers["dice"] = mean_dice(criterion.labels_of(reconstruction), criterion.labels_of(image))
    if not criterion.image:
        return reconstruction, {**numbers, "loss": 1 - numbers["dice"]}
    both = criterion.image_of(reconstruction), criterion.image_of(image)
    return reconstruction, numbers | reconstruction_metrics(*(one.clamp(0, 1) for one in both))


@torch.no_grad()
def validate(
    autoencoder: Autoencoder, criterion: AutoencoderLoss, dataset: VolumeDataset, run: Run
) -> tuple[dict, dict]:
    """Reconstruct the held-out volumes, each rank its share. What is random is a function of the case alone.

    Returns:
        Means over all volumes of the held-out loss and its terms, PSNR, SSIM, L1 and the share of
        high-frequency power that is retained, of images, and Dice, of labels; and up to 4 pairs of volume and
        reconstruction (C, D, H, W) by the name of the case, for pictures: of a rank, the same cases each
        time.
    """
    autoencoder.eval()
    names = ["loss", *criterion.weights] + ["dice"] * bool(criterion.labels)
    names += ["psnr", "ssim", "l1", "power", "real power"] * criterion.image
    sums, pairs = torch.zeros(len(names) + 1, dtype=torch.float64), {}
    for i in range(run.rank, len(dataset), run.world_size):
        case, item = dataset.cases[i].name, dataset[(0, i)]
        image = item["image"][None, ..., among(item)].to(run.device)
        slices = stream(dataset.seed, "slices", "validation", case)
        reconstruction, numbers = compare_with_reconstruction(autoencoder, criterion, image, slices, run)
        if criterion.image:
            for key, one in (("power", reconstruction), ("real power", image)):
                numbers[key] = band_power(criterion.image_of(one))
        sums += torch.tensor([*(float(numbers[name]) for name in names), 1.0], dtype=torch.float64)
        if len(pairs) < 4:
            pairs[case] = image[0].cpu(), reconstruction[0].cpu()
    *sums, count = run.sum(sums).tolist()
    scores = {name: one / count for name, one in zip(names, sums, strict=True)}
    if criterion.image:
        real = scores.pop("real power")
        scores["power_share"] = scores["power"] / real if real else math.nan
    return scores, pairs


def in_words(scores: dict) -> str:
    """The scores of `validate` that a user reads first."""
    parts = []
    if "psnr" in scores:
        parts += [f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}, L1 {scores['l1']:.4f}"]
    parts += [f"Dice of labels {scores['dice']:.3f}"] if "dice" in scores else []
    if "power_share" in scores:
        parts += [f"{scores['power_share']:.2f} of the high-frequency power retained"]
    return ", ".join(parts)


def best_loss(
    files: StageFiles, config: dict, criterion: AutoencoderLoss, dataset: VolumeDataset, run: Run
) -> float:
    """The held-out loss of the best weights so far: as recorded, or measured now, where it was recorded with
    other terms or weights. So worse weights never replace them."""
    best, section = load_checkpoint(files.best), config["autoencoder_train"]
    recorded = configs.completed(best["config"])["autoencoder_train"] if best["config"] else {}
    same = all(recorded.get(key) == section[key] for key in HELD_OUT_LOSS)
    if same and "loss" in best.get("validation", {}):
        return best["best"]
    network = configs.define_network(config, "autoencoder_def")
    load_weights(network, best["model"], str(files.best))
    scores, _ = validate(Autoencoder(on_device(network, run, True)), criterion, dataset, run)
    run.print(
        f"{files.best} was chosen by another measure. Its held-out loss by this config is "
        f"{scores['loss']:.4g}, which the next best has to beat."
    )
    return scores["loss"]


def side_by_side(scan: torch.Tensor, reconstruction: torch.Tensor, spacing: Sequence[float]) -> np.ndarray:
    """A grey picture of two volumes (D, H, W) in three planes each, and of `AMPLIFIED` times their absolute
    difference."""
    pictures = [figures.three_planes(one, spacing) for one in (scan, reconstruction)]
    difference = np.clip(AMPLIFIED * np.abs(pictures[1] - pictures[0]), 0, 1)
    return np.concatenate([*pictures, difference])


# ---------------------------------------------------------------- memory


def rehearse(config: dict, sizes: Sequence[Sequence[int]], meter: Meter, run: Run) -> None:
    """Do what takes memory in this stage, on tensors without values: a training step with all terms of the
    loss, and the validation of a volume. `sizes` are those of `prepare.patch_sizes`."""
    patch_size, val_size = step_size(config, sizes[0]), sizes[2]
    section, channels, device = config["autoencoder_train"], config["volume_channels"], run.device
    with meter:
        network = configs.define_network(config, "autoencoder_def")
        criterion = make_criterion(config, UNTRAINED)
        learner = build_learner(config, network, patch_size, val_size, criterion, False, run)
        meter.hold("weights", learner.autoencoder, learner.criterion, learner.discriminator)
        meter.hold("averaged weights", learner.ema_model)
        meter.hold_optimizers(list(learner.optimizers.values()))
        slices, count = stream(config["seed"], "slices"), section["batch_size"]
        with meter.phase("training"):
            images = torch.zeros(count, channels, *patch_size, device=device)
            shape = latent_shape_of(config, learner.autoencoder, patch_size)
            eps = torch.zeros(count, *shape, device=device)
            with run.autocast():
                reconstruction, mean, std = learner.model(images, eps)
            loss = criterion(images, reconstruction, mean, std, slices)["loss"]
            if learner.discriminator:
                with run.autocast():
                    loss = loss + adversarial_loss(learner.discriminator, criterion.image_of(reconstruction))
            learner.optimizer.backward(loss)
            if learner.discriminator:
                with run.autocast():
                    both = criterion.image_of(reconstruction), criterion.image_of(images)
                    loss = discriminator_loss(learner.wrapped_discriminator, *both)
                learner.discriminator_optimizer.backward(loss)
            take_steps(list(learner.optimizers.values()))
        with meter.phase("validation"):
            image = torch.zeros(1, channels, *val_size, device=device)
            autoencoder = Autoencoder(learner.eval_network).eval()
            compare_with_reconstruction(autoencoder, criterion, image, slices, run)
