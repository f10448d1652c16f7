"""Label maps alone, through all scripts; sizes of structures as conditions."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, SHAPE, SPACING, Project

import cache_latents
import check_data
import edit_scan
import evaluate
import export_model
import inference
import train_autoencoder
import train_controlnet
import train_diffusion
from ldm import UserError
from ldm.data.cases import Case
from ldm.data.checks import check_headers, check_voxels
from ldm.data.labels import shown, with_sizes
from ldm.data.layouts import find_cases
from ldm.evaluation.label_maps import overlap, parts_of
from ldm.generation import Masks
from ldm.given_masks import MaskSearch, MaskSource, deformed, distance, moved_within
from ldm.losses import AutoencoderLoss, dice_and_cross_entropy

VALUES = [2, 5]
SIZES = {"inner core": 5, "whole": [2, 5]}


def save(path, voxels, spacing=SPACING):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.diag([*spacing, 1])), path)
    return path


def label_map(core: float, whole: float = 1.0) -> np.ndarray:
    """An ellipsoid of label 2 around one of label 5, by their radii."""
    axes = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in SHAPE], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    return np.select([radius < core, radius < whole], [5, 2], 0)


def make_label_maps(folder, cases=8):
    for i in range(cases):
        save(folder / f"seg_{i:02d}.nii.gz", label_map(0.3 + 0.06 * i, 1.1 - 0.02 * i))
    return folder


# ---------------------------------------------------------------- data


def test_label_maps_are_found_where_there_is_nothing_else(tmp_path):
    """A folder of masks, the labels of pairs, and both."""
    maps, pairs = make_label_maps(tmp_path / "maps", 2), tmp_path / "pairs"
    with pytest.raises(UserError, match="2 masks"):
        find_cases(maps)
    for end in ("", "_seg"):
        save(pairs / f"a{end}.nii.gz", label_map(0.5))
    said = []
    cases, _ = find_cases([maps, pairs], label_maps=True, log=said.append)
    files = [maps / "seg_00.nii.gz", maps / "seg_01.nii.gz", pairs / "a_seg.nii.gz"]
    assert [case.images for case in cases] == [(file,) for file in files]
    assert [case.label for case in cases] == files and all(case.is_label_map for case in cases)
    assert "found: 3 label maps" in said[0]
    save(pairs / "b.nii.gz", label_map(0.4))
    with pytest.raises(UserError, match="1 of 2 cases have no label, such as b"):
        find_cases(pairs, label_maps=True)


def test_a_small_structure_is_no_fault_and_an_empty_map_is_one(tmp_path):
    small, empty = np.zeros(SHAPE), np.zeros(SHAPE)
    small[3, 4, 5] = 5
    files = [save(tmp_path / f"seg_{i}.nii.gz", one) for i, one in enumerate((small, empty, small))]
    cases = [Case(file.name, (file,), file) for file in files]
    assert not check_headers(cases, ())
    readings = [check_voxels(case, ()) for case in cases]
    assert [[problem.reason for problem in one.problems] for one in readings] == [
        [],
        ["all zero: an empty label map"],
        [],
    ]
    assert readings[0].digests[files[0]] == readings[2].digests[files[2]]
    wrong = save(tmp_path / "seg_4d.nii.gz", np.stack([small, small], -1))
    assert "4D" in check_headers([Case("4d", (wrong,), wrong)], ())[0].reason


def test_without_an_image_the_loss_is_that_of_the_label():
    section = CONFIG["autoencoder_train"] | dict.fromkeys(("gradient_weight", "adversarial_weight"), 0.0)
    section |= {"recon_loss": "l1", "label_weight": 0.5, "background_weight": 1.0}
    criterion = AutoencoderLoss(section, None, labels=2, image=False)
    torch.manual_seed(0)
    given, made = torch.randint(0, 2, (2, 2, 3, 4, 5)).float(), torch.rand(2, 2, 3, 4, 5)
    given[:, 1] *= 1 - given[:, 0]
    terms = criterion.held_out(given, made, None)
    logits = torch.cat([torch.zeros(2, 1, 3, 4, 5), 8 * (made - 0.5)], 1)
    shares = torch.cat([1 - given.sum(1, keepdim=True), given], 1)
    assert terms.keys() == {"label_loss", "loss"}
    assert float(terms["loss"]) == pytest.approx(0.5 * float(dice_and_cross_entropy(logits, shares)))


def test_a_picture_of_a_label_map_shows_its_labels():
    channels = torch.tensor([[0.9, 0.2, 0.3], [0.1, 0.7, 0.4]]).reshape(2, 3, 1, 1)
    assert shown(channels, 2).flatten().tolist() == pytest.approx([0.5, 1, 0])
    assert torch.equal(shown(channels, 1), channels[0])


# ---------------------------------------------------------------- all scripts


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> Project:
    """Both stages trained on label maps, and three of them drawn."""
    folder = tmp_path_factory.mktemp("maps")
    project = Project(folder / "run", make_label_maps(folder / "data"))
    project.config["autoencoder_def"] |= dict.fromkeys(("in_channels", "out_channels"), "@volume_channels")
    augment = {"intensity_scale": 0.5, "intensity_shift": 0.5, "intensity_prob": 1.0, "flip_axes": [0]}
    project.config["autoencoder_train"] |= {"max_epochs": 20, "val_interval": 20, "augment": augment}
    project.config["diffusion_train"] |= {"sample_interval": 100, "max_epochs": 6}
    conditions = {"structure_sizes": SIZES, "covariates": {"whole": [0, 20]}}
    project.change(with_labels="only", label_values=VALUES, conditions=conditions)
    for script, more in (
        (train_autoencoder, ["--no-amp"]),
        (train_diffusion, ["--no-amp"]),
        (inference, ["--num", "3", "--steps", "2"]),
    ):
        project.printed[script.__name__] = project.run(script, *more)
    return project


def test_stage_1_is_judged_by_the_held_out_dice(maps):
    said, best = maps.printed["train_autoencoder"], maps.checkpoint("autoencoder.pt")
    assert "8 label maps" in said and "Dice of labels 0." in said and "PSNR" not in said
    assert best["model"]["encoder.blocks.0.conv.weight"].shape[1] == len(VALUES)
    scores = best["validation"]
    assert scores.keys() == {"loss", "label_loss", "dice"} and 0.6 < scores["dice"] < 1
    assert best["best"] == scores["loss"] == pytest.approx(1 - scores["dice"])
    assert maps.checkpoint("diffusion_unet.pt")["geometry"]["limits"] == []


def test_the_decoders_label_is_written_with_record_and_picture(maps):
    assert "3 label maps in" in maps.printed["inference"]
    names = {path.name for path in maps.output_dir.glob("sample*")}
    each = {f"sample_00000{i}_label{end}" for i in range(3) for end in (".nii.gz", ".json")}
    assert names == each | {"samples.png"}
    image = nib.load(maps.output_dir / "sample_000001_label.nii.gz")
    assert image.shape == SHAPE and image.get_data_dtype() == np.uint8
    assert {*np.unique(image.dataobj)} <= {0, *VALUES}
    assert json.loads((maps.output_dir / "sample_000001_label.json").read_text())["seed"] == 1
    assert "3 of 3 volumes already exist" in maps.run(inference, "--num", "3", "--steps", "2")


def test_a_label_map_is_reproduced(maps, tmp_path):
    for end in (".json", ".nii.gz"):
        name = f"sample_000001_label{end}"
        (tmp_path / name).write_bytes((maps.output_dir / name).read_bytes())
    inference.main(["--reproduce", str(tmp_path / "sample_000001_label.json")])
    made, before = (tmp_path / f"sample_000001_label{end}.nii.gz" for end in ("_reproduced", ""))
    assert made.read_bytes() == before.read_bytes()


def test_samples_that_are_not_finite_are_not_written(maps, monkeypatch):
    draw = inference.generation.draw
    monkeypatch.setattr(inference.generation, "draw", lambda *args, **kw: draw(*args, **kw) * torch.nan)
    assert "seed 70 is not finite" in maps.refused(inference, "--seed", "70", "--steps", "1", code=1)


def test_latents_of_label_maps_are_cached(maps):
    other = Project(maps.folder / "cached", maps.data, config=json.loads(maps.config_file.read_text()))
    other.set_environment(model_dir=str(maps.model_dir), cache_dir=str(other.folder / "cache"))
    other.config["diffusion_train"] |= {"latent_cache": True}
    other.change()
    other.run(cache_latents)
    other.set_environment(cache_dir=str(other.folder / "cache"))
    other.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=1")
    assert other.checkpoint("diffusion_unet.pt")["geometry"]["limits"] == []


def test_sizes_are_those_of_the_training_labels(maps):
    """In ml, by hand; the range of `whole` is the config's."""
    labels = [np.asarray(nib.load(maps.data / f"{name}.nii.gz").dataobj) for name in maps.split()["training"]]
    ml = np.prod(SPACING) / 1000
    found = [[float(f"{np.isin(one, some).sum() * ml:.6g}") for some in ([2, 5], [5])] for one in labels]
    saved = maps.checkpoint("diffusion_unet.pt")["conditions"]["covariates"]
    cores = [core for _, core in found]
    assert saved["columns"] == {"whole": [0, 20], "inner core": [min(cores), max(cores)]}
    assert sorted(saved["rows"]) == sorted(found)
    assert maps.checkpoint("diffusion_unet.pt")["config"]["conditions"]["structure_sizes"]["inner core"] == [
        5
    ]
    assert f"inner core {min(cores):g} to {max(cores):g}" in maps.printed["train_diffusion"]


