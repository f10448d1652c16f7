"""evaluate.py: metrics and conclusions for groups of volumes that are known, and bad input."""

import contextlib
import io
import json
import math
import shutil
import weakref
from pathlib import Path
from unittest import mock

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import SHAPE, SPACING, Project, copy_of, rows_of
from monai.networks.nets import DenseNet121

import evaluate
import inference
from ldm import UserError, configs
from ldm.data.cases import Case
from ldm.data.datasets import stream
from ldm.data.intensity import Intensity
from ldm.data.layouts import find_cases
from ldm.data.preprocessing import Preprocessing
from ldm.evaluation import distances, features
from ldm.evaluation.features import AutoencoderFeatures, FeatureSpace
from ldm.evaluation.groups import VolumeGroup, subset
from ldm.evaluation.reading import Reader, Source, check_named_samples, samples_of_model, volumes_of
from ldm.export import records
from ldm.metrics import RadialSpectrum
from ldm.models import perceptual
from ldm.models.autoencoder import Autoencoder
from ldm.system import files
from ldm.system.ranks import Run


def blob(rng: np.random.Generator, shape: tuple = SHAPE) -> np.ndarray:
    """A textured ellipsoid of a random size, dark outside."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum((axis / rng.uniform(0.7, 0.95)) ** 2 for axis in axes) < 1
    return (inside * rng.uniform(0.3, 1, shape)).astype(np.float32)


def folder_of(folder: Path, volumes, spacing=SPACING, names: str = "scan_{:02d}") -> Path:
    """A folder of these volumes; 4D ones have the channels last."""
    folder.mkdir(parents=True)
    for i, volume in enumerate(volumes):
        nib.save(nib.Nifti1Image(volume, np.diag([*spacing, 1])), folder / f"{names.format(i)}.nii.gz")
    return folder


def first_of(source: Path, target: Path, count: int) -> Path:
    """A folder with the first volumes of another."""
    target.mkdir()
    for path in sorted(source.iterdir())[:count]:
        shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> dict[str, Path]:
    """Folders of volumes of one kind: 12 to train on, 10 held out, 8 more, and copies of the first 8 trained
    on that were mirrored, moved and made brighter."""
    root, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    training = [blob(rng) for _ in range(12)]
    copies = [3 * np.roll(volume[::-1], 1, 1) + 0 for volume in training[:8]]
    return {
        "training": folder_of(root / "training", training),
        "held": folder_of(root / "held", [blob(rng) for _ in range(10)]),
        "more": folder_of(root / "more", [blob(rng) for _ in range(8)]),
        "copies": folder_of(root / "copies", copies, names="sample_{:06d}"),
    }


def named(
    real: Path, generated: Path, train: Path | None = None, project: Project | None = None
) -> list[str]:
    """The arguments that name the groups and, of a project, the autoencoder."""
    given = {"real": real, "generated": generated, "train": train}
    given["autoencoder"] = project and project.model_dir / "autoencoder.pt"
    return [word for key, path in given.items() if path for word in (f"--{key}", str(path))]


def evaluated(out: Path, *argv) -> dict:
    """What the script writes to metrics.json, and the metrics by key. The page, which takes most of the time,
    is left out."""
    with mock.patch.object(evaluate, "write_report"):
        evaluate.main([*map(str, argv), "--out", str(out), "--device", "cpu"])
    content = json.loads((out / "metrics.json").read_text())
    return {**content, "by_key": {metric["key"]: metric for metric in content["figures"]}}


def refused(*argv) -> str:
    """The message of a run that ends on the user's error."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        evaluate.main([*map(str, argv), "--device", "cpu"])
    text = err.getvalue()
    assert stop.value.code == 2 and "Traceback" not in text and text.count("error: ") == 1, text
    message = text[text.index("error: ") :].strip()
    assert message.count("\n") < 3, text
    return message


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def of_the_run(done, tmp_path_factory) -> dict:
    """The chain's run: 2 held-out and 4 training scans, 3 samples, the last with other settings."""
    names = "autoencoder.pt", "diffusion_unet.pt", "split.json"
    project = copy_of(done, tmp_path_factory.mktemp("run") / "p", *names)
    shutil.copy(done.model_dir / "train_log.jsonl", project.model_dir)
    project.run(inference, "--num", "2", "--steps", "2", "--no-amp")
    project.run(inference, "--seed", "2", "--steps", "3", "--no-amp")
    project.run(evaluate)
    content = json.loads((project.output_dir / "evaluation" / "metrics.json").read_text())
    return {**content, "by_key": {f["key"]: f for f in content["figures"]}, "project": project}


