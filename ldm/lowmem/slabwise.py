"""Encode and decode in slabs, within a given memory. The result is that of the whole volume: group norms use
the statistics of the whole volume, convolutions the rows beside the slab."""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import UserError
from ldm.lowmem.lazy import LazyVolume, leaf
from ldm.lowmem.slabs import CopyQueue, HostRows, Node, Rows, Sweep

MAX_ROWS = 32  # of a slab: more is no faster, and takes memory in which rows could be kept
PLANNED = 0.9  # share of the memory that is used: allocators leave gaps

# Bytes reserved on a CPU, from measurements: memory that glibc does not return, and what oneDNN keeps for
# each shape of slab, as a multiple of the weights.
HEAP, KEPT_WEIGHTS = 128 * 2**20, 4

# Operations in the time that a byte takes to host memory and back, assuming 400 TFLOP/s and 25 GB/s.
FLOPS_PER_BYTE = 16_000


@dataclass(frozen=True)
class Budget:
    """Memory that encoding and decoding may use on the autoencoder's device.

    Attributes:
        total: bytes, weights included.
        beside: bytes of it that something else uses, such as another network.
        like_gpu: predict for a GPU, whatever the device.
    """

    total: float
    beside: int = 0
    like_gpu: bool = False
    plans: dict = field(default_factory=dict, compare=False, repr=False)  # by volume, from earlier calls


def decode_within(autoencoder: nn.Module, latents: torch.Tensor, budget: Budget) -> torch.Tensor:
    """`autoencoder.decode` within a budget; equal up to rounding.

    Args:
        autoencoder: a network in eval mode. Convolutions, group norms, interpolation and pointwise functions
            are computed in slabs, other operations, such as attention, on their whole input.
        latents: (B, c, d, h, w), unscaled.

    Returns:
        (B, C, D, H, W), on the CPU.

    Raises:
        UserError: the budget is too small; the message names the smallest that is enough.
    """
    return torch.cat([_within(autoencoder, "decode", one[None], budget)[0] for one in latents])


def encode_within(autoencoder: nn.Module, images: torch.Tensor, budget: Budget) -> tuple[torch.Tensor, ...]:
    """`autoencoder.encode`, likewise: (B, C, D, H, W) on any device -> what it returns, on the CPU."""
    parts = [_within(autoencoder, "encode", one[None], budget) for one in images]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def weights_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(one.nbytes for one in (*network.parameters(), *network.buffers()))


def decoding_peak(autoencoder: nn.Module, latents: torch.Tensor, budget: Budget) -> float:
    """Peak bytes of `decode_within`, with the weights and what is beside them. Raises the same errors."""
    plain, _, room = _planned(autoencoder, "decode", latents[:1], budget)
    return plain + weights_bytes(autoencoder) + budget.beside if plain <= room else budget.total


def _layout(network: nn.Module) -> torch.memory_format:
    """The memory format of a network's convolutions."""
    last, kernels = torch.channels_last_3d, [one for one in network.parameters() if one.ndim == 5]
    found = any(one.is_contiguous(memory_format=last) and not one.is_contiguous() for one in kernels)
    return last if found else torch.contiguous_format


def _within(network: nn.Module, method: str, volume: torch.Tensor, budget: Budget) -> list[torch.Tensor]:
    """The results of a method of the network for a (1, C, D, H, W) tensor, on the CPU."""
    device, function = next(network.parameters()).device, getattr(network, method)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of sampling
    plain, least, room = _planned(network, method, volume, budget)
    if plain <= room:
        results = function(volume.to(device))
        return [one.cpu() for one in (results if isinstance(results, tuple) else (results,))]
    with _memory_saving(network):
        run = _Run(device, room, least, _layout(network))
        return run.results(function(LazyVolume(leaf(run, volume))))


