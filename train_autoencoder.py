"""Stage 1: train an autoencoder on volumes.

    python train_autoencoder.py -c config/config_train_16g.json -e config/environment.json
    torchrun --standalone --nproc_per_node=8 train_autoencoder.py -c config/config_train_multigpu.json \\
        -e config/environment.json -g 8
    python train_autoencoder.py -c config/config_demo.json -e config/environment.json --device cpu

The config says what to train (docs/config.md lists its keys), the environment file where data are and where
results go. The loss is the sum of L1 or L2, KL, gradient-difference, perceptual and adversarial terms, each
with its weight. A term of weight 0 is not built.

Written to `model_dir`:
    autoencoder.pt              the lowest held-out loss so far: reconstruction, gradient-difference and
                                perceptual terms on centre crops of `val_patch_size` (default:
                                what stage 2 encodes), with averaged weights
    autoencoder_last.pt         the newest, with optimisers and discriminator; _prev.pt is the one before it
    config_autoencoder.json     the config as resolved
    split.json                  training and held-out cases
    train_log.jsonl, log.txt    numbers; messages
    losses.png                  curves, redrawn during training
    reconstruction.gif          a sweep through a held-out scan and its reconstruction
to `output_dir`: reconstructions.png; to `tfevent_path`/autoencoder: TensorBoard, with held-out scans, their
reconstructions and 4 times the difference at each validation.

Re-running the same command resumes: on a CPU bit-exactly, on a GPU up to rounding. SIGTERM and Ctrl-C save
first. `--fresh` starts over and
moves what is there to `model_dir/old-N`; `--resume FILE` resumes from that checkpoint. `--dry-run` prints the
predicted peak memory by part, for a GPU or this CPU, and trains nothing.
"""

from collections.abc import Sequence

import torch

import utils
from ldm import UserError, configs, figures
from ldm.data.cases import warn_of_padding
from ldm.data.datasets import VolumeDataset, stream
from ldm.data.labels import shown
from ldm.data.prepare import in_steps, patch_sizes, prepare_data, step_size
from ldm.data.preprocessing import Preprocessing
from ldm.data.splits import subjects_of
from ldm.environment import FOLDERS
from ldm.losses import adversarial_loss, discriminator_loss
from ldm.models.autoencoder import Autoencoder, set_posterior_std
from ldm.models.initialisation import start_as_block_transform
from ldm.system.checkpoints import save_checkpoint
from ldm.training.autoencoder import (
    COMPARISON_TAG,
    WithPosteriorDraw,
    best_loss,
    build_learner,
    in_words,
    latent_shape_of,
    make_criterion,
    rehearse,
    side_by_side,
    validate,
)
from ldm.training.memory import check_fits
from ldm.training.profiler import profiled
from ldm.training.progress import Progress
from ldm.training.run_folder import StageFiles, keep_pair, lock_run_folder, resume_or_start

