"""Distances of sets of feature rows, and the features themselves, against numbers known by hand."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from chain import rows_of
from monai.metrics import FIDMetric
from monai.networks.nets import AutoencoderKL
from torch import nn

from ldm import UserError
from ldm.evaluation import distances, features
from ldm.evaluation.distances import KernelDistance, frechet_distance, interval
from ldm.evaluation.features import AutoencoderFeatures, FeatureSpace
from ldm.models import perceptual
from ldm.models.autoencoder import Autoencoder
from ldm.system.files import sha256_of

torch.set_num_threads(1)  # faster than several on data this small


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Identity(nn.Module):
    """An autoencoder that encodes to its input, with one block."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.encoder = nn.Module()
        self.encoder.blocks = nn.ModuleList([nn.Identity()])

    def encode(self, x):
        return self.encoder.blocks[0](x), torch.ones_like(x)


def test_pooled_means_and_deviations_of_cells():
    activation = torch.zeros(1, 1, 4, 4, 4)
    activation[..., :2, :2, :2] = 3.0
    activation[..., 2:, 2:, 3] = 2.0  # half of the last cell
    expected = [3, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert features._pooled(activation)[0].tolist() == pytest.approx(expected, abs=1e-3)
    groups = rows_of(AutoencoderFeatures(Autoencoder(Identity())), activation)
    assert [group[0].tolist() for group in groups] == [pytest.approx(expected, abs=1e-3)] * 2


def test_distance_by_hand():
    """Of two and two numbers: the kernel is (x y + 1)^3, and no row is paired with itself."""
    first, second = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [-1.0]])
    across = ((0 * 2 + 1) ** 3 + (0 * -1 + 1) ** 3 + (1 * 2 + 1) ** 3 + (1 * -1 + 1) ** 3) / 4
    expected = (0 * 1 + 1) ** 3 + (2 * -1 + 1) ** 3 - 2 * across
    assert KernelDistance(first, second).value == pytest.approx(expected)


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return KernelDistance(first, second).value


