"""The contract of checkpoint stores, over every store the library ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.checkpoint import CheckpointStore, FileCheckpointStore, MemoryCheckpointStore, SQLiteCheckpointStore
from harness.testing.store_contract import CheckpointStoreContract


class TestMemoryCheckpointStore(CheckpointStoreContract):
    reopens = False

    @pytest.fixture
    def open_store(self) -> Callable[[], CheckpointStore]:
        return MemoryCheckpointStore


class TestSQLiteCheckpointStore(CheckpointStoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], CheckpointStore]:
        return lambda: SQLiteCheckpointStore(tmp_path / "runs.db")


class TestFileCheckpointStore(CheckpointStoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], CheckpointStore]:
        return lambda: FileCheckpointStore(tmp_path / "checkpoints")
