"""From trained networks to volumes: load, sample, map to scanner units, encode as a NIfTI file."""

import contextlib
import functools
import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ldm import UserError, configs, few
from ldm.data.cases import Case
from ldm.data.extent import asked_geometry
from ldm.data.intensity import Intensity, from_unit_range
from ldm.data.labels import label_of, values_in
from ldm.data.preprocessing import Preprocessing, crop_or_pad
from ldm.diffusion.conditioning import UNCONDITIONED, Conditions
from ldm.diffusion.guidance import with_guide
from ldm.diffusion.process import NoiseProcess, resolve_timestep_sampling
from ldm.diffusion.samplers import SAMPLERS, choose_sampler, sample_latents
from ldm.models.autoencoder import Autoencoder
from ldm.models.control import Controlled, coded
from ldm.models.definitions import check_size, latent_size, network_divisor
from ldm.models.denoiser import Autoguided, example_cond
from ldm.models.layers import on_device
from ldm.models.slicewise import within
from ldm.models.weights import load_weights
from ldm.system.checkpoints import load_checkpoint, require_checkpoint, weights_hash
from ldm.system.errors import NO_MEMORY
from ldm.system.ranks import Run, amp_dtype
from ldm.training import memory
from ldm.training.controlnet import define_control

CONFIG_COPY = "Use the config it was trained with; config_*.json beside the checkpoint is a copy."
OPTIONS = {  # that replace a key of the config here
    "seed": "--seed",
    "diffusion_train.amp": "--amp",
    "diffusion_train.compile": "--compile",
    "diffusion_train.batch_size": "--batch-size",
    "diffusion_train.sample_steps": "--steps",
}
USED = (*configs.FIXED["diffusion"], "image_channels", "latent_channels", "diffusion_train.patch_size")
USED += ("diffusion_train.autoguidance",)


@dataclass(frozen=True)
class Networks:
    """Trained networks, and all else that a sample depends on, except its seed.

    `scale_factor` brings latents to the unit variance that the UNet learned; samples are divided by it before
    they are decoded. `geometry` holds spacing in mm, size in voxels and intensity limits of the volumes, for
    2D networks also the `slices` that are not empty; `power` is the high-frequency power of the autoencoder's
    reconstructions, None where it was not measured; `labels` are the values of the labels that are drawn,
    `masks` what a ControlNet takes, `structures` the usual medians of labels (`ldm.data.structures`), where
    training measured them. Volumes are written as `whole_numbers`, or as float32. `asked` holds size and
    spacing where they are not those of the model.
    """

    autoencoder: Autoencoder
    scale_factor: float
    unet: Callable
    process: NoiseProcess
    latent_shape: list[int]
    geometry: dict
    power: float | None
    conditions: Conditions = UNCONDITIONED
    labels: tuple[int, ...] = ()
    masks: "Masks | None" = None
    structures: dict = field(default_factory=dict)
    whole_numbers: bool = False
    asked: dict = field(default_factory=dict)

    @property
    def label_maps(self) -> bool:
        """Whether volumes are label maps without images."""
        return not self.geometry["limits"]

    def sampling(self, sampler: str | None = None, steps: int | None = None) -> tuple[str, int]:
        """Sampler and number of steps, with the defaults of the noise process."""
        sampler = choose_sampler(sampler, self.process)
        return sampler, steps or SAMPLERS[sampler].steps or self.process.num_train_timesteps

    def model(
        self,
        chosen: Sequence[dict],
        guidance: float,
        run: Run,
        masks: Sequence[torch.Tensor] | None = None,
        interval: Sequence[float] | None = None,
    ) -> Callable:
        """The model function of the samplers for a batch; the arguments are those of `draw`."""
        unet, times = self.unet, None
        if interval:
            times = tuple(share * self.process.num_train_timesteps for share in interval)
        if masks is not None:
            unet = functools.partial(unet, mask=coded(torch.stack([*masks]), self.masks.bits).to(run.device))
        return self.conditions.guided_model(unet, chosen, guidance, run.device, times)


