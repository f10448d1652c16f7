"""From a file to a normalised volume: orientation, resampling, channels, units, and files that are bad."""

import gzip
import itertools
import re
import struct
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from ldm import UserError
from ldm.data.augmentation import augmentation
from ldm.data.intensity import Intensity, from_unit_range, to_unit_range
from ldm.data.preprocessing import CODE, Preprocessing, crop_or_pad
from ldm.data.reading import CHUNK, MGH_TAGS, header_notes, open_image, ras_geometry, read_image

ORIENTATIONS = [
    "".join(signs)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product(*axes)
]
SPACING = (2.0, 2.0, 2.0)


def rotation(degrees: float) -> np.ndarray:
    """About the superior axis, then half as much about the right."""
    a, b = np.deg2rad(degrees), np.deg2rad(degrees / 2)
    about_s = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_r = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_s @ about_r


def ramp(shape, sizes, degrees=0.0) -> tuple[np.ndarray, np.ndarray]:
    """A volume whose value is 100 + i + 10 j + 50 k in mm along its own axes, and its affine."""
    grid = np.meshgrid(*(np.arange(n) * size for n, size in zip(shape, sizes, strict=True)), indexing="ij")
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.diag(sizes)
    affine[:3, 3] = (-20, 7, 3)
    return (100 + grid[0] + 10 * grid[1] + 50 * grid[2]).astype(np.float32), affine


def stored_as(codes: str, voxels, affine) -> nibabel.Nifti1Image:
    """The same world image, its voxels stored along the axes `codes`."""
    image = nibabel.Nifti1Image(voxels, affine)
    start = nibabel.orientations.io_orientation(affine)
    end = nibabel.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nibabel.orientations.ornt_transform(start, end))


# ---- orientation and spacing


@pytest.mark.parametrize("degrees", [0.0, 15.0])
def test_every_storage_of_a_world_image_gives_the_same_volume(tmp_path, degrees):
    voxels, affine = ramp((6, 7, 8), SPACING, degrees)
    assert len(set(ORIENTATIONS)) == 48
    for codes in ORIENTATIONS:
        path = tmp_path / f"{codes}.nii"
        nibabel.save(stored_as(codes, voxels, affine), path)
        volume = Preprocessing((0,), SPACING).read([path])
        assert volume.shape == (1, 6, 7, 8) and np.abs(volume[0] - voxels).max() < 1e-3, codes
        shape, sizes = ras_geometry(path)
        assert shape.tolist() == [6, 7, 8] and np.allclose(sizes, SPACING)


@pytest.mark.parametrize("degrees", [0.0, 10.0])
def test_resampling_keeps_the_world(tmp_path, degrees):
    """A ramp in mm stays that ramp: in mm the slopes are 1, 10 and 50, whatever voxel size or storage."""
    voxels, affine = ramp((16, 14, 12), (1.0, 2.0, 3.0), degrees)
    volumes, spacing = [], (1.5, 1.0, 2.2)
    for codes in ("RAS", "LPS", "PIR", "SAL"):
        nibabel.save(stored_as(codes, voxels, affine), tmp_path / f"{codes}.nii")
        volumes.append(Preprocessing((0,), spacing).read([tmp_path / f"{codes}.nii"])[0])
    assert all(np.abs(volume - volumes[0]).max() < 1e-2 for volume in volumes)
    assert volumes[0].shape == (11, 27, 16)  # centre to centre 15, 26 and 33 mm
    inner = volumes[0][2:-2, 2:-2, 2:-2]  # the low-pass filter bends the ramp at the border
    for axis, slope in enumerate((1, 10, 50)):
        assert np.allclose(np.diff(inner, axis=axis), slope * spacing[axis], atol=1e-2)
    start = 100 + np.dot([2 * s for s in spacing], (1, 10, 50))  # the first voxel stays where it was
    error = 1e-2 if degrees == 0 else 0.5 * np.dot(spacing, (1, 10, 50))
    assert inner[0, 0, 0] == pytest.approx(start, abs=error)


