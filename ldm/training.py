"""One step of training: learning rate, scaled backward, clipping, averaged weights, what the ranks agree on,
and how far a run is."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ldm import UserError


class Clock:
    """How far a training run is: by its epochs, or by the clock where `max_minutes` is set.

    Args:
        section: `autoencoder_train` or `diffusion_train` of the config.
        steps_per_epoch: optimiser steps.
        step, seconds: what was done before a resume.
    """

    def __init__(self, section: dict, steps_per_epoch: int, step: int = 0, seconds: float = 0.0):
        self.total_steps = section["max_epochs"] * steps_per_epoch
        self.limit = section["max_minutes"] * 60 if section["max_minutes"] else None
        often = section["save_minutes"]
        self.save_every = math.inf if often is None else often * 60
        self.step, self.before, self.started = step, seconds, time.monotonic()
        self.saved_at = seconds

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.before + time.monotonic() - self.started

    @property
    def save_due(self) -> bool:
        """Whether `save_minutes` have passed since the last save."""
        return self.seconds - self.saved_at >= self.save_every

    def progress(self, seconds: float) -> float:
        """Share of the run that is done when the main process has trained for `seconds`."""
        done = self.step / self.total_steps
        return min(max(done, seconds / self.limit) if self.limit else done, 1.0)


def learning_rate(section: dict, world_size: int, progress: float, step: int, epoch: int) -> float:
    """The learning rate: a pure function, so that a resumed run needs no state for it."""
    rate = section["lr"] * (world_size if section["scale_lr"] else 1)
    if section["lr_schedule"] == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
    elif section["lr_schedule"] == "multistep":
        rate *= section["lr_gamma"] ** sum(epoch >= milestone for milestone in section["lr_milestones"])
    return rate * min(1.0, (step + 1) / (section["lr_warmup_steps"] + 1))


class Stepper:
    """One optimiser: scaled backward, accumulation, clipping, and a step that can be masked.

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
        # The fused kernels, on a CPU too, heed `found_inf` on the device: no one waits to know it.
        self.optimizer = torch.optim.Adam(
            self.parameters, section["lr"], tuple(section["adam_betas"]), fused=True
        )
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self.norm = torch.zeros((), device=device)

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
        self.scaler.unscale_(self.optimizer)
        limit = self.section["clip_grad_norm"]
        self.norm = nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else math.inf)
        scale = self.scaler.scale(torch.ones_like(self.norm))
        return self.norm.isfinite() | (scale > 1)

    def step(self, rate: float, masked: torch.Tensor) -> None:
        """Step at this learning rate unless `masked` (0 or 1, on the device) or an overflow forbids it; clear
        the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.found_inf = torch.maximum(masked.float(), (~self.norm.isfinite()).float())
        self.optimizer.grad_scale = None
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """State of optimiser and scaler."""
        state = self.optimizer.state_dict()
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
        (options,) = self.optimizer.state_dict()["param_groups"]
        # The fused kernels walk through parameter and moments as they lie in memory, and do not ask whether
        # they lie alike.
        # Checkpoints of DDP may hold zeros for parameters that were not frozen yet and are now.
        moments = {
            i: {key: _laid_out_like(parameter, value) for key, value in moments[place].items()}
            for i, (place, parameter) in enumerate(zip(self.places, self.parameters, strict=True))
            if place in moments
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": [{**options, "lr": group["lr"]}]})
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


class Average(AveragedModel):
    """Exponential moving average of the weights; the decay rises with the steps, (1 + n) / (10 + n), up to
    `decay`. Buffers are those of the network.

    The count stays on the CPU: torch's own update copies it to the device at each step, and a function of it
    back, for which a GPU is waited for.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take up the weights after a step."""
        n = int(self.n_averaged)
        averages, weights = list(self.module.parameters()), list(model.parameters())
        if n == 0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + n) / (10 + n)))
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.n_averaged += 1


def make_ema(network: nn.Module, decay: float) -> Average | None:
    """The average of the weights, or None where there is none."""
    return Average(network, decay) if decay else None


class Means:
    """Means of the terms of the loss in an epoch, over the finite batches of all ranks.

    Args:
        sums: {term: (sum, count)} of what was done before a resume.
    """

    def __init__(self, sums: dict[str, torch.Tensor]):
        self.sums = dict(sums)

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """A batch, without waiting for the device."""
        for name, value in terms.items():
            value = value.detach().double()
            finite = value.isfinite()
            pair = torch.stack([value.nan_to_num(0.0, 0.0, 0.0), finite.double()])
            if name in self.sums:
                pair = self.sums[name].to(pair.device, non_blocking=True) + pair
            self.sums[name] = pair

    def totals(self, sum_over_ranks: Callable) -> dict[str, torch.Tensor]:
        """{term: (sum, count)} of all ranks, on the CPU."""
        return {name: sum_over_ranks(pair.clone()) for name, pair in self.sums.items()}


class Watch:
    """What all ranks agree on at each step, in one reduction that is read a step later, so that no device
    waits for it:

    - whether loss and gradients were finite: where they were not on any rank, the step is masked on all;
    - whether a signal asked any rank to stop, and whether the main one wants to save;
    - for how many seconds the main one has trained, by which `max_minutes` goes.

    Args:
        world_size: number of ranks; `gather(value)` gives every rank the values of all.
        allowed: masked steps that are passed over; one more raises.
        seconds: of training before a resume.
        masked: masked steps before a resume.
        after_step: what to do after each step that was not masked, such as updating averages.
        say: where a warning goes.
    """

    def __init__(
        self,
        world_size: int,
        gather: Callable,
        allowed: int,
        seconds: float,
        masked: int,
        after_step: Callable[[], None],
        say: Callable[[str], None],
    ):
        self.world_size, self.gather, self.allowed = world_size, gather, allowed
        self.seconds, self.masked, self.after_step, self.say = seconds, masked, after_step, say
        self.stop = self.save = False
        self.pending = deque()

    def cast(
        self,
        loss: torch.Tensor,
        gradients_finite: torch.Tensor,
        stop: bool,
        save: bool,
        seconds: float,
        step: int,
        names: list[str],
    ) -> torch.Tensor:
        """Reduce this step's votes over the ranks.

        Args:
            loss: of this rank; DDP has spread its NaN to the gradients of all, so it tells where it arose.
            gradients_finite: bool scalar, on the device.
            names: of the cases in this rank's batch, for the message.

        Returns:
            1 where the step is to be masked, else 0: a float64 scalar on the device, equal on all ranks.
        """
        bad_loss = ~loss.detach().isfinite()
        bad = (bad_loss | ~gradients_finite).double()
        rest = torch.tensor([stop, save, seconds], dtype=torch.float64).to(bad.device, non_blocking=True)
        votes = torch.cat([bad[None], rest])
        if self.world_size > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        copies, known = (votes, bad_loss), None
        if votes.is_cuda:
            copies, known = [x.to("cpu", non_blocking=True) for x in copies], torch.cuda.Event()
            known.record()
        self.pending.append((*copies, known, step, names))
        return votes[0]

    def read(self, all_steps: bool = False) -> None:
        """Take note of the votes but for the newest, or of all.

        Raises:
            FloatingPointError: a step was masked, and no more may be passed over.
        """
        while len(self.pending) > (0 if all_steps else 1):
            votes, bad_loss, known, step, names = self.pending.popleft()
            if known is not None:
                known.synchronize()
            masked, stop, save, self.seconds = votes.tolist()
            self.stop, self.save = self.stop or bool(stop), self.save or bool(save)
            if not masked:
                self.after_step()
                continue
            self.masked += 1
            everywhere = list(enumerate(self.gather((bool(bad_loss), names))))
            guilty = [one for one in everywhere if one[1][0]]
            where = "; ".join(f"rank {rank}: {', '.join(cases)}" for rank, (_, cases) in guilty or everywhere)
            what = f"step {step + 1}: the {'loss' if guilty else 'gradient'} is not finite ({where})"
            if self.masked > self.allowed:
                raise FloatingPointError(f"{what}. No weight was changed. What to do: docs/NaN_FIX_GUIDE.md")
            self.say(f"warning: {what}; the step is passed over ({self.masked} of {self.allowed})")
