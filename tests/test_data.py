"""Cases found in every layout, split by subject, and served: the same whoever asks, in whatever order."""

import errno
import json
import os
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import ldm.data.datasets
from ldm import UserError
from ldm.data.augmentation import augmentation
from ldm.data.cases import Case, choose_spacing, volume_size
from ldm.data.checks import check_headers
from ldm.data.datasets import EpochSampler, VolumeDataset, stream, version_of
from ldm.data.folds import hold_out
from ldm.data.intensity import Intensity
from ldm.data.layouts import find_cases
from ldm.data.preprocessing import Preprocessing

VOXELS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "config" / "schema.json").read_text(encoding="utf-8"))
NO_AUGMENT = {key: about["default"] for key, about in SCHEMA["$defs"]["augment"]["properties"].items()}
AUGMENT = NO_AUGMENT | {
    "flip_axes": [0, 2],
    "rotate_degrees": 10.0,
    "scale": 0.1,
    "translate_voxels": 1.0,
    "intensity_scale": 0.1,
    "intensity_shift": 0.1,
}


@pytest.fixture
def touch(write_image):
    """Small images below a folder: `touch(folder, "a.nii.gz", ...)`."""

    def make(folder: Path, *names: str) -> Path:
        for name in names:
            write_image(folder / name, VOXELS + sum(name.encode()))  # no two alike
        return folder

    return make


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def names(cases):
    return [case.name for case in cases]


# ---- layouts


def test_parent_of_two_data_sets_is_ambiguous(tmp_path):
    for name in ("Task09_Spleen", "Task10_Colon"):
        write_json(tmp_path / name / "dataset.json", {"training": []})
    with pytest.raises(UserError, match="Task09_Spleen, Task10_Colon"):
        find_cases(tmp_path)


def test_nnunet_raw_folder(tmp_path, touch):
    root = touch(
        tmp_path / "Dataset001_X",
        *(f"imagesTr/case_{i}_000{c}.nii.gz" for i in (1, 2) for c in (1, 0)),
        "labelsTr/case_1.nii.gz",
    )
    (root / "imagesTr" / "._case_1_0000.nii.gz").write_bytes(b"\0\5\x16\7")
    content = {"channel_names": {"0": "FLAIR", "1": "T1"}, "file_ending": ".nii.gz", "numTraining": 2}
    write_json(root / "dataset.json", content)
    cases, _ = find_cases(root)
    assert names(cases) == ["case_1", "case_2"]
    assert [path.name for path in cases[0].images] == ["case_1_0000.nii.gz", "case_1_0001.nii.gz"]
    assert cases[0].label == root / "labelsTr/case_1.nii.gz" and cases[1].label is None
    (root / "imagesTr" / "case_2_0001.nii.gz").unlink()
    problems = [one for one in check_headers(find_cases(root)[0]) if "no such file" in one.reason]
    assert [one.file for one in problems] == [root / "imagesTr" / "case_2_0001.nii.gz"]


