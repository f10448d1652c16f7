"""Images that follow masks: the arithmetic of the ControlNet, and stage 3 through all scripts."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, SHAPE, SPACING, Project, make_data
from test_labels import VALUES, add_labels

import evaluate
import inference
import inpaint as inpaint_script
import train_autoencoder
import train_controlnet
import train_diffusion
from ldm import UserError, configs, quality
from ldm.data.cases import Case
from ldm.data.datasets import VolumeDataset
from ldm.data.labels import without_structure
from ldm.data.preprocessing import Preprocessing, largest_share
from ldm.data.structures import medians
from ldm.diffusion.inpainting import inpaint
from ldm.diffusion.process import NoiseProcess
from ldm.editing import seamless
from ldm.models.control import (
    CONTRAST,
    Controlled,
    bits_of,
    coded,
    contrast_loss,
    control_definition,
    fit_embedding,
    region_weights,
    start_as_unet,
)
from ldm.models.definitions import NETWORKS, instantiate
from ldm.quality import Check, draw_until_fit, seed_again
from ldm.system.ranks import Run
from ldm.training.controlnet import AT_A_TIME, define_control, masks_of, weighted_loss

# ---------------------------------------------------------------- arithmetic


def test_masks_in_bits():
    mask = torch.tensor([0, 1, 5, 6]).reshape(1, 4, 1, 1)
    assert bits_of([1, 5, 6]) == 3 and bits_of([255]) == 8 and bits_of([256]) == 9
    digits = coded(mask, 3)[0, :, :, 0, 0]
    assert digits.T.tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 1, 1]]
    definition = control_definition(unet_of()[1], (2, 2, 2), [3])
    config = CONFIG | {"controlnet_def": definition}
    with pytest.raises(UserError, match="2 bits cannot code label 6"):
        define_control(config, [1, 6])


def test_what_stage_3_does_not_say_is_as_in_stage_2():
    config = configs.completed(
        {"diffusion_train": {"lr": 0.5, "ema_decay": 0.3}, "controlnet_train": {"lr": 0.1}}
    )
    section = config["controlnet_train"]
    assert (section["lr"], section["ema_decay"], section["weighted_loss"]) == (0.1, 0.3, 100)
    assert section["augment"] == config["diffusion_train"]["augment"] and "sample_steps" not in section


def test_a_structure_of_one_voxel_is_weighted():
    """8 x 8 x 8 voxels on 4 x 4 x 4 latents: the voxel's latent and the 17 beside it at a corner of 3."""
    mask = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
    mask[0, 2, 2, 0] = 7  # latent (1, 1, 0): its neighbours are 3 x 3 x 2
    weights = region_weights(mask, [7], 10.0, (4, 4, 4))
    assert weights.shape == (2, 1, 4, 4, 4) and (weights[1] == 1).all()
    assert float(weights[0].mean()) == pytest.approx(1)
    inside = weights[0, 0] > weights[0, 0, 3, 3, 3]
    assert inside.sum() == 18 and inside[:3, :3, :2].all()
    assert float(weights[0, 0, 1, 1, 0] / weights[0, 0, 3, 3, 3]) == pytest.approx(10)


def test_without_labels_the_loss_is_the_plain_one():
    process = NoiseProcess.from_config(configs.completed(CONFIG)["NoiseScheduler"])
    torch.manual_seed(0)
    z0, noise, prediction = torch.randn(3, 2, 3, 4, 4, 4)
    made = {"z0": z0, "noise": noise, "t": torch.full((2,), 300.0)}
    section = configs.completed(CONFIG)["controlnet_train"]
    plain = weighted_loss(process, prediction, made, section, None)
    torch.testing.assert_close(plain, (prediction - process.target(z0, noise, made["t"])).square().mean())
    mask = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
    section = section | {"weighted_loss_label": [3], "weighted_loss": 50.0}
    torch.testing.assert_close(weighted_loss(process, prediction, made, section, mask), plain)


def unet_of(**more) -> torch.nn.Module:
    torch.manual_seed(0)
    definition = CONFIG["diffusion_def"] | {"in_channels": 3, "out_channels": 3} | more
    return instantiate(definition, NETWORKS, "diffusion_def"), definition


