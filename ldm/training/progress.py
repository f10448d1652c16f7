"""Where a training is: epoch, batch, step and time; its log, its checkpoints, and how it resumes."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ldm import counted
from ldm.data.datasets import stream
from ldm.system.checkpoints import EPOCH_LAYOUT, save_checkpoint
from ldm.system.files import write_json
from ldm.system.messages import LOGGER, progress_bar
from ldm.system.ranks import Run
from ldm.system.signals import Interruption, signals_held_back
from ldm.training.guard import Guard
from ldm.training.logs import TrainLog
from ldm.training.run_folder import StageFiles
from ldm.training.step import Optimizer, learning_rate

STATUS = Path("/proc/self/status")  # of Linux
HINT_STEPS, HINT_SHARE = 100, 0.3  # after how many steps, and from which share of waiting, a hint is printed
FEW_STEPS = 300  # below which samples of brains had no shape
# After so many steps, or a tenth of the minutes, a training with `max_minutes` prints how many it will take.
EXPECT_STEPS = 20
LOG_INTERVAL = 10  # steps between the numbers in TensorBoard


class Clock:
    """Steps and seconds of a training, which ends by its epochs, or by the time where `max_minutes` is set.

    Args:
        section: `autoencoder_train` or `diffusion_train` of the config.
        steps_per_epoch: optimiser steps.
        step, seconds: done before a resume.
    """

    def __init__(self, section: dict, steps_per_epoch: int, step: int = 0, seconds: float = 0.0):
        self.total_steps = section["max_epochs"] * steps_per_epoch
        self.limit = section["max_minutes"] * 60 if section["max_minutes"] else None
        minutes = section["save_minutes"]
        self.save_interval = math.inf if minutes is None else minutes * 60
        self.step, self.before, self.started = step, seconds, time.monotonic()
        self.saved_at = seconds

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.before + time.monotonic() - self.started

    @property
    def wants_save(self) -> bool:
        """Whether `save_minutes` have passed since the last save."""
        return self.seconds - self.saved_at >= self.save_interval

    def progress(self, seconds: float) -> float:
        """Share of the training that is done when the main process has trained for `seconds`."""
        done = self.step / self.total_steps
        return min(max(done, seconds / self.limit) if self.limit else done, 1.0)

    def steps_at(self, each: float) -> int:
        """Steps when `max_minutes` will have passed, if each of the rest takes so many seconds."""
        return self.step + round(max(self.limit - self.seconds, 0) / each)

    @property
    def expected_steps(self) -> int:
        """Steps of the whole training; an estimate where `max_minutes` will end it."""
        done = self.progress(self.seconds)
        return max(self.step, round(self.step / done)) if done > 0 else self.total_steps


class EpochMeans:
    """Means of the terms of the loss in an epoch, over the finite batches of all ranks.

    Args:
        sums: {term: (sum, count)} from before a resume.
    """

    def __init__(self, sums: dict[str, torch.Tensor]):
        self.sums = dict(sums)

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Add a batch, without waiting for the device."""
        for name, value in terms.items():
            value = value.detach().double()
            pair = torch.stack([value.nan_to_num(0.0, 0.0, 0.0), value.isfinite().double()])
            if name in self.sums:
                pair = self.sums[name].to(pair.device, non_blocking=True) + pair
            self.sums[name] = pair

    def totals(self, sum_over_ranks) -> dict[str, torch.Tensor]:
        """{term: (sum, count)} of all ranks, on the CPU."""
        return {name: sum_over_ranks(pair.clone()) for name, pair in self.sums.items()}


