"""The gate: whether a call may run. Asked of every call that is about to start, in every process that starts it. Pure.

may it run? -> by the rules           -> it starts
            -> they forbid it         -> the model is told, it never runs
            -> a person must say      -> ApprovalRequested -> Ask -> ApprovalResolved -> (checked again) -> it starts
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from harness.approval import GatedCall, approval_id, canonical, digest_of, what_is_wrong
from harness.records import ApprovalKind, ApprovalRequested, ApprovalResolved, ApprovalVoided, ToolFinished
from harness.state import CallState, RunState, ScopeState
from harness.strategies.base import Ask, RunConfig, limits_of
from harness.tools.base import ToolSpec

MAX_ASKED = 5
"""How often a call is asked about whose edited arguments are forbidden each time, before it counts as rejected."""

PLAN = -1
"""Stands for the position of a call where the question is about a plan."""


class Passed:
    """A call may start.

    Args:
        approval_id: the question whose answer allows it; empty where rules do.
        rules: the rules that allow it.
    """

    __slots__ = ("approval_id", "rules")

    def __init__(self, approval_id: str = "", rules: tuple[str, ...] = ()) -> None:
        self.approval_id = approval_id
        self.rules = rules


FREE = Passed()
"""What nothing holds back."""

Outcome = Passed | ToolFinished | ApprovalRequested | ApprovalVoided | Ask | None
"""What the gate says; None waits for an answer that somebody is being asked for."""


def gate(
    scope: ScopeState, run: RunState, config: RunConfig, index: int, spec: ToolSpec, uses: Mapping[str, int]
) -> Outcome:
    """Say whether a call may start now.

    Args:
        scope: the scope.
        run: the run.
        config: the rules.
        index: the call's position.
        spec: its tool.
        uses: calls that each rule has allowed, those of the same reply included.
    """
    call = scope.calls[index]
    if call.answer is not None and call.request is not None:
        return _answered(scope, run, config, index, spec)
    if call.request is not None:
        return None if call.asking else Ask(scope.scope, index, call.request.approval_id)
    if config.gate is None:
        return Passed()
    judged = config.gate(_seen(scope, run, config, spec, call.call.arguments, uses))
    if judged.action == "allow":
        return Passed(rules=judged.used)
    if judged.action == "forbid":
        return refusal(scope, config, index, f"Tool rejected by policy: {judged.reason or judged.rule}")
    if allowed := _allowed_for_session(run, config, spec, judged.session):
        return Passed(allowed)
    return question(scope, run, config, index, spec, reason=judged.reason, session=judged.session)


def _seen(
    scope: ScopeState, run: RunState, config: RunConfig, spec: ToolSpec, arguments: str, uses: Mapping[str, int]
) -> GatedCall:
    """Return what the gate may look at."""
    return GatedCall(
        spec.name,
        arguments,
        spec.effect,
        scope.agent_id,
        scope.reply_at,
        run.spent.usage.cost_microusd,
        uses,
        scope.tainted or (None if run.taint_unknown else False),
        _raised_usd(run, config) if run.raises else 0.0,
    )


def _raised_usd(run: RunState, config: RunConfig) -> float:
    """Return the limit on money where people have raised it; answers that do not hold count for nothing."""
    dollars = limits_of(run, config).max_total_cost_usd
    return dollars if dollars is not None and dollars != config.limits.max_total_cost_usd else 0.0


def in_doubt(scope: ScopeState, run: RunState, config: RunConfig, index: int, spec: ToolSpec) -> Outcome:
    """Say what becomes of a call that was started, may have had its effect, and must not have it twice.

    Yes runs it again; guidance says what came of it; no leaves the model with an unknown outcome.
    """
    call = scope.calls[index]
    request, answer = call.request, call.answer
    if request is None or request.kind != "in_doubt":
        reason = f"it was started at {_when(call)} and interrupted; it may or may not have had its effect"
        return question(scope, run, config, index, spec, reason=reason, kind="in_doubt")
    if answer is None:
        return None if call.asking else Ask(scope.scope, index, request.approval_id)
    if wrong := _what_is_wrong(scope, run, config, index, spec, request, answer):
        return ApprovalVoided(request.approval_id, wrong, scope.step, index, scope.scope)
    if answer.decision in ("approve", "session"):
        return Passed(request.approval_id)
    if answer.decision == "steer":
        text = f"{spec.name} was interrupted; a human says what came of it: {answer.text}"
        tokens = config.count(text)
        return ToolFinished(scope.step, index, spec.name, "reconciled", text, 0.0, scope.scope, tokens=tokens)
    return unknown(scope, config, index)


def unknown(scope: ScopeState, config: RunConfig, index: int) -> ToolFinished:
    """Tell the model that a call's outcome cannot be known."""
    call = scope.calls[index]
    text = unknown_outcome(call)
    tokens = config.count(text)
    return ToolFinished(scope.step, index, call.call.name, "unknown", text, 0.0, scope.scope, tokens=tokens)


def unknown_outcome(call: CallState) -> str:
    """Say that a call was started and what came of it is not known."""
    return (
        f"{call.call.name} was started at {_when(call)} and its outcome is unknown: it was interrupted and may or may "
        "not have had its effect. It was not run again. Find out what happened before you call it again."
    )


