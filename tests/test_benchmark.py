"""The benchmark: both sides do the same work, its arithmetic is right, and its table is complete."""

import contextlib
import io
import json
import statistics

import pytest
import torch
from chain import Project, make_data
from torch import nn

import utils
from benchmarks import benchmark, measure, project, reference
from ldm import configs
from ldm.data.cases import Case
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.process import NoiseProcess
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import downsampling_factor
from ldm.system.ranks import Run

CPU = torch.device("cpu")
RUN = Run(0, 1, CPU)


@pytest.fixture
def setting(tmp_path) -> Project:
    """A config with beta schedules, so that both sides learn the same."""
    made = Project(tmp_path / "bench", make_data(tmp_path / "data"))
    made.change(NoiseScheduler={"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195})
    return made


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autoencoder_of(config: dict) -> nn.Module:
    torch.manual_seed(0)
    return configs.define_network(config, "autoencoder_def").eval().requires_grad_(False)


# ---------------------------------------------------------------- both sides do the same


def test_the_reference_learns_the_noise_and_so_does_this_project(setting):
    """The loss is the mean of (UNet(a z + s noise, t) - noise)^2 by hand, and `diffusion_loss` of it too."""
    config = utils.load_config(setting.config_file)
    autoencoder = autoencoder_of(config)
    autoencoder.quant_conv_log_sigma.conv.bias.data.fill_(-50)  # posteriors without spread: both see one z
    unet = configs.define_network(config, "diffusion_def")
    for weight in unet.parameters():  # the last layer begins with zeros, which would learn nothing of z
        weight.data = numbers(*weight.shape) * 0.1
    images = numbers(2, 1, 16, 20, 12).abs()
    stage = reference.Diffusion(autoencoder, unet, images, 1e-3, CPU)
    noise, t = numbers(2, *stage.latent_shape, seed=1), torch.tensor([3, 700])
    loss = stage.loss(images, noise, t)

    z0 = autoencoder.encode(images)[0] * stage.scale_factor
    assert z0.std().item() == pytest.approx(1, rel=1e-4)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    squared = torch.cumprod(1 - betas, 0)[t].float().reshape(-1, 1, 1, 1, 1)
    by_hand = (unet(squared.sqrt() * z0 + (1 - squared).sqrt() * noise, t) - noise).square().mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    process = NoiseProcess(reference.noise_scheduler().alphas_cumprod, "epsilon", 1000)
    ours = diffusion_loss(process, unet(process.add_noise(z0, noise, t), t), z0, noise, t)
    assert loss.item() == pytest.approx(ours.item(), rel=1e-5)


def test_both_sides_make_the_same_step_of_the_autoencoder(setting):
    """In fp32, from the same weights and with posteriors without spread, generator and discriminator have the
    same gradients: Adam's first moment after a step is a tenth of them. The reference weights its
    discriminator's loss by 0.01, which Adam undoes."""
    section = setting.config["autoencoder_train"]
    setting.change(autoencoder_train={**section, "lr_schedule": "constant", "clip_grad_norm": None})
    config = utils.load_config(setting.config_file)
    config["autoencoder_train"].update(reference.LOSS)
    cases = [Case(str(i), ()) for i in range(2)]
    data = benchmark.VolumesInMemory(cases, numbers(2, 1, 16, 20, 12).abs())
    theirs, ours = reference.Autoencoder(config, RUN), project.Autoencoder(config, data, RUN)
    batch = torch.utils.data.default_collate([ours.dataset[(0, i)] for i in range(2)])
    before = autoencoder_of(config)
    before.quant_conv_log_sigma.conv.bias.data.fill_(-25)
    for one in (theirs.autoencoder, ours.learner.autoencoder.network):
        one.load_state_dict(before.state_dict())
    theirs.discriminator.load_state_dict(ours.learner.discriminator.state_dict())
    theirs.step(batch)
    ours.step(batch)
    mine = [stepper.adam for stepper in ours.learner.optimizers.values()]
    for a, b, weight in zip(
        (theirs.generator_optimizer, theirs.discriminator_optimizer), mine, (1, 0.01), strict=True
    ):
        first, second = (
            torch.cat([one.state[p]["exp_avg"].flatten() for p in one.param_groups[0]["params"]])
            for one in (a, b)
        )
        assert first.norm() > 1e-6
        assert (first - weight * second).norm() < 1e-3 * first.norm()
    moved = ours.learner.autoencoder.network.state_dict()
    assert max((moved[name] - weight).abs().max() for name, weight in before.state_dict().items()) > 1e-3


def test_the_references_samples_are_those_of_its_inferer(setting, monkeypatch):
    """All steps and the decoding, against `LatentDiffusionInferer.sample` with the same draws."""
    monkeypatch.setattr(reference, "STEPS", 20)
    config = utils.load_config(setting.config_file)
    autoencoder, unet = autoencoder_of(config), configs.define_network(config, "diffusion_def").eval()
    shape, scale = (3, 8, 10, 6), 0.7
    latents = reference.draw_latents(unet, shape, [5], 20, CPU)
    inferer = reference.LatentDiffusionInferer(reference.noise_scheduler(), scale)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))[None]
    torch.manual_seed(5)
    expected = inferer.sample(noise, autoencoder, unet, verbose=False)
    torch.testing.assert_close(reference.decode(autoencoder, latents, scale), expected)


