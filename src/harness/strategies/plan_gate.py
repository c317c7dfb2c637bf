"""The gate of a plan: where a person is to approve it, nothing of it begins before the yes. Pure.

A yes is bound to the tasks as they stand: a plan that was replaced is asked about anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harness.approval import approval_id, canonical, digest_of, what_is_wrong
from harness.plan import Task
from harness.records import ApprovalRequested, ApprovalResolved, ApprovalVoided, Planned, Record, Replanned
from harness.state import PlanState, RunState, ScopeState
from harness.strategies.base import Ask, RunConfig, Step, fail_run
from harness.strategies.gate import PLAN, expiry


class Held:
    """A plan that may not go on yet.

    Args:
        steps: what to do about it; nothing while somebody is being asked.
        corrected: the planner is to be asked again, since a person has said what is wrong.
    """

    __slots__ = ("corrected", "steps")

    def __init__(self, steps: Sequence[Step] = (), *, corrected: bool = False) -> None:
        self.steps = steps
        self.corrected = corrected


def hold(scope: ScopeState, run: RunState, config: RunConfig, plan: PlanState) -> Held | None:
    """Say whether a plan is held back; None lets it go on."""
    if not config.ask_plan:
        return None
    tasks = _written([task.task for task in plan.tasks.values()])
    request, answer = scope.request, scope.answer
    wanted = _edited_tasks(plan, answer) if answer is not None and answer.decision == "edit" else ()
    is_edited = bool(wanted) and _by_id(wanted) == _by_id([task.task for task in plan.tasks.values()])
    if request is None or (canonical(request.arguments) != tasks and not is_edited):
        return Held([_question(scope, run, config, tasks)])
    if answer is None:
        return Held() if scope.asking else Held([Ask(scope.scope, PLAN, request.approval_id)])
    if wrong := what_is_wrong(
        request, answer, config.seal, _digest(scope, run, request.arguments, _asked(scope, run, scope.asked))
    ):
        return Held([ApprovalVoided(request.approval_id, wrong, scope.step, PLAN, scope.scope)])
    match answer.decision:
        case "approve" | "session":
            return None
        case "edit":
            return None if is_edited else Held([_edited(scope, plan, wanted)])
        case "steer":
            if plan.no_replan:
                return Held([fail_run(run, "plan", "the planner could not write the plan as a human wants it")])
            return Held(corrected=True)
        case "reject" | "expired":
            why = "nobody answered in time" if answer.decision == "expired" else answer.text or "no reason given"
            return Held([fail_run(run, "plan", f"the plan was rejected by a human: {why}")])


def _written(tasks: Sequence[Task]) -> str:
    """Write tasks down as they are asked about."""
    plain = [{name: getattr(task, name) for name in task.__struct_fields__} for task in tasks]
    return msgspec.json.encode({"tasks": plain}, order="sorted").decode()


def _by_id(tasks: Sequence[Task]) -> dict[str, Task]:
    return {task.id: task for task in tasks}


def _begun(plan: PlanState) -> list[Task]:
    """Return the tasks that are done or at work: editing them comes too late."""
    return [task.task for task in plan.tasks.values() if task.status != "waiting"]


def _edited_tasks(plan: PlanState, answer: ApprovalResolved) -> list[Task]:
    """Return what the plan is to be: what was begun as it is, and the rest as a person has edited it."""
    try:
        edited = _by_id(msgspec.json.decode(answer.arguments, type=_Edited).tasks)
    except msgspec.MsgspecError:  # nobody has signed this; it is refused for that
        return []
    return list((edited | _by_id(_begun(plan))).values())


def _asked(scope: ScopeState, run: RunState, number: int) -> str:
    return approval_id(run.run_id, scope.scope, 0, PLAN, number)


def _digest(scope: ScopeState, run: RunState, arguments: str, asked: str) -> str:
    return digest_of(
        run.run_id,
        scope.scope,
        0,
        PLAN,
        tool="plan",
        definition="",
        arguments=arguments,
        workspace="",
        question=asked,
        kind="plan",
        session=(),
    )


def _question(scope: ScopeState, run: RunState, config: RunConfig, tasks: str) -> ApprovalRequested:
    asked = _asked(scope, run, scope.asked + 1)
    return ApprovalRequested(
        asked,
        _digest(scope, run, tasks, asked),
        "plan",
        tasks,
        scope.step,
        PLAN,
        scope.scope,
        "plan",
        "nothing of the plan runs before it is approved",
        (),
        expiry(scope, run, config),
    )


class _Edited(msgspec.Struct):
    tasks: tuple[Task, ...]


def _edited(scope: ScopeState, plan: PlanState, wanted: Sequence[Task]) -> Record:
    """Put an edited plan in force."""
    begun = [task.id for task in _begun(plan)]
    if not begun:
        return Planned(tuple(wanted), plan.rationale, scope.scope)
    rest = tuple(task for task in wanted if task.id not in begun)
    removed = tuple(task_id for task_id in plan.tasks if task_id not in begun)
    return Replanned(
        rest, "", "a human has edited it", plan.replans + 1, plan.rationale, tuple(begun), removed, scope.scope
    )
