"""The SQLite file of checkpoints: its layout, its statements and its errors. Plain, blocking, one thread at a time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import apsw
import msgspec

from harness.checkpoint.base import (
    Owner,
    RunQuery,
    RunStatus,
    RunSummary,
    describe,
    final_status,
    is_alive,
    lease_clock,
)
from harness.checkpoint.local import create_private_file, private_folder, refuse_network
from harness.errors import (
    CheckpointConflict,
    CheckpointCorrupt,
    CheckpointError,
    InternalError,
    OwnershipLost,
    RecordTooNew,
    RunNotFound,
    StoreBusy,
)
from harness.mailbox import Command, Mail, decode_command, encode_command
from harness.records import Origin, ProcessId, Record, RunStarted, encode

Value: TypeAlias = int | float | str | bytes | None
"""What a column holds."""

APPLICATION_ID = 0x72616831
"""Marks a database file as ours: "rah1"."""

SCHEMA_VERSION = 1

CHUNK = 200
"""How many batches are read at a time."""

NOT_WRITABLE = (apsw.ReadOnlyError, apsw.PermissionsError, apsw.CantOpenError)
"""What SQLite raises where a file cannot be opened for writing."""

_PAGE_SIZE = 2048  # a commit writes whole pages, and a step is about 500 bytes
_CHECKPOINT_PAGES = 1000  # 2 MB of write-ahead log: it is overwritten then, which is cheaper than growing

# A batch of records is one row of one b-tree, so that an append touches one page. Its position is the run's number
# in the upper bits and the sequence number of its last record in the lower 32: the largest position of a run says
# where its journal ends. Numbers and tokens are never used twice, not even after a delete.
_SCHEMA = f"""
CREATE TABLE run (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    goal TEXT, agent_id TEXT, origin BLOB, status TEXT, started_at REAL
) STRICT;
CREATE TABLE owner (
    token INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    run INTEGER NOT NULL,
    process BLOB NOT NULL,
    lease_until REAL NOT NULL
) STRICT;
CREATE TABLE journal (position INTEGER PRIMARY KEY, at REAL NOT NULL, records BLOB NOT NULL) STRICT;
CREATE TABLE blob (run INTEGER NOT NULL, digest TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (run, digest)) STRICT;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

# Apart from the schema, so that a file of a release without mailboxes gets one and stays readable for it.
_MAILBOX = """
CREATE TABLE IF NOT EXISTS mail (
    id TEXT PRIMARY KEY, run_id TEXT NOT NULL, received_at REAL NOT NULL, command BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS mail_of_run ON mail (run_id, received_at);
"""

_SEQ = 0xFFFFFFFF

# One statement checks the owner and the end of the journal and writes; it writes nothing where either differs.
_APPEND = """
INSERT INTO journal (position, at, records)
SELECT (run << 32) + ?1 + ?2, ?3, ?4 FROM owner
WHERE token = ?5 AND run_id = ?6 AND ?1 = coalesce(
    (SELECT position - (run << 32) FROM journal
     WHERE position > (run << 32) AND position < ((run + 1) << 32) ORDER BY position DESC LIMIT 1), 0)
"""

_READ = """
SELECT position & 0xffffffff, at, records FROM journal, run
WHERE run_id = ?1 AND position > (number << 32) + ?2 AND position < ((number + 1) << 32) ORDER BY position LIMIT ?3
"""

_RUNS = """
SELECT run.run_id, goal, agent_id, origin, status, started_at,
    (SELECT at FROM journal WHERE position < ((number + 1) << 32) ORDER BY position DESC LIMIT 1), process, lease_until
FROM run LEFT JOIN owner ON owner.run_id = run.run_id
WHERE status IS NOT NULL AND goal IS NOT NULL AND (?1 IS NULL OR status = ?1) ORDER BY started_at DESC, number DESC
"""


