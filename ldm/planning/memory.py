"""Widths, patches and batches: the largest that the memory forecast allows, not trial and error."""

import bisect
import itertools
import math
from collections.abc import Sequence

from ldm import UserError, counted
from ldm.data.prepare import step_size
from ldm.data.reading import by_times
from ldm.models.definitions import downsampling_factor
from ldm.planning.geometry import shrunk
from ldm.planning.plan import STAGES, Machine, Plan
from ldm.training import autoencoder, diffusion
from ldm.training.memory import GB, Forecast, Peak, half_precision, highest

USED = 0.9  # of the GPU's memory: its driver, its libraries and fragmentation take some
ATTENTION_VOXELS = 4096  # of a grid whose UNet level attends
WIDTHS = {  # of the first level on a GPU (True) and on a CPU, the largest first
    True: {"autoencoder_def": (64, 32, 16), "diffusion_def": (256, 192, 128, 64)},
    False: {"autoencoder_def": (16,), "diffusion_def": (64, 32, 16)},
}
TOGETHER = {  # volumes a step, by batch and accumulation
    True: {"autoencoder_train": 2, "diffusion_train": 8},
    False: {"autoencoder_train": 1, "diffusion_train": 4},
}
CPU_LARGE = 4096  # voxels of latents, above which a step on a CPU takes half as many volumes
CPU_WORK = 80e6  # of a step of stage 2: voxels times the squared width; about a second on two cores
TOGETHER_2D = 8  # volumes a step of 2D networks, which take a few slices of each


def start(made: Plan, machine: Machine) -> None:
    """The narrowest networks, whose config is complete."""
    for network, widths in WIDTHS[machine.gpu].items():
        if network == "diffusion_def" or "attention_levels" in made.config.get(network, {}):
            _widen(made, network, widths[-1])


def peaks_of(made: Plan, stage: str, machine: Machine) -> dict[str, Peak]:
    """The forecast of a stage."""
    rehearse = {"autoencoder_train": autoencoder, "diffusion_train": diffusion}[stage].rehearse
    config = made.checked()
    first, second = (config[one]["patch_size"] for one in STAGES)
    sizes = (first or second, second, config["autoencoder_train"]["val_patch_size"] or second)
    return Forecast(rehearse, stage, sizes, machine.gpu, half_precision(machine.gpu)).peaks(config)


def _fits(made: Plan, stage: str, machine: Machine) -> bool:
    return highest(peaks_of(made, stage, machine)).total <= USED * machine.memory


def _widen(made: Plan, network: str, width: int) -> None:
    """Set the channels of each level, and where a UNet attends."""
    if network == "autoencoder_def":
        levels = len(made.config[network]["attention_levels"])
        made.set(f"{network}.channels", [width * n for n in (1, 2, 4, 4)[:levels]])
        made.set(f"{network}.num_res_blocks", 1 if width < 32 else 2)
        return
    grids = made.grids
    attends = [i > 0 and math.prod(grid) <= ATTENTION_VOXELS for i, grid in enumerate(grids)]
    made.set(f"{network}.channels", [width * (i + 1) for i in range(len(grids))])
    made.set(f"{network}.attention_levels", attends)
    heads = min(width, 64 if width > 64 else 32)  # the last is that of the middle block, which always attends
    made.set(f"{network}.num_head_channels", [heads] * len(grids))
    made.set(f"{network}.num_res_blocks", 2)


def fit_autoencoder(made: Plan, machine: Machine, spacing: Sequence[float]) -> float:
    """The widest autoencoder on whole volumes, with checkpointing where needed; else the largest patches.

    Returns:
        The share of a volume that a patch covers.

    Raises:
        UserError: nothing fits.
    """
    stage, whole = "autoencoder_train", made.config["diffusion_train"]["patch_size"]
    widths = WIDTHS[machine.gpu]["autoencoder_def"]
    tries = [(width, again, whole) for width in widths for again in (False, True)]
    factor, patch = downsampling_factor(made.checked()["autoencoder_def"]), whole
    while (smaller := shrunk(patch, spacing, factor)) != patch:
        patch = smaller
        tries.append((widths[-1], True, patch))
    _start_batch(made, stage, machine)

    def peak_of(number: int) -> int:
        width, again, patch = tries[number]
        _widen(made, "autoencoder_def", width)
        made.set(f"{stage}.gradient_checkpointing", again)
        made.set(f"{stage}.patch_size", patch)
        made.set(f"{stage}.val_patch_size", None if patch == whole else patch)
        return highest(peaks_of(made, stage, machine)).total

    limit, patches, last = USED * machine.memory, 2 * len(widths), len(tries) - 1

    def fits(number: int) -> bool:
        return peak_of(number) <= limit

    chosen = next(filter(fits, range(patches)), patches)
    if chosen == patches:  # of the patches, ever smaller, the first that fits
        if (smallest := peak_of(last)) > limit:
            raise _too_small(made, stage, machine, smallest)
        chosen += bisect.bisect_left(range(patches, last), True, key=fits)
        peak_of(chosen)
    patch = tries[chosen][2]
    share = math.prod(patch) / math.prod(whole)
    size = "whole volumes" if share == 1 else f"patches of {share:.0%} of a volume"
    made.why[f"{stage}.patch_size"] = (
        f"{size}, the largest that fit into {USED:.0%} of {machine.memory / GB:g} GB"
        + " with the widest network" * machine.gpu
    )
    _fit_batch(made, stage, machine)
    return share


