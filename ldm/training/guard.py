"""What all ranks agree on at each step: whether it is finite, whether to stop, whether to save."""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist


class Guard:
    """What all ranks agree on at each step, in one reduction that is read a step later, so that no device
    waits for it:

    - whether loss and gradients were finite: where they were not on any rank, the step is skipped on all;
    - whether a signal asked any rank to stop, and whether the main one wants to save;
    - for how many seconds the main one has trained, by which `max_minutes` goes.

    Args:
        world_size: number of ranks; `gather(value)` gives every rank the values of all.
        allowed: skipped steps that are tolerated; one more raises.
        seconds: of training before a resume.
        skipped: skipped steps before a resume.
        log: prints a warning.
    """

    def __init__(
        self,
        world_size: int,
        gather: Callable,
        allowed: int,
        seconds: float,
        skipped: int,
        log: Callable[[str], None],
    ):
        self.world_size, self.gather, self.allowed = world_size, gather, allowed
        self.seconds, self.skipped, self.log = seconds, skipped, log
        self.stop = self.save = False
        self.pending = deque()

    def vote(
        self,
        loss: torch.Tensor,
        gradients_finite: torch.Tensor,
        stop: bool,
        save: bool,
        seconds: float,
        step: int,
        cases: list[str],
    ) -> torch.Tensor:
        """Reduce this step's votes over the ranks.

        Args:
            loss: of this rank; DDP has spread its NaN to the gradients of all, so it shows where it arose.
            gradients_finite: bool scalar, on the device.
            cases: names of those in this rank's batches, for the message.

        Returns:
            1 where the step is to be skipped, else 0: a float64 scalar on the device, equal on all ranks.
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
        self.pending.append((*copies, known, step, cases))
        return votes[0]

    def read(self, all_steps: bool = False) -> None:
        """Read the votes of every step but the newest, or of all.

        Raises:
            FloatingPointError: a step was skipped, and no more are tolerated.
        """
        while len(self.pending) > (0 if all_steps else 1):
            votes, bad_loss, known, step, cases = self.pending.popleft()
            if known is not None:
                known.synchronize()
            skipped, stop, save, self.seconds = votes.tolist()
            self.stop, self.save = self.stop or bool(stop), self.save or bool(save)
            if skipped:
                self._report(step, bool(bad_loss), cases)

    def _report(self, step: int, bad_loss: bool, cases: list[str]) -> None:
        self.skipped += 1
        ranks = list(enumerate(self.gather((bad_loss, cases))))
        origin = [one for one in ranks if one[1][0]]
        where = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, (_, names) in origin or ranks)
        what = f"step {step + 1}: the {'loss' if origin else 'gradient'} is not finite ({where})"
        if self.skipped > self.allowed:
            raise FloatingPointError(f"{what}. No weight was changed. What to do: docs/NaN_FIX_GUIDE.md")
        self.log(f"warning: {what}; the step is skipped ({self.skipped} of {self.allowed})")
