"""Data as MAISI has it: its lists with folds and regions, label_dict.json, combined labels, embeddings."""

import json
from pathlib import Path

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

import cache_latents
import check_data
import preprocess
import train_autoencoder
import train_controlnet
import train_diffusion
import utils
from ldm import UserError, configs
from ldm.data import folds, splits
from ldm.data.body import body_mask, region_indices
from ldm.data.cases import Case
from ldm.data.checks import check_cases, check_headers
from ldm.data.label_names import label_names
from ldm.data.layouts import find_cases
from ldm.data.prepare import find_data, prepare_data
from ldm.system.ranks import Run

RUN = Run(0, 1, torch.device("cpu"))
CHEST, ABDOMEN = [0, 1, 0, 0], [0, 0, 1, 0]


def entry(name: str, fold: int, **more) -> dict:
    return {
        "image": f"{name}/ct.nii.gz",
        "label": f"{name}/label.nii.gz",
        "dim": [8, 8, 8],
        "spacing": [1.5, 1.5, 3.0],
        "modality": "ct",
        "fold": fold,
        "top_region_index": CHEST,
        "bottom_region_index": ABDOMEN,
    } | more


def write_list(path: Path, *entries: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"training": entries}))
    return path


def names(cases) -> list[str]:
    return [case.name for case in cases]


# ---------------------------------------------------------------- lists


