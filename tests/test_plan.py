"""plan.py: rules by hand, plans of several data sets, what is kept and refused."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import plan as script
import utils
from ldm import UserError
from ldm.data import nnunet
from ldm.data.cases import Case
from ldm.data.fingerprint import fingerprint
from ldm.losses import AutoencoderLoss
from ldm.planning.choices import make_plan
from ldm.planning.geometry import grids_of, padded, shrunk, strides_for, target_spacing, unet_strides
from ldm.planning.memory import USED, fit_autoencoder, peaks_of
from ldm.planning.plan import Machine
from ldm.training.memory import GB, PARTS, Peak, highest


def described(shape=(80, 96, 80), spacing=(2.0, 2.0, 2.0), count=60, **more) -> dict:
    """A fingerprint."""
    properties = dict.fromkeys(
        ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0
    )
    return {
        "spacings": [list(spacing)] * count,
        "shapes": [list(shape)] * count,
        "shapes_after_crop": [list(shape)] * count,
        "median_share_not_zero": 1.0,
        "foreground_intensity_properties_per_channel": {"0": properties},
        "labels": 0,
        "label_values": [],
        "nan": 0,
        "subjects": count,
        "symmetry": 0.9,
    } | more


def planned(found: dict, gigabytes: float = 16, gpu: bool = True, **how):
    return make_plan(found, {0: "T1w"}, Machine(round(gigabytes * GB), gpu), **how)


@pytest.fixture
def forecast(monkeypatch):
    """`forecast(gigabytes)`: every peak is that, without a rehearsal, which takes seconds."""

    def is_always(gigabytes: float) -> None:
        peaks = {"training": Peak(dict.fromkeys(PARTS, 0) | {"weights": round(gigabytes * GB)})}
        monkeypatch.setattr("ldm.planning.memory.peaks_of", lambda made, stage, machine: dict(peaks))

    return is_always


# ---------------------------------------------------------------- rules


def test_labels_are_drawn_with_images(forecast):
    forecast(1)
    config = planned(described(label_values=[1, 3]), with_labels=True).checked()
    assert config["label_values"] == [1, 3] and config["volume_channels"] == 3
    assert config["autoencoder_def"]["in_channels"] == 3 and config["latent_channels"] == 8
    by_hand = {"with_labels": ("only", "changed by hand")}
    alone = planned(described(label_values=[1, 3]), with_labels=True, overrides=by_hand).checked()
    assert alone["volume_channels"] == alone["autoencoder_def"]["in_channels"] == 2
    plain = planned(described(label_values=[1, 3])).checked()
    assert not plain["with_labels"] and plain["latent_channels"] == 4
    assert plain["data"]["val_fraction"] == 0.2
    assert planned(described(count=500)).checked()["data"]["val_fraction"] == 0.1


def test_spacing_is_the_median_but_finer_along_thick_slices():
    spacings = np.array([[0.5, 0.5, 6.0]] * 8 + [[0.5, 0.5, 3.0]] * 2)
    shapes = np.array([[400, 400, 30]] * 10)
    spacing, why = target_spacing(spacings, shapes)
    assert spacing == [0.5, 0.5, 3.0] and "10th percentile" in why
    assert target_spacing(spacings, np.array([[60, 60, 30]] * 10))[0] == [0.5, 0.5, 6.0]  # as many voxels
    assert target_spacing(np.array([[1, 1, 0.25]] * 9 + [[1, 1, 0.5]]), shapes)[0] == [1, 1, 0.25]


def test_thick_slices_are_halved_late():
    assert strides_for([0.5, 0.5, 2.0], [256, 256, 32], 3) == [[2, 2, 1], [2, 2, 1], [2, 2, 2]]
    assert strides_for([1, 1, 1], [64, 64, 6], 1) == [[2, 2, 1]]  # 6 voxels would become 3
    assert unet_strides([2, 2, 2], [80, 96, 80], [[2, 2, 2]], 2) == [[2, 2, 2]] * 2
    # 12 voxels become 6, which cannot be halved again and hold up no other axis
    assert unet_strides([1, 1, 1], [256, 256, 12], [[2, 2, 2], [2, 2, 1]], 2) == [[2, 2, 1]] * 2
    # 36 x 52 x 36 is divided by 4; by 8 it would be padded by 43 %
    assert unet_strides([1, 1, 1], [35, 51, 35], [[2, 2, 2]], 2) == [[2, 2, 2]]
    assert padded([35, 51, 35], [[2, 2, 2], [2, 2, 1]]) == [36, 52, 36]
    assert grids_of([36, 52, 36], [[2, 2, 2]], [[2, 2, 1]]) == [[18, 26, 18], [9, 13, 18]]


def test_a_patch_shrinks_along_its_longest_side():
    assert shrunk([80, 96, 40], [1, 1, 3], [4, 4, 4]) == [80, 96, 32]
    assert shrunk([16, 16, 16], [1, 1, 1], [4, 4, 4]) == [16, 16, 16]


def test_fingerprint_of_known_volumes(tmp_path):
    """Nearly symmetric volumes in one frame, half of them empty, one with NaN; a label of known values."""
    x = np.linspace(-1, 1, 20)[:, None, None]
    cases = []
    for i in range(4):
        voxels = np.zeros((20, 24, 16), np.float32)
        voxels[:, 4:16] = 100 + 50 * np.cos(3 * x) + np.arange(12)[:, None]
        label = np.zeros(voxels.shape, np.uint8)
        label[5:10, 6:8, 3:9] = 1
        voxels[label > 0] = 7 + i
        if i == 3:
            voxels[0, 0, 0] = np.nan
        for name, array in (("image", voxels), ("label", label)):
            nib.save(nib.Nifti1Image(array, np.diag([-1.0, 1.5, 2, 1])), tmp_path / f"{name}{i}.nii.gz")
        cases.append(Case(f"c{i}", (tmp_path / f"image{i}.nii.gz",), tmp_path / f"label{i}.nii.gz", f"s{i}"))
    found = fingerprint(cases)
    assert found["spacings"] == [[1, 1.5, 2]] * 4 and found["shapes"] == [[20, 24, 16]] * 4
    assert found["shapes_after_crop"] == [[20, 12, 16]] * 4
    assert found["median_relative_size_after_cropping"] == found["median_share_not_zero"] == 0.5
    inside = found["foreground_intensity_properties_per_channel"]["0"]
    assert (inside["mean"], inside["median"], inside["min"], inside["max"]) == (8.5, 8.5, 7, 10)
    assert (found["labels"], found["nan"], found["subjects"]) == (4, 1, 4)
    assert 0.8 < found["symmetry"] < 1
    json.dumps(found)
    nib.save(nib.Nifti1Image(np.zeros((20, 24, 8), np.uint8), np.eye(4)), tmp_path / "label0.nii.gz")
    with pytest.raises(UserError, match=r"label0.nii.gz: lies on another grid than .*image0.nii.gz"):
        fingerprint(cases)


# ---------------------------------------------------------------- plans


def test_a_plan_fits_and_is_the_largest_that_does(forecast, monkeypatch):
    """Stage 1 stays within 90 % of the memory by the real forecast; with twice the width it does not."""
    forecast(0.1)
    made, machine = planned(described((48, 64, 48), (1.0, 1.0, 1.0))), Machine(round(0.35 * GB), True)
    monkeypatch.undo()
    fit_autoencoder(made, machine, [1.0, 1.0, 1.0])
    config = made.checked()
    assert highest(peaks_of(made, "autoencoder_train", machine)).total <= USED * machine.memory
    width = config["autoencoder_def"]["channels"][0]
    made.set("autoencoder_def.channels", [2 * width, 4 * width])
    assert width < 64 and highest(peaks_of(made, "autoencoder_train", machine)).total > USED * machine.memory
    assert config["diffusion_train"]["batch_size"] * config["diffusion_train"]["accumulate_steps"] == 8
    assert set(made.why) >= {"spacing", "diffusion_def.channels", "autoencoder_train.patch_size"}
    assert config["autoencoder_train"]["augment"]["flip_axes"] == [0]


def test_plans_follow_the_data(forecast):
    forecast(0.1)
    thick = planned(described((256, 256, 24), (0.5, 0.5, 6.0), symmetry=0.5), 8).checked()
    assert thick["autoencoder_def"]["level_strides"] == [[2, 2, 1], [2, 2, 1]]
    assert thick["autoencoder_train"]["initialise"] == "random"
    assert thick["autoencoder_train"]["augment"]["flip_axes"] == []
    assert thick["diffusion_train"]["augment"]["flip_axes"] == []
    small = described((40, 40, 40), (1.0, 1.0, 1.0))
    haar = planned(small, space="haar").checked()
    assert haar["autoencoder_def"]["levels"] == 1 and haar["latent_channels"] == 8
    voxels = planned(small, space="pixel").checked()
    assert voxels["diffusion_space"] == "pixel" and voxels["diffusion_def"]["out_channels"] == 1
    for config in (haar, voxels, thick):
        AutoencoderLoss(config["autoencoder_train"], None)  # needs no weights from elsewhere
    ct = make_plan(small, {0: "CT"}, Machine(8 * 10**9, True)).checked()
    assert ct["intensity"]["window"] == [-1000, 1000]
    empty = planned(described((40, 40, 40), median_share_not_zero=0.3)).checked()
    assert empty["intensity"]["nonzero"] is True
    slow = planned(small, gpu=False).checked()
    assert slow["diffusion_def"]["channels"][0] == 64 and slow["latent_channels"] == 8  # halved twice
    hour = make_plan(described((80, 96, 80), (2.0, 2.0, 2.0)), {0: "T1"}, Machine(8 * 10**9, False, 10.0))
    assert hour.config["spacing"] == [3.67] * 3 and "10,000 voxels" in hour.why["spacing"]
    slow = planned(small, space="pixel", gpu=False).checked()["diffusion_def"]
    assert slow["channels"][0] == slow["num_head_channels"][0] == 16


def test_what_the_user_sets_decides_what_follows_from_it(forecast):
    """Sizes follow from the spacing, epochs from the batch, validations from the epochs; a window takes the
    place of the percentiles."""
    forecast(0.1)
    given = {"spacing": [4.0, 4.0, 4.0], "diffusion_train.batch_size": 2, "diffusion_train.max_epochs": 200}
    given |= {"intensity.window": [0, 500]}
    config = planned(described(), overrides={key: (value, "given") for key, value in given.items()}).checked()
    assert config["diffusion_train"]["patch_size"] == [40, 48, 40]
    assert config["diffusion_train"]["val_interval"] == 5 and config["intensity"]["window"] == [0, 500]


def test_where_decoding_does_not_fit_no_samples_are_drawn_in_training(monkeypatch):
    def peaks(made, stage, machine):
        sizes = {"training": 1.0, "encoding": 20.0, "sampling": 30.0}
        return {k: Peak(dict.fromkeys(PARTS, 0) | {"weights": round(v * GB)}) for k, v in sizes.items()}

    def fits(made, stage, machine):
        return True

    monkeypatch.setattr("ldm.planning.memory.peaks_of", peaks)
    monkeypatch.setattr("ldm.planning.memory._fits", fits)
    made = planned(described(), 16, space="haar")
    assert (
        made.config["diffusion_train"]["latent_cache"]
        and made.config["diffusion_train"]["sample_interval"] == 0
    )
    commands = "\n".join(
        script.next_commands(Path("c.json"), Path("e.json"), made, Machine(16 * 10**9, True))
    )
    assert "cache_latents.py -c c.json -e e.json --max-memory 16" in commands
    assert "inference.py -c c.json -e e.json --num 8 --max-memory 16" in commands


def test_a_2d_plan_knows_its_slices(forecast):
    forecast(0.1)
    config = planned(described((60, 50, 31), (1.0, 1.0, 4.0)), dims=2).checked()
    assert config["diffusion_train"]["patch_size"] == [64, 56, 31] and config["spatial_dims"] == 2
    assert config["conditions"]["position"] == [2] and config["diffusion_def"]["in_channels"] == 8


def test_what_does_not_fit_is_said(forecast):
    forecast(3.0)
    with pytest.raises(UserError) as error:
        planned(described((240, 240, 160), (1.0, 1.0, 1.0)), 2)
    assert str(error.value) == (
        "2 GB are too little for autoencoder_train at 1 x 1 x 1 mm: the smallest networks take 3.0 GB.\n"
        "Try a coarser --spacing, or 4 GB."
    )


# ---------------------------------------------------------------- the script


@pytest.fixture
def data(tmp_path, write_image):
    root = tmp_path / "Dataset007_Cubes"
    for i in range(6):
        rng = np.random.default_rng(i)
        write_image(root / f"imagesTr/cube{i}_0000.nii.gz", rng.random((24, 28, 24), np.float32) + 1)
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2"}, "file_ending": ".nii.gz"}))
    return root


def run(*arguments):
    script.main([str(one) for one in (*arguments, "-j", 1)])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_plan_is_written_explained_and_keeps_changes(data, tmp_path, capsys, monkeypatch, forecast):
    """By the number of the data set; planned again, a change by hand stays, and is named."""
    forecast(0.1)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    path = tmp_path / "out/config.json"
    how = ("--data", 7, "--cpu-memory", 4, "--config-out", path, "--minutes", 2)
    run(*how, "--set", "diffusion_train.lr=0.002")
    said = capsys.readouterr().out
    config = json.loads(path.read_text())
    assert config["diffusion_train"]["lr"] == 0.002
    assert config["_why"]["diffusion_train.lr"] == "set on the command line"
    assert f"python train_diffusion.py -c {path} -e {path.with_name('environment.json')}" in said
    environment = json.loads(path.with_name("environment.json").read_text())
    assert environment["data_base_dir"] == str(data)
    assert json.loads(path.with_name("dataset_fingerprint.json").read_text())["subjects"] == 6
    checked = utils.load_config(path)
    assert (
        "_why" not in checked
        and checked["spacing"] == [1, 1, 1]
        and checked["diffusion_train"]["max_minutes"] == 1.5
    )
    del config["diffusion_train"]["clip_grad_norm"]
    path.write_text(json.dumps(config | {"seed": 5}))
    for _ in range(2):
        run(*how)
        again, said = json.loads(path.read_text()), capsys.readouterr().out
        assert again["seed"] == 5 and again["diffusion_train"]["lr"] == 0.002
        assert "clip_grad_norm" not in again["diffusion_train"]
        changed = "diffusion_train.lr, seed, diffusion_train.clip_grad_norm"
        assert f"kept as changed by hand in {path}: {changed}" in said
    path.with_name("config_planned.json").unlink()
    assert "is there already, and was not planned" in refused(capsys, *how)
    path.unlink()
    path.with_name("environment.json").write_text(json.dumps(environment | {"data_base_dir": "/other"}))
    assert f"names the data /other, not {data}" in refused(capsys, *how)


def test_bad_input_of_the_planner(data, tmp_path, capsys, monkeypatch, write_image):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    (tmp_path / "empty").mkdir()
    how = ("--gpu-memory", 8, "--config-out", tmp_path / "out/config.json")
    assert "expected one folder Dataset004_*, found none" in refused(capsys, "--data", 4, *how)
    assert "no image" in refused(capsys, "--data", tmp_path / "empty", *how)
    assert "--channels 2: the images have 1 channel, from 0 on." in refused(
        capsys, "--data", data, *how, "--channels", 2
    )
    other = tmp_path / "nnUNetPlans.json"
    other.write_text(
        json.dumps({"dataset_name": "Dataset001_X", "transpose_backward": [0, 1, 2], "configurations": {}})
    )
    assert "is for the data set Dataset001_X, not for Dataset007_Cubes" in refused(
        capsys, "--data", data, *how, "--plans", other
    )
    write_image(data / "imagesTr/cube1_0000.nii.gz", np.ones((24, 28, 24, 2), np.float32))
    assert "has 2 channel(s), " in refused(capsys, "--data", data, *how)
    monkeypatch.delenv("nnUNet_raw")
    assert "a number names a data set in $nnUNet_raw, which is not set" in refused(capsys, "--data", 4, *how)
    assert not (tmp_path / "out").exists()


def test_plans_of_nnunet_are_followed(tmp_path, forecast):
    """Axes are transposed and in SimpleITK's order there; a configuration inherits from another."""
    image = tmp_path / "a.nii.gz"
    affine = np.zeros((4, 4))
    affine[[1, 0, 2, 3], range(4)] = (0.7, 0.8, 5, 1)  # the first axis of the file runs forwards
    nib.save(nib.Nifti1Image(np.zeros((30, 40, 10), np.uint8), affine), image)
    # In the file 0.7 x 0.8 x 5; SimpleITK reads (5, 0.8, 0.7); with the second axis in front: (0.8, 5, 0.7)
    content = {
        "dataset_name": "Dataset002_Y",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "foreground_intensity_properties_per_channel": {
            "0": {"percentile_00_5": -20, "percentile_99_5": 300}
        },
        "configurations": {
            "base": {
                "spacing": [0.8, 5, 0.7],
                "architecture": {"arch_kwargs": {"strides": [[1, 1, 1], [2, 1, 2], [2, 2, 2]]}},
            },
            "3d_fullres": {"inherits_from": "base", "normalization_schemes": ["CTNormalization"]},
        },
    }
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(content))
    found = nnunet.read_plans(path, tmp_path / "Dataset002_Y", image)
    forecast(0.1)
    assert found.spacing == [0.8, 0.7, 5] and found.strides == [[2, 2, 1], [2, 2, 2]]
    assert found.windows == [[-20, 300]]
    made = planned(described((160, 160, 20), (0.8, 0.7, 5.0)), 8, nnunet=found).checked()
    assert made["spacing"] == [0.8, 0.7, 5] and made["autoencoder_def"]["level_strides"][0] == [2, 2, 1]
    assert made["intensity"]["window"] == [-20, 300]
    content["configurations"]["base"]["inherits_from"] = "3d_fullres"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="inherits from itself"):
        nnunet.read_plans(path, tmp_path / "Dataset002_Y", image)


