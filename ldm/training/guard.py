"""What all ranks agree on at each step: whether it is finite, whether to stop or save."""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist


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
