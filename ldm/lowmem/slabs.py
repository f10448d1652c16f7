"""Volumes computed in slabs, each from the rows that it depends on.

A row is one index of the first spatial axis. A `Node` is an operation, and knows which rows of its inputs it
needs. Heavy nodes are convolutions. Light ones are pointwise operations, padding and interpolation, computed
whenever they are read. A `Sweep` computes nodes from the first row to the last.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

PIECE = 8 * 2**20  # bytes of a light operation's result at a time
MAX_ELEMENTS = 2**31 - 1  # of one tensor: kernels index with 32 bits
CHAIN = 4  # results that a chain of light operations holds at once
CHUNK = 64 * 2**20  # bytes copied to or from host memory at a time
AHEAD = 2  # chunks being copied in each direction


def _joined(chunks: Sequence[tuple[int, torch.Tensor]], a: int, b: int) -> torch.Tensor:
    """Rows a to b of chunks, each with the number of its first row; a view if they lie in one."""
    parts = []
    for first, rows in chunks:
        low, high = max(a, first), min(b, first + rows.shape[2])
        if low < high:
            parts.append(rows.narrow(2, low - first, high - low))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Rows:
    """Consecutive rows of a volume, as tensors of (1, C, n, H, W) on a device."""

    hosted = False

    def __init__(self, device: torch.device):
        self.device, self.chunks = device, []

    def append(self, first: int, rows: torch.Tensor) -> None:
        """Add rows from `first` on, which follow the last."""
        self.chunks.append((first, rows))

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b on the device."""
        return _joined(self.chunks, a, b).to(self.device)  # images may be on the CPU

    def forget(self, before: int) -> None:
        """Free the rows before this."""
        kept = [(first, rows) for first, rows in self.chunks if first + rows.shape[2] > before]
        if kept and kept[0][0] < before:
            first, rows = kept[0]
            kept[0] = before, rows[:, :, before - first :].clone()  # a view would keep them all
        self.chunks = kept

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(rows.nbytes for _, rows in self.chunks if rows.device.type == self.device.type)


class CopyQueue:
    """Copies between device and host memory in the background, in one direction.

    Pinned memory, which a GPU copies at full speed, is slow to allocate. So there are `AHEAD` pinned buffers,
    and threads that copy between them and ordinary memory.
    """

    def __init__(self, device: torch.device):
        self.device, self.threads = device, ThreadPoolExecutor(AHEAD)
        self.own, self.pending = threading.local(), threading.Semaphore(AHEAD)

    def to_host(self, rows: torch.Tensor) -> Future:
        """Start a copy to host memory. Waits while `AHEAD` others run: each holds memory of the device."""
        ready = torch.cuda.current_stream(self.device).record_event() if rows.is_cuda else None

        @torch.inference_mode()
        def job() -> torch.Tensor:
            try:
                with self._stream() as stream:
                    if ready:
                        stream.wait_event(ready)
                    buffer = self._buffer(rows)
                    buffer.copy_(rows, non_blocking=True)
                if stream:
                    stream.synchronize()
                return buffer.clone()
            finally:
                self.pending.release()

        self.pending.acquire()
        return self.threads.submit(job)

    def to_device(self, copy: Future) -> Future:
        """Start a copy from host memory to the device."""

        @torch.inference_mode()
        def job() -> torch.Tensor:
            host = copy.result()
            buffer = self._buffer(host).copy_(host)
            with self._stream() as stream:
                rows = torch.empty(host.shape, dtype=host.dtype, device=self.device)
                rows.copy_(buffer, non_blocking=True)
            if stream:
                stream.synchronize()
            return rows

        return self.threads.submit(job)

    @contextlib.contextmanager
    def _stream(self) -> Iterator["torch.cuda.Stream | None"]:
        """The CUDA stream of this thread; None on a CPU."""
        if self.device.type != "cuda":
            yield None
            return
        if not hasattr(self.own, "stream"):
            self.own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.own.stream):
            yield self.own.stream

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        """The pinned memory of this thread, as a tensor like this."""
        if getattr(self.own, "bytes", torch.empty(0)).nbytes < like.nbytes:
            pinned = self.device.type == "cuda"
            self.own.bytes = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=pinned)
        return self.own.bytes[: like.nbytes].view(like.dtype).view(like.shape)


