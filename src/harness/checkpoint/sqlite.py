"""Checkpoints in one local SQLite file: the store a run has when nothing else is configured.

What is acknowledged survives a power cut: the journal is committed with ``synchronous=FULL`` (and a full flush on
macOS), which is stated and read back. This module decides which thread works, ``database`` what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, repeat
from pathlib import Path
from typing import TypeVar

import apsw
import msgspec

from harness.checkpoint.base import LEASE_S, Owner, RunQuery, RunSummary
from harness.checkpoint.database import CHUNK, NOT_WRITABLE, Append, Database, explain
from harness.errors import CheckpointCorrupt, CheckpointError, StoreBusy
from harness.mailbox import Command, Mail
from harness.records import Entry, ProcessId, Record, decode_batches

A = TypeVar("A")
T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
"""Seconds to wait for another process that writes, before StoreBusy."""


class SQLiteCheckpointStore:
    """Keep journals in one SQLite file on a local disk.

    A lone run commits on the event loop's thread, because handing a short commit to a thread costs a good part of
    the commit itself; in an open file it is claimed, read and released there too. As soon as several runs are owned,
    their appends are gathered and a thread of the store commits all that wait in one transaction. Everything else that
    may take long runs on that thread too.

    An append whose task is cancelled may still be written. It is for one machine and few processes: a process that is
    stopped while it writes makes the others wait, and then fail with StoreBusy.

    Args:
        path: the file; it is created, with its folders, for its owner only.
        busy_timeout_s: seconds to wait for another process that writes.

    >>> import asyncio, tempfile
    >>> from harness.checkpoint.base import this_process
    >>> from harness.records import Noted
    >>> async def main(folder):
    ...     store = SQLiteCheckpointStore(Path(folder) / "runs.db")
    ...     owner = await store.claim("r1", this_process())
    ...     await store.append("r1", 0, [Noted(1, "malformed", "again, please")], owner=owner)
    ...     seen = [entry.seq async for entry in store.read("r1")]
    ...     await store.close()
    ...     return seen
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     asyncio.run(main(folder))
    [1]
    """

    def __init__(self, path: str | os.PathLike[str], *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.path = Path(path).absolute()
        self._busy_timeout_s = busy_timeout_s
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._database: Database | None = None
        self._in_use = threading.Lock()  # held by the thread that uses the database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="harness-checkpoint")
        self._queue: list[Append] = []
        self._queue_lock = threading.Lock()  # held for as long as it takes to add to the queue or to take it all
        self._owned: set[int] = set()

    async def append(self, run_id: str, expected_seq: int, records: Sequence[Record], /, *, owner: Owner) -> float:
        """Append records after ``expected_seq``, durable on return. See ``CheckpointStore.append``."""
        if not records:
            raise ValueError("append needs at least one record")
        append = Append(run_id, expected_seq, records, owner.token)
        if not (self._is_lone() and self._here(lambda database: database.append((append,)))):
            await self._append_together(append)
        return append.result()

    async def read(self, run_id: str, /, *, after: int = 0) -> AsyncIterator[Entry]:
        """Yield the entries with ``seq > after`` in order."""
        where = f"run {run_id!r} in {str(self.path)!r}"
        end, more = max(after, 0), True
        while more:
            work = functools.partial(Database.read, run_id=run_id, after=end)
            batches = await self._call(work, short=True, reads=True)
            more = len(batches) == CHUNK
            decoded = decode_batches([data for _, _, data in batches], where=where)
            for (last, at, _), records in zip(batches, decoded, strict=True):
                seq = last - len(records)
                if seq != end:
                    if seq > end or end != after:
                        raise CheckpointCorrupt(f"{where} lacks the records between {end} and {seq + 1}")
                    records, seq = records[end - seq :], end  # noqa: PLW2901 - what comes after ``after``
                for entry in map(Entry, repeat(run_id), count(seq + 1), repeat(at), records):
                    yield entry
                end = last
            await asyncio.sleep(0)

    async def delete(self, run_id: str, /) -> bool:
        """Forget a run; a process that drives it loses it. Returns whether it existed."""
        return await self._call(lambda database: database.delete(run_id))

    async def runs(self, query: RunQuery, /) -> AsyncIterator[RunSummary]:
        """Yield summaries, the last started first."""
        for summary in await self._call(lambda database: database.runs(query), reads=True):
            yield summary

    async def claim(self, run_id: str, process: ProcessId, /, *, lease_s: float = LEASE_S) -> Owner:
        """Become the owner of a run. See ``CheckpointStore.claim``."""
        work = functools.partial(Database.claim, run_id=run_id, process=process, lease_s=lease_s)
        if claimed := self._here_if_lone(work):
            owner = claimed[0]
        else:
            claiming = self._submit(work)
            try:
                owner = await asyncio.wrap_future(claiming)
            except asyncio.CancelledError:
                claiming.add_done_callback(self._give_back)
                raise
        self._owned.add(owner.token)
        return owner

    def _give_back(self, claiming: Future[Owner]) -> None:
        # The task that wanted the run is gone: a claim that came through all the same would block the run.
        if not claiming.cancelled() and claiming.exception() is None:
            self._submit(functools.partial(Database.release, owner=claiming.result()))

    async def renew(self, owner: Owner, /, *, lease_s: float = LEASE_S) -> None:
        """Extend the lease. See ``CheckpointStore.renew``."""
        await self._call(lambda database: database.renew(owner, lease_s))

    async def release(self, owner: Owner, /) -> None:
        """Give the run up."""
        self._owned.discard(owner.token)
        await self._call(functools.partial(Database.release, owner=owner), short=True)

    async def put_blob(self, run_id: str, data: bytes, /) -> str:
        """Keep a large value of a run, durable on return. Returns its digest."""
        return await self._call(lambda database: database.put_blob(run_id, data))

    async def get_blob(self, run_id: str, digest: str, /) -> bytes:
        """Return a kept value."""
        return await self._call(lambda database: database.get_blob(run_id, digest), reads=True)

    async def post(self, run_id: str, command: Command, /) -> Mail:
        """Put a command into a run's mailbox. See ``CheckpointStore.post``."""
        return await self._call(lambda database: database.post(run_id, command))

    async def inbox(self, run_id: str, /) -> list[Mail]:
        """Return what is in a run's mailbox."""
        return await self._call(lambda database: database.inbox(run_id), short=True, reads=True)

    async def discard_mail(self, run_id: str, ids: Sequence[str], /) -> None:
        """Remove commands that were taken."""
        await self._call(lambda database: database.discard_mail(run_id, ids))

    async def settings(self) -> dict[str, str | int]:
        """Read back how the database is set: journal mode, synchronous (2 is FULL), flushes, page size, versions."""
        return await self._call(Database.settings)

    async def close(self) -> None:
        """Close the file; its write-ahead log is folded into it. Using the store again opens it anew."""
        self._after_fork()
        thread, self._thread = self._thread, ThreadPoolExecutor(1, thread_name_prefix="harness-checkpoint")
        try:
            await asyncio.wrap_future(thread.submit(self._close))
        finally:
            thread.shutdown(wait=False)

    def _close(self) -> None:
        with self._in_use:
            database, self._database = self._database, None
            if database is not None:
                self._explained(lambda database: database.close(tidy=not database.is_elsewhere()), database)

    # Which thread works -------------------------------------------------------------------------------------------

    def _is_lone(self) -> bool:
        return len(self._owned) < 2 and not self._queue

    def _here(self, work: Callable[[Database], T]) -> list[T]:
        """Do short work on this thread, if nobody has to be waited for. Returns its result in a list, or an empty one.

        What finds the database locked by another process has done nothing, and may be done again by the thread.
        """
        self._after_fork()
        if not self._in_use.acquire(blocking=False):
            return []
        try:
            if self._database is None:
                return []
            self._database.wait_when_busy(False)
            return [self._explained(work, self._database)]
        except StoreBusy:
            return []
        finally:
            if self._database is not None and self._database.is_checkpoint_due():
                self._thread.submit(self._work, Database.checkpoint)
            self._in_use.release()

    def _here_if_lone(self, work: Callable[[Database], T]) -> list[T]:
        """Do short work here where at most one run is owned. A file that was moved away is the thread's to replace."""
        database = self._database
        if not self._is_lone() or database is None or database.is_elsewhere():
            return []
        return self._here(work)

    async def _call(self, work: Callable[[Database], T], *, short: bool = False, reads: bool = False) -> T:
        if short and (done := self._here_if_lone(work)):
            return done[0]
        return await asyncio.wrap_future(self._submit(work, reads=reads))

    def _submit(self, work: Callable[[Database], T], *, reads: bool = False) -> Future[T]:
        self._after_fork()
        return self._thread.submit(self._work, work, reads=reads)

    def _work(self, work: Callable[[Database], T], *, reads: bool = False) -> T:
        with self._in_use:
            return self._explained(self._read_opened if reads else self._work_opened, work)

    def _read_opened(self, work: Callable[[Database], T]) -> T:
        try:
            return self._work_opened(work)
        except NOT_WRITABLE:
            from harness.checkpoint.reading import read_only  # rarely needed

            return read_only(self.path, work, busy_timeout_s=self._busy_timeout_s)

    def _work_opened(self, work: Callable[[Database], T]) -> T:
        if self._database is not None and self._database.is_elsewhere():
            self._database.close(tidy=False)
            self._database = None
        if self._database is None:
            self._database = Database(self.path, busy_timeout_s=self._busy_timeout_s)
        self._database.wait_when_busy(True)
        return work(self._database)

    async def _append_together(self, append: Append) -> None:
        self._after_fork()
        append.waiter = asyncio.get_running_loop().create_future()
        with self._queue_lock:
            self._queue.append(append)
            first = len(self._queue) == 1
        if first:  # whoever finds the queue empty sends the thread; the others are taken along
            self._thread.submit(self._commit_queue)
        await append.waiter

    def _commit_queue(self) -> None:
        with self._queue_lock:
            queue, self._queue = self._queue, []
        try:
            self._work(lambda database: database.append(queue))
        except CheckpointError as error:
            for append in queue:  # one error for each: it collects the places it passes through
                append.error = append.error or type(error)(*error.args)
        finally:
            _wake_all(queue)
        if self._database is not None and self._database.is_checkpoint_due():
            self._work(Database.checkpoint)

    def _after_fork(self) -> None:
        """Let go of a connection inherited from a parent process: SQLite's locks do not survive a fork."""
        if self._pid == os.getpid():
            return
        if self._in_use.locked():
            raise CheckpointError(
                f"this process was forked while its parent was writing to {str(self.path)!r}: "
                "start the process with the spawn method, or fork before runs are started"
            )
        inherited = self._database
        self._begin()
        if inherited is not None:
            inherited.close(tidy=False)

    def _explained(self, work: Callable[[A], T], argument: A) -> T:
        try:
            return work(argument)
        except apsw.Error as error:
            raise explain(error, self.path, self._busy_timeout_s) from error
        except UnicodeEncodeError as error:
            raise CheckpointError(f"not a value SQLite can keep: {error}") from error
        except msgspec.MsgspecError as error:
            raise CheckpointCorrupt(f"{str(self.path)!r} holds values this release did not write: {error}") from error


def _wake_all(appends: Sequence[Append]) -> None:
    """Wake the waiters with one call for each event loop (nearly always one)."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Append]] = {}
    for append in appends:
        if append.waiter is not None:
            by_loop.setdefault(append.waiter.get_loop(), []).append(append)
    for loop, group in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed; nobody waits any more
            loop.call_soon_threadsafe(_wake, group)


def _wake(appends: Sequence[Append]) -> None:
    for append in appends:
        append.wake()
