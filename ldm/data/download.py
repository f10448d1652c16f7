"""Download the brain tumour data of the Medical Segmentation Decathlon (MSD Task01): resumable and verified.

`fetch_task01` is the entry point. During the work, and after a failure, these lie beside the data set's
folder, and none after a success:

    Task01_BrainTumour.tar.part    the bytes received so far; a later call resumes at its end
    Task01_BrainTumour.unpacking/  what is being unpacked; a later call starts it again

Call it from one process at a time: under torchrun, on one rank while the others wait.
"""

import contextlib
import errno
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import time
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
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

# Errors of the operating system for what an archive holds, not for the disk.
NAME_ERRORS = (errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR)


class DownloadError(OSError):
    """The network or the server failed. The bytes received are kept; a later call resumes."""


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
    download(url, part)
    print(f"Checking the MD5 of {part.name}")
    try:
        if (found := file_md5(part)) != md5:
            raise RefusedArchive(
                f"{url} gave a wrong file: its MD5 is {found}, expected {md5}. It is deleted, nothing was "
                "unpacked. Check the address, the MD5 and any proxy on the way, then run again."
            )
        unpack(part, folder)
    except RefusedArchive:
        part.unlink()
        raise
    part.unlink()
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


def download(url: str, part: Path) -> None:
    """Download `url` into the file `part`, in up to `ATTEMPTS` attempts, each from the end of `part` on.

    A server that ignores range requests (RFC 9110, section 14) sends the whole file again. Whether all bytes
    are of one file is for the MD5 to show.

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
    """One attempt: append to `part` from its end to the end of the file, or write it from the start."""
    offset = part.stat().st_size if part.exists() else 0
    with _network_errors(url):
        try:
            response = urlopen(
                Request(url, headers={"Range": f"bytes={offset}-"} if offset else {}), timeout=TIMEOUT
            )
        except HTTPError as error:
            if offset and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # all was received before
            raise
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            offset = 0
        stated = response.headers.get("Content-Length", "")
        length = offset + int(stated) if stated.isdigit() else None
        # The archive is not compressed (its NIfTI files are): it unpacks to about its own size.
        needed, free = 2 * (length or 0) - offset, shutil.disk_usage(part.parent).free
        if free < needed:
            raise UserError(
                f"too little disk space in {part.parent}: {needed / GB:.2f} GB are needed for the archive "
                f"and its content, {free / GB:.2f} GB are free. Make room or name another folder."
            )
        bar = tqdm(total=length, initial=offset, unit="B", unit_scale=True, desc="Downloading")
        with bar, part.open("ab" if offset else "wb") as file:
            while chunk := _read(response, url):
                file.write(chunk)
                bar.update(len(chunk))
    if length is not None and part.stat().st_size < length:
        raise _AttemptFailed("the connection was cut")


def _read(response, url: str) -> bytes:
    """The next bytes; none at the end."""
    with _network_errors(url):
        return response.read1(CHUNK)


@contextlib.contextmanager
def _network_errors(url: str):
    """Turn a failure of the network or the server into the error that decides on another attempt."""
    try:
        yield
    except HTTPError as error:
        error.close()
        answer = f"the server answered HTTP {error.code} {error.reason}"
        if error.code in (408, 429) or error.code >= 500:
            raise _AttemptFailed(answer) from error
        raise DownloadError(f"cannot download {url}: {answer}. Check the address.") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"cannot download {url}: {error}. Check the address.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        if url.startswith("file:"):
            raise UserError(f"cannot read {url}: {reason}. Check the path.") from error
        raise _AttemptFailed(f"the network failed ({reason})") from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `Task01_BrainTumour/` of a tar to `folder`, which must be missing or empty: all or nothing.

    Files go to `folder` + ".unpacking", which becomes `folder` once `dataset.json` and all files that it
    names are complete. Links are refused, and by tarfile's `data` filter every path that leads outside. "._"
    files, which macOS adds, and files beside `Task01_BrainTumour/` are left out.

    Raises:
        RefusedArchive: not a tar, damaged, unsafe or incomplete.
        OSError: the disk failed, or is full.
    """
    scratch = folder.with_name(folder.name + ".unpacking")
    if scratch.exists():
        shutil.rmtree(scratch)
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            if link := next((m for m in members if not (m.isfile() or m.isdir())), None):
                raise tarfile.TarError(f"{brief(repr(link.name))} is neither a file nor a folder")
            if outside := next((m for m in members if m.name.startswith(("/", "\\"))), None):
                raise tarfile.TarError(f"{brief(repr(outside.name))} is an absolute path")
            members = [m for m in members if not any(p.startswith("._") for p in PurePosixPath(m.name).parts)]
            tar.extractall(scratch, members=tqdm(members, desc="Unpacking", unit="file"), filter="data")
        if gap := find_gap(scratch / TASK):
            raise RefusedArchive(f"{archive.name} is refused: in its {TASK}, {gap}. Nothing was unpacked.")
        if folder.exists():
            folder.rmdir()  # an empty one: Windows renames to a free name only
        (scratch / TASK).rename(folder)
    except RefusedArchive:
        raise
    except (tarfile.TarError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NAME_ERRORS:
            raise
        reason = brief(error)
        raise RefusedArchive(f"{archive.name} is refused: not a whole, safe tar ({reason}).") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
