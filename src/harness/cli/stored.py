"""Runs as they are stored: found by their keys, listed, read. Looking never makes a store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import NamedTuple

from harness import host
from harness.checkpoint.base import CheckpointStore, RunQuery, RunStatus, RunSummary
from harness.cli.places import check_state_folder
from harness.errors import ConfigError, RunNotFound
from harness.fold import fold
from harness.keys import join_key, place_of, split_key
from harness.records import ApprovalRequested, Dispatched, Entry, Planned, Routed, RunStarted, StrategyName
from harness.replay import outcome
from harness.result import RunResult
from harness.state import RunState, open_questions

KINDS: dict[StrategyName, str] = {
    "react": "agent",
    "dispatch": "dispatch",
    "route": "route",
    "pick": "route",
    "orchestrate": "plan",
}
"""What a listing calls a run that no agent has yet."""


class Found(NamedTuple):
    """What a key names.

    Attributes:
        state: the run's journal, folded.
        entries: the journal.
        scope: the attempt at a task that the key names; empty for the run.
    """

    state: RunState
    entries: list[Entry]
    scope: str = ""

    @property
    def key(self) -> str:
        """The key it is resumed by."""
        place = place_of(self.scope)
        return join_key(self.state.run_id, place.task_id, place.agent_id)

    def result(self) -> RunResult | None:
        """Return what it came to, or None while it is still to be driven."""
        return outcome(self.state, self.entries, self.scope)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to drive."""
        return self.state.over is not None or (bool(self.scope) and self.scope not in self.state.scopes)


def key_of(state: RunState) -> str:
    """Return the key a run is shown under: with the agent's id, where one agent runs it."""
    root = state.scopes.get("")
    return join_key(state.run_id, root.agent_id if root is not None else "")


@asynccontextmanager
async def open_store() -> AsyncGenerator[CheckpointStore | None]:
    """Open the store; None where there is none yet.

    Raises:
        CheckpointError: it cannot be opened.
    """
    check_state_folder()
    if not host.default_database().exists():
        yield None
        return
    from harness.checkpoint.sqlite import SQLiteCheckpointStore

    store = SQLiteCheckpointStore(host.default_database())
    try:
        yield store
    finally:
        await store.close()


async def read(key: str) -> Found:
    """Return what a key names.

    A key that names none is tried as a run id too: who gave the id ``a:b`` may not know that its key is ``a%3Ab``.

    Raises:
        RunNotFound: there is none under this key.
        ConfigError: it names a task that was not begun.
    """
    async with open_store() as store:
        if store is None:
            raise RunNotFound(key)
        for run_id, *rest in (split_key(key), (key,)):
            entries = [entry async for entry in store.read(run_id)]
            state = fold(run_id, entries)
            if state.started is not None and (scope := _scope(state, rest)) is not None:
                return Found(state, entries, scope)
    raise RunNotFound(key)


def _scope(state: RunState, rest: Sequence[str]) -> str | None:
    """Return the scope that a key names beyond its run; None where there is none."""
    match rest:
        case []:
            return ""
        case [agent_id] if agent_id and agent_id == state.scopes[""].agent_id:
            return ""
        case [task_id, agent_id] if state.plan is not None and (task := state.plan.tasks.get(task_id)):
            if task.task.agent_id != agent_id:
                return None
            if not task.child:
                raise ConfigError(f"task {task_id!r} of run {state.run_id!r} was not begun yet: resume the run")
            return task.child
        case _:
            return None


async def status_of(state: RunState) -> RunStatus:
    """Say how a run stands; whether somebody drives it is known to the store alone."""
    for run in await summaries(RunQuery()):
        if run.run_id == state.run_id:
            return run.status
    return "interrupted"


async def summaries(query: RunQuery) -> list[RunSummary]:
    """List runs, the last started first."""
    async with open_store() as store:
        return [] if store is None else [run async for run in store.runs(query)]


async def last_finished() -> str:
    """Return the key of the run that finished last.

    Raises:
        ConfigError: none did.
    """
    runs = await summaries(RunQuery(status="finished"))
    if not runs:
        raise ConfigError("there is no finished run to continue; `harness runs` lists all of them")
    return join_key(max(runs, key=lambda run: run.updated_at).run_id)


class Listed(NamedTuple):
    """A run in a listing.

    Attributes:
        summary: what the store says of it.
        agent_id: the agent that runs it; empty where none or many do.
        kind: ``agent``, ``plan``, or how a run that is still to find out was started: ``dispatch``, ``route``.
        waiting: the questions that wait for an answer, of a run that nobody drives until it has one.
    """

    summary: RunSummary
    agent_id: str
    kind: str
    waiting: tuple[ApprovalRequested, ...] = ()


async def listing(query: RunQuery) -> list[Listed]:
    """List runs with what they are."""
    async with open_store() as store:
        if store is None:
            return []
        return [await _listed(store, run) async for run in store.runs(query)]


async def _listed(store: CheckpointStore, run: RunSummary) -> Listed:
    """Say what a run is, and what it waits for; one without an agent says so in its first records."""
    agent_id, kind = run.agent_id, "agent"
    waiting: tuple[ApprovalRequested, ...] = ()
    if run.status == "waiting":
        waiting = tuple(open_questions(fold(run.run_id, [entry async for entry in store.read(run.run_id)])))
    if agent_id:
        return Listed(run, agent_id, kind, waiting)
    async with aclosing(_until_settled(store, run.run_id)) as entries:
        async for entry in entries:
            match entry.record:
                case RunStarted(strategy=strategy):
                    kind = KINDS[strategy]
                case Routed():
                    agent_id, kind = entry.record.agent_id, "agent"
                case Dispatched(path="orchestrated") | Planned():
                    kind = "plan"
                case _:
                    pass
    return Listed(run, agent_id, kind, waiting)


async def _until_settled(store: CheckpointStore, run_id: str) -> AsyncGenerator[Entry]:
    """Yield a journal's entries up to the one that says who works."""
    async for entry in store.read(run_id):
        yield entry
        if isinstance(entry.record, (Routed, Planned)):
            return
