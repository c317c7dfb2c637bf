"""What a run's viewers look at: its entries in memory, once, and the deltas of the call in flight.

The run never waits for a viewer. A viewer is a cursor into the entries; deltas it has not taken are joined together,
and those of calls that are recorded meanwhile are dropped, since the record holds the text.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, repeat
from typing import overload

from harness.errors import ConfigError
from harness.events import SHOWN, Discarded, Event, Progress, Projection, Token
from harness.records import Entry, Record

MAX_BACKLOG = 64
"""Groups of ephemeral events a slow viewer may have waiting."""

MAX_TAKEN = 64
"""Entries a viewer turns into events at a time."""


class _Joined:
    """Tokens of one scope that wait for a viewer, joined."""

    __slots__ = ("reasoning", "scope", "texts")

    def __init__(self, scope: str, text: str, reasoning: bool) -> None:
        self.scope = scope
        self.texts = [text]
        self.reasoning = reasoning


class Viewer:
    """One consumer's place in a run.

    Args:
        log: the run's log.
        cursor: how many entries to skip.
        tokens: whether to show TOKEN events.

    Attributes:
        ready: events that can be shown at once; ``next`` looks here first.
    """

    __slots__ = ("_backlog", "_cursor", "_joining", "_log", "_projection", "_waiter", "ready", "tokens")

    def __init__(self, log: RunLog, cursor: int, *, tokens: bool) -> None:
        self._log = log
        self._cursor = cursor
        self._projection = Projection(log.entries[:cursor])
        self.tokens = tokens
        # (number of entries that come before, what to show)
        self._backlog: deque[tuple[int, _Joined | Event]] = deque()
        self._joining: _Joined | None = None  # the last item of the backlog, as long as tokens may be added to it
        self.ready: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Tell the viewer that there is something new. Tokens after it are not joined to those before it."""
        self._joining = None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def delta(self, scope: str, text: str, reasoning: bool) -> None:
        """Take a piece of a reply."""
        last = self._joining
        if last is not None and last.reasoning == reasoning and last.scope == scope:
            last.texts.append(text)
            return
        joined = _Joined(scope, text, reasoning)
        self._add(joined)
        self.wake()
        self._joining = joined

    def ephemeral(self, event: Event) -> None:
        """Take an event that is no record."""
        self._add(event)
        self.wake()

    def _add(self, item: _Joined | Event) -> None:
        """Add to the backlog. What falls out of a full one is never the word that tokens are to be taken back."""
        backlog = self._backlog
        if len(backlog) >= MAX_BACKLOG:
            for index, (_, old) in enumerate(backlog):
                if not isinstance(old, Discarded):
                    del backlog[index]
                    break
            else:
                backlog.popleft()
        backlog.append((self._log.seq, item))

    async def next(self) -> Event | None:
        """Return the next event, waiting for it; None when the run's stream has ended and all was shown."""
        events, log = self.ready, self._log
        while not events:
            if self._backlog and self._backlog[0][0] <= self._cursor:
                return self._show(*self._backlog.popleft())
            if self._cursor < log.seq:
                self._take_entries()
            elif log.ended:
                return None
            else:
                await self._something_new()
        return events.popleft()

    def _take_entries(self) -> None:
        """Make ready what the next entries show, up to what is ephemeral and comes between them."""
        until = self._cursor + MAX_TAKEN
        if self._backlog:
            until = min(until, self._backlog[0][0])
        entries = self._log.entries[self._cursor : until]
        ready, show = self.ready, self._projection.events
        for entry in entries:
            if type(entry.record) in SHOWN:
                ready += show(entry)
        self._cursor += len(entries)

    async def _something_new(self) -> None:
        if self._waiter is not None:
            raise ConfigError("two tasks read one stream; resume_stream() gives each one of its own")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _show(self, place: int, item: _Joined | Event) -> Event:
        if isinstance(item, _Joined):
            if item is self._joining:
                self._joining = None
            text, agent_id = "".join(item.texts), self._projection.agent_of(item.scope)
            return Token(
                self._log.run_id, agent_id, place, time.time(), item.scope, text=text, reasoning=item.reasoning
            )
        return item


