"""The memory forecast: parts counted by hand, CUDA's rules for mixed precision, the dry run, the refusal."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import pytest
import torch
from chain import CONFIG, ROOT, Project, make_data
from monai.networks.nets import AutoencoderKL
from torch import nn

import inference
import train_autoencoder
import train_diffusion
import utils
from ldm import UserError, configs
from ldm.system.ranks import Run
from ldm.training import autoencoder, diffusion, memory
from ldm.training.memory import Forecast, Meter, highest, take_steps
from ldm.training.step import Optimizer, make_ema

SECTION = {
    "optimizer": "adam",
    "lr": 1e-3,
    "scale_lr": False,
    "adam_betas": [0.9, 0.999],
    "clip_grad_norm": 1.0,
    "accumulate_steps": 1,
    "ema_decay": 0.9,
}
CPU = Run(0, 1, torch.device("cpu"))
SIZES = ([16, 16, 16], [16, 16, 16], [16, 16, 16])


def metered(build, step, section=SECTION, like_gpu=False, ranks=1):
    """The peak of one training step of a network."""
    with Meter(like_gpu, ranks) as meter:
        network = build()
        stepper, ema = Optimizer(network, section, None), make_ema(network, section["ema_decay"])
        meter.hold("weights", network)
        meter.hold("averaged weights", ema)
        meter.hold_optimizers([stepper])
        with meter.phase("training"):
            step(network).backward()
    return meter.peaks["training"]


def test_parts_are_those_counted_by_hand():
    # Two layers whose weights (1000 x 1000) dwarf the activations (1 x 1000); the second of two batches.
    peak = metered(
        lambda: nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False)),
        lambda network: network(torch.zeros(1, 1000)).sum(),
        {**SECTION, "accumulate_steps": 2},
    )
    count = 2 * 1000 * 1000
    assert peak.parts["weights"] == peak.parts["gradients"] == 4 * count
    assert peak.parts["optimiser"] == 8 * count + 2 * 4  # two moments, and a counter for each tensor
    assert peak.parts["averaged weights"] == 4 * count + 8  # and a counter
    # Beside them the gradient of one layer, before it is added, and a few vectors.
    assert 4 * 1000**2 < peak.parts["activations"] < 4 * 1000**2 + 8 * 4 * 1000
    assert peak.total == sum(peak.parts.values())
    assert peak.tensors == peak.total - peak.parts["workspace"]


def test_muon_holds_one_moment_of_a_matrix_and_works_on_a_batch_at_a_time():
    """48 layers of 1000 x 1000 in 12 batches of four, whose iterates are there at a time."""
    section = {**SECTION, "optimizer": "muon", "muon_lr": 0.02, "accumulate_steps": 2}
    with Meter(False) as meter:
        network = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(48)])
        stepper = Optimizer(network, section, None)
        meter.hold("weights", network)
        meter.hold_optimizers([stepper])
        with meter.phase("step"):
            take_steps([stepper])
    size = 4 * 1000**2
    parts = meter.peaks["step"].parts
    assert parts["optimiser"] == 48 * (size + 2 * 4 * 1000 + 4)  # Adam's moments and counter are the bias's
    assert 3 * 4 * size < parts["activations"] < 9 * 4 * size


def test_activations_of_a_chain_of_convolutions():
    n = 16**3
    weights = 4 * 8 * 8 * 27 * 4
    with Meter(False) as meter:
        network = nn.Sequential(*[nn.Conv3d(8, 8, 3, padding=1, bias=False) for _ in range(4)])
        meter.hold("weights", network)
        images = torch.zeros(1, 8, 16, 16, 16)
        with meter.phase("training"):
            output = network(images)
        with meter.phase("again"):
            output = network(images).detach()
        with torch.no_grad(), meter.phase("without gradients"):
            del output
            network(images)
    assert meter.peaks["training"].parts["weights"] == weights
    volume = 4 * 8 * n
    assert meter.peaks["training"].parts["activations"] == (1 + 4) * volume  # each layer's output is kept
    assert meter.peaks["again"].parts["activations"] == (1 + 4 + 4) * volume  # beside the output before
    assert meter.peaks["without gradients"].parts["activations"] == (1 + 2) * volume  # in and out of a layer


def test_gradients_of_accumulated_batches_and_of_ranks_are_there_from_the_start():
    def peak(section=SECTION, ranks=1):
        return metered(
            lambda: nn.Conv3d(1, 64, 3, padding=1),
            lambda network: network(torch.zeros(1, 1, 32, 32, 32)).square().sum(),
            section,
            ranks=ranks,
        ).parts["gradients"]

    weights = 4 * (64 * 27 + 64)
    assert peak() == 0  # the peak is before the first gradient
    assert peak({**SECTION, "accumulate_steps": 3}) == peak(ranks=2) == weights


def test_group_norm_is_in_float32_on_cuda_and_not_on_a_cpu():
    def activations(like_gpu):
        with Meter(like_gpu) as meter, torch.autocast("cpu", torch.bfloat16):
            x = torch.zeros(1, 8, 16, 16, 16, dtype=torch.bfloat16)
            norm = nn.GroupNorm(2, 8)
            meter.hold("weights", norm)
            with torch.no_grad(), meter.phase("norm"):
                y = norm(x)
        assert y.dtype == (torch.float32 if like_gpu else torch.bfloat16)
        return meter.peaks["norm"].parts["activations"]

    half = 2 * 8 * 16**3
    # bfloat16 in and out; or in, widened and out. Statistics of 2 groups are a few bytes, a block on a GPU.
    assert 0 <= activations(False) - 2 * half <= 16
    assert 0 <= activations(True) - (half + 2 * half + 2 * half) <= 2 * memory.BLOCK


@pytest.mark.parametrize(
    "operation, dtype",
    [
        (lambda x: x.softmax(-1), torch.float32),
        (lambda x: x**2, torch.float32),
        (lambda x: x.sum(), torch.float32),
        (lambda x: nn.functional.interpolate(x, scale_factor=2.0), torch.float32),
        (lambda x: nn.functional.silu(x), torch.bfloat16),
        (lambda x: nn.functional.conv3d(x.float(), x.float()), torch.bfloat16),
        (lambda x: x.flatten(2) @ x.flatten(2).mT, torch.bfloat16),
    ],
)
def test_precision_of_operations_under_cudas_rules(operation, dtype):
    x = torch.zeros(2, 2, 2, 2, 2, dtype=torch.bfloat16)
    with memory.cuda_autocast_rules(), torch.autocast("cpu", torch.bfloat16):
        assert operation(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):  # nothing is left behind
        assert x.softmax(-1).dtype == torch.bfloat16


def test_a_prediction_leaves_no_trace():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    Forecast(autoencoder.rehearse, "autoencoder_train", SIZES, True, torch.bfloat16).peaks(config())
    assert torch.equal(torch.get_rng_state(), state)
    layer = nn.Linear(2, 2)
    assert type(layer.weight.data) is torch.Tensor and layer.to(torch.float64).weight.dtype == torch.float64


def config(**changes) -> dict:
    """The tests' config with `section.key` changed."""
    checked = configs.check_config(json.loads(json.dumps(CONFIG)), "config")
    for key, value in changes.items():
        stage, _, name = key.partition("__")
        checked[stage][name] = value
    return checked