def drawn_kernel(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    return KernelDistance(first, second).bootstrap(2000)


def drawn_frechet(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    return distances.bootstrap(frechet_distance, first, second=second)[0]


@pytest.mark.parametrize(
    "distance, draw, bias, error",
    [(kernel_distance, drawn_kernel, 0.1, 0.5), (frechet_distance, drawn_frechet, 1e-6, 0.4)],
)
def test_a_bootstrap_has_no_bias_and_the_spread_of_sets_drawn_anew(distance, draw, bias, error):
    def sets(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return numbers(40, 5, seed=seed).double(), numbers(40, 5, seed=seed + 1).double() + 0.5

    drawn, value = draw(*sets(0)), distance(*sets(0))
    assert drawn.mean() == pytest.approx(value, abs=bias * drawn.std())
    fresh = [distance(*sets(i)) for i in range(100, 500, 2)]
    assert drawn.std() == pytest.approx(statistics.stdev(fresh), rel=error)
    low, high = interval(drawn)
    assert low < value < high


def test_a_permutation_test_by_all_splits():
    """The p-value is the share of all splits into 4 and 5 whose distance is as large."""
    rows = torch.cat([numbers(4, 3) + 0.8, numbers(5, 3, seed=1)]).double()
    splits = []
    for chosen in itertools.combinations(range(9), 4):
        others = [i for i in range(9) if i not in chosen]
        splits.append(KernelDistance(rows[list(chosen)], rows[others]).value)
    expected = np.mean(np.array(splits) >= splits[0] - 1e-9)
    assert 0.02 < expected < 0.5
    kernel = distances.polynomial_kernel(rows).numpy()[None]
    (found,) = distances.permutation_p_values(kernel, 4, 20000)
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20000))
    far = KernelDistance(rows[:4] + 100, rows[4:])
    assert 0.001 <= far.p_value() == pytest.approx(1 / 126, abs=0.01)  # never less than the splits allow


def test_the_least_shift_that_the_permutation_test_sees():
    """On a line a bit more rows than a t-test needs: 64 and 64 for 0.5, 17 and 17 for 1 (Cohen, 1988)."""
    line = numbers(300, 1).double()
    seen = [distances.detectable_shift(line, n, n) for n in (2, 12, 30, 90)]
    assert seen[0] is None and seen[1] == 1.5 and seen[2] == 1.0 and seen[3] == 0.5
    many = numbers(300, 12).double()
    assert distances.detectable_shift(many, 30, 30) == 0.5  # of features that vary by themselves: sooner


def test_an_interval_of_a_difference_is_students():
    draws = distances.bootstrap_mean(numbers(200).numpy(), 4000)
    low, high = distances.t_interval(draws, 7.0, 5)
    plain = interval(draws)
    assert (low + high) / 2 == pytest.approx(7, abs=0.02)
    assert (high - low) / (plain[1] - plain[0]) == pytest.approx(2.776 / 1.960 * math.sqrt(5 / 4), rel=1e-3)
    assert distances.t_interval(draws, 7.0, 1) is None


def test_intervals_of_shares():
    """Newcombe's (1998) example of method 10: 56 of 70 and 48 of 80; and none of ten, which is not none."""
    first, second = np.repeat([1.0, 0.0], [56, 14]), np.repeat([1.0, 0.0], [48, 32])
    assert distances.share_difference(first, second) == pytest.approx([0.0524, 0.3339], abs=1e-4)
    assert distances.share_interval(np.zeros(10)) == pytest.approx([0, 0.2775], abs=1e-4)


def brains(count: int, seed: int) -> torch.Tensor:
    """Textured ellipsoids of random sizes, (count, 1, 16, 16, 16)."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij")
    radii = rng.uniform(0.7, 0.9, (count, 3))
    inside = [sum((axis / r) ** 2 for axis, r in zip(axes, radius, strict=True)) < 1 for radius in radii]
    return torch.tensor(np.stack(inside)[:, None] * rng.uniform(0.3, 1, (count, 1, 16, 16, 16))).float()


def test_own_feature_distance_of_the_same_of_blurred_and_of_noise():
    """Two halves of one set do not differ; blur moves away with every pass; noise is far away."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        3, 1, 1, 1, (8, 8), (False, False), 3, 4,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    network = AutoencoderFeatures(Autoencoder(autoencoder))
    whole = FeatureSpace(rows_of(network, brains(40, 0)))

    def space(volumes):
        return whole(rows_of(network, volumes))

    real = space(brains(40, 1))
    assert real.square().mean().item() == pytest.approx(1, rel=0.3)
    halves = KernelDistance(space(brains(40, 2)), real)
    low, high = interval(halves.bootstrap())
    assert low < 0 < high
    blurred, distances = brains(40, 2), [halves.value]
    for _ in range(3):
        blurred = nn.functional.avg_pool3d(blurred, 3, 1, 1, count_include_pad=False)
        distances.append(KernelDistance(space(blurred), real).value)
    assert distances == sorted(distances) and distances[1] > 10 * abs(halves.value)
    noise = KernelDistance(space(torch.rand(40, 1, 16, 16, 16)), real)
    assert interval(noise.bootstrap())[0] > 100 * high


# ---------------------------------------------------------------- Fréchet distance


def test_frechet_distance_by_hand():
    """On a line: (m1 - m2)^2 + (s1 - s2)^2, s by N - 1."""
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])
    s1, s2 = math.sqrt(2), math.sqrt(8)
    assert frechet_distance(first, second) == pytest.approx(11**2 + (s1 - s2) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_monais_and_that_of_moments():
    first = numbers(60, 6) * torch.arange(1.0, 7)
    second = numbers(50, 6, seed=1) @ numbers(6, 6, seed=2) + 0.3
    expected = float(FIDMetric()(first.double(), second.double()))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    parts = [distances.Moments() for _ in range(2)]
    for part, rows in zip(parts, (first, second), strict=True):
        part.add(rows[:7])
        part.add(rows[7:])
    assert distances.frechet_of_moments(*parts) == pytest.approx(expected, rel=1e-6)
    assert distances.frechet_of_moments(parts[1], parts[1]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_rows_than_features():
    """Rows in a plane of a larger space: what it is there."""
    first, second = numbers(10, 2), 2 * numbers(9, 2, seed=1) + 1
    basis = torch.linalg.qr(numbers(40, 2, seed=2)).Q.T
    expected = frechet_distance(first, second)
    assert frechet_distance(first @ basis, second @ basis) == pytest.approx(expected, rel=1e-5)


def test_principal_axes_hold_what_varies_most():
    rows = numbers(50, 5) * torch.tensor([0.1, 3.0, 0.1, 2.0, 0.1]) + 7
    axes = distances.PrincipalAxes(rows, 2)
    assert axes(rows).shape == (50, 2) and axes(rows).mean(0).abs().max() < 1e-4
    assert axes(rows).square().sum() / (rows - rows.mean(0)).square().sum() > 0.97
    assert axes(rows + torch.tensor([0, 1.0, 0, 0, 0]))[:, 0].sub(axes(rows)[:, 0]).abs().min() > 0.98


# ---------------------------------------------------------------- precision and recall


def test_precision_and_recall_by_hand():
    """On a line with one neighbour: real at 0, 1, 2 have radius 1 each; generated at 2.5 and 3.5 too, 9 has
    5.5."""
    real, made = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.5], [3.5], [9.0]])
    precise, recalled = distances.precision_recall(real, made, 1)
    assert precise.tolist() == [1, 0, 0]
    assert recalled.tolist() == [0, 0, 1]  # 2 lies within 1 of 2.5; 0 and 1 lie farther than 5.5 from 9
    same = distances.precision_recall(real, real, 1)
    assert same[0].tolist() == same[1].tolist() == [1, 1, 1]


