"""What is said to the user: messages, progress bars, the words of failures."""

import contextlib
import errno
import logging
import re

from tqdm import tqdm

from ldm import brief


def progress_bar(run, what: str, total: int | None = None, items=None, unit: str = "step") -> tqdm:
    """A bar with the time left, on the main process; closed before an error is told."""
    bar = tqdm(
        items, total=total, desc=what, unit=unit, disable=not run.is_main, dynamic_ncols=True, mininterval=0.5
    )
    CLEAN_UP.callback(bar.close)
    return bar


NO_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|ALLOC_FAILED|ArrayMemoryError", re.IGNORECASE
)

NO_SHARED_MEMORY = re.compile("shared memory|</torch_|bus error|ancdata", re.IGNORECASE)
NO_FILE_NAMED = re.compile(r"\[Errno (\d+)\] [^:]*")  # the words of an OSError that names none
LOADER_ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")
CLEAN_UP = contextlib.ExitStack()  # closed when a script ends: locks, signal handlers, bars
# What the main process says, for `ldm.training.logs.TextLog`; it prints nothing.
SAID = logging.getLogger("ldm")
SAID.setLevel(logging.INFO)
SAID.propagate = False
SAID.addHandler(logging.NullHandler())


def tell(text: str) -> None:
    """Print without breaking a progress bar, and note it in `log.txt`; on the main process."""
    SAID.info(text)
    tqdm.write(text)


def words_of(error: Exception) -> str:
    """The message of an error. To one of a loader process torch adds that process's whole traceback."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    _, found, message = text.rpartition(f"{type(error).__name__}: ")
    return (message if found else text.splitlines()[-1]).strip()


def disk_failure(error: OSError) -> str:
    """What to tell of a failure of the system: its words, and a remedy where they name no file."""
    words = words_of(error)
    number = int(match[1]) if (match := NO_FILE_NAMED.fullmatch(words)) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{words}: a disk is full, or /dev/shm, which loader processes need (data.num_workers 0 does not)"
        )
    if number == errno.EMFILE:
        return f"{words}: set data.num_workers to 0, or raise the limit (ulimit -n 65536)"
    return words


def memory_failure(error: RuntimeError | MemoryError) -> str | None:
    """What to tell of an error, if it is that memory ran out, here or in a loader process."""
    text, words = str(error), brief(words_of(error))
    if NO_SHARED_MEMORY.search(text):
        return (
            f"the loader processes ran out of shared memory ({words}). Set data.num_workers to 0, or give "
            "them more (docker run --shm-size=8g): docs/TROUBLESHOOTING.md"
        )
    if LOADER_ENDED.search(text):  # torch does not always know by what
        return (
            f"a loader process was ended by the system ({words}), most likely since main memory or shared "
            "memory was full. Lower data.num_workers; 0 needs neither: docs/TROUBLESHOOTING.md"
        )
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return f"out of memory ({words}). What to change: docs/TROUBLESHOOTING.md"
    return None
