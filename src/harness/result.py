"""What a run comes to. A spent budget or a missing human is a value here, not an exception."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar, cast

from harness.budget import Spent, total
from harness.errors import ConfigError
from harness.events import budget_payload
from harness.keys import place_of
from harness.records import (
    ApprovalRequested,
    Entry,
    FailureReason,
    RunCancelled,
    RunFailed,
    Share,
    TaskResult,
)
from harness.state import RunState, open_questions, shares
from harness.tools.answer import AnswerForm, BadAnswer, answer_form

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result(Mapping[str, object]):
    """What every result has. It is also a read-only mapping of its own fields and of ``budget``.

    ``task_results`` (by task id), ``conflicts``, ``unknowns`` and ``replan_count`` are those of a run with a plan.
    ``output`` is the answer as an object, where the agent has ``AgentConfig(output=...)``; ``answer`` is its JSON then.
    """

    run_id: str
    agent_id: str
    answer: str = ""
    output: object = None
    confidence: float = 0.0
    steps: int = 0
    spent: Spent = field(default_factory=Spent)
    error: str = ""
    summarizations: int = 0
    task_results: Mapping[str, TaskResult] = field(default_factory=dict[str, TaskResult])
    conflicts: Sequence[str] = ()
    unknowns: Sequence[str] = ()
    replan_count: int = 0
    shares: Sequence[Share] = field(default=(), repr=False)
    trace: Sequence[Entry] = field(default=(), repr=False)

    @property
    def success(self) -> bool:
        """Whether the run has its answer."""
        return False

    @property
    def budget(self) -> dict[str, object]:
        """What the run spent: cost_usd, elapsed_seconds, tokens, breakdown, by_site, by_agent, by_task."""
        return budget_payload(self.spent, self.shares)

    @property
    def metadata(self) -> dict[str, object]:
        """Counts beside the answer: summarizations."""
        return {"summarizations": self.summarizations}

    def output_as(self, kind: type[T], *, task_id: str = "") -> T:
        """Return the answer as an object of a type, checked anew: for type checkers, and for the tasks of a plan.

        Args:
            kind: the type.
            task_id: takes the answer of this task.

        Raises:
            ConfigError: there is no such answer, or it is none of that type.
        """
        answer, whose = self.answer, f"the answer of run {self.run_id!r}"
        if task_id:
            if task_id not in self.task_results:
                raise ConfigError(f"run {self.run_id!r} has no result of a task {task_id!r}")
            answer, whose = self.task_results[task_id].answer, f"the answer of task {task_id!r}"
        try:
            value = answer_form(kind, "output_as()").read(answer)
        except BadAnswer as error:
            raise ConfigError(f"{whose} is no {getattr(kind, '__name__', kind)}: {error}") from None
        return cast("T", value)  # what was validated by a type is of that type

    def __getitem__(self, key: str) -> object:
        if key in _KEYS:
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(_KEYS)

    def __len__(self) -> int:
        return len(_KEYS)


_KEYS = (
    "run_id", "agent_id", "success", "answer", "output", "confidence", "steps", "error", "budget", "metadata",
    "task_results", "conflicts", "unknowns", "replan_count", "trace",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(_Result):
    """The run has its answer.

    >>> Finished(run_id="r1", agent_id="a", answer="42", confidence=0.9)["answer"]
    '42'
    """

    @property
    def success(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Result):
    """The run stopped without an answer; resuming it goes on. ``answer`` is the best partial answer.

    >>> Failed(run_id="r1", agent_id="a", reason="max_steps", error="no answer within max_steps=3").success
    False
    """

    reason: FailureReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(_Result):
    """Somebody ended the run for good.

    >>> Cancelled(run_id="r1", agent_id="a", error="not needed").answer
    ''
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(_Result):
    """The run waits for a person; answering and resuming it goes on.

    Attributes:
        waiting: the open questions, in the order they were asked.

    >>> Parked(run_id="r1", agent_id="a").success
    False
    """

    waiting: Sequence[ApprovalRequested] = ()


