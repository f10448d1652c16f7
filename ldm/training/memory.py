"""Estimate the peak memory of a computation: it runs on tensors without values, and every allocation is
counted.

    with Meter(like_gpu=True) as meter:
        network = build()
        meter.hold("weights", network)
        with meter.phase("training"):
            network(images).mean().backward()
    meter.peaks["training"].total

torch's MemTracker counts in the same way, but fails in a step that calls one network twice, as the
adversarial step does.
"""

import contextlib
import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ldm import Failure, UserError, brief
from ldm.losses import missing_package
from ldm.models.definitions import downsampling_factor, network_divisor
from ldm.system.ranks import Run, amp_dtype
from ldm.training.step import Optimizer

GB = 1e9  # bytes: a card sold as 16 GB has 17.2e9 less what its driver takes
BLOCK = 512  # bytes, to which the allocator of a GPU rounds up
PARTS = ("weights", "gradients", "optimiser", "averaged weights", "activations", "workspace")

# Their workspace is counted as one copy of input, weight and output, in oneDNN and in cuDNN, which changes
# the memory layout (an allowance, NOT measured on a GPU: benchmarks/memory.py).
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

# Operators that autocast computes in float32 on CUDA, and in the type of its inputs on a CPU (torch's
# autocast_mode.h).
FLOAT32_ON_CUDA = (
    "group_norm", "layer_norm", "rms_norm", "softmax.int", "log_softmax.int", "softplus", "exp", "expm1",
    "log", "log2", "log10", "log1p", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "reciprocal",
    "rsqrt", "sum", "sum.dim_IntList", "cumsum", "logsumexp", "linalg_vector_norm", "cosine_similarity",
    "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d",
)  # fmt: skip


class ForecastError(Failure):
    """The memory of a computation cannot be estimated. It may run nevertheless."""


@contextlib.contextmanager
def forecasting() -> Iterator[None]:
    """Turn every exception of a rehearsal but a `UserError` into a `ForecastError`.

    A network's code runs here on tensors without values and may raise anything where it needs one. None of
    it shows that the real computation would fail.
    """
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error, UserError) else error
        if cause is not error and type(cause).__module__ != FakeTensorMode.__module__:
            raise  # the user's error; else a network that cannot be built without values
        reason = f"{type(cause).__name__}: {brief(cause)}"
        raise ForecastError(f"the memory cannot be estimated ({reason})") from None


