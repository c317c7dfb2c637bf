"""Checkpoints in the memory of this process: for tests, and for runs that need not outlive it."""

from __future__ import annotations

import hashlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from harness.checkpoint.base import (
    LEASE_S,
    Owner,
    RunQuery,
    RunStatus,
    RunSummary,
    describe,
    final_status,
    is_alive,
    lease_clock,
)
from harness.errors import CheckpointConflict, CheckpointError, OwnershipLost, RunNotFound
from harness.mailbox import Command, Mail
from harness.records import Entry, ProcessId, Record, RunStarted


@dataclass(slots=True)
class _Run:
    records: list[Record] = field(default_factory=list[Record])
    times: list[float] = field(default_factory=list[float])
    blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    mail: list[Mail] = field(default_factory=list[Mail])
    owner: Owner | None = None
    lease_until: float = 0.0

    def is_owned(self) -> bool:
        return self.owner is not None and lease_clock() < self.lease_until and is_alive(self.owner.process)


class MemoryCheckpointStore:
    """Keep journals as plain objects. Everything is gone when the process ends.

    >>> from harness.checkpoint.base import this_process
    >>> from harness.records import Noted
    >>> import asyncio
    >>> async def main():
    ...     store = MemoryCheckpointStore()
    ...     owner = await store.claim("r1", this_process())
    ...     await store.append("r1", 0, [Noted(1, "malformed", "again, please")], owner=owner)
    ...     return [entry.seq async for entry in store.read("r1")]
    >>> asyncio.run(main())
    [1]
    """

    durable = False

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}
        # Tokens are drawn from the whole store, so that a run that was deleted and begun anew reuses none.
        self._tokens = itertools.count(1)

    async def append(self, run_id: str, expected_seq: int, records: Sequence[Record], /, *, owner: Owner) -> float:
        """Append records after ``expected_seq``. See ``CheckpointStore.append``."""
        run = self._runs.get(run_id)
        # The identity is the quick test; an owner that came over a process boundary is equal, not the same.
        if run is None or (run.owner is not owner and run.owner != owner):
            raise _lost(run_id, run)
        if len(run.records) != expected_seq:
            raise CheckpointConflict(
                f"run {run_id!r} ends at record {len(run.records)}, not at {expected_seq}: read it again"
            )
        at = time.time()
        run.records += records
        run.times += (at,) * len(records)
        return at

    async def read(self, run_id: str, /, *, after: int = 0) -> AsyncIterator[Entry]:
        """Yield the entries with ``seq > after`` in order."""
        run = self._runs.get(run_id)
        if run is None:
            return
        seq = max(after, 0)
        while seq < len(run.records):
            yield Entry(run_id, seq + 1, run.times[seq], run.records[seq])
            seq += 1

    async def delete(self, run_id: str, /) -> bool:
        """Forget a run. Returns whether it existed."""
        run = self._runs.pop(run_id, None)
        return run is not None and bool(run.records)

    async def runs(self, query: RunQuery, /) -> AsyncIterator[RunSummary]:
        """Yield summaries, the last started first."""
        # Of two runs that began at the same instant the one that was added later is the newer.
        found = [summary for run_id, run in reversed(self._runs.items()) if (summary := _summary(run_id, run))]
        found.sort(key=lambda summary: summary.started_at, reverse=True)
        wanted = (summary for summary in found if query.status in (None, summary.status))
        for summary in itertools.islice(wanted, query.limit):
            yield summary

    async def claim(self, run_id: str, process: ProcessId, /, *, lease_s: float = LEASE_S) -> Owner:
        """Become the owner of a run. See ``CheckpointStore.claim``."""
        run = self._runs.setdefault(run_id, _Run())
        if run.is_owned():
            raise _lost(run_id, run)
        run.owner = Owner(run_id, next(self._tokens), process)
        run.lease_until = lease_clock() + lease_s
        return run.owner

    async def renew(self, owner: Owner, /, *, lease_s: float = LEASE_S) -> None:
        """Extend the lease. See ``CheckpointStore.renew``."""
        run = self._runs.get(owner.run_id)
        if run is None or run.owner != owner:
            raise _lost(owner.run_id, run)
        run.lease_until = lease_clock() + lease_s

    async def release(self, owner: Owner, /) -> None:
        """Give the run up."""
        run = self._runs.get(owner.run_id)
        if run is None or run.owner != owner:
            return
        run.owner = None
        if not run.records and not run.blobs:
            del self._runs[owner.run_id]

    async def put_blob(self, run_id: str, data: bytes, /) -> str:
        """Keep a large value of a run. Returns its digest."""
        digest = hashlib.sha256(data).hexdigest()
        self._runs.setdefault(run_id, _Run()).blobs[digest] = bytes(data)
        return digest

    async def get_blob(self, run_id: str, digest: str, /) -> bytes:
        """Return a kept value."""
        run = self._runs.get(run_id)
        if run is None or digest not in run.blobs:
            raise CheckpointError(f"run {run_id!r} keeps no value under the digest {digest!r}")
        return run.blobs[digest]

    async def post(self, run_id: str, command: Command, /) -> Mail:
        """Put a command into a run's mailbox. See ``CheckpointStore.post``."""
        run = self._runs.get(run_id)
        if run is None or not run.records:
            raise RunNotFound(run_id)
        mail = Mail(secrets.token_hex(8), time.time(), command)
        run.mail.append(mail)
        return mail

    async def inbox(self, run_id: str, /) -> list[Mail]:
        """Return what is in a run's mailbox."""
        run = self._runs.get(run_id)
        return list(run.mail) if run is not None else []

    async def discard_mail(self, run_id: str, ids: Sequence[str], /) -> None:
        """Remove commands that were taken."""
        run = self._runs.get(run_id)
        if run is not None:
            run.mail = [mail for mail in run.mail if mail.id not in ids]

    async def close(self) -> None:
        """Do nothing: there is nothing to close, and closing must not lose what another user of the store needs."""


def _lost(run_id: str, run: _Run | None) -> OwnershipLost:
    if run is None or run.owner is None:
        return OwnershipLost(f"nobody owns run {run_id!r}: it was released or deleted; claim it before appending")
    return OwnershipLost(f"run {run_id!r} is owned by {describe(run.owner.process)}: wait until it ends, or stop it")


def _summary(run_id: str, run: _Run) -> RunSummary | None:
    if not run.records:
        return None
    started = run.records[0]
    if not isinstance(started, RunStarted):
        return None
    status = _status(run.records)
    if status == "interrupted" and run.is_owned():
        status = "running"
    return RunSummary(
        run_id, started.goal, started.agent_id, status, run.times[0], run.times[-1], started.origin
    )  # fmt: skip


def _status(records: Sequence[Record]) -> RunStatus:
    # Read backwards on demand, so that an append need not look at what it appends.
    for record in reversed(records):
        status = final_status(record)
        if status is not None:
            return status
    return "interrupted"