def _planned(network: nn.Module, method: str, volume: torch.Tensor, budget: Budget) -> tuple[int, int, float]:
    """Bytes beside the weights for a (1, C, D, H, W) tensor: at once, in the thinnest slabs, and available.

    Raises:
        UserError: there are too few.
    """
    device, function = next(network.parameters()).device, getattr(network, method)
    held = weights_bytes(network) + budget.beside
    on_cpu = device.type == "cpu" and not budget.like_gpu
    heap = HEAP + KEPT_WEIGHTS * weights_bytes(network) if on_cpu else 0
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    key = (method, volume.shape, volume.dtype, volume.device, autocast)
    if key not in budget.plans:
        plain = _plain_peak(function, volume, device)
        with _memory_saving(network):
            budget.plans[key] = plain, _least(function, volume, device)
    plain, least = budget.plans[key]
    room = PLANNED * (budget.total - held) - heap
    if min(plain, least) > room:
        enough = math.ceil(((min(least, plain) + heap) / PLANNED + held) / 1e6) / 1e3
        raise UserError(
            f"{budget.total / 1e9:.3g} GB of memory are too little for a volume of "
            f"{' x '.join(map(str, volume.shape[2:]))} ({method}). Expected at least {enough:.3f} GB."
        )
    return plain, least, room


# ---------------------------------------------------------------- what fits


class _Tracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and their peak. A convolution counts its input
    and output twice, since libraries may copy both."""

    def __init__(self):
        super().__init__()
        self.peak, self.known = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.add(one)
        copies = args[0].nbytes + result.nbytes if "conv" in str(func) else 0
        self.peak = max(self.peak, self.live + copies)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = size
            weakref.finalize(storage, self.known.pop, key)

    @property
    def live(self) -> int:
        """Bytes of the tensors that exist."""
        return sum(self.known.values())


@contextlib.contextmanager
def _fake_tensors() -> Iterator[_Tracker]:
    """Run operations on tensors without data, and count their bytes. Inference mode would hide the parts of
    composed operations."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), torch.no_grad(), fake, _Tracker() as tracker:
        yield tracker


def _plain_peak(function: Callable, volume: torch.Tensor, device: torch.device) -> int:
    """Bytes that a function of the whole volume needs."""
    with _fake_tensors() as tracker:
        function(torch.empty_like(volume, device=device))
    return tracker.peak


def _least(function: Callable, volume: torch.Tensor, device: torch.device) -> int:
    """Bytes that the function needs in slabs of one row, if no rows are kept."""
    with _fake_tensors() as tracker:
        run = _Plan(device, tracker)
        run.results(function(LazyVolume(leaf(run, torch.empty_like(volume, device=device)))))
    return max(run.least, tracker.peak)


