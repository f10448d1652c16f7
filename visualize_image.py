"""Look at volumes: slices, three planes, a GIF through one, a mask over it, two compared, one being denoised.

    python visualize_image.py slices scan.nii.gz --out slices.png --plane axial --count 12
    python visualize_image.py planes scan.nii.gz outputs/ --out planes.png --columns 3
    python visualize_image.py gif scan.nii.gz --out through.gif --plane coronal
    python visualize_image.py overlay scan.nii.gz --mask labels.nii.gz --out overlay.png
    python visualize_image.py compare scan.nii.gz reconstruction.nii.gz --out compare.png --at 10 -20 15
    python visualize_image.py denoise -c CONFIG -e ENV --seed 3 --out denoising.gif

Reads NIfTI and MGH volumes, 3D, or one volume of 4D (`--channel`), in any orientation. Slices are those of
the file that lie nearest to the plane that is named, with the subject's right on the left and letters at
their edges; voxels have their true proportions. Positions are in mm: R or L, A or P, S or I of the origin of
the file. Grey values run from percentile 0.5 to 99.5 of the voxels (where these are one, from the least to
the greatest), or over `--window LOW HIGH` in the units of the file. NaN is shown black, a constant volume
grey. `slices` and `gif` leave out slices at the ends that are all black.

    overlay   The slices with the most labelled voxels, without and with the mask. A mask on another grid is
              resampled, to the nearest voxel, by the positions in both headers. Up to ten labels have
              colours, those with the most pixels in the picture.
    compare   Both in the grey values of the first, and the second less the first in the units of the file:
              blue where it is darker, orange where it is brighter. On one grid PSNR, SSIM and L1 are told,
              over all voxels, with the first's grey values as 0 to 1 and nothing clipped. On another grid the
              second is resampled by the positions in both headers.
    denoise   What the model takes the clean volume for, step by step, decoded, after the noise it starts
              from. The last frame is the volume that `inference.py` writes with the same options.

Nothing is overwritten without `--force`. Exit codes: 0 done, 1 the disk or the memory failed, 2 wrong usage.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to
from PIL import Image
from scipy.ndimage import gaussian_filter

import utils
from ldm import UserError, figures, generation
from ldm.data.intensity import to_unit_range
from ldm.data.reading import channel_count, ras_geometry, read_image, voxels_of
from ldm.diffusion.samplers import SAMPLERS, choose_sampler
from ldm.export import records
from ldm.figures import PALETTE, PLANES
from ldm.metrics import reconstruction_metrics
from ldm.system.messages import progress_bar

PERCENTILES = (0.5, 99.5)  # of the voxels, that are black and white
SUFFIXES = (".nii", ".nii.gz", ".mgh", ".mgz")
OPACITY = 0.5  # of a mask
DIRECTIONS = ("LR", "PA", "IS")  # towards less and more along the axes of a volume


# ---------------------------------------------------------------- command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its numbers and `--out` checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(make, about: str, suffix: str, **more) -> argparse.ArgumentParser:
        sub = commands.add_parser(make.__name__, help=about, description=about, **more)
        sub.set_defaults(make=make, suffix=suffix)
        sub.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"{suffix} to write")
        sub.add_argument("--force", action="store_true", help="write over it where it is there")
        sub.add_argument("--pixels", type=int, default=320, help="of the longest side (default: 320)")
        sub.add_argument("--channel", type=int, default=0, help="of a 4D image, from 0 (default: 0)")
        if make is not denoise:
            sub.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="black and white")
        return sub

    at = {"type": float, "nargs": 3, "metavar": "MM", "help": "show the slices through this position, R A S"}
    sub = command(slices, "slices of one plane", ".png")
    sub.add_argument("image", type=Path)
    sub.add_argument("--plane", choices=PLANES, default="axial", help="default: axial")
    sub.add_argument("--count", type=int, default=12, help="evenly spaced slices (default: 12)")
    sub = command(planes, "three planes of one volume or of many", ".png")
    sub.add_argument("images", type=Path, nargs="+", metavar="image", help="volumes, and folders of them")
    sub.add_argument("--columns", type=int, default=2, help="volumes beside each other (default: 2)")
    sub.add_argument("--at", **at)
    sub = command(gif, "a GIF through a volume", ".gif")
    sub.add_argument("image", type=Path)
    sub.add_argument("--plane", choices=PLANES, default="axial", help="default: axial")
    sub.add_argument("--count", type=int, help="evenly spaced slices (default: all)")
    sub = command(overlay, "a mask over a volume", ".png")
    sub.add_argument("image", type=Path)
    sub.add_argument("--mask", type=Path, required=True, metavar="FILE", help="labels: whole numbers, 0 none")
    sub.add_argument("--at", **at)
    sub = command(compare, "two volumes and their difference", ".png")
    sub.add_argument("image", type=Path)
    sub.add_argument("other", type=Path)
    sub.add_argument("--at", **at)
    # Resolved, since both parsers bring -h.
    shared = {"parents": [utils.script_parser("")], "conflict_handler": "resolve"}
    sub = command(denoise, "the denoising of one sample as a GIF", ".gif", **shared)
    sub.add_argument("--seed", type=int, default=0, help="of the sample")
    sub.add_argument("--frames", type=int, default=16, help="at most so many (default: 16)")
    sub.add_argument("--steps", type=int, help="sampling steps; default: as inference.py")
    sub.add_argument("--sampler", help="default: as inference.py")
    sub.add_argument("--autoencoder", type=Path, help="default: model_dir/autoencoder.pt")
    sub.add_argument("--unet", type=Path, help="default: model_dir/diffusion_unet.pt")
    sub.add_argument("--scale-factor", type=float, help="for weights that do not bring theirs")
    utils.add_max_memory(sub, "decode")
    args = parser.parse_args(argv)

    for name, least, most in (
        ("pixels", 16, 4096),
        ("channel", 0, 10**6),
        ("count", 1, 10**6),
        ("columns", 1, 100),
        ("frames", 2, 1000),
        ("steps", 1, records.MOST_STEPS),
        ("seed", 0, records.LAST_SEED - 1),
    ):
        if (value := getattr(args, name, None)) is not None and not least <= value <= most:
            raise UserError(f"--{name} {value}: expected a number from {least} to {most}.")
    window, at = getattr(args, "window", None), getattr(args, "at", None)
    if window and not (np.isfinite(window).all() and window[0] < window[1]):
        raise UserError(f"--window {window[0]:g} {window[1]:g}: expected two numbers, the lower one first.")
    if at and not np.isfinite(at).all():
        raise UserError("--at: expected three numbers in mm, towards right, anterior and superior.")
    if args.out.suffix.lower() != args.suffix:
        raise UserError(f"--out {args.out}: `{args.command}` writes a {args.suffix}. Name one.")
    if args.out.exists() and not args.force:
        raise UserError(f"--out {args.out}: is there already. Name another file, or give --force.")
    return args


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.make(args)
    print(args.out)


# ---------------------------------------------------------------- volumes


def read(path: Path, channel: int) -> nib.Nifti1Image:
    """One channel of a file, its axes nearest to right, anterior and superior: (D, H, W) float32.

    Raises:
        UserError: it cannot be read, or no voxel is a number.
    """
    image = read_image(path)
    voxels = voxels_of(path, image, channel if len(image.shape) > 3 else 0)
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad == voxels.size:
        raise UserError(f"{path}: all its voxels are NaN or infinite; there is nothing to show.")
    if bad:
        print(f"{path}: {bad} of {voxels.size} voxels are NaN or infinite")
    return nib.as_closest_canonical(nib.Nifti1Image(voxels, image.affine))


def voxels_in(image: nib.Nifti1Image) -> np.ndarray:
    """As they were read, (D, H, W) float32."""
    return np.asarray(image.dataobj)


def spacing_of(image: nib.Nifti1Image) -> np.ndarray:
    """Voxel size in mm along right, anterior, superior."""
    return nib.affines.voxel_sizes(image.affine)


def window_of(voxels: np.ndarray, asked: Sequence[float] | None) -> tuple[float, float]:
    """The values that are black and white."""
    if asked:
        return tuple(asked)
    finite = voxels[np.isfinite(voxels)]
    low, high = np.percentile(finite, PERCENTILES)
    return (float(low), float(high)) if low < high else (float(finite.min()), float(finite.max()))


def shade(voxels: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Grey values in [0, 1], float32: NaN is black, a constant volume half grey."""
    low, high = window
    with np.errstate(invalid="ignore"):
        grey = (voxels - low) / (high - low) if low < high else voxels * 0 + 0.5
    return np.nan_to_num(np.clip(grey, 0, 1), nan=0.0).astype(np.float32)