@pytest.mark.parametrize(
    "script, stage",
    [(train_autoencoder, "autoencoder_train"), (train_diffusion, "diffusion_train")],
)
def test_stages(script, stage):
    def training(sizes=SIZES, **changes):
        changes = {f"{stage}__{key}": value for key, value in changes.items()}
        forecast = Forecast(script.rehearse, stage, sizes, True, torch.bfloat16)
        return forecast.peaks(config(**changes))["training"]

    one, two, four = (training(batch_size=n) for n in (1, 2, 4))
    slope = two.total - one.total  # linear in the batch
    assert four.total - two.total == pytest.approx(2 * slope, rel=0.05)
    changed = training(gradient_checkpointing=True, ema_decay=0.0).parts
    assert changed["activations"] < 0.9 * two.parts["activations"] and changed["averaged weights"] == 0
    parts = two.parts
    key = "autoencoder_def" if stage == "autoencoder_train" else "diffusion_def"
    count = sum(p.numel() for p in configs.define_network(config(), key).parameters())
    assert parts["weights"] >= 4 * count
    if stage == "diffusion_train":
        assert 8 * count <= parts["optimiser"] < 8.1 * count + 1024 * 200  # blocks of 512 bytes


def test_half_precision_of_older_gpus_is_counted_too():
    """float16 (V100, T4): the loss is scaled, and group norms are in float32, as bfloat16's are not."""
    peaks = [
        Forecast(autoencoder.rehearse, "autoencoder_train", SIZES, True, half).peaks(
            config(autoencoder_train__amp=True)
        )["training"]
        for half in (torch.bfloat16, torch.float16, None)
    ]
    assert peaks[0].tensors < peaks[1].tensors < peaks[2].tensors


