"""Volumes of any size and spacing: the arithmetic of ranges and positions, and all scripts."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import SHAPE, SPACING, copy_of, decode_by_hand, trained

import inference
import utils
from ldm import UserError
from ldm.data.cases import Case
from ldm.data.extent import asked_geometry, beyond_training, three_numbers, trained_geometry
from ldm.diffusion.conditioning import Conditions, position_channels
from ldm.diffusion.process import NoiseProcess
from ldm.generation import load_networks
from ldm.system.ranks import Run

# ---------------------------------------------------------------- arithmetic


def test_numbers_of_an_option():
    assert three_numbers("96,112,64", "--size", True) == [96, 112, 64]
    assert three_numbers("2,1.5,3", "--spacing", False) == [2.0, 1.5, 3.0]
    for text in ("96,112", "96,0,8", "a,b,c", "", "1,inf,2"):
        with pytest.raises(UserError, match="--spacing .*: expected three numbers"):
            three_numbers(text, "--spacing", False)
    with pytest.raises(UserError, match="whole numbers above 0"):
        three_numbers("1.5,2,2", "--size", True)


def test_the_ranges_that_were_trained_on():
    plain, own = Case("a", ()), Case("b", (), spacing=(1.0, 1.0, 3.0), size=(8, 16, 8))
    geometry = trained_geometry([plain, own, own], (16, 16, 16), [2.0, 2.0, 2.0], [[0, 1]])
    assert geometry["size"] == [8, 16, 8] and geometry["spacing"] == [1.0, 1.0, 3.0]  # the most frequent
    assert geometry["spacing_range"] == [[1.0, 2.0], [1.0, 2.0], [2.0, 3.0]]
    assert geometry["fov_range"] == [[8.0, 32.0], [16.0, 32.0], [24.0, 32.0]]
    assert not beyond_training(asked_geometry(geometry, (16, 16, 8), (1.5, 1.5, 3.0), (8, 8, 8)))
    asked = asked_geometry(geometry, (16, 16, 16), (1.0, 3.0, 2.0), (8, 8, 8))
    assert beyond_training(asked) == [
        "volumes cover 16 x 48 x 32 mm; the model was trained on 8 x 16 x 24 to 32 x 32 x 32 mm",
        "volumes have voxels of 1 x 3 x 2 mm; the model was trained on 1 x 1 x 2 to 2 x 2 x 3 mm",
    ]
    old = {"size": [16, 16, 16], "spacing": [2.0, 2.0, 2.0], "limits": [[0, 1]]}  # of older checkpoints
    (warning,) = beyond_training(asked_geometry(old, (16, 16, 24), None, (8, 8, 8)))
    assert warning == "volumes cover 32 x 32 x 48 mm; the model was trained on 32 x 32 x 32 mm"


def test_a_size_that_does_not_divide_and_slices_about_the_centre():
    geometry = {"size": [16, 16, 10], "spacing": [1.0] * 3, "limits": [[0, 1]], "slices": [2, 9]}
    with pytest.raises(UserError, match="--size: .*multiples of 8 x 8 x 1: 16 or 24 x 16 x 10"):
        asked_geometry(geometry, [20, 16, 10], None, (8, 8, 1))
    assert asked_geometry(geometry, [16, 16, 14], None, (8, 8, 1))["slices"] == [4, 11]
    assert asked_geometry(geometry, [16, 16, 4], None, (8, 8, 1))["slices"] == [0, 4]


def test_positions_keep_their_distance():
    """Of 5 trained voxels, of 9 about the same centre, and of 3."""
    assert position_channels(5, False, 5)[0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert position_channels(9, False, 5)[0].tolist() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert position_channels(3, False, 5)[0].tolist() == [-0.5, 0, 0.5]
    torch.testing.assert_close(position_channels(9, True, 5)[:, 2:7], position_channels(5, True))
    conditions = Conditions(position=(1,), shape=(3, 4, 5, 6), frame=(4, 5, 6)).of_latents((3, 4, 9, 6), None)
    assert conditions.cond([{}])["channels"][0, 0, 0, :, 0].tolist()[::4] == [-2, 0, 2]


def test_a_shift_follows_the_size():
    section = {"_target_": "monai.networks.schedulers.RFlowScheduler", "use_timestep_transform": True}
    section |= {"base_img_size_numel": 1000}
    small, large = (NoiseProcess.from_config(section, size) for size in ([10, 10, 10], [20, 20, 20]))
    assert small.shift == pytest.approx(1) and large.shift == pytest.approx(2)
    assert small.at((20, 20, 20)).shift == pytest.approx(2) and small.at((10, 10, 10)) is small
    trained = {"shift": 1.5, "latent_shape": [3, 10, 10, 10]}
    assert NoiseProcess.of_checkpoint(trained, section, (20, 20, 20)).shift == pytest.approx(3)
    assert NoiseProcess.of_checkpoint({"latent_shape": [3, 10, 10, 10]}, section, (20, 20, 20)).shift == 1
    fixed = {**section, "use_timestep_transform": False}
    assert NoiseProcess.of_checkpoint(trained, fixed, (20, 20, 20)).shift == 1.5


# ---------------------------------------------------------------- a model of one size


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    done = trained(tmp_path_factory.getbasetemp())
    names = ("autoencoder.pt", "diffusion_unet.pt", "split.json")
    return copy_of(done, tmp_path_factory.mktemp("sizes") / "run", *names)


def test_another_size(project):
    """24 x 20 x 16 voxels for 16 x 20 x 12, by hand, and again from the record."""
    said = project.run(
        inference, "--size", "24,20,16", "--steps", "2", "--sampler", "euler", "--batch-size", "2"
    )
    assert "warning: volumes cover 48 x 30 x 48 mm; the model was trained on 32 x 30 x 36 mm" in said
    image = nib.load(project.output_dir / "sample_000000.nii.gz")
    assert image.shape == (24, 20, 16) and np.allclose(np.diag(image.affine)[:3], SPACING)
    checkpoint = project.checkpoint("diffusion_unet.pt")
    assert checkpoint["geometry"]["fov_range"] == [[32, 32], [30, 30], [36, 36]]
    unet = project.network("diffusion_def", checkpoint["model"])
    z = torch.randn(3, 12, 10, 8, generator=torch.Generator().manual_seed(0))[None]
    with torch.no_grad():
        for i in range(2):
            z = z + unet(z, timesteps=torch.tensor([1000 * (1 - i / 2)])) / 2
    expected = decode_by_hand(project, z)[0]
    np.testing.assert_allclose(image.get_fdata(), expected, atol=1e-4 * np.ptp(expected))
    record = json.loads((project.output_dir / "sample_000000.json").read_text())
    assert record["size"] == [24, 20, 16] == record["volume"]["shape"] and "spacing" not in record


def test_its_record_makes_it_again(project, capsys):
    argv = ["--seed", "5", "--steps", "2", "--size", "16,24,12"]
    project.run(inference, *argv)
    assert "1 of 1 volumes already exist" in project.run(inference, *argv)
    assert "size [16, 24, 12], now None" in project.refused(inference, *argv[:4])
    inference.main(["--reproduce", str(project.output_dir / "sample_000005.json")])
    assert "byte-identical to the recorded" in capsys.readouterr().out
    said = project.run(inference, "--seed", "6", "--steps", "2", "--size", ",".join(map(str, SHAPE)))
    assert "warning" not in said  # as trained
    assert "1 of 1 volumes already exist" in project.run(inference, "--seed", "6", "--steps", "2")


def test_what_is_refused(project):
    for argv, what in (
        (["--size", "16,20,13"], r"multiples of 4: 16 x 20 x 12 or 16"),
        (["--size", "16,20"], "expected three whole numbers"),
    ):
        assert re.search(what, project.refused(inference, "--seed", "9", *argv))
    assert re.search("multiples of 4", project.refused(inference, "--dry-run", "--size", "16,20,13"))
    assert "24 x 20 x 12" in project.run(inference, "--dry-run", "--size", "24,20,12")


def networks_of(project, **asked):
    config, run = utils.load_config(project.config_file), Run(0, 1, torch.device("cpu"))
    files = (project.model_dir / name for name in ("autoencoder.pt", "diffusion_unet.pt"))
    return load_networks(*files, config, "here", None, False, None, run, **asked)


def test_a_model_of_one_frame_has_one_size(project, tmp_path):
    """The mean latent is of the size that was trained on; so is the size of older checkpoints."""
    with pytest.raises(UserError, match="--size: this model is told the mean latent"):
        Conditions(mean_latent=torch.zeros(3, 8, 10, 6)).check_asked({"size"})
    with pytest.raises(UserError, match="--spacing: this model was not told spacings"):
        networks_of(project, spacing=[1.0, 1.0, 1.0])
    networks = networks_of(project, size=[24, 20, 12], spacing=list(SPACING))
    assert networks.latent_shape == [3, 12, 10, 6] and networks.asked == {"size": [24, 20, 12]}
