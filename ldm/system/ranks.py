"""The processes of a run, their device, and the precision that they compute in."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ldm import UserError, counted
from ldm.system.instructions import is_fast_in_bfloat16
from ldm.system.messages import print_and_log


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
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def precision(self) -> str:
        """What networks compute in: float32, tf32 (10-bit mantissa in products), bfloat16 or float16."""
        if self.amp_dtype:
            return str(self.amp_dtype).removeprefix("torch.")
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return "tf32" if self.device.type == "cuda" and tf32 else "float32"

    def autocast(self):
        """Mixed precision, or nothing where it is off."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def print(self, text: str) -> None:
        """Print on the main process, above a progress bar, and write to `log.txt`."""
        if self.is_main:
            print_and_log(text)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, on the CPU; other ranks may be late."""
        tensor = tensor.detach().cpu().clone()
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.slow_group)
        return tensor

    def gather(self, value) -> list:
        """A plain value of every rank, in the order of ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.slow_group)
        return values

    def broadcast_rows(self, rows: torch.Tensor) -> None:
        """Fill in the rows of a tensor on the CPU that other ranks have computed: row i is that of rank i
        modulo the number of ranks. Sends the values themselves; `gather` would pickle them."""
        if self.world_size > 1:
            for i, row in enumerate(rows):
                dist.broadcast(row, i % self.world_size, group=self.slow_group)

    def from_main(self, make: Callable):
        """The result of `make()` on the main process, on every rank; its UserError or OSError likewise."""
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


def check_device_name(kind: str) -> str:
    """Raise UserError unless `--device` is cpu, cuda or cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", kind):
        raise UserError(f"--device {kind}: expected cpu, cuda or cuda:N.")
    return kind


def find_device(kind: str, local_rank: int, processes_here: int) -> torch.device:
    """The device of this process: a CPU, the GPU that is named, or under torchrun a GPU for each process.

    Raises:
        UserError: there is no such GPU.
    """
    if check_device_name(kind) == "cpu":
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {kind}: torch {torch.__version__} finds no CUDA GPU here{chosen}. Use --device cpu."
        )
    number, count = kind.partition(":")[2], torch.cuda.device_count()
    there = f"{counted(count, 'GPU{s}')} here{chosen}"
    if number and processes_here > 1:
        raise UserError(
            f"--device {kind}: torchrun started {processes_here} processes here, and each needs a GPU of its "
            "own.\nUse --device cuda; the variable CUDA_VISIBLE_DEVICES chooses the GPUs."
        )
    if not number and processes_here > count:
        raise UserError(
            f"{processes_here} processes for {there}: each process needs a GPU of its own.\n"
            f"Use torchrun --nproc_per_node={count}, or --device cpu."
        )
    if (index := int(number or local_rank)) >= count:
        raise UserError(f"--device {kind}: found {there}, numbered from 0.")
    return torch.device("cuda", index)


def choose_kernels(tf32: bool, repeatable: bool) -> None:
    """Set how GPUs compute in float32. All four flags are set, so that none is left from an earlier script in
    the same process.

    Args:
        tf32: matrix products and convolutions round their inputs to 10 bits of mantissa, for speed.
        repeatable: the same bytes each time; else the algorithms that cuDNN measures as fastest.
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
    """bf16 where the hardware is fast in it, fp16 on other GPUs, None on other CPUs: float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if is_fast_in_bfloat16() else None
