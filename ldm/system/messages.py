"""Messages to the user, progress bars, and the logger behind `log.txt`."""

import contextlib
import functools
import logging

from tqdm import tqdm

EXIT_STACK = contextlib.ExitStack()  # closed when a script ends: locks, signal handlers, bars
# Messages of the main process, for `ldm.training.logs.TextLog`; it prints nothing.
LOGGER = logging.getLogger("ldm")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(logging.NullHandler())


def print_and_log(text: str) -> None:
    """Print above a progress bar, and write to `log.txt`; on the main process."""
    LOGGER.info(text)
    tqdm.write(text)


@functools.cache
def tell_once(text: str) -> None:
    """As `print_and_log`, the first time that it is called with this text."""
    print_and_log(text)


def progress_bar(run, what: str, total: int | None = None, items=None, unit: str = "step") -> tqdm:
    """A bar with the remaining time, on the main process; closed before an error is printed."""
    bar = tqdm(
        items, total=total, desc=what, unit=unit, disable=not run.is_main, dynamic_ncols=True, mininterval=0.5
    )
    EXIT_STACK.callback(bar.close)
    return bar
