"""What a training shows of itself: TensorBoard, pictures in the model folder, and log.txt."""

import io
import math
import re
import time
import warnings
from collections import Counter
from types import SimpleNamespace

import chain
import numpy as np
import pytest
import torch
from chain import SPACING, Project, copy_of, fingerprint
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_autoencoder
import train_diffusion
from ldm import figures
from ldm.data.cases import Case
from ldm.data.posteriors import Posteriors
from ldm.diffusion import objective
from ldm.diffusion.process import NoiseProcess
from ldm.losses import AutoencoderLoss
from ldm.system.ranks import Run
from ldm.training import autoencoder, logs, progress
from ldm.training.latents import WithNoise
from ldm.training.logs import TrainLog
from ldm.training.step import Optimizer, learning_rate

ALL = {"images": 0, "scalars": 0}


@pytest.fixture
def encoded(done, tmp_path) -> Project:
    """Stage 1 is done."""
    return copy_of(done, tmp_path / "run", "autoencoder.pt", "split.json")


def events_of(project: Project, stage: str) -> EventAccumulator:
    return EventAccumulator(str(project.folder / "tensorboard" / stage), ALL).Reload()


def scalars(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def pictures(events: EventAccumulator, tag: str) -> dict[int, np.ndarray]:
    """The pictures of a tag by step, 0 to 255."""
    found = {e.step: Image.open(io.BytesIO(e.encoded_image_string)) for e in events.Images(tag)}
    return {step: np.asarray(image.convert("L")).astype(float) for step, image in found.items()}


def frames(path) -> int:
    with Image.open(path) as image:
        return image.n_frames


# ---------------------------------------------------------------- stage 1


@pytest.fixture(scope="module")
def watched(done, tmp_path_factory):
    """Stage 1 in 5 epochs of 2 steps, the adversarial term from the start; the norms of both gradients of
    each step, by hand."""
    project = copy_of(done, tmp_path_factory.mktemp("watched") / "run", "split.json")
    short = {"max_epochs": 5, "val_interval": 1, "adversarial_warmup_epochs": 0, "lr_warmup_steps": 3}
    project.change(autoencoder_train=project.config["autoencoder_train"] | short)
    norms, real = [], Optimizer.clip

    def clip(self):
        squares = [float(p.grad.double().square().sum()) for p in self.parameters if p.grad is not None]
        norms.append(math.sqrt(sum(squares)))
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "clip", clip)
        project.printed["said"] = project.run(train_autoencoder, "--no-amp")
    return project, norms


def test_tensorboard_shows_both_optimisers_as_they_are(watched):
    project, norms = watched
    events = events_of(project, "autoencoder")
    section = project.config["autoencoder_train"]
    rate = learning_rate({"scale_lr": False} | section, 1, 9 / 10, 9, 4)  # of the tenth step
    for i, name in enumerate(("autoencoder", "discriminator")):
        assert scalars(events, f"grad_norm/{name}") == {10: pytest.approx(norms[2 * 9 + i], rel=1e-4)}
        assert scalars(events, f"lr/{name}") == {10: pytest.approx(rate, rel=1e-6)}
    assert len(norms) == 20 and norms[18] != pytest.approx(norms[19], rel=1e-3)


def test_tensorboard_groups_what_it_shows(watched):
    events = events_of(watched[0], "autoencoder")
    groups = Counter(tag.partition("/")[0] for tag in events.Tags()["scalars"])
    assert set(groups) == {"loss", "lr", "grad_norm", "time", "memory", "epoch", "validation"}
    assert 0.01 < scalars(events, "memory/peak_gb")[10] < 100
    for tag in ("seconds_per_step", "volumes_per_second", "data_wait_share"):
        assert scalars(events, f"time/{tag}")[10] > 0
    pace = [scalars(events, f"time/{tag}")[10] for tag in ("seconds_per_step", "volumes_per_second")]
    assert math.prod(pace) == pytest.approx(2, rel=1e-4)  # volumes a step
    assert len(scalars(events, "validation/psnr")) == len(scalars(events, "epoch/recon_loss")) == 5


