"""The cache of latents that cache_latents.py writes and a training of stage 2 reads instead of images.

A cache is a folder with one `.npy` a case, (versions, 2, c, d, h, w) float32, mean before std, and a
`manifest.json` with all that they follow from: the autoencoder, the config, the data. The name of an entry is
a hash of the same, so that an interrupted cache is completed. Entries are read memory-mapped: all processes
of a machine share one copy.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ldm import UserError, brief, counted, few
from ldm.configs import ONLY
from ldm.data.cases import Case
from ldm.data.datasets import VolumeDataset, filled_slices
from ldm.data.embeddings import embedding_beside
from ldm.data.intensity import LATER
from ldm.data.posteriors import Posteriors, encode
from ldm.data.preprocessing import CODE
from ldm.data.splits import PARTS, read_split, write_split
from ldm.models.autoencoder import Autoencoder
from ldm.models.weights import plain_names
from ldm.system.checkpoints import load_checkpoint, weights_hash
from ldm.system.files import read_json, sha256_of, write_array, write_json
from ldm.system.ranks import Run
from ldm.system.schemas import StrictValidator, fault, fields

FOLDER = "latents"  # in `cache_dir`
MANIFEST = "manifest.json"
SIZES = "conditions.structure_sizes"  # a key of the config
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}
FILES = {"type": "array", "items": fields(size=COUNT, sha256=TEXT)}
RECORD = fields(case=TEXT, entry=TEXT, sha256=TEXT, files=FILES)
RECORD["properties"] |= {"subject": TEXT, "covariates": {"type": "object"}}  # of later caches
RECORD["properties"] |= {"embedding": {"type": "boolean"}}  # whether `files` is an embedding
PAIR = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
RECORD["properties"]["slices"] = {"type": "array", "items": PAIR, "minItems": 1}  # of 2D networks
RECORDS = {"type": "array", "minItems": 1, "items": RECORD}
LIMITS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 2}}
SIZE = {"type": "array", "items": COUNT, "minItems": 3, "maxItems": 3}
SPACING = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 3, "maxItems": 3}
RECORD["properties"] |= {"size": SIZE, "spacing": SPACING}  # of cases with their own
ABOUT = {"about": {"type": "object"}, "autoencoder": fields(weights=TEXT, file=TEXT)}
BEGUN = StrictValidator(fields(**ABOUT))
COMPLETE = StrictValidator(
    fields(
        **ABOUT,
        versions=COUNT,
        latent_shape={"type": "array", "items": COUNT, "minItems": 4, "maxItems": 4},
        geometry=fields(spacing=SPACING, size=SIZE, limits=LIMITS),  # and `structures`, of labels
        training=RECORDS,
        validation=RECORDS,
        left_out={"type": "array", "items": TEXT},
    )
)


def begin(folder: Path, about: dict, autoencoder: dict, fresh: bool) -> None:
    """Start a cache, or check that the one in the folder is of the same autoencoder and transforms.

    Args:
        about: what the latents follow from, see `dependencies`.
        autoencoder: hashes of its `weights` and of its `file`.
        fresh: delete the content of the folder first.

    Raises:
        UserError: they are not the same; what differs is named.
    """
    path = folder / MANIFEST
    if fresh:
        for old in [path, *folder.glob("*.npy")]:
            old.unlink(missing_ok=True)
    if path.is_file():
        _check_about(folder, _manifest(folder), about, autoencoder["weights"])
    else:
        write_json(path, {"about": about, "autoencoder": autoencoder})


def add(
    folder: Path, encoder: Autoencoder, volumes: VolumeDataset, run: Run, workers: int, what: str, key: str
) -> tuple[list[dict], list[int], int]:
    """Encode the volumes that a cache lacks, each rank its share.

    Args:
        key: all that an entry follows from besides the case's files.

    Returns:
        The manifest's records of all cases, the shape of an entry, and how many were encoded.
    """
    manifest = _manifest(folder)
    before = {record["entry"]: record for part in PARTS for record in manifest.get(part, [])}
    records, missing = {}, []
    for i in range(run.rank, len(volumes), run.world_size):
        case = volumes.cases[i]
        own = {name: list(one) for name, one in (("size", case.size), ("spacing", case.spacing)) if one}
        sources = [] if case.is_embedding else [files_of(case, _reads_labels(manifest["about"]))]
        for paths in [*sources, *([[case.embedding]] if case.embedding else [])]:
            files = [{"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]
            facts = repr((key, case.name, [file["sha256"] for file in files], *own.items()))
            entry = f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.npy"
            path = folder / entry
            digest = sha256_of(path) if _is_readable(path) else None
            known = before.get(entry, {"sha256": digest})
            is_there = digest is not None and digest == known["sha256"]
            if is_there:  # a posterior that was encoded, rather than an embedding
                break
        if not is_there:
            missing.append(i)
        records[i] = {
            "case": case.name,
            "subject": case.subject,
            "covariates": case.covariates,
            "entry": entry,
            "sha256": digest,
            "files": files,
            **own,
        }
        if paths == [case.embedding]:
            records[i]["embedding"] = True
        if volumes.find_slices and is_there:  # else `encode` finds them
            records[i]["slices"] = known.get("slices") or _slices(volumes, i)
    for i, entry, slices in encode(encoder, volumes, missing, run, workers, what):
        path = folder / records[i]["entry"]
        write_array(path, entry.numpy())
        records[i]["sha256"] = sha256_of(path)
        if volumes.find_slices:
            records[i]["slices"] = slices.tolist()
    entries = [folder / record["entry"] for record in records.values()]
    shape = list(np.load(entries[0], mmap_mode="r").shape) if entries else None
    parts = run.gather((records, shape, len(missing)))
    every = {i: record for part, _, _ in parts for i, record in part.items()}
    shape = next(shape for _, shape, _ in parts if shape)
    return [every[i] for i in range(len(volumes))], shape, sum(encoded for _, _, encoded in parts)


def files_of(case: Case, with_label: bool) -> list[Path]:
    """The files that an entry of a case follows from."""
    return [*dict.fromkeys([*case.images, *([case.label] if with_label and case.label else [])])]


def _reads_labels(about: dict) -> bool:
    """Whether latents, or the conditions beside them, follow from labels."""
    return not about.keys().isdisjoint(("label_values", SIZES))


def _slices(volumes: VolumeDataset, i: int) -> list[list[int]]:
    return [filled_slices(volumes.image(i, version)).tolist() for version in range(volumes.versions)]


def complete(folder: Path, manifest: dict) -> None:
    """Write the manifest of a complete cache, and delete the entries that it does not name."""
    write_json(folder / MANIFEST, manifest)
    named = {record["entry"] for record in _records(manifest)}
    for path in folder.glob("*.npy"):
        if path.name not in named:
            path.unlink()


def open_cache(folder: Path, about: dict, autoencoder: Path, run: Run) -> dict:
    """The manifest of a complete and undamaged cache of this autoencoder and these transforms; each rank
    checks its share of the entries.

    Args:
        about: what the latents should follow from, see `dependencies`.
        autoencoder: its file, which may be missing.

    Raises:
        UserError: the cache is missing, unfinished, damaged, or of something else.
    """
    again = "Run cache_latents.py with the same config and environment file"
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no cache of latents. {again} first, or set latent_cache to false.")
    manifest = _manifest(folder)
    weights = manifest["autoencoder"]["weights"]
    if autoencoder.is_file() and sha256_of(autoencoder) != manifest["autoencoder"]["file"]:
        weights = weights_hash(plain_names(load_checkpoint(autoencoder)["model"]))
    _check_about(folder, manifest, about, weights)
    if "training" not in manifest:
        raise UserError(f"{folder}: the cache is unfinished. {again}: it continues where it stopped.")
    records = _records(manifest)
    damaged = []
    for record in records[run.rank :: run.world_size]:
        path = folder / record["entry"]
        if not path.is_file() or sha256_of(path) != record["sha256"]:
            damaged.append(record["entry"])
    if damaged := [entry for part in run.gather(damaged) for entry in part]:
        raise UserError(
            f"{folder}: {len(damaged)} of {len(records)} entries are missing or damaged ({damaged[0]}). "
            f"{again}: it encodes them again."
        )
    return manifest


def _manifest(folder: Path) -> dict:
    manifest = read_json(folder / MANIFEST, "manifest")
    if what := fault(COMPLETE if "training" in manifest else BEGUN, manifest):
        raise UserError(f"{folder / MANIFEST}: {what}. Make the cache again by cache_latents.py --fresh.")
    return manifest


def _records(manifest: dict) -> list[dict]:
    return [record for part in PARTS for record in manifest[part]]


def _is_readable(path: Path) -> bool:
    """Whether a file holds an array of the length in its header; without a hash no more is known."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def _check_about(folder: Path, manifest: dict, about: dict, weights: str) -> None:
    """Raise UserError unless a cache follows from `about` and an autoencoder with these weights."""
    was, now = manifest["about"], json.loads(json.dumps(about))
    keys = {**now, **was}  # each may lack some
    key = next((key for key in keys if (key in was, was.get(key)) != (key in now, now.get(key))), None)
    if key is not None:
        then = brief(json.dumps(was[key])) if key in was else "unknown"
        here = brief(json.dumps(now[key])) if key in now else "not set"
        what = f"{key} {then}; here it is {here}"
    elif manifest["autoencoder"]["weights"] != weights:
        what = "another autoencoder"
    else:
        return
    raise UserError(
        f"{folder}: the latents there were made with {what}. Run cache_latents.py --fresh, or "
        "choose another cache_dir in the environment file."
    )


