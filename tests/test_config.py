"""Configs are data: the tutorial's own run here, wrong ones are refused with the key named."""

import errno
import functools
import importlib.util
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

import train_autoencoder
import utils
from ldm import UserError, configs, generation
from ldm.data import latent_cache
from ldm.data.intensity import Intensity
from ldm.data.prepare import patch_sizes
from ldm.diffusion.process import NoiseProcess
from ldm.environment import FOLDERS, check_writable
from ldm.losses import AutoencoderLoss
from ldm.models.definitions import resolve_references
from ldm.models.initialisation import start_as_block_transform
from ldm.system.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "config").glob("config_*.json"))


def tutorial(package: str = "monai", memory: int = 32) -> dict:
    """The config of MONAI's 3D latent diffusion tutorial, as it names things for this package."""
    channels, epochs = ("channels", "max_epochs") if package == "monai" else ("num_channels", "n_epochs")
    nets = f"{package}.networks.nets"
    batch, rate = ((2, 3), 1e-5) if memory == 32 else ((1, 2), 5e-6)
    return {
        "channel": 0,
        "spacing": [1.1, 1.1, 1.1],
        "spatial_dims": 3,
        "image_channels": 1,
        "latent_channels": 8,
        "autoencoder_def": {
            "_target_": f"{nets}.AutoencoderKL",
            "spatial_dims": "@spatial_dims",
            "in_channels": "$@image_channels",
            "out_channels": "@image_channels",
            "latent_channels": "@latent_channels",
            channels: [64, 128, 256],
            "num_res_blocks": 2,
            "norm_num_groups": 32,
            "norm_eps": 1e-06,
            "attention_levels": [False, False, False],
            "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False,
        },
        "autoencoder_train": {
            "batch_size": batch[0],
            "patch_size": [112, 128, 80],
            "lr": rate,
            "perceptual_weight": 0.001,
            "kl_weight": 1e-7,
            "recon_loss": "l1",
            epochs: 1200,
            "val_interval": 10,
        },
        "diffusion_def": {
            "_target_": f"{nets}.DiffusionModelUNet",
            "spatial_dims": "@spatial_dims",
            "in_channels": "@latent_channels",
            "out_channels": "@latent_channels",
            channels: [256, 256, 512],
            "attention_levels": [False, True, True],
            "num_head_channels": [0, 64, 64],
            "num_res_blocks": 2,
        },
        "diffusion_train": {
            "batch_size": batch[1],
            "patch_size": [144, 176, 112],
            "lr": rate,
            epochs: 10000,
            "val_interval": 2,
        },
        "NoiseScheduler": {"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195},
    }


@pytest.fixture
def load(tmp_path):
    """`load(config, *overrides)`: the config written to a file and read by the scripts' own reader."""

    def write_and_load(config, *overrides):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return utils.load_config(path, overrides)

    return write_and_load


def parameters(config: dict, key: str) -> int:
    """Number of parameters of a network that is never filled with numbers."""
    with torch.device("meta"):
        return sum(p.numel() for p in configs.define_network(config, key).parameters())


def refused(load, config, message, *overrides):
    with pytest.raises(UserError, match=message):
        load(config, *overrides)


def changed(path: str, value) -> dict:
    """The tutorial's config with another value at this path."""
    config = tutorial()
    *sections, last = path.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    return config


# ---- configs that are right


@pytest.mark.filterwarnings("ignore::FutureWarning:generative")
@pytest.mark.parametrize("package", ["monai", "generative"])
@pytest.mark.parametrize("memory", [16, 32])
def test_tutorial_config_builds_its_networks(load, package, memory):
    config = load(tutorial(package, memory))
    assert config["autoencoder_def"]["in_channels"] == 1 and config["diffusion_def"]["in_channels"] == 8
    # 21.0 M as published; the UNet's 189.3 M as published and the output projections, c^2 + c, of its
    # attention blocks: 5 of 256 channels (2 down, 3 up) and 6 of 512 (2 down, 1 in the middle, 3 up).
    assert parameters(config, "autoencoder_def") == 21_000_353
    assert parameters(config, "diffusion_def") == 189_325_576 + 5 * (256**2 + 256) + 6 * (512**2 + 512)
    assert config["autoencoder_train"]["max_epochs"] == 1200
    assert config["diffusion_train"]["max_epochs"] == 10000
    assert patch_sizes(config, [])[:2] == ([112, 128, 80], [144, 176, 112])
    process = NoiseProcess.from_config(config["NoiseScheduler"])
    assert process.prediction == "epsilon" and process.alphas_cumprod[0] == pytest.approx(1 - 0.0015)


def test_what_the_tutorial_leaves_out_is_the_references(load):
    config = load(tutorial())
    section = config["autoencoder_train"]
    assert section["adversarial_weight"] == 0.01 and section["adversarial_warmup_epochs"] == 5
    assert section["discriminator"] == {"channels": 32, "num_layers_d": 3, "norm": "INSTANCE"}
    assert Intensity.from_config(config) == Intensity(0.0, 99.5, clip=True)
    assert config["NoiseScheduler"]["schedule"] == "scaled_linear_beta"
    assert config["seed"] == 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_is_whole(path):
    config = utils.load_config(path)
    AutoencoderLoss(config["autoencoder_train"], None)  # needs no file of weights
    sizes = [parameters(config, key) for key in ("autoencoder_def", "diffusion_def")]
    if path.stem == "config_demo":
        assert sum(sizes) < 50e6  # for a laptop
    if path.stem.startswith("config_train_"):  # the published networks, for BraTS
        transposed = path.stem.endswith("_fast")  # convolutions
        assert sizes == [19_443_873 if transposed else 21_000_353, 189_325_576]
        assert patch_sizes(config, [])[:2] == ([112, 128, 80], [144, 176, 112])
    if config["autoencoder_train"]["initialise"] == "block_transform":
        network = configs.define_network(config, "autoencoder_def")
        start_as_block_transform(network, torch.rand(1, 1, 16, 16, 16))
    NoiseProcess.from_config(config["NoiseScheduler"])
    assert utils.load_config(path) == config  # reading changes nothing


def test_resolved_config_reads_back_as_itself(load, tmp_path):
    config = load(tutorial())
    write_json(tmp_path / "resolved.json", config)
    assert utils.load_config(tmp_path / "resolved.json") == config


def test_a_window_takes_the_place_of_the_percentiles(load, tmp_path):
    config = load({**tutorial(), "intensity": {"window": [-1000, 1000]}})
    assert Intensity.from_config(config) == Intensity(None, None, window=((-1000.0, 1000.0),))
    write_json(tmp_path / "resolved.json", config)
    assert utils.load_config(tmp_path / "resolved.json") == config
    two = {"channel": [1, 0], "image_channels": 2, "intensity": {"window": [[0, 1], [2, 3]]}}
    assert Intensity.from_config(load({**tutorial(), **two})).window == ((0.0, 1.0), (2.0, 3.0))
    weights_from_elsewhere = config | {"spacing": [1, 1, 1]}
    geometry = generation.geometry_of({}, weights_from_elsewhere, tmp_path)
    assert geometry["limits"] == [[-1000, 1000]]


def test_older_checkpoints_and_caches_have_the_same_intensities(load):
    config = load(tutorial())
    old = {"lower_percentile": 0.0, "upper_percentile": 99.5, "clip": True}
    assert configs.completed({**config, "intensity": old})["intensity"] == config["intensity"]
    assert latent_cache.dependencies(config)["intensity"] == old
    config["intensity"]["window"] = [0, 1]
    assert latent_cache.dependencies(config)["intensity"] == {**old, "window": [0, 1]}


def test_every_key_of_the_schema_is_read():
    """By its name in the code: one that is not changes nothing, whatever it is set to."""
    schema = json.loads((ROOT / "config/schema.json").read_text(encoding="utf-8"))
    files = [*ROOT.glob("*.py"), *ROOT.glob("ldm/**/*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files)

    def keys(about: dict) -> set[str]:
        while "$ref" in about:
            about = functools.reduce(dict.__getitem__, about["$ref"].removeprefix("#/").split("/"), schema)
        below = about.get("properties", {})
        return set(below).union(*map(keys, below.values()))

    passed_on = {"num_layers_d", "norm"}  # whole, to the class of the discriminator
    assert {key for key in keys(schema) - passed_on if f'"{key}"' not in code} == set()


def test_documentation_is_generated_from_the_schema():
    spec = importlib.util.spec_from_file_location("make_config_md", ROOT / "docs" / "make_config_md.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    schema = json.loads((ROOT / "config" / "schema.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == module.page(schema)


# ---- --set


def test_override_wins_over_file_and_file_over_default(load):
    config = tutorial()
    assert load(config)["autoencoder_train"]["lr"] == 1e-5
    loaded = load(config, "autoencoder_train.lr=8e-5", "autoencoder_train.recon_loss=l2", "latent_channels=4")
    assert loaded["autoencoder_train"]["lr"] == 8e-5 and loaded["autoencoder_train"]["recon_loss"] == "l2"
    assert loaded["autoencoder_def"]["latent_channels"] == loaded["diffusion_def"]["in_channels"] == 4
    del config["autoencoder_train"]["val_interval"], config["diffusion_train"]
    config["autoencoder_train"]["n_epochs"], config["diffusion_train"] = 7, {"n_epochs": 8}  # the older name
    loaded = load(config, "diffusion_train.augment.flip_axes=[0, 2]", "seed=5", "seed=6")
    assert loaded["autoencoder_train"]["max_epochs"] == 1200 and loaded["diffusion_train"]["max_epochs"] == 8
    assert load(config, "diffusion_train.max_epochs=3")["diffusion_train"]["max_epochs"] == 3
    assert loaded["autoencoder_train"]["val_interval"] == 10
    assert loaded["diffusion_train"]["augment"]["flip_axes"] == [0, 2]
    assert loaded["diffusion_train"]["augment"]["flip_prob"] == 0.5
    assert loaded["seed"] == 6  # the last one


@pytest.mark.parametrize(
    "override, message",
    [
        ("lr", "--set lr: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("autoencoder_train.learning_rate=1", "unknown key autoencoder_train.learning_rate"),
        ("autoencoder_train.lr=fast", r'autoencoder_train\.lr: expected a number above 0, found "fast"\.'),
        ("autoencoder_train.lr.first=1", "lr is not a section"),
        ("..=1", "unknown key"),
    ],
)
def test_override_that_is_wrong(load, override, message):
    refused(load, tutorial(), message, override)


# ---- configs that are wrong


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            "autoencoder_train.batchsize",
            2,
            "unknown key autoencoder_train.batchsize. Did you mean batch_size",
        ),
        ("difusion_train", {}, "unknown key difusion_train. Did you mean diffusion_train"),
        ("autoencoder_train.augment.flip_axis", [0], "augment.flip_axis. Did you mean flip_axes"),
        ("zzz", 1, r"unknown key zzz. docs/config\.md lists the keys"),
        ("autoencoder_train.lr", "1e-5", 'autoencoder_train.lr: expected a number above 0, found "1e-5".'),
        ("autoencoder_train.batch_size", 1.5, "expected a whole number from 1 to 65536, found 1.5"),
        ("autoencoder_train.batch_size", True, "batch_size: expected .*, found true"),
        ("autoencoder_train.patch_size", [64, 64], "patch_size: expected a list of 3 .* or null, found"),
        ("autoencoder_train.recon_loss", "l3", 'recon_loss: expected "l1" or "l2", found "l3".'),
        ("autoencoder_train", [], r"autoencoder_train: expected an object {...}, found \[\]\."),
        ("spatial_dims", 4, "spatial_dims: expected 2 or 3, found 4"),
        ("channel", "0", 'channel: expected a whole number from 0 to 65535 or a list of 1 .*, found "0"'),
        ("channel", [0, 0], r"channel: expected .*, each once, found \[0, 0\]"),
        ("spacing", [1, 1, 0], r"spacing\.2: expected a number above 0, found 0\."),
        ("seed", -1, "seed: expected a whole number from 0 to .*, found -1"),
        (
            "autoencoder_train.adam_betas",
            [0, 1],
            "betas.1: expected a number of at least 0 and below 1, found 1",
        ),
        ("data.pattern", 3, "data.pattern: expected text or null, found 3"),
        ("channel", [0, 1], r"channel names 2 channel\(s\), image_channels is 1"),
        ("longest_side", 64, "spacing and longest_side: set one of them"),
        ("intensity", {"lower_percentile": 99.5}, "lower_percentile must lie below upper_percentile"),
        ("intensity", {"lower_percentile": None}, "intensity: expected two percentiles, or a window"),
        ("intensity", {"window": [0, 1], "upper_percentile": 99}, "a window or percentiles, not both"),
        ("intensity", {"window": [1, 0]}, r"intensity.window: expected \[low, high\]"),
        ("intensity", {"window": [0, [1, 2]]}, r"intensity.window: expected \[low, high\]"),
        ("intensity", {"window": [[0, 1], [0, 1]]}, r"intensity.window: 2 pair\(s\) for 1 channel"),
    ],
)
def test_wrong_key_or_value_is_named(load, path, value, message):
    refused(load, changed(path, value), message)


def test_missing_network_is_named(load):
    config = tutorial()
    del config["autoencoder_def"]["_target_"]
    refused(load, config, "autoencoder_def._target_ is missing")
    del config["autoencoder_def"]
    refused(load, config, "autoencoder_def is missing")
    config = tutorial()
    del config["diffusion_def"]
    with pytest.raises(UserError, match="diffusion_def: missing"):
        configs.define_network(load(config), "diffusion_def")


@pytest.mark.parametrize(
    "value, message",
    [
        ("$__import__('os').system('exit 1')", "is an expression"),
        ("$1+1", "is an expression"),
        ("$", "is an expression"),
        ("@nowhere", "@nowhere refers to a key that the config does not have"),
        ("@autoencoder_train::nowhere", "@autoencoder_train::nowhere refers"),
        ("@", "refers to a key"),
        ("@diffusion_def::channels", "leads back to itself"),
    ],
)
def test_expression_or_reference_that_is_wrong(load, value, message):
    refused(load, changed("diffusion_def.channels", value), rf"diffusion_def\.channels: .*{message}")


def test_references():
    config = {"a": {"b": {"c": 3}}, "nested": "@a::b::c", "hash": "@a#b#c", "dollar": "$@a::b"}
    config |= {"chain": "@nested", "list": ["@nested", {"x": "@nested"}], "text": "a@b$c"}
    resolved = {"a": {"b": {"c": 3}}, "nested": 3, "hash": 3, "dollar": {"c": 3}}
    resolved |= {"chain": 3, "list": [3, {"x": 3}], "text": "a@b$c"}
    assert resolve_references(config, config, "config") == resolved


@pytest.mark.parametrize("config", [{"a": "@b", "b": "@c", "c": "@a"}, {"a": {"b": ["@c"]}, "c": "@a"}])
def test_reference_cycle(config):
    with pytest.raises(UserError, match="leads back to itself"):
        resolve_references(config, config, "config")


FOREIGN = [
    "monai.bundle.run",
    "os.system",
    "torch.nn.Linear",
    "monai.networks.nets.torch.load",
    "monai.networks.nets.resnet.torch",
    "monai.networks.nets.autoencoderkl.nn.Linear",
    "monai.networks.nets.resnet.get_pretrained_resnet_medicalnet",
    "monai.networks.nets",
    "monai.networks.netsx.AutoencoderKL",
    "generative.networks.nets.nowhere.AutoencoderKL",
    "AutoencoderKL",
    "",
]


@pytest.mark.parametrize("target", FOREIGN)
@pytest.mark.parametrize("section", ["autoencoder_def", "diffusion_def", "NoiseScheduler"])
def test_foreign_target_is_refused(load, section, target):
    refused(load, changed(f"{section}._target_", target), f"{section}: _target_ '{target}'")


def test_target_of_another_kind_or_misspelt(load):
    scheduler = "monai.networks.schedulers.DDPMScheduler"
    refused(load, changed("autoencoder_def._target_", scheduler), "not allowed")
    refused(load, changed("NoiseScheduler._target_", "monai.networks.nets.AutoencoderKL"), "not allowed")
    near = "Did you mean monai.networks.nets.AutoencoderKL"
    refused(load, changed("autoencoder_def._target_", "monai.networks.nets.AutoEncoderKL"), near)
    refused(
        load,
        changed("autoencoder_def.num_chanels", [8, 16]),
        r"autoencoder_def\.num_chanels: AutoencoderKL has no such argument\. Did you mean",
    )
    arguments = "autoencoder_def: AutoencoderKL refuses these arguments"
    refused(load, changed("autoencoder_def.norm_num_groups", 48), arguments)


@pytest.mark.parametrize(
    "key, size, message",
    [
        ("autoencoder_train", [112, 130, 81], "multiples of 4: 112 x 128 or 132 x 80 or 84"),
        ("diffusion_train", [150, 176, 112], "multiples of 16: 144 or 160 x 176 x 112"),
        ("diffusion_train", [8, 176, 112], "multiples of 16: 16 x 176 x 112"),
    ],
)
def test_patch_that_the_networks_do_not_divide(load, key, size, message):
    with pytest.raises(UserError, match=rf"{key}\.patch_size: .*{message}"):
        patch_sizes(load(changed(f"{key}.patch_size", size)), [])


# ---- files


def test_config_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"config .*gone\.json: cannot be read"):
        utils.load_config(tmp_path / "gone.json")
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("\udcff", "not valid JSON"),
    ):
        (tmp_path / "bad.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(UserError, match=message):
            utils.load_config(tmp_path / "bad.json")


ENVIRONMENT = {
    "data_base_dir": "data",
    "model_dir": "models",
    "tfevent_path": "events",
    "output_dir": "images",
    "resume_ckpt": False,
}


def environment(tmp_path, content) -> dict:
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return utils.load_environment(path)


def test_environment_of_the_tutorial(tmp_path):
    read = environment(tmp_path, ENVIRONMENT)
    assert read["data_base_dir"] == Path("data") and read["model_dir"] == Path("models")
    assert read["cache_dir"] == Path("models/cache")
    assert read["download_brats"] is False and read["perceptual_weights"] is None
    several = environment(tmp_path, ENVIRONMENT | {"data_base_dir": ["a", "b"], "cache_dir": "c"})
    assert several["data_base_dir"] == [Path("a"), Path("b")] and several["cache_dir"] == Path("c")
    utils.load_environment(ROOT / "config" / "environment.json.example")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_dri": "m"}, "unknown key model_dri. Did you mean model_dir"),
        ({"model_dir": 3}, "model_dir: expected a path of names of up to 255 printable characters, found 3"),
        ({"resume_ckpt": "true"}, 'resume_ckpt: expected true or false, found "true"'),
        ({"data_base_dir": {}}, "data_base_dir: expected a folder or a list of folders, found {}"),
        ({"data_base_dir": []}, "data_base_dir"),
        ({"perceptual_weights": True}, "perceptual_weights: expected .*, found true"),
    ],
)
def test_environment_that_is_wrong(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"environment\.json: {message}"):
        environment(tmp_path, ENVIRONMENT | change)
    for key in ("data_base_dir", "model_dir", "tfevent_path", "output_dir"):
        with pytest.raises(UserError, match=f"{key} is missing"):
            environment(tmp_path, {k: v for k, v in ENVIRONMENT.items() if k != key})


