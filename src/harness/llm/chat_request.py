"""A request in the words of the chat-completions protocol: our messages and tools as its JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness.llm.base import LLMRequest
from harness.llm.replies import CONFIDENCE_REQUEST
from harness.messages import JSON, Image, Message, Reasoning, Text, ToolCall, ToolResult
from harness.tools.base import ToolSpec

Wire = dict[str, JSON]

SENT_BACK = ("reasoning_details",)
"""Keys of a reasoning part's provider data that belong in the assistant message again."""

NO_RESULT = "(this call has no recorded result)"


def chat_body(request: LLMRequest, model: str, *, is_openai: bool) -> Wire:
    """Build the body of a streamed chat completion.

    Args:
        request: what is asked.
        model: the model's name.
        is_openai: whether OpenAI itself is asked; it calls the output limit by another name than the servers
            that imitate it.
    """
    body: Wire = {
        "model": model,
        "messages": list[JSON](chat_messages(request)),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    settings = request.settings
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.max_output_tokens is not None:
        body["max_completion_tokens" if is_openai else "max_tokens"] = settings.max_output_tokens
    if settings.reasoning_effort is not None:
        body["reasoning_effort"] = settings.reasoning_effort
    if request.tools:
        body["tools"] = [_tool(spec) for spec in request.tools]
    if request.response_schema is not None:
        schema = dict(request.response_schema)
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": schema},
        }
    return body


def _tool(spec: ToolSpec) -> Wire:
    function: Wire = {"name": spec.name, "description": spec.description, "parameters": dict(spec.schema)}
    return {"type": "function", "function": function}


def chat_messages(request: LLMRequest) -> list[Wire]:
    """Map the system prompt and the conversation to protocol messages."""
    prompt = request.system
    if request.confidence:
        prompt = f"{prompt}\n\n{CONFIDENCE_REQUEST}".strip()
    conversation = _Conversation([{"role": "system", "content": prompt}] if prompt else [])
    for position, message in enumerate(request.messages):
        conversation.add(position, message)
    conversation.end_turn()
    return conversation.messages


@dataclass(slots=True)
class _Open:
    """A call of the current turn that has no result yet."""

    call: ToolCall
    wire_id: str


@dataclass(slots=True)
class _Conversation:
    """Protocol messages under construction.

    The protocol wants every call id once and every call answered right after the message that made it. Ours are data
    that may be empty or repeat, so a call keeps its id where it can and gets one from its position where it cannot.

    Attributes:
        messages: what was built so far.
        used: call ids that are taken.
        open: calls of the last assistant message without a result.
        images: images of this turn's results; the protocol takes them from a user only.
    """

    messages: list[Wire]
    used: set[str] = field(default_factory=set[str])
    open: list[_Open] = field(default_factory=list[_Open])
    images: list[Image] = field(default_factory=list[Image])

    def add(self, position: int, message: Message) -> None:
        """Add one of our messages."""
        if message.role == "tool":
            self._results(message)
            return
        self.end_turn()
        if message.role == "assistant":
            self._assistant(position, message)
        elif message.parts:
            self.messages.append({"role": message.role, "content": _content(message.parts)})

    def end_turn(self) -> None:
        """Close the turn: a result for every call that has none, then the results' images."""
        for pending in self.open:
            self.messages.append({"role": "tool", "tool_call_id": pending.wire_id, "content": NO_RESULT})
        if self.images:
            images = [_image(image) for image in self.images]
            caption: Wire = {"type": "text", "text": "The images of the tool results above:"}
            self.messages.append({"role": "user", "content": [caption, *images]})
        self.open, self.images = [], []

    def _assistant(self, position: int, message: Message) -> None:
        wire: Wire = {"role": "assistant"}
        for part in message.parts:
            if isinstance(part, Reasoning) and part.provider_data:
                wire.update((key, part.provider_data[key]) for key in SENT_BACK if key in part.provider_data)  # type: ignore[misc]  # it came from JSON
        for index, call in enumerate(message.tool_calls):
            self.open.append(_Open(call, self._wire_id(call.id, position, index)))
        text = message.text
        if text or not self.open:
            wire["content"] = text
        if self.open:
            wire["tool_calls"] = [_call(pending) for pending in self.open]
        if text or len(wire) > 2:
            self.messages.append(wire)

    def _wire_id(self, call_id: str, position: int, index: int) -> str:
        if not call_id or call_id in self.used:
            call_id = f"call_{position}_{index}"
        while call_id in self.used:
            call_id += "_"
        self.used.add(call_id)
        return call_id

    def _results(self, message: Message) -> None:
        for part in message.parts:
            if isinstance(part, Image):
                self.images.append(part)
            elif isinstance(part, ToolResult):
                self._result(part)

    def _result(self, result: ToolResult) -> None:
        """Answer the first open call with the result's id and name, or failing that with its name."""
        for fits in _fits(result):
            for pending in self.open:
                if fits(pending.call):
                    self.open.remove(pending)
                    wire: Wire = {"role": "tool", "tool_call_id": pending.wire_id, "content": result.text}
                    self.messages.append(wire)
                    return
        # Its call was dropped from the conversation; the protocol refuses a result without one.
        self.messages.append({"role": "user", "content": f"Result of {result.name}:\n{result.text}"})