def dependencies(config: dict) -> dict:
    """The keys of a config that the latents of stage 2 follow from, as the user wrote them: a spacing that
    the config leaves open stays open. A cache is checked against them."""
    section, data = config["diffusion_train"], config["data"]
    keys = ("autoencoder_def", "channel", "spacing", "longest_side", "intensity", "seed")
    about = {key: copy.deepcopy(config[key]) for key in keys}
    for key in LATER:
        if not about["intensity"][key]:
            del about["intensity"][key]
    del about["intensity"]["whole_numbers"]  # of what is written
    later = {f"data.{key}": data[key] for key in ("contrasts", "subject", "sizes") if data[key] is not None}
    later |= {"data.own_spacing": True} if data["own_spacing"] else {}
    later |= {"slices.foreground": True} if config["slices"]["foreground"] else {}
    later |= {"label_values": config["label_values"]} if config["with_labels"] else {}
    sizes = config["conditions"]["structure_sizes"]
    later |= {SIZES: sizes} if sizes else {}
    later |= {"with_labels": ONLY} if config["with_labels"] == ONLY else {}
    return {
        **about,
        **later,
        "diffusion_train.patch_size": section["patch_size"],
        "diffusion_train.augment": section["augment"],
        "data.pattern": data["pattern"],
        "data.val_fraction": data["val_fraction"],
        "version of the transforms": CODE,
        "precision": "float32",
    }


