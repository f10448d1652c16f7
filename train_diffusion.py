"""Stage 2: train a diffusion model in the latent space of a trained autoencoder.

    python train_diffusion.py -c config/config_train_16g.json -e config/environment.json
    torchrun --standalone --nproc_per_node=8 train_diffusion.py -c config/config_train_multigpu.json \\
        -e config/environment.json -g 8

Reads `model_dir/autoencoder.pt` (or `--autoencoder FILE`). Each volume is encoded once; without augmentation
its posterior is kept in memory, and each step draws latents from it. The scale factor, 1 / std of the latents
of the whole training set, is measured once, printed, and stored with the weights.

Written to `model_dir`: `diffusion_unet.pt` (best loss on held-out volumes so far, averaged weights),
`diffusion_unet_last.pt` (newest, with optimiser) and `diffusion_unet_prev.pt` (the one before it),
`config_diffusion.json`, `train_log.jsonl`, `samples/` (drawn on the way); to `output_dir`: `losses.png`; to
`tfevent_path`/diffusion: TensorBoard.

The same command again goes on where it stopped, to the bit; SIGTERM and Ctrl-C save first. `--fresh` starts
over and moves what was there to `model_dir/old-N`; `--resume FILE` goes on from that checkpoint.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import utils
from ldm import UserError, figures
from ldm.bookkeeping import Training, progress_bar
from ldm.checkpoints import StageFiles, load_checkpoint, weights_hash
from ldm.datasets import Case, VolumeDataset, stream
from ldm.diffusion import NoiseProcess, sample_latents
from ldm.encoders import LatentEncoder, LatentMoments
from ldm.logs import read_log
from ldm.memory import Meter, take_steps
from ldm.networks import load_weights
from ldm.processes import Run
from ldm.training import Stepper, make_ema
from ldm.transforms import Preprocessing, augmentation

SAMPLE_SEEDS = (0, 1, 2, 3)
TYPICAL_CASES = 16


class PosteriorDataset(Dataset):
    """Posteriors of volumes that do not change from epoch to epoch, encoded once and kept in memory."""

    is_random = False

    def __init__(self, cases: Sequence, means: torch.Tensor, stds: torch.Tensor):
        self.cases, self.means, self.stds = cases, means, stds

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        return {"mean": self.means[i], "std": self.stds[i], "epoch": epoch, "index": i}


@torch.no_grad()
def encode_all(encoder: LatentEncoder, dataset: VolumeDataset, run: Run, what: str) -> PosteriorDataset:
    """Encode each volume once, each rank its share, and hand every rank all posteriors."""
    mine = range(run.rank, len(dataset), run.world_size)
    found = {}
    for i in progress_bar(run, what, items=mine, unit="volume"):
        with run.autocast():
            mean, std = encoder.posterior(dataset[(0, i)]["image"][None].to(run.device))
        found[i] = mean[0].cpu(), std[0].cpu()
    everywhere = {i: posterior for part in run.gather(found) for i, posterior in part.items()}
    means, stds = (torch.stack([everywhere[i][k] for i in range(len(dataset))]) for k in (0, 1))
    return PosteriorDataset(dataset.cases, means, stds)


def measure_scale(encoder: LatentEncoder, dataset: Dataset, run: Run) -> float:
    """The scale factor over the whole training set, the same on every rank.

    Where volumes change from epoch to epoch, those of epoch 0 are measured.
    """
    moments = LatentMoments()
    for i in range(run.rank, len(dataset), run.world_size):
        moments.add(
            *posterior_of(
                {k: v[None] for k, v in dataset[(0, i)].items() if k in ("image", "mean", "std")},
                encoder,
                run,
            )
        )
    return moments.scale_factor(run.sum)


@torch.no_grad()
def posterior_of(batch: dict, encoder: LatentEncoder, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and std of a batch, (B, c, d, h, w) each: as kept, or encoded now."""
    if "mean" in batch:
        return tuple(batch[key].to(run.device, non_blocking=True) for key in ("mean", "std"))
    with run.autocast():
        return encoder.posterior(batch["image"].to(run.device, non_blocking=True))


def draws(batch: dict, dataset: Dataset, shape: Sequence[int], seed: int) -> tuple[torch.Tensor, ...]:
    """Posterior draw, noise (B, *shape) and uniform time (B,) of each case: functions of (seed, epoch,
    case)."""
    parts = []
    for epoch, i in zip(batch["epoch"], batch["index"], strict=True):
        generator = stream(seed, "diffusion", int(epoch), dataset.cases[i].name)
        parts.append(
            [torch.randn(tuple(shape), generator=generator) for _ in range(2)]
            + [torch.rand((), generator=generator)]
        )
    return tuple(torch.stack(values) for values in zip(*parts, strict=True))


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
    with run.autocast():
        output = unet(process.add_noise(z0, noise, t), timesteps=t)
    target = process.target(z0, noise, t)
    if min_snr_gamma is None:
        return nn.functional.mse_loss(output.float(), target)
    errors = (output.float() - target).square().flatten(1).mean(1)
    return (process.min_snr_weight(t, min_snr_gamma) * errors).mean()


