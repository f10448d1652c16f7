"""An exported model gives the volumes of `inference.py`, in each form, and its card tells the truth."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import Project, copy_of
from monai.bundle import ConfigParser, verify_metadata
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export_model
import inference
import train_diffusion
from ldm.diffusion.samplers import SAMPLERS
from ldm.export import bundle, formats
from ldm.system.checkpoints import load_checkpoint

BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
METRICS = {
    "figures": [
        {
            "group": "reconstruction",
            "name": "PSNR",
            "unit": "dB",
            "counts": "2 held-out",
            "value": 18.25,
            "interval": [17.5, 19.0],
            "floor": None,
            "better": "higher",
        },
        {
            "group": "Copies of training scans",
            "name": "nearest | training",
            "value": 0.75,
            "interval": None,
            "floor": 0.5,
            "floor_interval": [0.25, 0.625],
        },
        {"group": "quality", "name": "FID", "value": None, "missing": "no weights"},
    ],
    "verdicts": [{"tone": "good", "text": "No sample is a copy."}],
}
# What MONAI's published schema (meta_schema_20240725) asks of metadata.json, written from its requirements.
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        **dict.fromkeys(("type", "format", "dtype"), {"type": "string"}),
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
ARGUMENTS = {"type": "object", "additionalProperties": TENSOR}
VERSIONS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version")
TEXTS = (*VERSIONS, "task", "description", "authors", "copyright")
SCHEMA = {
    "type": "object",
    "required": [*TEXTS, "required_packages_version", "network_data_format"],
    "properties": {
        **dict.fromkeys((*TEXTS, "data_source", "data_type", "intended_use"), {"type": "string"}),
        **dict.fromkeys(("changelog", "required_packages_version", "eval_metrics"), {"type": "object"}),
        "references": {"type": "array"},
    },
    "patternProperties": {
        "^[_a-zA-Z0-9]+_data_format$": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": dict.fromkeys(("inputs", "outputs", "post_processed_outputs"), ARGUMENTS),
        }
    },
}


@pytest.fixture(scope="session")
def discrete(done, tmp_path_factory) -> Project:
    """The chain's autoencoder under a model of a beta schedule, and a volume by its default sampler."""
    project = copy_of(done, tmp_path_factory.mktemp("discrete"), "autoencoder.pt", "split.json")
    project.change(NoiseScheduler={**BETAS, "prediction_type": "v_prediction"})
    project.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=3")
    project.run(inference, "--steps", "4", "--seed", "3")
    return project


def argv(project: Project, *more) -> list[str]:
    return ["-c", str(project.config_file), "-e", str(project.environment_file), *map(str, more)]


def exported(project: Project, folder: Path, *more) -> Path:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        export_model.main(argv(project, "--out", folder, *more))
    assert str(folder) in out.getvalue()
    return folder


@pytest.fixture(scope="session")
def flow(done, tmp_path_factory) -> Path:
    """All that is exported of the chain. Look, but do not touch."""
    folder = tmp_path_factory.mktemp("flow")
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    more = ("--metrics", folder / "metrics.json", "--authors", "A. Name")
    return exported(done, folder / "chain of ellipsoids", *more)


@pytest.fixture(scope="session")
def steps_of_betas(discrete, tmp_path_factory) -> Path:
    """TorchScript and the bundle of the discrete model. Look, but do not touch."""
    return exported(discrete, tmp_path_factory.mktemp("betas") / "out", "--formats", "torchscript", "bundle")


def assert_same_volume(path: Path, expected: Path) -> None:
    """To rounding: 1e-5 of the range."""
    volume, other = nib.load(path), nib.load(expected)
    a, b = volume.get_fdata(), other.get_fdata()
    assert a.shape == b.shape and np.ptp(b) > 0
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.ptp(b))
    np.testing.assert_allclose(volume.header.get_zooms(), chain.SPACING)
    np.testing.assert_array_equal(volume.affine, other.affine)


# ---------------------------------------------------------------- safetensors


def test_safetensors_hold_the_averaged_weights_and_what_they_need(done, flow):
    for name in ("autoencoder", "diffusion_unet"):
        path, checkpoint = flow / f"safetensors/{name}.safetensors", done.checkpoint(f"{name}.pt")
        assert not chain.differences(load_file(path), checkpoint["model"])
        read = load_checkpoint(path)
        assert all(read[key] == checkpoint[key] for key in ("config", "step", "validation"))
        expected = hashlib.sha256((done.model_dir / f"{name}.pt").read_bytes()).hexdigest()
        assert read["checkpoint_sha256"] == expected
    for key in ("scale_factor", "autoencoder", "latent_shape", "geometry"):
        assert read[key] == checkpoint[key]
    ema, last = done.checkpoint("diffusion_unet.pt"), done.checkpoint("diffusion_unet_last.pt")
    assert chain.differences(ema["model"], last["model"])  # averaged is something else


