"""visualize_image.py: what stands where in its pictures, to the pixel."""

import contextlib
import io
import re
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import decode_by_hand
from PIL import Image, ImageSequence

import visualize_image
from ldm import figures
from ldm.diffusion.process import NoiseProcess
from ldm.diffusion.samplers import SAMPLERS, sample_latents
from ldm.figures import BELOW, GAP, MARGIN, PALETTE

SHAPE, SPACING = (40, 30, 20), np.array([2.0, 3.0, 5.0])  # 80 x 90 x 100 mm
RAS = np.array([[2.0, 0, 0, -30], [0, 3, 0, 10], [0, 0, 5, 7], [0, 0, 0, 1]])
LIT = (31, 8, 5)  # right of the middle, posterior, inferior
PIXELS = 500  # over 100 mm: 5 a mm
HEADER = 15 + 8 + GAP + 12 + 8 + GAP  # title and note
NAMES = ("sagittal", "coronal", "axial")


def draw(*words) -> str:
    """Run the script, and return what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        visualize_image.main([*map(str, words)])
    return out.getvalue()


def refused(*words) -> str:
    """Run the script on what it should refuse, and return the message."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        draw(*words)
    assert stop.value.code == 2
    assert err.getvalue().count("error: ") == 1 and "Traceback" not in err.getvalue()
    assert err.getvalue().count("\n") < 4
    return err.getvalue()


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def one_lit() -> np.ndarray:
    """A dim volume with one bright voxel."""
    voxels = np.full(SHAPE, 100, np.float32)
    voxels[LIT] = 500
    return voxels


def stored(write_image, path, how: str, voxels=None):
    """The same volume, in the same place, with its axes in another order."""
    image = nib.Nifti1Image(one_lit() if voxels is None else voxels, RAS)
    ras, other = (nib.orientations.axcodes2ornt(codes) for codes in ("RAS", how))
    image = image.as_reoriented(nib.orientations.ornt_transform(ras, other))
    assert nib.aff2axcodes(image.affine) == tuple(how)
    return write_image(path, np.asarray(image.dataobj), image.affine)


def slice_areas(picture: np.ndarray, top: int) -> list[np.ndarray]:
    """The slices of three planes in a picture, without margins, letters and captions; 5 pixels a mm."""
    left, areas = 0, []
    for height, width in ((500, 450), (500, 400), (450, 400)):
        above = top + MARGIN + (500 - height) // 2
        areas.append(picture[above : above + height, left + MARGIN : left + MARGIN + width])
        left += width + 2 * MARGIN + GAP
    return areas


def centre_of(grey: np.ndarray) -> tuple[float, float]:
    """Row and column of the centre of mass, in pixels from the upper left corner."""
    rows, columns = np.indices(grey.shape) + 0.5
    return (rows * grey).sum() / grey.sum(), (columns * grey).sum() / grey.sum()


# ---------------------------------------------------------------- where things are


@pytest.mark.parametrize(
    "plane, index, centre, size",
    [  # rows from the top, columns from the left, in pixels of 0.2 mm
        ("sagittal", LIT[0], ((20 - 5.5) * 25, (30 - 8.5) * 15), (500, 450)),
        ("coronal", LIT[1], ((20 - 5.5) * 25, (40 - 31.5) * 10), (500, 400)),
        ("axial", LIT[2], ((30 - 8.5) * 15, (40 - 31.5) * 10), (450, 400)),
    ],
)
def test_a_voxel_stands_where_a_radiologist_looks_for_it(write_image, tmp_path, plane, index, centre, size):
    path, out = stored(write_image, tmp_path / "scan.nii.gz", "AIR"), tmp_path / "out.gif"
    draw("gif", path, "--plane", plane, "--out", out, "--pixels", PIXELS, "--window", 0, 500)
    frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(Image.open(out))]
    assert len(frames) == SHAPE[NAMES.index(plane)]
    area = np.stack(frames)[:, HEADER + MARGIN :, MARGIN:][:, : size[0], : size[1]]
    assert area.shape[1:] == size
    brightest = area.max((1, 2))
    assert brightest[index] > 200 and (np.delete(brightest, index) == 51).all()
    assert centre_of(np.clip(area[index].astype(float) - 51, 0, None)) == pytest.approx(centre, abs=0.5)


