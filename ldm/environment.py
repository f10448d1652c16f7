"""The environment file: where the data are, and where results are written."""

import os
import tempfile
from pathlib import Path

from ldm import UserError, counted
from ldm.configs import check_schema
from ldm.system.files import NO_SPACE

FOLDERS = ("model_dir", "tfevent_path", "output_dir", "cache_dir")  # for results

PATH = {  # that every system takes; an empty one would be the working directory
    "title": "a path of names of up to 255 printable characters",
    "type": "string",
    "minLength": 1,
    "maxLength": 1000,
    "not": {"pattern": r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|[^/\\]{256}"},
}
PATH_OR_NULL = {"title": f"{PATH['title']} or null", "anyOf": [PATH, {"type": "null"}]}
PATHS = {"type": "array", "items": PATH, "minItems": 1}
SCHEMA = {
    "properties": {
        "data_base_dir": {"title": "a folder or a list of folders", "anyOf": [PATH, PATHS]},
        "model_dir": PATH,
        "tfevent_path": PATH,
        "output_dir": PATH,
        "resume_ckpt": {"type": "boolean"},
        "download_brats": {"type": "boolean"},
        "perceptual_weights": PATH_OR_NULL,
        "cache_dir": PATH_OR_NULL,
        "json_data_list": {
            "title": "a file, a list of files or null",
            "anyOf": [PATH, PATHS | {"uniqueItems": True}, {"type": "null"}],
        },
    },
    "required": ["data_base_dir", "model_dir", "tfevent_path", "output_dir"],
    "additionalProperties": False,
}
DEFAULTS = {"resume_ckpt": None, "download_brats": False, "perceptual_weights": None, "cache_dir": None}
DEFAULTS |= {"json_data_list": None}


def check_environment(content: dict, path: str | Path) -> dict:
    """The content of an environment file as it is used: checked, with its defaults, folders as `Path`.

    Relative paths count from the working directory; `~` is the home folder. `data_base_dir` may be a list of
    folders; `json_data_list` then names a JSON list for each, and becomes a list in any case. `cache_dir` is
    `model_dir`/cache by default.

    Args:
        path: the file, for messages.

    Raises:
        UserError: an unknown or missing key, a wrong value, a file where a folder is expected, or lists that
            are not as many as folders; the key is named.
    """
    check_schema(content, SCHEMA, path, hint="config/environment.json.example shows the keys.")
    environment = DEFAULTS | content
    base = environment["data_base_dir"]
    paths = [Path(one).expanduser() for one in (base if isinstance(base, list) else [base])]
    environment["data_base_dir"] = paths if isinstance(base, list) else paths[0]
    if (lists := environment["json_data_list"]) is not None:
        lists = [Path(one).expanduser() for one in (lists if isinstance(lists, list) else [lists])]
        environment["json_data_list"] = lists
        if len(lists) != len(paths):
            raise UserError(
                f"{path}: json_data_list names {counted(len(lists), 'list{s}')}, data_base_dir "
                f"{counted(len(paths), 'folder{s}')}. Name one list for each folder."
            )
    environment["cache_dir"] = environment["cache_dir"] or Path(environment["model_dir"]) / "cache"
    for key in FOLDERS:
        environment[key] = Path(environment[key]).expanduser()
        if not (existing := _nearest(environment[key])).is_dir():
            raise UserError(f"{path}: {key} {environment[key]}: {existing} is not a folder.")
    if environment["perceptual_weights"]:
        environment["perceptual_weights"] = os.path.expanduser(environment["perceptual_weights"])
    return environment


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest of its parents that exists."""
    return next(one for one in [folder, *folder.absolute().parents] if os.path.lexists(one))


def check_writable(folder: Path, key: str) -> None:
    """See that files can be written to a folder, or to where it will be made.

    Raises:
        UserError: they cannot; the key is named.
        OSError: the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            pass
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UserError(
            f"{key} {folder}: cannot be written ({error.strerror}). Name a folder that you own in the "
            "environment file."
        ) from None
