"""Rebuilding the house changes no number: every figure of four tasks is what it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden import TARGETS, WEIGHTS, machine, make_golden, read_golden

CLOSE = 2e-4
"""Relative and absolute: how far numbers may lie apart on a machine whose arithmetic rounds in another order."""


@pytest.mark.parametrize("task", TARGETS)
def test_every_number_is_what_it_was(task: str, tmp_path: Path) -> None:
    expected, where = read_golden(task)
    found = make_golden(task, tmp_path.resolve())
    assert list(found) == list(expected)
    assert list(differences(found, expected, exact=where == machine())) == []


def differences(found: Any, expected: Any, exact: bool, at: str = "") -> Iterator[str]:
    """Where two trees of plain values differ, and in what."""
    if isinstance(found, dict) and isinstance(expected, dict):
        if list(found) != list(expected):
            yield f"{at}: got the keys {list(found)}, expected {list(expected)}"
            return
        for key in found:
            yield from differences(found[key], expected[key], exact, f"{at}/{key}")
    elif isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            yield f"{at}: got {len(found)}, expected {len(expected)}"
            return
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, exact, f"{at}/{index}")
    elif found != expected and (exact or not _close(found, expected)):
        yield f"{at}: got {found!r}, expected {expected!r}"


def _close(found: Any, expected: Any) -> bool:
    """Whether two leaves say the same number, or stand for weights."""
    if isinstance(found, bool) or isinstance(expected, bool) or found is None or expected is None:
        return False
    if str(found).startswith(WEIGHTS) and str(expected).startswith(WEIGHTS):
        return True
    try:
        return float(found) == pytest.approx(float(expected), rel=CLOSE, abs=CLOSE, nan_ok=True)
    except ValueError:
        return False


@pytest.mark.parametrize(("change", "exact", "n"), [
    ({"b": [1.0, "0.51"]}, False, 1), ({"b": [1.00001, "0.50001"]}, False, 0), ({"b": [1.00001, "0.5"]}, True, 1),
    ({"b": [1.0]}, False, 1), ({"c": [1.0, "0.5"]}, False, 1), ({"b": [1.0, None]}, False, 1),
    ({"b": [1.0, "x"]}, False, 1),
])  # fmt: skip
def test_a_difference_is_seen(change: dict[str, Any], exact: bool, n: int) -> None:
    assert len(list(differences(change, {"b": [1.0, "0.5"]}, exact))) == n