@contextlib.contextmanager
def cuda_autocast_rules() -> Iterator[None]:
    """Within, autocast on a CPU computes in float32 the operators that it does on CUDA."""
    library = torch.library.Library("aten", "IMPL")
    for name in FLOAT32_ON_CUDA:
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        library.impl(name, _in_float32(op), "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def _in_float32(op: Callable) -> Callable:
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            args, kwargs = tree_map_only(torch.Tensor, widen, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


@dataclass(frozen=True)
class Peak:
    """Bytes by part (`PARTS`) at the moment of the highest total."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """Without the libraries' workspace, which is an allowance. Less memory than this cannot suffice."""
        return self.total - self.parts["workspace"]


class Meter(TorchDispatchMode):
    """Within, tensors have no values; the memory that they would take is counted in `peaks`, {phase: Peak}.
    Networks have to be built within.

    Args:
        like_gpu: count with autocast's rules, the allocator's blocks and the workspace of a GPU; else of this
            CPU. The tensors' device is the CPU in both cases.
        ranks: with more than one, DDP keeps the gradients from step to step.
    """

    def __init__(self, like_gpu: bool, ranks: int = 1):
        super().__init__()
        self.like_gpu, self.ranks, self.peaks = like_gpu, ranks, {}
        self.live = dict.fromkeys(PARTS, 0)
        self.storages = {}  # id: [part, bytes, weak reference]
        self.highest = None  # the peak so far of the phase that runs

    def __enter__(self) -> "Meter":
        with contextlib.ExitStack() as context:
            enter = context.enter_context
            enter(torch.inference_mode(False))  # in which autocast would be skipped
            enter(torch.random.fork_rng(devices=[]))
            enter(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            if self.like_gpu:
                enter(cuda_autocast_rules())
            enter(FakeTensorMode(allow_non_fake_inputs=True))
            # torch cannot move fake modules, and they need not be moved.
            enter(mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module))
            self.context = context.pop_all()
        return super().__enter__()

    def __exit__(self, kind, error, traceback) -> None:
        super().__exit__(kind, error, traceback)
        self.context.close()

    def hold(self, part: str, *modules: nn.Module | None) -> None:
        """Count the parameters and buffers of these modules as `part`."""
        for module in filter(None, modules):
            for tensor in [*module.parameters(), *module.buffers()]:
                self._count(tensor, part)

    def hold_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Take a first step, after which the optimisers have their state; count state and gradients."""
        for optimizer in optimizers:
            for parameter in optimizer.parameters:
                parameter.register_post_accumulate_grad_hook(lambda p: self._count(p.grad, "gradients"))
            self._fill_gradients(optimizer)
            optimizer.scaler.scale(optimizer.norm)  # the first call makes the scale, in fp16
            take_steps([optimizer])
            for tensor in tree_leaves([dict(state) for state in optimizer.state.values()]):
                self._count(tensor, "optimiser")
            if self.ranks > 1 or optimizer.section["accumulate_steps"] > 1:
                self._fill_gradients(optimizer)  # of the batches before the last

    def _fill_gradients(self, optimizer: Optimizer) -> None:
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
            self._count(parameter.grad, "gradients")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Keep the peak of the computation within as `peaks[name]`."""
        self.highest = Peak(dict(self.live))
        yield
        self.peaks[name], self.highest = self.highest, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # which optimisers ask thousands of times
            return torch.device("cpu")
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            self._count(tensor)
        tensors = tree_leaves((args, result)) if func in CONVOLUTIONS else ()
        self._note(sum(x.nbytes for x in filter(torch.is_tensor, tensors)))
        return result

    def _note(self, workspace: int = 0) -> None:
        """Keep the present memory if it is the highest so far in this phase."""
        if self.highest and sum(self.live.values()) + workspace >= self.highest.total:
            self.highest = Peak({**self.live, "workspace": workspace})

    def _count(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Count a tensor's storage once, as `part` or as activations; or move it to another part."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.storages:
            size = storage.nbytes()
            size = -(-size // BLOCK) * BLOCK if self.like_gpu else size
            self.storages[key] = ["activations", size, weakref.ref(storage, lambda _: self._forget(key))]
            self.live["activations"] += size
        counted = self.storages[key]
        if part and part != counted[0]:
            self.live[counted[0]] -= counted[1]
            self.live[part] += counted[1]
            counted[0] = part
            self._note()

    def _forget(self, key: int) -> None:
        part, size, _ = self.storages.pop(key)
        self.live[part] -= size


def half_precision(gpu: bool) -> torch.dtype | None:
    """The type of mixed precision on this machine's GPU (without one: bf16), or on this CPU."""
    if gpu and not torch.cuda.is_available():
        return torch.bfloat16
    return amp_dtype(torch.device("cuda" if gpu else "cpu"))


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that are free for this process, and the GPU's total; None on a CPU."""
    if device.type != "cuda":
        return None
    free, everything = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device), everything


def take_steps(optimizers: Sequence[Optimizer]) -> None:
    """Step with the present gradients at a learning rate of 0, and clear them."""
    for optimizer in optimizers:
        optimizer.clip()
        optimizer.step(0.0, torch.zeros((), device=optimizer.norm.device))


def table(peaks: dict[str, Peak]) -> str:
    """The parts of each phase's peak in GB of 10^9 bytes, the largest phase first."""
    peaks = dict(sorted(peaks.items(), key=lambda item: -item[1].total))
    rows = [(part, [peak.parts[part] for peak in peaks.values()]) for part in PARTS]
    rows = [row for row in rows if any(row[1])] + [("peak", [peak.total for peak in peaks.values()])]
    lines = [f"{'GB':<18}" + "".join(f"{name:>12}" for name in peaks)]
    return "\n".join(lines + [f"{what:<18}" + "".join(f"{n / GB:>12.2f}" for n in row) for what, row in rows])


def highest(peaks: dict[str, Peak]) -> Peak:
    """The peak of the phase that takes most."""
    return max(peaks.values(), key=lambda peak: peak.total)


@dataclass(frozen=True)
class Forecast:
    """The peaks of a training script under a config, and of the same with a key changed.

    Args:
        rehearse: `(config, sizes, meter, run)`: builds and computes within the meter what the script does, in
            phases.
        stage: the config's section, such as "autoencoder_train".
        sizes: in voxels: stage 1's patches, the volumes that stage 2 encodes, those that stage 1 is validated
            on. They are used where the config leaves one open.
        gpu: estimate for a GPU, else for this CPU.
        half: the type of mixed precision; None where there is none.
        ranks: processes that train together. The peaks are those of each process.
    """

    rehearse: Callable
    stage: str
    sizes: Sequence[Sequence[int]]
    gpu: bool
    half: torch.dtype | None
    ranks: int = 1

    def peaks(self, config: dict) -> dict[str, Peak]:
        """{phase: Peak}.

        Raises:
            ForecastError: they cannot be estimated.
            UserError: the networks cannot take the sizes.
        """
        first, second = config["autoencoder_train"], config["diffusion_train"]
        own = first["patch_size"], second["patch_size"], first["val_patch_size"]
        sizes = [mine or size for mine, size in zip(own, self.sizes, strict=True)]
        meter = Meter(self.gpu, self.ranks)
        run = Run(0, 1, torch.device("cpu"), self.half if config[self.stage]["amp"] else None)
        with forecasting():
            self.rehearse(config, sizes, meter, run)
        return meter.peaks

    def savings(self, config: dict, peaks: dict[str, Peak]) -> dict[str, int]:
        """{`key=value ...`: bytes of the peak with it}, the lowest first, of changes that lower the peak."""
        found, now = {}, highest(peaks).total
        for change in self._changes(config, max(peaks, key=lambda name: peaks[name].total)):
            changed = config | {self.stage: config[self.stage] | change}
            words = [f"{self.stage}.{key}={json.dumps(value)}" for key, value in change.items()]
            with contextlib.suppress(UserError, ForecastError):  # too small for a network
                found[" ".join(words).replace(", ", ",")] = highest(self.peaks(changed)).total
        lower = sorted(found.items(), key=lambda item: item[1])
        return {words: total for words, total in lower if total < now}

    def _changes(self, config: dict, phase: str) -> list[dict]:
        """Keys that may lower the peak of this phase."""
        section, (patch, volume, shown) = config[self.stage], self.sizes
        batch, steps, divisor = section["batch_size"], section["accumulate_steps"], network_divisor(config)
        first = self.stage == "autoencoder_train"
        if first:
            volume, divisor = patch, downsampling_factor(config["autoencoder_def"])
        smaller = [max(n, side * 3 // 4 // n * n) for side, n in zip(volume, divisor, strict=True)]
        batched = phase == "training" or (phase == "validation" and not first)
        options = [
            (not section["amp"] and self.half, {"amp": True}),
            (phase == "training" and not section["gradient_checkpointing"], {"gradient_checkpointing": True}),
            (batch > 1 and batched, {"batch_size": 1, "accumulate_steps": batch * steps}),
            (section["ema_decay"] and phase != "encoding", {"ema_decay": 0}),
            (phase == "sampling", {"sample_interval": 0}),
            (first and phase == "validation" and list(shown) != list(patch), {"val_patch_size": list(patch)}),
            ("patch_size" in section and (first or not config["data"]["sizes"]), {"patch_size": smaller}),
        ]
        return [change for helps, change in options if helps]


def listed(lower: dict[str, int]) -> str:
    """Savings as text: `key=value (peak), or ...`."""
    return ", or ".join(f"{words} ({peak / GB:.1f} GB)" for words, peak in lower.items())


def report(
    peaks: dict[str, Peak],
    lower: dict[str, int],
    gpu: bool,
    half: torch.dtype | None,
    batch: int,
    size: Sequence,
) -> str:
    """The text of a dry run: the conditions, the table, and what would lower the peak."""
    where, size = "a GPU" if gpu else "this CPU", " x ".join(map(str, size))
    text = (
        f"estimated for {where}: batch size {batch}, {size} voxels, {half or torch.float32}\n{table(peaks)}"
    )
    return text + f"\nto lower it: {listed(lower)}" * bool(lower)


def training_report(
    rehearse: Callable, config: dict, stage: str, sizes: Sequence, gpu: bool, world_size: int
) -> str:
    """What a dry run of a training script prints; arguments as of `Forecast`.

    Raises:
        ForecastError: the peaks cannot be estimated.
    """
    section, note = config[stage], ""
    if section.get("perceptual_weight") and (missing := missing_package(section["perceptual_network"])):
        note = f"not counted: the perceptual network. {missing}\n"
        section = section | {"perceptual_weight": 0.0}
        config = config | {stage: section}
    forecast = Forecast(rehearse, stage, sizes, gpu, half_precision(gpu), world_size)
    peaks = forecast.peaks(config)
    half, size = forecast.half if section["amp"] else None, sizes[stage != "autoencoder_train"]
    lower = forecast.savings(config, peaks)
    return note + report(peaks, lower, gpu, half, section["batch_size"], size)


def check_fits(rehearse: Callable, config: dict, stage: str, sizes: Sequence, run: Run) -> None:
    """On GPUs: warn where the estimated peak is more than is free on any, or cannot be estimated.

    Memory that is in use may be free before the peak, and the libraries' workspace is an allowance: neither
    refuses a training.

    Raises:
        UserError: the tensors alone are more than a whole GPU. Not on Windows, whose driver may put them into
            main memory, nor where the networks are compiled, which may keep fewer.
    """
    memories = run.gather(gpu_memory(run.device))
    if None in memories:
        return
    free, everything = (min(values) for values in zip(*memories, strict=True))

    def check() -> None:
        forecast = Forecast(rehearse, stage, sizes, True, amp_dtype(run.device), run.world_size)
        try:
            peaks = forecast.peaks(config)
        except (ForecastError, UserError) as error:
            # Also a UserError: without values a check may fail that passes with them.
            run.print(f"warning: no memory forecast: {brief(error)}. The training continues without it.")
            return
        peak = highest(peaks)
        if peak.total <= free:
            return
        lower = listed(forecast.savings(config, peaks)) or "smaller networks"
        needs = f"{stage}: expected peak {peak.total / GB:.1f} GB"
        total = f"{everything / GB:.1f} GB"
        if peak.tensors > everything and not config[stage]["compile"] and os.name != "nt":
            raise UserError(f"{needs}, but the GPU has {total} in all.\nTo lower it: {lower}")
        run.print(
            f"warning: {needs}. Of the GPU's {total} {free / GB:.1f} are free now.\nTo lower it: {lower}"
        )

    run.from_main(check)