@pytest.fixture
def bids(tmp_path, touch):
    """Ten subjects of two sessions each, with ages."""
    root = tmp_path / "bids"
    subjects = [f"sub-{i:02d}" for i in range(1, 11)]
    touch(root, *(f"{s}/ses-{t}/anat/{s}_ses-{t}_T1w.nii.gz" for s in subjects for t in (1, 2)))
    rows = ["participant_id\tage\tsex"] + [f"{s}\t{30 + i}\tf" for i, s in enumerate(subjects)]
    (root / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return root


def test_bids_folder_with_covariates(bids):
    cases, _ = find_cases(bids)
    assert len(cases) == 20 and cases[3].name == "sub-02_ses-2_T1w" and cases[3].subject == "sub-02"
    assert cases[3].covariates == {"participant_id": "sub-02", "age": "31", "sex": "f"}


def test_sessions_of_a_subject_are_never_split(bids):
    cases, _ = find_cases(bids)
    for seed in range(30):
        divided = hold_out(cases, 0.2, seed)
        train, val = divided.training, divided.validation
        assert len(train) == 16 and len(val) == 4
        assert not {case.subject for case in train} & {case.subject for case in val}


def test_json_list_with_validation(tmp_path, touch):
    touch(tmp_path, "x/a.nii.gz", "x/b.nii.gz", "c_1.nii.gz", "c_2.nii.gz", "x/b_seg.nii.gz")
    training = ["x/a.nii.gz", {"image": ["c_1.nii.gz", "c_2.nii.gz"], "age": 40, "subject": "p7"}]
    validation = [{"image": "x/b.nii.gz", "label": "x/b_seg.nii.gz"}]
    path = write_json(tmp_path / "list.json", {"training": training, "validation": validation})
    cases, held_out = find_cases(path)
    assert names(cases) == ["a", "c_1"] and names(held_out) == ["b"]
    assert [image.name for image in cases[1].images] == ["c_1.nii.gz", "c_2.nii.gz"]
    assert cases[1].covariates["age"] == 40 and cases[1].subject == "p7"
    assert held_out[0].label == tmp_path / "x/b_seg.nii.gz"


def test_list_of_folders_prefixes_names(tmp_path, touch):
    for site in ("A", "B"):
        touch(tmp_path / site, "x.nii.gz", f"only_{site}.nii.gz")
    cases, _ = find_cases([tmp_path / "A", tmp_path / "B"])
    assert names(cases) == ["A/only_A", "A/x", "B/only_B", "B/x"]
    assert len({case.subject for case in cases}) == 4
    with pytest.raises(UserError, match="A: is named twice in the list"):
        find_cases([tmp_path / "A", tmp_path / "A"])
    with pytest.raises(UserError, match="A: lies in .* Name one"):
        find_cases([tmp_path, tmp_path / "A"])
    touch(tmp_path / "more" / "A", "x.nii.gz")  # of one last name
    cases, _ = find_cases([tmp_path / "A", tmp_path / "more" / "A"])
    assert names(cases) == [f"{tmp_path.name}/A/only_A", f"{tmp_path.name}/A/x", "more/A/x"]


# ---- sizes


def test_spacing_and_size_from_headers(tmp_path, write_image):
    thick = write_image(tmp_path / "a.nii", np.zeros((40, 48, 8), np.float32), np.diag([1.0, 1.0, 5.0, 1.0]))
    case = Case("a", (thick,))
    assert choose_spacing([case], None) == [1, 1, 5]
    assert choose_spacing([case], 24) == [2, 2, 2]  # 48 mm in about 24 voxels
    assert choose_spacing([case], 500) == [1, 1, 1]  # never finer than the data
    # Centre to centre: 39 mm, 47 mm and 35 mm in steps of 2.5 mm.
    assert volume_size([case], [2.5, 2.5, 2.5], 1) == [17, 20, 15]
    assert volume_size([case], [2.5, 2.5, 2.5], 16) == [32, 32, 16]


@pytest.mark.parametrize("size, spacing", [(1.0, 2.0), (1.0, 1.1), (2.0, 1.0), (0.9375, 1.1), (1.5, 1.0)])
def test_size_from_headers_is_the_resampled_size(tmp_path, write_image, size, spacing):
    for side in (10, 11, 12, 13, 31):
        voxels = np.arange(side * 12, dtype=np.float32).reshape(side, 4, 3)
        path = write_image(tmp_path / f"{side}.nii", voxels, np.diag([size, size, size, 1]))
        resampled = Preprocessing((0,), (spacing,) * 3).read([path])
        assert volume_size([Case("a", (path,))], [spacing] * 3, 1) == list(resampled.shape[1:])


# ---- chance


def test_stream_is_a_function_of_its_arguments():
    def numbers(*what):
        return torch.randn(4, generator=stream(*what)).tolist()

    assert numbers(3, "noise", 1, "sub-01") == numbers(3, "noise", 1, "sub-01")
    different = [(3, "noise", 1, "sub-01"), (4, "noise", 1, "sub-01"), (3, "crop", 1, "sub-01")]
    different += [(3, "noise", 2, "sub-01"), (3, "noise", 1, "sub-02"), (3, "noise", 12, "ub-01")]
    assert len({tuple(numbers(*what)) for what in different}) == len(different)
    torch.manual_seed(0)
    before, ours = torch.random.get_rng_state(), numbers(3, "noise", 1, "sub-01")
    assert torch.equal(before, torch.random.get_rng_state())  # it neither reads nor moves the global state
    torch.manual_seed(1)
    assert numbers(3, "noise", 1, "sub-01") == ours
    # Pinned, since a run resumed by another process, machine or version has to go on with the same draws.
    assert stream(3, "noise", 1, "sub-01").initial_seed() == 4933390884197546879


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 20),
    batch=st.integers(1, 4),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_ranks_together_see_what_one_sees(length, batch, world, accumulate, epoch):
    def batches(batch, rank, world):
        sampler = EpochSampler(length, batch, 5, rank, world, accumulate)
        sampler.epoch = epoch
        found = list(sampler)
        assert len(found) == len(sampler) and len(found) % accumulate == 0
        return found

    ranks = [batches(batch, rank, world) for rank in range(world)]
    together = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert together == batches(batch * world, 0, 1)
    seen = Counter(i for one in together for _, i in one)
    assert set(seen) == set(range(length)) and {e for one in together for e, _ in one} == {epoch}
    # Every case once; only as many again as fill up the last step.
    step = batch * world * accumulate
    assert seen.total() == -(-length // step) * step and max(seen.values()) - min(seen.values()) <= 1


def test_order_changes_with_epoch_and_seed():
    def order(seed, epoch):
        sampler = EpochSampler(12, 12, seed, 0, 1)
        sampler.epoch = epoch
        return tuple(i for _, i in next(iter(sampler)))

    assert len({order(seed, epoch) for seed in (0, 1) for epoch in range(5)}) == 10
    assert order(0, 3) == order(0, 3)


# ---- items


@pytest.fixture
def cases(tmp_path, write_image):
    """Five volumes of noise, two of them smaller than the crops below."""
    rng = np.random.default_rng(0)
    shapes = [(10, 11, 12), (10, 11, 12), (14, 9, 10), (6, 11, 12), (7, 7, 7)]
    return [
        Case(f"c{i}", (write_image(tmp_path / f"c{i}.nii.gz", rng.random(shape, np.float32)),))
        for i, shape in enumerate(shapes)
    ]


PREPROCESSING = Preprocessing((0,), (1.0, 1.0, 1.0))


def served(dataset, epoch, workers=0):
    """Items of an epoch by index, as a loader of `workers` processes gives them."""
    sampler = EpochSampler(len(dataset), 2, 0, 0, 1)
    sampler.epoch = epoch
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    found = {}
    for batch in loader:
        assert batch["epoch"].tolist() == [epoch] * 2
        found |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
    return found


def test_items_do_not_depend_on_workers_or_order(cases):
    dataset = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), True, AUGMENT, seed=3)
    alone = {i: dataset[(7, i)]["image"] for i in reversed(range(len(cases)))}
    for workers in (0, 2):
        together = served(dataset, 7, workers)
        assert all(torch.equal(together[i], alone[i]) for i in alone)
    again = pickle.loads(pickle.dumps(dataset))  # as loader processes on Windows get it
    assert torch.equal(again[(7, 2)]["image"], alone[2])


