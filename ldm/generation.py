"""From trained networks to volumes: load, draw, map to the units of a scanner, and the bytes of a file."""

import contextlib
import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ldm import UserError, configs
from ldm.data.intensity import Intensity, from_unit_range
from ldm.diffusion.process import NoiseProcess, check_scheduler
from ldm.diffusion.samplers import sample_latents
from ldm.lowmem.slabwise import Budget, weights_bytes
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import check_size, latent_size, network_divisor
from ldm.models.layers import on_device
from ldm.models.weights import load_weights
from ldm.system.checkpoints import load_checkpoint, require_checkpoint, weights_hash
from ldm.system.messages import NO_MEMORY
from ldm.system.ranks import Run, amp_dtype
from ldm.training import memory

CONFIG_COPY = "Use the config it was trained with; config_*.json beside the checkpoint is a copy."
OPTIONS = {  # that take the place of a key here
    "seed": "--seed",
    "diffusion_train.amp": "--amp",
    "diffusion_train.compile": "--compile",
    "diffusion_train.batch_size": "--batch-size",
    "diffusion_train.sample_steps": "--steps",
}

USED = (*configs.FIXED["diffusion"], "image_channels", "latent_channels", "diffusion_train.patch_size")


@dataclass(frozen=True)
class Networks:
    """Trained networks, and what their volumes follow from beside a seed.

    `scale_factor` multiplies latents to the unit variance that the UNet learned, and divides its samples
    before they are decoded. `geometry` holds spacing in mm, size in voxels and intensity limits of the
    volumes; `power` the high-frequency power of the autoencoder's reconstructions, None where it was not
    measured.
    """

    autoencoder: Autoencoder
    scale_factor: float
    unet: Callable
    process: NoiseProcess
    latent_shape: list[int]
    geometry: dict
    power: float | None


def load_networks(
    autoencoder_path: Path,
    unet_path: Path,
    config: dict,
    source: str | Path,
    scale_factor: float | None,
    compiled: bool,
    max_memory: float | None,
    run: Run,
    overrides: Sequence[str] | None = None,
) -> Networks:
    """Networks of a config with the weights of two checkpoints, on the device.

    Args:
        source: the file that the config came from, for messages.
        overrides: what `--set` changed in it; None: it is of a record, where only the networks count.
        scale_factor: wins over the checkpoint's.
        max_memory: GB to decode in.

    Raises:
        UserError: files, config and each other do not fit, or weights and `max_memory`.
    """
    states = []
    for path, role in ((autoencoder_path, "autoencoder"), (unet_path, "unet")):
        require_checkpoint(path, role)
        states.append(load_checkpoint(path, role))
    autoencoder_state, unet_state = states
    for checkpoint, path, keys in (
        (autoencoder_state, autoencoder_path, ("autoencoder_def",)),
        (unet_state, unet_path, ("diffusion_def", "NoiseScheduler")),
    ):
        configs.check_fixed(checkpoint.get("config", config), config, keys, path, CONFIG_COPY, str(source))
    if overrides is not None:
        check_what_the_model_decides(unet_state, config, unet_path, source, overrides, run)
    autoencoder = configs.define_network(config, "autoencoder_def")
    load_weights(autoencoder, autoencoder_state["model"], str(autoencoder_path))
    unet = configs.define_network(config, "diffusion_def")
    load_weights(unet, unet_state["model"], str(unet_path))
    due = unet_state.get("autoencoder")
    if due is not None and due != weights_hash(autoencoder.state_dict()):
        raise UserError(
            f"{unet_path}: was trained on the latents of another autoencoder than {autoencoder_path}.\n"
            f"Name that one by --autoencoder FILE, or the model that was trained on this one by --unet FILE."
        )
    if scale_factor is None and (scale_factor := unet_state.get("scale_factor")) is None:
        raise UserError(
            f"{unet_path}: brings no scale factor. Give it by --scale-factor X (1 / std of its latents)."
        )
    geometry = geometry_of(unet_state, config, unet_path)
    shape = [config["diffusion_def"]["out_channels"], *latent_size(config, geometry["size"])]
    if (was := [*unet_state.get("latent_shape", shape)]) != shape:
        raise UserError(f"{unet_path}: its latent_shape is {was}; by its networks and size it is {shape}.")
    noise = config["NoiseScheduler"]
    process = NoiseProcess.from_config(noise, shape[1:])
    if "config" in unet_state:  # trained here: older checkpoints do not say their shift
        process.shift = unet_state.get("shift", noise.get("shift", 1.0))
    else:
        check_scheduler(noise, "uniform")
    with out_of_memory_explained("the networks do not fit", "--device cpu, or a GPU that nothing else uses"):
        # In float32 a CPU's convolutions of a UNet gain nothing from channels last, in bfloat16 they do.
        unet = (on_device(unet, run.device) if run.amp_dtype else unet.to(run.device)).eval()
        budget = Budget(max_memory * memory.GB, beside=weights_bytes(unet)) if max_memory else None
        autoencoder = Autoencoder(on_device(autoencoder, run.device).eval(), budget)
    return Networks(
        autoencoder,
        scale_factor,
        compile_for_sampling(unet, run) if compiled else unet,
        process,
        shape,
        geometry,
        autoencoder_state.get("validation", {}).get("power"),
    )


