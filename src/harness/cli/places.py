"""Where the command line keeps what belongs to the user and not to a project."""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness import host
from harness.errors import CheckpointError

_ANOTHER_PATH = re.compile(r"name another (?:path for the checkpoints|path|one)$")


def user_folder() -> Path:
    """Return the user's own folder: HARNESS_HOME, else ``~/.agent-harness``.

    A project's ``.harness`` folder is not it: what comes with a checkout may not vouch for itself.
    """
    if value := os.environ.get("HARNESS_HOME"):
        return Path(value).expanduser()
    return Path.home() / ".agent-harness"


def check_state_folder() -> None:
    """Refuse a state folder that is a file, or lies in one.

    Raises:
        CheckpointError: it is.
    """
    there = host.state_dir()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise CheckpointError(f"{str(there)!r} is no folder: {_another_folder()}")


def advised(sentence: str) -> str:
    """Return an error of the library's with its advice as it is followed on a command line."""
    return _ANOTHER_PATH.sub(_another_folder(), sentence)


def _another_folder() -> str:
    variable = "CHECKPOINT_DIR" if os.environ.get("CHECKPOINT_DIR") else "HARNESS_HOME"
    return f"set {variable} to another folder, or move the file away"
