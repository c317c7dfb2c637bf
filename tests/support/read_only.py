"""A folder that may only be read, and Python in a process to which that applies: also where the tests run as root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import harness

# Root may write anywhere by capabilities, and a process may give them up: then a file's permissions hold for it, too.
POWERLESS = """
import ctypes, os
if os.geteuid() == 0:
    version_3_of_this_process, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version_3_of_this_process, none) == 0
"""


@contextmanager
def only_to_be_read(folder: Path) -> Iterator[None]:
    """Take away the right to write from a folder and all it holds."""
    paths = [*sorted(folder.rglob("*"), reverse=True), folder]
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        yield
    finally:
        for path, mode in zip(reversed(paths), reversed(modes), strict=True):
            if path.exists():
                path.chmod(mode)


def powerless(code: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python that may do no more than the permissions of files say."""
    env = os.environ | {"PYTHONPATH": str(Path(harness.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-c", POWERLESS + code, *map(str, words)],
        capture_output=True, text=True, timeout=60, check=False, env=env,
    )  # fmt: skip
