"""Draw figs/losses_before_after.png: held-out losses of stage 2 in two or more trainings, over minutes.

    python docs/make_losses_png.py "Adam=OLD/train_log.jsonl" "Muon, mean latent=NEW/train_log.jsonl"

Losses compare only between trainings on the same latents.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parents[1] / "figs" / "losses_before_after.png"


def main() -> None:
    figure = Figure((6, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        lines = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        rows = [line for line in lines if line["stage"] == "diffusion" and "val_loss" in line]
        axes.plot([row["seconds"] / 60 for row in rows], [row["val_loss"] for row in rows], ".-", label=name)
    axes.set(xlabel="minutes of stage 2", ylabel="held-out loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(OUT)


if __name__ == "__main__":
    main()
