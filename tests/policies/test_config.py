from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from policies import UserError
from policies.base import PolicyConfig
from policies.config import config_from_dict, near_misses


@dataclass(frozen=True)
class Base:
    name: str
    width: int = 3


@dataclass(frozen=True)
class Record(Base):
    rate: float = 0.1
    limit: float | None = None
    kind: Literal["sum", "mean"] = "sum"
    dims: Sequence[int] = (8, 8)
    clamp: tuple[float, float] | None = None
    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    enabled: bool = True
    doubled: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be positive, not {self.width}")


def refusal(values: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        config_from_dict(Record, values, "policy 'made up'")
    message = str(caught.value)
    assert message.startswith("policy 'made up'") and "\n" not in message
    return message


def test_plain_data_becomes_a_record_with_defaults_for_what_is_left_out() -> None:
    record = config_from_dict(Record, {"name": "a", "dims": [4, 5], "clamp": [-5, 2], "kind": "mean"}, "here")
    assert record == Record("a", dims=[4, 5], clamp=(-5, 2), kind="mean")
    assert record.network == {"type": "mlp"}


def test_integers_are_taken_for_floats_and_whole_floats_for_integers() -> None:
    record = config_from_dict(Record, {"name": "a", "rate": 1, "width": 1e6}, "here")
    assert (record.rate, record.width) == (1.0, 1_000_000)
    assert isinstance(record.width, int)


def test_null_is_taken_where_it_is_allowed() -> None:
    assert config_from_dict(Record, {"name": "a", "limit": None}, "here").limit is None


def test_a_misspelt_setting_comes_with_its_near_miss() -> None:
    assert refusal({"name": "a", "widht": 3}) == "policy 'made up' has no setting 'widht' (did you mean width?)"


def test_an_unknown_setting_that_resembles_none_comes_without() -> None:
    assert refusal({"name": "a", "zzzzzz": 3}) == "policy 'made up' has no setting 'zzzzzz'"


def test_a_field_that_cannot_be_set_is_unknown() -> None:
    assert "no setting 'doubled'" in refusal({"name": "a", "doubled": 3})


def test_a_missing_setting_is_named() -> None:
    assert "name" in refusal({"width": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"name": 3},
        {"width": "wide"},
        {"width": 2.5},
        {"width": None},
        {"width": [3]},
        {"rate": "fast"},
        {"rate": None},
        {"limit": "none"},
        {"kind": "median"},
        {"kind": None},
        {"dims": 8},
        {"dims": "88"},
        {"dims": [8, "wide"]},
        {"clamp": [1]},
        {"clamp": [1, 2, 3]},
        {"network": "mlp"},
        {"enabled": "perhaps"},
        {"enabled": 7},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused_by_its_name_and_shown(values: dict[str, Any]) -> None:
    name, value = next(iter(values.items()))
    message = refusal({"name": "a", **values})
    assert name in message
    assert repr(value) in message or repr(value[-1]) in message


def test_what_the_record_itself_refuses_is_told_in_its_words() -> None:
    assert refusal({"name": "a", "width": 0}) == "policy 'made up': width must be positive, not 0"


def test_the_given_data_is_left_as_it_was() -> None:
    values = {"name": "a", "network": {"type": "mlp", "hidden_dims": [8]}}
    config_from_dict(Record, values, "here")
    assert values == {"name": "a", "network": {"type": "mlp", "hidden_dims": [8]}}


def test_the_closest_names_are_near_misses_and_distant_ones_are_not() -> None:
    assert near_misses("hoper", ["hopper", "walker2d"]) == " (did you mean hopper?)"
    assert near_misses("hop", ["walker2d"]) == ""
    assert near_misses("mlp", []) == ""


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"first_executed": 4}, "first_executed must lie between 0 and chunk - 1 = 3, not 4"),
        ({"first_executed": -1}, "first_executed must lie between 0"),
        ({"first_executed": 2, "executed": 3}, r"executed must lie between 1 and chunk - first_executed = 2, not 3"),
    ],
)
def test_what_is_executed_must_lie_within_the_chunk(settings: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PolicyConfig(2, 2, chunk=4, **settings)


def test_all_that_is_left_of_a_chunk_is_executed_unless_told_otherwise() -> None:
    assert PolicyConfig(2, 2, chunk=4).executed_part == slice(None)
    assert PolicyConfig(2, 2, chunk=4, first_executed=1).executed_part == slice(1, 4)
    assert PolicyConfig(2, 2, chunk=4, first_executed=1, executed=2).executed_part == slice(1, 3)
