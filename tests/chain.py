"""What the tests of the scripts share: a data set, a config and an environment small enough to train on in a
second, the scripts run on them in process, and the arithmetic they should have done."""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import inference
import train_autoencoder
import train_diffusion
import utils
from ldm import configs
from ldm.evaluation.features import stacked

torch.set_num_threads(1)  # faster than several on networks this small, and bit for bit the same

ROOT = Path(__file__).resolve().parents[1]
SHAPE, SPACING = (16, 20, 12), (2.0, 1.5, 3.0)

CONFIG = {
    "channel": 0,
    "spacing": list(SPACING),
    "image_channels": 1,
    "latent_channels": 3,
    "data": {"num_workers": 0, "val_fraction": 0.34},
    "autoencoder_def": {
        "_target_": "monai.networks.nets.AutoencoderKL",
        "spatial_dims": 3,
        "in_channels": "@image_channels",
        "out_channels": "@image_channels",
        "latent_channels": "@latent_channels",
        "channels": [8, 16],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "attention_levels": [False, False],
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    },
    "autoencoder_train": {
        "batch_size": 2,
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "max_epochs": 6,
        "val_interval": 2,
        "ema_decay": 0.9,
        "gradient_weight": 0.5,
        "perceptual_weight": 0,
        "adversarial_warmup_epochs": 2,
        "discriminator": {"channels": 8, "num_layers_d": 1},
    },
    "diffusion_def": {
        "_target_": "monai.networks.nets.DiffusionModelUNet",
        "spatial_dims": 3,
        "in_channels": "@latent_channels",
        "out_channels": "@latent_channels",
        "channels": [8, 16],
        "attention_levels": [False, True],
        "num_head_channels": [0, 8],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
    },
    "diffusion_train": {
        "batch_size": 2,
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "max_epochs": 20,
        "val_interval": 5,
        "ema_decay": 0.9,
        "sample_interval": 0,
        "sample_steps": 2,
    },
    "NoiseScheduler": {"schedule": "rectified_flow"},
}


def with_all_on(config: dict) -> dict:
    """The sections of a config whose stage 2 has Muon, the mean latent, a covariate, autoguidance, and
    augmentation that the network is told, all at once."""
    augment = {"flip_axes": [0], "rotate_degrees": 5, "versions": 2}
    more = {"optimizer": "muon", "snapshot": 0.3, "autoguidance": 1.5, "augment": augment}
    latent = config["latent_channels"]
    return {
        "conditions": {
            "mean_latent": True,
            "augmentation": True,
            "covariates": {"age": "number"},
            "into": ["embedding", "mean_latent"],
        },
        "diffusion_def": config["diffusion_def"] | {"in_channels": 2 * latent + 1 + 3},
        "diffusion_train": config["diffusion_train"] | more,
    }


def make_data(folder: Path, cases: int = 6, channels: int = 1, shape: tuple = SHAPE) -> Path:
    """A Decathlon folder of bright ellipsoids on a dim noisy ground, `SPACING` mm: each case is smaller and
    1.5 times as bright as the one before, each channel 10 times as bright as the one before; `age` is 20, 21
    and so on."""
    rng = np.random.default_rng(cases + channels)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    (folder / "imagesTr").mkdir(parents=True)
    for i in range(cases):
        stack = []
        for c in range(channels):
            radius = sum((axis * (0.8 + 0.1 * i) * rng.uniform(1, 1.3)) ** 2 for axis in axes)
            stack.append((np.clip(1 - radius, 0, None) + 0.02 * rng.random(shape)) * 1.5**i * 10**c)
        voxels = (1000 * np.stack(stack, -1)).astype(np.float32)
        image = nib.Nifti1Image(voxels if channels > 1 else voxels[..., 0], np.diag([*SPACING, 1]))
        nib.save(image, folder / "imagesTr" / f"scan_{i}.nii.gz")
    listed = [{"image": f"./imagesTr/scan_{i}.nii.gz", "age": 20 + i} for i in range(cases)]
    (folder / "dataset.json").write_text(json.dumps({"training": listed}))
    return folder


def train_in(folder: Path, config: dict) -> list[str]:
    """Train both stages on the scans in `folder`/data. Returns the options that name config and paths."""
    (folder / "config.json").write_text(json.dumps(config))
    paths = {"data_base_dir": "data", "model_dir": "models", "tfevent_path": "tb", "output_dir": "out"}
    (folder / "env.json").write_text(json.dumps({k: str(folder / v) for k, v in paths.items()}))
    files = ["-c", str(folder / "config.json"), "-e", str(folder / "env.json"), "--device", "cpu"]
    train_autoencoder.main([*files, "--no-amp"])
    train_diffusion.main([*files, "--no-amp"])
    return files


