"""The documents' code runs, prints what they show, and their commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SUBCOMMAND = re.compile(r"^(?:harness|\./try) ([a-z]+)", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A python block, and the text block that may follow it right away."""

    place: str
    code: str
    output: str | None


def blocks(path: Path) -> list[tuple[int, str, str, str]]:
    """Return (line, language, body, what stands between it and the block before) of each fenced block."""
    text = path.read_text(encoding="utf-8")
    found: list[tuple[int, str, str, str]] = []
    end = 0
    for match in FENCE.finditer(text):
        found.append((text.count("\n", 0, match.start()) + 1, match[1], match[2], text[end : match.start()].strip()))
        end = match.end()
    return found


def examples() -> list[Example]:
    found: list[Example] = []
    for path in DOCUMENTS:
        every = blocks(path)
        for (line, language, code, _), following in zip(every, [*every[1:], None], strict=False):
            if language == "python":
                shown = following[2] if following and following[1] == "text" and not following[3] else None
                found.append(Example(f"{path.relative_to(ROOT)}:{line}", code, shown))
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.place)
def test_a_python_block_runs_as_a_script(example: Example, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example.code, encoding="utf-8")
    words = [sys.executable, "-X", "utf8", "-W", "error", str(script)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if example.output is not None:
        assert done.stdout == example.output


def test_there_are_examples_and_one_shows_its_output() -> None:
    assert any(example.output for example in examples() if example.place.startswith("README.md"))


def test_every_command_shown_exists() -> None:
    shown = {
        word
        for path in DOCUMENTS
        for _, lang, body, _ in blocks(path)
        if lang == "sh"
        for word in SUBCOMMAND.findall(body)
    }
    assert "resume" in shown
    command = Path(sys.executable).with_name("harness")
    for word in sorted(shown):
        done = subprocess.run([str(command), word, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"harness {word}: {done.stderr}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_the_documents_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target!r}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
