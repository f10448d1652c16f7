"""Stage 2: train a diffusion model in the latent space of a trained autoencoder.

    python train_diffusion.py -c config/config_train_16g.json -e config/environment.json
    torchrun --standalone --nproc_per_node=8 train_diffusion.py -c config/config_train_multigpu.json \\
        -e config/environment.json -g 8

Reads `model_dir/autoencoder.pt` (or `--autoencoder FILE`). Each volume, and each of its versions where
`augment.versions` says how many there are, is encoded once; the posteriors are kept in memory, and each step
draws latents from them. With `latent_cache` they come from the disk, where cache_latents.py left them. The
scale factor, 1 / std of the latents of the whole training set, is measured once, printed, and stored with the
weights.

Written to `model_dir`: `diffusion_unet.pt` (best loss on held-out volumes so far, averaged weights),
`diffusion_unet_last.pt` (newest, with optimiser) and `diffusion_unet_prev.pt` (the one before it),
`config_diffusion.json`, `train_log.jsonl` (numbers), `log.txt` (what was said), `losses.png` (up to date),
`samples/` (drawn on the way from the same seeds, and `progress.gif` of all of them), `samples.gif` (a sweep
through the newest); to `tfevent_path`/diffusion: TensorBoard.

The same command again goes on where it stopped, to the bit; SIGTERM and Ctrl-C save first. `--fresh` starts
over and moves what was there to `model_dir/old-N`; `--resume FILE` goes on from that checkpoint. `--dry-run`
only tells the peak memory, by part, on a GPU or this CPU; on a GPU a training that cannot fit is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import utils
from ldm import UserError, configs, figures
from ldm.data import latents
from ldm.data.augmentation import augmentation
from ldm.data.cases import Case, typical_limits
from ldm.data.datasets import VolumeDataset, WithDraws, stream
from ldm.data.latents import Posteriors
from ldm.data.prepare import data_folders, find_data, prepare_data, volumes_to_encode
from ldm.data.splits import PARTS, SPLIT, check_unchanged, left_out, subjects_of
from ldm.diffusion.process import NoiseProcess, check_scheduler
from ldm.diffusion.samplers import sample_latents
from ldm.models.autoencoder import LatentEncoder, LatentMoments
from ldm.models.definitions import latent_size, small_input
from ldm.models.layers import freeze_unreached
from ldm.models.weights import load_weights
from ldm.system.checkpoints import weights_hash
from ldm.system.ranks import Run
from ldm.training.loop import Training
from ldm.training.memory import Meter, check_fits, take_steps
from ldm.training.profiler import profiled
from ldm.training.run_folder import StageFiles, lock_run_folder, resume_or_start
from ldm.training.step import Stepper, make_ema

SAMPLE_SEEDS = (0, 1, 2, 3)


class WithChance(WithDraws):
    """A data set whose items also hold the posterior draw `eps` and the `noise`, (c, d, h, w) each, and the
    `uniform` time."""

    purpose = "diffusion"

    def draw(self, generator: torch.Generator) -> dict:
        eps, noise = (torch.randn(self.shape, generator=generator) for _ in range(2))
        return {"eps": eps, "noise": noise, "uniform": torch.rand((), generator=generator)}


@dataclass
class Latents:
    """What the diffusion model learns from.

    `train` and `val` serve posteriors, `train` images where each epoch has versions of its own. `encoder` is
    None where the posteriors come from a cache. `autoencoder` is the hash of its weights, `shape` that of the
    latents, (c, d, h, w); `geometry` holds spacing, size and intensity limits of the volumes.
    """

    train: Posteriors | VolumeDataset
    val: Posteriors
    encoder: LatentEncoder | None
    autoencoder: str
    shape: list[int]
    geometry: dict

    @property
    def in_memory(self) -> bool:
        """Whether a loader has nothing to read or to make."""
        return self.encoder is not None and isinstance(self.train, Posteriors)


def encode_data(
    config: dict, train: VolumeDataset, val: VolumeDataset, autoencoder: Path, resumed: dict | None, run: Run
) -> Latents:
    """Encode the training and held-out volumes."""
    encoder, workers = utils.load_autoencoder(autoencoder, config, run), config["data"]["num_workers"]
    weights = weights_hash(encoder.autoencoder.state_dict())
    check_same(resumed, weights, autoencoder)
    limits = run.from_main(lambda: typical_limits(train.preprocessing, train.cases))
    geometry = {"spacing": config["spacing"], "size": list(train.size), "limits": limits}
    val = latents.encode_all(encoder, val, run, workers, "encode held-out")
    if train.versions is not None:
        train = latents.encode_all(encoder, train, run, workers, "encode training")
    shape = list(val.entries[0].shape[2:])
    return Latents(train, val, encoder, weights, shape, geometry)


def read_cache(config: dict, environment: dict, autoencoder: Path, resumed: dict | None, run: Run) -> Latents:
    """Take the latents that cache_latents.py left; no image is opened and no autoencoder built.

    Raises:
        UserError: they are not those of this config, autoencoder and data.
    """
    folder, seed = environment["cache_dir"] / latents.LATENTS, config["seed"]
    about = latents.what_latents_follow_from(config)
    manifest = latents.open_cache(folder, about, autoencoder, run)
    weights = manifest["autoencoder"]["weights"]
    check_same(resumed, weights, autoencoder)

    def check() -> None:
        folders = data_folders(environment)
        where = ", ".join(map(str, folders))
        if all(one.exists() for one in folders):
            train, val = find_data(config, environment, run.say)
            if others := latents.check_data(folder, manifest, [*train, *val]):
                run.say(f"data: {left_out(others, where, folder / latents.MANIFEST)}")
        else:
            run.say(f"data: {where} is not there; the latents in {folder} stand for them")
        latents.check_split(folder, manifest, environment["model_dir"] / SPLIT)

    run.from_main(check)
    parts = [
        Posteriors(
            [
                Case(record["case"], (), subject=record.get("subject", record["case"]))
                for record in manifest[part]
            ],
            [folder / record["entry"] for record in manifest[part]],
            seed,
        )
        for part in PARTS
    ]
    if resumed:
        path = environment["model_dir"] / SPLIT
        check_unchanged(path, *(part.cases for part in parts), resumed)
    return Latents(*parts, None, weights, manifest["latent_shape"], manifest["geometry"])


def check_same(resumed: dict | None, weights: str, autoencoder: Path) -> None:
    """Raise UserError unless a run goes on with latents of the autoencoder that it began with."""
    if resumed and resumed.get("autoencoder") != weights:
        raise UserError(
            f"{resumed['path']}: was trained on the latents of another autoencoder than {autoencoder}. "
            "Name that one by --autoencoder, or start over with --fresh."
        )


def measure_scale(source: Latents, run: Run) -> float:
    """The scale factor over the whole training set, the same on every rank.

    Where volumes change from epoch to epoch, those of epoch 0 are measured.
    """
    moments = LatentMoments()
    for i in range(run.rank, len(source.train), run.world_size):
        moments.add(*posterior_of(one_of(source.train, i), source.encoder, run))
    return moments.scale_factor(run.sum)


def one_of(dataset: Dataset, i: int) -> dict:
    """Case `i` in epoch 0, as a batch of one."""
    return {k: v[None] for k, v in dataset[(0, i)].items() if k in ("image", "mean", "std")}


@torch.no_grad()
def posterior_of(batch: dict, encoder: LatentEncoder | None, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and std of a batch, (B, c, d, h, w) each: as kept, or encoded now, for this step alone,
    in the precision of the training."""
    if "mean" in batch:
        return tuple(batch[key].to(run.device, non_blocking=True) for key in ("mean", "std"))
    with run.autocast():
        return encoder.posterior(batch["image"].to(run.device, non_blocking=True))


