"""Checkpoints: the durable journal of a run, and the stores that keep it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.checkpoint.base import CheckpointStore, Owner, RunQuery, RunStatus, RunSummary

if TYPE_CHECKING:
    from harness.checkpoint.file import FileCheckpointStore
    from harness.checkpoint.memory import MemoryCheckpointStore
    from harness.checkpoint.sqlite import SQLiteCheckpointStore

__all__ = [
    "CheckpointStore",
    "FileCheckpointStore",
    "MemoryCheckpointStore",
    "Owner",
    "RunQuery",
    "RunStatus",
    "RunSummary",
    "SQLiteCheckpointStore",
]


def __getattr__(name: str) -> object:
    # Each backend is loaded when it is first asked for: a program pays for the one it uses.
    if name == "FileCheckpointStore":
        from harness.checkpoint.file import FileCheckpointStore

        return FileCheckpointStore
    if name == "MemoryCheckpointStore":
        from harness.checkpoint.memory import MemoryCheckpointStore

        return MemoryCheckpointStore
    if name == "SQLiteCheckpointStore":
        from harness.checkpoint.sqlite import SQLiteCheckpointStore

        return SQLiteCheckpointStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
