"""Replay: a stored run's events once more, from its journal alone. No model, no tool, no person, nothing written."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from harness import records as r
from harness.errors import ConfigError
from harness.events import Event, Projection
from harness.keys import place_of
from harness.result import RunResult, result_of, result_of_task
from harness.state import RunState

Stored: TypeAlias = tuple[RunState, Sequence[r.Entry], str]
"""A run's journal, folded; the journal itself; the scope of the task it is about, empty for the whole run."""


def outcome(state: RunState, entries: Sequence[r.Entry], scope: str = "") -> RunResult | None:
    """Return what a run, or one task of it, came to, or None while it is still to be driven."""
    task = result_of_task(state, scope, entries) if scope else None
    return task or result_of(state, entries)


def shown(entries: Sequence[r.Entry], scope: str = "") -> Iterator[tuple[r.Entry, list[Event]]]:
    """Yield each record of a run from its first on, with the events that show it.

    Args:
        entries: the whole journal.
        scope: an attempt at a task: only that task's events, those of delegated work in it included.
    """
    projection = Projection()
    for entry in entries:
        yield entry, [event for event in projection.events(entry) if is_within(event.scope, scope)]


def is_within(scope: str, task: str) -> bool:
    """Say whether a scope belongs to the task of another; everything belongs to the run."""
    return not task or place_of(scope).task_id == place_of(task).task_id


def spans(entries: Sequence[r.Entry]) -> Iterator[float]:
    """Yield for each record for how many seconds the run was driven since the one before.

    A time in which nobody drove the run, or in which all of it waited for a person, is none of its own.
    """
    now = 0.0
    for entry in entries:
        record = entry.record
        match record:
            case r.LLMFinished() | r.LLMFailed() | r.LLMDetached() | r.ToolFinished() | r.ToolNotDone():
                at = record.clock_s
            case r.RunFinished() | r.RunFailed() | r.RunCancelled() | r.RunParked():
                at = record.spent.active_s
            case _:
                at = now
        yield max(0.0, at - now)
        now = at  # the clock of a fork begins anew after what was copied


class Replay:
    """A stored run's events as its stream has shown them: an async context manager and an async iterable.

    What is in no record is not shown again: TOKEN, PROGRESS and DISCARDED. A run that is not over ends where its
    journal does.

    Attributes:
        result: what the run came to, once the replay has ended; None where it has no end yet.

    >>> from harness import AgentConfig, AgentRuntime, MemoryCheckpointStore
    >>> from harness.testing import ScriptedLLM
    >>> async def main():
    ...     runtime = AgentRuntime(
    ...         llm=ScriptedLLM(["Hello."]), agents=[AgentConfig("a")], checkpoint_store=MemoryCheckpointStore()
    ...     )
    ...     await runtime.run_agent("a", "Greet me.", run_id="greeting")
    ...     return [event.type.value async for event in runtime.replay_stream("greeting")]
    >>> asyncio.run(main())
    ['STARTED', 'THOUGHT', 'TASK_DONE']
    """

    def __init__(self, read: Callable[[], Awaitable[Stored]], *, speed: float = 0.0) -> None:
        if not (math.isfinite(speed) and speed >= 0):
            raise ConfigError(f"speed must be 0 (at once), 1 (in the run's own time) or a number beside, not {speed!r}")
        self._read = read
        self._speed = speed
        self._stored: Stored | None = None
        self._events = self._play()
        self.result: RunResult | None = None

    @property
    def run_id(self) -> str:
        """The run's id; empty until the replay was entered or its first event asked for."""
        return self._stored[0].run_id if self._stored is not None else ""

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Leave the replay."""
        await self._events.aclose()

    async def _open(self) -> Stored:
        if self._stored is None:
            self._stored = await self._read()
        return self._stored

    async def _play(self) -> AsyncGenerator[Event]:
        state, entries, scope = await self._open()
        for (_, events), seconds in zip(shown(entries, scope), spans(entries), strict=True):
            if self._speed and seconds:
                await asyncio.sleep(seconds / self._speed)
            for event in events:
                yield event
        self.result = outcome(state, entries, scope)
