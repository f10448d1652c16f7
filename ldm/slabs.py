"""Volumes that are computed a slab at a time: what a network makes of a `Volume` is recorded, not computed,
and any rows of it can then be had from the rows that they depend on.

A row is one index of the first spatial axis. Convolutions know the rows that their kernels reach; pointwise
operations, padding and interpolation are fused into whatever reads them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

PIECE = 32 * 2**20  # bytes of a light operation's result at a time
MOST_ELEMENTS = 2**31 - 1  # of one tensor: beyond it kernels count with overflow
CHAIN = 4  # results that a chain of light operations holds at a time


class Rows:
    """Consecutive rows of a volume, as tensors of (1, C, n, H, W); read on `device`."""

    def __init__(self, device: torch.device):
        self.device, self.chunks = device, []

    def append(self, first: int, rows: torch.Tensor) -> None:
        """Add the rows from `first` on, those that follow the last."""
        self.chunks.append((first, rows))

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b; a view where one chunk has them all."""
        parts = []
        for first, rows in self.chunks:
            low, high = max(a, first), min(b, first + rows.shape[2])
            if low < high:
                parts.append(rows.narrow(2, low - first, high - low).to(self.device))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def forget(self, before: int) -> None:
        """Free the rows before this one."""
        chunks, self.chunks = self.chunks, []
        for first, rows in chunks:
            if first >= before:
                self.chunks.append((first, rows))
            elif first + rows.shape[2] > before:
                rows = rows.narrow(2, before - first, first + rows.shape[2] - before)
                self.chunks.append((before, rows.clone()))  # a view would keep them all

    @property
    def nbytes(self) -> int:
        """Bytes on the device that they are read on."""
        return sum(rows.nbytes for _, rows in self.chunks if rows.device.type == self.device.type)


