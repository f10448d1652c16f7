"""Stage 1: train an autoencoder on volumes.

    python train_autoencoder.py -c config/config_train_16g.json -e config/environment.json
    torchrun --standalone --nproc_per_node=8 train_autoencoder.py -c config/config_train_multigpu.json \\
        -e config/environment.json -g 8
    python train_autoencoder.py -c config/config_demo.json -e config/environment.json --device cpu

The config (docs/config.md lists its keys) says what to train, the environment file where data are and results
go. The loss is L1 or L2, KL, perceptual and patch-adversarial, each with its weight; a weight of 0 builds
nothing.

Written to `model_dir`: `autoencoder.pt` (lowest held-out loss so far: reconstruction, gradient and perceptual
terms with their weights, on whole volumes), `autoencoder_last.pt` (newest, with optimiser and discriminator)
and `autoencoder_prev.pt` (the one before it),
`config_autoencoder.json` (as resolved), `split.json`, `train_log.jsonl` (numbers), `log.txt` (what was said),
`losses.png` (up to date), `reconstruction.gif` (a sweep through a held-out scan and its reconstruction); to
`output_dir`: `reconstructions.png`; to `tfevent_path`/autoencoder: TensorBoard, with the same held-out scans,
their reconstructions and 4 times the difference at each validation.

The same command again goes on where it stopped, to the bit; SIGTERM and Ctrl-C save first. `--fresh` starts
over and moves what was there to `model_dir/old-N`; `--resume FILE` goes on from that checkpoint. `--dry-run`
only tells the peak memory, by part, on a GPU or this CPU; on a GPU a training that cannot fit is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks.nets import PatchDiscriminator
from torch import nn

import utils
from ldm import UserError, configs, figures
from ldm.data.cases import warn_of_padding
from ldm.data.datasets import VolumeDataset, WithDraws, stream
from ldm.data.prepare import patch_sizes, prepare_data
from ldm.data.preprocessing import Preprocessing
from ldm.data.splits import subjects_of
from ldm.losses import UNTRAINED, PerceptualLoss, gradient_difference, kl_divergence, least_squares
from ldm.metrics import band_power, reconstruction_metrics
from ldm.models.autoencoder import LatentEncoder, set_posterior_std
from ldm.models.definitions import check_discriminator_size, latent_size, small_input
from ldm.models.initialisation import start_as_block_transform
from ldm.models.layers import freeze_unreached, on_device
from ldm.models.weights import load_weights
from ldm.system.checkpoints import load_checkpoint
from ldm.system.ranks import Run
from ldm.training.loop import Training
from ldm.training.memory import Meter, check_fits, take_steps
from ldm.training.profiler import profiled
from ldm.training.run_folder import StageFiles, keep_pair, lock_run_folder, resume_or_start
from ldm.training.step import Stepper, make_ema

LPIPS_SIDE = 16  # at which the last pooling of its networks leaves nothing
INITIAL_CASES = 16  # whose principal components a block transform starts from
AMPLIFIED = 4  # as small differences are hard to see
COMPARED = f"scan, reconstruction, difference x {AMPLIFIED}"
RECON_LOSSES = {"l1": nn.functional.l1_loss, "l2": nn.functional.mse_loss}


# What the held-out loss follows from: where one is another than it was, losses of before do not compare.
JUDGED_BY = (
    "recon_loss",
    "gradient_weight",
    "perceptual_weight",
    "perceptual_network",
    "perceptual_slice_ratio",
    "val_patch_size",
)


class WithPosteriorDraw(WithDraws):
    """A data set whose items also hold the posterior draw `eps`, (c, d, h, w)."""

    purpose = "posterior"

    def draw(self, generator: torch.Generator) -> dict:
        return {"eps": torch.randn(self.shape, generator=generator)}


class AutoencoderLoss(nn.Module):
    """The generator's loss: reconstruction, gradient difference, KL, perceptual; the adversarial term is
    added by the training loop after the warm-up."""

    def __init__(self, section: dict, perceptual_weights: str | None):
        super().__init__()
        self.section, self.recon = section, RECON_LOSSES[section["recon_loss"]]
        weights = {f"{term}_loss": section[f"{term}_weight"] for term in ("gradient", "perceptual")}
        self.weights = {"recon_loss": 1.0, **{term: weight for term, weight in weights.items() if weight}}
        self.perceptual = None
        if section["perceptual_weight"]:
            self.perceptual = PerceptualLoss(
                section["perceptual_network"], perceptual_weights, section["perceptual_slice_ratio"]
            )

    def forward(self, images, reconstruction, mean, std, generator) -> dict[str, torch.Tensor]:
        """Terms by name, unweighted, and their weighted sum as "loss"."""
        terms = self._distances(images, reconstruction, generator)
        terms = {"recon_loss": terms.pop("recon_loss"), "kl_loss": kl_divergence(mean, std), **terms}
        weights = {**self.weights, "kl_loss": self.section["kl_weight"]}
        return {**terms, "loss": self._weighted(terms, weights)}

    def held_out(self, images, reconstruction, generator) -> dict[str, torch.Tensor]:
        """How far reconstructions are from images: the terms of that, unweighted, and their weighted sum as
        "loss". KL says nothing of it, and the adversarial term changes with its discriminator."""
        terms = self._distances(images, reconstruction, generator)
        return {**terms, "loss": self._weighted(terms, self.weights)}

    def _distances(self, images, reconstruction, generator) -> dict[str, torch.Tensor]:
        reconstruction = reconstruction.float()
        terms = {"recon_loss": self.recon(reconstruction, images)}
        if "gradient_loss" in self.weights:
            terms["gradient_loss"] = gradient_difference(reconstruction, images)
        if self.perceptual is not None:
            terms["perceptual_loss"] = self.perceptual(reconstruction, images, generator)
        return terms

    @staticmethod
    def _weighted(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
        return sum(weights[name] * term for name, term in terms.items())


def discriminator_loss(
    discriminator: nn.Module, reconstruction: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """Least-squares loss of the discriminator on reconstructions and images, in one pass."""
    logits = discriminator(torch.cat([reconstruction.detach(), images]).contiguous())[-1]
    fake, real = logits.float().chunk(2)
    return 0.5 * (least_squares(fake, 0.0) + least_squares(real, 1.0))


@torch.no_grad()
def judged_reconstruction(
    encoder: LatentEncoder, criterion: AutoencoderLoss, image: torch.Tensor, slices: torch.Generator, run: Run
) -> tuple[torch.Tensor, dict]:
    """Of one volume (1, C, D, H, W): its reconstruction; PSNR, SSIM and L1, and the held-out loss with its
    terms. `slices` draws those that a 2D perceptual network compares."""
    with run.autocast():
        reconstruction = encoder.reconstruct(image)
    numbers = reconstruction_metrics(reconstruction.clamp(0, 1), image.clamp(0, 1))
    return reconstruction, {**numbers, **criterion.held_out(image, reconstruction, slices)}


@torch.no_grad()
def validate(
    encoder: LatentEncoder, criterion: AutoencoderLoss, dataset: VolumeDataset, run: Run
) -> tuple[dict, dict]:
    """Reconstruct the held-out volumes, each rank its share. What is drawn is a function of the case alone.

    Returns:
        Means over all volumes of the held-out loss and its terms, PSNR, SSIM, L1 and the share of the fine
        spectral power that is kept; and up to 4 pairs of image and reconstruction (C, D, H, W) by the name of
        the case, for pictures: of a rank, the same cases each time.
    """
    encoder.eval()
    names = ["loss", *criterion.weights, "psnr", "ssim", "l1", "power", "real power"]
    sums, pairs = torch.zeros(len(names) + 1, dtype=torch.float64), {}
    for i in range(run.rank, len(dataset), run.world_size):
        case, image = dataset.cases[i].name, dataset[(0, i)]["image"][None].to(run.device)
        slices = stream(dataset.seed, "slices", "validation", case)
        reconstruction, numbers = judged_reconstruction(encoder, criterion, image, slices, run)
        numbers |= {"power": band_power(reconstruction), "real power": band_power(image)}
        sums += torch.tensor([*(float(numbers[name]) for name in names), 1.0], dtype=torch.float64)
        if len(pairs) < 4:
            pairs[case] = image[0].cpu(), reconstruction[0].cpu()
    *sums, count = run.sum(sums).tolist()
    scores = {name: one / count for name, one in zip(names, sums, strict=True)}
    real = scores.pop("real power")
    return {**scores, "power_share": scores["power"] / real if real else math.nan}, pairs


def judge_again(
    files: StageFiles, config: dict, criterion: AutoencoderLoss, dataset: VolumeDataset, run: Run
) -> float:
    """The held-out loss of the best weights so far: as it was measured, or measured now, where that was by
    other terms or weights or by PSNR alone, as it once was. So a worse one never replaces them."""
    best, section = load_checkpoint(files.best), config["autoencoder_train"]
    measured = best["config"].get("autoencoder_train", {})
    if "loss" in best.get("validation", {}) and all(measured.get(key) == section[key] for key in JUDGED_BY):
        return best["best"]
    autoencoder = configs.define_network(config, "autoencoder_def")
    load_weights(autoencoder, best["model"], str(files.best))
    scores, _ = validate(LatentEncoder(on_device(autoencoder, run.device)), criterion, dataset, run)
    run.say(
        f"{files.best} was chosen by another measure. Its held-out loss by this config is "
        f"{scores['loss']:.4g}, which the next best has to beat."
    )
    return scores["loss"]


def compared(scan: torch.Tensor, reconstruction: torch.Tensor, spacing: Sequence[float]) -> np.ndarray:
    """A grey picture of two volumes (D, H, W) in three planes each, and of `AMPLIFIED` times the absolute
    difference of the two pictures below."""
    pictures = [figures.three_planes(one, spacing) for one in (scan, reconstruction)]
    difference = np.clip(AMPLIFIED * np.abs(pictures[1] - pictures[0]), 0, 1)
    return np.concatenate([*pictures, difference])


@dataclass
class Networks:
    """The networks of stage 1 with their optimisers; the adversarial ones are None where that term is off."""

    encoder: LatentEncoder
    wrapped: nn.Module
    stepper: Stepper
    ema: nn.Module | None
    criterion: AutoencoderLoss
    judge: nn.Module | None = None
    wrapped_judge: nn.Module | None = None
    judge_stepper: Stepper | None = None

    @property
    def steppers(self) -> list[Stepper]:
        """The optimisers, the autoencoder's first."""
        return [self.stepper, *([self.judge_stepper] if self.judge else [])]

    @property
    def shown(self) -> nn.Module:
        """The weights to validate and to keep: averaged, where there is an average."""
        return (self.ema.module if self.ema else self.encoder).autoencoder

    def update_average(self) -> None:
        """After a step."""
        if self.ema:
            self.ema.update_parameters(self.encoder)

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {
            "model": self.encoder.autoencoder.state_dict(),
            "stepper": self.stepper.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "discriminator": self.judge.state_dict() if self.judge else None,
            "discriminator_stepper": self.judge_stepper.state_dict() if self.judge else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a checkpoint."""
        where = str(state["path"])
        load_weights(self.encoder.autoencoder, state["model"], where)
        self.stepper.load_state_dict(state["stepper"], where)
        if self.ema and state["ema"]:
            load_weights(self.ema, state["ema"], f"{where}: ema")
        if self.judge and state["discriminator"]:
            load_weights(self.judge, state["discriminator"], f"{where}: discriminator")
            self.judge_stepper.load_state_dict(state["discriminator_stepper"], f"{where}: discriminator")


def build_networks(
    config: dict,
    autoencoder: nn.Module,
    patch_size: Sequence[int],
    val_size: Sequence[int],
    criterion: AutoencoderLoss,
    compiled: bool,
    run: Run,
) -> Networks:
    """Autoencoder, losses and, where its weight is not 0, the discriminator, on the device and wrapped."""
    section = config["autoencoder_train"]
    criterion = criterion.to(run.device)
    smallest = min(patch_size, val_size, key=min)
    if criterion.perceptual and not criterion.perceptual.is_3d and min(smallest) <= LPIPS_SIDE:
        raise UserError(
            f"autoencoder_train.perceptual_network: slices of {smallest} are too small for a 2D "
            f"network, which needs more than {LPIPS_SIDE} voxels a side. Set perceptual_weight to 0."
        )
    encoder = LatentEncoder(autoencoder)
    freeze_unreached(encoder, small_input(config, "autoencoder_def"), 0.0)
    encoder.autoencoder = utils.prepare_network(autoencoder, section, run)
    wrapped = utils.wrap_network(encoder, section, run, compiled)
    networks = Networks(
        encoder,
        wrapped,
        Stepper(wrapped, section, run.amp_dtype),
        make_ema(encoder, section["ema_decay"]),
        criterion,
    )
    if section["adversarial_weight"]:
        judge = PatchDiscriminator(
            spatial_dims=3, in_channels=config["image_channels"], out_channels=1, **section["discriminator"]
        )
        check_discriminator_size(judge, patch_size, "autoencoder_train.patch_size")
        networks.judge = utils.prepare_network(judge, {**section, "gradient_checkpointing": False}, run)
        networks.wrapped_judge = utils.wrap_network(networks.judge, section, run, compiled)
        networks.judge_stepper = Stepper(networks.wrapped_judge, section, run.amp_dtype)
    return networks


def train_batch(
    networks: Networks,
    images: torch.Tensor,
    eps: torch.Tensor,
    slices: torch.Generator,
    adversarial_on: bool,
    last: bool,
    run: Run,
) -> dict[str, torch.Tensor]:
    """Forward and backward of the autoencoder, then of the discriminator; the terms of the loss by name."""
    judge, weight = networks.judge, networks.criterion.section["adversarial_weight"]
    with networks.stepper.accumulating(last):
        with run.autocast():
            reconstruction, mean, std = networks.wrapped(images, eps)
        terms = networks.criterion(images, reconstruction, mean, std, slices)
        if adversarial_on:
            judge.requires_grad_(False)
            with run.autocast():
                logits = judge(reconstruction.contiguous())[-1]
            judge.requires_grad_(True)
            terms["adversarial_loss"] = least_squares(logits.float(), 1.0)
            terms["loss"] = terms["loss"] + weight * terms["adversarial_loss"]
        networks.stepper.backward(terms["loss"])
    if adversarial_on:
        with networks.judge_stepper.accumulating(last):
            with run.autocast():
                terms["discriminator_loss"] = discriminator_loss(
                    networks.wrapped_judge, reconstruction, images
                )
            networks.judge_stepper.backward(terms["discriminator_loss"])
    return {key: value.detach() for key, value in terms.items()}


def latent_shape_of(config: dict, autoencoder: nn.Module, size: Sequence[int]) -> list[int]:
    """(c, d, h, w) of the latents of volumes of this size in voxels."""
    return [config.get("latent_channels", autoencoder.latent_channels), *latent_size(config, size)]


def rehearse(config: dict, sizes: Sequence[Sequence[int]], meter: Meter, run: Run) -> None:
    """What takes memory in this stage: a training step with all terms of the loss, and the validation of a
    volume. `sizes` are those of `patch_sizes`."""
    patch_size, _, val_size = sizes
    batch_size, channels = config["autoencoder_train"]["batch_size"], config["image_channels"]
    with meter:
        autoencoder = configs.define_network(config, "autoencoder_def")
        criterion = AutoencoderLoss(config["autoencoder_train"], UNTRAINED)
        networks = build_networks(config, autoencoder, patch_size, val_size, criterion, False, run)
        meter.hold("weights", networks.encoder, networks.criterion, networks.judge)
        meter.hold("averaged weights", networks.ema)
        meter.hold_steppers(networks.steppers)
        slices = stream(config["seed"], "slices")
        with meter.phase("training"):
            images = torch.zeros(batch_size, channels, *patch_size, device=run.device)
            eps = torch.zeros(
                batch_size, *latent_shape_of(config, autoencoder, patch_size), device=run.device
            )
            train_batch(networks, images, eps, slices, networks.judge is not None, True, run)
            take_steps(networks.steppers)
        with meter.phase("validation"):
            image = torch.zeros(1, channels, *val_size, device=run.device)
            encoder = LatentEncoder(networks.shown).eval()
            judged_reconstruction(encoder, networks.criterion, image, slices, run)


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, processes, device
    parser = utils.training_parser(__doc__)
    args = parser.parse_args(argv)
    config = utils.load_training_config(args, "autoencoder_train")
    if args.dry_run:
        return utils.dry_run(rehearse, config, "autoencoder_train", args)
    environment = utils.load_environment(args.environment_file)
    section, seed = config["autoencoder_train"], config["seed"]
    utils.check_writable(environment, *utils.FOLDERS)
    criterion = AutoencoderLoss(section, environment["perceptual_weights"])  # before anything is downloaded
    run = utils.start(args, section)
    model_dir, output_dir = environment["model_dir"], environment["output_dir"]
    lock_run_folder(model_dir, run)
    files = StageFiles(model_dir, "autoencoder")
    resumed = resume_or_start(files, "autoencoder", config, environment, run, args.resume, args.fresh)
    torch.manual_seed(seed)  # the same initial weights on every rank

    # Step 1: data
    train_cases, val_cases, spacing = prepare_data(config, environment, run, args.skip_bad, resumed=resumed)
    config = configs.with_spacing(config, spacing, resumed)
    patch_size, _, val_size = sizes = patch_sizes(config, [*train_cases, *val_cases])
    preprocessing = Preprocessing.from_config(config)
    common = {"cache_dir": environment["cache_dir"], "cache_rate": config["data"]["cache_rate"], "seed": seed}
    train_set = VolumeDataset(
        train_cases, preprocessing, patch_size, bool(section["patch_size"]), section["augment"], **common
    )
    val_set = VolumeDataset(val_cases, preprocessing, val_size, **common)
    warn_of_padding(train_cases, config["spacing"], patch_size, run.say)

    # Step 2: networks
    check_fits(rehearse, config, "autoencoder_train", sizes, run)
    autoencoder = configs.define_network(config, "autoencoder_def")
    if section["initialise"] == "block_transform" and resumed is None:
        first = VolumeDataset(train_cases[:INITIAL_CASES], preprocessing, val_size, **common)
        start_as_block_transform(
            autoencoder, torch.stack([first[(0, i)]["image"] for i in range(len(first))])
        )
    if section["initial_posterior_std"]:
        set_posterior_std(autoencoder, section["initial_posterior_std"])
    networks = build_networks(config, autoencoder, patch_size, val_size, criterion, section["compile"], run)
    latent_shape = latent_shape_of(config, autoencoder, patch_size)
    loader = utils.make_loader(WithPosteriorDraw(train_set, latent_shape, seed), section, config, run)

    # Step 3: where to go on
    facts = {"config": config, "subjects": subjects_of(train_cases, val_cases)}
    training = Training("autoencoder", networks, loader, files, facts, environment, run, resumed)
    del resumed  # else its weights and moments would stay in memory beside those of the networks
    if training.best is not None:
        training.best = judge_again(files, config, networks.criterion, val_set, run)
    count = sum(p.numel() for p in autoencoder.parameters())
    run.say(
        f"autoencoder: {count / 1e6:.1f} M parameters, patches {patch_size}, validation on {val_size}, "
        f"latents {latent_shape}, {run.device} x {run.world_size}, {run.amp_dtype or torch.float32}"
    )

    # Step 4: training
    with profiled(args.profile, model_dir, run) as after_step:
        for epoch in training.epochs():
            networks.encoder.train()
            adversarial_on = networks.judge is not None and epoch >= section["adversarial_warmup_epochs"]
            for number, batch, last in training.batches():
                images, eps = (batch[key].to(run.device, non_blocking=True) for key in ("image", "eps"))
                slices = stream(seed, "slices", epoch, number)
                terms = train_batch(networks, images, eps, slices, adversarial_on, last, run)
                training.step(terms, batch, last, networks.steppers[: 1 + adversarial_on])
                if last and after_step():
                    return
            if args.profile or not training.end_epoch():
                continue
            scores, pairs = validate(LatentEncoder(networks.shown), networks.criterion, val_set, run)
            if training.is_best(scores["loss"]):
                keep_pair(environment, files.best, run)
            training.keep(scores)
            told = f"loss {scores['loss']:.4f}, PSNR {scores['psnr']:.2f} dB"
            training.bar.set_description(f"autoencoder, held-out {told}")
            if run.is_main:
                for case, (scan, reconstruction) in pairs.items():
                    picture = compared(scan[0], reconstruction[0], config["spacing"])
                    training.log.image(f"{COMPARED}/{case}", picture, training.clock.step)

    # Step 5: pictures
    training.close()
    if run.is_main:
        scans, reconstructions = ([pair[i][0] for pair in pairs.values()] for i in (0, 1))
        figures.montage(
            {"held-out scan": scans, "reconstruction": reconstructions},
            output_dir / "reconstructions.png",
            f"Held-out volumes: PSNR {scores['psnr']:.1f} dB, SSIM {scores['ssim']:.3f}",
            spacing=config["spacing"],
        )
        sweep = figures.axial_sweep([scans[0], reconstructions[0]], ("held-out scan", "reconstruction"))
        figures.animate(sweep, model_dir / "reconstruction.gif")
    run.say(
        f"autoencoder: held-out loss {scores['loss']:.4f} (best {training.best:.4f}), "
        f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}, L1 {scores['l1']:.4f}, "
        f"{scores['power_share']:.2f} of the fine spectral power, "
        f"after {training.clock.seconds / 60:.1f} min\n"
        f"  {files.best}\n  {output_dir / 'reconstructions.png'}\n  {model_dir / 'reconstruction.gif'}\n"
        f"  {model_dir / 'losses.png'}"
    )


if __name__ == "__main__":
    main()
