"""2D networks on volumes: the same as on each slice, and through all scripts."""

import json

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG

import cache_latents
import evaluate
import export_model
import inference
import train_diffusion
from ldm import UserError, configs
from ldm.data.cases import Case
from ldm.data.datasets import SliceWindows, filled_slices
from ldm.data.posteriors import Posteriors
from ldm.data.prepare import step_size
from ldm.diffusion.conditioning import Conditions
from ldm.diffusion.objective import validate
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import sample_latents
from ldm.losses import AutoencoderLoss
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import NETWORKS, instantiate, named_class
from ldm.system.ranks import Run
from ldm.training import diffusion
from ldm.training.latents import Latents, WithNoise
from ldm.training.memory import Forecast

CHANGES = {"spatial_dims": 2, "norm_num_groups": 4}


def pair(key: str, **more):
    """A 2D network as it is, and as it takes volumes, with the same weights."""
    definition = CONFIG[key] | CHANGES | more
    definition |= (
        {"latent_channels": 3, "in_channels": 1, "out_channels": 1} if key == "autoencoder_def" else {}
    )
    torch.manual_seed(0)
    arguments = {name: value for name, value in definition.items() if name != "_target_"}
    plain = named_class(definition["_target_"], NETWORKS, "here")(**arguments).eval()
    sliced = instantiate(definition, NETWORKS, "here").eval()
    sliced.load_state_dict(plain.state_dict())
    return plain, sliced


@torch.no_grad()
def test_a_volume_is_encoded_and_decoded_slice_by_slice():
    plain, sliced = pair("autoencoder_def")
    autoencoder, volumes = Autoencoder(sliced), torch.rand(2, 1, 8, 12, 5)
    mean, std = autoencoder.encode(volumes)
    assert mean.shape == std.shape == (2, 3, 4, 6, 5) and autoencoder.factor == (2, 2, 1)
    expected = plain.encode(volumes[1, :, :, :, 3][None])[0][0]
    torch.testing.assert_close(mean[1, ..., 3], expected)
    decoded = autoencoder.decode(mean)
    torch.testing.assert_close(decoded[1, ..., 3], plain.decode(expected[None])[0])
    shapes = [tuple(one.shape) for one in autoencoder.activations(volumes)]
    assert shapes == [(2, 8, 8, 12, 5), (2, 3, 4, 6, 5), (2, 3, 4, 6, 5)]


@torch.no_grad()
def test_a_volume_is_denoised_slice_by_slice():
    """Each slice with the time, class and context of its volume."""
    conditioned = {"num_class_embeds": 4, "with_conditioning": True, "cross_attention_dim": 5}
    plain, sliced = pair("diffusion_def", in_channels=4, out_channels=3, **conditioned)
    torch.nn.init.normal_(plain.out[-1].conv.weight)
    sliced.load_state_dict(plain.state_dict())
    x, t, classes, context = (
        torch.randn(2, 4, 8, 8, 3),
        torch.tensor([10.0, 700]),
        torch.tensor([3, 1]),
        torch.randn(2, 1, 5),
    )
    found = sliced(x, timesteps=t, class_labels=classes, context=context)
    expected = plain(x[1:, ..., 2], timesteps=t[1:], class_labels=classes[1:], context=context[1:])
    torch.testing.assert_close(found[1, ..., 2], expected[0])


def volume(first: int, end: int) -> torch.Tensor:
    """(1, 2, 3, 8), whose slices first to end - 1 hold their number + 1."""
    inside = torch.zeros(8)
    inside[first:end] = torch.arange(8)[first:end] + 1.0
    return inside.expand(1, 2, 3, 8).clone()


def test_filled_slices():
    one = volume(2, 6)
    one[..., 4] = 0  # an empty slice between others is among them
    assert filled_slices(one).tolist() == [2, 6]
    assert filled_slices(torch.zeros(1, 2, 3, 8)).tolist() == [0, 8]
    two = torch.cat([volume(2, 6), volume(5, 8)])
    assert filled_slices(two).tolist() == [2, 8]


CASES = [Case(f"case_{i}", ()) for i in range(3)]


def posteriors(known: bool = True) -> Posteriors:
    """Of three volumes with something in slices 2 to 5, 7, and 0 to 7."""
    entries = torch.stack([torch.stack([volume(*pair), volume(0, 0)]) for pair in ((2, 6), (7, 8), (0, 8))])
    slices = torch.tensor([[[2, 6]], [[7, 8]], [[0, 8]]]) if known else None
    return Posteriors(CASES, entries[:, None], 0, slices)


@pytest.mark.parametrize("known", [True, False])
def test_windows_of_slices(known):
    """Neighbouring slices, each place among those that are not empty, the same for the same epoch."""
    windows, whole = SliceWindows(posteriors(known), 3, 5), posteriors()
    starts = [set(), set(), set()]
    for epoch in range(60):
        for i in range(3):
            item = windows[(epoch, i)]
            start = item["start"]
            assert item["mean"].shape == item["std"].shape == (1, 2, 3, 3) and "slices" not in item
            expected = whole[(epoch, i)]["mean"][..., start : start + 3]
            assert torch.equal(item["mean"], expected) and windows[(epoch, i)]["start"] == start
            starts[i].add(start)
    everywhere = set(range(6))
    assert starts == ([{2, 3}, {5}, everywhere] if known else [everywhere] * 3)