class Progress:
    """Where a training is. `main` of train_diffusion.py holds the loop, and shows the order of the calls.

    What happens next is a function of (seed, epoch, batch, rank) and of what is saved here. A run that was
    killed at any moment and one that never was do the same steps; on a CPU they write the same weights and
    the same log.

    Making one opens the log and the TensorBoard files, writes the resolved config, and listens for signals.

    Args:
        stage: `autoencoder`, `diffusion` or `controlnet`; its section of the config is `stage`_train.
        loader: of `make_loader`.
        files: the stage's checkpoints.
        facts: what else goes into each checkpoint, `config` among it.
        resumed: the checkpoint to resume from, or None.
    """

    def __init__(
        self,
        stage: str,
        loader: DataLoader,
        files: StageFiles,
        facts: dict,
        environment: dict,
        run: Run,
        resumed: dict | None,
    ):
        self.stage, self.loader, self.files, self.facts, self.run = stage, loader, files, facts, run
        self.config = facts["config"]
        self.section, self.seed = self.config[f"{stage}_train"], self.config["seed"]
        self.epoch, self.batch, step, sums = self._position(resumed)
        self.means, self.done = EpochMeans(sums), False
        seconds, skipped = (resumed["seconds"], resumed["masked"]) if resumed else (0.0, 0)
        if resumed:
            where = f"epoch {self.epoch} after {self.batch} of its {len(loader)} batches"
            run.print(f"resumed in {where}, step {step}")
        self.best, self.best_epoch = run.from_main(files.best_score) or (None, 0)
        self.clock = Clock(self.section, len(loader) // self.section["accumulate_steps"], step, seconds)
        allowed = self.section["max_nonfinite_steps"]
        self.guard = Guard(run.world_size, run.gather, allowed, seconds, skipped, run.print)
        if self.fraction_done >= 1:
            run.print(
                f"{stage}: already trained to its end; raise max_epochs or max_minutes to train further."
            )
        self.log = None
        if run.is_main:
            write_json(environment["model_dir"] / f"config_{stage}.json", self.config)
            path, events = environment["model_dir"] / "train_log.jsonl", environment["tfevent_path"] / stage
            self.log = TrainLog(stage, path, events, step, resumed["lines"] if resumed else 0)
            path.with_name("log.txt").touch()  # `ldm.training.logs.TextLog` writes where it exists
        # With a limit of minutes the number of steps is known after the first ones.
        self.bar = progress_bar(run, stage, None if self.clock.limit else self.clock.total_steps)
        self.bar.update(step)
        self.loss_probe, self.cases = 0.0, []  # of the batches of the step under way
        # When that step began, and for how many seconds it waited for data: on a CPU without loader processes
        # the making of batches itself, on a GPU the most that it can have idled for want of data.
        self.began = self.waited = 0.0
        # Sums over steps: since the last log; of the first steps, then None.
        self.pace, self.first_pace, self.first_epoch = Counter(), Counter(), self.epoch
        # Of each of the first steps, without waiting for data, then None.
        self.first_seconds = []
        self.copies = None  # numbers on their way from the device to the log, and their step
        self.interruption = Interruption()

    def _position(self, resumed: dict | None) -> tuple[int, int, int, dict]:
        """Epoch, batches of it that are done, optimiser steps, and the sums of its losses."""
        if resumed is None:
            return 0, 0, 0, {}
        epoch, batch, step, sums = (resumed[key] for key in ("epoch", "batch", "step", "sums"))
        before, now = {key: resumed[key] for key in EPOCH_LAYOUT}, self._epoch_layout()
        if before != now:
            epoch += batch == before["batches_per_epoch"]
            batch, step, sums = 0, epoch * (now["batches_per_epoch"] // now["accumulate_steps"]), {}
            changed = [key for key in EPOCH_LAYOUT if before[key] != now[key]]
            changes = ", ".join(f"{key} {before[key]} before, {now[key]} now" for key in changed)
            self.run.print(f"{changes}: epoch {epoch} starts from its first batch")
        if epoch >= self.section["max_epochs"]:  # fewer than before, or an epoch of others: nothing is left
            epoch, batch = self.section["max_epochs"] - 1, now["batches_per_epoch"]
        # The sums are those of all ranks: the main one resumes with them.
        return epoch, batch, step, sums if self.run.is_main else {k: 0 * v for k, v in sums.items()}

    def _epoch_layout(self) -> dict[str, int]:
        """What decides which cases a batch and a step of an epoch hold, whatever the number of processes."""
        cases = self.section["batch_size"] * self.run.world_size
        values = len(self.loader), cases, self.section["accumulate_steps"]
        return dict(zip(EPOCH_LAYOUT, values, strict=True))

    @property
    def fraction_done(self) -> float:
        """Fraction of the training that is done, equal on all ranks."""
        return self.clock.progress(self.guard.seconds)

    # ------------------------------------------------------------ epochs and batches

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the one under way first."""
        for epoch in range(self.epoch, self.section["max_epochs"]):
            self.epoch = epoch
            self.loader.batch_sampler.epoch, self.loader.batch_sampler.first = self.epoch, self.batch
            yield self.epoch
            if self.done:
                return
            self.batch, self.means = 0, EpochMeans({})

    def batches(self) -> Iterator[tuple[dict, bool]]:
        """The batches that are left of the epoch, and whether each is the last of those of one step.

        Seeds torch's own generator for each batch, since layers with dropout draw from it.
        """
        with signals_held_back():  # until the loader processes know what to do with them
            loading = iter(self.loader)
        try:
            while self.fraction_done < 1:
                begin = time.perf_counter()
                if (batch := next(loading, None)) is None:
                    return
                if not self.cases:
                    self.began, self.waited = begin, 0.0
                self.waited += time.perf_counter() - begin
                self.interruption.unsaved = True
                where = self.epoch, self.batch, self.run.rank
                torch.manual_seed(stream(self.seed, "dropout", *where).initial_seed())
                last = (self.batch + 1) % self.section["accumulate_steps"] == 0
                yield batch, last
        except BaseException:
            # An error of the loader processes holds the iterator in a cycle. Collecting that closes their
            # queues before they are told to end, and the script would wait for them.
            if self.loader.num_workers:
                loading._shutdown_workers()
            raise

    # ------------------------------------------------------------ one step

    def add(self, terms: dict[str, torch.Tensor], batch: dict) -> None:
        """Add the losses of a batch to the means of the epoch."""
        self.means.add(terms)
        # Not finite if any term of the step is not: what the ranks vote on.
        self.loss_probe = self.loss_probe + torch.stack([v.detach().float() for v in terms.values()]).sum()
        self.cases += [self.loader.dataset.cases[i].name for i in batch["index"]]

    def end_batch(self) -> None:
        """Count a batch."""
        self.batch += 1

    def agree_to_skip(self, *finite: torch.Tensor) -> torch.Tensor:
        """Agree with the other ranks on this step: 1 where it is skipped, else 0, on the device.

        `finite` holds a flag for each optimiser: whether its gradients are. Raises as `Guard.read`.
        """
        signalled, save = self.interruption.signal is not None, self.run.is_main and self.clock.wants_save
        gradients, clock = torch.stack(finite).all(), (self.clock.seconds, self.clock.step)
        skip = self.guard.vote(self.loss_probe, gradients, signalled, save, *clock, self.cases)
        self.guard.read()
        return skip

    def learning_rate(self) -> float:
        """The learning rate of this step."""
        return learning_rate(
            self.section, self.run.world_size, self.fraction_done, self.clock.step, self.epoch
        )

    def end_step(self, terms: dict, optimizers: dict[str, Optimizer]) -> None:
        """Count a step, and log it every `LOG_INTERVAL` steps: `terms` are those of its last batch, the
        `optimizers` have the names of what they train."""
        volumes, seconds = len(self.cases) * self.run.world_size, time.perf_counter() - self.began
        pace = {"steps": 1, "volumes": volumes, "seconds": seconds, "waited": self.waited}
        self.pace.update(pace)
        self._hint_at_slow_data(pace)
        self.loss_probe, self.cases = 0.0, []
        self.end_batch()
        self.clock.step += 1
        self._tell_expected_steps(seconds - self.waited)
        if self.log and self.clock.step % LOG_INTERVAL == 0:
            self._log_copies()
            numbers = {f"loss/{name}": value.detach() for name, value in terms.items()}
            for name, optimizer in optimizers.items():
                numbers[f"lr/{name}"] = optimizer.rate
                if optimizer.muon:
                    numbers[f"lr/{name}_muon"] = optimizer.muon_rate
                numbers[f"grad_norm/{name}"] = optimizer.norm
            pace, self.pace = self.pace, Counter()
            numbers["time/seconds_per_step"] = pace["seconds"] / pace["steps"]
            numbers["time/volumes_per_second"] = pace["volumes"] / pace["seconds"]
            numbers["time/data_wait_share"] = pace["waited"] / pace["seconds"]
            copied = {k: v.to("cpu", non_blocking=True) for k, v in numbers.items() if torch.is_tensor(v)}
            self.copies = {**numbers, **copied}, self.clock.step
            self.bar.total = self.clock.expected_steps
            self.bar.update(self.clock.step - self.bar.n)

    def _tell_expected_steps(self, seconds: float) -> None:
        """After the first steps, print how many `max_minutes` allows. Their median leaves out what only the
        first ones wait for. Validation is not counted."""
        if self.clock.limit is None or self.first_seconds is None:
            return
        self.first_seconds.append(seconds)
        late = len(self.first_seconds) >= 3 and self.clock.seconds > 0.1 * self.clock.limit
        if late or len(self.first_seconds) == EXPECT_STEPS:
            each, self.first_seconds = statistics.median(self.first_seconds), None
            steps = min(self.clock.steps_at(each), self.clock.total_steps)
            self.bar.total = steps
            minutes = self.clock.limit / 60
            # launchers/demo.py reads this line.
            self.run.print(f"{self.stage}: about {steps} steps in {minutes:g} minutes, {each:.2g} s each")
            if steps < FEW_STEPS:
                self.run.print(
                    f"warning: {steps} steps are too few, below about {FEW_STEPS} results are shapeless. Set "
                    f"{self.stage}_train.max_minutes to {math.ceil(minutes * FEW_STEPS / max(steps, 1))} or "
                    "more, or train on a coarser spacing"
                )

    def _hint_at_slow_data(self, pace: dict) -> None:
        """After the first steps, print a hint where much of their time went into waiting for data."""
        data = self.config["data"]
        if self.first_pace is None or (data["cache_rate"] and self.epoch == self.first_epoch):
            return  # the first epoch fills the cache
        self.first_pace.update(pace)
        if self.first_pace["steps"] < HINT_STEPS:
            return
        share, self.first_pace = self.first_pace["waited"] / self.first_pace["seconds"], None
        if share > HINT_SHARE:
            cache = f" or data.cache_rate ({data['cache_rate']:g})" if data["cache_rate"] < 1 else ""
            self.run.print(
                f"hint: {share:.0%} of the time of {HINT_STEPS} steps was spent waiting for data. Raise "
                f"data.num_workers ({self.loader.num_workers} now){cache}: docs/TROUBLESHOOTING.md"
            )

    def _log_copies(self) -> None:
        """Log the numbers that were copied from the device at an earlier step. They have arrived, since
        `Guard.read` has seen a later step end."""
        if self.copies:
            numbers, step = self.copies
            self.log.scalars(step, {**numbers, "memory/peak_gb": peak_memory_gb(self.run.device)})
            self.bar.set_postfix(loss=f"{numbers['loss/loss'].item():.4g}", refresh=False)
            self.copies = None

    # ------------------------------------------------------------ saving

    def must_save(self) -> bool:
        """Whether to save after this step: `save_minutes` have passed, or a signal asks to stop. After the
        last step of an epoch, `end_epoch` saves."""
        if self.fraction_done >= 1 or self.batch == len(self.loader):
            return False
        alone = self.run.world_size == 1 and self.interruption.signal is not None  # no rank to agree with
        return self.guard.stop or self.guard.save or alone

    def save(self, learner) -> None:
        """Save what the training resumes from, the entries of `learner.state_dict()` included; leave, if a
        signal asked for it."""
        self.guard.read(all_steps=True)
        sums, seconds = self.means.totals(self.run.sum), self.clock.seconds

        def write():
            state = {"sums": sums, "seconds": seconds, "masked": self.guard.skipped, "lines": self.log.lines}
            self.files.save_last({**self.facts, **self._where(), **state, **learner.state_dict()})

        self.run.from_main(write)  # no rank continues, or leaves, before it is written
        self.clock.saved_at, self.guard.save, self.interruption.unsaved = seconds, False, False
        if any(self.run.gather(self.guard.stop or self.interruption.signal is not None)):
            self.interruption.leave()

    def _where(self) -> dict:
        return {"epoch": self.epoch, "batch": self.batch, "step": self.clock.step, **self._epoch_layout()}

    # ------------------------------------------------------------ the end of an epoch

    def end_epoch(self, learner, rate: float) -> None:
        """Save where it is time, then log the means of the epoch and its last learning rate.

        What follows until the next epoch can be repeated from what is saved here.
        """
        self.guard.read(all_steps=True)
        self.done = self.fraction_done >= 1 or self.epoch + 1 == self.section["max_epochs"]
        self.batch = len(self.loader)  # `max_minutes` may have ended it early
        if self.interruption.unsaved and (self.validates() or self.guard.stop or self.guard.save):
            self.save(learner)
        totals = self.means.totals(self.run.sum)
        means = {k: float(total / count) for k, (total, count) in totals.items() if count}
        if self.log:
            self._log_copies()
            skipped = {"masked_steps": self.guard.skipped} if self.guard.skipped else {}
            numbers = {"seconds": self.clock.seconds, "lr": rate, **skipped, **means}
            self.log.record(step=self.clock.step, epoch=self.epoch, **numbers)

    def validates(self) -> bool:
        """Whether this epoch, which has ended, is one to validate."""
        return self.done or self.epoch % self.section["val_interval"] == 0

    def is_best(self, loss: float) -> bool:
        """Whether no earlier validation had as low a held-out loss."""
        return self.best is None or loss < self.best

    def keep_best(self, scores: dict[str, float], network: torch.nn.Module, **more) -> None:
        """Log the validation of this epoch, and save the network's weights, and `more`, if `scores["loss"]`
        is the lowest so far. A loss that is not finite raises FloatingPointError."""
        score = scores["loss"]
        if not math.isfinite(score):
            raise FloatingPointError(
                f"validation gives {score} in epoch {self.epoch}. What to do: docs/NaN_FIX_GUIDE.md"
            )
        if self.log:
            named = {f"val_{key}": value for key, value in scores.items()}
            self.log.record(step=self.clock.step, epoch=self.epoch, **named)
            printed = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
            LOGGER.info(f"{self.stage}, epoch {self.epoch}, step {self.clock.step}: held-out {printed}")
            self.log.draw_at_intervals()
        if self.is_best(score):
            self.best, self.best_epoch = score, self.epoch
            content = {**self.facts, **self._where(), "best": score, "validation": scores, **more}
            self.run.from_main(
                lambda: save_checkpoint(self.files.best, {**content, "model": network.state_dict()})
            )
        elif not self.done and self._has_stopped_falling():
            self.done = True
            validations = counted(self.section["patience"], "validation{s}")
            self.run.print(
                f"{self.stage}: the held-out loss has not fallen below {self.best:.4f}, that of epoch "
                f"{self.best_epoch}, in {validations}: training stops"
            )

    def _has_stopped_falling(self) -> bool:
        """Whether the last `patience` validations were no better than the one before them."""
        patience, since = self.section["patience"], self.epoch - self.best_epoch
        return patience is not None and since >= patience * self.section["val_interval"]

    def close(self) -> None:
        """Close bar and log."""
        self.bar.close()
        if self.log:
            self.log.close()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of the GPU since the start, or of this process on a CPU, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if STATUS.exists():  # on Linux, where getrusage counts the parent process too
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on a Mac