class Trace(Sequence[Entry]):
    """A run's entries so far. They are made when somebody looks at them: in many runs nobody does.

    Args:
        run_id: the run.
        entries: those that were read.

    Attributes:
        added: what was appended since and nobody has looked at: when, in seconds since the epoch, and the records.

    >>> from harness.records import Noted
    >>> trace = Trace("r1", [])
    >>> trace.added.append((0.0, [Noted(1, "malformed", "again, please")]))
    >>> [entry.seq for entry in trace]
    [1]
    """

    __slots__ = ("_entries", "_run_id", "added")

    def __init__(self, run_id: str, entries: list[Entry]) -> None:
        self._run_id = run_id
        self._entries = entries
        self.added: list[tuple[float, list[Record]]] = []

    @property
    def entries(self) -> list[Entry]:
        """The entries as they are kept; whoever has them sees those that are added later only by asking again."""
        if self.added:
            added = [*self.added]
            self.added.clear()
            entries = self._entries
            for at, records in added:
                entries += map(Entry, repeat(self._run_id), count(len(entries) + 1), repeat(at), records)
        return self._entries

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @overload
    def __getitem__(self, place: int) -> Entry: ...

    @overload
    def __getitem__(self, place: slice) -> list[Entry]: ...

    def __getitem__(self, place: int | slice) -> Entry | list[Entry]:
        return self.entries[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.entries == [*other]

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        return repr(self.entries)

    def __reduce__(self) -> tuple[object, ...]:
        return Trace, (self._run_id, self.entries)


class RunLog:
    """The entries of one run in this process, and who looks at them.

    Attributes:
        trace: every entry so far.
        seq: the last entry's place.
        ended: nothing more will come.
        wants_tokens: at least one viewer shows tokens.
    """

    __slots__ = ("_added", "_loop", "_thread", "_viewers", "ended", "run_id", "seq", "trace", "wants_tokens")

    def __init__(self, run_id: str, entries: list[Entry]) -> None:
        self.run_id = run_id
        self.seq = len(entries)
        self.trace = Trace(run_id, entries)
        self._added = self.trace.added
        self.ended = False
        self.wants_tokens = False
        self._viewers: list[Viewer] = []
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    @property
    def entries(self) -> list[Entry]:
        """Every entry so far, made by now."""
        return self.trace.entries

    def publish(self, records: list[Record], at: float) -> None:
        """Show records that were committed."""
        self.seq += len(records)
        self._added.append((at, records))
        for viewer in self._viewers:
            viewer.wake()

    def delta(self, scope: str, text: str, reasoning: bool) -> None:
        """Show a piece of a reply to the viewers that ask for tokens."""
        for viewer in self._viewers:
            if viewer.tokens:
                viewer.delta(scope, text, reasoning)

    def discard(self, scope: str, agent_id: str, reason: str) -> None:
        """Tell viewers of tokens to take back those of the call that was cut."""
        for viewer in self._viewers:
            if viewer.tokens:
                viewer.ephemeral(Discarded(self.run_id, agent_id, self.seq, time.time(), scope, reason=reason))

    def progress(self, scope: str, agent_id: str, tool: str, text: str) -> None:
        """Show how far a tool is; from any thread."""
        if threading.get_ident() != self._thread:
            with contextlib.suppress(RuntimeError):  # the loop was closed; nobody watches any more
                self._loop.call_soon_threadsafe(self.progress, scope, agent_id, tool, text)
            return
        if self.ended:
            return
        for viewer in self._viewers:
            viewer.ephemeral(Progress(self.run_id, agent_id, self.seq, time.time(), scope, tool=tool, text=text))

    def end(self) -> None:
        """Say that nothing more will come."""
        self.ended = True
        for viewer in self._viewers:
            viewer.wake()

    def view(self, cursor: int, *, tokens: bool) -> Viewer:
        """Add a viewer that has seen ``cursor`` entries."""
        viewer = Viewer(self, cursor, tokens=tokens)
        self._viewers.append(viewer)
        self.wants_tokens = any(v.tokens for v in self._viewers)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Remove a viewer."""
        if viewer in self._viewers:
            self._viewers.remove(viewer)
        self.wants_tokens = any(v.tokens for v in self._viewers)
