"""Cases of a test that take minutes: `make test` runs some of them, `make soak` runs all."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest


def rest_in_soak(cases: Sequence[Any], quick: Collection[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`; those not in `quick` get the marker `soak`."""
    assert set(quick) <= set(cases), f"found {quick}, expected some of {cases}"
    return [case if case in quick else _in_soak(case) for case in cases]


def _in_soak(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.soak)
