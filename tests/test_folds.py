"""Ways to divide a data set: a share held out, three parts, folds; and what the scripts make of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm import UserError, configs
from ldm.data import folds, splits
from ldm.data.cases import Case
from ldm.data.prepare import prepare_data
from ldm.system.ranks import Run

CASES = [
    Case(f"c{i:02d}{scan}", (Path(f"c{i}{scan}.nii"),), subject=f"s{i}") for i in range(20) for scan in "ab"
]
RUN = Run(0, 1, torch.device("cpu"))
DATA = configs.completed({"data": {}})["data"]


def names(cases):
    return [case.name for case in cases]


def subjects(cases):
    return {case.subject for case in cases}


def test_a_share_is_held_out_by_subject():
    divided = folds.hold_out(CASES, 0.25, 1)
    assert len(subjects(divided.validation)) == 5 and len(divided.validation) == 10 and not divided.test
    assert sorted(names(divided.training + divided.validation)) == names(CASES)
    assert folds.hold_out(CASES[::-1], 0.25, 1).validation == divided.validation[::-1]  # not of their order
    assert len({tuple(names(folds.hold_out(CASES, 0.25, seed).validation)) for seed in range(10)}) == 10
    assert len(subjects(folds.hold_out(CASES, 0.0, 1).validation)) == 1  # something is always held out,
    assert len(subjects(folds.hold_out(CASES[:4], 0.99, 1).training)) == 1  # and something always trained on


def test_three_parts_and_five_folds():
    divided = folds.divide(CASES, DATA | {"split": "train-val-test"}, 3)
    parts = divided.training, divided.validation, divided.test
    assert [len(subjects(part)) for part in parts] == [14, 2, 4]
    assert sorted(names(sum(parts, []))) == names(CASES) and not subjects(parts[0]) & subjects(parts[2])
    assert [len(side) for side in vars(folds.three_parts(CASES[:6], 0)).values() if side] == [2, 2, 2]
    held_out = []
    for fold in range(5):
        divided = folds.divide(CASES, DATA | {"split": "5-fold", "fold": fold}, 3)
        assert not subjects(divided.training) & subjects(divided.validation)
        assert len(divided.training) == 32 and divided.folds[fold]["val"] == names(divided.validation)
        held_out += names(divided.validation)
    assert sorted(held_out) == names(CASES)  # each once


@pytest.mark.parametrize(
    "how, cases, message",
    [
        ({"split": "5-fold", "fold": 5}, CASES, "data.fold 5: 5-fold has 5 folds, from 0 on."),
        ({"split": "5-fold"}, CASES[:8], "data.split 5-fold: needs 5 subjects, found 4."),
        ({"split": "train-val-test"}, CASES[:4], "data.split train-val-test: needs 3 subjects, found 2."),
        ({"fold": 1}, CASES, "data.fold 1: needs data.split 5-fold, a file of folds, or a list with folds."),
    ],
)
def test_what_cannot_be_divided(how, cases, message):
    with pytest.raises(UserError) as error:
        folds.divide(cases, DATA | how, 0)
    assert str(error.value) == message


def test_folds_of_nnunet_are_read(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["c00a"], "val": ["c01a", "c01b"]}]))
    divided = folds.divide(CASES, DATA | {"split": str(path), "fold": 0}, 0)
    assert names(divided.training) == ["c00a"] and names(divided.validation) == ["c01a", "c01b"]
    path.write_text(json.dumps([{"train": ["c00a"], "val": ["other"]}]))
    with pytest.raises(UserError, match="names 1 case not found: other"):
        folds.divide(CASES, DATA | {"split": str(path)}, 0)
    path.write_text(json.dumps({"train": ["c00a"]}))
    with pytest.raises(UserError, match="expected a JSON list"):
        folds.divide(CASES, DATA | {"split": str(path)}, 0)


def test_a_split_is_written_down_and_kept(write_image, tmp_path):
    """split.json holds the parts and how they were drawn; another fold needs another model_dir; evaluation
    compares with the cases for testing."""
    root = tmp_path / "data"
    for i in range(10):
        write_image(root / f"s{i}.nii.gz", np.random.default_rng(i).random((4, 5, 6), np.float32))

    def prepare(model_dir, for_training=True, test=False, **how):
        environment = dict.fromkeys(("model_dir", "output_dir", "cache_dir", "tfevent_path"), model_dir)
        config = configs.completed({"data": how})
        environment |= {"data_base_dir": root, "download_brats": False}
        return [
            names(side)
            for side in prepare_data(config, environment, RUN, for_training=for_training, test=test)[:2]
        ]

    train, val = prepare(tmp_path / "a", split="train-val-test")
    written = json.loads((tmp_path / "a/split.json").read_text())
    assert written["split"] == "train-val-test" and [len(train), len(val), len(written["test"])] == [7, 1, 2]
    assert (train, val) == (written["training"], written["validation"])
    assert prepare(tmp_path / "a", False, True, split="train-val-test") == [train, written["test"]]
    assert prepare(tmp_path / "new", False, True, split="train-val-test") == [train, written["test"]]
    assert splits.held_out_names(tmp_path / "a/split.json") == written["test"]
    _, first = prepare(tmp_path / "b", split="5-fold", fold=1)
    kept = json.loads((tmp_path / "b/splits_final.json").read_text())
    assert kept[1]["val"] == first and len(kept) == 5
    _, again = prepare(tmp_path / "c", split=str(tmp_path / "b/splits_final.json"), fold=1)
    assert again == first
    with pytest.raises(UserError, match=r"was made with data.fold 1, now it is 2. Choose another model_dir."):
        prepare(tmp_path / "b", split="5-fold", fold=2)
