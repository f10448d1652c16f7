"""Terms of the autoencoder's loss by hand; perceptual weights come whole from a local file, or not at all."""

import contextlib
import copy
import os
import sys
import types
from unittest.mock import MagicMock

import chain
import pytest
import torch
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import UserError
from ldm.data.cases import Case
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.process import NoiseProcess
from ldm.losses import (
    AutoencoderLoss,
    PerceptualLoss,
    adversarial_loss,
    discriminator_loss,
    gradient_difference,
    kl_divergence,
    least_squares,
    unit_vectors,
)
from ldm.models import perceptual
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import NETWORKS, instantiate, resolve_references
from ldm.models.denoiser import predict
from ldm.system.ranks import Run
from ldm.training import autoencoder
from ldm.training.progress import EpochMeans
from ldm.training.step import make_ema

WITHOUT = r"or set autoencoder_train\.perceptual_weight to 0"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- KL and gradient difference


def test_kl_is_the_divergence_of_the_distributions():
    mean, std = 2 * numbers(3, 2, 4, 4, 4) - 1, 0.1 + numbers(3, 2, 4, 4, 4, seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum() / 3
    assert kl_divergence(mean, std) == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(torch.zeros(2, 5), torch.ones(2, 5)) == 0
    assert kl_divergence(torch.full((2, 5), 2.0), torch.ones(2, 5)) == pytest.approx(5 * 2)  # mean^2 / 2 each
    by_hand = pytest.approx((torch.e**2 - 3) / 2)
    assert kl_divergence(torch.zeros(1, 1), torch.full((1, 1), torch.e)) == by_hand
    assert torch.isfinite(kl_divergence(torch.zeros(1, 1), torch.zeros(1, 1)))


def test_gradient_difference_by_hand():
    image = numbers(2, 1, 3, 3, 3)
    assert gradient_difference(image + 0.7, image).abs() < 1e-6  # a constant has no edges
    bump = image.clone()
    bump[:, 0, 1, 1, 1] += 1
    # Along each axis 2 of 2 x 3 x 3 differences are 1.
    assert gradient_difference(bump, image) == pytest.approx(3 * 2 / 18, rel=1e-5)
    for axis in (2, 3, 4):
        slope = torch.arange(3.0).reshape([3 if a == axis else 1 for a in range(5)])
        assert gradient_difference(image - 0.5 * slope, image) == pytest.approx(0.5, rel=1e-5)


def test_the_adversarial_loss_is_monais():
    logits = (4 * numbers(2, 1, 3, 4, 5) - 2).requires_grad_()
    theirs = PatchAdversarialLoss(criterion="least_squares")
    for real in (True, False):
        expected = theirs(logits, target_is_real=real, for_discriminator=True)
        found = least_squares(logits, float(real))
        assert torch.equal(found, expected)
        pair = [torch.autograd.grad(one, logits)[0] for one in (found, expected)]
        assert torch.equal(*pair)


# ---- MedicalNet


@pytest.fixture(scope="module")
def medicalnet(tmp_path_factory):
    """Weights of a 3D ResNet-10 in a file like MedicalNet's, and the network itself."""
    torch.manual_seed(0)
    network = perceptual.medicalnet(10, None, "").eval()
    with torch.no_grad():  # statistics such as training leaves behind
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("weights") / "resnet_10.pth"
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, path)
    return path, network


def test_medicalnet(medicalnet):
    path, network = medicalnet
    loss = PerceptualLoss("medicalnet_resnet10", str(path))
    assert all(torch.equal(value, network.state_dict()[k]) for k, value in loss.network.state_dict().items())
    a, b = numbers(1, 1, 20, 20, 20), numbers(1, 1, 20, 20, 20, seed=1)
    distance = loss(a, b, seeded())
    assert loss(a, a, seeded()) == 0 and distance > 0
    assert distance == loss(a, b, seeded(1)) == loss(b, a, seeded())  # nothing of it is drawn
    assert loss(3 * a + 5, 3 * b + 5, seeded()) == pytest.approx(distance.item(), rel=1e-2)  # normalised
    pairs = loss(torch.cat([a, a]), torch.cat([b, a]), seeded())
    assert pairs == pytest.approx(distance.item() / 2, rel=1e-4)  # a mean over the batch
    channels = loss(torch.cat([a, a], 1), torch.cat([b, a], 1), seeded())
    assert channels == pytest.approx(distance.item() / 2, rel=1e-4)  # and over channels