def test_inference_draws_from_safetensors_the_same_bytes(done, flow, tmp_path):
    project = copy_of(done, tmp_path / "elsewhere")
    files = [("--autoencoder", "autoencoder"), ("--unet", "diffusion_unet")]
    given = [word for key, name in files for word in (key, flow / f"safetensors/{name}.safetensors")]
    project.run(inference, *given, "--steps", "4", "--seed", "2")
    (drawn,) = project.output_dir.glob("*.nii.gz")
    assert drawn.read_bytes() == (done.output_dir / drawn.name).read_bytes()


@pytest.mark.parametrize("where", ["weights", "scale factor", "truncated", "header"])
def test_a_damaged_safetensors_file_is_named_and_not_used(done, flow, tmp_path, where):
    content = bytearray((flow / "safetensors/diffusion_unet.safetensors").read_bytes())
    if where == "truncated":
        content = content[: len(content) // 2]
    elif where == "scale factor":
        start = content.index(b'"scale_factor":"0.') + len(b'"scale_factor":"0.')
        content[start] = ord("1") if content[start] != ord("1") else ord("2")
    else:
        content[3 if where == "header" else -1000] ^= 1
    path = tmp_path / "unet.safetensors"
    path.write_bytes(content)
    if where in ("weights", "scale factor"):
        load_file(path)  # which takes it without complaint
    project = copy_of(done, tmp_path / "project", "autoencoder.pt")
    assert str(path) in project.refused(inference, "--unet", path)
    assert not project.output_dir.exists()


def test_safetensors_of_others_are_bare_weights(done, tmp_path):
    state = {name: one.contiguous() for name, one in done.checkpoint("autoencoder.pt")["model"].items()}
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    assert load_checkpoint(tmp_path / "a.safetensors").keys() == {"model"}


# ---------------------------------------------------------------- TorchScript


def code_of(card: Path, what: str) -> str:
    """The Python block of a card that names `what`."""
    (found,) = (one for one in re.findall(r"```python\n(.*?)```", card.read_text(), re.S) if what in one)
    return found


def test_the_cards_code_draws_with_torchscript(done, flow, tmp_path, monkeypatch):
    """Heun's method of the card, with the steps that the chain's samples have."""
    code = code_of(flow / "MODEL_CARD.md", "torch.jit.load").replace("steps, T = 25", "steps, T = 4")
    shutil.copytree(flow / "torchscript", tmp_path / "torchscript")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert_same_volume(tmp_path / "sample.nii.gz", done.output_dir / "sample_000000.nii.gz")


def test_the_cards_code_draws_from_a_beta_schedule(discrete, steps_of_betas, tmp_path, monkeypatch):
    discrete.set_environment(output_dir=str(tmp_path / "ddim"))
    discrete.run(inference, "--sampler", "ddim", "--steps", "5")
    discrete.set_environment()
    code = code_of(steps_of_betas / "MODEL_CARD.md", "torch.jit.load")
    shutil.copytree(steps_of_betas / "torchscript", tmp_path / "torchscript")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("steps, T = 250", "steps, T = 5"), {})
    expected = tmp_path / "ddim" / "sample_000000.nii.gz"
    assert_same_volume(tmp_path / "sample.nii.gz", expected)


@torch.no_grad()
def test_torchscript_computes_what_the_networks_compute(done, flow):
    """In other batches and sizes than were traced, and with the scale factor inside."""
    encode, decode, unet = (
        torch.jit.load(flow / f"torchscript/{n}.ts") for n in ("encode", "decode", "unet")
    )
    checkpoint = done.checkpoint("diffusion_unet.pt")
    autoencoder = done.network("autoencoder_def", done.checkpoint("autoencoder.pt")["model"])
    images = torch.rand(3, 1, 12, 8, 20)
    for made, expected in zip(encode(images), autoencoder.encode(images), strict=True):
        torch.testing.assert_close(made, expected * checkpoint["scale_factor"], rtol=1e-4, atol=1e-5)
    z, t = torch.randn(3, 3, 6, 4, 10), torch.tensor([1.0, 500.5, 1000])
    torch.testing.assert_close(decode(z), autoencoder.decode(z / checkpoint["scale_factor"]))
    expected = done.network("diffusion_def", checkpoint["model"])(z, timesteps=t)
    torch.testing.assert_close(unet(z, t), expected)
    torch.testing.assert_close(unet(z, t.double()), expected)
    # A device in the graph would bind the file to the machine that traced it.
    assert not any("Device = " in str(one.inlined_graph) for one in (encode, decode, unet))
    takes = json.loads((flow / "torchscript/model.json").read_text())["takes"]
    sides = {name: one["sides_are_multiples_of"] for name, one in takes.items()}
    assert sides == {"encode": 4, "decode": 2, "unet": 2} and takes["unet"]["size"] is None


