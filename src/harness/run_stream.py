"""RunStream: a run's events, for one consumer."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Self, TypeAlias

from harness.active import ActiveRun
from harness.errors import ConfigError, RunStopped
from harness.events import Event
from harness.records import Entry, Record, RunCancelled, RunFinished, ScopeClosed
from harness.result import RunResult, result_of, result_of_task, with_output
from harness.state import RunState
from harness.stream import RunLog, Viewer
from harness.tools.answer import AnswerForm


class OverRun:
    """A run, or one task of it, that is over for good: nothing to drive.

    Args:
        state: the folded journal.
        entries: the journal.
        task: the scope of the task it is about; empty for the run.
        form: the form its answer must have; None takes any text.
    """

    def __init__(self, state: RunState, entries: list[Entry], task: str = "", form: AnswerForm | None = None) -> None:
        result: RunResult | None = result_of_task(state, task, entries) if task else None
        if result is None:  # the run was cancelled while the task was at work
            task, result = "", result_of(state, entries)
        assert result is not None  # made of what has ended only
        self._result = with_output(result, form)
        places = range(len(entries) - 1, -1, -1)
        self.first = next(place for place in places if _ends(entries[place].record, task))
        self.log = RunLog(state.run_id, entries[: self.first + 1])
        self.log.end()

    def result(self) -> RunResult:
        """Return what it came to."""
        return self._result


def _ends(record: Record, task: str) -> bool:
    if task:
        return isinstance(record, ScopeClosed) and record.child == task
    return isinstance(record, (RunFinished, RunCancelled))


Run: TypeAlias = ActiveRun | OverRun
"""A run that is driven here, or one that is over."""


async def result_of_run(run: Run) -> RunResult:
    """Wait for a run's result.

    Raises:
        RunStopped: somebody else stopped it.
    """
    if isinstance(run, OverRun):
        return run.result()
    if run.task.done() and not run.task.cancelled():
        return run.task.result()
    try:
        return await asyncio.shield(run.task)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if run.task.cancelled() and task is not None and not task.cancelling():
            raise RunStopped(f"run {run.run_id!r} was stopped; it can be resumed") from None
        raise


class RunStream:
    """A run's events: an async context manager and an async iterable.

    Leaving the ``async with`` stops the run and waits until everything it started has ended; the run can be resumed.
    A plain ``async for`` that is abandoned stops it when the stream is finalised, with a ResourceWarning.

    Attributes:
        result: what the run came to, once the stream has ended.

    >>> from harness import AgentConfig, AgentRuntime, MemoryCheckpointStore
    >>> from harness.testing import ScriptedLLM
    >>> async def main():
    ...     runtime = AgentRuntime(
    ...         llm=ScriptedLLM(["Hello."]), agents=[AgentConfig("a")], checkpoint_store=MemoryCheckpointStore()
    ...     )
    ...     async with runtime.run_agent_stream("a", "Greet me.") as events:
    ...         return [event.type.value async for event in events]
    >>> asyncio.run(main())
    ['STARTED', 'THOUGHT', 'TASK_DONE']
    """

    def __init__(
        self,
        start: Callable[[], Coroutine[None, None, Run]],
        *,
        tokens: bool,
        replay: bool,
        on_cut: Callable[[ActiveRun], None],
    ) -> None:
        self._start = start
        self._tokens = tokens
        self._replay = replay
        self._on_cut = on_cut
        self._run: Run | None = None
        self._opening = asyncio.Lock()
        self._viewer: Viewer | None = None
        self._closed = False
        self.result: RunResult | None = None

    @property
    def run_id(self) -> str:
        """The run's id; empty until the stream was entered or its first event asked for."""
        return self._run.log.run_id if self._run is not None else ""

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close(cut=kind is not None and not issubclass(kind, GeneratorExit))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        viewer = self._viewer or await self._open()
        if viewer.ready:
            return viewer.ready.popleft()
        event = await viewer.next()
        if event is not None:
            return event
        if self.result is None and self._run is not None:
            self._closed = True
            self.result = await result_of_run(self._run)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Leave the stream; see the class."""
        await self._close(cut=False)

    async def _open(self) -> Viewer:
        if self._closed:
            raise ConfigError("this stream was closed; resume the run to see more of it")
        async with self._opening:
            if self._run is None:
                self._run = await self._start()
                if isinstance(self._run, ActiveRun):
                    self._run.join()
                self._viewer = self._run.log.view(0 if self._replay else self._run.first, tokens=self._tokens)
        assert self._viewer is not None  # made together with the run
        return self._viewer

    async def _close(self, *, cut: bool) -> None:
        if self._closed or not isinstance(self._run, ActiveRun) or self._viewer is None:
            self._closed = True
            return
        self._closed = True
        run = self._run
        run.log.leave(self._viewer)
        await run.leave()
        if cut:
            self._on_cut(run)

    def __del__(self) -> None:
        run = self._run
        if not self._closed and isinstance(run, ActiveRun) and not run.task.done():
            text = f"the stream of run {run.run_id!r} was left without being closed"
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)
            run.abandon()