def test_a_step_of_this_projects_side_moves_weights_and_average(setting):
    config = utils.load_config(setting.config_file)
    images = numbers(4, 1, 16, 20, 12).abs()
    data = benchmark.VolumesInMemory([Case(str(i), ()) for i in range(4)], images)
    encoder = Autoencoder(autoencoder_of(config))
    weights = configs.define_network(config, "diffusion_def").state_dict()
    stage = project.Diffusion(config, encoder, data, RUN, weights)
    assert downsampling_factor(config["autoencoder_def"])[0] * stage.shape[1] == 16
    stage.step(next(benchmark.endless(utils.make_loader(stage.dataset, stage.section, config, RUN, 0))))
    name = "out.2.conv.weight"
    for moved in (stage.learner.unet, stage.learner.ema_model.module):
        assert not torch.equal(moved.state_dict()[name], weights[name])


# ---------------------------------------------------------------- measuring


def test_alternation_turns_and_counts(monkeypatch):
    """Both are timed in every round, first the one and then the other; parts count as often as they say."""
    clock, calls = [0.0], []

    def work(name: str, seconds: float) -> measure.Work:
        def call():
            calls.append(name)
            clock[0] += seconds

        return measure.Work(((call, 10.0), (call, 1.0)), measure.read_flags())

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    seconds = measure.alternate({"a": work("a", 1.0), "b": work("b", 0.5)}, 3, CPU)
    assert seconds == {"a": [11.0] * 3, "b": [5.5] * 3}
    assert "".join(calls[8::2]) == "abbaab"  # after two warm-up runs of two calls each
    assert measure.ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == (4 / 3, 1.0, 3.0)


def test_flops_of_a_convolution():
    """2 x kernel x channels in x channels out x voxels, for each time that it counts."""
    conv, x = nn.Conv3d(2, 3, 3, padding=1), torch.zeros(1, 2, 4, 4, 4)
    work = measure.Work(((lambda: conv(x), 5.0),), measure.read_flags())
    assert work.flops() == 5 * 2 * 27 * 2 * 3 * 64


def hungry(megabytes: int) -> measure.Work:
    return measure.Work(((lambda: torch.ones(megabytes * 250_000).sum(), 1),), measure.read_flags())


def test_peak_memory_of_a_process():
    assert measure._peak(1, hungry, 400) == pytest.approx(400e6, rel=0.1)


# ---------------------------------------------------------------- the command


def run_command(project_files: Project, *more) -> tuple[str, dict]:
    out = project_files.folder / "figures.json"
    argv = ["-c", str(project_files.config_file), "--data", str(project_files.data), "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        benchmark.main([*argv, "--out", str(out), *map(str, more)])
    return printed.getvalue(), json.loads(out.read_text())


def test_the_table_has_a_row_a_part_and_the_ratio_of_the_medians(setting, monkeypatch):
    monkeypatch.setattr(measure, "LEAST", 0.0)
    text, results = run_command(setting, "--parts", *benchmark.PARTS, "--rounds", 3, "--reference-steps", 2)
    assert [row["part"] for row in results["rows"]] == list(benchmark.PARTS)
    for row in results["rows"]:
        times = [row[side]["seconds"] for side in benchmark.SIDES]
        assert [len(one) for one in times] == [3, 3]
        assert row["ratio"] == pytest.approx(statistics.median(times[0]) / statistics.median(times[1]))
        assert row["ratio_low"] <= max(a / b for a, b in zip(*times, strict=True)) == row["ratio_high"]
        start = f"| {benchmark.PARTS[row['part']]} |"
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        assert line.count("|") == 8 and f"| {row['ratio']:.2f} (" in line
    assert results["machine"]["torch"] == torch.__version__ and "2 of the reference's 1000" in text


def test_memory_of_one_part(setting, monkeypatch):
    monkeypatch.setattr(measure, "LEAST", 0.0)
    text, results = run_command(setting, "--parts", "decoding", "memory", "--rounds", 1)
    (row,) = results["rows"]
    assert all(row[side]["peak_bytes"] > 0 for side in benchmark.SIDES)
    assert f"| {row['reference']['peak_bytes'] / 1e9:.3g} |" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--reference-steps", "1001"], "expected 1 to 1000"),
        (["--out", "."], "--out .: is a folder"),
        (["--parts", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_what_is_refused(setting, argv, message):
    files = ["-c", str(setting.config_file), "--device", "cpu"]
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        benchmark.main([*files, *argv])
    assert stop.value.code == 2 and message in err.getvalue() and "Traceback" not in err.getvalue()


def test_attention_is_counted():
    q = torch.zeros(1, 2, 6, 4)  # two heads, six voxels, four channels
    products = 2 * 2 * (2 * 6 * 6 * 4)  # of queries and keys, and of weights and values
    assert measure.count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == products