INITIAL_CASES = 16  # whose principal components a block transform starts from


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, processes, device
    parser = utils.training_parser(__doc__)
    args = parser.parse_args(argv)
    config = utils.load_training_config(args, "autoencoder_train")
    section, seed = config["autoencoder_train"], config["seed"]
    if args.dry_run:
        return utils.dry_run(rehearse, config, "autoencoder_train", args)
    environment = utils.load_environment(args.environment_file, writable=FOLDERS)
    perceptual_weights = environment["perceptual_weights"]  # read before anything is downloaded
    criterion = make_criterion(config, perceptual_weights)
    run = utils.start(args, section)
    model_dir, output_dir = environment["model_dir"], environment["output_dir"]
    lock_run_folder(model_dir, run)
    files = StageFiles(model_dir, "autoencoder")
    if not Autoencoder(configs.define_network(config, "autoencoder_def")).learns:
        return fit_wavelets(config, environment, files, criterion, args, run)
    resumed = resume_or_start(files, "autoencoder", config, environment, run, args.resume, args.fresh)

    # Step 1: data
    train_cases, val_cases, spacing = prepare_data(config, environment, run, args.skip_bad, resumed=resumed)
    config = configs.with_spacing(config, spacing, resumed)
    patch_size, _, val_size = sizes = patch_sizes(config, [*train_cases, *val_cases])
    preprocessing = Preprocessing.from_config(config)
    common = {"cache_dir": environment["cache_dir"], "cache_rate": config["data"]["cache_rate"], "seed": seed}
    common["find_slices"] = config["slices"]["foreground"]
    train_set = VolumeDataset(
        train_cases,
        preprocessing,
        patch_size,
        random_crop=bool(section["patch_size"]),
        augment=section["augment"],
        **common,
    )
    own_sizes = not section["val_patch_size"]
    val_set = VolumeDataset(val_cases, preprocessing, val_size, own_sizes=own_sizes, **common)
    warn_of_padding(train_cases, spacing, patch_size, run.print)
    train_set, patch_size = in_steps(config, train_set), step_size(config, patch_size)

    # Step 2: networks
    check_fits(rehearse, config, "autoencoder_train", sizes, run)
    torch.manual_seed(seed)  # the same initial weights on every rank
    network = configs.define_network(config, "autoencoder_def")
    if section["initialise"] == "block_transform" and resumed is None:
        first = VolumeDataset(train_cases[:INITIAL_CASES], preprocessing, val_size, **common)
        start_as_block_transform(network, torch.stack([first[(0, i)]["image"] for i in range(len(first))]))
    if section["latent_noise"] and Autoencoder(network).is_quantised:
        raise UserError("autoencoder_train.latent_noise: quantised latents take none. Set it to 0.")
    if section["initial_posterior_std"] and resumed is None:
        set_posterior_std(network, section["initial_posterior_std"])
    learner = build_learner(config, network, patch_size, val_size, criterion, section["compile"], run)
    autoencoder, model, optimizer = learner.autoencoder, learner.model, learner.optimizer
    ema_model, discriminator = learner.ema_model, learner.discriminator
    latent_shape = latent_shape_of(config, autoencoder, patch_size)
    loader = utils.make_loader(WithPosteriorDraw(train_set, latent_shape, seed), section, config, run)
    facts = {"config": config, "subjects": subjects_of(train_cases, val_cases)}
    if resumed:
        learner.load_state_dict(resumed)
    progress = Progress("autoencoder", loader, files, facts, environment, run, resumed)
    del resumed  # else its weights and moments would stay in memory beside those of the networks
    if progress.best is not None:
        progress.best = best_loss(files, config, criterion, val_set, run)
    about = f"patches {patch_size}, validation on {val_size}, latents {latent_shape}"
    utils.describe_network("autoencoder", network, learner.frozen, about, run)

    # Step 3: train
    noisy = section["latent_noise"] > 0
    with profiled(args.profile, model_dir, run) as after_step:
        for epoch in progress.epochs():
            autoencoder.train()
            adversarial = discriminator is not None and epoch >= section["adversarial_warmup_epochs"]
            optimizers = {"autoencoder": optimizer}
            if adversarial:
                optimizers["discriminator"] = learner.discriminator_optimizer
            for batch, last in progress.batches():  # `last`: the optimiser steps after this batch
                # Batch: images, the posterior's noise, the level of `latent_noise`, and the draw of slices
                # for a 2D perceptual network
                images, posterior_noise, level = (
                    batch[key].to(run.device, non_blocking=True)
                    for key in ("image", "posterior_noise", "noise_level")
                )
                level = level * section["latent_noise"] * (1 - progress.fraction_done) if noisy else None
                slice_generator = stream(seed, "slices", epoch, progress.batch)

                # Forward, loss, backward
                with optimizer.accumulating(last):
                    with run.autocast():
                        reconstruction, mean, std = model(images, posterior_noise, level)
                    terms = criterion(images, reconstruction, mean, std, slice_generator)
                    image, made = criterion.image_of(images), criterion.image_of(reconstruction)
                    if adversarial:
                        with run.autocast():
                            terms["adversarial_loss"] = adversarial_loss(discriminator, made)
                        terms["loss"] = (
                            terms["loss"] + section["adversarial_weight"] * terms["adversarial_loss"]
                        )
                    optimizer.backward(terms["loss"])
                if autoencoder.is_quantised:
                    terms |= autoencoder.network.use_of_codes()

                # The same of the discriminator
                if adversarial:
                    with optimizers["discriminator"].accumulating(last):
                        with run.autocast():
                            loss = discriminator_loss(learner.wrapped_discriminator, made, image)
                        optimizers["discriminator"].backward(loss)
                    terms["discriminator_loss"] = loss
                progress.add(terms, batch)
                if not last:
                    progress.end_batch()
                    continue

                # Clip, step, average; `skip` is 1 if loss or gradients of at least one rank are not finite
                finite = [one.clip() for one in optimizers.values()]
                skip = progress.agree_to_skip(*finite)
                for one in optimizers.values():
                    one.step(progress.learning_rate(), skip)
                if ema_model:
                    ema_model.update(autoencoder, skip)

                # Log, save
                progress.end_step(terms, optimizers)
                if progress.must_save():
                    progress.save(learner)
                if after_step():  # the profile is complete
                    return
            if args.profile:  # until it is complete, nothing is saved or validated
                continue

            # Save, validate
            progress.end_epoch(learner, optimizer.rate)
            if not progress.validates():
                continue
            scores, pairs = validate(Autoencoder(learner.eval_network), criterion, val_set, run)
            if progress.is_best(scores["loss"]):
                keep_pair(environment, files.best, run)
            progress.keep_best(scores, learner.eval_network)
            brief = [f"PSNR {scores['psnr']:.2f} dB"] if criterion.image else []
            brief += [f"Dice {scores['dice']:.3f}"] if criterion.labels else []
            printed = ", ".join([f"loss {scores['loss']:.4f}", *brief])
            progress.bar.set_description(f"autoencoder, held-out {printed}")
            if run.is_main:
                for case, pair in pairs.items():
                    picture = side_by_side(*(shown(one, criterion.labels) for one in pair), spacing)
                    progress.log.image(f"{COMPARISON_TAG}/{case}", picture, progress.clock.step)

    # Step 4: pictures, and what was reached
    progress.close()
    if run.is_main:
        scans, reconstructions = (
            [shown(pair[i], criterion.labels) for pair in pairs.values()] for i in (0, 1)
        )
        figures.montage(
            {"held-out scan": scans, "reconstruction": reconstructions},
            output_dir / "reconstructions.png",
            f"Held-out volumes: {in_words(scores).partition(', L1')[0]}",
            spacing=spacing,
        )
        sweep = figures.axial_sweep([scans[0], reconstructions[0]], ("held-out scan", "reconstruction"))
        figures.animate(sweep, model_dir / "reconstruction.gif")
    run.print(
        f"autoencoder: held-out loss {scores['loss']:.4f} (best {progress.best:.4f}), {in_words(scores)}, "
        f"after {progress.clock.seconds / 60:.1f} min\n"
        f"  {files.best}\n  {output_dir / 'reconstructions.png'}\n  {model_dir / 'reconstruction.gif'}\n"
        f"  {model_dir / 'losses.png'}"
    )