def test_label_is_resampled_by_the_nearest_voxel(tmp_path, write_image):
    label = np.zeros((8, 8, 8), np.uint8)
    label[4:, :, :4] = 7
    path = write_image(tmp_path / "label.nii.gz", label, np.diag([2.0, 2.0, 2.0, 1.0]))
    fine = Preprocessing((0,), (1.0, 1.0, 1.0)).label(path)
    assert fine.shape == (1, 15, 15, 15) and fine.dtype == np.uint8
    assert set(np.unique(fine)) == {0, 7}
    assert (fine[0, 8:, :, :7] == 7).all() and not fine[0, :7].any() and not fine[0, :, :, 8:].any()


def amplitude(line: np.ndarray, cycles: float) -> float:
    """Amplitude of the sinusoid of `cycles` a sample in a line, by least squares."""
    phase = 2 * np.pi * cycles * np.arange(len(line))
    basis = np.stack([np.cos(phase), np.sin(phase), np.ones_like(phase)], axis=1)
    return float(np.hypot(*np.linalg.lstsq(basis, line, rcond=None)[0][:2]))


@pytest.mark.parametrize("cycles", [0.05, 0.2, 0.4, 0.48])
@pytest.mark.parametrize("axis", [0, 2])
def test_low_pass_before_halving_the_resolution(tmp_path, write_image, cycles, axis):
    """From 2 mm to 4 mm, a Gaussian of half a voxel: its gain at a frequency f is sum(w cos(2 pi f k)).

    Above a quarter of a cycle a voxel the new grid aliases what is left: 0.4 comes out as 2 * 0.4 - 1.
    """
    wave = 10 + 3 * np.cos(2 * np.pi * cycles * np.arange(81) + 0.3)
    voxels = np.moveaxis(np.broadcast_to(wave, (4, 4, 81)), 2, axis).astype(np.float32)
    path = write_image(tmp_path / "wave.nii", voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
    spacing = [2.0, 2.0, 2.0]
    spacing[axis] = 4.0
    line = np.moveaxis(Preprocessing((0,), tuple(spacing)).read([path])[0], axis, 2)[1, 1, 2:-2]
    k = np.arange(-2, 3)
    weights = np.exp(-(k**2) / (2 * 0.5**2))
    gain = np.sum(weights * np.cos(2 * np.pi * cycles * k)) / weights.sum()
    assert len(line) == 41 - 4
    assert line.mean() == pytest.approx(10, abs=0.3)
    assert amplitude(line, 2 * cycles) == pytest.approx(3 * gain, abs=0.02)
    if cycles > 0.3:
        assert amplitude(line, 2 * cycles) < 0.65 * 3  # what would alias whole without the filter


@pytest.mark.parametrize("spacing", [0.7, 1.1, 2.0, 2.7])
def test_constant_stays_constant_up_to_the_border(tmp_path, write_image, spacing):
    path = write_image(tmp_path / "constant.nii", np.full((10, 11, 12), 7, np.float32))
    volume = Preprocessing((0,), (spacing,) * 3).read([path])  # the last voxels lie outside the old ones
    assert np.allclose(volume, 7, atol=1e-4)


def test_no_filter_where_nothing_is_made_coarser(tmp_path, write_image):
    voxels = np.random.default_rng(0).random((7, 7, 7), np.float32)
    path = write_image(tmp_path / "noise.nii", voxels)
    assert np.array_equal(Preprocessing((0,), (1.0, 1.0, 1.0)).read([path])[0], voxels)
    fine = Preprocessing((0,), (0.5, 0.5, 0.5)).read([path])[0]
    assert np.allclose(fine[::2, ::2, ::2], voxels, atol=1e-5)  # the old voxels are among the new ones


# ---- intensities


def test_percentiles_are_those_of_the_whole_volume(tmp_path, write_image):
    values = np.random.default_rng(0).permutation(1001).astype(np.float32).reshape(7, 11, 13)
    path = write_image(tmp_path / "values.nii", values)  # 0 .. 1000: percentile p is 10 p
    way = Preprocessing((0,), (1.0, 1.0, 1.0), Intensity(10.0, 99.5))
    assert np.allclose(way.limits([path]), [[100, 995]])
    volume = way([path])
    assert volume.dtype == np.float32
    assert np.allclose(volume[0], np.clip((values - 100) / 895, 0, 1), atol=1e-6)
    assert np.count_nonzero(volume == 1) == 6 and np.count_nonzero(volume == 0) == 101
    unclipped = Preprocessing((0,), (1.0, 1.0, 1.0), Intensity(10.0, 99.5, clip=False))([path])
    assert unclipped.min() == pytest.approx(-100 / 895) and unclipped.max() == pytest.approx(900 / 895)


def test_unit_range_and_back():
    rng = np.random.default_rng(0)
    volume = np.stack([rng.normal(50, 20, (5, 6, 7)), rng.normal(-1000, 3, (5, 6, 7))]).astype(np.float32)
    limits = Intensity(2.0, 98.0).limits(volume)
    assert limits.shape == (2, 2) and np.allclose(limits[0], np.percentile(volume[0], [2, 98]))
    back = from_unit_range(to_unit_range(volume, limits, clip=False), limits)
    assert np.abs(back - volume).max() < 1e-3
    clipped = from_unit_range(to_unit_range(volume, limits, clip=True), limits)
    wide = limits[:, :, None, None, None]
    assert np.abs(clipped - np.clip(volume, wide[:, 0], wide[:, 1])).max() < 1e-3


CT = np.linspace(-3024, 1500, 343).reshape(7, 7, 7).astype(np.float32)
WINDOW = Intensity(None, None, window=((-1000.0, 1000.0),))
GRID = (1.0, 1.0, 1.0)


def test_a_window_is_the_same_in_every_volume_and_gives_its_units_back(tmp_path, write_image):
    path = write_image(tmp_path / "ct.nii", CT)
    volume = Preprocessing((0,), GRID, WINDOW)([path])
    assert np.allclose(volume[0], np.clip((CT + 1000) / 2000, 0, 1), atol=1e-6)
    limits = Preprocessing((0,), GRID, WINDOW).limits([tmp_path / "not read.nii"])
    assert limits.tolist() == [[-1000, 1000]]
    assert np.allclose(from_unit_range(volume, limits)[0], np.clip(CT, -1000, 1000), atol=1e-3)
    wide = Preprocessing((0,), GRID, replace(WINDOW, clip=False))([path])
    assert np.allclose(wide[0], (CT + 1000) / 2000, atol=1e-5)


def test_each_channel_may_have_a_window_of_its_own(tmp_path, write_image):
    path = write_image(tmp_path / "a.nii", np.stack([CT, CT / 1000, 0 * CT], -1))
    pair = replace(WINDOW, window=((-1.0, 1.0), (-1000.0, 1000.0)))
    volume = Preprocessing((1, 0), GRID, pair)([path])  # in the order of the channels that are used
    assert np.allclose(volume[0], volume[1], atol=1e-6) and 0.3 < volume.mean() < 0.4
    far = replace(WINDOW, window=((-1000.0, 1000.0), (2000.0, 3000.0)))
    with pytest.raises(UserError, match=r"a\.nii: channel 1: .*-3\.024 to 1\.5, lie .*, 2000 to 3000"):
        Preprocessing((0, 1), GRID, far)([path])


@pytest.mark.parametrize("way, low", [(Intensity(), 100), (WINDOW, -1000)])
def test_nan_is_background_before_anything_is_resampled(tmp_path, write_image, way, low):
    voxels = np.random.default_rng(0).uniform(100, 900, (8, 8, 8)).astype(np.float32)
    voxels[4, 4, 4] = 100
    whole = voxels.copy()
    voxels[:3], whole[:3] = np.nan, low
    way = replace(way, nan_is_background=True)
    paths = [write_image(tmp_path / "nan.nii", voxels), write_image(tmp_path / "whole.nii", whole)]
    volumes = [Preprocessing((0,), SPACING, way)([path]) for path in paths]
    assert np.array_equal(*volumes) and (volumes[0][0, 0] == 0).all()
    write_image(paths[0], np.where(voxels > 800, np.inf, voxels))
    with pytest.raises(UserError, match=r"nan\.nii: has \d+ infinite voxels"):
        Preprocessing((0,), SPACING, way)([paths[0]])
    write_image(paths[0], voxels * np.nan)
    with pytest.raises(UserError, match=r"nan\.nii: every voxel is NaN"):
        Preprocessing((0,), SPACING, way)([paths[0]])


def scan(padding: float = 0.0, share: float = 0.5, low: float = 20, high: float = 800) -> np.ndarray:
    """Bright noise beside a share of padding."""
    values = np.random.default_rng(0).uniform(low, high, 27000).astype(np.float32)
    values[: int(share * values.size)] = padding
    return values.reshape(30, 30, 30)


def with_stray(volume: np.ndarray, *values: float) -> np.ndarray:
    volume = volume.copy()
    volume[15, 15, : len(values)] = values
    return volume


@pytest.mark.parametrize(
    "volume, way, message",
    [
        (with_stray(scan(), -1e7), Intensity(), r"minimum -1e\+07, but 99\.9 % .* between 0 and 79\d"),
        (with_stray(scan(), -1e7), Intensity(0.5), None),
        (with_stray(scan(), -1e7), Intensity(0.5, clip=False), r"minimum -1e\+07"),
        (with_stray(scan(), 1e7), Intensity(), None),
        (
            with_stray(scan(), 1e7),
            Intensity(0, 100),
            r"maximum 1e\+07, but .*: lower intensity.upper_percent",
        ),
        (scan(-3024, 0.2, -1000, 500), Intensity(), r"20\.0% of its voxels are -3024 or less, .* padding"),
        (scan(-3024, 0.2, -1000, 500), Intensity(0.5), "padding"),
        (scan(-3024, 0.2, -1000, 500), WINDOW, None),
        (scan(-1024, 0.2, -1000, 500), Intensity(), None),
        (scan(0, 0.7, 400), Intensity(), None),  # a mask's background beside bright tissue
        (scan(-1, 0.2, -1, 0.5), WINDOW, r"a small part of intensity\.window, -1000 to 1000. Is it in other"),
        (np.random.default_rng(0).normal(size=(40, 40, 40)), Intensity(), None),
    ],
)
def test_what_squeezes_the_intensities_is_told(volume, way, message):
    found = way.low_contrast_reason(volume, way.limits(volume[None])[0])
    assert found is None if message is None else re.search(message, found), found


def test_a_volume_that_is_squeezed_is_told_of_once(tmp_path, write_image, capsys):
    path = write_image(tmp_path / "stray.nii", with_stray(scan(), -1e7))
    for _ in range(2):
        Preprocessing((0,), GRID)([path])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"warning: {path}: minimum -1e+07, but")