def _when(call: CallState) -> str:
    return datetime.datetime.fromtimestamp(call.started_at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def question(
    scope: ScopeState,
    run: RunState,
    config: RunConfig,
    index: int,
    spec: ToolSpec,
    *,
    reason: str,
    session: tuple[str, ...] = (),
    kind: ApprovalKind = "tool",
) -> ApprovalRequested:
    """Write down a question about a call."""
    call = scope.calls[index]
    asked = approval_id(run.run_id, scope.scope, scope.step, index, call.asked + 1)
    arguments = _asked_about(call, kind)
    return ApprovalRequested(
        asked,
        _digest(scope, run, config, index, spec, arguments, asked, kind, session),
        spec.name,
        arguments,
        scope.step,
        index,
        scope.scope,
        kind,
        reason,
        session,
        expiry(scope, run, config),
    )


def _asked_about(call: CallState, kind: ApprovalKind) -> str:
    """Return the arguments a question is about: the model's, or those a call in doubt was started with."""
    return call.arguments if kind == "in_doubt" else call.call.arguments


def expiry(scope: ScopeState, run: RunState, config: RunConfig) -> float:
    """Say when a question that is asked now is too old to be answered; 0 for never."""
    # A question of a resumed run may be new, whenever the model's reply was.
    return 0.0 if config.answer_within_s is None else max(scope.reply_at, run.driven_since) + config.answer_within_s


def _digest(
    scope: ScopeState,
    run: RunState,
    config: RunConfig,
    index: int,
    spec: ToolSpec,
    arguments: str,
    asked: str,
    kind: ApprovalKind,
    session: Sequence[str],
) -> str:
    return digest_of(
        run.run_id,
        scope.scope,
        scope.step,
        index,
        tool=spec.name,
        definition=config.definitions.get(spec.name, ""),
        arguments=arguments,
        workspace=spec.workspace,
        question=asked,
        kind=kind,
        session=session,
    )


def _what_is_wrong(
    scope: ScopeState,
    run: RunState,
    config: RunConfig,
    index: int,
    spec: ToolSpec,
    request: ApprovalRequested,
    answer: ApprovalResolved,
) -> str:
    """Say why an answer does not hold for the call as it would run now; empty where it does."""
    call = scope.calls[index]
    arguments = _asked_about(call, request.kind)
    asked = approval_id(run.run_id, scope.scope, scope.step, index, call.asked)
    shown = request.approval_id, request.tool, canonical(request.arguments)
    if shown != (asked, spec.name, canonical(arguments)):
        return "what was shown is not the call that would run"
    digest = _digest(scope, run, config, index, spec, arguments, asked, request.kind, request.session)
    return what_is_wrong(request, answer, config.seal, digest)


def _answered(scope: ScopeState, run: RunState, config: RunConfig, index: int, spec: ToolSpec) -> Outcome:
    call = scope.calls[index]
    request, answer = call.request, call.answer
    assert request is not None  # both are there
    assert answer is not None
    if wrong := _what_is_wrong(scope, run, config, index, spec, request, answer):
        return ApprovalVoided(request.approval_id, wrong, scope.step, index, scope.scope)
    match answer.decision:
        case "approve" | "session":
            return Passed(request.approval_id)
        case "edit":
            return _edited(scope, run, config, index, spec, request, answer)
        case "reject":
            return refusal(scope, config, index, f"Tool rejected by human: {answer.text or 'no reason given'}")
        case "steer":
            return refusal(scope, config, index, "Tool not run: a human has given guidance instead")
        case "expired":
            return refusal(scope, config, index, "Tool rejected by human: nobody answered in time")


def _edited(
    scope: ScopeState,
    run: RunState,
    config: RunConfig,
    index: int,
    spec: ToolSpec,
    request: ApprovalRequested,
    answer: ApprovalResolved,
) -> Passed | ApprovalVoided | ToolFinished:
    """Judge edited arguments anew: a person may say yes where the rules ask, not where they forbid."""
    if config.gate is not None:
        judged = config.gate(_seen(scope, run, config, spec, answer.arguments, run.uses))
        if judged.action == "forbid":
            reason = f"the edited arguments are forbidden: {judged.reason or judged.rule}"
            if scope.calls[index].asked >= MAX_ASKED:
                return refusal(scope, config, index, f"Tool rejected by policy: {reason}")
            return ApprovalVoided(request.approval_id, reason, scope.step, index, scope.scope)
    return Passed(request.approval_id)


def _allowed_for_session(run: RunState, config: RunConfig, spec: ToolSpec, scopes: tuple[str, ...]) -> str:
    """Return the question that allowed all of this for the rest of the run; empty where none did."""
    found = ""
    for scope in scopes:
        by = run.allowed.get(scope)
        if by is None or not _holds_for_session(run, config, spec, scope, *by):
            return ""
        found = found or by[0].approval_id
    return found


def _holds_for_session(
    run: RunState, config: RunConfig, spec: ToolSpec, scope: str, request: ApprovalRequested, answer: ApprovalResolved
) -> bool:
    """Say whether a yes for the session was given in this run, to this tool as it is now, and for this."""
    if scope not in request.session or answer.decision != "session":
        return False
    digest = digest_of(
        run.run_id,
        request.scope,
        request.step,
        request.index,
        tool=spec.name,
        definition=config.definitions.get(spec.name, ""),
        arguments=request.arguments,
        workspace=spec.workspace,
        question=request.approval_id,
        kind=request.kind,
        session=request.session,
    )
    return not what_is_wrong(request, answer, config.seal, digest)


def refusal(scope: ScopeState, config: RunConfig, index: int, text: str) -> ToolFinished:
    """Tell the model that a call was not run."""
    name = scope.calls[index].call.name
    tokens = config.count(text)
    return ToolFinished(scope.step, index, name, "rejected", text, 0.0, scope.scope, tokens=tokens)
