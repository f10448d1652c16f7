"""What values from a file may be, as JSON Schema: configs, checkpoints and records are checked alike."""

import sys

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import best_match

from ldm import brief


def _is_number(_, value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(_, value) -> bool:
    return isinstance(value, int) and _is_number(_, value)


# JSON Schema takes 2.0 for an integer, which range() does not; Python's json reads NaN and integers of a
# thousand digits, which torch does not.
STRICT_TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})
StrictValidator = validators.extend(Draft202012Validator, type_checker=STRICT_TYPES)


def fields(**properties: dict) -> dict:
    """The schema of an object that has these keys at least."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def fault(validator: Draft202012Validator, value) -> str | None:
    """What is wrong with a value, and where in it, on one line; None where nothing is."""
    error = best_match(validator.iter_errors(value))
    if error is None:
        return None
    return brief(": ".join(filter(None, [".".join(map(str, error.absolute_path)), error.message])))
