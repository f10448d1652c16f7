"""Pictures of volumes: slices, three planes, a GIF, a mask overlay, a comparison, the denoising of a sample.

    python visualize_image.py slices scan.nii.gz --out slices.png --plane axial --count 12
    python visualize_image.py planes scan.nii.gz outputs/ --out planes.png --columns 3
    python visualize_image.py gif scan.nii.gz --out through.gif --plane coronal
    python visualize_image.py overlay scan.nii.gz --mask labels.nii.gz --out overlay.png
    python visualize_image.py compare scan.nii.gz reconstruction.nii.gz --out compare.png --at 10 -20 15
    python visualize_image.py denoise -c CONFIG -e ENV --seed 3 --out denoising.gif

Reads NIfTI and MGH volumes in any orientation, 3D or one volume of 4D (`--channel`). Slices are those of the
file nearest to the named plane, in radiological convention (the subject's right on the left) with letters at
their edges, and in true proportions. Positions are in mm: R or L, A or P, S or I of the origin of the file.
Grey values span percentiles 0.5 to 99.5 of the voxels (their full range where these are equal), or
`--window LOW HIGH` in the units of the file. NaN is black, a constant volume grey. `slices` and `gif` skip
black slices at both ends.

    overlay   The slices with the most labelled voxels, without and with the mask. A mask on another grid is
              resampled by the headers, nearest neighbour. Up to ten labels have colours, those with the most
              pixels in the picture.
    compare   Both volumes in the grey values of the first, and second minus first in the units of the file:
              blue is darker, orange brighter. On one grid it prints PSNR, SSIM and L1 over all voxels, with
              the first's grey values as 0 to 1, unclipped. On another grid the second is resampled by the
              headers.
    denoise   The starting noise and the model's decoded estimates of the clean volume at several steps. The
              last frame is the volume that inference.py writes with the same options.

Nothing is overwritten without `--force`. Exit codes: 0 done, 1 the disk or the memory failed, 2 wrong usage.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image

import utils
from ldm import UserError, figures, generation
from ldm.data.display import (
    about,
    on_one_grid,
    position,
    positions,
    read,
    read_mask,
    resampled,
    shade,
    spacing_of,
    voxel_at,
    voxels_in,
    window_of,
)
from ldm.data.intensity import to_unit_range
from ldm.data.reading import ras_geometry
from ldm.diffusion.samplers import SAMPLERS
from ldm.export import records
from ldm.figures import PALETTE, PLANES
from ldm.metrics import reconstruction_metrics
from ldm.system.messages import progress_bar

SUFFIXES = (".nii", ".nii.gz", ".mgh", ".mgz")
OPACITY = 0.5  # of a mask


# ---------------------------------------------------------------- command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(make: Callable, about: str, suffix: str = ".png", **more) -> Callable:
        sub = commands.add_parser(make.__name__, help=about, description=about, **more)
        sub.set_defaults(make=make, suffix=suffix)
        sub.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"{suffix} to write")
        sub.add_argument("--force", action="store_true", help="overwrite it")
        sub.add_argument("--pixels", type=int, default=320, help="of the longest side (default: 320)")
        sub.add_argument("--channel", type=int, default=0, help="of a 4D image, from 0 (default: 0)")
        if make is not denoise:
            sub.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="black and white")
        if make in (planes, overlay, compare):
            through = "show the slices through this position, R A S"
            sub.add_argument("--at", type=float, nargs=3, metavar="MM", help=through)
        return sub.add_argument

    for add, count in (
        (command(slices, "slices of one plane"), 12),
        (command(gif, "a GIF through a volume", ".gif"), None),
    ):
        add("image", type=Path)
        add("--plane", choices=PLANES, default="axial", help="default: axial")
        add("--count", type=int, default=count, help=f"evenly spaced slices (default: {count or 'all'})")
    add = command(planes, "three planes of one volume or of many")
    add("images", type=Path, nargs="+", metavar="image", help="volumes, and folders of them")
    add("--columns", type=int, default=2, help="volumes beside each other (default: 2)")
    add = command(overlay, "a mask over a volume")
    add("image", type=Path)
    add("--mask", type=Path, required=True, metavar="FILE", help="labels: whole numbers, 0 none")
    add = command(compare, "two volumes and their difference")
    add("image", type=Path)
    add("other", type=Path)
    denoising = utils.script_parser("")
    utils.add_max_memory(denoising, "decode")
    utils.add_networks(denoising)
    # "resolve", since both parsers define -h.
    shared = {"parents": [denoising], "conflict_handler": "resolve"}
    add = command(denoise, "the denoising of one sample as a GIF", ".gif", **shared)
    add("--seed", type=int, default=0, help="of the sample")
    add("--frames", type=int, default=16, help="maximum number (default: 16)")
    add("--steps", type=int, help="sampling steps; default: as inference.py")
    add("--sampler", help="default: as inference.py")
    args = parser.parse_args(argv)

    limits = {"pixels": (16, 4096), "channel": (0, 10**6), "count": (1, 10**6), "columns": (1, 100)}
    limits |= {"frames": (2, 1000), "steps": (1, records.MOST_STEPS), "seed": (0, records.LAST_SEED - 1)}
    for name, (least, most) in limits.items():
        if (value := getattr(args, name, None)) is not None and not least <= value <= most:
            raise UserError(f"--{name} {value}: expected a number from {least} to {most}.")
    window, at = getattr(args, "window", None), getattr(args, "at", None)
    if window and not (np.isfinite(window).all() and window[0] < window[1]):
        raise UserError(f"--window {window[0]:g} {window[1]:g}: expected two numbers, the lower one first.")
    if at and not np.isfinite(at).all():
        raise UserError("--at: expected three numbers in mm: right, anterior, superior.")
    if args.out.suffix.lower() != args.suffix:
        raise UserError(f"--out {args.out}: `{args.command}` writes a {args.suffix} file.")
    if args.out.exists() and not args.force:
        raise UserError(f"--out {args.out}: exists. Name another file, or give --force.")
    return args


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.make(args)
    print(args.out)


# ---------------------------------------------------------------- volumes


def names_of(*paths: Path) -> list[str]:
    """Names of files, with their folders where names are equal."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    return ["/".join(path.resolve().parts[-2:]) for path in paths]


