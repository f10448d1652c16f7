"""Simulated brains: the layout of MSD Task01, seeds that mean something, anatomy that varies as in life."""

import functools
import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

import simulate_brains
from ldm import UserError
from ldm.data.layouts import find_cases
from ldm.data.simulation import (
    LATTICE_STEP,
    TISSUES,
    draw_pose,
    draw_tumour,
    draw_velocity,
    exponential,
    has_tumour,
    load_atlas,
    mass_effect,
    output_grid,
    random_field,
    sample,
    simulate_subject,
    slab,
)
from ldm.metrics import band_power, ms_ssim

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "t1_brain_2mm"
SEED = 3
SPACING = (4.0, 4.0, 4.0)


@functools.cache
def simulated(number, seed=SEED, spacing=SPACING, tumour=False):
    return simulate_subject(seed, number, spacing, tumour)


def healthy():
    return [simulated(i) for i in range(5)]


def jacobian_determinant(displacement):
    """Jacobian determinant (X, Y, Z) of x + displacement(x), in lattice steps; where <= 0, space folds."""
    jacobian = np.stack([np.stack(np.gradient(d)) for d in displacement]) + np.eye(3)[:, :, None, None, None]
    return np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two subjects made by the script, the second with a tumour."""
    out = tmp_path_factory.mktemp("simulation") / "parent" / "made"
    simulate_brains.main(["--out", str(out), "--num", "2", "--seed", str(SEED), "--workers", "1"])
    return out


# ---- the script


def test_layout_is_that_of_task01(dataset):
    description = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    assert description["modality"] == {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    labels = ["background", "edema", "non-enhancing tumor", "enhancing tumour"]
    assert description["labels"] == {str(i): name for i, name in enumerate(labels)}
    assert (description["numTraining"], description["numTest"], description["test"]) == (2, 0, [])
    assert [case["image"] for case in description["training"]] == [
        f"./imagesTr/SIM_000{i}.nii.gz" for i in range(2)
    ]
    listed = {(dataset / path).resolve() for case in description["training"] for path in case.values()}
    listed |= {dataset / "dataset.json", dataset / "participants.tsv"}
    assert listed == {path for path in dataset.rglob("*") if path.is_file()}
    assert [path.name for path in dataset.parent.iterdir()] == ["made"], "nothing temporary is left"

    cases, _ = find_cases(dataset)
    tumours = [has_tumour(i, 0.5) for i in range(2)]
    assert [case.covariates["tumour"] for case in cases] == [str(int(one)) for one in tumours]
    assert [case.covariates["participant_id"] for case in cases] == ["SIM_0000", "SIM_0001"]
    assert all(0 <= float(case.covariates["ageing"]) <= 1 for case in cases)

    for number, case in enumerate(description["training"]):
        image, label = nibabel.load(dataset / case["image"]), nibabel.load(dataset / case["label"])
        assert image.shape == (40, 48, 40, 4) and image.get_data_dtype() == np.int16
        assert label.shape == (40, 48, 40) and label.get_data_dtype() == np.uint8
        # 160 x 192 x 160 mm around 0: the first voxel's centre is half a voxel inside
        expected = [[4, 0, 0, -78], [0, 4, 0, -94], [0, 0, 4, -78], [0, 0, 0, 1]]
        for nifti in (image, label):
            assert nifti.affine.tolist() == nifti.get_qform().tolist() == expected
            assert nifti.header.get_zooms()[:3] == (4, 4, 4)
            assert nifti.header.get_xyzt_units()[0] == "mm"
        labels = np.asarray(label.dataobj)
        assert set(np.unique(labels)) == ({0, 1, 2, 3} if number == 1 else {0}), "the second has a tumour"
        if number == 1:
            assert np.array_equal(np.asarray(image.dataobj), simulated(1, tumour=True).image)
            assert np.array_equal(labels, simulated(1, tumour=True).label)


def test_bytes_depend_on_seed_and_subject_alone(dataset, tmp_path):
    (tmp_path / "fewer").mkdir()  # an empty folder is as good as none
    simulate_brains.main(
        ["--out", str(tmp_path / "fewer"), "--num", "1", "--seed", str(SEED), "--workers", "2"]
    )
    for name in ("imagesTr/SIM_0000.nii.gz", "labelsTr/SIM_0000.nii.gz"):
        assert (tmp_path / "fewer" / name).read_bytes() == (dataset / name).read_bytes(), name
    assert not np.array_equal(simulated(0).image, simulated(0, seed=SEED + 1).image)
    assert len({subject.image.tobytes() for subject in healthy()}) == 5


@pytest.mark.parametrize(
    "wrong",
    ["--num 0", "--seed -1", "--workers 0", "--spacing 0.5", "--spacing nan", "--spacing 2 2"]
    + ["--tumour-fraction 1.5", "--tumour-fraction nan"],
)
def test_wrong_usage_makes_nothing(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        simulate_brains.main(["--out", str(tmp_path / "new"), *wrong.split()])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert wrong.split()[0].strip("-") in message and "Traceback" not in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["taken", "taken/notes.txt", "taken/notes.txt/below"])
def test_nothing_is_overwritten(place, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        simulate_brains.main(["--out", str(tmp_path / place), "--num", "1"])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["taken", "taken/notes.txt"]
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"


def test_broken_off_run_leaves_nothing(tmp_path, monkeypatch):
    def fill_the_disk(image, path):
        if path.name == "SIM_0001.nii.gz":
            raise OSError(28, "No space left on device")
        path.write_bytes(b"")

    monkeypatch.setattr(simulate_brains.nibabel, "save", fill_the_disk)
    monkeypatch.setattr(simulate_brains, "simulate_subject", lambda *_: simulated(0))
    with pytest.raises(SystemExit) as stop:
        simulate_brains.main(["--out", str(tmp_path / "new"), "--num", "3", "--workers", "1"])
    assert stop.value.code == 1
    assert not any(tmp_path.iterdir())


# ---- the population


@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.5, 0.7, 1])
def test_any_number_of_subjects_holds_the_tumour_share(fraction):
    having = np.cumsum([has_tumour(i, fraction) for i in range(500)])
    assert np.abs(having - fraction * np.arange(1, 501)).max() <= 2
    assert having[-1] == 500 * fraction or fraction not in (0, 1)


def test_grid_at_other_spacings():
    for spacing, shape in (((2, 2, 2), (80, 96, 80)), ((2, 2, 6), (80, 96, 27)), ((3, 4, 10), (53, 48, 16))):
        found, affine = output_grid(spacing)
        assert found == shape
        centre = affine @ [*((np.array(shape) - 1) / 2), 1]
        assert np.allclose(centre, [0, 0, 0, 1]) and np.allclose(np.diag(affine), [*spacing, 1])
    with pytest.raises(UserError, match="spacing"):
        output_grid((4.0, 4.0))


def test_anatomy_is_the_same_at_every_spacing():
    coarse, fine = simulated(1).tissues, simulated(1, spacing=(4.0, 2.0, 4.0)).tissues
    error = np.abs(fine.reshape(len(TISSUES), 40, 48, 2, 40).mean(axis=3) - coarse).mean()
    other = np.abs(simulated(2).tissues - coarse).mean()
    assert error < 0.1 * other


def test_background_is_zero_and_the_brain_inside():
    for subject in healthy():
        brain = subject.tissues.sum(axis=0) > 0
        for channel in range(4):
            assert np.array_equal(subject.image[..., channel] > 0, brain)
        assert ndimage.label(brain)[1] == 1, "in one piece"
        assert 900 < subject.tissues[2:4].sum() * 0.064 < 1600, "millilitres of grey and white matter"
        border = np.ones_like(brain)
        border[1:-1, 1:-1, 1:-1] = False
        assert not (brain & border).any()


def local_ratio(volume, first, second):
    """Mean of `volume` in mask `first` over that in `second`, by blocks, so that no bias field enters."""

    def means(mask):
        count = mask.reshape(4, 10, 4, 12, 4, 10).sum(axis=(1, 3, 5))
        total = (volume * mask).reshape(4, 10, 4, 12, 4, 10).sum(axis=(1, 3, 5))
        return np.where(count >= 2, total / np.maximum(count, 1), np.nan)

    return np.nanmedian(means(first) / means(second))


def test_tissues_have_the_order_of_each_contrast():
    for subject in healthy():
        csf, (grey, white) = subject.tissues[0] > 0.8, subject.tissues[2:4] > 0.9
        flair, t1w, t1gd, t2w = np.moveaxis(subject.image, -1, 0).astype(float)
        for fluid_is_dark in (t1w, t1gd):
            assert local_ratio(fluid_is_dark, white, grey) > 1.15
            assert local_ratio(fluid_is_dark, grey, csf) > 1.8
        assert local_ratio(t2w, grey, white) > 1.15 and local_ratio(t2w, csf, grey) > 1.5
        assert local_ratio(flair, grey, white) > 1.05 and local_ratio(flair, white, csf) > 1.5, "suppressed"
        for volume in (flair, t1w, t1gd, t2w):
            assert 100 < np.percentile(volume, 99.5) < 3000, "arbitrary units, several hundred"


def test_subjects_differ_in_anatomy():
    volumes = np.array([subject.tissues[:4].sum(axis=(1, 2, 3)) * 0.064 for subject in healthy()])  # ml
    ventricles, sulci, cortex = volumes[:, 0], volumes[:, 1], volumes[:, 2]
    assert ventricles.max() > 1.5 * ventricles.min() > 12 and ventricles.max() < 60
    assert sulci.max() > 1.2 * sulci.min() and cortex.max() > 1.07 * cortex.min()
    for subject in healthy():
        white = subject.tissues[3]
        assert np.abs(white - white[::-1]).sum() > 0.2 * white.sum(), "no brain mirrors itself"


def test_subjects_are_as_alike_and_as_sharp_as_real_brains():
    """T1w at 4 mm, after percentiles 0 to 99.5, against ten of each: L1 and MS-SSIM of pairs, spectra."""
    if not REAL.is_dir():
        pytest.skip("the real T1 volumes of shared/data are not here")
    real = [np.asarray(nibabel.load(p).dataobj, np.float32) for p in sorted(REAL.glob("*.nii.gz"))[:10]]
    real = unit_range([volume.reshape(40, 2, 48, 2, 40, 2).mean(axis=(1, 3, 5)) for volume in real])
    drawn = unit_range([simulated(i, seed=0).image[..., 1] for i in range(10)])
    assert 0.8 < mean_of_pairs(l1, drawn) / mean_of_pairs(l1, real) < 1.4
    assert abs(mean_of_pairs(ms_ssim, drawn) - mean_of_pairs(ms_ssim, real)) < 0.02
    assert 0.8 < band_power(drawn).mean() / band_power(real).mean() < 1.5


def unit_range(volumes):
    """(N, 1, X, Y, Z), each from 0 to 1."""
    clipped = [np.clip(volume / np.percentile(volume, 99.5), 0, 1) for volume in volumes]
    return torch.from_numpy(np.stack(clipped)[:, None]).float()


def mean_of_pairs(measure, volumes):
    return np.mean([measure(a[None], b[None]) for a, b in itertools.combinations(volumes, 2)])


def l1(a, b):
    return float((a - b).abs().mean())


# ---- shape


def test_deformations_do_not_fold():
    atlas = load_atlas()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        velocity = draw_velocity(rng, atlas, ageing=seed / 7)  # from the narrowest ventricles to the widest
        if seed % 2:
            velocity = velocity + mass_effect(draw_tumour(rng, atlas), atlas)
        displacement = exponential(velocity)
        determinant = jacobian_determinant(displacement)
        assert determinant.min() > 0.02, seed
        assert determinant.max() > 1.2 and LATTICE_STEP * np.abs(displacement).max() > 3, "it does deform"
        linear, _ = draw_pose(rng, atlas, displacement)
        assert np.linalg.det(linear) > 0


def test_ageing_widens_the_ventricles():
    """The volume of all places that look up ventricle."""
    atlas = load_atlas()
    grid = np.indices(atlas.lattice).reshape(3, -1) * LATTICE_STEP + atlas.origin[:, None]
    volume = []
    for ageing in (0, 0.5, 1):
        displacement = exponential(draw_velocity(np.random.default_rng(3), atlas, ageing))
        points = grid + LATTICE_STEP * displacement.reshape(3, -1)
        volume.append(sample(atlas.maps[3], atlas.origin, 1.0, points).sum() * LATTICE_STEP**3)
    assert volume[1] > 1.2 * volume[0] and volume[2] > 1.2 * volume[1]


def test_exponential_of_a_linear_field():
    """dx/dt = a (x - c) flows to c + exp(a) (x - c)."""
    at = np.indices((17, 17, 17), dtype=np.float32) - 8
    rate = np.array([0.3, -0.2, 0.1], np.float32)[:, None, None, None]
    found = exponential(rate * at)
    middle = (slice(None), *[slice(4, 13)] * 3)
    assert np.allclose(found[middle], ((np.exp(rate) - 1) * at)[middle], atol=0.03)


def test_random_field():
    coarse = random_field(np.random.default_rng(1), 12, 6, (40, 30, 30))
    fine = random_field(np.random.default_rng(1), 12, (2, 6, 6), (120, 30, 30))
    assert np.allclose(fine[1::3], coarse, atol=1e-5), "the same place in mm, the same value"
    assert abs(coarse.mean()) < 0.15 and abs(coarse.std() - 1) < 0.1
    neighbours = np.corrcoef(coarse[1:].ravel(), coarse[:-1].ravel())[0, 1]
    apart = np.corrcoef(coarse[8:].ravel(), coarse[:-8].ravel())[0, 1]
    assert neighbours > 0.6 and abs(apart) < 0.15


def test_slab_is_the_exact_overlap():
    # a sheet 1 mm thick, voxels of 2 mm: centred; half a millimetre over the edge; out of reach
    assert np.allclose(slab(np.array([0.0, 1.0, 1.5, 9.0]), 0.5, 2.0), [0.5, 0.25, 0.0, 0.0])
    # thicker than the voxel: full inside, half at its border
    assert np.allclose(slab(np.array([0.0, 3.0, 4.0]), 3.0, 2.0), [1.0, 0.5, 0.0])


# ---- tumours


def test_tumours_look_like_tumours():
    enhancing = 0
    for number in (1, 3, 4):
        subject = simulated(number, tumour=True)
        label = subject.label
        whole, core, rim = label > 0, label == 2, label == 3
        assert 3 < whole.sum() * 0.064 < 300, "millilitres"
        assert (label == 1).any() and core.any()
        near = ndimage.distance_transform_edt(~core, sampling=4.0)
        if rim.any():
            assert near[rim].max() < 14, "around the core"
            assert near[rim].mean() < 0.8 * near[label == 1].mean()
        parts, _ = ndimage.label(whole, np.ones((3, 3, 3)))
        assert np.bincount(parts[whole]).max() > 0.95 * whole.sum(), "one tumour, and a few islands of oedema"

        flair, t1w, t1gd, t2w = np.moveaxis(subject.image, -1, 0).astype(float)
        grey, white = subject.tissues[2] > 0.85, subject.tissues[3] > 0.85
        swollen, dead = subject.tissues[4] > 0.85, subject.tissues[5] > 0.85
        for brighter in (flair, t2w):
            assert np.median(brighter[swollen]) > 1.2 * np.median(brighter[grey])
        assert np.median(t1w[dead]) < 0.85 * np.median(t1w[grey])
        if rim.sum() > 8:
            enhancing += 1
            assert np.median(t1gd[rim]) > np.median(t1gd[white])
    assert enhancing >= 2


def test_tumour_pushes_and_leaves_the_far_side_alone():
    bare, grown = simulated(3), simulated(3, tumour=True)
    assert not bare.label.any()
    distance = ndimage.distance_transform_edt(grown.label == 0, sampling=4.0)
    change = np.abs(grown.tissues[:4] - bare.tissues[:4]).sum(axis=0)
    brain = bare.tissues.sum(axis=0) > 0
    near, far = brain & (distance > 0) & (distance < 12), brain & (distance > 50)
    assert far.sum() > 500
    assert change[near].mean() > 4 * change[far].mean()
    assert change[far].mean() < 0.1


def test_seeds_of_tumours_lie_in_the_cerebrum():
    atlas = load_atlas()
    x, y, z = atlas.seeds
    assert len(x) > 1000 and np.abs(x).min() >= 10, "off the midline"
    assert not np.any((y < -40) & (z < -30)), "not in the cerebellum"
    for seed in range(30):
        tumour = draw_tumour(np.random.default_rng(seed), atlas)
        assert np.isclose(np.linalg.det(tumour.shape), 1)
        assert sample(atlas.maps[0], atlas.origin, 1.0, tumour.centre[:, None])[0] == 1