@pytest.mark.parametrize("key", FOLDERS)
def test_a_folder_for_results_that_is_a_file_is_named(tmp_path, key):
    (tmp_path / "file").touch()
    for value in (str(tmp_path / "file"), str(tmp_path / "file/below/it")):
        with pytest.raises(UserError, match=rf"environment\.json: {key} .*file is not a folder\."):
            environment(tmp_path, ENVIRONMENT | {key: value})


@pytest.mark.parametrize(
    "code, kind", [(errno.EACCES, UserError), (errno.EROFS, UserError), (errno.ENOSPC, OSError)]
)
def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path, monkeypatch, code, kind):
    def refuse(dir):
        raise OSError(code, os.strerror(code))

    check_writable(tmp_path / "a/b", "model_dir")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        kind, match="model_dir .*b: cannot be written" if kind is UserError else "space"
    ) as end:
        check_writable(tmp_path / "a/b", "model_dir")
    assert type(end.value) is kind


def test_a_byte_order_mark_is_read(tmp_path):
    """Which Windows editors put before the text."""
    for name, content in (("config.json", tutorial()), ("environment.json", ENVIRONMENT)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8-sig")
    assert utils.load_config(tmp_path / "config.json")["channel"] == 0
    assert utils.load_environment(tmp_path / "environment.json")["model_dir"] == Path("models")


def test_script_ends_with_one_line_and_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(changed("autoencoder_train.batchsize", 2)))
    Path("environment.json").write_text(json.dumps(ENVIRONMENT))
    with pytest.raises(SystemExit) as end:
        train_autoencoder.main(["-c", "config.json", "-e", "environment.json"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config.json: unknown key autoencoder_train.batchsize")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "environment.json"}  # nothing begun