def test_a_run_is_evaluated_on_its_split(of_the_run, done):
    split = done.split()
    counts = {"held-out": len(split["validation"]), "generated": 3, "training": len(split["training"])}
    assert {name: one["volumes"] for name, one in of_the_run["sets"].items()} == counts
    assert of_the_run["settings"]["grid"].startswith("16 x 20 x 12 voxels of 2 x 1.5 x 3 mm")
    record = json.loads((of_the_run["project"].output_dir / "sample_000000.json").read_text())
    assert of_the_run["unet_sha256"] == record["unet"]["sha256"]
    common = {key: record[key] for key in ("sampler", "scale_factor", "precision")}
    common |= {"condition": "", "guidance": 1.0}
    steps = {"steps": 2, "volumes": 2}, {"steps": 3, "volumes": 1}
    assert of_the_run["sampling"] == [{**common, **one} for one in steps]
    (note,) = [note for note in of_the_run["notes"] if "different settings" in note]
    assert "2 by heun, 2 steps, float32, scale factor" in note and "1 by heun, 3 steps" in note
    assert of_the_run["settings"]["precision"] == "all networks compute in float32"
    page = (of_the_run["project"].output_dir / "evaluation" / "report.html").read_text()
    assert "sample_000002" in page and len(page) > 10_000 and of_the_run["verdicts"][0]["text"][:20] in page


def test_reconstructions_are_those_of_the_training_log(of_the_run, done):
    """The best epoch's validation, on the same held-out volumes."""
    validated = [entry for entry in done.log("autoencoder") if "val_loss" in entry]
    best = min(validated, key=lambda entry: entry["val_loss"])
    for key in ("psnr", "ssim", "l1"):
        metric = of_the_run["by_key"][f"reconstruction_{key}"]
        assert metric["value"] == pytest.approx(best[f"val_{key}"], rel=1e-3)
        assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
        assert key == "psnr" or (metric["interval"][0] >= -(key == "ssim") and metric["interval"][1] <= 1)


def test_a_sample_comes_back_in_the_units_of_the_autoencoder(of_the_run):
    """By the limits in its record, not by its own percentiles; clipped as scans are."""
    project = of_the_run["project"]
    path = project.output_dir / "sample_000001.nii.gz"
    (case,) = [one for one in find_cases(path.parent, "sample_*.nii.gz")[0] if one.name.endswith("1")]
    read = Reader(Preprocessing((0,), SPACING), SHAPE, torch.device("cpu"))
    low, high = records.limits_of(path)[0]
    stored = np.asarray(nib.load(path).dataobj)
    assert read(case)[0, 0].numpy() == pytest.approx(np.clip((stored - low) / (high - low), 0, 1), abs=1e-5)
    assert [[low, high]] == project.checkpoint("diffusion_unet.pt")["geometry"]["limits"]


def test_nan_in_a_sample_is_no_background(of_the_run, tmp_path):
    """Whatever the config says of scans: a network's NaN is a fault."""
    source = of_the_run["project"].output_dir / "sample_000001.nii.gz"
    image = nib.load(source)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / source.name)
    record = files.record_path(source)
    (tmp_path / record.name).write_bytes(record.read_bytes())
    way = Preprocessing((0,), SPACING, Intensity(nan_is_background=True))
    with pytest.raises(UserError, match=r"sample_000001\.nii\.gz: has \d+ NaN voxels"):
        Reader(way, SHAPE, torch.device("cpu"))(Case("a", (tmp_path / source.name,)))


def test_every_metric_has_a_value_or_a_reason(of_the_run):
    for metric in of_the_run["figures"]:
        assert (metric["value"] is None) == bool(metric["missing"]), metric
        assert metric["counts"] or metric["missing"]
    assert "needs 4 volumes on each side" in of_the_run["by_key"]["precision"]["missing"]  # 2 are held out
    assert any("2 held-out" in line["text"] and line["tone"] == "warn" for line in of_the_run["verdicts"])