def test_volumes_that_older_versions_cached_are_found():
    """New keys are in the name of a cached volume only where they are used."""
    old = "Preprocessing(channels=(0,), spacing=(1.0, 1.0, 1.0), lower=0.0, upper=99.5, clip=True) " + CODE
    assert Preprocessing((0,), GRID).key == old
    ways = [Intensity(), WINDOW, replace(WINDOW, window=((0.0, 1.0),)), Intensity(nan_is_background=True)]
    assert len({Preprocessing((0,), GRID, way).key for way in ways}) == 4


# ---- headers


FLIPPED = np.diag([-2.0, 2.0, 3.0, 1.0])


def headed(path, unit="mm", sform=1, qform=1, turned=None, affine=FLIPPED):
    """An image with this header; its qform is `turned` where that is given."""
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((6, 7, 8), np.float32), affine)
    image.header.set_xyzt_units(unit, "sec")
    image.set_qform(affine if turned is None else turned, qform)
    image.set_sform(affine, sform)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("unit, mm", [("micron", 1e-3), ("meter", 1e3)])
def test_other_units_are_converted_to_mm(tmp_path, unit, mm, ending):
    plain, affine = headed(tmp_path / f"mm{ending}"), FLIPPED.copy()
    affine[:3] /= mm
    other = headed(tmp_path / f"other{ending}", unit, affine=affine)
    assert np.allclose(open_image(other).affine, open_image(plain).affine)
    assert ras_geometry(other)[1].tolist() == pytest.approx([2, 2, 3])
    volumes = [Preprocessing((0,), SPACING).read([path]) for path in (plain, other)]
    assert volumes[1].shape == (1, 6, 7, 12) and np.allclose(*volumes, atol=1e-4)
    (note,) = header_notes(open_image(other))
    assert re.fullmatch("header in (micro)?metres, converted to mm", note)


