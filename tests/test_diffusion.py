"""Samplers against Gaussian data, for which the best prediction and every step are formulas.

For z_0 ~ N(m, v) and z_t = a z_0 + s noise, given z_t the means of z_0 and of the noise are

    m + a v / (a^2 v + s^2) (z_t - a m)    and    s / (a^2 v + s^2) (z_t - a m),

so that each step of a sampler is affine, x -> A x + B (+ C noise). The steps are written down again here, in
float64 and from the definitions of the processes, and the samplers have to follow them.
"""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from monai.networks.schedulers.rectified_flow import timestep_transform

import utils
from ldm import UserError, configs
from ldm.diffusion.process import NoiseProcess, resolve_timestep_sampling
from ldm.diffusion.samplers import SAMPLERS, choose_sampler, sample_latents
from ldm.system.ranks import Run

MEAN, VARIANCE = 0.3, 0.5**2
SCALED = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
LINEAR = SCALED | {"num_train_timesteps": 1000, "zero_terminal_snr": False, "shift": 1.0}
DISCRETE = ("epsilon", "v_prediction", "sample")


def discrete(prediction: str | None = "epsilon", **changes) -> NoiseProcess:
    return NoiseProcess.from_config(LINEAR | {"prediction_type": prediction} | changes)


def flow(steps: int = 1000, shift: float = 1.0) -> NoiseProcess:
    changes = {"num_train_timesteps": steps, "shift": shift}
    return discrete(None, schedule="rectified_flow", **changes)


@functools.cache
def log_table() -> np.ndarray:
    """log a^2 of the scaled linear schedule at t = -1 .. 999, as MONAI has it: rounded to float32."""
    scheduler = DDPMScheduler(1000, **SCALED)
    return np.log(np.concatenate([[1.0], scheduler.alphas_cumprod.double().numpy()]))


@functools.cache
def levels_of_table(t: float) -> tuple[float, float]:
    """a and s at a time, whole or not; the clean end at -1."""
    squared = np.exp(np.interp(t, np.arange(-1, 1000), log_table()))
    return float(squared**0.5), float((1 - squared) ** 0.5)


@functools.cache
def half_log_snr(t: float) -> float:
    a, s = levels_of_table(t)
    return float(np.log(a / s))


@functools.cache
def even_in_log_snr(steps: int) -> list[float]:
    """Times from 999 to 0 with log(a / s) evenly between, by bisection; and the clean end."""
    times = []
    for wanted in np.linspace(half_log_snr(999), half_log_snr(0), steps):
        low, high = 0.0, 999.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if half_log_snr(middle) > wanted else (low, middle)
        times.append((low + high) / 2)
    return [*times, -1]


def levels_of_line(t: float) -> tuple[float, float]:
    return 1 - t / 1000, t / 1000


def conditional_means(x, a: float, s: float):
    """Of z_0 and of the noise, given z_t = x."""
    away = (x - a * MEAN) / (a**2 * VARIANCE + s**2)
    return MEAN + a * VARIANCE * away, s * away


def targets(z0, noise, a, s) -> dict:
    """What a network predicts, by kind."""
    v = a * noise - s * z0
    return {"epsilon": noise, "sample": z0, "velocity": z0 - noise, "v_prediction": v}


def best_model(process: NoiseProcess, levels=None):
    """The network that training would end at, by these levels or by those of the definitions."""
    levels = levels or (levels_of_line if process.is_flow else levels_of_table)

    def model(x, t):
        outputs = []
        for one, time in zip(x, t.tolist(), strict=True):
            a, s = levels(time)
            z0, noise = conditional_means(one.double(), a, s)
            outputs.append(targets(z0, noise, a, s)[process.prediction])
        return torch.stack(outputs).to(x)

    return model


TEN = [999, 888, 777, 666, 555, 444, 333, 222, 111, 0, -1]