class _Plan:
    """A run that computes nothing, and finds the least memory that its sweeps need."""

    def __init__(self, device: torch.device, tracker: _Tracker):
        self.device, self.tracker, self.least = device, tracker, 0

    def hold(self, rows: Rows) -> None:
        pass

    def moments(self, node: Node, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._need([node])
        return torch.zeros(2, groups, device=self.device).unbind()

    def whole(self, node: Node) -> torch.Tensor:
        self._need([node], [node])
        return torch.empty((1, *node.size), dtype=node.dtype, device=self.device)

    def results(self, volumes: LazyVolume | Sequence[LazyVolume]) -> None:
        nodes = _nodes(volumes, self)
        self._need(nodes, nodes if self.device.type == "cpu" else [])

    def _need(self, tops: Sequence[Node], outputs: Sequence[Node] = ()) -> None:
        made = sum(node.row_bytes * node.depth for node in outputs)
        self.least = max(self.least, self.tracker.live + Sweep(tops).bytes(1) + made)


# ---------------------------------------------------------------- sweeps


class _Run:
    """The sweeps of one volume through a network.

    Each group norm needs the statistics of its whole input, which is swept once for them. Its rows are kept
    for the next sweep on the device where there is room, or in host memory if copying is faster than
    computing; else they are computed again.

    Args:
        room: bytes for all but the weights.
        least: bytes of it that each sweep needs.
        layout: memory format of the slabs.
    """

    def __init__(self, device: torch.device, room: float, least: int, layout=torch.contiguous_format):
        self.device, self.room, self.least, self.layout = device, room, least, layout
        self.held, self.queues = weakref.WeakSet(), None

    def hold(self, rows: Rows) -> None:
        """Count these rows as long as they exist."""
        self.held.add(rows)

    @property
    def free(self) -> float:
        """Bytes that no kept rows use."""
        return self.room - sum(rows.nbytes for rows in self.held)

    def thickness(self, sweep: Sweep, free: float) -> int:
        """Rows of the thickest slab that fits."""
        rows = 1
        while rows < min(MAX_ROWS, sweep.tops[0].depth) and sweep.bytes(2 * rows) <= free:
            rows *= 2
        return rows

    def place(self, node: Node, sweep: Sweep) -> Rows | HostRows | None:
        """Where to keep the rows of a sweep. None: nowhere."""
        if node.rows is not None:  # kept already
            return None
        size = node.row_bytes * node.depth
        if size <= self.free - max(self.least, self.room / 3):
            return Rows(self.device)
        faster = self.device.type != "cpu" and 2 * sweep.flops >= FLOPS_PER_BYTE * size
        if not faster or size > free_host_memory() / 2:
            return None
        self.queues = self.queues or (CopyQueue(self.device), CopyQueue(self.device))
        return HostRows(self.device, *self.queues)

    def moments(self, node: Node, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each group of channels over the whole volume, whose rows may be kept.

        Moments of pieces are merged by Chan et al. (1979), without cancellation.
        """
        sweep = Sweep([node])
        kept = self.place(node, sweep)
        taken = 0 if kept is None or kept.hosted else node.row_bytes * node.depth
        rows = self.thickness(sweep, self.free - taken)
        count, mean, squares = 0, 0.0, 0.0
        for a, b in sweep.slabs(rows):
            slab = None if kept is None else node.gather(a, b, node.dtype)
            for p, q in node.pieces(a, b):
                piece = node.read(p, q) if slab is None else slab[:, :, p - a : q - a]
                piece = piece.reshape(groups, -1)
                exact = torch.float64 if piece.dtype == torch.float64 else torch.float32
                variance, one = torch.var_mean(piece.to(exact), 1, correction=0)
                n, one, variance = piece.shape[1], one.double(), variance.double()
                apart, total = one - mean, count + n
                squares = squares + variance * n + apart.square() * (count * n / total)
                mean, count = mean + apart * (n / total), total
            if kept is not None:
                kept.append(a, slab)
        if kept is not None:
            self.hold(kept)
            node.store(kept)
        return mean, squares / count

    def whole(self, node: Node) -> torch.Tensor:
        """All rows in one tensor on the device."""
        return self._all([node], self.device)[0]

    def results(self, volumes: LazyVolume | Sequence[LazyVolume]) -> list[torch.Tensor]:
        """The network's results, on the CPU."""
        return self._all(_nodes(volumes, self), torch.device("cpu"))

    def _all(self, nodes: Sequence[Node], device: torch.device) -> list[torch.Tensor]:
        results = [torch.empty((1, *node.size), dtype=node.dtype, device=device) for node in nodes]
        taken = sum(one.nbytes for one in results) if device == self.device else 0
        sweep = Sweep(nodes)
        for a, b in sweep.slabs(self.thickness(sweep, self.free - taken)):
            for node, result in zip(nodes, results, strict=True):
                for p, q in node.pieces(a, b):
                    result[:, :, p:q] = node.read(p, q)
        return results


def free_host_memory() -> int:
    """Bytes that this process may still allocate; 0 where that is unknown."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        limit, current = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - current)
    return free


def _nodes(volumes: LazyVolume | Sequence[LazyVolume], run) -> list[Node]:
    """The nodes of a network's results."""
    volumes = volumes if isinstance(volumes, (tuple, list)) else [volumes]
    return [one.node if isinstance(one, LazyVolume) else leaf(run, one) for one in volumes]


# ---------------------------------------------------------------- networks


@contextlib.contextmanager
def _memory_saving(network: nn.Module) -> Iterator[None]:
    """Meanwhile, compute monai-generative's attention without its matrix of voxels by voxels. MONAI's was
    fused when it was built."""
    with contextlib.ExitStack() as changed:
        for module in network.modules():
            if hasattr(module, "_attention") and hasattr(module, "proj_attn"):
                fused = functools.partial(_attention, module.scale)
                changed.enter_context(mock.patch.object(module, "_attention", fused))
        yield


def _attention(scale: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of (heads, voxels, C) without its matrix."""
    # The kernels without a matrix need four axes.
    query, key, value = (one[:, None] for one in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[:, 0]
