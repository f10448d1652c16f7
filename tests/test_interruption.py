"""Promise 9 (a signal saves, and the same command resumes), and what else comes from outside: two runs in one
folder, a full disk, a folder that is none, a file that vanishes."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import chain
import numpy as np
import pytest
import torch
from chain import ROOT, Project, assert_same_result, copy_of, differences, fingerprint
from filelock import FileLock, Timeout
from tensorboard.summary.writer.record_writer import RecordWriter

import cache_latents
import train_autoencoder
import train_diffusion
import utils
from ldm.data.datasets import EpochSampler, VolumeDataset
from ldm.system.checkpoints import load_checkpoint
from ldm.system.errors import message_of
from ldm.system.signals import Interruption
from ldm.training.logs import TrainLog
from ldm.training.progress import Progress

posix = pytest.mark.skipif(os.name == "nt", reason="signals between processes, and file size limits")
STAGE = {train_autoencoder: "autoencoder", train_diffusion: "diffusion"}
NAME = {train_autoencoder: "autoencoder", train_diffusion: "diffusion_unet"}
NEEDED = {train_autoencoder: ["split.json"], train_diffusion: ["split.json", "autoencoder.pt"]}
CODE = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Project:
    """Both stages, two epochs of 4 steps, never disturbed. Look, but do not touch."""
    done = chain.trained(tmp_path_factory.getbasetemp())
    project = copy_of(done, tmp_path_factory.mktemp("whole") / "run")
    short = {"batch_size": 1, "max_epochs": 2, "val_interval": 1, "save_minutes": None}
    first, second = project.config["autoencoder_train"], project.config["diffusion_train"]
    project.change(autoencoder_train=first | short | {"adversarial_warmup_epochs": 1})
    project.change(diffusion_train=second | short)
    for script in STAGE:
        project.run(script, "--no-amp")
    return project


def fresh(whole: Project, folder: Path, script) -> Project:
    """A project whose stage is still to be trained; stage 2 takes the autoencoder of `whole`."""
    return copy_of(whole, folder, *NEEDED[script])


@pytest.fixture(scope="module")
def half(whole, tmp_path_factory) -> Callable[[object], Project]:
    """`half(script)`: a project in which the first of the two epochs of a stage is done."""
    made = {}

    def make(script) -> Project:
        if script not in made:
            made[script] = fresh(whole, tmp_path_factory.mktemp("half") / "run", script)
            with stopped_by(signal.SIGTERM, made[script], script, EpochSampler, "__iter__", 2):
                made[script].run(script, "--no-amp")
        return made[script]

    return make


def halfway(half, folder: Path, script, *others: str) -> Project:
    """A copy of `half(script)`."""
    project = half(script)
    names = [path.name for path in project.model_dir.iterdir() if path.suffix in (".pt", ".json", ".jsonl")]
    return copy_of(project, folder, *names)


def checkpoints(project: Project) -> dict[str, str]:
    return {name: digest for name, digest in fingerprint(project.model_dir).items() if name.endswith(".pt")}


def released(project: Project) -> None:
    """Nothing is left of a run that ended: no lock, no part of a file, no signal handler."""
    with contextlib.suppress(AttributeError):
        assert not isinstance(signal.getsignal(signal.SIGTERM).__self__, Interruption)
    with FileLock(project.model_dir / ".lock").acquire(timeout=0):
        pass
    assert not list(project.folder.rglob("*.part"))


def before_call(patch: pytest.MonkeyPatch, owner, name: str, call: int, what: Callable[[], None]) -> None:
    """Do something before the call of this number (from 1) of `owner.name`."""
    real, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            what()
        return real(*args, **kwargs)

    patch.setattr(owner, name, watched)


@contextlib.contextmanager
def stopped_by(number: signal.Signals, project: Project, script, owner, name: str, call: int):
    """Raise a signal before this call of `owner.name`, and expect the run to end on it."""
    handlers = [signal.getsignal(one) for one in CODE]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        before_call(patch, owner, name, call, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as stop:
            yield
    assert stop.value.code == CODE[number]
    text = err.getvalue()
    assert text.count(f"stopped by {number.name}") == 1 and "error" not in text, text
    assert [signal.getsignal(one) for one in CODE] == handlers
    released(project)


# ---------------------------------------------------------------- promise 9


MOMENTS = {  # before which call of what, and the steps that are saved then
    "in a step": (torch.optim.Adam, "step", 2, {1, 2, 3, 4}),
    "in the last step of an epoch": (torch.optim.Adam, "step", 4, {4, 5, 6}),
    "in a validation": (None, "validate", 1, {4}),
    "in the save": (torch, "save", 1, {4}),
    "in the save of the best": (torch, "save", 2, {4}),
    "in a line of the log": (TrainLog, "record", 2, {4}),
    "before the first step": (Progress, "epochs", 1, set()),
    "after the last": (TrainLog, "close", 1, {8}),
}


@pytest.mark.parametrize(
    "script, number, moment",
    [
        (train_autoencoder, signal.SIGTERM, "in a step"),
        (train_autoencoder, signal.SIGINT, "in the save"),
        (train_diffusion, signal.SIGTERM, "in the last step of an epoch"),
        (train_diffusion, signal.SIGINT, "in a validation"),
        (train_diffusion, signal.SIGTERM, "in the save"),
        (train_diffusion, signal.SIGTERM, "in the save of the best"),
        (train_diffusion, signal.SIGINT, "in a line of the log"),
        (train_diffusion, signal.SIGTERM, "before the first step"),
        (train_diffusion, signal.SIGINT, "after the last"),
    ],
)
def test_promise_9_a_signal_saves_and_the_same_command_resumes(whole, tmp_path, script, number, moment):
    project = fresh(whole, tmp_path / "run", script)
    owner, name, call, steps = MOMENTS[moment]
    with stopped_by(number, project, script, owner or script, name, call):
        project.run(script, "--no-amp")
    last = project.model_dir / f"{NAME[script]}_last.pt"
    assert last.exists() == bool(steps)
    if steps:
        assert load_checkpoint(last)["step"] in steps
    assert ("resumed" in project.run(script, "--no-amp")) == bool(steps)
    assert_same_result(project, whole, script)


def test_promise_9_signal_after_signal(whole, tmp_path):
    """Both kinds in turn, each twice in the first step after a start: the end is the same."""
    project, steps = fresh(whole, tmp_path / "run", train_diffusion), [0]
    while steps[-1] < 8 and len(steps) < 9:
        number = (signal.SIGTERM, signal.SIGINT)[len(steps) % 2]
        try:
            with (
                stopped_by(number, project, train_diffusion, torch.optim.Adam, "step", 1),
                pytest.MonkeyPatch.context() as patch,
            ):
                before_call(patch, Progress, "agree_to_skip", 1, partial(signal.raise_signal, number))
                project.run(train_diffusion, "--no-amp")
        except pytest.fail.Exception:  # the run came to its end
            break
        steps.append(project.checkpoint("diffusion_unet_last.pt")["step"])
    assert steps == sorted(set(steps)) and len(steps) > 3, steps
    project.run(train_diffusion, "--no-amp")
    assert_same_result(project, whole, train_diffusion)


def test_promise_9_one_process_leaves_after_the_step_under_way(whole, tmp_path):
    """There is no one to agree with: the 30 seconds of torchrun and Slurm are not spent on further steps."""
    project = fresh(whole, tmp_path / "run", train_diffusion)
    with stopped_by(signal.SIGTERM, project, train_diffusion, train_diffusion, "diffusion_loss", 2):
        project.run(train_diffusion, "--no-amp")
    assert project.checkpoint("diffusion_unet_last.pt")["step"] == 2


# One of two: stage 1 in one folder from start to end, then in another, where step 8 waits for the signal.
WORKER = """
import sys