def test_a_forecast_that_fails_stops_only_a_dry_run(tmp_path, given, monkeypatch):
    """The forward pass needs a value; the check of the config, on shapes, does not."""
    real = AutoencoderKL.encode

    def encode(self, x):
        if not x.is_meta:
            x.sum().item()
        return real(self, x)

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    message = refused(1, train_autoencoder, "-c", given)
    assert message.startswith("error: the memory cannot be estimated (") and message.count("\n") == 1

    project = Project(tmp_path / "project", make_data(tmp_path / "data"))
    monkeypatch.setattr(memory, "gpu_memory", lambda device: (10**9, 10**9))
    told = project.run(train_autoencoder, "--set", "autoencoder_train.max_epochs=1")
    assert "warning: no memory forecast: the memory cannot be estimated (" in told
    assert (project.model_dir / "autoencoder.pt").exists()


def test_a_network_that_is_built_from_values_is_no_error_of_the_config():
    """Stochastic depth, say, takes `linspace(...)[i].item()`; the error of building is then a UserError."""

    def rehearse(config, sizes, meter, run):
        with meter:
            try:
                torch.linspace(0, 1, 3)[0].item()
            except RuntimeError:
                raise UserError("autoencoder_def: cannot be built") from None

    with pytest.raises(memory.ForecastError, match="DataDependentOutputException"):
        Forecast(rehearse, "autoencoder_train", SIZES, True, None).peaks(config())


# ---- the scripts


def dry(script, *argv) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        script.main(["--dry-run", *map(str, argv)])
    return out.getvalue()


