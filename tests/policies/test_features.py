"""Parts of observations are found by name and dimension, and never by guessing."""

import pytest

from policies import UserError
from policies.features import Feature, features_in, places

TASK = [Feature("agent_pos", 2), Feature("goal", 3), Feature("environment_state", 6)]


def found(*own: tuple[str, int], **chosen: list[str]) -> list[int] | None:
    return places([Feature(*part) for part in own], TASK, chosen, "map")


def test_parts_are_found_by_their_names_in_the_policys_order() -> None:
    assert found(("goal", 3), ("agent_pos", 2)) == [2, 3, 4, 0, 1]


def test_parts_of_lerobots_own_environments_are_found_by_lerobots_names() -> None:
    assert found(("observation.state", 2), ("observation.environment_state", 6)) == [0, 1, 5, 6, 7, 8, 9, 10]


def test_a_part_is_made_up_of_those_that_are_chosen_for_it() -> None:
    assert found(("obs", 5), obs=["goal", "agent_pos"]) == [2, 3, 4, 0, 1]
    assert found(("goal", 3), ("x", 2), x=["agent_pos"]) == [2, 3, 4, 0, 1]


def test_without_a_name_in_common_nothing_is_found_even_if_dimensions_agree() -> None:
    assert found(("position", 2), ("target", 3), ("rest", 6)) is None
    assert found(("obs", 11)) is None
    assert found(("goal", 2)) is None, "a namesake of another dimension is another thing"
    assert found(("goal", 3), ("x", 2)) is None


def test_a_task_with_one_part_has_the_policys_in_their_order() -> None:
    own = [Feature("observation.state", 2), Feature("observation.environment_state", 6)]
    assert places(own, [Feature("observation", 8)], {}, "map") == list(range(8))
    assert places(own, [Feature("observation", 9)], {}, "map") is None


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"state": ["goal"]}, r"map: the policy has no 'state', but obs \(5\), x \(2\)"),
        ({"obs": ["gaol"]}, r"map: the task has no 'gaol', but agent_pos \(2\), goal \(3\), environment_state \(6\)"),
        ({"obs": ["goal"]}, "map: obs has dimension 5, and goal another"),
        ({"obs": ["goal", "agent_pos"], "x": ["agent_pos"]}, "would be taken twice"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_with_what_there_is(chosen: dict[str, list[str]], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        found(("obs", 5), ("x", 2), **chosen)


def test_what_metadata_says_counts_if_it_says_it_all() -> None:
    assert features_in([["a", 1], ["b", 2]], 3) == [Feature("a", 1), Feature("b", 2)]
    for content in (None, "ab", [["a", 1]], [["a", "1"], ["b", 2]], [["a", -1], ["b", 4]], [1, 2], [["a", 3, 4]]):
        assert features_in(content, 3) == []
