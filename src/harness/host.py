"""The one place the library meets its process: ``--resume`` in sys.argv, the state directory, the hint on stderr."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from harness.errors import ConfigError
from harness.records import Origin

logger = logging.getLogger("harness")
logger.addHandler(logging.NullHandler())


class _Once:
    """What happens once per process."""

    resume_taken = False
    hint_printed = False


def maybe_resume_key() -> str | None:
    """Take the key from ``--resume KEY`` or ``--resume=KEY`` in ``sys.argv``: once per process, then None.

    Exits with code 2 and a usage line on stderr when the option has no value.
    """
    if _Once.resume_taken:
        return None
    for index, word in enumerate(sys.argv[1:], start=1):
        if word == "--":
            return None
        if word == "--resume" or word.startswith("--resume="):
            _Once.resume_taken = True
            key = word[9:] if word != "--resume" else (sys.argv[index + 1] if index + 1 < len(sys.argv) else "")
            if not key or (word == "--resume" and key.startswith("-")):
                print("Usage: --resume <key>", file=sys.stderr)
                raise SystemExit(2)
            return key
    return None


def state_dir() -> Path:
    """Return where runs are kept: CHECKPOINT_DIR, HARNESS_HOME, ``.harness`` here, or ``~/.agent-harness``."""
    for variable in ("CHECKPOINT_DIR", "HARNESS_HOME"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    here = Path.cwd() / ".harness"
    return here if here.is_dir() else Path.home() / ".agent-harness"


def default_database() -> Path:
    """Return the file that keeps runs where no store is given."""
    return state_dir() / "runs.db"


def script_origin() -> Origin:
    """Describe the running script, without ``--resume`` and its value."""
    words: list[str] = []
    rest = iter(sys.argv[1:])
    for word in rest:
        if word == "--resume":
            next(rest, None)
        elif not word.startswith("--resume="):
            words.append(word)
    command = ("python", *_main_program(), *words)
    return Origin("script", tuple(_writable(word) for word in command), _writable(os.getcwd()))


def _writable(word: str) -> str:
    """Return a word of the command line that can be written as UTF-8."""
    return word.encode("utf-8", "replace").decode()


def _main_program() -> tuple[str, ...]:
    """Return what stands between ``python`` and the program's own words: a file, or ``-m`` and a module."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        return ("-m", spec.name.removesuffix(".__main__"))
    return (sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-c") else "<script>",)


def approval_key() -> bytes:
    """Return the key that answers are signed with: HARNESS_APPROVAL_KEY, else one that is kept in the user's home.

    It is never kept beside the runs: whoever can write to those alone cannot make up an answer. It is made when it is
    first needed.

    Raises:
        ConfigError: the key cannot be read or made, or is too short.
    """
    given = os.environ.get("HARNESS_APPROVAL_KEY", "")
    if given:
        if len(given) < LEAST_KEY_CHARS:
            raise ConfigError(f"HARNESS_APPROVAL_KEY must have {LEAST_KEY_CHARS} characters or more")
        return given.encode("utf-8", "surrogateescape")
    path = Path.home() / ".agent-harness" / "approval.key"
    try:
        return _kept_key(path)
    except OSError as error:
        raise ConfigError(
            f"the key for approvals cannot be kept in {str(path)!r} ({error.strerror}): set HARNESS_APPROVAL_KEY"
        ) from error


LEAST_KEY_CHARS = 32


def _kept_key(path: Path) -> bytes:
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        if not path.exists():
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(secrets.token_hex(32))
            try:
                os.link(draft, path)  # of several processes the first one's key stays
            finally:
                draft.unlink()
    key = path.read_bytes().strip()
    if len(key) < LEAST_KEY_CHARS:
        raise ConfigError(f"{str(path)!r} does not hold a key for approvals: delete it, and old answers with it")
    return key


def who() -> str:
    """Name the person at this machine, as it is written down beside an answer."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return str(os.getuid())


def resume_command(origin: Origin | None, key: str) -> str:
    """Return the exact line that goes on with a run."""
    if origin is None or origin.kind == "cli":
        return f"harness resume {shlex.quote(key)}"
    return f"{shlex.join(origin.command)} --resume {shlex.quote(key)}"


def hint_interrupted(label: str, key: str, origin: Origin | None) -> None:
    """Say on stderr, once per process, how to go on with what was interrupted."""
    if _Once.hint_printed:
        return
    _Once.hint_printed = True
    print(
        f"\n{label} interrupted — checkpoint saved.\nResume: {resume_command(origin, key)}", file=sys.stderr, flush=True
    )


def refuse(text: str) -> NoReturn:
    """End a script whose words on the command line cannot be followed, with one sentence."""
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(1)


def say(text: str) -> None:
    """Tell the person at the terminal something a resumed script should not hide."""
    print(text, file=sys.stderr, flush=True)
