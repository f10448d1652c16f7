"""Whatever is wrong with an input, a script ends in a clear error that names it, or handles it rightly: no
traceback, no hang, no wrong result in silence.

One table a kind of input: configs, environment files, images, labels, lists of cases, checkpoints, records of
samples, archives, and the odd files that scanners left. Each row goes through a script's `main(argv)`, and
`end_of` asserts of all of them how a script may end.
"""

import contextlib
import copy
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import re
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, SHAPE, SPACING, Project, copy_of, fingerprint, make_data
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import check_data
import download_brats_data
import inference
import train_autoencoder
import train_diffusion
import utils
from ldm import UserError, configs
from ldm.data.preprocessing import Preprocessing
from ldm.export.records import config_hash
from ldm.system.checkpoints import load_checkpoint
from ldm.training.run_folder import load_training_checkpoint

NAN, INF, HUGE = math.nan, math.inf, 10**30
TABLES = {}  # kind of input: how many


def row(name: str, *values):
    """A row of a table."""
    return pytest.param(*values, id=name)


def table(kind: str, rows: list, each: int = 1) -> list:
    """The rows, counted."""
    TABLES[kind] = TABLES.get(kind, 0) + len(rows) * each
    return rows


# ---------------------------------------------------------------- how a script may end


@dataclass(frozen=True)
class End:
    """How a script ended: its exit code (0: it returned), its error message, and what it printed."""

    code: int
    error: str
    printed: str


class Hang(BaseException):
    """No script may take it for an error of its own."""