def test_sizes_are_asked_for_as_shares_or_in_ml(maps):
    low, high = maps.checkpoint("diffusion_unet.pt")["conditions"]["covariates"]["columns"]["inner core"]

    def condition(seed, *more):
        maps.run(inference, "--seed", str(seed), "--steps", "1", *more)
        return json.loads((maps.output_dir / f"sample_{seed:06d}_label.json").read_text())["condition"]

    found = condition(20, "--structure-size", "inner core=0.8", "--structure-size", "whole=0.5")
    assert float(found["inner core"]) == pytest.approx(low + 0.8 * (high - low), rel=1e-5)
    assert float(found["whole"]) == 10
    assert condition(21, "--condition", "inner core=1.5")["inner core"] == "1.5"
    drawn = float(condition(22, "--structure-size", "inner core=0.2:0.4")["inner core"])
    assert low + 0.2 * (high - low) <= drawn <= low + 0.4 * (high - low)
    for argv, what in (
        (["--structure-size", "core=0.5"], 'expected one "inner core=SHARE" or "whole=SHARE"'),
        (["--structure-size", "whole=1.2"], "expected a share from 0, the smallest, to 1"),
        (["--structure-size", "whole=big"], "expected a share from 0, the smallest, to 1"),
        (["--structure-size", "whole=1", "--condition", "whole=3"], "whole is given by --condition, too"),
    ):
        assert what in maps.refused(inference, "--seed", "30", *argv)