def test_perceptual_network_is_frozen(medicalnet):
    loss = PerceptualLoss("medicalnet_resnet10", medicalnet[0])
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    a = numbers(1, 1, 16, 16, 16).requires_grad_()
    loss.train()(a, numbers(1, 1, 16, 16, 16, seed=1), seeded()).backward()
    assert a.grad.abs().max() > 0 and not any(p.requires_grad for p in loss.parameters())
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


# ---- LPIPS


class Fire(nn.Module):
    """SqueezeNet's block: a narrow layer, then two wide ones side by side."""

    def __init__(self, inside: int, narrow: int, wide: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inside, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


class SqueezeNet(nn.Module):
    """Layers of SqueezeNet 1.1 (Iandola et al., 2016) under the names of torchvision's."""

    def __init__(self, pretrained: bool = False):
        super().__init__()
        assert not pretrained, "this would be a download"
        pool = (nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3))
        self.features = nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), next(pool))
        self.features.extend([Fire(64, 16, 64), Fire(128, 16, 64), next(pool)])
        self.features.extend([Fire(128, 32, 128), Fire(256, 32, 128), next(pool)])
        self.features.extend([Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)])
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, 10, 1))


@pytest.fixture
def torchvision_stand_in(monkeypatch):
    """lpips imports torchvision, which has no build for every torch; it needs only the network of it."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lpips", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    package.models, models.squeezenet1_1 = models, SqueezeNet
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    pytest.importorskip("lpips", reason="the package lpips is not installed")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        del sys.modules[name]


@pytest.fixture
def squeezenet(tmp_path, torchvision_stand_in):
    """A file of weights as torchvision publishes them, and the weights."""
    torch.manual_seed(0)
    state = SqueezeNet().state_dict()
    torch.save(state, tmp_path / "squeezenet1_1.pth")
    return tmp_path / "squeezenet1_1.pth", state


def test_lpips_takes_its_trunk_from_the_file(squeezenet):
    path, state = squeezenet
    trunk = PerceptualLoss("squeeze", path).network.net.state_dict()
    features = {name: value for name, value in state.items() if name.startswith("features.")}
    assert len(trunk) == len(features) == 50  # 1 + 8 x 3 convolutions
    for name, value in trunk.items():
        assert torch.equal(value, features["features." + name.partition(".")[2]]), name


def test_lpips_compares_slices_of_three_planes(squeezenet):
    loss = PerceptualLoss("squeeze", squeezenet[0], slice_ratio=1.0)
    a, b = numbers(1, 1, 20, 24, 28), numbers(1, 1, 20, 24, 28, seed=1)
    expected = 0
    for axis in (2, 3, 4):
        pairs = [(a.select(axis, i), b.select(axis, i)) for i in range(a.shape[axis])]
        pairs = [[x.repeat(1, 3, 1, 1) for x in pair] for pair in pairs]
        # lpips's own arithmetic, and its own way from [0, 1] to the range that it was trained on
        expected += sum(loss.network(*pair, normalize=True).item() for pair in pairs) / len(pairs)
        assert loss.network(*pairs[0]) != pytest.approx(loss.network(*pairs[0], normalize=True), rel=0.05)
    assert expected > 0.01
    assert loss(a, b, seeded()) == pytest.approx(expected, rel=1e-4)
    assert loss(a, b, seeded(1)) == pytest.approx(expected, rel=1e-4)  # all slices, in whatever order
    assert loss(a, a, seeded()) == 0


def test_lpips_draws_its_slices_from_the_generator(squeezenet):
    loss, seen = PerceptualLoss("squeeze", squeezenet[0], slice_ratio=0.2), []
    loss.network.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    a, b = numbers(1, 1, 20, 24, 28), numbers(1, 1, 20, 24, 28, seed=1)
    first, again, other = (loss(a, b, seeded(seed)).item() for seed in (0, 0, 1))
    assert first == again != other
    assert seen[:6] == [4, 4, 4, 4, 5, 5]  # a fifth of 20, 24 and 28, of both volumes


@pytest.mark.parametrize("name", ["squeeze", "medicalnet_resnet10"])
def test_gradients_are_finite_where_features_are_zero(name, squeezenet, medicalnet):
    """The gradient of a norm is NaN at 0, where one even region or one dead network would end a training."""
    loss = PerceptualLoss(name, squeezenet[0] if name == "squeeze" else medicalnet[0])
    images = [numbers(1, 1, 20, 20, 20), torch.zeros(1, 1, 20, 20, 20)]
    for dead in (False, True):
        if dead:
            for parameter in (loss.network.net if name == "squeeze" else loss.network).parameters():
                parameter.zero_()
        for image in images:
            reconstruction = image.clone().requires_grad_()
            loss(reconstruction, images[0], seeded()).backward()
            assert reconstruction.grad.isfinite().all()
    features = torch.zeros(1, 3, 2, requires_grad=True)
    with torch.no_grad():
        features[0, :, 0] = torch.tensor([3.0, 0.0, 4.0])
    unit_vectors(features).sum().backward()
    assert unit_vectors(features)[0, :, 0].tolist() == pytest.approx([0.6, 0, 0.8])
    assert features.grad.isfinite().all()


def test_whole_lpips_file(squeezenet, tmp_path):
    model = PerceptualLoss("squeeze", squeezenet[0]).network
    with torch.no_grad():
        model.lin0.model[-1].weight.fill_(0.25)
    torch.save(model.state_dict(), tmp_path / "lpips.pth")
    other = PerceptualLoss("squeeze", tmp_path / "lpips.pth").network
    assert all(torch.equal(value, model.state_dict()[k]) for k, value in other.state_dict().items())


def test_the_held_out_loss_compares_the_same_slices_each_time(squeezenet):
    """Drawn by case, not by its place in the list; so that a validation differs by its weights alone."""
    section = {"recon_loss": "l2", "gradient_weight": 0.5, "kl_weight": 1.0, "background_weight": 1.0}
    section |= {"perceptual_weight": 2.0, "perceptual_network": "squeeze", "perceptual_slice_ratio": 0.1}
    criterion, images = AutoencoderLoss(section, squeezenet[0]), numbers(2, 1, 20, 20, 20)
    encoder, found = nn.Module(), []
    encoder.reconstruct = lambda image: image.sqrt()
    for order in ([0, 1], [0, 1], [1, 0]):
        held_out = MagicMock(cases=[Case(str(i), ()) for i in order], seed=0)
        held_out.__len__ = lambda self: 2
        held_out.__getitem__ = lambda self, key, order=order: {"image": images[order[key[1]]]}
        scores, _ = autoencoder.validate(encoder, criterion, held_out, Run(0, 1, torch.device("cpu")))
        found.append(scores)
    assert found[0] == found[1] and found[0]["perceptual_loss"] > 0
    assert found[2]["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
    weighted = found[0]["recon_loss"] + 0.5 * found[0]["gradient_loss"] + 2 * found[0]["perceptual_loss"]
    assert found[0]["loss"] == pytest.approx(weighted, rel=1e-5) and "kl_loss" not in found[0]


# ---- what a GPU would be waited for


class Waits(TorchDispatchMode):
    """Notes copies from the CPU to the device that are waited for. The device is torch's meta, which gives no
    value back: reading one raises."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            waited = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if waited and source.device.type == "cpu" and made.device.type == "meta":
                self.found.append(func)
        return made