def test_groups_that_are_named_replace_those_of_the_run(of_the_run, scans, tmp_path):
    """Though the config leaves the spacing open, which only the autoencoder then knows."""
    project = of_the_run["project"]
    sets = ("--real", scans["held"], "--train", scans["training"])
    open_spacing = ("--set", "spacing=null", "--set", "longest_side=20")
    project.run(evaluate, *sets, *open_spacing, "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    counts = {"held-out": 10, "generated": 3, "training": 12}
    assert {name: one["volumes"] for name, one in content["sets"].items()} == counts
    assert content["settings"]["grid"].endswith("of 2 x 1.5 x 3 mm")
    # A second evaluation does not replace the first.
    assert "metrics.json exists." in project.refused(evaluate)


def rewritten(path: Path, **changes) -> None:
    """Other values in the record of a volume."""
    record = files.record_path(path)
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))


def test_only_samples_of_this_runs_model_are_taken(of_the_run, scans, tmp_path):
    """Nothing that lies in a data set, an `old-N` or another run below the output folder, nothing else beside
    them; all of it named."""
    project = of_the_run["project"]
    out, record = tmp_path / "out", json.loads((project.output_dir / "sample_000000.json").read_text())
    shutil.copytree(project.output_dir, out, ignore=shutil.ignore_patterns("evaluation"))
    shutil.copytree(project.output_dir, out / "old-1", ignore=shutil.ignore_patterns("evaluation"))
    chain.make_data(out / "data", cases=4)
    for path in (out / "data" / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("scan", "sample")))
    sample = (out / "sample_000000.nii.gz").read_bytes()
    for seed in range(3, 9):
        (out / f"sample_{seed:06d}.nii.gz").write_bytes(sample)
        (out / f"sample_{seed:06d}.json").write_text(json.dumps(record))
    (out / "sample_000000_reproduced.nii.gz").write_bytes(sample)
    (out / "sample_000003.json").unlink()
    (out / "sample_000004.json").write_text("{}")  # as beside a BIDS scan
    (out / "sample_000005.json").write_text(json.dumps({**record, "steps": 0}))
    rewritten(out / "sample_000006.nii.gz", unet={**record["unet"], "sha256": "0" * 64})
    rewritten(out / "sample_000007.nii.gz", autoencoder={"path": "other.pt", "sha256": "0" * 64})
    shutil.copy(scans["more"] / "scan_00.nii.gz", out / "sample_000008.nii.gz")
    checkpoints = (project.model_dir / name for name in ("autoencoder.pt", "diffusion_unet.pt"))
    source, records, notes = samples_of_model(out, *checkpoints)
    assert [case.name for case in source.cases] == [f"sample_{seed:06d}" for seed in range(3)]
    assert [one["seed"] for one in records] == [0, 1, 2]
    assert set(notes[0].removeprefix("generated: left out: ").removesuffix(".").split("; ")) == {
        "4 in data/",
        "3 in old-1/",
        "1 made by --reproduce (sample_000000_reproduced.nii.gz)",
        "2 without a record of inference.py (sample_000003.nii.gz, sample_000004.nii.gz)",
        "1 with a damaged record (sample_000005.nii.gz)",
        "1 from before diffusion_unet.pt changed (sample_000006.nii.gz)",
        "1 of another autoencoder (sample_000007.nii.gz)",
        "1 changed since inference.py wrote them (sample_000008.nii.gz)",
    }


def test_a_run_whose_samples_are_of_a_model_before_is_told_so(of_the_run, tmp_path):
    project = of_the_run["project"]
    unet = project.model_dir / "diffusion_unet.pt"
    before = unet.read_bytes()
    try:
        torch.save({**project.checkpoint(unet.name), "epoch": 99}, unet)  # trained further
        message = project.refused(evaluate, "--out", tmp_path / "out")
        unet.unlink()
        assert f"{unet}: no such checkpoint" in project.refused(evaluate, "--out", tmp_path / "out")
    finally:
        unet.write_bytes(before)
    assert f"found no samples of {unet} (left out: 3 from before diffusion_unet.pt changed (" in message
    assert message.endswith("Run inference.py, or name the samples by --generated.")


