"""Launching: how a run comes to be driven here. Started, attached to, resumed and forked runs all come through here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from harness import host
from harness.active import ActiveRun
from harness.approval import Decision, name_of
from harness.budget import GuardrailConfig, Limits
from harness.checkpoint.base import CheckpointStore, Owner, lease_clock, this_process
from harness.conversation import continued
from harness.errors import CheckpointError, ConfigChanged, ConfigError, OwnershipLost, RunIdTaken, RunNotFound
from harness.fold import apply, fold
from harness.fork import fork_records
from harness.keys import new_run_id, split_key
from harness.mailbox import Answer, Cancel, Command, Guidance, Mail
from harness.perform import cancel_responses, writable
from harness.plan import Plan, Task
from harness.raising import overtaken
from harness.records import (
    VERSION,
    ApprovalRequested,
    ConfigDiffers,
    Continued,
    Entry,
    Origin,
    Planned,
    Record,
    Reopened,
    RunCancelled,
    RunFinished,
    RunStarted,
    StrategyName,
    ToolFinished,
)
from harness.registry import AgentRegistry, differences, differences_of_agents
from harness.run_stream import OverRun, Run
from harness.state import RunState, open_questions
from harness.strategies.tasks import verdict
from harness.wiring import COORDINATOR, Wirings

logger = logging.getLogger("harness")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run is started with.

    Attributes:
        strategy: how its root decides.
        goal: what is asked.
        agent_id: the agent, where it is known; else the COORDINATOR.
        plan: a plan written by hand.
        continue_from: the key of a finished run whose conversation comes first.
    """

    strategy: StrategyName
    goal: str
    agent_id: str = COORDINATOR
    plan: Plan | None = None
    continue_from: str | None = None


class _Known(NamedTuple):
    """A journal as it was read, and what it means."""

    entries: list[Entry]
    state: RunState


