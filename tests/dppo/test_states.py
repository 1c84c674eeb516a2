import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dppo.states import ARRAYS_NAME, STATE_NAME, check_state, read_state, write_state
from policies import UserError

STATE: dict[str, Any] = {
    "weights": torch.arange(6.0).view(2, 3).t(),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "nested": {"list": [1, 2.5, None, True, "x", (3, (np.float32(0.1), [np.int64(-1)]))], "empty": {}},
    "array": np.arange(4, dtype=np.uint64)[::2],
    "scalar": np.array(3.5),
    "nothing": np.zeros((0, 3), bool),
    "large": 2**127 + 1,
    "small": 5e-324,
    "beyond": [float("inf"), -float("inf")],
    "looks like a tag": {"tensor": {"array": {"mapping": 1}}},
}


def same(ours: Any, theirs: Any) -> bool:
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in ours.items())
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray | np.generic):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    return ours == theirs


@pytest.fixture
def written(tmp_path) -> Path:
    write_state(tmp_path / "state", STATE)
    return tmp_path / "state"


def test_a_state_comes_back_in_the_same_types_to_the_last_bit(written):
    assert same(read_state(written), STATE)


def test_what_comes_back_shares_no_memory(written):
    state = read_state(written)
    state["array"][:] = 7
    state["weights"].zero_()
    assert same(state["scalar"], STATE["scalar"])


@pytest.mark.parametrize("value", [object(), {1: 2}, np.array(["a"]), np.array([None]), 1j, {"set": {1}}])
def test_what_is_no_plain_data_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match="value"):
        write_state(tmp_path / "state", {"value": value})


def test_entries_that_would_share_a_name_are_refused(tmp_path):
    with pytest.raises(TypeError, match="two entries are called a/b"):
        write_state(tmp_path / "state", {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}})


@pytest.mark.parametrize("name", [STATE_NAME, ARRAYS_NAME])
def test_a_damaged_file_is_a_line_that_names_the_place(written, name):
    file = written / name
    file.write_bytes(file.read_bytes()[: -len(file.read_bytes()) // 2])
    with pytest.raises(UserError, match=f"the state in {written} cannot be read"):
        read_state(written)


def test_an_array_that_is_not_there_is_a_line(written):
    content = json.loads((written / STATE_NAME).read_text())
    content["weights"] = {"tensor": "elsewhere"}
    (written / STATE_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match="elsewhere"):
        read_state(written)


LIKE = {"a": {"b": torch.zeros(2, 3), "c": 1}, "d": None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": torch.zeros(2, 3)}, "d": None}, "here lacks entry 'a/c'"),
        ({**LIKE, "e": 1}, "here has an unknown entry 'e'"),
        (
            {**LIKE, "a": {"b": torch.zeros(3, 2), "c": 1}},
            r"entry 'a/b' is Tensor \(3, 2\) of float32, and should be Tensor \(2, 3\) of float32",
        ),
        ({**LIKE, "a": {"b": torch.zeros(2, 3).double(), "c": 1}}, "entry 'a/b' is .* of float64"),
        ({**LIKE, "a": {"b": torch.zeros(2, 3), "c": "1"}}, "entry 'a/c' is str, and should be a number"),
        ({**LIKE, "a": 3}, "entry 'a' is a number, and should be dict"),
    ],
)
def test_a_state_of_another_form_is_refused_with_the_entry(state, message):
    with pytest.raises(UserError, match=message):
        check_state(state, LIKE, "here")


def test_values_may_differ_and_free_entries_be_anything():
    state = {"a": {"b": torch.ones(2, 3), "c": 2.5}, "d": [1]}
    check_state(state, LIKE, "here", free=("d",))
    with pytest.raises(UserError, match="'d'"):
        check_state(state, LIKE, "here")