def refused(code: int, script, *argv) -> str:
    """The message of a dry run that ends with this exit code."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        dry(script, *argv)
    assert stop.value.code == code
    return err.getvalue()


@pytest.fixture
def given(tmp_path) -> Path:
    """A config that leaves no size open."""
    sized = json.loads(json.dumps(CONFIG))
    for stage in ("autoencoder_train", "diffusion_train"):
        sized[stage]["patch_size"] = [16, 16, 16]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sized))
    return path


@pytest.mark.parametrize("script", [train_autoencoder, train_diffusion, inference])
def test_dry_run_needs_no_data_and_writes_nothing(given, script, monkeypatch, without_savings):
    monkeypatch.chdir(given.parent)
    for device in ((), ("--device", "cpu")):
        told = dry(script, "-c", given, "-e", given.parent / "nowhere.json", *device)
        assert ("a GPU" in told, "this CPU" in told) == (not device, bool(device))
        assert "weights" in told and "peak" in told
    assert [path.name for path in given.parent.iterdir()] == ["config.json"]


@pytest.fixture
def without_savings(monkeypatch):
    """Each is a prediction more."""
    monkeypatch.setattr(Forecast, "savings", lambda self, config, now: {})


@pytest.mark.parametrize("script", [train_autoencoder, train_diffusion, inference])
def test_dry_run_takes_open_sizes_from_the_headers(tmp_path, script, without_savings, monkeypatch):
    project = Project(tmp_path / "project", make_data(tmp_path / "data"))

    def read(*args, **kwargs):
        raise AssertionError("voxels are read")

    monkeypatch.setattr(nib.arrayproxy.ArrayProxy, "_get_unscaled", read)
    with pytest.raises(AssertionError, match="voxels are read"):
        project.image("scan_0")
    told = project.run(script, "--dry-run")
    assert "16 x 20 x 12" in told
    assert not project.model_dir.exists() and not project.output_dir.exists()
    project.set_environment(data_base_dir=str(tmp_path / "nothing"))
    assert "nothing" in project.refused(script, "--dry-run")


@pytest.mark.parametrize(
    "more, message",
    [
        *(
            ([option], f"--dry-run: nothing is trained; leave out {option}.")
            for option in ("--fresh", "--profile")
        ),
        (["--resume", "x.pt"], "--dry-run: nothing is trained; leave out --resume."),
        (["--device", "tpu"], "--device tpu: expected cpu, cuda or cuda:N"),
    ],
)
def test_options_that_a_dry_run_refuses(given, more, message):
    assert refused(2, train_diffusion, "-c", given, *more).startswith(f"error: {message}")


def test_dry_run_prints_what_would_lower_the_peak(given):
    told = dry(train_autoencoder, "-c", given, "-e", "nowhere.json", "--amp")
    last = told.splitlines()[-1]
    assert last.startswith("to lower it: autoencoder_train.")
    assert "autoencoder_train.gradient_checkpointing=true (0.0 GB)" in last


SHIPPED = [  # config, overrides, GB of the GPU, script and stage
    ("16g", (), 8, train_autoencoder, "autoencoder_train"),
    ("16g", ("diffusion_train.sample_interval=0",), 8, train_diffusion, "diffusion_train"),
    ("16g", (), 16, train_diffusion, "diffusion_train"),
    ("16g", (), 8, inference, None),
    ("32g", (), 32, train_autoencoder, "autoencoder_train"),
    ("32g", (), 32, train_diffusion, "diffusion_train"),
]


@pytest.mark.parametrize("name, overrides, gb, script, stage", SHIPPED)
def test_a_shipped_config_fits_a_gpu_with_a_tenth_to_spare(name, overrides, gb, script, stage):
    shipped = utils.load_config(ROOT / "config" / f"config_train_{name}.json", overrides)
    size = shipped["diffusion_train"]["patch_size"]
    if stage:
        peaks = Forecast(script.rehearse, stage, [size] * 3, True, torch.bfloat16).peaks(shipped)
    else:
        meter = Meter(True)
        inference.rehearse(shipped, size, 1, meter, CPU)
        peaks = meter.peaks
    assert highest(peaks).total <= 0.9e9 * gb


def test_only_what_can_lower_a_phase_is_tried():
    section = config(diffusion_train__sample_interval=5)
    forecast = Forecast(diffusion.rehearse, "diffusion_train", SIZES, True, torch.bfloat16)
    for phase, expected in (
        ("training", {"gradient_checkpointing", "batch_size", "accumulate_steps", "ema_decay", "patch_size"}),
        ("validation", {"batch_size", "accumulate_steps", "ema_decay", "patch_size"}),
        ("sampling", {"sample_interval", "ema_decay", "patch_size"}),
        ("encoding", {"patch_size"}),
    ):
        assert {key for change in forecast._changes(section, phase) for key in change} == expected


def test_refusal_names_the_largest_saving_first(tmp_path, monkeypatch):
    project = Project(tmp_path / "project", make_data(tmp_path / "data"))
    monkeypatch.setattr(memory, "gpu_memory", lambda device: (10**5, 10**9))
    monkeypatch.setattr(os, "name", "posix")
    bytes_of = {"gradient_checkpointing": 3, "batch_size": 2, "patch_size": 4}

    def peaks(self, config):
        was = utils.load_config(project.config_file)[self.stage]
        changed = [key for key in bytes_of if config[self.stage][key] != was[key]]
        size = min([bytes_of[key] for key in changed], default=9) * 10**9
        return {"training": memory.Peak({**dict.fromkeys(memory.PARTS, 0), "activations": size})}

    monkeypatch.setattr(Forecast, "peaks", peaks)
    assert project.refused(train_autoencoder, "--amp") == (
        "error: autoencoder_train: expected peak 9.0 GB, but the GPU has 1.0 GB in all.\n"
        "To lower it: autoencoder_train.batch_size=1 autoencoder_train.accumulate_steps=2 (2.0 GB), or "
        "autoencoder_train.gradient_checkpointing=true (3.0 GB), or autoencoder_train.patch_size=[12,14,8] "
        "(4.0 GB)"
    )


@pytest.mark.parametrize(
    "free, everything",
    [(150_000_000, 150_000_000), (10**5, 10**9)],
    ids=["but for the allowance", "but for what others use now"],
)
def test_what_may_fit_is_only_warned_of(tmp_path, monkeypatch, free, everything):
    parts = {**dict.fromkeys(memory.PARTS, 0), "activations": 10**8, "workspace": 10**8}
    monkeypatch.setattr(Forecast, "peaks", lambda self, config: {"training": memory.Peak(parts)})
    monkeypatch.setattr(memory, "gpu_memory", lambda device: (free, everything))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        memory.check_fits(autoencoder.rehearse, config(), "autoencoder_train", SIZES, CPU)
    assert out.getvalue().startswith("warning: autoencoder_train: expected peak 0.2 GB. Of the GPU's ")


def test_latents_from_a_cache_need_neither_it_nor_an_encoder(given, without_savings):
    argv = ["-c", given, "-e", "nowhere.json", "--set"]
    assert "encoding" in dry(train_diffusion, *argv, "diffusion_train.latent_cache=false")
    told = dry(train_diffusion, *argv, "diffusion_train.latent_cache=true")
    assert "training" in told and "encoding" not in told


def peak_told(text: str, column: str) -> float:
    """GB of a phase in what a dry run printed."""
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("GB "))
    peaks = next(line for line in lines if line.startswith("peak"))
    return float(peaks.split()[head.split().index(column)])


def test_decoding_within_a_given_memory(given):
    large = ["--set", "diffusion_train.patch_size=[96,96,96]", "-c", given]
    free = dry(inference, *large)
    whole, sampling = peak_told(free, "decoding"), peak_told(free, "sampling")
    assert whole > 2 * sampling
    assert "--max-memory" in free.splitlines()[-1]
    enough = dry(inference, *large, "--max-memory", 2 * whole)
    assert peak_told(enough, "decoding") == pytest.approx(whole, rel=0.15)
    assert "holds for decoding" not in enough
    within = dry(inference, *large, "--max-memory", whole / 2)
    assert peak_told(within, "decoding") == pytest.approx(whole / 2, abs=0.01)
    assert "Expected at least" in refused(2, inference, *large, "--max-memory", 0.001)


NETWORKS_ELSEWHERE = [
    (
        "monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi",
        {"num_splits": 1, "norm_float16": False, "num_res_blocks": [1, 1]},
    ),
    ("generative.networks.nets.AutoencoderKL", {}),
]


@pytest.mark.parametrize("target, more", NETWORKS_ELSEWHERE)
def test_networks_of_other_packages(given, target, more, without_savings):
    pytest.importorskip(target.partition(".")[0])
    changed = json.loads(given.read_text())
    for key in (
        ("autoencoder_def", "diffusion_def") if target.startswith("generative") else ("autoencoder_def",)
    ):
        changed[key]["num_channels"] = changed[key].pop("channels")
    changed["autoencoder_def"] |= {"_target_": target, **more}
    if target.startswith("generative"):
        changed["diffusion_def"]["_target_"] = "generative.networks.nets.DiffusionModelUNet"
    changed["diffusion_train"]["sample_interval"] = 5
    given.write_text(json.dumps(changed))
    for script, phases in (
        (train_autoencoder, ("training", "validation")),
        (train_diffusion, ("encoding", "training", "sampling")),
        (inference, ("sampling", "decoding")),
    ):
        told = dry(script, "-c", given)
        assert all(peak_told(told, phase) >= 0 for phase in phases)


# ---- against what is measured


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_prediction_of_more_than_a_gb_is_near_what_is_measured(given):
    """Within 7 % where docs/PERFORMANCE.md was measured; another CPU's library may copy more, or less."""
    case = ["autoencoder", "1", "112", "112", "96", "--config", str(given)]
    command = [sys.executable, "-m", "benchmarks.memory", *case]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()]
    predicted, measured = next((float(row[3]), float(row[4])) for row in rows if row[1] == "training")
    assert predicted > 1
    assert predicted == pytest.approx(measured, rel=0.25)


WORKER = """
import sys

import chain
import test_memory

chain.leave_after(test_memory.worker, sys.argv[1], sys.argv[2:])
"""


def worker(folder: str, argv: list[str]) -> None:
    """Of two ranks: the second one's GPU is small. Leaves a file when it is about to say why it ends."""
    rank, sleep = int(os.environ["RANK"]), time.sleep
    memory.gpu_memory = lambda device: (10**5,) * 2 if rank else (10**12,) * 2
    time.sleep = lambda seconds: (Path(folder, f"heard_{rank}").touch(), sleep(seconds))
    train_autoencoder.main(argv)


@pytest.mark.skipif(os.name == "nt", reason="PyTorch for Windows has no libuv, which torchrun needs")
def test_refusal_by_the_smaller_of_two_gpus(tmp_path):
    project = Project(tmp_path / "project", make_data(tmp_path / "data"))
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path), *project.argv()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode and "exitcode  : 2" in process.stderr, process.stderr
    assert process.stderr.count("error: autoencoder_train: expected peak") == 1
    assert (tmp_path / "heard_1").exists()
    assert not list(project.model_dir.glob("*.pt"))
