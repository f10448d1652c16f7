"""Pictures: three planes of volumes side by side, and loss curves. Written as PNG, no display needed."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ldm.checkpoints import written_whole

PLANES = ("sagittal", "coronal", "axial")


def middle_slices(volume: torch.Tensor) -> list[np.ndarray]:
    """The middle sagittal, coronal and axial slice of (D, H, W) in RAS, each upright as a radiologist has it.

    The sagittal slice lies a twelfth of the width off the midline, where there are gyri to see.
    """
    volume = volume.detach().float().cpu()
    d, h, w = volume.shape
    return [
        np.rot90(volume[d // 2 - d // 12].numpy()),
        np.rot90(volume[:, h // 2].numpy())[
            :, ::-1
        ],  # radiological convention: the subject's right on the left
        np.rot90(volume[:, :, w // 2].numpy())[:, ::-1],
    ]


def three_planes(volume: torch.Tensor) -> np.ndarray:
    """One grey picture (rows, columns) in [0, 1] with the three middle slices of (D, H, W) beside each
    other."""
    slices = [np.clip(one, 0, 1) for one in middle_slices(volume)]
    rows = max(one.shape[0] for one in slices)
    padded = [
        np.pad(one, (((rows - one.shape[0]) // 2, -((one.shape[0] - rows) // 2)), (1, 1))) for one in slices
    ]
    return np.concatenate(padded, axis=1)


def montage(rows: dict[str, Sequence[torch.Tensor]], path: Path, title: str = "", columns: int = 2) -> None:
    """Draw volumes in three planes each.

    Args:
        rows: for each kind (such as "scan", "reconstruction") as many volumes (D, H, W) in [0, 1] as the
            others have. Several kinds stand one below the other, so that they compare; a single kind fills a
            grid.
        path: the PNG to write.
        columns: volumes beside each other.
    """
    count = len(next(iter(rows.values())))
    columns = min(columns, count)
    bands = [slice(start, start + columns) for start in range(0, count, columns)]
    pictures = {kind: [three_planes(volume) for volume in volumes] for kind, volumes in rows.items()}
    height, width = next(iter(pictures.values()))[0].shape
    lines = len(bands) * len(rows)
    scale = 5.0 / width
    figure = Figure(
        figsize=(5.0 * columns, lines * (height * scale + 0.06) + 0.5),
        facecolor="black",
        layout="constrained",
    )
    figure.suptitle(title, color="white", fontsize=11)
    axes = figure.subplots(lines, columns, squeeze=False)
    for line, (band, kind) in enumerate((band, kind) for band in bands for kind in rows):
        for column in range(columns):
            axis = axes[line][column]
            axis.set_axis_off()
            shown = pictures[kind][band]
            if column < len(shown):
                axis.imshow(shown[column], cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            if column == 0 and len(rows) > 1:
                axis.text(0.01, 0.98, kind, color="white", fontsize=9, va="top", transform=axis.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def animate(frames: Sequence[np.ndarray], path: Path, seconds: float = 0.1) -> None:
    """Write grey pictures (rows, columns) in [0, 1], of one size, as a GIF that repeats.

    Args:
        seconds: that each is shown; the last stays for a second longer.
    """
    images = [Image.fromarray(np.uint8(np.clip(frame, 0, 1) * 255 + 0.5)) for frame in frames]
    times = [round(1000 * seconds)] * (len(images) - 1) + [round(1000 * seconds) + 1000]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)


def loss_curves(records: Sequence[dict], path: Path) -> None:
    """Draw what the training log holds: for each stage its training losses and its validation score by step.

    Args:
        records: entries of the training log, each with "stage", "step" and numbers.
        path: the PNG to write.
    """
    panels = [
        ("autoencoder", ("recon_loss",), "Autoencoder: reconstruction loss", True),
        ("autoencoder", ("val_psnr",), "Autoencoder: held-out PSNR (dB)", False),
        ("diffusion", ("loss", "val_loss"), "Diffusion: loss", True),
    ]
    panels = [panel for panel in panels if any(entry["stage"] == panel[0] for entry in records)]
    figure = Figure(figsize=(5 * len(panels), 3.4), layout="constrained")
    for axis, (stage, keys, title, logarithmic) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for key in keys:
            points = [
                (entry["step"], entry[key]) for entry in records if entry["stage"] == stage and key in entry
            ]
            if points:
                label, marker = "held out" if key.startswith("val") else "training", "o" * (len(points) == 1)
                axis.plot(*zip(*points, strict=True), marker or "-", label=label)
        axis.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
        if axis.lines:  # an epoch without a finite batch has no loss
            axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)


def axial_sweep(volumes: Sequence[torch.Tensor], most: int = 100) -> list[np.ndarray]:
    """Grey pictures for `animate`: the axial slices of volumes (D, H, W) in RAS from the lowest to the
    highest, those of one height beside each other, as a radiologist has them; small ones are enlarged.

    Args:
        most: pictures; of more slices, every n-th.
    """
    whole = np.concatenate([volume.detach().float().cpu().numpy()[::-1] for volume in volumes])
    columns, rows, slices = whole.shape
    size = tuple(side * max(1, 200 // rows) for side in (columns, rows))
    shown = [np.ascontiguousarray(np.rot90(whole[:, :, k])) for k in range(0, slices, -(-slices // most))]
    return [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in shown]


def progress(paths: Sequence[Path], path: Path, most: int = 60) -> None:
    """Write pictures of the same kind, one after the other, as a GIF of half their size.

    Args:
        paths: PNG files in their order. Left out are those of another size than the last, and one that a kill
            cut short.
        most: frames; of more pictures, every n-th and the last.
    """
    step = -(-len(paths) // most)
    frames = []
    for one in paths[::-1][::step][::-1]:
        with contextlib.suppress(OSError), Image.open(one) as image:
            frames.append(np.asarray(image.convert("L").reduce(2)) / 255)
    animate([frame for frame in frames if frame.shape == frames[-1].shape], path, 0.5)
