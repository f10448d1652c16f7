"""This process among the others: who it is, what they agree on, and the signals that stop them."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from ldm import UserError, brief

NO_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|ALLOC_FAILED|ArrayMemoryError", re.IGNORECASE
)
NO_SHARED_MEMORY = re.compile("shared memory|</torch_|bus error|ancdata", re.IGNORECASE)
NO_FILE_NAMED = re.compile(r"\[Errno (\d+)\] [^:]*")  # the words of an OSError that names none
LOADER_ENDED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")
CLEAN_UP = contextlib.ExitStack()  # closed when a script ends: locks, signal handlers, bars
SAID = logging.getLogger("ldm")  # what the main process says, for `ldm.logs.TextLog`; it prints nothing
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


@dataclass
class Run:
    """This process among the others, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    amp_dtype: torch.dtype | None = None
    patient: dist.ProcessGroup | None = None  # for what one process does while the others wait

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    @property
    def precision(self) -> str:
        """What networks compute in: float32, tf32 (products of 10 bits), bfloat16 or float16."""
        if self.amp_dtype:
            return str(self.amp_dtype).removeprefix("torch.")
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return "tf32" if self.device.type == "cuda" and tf32 else "float32"

    def autocast(self):
        """Mixed precision, or nothing where it is off."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def say(self, text: str) -> None:
        """Print once, whatever the number of processes, without breaking a progress bar."""
        if self.is_main:
            tell(text)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, on the CPU; the others may be long in coming."""
        tensor = tensor.cpu()
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.patient)
        return tensor

    def gather(self, value) -> list:
        """A plain value of every rank, in the order of ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def share(self, rows: torch.Tensor) -> None:
        """Fill in the rows of a tensor on the CPU that other ranks have: row i is that of rank i modulo the
        number of ranks. The values themselves are sent; `gather` would pickle them."""
        if self.world_size > 1:
            for i, row in enumerate(rows):
                dist.broadcast(row, i % self.world_size, group=self.patient)

    def from_main(self, make: Callable):
        """What `make()` gives on the main process, on every rank; an error there is raised on every rank."""
        result = error = None
        if self.is_main:
            try:
                result = make()
            except (UserError, OSError) as caught:
                error = caught
        if self.world_size > 1:
            box = [result, isinstance(error, UserError), str(error) if error else None]
            dist.broadcast_object_list(box, group=self.patient)
            if not self.is_main and box[2] is not None:
                error = (UserError if box[1] else OSError)(box[2])
            result = box[0]
        if error:
            raise error
        return result


def choose_kernels(tf32: bool, repeatable: bool) -> None:
    """How GPUs compute in float32: one home for the four flags, so that one script leaves none to the next in
    the same process.

    Args:
        tf32: matrix products and convolutions round their inputs to 10 bits of mantissa, for speed.
        repeatable: the same bytes each time; else the algorithms that cuDNN finds fastest for each size.
    """
    # The older flags: torch refuses to mix them with `fp32_precision`, and torch.compile reads these.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not repeatable, repeatable


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Within, a GPU multiplies float32 as float32, not in TF32's 10 bits of mantissa."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait; processes that start meanwhile begin with them waiting. Not on Windows."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def leave_signals_to_the_main_process(worker: int) -> None:
    """A loader process outlives a signal to the whole group for a while, or the main one would have no batch
    to end its step with. It ends with the main one, or 20 s after it was told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows, where no one sends it SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class Interruption:
    """SIGTERM and Ctrl-C: what is unsaved is saved first, then the script ends with the shell's exit code for
    that signal (143, 130)."""

    def __init__(self):
        self.signal, self.unsaved, self.process = None, False, os.getpid()
        for number in STOPPING:
            CLEAN_UP.callback(signal.signal, number, signal.signal(number, self._note))

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # a loader process, forked with this handler
            return
        self.signal = signal.Signals(number)
        if not self.unsaved:
            self.leave()

    def leave(self) -> None:
        """End the script; the same command goes on."""
        name = self.signal.name if self.signal else "a signal to another process"
        if int(os.environ.get("RANK", 0)) == 0:
            message = f"stopped by {name}; all is saved, and the same command goes on"
            SAID.info(message)
            print(message, file=sys.stderr)
        raise SystemExit(128 + (self.signal or signal.SIGTERM))


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """bf16 where the hardware computes in it, fp16 on other GPUs, None on a CPU without bf16 (it would be
    slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None