import chain
import test_interruption

if __name__ == "__main__":
    split = sys.argv.index("--")
    chain.leave_after(test_interruption.worker, sys.argv[1:split], sys.argv[split + 1 :])
"""


def worker(undisturbed: list[str], disturbed: list[str]) -> None:
    """What `WORKER` does."""
    import torch.distributed as dist  # noqa: PLC0415

    dist.init_process_group("gloo")  # one group for both: a process that opens gloo's a second time may hang
    dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None
    train_autoencoder.main(undisturbed)
    asked = []
    note = Interruption._note
    Interruption._note = lambda self, *args: (asked.append(1), note(self, *args))

    def wait():
        deadline = time.monotonic() + 300
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)

    before_call(pytest.MonkeyPatch(), Progress, "agree_to_skip", 8, wait)
    train_autoencoder.main(disturbed)


def launch(*command: str) -> subprocess.Popen:
    """A process group of its own that prints to one pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, start_new_session=True, **streams
    )


def wait_for_log(project: Project, process: subprocess.Popen, lines: int) -> None:
    """Until the log of a run has so many lines."""
    deadline = time.monotonic() + 300
    path = project.model_dir / "train_log.jsonl"
    while not path.is_file() or path.read_text().count("\n") < lines:
        if process.poll() is not None or time.monotonic() > deadline:
            end(process)
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)