def mm_per_pixel(args: argparse.Namespace, *images: Path) -> float:
    """Size of a pixel such that the longest side has `--pixels` pixels."""
    return max(np.max(np.multiply(*ras_geometry(path))) for path in images) / args.pixels


def voxel_to_show(args: argparse.Namespace, path: Path, image: nib.Nifti1Image) -> Sequence[int]:
    """The voxel at `--at`; by default that of the middle slices."""
    return voxel_at(path, image, args.at) if args.at else figures.middle(image.shape)


def shown_slices(grey: np.ndarray, axis: int, count: int | None) -> list[int]:
    """Indices of slices without the black ones at both ends: all, or `count` of them, evenly spaced."""
    lit = np.flatnonzero(grey.any(axis=tuple({0, 1, 2} - {axis})))
    first, last = (int(lit[0]), int(lit[-1])) if lit.size else (0, grey.shape[axis] - 1)
    number = last - first + 1
    count = min(count or number, number)
    return [first + int((i + 0.5) * number / count) for i in range(count)]


# ---------------------------------------------------------------- the pictures


def slices(args: argparse.Namespace) -> None:
    """Slices of one plane, starting left, posterior or inferior."""
    panels, note, pixel = panels_of_one_plane(args)
    picture = figures.grid(panels, math.ceil(math.sqrt(len(panels) * 4 / 3)))
    figures.save(figures.titled(picture, args.image.name, note, pixel), args.out)


def gif(args: argparse.Namespace) -> None:
    """The same slices, one per frame."""
    panels, note, pixel = panels_of_one_plane(args)
    frames = [figures.titled(one, args.image.name, note, pixel) for one in panels]
    figures.animate([np.asarray(one.convert("L")) / 255 for one in frames], args.out)


def panels_of_one_plane(args: argparse.Namespace) -> tuple[list[Image.Image], str, float]:
    """Slices of `--plane`, a description of the volume, and the size of a pixel in mm."""
    image = read(args.image, args.channel)
    window, axis = window_of(voxels_in(image), args.window), PLANES.index(args.plane)
    grey, mm = shade(voxels_in(image), window), figures.pixels_of(spacing_of(image), args.plane)
    pixel = mm_per_pixel(args, args.image)
    panels = []
    for index in shown_slices(grey, axis, args.count):
        picture = figures.scaled(figures.upright(grey, args.plane, index), mm, pixel)
        panels.append(figures.panel(picture, args.plane, position(image, axis, index)))
    return panels, about(image, window), pixel