@contextlib.contextmanager
def at_most(seconds: int):
    """Longer is a hang (where the system has alarms)."""

    def ring(*_):
        raise Hang(f"not done after {seconds} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def end_of(script, *argv, seconds: int = 30) -> End:
    """Run a script, and see that it ends as it may: well, or with exit code 1 or 2 and one error of
    at most three lines (`check_data.py` may print its table instead). What it raises beside SystemExit would
    be a traceback, and fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with at_most(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            script.main([str(one) for one in argv])
        except SystemExit as stop:
            code = stop.code
    said = err.getvalue()
    assert code in (0, 1, 2) and "Traceback" not in said
    if code == 0 or (script is check_data and "reason" in out.getvalue()):
        assert "error: " not in said
        return End(code, "", out.getvalue())
    assert said.count("error: ") == 1, said
    error = said[said.index("error: ") :].strip()
    assert error.count("\n") < 3 and len(error) < 1500, f"{len(error)} characters: {error[:1500]}"
    return End(code, error, out.getvalue())


def refused(end: End, *named: object, code: int | None = None) -> None:
    """It ended in an error (of this code, where one is given) that names these."""
    assert end.code == code if code else end.code in (1, 2), end
    assert all(str(one) in end.error for one in named), f"{named} in {end.error}"


def refusal_of(check: Callable, *args) -> str | None:
    """The message of the UserError that a reader or validator raises, which every script ends on
    (`end_of`); None where it takes the input."""
    try:
        check(*args)
    except UserError as error:
        message = str(error)
        assert message.count("\n") < 3 and len(message) < 1500, message[:1500]
        return message
    return None


def trained_well(project: Project, stage: str) -> None:
    """A training that ended well left finite numbers and weights."""
    assert project.log(stage)
    assert all(math.isfinite(v) for entry in project.log(stage) for v in entry.values() if v != stage)
    name = "autoencoder.pt" if stage == "autoencoder" else "diffusion_unet.pt"
    assert all(weight.isfinite().all() for weight in project.checkpoint(name)["model"].values())


# ---------------------------------------------------------------- projects to spoil

QUICK = copy.deepcopy(CONFIG)
QUICK["autoencoder_train"] |= {"max_epochs": 1, "adversarial_warmup_epochs": 0}
QUICK["diffusion_train"] |= {"max_epochs": 1}
LONGER = ("--set", "autoencoder_train.max_epochs=2", "--set", "diffusion_train.max_epochs=2")
MODELS = ("autoencoder.pt", "autoencoder_last.pt", "diffusion_unet.pt", "diffusion_unet_last.pt")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Project:
    """The chain, one epoch each, and one sample. Look, but do not touch."""
    base = tmp_path_factory.mktemp("malformed")
    project = Project(base / "done", make_data(base / "data", cases=4), copy.deepcopy(QUICK))
    for script in (train_autoencoder, train_diffusion):
        project.run(script, "--no-amp")
    project.run(inference, "--steps", "1", "--batch-size", "2", "--num", "2")
    return project


@pytest.fixture
def project(done, tmp_path) -> Project:
    """One to train an autoencoder in."""
    return copy_of(done, tmp_path / "p")


@pytest.fixture
def model(done, tmp_path) -> Project:
    """One with a trained autoencoder, to train a diffusion model in."""
    return copy_of(done, tmp_path / "p", "autoencoder.pt", "split.json")


@pytest.fixture
def models(done, tmp_path) -> Project:
    """One with both."""
    return copy_of(done, tmp_path / "p", *MODELS, "split.json", "train_log.jsonl")


@pytest.fixture(autouse=True)
def one_thread():
    """As a record may ask for another number of threads."""
    yield
    torch.set_num_threads(1)


def put(config: dict, path: str, value) -> dict:
    """The config with another value at a dotted path."""
    config = copy.deepcopy(config)
    *sections, last = path.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    return config


def check(config: dict) -> None:
    """As every script reads a config that is JSON."""
    configs.check_config(json.loads(json.dumps(config)), "config.json")


def train_with(project: Project, config, script=train_autoencoder) -> End:
    """Train with this config: an object, or the bytes of a file."""
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    project.config_file.write_bytes(content)
    return end_of(script, *project.argv("--no-amp"))


# ---------------------------------------------------------------- configs: the file

TEXT = json.dumps(QUICK)


def with_text(old: str, new: str) -> bytes:
    assert old in TEXT
    return TEXT.replace(old, new, 1).encode()


def in_network(**arguments) -> bytes:
    return json.dumps({**QUICK, "autoencoder_def": {**QUICK["autoencoder_def"], **arguments}}).encode()


CONFIG_FILES = [
    row("empty", b"", "config.json"),
    row("blank", b" \n\t", "config.json"),
    row("list", b"[]", "config.json"),
    row("string", b'"config"', "config.json"),
    row("number", b"3", "config.json"),
    row("null", b"null", "config.json"),
    row("nan", b"NaN", "config.json"),
    row("no network", b"{}", "autoencoder_def"),
    row("truncated", TEXT[: len(TEXT) // 2].encode(), "config.json"),
    row("truncated by one", TEXT[:-1].encode(), "config.json"),
    row("trailing comma", TEXT[:-1].encode() + b",}", "config.json"),
    row("comment", b"// mine\n" + TEXT.encode(), "config.json"),
    row("single quotes", TEXT.replace('"', "'").encode(), "config.json"),
    row("two objects", TEXT.encode() * 2, "config.json"),
    row("something after it", TEXT.encode() + b"\0", "config.json"),
    row("utf-16", TEXT.encode("utf-16"), "config.json"),
    row("latin-1", TEXT.replace("seed", "s\xe9ed").encode("latin-1") + b"\xe9", "config.json"),
    row("nul in a key", with_text("channel", "chan\0nel"), "config.json"),
    row("binary", bytes(range(256)), "config.json"),
    row("python", b"{'channel': 0, **others}", "config.json"),
    row("yaml", b"channel: 0\nspacing: [1, 1, 1]\n", "config.json"),
    row("nested 100000 deep", b"[" * 100_000 + b"]" * 100_000, "config.json"),
    row("objects 100000 deep", b'{"a":' * 100_000, "config.json"),
    row("value nested 900 deep", in_network(norm_eps=json.loads("[" * 900 + "]" * 900)), "too deep"),
    row("key twice", with_text('"channel": 0', '"channel": 1, "channel": 0'), "channel"),
    row("section twice", with_text('"data"', '"data": {"num_workers": 1}, "data"'), "data"),
    row("integer of 5000 digits", with_text('"channel": 0', f'"channel": {"1" * 5000}'), "config.json"),
    row("integer of 4000 digits", with_text('"channel": 0', f'"channel": {"1" * 4000}'), "chan"),
    row("1e999", with_text('"channel": 0', '"channel": 1e999'), "channel"),
    row("list of 100000", with_text(json.dumps([*SPACING]), json.dumps([1] * 100_000)), "spac"),
    row("key of 100000 letters", with_text('"channel"', f'"{"k" * 100_000}"'), "config.json"),
    row("lines in a key", with_text('"channel"', r'"a\n\n\n\nb"'), "config.json"),
    row("half a surrogate pair as a key", with_text('"channel"', r'"\ud800"'), "config.json"),
    row("half a surrogate pair", with_text('"channel": 0', r'"channel": "\ud800"'), "channel"),
    row("reference to nothing", with_text('"channel": 0', '"channel": "@"'), "config.channel"),
    row("reference into a list", with_text('"channel": 0', '"channel": "@spacing::0"'), "@spacing::0"),
    row("reference to itself", with_text('"channel": 0', '"channel": "@channel"'), "@channel"),
    row("references in a circle", with_text('"channel": 0', '"channel": "@seed", "seed": "@channel"'), "@"),
    row("network within itself", in_network(num_res_blocks="@autoencoder_def"), "@autoencoder_def"),
    row("reference to a section", with_text('"channel": 0', '"channel": "@data"'), "channel"),
    row(
        "chain of 2000 references",
        json.dumps({**QUICK, **{f"x{i}": f"@x{i + 1}" for i in range(2000)}, "x2000": 1}).encode(),
        "too deep",
    ),
    row(
        "references that double 60 times",
        json.dumps({**QUICK, **{f"x{i}": [f"@x{i + 1}"] * 2 for i in range(60)}, "x60": 1}).encode(),
        "x",
    ),
    row("expression", with_text('"channel": 0', '"channel": "$__import__(\'os\').getcwd()"'), "expression"),
    row("expression of a reference", with_text('"channel": 0', '"channel": "$@seed + 1"'), "@seed + 1"),
    row("expression as a key", with_text('"channel"', '"$import os"'), "$import os"),
    row("macro of MONAI", with_text('"channel": 0', '"channel": "%other.json::channel"'), "channel"),
    row("_disabled_ of MONAI", in_network(_disabled_=True), "_disabled_"),
    row("_mode_ of MONAI", in_network(_mode_="debug"), "_mode_"),
    row("class within a network", in_network(in_channels={"_target_": "os.getcwd"}), "autoencoder_def"),
]


@pytest.mark.parametrize("content, named", table("config files", CONFIG_FILES))
def test_a_config_file_that_is_none(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content)
    assert named in refusal_of(utils.load_config, tmp_path / "config.json")


@pytest.mark.parametrize("kind", table("config files", ["missing", "folder", "link to nothing"]))
@pytest.mark.parametrize("which", ["config", "environment"])
def test_a_file_that_cannot_be_opened(project, kind, which):
    file = project.config_file if which == "config" else project.environment_file
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "link to nothing":
        try:
            file.symlink_to(file.with_name("nowhere"))
        except OSError:
            pytest.skip("no links here")
    for script in (train_autoencoder, train_diffusion, inference):
        refused(end_of(script, *project.argv()), file, code=2)


TARGETS = [
    "os.system",
    "builtins.eval",
    "torch.load",
    "subprocess.Popen",
    "monai.bundle.run",
    "monai.networks.nets",
    "monai.networks.nets.",
    "monai.networks.nets..AutoencoderKL",
    "monai.networks.nets.os.system",
    "monai.networks.nets.resnet50",
    "monai.networks.nets.autoencoderkl.nn.Conv3d",
    "monai.networks.nets_evil.Net",
    "",
    ".",
    "...",
]


@pytest.mark.parametrize("section", ["autoencoder_def", "diffusion_def", "NoiseScheduler"])
def test_a_class_that_is_no_network(section):
    for target in TARGETS:
        message = refusal_of(check, put(QUICK, f"{section}._target_", target))
        assert message and section in message and "_target_" in message, target


# ---------------------------------------------------------------- configs: the values


def schema_keys(schema: dict, root: dict, path: str = "") -> list[tuple[str, dict]]:
    """All keys of the schema with what it says of them."""
    found = []
    for key, about in schema.get("properties", {}).items():
        about = root["$defs"][about["$ref"].rpartition("/")[2]] if "$ref" in about else about
        found += [(path + key, about), *schema_keys(about, root, f"{path}{key}.")]
    return found


SCHEMA = json.loads((utils.ROOT / "config/schema.json").read_text(encoding="utf-8"))
KEYS = schema_keys(SCHEMA, SCHEMA)


def test_a_value_of_another_type():
    """Of every key, which has to be named."""
    allowed = {"object": ({},), "string": ("x",), "boolean": (True,)}
    for path, about in table("values of another type", KEYS, each=4):
        wrong, kinds = [{"x": 1}, {}, NAN, "x", True, -1], about.get("type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            wrong = [value for value in wrong if "enum" in about or value not in allowed.get(kind, ())]
        for value in wrong:
            message = refusal_of(check, put(QUICK, path, value))
            assert message and path.rpartition(".")[2] in message, (path, value, message)


VALUES = [
    # numbers that no machine can hold or finish
    row("channel", "channel", 10**9),
    row("image_channels", "image_channels", 10**9),
    row("latent_channels", "latent_channels", 10**12),
    row("longest_side", "longest_side", 10**9),
    row("seed", "seed", HUGE),
    row("batch", "autoencoder_train.batch_size", 10**9),
    row("batch of stage 2", "diffusion_train.batch_size", 10**9),
    row("accumulate", "autoencoder_train.accumulate_steps", 10**9),
    row("accumulate more", "autoencoder_train.accumulate_steps", HUGE),
    row("workers", "data.num_workers", 10**6),
    row("val_times", "diffusion_train.val_times", 10**12),
    row("val_times more", "diffusion_train.val_times", HUGE),
    row("timesteps", "NoiseScheduler.num_train_timesteps", HUGE),
    row("timesteps of betas", "NoiseScheduler", {"num_train_timesteps": 10**12}),
    row("patch of 1e6", "autoencoder_train.patch_size", [10**6] * 3),
    row("patch of 1e30", "autoencoder_train.patch_size", [HUGE] * 3),
    row("patch to validate", "autoencoder_train.val_patch_size", [2 * 10**6] * 3),
    row("patch of stage 2", "diffusion_train.patch_size", [4 * 10**6] * 3),
    row("spacing of 1e-9", "spacing", [1e-9] * 3),
    row("spacing of 1e-300", "spacing", [1e-300, 2, 2]),
    row("spacing of 1e9", "spacing", [1e9] * 3),
    row("spacing of 1e30", "spacing", [HUGE] * 3),
    row("judge", "autoencoder_train.discriminator.channels", 10**10),
    row("weight of 1e30", "autoencoder_train.kl_weight", HUGE),
    row("gradient weight of 1e30", "autoencoder_train.gradient_weight", HUGE),
    row("std of 1e30", "autoencoder_train.initial_posterior_std", HUGE),
    row("rate of 1e9", "autoencoder_train.lr", 1e9),
    row("rate of 1e300", "autoencoder_train.lr", 1e300),
    row("levels", "autoencoder_def.channels", [8] * 64),
    row("levels of the unet", "diffusion_def.channels", [8] * 64),
    row("channels", "autoencoder_def.channels", [8, 10**9]),
    row("channels of the unet", "diffusion_def.channels", [10**9] * 2),
    row("blocks", "autoencoder_def.num_res_blocks", 10**9),
    row("blocks of the unet", "diffusion_def.num_res_blocks", 10**9),
    row("groups", "autoencoder_def.norm_num_groups", 10**9),
    row("heads", "diffusion_def.num_head_channels", 10**9),
    row("classes", "diffusion_def.num_class_embeds", 10**10),
    # too little
    row("patch of 1", "autoencoder_train.patch_size", [1, 1, 1]),
    row("patch of 2", "autoencoder_train.patch_size", [2, 2, 2]),
    row("patch of 6", "diffusion_train.patch_size", [6, 8, 10]),
    row("patch to validate of 1", "autoencoder_train.val_patch_size", [1, 1, 1]),
    row("patch to validate of 7", "autoencoder_train.val_patch_size", [3, 5, 7]),
    row("two of three sides", "autoencoder_train.patch_size", [8, 8]),
    row("no channels", "channel", []),
    row("a channel twice", "channel", [0, 0]),
    row("no range", "intensity", {"lower_percentile": 50, "upper_percentile": 50}),
    row("range upside down", "intensity", {"lower_percentile": 99.5, "upper_percentile": 0}),
    row("betas too large", "NoiseScheduler", {"schedule": "linear_beta", "beta_start": 0.9, "beta_end": 0.9}),
    row("velocity of betas", "NoiseScheduler", {"schedule": "cosine", "prediction_type": "velocity"}),
    row(
        "epsilon of straight paths",
        "NoiseScheduler",
        {"schedule": "rectified_flow", "prediction_type": "epsilon"},
    ),
    row("both spacings", "longest_side", 16),
    row("perceptual weights missing", "autoencoder_train.perceptual_weight", 1),
    # arguments of the networks
    row("0 input channels", "autoencoder_def.in_channels", 0),
    row("-1 input channels", "autoencoder_def.in_channels", -1),
    row("2 input channels", "autoencoder_def.in_channels", 2),
    row("2 output channels", "autoencoder_def.out_channels", 2),
    row("2 dimensions", "autoencoder_def.spatial_dims", 2),
    row("-1 dimensions", "autoencoder_def.spatial_dims", -1),
    row("1e9 dimensions", "autoencoder_def.spatial_dims", 10**9),
    row("4 latent channels in one place", "autoencoder_def.latent_channels", 4),
    row("0 latent channels", "autoencoder_def.latent_channels", 0),
    row("channels 0", "autoencoder_def.channels", [0, 0]),
    row("channels below 0", "autoencoder_def.channels", [-8, -16]),
    row("no levels", "autoencoder_def.channels", []),
    row("one level of two", "autoencoder_def.channels", [8]),
    row("channels as text", "autoencoder_def.channels", "ab"),
    row("channels as fractions", "autoencoder_def.channels", [8.0, 16.0]),
    row("0 blocks", "autoencoder_def.num_res_blocks", 0),
    row("blocks below 0", "autoencoder_def.num_res_blocks", [1, -1]),
    row("blocks as text", "autoencoder_def.num_res_blocks", "ab"),
    row("eps as text", "autoencoder_def.norm_eps", "small"),
    row("eps NaN", "autoencoder_def.norm_eps", NAN),
    row("groups below 0", "autoencoder_def.norm_num_groups", -1),
    row("half a group", "autoencoder_def.norm_num_groups", 0.5),
    row("0 groups", "autoencoder_def.norm_num_groups", 0),
    row("'false' for false", "autoencoder_def.with_encoder_nonlocal_attn", "false"),
    row("attention as text", "autoencoder_def.attention_levels", "ab"),
    row("an argument that is none", "autoencoder_def.chanels", [8, 16]),
    row("no autoencoder", "autoencoder_def", QUICK["diffusion_def"]),
    row(
        "a class that needs another package",
        "autoencoder_def",
        {"_target_": "monai.networks.nets.TorchVisionFCModel", "channels": [8, 16]},
    ),
    row("4 input channels of the unet", "diffusion_def.in_channels", 4),
    row("4 output channels of the unet", "diffusion_def.out_channels", 4),
    row("2 dimensions of the unet", "diffusion_def.spatial_dims", 2),
    row("classes without labels", "diffusion_def.num_class_embeds", 3),
    row("conditioning without", "diffusion_def.with_conditioning", True),
    row("conditioning as text", "diffusion_def.with_conditioning", "no"),
    row("heads below 0", "diffusion_def.num_head_channels", -1),
    row("0 heads", "diffusion_def.num_head_channels", 0),
    row("7 heads", "diffusion_def.num_head_channels", [0, 7]),
    row("dropout as text", "diffusion_def.dropout_cattn", "x"),
]


@pytest.mark.parametrize("path, value", table("values", VALUES))
def test_a_value_that_cannot_be(model, path, value):
    """Refused, or ended on the numbers that it makes, before the best weights are written."""
    config = put(QUICK, path, value)
    if refusal_of(check, config):
        return
    script = train_diffusion if path.startswith(("diff", "Noise")) else train_autoencoder
    if script is train_autoencoder:
        (model.model_dir / "autoencoder.pt").unlink()
    refused(train_with(model, config, script))
    assert not (model.model_dir / "diffusion_unet.pt").exists()
    assert script is train_diffusion or not (model.model_dir / "autoencoder.pt").exists()


def test_whole_numbers_do_where_fractions_are_due(project):
    config = put(QUICK, "autoencoder_train.adam_betas", [0, 0])
    assert train_with(project, put(config, "autoencoder_train.gradient_weight", 1)).code == 0
    trained_well(project, "autoencoder")


PATTERNS = [
    row("nothing", "nothing", None),
    row("outside", "../*", None),
    row("bracket", "scan_[0", None),
    row("nul", "\0", None),
    row("absolute", "/tmp/*", "pattern"),
    row("itself", ".", "pattern"),
    row("stars in a name", "**_T1w", "pattern"),
]
DATA_PATTERNS = table("patterns", PATTERNS)


@pytest.mark.parametrize("pattern, named", DATA_PATTERNS)
def test_a_pattern_that_finds_nothing(project, pattern, named):
    project.set_environment(data_base_dir=str(project.data / "imagesTr"))
    config = put(QUICK, "data.pattern", pattern)
    refused(train_with(project, config), named or repr(pattern)[1:-1], code=2)


# ---------------------------------------------------------------- configs: by mutation

SMALL = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.just(HUGE) | st.text(max_size=4)
ANYTHING = st.recursive(
    SMALL | st.sampled_from(["@seed", "@data", "@", "$1+1", "os.system", "l2", "cosine", *TARGETS[:5]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(section: dict, path: tuple = ()) -> list[tuple]:
    """Paths of all keys."""
    found = []
    for key, value in section.items():
        found += [(*path, key), *(places(value, (*path, key)) if isinstance(value, dict) else [])]
    return found


@st.composite
def mutated(draw, content: dict, most: int = 2) -> dict:
    """With one or two keys deleted, renamed, moved or given another value."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, most))):
        *sections, key = draw(st.sampled_from(sorted(places(content)) or [("channel",)]))
        section = content
        for name in sections:
            section = section[name]
        match draw(st.sampled_from(["delete", "replace", "replace", "rename", "move"])):
            case "delete":
                section.pop(key, None)
            case "replace":
                section[key] = draw(ANYTHING)
            case "rename" if key in section:
                section[draw(st.text(max_size=3)) + key] = section.pop(key)
            case "move" if key in section:
                content[key] = section.pop(key)
    return content


EXAMPLES = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


def is_quick(config: dict) -> bool:
    """Whether what it asks for is done in a second: the defaults are not."""
    sections = [config.get(key) for key in ("autoencoder_train", "diffusion_train", "data")]
    if not all(isinstance(section, dict) for section in sections):
        return True
    epochs = [section.get("max_epochs", section.get("n_epochs")) for section in sections[:2]]
    compiled = [section.get("compile") for section in sections[:2]]
    workers = sections[2].get("num_workers")
    return epochs == [1, 1] and True not in compiled and workers not in (None, 1, 2, 3)


@pytest.mark.parametrize("script", [train_autoencoder, train_diffusion, inference])
def test_any_config(done, tmp_path, script):
    names = {train_autoencoder: (), train_diffusion: ("autoencoder.pt",), inference: MODELS}[script]
    stage = {train_autoencoder: "autoencoder", train_diffusion: "diffusion"}.get(script)
    ends = []

    @settings(max_examples=20, **EXAMPLES)
    @given(mutated(QUICK))
    def train(config):
        assume(is_quick(config))
        folder = tmp_path / str(len(ends))
        project = copy_of(done, folder, *names)
        project.config_file.write_text(json.dumps(config))
        end = end_of(script, *project.argv("--no-amp", *(["--steps", "1"] if script is inference else [])))
        ends.append(end.code)
        if end.code == 0 and stage:
            trained_well(project, stage)
        elif end.code == 0:
            same_sample(done, project)
        shutil.rmtree(folder)

    train()
    assert ends.count(2) > 5 and 0 in ends
    TABLES["configs by mutation"] = TABLES.get("configs by mutation", 0) + len(ends)


def same_sample(done: Project, project: Project) -> None:
    """Seed 0, of one step, is what it was in the first run."""
    ours, first = (nib.load(p.output_dir / "sample_000000.nii.gz").get_fdata() for p in (project, done))
    np.testing.assert_allclose(ours, first, atol=1e-4 * np.ptp(first))


def test_any_arguments_of_a_network(done, tmp_path):
    ends = []

    @settings(max_examples=40, **EXAMPLES)
    @given(mutated(QUICK["autoencoder_def"], 1))
    def train(definition):
        config = {**QUICK, "autoencoder_def": definition}
        if refusal_of(check, config):
            ends.append(2)
            return
        folder = tmp_path / str(len(ends))
        ends.append(train_with(copy_of(done, folder), config).code)
        shutil.rmtree(folder)

    train()
    assert ends.count(2) > 12 and 0 in ends
    TABLES["networks by mutation"] = len(ends)


# ---------------------------------------------------------------- environment files

FOLDERS = ("model_dir", "tfevent_path", "output_dir", "cache_dir")

ENVIRONMENTS = [
    *(row(f"{key} {value!r}", {key: value}, key) for key in FOLDERS for value in (3, True, [], {}, ["a"])),
    *(row(f"{key} null", {key: None}, key) for key in FOLDERS[:3]),
    *(row(f"{key} nul", {key: "a\0b"}, key) for key in FOLDERS),
    *(row(f"{key} surrogate", {key: "\ud800"}, key) for key in FOLDERS),
    *(row(f"{key} empty", {key: ""}, key) for key in ("data_base_dir", *FOLDERS)),
    *(row(f"{key} long", {key: "x" * 3000}, key) for key in ("data_base_dir", "model_dir")),
    *(row(f"{key} long in all", {key: "x/" * 1500}, key) for key in ("data_base_dir", "model_dir")),
    *(row(f"{key} a file", {key: "FILE"}, "config.json") for key in ("data_base_dir", *FOLDERS)),
    *(row(f"{key} in a file", {key: "FILE/x"}, "config.json") for key in ("data_base_dir", *FOLDERS)),
    *(row(f"data {v!r}", {"data_base_dir": v}, "data_base_dir") for v in (3, None, [], {}, ["a", 3])),
    row("data twice", {"data_base_dir": ["DATA", "DATA"]}, "named twice"),
    row("data nowhere", {"data_base_dir": "~/nowhere"}, "nowhere: no such data folder"),
    *(row(f"resume_ckpt {v!r}", {"resume_ckpt": v}, "resume_ckpt") for v in ("true", 1, None, "last.pt")),
    *(row(f"download_brats {v!r}", {"download_brats": v}, "download_brats") for v in ("no", 0, None)),
    *(row(f"weights {v!r}", {"perceptual_weights": v}, "perceptual_weights") for v in (3, [], True)),
    row("key that is none", {"modeldir": "x"}, "model_dir"),
]


@pytest.mark.parametrize("changes, named", table("environment files", ENVIRONMENTS))
def test_an_environment_that_is_wrong(project, tmp_path, monkeypatch, changes, named):
    def real(value):
        value = {"FILE": str(project.config_file), "DATA": str(project.data)}.get(str(value), value)
        value = str(project.config_file / "x") if value == "FILE/x" else value
        return [real(one) for one in value] if isinstance(value, list) else value

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    project.set_environment(**{key: real(value) for key, value in changes.items()})
    if message := refusal_of(utils.load_environment, project.environment_file):
        assert named in message
    else:
        refused(end_of(train_autoencoder, *project.argv("--no-amp")), named)
    assert not list((tmp_path / "here").iterdir())


def test_any_environment(done, tmp_path, monkeypatch):
    whole = json.loads(done.environment_file.read_text()) | {"cache_dir": None, "resume_ckpt": True}
    ends = []

    @settings(max_examples=8, **EXAMPLES)
    @given(mutated(whole))
    def check(content):
        folder = tmp_path / str(len(ends))
        project = copy_of(done, folder)
        monkeypatch.chdir(folder)
        mine = [key for key in content if content[key] == whole.get(key) and key in FOLDERS[:3]]
        content |= {key: str(folder / key) for key in mine}
        project.environment_file.write_text(json.dumps(content))
        ends.append(end_of(train_autoencoder, *project.argv("--no-amp")).code)

    check()
    assert ends.count(2) > 2
    TABLES["environments by mutation"] = len(ends)


# ---------------------------------------------------------------- images: the header

AFFINE = np.diag([*SPACING, 1.0])
AFFINE[:3, 3] = -10, -12, 5
FIELDS = nib.nifti1.header_dtype
ONE = Preprocessing((0,), SPACING)


def scan(seed: int) -> np.ndarray:
    """A bright ellipsoid in noise, int16; another for each seed."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    rng = np.random.default_rng(seed)
    bright = np.clip(1 - sum((1.2 * axis) ** 2 for axis in axes), 0, None)
    return (bright * rng.uniform(500, 900) + 30 * rng.random(SHAPE)).astype(np.int16)


def nifti(seed: int, sform: bool = True, label: bool = False) -> bytes:
    """The content of a .nii: qform, scaling 1 and 0, and an sform unless it is to be without."""
    image = nib.Nifti1Image((scan(seed) > 200).astype(np.uint8) if label else scan(seed), AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(AFFINE, int(sform))
    image.header["scl_slope"], image.header["scl_inter"] = 1, 0
    return image.to_bytes()


def with_field(content: bytes, field: str, value, index: int | None = None) -> bytes:
    """The file with another value in a field of its header."""
    header = np.frombuffer(content[:348], FIELDS).copy()
    if index is None:
        header[field] = value
    else:
        header[field][0][index] = value
    return header.tobytes() + content[348:]


def save(path: Path, content: bytes) -> Path:
    """Write a .nii, or pack it where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)
    return path