def test_at_first_a_controlnet_changes_nothing():
    unet, definition = unet_of()
    torch.nn.init.normal_(unet.out[2].conv.weight)  # MONAI begins with zeros
    definition = control_definition(definition, (2, 2, 2), [1, 5])
    assert definition["conditioning_embedding_in_channels"] == 3
    control = instantiate(definition, NETWORKS, "controlnet_def")
    assert start_as_unet(control, unet) > 20
    both = Controlled(unet, control).eval()
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    x, t, mask = torch.randn(1, 3, 4, 4, 4), torch.tensor([500.0]), torch.rand(1, 3, 8, 8, 8).round()
    with torch.no_grad():
        torch.testing.assert_close(both(x, timesteps=t, mask=mask), unet(x, timesteps=t))
        control.controlnet_mid_block.conv.bias.add_(1)
        assert (both(x, timesteps=t, mask=mask) - unet(x, timesteps=t)).abs().max() > 1e-3


def test_thick_slices():
    """Latents 4 x 4 x 1 times coarser than the mask, of which the network halves two axes."""
    unet, definition = unet_of(level_strides=[[2, 2, 1]])
    control = instantiate(control_definition(definition, (4, 4, 1), [1]), NETWORKS, "controlnet_def")
    fit_embedding(control, (4, 4, 1))
    both, x = Controlled(unet, control).eval(), torch.randn(1, 3, 4, 4, 5)
    start_as_unet(control, unet)
    torch.nn.init.normal_(unet.out[2].conv.weight)
    with torch.no_grad():
        drawn = both(x, timesteps=torch.tensor([500.0]), mask=torch.rand(1, 1, 16, 16, 5).round())
        torch.testing.assert_close(drawn, unet(x, timesteps=torch.tensor([500.0])))


@pytest.mark.parametrize(
    "factor, more, what",
    [
        ((3, 3, 3), {}, "3 x 3 x 3 times coarser.*powers of two"),
        ((2, 2, 2), {"spatial_dims": 2}, "define it for others"),
    ],
)
def test_what_no_controlnet_is_derived_for(factor, more, what):
    with pytest.raises(UserError, match=what):
        control_definition(CONFIG["diffusion_def"] | more, factor, [1])