def about(image: nib.Nifti1Image, window: Sequence[float]) -> str:
    """Size, voxels and grey values of a volume in a line."""
    sides = " x ".join(f"{mm:.3g}" for mm in spacing_of(image))
    low, high = window
    greys = f"grey values {low:.4g} to {high:.4g}" if low < high else f"constant: {low:.4g}"
    return f"{' x '.join(map(str, image.shape))} voxels of {sides} mm, {greys}"


def position(image: nib.Nifti1Image, axis: int, index: int) -> str:
    """Where the centre of a slice lies, in mm, as scanners tell it: `S 12.0`."""
    voxel = (np.array(image.shape) - 1) / 2
    voxel[axis] = index
    mm = round(float(nib.affines.apply_affine(image.affine, voxel)[axis]), 1)
    return f"{DIRECTIONS[axis][mm >= 0]} {abs(mm):.1f}"


def positions(image: nib.Nifti1Image, at: Sequence[int]) -> list[str]:
    return [position(image, axis, index) for axis, index in enumerate(at)]


def voxel_at(path: Path, image: nib.Nifti1Image, at: Sequence[float] | None) -> Sequence[int]:
    """The voxel at a position in mm, or the one that the middle slices share.

    Raises:
        UserError: the position is outside.
    """
    if at is None:
        return figures.middle(image.shape)
    voxel = np.rint(nib.affines.apply_affine(np.linalg.inv(image.affine), at)).astype(int)
    if (voxel < 0).any() or (voxel >= image.shape).any():
        raise UserError(f"{path}: --at {_mm(at)} lies outside of it; it covers {covers(image)}.")
    return voxel


