"""Download the brain tumour data of the Medical Segmentation Decathlon (MSD Task01): resumable and verified.

`fetch_task01` is the entry point. During the work, and after a failure, these lie beside the data set's
folder, and none after a success:

    Task01_BrainTumour.tar.part        the bytes received so far; a later call resumes at its end
    Task01_BrainTumour.tar.part.json   address, length and validator (ETag or date) of the whole file
    Task01_BrainTumour.unpacking/      what is being unpacked; a later call starts it again

Call it from one process at a time: under torchrun, on one rank while the others wait.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import tarfile
import time
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from monai.apps import DecathlonDataset
from tqdm import tqdm

from ldm import UserError, brief
from ldm.system.files import parse_json

TASK = "Task01_BrainTumour"
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
GB = 1e9

# Errors of the operating system for names in an archive that it cannot take; others are the disk's.
NAME_ERRORS = (errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR)


class DownloadError(OSError):
    """The network or the server failed: a run-time failure. The bytes received are kept; a later call
    resumes."""


class RefusedArchive(UserError):
    """The archive has the wrong content, or is not safe to unpack. `fetch_task01` deletes it."""


class _AttemptFailed(Exception):
    """One attempt failed, and another may succeed."""


def fetch_task01(data_base_dir: str | Path, url: str | None = None, md5: str | None = None) -> Path:
    """Download (about 7.6 GB) and unpack MSD Task01_BrainTumour, unless it is complete already.

    Args:
        data_base_dir: the folder to hold `Task01_BrainTumour`, or that folder itself, or any folder with a
            `dataset.json`, which is then taken for the data set. It is made where it is missing.
        url: address of the archive, an uncompressed tar, by http, https or file. Default: the one in MONAI.
        md5: 32 hexadecimal digits, the archive's MD5. Default: the one in MONAI.

    Returns:
        The data set's folder, with `dataset.json` and every file that it names. For a complete data set no
        request is made.

    Raises:
        UserError: a folder that cannot be made or holds an incomplete data set, too little disk space, a bad
            address or `md5`.
        RefusedArchive: wrong MD5, links or paths that lead outside, or an incomplete data set within. The
            archive is deleted, nothing is unpacked.
        DownloadError: the network or the server failed `ATTEMPTS` times.
        OSError: the disk failed.
    """
    url = url or DecathlonDataset.resource[TASK]
    md5 = (md5 or DecathlonDataset.md5[TASK]).strip().lower()
    if not re.fullmatch("[0-9a-f]{32}", md5):
        raise UserError(f"md5: {md5!r} is not an MD5; give its 32 hexadecimal digits")

    base = Path(data_base_dir).resolve()
    folder = base if base.name == TASK or (base / "dataset.json").is_file() else base / TASK
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise UserError(
            f"data_base_dir: cannot use {base} ({error.strerror}); name a folder that you own"
        ) from error
    if occupied:
        if gap := find_gap(folder):
            raise UserError(f"{folder} exists, but {gap}. Move or delete it, or name another data_base_dir.")
        print(f"{folder} is complete: nothing to download.")
        return folder

    part = folder.with_name(TASK + ".tar.part")
    try:
        download(url, part)
        print(f"Checking the MD5 of {part.name}")
        if (found := file_md5(part)) != md5:
            raise RefusedArchive(
                f"{url} gave a wrong file: its MD5 is {found}, expected {md5}. It is deleted, nothing was "
                "unpacked. Check the address, the MD5 and any proxy on the way, then run again."
            )
        unpack(part, folder)
    except RefusedArchive:
        _discard(part)
        raise
    _discard(part)
    return folder


def find_gap(folder: Path) -> str | None:
    """What a data set in MSD's layout lacks; None if `dataset.json` and all files that it names exist."""
    description = folder / "dataset.json"
    if not description.is_file():
        return "it holds no dataset.json"
    try:
        dataset = parse_json(description.read_text(encoding="utf-8-sig"))
        # The Decathlon lists training cases as {"image": ..., "label": ...} and test cases as bare names.
        training = [name for case in dataset["training"] for name in (case["image"], case["label"])]
        test = [case["image"] if isinstance(case, dict) else case for case in dataset.get("test", [])]
        paths = {name: folder / name for name in training + test}
    except (ValueError, KeyError, TypeError) as error:
        return f"its dataset.json cannot be read as the Decathlon's ({type(error).__name__}: {brief(error)})"
    if not training:
        return "its dataset.json names no training cases"
    # Path.is_file would raise OSError for a name that is too long.
    missing = [name for name, path in paths.items() if not (os.path.isfile(path) and path.stat().st_size)]
    if missing:
        return (
            f"{len(missing)} of the {len(paths)} files that its dataset.json names are missing or empty, "
            f"{brief(missing[0])} the first"
        )
    return None


def file_md5(path: Path) -> str:
    """The MD5 of a file, as hexadecimal digits."""
    # Not for security, but to recognise MONAI's file: FIPS builds of Python allow MD5 for that alone.
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ---------------------------------------------------------------- download


def download(url: str, part: Path) -> None:
    """Download `url` into the file `part`, resuming an earlier call, in up to `ATTEMPTS` attempts.

    Bytes of an earlier call are kept only if they came from the same address and the server still has the
    same file (by length and ETag, or else date of change) and answers a range request (RFC 9110, section 14);
    else the download starts again. No request is made if `part` is complete. The content is not verified.

    Raises:
        UserError: not an address; too little disk space for the archive and its content.
        DownloadError: all attempts failed, or the server refused (HTTP 403, 404, ...).
        OSError: the disk failed.
    """
    if not url.startswith(("http://", "https://", "file://")):
        raise UserError(f"cannot download {url}: the address must begin with http://, https:// or file://")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _attempt(url, part)
        except _AttemptFailed as failure:
            reason = failure
        received = f"{(part.stat().st_size if part.exists() else 0) / GB:.2f} GB received so far"
        if attempt < ATTEMPTS:
            print(f"{reason}; attempt {attempt + 1} of {ATTEMPTS} follows, {received}")
            time.sleep(PAUSE * 2 ** (attempt - 1))
    raise DownloadError(f"cannot download {url}: {reason}. {received}; run again to resume.")