def test_windows_know_their_position():
    conditions = Conditions(position=[2], slicewise=True).of_latents((1, 2, 3, 8), None)
    drawn = WithNoise(SliceWindows(posteriors(), 2, 0), (1, 2, 3, 2), 0, conditions)
    for epoch in range(5):
        item = drawn[(epoch, 2)]
        channels = item["cond"]["channels"]
        assert channels.shape == (4, 2, 3, 2) and item["noise"].shape == (1, 2, 3, 2)
        angle = (-1 + (item["mean"][0] - 1) * 2 / 7) * np.pi / 2  # as `volume` numbers the slices
        waves = [angle.sin(), angle.cos(), (4 * angle).sin(), (4 * angle).cos()]
        torch.testing.assert_close(channels, torch.stack(waves))


def test_empty_slices_count_neither_in_the_scale_factor_nor_in_the_held_out_loss():
    run = Run(0, 1, torch.device("cpu"))
    latents = Latents(posteriors(), posteriors(), None, "", [1, 2, 3, 8], {})
    scale_factor, mean, slices = latents.moments(run)
    values = np.concatenate([np.arange(3, 7), [8], np.arange(1, 9)])
    assert scale_factor == pytest.approx(1 / values.std()) and slices == {"slices": [2, 8]}
    torch.testing.assert_close(mean, torch.stack([volume(2, 6), volume(7, 8), volume(0, 8)]).mean(0))
    without = Latents(posteriors(False), posteriors(False), None, "", [1, 2, 3, 8], {}).moments(run)
    assert without[0] < scale_factor and without[2] == {}

    process = NoiseProcess.from_config(
        configs.completed({"NoiseScheduler": {"schedule": "rectified_flow"}})["NoiseScheduler"]
    )
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, timesteps, **cond):
            seen.append(x.shape[-1])
            return torch.zeros_like(x)

    section = {"val_times": 2, "batch_size": 2}
    validate(Network(), latents.val, 1.0, process, section, 0, run)
    assert seen == [4, 1, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slices": {"per_volume": 2}}, "slices: is for spatial_dims 2"),
        ({"spatial_dims": 2, "slices": {"foreground": True}}, "set slices.per_volume too"),
        (
            {
                "spatial_dims": 2,
                "slices": {"foreground": True, "per_volume": 2},
                "diffusion_train": {"augment": {"intensity_shift": 0.1}},
            },
            "intensity_shift: would fill empty slices",
        ),
    ],
)
def test_bad_slices(changes, message):
    with pytest.raises(UserError, match=message):
        configs.check_config(json.loads(json.dumps(CONFIG)) | changes, "config.json")


def test_more_slices_than_volumes_have():
    config = {"slices": {"per_volume": 9, "foreground": False}}
    with pytest.raises(UserError, match="expected at most 8, as volumes have; found 9"):
        step_size(config, [1, 2, 3, 8])


def test_the_forecast_takes_slices_in_training_and_volumes_in_validation():
    config = json.loads(json.dumps(CONFIG)) | {"spatial_dims": 2, "conditions": {"position": [2]}}
    config["autoencoder_def"] |= {"spatial_dims": 2}
    config["diffusion_def"] |= {"spatial_dims": 2, "in_channels": 7}
    peaks = []
    for count in (2, 8):
        changed = config | {"slices": {"per_volume": count, "foreground": True}}
        changed["diffusion_train"] = config["diffusion_train"] | {"augment": {"flip_axes": [0]}}
        resolved = configs.check_config(json.loads(json.dumps(changed)), "config.json")
        found = Forecast(diffusion.rehearse, "diffusion_train", [[16, 20, 8]] * 3, True, None).peaks(resolved)
        peaks.append({name: peak.total for name, peak in found.items()})
    assert peaks[0]["training"] < peaks[1]["training"]
    assert peaks[0]["validation"] > 0.8 * peaks[1]["validation"]


def test_a_2d_autoencoder_is_not_compared_from_slice_to_slice():
    section = configs.completed({"autoencoder_train": {"perceptual_weight": 0, "gradient_weight": 1.0}})
    images, changed = torch.zeros(1, 1, 4, 4, 1), torch.zeros(1, 1, 4, 4, 1)
    changed[..., 2:, :] = 0.5
    terms = AutoencoderLoss(section["autoencoder_train"], None, 2).held_out(images, changed, None)
    assert terms["gradient_loss"] == pytest.approx(0.5 / 3)  # one of three differences along one axis


