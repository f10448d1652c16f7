"""One step of training: learning rate, scaled backward, clipping, the step, averaged weights."""

import contextlib
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ldm import UserError
from ldm.training.muon import MOMENTUM_STATE, Muon

CONVOLUTIONS_AND_LINEAR = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def learning_rate(section: dict, world_size: int, progress: float, step: int, epoch: int) -> float:
    """The learning rate: a pure function, so that a resumed run needs no state for it."""
    rate = section["lr"] * (world_size if section["scale_lr"] else 1)
    if section["lr_schedule"] == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
    elif section["lr_schedule"] == "multistep":
        rate *= section["lr_gamma"] ** sum(epoch >= milestone for milestone in section["lr_milestones"])
    return rate * min(1.0, (step + 1) / (section["lr_warmup_steps"] + 1))


class Optimizer:
    """One optimiser: scaled backward, accumulation, clipping, and a step that can be skipped.

    It is Adam; or, by `optimizer: muon`, Muon for the weights of convolutions and linear layers, and Adam for
    the rest: biases, norms and embeddings.

    Args:
        network: the wrapped network, whose gradients are summed over ranks on the last of the accumulated
            batches.
    """

    def __init__(self, network: nn.Module, section: dict, amp_dtype: torch.dtype | None):
        self.network, self.section = network, section
        self.in_ddp = isinstance(network, DistributedDataParallel)
        # Checkpoints number the moments by the place of the parameter among all, frozen ones included.
        self.everything = dict(enumerate(network.parameters()))
        self.places = [i for i, p in self.everything.items() if p.requires_grad]
        self.parameters = [self.everything[i] for i in self.places]
        matrices = _matrices(network) if section["optimizer"] == "muon" else set()
        others = [p for p in self.parameters if p not in matrices]
        # The fused kernels, on a CPU too, read `found_inf` on the device: no one waits for it.
        self.adam = torch.optim.Adam(others, section["lr"], tuple(section["adam_betas"]), fused=True)
        self.muon = Muon([p for p in self.parameters if p in matrices], self.in_ddp) if matrices else None
        # The learning rate of Adam at its highest, of which Muon's rate follows the schedule.
        ranks = dist.get_world_size() if self.in_ddp and section["scale_lr"] else 1
        self.peak = section["lr"] * ranks
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self.norm = torch.zeros((), device=device)

    @property
    def rate(self) -> float:
        """Adam's learning rate of the last step."""
        return self.adam.param_groups[0]["lr"]

    @property
    def muon_rate(self) -> float:
        """Muon's learning rate of the last step."""
        return self.section["muon_lr"] * self.rate / self.peak

    @property
    def state(self) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
        """Moments, by parameter."""
        return {**self.adam.state, **(self.muon.state if self.muon else {})}

    def accumulating(self, last: bool):
        """Context of a forward and backward pass; ranks exchange gradients only on the last batch of a
        step."""
        return self.network.no_sync() if self.in_ddp and not last else contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one of the accumulated batches."""
        self.scaler.scale(loss / self.section["accumulate_steps"]).backward()

    def clip(self) -> torch.Tensor:
        """Unscale and clip the gradients; whether they are finite, a bool tensor on the device.

        With fp16 an overflow is no fault as long as the scaler has a scale to lower.
        """
        for one in filter(None, (self.adam, self.muon)):
            self.scaler.unscale_(one)
        limit = self.section["clip_grad_norm"]
        self.norm = nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else math.inf)
        scale = self.scaler.scale(torch.ones_like(self.norm))
        return self.norm.isfinite() | (scale > 1)

    def step(self, rate: float, skip: torch.Tensor) -> None:
        """Step at this learning rate of Adam unless `skip` (0 or 1, on the device) or an overflow forbids it;
        clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        skip = torch.maximum(skip.float(), (~self.norm.isfinite()).float())
        self.adam.found_inf, self.adam.grad_scale = skip, None
        self.adam.step()
        if self.muon:
            self.muon.step(self.muon_rate, skip)
        self.scaler.update()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        """State of optimiser and scaler."""
        state = self.state
        moments = {i: state[p] for i, p in zip(self.places, self.parameters, strict=True) if state.get(p)}
        (options,) = self.adam.state_dict()["param_groups"]
        return {
            "optimizer": {"state": moments, "param_groups": [{**options, "params": list(self.places)}]},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict, where: str) -> None:
        """Take up the state of a checkpoint: moments, scale and the last learning rate. The optimiser's
        options are those of the config.

        Raises:
            UserError: the state is not one of these parameters; `where` names it.
        """
        moments, (group,) = (state["optimizer"][key] for key in ("state", "param_groups"))
        # A parameter that no loss reaches has no state; one more, or another shape, is of other networks.
        if not all(i in self.everything and _fits(one, self.everything[i]) for i, one in moments.items()):
            raise UserError(
                f"{where}: the state of its optimiser does not fit the network in the config. Resume with "
                "the config that it was trained with, or start over with --fresh."
            )
        # Checkpoints of DDP may hold zeros for parameters that were not frozen yet and are now.
        kept = {p: moments[i] for i, p in zip(self.places, self.parameters, strict=True) if i in moments}
        of_muon = set(self.muon.weights if self.muon else ())
        # The fused kernels walk through parameter and moments as they lie in memory, and do not ask whether
        # they lie alike.
        for p, one in kept.items():
            optimizer = self.muon if p in of_muon else self.adam
            optimizer.state[p] = {key: _laid_out_like(p, value) for key, value in one.items()}
        self.adam.param_groups[0]["lr"] = group["lr"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _matrices(network: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon trains: those of convolutions and linear layers."""
    layers = [module for module in network.modules() if isinstance(module, CONVOLUTIONS_AND_LINEAR)]
    return {layer.weight for layer in layers if layer.weight.requires_grad}


def _fits(state: dict[str, torch.Tensor], parameter: torch.Tensor) -> bool:
    """Whether this is the state of such a parameter. The fused kernels do not ask, and read beyond it."""
    if MOMENTUM_STATE in state:
        momentum = state[MOMENTUM_STATE]
        return momentum.shape == parameter.shape and bool(momentum.isfinite().all())
    step, mean, square = (state[key] for key in ("step", "exp_avg", "exp_avg_sq"))
    return (
        step.shape == ()
        and mean.shape == square.shape == parameter.shape
        and all(bool(tensor.isfinite().all()) for tensor in (step, mean, square))
        and bool((square >= 0).all() and step >= 0)
    )


def _laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)  # the count of steps
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


class EMA(AveragedModel):
    """Exponential moving average of the weights. The first step copies them; then the decay rises with the
    steps, (1 + n) / (10 + n), up to `decay`. Buffers are those of the network.

    The count of steps lies on the device: a step that is voted out is not averaged, and no one waits to know.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, device=next(network.parameters()).device)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, skip: torch.Tensor) -> None:
        """Average the weights after a step, unless `skip` (0 or 1, on the device)."""
        n = self.n_averaged.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay) * (n > 0)
        weight = ((1 - decay) * (1 - skip)).float()
        averages, weights = list(self.module.parameters()), list(network.parameters())
        torch._foreach_lerp_(averages, weights, [weight] * len(weights))
        for average, buffer in zip(self.module.buffers(), network.buffers(), strict=True):
            average.copy_(torch.where(skip.bool(), average, buffer))
        self.n_averaged += (1 - skip).long()


def make_ema(network: nn.Module, decay: float) -> EMA | None:
    """The average of the weights; None where `decay` is 0."""
    return EMA(network, decay) if decay else None
