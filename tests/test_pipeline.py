"""The scripts one after the other, as a user runs them: what is trained, written, resumed and refused."""

import argparse
import importlib
import json
import math
import shutil
from pathlib import Path

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import Project, copy_of, differences, fingerprint, power_cut
from matplotlib.image import imread
from monai.networks.nets.autoencoderkl import AEKLResBlock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cache_latents
import evaluate
import inference
import train_autoencoder
import train_diffusion
import utils
from benchmarks.measure import flags_kept
from ldm import UserError
from ldm.data.cases import choose_spacing
from ldm.data.layouts import find_cases
from ldm.evaluation.reading import samples_of_model
from ldm.system.checkpoints import save_checkpoint
from ldm.system.files import sha256_of
from ldm.training.progress import Clock
from ldm.training.step import Optimizer, learning_rate, make_ema
from ldm.training.wrapping import wrap_network

AUTOENCODER = ("autoencoder.pt", "autoencoder_last.pt")
UNET = ("diffusion_unet.pt", "diffusion_unet_last.pt")
ONE_EPOCH = ("--set", "autoencoder_train.max_epochs=1", "--set", "diffusion_train.max_epochs=1")


@pytest.fixture
def fresh(done, tmp_path) -> Project:
    """The chain's data and config, and nothing trained."""
    return copy_of(done, tmp_path / "fresh")


@pytest.fixture
def encoded(done, tmp_path) -> Project:
    """The chain's data, config, autoencoder and split, before stage 2."""
    return copy_of(done, tmp_path / "encoded", "autoencoder.pt", "split.json")


def sets(**values) -> list[str]:
    """`--set` arguments: autoencoder_train__lr=1 is autoencoder_train.lr=1."""
    pairs = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]
    return [part for pair in pairs for part in ("--set", pair)]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", [*AUTOENCODER, *UNET])
def test_a_checkpoint_holds_plain_names_and_what_a_resume_needs(done, name):
    checkpoint = done.checkpoint(name)  # weights_only
    stage = "autoencoder" if name in AUTOENCODER else "diffusion"
    done.network(f"{stage}_def", checkpoint["model"])  # strictly
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    epochs = done.config[f"{stage}_train"]["max_epochs"]
    if name.endswith("_last.pt"):  # 4 training cases, batches of 2
        assert [checkpoint[key] for key in ("epoch", "batch", "step")] == [epochs - 1, 2, 2 * epochs]
        assert checkpoint["stepper"]["optimizer"]["state"][0]["step"] == 2 * epochs
    assert checkpoint["config"] == json.loads((done.model_dir / f"config_{stage}.json").read_text())


def test_the_discriminator_learns_from_the_end_of_the_warm_up_on(done):
    last = done.checkpoint("autoencoder_last.pt")
    assert last["discriminator_stepper"]["optimizer"]["state"][0]["step"] == 2 * (6 - 2)
    assert not any(name.startswith("module.") for name in last["discriminator"])
    records = [entry for entry in done.log("autoencoder") if "recon_loss" in entry]
    assert ["discriminator_loss" in entry for entry in records] == [False] * 2 + [True] * 4
    assert ["adversarial_loss" in entry for entry in records] == [False] * 2 + [True] * 4


def test_the_best_is_the_averaged_model_that_scored_best(done):
    scores = [entry["val_loss"] for entry in done.log("autoencoder") if "val_loss" in entry]
    epochs = [entry["epoch"] for entry in done.log("autoencoder") if "val_loss" in entry]
    assert epochs == [0, 2, 4, 5]
    best = done.checkpoint("autoencoder.pt")
    assert best["best"] == pytest.approx(min(scores), abs=1e-5)
    assert best["epoch"] == epochs[int(np.argmin(scores))]

    losses = [entry["val_loss"] for entry in done.log("diffusion") if "val_loss" in entry]
    best, last = done.checkpoint("diffusion_unet.pt"), done.checkpoint("diffusion_unet_last.pt")
    assert best["best"] == pytest.approx(min(losses), abs=1e-5)
    assert losses[-1] == min(losses)  # so that the averages of the last epoch are the best
    averages = {k.removeprefix("module."): v for k, v in last["ema"].items() if k.startswith("module.")}
    assert not differences(averages, best["model"])
    assert differences(averages, last["model"])