class Launcher:
    """Opens the runs of one runtime.

    Args:
        stores: the durable store, and the one in memory.
        agents: the registered agents.
        wirings: what they are made of.
        lease_s: seconds a live process that drives a run may be silent before another may take the run.
        strict: whether a resume refuses a configuration that differs from the run's.
        auto_resume: whether the first start honours ``--resume KEY`` in ``sys.argv``.
        origin: how runs are said to have been started; None describes the running script.

    Attributes:
        active: the runs that are driven here, by id.
    """

    def __init__(
        self,
        stores: Stores,
        agents: AgentRegistry,
        wirings: Wirings,
        *,
        lease_s: float,
        strict: bool,
        auto_resume: bool,
        origin: Origin | None,
    ) -> None:
        self.active: dict[str, ActiveRun] = {}
        self._stores = stores
        self._agents = agents
        self._wirings = wirings
        self._lease_s = lease_s
        self._strict = strict
        self._auto_resume = auto_resume
        self._origin = origin
        self._pid = os.getpid()
        self._starting: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def begin(self, start: Start, run_id: str | None) -> Run:
        """Start a run, or attach to the one that has this id; see ``AgentRuntime.run_agent``."""
        if self._auto_resume and (key := host.maybe_resume_key()) is not None:
            return await self._resume_script(key, start)
        if run_id == "":
            raise ConfigError("run_id must not be empty; leave it out for one of ours")
        if not isinstance(start.goal, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
            raise ConfigError(f"a goal must be a text, not {start.goal!r}")
        wiring = self._wirings.of(start.agent_id)  # wrong wiring is found before anything is written
        keeps = start.agent_id == COORDINATOR or wiring.agent.checkpoint_every > 0
        store = self._stores.durable if keeps and start.strategy != "pick" else self._stores.memory
        if run_id is None:
            return await self._open(new_run_id(), store, start, is_new=True)
        async with self._lock(run_id):
            return await self._open(run_id, store, start)

    async def _resume_script(self, key: str, start: Start) -> Run:
        """Resume what ``--resume`` names instead of starting; say so where it is not what the script would start."""
        try:
            run = await self.resume(key, None, announce=True)
        except RunNotFound as error:
            host.refuse(str(error))
        first = run.log.entries[0].record if run.log.entries else None
        if isinstance(first, RunStarted) and first.goal != _goal(start):
            host.say(f"Resuming a run with another goal than the script's: {first.goal[:200]!r}")
        return run

    async def resume(self, key: str, strict: bool | None, *, announce: bool = False) -> Run:
        """Go on with a run, or with one task of it; see ``AgentRuntime.resume``."""
        run_id, *rest = await self.resolve(key)
        async with self._lock(run_id):
            active = await self._running(run_id)
            store, entries = (active.store, active.log.entries) if active else await self._find(run_id)
            if not entries:
                raise RunNotFound(key)
            state = fold(run_id, entries)
            only, over = _named(state, rest, key), isinstance(entries[-1].record, (RunFinished, RunCancelled))
            if over or (only and only not in state.scopes):
                return OverRun(state, entries, only, self._wirings.form_of(state, only))
            if active is not None:
                return _attach(active, only)
            known = _Known(entries, state)
            return await self._open(run_id, store, None, known, strict=strict, announce=announce, only=only)

    async def fork(self, key: str, at: int | None, run_id: str | None, origin: Origin | None) -> str:
        """Copy a run up to a step; see ``AgentRuntime.fork``."""
        source, *_ = await self.resolve(key)
        if run_id == "":
            raise ConfigError("run_id must not be empty; leave it out for one of ours")
        store = self._stores.durable
        entries = await _all(store, source)
        if not entries:
            raise RunNotFound(key)
        new_id = run_id or new_run_id()
        records = fork_records(source, entries, at, origin)
        owner = await _claim(store, new_id, self._lease_s)
        try:
            if await _all(store, new_id):
                raise RunIdTaken(f"run id {new_id!r} exists; choose another for the fork")
            for record in records:
                if isinstance(record, ToolFinished) and record.cut:
                    await store.put_blob(new_id, await store.get_blob(source, record.cut.blob))
            await store.append(new_id, 0, records, owner=owner)
        finally:
            await store.release(owner)
        return new_id

    async def stored(self, key: str) -> tuple[RunState, list[Entry], str]:
        """Read a run and leave it as it is; see ``AgentRuntime.replay_stream``."""
        run_id, *rest = await self.resolve(key)
        _, entries = await self._find(run_id)
        if not entries:
            raise RunNotFound(key)
        state = fold(run_id, entries)
        return state, entries, _named(state, rest, key)

    async def questions(self, key: str) -> list[ApprovalRequested]:
        """Return the open questions of a run."""
        _, _, state = await self._stored(key)
        return open_questions(state)

    async def answer(self, key: str, decision: Decision, asked: str | None, by: str) -> None:
        """Answer a question; see ``AgentRuntime.answer``."""
        run_id, store, state = await self._stored(key)
        waiting = open_questions(state)
        if asked is None and len(waiting) > 1:
            ids = ", ".join(request.approval_id for request in waiting)
            raise ConfigError(f"run {run_id!r} waits for {len(waiting)} answers: say which one is meant ({ids})")
        request = next((request for request in waiting if asked in (None, request.approval_id)), None)
        if request is None:
            what = f"question {asked!r}" if asked else "question"
            raise ConfigError(f"no {what} is open in run {run_id!r}: it has its answer, or was never asked")
        name, text, arguments = name_of(decision)
        text, by = writable(text), writable(by)
        seal = self._wirings.people.seal
        mac = seal.sign(request.digest, name, by=by, text=text, arguments=arguments, expires_at=request.expires_at)
        await self._post(run_id, store, Answer(request.approval_id, name, by, mac, text, arguments))

    async def steer(self, key: str, text: str, agent_id: str, by: str) -> None:
        """Tell agents something; see ``AgentRuntime.steer``."""
        run_id, store, _ = await self._stored(key)
        await self._refuse_task(key, "tell the agent of a task by agent=, with the key of the run")
        await self._post(run_id, store, Guidance(writable(text), writable(by), agent_id))

    async def cancel(self, key: str, reason: str, by: str) -> None:
        """End a run for good; see ``AgentRuntime.cancel``."""
        run_id, store, _ = await self._stored(key)
        await self._refuse_task(key, "only the whole run can be ended, by its own key")
        reason = writable(reason)
        mail = await self._post(run_id, store, Cancel(reason, writable(by)))
        if (active := await self._running(run_id)) is not None:
            await asyncio.wait({active.task})
            return
        try:
            owner = await store.claim(run_id, this_process())
        except OwnershipLost:
            return  # whoever drives it finds the command in the mailbox
        try:
            state = fold(run_id, await _all(store, run_id))
            if state.over is None:
                cancelled = RunCancelled(reason, state.steps, msgspec.structs.replace(state.spent), mail.id)
                await store.append(run_id, state.seq, [cancelled], owner=owner)
                await cancel_responses(state, lambda scope, purpose: self._wirings.of(scope.agent_id).llm_for(purpose))
            await store.discard_mail(run_id, [mail.id for mail in await store.inbox(run_id)])
        finally:
            await store.release(owner)

    async def _refuse_task(self, key: str, advice: str) -> None:
        """Make sure that what is for the whole run is not said of one task of it.

        Raises:
            ConfigError: the key names a task.
        """
        run_id, *rest = await self.resolve(key)
        if len(rest) > 1:
            raise ConfigError(f"{key!r} names one task of run {run_id!r}: {advice}")

    async def _stored(self, key: str) -> tuple[str, CheckpointStore, RunState]:
        """Find a run that is not over.

        Raises:
            RunNotFound: no run is stored under the key.
            ConfigError: it is over.
        """
        run_id, *_ = await self.resolve(key)
        store, entries = await self._find(run_id)
        if not entries:
            raise RunNotFound(key)
        state = fold(run_id, entries)
        if state.over is not None:
            raise ConfigError(f"run {run_id!r} is over; nothing can be said to it any more")
        return run_id, store, state

    async def _post(self, run_id: str, store: CheckpointStore, command: Command) -> Mail:
        mail = await store.post(run_id, command)
        if (active := await self._running(run_id)) is not None:
            active.look_now()
        return mail

    async def resolve(self, key: str) -> tuple[str, ...]:
        """Take a key apart; an id of the caller's own may be given as it is, unescaped."""
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
            raise ConfigError(f"a key must be a text, not {key!r}")
        parts = split_key(key)
        if parts != (key,):
            async for _ in self._stores.durable.read(key):
                return (key,)
        return parts

    async def _find(self, run_id: str) -> tuple[CheckpointStore, list[Entry]]:
        """Read a run from where it is kept: the store, or memory for an agent that asks for no checkpoints."""
        for store in (self._stores.durable, self._stores.memory):
            if entries := await _all(store, run_id):
                return store, entries
        return self._stores.durable, []

    async def _running(self, run_id: str) -> ActiveRun | None:
        """Return the run where it is driven here and now: not by a parent process, nor on a loop that is gone."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self.active.clear()
            self._starting.clear()
        active = self.active.get(run_id)
        if active is None:
            return None
        if active.is_stranded:
            self.active.pop(run_id, None)
            await active.give_up()
            return None
        if active.task.done():  # it has ended in this very turn of the event loop
            self.active.pop(run_id, None)
            return None
        if active.stopping:
            await asyncio.wait({active.task})
            self.active.pop(run_id, None)
            return None
        return active

    async def _open(
        self,
        run_id: str,
        store: CheckpointStore,
        start: Start | None,
        known: _Known | None = None,
        *,
        strict: bool | None = None,
        announce: bool = False,
        only: str = "",
        is_new: bool = False,
    ) -> Run:
        """Take a run and begin to drive it. An id that was drawn just now has no journal that could be read."""
        if (active := await self._running(run_id)) is not None:
            _check_same(active.log.entries, run_id, start)
            return _attach(active, only)
        before = await self._conversation(start)
        claimed_at = lease_clock()
        owner = await _claim(store, run_id, self._lease_s)
        try:
            entries, state = known if known is not None else _Known([], RunState(run_id))
            # Whoever owned the run before may have gone on since it was read.
            since = () if is_new else await _all(store, run_id, after=len(entries))
            for entry in since:
                entries.append(entry)
                apply(state, entry.record, entry.at)
            _check_same(entries, run_id, start)
            if state.over is not None or (only and only not in state.scopes):
                await store.release(owner)
                return OverRun(state, entries, only, self._wirings.form_of(state, only))
            if state.started is None:
                if start is None:
                    raise RunNotFound(run_id)
                opening = self._first(start, before)
            else:
                opening = [
                    *self._again(state, state.started, strict=strict, announce=announce),
                    *self._other_limits(state, start),
                ]
        except BaseException:
            await store.release(owner)
            raise
        run = ActiveRun(
            store,
            owner,
            state=state,
            entries=entries,
            opening=opening,
            wirings=self._wirings,
            lease_s=self._lease_s,
            claimed_at=claimed_at,
            on_cut=hint,
            only=only,
        )
        self.active[run_id] = run
        run.task.add_done_callback(lambda _: self._forget(run))
        return run

    def _forget(self, run: ActiveRun) -> None:
        """Let go of a run that has ended; another of the same id may be at work by then."""
        if self.active.get(run.run_id) is run:
            del self.active[run.run_id]

    async def _conversation(self, start: Start | None) -> Continued | None:
        if start is None or start.continue_from is None:
            return None
        source, *_ = await self.resolve(start.continue_from)
        _, entries = await self._find(source)
        if not entries:
            raise RunNotFound(start.continue_from)
        return continued(fold(source, entries))

    def _first(self, start: Start, before: Continued | None) -> list[Record]:
        wiring = self._wirings.of(start.agent_id)
        goal = _goal(start)
        started = RunStarted(
            VERSION,
            goal,
            start.agent_id,
            wiring.fingerprints,
            wiring.config.count(goal),
            start.strategy,
            self._origin or host.script_origin(),
            agents=self._wirings.others(start.agent_id),
            continues=start.continue_from or "",
        )
        opening: list[Record] = [started]
        if before is not None:
            opening.append(before)
        if start.plan is not None:
            opening.append(Planned(tuple(start.plan.tasks), start.plan.rationale))
        return opening

    def _again(self, state: RunState, started: RunStarted, *, strict: bool | None, announce: bool) -> list[Record]:
        """Return what a resume writes first; refuse one that cannot be driven here."""
        for agent_id in _at_work(state, self._wirings.limits):
            self._agents.get(agent_id)
        wiring, others = self._wirings.of(started.agent_id), self._wirings.others(started.agent_id)
        opening: list[Record] = []
        changes: tuple[str, ...] = ()
        if state.fingerprints is not None:
            changes = differences(state.fingerprints, wiring.fingerprints)
        if state.agents or started.strategy != "react":
            changes += differences_of_agents(state.agents, others)
        if changes:
            if self._strict if strict is None else strict:
                raise ConfigChanged(
                    f"run {state.run_id!r} was started with another configuration: {'; '.join(changes)}"
                )
            logger.warning("run %r goes on with another configuration: %s", state.run_id, "; ".join(changes))
            if announce:
                host.say(f"Changed since the run was last driven: {'; '.join(changes)}")
            opening.append(ConfigDiffers(changes, wiring.fingerprints, others))
        if (voided := overtaken(state, self._wirings.limits)) is not None:
            opening.append(voided)
        if state.failed is not None:
            opening.append(Reopened(state.failed.error))
        return opening

    def _other_limits(self, state: RunState, start: Start | None) -> list[Record]:
        """Return that tasks have other limits now, where the plan of a run that exists is given with such."""
        if start is None or start.plan is None or state.plan is None:
            return []
        limits: dict[str, Limits | None] = {}
        for task in start.plan.tasks:
            now = state.plan.tasks[task.id].task if task.id in state.plan.tasks else task
            # A planner may have put another task under the same id.
            same = (now.agent_id, now.instruction) == (task.agent_id, task.instruction)
            if same and now.limits != task.limits:
                limits[task.id] = task.limits
        if not limits:
            return []
        changes = tuple(f"the limits of task {task_id!r}" for task_id in limits)
        fingerprints, others = self._wirings.of(start.agent_id).fingerprints, self._wirings.others(start.agent_id)
        return [ConfigDiffers(changes, fingerprints, others, limits)]

    def _lock(self, run_id: str) -> asyncio.Lock:
        lock = self._starting.get(run_id)
        if lock is None:
            lock = self._starting[run_id] = asyncio.Lock()
        return lock


class Stores:
    """Where the runs of one runtime are kept; each store is made when it is first used.

    Args:
        given: the user's store; None keeps runs in one SQLite file in the state directory.
    """

    def __init__(self, given: CheckpointStore | None) -> None:
        self._durable = given
        self._is_ours = given is None
        self._memory: CheckpointStore | None = None

    @property
    def durable(self) -> CheckpointStore:
        """The store that was given, or the default."""
        if self._durable is None:
            from harness.checkpoint.sqlite import SQLiteCheckpointStore

            self._durable = SQLiteCheckpointStore(host.default_database())
        return self._durable

    @property
    def memory(self) -> CheckpointStore:
        """The store of runs that need not outlive the process."""
        if self._memory is None:
            from harness.checkpoint.memory import MemoryCheckpointStore

            self._memory = MemoryCheckpointStore()
        return self._memory

    async def close(self) -> None:
        """Close the durable store, if it is not the user's."""
        if self._durable is not None and self._is_ours:
            await self._durable.close()
            self._durable = None


def hint(run: ActiveRun) -> None:
    """Say how to go on, where a checkpoint exists that survives this process."""
    if run.exists and run.survives and not run.ended:
        first = run.log.entries[0].record
        origin = first.origin if isinstance(first, RunStarted) else None
        host.hint_interrupted(run.label, run.key, origin)


async def _all(store: CheckpointStore, run_id: str, *, after: int = 0) -> list[Entry]:
    return [entry async for entry in store.read(run_id, after=after)]


async def _claim(store: CheckpointStore, run_id: str, lease_s: float) -> Owner:
    """Own a run. Where that is cancelled the store may own it for us all the same, and gives it up again."""
    claim = asyncio.ensure_future(store.claim(run_id, this_process(), lease_s=lease_s))
    try:
        return await asyncio.shield(claim)
    except asyncio.CancelledError:
        with contextlib.suppress(CheckpointError):
            await store.release(await claim)
        raise


def _attach(active: ActiveRun, only: str) -> ActiveRun:
    if active.only != only:
        raise OwnershipLost(
            f"run {active.run_id!r} is driven here already, {'a task of it' if active.only else 'all of it'}: "
            "wait until that ends"
        )
    return active


def _check_same(entries: Sequence[Entry], run_id: str, start: Start | None) -> None:
    """Make sure that a run that exists under an id is the one that is to be started."""
    if start is None or not entries:
        return
    first = entries[0].record
    goal = _goal(start)
    same = isinstance(first, RunStarted) and (first.goal, first.agent_id, first.strategy) == (
        goal, start.agent_id, start.strategy
    )  # fmt: skip
    if same and start.plan is not None:
        planned = next((entry.record for entry in entries if isinstance(entry.record, Planned)), None)
        same = planned is not None and _without_limits(planned.tasks) == _without_limits(start.plan.tasks)
    if not same:
        raise RunIdTaken(f"run id {run_id!r} names a run with another goal or agent; choose another id or resume it")


def _without_limits(tasks: Sequence[Task]) -> list[Task]:
    return [msgspec.structs.replace(task, limits=None) for task in tasks]


def _goal(start: Start) -> str:
    """Return a goal that can be written as UTF-8."""
    return writable(start.goal)


def _named(state: RunState, rest: Sequence[str], key: str) -> str:
    """Return the scope a key names beyond its run: an attempt at a task, or ``""`` for the run itself.

    Raises:
        RunNotFound: the run has no such agent or task.
        ConfigError: the task is not at work and has no outcome.
    """
    match rest:
        case []:
            return ""
        case [agent_id] if agent_id and agent_id == state.scopes[""].agent_id:
            return ""
        case [task_id, agent_id] if state.plan is not None and (task := state.plan.tasks.get(task_id)):
            if task.task.agent_id != agent_id:
                raise RunNotFound(key, f"task {task_id!r} is for agent {task.task.agent_id!r}")
            if task.status in ("waiting", "skipped"):
                then = ": resume the run" if state.over is None else ", and the run is over"
                raise ConfigError(f"task {task_id!r} of run {state.run_id!r} has not begun its turn{then}")
            return task.child
        case [task_id, _] if state.plan is not None:
            tasks = ", ".join(map(repr, state.plan.tasks))
            raise RunNotFound(key, f"the plan of run {state.run_id!r} has no task {task_id!r} (its tasks: {tasks})")
        case _:
            agent_id = state.scopes[""].agent_id
            who = f"is run by agent {agent_id!r}" if agent_id else "is run by no single agent"
            raise RunNotFound(key, f"run {state.run_id!r} {who}")


def _at_work(state: RunState, limits: GuardrailConfig) -> set[str]:
    """Return the agents that a run cannot go on without."""
    found = {scope.agent_id for scope in state.scopes.values() if scope.agent_id}
    plan = state.plan
    if plan is None:
        return found
    for task in plan.tasks.values():
        again = task.is_reopened if state.failed is not None else verdict(task, plan, limits) == "retry"
        if again or task.status != "ended":
            found.add(task.task.agent_id)
    return found
