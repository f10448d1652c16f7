"""Images and labels drawn together: the arithmetic, and pairs through all scripts."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import SHAPE, Project, make_data
from monai.losses import DiceCELoss

import cache_latents
import edit_scan
import evaluate
import export_model
import inference
import train_autoencoder
import train_diffusion
from ldm import UserError, configs, generation
from ldm.data.augmentation import augmentation
from ldm.data.labels import channels_of_label, label_of, logits, shares
from ldm.data.layouts import find_cases
from ldm.data.preprocessing import Preprocessing
from ldm.evaluation.asked import LabelStructure, Structure
from ldm.evaluation.segmentation import Pairs, dice, load_segmenter, rows_of, save_segmenter, train_segmenter
from ldm.evaluation.table import Metric
from ldm.evaluation.verdicts import utility
from ldm.losses import AutoencoderLoss
from ldm.metrics import mean_dice
from ldm.system.ranks import Run

VALUES = [2, 5]
CPU = Run(0, 1, torch.device("cpu"))


# ---------------------------------------------------------------- coding


def save_label(path, voxels, spacing=(1.0, 1.0, 1.0)):
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.diag([*spacing, 1])), path)
    return path


def test_a_label_becomes_channels_and_is_read_back(tmp_path, capsys):
    label = np.random.default_rng(0).choice([0, 2, 5, 7], (6, 7, 8))
    path = save_label(tmp_path / "a.nii.gz", label)
    channels = Preprocessing((0,), (1.0, 1.0, 1.0), labels=(5, 2)).label_channels(path)
    np.testing.assert_array_equal(channels, [label == 5, label == 2])
    np.testing.assert_array_equal(label_of(channels, (5, 2)), np.where(label == 7, 0, label))
    np.testing.assert_array_equal(channels_of_label(label, (5, 2)), channels)
    assert "values that label_values lacks, and are background there: 7" in capsys.readouterr().out


def test_on_a_coarser_grid_channels_are_shares(tmp_path):
    """A block of one value, half a coarse voxel wide beyond its own: the border voxel has some of each."""
    label = np.zeros((16, 16, 16))
    label[:9] = 5
    path = save_label(tmp_path / "a.nii.gz", label)
    channels = Preprocessing((0,), (2.0, 2.0, 2.0), labels=(2, 5)).label_channels(path)
    assert not channels[0].any() and channels.min() >= 0 and channels.max() <= 1
    line = channels[1, :, 4, 4]
    assert line[:3] == pytest.approx(1, abs=0.01) and line[-2:] == pytest.approx(0, abs=0.01)
    assert 0.1 < line[4] < 0.9 and (np.diff(line) <= 1e-6).all()


def test_background_wins_below_one_half():
    channels = (
        np.array([0.4, 0.6, 0.9, 0.1]).reshape(1, 4, 1, 1),
        np.array([0.3, 0.5, 0.95, 0]).reshape(1, 4, 1, 1),
    )
    assert label_of(np.concatenate(channels), (2, 5)).flatten().tolist() == [0, 2, 5, 0]


def test_intensities_of_labels_stay_and_flips_take_them_along():
    section = {"flip_axes": [0], "flip_prob": 1.0, "intensity_scale": 0.5, "intensity_shift": 0.5}
    section |= {"intensity_prob": 1.0}
    volume = np.random.default_rng(0).random((3, 4, 4, 4)).astype(np.float32)
    out = augmentation(section, (4, 4, 4), False, 1)(volume, None, np.random.RandomState(0)).numpy()
    np.testing.assert_array_equal(out[1:], volume[1:, ::-1])
    assert np.abs(out[0] - volume[0, ::-1]).min() > 0


def test_the_labels_term_by_hand():
    """Cross-entropy and 1 - Dice of softmax(0, 8 (x - 1/2)), beside terms of the image alone."""
    section = configs.completed({"autoencoder_train": {"perceptual_weight": 0, "gradient_weight": 0.5}})
    section = section["autoencoder_train"] | {"label_weight": 0.25}
    torch.manual_seed(0)
    image, made = torch.rand(2, 1, 3, 4, 5), torch.rand(2, 1, 3, 4, 5)
    label = torch.randint(0, 3, (2, 3, 4, 5))
    given = torch.stack([label == 1, label == 2], 1).float()
    drawn = torch.rand(2, 2, 3, 4, 5)
    terms = AutoencoderLoss(section, None, labels=2).held_out(
        torch.cat([image, given], 1), torch.cat([made, drawn], 1), None
    )
    scaled = 8 * (drawn.double() - 0.5)
    p = torch.cat([torch.ones_like(scaled[:, :1]), scaled.exp()], 1)
    p = p / p.sum(1, keepdim=True)
    cross_entropy = -p.gather(1, label[:, None]).log().mean()
    axes = (0, 2, 3, 4)
    overlap, sizes = (p[:, 1:] * given).sum(axes), p[:, 1:].sum(axes) + given.sum(axes)
    expected = cross_entropy + (1 - (2 * overlap + 1e-5) / (sizes + 1e-5)).mean()
    assert float(terms["label_loss"]) == pytest.approx(float(expected), rel=1e-5)
    monai = DiceCELoss(softmax=True, include_background=False, batch=True)
    torch.testing.assert_close(terms["label_loss"], monai(logits(drawn), shares(given)))
    alone = AutoencoderLoss(section, None).held_out(image, made, None)
    assert terms["recon_loss"] == alone["recon_loss"] and terms["gradient_loss"] == alone["gradient_loss"]
    assert float(terms["loss"]) == pytest.approx(float(alone["loss"] + 0.25 * terms["label_loss"]), rel=1e-5)


def test_dice_by_hand():
    true = np.array([0, 2, 2, 5, 5, 0])
    found = np.array([0, 2, 5, 5, 5, 2])
    np.testing.assert_allclose(dice(found, true, [2, 5, 7]), [2 / 4, 4 / 5, np.nan])
    made, given = (
        torch.from_numpy(channels_of_label(one.reshape(-1, 1, 1), [2, 5, 7]))[None] for one in (found, true)
    )
    assert float(mean_dice(made, given)) == pytest.approx((0.5 + 0.8) / 2)
    assert mean_dice(0 * made, 0 * given) == 1


def test_the_rows_of_the_table_by_hand():
    found, real = (np.array([[a, np.nan], [b, c]]) for a, b, c in ((0.5, 0.7, 0.4), (0.6, 0.8, 0.6)))
    rows = {row.key: row for row in rows_of("dice", "here", found, real, [2, 5], {2: "core"}, "")}
    mean = rows["dice_mean"]
    assert mean.value == pytest.approx(1.6 / 3) and mean.floor == pytest.approx(2 / 3)
    assert "core" in rows["dice_2"].name and "label 5" in rows["dice_5"].name
    assert rows["dice_2"].interval == pytest.approx([0.5, 0.7])
    found[:, 1] = np.nan
    rows = {row.key: row for row in rows_of("dice", "here", found, real, [2, 5], {}, "")}
    assert rows["dice_5"].missing and not rows["dice_2"].missing


@pytest.mark.parametrize(
    "alone, real, tone, words",
    [
        (0.8, 0.85, "good", "94%"),
        (0.65, 0.85, "warn", "76%"),
        (0.32, 0.8, "bad", "40%"),
        (0.4, 0.4, "none", "too weak"),
    ],
)
def test_the_sentence_on_segmenters(alone, real, tone, words):
    rows = {
        f"dice_{kind}_mean": Metric(f"dice_{kind}_mean", "", "", value=value, floor=real)
        for kind, value in (("generated", alone), ("both", 0.9))
    }
    found, text = utility(rows)
    assert found == tone and words in text
    assert utility({}) is None


def test_a_segmenter_learns_what_is_bright(tmp_path):
    rng, pairs = np.random.default_rng(0), Pairs([], [])
    for _ in range(3):
        image = rng.random((1, 14, 16, 15)).astype(np.float32) * 0.4
        label = np.zeros(image.shape[1:], np.uint8)
        x, y, z = rng.integers(2, 6, 3)
        label[x : x + 7, y : y + 7, z : z + 7] = 1
        pairs.images.append(torch.from_numpy(image + np.float32(0.5) * label))
        pairs.labels.append(label)
    segment = train_segmenter(pairs, [7], 40, "segmenter", CPU)
    volume, label = pairs.images[0][None], pairs.labels[0]
    found = segment(volume)
    assert found.shape == (14, 16, 15) and {*np.unique(found)} <= {0, 7}
    assert dice(found, 7 * label, [7])[0] > 0.7

    save_segmenter(tmp_path / "segmenter.safetensors", segment, (2.0, 2.0, 2.0))
    again = load_segmenter(tmp_path / "segmenter.safetensors", 1, (2.0, 2.0, 2.0), CPU)
    np.testing.assert_array_equal(again(volume.clone()), found)
    core = Structure.parse("core=label:7").found_by(again, ())
    assert core.millilitres(volume, (2, 2, 2)) == pytest.approx((found == 7).sum() * 0.008)
    with pytest.raises(UserError, match="was trained at"):
        load_segmenter(tmp_path / "segmenter.safetensors", 1, (1.0, 2.0, 2.0), CPU)
    with pytest.raises(UserError, match="was trained on 1 channel"):
        load_segmenter(tmp_path / "segmenter.safetensors", 2, (2.0, 2.0, 2.0), CPU)
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no segmenter"):
        load_segmenter(tmp_path / "other.pt", 1, (2.0, 2.0, 2.0), CPU)


def test_a_structure_by_the_volumes_own_label():
    volume = torch.zeros(1, 3, 4, 4, 4)
    volume[0, 2, 0, 0, :3] = 0.9
    core = LabelStructure("core", (5,)).found_by(None, (2, 5))
    assert core.millilitres(volume, (10, 10, 10)) == pytest.approx(3)
    for labels, what in (((2, 5), "label_values has 2, 5"), ((), "the segmenter is needed")):
        with pytest.raises(UserError, match=what):
            LabelStructure("core", (9,)).found_by(None, labels)


# ---------------------------------------------------------------- all scripts


def add_labels(data):
    """Label 2 where a scan is bright, 5 where it is brightest."""
    (data / "labelsTr").mkdir()
    content = json.loads((data / "dataset.json").read_text())
    for entry in content["training"]:
        image = nib.load(data / entry["image"])
        voxels = image.get_fdata() / image.get_fdata().max()
        label = np.select([voxels > 0.7, voxels > 0.3], [5, 2], 0).astype(np.uint8)
        entry["label"] = entry["image"].replace("imagesTr", "labelsTr")
        nib.save(nib.Nifti1Image(label, image.affine), data / entry["label"])
    content["labels"] = {"0": "background", "2": "left shell", "5": "core"}
    (data / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Project:
    """Both stages trained on pairs, and two pairs drawn."""
    folder = tmp_path_factory.mktemp("pairs")
    project = Project(folder / "run", make_data(folder / "data"))
    add_labels(project.data)
    project.config["autoencoder_def"] |= dict.fromkeys(("in_channels", "out_channels"), "@volume_channels")
    project.config["autoencoder_train"] |= {"max_epochs": 8, "augment": {"flip_axes": [0]}}
    project.config["autoencoder_train"] |= {"adversarial_warmup_epochs": 6}
    project.change(with_labels=True, label_values=VALUES)
    project.printed["autoencoder"] = project.run(train_autoencoder, "--no-amp")
    project.run(train_diffusion, "--no-amp")
    project.printed["inference"] = project.run(inference, "--num", "2", "--steps", "2", "--tries", "0")
    return project


def test_training_says_dice_and_warns_of_sides(pairs):
    said = pairs.printed["autoencoder"]
    assert "Dice of labels 0." in said and "labels such as left shell: a left one is drawn" in said
    scores = pairs.checkpoint("autoencoder.pt")["validation"]
    assert 0 <= scores["dice"] <= 1 and scores["label_loss"] > 0
    assert pairs.checkpoint("autoencoder.pt")["model"]["encoder.blocks.0.conv.weight"].shape[1] == 3


def test_a_pair_is_on_one_grid_with_one_record(pairs):
    assert "2 volumes and their labels" in pairs.printed["inference"]
    image, label = (nib.load(pairs.output_dir / f"sample_000001{end}.nii.gz") for end in ("", "_label"))
    assert image.shape == label.shape == SHAPE and np.array_equal(image.affine, label.affine)
    assert label.get_data_dtype() == np.uint8 and image.get_data_dtype() == np.float32
    assert {*np.unique(label.dataobj)} <= {0, *VALUES}
    record = json.loads((pairs.output_dir / "sample_000001.json").read_text())
    assert len(record["volume"]["label"]["sha256"]) == 64 and len(record["volume"]["limits"]) == 1


def test_the_label_is_that_of_the_decoders_channels(pairs, monkeypatch):
    seen = []
    draw = generation.draw
    monkeypatch.setattr(generation, "draw", lambda *args, **kw: seen.append(draw(*args, **kw)) or seen[0])
    pairs.run(inference, "--seed", "40", "--steps", "2", "--tries", "0")
    (volume,) = seen[0].numpy()
    expected = np.where(volume[1:].max(0) > 0.5, np.array(VALUES)[volume[1:].argmax(0)], 0)
    label = nib.load(pairs.output_dir / "sample_000040_label.nii.gz").get_fdata()
    np.testing.assert_array_equal(label, expected)


def test_a_label_that_is_missing_or_changed_is_noticed(pairs):
    label = pairs.output_dir / "sample_000000_label.nii.gz"
    before = label.read_bytes()
    assert "2 of 2 volumes already exist" in pairs.run(
        inference, "--num", "2", "--steps", "2", "--tries", "0"
    )
    label.write_bytes(before[:-1])
    message = pairs.refused(inference, "--num", "2", "--steps", "2", "--tries", "0")
    assert "it or its label was changed since" in message
    label.write_bytes(before)


def test_both_files_are_reproduced(pairs, tmp_path):
    for end in (".json", ".nii.gz", "_label.nii.gz"):
        name = f"sample_000001{end}"
        (tmp_path / name).write_bytes((pairs.output_dir / name).read_bytes())
    inference.main(["--reproduce", str(tmp_path / "sample_000001.json")])
    for end in ("", "_label"):
        made, before = (tmp_path / f"sample_000001{part}{end}.nii.gz" for part in ("_reproduced", ""))
        assert made.read_bytes() == before.read_bytes()


def test_samples_are_read_as_pairs_elsewhere(pairs, tmp_path):
    for path in pairs.output_dir.glob("sample_00000*.nii.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cases, _ = find_cases(tmp_path)
    assert [case.name for case in cases] == ["sample_000000", "sample_000001"]
    assert [case.label.name for case in cases] == [f"sample_00000{i}_label.nii.gz" for i in range(2)]


def test_evaluation_compares_pairs_and_trains_segmenters(pairs):
    argv = ["--segmentation", "2", "--structure", "core=label:5"]
    said = pairs.run(evaluate, *argv)
    out = pairs.output_dir / "evaluation"
    rows = {row["key"]: row for row in json.loads((out / "metrics.json").read_text())["figures"]}
    assert "is too weak to compare with" in said  # two steps
    assert {"dice_generated_mean", "dice_both_mean", "dice_generated_5"} <= rows.keys()
    assert "core" in rows["dice_generated_5"]["name"] and rows["reconstruction_psnr"]["value"] > 5
    assert "Segmentation" in (out / "report.html").read_text()
    again = ["--out", str(pairs.folder / "again"), "--segmenter", str(out / "segmenter.safetensors")]
    pairs.run(evaluate, *again, "--structure", "core=label:5")
    rows = {row["key"] for row in json.loads((pairs.folder / "again/metrics.json").read_text())["figures"]}
    assert {"agreement_mean", "agreement_2", "agreement_5"} <= rows


def test_latents_of_pairs_are_cached_and_follow_the_label(pairs):
    other = Project(pairs.folder / "cached", pairs.data, config=json.loads(pairs.config_file.read_text()))
    other.set_environment(model_dir=str(pairs.model_dir), cache_dir=str(other.folder / "cache"))
    other.config["diffusion_train"] |= {"latent_cache": True}
    other.change()
    other.run(cache_latents)
    label = next((pairs.data / "labelsTr").glob("*.nii.gz"))
    before = label.read_bytes()
    image = nib.load(label)
    changed = np.where(image.get_fdata() == 5, 2, image.get_fdata()).astype(np.uint8)
    nib.save(nib.Nifti1Image(changed, image.affine), label)
    other.set_environment(cache_dir=str(other.folder / "cache"))
    message = other.refused(train_diffusion)
    label.write_bytes(before)
    assert "the latents there are of other data" in message
    other.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=1")


def test_an_export_draws_pairs(pairs, tmp_path, monkeypatch):
    folder = tmp_path / "export"
    export_model.main([*pairs.argv()[:4], "--out", str(folder), "--formats", "torchscript", "bundle"])
    card = (folder / "MODEL_CARD.md").read_text()
    code = next(part for part in card.split("```python")[1:] if "unet" in part and "jit" in part)
    monkeypatch.chdir(folder)
    exec(code.partition("```")[0], {})
    image, label = nib.load("sample.nii.gz"), nib.load("sample_label.nii.gz")
    assert image.shape == label.shape == SHAPE and {*np.unique(label.dataobj)} <= {0, *VALUES}
    source = (folder / "bundle/scripts/sampling.py").read_text()
    assert "def label_of" in source and "_label.nii.gz" in source
    assert json.loads((folder / "bundle/configs/inference.json").read_text())["labels"] == VALUES


# ---------------------------------------------------------------- bad input


def test_what_labels_need(pairs, tmp_path):
    for override, what in (
        (["with_labels=true", "label_values=null"], "name the labels by label_values"),
        (["volume_channels=2"], "volume_channels: expected 3, found 2"),
        (["autoencoder_def.out_channels=1"], "it reconstructs"),
        (["label_values=[0,2]"], "label_values"),
    ):
        message = pairs.refused(train_autoencoder, *[part for one in override for part in ("--set", one)])
        assert what in message, message
    message = pairs.refused(inference, "--seed", "50", "--set", "label_values=[2,3]")
    assert "was trained with label_values [2, 5]" in message
    without = Project(tmp_path / "run", make_data(tmp_path / "data"), config=pairs.config)
    assert "6 of 6 cases have no label" in without.refused(train_autoencoder, "--no-amp")
    assert "edits images without labels" in pairs.refused(
        edit_scan,
        "--scan",
        str(next((pairs.data / "imagesTr").glob("*"))),
        "--of",
        "a=1",
        "--condition",
        "a=2",
    )


def test_what_evaluation_needs(pairs, tmp_path):
    other = ["--out", str(tmp_path), "--segmenter", str(pairs.model_dir / "autoencoder.pt")]
    assert "holds no segmenter" in pairs.refused(evaluate, *other)
    assert "label_values has 2, 5" in pairs.refused(
        evaluate, "--out", str(tmp_path), "--structure", "a=label:9"
    )
    assert "expected at least 1" in pairs.refused(evaluate, "--segmentation", "0")