def test_what_sizes_need(maps, tmp_path):
    message = maps.refused(
        train_diffusion, "--set", 'conditions={"structure_sizes": {"a": 5}, "covariates": {"a": ["x", "y"]}}'
    )
    assert "conditions.covariates.a: a size is a number" in message
    for sizes in ({"a": 0}, {"a=b": 1}, {"a": []}):
        message = maps.refused(train_diffusion, "--set", f"conditions.structure_sizes={json.dumps(sizes)}")
        assert "structure_sizes" in message
    images = [Case(name, (tmp_path / name,)) for name in ("a", "b")]
    with pytest.raises(UserError, match="structure_sizes: no case has a label"):
        with_sizes(images, {"a": [5]})


# ---------------------------------------------------------------- evaluation


def test_parts_and_overlap_by_hand():
    first = np.zeros((5, 5, 5), np.uint8)
    first[0, 0, 0] = first[1, 1, 1] = first[4, 4, 4] = 1  # two that touch at a corner, and one apart
    first[3, 0, :2] = 2
    second = np.where(first == 2, 2, 0).astype(np.uint8)
    second[3, 0, 2:4], second[0, 0, 0] = 2, 3
    assert parts_of(first, 3).tolist() == [2, 1, 0]
    assert overlap(first, second, 3) == pytest.approx((0 + 2 * 2 / 6 + 0) / 3)
    assert overlap(first, first, 3) == 1 and overlap(0 * first, 0 * first, 3) == 0