def prediction(
    unet: nn.Module, process: NoiseProcess, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, run: Run
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network predicts at z_t, and what it should, (B, c, d, h, w) float32 each."""
    with run.autocast():
        output = unet(process.add_noise(z0, noise, t), timesteps=t)
    return output.float(), process.target(z0, noise, t)


def diffusion_loss(
    unet: nn.Module,
    process: NoiseProcess,
    z0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    run: Run,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of the prediction at z_t, for latents and noise (B, c, d, h, w) and times (B,);
    weighted by time where `min_snr_gamma` is given."""
    output, target = prediction(unet, process, z0, noise, t, run)
    if min_snr_gamma is None:
        return nn.functional.mse_loss(output, target)
    errors = (output - target).square().flatten(1).mean(1)
    return (process.min_snr_weight(t, min_snr_gamma) * errors).mean()


@torch.no_grad()
def validate(
    unet: nn.Module,
    dataset: Posteriors,
    scale_factor: float,
    process: NoiseProcess,
    section: dict,
    seed: int,
    run: Run,
) -> dict[str, float]:
    """Losses over the held-out volumes at fixed noise and evenly spread times, each rank its share.

    Returns:
        The mean as `loss`; `loss_quarter_1` is that of the quarter of the times with the least noise,
        `loss_quarter_4` of that with the most.
    """
    times, batch_size = section["val_times"], section["batch_size"]
    unet.eval()
    t = process.draw_times((torch.arange(times) + 0.5) / times).to(run.device)
    sums = torch.zeros(times, dtype=torch.float64, device=run.device)
    for i in range(run.rank, len(dataset), run.world_size):
        mean, _ = posterior_of(one_of(dataset, i), None, run)
        generator = stream(seed, "validation", dataset.cases[i].name)
        noise = torch.randn(times, *mean.shape[1:], generator=generator).to(run.device)
        errors = []
        for some, at in zip(noise.split(batch_size), t.split(batch_size), strict=True):
            output, target = prediction(unet, process, (mean * scale_factor).expand_as(some), some, at, run)
            errors.append((output - target).square().flatten(1).mean(1))
        sums += torch.cat(errors)  # read when all are under way
    by_time = (run.sum(sums) / len(dataset))[t.argsort().cpu()]
    quarters = ((torch.arange(times) + 0.5) * 4 / times).long()
    named = {f"loss_quarter_{q + 1}": by_time[quarters == q].mean().item() for q in quarters.unique()}
    return {"loss": by_time.mean().item(), **named}


@torch.no_grad()
def draw_samples(
    unet: nn.Module,
    encoder: LatentEncoder,
    process: NoiseProcess,
    shape: Sequence[int],
    steps: int,
    run: Run,
) -> torch.Tensor:
    """Volumes (n, C, D, H, W) of the fixed seeds, one by one, on the CPU."""
    unet.eval()
    volumes = []
    for seed in SAMPLE_SEEDS:
        with run.autocast():
            latents = sample_latents(
                lambda x, t: unet(x, timesteps=t).float(), process, shape, [seed], steps, None, run.device
            )
            volumes.append(encoder.decode(latents).cpu())
    return torch.cat(volumes)


def show_samples(volumes: torch.Tensor, spacing: Sequence[float], epoch: int, model_dir: Path) -> None:
    """Pictures of volumes (n, D, H, W): three planes, a sweep, and what the same seeds gave so far.

    The last is made of the files that are there up to this epoch, those of before a resume included.
    """
    folder = model_dir / "samples"
    newest = folder / f"epoch_{epoch + 1:05d}.png"
    figures.montage({"sample": list(volumes)}, newest, f"epoch {epoch + 1}", spacing=spacing)
    drawn = sorted(path for path in folder.glob("epoch_*.png") if path.name <= newest.name)
    figures.progress(drawn, folder / "progress.gif")
    figures.animate(figures.axial_sweep(list(volumes)), model_dir / "samples.gif")


@dataclass
class Learner:
    """The diffusion network in training, with its optimiser and averaged weights."""

    unet: nn.Module
    wrapped: nn.Module
    stepper: Stepper
    ema: nn.Module | None

    @property
    def steppers(self) -> list[Stepper]:
        """Its one optimiser."""
        return [self.stepper]

    @property
    def shown(self) -> nn.Module:
        """The weights to validate and to keep: averaged, where there is an average."""
        return self.ema.module if self.ema else self.unet

    def update_average(self) -> None:
        """After a step."""
        if self.ema:
            self.ema.update_parameters(self.unet)

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {
            "model": self.unet.state_dict(),
            "stepper": self.stepper.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a checkpoint."""
        where = str(state["path"])
        load_weights(self.unet, state["model"], where)
        self.stepper.load_state_dict(state["stepper"], where)
        if self.ema and state["ema"]:
            load_weights(self.ema, state["ema"], f"{where}: ema")


def build_learner(config: dict, compiled: bool, run: Run) -> Learner:
    """The diffusion network on the device, wrapped, with its optimiser."""
    section = config["diffusion_train"]
    unet = configs.define_network(config, "diffusion_def")
    freeze_unreached(unet, small_input(config, "diffusion_def"), timesteps=torch.zeros(1, device="meta"))
    unet = utils.prepare_network(unet, section, run)
    wrapped = utils.wrap_network(unet, section, run, compiled)
    return Learner(
        unet, wrapped, Stepper(wrapped, section, run.amp_dtype), make_ema(unet, section["ema_decay"])
    )


def rehearse(config: dict, sizes: Sequence[Sequence[int]], meter: Meter, run: Run) -> None:
    """What takes memory in this stage: encoding a volume (not with a cache), a training step, the validation
    of a volume, drawing a sample. `sizes` are those of `patch_sizes`."""
    section, size, count = config["diffusion_train"], sizes[1], config["diffusion_train"]["batch_size"]
    process = NoiseProcess.from_config(config["NoiseScheduler"])

    def define_encoder() -> LatentEncoder:
        encoder = LatentEncoder(
            configs.define_network(config, "autoencoder_def").eval().requires_grad_(False)
        )
        meter.hold("weights", encoder)
        return encoder

    with meter:
        shape = config["diffusion_def"]["in_channels"], *latent_size(config, size)
        noise = torch.zeros(count, *shape, device=run.device)
        batch, encoder = {"mean": noise.clone(), "std": noise.clone()}, None
        if not section["latent_cache"]:
            encoder = define_encoder()
            with meter.phase("encoding"):
                image = torch.zeros(1, config["image_channels"], *size, device=run.device)
                posterior_of({"image": image}, encoder, replace(run, amp_dtype=None))  # as `latents.encode`
            endless = section["augment"]["versions"] is None
            if endless and augmentation(section["augment"], tuple(size), False):
                batch = {"image": image.expand(count, -1, -1, -1, -1).clone()}
        learner = build_learner(config, False, run)
        meter.hold("weights", learner.unet)
        meter.hold("averaged weights", learner.ema)
        meter.hold_steppers(learner.steppers)
        with meter.phase("training"):
            mean, std = posterior_of(batch, encoder, run)
            z0, t = mean + std * noise, process.draw_times(torch.zeros(count, device=run.device))
            loss = diffusion_loss(learner.wrapped, process, z0, noise, t, run, section["min_snr_gamma"])
            learner.stepper.backward(loss)
            take_steps(learner.steppers)
        with torch.no_grad(), meter.phase("validation"):
            some = min(count, section["val_times"])
            diffusion_loss(learner.shown, process, z0[:some], noise[:some], t[:some], run)
        if section["sample_interval"]:
            with torch.no_grad(), meter.phase("sampling"), run.autocast():
                encoder = encoder or define_encoder()
                encoder.autoencoder.decode(learner.shown(mean[:1], timesteps=t[:1]).float())


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, processes, device
    parser = utils.training_parser(__doc__)
    parser.add_argument("--autoencoder", type=Path, default=None, help="default: model_dir/autoencoder.pt")
    args = parser.parse_args(argv)
    config = utils.load_training_config(args, "diffusion_train")
    section, noise = config["diffusion_train"], config["NoiseScheduler"]
    section["timestep_sampling"] = check_scheduler(noise, section["timestep_sampling"])
    if args.dry_run:
        return utils.dry_run(rehearse, config, "diffusion_train", args)
    environment = utils.load_environment(args.environment_file)
    utils.check_writable(environment, *utils.FOLDERS)
    seed = config["seed"]
    NoiseProcess.from_config(noise)  # what does not go together is refused before anything is read
    run = utils.start(args, section)
    model_dir = environment["model_dir"]
    autoencoder = utils.autoencoder_path(args, environment, needed=not section["latent_cache"])
    lock_run_folder(model_dir, run)
    files = StageFiles(model_dir, "diffusion_unet")
    resumed = resume_or_start(files, "diffusion", config, environment, run, args.resume, args.fresh)

    # Step 1: latents
    if section["latent_cache"]:
        source = read_cache(config, environment, autoencoder, resumed, run)
        config = configs.with_spacing(config, source.geometry["spacing"], resumed)
        size = source.geometry["size"]
    else:
        train, val, spacing = prepare_data(
            config, environment, run, args.skip_bad, resumed=resumed, autoencoder=autoencoder
        )
        config = configs.with_spacing(config, spacing, resumed)
        volumes = volumes_to_encode(config, environment, train, val, run)
        size = list(volumes[0].size)
    check_fits(rehearse, config, "diffusion_train", [size] * 3, run)
    if not section["latent_cache"]:
        source = encode_data(config, *volumes, autoencoder, resumed, run)

    # Step 2: the noise process, and the scale factor of the latents
    process = NoiseProcess.from_config(noise, source.shape[1:])
    if resumed and resumed.get("shift", noise.get("shift", 1.0)) != process.shift:
        process.shift = resumed.get("shift", noise.get("shift", 1.0))
        run.say(f"the times keep the shift of {process.shift:g} that this training began with")
    if noise.get("clip_sample"):
        run.say("NoiseScheduler.clip_sample is not applied: it would cut latents of unit variance at 1")
    scale_factor = resumed["scale_factor"] if resumed else measure_scale(source, run)
    run.say(
        f"scale factor {scale_factor:.6f} over {len(source.train)} training volumes, latents {source.shape}"
    )
    facts = {  # what the weights mean nothing without
        "scale_factor": scale_factor,
        "autoencoder": source.autoencoder,
        "latent_shape": source.shape,
        "geometry": source.geometry,
        "shift": process.shift,
        "config": config,
        "subjects": subjects_of(source.train.cases, source.val.cases),
    }
    often = section["sample_interval"]
    if often and not autoencoder.is_file():
        run.say(f"{autoencoder} is not there: no samples are drawn on the way")
        often = 0

    # Step 3: the diffusion network, and where to go on
    torch.manual_seed(seed)  # the same initial weights on every rank, wherever the latents came from
    learner = build_learner(config, section["compile"], run)
    # With latents in memory, loader processes would take from a CPU what they spare a GPU's process.
    workers = 0 if source.in_memory and run.device.type == "cpu" else None
    loader = utils.make_loader(WithChance(source.train, source.shape, seed), section, config, run, workers)
    training = Training("diffusion", learner, loader, files, facts, environment, run, resumed)
    del resumed  # else its weights and moments would stay in memory beside those of the networks
    count = sum(p.numel() for p in learner.unet.parameters())
    run.say(
        f"diffusion: {count / 1e6:.1f} M parameters, predicts {process.prediction}, "
        f"{run.device} x {run.world_size}, {run.amp_dtype or torch.float32}"
    )

    # Step 4: training
    with profiled(args.profile, model_dir, run) as after_step:
        for epoch in training.epochs():
            learner.unet.train()
            for _, batch, last in training.batches():
                eps, noise, uniform = (
                    batch[key].to(run.device, non_blocking=True) for key in ("eps", "noise", "uniform")
                )
                mean, std = posterior_of(batch, source.encoder, run)
                z0 = (mean + std * eps) * scale_factor
                t = process.draw_times(uniform, section["timestep_sampling"])
                with learner.stepper.accumulating(last):
                    loss = diffusion_loss(
                        learner.wrapped, process, z0, noise, t, run, section["min_snr_gamma"]
                    )
                    learner.stepper.backward(loss)
                training.step({"loss": loss}, batch, last, learner.steppers)
                if last and after_step():
                    return
            if args.profile:
                continue
            validate_now, shown = training.end_epoch(), learner.shown
            if run.is_main and often and (training.done or epoch % often == 0):
                decoder = source.encoder or utils.load_autoencoder(autoencoder, config, run)
                decoder.scale_factor = scale_factor
                volumes = draw_samples(shown, decoder, process, source.shape, section["sample_steps"], run)
                show_samples(volumes[:, 0], config["spacing"], epoch, model_dir)
                for number, volume in zip(SAMPLE_SEEDS, volumes, strict=True):
                    picture = figures.three_planes(volume[0], config["spacing"])
                    training.log.image(f"samples/seed_{number}", picture, training.clock.step)
            if validate_now:
                scores = validate(shown, source.val, scale_factor, process, section, seed, run)
                training.keep(scores)
                training.bar.set_description(f"diffusion, held-out loss {scores['loss']:.4f}")

    # Step 5: what came of it
    training.close()
    run.say(
        f"diffusion: held-out loss {scores['loss']:.4f} (best {training.best:.4f}), "
        f"{training.clock.step} steps in {training.clock.seconds / 60:.1f} min\n"
        f"  {files.best}\n  {model_dir / 'losses.png'}"
    )


if __name__ == "__main__":
    main()