def test_items_change_with_epoch_seed_and_case(cases):
    twins = [cases[0], Case("twin", cases[0].images)]
    dataset = VolumeDataset(twins, PREPROCESSING, (8, 8, 8), True, AUGMENT, seed=3)
    other = VolumeDataset(twins, PREPROCESSING, (8, 8, 8), True, AUGMENT, seed=4)
    items = [dataset[(0, 0)], dataset[(1, 0)], dataset[(0, 1)], other[(0, 0)]]
    images = [item["image"] for item in items]
    assert not any(torch.equal(images[i], images[j]) for i in range(4) for j in range(i))
    assert [(item["epoch"], item["index"]) for item in items] == [(0, 0), (1, 0), (0, 1), (0, 0)]
    assert dataset.versions is None
    assert VolumeDataset(twins, PREPROCESSING, (8, 8, 8), False, NO_AUGMENT).versions == 1


def test_the_epochs_go_through_a_given_number_of_versions_in_turn(cases):
    some = {**AUGMENT, "versions": 3}
    dataset = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), True, some, seed=3)
    assert dataset.versions == 3
    for i in range(2):
        images = [dataset[(epoch, i)]["image"] for epoch in range(6)]
        same = [[torch.equal(a, b) for b in images] for a in images]
        assert same == [[(a - b) % 3 == 0 for b in range(6)] for a in range(6)]
    firsts = {version_of(3, 0, f"case {i}", 3) for i in range(20)}
    assert firsts == {0, 1, 2}  # not all cases begin with the same one