@dataclass(eq=False)
class Node:
    """An operation on volumes.

    Attributes:
        size: (C, D, H, W).
        needs: rows of each input that rows a to b take. A heavy node's may lie outside of the volume, and
            are zeros there.
        compute: tensors of these rows, a, b -> rows a to b.
        heavy: worth keeping: in a sweep, none of its rows is computed twice.
        input_dtype: of a heavy node's input.
        flops: of a row.
        rows: those that are there. A stored node has all of them, and no inputs.
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
    rows: Rows | None = None

    @property
    def row_bytes(self) -> int:
        return self.row_elements * self.dtype.itemsize

    @property
    def row_elements(self) -> int:
        return self.size[0] * self.size[2] * self.size[3]

    @property
    def piece(self) -> int:
        """Rows that light operations work on at a time."""
        return max(1, PIECE // (4 * self.row_elements))

    @property
    def depth(self) -> int:
        return self.size[1]

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a to b, (1, C, b - a, H, W). Of the heavy nodes, what they depend on has to be there."""
        if self.rows is not None:
            return self.rows.read(a, b)
        needs = zip(self.inputs, self.needs(a, b), strict=True)
        return self.compute([node.read(*rows) for node, rows in needs], a, b)

    def gather(self, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows a to b in one tensor, zeros outside of the volume; piece by piece, to hold little beside."""
        low, high = max(a, 0), min(b, self.depth)
        if self.rows is not None and (low, high) == (a, b):
            return self.read(a, b).to(dtype)
        channels, _, height, width = self.size
        result = torch.empty((1, channels, b - a, height, width), dtype=dtype, device=self.run.device)
        result[:, :, : low - a] = 0
        result[:, :, high - a :] = 0
        for p, q in self.pieces(low, high):
            result[:, :, p - a : q - a] = self.read(p, q)
        return result

    def pieces(self, a: int, b: int) -> Iterator[tuple[int, int]]:
        """Rows a to b in steps of about `PIECE` bytes."""
        for p in range(a, b, self.piece):
            yield p, min(p + self.piece, b)

    def store(self, rows: Rows) -> None:
        """Have all rows; what they were computed from is let go."""
        self.rows, self.inputs, self.needs, self.compute, self.heavy = rows, [], None, None, False


class Volume(torch.Tensor):
    """A (1, C, D, H, W) tensor that is a `Node`. What it does not know is done on the whole tensor."""

    @staticmethod
    def __new__(cls, node: Node):
        volume = torch.Tensor._make_wrapper_subclass(
            cls, (1, *node.size), dtype=node.dtype, device=node.run.device
        )
        volume.node = node
        return volume

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        about = getattr(getattr(func, "__self__", None), "__name__", None) in PROPERTIES
        if func in METHODS or (about and func.__name__ == "__get__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if (make := LAZY.get(name)) and (node := make(func, args, kwargs)):
            return Volume(node)
        if name.endswith("_") and not name.endswith("__"):
            raise NotImplementedError(f"{name} in place on a volume that is computed in slabs")
        return func(*_whole(args), **_whole(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on a volume that is computed in slabs")


PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
METHODS = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


def leaf(run, tensor: torch.Tensor) -> Node:
    """The node of a (1, C, D, H, W) tensor that is there."""
    rows = Rows(run.device)
    rows.append(0, tensor)
    run.hold(rows)
    return Node(run, tensor.shape[1:], tensor.dtype, rows=rows)


def _whole(value):
    """Arguments with whole tensors in place of volumes."""
    if isinstance(value, Volume):
        return value.node.run.whole(value.node)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_whole, value))
    return {key: _whole(one) for key, one in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------- operations


def _pointwise(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """An operation on each voxel alone: any of `POINTWISE` on volumes of one grid, numbers and tensors of a
    single voxel."""
    flat = [*args[0]] if isinstance(args[0], (list, tuple)) else [*args]
    run = next(one.node.run for one in flat if isinstance(one, Volume))
    grid = next(one.shape[2:] for one in flat if isinstance(one, Volume))
    nodes = {}
    for i, one in enumerate(flat):
        if not isinstance(one, torch.Tensor):
            continue
        if one.ndim == 5 and one.shape[2:] == grid:
            nodes[i] = one.node if isinstance(one, Volume) else leaf(run, one)
        elif isinstance(one, Volume) or one.shape[2:].numel() != 1:
            return None
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    if any(isinstance(value, torch.Tensor) for value in kwargs.values()) or kwargs.get("training"):
        return None

    def apply(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        new = list(flat)
        for i, tensor in zip(nodes, tensors, strict=True):
            new[i] = tensor
        return func(new, *args[1:], **kwargs) if isinstance(args[0], (list, tuple)) else func(*new, **kwargs)

    probe = apply([_probe(node) for node in nodes.values()])
    if probe.shape[2:] != (2, 1, 1):
        return None
    return Node(
        run,
        (probe.shape[1], *grid),
        probe.dtype,
        list(nodes.values()),
        needs=lambda a, b: [(a, b)] * len(nodes),
        compute=lambda tensors, a, b: apply(tensors),
    )


def _probe(node: Node) -> torch.Tensor:
    """A small tensor like a node's: what an operation makes of it tells channels and dtype."""
    return torch.zeros((1, node.size[0], 2, 1, 1), dtype=node.dtype, device=node.run.device)


def _bound(names: str, args: Sequence, kwargs: dict) -> dict:
    """Arguments by their names."""
    return dict(zip(names.split(), args, strict=False)) | kwargs


def _group_norm(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """Normalise by mean and variance of each group over the whole volume, which are computed here."""
    bound = _bound("input num_groups weight bias eps", args, kwargs)
    node, groups = bound["input"].node, bound["num_groups"]
    weight, bias, eps = bound.get("weight"), bound.get("bias"), bound.get("eps", 1e-5)
    dtype = F.group_norm(_probe(node), groups, weight, bias, eps).dtype
    mean, variance = node.run.moments(node, groups)
    exact = torch.float64 if node.dtype == torch.float64 else torch.float32
    scale = (variance + eps).rsqrt().repeat_interleave(node.size[0] // groups)
    shift = -mean.repeat_interleave(node.size[0] // groups) * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    scale, shift = (one.to(exact)[:, None, None, None] for one in (scale, shift))
    return Node(
        node.run,
        node.size,
        dtype,
        [node],
        needs=lambda a, b: [(a, b)],
        compute=lambda tensors, a, b: torch.addcmul(shift, tensors[0].to(exact), scale).to(dtype),
    )


def _interpolate(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """Enlarge by whole factors, to the nearest voxel or linearly."""
    bound = _bound("input size scale_factor mode align_corners", args, kwargs)
    node, mode = bound["input"].node, bound.get("mode", "nearest")
    factors = bound.get("scale_factor")
    factors = factors if isinstance(factors, (list, tuple)) else [factors] * 3
    if (
        bound.get("size") is not None
        or any(factor is None or factor != int(factor) for factor in factors)
        or mode not in ("nearest", "nearest-exact", "trilinear")
        or bound.get("align_corners")
    ):
        return None
    factor, reach = int(factors[0]), int(mode == "trilinear")  # a linear one looks at its neighbours, too
    channels, depth, height, width = node.size

    def needs(a: int, b: int) -> list[tuple[int, int]]:
        return [(max(0, a // factor - reach), min(depth, (b - 1) // factor + 1 + reach))]

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        larger = F.interpolate(tensors[0], scale_factor=tuple(map(float, factors)), mode=mode)
        return larger.narrow(2, a - needs(a, b)[0][0] * factor, b - a)

    size = (channels, depth * factor, height * int(factors[1]), width * int(factors[2]))
    return Node(node.run, size, node.dtype, [node], needs=needs, compute=compute)


def _pad(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """Put a constant around the volume."""
    bound = _bound("input pad mode value", args, kwargs)
    pad, value = [*bound["pad"]], bound.get("value") or 0
    if bound.get("mode", "constant") != "constant" or len(pad) > 6 or min(pad) < 0:
        return None
    left, right, top, bottom, front, back = pad + [0] * (6 - len(pad))
    node = bound["input"].node
    channels, depth, height, width = node.size

    def needs(a: int, b: int) -> list[tuple[int, int]]:
        low = min(max(0, a - front), depth - 1)  # a row at least, to pad from
        return [(low, max(low + 1, min(depth, b - front)))]

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        low, high = needs(a, b)[0]
        ends = (low - (a - front), (b - front) - high)  # negative where that row is not asked for
        return F.pad(tensors[0], (left, right, top, bottom, *ends), value=value)

    size = (channels, depth + front + back, height + top + bottom, width + left + right)
    return Node(node.run, size, node.dtype, [node], needs=needs, compute=compute)


def _conv(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """torch.conv3d: zeros stand beyond the first and last row of the volume, real rows within."""
    bound = _bound("input weight bias stride padding dilation groups", args, kwargs)
    if isinstance(bound.get("padding"), str):
        return None
    node, weight, bias = bound["input"].node, bound["weight"], bound.get("bias")
    stride, dilation = _triple(bound.get("stride", 1)), _triple(bound.get("dilation", 1))
    padding, groups = _triple(bound.get("padding", 0)), bound.get("groups", 1)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        return torch.conv3d(tensors[0], weight, bias, stride, (0, *padding[1:]), dilation, groups)

    sides = zip(node.size[1:], padding, reach, stride, strict=True)
    grid = [(n + 2 * p - r) // s + 1 for n, p, r, s in sides]
    return _heavy(
        node,
        (len(weight), *grid),
        needs=lambda a, b: [(a * stride[0] - padding[0], (b - 1) * stride[0] - padding[0] + reach[0])],
        compute=compute,
        flops=2 * weight[0].numel() * len(weight) * grid[1] * grid[2],
    )


def _conv_transpose(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """torch.conv_transpose3d: output row i * stride - padding + j * dilation has input row i times kernel
    row j."""
    bound = _bound("input weight bias stride padding output_padding groups dilation", args, kwargs)
    node, weight, bias = bound["input"].node, bound["weight"], bound.get("bias")
    stride, dilation = _triple(bound.get("stride", 1)), _triple(bound.get("dilation", 1))
    padding, extra = _triple(bound.get("padding", 0)), _triple(bound.get("output_padding", 0))
    groups, depth = bound.get("groups", 1), node.depth
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]

    def needs(a: int, b: int) -> list[tuple[int, int]]:
        low = min(max(0, -(-(a + padding[0] - reach[0] + 1) // stride[0])), depth - 1)
        return [(low, max(low + 1, min(depth, (b - 1 + padding[0]) // stride[0] + 1)))]

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        rows = torch.conv_transpose3d(
            tensors[0], weight, bias, stride, (0, *padding[1:]), extra, groups, dilation
        )
        return rows.narrow(2, a + padding[0] - needs(a, b)[0][0] * stride[0], b - a)

    sides = zip(node.size[1:], stride, padding, reach, extra, strict=True)
    grid = [(n - 1) * s - 2 * p + r + e for n, s, p, r, e in sides]
    return _heavy(
        node,
        (weight.shape[1] * groups, *grid),
        needs=needs,
        compute=compute,
        flops=2 * weight.numel() * node.size[2] * node.size[3] * depth / grid[0],
    )


def _heavy(node: Node, size: Sequence[int], **about) -> Node:
    """The node of a convolution, which autocast may run in another dtype."""
    kind = node.run.device.type
    cast = torch.is_autocast_enabled(kind) and node.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if cast else node.dtype
    return Node(node.run, size, dtype, [node], heavy=True, input_dtype=dtype, **about)


def _triple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value) * (3 // len(value))


POINTWISE = """
    add sub mul div neg pow exp log sqrt square abs clamp sigmoid tanh relu silu leaky_relu elu gelu selu celu
    softplus mish hardswish hardsigmoid hardtanh relu6 prelu dropout dropout3d cat float double half
    bfloat16 to type contiguous clone detach __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__
    __neg__ __pow__ true_divide rsub
"""
LAZY = {name: _pointwise for name in POINTWISE.split()} | {
    "group_norm": _group_norm,
    "interpolate": _interpolate,
    "pad": _pad,
    "conv3d": _conv,
    "conv_transpose3d": _conv_transpose,
}


# ---------------------------------------------------------------- sweeps


class Sweep:
    """Volumes of one grid, computed together from the first row to the last, each heavy node's rows once.

    A heavy node keeps the rows that are still to be read, and no more.
    """

    def __init__(self, tops: Sequence[Node]):
        self.tops, self.nodes = tops, []  # inputs before what reads them
        seen = set()

        def visit(node: Node) -> None:
            if node not in seen:
                seen.add(node)
                for one in node.inputs:
                    visit(one)
                self.nodes.append(node)

        for top in tops:
            visit(top)
        self.heavy = [node for node in self.nodes if node.heavy]

    @property
    def flops(self) -> float:
        return sum(node.flops * node.depth for node in self.heavy)

    def slabs(self, thickness: int) -> Iterator[tuple[int, int]]:
        """Steps a to b of so many rows; at each, rows a to b of the tops can be read."""
        done, depth = dict.fromkeys(self.heavy, 0), self.tops[0].depth
        for node in self.heavy:
            node.rows = Rows(node.run.device)
        for a in range(0, depth, thickness):
            b = min(a + thickness, depth)
            for node, (low, high) in self._due(a, b, done):
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
        """What the slabs take at most, without what is stored before or after.

        Beside its input and output a convolution is granted as much again: libraries bring both into a
        layout of their own.
        """
        done, depth, most = dict.fromkeys(self.heavy, 0), self.tops[0].depth, 0
        there = dict.fromkeys(self.heavy, (0, 0))

        def live() -> int:
            return sum(node.row_bytes * (high - low) for node, (low, high) in there.items())

        most_rows = 4 * (thickness + 4)
        rows = [4 * node.row_elements * min(node.piece, node.depth, most_rows) for node in self.nodes]
        piece = CHAIN * max(rows)
        for a in range(0, min(depth, 6 * thickness), thickness):
            b = min(a + thickness, depth)
            for node, (low, high) in self._due(a, b, done):
                ((first, last),) = node.needs(low, high)
                elements = [node.inputs[0].row_elements * (last - first), node.row_elements * (high - low)]
                if max(elements) > MOST_ELEMENTS and thickness > 1:
                    return math.inf
                most = max(most, live() + 2 * sum(elements) * node.input_dtype.itemsize + piece)
                there[node] = (there[node][0], high)
                done[node] = high
                for one, first in self._unread(a, done):
                    there[one] = (min(max(first, there[one][0]), there[one][1]), there[one][1])
            most = max(most, live() + sum(top.row_bytes for top in self.tops) * (b - a) + piece)
            for one, first in self._unread(b, done):
                there[one] = (min(max(first, there[one][0]), there[one][1]), there[one][1])
        return most

    def _due(self, a: int, b: int, done: dict[Node, int]) -> list[tuple[Node, tuple[int, int]]]:
        """The rows that each heavy node has to compute before rows a to b of the tops can be read."""
        asked, due = {top: (a, b) for top in self.tops}, []
        for node in reversed(self.nodes):
            if node not in asked:
                continue
            low, high = asked[node]
            if node.heavy:
                low = max(low, done[node])
                if low >= high:
                    continue
                due.append((node, (low, high)))
            needs = node.needs(low, high) if node.inputs else []
            for one, (first, last) in zip(node.inputs, needs, strict=True):
                first, last = max(first, 0), min(last, one.depth)
                before = asked.get(one, (first, last))
                asked[one] = (min(first, before[0]), max(last, before[1]))
        return due[::-1]

    def _unread(self, row: int, done: dict[Node, int]) -> list[tuple[Node, int]]:
        """The first row of each heavy node that is still to be read, when the tops are read up to `row`."""
        first = dict.fromkeys(self.nodes, math.inf) | dict.fromkeys(self.tops, row)
        for node in reversed(self.nodes):
            start = done[node] if node.heavy else first[node]
            if start < node.depth and node.inputs:
                for one, (low, _) in zip(node.inputs, node.needs(start, start + 1), strict=True):
                    first[one] = min(first[one], max(low, 0))
        return [(node, min(first[node], node.depth)) for node in self.heavy]
