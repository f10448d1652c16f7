"""What stage 3 trains: a ControlNet beside the frozen diffusion network, on latents and their masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from ldm import UserError, configs
from ldm.data.datasets import VolumeDataset, version_of
from ldm.data.labels import label_of
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.process import NoiseProcess
from ldm.models.control import MASK, Controlled, coded, control_definition, region_weights, start_as_unet
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

# ---------------------------------------------------------------- masks


def masks_of(volumes: VolumeDataset, values: Sequence[int], run: Run, what: str) -> torch.Tensor:
    """The mask of each version of each volume, (cases, versions, D, H, W) uint8, on every rank.

    Args:
        volumes: without channels of labels; the masks are cropped and augmented as its images are.
        values: of the labels.
        what: the name of the progress bar.
    """
    pairs = VolumeDataset(
        volumes.cases,
        replace(volumes.preprocessing, labels=tuple(values)),
        volumes.size,
        cache_dir=volumes.cache_dir,
        cache_rate=bool(volumes.cached),
        seed=volumes.seed,
    )
    pairs.augmentation, pairs._versions = volumes.augmentation, volumes._versions
    found = torch.zeros(len(pairs), pairs.versions, *volumes.size, dtype=torch.uint8)
    mine = range(run.rank, len(pairs), run.world_size)
    for i in progress_bar(run, what, items=mine, unit="volume"):
        for version in range(pairs.versions):
            channels = pairs.image(i, version)[-len(values) :].numpy()
            found[i, version] = torch.from_numpy(label_of(channels, values))
    return run.sum(found)


class WithMask(Dataset):
    """A data set whose items also hold the `mask`, (D, H, W) uint8, of the version that the epoch has.

    Args:
        dataset: has `cases`, and keys `(epoch, i)`.
        masks: of `masks_of`.
        seed: of the order of versions.
    """

    def __init__(self, dataset: Dataset, masks: torch.Tensor, seed: int):
        self.dataset, self.cases, self.masks, self.seed = dataset, dataset.cases, masks, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        version = version_of(self.seed, epoch, self.cases[i].name, self.masks.shape[1])
        return {**self.dataset[key], MASK: self.masks[i, version]}


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
    frozen: list[str] = field(default_factory=list)

    @property
    def eval_control(self) -> nn.Module:
        """The ControlNet to validate and to keep: with averaged weights, where there are any."""
        return self.ema_model.module if self.ema_model else self.control

    @property
    def eval_network(self) -> Controlled:
        """The diffusion network with it."""
        return Controlled(self.unet, self.eval_control).eval()

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
    definition = config.get("controlnet_def") or control_definition(config["diffusion_def"], factor, values)
    control = instantiate(definition, NETWORKS, "controlnet_def")
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


def load_unet(path: Path, config: dict, run: Run) -> tuple[nn.Module, dict]:
    """The frozen diffusion network of stage 2 on the device, and its checkpoint without the weights.

    Raises:
        UserError: it was trained under another config, or its file holds weights alone.
    """
    checkpoint = load_checkpoint(path, "unet")
    if "scale_factor" not in checkpoint or "geometry" not in checkpoint:
        raise UserError(f"{path}: has no scale factor or geometry. Use a checkpoint of train_diffusion.py.")
    configs.check_fixed(checkpoint["config"], config, configs.FIXED["diffusion"], path)
    unet = configs.define_network(config, "diffusion_def")
    load_weights(unet, checkpoint.pop("model"), str(path))
    return on_device(unet, run).eval().requires_grad_(False), checkpoint


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
    weights = region_weights(mask, section["weighted_loss_label"], section["weighted_loss"], z0.shape[2:])
    errors = weights * (prediction.float() - process.target(z0, noise, t)).square()
    errors = errors.flatten(1).mean(1)
    if section["min_snr_gamma"] is not None:
        errors = process.min_snr_weight(t, section["min_snr_gamma"]) * errors
    return errors.mean()


# ---------------------------------------------------------------- memory


def rehearse(config: dict, sizes: Sequence[Sequence[int]], meter: Meter, run: Run) -> None:
    """Do what takes memory in this stage, on tensors without values: a training step and the validation of a
    volume. `sizes` are those of `prepare.patch_sizes`."""
    section, size = config["controlnet_train"], sizes[1]
    values = config["label_values"] or [255]
    process = NoiseProcess.from_config(config["NoiseScheduler"])
    count, latent = section["batch_size"], latent_size(config, size)
    channels = config["diffusion_def"]["out_channels"]
    with meter:
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
                prediction = predict(learner.model, process.add_noise(z0, z0, t), t, {**cond, MASK: mask})
            learner.optimizer.backward(diffusion_loss(process, prediction, z0, z0, t))
            take_steps([learner.optimizer])
        with torch.no_grad(), meter.phase("validation"), run.autocast():
            predict(learner.eval_network, process.add_noise(z0, z0, t), t, {**cond, MASK: mask})


def check_frozen(unet: nn.Module, expected: str) -> None:
    """Raise RuntimeError where the weights of the frozen network changed: a defect."""
    if weights_hash(unet.state_dict()) != expected:
        raise RuntimeError("the frozen diffusion network changed during the training of its ControlNet")


def mask_input(mask: torch.Tensor, bits: int, run: Run) -> torch.Tensor:
    """A mask (B, D, H, W) uint8 -> what the network takes, on the device."""
    return coded(mask.to(run.device, non_blocking=True), bits)
