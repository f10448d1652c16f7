"""Encode a data set once; trainings of stage 2 then need neither images nor autoencoder.

    python cache_latents.py -c config/config_train_16g.json -e config/environment.json
    python train_diffusion.py -c config/config_train_16g.json -e config/environment.json \\
        --set diffusion_train.latent_cache=true
    torchrun --standalone --nproc_per_node=8 cache_latents.py -c CONFIG -e ENV -g 8

Reads `model_dir/autoencoder.pt` (or `--autoencoder FILE`) and the data of stage 2. Writes to
`cache_dir`/latents the posterior's mean and standard deviation of each volume, encoded in float32, or of each
of its `diffusion_train.augment.versions` random versions; and `manifest.json`, which records the autoencoder,
the transforms and the data. A training with others is refused.

Re-running the same command resumes, and encodes again what is damaged or whose files have changed. `--fresh`
deletes the latents of another autoencoder or config first. `--max-memory GB` limits the memory of the device,
weights included; the latents are the same but for rounding: see inference.py.
"""

from collections.abc import Sequence
from pathlib import Path

import utils
from ldm import UserError, configs
from ldm.data import latent_cache
from ldm.data.cases import typical_limits
from ldm.data.extent import trained_geometry
from ldm.data.prepare import find_data, prepare_data, volumes_to_encode
from ldm.data.structures import structures_of
from ldm.models.definitions import latent_size
from ldm.system.checkpoints import weights_hash
from ldm.system.files import sha256_of
from ldm.training.latents import load_autoencoder
from ldm.training.run_folder import lock_run_folder


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, processes, device
    parser = utils.script_parser(__doc__)
    add = parser.add_argument
    add("--autoencoder", type=Path, default=None, help="default: model_dir/autoencoder.pt")
    add("--fresh", action="store_true", help="delete the latents that are there, and start over")
    add("--skip-bad", action="store_true", help="read all data first; as for the trainings")
    utils.add_max_memory(parser, "encode")
    args = parser.parse_args(argv)
    if args.amp:
        raise UserError("--amp: latents that are kept are encoded in float32; leave it out.")
    config = utils.load_config(args.config_file, args.set)
    environment = utils.load_environment(args.environment_file, writable=("cache_dir", "model_dir"))
    workers = config["data"]["num_workers"]
    run = utils.start(args)
    path = utils.autoencoder_path(args, environment)
    folder = environment["cache_dir"] / latent_cache.FOLDER
    about = latent_cache.dependencies(config)

    # Step 1: data and autoencoder
    train, val, spacing = prepare_data(config, environment, run, args.skip_bad, autoencoder=path)
    config = configs.with_spacing(config, spacing)
    train, val = volumes_to_encode(config, environment, train, val, run)
    if train.versions is None:
        raise UserError(
            "diffusion_train.augment: each volume has a new version in each epoch. Set augment.versions to "
            "the number of versions to encode, such as 4."
        )
    encoder = load_autoencoder(path, config, run, args.max_memory)
    weights = weights_hash(encoder.network.state_dict())
    autoencoder = {"weights": weights, "file": run.from_main(lambda: sha256_of(path))}

    # Step 2: encode what is missing
    lock_run_folder(folder, run)
    run.from_main(lambda: latent_cache.begin(folder, about, autoencoder, args.fresh))
    common = None if config["data"]["sizes"] else train.size  # else each entry has its own
    key = repr((sorted(about.items()), weights, config["spacing"], common))
    training, shape, made = latent_cache.add(folder, encoder, train, run, workers, "encode training", key)
    validation, _, made_too = latent_cache.add(folder, encoder, val, run, workers, "encode held-out", key)

    # Step 3: the manifest
    def finish() -> int:
        found = find_data(config, environment)
        used = {case.name for case in [*train.cases, *val.cases]}
        limits = typical_limits(train.preprocessing, train.cases)
        geometry = trained_geometry(train.cases, train.size, config["spacing"], limits)
        geometry |= structures_of(train.preprocessing, train.cases)
        manifest = {
            "about": about,
            "autoencoder": autoencoder,
            "versions": train.versions,
            "latent_shape": [shape[2], *latent_size(config, geometry["size"])],
            "geometry": geometry,
            "training": training,
            "validation": validation,
            "left_out": [case.name for cases in found for case in cases if case.name not in used],
        }
        latent_cache.complete(folder, manifest)
        return sum((folder / record["entry"]).stat().st_size for record in [*training, *validation])

    size = run.from_main(finish)
    count, made = len(training) + len(validation), made + made_too
    run.print(
        f"latents of {len(training)} training volumes, {train.versions} version(s) each, and of "
        f"{len(validation)} held-out ones: {made} encoded, {count - made} found, {size / 1e9:.2f} GB\n"
        f"  {folder}"
    )


if __name__ == "__main__":
    main()