def fit_unet(made: Plan, machine: Machine) -> None:
    """The widest diffusion network; latents from the disk where encoding a volume does not fit, and no
    samples on the way where decoding does not.

    Raises:
        UserError: nothing fits.
    """
    stage, limit = "diffusion_train", USED * machine.memory
    _start_batch(made, stage, machine)
    for width, again in itertools.product(_fast_enough(made, machine), (False, True)):
        _widen(made, "diffusion_def", width)
        made.set(f"{stage}.gradient_checkpointing", again)
        peaks = peaks_of(made, stage, machine)
        encoding, sampling = (peaks.pop(name, None) for name in ("encoding", "sampling"))
        if (peak := highest(peaks).total) <= limit:
            break
    else:
        raise _too_small(made, stage, machine, peak)
    why = f"the widest that fits into {USED:.0%} of {machine.memory / GB:g} GB"
    if not machine.gpu:
        why += " and takes about a second a step on two cores"
    made.set("diffusion_def.channels", made.config["diffusion_def"]["channels"], why)
    if encoding and encoding.total > limit:
        why = f"encoding a whole volume takes {encoding.total / GB:.0f} GB: cache_latents.py does it in slabs"
        made.set(f"{stage}.latent_cache", True, why)
    if sampling and sampling.total > limit:
        why = f"decoding a whole volume takes {sampling.total / GB:.0f} GB: inference.py does it in slabs"
        made.set(f"{stage}.sample_interval", 0, why)
    _fit_batch(made, stage, machine)


def _fast_enough(made: Plan, machine: Machine) -> list[int]:
    """Widths of the UNet, the largest first, that a CPU can train; the narrowest in any case."""
    widths = WIDTHS[machine.gpu]["diffusion_def"]
    if machine.gpu:
        return list(widths)
    volume = step_size(made.checked(), made.config["diffusion_train"]["patch_size"])
    voxels = math.prod(made.grids[0]) * math.prod(volume[len(made.grids[0]) :])  # times slices, in 2D
    voxels *= _together(made, "diffusion_train", machine)
    return [width for width in widths if voxels * width**2 <= CPU_WORK] or [widths[-1]]


def _together(made: Plan, stage: str, machine: Machine) -> int:
    """Volumes of a step."""
    together = TOGETHER[machine.gpu][stage]
    if stage == "diffusion_train" and not machine.gpu and math.prod(made.grids[0]) > CPU_LARGE:
        together //= 2
    return TOGETHER_2D if made.config["spatial_dims"] == 2 else together


def _start_batch(made: Plan, stage: str, machine: Machine) -> None:
    """One volume at a time, whose gradients are accumulated."""
    made.set(f"{stage}.batch_size", 1)
    made.set(f"{stage}.accumulate_steps", _together(made, stage, machine))


def _fit_batch(made: Plan, stage: str, machine: Machine) -> None:
    """The largest batch that fits; accumulation makes up for the rest."""
    batch = together = _together(made, stage, machine)
    while batch > 1:
        made.set(f"{stage}.batch_size", batch)
        made.set(f"{stage}.accumulate_steps", together // batch)
        if _fits(made, stage, machine):
            break
        batch //= 2
    why = f"a step takes {counted(together, 'volume{s}')}, {batch} at a time"
    made.set(f"{stage}.batch_size", batch, why)
    made.set(f"{stage}.accumulate_steps", together // batch)


def _too_small(made: Plan, stage: str, machine: Machine, peak: int) -> UserError:
    at = by_times(made.config["spacing"])
    return UserError(
        f"{machine.memory / GB:g} GB are too little for {stage} at {at} mm: the smallest networks take "
        f"{peak / GB:.1f} GB.\nTry a coarser --spacing, or {math.ceil(peak / USED / GB)} GB."
    )
