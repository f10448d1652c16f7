"""Whatever a file holds, its reader takes it rightly or raises a UserError that names the file or the key.

`MALFORMED` has some rows for each reader, which run in process. Plainly wrong values are tested beside their
reader (test_config.py, test_check_data.py, test_download.py, test_provenance.py); here are those that nobody
expects, and random changes of good files. Scripts run where only they can refuse an input.
"""

import copy
import functools
import gzip
import io
import json
import math
import pickle
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, SHAPE, SPACING, Project, copy_of, fingerprint

import inference
import train_autoencoder
import train_diffusion
import utils
from ldm import UserError, configs
from ldm.data import checks, download, latent_cache
from ldm.data.layouts import find_cases
from ldm.data.preprocessing import Preprocessing
from ldm.data.splits import read_split
from ldm.diffusion.sources import check_sources
from ldm.environment import FOLDERS
from ldm.export.records import CHECKPOINTS, find_checkpoint, read_record
from ldm.system.checkpoints import load_checkpoint
from ldm.system.ranks import Run
from ldm.training.run_folder import load_training_checkpoint

NAN, INF, HUGE = math.nan, math.inf, 10**30
ABSENT = ...  # a key to leave out
ONE = Preprocessing((0,), SPACING)


# ---------------------------------------------------------------- readers


def read_cases(source: Path, voxels: bool = False) -> None:
    """Find the cases of a data set and check their files; the first problem is raised."""
    cases, validation = find_cases(source)
    problems = checks.check_cases(cases)[0] if voxels else checks.check_headers([*cases, *validation])
    for problem in (one for one in problems if not one.note):
        raise UserError(f"{problem.file} {problem.reason}")


def read_config(path: Path) -> None:
    check_sources(utils.load_config(path))


def read_environment(path: Path) -> None:
    find_cases(utils.load_environment(path)["data_base_dir"])


def read_image(path: Path) -> None:
    read_cases(path.parent, voxels=True)
    ONE((path,))


def read_label(path: Path) -> None:
    nib.save(nib.Nifti1Image(scan(9), AFFINE), path.with_name("image.nii"))
    entry = {"image": "image.nii", "label": path.name}
    path.with_name("list.json").write_text(json.dumps({"training": [entry]}))
    read_cases(path.with_name("list.json"), voxels=True)


def read_whole_record(path: Path) -> None:
    record = read_record(path)
    for key in CHECKPOINTS:
        find_checkpoint(record, key, path.parent, None)


READERS = {  # kind: name of the file, reader
    "config": ("config.json", read_config),
    "environment": ("environment.json", read_environment),
    "list": ("list.json", read_cases),
    "dataset": ("dataset.json", lambda path: read_cases(path.parent)),
    "split": ("split.json", read_split),
    "manifest": (
        "manifest.json",
        lambda path: latent_cache.open_cache(path.parent, {}, Path("none"), Run(0, 1, torch.device("cpu"))),
    ),
    "record": ("sample_000001.json", read_whole_record),
    "participants": ("participants.tsv", lambda path: read_cases(path.parent)),
    "autoencoder": ("autoencoder.pt", lambda path: load_checkpoint(path, "autoencoder")),
    "unet": ("diffusion_unet.pt", lambda path: load_checkpoint(path, "unet")),
    "stage 1": ("autoencoder_last.pt", lambda path: load_training_checkpoint(path, "autoencoder")),
    "stage 2": ("diffusion_unet_last.pt", lambda path: load_training_checkpoint(path, "diffusion_unet")),
    "archive": ("packed.tar", lambda path: download.unpack(path, path.with_name("unpacked"))),
    "nii": ("a.nii", read_image),
    "gz": ("a.nii.gz", read_image),
    "mgz": ("a.mgz", read_image),
    "label": ("label.nii", read_label),
}
OF_JSON = ("config", "environment", "list", "dataset", "split", "manifest", "record")
OF_TENSORS = ("autoencoder", "unet", "stage 1", "stage 2")
OF_SCANS = ("list", "dataset", "participants")  # what lies beside scans


def refusal(read: Callable, *args) -> str | None:
    """The message of the UserError that a reader raises; None where it takes the input."""
    try:
        read(*args)
    except UserError as error:
        message = str(error)
        assert message.count("\n") < 3 and len(message) < 1500, message[:1500]
        return message
    return None


def put(content, path: str, value):
    """The content with another value at a dotted path: given, made of the old one, or `ABSENT`."""
    key, _, rest = path.partition(".")
    key, new = int(key) if key.isdigit() else key, content.copy()
    if rest:
        new[key] = put(new[key], rest, value)
    elif value is ABSENT:
        del new[key]
    else:
        new[key] = value(new[key]) if callable(value) else value
    return new


def write(path: Path, good, change) -> None:
    """Write a good content after a change: bytes in its place, a function of it, or values by dotted path."""
    if isinstance(change, bytes):
        content = change
    elif callable(change):
        content = change(good)
    else:
        content = good
        for key, value in change.items():
            content = put(content, key, value)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_text(json.dumps(content))


