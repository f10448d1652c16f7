"""The files of generated volumes: each has a record beside it, a JSON that says what it was made of, so that
the record and the checkpoints suffice to make it again."""

import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from ldm import UserError, brief
from ldm.checkpoints import POSITIVE, SCALE_FACTOR, SIZE, sha256_of, write_json, written_whole
from ldm.datasets import read_json
from ldm.diffusion import SAMPLERS
from ldm.schemas import StrictValidator, fault, fields

FORMAT = 1
LAST_SEED = 2**63 - 1
MOST_STEPS = 10**6
CHECKPOINTS = ("autoencoder", "unet")
PACKAGES = ("torch", "monai", "monai-generative", "nibabel", "numpy")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # tf32: on a GPU, float32 with products of 10 bits
ROOT = Path(__file__).resolve().parents[1]


TEXT = {"type": "string"}
SEED = {"type": "integer", "minimum": 0, "maximum": LAST_SEED}
HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
SCHEMA = fields(
    seed=SEED,
    batch={"type": "array", "items": SEED, "minItems": 1},  # all that were drawn together: see `same_request`
    sampler={"enum": list(SAMPLERS)},
    steps={**SIZE, "maximum": MOST_STEPS},
    scale_factor=SCALE_FACTOR,
    precision={"enum": list(PRECISIONS)},
    compile={"type": "boolean"},
    device={"enum": ["cpu", "cuda"]},
    hardware=TEXT,
    threads={**SIZE, "maximum": 4096},  # of the CPU: sums are split among them, and rounded accordingly
    autoencoder=fields(path=TEXT, sha256=HASH),
    unet=fields(path=TEXT, sha256=HASH),
    config_sha256=HASH,
    config={"type": "object"},  # as it was resolved
    versions={"type": "object"},
    volume=fields(
        sha256=HASH, shape={"type": "array", "items": SIZE}, spacing={"type": "array", "items": POSITIVE}
    ),
)
LIMITS = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
}
SCHEMA["properties"]["volume"]["properties"]["limits"] = LIMITS  # the intensities of 0 and 1, a channel each
SCHEMA["properties"]["max_memory"] = POSITIVE  # in GB, of decoding; where there was no limit, there is no key


def config_hash(config: dict) -> str:
    """SHA-256 of a resolved config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str | None]:
    """Of Python, of the packages that a sample passes through, and the project's commit; None where there is
    none."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that the project is at, `-dirty` behind it where files were changed."""
    if not (ROOT / ".git").exists():  # a repository around the project would answer for itself
        return None
    line = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):  # no git here, or not a repository that it trusts
        return None


def write_record(path: Path, record: dict) -> None:
    """Write a record, whole or not at all."""
    write_json(path, {"format": FORMAT, **record})


def read_record(path: Path) -> dict:
    """Read a record.

    Raises:
        UserError: not there, no JSON, of a later format, a key missing or wrong, or a config that was edited.
            Whether the config is one is not checked here.
    """
    record = read_json(path, "record")
    if not StrictValidator(SIZE).is_valid(record.get("format")):
        raise UserError(f"record {path}: format: missing, so this is not the record of a volume.")
    if record["format"] > FORMAT:
        raise UserError(
            f"record {path}: written by a later version of this project (format {brief(record['format'])})."
        )
    if what := fault(StrictValidator(SCHEMA), record):
        raise UserError(f"record {path}: {what}.")
    if record["seed"] not in record["batch"]:
        raise UserError(f"record {path}: batch: the seed {record['seed']} is not in it.")
    if config_hash(record["config"]) != record["config_sha256"]:
        raise UserError(f"record {path}: config: was changed; config_sha256 is that of another.")
    return record


def same_request(path: Path, request: dict) -> bool:
    """Whether the record at `path` is of a volume that this request asks for as well.

    The batch does not count, nor the device: a volume is the same, to rounding, whatever it was drawn with.
    """
    try:
        record = read_record(path)
    except UserError:
        return False
    keys = ("seed", "sampler", "steps", "scale_factor", "precision", "config_sha256")
    return all(record[key] == request[key] for key in keys) and all(
        record[key]["sha256"] == request[key]["sha256"] for key in CHECKPOINTS
    )


def find_checkpoint(record: dict, key: str, folder: Path, given: Path | None) -> Path:
    """The file of a checkpoint that a record names.

    Args:
        key: one of `CHECKPOINTS`.
        folder: of the record. A relative path counts from the working directory, or from there.
        given: a file in place of the one that is named.

    Raises:
        UserError: not there, or not the bytes that the volume was made with.
    """
    named, due = Path(record[key]["path"]), record[key]["sha256"]
    there = [path for path in ([given] if given else [named, folder / named]) if path.is_file()]
    found = {path: sha256_of(path) for path in there}
    for path, digest in found.items():
        if digest == due:
            return path
    if not found:
        raise UserError(f"{given or named}: no such checkpoint.\nName the file by --{key} FILE.")
    path, digest = next(iter(found.items()))
    raise UserError(
        f"{path}: not the file that the volume was made with (SHA-256 {digest[:12]}, recorded {due[:12]}).\n"
        f"Name that one by --{key} FILE."
    )


def save_volume(path: Path, content: bytes, record: dict | None = None) -> None:
    """Write a volume, and its record before it, so that a kill between the two leaves no volume of unknown
    origin.

    Raises:
        OSError: as `written_whole`.
    """
    if record:
        write_record(record_path(path), record)
    with written_whole(path) as file:
        file.write(content)


def record_path(path: Path) -> Path:
    """The record of a volume `sample_000003.nii.gz`: `sample_000003.json`."""
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def limits_of(path: Path) -> list[list[float]] | None:
    """The intensities that are 0 and 1 in the autoencoder's units, for each channel of a generated volume,
    from its record; None for any other volume.

    Raises:
        UserError: there is a record, and it is damaged.
    """
    record = record_path(path)
    if not path.name.endswith(".nii.gz") or not record.is_file():
        return None
    content = read_json(record, "record")
    if not isinstance(content.get("volume"), dict) or "limits" not in content["volume"]:
        return None  # the JSON of a BIDS scan, or a record from before there were limits in it
    return read_record(record)["volume"]["limits"]


def missing(paths: dict[int, Path], request: dict) -> set[int]:
    """The seeds whose volumes are still to be made; their folder is there afterwards.

    Raises:
        UserError: a file is in the way that this request did not make.
    """
    made, taken = set(), []
    for seed, path in paths.items():
        record = record_path(path)
        there = [one for one in (path, record) if one.exists()]
        if not there:
            continue
        ours = same_request(record, {"seed": seed, **request})
        if ours and path in there:
            ours = sha256_of(path) == read_record(record)["volume"]["sha256"]
        if not ours:
            taken.append(there[0])
        elif path in there:
            made.add(seed)
    if taken:
        raise UserError(
            f"{taken[0]} is there already ({len(taken)} of {len(paths)}). "
            "Choose another --seed or output_dir."
        )
    folder = next(iter(paths.values())).parent
    stems = {path.name.partition(".")[0] for path in paths.values()}
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(".*.part"):  # of a write that was killed
        if part.name.split(".")[1] in stems:
            part.unlink()
    return set(paths) - made
