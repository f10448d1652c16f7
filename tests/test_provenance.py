"""What a generated volume was made of is written beside it, and suffices to make it again."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import subprocess
from pathlib import Path

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import ROOT, Project, copy_of, fingerprint
from torch.distributed.run import parse_args

import inference
import utils
from ldm import generation
from ldm.export import records
from ldm.system import versions
from ldm.system.ranks import Run

DRAW = ("--num", "3", "--steps", "4", "--batch-size", "2")  # seeds 0 and 1 share a batch


@pytest.fixture
def model(done, tmp_path) -> Project:
    """The chain's trained networks, and nothing drawn from them."""
    return copy_of(done, tmp_path / "model", "autoencoder.pt", "diffusion_unet.pt")


@pytest.fixture(scope="module")
def untouched(done, tmp_path_factory) -> Project:
    """Three volumes of four steps. Look, but do not touch."""
    project = copy_of(done, tmp_path_factory.mktemp("drawn"), "autoencoder.pt", "diffusion_unet.pt")
    project.run(inference, *DRAW)
    return project


@pytest.fixture
def drawn(untouched, tmp_path) -> Path:
    """The record of the second of these volumes, in a folder of its own beside the volume."""
    for name in ("sample_000001.json", "sample_000001.nii.gz"):
        (tmp_path / name).write_bytes((untouched.output_dir / name).read_bytes())
    return tmp_path / "sample_000001.json"


def record_of(project: Project, seed: int) -> dict:
    return json.loads((project.output_dir / f"sample_{seed:06d}.json").read_text())


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def volumes_of(project: Project) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(project.output_dir.glob("*.nii.gz"))}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reproduce(path: Path, *more: str) -> str:
    """What `--reproduce` prints; it takes no config and no environment file."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        inference.main(["--reproduce", str(path), *map(str, more)])
    return out.getvalue()


def refused(path: Path, *more: str, code: int = 2) -> str:
    """The error of one or two lines that `--reproduce` ends on."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        reproduce(path, *more)
    text = err.getvalue()
    assert stop.value.code == code and "Traceback" not in text, text
    message = text[text.index("error: ") :].strip()
    assert message.count("\n") < 2, text
    return message


# ---------------------------------------------------------------- the record


def test_the_record_says_what_a_volume_was_made_of(untouched):
    record, volume = record_of(untouched, 1), untouched.output_dir / "sample_000001.nii.gz"
    expected = {
        "format": 1,
        "seed": 1,
        "batch": [0, 1],
        "sampler": "heun",
        "steps": 4,
        "scale_factor": untouched.checkpoint("diffusion_unet.pt")["scale_factor"],
        "precision": "float32",
        "compile": False,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "config": utils.load_config(untouched.config_file),
        "volume": {
            "sha256": sha256(volume),
            "shape": list(chain.SHAPE),
            "spacing": list(chain.SPACING),
            "limits": untouched.checkpoint("diffusion_unet.pt")["geometry"]["limits"],
        },
    }
    for key, name in (("autoencoder", "autoencoder.pt"), ("unet", "diffusion_unet.pt")):
        path = untouched.model_dir / name
        expected[key] = {"path": path.as_posix(), "sha256": sha256(path)}
    assert {key: record[key] for key in expected} == expected
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["numpy"] == np.__version__ and record["versions"]["nibabel"] == nib.__version__
    assert record_of(untouched, 2)["batch"] == [2]


def test_the_config_hash_does_not_depend_on_the_order_of_keys():
    config = {"a": 1, "b": {"c": 2.5, "d": None}}
    assert records.config_hash(config) == records.config_hash({"b": {"d": None, "c": 2.5}, "a": 1})
    assert records.config_hash(config) != records.config_hash({"a": 1, "b": {"c": 2.5, "d": 0}})


