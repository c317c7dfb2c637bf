"""The repository names no machine it was made on, and its pins agree with each other."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = "|".join(re.escape(str(path)) for path in (ROOT, Path(pwd.getpwuid(os.getuid()).pw_dir)) if path != Path("/"))
MACHINE = re.compile(rf"(?<![\w.~$}}])(?:/(?:root|work|opt)/\w|(?:{HERE})\b)|\.\./shared|file:///\w")
PIN = re.compile(
    r"^([a-z0-9][\w.-]*)==([\w.]+)((?: ;[^\\\n]*)?) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_machine() -> None:
    found: list[str] = []
    for path in _files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        for number, line in enumerate(text.splitlines(), start=1):
            if MACHINE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["see /" + "root/x", f"in {ROOT}/x", '"/' + 'opt/pypi"', "../" + "shared/x"])
def test_a_machine_path_would_be_found(line: str) -> None:
    assert MACHINE.search(line)


def test_no_lock_file_with_addresses_is_kept() -> None:
    assert "uv.lock" not in {path.name for path in _files()}


def _pins(name: str) -> dict[str, tuple[str, str]]:
    text = (ROOT / name).read_text(encoding="utf-8")
    pins = {match[1]: (match[2], match[4]) for match in PIN.finditer(text)}
    assert len(pins) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE)), (
        f"{name} has a line that is not a pin with hashes"
    )
    assert "://" not in text
    return pins


def test_everything_is_pinned_with_hashes_and_the_two_files_agree() -> None:
    everything, running = _pins("constraints.txt"), _pins("constraints-run.txt")
    assert running.items() <= everything.items()
    assert {"msgspec", "pydantic", "apsw", "openai", "tree-sitter-bash", "uv-build"} <= running.keys()
    assert {"pytest", "ruff", "pyright", "import-linter"} <= everything.keys() - running.keys()
    # The name is taken on the package index: a pin of it would fetch somebody else's code.
    assert "react-agent-harness" not in everything