@dataclass(frozen=True)
class Masks:
    """What a ControlNet takes: the `values` of labels that it was trained on, in so many `bits`. Where these
    were `chosen` by the config, others were background; else there were no others. `empty`: some masks were
    empty. `structures`: as of `Networks`."""

    values: tuple[int, ...]
    bits: int
    chosen: bool
    empty: bool
    structures: dict


def with_control(
    unet: torch.nn.Module, path: Path, config: dict, unet_hash: str, run: Run
) -> tuple[torch.nn.Module, Masks]:
    """A diffusion network on the device, under autoguidance or not, that follows masks.

    Args:
        unet_hash: `weights_hash` of the diffusion network.

    Raises:
        UserError: the file is no ControlNet of this diffusion network.
    """
    require_checkpoint(path, "controlnet")
    checkpoint = load_checkpoint(path, "controlnet")
    if "config" not in checkpoint:  # from elsewhere
        checkpoint |= {"config": config, "unet": unet_hash, "label_values": config["label_values"]}
        if not config["label_values"]:
            raise UserError(
                f"{path}: weights from elsewhere. Name the labels that they know by label_values."
            )
    if not {"label_values", "unet"} <= checkpoint.keys():
        raise UserError(f"{path}: is no checkpoint of train_controlnet.py.")
    trained = configs.completed(checkpoint["config"])
    if checkpoint["unet"] != unet_hash:
        raise UserError(
            f"{path}: was trained on another diffusion model. Name that one by --unet FILE, or the "
            "ControlNet of this one by --controlnet FILE."
        )
    values = tuple(checkpoint["label_values"])
    control, bits = define_control({**trained, "diffusion_def": config["diffusion_def"]}, values)
    load_weights(control, checkpoint["model"], str(path))
    chosen, empty = trained["label_values"] is not None, checkpoint.get("empty_masks", False)
    masks = Masks(values, bits, chosen, empty, checkpoint.get("structures", {}))
    return controlled(unet, on_device(control, run).eval()), masks


def controlled(unet: torch.nn.Module, control: torch.nn.Module) -> torch.nn.Module:
    """A diffusion network with its ControlNet; under autoguidance its guide gets the same."""
    if isinstance(unet, Autoguided):
        parts = (Controlled(one, control).eval() for one in (unet.unet, unet.guide))
        return Autoguided(*parts, unet.weight)
    return Controlled(unet, control).eval()


