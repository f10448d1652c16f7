"""What stage 3 trains: a ControlNet beside the frozen diffusion network, on latents and their masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ldm import UserError, configs, few
from ldm.data.augmentation import AFFINE, count_parameters
from ldm.data.datasets import VolumeDataset, stream, version_of
from ldm.data.labels import SURROUNDINGS, without_structure
from ldm.data.posteriors import rows_by_size
from ldm.data.preprocessing import largest_share
from ldm.data.reading import label_type
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.process import NoiseProcess
from ldm.models.autoencoder import Autoencoder
from ldm.models.control import (
    MASK,
    Controlled,
    contrast_loss,
    control_definition,
    fit_embedding,
    region_weights,
    start_as_unet,
)
from ldm.models.definitions import NETWORKS, downsampling_factor, instantiate, latent_size
from ldm.models.denoiser import example_cond, predict
from ldm.models.layers import on_device
from ldm.models.weights import load_weights
from ldm.system.checkpoints import load_checkpoint, weights_hash
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run
from ldm.training.memory import Meter, take_steps
from ldm.training.step import EMA, Optimizer, make_ema
from ldm.training.wrapping import prepare_network, wrap_network

AT_A_TIME = 16  # labels whose shares of a volume are in memory
MASK_WITHOUT = "mask_without"  # of an item: its mask without one structure

# ---------------------------------------------------------------- masks


def masks_of(volumes: VolumeDataset, values: Sequence[int], run: Run, what: str) -> list[torch.Tensor]:
    """The mask of each version of each volume, (versions, D, H, W) uint8 or int16 of each case, on every
    rank.

    Args:
        volumes: of images; the masks are cropped and augmented as these are.
        values: of the labels.
        what: the name of the progress bar.
    """
    if volumes.versions is None:
        raise UserError(
            "controlnet_train.augment: set versions, such as to 2: latents and masks are made once for each."
        )
    kind = torch.uint8 if label_type(values) is np.uint8 else torch.int16
    groups = rows_by_size(volumes)
    stacks = {  # parts of one tensor for each size, which loader processes share
        size: torch.zeros(len(members), volumes.versions, *size, dtype=kind)
        for size, members in groups.items()
    }
    rows = {i: row for members in groups.values() for row, i in enumerate(members)}
    parts = [volumes.labels_alone(values[i : i + AT_A_TIME]) for i in range(0, len(values), AT_A_TIME)]
    mine = range(run.rank, len(volumes), run.world_size)
    for i in progress_bar(run, what, items=mine, unit="volume"):
        for version in range(volumes.versions):
            shares = (share for part in parts for share in part.image(i, version).numpy())
            mask = torch.from_numpy(largest_share(shares, values))
            stacks[volumes.size_of(i)][rows[i], version] = mask
    if run.world_size > 1:
        for size, stack in stacks.items():  # gloo adds up no int16
            stacks[size] = run.sum(stack.int() if kind is torch.int16 else stack).to(kind)
    return [stacks[volumes.size_of(i)][rows[i]] for i in range(len(volumes))]


class WithMask(Dataset):
    """A data set whose items also hold the `mask`, (D, H, W), of the version that the epoch has, and
    `mask_without`, in which one of its structures is replaced, where some are to be.

    Args:
        dataset: has `cases`, and keys `(epoch, i)`.
        masks: of `masks_of`.
        seed: of the order of versions, and of which structure is replaced.
        remove: {value: what replaces it}, as `controlnet_train.contrast_remove` has it.
    """

    def __init__(
        self, dataset: Dataset, masks: Sequence[torch.Tensor], seed: int, remove: dict[str, int | str]
    ):
        self.dataset, self.cases, self.masks, self.seed = dataset, dataset.cases, masks, seed
        self.shapes = dataset.shapes
        self.remove = {int(value): instead for value, instead in remove.items()}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        version = version_of(self.seed, epoch, self.cases[i].name, len(self.masks[i]))
        mask = self.masks[i][version]
        item = {**self.dataset[key], MASK: mask}
        if self.remove:
            present = [value for value in self.remove if (mask == value).any()]
            if present:
                generator = stream(self.seed, "remove", epoch, self.cases[i].name)
                value = present[int(torch.randint(len(present), (), generator=generator))]
                mask = torch.from_numpy(without_structure(mask.numpy(), value, self.remove[value]))
            item[MASK_WITHOUT] = mask
        return item


# ---------------------------------------------------------------- the learner


@dataclass
class ControlLearner:
    """The ControlNet in training. `model` is both networks as training calls them: compiled, in DDP.
    `ema_model` is None where nothing is averaged; `bits` code a mask."""

    control: nn.Module
    unet: nn.Module
    model: nn.Module
    optimizer: Optimizer
    ema_model: EMA | None
    bits: int

    @property
    def eval_control(self) -> nn.Module:
        """The ControlNet to validate and to keep: with averaged weights, where there are any."""
        return self.ema_model.module if self.ema_model else self.control

    @property
    def eval_network(self) -> Controlled:
        """The diffusion network with it."""
        return Controlled(self.unet, self.eval_control).eval()

    @property
    def bare_model(self) -> Controlled:
        """Both networks without DDP, for passes without gradient in training."""
        return Controlled(self.unet, self.control)

    def state_dict(self) -> dict:
        """The entries of a checkpoint."""
        return {
            "model": self.control.state_dict(),
            "stepper": self.optimizer.state_dict(),
            "ema": self.ema_model.state_dict() if self.ema_model else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Load a checkpoint."""
        where = str(state["path"])
        load_weights(self.control, state["model"], where)
        self.optimizer.load_state_dict(state["stepper"], where)
        if self.ema_model and state["ema"]:
            load_weights(self.ema_model, state["ema"], f"{where}: ema")