def planes(args: argparse.Namespace) -> None:
    """Three planes of each volume."""
    paths = [path for given in args.images for path in (volumes_in(given) if given.is_dir() else [given])]
    pixel = mm_per_pixel(args, *paths)
    panels = []
    for path, name in zip(paths, names_of(*paths), strict=True):
        image = read(path, args.channel)
        window = window_of(voxels_in(image), args.window)
        at = voxel_to_show(args, path, image)
        pictures = figures.cut(shade(voxels_in(image), window), spacing_of(image), pixel, at)
        one = figures.three_panels(pictures, positions(image, at))
        panels.append(figures.titled(one, name, about(image, window)))
    figures.save(figures.titled(figures.grid(panels, args.columns), "", "", pixel), args.out)


def volumes_in(folder: Path) -> list[Path]:
    """The volumes directly in a folder, by name. Raises UserError: there are none."""
    found = [p for p in sorted(folder.iterdir()) if p.name.lower().endswith(SUFFIXES) and p.name[0] != "."]
    if not found:
        raise UserError(f"{folder}: holds no volumes ({', '.join(SUFFIXES)}).")
    return found


def overlay(args: argparse.Namespace) -> None:
    """Three planes without and with the mask."""
    image, mask = read(args.image, args.channel), read_mask(args.mask)
    same = on_one_grid(image, mask)
    labels = voxels_in(mask) if same else np.nan_to_num(resampled(args.mask, mask, image, nearest=True))
    if not labels.any():
        print(f"{args.mask}: no labelled voxel within the scan")
    window, pixel = window_of(voxels_in(image), args.window), mm_per_pixel(args, args.image)
    if args.at or not labels.any():
        at = voxel_to_show(args, args.image, image)
    else:
        at = [int(np.count_nonzero(labels, axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]
    spacing = spacing_of(image)
    plain = figures.cut(shade(voxels_in(image), window), spacing, pixel, at)
    masks = figures.cut(labels, spacing, pixel, at, nearest=True)
    colours, entries = colours_of(masks)
    both = [figures.tinted(*pair, colours, OPACITY) for pair in zip(plain, masks, strict=True)]
    captions = positions(image, at)
    picture = figures.below([figures.three_panels(plain, captions), figures.three_panels(both, captions)])
    if entries:
        picture = figures.below([picture, figures.legend(entries, picture.width)])
    title = " with ".join(names_of(args.image, args.mask))
    figures.save(figures.titled(picture, title, about(image, window), pixel), args.out)


def colours_of(masks: Sequence[np.ndarray]) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Colours of the labels in some slices, and the entries of a legend.

    Labels 1 to 10 have fixed colours, the same in every picture. With higher labels among them, the ten with
    the most pixels are coloured, in the order of their values.
    """
    values, counts = np.unique(np.concatenate([mask.ravel() for mask in masks]), return_counts=True)
    by_size = [int(values[i]) for i in np.argsort(-counts, kind="stable") if values[i]]
    chosen = sorted(by_size[: len(PALETTE)])
    own = all(value <= len(PALETTE) for value in by_size)
    colours = {value: PALETTE[value - 1 if own else i] for i, value in enumerate(chosen)}
    entries = [(colour, str(value)) for value, colour in colours.items()]
    if rest := len(by_size) - len(chosen):
        entries.append(("#000000", f"{rest} smaller label(s) not coloured"))
    return colours, entries


def compare(args: argparse.Namespace) -> None:
    """Three planes of the first, of the second, and of second minus first."""
    first, second = read(args.image, args.channel), read(args.other, args.channel)
    a, b = voxels_in(first), voxels_in(second)
    window = window_of(a, args.window)
    if on_one_grid(first, second):
        summary = scores(a, b, window)
    else:
        b, summary = resampled(args.other, second, first, nearest=False), "resampled, "
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise UserError(f"{args.other}: has no finite voxel where {args.image} has one.")
    difference = np.where(both, b - a, np.nan)
    largest = float(np.nanmax(np.abs(difference)))
    limit = float(np.nanpercentile(np.abs(difference), 99.5)) or largest or 1.0
    summary += f"largest difference {largest:.4g}" if largest else "no voxel differs"
    print(summary)

    pixel, at = mm_per_pixel(args, args.image), voxel_to_show(args, args.image, first)
    spacing, captions = spacing_of(first), positions(first, at)
    names = names_of(args.image, args.other)
    rows = []
    for name, one in zip(names, (a, b), strict=True):
        pictures = figures.cut(shade(one, window), spacing, pixel, at)
        rows.append(figures.named(name, figures.three_panels(pictures, captions)))
    apart = figures.cut(np.nan_to_num(difference), spacing, pixel, at)
    colours = figures.three_panels([figures.diverging(one, limit) for one in apart], captions)
    bar = figures.colour_bar(limit, colours.height)
    rows.append(figures.named(f"{names[1]} minus {names[0]}", figures.beside([colours, bar])))
    picture = figures.titled(figures.below(rows), summary, about(first, window), pixel)
    figures.save(picture, args.out)


def scores(a: np.ndarray, b: np.ndarray, window: Sequence[float]) -> str:
    """PSNR, SSIM and L1 of two volumes (D, H, W) with `window` as 0 to 1; "" where they are undefined."""
    if not window[0] < window[1] or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ""
    limits = np.array([window])
    pair = [torch.from_numpy(to_unit_range(one[None], limits, clip=False))[None] for one in (b, a)]
    found = {name: float(value) for name, value in reconstruction_metrics(*pair).items()}
    return f"PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}, L1 {found['l1']:.5f}, "


# ---------------------------------------------------------------- denoising


@torch.inference_mode()
def denoise(args: argparse.Namespace) -> None:
    """Generate a sample as inference.py does, and decode the model's estimates on the way."""
    # Step 0: configuration, device and networks
    utils.check_scale_factor(args.scale_factor)
    config = utils.load_config(args.config_file, args.set)
    environment = utils.load_environment(args.environment_file)
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("`denoise` runs in one process: start it without torchrun.")
    model_dir, compiled = environment["model_dir"], bool(args.compile)
    networks = generation.load_networks(
        args.autoencoder or model_dir / "autoencoder.pt",
        args.unet or model_dir / "diffusion_unet.pt",
        config,
        args.config_file,
        args.scale_factor,
        compiled,
        args.max_memory,
        run,
        args.set,
    )
    if networks.label_maps:
        raise UserError("`denoise` shows images; this model draws label maps alone.")
    if args.channel >= (count := len(networks.geometry["limits"])):
        raise UserError(f"--channel {args.channel}: the model makes {count} channel(s), from 0 on.")
    sampler, steps = networks.sampling(args.sampler, args.steps)

    # Step 1: sample, and keep the noise and the estimates at some steps
    times = networks.process.sampling_times(steps, SAMPLERS[sampler].even)[:-1]
    kept = sorted({round(place) for place in np.linspace(0, steps - 1, args.frames - 1)})
    watched, latents = watching(networks, times[kept])
    networks = replace(networks, unet=watched)

    def bar(pairs: Sequence) -> Iterable:
        return progress_bar(run, f"sample ({steps} steps)", items=pairs)

    volume = generation.draw(networks, [args.seed], sampler, steps, run, bar)[0]

    # Step 2: decode all but the last frame, which is the sample itself
    levels = networks.process.levels(times)[1].tolist()
    notes = ["noise", *(f"step {i + 1} of {steps}, at noise level {levels[i]:.3f}" for i in kept)]
    volumes = []
    for i in progress_bar(run, "decode", items=range(len(kept)), unit="frame"):
        with run.autocast():
            clean = networks.autoencoder.decode(latents[i].to(run.device) / networks.scale_factor)
        volumes.append(clean.cpu()[0])

    # Step 3: one frame each
    spacing, window = networks.geometry["spacing"], networks.geometry["limits"][args.channel]
    pixel, frames = max(np.multiply(volume.shape[1:], spacing)) / args.pixels, []
    for one, note in zip([*volumes, volume], notes, strict=True):
        grey = shade(generation.in_typical_units(one, networks, args.seed)[args.channel], window)
        picture = figures.three_panels(figures.cut(grey, spacing, pixel))
        titled = figures.titled(picture, f"seed {args.seed}", note, pixel)
        frames.append(np.asarray(titled.convert("L")) / 255)
    figures.animate(frames, args.out, 0.25)


def watching(networks: generation.Networks, times: torch.Tensor) -> tuple[Callable, dict[int, torch.Tensor]]:
    """The UNet, and what it records while a sampler calls it: at 0 the starting noise, at 1, 2, ... the
    estimates of the clean latents at `times`. Where a solver calls it twice at a time, the second one."""
    numbers = {float(np.float32(time)): i + 1 for i, time in enumerate(times.tolist())}
    kept = {}

    def predict(x: torch.Tensor, timesteps: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        output = networks.unet(x, timesteps=timesteps, **cond)
        if not kept:
            kept[0] = x.cpu()
        if number := numbers.get(float(timesteps[0].float())):
            kept[number] = networks.process.clean_and_noise(output.float(), x, timesteps)[0].cpu()
        return output

    return predict, kept


if __name__ == "__main__":
    main()
