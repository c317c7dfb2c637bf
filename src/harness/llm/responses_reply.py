"""A reply of the Responses protocol: its events off the wire, and the whole response they end with. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from harness.budget import Usage
from harness.errors import LLMError, LLMRefused, MalformedResponse
from harness.llm.base import LLMRequest, LLMResponse, ReasoningDelta, TextDelta
from harness.llm.prices import whole
from harness.llm.replies import clean, finish_reason, read_answer
from harness.llm.responses_request import NEXT_ID, OURS
from harness.messages import Part, Reasoning, Text, ToolCall

RUNNING = frozenset({"queued", "in_progress"})
"""What a response's status is before it has come to its end."""

_ENDS = {
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
    "response.cancelled": "cancelled",
}
_TEXT = frozenset({"response.output_text.delta", "response.refusal.delta"})
_THOUGHT = frozenset({"response.reasoning_summary_text.delta", "response.reasoning_text.delta"})
_READ = frozenset(
    {
        "response.created", "response.queued", "response.in_progress", "response.reasoning_summary_part.added",
        "response.output_item.done", "error", *_TEXT, *_THOUGHT, *_ENDS,
    }
)  # fmt: skip
"""The types of events that are looked into. There are many others, and there will be more."""

_TRANSIENT = frozenset({"server_error", "rate_limit_exceeded", "vector_store_timeout"})
_REFUSED = frozenset(
    {"content_filter", "bio_policy", "misalignment_policy_violation", "image_content_policy_violation"}
)


