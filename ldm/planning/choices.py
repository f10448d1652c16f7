"""Make the plan of a training from the fingerprint of its data.

The rules for spacing and strides are nnU-Net's (Isensee et al., 2021), those for the number of levels are
those of Medical Image Generation with nnU-Net; networks, batch and checkpointing are the largest that the
memory forecast allows; optimiser and losses are those that this project measured to be best.
docs/planner.md lists them all.
"""

import math
from collections.abc import Sequence

import numpy as np

from ldm import counted
from ldm.data.cases import rounded, size_at
from ldm.data.nnunet import NnunetPlan
from ldm.data.reading import by_times
from ldm.diffusion.conditioning import position_channels
from ldm.models.strides import KEY
from ldm.planning import memory
from ldm.planning.geometry import (
    MOST_PADDING,
    SMALLEST_LATENT,
    coarser,
    grids_of,
    padded,
    strides_for,
    target_spacing,
    unet_strides,
)
from ldm.planning.plan import REMOVED, STAGES, Machine, Plan

ONE_LEVEL, TWO_LEVELS = 96, 384  # the longest side up to which an autoencoder halves once, twice
CPU_VOXELS = 10_000  # of a volume for each minute, about as in config_demo.json and config_t1_2mm.json
CPU_LATENT = 2048  # voxels; on a CPU larger latents are halved once more, where one level would do
HAAR_LEVELS = 2  # 64 channels of each
UNET_LEVELS = {"pixel": 3, "latent": 2, "haar": 2}  # halvings at most
SPACES = tuple(UNET_LEVELS)
SEEN_BY_A_PATCH = 0.25  # of the volume, below which nnU-Net trains at a low resolution first
SYMMETRIC = 0.85  # correlation with the mirror image
NOT_ZERO = 0.75  # of the voxels, below which intensities are those of what is not 0 alone
HOUNSFIELD = [-1000.0, 1000.0]
TRIED = "docs/PERFORMANCE.md, what was tried for sharper samples"
STEPS = {"autoencoder_train": 10_000, "diffusion_train": 40_000}
FEW_SUBJECTS, HELD_OUT_OF_FEW = 200, 0.2
SLICES = 4  # of each volume in a step, for 2D networks
VALIDATIONS = 40  # over a training that is not limited by the clock
STEPS_OF_A_VALIDATION = 200  # in one that is
SHARES = {"autoencoder_train": 0.25, "diffusion_train": 0.75}  # of the minutes