class Counting(torch.nn.Module):
    """Looks at its size in Python."""

    def forward(self, x):
        return x * (1 + int(x.shape[2]))


class Branching(torch.nn.Module):
    """Computes something else for other values."""

    def forward(self, x):
        return x + 1 if x.mean() > 0 else x - 1


def test_what_cannot_be_traced_in_general_is_traced_as_it_is_used():
    script, general = formats.traced(
        "n", Counting().eval(), lambda b, s: (torch.rand(b, 1, *s),), [6, 4, 4], 2
    )
    assert not general
    x = torch.rand(1, 1, 6, 4, 4)
    torch.testing.assert_close(script(x), 7 * x)


def test_a_network_that_gives_zeros_is_traced():
    """As MONAI's UNet does before it is trained."""
    zero = torch.nn.Conv3d(1, 1, 1)
    for weight in zero.parameters():
        torch.nn.init.zeros_(weight)
    script, general = formats.traced("unet", zero.eval(), lambda b, s: (torch.rand(b, 1, *s),), [4] * 3, 2)
    assert general and not script(torch.rand(2, 1, 4, 4, 4)).any()


def test_a_trace_that_computes_something_else_is_refused():
    signs = iter([1, -1] * 3)
    with pytest.raises(FloatingPointError, match="decode"):
        formats.traced(
            "decode", Branching().eval(), lambda b, s: (next(signs) * torch.ones(b, 1, *s),), [4] * 3, 2
        )


# ---------------------------------------------------------------- bundle