def test_labels_beyond_8_bits(tmp_path):
    label = np.random.default_rng(0).choice([0, 7, 401, 500], (6, 7, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "a.nii.gz")
    preprocessing = Preprocessing((0,), (1.0, 1.0, 1.0), labels=(7, 401, 500))
    mask = preprocessing.mask(tmp_path / "a.nii.gz")
    assert mask.dtype == np.int16 and np.array_equal(mask, label)
    digits = coded(torch.from_numpy(mask)[None], bits_of([7, 401, 500]))
    assert digits.shape[1] == 9
    assert torch.equal((digits[0] * 2 ** torch.arange(9)[:, None, None, None]).sum(0), torch.tensor(mask))
    coarse = Preprocessing((0,), (2.0, 2.0, 2.0), labels=(7, 401, 500))
    shares = coarse.label_channels(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(coarse.mask(tmp_path / "a.nii.gz"), largest_share(shares, coarse.labels))


def test_masks_of_many_labels_are_made_in_parts(tmp_path):
    """More labels than are in memory at a time, on a coarser grid; the image is never opened."""
    label = np.random.default_rng(0).integers(0, 40, (8, 8, 8)).astype(np.uint8)
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "a.nii.gz")
    preprocessing = Preprocessing((0,), (2.0, 2.0, 2.0))
    case = Case("a", (tmp_path / "missing.nii.gz",), tmp_path / "a.nii.gz")
    values, run = list(range(1, 40)), Run(0, 1, torch.device("cpu"))
    (found,) = masks_of(VolumeDataset([case], preprocessing, (4, 4, 4)), values, run, "masks")
    whole = replace(preprocessing, labels=tuple(values)).mask(case.label)
    assert len(values) > 2 * AT_A_TIME and np.array_equal(found[0], whole)


def test_a_structure_is_replaced():
    mask = np.zeros((1, 1, 7), np.uint8)
    mask[0, 0] = [1, 1, 3, 3, 3, 2, 2]
    assert without_structure(mask, 3, 0)[0, 0].tolist() == [1, 1, 0, 0, 0, 2, 2]
    around = without_structure(mask, 3, "surroundings")[0, 0]
    assert around[[0, 1, 2, 4, 5, 6]].tolist() == [1, 1, 1, 2, 2, 2] and around[3] in (1, 2)
    assert np.array_equal(without_structure(mask, 5, "surroundings"), mask)


def test_the_contrast_term_by_hand():
    """In the first volume one latent of eight is changed, where predictions differ by 0.5, and by 0.1
    elsewhere; the second has nothing to take out."""
    mask = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    mask[0, 0, 0, 0] = 3
    without = torch.zeros(2, 3, 2, 2, 2)
    prediction = without + 0.1
    prediction[0, :, 0, 0, 0] = -0.5
    prediction[1] = 9
    found = contrast_loss(prediction, without, mask, torch.zeros_like(mask))
    assert float(found) == pytest.approx(CONTRAST - 0.5 + 0.1)
    assert float(contrast_loss(prediction, without, mask, mask)) == 0


def test_structures_are_compared_with_those_of_scans():
    image, label = np.zeros((1, 4, 4, 4), np.float32), np.zeros((4, 4, 4), np.uint8)
    label[:2], label[3, 3, 3] = 2, 5
    image[0, :2] = 0.5
    found = medians(image, label, [2, 5, 9])
    assert found[0, 0] == 0.5 and np.isnan(found[1:]).all()  # one voxel is too few
    check = Check({"2": [[0.5, 0.01]], "5": [[0.9, 0.1]]})
    assert check.faults(torch.from_numpy(image), label) == []
    image[0, :2] = 0.6
    (fault,) = check.faults(torch.from_numpy(image), label)
    assert fault == "label 2: median 0.60, in scans 0.42 to 0.58"
    # Label 5 has too few voxels to count, and the segmenter knows no 9.
    segmenter = SimpleNamespace(values=(2, 5), found=label)
    check = Check({}, lambda image: segmenter.found, segmenter.values)
    assert check.faults(torch.from_numpy(image), np.where(label == 5, 9, label)) == []
    segmenter.found = 0 * label
    assert "with Dice 0.00" in check.faults(torch.from_numpy(image), label)[0]


def test_a_sample_is_drawn_until_it_fits():
    asked = []

    def draw(seed: int) -> torch.Tensor:
        asked.append(seed)
        return torch.tensor(len(asked))

    def judge(sample: torch.Tensor) -> list[str]:
        return [] if sample == 2 else ["wrong"]

    assert draw_until_fit(7, torch.tensor(0), draw, judge, 5) == (2, 2, [])
    assert asked == [seed_again(7, 1), seed_again(7, 2)] and len({7, *asked}) == 3
    assert draw_until_fit(7, torch.tensor(0), draw, judge, 1) == (0, 0, ["wrong"])


def test_inpainting_draws_what_the_rest_suggests():
    """Two latents of a normal distribution with correlation 0.9, and its exact denoiser: the one that is
    drawn has the conditional mean, 0.9 of the known one, and its spread."""
    process = NoiseProcess.from_config(configs.completed(CONFIG)["NoiseScheduler"])
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = (level.item() for level in process.levels(t[0]))
        total = a**2 * covariance + s**2 * torch.eye(2)
        z0 = (a * covariance @ torch.linalg.solve(total, x.double().reshape(2, -1))).reshape(x.shape)
        return process.target(z0, (x - a * z0) / s, t)

    count = 4000
    known = torch.full((1, count, 1, 1, 2), 1.5).double()  # channels stand for samples
    region = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 1, 2)

    def by_pairs(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x.squeeze(0).reshape(count, 2).T, t).T.reshape(x.shape)

    drawn = inpaint(by_pairs, process, known, region, 0, 30, 10)
    assert torch.equal(drawn[..., 0], known[..., 0])
    assert drawn[..., 1].mean() == pytest.approx(0.9 * 1.5, abs=0.1)
    assert drawn[..., 1].std() == pytest.approx((1 - 0.9**2) ** 0.5, abs=0.1)