def test_a_header_in_a_wrong_unit_is_refused(tmp_path):
    path = headed(tmp_path / "a.nii", "meter")
    with pytest.raises(
        UserError, match=r"2000 x 2000 x 3000 mm \(2 x 2 x 3 metres in its header\); expected"
    ):
        open_image(path)
    assert open_image(headed(path, "unknown")).affine[2, 2] == 3
    metres = FLIPPED * [1e-3, 1e-3, 1e-3, 1]
    (note,) = header_notes(open_image(headed(path, affine=metres)))
    assert note == "voxels of 0.002 x 0.002 x 0.003 mm: is the unit in its header wrong?"
    with pytest.raises(
        UserError, match=r"covers 0\.012 x .* mm, a single voxel along an axis at 2 x 2 x 2 mm"
    ):
        Preprocessing((0,), SPACING).read([path])


def test_what_a_header_says_twice_or_not_at_all_is_noted(tmp_path):
    path, mirrored = tmp_path / "a.nii", np.diag([2.0, 2.0, 3.0, 1.0])
    assert not header_notes(open_image(headed(path)))
    assert not header_notes(open_image(headed(path, sform=0)))
    assert not header_notes(open_image(headed(path, qform=0, turned=mirrored)))
    (note,) = header_notes(open_image(headed(path, turned=mirrored)))
    assert note == "qform and sform place it 20 mm apart: the sform wins"
    (note,) = header_notes(open_image(headed(path, turned=np.diag([-1.0, 1.0, 1.0, 1.0]))))
    assert note == "pixdim says voxels of 1 x 1 x 1 mm, the sform 2 x 2 x 3 mm: the sform wins"
    content = bytearray(headed(path).read_bytes())
    content[256:260] = struct.pack("<f", 2)  # quatern_b, of which no rotation has more than 1
    path.write_bytes(content)
    assert header_notes(open_image(path)) == ["its qform is no affine: the sform wins"]
    (note,) = header_notes(open_image(headed(path, sform=0, qform=0)))
    assert note.startswith("no orientation in its header") and note.endswith("for left, anterior, superior")
    assert open_image(path).affine[0, 0] == -2  # as the note says