def fit_wavelets(config, environment, files, criterion, args, run):
    """Stage 1 without weights: measure the bands of the training volumes, save them, reconstruct."""
    train_cases, val_cases, spacing = prepare_data(config, environment, run, args.skip_bad)
    config = configs.with_spacing(config, spacing)
    _, size, val_size = patch_sizes(config, [*train_cases, *val_cases])
    preprocessing, seed = Preprocessing.from_config(config), config["seed"]
    common = {"cache_dir": environment["cache_dir"], "seed": seed}
    own_sizes = not config["autoencoder_train"]["val_patch_size"]
    train_set = VolumeDataset(train_cases, preprocessing, size, own_sizes=True, **common)
    val_set = VolumeDataset(val_cases, preprocessing, val_size, own_sizes=own_sizes, **common)
    network = configs.define_network(config, "autoencoder_def")
    run.print("autoencoder: no weights to train; its bands are measured")

    def measured() -> dict:
        network.fit(train_set[(0, i)]["image"][None] for i in range(len(train_set)))
        return network.state_dict()

    network.load_state_dict(run.from_main(measured))  # an error reaches every rank
    scores, _ = validate(Autoencoder(network), criterion, val_set, run)
    if files.best.exists():
        keep_pair(environment, files.best, run)
    facts = {"config": config, "subjects": subjects_of(train_cases, val_cases), "model": network.state_dict()}
    content = {**facts, "epoch": 0, "batch": 0, "step": 0, "best": scores["loss"], "validation": scores}
    run.from_main(lambda: save_checkpoint(files.best, content))
    run.print(f"autoencoder: {in_words(scores)}\n  {files.best}")


if __name__ == "__main__":
    main()