def define_control(config: dict, values: Sequence[int]) -> tuple[nn.Module, int]:
    """The ControlNet of a config, and the bits of its masks.

    Raises:
        UserError: it cannot be built, or has too few bits for the labels.
    """
    factor = downsampling_factor(config["autoencoder_def"])
    stated = config.get("controlnet_def")
    definition = stated or control_definition(config["diffusion_def"], factor, values)
    control = instantiate(definition, NETWORKS, "controlnet_def")
    if not stated:
        fit_embedding(control, factor)
    bits = definition.get("conditioning_embedding_in_channels", 1)
    if max(values) >= 2**bits:
        raise UserError(
            f"controlnet_def.conditioning_embedding_in_channels: {bits} bits cannot code label {max(values)}."
        )
    return control, bits


def build_learner(
    config: dict, unet: nn.Module, values: Sequence[int], compiled: bool, run: Run
) -> ControlLearner:
    """The ControlNet on the device, wrapped with the frozen diffusion network, and its optimiser.

    Args:
        unet: on the device.
        values: of the labels.
    """
    section = config["controlnet_train"]
    control, bits = define_control(config, values)
    start_as_unet(control, unet)
    control = prepare_network(control, section, run)
    model = wrap_network(Controlled(unet.eval(), control), section, run, compiled)
    optimizer, ema_model = Optimizer(model, section, run.amp_dtype), make_ema(control, section["ema_decay"])
    return ControlLearner(control, unet, model, optimizer, ema_model, bits)


def check_values(values: Sequence[int], section: dict, resumed: dict | None) -> None:
    """Check the labels of the masks.

    Raises:
        UserError: there are none, a weighted one is not among them, or they are not those of the checkpoint
            that is resumed.
    """
    if not values:
        raise UserError("masks: the labels are 0 everywhere.")
    remove = section["contrast_remove"]
    if bool(remove) != bool(section["contrast_weight"]):
        raise UserError("controlnet_train: set contrast_weight and contrast_remove, or neither.")
    instead = {one for one in remove.values() if one != SURROUNDINGS} - {0}
    for key, named in (
        ("weighted_loss_label", section["weighted_loss_label"]),
        ("contrast_remove", instead | {*map(int, remove)}),
    ):
        if others := sorted({*named} - {*values}):
            raise UserError(f"controlnet_train.{key}: {few(others)} not among the labels, {few(values, 12)}.")
    if resumed and resumed["label_values"] != list(values):
        raise UserError(
            f"{resumed['path']}: was trained on labels {few(resumed['label_values'], 12)}; now they are "
            f"{few(values, 12)}. Restore the labels, or start over with --fresh."
        )


def told_augmentation(config: dict, conditions: Conditions) -> dict | None:
    """The augmentation that the network is told, where its diffusion model was (`conditions.augmentation`).

    Raises:
        UserError: it is another than that of stage 2, for which the network has its inputs.
    """
    augment = config["controlnet_train"]["augment"]
    if not conditions.told or not count_parameters(augment):
        return None
    keys = ("flip_axes", *AFFINE)
    if any(augment[key] != config["diffusion_train"]["augment"][key] for key in keys):
        raise UserError(
            "controlnet_train.augment: the diffusion model is told how volumes were augmented. Set the same "
            "flips and affine changes as in diffusion_train.augment, or none."
        )
    return augment


