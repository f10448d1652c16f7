"""Volumes decoded and encoded in slabs are those of the whole network, to rounding, in the memory given."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys

import chain
import numpy as np
import pytest
import torch
from chain import ROOT, copy_of
from torch import nn

import cache_latents
import inference
from ldm import UserError, generation
from ldm.lowmem import slabs, slabwise
from ldm.lowmem.lazy import LazyVolume, leaf
from ldm.lowmem.slabs import CopyQueue, HostRows, Rows, Sweep
from ldm.lowmem.slabwise import Budget, decode_within, encode_within
from ldm.models.definitions import NETWORKS, instantiate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:generative")

MONAI, GENERATIVE = "monai.networks.nets.AutoencoderKL", "generative.networks.nets.AutoencoderKL"
MAISI = "monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi"
KL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 2, "num_res_blocks": [1, 1]}
KL |= {"norm_num_groups": 4, "attention_levels": [False, False]}
KL |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
ATTENTION = {"attention_levels": [False, True]}
ATTENTION |= {"with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True}
TWO = KL | {"_target_": MONAI, "channels": [4, 8]}
DEEP = {"channels": [4, 8, 8], "num_res_blocks": [2, 1, 2], "attention_levels": [False] * 3}
VQVAE = {"_target_": "monai.networks.nets.VQVAE", "spatial_dims": 3, "in_channels": 1, "out_channels": 1}
VQVAE |= {"channels": [4, 8], "num_res_channels": [4, 8], "num_res_layers": 2, "embedding_dim": 4}
VQVAE |= {"downsample_parameters": [[2, 4, 1, 1], [2, 3, 1, 1]], "output_act": "tanh"}
VQVAE |= {"upsample_parameters": [[2, 4, 1, 1, 0], [2, 3, 1, 1, 1]]}
FSQ = {key: value for key, value in TWO.items() if key != "latent_channels"}
FSQ |= {"_target_": "ldm.models.FSQ", "channel_levels": [5, 4]}
OTHER = KL | ATTENTION | {"num_channels": [4, 8]}
DEFINITIONS = {
    "two levels": TWO,
    "three levels": TWO | DEEP,
    "transposed": TWO | {"use_convtranspose": True, "use_checkpoint": True},
    "attention": TWO | ATTENTION,
    "generative": OTHER | {"_target_": GENERATIVE},
    "VQVAE": VQVAE,
    "FSQ": FSQ,
    "MAISI": OTHER | {"_target_": MAISI, "num_splits": 2, "norm_float16": False},
}

DOUBLE = torch.float64, 1e-12


def build(definition: dict, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A network whose every parameter is drawn, those too that start at zero or one."""
    network = instantiate(definition, NETWORKS, "here").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.to(dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 1 + torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def force(monkeypatch, place: str, thickness: int) -> list[int]:
    """Let every sweep have slabs of so many rows, and keep them in this place; the list counts the slabs."""
    monkeypatch.setattr(slabwise, "_plain_peak", lambda *_: math.inf)
    monkeypatch.setattr(slabwise, "_least", lambda *_: 0)
    monkeypatch.setattr(slabwise._Run, "thickness", lambda *_: thickness)
    monkeypatch.setattr(slabs, "CHUNK", 2000)

    def rows(run, node, sweep):
        if place == "nowhere" or node.rows is not None:
            return None
        if place == "device":
            return Rows(run.device)
        return HostRows(run.device, CopyQueue(run.device), CopyQueue(run.device))

    monkeypatch.setattr(slabwise._Run, "place", rows)
    counted, plain = [], Sweep.slabs

    def slabs_of(self, thickness):
        for rows in plain(self, thickness):
            counted.append(rows[1] - rows[0])
            yield rows

    monkeypatch.setattr(Sweep, "slabs", slabs_of)
    return counted


def assert_close(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Same shape and dtype, and no voxel further apart than this share of the range."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    apart, span = (found.double() - expected.double()).abs().max(), (expected.max() - expected.min()).double()
    assert apart <= share * span, apart / span


# ---------------------------------------------------------------- the same volume


@pytest.mark.parametrize("place, thickness", [("device", 3), ("host", 2), ("nowhere", 5)])
@pytest.mark.parametrize("name", DEFINITIONS)
@torch.inference_mode()
def test_slabs_give_the_volume_of_the_whole_network(monkeypatch, name, place, thickness):
    dtype, share = (torch.float32, 1e-5) if place == "device" else DOUBLE
    dtype = torch.float64 if name in ("VQVAE", "FSQ") else dtype  # rounding can choose another code
    autoencoder = build(DEFINITIONS[name], dtype)
    images = numbers(2 if place == "device" else 1, 1, 20, 12, 8, dtype=dtype)
    expected = autoencoder.encode(images)
    expected = expected if isinstance(expected, tuple) else (expected,)
    volumes = autoencoder.decode(expected[0])
    counted = force(monkeypatch, place, thickness)
    found = encode_within(autoencoder, images, Budget(1e12))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, share)
    assert_close(decode_within(autoencoder, expected[0], Budget(1e12)), volumes, share)
    assert max(counted) == thickness and len(counted) > 20 // thickness


@pytest.mark.parametrize("name", ["two levels", "attention", "MAISI"])
@torch.inference_mode()
def test_in_bfloat16_slabs_differ_by_its_rounding(monkeypatch, name):
    autoencoder, latents = build(DEFINITIONS[name]), numbers(1, 2, 10, 6, 4)
    exact = autoencoder.decode(latents)
    force(monkeypatch, "device", 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = autoencoder.decode(latents), decode_within(autoencoder, latents, Budget(1e12))
    rounding = (expected.double() - exact).abs().mean()
    assert found.dtype == expected.dtype
    assert rounding > 0 and (found.double() - expected.double()).abs().mean() < rounding


@torch.inference_mode()
def test_slabs_have_the_memory_format_of_the_weights(monkeypatch):
    autoencoder, latents = build(DEFINITIONS["attention"], torch.float64), numbers(1, 2, 10, 6, 4).double()
    expected, conv3d, last = autoencoder.decode(latents), torch.conv3d, []
    autoencoder.to(memory_format=torch.channels_last_3d)

    def looked_at(x, *rest):
        if not isinstance(x, LazyVolume):
            last.append(x.is_contiguous(memory_format=torch.channels_last_3d))
        return conv3d(x, *rest)

    force(monkeypatch, "device", 3)
    monkeypatch.setattr(torch, "conv3d", looked_at)
    assert_close(decode_within(autoencoder, latents, Budget(1e12)), expected, 1e-12)
    assert last and all(last)


@torch.inference_mode()
def test_modules_are_left_as_they_were(monkeypatch):
    force(monkeypatch, "device", 3)
    for name in ("attention", "generative", "MAISI"):
        autoencoder = build(DEFINITIONS[name])
        before = [dict(vars(module)) for module in autoencoder.modules()]
        decode_within(autoencoder, numbers(1, 2, 6, 4, 4), Budget(1e12))
        assert [vars(module).keys() for module in autoencoder.modules()] == [one.keys() for one in before]
        for module, was in zip(autoencoder.modules(), before, strict=True):
            assert all(value is was[key] for key, value in vars(module).items())


# ---------------------------------------------------------------- operations


OPERATIONS = {
    "stride 2, padding 2, dilation 2": nn.Conv3d(2, 4, 3, stride=2, padding=2, dilation=2),
    "stride beyond the kernel": nn.Conv3d(2, 2, 1, stride=3),
    "kernel 5, groups": nn.Conv3d(2, 4, (5, 3, 1), padding=(2, 1, 0), groups=2),
    "padding valid": nn.Conv3d(2, 2, 3, padding="valid"),
    "padding in circles": nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"),
    "transposed, stride 3": nn.ConvTranspose3d(2, 3, 2, stride=3, padding=1, output_padding=2),
    "transposed, dilated": nn.ConvTranspose3d(2, 4, 3, stride=2, dilation=2, groups=2),
    "nearest": nn.Upsample(scale_factor=(3, 2, 1), mode="nearest"),
    "linear": nn.Upsample(scale_factor=2, mode="trilinear"),
    "linear by a fraction": nn.Upsample(scale_factor=1.5, mode="trilinear"),
    "pad before and behind": nn.ConstantPad3d((0, 1, 2, 0, 3, 4), 7.0),
    "a group norm without weights": nn.GroupNorm(2, 2, affine=False),
    "instance norm": nn.InstanceNorm3d(2),
    "relu in place": nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.LeakyReLU(2.0, inplace=True)),
    "prelu": nn.PReLU(2),
    "dropout": nn.Dropout(0.5),
    "pooling": nn.AvgPool3d(2),
}


@pytest.mark.parametrize("name", OPERATIONS)
@torch.inference_mode()
def test_an_operation_between_convolutions(monkeypatch, name):
    """Rows of its output, and rows of what a convolution makes of it."""
    operation = OPERATIONS[name].double().eval()
    volume = numbers(1, 2, 13, 6, 7, dtype=torch.float64)
    channels = operation(volume).shape[1]
    before, behind = (nn.Conv3d(n, n, 3, padding=1).double() for n in (2, channels))

    network = nn.ModuleList([before, behind])

    def decode(z):
        y = operation(before(z))
        return 2 - torch.exp(-behind(y) / 3) + y * y.sigmoid()

    network.decode = decode
    for thickness in (1, 3, 13):
        with monkeypatch.context() as patch:
            force(patch, "nowhere", thickness)
            assert_close(decode_within(network, volume, Budget(1e12)), decode(volume), 1e-13)


def test_moments_are_those_of_each_group_over_the_whole_volume(monkeypatch):
    force(monkeypatch, "nowhere", 2)
    values = numbers(1, 4, 7, 5, 6) + 1000  # a square of the mean would cancel all of the variance
    run = slabwise._Run(torch.device("cpu"), 1e9, 0)
    mean, variance = run.moments(leaf(run, values), groups=2)
    expected = values.double().reshape(2, -1)
    assert torch.allclose(mean, expected.mean(1), rtol=1e-7)
    assert torch.allclose(variance, expected.var(1, correction=0), rtol=1e-4)


def test_each_row_of_a_convolution_is_computed_once_in_a_sweep(monkeypatch):
    force(monkeypatch, "nowhere", 1)
    run, rows = slabwise._Run(torch.device("cpu"), 1e9, 0), []
    volume = LazyVolume(leaf(run, numbers(1, 1, 9, 4, 4)))
    for _ in range(3):
        volume = torch.conv3d(volume, torch.ones(1, 1, 3, 3, 3), padding=1)
        node, compute = volume.node, volume.node.compute
        node.compute = lambda tensors, a, b, f=compute: (rows.append((f, a, b)), f(tensors, a, b))[1]
    run.results(volume)
    for function in {one[0] for one in rows}:
        computed = [row for f, a, b in rows if f is function for row in range(a, b)]
        assert computed == list(range(9))


def test_what_works_in_place_is_refused():
    run = slabwise._Run(torch.device("cpu"), 1e9, 0)
    with pytest.raises(NotImplementedError, match="mul_"):
        LazyVolume(leaf(run, numbers(1, 1, 4, 4, 4))).mul_(2)


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def autoencoder() -> nn.Module:
    return build(TWO | {"channels": [8, 16]})


@torch.inference_mode()
def test_the_least_memory_is_named_and_does(autoencoder, monkeypatch):
    latents = numbers(1, 2, 20, 6, 6)
    monkeypatch.setattr(slabwise, "_plain_peak", lambda *_: math.inf)  # it would fit
    with pytest.raises(UserError, match=r"0\.0001 GB of memory .* 20 x 6 x 6 \(decode\)") as refused:
        decode_within(autoencoder, latents, Budget(1e5))
    least = float(least_of(str(refused.value)))
    expected = autoencoder.decode(latents)
    assert_close(decode_within(autoencoder, latents, Budget(least * 1e9)), expected, 1e-5)
    with pytest.raises(UserError, match=f"at least {least + 0.5:.3f} GB"):
        decode_within(autoencoder, latents, Budget(5e8, beside=500_000_000))


@torch.inference_mode()
def test_what_fits_is_decoded_whole(autoencoder, monkeypatch):
    latents = numbers(2, 2, 6, 4, 4)
    monkeypatch.setattr(slabwise._Run, "results", None)
    found = decode_within(autoencoder, latents, Budget(1e9))
    assert torch.equal(found, torch.cat([autoencoder.decode(one[None]) for one in latents]))


@torch.inference_mode()
def test_more_memory_is_used_to_compute_less(autoencoder, monkeypatch):
    images, computed, plans, flops = numbers(1, 1, 256, 8, 8), [], {}, []
    monkeypatch.setattr(slabwise, "HEAP", 0)
    monkeypatch.setattr(slabwise, "KEPT_WEIGHTS", 0)
    encode_within(autoencoder, images, Budget(1e12, plans=plans))
    ((plain, least),) = plans.values()
    assert least < plain / 2
    slabs_of = Sweep.slabs
    monkeypatch.setattr(Sweep, "slabs", lambda self, n: computed.append(self.flops) or slabs_of(self, n))
    for room in (1.01 * least, 0.99 * plain):
        computed.clear()
        total = room / slabwise.PLANNED + slabwise.weights_bytes(autoencoder)
        encode_within(autoencoder, images, Budget(total, plans=plans))
        flops.append(sum(computed))
    assert 0 < 2 * flops[1] < flops[0]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("name", ["three levels", "attention"])
@torch.inference_mode()
def test_tensors_and_what_convolutions_copy_stay_within_the_plan(monkeypatch, name, share):
    """As an allocator without gaps would count them: from least to plain, by what is there to be shared."""
    monkeypatch.setattr(slabwise, "HEAP", 0)
    monkeypatch.setattr(slabwise, "KEPT_WEIGHTS", 0)
    autoencoder, latents, plans = build(DEFINITIONS[name]), numbers(1, 2, 24, 8, 8), {}
    decode_within(autoencoder, latents, Budget(1e12, plans=plans))
    ((plain, least),) = plans.values()
    assert least < plain
    room = least + share * (plain - least)
    budget = Budget(room / slabwise.PLANNED + slabwise.weights_bytes(autoencoder) + 1, plans=plans)
    # Only without inference mode are composed operations seen by what they are made of.
    with torch.inference_mode(False), torch.no_grad(), slabwise._Tracker() as tracker:
        decode_within(autoencoder, latents, budget)
    assert tracker.peak + latents.nbytes <= room


PEAK = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch import nn
from ldm.lowmem.slabwise import Budget, decode_within

torch.set_num_threads(1)

def block(n, to):
    return [nn.Conv3d(n, to, (3, 1, 3), padding=(1, 0, 1)), nn.GroupNorm(4, to), nn.ReLU()]

class Network(nn.Module):  # much memory for little arithmetic
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*block(2, 8), nn.Upsample(scale_factor=2), *block(8, 16))
        self.block, self.last = nn.Sequential(*block(16, 16)), nn.Conv3d(16, 1, (1, 1, 3), padding=(0, 0, 1))

    def decode(self, z):
        x = self.first(z)
        return self.last(x + self.block(x))

