"""What the tasks of a plan have come to: which are done, which can start, and what a failure leads to. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec

from harness.budget import GuardrailConfig
from harness.plan import Task
from harness.records import TaskResult
from harness.state import PlanState, TaskState

Verdict: TypeAlias = Literal["waiting", "running", "done", "doubtful", "retry", "replan", "failed", "skipped"]
"""``doubtful``: answered below the confidence threshold, and nothing more is to be done about it."""

USED: frozenset[Verdict] = frozenset({"done", "doubtful"})
LOST: frozenset[Verdict] = frozenset({"failed", "skipped"})


def verdict(task: TaskState, plan: PlanState, limits: GuardrailConfig) -> Verdict:
    """Say what a task has come to, and what is to be done where that is not good."""
    if task.status != "ended" or task.closed is None:
        return "waiting" if task.status == "ended" else task.status
    closed = task.closed
    if closed.success and not closed.doubtful:
        return "done"
    # What has used up its limits fails at once when it is tried again.
    if task.task.on_failure == "retry" and task.attempts <= task.task.max_retries and closed.reason != "budget":
        return "retry"
    if task.task.on_failure == "replan" and can_replan(plan, limits):
        return "replan"
    return "doubtful" if closed.success else "failed"


def can_replan(plan: PlanState, limits: GuardrailConfig) -> bool:
    """Say whether what remains may be replaced once more."""
    return not plan.no_replan and plan.replans - plan.replans_base < limits.max_replan_count


def verdicts(plan: PlanState, limits: GuardrailConfig) -> dict[str, Verdict]:
    """Return what every task of the plan has come to."""
    # Most tasks have not ended: those are not worth a call each time the plan is looked at.
    return {
        task_id: verdict(task, plan, limits) if task.status == "ended" else task.status
        for task_id, task in plan.tasks.items()
    }


def is_ready(task: Task, plan: PlanState, found: dict[str, Verdict]) -> bool:
    """Say whether a waiting task can start: what it depends on is done, or lost and it can do without."""
    statuses = {found[need] for need in task.depends_on}
    if LOST.isdisjoint(statuses):
        return USED.issuperset(statuses)
    return all(found[need] in USED or _can_do_without(need, plan, found) for need in task.depends_on)


def blocked_by(task: Task, plan: PlanState, found: dict[str, Verdict]) -> str:
    """Say why a waiting task can never start; empty where it may."""
    for need in task.depends_on:
        if found[need] in LOST and not _can_do_without(need, plan, found):
            return f"it depends on {need!r}, which was {'not done' if found[need] == 'failed' else 'skipped'}"
    return ""


def _can_do_without(need: str, plan: PlanState, found: dict[str, Verdict]) -> bool:
    """Whoever planned a task that may be skipped has said that what depends on it can do without; it is told."""
    return found[need] in LOST and plan.tasks[need].task.on_failure == "skip"


def what_went_wrong(task: TaskState) -> str:
    """Say in a sentence why a task has no answer, or none to rely on."""
    closed = task.closed
    if closed is None:
        return task.reason or "it was not begun"
    if closed.success:
        return f"its answer is doubtful (confidence {closed.confidence:.2f})"
    return closed.error


def results(plan: PlanState, limits: GuardrailConfig) -> Iterator[TaskResult]:
    """Yield how every task of a plan in which nothing is left to do has ended."""
    for task_id, status in verdicts(plan, limits).items():
        task = plan.tasks[task_id]
        closed, agent_id, attempts = task.closed, task.task.agent_id, plan.begun.get(task_id, 0)
        if status in ("done", "doubtful") and closed is not None:
            yield TaskResult(task_id, agent_id, status, closed.answer, closed.confidence, attempts)
        else:
            ended = "skipped" if status == "skipped" else "failed"
            answer = closed.answer if closed is not None else ""
            yield TaskResult(task_id, agent_id, ended, answer, 0.0, attempts, what_went_wrong(task))


def merge(plan: PlanState, kept: Sequence[str], new: Sequence[Task]) -> tuple[Task, ...]:
    """Fit a planner's new tasks beside those that are kept.

    A task that is kept and named once more as it was is left out of the new ones; another task under a kept one's id
    gets an id of its own, and so does what is said to depend on it.
    """
    taken = {*kept, *(task.id for task in new)}
    renamed: dict[str, str] = {}
    fresh: list[Task] = []
    for task in new:
        if task.id in kept:
            old = plan.tasks[task.id].task
            if (old.agent_id, old.instruction) == (task.agent_id, task.instruction):
                continue
            renamed[task.id] = _free(task.id, taken)
            taken.add(renamed[task.id])
        fresh.append(task)
    return tuple(
        msgspec.structs.replace(
            task,
            id=renamed.get(task.id, task.id),
            depends_on=tuple(renamed.get(need, need) for need in task.depends_on),
        )
        for task in fresh
    )


def _free(task_id: str, taken: set[str]) -> str:
    number = 2
    while f"{task_id}.{number}" in taken:
        number += 1
    return f"{task_id}.{number}"
