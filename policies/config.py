"""Plain data (YAML, JSON) to frozen configuration records, with errors that name the near miss."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from policies.errors import UserError

Record = TypeVar("Record")


def near_misses(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for the known names closest to ``name``; empty where none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def config_from_dict(cls: type[Record], values: Mapping[str, Any], where: str) -> Record:
    """Build the dataclass ``cls`` from plain data.

    Raises:
        UserError: an unknown or missing field, or a value that the record itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UserError(f"{where} has no setting {name!r}{near_misses(name, fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} lacks the setting {missing[0]!r}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
