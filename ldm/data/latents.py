"""Posteriors of a data set: encoded once, kept in memory or in a folder that later trainings read instead of
images.

A cache is a folder with one `.npy` a case, (versions, 2, c, d, h, w) float32, mean before std, and a
`manifest.json` that says what they follow from: the autoencoder, the way from file to volume, the data. An
entry is named by the hash of all that, so that an interrupted cache goes on, and is read memory-mapped, so
that all processes of a machine share one copy.

Whatever is kept is encoded in float32, whatever precision the training has: it is read in every epoch, and
encoded once.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm import UserError, brief, counted, few
from ldm.data.cases import Case
from ldm.data.datasets import VolumeDataset, version_of
from ldm.data.preprocessing import CODE
from ldm.data.splits import PARTS, read_split, write_split
from ldm.models.autoencoder import Autoencoder
from ldm.models.weights import plain_names
from ldm.system.checkpoints import load_checkpoint, weights_hash
from ldm.system.files import read_json, sha256_of, write_array, write_json
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run, without_tf32
from ldm.system.schemas import StrictValidator, fault, fields
from ldm.system.signals import leave_signals_to_the_main_process

LATENTS = "latents"  # the folder of the cache in `cache_dir`
MANIFEST = "manifest.json"
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}
FILES = {"type": "array", "items": fields(size=COUNT, sha256=TEXT)}
RECORD = fields(case=TEXT, entry=TEXT, sha256=TEXT, files=FILES)

RECORD["properties"] |= {"subject": TEXT, "covariates": {"type": "object"}}  # of later caches

RECORDS = {"type": "array", "minItems": 1, "items": RECORD}
LIMITS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 2}}
SIZE = {"type": "array", "items": COUNT, "minItems": 3, "maxItems": 3}
SPACING = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 3, "maxItems": 3}
ABOUT = {"about": {"type": "object"}, "autoencoder": fields(weights=TEXT, file=TEXT)}
BEGUN = StrictValidator(fields(**ABOUT))
COMPLETE = StrictValidator(
    fields(
        **ABOUT,
        versions=COUNT,
        latent_shape={"type": "array", "items": COUNT, "minItems": 4, "maxItems": 4},
        geometry=fields(spacing=SPACING, size=SIZE, limits=LIMITS),
        training=RECORDS,
        validation=RECORDS,
        left_out={"type": "array", "items": TEXT},
    )
)


class Posteriors(Dataset):
    """Posterior mean and std of each version of each volume.

    An item is asked for by `(epoch, i)` and is `{"mean", "std": (c, d, h, w) float32, "epoch": int, "index":
    int}`, of the version that the epoch has of that case.

    Args:
        cases: what is served.
        entries: of each case (versions, 2, c, d, h, w): the files that hold them; or one tensor of all, which
            loader processes share, however they are started.
        seed: of the order of versions.
    """

    def __init__(self, cases: Sequence[Case], entries: Sequence[Path] | torch.Tensor, seed: int):
        self.cases, self.entries, self.seed = list(cases), entries, seed

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, i = key
        entry = self.entries[i]
        if isinstance(entry, Path):
            entry = torch.from_numpy(np.load(entry, mmap_mode="c"))  # writable, as torch wants it
        mean, std = entry[version_of(self.seed, epoch, self.cases[i].name, len(entry))]
        return {"mean": mean, "std": std, "epoch": epoch, "index": i}


class _Versions(Dataset):
    """The versions of some volumes, one after the other."""

    def __init__(self, volumes: VolumeDataset, cases: Iterable[int]):
        self.volumes = volumes
        self.pairs = [(i, version) for i in cases for version in range(volumes.versions)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> tuple[int, int, torch.Tensor]:
        i, version = self.pairs[k]
        return i, version, self.volumes.image(i, version)


@torch.no_grad()
def encode(
    encoder: Autoencoder, volumes: VolumeDataset, cases: Sequence[int], run: Run, workers: int, what: str
) -> Iterator[tuple[int, torch.Tensor]]:
    """Encode all versions of some volumes: index and (versions, 2, c, d, h, w) float32, on the CPU, of each.
    Autocast and TF32 are off.

    Args:
        workers: loader processes.
        what: the name of the progress bar.
    """
    loader = DataLoader(
        _Versions(volumes, cases),
        batch_size=None,
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )
    versions = []
    for i, version, image in progress_bar(run, what, items=loader, unit="volume"):
        with without_tf32():
            mean, std = encoder.encode(image[None].to(run.device, non_blocking=True))
        versions.append(torch.stack([mean[0], std[0]]).cpu())
        if version + 1 == volumes.versions:
            yield i, torch.stack(versions)
            versions = []


def encode_all(encoder: Autoencoder, volumes: VolumeDataset, run: Run, workers: int, what: str) -> Posteriors:
    """Encode each volume once, each rank its share, and give every rank all posteriors."""
    mine = range(run.rank, len(volumes), run.world_size)
    entries = None
    for i, entry in encode(encoder, volumes, mine, run, workers, what):
        if entries is None:
            entries = torch.empty(len(volumes), *entry.shape)
        entries[i] = entry
    shape = next(filter(None, run.gather(None if entries is None else [*entries.shape])))
    if entries is None:  # more ranks than volumes
        entries = torch.empty(shape)
    run.share(entries)
    return Posteriors(volumes.cases, entries, volumes.seed)


# ---------------------------------------------------------------- the cache


def begin(folder: Path, about: dict, autoencoder: dict, fresh: bool) -> None:
    """See that what is in a cache's folder is of this autoencoder and these transforms, and note them there.

    Args:
        about: what the posteriors follow from, by the names that the user knows it by.
        autoencoder: hashes of its `weights` and of its `file`.
        fresh: delete what is there first.

    Raises:
        UserError: it is not; what differs is named.
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
    """Encode into a cache what is not there yet, each rank its share.

    Args:
        key: hash of all that an entry follows from but its files.

    Returns:
        The manifest's records of all cases, the shape of an entry, and how many were made.
    """
    mine = range(run.rank, len(volumes), run.world_size)
    manifest = _manifest(folder)
    known = {record["entry"]: record["sha256"] for part in PARTS for record in manifest.get(part, [])}
    records, missing = {}, []
    for i in mine:
        case = volumes.cases[i]
        files = [{"size": path.stat().st_size, "sha256": sha256_of(path)} for path in case.images]
        facts = repr((key, case.name, [file["sha256"] for file in files]))
        entry = f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.npy"
        path = folder / entry
        digest = sha256_of(path) if _is_readable(path) else None
        if digest is None or digest != known.get(entry, digest):
            missing.append(i)
        records[i] = {
            "case": case.name,
            "subject": case.subject,
            "covariates": case.covariates,
            "entry": entry,
            "sha256": digest,
            "files": files,
        }
    shape = None
    for i, entry in encode(encoder, volumes, missing, run, workers, what):
        path = folder / records[i]["entry"]
        write_array(path, entry.numpy())
        records[i]["sha256"] = sha256_of(path)
    if records:
        first = next(iter(records.values()))
        shape = list(np.load(folder / first["entry"], mmap_mode="r").shape)
    parts = run.gather((records, shape, len(missing)))
    everywhere = {i: record for part, _, _ in parts for i, record in part.items()}
    shape = next(shape for _, shape, _ in parts if shape)
    return [everywhere[i] for i in range(len(volumes))], shape, sum(made for _, _, made in parts)