UNIMPORTANT = [  # (field, index, values) that do not change what the file shows
    ("sizeof_hdr", None, (0, 347, 349, 540, -348)),
    *((field, None, (b"\xff" * FIELDS[field].itemsize,)) for field in ("data_type", "db_name", "regular")),
    *((field, None, (b"\xff" * FIELDS[field].itemsize,)) for field in ("descrip", "aux_file", "intent_name")),
    *((field, None, (-1,)) for field in ("extents", "session_error", "glmax", "slice_start", "slice_end")),
    *((field, None, (NAN, INF, 1e30)) for field in ("intent_p1", "cal_max", "cal_min", "toffset")),
    ("intent_code", None, (-1, 1007)),
    ("slice_code", None, (99,)),
    ("dim_info", None, (255,)),
    ("xyzt_units", None, (0, 255)),
    *(("dim", i, (-32768, 0, 2, 32767)) for i in (4, 5, 6, 7)),
    ("dim", 0, (4, 5, 7)),
    ("bitpix", None, (0, 1, 8, 32, -16)),
    *(("pixdim", i, (NAN, INF, 0, -1, 1e30)) for i in range(8)),
    ("scl_slope", None, (0, NAN, 2, 1e-30, 1e30)),
    ("scl_inter", None, (-1, 100, 1e-30)),
    ("qform_code", None, (-1, 0, 4, 99, 32767)),
    ("sform_code", None, (-1, 0, 4, 99, 32767)),
    *((f"quatern_{axis}", None, (NAN, INF, 2, 1e30)) for axis in "bcd"),
    *((f"qoffset_{axis}", None, (NAN, INF, 1e30)) for axis in "xyz"),
    *((f"srow_{axis}", 3, (0, -100)) for axis in "xyz"),
    ("vox_offset", None, (352.5,)),
    ("magic", None, (b"ni1",)),
]
SAME = [(field, value, index) for field, index, values in UNIMPORTANT for value in values]
table("headers that read the same", SAME, each=2)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_whose_damage_does_not_matter_reads_the_same(done, tmp_path, ending):
    """Each file against its twin that was not damaged; and all of them are good to `check_data.py` and to
    training."""
    differ = []
    for number, (field, value, index) in enumerate(SAME):
        path = save(tmp_path / "all" / f"{number:03}{ending}", with_field(nifti(number), field, value, index))
        twin = save(tmp_path / f"twin{ending}", nifti(number))
        mine, due = ONE((path,)), ONE((twin,))
        if mine.shape != due.shape or np.abs(mine - due).max() > 1e-5:
            differ.append((field, value, index))
    assert not differ
    end = end_of(check_data, tmp_path / "all")
    assert end.code == 0 and f"no faults: {len(SAME)} cases of 16 x 20 x 12 voxels" in end.printed
    project = copy_of(done, tmp_path / "p")
    project.set_environment(data_base_dir=str(tmp_path / "all"))
    larger = ["--set", "autoencoder_train.batch_size=40"]
    assert end_of(train_autoencoder, *project.argv("--no-amp", *larger)).code == 0
    trained_well(project, "autoencoder")


