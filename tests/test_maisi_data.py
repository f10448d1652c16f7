"""Data as MAISI has it: its lists with folds and regions, label_dict.json, combined labels, embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from ldm import UserError, configs
from ldm.data import folds, splits
from ldm.data.cases import Case
from ldm.data.checks import check_cases
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
