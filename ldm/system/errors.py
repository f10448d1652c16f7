"""How a script ends on an error: with a message of a line or two and an exit code."""

import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from ldm import Failure, UserError, brief
from ldm.system.files import NO_SPACE
from ldm.system.messages import EXIT_STACK, LOGGER
from ldm.system.signals import Interruption

NO_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|ALLOC_FAILED|ArrayMemoryError", re.IGNORECASE
)
NO_SHARED_MEMORY = re.compile("shared memory|</torch_|bus error|ancdata", re.IGNORECASE)
NO_FILE_NAMED = re.compile(r"\[Errno (\d+)\] [^:]*")  # an OSError whose message names no file
WORKER_ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")
# What gloo and NCCL raise as RuntimeError in the processes that wait for one that has ended.
LOST = re.compile("connection (was )?(closed|reset|refused)|remote process exited|timed out", re.IGNORECASE)


def command(main: Callable) -> Callable:
    """Let a script's `main(argv=None)` end with a message and an exit code instead of a traceback: 2 on a
    UserError, as argparse does; 1 on a failure of the disk, the network, the memory, the numbers or another
    process; 130 on Ctrl-C, as a shell does. Other exceptions, which are bugs, keep their traceback."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None):
        result = message = code = None
        try:
            result = main(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        except SystemExit as leaving:
            code = leaving.code or 0
        except Exception as error:
            message, code = message_of(error), 2 if isinstance(error, UserError) else 1
            if message is None:
                raise
        finally:
            if sys.exception() or message:
                LOGGER.error(f"error: {message or 'unexpected'}", exc_info=sys.exception())
            EXIT_STACK.close()
        if message and int(os.environ.get("LOCAL_RANK", 0)):
            # Where all ranks fail alike, torchrun ends this one before it prints the message again. Until
            # then it stays in its group: the others would report a lost connection before the reason.
            if Interruption.received:  # torchrun's signal came before this rank was done
                message = None
            else:
                time.sleep(10)
        if message:
            print(f"error: {message}", file=sys.stderr)
        if dist.is_initialized():
            if not code:
                dist.destroy_process_group()  # after a failure the others may never call it
            if main.__module__ == "__main__":
                # Gloo's threads outlive a group that DDP has used. One that frees a tensor while the
                # interpreter shuts down aborts the process (CPython before 3.14), so it does not shut down.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code or 0)
        if code is not None:
            raise SystemExit(code)
        return result

    return wrapper


def message_of(error: Exception) -> str | None:
    """What to print in place of the traceback of an error; None where it is a bug."""
    if isinstance(error, UserError | FloatingPointError | Failure):
        return original_message(error)
    if isinstance(error, OSError):
        return disk_failure(error)
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    if (message := memory_failure(error)) is None and dist.is_initialized() and LOST.search(str(error)):
        return f"another process of this run ended or hangs ({brief(error)}); see its message."
    return message


def original_message(error: Exception) -> str:
    """The message of an error. Torch puts the traceback of a loader process into the message of its error."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    _, found, message = text.rpartition(f"{type(error).__name__}: ")
    return (message if found else text.splitlines()[-1]).strip()


def disk_failure(error: OSError) -> str:
    """The message of a failure of the system, with a remedy where it names no file."""
    text = original_message(error)
    number = int(match[1]) if (match := NO_FILE_NAMED.fullmatch(text)) else None
    if number in NO_SPACE:
        return (
            f"{text}: a disk is full, or /dev/shm, which loader processes need (data.num_workers 0 does not)"
        )
    if number == errno.EMFILE:
        return f"{text}: set data.num_workers to 0, or raise the limit (ulimit -n 65536)"
    return text


def memory_failure(error: RuntimeError | MemoryError) -> str | None:
    """The message of an error where memory ran out, here or in a loader process; else None."""
    text, what = str(error), brief(original_message(error))
    if NO_SHARED_MEMORY.search(text):
        return (
            f"the loader processes ran out of shared memory ({what}). Set data.num_workers to 0, or give "
            "them more (docker run --shm-size=8g): docs/TROUBLESHOOTING.md"
        )
    if WORKER_ENDED.search(text):  # torch does not always know by what
        return (
            f"a loader process was ended by the system ({what}), most likely because main memory or "
            "shared memory was full. Lower data.num_workers; 0 needs neither: docs/TROUBLESHOOTING.md"
        )
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return f"out of memory ({what}). What to change: docs/TROUBLESHOOTING.md"
    return None