BAD_HEADERS = [  # field, value, index, whether there is an sform, why
    *(row(f"dim[0] {v}", "dim", v, 0, True, r"shape \(|vox offset") for v in (-1, 0, 1, 2, 8, 32767)),
    *(
        row(f"dim[{i}] {v}", "dim", v, i, True, r"shape \(|voxels cannot be read|covers")
        for i in (1, 2, 3)
        for v in (-32768, -1, 0, 1, 17, 32767)
    ),
    *(
        row(f"datatype {v}", "datatype", v, None, True, "cannot be read|its voxels are")
        for v in (-1, 0, 1, 2, 3, 8, 16, 32, 64, 128, 256, 768, 1024, 1280, 1536, 1792, 2048, 2304)
    ),
    *(
        row(f"vox_offset {v}", "vox_offset", v, None, True, "cannot be read")
        for v in (NAN, INF, -352, -1, 0, 1, 351, 353, 360, 1e6, 1e30)
    ),
    *(row(f"scl_slope {v}", "scl_slope", v, None, True, "scaling is infinite") for v in (INF, -INF)),
    row("scl_slope 3e38", "scl_slope", 3e38, None, True, "infinite voxels"),
    *(row(f"scl_inter {v}", "scl_inter", v, None, True, "intercept") for v in (NAN, INF, -INF)),
    row("scl_inter 1e30", "scl_inter", 1e30, None, True, "constant"),
    *(
        row(f"srow_{'xyz'[i]}[{i}] {v}", f"srow_{'xyz'[i]}", v, i, True, "not invertible|its voxels are")
        for i in (0, 1, 2)
        for v in (NAN, INF, 0, 1e-30, 1e30)
    ),
    *(row(f"srow_{a}[3] {v}", f"srow_{a}", v, 3, True, "not inv") for a in "xyz" for v in (NAN, INF)),
    *(row(f"srow_{a}[3] 1e30", f"srow_{a}", 1e30, 3, True, "origin") for a in "xyz"),
    *(
        row(f"magic {v!r}", "magic", v, None, True, "cannot be read as an image")
        for v in (b"", b"n+2", b"n+9", b"xxxx", b"n+1x", b"\xff" * 4)
    ),
    *(
        row(f"quatern_{a} {v}", f"quatern_{a}", v, None, False, "not invertible|w2 should be positive")
        for a in "bcd"
        for v in (NAN, INF, 2, 1e30)
    ),
    *(row(f"qoffset_{a} {v}", f"qoffset_{a}", v, None, False, "not inv") for a in "xyz" for v in (NAN, INF)),
    *(row(f"qoffset_{a} 1e30", f"qoffset_{a}", 1e30, None, False, "origin") for a in "xyz"),
    *(
        row(f"pixdim[{i}] {v}", "pixdim", v, i, False, "not invertible|its voxels are")
        for i in (1, 2, 3)
        for v in (NAN, INF, 1e-30, 1e30)
    ),
    *(row(f"pixdim[{i}] 0", "pixdim", 0, i, False, "its voxels are") for i in (1, 2, 3)),
    *(row(f"qform_code {v}", "qform_code", v, None, False, "qform_code") for v in (-1, 99, 32767)),
]


def beside_good(project: Project, path: Path, **label) -> None:
    """Let the project's data be three good scans, one of them held out, and this one."""
    good = [{"image": str(project.data / f"imagesTr/scan_{i}.nii.gz")} for i in (0, 1, 2)]
    cases = project.folder / "cases.json"
    lists = {"training": [*good[1:], {"image": str(path), **label}], "validation": good[:1]}
    cases.write_text(json.dumps(lists))
    project.set_environment(data_base_dir=str(cases))


def table_of(end: End) -> list[str]:
    """The rows of `check_data.py`'s table: between what was found, the headings, and the count."""
    return [line for line in end.printed.splitlines() if not line.startswith("note: ")][2:-1]


def listed(end: End, path: Path, why: str) -> None:
    """`check_data.py` found one file with problems, this reason among them."""
    rows = table_of(end)
    assert end.code == 2 and rows and all(str(path) in row for row in rows), end
    assert any(re.search(why, row.split(str(path))[1]) for row in rows), rows


def all_listed(project: Project, bad: dict[Path, str], entries: list[dict] | None = None) -> None:
    """`check_data.py` names each of these files, beside two good ones, and first its reason."""
    good = [{"image": str(project.data / f"imagesTr/scan_{i}.nii.gz")} for i in (0, 1)]
    cases = project.folder / "all.json"
    entries = entries or [*good, *({"image": str(path)} for path in bad)]
    cases.write_text(json.dumps({"training": entries}))
    end, rows = end_of(check_data, cases), {}
    for line in table_of(end):
        path = next(path for path in bad if f" {path} " in line)
        rows.setdefault(path, []).append(line.split(str(path))[1])
    assert end.code == 2 and end.printed.endswith(f" problems in {len(bad)} cases\n"), end
    wrong = {str(path): rows.get(path) for path, why in bad.items() if not re.search(why, rows[path][0])}
    assert not wrong, wrong


def ends_a_training(project: Project, path: Path, why: str, *more, **label) -> None:
    """In an error that names the file and the reason, with nothing trained."""
    shutil.rmtree(project.model_dir, ignore_errors=True)
    beside_good(project, path, **label)
    end = end_of(train_autoencoder, *project.argv("--no-amp", *more))
    refused(end, label.get("label", path), code=2)
    assert re.search(why, end.error), end.error
    assert not (project.model_dir / "autoencoder.pt").exists()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_headers_that_are_damaged_are_refused(project, ending):
    """All of them at once by `check_data.py`; of each reason one ends a training."""
    bad, one_of_each = {}, {}
    for number, parameters in enumerate(table("headers refused", BAD_HEADERS)):
        field, value, index, sform, why = parameters.values
        path = project.folder / f"bad_{number:03}{ending}"
        bad[save(path, with_field(nifti(9, sform), field, value, index))] = why
        one_of_each[why] = path
    all_listed(project, bad)
    for why, path in one_of_each.items() if ending == ".nii.gz" else ():
        ends_a_training(project, path, why)


# ---------------------------------------------------------------- images: the file

PLAIN = nifti(7)
PACKED = gzip.compress(PLAIN, 6, mtime=0)
GZIP = r"cannot be read as an image|its voxels cannot be read"


def flip(content: bytes, place: int, bits: int = 1) -> bytes:
    changed = bytearray(content)
    changed[place] ^= bits
    return bytes(changed)


def mgz(content: Callable[[bytes], bytes] = bytes) -> bytes:
    """A .mgz whose content went through a function before it was packed."""
    image = nib.MGHImage(scan(7).astype(np.float32), AFFINE)
    return gzip.compress(content(image.to_bytes()), 6, mtime=0)


