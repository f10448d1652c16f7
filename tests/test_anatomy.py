"""The distance that sees gross anatomy: its features by hand, and joined halves of scans, which texture
measures pass."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.data.layouts import find_cases
from ldm.data.preprocessing import Preprocessing, crop_or_pad
from ldm.evaluation import anatomy, verdicts
from ldm.evaluation.anatomy import AnatomySpace, SmoothedVolumes, all_scales
from ldm.evaluation.distances import LEVEL, KernelDistance, distance_kernel
from ldm.evaluation.features import ANATOMY
from ldm.evaluation.groups import JOINED, Comparison, DegradedScans, VolumeGroup, joined_halves
from ldm.evaluation.table import Metric, anatomy_metrics, appearance_metrics
from ldm.metrics import RadialSpectrum

torch.set_num_threads(1)


def test_smoothed_volumes_are_gaussian_filtered_at_any_spacing():
    """A blob of variance a^2, smoothed by s, is one of variance a^2 + s^2 and lower by (a / sqrt(a^2 +
    s^2))^3, wherever its centre is."""
    wide, centre = 10.0, (3.0, -5.0, 2.0)
    for size, spacing in (((24, 24, 24), (4.0, 4.0, 4.0)), ((48, 32, 40), (2.0, 3.0, 2.4))):
        grids = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, spacing, strict=True)]
        squares = sum((x - c) ** 2 for x, c in zip(np.meshgrid(*grids, indexing="ij"), centre, strict=True))
        volume = torch.tensor(np.exp(-squares / (2 * wide**2)), dtype=torch.float32)[None, None]
        rows = SmoothedVolumes(spacing)(volume)
        for row, scale in zip(rows, anatomy.SCALES, strict=True):
            count = math.ceil(96 / scale)
            points = (np.arange(count) - (count - 1) / 2) * scale
            squares = sum(
                (x - c) ** 2 for x, c in zip(np.meshgrid(*[points] * 3, indexing="ij"), centre, strict=True)
            )
            variance = wide**2 + scale**2
            expected = (wide**2 / variance) ** 1.5 * np.exp(-squares / (2 * variance))
            assert row.numpy() == pytest.approx(expected.ravel(), abs=2e-3)


def test_coordinates_along_axes_by_hand():
    """Of four scans with variances 6, 2/3 and 0 along their axes."""
    real = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]]) + 5
    (found,) = AnatomySpace([real])([torch.tensor([[6.5, 4.5, 5.0]])])
    scales = np.sqrt(np.array([6, 2 / 3]) + anatomy.SHRINKAGE * 20 / 9)
    assert found[0, :2].abs().numpy() == pytest.approx(np.array([1.5, 0.5]) / scales / math.sqrt(3))
    first, second = torch.ones(2, 3), torch.full((2, 1), 2.0)
    assert all_scales([first, second]).square().sum(1).tolist() == pytest.approx([3.5, 3.5])


def test_residuals_are_compared_with_those_of_scans_left_out():
    """Rows of 60 independent numbers: the residual of a scan that is left out and of a fresh one are alike,
    and that of one twice as far from the mean is as many standard deviations higher."""
    rows = torch.randn(43, 60, generator=torch.Generator().manual_seed(0)).double()
    for i in (0, 5):  # the distance from the span of the others by least squares
        others = rows[[j for j in range(13) if j != i]]
        basis = (others[1:] - others[0]).T
        target = (rows[i] - others[0])[:, None]
        rest = target - basis @ torch.linalg.lstsq(basis, target).solution
        residuals = anatomy._leave_one_out(rows[:13] - rows[:13].mean(0))
        assert float(residuals[i]) == pytest.approx(float(rest.norm()), rel=1e-5)
    axes = anatomy._Axes(rows[:13])
    near, far = (axes(x)[:, -1] * 12**0.5 for x in (rows[13:], 2 * rows[13:]))
    assert abs(float(near.mean())) < 1.5
    shift = anatomy.RESIDUAL_WEIGHT**0.5 * float(axes.typical / axes.spread)
    assert float((far - near).mean()) == pytest.approx(shift, rel=0.15)


def test_equal_scans_give_finite_rows():
    (found,) = AnatomySpace([torch.ones(5, 7)])([torch.stack([torch.ones(7), torch.arange(7.0)])])
    assert found.isfinite().all() and float(found[1].norm()) > 1e3


def test_the_energy_distance_by_hand():
    """Of {0, 3} and {1, 5}: 2 (1 + 5 + 2 + 2) / 4 - 3 - 4."""
    first, second = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [5.0]])
    assert KernelDistance(first, second, distance_kernel).value == pytest.approx(5 - 3 - 4)
    # Of two normal distributions |x - y| has the mean 2 phi(d/2^.5) * 2^.5 + d (2 Phi(d/2^.5) - 1), d apart.
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 1500, 1, generator=draw).double()
    apart = 1.0
    z = apart / math.sqrt(2)
    density, below = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), 0.5 * (1 + math.erf(z / math.sqrt(2)))
    expected = 2 * (2 * math.sqrt(2) * density + apart * (2 * below - 1)) - 2 * 2 / math.sqrt(math.pi)
    assert KernelDistance(rows[0] + apart, rows[1], distance_kernel).value == pytest.approx(
        expected, abs=0.05
    )


def test_halves_of_two_volumes_are_joined_at_the_middle():
    left, right = torch.zeros(1, 1, 5, 2, 2), torch.ones(1, 1, 5, 2, 2)
    assert joined_halves(left, right)[0, 0, :, 0, 0].tolist() == [0, 0, 1, 1, 1]
    degraded = DegradedScans({"plain": lambda volume: [volume.flatten()]}, None)
    for value in (0.0, 0.25, 0.5):
        degraded.add(torch.full((1, 1, 4, 2, 2), value))
    joined = [row[0].reshape(4, 2, 2)[:, 0, 0].tolist() for row in degraded.features[JOINED]["plain"]]
    assert joined == [[0, 0, 0.25, 0.25], [0.25, 0.25, 0.5, 0.5]]


# ---------------------------------------------------------------- the metric

SPACING, SIZE = (4.0, 4.0, 4.0), (40, 48, 40)


def group_of(name: str, volumes, subjects=None) -> VolumeGroup:
    networks = {ANATOMY: SmoothedVolumes(SPACING)}
    one = VolumeGroup(name, networks, RadialSpectrum(volumes[0].shape[2:]), SPACING, len(volumes))
    for i, volume in enumerate(volumes):
        one.add(f"{name}_{i}", volume, subjects and subjects[i])
    return one


def compared(held_out, samples, training, subjects=None) -> Comparison:
    """The groups, with the degraded scans that evaluate.py adds."""
    degraded = DegradedScans({ANATOMY: SmoothedVolumes(SPACING)}, None)
    for volume in training[:32]:
        degraded.add(volume)
    groups = [group_of("held-out", held_out), group_of("generated", samples)]
    return Comparison(*groups, group_of("training", training, subjects), degraded)


@pytest.fixture(scope="module")
def brains(shared_data) -> list[torch.Tensor]:
    cases = sorted(find_cases(shared_data / "t1_brain_2mm")[0], key=lambda case: case.name)
    read = Preprocessing((0,), SPACING)
    return [torch.from_numpy(crop_or_pad(read(case.images), SIZE))[None].clamp(0, 1) for case in cases]


def test_joined_halves_of_real_brains_are_seen_and_pass_for_texture(brains):
    held_out, training = brains[:12], brains[12:]
    wrong = [joined_halves(training[i], training[(i + 3) % 12]) for i in range(12)]
    groups, found = compared(held_out, training[:12], training), {}
    for name in ("real", "joined"):
        found[name] = {one.key: one for one in (*anatomy_metrics(groups), *appearance_metrics(groups))}
        groups = replace(groups, generated=group_of("generated", wrong))
    real, joined = found["real"][ANATOMY], found["joined"][ANATOMY]
    assert real.value == pytest.approx(real.floor) and real.p_value > LEVEL  # they are the reference
    assert joined.floor == real.floor and joined.value > 0.1 > abs(real.value) and joined.p_value < LEVEL
    scale = found["joined"][f"{ANATOMY}: {JOINED}"]
    assert joined.value == pytest.approx(scale.value, rel=0.5) and scale.counts == "11 real, 12 held-out"
    assert found["joined"]["fine_power"].difference[0] < 0 < found["joined"]["fine_power"].difference[1]
    assert found["joined"]["histogram"].difference[0] < 0


def random_volumes(count: int, seed: int) -> list[torch.Tensor]:
    return [*torch.rand(count, 1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))]


def test_axes_are_those_of_subjects_that_are_not_compared():
    """Of six training subjects with two scans each: three are the reference, three determine the axes."""
    subjects = [f"s{i // 2}" for i in range(12)]
    groups = compared(*(random_volumes(n, n) for n in (5, 4, 12)), subjects)
    sides, others = groups.independent
    assert sides["reference"][1] == [0, 2, 4] and others == [6, 8, 10]
    assert [len(indices) for _, indices in sides.values()] == [3, 3, 3]
    (metric,) = anatomy_metrics(groups)
    assert metric.value is None and "4 training scans beside them" in metric.missing
    groups = compared(*(random_volumes(n, n) for n in (5, 4, 12)))
    metrics = {metric.key: metric for metric in anatomy_metrics(groups)}
    assert all(math.isfinite(metric.value) for metric in metrics.values())
    assert metrics[ANATOMY].counts.startswith(
        "4 on each side, axes of 8 other scans; in the test 4 generated"
    )
    assert metrics[f"{ANATOMY}: {JOINED}"].counts == "3 real, 4 held-out"
    groups.training = None
    (metric,) = anatomy_metrics(groups)
    assert "no training scans" in metric.missing


@pytest.mark.parametrize(
    "p, value, upper, tone, part",
    [
        (0.01, 0.5, 1.0, "warn", "p = 0.01): their distance is 0.5 times that of halves of two scans joined"),
        (0.01, 3.0, 4.0, "bad", "3 times that of"),
        (0.2, 0.1, 0.8, "good", "smaller than that of halves of two scans joined"),
        (0.2, 0.1, 1.2, "none", "volumes are too few to see halves of two scans joined"),
    ],
)
def test_anatomy_in_words(p, value, upper, tone, part):
    metric = Metric(ANATOMY, "", "", value=value, floor=0.0, difference=[-0.5, upper], p_value=p)
    found = {ANATOMY: metric, f"{ANATOMY}: {JOINED}": Metric("", "", "", value=1.0)}
    assert verdicts.structure(found)[0] == tone and part in verdicts.structure(found)[1]
    metric.missing = "no training scans"
    assert verdicts.structure(found) == ("none", "Gross anatomy was not compared: no training scans.")