class HostRows:
    """Rows in host memory, copied to the device as they are read, with the next ones prefetched."""

    hosted, nbytes = True, 0  # bytes on the device

    def __init__(self, device: torch.device, down: CopyQueue, up: CopyQueue):
        self.device, self.down, self.up = device, down, up
        self.firsts, self.copies, self.loaded = [], [], {}

    def append(self, first: int, rows: torch.Tensor) -> None:
        """Add rows from `first` on, which follow the last."""
        step = max(1, CHUNK // (rows.nbytes // rows.shape[2]))
        for i in range(0, rows.shape[2], step):
            self.firsts.append((first + i, first + min(i + step, rows.shape[2])))
            self.copies.append(self.down.to_host(rows[:, :, i : i + step]))

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b on the device."""
        chunks = [i for i, (first, last) in enumerate(self.firsts) if first < b and a < last]
        for i in range(chunks[0], min(chunks[-1] + AHEAD, len(self.copies) - 1) + 1):
            if i not in self.loaded:
                self.loaded[i] = self.up.to_device(self.copies[i])
        loaded = [(self.firsts[i][0], self.loaded[i].result()) for i in chunks]
        for _, rows in loaded:
            if rows.is_cuda:
                rows.record_stream(torch.cuda.current_stream(self.device))
        return _joined(loaded, a, b)

    def forget(self, before: int) -> None:
        """Free the rows before this on the device. The host keeps them."""
        self.loaded = {i: rows for i, rows in self.loaded.items() if self.firsts[i][1] > before}


@dataclass(eq=False)
class Node:
    """An operation on volumes.

    Attributes:
        size: (C, D, H, W).
        needs: a, b -> the rows of each input for rows a to b. Those of a heavy node may lie outside of the
            volume, where they are zeros.
        compute: tensors of these rows, a, b -> rows a to b.
        heavy: computed once in a sweep, and kept until it has been read.
        input_dtype: of a heavy node's input.
        flops: of a row.
        weight_bytes: of a heavy node.
        rows: those that are kept. A stored node has all, and no inputs.
    """

    run: object
    size: Sequence[int]
    dtype: torch.dtype
    inputs: list["Node"] = field(default_factory=list)
    needs: Callable | None = None
    compute: Callable | None = None
    heavy: bool = False
    input_dtype: torch.dtype | None = None
    flops: float = 0.0
    weight_bytes: int = 0
    rows: Rows | HostRows | None = None

    @property
    def row_bytes(self) -> int:
        return self.row_elements * self.dtype.itemsize

    @property
    def row_elements(self) -> int:
        return self.size[0] * self.size[2] * self.size[3]

    @property
    def piece(self) -> int:
        """Rows that light operations compute at a time."""
        return max(1, PIECE // (4 * self.row_elements))

    @property
    def depth(self) -> int:
        return self.size[1]

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b, (1, C, b - a, H, W). The heavy nodes that they depend on must hold their rows."""
        if self.rows is not None:
            return self.rows.read(a, b)
        needs = zip(self.inputs, self.needs(a, b), strict=True)
        return self.compute([node.read(*rows) for node, rows in needs], a, b)

    def gather(self, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows a to b in one tensor of the run's layout, zeros outside of the volume. They are computed in
        pieces, which takes little memory."""
        low, high = max(a, 0), min(b, self.depth)
        if self.rows is not None and (low, high) == (a, b):
            return self.read(a, b).to(dtype, memory_format=self.run.layout)
        shape, like = (1, self.size[0], b - a, *self.size[2:]), {"dtype": dtype, "device": self.run.device}
        result = torch.empty(shape, memory_format=self.run.layout, **like)
        result[:, :, : low - a] = 0
        result[:, :, high - a :] = 0
        for p, q in self.pieces(low, high):
            result[:, :, p - a : q - a] = self.read(p, q)
        return result

    def pieces(self, a: int, b: int) -> Iterator[tuple[int, int]]:
        """Rows a to b in steps of about `PIECE` bytes."""
        for p in range(a, b, self.piece):
            yield p, min(p + self.piece, b)

    def store(self, rows: Rows | HostRows) -> None:
        """Keep all rows, and drop what they were computed from."""
        self.rows, self.inputs, self.needs, self.compute, self.heavy = rows, [], None, None, False


class Sweep:
    """Compute volumes of one grid together from the first row to the last, each heavy node's rows once.

    A heavy node keeps only the rows that are still to be read.
    """

    def __init__(self, tops: Sequence[Node]):
        self.tops, self.nodes = tops, []  # inputs before what reads them

        def visit(node: Node) -> None:
            if node not in self.nodes:
                for one in node.inputs:
                    visit(one)
                self.nodes.append(node)

        for top in tops:
            visit(top)
        self.heavy = [node for node in self.nodes if node.heavy]
        self.hosted = [node for node in self.nodes if node.rows is not None and node.rows.hosted]

    @property
    def flops(self) -> float:
        return sum(node.flops * node.depth for node in self.heavy)

    def slabs(self, thickness: int) -> Iterator[tuple[int, int]]:
        """Steps a to b of so many rows, at each of which rows a to b of the tops can be read."""
        done, depth = dict.fromkeys(self.heavy, 0), self.tops[0].depth
        for node in self.heavy:
            node.rows = Rows(node.run.device)
        for a in range(0, depth, thickness):
            b = min(a + thickness, depth)
            for node, (low, high) in self._rows_to_compute(a, b, done)[0]:
                rows = [node.inputs[0].gather(*node.needs(low, high)[0], node.input_dtype)]
                node.rows.append(low, node.compute(rows, low, high))
                del rows
                done[node] = high
                for one, first in self._unread(a, done):
                    one.rows.forget(first)
            yield a, b
            for one, first in self._unread(b, done):
                one.rows.forget(first)
        for node in self.heavy:
            node.rows = None

    def bytes(self, thickness: int) -> int:
        """Peak bytes of the slabs, without the rows that are kept before or after.

        A convolution counts its input, output and weights twice, since libraries may copy them.
        """
        done, depth, most = dict.fromkeys(self.heavy, 0), self.tops[0].depth, 0
        held = dict.fromkeys(self.heavy + self.hosted, (0, 0))

        def live() -> int:
            return sum(node.row_bytes * (high - low) for node, (low, high) in held.items())

        most_rows = 4 * (thickness + 4)
        rows = [4 * node.row_elements * min(node.piece, node.depth, most_rows) for node in self.nodes]
        beside = CHAIN * max(rows) + sum((2 * AHEAD + 1) * max(CHUNK, n.row_bytes) for n in self.hosted)

        def forget(row: int) -> None:
            for node, first in self._unread(row, done):
                low, high = held[node]
                held[node] = (min(max(first, low), high), high)

        for a in range(0, min(depth, 6 * thickness), thickness):
            b = min(a + thickness, depth)
            steps, asked = self._rows_to_compute(a, b, done)
            for node in self.hosted:
                held[node] = (held[node][0], max(held[node][1], asked.get(node, (0, 0))[1]))
            for node, (low, high) in steps:
                ((first, last),) = node.needs(low, high)
                elements = [node.inputs[0].row_elements * (last - first), node.row_elements * (high - low)]
                if max(elements) > MAX_ELEMENTS and thickness > 1:
                    return math.inf
                copies = 2 * sum(elements) * node.input_dtype.itemsize + 2 * node.weight_bytes
                most = max(most, live() + copies + beside)
                held[node] = (held[node][0], high)
                done[node] = high
                forget(a)
            most = max(most, live() + sum(top.row_bytes for top in self.tops) * (b - a) + beside)
            forget(b)
        return most

    def _rows_to_compute(
        self, a: int, b: int, done: dict[Node, int]
    ) -> tuple[list[tuple[Node, tuple[int, int]]], dict]:
        """The rows that each heavy node must compute, in order, before rows a to b of the tops can be read,
        and the rows of each node that this reads."""
        asked, steps = {top: (a, b) for top in self.tops}, []
        for node in reversed(self.nodes):
            if node not in asked:
                continue
            low, high = asked[node]
            if node.heavy:
                low = max(low, done[node])
                if low >= high:
                    continue
                steps.append((node, (low, high)))
            needs = node.needs(low, high) if node.inputs else []
            for one, (first, last) in zip(node.inputs, needs, strict=True):
                first, last = max(first, 0), min(last, one.depth)
                before = asked.get(one, (first, last))
                asked[one] = (min(first, before[0]), max(last, before[1]))
        return steps[::-1], asked

    def _unread(self, row: int, done: dict[Node, int]) -> list[tuple[Node, int]]:
        """The first row of each heavy or hosted node that is still to be read once the tops are read up to
        `row`."""
        first = dict.fromkeys(self.nodes, math.inf) | dict.fromkeys(self.tops, row)
        for node in reversed(self.nodes):
            start = done[node] if node.heavy else first[node]
            if start < node.depth and node.inputs:
                for one, (low, _) in zip(node.inputs, node.needs(start, start + 1), strict=True):
                    first[one] = min(first[one], max(low, 0))
        return [(node, min(first[node], node.depth)) for node in self.heavy + self.hosted]