class _Words(msgspec.Struct):
    type: str = ""
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct):
    type: str = ""
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    content: list[_Words] | None = None
    summary: list[_Words] | None = None


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Error(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None
    type: str | None = None


class Answer(msgspec.Struct):
    """A response as the provider keeps it; everything in it may be missing."""

    id: str | None = None
    model: str | None = None
    status: str | None = None
    output: list[dict[str, object]] | None = None
    usage: object = None
    error: _Error | None = None
    incomplete_details: _Incomplete | None = None


class Event(msgspec.Struct):
    """One event of the stream; everything but its type may be missing."""

    type: str = ""
    delta: str | None = None
    response: Answer | None = None
    item: dict[str, object] | None = None
    summary_index: int | None = None
    code: str | int | None = None
    message: str | None = None
    error: _Error | None = None


class _Kind(msgspec.Struct):
    type: str = ""


def decode_event(data: bytes) -> Event:
    """Decode one event; of one that is not looked into only the type.

    Raises:
        MalformedResponse: it is not an event of a response.
    """
    told = _loaded(data)
    kind = _converted(told, _Kind, data).type
    # Some send an error without a type, as in the other protocol.
    return _converted(told, Event, data) if kind in _READ or not kind else Event(kind)


def decode_answer(data: bytes) -> Answer:
    """Decode a response that was fetched whole.

    Raises:
        MalformedResponse: it is not a response.
    """
    return _converted(_loaded(data), Answer, data)


_T = TypeVar("_T")


def _loaded(data: bytes) -> object:
    try:
        # The standard library's decoder: NaN in a usage is no reason to lose a reply.
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unreadable(data, error) from None


def _converted(value: object, kind: type[_T], data: bytes) -> _T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _unreadable(data, error) from None


def _unreadable(data: bytes, error: Exception) -> MalformedResponse:
    start = data[:80].decode(errors="replace")
    return MalformedResponse(f"the provider sent what is no part of a response ({error}): {start!r}", transient=True)


@dataclass(slots=True)
class Assembly:
    """A reply under construction.

    Attributes:
        goes_on: whether the response does where its stream breaks off.
        response_id: the provider's id of it, once it is known.
        answer: the response as it ended; None while it goes on.
    """

    goes_on: bool = False
    response_id: str = ""
    answer: Answer | None = None
    _items: list[dict[str, object]] = field(default_factory=list[dict[str, object]])

    def add(self, event: Event) -> TextDelta | ReasoningDelta | None:
        """Take one event and return what a viewer is shown of it.

        Raises:
            LLMError: the provider says that it cannot go on.
        """
        kind = event.type
        if kind in _TEXT:
            return TextDelta(clean(event.delta)) if event.delta else None
        if kind in _THOUGHT:
            return ReasoningDelta(clean(event.delta)) if event.delta else None
        if kind == "response.reasoning_summary_part.added":
            return ReasoningDelta("\n\n") if event.summary_index else None
        if kind == "response.output_item.done":
            if event.item is not None:
                self._items.append(event.item)
        elif event.response is not None:
            self.take(event.response, _ENDS.get(kind, ""))
        elif kind == "error" or event.error is not None:
            raise self._broken_off(event.error or _Error(event.message, event.code))
        return None

    def take(self, response: Answer, end: str = "") -> None:
        """Take what the provider says of the whole response.

        Args:
            response: the response.
            end: the status it has ended with where it has none of its own; empty where that is not known.
        """
        self.response_id = response.id or self.response_id
        response.status = response.status or end or None
        if response.status is not None and response.status not in RUNNING:
            response.output = response.output or self._items
            self.answer = response

    def _broken_off(self, error: _Error) -> LLMError:
        """Turn an error that arrived inside the stream into an exception. Most are the server's, and transient."""
        text = f"the provider broke off the reply: {error.message or error.type or error.code or 'no reason given'}"
        return LLMError(text, transient=self.goes_on or "invalid" not in f"{error.type} {error.code}")


def read_response(answer: Answer, request: LLMRequest) -> LLMResponse:
    """Return the whole reply, without its usage.

    Raises:
        LLMError: the response has failed, or somebody has cancelled it.
    """
    if answer.status == "failed":
        raise _failed(answer.error or _Error())
    if answer.status == "cancelled":
        text = "the response was cancelled at the provider"
        raise LLMError(text, response_ended=True)
    finish = finish_reason("stop")
    if answer.status != "completed":
        why = answer.incomplete_details
        finish = finish_reason((why.reason if why else None) or "incomplete")
        finish = "error" if finish in ("stop", "tool_calls") else finish
    parts, refusal = _parts(answer.output or ())
    if refusal:
        finish = "content_filter"
        parts = [*(part for part in parts if isinstance(part, Reasoning)), Text(refusal)]
    calls = [part for part in parts if isinstance(part, ToolCall)]
    malformed, confidence = "", None
    if calls and finish == "stop":
        finish = "tool_calls"
        if any(not call.name for call in calls):
            malformed = "a tool call has no name; name one of the tools you were given"
    elif calls:  # half a reply's calls are never acted on
        parts = [part for part in parts if not isinstance(part, ToolCall)]
    elif finish == "stop" and parts and isinstance(last := parts[-1], Text):
        names = [spec.name for spec in request.tools]
        text, malformed, confidence = read_answer(last.text, names, confidence=request.confidence)
        parts[-1] = Text(text)
    return LLMResponse(
        tuple(parts),
        finish,
        model=answer.model or "",
        response_id=answer.id or "",
        malformed=malformed,
        confidence=confidence,
    )


def _parts(output: Sequence[Mapping[str, object]]) -> tuple[list[Part], str]:
    """Return the parts of a reply in the model's order, and what it refused with."""
    parts: list[Part] = []
    refusals: list[str] = []
    thoughts: list[int] = []  # places of the reasoning that has not led to anything yet
    for raw in output:
        try:
            item = msgspec.convert(raw, _Item)
        except msgspec.ValidationError:
            continue
        words = item.content or []
        if item.type == "reasoning":
            thoughts.append(len(parts))
            parts.append(_thought(raw, item))
            continue
        if item.type == "message":
            refusals += [word.refusal for word in words if word.refusal]
            text = clean("".join(word.text for word in words if word.text))
            if not text:
                continue
            parts.append(Text(text))
        elif item.type == "function_call":
            parts.append(ToolCall(item.call_id or "", clean(item.name or ""), clean(item.arguments or "") or "{}"))
        else:
            continue
        for place in thoughts:
            parts[place] = _led_to(parts[place], item.id)
        thoughts = []
    return parts, clean("".join(refusals))


def _thought(raw: Mapping[str, object], item: _Item) -> Reasoning:
    words = item.summary or item.content or []
    text = clean("\n\n".join(word.text for word in words if word.text))
    kept = {key: value for key, value in raw.items() if value is not None and key != "status"}
    return Reasoning(text, {OURS: kept})


def _led_to(part: Part, next_id: str | None) -> Part:
    if not next_id or not isinstance(part, Reasoning) or part.provider_data is None:
        return part
    return Reasoning(part.text, {**part.provider_data, NEXT_ID: next_id})


class _InputDetails(msgspec.Struct):
    cached_tokens: object = None
    cache_write_tokens: object = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: object = None


class _Reported(msgspec.Struct):
    input_tokens: object = None
    output_tokens: object = None
    input_tokens_details: _InputDetails | None = None
    output_tokens_details: _OutputDetails | None = None


def read_usage(reported: object) -> Usage | None:
    """Read a provider's token counts; None where they are missing or no counts.

    >>> read_usage({"input_tokens": 9, "output_tokens": 5}) == Usage(9, 5)
    True
    """
    try:
        counts = msgspec.convert(reported, _Reported)
    except msgspec.ValidationError:
        return None
    tokens_in, tokens_out = whole(counts.input_tokens), whole(counts.output_tokens)
    if tokens_in is None or tokens_out is None:
        return None
    of_input = counts.input_tokens_details or _InputDetails()
    cached = min(whole(of_input.cached_tokens) or 0, tokens_in)
    written = min(whole(of_input.cache_write_tokens) or 0, tokens_in - cached)
    reasoning = whole((counts.output_tokens_details or _OutputDetails()).reasoning_tokens) or 0
    return Usage(
        tokens_in,
        tokens_out,
        cache_read_tokens=cached,
        cache_write_tokens=written,
        reasoning_tokens=min(reasoning, tokens_out),
    )


def _failed(error: _Error) -> LLMError:
    """Return the error of a response that has come to a bad end."""
    text = f"the response failed: {error.message or error.code or 'no reason given'}"
    if error.code in _REFUSED:
        return LLMRefused(text, response_ended=True)
    return LLMError(text, transient=error.code is None or error.code in _TRANSIENT, response_ended=True)