def test_the_picture_of_a_file_does_not_depend_on_its_orientation(write_image, tmp_path):
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    pictures = []
    for how in ("AIR", "RAS", "LPS", "SLP"):
        path, out = stored(write_image, tmp_path / how / "scan.nii.gz", how, voxels), tmp_path / how
        draw("planes", path, "--out", out / "p.png", "--pixels", 100)
        draw("slices", path, "--out", out / "s.png", "--plane", "coronal", "--pixels", 100)
        pictures.append(((out / "p.png").read_bytes(), (out / "s.png").read_bytes()))
    assert len(set(pictures)) == 1


@pytest.mark.parametrize("degrees", [0, 15])
def test_a_position_in_mm_is_found(write_image, tmp_path, degrees):
    """Also in an oblique scan, of which the slices nearest to the planes are shown."""
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path, out = write_image(tmp_path / "scan.nii.gz", one_lit(), turn @ RAS), tmp_path / "out.png"
    at = nib.affines.apply_affine(turn @ RAS, LIT)
    draw("planes", path, "--out", out, "--pixels", PIXELS, "--at", *at)
    areas = slice_areas(pixels(out)[..., 0], HEADER)
    for area, centre in zip(areas, [(362.5, 322.5), (362.5, 85), (322.5, 85)], strict=True):
        assert centre_of(area) == pytest.approx(centre, abs=0.5)
    assert "is outside" in refused("planes", path, "--out", tmp_path / "x.png", "--at", 999, 0, 0)


def test_letters_and_captions():
    """Letters left, right, above and below; they are where figures.panel says, one of each is enough."""
    box = np.asarray(figures.panel(np.zeros((200, 200)), "axial").convert("L"))
    middle = slice(100, 136)
    sides = box[middle, :18], box[middle, -18:], box[:18, middle], box[-18:, middle]
    assert all(side.any() for side in sides) and not box[18:-18, 18:-18].any()
    assert figures.EDGES == {"sagittal": "APSI", "coronal": "RLSI", "axial": "RLAP"}
    image = nib.Nifti1Image(one_lit(), RAS)
    assert visualize_image.positions(image, (0, 5, 10)) == ["L 30.0", "A 25.0", "S 57.0"]
    assert visualize_image.positions(image, (15, 5, 10))[0] == "R 0.0"


def test_the_scale_bar_is_true():
    """50 mm at half a millimetre a pixel."""
    bar = np.asarray(figures.titled(Image.new("RGB", (500, 10)), "", "", 0.5).convert("L"))
    rows = [line for line in bar if (line[: MARGIN + 100] == 255).sum() >= 99]
    assert len(rows) == 2 and all((line[MARGIN : MARGIN + 100] == 255).all() for line in rows)
    assert all(line[MARGIN - 1] == 0 and line[MARGIN + 100] == 0 for line in rows)


def test_three_planes_of_thick_slices_are_not_squashed():
    volume = torch.zeros(10, 12, 4)
    volume[:, :, 2] = 1
    plain, true = figures.three_planes(volume), figures.three_planes(volume, (1, 1, 3))
    assert plain.shape == (12, 12 + 10 + 10 + 6)
    assert true.shape == plain.shape and (true > 0.5).sum(0)[1] == 3 and (plain > 0.5).sum(0)[1] == 1


# ---------------------------------------------------------------- grey values


def greys(write_image, tmp_path, voxels, *more) -> tuple[np.ndarray, str]:
    """The axial slice of a volume of one, 10 pixels a voxel."""
    path, out = write_image(tmp_path / "scan.nii.gz", voxels), tmp_path / "out.png"
    said = draw("slices", path, "--out", out, "--pixels", 10 * max(voxels.shape), "--force", *more)
    rows, columns = 10 * voxels.shape[1], 10 * voxels.shape[0]
    left = (max(columns + 2 * MARGIN, figures.NARROWEST) - columns) // 2
    return pixels(out)[HEADER + MARGIN :, left:][:rows, :columns, 0], said


