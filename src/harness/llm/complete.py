"""Bring your own: any object with ``async complete(system, messages, **kw)`` as a language model."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Protocol, cast, runtime_checkable

from harness.budget import Usage
from harness.errors import LLMError, MalformedResponse
from harness.llm.base import LLMDelta, LLMRequest, LLMResponse, ResponseDone, TextDelta
from harness.llm.calls import Wire
from harness.llm.chat_reply import is_transient
from harness.llm.chat_request import content, response_format
from harness.llm.prices import microusd, whole
from harness.llm.replies import clean, finish_reason, split_confidence, system_prompt
from harness.messages import Text

STEP_KEYS = frozenset({"thought", "action", "args", "actions", "answer", "confidence"})


@runtime_checkable
class Completes(Protocol):
    """What a model of one's own has to offer.

    ``complete(system, messages, **kw)`` is asked with the messages as plain ``{"role", "content"}`` dicts and, where
    its signature takes them, with ``response_format``, ``temperature``, ``max_output_tokens`` and
    ``reasoning_effort``. It returns a text, ``{"text" or "content": str, "usage"?, "finish_reason"?}``, or the step
    itself as a dict. An optional ``async stream_complete(system, messages)`` yields the text in pieces instead.

    >>> class Echo:
    ...     async def complete(self, system, messages):
    ...         return messages[-1]["content"]
    >>> isinstance(Echo(), Completes)
    True
    """

    @property
    def complete(self) -> Callable[..., object]:
        """Answer one request."""
        ...


class CompleteLLM:
    """A model of one's own behind the LLM port; it is asked for text only, never for tool calls.

    Args:
        obj: an object as described by ``Completes``.
    """

    def __init__(self, obj: Completes) -> None:
        self._obj = obj
        self._stream_complete = cast("Callable[..., AsyncIterator[str]] | None", getattr(obj, "stream_complete", None))
        self.name = _named(obj, "name", "model") or type(obj).__name__
        self.provider = _named(obj, "provider") or "custom"

    async def stream(self, request: LLMRequest, /) -> AsyncGenerator[LLMDelta]:
        """Ask once and yield the reply."""
        system = system_prompt(request)
        messages = plain_messages(request)
        reply: object
        try:
            if self._stream_complete is None:
                reply = await self._complete(system, messages, request)
                text = _text_of(reply)
                yield TextDelta(text)
            else:
                pieces: list[str] = []
                async for piece in self._stream_complete(system, messages, **_accepted(self._stream_complete, request)):
                    pieces.append(piece)
                    yield TextDelta(clean(piece))
                reply = text = clean("".join(pieces))
        except LLMError:
            raise
        except Exception as error:  # a user's own object may raise anything
            transient = _looks_transient(error)
            raise LLMError(f"{self.name}: {type(error).__name__}: {error}", transient=transient) from error
        yield ResponseDone(_response(request, reply, text))

    async def _complete(self, system: str, messages: list[Wire], request: LLMRequest) -> object:
        complete = self._obj.complete
        reply = complete(system, messages, **_accepted(complete, request))
        if not inspect.isawaitable(reply):
            raise LLMError(f"{self.name}: complete() must be `async def`; it returned {type(reply).__name__!r}")
        return await reply


def plain_messages(request: LLMRequest) -> list[Wire]:
    """Return the conversation as ``{"role", "content"}`` dicts; a tool's result is told by the user."""
    plain: list[Wire] = []
    for message in request.messages:
        role = "user" if message.role == "tool" else message.role
        plain.append({"role": role, "content": content(message.parts)})
    return plain


def _accepted(function: Callable[..., object], request: LLMRequest) -> dict[str, object]:
    """Choose what a user's function is told besides prompt and messages: what is set and its signature takes."""
    settings = request.settings
    offered: dict[str, object] = {
        "response_format": response_format(request.response_schema) if request.response_schema else None,
        "temperature": settings.temperature,
        "max_output_tokens": settings.max_output_tokens,
        "reasoning_effort": settings.reasoning_effort,
    }
    offered = {name: value for name, value in offered.items() if value is not None}
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _looks_transient(error: Exception) -> bool:
    """Say whether a user's exception is a network's; clients have classes of their own for those."""
    if isinstance(error, OSError):  # TimeoutError and ConnectionError too
        return True
    if isinstance(status := getattr(error, "status_code", None), int):
        return is_transient(status)
    return any(word in cls.__name__ for cls in type(error).__mro__ for word in ("Timeout", "Connect"))


def _text_of(reply: object) -> str:
    """Take the text out of what ``complete`` returned; a step it has parsed itself becomes JSON text again."""
    if isinstance(reply, str):
        return clean(reply)
    if not isinstance(reply, Mapping):
        raise MalformedResponse(
            f"complete() must return a text or a dict with 'text' or 'content', not {type(reply).__name__!r}"
        )
    fields = cast("Mapping[str, object]", reply)
    for key in ("text", "content"):
        if isinstance(text := fields.get(key), str):
            return clean(text)
    if "action" in fields or "actions" in fields:
        step = {key: value for key, value in fields.items() if key in STEP_KEYS}
        return clean(json.dumps(step, ensure_ascii=False))
    found = sorted(map(str, fields))
    raise MalformedResponse(f"complete() returned a dict without 'text', 'content' or a step's 'action': {found!r}")


def _response(request: LLMRequest, reply: object, text: str) -> LLMResponse:
    fields = _mapping(reply)
    reason = fields.get("finish_reason")
    finish = finish_reason(reason) if isinstance(reason, str) and reason else "stop"
    if finish == "tool_calls":  # it was asked for text, and text is what came
        finish = "stop"
    confidence = None
    if request.confidence and finish == "stop":
        text, confidence = split_confidence(text)
    model = fields.get("model")
    return LLMResponse(
        (Text(text),) if text else (),
        finish,
        _usage(fields),
        model if isinstance(model, str) else "",
        confidence=confidence,
    )


def _usage(fields: Mapping[str, object]) -> Usage:
    """Read usage under any of its usual names; a price that is not told is unknown."""
    usage = _mapping(fields.get("usage"))

    def tokens(*names: str) -> int:
        return next((count for name in names if (count := whole(usage.get(name))) is not None), 0)

    cost = next((c for where in (usage, fields) if (c := microusd(where.get("cost_usd"))) is not None), None)
    return Usage(
        tokens("tokens_in", "input_tokens", "prompt_tokens"),
        tokens("tokens_out", "output_tokens", "completion_tokens"),
        cost_microusd=cost or 0,
        unpriced=int(cost is None),
    )


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _named(obj: object, *attributes: str) -> str:
    """Return the first of an object's attributes that is a text."""
    return next((value for name in attributes if isinstance(value := getattr(obj, name, None), str)), "")
