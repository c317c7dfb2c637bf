"""The tree drawn at the top of harness.errors is the tree of the classes."""

from __future__ import annotations

import re

import harness
import harness.errors
from harness import HarnessError

ENTRY = re.compile(r"\+ (\w+)(?: \((\w+)\))?")


def drawn() -> dict[str, tuple[str, ...]]:
    """Read class -> bases from the drawing: a line's first entry hangs on the root, the others on the first."""
    tree: dict[str, tuple[str, ...]] = {}
    branch = ""
    for line in (harness.errors.__doc__ or "").splitlines():
        for index, entry in enumerate(ENTRY.finditer(line)):
            is_branch = index == 0 and entry.start() == 1
            if is_branch:
                branch = entry[1]
            parent = "HarnessError" if is_branch else branch
            tree[entry[1]] = (parent, *([entry[2]] if entry[2] else []))
    return tree


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {
        name: tuple(base.__name__ for base in value.__bases__)
        for name, value in vars(harness.errors).items()
        if isinstance(value, type) and issubclass(value, HarnessError) and value is not HarnessError
    }
    assert drawn() == real


def test_every_error_is_public() -> None:
    assert {*drawn(), "HarnessError"} <= set(harness.__all__)
