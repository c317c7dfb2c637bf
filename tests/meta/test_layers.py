"""DESIGN's layers hold, and the check of them can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _lint_imports(source: Path) -> subprocess.CompletedProcess[str]:
    # -I and the path spelled out: the copy is linted, not the installed package.
    code = f"import sys; sys.path.insert(0, {str(source)!r}); from importlinter.cli import lint_imports_command; " \
           "lint_imports_command()"  # fmt: skip
    words = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def test_the_layers_hold() -> None:
    done = _lint_imports(ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_import_upward_and_a_module_without_a_layer_are_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src" / "harness", tmp_path / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "harness" / "records.py").open("a", encoding="utf-8") as file:
        file.write("\nimport harness.runtime\nimport time\n")
    (tmp_path / "harness" / "stray.py").write_text('"""Belongs nowhere."""\n', encoding="utf-8")
    done = _lint_imports(tmp_path)
    assert done.returncode == 1
    assert "harness.records -> harness.runtime" in done.stdout
    assert "harness.records -> time" in done.stdout
    assert "stray" in done.stdout
