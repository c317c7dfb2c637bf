"""The README's two commands: what they say where they cannot go on, and that they do nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("try", "check", "scripts/set-up", "scripts/renew-constraints", ".ci/run")
NEEDED = ("sh", "cat", "cksum", "dirname", "env", "grep", "rm")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout's scripts in a folder with a blank in its name, on a machine with a Python that is too old."""
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("try", "check", "scripts/set-up", "constraints.txt", "constraints-run.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    machine = tmp_path / "bin"
    machine.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found
        (machine / name).symlink_to(found)
    _program(machine / "python3", 'case "$1" in --version) echo Python 3.9.18 ;; *) exit 1 ;; esac')
    return folder


def _program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def _run(checkout: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {"HOME": str(checkout.parent), "PATH": str(checkout.parent / "bin"), **env}
    return subprocess.run(
        [f"./{words[0]}", *words[1:]], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_run(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    shell = (ROOT / name).read_text(encoding="utf-8").splitlines()[0].rpartition("/")[2].rpartition(" ")[2]
    subprocess.run([shell, "-n", str(ROOT / name)], check=True)


@pytest.mark.parametrize("command", ["try", "check"])
def test_an_old_python_is_named_and_nothing_is_left_behind(checkout: Path, command: str) -> None:
    done = _run(checkout, command)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed and was not found (found: Python 3.9.18)" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_cannot_make_environments_is_named(checkout: Path) -> None:
    _program(checkout.parent / "bin" / "python3", '[ "$1" = -c ]')
    done = _run(checkout, "try")
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def _pretend_set_up(checkout: Path) -> None:
    """Leave what a finished set-up leaves: an environment, and the stamp of what it was made from."""
    _program(checkout / ".venv/bin/python", "exit 0")
    _program(checkout / ".venv/bin/harness", 'echo "harness $*"')
    made_from = '{ pwd; cat constraints-run.txt pyproject.toml; } | cksum > ".venv/.set-up-run"'
    subprocess.run(["sh", "-c", made_from], cwd=checkout, check=True)


@pytest.mark.parametrize(
    ("env", "words", "expected"),
    [
        ({}, (), "harness demo\n"),
        ({"OPENAI_API_KEY": "k"}, (), "harness run What is in this folder, and what is it for? --folder .\n"),
        ({"ANTHROPIC_API_KEY": "k"}, (), "harness run What is in this folder, "),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, (), "harness run What is in this folder, "),
        ({}, ("resume", "a b"), "harness resume a b\n"),
    ],
)
def test_nothing_is_installed_twice_and_the_words_reach_the_command(
    checkout: Path, env: dict[str, str], words: tuple[str, ...], expected: str
) -> None:
    _pretend_set_up(checkout)
    done = _run(checkout, "try", *words, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(expected)


def test_a_changed_pin_is_installed(checkout: Path) -> None:
    _pretend_set_up(checkout)
    with (checkout / "constraints-run.txt").open("a", encoding="utf-8") as pins:
        pins.write("\n")
    assert "making .venv" in _run(checkout, "try").stderr
