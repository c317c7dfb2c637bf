"""When the tasks of a run were at work, what came of them and what they used: a fold of its journal for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

from harness.budget import Usage
from harness.keys import place_of
from harness.plan import Task
from harness.records import (
    DriverStarted,
    Entry,
    LLMFailed,
    LLMFinished,
    Planned,
    Record,
    Reopened,
    Replanned,
    RunFinished,
    ScopeClosed,
    ScopeOpened,
    TaskSkipped,
)

Standing: TypeAlias = Literal["waiting", "running", "done", "doubtful", "failed", "skipped", "replanned"]
"""How a task stands. ``replanned``: a later plan goes on without it."""

ENDED: frozenset[Standing] = frozenset({"done", "doubtful", "failed", "skipped", "replanned"})


@dataclass(slots=True)
class Stretch:
    """One attempt at a task, or one piece of delegated work.

    Attributes:
        scope: its path.
        began_s: when it began, in seconds of the run, during which somebody drove it.
        ended_s: when it ended; None where it has not.
        depth: how many delegations it is below its task.
    """

    scope: str
    agent_id: str
    began_s: float
    depth: int = 0
    ended_s: float | None = None
    standing: Standing = "running"
    usage: Usage = field(default_factory=Usage)


@dataclass(slots=True)
class Row:
    """One task of one of the run's plans.

    Attributes:
        attempts: the attempts at it.
        delegated: the work its agent gave to others, in the order in which it began.
        usage: what it used with all of that.
        reason: why it failed or was skipped.
    """

    task: Task
    standing: Standing = "waiting"
    attempts: list[Stretch] = field(default_factory=list[Stretch])
    delegated: list[Stretch] = field(default_factory=list[Stretch])
    usage: Usage = field(default_factory=Usage)
    reason: str = ""


class Timeline:
    """Follows a run's journal.

    Attributes:
        rows: every task there ever was, in the order of the plans.
        stretches: every attempt and piece of delegated work, by scope.
        now_s: seconds of the run so far.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.stretches: dict[str, Stretch] = {}
        self.now_s = 0.0
        self._current: dict[str, Row] = {}
        self._began_at: float | None = None
        self._last_at = 0.0
        self._idle_s = 0.0

    @property
    def current(self) -> Sequence[Row]:
        """The tasks of the plan in force."""
        return tuple(self._current.values())

    def standing_of(self, task_id: str) -> Standing:
        """Say how a task of the plan in force stands."""
        row = self._current.get(task_id)
        return row.standing if row is not None else "waiting"

    def follow(self, entry: Entry) -> None:
        """Fold one more entry."""
        record = entry.record
        if self._began_at is None:
            self._began_at = self._last_at = entry.at
        if isinstance(record, DriverStarted):
            # Nobody drove the run since its last entry; a pause of days would leave no room for the rest.
            self._idle_s += max(0.0, entry.at - self._last_at)
        self._last_at = max(self._last_at, entry.at)
        self.now_s = self._last_at - self._began_at - self._idle_s
        if (tell := _FOLLOW.get(type(record))) is not None:
            tell(self, record)

    def planned(self, record: Planned) -> None:
        """Take a plan."""
        self._current = {}
        self._add(record.tasks)

    def replanned(self, record: Replanned) -> None:
        """Take a plan in the place of what remained of another."""
        for task_id in record.removed:
            if row := self._current.pop(task_id, None):
                row.standing = "replanned"
        self._add(record.tasks)

    def _add(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            row = self._current[task.id] = Row(task)
            self.rows.append(row)

    def opened(self, record: ScopeOpened) -> None:
        """An attempt or a piece of delegated work begins."""
        place = place_of(record.child)
        stretch = Stretch(record.child, record.agent_id, self.now_s, place.depth)
        self.stretches[record.child] = stretch
        row = self._current.get(place.task_id)
        if row is None:
            return
        if place.depth:
            row.delegated.append(stretch)
        else:
            row.attempts.append(stretch)
            row.standing = "running"

    def closed(self, record: ScopeClosed) -> None:
        """It ends."""
        stretch = self.stretches[record.child]
        stretch.ended_s = self.now_s
        stretch.standing = "failed" if not record.success else "doubtful" if record.doubtful else "done"
        place = place_of(record.child)
        if not place.depth and (row := self._current.get(place.task_id)):
            row.standing = stretch.standing
            row.reason = record.error

    def skipped(self, record: TaskSkipped) -> None:
        """A task is not done."""
        row = self._current[record.task_id]
        row.standing, row.reason = "skipped", record.reason

    def reopened(self, _record: Reopened) -> None:
        """What was not done gets another chance."""
        for row in self._current.values():
            aborted = row.standing == "doubtful" and row.task.on_failure == "abort"
            if aborted or row.standing in ("failed", "skipped"):
                row.standing, row.reason = "waiting", ""

    def used(self, record: LLMFinished | LLMFailed) -> None:
        """A model call has its price."""
        if stretch := self.stretches.get(record.scope):
            stretch.usage = stretch.usage + record.usage
        if row := self._current.get(place_of(record.scope).task_id):
            row.usage = row.usage + record.usage

    def finished(self, record: RunFinished) -> None:
        """The run says how each task ended."""
        for result in record.tasks:
            if row := self._current.get(result.task_id):
                row.standing, row.reason = result.status, result.error


_FOLLOW = cast(
    "Mapping[type[Record], Callable[[Timeline, Record], None]]",
    {
        Planned: Timeline.planned,
        Replanned: Timeline.replanned,
        ScopeOpened: Timeline.opened,
        ScopeClosed: Timeline.closed,
        TaskSkipped: Timeline.skipped,
        Reopened: Timeline.reopened,
        LLMFinished: Timeline.used,
        LLMFailed: Timeline.used,
        RunFinished: Timeline.finished,
    },
)
