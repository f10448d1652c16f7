"""The log of a training run: `train_log.jsonl` in the model folder, and TensorBoard."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ldm.checkpoints import written_whole


class TrainLog:
    """Numbers and pictures of one stage. Make one on the main process only.

    A run that goes on drops what was written after the checkpoint that it goes on from: it will be written
    again, so that the log has neither gaps nor repeats.

    Args:
        stage: `autoencoder` or `diffusion`; both write to the same file.
        path: of the `train_log.jsonl`.
        events: folder of the TensorBoard files.
        step, lines: steps and lines of this stage that are kept.
    """

    def __init__(self, stage: str, path: Path, events: Path, step: int, lines: int):
        self.stage, self.path, self.lines = stage, path, lines
        self.writer = SummaryWriter(str(events), purge_step=step + 1)
        kept, mine = [], 0
        for entry in read_log(path):
            mine += entry["stage"] == stage
            if entry["stage"] != stage or mine <= lines:
                kept.append(entry)
        write_log(path, kept)

    def scalars(self, step: int, values: dict) -> None:
        """Numbers of a step, to TensorBoard."""
        for key, value in values.items():
            self.writer.add_scalar(key, float(value), step)

    def record(self, **entry) -> None:
        """A line of `train_log.jsonl`, and to TensorBoard."""
        self.scalars(entry["step"], {k: v for k, v in entry.items() if k != "step"})
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, **rounded}) + "\n")
        except OSError as error:
            raise OSError(f"{self.path} could not be written ({error.strerror or error}).") from None
        self.lines += 1

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A grey picture (rows, columns) in [0, 1], to TensorBoard."""
        self.writer.add_image(tag, np.ascontiguousarray(picture)[None], step)

    def close(self) -> None:
        """Flush what is left."""
        self.writer.close()


def read_log(path: Path) -> list[dict]:
    """The lines of a `train_log.jsonl`; one that a kill cut short is left out. None where it is absent."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_log(path: Path, entries: Sequence[dict]) -> None:
    """Write a `train_log.jsonl` anew, whole or not at all."""
    with written_whole(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
