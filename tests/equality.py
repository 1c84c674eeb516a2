"""What an environment returned, compared to the last bit."""

from typing import Any

import numpy as np


def assert_same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where} {name}")
    elif expected.dtype == object:
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert (ours is None) == (theirs is None), where
            if theirs is not None:
                assert_same(ours, theirs, f"{where} {i}")
    else:
        assert found.dtype == expected.dtype, where
        np.testing.assert_array_equal(found, expected, where, strict=True)