FILES = [  # name, content, why it is refused; None: it is read as what it was
    *(row(f".nii cut at {n}", "a.nii", PLAIN[:n], GZIP) for n in (0, 1, 100, 347, 348, 351, 352, 353, 4000)),
    row(".nii cut by 1", "a.nii", PLAIN[:-1], GZIP),
    row(".nii and more", "a.nii", PLAIN + b"more", GZIP),
    row(".nii twice", "a.nii", PLAIN * 2, GZIP),
    *(row(f".nii.gz cut at {n}", "a.nii.gz", PACKED[:n], GZIP) for n in (0, 1, 2, 9, 10, 11, 300, 3000)),
    *(row(f".nii.gz cut by {n}", "a.nii.gz", PACKED[:-n], GZIP) for n in (1, 4, 8, 9)),
    row(".nii.gz and more", "a.nii.gz", PACKED + b"what is this", GZIP),
    row(".nii.gz and zeros", "a.nii.gz", PACKED + bytes(64), None),
    *(row(f"gzip header byte {n}", "a.nii.gz", flip(PACKED, n), GZIP) for n in (0, 1, 2)),
    *(row(f"gzip header byte {n}", "a.nii.gz", flip(PACKED, n), None) for n in (4, 5, 6, 7, 8, 9)),
    *(row(f"gzip flag {1 << n}", "a.nii.gz", flip(PACKED, 3, 1 << n), GZIP) for n in (2, 3, 4)),
    row("gzip flag 1: it is text", "a.nii.gz", flip(PACKED, 3, 1), None),
    *(
        row(f"flipped bit at {share:.0%}", "a.nii.gz", flip(PACKED, int(share * len(PACKED)), 4), GZIP)
        for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    ),
    *(row(f"flipped bit in the checksum, {n}", "a.nii.gz", flip(PACKED, -n), GZIP) for n in (8, 7, 6, 5)),
    *(row(f"flipped bit in the length, {n}", "a.nii.gz", flip(PACKED, -n), GZIP) for n in (4, 3, 2, 1)),
    row("two members", "a.nii.gz", gzip.compress(PLAIN[:3000]) + gzip.compress(PLAIN[3000:]), None),
    row("a second member", "a.nii.gz", PACKED + PACKED, GZIP),
    row("a second, empty member", "a.nii.gz", PACKED + gzip.compress(b""), None),
    row("packed twice", "a.nii.gz", gzip.compress(PACKED), GZIP),
    row("not packed", "a.nii.gz", PLAIN, GZIP),
    row("packed, named .nii", "a.nii", PACKED, GZIP),
    row("packed zeros", "a.nii.gz", gzip.compress(bytes(len(PLAIN))), GZIP),
    row("voxels missing", "a.nii.gz", gzip.compress(PLAIN[:-2]), GZIP),
    row("voxels too many", "a.nii.gz", gzip.compress(PLAIN + b"\0\0"), GZIP),
    row("bombs are not unpacked to no end", "a.nii.gz", gzip.compress(PLAIN + bytes(10**7)), GZIP),
    row("text", "a.nii.gz", b"This is no image.\n" * 100, GZIP),
    row("packed text", "a.nii.gz", gzip.compress(b"This is no image.\n" * 100), GZIP),
    row("html", "a.nii.gz", b"<!DOCTYPE html><title>Sign in</title>", GZIP),
    row("git-lfs pointer", "a.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", GZIP),
    row("zip", "a.nii.gz", b"PK\x03\x04" + bytes(100), GZIP),
    row("png", "a.nii", b"\x89PNG\r\n\x1a\n" + bytes(500), GZIP),
    row("dicom", "a.nii", bytes(128) + b"DICM" + bytes(500), GZIP),
    row("mgz", "a.mgz", mgz(), None),
    *(row(f"mgz cut at {n}", "a.mgz", mgz()[:n], GZIP) for n in (0, 1, 100, 2000)),
    row("mgz cut by 4", "a.mgz", mgz()[:-4], GZIP),
    row("mgz flipped bit", "a.mgz", flip(mgz(), 1500, 4), GZIP),
    row("mgz flipped checksum", "a.mgz", flip(mgz(), -6), GZIP),
    row("mgz not packed", "a.mgz", gzip.decompress(mgz()), GZIP),
    row("mgz voxels missing", "a.mgz", mgz(lambda c: c[: 284 + 500]), GZIP),
    row("mgz of NIfTI", "a.mgz", PACKED, GZIP),
    row("NIfTI of mgz", "a.nii.gz", mgz(), GZIP),
    row("mgz version", "a.mgz", mgz(lambda c: flip(c, 0)), GZIP),
    row("mgz shape", "a.mgz", mgz(lambda c: flip(c, 4)), r"shape|covers|" + GZIP),
    row("mgz type", "a.mgz", mgz(lambda c: flip(c, 23, 8)), GZIP),
    row("mgz spacing", "a.mgz", mgz(lambda c: c[:30] + b"\x7f\xc0\x00\x00" * 3 + c[42:]), "affine"),
]


def test_files_that_are_damaged_are_refused(project):
    """All of them at once by `check_data.py`; some, whose damage only the voxels show, end a training.
    Where nothing is lost, the file reads as what it was."""
    bad, named = {}, {}
    twin = ONE((save(project.folder / "twin.nii", PLAIN),))
    for number, parameters in enumerate(table("files", FILES)):
        name, content, why = parameters.values
        path = named[parameters.id] = project.folder / f"{number:03}_{name}"
        path.write_bytes(content)
        if why:
            bad[path] = why
        else:
            near = 1e-3 if "mgz" in name else 0
            np.testing.assert_allclose(ONE((path,)), twin, atol=near, err_msg=parameters.id)
    all_listed(project, bad)
    for one in ("flipped bit at 50%", ".nii.gz cut by 1", "a second member", "html", "mgz voxels missing"):
        ends_a_training(project, named[one], bad[named[one]])


@pytest.mark.parametrize("kind", table("files", ["folder", "link to nothing", "link to itself"]))
def test_what_is_no_file(project, kind):
    """In a plain folder, among good scans: passed over, and said."""
    folder = project.folder / "scans"
    shutil.copytree(project.data / "imagesTr", folder)
    path = folder / "x.nii.gz"
    if kind == "folder":
        path.mkdir()
    else:
        try:
            path.symlink_to(path if kind == "link to itself" else folder / "nothing.nii.gz")
        except OSError:
            pytest.skip("no links here")
    project.set_environment(data_base_dir=str(folder))
    end = end_of(check_data, folder)
    what = "1 folder named like an image" if kind == "folder" else "1 link to nowhere"
    assert end.code == 0 and f"passed over: {what} (x.nii.gz)" in end.printed


# ---------------------------------------------------------------- labels

LABEL = nifti(9, label=True)
FOREGROUND = (
    *("--set", "autoencoder_train.augment.foreground_prob=1"),
    *("--set", "autoencoder_train.patch_size=[8,8,8]"),
    *("--set", "autoencoder_train.adversarial_weight=0"),
)


def label_of(values: np.ndarray, affine: np.ndarray = AFFINE) -> bytes:
    return nib.Nifti1Image(values, affine).to_bytes()


MASK = (scan(9) > 200).astype(np.float32)

LABELS = [
    row("empty file", b"", "cannot be read"),
    row("text", b"no image" * 100, "cannot be read"),
    row("shape", label_of(MASK.astype(np.uint8)[1:]), "shape"),
    row("4D", label_of(np.stack([MASK.astype(np.uint8)] * 2, -1)), "4D"),
    row("2D", label_of(MASK.astype(np.uint8)[..., 0]), "shape"),
    row("moved", label_of(MASK.astype(np.uint8), AFFINE + np.eye(4, k=3)), "lies elsewhere"),
    row("mirrored", label_of(MASK.astype(np.uint8), AFFINE * [-1, 1, 1, 1]), "lies elsewhere"),
    row("cut", LABEL[:-100], "cannot be read"),
    row("goes on", LABEL + b"more", "cannot be read"),
    row("colours", label_of(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "colours"),
    row("complex", label_of(MASK.astype(np.complex64)), "complex"),
    row("affine", with_field(LABEL, "srow_x", NAN, 0), "affine"),
    row("scaling", with_field(LABEL, "scl_slope", INF), "scaling"),
    row("NaN", label_of(np.where(MASK > 0, NAN, MASK)), "NaN"),
    row("infinite", label_of(np.where(MASK > 0, INF, MASK)), "NaN|inf"),
    row("fractions", label_of(MASK / 2), "whole"),
    row("below 0", label_of(-MASK), "0 to 255"),
    row("256", label_of((MASK * 256).astype(np.int16)), "0 to 255"),
]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_labels_that_are_wrong(project, ending):
    """All of them at once by `check_data.py`; each ends a training that crops about labels."""
    bad, entries = {}, []
    for number, parameters in enumerate(table("labels", LABELS)):
        content, why = parameters.values
        image = save(project.folder / f"image_{number}.nii.gz", nifti(100 + number))
        label = save(project.folder / f"label_{number}{ending}", content)
        bad[label] = why
        entries.append({"image": str(image), "label": str(label)})
    label = str(save(project.folder / "good_label.nii", LABEL))
    all_listed(
        project, bad, [*entries, {"image": str(save(project.folder / "good.nii", nifti(9))), "label": label}]
    )
    for entry, why in zip(entries, bad.values(), strict=True) if ending == ".nii.gz" else ():
        ends_a_training(project, Path(entry["image"]), why, *FOREGROUND, label=entry["label"])


def test_a_label_that_no_one_asks_for_keeps_no_one_from_training(project):
    beside_good(
        project,
        save(project.folder / "image.nii.gz", nifti(9)),
        label=str(save(project.folder / "label.nii", b"no image")),
    )
    assert end_of(train_autoencoder, *project.argv("--no-amp")).code == 0


# ---------------------------------------------------------------- lists of cases

SCANS = [{"image": f"imagesTr/scan_{i}.nii.gz"} for i in range(4)]


def first(**entry) -> dict:
    return {"training": [{**SCANS[0], **entry}, *SCANS[1:]]}


CASES = [  # what the file holds, and what the error names
    row("empty", b"", "JSON"),
    row("list", b"[]", "object"),
    row("truncated", b'{"training": [', "JSON"),
    row("utf-16", json.dumps({"training": SCANS}).encode("utf-16"), "JSON"),
    row("binary", b"\x80\xff\x00", "JSON"),
    row("deep", b"[" * 100_000, "JSON"),
    row("twice", b'{"training": [], ' + json.dumps({"training": SCANS}).encode()[1:], "the key 'training'"),
    *(row(f"training {v!r}", {"training": v}, "training") for v in (None, "x", 3, {"a": 1}, [])),
    row("no training", {"numTraining": 4}, "training"),
    *(row(f"entry {v!r}", {"training": [v, *SCANS]}, "entry 0") for v in (None, 3, [], {}, [["a"]])),
    *(row(f"image {v!r}", first(image=v), "entry 0") for v in (None, 3, [], [3], {}, True)),
    row("image empty", first(image=""), "is not there"),
    row("image a folder", first(image="imagesTr"), "imagesTr"),
    row("image nowhere", first(image="imagesTr/nowhere.nii.gz"), "nowhere.nii.gz"),
    row("image with nul", first(image="a\0b"), "is not there"),
    row("image with half a surrogate pair", first(image="\ud800"), "is not there"),
    row("image no image", first(image="dataset.json"), "dataset.json"),
    row("label nowhere", first(label="nowhere.nii.gz"), "nowhere.nii.gz"),
    *(row(f"label {v!r}", first(label=v), "label") for v in (3, ["a"], {}, True)),
    row("a case twice", {"training": SCANS + SCANS[:1]}, "scan_0"),
    row("a name twice", {"training": [{**one, "name": "same"} for one in SCANS]}, "same"),
]
FOLDER = [
    *(row(f"channel_names {v!r}", {"channel_names": v}, "channel_names") for v in (None, [], "x", 3)),
    row("no channels", {"channel_names": {}}, "channel"),
    *(
        row(f"file_ending {v!r}", {"channel_names": {"0": "T1"}, "file_ending": v}, "file_ending")
        for v in (3, [".nii"], ".png", None, "")
    ),
    row("no such files", {"channel_names": {"0": "T1"}, "file_ending": ".nii"}, "imagesTr"),
]


@pytest.mark.parametrize("layout", ["dataset.json", "list.json"])
@pytest.mark.parametrize("content, named", table("lists of cases", CASES, each=2))
def test_a_list_of_cases_that_is_wrong(project, content, named, layout):
    listed_in(project, content, layout)
    end = end_of(check_data, project.folder / "data" / ("" if layout == "dataset.json" else layout))
    assert end.code == 2 and named in end.error + end.printed, end


@pytest.mark.parametrize("content, named", table("lists of cases", FOLDER))
def test_a_dataset_json_of_nnunet_that_is_wrong(project, content, named):
    listed_in(project, content, "dataset.json")
    refused(end_of(train_autoencoder, *project.argv("--no-amp")), named, code=2)


def listed_in(project: Project, content, layout: str) -> None:
    """Give the project data of its own, listed in this file."""
    folder = project.folder / "data"
    shutil.copytree(project.data / "imagesTr", folder / "imagesTr")
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / layout).write_bytes(content)
    project.set_environment(data_base_dir=str(folder if layout == "dataset.json" else folder / layout))


