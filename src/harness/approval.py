"""Approvals: what is asked, what can be answered, and the seal that binds an answer to one exact call. Pure.

A request's digest covers everything that decides what would happen: run, place, tool, its definition, the arguments,
the folder it works in. An answer is sealed over that digest with a key that is kept outside of the store, so that
whoever can write to the store alone can neither make up an answer nor move one to another call.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from harness.errors import ConfigError
from harness.messages import JSON
from harness.records import (
    ApprovalKind,
    ApprovalRequested,
    ApprovalResolved,
    ApprovalVoided,
    Audited,
    DecisionName,
    Effect,
    Record,
    ToolFinished,
    encode,
)


class Approve(msgspec.Struct, frozen=True, tag=True):
    """Run this one call.

    >>> Approve()
    Approve()
    """


class ApproveForSession(msgspec.Struct, frozen=True, tag=True):
    """Run this call, and for the rest of the run every call of the same scope.

    >>> ApproveForSession()
    ApproveForSession()
    """


class Edit(msgspec.Struct, frozen=True, tag=True):
    """Run this call with other arguments; they are validated and judged like the model's own.

    >>> Edit({"to": "ann"}).arguments
    {'to': 'ann'}
    """

    arguments: Mapping[str, JSON]


class Reject(msgspec.Struct, frozen=True, tag=True):
    """Do not run it; the model is told the reason.

    >>> Reject("not on a Friday").reason
    'not on a Friday'
    """

    reason: str = ""


class Steer(msgspec.Struct, frozen=True, tag=True):
    """Do not run it; the model is told what to do instead.

    >>> Steer("Use the staging database.").text
    'Use the staging database.'
    """

    text: str


Decision: TypeAlias = Approve | ApproveForSession | Edit | Reject | Steer
"""A person's answer. "Approved, but with a correction" cannot be expressed: it would be neither."""


class Judged(msgspec.Struct, frozen=True):
    """What the gate says of a call.

    Attributes:
        action: ``forbid``, ``ask`` or ``allow``.
        reason: why, in a sentence.
        rule: the rule that decided.
        session: what "allow for this session" would cover; empty where that is not offered.
        used: the rules that allow it, each counted as used once; ``rule`` where it names none.
    """

    action: Literal["forbid", "ask", "allow"]
    reason: str = ""
    rule: str = ""
    session: tuple[str, ...] = ()
    used: tuple[str, ...] = ()


class GatedCall(msgspec.Struct, frozen=True):
    """What a gate may look at.

    Attributes:
        tool: the tool's name.
        arguments: its arguments, JSON text that fits its schema.
        effect: what running it twice would mean.
        agent_id: who calls it.
        at: when the model asked for it, seconds since the epoch.
        cost_microusd: what the run has spent so far.
        uses: calls that each rule has allowed so far, by rule.
        tainted: whether something untrusted has reached whoever calls it; None where that is not known.
        raised_usd: what a person has raised the run's budget to; 0 where nobody has.
    """

    tool: str
    arguments: str
    effect: Effect
    agent_id: str
    at: float = 0.0
    cost_microusd: int = 0
    uses: Mapping[str, int] = {}
    tainted: bool | None = None
    raised_usd: float = 0.0


Gate: TypeAlias = Callable[[GatedCall], Judged]
"""Pure: decides from the call and its own rules."""


def canonical(arguments: str) -> str:
    """Write arguments in one way: members sorted, no white space. Text that is no JSON stays as it is.

    >>> canonical('{"b": 1, "a": 2}')
    '{"a":2,"b":1}'
    """
    try:
        return msgspec.json.encode(msgspec.json.decode(arguments or "{}"), order="sorted").decode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return arguments


def digest_of(
    run_id: str,
    scope: str,
    step: int,
    index: int,
    *,
    tool: str,
    definition: str,
    arguments: str,
    workspace: str,
    question: str,
    kind: ApprovalKind,
    session: Sequence[str],
) -> str:
    """Digest everything that decides what a call would do, and what is asked about it.

    Args:
        run_id: the run.
        scope: the scope of the agent that asks for it.
        step: its step.
        index: the call's position in it.
        tool: the tool's name.
        definition: a digest of the tool's definition.
        arguments: its arguments, JSON text.
        workspace: the folder the tool says it works in.
        question: the question's id: an answer to an earlier one about the same call does not hold for it.
        kind: what is asked about it.
        session: what "allow for this session" would cover.
    """
    call = [run_id, scope, step, index, tool, definition, canonical(arguments), workspace]
    bound = [*call, question, kind, list(session)]
    return hashlib.sha256(msgspec.json.encode(bound)).hexdigest()


def approval_id(run_id: str, scope: str, step: int, index: int, number: int) -> str:
    """Return the id of a question: the same in every process, another one when it is asked anew."""
    name = msgspec.json.encode(["approval", run_id, scope, step, index, number])
    return hashlib.sha256(name).hexdigest()[:8]


