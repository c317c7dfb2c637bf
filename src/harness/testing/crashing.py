"""Where a run can be hit: kill points around every append and inside every effect, and stores that fail on purpose."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from harness.checkpoint.base import LEASE_S, CheckpointStore, Owner, RunQuery, RunSummary
from harness.errors import CheckpointError
from harness.llm.base import LLM, LLMDelta, LLMRequest, ResponseDone
from harness.mailbox import Command, Mail
from harness.records import Entry, ProcessId, Record

When: TypeAlias = Literal["before", "after"]

AppendHook: TypeAlias = Callable[[When, Sequence[Record]], None]
"""Called around every append. What it raises before one is a refusal; after it, an acknowledgement that is lost."""

BlobHook: TypeAlias = Callable[[When, bytes], None]


def _ignore(_when: When, _what: object) -> None:
    """Do nothing."""


def _pass(_name: str) -> None:
    """Come through a point."""


class CrashingStore:
    """A store that calls a hook before and after every append; everything else goes to the store it wraps.

    Args:
        store: what really keeps the runs.
        on_append: called with ``"before"`` or ``"after"`` and the records.
        on_blob: the same for large values.

    >>> from harness.checkpoint import MemoryCheckpointStore
    >>> from harness.errors import StoreBusy
    >>> store = CrashingStore(MemoryCheckpointStore(), on_append=fail_appends(StoreBusy("locked"), first=2))
    >>> store.durable
    False
    """

    def __init__(self, store: CheckpointStore, *, on_append: AppendHook = _ignore, on_blob: BlobHook = _ignore) -> None:
        self._store = store
        self._on_append = on_append
        self._on_blob = on_blob

    @property
    def durable(self) -> bool:
        """Whether what is kept outlives the process, as the wrapped store says."""
        return getattr(self._store, "durable", True)

    async def append(self, run_id: str, expected_seq: int, records: Sequence[Record], /, *, owner: Owner) -> float:
        """Append, with the hook before and after."""
        self._on_append("before", records)
        at = await self._store.append(run_id, expected_seq, records, owner=owner)
        self._on_append("after", records)
        return at

    def read(self, run_id: str, /, *, after: int = 0) -> AsyncIterator[Entry]:
        """Yield the entries of the wrapped store."""
        return self._store.read(run_id, after=after)

    async def delete(self, run_id: str, /) -> bool:
        """Forget a run."""
        return await self._store.delete(run_id)

    def runs(self, query: RunQuery, /) -> AsyncIterator[RunSummary]:
        """Yield the wrapped store's summaries."""
        return self._store.runs(query)

    async def claim(self, run_id: str, process: ProcessId, /, *, lease_s: float = LEASE_S) -> Owner:
        """Become the owner of a run."""
        return await self._store.claim(run_id, process, lease_s=lease_s)

    async def renew(self, owner: Owner, /, *, lease_s: float = LEASE_S) -> None:
        """Extend the lease."""
        await self._store.renew(owner, lease_s=lease_s)

    async def release(self, owner: Owner, /) -> None:
        """Give the run up."""
        await self._store.release(owner)

    async def put_blob(self, run_id: str, data: bytes, /) -> str:
        """Keep a large value, with the hook before and after."""
        self._on_blob("before", data)
        digest = await self._store.put_blob(run_id, data)
        self._on_blob("after", data)
        return digest

    async def get_blob(self, run_id: str, digest: str, /) -> bytes:
        """Return a kept value."""
        return await self._store.get_blob(run_id, digest)

    async def post(self, run_id: str, command: Command, /) -> Mail:
        """Put a command into a run's mailbox."""
        return await self._store.post(run_id, command)

    async def inbox(self, run_id: str, /) -> list[Mail]:
        """Return what is in a run's mailbox."""
        return await self._store.inbox(run_id)

    async def discard_mail(self, run_id: str, ids: Sequence[str], /) -> None:
        """Remove commands that were taken."""
        await self._store.discard_mail(run_id, ids)

    async def close(self) -> None:
        """Close the wrapped store."""
        await self._store.close()


