"""What would this scan look like under another condition? A counterfactual of a real scan.

    python edit_scan.py -c CONFIG -e ENV --scan sub-01_T1w.nii.gz --of age=31 sex=f --condition age=70
    python edit_scan.py -c CONFIG -e ENV --scan sub-01_T1w.nii.gz --of age=31 sex=f --condition age=70 \\
        --guidance 2 --out edited

The model must have been trained with `conditions` (docs/conditions.md). The scan is brought to the model's
grid and encoded; the sampler's steps are run backwards under its own condition, `--of`, to the noise that it
would be a sample of. From this noise it is drawn again, once under its own condition, and once under
`--condition`, which changes only what it names. How far the first is from the scan is the error of the
method; it is printed beside that of the autoencoder. A change that is not far above it means nothing.

Written to `--out` (default: output_dir/edited): NAME_scan.nii.gz, on the model's grid; NAME_again.nii.gz,
drawn under its own condition; NAME_edited.nii.gz; and NAME.png, the three, and the change between the last
two. Nothing is overwritten. They show what the model has learned from other people, and are no prognosis.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

import utils
from ldm import UserError, figures, generation
from ldm.diffusion.conditioning import REGION_NAME, texts_of
from ldm.diffusion.inversion import invert, inverting_sampler
from ldm.diffusion.samplers import SAMPLERS
from ldm.editing import free_names, read_scan, save_scan
from ldm.export import records
from ldm.metrics import reconstruction_metrics
from ldm.models.slicewise import within
from ldm.system.messages import progress_bar

CHANGE = 4  # times the change that the picture shows, about a middle grey


@utils.command
@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: configuration, device and networks
    parser = utils.script_parser(__doc__)
    add = parser.add_argument
    add(
        "--scan",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help="of one subject; channels in order",
    )
    add("--of", nargs="+", required=True, metavar="COLUMN=VALUE", help="the scan's own condition")
    add(
        "--condition", nargs="+", required=True, metavar="COLUMN=VALUE", help="what to change, such as age=70"
    )
    add("--guidance", type=float, default=1.0, help="strength of the new condition; default: 1, none")
    add("--steps", type=int, default=None, help="sampling steps; default: 25 of Heun, 250 of DDIM")
    utils.add_networks(parser)
    add("--out", type=Path, default=None, metavar="DIR", help="default: output_dir/edited")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: expected at least 1.")
    if not 0 <= args.guidance <= records.MOST_GUIDANCE:
        raise UserError(f"--guidance {args.guidance}: expected a number from 0 to {records.MOST_GUIDANCE}.")
    utils.check_scale_factor(args.scale_factor)
    utils.find_files(scan=args.scan)
    config = utils.load_config(args.config_file, args.set)
    config["diffusion_train"]["autoguidance"] = 1.0  # of samples; here it would move the scan
    environment = utils.load_environment(args.environment_file, writable=("output_dir",))
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("edit_scan.py runs in one process: start it without torchrun.")
    model_dir, compiled = environment["model_dir"], bool(args.compile)
    paths = (args.autoencoder or model_dir / "autoencoder.pt", args.unet or model_dir / "diffusion_unet.pt")
    networks = generation.load_networks(
        *paths, config, args.config_file, args.scale_factor, compiled, None, run, args.set
    )
    if networks.labels:
        raise UserError("with_labels: edit_scan.py edits images without labels; train a model without them.")
    conditions, process, geometry = networks.conditions, networks.process, networks.geometry
    own = conditions.parse(args.of)
    if conditions.regions is not None and REGION_NAME not in own:
        raise UserError(f"--of: say the region of the scan, such as {REGION_NAME}=chest:abdomen.")
    new = own | conditions.parse(args.condition)
    if any(isinstance(value, tuple) for value in new.values()):
        raise UserError("--of, --condition: expected one value of each column, no range.")
    name = args.scan[0].name.partition(".")[0]
    folder = args.out or environment["output_dir"] / "edited"
    files = {kind: folder / f"{name}_{kind}.nii.gz" for kind in ("scan", "again", "edited")}
    free_names([*files.values(), folder / f"{name}.png"])

    # Step 1: the scan, its latents
    scan, limits = read_scan(args.scan, config, networks)
    scan = scan.to(run.device)
    with run.autocast():
        latents = networks.autoencoder.encode(scan)[0] * networks.scale_factor

    # Step 2: back to noise under its own condition, and forth under both
    sampler = inverting_sampler(process)
    steps = args.steps or SAMPLERS[sampler].steps
    times = process.sampling_times(steps, SAMPLERS[sampler].even)

    def model(condition: dict, guidance: float = 1.0):
        return conditions.guided_model(networks.unet, [condition], guidance, run.device)

    def bar(what: str):
        return lambda pairs: progress_bar(run, what, items=pairs)

    with run.autocast():
        noise = invert(model(own), process, latents, times, bar("back to noise"))
        drawn = {
            kind: SAMPLERS[sampler].solve(model(*condition), process, noise, times, None, bar(kind))
            for kind, condition in (("again", (own,)), ("edited", (new, args.guidance)))
        }
        volumes = {
            kind: within(networks.autoencoder.decode(z / networks.scale_factor), geometry).cpu()
            for kind, z in drawn.items()
        }
        alone = networks.autoencoder.reconstruct(scan).cpu()

    # Step 3: files, a picture, and how large the change is beside the error
    scan = scan.cpu()
    volumes = {"scan": scan, **volumes}
    if bad := [kind for kind, volume in volumes.items() if not volume.isfinite().all()]:
        raise FloatingPointError(f"the volume '{bad[0]}' is not finite. Try more --steps.")
    for kind, path in files.items():
        save_scan(path, volumes[kind][0], limits, networks)
    difference = (0.5 + CHANGE * (volumes["edited"] - volumes["again"])).clamp(0, 1)
    rows = {kind: [volume[0, 0]] for kind, volume in {**volumes, f"change x {CHANGE}": difference}.items()}
    title = f"{', '.join(f'{key} {value}' for key, value in texts_of(own).items())}; edited: " + ", ".join(
        f"{key} {value}" for key, value in texts_of(new).items()
    )
    figures.montage(rows, folder / f"{name}.png", title, spacing=geometry["spacing"])

    def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(reconstruction_metrics(one.clamp(0, 1), other.clamp(0, 1))["psnr"])

    print_lines = [
        f"autoencoder alone: PSNR {psnr(alone, scan):.2f} dB to the scan",
        f"drawn again under its own condition: {psnr(volumes['again'], scan):.2f} dB to the scan, "
        f"{psnr(volumes['again'], alone):.2f} dB to the autoencoder's",
        f"edited: {psnr(volumes['edited'], volumes['again']):.2f} dB to the one drawn again",
    ]
    run.print("\n".join([*print_lines, f"  {files['edited']}", f"  {folder / f'{name}.png'}"]))


if __name__ == "__main__":
    main()
