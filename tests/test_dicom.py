"""export_dicom.py: series, SEG and RTSTRUCT as other programs read them, against the NIfTI."""

import hashlib
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label as components
from scipy.spatial.transform import Rotation
from skimage.draw import polygon2mask

import export_dicom
from ldm.export import records
from ldm.export.contours import outlines
from ldm.generation import nifti_bytes, nifti_gz

pydicom = pytest.importorskip("pydicom", reason="pydicom, an optional dependency, is not installed")
pytest.importorskip("highdicom", reason="highdicom, an optional dependency, is not installed")

SHAPE, SPACING = (14, 11, 7), (2.0, 1.5, 3.0)
ROOT_UID = "1.2.826.0.1.3680043.8.498."  # pydicom's


def oblique() -> np.ndarray:
    """An affine of which the axes run upwards, to the left and forwards, turned by some degrees."""
    affine = np.eye(4)
    axes = np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    affine[:3, :3] = (
        Rotation.from_euler("xyz", (8, -5, 12), degrees=True).as_matrix() @ axes @ np.diag(SPACING)
    )
    affine[:3, 3] = (31.25, -17, 4)
    return affine


def image(seed: int = 0, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(300, 137.3, shape).astype(np.float32)


def label() -> np.ndarray:
    """A box with a hole that has an island, two voxels that touch at a corner, one at the edge."""
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[2:10, 2:9, 1:5] = 3
    voxels[4:8, 4:8, 2] = 0
    voxels[5:7, 5, 2] = 3
    voxels[11, 3, 3] = voxels[12, 4, 3] = voxels[13, 10, 6] = 200
    return voxels


def record(content: bytes, mask: bytes | None = None) -> dict:
    """The record of a volume with these bytes, as inference.py writes it."""
    checkpoint = {"path": "a.pt", "sha256": 64 * "0"}
    volume = {"sha256": hashlib.sha256(content).hexdigest(), "shape": [*SHAPE], "spacing": [*SPACING]}
    volume |= {"label": {"sha256": hashlib.sha256(mask).hexdigest()}} if mask else {}
    return {
        **{"seed": 3, "batch": [3], "sampler": "heun", "steps": 2, "scale_factor": 1.0, "versions": {}},
        **{"precision": "float32", "compile": False, "device": "cpu", "hardware": "cpu", "threads": 1},
        **{"autoencoder": checkpoint, "unet": checkpoint, "config": {}, "volume": volume},
        "config_sha256": records.config_hash({}),
    }


def sample(folder, name="sample_000003", voxels=None, mask=None):
    """A volume in RAS as inference.py writes it, its label and its record."""
    content = nifti_bytes((image() if voxels is None else voxels)[None], SPACING)
    mask = nifti_bytes((label() if mask is None else mask)[None], SPACING, np.uint8)
    path = folder / f"{name}.nii.gz"
    records.save_volume(path, content, record(content, mask), mask)
    return path


def save(path, voxels, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti_gz(voxels, affine))
    return path


def run(*words):
    export_dicom.main([*map(str, words)])


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def read(folder) -> list:
    return [pydicom.dcmread(path) for path in sorted(folder.rglob("*.dcm"))]


def to_voxels(points, affine) -> np.ndarray:
    """Points (N, 3) of DICOM in mm -> voxels of a NIfTI: DICOM's x and y run the other way."""
    return nib.affines.apply_affine(np.linalg.inv(affine), np.array(points, float) * (-1, -1, 1))


def voxels_of_pixels(position, orientation, spacing, rows, columns, affine) -> tuple[np.ndarray, ...]:
    """The voxels (i, j, k) of a NIfTI in which the pixels of a slice lie, (rows, columns) each, by PS3.3
    equation C.7.6.2.1-1."""
    row, column = np.indices((rows, columns)).reshape(2, -1, 1)
    along_row, along_column = np.array(orientation, float).reshape(2, 3)
    at = np.array(position, float) + column * spacing[1] * along_row + row * spacing[0] * along_column
    found = to_voxels(at, affine)
    np.testing.assert_allclose(found, np.rint(found), atol=1e-3)
    return tuple(np.rint(found).astype(int).T.reshape(3, rows, columns))


# ---------------------------------------------------------------- image


@pytest.mark.parametrize("affine", [np.diag([*SPACING, 1.0]), oblique()], ids=["RAS", "oblique"])
def test_each_pixel_of_mr_lies_where_the_nifti_has_it(tmp_path, affine):
    voxels = np.stack([image(), 1e-3 * image(1) - 0.2], -1)
    run(save(tmp_path / "two.nii.gz", voxels, affine), "--modality", "MR", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/two").iterdir()) == ["MR_0", "MR_1"]
    for channel in range(2):
        slices, seen = read(tmp_path / f"out/two/MR_{channel}"), np.full(SHAPE, np.nan)
        assert {one.SOPClassUID.name for one in slices} == {"MR Image Storage"}
        for one in slices:
            place = (one.ImagePositionPatient, one.ImageOrientationPatient, one.PixelSpacing)
            at = voxels_of_pixels(*place, one.Rows, one.Columns, affine)
            seen[at] = one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept)
        true = voxels[..., channel]
        half_step = float(slices[0].RescaleSlope) / 2
        assert half_step < 1.1 * np.ptp(true) / 65000 / 2
        assert np.abs(seen - true).max() <= half_step * 1.0001  # NaN where a voxel is missing


def test_simple_itk_reads_spacing_origin_and_direction(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, an optional dependency, is not installed")
    path = sample(tmp_path, voxels=4 * image() - 1000)
    run(path, "--modality", "CT", "--out", tmp_path / "out")
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(tmp_path / "out/sample_000003/CT"))
    assert [name[-8:] for name in names] == [f"{n:04d}.dcm" for n in range(1, 8)], "from the feet upwards"
    reader.SetFileNames(names)
    found = reader.Execute()
    np.testing.assert_allclose(found.GetSpacing(), SPACING, atol=1e-9)
    np.testing.assert_allclose(found.GetDirection(), np.eye(3).ravel(), atol=1e-9)
    # The NIfTI is centred on the origin: its voxel at the right, back and bottom has (-13, -7.5, -9) in RAS.
    # DICOM begins with the voxel at the right and the front.
    np.testing.assert_allclose(found.GetOrigin(), (-13, -7.5, -9), atol=1e-9)
    true = nib.load(path).get_fdata()[::-1, ::-1]  # to the left and backwards
    array = sitk.GetArrayFromImage(found).T
    np.testing.assert_array_equal(array, np.rint(true), "whole Hounsfield units")
    (one, *_) = read(tmp_path / "out/sample_000003/CT")
    assert one.SOPClassUID.name == "CT Image Storage" and one.RescaleType == "HU"
    assert (one.RescaleSlope, one.RescaleIntercept, one.PixelRepresentation) == (1, 0, 1)
    assert one.PixelSpacing == [1.5, 2] and one.SliceThickness == one.SpacingBetweenSlices == 3


def test_every_file_says_that_it_is_synthetic(tmp_path):
    run(sample(tmp_path), "--modality", "MR", "--out", tmp_path / "out")
    files = read(tmp_path / "out")
    assert [one.Modality for one in files] == ["MR"] * 7 + ["RTSTRUCT", "SEG"]
    made = f"Record sample_000003.json: seed 3, SHA-256 of the config {records.config_hash({})}."
    for one in files:
        assert one.SyntheticData == "YES" and one.PatientName == "Synthetic^sample_000003"
        assert one.PatientID.startswith("SYNTHETIC-") and "Synthetic" in one.SeriesDescription
        assert not one.PatientBirthDate and not one.StudyDate
        comment = one.StructureSetDescription if one.Modality == "RTSTRUCT" else one.ImageComments
        assert "drawn, wholly or in part, by a latent diffusion model" in comment and made in comment
    assert files[0].ImageType[0] == "DERIVED" and "latent diffusion" in files[0].DerivationDescription
    for key, count in (("StudyInstanceUID", 1), ("FrameOfReferenceUID", 1), ("SeriesInstanceUID", 3)):
        assert len({one[key].value for one in files}) == count
    uids = {one.SOPInstanceUID for one in files}
    assert len(uids) == 9 and all(uid.startswith(ROOT_UID) and uid.is_valid for uid in uids)


def test_the_same_files_give_the_same_bytes_and_others_other_uids(tmp_path):
    (tmp_path / "copy").mkdir()
    path = sample(tmp_path / "first")
    for file in path.parent.iterdir():
        shutil.copyfile(file, tmp_path / "copy" / file.name)
    sample(tmp_path / "other", voxels=image(1))
    contents = {}
    for name in ("first", "copy", "other"):
        run(tmp_path / name, "--modality", "MR", "--out", tmp_path / f"{name}-out")
        files = sorted((tmp_path / f"{name}-out").rglob("*.dcm"))
        contents[name] = [file.read_bytes() for file in files]
    assert len(contents["first"]) == 9 and contents["first"] == contents["copy"]
    files = {name: read(tmp_path / f"{name}-out") for name in ("first", "other")}
    for key in ("PatientID", *(f"{of}UID" for of in ("StudyInstance", "SeriesInstance", "SOPInstance"))):
        first, other = ({one.get(key) for one in found} for found in files.values())
        assert not first & other, key


# ---------------------------------------------------------------- label


@pytest.mark.parametrize("affine", [np.diag([*SPACING, 1.0]), oblique()], ids=["RAS", "oblique"])
def test_segments_and_contours_hold_the_voxels_of_the_label(tmp_path, affine):
    save(tmp_path / "one.nii.gz", image(), affine)
    mask = save(tmp_path / "mask.nii.gz", label(), affine)
    (tmp_path / "names.json").write_text(json.dumps({"labels": {"background": 0, "Lésion": 3}}))
    run(tmp_path / "one.nii.gz", "--label", mask, "--modality", "MR", "--names", tmp_path / "names.json",
        "--out", tmp_path / "out")  # fmt: skip
    images = read(tmp_path / "out/one/MR")
    (seg,), (structures,) = read(tmp_path / "out/one/SEG"), read(tmp_path / "out/one/RTSTRUCT")

    values = {1: 3, 2: 200}
    found = {one.SegmentNumber: (one.SegmentLabel, one.TrackingID) for one in seg.SegmentSequence}
    assert found == {1: ("Lésion", "label 3"), 2: ("label 200", "label 200")}
    seen, shared = np.zeros(SHAPE, np.uint8), seg.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    for frame, pixels in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        place = (position, orientation, shared.PixelMeasuresSequence[0].PixelSpacing)
        i, j, k = voxels_of_pixels(*place, *pixels.shape, affine)
        seen[i[pixels == 1], j[pixels == 1], k[pixels == 1]] = values[number]
    np.testing.assert_array_equal(seen, label())

    names = {one.ROINumber: one.ROIName for one in structures.StructureSetROISequence}
    assert names == {3: "Lésion", 200: "label 200"}
    slices = {one.SOPInstanceUID: one for one in images}
    seen = np.zeros(SHAPE, int)
    for roi in structures.ROIContourSequence:
        for contour in roi.ContourSequence:
            one = slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            right, down = np.array(one.ImageOrientationPatient, float).reshape(2, 3)
            away = points - np.array(one.ImagePositionPatient, float)
            assert np.abs(away @ np.cross(right, down)).max() < 1e-3, "in the plane of its slice"
            corners = np.column_stack([away @ down / one.PixelSpacing[0], away @ right / one.PixelSpacing[1]])
            inside = polygon2mask((one.Rows, one.Columns), corners)
            place = (one.ImagePositionPatient, one.ImageOrientationPatient, one.PixelSpacing)
            at = voxels_of_pixels(*place, one.Rows, one.Columns, affine)
            seen[at] += int(roi.ReferencedROINumber) * inside
    np.testing.assert_array_equal(seen, label())


def test_outlines_hold_any_mask_and_each_region_has_one():
    draw = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.7, 0.9, 0.97):
        for _ in range(10):
            mask = draw.random((15, 13)) < share
            found = outlines(mask)
            assert len(found) == components(mask)[1]  # voxels with a common side
            np.testing.assert_array_equal(
                sum(polygon2mask(mask.shape, one).astype(int) for one in found), mask
            )
    square = outlines(np.pad(np.ones((9, 9), bool), 2))[0]
    assert len(square) == 8, "only its corners, which are cut off"