def end(process: subprocess.Popen) -> None:
    """Whatever of its group is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@posix
def test_promise_9_sigterm_to_torchrun(whole, tmp_path):
    """Two ranks end within 30 s, and the same command resumes bit-exactly."""
    quiet = fresh(whole, tmp_path / "quiet", train_autoencoder)
    project = fresh(whole, tmp_path / "run", train_autoencoder)
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = ["--no-amp", "--set", "data.num_workers=0", "--set", "autoencoder_train.max_epochs=5"]
    more += ["--set", "autoencoder_train.val_interval=4"]
    process = launch(*torchrun, tmp_path / "worker.py", *quiet.argv(*more), "--", *project.argv(*more))
    try:
        wait_for_log(project, process, 4)  # of epoch 0, its validation, epochs 1 and 2
        process.terminate()
        asked = time.monotonic()
        printed = process.communicate(timeout=60)[0]
        assert time.monotonic() - asked < 30
    finally:
        end(process)
    assert "stopped by SIGTERM" in printed and "error: " not in printed.lower(), printed
    assert project.checkpoint("autoencoder_last.pt")["step"] in (8, 9)
    released(project)
    process = launch(*torchrun, "train_autoencoder.py", *project.argv(*more))
    try:
        printed = process.communicate(timeout=300)[0]
    finally:
        end(process)
    assert process.returncode == 0 and printed.count("resumed in epoch") == 1, printed
    assert_same_result(project, quiet, train_autoencoder)


@posix
def test_promise_9_ctrl_c_reaches_the_loaders_as_well(whole, tmp_path):
    """A terminal's Ctrl-C goes to every process of the group: only the training acts on it."""
    data = chain.make_data(tmp_path / "data", cases=40)
    project = Project(tmp_path / "run", data, whole.config)
    more = ["--no-amp", "--set", "data.num_workers=1", "--set", "autoencoder_train.max_epochs=1000"]
    more += ["--set", "autoencoder_train.val_interval=1000"]
    process = launch("train_autoencoder.py", *project.argv(*more))
    try:
        wait_for_log(project, process, 3)  # of epoch 0, its validation, and epoch 1, not saved yet
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
    finally:
        end(process)
    assert process.returncode == 130, printed
    assert printed.count("stopped by SIGINT") == 1 and "Traceback" not in printed, printed
    assert project.checkpoint("autoencoder_last.pt")["step"] > 52  # of two epochs
    released(project)


def test_a_rank_that_waits_with_its_message_obeys_the_next_signal(monkeypatch):
    """Where all ranks fail alike, torchrun ends the others before they say so again: by SIGTERM, which has to
    end them then."""
    handler, slept = signal.getsignal(signal.SIGTERM), []

    def sleep(seconds):
        slept.append(seconds)
        assert signal.getsignal(signal.SIGTERM) == handler

    @utils.command
    def main(argv=None):
        interruption = Interruption()
        interruption.unsaved = True
        raise FloatingPointError("step 1: the loss is not finite")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()):
        main([])
    assert stop.value.code == 1 and slept


# ---------------------------------------------------------------- two runs in one folder


def test_a_second_run_in_a_folder_is_refused(half, tmp_path):
    project = halfway(half, tmp_path / "run", train_diffusion)
    before = fingerprint(project.folder)
    with FileLock(project.model_dir / ".lock"):
        message = project.refused(train_diffusion, "--fresh")
    assert message == (
        f"error: {project.model_dir}: another run is writing there. Wait for its end, or choose another "
        "model_dir."
    )
    assert fingerprint(project.folder) == before


@posix
def test_a_killed_run_leaves_the_folder_free_and_its_parts_are_cleared_away(half, whole, tmp_path):
    """The lock is the system's, so that it goes with the process; what was half written goes at the next
    start."""
    project = halfway(half, tmp_path / "run", train_diffusion)
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1)"
    process = launch("-u", "-c", f"{hold}; time.sleep(600)", project.model_dir / ".lock")
    try:
        assert process.stdout.readline() == "1\n"
        with pytest.raises(Timeout):
            FileLock(project.model_dir / ".lock").acquire(timeout=0)
        project.refused(train_diffusion)
    finally:
        process.kill()
        process.communicate()
    part = project.model_dir / f".diffusion_unet_last.pt.{'0' * 32}.part"
    part.write_bytes(b"half of a save")
    mine = project.model_dir / "notes.part"
    mine.write_text("not the program's")
    project.run(train_diffusion, "--no-amp")
    assert not part.exists() and mine.read_text() == "not the program's"
    assert_same_result(project, whole, train_diffusion)


