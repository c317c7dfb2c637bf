"""The ``harness`` command. Nothing here is imported by the library."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with its code."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a process that ignores SIGINT goes on doing so
        # Nothing is under way while modules load. A KeyboardInterrupt could be lost in a half-imported one.
        signal.signal(signal.SIGINT, _leave)
    try:
        from harness.cli.app import main as run

        signal.signal(signal.SIGINT, before)
        run()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