def run_bundle(bundle: Path, output: Path, *more: str) -> None:
    """MONAI's own command, in a process that cannot import the project."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    files = ["--config_file", "configs/inference.json", "--meta_file", "configs/metadata.json"]
    line = [sys.executable, "-m", "monai.bundle", "run", *files, "--output_dir", str(output), *more]
    done = subprocess.run(line, cwd=bundle, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_monai_draws_from_the_bundle(done, flow, tmp_path):
    """Two volumes of the chain, by seed and steps of the command line."""
    run_bundle(flow / "bundle", tmp_path / "out", "--seed", "1", "--num", "2", "--steps", "4")
    names = ["sample_000001.nii.gz", "sample_000002.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert_same_volume(tmp_path / "out" / name, done.output_dir / name)
        assert nib.load(tmp_path / "out" / name).header.get_xyzt_units()[0] == "mm"


def test_monai_draws_from_the_bundle_of_a_beta_schedule(discrete, steps_of_betas, tmp_path):
    run_bundle(steps_of_betas / "bundle", tmp_path / "out", "--seed", "3", "--steps", "4")
    name = "sample_000003.nii.gz"
    assert_same_volume(tmp_path / "out" / name, discrete.output_dir / name)


def test_the_bundle_has_the_projects_defaults_and_none_of_its_modules(flow, steps_of_betas):
    for folder, sampler, steps in ((flow, "heun", 25), (steps_of_betas, "dpmpp_2m", 30)):
        config = json.loads((folder / "bundle/configs/inference.json").read_text())
        assert (config["sampler"], config["steps"]) == (sampler, steps)
    source = (flow / "bundle/scripts/sampling.py").read_text()
    assert not re.search(r"^\s*(from|import) (ldm|utils|monai)", source, re.M)
    namespace = {"__name__": "sampling"}
    exec(compile(source, "sampling.py", "exec"), namespace)
    assert list(namespace["SAMPLERS"]) == list(SAMPLERS)
    assert not {"from_config", "target", "min_snr_weight"} & set(dir(namespace["NoiseProcess"]))


def test_a_bundle_overwrites_nothing(flow, tmp_path):
    (tmp_path / "sample_000000.nii.gz").write_text("mine")
    with pytest.raises(FileExistsError, match="sample_000000"):
        bundle.draw(0, *[None] * 14, output_dir=str(tmp_path))


def test_monai_accepts_the_metadata(flow, steps_of_betas, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    for folder in (flow, steps_of_betas):
        verify_metadata(meta_file=str(folder / "bundle/configs/metadata.json"), filepath=str(schema))
    wrong = json.loads((flow / "bundle/configs/metadata.json").read_text())
    del wrong["autoencoder_data_format"]["inputs"]["image"]["dtype"]
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="dtype"):
        verify_metadata(meta_file=str(tmp_path / "wrong.json"), filepath=str(schema))


@torch.no_grad()
def test_the_metadata_is_true(done, flow):
    """The bundle's networks, built from its config, take and make what its metadata says."""
    facts = json.loads((flow / "bundle/configs/metadata.json").read_text())
    parser = ConfigParser(json.loads((flow / "bundle/configs/inference.json").read_text()))
    unet, autoencoder = (parser.get_parsed_content(f"{name}_def") for name in ("network", "autoencoder"))

    def shape(tensor: dict) -> tuple[int, ...]:
        return 1, tensor["num_channels"], *tensor["spatial_shape"]

    about = facts["network_data_format"]
    latent, image = about["inputs"]["latent"], about["post_processed_outputs"]["image"]
    made = unet(torch.zeros(shape(latent)), timesteps=torch.zeros(1))
    assert made.shape == shape(about["outputs"]["pred"]) and str(made.dtype) == f"torch.{latent['dtype']}"
    assert about["inputs"]["timesteps"]["value_range"] == [0, 1000]
    assert "velocity" in about["outputs"]["pred"]["channel_def"]["0"]
    about = facts["autoencoder_data_format"]
    outputs = autoencoder(torch.zeros(shape(about["inputs"]["image"])))
    for made, expected in zip(outputs, about["outputs"].values(), strict=True):
        assert made.shape == shape(expected)
    assert image["spatial_shape"] == list(chain.SHAPE)
    assert facts["eval_metrics"] == {
        "reconstruction: PSNR": 18.25,
        "Copies of training scans: nearest | training": 0.75,
    }
    assert facts["pytorch_version"] == torch.__version__.partition("+")[0]
    assert facts["authors"] == "A. Name" and facts["data_source"] == "data"
    assert facts["required_packages_version"]["nibabel"] == nib.__version__


# ---------------------------------------------------------------- the card


def test_the_card_tells_data_training_figures_and_limits(done, flow):
    card = " ".join((flow / "MODEL_CARD.md").read_text().split())
    step, minutes = done.checkpoint("autoencoder.pt")["step"], done.log("autoencoder")[-2]["seconds"] / 60
    for words in (
        "# chain of ellipsoids",
        "Trained by: A. Name.",
        "16 x 20 x 12 voxels of 2 x 1.5 x 3 mm",
        "Source: data.",
        "4 for training, 2 held out",
        f"12 steps, {minutes:.3g} minutes",
        f"of step {step}, the best in validation; averaged exponentially, decay 0.9",
        "l1 + 0.5 gradient + 1e-07 kl + 0.01 adversarial",
        f"PSNR {done.checkpoint('autoencoder.pt')['validation']['psnr']:.4g} dB",
        "| reconstruction | PSNR | 18.25 dB | 17.5 to 19 | | | higher | 2 held-out |",
        "| Copies of training scans | nearest \\| training | 0.75 | | 0.5 | 0.25 to 0.625 | |",
        "| quality | FID | no weights |",
        "- No sample is a copy.",
        "Not for diagnosis",
        "It was trained on 4 training volumes only",
        "was measured: see the figures on copies",
    ):
        assert words in card, words
    assert (flow / "bundle/docs/README.md").read_bytes() == (flow / "MODEL_CARD.md").read_bytes()


def test_a_card_without_figures_says_what_was_not_checked(steps_of_betas):
    card = " ".join((steps_of_betas / "MODEL_CARD.md").read_text().split())
    assert "copy training volumes was not checked" in card and "given no `metrics.json`" in card
    assert "predicts v_prediction, a noise schedule of 1000 steps" in card
    assert "safetensors/" not in card and not (steps_of_betas / "safetensors").exists()


def test_no_case_and_no_path_is_named(done, flow):
    """In anything that is written; of the data only the last folder's name."""
    for path in flow.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"scan_" not in content and str(done.folder.parent).encode() not in content, path