def test_the_commit_is_the_projects_own(tmp_path, monkeypatch):
    def git(*line: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        line = ["git", "-C", str(tmp_path), *identity, *line]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("no git on this machine")
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(versions, "ROOT", tmp_path / "project")
    assert versions.versions()["commit"] is None  # a repository around it is another project's
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    assert versions.versions()["commit"] is None  # nothing committed
    (tmp_path / "script.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert versions.versions()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "script.py").write_text("2")
    assert versions.versions()["commit"] == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert versions.versions()["commit"] is None


def test_files_are_those_that_nibabel_writes(tmp_path):
    """So that volumes written before there were records have the same bytes."""
    volume = np.random.default_rng(0).random((2, 5, 4, 3), dtype=np.float32)
    content = generation.nifti_bytes(volume, (1.0, 2.0, 3.0))
    (tmp_path / "a.nii.gz").write_bytes(content)
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.moveaxis(image.get_fdata(), -1, 0), volume)
    nib.save(image, tmp_path / "b.nii.gz")
    assert gzip.decompress((tmp_path / "b.nii.gz").read_bytes()) == gzip.decompress(content)
    assert content[3:8] == bytes(5)  # no name, no time


# ---------------------------------------------------------------- made again


def test_a_record_suffices_to_make_the_same_bytes(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "byte-identical to the recorded volume" in reproduce(drawn)
    again = tmp_path / "sample_000001_reproduced.nii.gz"
    assert again.read_bytes() == (tmp_path / "sample_000001.nii.gz").read_bytes()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["sample_000001.json", "sample_000001.nii.gz", again.name]


@pytest.mark.parametrize(
    "options",
    [
        ("--scale-factor", "2.5"),
        ("--amp",),
        ("--set", "diffusion_train.lr=1", "--num", "4", "--batch-size", "4"),
    ],
    ids=lambda options: options[0],
)
def test_what_the_command_line_said_is_in_the_record(model, monkeypatch, options):
    with monkeypatch.context() as patched:
        patched.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
        model.run(inference, "--steps", "2", "--num", "2", *options)
    monkeypatch.setattr("ldm.system.ranks.is_fast_in_bfloat16", lambda: False)
    assert "byte-identical to the recorded volume" in reproduce(model.output_dir / "sample_000001.json")


def test_the_number_of_threads_is_in_the_record(model):
    try:
        torch.set_num_threads(2)
        model.run(inference, *DRAW)
        torch.set_num_threads(1)
        assert "byte-identical to the recorded volume" in reproduce(model.output_dir / "sample_000000.json")
        assert torch.get_num_threads() == record_of(model, 0)["threads"] == 2
    finally:
        torch.set_num_threads(1)


def test_weights_from_elsewhere_are_in_the_record(done, tmp_path, monkeypatch):
    """Named by relative paths: found from the working directory, then from the record's folder."""
    project = copy_of(done, tmp_path / "bare")
    project.change(diffusion_train={**project.config["diffusion_train"], "patch_size": [12, 16, 8]})
    for name, source in (("a.pt", "autoencoder.pt"), ("u.pt", "diffusion_unet.pt")):
        torch.save(done.checkpoint(source)["model"], project.folder / name)
    monkeypatch.chdir(project.folder)
    given = ("--autoencoder", "a.pt", "--unet", "u.pt", "--scale-factor", "0.9")
    project.run(inference, "--steps", "2", *given)
    assert record_of(project, 0)["unet"]["path"] == "u.pt"
    record = project.output_dir / "sample_000000.json"
    assert "byte-identical to the recorded volume" in reproduce(record)

    monkeypatch.chdir(project.output_dir)
    record.with_name("sample_000000_reproduced.nii.gz").unlink()
    message = refused(record)
    assert "a.pt" in message and "--autoencoder FILE" in message
    for name in ("a.pt", "u.pt"):
        (project.folder / name).rename(project.output_dir / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_text("another file of that name")
    assert "byte-identical to the recorded volume" in reproduce(record)


def altered(path: Path, by: float) -> None:
    """Shift one voxel of a volume by this share of the range, and say in the record that it was written
    so."""
    volume = path.with_name("sample_000001.nii.gz")
    image = nib.load(volume)
    voxels = image.get_fdata().astype(np.float32)
    voxels.flat[np.abs(voxels - voxels.mean()).argmin()] += by * np.ptp(voxels)
    nib.save(nib.Nifti1Image(voxels, image.affine), volume)
    rewrite(path, volume={**json.loads(path.read_text())["volume"], "sha256": sha256(volume)})


def test_a_difference_of_rounding_is_told(drawn):
    altered(drawn, 0.5e-4)
    rewrite(drawn, versions={**json.loads(drawn.read_text())["versions"], "torch": "2.10.0"})
    said = reproduce(drawn)
    assert "by up to 5.0e-05 of its range" in said and "up to rounding" in said
    assert f"torch 2.10.0 then, {torch.__version__} now" in said


@pytest.mark.parametrize("by", [2e-4, 0.1, np.nan])
def test_a_difference_of_more_than_rounding_is_an_error(drawn, by):
    altered(drawn, by)
    message = refused(drawn, code=1)
    assert f"differs from sample_000001.nii.gz by up to {by:.1e} of its range" in message
    assert "not reproduced" in message


@pytest.mark.parametrize("how", ["gone", "another"])
def test_without_the_original_it_cannot_be_compared(drawn, how):
    original = drawn.with_name("sample_000001.nii.gz")
    if how == "gone":
        original.unlink()
    else:
        original.write_bytes(original.read_bytes()[:-9])
    rewrite(drawn, volume={**json.loads(drawn.read_text())["volume"], "sha256": "0" * 64})
    said = reproduce(drawn)
    assert "not byte-identical" in said and "cannot be compared" in said


def test_a_reproduction_is_not_overwritten(drawn):
    reproduce(drawn)
    before = fingerprint(drawn.parent)
    assert "sample_000001_reproduced.nii.gz already exists" in refused(drawn)
    assert fingerprint(drawn.parent) == before


@pytest.mark.parametrize("key, option", [("autoencoder", "--autoencoder"), ("unet", "--unet")])
def test_other_checkpoints_are_refused(drawn, untouched, tmp_path, key, option):
    name = Path(json.loads(drawn.read_text())[key]["path"]).name
    state = untouched.checkpoint(name)
    torch.save({**state, "epoch": 99}, tmp_path / name)
    message = refused(drawn, option, tmp_path / name)
    was = sha256(untouched.model_dir / name)
    assert str(tmp_path / name) in message and was[:12] in message and sha256(tmp_path / name)[:12] in message
    assert not list(tmp_path.glob("*_reproduced*"))

    (tmp_path / name).write_bytes((untouched.model_dir / name).read_bytes())  # moved, but the same
    assert "byte-identical to the recorded volume" in reproduce(drawn, option, tmp_path / name)


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "0"),
        ("-n", "1"),
        ("--steps", "9", "--scale-factor", "1"),
        ("-c", "config.json"),
        ("-e", "environment.json"),
        ("--set", "seed=1"),
        ("--no-amp",),
    ],
    ids=" ".join,
)
def test_options_that_contradict_a_record_are_refused(drawn, options):
    """Also where they say what the default says."""
    message = refused(drawn, *options)
    assert "leave out" in message
    names = {"-n": "--num", "-c": "--config-file", "-e": "--environment-file", "--no-amp": "--amp"}
    for option in options:
        if option.startswith("-"):
            assert names.get(option, option) in message


