"""Promise 10: a loss or gradient that is not finite changes no weight on any rank, and stops the run."""

import contextlib
import copy
import itertools
import json
import math
import os
import subprocess
import sys

import chain
import pytest
import torch
from chain import ROOT, Project, copy_of, differences, fingerprint
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train_autoencoder
import train_diffusion
from ldm.losses import AutoencoderLoss
from ldm.training import autoencoder, diffusion
from ldm.training.guard import Guard
from ldm.training.progress import EpochMeans, Progress
from ldm.training.step import EMA, Optimizer

NAN = math.nan
SECTION = {"optimizer": "adam", "lr": 1e-2, "scale_lr": False, "adam_betas": [0.9, 0.99]}
SECTION |= {"accumulate_steps": 1, "clip_grad_norm": None}
STAGE = {train_autoencoder: "autoencoder", train_diffusion: "diffusion"}
LAST = {train_autoencoder: "autoencoder_last.pt", train_diffusion: "diffusion_unet_last.pt"}
SOURCES = [
    (train_autoencoder, "loss"),
    (train_autoencoder, "gradient"),
    (train_autoencoder, "discriminator's loss"),
    (train_diffusion, "loss"),
    (train_diffusion, "gradient"),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Project:
    """One epoch of each stage in 4 steps of one case each, the adversarial term on; the config asks for two.
    Look, but do not touch."""
    done = chain.trained(tmp_path_factory.getbasetemp())
    project = copy_of(done, tmp_path_factory.mktemp("begun") / "run")
    short = {"batch_size": 1, "max_epochs": 2, "val_interval": 1, "save_minutes": None}
    first, second = project.config["autoencoder_train"], project.config["diffusion_train"]
    project.change(autoencoder_train=first | short | {"adversarial_warmup_epochs": 0})
    project.change(diffusion_train=second | short)
    for script, stage in STAGE.items():
        project.run(script, "--no-amp", "--set", f"{stage}_train.max_epochs=1")
    return project


@pytest.fixture
def project(begun, tmp_path) -> Project:
    """A copy of it, to resume from: steps 5 to 8 are left."""
    names = [path.name for path in begun.model_dir.iterdir() if path.suffix in (".pt", ".json", ".jsonl")]
    return copy_of(begun, tmp_path / "run", *names)


@contextlib.contextmanager
def planted(script, source: str, *numbers: int):
    """NaN in these training batches, counted from 1. Yields what happens meanwhile: `cases`, whose batch each
    was; `losses`, the true loss of each; `steps`, for each optimiser and step whether it was masked and what
    changed in it; `averages`, the averaged weights before each step and at the end."""
    seen, averages = {"cases": [], "losses": [], "steps": [], "averages": []}, []
    module = autoencoder if script is train_autoencoder else diffusion

    def now(kind: str) -> bool:
        return kind == source and len(seen["losses"]) in numbers

    with pytest.MonkeyPatch.context() as patch:

        def wrap(owner, name: str):
            """Replace a function by one that takes the function itself before its arguments."""

            def replace(wrapper):
                real = getattr(owner, name)
                patch.setattr(owner, name, lambda *args: wrapper(real, *args))

            return replace

        if script is train_diffusion:

            @wrap(train_diffusion, "diffusion_loss")
            def _(real, *args):
                loss = real(*args)
                seen["losses"].append(float(loss.detach()))
                return loss * NAN if now("loss") else loss

        else:

            @wrap(AutoencoderLoss, "forward")
            def _(real, *args):
                terms = real(*args)
                seen["losses"].append(float(terms["recon_loss"].detach()))
                spoilt = ("recon_loss", "loss") if now("loss") else ()
                return terms | {name: terms[name] * NAN for name in spoilt}

            @wrap(train_autoencoder, "discriminator_loss")
            def _(real, *args):
                return real(*args) * (NAN if now("discriminator's loss") else 1)

        @wrap(Optimizer, "backward")
        def _(real, self, loss):
            # One number of one parameter; in stage 1 the discriminator's backward has one of its own.
            spoil = lambda g: torch.where(g == g.max(), NAN, g) if now("gradient") else g  # noqa: E731
            hook = self.parameters[0].register_hook(spoil)
            real(self, loss)
            hook.remove()

        @wrap(Optimizer, "step")
        def _(real, self, rate, masked):
            before = copy.deepcopy((list(self.parameters), self.adam.state_dict()["state"]))
            real(self, rate, masked)
            after = (list(self.parameters), self.adam.state_dict()["state"])
            seen["steps"].append((bool(masked), differences(before, after)))
            seen["averages"].append([copy.deepcopy(average.state_dict()) for average in averages])

        @wrap(Progress, "add")
        def _(real, self, terms, batch):
            seen["cases"].append([self.loader.dataset.cases[i].name for i in batch["index"]])
            real(self, terms, batch)

        @wrap(module, "make_ema")
        def _(real, *args):
            averages.append(real(*args))
            return averages[-1]

        yield seen
        seen["averages"].append([average.state_dict() for average in averages])


def checkpoints(project: Project) -> dict[str, str]:
    return {name: digest for name, digest in fingerprint(project.model_dir).items() if name.endswith(".pt")}


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("script, source", SOURCES)
def test_promise_10_nothing_changes_and_the_run_ends(project, script, source):
    """At the second of the four steps that are left."""
    before = checkpoints(project)
    with planted(script, source, 2) as seen:
        message = project.refused(script, "--no-amp", code=1)
    kind = "gradient" if source == "gradient" else "loss"
    assert message == (
        f"error: step 6: the {kind} is not finite (rank 0: {seen['cases'][1][0]}). No weight was changed. "
        "What to do: docs/NaN_FIX_GUIDE.md"
    )
    # Both optimisers of stage 1 made the step before, and neither this one; no later one came.
    count = 2 if script is train_autoencoder else 1
    assert len(seen["steps"]) == 2 * count
    for number, (masked, changes) in enumerate(seen["steps"]):
        assert masked == (number >= count)
        assert bool(changes) != masked, changes
    # The averages were last updated after the step before.
    assert seen["averages"][-1][0]["n_averaged"] == 5
    assert not differences(seen["averages"][-1], seen["averages"][-2])
    assert checkpoints(project) == before
    assert [entry["epoch"] for entry in project.log(STAGE[script])] == [0, 0]


@pytest.mark.parametrize("script, source", SOURCES[::4])
def test_promise_10_steps_may_be_passed_over_up_to_a_number(project, tmp_path, script, source):
    """Two of the four: what is learnt is what the other two teach; the next one ends the run, after a resume
    as well."""
    stage = STAGE[script]
    allowed = ("--no-amp", "--set", f"{stage}_train.max_nonfinite_steps=2")
    other = copy_of(project, tmp_path / "other", *[path.name for path in project.model_dir.iterdir()])
    with planted(script, source, 1, 3) as seen:
        said = project.run(script, *allowed)
    kind = "gradient" if source == "gradient" else "loss"
    for n, (step, cases) in enumerate([(5, seen["cases"][0]), (7, seen["cases"][2])], 1):
        where = f"step {step}: the {kind} is not finite (rank 0: {cases[0]})"
        assert f"warning: {where}; the step is skipped ({n} of 2)" in said
    assert said.count("warning: ") == 2

    # By hand: leave out the same steps of optimisers and averages, with all numbers finite.
    real_step, real_average = Optimizer.step, EMA.update
    calls, averaged, steppers = itertools.count(), itertools.count(), 1 + (script is train_autoencoder)

    def step(self, rate, masked):
        if next(calls) // steppers in (0, 2):
            self.adam.param_groups[0]["lr"] = rate
            return self.adam.zero_grad()
        return real_step(self, rate, masked)

    def update(self, *args):
        if next(averaged) in (1, 3):
            real_average(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", step)
        patch.setattr(EMA, "update", update)
        other.run(script, "--no-amp")
    a, b = (one.checkpoint(LAST[script]) for one in (project, other))
    assert a["masked"] == 2 and b["masked"] == 0
    for key in ("model", "ema", "stepper", "discriminator", "discriminator_stepper", "step"):
        assert not differences(a.get(key), b.get(key)), key

    # The log tells how many, and the means are of the finite batches.
    line = next(one for one in project.log(stage) if one["epoch"] == 1 and "seconds" in one)
    assert line["masked_steps"] == 2 and line["step"] == 8
    losses = [seen["losses"][i] for i in ((1, 3) if kind == "loss" else range(4))]
    key = "recon_loss" if script is train_autoencoder else "loss"
    assert line[key] == pytest.approx(sum(losses) / len(losses), abs=2e-6)
    assert "masked_steps" not in project.log(stage)[0]

    before = checkpoints(project)
    with planted(script, source, 3):
        message = project.refused(script, *allowed, "--set", f"{stage}_train.max_epochs=3", code=1)
    assert message.startswith(f"error: step 11: the {kind} is not finite")
    assert checkpoints(project) == before


def test_promise_10_the_count_survives_a_kill_in_the_middle_of_an_epoch(project, monkeypatch):
    """Passed over at step 5, saved, killed at step 8 and gone on with: step 7 would be the second."""
    allowed = ["--no-amp", "--set", "diffusion_train.max_nonfinite_steps=1"]
    allowed += ["--set", "diffusion_train.save_minutes=0"]
    real, calls = torch.optim.Adam.step, itertools.count(1)

    class PowerCut(BaseException):
        pass

    def step(self, *args, **kwargs):
        if next(calls) == 4:
            raise PowerCut
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, planted(train_diffusion, "loss", 1), pytest.raises(PowerCut):
        patch.setattr(torch.optim.Adam, "step", step)
        project.run(train_diffusion, *allowed)
    saved = project.checkpoint("diffusion_unet_last.pt")
    assert saved["masked"] == 1 and 5 <= saved["step"] < 8
    with planted(train_diffusion, "loss", 1):
        message = project.refused(train_diffusion, *allowed, code=1)
    assert f"step {saved['step'] + 1}: the loss is not finite" in message


def test_promise_10_with_accumulation_the_whole_step_is_masked(project):
    """NaN in the first of the two batches of step 2: the second is finite, and the step is not made. The
    message names the cases of both."""
    accumulate = ("--fresh", "--no-amp", "--set", "diffusion_train.accumulate_steps=2")
    with planted(train_diffusion, "loss", 3) as seen:
        message = project.refused(train_diffusion, *accumulate, code=1)
    where = f"(rank 0: {seen['cases'][2][0]}, {seen['cases'][3][0]})"
    assert f"step 2: the loss is not finite {where}" in message
    assert [(masked, bool(changes)) for masked, changes in seen["steps"]] == [(False, True), (True, False)]


def test_promise_10_in_the_last_step_of_a_run(project):
    """No further step reads the flag; the end of the epoch does, before anything is saved."""
    before = checkpoints(project)
    with planted(train_diffusion, "loss", 4):
        assert "step 8: " in project.refused(train_diffusion, "--no-amp", code=1)
    assert checkpoints(project) == before


def test_promise_10_a_validation_that_is_not_finite_ends_the_run(project, monkeypatch):
    before = project.checkpoint("diffusion_unet.pt")
    scores = iter([before["best"], NAN])  # of epoch 0, at whose end the checkpoint stands, and of epoch 1
    monkeypatch.setattr(train_diffusion, "validate", lambda *args: {"loss": next(scores)})
    message = project.refused(train_diffusion, "--no-amp", code=1)
    assert "validation gives nan in epoch 1" in message and "docs/NaN_FIX_GUIDE.md" in message
    assert not differences(project.checkpoint("diffusion_unet.pt"), before)


def test_promise_10_an_epoch_without_a_finite_step(project):
    """Nothing is learnt, and the log is still JSON, which knows no NaN."""

    def strictly(text):
        raise ValueError(f"{text} is not JSON")

    before = project.checkpoint("diffusion_unet_last.pt")
    allowed = ("--no-amp", "--set", "diffusion_train.max_nonfinite_steps=4")
    with planted(train_diffusion, "loss", 1, 2, 3, 4):
        project.run(train_diffusion, *allowed)
    after = project.checkpoint("diffusion_unet_last.pt")
    assert not differences(after["model"], before["model"]) and not differences(after["ema"], before["ema"])
    for line in (project.model_dir / "train_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strictly)
    assert project.log("diffusion")[-2]["masked_steps"] == 4


# ---------------------------------------------------------------- when the decision is read


def test_the_decision_is_read_a_step_later(project, monkeypatch):
    """At each step: reduce, read the one before, step, average. After the last: read it."""
    order, methods = [], [(Guard, Guard.vote), (Guard, Guard.read), (Optimizer, Optimizer.step)]
    for owner, real in (*methods, (EMA, EMA.update), (Progress, Progress.end_epoch)):

        def noted(self, *args, real=real, **kwargs):
            order.append(real.__name__)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, real.__name__, noted)
    project.run(train_diffusion, "--no-amp")
    # The end of epoch 0, at which the checkpoint stands, comes again first.
    assert order[:2] == ["end_epoch", "read"]
    assert order[2:-3] == ["vote", "read", "step", "update"] * 4
    assert order[-3:] == ["end_epoch", "read", "read"]  # before the epoch's line, and before the save


def guard(allowed: int = 0, say=print) -> Guard:
    """The guard of one process."""
    return Guard(1, lambda value: [value], allowed, 0.0, 0, say)


def vote(watched: Guard, loss: torch.Tensor, finite: torch.Tensor, step: int, *cases: str) -> torch.Tensor:
    """Its vote at a step at which nothing else happens."""
    return watched.vote(loss, finite, False, False, 0.0, step, list(cases or "a"))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_nothing_on_the_device_is_waited_for(optimizer):
    """On tensors without values whoever asks for one is found out; three steps pass, the reading does not."""
    with FakeTensorMode():
        network = nn.Linear(3, 3)
        section = SECTION | {"optimizer": optimizer, "muon_lr": 0.02, "clip_grad_norm": 1.0}
        stepper = Optimizer(network, section, None)
        watched, means = guard(), EpochMeans({})
        for number in range(3):
            loss = network(torch.randn(2, 3)).square().mean()
            stepper.backward(loss)
            means.add({"loss": loss})
            masked = vote(watched, loss, stepper.clip(), number)
            stepper.step(1e-2, masked)
        with pytest.raises(DataDependentOutputException):
            watched.read()


def test_a_guard_reads_all_but_the_newest():
    printed = []
    watched = guard(1, printed.append)
    for number, loss in enumerate([1.0, NAN, 1.0]):
        masked = vote(watched, torch.tensor(loss), torch.tensor(True), number)
        assert float(masked) == math.isnan(loss)
        watched.read()
        assert len(printed) == [0, 0, 1][number]
    watched.read(all_steps=True)
    assert (watched.skipped, len(watched.pending)) == (1, 0)
    vote(watched, torch.tensor(math.inf), torch.tensor(True), 3, "b", "c")
    with pytest.raises(FloatingPointError, match=r"step 4: the loss is not finite \(rank 0: b, c\)"):
        watched.read(all_steps=True)


# ---------------------------------------------------------------- fp16


def test_promise_10_an_fp16_overflow_is_no_fault_until_the_scale_is_1():
    """It skips the step, here and there alike, and halves the scale, 16 times from 65536 to 1."""
    network = nn.Linear(2, 1, bias=False)
    stepper = Optimizer(network, SECTION, torch.float16)
    weights = copy.deepcopy(network.state_dict())
    zero, watched = torch.zeros(()), guard()

    def backward(overflow: bool) -> torch.Tensor:
        loss = network(torch.ones(1, 2)).square().mean()
        hook = network.weight.register_hook(lambda g: g * math.inf if overflow else g)
        stepper.backward(loss)
        hook.remove()
        return loss.detach()

    for halvings in range(16):
        loss = backward(True)
        assert stepper.scaler.get_scale() == 2 ** (16 - halvings)
        masked = vote(watched, loss, stepper.clip(), halvings)
        assert masked == 0
        stepper.step(1e-2, masked)
        assert not differences(network.state_dict(), weights)
    watched.read(all_steps=True)
    assert watched.skipped == 0 and stepper.scaler.get_scale() == 1

    # A finite one steps, by as much as without a scale: Adam's first step is the learning rate.
    backward(False)
    assert stepper.clip()
    stepper.step(1e-2, zero)
    moved = network.weight.detach() - weights["weight"]
    torch.testing.assert_close(moved.abs(), torch.full((1, 2), 1e-2), rtol=1e-4, atol=0)

    # With nothing left to lower, it is a fault.
    loss = backward(True)
    vote(watched, loss, stepper.clip(), 17)
    with pytest.raises(FloatingPointError, match="step 18: the gradient is not finite"):
        watched.read(all_steps=True)


def test_promise_10_an_fp16_loss_that_is_not_finite_is_a_fault_at_once():
    """No scale mends the forward pass."""
    network = nn.Linear(2, 1)
    stepper, watched = Optimizer(network, SECTION, torch.float16), guard()
    before = copy.deepcopy(network.state_dict())
    loss = network(torch.ones(1, 2)).mean() * NAN
    stepper.backward(loss)
    masked = vote(watched, loss, stepper.clip(), 0)
    stepper.step(1e-2, masked)
    assert masked == 1
    assert not differences(before, network.state_dict())
    moments = stepper.adam.state_dict()["state"]  # made by the first step, and still empty
    assert not any(value.any() for one in moments.values() for value in one.values())


def test_the_mask_alone_holds_back_a_finite_step():
    """As on the ranks whose own numbers are finite, and for the optimiser whose network is not the guilty
    one."""
    network = nn.Linear(2, 1)
    stepper = Optimizer(network, SECTION, None)
    for masked in (0.0, 1.0, 0.0):
        before = copy.deepcopy((network.state_dict(), stepper.adam.state_dict()["state"]))
        stepper.backward(network(torch.ones(1, 2)).square().mean())
        assert stepper.clip()
        stepper.step(1e-2, torch.tensor(masked, dtype=torch.float64))
        after = network.state_dict(), stepper.adam.state_dict()["state"]
        assert bool(differences(before, after)) != masked
        assert all(parameter.grad is None for parameter in network.parameters())


def test_epoch_means_leave_out_what_is_not_finite():
    """Of each term by itself, those from before a resume counted in."""
    means = EpochMeans({"loss": torch.tensor([10.0, 4.0], dtype=torch.float64)})
    for loss, other in ((2.0, NAN), (math.inf, 3.0), (NAN, 5.0)):
        means.add({"loss": torch.tensor(loss), "other": torch.tensor(other)})
    totals = means.totals(lambda pair: pair)
    assert {key: pair.tolist() for key, pair in totals.items()} == {"loss": [12, 5], "other": [8, 2]}


# ---------------------------------------------------------------- two processes

# One of two: stage 1 with a NaN gradient that is passed over, then stage 2, which a NaN loss ends; both on
# rank 1 only. Arguments: folder for what each holds, and those of both scripts.
WORKER = """
import os
import sys

import chain
import test_nonfinite

chain.leave_after(test_nonfinite.worker, sys.argv[1], int(os.environ["RANK"]), sys.argv[2:])
"""


def worker(folder: str, rank: int, argv: list[str]) -> None:
    """What `WORKER` does."""
    import torch.distributed as dist  # noqa: PLC0415

    dist.init_process_group("gloo")  # one group for both: a process that opens gloo's a second time may hang
    dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None
    held = {}

    def keep(script, seen):
        held[script.__name__] = {"steps": [[m, bool(c)] for m, c in seen["steps"]], "cases": seen["cases"]}

    def end_step(self, *args):
        real(self, *args)
        held[self.stage] = learners[-1].state_dict() | {"masked": self.guard.skipped}

    def read(self, *args, **kwargs):
        try:
            real_read(self, *args, **kwargs)
        except FloatingPointError:  # now, since torchrun ends the second process before it is done
            keep(train_diffusion, seen)
            torch.save(held, os.path.join(folder, f"held_{rank}.pt"))
            raise

    def recording(build):
        return lambda *args: learners.append(build(*args)) or learners[-1]

    learners = []
    for script in (train_autoencoder, train_diffusion):
        script.build_learner = recording(script.build_learner)
    real, real_read = Progress.end_step, Guard.read
    Progress.end_step, Guard.read = end_step, read
    number = 3 if rank else 0  # there is no batch 0
    with planted(train_autoencoder, "gradient", number) as seen:
        train_autoencoder.main(argv)
    keep(train_autoencoder, seen)
    with planted(train_diffusion, "loss", number) as seen:
        train_diffusion.main(argv)


@pytest.mark.skipif(os.name == "nt", reason="torchrun asks for libuv, which PyTorch for Windows has not")
def test_promise_10_nan_on_rank_1_only(begun, tmp_path):
    """No hang; both ranks hold the same weights, unchanged by the masked step; the message names rank 1's
    case."""
    project = copy_of(begun, tmp_path / "two", "split.json")
    (tmp_path / "worker.py").write_text(WORKER)
    more = ["--no-amp", "--set", "autoencoder_train.max_nonfinite_steps=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "worker.py"), str(tmp_path), *project.argv(*more)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    options = {"cwd": ROOT, "env": environment, "timeout": 300}
    process = subprocess.run(command, capture_output=True, text=True, **options)
    printed = process.stdout + process.stderr
    assert process.returncode == 1, printed
    first, second = (torch.load(tmp_path / f"held_{rank}.pt", weights_only=True) for rank in (0, 1))
    # Stage 1: 2 steps an epoch, the third of four masked, for both optimisers, on both ranks.
    expected = [[False, True]] * 4 + [[True, False]] * 2 + [[False, True]] * 2
    assert first["train_autoencoder"]["steps"] == second["train_autoencoder"]["steps"] == expected
    of_rank_0, of_rank_1 = (held["train_autoencoder"]["cases"][2][0] for held in (first, second))
    warning = f"step 3: the gradient is not finite (rank 0: {of_rank_0}; rank 1: {of_rank_1})"
    assert f"{warning}; the step is skipped (1 of 1)" in printed
    assert not differences(first["autoencoder"], second["autoencoder"])
    # Stage 2: the third step ends it.
    expected = [[False, True]] * 2 + [[True, False]]
    assert first["train_diffusion"]["steps"] == second["train_diffusion"]["steps"] == expected
    assert not differences(first["diffusion"], second["diffusion"])
    case = second["train_diffusion"]["cases"][2][0]
    message = f"error: step 3: the loss is not finite (rank 1: {case}). No weight was changed."
    assert printed.count(message) == printed.count("error: ") == 1, printed
