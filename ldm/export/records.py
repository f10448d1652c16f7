"""Records of generated volumes: a JSON beside each, which with the checkpoints suffices to make the volume
again, and which tells samples from other volumes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ldm import UserError, brief, configs, few
from ldm.data.reading import IMAGE_SUFFIXES
from ldm.diffusion.samplers import SAMPLERS
from ldm.system.checkpoints import POSITIVE, SCALE_FACTOR, SIZE
from ldm.system.files import label_path, read_json, record_path, sha256_of, write_json, written_whole
from ldm.system.schemas import StrictValidator, fault, fields

FORMAT = 1
LAST_SEED = 2**63 - 1
MOST_STEPS, MOST_GUIDANCE = 10**6, 100
MOST_CONDITIONS = 4  # that a summary of samples lists one by one
CHECKPOINTS = ("autoencoder", "unet")
CONTROL = "controlnet"  # a third, of samples that follow a mask
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # tf32: on a GPU, float32 with products of 10 bits
REQUEST = ("sampler", "steps", "scale_factor", "precision")  # beside condition, checkpoints and config
REPRODUCED = "_reproduced"  # what --reproduce appends to a sample's name
TEXT = {"type": "string"}
SEED = {"type": "integer", "minimum": 0, "maximum": LAST_SEED}
HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
THREE_SIZES = {"type": "array", "items": SIZE, "minItems": 3, "maxItems": 3}
THREE_MM = {**THREE_SIZES, "items": POSITIVE}
INTERVAL = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
SCHEMA = fields(
    seed=SEED,
    batch={"type": "array", "items": SEED, "minItems": 1},  # the seeds that were sampled together
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
    config={"type": "object"},  # resolved
    versions={"type": "object"},
    volume=fields(
        sha256=HASH,
        shape=THREE_SIZES,
        spacing=THREE_MM,
    ),
)
SCHEMA["properties"] |= {  # of some records
    "max_memory": POSITIVE,  # GB to decode in
    "size": THREE_SIZES,  # where they are not the model's own
    "spacing": THREE_MM,
    "mask": fields(path=TEXT, sha256=HASH),  # the file, and what was done to it
    CONTROL: fields(path=TEXT, sha256=HASH),
    "condition": {"type": "object", "minProperties": 1, "additionalProperties": TEXT},
    "guidance": {"type": "number", "minimum": 0, "maximum": MOST_GUIDANCE},
    "interval": INTERVAL,  # of guidance
    # of samples with a label, which are checked; `again` is of those whose first draw failed, with the seed
    # of the noise of the draw that is kept
    "check": {"type": "object"},
    "clear_background": {"type": "boolean"},
    "again": fields(draws=SIZE, seed=SEED),
    "faults": {"type": "array", "items": TEXT},
    "conditions": {
        "type": "array",
        "items": {"type": "object", "additionalProperties": TEXT},
    },  # of the batch
}
SCHEMA["properties"]["mask"]["properties"] |= {"augmented": {"const": True}, "moved": TEXT}
# The intensities that are 0 and 1 in the autoencoder's units, for each channel; older records lack them.
SCHEMA["properties"]["volume"]["properties"] |= {
    "limits": {"type": "array", "items": INTERVAL},
    "label": fields(sha256=HASH),  # of the label beside it, where one was drawn
}


def config_hash(config: dict) -> str:
    """SHA-256 of a resolved config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict:
    """Read a record.

    Raises:
        UserError: missing, not JSON, of a later format, a key missing or wrong, or a config that was edited.
            The config itself is not checked here.
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
    if (seed := record.get("again", record)["seed"]) not in record["batch"]:
        raise UserError(f"record {path}: batch: the seed {seed} is not in it.")
    if config_hash(record["config"]) != record["config_sha256"]:
        raise UserError(f"record {path}: config: was changed; its hash is not config_sha256.")
    return record


def differences(path: Path, request: dict) -> str:
    """How the sample whose record is at `path` differs from a request; "" where it is the requested one.

    Batch and device do not count: with others the volume is the same up to rounding. Nor does a config key
    that came later and has its default.
    """
    if not path.is_file():
        return "it has no record"
    try:
        record = read_record(path)
    except UserError:
        return "its record cannot be used"
    keys = ("seed", *REQUEST, "size", "spacing", "condition", "guidance", "interval", "check")
    keys += ("clear_background",)
    pairs = {key: (record.get(key), request.get(key)) for key in keys}
    if pairs["check"][0] is None and pairs["check"][1]:
        return "it was not checked (--tries 0)"
    found = [f"{key} {before}, now {now}" for key, (before, now) in pairs.items() if before != now]
    given = [{**one.get("mask", {}), "path": ""} for one in (record, request)]
    found += ["another mask"] if given[0] != given[1] else []
    for key in (*CHECKPOINTS, CONTROL):
        if record.get(key, {}).get("sha256") != request.get(key, {}).get("sha256"):
            found.append(f"another {key}")
    if config_hash(configs.completed(record["config"])) != request["config_sha256"]:
        found.append("another config")
    return "; ".join(found)


def find_checkpoint(record: dict, key: str, folder: Path, given: Path | None) -> Path:
    """The file of a checkpoint that a record names.

    Args:
        key: one of `CHECKPOINTS`.
        folder: of the record. A relative path counts from the working directory, or from there.
        given: a file in place of the one that is named.

    Raises:
        UserError: missing, or not the bytes that the volume was made with.
    """
    named, expected = Path(record[key]["path"]), record[key]["sha256"]
    paths = [path for path in ([given] if given else [named, folder / named]) if path.is_file()]
    if not paths:
        raise UserError(f"{given or named}: no such checkpoint.\nName the file by --{key} FILE.")
    hashes = [sha256_of(path) for path in paths]
    if expected in hashes:
        return paths[hashes.index(expected)]
    raise UserError(
        f"{paths[0]}: not the file that the volume was made with (SHA-256 {hashes[0][:12]}, recorded "
        f"{expected[:12]}).\nName that one by --{key} FILE."
    )


def save_volume(path: Path, content: bytes, record: dict | None = None, label: bytes | None = None) -> None:
    """Write a volume; its record and label first, so that a kill between them leaves no volume without
    these.

    Raises:
        OSError: as `written_whole`.
    """
    if record:
        write_json(record_path(path), {"format": FORMAT, **record})
    for one, bytes_of in ((label_path(path), label), (path, content)):
        if bytes_of is not None:
            with written_whole(one) as file:
                file.write(bytes_of)


def labelled(path: Path) -> Path | None:
    """The label that was drawn with a generated volume, or None."""
    return label if (label := label_path(path)).is_file() else None


def is_label(path: Path) -> bool:
    """Whether a file is the label of a generated volume beside it."""
    end = label_path(Path(".nii.gz")).name
    return (
        path.name.endswith(end) and record_path(path.with_name(path.name.replace(end, ".nii.gz"))).is_file()
    )


def record_of(path: Path) -> dict | None:
    """The record of a generated volume; None for any other volume.

    Raises:
        UserError: the record is damaged.
    """
    record = record_path(path)
    if not path.name.endswith(".nii.gz") or not record.is_file():
        return None
    if not isinstance(read_json(record, "record").get("volume"), dict):
        return None  # the JSON of a BIDS scan
    return read_record(record)


def limits_of(path: Path) -> list[list[float]] | None:
    """The intensities of a generated volume that are 0 and 1 in the autoencoder's units, for each channel;
    None for any other volume, and for older records.

    Raises:
        UserError: the record is damaged.
    """
    record = record_of(path)
    return record["volume"].get("limits") if record else None


# ---------------------------------------------------------------- samples of a model


def samples_of(folder: Path, checkpoints: dict[str, Path]) -> tuple[dict[Path, dict], dict[str, list[str]]]:
    """The samples of a model in a folder: the volumes directly in it whose records name these checkpoints, as
    they are now, and whose bytes are those recorded.

    Args:
        checkpoints: the file of each of `CHECKPOINTS`.

    Returns:
        (samples, others): the samples' records by file, sorted by name; and the names of all other volumes in
        the folder and below it, by the reason why they are left out.

    Raises:
        UserError: a checkpoint cannot be read.
    """
    hashes = {key: sha256_of(path) for key, path in checkpoints.items()}
    samples, others = {}, {}
    for path in sorted(folder.rglob("*")):
        if not path.name.lower().endswith(IMAGE_SUFFIXES) or path.name.startswith("."):
            continue
        if is_label(path):
            continue
        inside = path.relative_to(folder).parts
        record, reason = None, f"in {inside[0]}/"
        if len(inside) == 1:
            record, reason = _own(path, checkpoints, hashes)
        if record:
            samples[path] = record
        else:
            others.setdefault(reason, []).append(path.name)
    return samples, others


def _own(path: Path, checkpoints: dict[str, Path], hashes: dict[str, str]) -> tuple[dict | None, str]:
    """The record of a sample of these checkpoints; else None and the reason."""
    if path.name.endswith(f"{REPRODUCED}.nii.gz"):
        return None, "made by --reproduce"
    try:
        record = record_of(path)
    except UserError:
        return None, "with a damaged record"
    if record is None:
        return None, "without a record of inference.py"
    for key in CHECKPOINTS[::-1]:
        if record[key]["sha256"] != hashes[key]:
            same_file = Path(record[key]["path"]).resolve() == checkpoints[key].resolve()
            return None, f"from before {checkpoints[key].name} changed" if same_file else f"of another {key}"
    if _is_changed(path, record):
        return None, "changed since inference.py wrote them"
    return record, ""


def _is_changed(path: Path, record: dict) -> bool:
    """Whether a volume, or its label, is not as its record says."""
    label = record["volume"].get("label")
    return sha256_of(path) != record["volume"]["sha256"] or bool(
        label and (labelled(path) is None or sha256_of(label_path(path)) != label["sha256"])
    )


def listed(others: dict[str, list[str]]) -> str:
    """One line on volumes by reason: `96 in data/; 2 of another unet (sample_000000, sample_000001)`."""
    return "; ".join(
        f"{len(names)} {reason}" + ("" if reason.endswith("/") else f" ({few(names, 3)})")
        for reason, names in others.items()
    )


def check_one_model(folder: str, records: Iterable[dict]) -> None:
    """Raise UserError where the samples of a folder, by their records, are of several models."""
    records = list(records)
    keys, none = (CONTROL, *CHECKPOINTS[::-1]), {"path": f"no {CONTROL}", "sha256": "-"}
    key = next((key for key in keys if len({one.get(key, none)["sha256"] for one in records}) > 1), None)
    if key is None:
        return
    counts = Counter((one.get(key, none)["path"], one.get(key, none)["sha256"][:12]) for one in records)
    each = ", ".join(f"{count} of {path} (SHA-256 {digest})" for (path, digest), count in counts.items())
    raise UserError(
        f"{folder}: holds samples of {len(counts)} models: {each}.\n"
        "Put those of each into a folder of its own, and name one by --generated."
    )


def settings_of(records: Iterable[dict]) -> list[dict]:
    """How samples were made: each combination of `REQUEST`, condition and guidance with the number of its
    volumes, most first. Where there are more than `MOST_CONDITIONS`, only the names of the columns."""
    keys = (*REQUEST, "condition", "guidance")
    counts, records = Counter(), list(records)
    many = len({str(one.get("condition")) for one in records}) > MOST_CONDITIONS
    for one in records:
        pairs = one.get("condition", {}).items()
        condition = ", ".join(f"{column} of each" if many else f"{column}={value}" for column, value in pairs)
        if interval := one.get("interval"):
            condition += f", guided at times {interval[0]:g} to {interval[1]:g}"
        counts[(*(one[key] for key in REQUEST), condition, one.get("guidance", 1.0))] += 1
    return [dict(zip(keys, values, strict=True)) | {"volumes": n} for values, n in counts.most_common()]


def missing(requests: dict[Path, dict]) -> set[Path]:
    """The files of these requests, one for each volume, that do not exist yet. Makes their folder.

    Raises:
        UserError: a file exists that this request did not make.
    """
    made, taken = set(), []
    for path, request in requests.items():
        record = record_path(path)
        labelled = request["config"]["with_labels"] is True or "mask" in request
        label = [label_path(path)] if labelled else []
        found = [one for one in (path, *label, record) if one.exists()]
        if not found:
            continue
        how = differences(record, request)
        if not how and path in found and _is_changed(path, read_record(record)):
            how = "it or its label was changed since" if label else "it was changed since"
        if how:
            taken.append((found[0], how))
        elif path in found:
            made.add(path)
    if taken:
        path, how = taken[0]
        raise UserError(
            f"{path} already exists ({len(taken)} of {len(requests)}) and differs: {how}. "
            "Choose another --seed or output_dir."
        )
    stems = {one.name.partition(".")[0] for path in requests for one in (path, label_path(path))}
    for folder in {path.parent for path in requests}:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):  # of a write that was killed
            if part.name.split(".")[1] in stems:
                part.unlink()
    return set(requests) - made
