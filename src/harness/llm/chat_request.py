"""A request in the words of the chat-completions protocol: our messages and tools as its JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec

from harness.llm.abilities import Ability
from harness.llm.base import LLMRequest
from harness.llm.calls import NO_RESULT, CallBook
from harness.llm.replies import CONFIDENCE_REQUEST, clean
from harness.messages import JSON, Image, Message, Part, Reasoning, Text, ToolCall, ToolResult
from harness.tools.base import ToolSpec

Wire = dict[str, JSON]

SENT_BACK = ("reasoning_details",)
"""Keys of a reasoning part's provider data that belong in the assistant message again."""


def chat_body(request: LLMRequest, model: str, *, is_openai: bool, missing: frozenset[Ability] = frozenset()) -> Wire:
    """Build the body of a streamed chat completion.

    Args:
        request: what is asked.
        model: the model's name.
        is_openai: whether OpenAI itself is asked; it calls the output limit by another name than the servers
            that imitate it.
        missing: what the server does not take.
    """
    body: Wire = {"model": model, "messages": list[JSON](chat_messages(request, missing)), "stream": True}
    if "stream_options" not in missing:
        body["stream_options"] = {"include_usage": True}
    settings = request.settings
    if settings.temperature is not None and "temperature" not in missing:
        body["temperature"] = settings.temperature
    if settings.max_output_tokens is not None:
        newer = "max_completion_tokens" not in missing if is_openai else "max_tokens" in missing
        body["max_completion_tokens" if newer else "max_tokens"] = settings.max_output_tokens
    if settings.reasoning_effort is not None and "reasoning_effort" not in missing:
        body["reasoning_effort"] = settings.reasoning_effort
    if request.tools:
        body["tools"] = [_tool(spec) for spec in request.tools]
    if request.response_schema is not None and "response_format" not in missing:
        any_object: Wire = {"type": "json_object"}
        body["response_format"] = any_object if "json_schema" in missing else response_format(request.response_schema)
    return body


def response_format(schema: Mapping[str, JSON]) -> Wire:
    """Return the request for a reply that matches a schema."""
    return {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": dict(schema)}}


def _tool(spec: ToolSpec) -> Wire:
    function: Wire = {"name": spec.name, "description": spec.description, "parameters": dict(spec.schema)}
    return {"type": "function", "function": function}


def chat_messages(request: LLMRequest, missing: frozenset[Ability] = frozenset()) -> list[Wire]:
    """Map the system prompt and the conversation to protocol messages."""
    prompt = request.system
    if request.confidence:
        prompt = f"{prompt}\n\n{CONFIDENCE_REQUEST}".strip()
    conversation = _Conversation([])
    for position, message in enumerate(request.messages):
        conversation.add(position, message)
    conversation.end_turn()
    messages = conversation.messages
    if not prompt:
        return messages
    if "system" in missing and messages and messages[0]["role"] == "user":
        return [{"role": "user", "content": _after(prompt, messages[0]["content"])}, *messages[1:]]
    return [{"role": "user" if "system" in missing else "system", "content": prompt}, *messages]


def _after(prompt: str, said: JSON) -> JSON:
    """Put a prompt before what a user says."""
    if isinstance(said, list):
        opening: Wire = {"type": "text", "text": prompt}
        return [opening, *said]
    return f"{prompt}\n\n{said}"


@dataclass(slots=True)
class _Conversation:
    """Protocol messages under construction.

    Attributes:
        messages: what was built so far.
        calls: the calls in them.
        after: what follows the turn's results as a user message, because the protocol takes it from a user only.
    """

    messages: list[Wire]
    calls: CallBook = field(default_factory=CallBook)
    after: list[JSON] = field(default_factory=list[JSON])

    def add(self, position: int, message: Message) -> None:
        """Add one of our messages."""
        if message.role == "tool":
            for part in message.parts:
                if isinstance(part, ToolResult):
                    self._result(part)
                elif isinstance(part, Image):
                    self.after.append(_image(part))
            return
        self.end_turn()
        if message.role == "assistant":
            self._assistant(position, message)
        elif said := content(message.parts):
            self.messages.append({"role": message.role, "content": said})

    def end_turn(self) -> None:
        """Close the turn: an answer for every call that has none, then what a user has to say."""
        for wire_id in self.calls.unanswered():
            self.messages.append({"role": "tool", "tool_call_id": wire_id, "content": NO_RESULT})
        if self.after:
            self.messages.append({"role": "user", "content": _plain(self.after)})
        self.after = []

    def _assistant(self, position: int, message: Message) -> None:
        wire: Wire = {"role": "assistant"}
        for part in message.parts:
            if isinstance(part, Reasoning) and part.provider_data:
                wire.update(
                    {key: cast("JSON", part.provider_data[key]) for key in SENT_BACK if key in part.provider_data}
                )
        calls = [_call(call, self.calls.opened(call, position, index)) for index, call in enumerate(message.tool_calls)]
        if calls:
            wire["tool_calls"] = list[JSON](calls)
        if text := message.text:
            wire["content"] = text
        if len(wire) > 1:
            self.messages.append(wire)

    def _result(self, result: ToolResult) -> None:
        wire_id = self.calls.answered(result)
        if wire_id is None:  # its call was dropped; the protocol refuses a result without one
            self.after.append(_text(f"Result of {result.name}:\n{result.text}"))
            return
        self.messages.append({"role": "tool", "tool_call_id": wire_id, "content": result.text})


def _call(call: ToolCall, wire_id: str) -> Wire:
    function: Wire = {"name": call.name, "arguments": arguments_on_the_wire(call.arguments)}
    return {"id": wire_id, "type": "function", "function": function}


_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def arguments_on_the_wire(written: str) -> str:
    """Return arguments as servers take them back: many refuse a conversation with a call that is no JSON object."""
    try:
        _object.decode(written)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return msgspec.json.encode({"unreadable_arguments": clean(written)}).decode()
    return written


def content(parts: Sequence[Part]) -> JSON:
    """Return a message's content: a plain text where it has no image, for servers that know only that."""
    if not any(isinstance(part, Image) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, Text))
    mixed: list[JSON] = []
    for part in parts:
        if isinstance(part, Text):
            mixed.append(_text(part.text))
        elif isinstance(part, Image):
            mixed.append(_image(part))
    return mixed


def _plain(content: list[JSON]) -> JSON:
    """Return a content without images as one text, for servers that know nothing else."""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n\n".join(text for text in texts if isinstance(text, str)) if None not in texts else content


def _text(text: str) -> Wire:
    return {"type": "text", "text": text}


def _image(image: Image) -> Wire:
    url: Wire = {"url": image.url, "detail": image.detail}
    return {"type": "image_url", "image_url": url}
