"""Plans: which agent does what, and in what order. A plan is a value; its shape is checked when it is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Literal, TypeAlias, get_args

import msgspec

from harness.budget import Limits
from harness.errors import PlanError

OnFailure: TypeAlias = Literal["retry", "skip", "replan", "abort"]
"""What a task's failure, or an answer below the confidence threshold, leads to.

``retry``: the task is tried again, ``max_retries`` times; then what depends on it is skipped.
``skip``: the run goes on without it; what depends on it is told so.
``replan``: the planner replaces what remains, as often as ``max_replan_count`` allows; then as after ``retry``.
``abort``: the run fails. A doubtful answer that nothing more can be done about is used, and marked so.
"""

MAX_TASKS = 500
"""The most tasks a plan may have; a planner is held to ``GuardrailConfig.max_plan_tasks`` besides."""

MAX_ID_CHARS = 64


class Task(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One piece of work for one agent.

    Attributes:
        id: names it within its plan.
        agent_id: the agent that does it.
        instruction: what to do; the results of what it depends on are added.
        depends_on: ids of the tasks that must be done before it starts.
        on_failure: what its failure leads to; see ``OnFailure``.
        max_retries: attempts after the first, with ``on_failure="retry"``.
        limits: what all its attempts may use, with all work that is delegated for it; None limits it no further than
            the run is.

    >>> Task("t1", "reader", "Read the log.").on_failure
    'replan'
    """

    id: str
    agent_id: str
    instruction: str
    depends_on: tuple[str, ...] = ()
    on_failure: OnFailure = "replan"
    max_retries: int = 1
    limits: Limits | None = None


class Plan(msgspec.Struct, frozen=True, gc=False):
    """Tasks that depend on each other without a cycle.

    Attributes:
        tasks: the tasks, in any order.
        rationale: why it is done this way.

    Raises:
        PlanError: ids are empty, double or unknown, tasks depend on each other in a circle, there are none or too
            many. All of it at once, in ``problems``.

    >>> Plan([Task("t1", "reader", "Read it."), Task("t2", "writer", "Sum it up.", depends_on=("t1",))]).tasks[1].id
    't2'
    """

    tasks: Sequence[Task]
    rationale: str = ""

    def __post_init__(self) -> None:
        wrong = [f"tasks must be Task objects, not {task!r}" for task in self.tasks if not isinstance(task, Task)]  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
        wrong += [
            f"depends_on of task {task.id!r} must be a list of ids, not the text {task.depends_on!r}"
            for task in self.tasks
            if not wrong and isinstance(task.depends_on, str)  # pyright: ignore[reportUnnecessaryIsInstance] - as above
        ]
        if wrong:
            raise PlanError(wrong)
        # People write lists; whatever is a sequence of names is taken.
        tasks = tuple(msgspec.structs.replace(task, depends_on=tuple(task.depends_on)) for task in self.tasks)
        msgspec.structs.force_setattr(self, "tasks", tasks)
        if found := problems(tasks):
            raise PlanError(found)


def problems(tasks: Sequence[Task], *, known: Iterable[str] = ()) -> tuple[str, ...]:
    """Say everything that is wrong with the shape of a plan.

    Args:
        tasks: the tasks.
        known: ids of earlier tasks they may depend on as well.
    """
    if not tasks:
        return ("a plan needs at least one task",)
    if len(tasks) > MAX_TASKS:
        return (f"a plan may have {MAX_TASKS} tasks at most, this one has {len(tasks)}",)
    found: list[str] = []
    ids = {task.id for task in tasks}
    seen: set[str] = set()
    valid = ids.union(known)
    for task in tasks:
        found += _problems_of(task, valid)
        if task.id in seen:
            found.append(f"the id {task.id!r} is used twice")
        seen.add(task.id)
    if not found and (circle := _circle(tasks, ids)):
        found.append(f"the tasks {' -> '.join(circle)} depend on each other in a circle")
    return tuple(found)


def _problems_of(task: Task, valid: set[str]) -> Iterable[str]:
    for name in ("id", "agent_id", "instruction"):
        if not isinstance(getattr(task, name), str):
            yield f"{name} of task {task.id!r} must be a text, not {getattr(task, name)!r}"
            return
    if not task.id or len(task.id) > MAX_ID_CHARS or not task.id.isprintable():
        yield f"a task's id must be 1 to {MAX_ID_CHARS} printable characters, not {task.id[: MAX_ID_CHARS + 1]!r}"
    if not task.instruction.strip():
        yield f"task {task.id!r} has no instruction"
    if task.on_failure not in get_args(OnFailure):
        yield f"on_failure of task {task.id!r} must be one of {', '.join(get_args(OnFailure))}, not {task.on_failure!r}"
    if not isinstance(task.max_retries, int) or task.max_retries < 0:  # pyright: ignore[reportUnnecessaryIsInstance] - callers may be untyped
        yield f"max_retries of task {task.id!r} must be a whole number of 0 or more, not {task.max_retries!r}"
    if task.limits is not None and type(task.limits) is not Limits:
        yield f"limits of task {task.id!r} must be Limits(...), not {type(task.limits).__name__}"
    for need in task.depends_on:
        if need == task.id:
            yield f"task {task.id!r} depends on itself"
        elif need not in valid:
            yield f"task {task.id!r} depends on {need!r}, and there is no such task"


def _circle(tasks: Sequence[Task], ids: set[str]) -> list[str]:
    """Return the ids of tasks that depend on each other in a circle, or an empty list."""
    sorter = TopologicalSorter({task.id: [need for need in task.depends_on if need in ids] for task in tasks})
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
