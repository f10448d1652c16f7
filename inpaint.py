"""Redraw a region of a scan: a lesion taken out, or a tumour put in. The rest of the scan stays as it is.

    python inpaint.py -c CONFIG -e ENV --scan sub-01_T1w.nii.gz --region lesion.nii.gz
    python inpaint.py -c CONFIG -e ENV --scan sub-01_T1w.nii.gz --region region.nii.gz --mask tumour.nii.gz \\
        --num 4 --seed 10

The region, where a file is above 0, should be a little larger than what is to go. Any 3D diffusion model of
images draws it, from what it learned and from the rest of the scan; `--condition` asks for a class or a
covariate, and what it leaves open is drawn as in inference.py. With a ControlNet (train_controlnet.py)
`--mask` says what to draw: a label of the whole volume as it should become, without the lesion or with the
tumour. Both lie on the grid of the scan.

The latents outside the region are held to those of the scan at each step, and each but the last is made
`--resamples` times, so that inside and outside come to fit (RePaint; Lugmayr et al., 2022). Within `--border`
mm inside the region the drawn image goes over into the scan; outside the region each voxel is that of the
scan.

Written to `--out` (default: output_dir/inpainted): NAME_scan.nii.gz, on the model's grid; NAME_seed-0.nii.gz
and so on; and NAME.png. Nothing is overwritten. With `--mask`, structures are checked as inference.py does;
what does not pass after `--tries` draws is written to `--out`/failed. What is drawn is what the model has
learned from other people: it does not show what lies behind a lesion.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

import utils
from ldm import UserError, figures, generation
from ldm.data.datasets import stream
from ldm.data.labels import sizes_in_file
from ldm.data.preprocessing import Preprocessing, crop_or_pad
from ldm.data.reading import check_grid, read_image
from ldm.diffusion.inpainting import inpaint, region_of_latents
from ldm.editing import free_names, read_scan, save_scan, seamless
from ldm.export import records
from ldm.metrics import reconstruction_metrics
from ldm.quality import Check, draw_until_fit
from ldm.system.messages import progress_bar

STEPS = 50


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
    add("--region", type=Path, required=True, metavar="FILE", help="redrawn where it is above 0")
    add("--mask", type=Path, metavar="FILE", help="the label that the volume should have, for a ControlNet")
    add("--condition", action="extend", nargs="+", default=[], metavar="COLUMN=VALUE", help="such as age=60")
    add("--guidance", type=float, default=1.0, help="strength of the condition; default: 1, none")
    add("-n", "--num", type=int, default=1, help="how many; default: 1")
    add("--seed", type=int, default=0, help="of the first; the others count on from it")
    add("--steps", type=int, default=STEPS, help=f"sampling steps; default: {STEPS}")
    add("--resamples", type=int, default=4, help="times that each step is made; default: 4")
    add("--border", type=float, default=None, metavar="MM", help="default: the longest side of a voxel")
    add("--tries", type=int, default=3, help="draws of one whose --mask does not fit; 0: no check")
    utils.add_networks(parser)
    add("--controlnet", type=Path, default=None, help="default: model_dir/controlnet.pt, with --mask")
    add("--out", type=Path, default=None, metavar="DIR", help="default: output_dir/inpainted")
    args = parser.parse_args(argv)
    for name in ("num", "steps", "resamples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1.")
    for name in ("seed", "tries", "border"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: expected 0 or more.")
    if not 0 <= args.guidance <= records.MOST_GUIDANCE:
        raise UserError(f"--guidance {args.guidance}: expected a number from 0 to {records.MOST_GUIDANCE}.")
    if args.guidance != 1 and not args.condition:
        raise UserError("--guidance: strengthens a condition. Give one by --condition, such as group=1.")
    if args.controlnet and not args.mask:
        raise UserError("--controlnet: follows a mask. Give one by --mask.")
    utils.check_scale_factor(args.scale_factor)
    utils.find_files(scan=args.scan, region=[args.region], mask=[args.mask] if args.mask else [])
    config = utils.load_config(args.config_file, args.set)
    environment = utils.load_environment(args.environment_file, writable=("output_dir",))
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("inpaint.py runs in one process: start it without torchrun.")
    model_dir, compiled = environment["model_dir"], bool(args.compile)
    paths = (args.autoencoder or model_dir / "autoencoder.pt", args.unet or model_dir / "diffusion_unet.pt")
    control = (args.controlnet or model_dir / "controlnet.pt") if args.mask else None
    networks = generation.load_networks(
        *paths, config, args.config_file, args.scale_factor, compiled, None, run, args.set, control
    )
    if networks.labels or networks.autoencoder.is_slicewise:
        raise UserError("inpaint.py is for 3D models without with_labels.")
    conditions, structures = networks.conditions, config["conditions"]["structure_sizes"]
    if conditions and not conditions.can_drop and args.guidance != 1:
        raise UserError("--guidance: this model has no input for an unknown condition. Leave it out.")
    sizes = sizes_in_file(args.mask, structures) if args.mask else {}
    condition = sizes | conditions.parse(args.condition)
    name, folder = args.scan[0].name.partition(".")[0], args.out or environment["output_dir"] / "inpainted"
    files = {seed: folder / f"{name}_seed-{seed}.nii.gz" for seed in range(args.seed, args.seed + args.num)}
    failed = {seed: folder / "failed" / path.name for seed, path in files.items()}
    own, picture = folder / f"{name}_scan.nii.gz", folder / f"{name}.png"
    free_names([own, *files.values(), *failed.values(), picture])

    # Step 1: the scan, its latents, the region, the mask
    spacing, size = networks.geometry["spacing"], networks.geometry["size"]
    image = read_image(args.scan[0])
    for path in (args.region, args.mask):
        if path:
            check_grid(path, read_image(path), args.scan[0], image)
    scan, limits = read_scan(args.scan, config, networks)
    region = torch.from_numpy(
        crop_or_pad(Preprocessing((0,), tuple(spacing)).label(args.region) > 0, size)[0]
    )
    if not region.any():
        raise UserError(f"{args.region}: has no voxel above 0 on the grid of the volumes.")
    mask = None
    if args.mask:
        mask, note = generation.read_mask(args.mask, networks)
        if note:
            run.print(f"warning: {note}")
    with run.autocast():
        latents = networks.autoencoder.encode(scan.to(run.device))[0] * networks.scale_factor
    free = region_of_latents(region, latents.shape[2:]).to(run.device)
    border = max(spacing) if args.border is None else args.border

    # Step 2: draw the region
    def draw(seed: int) -> torch.Tensor:
        chosen = conditions.for_sample(condition, stream(seed, "conditions"))
        model = networks.model([chosen], args.guidance, run, None if mask is None else [mask])

        def bar(steps: Sequence) -> Sequence:
            return progress_bar(run, f"seed {seed}", items=steps)

        with run.autocast():
            z = inpaint(model, networks.process, latents, free, seed, args.steps, args.resamples, bar)
            drawn = networks.autoencoder.decode(z / networks.scale_factor)[0].float().cpu()
        if not drawn.isfinite().all():
            raise FloatingPointError(f"the volume of seed {seed} is not finite, and is not written.")
        return seamless(drawn, scan[0], region, border, spacing)

    check = Check(networks.structures) if mask is not None and args.tries else None
    kept = []
    for seed, path in files.items():
        volume, faults = draw(seed), []
        if check:
            volume, _, faults = draw_until_fit(
                seed, volume, draw, lambda one: check.faults(one, mask.numpy()), args.tries
            )
        if faults:
            run.print(f"warning: {failed[seed]}: {faults[0]}")
        if not own.exists():
            save_scan(own, scan[0], limits, networks)
        save_scan(failed[seed] if faults else path, volume, limits, networks)
        kept += [] if faults else [volume]

    # Step 3: a picture, and how far the autoencoder alone is from the scan
    rows = {"scan": [scan[0, 0]], "region": [region.float()]}
    rows |= {f"drawn {i}": [volume[0]] for i, volume in enumerate(kept[:4])}
    figures.montage(rows, picture, f"{name}, redrawn in {args.region.name}", spacing=spacing)
    alone = networks.autoencoder.reconstruct(scan.to(run.device)).cpu().clamp(0, 1)
    psnr = float(reconstruction_metrics(alone, scan.clamp(0, 1))["psnr"])
    run.print(
        f"inpaint: {len(kept)} of {args.num} written; {region.float().mean():.1%} of the volume redrawn; "
        f"the autoencoder alone is {psnr:.1f} dB from the scan\n  {picture}"
    )


if __name__ == "__main__":
    main()
