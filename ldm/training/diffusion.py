"""What stage 2 trains: the diffusion network with its optimiser; the samples drawn on the way; its memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm import configs, figures
from ldm.data.augmentation import augmentation
from ldm.data.labels import shown
from ldm.data.prepare import step_size
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.guidance import with_any_guide, with_guide
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import sample_latents
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import latent_size, small_input
from ldm.models.denoiser import example_cond, predict
from ldm.models.layers import freeze_unreached, on_device
from ldm.models.slicewise import within
from ldm.models.weights import load_weights
from ldm.system.ranks import Run
from ldm.training.memory import Meter, take_steps
from ldm.training.step import EMA, Optimizer, make_ema
from ldm.training.wrapping import prepare_network, wrap_network

SAMPLE_SEEDS, MOST_SAMPLES = (0, 1, 2, 3), 8


@dataclass
class DiffusionLearner:
    """The diffusion network in training. `model` is the network as training calls it: compiled, in DDP.
    `ema_model` is None where nothing is averaged, `guide` until the snapshot is kept."""

    unet: nn.Module
    model: nn.Module
    optimizer: Optimizer
    ema_model: EMA | None
    frozen: list[str] = field(default_factory=list)
    guide: dict[str, torch.Tensor] | None = None

    def keep_snapshot(self, section: dict, fraction_done: float) -> None:
        """Keep the weights as the guide of autoguidance, on the CPU, once this fraction of the training is
        `snapshot`."""
        if self.guide is None and section["snapshot"] is not None and fraction_done >= section["snapshot"]:
            self.guide = {key: value.cpu().clone() for key, value in self.eval_network.state_dict().items()}

    @property
    def eval_network(self) -> nn.Module:
        """The network to validate and to keep: with averaged weights, where there are any."""
        return self.ema_model.module if self.ema_model else self.unet

    def sampling_network(self, config: dict, run: Run) -> nn.Module:
        """The network to sample with: that to keep, under autoguidance once there is a guide."""
        if self.guide is None or config["diffusion_train"]["autoguidance"] == 1:
            return self.eval_network
        guided = with_guide(self.eval_network, self.guide, config, "this training")
        guided.guide = on_device(guided.guide, run).requires_grad_(False)
        return guided

    def state_dict(self) -> dict:
        """The entries of a checkpoint."""
        return {
            "model": self.unet.state_dict(),
            "stepper": self.optimizer.state_dict(),
            "ema": self.ema_model.state_dict() if self.ema_model else None,
            "guide": self.guide,
        }

    def load_state_dict(self, state: dict) -> None:
        """Load a checkpoint."""
        where = str(state["path"])
        load_weights(self.unet, state["model"], where)
        self.optimizer.load_state_dict(state["stepper"], where)
        if self.ema_model and state["ema"]:
            load_weights(self.ema_model, state["ema"], f"{where}: ema")
        guide = state.get("guide")
        self.guide = guide and {key: value.clone() for key, value in guide.items()}


def build_learner(config: dict, compiled: bool, run: Run) -> DiffusionLearner:
    """The diffusion network on the device, wrapped, with its optimiser."""
    section, definition = config["diffusion_train"], config["diffusion_def"]
    unet = configs.define_network(config, "diffusion_def")
    inputs = small_input(config, "diffusion_def")
    with torch.device("meta"):
        cond = example_cond(definition, 1, inputs.shape[2:])
        cond.pop("channels", None)  # `small_input` includes them
        frozen = freeze_unreached(unet, inputs, timesteps=torch.zeros(1), **cond)
    unet = prepare_network(unet, section, run)
    model = wrap_network(unet, section, run, compiled)
    optimizer, ema_model = Optimizer(model, section, run.amp_dtype), make_ema(unet, section["ema_decay"])
    return DiffusionLearner(unet, model, optimizer, ema_model, frozen)


# ---------------------------------------------------------------- samples on the way


@torch.no_grad()
def draw_samples(
    unet: nn.Module,
    autoencoder: Autoencoder,
    scale_factor: float,
    process: NoiseProcess,
    shape: Sequence[int],
    geometry: dict,
    steps: int,
    run: Run,
    conditions: Conditions,
    labels: int,
) -> dict[str, torch.Tensor]:
    """What pictures show of samples, (D, H, W) on the CPU by name: of fixed seeds; where the model is
    conditioned, under each of `Conditions.examples` with the same seed. `labels` is how many of the channels
    are those of labels."""
    unet.eval()
    samples = {name: (0, chosen) for name, chosen in conditions.examples(MOST_SAMPLES).items()}
    samples = samples or {f"seed_{seed}": (seed, {}) for seed in SAMPLE_SEEDS}
    volumes = {}
    for name, (seed, condition) in samples.items():
        with run.autocast():
            model = conditions.guided_model(unet, [condition], 1.0, run.device)
            slicewise = autoencoder.is_slicewise
            z0 = sample_latents(model, process, shape, [seed], steps, None, run.device, slicewise=slicewise)
            volume = within(autoencoder.decode(z0 / scale_factor), geometry)[0].cpu()
            volumes[name] = shown(volume, labels)
    return volumes


def save_pictures(
    volumes: Sequence[torch.Tensor], spacing: Sequence[float], epoch: int, model_dir: Path
) -> None:
    """Pictures of samples (D, H, W): three planes, a sweep, and what the same seeds gave so far.

    The last is made of the files up to this epoch, those from before a resume included.
    """
    folder = model_dir / "samples"
    newest = folder / f"epoch_{epoch + 1:05d}.png"
    figures.montage({"sample": volumes}, newest, f"epoch {epoch + 1}", spacing=spacing)
    drawn = sorted(path for path in folder.glob("epoch_*.png") if path.name <= newest.name)
    figures.progress(drawn, folder / "progress.gif")
    figures.animate(figures.axial_sweep(volumes), model_dir / "samples.gif")


# ---------------------------------------------------------------- memory


def rehearse(config: dict, sizes: Sequence[Sequence[int]], meter: Meter, run: Run) -> None:
    """Do what takes memory in this stage, on tensors without values: encoding a volume (not with a cache), a
    training step, the validation of a volume, drawing a sample. `sizes` are those of
    `prepare.patch_sizes`."""
    section, size, count = config["diffusion_train"], sizes[1], config["diffusion_train"]["batch_size"]
    process = NoiseProcess.from_config(config["NoiseScheduler"])

    def define_autoencoder() -> Autoencoder:
        network = configs.define_network(config, "autoencoder_def").eval().requires_grad_(False)
        meter.hold("weights", network)
        return Autoencoder(network)

    with meter:
        whole, channels = latent_size(config, size), config["diffusion_def"]["out_channels"]
        latent = step_size(config, whole)
        noise = torch.zeros(count, channels, *latent, device=run.device)
        mean, std, autoencoder = noise.clone(), noise.clone(), None
        if not section["latent_cache"]:
            autoencoder = define_autoencoder()
            image = torch.zeros(1, config["volume_channels"], *size, device=run.device)
            with torch.no_grad(), meter.phase("encoding"):  # in float32, as `posteriors.encode`
                autoencoder.encode(image)
        learner = build_learner(config, False, run)
        meter.hold("weights", learner.unet)
        meter.hold("averaged weights", learner.ema_model)
        meter.hold_optimizers([learner.optimizer])
        cond = example_cond(config["diffusion_def"], count, latent)
        endless = section["augment"]["versions"] is None
        encodes = autoencoder and endless and augmentation(section["augment"], tuple(size), False)
        with meter.phase("training"):
            if encodes:
                with torch.no_grad(), run.autocast():
                    images = image.expand(count, -1, -1, -1, -1)[..., : step_size(config, size)[-1]].clone()
                    mean, std = autoencoder.encode(images)
            z0, t = mean + std * noise, process.draw_times(torch.zeros(count, device=run.device))
            with run.autocast():
                prediction = predict(learner.model, process.add_noise(z0, noise, t), t, cond)
            loss = diffusion_loss(process, prediction, z0, noise, t, section["min_snr_gamma"])
            learner.optimizer.backward(loss)
            take_steps([learner.optimizer])
        some = min(count, section["val_times"])
        if whole != latent:  # of volumes of which a step takes some slices
            z0, noise, mean = (torch.zeros(some, channels, *whole, device=run.device) for _ in range(3))
            cond = example_cond(config["diffusion_def"], some, whole)
        few = {name: value[:some] for name, value in cond.items()}
        with torch.no_grad(), meter.phase("validation"):
            zt = process.add_noise(z0[:some], noise[:some], t[:some])
            with run.autocast():
                prediction = predict(learner.eval_network, zt, t[:some], few)
            diffusion_loss(process, prediction, z0[:some], noise[:some], t[:some])
        if section["sample_interval"]:
            with torch.no_grad(), meter.phase("sampling"), run.autocast():
                autoencoder = autoencoder or define_autoencoder()
                one = {name: value[:1] for name, value in cond.items()}
                unet = with_any_guide(learner.eval_network, config, run.device)
                meter.hold("weights", getattr(unet, "guide", None))
                autoencoder.decode(predict(unet, mean[:1], t[:1], one).float())
