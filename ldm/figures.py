"""Pictures of volumes in radiological convention, and loss curves, as PNG or GIF. No display needed.

Volumes are (D, H, W) in RAS. A slice stands upright with the subject's right (of a sagittal slice the face)
on the left, and letters at its edges. It is resampled by the voxel size to square pixels of `pixel` mm, the
same in all slices of a picture.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ldm.system.files import written_whole

PLANES = ("sagittal", "coronal", "axial")  # across axis 0, 1 and 2
EDGES = {"sagittal": "APSI", "coronal": "RLSI", "axial": "RLAP"}  # letters left, right, above, below
MARGIN, GAP = 18, 6  # pixels around a slice, for its letters, and between slices
NARROWEST, TITLE = 170, 420  # smallest width in pixels of a caption and of a title
QUARTERS = {  # of the diffusion times: key in the training log, name in the legend
    f"val_loss_quarter_{i}": name for i, name in enumerate(("least", "less", "more", "most"), 1)
}

WHITE, GREY = (255, 255, 255), (150, 150, 150)
CELL = 180  # pixels along the longest side of a volume in a montage

# Colour-blind safe: ten of the twelve colours of M. Krzywinski (mk.bcgsc.ca/colorblind).
PALETTE = ["#FFC33B", "#008DF9", "#FF5AAF", "#009F81", "#E20134"]
PALETTE += ["#00FCCF", "#8400CD", "#FF6E3A", "#FFB2FD", "#00C2F9"]

BELOW, ABOVE = (0.20, 0.62, 1.00), (1.00, 0.60, 0.10)  # blue and orange, with black in the middle


# ---------------------------------------------------------------- slices


def upright(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """A slice of (D, H, W) in radiological convention: (rows, columns)."""
    return np.rot90(volume.take(index, PLANES.index(plane)))[:, ::-1]


def middle(shape: Sequence[int]) -> tuple[int, int, int]:
    """Indices of the middle sagittal, coronal and axial slice, the sagittal one a twelfth of the width off
    the midline, where gyri are visible."""
    d, h, w = shape
    return d // 2 - d // 12, h // 2, w // 2


def pixels_of(spacing: Sequence[float], plane: str) -> tuple[float, float]:
    """Height and width in mm of a pixel of a slice."""
    width, height = (mm for name, mm in zip(PLANES, spacing, strict=True) if name != plane)
    return height, width


def scaled(one: np.ndarray, mm: Sequence[float], pixel: float, nearest: bool = False) -> np.ndarray:
    """A slice with pixels of `mm` (height, width), resampled to square pixels of `pixel` mm, cubic or
    nearest; float32."""
    rows, columns = (max(1, round(n * size / pixel)) for n, size in zip(one.shape, mm, strict=True))
    if (rows, columns) == one.shape:
        return one
    image = Image.fromarray(np.ascontiguousarray(one, np.float32))
    way = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    return np.asarray(image.resize((columns, rows), way))


def cut(
    volume: np.ndarray,
    spacing: Sequence[float],
    pixel: float,
    at: Sequence[int] | None = None,
    nearest: bool = False,
) -> list[np.ndarray]:
    """The sagittal, coronal and axial slice of (D, H, W) through voxel `at`, or the middle ones, `scaled`."""
    at = middle(volume.shape) if at is None else at
    return [
        scaled(upright(volume, plane, i), pixels_of(spacing, plane), pixel, nearest)
        for plane, i in zip(PLANES, at, strict=True)
    ]


def three_planes(volume: torch.Tensor, spacing: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """The three middle slices of (D, H, W) side by side, (rows, columns) in [0, 1], for TensorBoard: without
    letters. Pixels have the size of the smallest voxel side."""
    voxels = volume.detach().float().cpu().numpy()
    slices = [np.clip(one, 0, 1) for one in cut(voxels, spacing, min(spacing))]
    rows = max(one.shape[0] for one in slices)
    missing = [rows - one.shape[0] for one in slices]
    sides = [((n // 2, n - n // 2), (1, 1)) for n in missing]
    return np.concatenate([np.pad(*pair) for pair in zip(slices, sides, strict=True)], axis=1)


# ---------------------------------------------------------------- colours


def tinted(picture: np.ndarray, labels: np.ndarray, colours: dict[int, str], opacity: float) -> np.ndarray:
    """A grey slice in [0, 1] with its labels in colours ("#RRGGBB"): (rows, columns, 3)."""
    picture = np.repeat(np.clip(picture, 0, 1)[..., None], 3, axis=-1)
    for value, colour in colours.items():
        inside = labels == value
        picture[inside] = (1 - opacity) * picture[inside] + opacity * np.array(_rgb(colour)) / 255
    return picture


def diverging(values: np.ndarray, limit: float) -> np.ndarray:
    """Colours (..., 3) of values: -limit is blue, 0 black, limit orange."""
    share = np.clip(values / limit, -1, 1)[..., None]
    return np.where(share < 0, -share * np.array(BELOW), share * np.array(ABOVE))


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


# ---------------------------------------------------------------- pictures from slices


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def panel(picture: np.ndarray, plane: str, caption: str = "") -> Image.Image:
    """A slice, (rows, columns) or (rows, columns, 3) in [0, 1], with letters at its edges and a caption above
    its left corner."""
    pixels = np.uint8(np.clip(picture, 0, 1) * 255 + 0.5)
    inner = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    width, height = max(inner.width + 2 * MARGIN, NARROWEST), inner.height + 2 * MARGIN
    image, left, half = Image.new("RGB", (width, height)), (width - inner.width) // 2, MARGIN // 2
    image.paste(inner, (left, MARGIN))
    draw, right = ImageDraw.Draw(image), left + inner.width
    places = (
        (left - half, height // 2),
        (right + half, height // 2),
        (width // 2, half),
        (width // 2, height - half),
    )
    for letter, place in zip(EDGES[plane], places, strict=True):
        draw.text(place, letter, GREY, _font(12), anchor="mm")
    draw.text((2, MARGIN // 2), caption, WHITE, _font(12), anchor="lm")
    return image


def three_panels(pictures: Sequence[np.ndarray], captions: Sequence[str] = ("", "", "")) -> Image.Image:
    """The slices of `cut`, grey or coloured, as panels side by side."""
    return beside([panel(*about) for about in zip(pictures, PLANES, captions, strict=True)])


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Images in a row, centred vertically."""
    size = sum(one.width + GAP for one in images) - GAP, max(one.height for one in images)
    whole, left = Image.new("RGB", size), 0
    for one in images:
        whole.paste(one, (left, (whole.height - one.height) // 2))
        left += one.width + GAP
    return whole


def below(images: Sequence[Image.Image]) -> Image.Image:
    """Images in a column, aligned at the left."""
    size = max(one.width for one in images), sum(one.height + GAP for one in images) - GAP
    whole, top = Image.new("RGB", size), 0
    for one in images:
        whole.paste(one, (0, top))
        top += one.height + GAP
    return whole


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images in rows of `columns`, each centred in a cell of the size of the largest."""
    size = max(one.width for one in images), max(one.height for one in images)
    cells = []
    for one in images:
        cells.append(Image.new("RGB", size))
        cells[-1].paste(one, ((size[0] - one.width) // 2, (size[1] - one.height) // 2))
    return below([beside(cells[start : start + columns]) for start in range(0, len(cells), columns)])


def named(name: str, image: Image.Image, colour: tuple = WHITE, size: int = 13) -> Image.Image:
    """An image below its name, which is shortened in the middle if too long."""
    font, shown, most = _font(size), name, len(name)
    while font.getlength(shown) > image.width - 4 and most > 3:
        most -= 1
        shown = f"{name[: (most + 1) // 2]}\N{HORIZONTAL ELLIPSIS}{name[len(name) - most // 2 :]}"
    strip = Image.new("RGB", (image.width, size + 8))
    ImageDraw.Draw(strip).text((2, strip.height // 2), shown, colour, font, anchor="lm")
    return below([strip, image])


def titled(image: Image.Image, title: str, note: str = "", pixel: float | None = None) -> Image.Image:
    """An image with a title, a note in grey and, if `pixel` (mm) is given, a scale bar below it."""
    if title and image.width < TITLE:
        image = below([image, Image.new("RGB", (TITLE, 1))])
    if pixel:
        image = below([image, _scale_bar(image.width, pixel)])
    image = named(note, image, GREY, 12) if note else image
    return named(title, image, size=15) if title else image


def _scale_bar(width: int, pixel: float) -> Image.Image:
    steps = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
    length = max((step for step in steps if step / pixel <= min(110, width / 3)), default=steps[0])
    strip = Image.new("RGB", (width, 2 * MARGIN))
    draw, right = ImageDraw.Draw(strip), MARGIN + round(length / pixel) - 1
    draw.rectangle((MARGIN, MARGIN - 1, right, MARGIN), WHITE)
    draw.text((right + GAP, MARGIN), f"{length:g} mm", WHITE, _font(12), anchor="lm")
    return strip


def legend(entries: Sequence[tuple[str, str]], width: int) -> Image.Image:
    """A legend of colours in lines of `width` pixels."""
    font, places, left, top = _font(12), [], 0, 0
    for _, text in entries:
        size = 32 + round(font.getlength(text))
        if left and left + size > width:
            left, top = 0, top + 18
        places.append((left, top))
        left += size
    strip = Image.new("RGB", (width, top + 18))
    draw = ImageDraw.Draw(strip)
    for (left, top), (colour, text) in zip(places, entries, strict=True):
        draw.rectangle((left + 2, top + 3, left + 13, top + 14), _rgb(colour))
        draw.text((left + 18, top + 9), text, WHITE, font, anchor="lm")
    return strip


def colour_bar(limit: float, height: int) -> Image.Image:
    """The colour scale of `diverging`."""
    texts = [f"{value:+.4g}" if value else "0" for value in (limit, 0, -limit)]
    width = 16 + GAP + max(round(_font(12).getlength(text)) for text in texts) + GAP
    strip = Image.new("RGB", (width, height))
    rows = diverging(np.linspace(limit, -limit, height - 2 * MARGIN), limit)
    pixels = np.uint8(np.repeat(rows[:, None], 16, axis=1) * 255 + 0.5)
    strip.paste(Image.fromarray(pixels), (0, MARGIN))
    draw = ImageDraw.Draw(strip)
    for text, place in zip(texts, (MARGIN, height // 2, height - MARGIN), strict=True):
        draw.text((16 + GAP, place), text, WHITE, _font(12), anchor="lm")
    return strip


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG."""
    with written_whole(path) as file:
        image.save(file, "PNG")


def montage(
    rows: dict[str, Sequence[torch.Tensor]],
    path: Path,
    title: str = "",
    columns: int = 2,
    spacing: Sequence[float] = (1, 1, 1),
) -> None:
    """Draw volumes in three planes each.

    Args:
        rows: the volumes (D, H, W) in [0, 1] of each kind, such as "scan" and "reconstruction". Volumes of
            several kinds are stacked for comparison; a single kind fills a grid.
        path: the PNG to write.
        columns: volumes side by side.
        spacing: voxel size in mm along right, anterior, superior.
    """
    volumes = {kind: [one.detach().float().cpu().numpy() for one in some] for kind, some in rows.items()}
    first = next(iter(volumes.values()))
    pixel = max(np.multiply(first[0].shape, spacing)) / CELL
    lines = []
    for start in range(0, len(first), columns):
        for kind, some in volumes.items():
            line = beside([three_panels(cut(one, spacing, pixel)) for one in some[start : start + columns]])
            lines.append(named(kind, line) if len(rows) > 1 else line)
    save(titled(below(lines), title), path)


def axial_slices(
    volume: np.ndarray, path: Path, title: str, spacing: Sequence[float], most: int = 64
) -> None:
    """Draw the axial slices of (D, H, W) in [0, 1], at most so many, evenly spaced, from below to above."""
    count = volume.shape[2]
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    tiles = [_tile(volume, i, spacing) for i in chosen]
    save(titled(grid(tiles, math.ceil(len(tiles) ** 0.5)), title), path)


def slice_grid(
    rows: Sequence[tuple[str, Sequence[torch.Tensor]]],
    path: Path,
    title: str,
    spacing: Sequence[float],
) -> None:
    """Draw the middle axial slice of volumes (D, H, W) in [0, 1]: for each row its name and its volumes."""
    pixel = max(np.multiply(rows[0][1][0].shape, spacing)) / CELL
    lines = [
        named(name, beside([_tile(one.numpy(), middle(one.shape)[2], spacing, pixel) for one in volumes]))
        for name, volumes in rows
    ]
    save(titled(below(lines), title), path)


def _tile(
    volume: np.ndarray, index: int, spacing: Sequence[float], pixel: float | None = None
) -> Image.Image:
    """An axial slice of (D, H, W) in [0, 1], with pixels of `pixel` mm; None: of its voxels' finest side."""
    mm = pixels_of(spacing, "axial")
    shown = np.clip(scaled(upright(volume, "axial", index), mm, pixel or min(mm)), 0, 1)
    return Image.fromarray(np.uint8(shown * 255 + 0.5))


def animate(frames: Sequence[np.ndarray], path: Path, seconds: float = 0.1) -> None:
    """Write grey pictures (rows, columns) in [0, 1], of one size, as a looping GIF.

    Args:
        seconds: per picture; the last stays a second longer.
    """
    images = [Image.fromarray(np.uint8(np.clip(frame, 0, 1) * 255 + 0.5)) for frame in frames]
    times = [round(1000 * seconds)] * (len(images) - 1) + [round(1000 * seconds) + 1000]
    with written_whole(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0)


def loss_figure(records: Sequence[dict]) -> Figure:
    """Training losses and held-out scores of each stage by step, from the training log.

    Training and held-out losses have separate panels, since they are not comparable: crops, current weights
    and random times against whole volumes, averaged weights and fixed times.

    Args:
        records: entries of the training log, each with "stage", "step" and numbers.
    """
    panels = [
        ("autoencoder", ("recon_loss",), "Autoencoder: reconstruction loss in training", True),
        ("autoencoder", ("val_loss",), "Autoencoder: held-out loss", True),
        ("autoencoder", ("val_psnr",), "Autoencoder: held-out PSNR (dB)", False),
        ("diffusion", ("loss",), "Diffusion: loss in training", True),
        ("diffusion", ("val_loss",), "Diffusion: held-out loss", True),
        ("diffusion", tuple(QUARTERS), "Diffusion: held-out loss by noise", True),
        ("controlnet", ("loss",), "ControlNet: loss in training", True),
        ("controlnet", ("val_loss",), "ControlNet: held-out loss", True),
    ]
    logged = {(entry["stage"], key) for entry in records for key in entry}
    panels = [panel for panel in panels if any((panel[0], key) in logged for key in panel[1])]
    if not panels:  # epochs without a finite batch have no loss
        return Figure(figsize=(5, 3.4))
    columns = len(panels) if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (stage, keys, title, logarithmic) in zip(axes, panels, strict=False):
        entries = [entry for entry in records if entry["stage"] == stage]
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points:
                label = QUARTERS.get(key, "held out" if key.startswith("val") else "training")
                axis.plot(*zip(*points, strict=True), "o" if len(points) == 1 else "-", label=label)
        axis.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    return figure


def loss_curves(records: Sequence[dict], path: Path) -> None:
    """Write the curves of a training log as a PNG."""
    with written_whole(path) as file:
        loss_figure(records).savefig(file, format="png", dpi=110)


def axial_sweep(
    volumes: Sequence[torch.Tensor], names: Sequence[str] = (), most: int = 100
) -> list[np.ndarray]:
    """Pictures for `animate`: the axial slices of volumes (D, H, W) from bottom to top, side by side; small
    ones are enlarged.

    Args:
        names: of the volumes, written above them.
        most: number of pictures; of more slices, every n-th.
    """
    whole = np.concatenate([volume.detach().float().cpu().numpy()[::-1] for volume in volumes])
    columns, rows, slices = whole.shape
    size = tuple(side * max(1, 200 // rows) for side in (columns, rows))
    shown = [np.ascontiguousarray(np.rot90(whole[:, :, k])) for k in range(0, slices, -(-slices // most))]
    frames = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in shown]
    if not names:
        return frames
    strip = Image.new("L", (size[0], MARGIN))
    for i, name in enumerate(names):
        place = (i * size[0] // len(names) + GAP, MARGIN // 2)
        ImageDraw.Draw(strip).text(place, name, 255, _font(12), anchor="lm")
    return [np.vstack([np.asarray(strip) / 255, frame]) for frame in frames]


def progress(paths: Sequence[Path], path: Path, most: int = 60) -> None:
    """Write pictures as the frames of a GIF of half their size.

    Args:
        paths: PNG files in order. Files that are incomplete or differ in size from the last are skipped.
        most: number of frames; of more pictures, every n-th and the last.
    """
    step = -(-len(paths) // most)
    frames = []
    for one in paths[::-1][::step][::-1]:
        with contextlib.suppress(OSError), Image.open(one) as image:
            frames.append(np.asarray(image.convert("L").reduce(2)) / 255)
    animate([frame for frame in frames if frame.shape == frames[-1].shape], path, 0.5)
