"""preprocess.py: affines that stay true, labels, masks, intensities, formats, resuming."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import preprocess
from ldm import UserError
from ldm.data import scan as steps
from ldm.data.layouts import find_cases
from ldm.data.raw_cases import find_raw_cases, read_raw

LANDMARKS = np.array([[-20.0, 10, 5], [14, -18, 10], [3, 26, -12]])  # mm


def head(landmarks=LANDMARKS, shape=(60, 70, 56), spacing=(1.3, 1.1, 1.4)):
    """A whole head in LPS, tilted by 8 degrees: a brain of 300 in a skull of 900, three bright landmarks of
    3 mm, air that is not quite 0. Returns voxels, affine and the brain's mask."""
    turn = Rotation.from_euler("xyz", (8, -5, 3), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1, -1, 1]) * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    at = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    away = np.linalg.norm(at / (30, 35, 26), axis=-1)
    voxels = np.where(away < 1, 300.0, np.where(away < 1.15, 900.0, 3.0)).astype(np.float32)
    for landmark in landmarks:
        near = np.linalg.norm(at - landmark, axis=-1)
        voxels += np.float32(600) * np.exp(-((near / 2) ** 2)) * (away < 1)
    return voxels, affine, away < 1


def save(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def run(*arguments):
    preprocess.main([str(one) for one in (*arguments, "-j", 1)])


def refused(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- geometry


def test_landmarks_keep_their_scanner_coordinates(tmp_path):
    voxels, affine, brain = head()
    save(tmp_path / "raw/one.nii.gz", voxels, affine)
    save(tmp_path / "masks/one_mask.nii.gz", brain.astype(np.uint8), affine)
    run("--in", tmp_path / "raw", "--out", tmp_path / "out", "--brain-mask", tmp_path / "masks",
        "--size", 80, 96, 72, "--spacing", 1)  # fmt: skip
    image = nib.load(tmp_path / "out/imagesTr/one_0000.nii.gz")
    found = image.get_fdata()
    assert found.shape == (80, 96, 72) and np.allclose(image.header.get_zooms(), 1, atol=1e-4)
    assert found.max() < 950 and found.min() == 0  # no skull, no overshoot
    for landmark in LANDMARKS:
        around = nib.affines.apply_affine(np.linalg.inv(image.affine), landmark)
        box = tuple(slice(round(c) - 4, round(c) + 5) for c in around)
        light = np.clip(found[box] - 320, 0, None)
        centre = [(light * grid).sum() / light.sum() for grid in np.indices(light.shape)]
        place = nib.affines.apply_affine(image.affine, np.array(centre) + [one.start for one in box])
        assert np.linalg.norm(place - landmark) < 0.3, "mm"


def test_each_step_keeps_a_voxel_in_its_place():
    voxels, affine, brain = head(shape=(20, 24, 18), spacing=(4, 3.5, 4))
    scan = steps.Scan((voxels * brain)[None], affine)
    peak = np.unravel_index(scan.voxels[0].argmax(), scan.voxels.shape[1:])
    place = nib.affines.apply_affine(affine, peak)
    for step in (steps.to_ras, steps.cropped):
        scan = step(scan)
        now = np.unravel_index(scan.voxels[0].argmax(), scan.voxels.shape[1:])
        assert np.allclose(nib.affines.apply_affine(scan.affine, now), place)
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
    shape, grid = steps.grid_at(scan, (2, 2, 2), None)
    before, after = (
        nib.affines.apply_affine(one, (np.array(sides) - 1) / 2)
        for one, sides in ((scan.affine, scan.voxels.shape[1:]), (grid, shape))
    )
    assert np.allclose(before, after), "the same centre"
    assert np.abs(np.array(shape) * 2 - np.array(scan.voxels.shape[1:]) * scan.spacing).max() <= 1


# ---------------------------------------------------------------- labels


def test_the_largest_indicator_wins_background_among_them():
    """Along an axis, 5 next to 1 next to background; the new voxels lie at thirds of the old ones."""
    label = np.tile(np.array([5, 5, 1, 0, 0], np.uint8)[:, None, None], (1, 4, 4))
    scan = steps.Scan(label[None].astype(np.float32), np.eye(4), label)
    affine = np.diag([1 / 3, 1, 1, 1])
    found = steps.resampled(scan, (13, 4, 4), affine, 1).label[:, 2, 2]
    # At 4/3: two thirds 5, one third 1. Never 2, 3 or 4, which linear interpolation of values would give.
    assert found.tolist() == [5, 5, 5, 5, 5, 1, 1, 1, 0, 0, 0, 0, 0]


def test_a_label_beyond_the_old_grid_is_background():
    label = np.full((4, 4, 4), 7, np.uint8)
    scan = steps.Scan(label[None].astype(np.float32), np.eye(4), label)
    shifted = np.eye(4)
    shifted[:3, 3] = -3
    found = steps.resampled(scan, (10, 10, 10), shifted, 1).label
    assert found[0, 0, 0] == 0 and found[4, 4, 4] == 7 and np.count_nonzero(found) == 64


# ---------------------------------------------------------------- background and intensities


def test_background_is_zero_and_nan_inside_is_an_error():
    voxels, mask = np.full((1, 3, 3, 3), 5.0, np.float32), np.zeros((3, 3, 3), bool)
    mask[1] = True
    voxels[0, 0, 0, 0] = np.nan
    clean = steps.without_background(steps.Scan(voxels, np.eye(4), None, mask))
    assert np.array_equal(clean.voxels[0], np.where(mask, 5, 0))
    voxels[0, 1, 1, 1] = np.nan
    bare = np.array([np.nan, 1, 2], np.float32).reshape(1, 3, 1, 1)
    assert steps.without_background(steps.Scan(bare, np.eye(4))).voxels.ravel().tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="has 1 infinite voxels"):
        steps.without_background(steps.Scan(np.where(bare == 2, np.inf, bare), np.eye(4)))
    with pytest.raises(UserError, match="1 voxels in its mask are NaN"):
        steps.without_background(steps.Scan(voxels, np.eye(4), None, mask))


@pytest.mark.parametrize(
    "how, window, expected",
    [
        ("keep", None, [0, 10, 20, 30]),
        ("minmax", None, [0, 0, 0.5, 1]),
        ("window", (0, 40), [0, 0.25, 0.5, 0.75]),
        ("zscore", None, [-1.2247, -1.2247, 0, 1.2247]),  # the background is the lowest, not the mean
    ],
)
def test_intensities(how, window, expected):
    scan = steps.Scan(np.array([0, 10, 20, 30], np.float32).reshape(1, 4, 1, 1), np.eye(4))
    assert np.allclose(steps.with_intensities(scan, how, window).voxels.ravel(), expected, atol=1e-4)


def test_percentiles_are_of_the_foreground():
    voxels = np.concatenate([np.zeros(10_000), np.arange(1, 1002)]).astype(np.float32)
    found = steps.with_intensities(
        steps.Scan(voxels.reshape(1, -1, 1, 1), np.eye(4)), "percentiles"
    ).voxels.ravel()
    assert found[10_000 + 5] == 0 and np.isclose(found[10_000 + 500], 0.5) and found[-6] == 1


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three scans of two channels with labels, of 2 mm and one of 3 mm."""
    folder = tmp_path_factory.mktemp("raw")
    for i, spacing in enumerate((2.0, 2.0, 3.0)):
        rng, affine = np.random.default_rng(i), np.diag([spacing] * 3 + [1])
        voxels = np.zeros((12, 14, 10, 2), np.int16)
        voxels[2:-2, 2:-2, 2:-2] = rng.integers(50, 400, (8, 10, 6, 2))
        label = np.zeros((12, 14, 10), np.uint8)
        label[4:8, 5:9, 3:7] = 2
        save(folder / f"imagesTr/case{i}.nii.gz", voxels, affine)
        save(folder / f"labelsTr/case{i}.nii.gz", label, affine)
    entries = [{"image": f"imagesTr/case{i}.nii.gz", "label": f"labelsTr/case{i}.nii.gz"} for i in range(3)]
    content = {
        "training": entries,
        "modality": {"0": "T1w", "1": "FLAIR"},
        "labels": {"0": "background", "2": "core"},
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "participants.tsv").write_text("participant_id\tage\ncase0\t31\ncase2\t44\n")
    return folder


def test_writes_what_the_other_scripts_read(source, tmp_path):
    run("--in", source, "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    assert content == {
        "channel_names": {"0": "T1w", "1": "FLAIR"},
        "labels": {"background": 0, "core": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    cases, _ = find_cases(tmp_path / "out")
    assert [case.name for case in cases] == ["case0", "case1", "case2"]
    assert [case.covariates.get("age") for case in cases] == ["31", None, "44"]
    assert all(len(case.images) == 2 and case.label for case in cases)
    image, coarse = (nib.load(cases[i].images[0]) for i in (0, 2))
    assert image.shape == (8, 10, 6) and coarse.shape == (12, 15, 9), "cropped, at the median spacing"
    assert np.allclose(coarse.header.get_zooms(), 2)
    kept = nib.load(source / "imagesTr/case0.nii.gz").get_fdata()[2:-2, 2:-2, 2:-2, 0]
    assert np.allclose(image.get_fdata(), kept, atol=1e-3), "no resampling where the spacing is right"
    assert np.allclose(image.affine[:3, 3], 4)


def test_goes_on_where_it_broke_off(source, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run("--in", source, "--out", whole)
    write = preprocess.nifti_gz

    def fill_the_disk(array, affine):
        if (out / "imagesTr/case0_0000.nii.gz").is_file():
            raise OSError(28, "No space left on device")
        return write(array, affine)

    monkeypatch.setattr(preprocess, "nifti_gz", fill_the_disk)
    with pytest.raises(SystemExit) as stop:
        run("--in", source, "--out", out)
    assert stop.value.code == 1 and not (out / "dataset.json").exists()
    monkeypatch.setattr(preprocess, "nifti_gz", write)
    first = (out / "imagesTr/case0_0000.nii.gz").stat().st_mtime_ns
    run("--in", source, "--out", out)
    assert (out / "imagesTr/case0_0000.nii.gz").stat().st_mtime_ns == first
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert all((whole / file).read_bytes() == (out / file).read_bytes() for file in files)


def test_like_repeats_the_settings(source, tmp_path):
    run("--in", source, "--out", tmp_path / "a", "--spacing", 3, "--interpolation", "linear", "--no-crop")
    run("--in", source, "--out", tmp_path / "b", "--like", tmp_path / "a/preprocessing.json")
    one = "imagesTr/case1_0001.nii.gz"
    assert (tmp_path / "a" / one).read_bytes() == (tmp_path / "b" / one).read_bytes()


def test_wrong_usage_writes_nothing(source, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        (["--in", tmp_path / "empty"], "empty"),
        (["--in", tmp_path / "none"], "none"),
        (["--in", source, "--spacing", 0], "--spacing"),
        (["--in", source, "--size", 8, 8, 8], "--size"),
        (["--in", source, "--intensity", "window"], "--window"),
        (["--in", source, "--window", 1, 0, "--intensity", "window"], "--window"),
        (["--in", source, "--brain-mask", tmp_path / "none.nii.gz"], "none.nii.gz"),
        (["--in", source, "--like", source / "dataset.json"], "dataset.json"),
    ):
        assert named in refused(*arguments, "--out", out, capsys=capsys)
        assert not out.exists(), arguments
    run("--in", source, "--out", out)
    assert "complete" in refused("--in", source, "--out", out, capsys=capsys)
    (out / "dataset.json").unlink()
    assert "begun with spacing" in refused("--in", source, "--out", out, "--spacing", 4, capsys=capsys)
    assert "something else" in refused("--in", source, "--out", source, capsys=capsys)


def test_a_label_on_another_grid_is_named(tmp_path, capsys):
    save(tmp_path / "raw/imagesTr/a.nii.gz", np.ones((6, 6, 6), np.float32), np.eye(4))
    save(tmp_path / "raw/labelsTr/a.nii.gz", np.ones((5, 6, 6), np.uint8), np.eye(4))
    entry = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    (tmp_path / "raw/dataset.json").write_text(json.dumps({"training": [entry]}))
    message = refused("--in", tmp_path / "raw", "--out", tmp_path / "out", capsys=capsys)
    assert "labelsTr/a.nii.gz: lies on another grid" in message


# ---------------------------------------------------------------- brain masks


@pytest.mark.parametrize("layout", ["NFBS", "CC359"])
def test_published_layouts_bring_their_masks(layout, tmp_path, capsys):
    voxels, affine, brain = head(shape=(30, 36, 28), spacing=(2.6, 2.2, 2.8))
    if layout == "NFBS":
        stem = tmp_path / "raw/A00028185/sub-A00028185_ses-NFB3_T1w"
        files = {"": voxels, "_brain": voxels * brain, "_brainmask": brain.astype(np.uint8)}
        for end, array in files.items():
            save(stem.with_name(f"{stem.name}{end}.nii.gz"), array, affine)
    else:
        save(tmp_path / "raw/Original/CC0001_philips_15_55_M.nii.gz", voxels, affine)
        mask = "raw/Silver-standard-machine-learning/Silver-standard/CC0001_philips_15_55_M_ss.nii.gz"
        save(tmp_path / mask, brain.astype(np.uint8), affine)
    run("--in", tmp_path / "raw", "--out", tmp_path / "out")
    (image,) = (tmp_path / "out/imagesTr").glob("*.nii.gz")
    assert nib.load(image).get_fdata().max() < 890, "no skull"
    assert not (tmp_path / "out/labelsTr").exists()
    # The head is a small one: its brain of 115 ml is doubted, and drawn.
    assert "looks wrong: it covers 11" in capsys.readouterr().out
    assert len(list((tmp_path / "out/doubtful").glob("*.png"))) == 1


def test_an_automatic_mask_removes_the_skull(tmp_path):
    pytest.importorskip("dipy", reason="DIPY, an optional dependency, is not installed")
    voxels, affine, brain = head()
    save(tmp_path / "raw/one.nii.gz", voxels, affine)
    (case,) = find_raw_cases(tmp_path / "raw")
    mask = read_raw(case, "auto").mask
    assert mask.dtype == bool and (mask & brain).sum() > 0.9 * brain.sum()


# ---------------------------------------------------------------- formats


def test_nrrd_and_dicom_lie_where_the_scanner_says(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, an optional dependency, is not installed")
    array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)  # Z, Y, X
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.5, 2.0, 3.0))
    image.SetOrigin((10.0, -20.0, 30.0))  # LPS
    (tmp_path / "raw").mkdir()
    sitk.WriteImage(image, str(tmp_path / "raw/one.nrrd"))
    (tmp_path / "dicom/patient").mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(4):
        section = image[:, :, z]
        for tag, value in (
            ("0008|0060", "MR"),
            ("0020|000e", "1.2.826.0.1.3680043.2.1125.1"),
            ("0020|0032", f"10\\-20\\{30 + 3 * z}"),
            ("0020|0037", "1\\0\\0\\0\\1\\0"),
            ("0020|0013", str(z)),
        ):
            section.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / f"dicom/patient/{z}.dcm"))
        writer.Execute(section)
    for folder, name in (("raw", "one"), ("dicom", "patient")):
        (case,) = find_raw_cases(tmp_path / folder)
        scan = read_raw(case)
        assert case.name == name and scan.voxels.shape == (1, 6, 5, 4)
        assert np.allclose(scan.affine @ [0, 0, 0, 1], [-10, 20, 30, 1]), "RAS"
        assert np.allclose(scan.affine @ [2, 1, 1, 1], [-13, 18, 33, 1])
        assert scan.voxels[0, 2, 1, 3] == array[3, 1, 2]


def test_without_simple_itk_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/one.nrrd").write_bytes(b"NRRD0004\n")
    message = refused("--in", tmp_path / "raw", "--out", tmp_path / "out", "--spacing", 1, capsys=capsys)
    assert "pip install SimpleITK" in message


def test_nifti_files_among_others_are_not_passed_over(tmp_path):
    save(tmp_path / "raw/two.nii.gz", np.ones((6, 6, 6), np.float32), np.eye(4))
    (tmp_path / "raw/one.nrrd").write_bytes(b"NRRD0004\n")
    with pytest.raises(UserError, match="holds two.nii.gz and also one.nrrd"):
        find_raw_cases(tmp_path / "raw")
    assert [case.name for case in find_raw_cases(tmp_path / "raw", "*.nii.gz")] == ["two"]


def test_edges_are_those_of_the_image_and_beyond_lies_air():
    """A CT at half the spacing has no planes of 0 HU at its ends; a larger grid is filled with its lowest
    value, and with 0 around a mask."""
    voxels = np.full((1, 6, 6, 6), 40, np.float32)
    voxels[0, 0, 0, 0] = -1000
    scan = steps.Scan(voxels, np.diag([5.0, 5, 5, 1]))
    finer = steps.resampled(scan, *steps.grid_at(scan, [2.5] * 3, None))
    assert finer.voxels.shape == (1, 12, 12, 12)
    np.testing.assert_allclose(finer.voxels[0, 4:, 4:, 4:], 40, atol=2)
    larger = steps.resampled(scan, *steps.grid_at(scan, [5.0] * 3, [10, 10, 10]), order=1)
    assert larger.voxels[0, 0, 5, 5] == -1000 and larger.voxels[0, 5, 5, 5] == 40
    masked = steps.Scan(voxels, scan.affine, mask=np.ones((6, 6, 6), bool))
    assert (
        steps.resampled(masked, *steps.grid_at(scan, [5.0] * 3, [10, 10, 10]), order=1).voxels[0, 0, 5, 5]
        == 0
    )


def test_a_folder_is_not_gone_on_with_from_another_source(tmp_path, capsys):
    for name in ("one", "two"):
        save(tmp_path / name / "a.nii.gz", *head()[:2])
    run("--in", tmp_path / "one", "--out", tmp_path / "out")
    (tmp_path / "out/dataset.json").unlink()  # as if broken off
    message = refused("--in", tmp_path / "two", "--out", tmp_path / "out", capsys=capsys)
    assert f"was begun with source {tmp_path / 'one'}" in message.replace("'", "")
    message = refused(
        *("--in", tmp_path / "two", "--out", tmp_path / "new", "--spacing", 1),
        *("--like", tmp_path / "out/preprocessing.json"),
        capsys=capsys,
    )
    assert "--like: takes all settings of that run; leave out --spacing." in message