class Seal:
    """Signs answers and checks signatures with a key.

    Args:
        key: at least 16 bytes that are not in the store, or what returns them when they are first needed.

    >>> seal = Seal(b"0" * 32)
    >>> seal.sign("digest", "approve", by="ann", text="", arguments="", expires_at=0.0)[:8]
    '80b78d18'
    """

    __slots__ = ("_given", "_known")

    def __init__(self, key: bytes | Callable[[], bytes]) -> None:
        self._given = key
        self._known: bytes | None = None

    @property
    def _key(self) -> bytes:
        if self._known is None:
            self._known = self._given if isinstance(self._given, bytes) else self._given()
        return self._known

    def sign(
        self, digest: str, decision: DecisionName, *, by: str, text: str, arguments: str, expires_at: float
    ) -> str:
        """Return the signature of an answer to the request with this digest."""
        signed = msgspec.json.encode(["answer", digest, decision, by, text, arguments, expires_at])
        return hmac.new(self._key, signed, hashlib.sha256).hexdigest()

    def mac(self, text: bytes) -> str:
        """Return the signature of a text."""
        return hmac.new(self._key, b"audit\0" + text, hashlib.sha256).hexdigest()

    def holds(self, request: ApprovalRequested, answer: ApprovalResolved) -> bool:
        """Say whether an answer was given, by somebody who has the key, to exactly this request."""
        expected = self.sign(
            request.digest,
            answer.decision,
            by=answer.by,
            text=answer.text,
            arguments=answer.arguments,
            expires_at=request.expires_at,
        )
        return _same(expected, answer.mac)


def _same(ours: str, theirs: str) -> bool:
    return hmac.compare_digest(ours.encode(), theirs.encode("utf-8", "replace"))  # theirs may be any text


def what_is_wrong(request: ApprovalRequested, answer: ApprovalResolved, seal: Seal | None, digest: str) -> str:
    """Say why an answer does not hold for what would happen now; empty where it does.

    Args:
        request: the question.
        answer: the answer.
        seal: checks signatures; without one no answer holds.
        digest: of what would happen now.
    """
    if answer.approval_id != request.approval_id:
        return "the answer is to another question"
    if digest != request.digest:
        return "the call, its tool or the folder it works in is not the one that was asked about"
    if seal is None or not seal.holds(request, answer):
        return "the answer is not signed with this installation's key, or was changed"
    return ""


AUDITED: frozenset[type[Record]] = frozenset({ApprovalResolved, ApprovalVoided, ToolFinished})
"""What has a link in the audit chain, where anything is gated: every decision, and every effect."""


def audited(record: Record) -> str:
    """Digest a record for the audit chain."""
    return hashlib.sha256(encode([record])).hexdigest()


def broken_links(records: Sequence[Record], seal: Seal) -> list[str]:
    """Say where the audit chain of a journal is broken: a record was changed, added or left out.

    The records must be those of one run, from the first. What was cut off at the end cannot be seen.
    """
    found: list[str] = []
    head, before = "", None
    for seq, record in enumerate(records, 1):
        if isinstance(record, Audited):
            what = audited(before) if before is not None and type(before) in AUDITED else ""
            if record.what != what:
                found.append(f"record {seq} vouches for another record than the one before it")
            if not _same(seal.mac(f"{head}{record.what}".encode()), record.mac):
                found.append(f"record {seq} is not signed with this key, or the chain before it was changed")
            head = record.mac
        elif before is not None and head and type(before) in AUDITED and not isinstance(before, Audited):
            found.append(f"record {seq - 1} ({type(before).__name__}) has no link in the chain")
        before = record
    if before is not None and head and type(before) in AUDITED:
        found.append(f"record {len(records)} ({type(before).__name__}) has no link in the chain")
    return found


def name_of(decision: Decision) -> tuple[DecisionName, str, str]:
    """Take a decision apart: its name, its text and its arguments as JSON.

    Raises:
        ConfigError: the edited arguments cannot be written as JSON.
    """
    match decision:
        case Approve():
            return "approve", "", ""
        case ApproveForSession():
            return "session", "", ""
        case Edit(arguments=arguments):
            return "edit", "", _as_json(arguments)
        case Reject(reason=reason):
            return "reject", reason, ""
        case Steer(text=text):
            return "steer", text, ""


def _as_json(arguments: Mapping[str, JSON]) -> str:
    """Write edited arguments down. What JSON cannot say is never replaced: the answer is signed as it was given."""
    try:
        json.dumps(msgspec.to_builtins(arguments), allow_nan=False)  # msgspec would write null for infinity
        return msgspec.json.encode(arguments, order="sorted").decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the edited arguments cannot be written as JSON: {error}") from None
