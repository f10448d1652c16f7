"""Volumes of any size and spacing: the arithmetic of ranges and positions, and all scripts."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import SHAPE, SPACING, Project, assert_weights_close, copy_of, decode_by_hand, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from test_labels import add_labels

import cache_latents
import inference
import train_autoencoder
import train_controlnet
import train_diffusion
import utils
from ldm import UserError
from ldm.data.cases import Case
from ldm.data.datasets import EpochSampler
from ldm.data.extent import (
    asked_geometry,
    beyond_training,
    fitting_size,
    three_numbers,
    trained_geometry,
)
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
    assert geometry["size"] == [8, 16, 8] and geometry["spacing"] == [2.0, 2.0, 2.0]  # the most frequent
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


# ---------------------------------------------------------------- several sizes and spacings


def test_the_size_that_fits():
    sizes = [[16, 16, 16], [32, 16, 16], [24, 24, 24]]
    for whole, size in (
        ((10, 16, 4), (16, 16, 16)),
        ((17, 8, 8), (32, 16, 16)),  # 8192 voxels, the cube has 13824
        ((20, 20, 8), (24, 24, 24)),
        ((40, 16, 16), (32, 16, 16)),  # none holds it: 8192 of its voxels are kept, by the cube 6144
    ):
        assert fitting_size(whole, sizes, (4, 4, 4)) == size
    assert fitting_size((10, 16, 4), "own", (4, 8, 4)) == (12, 16, 4)


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=15),
    batch=st.integers(1, 3),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
)
def test_a_batch_of_all_ranks_has_one_size(groups, batch, world, accumulate):
    def batches(batch, rank, world):
        sampler = EpochSampler(len(groups), batch, 5, rank, world, accumulate, [(one,) for one in groups])
        sampler.epoch = 2
        found = list(sampler)
        assert len(found) == len(sampler) and len(found) % accumulate == 0
        sampler.first = len(found) // 2  # after a resume
        assert list(sampler) == found[len(found) // 2 :]
        return found

    together = [
        sum(parts, []) for parts in zip(*[batches(batch, r, world) for r in range(world)], strict=True)
    ]
    assert together == batches(batch * world, 0, 1)
    assert all(len({groups[i] for _, i in one}) == 1 for one in together)
    assert {i for one in together for _, i in one} == set(range(len(groups)))


KINDS = [((16, 20, 12), (2.0, 1.5, 3.0)), ((24, 16, 12), (1.0, 2.0, 3.0))]  # shape and spacing of a scan


def make_mixed(folder):
    """Eight ellipsoids, in turn of each of `KINDS`."""
    (folder / "imagesTr").mkdir(parents=True)
    listed, rng = [], np.random.default_rng(0)
    for i in range(8):
        shape, spacing = KINDS[i % 2]
        axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
        radius = sum((axis * rng.uniform(1, 1.3)) ** 2 for axis in axes)
        voxels = np.clip(1 - radius, 0, None) + 0.02 * rng.random(shape)
        image = nib.Nifti1Image((1000 * voxels).astype(np.float32), np.diag([*spacing, 1]))
        nib.save(image, folder / f"imagesTr/scan_{i}.nii.gz")
        listed.append({"image": f"./imagesTr/scan_{i}.nii.gz"})
    (folder / "dataset.json").write_text(json.dumps({"training": listed}))
    add_labels(folder)
    return folder


MIXED = {"spacing": None, "conditions": {"spacing": True}}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Project:
    folder = tmp_path_factory.mktemp("mixed")
    project = Project(folder / "run", make_mixed(folder / "data"))
    project.config["data"] |= {"own_spacing": True, "sizes": "own"}
    project.config["autoencoder_train"] |= {
        "max_epochs": 2,
        "adversarial_weight": 0,
        "patch_size": [12, 12, 12],
    }
    project.config["diffusion_train"] |= {"max_epochs": 2, "val_interval": 2, "lr_schedule": "constant"}
    project.change(**MIXED)
    for script in (train_autoencoder, train_diffusion):
        project.printed[script.__name__] = project.run(script, "--no-amp")
    return project


def test_volumes_keep_their_spacing_and_size(mixed):
    said = mixed.printed["train_diffusion"]
    assert "spacings from 1 x 1.5 x 3 to 2 x 2 x 3 mm; sizes " in said
    assert "16 x 20 x 12 (" in said and "24 x 16 x 12 (" in said and "padded" not in said
    checkpoint = mixed.checkpoint("diffusion_unet.pt")
    geometry, training = checkpoint["geometry"], mixed.split()["training"]
    kinds = [KINDS[int(name[-1]) % 2] for name in training]
    assert geometry["spacing_range"] == [[1, 2], [1.5, 2], [3, 3]]
    assert geometry["fov_range"] == [[24, 32], [30, 32], [36, 36]]
    assert tuple(geometry["size"]) in {shape for shape, _ in kinds}
    assert geometry["spacing"] == np.median([mm for _, mm in kinds], axis=0).tolist()
    assert checkpoint["model"]["class_embedding.0.weight"].shape[1] == 3
    autoencoder = mixed.network("autoencoder_def", mixed.checkpoint("autoencoder.pt")["model"])
    with torch.no_grad():
        pairs = [autoencoder.encode(mixed.normalised(name)) for name in training]
    mean, std = (torch.cat([pair[i].flatten() for pair in pairs]).double() for i in (0, 1))
    scale = float(((mean - mean.mean()) ** 2 + std**2).mean()) ** -0.5
    assert checkpoint["scale_factor"] == pytest.approx(scale, rel=1e-4)


def test_a_sample_of_a_spacing_by_hand(mixed):
    argv = ["--steps", "1", "--sampler", "euler", "--size", "20,16,12", "--spacing", "1.5,2,3"]
    assert "the model was trained on" not in mixed.run(inference, *argv)
    image = nib.load(mixed.output_dir / "sample_000000.nii.gz")
    assert image.shape == (20, 16, 12) and image.header.get_zooms() == (1.5, 2, 3)
    checkpoint = mixed.checkpoint("diffusion_unet.pt")
    unet, z = (
        mixed.network("diffusion_def", checkpoint["model"]),
        torch.randn(3, 10, 8, 6, generator=torch.Generator().manual_seed(0))[None],
    )
    autoencoder = mixed.network("autoencoder_def", mixed.checkpoint("autoencoder.pt")["model"])
    with torch.no_grad():
        z = z + unet(z, timesteps=torch.tensor([1000.0]), class_labels=torch.tensor([[1.5, 2.0, 3.0]]))
        expected = autoencoder.decode(z / checkpoint["scale_factor"])[0, 0].numpy()
    ((low, high),) = checkpoint["geometry"]["limits"]
    expected = expected * (high - low) + low
    np.testing.assert_allclose(image.get_fdata(), expected, atol=1e-4 * np.ptp(expected))
    record = json.loads((mixed.output_dir / "sample_000000.json").read_text())
    assert record["spacing"] == [1.5, 2, 3] == record["volume"]["spacing"]
    assert "spacing [1.5, 2.0, 3.0], now [1.0, 2.0, 3.0]" in mixed.refused(inference, *argv[:-1], "1,2,3")
    said = mixed.run(inference, "--seed", "3", "--steps", "1", "--spacing", "4,2,3")
    assert "warning: volumes have voxels of 4 x 2 x 3 mm" in said and "warning: volumes cover" in said


def test_its_cache_and_its_resume_change_nothing(mixed):
    """Latents of two shapes from the disk, in two parts."""
    names = ("autoencoder.pt", "split.json")
    cached = copy_of(mixed, mixed.folder.parent / "cached", *names)
    cached.config["diffusion_train"] |= {"latent_cache": True}
    cached.change()
    cached.run(cache_latents)
    for epochs in ("1", "2"):
        cached.run(train_diffusion, "--no-amp", "--set", f"diffusion_train.max_epochs={epochs}")
    message = cached.refused(train_diffusion, "--no-amp", "--set", "data.sizes=null")
    assert 'was trained with data.sizes "own"; the config says null' in message
    a, b = (project.checkpoint("diffusion_unet_last.pt") for project in (mixed, cached))
    assert a["geometry"] == b["geometry"] and a["scale_factor"] == pytest.approx(b["scale_factor"], rel=1e-6)
    assert_weights_close(a["model"], b["model"])
    message = cached.refused(train_diffusion, "--no-amp", "--fresh", "--set", "data.sizes=null")
    assert 'were made with data.sizes "own"; here it is not set' in message


def test_masks_of_several_sizes(mixed):
    """Each with its latents, in two versions; and an image for one, on the mask's own grid."""
    section = {"max_epochs": 1, "batch_size": 2, "augment": {"flip_axes": [0], "versions": 2}}
    mixed.config["controlnet_train"] = section
    mixed.change()
    assert "labels 2, 5 in 3 bits" in mixed.run(train_controlnet, "--no-amp")
    shape, spacing = KINDS[1]
    argv = ["--size", ",".join(map(str, shape)), "--spacing", ",".join(map(str, spacing))]
    mask = mixed.data / "labelsTr/scan_1.nii.gz"
    mixed.run(inference, "--seed", "40", "--steps", "1", "--tries", "0", "--mask", str(mask), *argv)
    label = nib.load(mixed.output_dir / "sample_000040_label.nii.gz")
    np.testing.assert_array_equal(label.get_fdata(), nib.load(mask).get_fdata())
    assert nib.load(mixed.output_dir / "sample_000040.nii.gz").shape == shape