def make_plan(
    fingerprint: dict,
    names: dict[int, str],
    machine: Machine,
    space: str = "latent",
    spacing: Sequence[float] | None = None,
    dims: int = 3,
    nnunet: NnunetPlan | None = None,
    overrides: dict[str, tuple[object, str]] | None = None,
    with_labels: bool = False,
) -> Plan:
    """Choose a config.

    Args:
        fingerprint: of `ldm.data.fingerprint`.
        names: of the channels that are used, by number.
        space: `latent`, `pixel` or `haar`: what the diffusion model learns.
        spacing: in mm; None chooses.
        dims: 2 or 3, of the networks.
        nnunet: whose spacing, strides and windows are used.
        overrides: as of `Plan`.
        with_labels: whether labels are drawn with images.

    Raises:
        UserError: not even the smallest networks fit the memory.
    """
    made = Plan(overrides)

    # Spacing and size
    spacings, shapes = np.array(fingerprint["spacings"]), np.array(fingerprint["shapes"])
    chosen, why = target_spacing(spacings, shapes)
    if nnunet:
        chosen, why = nnunet.spacing, f"that of {nnunet.configuration} in {nnunet.path}"
    by_hand = made.overrides.get("spacing", (REMOVED,))[0]
    if spacing is None and by_hand is not REMOVED:
        spacing = by_hand
    if spacing is not None:
        chosen, why = list(spacing), "given"
    size = _size(shapes, spacings, chosen)
    most = math.inf if machine.gpu or not machine.minutes else CPU_VOXELS * machine.minutes
    if spacing is None and math.prod(size) > most:
        chosen = coarser(chosen, size, most)
        why += f"; coarser, for {CPU_VOXELS:,} voxels a volume for each minute on a CPU"
        size = _size(shapes, spacings, chosen)
    used = list(names)
    made.set("channel", used if len(used) > 1 else used[0], f"of the images: {', '.join(names.values())}")
    made.set("spacing", chosen, why)
    made.set("spatial_dims", dims, "asked for: networks that draw slice by slice" if dims == 2 else None)
    if dims == 2:
        why = "a step takes some of many volumes, and none that is empty"
        made.set("slices", {"per_volume": min(SLICES, size[2]), "foreground": True}, why)
    made.set("image_channels", len(used))
    if with_labels:
        made.set("with_labels", True, "asked for: labels are drawn with images, one more channel each")
        made.set("label_values", fingerprint["label_values"], "those of the labels")
    _choose_intensity(made, fingerprint, names, nnunet)

    # Latents or voxels, and the levels of both networks
    first = _autoencoder_strides(space, chosen[:dims], size[:dims], nnunet, machine)
    second = unet_strides(chosen[:dims], size[:dims], first, UNET_LEVELS[space])
    volume = padded(size[:dims], first + second)
    made.grids = grids_of(volume, first, second)
    volume += size[dims:]
    _choose_networks(made, space, first, second, max(size[:dims]), machine)

    # Training
    why = f"the 95th percentile of the volumes at {by_times(chosen)} mm is {by_times(size)}"
    made.set("autoencoder_train.patch_size", volume)
    made.set("diffusion_train.patch_size", volume, f"{why}, rounded up to what the networks divide")
    _choose_split(made, fingerprint)
    _choose_training(made, fingerprint, machine, space)
    memory.start(made, machine)
    if space == "latent":
        share = memory.fit_autoencoder(made, machine, chosen)
        if share < SEEN_BY_A_PATCH:
            factor = (SEEN_BY_A_PATCH / share) ** (1 / 3)
            made.lowres_spacing = [rounded(side * factor) for side in chosen]
    memory.fit_unet(made, machine)
    _choose_length(made, fingerprint, machine)
    return made


def _size(shapes: np.ndarray, spacings: np.ndarray, spacing: Sequence[float]) -> list[int]:
    """The 95th percentile of the sizes that volumes have at a spacing."""
    sizes = [size_at(*pair, spacing) for pair in zip(shapes, spacings, strict=True)]
    return np.ceil(np.percentile(sizes, 95, axis=0)).astype(int).tolist()


def _autoencoder_strides(
    space: str, spacing: Sequence[float], size: Sequence[int], nnunet: NnunetPlan | None, machine: Machine
) -> list[list[int]]:
    levels = 1 if max(size) <= ONE_LEVEL else 2 if max(size) <= TWO_LEVELS else 3
    if levels == 1 and not machine.gpu and math.prod(size) > CPU_LATENT * 2 ** len(size):
        levels = 2
    if space == "pixel":
        return []
    if space == "haar":  # which halves every axis
        return [[2] * len(size)] * min(levels, HAAR_LEVELS)
    if nnunet and nnunet.strides:
        return [level[: len(size)] for level in nnunet.strides[:levels]]
    return strides_for(spacing, size, levels)


def _choose_intensity(
    made: Plan, fingerprint: dict, names: dict[int, str], nnunet: NnunetPlan | None
) -> None:
    windows = [HOUNSFIELD if name.upper() == "CT" else None for name in names.values()]
    why = "CT: from air to dense bone, in Hounsfield units, as MAISI has it"
    if nnunet:
        windows = [nnunet.windows[c] if c < len(nnunet.windows) else None for c in names]
        why = f"CTNormalization in {nnunet.path}: percentiles 0.5 and 99.5 of the foreground"
    if all(windows):
        made.set("intensity.window", windows if len(windows) > 1 else windows[0], why)
        made.set("intensity.whole_numbers", True, "CT is kept as int16, in Hounsfield units")
    else:
        why = "not CT alone: values without a unit, so percentiles of each volume"
        made.set("intensity.upper_percentile", 99.5, why)
        if (share := fingerprint["median_share_not_zero"]) < NOT_ZERO:
            why = f"what is not 0 takes {share:.0%} of a volume: percentiles of it"
            made.set("intensity.nonzero", True, why)
    if fingerprint["nan"]:
        why = f"{counted(fingerprint['nan'], 'volume{s}')} with NaN, taken for background"
        made.set("intensity.nan_is_background", True, why)


