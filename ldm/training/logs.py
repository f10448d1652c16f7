"""The logs of a training: in the model folder `train_log.jsonl` (numbers), `losses.png` drawn from it and
`log.txt` (messages); and TensorBoard."""

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ldm import figures
from ldm.system.files import written_whole
from ldm.system.messages import EXIT_STACK, LOGGER, print_and_log

WRITERS = "tensorboard.summary.writer.event_file_writer"  # whose thread writes to the disk
DRAW_INTERVAL = 30.0  # seconds between drawings of the curves, which take about half a second


class TrainLog:
    """Numbers and pictures of one stage; for the main process.

    On a resume, lines that were written after the checkpoint are dropped: they will be written again, so that
    the log has neither gaps nor repeats.

    Args:
        stage: `autoencoder`, `diffusion` or `controlnet`; all write to the same file.
        path: of the `train_log.jsonl`.
        events: folder of the TensorBoard files.
        step, lines: steps and lines of this stage in the checkpoint.
    """

    def __init__(self, stage: str, path: Path, events: Path, step: int, lines: int):
        self.stage, self.path, self.lines, self.events = stage, path, lines, events
        EXIT_STACK.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = _without_tensorboard(threading.excepthook)
        try:
            self.writer = SummaryWriter(str(events), purge_step=step + 1)
        except OSError as error:
            raise OSError(
                f"{events}: TensorBoard's files could not be written ({error.strerror or error}). Free "
                "space, or choose another tfevent_path in the environment file."
            ) from None
        kept, mine = [], 0
        for entry in read_log(path):
            mine += entry["stage"] == stage
            if entry["stage"] != stage or mine <= lines:
                kept.append(entry)
        write_log(path, kept)
        self.drawn_at = time.monotonic()

    def scalars(self, step: int, values: dict) -> None:
        """Numbers of a step, to TensorBoard."""
        for key, value in values.items():
            self._to_tensorboard("add_scalar", key, float(value), step)

    def _to_tensorboard(self, method: str, *args) -> None:
        """Call a method of the writer. Where the disk fails, one warning is printed, and the training
        continues without TensorBoard."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args)
        except OSError as error:
            self.writer = None
            print_and_log(
                f"warning: {self.events}: TensorBoard's files could not be written "
                f"({error.strerror or error}). The training continues without them; {self.path} has the "
                "numbers"
            )

    def record(self, **entry) -> None:
        """A line of `train_log.jsonl`, and to TensorBoard: `val_*` as `validation/*`, the rest as
        `epoch/*`."""
        tags = {
            key: key.replace("val_", "validation/", 1) if key.startswith("val_") else f"epoch/{key}"
            for key in entry.keys() - {"step", "epoch"}
        }
        self.scalars(entry["step"], {tag: entry[key] for key, tag in sorted(tags.items())})
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, **rounded}) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror or error}). Free space, then run the "
                "same command to resume."
            ) from None
        self.lines += 1

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A grey picture (rows, columns) in [0, 1], to TensorBoard."""
        self._to_tensorboard("add_image", tag, np.ascontiguousarray(picture)[None], step)

    def draw(self) -> None:
        """Draw `losses.png`."""
        figures.loss_curves(read_log(self.path), self.path.with_name("losses.png"))

    def draw_at_intervals(self) -> None:
        """Draw it every `DRAW_INTERVAL` seconds. Where it cannot be written, such as a file that a viewer
        holds open, a warning is printed, and the training continues."""
        if time.monotonic() - self.drawn_at < DRAW_INTERVAL:
            return
        try:
            self.draw()
        except OSError as error:
            print_and_log(f"warning: {error}")
        self.drawn_at = time.monotonic()

    def close(self) -> None:
        """Draw the curves, and close TensorBoard's files."""
        self.draw()
        self._to_tensorboard("close")


def _without_tensorboard(hook: Callable) -> Callable:
    """A `threading.excepthook` that ignores the OSError that ends TensorBoard's thread: the next call of its
    writer raises the same."""

    def filtered(args) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__ == WRITERS):
            hook(args)

    return filtered


class TextLog(logging.Handler):
    """`log.txt`: messages with the time, warnings of libraries, errors and tracebacks. Only appended to.

    Messages are collected from the start, and written from `begin` on, once the file exists: `Progress` makes
    it, so that a first start that is refused leaves nothing. The file is opened for each line, so that it can
    be moved in between. A line that cannot be written is kept for the next try, with one warning.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.waiting = path, []
        self.begun = self.writing = self.failed = False
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(self)
        EXIT_STACK.callback(LOGGER.removeHandler, self)
        EXIT_STACK.callback(setattr, warnings, "showwarning", warnings.showwarning)
        warnings.showwarning = self._with_note(warnings.showwarning)

    @staticmethod
    def _with_note(show):
        def noted(message, category, filename, lineno, *more):
            LOGGER.warning(warnings.formatwarning(message, category, filename, lineno).strip())
            show(message, category, filename, lineno, *more)

        return noted

    def begin(self, facts: dict) -> None:
        """Write a line for each fact, then the messages collected so far."""
        collected, self.waiting = self.waiting, [""] if self.path.exists() else []
        for name, value in facts.items():
            LOGGER.info(f"{name}: {value}")
        self.waiting += collected
        self.begun = True
        self._write()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; called by `logging`."""
        self.waiting.append(self.format(record))
        self._write()

    def _write(self) -> None:
        self.writing = self.writing or (self.begun and self.path.exists())
        if not self.writing:
            return
        try:
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write("".join(f"{line}\n" for line in self.waiting))
            self.waiting = []
        except OSError as error:
            if not self.failed:
                tqdm.write(f"warning: {self.path} could not be written ({error.strerror or error}).")
            self.failed = True


def read_log(path: Path) -> list[dict]:
    """The entries of a `train_log.jsonl`, without a last line that a kill cut short; [] without a file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_log(path: Path, entries: Sequence[dict]) -> None:
    """Rewrite a `train_log.jsonl`, whole or not at all."""
    with written_whole(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