def test_windows(write_image, tmp_path):
    """Slabs of 0, 250, 500, 750, 1000 from the subject's left to right: in the picture from right to left."""
    voxels = np.float32(np.repeat(np.arange(5) * 250, 8)[:, None, None] * np.ones((1, 40, 1)))

    def seen(*more):
        return greys(write_image, tmp_path, voxels, *more)[0][200, 360::-80].tolist()

    assert seen() == [0, 64, 128, 191, 255]
    assert seen("--window", 250, 750) == [0, 0, 128, 255, 255]
    assert seen("--window", -1000, 1000) == [128, 159, 191, 223, 255]
    voxels[0, 0, 0], voxels[39, 39, 0] = -1e6, 1e6  # less than half a percent each
    assert seen() == [0, 64, 128, 191, 255]


def test_a_constant_volume_is_grey(write_image, tmp_path):
    area, _ = greys(write_image, tmp_path, np.full((40, 40, 1), 7, np.float32))
    assert (area == 128).all()
    assert visualize_image.about(nib.Nifti1Image(one_lit(), RAS), (7, 7)).endswith("constant: 7")


def test_nan_is_black_and_told(write_image, tmp_path):
    voxels = np.linspace(1, 2, 1600, dtype=np.float32).reshape(40, 40, 1)
    voxels[10:30, 10:30] = np.nan
    area, said = greys(write_image, tmp_path, voxels)
    assert "400 of 1600 voxels are NaN or infinite" in said
    assert not area[120:280, 120:280].any() and area[:80, :80].min() > 100
    write_image(tmp_path / "nan.nii.gz", voxels * np.nan)
    assert "nothing to show" in refused("planes", tmp_path / "nan.nii.gz", "--out", tmp_path / "x.png")


def test_channels_of_4d(write_image, tmp_path):
    voxels = np.stack([one_lit(), one_lit() * 0 + 3], -1)
    path = write_image(tmp_path / "scan.nii.gz", voxels, RAS)
    assert "has 2 channel(s)" in refused("planes", path, "--out", tmp_path / "x.png", "--channel", 2)
    draw("planes", path, "--out", tmp_path / "b.png", "--channel", 1)
    middle = pixels(tmp_path / "b.png")[HEADER + MARGIN + 100, MARGIN + 100]
    assert (middle == 128).all()


def test_slices_are_spread_and_black_ends_left_out(write_image, tmp_path):
    grey = np.zeros((1, 1, 20))
    grey[..., 3:15] = 1
    assert visualize_image.shown_slices(grey, 2, 4) == [4, 7, 10, 13]
    assert visualize_image.shown_slices(grey[..., :6], 2, 7) == [3, 4, 5]
    voxels = np.zeros((30, 30, 40), np.float32)
    voxels[5:25, 5:25, 10:30] = 1
    path = write_image(tmp_path / "scan.nii.gz", voxels)
    draw("gif", path, "--out", tmp_path / "all.gif")
    draw("gif", path, "--out", tmp_path / "some.gif", "--count", 6)
    counts = [Image.open(tmp_path / f"{name}.gif").n_frames for name in ("all", "some")]
    assert counts == [20, 6]


# ---------------------------------------------------------------- masks