# ---------------------------------------------------------------- the disk


@contextlib.contextmanager
def disk_full(how: str, save: int):
    """No room for the checkpoint of this number (from 1) and for what comes after it."""
    real, count = torch.save, []
    with pytest.MonkeyPatch.context() as patch:

        def fsync(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def torch_save(content, file):
            count.append(1)
            if len(count) < save:
                return real(content, file)
            if how == "fsync":
                patch.setattr(os, "fsync", fsync)
            else:
                limit_file_size(file.tell() + 50_000)
            return real(content, file)

        patch.setattr(torch, "save", torch_save)
        try:
            yield
        finally:
            limit_file_size(None)


def limit_file_size(size: int | None) -> None:
    """The largest file that this process may write, as on a small quota; None lifts it."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


@pytest.mark.parametrize(
    "script, how, save",
    [
        (train_diffusion, "fsync", 1),
        pytest.param(train_diffusion, "limit", 2, marks=posix),
        pytest.param(train_autoencoder, "limit", 1, marks=posix),
        pytest.param(train_autoencoder, "limit", 2, marks=posix),
    ],
)
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints(half, whole, tmp_path, script, how, save):
    """In the save of the newest (1) or of the best (2) after epoch 1: one message that names the file, every
    checkpoint loads, and with room again the same command comes to the same end."""
    project = halfway(half, tmp_path / "run", script)
    assert whole.checkpoint(f"{NAME[script]}.pt")["epoch"] == 1
    before = checkpoints(project)
    with disk_full(how, save):
        message = project.refused(script, "--no-amp", code=1)
    failed = f"{NAME[script]}{'_last' if save == 1 else ''}.pt"
    assert message.startswith(f"error: {project.model_dir / failed} could not be written")
    reason = errno.EFBIG if how == "limit" else errno.ENOSPC
    assert os.strerror(reason) in message and message.count("\n") == 0, message
    after = checkpoints(project)
    written = {f"{NAME[script]}_last.pt", f"{NAME[script]}_prev.pt"} if save == 2 else set()
    assert {name for name in after if after[name] != before.get(name)} == written
    for name in after:
        load_checkpoint(project.model_dir / name)
    released(project)
    project.run(script, "--no-amp")
    assert_same_result(project, whole, script)


@posix
def test_a_log_that_cannot_grow_ends_the_run(half, whole, tmp_path):
    """Its disk is full, in an epoch that saves nothing: the message names the log, and no line is lost."""
    project = halfway(half, tmp_path / "run", train_diffusion)
    log = project.model_dir / "train_log.jsonl"
    line = '{"stage": "autoencoder", "step": 1, "epoch": 0, "note": "' + "x" * 100_000 + '"}\n'
    log.write_text(line + log.read_text())
    more = ("--no-amp", "--set", "diffusion_train.val_interval=2", "--set", "diffusion_train.max_epochs=3")
    before, sizes = checkpoints(project), []

    def fill_disk():
        sizes.append(log.stat().st_size)
        limit_file_size(sizes[0] + 20)

    with pytest.MonkeyPatch.context() as patch:
        # From the first step on; the line of epoch 0 and its validation are written again before.
        before_call(patch, torch.optim.Adam, "step", 1, fill_disk)
        try:
            message = project.refused(train_diffusion, *more, code=1)
        finally:
            limit_file_size(None)
    assert str(log) in message and os.strerror(errno.EFBIG) in message
    assert checkpoints(project) == before and log.stat().st_size <= sizes[0] + 20
    released(project)
    project.run(train_diffusion, "--no-amp")
    assert_same_result(project, whole, train_diffusion)


def test_tensorboards_full_disk_is_told_once_and_ends_no_training(whole, tmp_path, monkeypatch, capfd):
    """Its files are written by a thread, whose own traceback is of no use to anyone."""
    project, count, real = fresh(whole, tmp_path / "run", train_diffusion), [], RecordWriter.write

    def write(self, data):
        count.append(1)
        if len(count) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    events, log = project.folder / "tensorboard" / "diffusion", project.model_dir / "train_log.jsonl"
    assert project.run(train_diffusion, "--no-amp").count("warning: ") == 1
    told = (
        f"warning: {events}: TensorBoard's files could not be written ({os.strerror(errno.ENOSPC)}). The "
        f"training continues without them; {log} has the numbers\n"
    )
    assert told in (project.model_dir / "log.txt").read_text()
    assert "Traceback" not in capfd.readouterr().err
    assert_same_result(project, whole, train_diffusion)


def test_a_place_where_tensorboard_cannot_write_is_told_at_the_start(whole, tmp_path):
    project = fresh(whole, tmp_path / "run", train_diffusion)
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "diffusion").write_text("a file")
    project.set_environment(tfevent_path=str(tmp_path / "events"))
    message = project.refused(train_diffusion, "--no-amp", code=1)
    assert message.startswith(f"error: {tmp_path / 'events' / 'diffusion'}: TensorBoard's files could not be")
    assert "choose another tfevent_path" in message


@posix
def test_a_full_disk_under_the_cache_of_latents_names_its_reason(whole, tmp_path):
    project = fresh(whole, tmp_path / "run", train_diffusion)
    limit_file_size(5_000)
    try:
        message = project.refused(cache_latents, code=1)
    finally:
        limit_file_size(None)
    assert message.startswith(f"error: {project.model_dir / 'cache' / 'latents'}{os.sep}")
    assert f".npy could not be written ({os.strerror(errno.EFBIG)})" in message


# ---------------------------------------------------------------- memory of loader processes


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_array() -> None:
    np.empty(2**62, np.int8)


@posix
@pytest.mark.parametrize(
    "fault, start",
    [
        (killed, "a loader process was ended by the system (DataLoader worker (pid"),
        (no_array, "out of memory (numpy"),
    ],
    ids=["killed", "no array"],
)
def test_a_loader_process_without_memory_ends_the_run(whole, tmp_path, monkeypatch, fault, start):
    project = fresh(whole, tmp_path / "run", train_autoencoder)
    main, real = os.getpid(), VolumeDataset.volume

    def volume(self, i: int):
        if os.getpid() != main:  # never in this process
            fault()
        return real(self, i)

    monkeypatch.setattr(VolumeDataset, "volume", volume)
    message = project.refused(train_autoencoder, "--no-amp", "--set", "data.num_workers=1", code=1)
    assert message.startswith(f"error: {start}") and message.count("\n") == 0, message
    assert "data.num_workers" in message or "docs/TROUBLESHOOTING.md" in message
    released(project)


LOADER_ERRORS = [
    (
        RuntimeError("unable to allocate shared memory(shm) for file"),
        "the loader processes ran out of shared",
    ),
    (MemoryError(), "out of memory (MemoryError)"),
    (OSError(errno.EMFILE, "many files"), f"[Errno {errno.EMFILE}] many files: set data.num_workers to 0"),
    (OSError(errno.ENOSPC, "no space"), f"[Errno {errno.ENOSPC}] no space: a disk is full, or /dev/shm"),
]


@pytest.mark.parametrize("error, message", LOADER_ERRORS)
def test_errors_of_loader_processes_in_words(error, message):
    """As torch passes them on: with the traceback in the message."""
    last = "".join(traceback.format_exception_only(error)).strip()
    wrapped = f"Caught {type(error).__name__} in DataLoader worker process 0.\nTraceback:\n{last}"
    assert message_of(type(error)(wrapped)).startswith(message)


# ---------------------------------------------------------------- the data


def test_a_scan_that_vanishes_ends_the_run(whole, tmp_path):
    """Nothing is cached, and the scans go after the first step: one line, though a loader process raised it,
    and the training can be resumed when they are back."""
    project = Project(tmp_path / "run", chain.make_data(tmp_path / "data"), whole.config)
    project.change(data=project.config["data"] | {"cache_rate": 0.0, "num_workers": 1})
    folder = tmp_path / "data" / "imagesTr"
    with pytest.MonkeyPatch.context() as patch:
        before_call(patch, torch.optim.Adam, "step", 5, lambda: folder.rename(tmp_path / "away"))
        message = project.refused(train_autoencoder, "--no-amp")
    assert message.startswith(f"error: {folder}{os.sep}scan_") and ".nii.gz: cannot be read" in message
    assert "worker process" not in message and message.count("\n") == 0, message
    assert load_checkpoint(project.model_dir / "autoencoder_last.pt")["step"] == 4
    released(project)
    (tmp_path / "away").rename(folder)
    project.run(train_autoencoder, "--no-amp")
    models = [one.checkpoint("autoencoder_last.pt")["model"] for one in (project, whole)]
    assert not differences(*models)
    assert not differences(project.log("autoencoder"), whole.log("autoencoder"))
