"""JSON Schema for configs, checkpoints and records, and its errors in words."""

import json
import sys

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError, best_match

from ldm import brief


def _is_number(_, value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(_, value) -> bool:
    return isinstance(value, int) and _is_number(_, value)


# JSON Schema accepts 2.0 as an integer, which range() does not; Python's json reads NaN and integers of a
# thousand digits, which torch does not accept.
STRICT_TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})

StrictValidator = validators.extend(Draft202012Validator, type_checker=STRICT_TYPES)


def fields(**properties: dict) -> dict:
    """The schema of an object that has these keys at least."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def fault(validator: Draft202012Validator, value) -> str | None:
    """What is wrong with a value, and where, on one line; None where nothing is."""
    error = best_match(validator.iter_errors(value))
    return explained(error) if error else None


def explained(error: ValidationError) -> str:
    """A schema's error on one line: `lr: expected a number above 0, found -1`."""
    where = ".".join(map(str, error.absolute_path))
    needed = error.validator_value
    if error.validator == "dependentRequired":
        needed = [name for key, names in needed.items() if key in error.instance for name in names]
    if error.validator in ("required", "dependentRequired"):
        name = next(name for name in needed if name not in error.instance)
        return f"{brief(f'{where}.{name}' if where else name)} is missing"
    what = f"expected {expected(error.schema)}, found {_shown(error.instance)}"
    return f"{brief(where)}: {what}" if where else what


TYPE_NAMES = {  # of JSON Schema: singular and plural
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "texts"),
    "boolean": ("true or false", "true or false"),
    "null": ("null", "null"),
    "object": ("an object {...}", "objects {...}"),
    "array": ("a list", "lists"),
}


def expected(schema: dict, several: bool = False) -> str:
    """What a schema allows, in words: its title, or such as `a number from 0 to 1`."""
    if "title" in schema:
        return schema["title"]
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(expected(one, several) for one in schema[key])
    if schema.get("maxProperties") == 0:
        return "an empty object {}"
    kinds = schema.get("type", "object")
    return " or ".join(_kind(one, schema, several) for one in ([kinds] if isinstance(kinds, str) else kinds))


def _kind(kind: str, schema: dict, several: bool) -> str:
    name = TYPE_NAMES[kind][several] if kind in TYPE_NAMES else f"a {kind}"
    if kind in ("integer", "number"):
        least, most = schema.get("minimum"), schema.get("maximum")
        above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        if least is not None and most is not None:
            return f"{name} from {least} to {most}"
        bounds = {"of at least": least, "above": above, "of at most": most, "below": below}
        limits = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return f"{name} {limits}".strip()
    if kind == "array":
        least, most = schema.get("minItems"), schema.get("maxItems")
        count = f"{least}" if least == most and least else f"{least} or more" if least else ""
        items = expected(schema["items"], True) if "items" in schema else "values" * bool(count)
        once = ", each once" * schema.get("uniqueItems", False)
        return f"{name} of {count} {items}".replace("  ", " ") + once if count or items else name
    if kind == "string" and "pattern" in schema:
        return f"{name} that matches {schema['pattern']}"
    if kind == "object" and schema.get("minProperties"):
        return f"{name} that is not empty"
    return name


def _shown(value: object) -> str:
    """A value as JSON has it; of a tensor its shape."""
    if hasattr(value, "shape"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    try:
        return brief(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return brief(value)