def test_outside_the_region_a_scan_stays():
    scan, drawn = torch.rand(1, 6, 6, 6), torch.full((1, 6, 6, 6), 5.0)
    region = torch.zeros(6, 6, 6, dtype=torch.bool)
    region[1:6, 1:6, 1:6] = True  # at one side up to the border of the volume
    both = seamless(drawn, scan, region, 2.0, [2.0, 2.0, 2.0])
    assert torch.equal(both[:, ~region], scan[:, ~region])
    torch.testing.assert_close(both[0, 3, 3, 3], drawn[0, 3, 3, 3])
    torch.testing.assert_close(both[0, 1, 3, 3], 2.5 + scan[0, 1, 3, 3] / 2)
    assert torch.equal(seamless(drawn, scan, region, 0.0, [2.0] * 3)[:, region], drawn[:, region])
    thick = seamless(drawn, scan, region, 2.0, [2.0, 2.0, 8.0])  # four borders deep along z
    assert thick[0, 3, 3, 1] == drawn[0, 3, 3, 1] and thick[0, 1, 3, 3] != drawn[0, 1, 3, 3]


# ---------------------------------------------------------------- all scripts

UNCHECKED = ["--steps", "2", "--tries", "0"]  # an untrained network fits no label


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """All three stages, the second with autoguidance and a covariate; two samples of one mask."""
    folder = tmp_path_factory.mktemp("control")
    project = Project(folder / "run", make_data(folder / "data"))
    add_labels(project.data)
    project.config["autoencoder_train"] |= {"max_epochs": 4, "adversarial_weight": 0}
    project.config["diffusion_train"] |= {"max_epochs": 4, "snapshot": 0.3, "autoguidance": 1.5}
    project.config["conditions"] = {"covariates": {"age": "number"}}
    project.config["intensity"] = {"window": [-10, 8000], "whole_numbers": True}
    project.change(
        controlnet_train={
            "batch_size": 2,
            "max_epochs": 6,
            "val_interval": 2,
            "lr_schedule": "constant",
            "lr": 1e-2,
            "ema_decay": 0.5,
            "optimizer": "muon",
            "weighted_loss_label": [5],
            "contrast_weight": 0.01,
            "contrast_remove": {"5": "surroundings"},
            "augment": {"flip_axes": [0], "versions": 2},
        }
    )
    project.run(train_autoencoder, "--no-amp")
    project.run(train_diffusion, "--no-amp")
    project.before = {path.name: path.read_bytes() for path in project.model_dir.glob("*.pt")}
    project.printed["controlnet"] = project.run(train_controlnet, "--no-amp", "--set", "spacing=null")
    mask = project.data / "labelsTr/scan_1.nii.gz"
    project.printed["inference"] = project.run(
        inference, "--num", "2", *UNCHECKED, "--mask", str(mask), "--condition", "age=22"
    )
    return project


def test_the_diffusion_model_is_not_changed(project):
    for name, content in project.before.items():
        assert (project.model_dir / name).read_bytes() == content
    checkpoint = project.checkpoint("controlnet.pt")
    assert checkpoint["label_values"] == VALUES and "labels 2, 5 in 3 bits" in project.printed["controlnet"]
    assert checkpoint["model"]["controlnet_mid_block.conv.weight"].abs().max() > 0
    losses = [entry["val_loss"] for entry in project.log("controlnet") if "val_loss" in entry]
    assert len(losses) == 4 and checkpoint["best"] == pytest.approx(min(losses))


def test_resume_is_exact(project):
    other = Project(
        project.folder.parent / "again", project.data, config=json.loads(project.config_file.read_text())
    )
    other.model_dir.mkdir(parents=True)
    for name in ("autoencoder.pt", "diffusion_unet.pt", "split.json"):
        (other.model_dir / name).write_bytes((project.model_dir / name).read_bytes())
    for epochs in ("2", "6"):
        said = other.run(train_controlnet, "--no-amp", "--set", f"controlnet_train.max_epochs={epochs}")
    assert "config: controlnet_train.max_epochs 6, was 2\n" in said
    whole, parts = (one.checkpoint("controlnet_last.pt")["model"] for one in (project, other))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_mask_is_written_beside_the_image(project):
    assert "2 volumes and their labels" in project.printed["inference"]
    given = nib.load(project.data / "labelsTr/scan_1.nii.gz").get_fdata()
    image, label = (nib.load(project.output_dir / f"sample_000001{end}.nii.gz") for end in ("", "_label"))
    np.testing.assert_array_equal(label.get_fdata(), given)
    assert image.shape == SHAPE and np.array_equal(image.affine, label.affine)
    assert image.get_data_dtype() == np.int16 and len(np.unique(image.dataobj)) > 100
    record = json.loads((project.output_dir / "sample_000001.json").read_text())
    assert record["mask"]["path"].endswith("scan_1.nii.gz") and len(record["controlnet"]["sha256"]) == 64
    again = ["--num", "2", *UNCHECKED, "--condition", "age=22", "--mask"]
    assert "2 of 2 volumes already exist" in project.run(inference, *again, record["mask"]["path"])
    other = [*again, str(project.data / "labelsTr/scan_2.nii.gz")]
    assert "another mask" in project.refused(inference, *other)


