"""A run at work in this process: who owns it, who drives it, who watches it, and how it is stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from harness.checkpoint.base import CheckpointStore, Owner, lease_clock
from harness.driver import Driver
from harness.errors import CheckpointError, InternalError, OwnershipLost
from harness.fold import fold
from harness.keys import join_key, place_of
from harness.raising import in_force
from harness.records import ConfigDiffers, Entry, Record, RunStarted
from harness.result import RunResult, result_of, result_of_task, with_output
from harness.state import Limited, RunState
from harness.stream import RunLog
from harness.wiring import COORDINATOR, Wirings

STOP_S = 2.0
"""Seconds a cancelled run may take to stop before it is abandoned; its journal is valid at any instant."""

logger = logging.getLogger("harness")


class ActiveRun:
    """Drives one run to its end, with as many drivers as that takes.

    Args:
        store: where its journal is.
        owner: the right to append to it.
        state: its folded journal.
        entries: the journal itself.
        opening: facts the first driver writes.
        wirings: what the agents at work are made of.
        only: drive this scope and those below it only; empty for the whole run.
        lease_s: seconds for which the run stays ours after each renewal.
        claimed_at: when it was claimed, or just before, on the clock of leases.
        on_cut: called when the run is cancelled by somebody who did not ask it to stop (the end of the event loop).

    Attributes:
        log: what viewers look at.
        first: how many entries there were before this process took the run up.
        task: drives the run; its result is the run's.
    """

    def __init__(
        self,
        store: CheckpointStore,
        owner: Owner,
        *,
        state: RunState,
        entries: list[Entry],
        opening: Sequence[Record],
        wirings: Wirings,
        lease_s: float,
        claimed_at: float,
        on_cut: Callable[[ActiveRun], None],
        only: str = "",
    ) -> None:
        self.run_id = state.run_id
        self.only = only
        self.log = RunLog(state.run_id, entries)
        self.first = len(entries)
        self._store = store
        self._owner = owner
        self._lease_s = lease_s
        self._claimed_at = claimed_at
        self._limited = _limited(state, opening, wirings)
        self._state = fold(state.run_id, entries, self._limited) if self._limited else state
        self._opening = opening
        self._wirings = wirings
        self._interest = 0
        self._driver_now: Driver | None = None
        self._on_cut = on_cut
        self._stopping = False
        self.task: asyncio.Task[RunResult] = asyncio.create_task(self._supervise())
        # Whoever waits for the run gets its error; where nobody does any more, it is not asyncio's to report.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def store(self) -> CheckpointStore:
        """Where its journal is."""
        return self._store

    @property
    def exists(self) -> bool:
        """Whether a checkpoint of the run has been written."""
        return self.log.seq > 0

    @property
    def label(self) -> str:
        """What it is to a person: ``Run``, ``Orchestration``, or ``Agent <id>`` where one task is driven."""
        if self.only:
            return f"Agent {place_of(self.only).agent_id}"
        return "Run" if self._state.plan is None else "Orchestration"

    @property
    def key(self) -> str:
        """What goes on with it: with the agent's id, once one agent runs it."""
        place = place_of(self.only)
        if self.only:
            return join_key(self.run_id, place.task_id, place.agent_id)
        root = self._state.scopes.get("")
        return join_key(self.run_id, root.agent_id if root is not None else "")

    @property
    def survives(self) -> bool:
        """Whether that checkpoint outlives the process."""
        return getattr(self._store, "durable", True)

    @property
    def ended(self) -> bool:
        """Whether it came to an end of its own, good or bad: it was not interrupted."""
        return self._state.ended

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping

    @property
    def is_stranded(self) -> bool:
        """Whether the event loop that drove it is gone."""
        return self.task.get_loop().is_closed()

    def abandon(self) -> None:
        """Count one consumer less without waiting; for finalisers."""
        self._interest -= 1
        if self._interest <= 0 and not self.task.get_loop().is_closed():
            self._stopping = True
            self.task.get_loop().call_soon_threadsafe(self.task.cancel)

    async def _supervise(self) -> RunResult:
        """Replace a driver whose call will not stop; give the run up at the end."""
        stranded = False
        try:
            driver = self._driver(None)
            while await self._watch(driver):
                await self._take_again()
                driver = self._driver(driver)
            result = self._result()
            if result is None:
                raise InternalError(f"run {self.run_id!r} stopped at record {self._state.seq} without an end")
            return result
        except OwnershipLost:
            # This process was stopped for longer than its lease. Whoever took the run may have finished it.
            await self._catch_up()
            if self._state.over is not None and (result := self._result()):
                return result
            raise
        except asyncio.CancelledError:
            if not self._stopping:
                self._on_cut(self)
            raise
        except GeneratorExit:
            stranded = True  # the event loop is gone; there is nobody to tell and no way to wait
            raise
        finally:
            if not stranded:
                self.log.end()
                await self._release()

    def _driver(self, before: Driver | None) -> Driver:
        wirings = self._wirings
        first = self._state.started or next((r for r in self._opening if isinstance(r, RunStarted)), None)
        agent_id = first.agent_id if first is not None else COORDINATOR
        seal = wirings.seal_of(agent_id)
        if seal is None and (self._state.audit or self._state.questions):
            # Elsewhere, where something was gated or somebody was there, the chain was begun or the question was asked.
            seal = wirings.people.seal
        limits = in_force(self._state, wirings.limits, seal)
        asked = self._state.raising
        asks = limits.on_limit == "ask" or (asked.request is not None and asked.answer is None)
        self._driver_now = Driver(
            self._state,
            self._store,
            self.log,
            lambda agent_id: wirings.of(agent_id).bench(self.run_id, self._store, self.log),
            self._owner,
            lease_s=self._lease_s,
            claimed_at=self._claimed_at,
            # Whoever may be given more time does not lose the calls that are at work when it is over.
            wall_s=None if asks else limits.max_wall_time_seconds,
            commit_every=wirings.commit_every(agent_id),
            only=self.only,
            approver=wirings.people.approver,
            seal=seal,
            before=before,
        )
        return self._driver_now

    def look_now(self) -> None:
        """Have the run look into its mailbox: somebody in this process has put something there."""
        if self._driver_now is not None:
            self._driver_now.look_now()

    def _result(self) -> RunResult | None:
        state, trace = self._state, self.log.trace
        if self.only and state.over is None and state.failed is None:
            task = result_of_task(state, self.only, trace)
            if task is not None:  # else it waits for a person
                return with_output(task, self._wirings.form_of(state, self.only))
        return with_output(result_of(state, trace), self._wirings.form_of(state))

    async def _release(self) -> None:
        try:
            try:
                await self._store.release(self._owner)
            except asyncio.CancelledError:  # once more and not later: giving up twice does no harm
                await self._store.release(self._owner)
        except CheckpointError as error:
            # The run's end is written; its owner is given up when the process ends or the lease is over.
            logger.warning("run %r could not be released: %s", self.run_id, error)

    async def give_up(self) -> None:
        """Release a run whose event loop was closed while it was driven."""
        await self._release()

    async def _watch(self, driver: Driver) -> bool:
        """Run a driver to its end. Returns True where it had to be abandoned."""
        drive = asyncio.create_task(driver.drive(self._opening))
        drive.add_done_callback(lambda _: driver.let_go())
        try:
            await driver.free
            if drive.done():
                drive.result()
                return False
            logger.warning("run %r: a call did not stop when it was cancelled; it is abandoned", self.run_id)
            _forget(drive)
            return True
        except asyncio.CancelledError:
            drive.cancel()
            await asyncio.wait({drive}, timeout=STOP_S * 0.75)
            _forget(drive)
            raise

    async def _take_again(self) -> None:
        """Own the run anew, so that whatever the abandoned driver still writes is refused, and fold it again."""
        process = self._owner.process
        await self._store.release(self._owner)
        self._claimed_at = lease_clock()
        self._owner = await self._store.claim(self.run_id, process, lease_s=self._lease_s)
        await self._catch_up()
        self._opening = ()

    async def _catch_up(self) -> None:
        """Fold the journal anew, and show what others or an abandoned driver have written."""
        entries = [entry async for entry in self._store.read(self.run_id)]
        for entry in entries[self.log.seq :]:
            self.log.publish([entry.record], entry.at)
        self._state = fold(self.run_id, entries, self._limited)

    def join(self) -> None:
        """Count one more consumer that wants the run to go on."""
        self._interest += 1

    async def leave(self) -> None:
        """Count one consumer less; when the last one leaves, stop the run and wait until it has stopped."""
        self._interest -= 1
        if self._interest <= 0:
            await self.stop()

    async def stop(self) -> None:
        """Stop driving. The run stays as it is in its journal and can be resumed."""
        if not self.task.done():
            self._stopping = True
            self.task.cancel()
            await asyncio.wait({self.task}, timeout=STOP_S)


def _limited(state: RunState, opening: Sequence[Record], wirings: Wirings) -> set[Limited]:
    """Return who has limits of its own. Of a task that was given some in a resume, what it used before counts too."""
    found: set[Limited] = {("agent", agent_id) for agent_id in wirings.limited()}
    found.update(state.limited_late)
    for record in opening:
        if type(record) is ConfigDiffers:
            found.update(("task", task_id) for task_id in record.task_limits)
    return found


def _forget(task: asyncio.Task[None]) -> None:
    """Let a task end by itself; what it raises is nobody's any more."""
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