def _choose_networks(
    made: Plan, space: str, first: list, second: list, longest: int, machine: Machine
) -> None:
    """Classes, strides and latent channels. The widths follow from the memory."""
    coded = made.config["image_channels"] + len(made.config.get("label_values", ()))
    if space == "pixel":
        made.set("diffusion_space", "pixel", "asked for: voxels, without an autoencoder")
        latent = coded
    elif space == "haar":
        target = {"_target_": "ldm.models.Haar", "spatial_dims": "@spatial_dims"}
        target |= {"in_channels": "@volume_channels", "levels": len(first)}
        made.set("autoencoder_def", target, "asked for: a wavelet, without loss and without training")
        latent = coded * 2 ** (made.config["spatial_dims"] * len(first))
    else:
        kinds = made.config["image_channels"] + made.config.get("with_labels", False)
        latent = (4 if len(first) == 1 else 8) * min(kinds, 4)
        halved = all(2 in level and 1 not in level for level in first)
        made.set(
            "autoencoder_def",
            {
                "_target_": "monai.networks.nets.AutoencoderKL",
                "spatial_dims": "@spatial_dims",
                "in_channels": "@volume_channels",
                "out_channels": "@volume_channels",
                "latent_channels": "@latent_channels",
                "norm_num_groups": 8,
                "attention_levels": [False] * (len(first) + 1),
                "with_encoder_nonlocal_attn": False,
                "with_decoder_nonlocal_attn": False,
            },
            f"the longest side, {longest}, is halved {counted(len(first), 'time{s}')} (up to {ONE_LEVEL} "
            f"once, up to {TWO_LEVELS} twice, else three times"
            + ("" if machine.gpu else f"; on a CPU twice, where latents would exceed {CPU_LATENT} voxels")
            + ")",
        )
        if halved:
            made.set("autoencoder_def.use_convtranspose", True)
        else:
            why = "an axis of thick slices is not halved until the others have come near it"
            made.set(f"autoencoder_def.{KEY}", first, why)
    made.set("latent_channels", latent)
    made.set(
        "diffusion_def",
        {
            "_target_": "monai.networks.nets.DiffusionModelUNet",
            "spatial_dims": "@spatial_dims",
            "in_channels": latent,
            "out_channels": "@latent_channels",
            "norm_num_groups": 16,
        },
        f"{counted(len(second), 'halving{s}')} of the latents: as many as keep {SMALLEST_LATENT} voxels a "
        f"side and pad by at most {MOST_PADDING - 1:.0%}",
    )
    if any(1 in level for level in second):
        made.set(f"diffusion_def.{KEY}", second)


def _choose_split(made: Plan, fingerprint: dict) -> None:
    """The share of subjects that is held out."""
    if (count := fingerprint["subjects"]) <= FEW_SUBJECTS:
        why = f"{counted(count, 'subject{s}')}: a smaller share would leave too few to evaluate with"
        made.set("data.val_fraction", HELD_OUT_OF_FEW, why)


