"""drive(): the only loop. Start, stream, resume and fork all come through here.

Append the intent, perform the effect, append the outcome, ask the strategy again. An outcome and what follows from it
share one append, so a step costs two commits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic, time
from typing import TypeAlias

import msgspec

from harness.approval import AUDITED, Seal, audited
from harness.asking import ask_person, invalid_edit
from harness.checkpoint.base import CheckpointStore, Owner, lease_clock
from harness.errors import CheckpointError, InternalError, OwnershipLost
from harness.fold import advance
from harness.hitl.base import Approver
from harness.inbox import record_of
from harness.mailbox import Mail
from harness.mailroom import Mailroom
from harness.perform import Workbench, admit, call_llm, call_tool, cancel_responses
from harness.records import (
    VERSION,
    ApprovalRequested,
    ApprovalResolved,
    Audited,
    DriverStarted,
    LLMAccepted,
    LLMDetached,
    LLMFailed,
    LLMFinished,
    LLMStarted,
    Record,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunParked,
    ScopeClosed,
    ScopeOpened,
    StrategyName,
    ToolFinished,
    ToolStarted,
)
from harness.state import RunState, ScopeState, asked_about, open_questions, question_of
from harness.strategies.base import Ask, Pause, Step, Strategy, Wait, lost, take_up
from harness.strategies.dispatch import dispatch, pick, route
from harness.strategies.orchestrate import orchestrate
from harness.strategies.react import react
from harness.stream import RunLog
from harness.turns import Queued, Turns
from harness.watchdog import INFINITY, Watchdog, clock_of

_ROUNDS = range(100)
"""Rounds after which the loop lets other tasks run, for models and tools that never wait."""

logger = logging.getLogger("harness")

STRATEGIES: dict[StrategyName, Strategy] = {
    "react": react,
    "dispatch": dispatch,
    "route": route,
    "pick": pick,
    "orchestrate": orchestrate,
}


Call: TypeAlias = LLMStarted | ToolStarted | Pause | Ask | Queued
"""What is performed; everything else a strategy asks for is only written down."""

CLOSE_PROMPT_S = 1.0
"""Seconds a prompt may take to close when its question was answered elsewhere."""

STOP_CALLS_S = 5.0
"""Seconds calls may take to stop when somebody ends the run; what has not stopped then is abandoned."""

_URGENT = (
    DriverStarted,
    LLMAccepted,
    LLMDetached,
    ScopeClosed,
    RunFinished,
    RunFailed,
    RunCancelled,
    RunParked,
    ApprovalRequested,
    ApprovalResolved,
)


class Driver:
    """Drives one run for one epoch.

    Args:
        state: the folded journal; grown in place.
        store: where the journal is.
        log: who watches.
        make_bench: builds what performing the calls of one agent needs.
        owner: the right to append to it.
        lease_s: seconds for which the run stays ours after each renewal.
        claimed_at: when it was claimed, or just before, on the clock of leases.
        wall_s: seconds the run may be driven, over all epochs.
        commit_every: steps that may share a commit while nothing but models and ``read`` tools is at work.
        only: drive this scope and those below it, until it is closed; empty for the whole run.
        approver: who is asked; None where nobody is here.
        seal: signs answers given here, and the audit chain; None where nothing is gated.
        before: the driver that was abandoned for this one, since calls did not stop when they were cancelled.

    Attributes:
        stuck: such calls; a call that was alone is not among them.
        free: done when nobody need wait for the driver any longer: it has ended, or a call does not come back after it
            was cancelled.
    """

    def __init__(
        self,
        state: RunState,
        store: CheckpointStore,
        log: RunLog,
        make_bench: Callable[[str], Workbench],
        owner: Owner,
        *,
        lease_s: float,
        claimed_at: float,
        wall_s: float | None,
        commit_every: int = 1,
        only: str = "",
        approver: Approver | None = None,
        seal: Seal | None = None,
        before: Driver | None = None,
    ) -> None:
        self.state = state
        self.owner = owner
        self._store = store
        self._log = log
        self._make_bench = make_bench
        self._benches: dict[str, Workbench] = {}
        self._touched: dict[str, None] = {}  # scopes whose strategy is to be asked, in order
        self._waiting: dict[str, None] = {}  # scopes that wait for any call to end
        self._has_ended = False  # one has, since they were last asked
        self._only = only
        self._approver = approver
        self._seal = seal
        self._before = before
        self.stuck: list[Call] = []
        self._loop = asyncio.get_running_loop()
        self.free: asyncio.Future[None] = self._loop.create_future()
        # What an abandoned driver has waited for its call is in no record.
        active_s = state.spent.active_s if before is None else max(state.spent.active_s, before.clock())
        self._active_since = monotonic() - active_s
        self._lease_s = lease_s
        self._lease_until = claimed_at + lease_s
        self._pending: list[Record] = []
        self._durable_seq = state.seq
        self._commit_every = commit_every
        self._shares_commits = commit_every > 1
        self._minds_records = self._shares_commits or seal is not None
        self._urgent = False
        self._steps_since_commit = 0
        self._tasks: dict[asyncio.Task[Record | None], Call] = {}
        self._turns = Turns()
        self._arrived: list[asyncio.Task[Record | None]] = []
        self._wake: asyncio.Future[None] | None = None
        self._written: list[tuple[int, asyncio.Future[None]]] = []  # calls in flight wait for these records
        self._watchdogs: list[Watchdog] = []  # of calls beside others that have ended, for the next ones
        self._beat: asyncio.TimerHandle | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._lost: OwnershipLost | None = None
        self._task: asyncio.Task[None] | None = None
        self._cancel: Mail | None = None
        self._mailroom = Mailroom(
            store,
            state.run_id,
            known=state.commands,
            is_asked=lambda: any(type(call) is Ask for call in self._tasks.values()),
            on_mail=self._wake_up,
            on_cancel=self._begin_cancel,
        )
        self._wall_end = INFINITY if wall_s is None else self._loop.time() + max(0.0, wall_s - active_s)

    def _bench_of(self, scope: ScopeState) -> Workbench:
        """Return what the agent of a scope works with."""
        return self._benches.get(scope.agent_id) or self._new_bench(scope.agent_id)

    def _new_bench(self, agent_id: str) -> Workbench:
        bench = self._benches[agent_id] = self._make_bench(agent_id)
        bench.clock = self.clock
        bench.now = clock_of(self._loop)
        bench.check_owner = self._check_owner
        bench.write = self._write_now
        bench.wall_end = self._wall_end
        return bench

    def clock(self) -> float:
        """Return how many seconds the run has been driven, over all epochs."""
        # Rounded up: an outcome that came because the wall-clock limit was over must not fold to a moment before it.
        return int((monotonic() - self._active_since) * 10_000 + 1) / 10_000

    async def drive(self, opening: Sequence[Record] = ()) -> None:
        """Drive the run until it is over or failed.

        Args:
            opening: facts to write first (RunStarted, Reopened, ConfigDiffers).

        Raises:
            CheckpointError: the journal could not be written; what was written stays valid.
        """
        watchdog = Watchdog(self._give_up)
        self._task = asyncio.current_task()
        self._beat_later()
        try:
            begun = self.state.seq > 0
            self._open(opening)
            if begun:
                await self._mailroom.fetch()
            self._mailroom.start()
            await self._loop_until_over(watchdog)
            if type(self.state.over) is RunCancelled:  # by a command that was there before this driver
                await self._cancel_responses()
        except (OwnershipLost, GeneratorExit):
            raise  # nothing more may be written, or there is no event loop left to write on
        except BaseException:  # whatever ends the driver, what calls have brought is saved first; it is raised again
            if self._lost is not None:
                raise self._lost from None
            await self._save_what_is_ready()
            if not await self._is_ended_by_command():
                raise
        finally:
            self._stop_beating()
            self._mailroom.stop()
            watchdog.close()
            try:
                await self._stop_calls()
            finally:
                self._turns.close()
            for idle in self._watchdogs:
                idle.close()
            self.let_go()

    def _open(self, opening: Sequence[Record]) -> None:
        for record in opening:
            self._note(record)
        cut = [scope.llm for scope in self.state.scopes.values() if scope.llm]
        for start in cut:
            agent_id = self.state.scopes[start.scope].agent_id
            self._log.discard(start.scope, agent_id, "the model call was cut when its process ended")
        self._note(DriverStarted(VERSION, self.state.epoch + 1, self.owner.process))
        if self._before is not None:
            self._settle_abandoned(self._before.stuck, cut)
            self._before = None
        self._touch_all()

    async def _loop_until_over(self, watchdog: Watchdog) -> None:
        state = self.state
        if state.started is None:
            raise InternalError(f"run {state.run_id!r} has no beginning")
        task, mailroom, tasks = self._task, self._mailroom, self._tasks
        assert task is not None
        while True:
            for _ in _ROUNDS:
                if mailroom.waiting:
                    await self._take_mail()
                starts = self._decide()
                if not starts and not (tasks and state.in_flight) and not self._is_over():
                    starts = await self._decide_idle()
                    if mailroom.waiting:
                        continue
                if self._pending and (not self._shares_commits or self._is_commit_due()):
                    await self._commit(starts)
                if state.ended or (self._only and self._is_over()):
                    return
                if tasks or len(starts) != 1 or type(step := starts[0]) is Ask:
                    # A question is never waited for alone: its answer may come by mail, and that time does not count.
                    for step in starts:
                        self._spawn(step)
                    await self._next_arrivals()
                else:
                    self._note_outcome(step.scope, await self._perform(step, watchdog))
                if task.cancelling():
                    raise asyncio.CancelledError  # a call has swallowed it; nothing more is started
            await asyncio.sleep(0)

    async def _decide_idle(self) -> list[Call]:
        """Ask every scope where no call is in flight; park the run where only people can make it go on."""
        self._touch_all()  # what waited for others' calls to end is not touched by its own
        starts, state = self._decide(), self.state
        if self._only and self._waiting and not starts and not self._tasks and not self._is_over():
            starts = self._take_up_others()
            self._touch_all()  # what was held may be free now
            starts += self._decide()
        stands = not starts and not self._tasks and not self._is_over()
        if stands and open_questions(state) and not await self._mailroom.fetch():
            waiting = tuple(request.approval_id for request in open_questions(state))
            self._note(RunParked(waiting, state.steps, msgspec.structs.replace(state.spent)))
        return starts

    def _take_up_others(self) -> list[Call]:
        """Listen to what providers still write for the rest of the run: it holds a part of what is waited for."""
        starts: list[Call] = []
        for path, scope in self.state.scopes.items():
            if scope.detached is not None and not self._is_driven(path):
                bench = self._bench_of(scope)
                for step in self._turns.admit(bench, scope, take_up(scope, self.state, bench.config)):
                    if type(step) is LLMStarted:
                        self._note(step)
                        starts.append(step)
                    else:
                        self._heed(step, scope, starts)
        return starts

    def _decide(self) -> list[Call]:
        """Ask the strategies of the scopes that were touched, until nothing follows from what they say.

        Facts and intents are written down.

        Returns:
            What is to be performed.
        """
        state = self.state
        starts: list[Call] = []
        if state.ended:
            return starts
        if self._waiting:
            self._wake_waiting()
        while touched := self._touched:
            self._touched = {}
            for path in touched:
                scope = state.scopes.get(path)
                if scope is None or (self._only and not self._is_driven(path)):
                    continue
                bench = self._benches.get(scope.agent_id) or self._new_bench(scope.agent_id)
                steps = STRATEGIES[scope.strategy](scope, state, bench.config)
                if bench.takes_turns:
                    steps = self._turns.admit(bench, scope, steps)
                for step in steps:
                    # Types are compared, since isinstance asks a Struct's metaclass and costs six times as much.
                    if type(step) is LLMStarted or type(step) is ToolStarted:
                        self._note(step)
                        starts.append(step)
                    else:
                        self._heed(step, scope, starts)
                if state.ended:
                    self._touched = {}
                    break
        return starts

    def _heed(self, step: Step | Queued, scope: ScopeState, starts: list[Call]) -> None:
        """Do what a strategy asks for besides calls."""
        if type(step) is Pause:
            scope.pausing = True
            starts.append(step)
        elif type(step) is Ask:
            asked_about(self.state, step.scope, step.index).asking = True
            starts.append(step)
            if step.scope != scope.scope:  # the answer is the run's: who has asked is to hear of it, too
                self._waiting[scope.scope] = None
        elif type(step) is Queued:
            starts.append(step)
            self._urgent = True  # nobody knows for how long it waits
        elif type(step) is Wait:
            self._waiting[scope.scope] = None
        else:
            self._note_fact(scope.scope, step)

    def _note_fact(self, path: str, fact: Record) -> None:
        """Fold a fact that a scope's strategy has stated, and have those it is news to asked again."""
        self._note(fact)
        self._touched[path] = None
        if type(fact) is ScopeOpened:
            self._touched[fact.child] = None
        elif type(fact) is ScopeClosed:
            self._touched[fact.scope] = None

    def _wake_waiting(self) -> None:
        """Ask scopes that wait for a call to end, where one has: after those whose call it was."""
        if self._has_ended:
            self._touched.update(self._waiting)
            self._waiting = {}
        self._has_ended = False

    def _is_over(self) -> bool:
        return self.state.ended or (self._only != "" and self._only not in self.state.scopes)

    def _is_driven(self, path: str) -> bool:
        # A run that is to be aborted is ended by its root, whatever was to be driven.
        return (
            not self._only or self.state.aborted != "" or path == self._only or path.startswith(f"{self._only}/")
        )  # fmt: skip

    def _touch_all(self) -> None:
        self._touched = dict.fromkeys(self.state.scopes)

    def _note(self, record: Record) -> None:
        """Fold a record now; it becomes durable with the next commit, before anything depends on it."""
        self._pending.append(record)
        advance(self.state, record, time())
        if self._minds_records:
            self._mind(record)

    def _mind(self, record: Record) -> None:
        """Note what a record means for the next commit, and add its link to the audit chain."""
        if self._shares_commits:
            self._note_urgency(record)
        if self._seal is not None and type(record) in AUDITED:
            what = audited(record)
            self._note(Audited(what, self._seal.mac(f"{self.state.audit}{what}".encode())))

    def _note_urgency(self, record: Record) -> None:
        """Note what decides whether the next commit may wait for another step."""
        if isinstance(record, LLMStarted):
            self._steps_since_commit += 1
        elif isinstance(record, ToolStarted):
            self._urgent = self._urgent or record.effect != "read"
        elif isinstance(record, ToolFinished):
            spec = self._bench_of(self.state.scopes[record.scope]).config.tools.get(record.tool)
            self._urgent = self._urgent or spec is None or spec.effect != "read"
        elif isinstance(record, _URGENT):
            self._urgent = True

    def _note_outcome(self, scope_path: str, record: Record | None) -> None:
        self._touched[scope_path] = None
        self._has_ended = True
        if record is None:
            return
        self._note(record)
        if type(record) is LLMFinished and record.purpose == "step":
            scope = self.state.scopes[scope_path]
            if scope.phase == "tools":
                for refused in admit(self._bench_of(scope), scope):
                    self._note(refused)

    def _is_commit_due(self) -> bool:
        return self._urgent or self._steps_since_commit >= self._commit_every

    async def _commit(self, starts: Sequence[Call] = ()) -> None:
        """Make what was noted durable.

        Args:
            starts: calls among it that begin only afterwards; they are not written later if this fails.
        """
        records, self._pending = self._pending, []
        if self._shares_commits:
            self._urgent = False
            self._steps_since_commit = 0
        try:
            at = await self._store.append(self.state.run_id, self._durable_seq, records, owner=self.owner)
        except BaseException:  # raised again; cancelled or refused, nothing of it may be forgotten
            begun = [record for record in records if not any(record is start for start in starts)]
            self._pending = begun + self._pending  # for one more try while the driver stops
            raise
        self._durable_seq += len(records)
        self._log.publish(records, at)
        if self._written:
            self._tell_written()
        if self._mailroom.taken:
            await self._mailroom.discard_taken()

    async def _write_now(self, record: Record) -> None:
        """Make a record durable in the middle of a call, which goes on only then."""
        self._note(record)
        if not self._tasks:  # the loop itself performs the call, and writes nothing meanwhile
            await self._commit()
            return
        written: asyncio.Future[None] = self._loop.create_future()
        self._written.append((self.state.seq, written))
        self._wake_up()
        await written

    def _tell_written(self) -> None:
        waiting, self._written = self._written, []
        for seq, written in waiting:
            if seq > self._durable_seq:
                self._written.append((seq, written))
            elif not written.done():
                written.set_result(None)

    def _perform(self, step: Call, watchdog: Watchdog) -> Coroutine[None, None, Record | None]:
        # Types are compared, since isinstance asks a Struct's metaclass and costs six times as much where it fails.
        scope = self.state.scopes[step.scope]
        bench = self._benches.get(scope.agent_id) or self._new_bench(scope.agent_id)
        if type(step) is LLMStarted:
            return (self._turns.call if bench.takes_turns else call_llm)(bench, scope, step, watchdog)
        if type(step) is ToolStarted:
            return call_tool(bench, scope, step, watchdog)
        if type(step) is Ask:
            return self._ask(step)
        if type(step) is Queued:
            return self._turns.wait(step, self.state, self._wall_end)
        assert type(step) is Pause  # the last of the five
        return self._pause(step)

    async def _pause(self, step: Pause) -> None:
        await asyncio.sleep(max(0.0, min(step.seconds, self._wall_end - self._loop.time())))
        scope = self.state.scopes[step.scope]
        scope.pausing, scope.waited = False, True

    async def _perform_beside(self, step: Call) -> Record | None:
        watchdog = self._watchdogs.pop() if self._watchdogs else Watchdog(self._give_up)
        watchdog.guard()
        try:
            return await self._perform(step, watchdog)
        except BaseException:  # raised again; a call that ends by itself has stopped its deadline, and it is used again
            watchdog.stop()
            raise
        finally:
            self._watchdogs.append(watchdog)
            self._arrive()

    def _spawn(self, step: Call) -> None:
        task = self._loop.create_task(self._perform_beside(step))
        self._tasks[task] = step

    def _arrive(self) -> None:
        """Tell the loop that the running task has its outcome: it has ended by the time the loop looks."""
        task = asyncio.current_task(self._loop)  # to be told the loop spares it a call of the system
        assert task is not None
        self._arrived.append(task)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _next_arrivals(self) -> None:
        """Wait for calls in flight; note the outcomes of all that have arrived."""
        if not self._tasks:
            raise InternalError(f"run {self.state.run_id!r} at record {self.state.seq} has nothing to do and no end")
        if not self._arrived and not self._written:
            began = monotonic()
            self._wake = self._loop.create_future()
            try:
                await self._wake
            finally:
                self._wake = None
                if self._waits_for_people():
                    self._do_not_count(monotonic() - began)
        arrived, self._arrived = self._arrived, []
        for task in arrived:
            if task not in self._tasks:
                continue  # its question was answered elsewhere
            outcome = task.result()  # what it raises ends the driver, which saves the tasks that are still listed
            self._note_outcome(self._tasks.pop(task).scope, outcome)

    def _waits_for_people(self) -> bool:
        """Say whether everything at work is a question."""
        calls = self._tasks.values()
        first = next(iter(calls), None)  # it says so nearly always, and this is asked for every call beside others
        return first is None or (type(first) is Ask and all(type(call) is Ask for call in calls))

    async def _stop_calls(self) -> None:
        tasks = [task for task in self._tasks if not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _save_what_is_ready(self) -> None:
        """Write down what calls have brought already: a clean stop leaves as little in doubt as it can."""
        await self._stop_calls()
        for task, call in self._tasks.items():
            if task.done() and not task.cancelled() and task.exception() is None:
                self._note_outcome(call.scope, task.result())
        self._tasks.clear()
        if self._pending:
            try:
                await self._commit()
            except CheckpointError as error:
                # The append that was cut may have been written after all; then these calls are in doubt, not lost.
                logger.warning("run %r: the last outcomes could not be written: %s", self.state.run_id, error)

    def _settle_abandoned(self, stuck: Sequence[Call], model_calls: Sequence[LLMStarted]) -> None:
        """Give calls that would not stop an outcome: they are in doubt, and running them again would hang again.

        Args:
            stuck: these calls; where there are none, whatever was in flight is one.
            model_calls: the model calls that were in flight.
        """
        places = {(call.scope, call.index) for call in stuck if type(call) is ToolStarted}
        for scope in self.state.scopes.values():
            for index, call in enumerate(scope.calls):
                if call.attempt and call.result is None and (not stuck or (scope.scope, index) in places):
                    status = "unknown" if call.effect == "once" else "timeout"
                    text = f"{call.call.name} did not stop when it was cancelled and was abandoned"
                    if status == "unknown":
                        text += "; it may or may not have had its effect"
                    count = self._bench_of(scope).config.count(text)
                    self._note(
                        ToolFinished(
                            scope.step, index, call.call.name, status, text, self.clock(), scope.scope, tokens=count
                        )
                    )
        asked = {call.scope for call in stuck if type(call) is LLMStarted}
        for start in model_calls:
            if stuck and start.scope not in asked:
                continue
            error = "the model call did not stop when it was cancelled and was abandoned"
            if self.state.scopes[start.scope].accepted is not None:
                self._note(lost(start, self.clock(), error, transient=False))
                continue
            self._note(
                LLMFailed(
                    start.step,
                    self.clock(),
                    error,
                    transient=False,
                    scope=start.scope,
                    attempt=start.attempt,
                    purpose=start.purpose,
                )
            )

    def _give_up(self, task: asyncio.Task[object]) -> None:
        """Give up a call that does not come back, and with it the driver."""
        self.stuck += [call for mine, call in self._tasks.items() if mine is task]
        self.let_go()

    def _give_up_calls(self) -> None:
        """Give up the calls that have not stopped since somebody ended the run; the next driver ends it."""
        if self.state.over is not None:
            return
        self.stuck += [call for task, call in self._tasks.items() if not task.done()]
        self.let_go()

    def let_go(self) -> None:
        """Say that nobody need wait for the driver any longer."""
        if not self.free.done():
            self.free.set_result(None)

    # -- people ---------------------------------------------------------------------------------

    async def _ask(self, step: Ask) -> Record | None:
        request = question_of(self.state, step.approval_id)
        if request is None or self._seal is None:
            return None
        scope = self.state.scopes[step.scope]
        record = await ask_person(self._bench_of(scope), scope, request, self._approver, self._seal)
        if (
            record is not None
            and record.decision == "expired"
            and await self._mailroom.holds_answer(request, self._seal)
        ):
            return None
        return record

    def _do_not_count(self, seconds: float) -> None:
        """Leave out a time in which every branch of the run waited for a person."""
        self._active_since += seconds
        self._wall_end += seconds
        for bench in self._benches.values():
            bench.wall_end = self._wall_end

    def look_now(self) -> None:
        """Look into the mailbox at once: somebody in this process has put something there."""
        self._mailroom.look_now()

    def _begin_cancel(self, mail: Mail) -> None:
        self._cancel = mail
        if self._task is not None:
            self._task.cancel()
            self._loop.call_later(STOP_CALLS_S, self._give_up_calls)

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _take_mail(self) -> None:
        """Write down what the commands that were fetched come to; close the prompts of questions they answer."""
        letters, self._mailroom.waiting = self._mailroom.waiting, []
        for mail in letters:
            self._mailroom.taken.append(mail.id)
            if self.state.over is not None:
                continue  # there is nothing to be said to it any more
            record = record_of(mail, self.state, self._count, self._seal, self._invalid_edit)
            if record is None:
                continue
            if type(record) is ApprovalResolved:
                await self._close_prompt(record.approval_id)
            self._note(record)
            self._touch_all()

    async def _close_prompt(self, approval_id: str) -> None:
        for task, call in list(self._tasks.items()):
            if type(call) is Ask and call.approval_id == approval_id:
                del self._tasks[task]
                task.cancel()
                await asyncio.wait({task}, timeout=CLOSE_PROMPT_S)

    def _count(self, text: str) -> int:
        return self._bench_of(self.state.scopes[""]).config.count(text)

    def _invalid_edit(self, request: ApprovalRequested, arguments: str) -> str:
        return invalid_edit(self._bench_of(self.state.scopes[request.scope]), request, arguments)

    async def _is_ended_by_command(self) -> bool:
        """Write down that somebody has ended the run, where that is what stopped the driver."""
        if self._cancel is None or self._task is None or self._task.uncancel() > 0:
            return False
        self._mailroom.taken.append(self._cancel.id)
        if self.state.over is not None:
            return True  # it came to its end before it could be ended
        record = record_of(self._cancel, self.state, self._count, self._seal, self._invalid_edit)
        if record is not None:
            self._note(record)
            await self._commit()
            await self._cancel_responses()
        return True

    async def _cancel_responses(self) -> None:
        """Have providers stop what they still write for a run that is over."""
        await cancel_responses(self.state, lambda scope, purpose: self._bench_of(scope).llm_for(purpose))

    # -- ownership ------------------------------------------------------------------------------

    def _beat_later(self) -> None:
        # A timer and not a task that sleeps: most runs are over before the first beat.
        self._beat = self._loop.call_later(self._lease_s / 3, self._begin_beat)

    def _begin_beat(self) -> None:
        self._renewal = self._loop.create_task(self._keep_lease())

    async def _keep_lease(self) -> None:
        """Renew the lease; stop the driver where it was lost."""
        try:
            await self._renew()
        except OwnershipLost as error:
            self._lost = error
            if self._task is not None:
                self._task.cancel()
            return
        except CheckpointError as error:
            # A store that is busy now may not be at the next beat; every append checks the owner anyway.
            logger.warning("run %r: its lease could not be renewed: %s", self.state.run_id, error)
        self._beat_later()

    def _stop_beating(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        if self._renewal is not None:
            self._renewal.cancel()

    async def _renew(self) -> None:
        until = lease_clock() + self._lease_s
        await self._store.renew(self.owner, lease_s=self._lease_s)
        self._lease_until = until

    async def _check_owner(self) -> None:
        """Make sure, right before an effect, that the run is still ours: the process may have been stopped since."""
        if lease_clock() >= self._lease_until:
            await self._renew()
