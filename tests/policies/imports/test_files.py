"""A small file is not read into a large structure."""

from typing import Any

import pytest

from policies import UserError
from policies.imports.files import referred


def test_references_are_followed_and_what_leads_nowhere_or_in_circles_stays_text() -> None:
    root = {"a": "${b.c}", "b": {"c": ["${d}"], "d": "${nowhere}"}, "d": 3, "e": "${f}", "f": "${e}"}
    assert referred(root, {"x": "${a}", "y": "${b.d}", "z": "${eval:1}"}) == {
        "x": [3],
        "y": "${nowhere}",
        "z": "${eval:1}",
    }
    assert referred(root, "${e}") in ("${e}", "${f}")


@pytest.mark.parametrize("levels", [{str(i): [f"${{{i + 1}}}"] * 20 for i in range(8)}])
def test_references_to_references_that_would_grow_without_end_are_refused(levels: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="more than 100,000 entries"):
        referred(levels, "${0}")