@pytest.mark.parametrize(
    "value", table("lists of cases", [row(repr(v), v) for v in ("x", {"a": 1}, [3], [{}], SCANS, True)])
)
def test_validation_cases_that_are_wrong(project, value):
    listed_in(project, {"training": SCANS, "validation": value}, "list.json")
    refused(end_of(train_autoencoder, *project.argv("--no-amp")), "list.json", code=2)


LABEL_NAMES = [
    *(row(repr(v), v) for v in (None, [], "x", {}, {"a": 1.5}, {"a": [[1]]}, {"-1": "x"}, {"a": None})),
    row("digits that are none", {"\u00b2": "x"}),
    row("5000 digits", {"1" * 5000: "x"}),
]


@pytest.mark.parametrize("value", table("names of labels", LABEL_NAMES))
def test_names_of_labels_that_say_nothing_are_passed_over(project, value):
    """Then any value from 0 to 255 will do."""
    listed_in(project, {**first(label="labelsTr/label.nii"), "labels": value}, "dataset.json")
    scan_0 = nib.load(project.data / "imagesTr/scan_0.nii.gz")
    save(
        project.folder / "data/labelsTr/label.nii",
        label_of((scan_0.get_fdata() > 300).astype("u1"), scan_0.affine),
    )
    assert end_of(check_data, project.folder / "data").code == 0


PARTICIPANTS = [  # content, what the error names; None: fine
    row("empty", b"", None),
    row("a head only", b"participant_id\tage\n", None),
    row("byte-order mark", b"\xef\xbb\xbfparticipant_id\tage\nsub-0\t3\n", None),
    row("line ends of Windows", b"participant_id\tage\r\nsub-0\t3\r\n", None),
    row("a subject that is not there", b"participant_id\tage\nsub-9\t3\n", None),
    row("no id", b"age\tsex\n3\tM\n", "participant_id"),
    row("commas", b"participant_id,age\nsub-0,3\n", "participant_id"),
    row("binary", b"\xff\xfe\x00", "UTF-8"),
    row("utf-16", "participant_id\tage\nsub-0\t3\n".encode("utf-16"), "UTF-8"),
    row("field of 200000 letters", b"participant_id\tage\nsub-0\t" + b"x" * 200_000, "table"),
    row("a subject twice", b"participant_id\tage\nsub-0\t3\nsub-0\t4\n", "sub-0"),
    row(
        "a quotation mark that is not closed",
        b'participant_id\tage\nsub-0\t"3\nsub-1\t4\nsub-2\t5\n',
        "table",
    ),
    row("more fields than columns", b"participant_id\tage\nsub-0\t3\t4\t5\n", "columns"),
]


@pytest.mark.parametrize("content, named", table("participants", PARTICIPANTS))
def test_a_table_of_participants(project, content, named):
    folder = project.folder / "bids"
    folder.mkdir()
    for i in range(3):
        shutil.copy(project.data / f"imagesTr/scan_{i}.nii.gz", folder / f"sub-{i}_T1w.nii.gz")
    (folder / "participants.tsv").write_bytes(content)
    end = end_of(check_data, folder)
    if named is None:
        assert end.code == 0
    else:
        refused(end, "participants.tsv", named, code=2)


# ---------------------------------------------------------------- checkpoints: the content


class DELETED:
    """Stands for an entry that is left out; a class, since each process has to call it the same."""


def altered(source: Path, target: Path, path: tuple, value) -> Path:
    """A checkpoint with another value at a path: given, made of the old one, or deleted."""
    content = torch.load(source, weights_only=True)
    section = content
    *sections, last = path
    for key in sections:
        section = section[key]
    if value is DELETED:
        del section[last]
    else:
        section[last] = value(section[last]) if callable(value) else value
    torch.save(content, target)
    return target


def weight(change: Callable) -> Callable[[dict], dict]:
    """Change the first weight of a state dict."""

    def changed(state: dict) -> dict:
        name = next(iter(state))
        return {**state, name: change(state[name])}

    return changed


NUMBERS = ("epoch", "batch", "step", "batches_per_epoch", "masked", "lines", "seconds")
ADAM = ("stepper", "optimizer", "state", 0)
GROUP = ("stepper", "optimizer", "param_groups", 0)

RESUMED = [  # path, value: of autoencoder_last.pt and diffusion_unet_last.pt
    *(row(f"{k} {v!r}", (k,), v) for k in NUMBERS for v in ("x", -1, None, NAN, [], torch.zeros(3))),
    *(row(f"no {key}", (key,), DELETED) for key in (*NUMBERS, "sums", "config", "model", "stepper")),
    *(row(f"sums {v!r}", ("sums",), v) for v in ("x", None, [], {"loss": 3}, {"loss": torch.zeros(3)})),
    *(row(f"format {v!r}", ("format",), v) for v in ("1", None, [], 2, HUGE, torch.ones(2))),
    *(row(f"config {v!r}", ("config",), v) for v in ("x", None, [], 3)),
    *(row(f"model {v!r}", ("model",), v) for v in ("x", None, [], {}, {"a": 3}, {3: torch.ones(1)})),
    *(row(f"stepper {v!r}", ("stepper",), v) for v in ("x", None, [])),
    *(row(f"ema {v!r}", ("ema",), v) for v in ("x", [], {"a": 1})),
    row("no ema", ("ema",), DELETED),
    row("nothing in the stepper", ("stepper",), {}),
    row("weights NaN", ("model",), weight(lambda w: w * NAN)),
    row("weights infinite", ("model",), weight(lambda w: w + INF)),
    row("weight of another shape", ("model",), weight(lambda w: w[:1])),
    row("weight sparse", ("model",), weight(lambda w: w.to_sparse())),
    row("weight more", ("model", "more"), torch.ones(1)),
    row("weights of integers", ("model",), weight(lambda w: w.int())),
    row("weights complex", ("model",), weight(lambda w: w.to(torch.complex64))),
    row("no state of the optimiser", ("stepper", "optimizer", "state"), {}),
    row("no groups", ("stepper", "optimizer", "param_groups"), []),
    row("no optimiser", ("stepper", "optimizer"), DELETED),
    row("no mean", (*ADAM, "exp_avg"), DELETED),
    row("mean as text", (*ADAM, "exp_avg"), "x"),
    row("mean of another shape", (*ADAM, "exp_avg"), torch.zeros(2, 2)),
    row("square of another shape", (*ADAM, "exp_avg_sq"), torch.zeros(2, 2)),
    row("mean NaN", (*ADAM, "exp_avg"), lambda t: t * NAN),
    row("square below 0", (*ADAM, "exp_avg_sq"), lambda t: -1 - t),
    row("steps of several", (*ADAM, "step"), torch.zeros(2, 2)),
    row("one beta", (*GROUP, "betas"), [1]),
    row("rate as text", (*GROUP, "lr"), "x"),
]


@pytest.mark.parametrize("script", [train_autoencoder, train_diffusion])
def test_checkpoints_to_resume_from_that_are_wrong(models, script):
    """Each is refused by name, and what was there stays as it was; or its numbers end the run before they are
    saved."""
    name = "autoencoder" if script is train_autoencoder else "diffusion_unet"
    source, bad = models.model_dir / f"{name}_last.pt", models.folder / "bad.pt"
    weights, read = {one: fingerprint(models.model_dir)[one] for one in MODELS}, []
    for parameters in table("checkpoints to resume", RESUMED):
        altered(source, bad, *parameters.values)
        if message := refusal_of(load_training_checkpoint, bad, name):
            assert "bad.pt" in message, parameters.id
            read.append(parameters.values)
        if message is None or len(read) == 1:
            end = end_of(script, *models.argv("--no-amp", "--resume", bad, *LONGER))
            refused(end)
            assert "bad.pt" in end.error or "not finite" in end.error, parameters.id
            assert {one: fingerprint(models.model_dir)[one] for one in MODELS} == weights, parameters.id
    assert 1 < len(read) < len(RESUMED)