def boxes() -> np.ndarray:
    """Labels 1 and 3, one right of the other."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:14, 5:15, 4:12] = 1
    labels[20:36, 5:15, 4:12] = 3
    return labels


def expected_colour(value: int, grey: float) -> np.ndarray:
    return (0.5 * np.array(list(bytes.fromhex(PALETTE[value - 1][1:]))) + 0.5 * grey).astype(int)


@pytest.mark.parametrize("grid", ["RAS", "LPS", "coarse"])
def test_labels_are_coloured_where_they_are(write_image, tmp_path, grid):
    scan = write_image(tmp_path / "scan.nii.gz", one_lit(), RAS)
    labels, path, out = boxes(), tmp_path / "mask.nii.gz", tmp_path / "out.png"
    if grid == "coarse":  # voxels of 4 x 6 x 10 mm, in the same box
        coarse = RAS @ np.diag([2, 2, 2, 1.0])
        coarse[:3, 3] = nib.affines.apply_affine(RAS, [0.5, 0.5, 0.5])
        labels[:] = 0
        labels[20:36, 4:14, 4:12] = 3
        write_image(path, labels[::2, ::2, ::2], coarse)
    else:
        stored(write_image, path, grid, labels)
    place = (22, 8, 8)
    at = nib.affines.apply_affine(RAS, place)
    said = draw("overlay", scan, "--mask", path, "--out", out, "--pixels", PIXELS, "--at", *at)
    assert ("resampled by its header; it covers 100% of the scan" in said) == (grid == "coarse")
    plain, marked = (slice_areas(pixels(out), top) for top in (HEADER, HEADER + 500 + 2 * MARGIN + GAP))
    blocks = [[25, 15], [25, 10], [15, 10]]
    for plane, index, block, before, after in zip(NAMES, place, blocks, plain, marked, strict=True):
        assert (before == before[..., :1]).all()  # grey
        expected = figures.upright(labels, plane, index).repeat(block[0], 0).repeat(block[1], 1)
        assert (after[expected == 0] == before[expected == 0]).all()
        for value in set(np.unique(expected)) - {0}:
            colour = expected_colour(value, 0)
            assert np.abs(after[expected == value] - before[expected == value] / 2 - colour).max() <= 1


def test_the_slices_with_most_of_the_mask_are_shown(write_image, tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[33, 4:9, 3:6] = labels[30:37, 6, 3:6] = labels[30:37, 4:9, 4] = 2
    scan = write_image(tmp_path / "scan.nii.gz", one_lit(), RAS)
    mask, out = write_image(tmp_path / "mask.nii.gz", labels, RAS), tmp_path / "out.png"
    draw("overlay", scan, "--mask", mask, "--out", out, "--pixels", PIXELS)
    areas = slice_areas(pixels(out), HEADER + 500 + 2 * MARGIN + GAP)
    coloured = [int((area != area[..., :1]).any(-1).sum()) for area in areas]
    assert coloured == [15 * 25 * 15, 21 * 25 * 10, 35 * 15 * 10]


def test_colours_of_many_labels():
    one = np.repeat(np.arange(40), np.arange(40) + 1)[None]  # the larger the value, the more pixels
    colours, entries = visualize_image.colours_of([one])
    assert colours == dict(zip(range(30, 40), PALETTE, strict=True))
    assert [text for _, text in entries] == [*map(str, range(30, 40)), "29 smaller label(s) not coloured"]
    colours, entries = visualize_image.colours_of([np.array([[0, 7, 2]])])
    assert colours == {2: PALETTE[1], 7: PALETTE[6]} and len(entries) == 2
    assert visualize_image.colours_of([np.zeros((3, 3))]) == ({}, [])


def test_masks_that_are_none_or_elsewhere(write_image, tmp_path):
    scan, out = write_image(tmp_path / "scan.nii.gz", one_lit(), RAS), tmp_path / "out.png"
    far = RAS.copy()
    far[0, 3] += 500
    mask = write_image(tmp_path / "far.nii.gz", boxes(), far)
    message = refused("overlay", scan, "--mask", mask, "--out", out)
    assert "does not overlap" in message and "R 469 to 549" in message and "R -31 to 49" in message
    mask = write_image(tmp_path / "half.nii.gz", boxes() / np.float32(2), RAS)
    assert "not a mask" in refused("overlay", scan, "--mask", mask, "--out", out)
    mask = write_image(tmp_path / "4d.nii.gz", np.stack([boxes()] * 3, -1), RAS)
    assert "holds 3 volumes" in refused("overlay", scan, "--mask", mask, "--out", out)
    assert not out.exists()
    near = RAS.copy()
    near[0, 3] += 40  # half of the width
    mask = write_image(tmp_path / "near.nii.gz", boxes(), near)
    assert "covers 50% of the scan" in draw("overlay", scan, "--mask", mask, "--out", out)
    mask, out = write_image(tmp_path / "none.nii.gz", boxes() * 0, RAS), tmp_path / "none.png"
    assert "no labelled voxel within the scan" in draw("overlay", scan, "--mask", mask, "--out", out)


# ---------------------------------------------------------------- two volumes


def noisy(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 100, SHAPE).astype(np.float32)


def difference_areas(path) -> list[np.ndarray]:
    strip, row = 13 + 8 + GAP, 500 + 2 * MARGIN + GAP
    return slice_areas(pixels(path), HEADER + 2 * (strip + row) + strip)


@pytest.mark.parametrize("how", ["RAS", "LPS"])
def test_a_difference_in_numbers_and_colours(write_image, tmp_path, how):
    a, out = noisy(), tmp_path / "out.png"
    b = a.copy()
    b[:20] += 20  # left of the subject, right in the picture
    b[20:, 15:] -= 20
    first = write_image(tmp_path / "a.nii.gz", a, RAS)
    second = stored(write_image, tmp_path / "b.nii.gz", how, b)
    said = draw("compare", first, second, "--out", out, "--pixels", PIXELS, "--window", 0, 100)
    psnr, ssim, l1 = (float(re.search(rf"{name} ([\d.]+)", said)[1]) for name in ("PSNR", "SSIM", "L1"))
    assert psnr == pytest.approx(10 * np.log10(1 / (0.75 * 0.2**2)), abs=0.006)
    assert l1 == pytest.approx(0.15, abs=1e-5) and 0.5 < ssim < 1
    assert "largest difference 20" in said
    coronal, axial = difference_areas(out)[1:]
    orange, blue = (255, 153, 26), tuple(np.uint8(np.array(BELOW) * 255 + 0.5))
    assert np.abs(coronal[100:400, 220:380] - orange).max() <= 1  # middle: at 15, anterior
    assert np.abs(coronal[100:400, 20:180] - blue).max() <= 1
    assert np.abs(axial[20:200, 20:180] - blue).max() <= 1 and not axial[250:430, 20:180].any()


def test_the_same_volume_twice(write_image, tmp_path):
    path, out = write_image(tmp_path / "a.nii.gz", noisy(), RAS), tmp_path / "out.png"
    said = draw("compare", path, path, "--out", out, "--pixels", PIXELS)
    assert "no voxel differs" in said and "SSIM 1.0000" in said
    assert not any(area.any() for area in difference_areas(out))


def test_a_second_volume_on_another_grid_is_laid_onto_the_first(write_image, tmp_path):
    """A field that is linear in position is the same on any grid."""

    def field(shape, affine):
        positions = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
        return (positions @ [1.0, 2.0, 3.0]).astype(np.float32)

    coarse = RAS @ np.diag([1.7, 1.3, 1.1, 1.0])
    a, voxels = write_image(tmp_path / "a.nii.gz", field(SHAPE, RAS), RAS), field((30, 30, 25), coarse)
    for moved, expected in ((0, 0), (5, 30)):  # 5 mm along each: 5 + 10 + 15 less
        affine = coarse.copy()
        affine[:3, 3] += moved
        b = write_image(tmp_path / "b.nii.gz", voxels, affine)
        said = draw("compare", a, b, "--out", tmp_path / "out.png", "--force")
        assert "resampled" in said and "PSNR" not in said
        largest = float(re.search(r"largest difference ([\d.e-]+)", said)[1])
        assert largest == pytest.approx(expected, abs=0.01 if expected else 1e-3)


# ---------------------------------------------------------------- denoising


def frame_by_hand(project, voxels: np.ndarray, seed: int, note: str) -> np.ndarray:
    low, high = project.checkpoint("diffusion_unet.pt")["geometry"]["limits"][0]
    grey, pixel = np.clip((voxels - low) / (high - low), 0, 1), 36 / 100
    panels = figures.three_panels(figures.cut(grey, (2, 1.5, 3), pixel))
    return np.asarray(figures.titled(panels, f"seed {seed}", note, pixel).convert("L")).astype(int)


def test_denoising_ends_on_the_volume_that_inference_writes(done, tmp_path):
    out = tmp_path / "out.gif"
    words = ["--seed", 2, "--steps", 4, "--frames", 4, "--pixels", 100]
    draw("denoise", *done.argv("--out", out, *words))
    frames = [np.asarray(frame.convert("L")).astype(int) for frame in ImageSequence.Iterator(Image.open(out))]
    assert len(frames) == 4
    written = np.asarray(nib.load(done.output_dir / "sample_000002.nii.gz").dataobj)
    last = frame_by_hand(done, written, 2, "step 4 of 4, at noise level 0.250")
    assert np.array_equal(frames[-1], last)

    # The noise, and the first estimate, z_0 = z_T + velocity
    checkpoint = done.checkpoint("diffusion_unet.pt")
    noise = torch.randn(checkpoint["latent_shape"], generator=torch.Generator().manual_seed(2))[None]
    with torch.no_grad():
        unet = done.network("diffusion_def", checkpoint["model"])
        estimate = noise + unet(noise, timesteps=torch.tensor([1000.0]))
    first, second = "noise", "step 1 of 4, at noise level 1.000"
    for frame, latents, note in ((frames[0], noise, first), (frames[1], estimate, second)):
        expected = frame_by_hand(done, decode_by_hand(done, latents, checkpoint["scale_factor"])[0], 2, note)
        assert np.abs(frame - expected).max() <= 1
    assert all(np.abs(one - other).max() > 10 for one, other in zip(frames, frames[1:], strict=False))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_estimates_lead_to_what_a_sampler_returns(sampler):
    """Of data with mean 2 and spread 0.5, for which the best prediction is known."""
    flow = SAMPLERS[sampler].for_flow
    kept_share = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    process = NoiseProcess(None, "velocity", 1000) if flow else NoiseProcess(kept_share, "epsilon", 1000)

    def unet(x, timesteps):
        a, s = (level.reshape(-1, 1, 1, 1, 1) for level in process.levels(timesteps))
        z0 = 2 + a * 0.25 / (a**2 * 0.25 + s**2) * (x - a * 2)
        return (z0 - (x - a * z0) / s if flow else (x - a * z0) / s).float()

    networks = SimpleNamespace(unet=unet, process=process)
    times = process.sampling_times(12, SAMPLERS[sampler].even)[:-1]
    watched, kept = visualize_image.watching(networks, times[[0, 4, 11]])
    result = sample_latents(lambda x, t: watched(x, timesteps=t), process, (2, 3, 3, 3), [5], 12, sampler)
    assert sorted(kept) == [0, 1, 2, 3]
    noise = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(kept[0][0], noise)
    assert torch.allclose(kept[1], torch.full_like(kept[1], 2), atol=0.05)  # nothing is known yet: the mean
    assert torch.allclose(kept[3], result, atol=1e-4)


def test_denoise_is_refused(done, tmp_path):
    def said(*more):
        return refused("denoise", *done.argv("--out", tmp_path / "x.gif", *more))

    assert "makes 1 channel" in said("--channel", 1)
    assert "does not fit" in said("--sampler", "ddim")
    assert "--frames 1" in said("--frames", 1)
    assert "--scale-factor" in said("--scale-factor", -1)
    assert not (tmp_path / "x.gif").exists()


# ---------------------------------------------------------------- many volumes, wrong usage


def test_a_folder_is_its_volumes(write_image, tmp_path):
    folder = tmp_path / "many"
    for i in range(3):
        write_image(folder / f"scan_{i}.nii.gz", noisy(i), RAS)
    (folder / "sample_0.json").write_text("{}")
    (folder / "._scan_0.nii.gz").write_text("of macOS")
    draw("planes", folder, "--out", tmp_path / "all.png", "--columns", 3)
    named = [folder / f"scan_{i}.nii.gz" for i in range(3)]
    draw("planes", *named, "--out", tmp_path / "each.png", "--columns", 3)
    assert np.array_equal(pixels(tmp_path / "all.png"), pixels(tmp_path / "each.png"))
    draw("planes", folder, "--out", tmp_path / "below.png", "--columns", 1)
    wide, high = (pixels(tmp_path / f"{name}.png").shape[:2] for name in ("all", "below"))
    assert wide[1] > 2.9 * high[1] and high[0] > 2.5 * wide[0]
    (tmp_path / "empty").mkdir()
    assert "holds no volumes" in refused("planes", tmp_path / "empty", "--out", tmp_path / "x.png")


def test_wrong_usage_writes_nothing(write_image, tmp_path):
    scan, out = write_image(tmp_path / "scan.nii.gz", one_lit(), RAS), tmp_path / "out.png"
    flat = write_image(tmp_path / "flat.nii.gz", np.zeros((5, 5), np.float32))
    assert "no such file" in refused("slices", tmp_path / "none.nii.gz", "--out", out)
    assert "3D image" in refused("slices", flat, "--out", out)
    assert "lower one first" in refused("slices", scan, "--out", out, "--window", 5, 5)
    assert "--count 0" in refused("slices", scan, "--out", out, "--count", 0)
    assert "writes a .gif" in refused("gif", scan, "--out", out)
    assert "writes a .png" in refused("planes", scan, "--out", tmp_path / "out.gif")
    assert not out.exists()
    draw("slices", scan, "--out", out)
    before = out.read_bytes()
    assert "exists." in refused("planes", scan, "--out", out)
    assert out.read_bytes() == before
    draw("planes", scan, "--out", out, "--force")
    assert out.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat.nii.gz", "out.png", "scan.nii.gz"]