RunResult: TypeAlias = Finished | Failed | Cancelled | Parked


def result_of(state: RunState, trace: Sequence[Entry]) -> RunResult | None:
    """Return what a folded journal came to, or None while the run is still to be driven."""
    if state.parked is not None and state.over is None:  # it may be cancelled while it waits
        return Parked(
            run_id=state.run_id,
            agent_id=state.scopes[""].agent_id,
            steps=state.parked.steps,
            spent=state.parked.spent,
            summarizations=state.summarizations,
            waiting=open_questions(state),
            trace=trace,
        )
    started, final = state.started, state.over or state.failed
    if started is None or final is None:
        return None
    run_id, agent_id = state.run_id, state.scopes[""].agent_id
    steps, spent, summarizations = final.steps, final.spent, state.summarizations
    if isinstance(final, RunCancelled):
        return Cancelled(
            run_id=run_id, agent_id=agent_id, error=final.reason,
            steps=steps, spent=spent, summarizations=summarizations, trace=trace,
        )  # fmt: skip
    if isinstance(final, RunFailed):
        return Failed(
            run_id=run_id, agent_id=agent_id, answer=final.answer, error=final.error, reason=final.reason,
            steps=steps, spent=spent, shares=final.shares, summarizations=summarizations, trace=trace,
            task_results={task.task_id: task for task in _so_far(state)},
        )  # fmt: skip
    return Finished(
        run_id=run_id, agent_id=agent_id, answer=final.answer, confidence=final.confidence,
        steps=steps, spent=spent, shares=final.shares, summarizations=summarizations, trace=trace,
        task_results={task.task_id: task for task in final.tasks},
        conflicts=final.conflicts, unknowns=final.unknowns, replan_count=final.replan_count,
    )  # fmt: skip


def with_output(result: R, form: AnswerForm | None) -> R:
    """Return a result with the answer as an object; with the reason as ``error`` where it fits the type no more."""
    if form is None or not isinstance(result, Finished):
        return result
    try:
        return replace(result, output=form.read(result.answer))
    except BadAnswer as error:
        return replace(result, error=f"the answer does not fit the output type as it is now: {error}")


def _so_far(state: RunState) -> Iterator[TaskResult]:
    """Yield how the tasks of a plan stand that have ended in a run that has failed."""
    for task_id, task in state.plan.tasks.items() if state.plan is not None else ():
        closed, agent_id = task.closed, task.task.agent_id
        if closed is not None and closed.success:
            status = "doubtful" if closed.doubtful else "done"
            yield TaskResult(task_id, agent_id, status, closed.answer, closed.confidence, task.attempts)
        elif closed is not None:
            yield TaskResult(task_id, agent_id, "failed", closed.answer, 0.0, task.attempts, closed.error)


def result_of_task(state: RunState, scope: str, trace: Sequence[Entry]) -> Finished | Failed | None:
    """Return what one attempt at a task came to, or None while it is still to be driven."""
    place, plan = place_of(scope), state.plan
    task = plan.tasks.get(place.task_id) if plan is not None else None
    if task is None or task.child != scope or task.closed is None:
        return None
    closed = task.closed
    run_id, agent_id = state.run_id, place.agent_id
    result: Finished | Failed = (
        Finished(run_id=run_id, agent_id=agent_id)
        if closed.success
        else Failed(run_id=run_id, agent_id=agent_id, reason=closed.reason or "task")
    )
    of_task = tuple(share for share in shares(state) if share.task_id == place.task_id)
    return replace(
        result,
        shares=of_task,
        answer=closed.answer,
        confidence=closed.confidence,
        steps=closed.steps,
        error=closed.error,
        spent=Spent(total([share.usage for share in of_task]), active_s=state.spent.active_s),
        trace=trace,
    )