def test_centre_crop_and_padding_keep_the_values_of_the_whole_volume(cases):
    dataset = VolumeDataset(cases, PREPROCESSING, (8, 8, 8))
    whole = dataset.volume(0)
    assert np.array_equal(dataset[(0, 0)]["image"], whole[:, 1:9, 1:9, 2:10])
    padded = dataset[(0, 4)]["image"].numpy()  # 7 x 7 x 7 in 8 x 8 x 8
    assert padded.shape == (1, 8, 8, 8) and padded.dtype == np.float32
    assert np.isclose(padded.sum(), dataset.volume(4).sum()) and np.count_nonzero(padded) <= 343


# ---- the cache


def test_cache_changes_no_bit(cases, tmp_path):
    arguments = (cases, PREPROCESSING, (8, 8, 8), True, AUGMENT)
    plain = VolumeDataset(*arguments, seed=3)
    cached = VolumeDataset(*arguments, cache_dir=tmp_path / "cache", cache_rate=1.0, seed=3)
    for _ in range(2):  # writing, reading
        for i in range(len(cases)):
            assert cached.volume(i).tobytes() == plain.volume(i).tobytes()
            assert torch.equal(cached[(5, i)]["image"], plain[(5, i)]["image"])


def no_reading(*_):
    raise AssertionError("the volume was preprocessed again")


def test_cache_is_shared(cases, tmp_path, monkeypatch):
    cache = {"cache_dir": tmp_path / "cache", "cache_rate": 1.0}
    first = [VolumeDataset(cases, PREPROCESSING, (8, 8, 8), **cache).volume(i).copy() for i in range(5)]
    monkeypatch.setattr(Preprocessing, "__call__", no_reading)
    second = VolumeDataset(cases, PREPROCESSING, (4, 4, 4), True, AUGMENT, **cache)
    assert all(np.array_equal(second.volume(i), first[i]) for i in range(5))
    assert isinstance(second.volume(0), np.memmap)


def test_cache_rate_is_the_share_that_is_kept(cases, tmp_path, monkeypatch):
    half = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), cache_dir=tmp_path / "cache", cache_rate=0.4)
    for i in range(5):
        half.volume(i)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(Preprocessing, "__call__", no_reading)
    half.volume(1)
    with pytest.raises(AssertionError, match="again"):
        half.volume(2)


def test_cache_follows_preprocessing_and_file(cases, tmp_path, write_image):
    cache = {"cache_dir": tmp_path / "cache", "cache_rate": 1.0}
    one = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), **cache)
    before = one.volume(0).copy()
    other = VolumeDataset(
        cases, Preprocessing((0,), (1.0, 1.0, 1.0), Intensity(0.0, 50.0)), (8, 8, 8), **cache
    )
    assert (other.volume(0) == 1).mean() == pytest.approx(0.5, abs=0.01) != (before == 1).mean()
    write_image(cases[0].images[0], np.arange(27, dtype=np.float32).reshape(3, 3, 3))
    assert one.volume(0).shape == (1, 3, 3, 3)


def test_interrupted_write_leaves_nothing_to_be_read(cases, tmp_path, monkeypatch):
    dataset = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), cache_dir=tmp_path / "cache", cache_rate=1.0)
    save = np.save

    def half(file, array):
        save(file, array[:, :4])
        seen.extend((tmp_path / "cache").glob("*.npy"))
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(ldm.data.datasets.np, "save", half)
    with pytest.raises(KeyboardInterrupt):
        dataset.volume(0)
    monkeypatch.undo()
    assert seen == [] and list((tmp_path / "cache").iterdir()) == []
    assert dataset.volume(0).tobytes() == VolumeDataset(cases, PREPROCESSING, (8, 8, 8)).volume(0).tobytes()


