"""AgentRuntime: wire agents, tools, a model and a store once, and run any goal."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from harness import host
from harness.active import ActiveRun
from harness.agent import AgentConfig
from harness.budget import GuardrailConfig
from harness.checkpoint.base import LEASE_S, CheckpointStore, RunQuery, RunSummary, lease_clock, this_process
from harness.errors import ConfigChanged, ConfigError, HarnessError, OwnershipLost, RunIdTaken, RunNotFound
from harness.fork import fork_records
from harness.keys import join_key, new_run_id, split_key
from harness.llm import as_llm
from harness.records import (
    VERSION,
    ConfigDiffers,
    Entry,
    Origin,
    Record,
    Reopened,
    RunCancelled,
    RunFinished,
    RunStarted,
    ToolFinished,
)
from harness.registry import AgentRegistry, ToolRegistry, differences
from harness.result import RunResult
from harness.run_stream import OverRun, Run, RunStream, result_of_run
from harness.state import RunState, fold
from harness.wiring import Wiring

T = TypeVar("T")

logger = logging.getLogger("harness")


class AgentRuntime:
    """Everything a run needs, wired once.

    Args:
        llm: the model: an ``LLM``, or any object with ``async complete(system, messages, **kw)``.
        agents: the agents, as a list; or give a registry.
        tools: the tools, as a list of functions and objects; or give a registry.
        agent_registry: the agents.
        tool_registry: the tools.
        guardrail_config: the limits of every run; the defaults are GuardrailConfig's.
        checkpoint_store: where runs are kept; None keeps them in one SQLite file in the state directory.
        deps: the user's own object, handed to tools as ``ToolContext.deps``.
        auto_resume: whether the first entry call honours ``--resume KEY`` in ``sys.argv``.
        strict: whether a resume refuses a configuration that differs from the run's.
        origin: how runs are said to have been started; None describes the running script.
        lease_s: seconds a live process that drives a run may be silent before another may take the run.

    Raises:
        ConfigError: an agent allows an unknown tool, a name is taken, an object is no model or no tool.

    >>> from harness.checkpoint import MemoryCheckpointStore
    >>> from harness.testing import ScriptedLLM
    >>> runtime = AgentRuntime(
    ...     llm=ScriptedLLM(["It is 4."]), agents=[AgentConfig("maths")], checkpoint_store=MemoryCheckpointStore()
    ... )
    >>> runtime.run_sync(runtime.run_agent("maths", "What is 2 + 2?")).answer
    'It is 4.'
    """

    def __init__(
        self,
        *,
        llm: object,
        agents: Iterable[AgentConfig] = (),
        tools: Iterable[object] = (),
        agent_registry: AgentRegistry | None = None,
        tool_registry: ToolRegistry | None = None,
        guardrail_config: GuardrailConfig | None = None,
        checkpoint_store: CheckpointStore | None = None,
        deps: object = None,
        auto_resume: bool = True,
        strict: bool = False,
        origin: Origin | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        if not lease_s > 0:
            raise ConfigError(f"lease_s must be more than 0 seconds, not {lease_s!r}")
        self.agent_registry = AgentRegistry() if agent_registry is None else agent_registry
        self.tool_registry = ToolRegistry() if tool_registry is None else tool_registry
        for agent in agents:
            self.agent_registry.register(agent)
        for tool in tools:
            self.tool_registry.register(tool)
        for agent_id in self.agent_registry.all_ids():
            self.tool_registry.of_agent(self.agent_registry.get(agent_id))
        self._llm = as_llm(llm)
        self._limits = guardrail_config or GuardrailConfig()
        self._store = checkpoint_store
        self._owns_store = checkpoint_store is None
        self._memory_store: CheckpointStore | None = None
        self._deps = deps
        self._auto_resume = auto_resume
        self._strict = strict
        self._origin = origin
        self._lease_s = lease_s
        self._pid = os.getpid()
        self._active: dict[str, ActiveRun] = {}
        self._wirings: dict[tuple[str, int], Wiring] = {}  # by agent and how many tools there were
        self._starting: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    # -- entry points ---------------------------------------------------------------------------

    async def run_agent(self, agent_id: str, task: str, *, run_id: str | None = None) -> RunResult:
        """Run one agent on a task and return what came of it.

        Args:
            agent_id: a registered agent.
            task: the goal, in words.
            run_id: your own id for the run. An id that exists attaches to that run: it never runs twice.

        Raises:
            ConfigError: the agent is unknown.
            RunIdTaken: ``run_id`` names a run with another goal or agent.
            OwnershipLost: another process drives this run.
            CheckpointError: the journal cannot be read or written.
        """
        return await self._wait(lambda: self._begin(agent_id, task, run_id))

    def run_agent_stream(
        self, agent_id: str, task: str, *, run_id: str | None = None, tokens: bool = False
    ) -> RunStream:
        """Run one agent on a task and yield its events; see ``run_agent``.

        Args:
            agent_id: a registered agent.
            task: the goal, in words.
            run_id: your own id for the run.
            tokens: also yield TOKEN events.
        """
        return RunStream(lambda: self._begin(agent_id, task, run_id), tokens=tokens, replay=False, on_cut=self._hint)

    async def resume(self, key: str, *, strict: bool | None = None) -> RunResult:
        """Go on with a run; a finished one returns its result.

        Args:
            key: ``<run_id>`` or ``<run_id>:<agent_id>``.
            strict: refuse a configuration that differs; None takes the runtime's setting.

        Raises:
            RunNotFound: no run is stored under the key.
            ConfigChanged: strict, and the configuration differs.
            ConfigError: the run's agent is not registered here.
            OwnershipLost: another process drives this run.
        """
        return await self._wait(lambda: self._resume(key, strict))

    def resume_stream(
        self, key: str, *, replay: bool = False, tokens: bool = False, strict: bool | None = None
    ) -> RunStream:
        """Go on with a run and yield RESUMED and what is new; see ``resume``.

        Args:
            key: ``<run_id>`` or ``<run_id>:<agent_id>``.
            replay: yield the run's events from its start.
            tokens: also yield TOKEN events.
            strict: refuse a configuration that differs; None takes the runtime's setting.
        """
        return RunStream(lambda: self._resume(key, strict), tokens=tokens, replay=replay, on_cut=self._hint)

    async def fork(self, key: str, *, at: int | None = None, run_id: str | None = None) -> str:
        """Copy a run up to a step under a new id; ``resume`` the new one to drive it.

        Args:
            key: the run to copy.
            at: the first step that is not copied; None copies all but the last step.
            run_id: the new run's id; None makes one.

        Returns:
            The new run's id.

        Raises:
            RunNotFound: no run is stored under the key.
            RunIdTaken: the new id exists.
            ConfigError: the run has no such step.
        """
        source, *_ = await self._resolve(key)
        if run_id == "":
            raise ConfigError("run_id must not be empty; leave it out for one of ours")
        entries = [entry async for entry in self.store.read(source)]
        if not entries:
            raise RunNotFound(key)
        new_id = run_id or new_run_id()
        records = fork_records(source, entries, at)
        owner = await self.store.claim(new_id, this_process())
        try:
            if [entry async for entry in self.store.read(new_id)]:
                raise RunIdTaken(f"run id {new_id!r} exists; choose another for the fork")
            for record in records:
                if isinstance(record, ToolFinished) and record.cut:
                    await self.store.put_blob(new_id, await self.store.get_blob(source, record.cut.blob))
            await self.store.append(new_id, 0, records, owner=owner)
        finally:
            await self.store.release(owner)
        return new_id

    def runs(self, query: RunQuery | None = None) -> AsyncIterator[RunSummary]:
        """Yield summaries of the stored runs, the last started first."""
        return self.store.runs(query or RunQuery())

    async def recover(self) -> list[RunResult]:
        """Go on with every run that was left unfinished and whose agent is registered here; return their results."""
        waiting = [run async for run in self.store.runs(RunQuery(status="interrupted"))]
        known = set(self.agent_registry.all_ids())
        results = await asyncio.gather(
            *(self.resume(join_key(run.run_id)) for run in waiting if run.agent_id in known), return_exceptions=True
        )
        done: list[RunResult] = []
        for result in results:
            if isinstance(result, OwnershipLost):
                continue
            if isinstance(result, HarnessError):
                logger.warning("a run could not be recovered: %s", result)
                continue
            if isinstance(result, BaseException):
                raise result
            done.append(result)
        return done

    def run_sync(self, entry: Awaitable[T]) -> T:
        """Run an entry call to its end from a script that has no event loop, and close the runtime."""

        async def main() -> T:
            async with self:
                return await entry

        return asyncio.run(main())

    async def aclose(self) -> None:
        """Stop what still runs here (it can be resumed) and close the store, if it is the runtime's own."""
        await asyncio.gather(*(run.stop() for run in list(self._active.values())))
        if self._store is not None and self._owns_store:
            await self._store.close()
            self._store = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._active:
            await asyncio.wait({run.task for run in self._active.values()})
        await self.aclose()

    @property
    def store(self) -> CheckpointStore:
        """Where runs are kept."""
        if self._store is None:
            from harness.checkpoint.sqlite import SQLiteCheckpointStore

            self._store = SQLiteCheckpointStore(host.default_database())
        return self._store

    # -- starting -------------------------------------------------------------------------------

    async def _begin(self, agent_id: str, goal: str, run_id: str | None) -> Run:
        if self._auto_resume and (key := host.maybe_resume_key()) is not None:
            return await self._resume(key, None, announce=True)
        if run_id == "":
            raise ConfigError("run_id must not be empty; leave it out for one of ours")
        goal = goal.encode("utf-8", "replace").decode()
        agent = self.agent_registry.get(agent_id)
        if run_id is None:
            return await self._open(new_run_id(), agent, goal, self._store_for(agent))
        async with self._lock(run_id):
            return await self._open(run_id, agent, goal, self._store_for(agent))

    async def _resume(self, key: str, strict: bool | None, *, announce: bool = False) -> Run:
        run_id, *rest = await self._resolve(key)
        async with self._lock(run_id):
            if (active := await self._running(run_id)) is not None:
                return active
            store, entries = await self._find(run_id)
            if not entries:
                raise RunNotFound(key)
            first, last = entries[0].record, entries[-1].record
            agent_id = first.agent_id if isinstance(first, RunStarted) else ""
            if rest and rest != [agent_id]:
                raise RunNotFound(key)
            if isinstance(last, (RunFinished, RunCancelled)):
                return OverRun(fold(run_id, entries), entries)
            agent = self.agent_registry.get(agent_id)
            return await self._open(run_id, agent, None, store, known=entries, strict=strict, announce=announce)

    async def _find(self, run_id: str) -> tuple[CheckpointStore, list[Entry]]:
        """Read a run from where it is kept: the store, or memory for an agent that asks for no checkpoints."""
        entries = [entry async for entry in self.store.read(run_id)]
        if not entries and self._memory_store is not None:
            return self._memory_store, [entry async for entry in self._memory_store.read(run_id)]
        return self.store, entries

    async def _resolve(self, key: str) -> tuple[str, ...]:
        """Take a key apart; an id of the caller's own may be given as it is, unescaped."""
        parts = split_key(key)
        if parts != (key,):
            async for _ in self.store.read(key):
                return (key,)
        return parts

    async def _running(self, run_id: str) -> ActiveRun | None:
        """Return the run where it is driven here and now: not by a parent process, nor on a loop that is gone."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._active.clear()
            self._starting.clear()
        active = self._active.get(run_id)
        if active is None:
            return None
        if active.is_stranded:
            self._active.pop(run_id, None)
            await active.give_up()
            return None
        if active.stopping:
            await asyncio.wait({active.task})
            self._active.pop(run_id, None)
            return None
        return active

    async def _open(
        self,
        run_id: str,
        agent: AgentConfig,
        goal: str | None,
        store: CheckpointStore,
        *,
        known: Sequence[Entry] = (),
        strict: bool | None = None,
        announce: bool = False,
    ) -> Run:
        if (active := await self._running(run_id)) is not None:
            self._check_same(active.log.entries, run_id, agent, goal)
            return active
        wiring = self._wiring_of(agent)
        claimed_at = lease_clock()
        owner = await store.claim(run_id, this_process(), lease_s=self._lease_s)
        try:
            # Whoever owned the run before may have gone on since ``known`` was read.
            entries = [*known, *[entry async for entry in store.read(run_id, after=len(known))]]
            self._check_same(entries, run_id, agent, goal)
            state = fold(run_id, entries)
            if state.over is not None:
                await store.release(owner)
                return OverRun(state, entries)
            opening = self._opening(state, wiring, goal, strict=strict, announce=announce)
        except BaseException:
            await store.release(owner)
            raise
        run = ActiveRun(
            store,
            owner,
            state=state,
            entries=entries,
            opening=opening,
            make_bench=lambda log: wiring.bench(run_id, store, log),
            agent_id=agent.agent_id,
            lease_s=self._lease_s,
            claimed_at=claimed_at,
            on_cut=self._hint,
        )
        self._active[run_id] = run
        run.task.add_done_callback(lambda _: self._active.pop(run_id, None))
        return run

    def _opening(
        self, state: RunState, wiring: Wiring, goal: str | None, *, strict: bool | None, announce: bool
    ) -> list[Record]:
        if state.started is None:
            text = goal or ""
            tokens = wiring.config.count(text)
            origin = self._origin or host.script_origin()
            return [RunStarted(VERSION, text, wiring.agent.agent_id, wiring.fingerprints, tokens, origin=origin)]
        opening: list[Record] = []
        old = state.fingerprints
        if old is not None and (changes := differences(old, wiring.fingerprints)):
            if self._strict if strict is None else strict:
                raise ConfigChanged(
                    f"run {state.run_id!r} was started with another configuration: {'; '.join(changes)}"
                )
            logger.warning("run %r goes on with another configuration: %s", state.run_id, "; ".join(changes))
            if announce:
                host.say(f"Changed since the run was last driven: {'; '.join(changes)}")
            opening.append(ConfigDiffers(changes, wiring.fingerprints))
        if state.failed is not None:
            opening.append(Reopened(state.failed.error))
        return opening

    def _check_same(self, entries: list[Entry], run_id: str, agent: AgentConfig, goal: str | None) -> None:
        if goal is None or not entries:
            return
        first = entries[0].record
        if not isinstance(first, RunStarted) or (first.goal, first.agent_id) != (goal, agent.agent_id):
            raise RunIdTaken(
                f"run id {run_id!r} names a run with another goal or agent; choose another id or resume it"
            )

    def _wiring_of(self, agent: AgentConfig) -> Wiring:
        """Resolve an agent, once: agents do not change, and all that tools can do is grow in number."""
        key = agent.agent_id, len(self.tool_registry.all_names())
        wiring = self._wirings.get(key)
        if wiring is None:
            wiring = Wiring(agent, self.tool_registry, llm=self._llm, limits=self._limits, deps=self._deps)
            self._wirings[key] = wiring
        return wiring

    def _store_for(self, agent: AgentConfig) -> CheckpointStore:
        if agent.checkpoint_every:
            return self.store
        if self._memory_store is None:
            from harness.checkpoint.memory import MemoryCheckpointStore

            self._memory_store = MemoryCheckpointStore()
        return self._memory_store

    def _lock(self, run_id: str) -> asyncio.Lock:
        lock = self._starting.get(run_id)
        if lock is None:
            lock = self._starting[run_id] = asyncio.Lock()
        return lock

    async def _wait(self, start: Callable[[], Coroutine[None, None, Run]]) -> RunResult:
        run = await start()
        if isinstance(run, OverRun):
            return run.result()
        run.join()
        try:
            return await result_of_run(run)
        except asyncio.CancelledError:
            await run.leave()
            self._hint(run)
            raise

    def _hint(self, run: ActiveRun) -> None:
        """Say how to go on, where a checkpoint exists that survives this process."""
        if run.exists and run.survives and not run.finished:
            first = run.log.entries[0].record
            origin = first.origin if isinstance(first, RunStarted) else None
            host.hint_interrupted("Run", run.run_id, run.agent_id, origin)