def check_validation(project: Project) -> None:
    """PSNR = -10 log10 of the mean squared error, over whole held-out volumes, averaged over them. The loss,
    by which the best is chosen, is that of the training without KL and adversarial term, and not clipped."""
    best = project.checkpoint("autoencoder.pt")
    autoencoder = project.network("autoencoder_def", best["model"])
    psnr, l1, loss = [], [], []
    for name in project.split()["validation"]:
        image = project.normalised(name)
        with torch.no_grad():
            reconstruction = autoencoder.decode(autoencoder.encode(image)[0])
        error = reconstruction - image
        edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4))
        loss.append(
            float(error.abs().mean() + project.config["autoencoder_train"]["gradient_weight"] * edges)
        )
        error = reconstruction.clamp(0, 1) - image
        psnr.append(-10 * math.log10(error.square().mean()))
        l1.append(float(error.abs().mean()))
    assert best["validation"]["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert best["validation"]["l1"] == pytest.approx(np.mean(l1), abs=1e-5)
    assert best["validation"]["loss"] == best["best"] == pytest.approx(np.mean(loss), abs=1e-5)


def test_the_validation_scores_are_those_of_the_stored_weights(done):
    check_validation(done)


def test_the_scale_factor_is_one_over_the_std_of_all_training_latents(done):
    scale = done.checkpoint("diffusion_unet.pt")["scale_factor"]
    assert scale == pytest.approx(chain.scale_by_hand(done), rel=1e-4)
    assert done.checkpoint("diffusion_unet_last.pt")["scale_factor"] == scale
    assert f"scale factor {scale:.6f} over 4 training volumes" in done.printed["train_diffusion"]
    assert "padded" not in done.printed["train_autoencoder"] + done.printed["train_diffusion"]


def test_the_geometry_is_in_the_checkpoint(done):
    geometry = done.checkpoint("diffusion_unet.pt")["geometry"]
    assert geometry["spacing"] == list(chain.SPACING) and geometry["size"] == list(chain.SHAPE)
    typical = np.median([done.limits(name) for name in done.split()["training"]], axis=0)
    np.testing.assert_allclose(geometry["limits"], typical, rtol=1e-5)
    assert done.checkpoint("diffusion_unet.pt")["latent_shape"] == [3, 8, 10, 6]


def test_the_resolved_config_is_complete_and_resolves_to_itself(done):
    for stage in ("autoencoder", "diffusion"):
        path = done.model_dir / f"config_{stage}.json"
        resolved = json.loads(path.read_text())
        assert "@" not in path.read_text()
        assert resolved["autoencoder_def"]["latent_channels"] == 3
        assert resolved["diffusion_train"]["val_times"] == 8  # a default
        assert resolved["diffusion_train"]["lr"] == 2e-3  # from the file
        assert utils.load_config(path) == resolved


def test_the_split_is_disjoint_whole_and_read_again(done, encoded):
    """By an autoencoder of an older version, which does not remember what it was trained on."""
    split = done.split()
    assert (len(split["training"]), len(split["validation"])) == (4, 2)
    assert sorted(split["training"] + split["validation"]) == [f"scan_{i}" for i in range(6)]

    content = encoded.checkpoint("autoencoder.pt")
    content.pop("subjects")
    save_checkpoint(encoded.model_dir / "autoencoder.pt", content)
    by_hand = {"training": ["scan_5", "scan_1"], "validation": ["scan_0", "scan_2", "scan_3", "scan_4"]}
    (encoded.model_dir / "split.json").write_text(json.dumps(by_hand))
    printed = encoded.run(train_diffusion, "--no-amp", *ONE_EPOCH)
    assert "2 training and 4 validation cases" in printed
    assert encoded.split() == by_hand
    scale = encoded.checkpoint("diffusion_unet.pt")["scale_factor"]
    assert scale == pytest.approx(chain.scale_by_hand(encoded), rel=1e-4)
    assert scale != pytest.approx(done.checkpoint("diffusion_unet.pt")["scale_factor"], rel=1e-3)


def test_a_split_of_other_data_is_refused(encoded):
    (encoded.model_dir / "split.json").write_text(json.dumps({"training": ["a"], "validation": ["b"]}))
    assert "2 cases of" in (message := encoded.refused(train_diffusion)) and "split.json not found" in message
    assert not (encoded.model_dir / "diffusion_unet.pt").exists()


def test_losses_are_finite_and_fall(done):
    for stage, key, share in (("autoencoder", "recon_loss", 0.5), ("diffusion", "loss", 0.9)):
        records = [entry for entry in done.log(stage) if key in entry]
        values = np.array([entry[key] for entry in records])
        assert len(values) == done.config[f"{stage}_train"]["max_epochs"]
        assert np.isfinite(values).all() and values[-3:].mean() < share * values[0]
        assert all(math.isfinite(v) for entry in records for v in entry.values() if isinstance(v, float))
        assert np.all(np.diff([entry["seconds"] for entry in records]) > 0)
        # the rate of the epoch's last step, half a cosine over all steps
        total = 2 * len(records)
        rates = [2e-3 * (1 + math.cos(math.pi * (entry["step"] - 1) / total)) / 2 for entry in records]
        np.testing.assert_allclose([entry["lr"] for entry in records], rates, atol=1e-6)


def test_tensorboard_shows_what_the_log_holds(done):
    for stage, key, tag in (
        ("autoencoder", "val_psnr", "validation/psnr"),
        ("diffusion", "val_loss", "validation/loss"),
        ("diffusion", "loss", "epoch/loss"),
    ):
        events = EventAccumulator(str(done.folder / "tensorboard" / stage)).Reload()
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        logged = [(entry["step"], entry[key]) for entry in done.log(stage) if key in entry]
        np.testing.assert_allclose(shown, logged, rtol=1e-5)


@pytest.mark.parametrize("name, panels", [("losses", 2), ("reconstructions", 2), ("samples", 3)])
def test_pictures_show_something(done, name, panels):
    picture = imread((done.model_dir if name == "losses" else done.output_dir) / f"{name}.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 500 and picture.shape[2] in (3, 4)
    columns = np.array_split(picture[..., :3].mean(-1), panels, axis=1)
    assert all(column.std() > 0.02 for column in columns)
    different = [np.array_equal(columns[0], other) for other in columns[1:]]
    assert not any(different)


def test_the_reconstructions_picture_shows_scan_above_reconstruction(done):
    """Not the same row twice, and alike: their darkest and brightest places agree."""
    picture = imread(done.output_dir / "reconstructions.png")[..., :3].mean(-1)
    top, bottom = np.array_split(picture[-2 * (len(picture) // 2) :], 2)
    assert 0.5 < np.corrcoef(top.ravel(), bottom.ravel())[0, 1] < 0.9999


# ---------------------------------------------------------------- going on where a run broke off


@pytest.mark.parametrize("stage, names", [("autoencoder", AUTOENCODER), ("diffusion", UNET)])
def test_a_worse_epoch_never_replaces_the_best(done, tmp_path, stage, names):
    """Resumed for an epoch with a learning rate that ruins the weights."""
    project = copy_of(done, tmp_path / "worse", "autoencoder.pt", *names, "split.json", "train_log.jsonl")
    epochs = done.config[f"{stage}_train"]["max_epochs"] + 1
    ruin = {"max_epochs": epochs, "lr": 1.0, "lr_schedule": "constant"}
    script = train_autoencoder if stage == "autoencoder" else train_diffusion
    project.run(script, "--no-amp", *sets(**{f"{stage}_train__{key}": value for key, value in ruin.items()}))
    assert not differences(project.checkpoint(names[0]), done.checkpoint(names[0]))
    best, score = done.checkpoint(names[0])["best"], project.log(stage)[-1]["val_loss"]
    assert project.checkpoint(names[1])["epoch"] == epochs - 1 and score > 1.1 * best


def test_a_training_stops_where_the_held_out_loss_rises(done, tmp_path):
    """Three more epochs are asked for, and the first is worse than the best. Resumed, it stops again."""
    project = copy_of(done, tmp_path / "stops", "autoencoder.pt", *UNET, "split.json", "train_log.jsonl")
    epochs = done.config["diffusion_train"]["max_epochs"]
    values = {
        "max_epochs": epochs + 3,
        "lr": 1.0,
        "lr_schedule": "constant",
        "val_interval": 1,
        "patience": 1,
    }
    best = done.checkpoint(UNET[0])
    for _ in range(2):
        said = project.run(
            train_diffusion, "--no-amp", *sets(**{f"diffusion_train__{k}": v for k, v in values.items()})
        )
        told = f"has not fallen below {best['best']:.4f}, that of epoch {best['epoch']}, in 1 validation: "
        assert told in said
        assert project.checkpoint(UNET[1])["epoch"] == epochs
    assert not differences(project.checkpoint(UNET[0]), best)


# ---------------------------------------------------------------- steps, rates, clocks


def gradients(project: Project, name: str, key: str = "stepper") -> list[torch.Tensor]:
    """The gradients of a run's only step: Adam's first moment is a tenth of them."""
    state = project.checkpoint(name)[key]["optimizer"]["state"]
    assert state[0]["step"] == 1
    return [10 * one["exp_avg"] for one in state.values()]


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_accumulated_batches_make_the_step_of_one_large_batch(done, tmp_path, stage):
    script = train_autoencoder if stage == "autoencoder" else train_diffusion
    name, runs = (AUTOENCODER if stage == "autoencoder" else UNET)[1], {}
    for batch, accumulate in ((4, 1), (1, 4)):
        first = () if stage == "autoencoder" else ("autoencoder.pt",)
        project = copy_of(done, tmp_path / f"{batch}x{accumulate}", "split.json", *first)
        steps = {f"{stage}_train__batch_size": batch, f"{stage}_train__accumulate_steps": accumulate}
        steps["autoencoder_train__adversarial_warmup_epochs"] = 0
        project.run(script, "--no-amp", *ONE_EPOCH, *sets(**steps))
        runs[batch] = project
    for key in ("stepper", "discriminator_stepper") if stage == "autoencoder" else ("stepper",):
        whole = gradients(runs[4], name, key)
        size = max(float(one.abs().max()) for one in whole)
        for a, b in zip(gradients(runs[1], name, key), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * size)
    chain.assert_weights_close(*(runs[n].checkpoint(name)["model"] for n in (1, 4)))


def test_clipping_bounds_the_accumulated_gradient():
    """d/dw of 3 w0 + 4 w1, averaged over two batches of which one counts double: (4.5, 6), norm 7.5."""
    section = {
        "optimizer": "adam",
        "lr": 0.1,
        "scale_lr": False,
        "adam_betas": [0.9, 0.999],
        "accumulate_steps": 2,
        "clip_grad_norm": 1.5,
    }
    for limit, expected in ((1.5, [0.9, 1.2]), (None, [4.5, 6.0]), (100, [4.5, 6.0])):
        layer = torch.nn.Linear(2, 1, bias=False)
        stepper = Optimizer(layer, {**section, "clip_grad_norm": limit}, None)
        for times in (1, 2):
            stepper.backward(layer(torch.tensor([[3.0, 4.0]])).sum() * times)
        before = layer.weight.detach().clone()
        stepper.clip()
        stepper.step(0.25, torch.zeros(()))
        moment = stepper.state_dict()["optimizer"]["state"][0]["exp_avg"]
        torch.testing.assert_close(10 * moment[0], torch.tensor(expected), rtol=1e-5, atol=0)
        assert float(stepper.norm) == pytest.approx(7.5)  # as it was before
        # Adam's first step is the learning rate times the sign
        torch.testing.assert_close(before - layer.weight, torch.full((1, 2), 0.25), rtol=1e-4, atol=0)
        assert layer.weight.grad is None


def test_clipping_reaches_the_training_step(fresh):
    clipped = sets(autoencoder_train__clip_grad_norm=0.01, autoencoder_train__batch_size=4)
    fresh.run(train_autoencoder, "--no-amp", *ONE_EPOCH, *clipped)
    norm = torch.cat([g.flatten() for g in gradients(fresh, "autoencoder_last.pt")]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


RATE = {"lr": 8.0, "scale_lr": False, "lr_schedule": "constant", "lr_warmup_steps": 0}
COSINE, STEPS = {"lr_schedule": "cosine"}, {"lr_schedule": "multistep", "lr_milestones": [3, 5]}


@pytest.mark.parametrize(
    "section, world_size, progress, step, epoch, expected",
    [
        ({}, 4, 0.7, 70, 7, 8),
        ({"scale_lr": True}, 4, 0.7, 70, 7, 32),
        (COSINE, 1, 0.0, 0, 0, 8),
        (COSINE, 1, 1 / 3, 10, 1, 6),
        (COSINE, 1, 0.5, 10, 1, 4),
        (COSINE, 1, 1.0, 10, 1, 0),
        ({**STEPS, "lr_gamma": 0.5}, 1, 0.1, 9, 2, 8),
        ({**STEPS, "lr_gamma": 0.5}, 1, 0.1, 9, 3, 4),
        ({**STEPS, "lr_gamma": 0.5}, 1, 0.1, 9, 5, 2),
        ({"lr_warmup_steps": 3}, 1, 0.0, 0, 0, 2),
        ({"lr_warmup_steps": 3}, 1, 0.0, 2, 0, 6),
        ({"lr_warmup_steps": 3}, 1, 0.0, 3, 0, 8),
        ({"lr_warmup_steps": 3}, 1, 0.0, 300, 0, 8),
        ({**COSINE, "lr_warmup_steps": 3, "scale_lr": True}, 2, 0.5, 1, 0, 4),
    ],
)
def test_learning_rates(section, world_size, progress, step, epoch, expected):
    assert learning_rate({**RATE, **section}, world_size, progress, step, epoch) == pytest.approx(expected)


def test_the_clock_counts_steps_or_minutes_and_goes_on_after_a_resume(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    steps = Clock({"max_epochs": 10, "max_minutes": None, "save_minutes": None}, 5, step=10)
    assert steps.progress(1e9) == 10 / 50 and not steps.wants_save
    minutes = Clock({"max_epochs": 10, "max_minutes": 2, "save_minutes": 1}, 5, step=10, seconds=30)
    assert minutes.progress(30) == pytest.approx(0.25)
    now[0] += 59
    assert minutes.seconds == 89 and not minutes.wants_save
    now[0] += 1
    assert minutes.seconds == 90 and minutes.wants_save and minutes.progress(90) == pytest.approx(0.75)
    minutes.step, minutes.saved_at = 45, 90  # the epochs are over first
    assert minutes.progress(90) == pytest.approx(0.9) and not minutes.wants_save
    assert minutes.progress(690) == 1.0


def test_averaged_weights():
    """The decay after n updates is the smaller of (1 + n) / (10 + n) and the one asked for."""
    layer = torch.nn.Linear(1, 1, bias=False)
    assert make_ema(layer, 0) is None
    ema, expected = make_ema(layer, 0.2), None
    for n, weight in enumerate((1.0, 3.0, -5.0, 2.0)):
        torch.nn.init.constant_(layer.weight, weight)
        ema.update(layer, torch.zeros((), dtype=torch.float64))
        decay = min(0.2, (1 + n) / (10 + n))
        expected = weight if n == 0 else decay * expected + (1 - decay) * weight
        assert ema.module.weight.item() == pytest.approx(expected)


def test_max_minutes_ends_by_the_clock(fresh):
    limits = {"max_minutes": 0.02, "max_epochs": 100000, "adversarial_weight": 0}
    argv = ["--no-amp", *sets(**{f"autoencoder_train__{key}": value for key, value in limits.items()})]
    fresh.run(train_autoencoder, *argv)
    last, entry = fresh.checkpoint("autoencoder_last.pt"), fresh.log("autoencoder")[-2]
    assert 1.2 <= entry["seconds"] < 300 and last["epoch"] < 10000
    assert entry["lr"] < 2e-3 / 20  # the cosine followed the clock to its end, as far as whole steps do
    fresh.run(train_autoencoder, *argv)  # time that is up stays up
    again = fresh.checkpoint("autoencoder_last.pt")
    assert again["step"] == last["step"]
    assert not differences(again["model"], last["model"])


# ---------------------------------------------------------------- terms and their weights


def forbidden(*args, **kwargs):
    raise AssertionError("built")


def test_a_weight_of_zero_builds_nothing(fresh, monkeypatch):
    monkeypatch.setattr("ldm.training.autoencoder.PatchDiscriminator", forbidden)
    monkeypatch.setattr("ldm.losses.PerceptualLoss", forbidden)
    with pytest.raises(AssertionError, match="built"):
        fresh.run(train_autoencoder, "--no-amp", *ONE_EPOCH)  # the names are those that it builds by
    fresh.run(train_autoencoder, "--no-amp", *ONE_EPOCH, *sets(autoencoder_train__adversarial_weight=0))
    assert fresh.checkpoint("autoencoder_last.pt")["discriminator"] is None
    assert "perceptual_loss" not in fresh.log("autoencoder")[0]


def test_perceptual_weights_are_looked_for_before_anything_is_downloaded_or_read(fresh, monkeypatch):
    monkeypatch.setattr("ldm.data.prepare.fetch_task01", forbidden)
    for named, words in (
        (None, '"perceptual_weights"'),
        (str(fresh.folder / "none.pt"), "none.pt: no such file"),
    ):
        fresh.set_environment(perceptual_weights=named, download_brats=True, data_base_dir="nowhere")
        message = fresh.refused(train_autoencoder, *sets(autoencoder_train__perceptual_weight=0.1))
        assert words in message and "autoencoder_train.perceptual_weight to 0" in message
    assert not fingerprint(fresh.model_dir)


@pytest.mark.parametrize("script", [train_diffusion, cache_latents, evaluate])
def test_a_file_that_an_option_names_is_looked_for_before_the_data(fresh, script):
    fresh.set_environment(data_base_dir="nowhere")
    message = fresh.refused(script, "--autoencoder", "gone.pt")
    assert message == "error: --autoencoder gone.pt: no such file. Check the path."


@pytest.mark.parametrize(
    "script, more, message",
    [
        (train_diffusion, (), "autoencoder.pt: no such checkpoint. Run train_autoencoder.py first, or name"),
        (inference, (), "autoencoder.pt: no such checkpoint. Run train_autoencoder.py first, or name"),
        (train_diffusion, ("--autoencoder", "{done}", "--resume", "x.pt"), "x.pt: no such checkpoint. Name"),
        (inference, ("--autoencoder", "{done}"), "no such checkpoint. Run train_diffusion.py first"),
    ],
)
def test_a_checkpoint_that_is_not_there_names_the_next_step(fresh, done, script, more, message):
    more = [one.format(done=done.model_dir / "autoencoder.pt") for one in more]
    assert message in fresh.refused(script, *more)


def test_the_logged_terms_add_up_to_the_loss(done):
    section = json.loads((done.model_dir / "config_autoencoder.json").read_text())["autoencoder_train"]
    for entry in done.log("autoencoder"):
        if "recon_loss" in entry:
            total = entry["recon_loss"] + 0.5 * entry["gradient_loss"] + 1e-7 * entry["kl_loss"]
            total += section["adversarial_weight"] * entry.get("adversarial_loss", 0)
            assert section["adversarial_weight"] == 0.01 and entry["loss"] == pytest.approx(total, abs=1e-5)


def test_an_autoencoder_may_start_as_the_principal_components_of_blocks(tmp_path):
    """A rate of nearly 0, so that the start is validated: the first 3 components of 2 x 2 x 2 blocks. On one
    volume, whose normalisation can be undone exactly."""
    project = Project(tmp_path / "one", chain.make_data(tmp_path / "data", cases=1))
    project.change(autoencoder_def={**project.config["autoencoder_def"], "use_convtranspose": True})
    start = sets(autoencoder_train__initialise="block_transform", autoencoder_train__lr=1e-12)
    project.run(train_autoencoder, "--no-amp", *ONE_EPOCH, *start)
    blocks = project.normalised("scan_0")[0, 0].reshape(8, 2, 10, 2, 6, 2)
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).reshape(-1, 8)
    _, _, components = torch.linalg.svd(blocks, full_matrices=False)
    error = (blocks @ components[:3].T @ components[:3]).clamp(0, 1) - blocks
    psnr = -10 * math.log10(error.square().mean())
    assert project.checkpoint("autoencoder.pt")["validation"]["psnr"] == pytest.approx(psnr, abs=0.1)

    message = copy_of(project, tmp_path / "other").refused(
        train_autoencoder, *start, *sets(autoencoder_def__use_convtranspose=False)
    )
    assert "autoencoder_train.initialise" in message and "use_convtranspose" in message


# ---------------------------------------------------------------- other data


def test_four_channels_of_a_single_subject(tmp_path):
    """All three scripts; one subject is trained on and validated on, with a warning; NIfTI (X, Y, Z, 4)."""
    project = Project(tmp_path, chain.make_data(tmp_path / "data", cases=1, channels=4))
    project.change(channel=[0, 1, 2, 3], image_channels=4)
    printed = project.run(train_autoencoder, "--no-amp", *ONE_EPOCH)
    assert "warning: a single subject (scan_0)" in printed
    project.run(train_diffusion, "--no-amp", *ONE_EPOCH)
    project.run(inference, "--steps", "2", *ONE_EPOCH)
    image = nib.load(project.output_dir / "sample_000000.nii.gz")
    assert image.shape == (*chain.SHAPE, 4)
    np.testing.assert_allclose(image.header.get_zooms()[:3], chain.SPACING)
    expected = chain.sample_by_hand(project, seed=0, steps=2)
    voxels = np.moveaxis(image.get_fdata(), -1, 0)
    for channel in range(4):  # each a tenth of the next one's units
        low, high = project.limits("scan_0")[channel]
        np.testing.assert_allclose(voxels[channel], expected[channel], rtol=0, atol=1e-4 * (high - low))


def test_patches_train_and_whole_volumes_validate(fresh):
    """Patches of 8 x 12 x 16 from volumes of 16 x 20 x 12: cut in two directions, padded in the third."""
    patches = sets(autoencoder_train__patch_size=[8, 12, 16])
    printed = fresh.run(train_autoencoder, "--no-amp", *ONE_EPOCH, *patches)
    assert "4 of 4 volumes are smaller than [8, 12, 16] and are padded" in printed
    assert "patches [8, 12, 16], validation on [16, 20, 12]" in printed
    check_validation(fresh)


def test_stage_2_crops_about_the_centre(encoded):
    encoded.run(train_diffusion, "--no-amp", *ONE_EPOCH, *sets(diffusion_train__patch_size=[12, 16, 8]))
    checkpoint = encoded.checkpoint("diffusion_unet.pt")
    assert checkpoint["latent_shape"] == [3, 6, 8, 4] and checkpoint["geometry"]["size"] == [12, 16, 8]
    whole = encoded.normalised
    encoded.normalised = lambda name: whole(name)[..., 2:-2, 2:-2, 2:-2]
    assert checkpoint["scale_factor"] == pytest.approx(chain.scale_by_hand(encoded), rel=1e-4)


def test_volumes_that_may_change_are_encoded_as_they_come(done, encoded, monkeypatch):
    """Flips that never happen: latents drawn live are those that were kept, in the first five epochs."""
    never = sets(diffusion_train__augment={"flip_axes": [0], "flip_prob": 0})
    with power_cut(monkeypatch, 2 * 5 + 1):
        encoded.run(train_diffusion, "--no-amp", *never)
    live, kept = (
        [entry["loss"] for entry in one.log("diffusion") if "loss" in entry] for one in (encoded, done)
    )
    assert len(live) == 5
    np.testing.assert_allclose(live, kept[:5], atol=1e-3)


@pytest.mark.parametrize(
    "shape, sizes, longest, expected",
    [
        ((120, 100, 90), (1, 1, 1), 41, 3.0),
        ((120, 100, 90), (1, 1, 1), 500, 1.0),  # never finer than the data
        ((60, 50, 90), (2, 2, 1), 30, 4.0),  # 120 mm; the finest voxel is 1 mm
        ((20, 50, 90), (0.7, 0.7, 0.7), 30, 2.1),
        ((20, 20, 50), (1, 1, 3), 50, 3.0),  # 150 mm along the slices
    ],
)
def test_longest_side_chooses_a_multiple_of_the_finest_voxel(tmp_path, shape, sizes, longest, expected):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([*sizes, 1])), tmp_path / "a.nii")
    cases, _ = find_cases(tmp_path)
    assert choose_spacing(cases, longest) == pytest.approx([expected] * 3)


def test_a_spacing_left_open_is_along_right_anterior_superior(tmp_path):
    """Axes of the file: superior 3 mm, left 1 mm, posterior 2 mm."""
    affine = np.array([[0, -1.0, 0, 0], [0, 0, -2.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), affine), tmp_path / "a.nii")
    assert choose_spacing(find_cases(tmp_path)[0], None) == pytest.approx([1, 2, 3])


def test_longest_side_in_the_pipeline(fresh):
    """A longest side of 36 mm in about 12 voxels: twice the finest voxel, 1.5 mm."""
    printed = fresh.run(train_autoencoder, "--no-amp", *ONE_EPOCH, *sets(spacing=None, longest_side=12))
    assert "spacing [3.0, 3.0, 3.0] mm" in printed
    resolved = json.loads((fresh.model_dir / "config_autoencoder.json").read_text())
    assert resolved["spacing"] == [3.0] * 3 and resolved["longest_side"] is None
    # 32 x 30 x 36 mm at 3 mm are 11 x 10 x 12 voxels, rounded up to multiples of 4
    assert "patches [12, 12, 12]" in printed


# ---------------------------------------------------------------- what is computed the same in another way


def test_mixed_precision_on_and_off(done, tmp_path, monkeypatch):
    """bf16 on a CPU that computes in it; the losses agree as far as 8 bits of mantissa do."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    losses = {}
    for flag, kind in (("--amp", "torch.bfloat16"), ("--no-amp", "torch.float32")):
        project = copy_of(done, tmp_path / flag)
        for script in (train_autoencoder, train_diffusion):
            assert kind in project.run(script, flag, *ONE_EPOCH)
        entries = project.log("autoencoder") + project.log("diffusion")
        losses[flag] = [entry["loss"] for entry in entries if "loss" in entry]
        weights = project.checkpoint("autoencoder.pt")["model"].values()
        assert all(value.dtype == torch.float32 for value in weights)
    assert losses["--amp"] != losses["--no-amp"]
    np.testing.assert_allclose(losses["--amp"], losses["--no-amp"], rtol=0.05)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)
def test_a_compiled_step_is_the_same_step():
    """The gradients of a residual block of the autoencoder, by the default compiler: its C++ takes the time.
    That whole scripts train compiled, tests/test_promises.py holds."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run, found = utils.start(argparse.Namespace(gpus=None, device="cpu", amp=False)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = AEKLResBlock(spatial_dims=3, in_channels=4, norm_num_groups=2, norm_eps=1e-6, out_channels=4)
        wrapped = wrap_network(block, {"accumulate_steps": 1}, run, compiled)
        wrapped(torch.randn(2, 4, 8, 8, 8)).square().mean().backward()
        found.append([parameter.grad for parameter in block.parameters()])
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
    size = max(float(gradient.abs().max()) for gradient in found[0])
    for plain, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("script", [train_autoencoder, train_diffusion])
def test_profile_writes_a_trace_and_ends(encoded, script):
    if script is train_autoencoder:
        (encoded.model_dir / "autoencoder.pt").unlink()
    encoded.run(script, "--no-amp", "--profile")
    trace = json.loads((encoded.model_dir / "trace_rank0.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any("conv" in name for name in names) and any("ackward" in name for name in names)
    assert not list(encoded.model_dir.glob("*_last.pt"))
    few = ("--set", "diffusion_train.max_epochs=1", "--set", "autoencoder_train.max_epochs=1")
    message = encoded.refused(script, "--no-amp", "--profile", *few)
    assert "--profile: only" in message and "Raise max_epochs" in message


# ---------------------------------------------------------------- the demo


def test_the_demo_judges_the_samples_that_it_drew_and_no_other_volume(tmp_path, monkeypatch, capsys):
    """launchers/demo.py, its scripts run in this process, on ellipsoids in the layout of simulated brains;
    then once more, up to the question which volumes are samples."""
    monkeypatch.syspath_prepend(chain.ROOT / "launchers")
    monkeypatch.chdir(chain.ROOT)
    demo, out = importlib.import_module("demo"), tmp_path / "demo"

    def step(python: Path, script: str, *argv: str, log: Path | None = None) -> None:
        if script == "simulate_brains.py":
            chain.make_data(Path(argv[argv.index("--out") + 1]), cases=8, channels=2)
        elif script != "evaluate.py" or not (out / "old-1").exists():
            argv = ["2" if word == "50" else word for word in argv]  # sampling steps
            importlib.import_module(script.removesuffix(".py")).main([*argv, "--device", "cpu"])

    monkeypatch.setattr(demo, "step", step)
    monkeypatch.setattr(demo.environment, "ready", lambda *_: Path("python"))
    settings = [
        *("data.val_fraction=0.25", "autoencoder_def.channels=[8,8,8]", "diffusion_def.channels=[16,32]"),
        *(f"{stage}_train.max_epochs=1" for stage in ("autoencoder", "diffusion")),
        *(f"{stage}_train.amp=false" for stage in ("autoencoder", "diffusion")),
    ]
    words = [word for one in settings for word in ("--set", one)]
    folders = {"data", "models", "tensorboard", "samples", "evaluation", "environment.json"}
    demo.main(["--out", str(out), *words])
    assert {path.name for path in out.iterdir()} == folders
    found = json.loads((out / "evaluation" / "metrics.json").read_text())
    counts = {name: (one["volumes"], Path(one["folder"])) for name, one in found["sets"].items()}
    expected = {"held-out": (2, "data"), "generated": (8, "samples"), "training": (6, "data")}
    assert counts == {name: (count, out / folder) for name, (count, folder) in expected.items()}
    copies = next(figure for figure in found["figures"] if figure["key"] == "copies")
    assert copies["value"] == 0 and "the split leaks" not in str(found["verdicts"])
    assert not any("left out" in note for note in found["notes"])
    assert "8 volumes" in (out / "evaluation" / "report.html").read_text()
    printed = capsys.readouterr().out
    assert printed.count("sample_00000") == 8 and str(out / "evaluation" / "report.html") in printed

    demo.main(["--out", str(out), *words, "--set", "seed=1"])
    assert {path.name for path in out.iterdir()} == folders - {"evaluation"} | {"old-1"}
    assert {path.name for path in (out / "old-1").iterdir()} == folders - {"data"}
    autoencoder, unet = (out / "models" / name for name in ("autoencoder.pt", "diffusion_unet.pt"))
    source, records, notes = samples_of_model(out / "samples", autoencoder, unet)
    assert [case.images[0].parent for case in source.cases] == [out / "samples"] * 8 and not notes
    assert {record["unet"]["sha256"] for record in records} == {sha256_of(unet)}
    assert found["unet_sha256"] == sha256_of(out / "old-1/models/diffusion_unet.pt")


# ---------------------------------------------------------------- wrong usage


def test_several_gpus_without_torchrun_gives_the_line_to_use(fresh, monkeypatch):
    argv = ["train_autoencoder.py", *fresh.argv("-g", "2", "--set", "seed=3")]
    monkeypatch.setattr("sys.argv", argv)
    message = fresh.refused(train_autoencoder, "-g", "2", "--set", "seed=3")
    assert message.splitlines()[1].split() == ["torchrun", "--standalone", "--nproc_per_node=2", *argv]
    assert not fresh.model_dir.exists() or not any(fresh.model_dir.iterdir())


@pytest.mark.parametrize(
    ("fast", "amp", "said"), [(False, True, True), (False, False, False), (True, True, False)]
)
def test_a_cpu_that_computes_in_float32_instead_says_so(monkeypatch, capsys, fast, amp, said):
    monkeypatch.setattr("ldm.system.ranks.is_fast_in_bfloat16", lambda: fast)
    run = utils.start(argparse.Namespace(gpus=None, device="cpu", amp=None), {"amp": amp})
    assert run.precision == ("bfloat16" if fast and amp else "float32")
    assert ("mixed precision is off: this CPU is not faster in bfloat16" in capsys.readouterr().out) == said


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says where there are two GPUs; its flags are put back afterwards."""
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with flags_kept():
        yield monkeypatch


def test_float32_is_float32_where_results_are_kept_and_fast_where_one_trains(two_gpus):
    """In whichever order the scripts of a notebook run in one process."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    args = argparse.Namespace(gpus=None, device=None, amp=None)
    for section in ({}, None, {}):
        run, training = utils.start(args, section), section is not None
        assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (training,) * 3
        assert cudnn.deterministic is not training
        assert run.precision == ("bfloat16" if training else "float32")
    args.amp = False
    assert utils.start(args, {}).precision == "tf32"
    args.amp = True
    assert utils.start(args).precision == "bfloat16"


@pytest.mark.parametrize(
    ("device", "variables", "message"),
    [
        ("cuda:1", {"LOCAL_WORLD_SIZE": "2"}, "torchrun started 2 processes here"),
        ("cuda", {"LOCAL_WORLD_SIZE": "4"}, "4 processes for 2 GPUs here"),
        (None, {"LOCAL_RANK": "2"}, "3 processes for 2 GPUs here"),
        ("cuda:2", {}, "cuda:2: found 2 GPUs here (CUDA_VISIBLE_DEVICES is '5,7'), numbered from 0."),
    ],
)
def test_each_process_has_a_gpu_of_its_own(two_gpus, device, variables, message):
    for key, value in {"WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "5,7", **variables}.items():
        two_gpus.setenv(key, value)
    args = argparse.Namespace(gpus=None, device=device, amp=False)
    with pytest.raises(UserError) as stop:
        utils.start(args)
    assert message in str(stop.value)
    for name in variables:
        two_gpus.delenv(name)
    args.device = "cuda:1"
    assert utils.start(args).device == torch.device("cuda:1")


def test_cuda_without_a_gpu(done, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = done.refused(train_autoencoder, "--device", "cuda")
    assert "finds no CUDA GPU here (CUDA_VISIBLE_DEVICES is ''). Use --device cpu." in message


def test_stage_2_refuses_a_damaged_autoencoder(encoded):
    chain.damage(encoded.model_dir / "autoencoder.pt", "overwritten")
    assert str(encoded.model_dir / "autoencoder.pt") in encoded.refused(train_diffusion)


@pytest.mark.parametrize("key, value", [("spacing", [2, 2, 2]), ("intensity.upper_percentile", 99.0)])
def test_stage_2_refuses_an_autoencoder_of_another_preprocessing(encoded, key, value):
    message = encoded.refused(train_diffusion, "--set", f"{key}={json.dumps(value)}")
    assert "autoencoder.pt" in message and key.split(".")[0] in message


@pytest.mark.parametrize(
    "script, stage, size, nearest",
    [
        (train_autoencoder, "autoencoder_train", [15, 20, 12], "14 or 16 x 20 x 12"),
        (train_diffusion, "diffusion_train", [16, 18, 11], "16 x 16 or 20 x 8 or 12"),
        (train_autoencoder, "autoencoder_train", [4, 4, 1], "4 x 4 x 2"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(encoded, script, stage, size, nearest):
    if script is train_autoencoder:
        (encoded.model_dir / "autoencoder.pt").unlink()
    before = fingerprint(encoded.folder)
    message = encoded.refused(script, *sets(**{f"{stage}__patch_size": size}))
    assert f"{stage}.patch_size" in message and nearest in message
    assert fingerprint(encoded.folder) == before


def test_patches_too_small_for_the_discriminator_are_refused(fresh):
    message = fresh.refused(train_autoencoder, *sets(autoencoder_train__discriminator={"num_layers_d": 3}))
    assert "discriminator" in message and "num_layers_d" in message
    assert list(fingerprint(fresh.model_dir)) == ["split.json"]