def test_label_maps_are_compared_with_real_ones(maps, tmp_path):
    out = tmp_path / "page"
    said = maps.run(evaluate, "--out", str(out))
    found = json.loads((out / "metrics.json").read_text())
    rows = {row["key"]: row for row in found["figures"]}
    expected = {"missing", "parts", "parts_label 5", "size_label 2", "size_inner core", "size_whole"}
    assert expected | {"overlap", "reconstruction_dice", "copies"} <= rows.keys()
    assert "copies a training scan" in said
    names = sorted(path.name for path in maps.output_dir.glob("*_label.nii.gz"))
    sizes = [(nib.load(maps.output_dir / name).get_fdata() == 5).sum() for name in names]
    mean = np.mean(sizes) * np.prod(SPACING) / 1000
    assert f"Samples {mean:.3g} ±" in rows["size_inner core"]["about"]
    assert rows["parts_label 5"]["floor"] == 1 and rows["reconstruction_dice"]["value"] > 0.6
    asked = {row for row in rows if row.startswith("correlation_")}
    assert asked == {"correlation_whole_whole", "correlation_inner core_inner core"}
    assert "1 - Dice" in rows["nearest"]["about"]
    message = maps.refused(evaluate, "--out", str(tmp_path / "b"), "--segmentation", "2")
    assert "--segmentation: is for images" in message


# ---------------------------------------------------------------- masks that samples follow


def as_networks(values=(2, 5), covariates=None):
    """What a `MaskSource` asks of networks."""
    return SimpleNamespace(
        geometry={"size": list(SHAPE), "spacing": list(SPACING)},
        masks=Masks(values, 3, True, False, {}),
        conditions=SimpleNamespace(covariates=covariates),
    )


def test_the_distance_of_a_mask_by_hand():
    apart = np.array([10.0, 0, -20]), np.array([4.0, 0, 0]), np.array([0, 0.5, 0])
    shares = {"a": 0.2, "b": 0.9}
    expected = 0.3 + 0.1 + (1 + 0.04 + 0.5 + 2) / 3
    assert distance(shares, {"a": 0.5, "b": 1.0}, *apart) == pytest.approx(expected)


def test_masks_are_found_by_size_and_grid_each_once(tmp_path):
    paths = [save(tmp_path / f"m{i}.nii.gz", label_map(0.3 + 0.1 * i)) for i in range(4)]
    paths.append(save(tmp_path / "fine.nii.gz", label_map(0.6), np.array(SPACING) / 2))
    ml = [(nib.load(path).get_fdata() == 5).sum() * np.prod(SPACING) / 1000 for path in paths]
    geometry = as_networks().geometry
    search = MaskSearch(paths, {"core": [5]}, {}, geometry)
    low, high = min(*ml[:4], ml[4] / 8), ml[3]
    assert search.shares[2]["core"] == pytest.approx((ml[2] - low) / (high - low), abs=1e-3)
    assert [search.closest({"core": 1.0}).name for _ in range(2)] == ["m3.nii.gz", "m2.nii.gz"]
    search = MaskSearch(paths, {"core": [5]}, {"core": (0, 2 * ml[3])}, geometry)
    assert [search.closest({"core": share}).name for share in (0.5, 0.5)] == ["m3.nii.gz", "m2.nii.gz"]
    assert {search.closest({"core": 0.5}).name for _ in range(3)} == {"m0.nii.gz", "m1.nii.gz", "fine.nii.gz"}
    assert search.closest({"core": 0.5}).name == "m3.nii.gz"