@pytest.mark.parametrize("more, channels", [((1,), 1), ((1, 1), 1), ((2, 1), 2), ((1, 2), 2)])
def test_axes_of_length_1_do_not_matter(tmp_path, write_image, more, channels):
    voxels = np.random.default_rng(0).random((5, 6, 7, channels), np.float32)
    path = write_image(tmp_path / "a.nii.gz", voxels.reshape(5, 6, 7, *more))
    volume = Preprocessing(tuple(range(channels)), GRID).read([path])
    assert np.array_equal(volume, np.moveaxis(voxels, -1, 0))
    with pytest.raises(UserError, match=rf"has {channels} channel"):
        Preprocessing((channels,), GRID).read([path])


# ---- channels


@pytest.fixture
def four_channels(tmp_path, write_image):
    """A 4D image whose channel c holds values around 1000 c."""
    voxels = np.random.default_rng(0).random((5, 6, 7, 4), np.float32) + 1000 * np.arange(4, dtype=np.float32)
    return write_image(tmp_path / "bold.nii.gz", voxels), voxels


def test_channels_of_a_4d_image(four_channels):
    path, voxels = four_channels
    for channels in [(0,), (2,), (2, 0), (3, 1, 2, 0)]:
        volume = Preprocessing(channels, (1.0, 1.0, 1.0)).read([path])
        assert np.array_equal(volume, np.moveaxis(voxels[..., list(channels)], 3, 0))
    scaled = Preprocessing((0, 1, 2, 3), GRID, Intensity(0, 100))([path])  # each channel by its own limits
    assert scaled.min((1, 2, 3)).tolist() == [0] * 4 and scaled.max((1, 2, 3)).tolist() == [1] * 4