def fail_appends(error: CheckpointError, *, first: int = 1, times: int | None = 1) -> AppendHook:
    """Make a hook that refuses appends, counted from 1: the disk is full, the store is down for a while.

    Args:
        error: what each of them raises.
        first: the first append that is refused.
        times: how many are; None for all that follow.
    """
    count = 0

    def hook(when: When, _records: Sequence[Record]) -> None:
        nonlocal count
        if when == "before":
            count += 1
            if count >= first and (times is None or count < first + times):
                raise type(error)(*error.args)

    return hook


class KillPoints:
    """Count the points a process comes through, and die by a real SIGKILL at one of them (or stop, by SIGSTOP).

    Args:
        kill_at: the number of the point to die at, from 1; 0 survives all.
        on_kill: told where, right before.
        number: the signal.

    Attributes:
        reached: the names of the points so far.

    >>> points = KillPoints()
    >>> points.reach("before the effect")
    >>> points.reached
    ['before the effect']
    """

    def __init__(
        self,
        kill_at: int = 0,
        on_kill: Callable[[str], None] | None = None,
        *,
        number: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.reached: list[str] = []
        self._kill_at = kill_at
        self._on_kill = on_kill
        self._number = number

    def reach(self, name: str) -> None:
        """Come to a point."""
        self.reached.append(name)
        if len(self.reached) == self._kill_at:
            if self._on_kill is not None:
                self._on_kill(name)
            os.kill(os.getpid(), self._number)

    def append(self, when: When, records: Sequence[Record]) -> None:
        """Come to an append: an ``AppendHook``."""
        self.reach(f"{when} append of {', '.join(type(record).__name__ for record in records)}")

    def blob(self, when: When, _data: bytes) -> None:
        """Come to a large value: a ``BlobHook``."""
        self.reach(f"{when} blob")


def request_digest(request: LLMRequest) -> str:
    """Name a request by its content: two calls with one name asked the same."""
    parts = (request.system, list(request.messages), [tool.name for tool in request.tools])
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]


class MeteredLLM:
    """A model behind a meter nobody can cheat: one line in a file for each call that reaches it.

    The line is the digest of the request; a reply carries it as its ``response_id``, so that the journal says which
    calls it has answers of.

    Args:
        llm: the model.
        log: the file.
        on_point: called inside every call: before the first delta, in the middle of the stream, after the last delta.

    >>> from harness.testing import ScriptedLLM
    >>> MeteredLLM(ScriptedLLM(["Hello."]), "calls.log").name
    'scripted'
    """

    def __init__(self, llm: LLM, log: str | os.PathLike[str], *, on_point: Callable[[str], None] | None = None) -> None:
        self.name = llm.name
        self.provider = llm.provider
        self._llm = llm
        self._log = Path(log)
        self._on_point = on_point or _pass

    async def stream(self, request: LLMRequest, /) -> AsyncIterator[LLMDelta]:
        """Make the call."""
        digest = request_digest(request)
        append_line(self._log, digest)
        self._on_point("llm call, before the first delta")
        begun = False
        async for delta in self._llm.stream(request):
            if isinstance(delta, ResponseDone):
                yield ResponseDone(msgspec.structs.replace(delta.response, response_id=digest))
                continue
            yield delta
            if not begun:
                begun = True
                self._on_point("llm call, in the middle of the stream")
        self._on_point("llm call, after the last delta")

    def digest(self, request: LLMRequest) -> str:
        """Name a request as the file does."""
        return request_digest(request)

    def calls(self) -> Mapping[str, int]:
        """Return how often each request reached the model, by digest."""
        counts: dict[str, int] = {}
        for digest in read_lines(self._log):
            counts[digest] = counts.get(digest, 0) + 1
        return counts


def append_line(path: Path, line: str) -> None:
    """Add a line to a file in one write that no other process can part."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; none of a file that is not there."""
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []
