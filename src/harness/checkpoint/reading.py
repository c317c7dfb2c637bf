"""Reading the SQLite file of checkpoints where it cannot be opened for writing: its folder or its disk is read-only.

SQLite reads a file with a write-ahead log only where it can make the files beside it, or where they are there
(https://sqlite.org/wal.html#readonly).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apsw

from harness.checkpoint.database import Database
from harness.errors import CheckpointError
from harness.mailbox import Mail

T = TypeVar("T")


class Reader(Database):
    """A connection that only reads, and makes nothing beside the file."""

    def _connect(self) -> apsw.Connection:
        log = self._beside("-wal")
        how, self._before = "", None
        if not self._beside("-shm").exists():  # nobody has the file open: there are no locks to be heeded
            how = "&vfs=unix-none" if log.exists() and log.stat().st_size else "&immutable=1"
            self._before = self._now()
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        return apsw.Connection(f"{self.path.as_uri()}?mode=ro{how}", flags=flags)

    def _prepare(self) -> None:
        if self._before is not None:
            self._pragma("locking_mode", "EXCLUSIVE")  # the index of a log is kept in memory then
        if self._is_new():
            raise apsw.CantOpenError("it is empty")

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f"{self.path.name}{ending}")

    def _now(self) -> list[tuple[int, int]]:
        files = [path.stat() for path in (self.path, self._beside("-wal")) if path.exists()]
        return [(file.st_mtime_ns, file.st_size) for file in files]

    def is_outdated(self) -> bool:
        """Say whether somebody has written what was read without locks."""
        return self._before is not None and self._before != self._now()

    def inbox(self, run_id: str) -> list[Mail]:
        """Return a run's commands; a file of a release without mailboxes holds none."""
        return super().inbox(run_id) if self._has_mailboxes() else []


def read_only(path: Path, work: Callable[[Database], T], *, busy_timeout_s: float) -> T:
    """Do work that only reads, on a connection of its own. Raises ``apsw.Error`` as it is."""
    while True:
        reader = Reader(path, busy_timeout_s=busy_timeout_s)
        try:
            done = work(reader)
        except (apsw.Error, CheckpointError):
            if not reader.is_outdated():
                raise
        else:
            if not reader.is_outdated():
                return done
        finally:
            reader.close(tidy=False)
