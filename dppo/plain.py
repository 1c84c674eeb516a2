"""What counts as plain data."""

from typing import Any

import numpy as np


def is_plain(value: Any) -> bool:
    """Whether it is a number, text, None, an array of numbers, or lists, tuples and dictionaries (by text) of them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biuf" and value.dtype.itemsize <= 8
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
