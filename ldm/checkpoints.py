"""Write and read checkpoints: whole or not there, and never code."""

import hashlib
import math
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from ldm import UserError

FORMAT = 1
TRAINING_KEYS = {  # what both stages go on from, besides the networks' own
    **dict.fromkeys(("epoch", "batch", "step", "batches_per_epoch", "masked", "lines"), int),
    "seconds": float,
    **dict.fromkeys(("sums", "config", "model", "stepper"), dict),
}


@contextmanager
def written_whole(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write under another name in the same folder, then flushed and renamed to `path`.

    A killed or failed write leaves what was there, and no other process sees half a file. What was at `path`
    before becomes `keep`, where one is named.
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
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict, keep: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all; the one before becomes `keep`.

    Raises:
        OSError: the disk failed or is full; what was there is as it was.
    """
    try:
        with written_whole(path, keep) as file:
            torch.save({"format": FORMAT, **content}, file)
    except RuntimeError as error:  # what torch's zip writer makes of a full disk
        reason = str(error.__cause__ or error.__context__ or error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}). The one before is as it was.") from None
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}). The one before is as it was."
        ) from None


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict: names, types, shapes and values, whatever the file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class StageFiles:
    """The checkpoints of one stage in a model folder: the best, the newest, and the one before that.

    Args:
        model_dir: their folder.
        name: `autoencoder` or `diffusion_unet`.
    """

    def __init__(self, model_dir: Path, name: str):
        self.best, self.last, self.prev = (model_dir / f"{name}{role}.pt" for role in ("", "_last", "_prev"))
        self.last_is_good = True

    def present(self) -> list[Path]:
        """Those that are there."""
        return [path for path in (self.best, self.last, self.prev) if path.exists()]

    def newest(self, say: Callable[[str], None]) -> tuple[Path, dict] | None:
        """The newest good checkpoint to go on from and its content, or None where there is no file at all.

        Raises:
            UserError: there are files, but none to go on from.
        """
        faults = []
        for path in (self.last, self.prev):
            if not path.exists():  # also between the two renames of a save
                continue
            try:
                content = load_training_checkpoint(path)
            except UserError as error:
                faults.append(str(error))
                self.last_is_good = False
                continue
            if path == self.prev:
                say(f"warning: {faults[0] if faults else f'{self.last} is not there'}; {path} is used")
            return path, content
        if faults:
            raise UserError(
                f"{' '.join(faults)}\nNo good checkpoint is left to go on from; --fresh starts over, and "
                "keeps what is there in old-N."
            )
        if self.best.exists():
            raise UserError(
                f"{self.best} is there, but neither {self.last.name} nor {self.prev.name} to go on from. "
                "--fresh starts over, and keeps it in old-N; or choose another model_dir."
            )
        return None

    def save_last(self, content: dict) -> None:
        """Write the newest; the good one before it is kept."""
        save_checkpoint(self.last, content, self.prev if self.last_is_good else None)
        self.last_is_good = True

    def best_score(self) -> float | None:
        """The score of the best file, or None where there is none that can be read."""
        try:
            return load_checkpoint(self.best)["best"]
        except (UserError, KeyError):
            return None


def load_training_checkpoint(path: Path) -> dict:
    """Read a checkpoint that a training can go on from. UserError also where it holds no such thing."""
    content = load_checkpoint(path)
    if "stepper" not in content:
        raise UserError(
            f"{path}: holds weights but no optimiser, so a training cannot go on from it. Name a *_last.pt."
        )
    for key, kind in TRAINING_KEYS.items():
        value = content.get(key)
        number = kind in (int, float)
        if not isinstance(value, kind) or number and (value is True or not 0 <= value < math.inf):
            raise UserError(f"{path}: {key} is missing or wrong; a training cannot go on from it.")
    if not all(isinstance(v, torch.Tensor) and v.shape == (2,) for v in content["sums"].values()):
        raise UserError(f"{path}: sums is wrong; a training cannot go on from it.")
    return content


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this project, or a bare state dict that others released, on the CPU.

    Returns:
        The checkpoint; a bare state dict comes as `{"model": state}`.

    Raises:
        UserError: not there, damaged (the zip's own checksums are verified, which torch.load does not do),
            holding more than tensors and plain values, or of a later format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise UserError(
                        f"{path}: damaged ({damaged} fails its checksum). Use another checkpoint."
                    )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises whatever a damaged or foreign file provokes
        raise UserError(
            f"{path}: not a checkpoint of tensors, or damaged ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:120]})."
        ) from None
    if isinstance(content, dict) and "format" in content:
        if not isinstance(content["format"], int) or not _is_state_dict(content.get("model")):
            raise UserError(f"{path}: not a checkpoint of this project: no format number, or no weights.")
        if content["format"] > FORMAT:
            raise UserError(
                f"{path}: written by a later version of this project (format {content['format']})."
            )
        return content
    for key in ("state_dict", "model"):  # MONAI's and others' habits
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not _is_state_dict(content):
        raise UserError(f"{path}: holds neither a checkpoint of this project nor a state dict.")
    return {"model": content}


def _is_state_dict(content) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in content.items())
    )