def test_the_same_scans_are_shown_at_each_validation(watched):
    """Scan, reconstruction and 4 times their difference, three planes each, one below the other."""
    project, _ = watched
    events = events_of(project, "autoencoder")
    names = project.split()["validation"]
    assert events.Tags()["images"] == [f"{autoencoder.COMPARISON_TAG}/{name}" for name in names]
    assert len(names) == 2
    scans = []
    for name in names:
        found = pictures(events, f"{autoencoder.COMPARISON_TAG}/{name}")
        assert sorted(found) == [2, 4, 6, 8, 10]
        parts = [np.split(picture, 3) for picture in found.values()]
        scans.append(parts[0][0])
        planes = 255 * figures.three_planes(project.normalised(name)[0, 0], SPACING)
        np.testing.assert_allclose(scans[-1], planes, atol=1)
        for scan, reconstruction, difference in parts:
            assert np.array_equal(scan, scans[-1])
            expected = np.clip(4 * np.abs(reconstruction - scan), 0, 255)
            assert np.abs(difference - expected).max() <= 8 and difference.std() > 5
        assert not np.array_equal(parts[0][1], parts[-1][1])
    assert not np.array_equal(*scans)


@pytest.mark.parametrize("world_size, shown", [(1, [0, 1, 2, 3]), (2, [0, 2, 4])])
def test_the_main_rank_shows_its_own_cases_by_name(monkeypatch, world_size, shown):
    images = torch.rand(5, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    class HeldOut:
        seed = 0
        cases = [Case(f"case {i}", ()) for i in range(5)]

        def __len__(self):
            return 5

        def __getitem__(self, key):
            return {"image": images[key[1]]}

    class Halving(torch.nn.Module):
        def reconstruct(self, image):
            return image / 2

    monkeypatch.setattr(Run, "sum", lambda self, tensor: tensor)
    run = Run(0, world_size, torch.device("cpu"))
    section = chain.CONFIG["autoencoder_train"] | {"recon_loss": "l1", "background_weight": 1.0}
    criterion = AutoencoderLoss(section, None)
    _, pairs = autoencoder.validate(Halving(), criterion, HeldOut(), run)
    assert list(pairs) == [f"case {i}" for i in shown]
    for i, (scan, reconstruction) in zip(shown, pairs.values(), strict=True):
        assert torch.equal(scan, images[i]) and torch.equal(reconstruction, images[i] / 2)


def test_the_model_folder_shows_stage_1(watched):
    project, _ = watched
    sizes = Image.open(project.model_dir / "reconstruction.gif").size
    depth = project.checkpoint("autoencoder.pt")["config"]["autoencoder_train"]["patch_size"]
    assert depth is None  # then a slice is enlarged, and names stand above it
    assert sizes == (10 * 2 * chain.SHAPE[0], 10 * chain.SHAPE[1] + 18)
    assert frames(project.model_dir / "reconstruction.gif") == chain.SHAPE[2]
    assert str(project.model_dir / "reconstruction.gif") in project.printed["said"]
    assert (project.model_dir / "losses.png").is_file() and not (project.output_dir / "losses.png").exists()


# ---------------------------------------------------------------- stage 2


def test_samples_of_the_same_seeds_through_training_and_a_resume(encoded):
    more = ["--no-amp", "--set", "diffusion_train.sample_interval=2", "--set"]
    encoded.run(train_diffusion, *more, "diffusion_train.max_epochs=4")
    folder = encoded.model_dir / "samples"
    assert frames(folder / "progress.gif") == 3  # after epochs 1, 3 and 4
    (folder / "epoch_00002.png").write_bytes((folder / "epoch_00001.png").read_bytes()[:3000])  # of a kill
    (folder / "epoch_00099.png").write_bytes((folder / "epoch_00001.png").read_bytes())  # of an old attempt
    encoded.run(train_diffusion, *more, "diffusion_train.max_epochs=6")
    assert {p.name for p in folder.glob("*.png")} == {f"epoch_{i:05d}.png" for i in (1, 2, 3, 4, 5, 6, 99)}
    assert frames(folder / "progress.gif") == 5
    with Image.open(folder / "progress.gif") as film, Image.open(folder / "epoch_00006.png") as newest:
        film.seek(4)
        shown, expected = np.asarray(film.convert("L")), np.asarray(newest.convert("L").reduce(2))
        assert np.abs(shown.astype(float) - expected).max() <= 8
    with Image.open(encoded.model_dir / "samples.gif") as sweep:
        assert sweep.n_frames == chain.SHAPE[2]
        assert sweep.size == (10 * 4 * chain.SHAPE[0], 10 * chain.SHAPE[1])
    events = events_of(encoded, "diffusion")
    assert events.Tags()["images"] == [f"samples/seed_{seed}" for seed in (0, 1, 2, 3)]
    for seed in (0, 3):
        assert sorted(pictures(events, f"samples/seed_{seed}")) == [2, 6, 8, 10, 12]


def test_a_sweep_goes_up_and_shows_the_right_on_the_left():
    """A voxel far right, in front, in slice 3 of the second of two volumes; every second slice of many."""
    volumes = [torch.zeros(200, 220, 7) for _ in range(2)]
    volumes[1][190, 210, 3] = 1
    shown = figures.axial_sweep(volumes)
    assert len(shown) == 7 and [k for k in range(7) if shown[k].any()] == [3]
    assert [int(i[0]) for i in shown[3].nonzero()] == [220 - 1 - 210, 200 + 200 - 1 - 190]
    assert len(figures.axial_sweep(volumes, most=4)) == 4


def test_the_held_out_loss_by_time(done):
    """Its mean over the quarters is the loss, as each has two of the eight times."""
    for entry in (entry for entry in done.log("diffusion") if "val_loss" in entry):
        quarters = [entry[f"val_loss_quarter_{i}"] for i in (1, 2, 3, 4)]
        assert sum(quarters) / 4 == pytest.approx(entry["val_loss"], abs=2e-6)
    events = events_of(done, "diffusion")
    assert scalars(events, "validation/loss_quarter_4")[40] == pytest.approx(quarters[-1], abs=1e-5)


@pytest.mark.parametrize("scheduler", [{"schedule": "rectified_flow", "shift": 3}, {}])
@pytest.mark.parametrize("times, quarters", [(8, (1, 2, 3, 4)), (2, (2, 4))])
def test_the_quarters_go_from_little_noise_to_much(scheduler, times, quarters):
    """A network that is off by the time itself; the errors by hand."""
    given = {"num_train_timesteps": 1000, "shift": 1.0, "prediction_type": None, "zero_terminal_snr": False}
    given |= {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
    process = NoiseProcess.from_config(given | scheduler)
    posterior = torch.zeros(1, 2, 1, 2, 2, 2)
    held_out = Posteriors([Case("a", ())], [posterior], 0)

    class Off(torch.nn.Module):
        def forward(self, x, timesteps):
            return timesteps.reshape(-1, 1, 1, 1, 1).expand_as(x)

    section, run = {"val_times": times, "batch_size": 3}, Run(0, 1, torch.device("cpu"))
    scores = objective.validate(Off(), held_out, 1.0, process, section, 0, run)
    t = process.draw_times((torch.arange(times) + 0.5) / times).double().sort().values
    expected = dict(zip(quarters, t.reshape(len(quarters), -1).square().mean(1).tolist(), strict=True))
    assert set(scores) == {"loss", *(f"loss_quarter_{q}" for q in quarters)}
    for q in quarters:  # noise of unit size is little beside hundreds
        assert scores[f"loss_quarter_{q}"] == pytest.approx(expected[q], rel=0.15)
    assert scores["loss"] == pytest.approx(t.square().mean().item(), rel=0.02)


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("delay", [0.002, 0.3])
def test_waiting_for_data_is_measured_and_hinted_at(encoded, monkeypatch, delay):
    """By a clock that only a loader (two items a step) and a step (0.1 s) let go on. The first epoch, in
    which the cache is filled, is not judged; one hint, however long it goes on."""
    now = [0.0]

    def takes(owner, name, seconds):
        real = getattr(owner, name)

        def timed(*args):
            now[0] += seconds
            return real(*args)

        monkeypatch.setattr(owner, name, timed)

    takes(WithNoise, "__getitem__", delay)
    takes(progress.Progress, "agree_to_skip", 0.1)
    takes(train_diffusion, "validate", 100.0)
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "HINT_STEPS", 4)
    said = encoded.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=10")
    events = events_of(encoded, "diffusion")
    seconds = 2 * delay + 0.1
    expected = {"seconds_per_step": seconds, "volumes_per_second": 2 / seconds}
    for tag, value in (expected | {"data_wait_share": 2 * delay / seconds}).items():
        assert scalars(events, f"time/{tag}") == dict.fromkeys((10, 20), pytest.approx(value, rel=1e-4))
    if delay == 0.3:
        told = "86% of the time of 4 steps was spent waiting for data. Raise data.num_workers (0 now): docs"
        assert said.count("hint: ") == 1 and f"hint: {told}/TROUBLESHOOTING.md" in said
    else:
        assert "hint" not in said


def test_the_first_steps_say_how_many_there_will_be(encoded, monkeypatch):
    """By a clock that a step lets go on: 60 s the first, then 0.1 s each. Their median is 0.1 s, and of 5
    minutes 239.8 s are left after the third: 2398 steps more. The training ends after 8. Where that is too
    little, more minutes are named."""
    now, real = [0.0], progress.Progress.agree_to_skip

    def timed(*args):
        now[0] += 0.1 if now[0] else 60.0
        return real(*args)

    monkeypatch.setattr(progress.Progress, "agree_to_skip", timed)
    monkeypatch.setattr(
        progress, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    )
    monkeypatch.setattr(progress, "EXPECT_STEPS", 3)
    monkeypatch.setattr(progress, "FEW_STEPS", 3000)
    monkeypatch.setattr(progress.Clock, "progress", lambda clock, _: min(clock.step / 8, 1.0))
    options = ["max_minutes=5", "max_epochs=100000"]
    said = encoded.run(
        train_diffusion, "--no-amp", *[a for o in options for a in ("--set", f"diffusion_train.{o}")]
    )
    assert said.count("diffusion: about 2401 steps in 5 minutes, 0.1 s each") == 1
    assert (
        "warning: 2401 steps are too few" in said and "Set diffusion_train.max_minutes to 7 or more" in said
    )


def test_the_hint_names_the_cache_where_it_could_be_larger(encoded, monkeypatch):
    """And counts from the first epoch on where nothing is cached."""
    monkeypatch.setattr(progress, "HINT_STEPS", 2)
    monkeypatch.setattr(progress, "HINT_SHARE", 0.0)
    more = ["--no-amp", "--set", "diffusion_train.max_epochs=1", "--set", "data.cache_rate=0"]
    assert "data.num_workers (0 now) or data.cache_rate (0)" in encoded.run(train_diffusion, *more)


# ---------------------------------------------------------------- the curves


def test_the_curves_are_drawn_at_intervals(tmp_path, monkeypatch):
    """And at the end."""
    path, drawn = tmp_path / "train_log.jsonl", []
    real = figures.loss_curves

    def draw(records, to):
        drawn.append(len(records))
        real(records, to)

    monkeypatch.setattr(figures, "loss_curves", draw)
    log = TrainLog("diffusion", path, tmp_path / "events", 0, 0)
    log.record(step=1, epoch=0, loss=1.0)
    log.draw_at_intervals()
    assert drawn == []
    log.drawn_at -= logs.DRAW_INTERVAL
    log.draw_at_intervals()
    log.draw_at_intervals()
    assert drawn == [1] and Image.open(tmp_path / "losses.png").size[0] > 400
    log.record(step=2, epoch=1, loss=0.5)
    log.close()
    assert drawn == [1, 2]


def test_curves_that_cannot_be_written_end_no_training(tmp_path, capsys):
    (tmp_path / "losses.png").mkdir()
    log = TrainLog("diffusion", tmp_path / "train_log.jsonl", tmp_path / "events", 0, 0)
    log.record(step=1, epoch=0, loss=1.0)
    log.drawn_at -= logs.DRAW_INTERVAL
    log.draw_at_intervals()
    assert f"warning: {tmp_path / 'losses.png'} could not be written" in capsys.readouterr().out
    with pytest.raises(OSError, match=r"losses\.png could not be written"):
        log.close()
    log.writer.close()


# ---------------------------------------------------------------- log.txt


def text_of(project: Project) -> str:
    return (project.model_dir / "log.txt").read_text(encoding="utf-8")


def test_log_txt_holds_what_was_said_in_each_run(done):
    text = text_of(done)
    for script in ("train_autoencoder", "train_diffusion"):
        for line in done.printed[script].splitlines():
            assert line in text, line
    lines = text.splitlines()
    assert lines[0].endswith("==== autoencoder: starts")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  |  |$", line) for line in lines)
    assert text.count("  ==== ") == 2 and text.count("\n\n") == 1
    config = done.model_dir / "config_diffusion.json"
    assert all(f"  {fact}" in text for fact in ("command: python ", f"config: {config}", "device: cpu x 1"))
    assert f"torch {torch.__version__}" in text and "python 3." in text
    told = [line for line in lines if "  autoencoder, epoch " in line]
    assert len(told) == 4 and "step 12: held-out loss " in told[-1]


def test_log_txt_marks_a_resume_and_goes_along_with_a_fresh_start(encoded):
    more = ["--no-amp", "--set"]
    encoded.run(train_diffusion, *more, "diffusion_train.max_epochs=1")
    encoded.run(train_diffusion, *more, "diffusion_train.max_epochs=2")
    first = text_of(encoded)
    last = encoded.model_dir / "diffusion_unet_last.pt"
    assert "==== diffusion: starts" in first and f"==== diffusion: resumes from {last}" in first
    encoded.run(train_diffusion, *more, "diffusion_train.max_epochs=1", "--fresh")
    old = encoded.model_dir / "old-1"
    assert (old / "log.txt").read_text() == first and text_of(encoded).startswith(first)  # stage 1's is there
    again = text_of(encoded).removeprefix(first).splitlines()
    assert again[1].endswith("==== diffusion: starts") and any("starting over:" in x for x in again)
    assert (old / "losses.png").is_file()
    short = ("autoencoder_train.max_epochs=1", "--fresh")
    encoded.run(train_autoencoder, *more, *short)
    kept, now = encoded.model_dir / "old-2" / "log.txt", text_of(encoded)
    assert kept.read_text().startswith(first) and now.splitlines()[0].endswith("==== autoencoder: starts")
    encoded.run(train_autoencoder, *more, *short)
    assert (encoded.model_dir / "old-3" / "reconstruction.gif").is_file()


def test_log_txt_tells_how_a_run_ended(encoded, monkeypatch):
    """By an error of two kinds and by one that no one foresaw, with its traceback; a warning on the way."""
    more = ["--no-amp", "--set", "diffusion_train.max_epochs=1"]
    with monkeypatch.context() as patch:
        patch.setattr(train_diffusion, "validate", lambda *args: {"loss": math.nan})
        message = encoded.refused(train_diffusion, *more, code=1)
    assert f"  {message}\n" in text_of(encoded) and "Traceback" not in text_of(encoded)

    def fails(*args):
        warnings.warn("a library's word", stacklevel=1)
        raise RuntimeError("a fault of the program")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="a library's word"):
        patch.setattr(train_diffusion, "validate", fails)
        with pytest.raises(RuntimeError, match="a fault of the program"):
            encoded.run(train_diffusion, *more)
    text = text_of(encoded)
    assert "error: unexpected\nTraceback " in text and "RuntimeError: a fault of the program" in text
    assert text.count("UserWarning: a library's word") == 1
    assert warnings.showwarning.__module__ != logs.__name__