def complete(folder: Path, manifest: dict) -> None:
    """Write the manifest of a cache that is whole, and delete the entries that it does not name."""
    write_json(folder / MANIFEST, manifest)
    named = {record["entry"] for part in PARTS for record in manifest[part]}
    for path in folder.glob("*.npy"):
        if path.name not in named:
            path.unlink()


def open_cache(folder: Path, about: dict, autoencoder: Path, run: Run) -> dict:
    """The manifest of a cache that is whole, of this autoencoder and these transforms, and undamaged; each
    rank reads its share of the entries.

    Args:
        autoencoder: its file, which need not be there.

    Raises:
        UserError: no cache, an unfinished one, one of something else, or a damaged one.
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
        raise UserError(f"{folder}: the cache is unfinished. {again}: it goes on where it stopped.")
    records = [record for part in PARTS for record in manifest[part]]
    mine = records[run.rank :: run.world_size]
    damaged = [one["entry"] for one in mine if not _is_whole(folder / one["entry"], one["sha256"])]
    if damaged := [entry for part in run.gather(damaged) for entry in part]:
        raise UserError(
            f"{folder}: {len(damaged)} of {len(records)} entries are missing or damaged ({damaged[0]}). "
            f"{again}: it makes them anew."
        )
    return manifest


def _manifest(folder: Path) -> dict:
    manifest = read_json(folder / MANIFEST, "manifest")
    if what := fault(COMPLETE if "training" in manifest else BEGUN, manifest):
        raise UserError(f"{folder / MANIFEST}: {what}. Make the cache anew by cache_latents.py --fresh.")
    return manifest


def _is_readable(path: Path) -> bool:
    """Whether a file has an array of the length that it says; without a hash no more is known."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _check_about(folder: Path, manifest: dict, about: dict, weights: str) -> None:
    was, now = manifest["about"], json.loads(json.dumps(about))
    key = next((key for key in now if key not in was or was[key] != now[key]), None)
    if key is not None:
        then = brief(json.dumps(was[key])) if key in was else "unknown"
        what = f"{key} {then}; here it is {brief(json.dumps(now[key]))}"
    elif manifest["autoencoder"]["weights"] != weights:
        what = "another autoencoder"
    else:
        return
    raise UserError(
        f"{folder}: the latents there were made with {what}. Run cache_latents.py --fresh, or "
        "choose another cache_dir in the environment file."
    )


