"""The bookkeeping of a training run: where it is, what is saved and logged, what the ranks agree on."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.data.datasets import stream
from ldm.models.weights import plain_names
from ldm.system.checkpoints import DIVISION, save_checkpoint
from ldm.system.files import write_json
from ldm.system.messages import SAID, progress_bar
from ldm.system.ranks import Run
from ldm.system.signals import Interruption, signals_held_back
from ldm.training.guard import Watch
from ldm.training.logs import TrainLog
from ldm.training.run_folder import StageFiles
from ldm.training.step import Stepper, learning_rate

STATUS = Path("/proc/self/status")  # of Linux
HINT_STEPS, HINT_SHARE = 100, 0.3  # after how many steps, and from which share of waiting on, a hint is given


@dataclass
class Pace:
    """Where the time of the steps goes, by the clock of the main process: no device is waited for.

    `waited` are the seconds that the process stood still for the loader. On a CPU without loader processes
    that is the making of batches itself. A GPU computes behind the process that drives it, and may still be
    at work while that one waits: its share is the most that the GPU can have stood idle for want of data.
    """

    steps: int = 0
    volumes: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, steps: int, volumes: int, seconds: float, waited: float) -> None:
        """Count a batch, of all ranks."""
        self.steps, self.volumes = self.steps + steps, self.volumes + volumes
        self.seconds, self.waited = self.seconds + seconds, self.waited + waited

    def numbers(self) -> dict[str, float]:
        """What TensorBoard shows of it."""
        return {
            "time/seconds_per_step": self.seconds / self.steps,
            "time/volumes_per_second": self.volumes / self.seconds,
            "time/data_wait_share": self.waited / self.seconds,
        }


class Training:
    """The bookkeeping of a training run in either stage: where it is, what the ranks agree on, what is saved
    and logged. The script holds the loop:

        for epoch in training.epochs():
            for number, batch, last in training.batches():
                ...                                        # forward and backward
                training.step(terms, batch, last, steppers)
            if training.end_epoch():
                ...                                        # validate
                training.keep(scores)

    Whatever happens next is a function of (seed, epoch, batch, rank) and of what is saved here, so that a run
    that was killed at any moment and one that never was write the same weights and the same log.

    Args:
        stage: `autoencoder` or `diffusion`; its section of the config is `stage`_train.
        learner: the networks; has `shown` (the weights to keep), `state_dict()`, `load_state_dict(state)` and
            `update_average()`.
        loader: of `make_loader`.
        files: the stage's checkpoints.
        facts: what goes into each checkpoint besides, `config` among it.
        resumed: of `resume_or_start`.
    """

    def __init__(
        self,
        stage: str,
        learner,
        loader: DataLoader,
        files: StageFiles,
        facts: dict,
        environment: dict,
        run: Run,
        resumed: dict | None,
    ):
        self.stage, self.learner, self.loader, self.files = stage, learner, loader, files
        self.facts, self.run = facts, run
        self.section, self.seed = facts["config"][f"{stage}_train"], facts["config"]["seed"]
        self.epoch, self.batch, step, sums = self._position(resumed)
        self.means, self.done = Means(sums), False
        named = plain_names(dict(learner.steppers[0].network.named_parameters()))
        if frozen := [name for name, parameter in named.items() if not parameter.requires_grad]:
            run.say(f"{stage}: {len(frozen)} parameters that no loss reaches are frozen, such as {frozen[0]}")
        seconds, masked = (resumed["seconds"], resumed["masked"]) if resumed else (0.0, 0)
        if resumed:
            learner.load_state_dict(resumed)
            run.say(
                f"resumed in epoch {self.epoch} after {self.batch} of its {len(loader)} batches, step {step}"
            )
        self.best = run.from_main(files.best_score)
        steps_per_epoch = len(loader) // self.section["accumulate_steps"]
        self.clock = Clock(self.section, steps_per_epoch, step, seconds)
        self.watch = Watch(
            run.world_size,
            run.gather,
            self.section["max_nonfinite_steps"],
            seconds,
            masked,
            learner.update_average,
            run.say,
        )
        if self.progress >= 1:
            run.say(f"{stage}: trained to the end already; raise max_epochs or max_minutes to go on.")
        self.log = None
        if run.is_main:
            write_json(environment["model_dir"] / f"config_{stage}.json", facts["config"])
            path, events = environment["model_dir"] / "train_log.jsonl", environment["tfevent_path"] / stage
            self.log = TrainLog(stage, path, events, step, resumed["lines"] if resumed else 0)
            path.with_name("log.txt").touch()  # `ldm.training.logs.TextLog` writes where it is there
        self.bar = progress_bar(run, stage, self.clock.total_steps)
        self.bar.update(step)
        self.accumulated, self.names = 0.0, []  # loss and cases of the step under way
        self.pace, self.first_pace = Pace(), Pace()  # since the last log; of the first steps, then None
        self.first_epoch = self.epoch
        self.shown = None  # numbers on their way to the log, and their step
        self.interruption = Interruption()

    def _position(self, resumed: dict | None) -> tuple[int, int, int, dict]:
        """Epoch, batches of it that are done, optimiser steps, and the sums of its losses."""
        if resumed is None:
            return 0, 0, 0, {}
        epoch, batch, step, sums = (resumed[key] for key in ("epoch", "batch", "step", "sums"))
        before, now = {key: resumed[key] for key in DIVISION}, self._division()
        if before != now:
            epoch += batch == before["batches_per_epoch"]
            batch, step, sums = 0, epoch * (now["batches_per_epoch"] // now["accumulate_steps"]), {}
            changed = [key for key in DIVISION if before[key] != now[key]]
            changes = ", ".join(f"{key} {before[key]} before, {now[key]} now" for key in changed)
            self.run.say(f"{changes}: epoch {epoch} begins anew")
        if epoch >= self.section["max_epochs"]:  # fewer than before, or an epoch of others: nothing is left
            epoch, batch = self.section["max_epochs"] - 1, now["batches_per_epoch"]
        # The sums are those of all ranks: the main one goes on with them.
        return epoch, batch, step, sums if self.run.is_main else {k: 0 * v for k, v in sums.items()}

    def _division(self) -> dict[str, int]:
        """What tells which cases a batch and a step of an epoch hold, whatever the number of processes."""
        cases = self.section["batch_size"] * self.run.world_size
        values = len(self.loader), cases, self.section["accumulate_steps"]
        return dict(zip(DIVISION, values, strict=True))

    @property
    def progress(self) -> float:
        """Share of the training that is done, equal on all ranks."""
        return self.clock.progress(self.watch.seconds)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the one under way first."""
        for epoch in range(self.epoch, self.section["max_epochs"]):
            self.epoch = epoch
            self.loader.batch_sampler.epoch, self.loader.batch_sampler.first = self.epoch, self.batch
            yield self.epoch
            if self.done:
                return
            self.batch, self.means = 0, Means({})

    def batches(self) -> Iterator[tuple[int, dict, bool]]:
        """What is left of the epoch: number, batch, and whether it is the last of those of one step."""
        with signals_held_back():  # until the loader processes know what to do with them
            loading = iter(self.loader)
        try:
            yield from self._steps(enumerate(loading, self.batch))
        except BaseException:
            # An error of theirs holds the iterator in a cycle, and what collects that closes their queues
            # before they are told to end: they would be waited for.
            if self.loader.num_workers:
                loading._shutdown_workers()
            raise

    def _steps(self, numbered: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict, bool]]:
        while True:
            begin = time.perf_counter()
            number, batch = next(numbered, (None, None))
            if batch is None:
                return
            waited = time.perf_counter() - begin
            self.interruption.unsaved = True
            # For networks with dropout, which draw from torch's own generator.
            torch.manual_seed(stream(self.seed, "dropout", self.epoch, number, self.run.rank).initial_seed())
            last = (number + 1) % self.section["accumulate_steps"] == 0
            yield number, batch, last
            self.batch = number + 1
            self._measure(last, len(batch["index"]), time.perf_counter() - begin, waited)
            if not last:
                continue
            if self.progress >= 1:
                return
            alone = self.run.world_size == 1 and self.interruption.signal is not None  # no one to agree with
            if (self.watch.stop or self.watch.save or alone) and self.batch < len(self.loader):
                self.watch.read(all_steps=True)
                self.save()

    def _measure(self, last: bool, volumes: int, seconds: float, waited: float) -> None:
        """Take note of the time of a batch; after the first steps, hint at a loader that is too slow."""
        counts = int(last), volumes * self.run.world_size, seconds, waited
        self.pace.add(*counts)
        data = self.facts["config"]["data"]
        if self.first_pace is None or (data["cache_rate"] and self.epoch == self.first_epoch):
            return  # the first epoch fills the cache
        self.first_pace.add(*counts)
        if self.first_pace.steps < HINT_STEPS:
            return
        share, self.first_pace = self.first_pace.waited / self.first_pace.seconds, None
        if share > HINT_SHARE:
            cache = f" or data.cache_rate ({data['cache_rate']:g})" if data["cache_rate"] < 1 else ""
            self.run.say(
                f"hint: {share:.0%} of the time of {HINT_STEPS} steps went into waiting for data. Raise "
                f"data.num_workers ({self.loader.num_workers} now){cache}: docs/TROUBLESHOOTING.md"
            )

    def step(
        self, terms: dict[str, torch.Tensor], batch: dict, last: bool, steppers: Sequence[Stepper]
    ) -> None:
        """Take note of a batch's losses, whose gradients are there; after the last of a step, step."""
        self.means.add(terms)
        self.accumulated = self.accumulated + torch.stack([v.detach().float() for v in terms.values()]).sum()
        self.names += [self.loader.dataset.cases[i].name for i in batch["index"]]
        if not last:
            return
        finite = torch.stack([stepper.clip() for stepper in steppers]).all()
        asked, due = self.interruption.signal is not None, self.run.is_main and self.clock.save_due
        masked = self.watch.cast(
            self.accumulated, finite, asked, due, self.clock.seconds, self.clock.step, self.names
        )
        self.watch.read()
        self.accumulated, self.names = 0.0, []
        rate = learning_rate(self.section, self.run.world_size, self.progress, self.clock.step, self.epoch)
        for stepper in steppers:
            stepper.step(rate, masked)
        self.clock.step += 1
        if self.log and self.clock.step % 10 == 0:
            self._show()
            numbers = {f"loss/{name}": value.detach() for name, value in terms.items()}
            for name, stepper in zip((self.stage, "discriminator"), steppers, strict=False):
                numbers[f"lr/{name}"], numbers[f"grad_norm/{name}"] = rate, stepper.norm
            if self.pace.steps:
                numbers |= self.pace.numbers()
                self.pace = Pace()
            copies = {
                tag: value.to("cpu", non_blocking=True) if isinstance(value, torch.Tensor) else value
                for tag, value in numbers.items()
            }
            self.shown = copies, self.clock.step
            fill_bar(self.bar, self.clock)

    def _show(self) -> None:
        """Log the numbers that were copied from the device at an earlier step: no one waits for them, since
        `Watch.read` has seen a later step end."""
        if self.shown:
            numbers, step = self.shown
            self.log.scalars(step, {**numbers, "memory/peak_gb": peak_memory_gb(self.run.device)})
            self.bar.set_postfix(loss=f"{numbers['loss/loss'].item():.4g}", refresh=False)
            self.shown = None

    def end_epoch(self) -> bool:
        """Save where it is time, write the epoch's line; whether it is an epoch to validate.

        What follows until the next epoch can be done again from what is saved here.
        """
        self.watch.read(all_steps=True)
        self.done = self.progress >= 1 or self.epoch + 1 == self.section["max_epochs"]
        validate = self.done or self.epoch % self.section["val_interval"] == 0
        self.batch = len(self.loader)  # the clock may have ended it early
        if self.interruption.unsaved and (validate or self.watch.stop or self.watch.save):
            self.save()
        totals = self.means.totals(self.run.sum)
        means = {k: float(total / count) for k, (total, count) in totals.items() if count}
        if self.log:
            self._show()
            rate = self.learner.steppers[0].optimizer.param_groups[0]["lr"]
            skipped = {"masked_steps": self.watch.masked} if self.watch.masked else {}
            seconds = self.clock.seconds
            self.log.record(
                step=self.clock.step, epoch=self.epoch, seconds=seconds, lr=rate, **skipped, **means
            )
        return validate

    def save(self) -> None:
        """Save what the run needs to go on from the end of this step; leave, if a signal asked for it."""
        sums, seconds = self.means.totals(self.run.sum), self.clock.seconds

        def write():
            state = {"sums": sums, "seconds": seconds, "masked": self.watch.masked, "lines": self.log.lines}
            self.files.save_last({**self.facts, **self._where(), **state, **self.learner.state_dict()})

        self.run.from_main(write)  # no rank goes on, or leaves, before it is written
        self.clock.saved_at, self.watch.save, self.interruption.unsaved = seconds, False, False
        if any(self.run.gather(self.watch.stop or self.interruption.signal is not None)):
            self.interruption.leave()

    def _where(self) -> dict:
        return {"epoch": self.epoch, "batch": self.batch, "step": self.clock.step, **self._division()}

    def is_best(self, loss: float) -> bool:
        """Whether no validation before had as low a held-out loss."""
        return self.best is None or loss < self.best

    def keep(self, scores: dict[str, float]) -> None:
        """Log the validation of this epoch, and keep the weights if their held-out loss is the lowest so far.

        Args:
            scores: "loss", by which the best is chosen, and whatever else was measured.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        score = scores["loss"]
        if not math.isfinite(score):
            raise FloatingPointError(
                f"validation gives {score} in epoch {self.epoch}. What to do: docs/NaN_FIX_GUIDE.md"
            )
        if self.log:
            self.log.record(
                step=self.clock.step,
                epoch=self.epoch,
                **{f"val_{key}": value for key, value in scores.items()},
            )
            told = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
            SAID.info(f"{self.stage}, epoch {self.epoch}, step {self.clock.step}: held-out {told}")
            self.log.draw_if_due()
        if self.is_best(score):
            self.best = score
            content = {**self.facts, **self._where(), "best": score, "validation": scores}
            shown = self.learner.shown
            self.run.from_main(
                lambda: save_checkpoint(self.files.best, {**content, "model": shown.state_dict()})
            )

    def close(self) -> None:
        """Finish bar and log."""
        self.bar.close()
        if self.log:
            self.log.close()


def fill_bar(bar: tqdm, clock: "Clock") -> None:
    """Advance the bar to the clock's step; a run that the clock will end has its length estimated as it
    goes."""
    if clock.limit and (progress := clock.seconds / clock.limit) > clock.step / clock.total_steps:
        bar.total = max(clock.step, round(clock.step / progress))
    bar.update(clock.step - bar.n)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of the GPU since the start, or of this process on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if STATUS.exists():  # on Linux, where getrusage counts the process that started this one too
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on a Mac


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
