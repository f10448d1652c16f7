"""Pictures: three planes of volumes side by side, and loss curves. Written as PNG, no display needed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

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


def loss_figure(records: Sequence[dict]) -> Figure:
    """What the training log holds: for each stage its training losses and its validation score by step.

    Args:
        records: entries of the training log, each with "stage", "step" and numbers.
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
    return figure


def loss_curves(records: Sequence[dict], path: Path) -> None:
    """Write the curves of a training log as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    loss_figure(records).savefig(path, dpi=110)
