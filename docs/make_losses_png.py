"""Draw the held-out losses of several trainings of stage 2 over time, as figs/t1_4mm_losses.png has them.

    python docs/make_losses_png.py OUT.png NAME=MODEL_DIR [NAME=MODEL_DIR ...]

Losses compare only where the latents are the same.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def main(out: str, *named: str) -> None:
    figure = Figure((7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes of stage 2", ylabel="held-out loss")
    for one in named:
        name, _, folder = one.partition("=")
        lines = (Path(folder) / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [entry for entry in map(json.loads, lines) if entry["stage"] == "diffusion"]
        clock = [(entry["step"], entry["seconds"] / 60) for entry in entries if "seconds" in entry]
        held_out = [(entry["step"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
        minutes = np.interp([step for step, _ in held_out], *zip(*clock, strict=True))
        axes.plot(minutes, [loss for _, loss in held_out], marker="o", markersize=3, label=name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
