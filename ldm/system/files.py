"""Files: written whole or not at all, hashed; strict JSON."""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np

from ldm import UserError, brief


def parse_json(text: str) -> object:
    """Parse JSON, strictly. Raises ValueError: not JSON, nested too deep, or a key twice in an object."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        content = {}
        for key, value in pairs:
            if key in content:  # json would silently take the last one
                raise ValueError(f"the key {brief(repr(key))} appears twice")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def read_json(path: str | Path, what: str = "", kind: type = dict) -> dict | list:
    """Read a JSON object or, as `kind`, a list. Raises UserError that names the file, called `what`."""
    path = Path(path)
    where = f"{what} {path}".strip()
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))  # some Windows editors write a BOM
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(content, kind):
        raise UserError(f"{where}: expected a JSON {'object' if kind is dict else kind.__name__}.")
    return content


def label_path(path: Path) -> Path:
    """The label beside a generated volume `sample_000003.nii.gz`: `sample_000003_label.nii.gz`."""
    return path.with_name(f"{path.name.removesuffix('.nii.gz')}_label.nii.gz")


def record_path(path: Path) -> Path:
    """The record of a volume `sample_000003.nii.gz`: `sample_000003.json`."""
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


# ---------------------------------------------------------------- files


@contextmanager
def written_whole(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file that is written under another name in the same folder, then flushed and renamed to `path`.

    After a killed or failed write the file at `path` is unchanged, and no other process sees half a file.
    With `keep` the previous file is renamed to it.

    Raises:
        OSError: the disk failed or is full; the file is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except OSError as error:
        if keep and not path.exists() and keep.exists():
            os.replace(keep, path)
        remedy = " Free space, then run the same command to resume." if error.errno in NO_SPACE else ""
        raise OSError(
            f"{path} could not be written ({error.strerror or error}). An earlier file is unchanged.{remedy}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file by `written_whole`. NumPy hides why a write to a real file fails, so it gets another
    object."""
    with written_whole(path) as file:
        np.save(SimpleNamespace(write=file.write), array)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON by `written_whole`."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def new_folder(path: str | Path) -> Path:
    """The absolute path of a new `--out` folder, not made yet; an empty one is removed.

    Raises:
        UserError: it exists and is not empty, or its parent cannot be made.
    """
    out = Path(path).resolve()
    try:
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: {error}; name a folder that can be made.") from error
    if out.exists():
        raise UserError(f"--out {path} already holds something; name a new folder, or delete that one first.")
    return out


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
