"""``harness doctor``: what this installation has, and what is broken."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from harness import host
from harness.checkpoint.base import RunQuery
from harness.cli import config
from harness.cli.endpoint import NoLLM, find_endpoint
from harness.cli.places import advised, check_state_folder
from harness.cli.screen import is_terminal
from harness.cli.text import safe
from harness.cli.trust import is_trusted
from harness.errors import HarnessError

EXTRAS = {"anthropic": "anthropic", "openai": "openai", "shell": "tree_sitter_bash"}
"""What each extra of the package brings: a module that is there when the extra is."""

SYNCED = (2, 3)
"""SQLite's numbers for FULL and EXTRA: a commit that returned survives a power cut."""

LEAST_PYTHON = (3, 11)


class Finding(NamedTuple):
    """One line. ``good`` is None where there is nothing to judge."""

    good: bool | None
    text: str


def examine() -> int:
    """Print one line for each thing; return 1 where something is broken."""
    broken = False
    for name, check in CHECKS.items():
        try:
            finding = check()
        except (HarnessError, OSError) as error:
            finding = Finding(False, advised(str(error)))
        broken |= finding.good is False
        mark = {True: "ok  ", False: "BAD ", None: "--  "}[finding.good]
        print(f"{mark}{name:<10}{safe(finding.text)}")
    return 1 if broken else 0


def _python() -> Finding:
    good = sys.version_info >= LEAST_PYTHON
    return Finding(good, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _state() -> Finding:
    folder = host.state_dir()
    check_state_folder()
    there = folder
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(False, f"{there} cannot be written: set HARNESS_HOME to a folder of yours")
    made = "" if folder.exists() else " (made at the first run)"
    return Finding(True, f"{folder}{made}")


def _store() -> Finding:
    path = host.default_database()
    if not path.exists():
        return Finding(None, "no run was kept yet")
    return asyncio.run(_examine_store(path))


async def _examine_store(path: Path) -> Finding:
    from harness.checkpoint.sqlite import SQLiteCheckpointStore

    store = SQLiteCheckpointStore(path)
    try:
        counts = Counter([run.status async for run in store.runs(RunQuery())])
        settings = await store.settings()
    finally:
        await store.close()
    runs = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "no runs"
    durable = settings["journal_mode"] == "wal" and settings["synchronous"] in SYNCED
    how = f"journal_mode={settings['journal_mode']} synchronous={settings['synchronous']}"
    return Finding(durable, f"{how}, {runs}, {os.stat(path).st_size / 1e6:.1f} MB")


def _llm() -> Finding:
    try:
        files = config.find(None)
        for file in files:
            if file.dangers() and file.path != config.user_file() and not is_trusted(file.digest):
                return Finding(None, f"{file.path} is not trusted yet, and nothing it names is asked before it is")
        endpoint = find_endpoint(None, None, None, config.merged(files).llm)
    except NoLLM:
        ways = "set OPENAI_API_KEY, ANTHROPIC_API_KEY or OPENAI_BASE_URL, or pass --llm"
        return Finding(None, f"none found: {ways}; `harness demo` needs none")
    return Finding(True, endpoint.describe())


def _extras() -> Finding:
    missing = [extra for extra, module in EXTRAS.items() if find_spec(module) is None]
    if missing:
        return Finding(None, f"not installed: {', '.join(missing)} (pip install '.[{missing[0]}]' from the checkout)")
    return Finding(True, ", ".join(EXTRAS))


def _terminal() -> Finding:
    if not is_terminal(sys.stdout):
        return Finding(None, "not a terminal: plain lines are printed")
    colour = "without colour (NO_COLOR)" if os.environ.get("NO_COLOR") else "with colour"
    return Finding(True, f"{os.environ.get('TERM', '')}, {colour}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "state": _state,
    "store": _store,
    "llm": _llm,
    "extras": _extras,
    "terminal": _terminal,
}