@dataclass
class Project:
    """A folder with a config and an environment file; whatever the scripts write lies below it."""

    folder: Path
    data: Path
    config: dict = field(default_factory=lambda: copy.deepcopy(CONFIG))
    printed: dict = field(default_factory=dict)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file, self.environment_file = self.folder / "config.json", self.folder / "env.json"
        self.model_dir, self.output_dir = self.folder / "models", self.folder / "samples"
        self.config_file.write_text(json.dumps(self.config))
        self.set_environment()

    def change(self, **sections) -> None:
        """Put other top-level values into the config file."""
        self.config |= sections
        self.config_file.write_text(json.dumps(self.config))

    def set_environment(self, **changes) -> None:
        environment = {
            "data_base_dir": str(self.data),
            "model_dir": str(self.model_dir),
            "tfevent_path": str(self.folder / "tensorboard"),
            "output_dir": str(self.output_dir),
        }
        self.environment_file.write_text(json.dumps({**environment, **changes}))

    def argv(self, *more: str) -> list[str]:
        files = ["-c", str(self.config_file), "-e", str(self.environment_file)]
        return [*files, "--device", "cpu", *map(str, more)]

    def run(self, script, *more: str) -> str:
        """Run a script in process, and return what it printed."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            script.main(self.argv(*more))
        return out.getvalue()

    def refused(self, script, *more: str, code: int | None = 2) -> str:
        """Run a script that should end on an error of one to three lines, and return it; code None is any."""
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
            self.run(script, *more)
        text = err.getvalue()
        assert stop.value.code in ((code,) if code else (1, 2))
        assert "Traceback" not in text and text.count("error: ") == 1, text
        message = text[text.index("error: ") :].strip()
        assert message.count("\n") < 3, text
        return message

    def checkpoint(self, name: str) -> dict:
        return torch.load(self.model_dir / name, weights_only=True)

    def log(self, stage: str) -> list[dict]:
        lines = (self.model_dir / "train_log.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["stage"] == stage]

    def split(self) -> dict:
        return json.loads((self.model_dir / "split.json").read_text())

    def network(self, key: str, state: dict) -> torch.nn.Module:
        """The network of a config section with these weights, strictly."""
        network = configs.define_network(utils.load_config(self.config_file), key)
        network.load_state_dict(state)
        return network.eval()

    def image(self, name: str) -> np.ndarray:
        """The voxels of a case in the file's units, (C, D, H, W)."""
        voxels = nib.load(self.data / "imagesTr" / f"{name}.nii.gz").get_fdata()
        return voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0)

    def limits(self, name: str) -> np.ndarray:
        """Percentiles 0 and 99.5 of each channel of a case, (C, 2)."""
        return np.array([[one.min(), np.percentile(one, 99.5)] for one in self.image(name)])

    def normalised(self, name: str) -> torch.Tensor:
        """A case mapped to [0, 1] by hand, (1, C, D, H, W)."""
        low, high = self.limits(name).T[:, :, None, None, None]
        return torch.tensor(np.clip((self.image(name) - low) / (high - low), 0, 1), dtype=torch.float32)[None]


@functools.cache
def trained(base: Path) -> Project:
    """The whole chain, run once in a session: autoencoder (6 epochs, the adversarial term from epoch 2 on),
    diffusion (20 epochs), and three samples of 4 steps. Look, but do not touch; `copy_of` gives one to use.

    Args:
        base: the session's temporary folder, the same wherever it is asked for.
    """
    project = Project(base / "chain", make_data(base / "chain" / "data"))
    for script, more in (
        (train_autoencoder, ["--no-amp"]),
        (train_diffusion, ["--no-amp"]),
        (inference, ["--num", "3", "--steps", "4"]),
    ):
        project.printed[script.__name__] = project.run(script, *more)
    return project


def copy_of(project: Project, folder: Path, *names: str) -> Project:
    """A project of its own with the same data and config, and these files of `model_dir`."""
    new = Project(folder, project.data, copy.deepcopy(project.config))
    new.model_dir.mkdir()
    for name in names:
        (new.model_dir / name).write_bytes((project.model_dir / name).read_bytes())
    return new


