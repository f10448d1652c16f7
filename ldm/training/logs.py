"""The logs of a training run: `train_log.jsonl`, `losses.png` drawn from it and `log.txt`, what was said, in
the model folder; and TensorBoard."""

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
from ldm.system.messages import CLEAN_UP, SAID, tell

WRITERS = "tensorboard.summary.writer.event_file_writer"  # whose thread writes to the disk
DRAWING_SHARE = 0.05  # of the time of training that drawing the curves may take
DRAWING_SECONDS = 0.5  # that it takes, until it is known


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
        self.stage, self.path, self.lines, self.events = stage, path, lines, events
        CLEAN_UP.callback(setattr, threading, "excepthook", threading.excepthook)
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
        self.drawn_at, self.drawing = time.monotonic(), DRAWING_SECONDS

    def scalars(self, step: int, values: dict) -> None:
        """Numbers of a step, to TensorBoard."""
        for key, value in values.items():
            self._to_tensorboard("add_scalar", key, float(value), step)

    def _to_tensorboard(self, method: str, *args) -> None:
        """Call a method of the writer. A disk that fails under it ends no training: one warning is printed,
        and TensorBoard gets no more."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args)
        except OSError as error:
            self.writer = None
            tell(
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
                f"{self.path} could not be written ({error.strerror or error}). Free space, and run the same "
                "command again: it resumes."
            ) from None
        self.lines += 1

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A grey picture (rows, columns) in [0, 1], to TensorBoard."""
        self._to_tensorboard("add_image", tag, np.ascontiguousarray(picture)[None], step)

    def draw(self) -> None:
        """Draw `losses.png`, as of now."""
        begin = time.monotonic()
        figures.loss_curves(read_log(self.path), self.path.with_name("losses.png"))
        self.drawn_at = time.monotonic()
        self.drawing = self.drawn_at - begin

    def draw_if_due(self) -> None:
        """Draw it, where that takes no more than a small share of the time since it was drawn last; a picture
        that cannot be written, such as one that a viewer holds open, ends no training on the way."""
        if self.drawing <= DRAWING_SHARE * (time.monotonic() - self.drawn_at):
            try:
                self.draw()
            except OSError as error:
                self.drawn_at = time.monotonic()
                tell(f"warning: {error}")

    def close(self) -> None:
        """Draw the curves, and flush what is left."""
        self.draw()
        self._to_tensorboard("close")


def _without_tensorboard(hook: Callable) -> Callable:
    """A `threading.excepthook` that leaves out what ends TensorBoard's thread: the next call of its writer
    raises the same."""

    def filtered(args) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__ == WRITERS):
            hook(args)

    return filtered


class TextLog(logging.Handler):
    """`log.txt`: what is said, with the time; warnings of libraries, errors and tracebacks. Only appended to.

    It listens from the start and writes from `begin` on, what it heard before included, and only where the
    file is there: `Training` makes it, so that a first start that is refused leaves nothing. The file is
    opened for each line, so that it can be moved in between. A line that cannot be written ends no training:
    it is kept for the next try, and that is told once.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.waiting = path, []
        self.begun = self.writing = self.failed = False
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        SAID.addHandler(self)
        CLEAN_UP.callback(SAID.removeHandler, self)
        CLEAN_UP.callback(setattr, warnings, "showwarning", warnings.showwarning)
        warnings.showwarning = self._with_note(warnings.showwarning)

    @staticmethod
    def _with_note(show):
        def noted(message, category, filename, lineno, *more):
            SAID.warning(warnings.formatwarning(message, category, filename, lineno).strip())
            show(message, category, filename, lineno, *more)

        return noted

    def begin(self, facts: dict) -> None:
        """Mark a start by a line a fact, and write from now on."""
        heard, self.waiting = self.waiting, [""] if self.path.exists() else []
        for name, value in facts.items():
            SAID.info(f"{name}: {value}")
        self.waiting += heard
        self.begun = True
        self._write()

    def emit(self, record: logging.LogRecord) -> None:
        """Take up a record; called by `logging`."""
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
    """The lines of a `train_log.jsonl`; one that a kill cut short is left out. None where it is absent."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_log(path: Path, entries: Sequence[dict]) -> None:
    """Write a `train_log.jsonl` anew, whole or not at all."""
    with written_whole(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