def _choose_training(made: Plan, fingerprint: dict, machine: Machine, space: str) -> None:
    """Optimisers, losses, augmentation, conditions."""
    measured = "docs/PERFORMANCE.md: reaches the same loss in fewer steps than Adam"
    for stage in STAGES:
        if stage == "autoencoder_train" and space != "latent":
            continue
        made.set(f"{stage}.optimizer", "muon", measured)
        made.set(f"{stage}.lr", 1e-3, "with Muon at 0.02, for biases and norms")
        made.set(f"{stage}.lr_schedule", "cosine")
        made.set(f"{stage}.lr_warmup_steps", 20 if machine.minutes else 100)
        made.set(f"{stage}.clip_grad_norm", 1.0)
    made.set("autoencoder_train.perceptual_weight", 0.0, "needs weights from the internet")
    made.set("autoencoder_train.adversarial_weight", 0.0, "off: a discriminator costs memory and time")
    symmetric = fingerprint["symmetry"] >= SYMMETRIC
    why = f"volumes correlate {fingerprint['symmetry']:.2f} with their mirror image" + (
        "" if symmetric else f", less than {SYMMETRIC}: no flips"
    )
    if space == "latent":
        whole = KEY not in made.config["autoencoder_def"] and made.config["spatial_dims"] == 3
        made.set("autoencoder_train.recon_loss", "l1", "with gradient differences: docs/PERFORMANCE.md")
        made.set("autoencoder_train.gradient_weight", 1.0)
        made.set("autoencoder_train.kl_weight", 1e-7)
        made.set("autoencoder_train.initial_posterior_std", 0.05)
        made.set("autoencoder_train.latent_noise", 0.5, TRIED)
        if whole:
            made.set(
                "autoencoder_train.initialise", "block_transform", "docs/PERFORMANCE.md: starts as a PCA code"
            )
        made.set("autoencoder_train.augment", {"flip_axes": [0] if symmetric else []}, why)
        if fingerprint["labels"] == len(fingerprint["shapes"]):
            made.set("autoencoder_train.augment.foreground_prob", 0.33, "as nnU-Net; of patches alone")
    if symmetric:
        mirrored = f"{why}: mirrored volumes are drawn as well"
        made.set("diffusion_train.augment", {"flip_axes": [0], "versions": 2}, mirrored)
    if made.config["spatial_dims"] == 2:
        made.set("conditions.position", [2], "a 2D network has to know which slice it draws")
        made.config["diffusion_def"]["in_channels"] += len(position_channels(2, True))
    if not machine.gpu:
        made.set("data.num_workers", 0, "loader processes would compete with the training for cores")
    made.set("diffusion_train.ema_decay", 0.995 if machine.minutes else 0.999)
    made.set("diffusion_train.timestep_sampling", "logit_normal", TRIED)
    made.set("diffusion_train.snapshot", 0.3, f"{TRIED}: autoguidance")
    made.set("diffusion_train.autoguidance", 1.5)
    made.set("NoiseScheduler", {"schedule": "rectified_flow"}, "docs/PERFORMANCE.md")


def _choose_length(made: Plan, fingerprint: dict, machine: Machine) -> None:
    """How long to train."""
    cases = len(fingerprint["shapes"]) * (1 - made.checked()["data"]["val_fraction"])
    stages = [stage for stage in STAGES if "optimizer" in made.config[stage]]
    for stage in stages:
        section = made.checked()[stage]  # with what the user sets
        per_epoch = max(1, math.ceil(cases / (section["batch_size"] * section["accumulate_steps"])))
        if machine.minutes:
            minutes = round((1 if len(stages) == 1 else SHARES[stage]) * machine.minutes, 2)
            share = "" if len(stages) == 1 else f"{SHARES[stage]:.0%} "
            made.set(f"{stage}.max_minutes", minutes, f"{share}of the {machine.minutes:g} minutes given")
            made.set(f"{stage}.max_epochs", 100_000)
            made.set(f"{stage}.val_interval", math.ceil(STEPS_OF_A_VALIDATION / per_epoch))
            continue
        why = f"{STEPS[stage]} steps of {per_epoch} an epoch, with {cases:.0f} training cases"
        made.set(f"{stage}.max_epochs", math.ceil(STEPS[stage] / per_epoch), why)
        made.set(f"{stage}.val_interval", max(1, made.checked()[stage]["max_epochs"] // VALIDATIONS))
    if machine.minutes:
        made.set("diffusion_train.sample_interval", 0)
        return
    why = "ends where the held-out loss has not fallen for so many validations"
    made.set("diffusion_train.patience", 5, why)
    if made.config["diffusion_train"].get("sample_interval") != 0:  # decoding fits
        made.set(
            "diffusion_train.sample_interval", max(1, made.checked()["diffusion_train"]["max_epochs"] // 10)
        )
