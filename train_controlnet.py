"""Stage 3: train a ControlNet, so that images follow masks. The diffusion model of stage 2 stays as it is.

    python train_controlnet.py -c config/config_demo.json -e config/environment.json
    torchrun --standalone --nproc_per_node=8 train_controlnet.py -c CONFIG -e ENV -g 8
    python inference.py -c CONFIG -e ENV --mask masks/ --num 8

Every case needs a label, which is its mask; `label_values` names the values that count, the default is all
that occur. Reads `model_dir/autoencoder.pt` and `diffusion_unet.pt` (or `--autoencoder`, `--unet`), whose
weights are hashed before and after and never written. Each volume is encoded once, or each of
`controlnet_train.augment.versions`, its mask cropped and augmented with it. The mask enters the ControlNet as
binary-coded channels. `controlnet_train.weighted_loss_label` makes small structures count more;
`contrast_weight` asks images to change where a structure is taken out of the mask, and to stay elsewhere.

Written to `model_dir`:
    controlnet.pt               the lowest loss on held-out pairs so far, with averaged weights
    controlnet_last.pt          the newest, with optimiser; _prev.pt is the one before it
    config_controlnet.json      the config as resolved
    train_log.jsonl, log.txt    numbers; messages
    losses.png                  curves, redrawn during training
to `tfevent_path`/controlnet: TensorBoard.

Re-running the same command resumes: on a CPU bit-exactly, on a GPU up to rounding. SIGTERM and Ctrl-C save
first. `--fresh` starts over and moves what is there to `model_dir/old-N`; `--resume FILE` resumes from that
checkpoint. `--dry-run` prints the predicted peak memory by part.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

import utils
from ldm import UserError, configs
from ldm.data.labels import check_labelled, values_in
from ldm.data.prepare import prepare_data, volumes_to_encode, warn_of_sides
from ldm.data.splits import subjects_of
from ldm.data.structures import usual_medians
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.objective import validate
from ldm.diffusion.process import NoiseProcess, resolve_timestep_sampling
from ldm.diffusion.sources import check_sources
from ldm.environment import FOLDERS
from ldm.models.control import MASK, coded, contrast_loss
from ldm.models.denoiser import predict
from ldm.system.checkpoints import require_checkpoint, weights_hash
from ldm.training.controlnet import (
    MASK_WITHOUT,
    WithMask,
    build_learner,
    check_frozen,
    check_values,
    label_weights,
    load_unet,
    masks_of,
    rehearse,
    told_augmentation,
    weighted_loss,
)
from ldm.training.latents import WithNoise, encode_data
from ldm.training.memory import check_fits
from ldm.training.profiler import profiled
from ldm.training.progress import Progress
from ldm.training.run_folder import StageFiles, lock_run_folder, resume_or_start


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, processes, device
    parser = utils.training_parser(__doc__)
    parser.add_argument("--autoencoder", type=Path, default=None, help="default: model_dir/autoencoder.pt")
    parser.add_argument("--unet", type=Path, default=None, help="default: model_dir/diffusion_unet.pt")
    args = parser.parse_args(argv)
    config = utils.load_training_config(args, "controlnet_train")
    check_sources(config, "controlnet_train")
    section, seed, noise_section = config["controlnet_train"], config["seed"], config["NoiseScheduler"]
    section["timestep_sampling"] = resolve_timestep_sampling(noise_section, section["timestep_sampling"])
    if config["with_labels"]:
        raise UserError("with_labels: this model draws labels itself. A ControlNet is for one without.")
    if args.dry_run:
        return utils.dry_run(rehearse, config, "controlnet_train", args)
    environment = utils.load_environment(args.environment_file, writable=FOLDERS)
    run = utils.start(args, section)
    model_dir = environment["model_dir"]
    autoencoder_file = utils.autoencoder_path(args, environment)
    utils.find_files(unet=[args.unet])
    unet_file = args.unet or model_dir / "diffusion_unet.pt"
    require_checkpoint(unet_file, "unet")
    lock_run_folder(model_dir, run)
    files = StageFiles(model_dir, "controlnet")
    resumed = resume_or_start(files, "controlnet", config, environment, run, args.resume, args.fresh)

    # Step 1: the frozen diffusion model
    unet, trained = load_unet(unet_file, config, run)
    unet_hash = weights_hash(unet.state_dict())
    if resumed and resumed.get("unet") != unet_hash:
        raise UserError(
            f"{resumed['path']}: was trained on another diffusion model than {unet_file}. Name that one by "
            "--unet, or start over with --fresh."
        )
    scale_factor, shape, geometry = (trained[key] for key in ("scale_factor", "latent_shape", "geometry"))
    config = configs.with_spacing(config, geometry["spacing"], resumed)
    process = NoiseProcess.of_checkpoint(trained, noise_section, shape[1:])
    conditions = Conditions.from_checkpoint(trained, config)
    conditions = conditions.of_latents(shape, conditions.mean_latent)

    # Step 2: pairs of latents and masks
    train_cases, val_cases, _ = prepare_data(
        config, environment, run, args.skip_bad, resumed=resumed, autoencoder=autoencoder_file, labels=True
    )
    cases = [*train_cases, *val_cases]
    check_labelled(cases, "masks")
    values = run.from_main(lambda: list(config["label_values"] or values_in(cases)))
    check_values(values, section, resumed)
    warn_of_sides([section], train_cases, run)
    told = told_augmentation(config, conditions)
    sized = {**config, "diffusion_train": {**config["diffusion_train"], "patch_size": geometry["size"]}}
    volumes = volumes_to_encode(sized, environment, train_cases, val_cases, run, section["augment"])
    check_fits(rehearse, config, "controlnet_train", [list(volumes[0].size)] * 3, run)
    latents = encode_data(config, *volumes, autoencoder_file, None, run)
    if latents.autoencoder_hash != trained["autoencoder"]:
        raise UserError(
            f"{unet_file}: was trained on the latents of another autoencoder than {autoencoder_file}."
        )
    latents.autoencoder = None  # all is encoded
    masks, val_masks = (
        masks_of(one, values, run, f"masks of {name}")
        for one, name in zip(volumes, ("training", "held-out"), strict=True)
    )

    preprocessing, usual = volumes[0].preprocessing, resumed and resumed.get("structures")
    if usual is None:
        usual = run.from_main(lambda: usual_medians(preprocessing, train_cases, values))

    # Step 3: the ControlNet
    torch.manual_seed(seed)  # the same initial weights on every rank
    learner = build_learner(config, unet, values, section["compile"], run)
    model, optimizer, ema_model = learner.model, learner.optimizer, learner.ema_model
    drawn = WithNoise(latents.train, shape, seed, conditions, told, latents.shapes)
    drawn = WithMask(drawn, masks, seed, section["contrast_remove"])
    workers = 0 if run.device.type == "cpu" else None
    loader = utils.make_loader(drawn, section, config, run, workers)
    facts = {
        "config": config,
        "unet": unet_hash,
        "label_values": values,
        "empty_masks": any((one.flatten(1).amax(1) == 0).any().item() for one in masks),
        "structures": usual,
        "subjects": subjects_of(train_cases, val_cases),
    }
    if resumed:
        learner.load_state_dict(resumed)
    progress = Progress("controlnet", loader, files, facts, environment, run, resumed)
    del resumed
    about = f"labels {', '.join(map(str, values))} in {learner.bits} bits"
    utils.describe_network("controlnet", learner.control, [], about, run)

    def mask_of(i: int) -> dict[str, torch.Tensor]:
        """The mask of a held-out case, without a batch dimension."""
        return {MASK: coded(val_masks[i][:1].to(run.device), learner.bits)[0]}

    def weights_of(i: int) -> torch.Tensor:
        """What the voxels of a held-out case weigh, as in training: else the best is not that which follows
        the masks best."""
        return label_weights(val_masks[i][:1].to(run.device), section, latents.val[(0, i)]["mean"].shape[1:])

    # Step 4: train
    with profiled(args.profile, model_dir, run) as after_step:
        for _ in progress.epochs():
            learner.control.train()
            for batch, last in progress.batches():  # `last`: the optimiser steps after this batch
                # Batch: latents, scaled to unit variance, and their masks
                cond = {name: value.to(run.device) for name, value in batch["cond"].items()}
                mask = batch[MASK].to(run.device, non_blocking=True)
                cond[MASK] = coded(mask, learner.bits)
                posterior_noise, noise, uniform = (
                    batch[key].to(run.device, non_blocking=True)
                    for key in ("posterior_noise", "noise", "uniform")
                )
                mean, std = latents.posterior(batch, run)
                z0 = (mean + std * posterior_noise) * scale_factor

                # Noise and time, forward, loss, backward
                at = process.at(z0.shape[2:]) if latents.shapes else process
                t = at.draw_times(uniform, section["timestep_sampling"])
                zt = process.add_noise(z0, noise, t)
                with optimizer.accumulating(last):
                    with run.autocast():
                        prediction = predict(model, zt, t, cond)
                    made = {"z0": z0, "noise": noise, "t": t}
                    loss = weighted_loss(process, prediction, made, section, mask)
                    terms = {"loss": loss}
                    if MASK_WITHOUT in batch:
                        mask_without = batch[MASK_WITHOUT].to(run.device, non_blocking=True)
                        cond[MASK] = coded(mask_without, learner.bits)
                        with torch.no_grad(), run.autocast():
                            without = predict(learner.bare_model, zt, t, cond)
                        terms["contrast"] = contrast_loss(prediction, without, mask, mask_without)
                        loss = loss + section["contrast_weight"] * terms["contrast"]
                    optimizer.backward(loss)
                progress.add(terms, batch)
                if not last:
                    progress.end_batch()
                    continue

                # Clip, step, average; `skip` is 1 if loss or gradients of at least one rank are not finite
                skip = progress.agree_to_skip(optimizer.clip())
                optimizer.step(progress.learning_rate(), skip)
                if ema_model:
                    ema_model.update(learner.control, skip)

                # Log, save
                progress.end_step(terms, {"controlnet": optimizer})
                if progress.must_save():
                    progress.save(learner)
                if after_step():  # the profile is complete
                    return
            if args.profile:  # until it is complete, nothing is saved or validated
                continue

            # Save, validate
            progress.end_epoch(learner, optimizer.rate)
            if progress.validates():
                network = learner.eval_network
                scores = validate(
                    network,
                    latents.val,
                    scale_factor,
                    process,
                    section,
                    seed,
                    run,
                    conditions,
                    mask_of,
                    weights_of if section["weighted_loss_label"] else None,
                )
                progress.keep_best(scores, learner.eval_control)
                progress.bar.set_description(f"controlnet, held-out loss {scores['loss']:.4f}")

    # Step 5: what was reached
    progress.close()
    check_frozen(unet, unet_hash)
    run.print(
        f"controlnet: held-out loss {scores['loss']:.4f} (best {progress.best:.4f}), "
        f"{progress.clock.step} steps in {progress.clock.seconds / 60:.1f} min\n"
        f"  {files.best}\n  {model_dir / 'losses.png'}"
    )


if __name__ == "__main__":
    main()