def typical_limits(preprocessing: Preprocessing, cases: Sequence[Case]) -> list[list[float]]:
    """Median over some cases of the intensities that become 0 and 1, for each channel."""
    return np.median([preprocessing.limits(case.images) for case in cases[:TYPICAL_CASES]], axis=0).tolist()


@torch.no_grad()
def validate(
    unet: nn.Module,
    encoder: LatentEncoder,
    dataset: Dataset,
    process: NoiseProcess,
    times: int,
    seed: int,
    run: Run,
) -> float:
    """Mean loss over the held-out volumes at fixed noise and evenly spread times, each rank its share."""
    unet.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for i in range(run.rank, len(dataset), run.world_size):
        item = {key: value[None] for key, value in dataset[(0, i)].items() if key in ("image", "mean", "std")}
        mean, _ = posterior_of(item, encoder, run)
        z0 = (mean * encoder.scale_factor).expand(times, -1, -1, -1, -1)
        generator = stream(seed, "validation", dataset.cases[i].name)
        noise = torch.randn(z0.shape, generator=generator).to(run.device)
        t = process.draw_times((torch.arange(times) + 0.5) / times).to(run.device)
        loss = diffusion_loss(unet, process, z0, noise, t, run)
        sums += torch.tensor([loss.item(), 1.0], dtype=torch.float64)
    total, count = run.sum(sums).tolist()
    return total / count


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


def load_autoencoder(path: Path, config: dict, run: Run) -> LatentEncoder:
    """The frozen autoencoder of stage 1, checked against the config in what both stages share."""
    checkpoint = load_checkpoint(path)
    trained = utils.completed(checkpoint.get("config", config))
    for key in ("autoencoder_def", "channel", "spacing", "intensity"):
        if trained[key] != config[key]:
            raise UserError(f"{path}: was trained with {key} {trained[key]}, the config says {config[key]}.")
    autoencoder = utils.define_network(config, "autoencoder_def")
    load_weights(autoencoder, checkpoint["model"], str(path))
    return LatentEncoder(autoencoder.to(run.device).eval().requires_grad_(False))


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
    unet = utils.prepare_network(utils.define_network(config, "diffusion_def"), section, run)
    wrapped = utils.wrap_network(unet, section, run, compiled)
    return Learner(
        unet, wrapped, Stepper(wrapped, section, run.amp_dtype), make_ema(unet, section["ema_decay"])
    )


