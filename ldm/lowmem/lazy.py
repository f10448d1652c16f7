"""A tensor that records the operations on it, to compute them in slabs later (`ldm.lowmem.slabs`)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ldm.lowmem.slabs import Node, Rows


class LazyVolume(torch.Tensor):
    """A (1, C, D, H, W) tensor that stands for a `Node`. Operations not in `LAZY` run on the whole tensor."""

    @staticmethod
    def __new__(cls, node: Node):
        like = {"dtype": node.dtype, "device": node.run.device}
        volume = torch.Tensor._make_wrapper_subclass(cls, (1, *node.size), **like)
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
            node.compute = _with_current_autocast(node.compute, node.run.device.type)
            return LazyVolume(node)
        if name.endswith("_") and not name.endswith("__"):
            raise NotImplementedError(f"{name} in place on a volume that is computed in slabs")
        return func(*_whole(args), **_whole(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on a volume that is computed in slabs")


PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
METHODS = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


def _with_current_autocast(compute: Callable, kind: str) -> Callable:
    """Compute later under the autocast of now."""
    context = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

    def later(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        with torch.autocast(kind, **context):
            return compute(tensors, a, b)

    return later


def leaf(run, tensor: torch.Tensor) -> Node:
    """The node of a (1, C, D, H, W) tensor."""
    rows = Rows(run.device)
    rows.append(0, tensor)
    run.hold(rows)
    return Node(run, tensor.shape[1:], tensor.dtype, rows=rows)


def _whole(value):
    """Arguments with whole tensors in place of lazy ones."""
    if isinstance(value, LazyVolume):
        return value.node.run.whole(value.node)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_whole, value))
    return {key: _whole(one) for key, one in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------- operations


def _pointwise(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """An operation of `POINTWISE` on volumes of one grid, numbers, and tensors of a single voxel."""
    listed = isinstance(args[0], (list, tuple))
    flat, nodes = list(args[0] if listed else args), {}
    first = next(one for one in flat if isinstance(one, LazyVolume))
    run, grid = first.node.run, first.shape[2:]
    for i, one in enumerate(flat):
        if not isinstance(one, torch.Tensor):
            continue
        if one.ndim == 5 and one.shape[2:] == grid:
            nodes[i] = one.node if isinstance(one, LazyVolume) else leaf(run, one)
        elif isinstance(one, LazyVolume) or one.shape[2:].numel() != 1:
            return None
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    if any(isinstance(value, torch.Tensor) for value in kwargs.values()) or kwargs.get("training"):
        return None

    def apply(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        new = list(flat)
        for i, tensor in zip(nodes, tensors, strict=True):
            new[i] = tensor
        return func(new, *args[1:], **kwargs) if listed else func(*new, **kwargs)

    probe = apply([_probe(node) for node in nodes.values()])
    if probe.shape[2:] != (2, 1, 1):
        return None
    size, inputs = (probe.shape[1], *grid), list(nodes.values())
    needs, compute = lambda a, b: [(a, b)] * len(inputs), lambda tensors, a, b: apply(tensors)
    return Node(run, size, probe.dtype, inputs, needs, compute)


def _probe(node: Node) -> torch.Tensor:
    """A small tensor like a node's, by which channels and dtype of an operation's result are found."""
    return torch.zeros((1, node.size[0], 2, 1, 1), dtype=node.dtype, device=node.run.device)


def _by_name(names: str, args: Sequence, kwargs: dict) -> dict:
    """Arguments by their names."""
    return dict(zip(names.split(), args, strict=False)) | kwargs


def _group_norm(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """Normalise by mean and variance of each group over the whole volume. They are computed here."""
    bound = _by_name("input num_groups weight bias eps", args, kwargs)
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

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        return torch.addcmul(shift, tensors[0].to(exact), scale).to(dtype)

    return Node(node.run, node.size, dtype, [node], lambda a, b: [(a, b)], compute)


def _interpolate(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """Nearest or trilinear interpolation by whole factors."""
    bound = _by_name("input size scale_factor mode align_corners", args, kwargs)
    node, mode = bound["input"].node, bound.get("mode", "nearest")
    factors = bound.get("scale_factor")
    factors = factors if isinstance(factors, (list, tuple)) else [factors] * 3
    whole = all(factor is not None and factor == int(factor) for factor in factors)
    known = mode in ("nearest", "nearest-exact", "trilinear") and not bound.get("align_corners")
    if not (whole and known):
        return None
    factor, reach = int(factors[0]), int(mode == "trilinear")  # which reads the neighbours
    channels, depth, height, width = node.size

    def needs(a: int, b: int) -> list[tuple[int, int]]:
        return [(max(0, a // factor - reach), min(depth, (b - 1) // factor + 1 + reach))]

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        larger = F.interpolate(tensors[0], scale_factor=tuple(map(float, factors)), mode=mode)
        return larger.narrow(2, a - needs(a, b)[0][0] * factor, b - a)

    size = (channels, depth * factor, height * int(factors[1]), width * int(factors[2]))
    return Node(node.run, size, node.dtype, [node], needs=needs, compute=compute)


def _pad(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """Pad with a constant."""
    bound = _by_name("input pad mode value", args, kwargs)
    pad, value = [*bound["pad"]], bound.get("value") or 0
    if bound.get("mode", "constant") != "constant" or len(pad) > 6 or min(pad) < 0:
        return None
    left, right, top, bottom, front, back = pad + [0] * (6 - len(pad))
    node = bound["input"].node
    channels, depth, height, width = node.size

    def needs(a: int, b: int) -> list[tuple[int, int]]:
        low = min(max(0, a - front), depth - 1)  # at least one row
        return [(low, max(low + 1, min(depth, b - front)))]

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        start = a - front - needs(a, b)[0][0]
        inside = tensors[0][:, :, max(start, 0) : max(start + b - a, 0)]
        before = min(max(front - a, 0), b - a)
        ends = (before, b - a - before - inside.shape[2])
        return F.pad(inside, (left, right, top, bottom, *ends), value=value)

    size = (channels, depth + front + back, height + top + bottom, width + left + right)
    return Node(node.run, size, node.dtype, [node], needs=needs, compute=compute)


def _conv(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """torch.conv3d, zero-padded at the first and last row of the volume only."""
    bound = _by_name("input weight bias stride padding dilation groups", args, kwargs)
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
    return _convolution(
        node,
        (len(weight), *grid),
        needs=lambda a, b: [(a * stride[0] - padding[0], (b - 1) * stride[0] - padding[0] + reach[0])],
        compute=compute,
        flops=2 * weight.numel() * grid[1] * grid[2],
        weight_bytes=weight.nbytes,
    )


def _conv_transpose(func: Callable, args: Sequence, kwargs: dict) -> Node | None:
    """torch.conv_transpose3d: output row i * stride - padding + j * dilation has input row i times kernel
    row j."""
    bound = _by_name("input weight bias stride padding output_padding groups dilation", args, kwargs)
    node, weight, bias = bound["input"].node, bound["weight"], bound.get("bias")
    stride, dilation = _triple(bound.get("stride", 1)), _triple(bound.get("dilation", 1))
    padding, extra = _triple(bound.get("padding", 0)), _triple(bound.get("output_padding", 0))
    groups, depth = bound.get("groups", 1), node.depth
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    behind = (max(extra[0], stride[0] - reach[0]), *extra[1:])  # rows that no input row reaches

    def needs(a: int, b: int) -> list[tuple[int, int]]:
        low = max(0, -(-(a + padding[0] - reach[0] + 1) // stride[0]))
        low = min(low, (a + padding[0]) // stride[0], depth - 1)  # where no input row reaches this one
        return [(low, max(low + 1, min(depth, (b - 1 + padding[0]) // stride[0] + 1)))]

    def compute(tensors: Sequence[torch.Tensor], a: int, b: int) -> torch.Tensor:
        rows = torch.conv_transpose3d(
            tensors[0], weight, bias, stride, (0, *padding[1:]), behind, groups, dilation
        )
        return rows.narrow(2, a + padding[0] - needs(a, b)[0][0] * stride[0], b - a)

    sides = zip(node.size[1:], stride, padding, reach, extra, strict=True)
    grid = [(n - 1) * s - 2 * p + r + e for n, s, p, r, e in sides]
    return _convolution(
        node,
        (weight.shape[1] * groups, *grid),
        needs=needs,
        compute=compute,
        flops=2 * weight.numel() * node.size[2] * node.size[3] * depth / grid[0],
        weight_bytes=weight.nbytes,
    )


def _convolution(node: Node, size: Sequence[int], **about) -> Node:
    """The node of a convolution, whose dtype autocast may change."""
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