def read_mask(path: Path, networks: Networks) -> tuple[torch.Tensor, str]:
    """A mask on the grid of the volumes, (D, H, W), and what was done to it, "" where nothing.

    Raises:
        UserError: it cannot be read, is empty, or has labels that the training data had not.
    """
    geometry, values = networks.geometry, networks.masks.values
    preprocessing = Preprocessing((0,), tuple(geometry["spacing"]), labels=values)
    others = sorted({*values_in([Case(path.name, (), path)])} - {*values})
    if others and not networks.masks.chosen:
        raise UserError(
            f"{path}: has labels that the ControlNet was not trained on ({few(list(map(str, others)))}). "
            f"It knows {few(list(map(str, values)), 12)}."
        )
    whole = preprocessing.mask(path)
    mask = crop_or_pad(whole[None], geometry["size"])[0]
    if whole.any() and not mask.any():
        raise UserError(f"{path}: has no labelled voxel on the grid of the volumes.")
    if not mask.any() and not networks.masks.empty:
        raise UserError(f"{path}: is empty; no mask that the ControlNet was trained on was.")
    lost = (whole > 0).sum() - (mask > 0).sum()
    note = f"{path.name}: {lost} labelled voxels lie outside of the volumes and are cut off" if lost else ""
    return torch.from_numpy(np.ascontiguousarray(mask)), note


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
    control_path: Path | None = None,
    size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
) -> Networks:
    """The networks of a config with the weights of two checkpoints, on the device.

    Args:
        source: the file that the config came from, for messages.
        scale_factor: replaces the checkpoint's.
        max_memory: GB to decode in.
        overrides: what `--set` changed in the config; None: the config is that of a record, where only the
            networks count.
        control_path: of a ControlNet, if images should follow masks.
        size, spacing: of the volumes to draw, in voxels and mm; None: those of the model.

    Raises:
        UserError: the files, the config and `max_memory` do not fit each other, or the model cannot draw such
            volumes.
    """
    require_checkpoint(autoencoder_path, "autoencoder")
    require_checkpoint(unet_path, "unet")
    first, second = load_checkpoint(autoencoder_path, "autoencoder"), load_checkpoint(unet_path, "unet")
    for checkpoint, path, keys in (
        (first, autoencoder_path, ("autoencoder_def", "with_labels", "label_values")),
        (second, unet_path, ("diffusion_def", "NoiseScheduler", "conditions")),
    ):
        configs.check_fixed(checkpoint.get("config", config), config, keys, path, CONFIG_COPY, str(source))
    if overrides is not None:
        check_request(second, config, unet_path, source, overrides, run)
    autoencoder = configs.define_network(config, "autoencoder_def")
    load_weights(autoencoder, first["model"], str(autoencoder_path))
    unet = configs.define_network(config, "diffusion_def")
    load_weights(unet, second["model"], str(unet_path))
    if config["diffusion_train"]["autoguidance"] != 1:
        unet = with_guide(unet, second.get("guide"), config, unet_path)
    if second.get("autoencoder", hashed := weights_hash(autoencoder.state_dict())) != hashed:
        raise UserError(
            f"{unet_path}: was trained on the latents of another autoencoder than {autoencoder_path}.\n"
            f"Name that one by --autoencoder FILE, or the model that was trained on this one by --unet FILE."
        )
    if scale_factor is None and (scale_factor := second.get("scale_factor")) is None:
        raise UserError(
            f"{unet_path}: has no scale factor. Give it by --scale-factor X (1 / std of its latents)."
        )
    geometry = geometry_of(second, config, unet_path, size, spacing)
    shape = [config["diffusion_def"]["out_channels"], *latent_size(config, geometry["size"])]
    if (trained := [*second.get("latent_shape", shape)]) != shape:
        raise UserError(
            f"{unet_path}: its latent_shape is {trained}; by its networks and size it is {shape}."
        )
    conditions = Conditions.from_checkpoint({**second, "geometry": geometry}, config)
    conditions.check_size(shape, unet_path)
    given = {key: list(one) for key, one in (("size", size), ("spacing", spacing)) if one}
    conditions.check_asked({key for key, one in given.items() if one != list(geometry[key])})
    geometry = asked_geometry(geometry, size, spacing, network_divisor(config))
    own = {"size": config["diffusion_train"]["patch_size"], "spacing": config["spacing"]}
    own = second.get("geometry", own)
    asked = {key: one for key, one in given.items() if one != list(own[key] or [])}
    shape = [shape[0], *latent_size(config, geometry["size"])]
    conditions = conditions.of_latents(shape, conditions.mean_latent).of_spacing(geometry["spacing"])
    needed, given = example_cond(config["diffusion_def"], 1, shape[1:]), conditions.inputs
    if "channels" in given and ("channels" not in needed or needed["channels"].shape != given["channels"]):
        raise UserError(
            f"{unet_path}: its network takes other channels of conditions than are made here. Train 2D "
            "networks again that were told the position by one channel."
        )
    if unknown := needed.keys() - given.keys():
        raise UserError(
            f"{unet_path}: its network needs {', '.join(sorted(unknown))}, of which the file says nothing. "
            "Use a checkpoint of train_diffusion.py, or give it by `conditions` in the config."
        )
    noise = config["NoiseScheduler"]
    if "config" in second:  # trained here
        process = NoiseProcess.of_checkpoint(second, noise, shape[1:])
    else:
        resolve_timestep_sampling(noise, "uniform")
        process = NoiseProcess.from_config(noise, shape[1:])
    with out_of_memory_explained("the networks do not fit", "--device cpu, or a GPU that nothing else uses"):
        unet = on_device(unet, run).eval()
        masks = None
        if control_path:
            unet, masks = with_control(unet, control_path, config, weights_hash(second["model"]), run)
        budget = None
        if max_memory:
            from ldm.lowmem.slabwise import Budget, weights_bytes

            budget = Budget(max_memory * memory.GB, beside=weights_bytes(unet))
        autoencoder = Autoencoder(on_device(autoencoder, run, True).eval(), budget)
    unet = compile_for_sampling(unet, run) if compiled else unet
    power = first.get("validation", {}).get("power")
    labels = configs.labels_of(config)
    usual = masks.structures if masks else geometry.get("structures", {})
    whole = config["intensity"]["whole_numbers"]
    return Networks(
        autoencoder,
        scale_factor,
        unet,
        process,
        shape,
        geometry,
        power,
        conditions,
        labels,
        masks,
        usual,
        whole,
        asked,
    )