def check_data(
    folder: Path, manifest: dict, cases: Sequence[Case], columns: Sequence[str] = ()
) -> list[Case]:
    """Check that the data still hold the cases of a cache, by their names and the sizes of their files; no
    image is opened.

    Args:
        cases: all cases of the data.
        columns: that the model is conditioned on, whose values are compared too.

    Returns:
        The cases that are new since the cache was made.

    Raises:
        UserError: a case of the cache is missing, or has files of other sizes or another value in a column.
    """
    records, by_name = _records(manifest), {case.name: case for case in cases}
    names = {record["case"] for record in records}
    if missing := sorted(names - by_name.keys()):
        what = counted(len(missing), "case{s}")
        raise UserError(
            f"{folder}: holds latents of {what} not found among the data: {few(missing)}. Put them "
            "back, or choose another model_dir and cache_dir, where a new split is made."
        )
    changed = []
    for record in records:
        case = by_name[record["case"]]
        paths = files_of(case, _reads_labels(manifest["about"]))
        if record.get("embedding"):
            paths = [case.embedding or embedding_beside(case.images[0])]
        sizes = [path.stat().st_size if path.is_file() else None for path in paths]
        then = record.get("covariates", {})
        relabelled = any(then.get(column) != case.covariates.get(column) for column in columns)
        if relabelled or sizes != [file["size"] for file in record["files"]]:
            changed.append(case.name)
    if changed:
        what = counted(len(changed), "case{s}")
        raise UserError(
            f"{folder}: the latents there are of other data ({what} changed: {few(changed)}). "
            "Run cache_latents.py again: it encodes what changed."
        )
    return [case for case in cases if case.name not in {*names, *manifest["left_out"]}]


def check_split(folder: Path, manifest: dict, path: Path) -> None:
    """Check that a cache has the split of this split.json, which is written where it is missing.

    Raises:
        UserError: the cache has another split.
    """
    split = tuple([record["case"] for record in manifest[part]] for part in PARTS)
    if not path.is_file():
        write_split(path, *split)
    elif read_split(path) != split:
        raise UserError(
            f"{path}: the latents in {folder} were made for another split. Run cache_latents.py --fresh, or "
            "choose another cache_dir in the environment file."
        )


def posteriors(folder: Path, manifest: dict, seed: int) -> tuple[Posteriors, Posteriors]:
    """The training and the validation part of a cache as data sets. Their cases have no images."""
    parts = []
    for part in PARTS:
        cases = [
            Case(
                record["case"],
                (),
                subject=record.get("subject", record["case"]),
                covariates=record.get("covariates", {}),
                **{key: tuple(record[key]) for key in ("size", "spacing") if key in record},
            )
            for record in manifest[part]
        ]
        entries = [folder / record["entry"] for record in manifest[part]]
        slices = None
        if all("slices" in record for record in manifest[part]):
            slices = torch.tensor([record["slices"] for record in manifest[part]])
        parts.append(Posteriors(cases, entries, seed, slices))
    return tuple(parts)
