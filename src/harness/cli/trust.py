"""Trust: a project's harness.toml that names code or a server is used only after the user said so, once per content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from harness.checkpoint.local import private_folder
from harness.cli.config import ConfigFile, user_file
from harness.cli.endpoint import is_loopback
from harness.cli.places import user_folder
from harness.cli.text import safe
from harness.errors import CheckpointError, ConfigError


def trust_file() -> Path:
    """Return the file that keeps the digests of what is trusted, one a line."""
    return user_folder() / "trusted"


def is_trusted(digest: str) -> bool:
    """Say whether something with this digest was trusted."""
    try:
        return digest in trust_file().read_text().split()
    except OSError:
        return False


def remember(digest: str) -> None:
    """Trust something from now on.

    Raises:
        CheckpointError: the folder cannot be made.
        OSError: the file cannot be written.
    """
    if is_trusted(digest):
        return
    private_folder(trust_file().parent)
    old = trust_file().read_text() if trust_file().exists() else ""
    # A temporary file is made 0600 and replaces the old one whole: two processes never leave half a line.
    fd, name = tempfile.mkstemp(dir=trust_file().parent, prefix=".trusted-")
    with os.fdopen(fd, "w") as file:
        file.write(f"{old}{digest}\n")
    os.replace(name, trust_file())


def server_digest(base_url: str) -> str:
    """Return the digest under which a server is trusted."""
    return hashlib.sha256(f"server {base_url}".encode()).hexdigest()


def check(files: list[ConfigFile], *, trust: bool) -> None:
    """Ask for trust where it is needed.

    Args:
        files: the configuration files in use; the user's own needs no trust.
        trust: the user said so on the command line.

    Raises:
        ConfigError: it is needed and was not given.
    """
    for file in files:
        dangers = file.dangers()
        if not dangers or file.path == user_file() or is_trusted(file.digest):
            continue
        if trust or _asked(file, dangers):
            remember(file.digest)
            continue
        raise ConfigError(
            f"{file.path} names {', '.join(dangers)} and is not trusted: look at it, then run "
            f"`harness trust {file.path}` (or add --trust)"
        )


def check_server(base_url: str | None, *, named_here: bool, trust: bool) -> None:
    """Refuse to send a run to a server that only its journal names: a checkout may bring its own journal.

    Args:
        base_url: the server; None for the provider itself.
        named_here: the user, the environment or a trusted file names it now; it is remembered.
        trust: the user said so on the command line.

    Raises:
        ConfigError: nobody but the journal names it.
    """
    if base_url is None or is_loopback(base_url):
        return
    if named_here or trust:
        # Where it cannot be kept, a resume asks for --llm once more; no reason to stop the run.
        with contextlib.suppress(OSError, CheckpointError):
            remember(server_digest(base_url))
    elif not is_trusted(server_digest(base_url)):
        raise ConfigError(f"the run was started with the server {base_url!r}: add --llm {base_url} to go on with it")


def _asked(file: ConfigFile, dangers: list[str]) -> bool:
    """Ask on a terminal. Anything but yes is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(safe(f"{file.path} names {', '.join(dangers)}."), file=sys.stderr)
    print("Trust this file as it is now? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
