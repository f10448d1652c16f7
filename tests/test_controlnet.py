"""Images that follow masks: the arithmetic of the ControlNet, and stage 3 through all scripts."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, SHAPE, SPACING, Project, make_data
from test_labels import VALUES, add_labels

import evaluate
import inference
import train_autoencoder
import train_controlnet
import train_diffusion
from ldm import UserError, configs
from ldm.diffusion.process import NoiseProcess
from ldm.models.control import (
    Controlled,
    bits_of,
    coded,
    control_definition,
    region_weights,
    start_as_unet,
)
from ldm.models.definitions import NETWORKS, instantiate
from ldm.training.controlnet import define_control, weighted_loss

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


@pytest.mark.parametrize(
    "factor, more, what",
    [
        ((4, 4, 2), {}, "4 x 4 x 2 times coarser"),
        ((3, 3, 3), {}, "a power of two"),
        ((2, 2, 2), {"level_strides": [[2, 2, 1]]}, "define it for others"),
    ],
)
def test_what_no_controlnet_is_derived_for(factor, more, what):
    with pytest.raises(UserError, match=what):
        control_definition(CONFIG["diffusion_def"] | more, factor, [1])


# ---------------------------------------------------------------- all scripts


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """All three stages, the second with autoguidance and a covariate; two samples of one mask."""
    folder = tmp_path_factory.mktemp("control")
    project = Project(folder / "run", make_data(folder / "data"))
    add_labels(project.data)
    project.config["autoencoder_train"] |= {"max_epochs": 4, "adversarial_weight": 0}
    project.config["diffusion_train"] |= {"max_epochs": 4, "snapshot": 0.3, "autoguidance": 1.5}
    project.config["conditions"] = {"covariates": {"age": "number"}}
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
            "augment": {"flip_axes": [0], "versions": 2},
        }
    )
    project.run(train_autoencoder, "--no-amp")
    project.run(train_diffusion, "--no-amp")
    project.before = {path.name: path.read_bytes() for path in project.model_dir.glob("*.pt")}
    project.printed["controlnet"] = project.run(train_controlnet, "--no-amp", "--set", "spacing=null")
    mask = project.data / "labelsTr/scan_1.nii.gz"
    project.printed["inference"] = project.run(
        inference, "--num", "2", "--steps", "2", "--mask", str(mask), "--condition", "age=22"
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
    record = json.loads((project.output_dir / "sample_000001.json").read_text())
    assert record["mask"]["path"].endswith("scan_1.nii.gz") and len(record["controlnet"]["sha256"]) == 64
    again = ["--num", "2", "--steps", "2", "--mask", record["mask"]["path"], "--condition", "age=22"]
    assert "2 of 2 volumes already exist" in project.run(inference, *again)
    other = [*again[:5], str(project.data / "labelsTr/scan_2.nii.gz"), *again[6:]]
    assert "another mask" in project.refused(inference, *other)


def test_the_image_follows_the_mask(project):
    """The same seed under masks of a folder, in turn; and without one."""
    argv = ["--steps", "2", "--condition", "age=22"]
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
        assert np.abs(volumes[i] - volumes[j]).max() > 1e-3 * np.ptp(volumes[0])


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


def test_masks_are_chosen_by_size_and_changed_by_the_seed(project, tmp_path, capsys):
    """The mask with the most of label 5; deformed, with 5 moved within 2, and drawn again from its file."""
    project.set_environment(output_dir=str(tmp_path))
    folder = project.data / "labelsTr"
    argv = ["--steps", "1", "--condition", "age=22", "--mask", str(folder)]
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
    argv = ["--mask-model", str(masks.environment_file), "--num", "2", "--seed", "80", "--steps", "1"]
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


def test_evaluation_takes_samples_of_masks(project, tmp_path):
    project.run(evaluate, "--segmentation", "2", "--out", str(tmp_path / "page"))
    rows = {one["key"] for one in json.loads((tmp_path / "page/metrics.json").read_text())["figures"]}
    assert "dice_generated_mean" in rows


def save(path, voxels):
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.diag([*SPACING, 1])), path)
    return ["--seed", "90", "--steps", "2", "--mask", str(path)]


def test_bad_masks(project, tmp_path):
    for voxels, what in (
        (np.full(SHAPE, 3), r"labels that the ControlNet was not trained on \(3\). It knows 2, 5"),
        (np.zeros(SHAPE), "has no labelled voxel"),
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