def test_log_txt_holds_a_refusal_where_a_training_made_it(encoded):
    """A first start that is refused leaves nothing, nor does one that finds no place to go on from."""
    before, wrong = fingerprint(encoded.folder), ("--set", "diffusion_train.patch_size=[8,8,9]")
    encoded.refused(train_diffusion, *wrong)
    assert fingerprint(encoded.folder) == before
    encoded.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=1")
    text = text_of(encoded)
    encoded.refused(train_diffusion, "--resume", encoded.model_dir / "none.pt")
    assert text_of(encoded) == text
    message = encoded.refused(train_diffusion, *wrong)
    assert text_of(encoded).startswith(text) and text_of(encoded).endswith(f"  {message}\n")


def test_a_log_txt_that_cannot_be_written_ends_no_training(encoded):
    """It is told once; what it should have held is there once it can be written again."""
    blocked = encoded.model_dir / "log.txt"
    blocked.mkdir()
    said = encoded.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=2")
    assert said.count(f"warning: {blocked} could not be written") == 1
    assert encoded.checkpoint("diffusion_unet_last.pt")["epoch"] == 1


def test_lines_of_log_txt_wait_for_a_disk_that_comes_back(tmp_path):
    path = tmp_path / "log.txt"
    path.mkdir()
    log = logs.TextLog(path)
    try:
        log.begin({"a": 1})
        logs.LOGGER.info("b")
        path.rmdir()
        logs.LOGGER.info("c")
    finally:
        logs.EXIT_STACK.close()
    logs.LOGGER.info("d")
    assert [line.partition("  ")[2] for line in path.read_text().splitlines()] == ["", "a: 1", "b", "c"]
