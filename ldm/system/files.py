"""Files: written whole or not at all, hashed, and JSON that is read strictly."""

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
            if key in content:  # json would let the last one win in silence
                raise ValueError(f"the key {brief(repr(key))} is there twice")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("lists or objects within each other lead too deep") from None


def read_json(path: str | Path, what: str = "") -> dict:
    """Read a JSON object. Raises UserError that names the file, after `what` it is."""
    path = Path(path)
    where = f"{what} {path}".strip()
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))  # Windows editors put a mark first
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: should hold a JSON object.")
    return content


def record_path(path: Path) -> Path:
    """The record of a volume `sample_000003.nii.gz`: `sample_000003.json`."""
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


# ---------------------------------------------------------------- files


@contextmanager
def written_whole(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write under another name in the same folder, then flushed and renamed to `path`.

    A killed or failed write leaves what was there, and no other process sees half a file. What was at `path`
    before becomes `keep`, where one is named.

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
            f"{path} could not be written ({error.strerror or error}). What was there is as it was.{remedy}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file as `written_whole` writes. NumPy's own writing to a file keeps to itself why a disk
    refuses, so it is given no file."""
    with written_whole(path) as file:
        np.save(SimpleNamespace(write=file.write), array)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON as `written_whole` writes."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def new_folder(path: str | Path) -> Path:
    """The absolute path of an `--out` folder that does not exist yet; an empty one makes way for it.

    Raises:
        UserError: something else is there, or the place cannot be written to.
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
