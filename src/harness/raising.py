"""Raising a limit of a run that has met it: what a person is asked, and which limits are in force then. Pure.

A raise is an answer in the journal, bound to one question like every other. It holds for its run only, over any number
of processes, and never lowers what the configuration gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import msgspec

from harness.approval import Seal, approval_id, digest_of, what_is_wrong
from harness.budget import MICRO, GuardrailConfig, Reservation, Spent
from harness.records import BUDGET, ApprovalRequested, ApprovalResolved, ApprovalVoided
from harness.state import RunState

Number: TypeAlias = int | float

MOST = 10**12
"""What a limit may be raised to at the most: more is a slip, and no arithmetic is made for it."""


class _Limit(msgspec.Struct, frozen=True):
    """What is to be known of a limit.

    Attributes:
        spent: what the run has used of it.
        needed: what the call at hand needs of it.
        unit: what is proposed where the limit is 0; an int for what is counted in whole numbers.
    """

    spent: Callable[[Spent], Number]
    needed: Callable[[Reservation], Number]
    unit: Number


LIMITS: Mapping[str, _Limit] = {
    "max_total_cost_usd": _Limit(lambda spent: spent.usage.cost_usd, lambda call: call.cost_microusd / MICRO, 1.0),
    "max_wall_time_seconds": _Limit(lambda spent: round(spent.active_s, 1), lambda _: 0, 60.0),
    "max_input_tokens": _Limit(lambda spent: spent.usage.input_tokens, lambda call: call.input_tokens, 10_000),
    "max_output_tokens": _Limit(lambda spent: spent.usage.output_tokens, lambda call: call.output_tokens, 10_000),
    "max_llm_calls": _Limit(lambda spent: spent.llm_calls, lambda _: 1, 10),
    "max_tool_calls": _Limit(lambda spent: spent.tool_calls, lambda _: 1, 10),
}
"""The limits that can be raised, by their names in GuardrailConfig."""


class _Proposal(msgspec.Struct, frozen=True):
    """What a question is about, as its arguments say it.

    Attributes:
        limit: the limit's name.
        now: what it is.
        spent: what the run has used of it.
        raise_to: what a yes makes of it.
    """

    limit: str
    now: Number
    spent: Number
    raise_to: Number


class _Edited(msgspec.Struct, forbid_unknown_fields=True):
    """What a person may write instead; all but the last is there to be read, and must be left as it is."""

    raise_to: Number
    limit: str | None = None
    now: Number | None = None
    spent: Number | None = None


def limit_in(text: str) -> str:
    """Return the name of the limit that a text of ``harness.budget`` is about; empty where none can be raised.

    >>> limit_in("max_llm_calls=5 is reached"), limit_in("the price of the model is unknown (on_unpriced='refuse')")
    ('max_llm_calls', '')
    """
    name = text.partition("=")[0]
    return name if name in LIMITS else ""


def proposed(name: str, now: Number, spent: Number, needed: Number) -> Number:
    """Return what a limit is proposed to be raised to: twice what it is, or as many times as the next call needs.

    >>> proposed("max_llm_calls", 5, 5, 1), proposed("max_input_tokens", 100, 0, 950)
    (10, 1000)
    """
    unit = now or LIMITS[name].unit
    times = max(2 if now else 1, math.ceil((spent + needed) / unit))
    value = unit * times
    return round(value if value > spent else value + unit, 6)


def question(
    run: RunState, limits: GuardrailConfig, limit: str, needed: Reservation, expires_at: float
) -> ApprovalRequested:
    """Write down the question whether a limit is raised.

    Args:
        run: the run.
        limits: the limits in force.
        limit: what ``harness.budget`` says of the one that was met.
        needed: what the call at hand needs.
        expires_at: when it is too late to answer, seconds since the epoch; 0 for never.
    """
    name = limit_in(limit)
    now, spent = getattr(limits, name), LIMITS[name].spent(run.spent)
    raise_to = proposed(name, now, spent, LIMITS[name].needed(needed))
    arguments = msgspec.json.encode(_Proposal(name, now, spent, raise_to)).decode()
    asked = approval_id(run.run_id, "", 0, BUDGET, run.raising.asked + 1)
    return ApprovalRequested(
        asked,
        _digest(run.run_id, arguments, asked),
        "budget",
        arguments,
        run.scopes[""].step,
        BUDGET,
        "",
        "budget",
        limit,
        (),
        expires_at,
    )


def expiry(run: RunState, within_s: float | None) -> float:
    """Say when a question that is asked now is too old to be answered; 0 for never.

    The journal has no clock besides its records: it is taken to be as late as the last reply, or as the last answer and
    what was worked since.
    """
    if within_s is None:
        return 0.0
    raising = run.raising
    worked = raising.since + run.spent.active_s - raising.since_active_s
    return max([worked, *(scope.reply_at for scope in run.scopes.values())]) + within_s


def wrong_with(run_id: str, request: ApprovalRequested, answer: ApprovalResolved, seal: Seal | None) -> str:
    """Say why an answer does not hold for a limit of this run; empty where it does."""
    digest = _digest(run_id, request.arguments, request.approval_id)
    return what_is_wrong(request, answer, seal, digest)


def invalid_raise(asked: str, edited: str) -> str:
    """Say what is wrong with a raise that a person has written instead of the proposed one; empty where it fits.

    >>> asked = '{"limit": "max_llm_calls", "now": 5, "spent": 5, "raise_to": 10}'
    >>> invalid_raise(asked, '{"raise_to": 6}'), invalid_raise(asked, '{"raise_to": 5}')
    ('', 'raise_to must be more than the limit of 5 and the 5 that are spent, not 5')
    """
    try:
        proposal = msgspec.json.decode(asked, type=_Proposal)
        wanted = msgspec.json.decode(edited, type=_Edited)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        return f"it is not an object with a number raise_to: {error}"
    if proposal.limit not in LIMITS:
        return f"the question names no limit that can be raised: {proposal.limit!r}"
    for name in ("limit", "now", "spent"):
        if getattr(wanted, name) not in (None, getattr(proposal, name)):
            return f"only raise_to can be changed, not {name}"
    value = wanted.raise_to
    if isinstance(LIMITS[proposal.limit].unit, int) and not isinstance(value, int):
        return f"raise_to must be a whole number, not {value!r}"
    if not proposal.now < value or not proposal.spent < value:
        least = f"the limit of {proposal.now} and the {proposal.spent} that are spent"
        return f"raise_to must be more than {least}, not {value}"
    if value > MOST:
        return f"raise_to may be {MOST:,} at the most, not {value}; a run without a limit is configured so"
    return ""


def in_force(run: RunState, limits: GuardrailConfig, seal: Seal | None) -> GuardrailConfig:
    """Return the limits with what people have raised in this run; answers that do not hold count for nothing."""
    return _in_force(run.run_id, run.raises, limits, seal) if run.raises else limits


def raised_to(run: RunState, name: str) -> Number:
    """Return what a limit was raised to, for show: whether the answers hold is not looked at; 0 where it was not."""
    found = [_raise(request, answer) for request, answer in run.raises]
    return max((value for limit, value in found if limit == name), default=0)


def overtaken(run: RunState, limits: GuardrailConfig) -> ApprovalVoided | None:
    """Take back an open question that the configuration has answered meanwhile, with a limit that leaves room."""
    request = run.raising.request
    if request is None or run.raising.answer is not None:
        return None
    try:
        asked = msgspec.json.decode(request.arguments, type=_Proposal)
    except msgspec.MsgspecError:
        return None  # not of our making: no answer to it will hold
    if asked.limit not in LIMITS:
        return None
    configured: Number | None = getattr(limits, asked.limit)
    if configured is not None and not configured > asked.now:
        return None
    why = f"the configured limit is {'none' if configured is None else configured} now"
    return ApprovalVoided(request.approval_id, why, request.step, BUDGET)


@lru_cache(maxsize=64)
def _in_force(
    run_id: str,
    raises: tuple[tuple[ApprovalRequested, ApprovalResolved], ...],
    limits: GuardrailConfig,
    seal: Seal | None,
) -> GuardrailConfig:
    # Kept, because it is asked for with every call of a run that was raised, and checks signatures.
    changes: dict[str, Number] = {}
    for request, answer in raises:
        name, value = _raise(request, answer)
        now = changes.get(name, getattr(limits, name)) if name in LIMITS else None
        if now is not None and value > now and not wrong_with(run_id, request, answer, seal):
            changes[name] = value
    return msgspec.structs.replace(limits, **changes) if changes else limits


def _raise(request: ApprovalRequested, answer: ApprovalResolved) -> tuple[str, Number]:
    """Return which limit an answer raises, and to what; ``("", 0)`` where it cannot be read."""
    try:
        proposal = msgspec.json.decode(request.arguments, type=_Proposal)
        if answer.decision == "edit":
            return proposal.limit, msgspec.json.decode(answer.arguments, type=_Edited).raise_to
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return "", 0
    return proposal.limit, proposal.raise_to


def _digest(run_id: str, arguments: str, asked: str) -> str:
    return digest_of(
        run_id,
        "",
        0,
        BUDGET,
        tool="budget",
        definition="",
        arguments=arguments,
        workspace="",
        question=asked,
        kind="budget",
        session=(),
    )