def test_a_deformation_keeps_the_labels_and_follows_the_seed():
    mask = label_map(0.5, 0.9).astype(np.uint8)
    made = [deformed(mask, SPACING, np.random.default_rng(seed), "m") for seed in (0, 0, 1)]
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any() and (made[0] != mask).mean() > 0.01
    for value in (2, 5):
        assert (made[0] == value).sum() == pytest.approx((mask == value).sum(), rel=0.5)
    single = np.zeros(SHAPE, np.uint8)
    single[0, 0, 0] = 5  # at a corner, which a deformation moves out of the volume or swallows
    with pytest.raises(UserError, match="m: none of 20 deformations kept all its labels"):
        deformed(single, (0.2, 0.2, 0.2), np.random.default_rng(0), "m")


def test_labels_are_moved_to_a_place_within_another():
    """A lesion of two labels in a box that holds it and nothing beside it."""
    mask = np.zeros((12, 8, 8), np.uint8)
    mask[1:11, 1:7, 1:7] = 2
    mask[2:4, 2:5, 2:4], mask[2, 2, 2] = 5, 6
    moved = moved_within(mask, (5, 6), 2, np.random.default_rng(3), "m")
    assert (moved != mask).any() and ((moved > 0) == (mask > 0)).all()
    for value in (2, 5, 6):
        assert (moved == value).sum() == (mask == value).sum()
    corners = [np.argwhere(np.isin(one, (5, 6))).min(0) for one in (mask, moved)]
    assert (corners[0] != corners[1]).any()
    assert np.ptp(np.argwhere(np.isin(moved, (5, 6))), axis=0).tolist() == [1, 2, 1]
    full = np.where(mask == 2, 0, mask)
    full[5, 5, 5] = 2
    with pytest.raises(UserError, match="labels 5, 6 fit nowhere else within label 2"):
        moved_within(full, (5, 6), 2, np.random.default_rng(0), "m")
    with pytest.raises(UserError, match="has no voxel of 7"):
        moved_within(mask, (7,), 2, np.random.default_rng(0), "m")


def test_the_sizes_in_a_mask_are_the_condition_of_its_sample(tmp_path):
    path = save(tmp_path / "m.nii.gz", label_map(0.5))
    plain, changed = (
        MaskSource([path], as_networks(), {"core": [5]}, (), augment, None, print)(4)
        for augment in (False, True)
    )
    voxels = (nib.load(path).get_fdata() == 5).sum()
    assert plain.sizes["core"] == pytest.approx(voxels * np.prod(SPACING) / 1000, rel=1e-5)
    assert plain.changes == {} and changed.changes == {"augmented": True}
    ratio = int((changed.voxels == 5).sum()) / voxels
    assert ratio != 1 and changed.sizes["core"] == pytest.approx(ratio * plain.sizes["core"], rel=1e-5)
    with pytest.raises(UserError, match="chooses among masks. Name a folder"):
        MaskSource([path], as_networks(), {"core": [5]}, ["core=1"], False, None, print)


def test_what_label_maps_need(maps, tmp_path, capsys):
    assert "name the labels by label_values" in maps.refused(train_autoencoder, "--set", "label_values=null")
    message = maps.refused(train_autoencoder, "--set", "autoencoder_train.label_weight=0")
    assert "label_weight: the only term" in message
    assert "with_labels: expected true or false or" in maps.refused(
        train_autoencoder, "--set", "with_labels=alone"
    )
    check_data.main(maps.argv()[:4])
    assert "all good: 8 cases" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export_model.main([*maps.argv()[:4], "--out", str(tmp_path / "out")])
    assert "models of label maps alone are not exported" in capsys.readouterr().err
    assert "A ControlNet is for one without" in maps.refused(train_controlnet)
    scan = ["--scan", str(maps.data / "seg_00.nii.gz"), "--of", "a=1", "--condition", "a=2"]
    assert "edits images without labels" in maps.refused(edit_scan, *scan)