AUTOENCODERS = [  # of autoencoder.pt, through stage 2 and through inference
    *(row(f"format {v!r}", ("format",), v) for v in ("1", None, [], 2, torch.ones(2))),
    *(row(f"model {v!r}", ("model",), v) for v in (DELETED, "x", None, [], {}, {"a": 3}, torch.ones(2))),
    *(row(f"config {v!r}", ("config",), v) for v in ("x", None, [], 3, {})),
    row("no definition", ("config", "autoencoder_def"), DELETED),
    row("another definition", ("config", "autoencoder_def"), {}),
    row("weight of another shape", ("model",), weight(lambda w: w[:1])),
    row("weight sparse", ("model",), weight(lambda w: w.to_sparse())),
    row("weight more", ("model", "more"), torch.ones(1)),
    row("weights NaN", ("model",), weight(lambda w: w * NAN)),
    row("weights infinite", ("model",), weight(lambda w: w + INF)),
    row("weights of integers", ("model",), weight(lambda w: w.int())),
    row("weights complex", ("model",), weight(lambda w: w.to(torch.complex64))),
]


@pytest.mark.parametrize("path, value", table("autoencoders", AUTOENCODERS, each=2))
def test_an_autoencoder_that_is_wrong(models, path, value):
    bad = altered(models.model_dir / "autoencoder.pt", models.folder / "bad.pt", path, value)
    if message := refusal_of(load_checkpoint, bad, "autoencoder"):
        assert "bad.pt" in message
        return
    refused(end_of(inference, *models.argv("--steps", 1, "--autoencoder", bad)), "bad.pt")
    end = end_of(train_diffusion, *models.argv("--no-amp", "--fresh", "--autoencoder", bad))
    refused(end)
    assert "bad.pt" in end.error or "latents have variance nan" in end.error


THREE = ([], [1], [1, 2], [0, 0, 0], [NAN] * 3, ["a"] * 3, "x", None, DELETED)
UNETS = [  # of diffusion_unet.pt, through inference
    *(row(f"format {v!r}", ("format",), v) for v in ("1", None, [], 2, torch.ones(2))),
    *(row(f"model {v!r}", ("model",), v) for v in (DELETED, "x", None, [], {}, {"a": 3})),
    *(row(f"config {v!r}", ("config",), v) for v in ("x", None, [], 3, {})),
    *(row(f"factor {v!r}", ("scale_factor",), v) for v in ("x", [], 0, -1, NAN, INF, HUGE)),
    row("no factor", ("scale_factor",), DELETED),
    *(row(f"geometry {v!r}", ("geometry",), v) for v in ("x", None, [], 3, {})),
    *(row(f"spacing {v!r}", ("geometry", "spacing"), v) for v in THREE),
    row("spacing mirrored", ("geometry", "spacing"), [-1, 2, 2]),
    *(row(f"size {v!r}", ("geometry", "size"), v) for v in THREE),
    *(row(f"limits {v!r}", ("geometry", "limits"), v) for v in (*THREE, [[1, 0]], [[NAN, 1]])),
    *(
        row(f"latent_shape {v!r}", ("latent_shape",), v)
        for v in ("x", None, [], [3], [3, 8, 10], [4, 8, 10, 6], [3, 0, 8, 8], [3, 7, 9, 5], [3, 2, 2, 2])
    ),
    row("latents too many", ("latent_shape",), [3, 10**4, 10**4, 10**4]),
    row("weight of another shape", ("model",), weight(lambda w: w[:1])),
    row("weight more", ("model", "more"), torch.ones(1)),
    row("weights NaN", ("model",), weight(lambda w: w * NAN)),
    row("weights infinite", ("model",), weight(lambda w: w + INF)),
    row("weights of integers", ("model",), weight(lambda w: w.int())),
]


@pytest.mark.parametrize("path, value", table("diffusion models", UNETS))
def test_a_diffusion_model_that_is_wrong(models, path, value):
    bad = altered(models.model_dir / "diffusion_unet.pt", models.folder / "bad.pt", path, value)
    if message := refusal_of(load_checkpoint, bad, "unet"):
        assert "bad.pt" in message
        return
    refused(end_of(inference, *models.argv("--steps", 1, "--unet", bad)))
    assert not models.output_dir.exists() or not list(models.output_dir.glob("*.nii.gz"))


# ---------------------------------------------------------------- checkpoints: the file


