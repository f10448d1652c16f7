"""Golden traces: ten steps of each stage give the losses that they gave in November 2026, and what was
written then is still read.

`tests/golden` holds the config, the losses of each step, the checkpoints after five of the ten, and a sample
with its record. A change of the code that should not change a number leaves them as they are. One that should
makes them anew: `python tests/test_golden.py`.
"""

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from chain import Project, make_data

import inference
import train_autoencoder
import train_diffusion

GOLDEN = Path(__file__).parent / "golden"
STAGES = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}
HALF, TOLERANCE = 5, 1e-3  # steps; relative: processors round differently, and ten steps carry it on
WRITTEN = (
    "autoencoder.pt",
    "autoencoder_last.pt",
    "diffusion_unet.pt",
    "diffusion_unet_last.pt",
    "split.json",
)


def config_of(epochs: int) -> dict:
    config = json.loads((GOLDEN / "config.json").read_text())
    for stage in STAGES:
        config[f"{stage}_train"]["max_epochs"] = epochs
    return config


def losses(project: Project, stage: str) -> list[dict]:
    """What the log says of each step: one an epoch."""
    entries = [entry for entry in project.log(stage) if "loss" in entry]
    left_out = ("seconds", "stage")
    return [{key: value for key, value in entry.items() if key not in left_out} for entry in entries]


def assert_losses(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for ours, golden in zip(found, expected, strict=True):
        assert ours == pytest.approx(golden, rel=TOLERANCE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("golden") / "data")


@pytest.fixture(scope="module")
def trace():
    return json.loads((GOLDEN / "trace.json").read_text())


def test_ten_steps_of_each_stage_have_the_golden_losses(data, trace, tmp_path):
    project = Project(tmp_path, data, config_of(2 * HALF))
    for stage, script in STAGES.items():
        if stage == "diffusion":  # on the golden autoencoder, not on what rounding has made of this one
            shutil.copy(GOLDEN / "autoencoder.pt", project.model_dir)
        project.run(script, "--no-amp")
        assert_losses(losses(project, stage), trace[stage])


def test_checkpoints_of_then_resume_on_the_golden_trace(data, trace, tmp_path):
    project = Project(tmp_path, data, config_of(2 * HALF))
    project.model_dir.mkdir()
    for name in WRITTEN:
        shutil.copy(GOLDEN / name, project.model_dir)
    printed = project.run(train_diffusion, "--no-amp")
    assert_losses(losses(project, "diffusion"), trace["diffusion"][HALF - 1 :])
    printed += project.run(train_autoencoder, "--no-amp")
    assert_losses(losses(project, "autoencoder"), trace["autoencoder"][HALF - 1 :])
    assert printed.count(f"resumed in epoch {HALF - 1}") == 2


def test_a_record_of_then_is_reproduced(tmp_path):
    for path in GOLDEN.iterdir():
        shutil.copy(path, tmp_path)
    files = "--autoencoder", tmp_path / "autoencoder.pt", "--unet", tmp_path / "diffusion_unet.pt"
    record = "--reproduce", tmp_path / "sample_000000.json"
    inference.main([*map(str, (*record, *files)), "--device", "cpu"])
    assert (tmp_path / "sample_000000_reproduced.nii.gz").is_file()


def make_golden(folder: Path) -> None:
    """Run both stages for five steps and for ten, and keep what the tests compare with."""
    data, made = make_data(folder / "data"), {}
    for epochs in (HALF, 2 * HALF):
        project = Project(folder / str(epochs), data, copy.deepcopy(config_of(epochs)))
        for stage, script in STAGES.items():
            if stage == "diffusion" and epochs > HALF:
                shutil.copy(GOLDEN / "autoencoder.pt", project.model_dir)
            project.run(script, "--no-amp")
        if epochs == HALF:
            project.run(inference, "--num", "1", "--steps", "4")
            for name in WRITTEN:
                shutil.copy(project.model_dir / name, GOLDEN)
            for path in project.output_dir.glob("sample_*.*"):
                shutil.copy(path, GOLDEN)
    made = {stage: losses(project, stage) for stage in STAGES}
    (GOLDEN / "trace.json").write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_golden(Path(folder))
    sys.exit()