def what_latents_follow_from(config: dict) -> dict:
    """The keys of a config that the latents of stage 2 depend on, as the user wrote them (a spacing left
    open stays open). A cache is checked against them."""
    section, data = config["diffusion_train"], config["data"]
    keys = ("autoencoder_def", "channel", "spacing", "longest_side", "intensity", "seed")
    about = {key: copy.deepcopy(config[key]) for key in keys}
    # Keys that came later are named where they are used: caches from before them stay what they are.
    for key in ("window", "nan_is_background"):
        if not about["intensity"][key]:
            del about["intensity"][key]
    later = {f"data.{key}": data[key] for key in ("contrasts", "subject") if data[key] is not None}
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


def check_data(folder: Path, manifest: dict, cases: Sequence[Case], column: str | None = None) -> list[Case]:
    """See that the cases of a cache are there, by their names and the sizes of their files; no image is
    opened.

    Args:
        column: of the covariates that the model is conditioned on, which should be those of the cache.

    Returns:
        The other cases, but for those that were left out when the cache was made.

    Raises:
        UserError: a case of the cache is gone, or has files of other sizes or another value of `column`.
    """
    records = [record for part in PARTS for record in manifest[part]]
    there = {case.name: case for case in cases}
    names = {record["case"] for record in records}
    if gone := sorted(names - there.keys()):
        what = counted(len(gone), "case{s}")
        raise UserError(
            f"{folder}: holds latents of {what} not found among the data: {few(gone)}. Put them "
            "back, or choose another model_dir and cache_dir, where a new split is made."
        )
    changed = [
        record["case"]
        for record in records
        if [path.stat().st_size if path.is_file() else None for path in there[record["case"]].images]
        != [file["size"] for file in record["files"]]
        or column
        and record.get("covariates", {}).get(column) != there[record["case"]].covariates.get(column)
    ]
    if changed:
        what = counted(len(changed), "case{s}")
        raise UserError(
            f"{folder}: the latents there are of other data ({what} changed: {few(changed)}). "
            "Run cache_latents.py again: it makes what changed."
        )
    return [case for case in cases if case.name not in {*names, *manifest["left_out"]}]


def check_split(folder: Path, manifest: dict, path: Path) -> None:
    """See that a cache has the split of this split.json; where there is none yet, it is written.

    Raises:
        UserError: it has another.
    """
    split = tuple([record["case"] for record in manifest[part]] for part in PARTS)
    if not path.is_file():
        write_split(path, *split)
    elif read_split(path) != split:
        raise UserError(
            f"{path}: the latents in {folder} were made for another split. Run cache_latents.py --fresh, or "
            "choose another cache_dir in the environment file."
        )
