"""Stage 2: train a diffusion model in the latent space of a trained autoencoder.

    python train_diffusion.py -c config/config_train_16g.json -e config/environment.json
    torchrun --standalone --nproc_per_node=8 train_diffusion.py -c config/config_train_multigpu.json \\
        -e config/environment.json -g 8

Reads `model_dir/autoencoder.pt` (or `--autoencoder FILE`). Each volume is encoded once, and its posterior
kept in memory; with `augment.versions: N`, N random versions of it are. With augmentation but no `versions`,
each step encodes freshly augmented images. Each step draws its latents from the posteriors. With
`latent_cache` these are read from the disk, where cache_latents.py has written them. The scale factor,
1 / std of the latents of the whole training set, is measured once and stored with the weights. Where volumes
have sizes of their own (`data.sizes`), a batch holds volumes of one size.

Written to `model_dir`:
    diffusion_unet.pt           the lowest loss on held-out volumes so far, with averaged weights
    diffusion_unet_last.pt      the newest, with optimiser; _prev.pt is the one before it
    config_diffusion.json       the config as resolved
    train_log.jsonl, log.txt    numbers; messages
    losses.png                  curves, redrawn during training
    samples/, samples.gif       samples drawn during training from fixed seeds; a sweep through the newest
to `tfevent_path`/diffusion: TensorBoard.

Re-running the same command resumes: on a CPU bit-exactly, on a GPU up to rounding. SIGTERM and Ctrl-C save
first. `--fresh` starts over and
moves what is there to `model_dir/old-N`; `--resume FILE` resumes from that checkpoint. `--dry-run` prints the
predicted peak memory by part, for a GPU or this CPU, and trains nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

import utils
from ldm import configs, figures
from ldm.data.extent import largest_size
from ldm.data.prepare import in_steps, prepare_data, step_size, volumes_to_encode
from ldm.data.splits import subjects_of
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.guidance import check_guide
from ldm.diffusion.objective import diffusion_loss, validate
from ldm.diffusion.process import NoiseProcess, resolve_timestep_sampling
from ldm.diffusion.sources import check_sources
from ldm.environment import FOLDERS
from ldm.models.denoiser import predict
from ldm.training.diffusion import build_learner, draw_samples, rehearse, save_pictures
from ldm.training.latents import WithNoise, encode_data, load_autoencoder, read_cache
from ldm.training.memory import check_fits
from ldm.training.profiler import profiled
from ldm.training.progress import Progress
from ldm.training.run_folder import StageFiles, keep_pair, lock_run_folder, resume_or_start


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, processes, device
    parser = utils.training_parser(__doc__)
    parser.add_argument("--autoencoder", type=Path, default=None, help="default: model_dir/autoencoder.pt")
    args = parser.parse_args(argv)
    config = utils.load_training_config(args, "diffusion_train")
    check_sources(config)
    section, seed, noise_section = config["diffusion_train"], config["seed"], config["NoiseScheduler"]
    section["timestep_sampling"] = resolve_timestep_sampling(noise_section, section["timestep_sampling"])
    check_guide(section)
    if args.dry_run:
        return utils.dry_run(rehearse, config, "diffusion_train", args)
    environment = utils.load_environment(args.environment_file, writable=FOLDERS)
    NoiseProcess.from_config(noise_section)  # an impossible schedule is refused before anything is read
    run = utils.start(args, section)
    model_dir = environment["model_dir"]
    autoencoder_file = utils.autoencoder_path(args, environment, needed=not section["latent_cache"])
    lock_run_folder(model_dir, run)
    files = StageFiles(model_dir, "diffusion_unet")
    resumed = resume_or_start(files, "diffusion", config, environment, run, args.resume, args.fresh)

    # Step 1: latents
    if section["latent_cache"]:
        latents = read_cache(config, environment, autoencoder_file, resumed, run)
        config = configs.with_spacing(config, latents.geometry["spacing"], resumed)
        train_cases, val_cases = latents.train.cases, latents.val.cases
        size = largest_size(train_cases, latents.geometry["size"])
    else:
        train_cases, val_cases, spacing = prepare_data(
            config, environment, run, args.skip_bad, resumed=resumed, autoencoder=autoencoder_file
        )
        config = configs.with_spacing(config, spacing, resumed)
        train_volumes, val_volumes = volumes_to_encode(config, environment, train_cases, val_cases, run)
        size = list(train_volumes.size)
    cases = [*train_cases, *val_cases]
    conditions = Conditions.of_training(config, cases, resumed, train_cases)
    if conditions:
        run.print(conditions.summary(cases))
    check_fits(rehearse, config, "diffusion_train", [size] * 3, run)  # as of `patch_sizes`
    if not section["latent_cache"]:
        latents = encode_data(config, train_volumes, val_volumes, autoencoder_file, resumed, run)

    # Step 2: the noise process, and the scale factor and the mean of the latents
    process = utils.make_noise_process(noise_section, latents.shape[1:], resumed, run)
    if resumed:
        scale_factor = resumed["scale_factor"]
        conditions.check_size(latents.shape, resumed["path"])
    else:
        scale_factor, mean, slices = latents.moments(run)
        if "mean_latent" in (config["conditions"]["into"] if conditions.covariates else ()):
            mean = latents.regression(mean, conditions.deviations(latents.train.cases), run)
        mean = mean * scale_factor if config["conditions"]["mean_latent"] else None
        conditions = conditions.of_latents(latents.shape, mean)
    geometry = resumed["geometry"] if resumed else latents.geometry | slices
    count = len(latents.train)
    run.print(f"scale factor {scale_factor:.6f} over {count} training volumes, latents {latents.shape}")

    # Step 3: the diffusion network
    torch.manual_seed(seed)  # the same initial weights on every rank, wherever the latents came from
    learner = build_learner(config, section["compile"], run)
    unet, model, optimizer, ema_model = learner.unet, learner.model, learner.optimizer, learner.ema_model
    # With latents in memory and training on the CPU, loader processes would only compete with it for cores.
    workers = 0 if latents.in_memory and run.device.type == "cpu" else None
    train, shape = in_steps(config, latents.train), step_size(config, latents.shape)
    drawn = WithNoise(train, shape, seed, conditions, section["augment"], latents.shapes)
    loader = utils.make_loader(drawn, section, config, run, workers)
    facts = {  # saved beside the weights in each checkpoint: sampling needs them
        "scale_factor": scale_factor,
        "autoencoder": latents.autoencoder_hash,
        "latent_shape": latents.shape,
        "geometry": geometry,
        "shift": process.shift,
        **conditions.state(),
        "config": config,
        "subjects": subjects_of(latents.train.cases, latents.val.cases),
    }
    if resumed:
        learner.load_state_dict(resumed)
    progress = Progress("diffusion", loader, files, facts, environment, run, resumed)
    del resumed  # else its weights and moments would stay in memory beside those of the networks
    utils.describe_network("diffusion", unet, learner.frozen, f"predicts {process.prediction}", run)
    sample_interval = section["sample_interval"]
    if sample_interval and not autoencoder_file.is_file():
        run.print(f"{autoencoder_file} is missing: no samples are drawn during training")
        sample_interval = 0

    # Step 4: train
    with profiled(args.profile, model_dir, run) as after_step:
        for epoch in progress.epochs():
            unet.train()
            for batch, last in progress.batches():  # `last`: the optimiser steps after this batch
                # Batch: latents, scaled to unit variance
                cond = {name: value.to(run.device) for name, value in batch["cond"].items()}
                posterior_noise, noise, uniform = (
                    batch[key].to(run.device, non_blocking=True)
                    for key in ("posterior_noise", "noise", "uniform")
                )
                mean, std = latents.posterior(batch, run)
                z0 = (mean + std * posterior_noise) * scale_factor

                # Noise and time
                at = process.at(z0.shape[2:]) if latents.shapes else process
                t = at.draw_times(uniform, section["timestep_sampling"])
                zt = process.add_noise(z0, noise, t)

                # Forward, loss, backward
                with optimizer.accumulating(last):
                    with run.autocast():
                        prediction = predict(model, zt, t, cond)
                    loss = diffusion_loss(process, prediction, z0, noise, t, section["min_snr_gamma"])
                    optimizer.backward(loss)
                progress.add({"loss": loss}, batch)
                if not last:
                    progress.end_batch()
                    continue

                # Clip, step, average; `skip` is 1 if loss or gradients of at least one rank are not finite
                finite = optimizer.clip()
                skip = progress.agree_to_skip(finite)
                optimizer.step(progress.learning_rate(), skip)
                if ema_model:
                    ema_model.update(unet, skip)
                learner.keep_snapshot(section, progress.fraction_done)

                # Log, save
                progress.end_step({"loss": loss}, {"diffusion": optimizer})
                if progress.must_save():
                    progress.save(learner)
                if after_step():  # the profile is complete
                    return
            if args.profile:  # until it is complete, nothing is saved or validated
                continue

            # Save, validate, draw samples
            progress.end_epoch(learner, optimizer.rate)
            if progress.validates():
                scores = validate(
                    learner.eval_network, latents.val, scale_factor, process, section, seed, run, conditions
                )
                if progress.is_best(scores["loss"]):
                    keep_pair(environment, files.best, run, "diffusion")
                progress.keep_best(scores, learner.eval_network, guide=learner.guide)
                progress.bar.set_description(f"diffusion, held-out loss {scores['loss']:.4f}")
            if run.is_main and sample_interval and (progress.done or epoch % sample_interval == 0):
                decoder = latents.autoencoder or load_autoencoder(autoencoder_file, config, run)
                shape, steps = latents.shape, section["sample_steps"]
                sampled = learner.sampling_network(config, run)
                labels = len(configs.labels_of(config))
                samples = draw_samples(
                    sampled, decoder, scale_factor, process, shape, geometry, steps, run, conditions, labels
                )
                save_pictures([*samples.values()], config["spacing"], epoch, model_dir)
                for name, volume in samples.items():
                    picture = figures.three_planes(volume, config["spacing"])
                    progress.log.image(f"samples/{name}", picture, progress.clock.step)

    # Step 5: what was reached
    progress.close()
    run.print(
        f"diffusion: held-out loss {scores['loss']:.4f} (best {progress.best:.4f}), "
        f"{progress.clock.step} steps in {progress.clock.seconds / 60:.1f} min\n"
        f"  {files.best}\n  {model_dir / 'losses.png'}"
    )


if __name__ == "__main__":
    main()