def test_images_that_change_in_each_epoch_have_their_sizes_too(mixed, tmp_path):
    project = copy_of(mixed, tmp_path / "run", "autoencoder.pt", "split.json")
    project.config["data"] |= {"sizes": [[16, 20, 12], [24, 20, 12]]}
    project.config["diffusion_train"] |= {"max_epochs": 1, "augment": {"flip_axes": [0]}}
    project.change()
    said = project.run(train_diffusion, "--no-amp")
    assert "16 x 20 x 12 (" in said and "24 x 20 x 12 (" in said


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"data": {"sizes": [[16, 16, 15]]}}, r"data.sizes: \[16, 16, 15\] does not fit"),
        ({"data": {"sizes": "own"}, "diffusion_train": {"patch_size": [16, 16, 12]}}, "set one of them"),
        ({"conditions": {"spacing": False}}, "data.own_spacing: a model that is not told the spacing"),
        (
            {"conditions": {"spacing": True, "position": [2]}},
            "conditions.position: is for volumes of one size",
        ),
    ],
)
def test_what_does_not_go_together(mixed, tmp_path, changes, what):
    project = copy_of(mixed, tmp_path / "run", "autoencoder.pt", "split.json")
    for section, values in changes.items():
        project.config[section] = project.config[section] | values
    project.config["diffusion_def"] = project.config["diffusion_def"] | {
        "in_channels": 3 + len(project.config["conditions"].get("position", []))
    }
    project.change()
    assert re.search(what, project.refused(train_diffusion, "--no-amp"))


def test_a_spacing_takes_the_place_of_classes(tmp_path):
    project = Project(tmp_path / "run", tmp_path)
    project.config["diffusion_def"] |= {"num_class_embeds": 3}
    project.change(conditions={"spacing": True, "class_labels": "group"})
    assert "num_class_embeds: spacing takes its place" in project.refused(train_diffusion)