def test_two_lists_of_two_folders_and_the_values_of_their_entries(tmp_path):
    lists = [
        write_list(tmp_path / "lists/a.json", entry("s1", 0), entry("s2", 1)),
        write_list(tmp_path / "lists/b.json", entry("s1", 1, modality=9)),
    ]
    content = dict.fromkeys(("model_dir", "tfevent_path", "output_dir"), str(tmp_path / "out"))
    content["data_base_dir"] = [str(tmp_path / one) for one in ("ct", "mr")]
    for folder in content["data_base_dir"]:
        Path(folder).mkdir()
    content["json_data_list"] = [str(one) for one in lists]
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(content))
    cases, validation = find_data(configs.completed({}), utils.load_environment(path))
    assert names(cases) == ["a/s1_ct", "a/s2_ct", "b/ct"] and not validation
    assert [case.images[0] for case in cases] == [
        tmp_path / one / "ct.nii.gz" for one in ("ct/s1", "ct/s2", "mr/s1")
    ]
    assert cases[2].label == tmp_path / "mr/s1/label.nii.gz"
    assert [case.fold for case in cases] == [0, 1, 1]
    assert cases[2].covariates == {
        "dim": [8, 8, 8],
        "spacing": [1.5, 1.5, 3.0],
        "modality": 9,
        "top_region_index": CHEST,
        "bottom_region_index": ABDOMEN,
    }
    path.write_text(json.dumps(content | {"json_data_list": str(lists[0])}))
    with pytest.raises(UserError, match="json_data_list names 1 list, data_base_dir 2 folders"):
        utils.load_environment(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_region_index": None}, "top_region_index: expected four numbers, one of them 1"),
        ({"top_region_index": [1, 1, 0, 0]}, "top_region_index: expected four numbers, one of them 1"),
        ({"bottom_region_index": ...}, "bottom_region_index is missing"),
        ({"top_region_index": ...}, "top_region_index is missing"),
        ({"fold": "1"}, "fold: expected a whole number of at least 0"),
        ({"spacing": [1, 1, 0]}, "spacing"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    wrong = {key: value for key, value in (entry("s1", 0) | change).items() if value is not ...}
    path = write_list(tmp_path / "list.json", entry("s0", 0), wrong)
    with pytest.raises(UserError, match=rf"list.json: training\.1\.{message}"):
        find_cases(path)


# ---------------------------------------------------------------- folds

FOLDED = [
    Case(f"c{i}", (Path(f"c{i}.nii"),), subject=f"s{i}", fold=fold) for i, fold in enumerate((2, 1, 3, 2))
]
FOLDED += [Case("plain", (Path("plain.nii"),), subject="plain")]
DATA = configs.completed({"data": {}})["data"]


def test_cases_whose_fold_equals_the_configs_are_held_out():
    divided = folds.divide(FOLDED, DATA | {"fold": 2}, 0)
    assert names(divided.validation) == ["c0", "c3"] and names(divided.training) == ["c1", "c2", "plain"]
    assert names(folds.divide(FOLDED, DATA, 0).validation) == ["c1"], "the first fold there is"
    with pytest.raises(
        UserError, match=r"data.fold 0: no case .* nothing is held out \(folds there: 1, 2, 3"
    ):
        folds.divide(FOLDED, DATA | {"fold": 0}, 0)
    with pytest.raises(UserError, match=r"data.fold 2: every case .* nothing is left to train on"):
        folds.divide([FOLDED[0], FOLDED[3]], DATA | {"fold": 2}, 0)
    with pytest.raises(UserError, match="needs 5 subjects"):  # data.split replaces the folds of the list
        folds.divide(FOLDED[:4], DATA | {"split": "5-fold"}, 0)


def test_the_split_of_a_list_is_kept_and_a_subject_on_both_sides_is_refused(write_image, tmp_path):
    for i in range(3):
        write_image(tmp_path / f"data/s{i}/ct.nii.gz", np.random.default_rng(i).random((4, 5, 6), np.float32))
    entries = [entry(f"s{i}", i % 2) for i in range(3)]
    path = write_list(tmp_path / "data/list.json", *entries)
    environment = dict.fromkeys(("model_dir", "output_dir", "cache_dir", "tfevent_path"), tmp_path / "out")
    environment |= {"data_base_dir": path, "download_brats": False}

    def prepare(**data):
        return [names(side) for side in prepare_data(configs.completed({"data": data}), environment, RUN)[:2]]

    assert prepare(fold=1) == [["s0_ct", "s2_ct"], ["s1_ct"]]
    written = json.loads((tmp_path / "out" / splits.SPLIT).read_text())
    assert written == {"training": ["s0_ct", "s2_ct"], "validation": ["s1_ct"], "fold": 1}
    with pytest.raises(UserError, match="was made with data.fold 1, now it is 0"):
        prepare(fold=0)
    write_list(path, *(one | {"subject": "p"} if i else one for i, one in enumerate(entries)))
    (tmp_path / "out" / splits.SPLIT).unlink()
    with pytest.raises(UserError, match="is of subject p, who is under training too"):
        prepare(fold=1)


# ---------------------------------------------------------------- names of labels


def test_label_dict_names_labels_and_others_are_found(write_image, tmp_path):
    label = np.zeros((4, 5, 6), np.uint8)
    label[0], label[1] = 3, 7
    write_image(tmp_path / "s/ct.nii.gz", np.random.default_rng(0).random((4, 5, 6), np.float32))
    write_image(tmp_path / "s/label.nii.gz", label)
    (tmp_path / "label_dict.json").write_text(json.dumps({"background": 0, "spleen": 3}))
    cases, _ = find_cases(write_list(tmp_path / "list.json", entry("s", 0)))
    assert label_names(cases) == {0: "background", 3: "spleen"}
    problems, _ = check_cases(cases)
    (reason,) = [problem.reason for problem in problems if not problem.note]
    assert reason == "label has values that label_dict.json does not name: 7 (30 voxels)"
    (tmp_path / "label_dict.json").write_text(json.dumps({"spleen": "3"}))
    with pytest.raises(UserError, match=r"label_dict.json: spleen: expected a whole number"):
        label_names(cases)


# ---------------------------------------------------------------- bodies and regions


def scanned(gap: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box-shaped body of 40 HU with lungs of -900, on a table that it touches in one place, at 1.5 mm, and
    `gap` voxels of air to its sides; the body; and a label of one lung."""
    body = np.zeros((30, 34, 16), bool)
    body[gap : 30 - gap, 10:30] = True
    hu = np.where(body, 40, -1000).astype(np.float32)
    lung = np.zeros_like(body)
    lung[8:14, 14:24, 3:13] = True
    hu[lung] = hu[::-1][lung[::-1]] = -900
    hu[2:28, 4:7] = hu[12:15, 7:10, 5:8] = 300  # the table, and a cushion of 4.5 mm
    return hu, body, np.where(lung, 28, 0).astype(np.uint8)


def test_the_table_is_no_body_where_lungs_are_labelled():
    hu, expected, label = scanned()
    np.testing.assert_array_equal(body_mask(hu, (1.5, 1.5, 1.5), label), expected)
    unlabelled = body_mask(hu, (1.5, 1.5, 1.5), np.zeros_like(label))
    assert unlabelled[expected].all() and unlabelled[10, 5, 8], "without lungs it stays"
    assert not body_mask(hu, (1.5, 1.5, 1.5), label, {"Lung_Upper_lobe-left": 28})[10, 5, 8]
    assert body_mask(hu, (1.5, 1.5, 1.5), label, {"liver": 28})[10, 5, 8], "28 is no lung there"


def test_air_on_both_sides_of_a_body_is_outside_of_it():
    hu = np.full((20, 12, 8), -1000, np.float32)
    hu[4:12] = 0  # from front to back: 4 voxels of air to one side, 8 to the other
    expected = np.zeros(hu.shape, bool)
    expected[4:12] = True
    np.testing.assert_array_equal(body_mask(hu, (3, 3, 3), np.zeros(hu.shape, np.uint8)), expected)
    with pytest.raises(UserError, match="no voxel without a label is below -800 HU"):
        body_mask(hu + 1000, (3, 3, 3), np.zeros(hu.shape, np.uint8))


def test_regions_follow_from_organs():
    assert region_indices({0, 1, 200}) == (ABDOMEN, ABDOMEN)
    assert region_indices({94, 30, 3}) == (CHEST, [0, 0, 0, 1])
    assert region_indices({22, 120}) == ([1, 0, 0, 0], [1, 0, 0, 0])
    assert region_indices({0, 6, 200}) is None
    assert region_indices({5}, {"brain": 5, "liver": 1}) == ([1, 0, 0, 0], [1, 0, 0, 0])


def test_the_body_of_a_real_ct(shared_data):
    folder = shared_data / "ct_abdomen_3mm"
    hu, label = (nib.load(folder / f"example_ct{end}.nii.gz").get_fdata() for end in ("", "_seg104"))
    stored = json.loads((folder / "class_maps.json").read_text())["v1_total_104"]
    dictionary = {name: int(value) for value, name in stored.items()}
    body = body_mask(hu, (3, 3, 3), label, dictionary)
    assert ndimage.label(body)[1] == 1
    assert np.count_nonzero((label > 0) & ~body) < 1e-4 * np.count_nonzero(label)
    assert 23 < body.sum() * 27e-6 < 26, "litres"
    with_table = body_mask(hu, (3, 3, 3), np.zeros_like(label), dictionary)
    assert np.count_nonzero(with_table & ~body) > 10_000
    assert region_indices(np.unique(label), dictionary) == (CHEST, [0, 0, 0, 1]), "lung bases to femora"
    assert region_indices(np.unique(label[..., 50:75]), dictionary) == (ABDOMEN, ABDOMEN)


# ---------------------------------------------------------------- preprocess.py

DICTIONARY = {
    "liver": 1,
    "hepatic tumor": 26,
    "cancer": 26,
    "left lung upper lobe": 28,
    "brain": 22,
    "aorta": 6,
}


@pytest.fixture
def raw(tmp_path):
    """Seven CTs of six subjects, int16, at 3 mm: own labels of a tumour under the values of their data set,
    and label maps of organs under the values and names of another."""
    rng = np.random.default_rng(0)
    affine = np.diag([-3.0, -3, 3, 1])
    for i in range(7):
        name = f"sub-{min(i, 5)}_scan-{i}"
        hu = np.full((16, 16, 10), -1000, np.int16)
        hu[3:13, 4:13] = rng.integers(0, 80, (10, 9, 10))
        own, pseudo = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape, np.uint8)
        pseudo[4:8, 5:9, 2:6] = 7 if i else 9  # the liver; in the first scan the aorta
        own[6:10, 7:11, 3:5] = 2
        for path, array in (("ct/imagesTr", hu), ("ct/labelsTr", own), ("organs", pseudo)):
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), tmp_path / path / f"{name}.nii.gz")
    stems = [path.name for path in sorted((tmp_path / "ct/imagesTr").iterdir())]
    entries = [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in stems]
    names = {"0": "background", "1": "organ", "2": "cancer"}
    (tmp_path / "ct/dataset.json").write_text(json.dumps({"training": entries, "labels": names}))
    (tmp_path / "organs/label_dict.json").write_text(json.dumps({"Liver": 7, "aorta": 9, "face": 3}))
    (tmp_path / "label_dict.json").write_text(json.dumps(DICTIONARY))
    return tmp_path


def run(raw, *more):
    options = {"--in": "ct", "--out": "out", "--labels": "label_dict.json", "--pseudo-labels": "organs"}
    pairs = [word for option, name in options.items() for word in (option, raw / name)]
    preprocess.main([str(one) for one in (*pairs, "--body", "--modality", "ct", "-j", 1, *more)])


def test_combined_labels_and_the_list(raw, capsys):
    run(raw)
    printed = capsys.readouterr().out
    assert "no region indices of sub-0_scan-0: no organ" in printed
    assert "no lungs are labelled in sub-0_scan-0, sub-1_scan-1" in printed
    written, own, organs = (
        nib.load(raw / one)
        for one in (
            "out/imagesTr/sub-1_scan-1_0000.nii.gz",
            "ct/imagesTr/sub-1_scan-1.nii.gz",
            "out/labelsTr/sub-1_scan-1.nii.gz",
        )
    )
    assert written.get_data_dtype() == np.int16
    np.testing.assert_array_equal(written.dataobj, np.asanyarray(own.dataobj)[::-1, ::-1])
    expected = np.zeros((16, 16, 10), np.uint8)
    expected[3:13, 4:13] = 200
    expected[4:8, 5:9, 2:6] = 1
    expected[6:10, 7:11, 3:5] = 26  # own over pseudo over body
    np.testing.assert_array_equal(np.asanyarray(organs.dataobj), expected[::-1, ::-1])
    labels = json.loads((raw / "out/dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "liver": 1, "aorta": 6, "hepatic tumor": 26, "body": 200}

    entries = json.loads((raw / "out/dataset_maisi.json").read_text())["training"]
    assert entries[1] == {
        "name": "sub-1_scan-1",
        "subject": "sub-1",
        "image": "imagesTr/sub-1_scan-1_0000.nii.gz",
        "label": "labelsTr/sub-1_scan-1.nii.gz",
        "dim": [16, 16, 10],
        "spacing": [3.0, 3.0, 3.0],
        "modality": "ct",
        "fold": entries[1]["fold"],
        "top_region_index": ABDOMEN,
        "bottom_region_index": ABDOMEN,
    }
    assert "top_region_index" not in entries[0]
    assert entries[5]["fold"] == entries[6]["fold"], "of one subject"
    assert {one["fold"] for one in entries} == {0, 1, 2, 3, 4}
    cases, _ = find_cases(raw / "out/dataset_maisi.json")
    assert names(cases) == [one["name"] for one in entries] and cases[3].covariates["modality"] == "ct"
    assert not [problem for problem in check_cases(cases)[0] if not problem.note]


def test_other_grids_missing_files_and_unknown_labels_are_refused(raw, capsys):
    def refused(*more) -> str:
        with pytest.raises(SystemExit) as stop:
            run(raw, *more)
        assert stop.value.code == 2 and not (raw / "out/dataset.json").exists()
        return capsys.readouterr().err

    path = raw / "organs/sub-2_scan-2.nii.gz"
    image = nib.load(path)
    label = np.asanyarray(image.dataobj).copy()
    label[0, 0, 0] = 3
    nib.save(nib.Nifti1Image(label, image.affine), path)
    assert "sub-2_scan-2.nii.gz: has labels that --labels does not name: 3 (face)." in refused()
    label[0, 0, 0] = 4  # of no name: a value of --labels, or none
    nib.save(nib.Nifti1Image(label, image.affine), path)
    assert "does not name: 4. Add" in refused()
    nib.save(nib.Nifti1Image(label[1:], image.affine), path)
    assert "organs/sub-2_scan-2.nii.gz: lies on another grid" in refused()
    path.unlink()
    assert "organs: 0 files begin with sub-2_scan-2; expected one label map for each scan" in refused()
    assert "--body 0: give a value from 1 to" in refused("--body", 0)
    assert "--body: is found by the air around it" in refused("--brain-mask", "auto")


# ---------------------------------------------------------------- embeddings


@pytest.fixture
def project(tmp_path):
    """A project with six volumes and an autoencoder that was not trained, as bare weights."""
    project = chain.Project(tmp_path / "project", chain.make_data(tmp_path / "data"))
    project.change(diffusion_train=project.config["diffusion_train"] | {"max_epochs": 1, "val_interval": 1})
    torch.manual_seed(0)
    network = configs.define_network(utils.load_config(project.config_file), "autoencoder_def")
    torch.save(network.state_dict(), tmp_path / "autoencoder.pt")
    project.autoencoder = ("--autoencoder", tmp_path / "autoencoder.pt")
    return project


def embedding(seed: int, shape=(8, 10, 6, 3)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def entries_of(project) -> dict[str, np.ndarray]:
    """What the cache holds, by case."""
    folder = project.model_dir / "cache/latents"
    manifest = json.loads((folder / "manifest.json").read_text())
    records = [*manifest["training"], *manifest["validation"]]
    return {record["case"]: np.load(folder / record["entry"]) for record in records}


def test_embeddings_are_taken_as_they_are_where_no_posterior_is_cached(project, write_image):
    said = project.run(cache_latents, *project.autoencoder)
    assert "6 encoded, 0 found" in said
    encoded = entries_of(project)
    for i in (1, 4):
        write_image(project.data / f"imagesTr/scan_{i}_emb.nii.gz", embedding(i))
    taken = ("--set", "data.embeddings=true")
    assert "0 encoded, 6 found" in project.run(cache_latents, *project.autoencoder, *taken)
    assert all(np.array_equal(entry, encoded[name]) for name, entry in entries_of(project).items())

    said = project.run(cache_latents, *project.autoencoder, *taken, "--fresh")
    assert "data: 2 of 6 volumes have embeddings, which are taken as they are" in said
    for name, entry in entries_of(project).items():
        if name in ("scan_1", "scan_4"):
            np.testing.assert_array_equal(entry[0, 0], np.moveaxis(embedding(int(name[-1])), -1, 0))
            assert entry.shape == (1, 2, 3, 8, 10, 6) and not entry[0, 1].any()
        else:
            np.testing.assert_array_equal(entry, encoded[name])
    cached = ("--no-amp", "--set", "diffusion_train.latent_cache=true")
    said = project.run(train_diffusion, *project.autoencoder, *taken, *cached)
    z = np.concatenate([entries_of(project)[name] for name in project.split()["training"]]).astype(float)
    variance = ((z[:, 0] - z[:, 0].mean()) ** 2 + z[:, 1] ** 2).mean()
    assert f"scale factor {variance**-0.5:.5f}" in said
    write_image(project.data / "imagesTr/scan_1_emb.nii.gz", embedding(1, (8, 10, 5, 3)))
    assert "(1 case changed: scan_1)" in project.refused(
        train_diffusion, *project.autoencoder, *taken, *cached
    )
    message = project.refused(cache_latents, *project.autoencoder, *taken)
    assert (
        "scan_1_emb.nii.gz: shape (8, 10, 5, 3); the autoencoder of the config makes latents of (8, "
        in message
    )


@pytest.fixture
def listed(project, write_image):
    """The same project with a list of embeddings and labels, and no images."""
    affine, entries = np.diag([*chain.SPACING, 1]), []
    for i in range(6):
        write_image(project.folder / f"maisi/s{i}_emb.nii.gz", embedding(i))
        label = np.zeros(chain.SHAPE, np.uint8)
        label[4:8, 5:9, 2 + i] = 1 + i % 2
        write_image(project.folder / f"maisi/s{i}_label.nii.gz", label, affine)
        files = {"image": f"s{i}_emb.nii.gz", "label": f"s{i}_label.nii.gz"}
        entries.append(entry("", i % 3) | files | {"dim": [*chain.SHAPE], "spacing": [*chain.SPACING]})
    write_list(project.folder / "lists/maisi.json", *entries)
    project.set_environment(
        data_base_dir=str(project.folder / "maisi"), json_data_list=str(project.folder / "lists/maisi.json")
    )
    project.change(intensity={"window": [-1000, 1000]}, spacing=None)
    return project


def test_a_list_of_embeddings_needs_no_images(listed, capsys):
    said = listed.run(train_diffusion, *listed.autoencoder, "--no-amp", "--fold", 1)
    assert "4 training and 2 validation cases, spacing [2.0, 1.5, 3.0] mm" in said
    assert "data: 6 of 6 volumes have embeddings" in said
    assert listed.split() == {"training": ["s0", "s2", "s3", "s5"], "validation": ["s1", "s4"], "fold": 1}
    checkpoint = listed.checkpoint("diffusion_unet.pt")
    z = np.stack([embedding(i) for i in (0, 2, 3, 5)]).astype(float)
    assert checkpoint["scale_factor"] == pytest.approx(1 / z.std(), rel=1e-5)
    expected = {"spacing": [2, 1.5, 3], "size": [16, 20, 12], "limits": [[-1000, 1000]]}
    assert expected.items() <= checkpoint["geometry"].items()
    check_data.main(["-e", str(listed.environment_file)])
    assert "all good: 6 cases of 16 x 20 x 12 voxels of 2 x 1.5 x 3 mm" in capsys.readouterr().out

    maps, _ = find_cases(listed.folder / "maisi", lists=[listed.folder / "lists/maisi.json"], label_maps=True)
    assert all(case.is_label_map and case.embedding is None for case in maps), "label maps have no latents"
    listed.run(train_controlnet, *listed.autoencoder, "--no-amp", "--fold", 1)
    control = listed.checkpoint("controlnet.pt")
    assert control["label_values"] == [1, 2]


def test_embeddings_that_do_not_fit_are_refused(listed, write_image):
    train = (train_diffusion, *listed.autoencoder, "--no-amp")
    path, broken = listed.folder / "maisi/s2_emb.nii.gz", embedding(2)
    broken[0, 0, 0, 0] = np.nan
    for voxels, message in (
        (broken, "has 1 voxels that are not finite"),
        (
            embedding(2, (8, 10, 6, 4)),
            "shape (8, 10, 6, 4); the autoencoder of the config makes latents of (8, ",
        ),
    ):
        write_image(path, voxels)
        assert f"s2_emb.nii.gz: {message}" in listed.refused(*train)
    write_image(path, embedding(2))
    for key, message in (
        ('diffusion_train.augment={"flip_axes": [0]}', "augment: 6 of 6 cases have embeddings"),
        ('intensity={"lower_percentile": 0.5}', "intensity.window: "),
    ):
        assert message in listed.refused(*train, "--set", key)
    message = listed.refused(train_autoencoder, "--no-amp")
    assert "_emb.nii.gz: is an embedding, and the image itself is needed here" in message

    write_image(listed.folder / "maisi/s1_label.nii.gz", np.ones((15, 20, 12), np.uint8))
    path = listed.folder / "lists/maisi.json"
    cases, _ = find_cases(listed.folder / "maisi", lists=[path])
    reasons = {problem.file.name: problem.reason for problem in check_headers(cases) if not problem.note}
    assert reasons == {"s1_label.nii.gz": "shape (15, 20, 12), dim in the list says (16, 20, 12)"}
    content = json.loads(path.read_text())
    del content["training"][0]["dim"]
    write_list(path, *content["training"])
    assert "s0_emb.nii.gz is an embedding: its entry needs dim" in listed.refused(*train)