def load_unet(path: Path, config: dict, run: Run) -> tuple[nn.Module, dict]:
    """The frozen diffusion network of stage 2 on the device, and its checkpoint without the weights.

    Raises:
        UserError: it was trained under another config, or its file holds weights alone.
    """
    checkpoint = load_checkpoint(path, "unet")
    if "scale_factor" not in checkpoint or "geometry" not in checkpoint:
        raise UserError(f"{path}: has no scale factor or geometry. Use a checkpoint of train_diffusion.py.")
    keys = [key for key in configs.FIXED["diffusion"] if key != "spacing" or config["spacing"]]
    configs.check_fixed(checkpoint["config"], config, keys, path)
    unet = configs.define_network(config, "diffusion_def")
    load_weights(unet, checkpoint.pop("model"), str(path))
    return on_device(unet, run).eval().requires_grad_(False), checkpoint


def label_weights(mask: torch.Tensor, section: dict, size: Sequence[int]) -> torch.Tensor:
    """`region_weights` of the labels that `controlnet_train` weighs."""
    return region_weights(mask, section["weighted_loss_label"], section["weighted_loss"], size)


def weighted_loss(
    process: NoiseProcess, prediction: torch.Tensor, batch: dict, section: dict, mask: torch.Tensor
) -> torch.Tensor:
    """As `diffusion_loss`, with the voxels of some labels and those beside them weighted.

    Args:
        batch: `z0`, `noise`, `t`.
        section: `controlnet_train` of the config.
        mask: (B, D, H, W).
    """
    z0, noise, t = (batch[key] for key in ("z0", "noise", "t"))
    if not section["weighted_loss_label"]:
        return diffusion_loss(process, prediction, z0, noise, t, section["min_snr_gamma"])
    weights = label_weights(mask, section, z0.shape[2:])
    errors = weights * (prediction.float() - process.target(z0, noise, t)).square()
    errors = errors.flatten(1).mean(1)
    if section["min_snr_gamma"] is not None:
        errors = process.min_snr_weight(t, section["min_snr_gamma"]) * errors
    return errors.mean()


# ---------------------------------------------------------------- memory


def rehearse(config: dict, sizes: Sequence[Sequence[int]], meter: Meter, run: Run) -> None:
    """Do what takes memory in this stage, on tensors without values: encoding a volume, a training step and
    the validation of a volume. `sizes` are those of `prepare.patch_sizes`."""
    section, size = config["controlnet_train"], sizes[1]
    values = config["label_values"] or [255]
    process = NoiseProcess.from_config(config["NoiseScheduler"])
    count, latent = section["batch_size"], latent_size(config, size)
    channels = config["diffusion_def"]["out_channels"]
    with meter:
        network = configs.define_network(config, "autoencoder_def").eval().requires_grad_(False)
        image = torch.zeros(1, config["volume_channels"], *size, device=run.device)
        with torch.no_grad(), meter.phase("encoding"):
            Autoencoder(network).encode(image)
        del network, image
        unet = configs.define_network(config, "diffusion_def").requires_grad_(False)
        learner = build_learner(config, unet, values, False, run)
        meter.hold("weights", learner.unet, learner.control)
        meter.hold("averaged weights", learner.ema_model)
        meter.hold_optimizers([learner.optimizer])
        z0 = torch.zeros(count, channels, *latent, device=run.device)
        mask = torch.zeros(count, learner.bits, *size, device=run.device)
        cond = example_cond(config["diffusion_def"], count, latent)
        t = process.draw_times(torch.zeros(count, device=run.device))
        with meter.phase("training"):
            with run.autocast():
                zt = process.add_noise(z0, z0, t)
                prediction = predict(learner.model, zt, t, {**cond, MASK: mask})
            loss = diffusion_loss(process, prediction, z0, z0, t)
            if section["contrast_weight"]:
                whole = mask[:, 0]
                with torch.no_grad(), run.autocast():
                    without = predict(learner.bare_model, zt, t, {**cond, MASK: torch.zeros_like(mask)})
                loss = loss + contrast_loss(prediction, without, whole, whole)
            learner.optimizer.backward(loss)
            take_steps([learner.optimizer])
        with torch.no_grad(), meter.phase("validation"), run.autocast():
            predict(learner.eval_network, process.add_noise(z0, z0, t), t, {**cond, MASK: mask})


def check_frozen(unet: nn.Module, expected: str) -> None:
    """Raise RuntimeError where the weights of the frozen network changed: a defect."""
    if weights_hash(unet.state_dict()) != expected:
        raise RuntimeError("the frozen diffusion network changed during the training of its ControlNet")