@pytest.mark.parametrize("left", [0, 100, -100], ids=["nothing", "half a header", "too few values"])
def test_a_damaged_volume_in_the_cache_is_made_again(cases, tmp_path, capsys, left):
    dataset = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), cache_dir=tmp_path / "cache", cache_rate=1.0)
    expected = np.array(dataset.volume(0))
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:left])
    np.testing.assert_array_equal(dataset.volume(0), expected)
    assert capsys.readouterr().out.count(f"warning: {path}: this cached volume is damaged (") == 1
    assert path.read_bytes() == content
    dataset.volume(0)
    assert not capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_done_without(cases, tmp_path, capsys, monkeypatch):
    """And told once. What is there is read."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dataset = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), cache_dir=tmp_path / "cache", cache_rate=1.0)
    expected = [np.array(PREPROCESSING(case.images)) for case in cases[:3]]
    dataset.volume(0)
    monkeypatch.setattr(os, "fsync", full)
    for i in (0, 1, 2, 1):
        np.testing.assert_array_equal(dataset.volume(i), expected[i])
    assert capsys.readouterr().out == (
        f"warning: {tmp_path / 'cache'}: the cache cannot be written ({os.strerror(errno.ENOSPC)}). Volumes "
        "that are not in it are read from their files in each epoch, which is slower. Free space, choose "
        "another cache_dir, or set data.cache_rate to 0\n"
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_a_killed_write_left_in_the_cache_is_cleared_and_no_write_that_is_under_way(cases, tmp_path):
    cache = {"cache_dir": tmp_path / "cache", "cache_rate": 1.0}
    first = VolumeDataset(cases, PREPROCESSING, (8, 8, 8), **cache)
    first.volume(0)
    kept = next((tmp_path / "cache").iterdir())
    left, written = (kept.with_name(f".{kept.name}.{digit * 32}.part") for digit in "01")
    for part in (left, written):
        part.write_bytes(b"half a volume")
    for path in (kept, left):
        os.utime(path, (time.time() - 10**6,) * 2)
    VolumeDataset(cases, PREPROCESSING, (8, 8, 8), **cache)
    assert set((tmp_path / "cache").iterdir()) == {kept, written}


# ---- crops


def test_random_crops_lie_within_bounds_and_everywhere():
    volume = np.arange(6 * 5 * 4, dtype=np.float32).reshape(1, 6, 5, 4)  # a value tells its place
    crop, rng, starts = augmentation(NO_AUGMENT, (3, 3, 3), True), np.random.RandomState(0), Counter()
    for _ in range(400):
        item = crop(volume, None, rng).numpy()
        start = np.unravel_index(int(item[0, 0, 0, 0]), (6, 5, 4))
        i, j, k = (int(s) for s in start)
        assert np.array_equal(item, volume[:, i : i + 3, j : j + 3, k : k + 3])
        starts[i, j, k] += 1
    assert len(starts) == 4 * 3 * 2  # every place there is
    assert min(starts.values()) >= 5  # about 17 each


def lesion_hits(root: Path, write_image, foreground_prob: float, labelled: bool) -> float:
    """Share of 60 crops of 6 voxels that hold a lesion of one voxel near the corner of 24 voxels.

    The label is stored left-posterior-superior, the image right-anterior-superior.
    """
    voxels, label = np.full((24, 24, 24), 0.5, np.float32), np.zeros((24, 24, 24), np.uint8)
    voxels[0, 0, 0], voxels[2, 21, 3], label[2, 21, 3] = 0, 1, 1
    if not labelled:
        voxels[voxels == 0.5] = 0
    turned = np.diag([-1.0, -1.0, 1.0, 1.0])
    turned[:2, 3] = 23
    image = write_image(root / "image.nii.gz", voxels)
    mask = write_image(root / "label.nii.gz", label[::-1, ::-1], turned) if labelled else None
    dataset = VolumeDataset(
        [Case("lesion", (image,), mask)],
        Preprocessing((0,), (1.0, 1.0, 1.0), Intensity(0.0, 100.0)),
        (6, 6, 6),
        random_crop=True,
        augment=NO_AUGMENT | {"foreground_prob": foreground_prob},
        cache_dir=root / "cache",
        cache_rate=1.0,
    )
    return float(np.mean([dataset[(epoch, 0)]["image"].max() == 1 for epoch in range(60)]))


@pytest.mark.parametrize("labelled", [True, False])
def test_crops_favour_the_foreground(tmp_path, write_image, labelled):
    assert lesion_hits(tmp_path, write_image, 1.0, labelled) == 1
    assert 0.3 < lesion_hits(tmp_path, write_image, 0.5, labelled) < 0.7
    # By chance alone: 3, 3 and 4 of 19 places along the axes, 0.5 %.
    assert lesion_hits(tmp_path, write_image, 0.0, labelled) < 0.05
