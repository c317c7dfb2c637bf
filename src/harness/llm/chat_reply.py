"""A streamed chat completion put together again: events off the wire, deltas by index, one whole reply or none."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import msgspec

from harness.errors import LLMError, LLMHTTPError, MalformedResponse
from harness.llm.base import LLMRequest, LLMResponse, ReasoningDelta, TextDelta
from harness.llm.replies import clean, finish_reason, read_answer, split_thinking
from harness.messages import Part, Reasoning, Text, ToolCall

MAX_REPLY_BYTES = 50_000_000
DONE = b"[DONE]"

UNREADABLE_CALL = "tool_use_failed"
"""The code of an error with which a server tells that the model wrote a tool call it could not read."""

TRANSIENT_STATUSES = frozenset({408, 409, 429})


def is_transient(status: int) -> bool:
    """Say whether a call that was answered with this HTTP status may succeed later."""
    return status in TRANSIENT_STATUSES or status >= 500


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, object] | None = None  # some servers send an object instead of its text


class _CallDelta(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: object = None
    reasoning: object = None
    reasoning_details: object = None
    tool_calls: list[_CallDelta] | None = None


class _Choice(msgspec.Struct):
    index: int | None = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """One event of the stream; everything in it may be missing."""

    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: object = None
    error: object = None


async def events(pieces: AsyncIterator[bytes], *, max_bytes: int = MAX_REPLY_BYTES) -> AsyncGenerator[bytes]:
    """Split a body into the data of its server-sent events, up to and including ``[DONE]``.

    An event counts when the empty line after it is there (https://html.spec.whatwg.org/multipage/server-sent-events),
    so a body that was cut anywhere ends without ``[DONE]``.

    Raises:
        MalformedResponse: the body is larger than ``max_bytes``.
    """
    pending = bytearray()
    data: list[bytes] = []
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > max_bytes:
            raise MalformedResponse(f"the reply is larger than {max_bytes:,} bytes; it was given up")
        pending += piece
        if b"\n" not in piece:
            continue
        *lines, rest = pending.split(b"\n")
        pending = rest
        for raw in lines:
            line = raw.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(bytes(line[5:].strip()))
            elif not line and data:
                event, data = b"\n".join(data), []
                yield event
                if event == DONE:
                    return


def decode_chunk(event: bytes) -> Chunk:
    """Decode one event.

    Raises:
        MalformedResponse: it is not a chunk of a chat completion.
    """
    try:
        # The standard library's decoder: NaN in a usage is no reason to lose a reply.
        return msgspec.convert(json.loads(event), Chunk)
    except (ValueError, RecursionError) as error:
        start = event[:80].decode(errors="replace")
        text = f"the provider sent an event that is no chat completion chunk ({error}): {start!r}"
        raise MalformedResponse(text, transient=True) from None


@dataclass(slots=True)
class _Call:
    index: int | None
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class Assembly:
    """A reply under construction.

    Attributes:
        usage: what the provider reported, unchecked.
        finish: the provider's finish reason, once it is known.
        model: the model that answers, as the provider names it.
        response_id: the provider's id of the response.
    """

    usage: object = None
    finish: str = ""
    model: str = ""
    response_id: str = ""
    _text: list[str] = field(default_factory=list[str])
    _reasoning: list[str] = field(default_factory=list[str])
    _refusal: list[str] = field(default_factory=list[str])
    _details: list[object] = field(default_factory=list[object])
    _calls: list[_Call] = field(default_factory=list[_Call])

    @property
    def is_empty(self) -> bool:
        """Whether the model has said nothing yet."""
        return not (self._text or self._reasoning or self._refusal or self._details or self._calls)

    def add(self, chunk: Chunk) -> TextDelta | ReasoningDelta | None:
        """Take one chunk in and return what a viewer may see of it.

        Raises:
            LLMError: the chunk is the provider's report of an error.
        """
        if chunk.error:
            raise _stream_error(chunk.error)
        self.model = chunk.model or self.model
        self.response_id = chunk.id or self.response_id
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices or ():
            if choice.index:  # we asked for one choice
                continue
            self.finish = choice.finish_reason or self.finish
            if choice.delta is not None:
                return self._delta(choice.delta)
        return None

    def _delta(self, delta: _Delta) -> TextDelta | ReasoningDelta | None:
        for call in delta.tool_calls or ():
            self._call(call)
        if delta.refusal:
            self._refusal.append(delta.refusal)
        if isinstance(delta.reasoning_details, list):
            self._details += delta.reasoning_details  # pyright: ignore[reportUnknownMemberType] - opaque to us
        reasoning = delta.reasoning_content or delta.reasoning
        if isinstance(reasoning, str) and reasoning:
            self._reasoning.append(reasoning)
            if not delta.content:
                return ReasoningDelta(clean(reasoning))
        if delta.content:
            self._text.append(delta.content)
            return TextDelta(clean(delta.content))
        return None

    def _call(self, delta: _CallDelta) -> None:
        function = delta.function or _Function()
        call = self._find(delta, function)
        call.id = call.id or delta.id or ""
        if function.name and function.name != call.name:  # some servers repeat the name in every delta
            call.name += function.name
        if isinstance(function.arguments, dict):
            call.arguments.append(msgspec.json.encode(function.arguments).decode())
        elif function.arguments:
            call.arguments.append(function.arguments)

    def _find(self, delta: _CallDelta, function: _Function) -> _Call:
        """Find the call a delta goes on with, or open a new one.

        Some servers send no index, or the same one for every call: a delta with a name and an id of its own opens a
        call whatever its index says.
        """
        known = next((c for c in reversed(self._calls) if c.index == delta.index), None)
        opens = bool(function.name and (not delta.id or (known is not None and known.id and delta.id != known.id)))
        if known is None or (opens and (delta.index is None or bool(delta.id))):
            known = _Call(delta.index)
            self._calls.append(known)
        return known

    def response(self, request: LLMRequest) -> LLMResponse:
        """Return the whole reply, without its usage.

        Raises:
            MalformedResponse: the provider never said that the reply ended.
        """
        if not self.finish:
            text = "the provider's stream ended before the reply was complete"
            raise MalformedResponse(text, transient=True, billed=True)
        finish = finish_reason(self.finish)
        text = clean("".join(self._refusal or self._text))
        if self._refusal:
            finish = "content_filter"
        thinking, text = split_thinking(text)
        calls: tuple[ToolCall, ...] = ()
        if finish in ("stop", "tool_calls"):  # half a reply's calls are never acted on
            calls = tuple(ToolCall(c.id, clean(c.name), clean("".join(c.arguments)) or "{}") for c in self._calls)
            finish = "tool_calls" if calls else "stop"
        malformed, confidence = "", None
        if any(not call.name for call in calls):
            malformed = "a tool call has no name; name one of the tools you were given"
        elif not calls and finish == "stop":
            tools = [spec.name for spec in request.tools]
            text, malformed, confidence = read_answer(text, tools, confidence=request.confidence)
        said: tuple[Part, ...] = (Text(text),) if text else ()
        parts = (*self._thought(thinking), *said, *calls)
        return LLMResponse(
            parts, finish, model=self.model, response_id=self.response_id, malformed=malformed, confidence=confidence
        )

    def _thought(self, thinking: str) -> tuple[Reasoning, ...]:
        text = clean("".join(self._reasoning)) or thinking
        if not (text or self._details):
            return ()
        return (Reasoning(text, {"reasoning_details": self._details} if self._details else None),)


def body_text(body: object) -> str:
    """Return the body of an error as text, whatever was made of it."""
    return body if isinstance(body, str) else msgspec.json.encode(body).decode()


class _Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None
    type: str | None = None


def _stream_error(body: object) -> LLMError:
    """Turn an error that arrived inside a stream into an exception. The server broke off, so most are transient."""
    try:
        error = msgspec.convert(body, _Error)
    except msgspec.ValidationError:
        error = _Error(str(body)[:300])
    text = f"the provider broke off the reply: {error.message or error.type or 'no reason given'}"
    if isinstance(error.code, int) and 400 <= error.code < 600:
        return LLMHTTPError(text, status=error.code, transient=is_transient(error.code), body=body_text(body))
    if error.code == UNREADABLE_CALL:
        return MalformedResponse(text, transient=True, billed=True)
    return LLMError(text, transient="invalid" not in str(error.type))
