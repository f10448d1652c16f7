"""Export a trained model: safetensors, TorchScript, a MONAI bundle, and a model card.

    python export_model.py -c config/config_train_16g.json -e config/environment.json --out exported/brains
    python export_model.py -c CONFIG -e ENV --out DIR --metrics metrics.json --authors "A. Name"
    python export_model.py -c CONFIG -e ENV --out DIR --formats safetensors bundle
    python export_model.py -c CONFIG -e ENV --out DIR --autoencoder A.pt --unet B.pt --scale-factor 0.9

Reads the best checkpoints of `model_dir`, `autoencoder.pt` and `diffusion_unet.pt`, whose weights are the
averaged ones (EMA) where the config asks for averages, or weights from elsewhere as inference.py does; and
beside them `split.json` and `train_log.jsonl`, for the card. Writes

    DIR/MODEL_CARD.md     data, training, figures, limits, and code that uses each form
    DIR/safetensors/      autoencoder.safetensors, diffusion_unet.safetensors
    DIR/torchscript/      encode.ts, decode.ts, unet.ts, model.json
    DIR/bundle/           configs/, models/, scripts/, docs/ (the card again), LICENSE
    DIR/SHA256SUMS

Each form gives the volumes of inference.py, up to rounding. No case is named, and of the data's path only the
last part. DIR must be new or empty, and appears once all of it is written. Runs on the CPU; docs/export.md
says what each form is for.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import utils
from ldm import UserError, configs, generation
from ldm.export import bundle, formats, model_card
from ldm.export.records import CHECKPOINTS
from ldm.system.checkpoints import require_checkpoint
from ldm.system.files import new_folder, written_whole
from ldm.system.ranks import Run

FORMATS = ("safetensors", "torchscript", "bundle")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its numbers checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-c", "--config-file", required=True, help="what was trained: JSON")
    add("-e", "--environment-file", required=True, help="where things are: JSON")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    add("--out", required=True, metavar="DIR", help="a folder that is new or empty")
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="default: all")
    utils.add_networks(parser)
    add("--metrics", type=Path, default=None, metavar="FILE", help="figures for the card: evaluate.py's JSON")
    add("--authors", default="not stated", metavar="TEXT", help="who trained the model, for card and bundle")
    args = parser.parse_args(argv)
    utils.check_scale_factor(args.scale_factor)
    return args


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration
    args = parse_arguments(argv)
    config = utils.load_config(args.config_file, args.set)
    if config["with_labels"] == configs.ONLY:
        raise UserError("with_labels: models of label maps alone are not exported; use inference.py.")
    environment = utils.load_environment(args.environment_file)
    if "bundle" in args.formats:
        bundle.check_definitions(config)

    # Step 1: networks, and what is known of them
    paths = {
        "autoencoder": args.autoencoder or environment["model_dir"] / "autoencoder.pt",
        "diffusion_unet": args.unet or environment["model_dir"] / "diffusion_unet.pt",
    }
    for path, role in zip(paths.values(), CHECKPOINTS, strict=True):
        require_checkpoint(path, role)
    origin = {name: model_card.history(path, name) for name, path in paths.items()}
    digests = [one["sha256"] for one in origin.values()]
    metrics = model_card.read_metrics(args.metrics, *digests) if args.metrics else None
    run = Run(0, 1, torch.device("cpu"), None)
    networks = generation.load_networks(
        *paths.values(), config, args.config_file, args.scale_factor, False, None, run, ()
    )
    folders = environment["data_base_dir"]
    folders = folders if isinstance(folders, list) else [folders]
    about = {
        "description": model_card.describe(networks, config),
        "authors": args.authors,
        "data_source": ", ".join(Path(os.path.abspath(folder)).name for folder in folders),
        "channels": [f"channel {channel} of the source images" for channel in configs.channels_of(config)],
    }

    # Step 2: write into a temporary folder beside DIR, then rename it
    out = new_folder(args.out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        if "safetensors" in args.formats:
            formats.write_safetensors(folder / "safetensors", networks, config, origin)
        takes = None
        if "torchscript" in args.formats:
            takes = formats.write_torchscript(folder / "torchscript", networks, config)
        card = model_card.model_card(out.name, networks, config, origin, about, metrics, args.formats, takes)
        if "bundle" in args.formats:
            figures = metrics["figures"] if metrics else []
            bundle.write_bundle(folder / "bundle", networks, config, card, about, figures)
        with written_whole(folder / "MODEL_CARD.md") as file:
            file.write(card.encode())
        formats.write_checksums(folder)
        folder.rename(out)
    print(f"exported {', '.join(args.formats)}: {out}\n  {out / 'MODEL_CARD.md'}")


if __name__ == "__main__":
    main()
