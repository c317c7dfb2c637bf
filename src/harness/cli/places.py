"""Where the command line keeps what belongs to the user and not to a project."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder() -> Path:
    """Return the user's own folder: HARNESS_HOME, else ``~/.agent-harness``.

    A project's ``.harness`` folder is not it: what comes with a checkout may not vouch for itself.
    """
    if value := os.environ.get("HARNESS_HOME"):
        return Path(value).expanduser()
    return Path.home() / ".agent-harness"