def test_a_record_that_lacks_a_key_is_refused(drawn):
    record = json.loads(drawn.read_text())
    for key in ("format", *records.SCHEMA["required"]):
        drawn.write_text(json.dumps({name: value for name, value in record.items() if name != key}))
        message = refused(drawn)
        assert str(drawn) in message and key in message


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"format": 2}, "a later version"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 7}, "the seed 7"),
        ({"batch": [1, "2"]}, "batch.1"),
        ({"sampler": "rk4"}, "sampler"),
        ({"steps": True}, "steps"),
        ({"scale_factor": 1e30}, "scale_factor"),
        ({"precision": "float8"}, "precision"),
        ({"threads": 10**9}, "threads"),
        ({"unet": {"path": "model.pt", "sha256": "1234"}}, "unet.sha256"),
        ({"config": {}}, "config_sha256"),
        ({"volume": {}}, "volume"),
        ({"condition": {"group": 1}}, "condition.group"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_record_with_a_wrong_value_is_refused(drawn, changes, named):
    rewrite(drawn, **changes)
    message = refused(drawn)
    assert str(drawn) in message and named in message


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", None])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "sample_000001.json"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(path)


def test_one_volume_is_not_made_by_several_processes(drawn, monkeypatch):
    monkeypatch.setattr(utils, "start", lambda args: Run(1, 2, torch.device("cpu")))
    assert "without torchrun" in refused(drawn)


def test_a_config_that_was_edited_is_refused(drawn):
    config = json.loads(drawn.read_text())["config"]
    config["NoiseScheduler"]["num_train_timesteps"] = 500
    rewrite(drawn, config=config)
    assert "config: was changed" in refused(drawn)


@pytest.mark.parametrize("config", [{}, {"autoencoder_def": {}}, {"autoencoder_def": "os.system"}])
def test_the_config_of_a_record_is_checked_as_any_config_is(drawn, config):
    """Though its hash is right, and whatever the checkpoints say of theirs."""
    rewrite(drawn, config=config, config_sha256=records.config_hash(config))
    message = refused(drawn)
    assert str(drawn) in message and "autoencoder_def" in message


# ---------------------------------------------------------------- the same command again


def test_a_killed_run_goes_on_to_the_same_bytes(untouched, model, monkeypatch):
    """Killed in the second of two batches, then its volumes lost in part."""
    draw, drawn = generation.draw, []

    def killed(networks, seeds, *more):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(seeds)
        return draw(networks, seeds, *more)

    with monkeypatch.context() as patched:
        patched.setattr(generation, "draw", killed)
        with pytest.raises(SystemExit) as stop:
            model.run(inference, *DRAW)
    assert stop.value.code == 130 and len(volumes_of(model)) == 2
    (model.output_dir / "sample_000001.nii.gz").unlink()  # its record is written before it
    (model.output_dir / ".sample_000001.nii.gz.abc.part").write_text("half of it")
    (model.output_dir / ".sample_000009.nii.gz.abc.part").write_text("of another process")
    kept = (model.output_dir / "sample_000000.nii.gz").stat().st_mtime_ns

    assert "1 of 3 volumes already exist" in model.run(inference, *DRAW)
    assert volumes_of(model) == volumes_of(untouched)
    assert (model.output_dir / "sample_000000.nii.gz").stat().st_mtime_ns == kept
    picture = (model.output_dir / "samples.png").read_bytes()
    assert picture == (untouched.output_dir / "samples.png").read_bytes()
    assert [path.name for path in model.output_dir.glob(".*")] == [".sample_000009.nii.gz.abc.part"]

    monkeypatch.setattr(generation, "draw", None)  # nothing is left to draw
    assert "3 of 3 volumes already exist" in model.run(inference, *DRAW)


def test_more_volumes_of_the_same_request_in_smaller_batches(model, done):
    """As after running out of memory."""
    model.run(inference, "--steps", "4", "--num", "2", "--batch-size", "2")
    assert "2 of 3 volumes" in model.run(inference, "--steps", "4", "--num", "3")
    name = "sample_000002.nii.gz"
    assert volumes_of(model)[name] == volumes_of(done)[name]


@pytest.mark.parametrize(
    "what", ["steps", "scale factor", "config", "checkpoint", "volume", "no record", "record"]
)
def test_another_request_is_refused(model, what):
    model.run(inference, "--steps", "2", "--num", "2")
    volume, record = (model.output_dir / f"sample_000001.{kind}" for kind in ("nii.gz", "json"))
    more = {"steps": ("--steps", "3"), "scale factor": ("--scale-factor", "3")}
    more["config"] = ("--set", "diffusion_train.lr=1")
    if what == "checkpoint":
        path = model.model_dir / "diffusion_unet.pt"
        torch.save({**model.checkpoint(path.name), "epoch": 99}, path)
    elif what == "volume":
        volume.write_bytes(volume.read_bytes()[:-9])
    elif what == "no record":
        record.unlink()
    elif what == "record":
        record.write_text("{}")
    before = fingerprint(model.output_dir)
    message = model.refused(inference, "--steps", "2", "--num", "3", *more.get(what, ()))
    told = {
        "steps": "differs: steps 2, now 3.",
        "scale factor": "differs: scale_factor ",
        "config": "differs: another config.",
        "checkpoint": "differs: another unet.",
        "volume": "differs: it was changed since.",
        "no record": "differs: it has no record.",
        "record": "differs: its record cannot be used.",
    }
    assert "already exists" in message and told[what] in message and "--seed" in message
    assert fingerprint(model.output_dir) == before


def test_a_full_disk_leaves_whole_volumes(model, monkeypatch):
    synced, fsync = [], os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 4:  # the second volume
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        message = model.refused(inference, "--steps", "2", "--num", "3", code=1)
    assert "sample_000001.nii.gz could not be written (No space left on device)" in message
    names = sorted(path.name for path in model.output_dir.iterdir())
    assert names == ["sample_000000.json", "sample_000000.nii.gz", "sample_000001.json"]
    assert "1 of 3" in model.run(inference, "--steps", "2", "--num", "3")


# ---------------------------------------------------------------- memory


CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"
WINDOWS_ERROR = "DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000 bytes."


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError(CPU_ERROR),
        RuntimeError(WINDOWS_ERROR),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
@pytest.mark.parametrize(
    "where", ["ldm.generation.sample_latents", "ldm.models.autoencoder.Autoencoder.decode"]
)
def test_out_of_memory_names_what_to_change(model, monkeypatch, where, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(where, fail)
    monkeypatch.setattr(generation, "amp_dtype", lambda device: torch.bfloat16)
    message = model.refused(inference, "--num", "4", "--batch-size", "4", code=1)
    first, second = message.splitlines()
    assert "out of memory" in first and "4 volume(s) of 16 x 20 x 12 voxels" in first
    for remedy in ("--batch-size below 4", "--amp", "diffusion_train.patch_size"):
        assert remedy in second


def test_out_of_memory_names_only_what_would_help(model, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(generation, "sample_latents", fail)
    monkeypatch.setattr(generation, "amp_dtype", lambda device: None)  # a CPU that has no bf16
    message = model.refused(inference, code=1)
    assert "--batch-size" not in message and "--amp" not in message
    assert "Try networks trained with a smaller diffusion_train.patch_size" in message


def test_out_of_memory_before_the_first_volume(model, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    message = model.refused(inference, code=1)
    assert "the networks do not fit" in message and "--device cpu" in message
    assert not model.output_dir.exists()


def test_real_memory_runs_out_alike(model):
    """A request for a petabyte, which no machine grants."""
    with (
        pytest.raises(OSError, match="out of memory"),
        generation.out_of_memory_explained("too many", "less"),
    ):
        torch.empty(10**15)
    with (
        pytest.raises(OSError, match="out of memory"),
        generation.out_of_memory_explained("too many", "less"),
    ):
        np.empty(10**15)


def test_another_failure_keeps_its_traceback(model, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(generation, "sample_latents", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        model.run(inference)


# ---------------------------------------------------------------- which autoencoder, which option


def test_an_autoencoder_that_the_model_was_not_trained_on_is_refused(model):
    state = model.checkpoint("autoencoder.pt")
    name = next(name for name, value in state["model"].items() if value.is_floating_point())
    state["model"][name] = state["model"][name] * 1.01
    torch.save(state, model.folder / "other.pt")
    message = model.refused(inference, "--autoencoder", model.folder / "other.pt")
    assert str(model.model_dir / "diffusion_unet.pt") in message and str(model.folder / "other.pt") in message
    assert "--autoencoder" in message and message.count("\n") == 1
    assert not model.output_dir.exists()


def test_the_same_autoencoder_from_another_file_is_taken(model, done):
    """Its weights count, not its file."""
    torch.save(done.checkpoint("autoencoder.pt")["model"], model.folder / "bare.pt")
    model.run(inference, "--steps", "4", "--autoencoder", model.folder / "bare.pt")
    name = "sample_000000.nii.gz"
    assert volumes_of(model)[name] == volumes_of(done)[name]


def test_torchrun_lets_the_number_of_volumes_through(model):
    script = [str(ROOT / "inference.py"), *model.argv("-n", "2", "--steps", "1")]
    assert parse_args(["--standalone", "--nproc_per_node=2", *script]).training_script_args == script[1:]
    model.run(inference, "-n", "2", "--steps", "1")
    assert len(volumes_of(model)) == 2