def test_precision_falls_with_noise_and_recall_with_collapse():
    real = numbers(100, 4)
    precise, recalled = (x.mean() for x in distances.precision_recall(real, numbers(100, 4, seed=1)))
    assert precise > 0.6 and recalled > 0.6
    assert distances.precision_recall(real, 5 * numbers(100, 4, seed=1))[0].mean() < 0.3
    assert distances.precision_recall(real, 0.05 * numbers(100, 4, seed=1))[1].mean() < 0.1


# ---------------------------------------------------------------- inception score


def test_inception_score():
    sure = torch.eye(4).repeat(5, 1)
    assert distances.inception_score(sure) == pytest.approx(4, rel=1e-6)
    assert distances.inception_score(torch.full((7, 4), 0.25)) == pytest.approx(1)
    assert distances.inception_score(sure[:1].repeat(9, 1)) == pytest.approx(1)
    half = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distances.inception_score(half) == pytest.approx(expected)


def test_bootstrap_of_a_mean():
    values = numbers(200).numpy() + 3
    drawn = distances.bootstrap_mean(values, 4000)
    assert drawn.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.1)
    low, high = interval(drawn)
    assert low < values.mean() < high and high - low == pytest.approx(3.92 * drawn.std(), rel=0.1)


# ---------------------------------------------------------------- published networks


def saved(network: nn.Module, path, prefix: str = "") -> dict:
    """Weights with statistics such as training leaves behind, in a file like the published ones."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state} if prefix else state, path)
    return network.state_dict()


def test_medicalnet_has_the_strides_and_dilations_it_was_trained_with(tmp_path):
    """Down by 8, the last two layers dilated by 2 and 4 (Chen et al., 2019, in their code)."""
    torch.manual_seed(0)
    network = perceptual.medicalnet(10, None, "").eval()
    with torch.no_grad():
        assert perceptual.trunk(network, torch.zeros(1, 1, 40, 32, 24)).shape == (1, 512, 5, 4, 3)
    for layer, dilation in ((network.layer1, 1), (network.layer3, 2), (network.layer4, 4)):
        convolutions = [m for m in layer.modules() if getattr(m, "kernel_size", 0) == (3, 3, 3)]
        assert {m.dilation for m in convolutions} == {(dilation,) * 3}
    path = tmp_path / "resnet_10_23dataset.pth"
    saved(network, path, "module.")
    state, digest = perceptual.read_weights(path, None)
    assert perceptual.medicalnet_depth(state, "") == 10
    assert perceptual.read_weights(path, digest[:8].upper())[1] == digest == sha256_of(path)
    with pytest.raises(UserError, match="SHA-256"):
        perceptual.read_weights(path, "0" * 64)
    volume = numbers(1, 1, 24, 24, 24)
    (row,) = features.MedicalNetFeatures(10, state, "", torch.device("cpu"))(volume)
    (again,) = features.MedicalNetFeatures(10, state, "", torch.device("cpu"))(5 * volume + 3)
    assert row.shape == (512,) and torch.allclose(row, again, atol=1e-4)  # units do not matter
    with torch.no_grad():
        expected = perceptual.trunk(network, (volume - volume.mean()) / volume.std()).mean((2, 3, 4))[0]
    assert torch.allclose(row.float(), expected, atol=1e-4)


def test_radimagenet_as_keras_has_it(tmp_path):
    """Convolutions with a bias, strides at the first of a block; slices scaled by the volume, less the
    means."""
    torch.manual_seed(0)
    network = perceptual.radimagenet(None, "").eval()
    assert network.layer2[0].conv1.stride == (2, 2) and network.layer2[0].conv2.stride == (1, 1)
    assert network.conv1.bias is not None and network.bn1.eps == 1.001e-5
    state = saved(network, tmp_path / "RadImageNet-ResNet50_notop.pth")
    volume = numbers(1, 1, 33, 40, 36).abs()
    rows = features.RadImageNetFeatures(state, "", torch.device("cpu"))(volume)
    assert [row.shape for row in rows] == [(33, 2048), (40, 2048), (36, 2048)]
    axial = (volume[0, 0, :, :, 7] - volume.min()) / (volume.max() - volume.min())
    image = torch.stack([axial - 0.406, axial - 0.456, axial - 0.485])[None]
    with torch.no_grad():
        expected = perceptual.trunk(network, image).mean((2, 3))[0]
    assert torch.allclose(rows[2][7].float(), expected, atol=1e-4)
    with pytest.raises(UserError, match="MedicalNet"):
        perceptual.medicalnet_depth({"fc.weight": torch.zeros(1)}, "file.pth")
