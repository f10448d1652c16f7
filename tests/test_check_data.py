"""Bad data is found before training: one run lists every bad case with its reason, and a good one passes."""

import gzip
import json
import re
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from chain import Project, make_data

import check_data
import train_autoencoder
import utils
from ldm import UserError, configs
from ldm.data import splits
from ldm.data.cases import Case
from ldm.data.checks import check_cases, check_header, check_headers, check_voxels, label_values
from ldm.data.intensity import Intensity
from ldm.data.layouts import find_cases
from ldm.data.masks import masks_among
from ldm.data.preprocessing import Preprocessing
from ldm.data.reading import open_image, read_image

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "config" / "config_demo.json")
SHAPE, AFFINE = (10, 12, 8), np.diag([2.0, 1.5, 3.0, 1.0])


def noise(seed: int, shape: tuple = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def spots(*values: float, dtype=np.uint8) -> np.ndarray:
    """A label that is 0 but for a row of voxels."""
    label = np.zeros(SHAPE, dtype)
    label[: len(values), 0, 0] = values
    return label


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save((nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image)(voxels, affine), path)
    return path


def changed(path: Path, place: int, new: bytes) -> None:
    """Overwrite bytes of a file; of what is in it, where it is a gzip, which is packed again."""
    packed = path.suffix == ".gz"
    content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    content[place : place + len(new)] = new
    path.write_bytes(gzip.compress(content) if packed else content)


def flipped(path: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of the file as it is on the disk."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def stored(path: Path, voxels: np.ndarray) -> None:
    """A gzip that is not compressed inside, so that a flipped bit is a flipped bit of a voxel."""
    path.write_bytes(gzip.compress(nib.Nifti1Image(voxels, AFFINE).to_bytes(), compresslevel=0))


def decathlon(folder: Path, names, ending: str = ".nii.gz") -> Path:
    """A data set with a good image and label of each name. Labels may be 0, 1, 2."""
    entries = []
    for seed, name in enumerate(names):
        image = save(folder / "imagesTr" / f"{name}{ending}", noise(seed))
        label = save(folder / "labelsTr" / f"{name}{ending}", spots(1, 2))
        entries.append({"image": f"imagesTr/{image.name}", "label": f"labelsTr/{label.name}"})
    content = {"labels": {"0": "background", "1": "a", "2": "b"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def run(capsys, *argv) -> tuple[int, list[str]]:
    """Exit code and printed lines of check_data.py, but that on what was found; an error line stands for its
    output."""
    code = 0
    try:
        check_data.main([*map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    lines = out.splitlines()
    assert errors or lines[0].startswith("found: ")
    return code, lines[1:] + errors


def rows(lines: list[str]) -> list[tuple[str, str, str]]:
    """The table's rows, cut where its head says that the columns begin."""
    second, third = lines[0].index("file"), lines[0].index("reason")
    assert lines[0].split() == ["case", "file", "reason"]
    assert all(line[second - 2 : second] == "  " == line[third - 2 : third] for line in lines[:-1])
    return [(line[:second].strip(), line[second:third].strip(), line[third:]) for line in lines[1:-1]]


# ---- all kinds at once


def flip_a_voxel(image, label):
    stored(image, noise(99))
    flipped(image, len(image.read_bytes()) // 2)
    assert np.asarray(nib.load(image).dataobj).shape == SHAPE  # nibabel notices nothing


BAD = {  # what is done to a good case (image, label), and the reason that is given for it
    "cut_short": (lambda i, _: cut(i, 1000), r"voxels cannot be read \(Compressed file ended"),
    "flipped_voxel": (flip_a_voxel, r"voxels cannot be read \(CRC check failed"),
    "empty_file": (lambda i, _: i.write_bytes(b""), r"cannot be read as an image \(Empty file"),
    "text": (lambda i, _: i.write_bytes(b"no image\n"), "cannot be read as an image"),
    "fewer_voxels": (
        lambda i, _: i.write_bytes(gzip.compress(gzip.decompress(i.read_bytes())[:-4])),
        r"voxels cannot be read \(4188 bytes where the header asks for 4192",
    ),
    "nan": (lambda i, _: save(i, np.where(noise(1) < 0.1, np.nan, noise(1))), r"has \d+ NaN voxels. Set "),
    "infinite": (
        lambda i, _: save(i, np.where(noise(1) == noise(1).max(), np.inf, noise(1))),
        "has 1 infinite voxels",
    ),
    "too_large": (lambda i, _: save(i, noise(1).astype(np.float64) * 1e39), r"has \d+ infinite voxels"),
    "zero": (lambda i, _: save(i, np.zeros(SHAPE, np.int16)), "all zero"),
    "constant": (lambda i, _: save(i, np.full(SHAPE, 7.0)), "constant: every voxel is 7"),
    "nearly_empty": (lambda i, _: save(i, spots(5, 9)), "constant between its percentiles 0 and 99.5"),
    "scaling": (lambda i, _: changed(i, 112, struct.pack("<f", np.inf)), "intensity scaling is infinite"),
    "complex": (lambda i, _: save(i, noise(1).astype(np.complex64)), "voxels are of type complex64"),
    "colour": (
        lambda i, _: save(i, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "voxels are colours",
    ),
    "two_d": (lambda i, _: save(i, noise(1, (9, 9))), r"shape \(9, 9\); expected a 3D image"),
    "four_d": (lambda i, _: save(i, noise(1, (*SHAPE, 3))), r"has 3 channel\(s\), .*: 4D, expected 3D"),
    "channels_first": (lambda i, _: save(i, noise(1, (1, *SHAPE))), "channels first"),
    "single_slice": (
        lambda i, lab: (save(i, noise(1, (10, 12, 1))), save(lab, np.zeros((10, 12, 1), np.uint8))),
        r"shape \(10, 12, 1\): a single slice; expected a volume",
    ),
    "singular": (lambda i, _: changed(i, 280, bytes(48)), "affine is not invertible"),
    "microscope": (lambda i, _: save(i, noise(1), np.diag([1, 1, 5e-5, 1])), "voxels are 1 x 1 x 5e-05 mm"),
    "giant_voxels": (lambda i, _: save(i, noise(1), np.diag([150, 1, 1, 1])), "voxels are 150 x 1 x 1 mm"),
    "giant": (lambda i, _: save(i, noise(1, (2, 2, 60)), np.diag([1, 1, 90, 1])), "covers .* x 5.4 m"),
    "label_shape": (
        lambda _, lab: save(lab, np.zeros((10, 12, 7), np.uint8)),
        r"shape \(10, 12, 7\), but the image has \(10, 12, 8\)",
    ),
    "label_shifted": (
        lambda _, lab: save(lab, spots(1), AFFINE + np.eye(4, k=3) * 0.5),
        "a corner 0.5 mm away",
    ),
    "label_flipped": (lambda _, lab: save(lab, spots(1), AFFINE * [-1, 1, 1, 1]), "lies elsewhere"),
    "label_4d": (lambda _, lab: save(lab, np.ones((*SHAPE, 2), np.uint8)), "4D, 2 volumes; expected 3D"),
    "label_other_value": (
        lambda _, lab: save(lab, spots(1, 3, 3)),
        r"dataset.json does not name: 3 \(2 voxels\)",
    ),
    "label_negative": (lambda _, lab: save(lab, spots(-1, dtype=np.int16)), "values from -1 to 0;"),
}


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory):
    """One case of every kind, one that is good in an unusual way of each sort, and good ones to be usual."""
    odd = ["empty_label", "rounded_affine", "one_volume"]
    folder = decathlon(tmp_path_factory.mktemp("bad"), [*BAD, *odd, *(f"good_{i}" for i in range(4))])
    for name, (spoil, _) in BAD.items():
        spoil(folder / "imagesTr" / f"{name}.nii.gz", folder / "labelsTr" / f"{name}.nii.gz")
    save(folder / "labelsTr/empty_label.nii.gz", np.zeros(SHAPE, np.uint8))
    save(folder / "labelsTr/rounded_affine.nii.gz", spots(1), AFFINE + 1e-4)
    save(folder / "imagesTr/one_volume.nii.gz", noise(77, (*SHAPE, 1)))
    return folder


def test_one_run_lists_every_bad_case_with_its_reason(bad_data, capsys):
    code, lines = run(capsys, bad_data)
    assert code == 2
    found = rows(lines)
    assert [case for case, _, _ in found] == sorted(BAD)  # each once, and none that is good
    for case, file, reason in found:
        assert re.search(BAD[case][1], reason), (case, reason)
        folder = "labelsTr" if case.startswith("label_") else "imagesTr"
        assert Path(file) == bad_data / folder / f"{case}.nii.gz"
    assert lines[-1] == f"{len(BAD) + 7} cases, {len(BAD)} problems in {len(BAD)} cases"
    for jobs in (1, 3):  # the number of workers changes nothing
        assert run(capsys, bad_data, "-j", jobs) == (code, lines)


OF_IMAGES = {name for name in BAD if not name.startswith("label_")}
OF_HEADERS = {"empty_file", "text", "scaling", "complex", "colour", "two_d", "four_d", "channels_first"}
OF_HEADERS |= {"single_slice", "singular", "microscope", "giant_voxels", "giant"}
OF_HEADERS |= {"label_shape", "label_shifted", "label_flipped", "label_4d"}


def test_headers_alone_tell_what_headers_can(bad_data, monkeypatch):
    monkeypatch.setattr("ldm.data.checks.read_image", None)  # no voxel is read,
    monkeypatch.setattr("ldm.data.checks.masks_among", lambda cases: [])  # but for this
    cases, _ = find_cases(bad_data)
    assert {problem.case for problem in check_headers(cases)} == OF_HEADERS
    without = {problem.case for problem in check_headers(cases, labels=False)}
    assert without == OF_HEADERS & OF_IMAGES


def test_without_labels_no_label_is_read(bad_data):
    problems, _ = check_cases(find_cases(bad_data)[0], labels=False)
    assert {problem.case for problem in problems} == OF_IMAGES


def test_a_good_data_set_passes_in_one_line(tmp_path, capsys):
    folder = decathlon(tmp_path, ["a", "b", "c"])
    turned = np.diag([-2, 1.5, 3, 1])[:, [2, 0, 1, 3]]
    save(folder / "imagesTr/b.nii.gz", 100 * noise(5, (8, 10, 12)) - 7, turned)
    save(folder / "labelsTr/b.nii.gz", np.zeros((8, 10, 12), np.uint8), turned)
    code, lines = run(capsys, folder)
    assert code == 0 and len(lines) == 1
    volumes = [nib.load(folder / f"imagesTr/{name}.nii.gz").get_fdata() for name in "abc"]
    minima, maxima = [v.min() for v in volumes], [v.max() for v in volumes]
    assert lines == [
        "all good: 3 cases of 10 x 12 x 8 voxels of 2 x 1.5 x 3 mm, minima "
        f"{min(minima):.4g} to {max(minima):.4g}, maxima {min(maxima):.4g} to {max(maxima):.4g}"
    ]


# ---- what a case is held against


def test_4d_where_3d_is_expected_is_what_most_cases_are_not(tmp_path):
    threes, four = [Case(f"c{i}", (save(tmp_path / f"c{i}.nii.gz", noise(i)),)) for i in range(3)], []
    for i in range(2):
        four.append(Case(f"four{i}", (save(tmp_path / f"four{i}.nii.gz", noise(9 + i, (*SHAPE, 4))),)))
    assert [p.case for p in check_headers(threes + four)] == ["four0", "four1"]
    assert [p.case for p in check_headers(threes[:1] + four)] == ["c0"]
    assert [p.case for p in check_headers(threes[:1] + four[:1])] == ["four0"]  # equally many: 3D is expected
    assert not check_headers(four) and not check_headers(four, channels=[3, 0])


def test_channels_that_are_asked_for(tmp_path):
    voxels = noise(0, (*SHAPE, 3))
    voxels[0, 0, 0, 1], voxels[..., 2] = np.nan, 0
    case = Case("a", (save(tmp_path / "a.nii.gz", voxels),))
    reasons = [problem.reason for problem in check_voxels(case).problems]
    assert reasons == [
        "channel 1 has 1 NaN voxels. Set intensity.nan_is_background to true in the config if they lie "
        "outside of the body; else fix or remove the file",
        "channel 2 all zero",
    ]
    assert not check_voxels(case, channels=[0]).problems
    assert check_voxels(case, channels=[0]).intensities == (voxels[..., 0].min(), voxels[..., 0].max())
    assert len(check_voxels(case, channels=[2, 0]).problems) == 1
    problems, _ = check_cases([case], channels=[0, 3])
    assert [p.reason for p in problems] == ["has 3 channel(s); `channel` asks for number 3, counted from 0"]


def test_files_of_a_case_lie_on_one_grid(tmp_path):
    def case(name, **second):
        files = (
            save(tmp_path / f"{name}_0000.nii.gz", noise(0)),
            save(tmp_path / f"{name}_0001.nii.gz", **second),
        )
        return Case(name, files)

    good = case("good", voxels=noise(1))
    bad = {
        "shape": case("shape", voxels=noise(1, (10, 12, 9))),
        "place": case("place", voxels=noise(1), affine=AFFINE + np.eye(4, k=2) * 1e-2),
        "4D, 2 volumes": case("four", voxels=noise(1, (*SHAPE, 2))),
    }
    assert check_header(good) == ([], 2)
    for word, one in bad.items():
        (problem,) = check_header(one)[0]
        assert problem.file == one.images[1] and (word in problem.reason or "elsewhere" in problem.reason)
    (problem,) = check_header(good, channels=[2])[0]
    assert problem.reason.startswith("has 2 channel(s)")
    swapped = Case("four", bad["4D, 2 volumes"].images[::-1])
    assert [p.file for p in check_header(swapped)[0]] == [swapped.images[0]]
    save(good.images[1], noise(0) * 0)
    assert [p.file for p in check_voxels(good).problems] == [good.images[1]]
    assert not check_voxels(good, channels=[0]).problems  # the other file is read, but not looked at


def test_a_label_is_missing_where_most_cases_have_one(tmp_path, capsys):
    folder = decathlon(tmp_path, ["a", "b", "c"])
    content = json.loads((folder / "dataset.json").read_text())
    del content["training"][1]["label"]
    (folder / "dataset.json").write_text(json.dumps(content))
    code, lines = run(capsys, folder)
    assert code == 2 and [row[0] for row in rows(lines)] == ["b"] and "label is missing" in lines[1]
    del content["training"][0]["label"]  # two of three without: the data set has some labels, that is all
    (folder / "dataset.json").write_text(json.dumps(content))
    assert run(capsys, folder)[0] == 0


def test_a_scan_that_is_there_twice(tmp_path, capsys):
    """Under another name, packed otherwise, in another format and type: the voxels are what counts."""
    whole = np.round(noise(0) * 1000)
    save(tmp_path / "a.nii.gz", whole)
    save(tmp_path / "b.nii", whole.astype(np.int16))
    save(tmp_path / "c.mgz", whole.astype(np.float32))
    save(tmp_path / "d.nii.gz", whole[::-1])
    code, lines = run(capsys, tmp_path)
    assert code == 2 and [row[0] for row in rows(lines)] == ["b", "c"]
    assert all("the same voxels as a.nii.gz" in line for line in lines[1:3])


def test_a_missing_file_is_a_row(tmp_path):
    here = save(tmp_path / "a.nii.gz", noise(0))
    case = Case("a", (here, tmp_path / "gone.nii.gz"), tmp_path / "gone_too.nii.gz")
    problems, count = check_header(case)
    assert [p.file.name for p in problems] == ["gone.nii.gz", "gone_too.nii.gz"] and count == 0
    assert all("no such file. Is the data set unpacked whole?" in p.reason for p in problems)
    assert len(check_header(case, labels=False)[0]) == 1
    assert check_cases([case])[0] == problems  # told once, by headers and voxels


def test_a_note_is_no_fault(tmp_path, capsys):
    """Of headers one line for all files, of intensities one a volume; nothing is left out for them."""
    scans = {name: noise(seed) for seed, name in enumerate("abcd")}
    scans["b"][3, 4, 5] = -1e7
    scans["c"] = np.round(1000 * scans["c"] - 30).astype(np.int16).view(np.uint16)
    for name, voxels in scans.items():
        image = nib.Nifti1Image(voxels, AFFINE if name == "d" else np.diag([2000, 1500, 3000, 1]))
        image.header.set_xyzt_units("mm" if name == "d" else "micron")
        nib.save(image, tmp_path / f"{name}.nii.gz")
    code, lines = run(capsys, tmp_path)
    notes = [line for line in lines if line.startswith("note: ")]
    assert (
        code == 0 and notes == lines[:-1] and lines[-1].startswith("no faults: 4 cases of 10 x 12 x 8 voxels")
    )
    assert notes[0] == "note: 3 files (a.nii.gz, ...): header in micrometres, converted to mm"
    assert notes[1].startswith(f"note: {tmp_path / 'b.nii.gz'}: minimum -1e+07, but 99.9 % of its voxels lie")
    assert "c.nii.gz: 2.6%" in notes[2] and "negative numbers stored without a sign" in notes[2]
    assert len(notes) == 3
    code, lines = run(capsys, tmp_path, "-c", CONFIG, "--set", "intensity.lower_percentile=0.5")
    assert code == 0 and not [line for line in lines if "b.nii.gz" in line]
    said, config = [], utils.load_config(CONFIG, ["intensity.lower_percentile=0"])
    for skip in (False, True):
        splitter = splits.Splitter(tmp_path / "split.json", str(tmp_path), False, said.append, config["data"])
        how = (configs.channels_of(config), Intensity.from_config(config), False, skip)
        cases, _ = find_cases(tmp_path)
        assert splitter.without_bad(cases, [], *how) == (cases, [])
    assert [line.split(":")[1] for line in said].count(" 3 files (a.nii.gz, ...)") == 2
    assert sum("b.nii.gz: minimum" in line for line in said) == 1  # where voxels are read


def test_a_window_finds_volumes_in_other_units(tmp_path, capsys):
    """With one, volumes are compared with each other; without, each has its own percentiles."""
    for seed, name in enumerate("abcd"):
        save(tmp_path / f"{name}.nii.gz", 2000 * noise(seed) - 1000 + 1024 * (name == "b"))
    save(tmp_path / "e.nii.gz", 1500 + 500 * noise(9))
    window = ["-c", CONFIG, "--set", "intensity={}", "--set", "intensity.window=[-1000,1000]"]
    code, (note, *lines) = run(capsys, tmp_path, *window)
    assert code == 2 and "b.nii.gz: 50.3% of its voxels lie above intensity.window, 0.0% in most" in note
    ((case, _, reason),) = rows(lines)
    assert case == "e" and "lie outside of intensity.window, -1000 to 1000. Is it in other units?" in reason
    code, lines = run(capsys, tmp_path)
    assert code == 0 and len(lines) == 1


def test_nan_is_background_where_the_config_says_so(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        save(tmp_path / f"{name}.nii.gz", np.where(noise(seed) < 0.3, np.nan, noise(seed)))
    assert run(capsys, tmp_path, "-c", CONFIG)[0] == 2
    code, lines = run(capsys, tmp_path, "-c", CONFIG, "--set", "intensity.nan_is_background=true")
    assert code == 0 and "minima 0.3" in lines[-1]


def test_dot_underscore_files_are_listed_and_belong_to_no_case(tmp_path, capsys):
    folder = decathlon(tmp_path, ["a", "b"])
    for place in ("imagesTr/._a.nii.gz", "labelsTr/._a.nii.gz"):
        (folder / place).write_bytes(b"\0\5\x16\7")
    code, lines = run(capsys, folder)
    assert code == 2 and [row[0] for row in rows(lines)] == ["-", "-"] and "Delete it" in lines[1]
    assert lines[-1] == "2 cases, 2 problems in 0 cases"
    assert not check_cases(find_cases(folder)[0])[0]  # a training passes them over


@pytest.mark.parametrize(
    "labels, values",
    [
        ({"0": "background", "1": "x", "12": "y"}, {0, 1, 12}),
        ({"background": 0, "x": 1, "whole": [1, 2], "ignore": 3}, {0, 1, 2, 3}),
        ({"x": "red"}, None),
        (["x", "y"], None),
        (None, None),
    ],
)
def test_label_values_of_dataset_json(tmp_path, labels, values):
    path = tmp_path / "dataset.json"
    assert label_values(path) is None
    path.write_text(json.dumps({} if labels is None else {"labels": labels}))
    assert label_values(path) == values


# ---- reading: training refuses what the check refuses


@pytest.mark.parametrize("name", sorted(OF_IMAGES - {"four_d", "single_slice"}))
def test_training_refuses_a_bad_file_for_the_same_reason(bad_data, name):
    path = bad_data / "imagesTr" / f"{name}.nii.gz"
    with pytest.raises(UserError, match=rf"{name}\.nii\.gz: .*({BAD[name][1]})"):
        Preprocessing((0,), (2.0, 1.5, 3.0))([path])


def test_no_flipped_bit_is_taken_for_a_voxel(tmp_path):
    """Every byte of a gzipped image: whatever it is changed to, the same voxels come, or an error."""
    voxels, path = noise(3, (4, 4, 4)), tmp_path / "a.nii.gz"
    for ending in (".nii.gz", ".mgz"):
        path = save(tmp_path / f"a{ending}", voxels)
        whole, refused = path.read_bytes(), 0
        for place in range(len(whole)):
            content = bytearray(whole)
            content[place] ^= 1 << place % 8
            path.write_bytes(content)
            try:
                assert np.array_equal(read_image(path).get_fdata(dtype=np.float32), voxels)
            except UserError as error:
                refused += 1
                assert str(path) in str(error)
        assert refused > 0.9 * len(whole)


def test_a_channel_of_many_is_read_once(tmp_path, monkeypatch):
    path, opened = save(tmp_path / "a.nii.gz", noise(0, (*SHAPE, 3))), []
    monkeypatch.setattr(
        "ldm.data.preprocessing.read_image", lambda path: opened.append(path) or read_image(path)
    )
    volume = Preprocessing((2, 0), (2.0, 1.5, 3.0)).read([path])
    assert np.array_equal(volume, np.moveaxis(noise(0, (*SHAPE, 3)), -1, 0)[[2, 0]]) and opened == [path]


def test_a_volume_that_no_memory_holds_is_refused_before_it_is_made(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise(0), np.diag([100, 100, 100, 1]))
    open_image(path)
    with pytest.raises(UserError, match=r"a\.nii\.gz: covers 1000 x 1200 x 800 mm, .* coarser `spacing`"):
        Preprocessing((0,), (0.5, 0.5, 0.5)).read([path])


def test_only_nifti_and_mgh_are_read(tmp_path):
    nib.save(nib.Spm99AnalyzeImage(noise(0), AFFINE), tmp_path / "a.img")
    nib.save(nib.Nifti1Pair(noise(0), AFFINE), tmp_path / "b.img")
    nib.save(nib.Nifti2Image(noise(0), AFFINE), tmp_path / "c.nii.gz")
    for name in ("a.img", "b.img"):
        with pytest.raises(UserError, match="convert it to NIfTI in one file"):
            open_image(tmp_path / name)
    assert read_image(tmp_path / "c.nii.gz").shape == SHAPE


# ---- real volumes


@pytest.mark.parametrize(
    "name", ["t1_brain_2mm", "Task04_Hippocampus", "Task01_BrainTumour", "ct_abdomen_3mm"]
)
def test_no_false_alarm_on_real_data(shared_data, capsys, name):
    code, lines = run(capsys, shared_data / name)
    assert code == 0 and len(lines) == 1 and lines[0].startswith("all good: "), lines


def test_every_odd_file(shared_data, capsys):
    code, lines = run(capsys, shared_data / "odd")
    assert code == 2 and lines[-1] == "8 cases, 4 problems in 4 cases"  # and two masks, passed over
    reasons = {case: reason for case, _, reason in rows(lines)}
    assert set(reasons) == {"4d_3vol", "broken_truncated_gzip", "nan_background", "orient_LPS"}
    assert "the same voxels as ok_4mm_int16" in reasons["orient_LPS"]
    assert "4D, expected 3D" in reasons["4d_3vol"]
    assert "Compressed file ended" in reasons["broken_truncated_gzip"]
    assert "50443 NaN" in reasons["nan_background"]


# ---- the command line


def test_config_and_environment(tmp_path, capsys):
    folder = decathlon(tmp_path / "data", ["a", "b"])
    for i, name in enumerate("ab"):
        voxels = noise(i, (*SHAPE, 2))
        voxels[..., 1] = np.where(voxels[..., 1] > 0.1, voxels[..., 1], i)  # in b a tenth is a high value
        save(folder / "imagesTr" / f"{name}.nii.gz", voxels)
    environment = {"data_base_dir": str(tmp_path)}
    environment |= {key: str(tmp_path / key) for key in ("model_dir", "tfevent_path", "output_dir")}
    (tmp_path / "env.json").write_text(json.dumps(environment))
    given = ["-e", tmp_path / "env.json", "-c", CONFIG]
    assert run(capsys, *given)[0] == 0
    assert run(capsys, "-e", tmp_path / "env.json")[0] == run(capsys, folder, "-c", CONFIG)[0] == 0
    code, lines = run(capsys, *given, "--set", "channel=2")
    assert code == 2 and "asks for number 2" in lines[1] and len(rows(lines)) == 2
    limits = ["--set", "intensity.lower_percentile=95", "--set", "intensity.upper_percentile=99"]
    code, lines = run(capsys, *given, "--set", "channel=1", *limits)
    assert code == 2 and [row[0] for row in rows(lines)] == ["b"] and "percentiles 95 and 99" in lines[1]
    assert not list(tmp_path.glob("model_dir")) + list(tmp_path.glob("output_dir"))  # nothing is written


def test_the_validation_cases_of_a_list_are_read_too(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        save(tmp_path / f"{name}.nii.gz", noise(seed) * (name == "a"))
    content = {"training": ["a.nii.gz"], "validation": ["b.nii.gz"]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    code, lines = run(capsys, tmp_path / "list.json")
    assert code == 2 and [row[0] for row in rows(lines)] == ["b"] and "all zero" in lines[1]


def test_pattern_and_several_folders(tmp_path, capsys):
    for site, bad in (("one", False), ("two", True)):
        for seed, kind in enumerate(("T1w", "T2w")):
            save(tmp_path / site / f"sub-1_{kind}.nii.gz", noise(seed + 10 * bad) * (not bad))
    folders = [tmp_path / "one", tmp_path / "two"]
    code, lines = run(capsys, *folders)
    assert code == 2 and len(lines) == 1 and "holds several kinds of image" in lines[0]
    code, lines = run(capsys, *folders, "-c", CONFIG, "--set", "data.pattern=**/*_T1w.nii.gz")
    assert code == 2 and [row[0] for row in rows(lines)] == ["two/sub-1_T1w"] and "all zero" in lines[1]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give the folder of a data set"),
        (["somewhere", "-e", "env.json"], "give the folder of a data set"),
        (["somewhere", "--set", "channel=1"], "give -c"),
        (["somewhere", "-j", "0"], "--jobs 0"),
        (["nowhere"], "nowhere: no such data folder"),
        ([str(Path(__file__))], "is a file. Expected a data folder"),
        (["nowhere", "-c", "none.json"], "none.json: cannot be read"),
    ],
)
def test_wrong_usage_is_one_line(capsys, argv, message):
    code, lines = run(capsys, *argv)
    assert code == 2 and len(lines) == 1 and message in lines[0]


def test_a_training_start_checks_the_headers_and_skip_bad_leaves_bad_cases_out(tmp_path):
    """Before anything is written but the lock; what is left out is written down."""
    project = Project(tmp_path / "run", make_data(tmp_path / "data"))
    header, voxels = (project.data / "imagesTr" / f"scan_{i}.nii.gz" for i in (1, 4))
    changed(header, 42, struct.pack("<h", 0))  # no voxels along the first axis
    message = project.refused(train_autoencoder)
    assert str(header) in message and "1 of 6 cases" in message and "--skip-bad" in message
    assert [path.name for path in project.model_dir.iterdir()] == [".lock"]
    flipped(voxels, voxels.stat().st_size - 6)  # in the checksum: the header is fine
    short = ("--no-amp", "--set", "autoencoder_train.max_epochs=1", "--set", "data.val_fraction=0.25")
    said = project.run(train_autoencoder, "--skip-bad", *short)
    assert "2 bad case(s) left out" in said and "3 training and 1 validation" in said
    skipped = json.loads((project.model_dir / "skipped.json").read_text())
    left_out = {(one["case"], one["file"]) for one in skipped}
    assert left_out == {("scan_1", str(header)), ("scan_4", str(voxels))}
    split = project.split()
    assert sorted(split["training"] + split["validation"]) == [f"scan_{i}" for i in (0, 2, 3, 5)]
    for path in (project.data / "imagesTr").glob("*.nii.gz"):
        path.write_bytes(b"")
    assert "every training case is bad" in project.refused(train_autoencoder, "--skip-bad", "--fresh")


def test_a_mask_of_any_name_is_known_by_what_it_holds(tmp_path, monkeypatch):
    """Packed or not, among scans: few whole numbers where others hold many."""
    shape, cases = (48, 48, 48), []
    scan = np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)
    ball = ((np.indices(shape) - 24) ** 2).sum(0) < 200
    for name, voxels in {
        "a.nii.gz": scan,
        "b.nii": scan[::-1].astype(np.float32),
        "liver.nii.gz": ball.astype(np.uint8),
        "organs.nii": (ball * (np.arange(48) // 16)).astype(np.float32),
        "empty.nii.gz": np.zeros(shape, np.uint8),
        "smooth.nii.gz": np.where(ball, scan, 0),
    }.items():
        cases.append(Case(name, (save(tmp_path / name, voxels),)))
    problems = check_headers(cases)
    assert [(p.case, p.reason.partition(", other")[0]) for p in problems] == [
        ("liver.nii.gz", "holds 2 whole numbers in patches"),
        ("organs.nii", "holds 3 whole numbers in patches"),
    ]
    assert not masks_among([case for case in cases if case.name in {"liver.nii.gz", "organs.nii"}])  # no scan
    read = []
    monkeypatch.setattr("ldm.data.masks.read_image", lambda path: read.append(path.name) or read_image(path))
    assert not masks_among(cases[:2]) and len(read) == 1  # of a good data set, one scan


def test_where_all_is_read_small_masks_and_turned_copies_are_found(tmp_path):
    """A scan of few grey values is no mask; a copy whose axes are stored the other way is one."""
    scan = noise(0)
    few = np.rint(100 * scan / scan.max()).astype(np.uint8)
    ball = ((np.indices(scan.shape) - 5) ** 2).sum(0) < 16
    turned = np.diag([-1.0, 1, 1, 1]) @ AFFINE
    turned[0, 3] = AFFINE[0, 3] + AFFINE[0, 0] * (len(scan) - 1)
    images = {
        "a.nii.gz": nib.Nifti1Image(scan, AFFINE),
        "few.nii.gz": nib.Nifti1Image(few, AFFINE),
        "organ.nii.gz": nib.Nifti1Image(ball.astype(np.uint8), AFFINE),
        "turned.nii.gz": nib.Nifti1Image(scan[::-1].copy(), turned),
    }
    for name, image in images.items():
        nib.save(image, tmp_path / name)
    problems, _ = check_cases(find_cases(tmp_path)[0])
    assert [(p.case, p.reason.partition(",")[0].partition(":")[0]) for p in problems] == [
        ("organ", "holds 2 whole numbers in patches"),
        ("turned", "the same voxels as a.nii.gz"),
    ]