def _attempt(url: str, part: Path) -> None:
    """One attempt: append to `part` from its end to the end of the file, or write it anew."""
    notes = part.with_name(part.name + ".json")
    try:
        known = json.loads(notes.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # the latter: cut off by a kill
        known = {}
    resumable = part.exists() and known.get("url") == url and known.get("length") is not None
    offset = part.stat().st_size if resumable else 0
    if resumable and offset == known["length"]:
        return

    with _request(url, part, offset) as response:
        stated = response.headers.get("Content-Length", "")
        length = int(stated) if stated.isdigit() else None
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if offset and response.status == http.client.PARTIAL_CONTENT:
            # Compared here: not every server heeds an If-Range header.
            rest = f"bytes {offset}-{known['length'] - 1}/{known['length']}"
            if response.headers.get("Content-Range") != rest or validator != known["validator"]:
                _discard(part)
                raise _AttemptFailed("the file on the server has changed")
            length = known["length"]
        else:
            offset = 0
            part.write_bytes(b"")
            content = {"url": url, "length": length, "validator": validator}
            notes.write_text(json.dumps(content), encoding="utf-8")

        if length is not None:
            # The archive is not compressed (its NIfTI files are): it unpacks to about its own size.
            _require_space(part.parent, length - offset, length)
        bar = tqdm(total=length, initial=offset, unit="B", unit_scale=True, desc="Downloading")
        with bar, part.open("ab") as file:
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    if length is not None and part.stat().st_size < length:
        raise _AttemptFailed("the connection was cut")


def _request(url: str, part: Path, offset: int):
    """Ask for `url` from byte `offset` on; a failure becomes the error that decides on another attempt."""
    try:
        return urlopen(Request(url, headers={"Range": f"bytes={offset}-"} if offset else {}), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        answer = f"the server answered HTTP {error.code} {error.reason}"
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            _discard(part)
            raise _AttemptFailed("the file on the server has changed") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _AttemptFailed(answer) from error
        raise DownloadError(f"cannot download {url}: {answer}. Check the address.") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"cannot download {url}: {error}. Check the address.") from error
    except (OSError, http.client.HTTPException) as error:
        if url.startswith("file:"):
            raise UserError(f"cannot read {url}: {_reason(error)}. Check the path.") from error
        raise _AttemptFailed(f"the network failed ({_reason(error)})") from error


def _read(response) -> bytes:
    """The next bytes; none at the end. An OSError here is the network's, not the disk's."""
    try:
        return response.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptFailed(f"the network failed ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) else error
    return str(cause) or type(cause).__name__


def _discard(part: Path) -> None:
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def _require_space(folder: Path, archive: int, unpacked: int) -> None:
    """Raise UserError unless the disk of `folder` has room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < archive + unpacked:
        raise UserError(
            f"too little disk space in {folder}: {(archive + unpacked) / GB:.2f} GB are needed "
            f"({archive / GB:.2f} to download, {unpacked / GB:.2f} to unpack), {free / GB:.2f} GB are free. "
            "Make room or name another folder."
        )


# ---------------------------------------------------------------- unpack


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `Task01_BrainTumour/` of a tar to `folder`, which must be missing or empty: all or nothing.

    All members are checked before the first is written: only files and folders, none of them outside. They
    go to `folder` + ".unpacking", which becomes `folder` once `dataset.json` and all files that it names are
    complete. "._" files, which macOS adds, and files beside `Task01_BrainTumour/` are left out.

    Raises:
        RefusedArchive: not a tar, damaged, unsafe or incomplete.
        UserError: too little disk space.
        OSError: the disk failed.
    """
    scratch = folder.with_name(folder.name + ".unpacking")
    if scratch.exists():
        shutil.rmtree(scratch)
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            for member in members:
                if fault := _fault(member):
                    name = brief(repr(member.name))
                    raise RefusedArchive(f"{archive.name} is refused: {name} {fault}. Nothing was unpacked.")
            members = [m for m in members if not any(p.startswith("._") for p in PurePosixPath(m.name).parts)]
            _require_space(folder.parent, 0, sum(member.size for member in members))
            tar.extractall(scratch, members=tqdm(members, desc="Unpacking", unit="file"), filter="data")
        if gap := find_gap(scratch / TASK):
            raise RefusedArchive(f"{archive.name} is refused: in its {TASK}, {gap}. Nothing was unpacked.")
        if folder.exists():
            folder.rmdir()  # an empty one: Windows renames to a free name only
        (scratch / TASK).rename(folder)
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NAME_ERRORS:
            raise
        reason = brief(error)
        raise RefusedArchive(f"{archive.name} is refused: not a whole, safe tar ({reason}).") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fault(member: tarfile.TarInfo) -> str | None:
    """What makes a member unsafe on any system, or None."""
    # PureWindowsPath recognises both kinds of slash, drive letters and network shares. tarfile's "data"
    # filter alone would strip a leading slash, and would accept links within the folder.
    path = PureWindowsPath(member.name)
    if path.drive or path.root or ".." in path.parts or "\0" in member.name:
        return "leads outside the data set's folder"
    if not (member.isfile() or member.isdir()):
        return "is a link or a device, neither a file nor a folder"
    return None