@pytest.mark.parametrize("kinds", [["SEG"], ["RTSTRUCT"], []])
def test_only_what_is_asked_for_is_written(tmp_path, kinds):
    run(sample(tmp_path), "--modality", "MR", "--out", tmp_path / "out", "--segmentation", *kinds)
    assert {path.name for path in (tmp_path / "out/sample_000003").iterdir()} == {"MR", *kinds}


def test_a_folder_of_samples_is_a_patient_each(tmp_path, capsys):
    for seed in range(2):
        sample(tmp_path, f"sample_{seed:06d}_age-20.5", image(seed), label() if seed else 0 * label())
    save(tmp_path / "scan.nii.gz", image(5), np.eye(4))
    run(tmp_path, "--modality", "MR", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "left out, without a record of inference.py: scan.nii.gz" in out
    assert "exported 2 volumes as MR" in out and "SEG and RTSTRUCT of 1" in out
    assert "only images of sample_000000_age-20.5: no labelled voxel" in out
    folders = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(folders) == ["sample_000000_age-20.5", "sample_000001_age-20.5"]
    assert len({one.PatientID for folder in folders.values() for one in read(folder)}) == 2
    assert not (folders["sample_000000_age-20.5"] / "SEG").exists()


# ---------------------------------------------------------------- errors


def test_the_output_is_new_and_whole(tmp_path, capsys):
    path = sample(tmp_path / "in")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/own.txt").write_text("mine")
    assert "already holds something" in refused(capsys, path, "--modality", "MR", "--out", tmp_path / "there")
    assert [one.name for one in (tmp_path / "there").iterdir()] == ["own.txt"]
    bad = save(tmp_path / "in/bad.nii.gz", image() * np.nan, np.eye(4))
    assert "NaN" in refused(capsys, path, bad, "--modality", "MR", "--out", tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "there"]


def moved() -> np.ndarray:
    affine = np.diag([*SPACING, 1.0])
    affine[0, 3] = 0.5
    return affine


@pytest.mark.parametrize(
    "voxels, affine, fault",
    [
        (label()[:-1], np.diag([*SPACING, 1.0]), r"its grid is not that of one.nii.gz: (13, 11, 7)"),
        (label(), moved(), "lies up to 0.5 mm apart"),
        (np.stack([label()] * 2, -1), np.diag([*SPACING, 1.0]), "has 2 channels; expected a label"),
        (label() + np.float32(0.5), np.diag([*SPACING, 1.0]), "no whole numbers"),
        (label().astype(np.int16) - 1, np.diag([*SPACING, 1.0]), "expected 0 to 32767"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(tmp_path, capsys, voxels, affine, fault):
    path = save(tmp_path / "one.nii.gz", image(), np.diag([*SPACING, 1.0]))
    save(tmp_path / "one_label.nii.gz", voxels, affine)
    message = refused(capsys, path, "--modality", "MR", "--out", tmp_path / "out")
    assert "one_label.nii.gz" in message and fault in message


def test_a_volume_that_dicom_cannot_hold_is_refused(tmp_path, capsys):
    sheared = np.diag([*SPACING, 1.0])
    sheared[0, 1] = 0.1
    path = save(tmp_path / "one.nii.gz", image(), sheared)
    assert "not perpendicular" in refused(capsys, path, "--modality", "MR", "--out", tmp_path / "out")
    for factor in (0.001, 1000):
        path = save(tmp_path / "one.nii.gz", factor * image(), np.eye(4))
        message = refused(capsys, path, "--modality", "CT", "--out", tmp_path / "out")
        assert "are no Hounsfield units. Use --modality MR" in message


def test_a_record_of_another_file_is_not_quoted(tmp_path, capsys):
    path = sample(tmp_path)
    mask = path.with_name("sample_000003_label.nii.gz")
    for file, voxels in ((mask, label() * 2), (path, image(1))):
        file.write_bytes(nifti_bytes(voxels[None], SPACING, voxels.dtype))
        message = refused(capsys, path, "--modality", "MR", "--out", tmp_path / "out")
        assert f"{file}: was changed since inference.py wrote it" in message
    path.with_name("sample_000003.json").unlink()
    run(path, "--modality", "MR", "--out", tmp_path / "out")
    assert "has no record" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, fault",
    [
        ({"labels": []}, "names no label"),
        ({"labels": {"1": "a" * 65}}, "at most 64 characters"),
        ({"a\\b": 1}, "at most 64 characters"),
    ],
)
def test_names_that_cannot_be_used_are_refused(tmp_path, capsys, content, fault):
    (tmp_path / "names.json").write_text(json.dumps(content))
    names = ("--names", tmp_path / "names.json")
    assert fault in refused(capsys, tmp_path, "--modality", "MR", "--out", tmp_path / "out", *names)


def test_wrong_usage_is_said(tmp_path, capsys):
    one, two = sample(tmp_path / "a"), sample(tmp_path / "b")
    more = ("--modality", "MR", "--out", tmp_path / "out")
    assert "several volumes are called sample_000003" in refused(capsys, one, two, *more)
    two = two.rename(two.with_name("other.nii.gz"))
    assert "--label: is that of one volume" in refused(capsys, one, two, "--label", one, *more)
    assert "--label nowhere.nii.gz: no such file" in refused(capsys, one, "--label", "nowhere.nii.gz", *more)
    assert "no such file or folder" in refused(capsys, tmp_path / "c.nii.gz", *more)
    assert "has no volume with a record" in refused(capsys, tmp_path, *more)
    assert "--modality" in refused(capsys, one, "--out", tmp_path / "out")


@pytest.mark.parametrize("missing", ["pydicom", "highdicom"])
def test_without_its_packages_it_says_what_to_install(tmp_path, monkeypatch, capsys, missing):
    path = sample(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    message = refused(capsys, path, "--modality", "MR", "--out", tmp_path / "out")
    assert message == f"error: DICOM needs {missing}, which is not installed: pip install {missing}\n"
    assert not (tmp_path / "out").exists()