def check_request(
    checkpoint: dict, config: dict, path: Path, source: str | Path, overrides: Sequence[str], run: Run
) -> None:
    """See that a config asks for the volumes that a diffusion model was trained on. Keys that it leaves open
    (null) are as the model has them. Keys of `--set` that have no effect are printed.

    Raises:
        UserError: the config asks for other volumes, or `--set` for another seed; the key is named.
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
    before, now = configs.flat(configs.completed(trained or {})), configs.flat(config)
    for key in [override.partition("=")[0] for override in overrides]:
        below = [one for one in now if f"{one}.".startswith(f"{key}.")]
        if any(f"{key}.".startswith(f"{one}.") for one in USED) or all(
            now[k] == before.get(k) for k in below
        ):
            continue
        instead = f": give {OPTIONS[key]}" if key in OPTIONS else ""
        if key == "seed":
            raise UserError(f"--set {key}: has no effect here{instead}.")
        run.print(f"note: --set {key} has no effect here{instead}")


def compile_for_sampling(unet: torch.nn.Module, run: Run) -> Callable:
    """torch.compile; on a GPU with CUDA graphs, which replay a step without the CPU launching its kernels."""
    if run.device.type != "cuda":
        return torch.compile(unet)
    compiled = torch.compile(unet, mode="reduce-overhead")

    def replayed(x: torch.Tensor, timesteps: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, timesteps=timesteps, **cond).clone()  # the next replay overwrites it

    return replayed


def geometry_of(
    checkpoint: dict,
    config: dict,
    path: Path,
    size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
) -> dict:
    """Spacing, size and intensity limits of generated volumes: as trained; for bare weights as the config
    says, else as asked.

    Raises:
        UserError: the config does not say it, or the networks cannot make such volumes.
    """
    if "geometry" in checkpoint:
        geometry = checkpoint["geometry"]
        check_size(geometry["size"], network_divisor(config), f"{path}: geometry.size")
        if (count := len(geometry["limits"])) != (expected := len(configs.channels_of(config))):
            raise UserError(f"{path}: has limits of {count} channel(s), not {expected}.")
        return geometry
    stated = config["diffusion_train"]["patch_size"]
    spacing, size = config["spacing"] or spacing, stated or size
    if not spacing or not size:
        raise UserError(
            "Weights from elsewhere: set `spacing` and `diffusion_train.patch_size` in the config to those "
            "of the volumes to make, or give --spacing and --size."
        )
    check_size(size, network_divisor(config), "diffusion_train.patch_size" if stated else "--size")
    window = Intensity.from_config(config).window
    limits = [list(pair) for pair in window] if window else [[0.0, 1.0]] * len(configs.channels_of(config))
    return {"spacing": spacing, "size": size, "limits": limits}


def draw(
    networks: Networks,
    seeds: Sequence[int],
    sampler: str,
    steps: int,
    run: Run,
    progress: Callable = iter,
    chosen: Sequence[dict] | None = None,
    guidance: float = 1.0,
    interval: Sequence[float] | None = None,
    masks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sample and decode one batch: (B, C, D, H, W), float32 on the CPU, in units of the autoencoder.

    Args:
        chosen: the condition of each sample, as of `Conditions.parse`; what it lacks is unknown.
        guidance: as of `ldm.diffusion.guidance.guided`.
        interval: of guidance, as a share of the process: 0 is no noise, 1 nothing but noise;
            None: all of it.
        masks: of each sample, (D, H, W), for networks with a ControlNet.

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
        model = networks.model(chosen or [{}] * len(seeds), guidance, run, masks, interval)
        shape, slicewise = networks.latent_shape, networks.autoencoder.is_slicewise
        latents = sample_latents(
            model, networks.process, shape, seeds, steps, sampler, run.device, progress, slicewise
        )
        volumes = networks.autoencoder.decode(latents / networks.scale_factor)
        return within(volumes, networks.geometry).cpu()


def in_typical_units(volume: torch.Tensor, networks: Networks, seed: int) -> np.ndarray:
    """The image of a volume (C, D, H, W) from the autoencoder's units to the typical range of the training
    set, float32 or int16, as it is written; of a model of label maps the label, (1, D, H, W).

    Raises:
        FloatingPointError: a voxel is not finite; `seed` is named.
    """
    limits = np.array(networks.geometry["limits"])
    if networks.label_maps:
        voxels, finite = label_of(volume.numpy(), networks.labels)[None], volume.isfinite().all()
    else:
        voxels = from_unit_range(volume[: len(limits)].numpy(), limits)
        finite = np.isfinite(voxels).all()
    if not finite:
        raise FloatingPointError(
            f"the volume of seed {seed} is not finite, and is not written. Leave out --amp, or use another "
            "checkpoint. What else to do: docs/NaN_FIX_GUIDE.md"
        )
    return voxels if networks.label_maps else as_written(voxels, networks)


def as_written(voxels: np.ndarray, networks: Networks) -> np.ndarray:
    """An image in its own units as it is written: rounded to int16 where the model's images are whole
    numbers."""
    if not networks.whole_numbers:
        return voxels
    ends = np.iinfo(np.int16)
    return np.rint(voxels).clip(ends.min, ends.max).astype(np.int16)


def drawn_label(volume: torch.Tensor, networks: Networks) -> np.ndarray | None:
    """The label of a volume (C, D, H, W) in the autoencoder's units, (1, D, H, W); None where none is drawn
    beside an image."""
    if not networks.labels or networks.label_maps:
        return None
    return label_of(volume[-len(networks.labels) :].numpy(), networks.labels)[None]


@contextlib.contextmanager
def out_of_memory_explained(what: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory, whatever it is raised as, into an OSError of two lines."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, others are bare
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        raise OSError(f"out of memory: {what}.\nTry {remedy}.") from None


def nifti_bytes(volume: np.ndarray, spacing: Sequence[float], dtype: type = np.float32) -> bytes:
    """(C, D, H, W) as the content of a .nii.gz in RAS, mm, centred on the origin: 3D for one channel, else
    channels last. The same volume gives the same bytes."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(volume.shape[1:]) - 1) / 2
    voxels = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
    return nifti_gz(voxels.astype(dtype), affine)


def nifti_gz(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """Voxels (X, Y, Z) or (X, Y, Z, C) and their affine in mm as the content of a .nii.gz."""
    image = nib.Nifti1Image(voxels, affine)
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