def ddim_recursion(x, times, levels=levels_of_table):
    """The same z_0 and the same noise, mixed by the levels of the next time."""
    for t, nxt in zip(times[:-1], times[1:], strict=True):
        z0, noise = conditional_means(x, *levels(t))
        a, s = levels(nxt)
        x = a * z0 + s * noise
    return x


def ddpm_moments(x, t, nxt):
    """Mean and variance of q(x_nxt | x_t, z_0 = its conditional mean), two Gaussians multiplied.

    x_nxt ~ N(a' z_0, s'^2) before x_t is known; x_t = r x_nxt + N(0, s^2 - r^2 s'^2) with r = a / a'.
    """
    (a, s), (a_next, s_next) = levels_of_table(t), levels_of_table(nxt)
    z0, _ = conditional_means(x, a, s)
    if nxt < 0:
        return z0, 0.0
    r = a / a_next
    added = s**2 - r**2 * s_next**2
    variance = 1 / (1 / s_next**2 + r**2 / added)
    return variance * (a_next * z0 / s_next**2 + r * x / added), variance


def start(seeds, shape):
    """First draw of each seed's own stream, and the streams."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).double(), generators


# ---- samplers


@pytest.mark.parametrize("prediction", DISCRETE)
def test_ddim_follows_its_recursion_over_the_times_visited(prediction):
    process = discrete(prediction)
    found = sample_latents(best_model(process), process, (2, 3, 3, 3), [4, 5], 10, "ddim")
    x, _ = start([4, 5], (2, 3, 3, 3))
    expected = ddim_recursion(x, TEN)
    assert (found - expected).abs().max() < 1e-5
    # What MONAI's scheduler does, t - T // N, is another result: the last step from 99 instead of 0 ...
    theirs = ddim_recursion(x, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1])
    assert (found - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", DISCRETE)
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddpm_follows_its_recursion_with_the_same_noise(prediction, steps):
    process = discrete(prediction)
    times = TEN if steps == 10 else [*range(999, -2, -1)]
    found = sample_latents(best_model(process), process, (4,), [4, 5], steps, "ddpm")
    x, generators = start([4, 5], (4,))
    for t, nxt in zip(times[:-1], times[1:], strict=True):
        x, variance = ddpm_moments(x, t, nxt)
        if nxt >= 0:
            x = x + variance**0.5 * torch.stack([torch.randn(4, generator=g) for g in generators]).double()
    assert (found - x).abs().max() < 1e-5


def pndm_recursion(x, times):
    """DDIM's step with a mean of the last four noises, by Adams and Bashforth's weights; the last is DDIM's
    own."""
    weights = {1: [1], 2: [1.5, -0.5], 3: np.array([23, -16, 5]) / 12, 4: np.array([55, -59, 37, -9]) / 24}
    noises = []
    for t, nxt in zip(times[:-1], times[1:], strict=True):
        (a, s), (a_next, s_next) = levels_of_table(t), levels_of_table(nxt)
        noises = [conditional_means(x, a, s)[1], *noises][:4]
        mean = noises[0] if nxt < 0 else sum(w * n for w, n in zip(weights[len(noises)], noises, strict=True))
        x = a_next * (x - s * mean) / a + s_next * mean
    return x


def multistep_recursion(x, times, corrected: bool):
    """Lu et al., 2022b, algorithm 2; corrected, Zhao et al., 2023, algorithm 5, its linear system solved as
    it stands in equation 9."""
    z0s, lambdas, end = [], [], None
    for t, nxt in zip(times[:-1], times[1:], strict=True):
        a, s = levels_of_table(t)
        z0 = conditional_means(x, a, s)[0]
        if corrected and end is not None:
            x = end(z0)
        z0s, lambdas = [*z0s, z0], [*lambdas, np.log(a / s)]
        if nxt < 0:
            return z0
        a_next, s_next = levels_of_table(nxt)
        h = np.log(a_next / s_next) - lambdas[-1]
        r = (lambdas[-1] - lambdas[-2]) / h if len(z0s) > 1 else None
        mean = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * z0s[-2] if r else z0
        base = s_next / s * x

        def end(z0_next, base=base, h=h, r=r, a_next=a_next, now=z0, was=z0s[-2] if r else None):
            phi = [np.expm1(-h)]  # B(h), then h phi_2, h phi_3 of -h
            phi.append(phi[0] / -h - 1)
            phi.append(phi[1] / -h - 1 / 2)
            nodes = [1.0] if r is None else [-r, 1.0]
            differences = [z0_next - now] if r is None else [(was - now) / -r, z0_next - now]
            right = [phi[1] / phi[0], 2 * phi[2] / phi[0]][: len(nodes)]
            system = [[node**k for node in nodes] for k in range(len(nodes))]
            weights = [0.5] if r is None else np.linalg.solve(system, right)
            correction = sum(w * d for w, d in zip(weights, differences, strict=True))
            return base - a_next * phi[0] * (now + correction)

        x = base - a_next * np.expm1(-h) * mean
    return x


@pytest.mark.parametrize("prediction", DISCRETE)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("name", ["pndm", "dpmpp_2m", "unipc"])
def test_multistep_solvers_follow_their_recursions(name, steps, prediction):
    process = discrete(prediction)
    x, _ = start([4, 5], (2, 3, 3, 3))
    times = process.sampling_times(steps, SAMPLERS[name].even)
    found = SAMPLERS[name].solve(best_model(process), process, x, times, None)
    if name == "pndm":
        expected = pndm_recursion(x, [*np.linspace(999, 0, steps), -1])
    else:
        expected = multistep_recursion(x, even_in_log_snr(steps), name == "unipc")
    assert (found - expected).abs().max() < 1e-5
    inexact = sample_latents(best_model(process), process, (2, 3, 3, 3), [4, 5], 30, name)  # float32
    assert inexact.std() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("steps", [1, 7, 30])  # the last two with times that are no integers
def test_euler_and_heun_follow_their_recursions(steps):
    process = flow()
    by_euler, by_heun = (
        sample_latents(best_model(process), process, (2, 3, 3, 3), [4, 5], steps, name)
        for name in ("euler", "heun")
    )

    def velocity(x, i):
        z0, noise = conditional_means(x, *levels_of_line(1000 * (1 - i / steps)))
        return z0 - noise

    x, _ = start([4, 5], (2, 3, 3, 3))
    y = x
    for i in range(steps):
        x = x + velocity(x, i) / steps
        slope = velocity(y, i)
        if i + 1 < steps:
            slope = (slope + velocity(y + slope / steps, i + 1)) / 2
        y = y + slope / steps
    assert (by_euler - x).abs().max() < 1e-5 and (by_heun - y).abs().max() < 1e-5


def image_of(name: str, process: NoiseProcess, times: torch.Tensor, levels=None) -> tuple[float, float]:
    """Where a deterministic sampler takes 0 and 1, in float64."""
    x, model = torch.tensor([[0.0], [1.0]]).double(), best_model(process, levels)
    zero, one = SAMPLERS[name].solve(model, process, x, times, None).flatten().tolist()
    return zero, one


def moments_of(name: str, steps: int) -> tuple[float, float]:
    """Mean and std that it makes of N(0, 1)."""
    process = flow() if SAMPLERS[name].for_flow else discrete()
    zero, one = image_of(name, process, process.sampling_times(steps, SAMPLERS[name].even))
    return zero, one - zero


ORDERS = [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 3), ("euler", 1), ("heun", 2)]


@pytest.mark.parametrize("name, order", ORDERS)
def test_the_error_falls_at_the_order_of_the_solver(name, order):
    """Against the exact solution at a time before the clean end, where lambda is finite:
    x(t') = a' m + sqrt(a'^2 v + s'^2) / sqrt(a^2 v + s^2) (x(t) - a m)."""
    process = flow() if SAMPLERS[name].for_flow else discrete()
    levels = levels_of_line if process.is_flow else levels_of_table
    errors = []
    for steps in (40, 80, 160):
        if SAMPLERS[name].even == "log_snr":
            times = process.sampling_times(steps + 1, "log_snr")[:-1]
        else:
            times = torch.linspace(*((1000, 100) if process.is_flow else (999, 50)), steps + 1).double()
        (a, s), (b, r) = levels(times[0].item()), levels(times[-1].item())
        ratio = (b * b * VARIANCE + r * r) / (a * a * VARIANCE + s * s)
        expected = b * MEAN + ratio**0.5 * (1 - a * MEAN)
        errors.append(abs(image_of(name, process, times)[1] - expected))
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert rates == pytest.approx([order, order], abs=0.15), (errors, rates)


def test_pndm_is_of_second_order_at_least():
    errors = [abs(moments_of("pndm", steps)[1] - moments_of("pndm", 1000)[1]) for steps in (20, 40, 80)]
    assert np.log2(errors[0] / errors[1]) > 1 and np.log2(errors[1] / errors[2]) > 1


@pytest.mark.parametrize("name", [None, "unipc"])
@pytest.mark.parametrize("for_flow", [True, False])
def test_the_defaults_come_within_one_percent_of_the_true_spread(name, for_flow):
    process = flow() if for_flow else discrete()
    assert choose_sampler(None, process) == ("heun" if for_flow else "dpmpp_2m")
    name = choose_sampler(name if not for_flow else None, process)
    mean, std = moments_of(name, SAMPLERS[name].steps)
    assert std == pytest.approx(0.5, rel=0.01) and mean == pytest.approx(MEAN, abs=0.003)


def test_many_steps_give_the_data_back():
    for name in SAMPLERS.keys() - {"ddpm"}:
        # The last step of a discrete schedule takes the conditional mean at s = 0.039, whose std is 0.4985.
        spread, apart, by = (0.5, 1e-3, 1e-3) if SAMPLERS[name].for_flow else (0.4985, 0.005, 0.004)
        mean, std = moments_of(name, 1000)
        assert mean == pytest.approx(0.3, abs=apart) and std == pytest.approx(spread, abs=by), name


def test_the_table_of_the_docs():
    """docs/PERFORMANCE.md shows the std that each makes where 0.5 is true."""
    text = (Path(__file__).resolve().parents[1] / "docs/PERFORMANCE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*?\|((?: [0-9.]+ \|)+)$", text, re.MULTILINE)
    assert {name for name, _ in rows} == set(SAMPLERS) - {"ddpm"}
    for name, cells in rows:
        shown = [float(cell) for cell in cells.split("|")[-5:-1]]
        assert shown == pytest.approx([moments_of(name, steps)[1] for steps in (10, 25, 50, 100)], abs=1e-4)


@pytest.mark.parametrize("prediction", DISCRETE)
def test_ddpm_gives_the_data_back(prediction):
    process = discrete(prediction)
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))
    times, streams = process.sampling_times(1000), [torch.Generator().manual_seed(1)]
    drawn = SAMPLERS["ddpm"].solve(best_model(process), process, x, times, streams)
    # Five standard errors of 20 000 draws, and 0.003 for the finite steps.
    assert drawn.mean() == pytest.approx(MEAN, abs=5 * 0.5 / 20_000**0.5 + 0.003)
    assert drawn.std() == pytest.approx(0.5, abs=5 * 0.5 / 40_000**0.5 + 0.003)


def per_sample_model(x, t):
    """No reduction over the batch, so that not even rounding can tell batches apart."""
    return torch.sin(3 * x) * 0.5 + t.to(x).reshape(-1, 1, 1) / 1000


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_a_function_of_its_seed(sampler):
    process = flow() if SAMPLERS[sampler].for_flow else discrete()

    def draw(*seeds):
        return sample_latents(per_sample_model, process, (3, 5), seeds, 6, sampler)

    together = draw(7, 8, 9)
    assert together.shape == (3, 3, 5) and together.dtype == torch.float32
    for i, seed in enumerate((7, 8, 9)):
        assert torch.equal(draw(seed)[0], together[i])
    assert torch.equal(draw(9, 7), together[[2, 0]])
    assert not torch.equal(draw(7)[0], draw(8)[0])
    torch.manual_seed(123)
    assert torch.equal(draw(7, 8, 9), together)


def test_model_is_told_the_times_of_its_process():
    line, even = [1000 * (1 - i / 10) for i in range(10)], even_in_log_snr(10)[:-1]
    for process, name, times in (
        (discrete(), "ddim", TEN[:-1]),
        (discrete(), "dpmpp_2m", even),
        (flow(), "euler", line),
        (flow(), "heun", [line[i // 2 + i % 2] for i in range(19)]),  # the end of a step, then its beginning
    ):
        told = []
        model = lambda x, t, told=told: told.append(t.tolist()) or x * 0  # noqa: E731
        sample_latents(model, process, (1,), [0, 1], 10, name)
        assert np.allclose(told, [[t, t] for t in times], atol=1e-6), name


def test_progress_wraps_the_steps():
    wrapped, model = [], lambda x, t: x
    sample_latents(model, flow(), (1,), [0], 5, progress=lambda items: wrapped.append(len(items)) or items)
    assert wrapped == [5]


@pytest.mark.parametrize(
    "process, name, message",
    [
        (discrete(), "euler", "a beta schedule .epsilon.. Use dpmpp_2m or unipc or ddim or pndm or ddpm"),
        (flow(), "ddim", "trained with rectified flow. Use heun or euler"),
    ],
)
def test_sampler_that_does_not_fit(process, name, message):
    with pytest.raises(UserError, match=message):
        sample_latents(per_sample_model, process, (1,), [0], 5, name)


def test_more_steps_than_times():
    with pytest.raises(UserError, match="--steps 1001: the model was trained with 1000"):
        sample_latents(per_sample_model, discrete(), (1, 1), [0], 1001)
    drawn = sample_latents(per_sample_model, flow(10), (1, 1), [0], 25)  # a line has no such end
    assert drawn.isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_times_are_even(steps):
    for process, first, last in ((discrete(), 999, 0), (flow(), 1000, 1000 / steps)):
        times = process.sampling_times(steps)
        assert np.abs(times[:-1].numpy() - np.linspace(first, last, steps)).max() < 1e-9
        assert len(times) == steps + 1 and (times.diff() < 0).all()
    times = discrete().sampling_times(steps, "log_snr")
    assert np.abs(times.numpy() - even_in_log_snr(steps)).max() < 1e-6


# ---- the process


@pytest.mark.parametrize("process", [discrete(), flow()], ids=["discrete", "flow"])
def test_noise_levels_are_those_of_monais_schedulers(process):
    z0, noise = torch.randn(2, 5, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 300, 998, 999])
    if process.is_flow:
        expected = RFlowScheduler(num_train_timesteps=1000).add_noise(z0, noise, t)
    else:
        scheduler = DDPMScheduler(1000, **SCALED)
        expected = scheduler.add_noise(z0, noise, t)
        assert torch.equal(process.alphas_cumprod.float(), scheduler.alphas_cumprod)
    assert (process.add_noise(z0, noise, t) - expected).abs().max() < 1e-5
    for time in t.tolist():
        by_definition = levels_of_line(time) if process.is_flow else levels_of_table(time)
        found = [level.item() for level in process.levels(torch.tensor([time]))]
        assert found == pytest.approx(by_definition, abs=1e-5)


def test_ends():
    for process, time, levels in ((discrete(), -1, [1, 0]), (flow(), 0, [1, 0]), (flow(), 1000, [0, 1])):
        assert [level.item() for level in process.levels(torch.tensor(float(time)))] == levels


@pytest.mark.parametrize("prediction", [*DISCRETE, "velocity"])
def test_prediction_and_its_inverse(prediction):
    process = flow() if prediction == "velocity" else discrete(prediction)
    z0, noise = torch.randn(2, 4, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([1, 250, 700, 990])
    target = process.target(z0, noise, t)
    if prediction == "v_prediction":
        monais = DDPMScheduler(1000, **SCALED).get_velocity(z0, noise, t)
        assert torch.allclose(target, monais.double(), atol=1e-5)
    found = process.clean_and_noise(target, process.add_noise(z0, noise, t), t)
    assert (found[0] - z0).abs().max() < 1e-9 and (found[1] - noise).abs().max() < 1e-9
    a, s = (level.reshape(-1, 1, 1, 1, 1) for level in process.levels(t))
    assert torch.allclose(target, targets(z0, noise, a, s)[prediction])


def test_training_times():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.0, 1 - 2**-24])
    times = discrete().draw_times(u)
    assert times.dtype == torch.int64 and times.unique().tolist() == list(range(1000))
    assert discrete().draw_times(ends).tolist() == [0, 999]
    line = flow().draw_times(u)
    assert 0 < line.min() < 1 and 999 < line.max() <= 1000
    ends_of_line = flow().draw_times(ends)
    assert ends_of_line[0] == 1000 and 0 < ends_of_line[1] < 1e-3
    assert line.mean() == pytest.approx(500, abs=3) and line.std() == pytest.approx(1000 / 12**0.5, abs=3)


def test_logit_normal_training_times():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for process in (discrete(), flow()):
        times = process.draw_times(u, "logit_normal").double()
        assert times.min() >= 0 and times.max() <= 1000 and not times.isnan().any()
        # A logistic of N(0, 1): P(below T / 4) = Phi(log(1 / 3)) = 0.1359, the median T / 2.
        assert (times < 250).double().mean() == pytest.approx(0.1359, abs=0.004)
        assert times.median() == pytest.approx(500, abs=5)
        ends = process.draw_times(torch.tensor([0.0, 1 - 2**-24]), "logit_normal")
        assert ends.min() >= 0 and ends.max() < 1000


@pytest.mark.parametrize("schedule", ["cosine", "linear_beta", "scaled_linear_beta"])
@pytest.mark.parametrize("steps", [2, 50, 8000])
def test_schedule_of_any_length_is_finite(schedule, steps):
    for prediction in DISCRETE:
        process = discrete(prediction, schedule=schedule, num_train_timesteps=steps)
        squared = process.alphas_cumprod
        assert len(squared) == steps and squared.isfinite().all()
        assert (squared > 0).all() and (squared < 1).all() and (squared.diff() < 0).all()
        for sampler in [name for name in SAMPLERS if not SAMPLERS[name].for_flow]:
            for count in {1, 2, min(steps, 20)}:
                drawn = sample_latents(lambda x, t: 0.9 * x, process, (3,), [0, 1], count, sampler)
                assert drawn.isfinite().all(), (prediction, sampler, count)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": 20_000},  # what is left of the signal is below the smallest float
        {"beta_end": 0.999},
        {"schedule": "cosine", "num_train_timesteps": 1_000_000},  # the first step rounds to no noise
    ],
)
def test_schedule_that_leaves_nothing_to_divide_by(changes):
    with pytest.raises(UserError, match="NoiseScheduler: over .* steps this schedule leaves no signal"):
        discrete(**changes)


def test_cosine_schedule_is_the_published_one():
    """Nichol & Dhariwal, 2021, eq. 17: cos^2((t/T + 0.008) / 1.008 * pi / 2), normalised."""
    process = discrete(schedule="cosine")
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert np.allclose(process.alphas_cumprod[:990], (f / f[0])[1:991], rtol=2e-3)


# ---- what a config may add


def test_shifted_times_of_rectified_flow():
    """Noise level s becomes k s / (1 + (k - 1) s), in sampling and in training; the ends stay."""
    process, share = flow(shift=3.0), np.linspace(1, 0, 9)
    expected = 1000 * 3 * share / (1 + 2 * share)
    assert process.sampling_times(8).numpy() == pytest.approx(expected) and expected[4] == 750
    uniform = torch.tensor([0.0, 0.25, 0.5])
    assert process.draw_times(uniform).tolist() == pytest.approx([1000, 900, 750])
    zero, one = image_of("heun", process, process.sampling_times(100))
    assert zero == pytest.approx(MEAN, abs=1e-3) and one - zero == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction):
    process, plain = discrete(prediction, zero_terminal_snr=True), discrete(prediction)
    a, s = process.levels(torch.tensor([999, 998, 0]))
    assert a[0].item() == pytest.approx(a[1].item() / 2) and a[0] < 1e-4
    assert a[2].item() == pytest.approx(plain.levels(torch.tensor(0))[0].item())
    assert s[0].item() == pytest.approx(1)
    # Lin et al., 2024: a is moved and stretched.
    signal = plain.alphas_cumprod.sqrt()
    expected = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1]))[:-1]
    assert (process.alphas_cumprod.sqrt()[:-1] - expected).abs().max() < 1e-12
    for name in ("ddim", "dpmpp_2m", "unipc"):
        times = process.sampling_times(200, SAMPLERS[name].even)
        own = lambda t: [float(level) for level in process.levels(torch.tensor([t]).double())]  # noqa: E731
        zero, one = image_of(name, process, times, own)
        assert zero == pytest.approx(MEAN, abs=5e-3) and one - zero == pytest.approx(0.4985, abs=0.01), name


@pytest.mark.parametrize("prediction", [*DISCRETE, "velocity"])
def test_min_snr_weighs_the_error_of_the_clean_latents(prediction):
    """An error e of z_0 in the prediction at z_t gives a loss of min(SNR, gamma) e^2."""
    process = flow() if prediction == "velocity" else discrete(prediction)
    t = torch.tensor([20, 200, 500, 900])
    a, s = (level.reshape(-1, 1) for level in process.levels(t))
    z0, noise = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0)).double()
    wrong_z0, wrong_noise = z0 + 0.1, noise - 0.1 * a / s  # the same z_t
    error = targets(z0 - wrong_z0, noise - wrong_noise, a, s)[prediction]
    loss = process.min_snr_weight(t, 5.0) * error.square()[:, 0]
    expected = 0.01 * ((a / s) ** 2).clamp(max=5.0)[:, 0]
    assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert expected[0] == pytest.approx(0.05) and expected[-1] < 0.05  # above and below gamma


STRAIGHT = {"schedule": "rectified_flow", "prediction_type": None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction_type": "velocity"}, "velocity does not go with schedule scaled_linear_beta"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr: with prediction_type epsilon"),
        ({"shift": 2.0}, "shift: goes with schedule rectified_flow only"),
        (STRAIGHT | {"zero_terminal_snr": True}, "rectified_flow ends in noise as it is"),
    ],
)
def test_additions_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        NoiseProcess.from_config(LINEAR | {"prediction_type": "epsilon"} | changes)


# ---------------------------------------------------------------- schedulers named by `_target_`

RFLOW = {"_target_": "monai.networks.schedulers.RFlowScheduler"}


def test_the_shift_of_rflow_is_monais():
    """Of the times of training and of sampling, for latents of 24 x 32 x 16 and a base of 12^3 voxels."""
    transform = {"use_timestep_transform": True, "base_img_size_numel": 12**3}
    transform["use_discrete_timesteps"] = False
    process = NoiseProcess.from_config(RFLOW | transform, [24, 32, 16])
    given = {"input_img_size_numel": 24 * 32 * 16, "base_img_size_numel": 12**3, "spatial_dim": 3}
    even = torch.linspace(1000, 0, 31, dtype=torch.float64)
    torch.testing.assert_close(process.sampling_times(30), timestep_transform(even, **given))
    uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = timestep_transform(1000 * (1 - uniform), **given)
    torch.testing.assert_close(process.draw_times(uniform).double(), expected, rtol=1e-6, atol=1e-3)
    scheduler = RFlowScheduler(**transform)
    scheduler.set_timesteps(30, input_img_size_numel=24 * 32 * 16)  # to float16 there
    expected = scheduler.timesteps.double()
    torch.testing.assert_close(process.sampling_times(30)[:-1], expected, rtol=1e-3, atol=0)
    assert process.shift > 1.9 and NoiseProcess.from_config(RFLOW, [24, 32, 16]).shift == 1
    assert NoiseProcess.from_config(RFLOW | transform).shift == 1  # as this project once trained under it


IGNORED = [
    ("DDPM", {"clip_sample_max": 3.0}),
    ("DDPM", {"variance_type": "fixed_large"}),
    ("DDIM", {"set_alpha_to_one": False}),
    ("DDIM", {"steps_offset": 1}),
    ("PNDM", {"skip_prk_steps": False}),
    ("RFlow", {"use_discrete_timesteps": True}),
    ("RFlow", {"transform_scale": 2.0, "use_timestep_transform": True}),
    ("RFlow", {"scale": 1.4, "sample_method": "logit-normal"}),
]


@pytest.mark.parametrize("scheduler, option", IGNORED)
def test_an_option_of_a_scheduler_that_would_change_nothing_is_refused(scheduler, option):
    section = {"_target_": f"monai.networks.schedulers.{scheduler}Scheduler"}
    key = next(iter(option))
    with pytest.raises(UserError, match=rf"^NoiseScheduler\.{key}: .* would change nothing: .* leave it out"):
        resolve_timestep_sampling(section | option, "uniform")
    assert resolve_timestep_sampling(section, "uniform") == "uniform"


def test_an_option_of_a_scheduler_that_is_followed_is_taken():
    """NV-Generate's own, in which `scale` means nothing; and values of what is done anyway."""
    maisi = {"use_discrete_timesteps": False, "use_timestep_transform": True, "sample_method": "uniform"}
    assert resolve_timestep_sampling(RFLOW | maisi | {"scale": 1.4}, "uniform") == "uniform"
    assert resolve_timestep_sampling(RFLOW | {"sample_method": "logit-normal"}, "uniform") == "logit_normal"
    ddim = {"_target_": "monai.networks.schedulers.DDIMScheduler", "set_alpha_to_one": True}
    for clip in (True, False):
        assert resolve_timestep_sampling(ddim | {"clip_sample": clip}, "logit_normal") == "logit_normal"
    with pytest.raises(UserError, match=r"sample_method is uniform, diffusion_train\.timestep_sampling"):
        resolve_timestep_sampling(RFLOW | maisi, "logit_normal")
    with pytest.raises(UserError, match=r"base_img_size_numel: a number of voxels is above 0"):
        resolve_timestep_sampling(RFLOW | maisi | {"base_img_size_numel": 0}, "uniform")


@pytest.mark.parametrize(
    "schedule, left",
    [
        (
            {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 200},
            0.3636,
        ),
        ({"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}, None),
        ({"schedule": "rectified_flow"}, None),
    ],
)
def test_a_schedule_that_does_not_reach_noise_is_told(schedule, left, capsys):
    """Of betas from 1e-4 to 0.02 over 200 steps the product of 1 - beta is 0.1322."""
    section = configs.completed({"NoiseScheduler": schedule})["NoiseScheduler"]
    process = utils.make_noise_process(section, (4, 4, 4), None, Run(0, 1, torch.device("cpu")))
    printed = capsys.readouterr().out
    if left:
        assert process.signal_left == pytest.approx(left, abs=1e-4)
        assert "warning: NoiseScheduler: the last time still holds 36% of the signal" in printed
    else:
        assert process.signal_left < 0.1 and "warning" not in printed
