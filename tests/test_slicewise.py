"""2D networks on volumes: the same as on each slice, and through all scripts."""

import json

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG

import evaluate
import export_model
import inference
from ldm import configs
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import sample_latents
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import NETWORKS, instantiate, named_class

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
        voxels = np.random.default_rng(i).normal(100, 20, (16, 12, 6)).astype(np.float32)
        (folder / "data").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 5, 1])), folder / f"data/s{i}.nii.gz")
    config = json.loads(json.dumps(CONFIG))
    config |= {"spatial_dims": 2, "spacing": None, "conditions": {"mean_latent": True, "position": [2]}}
    config["autoencoder_def"] |= {"spatial_dims": 2}
    config["autoencoder_train"] |= {"max_epochs": 2, "adversarial_warmup_epochs": 0, "patch_size": [8, 8, 3]}
    config["diffusion_def"] |= {"spatial_dims": 2, "in_channels": 7}
    config["diffusion_train"] |= {"max_epochs": 2}
    files = chain.train_in(folder, config)
    inference.main([*files, "--num", "2", "--steps", "2"])
    return folder, files


def test_all_scripts_take_2d(project, capsys):
    """Any number of slices: they are not downsampled. Volumes are stacks, with a picture of their slices."""
    folder, files = project
    samples = sorted((folder / "out").glob("*.nii.gz"))
    image = nib.load(samples[0])
    assert image.shape == (16, 12, 6) and image.header.get_zooms() == (2, 2, 5)
    assert all(path.with_name(path.name.replace(".nii.gz", ".png")).is_file() for path in samples)
    evaluate.main(files)
    with pytest.raises(SystemExit) as stop:
        export_model.main([*files[:4], "--out", str(folder / "all")])
    assert stop.value.code == 2 and "spatial_dims 2: MONAI's 2D networks" in capsys.readouterr().err


def test_low_memory_takes_slices_one_by_one(project):
    folder, files = project
    paths = json.loads((folder / "env.json").read_text()) | {"output_dir": str(folder / "low")}
    (folder / "low.json").write_text(json.dumps(paths))
    inference.main(
        [*files[:3], str(folder / "low.json"), *files[4:], "--num", "2", "--steps", "2", "--max-memory", "1"]
    )
    whole, low = (nib.load(folder / where / "sample_000000.nii.gz").get_fdata() for where in ("out", "low"))
    np.testing.assert_allclose(low, whole, rtol=1e-4)