def test_the_image_follows_the_mask(project):
    """The same seed under masks of a folder, in turn; and without one."""
    argv = [*UNCHECKED, "--condition", "age=22"]
    project.run(inference, "--seed", "10", "--mask", str(project.data / "labelsTr"), *argv)
    assert (project.output_dir / "sample_000015.nii.gz").is_file()  # one for each of six
    project.set_environment(output_dir=str(project.folder / "plain"))
    project.run(inference, "--seed", "10", *argv)
    project.set_environment(output_dir=str(project.folder / "other"))
    project.run(inference, "--seed", "10", "--mask", str(project.data / "labelsTr/scan_5.nii.gz"), *argv)
    project.set_environment()
    volumes = [
        nib.load(folder / "sample_000010.nii.gz").get_fdata()
        for folder in (project.output_dir, project.folder / "plain", project.folder / "other")
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(volumes[i] - volumes[j]).max() >= 1


def test_a_sample_of_a_mask_is_reproduced(project, tmp_path, capsys):
    for end in (".json", ".nii.gz", "_label.nii.gz"):
        (tmp_path / f"sample_000001{end}").write_bytes(
            (project.output_dir / f"sample_000001{end}").read_bytes()
        )
    inference.main(["--reproduce", str(tmp_path / "sample_000001.json")])
    assert capsys.readouterr().out.count("byte-identical to the recorded") == 2
    for path in [*tmp_path.glob("*_reproduced*"), tmp_path / "sample_000001_label.nii.gz"]:
        path.unlink()
    with pytest.raises(SystemExit):
        inference.main(["--reproduce", str(tmp_path / "sample_000001.json")])
    assert "no such mask" in capsys.readouterr().err


def test_samples_that_do_not_fit_are_set_apart(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "WIDTH", -1.0)  # nothing fits
    project.set_environment(output_dir=str(tmp_path / "samples"))
    argv = ["--steps", "2", "--tries", "2", "--condition", "age=22", "--mask"]
    argv = [*argv, str(project.data / "labelsTr/scan_1.nii.gz")]
    said = project.run(inference, *argv)
    assert "sample_000000.nii.gz: drawn 2 times, label 2: median" in said
    assert "1 of 1 volumes do not fit their labels" in said
    record = json.loads((tmp_path / "samples/failed/sample_000000.json").read_text())
    assert record["batch"] == [seed_again(0, 1)] == [record["again"]["seed"]] and record["faults"]
    assert not (tmp_path / "samples/sample_000000.nii.gz").exists()
    assert "1 of 1 volumes already exist" in project.run(inference, *argv)
    assert "differs: check" in project.refused(inference, *argv[:3], "3", *argv[4:])
    project.set_environment()
    capsys.readouterr()
    inference.main(["--reproduce", str(tmp_path / "samples/failed/sample_000000.json")])
    assert capsys.readouterr().out.count("byte-identical to the recorded") == 2


def test_a_region_of_a_scan_is_redrawn(project, tmp_path):
    scan, region = project.data / "imagesTr/scan_2.nii.gz", np.zeros(SHAPE)
    region[5:10, 6:12, 3:8] = 1
    save(tmp_path / "region.nii.gz", region)
    argv = ["--scan", str(scan), "--region", str(tmp_path / "region.nii.gz"), "--out", str(tmp_path / "out")]
    argv += ["--steps", "2", "--condition", "age=22"]
    mask = ["--mask", str(project.data / "labelsTr/scan_2.nii.gz"), "--num", "2", "--tries", "0"]
    assert "2 of 2 written" in project.run(inpaint_script, *argv, *mask)
    before, *drawn = (
        nib.load(tmp_path / f"out/scan_2_{end}.nii.gz").get_fdata() for end in ("scan", "seed-0", "seed-1")
    )
    for volume in drawn:
        np.testing.assert_array_equal(volume[region == 0], before[region == 0])
        assert np.abs(volume - before)[region > 0].max() > 1e-2 * np.ptp(before)
    assert not np.array_equal(*drawn) and (tmp_path / "out/scan_2.png").is_file()
    assert "exists. Move it away" in project.refused(inpaint_script, *argv)
    save(tmp_path / "region.nii.gz", np.zeros(SHAPE))
    argv[5] = str(tmp_path / "other")
    assert "has no voxel above 0" in project.refused(inpaint_script, *argv)
    assert "follows a mask" in project.refused(inpaint_script, *argv, "--controlnet", "x.pt")


def test_masks_are_chosen_by_size_and_changed_by_the_seed(project, tmp_path, capsys):
    """The mask with the most of label 5; deformed, with 5 moved within 2, and drawn again from its file."""
    project.set_environment(output_dir=str(tmp_path))
    folder = project.data / "labelsTr"
    argv = [*UNCHECKED, "--condition", "age=22", "--mask", str(folder)]
    said = project.run(inference, "--seed", "60", *argv, "--structure-size", "5=1", "--augment-masks")
    sizes = {path.name: (nib.load(path).get_fdata() == 5).sum() for path in folder.glob("*.nii.gz")}
    assert f"mask of seed 60: {max(sizes, key=sizes.get)}, 5 1.00 (asked for 1.00)" in said
    record = json.loads((tmp_path / "sample_000060.json").read_text())
    assert record["mask"]["augmented"] is True and not (tmp_path / "sample_000061.nii.gz").exists()
    label = nib.load(tmp_path / "sample_000060_label.nii.gz").get_fdata()
    assert {*np.unique(label)} == {0, 2, 5}
    assert (label != nib.load(record["mask"]["path"]).get_fdata()).any()
    again = project.refused(inference, "--seed", "60", *argv, "--structure-size", "5=1")
    assert "another mask" in again
    inference.main(["--reproduce", str(tmp_path / "sample_000060.json")])
    assert capsys.readouterr().out.count("byte-identical to the recorded") == 2
    for more, what in (
        (["--structure-size", "core=1"], "NAME being the value of a label, such as 3"),
        (["--move", "5"], "expected LABEL:WITHIN"),
        (["--move", "5:9"], "has no voxel of 9"),
    ):
        assert what in project.refused(inference, "--seed", "61", *argv, *more)
    assert "Give one by --mask" in project.refused(inference, "--augment-masks")
    project.set_environment()


def test_pairs_from_sizes_in_one_command(project, tmp_path):
    """A mask model of the same labels, of voxels, draws the masks."""
    masks = Project(tmp_path / "masks", project.data, config=json.loads(project.config_file.read_text()))
    del masks.config["autoencoder_def"]
    masks.config["diffusion_train"] |= {"max_epochs": 1, "snapshot": None, "autoguidance": 1, "augment": {}}
    conditions = {"structure_sizes": {"core": 5}}
    voxels = {"diffusion_space": "pixel", "latent_channels": len(VALUES)}
    masks.change(with_labels="only", label_values=VALUES, conditions=conditions, **voxels)
    masks.run(train_autoencoder, "--no-amp")
    masks.run(train_diffusion, "--no-amp")
    project.set_environment(output_dir=str(tmp_path / "images"))
    argv = ["--mask-model", str(masks.environment_file), "--num", "2", "--seed", "80", *UNCHECKED]
    said = project.run(inference, *argv, "--structure-size", "core=0.5", "--condition", "age=22")
    assert "2 label maps in" in said and "2 volumes and their labels in" in said
    asked = json.loads((masks.output_dir / "sample_000081_label.json").read_text())["condition"]["core"]
    low, high = masks.checkpoint("diffusion_unet.pt")["conditions"]["covariates"]["columns"]["core"]
    assert float(asked) == pytest.approx((low + high) / 2, rel=1e-5)
    drawn, used = (
        nib.load(folder / "sample_000081_label.nii.gz").get_fdata()
        for folder in (masks.output_dir, tmp_path / "images")
    )
    np.testing.assert_array_equal(drawn, used)
    message = project.refused(inference, "--mask-model", str(project.environment_file))
    assert "its model draws images" in message
    project.set_environment()


def test_the_background_is_cleared(project, tmp_path):
    project.set_environment(output_dir=str(tmp_path))
    mask = str(project.data / "labelsTr/scan_1.nii.gz")
    project.run(inference, *UNCHECKED, "--condition", "age=22", "--mask", mask, "--clear-background")
    project.set_environment()
    image, label = (
        np.asarray(nib.load(tmp_path / f"sample_000000{end}.nii.gz").dataobj) for end in ("", "_label")
    )
    assert (image[label == 0] == -10).all() and (image[label > 0] != -10).mean() > 0.9
    inference.main(["--reproduce", str(tmp_path / "sample_000000.json")])
    assert (tmp_path / "sample_000000_reproduced.nii.gz").read_bytes() == (
        tmp_path / "sample_000000.nii.gz"
    ).read_bytes()


def test_evaluation_takes_samples_of_masks(project, tmp_path):
    project.run(evaluate, "--segmentation", "2", "--out", str(tmp_path / "page"))
    rows = {one["key"] for one in json.loads((tmp_path / "page/metrics.json").read_text())["figures"]}
    assert "dice_generated_mean" in rows


def save(path, voxels):
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.diag([*SPACING, 1])), path)
    return ["--seed", "90", *UNCHECKED, "--mask", str(path)]


