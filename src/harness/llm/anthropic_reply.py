"""A streamed message put together again: blocks by index, one whole reply or none."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import cast

import msgspec

from harness.budget import Usage
from harness.errors import LLMError, LLMHTTPError, MalformedResponse
from harness.llm.anthropic_request import BEFORE, OURS, REPLY_TOOL, Asked, reply_tool
from harness.llm.base import LLMRequest, LLMResponse, ReasoningDelta, TextDelta
from harness.llm.chat_reply import is_transient
from harness.llm.prices import whole
from harness.llm.replies import clean, decode, finish_reason, is_object, read_answer
from harness.messages import Part, Reasoning, Text, ToolCall
from harness.records import FinishReason

STATUS_OF = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""The HTTP status of each kind of error, for one that is told inside a stream."""

KNOWN = frozenset(
    {"message_start", "content_block_start", "content_block_delta", "message_delta", "message_stop", "error"}
)
"""The events that are read; what a later version of the API adds is passed over."""

FILTERED = "content filtering policy"


class _Message(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    usage: object = None


class _ContentBlock(msgspec.Struct):
    type: str = ""
    id: str | None = None
    name: str | None = None
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    input: object = None


class _Delta(msgspec.Struct):
    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None
    stop_details: object = None


class StreamEvent(msgspec.Struct):
    """One event of the stream; everything in it but its type may be missing."""

    type: str = ""
    index: int | None = None
    message: _Message | None = None
    content_block: _ContentBlock | None = None
    delta: _Delta | None = None
    usage: object = None
    error: object = None


def decode_event(event: bytes) -> StreamEvent:
    """Decode one event.

    Raises:
        MalformedResponse: it is not an event of a message.
    """
    try:
        # The standard library's decoder: NaN in a usage is no reason to lose a reply.
        value: object = json.loads(event)
        if is_object(value) and value.get("type") not in KNOWN:
            return StreamEvent()
        return msgspec.convert(value, StreamEvent)
    except (ValueError, RecursionError) as error:
        start = event[:80].decode(errors="replace")
        text = f"the provider sent an event that is no part of a message ({error}): {start!r}"
        raise MalformedResponse(text, transient=True) from None


@dataclass(slots=True)
class _Block:
    kind: str
    start: _ContentBlock
    pieces: list[str] = field(default_factory=list[str])
    signature: str = ""


@dataclass(slots=True)
class Assembly:
    """A reply under construction.

    Attributes:
        done: whether the provider said that it was the end.
        usage: what the provider reported, unchecked; later numbers take the place of earlier ones.
        model: the model that answers, as the provider names it.
        response_id: the provider's id of the message.
    """

    done: bool = False
    usage: dict[str, object] = field(default_factory=dict[str, object])
    model: str = ""
    response_id: str = ""
    _finish: str = ""
    _explanation: str = ""
    _blocks: dict[int, _Block] = field(default_factory=dict[int, _Block])

    @property
    def begun(self) -> bool:
        """Whether the provider has begun to reply, and bills it."""
        return bool(self.response_id or self._blocks)

    def add(self, event: StreamEvent) -> TextDelta | ReasoningDelta | None:
        """Take one event in and return what a viewer may see of it.

        Raises:
            LLMError: the event is the provider's report of an error.
        """
        match event.type:
            case "content_block_delta" if event.delta is not None:
                return self._delta(event.index or 0, event.delta)
            case "content_block_start" if event.content_block is not None:
                return self._start(event.index or 0, event.content_block)
            case "message_start" if event.message is not None:
                self.response_id = event.message.id or ""
                self.model = event.message.model or ""
                self._count(event.message.usage)
            case "message_delta":
                if event.delta is not None:
                    self._finish = event.delta.stop_reason or self._finish
                    if is_object(details := event.delta.stop_details):
                        self._explanation = str(details.get("explanation") or "")
                self._count(event.usage)
            case "message_stop":
                self.done = True
            case "error":
                raise stream_error(event.error)
            case _:
                pass
        return None

    def _count(self, reported: object) -> None:
        if is_object(reported):
            self.usage.update({name: count for name, count in reported.items() if count is not None})

    def _start(self, index: int, start: _ContentBlock) -> TextDelta | ReasoningDelta | None:
        block = self._blocks[index] = _Block(start.type, start, signature=start.signature or "")
        if start.type == "text" and start.text:
            block.pieces.append(start.text)
            return TextDelta(clean(start.text))
        if start.type == "thinking" and start.thinking:
            block.pieces.append(start.thinking)
            return ReasoningDelta(clean(start.thinking))
        return None

    def _delta(self, index: int, delta: _Delta) -> TextDelta | ReasoningDelta | None:
        block = self._blocks.get(index)
        if block is None:
            return None
        if delta.signature:
            block.signature = delta.signature
        piece = delta.text or delta.thinking or delta.partial_json
        if not piece:
            return None
        block.pieces.append(piece)
        if delta.text:
            return TextDelta(clean(piece))
        return ReasoningDelta(clean(piece)) if delta.thinking else None

    def response(self, request: LLMRequest, asked: Asked) -> LLMResponse:
        """Return the whole reply, without its usage.

        Args:
            request: what was asked.
            asked: how it was asked.

        Raises:
            MalformedResponse: the provider never said why the reply ended.
        """
        if not self._finish:
            text = "the provider's stream ended before the reply was complete"
            raise MalformedResponse(text, transient=True, billed=True)
        finish = finish_reason(self._finish)
        ended_well = finish in ("stop", "tool_calls")  # half a reply's calls are never acted on, nor is it gone on with
        digest = asked.digest if ended_well else None
        # Texts that follow each other are not joined: what comes after them was thought with them as they are.
        parts = [part for block in self._blocks.values() if (part := self._part(block, digest)) is not None]
        if finish == "content_filter" and self._explanation and not any(isinstance(part, Text) for part in parts):
            parts.append(Text(clean(self._explanation)))
        if asked.forced and ended_well:
            parts = _from_tool(parts, request, asked)
        return self._judged(request, parts, "stop" if ended_well else finish)

    def _part(self, block: _Block, digest: str | None) -> Part | None:
        text = clean("".join(block.pieces))
        match block.kind:
            case "text":
                return Text(text) if text else None
            case "thinking":
                sent: dict[str, object] = {"type": "thinking", "thinking": text, "signature": clean(block.signature)}
                return Reasoning(text, _kept(sent, digest)) if text or block.signature else None
            case "redacted_thinking":
                sealed: dict[str, object] = {"type": "redacted_thinking", "data": clean(block.start.data or "")}
                return Reasoning("", _kept(sealed, digest))
            case "tool_use" if digest is not None:
                arguments = text or _whole_input(block.start.input)
                return ToolCall(block.start.id or "", clean(block.start.name or ""), arguments)
            case _:
                return None

    def _judged(self, request: LLMRequest, parts: list[Part], finish: FinishReason) -> LLMResponse:
        calls = [part for part in parts if isinstance(part, ToolCall)]
        malformed, confidence = "", None
        last = next((i for i in reversed(range(len(parts))) if isinstance(parts[i], Text)), None)
        if any(not call.name for call in calls):
            malformed = "a tool call has no name; name one of the tools you were given"
        elif not calls and finish == "stop" and last is not None:
            said = cast("Text", parts[last]).text
            tools = [spec.name for spec in request.tools]
            text, malformed, confidence = read_answer(said, tools, confidence=request.confidence)
            parts[last] = Text(text)
        return LLMResponse(
            tuple(parts),
            "tool_calls" if calls else finish,
            model=self.model,
            response_id=self.response_id,
            malformed=malformed,
            confidence=confidence,
        )


def _kept(block: dict[str, object], digest: str | None) -> dict[str, object] | None:
    return None if digest is None else {OURS: block, BEFORE: digest}


def _whole_input(value: object) -> str:
    """Return a call's arguments where a server sent them whole, instead of in pieces."""
    return msgspec.json.encode(value).decode() if is_object(value) else "{}"


def _from_tool(parts: list[Part], request: LLMRequest, asked: Asked) -> list[Part]:
    """Take a reply out of the tool call it was asked for in."""
    name = reply_tool(request)
    replies = [part for part in parts if isinstance(part, ToolCall) and part.name == name]
    if not replies:
        return parts
    text = replies[0].arguments
    if asked.wrapped:
        try:
            value = decode(text)
        except ValueError:
            value = None
        if is_object(value) and REPLY_TOOL in value:
            text = msgspec.json.encode(value[REPLY_TOOL]).decode()
    return [*(part for part in parts if isinstance(part, Reasoning)), Text(text)]


def read_usage(reported: dict[str, object]) -> Usage | None:
    """Read a provider's token counts; None where they are missing or no counts.

    The API counts what was read from its cache and what was written to it apart from the rest of the input.

    >>> read_usage({"input_tokens": 5, "cache_read_input_tokens": 90, "output_tokens": 2}).input_tokens
    95
    """
    rest, tokens_out = whole(reported.get("input_tokens")), whole(reported.get("output_tokens"))
    if rest is None or tokens_out is None:
        return None
    read = whole(reported.get("cache_read_input_tokens")) or 0
    written = whole(reported.get("cache_creation_input_tokens")) or 0
    details = reported.get("output_tokens_details")
    thought = whole(details.get("thinking_tokens")) or 0 if is_object(details) else 0
    return Usage(
        rest + read + written,
        tokens_out,
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=min(thought, tokens_out),
    )


class _Error(msgspec.Struct):
    message: str = ""
    type: str | None = None


def stream_error(body: object) -> LLMError:
    """Turn an error that arrived inside a stream into an exception. The server broke off, so most are transient."""
    try:
        error = msgspec.convert(body, _Error)
    except msgspec.ValidationError:
        error = _Error(str(body)[:300])
    text = f"the provider broke off the reply: {error.message or error.type or 'no reason given'}"
    status = STATUS_OF.get(error.type or "")
    if status is None:
        return LLMError(text, transient="invalid" not in str(error.type))
    return LLMHTTPError(text, status=status, transient=is_transient(status))
