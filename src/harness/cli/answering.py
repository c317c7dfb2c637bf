"""``harness approve``, ``steer``, ``cancel`` and ``audit``: what a person says to a run from any process."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import msgspec

from harness import host
from harness.approval import (
    Approve,
    ApproveForSession,
    Decision,
    Edit,
    Reject,
    Seal,
    Steer,
    broken_links,
)
from harness.cli import screen as screens
from harness.cli.choices import Choices
from harness.cli.codes import FAILED, OK
from harness.cli.stored import Found, key_of, open_store, read, status_of
from harness.cli.text import count, safe
from harness.errors import ConfigError, HarnessError
from harness.events import arguments_for_show
from harness.fold import fold
from harness.hitl.banner import described, scope_of
from harness.hitl.base import ApprovalRequest
from harness.hitl.shown import safe_word
from harness.inbox import answer_in
from harness.keys import join_key
from harness.llm.absent import NoModel
from harness.mailbox import Answer
from harness.messages import JSON
from harness.raising import invalid_raise
from harness.records import ApprovalRequested, ApprovalResolved, Audited
from harness.runtime import AgentRuntime
from harness.state import open_questions
from harness.toml_text import read_text

CANCEL_WITHIN_S = 5.0
"""Seconds to wait until the process that drives a run has seen that it was cancelled."""


Saying: TypeAlias = Callable[[AgentRuntime, str], Awaitable[None]]
"""Says something to the run that has a key."""


class Said(NamedTuple):
    """What the flags of ``harness approve`` say; at most one of them is given."""

    yes: bool = False
    session: bool = False
    no: str | None = None
    edit: Path | None = None
    say: str | None = None

    def decision(self) -> Decision | None:
        """Return the decision, or None where no flag is given.

        Raises:
            ConfigError: more than one is, or the edited arguments are no JSON object.
        """
        given = {
            "--yes": self.yes,
            "--session": self.session,
            "--no": self.no is not None,
            "--edit": self.edit is not None,
            "--say": self.say is not None,
        }
        flags = [flag for flag, is_given in given.items() if is_given]
        if len(flags) > 1:
            raise ConfigError(f"one answer at a time: {' and '.join(flags)} do not go together")
        if self.yes:
            return Approve()
        if self.session:
            return ApproveForSession()
        if self.no is not None:
            return Reject(self.no.strip())
        if self.edit is not None:
            return Edit(_arguments_in(self.edit))
        if self.say is not None:
            if not self.say.strip():
                raise ConfigError("--say is empty: write what is to be done instead")
            return Steer(self.say.strip())
        return None


def _arguments_in(path: Path) -> Mapping[str, JSON]:
    text = read_text(path, "edited arguments")
    try:
        value: object = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object: the whole arguments, in braces")
    return cast("Mapping[str, JSON]", value)


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is no JSON")


# -- approve ------------------------------------------------------------------------------------


class Question(NamedTuple):
    """An open question of a run.

    Attributes:
        answer: an answer that waits in the run's mailbox; None where there is none that the run would take.
    """

    request: ApprovalRequested
    agent_id: str
    answer: Answer | None = None


def approve(key: str, approval_id: str | None, said: Said, *, as_json: bool) -> int:
    """Answer a question of a run, or show those that are open."""
    decision = said.decision()
    found, questions = asyncio.run(_questions(key))
    chosen = _chosen(found, questions, approval_id)
    if decision is None:
        _show(found, chosen, as_json=as_json)
        return OK
    if len(chosen) > 1:
        ids = ", ".join(question.request.approval_id for question in chosen)
        raise ConfigError(f"run {found.state.run_id!r} waits for {len(chosen)} answers: say which one is meant ({ids})")
    (question,) = chosen
    _check(question, decision)
    request = question.request
    asyncio.run(_to(found, lambda runtime, key: runtime.answer(key, decision, approval_id=request.approval_id)))
    what = _words_of(decision, question)
    _acknowledge(found, what, {"approval_id": request.approval_id}, as_json=as_json)
    return OK


async def _questions(key: str) -> tuple[Found, list[Question]]:
    """Return the open questions of a run.

    Raises:
        RunNotFound: there is no such run.
        ConfigError: it is over.
    """
    found = await read(key)
    _check_open(found)
    state = found.state
    async with open_store() as store:
        mail = await store.inbox(state.run_id) if store is not None else []
    seal = Seal(host.approval_key)
    questions = [
        Question(request, state.scopes[request.scope].agent_id, answer_in(mail, request, seal))
        for request in open_questions(state)
    ]
    return found, questions


def _check_open(found: Found) -> None:
    if found.state.over is not None:
        raise ConfigError(f"run {found.state.run_id!r} is over: nothing can be said to it any more")


def _chosen(found: Found, questions: list[Question], approval_id: str | None) -> list[Question]:
    chosen = [question for question in questions if approval_id in (None, question.request.approval_id)]
    if chosen:
        return chosen
    if approval_id is None:
        raise ConfigError(f"run {found.state.run_id!r} waits for no answer")
    ids = ", ".join(question.request.approval_id for question in questions) or "none"
    raise ConfigError(f"no question {approval_id!r} is open in run {found.state.run_id!r} (open: {ids})")


def _check(question: Question, decision: Decision) -> None:
    """Refuse an answer that the run would refuse when it takes it."""
    request = question.request
    if question.answer is not None:
        raise ConfigError(f"{request.approval_id} was answered by {question.answer.by}; the run takes that answer")
    if request.expires_at and time.time() > request.expires_at:
        raise ConfigError(f"{request.approval_id} has expired: it counts as a no")
    if isinstance(decision, ApproveForSession) and not request.session:
        raise ConfigError(f"{request.approval_id} cannot be allowed for the session: --yes allows this one call")
    if isinstance(decision, Edit) and request.kind == "in_doubt":
        raise ConfigError("a call in doubt cannot be edited: --yes runs it again, --say TEXT says what came of it")
    if isinstance(decision, Edit) and request.kind == "budget":
        wrong = invalid_raise(request.arguments, msgspec.json.encode(decision.arguments).decode())
        if wrong:
            raise ConfigError(f"the limit cannot be raised to that: {wrong}")


def _show(found: Found, questions: list[Question], *, as_json: bool) -> None:
    """Show questions as the banner does."""
    for question in questions:
        request = question.request
        if as_json:
            screens.print_json(as_plain(request, question.agent_id) | {"answered_by": _by(question)})
            continue
        told = _told(found, question)
        print("\n".join(described(told)))
        if question.answer is None:
            print(safe_word(_how_to_answer(told)))
        else:
            print(safe(f"Answered by {question.answer.by}; the run has not taken the answer yet."))
        print(f"Resume: {safe_word(_resume(found))}", flush=True)


def _by(question: Question) -> str | None:
    return None if question.answer is None else question.answer.by


def as_plain(request: ApprovalRequested, agent_id: str) -> dict[str, object]:
    """Return a question as plain data."""
    return {
        "approval_id": request.approval_id,
        "kind": request.kind,
        "tool": request.tool,
        "args": arguments_for_show(request.arguments),
        "agent_id": agent_id,
        "scope": request.scope,
        "step": request.step,
        "reason": request.reason,
        "session": list(request.session),
        "digest": request.digest,
        "expires_at": request.expires_at,
    }


def _told(found: Found, question: Question) -> ApprovalRequest:
    """Return a question as an approver is asked it."""
    request = question.request
    arguments = arguments_for_show(request.arguments)
    return ApprovalRequest(
        approval_id=request.approval_id,
        tool=request.tool,
        arguments=cast("Mapping[str, JSON]", arguments) if isinstance(arguments, dict) else {"arguments": arguments},
        digest=request.digest,
        run_id=found.state.run_id,
        key=key_of(found.state),
        kind=request.kind,
        agent_id=question.agent_id,
        scope=request.scope,
        step=request.step,
        reason=request.reason,
        session=request.session,
        expires_at=request.expires_at,
    )


def _how_to_answer(request: ApprovalRequest) -> str:
    answers = ["--yes", "--no [REASON]", "--say TEXT"]
    if request.session:
        answers.insert(1, "--session")
    if request.kind != "in_doubt":
        answers.insert(-1, "--edit FILE")
    if request.kind == "budget":
        answers.remove("--say TEXT")
    return f"Answer: harness approve {shlex.quote(request.key)} {request.approval_id} ({' | '.join(answers)})"


def _words_of(decision: Decision, question: Question) -> str:
    if question.request.kind == "budget":
        return _words_on_limit(decision)
    match decision:
        case Approve():
            return "approved once"
        case ApproveForSession():
            request = ApprovalRequest(
                approval_id="", tool="", arguments={}, digest="", run_id="", session=question.request.session
            )
            return f"{scope_of(request)} allowed for this session"
        case Edit():
            return "approved with other arguments"
        case Reject():
            return "rejected"
        case Steer():
            return "answered"


def _words_on_limit(decision: Decision) -> str:
    match decision:
        case Approve() | ApproveForSession():
            return "raised as proposed"
        case Edit():
            return "raised to what was written"
        case Reject() | Steer():
            return "not raised"


# -- steer, cancel ------------------------------------------------------------------------------


def steer(key: str, text: str, agent_id: str, *, as_json: bool) -> int:
    """Tell the agents of a run something before their next model call."""
    if not text.strip():
        raise ConfigError("TEXT is empty: write what the agents are to be told")
    found = asyncio.run(read(key))
    _check_open(found)
    at_work = sorted({scope.agent_id for scope in found.state.scopes.values() if scope.agent_id})
    if agent_id and agent_id not in at_work:
        raise ConfigError(f"no agent {agent_id!r} is at work in this run (at work: {', '.join(at_work) or 'none'})")
    asyncio.run(_to(found, lambda runtime, key: runtime.steer(key, text.strip(), agent_id)))
    _acknowledge(found, "guidance sent", {}, as_json=as_json)
    return OK


def cancel(key: str, reason: str, *, as_json: bool) -> int:
    """End a run for good."""
    found = asyncio.run(read(key))
    _check_open(found)
    if found.scope:
        raise ConfigError(f"{key} names one task: only a whole run is cancelled, {join_key(found.state.run_id)}")
    is_over = asyncio.run(_cancel(found, reason))
    run = safe(key_of(found.state))
    if as_json:
        screens.print_json({"key": key_of(found.state), "cancelled": is_over})
    elif is_over:
        print(f"cancelled: {run}")
    else:
        print(f"{run} is told to stop; the process that drives it has not answered yet")
    return OK


async def _cancel(found: Found, reason: str) -> bool:
    async with _canceller(found) as runtime:
        await runtime.cancel(join_key(found.state.run_id), reason)
    until = time.monotonic() + CANCEL_WITHIN_S
    while time.monotonic() < until:
        async with open_store() as store:
            if store is None:
                break
            state = fold(found.state.run_id, [entry async for entry in store.read(found.state.run_id)])
        if state.over is not None:
            return True
        await asyncio.sleep(0.1)
    return False


def _canceller(found: Found) -> AgentRuntime:
    """Return what ends a run: with its own model, where that has a response to stop at the provider."""
    origin = found.state.started.origin if found.state.started else None
    waits = any(scope.accepted is not None for scope in found.state.scopes.values())
    if waits and origin is not None and origin.kind == "cli":
        from harness.cli.wiring import wire

        try:
            return wire(Choices.of(origin.settings), server_named=False).runtime
        except HarnessError as error:
            said = f"harness: what the provider still writes for this run is left to come to its end: {error}"
            print(safe(said), file=sys.stderr)
    return AgentRuntime(llm=NoModel(), auto_resume=False)


# -- audit --------------------------------------------------------------------------------------


def verify(key: str, *, as_json: bool) -> int:
    """Check the audit chain of a run."""
    found = asyncio.run(read(key))
    records = [entry.record for entry in found.entries]
    links = sum(isinstance(record, Audited) for record in records)
    problems = broken_links(records, Seal(host.approval_key()))
    if not links and any(isinstance(record, ApprovalResolved) for record in records):
        problems = ["somebody has answered in this run, and it has no audit chain: its links were taken out"]
    if as_json:
        screens.print_json({"key": key_of(found.state), "links": links, "problems": problems, "ok": not problems})
        return FAILED if problems else OK
    for problem in problems:
        print(safe(problem))
    if problems:
        print(f"broken: {safe(key_of(found.state))}")
    elif links:
        print(f"intact: {safe(key_of(found.state))}, {count(links, 'link')}")
    else:
        print(f"nothing of {safe(key_of(found.state))} was decided by a person or a rule: it has no audit chain")
    return FAILED if problems else OK


# -- what they have in common -------------------------------------------------------------------


async def _to(found: Found, say: Saying) -> None:
    """Say something to a run, whichever process drives it."""
    async with AgentRuntime(llm=NoModel(), auto_resume=False) as runtime:
        await say(runtime, join_key(found.state.run_id))


def _resume(found: Found) -> str:
    started = found.state.started
    return host.resume_command(started.origin if started else None, key_of(found.state))


def _acknowledge(found: Found, what: str, facts: Mapping[str, object], *, as_json: bool) -> None:
    """Say that a run was told, and who goes on with it."""
    state = found.state
    driven = asyncio.run(status_of(state)) == "running"
    resume = _resume(found)
    if as_json:
        screens.print_json({"key": key_of(state), **facts, "said": what, "driven": driven, "resume": resume})
        return
    of = f" · {facts['approval_id']}" if facts else ""
    print(safe(f"{what}{of}"))
    if driven:
        print("The run is being driven: the process that does so takes it up.")
    else:
        print(f"Resume: {safe_word(resume)}", flush=True)
