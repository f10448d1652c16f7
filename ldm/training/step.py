"""One step of training: learning rate, scaled backward, clipping, the step, averaged weights."""

import contextlib
import math

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ldm import UserError


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

    Args:
        network: the wrapped network, whose gradients are summed over ranks on the last of the accumulated
            batches.
    """

    def __init__(self, network: nn.Module, section: dict, amp_dtype: torch.dtype | None):
        self.network, self.section = network, section
        # Checkpoints number the moments by the place of the parameter among all, frozen ones included.
        self.everything = dict(enumerate(network.parameters()))
        self.places = [i for i, p in self.everything.items() if p.requires_grad]
        self.parameters = [self.everything[i] for i in self.places]
        # The fused kernels, on a CPU too, read `found_inf` on the device: no one waits for it.
        self.adam = torch.optim.Adam(self.parameters, section["lr"], tuple(section["adam_betas"]), fused=True)
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self.norm = torch.zeros((), device=device)

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.adam.param_groups[0]["lr"]

    def accumulating(self, last: bool):
        """Context of a forward and backward pass; ranks exchange gradients only on the last batch of a
        step."""
        ddp = isinstance(self.network, DistributedDataParallel)
        return contextlib.nullcontext() if last or not ddp else self.network.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one of the accumulated batches."""
        self.scaler.scale(loss / self.section["accumulate_steps"]).backward()

    def clip(self) -> torch.Tensor:
        """Unscale and clip the gradients; whether they are finite, a bool tensor on the device.

        With fp16 an overflow is no fault as long as the scaler has a scale to lower.
        """
        self.scaler.unscale_(self.adam)
        limit = self.section["clip_grad_norm"]
        self.norm = nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else math.inf)
        scale = self.scaler.scale(torch.ones_like(self.norm))
        return self.norm.isfinite() | (scale > 1)

    def step(self, rate: float, skip: torch.Tensor) -> None:
        """Step at this learning rate unless `skip` (0 or 1, on the device) or an overflow forbids it; clear
        the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.found_inf = torch.maximum(skip.float(), (~self.norm.isfinite()).float())
        self.adam.grad_scale = None
        self.adam.step()
        self.scaler.update()
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """State of optimiser and scaler."""
        state = self.adam.state_dict()
        moments = {self.places[i]: adam for i, adam in state["state"].items()}
        groups = [{**group, "params": list(self.places)} for group in state["param_groups"]]
        return {
            "optimizer": {"state": moments, "param_groups": groups},
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
        if not all(i in self.everything and _fits(adam, self.everything[i]) for i, adam in moments.items()):
            raise UserError(
                f"{where}: the state of its optimiser does not fit the network in the config. Resume with "
                "the config that it was trained with, or start over with --fresh."
            )
        (options,) = self.adam.state_dict()["param_groups"]
        # The fused kernels walk through parameter and moments as they lie in memory, and do not ask whether
        # they lie alike.
        # Checkpoints of DDP may hold zeros for parameters that were not frozen yet and are now.
        moments = {
            i: {key: _laid_out_like(parameter, value) for key, value in moments[place].items()}
            for i, (place, parameter) in enumerate(zip(self.places, self.parameters, strict=True))
            if place in moments
        }
        self.adam.load_state_dict({"state": moments, "param_groups": [{**options, "lr": group["lr"]}]})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _fits(adam: dict[str, torch.Tensor], parameter: torch.Tensor) -> bool:
    """Whether this is Adam's state of such a parameter. The fused kernels do not ask, and read beyond it."""
    step, mean, square = (adam[key] for key in ("step", "exp_avg", "exp_avg_sq"))
    return (
        step.shape == ()
        and mean.shape == square.shape == parameter.shape
        and all(bool(tensor.isfinite().all()) for tensor in (step, mean, square))
        and bool((square >= 0).all() and step >= 0)
    )


def _laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.shape != parameter.shape:
        return value  # the count of steps
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