class Command:
    """What unpickles as `os.system(command)`."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f'echo > "{self.marker}"',)


def overwritten(share: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = int(share * (len(content) - 64))
        return content[:at] + bytes(b ^ 0x55 for b in content[at : at + 64]) + content[at + 64 :]

    return change


def with_member(name: str) -> Callable[[bytes], bytes]:
    """The zip with one more file in it, its checksum right."""

    def change(content: bytes) -> bytes:
        buffer = io.BytesIO(content)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(name, b"more")
        return buffer.getvalue()

    return change


DAMAGE = [
    row("empty", lambda c: b""),
    *(row(f"cut at {n}", lambda c, n=n: c[:n]) for n in (1, 4, 100)),
    *(row(f"cut at {s:.0%}", lambda c, s=s: c[: int(s * len(c))]) for s in (0.1, 0.25, 0.5, 0.75, 0.99)),
    row("cut by 1", lambda c: c[:-1]),
    *(row(f"overwritten at {s:.0%}", overwritten(s)) for s in (0, 0.02, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1)),
    row("zeros", lambda c: bytes(len(c))),
    row("text", lambda c: b"no checkpoint" * 100),
    row("html", lambda c: b"<html>Please log in</html>"),
    row("json", lambda c: b'{"model": {}}'),
    row("pickle of numbers", lambda c: pickle.dumps({"model": 3})),
    row("safetensors", lambda c: (8).to_bytes(8, "little") + b'{"a":{}}'),
    row("zip of nothing", lambda c: b"PK\x05\x06" + bytes(18)),
    row("gzip", lambda c: gzip.compress(c, 1)),
    row("another pickle of that name", with_member("archive/data.pkl")),
]


def damaged_end(models: Project, bad: Path, marker: Path) -> list[End]:
    """All ways in which a checkpoint is read."""
    return [
        end_of(train_autoencoder, *models.argv("--no-amp", "--resume", bad)),
        end_of(train_diffusion, *models.argv("--no-amp", "--resume", bad)),
        end_of(train_diffusion, *models.argv("--no-amp", "--fresh", "--autoencoder", bad)),
        end_of(inference, *models.argv("--steps", 1, "--autoencoder", bad)),
        end_of(inference, *models.argv("--steps", 1, "--unet", bad)),
    ]


def test_checkpoint_files_that_are_damaged(models):
    """The one function that reads them, and once each way that leads to it."""
    bad, content = models.folder / "bad.pt", (models.model_dir / "autoencoder_last.pt").read_bytes()
    for parameters in table("checkpoint files", DAMAGE):
        bad.write_bytes(parameters.values[0](content))
        message = refusal_of(load_checkpoint, bad)
        assert message and "bad.pt" in message, parameters.id
    for end in damaged_end(models, bad, models.folder / "marker"):
        refused(end, "bad.pt", code=2)


@pytest.mark.parametrize("kind", table("checkpoint files", ["folder", "missing"], each=5))
def test_a_checkpoint_that_is_no_file(models, kind):
    bad = models.folder / "bad.pt"
    if kind == "folder":
        bad.mkdir()
    for end in damaged_end(models, bad, models.folder / "marker"):
        refused(end, "bad.pt", code=2)


@pytest.mark.parametrize("zipped", table("checkpoint files", [True, False], each=5))
def test_a_checkpoint_runs_no_command(models, zipped):
    bad, marker = models.folder / "bad.pt", models.folder / "marker"
    content = torch.load(models.model_dir / "autoencoder_last.pt", weights_only=True)
    torch.save({**content, "more": Command(marker)}, bad, _use_new_zipfile_serialization=zipped)
    for end in damaged_end(models, bad, marker):
        refused(end, "bad.pt", code=2)
        assert not marker.exists()
    torch.load(bad, weights_only=False)  # the trap works
    assert marker.exists()


def test_a_zip_with_a_file_that_no_one_asks_for_is_the_same_checkpoint(models):
    path = models.model_dir / "autoencoder_last.pt"
    path.write_bytes(with_member("autoencoder_last/note.txt")(path.read_bytes()))
    end = end_of(train_autoencoder, *models.argv("--no-amp", *LONGER))
    assert end.code in (0, 2) and ("resumed in epoch" in end.printed or str(path) in end.error)


# ---------------------------------------------------------------- records of samples


@pytest.fixture
def sample(done, tmp_path) -> tuple[Path, dict]:
    """A record that was written beside a volume, in a folder of its own, and what it holds."""
    for path in done.output_dir.glob("sample_000001.*"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "sample_000001.json"
    return path, json.loads(path.read_text())


RECORDS = [
    row("another definition", "config", lambda c: {**c, "autoencoder_def": {}}),
    row("no unet", "config", lambda c: {k: v for k, v in c.items() if k != "diffusion_def"}),
    row("a class that is none", "config", lambda c: put(c, "autoencoder_def._target_", "os.system")),
    row("a definition as text", "config", lambda c: {**c, "diffusion_def": "os.system"}),
    row("no config", "config", lambda c: {}),
    row("a seed of another batch", "batch", lambda b: [7]),
    row("a seed below 0", "batch", lambda b: [-1, 1]),
    row("no batch", "batch", lambda b: []),
    row("steps of 0", "steps", lambda s: 0),
    row("steps beyond all memory", "steps", lambda s: 10**15),
    row("steps beyond 64 bits", "steps", lambda s: HUGE),
    row("a factor of 0", "scale_factor", lambda s: 0),
    row("a factor NaN", "scale_factor", lambda s: NAN),
    row("a factor infinite", "scale_factor", lambda s: INF),
    row("no threads", "threads", lambda t: 0),
    row("a million threads", "threads", lambda t: 10**6),
    row("a format to come", "format", lambda f: 2),
    row("a format as text", "format", lambda f: "1"),
    row("another checkpoint", "unet", lambda u: {**u, "sha256": "0" * 64}),
    row("a checkpoint that is not there", "unet", lambda u: {**u, "path": "nowhere.pt"}),
    row("a checkpoint with nul", "unet", lambda u: {**u, "path": "a\0b"}),
    row("a checkpoint that is a folder", "unet", lambda u: {**u, "path": "."}),
    row("a sampler of another family", "sampler", lambda s: "ddim"),
]


@pytest.mark.parametrize("key, change", table("records", RECORDS))
def test_a_record_that_is_wrong(sample, key, change):
    """Its hash of the config is made right, so that what is wrong is not hidden behind it."""
    path, record = sample
    record[key] = change(record[key])
    record["config_sha256"] = config_hash(record["config"])
    path.write_text(json.dumps(record))
    refused(end_of(inference, "--reproduce", path, "--device", "cpu"))
    assert not path.with_name("sample_000001_reproduced.nii.gz").exists()


def test_any_record(sample):
    path, whole = sample
    made, ends = path.with_name("sample_000001_reproduced.nii.gz"), []

    @settings(max_examples=20, **EXAMPLES)
    @given(mutated(whole))
    def check(record):
        assume(record.get("steps") in (1, 0, -1, None) or not isinstance(record["steps"], int))
        path.write_text(json.dumps(record))
        end = end_of(inference, "--reproduce", path, "--device", "cpu")
        ends.append(end.code)
        if end.code == 0:
            ours, first = (nib.load(p).get_fdata() for p in (made, path.with_suffix(".nii.gz")))
            np.testing.assert_allclose(ours, first, atol=1e-4 * np.ptp(first))
        made.unlink(missing_ok=True)

    check()
    assert ends.count(2) > 7
    TABLES["records by mutation"] = len(ends)


# ---------------------------------------------------------------- archives

TASK = "Task01_BrainTumour"


def archive(files: dict[str, bytes], sizes: dict[str, int] | None = None) -> bytes:
    """A tar of files below `TASK`; `sizes` is what its headers claim in place of the truth."""
    parts = []
    for name, content in files.items():
        member = tarfile.TarInfo(f"{TASK}/{name}")
        member.size = (sizes or {}).get(name, len(content))
        parts += [member.tobuf(), content, bytes(-len(content) % 512)]
    return b"".join([*parts, bytes(1024)])


def described(training, **more) -> dict[str, bytes]:
    """The files of a data set whose dataset.json says this."""
    content = json.dumps({"training": training, **more}).encode()
    return {"dataset.json": content, "imagesTr/a.nii.gz": b"a", "labelsTr/a.nii.gz": b"a"}


PAIR_OF_FILES = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
WHOLE_SET = described([PAIR_OF_FILES])


ARCHIVES = [
    row("gzip", gzip.compress(archive(WHOLE_SET))),
    row("xz", lzma.compress(archive(WHOLE_SET))),
    row("zip", b"PK\x03\x04" + bytes(1000)),
    row("headers overwritten", archive(WHOLE_SET)[:100] + b"x" * 300 + archive(WHOLE_SET)[400:]),
    row("zeros", bytes(10240)),
    row("cut in a file", archive(WHOLE_SET)[:1500]),
    row("a file larger than all disks", archive(WHOLE_SET, sizes={"labelsTr/a.nii.gz": 10**15})),
    row("dataset.json a folder", archive({"dataset.json/x": b"a"})),
    row("dataset.json empty", archive({**WHOLE_SET, "dataset.json": b""})),
    row("dataset.json a list", archive({**WHOLE_SET, "dataset.json": b"[]"})),
    row("dataset.json deep", archive({**WHOLE_SET, "dataset.json": b"[" * 10**5})),
    row("a folder where a file is due", archive({**WHOLE_SET, "imagesTr/a.nii.gz/x": b"a"})),
    *(row(f"training {v!r}", archive(described(v))) for v in (None, 3, "x", {}, [None], [3], [[]], ["a"])),
    *(
        row(f"image {v!r}", archive(described([{**PAIR_OF_FILES, "image": v}])))
        for v in (None, 3, [], {}, "", "imagesTr", "../outside", "a\0b", "long" * 100)
    ),
    *(row(f"test {v!r}", archive(described([PAIR_OF_FILES], test=v))) for v in (None, 3, [3], [{}], ["x"])),
]


@pytest.mark.parametrize("content", table("archives", ARCHIVES))
def test_an_archive_that_is_wrong(project, tmp_path, content):
    """With the MD5 that it has: it is refused for what it holds, and nothing of it stays."""
    packed = tmp_path / "packed.tar"
    packed.write_bytes(content)
    base = tmp_path / "new"
    project.set_environment(data_base_dir=str(base))
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    argv = ["-e", project.environment_file, "--url", packed.as_uri(), "--md5", md5]
    refused(end_of(download_brats_data, *argv), TASK, code=2)
    assert not base.exists() or not list(base.iterdir())
    assert packed.read_bytes() == content


def test_an_archive_that_is_whole_is_taken(project, tmp_path):
    """What the rows above differ from; with a file twice, the later one counts, as in any tar."""
    content = archive(WHOLE_SET)
    (tmp_path / "packed.tar").write_bytes(content)
    project.set_environment(data_base_dir=str(tmp_path / "new"))
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    url = (tmp_path / "packed.tar").as_uri()
    end = end_of(download_brats_data, "-e", project.environment_file, "--url", url, "--md5", md5)
    assert end.code == 0 and (tmp_path / "new" / TASK / "dataset.json").is_file()


# ---------------------------------------------------------------- files that scanners left

FINE = ["ok_4mm_int16.nii.gz", "orient_LPS.nii.gz", "slope0p5_inter-100_int16.nii.gz", "brain.mgz"]
ANISOTROPIC, CHANNELS = "anisotropic_4x4x20mm.nii.gz", "4d_3vol.nii.gz"
ODD = {  # what is expected of each
    **dict.fromkeys([*FINE, ANISOTROPIC], "handled"),
    CHANNELS: "handled alone, refused where others are 3D",
    "mask_ok_012.nii.gz": "a label",
    "mask_wrong_shape.nii.gz": "refused as a label",
    "broken_truncated_gzip.nii.gz": "refused",
    "nan_background.nii.gz": "refused",
}
table("odd files", list(ODD))


@pytest.fixture
def odd(shared_data) -> Path:
    return (shared_data / "odd").resolve()


def train_on(project: Project, *entries: dict | Path, more: tuple = ()) -> End:
    """Train at 4 mm on patches of 16 voxels, without the discriminator."""
    cases = project.folder / "odd.json"
    entries = [entry if isinstance(entry, dict) else {"image": str(entry)} for entry in entries]
    cases.write_text(json.dumps({"training": entries}))
    project.set_environment(data_base_dir=str(cases))
    project.change(spacing=[4, 4, 4])
    patches = {"patch_size": [16] * 3, "val_patch_size": [16] * 3, "adversarial_weight": 0}
    project.change(autoencoder_train={**project.config["autoencoder_train"], **patches})
    return end_of(train_autoencoder, *project.argv("--no-amp", *more))


def test_every_odd_file_is_expected(odd):
    assert {path.name for path in odd.iterdir()} == set(ODD)


def test_odd_files_that_are_handled(project, odd, tmp_path):
    """One brain in five formats is one volume; the thick slices are those of the file; and all train."""
    raw = nib.load(odd / FINE[0]).get_fdata()
    due = np.clip((raw - raw.min()) / (np.percentile(raw, 99.5) - raw.min()), 0, 1)[None]
    at_4mm = Preprocessing((0,), (4, 4, 4))
    for name in (*FINE, CHANNELS):
        np.testing.assert_allclose(at_4mm((odd / name,)), due, atol=1e-3, err_msg=name)  # .mgz has fractions
    thick = nib.load(odd / ANISOTROPIC).get_fdata()
    low, high = thick.min(), np.percentile(thick, 99.5)
    np.testing.assert_allclose(
        Preprocessing((0,), (4, 4, 20))((odd / ANISOTROPIC,))[0],
        np.clip((thick - low) / (high - low), 0, 1),
        atol=1e-5,
    )
    assert end_of(check_data, odd / "..").code in (0, 2)
    assert train_on(project, *(odd / name for name in [*FINE, ANISOTROPIC])).code == 0
    trained_well(project, "autoencoder")
    end = end_of(
        check_data, project.folder / "odd.json"
    )  # two of them hold the same voxels... as they should
    assert end.code == 0 or "the same voxels as" in end.printed


def test_the_odd_4d_file(project, odd, tmp_path):
    """Among files of its kind its channel 0 is trained on; among 3D files it is the odd one."""
    image, twin = nib.load(odd / CHANNELS), tmp_path / "twin.nii.gz"
    nib.save(nib.Nifti1Image(2 * np.asanyarray(image.dataobj), image.affine), twin)
    refused(train_on(project, *(odd / name for name in FINE), odd / CHANNELS), CHANNELS, "4D", code=2)
    shutil.rmtree(project.model_dir)
    assert train_on(project, odd / CHANNELS, twin).code == 0
    trained_well(project, "autoencoder")


@pytest.mark.parametrize(
    "name, why",
    [
        ("broken_truncated_gzip.nii.gz", "Compressed file ended"),
        ("nan_background.nii.gz", "50443 NaN"),
    ],
)
def test_odd_files_that_are_refused(project, odd, name, why):
    refused(train_on(project, *(odd / good for good in FINE), odd / name), name, why, code=2)
    end = end_of(check_data, project.folder / "odd.json")
    assert end.code == 2
    assert [why in line for line in end.printed.splitlines() if name in line] == [True]
    assert not (project.model_dir / "autoencoder.pt").exists()
    shutil.rmtree(project.model_dir)
    refused(train_on(project, odd / name), name, why, code=2)


def test_odd_masks(project, odd):
    """As labels: one lies on its image, one does not."""
    images = [str(odd / name) for name in FINE[:3]]
    good = [{"image": image, "label": str(odd / "mask_ok_012.nii.gz")} for image in images[::2]]
    foreground = ("--set", "autoencoder_train.augment.foreground_prob=1")
    assert train_on(project, *good, more=foreground).code == 0
    shutil.rmtree(project.model_dir)
    bad = {"image": images[0], "label": str(odd / "mask_wrong_shape.nii.gz")}
    end = train_on(project, {**good[1], "name": "good"}, bad, more=foreground)
    refused(end, "mask_wrong_shape.nii.gz", "(37, 48, 40)", code=2)
    listed(end_of(check_data, project.folder / "odd.json"), odd / "mask_wrong_shape.nii.gz", "shape")


# ---------------------------------------------------------------- how many


def test_there_are_many_inputs(capsys):
    by_hand = sum(count for kind, count in TABLES.items() if "by mutation" not in kind)
    assert by_hand >= 150
    with capsys.disabled():
        print(
            f"\n{sum(TABLES.values())} malformed inputs:",
            *(f"{v} {k}" for k, v in TABLES.items()),
            sep="\n  ",
        )