def rehearse(config: dict, sizes: Sequence[Sequence[int]], meter: Meter, run: Run) -> None:
    """What takes memory in this stage: encoding a volume, a training step, drawing a sample, and the
    validation of a volume. `sizes` are those of `utils.patch_sizes`."""
    section, size = config["diffusion_train"], sizes[1]
    process = NoiseProcess.from_config(config["NoiseScheduler"])
    with meter:
        encoder = LatentEncoder(
            utils.define_network(config, "autoencoder_def").eval().requires_grad_(False), 1.0
        )
        meter.hold("weights", encoder.to(run.device))
        with meter.phase("encoding"):
            image = torch.zeros(1, config["image_channels"], *size, device=run.device)
            mean, std = posterior_of({"image": image}, encoder, run)
        learner = build_learner(config, False, run)
        meter.hold("weights", learner.unet)
        meter.hold("averaged weights", learner.ema)
        meter.hold_steppers(learner.steppers)
        with meter.phase("training"):
            batch = {"mean": mean, "std": std}
            if augmentation(section["augment"], tuple(size), False) is not None:
                batch = {"image": image}
            batch = {key: x.expand(section["batch_size"], -1, -1, -1, -1).clone() for key, x in batch.items()}
            noise = torch.zeros(section["batch_size"], *mean.shape[1:], device=run.device)
            z0 = encoder.draw(*posterior_of(batch, encoder, run), torch.zeros_like(noise))
            t = process.draw_times(torch.zeros(section["batch_size"], device=run.device))
            loss = diffusion_loss(learner.wrapped, process, z0, noise, t, run, section["min_snr_gamma"])
            learner.stepper.backward(loss)
            take_steps(learner.steppers)
        with torch.no_grad(), meter.phase("validation"):
            z0, t = mean.expand(section["val_times"], -1, -1, -1, -1), torch.zeros(section["val_times"])
            diffusion_loss(learner.shown, process, z0, torch.zeros_like(z0), t.to(run.device), run)
        if section["sample_interval"]:
            with torch.no_grad(), meter.phase("sampling"), run.autocast():
                encoder.decode(learner.shown(mean, timesteps=t[:1].to(run.device)).float())


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, processes, device
    parser = utils.training_parser(__doc__)
    parser.add_argument("--autoencoder", type=Path, default=None, help="default: model_dir/autoencoder.pt")
    args = parser.parse_args(argv)
    config = utils.load_config(args.config_file, args.set)
    if args.dry_run:
        return utils.tell_memory(rehearse, config, "diffusion_train", args)
    environment = utils.load_environment(args.environment_file)
    section, seed = config["diffusion_train"], config["seed"]
    process = NoiseProcess.from_config(config["NoiseScheduler"])
    run = utils.start(args, section)
    model_dir, output_dir = environment["model_dir"], environment["output_dir"]
    autoencoder_path = args.autoencoder or model_dir / "autoencoder.pt"
    if not autoencoder_path.is_file():
        raise UserError(
            f"{autoencoder_path}: no trained autoencoder. Run train_autoencoder.py first, or name one by "
            "--autoencoder."
        )
    utils.claim(model_dir, run)
    files = StageFiles(model_dir, "diffusion_unet")
    resumed = utils.starting_point(args, environment, "diffusion", files, run)
    torch.manual_seed(seed)  # the same initial weights on every rank

    # Step 1: data
    train_cases, val_cases = utils.prepare_data(config, environment, run, args.skip_bad)
    _, size, _ = utils.patch_sizes(config, [*train_cases, *val_cases])
    preprocessing = utils.preprocessing_of(config)
    common = {"cache_dir": environment["cache_dir"], "cache_rate": config["data"]["cache_rate"], "seed": seed}
    train_set = VolumeDataset(train_cases, preprocessing, size, False, section["augment"], **common)
    val_set = VolumeDataset(val_cases, preprocessing, size, **common)
    utils.warn_of_padding(train_cases, config["spacing"], size, run)

    utils.refuse_what_cannot_fit(rehearse, config, "diffusion_train", [*train_cases, *val_cases], args, run)

    # Step 2: the frozen autoencoder, latents and their scale factor
    encoder = load_autoencoder(autoencoder_path, config, run)
    autoencoder_hash = weights_hash(encoder.autoencoder.state_dict())
    if resumed and resumed.get("autoencoder") != autoencoder_hash:
        raise UserError(
            f"{resumed['path']}: was trained on the latents of another autoencoder than {autoencoder_path}. "
            "Name that one by --autoencoder, or start over with --fresh."
        )
    val_set = encode_all(encoder, val_set, run, "encode held-out")
    if not train_set.is_random:
        train_set = encode_all(encoder, train_set, run, "encode training")
    encoder.scale_factor = resumed["scale_factor"] if resumed else measure_scale(encoder, train_set, run)
    latent_shape = list(val_set.means.shape[1:])
    run.say(
        f"scale factor {encoder.scale_factor:.6f} over {len(train_set)} training volumes, "
        f"latents {latent_shape}"
    )
    limits = run.from_main(lambda: typical_limits(preprocessing, train_cases))
    facts = {  # what the weights mean nothing without
        "scale_factor": encoder.scale_factor,
        "autoencoder": autoencoder_hash,
        "latent_shape": latent_shape,
        "geometry": {"spacing": config["spacing"], "size": size, "limits": limits},
        "config": config,
    }

    # Step 3: the diffusion network, and where to go on
    learner = build_learner(config, section["compile"] if args.compile is None else args.compile, run)
    workers = None if train_set.is_random else 0  # latents in memory need no workers
    loader = utils.make_loader(train_set, section, config, run, workers)
    training = Training("diffusion", learner, loader, files, facts, operator.lt, environment, run, resumed)
    count = sum(p.numel() for p in learner.unet.parameters())
    run.say(
        f"diffusion: {count / 1e6:.1f} M parameters, predicts {process.prediction}, "
        f"{run.device} x {run.world_size}, {run.amp_dtype or torch.float32}"
    )

    # Step 4: training
    with utils.profiled(args.profile, model_dir, run) as after_step:
        for epoch in training.epochs():
            learner.unet.train()
            for _, batch, last in training.batches():
                chance = draws(batch, train_set, latent_shape, seed)
                eps, noise, uniform = (x.to(run.device, non_blocking=True) for x in chance)
                z0 = encoder.draw(*posterior_of(batch, encoder, run), eps)
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
            often = section["sample_interval"]
            if run.is_main and often and (training.done or epoch % often == 0):
                volumes = draw_samples(shown, encoder, process, latent_shape, section["sample_steps"], run)
                picture = model_dir / "samples" / f"epoch_{epoch + 1:05d}.png"
                figures.montage({"sample": list(volumes[:, 0])}, picture)
                training.log.image("samples", figures.three_planes(volumes[0, 0]), training.clock.step)
            if validate_now:
                score = validate(shown, encoder, val_set, process, section["val_times"], seed, run)
                training.keep(score, {"loss": score})
                training.bar.set_description(f"diffusion, held-out loss {score:.4f}")

    # Step 5: pictures
    training.close()
    if run.is_main:
        figures.loss_curves(read_log(model_dir / "train_log.jsonl"), output_dir / "losses.png")
    run.say(
        f"diffusion: held-out loss {score:.4f} (best {training.best:.4f}), {training.clock.step} steps "
        f"in {training.clock.seconds / 60:.1f} min\n"
        f"  {files.best}\n  {output_dir / 'losses.png'}"
    )


if __name__ == "__main__":
    main()