# ---------------------------------------------------------------- good files

QUICK = copy.deepcopy(CONFIG)
QUICK["autoencoder_train"] |= {"max_epochs": 1, "adversarial_warmup_epochs": 0}
QUICK["diffusion_train"] |= {"max_epochs": 1}

AFFINE = np.diag([*SPACING, 1.0])
AFFINE[:3, 3] = -10, -12, 5


def scan(seed: int) -> np.ndarray:
    """A bright ellipsoid in noise, int16; another for each seed."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    rng = np.random.default_rng(seed)
    bright = np.clip(1 - sum((1.2 * axis) ** 2 for axis in axes), 0, None)
    return (bright * rng.uniform(500, 900) + 30 * rng.random(SHAPE)).astype(np.int16)


def nifti(voxels: np.ndarray, sform: bool = True, affine: np.ndarray = AFFINE) -> bytes:
    """The content of a .nii: qform, scaling 1 and 0, and an sform unless it is to be without."""
    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, int(sform))
    image.header["scl_slope"], image.header["scl_inter"] = 1, 0
    return image.to_bytes()


def mgz(change: Callable[[bytes], bytes] = bytes) -> bytes:
    """A .mgz whose content went through a function before it was packed."""
    return gzip.compress(change(nib.MGHImage(scan(7).astype(np.float32), AFFINE).to_bytes()), mtime=0)


def archive(files: dict[str, bytes], sizes: dict[str, int] | None = None) -> bytes:
    """A tar of files below `Task01_BrainTumour`; `sizes` is what its headers claim in place of the truth."""
    parts = []
    for name, content in files.items():
        member = tarfile.TarInfo(f"{download.TASK}/{name}")
        member.size = (sizes or {}).get(name, len(content))
        parts += [member.tobuf(), content, bytes(-len(content) % 512)]
    return b"".join([*parts, bytes(1024)])


def described(training, **more) -> dict[str, bytes]:
    """The files of a data set whose dataset.json says this."""
    content = json.dumps({"training": training, **more}).encode()
    return {"dataset.json": content, "imagesTr/a.nii.gz": b"a", "labelsTr/a.nii.gz": b"a"}


PLAIN = nifti(scan(7))
PACKED = gzip.compress(PLAIN, 6, mtime=0)
MASK = (scan(9) > 200).astype(np.uint8)
SCANS = [{"image": f"sub-{i}_T1w.nii.gz"} for i in range(3)]
PAIR = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
WHOLE = described([PAIR])


@pytest.fixture(scope="module")
def good(done) -> dict:
    """A good content of each kind, but for the manifest of a cache."""
    return {
        "config": QUICK,
        "environment": json.loads(done.environment_file.read_text()),
        "list": {"training": SCANS},
        "dataset": {"training": SCANS},
        "split": {"training": ["a"], "validation": ["b"]},
        "record": json.loads((done.output_dir / "sample_000001.json").read_text()),
        "participants": b"participant_id\tage\nsub-0\t3\n",
        **{kind: done.checkpoint(READERS[kind][0]) for kind in OF_TENSORS},
        "archive": archive(WHOLE),
        "nii": PLAIN,
        "gz": PACKED,
        "mgz": mgz(),
        "label": nifti(MASK),
    }


@pytest.fixture
def place(tmp_path, write_image) -> Callable[[str], Path]:
    """`place(kind)`: where a file of this kind belongs, with the scans that it lists beside it."""

    def path_of(kind: str) -> Path:
        for i, entry in enumerate(SCANS if kind in OF_SCANS else ()):
            write_image(tmp_path / entry["image"], scan(i), AFFINE)
        return tmp_path / READERS[kind][0]

    return path_of


# ---------------------------------------------------------------- JSON

TEXT = json.dumps(QUICK).encode()
NO_JSON = [
    b"",
    b"[]",
    b"NaN",
    TEXT[:-1],
    b"// mine\n" + TEXT,
    TEXT * 2,
    TEXT.decode().encode("utf-16"),
    b'{"s\xe9ed": 1}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"channel": 1, "channel": 0}',
    b'{"channel": ' + b"1" * 5000 + b"}",
]


@pytest.mark.parametrize("kind", OF_JSON)
def test_a_file_that_is_no_json_is_named(place, kind):
    path, read = place(kind), READERS[kind][1]
    for content in NO_JSON:
        path.write_bytes(content)
        message = refusal(read, path)
        assert message and path.name in message, content[:80]
    path.unlink()
    if kind != "dataset":  # without it, the folder is one of plain files
        message = refusal(read, path)
        assert message and str(path.parent if kind == "manifest" else path) in message
        path.mkdir()
        assert refusal(read, path)


# ---------------------------------------------------------------- the table


def nested(depth: int) -> list:
    return json.loads("[" * depth + "]" * depth)


def in_networks(*keys: str, **values) -> list:
    """Rows: wrong arguments of both networks."""
    return [
        ({f"{key}.{name}": value}, f"autoencoder_def|diffusion_def|{name}")
        for key in keys
        for name, listed in values.items()
        for value in listed
    ]


CONFIGS = [
    ({"channel": int("1" * 4000)}, "channel"),
    ({"channel": "\ud800"}, "channel"),
    ({"channel": []}, "channel"),
    ({"channel": "@spacing::0"}, "@spacing::0"),
    ({"channel": "%other.json::channel"}, "channel"),
    ({"channel": "@data"}, "channel"),
    ({"spacing": [1] * 100_000}, "spacing"),
    ({"k" * 100_000: 1}, "config.json"),
    ({"a\n\n\n\nb": 1}, "config.json"),
    ({"\ud800": 1}, "config.json"),
    ({"$import os": 1}, "import os"),
    ({f"x{i}": f"@x{i + 1}" for i in range(2000)} | {"x2000": 1}, "too deep"),
    ({f"x{i}": [f"@x{i + 1}"] * 2 for i in range(60)} | {"x60": 1}, "x"),
    ({"autoencoder_def.norm_eps": nested(900)}, "too deep"),
    ({"autoencoder_def.num_res_blocks": "@autoencoder_def"}, "@autoencoder_def"),
    ({"autoencoder_def._disabled_": True}, "_disabled_"),
    ({"autoencoder_def.in_channels": {"_target_": "os.getcwd"}}, "autoencoder_def"),
    ({"autoencoder_def": QUICK["diffusion_def"]}, "autoencoder_def"),
    # numbers that no machine can hold or finish
    ({"image_channels": 10**9}, "channel"),
    ({"latent_channels": 10**12}, "latent_channels"),
    ({"longest_side": 10**9, "spacing": ABSENT}, "longest_side"),
    ({"autoencoder_train.batch_size": 10**9}, "batch_size"),
    ({"autoencoder_train.discriminator.channels": 10**10}, "discriminator"),
    ({"diffusion_train.val_times": 10**12}, "val_times"),
    ({"NoiseScheduler.num_train_timesteps": HUGE}, "num_train_timesteps"),
    *in_networks("autoencoder_def", "diffusion_def", num_res_blocks=[10**9, "ab", [1, -1]]),
    *in_networks("autoencoder_def", "diffusion_def", channels=[[8] * 64, [10**9] * 2, [0, 0], [], "ab"]),
    *in_networks("autoencoder_def", "diffusion_def", spatial_dims=[2, -1, 10**9], norm_num_groups=[0, 0.5]),
    *in_networks("autoencoder_def", in_channels=[0, 2], out_channels=[2], latent_channels=[0, 4]),
    *in_networks("autoencoder_def", norm_eps=["small"], with_encoder_nonlocal_attn=["false"]),
    *in_networks("diffusion_def", in_channels=[4], out_channels=[4], num_class_embeds=[3, 10**10]),
    *in_networks("diffusion_def", num_head_channels=[10**9, -1, 0, [0, 7]], with_conditioning=[True, "no"]),
]

ENVIRONMENTS = [
    *(({key: value}, key) for key in FOLDERS for value in (True, {}, "a\0b", "\ud800", "")),
    ({"model_dir": "x" * 3000}, "model_dir"),
    ({"data_base_dir": "x/" * 1500}, "data_base_dir"),
    ({"data_base_dir": ["a", 3]}, "data_base_dir"),
    ({"data_base_dir": lambda folder: [folder, folder]}, "named twice"),
    ({"data_base_dir": "nowhere"}, "nowhere"),
    ({"data_base_dir": __file__}, "test_malformed.py"),
    ({"download_brats": "no"}, "download_brats"),
]


def first(**entry) -> dict:
    return {"training": [{**SCANS[0], **entry}, *SCANS[1:]]}


LISTS = [
    *(({"training": value}, "training") for value in (None, "x", 3, {"a": 1}, [])),
    *(({"training": [value, *SCANS]}, r"training\.0") for value in (None, [], {}, [["a"]])),
    *((first(image=value), r"training\.0\.image") for value in (None, 3, [], [3], {}, True)),
    *((first(image=value), "no such file|found|missing") for value in ("", "a\0b", "\ud800")),
    *((first(image=value), value) for value in ("nowhere.nii.gz", "list.json", "dataset.json")),
    *((first(label=value), "label") for value in (3, ["a"], {}, True)),
    (first(label="nowhere.nii.gz"), "nowhere.nii.gz"),
    ({"training": SCANS + SCANS[:1]}, "sub-0"),
    ({"training": [{**one, "name": "same"} for one in SCANS]}, "same"),
    *(({"validation": value}, "list.json|validation|sub-0") for value in ("x", {"a": 1}, [3], [{}], SCANS)),
]

OF_NNUNET = [
    *(({"training": ABSENT, "channel_names": value}, "channel") for value in (None, [], "x", 3, {})),
    ({"training": ABSENT, "channel_names": {"0": "T1"}, "file_ending": ".png"}, "file_ending"),
]

PARTICIPANTS = [
    (b"age\tsex\n3\tM\n", "participant_id"),
    (b"participant_id,age\nsub-0,3\n", "participant_id"),
    (b"\xff\xfe\x00", "UTF-8"),
    (b"participant_id\tage\nsub-0\t" + b"x" * 200_000, "table"),
    (b"participant_id\tage\nsub-0\t3\nsub-0\t4\n", "sub-0"),
    (b'participant_id\tage\nsub-0\t"3\nsub-1\t4\n', "table"),
    (b"participant_id\tage\nsub-0\t3\t4\t5\n", "columns"),
]

SPLITS = [
    ({"training": ABSENT}, "training"),
    *(({"training": value}, "training") for value in (None, [], "a", [3], ["a", "a"])),
]
MANIFESTS = [(b"{}", "manifest.json"), (b'{"training": 3}', "manifest.json"), (b'{"about": []}', "manifest")]

RECORDS = [
    ({"steps": HUGE}, "steps"),
    ({"scale_factor": NAN}, "scale_factor"),
    ({"scale_factor": INF}, "scale_factor"),
    ({"config": {}}, "config"),
    *(({"unet.path": path}, "no such checkpoint") for path in ("a\0b", ".", "\ud800")),
    ({"unet.sha256": "0" * 64}, "SHA-256"),
]


def weight(change: Callable) -> Callable[[dict], dict]:
    """Change the first weight of a state dict."""

    def changed(state: dict) -> dict:
        name = next(iter(state))
        return {**state, name: change(state[name])}

    return changed


def saved(change: Callable[[bytes], bytes]) -> Callable[[dict], bytes]:
    """Change the bytes of a checkpoint."""

    def changed(content: dict) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return change(buffer.getvalue())

    return changed


def overwritten(share: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = int(share * (len(content) - 64))
        return content[:at] + bytes(byte ^ 0x55 for byte in content[at : at + 64]) + content[at + 64 :]

    return change


ANY_CHECKPOINT = [
    *(({"format": value}, "format") for value in ("1", [], 2, HUGE, torch.ones(2))),
    *(({"model": value}, ".pt") for value in (ABSENT, "x", {}, {"a": 3}, {3: torch.ones(1)}, torch.ones(2))),
    *(({"config": value}, "config") for value in ("x", None, [], {})),
    ({"model": weight(torch.Tensor.to_sparse)}, "model"),
]
AUTOENCODERS = [
    *((content, "autoencoder.pt") for content in (b"", b"<html>", b"PK\x05\x06" + bytes(18))),
    (pickle.dumps({"model": 3}), "autoencoder.pt"),
    *((saved(overwritten(share)), "autoencoder.pt") for share in (0, 0.2, 0.5, 0.8, 1)),
    *((saved(lambda c, n=n: c[:n]), "autoencoder.pt") for n in (4, 1000, -1)),
    (saved(lambda c: bytes(len(c))), "autoencoder.pt"),
    (saved(lambda c: gzip.compress(c, 1)), "autoencoder.pt"),
]
UNETS = [
    *(({"scale_factor": value}, "scale_factor") for value in ("x", 0, NAN, INF, HUGE)),
    *(({"geometry": value}, "geometry") for value in (None, [], {})),
    *(({"geometry.spacing": value}, "spacing") for value in ([1, 2], [-1, 2, 2], [NAN] * 3, "x")),
    *(({"geometry.size": value}, "size") for value in ([1, 2], [0, 2, 2], ["a"] * 3)),
    *(({"geometry.limits": value}, "limits") for value in ([[1, 0]], [[NAN, 1]])),
    *(({"latent_shape": value}, "latent_shape") for value in ("x", [3], [3, 8, 10], [3, 0, 8, 8])),
]
TO_RESUME = [
    *(({key: ABSENT}, key) for key in ("epoch", "batches_per_epoch", "sums", "ema")),
    *(({"epoch": value}, "epoch") for value in ("x", -1, None, NAN, torch.zeros(3))),
    *(({"sums": value}, "sums") for value in ([], {"loss": 3}, {"loss": torch.zeros(3)})),
    *(({"stepper": value}, "stepper|optimi[sz]er") for value in (ABSENT, "x", None, {})),
    ({"ema": {"a": 1}}, "ema"),
    ({"stepper.optimizer.state": {}}, "state"),
    ({"stepper.optimizer.state.0.exp_avg": ABSENT}, "exp_avg"),
    ({"stepper.optimizer.state.0.exp_avg": "x"}, "exp_avg"),
    ({"stepper.optimizer.param_groups": []}, "param_groups"),
    ({"stepper.optimizer.param_groups.0.betas": [1]}, "betas"),
    ({"stepper.optimizer.param_groups.0.lr": "x"}, "lr"),
]

ARCHIVES = [
    (gzip.compress, "tar"),
    (b"PK\x03\x04" + bytes(1000), "tar"),
    (bytes(10240), "dataset.json"),
    (lambda c: c[:100] + b"x" * 300 + c[400:], "tar"),
    (archive(WHOLE, sizes={"labelsTr/a.nii.gz": 10**15}), "tar|space"),
    (archive({"dataset.json/x": b"a"}), "dataset.json"),
    (archive({**WHOLE, "dataset.json": b"[" * 10**5}), "dataset.json"),
    (archive({**WHOLE, "imagesTr/a.nii.gz/x": b"a"}), "tar|imagesTr"),
    *((archive(described(value)), "dataset.json") for value in (None, "x", {}, [None], [[]], ["a"])),
    *((archive(described([{**PAIR, "image": x}])), "dataset.json") for x in (None, "", "../outside", "a\0b")),
    *((archive(described([PAIR], test=value)), "dataset.json") for value in (None, [3], [{}], ["x"])),
]


def field(name: str, value, index: int | None = None, content: bytes | None = None) -> Callable | bytes:
    """The file with another value in a field of its header; of this content, or as a change of one."""
    if content is None:
        return lambda content: field(name, value, index, content)
    header = np.frombuffer(content[:348], nib.nifti1.header_dtype).copy()
    if index is None:
        header[name] = value
    else:
        header[name][0][index] = value
    return header.tobytes() + content[348:]


def without_sform(name: str, value, index: int | None = None) -> bytes:
    return field(name, value, index, nifti(scan(7), sform=False))


def flip(content: bytes, place: int, bits: int = 1) -> bytes:
    changed = bytearray(content)
    changed[place] ^= bits
    return bytes(changed)


UNREAD = "cannot be read"
HEADERS = [
    *((field("dim", value, 0), r"shape \(|vox offset") for value in (-1, 0, 2, 8)),
    *((field("dim", value, i), rf"shape \(|{UNREAD}|covers") for i in (1, 3) for value in (-1, 0, 1, 17)),
    *((field("datatype", value), f"{UNREAD}|voxels are") for value in (-1, 0, 1, 2, 8, 16, 32, 128, 1536)),
    *((field("vox_offset", value), UNREAD) for value in (NAN, INF, -352, 0, 351, 353, 1e30)),
    *((field("scl_slope", value), "scaling is infinite") for value in (INF, -INF)),
    (field("scl_slope", 3e38), "infinite voxels"),
    *((field("scl_inter", value), "intercept") for value in (NAN, INF)),
    (field("scl_inter", 1e30), "constant"),
    *((field("srow_x", value, 0), "not invertible|voxels are") for value in (NAN, INF, 0, 1e-30, 1e30)),
    *((field("srow_y", value, 3), why) for value, why in ((NAN, "not invertible"), (1e30, "origin"))),
    *((field("magic", value), UNREAD) for value in (b"", b"n+2", b"xxxx", b"\xff" * 4)),
    *((without_sform("quatern_c", value), "not invertible|w2 should") for value in (NAN, INF, 2)),
    *((without_sform("qoffset_z", value), why) for value, why in ((INF, "not inv"), (1e30, "origin"))),
    *((without_sform("pixdim", value, 2), "not invertible|voxels are") for value in (NAN, 0, 1e-30, 1e30)),
    *((without_sform("qform_code", value), "qform_code") for value in (-1, 99)),
]
PLAIN_FILES = [
    *((PLAIN[:n], UNREAD) for n in (0, 1, 347, 348, 352, 4000, -1)),
    *((content, UNREAD) for content in (PLAIN + b"more", PLAIN * 2, PACKED)),
    (bytes(128) + b"DICM" + bytes(500), UNREAD),
]
PACKED_FILES = [
    *((PACKED[:n], UNREAD) for n in (0, 2, 10, 300, -1, -4, -8)),
    *((flip(PACKED, n), UNREAD) for n in (0, 1, 2, -8, -5, -4, -1)),
    *((flip(PACKED, 3, 1 << n), UNREAD) for n in (2, 3, 4)),
    *((flip(PACKED, int(share * len(PACKED)), 4), UNREAD) for share in (0.01, 0.25, 0.5, 0.75, 0.99)),
    *((PACKED + more, UNREAD) for more in (b"what is this", PACKED)),
    *((gzip.compress(c), UNREAD) for c in (PACKED, bytes(len(PLAIN)), PLAIN[:-2], PLAIN + b"\0\0", b"text")),
    (gzip.compress(PLAIN + bytes(10**7)), UNREAD),
    *((content, UNREAD) for content in (PLAIN, b"<!DOCTYPE html>", b"PK\x03\x04" + bytes(100), mgz())),
]
MGZ_FILES = [
    *((lambda c, n=n: c[:n], UNREAD) for n in (0, 1, 2000, -4)),
    *((lambda c, n=n: flip(c, n, 4), UNREAD) for n in (1500, -6)),
    *((content, UNREAD) for content in (gzip.decompress(mgz()), PACKED, mgz(lambda c: c[:784]))),
    (mgz(lambda c: flip(c, 4)), f"shape|covers|{UNREAD}"),
    (mgz(lambda c: flip(c, 23, 8)), UNREAD),
    (mgz(lambda c: c[:30] + b"\x7f\xc0\x00\x00" * 3 + c[42:]), "affine"),
]
LABELS = [
    *((content, UNREAD) for content in (b"", b"text" * 100, nifti(MASK)[:-100], nifti(MASK) + b"more")),
    (nifti(MASK[1:]), "shape"),
    (nifti(np.stack([MASK] * 2, -1)), "4D"),
    (nifti(MASK, affine=AFFINE + np.eye(4, k=3)), "elsewhere"),
    (nifti(MASK.astype(np.complex64)), "complex"),
    (field("srow_x", NAN, 0), "affine"),
    (field("scl_slope", INF), "scaling"),
    (nifti(np.where(MASK, np.float32(INF), MASK)), "NaN|inf"),
    (nifti(MASK / np.float32(2)), "whole"),
    (nifti(MASK.astype(np.int32) * 40000), "0 to 32767"),
]

MALFORMED = {
    "config": CONFIGS,
    "environment": ENVIRONMENTS,
    "list": LISTS,
    "dataset": LISTS[:12] + OF_NNUNET,
    "participants": PARTICIPANTS,
    "split": SPLITS,
    "manifest": MANIFESTS,
    "record": RECORDS,
    "autoencoder": ANY_CHECKPOINT + AUTOENCODERS,
    "unet": UNETS,
    "stage 1": TO_RESUME,
    "stage 2": TO_RESUME[:4] + [({"scale_factor": ABSENT}, "scale_factor")],
    "archive": ARCHIVES,
    "nii": HEADERS + PLAIN_FILES,
    "gz": PACKED_FILES,
    "mgz": MGZ_FILES,
    "label": LABELS,
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.filterwarnings("ignore:Initializing zero-element", "ignore:invalid value encountered")
def test_a_malformed_file_is_refused(good, place, kind):
    """By name, and with the reason; a good one, from which they differ, is taken."""
    path, read, wrong = place(kind), READERS[kind][1], []
    for number, (change, why) in enumerate(MALFORMED[kind]):
        write(path, good.get(kind), change)
        message = refusal(read, path)
        if not message or not re.search(why, message):
            wrong.append((number, str(change)[:100], why, message))
    assert not wrong, "\n".join(map(str, wrong))
    if kind in good:
        write(path, good[kind], {} if kind in (*OF_JSON, *OF_TENSORS) else bytes)
        assert refusal(read, path) is None


def schema_keys(schema: dict, root: dict, path: str = "") -> list[tuple[str, dict]]:
    """All keys of the schema with what it says of them."""
    found = []
    for key, about in schema.get("properties", {}).items():
        while "$ref" in about:
            about = functools.reduce(dict.__getitem__, about["$ref"].removeprefix("#/").split("/"), root)
        found += [(path + key, about), *schema_keys(about, root, f"{path}{key}.")]
    return found


def test_a_value_of_another_type_is_refused_for_every_key():
    schema = json.loads((utils.ROOT / "config/schema.json").read_text(encoding="utf-8"))
    allowed = {"object": ({},), "string": ("x",), "boolean": (True,)}
    for path, about in schema_keys(schema, schema):
        wrong, kinds = [{"x": None}, {}, NAN, "x", True, -1], about.get("type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            wrong = [value for value in wrong if "enum" in about or value not in allowed.get(kind, ())]
        *sections, last = path.split(".")
        for value in wrong:
            config = section = copy.deepcopy(QUICK)
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
            message = refusal(configs.check_config, config, "config.json")
            assert message and last in message, (path, value, message)


@pytest.mark.parametrize("pattern", ["nothing", "../*", "scan_[0", "\0", "/tmp/*", ".", "**_T1w"])
def test_a_pattern_that_finds_nothing(done, pattern):
    message = refusal(find_cases, done.data / "imagesTr", pattern)
    assert message and (repr(pattern)[1:-1] in message or "pattern" in message)


# ---------------------------------------------------------------- files that read as what they were

UNIMPORTANT = [  # (field, index, values) that do not change what the file shows
    ("sizeof_hdr", None, (0, 540)),
    *((name, None, (b"\xff" * nib.nifti1.header_dtype[name].itemsize,)) for name in ("descrip", "aux_file")),
    *((name, None, (-1,)) for name in ("extents", "session_error", "glmax", "intent_code")),
    *((name, None, (NAN, 1e30)) for name in ("intent_p1", "cal_max", "toffset")),
    ("xyzt_units", None, (0, 255)),
    ("dim", 0, (4, 7)),
    *(("dim", i, (-32768, 0, 32767)) for i in (4, 7)),
    ("bitpix", None, (0, 8, -16)),
    *(("pixdim", i, (NAN, 0, -1, 1e30)) for i in (0, 1, 4)),
    ("scl_slope", None, (0, NAN, 2, 1e-30, 1e30)),
    ("scl_inter", None, (-1, 100)),
    ("qform_code", None, (-1, 0, 99)),
    ("sform_code", None, (-1, 0, 99)),
    ("quatern_b", None, (NAN, 2)),
    ("qoffset_x", None, (INF, 1e30)),
    ("srow_x", 3, (0, -100)),
    ("vox_offset", None, (352.5,)),
    ("magic", None, (b"ni1",)),
]
HARMLESS = {
    **{
        f"{name}_{index}_{number}.nii{'.gz' * (number % 2)}": field(name, value, index, PLAIN)
        for name, index, values in UNIMPORTANT
        for number, value in enumerate(values)
    },
    **{f"byte_{n}.nii.gz": flip(PACKED, n) for n in (4, 6, 8, 9)},
    "text.nii.gz": flip(PACKED, 3),
    "zeros.nii.gz": PACKED + bytes(64),
    "members.nii.gz": gzip.compress(PLAIN[:3000]) + gzip.compress(PLAIN[3000:]),
    "empty_member.nii.gz": PACKED + gzip.compress(b""),
    "a.mgz": mgz(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_damage_that_does_not_matter_changes_no_voxel(tmp_path, name):
    content = HARMLESS[name]
    packed = name.endswith(".gz") and content[:2] != b"\x1f\x8b"
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if packed else content)
    (tmp_path / "twin.nii").write_bytes(PLAIN)
    np.testing.assert_allclose(
        ONE((tmp_path / name,)), ONE((tmp_path / "twin.nii",)), atol=1e-3 if "mgz" in name else 1e-5
    )
    (tmp_path / "twin.nii").unlink()
    read_cases(tmp_path, voxels=True)


def test_odd_files_that_are_handled(shared_data, done, tmp_path):
    """One brain in five formats is one volume, the thick slices are those of the file, and all train."""
    odd = (shared_data / "odd").resolve()
    fine = ["ok_4mm_int16.nii.gz", "orient_LPS.nii.gz", "slope0p5_inter-100_int16.nii.gz", "brain.mgz"]
    raw = nib.load(odd / fine[0]).get_fdata()
    expected = np.clip((raw - raw.min()) / (np.percentile(raw, 99.5) - raw.min()), 0, 1)[None]
    for name in (*fine, "4d_3vol.nii.gz"):
        read = Preprocessing((0,), (4, 4, 4))((odd / name,))
        np.testing.assert_allclose(read, expected, atol=1e-3, err_msg=name)  # .mgz has fractions
    thick = nib.load(odd / "anisotropic_4x4x20mm.nii.gz").get_fdata()
    low, high = thick.min(), np.percentile(thick, 99.5)
    read = Preprocessing((0,), (4, 4, 20))((odd / "anisotropic_4x4x20mm.nii.gz",))
    np.testing.assert_allclose(read[0], np.clip((thick - low) / (high - low), 0, 1), atol=1e-5)

    project = copy_of(done, tmp_path / "p")
    names = [*fine, "anisotropic_4x4x20mm.nii.gz"]
    listed = {"training": [str(odd / name) for name in names]}
    (project.folder / "odd.json").write_text(json.dumps(listed))
    project.set_environment(data_base_dir=str(project.folder / "odd.json"))
    section = QUICK["autoencoder_train"] | {"patch_size": [16] * 3, "val_patch_size": [16] * 3}
    project.change(spacing=[4, 4, 4], autoencoder_train=section | {"adversarial_weight": 0})
    project.run(train_autoencoder, "--no-amp")
    trained_well(project, "autoencoder")


def test_a_label_is_read_where_a_training_asks_for_it(done, tmp_path):
    project = copy_of(done, tmp_path / "p")
    (project.folder / "label.nii").write_bytes(b"no image")
    scans = [{"image": str(path)} for path in sorted((project.data / "imagesTr").iterdir())[:4]]
    listed = {"training": [{**scans[0], "label": "label.nii"}, *scans[1:3]], "validation": scans[3:]}
    (project.folder / "cases.json").write_text(json.dumps(listed))
    project.set_environment(data_base_dir=str(project.folder / "cases.json"))
    project.change(autoencoder_train=QUICK["autoencoder_train"])
    foreground = ("--set", "autoencoder_train.augment.foreground_prob=1")
    assert "label.nii" in project.refused(train_autoencoder, "--no-amp", *foreground)
    project.run(train_autoencoder, "--no-amp")


# ---------------------------------------------------------------- what only a script can refuse


def trained_well(project: Project, stage: str) -> None:
    """A training that ended well left finite numbers and weights."""
    assert project.log(stage)
    assert all(math.isfinite(v) for entry in project.log(stage) for v in entry.values() if v != stage)
    name = "autoencoder.pt" if stage == "autoencoder" else "diffusion_unet.pt"
    assert all(weight.isfinite().all() for weight in project.checkpoint(name)["model"].values())


@pytest.mark.parametrize(
    "path, value",
    [
        ("autoencoder_train.patch_size", [10**6] * 3),
        ("autoencoder_train.patch_size", [1, 1, 1]),
        ("autoencoder_train.val_patch_size", [3, 5, 7]),
        ("autoencoder_train.gradient_weight", HUGE),
        ("autoencoder_train.lr", 1e300),
        ("autoencoder_def.norm_eps", NAN),
        ("spacing", [1e-9] * 3),
        ("diffusion_train.patch_size", [4 * 10**6] * 3),
        ("NoiseScheduler", {"schedule": "linear_beta", "beta_start": 0.9, "beta_end": 0.9}),
        ("NoiseScheduler", {"schedule": "cosine", "prediction_type": "velocity"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_cannot_be_trained_with(done, tmp_path, path, value):
    """Refused, or ended on the numbers that it makes, before the best weights are written."""
    script = train_diffusion if path.startswith(("diff", "Noise")) else train_autoencoder
    names = ("autoencoder.pt", "split.json") if script is train_diffusion else ()
    project = copy_of(done, tmp_path / "p", *names)
    project.config_file.write_text(json.dumps(put(QUICK, path, value)))
    project.refused(script, "--no-amp", code=None)
    written = {name for name in fingerprint(project.model_dir) if name.endswith(".pt")}
    assert written.isdisjoint({"diffusion_unet.pt", "autoencoder.pt"} - set(names))


RESUME_1, RESUME_2 = (train_autoencoder, "--resume", "stage 1"), (train_diffusion, "--resume", "stage 2")
SAMPLE, DRAW = (inference, "--autoencoder", "autoencoder"), (inference, "--unet", "unet")
LEARN = (train_diffusion, "--autoencoder", "autoencoder")
MOMENTS = "stepper.optimizer.state.0"


@pytest.mark.parametrize(
    "how, change",
    [
        (RESUME_1, {"model": weight(lambda w: w * NAN)}),
        (RESUME_1, {"model": weight(lambda w: w[:1])}),
        (RESUME_1, {f"{MOMENTS}.exp_avg": lambda t: t * NAN}),
        (RESUME_1, {f"{MOMENTS}.exp_avg_sq": lambda t: -1 - t}),
        (RESUME_2, {f"{MOMENTS}.exp_avg_sq": torch.zeros(2, 2)}),
        (LEARN, {"model": weight(lambda w: w * NAN)}),
        (LEARN, {"config.autoencoder_def": {}}),
        (SAMPLE, {"model": weight(torch.Tensor.int)}),
        (SAMPLE, {"model": weight(lambda w: w.to(torch.complex64))}),
        (DRAW, {"model": weight(lambda w: w * NAN)}),
        (DRAW, {"model.more": torch.ones(1)}),
        (DRAW, {"scale_factor": ABSENT}),
        (DRAW, {"latent_shape": [4, 8, 10, 6]}),
        (DRAW, {"latent_shape": [3, 10**4, 10**4, 10**4]}),
    ],
)
def test_a_checkpoint_that_only_its_use_shows_to_be_wrong(done, good, tmp_path, how, change):
    """Its name is told, or that numbers are not finite; no checkpoint changes and no volume is written."""
    script, option, kind = how
    project = copy_of(done, tmp_path / "p", *(READERS[one][0] for one in OF_TENSORS), "split.json")
    bad = tmp_path / "bad.pt"
    write(bad, good[kind], change)
    before = fingerprint(project.model_dir)
    more = ["--steps", "1"] if script is inference else ["--no-amp"]
    for stage in ("autoencoder", "diffusion") if option == "--resume" else ():
        more += ["--set", f"{stage}_train.max_epochs={done.config[f'{stage}_train']['max_epochs'] + 1}"]
    message = project.refused(script, option, bad, *more, *(["--fresh"] if how is LEARN else []), code=None)
    assert re.search("bad.pt|finite|nan", message), message
    if how is not LEARN:
        assert {name: fingerprint(project.model_dir)[name] for name in before} == before
    assert not list(project.output_dir.glob("*.nii.gz"))


# ---------------------------------------------------------------- random changes of good files

ODD = [None, True, -1, 0, 2, 1.5, NAN, INF, HUGE, "", "x", "é\0", "@seed", "@data", "@", "$1+1", "os.system"]
ODD += [[], [1], [[]], ["x", None], {}, {"x": 1}, {"_target_": "os.system"}]


def places(content: dict, path: str = "") -> list[str]:
    """Dotted paths of all keys that have no dot themselves."""
    found = []
    for key, value in content.items():
        if "." not in str(key):
            found += [f"{path}{key}", *(places(value, f"{path}{key}.") if isinstance(value, dict) else [])]
    return found


def mutated(content: dict, rng: random.Random) -> dict:
    """With one or two keys deleted, renamed, moved to the top or given another value."""
    for _ in range(rng.choice((1, 2))):
        path = rng.choice(places(content))
        match rng.choice(["delete", "replace", "replace", "replace", "rename", "move"]):
            case "delete":
                content = put(content, path, ABSENT)
            case "replace":
                content = put(content, path, rng.choice(ODD))
            case "rename":
                content = put({**content, "x" + path.rpartition(".")[2]: 1}, path, ABSENT)
            case "move":
                content = {**put(content, path, ABSENT), path.rpartition(".")[2]: rng.choice(ODD)}
        if not content:
            break
    return content


@pytest.mark.parametrize("kind", [*OF_JSON[:5], "record", *OF_TENSORS])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_any_change_of_a_file_is_read_or_refused(good, place, kind):
    path, read, rng = place(kind), READERS[kind][1], random.Random(kind)
    refused = 0
    for _ in range(20 if kind in OF_TENSORS else 60):
        write(path, mutated(good[kind], rng), {})
        refused += refusal(read, path) is not None
    assert refused
