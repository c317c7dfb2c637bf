"""The inbox: what commands from a run's mailbox make of its journal. Pure, but for the tools' own validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from harness.approval import Seal
from harness.mailbox import Answer, Cancel, Guidance, Mail
from harness.records import (
    ApprovalRequested,
    ApprovalResolved,
    CommandRefused,
    Guided,
    Record,
    RunCancelled,
)
from harness.state import RunState, question_of
from harness.working_memory import TokenCounter

Validate = Callable[[ApprovalRequested, str], str]
"""Says what is wrong with edited arguments; empty where they fit."""


def record_of(mail: Mail, state: RunState, count: TokenCounter, seal: Seal | None, validate: Validate) -> Record | None:
    """Return the record that takes a command, or None where it was taken before.

    Args:
        mail: the command.
        state: the run, as it stands.
        count: estimates tokens.
        seal: checks answers.
        validate: checks edited arguments.
    """
    if mail.id in state.commands:
        return None
    match mail.command:
        case Answer() as answer:
            return _answer(mail, answer, state, count, seal, validate)
        case Guidance() as guidance:
            return _guidance(mail, guidance, state, count)
        case Cancel(reason=reason):
            return RunCancelled(reason, state.steps, msgspec.structs.replace(state.spent), mail.id)


def _answer(
    mail: Mail, answer: Answer, state: RunState, count: TokenCounter, seal: Seal | None, validate: Validate
) -> ApprovalResolved | CommandRefused:
    request = question_of(state, answer.approval_id)
    if request is None:
        return CommandRefused(mail.id, f"no question {answer.approval_id!r} is open in this run: it has its answer")
    resolved = _resolved(mail, answer, request, count)
    wrong = _invalid(mail, request, resolved, seal) or unfit(request, resolved, validate)
    return CommandRefused(mail.id, wrong) if wrong else resolved


def _resolved(mail: Mail, answer: Answer, request: ApprovalRequested, count: TokenCounter) -> ApprovalResolved:
    return ApprovalResolved(
        request.approval_id,
        answer.decision,
        answer.by,
        answer.mac,
        request.step,
        request.index,
        request.scope,
        answer.text,
        answer.arguments,
        count(answer.text),
        mail.id,
    )


def _invalid(mail: Mail, request: ApprovalRequested, answer: ApprovalResolved, seal: Seal | None) -> str:
    if request.expires_at and mail.received_at > request.expires_at:
        return f"the answer to {request.approval_id!r} came after it had expired"
    if seal is None or not seal.holds(request, answer):
        return "the answer is not signed with this installation's key, or was changed"
    return ""


def answer_in(mailbox: Sequence[Mail], request: ApprovalRequested, seal: Seal) -> Answer | None:
    """Return the answer that waits for a question: the first that was received in time and is signed with the key.

    Anything else is refused when the mail is taken, and keeps nobody from answering. Edited arguments are not looked
    at: only the tools can say whether they fit.
    """
    for mail in mailbox:
        if isinstance(answer := mail.command, Answer) and answer.approval_id == request.approval_id:
            resolved = _resolved(mail, answer, request, len)
            wrong = _invalid(mail, request, resolved, seal) or unfit(request, resolved, _not_looked_at)
            if not wrong:
                return answer
    return None


def _not_looked_at(_request: ApprovalRequested, _arguments: str) -> str:
    return ""


def unfit(request: ApprovalRequested, answer: ApprovalResolved, validate: Validate) -> str:
    """Say why an answer cannot be one to this question; empty where it can."""
    if answer.decision == "session" and not request.session:
        return "this call cannot be allowed for the session"
    if answer.decision == "edit":
        return validate(request, answer.arguments)
    return ""


def _guidance(mail: Mail, guidance: Guidance, state: RunState, count: TokenCounter) -> Guided | CommandRefused:
    scopes = [
        path for path, scope in state.scopes.items() if not guidance.agent_id or scope.agent_id == guidance.agent_id
    ]
    if not scopes:
        return CommandRefused(mail.id, f"no agent {guidance.agent_id!r} is at work in this run")
    return Guided(guidance.text, guidance.by, tuple(scopes), count(guidance.text), mail.id)