class OnMeta(Run):
    def autocast(self):
        return contextlib.nullcontext()


def test_a_step_copies_nothing_that_is_waited_for(squeezenet):
    """Both stages' losses, sums and averages. What kernels do inside is seen by tests/test_gpu.py only."""
    section = {"recon_loss": "l1", "gradient_weight": 1.0, "kl_weight": 1e-6, "adversarial_weight": 0.1}
    section |= {
        "background_weight": 1.0,
        "perceptual_weight": 1.0,
        "perceptual_network": "squeeze",
        "perceptual_slice_ratio": 0.2,
    }
    config, run, meta = copy.deepcopy(chain.CONFIG), OnMeta(0, 1, torch.device("meta")), {"device": "meta"}
    config |= {"image_channels": 1, "latent_channels": 3}
    config = resolve_references(config, config, "config")
    encoder = Autoencoder(instantiate(config["autoencoder_def"], NETWORKS, "here")).to("meta")
    unet = instantiate(config["diffusion_def"], NETWORKS, "here").to("meta")
    discriminator = PatchDiscriminator(spatial_dims=3, channels=4, in_channels=1, num_layers_d=1).to("meta")
    criterion = AutoencoderLoss(section, squeezenet[0]).to("meta")
    average, skip = make_ema(encoder, 0.9), torch.zeros((), dtype=torch.float64, device="meta")
    process = NoiseProcess(torch.linspace(0.99, 0.01, 100), "epsilon", 100)
    process.levels(torch.zeros(1, **meta))  # the one copy of the schedule
    means, t = EpochMeans({"loss": torch.zeros(2).double()}), torch.ones(2)
    z = torch.empty(2, 3, 8, 8, 8, **meta)
    with Waits() as waits:
        torch.zeros(1).to("meta")
    assert len(waits.found) == 1  # such a copy is seen
    with Waits() as waits:
        images, eps = torch.empty(2, 1, 20, 24, 28, **meta), torch.empty(2, 3, 10, 12, 14, **meta)
        with run.autocast():
            reconstruction, mean, std = encoder(images, eps)
            terms = criterion(images, reconstruction, mean, std, seeded())
            terms["adversarial_loss"] = adversarial_loss(discriminator, reconstruction)
            (terms["loss"] + terms["adversarial_loss"]).backward()
            terms["discriminator_loss"] = discriminator_loss(discriminator, reconstruction, images)
            terms["discriminator_loss"].backward()
        means.add(terms)
        average.update(encoder, skip)
        t = t.to("meta", non_blocking=True)
        prediction = predict(unet, process.add_noise(z, z, t), t, {})
        means.add({"loss": diffusion_loss(process, prediction, z, z, t, 5.0)})
    assert not waits.found