class Append:
    """One append on its way: what to write, who waits for it, and what became of it."""

    __slots__ = ("at", "data", "error", "expected_seq", "records", "run_id", "status", "token", "waiter")

    def __init__(self, run_id: str, expected_seq: int, records: Sequence[Record], token: int) -> None:
        self.run_id = run_id
        self.expected_seq = expected_seq
        self.records = records
        self.data = encode(records)
        self.token = token
        self.status = _status(records)
        self.waiter: asyncio.Future[None] | None = None
        self.at: float | None = None
        self.error: CheckpointError | None = None

    def result(self) -> float:
        """Return when it was written, or raise why it was not."""
        if self.at is None:
            raise self.error or InternalError(f"an append to run {self.run_id!r} was neither written nor refused")
        return self.at

    def wake(self) -> None:
        """Tell the waiter, on its event loop, that the append is settled. One that was cancelled is gone."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _LogLength:
    """Called by SQLite after each commit; apart from Database, so that no cycle keeps the connection open."""

    pages = 0

    def __call__(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self.pages = pages
        return apsw.SQLITE_OK


class Database:
    """A connection to the file, opened and checked. Blocking; one thread at a time. Raises ``apsw.Error`` as it is."""

    def __init__(self, path: Path, *, busy_timeout_s: float) -> None:
        refuse_network(path)
        private_folder(path.parent)
        try:
            create_private_file(path)
        except OSError as error:
            raise CheckpointError(f"cannot create {str(path)!r}: {error.strerror}; name another path") from error
        self.path = path
        self._log = _LogLength()
        self._busy_ms = round(busy_timeout_s * 1000)
        self._waits = False
        self._file = os.stat(path)
        self._db = self._connect()
        try:
            self.wait_when_busy(True)
            # A file may have been made by somebody else: nothing in its schema is trusted to be more than data.
            self._db.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
            self._db.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
            self._prepare()
        except BaseException:
            self._db.close(True)
            raise

    def _connect(self) -> apsw.Connection:
        return apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)

    def _prepare(self) -> None:
        with self._snapshot():
            new = self._is_new()
        if new:
            self._pragma("page_size", _PAGE_SIZE)
        self._use_wal()
        self._pragma("synchronous", "FULL")
        self._pragma("fullfsync", 1)
        self._pragma("checkpoint_fullfsync", 1)
        found = self.settings()
        if (found["journal_mode"], found["synchronous"], found["fullfsync"]) != ("wal", 2, 1):
            raise CheckpointError(f"{str(self.path)!r} cannot be written durably: SQLite reports {found!r}")
        if new:
            with self._transaction():
                if self._is_new():  # still: another process may have been quicker
                    self._run(_SCHEMA)
        if not self._has_mailboxes():
            self._run(_MAILBOX)
        self._db.set_wal_hook(self._log)

    @contextlib.contextmanager
    def _unsynced(self) -> Generator[None]:
        """Do not wait for the disk: who owns a run need not survive a power cut, since no process does.

        The log is written in order, so an append that is synced later takes the claim before it along.
        """
        self._pragma("synchronous", "NORMAL")
        try:
            yield
        finally:
            self._pragma("synchronous", "FULL")

    @contextlib.contextmanager
    def _snapshot(self) -> Generator[None]:
        """Read what follows at one instant, whatever other processes write meanwhile."""
        self._run("BEGIN")
        try:
            yield
        finally:
            self._run("COMMIT")

    def _is_new(self) -> bool:
        """Say whether the file is still empty; refuse one that is not ours."""
        application = self._pragma("application_id")
        version = self._pragma("user_version")
        if application == 0 and version == 0 and self._one("SELECT 1 FROM sqlite_schema LIMIT 1") is None:
            return True
        if application != APPLICATION_ID:
            raise CheckpointCorrupt(
                f"{str(self.path)!r} is a database of another application: name another path for the checkpoints"
            )
        if cast("int", version) > SCHEMA_VERSION:
            raise RecordTooNew(
                f"{str(self.path)!r} was written by a newer react-agent-harness (layout {version}; this one reads up "
                f"to {SCHEMA_VERSION}): update react-agent-harness to go on"
            )
        return False

    def _has_mailboxes(self) -> bool:
        return self._one("SELECT 1 FROM sqlite_schema WHERE name = 'mail'") is not None

    def _use_wal(self) -> None:
        # Two processes that open a new file at once both want the lock this takes, and SQLite does not wait for it.
        deadline = time.monotonic() + self._busy_ms / 1000
        while True:
            try:
                self._pragma("journal_mode", "WAL")
                return
            except apsw.BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def settings(self) -> dict[str, str | int]:
        """Read back how the database is set."""
        names = ("journal_mode", "synchronous", "fullfsync", "page_size", "application_id", "user_version")
        return {name: cast("str | int", self._pragma(name)) for name in names}

    def wait_when_busy(self, wait: bool, /) -> None:
        """Choose between waiting for another process that writes and failing at once."""
        if wait != self._waits:
            self._db.set_busy_timeout(self._busy_ms if wait else 0)
            self._waits = wait

    def append(self, appends: Sequence[Append]) -> None:
        """Commit appends together and settle each. One that is refused has written nothing and fails only itself."""
        at = time.time()
        if len(appends) == 1 and appends[0].status is None:
            self._append(appends[0], at)  # a single statement is a transaction of its own
            return
        try:
            with self._transaction():
                for append in appends:
                    self._append(append, at)
        except BaseException:
            for append in appends:  # all were rolled back
                append.at = None
            raise

    def _append(self, append: Append, at: float) -> None:
        seq, count = append.expected_seq, len(append.records)
        try:
            self._run(_APPEND, (seq, count, at, append.data, append.token, append.run_id))
        except (UnicodeEncodeError, apsw.TooBigError) as error:  # refused before anything reached the file
            append.error = CheckpointError(f"run {append.run_id!r} cannot be written: {error}")
            return
        if self._db.changes() == 0:
            append.error = self._refusal(append)
            return
        if append.status is not None:
            self._summarise(append, at)
        append.at = at

    def _refusal(self, append: Append) -> CheckpointError:
        row = self._one("SELECT token FROM owner WHERE run_id = ?", append.run_id)
        if row is None or row[0] != append.token:
            return self._lost(append.run_id)
        rows = self._run(
            "SELECT coalesce(max(position) - (number << 32), 0) FROM run LEFT JOIN journal "
            "ON position > (number << 32) AND position < ((number + 1) << 32) WHERE run_id = ?",
            (append.run_id,),
        )
        return CheckpointConflict(
            f"run {append.run_id!r} ends at record {rows[0][0]}, not at {append.expected_seq}: read it again"
        )

    def _summarise(self, append: Append, at: float) -> None:
        for record in append.records:
            if isinstance(record, RunStarted):
                origin = msgspec.json.encode(record.origin) if record.origin else None
                self._run(
                    "UPDATE run SET goal = ?, agent_id = ?, origin = ?, started_at = ? WHERE run_id = ?",
                    (record.goal, record.agent_id, origin, at, append.run_id),
                )
        self._run("UPDATE run SET status = ? WHERE run_id = ?", (append.status, append.run_id))

    def read(self, run_id: str, after: int) -> list[tuple[int, float, bytes]]:
        """Return the next batches that end after a sequence number: (last seq, at, records)."""
        return cast("list[tuple[int, float, bytes]]", self._run(_READ, (run_id, min(after, _SEQ), CHUNK)))

    def runs(self, query: RunQuery) -> list[RunSummary]:
        """Return the summaries a query asks for."""
        stored = "interrupted" if query.status == "running" else query.status
        found: list[RunSummary] = []
        for row in self._run(_RUNS, (stored,)):
            if len(found) == query.limit:
                break
            summary = _summary(row)
            if query.status in (None, summary.status):
                found.append(summary)
        return found

    def claim(self, run_id: str, process: ProcessId, lease_s: float) -> Owner:
        """Take a run that nobody holds."""
        with self._unsynced(), self._transaction():
            row = self._one("SELECT process, lease_until FROM owner WHERE run_id = ?", run_id)
            if row is not None and _is_held(cast("bytes", row[0]), cast("float", row[1])):
                raise self._lost(run_id)
            self._run("INSERT OR IGNORE INTO run (run_id) VALUES (?)", (run_id,))
            self._run(
                "INSERT OR REPLACE INTO owner (run_id, run, process, lease_until) "
                "SELECT run_id, number, ?, ? FROM run WHERE run_id = ?",
                (msgspec.json.encode(process), lease_clock() + lease_s, run_id),
            )
            return Owner(run_id, self._db.last_insert_rowid(), process)

    def renew(self, owner: Owner, lease_s: float) -> None:
        """Extend a lease."""
        with self._unsynced():
            self._run(
                "UPDATE owner SET lease_until = ? WHERE token = ? AND run_id = ?",
                (lease_clock() + lease_s, owner.token, owner.run_id),
            )
        if self._db.changes() == 0:
            raise self._lost(owner.run_id)

    def release(self, owner: Owner) -> None:
        """Give a run up, and forget one that was claimed and never written."""
        with self._unsynced(), self._transaction():
            self._run("DELETE FROM owner WHERE token = ? AND run_id = ?", (owner.token, owner.run_id))
            if self._db.changes():
                self._run(
                    "DELETE FROM run WHERE run_id = ? AND status IS NULL AND NOT EXISTS (SELECT 1 FROM journal "
                    "WHERE position > (number << 32) AND position < ((number + 1) << 32)) "
                    "AND NOT EXISTS (SELECT 1 FROM blob WHERE run = number)",
                    (owner.run_id,),
                )

    def delete(self, run_id: str) -> bool:
        """Forget a run."""
        with self._transaction():
            row = self._one("SELECT number FROM run WHERE run_id = ?", run_id)
            if row is None:
                return False
            number = cast("int", row[0])
            self._run("DELETE FROM journal WHERE position > ? AND position < ?", (number << 32, (number + 1) << 32))
            existed = self._db.changes() > 0
            self._run("DELETE FROM blob WHERE run = ?", (number,))
            self._run("DELETE FROM mail WHERE run_id = ?", (run_id,))
            self._run("DELETE FROM owner WHERE run_id = ?", (run_id,))
            self._run("DELETE FROM run WHERE number = ?", (number,))
            return existed

    def put_blob(self, run_id: str, data: bytes) -> str:
        """Keep a value under its digest."""
        digest = hashlib.sha256(data).hexdigest()
        with self._transaction():
            self._run("INSERT OR IGNORE INTO run (run_id) VALUES (?)", (run_id,))
            self._run(
                "INSERT OR IGNORE INTO blob SELECT number, ?, ? FROM run WHERE run_id = ?", (digest, data, run_id)
            )
        return digest

    def get_blob(self, run_id: str, digest: str) -> bytes:
        """Return a kept value."""
        row = self._one("SELECT data FROM blob, run WHERE run = number AND run_id = ? AND digest = ?", run_id, digest)
        if row is None:
            raise CheckpointError(f"run {run_id!r} keeps no value under the digest {digest!r}")
        return cast("bytes", row[0])

    def post(self, run_id: str, command: Command) -> Mail:
        """Keep a command for whoever drives the run."""
        mail = Mail(secrets.token_hex(8), time.time(), command)
        self._run(
            "INSERT INTO mail SELECT ?, run_id, ?, ? FROM run WHERE run_id = ? AND status IS NOT NULL",
            (mail.id, mail.received_at, encode_command(command), run_id),
        )
        if self._db.changes() == 0:
            raise RunNotFound(run_id)
        return mail

    def inbox(self, run_id: str) -> list[Mail]:
        """Return a run's commands in the order they were received."""
        rows = self._run("SELECT id, received_at, command FROM mail WHERE run_id = ? ORDER BY received_at", (run_id,))
        where = f"the mailbox of run {run_id!r} in {str(self.path)!r}"
        return [
            Mail(cast("str", row[0]), cast("float", row[1]), decode_command(cast("bytes", row[2]), where=where))
            for row in rows
        ]

    def discard_mail(self, run_id: str, ids: Sequence[str]) -> None:
        """Forget commands of a run."""
        with self._transaction():
            for mail_id in ids:
                self._run("DELETE FROM mail WHERE id = ? AND run_id = ?", (mail_id, run_id))

    def is_checkpoint_due(self) -> bool:
        """Say whether the write-ahead log is long enough to be copied into the database."""
        return self._log.pages > _CHECKPOINT_PAGES

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database, as far as readers let it."""
        self._log.pages = 0
        self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def is_elsewhere(self) -> bool:
        """Say whether the path names another file by now, or none: what is written here would be found by nobody."""
        try:
            return not os.path.samestat(os.stat(self.path), self._file)
        except FileNotFoundError:
            return True

    def close(self, *, tidy: bool = True) -> None:
        """Close the connection. Not to be tidy leaves the log alone, which belongs to others where the file does."""
        self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, not tidy)
        self._db.set_wal_hook(None)
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Generator[None]:
        # IMMEDIATE takes the write lock first: a transaction that fails for being busy has done nothing yet.
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._run("ROLLBACK")
            raise

    def _run(self, statement: str, values: Sequence[Value] = ()) -> list[tuple[Value, ...]]:
        rows = self._db.execute(statement, values).fetchall()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  # apsw's annotations need Python 3.12
        return cast("list[tuple[Value, ...]]", rows)

    def _one(self, statement: str, *values: Value) -> tuple[Value, ...] | None:
        rows = self._run(statement, values)
        return rows[0] if rows else None

    def _pragma(self, name: str, value: Value = None) -> Value:
        args = () if value is None else (value,)  # None would be taken for the value NULL
        return cast("Value", self._db.pragma(name, *args))  # pyright: ignore[reportUnknownMemberType]  # as above

    def _lost(self, run_id: str) -> OwnershipLost:
        row = self._one("SELECT process FROM owner WHERE run_id = ?", run_id)
        if row is None:
            return OwnershipLost(f"nobody owns run {run_id!r}: it was released or deleted; claim it before appending")
        process = msgspec.json.decode(cast("bytes", row[0]), type=ProcessId)
        return OwnershipLost(f"run {run_id!r} is owned by {describe(process)}: wait until it ends, or stop it")


def _status(records: Sequence[Record]) -> RunStatus | None:
    status = None
    for record in records:
        if (found := final_status(record)) is not None:
            status = found
    return status


def _is_held(process: bytes, lease_until: float) -> bool:
    return lease_clock() < lease_until and is_alive(msgspec.json.decode(process, type=ProcessId))


def _summary(row: tuple[Value, ...]) -> RunSummary:
    run_id, goal, agent_id, origin, status, started_at, updated_at, process, lease_until = row
    if status == "interrupted" and process and _is_held(cast("bytes", process), cast("float", lease_until)):
        status = "running"
    return RunSummary(
        cast("str", run_id),
        cast("str", goal),
        cast("str", agent_id),
        cast("RunStatus", status),
        cast("float", started_at),
        cast("float", updated_at),
        msgspec.json.decode(cast("bytes", origin), type=Origin) if origin else None,
    )


def explain(error: apsw.Error, path: Path, busy_timeout_s: float) -> CheckpointError:
    """Say what an error of SQLite means for the checkpoints in a file."""
    file = repr(str(path))
    match error:
        case apsw.BusyError() | apsw.LockedError():
            return StoreBusy(
                f"{file} stayed locked by another process for {busy_timeout_s:g} s and nothing was written: "
                "find out which process holds it, then resume"
            )
        case apsw.NotADBError():
            return CheckpointCorrupt(f"{file} is not a SQLite database: name another path for the checkpoints")
        case apsw.CorruptError() | apsw.FormatError():
            return CheckpointCorrupt(f"{file} is damaged ({error}): restore it from a backup or move it away")
        case apsw.FullError():
            return CheckpointError(f"the disk of {file} is full and nothing was written: free some space, then resume")
        case _ if isinstance(error, NOT_WRITABLE):
            return CheckpointError(f"{file} cannot be opened for writing ({error}): check its permissions")
        case apsw.IOError():
            return CheckpointError(f"{file} could not be read or written ({error}): check the disk")
        case _:
            return CheckpointError(f"{file}: {error}")