def test_bad_masks(project, tmp_path):
    for voxels, what in (
        (np.full(SHAPE, 3), r"labels that the ControlNet was not trained on \(3\). It knows 2, 5"),
        (np.zeros(SHAPE), "is empty; no mask that the ControlNet was trained on was"),
    ):
        assert re.search(what, project.refused(inference, *save(tmp_path / "m.nii.gz", voxels)))
    assert "no such file" in project.refused(inference, "--mask", str(tmp_path / "none.nii.gz"))
    assert "Give one by --mask" in project.refused(inference, "--controlnet", "x.pt")
    wide = np.zeros((40, *SHAPE[1:]))
    wide[2:4], wide[20] = 2, 5
    assert "voxels lie outside of the volumes" in project.run(
        inference, *save(tmp_path / "wide.nii.gz", wide)
    )


def test_what_a_controlnet_needs(project, tmp_path):
    assert "draws labels itself" in project.refused(
        train_controlnet,
        "--set",
        "with_labels=true",
        "--set",
        "label_values=[2,5]",
        "--set",
        "autoencoder_def.in_channels=3",
        "--set",
        "autoencoder_def.out_channels=3",
    )
    for override, what in (
        ("label_values=[2]", "was trained with label_values null"),
        ("controlnet_train.weighted_loss_label=[7]", "7 not among the labels, 2, 5"),
        ('controlnet_train.contrast_remove={"5": 7}', "contrast_remove: 7 not among the labels"),
        ("controlnet_train.contrast_weight=0", "set contrast_weight and contrast_remove, or neither"),
        ("controlnet_train.augment.versions=null", "set versions"),
    ):
        assert what in project.refused(train_controlnet, "--no-amp", "--set", override)
    without = Project(tmp_path / "run", make_data(tmp_path / "data"), config=project.config)
    without.model_dir.mkdir()
    assert "Run train_autoencoder.py first" in without.refused(train_controlnet)
    for name in ("autoencoder.pt", "diffusion_unet.pt"):
        (without.model_dir / name).write_bytes((project.model_dir / name).read_bytes())
    assert "cases have no label" in without.refused(train_controlnet, "--no-amp")
    mask = ["--mask", str(project.data / "labelsTr/scan_1.nii.gz")]
    assert "Run train_controlnet.py first" in without.refused(inference, *mask)
    checkpoint = project.checkpoint("controlnet.pt")
    torch.save({**checkpoint, "unet": "0" * 64}, without.model_dir / "controlnet.pt")
    assert "was trained on another diffusion model" in without.refused(inference, *mask)