def fingerprint(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, but for the lock of a run."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(a, b, where: str = "") -> list[str]:
    """Where two checkpoints differ, to the bit; the seconds that they took do not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - {"seconds"}
        lost = [f"{where}.{key} is in one only" for key in sorted(map(str, a.keys() ^ b.keys()))]
        both = [key for key in keys if key in a and key in b]
        return lost + [found for key in both for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, (one, other) in pairs for found in differences(one, other, f"{where}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def assert_same_result(a: Project, b: Project, script, ignoring: tuple = ()) -> None:
    """Two projects hold the same newest and best checkpoint and the same log of a script's stage, to the bit
    but for the seconds and the keys to ignore."""
    stage, name = {
        train_autoencoder: ("autoencoder", "autoencoder"),
        train_diffusion: ("diffusion", "diffusion_unet"),
    }[script]
    for role in ("", "_last"):
        pair = (project.checkpoint(f"{name}{role}.pt") for project in (a, b))
        one, other = ({k: v for k, v in content.items() if k not in ignoring} for content in pair)
        assert not differences(one, other)
    assert a.log(stage) and not differences(a.log(stage), b.log(stage))


@torch.no_grad()
def sample_by_hand(project: Project, seed: int, steps: int, scale: float | None = None) -> np.ndarray:
    """The volume (C, D, H, W) that `inference.py` should write for a rectified-flow model: Heun's method,
    Euler's in the last step, on dz/dt = velocity from noise at t = 1, divided by the scale factor (the
    measured one where none is given), decoded, in the typical units."""
    checkpoint = project.checkpoint("diffusion_unet.pt")
    unet = project.network("diffusion_def", checkpoint["model"])
    z = torch.randn(checkpoint["latent_shape"], generator=torch.Generator().manual_seed(seed))[None]
    times = [torch.tensor([1000 * (1 - i / steps)]) for i in range(steps)]
    for i, t in enumerate(times):
        slope = unet(z, timesteps=t)
        if i + 1 < steps:
            slope = (slope + unet(z + slope / steps, timesteps=times[i + 1])) / 2
        z = z + slope / steps
    return decode_by_hand(project, z, scale)


@torch.no_grad()
def decode_by_hand(project: Project, latents: torch.Tensor, scale: float | None = None) -> np.ndarray:
    """Scaled latents (1, c, d, h, w) -> a volume (C, D, H, W) in the median range of the training cases."""
    autoencoder = project.network("autoencoder_def", project.checkpoint("autoencoder.pt")["model"])
    volume = autoencoder.decode(latents / (scale or scale_by_hand(project)))[0].numpy()
    ranges = [project.limits(name) for name in project.split()["training"]]
    low, high = np.median(ranges, axis=0).T[:, :, None, None, None]
    return volume * (high - low) + low


@torch.no_grad()
def scale_by_hand(project: Project) -> float:
    """1 / std of draws from the posteriors of all training volumes, pooled."""
    autoencoder = project.network("autoencoder_def", project.checkpoint("autoencoder.pt")["model"])
    pairs = [autoencoder.encode(project.normalised(name)) for name in project.split()["training"]]
    mean, std = (torch.cat([pair[i].flatten() for pair in pairs]).double() for i in (0, 1))
    return 1 / math.sqrt(float(((mean - mean.mean()) ** 2 + std**2).mean()))


def damage(path: Path, how: str) -> None:
    """Cut a file to its first half, or overwrite 64 bytes of the largest tensor in it."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)


def assert_weights_close(a: dict, b: dict, share: float = 1e-3) -> None:
    """Weights that were trained alike but added up in another order. Adam turns a gradient that is all
    rounding into a whole step (up to 2e-3 here, and up to 4e-3 between two), so one weight in a thousand, or
    `share`, may be off; where something else was learned, most are."""
    assert a.keys() == b.keys()
    apart = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    assert (apart > 1e-5).float().mean() < share and apart.max() < 4e-3


class PowerCut(BaseException):
    """Ends a run as a pulled plug does: nothing of the program sees it coming."""


@contextlib.contextmanager
def power_cut(monkeypatch, call: int):
    """Raise in Adam's step of this number, and expect it."""
    calls, real = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise PowerCut
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(torch.optim.Adam, "step", step)
        yield


def leave_after(work, *args) -> None:
    """Do the work of a rank, and leave with its exit code, as `utils.command` does and for its reason."""
    code = 0
    try:
        work(*args)
    except SystemExit as leaving:
        code = leaving.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rows_of(network, volumes: torch.Tensor) -> list[torch.Tensor]:
    """Features (N, F) of volumes (N, C, D, H, W), one tensor per layer of `network`."""
    return stacked([network(volume[None]) for volume in volumes])
