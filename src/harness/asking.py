"""Asking: a question to whoever is here, and what makes an answer of what they say."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import cast

import msgspec

from harness.approval import Decision, Seal, name_of
from harness.errors import PlanError
from harness.hitl.base import ApprovalRequest, Approver, one_question
from harness.keys import join_key
from harness.messages import JSON
from harness.perform import Workbench, described, validated, writable
from harness.plan import Plan, Task
from harness.raising import invalid_raise
from harness.records import ApprovalRequested, ApprovalResolved, DecisionName
from harness.state import ScopeState
from harness.tools.base import InvalidArguments

MAX_UNFIT_ANSWERS = 3
"""Answers to one question that cannot be used before nobody is said to be here."""

logger = logging.getLogger("harness")


async def ask_person(
    bench: Workbench, scope: ScopeState, request: ApprovalRequested, approver: Approver | None, seal: Seal
) -> ApprovalResolved | None:
    """Have a question answered by whoever is here; None where nobody answers."""
    problem = ""
    for _ in range(MAX_UNFIT_ANSWERS):
        limit = asyncio.timeout(request.expires_at - time.time() if request.expires_at else None)
        if 0 < request.expires_at <= time.time():
            return _signed(bench, request, seal, "expired", "time")
        if approver is None:
            return None
        with one_question():
            said = await _asked(bench, approver, _told(bench, scope, request, problem), limit)
        if limit.expired():
            return _signed(bench, request, seal, "expired", "time")
        if said is None:
            return None
        name, text, arguments, by = said
        problem = _problem(bench, request, name, arguments)
        if not problem:
            return _signed(bench, request, seal, name, by, text, arguments)
    logger.warning("run %r: none of %d answers to %s fits: %s", bench.run_id, MAX_UNFIT_ANSWERS, request.tool, problem)
    return None


async def _asked(
    bench: Workbench, approver: Approver, told: ApprovalRequest, limit: asyncio.Timeout
) -> tuple[DecisionName, str, str, str] | None:
    """Ask an approver, which may be anybody's, and see who has answered; what is no decision is no answer."""
    try:
        async with limit:
            decision = await approver.decide(told)
        by = approver.name
        if decision is None:
            return None
        if not isinstance(decision, Decision):  # pyright: ignore[reportUnnecessaryIsInstance] - anybody's object
            raise TypeError(f"a decision was expected, not {type(decision).__name__}")
        name, text, arguments = name_of(decision)
        if type(text) is not str:
            raise TypeError(f"the text of a {type(decision).__name__} must be a string, not {type(text).__name__}")
    except Exception as error:
        if not limit.expired():
            logger.warning("run %r: %s has not answered: %s", bench.run_id, approver.name, described(error))
        return None
    return name, text, arguments, by


def _problem(bench: Workbench, request: ApprovalRequested, name: DecisionName, arguments: str) -> str:
    if name == "session" and not request.session:
        return "this call cannot be allowed for the session"
    return invalid_edit(bench, request, arguments) if name == "edit" else ""


def invalid_edit(bench: Workbench, request: ApprovalRequested, arguments: str) -> str:
    """Say what is wrong with arguments, a plan or a raise that a person has edited; empty where they fit."""
    if request.kind == "in_doubt":
        return "a call in doubt cannot be edited: say yes to run it again, no, or what came of it"
    if request.kind == "budget":
        wrong = invalid_raise(request.arguments, arguments)
        return f"what was edited does not fit: {wrong}" if wrong else ""
    try:
        if request.kind == "plan":
            tasks = Plan(msgspec.json.decode(arguments, type=_EditedPlan).tasks).tasks
            if unknown := {task.agent_id for task in tasks} - set(bench.config.team):
                raise PlanError([f"there is no agent {agent_id!r}" for agent_id in sorted(unknown)])
        else:
            validated(bench, request.tool, arguments)
    except (InvalidArguments, PlanError, msgspec.MsgspecError) as error:
        return f"what was edited does not fit: {error}"
    return ""


class _EditedPlan(msgspec.Struct):
    tasks: tuple[Task, ...]


def _signed(
    bench: Workbench,
    request: ApprovalRequested,
    seal: Seal,
    decision: DecisionName,
    by: str,
    text: str = "",
    arguments: str = "",
) -> ApprovalResolved:
    text, by = writable(text), writable(by)
    mac = seal.sign(request.digest, decision, by=by, text=text, arguments=arguments, expires_at=request.expires_at)
    return ApprovalResolved(
        request.approval_id,
        decision,
        by,
        mac,
        request.step,
        request.index,
        request.scope,
        text,
        arguments,
        bench.config.count(text),
    )


def _told(bench: Workbench, scope: ScopeState, request: ApprovalRequested, problem: str) -> ApprovalRequest:
    agent_id = "" if scope.place.task_id or scope.place.parent is not None else scope.agent_id
    return ApprovalRequest(
        approval_id=request.approval_id,
        tool=request.tool,
        arguments=cast("dict[str, JSON]", msgspec.json.decode(request.arguments or "{}")),
        digest=request.digest,
        run_id=bench.run_id,
        key=join_key(bench.run_id, agent_id),
        kind=request.kind,
        agent_id=scope.agent_id,
        scope=request.scope,
        step=request.step,
        reason=problem or request.reason,
        session=request.session,
        expires_at=request.expires_at,
    )