def test_slices_begin_with_the_same_noise():
    process = NoiseProcess.from_config(
        configs.completed({"NoiseScheduler": CONFIG["NoiseScheduler"]})["NoiseScheduler"]
    )
    x = sample_latents(lambda x, t: 0 * x, process, (2, 3, 3, 4), [5], 2, slicewise=True)
    assert torch.equal(x[..., :1].expand_as(x), x) and x[0, 0].std() > 0


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    for i in range(4):
        voxels = np.random.default_rng(i).normal(100, 20, (16, 12, 8)).astype(np.float32)
        voxels[..., :1] = voxels[..., 6 + i % 2 :] = 0
        (folder / "data").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 5, 1])), folder / f"data/s{i}.nii.gz")
    config = json.loads(json.dumps(CONFIG))
    config |= {"spatial_dims": 2, "spacing": None, "conditions": {"mean_latent": True, "position": [2]}}
    config["slices"] = {"per_volume": 2, "foreground": True}
    config["autoencoder_def"] |= {"spatial_dims": 2}
    config["autoencoder_train"] |= {"max_epochs": 2, "adversarial_warmup_epochs": 0, "patch_size": [8, 8, 3]}
    config["diffusion_def"] |= {"spatial_dims": 2, "in_channels": 10}
    config["diffusion_train"] |= {"max_epochs": 2}
    files = chain.train_in(folder, config)
    inference.main([*files, "--num", "2", "--steps", "2"])
    return folder, files


def test_all_scripts_take_2d(project, capsys):
    """Any number of slices: they are not downsampled. Volumes are stacks, with a picture of their slices."""
    folder, files = project
    samples = sorted((folder / "out").glob("*.nii.gz"))
    image = nib.load(samples[0])
    assert image.shape == (16, 12, 8) and image.header.get_zooms() == (2, 2, 5)
    assert all(path.with_name(path.name.replace(".nii.gz", ".png")).is_file() for path in samples)
    checkpoint = torch.load(folder / "models/diffusion_unet.pt", weights_only=True)
    first, end = checkpoint["geometry"]["slices"]
    assert first == 1 and end in (6, 7)  # as the training scans', of which half end in each
    filled = np.ptp(image.get_fdata(), axis=(0, 1)) > 0
    assert filled.tolist() == [first <= k < end for k in range(8)]
    assert np.abs(image.get_fdata()[..., ~filled]).max() == 0
    evaluate.main(files)
    with pytest.raises(SystemExit) as stop:
        export_model.main([*files[:4], "--out", str(folder / "all")])
    assert stop.value.code == 2 and "spatial_dims 2: MONAI's 2D networks" in capsys.readouterr().err


def test_a_cache_knows_which_slices_are_empty(project, capsys):
    """Training from the cache is as from images. A cache that does not know them is refused."""
    folder, files = project
    paths = json.loads((folder / "env.json").read_text())
    paths |= {"model_dir": str(folder / "cached"), "cache_dir": str(folder / "cache")}
    (folder / "cached.json").write_text(json.dumps(paths))
    autoencoder = ["--autoencoder", str(folder / "models/autoencoder.pt")]
    files = [*files[:3], str(folder / "cached.json"), *files[4:]]
    cached = [*files, "--no-amp", *autoencoder, "--set", "diffusion_train.latent_cache=true"]
    cache_latents.main([*files, *autoencoder, "--set", "slices={}"])
    with pytest.raises(SystemExit):
        train_diffusion.main(cached)
    assert "slices.foreground unknown; here it is true" in capsys.readouterr().err
    cache_latents.main([*files, *autoencoder, "--fresh"])
    manifest = json.loads((folder / "cache/latents/manifest.json").read_text())
    for record in manifest["training"] + manifest["validation"]:
        assert record["slices"] == [[1, 6 + int(record["case"][-1]) % 2]]
    entries = {record["case"]: record for record in manifest["training"]}
    (folder / "cache/latents" / next(iter(entries.values()))["entry"]).unlink()
    cache_latents.main([*files, *autoencoder])
    assert json.loads((folder / "cache/latents/manifest.json").read_text()) == manifest
    train_diffusion.main(cached)
    in_memory, from_disk = (
        torch.load(folder / where / "diffusion_unet_last.pt", weights_only=True)
        for where in ("models", "cached")
    )
    assert in_memory["geometry"] == from_disk["geometry"]
    for name, value in in_memory["model"].items():
        torch.testing.assert_close(from_disk["model"][name], value)


def test_low_memory_takes_slices_one_by_one(project):
    folder, files = project
    paths = json.loads((folder / "env.json").read_text()) | {"output_dir": str(folder / "low")}
    (folder / "low.json").write_text(json.dumps(paths))
    inference.main(
        [*files[:3], str(folder / "low.json"), *files[4:], "--num", "2", "--steps", "2", "--max-memory", "1"]
    )
    whole, low = (nib.load(folder / where / "sample_000000.nii.gz").get_fdata() for where in ("out", "low"))
    np.testing.assert_allclose(low, whole, atol=1e-4 * np.ptp(whole))