def test_the_cards_code_loads_safetensors(done, flow, monkeypatch):
    monkeypatch.chdir(flow)
    names = {}
    exec(code_of(flow / "MODEL_CARD.md", "safe_open"), names)
    assert not chain.differences(
        dict(names["unet"].state_dict()), done.checkpoint("diffusion_unet.pt")["model"]
    )
    assert names["facts"]["scale_factor"] == done.checkpoint("diffusion_unet.pt")["scale_factor"]


def test_the_checksums_are_those_of_all_files(flow):
    listed = dict(reversed(line.split("  ")) for line in (flow / "SHA256SUMS").read_text().splitlines())
    files = chain.fingerprint(flow)
    assert listed == {Path(name).as_posix(): digest for name, digest in files.items() if name != "SHA256SUMS"}


# ---------------------------------------------------------------- weights from elsewhere, wrong usage


def test_bare_weights_are_exported_and_their_training_not_made_up(done, tmp_path):
    project = copy_of(done, tmp_path / "bare")
    project.change(diffusion_train={**project.config["diffusion_train"], "patch_size": [12, 16, 8]})
    for name in ("autoencoder.pt", "diffusion_unet.pt"):
        torch.save(done.checkpoint(name)["model"], project.model_dir / name)
    given = ("--scale-factor", "0.9", "--formats", "safetensors")
    out = exported(project, tmp_path / "out", *given)
    card = (out / "MODEL_CARD.md").read_text()
    assert card.count("weights from elsewhere: not known") == 2 and "0.5 gradient" not in card
    assert "Cases: not known here" in card
    with safe_open(out / "safetensors/diffusion_unet.safetensors", "pt") as file:
        assert json.loads(file.metadata()["scale_factor"]) == 0.9
    assert "--scale-factor" in refused(project, "--out", tmp_path / "other")


def refused(project: Project, *more, code: int = 2) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        export_model.main(argv(project, *more))
    text = err.getvalue()
    assert stop.value.code == code and "Traceback" not in text and text.count("\n") <= 2, text
    return text


@pytest.mark.parametrize("name", ["autoencoder.pt", "diffusion_unet.pt"])
@pytest.mark.parametrize("how", ["missing", "overwritten"])
def test_a_checkpoint_that_is_not_good(done, tmp_path, name, how):
    project = copy_of(done, tmp_path / "model", "autoencoder.pt", "diffusion_unet.pt")
    path = project.model_dir / name
    path.unlink() if how == "missing" else chain.damage(path, how)
    assert str(path) in refused(project, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_averaged_are_refused(done, tmp_path):
    message = refused(done, "--out", tmp_path / "out", "--unet", done.model_dir / "diffusion_unet_last.pt")
    assert "diffusion_unet_last.pt" in message and "Name diffusion_unet.pt" in message


def test_nothing_is_overwritten(done, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "out already holds something" in refused(done, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize(
    "content, fault",
    [
        ("{", "not valid JSON"),
        ("{}", "figures"),
        ('{"figures": [{"name": "PSNR", "value": 1}]}', "group"),
        ('{"figures": [{"group": "a", "name": "PSNR", "value": "1"}]}', "value"),
        ('{"figures": [{"group": "a", "name": "b", "value": NaN}]}', "value"),
        ('{"figures": [], "verdicts": [{"text": 1, "tone": ""}]}', "verdicts"),
        ('{"figures": [], "autoencoder_sha256": "%s"}' % ("0" * 64), "another autoencoder"),
        ('{"figures": [], "unet_sha256": "%s"}' % ("0" * 64), "another unet"),
        (None, "cannot be read"),
    ],
)
def test_metrics_that_are_none(done, tmp_path, content, fault):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    message = refused(done, "--out", tmp_path / "out", "--metrics", path)
    assert str(path) in message and fault in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content", [("train_log.jsonl", "{\n"), ("split.json", '{"training": 3}')])
def test_a_log_or_split_that_is_none(done, tmp_path, name, content):
    project = copy_of(done, tmp_path / "model", "autoencoder.pt", "diffusion_unet.pt")
    (project.model_dir / name).write_text(content)
    assert name in refused(project, "--out", tmp_path / "out")


def test_a_scale_factor_that_makes_no_sense(done, tmp_path):
    assert "--scale-factor nan" in refused(done, "--out", tmp_path / "out", "--scale-factor", "nan")


def test_an_export_that_fails_leaves_nothing(done, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(bundle, "write_bundle", full)
    assert "no space left" in refused(done, "--out", tmp_path / "out", code=1)
    assert not list(tmp_path.iterdir())