def test_channels_in_files_of_their_own(tmp_path, write_image):
    paths = [write_image(tmp_path / f"x_000{c}.nii", np.full((3, 3, 3), c, np.float32)) for c in range(3)]
    assert Preprocessing((2, 0), (1.0, 1.0, 1.0)).read(paths)[:, 0, 0, 0].tolist() == [2, 0]
    with pytest.raises(UserError, match="`channel` is 3, the case has 3 files"):
        Preprocessing((0, 3), (1.0, 1.0, 1.0)).read(paths)
    write_image(paths[1], np.ones((3, 3, 4), np.float32))
    with pytest.raises(UserError, match="channels differ in shape"):
        Preprocessing((0, 1), (1.0, 1.0, 1.0)).read(paths)


def test_slope_and_intercept(tmp_path):
    raw = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nibabel.Nifti1Image(raw, np.eye(4))
    image.header.set_slope_inter(0.5, -100)
    image.to_filename(tmp_path / "scaled.nii.gz")
    stored = nibabel.load(tmp_path / "scaled.nii.gz")
    assert stored.dataobj.slope == 0.5 and stored.dataobj.inter == -100
    volume = Preprocessing((0,), (1.0, 1.0, 1.0)).read([tmp_path / "scaled.nii.gz"])
    expected = np.asarray(stored.dataobj)  # nibabel chose the stored integers for these values
    assert np.array_equal(volume[0], expected) and expected.min() < -50


# ---- damaged files


@pytest.mark.parametrize("name, more", [("a.nii.gz", 0), ("a.mgz", MGH_TAGS)])
def test_no_more_is_unpacked_than_the_header_tells_of(tmp_path, write_image, monkeypatch, name, more):
    """A bomb: a small file that unpacks to a hundred times what memory may hold."""
    path = write_image(tmp_path / name, np.random.default_rng(0).random((12, 12, 12), np.float32))
    read_image(path)
    with gzip.open(path, "ab") as file:
        file.write(bytes(2 * MGH_TAGS + 20 * CHUNK))
    read, unpacked = gzip.GzipFile.read, []

    def counted(file, size=-1):
        content = read(file, size)
        unpacked.append(len(content))
        return content

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    with pytest.raises(UserError, match="its voxels cannot be read .* The header is damaged"):
        read_image(path)
    assert sum(unpacked) <= more + 2 * CHUNK


# ---- fitting and augmentation


def test_fit_crops_and_pads_about_the_centre():
    volume = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)
    assert crop_or_pad(volume, (4, 1, 1)).ravel().tolist() == [1, 2, 3, 4]
    assert crop_or_pad(volume, (8, 1, 1)).ravel().tolist() == [0, 0, 1, 2, 3, 4, 5, 0]
    assert isinstance(crop_or_pad(volume, (4, 1, 1)), np.ndarray)
    assert torch.equal(crop_or_pad(torch.from_numpy(volume), (4, 1, 1)).ravel(), torch.arange(1.0, 5.0))


def test_nothing_random_is_no_augmentation():
    assert augmentation({}, (4, 4, 4), random_crop=False) is None
    assert augmentation({"flip_axes": [], "foreground_prob": 0.5}, (4, 4, 4), random_crop=False) is None


def test_flips_are_of_the_named_axes_and_as_often_as_said():
    volume = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    flip = augmentation({"flip_axes": [1], "flip_prob": 0.25}, (2, 2, 2), False)
    rng = np.random.RandomState(0)
    items = [flip(volume, None, rng).numpy() for _ in range(400)]
    flipped = sum(np.array_equal(item, volume[:, :, ::-1]) for item in items)
    assert flipped + sum(np.array_equal(item, volume) for item in items) == 400
    assert flipped == pytest.approx(100, abs=30)


def test_intensity_changes_stay_within_their_bounds():
    section = {"intensity_scale": 0.2, "intensity_shift": 0.1, "intensity_prob": 1.0}
    change, rng = augmentation(section, (2, 2, 2), False), np.random.RandomState(0)
    zeros = np.array([change(np.zeros((1, 2, 2, 2), np.float32), None, rng).mean() for _ in range(200)])
    ones = np.array([change(np.ones((1, 2, 2, 2), np.float32), None, rng).mean() for _ in range(200)])
    assert 0.08 < np.abs(zeros).max() <= 0.1  # the shift alone
    assert 1.15 < ones.max() <= 1.3 and 0.7 <= ones.min() < 0.85
