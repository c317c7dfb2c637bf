"""The public types are what users see: pyright, strict, over code that a user would write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS = {
    "typeCheckingMode": "strict",
    "pythonVersion": "3.11",
    "reportUnnecessaryTypeIgnoreComment": "error",
}

pytestmark = pytest.mark.timeout(180)


def _pyright(folder: Path) -> list[str]:
    """Check a folder of files that import the installed package, as a user's checker would."""
    settings = {**SETTINGS, "include": ["."]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(folder)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 0
    return [
        f"{Path(d['file']).name}:{d['range']['start']['line'] + 1}: {d['message']}"
        for d in report["generalDiagnostics"]
    ]


def test_user_code_has_the_types_it_expects(tmp_path: Path) -> None:
    (tmp_path / "public_api.py").write_text((HERE / "public_api.py").read_text(encoding="utf-8"), encoding="utf-8")
    for number, document in enumerate([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]):
        for place, code in enumerate(PYTHON_BLOCK.findall(document.read_text(encoding="utf-8"))):
            (tmp_path / f"doc_{number}_{place}.py").write_text(f"# pyright: standard\n{code}", encoding="utf-8")
    found = _pyright(tmp_path)
    assert not found, "\n".join(found)


def test_a_wrong_expectation_is_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "from harness import AgentConfig\n\nAgentConfig(5)\nAgentConfig('a').max_steps.upper()\n", encoding="utf-8"
    )
    assert [line.split(":")[1] for line in _pyright(tmp_path)] == ["3", "4", "4"]
