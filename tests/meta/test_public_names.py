"""What `import harness` offers: exactly the names it lists, quickly, and without what it does not need."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import harness

CPU_LIMIT_S = 0.100
NOT_WITH_IMPORT = (
    "anthropic", "apsw", "cyclopts", "docstring_parser", "genai_prices", "httpx2", "openai", "pydantic", "rich",
    "harness.cli", "harness.testing",
)  # fmt: skip


def test_every_listed_name_is_there_once() -> None:
    assert len(set(harness.__all__)) == len(harness.__all__)
    assert dir(harness) == sorted(harness.__all__)
    for name in harness.__all__:
        assert getattr(harness, name) is not None


def test_a_type_checker_sees_the_names_that_are_listed() -> None:
    tree = ast.parse(Path(harness.__file__).read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.asname or alias.name
        for block in guarded
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(harness.__all__)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="AgentRuntim'"):
        harness.AgentRuntim  # type: ignore[attr-defined] # noqa: B018


def test_a_name_that_is_listed_twice_comes_from_one_place() -> None:
    """`harness.X` and `harness.part.X` are the same object."""
    import harness.checkpoint
    import harness.tools

    for package in (harness.checkpoint, harness.tools):
        for name in set(package.__all__) & set(harness.__all__):
            assert getattr(package, name) is getattr(harness, name)


def _python(code: str) -> tuple[str, float]:
    """Run a fresh interpreter; return what it printed and the CPU seconds it took."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return done.stdout, used


def test_import_loads_nothing_optional() -> None:
    printed, _ = _python("import sys, harness; print(*sys.modules)")
    loaded = set(printed.split())
    assert "harness" in loaded
    assert loaded.isdisjoint(NOT_WITH_IMPORT)


def test_import_is_quick() -> None:
    best = min(_python("import harness")[1] for _ in range(5))
    print(f"start and import: {best * 1000:.0f} ms of CPU")
    assert best < CPU_LIMIT_S