def check_what_the_model_decides(
    checkpoint: dict, config: dict, path: Path, source: str | Path, overrides: Sequence[str], run: Run
) -> None:
    """See that a config asks for the volumes that a diffusion model was trained on, and tell which keys that
    `--set` gives have no effect. What is open in the config (null) is as the model has it.

    Raises:
        UserError: the config asks for others, or `--set` for another seed; the key is named.
    """
    trained = checkpoint.get("config")
    if trained is not None:
        keys = [key for key in ("channel", "spacing", "intensity") if config[key] is not None]
        configs.check_fixed(trained, config, keys, path, CONFIG_COPY, str(source))
    size, asked = checkpoint.get("geometry", {}).get("size"), config["diffusion_train"]["patch_size"]
    if size and asked and list(size) != list(asked):
        raise UserError(
            f"{path}: makes volumes of {size} voxels, as it was trained to; {source} says "
            f"diffusion_train.patch_size {asked}. {CONFIG_COPY}"
        )
    was, now = (configs.flat(one) for one in (configs.completed(trained or {}), config))
    for key in [override.partition("=")[0] for override in overrides]:
        below = [one for one in now if f"{one}.".startswith(f"{key}.")]
        if any(f"{key}.".startswith(f"{one}.") for one in USED) or all(now[k] == was.get(k) for k in below):
            continue
        instead = f": give {OPTIONS[key]}" if key in OPTIONS else ""
        if key == "seed":
            raise UserError(f"--set {key}: has no effect here{instead}.")
        run.say(f"note: --set {key} has no effect here{instead}")


def compile_for_sampling(unet: torch.nn.Module, run: Run) -> Callable:
    """torch.compile; on a GPU with CUDA graphs, which replay a step without the CPU launching its kernels."""
    if run.device.type != "cuda":
        return torch.compile(unet)
    compiled = torch.compile(unet, mode="reduce-overhead")

    def predict(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, timesteps=timesteps).clone()  # the next replay writes over it

    return predict


def geometry_of(checkpoint: dict, config: dict, path: Path) -> dict:
    """Spacing, size and intensity limits of generated volumes, as trained; for bare weights as the config
    says.

    Raises:
        UserError: the config does not say it, or the networks cannot make such volumes.
    """
    if "geometry" in checkpoint:
        geometry = checkpoint["geometry"]
        check_size(geometry["size"], network_divisor(config), f"{path}: geometry.size")
        if (count := len(geometry["limits"])) != config["image_channels"]:
            raise UserError(f"{path}: has limits of {count} channel(s), not {config['image_channels']}.")
        return geometry
    if not config["spacing"] or not config["diffusion_train"]["patch_size"]:
        raise UserError(
            "Weights from elsewhere: `spacing` and `diffusion_train.patch_size` in the config should say "
            "which volumes to make."
        )
    check_size(config["diffusion_train"]["patch_size"], network_divisor(config), "diffusion_train.patch_size")
    window = Intensity.from_config(config).window
    limits = [list(pair) for pair in window] if window else [[0.0, 1.0]] * config["image_channels"]
    return {"spacing": config["spacing"], "size": config["diffusion_train"]["patch_size"], "limits": limits}


def draw(
    networks: Networks,
    seeds: Sequence[int],
    sampler: str,
    steps: int,
    run: Run,
    progress: Callable = iter,
) -> torch.Tensor:
    """Sample and decode one batch: (B, C, D, H, W), float32 on the CPU, in units of the autoencoder.

    Raises:
        OSError: out of memory; the message names what to change.
    """
    fast = run.amp_dtype is None and amp_dtype(run.device) is not None
    smaller = [f"a --batch-size below {len(seeds)}"] * (len(seeds) > 1) + ["--amp"] * fast
    size = " x ".join(map(str, networks.geometry["size"]))
    with (
        out_of_memory_explained(
            f"{len(seeds)} volume(s) of {size} voxels at a time are too many",
            ", or ".join([*smaller, "networks trained with a smaller diffusion_train.patch_size"]),
        ),
        run.autocast(),
    ):
        latents = sample_latents(
            lambda x, t: networks.unet(x, timesteps=t).float(),
            networks.process,
            networks.latent_shape,
            seeds,
            steps,
            sampler,
            run.device,
            progress,
        )
        return networks.autoencoder.decode(latents / networks.scale_factor).cpu()


def in_typical_units(volume: torch.Tensor, networks: Networks, seed: int) -> np.ndarray:
    """(C, D, H, W) from the autoencoder's units to the typical range of the training set.

    Raises:
        FloatingPointError: a voxel is not finite; `seed` is named.
    """
    voxels = from_unit_range(volume.numpy(), np.array(networks.geometry["limits"]))
    if not np.isfinite(voxels).all():
        raise FloatingPointError(
            f"the volume of seed {seed} is not finite, and is not written. Leave out --amp, or use another "
            "checkpoint. What else to do: docs/NaN_FIX_GUIDE.md"
        )
    return voxels


@contextlib.contextmanager
def out_of_memory_explained(what: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory, whatever it is raised as, into an OSError of two lines."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, others are bare
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        raise OSError(f"out of memory: {what}.\nTry {remedy}.") from None


def nifti_bytes(volume: np.ndarray, spacing: Sequence[float]) -> bytes:
    """(C, D, H, W) as the content of a .nii.gz in RAS, mm, centred on the origin: 3D for one channel, else
    channels last. The same volume gives the same bytes."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(volume.shape[1:]) - 1) / 2
    voxels = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
    image = nib.Nifti1Image(voxels.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=1, fileobj=packed, mtime=0) as file:  # no name, no time
        file.write(image.to_bytes())
    return packed.getvalue()


def read_volume(path: Path) -> np.ndarray:
    """The voxels of such a file, (C, D, H, W)."""
    voxels = np.asarray(nib.load(path).dataobj)
    return voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0)
