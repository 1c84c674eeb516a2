"""States of training: nested mappings and sequences of tensors, arrays and plain values, and their two files.

Nothing that is read can name code: arrays are in ``state.safetensors``, all else, and where they belong, is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dppo.durable import write_flushed
from dppo.plain import is_plain
from policies.errors import UserError

STATE_NAME = "state.json"
ARRAYS_NAME = "state.safetensors"

TAGS = ("tensor", "array", "number", "tuple", "mapping")
"""Single keys of objects in the JSON file that stand for what JSON has no word for."""


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write a state into a new directory; it comes back in the same types, to the last bit.

    Raises:
        TypeError: it holds something else than tensors, arrays and plain values.
        OSError: it cannot be written.
    """
    arrays: dict[str, Tensor] = {}
    content = _pack(state, "", arrays)
    directory.mkdir(parents=True)
    write_flushed(directory / ARRAYS_NAME, safetensors.torch.save(arrays))
    write_flushed(directory / STATE_NAME, (json.dumps(content, indent=1) + "\n").encode())


def read_state(directory: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        UserError: a file that is missing or damaged.
    """
    path = directory / STATE_NAME
    try:
        arrays = safetensors.torch.load((directory / ARRAYS_NAME).read_bytes())
        state = _unpack(json.loads(path.read_text()), arrays)
    except Exception as error:  # safetensors raises kinds of its own
        raise UserError(f"the state in {directory} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state of a training")
    return state


def check_state(state: Any, like: Any, where: str, free: Collection[str] = (), path: str = "") -> None:
    """Refuse a state that is not of the form of another.

    Args:
        state: as of `read_state`.
        like: a state with the same entries, of the same kinds, shapes and dtypes.
        where: the file, for the error.
        free: paths of entries that may be anything.
        path: of the state itself in a larger one.

    Raises:
        UserError: naming the file and the first entry that is missing, unknown, or of another form.
    """
    if path in free:
        return
    if isinstance(like, Mapping) and isinstance(state, Mapping):
        for what, names in (("lacks", like.keys() - state.keys()), ("has an unknown", state.keys() - like.keys())):
            if names:
                raise UserError(f"{where} {what} entry {_join(path, min(names))!r}; is it of this run's configuration?")
        for name, value in like.items():
            check_state(state[name], value, where, free, _join(path, name))
    elif _form(state) != _form(like):
        raise UserError(f"{where}: entry {path!r} is {_form(state)}, and should be {_form(like)}")


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _form(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return f"{type(value).__name__} {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "a number" if type(value) in (int, float) else type(value).__name__


def _pack(value: Any, path: str, arrays: dict[str, Tensor]) -> Any:
    """As JSON can hold it, with tensors and arrays put aside under their path."""
    if path in arrays:
        raise TypeError(f"two entries are called {path}")
    if isinstance(value, Tensor):
        arrays[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise TypeError(f"{path or 'the state'} has keys that are no text")
        content = {key: _pack(item, _join(path, key), arrays) for key, item in value.items()}
        return {"mapping": content} if len(content) == 1 and next(iter(content)) in TAGS else content
    if isinstance(value, list | tuple):
        items = [_pack(item, _join(path, str(number)), arrays) for number, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if not is_plain(value):
        raise TypeError(f"{path} is a {type(value).__name__}, which no state can hold")
    if isinstance(value, np.ndarray | np.generic):
        native = np.array(value, value.dtype.newbyteorder("="), order="C")
        arrays[path] = torch.from_numpy(native)
        return {"array" if isinstance(value, np.ndarray) else "number": path}
    return value


def _unpack(content: Any, arrays: Mapping[str, Tensor]) -> Any:
    if isinstance(content, list):
        return [_unpack(item, arrays) for item in content]
    if not isinstance(content, dict):
        return content
    tag = next(iter(content), None)
    if len(content) > 1 or tag not in TAGS:
        return {key: _unpack(item, arrays) for key, item in content.items()}
    inside = content[tag]
    if tag == "mapping":
        return {key: _unpack(item, arrays) for key, item in inside.items()}
    if tag == "tuple":
        return tuple(_unpack(item, arrays) for item in inside)
    if tag == "tensor":
        return arrays[inside].clone()  # of its own: what was read together shares memory
    array = arrays[inside].numpy().copy()
    return array if tag == "array" else array[()]
