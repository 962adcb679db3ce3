"""Damage for files that are otherwise valid."""

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# Bounded by the number of examples and the size of what they draw, and the same on every run.
FUZZ = settings(
    max_examples=250 if os.environ.get("SOAK") else 25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # to make a failure small takes minutes where each try writes a file
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD_NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.5, -0.0, 1e300])
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf")])
ODD_TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "\0", "../x", "a" * 5000, "\ud800", "__class__", "NaN", "1", "\n"])
)
ATOMS = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, NOT_FINITE, ODD_TEXTS)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def deep(depth: int) -> list:
    """Lists in lists."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """`content` with bits flipped, cut short, with a part missing, repeated or replaced by what was drawn."""
    kind = draw(st.sampled_from(["flip", "cut", "remove", "repeat", "replace", "random"]))
    if kind == "random":
        return draw(st.binary(max_size=200))
    start = draw(st.integers(0, max(0, len(content) - 1)))
    end = min(len(content), start + draw(st.integers(1, 200)))
    if kind == "cut":
        return content[:start]
    if kind == "remove":
        return content[:start] + content[end:]
    if kind == "repeat":
        return content[:end] + content[start:]
    if kind == "replace":
        return content[:start] + draw(st.binary(max_size=40)) + content[end:]
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        damaged[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


def places_in(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every item inside nested dicts and lists."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [p for key in keys for p in [(*path, key), *places_in(value[key], (*path, key))]]


@st.composite
def damaged_value(draw, value: Any, replacements: st.SearchStrategy = VALUES) -> Any:
    """A copy of nested dicts and lists with one to three of their items replaced, removed or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        places = places_in(value)
        if not places:
            return value
        value = _change(value, draw(st.sampled_from(places)), draw(st.sampled_from("-+===")), draw(replacements))
    return value


def _change(value: Any, path: tuple, how: str, new: Any) -> Any:
    key, *rest = path
    changed = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        changed[key] = _change(value[key], tuple(rest), how, new)
    elif how == "-":
        del changed[key]
    elif how == "+" and isinstance(changed, list):
        changed.insert(key, changed[key])
    else:
        changed[key] = new
    return changed
