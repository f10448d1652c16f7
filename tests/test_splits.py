"""The split: kept in split.json, the same for training, cache and evaluation, and free of leaks."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import copy_of

import check_data
import evaluate
import train_diffusion
from ldm import UserError, configs
from ldm.data import splits
from ldm.data.cases import Case
from ldm.data.prepare import prepare_data
from ldm.system.checkpoints import load_checkpoint, save_checkpoint
from ldm.system.ranks import Run

RUN = Run(0, 1, torch.device("cpu"))
CONFIG = configs.completed({"data": {"val_fraction": 0.2}})
FIVE = tuple(f"{name}.nii" for name in "abcde")


@pytest.fixture
def scans(tmp_path, write_image):
    """`scans(name, ...)`: small images, no two alike and all of one size, in a folder."""

    def make(*names: str, folder: str = "data") -> Path:
        for name in names:
            rng = np.random.default_rng(list(f"{folder}/{name}".encode()))
            write_image(tmp_path / folder / name, rng.random((4, 5, 6), np.float32))
        return tmp_path / folder

    return make


def listed(path: Path, training: list, validation: list | None = None) -> Path:
    """A JSON list of files."""
    path.write_text(json.dumps({"training": training, **({"validation": validation} if validation else {})}))
    return path


def prepare(base: Path | list[Path], model_dir: Path, pattern: str | None = None, **how):
    """The names of the two sides of the split."""
    environment = {"data_base_dir": base, "model_dir": model_dir, "download_brats": False}
    environment |= dict.fromkeys(("output_dir", "cache_dir", "tfevent_path"), model_dir)
    config = CONFIG | {"data": CONFIG["data"] | {"pattern": pattern}}
    train, val, _ = prepare_data(config, environment, RUN, **how)
    return [case.name for case in train], [case.name for case in val]


def test_single_case_is_its_own_validation_and_said_so(scans, capsys):
    root = scans("a.nii.gz", "models/made.nii.gz")  # what the run wrote is no data
    assert prepare(root, root / "models") == (["a"], ["a"])
    said = capsys.readouterr().out
    assert "warning: a single subject (a)" in said
    assert f"found: 1 image, 0 labels, 1 subject in {root}; passed over: 1 folder of this run" in said


def test_split_is_written_once_and_kept(scans, tmp_path, capsys):
    root, path = scans(*FIVE), tmp_path / "models" / "split.json"
    train, val = prepare(root, path.parent)
    said = capsys.readouterr().out
    assert "warning" not in said and "spacing [1.0, 1.0, 1.0] mm" in said
    assert json.loads(path.read_text()) == {"training": train, "validation": val} and len(val) == 1
    path.write_text(json.dumps({"training": val, "validation": train}))
    assert prepare(root, path.parent) == (val, train)


def test_the_cases_of_a_split_are_the_runs(scans, tmp_path, capsys):
    """New scans are named and left out; one that is gone ends a training and is left out of an evaluation."""
    root, model_dir = scans(*FIVE), tmp_path / "models"
    sides = prepare(root, model_dir)
    assert len(sides[1]) == 1 and "left out" not in capsys.readouterr().out
    scans("new.nii", "new_2.nii")
    (root / "new_3.nii").write_bytes(b"not an image")  # no business of the run
    assert prepare(root, model_dir) == sides == prepare(root, model_dir, for_training=False)
    said = capsys.readouterr().out
    told = f"3 scans in {root} are not in {model_dir / 'split.json'} and are left out: new, new_2, new_3"
    assert said.count(told) == 2

    gone = sides[0][0]
    (root / f"{gone}.nii").unlink()
    with pytest.raises(UserError, match=rf"1 case of .*split\.json not found in .*: {gone}\. Put them back"):
        prepare(root, model_dir)
    assert prepare(root, model_dir, for_training=False) == (sides[0][1:], sides[1])
    assert f"left out: {gone}" in capsys.readouterr().out
    bad = sides[0][1]
    (root / f"{bad}.nii").write_bytes(b"not an image")
    assert prepare(root, model_dir, for_training=False) == (sides[0][2:], sides[1])
    (root / f"{sides[1][0]}.nii").unlink()
    with pytest.raises(UserError, match="no validation case is left"):
        prepare(root, model_dir, for_training=False)


def test_what_skip_bad_left_out_stops_nothing_later(scans, tmp_path):
    root, model_dir = scans(*FIVE), tmp_path / "models"
    (root / "c.nii").write_bytes(b"not an image")
    sides = prepare(root, model_dir, skip_bad=True)
    skipped = (model_dir / "skipped.json").read_text()
    assert sorted(sum(sides, [])) == ["a", "b", "d", "e"] and '"c"' in skipped
    assert prepare(root, model_dir) == sides == prepare(root, model_dir, for_training=False)
    assert prepare(root, model_dir, skip_bad=True) == sides
    assert (model_dir / "skipped.json").read_text() == skipped
    (root / f"{sides[0][0]}.nii").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1 of 4 cases of .*split\.json are bad"):
        prepare(root, model_dir, skip_bad=True)


@pytest.mark.parametrize("content", [{"training": ["a"]}, {"training": 3, "validation": ["b"]}, {"a": []}])
def test_a_split_that_is_none_is_refused(scans, tmp_path, content):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"split\.json: .*Expected two lists of case names"):
        prepare(scans(*FIVE), tmp_path)


# ---------------------------------------------------------------- leaks


LEAKS = {  # training, validation, what is said
    "subject": (
        ["a.nii", {"image": "b.nii", "subject": "P"}],
        [{"image": "c.nii", "subject": "P"}],
        "of subject P, who",
    ),
    "session": (["sub-1_ses-1.nii", "a.nii"], ["sub-1_ses-2.nii"], "of subject sub-1, who"),
    "path": (["a.nii", "b.nii"], [{"name": "other", "image": "x/../b.nii"}], "is also under training, as b"),
    "bytes": (["a.nii", "b.nii"], ["copy.nii"], "holds the same bytes as"),
    "channels": (
        [{"image": ["a.nii", "b.nii"]}, {"image": ["c.nii", "d.nii"]}],
        [{"image": ["copy.nii", "a.nii"]}],
        "holds the same bytes as",
    ),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_promise_22_a_list_with_a_leak_is_refused(scans, tmp_path, capsys, kind):
    training, validation, told = LEAKS[kind]
    root = scans(*FIVE, "sub-1_ses-1.nii", "sub-1_ses-2.nii")
    (root / "x").mkdir()
    shutil.copy(root / "b.nii", root / "copy.nii")
    path = listed(root / "list.json", training, validation)
    for for_training in (True, False):
        with pytest.raises(UserError, match="held out and also trained on") as error:
            prepare(path, tmp_path / "models", for_training=for_training)
        assert told in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "models").exists()
    with pytest.raises(SystemExit) as stop:
        check_data.main([str(path)])
    assert (
        stop.value.code == 2
        and ("subject" if "subject" in told else "same voxels") in capsys.readouterr().out
    )


def test_an_atlas_that_cases_share_is_no_leak(scans, tmp_path):
    root = scans(*FIVE)
    path = listed(root / "list.json", [{"image": ["a.nii", "e.nii"]}], [{"image": ["b.nii", "e.nii"]}])
    assert prepare(path, tmp_path / "models") == (["a"], ["b"])


def test_promise_22_no_draw_parts_a_file_from_itself(scans, tmp_path):
    """The same file as two subjects, whatever the draw; a link is followed."""
    root = scans(*FIVE)
    path = listed(root / "list.json", [*FIVE, {"name": "again", "image": "a.nii"}])
    with pytest.raises(UserError, match="is there as a and as again"):
        prepare(path, tmp_path / "models")
    listed(path, [*FIVE, {"name": "again", "image": "a.nii", "subject": "a"}])
    train, val = prepare(path, tmp_path / "models")
    assert ("a" in train) == ("again" in train)
    if hasattr(os, "symlink") and os.name != "nt":
        (root / "link.nii").symlink_to(root / "a.nii")
        with pytest.raises(UserError, match="is there as"):
            prepare(listed(path, [*FIVE, "link.nii"]), tmp_path / "linked")


def test_promise_22_a_scan_in_two_folders_is_found(scans, tmp_path):
    one, other = scans("a.nii", folder="one"), scans("b.nii", folder="other")
    shutil.copy(one / "a.nii", other / "b.nii")
    with pytest.raises(UserError, match="holds the same bytes as"):
        prepare([one, other], tmp_path / "models")


def test_promise_22_a_split_by_hand_keeps_subjects_together(scans, tmp_path):
    root = scans(*FIVE, "sub-1_ses-1.nii", "sub-1_ses-2.nii")
    names = [name.removesuffix(".nii") for name in FIVE]
    split = {"training": [*names, "sub-1_ses-1"], "validation": ["sub-1_ses-2"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(UserError, match=r"of subject sub-1, who(?s:.)*another model_dir"):
        prepare(root, tmp_path, "*.nii")


def test_a_list_that_moved_a_case_does_not_move_it_in_a_model(scans, tmp_path, capsys):
    path = listed(scans(*FIVE) / "list.json", [*FIVE[:4]], [FIVE[4]])
    sides = prepare(path, tmp_path / "models")
    listed(path, [*FIVE[1:]], [FIVE[0]])
    with pytest.raises(UserError, match=r"has a under validation.*Choose another model_dir"):
        prepare(path, tmp_path / "models")
    assert prepare(path, tmp_path / "models", for_training=False) == sides
    assert "has a under validation" in capsys.readouterr().out


def test_files_of_one_size_are_read_no_further_than_they_agree(tmp_path, monkeypatch):
    """Large files of one size are told apart by a few places; what agrees there is read whole."""
    voxels = np.zeros(10**6, np.uint8)
    for i, name in enumerate("abc"):
        voxels[500_000] = i // 2  # of c alone
        voxels[300_000] = i
        (tmp_path / name).write_bytes(voxels.tobytes())
    a, b, c = (Case(name, (tmp_path / name,), subject=name) for name in "abc")
    read = []
    monkeypatch.setattr(splits, "sha256_of", lambda path: read.append(path.name) or path.read_bytes())
    assert splits.leaks([a], [c]) == [] and read == []
    assert splits.leaks([a], [b]) == [] and sorted(read) == ["a", "b"]
    shutil.copy(tmp_path / "a", tmp_path / "b")
    assert [problem.case for problem in splits.leaks([a], [b, c])] == ["b"]


# ---------------------------------------------------------------- what checkpoints remember


def swapped(split: dict) -> dict:
    """A training and a validation case change sides."""
    (first, *rest), (held, *others) = split["training"], split["validation"]
    return {"training": [held, *rest], "validation": [first, *others]}


def test_what_the_autoencoder_learnt_from_is_not_held_out(done, tmp_path, capsys):
    """In another model_dir the split is the autoencoder's, whatever seed and data.val_fraction say; one that
    is there already is warned of, and refused beside the autoencoder."""
    autoencoder = done.model_dir / "autoencoder.pt"
    project = copy_of(done, tmp_path / "other")
    short = ("--no-amp", "--autoencoder", autoencoder, "--set", "diffusion_train.max_epochs=1")
    said = project.run(train_diffusion, *short, "--set", "seed=3", "--set", "data.val_fraction=0.6")
    assert project.split() == done.split() and f"held out is what {autoencoder} held out" in said
    assert (
        project.checkpoint("diffusion_unet.pt")["subjects"] == done.checkpoint("autoencoder.pt")["subjects"]
    )

    moved = swapped(done.split())
    (project.model_dir / "split.json").write_text(json.dumps(moved))
    prepare(done.data, project.model_dir, autoencoder=autoencoder)
    told = f"was trained on 1 of 2 validation cases ({moved['validation'][0]})"
    assert told in capsys.readouterr().out
    project = copy_of(done, tmp_path / "refused", "autoencoder.pt", "split.json")
    (project.model_dir / "split.json").write_text(json.dumps(moved))
    assert "split.json has changed since" in project.refused(train_diffusion)


def test_what_a_checkpoint_remembers_is_checked(tmp_path):
    config = dict.fromkeys(("autoencoder_def", "channel", "spacing", "intensity"))
    for subjects in (3, {"training": ["a"]}, {"training": [1], "validation": []}):
        content = {"model": {"a": torch.ones(1)}, "config": config, "subjects": subjects}
        save_checkpoint(tmp_path / "a.pt", content)
        with pytest.raises(UserError, match="subjects"):
            load_checkpoint(tmp_path / "a.pt")


def test_a_run_is_not_resumed_with_cases_on_the_other_side(done, tmp_path):
    """Of an autoencoder that does not remember, as older ones do not."""
    project = copy_of(done, tmp_path / "again", "autoencoder.pt", "diffusion_unet_last.pt")
    content = project.checkpoint("autoencoder.pt")
    content.pop("subjects")
    save_checkpoint(project.model_dir / "autoencoder.pt", content)
    moved = swapped(done.split())
    (project.model_dir / "split.json").write_text(json.dumps(moved))
    message = project.refused(train_diffusion)
    assert "2 cases changed sides" in message and moved["validation"][0] in message


def test_an_evaluation_takes_the_cases_of_the_split(done, tmp_path, capsys):
    """With a bad header elsewhere, a new scan and one that is gone, and the spacing left open."""
    project = copy_of(done, tmp_path / "p", "autoencoder.pt", "diffusion_unet.pt", "split.json")
    shutil.copytree(done.data, project.folder / "data")
    project.data, split = project.folder / "data", done.split()
    project.set_environment()
    images = project.data / "imagesTr"
    (images / "broken.nii.gz").write_bytes(b"")
    listed = json.loads((project.data / "dataset.json").read_text())
    listed["training"] = [one for one in listed["training"] if split["training"][0] not in one["image"]] + [
        "./imagesTr/broken.nii.gz"
    ]
    (project.data / "dataset.json").write_text(json.dumps(listed))
    shutil.copytree(done.output_dir, project.output_dir)
    argv = project.argv("--set", "spacing=null", "--set", "longest_side=10")
    inputs = evaluate.find_inputs(evaluate.parse_arguments(argv), RUN)
    found = {name: [case.name for case in source.cases] for name, source in inputs.sources.items()}
    assert (
        found[evaluate.TRAINING] == split["training"][1:] and found[evaluate.HELD_OUT] == split["validation"]
    )
    (note,) = inputs.notes
    assert f"1 of 4 cases of {project.model_dir / 'split.json'}" in note
    said = capsys.readouterr().out
    assert "left out: broken" in said and f"left out: {split['training'][0]}" in said
