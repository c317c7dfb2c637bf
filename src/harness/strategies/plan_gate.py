"""The gate of a plan: where a person is to approve it, nothing of it begins before the yes. Pure.

A yes is bound to the tasks as they stand: a plan that was replaced is asked about anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harness.approval import approval_id, canonical, digest_of
from harness.plan import Task
from harness.records import ApprovalRequested, ApprovalVoided, Planned, Record
from harness.state import PlanState, RunState, ScopeState
from harness.strategies.base import Ask, RunConfig, Step, fail_run
from harness.strategies.gate import PLAN, what_is_wrong


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
    tasks = _written(plan)
    request, answer = scope.request, scope.answer
    if request is None or (canonical(request.arguments) != tasks and not _is_edited(scope, tasks)):
        return Held([_question(scope, run, config, tasks)])
    if answer is None:
        return Held() if scope.asking else Held([Ask(scope.scope, PLAN, request.approval_id)])
    if wrong := what_is_wrong(
        request, answer, config, _digest(scope, run, request.arguments, _asked(scope, run, scope.asked))
    ):
        return Held([ApprovalVoided(request.approval_id, wrong, scope.step, PLAN, scope.scope)])
    match answer.decision:
        case "approve" | "session":
            return None
        case "edit":
            return None if canonical(answer.arguments) == tasks else Held([_edited(scope, plan, answer.arguments)])
        case "steer":
            return Held(corrected=True)
        case "reject" | "expired":
            why = "nobody answered in time" if answer.decision == "expired" else answer.text or "no reason given"
            return Held([fail_run(run, "plan", f"the plan was rejected by a human: {why}")])


def _written(plan: PlanState) -> str:
    """Write the tasks of a plan down as they are asked about."""
    tasks = [
        {name: getattr(task.task, name) for name in task.task.__struct_fields__} for task in plan.tasks.values()
    ]  # fmt: skip
    return msgspec.json.encode({"tasks": tasks}, order="sorted").decode()


def _is_edited(scope: ScopeState, tasks: str) -> bool:
    answer = scope.answer
    return answer is not None and answer.decision == "edit" and canonical(answer.arguments) == tasks


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
    expires_at = 0.0 if config.answer_within_s is None else scope.reply_at + config.answer_within_s
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
        expires_at,
    )


class _Edited(msgspec.Struct):
    tasks: tuple[Task, ...]


def _edited(scope: ScopeState, plan: PlanState, arguments: str) -> Record:
    """Put an edited plan in force. What is done or at work is none of its business any more, so only a new plan is."""
    return Planned(msgspec.json.decode(arguments, type=_Edited).tasks, plan.rationale, scope.scope)