def bytes_of(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

network, latents, plans = Network().eval(), torch.randn(1, 2, 160, 64, 64), {{}}
with torch.inference_mode():
    for size in (4, 160):  # what libraries take once for the arithmetic and the planning
        try:
            decode_within(network, latents[:, :, :size], Budget(2e9 if size == 4 else 1.0, plans=plans))
        except ValueError:
            pass
    open("/proc/self/clear_refs", "w").write("5")
    before = bytes_of("VmRSS")
    decode_within(network, latents, Budget(float(sys.argv[1]), plans=plans))
print(bytes_of("VmHWM") - before, max(plain for plain, _ in plans.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_peak_of_the_process_is_within_the_budget():
    """Of a volume that takes more than 1.3 GB whole."""
    budget = 0.6e9
    line = [sys.executable, "-c", PEAK.format(root=str(ROOT)), str(budget)]
    peak, plain = map(int, subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
    assert peak <= budget < 1.3e9 < plain


# ---------------------------------------------------------------- what uses it


@pytest.fixture
def model(tmp_path_factory, tmp_path, monkeypatch):
    """The chain's trained networks, and nothing drawn from them. With a budget they always work in slabs."""
    monkeypatch.setattr(slabwise, "_plain_peak", lambda *_: math.inf)
    trained = chain.trained(tmp_path_factory.getbasetemp())
    return copy_of(trained, tmp_path / "model", "autoencoder.pt", "diffusion_unet.pt", "split.json")


def least_of(message: str) -> str:
    """The GB that a refusal names."""
    return re.search(r"Expected at least (\S+) GB", message)[1]


def test_inference_within_a_memory_gives_the_same_volume(model, monkeypatch):
    message = model.refused(inference, "--steps", "2", "--max-memory", "0.0005")
    assert "0.0005 GB of memory are too little" in message and not list(model.output_dir.glob("*.nii.gz"))
    least = least_of(message)
    swept, plain = [], Sweep.slabs
    monkeypatch.setattr(Sweep, "slabs", lambda self, rows: swept.append(rows) or plain(self, rows))
    model.run(inference, "--steps", "2", "--max-memory", least)
    assert swept
    found = generation.read_volume(model.output_dir / "sample_000000.nii.gz")
    expected = chain.sample_by_hand(model, 0, steps=2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))

    record = model.output_dir / "sample_000000.json"
    assert json.loads(record.read_text())["max_memory"] == float(least)
    swept.clear()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        inference.main(["--reproduce", str(record)])
    assert swept and "byte-identical to the recorded volume" in out.getvalue()


@pytest.mark.parametrize("script, value", [(inference, "0"), (inference, "nan"), (cache_latents, "-1")])
def test_no_memory_is_refused(model, script, value):
    message = model.refused(script, f"--max-memory={value}")
    assert f"--max-memory: {value}: expected a number of GB above 0." in message


def test_a_cache_made_within_a_memory_holds_the_same_latents(model):
    folder = model.model_dir / "cache" / "latents"
    model.run(cache_latents, "--no-amp")
    plain = {path.name: np.load(path) for path in folder.glob("*.npy")}
    message = model.refused(cache_latents, "--no-amp", "--fresh", "--max-memory", "0.0005")
    model.run(cache_latents, "--no-amp", "--fresh", "--max-memory", least_of(message))
    made = {path.name: np.load(path) for path in folder.glob("*.npy")}
    assert plain and made.keys() == plain.keys()
    for name, entry in made.items():
        np.testing.assert_allclose(entry, plain[name], rtol=0, atol=1e-5)