def test_the_plan_of_nnunet_for_the_hippocampus_drives_ours(tmp_path, forecast):
    """tests/files/nnUNetPlans_hippocampus.json was written by nnU-Net 2.8.1 itself, for the 160 pairs of
    Task04_Hippocampus as Dataset004_Hippocampus: `nnUNetv2_extract_fingerprint -d 4`, then
    `nnUNetv2_plan_experiment -d 4`."""
    nib.save(nib.Nifti1Image(np.zeros((35, 51, 35), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    forecast(0.1)
    path = Path(__file__).parent / "files/nnUNetPlans_hippocampus.json"
    found = nnunet.read_plans(path, tmp_path / "Dataset004_Hippocampus", tmp_path / "a.nii.gz")
    assert found.spacing == [1, 1, 1] and found.strides == [[2, 2, 2]] * 3 and found.windows == [None]
    made = planned(described((36, 51, 35), (1.0, 1.0, 1.0)), 8, nnunet=found)
    config = made.checked()
    assert config["diffusion_train"]["patch_size"] == [36, 52, 36]
    assert made.why["spacing"] == f"that of 3d_fullres in {path}"
    with pytest.raises(UserError, match="has no configuration 3d_lowres, only 2d, 3d_fullres"):
        nnunet.read_plans(path, tmp_path, tmp_path / "a.nii.gz", "3d_lowres")
