"""Haar wavelets in the place of an autoencoder: exact, orthonormal, and through all scripts."""

import json

import chain
import nibabel as nib
import numpy as np
import pytest
import torch

import export_model
import inference
import train_autoencoder
import utils
from ldm import UserError
from ldm.models import Haar
from ldm.models.autoencoder import Autoencoder
from ldm.system.checkpoints import load_checkpoint


@pytest.mark.parametrize("dims, levels", [(2, 1), (3, 2), (3, 0)])
def test_decoding_inverts_encoding(dims, levels):
    network = Haar(dims, 2, levels)
    images = torch.rand(3, 2, *(8,) * dims)
    network.fit(images[:, None].unbind())
    mean, std = network.encode(images)
    assert mean.shape == (3, 2 * 2 ** (dims * levels), *(8 // 2**levels,) * dims)
    assert network.latent_channels == mean.shape[1] and not std.any()
    assert torch.allclose(network.decode(mean), images, atol=1e-5)
    assert mean.transpose(0, 1).flatten(1).mean(1).abs().max() < 1e-5, "each band less its mean"


def test_bands_of_a_block_by_hand():
    """A block of 2 x 2, a b over c d: half of sums and differences, along the first axis, then the second."""
    a, b, c, d = 1.0, 2.0, 5.0, 10.0
    bands = Haar(2, 1, 1).bands(torch.tensor([[[[a, b], [c, d]]]]))[-1].flatten()
    expected = [a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d]
    assert torch.allclose(bands, torch.tensor(expected) / 2)


def test_bands_are_whitened_halfway():
    """A band of standard deviation s is divided by its square root."""
    volumes = [0.1 + 0.3 * torch.randn(1, 1, 4, 4, 4) for _ in range(50)]
    network = Haar(3, 1, 0)
    network.fit(volumes)
    every = torch.cat(volumes)
    assert torch.isclose(network.mean[0], every.mean(), atol=1e-5)
    assert torch.isclose(network.gain[0], every.std() ** -0.5, rtol=1e-3)


def test_interface_of_an_autoencoder():
    autoencoder = Autoencoder(Haar(3, 1, 2))
    assert autoencoder.factor == (4, 4, 4) and autoencoder.latent_channels == 64 and not autoencoder.learns
    images = torch.rand(1, 1, 8, 8, 8)
    assert [tuple(one.shape) for one in autoencoder.activations(images)] == [
        (1, 8, 4, 4, 4),
        (1, 64, 2, 2, 2),
    ]


@pytest.fixture(scope="module", params=[1, 0], ids=["wavelets", "voxels"])
def project(request, tmp_path_factory):
    """Four scans, and a config with that many levels."""
    folder = tmp_path_factory.mktemp("haar")
    for i in range(4):
        voxels = np.random.default_rng(i).normal(100, 20, (8, 8, 8)).astype(np.float32)
        (folder / "data").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 2, 1])), folder / f"data/s{i}.nii.gz")
    levels, channels = request.param, 8**request.param
    unet = {"spatial_dims": 3, "in_channels": channels, "out_channels": channels, "channels": [8, 16]}
    unet |= {"attention_levels": [False, False], "num_head_channels": [8, 8], "num_res_blocks": 1}
    config = {
        "data": {"num_workers": 0},
        "autoencoder_train": {"perceptual_weight": 0, "adversarial_weight": 0},
        "diffusion_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", "norm_num_groups": 8, **unet},
        "diffusion_train": {"batch_size": 2, "max_epochs": 1, "sample_interval": 0, "ema_decay": 0},
        "NoiseScheduler": {"schedule": "rectified_flow"},
    }
    haar = {"_target_": "ldm.models.Haar", "spatial_dims": 3, "in_channels": 1, "levels": levels}
    config |= (
        {"autoencoder_def": haar, "latent_channels": channels} if levels else {"diffusion_space": "pixel"}
    )
    files = chain.train_in(folder, config)
    inference.main([*files, "--num", "1", "--steps", "2"])
    return folder, files


def test_all_scripts_take_it(project):
    folder, files = project
    checkpoint = load_checkpoint(folder / "models/autoencoder.pt", "autoencoder")
    assert checkpoint["validation"]["psnr"] > 100 and set(checkpoint["model"]) == {"mean", "gain"}
    (sample,) = (folder / "out").glob("*.nii.gz")
    assert nib.load(sample).shape == (8, 8, 8)
    before = (folder / "models/autoencoder.pt").read_bytes()
    train_autoencoder.main([*files, "--no-amp"])  # again: the same bands
    assert load_checkpoint(folder / "models/autoencoder.pt")["model"]["gain"].equal(
        checkpoint["model"]["gain"]
    )
    assert len(before) == len((folder / "models/autoencoder.pt").read_bytes())


def test_exports_but_as_a_bundle(project, tmp_path, capsys):
    _, files = project
    with pytest.raises(SystemExit) as stop:
        export_model.main([*files[:4], "--out", str(tmp_path / "all")])
    assert stop.value.code == 2 and "ldm.models.Haar is this project's own" in capsys.readouterr().err
    export_model.main([*files[:4], "--out", str(tmp_path / "two"), "--formats", "safetensors", "torchscript"])
    assert (tmp_path / "two/MODEL_CARD.md").is_file()


def test_wrong_levels_are_named(tmp_path, capsys):
    config = {"latent_channels": 8, "diffusion_train": {}, "NoiseScheduler": {"schedule": "rectified_flow"}}
    for levels, named in (("two", "levels: expected a whole number"), (12, "13 levels are too many")):
        definition = {"_target_": "ldm.models.Haar", "spatial_dims": 3, "in_channels": 1, "levels": levels}
        (tmp_path / "config.json").write_text(json.dumps({**config, "autoencoder_def": definition}))
        with pytest.raises(UserError, match=named):
            utils.load_config(tmp_path / "config.json")


def test_voxels_need_no_autoencoder(tmp_path):
    config = {"diffusion_space": "pixel", "image_channels": 2, "channel": [0, 1], "spatial_dims": 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"diffusion_train": {}}))
    found = utils.load_config(tmp_path / "config.json")
    assert found["autoencoder_def"]["levels"] == 0 and found["latent_channels"] == 2
    config["autoencoder_def"] = {**found["autoencoder_def"], "levels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="diffusion_space"):
        utils.load_config(tmp_path / "config.json")
