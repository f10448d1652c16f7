"""This process among the others: who it is, what they agree on, and the signals that stop them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ldm import UserError
from ldm.system.messages import tell


@dataclass
class Run:
    """This process among the others, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    amp_dtype: torch.dtype | None = None
    slow_group: dist.ProcessGroup | None = None  # with a long timeout: for work that others wait for
    command: str = ""  # the command line, for log.txt

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
            dist.all_reduce(tensor, group=self.slow_group)
        return tensor

    def gather(self, value) -> list:
        """A plain value of every rank, in the order of ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.slow_group)
        return values

    def share(self, rows: torch.Tensor) -> None:
        """Fill in the rows of a tensor on the CPU that other ranks have: row i is that of rank i modulo the
        number of ranks. The values themselves are sent; `gather` would pickle them."""
        if self.world_size > 1:
            for i, row in enumerate(rows):
                dist.broadcast(row, i % self.world_size, group=self.slow_group)

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
            dist.broadcast_object_list(box, group=self.slow_group)
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


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """bf16 where the hardware computes in it, fp16 on other GPUs, None on a CPU without bf16 (it would be
    slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None