def covers(image: nib.Nifti1Image) -> str:
    """The box around a volume, in mm: `R -90 to 90, A -126 to 90, S -72 to 108`."""
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in image.shape])).reshape(3, -1).T
    corners = nib.affines.apply_affine(image.affine, corners)
    spans = zip("RAS", corners.min(0), corners.max(0), strict=True)
    return ", ".join(f"{letter} {low:.0f} to {high:.0f}" for letter, low, high in spans)


def _mm(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def on_one_grid(a: nib.Nifti1Image, b: nib.Nifti1Image) -> bool:
    """Whether voxels lie at the same positions, to a hundredth of the smallest side of one."""
    return a.shape == b.shape and np.allclose(a.affine, b.affine, rtol=0, atol=0.01 * spacing_of(a).min())


def resampled(path: Path, image: nib.Nifti1Image, onto: nib.Nifti1Image, nearest: bool) -> np.ndarray:
    """The voxels of an image at the positions of those of another; NaN where it has none.

    Raises:
        UserError: it has none anywhere.
    """
    values = voxels_in(image)
    if not nearest:  # as for training: interpolation alone would alias what it skips
        values = gaussian_filter(values, np.maximum(0, (spacing_of(onto) / spacing_of(image) - 1) / 2))

    def laid(values: np.ndarray, **how) -> np.ndarray:
        there = resample_from_to(nib.Nifti1Image(values, image.affine), (onto.shape, onto.affine), **how)
        return voxels_in(there)

    inside = laid(np.ones(image.shape, np.uint8), order=0, mode="grid-constant", cval=0) > 0
    if not inside.any():
        raise UserError(
            f"{path}: lies elsewhere: it covers {covers(image)} mm, the scan {covers(onto)} mm. Is it of the "
            "same subject, and its header right?"
        )
    print(f"{path}: on another grid, so resampled by its header; it covers {inside.mean():.0%} of the scan")
    # The outer half of its outer voxels has their values.
    return np.where(inside, laid(values, order=0 if nearest else 1, mode="nearest"), np.nan)


def names_of(*paths: Path) -> list[str]:
    """Names of files, with their folders where the names are one."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    return ["/".join(path.resolve().parts[-2:]) for path in paths]


def mm_per_pixel(args: argparse.Namespace, *images: Path) -> float:
    """So that the longest side of all is `--pixels` long."""
    return max(np.max(np.multiply(*ras_geometry(path))) for path in images) / args.pixels


def spread(first: int, last: int, count: int | None) -> list[int]:
    """Whole numbers from first to last: all, or so many of them, evenly."""
    everything = last - first + 1
    if count is None or count >= everything:
        return list(range(first, last + 1))
    middles = (np.arange(count) + 0.5) * everything / count
    return [first + int(place) for place in middles]


def shown_slices(grey: np.ndarray, axis: int, count: int | None) -> list[int]:
    """Indices of slices from the first to the last that is not all black."""
    lit = np.flatnonzero(grey.any(axis=tuple({0, 1, 2} - {axis})))
    return spread(lit[0], lit[-1], count) if lit.size else spread(0, grey.shape[axis] - 1, count)


# ---------------------------------------------------------------- the pictures


def slices(args: argparse.Namespace) -> None:
    """Slices of one plane, from left, posterior or inferior on."""
    made, note, pixel = panels_of_one_plane(args)
    picture = figures.grid(made, math.ceil(math.sqrt(len(made) * 4 / 3)))
    figures.save(figures.titled(picture, args.image.name, note, pixel), args.out)


def gif(args: argparse.Namespace) -> None:
    """The same, a frame each."""
    made, note, pixel = panels_of_one_plane(args)
    write_gif([figures.titled(one, args.image.name, note, pixel) for one in made], args.out, 0.1)


def panels_of_one_plane(args: argparse.Namespace) -> tuple[list[Image.Image], str, float]:
    """Slices of `--plane`, a line about the volume, and the size of a pixel in mm."""
    image = read(args.image, args.channel)
    window, axis = window_of(voxels_in(image), args.window), PLANES.index(args.plane)
    grey, mm = shade(voxels_in(image), window), figures.pixels_of(spacing_of(image), args.plane)
    pixel = mm_per_pixel(args, args.image)
    made = []
    for index in shown_slices(grey, axis, args.count):
        picture = figures.scaled(figures.upright(grey, args.plane, index), mm, pixel)
        made.append(figures.panel(picture, args.plane, position(image, axis, index)))
    return made, about(image, window), pixel


def planes(args: argparse.Namespace) -> None:
    """Three planes of each volume."""
    paths = [path for given in args.images for path in (volumes_in(given) if given.is_dir() else [given])]
    pixel = mm_per_pixel(args, *paths)
    made = []
    for path, name in zip(paths, names_of(*paths), strict=True):
        image = read(path, args.channel)
        window = window_of(voxels_in(image), args.window)
        at = voxel_at(path, image, args.at)
        pictures = figures.cut(shade(voxels_in(image), window), spacing_of(image), pixel, at)
        one = figures.three_panels(pictures, positions(image, at))
        made.append(figures.titled(one, name, about(image, window)))
    figures.save(figures.titled(figures.grid(made, args.columns), "", "", pixel), args.out)


def volumes_in(folder: Path) -> list[Path]:
    """The volumes right below a folder, by name.

    Raises:
        UserError: there is none.
    """
    found = [p for p in sorted(folder.iterdir()) if p.name.lower().endswith(SUFFIXES) and p.name[0] != "."]
    if not found:
        raise UserError(f"{folder}: holds no volumes ({', '.join(SUFFIXES)}). Name files, or another folder.")
    return found


def overlay(args: argparse.Namespace) -> None:
    """Three planes without and with the mask."""
    image, mask = read(args.image, args.channel), read_mask(args.mask)
    if on_one_grid(image, mask):
        labels = voxels_in(mask)
    else:
        labels = np.nan_to_num(resampled(args.mask, mask, image, nearest=True))
    if not labels.any():
        print(f"{args.mask}: no voxel within the scan has a label")
    window, pixel = window_of(voxels_in(image), args.window), mm_per_pixel(args, args.image)
    if args.at or not labels.any():
        at = voxel_at(args.image, image, args.at)
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


def read_mask(path: Path) -> nib.Nifti1Image:
    """Labels, as `read`.

    Raises:
        UserError: 4D, or values that are no whole numbers from 0 on.
    """
    if (count := channel_count(read_image(path))) > 1:
        raise UserError(f"{path}: holds {count} volumes; expected one volume of labels.")
    mask = read(path, 0)
    voxels = voxels_in(mask)
    if not np.isfinite(voxels).all() or voxels.min() < 0 or (voxels != np.rint(voxels)).any():
        raise UserError(
            f"{path}: is no mask: labels are whole numbers from 0 on. Was it resampled, or scaled?"
        )
    return mask


def colours_of(masks: Sequence[np.ndarray]) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Colours of the labels in some slices, and the entries of a legend.

    Labels from 1 to the number of colours have colours of their own, so that pictures agree. Where there are
    others, those with the most pixels have colours in the order of their values.
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
    """Three planes of the first, of the second, and of the second less the first."""
    first, second = read(args.image, args.channel), read(args.other, args.channel)
    a, b = voxels_in(first), voxels_in(second)
    told = ""
    window = window_of(a, args.window)
    if on_one_grid(first, second):
        told = scores(a, b, window)
    else:
        b, told = resampled(args.other, second, first, nearest=False), "resampled, "
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise UserError(f"{args.other}: has no number at any voxel where {args.image} has one.")
    difference = np.where(both, b - a, np.nan)
    largest = float(np.nanmax(np.abs(difference)))
    limit = float(np.nanpercentile(np.abs(difference), 99.5)) or largest or 1.0
    told = f"{told}largest difference {largest:.4g}" if largest else f"{told}no voxel differs"
    print(told)

    pixel, at = mm_per_pixel(args, args.image), voxel_at(args.image, first, args.at)
    spacing, captions = spacing_of(first), positions(first, at)
    names = names_of(args.image, args.other)
    rows = []
    for name, one in zip(names, (a, b), strict=True):
        pictures = figures.cut(shade(one, window), spacing, pixel, at)
        rows.append(figures.named(name, figures.three_panels(pictures, captions)))
    apart = figures.cut(np.nan_to_num(difference), spacing, pixel, at)
    colours = figures.three_panels([figures.diverging(one, limit) for one in apart], captions)
    bar = figures.colour_bar(limit, colours.height)
    rows.append(figures.named(f"{names[1]} less {names[0]}", figures.beside([colours, bar])))
    picture = figures.titled(figures.below(rows), told, about(first, window), pixel)
    figures.save(picture, args.out)


def scores(a: np.ndarray, b: np.ndarray, window: Sequence[float]) -> str:
    """PSNR, SSIM and L1 of two volumes (D, H, W) with `window` as 0 to 1; nothing where that cannot be."""
    if not window[0] < window[1] or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ""
    limits = np.array([window])
    pair = [torch.from_numpy(to_unit_range(one[None], limits, clip=False))[None] for one in (b, a)]
    found = {name: float(value) for name, value in reconstruction_metrics(*pair).items()}
    return f"PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}, L1 {found['l1']:.5f}, "


# ---------------------------------------------------------------- denoising


@torch.inference_mode()
def denoise(args: argparse.Namespace) -> None:
    """Draw a sample as inference.py does, and decode what the model takes it for on the way."""
    # Step 0: configuration, device and networks
    utils.check_scale_factor(args.scale_factor)
    config = utils.load_config(args.config_file, args.set)
    environment = utils.load_environment(args.environment_file)
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("`denoise` draws one sample: start it without torchrun.")
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
    if args.channel >= (count := len(networks.geometry["limits"])):
        raise UserError(f"--channel {args.channel}: the model makes {count} channel(s), from 0 on.")
    sampler = choose_sampler(args.sampler, networks.process)
    steps = args.steps or SAMPLERS[sampler].steps or networks.process.num_train_timesteps

    # Step 1: draw, and keep the noise and the estimates of some steps
    times = networks.process.sampling_times(steps, SAMPLERS[sampler].even)[:-1]
    kept = sorted({round(place) for place in np.linspace(0, steps - 1, args.frames - 1)})
    watched, latents = watching(networks, times[kept])
    volume = generation.draw(
        replace(networks, unet=watched),
        [args.seed],
        sampler,
        steps,
        run,
        lambda pairs: progress_bar(run, f"sample ({steps} steps)", items=pairs),
    )[0]

    # Step 2: decode all but the last, which is the volume itself
    levels = networks.process.levels(times)[1].tolist()
    notes = ["noise", *(f"step {i + 1} of {steps}, at noise level {levels[i]:.3f}" for i in kept)]
    volumes = []
    for i in progress_bar(run, "decode", items=range(len(kept)), unit="frame"):
        with run.autocast():
            volumes.append(
                networks.autoencoder.decode(latents[i].to(run.device) / networks.scale_factor).cpu()[0]
            )

    # Step 3: a frame each
    spacing, window = networks.geometry["spacing"], networks.geometry["limits"][args.channel]
    pixel, frames = max(np.multiply(volume.shape[1:], spacing)) / args.pixels, []
    for one, note in zip([*volumes, volume], notes, strict=True):
        grey = shade(generation.in_typical_units(one, networks, args.seed)[args.channel], window)
        picture = figures.three_panels(figures.cut(grey, spacing, pixel))
        frames.append(figures.titled(picture, f"seed {args.seed}", note, pixel))
    write_gif(frames, args.out, 0.25)


def watching(networks: generation.Networks, times: torch.Tensor) -> tuple[Callable, dict[int, torch.Tensor]]:
    """The UNet, and what is kept of its calls by a sampler: first (0) the noise that it begins with, then
    (1 ...) what it takes the clean latents for at each of `times`. Where a solver asks it twice at a time,
    the second answer stays."""
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


def write_gif(frames: Sequence[Image.Image], path: Path, seconds: float) -> None:
    """Grey images of one size, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        part = Path(folder) / "frames.gif"
        figures.animate([np.asarray(one.convert("L")) / 255 for one in frames], part, seconds)
        os.replace(part, path)


if __name__ == "__main__":
    main()
