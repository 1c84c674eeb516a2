"""Plain data (YAML, JSON) to frozen configuration records, with errors that name the near miss."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from policies.errors import UserError

Record = TypeVar("Record")


def near_misses(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for the known names closest to ``name``; empty where none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


@cache
def _adapter(cls: type[Record]) -> TypeAdapter[Record]:
    return TypeAdapter(cls)


def config_from_dict(cls: type[Record], values: Mapping[str, Any], where: str) -> Record:
    """Build the dataclass ``cls`` from plain data, whose types are checked (and integers taken for floats).

    Raises:
        UserError: an unknown or missing field, a value of the wrong type, or one that the record itself refuses.
    """
    fields = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UserError(f"{where} has no setting {name!r}{near_misses(name, fields)}")
    values = {name: _nested(cls, name, value, where) for name, value in values.items()}
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{where}{complaint(error)}") from error


def complaint(error: ValidationError) -> str:
    """What follows the name of a record: ``, setting: must be a valid number, not 'abc'``, or its own words."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    setting = f", {name}" if name else ""
    if message.startswith("Input should be "):
        wanted = message.removeprefix("Input should be ")
        if first["type"] != "literal_error":  # of which it would be a part of the choices
            wanted = wanted.partition(", ")[0]
        return f"{setting}: must be {wanted}, not {first['input']!r}"
    given = f" (it is {first['input']!r})" if name and first["type"] != "missing" else ""
    return f"{setting}: {message}{given}"


def _nested(cls: type, name: str, value: Any, where: str) -> Any:
    """The value of a field; where that is a record of its own, plain data is made one, with the same checks."""
    kind = get_type_hints(cls)[name]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        return config_from_dict(kind, value, f"{where}, {name}")
    return value