# ---- files and packages that are no good


def test_no_weights_named():
    for network, source in (("squeeze", "torchvision's squeeze"), ("medicalnet_resnet50", "MedicalNet's")):
        for weights in (None, ""):
            with pytest.raises(UserError, match=f'Save {source} .*"perceptual_weights".*{WITHOUT}'):
                PerceptualLoss(network, weights)


def refused(network: str, path, words: str = "") -> None:
    with pytest.raises(UserError, match=rf"perceptual_weights: .*{path.stem}\.pth.*{words}.*{WITHOUT}"):
        PerceptualLoss(network, path)


BAD = [[1, 2], {}, {"state_dict": 3}, {"a": {"b": 1}}, "cut", "missing", "less", "more", "another"]


@pytest.mark.parametrize("content", BAD)
def test_file_that_does_not_hold_the_weights(medicalnet, tmp_path, content):
    path, words = tmp_path / "bad.pth", ""
    state = {name: torch.zeros_like(value) for name, value in medicalnet[1].state_dict().items()}
    if content == "less":
        content, words = state, r"\(layer2\.0\.conv1\.weight\)"
        del state["layer2.0.conv1.weight"]
    elif content == "more":
        content, words = state | {"conv_seg.0.weight": torch.zeros(1)}, r"\(conv_seg\.0\.weight\)"
    elif content == "another":
        content, words = {"features.0.weight": torch.zeros(1)}, r"\(bn1\.bias\)"
    if content == "cut":
        path.write_bytes(medicalnet[0].read_bytes()[:100_000])
    elif content != "missing":
        torch.save(content, path)
    refused("medicalnet_resnet10", path, words)


def test_weights_of_another_trunk(squeezenet, tmp_path):
    state = {name: value for name, value in squeezenet[1].items() if name != "features.9.squeeze.bias"}
    torch.save(state, tmp_path / "bad.pth")
    refused("squeeze", tmp_path / "bad.pth", r"1 missing \(slice4\.9\.squeeze\.bias\)")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("network", ["medicalnet_resnet10", "squeeze"])
def test_file_with_code_runs_none_of_it(tmp_path, network):
    torch.save({"state_dict": Trap(tmp_path / "trace")}, tmp_path / "bad.pth")
    refused(network, tmp_path / "bad.pth")
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "trace").exists()  # the trap works


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])  # the latter of another torchvision
def test_lpips_that_cannot_be_imported(tmp_path, monkeypatch, error):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "squeezenet1_1.pth")
    (tmp_path / "lpips.py").write_text(f"raise {error}('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"packages lpips and torchvision.*pip install lpips.*{WITHOUT}"):
        PerceptualLoss("squeeze", tmp_path / "squeezenet1_1.pth")