def test_samples_that_are_named_are_of_one_model(of_the_run, scans, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(of_the_run["project"].output_dir, made, ignore=shutil.ignore_patterns("evaluation"))
    shutil.copy(scans["more"] / "scan_00.nii.gz", made)
    shutil.copy(made / "sample_000001.nii.gz", made / "sample_000001_reproduced.nii.gz")
    shutil.copy(made / "sample_000001.nii.gz", made / "sample_000002.nii.gz")
    for end in ("nii.gz", "json"):
        shutil.copy(made / f"sample_000000.{end}", made / f"zzz.{end}")
    source = Source("generated", "made", find_cases(made)[0])
    other = made / "sample_000000.json"  # of other bytes than the UNet's
    records, notes = check_named_samples(source, other)
    assert len(records) == 3 and len(source.cases) == 4
    unet = records[0]["unet"]
    origin = f"{unet['path']} (SHA-256 {unet['sha256'][:12]})"
    assert notes == [
        "generated: 1 of 5 volumes have no record of inference.py (scan_00).",
        "generated: 1 of 5 volumes were changed after inference.py wrote them (sample_000002).",
        "generated: 1 of 5 volumes are duplicates and count once (zzz).",
        f"generated: generated by {origin}, not by {other} as it is now.",
    ]
    rewritten(made / "zzz.nii.gz", unet={"path": "other.pt", "sha256": "0" * 64}, seed=1, batch=[1])
    message = refused(*named(scans["held"], made), "--out", tmp_path / "x")
    assert "made: holds samples of 2 models: " in message
    assert "1 of other.pt (SHA-256 000000000000)" in message
    assert unet["sha256"][:12] in message and "name one by --generated" in message


# ---------------------------------------------------------------- groups that are known


@pytest.fixture(scope="module")
def of_more(scans, done, tmp_path_factory) -> dict:
    """Real scans in place of samples, with the chain's autoencoder."""
    argv = named(scans["held"], scans["more"], scans["training"], done)
    return evaluated(tmp_path_factory.mktemp("more") / "out", *argv)


def test_real_scans_in_place_of_samples_pass(of_more):
    by_key = of_more["by_key"]
    for key in ("mmd_own", "frechet_own", "spectrum", "histogram"):
        metric = by_key[key]
        assert metric["difference"][0] <= 0 and metric["counts"].startswith("8 on each side"), key
        assert metric["value"] < 3 * abs(metric["floor"]) + 0.1, key
    assert by_key["copies"]["value"] == by_key["copies"]["floor"] == 0
    assert 20 < by_key["closer"]["value"] < 80
    assert by_key["fine_power"]["value"] == pytest.approx(1, abs=0.1)
    tones = {line["tone"] for line in of_more["verdicts"] if "autoencoder" not in line["text"]}
    assert "bad" not in tones
    assert "No sample copies" in of_more["verdicts"][0]["text"]
    assert by_key["mmd_own"]["p_value"] > 0.05 and by_key["mmd_own"]["sees"] > 0.5
    assert "do not differ significantly from held-out scans" in of_more["verdicts"][1]["text"]
    for line in (0, 1, 4, 5):  # all but gross anatomy and sharpness, in which these volumes hardly vary
        assert of_more["verdicts"][line]["tone"] == "none", of_more["verdicts"][line]["text"]


def test_own_feature_metrics_are_those_of_the_rows(of_more, scans, done):
    """Kernel distance and precision, from the volumes by hand."""
    config = configs.completed(done.checkpoint("autoencoder.pt")["config"])
    network = configs.define_network(config, "autoencoder_def")
    network.load_state_dict(done.checkpoint("autoencoder.pt")["model"])
    rows = {}
    for name, called in (("training", "training"), ("held", "held-out"), ("more", "generated")):
        paths = sorted(scans[name].glob("*.nii.gz"))
        read = torch.randperm(len(paths), generator=stream(0, "evaluation", called)).tolist()
        volumes = np.stack([Preprocessing((0,), SPACING)([paths[i]]) for i in read])
        rows[name] = rows_of(AutoencoderFeatures(Autoencoder(network.eval())), torch.tensor(volumes))
    space = FeatureSpace(rows["training"])
    # Of each as many as there are samples.
    sides = zip(("more", "held", "training"), (8, 10, 12), range(3), strict=True)
    chosen = {name: space([layer[subset(n, 8, side)] for layer in rows[name]]) for name, n, side in sides}
    metric = of_more["by_key"]["mmd_own"]
    for key, name in (("value", "more"), ("floor", "training")):
        expected = distances.KernelDistance(chosen[name], chosen["held"]).value
        assert metric[key] == pytest.approx(expected, rel=1e-4), key
    # The test uses all.
    both = [torch.cat(groups) for groups in zip(rows["more"], rows["held"], strict=True)]
    both = FeatureSpace(both)(both)
    assert metric["p_value"] == distances.KernelDistance(both[:8], both[8:]).p_value()
    rows = chosen
    precise, recalled = (x.mean() for x in distances.precision_recall(rows["held"], rows["more"]))
    shares = [of_more["by_key"][key]["value"] for key in ("precision", "recall")]
    assert shares == pytest.approx([precise, recalled])


def test_distances_of_blurred_scans_grow_with_the_blur(of_more):
    by_key, floor = of_more["by_key"], of_more["by_key"]["mmd_own"]["floor"]
    found = [metric["value"] for key, metric in by_key.items() if key.startswith("mmd_own: scans blurred")]
    assert len(found) == 4 and found == sorted(found) and found[1] > floor
    assert by_key["mmd_own: reconstructions"]["value"] > floor


def test_copies_are_flagged_and_held_out_scans_are_not(scans, tmp_path):
    """Mirrored, moved by a voxel and three times as bright: all eight, each beside its original."""
    found = evaluated(tmp_path / "out", *named(scans["held"], scans["copies"], scans["training"]))
    assert found["by_key"]["copies"]["value"] == 100 and found["by_key"]["copies"]["floor"] == 0
    first = found["verdicts"][0]
    assert first["tone"] == "bad" and "8 of 8 samples copy training scans" in first["text"]
    pairs = {row["generated"]: row for row in found["nearest"]}
    for i in range(8):
        row = pairs[f"sample_{i:06d}"]
        assert row["training"] == f"scan_{i:02d}" and row["mirrored"] and row["copy"]
        assert row["distance"] < 0.1
    assert "no autoencoder" in found["by_key"]["mmd_own"]["missing"]
    assert "was not measured: no autoencoder" in found["verdicts"][1]["text"]


def test_scans_that_were_trained_on_and_are_held_out_are_leaks(scans, tmp_path):
    """Among the samples they are none, and the page says so first."""
    held, made = (shutil.copytree(scans[name], tmp_path / name) for name in ("held", "more"))
    for i in range(3):
        shutil.copy(scans["training"] / f"scan_{i:02d}.nii.gz", held / f"again_{i}.nii.gz")
    for i in (5, 6):
        shutil.copy(scans["training"] / f"scan_{i:02d}.nii.gz", made / f"again_{i}.nii.gz")
    found = evaluated(tmp_path / "out", *named(held, made, scans["training"]))
    assert found["sets"]["generated"]["volumes"] == 8
    text = "2 of 10 generated volumes are files of the training set and left out: again_5, again_6."
    assert found["verdicts"].pop(0) == {"tone": "bad", "text": text}
    message = refused(*named(scans["held"], scans["held"]), "--out", tmp_path / "x")
    assert "held: all generated volumes are files of the held-out set." in message
    assert found["by_key"]["copies"]["value"] == 0
    assert found["by_key"]["copies"]["floor"] == pytest.approx(100 * 3 / 13)
    assert "3 of 13 held-out scans copy training scans" in found["verdicts"][0]["text"]


class FirstVoxels:
    """In place of RadImageNet's ResNet-50, which tests/test_distances.py tests."""

    def __init__(self, *args):
        pass

    def __call__(self, volume: torch.Tensor) -> list[torch.Tensor]:
        return [volume[0, 0].movedim(axis, 0).flatten(1)[:, 60:68].double() for axis in range(3)]


def test_published_networks_and_a_classifier(scans, tmp_path, monkeypatch):
    """Weights of the right form from local files, and their hashes."""
    monkeypatch.setattr(features, "RadImageNetFeatures", FirstVoxels)
    held, made = first_of(scans["held"], tmp_path / "held", 4), first_of(scans["more"], tmp_path / "made", 2)
    torch.manual_seed(0)
    medicalnet, radimagenet = tmp_path / "resnet_10.pth", tmp_path / "rin.pth"
    torch.save({"state_dict": perceptual.medicalnet(10, None, "").state_dict()}, medicalnet)
    torch.save({"conv1.weight": torch.zeros(1)}, radimagenet)
    definition = {
        "_target_": "monai.networks.nets.DenseNet121",
        "spatial_dims": 3, "in_channels": 1, "out_channels": 3,
        "init_features": 4, "growth_rate": 2, "block_config": [1, 1],
    }  # fmt: skip
    (tmp_path / "classes.json").write_text(json.dumps(definition))
    classifier = DenseNet121(**{key: value for key, value in definition.items() if key != "_target_"})
    torch.save(classifier.state_dict(), tmp_path / "classes.pt")
    digest = perceptual.sha256_of(medicalnet)
    argv = [
        *named(held, made),
        *("--medicalnet", medicalnet, digest[:12], "--radimagenet", radimagenet),
        *("--classifier", tmp_path / "classes.json", tmp_path / "classes.pt"),
    ]
    found = evaluated(tmp_path / "out", *argv)
    for key in ("fid_3d", "fid_2.5d", "mmd_medicalnet", "inception_score"):
        metric = found["by_key"][key]
        assert metric["value"] is not None and metric["floor"] is not None, key
        assert metric["counts"].startswith("2 on each side"), key  # as in the halves of 4 scans
    assert 1 <= found["by_key"]["inception_score"]["value"] <= 3
    assert digest in found["settings"]["MedicalNet"]
    assert "no training scans" in found["by_key"]["copies"]["missing"]
    assert found["verdicts"][0]["tone"] == "none" and "not searched for" in found["verdicts"][0]["text"]
    assert "MedicalNet's features" in found["verdicts"][1]["text"]  # without an autoencoder
    assert "SHA-256 is" in refused(*argv[:4], "--medicalnet", medicalnet, "0" * 64, "--out", tmp_path / "b")
    wrong = refused(*argv[:4], "--medicalnet", radimagenet, "--out", tmp_path / "b")
    assert "MedicalNet's ResNet-10" in wrong or "do not fit" in wrong
    (tmp_path / "classes.json").write_text(json.dumps({"_target_": "os.system", "command": "true"}))
    refused(*argv[:4], *argv[-3:], "--out", tmp_path / "b")


# ---------------------------------------------------------------- bad input


def test_volumes_of_other_spacing_and_shape_are_brought_to_the_grid_of_the_samples(scans, tmp_path):
    rng = np.random.default_rng(5)
    fine = [np.repeat(np.repeat(blob(rng), 2, 0), 2, 1)[2:-2] for _ in range(3)]
    held = folder_of(tmp_path / "held", fine, (1.0, 0.75, 3.0))
    found = evaluated(tmp_path / "out", *named(held, scans["more"]))
    text = " ".join(found["notes"])
    assert "held-out: 3 of 3 volumes have another spacing (1 x 0.75 x 3 mm) and were resampled." in text
    assert "held-out: 3 of 3 volumes have another size and were cropped or padded." in text
    assert found["by_key"]["tissue_foreground"]["value"] is not None


def test_volumes_that_cannot_be_used_are_left_out_and_listed(scans, tmp_path):
    made = shutil.copytree(scans["more"], tmp_path / "made")
    rng, affine = np.random.default_rng(1), np.diag([*SPACING, 1])
    nib.save(nib.Nifti1Image(np.full(SHAPE, 7, np.float32), affine), made / "constant.nii.gz")
    holes = np.where(blob(rng) > 0.5, np.nan, 1).astype(np.float32)
    nib.save(nib.Nifti1Image(holes, affine), made / "nan.nii.gz")
    whole = (made / "scan_00.nii.gz").read_bytes()
    (made / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    found = evaluated(tmp_path / "out", *named(scans["held"], made))
    assert found["sets"]["generated"]["volumes"] == 8
    left_out = [note for note in found["notes"] if "left out" in note]
    assert len(left_out) == 3
    for name, why in (("constant", "constant"), ("nan", "NaN"), ("cut", "cannot be read")):
        assert any(f"{name}.nii.gz" in note and why in note for note in left_out), name
    for path in made.glob("scan_*"):
        path.unlink()
    message = refused(*named(scans["held"], made), "--out", tmp_path / "none")
    assert "no generated volume can be used" in message and not (tmp_path / "none").exists()


def test_one_volume(scans, done, tmp_path):
    one = first_of(scans["more"], tmp_path / "one", 1)
    found = evaluated(tmp_path / "out", *named(scans["held"], one, scans["training"], done))
    by_key = found["by_key"]
    for key in ("mmd_own", "frechet_own", "precision", "recall", "ms_ssim"):
        assert by_key[key]["value"] is None and "1 generated" in by_key[key]["missing"], key
    for key in ("spectrum", "histogram", "copies", "nearest", "reconstruction_psnr"):
        assert by_key[key]["value"] is not None, key
    assert any("With 10 held-out and 1 generated" in line["text"] for line in found["verdicts"])


def test_channels_are_chosen_and_are_there(scans, tmp_path):
    rng = np.random.default_rng(2)
    both = folder_of(tmp_path / "both", [np.stack([blob(rng), 0.1 * blob(rng)], -1) for _ in range(4)])
    first = evaluated(tmp_path / "first", *named(scans["held"], both))
    made = folder_of(tmp_path / "made", [np.stack([blob(rng), blob(rng)], -1) for _ in range(4)])
    second = evaluated(tmp_path / "second", *named(both, made), "--channel", "1")
    assert first["settings"]["channels"] == "0" and second["settings"]["channels"] == "1"
    message = refused(*named(scans["held"], both), "--channel", 1, "--out", tmp_path / "x")
    assert "no held-out volume can be used" in message and "channel" in message


WRONG_GROUPS = {
    "nowhere": "nowhere: no such data folder",
    "{empty}": "no image",
    "{more} --set seed=1": "--set",
    "{more} --autoencoder no.pt": "--autoencoder no.pt: no such file",
    "{more} --autoencoder {bare}": "weights alone",
    "{more} --medicalnet no.pt": "--medicalnet no.pt: no such file",
    "{more} --medicalnet a b c": "--medicalnet: expected a file",
}


def test_wrong_arguments_are_refused(scans, done, tmp_path):
    (tmp_path / "empty").mkdir()
    torch.save(done.checkpoint("autoencoder.pt")["model"], tmp_path / "bare.pt")
    real, out = ("--real", scans["held"], "--generated"), ("--out", tmp_path / "x")
    for words in ([], [*real, scans["more"]], ["-c", "config.json"]):
        assert "-c and -e" in refused(*words), words
    for words, message in WRONG_GROUPS.items():
        given = words.format(empty=tmp_path / "empty", bare=tmp_path / "bare.pt", **scans).split()
        assert message in refused(*real, *given, *out), words
    assert not (tmp_path / "x").exists()


def test_volumes_are_not_kept(scans):
    """At most three are alive at any time: the current one, and the previous ones for MS-SSIM."""
    read = Reader(Preprocessing((0,), SPACING), SHAPE, torch.device("cpu"))
    source = Source("training", "folder", find_cases(scans["training"])[0])
    one = VolumeGroup("training", {}, RadialSpectrum(SHAPE), SPACING, 12)
    seen, most = [], 0
    for case, volume in volumes_of(source, read, Run(0, 1, torch.device("cpu"))):
        seen.append(weakref.ref(volume))
        one.add(case.name, volume)
        del volume
        most = max(most, sum(ref() is not None for ref in seen))
    assert len(one) == 12 and most <= 3
    assert math.isfinite(np.sum(one.spectra))


# ---------------------------------------------------------------- the benchmark


def test_the_benchmark_prints_a_table_of_known_groups(done, tmp_path, capsys, monkeypatch):
    """With the chain's model: copies are flagged, real scans are not, and the table has every row."""
    from benchmarks import evaluation

    monkeypatch.setattr(evaluation, "SAMPLES", 3)
    monkeypatch.setattr(evaluate, "write_report", lambda *args, **more: None)
    (tmp_path / "out" / "models").mkdir(parents=True)
    for name in ("autoencoder.pt", "diffusion_unet.pt"):
        shutil.copy(done.model_dir / name, tmp_path / "out" / "models")
    argv = ["--data", chain.make_data(tmp_path / "data", cases=10), "--out", tmp_path / "out"]
    argv = [*map(str, argv), "--config", str(done.config_file)]
    evaluation.main(argv)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = ("real scans", "copies", "mirrored copies", "blurred copies", "noise", "samples")
    assert rows[0].split("|")[3:-1] == [f" {name} " for name in names]
    assert len(rows) == 2 + len(evaluation.ROWS)
    (copies,) = [row for row in rows if row.startswith("| copies (%)")]
    values = [float(cell) for cell in copies.split("|")[2:-1]]
    assert values[2:4] == [100, 100] and values[0] == values[1] == values[5] == 0
    first = (tmp_path / "out/evaluations/copies/metrics.json").stat().st_mtime_ns
    evaluation.main(argv)
    assert (tmp_path / "out/evaluations/copies/metrics.json").stat().st_mtime_ns == first  # not repeated
