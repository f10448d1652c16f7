"""Latent diffusion for 3D medical volumes: the library behind the scripts.

No module here parses arguments or imports `utils`. Imports between the folders run one way: system, models,
data, diffusion, training, evaluation, export (tests/test_imports.py).
"""

from collections.abc import Sequence


class UserError(ValueError):
    """Something the user can fix: the message says what is wrong, in which file or key, and what to do.

    Scripts end on it with the message and exit code 2, never with a traceback.
    """


class Failure(Exception):
    """A failure that is not the user's. Scripts end on it with the message and exit code 1."""


def brief(value: object, most: int = 200) -> str:
    """What a message shows of a value or of another's message: one line, its middle left out where it is
    long."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else repr(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def few(names: Sequence[str], most: int = 5) -> str:
    """What a message shows of many names: `a, b, c`, or the first ones and `...`."""
    return ", ".join(map(brief, names[:most])) + ", ..." * (len(names) > most)


def counted(number: int, what: str) -> str:
    """`1 scan` and `2 scans` of `scan{s}`."""
    return f"{number} {what.format(s='' if number == 1 else 's')}"
